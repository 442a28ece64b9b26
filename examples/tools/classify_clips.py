#!/usr/bin/env python
"""Scores and features of thousands of clips, to Parquet files that `datasets` reads.

    python examples/tools/classify_clips.py clips/ --output scores                # all videos in and below a folder
    python examples/tools/classify_clips.py clips.csv --output features --columns scores pooled
    accelerate launch examples/tools/classify_clips.py you/clips --split test --output scores   # a data set, all GPUs
    python examples/tools/classify_clips.py films/ --output features --dense 16   # a feature every 16 frames

Each part of `--part_size` clips is a file, written whole or not at all. After an interruption, the same command does
the missing parts, on any number of processes, with the same result. Clips that have come to the source since are done
in new parts. Clips that cannot be read are skipped and listed in `unreadable.csv`.

`--dense FRAMES` writes no Parquet, but `<film>.npy` of each file, (T, C) float32: features of windows that slide over
it, for toolboxes of temporal detection (docs/tools.md).

Columns: `clip` (its path, or row:name in a data set), `label` (the name of its folder, or the data set's), `scores` (a
probability for each label of the model, in the order of its config), `prediction` and `score` (the largest of them),
`predictions` (of a model that gives a clip several labels: all from 50 % on, the best first), `pooled` (what the
classifier reads, hidden size) and `tokens` (the last layer's, tokens x hidden size, float16).
"""

import argparse
import csv
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tool_models import THRESHOLD, add_model, gives_several, to_scores


VIDEO_SUFFIXES = {".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".ts", ".flv", ".3gp"}

STOPPED = "Stopped. Run the same command to do the rest."


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a folder or video, a .csv with path (and label), list of paths, or a data set")
    parser.add_argument("--split", default="train", help="split of a data set")
    add_model(parser)
    parser.add_argument("--output", type=Path, required=True, help="folder for the Parquet files")
    choices = ["scores", "pooled", "tokens"]
    parser.add_argument("--columns", nargs="+", choices=choices, default=["scores"], help="what to keep of each clip")
    parser.add_argument("--dense", type=int, metavar="FRAMES", help="features of windows so many frames apart")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--part_size", type=int, default=256, help="clips per file, and the most that a kill loses")
    share = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of the launcher's processes
    parser.add_argument(
        "--num_workers",
        type=int,
        default=max(1, share),
        help="processes that decode, for each GPU: by default all cores",
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the model")
    args = parser.parse_args()
    smallest = min(args.batch_size, args.part_size, 1 if args.dense is None else args.dense)
    if smallest < 1 or args.num_workers < 0:
        parser.error("--batch_size, --part_size and --dense must be at least 1, --num_workers at least 0")
    return args


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    parse_arguments()  # before the imports below, which take seconds

import torch
from huggingface_hub.errors import StrictDataclassError
from tqdm import tqdm
from transformers import AutoModelForVideoClassification, AutoVideoProcessor

from modeling_videomamba import ClipLoader, predict_clips  # also registers VideoMamba with the Auto classes
from modeling_videomamba.loading_videomamba import unloadable_reason


try:
    import datasets
    from accelerate import PartialState
    from accelerate.utils import gather_object
except ModuleNotFoundError as error:
    sys.exit(f"{error}. Install the extra `tools`: pip install '.[tools]' in a clone of videomamba-transformers.")


class Clip(NamedTuple):
    name: str  # a path, or what the data set calls it
    label: str | None
    row: int | None = None  # in the data set, if it comes from one


# ---------------------------------------------------------------------------------------------------------------------
# Which clips
# ---------------------------------------------------------------------------------------------------------------------


def list_clips(source, split):
    """The `Clip`s of a folder, a list or a data set, in an order that does not change; and the data set or None.

    A clip in a folder has the name of the folder in which it lies as its label.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in VIDEO_SUFFIXES)
        if files:
            return [Clip(str(file), file.parent.name if file.parent != path else None) for file in files], None
    elif path.suffix == ".csv":
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if rows and "path" not in rows[0]:
            raise ValueError(f"{path} has the columns {', '.join(rows[0])}; one of them must be called path.")
        return [Clip(row["path"], row.get("label", row.get("labels"))) for row in rows], None
    elif path.is_file() and path.suffix.lower() in VIDEO_SUFFIXES:
        return [Clip(str(path), None)], None
    elif path.is_file():
        return [Clip(line, None) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()], None
    return _list_data_set(source, split)


def _name(label, names):
    """A label of a data set as text; of several, between semicolons."""
    if isinstance(label, list):
        return ";".join(str(_name(each, names)) for each in label)
    return names[label] if names and label is not None and label >= 0 else label


def _list_data_set(source, split):
    try:
        data = datasets.load_dataset(source, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{source} is no folder of videos, no list, and no data set that can be loaded: {reason}"
        ) from error
    columns = [name for name, feature in data.features.items() if isinstance(feature, datasets.Video)]
    if not columns:
        raise ValueError(f"The data set {source} has no column of videos, only {', '.join(data.features)}.")
    data = data.cast_column(columns[0], datasets.Video(decode=False)).rename_column(columns[0], "video")
    labels = [None] * len(data)
    column = next((name for name in ("label", "labels") if name in data.features), None)
    if column is not None:
        kind = data.features[column]
        names = getattr(getattr(kind, "feature", kind), "names", None)
        labels = [_name(label, names) for label in data[column]]
    clips = []
    for row, label in enumerate(labels):
        name = os.path.basename(data[row]["video"]["path"] or "")
        clips.append(Clip(f"{row}:{name}", None if label is None else str(label), row))
    return clips, data.select_columns(["video"])


# ---------------------------------------------------------------------------------------------------------------------
# From clips to the model
# ---------------------------------------------------------------------------------------------------------------------


class Files:
    """What to read for each clip: its path, or the bytes of a file in a data set."""

    def __init__(self, clips, data):
        self.clips, self.data = clips, data

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, number):
        clip = self.clips[number]
        if clip.row is None:
            return clip.name
        video = self.data[clip.row]["video"]
        return video["bytes"] or video["path"]


class Classifier:
    def __init__(self, args, device):
        self.model = AutoModelForVideoClassification.from_pretrained(args.model, dtype=args.dtype).to(device).eval()
        self.processor = AutoVideoProcessor.from_pretrained(args.model)
        self.device, self.columns = device, args.columns
        self.several = gives_several(self.model.config)
        self.labels = [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]

    def __call__(self, pixel_values):
        """The wanted columns of a batch, by name."""
        outputs = self.model.base_model(pixel_values.to(self.model.dtype))
        columns = {"scores": to_scores(self.model.classifier(outputs.pooler_output), self.model.config)}
        columns |= {"pooled": outputs.pooler_output.float(), "tokens": outputs.last_hidden_state.half()}
        return {name: columns[name] for name in self.columns}


def write_part(path, clips, results, labels, several=False):
    """Writes one Parquet file, and before it the list of what could not be read, whole or not at all."""
    good = [clips[number] for batch, _ in results for number in batch.clips]
    unreadable = {clips[number].name: batch.errors[number] for batch, _ in results for number in sorted(batch.errors)}
    features = {"clip": datasets.Value("string"), "label": datasets.Value("string")}
    rows = {"clip": [clip.name for clip in good], "label": [clip.label for clip in good]}
    columns = [columns for _, columns in results if columns]
    arrays = {name: torch.cat([batch[name] for batch in columns]).numpy() for name in (columns[0] if columns else ())}
    if "scores" in arrays:
        features |= {"prediction": datasets.Value("string"), "score": datasets.Value("float32")}
        best = arrays["scores"].argmax(1)
        rows |= {"prediction": [labels[i] for i in best], "score": arrays["scores"].max(1)}
        if several:
            features["predictions"] = datasets.List(datasets.Value("string"))
            rows["predictions"] = [[labels[i] for i in (-s).argsort() if s[i] >= THRESHOLD] for s in arrays["scores"]]
    for name, values in arrays.items():
        rows[name] = values
        if name == "tokens":
            features[name] = datasets.Array2D(values.shape[1:], "float16")
        else:
            features[name] = datasets.List(datasets.Value("float32"), length=values.shape[1])
    listing = path.with_suffix(".unreadable.json")
    if unreadable:
        listing.write_text(json.dumps(unreadable), encoding="utf-8")
    else:
        listing.unlink(missing_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(str(temporary))
    os.replace(temporary, path)


def classify_parts(args, clips, data, classifier, parts, state):
    """Works through `parts`, a list of (file, numbers of clips). Returns what took how long."""
    batches, owners = [], []
    for number, (_, numbers) in enumerate(parts):
        for start in range(0, len(numbers), args.batch_size):
            batches.append(numbers[start : start + args.batch_size])
            owners.append(number)
    loader = ClipLoader(
        Files(clips, data),
        classifier.processor,
        batch_sampler=batches,
        num_workers=args.num_workers,
        device=classifier.device,
    )
    missing = Counter(owners)
    results = [[] for _ in parts]
    spent = {"clips": 0, "decoding": 0.0}
    start = time.perf_counter()
    bar = tqdm(total=sum(map(len, batches)), unit="clip", disable=not state.is_main_process)
    for batch, columns in predict_clips(classifier, loader):
        owner = owners[batch.index]
        results[owner].append((batch, columns))
        missing[owner] -= 1
        if not missing[owner]:
            in_order = sorted(results[owner], key=lambda result: result[0].index)
            write_part(parts[owner][0], clips, in_order, classifier.labels, classifier.several)
            results[owner] = None
        spent["decoding"] += batch.seconds
        spent["clips"] += len(batches[batch.index])
        bar.update(len(batches[batch.index]))
    bar.close()
    return spent | {"total": time.perf_counter() - start}


# ---------------------------------------------------------------------------------------------------------------------


def list_runs(folder, clips):
    """
    The clips of each run that the folder has seen, `list[list[Clip]]`; those that are new come last.

    Raises:
        ValueError: a clip of an earlier run is no longer there.
    """
    path = folder / "clips.json"
    runs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    by_name = {clip.name: clip for clip in clips}
    known = {name for run in runs for name in run}
    if gone := sorted(known - set(by_name)):
        raise ValueError(
            f"{folder} was begun with {gone[0]}{' and others' if len(gone) > 1 else ''}, no longer in the source. Put "
            "that back, name another --output, or delete that folder."
        )
    new = [clip.name for clip in clips if clip.name not in known]
    return [[by_name[name] for name in run] for run in [*runs, *[new] * bool(new)]]


def numbers_of_parts(counts, part_size):
    """The numbers of the clips of each file, `list[list[int]]`: no file has clips of two runs."""
    parts, first = [], 0
    for count in counts:
        numbers = list(range(first, first + count))
        parts += [numbers[start : start + part_size] for start in range(0, count, part_size)]
        first += count
    return parts


def write_json(path, content):
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(temporary, path)


def check_settings(folder, settings):
    """Parts of another model must not come together in one folder."""
    path = folder / "settings.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{folder} was begun with another {name} ({before.get(name)}, now {value}). Give the one that it "
                    "was begun with, name another --output, or delete that folder."
                )
    write_json(path, settings)


def report(args, folder, clips, spent):
    """The last lines, and `unreadable.csv`. `spent` holds what each process took."""
    listing = {}
    for file in sorted(folder.glob("part-*.unreadable.json")):
        listing |= json.loads(file.read_text(encoding="utf-8"))
    with open(folder / "unreadable.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("clip", "reason"), *listing.items()])
    done = sum(process["clips"] for process in spent)
    if done:
        longest = max(process["total"] for process in spent)
        decoders = len(spent) * max(1, args.num_workers)
        bound = decoders * done / sum(process["decoding"] for process in spent)
        print(
            f"{done} clip{'s' * (done != 1)} in {longest:.1f} s: {done / longest:.1f} clips a second, "
            f"{done / longest / bound:.0%} of the {bound:.1f} that {decoders} process{'es' * (decoders > 1)} can "
            "decode."
        )
    good = len(clips) - len(listing)
    print(f"{folder}: {good} clip{'s' * (good != 1)}; {len(listing)} could not be read (unreadable.csv).")


def write_dense(args, state):
    """`<film>.npy` of each file that has none yet; of all together `features.json`, and what could not be read."""
    from dense_features import FeatureTagger, write_features

    clips, data = list_clips(args.source, args.split)
    names = [Path(clip.name).stem for clip in clips]
    if data is not None:
        raise ValueError(f"--dense takes a folder or a list of files, not a data set ({args.source}).")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{args.source} has several files called {twice[0]}, whose features would have one name.")
    if taken := sorted({"features", "settings"} & set(names)):
        raise ValueError(f"{args.source} has a file called {taken[0]}, but {taken[0]}.json tells of all. Rename it.")
    args.output.mkdir(parents=True, exist_ok=True)
    tagger = FeatureTagger(args.model, state.device, 25)
    tagger.model.to(getattr(torch, args.dtype))
    settings = {"model": args.model, "dtype": args.dtype, "feature_stride": args.dense}
    if state.is_main_process:
        check_settings(args.output, settings)
    unreadable, own = {}, range(state.process_index, len(clips), state.num_processes)
    for number in tqdm(own, unit="film", disable=not state.is_main_process):
        if (args.output / f"{names[number]}.npy").exists():
            continue
        try:
            write_features(clips[number].name, args.output, tagger, args.dense, args.batch_size)
        except (OSError, ValueError) as error:
            unreadable[clips[number].name] = str(error)
    unreadable = {name: reason for part in gather_object([unreadable]) for name, reason in part.items()}
    if state.is_main_process:
        done = [name for name in names if (args.output / f"{name}.npy").exists()]
        films = {name: json.loads((args.output / f"{name}.json").read_text(encoding="utf-8")) for name in done}
        about = settings | {"feature_dim": tagger.model.config.hidden_size, "database": films}
        write_json(args.output / "features.json", about)
        with open(args.output / "unreadable.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("clip", "reason"), *unreadable.items()])
        print(f"{args.output}: {len(done)} film{'s' * (len(done) != 1)}; {len(unreadable)} could not be read.")


def main():
    args = parse_arguments()
    if reason := unloadable_reason(args.model):
        sys.exit(reason)
    # Without `cpu`, two processes on a machine without a GPU would not know of each other.
    state = PartialState(cpu=not torch.accelerator.is_available())
    datasets.disable_progress_bars()
    if args.dense is not None:
        try:
            return write_dense(args, state)
        except (ValueError, StrictDataclassError) as error:
            sys.exit(str(error))
        except KeyboardInterrupt:
            print(STOPPED)
            sys.exit(130)
    try:
        clips, data = list_clips(args.source, args.split)
        if not clips:
            raise ValueError(f"{args.source} names no clip.")
        classifier = Classifier(args, state.device)
        settings = {"model": args.model, "dtype": args.dtype, "columns": args.columns}
        settings |= {"part_size": args.part_size, "batch_size": args.batch_size, "labels": classifier.labels}
        args.output.mkdir(parents=True, exist_ok=True)
        runs = list_runs(args.output, clips)
        if state.is_main_process:
            check_settings(args.output, settings)
            write_json(args.output / "clips.json", [[clip.name for clip in run] for run in runs])
    except (ValueError, StrictDataclassError) as error:
        sys.exit(str(error))
    clips, parts = [clip for run in runs for clip in run], []
    for number, numbers in enumerate(numbers_of_parts([len(run) for run in runs], args.part_size)):
        path = args.output / f"part-{number:05d}.parquet"
        if number % state.num_processes == state.process_index and not path.exists():
            parts.append((path, numbers))
    try:
        spent = classify_parts(args, clips, data, classifier, parts, state)
        spent = gather_object([spent])
    except KeyboardInterrupt:
        print(STOPPED)
        sys.exit(130)
    if state.is_main_process:
        report(args, args.output, clips, spent)


if __name__ == "__main__":
    main()
