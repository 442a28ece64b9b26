#!/usr/bin/env python
"""Repeats the tables and figure 1 of the VideoMamba paper: one command a table, the paper's figures beside yours.

    python examples/study/study.py table2 --output_dir study --seeds 0 1 2 \
        --image_checkpoint you/videomamba-imagenet -- \
        --recipe examples/training/recipes/hmdb51.args --train_list splits --validation_list splits --video_root hmdb51

All flags after `--` go to every run of `run_video_classification.py` (and the data flags to
`evaluate_video_classification.py`); study_tables.py says what each row of a table changes. Give the same command again
after an interruption: finished runs are skipped, and a killed run resumes from its last checkpoint. Runs that
several tables share are made once. `--num_processes` starts each run with `torchrun`, `--parallel` starts several
runs at a time, `--dry_run` prints the commands.

The output folder gets `<table>.md`, `<table>.csv` and `<table>.png`, and a folder for each run.

| name | compares | needs |
| --- | --- | --- |
| table1 | frames in another order at evaluation | `--checkpoints`, or the models are trained |
| table2 | what the backward scan reverses | `--image_checkpoint`, or from scratch |
| table3 | position embeddings and their initialisation | `--image_checkpoint` |
| table4 | initialisation, RandAugment, label smoothing | `--image_checkpoint`, `--video_checkpoint` |
| table5, table6 | frames; width | `--image_checkpoint` (table6: two, narrow and wide), or from scratch |
| table7, table8, table9 | multi-view accuracy on HMDB51, SSV2, K400 | `--checkpoints` |
| single_frame | one frame alone (not in the paper) | as table5 |
| fig1 | accuracy against GFLOPs and memory | a GPU, for the memory |
"""

import argparse
import concurrent.futures
import csv
import hashlib
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np

from study_tables import FIGURE1, PUBLISHED, TABLES


TRAINING = Path(__file__).resolve().parents[1] / "training"
sys.path.append(str(TRAINING))  # whose flags the runs have


# ---------------------------------------------------------------------------------------------------------------------
# Flags and runs
# ---------------------------------------------------------------------------------------------------------------------

# Flags that change how fast a run is, not what comes out: runs that differ in them alone are the same run.
OPERATIONAL = {
    *("dataloader_num_workers", "dataloader_persistent_workers", "frame_cache", "logging_steps", "report_to"),
    *("save_steps", "save_strategy", "save_total_limit", "per_device_eval_batch_size", "disable_tqdm"),
}


def parse_flags(arguments):
    """`--name value value` as a `dict` of lists, in order; the flags of a `--recipe` come first."""
    flags = {}
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            flags[name] = [value] if equals else []
        elif not flags:
            sys.exit(f"{argument!r} stands after `--`, but belongs to no flag. Write --flag value.")
        else:
            list(flags.values())[-1].append(argument)
    if "recipe" in flags:
        (path,) = flags.pop("recipe")
        if not os.path.isfile(path):
            sys.exit(f"There is no recipe file {path}.")
        flags = parse_flags(shlex.split(Path(path).read_text(encoding="utf-8"), comments=True)) | flags
    return flags


def merge(common, own):
    """The flags of a run: the row's go before the common ones; config_overrides of both are kept."""
    merged = common | {name: [value] for name, value in own.items()}
    pairs = [*common.get("config_overrides", []), own.get("config_overrides", "")]
    fields = dict(pair.split("=", 1) for pair in ",".join(pairs).split(",") if "=" in pair)
    if fields:
        merged["config_overrides"] = [",".join(f"{name}={value}" for name, value in sorted(fields.items()))]
    return merged


def flatten(flags):
    return [word for name, values in flags.items() for word in (f"--{name}", *values)]


class Run(NamedTuple):
    """One start of a script: its folder, its flags, the file with its figures and the key of the accuracy in it."""

    folder: Path
    script: str
    flags: dict
    results: str
    key: str

    @property
    def result(self):
        """The figures of a finished run, or None."""
        path = self.folder / "result.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def identity(script, flags):
    """A name for a run that its script and flags give, but for those that are about speed."""
    kept = {name: values for name, values in flags.items() if name not in OPERATIONAL}
    return hashlib.sha256(json.dumps([script, kept], sort_keys=True).encode()).hexdigest()[:10]


def training_run(arguments, flags, seed):
    script = "run_video_classification.py"
    folder = arguments.output_dir / "runs" / f"train-{identity(script, flags)}-seed{seed}"
    flags = flags | {"seed": [str(seed)], "do_train": [], "do_eval": []}
    return Run(folder, script, flags, "eval_results.json", "eval_accuracy")


def evaluation_run(arguments, flags, model, own):
    script = "evaluate_video_classification.py"
    known = evaluation_flags()
    flags = {name: values for name, values in flags.items() if name in known}
    flags = merge(flags, {"model_name_or_path": str(model)} | own)
    flags.pop("config_overrides", None)  # the trained model's config has them
    folder = arguments.output_dir / "runs" / f"evaluate-{identity(script, flags)}"
    return Run(folder, script, flags, "results.json", "accuracy")


def evaluation_flags():
    """Names of those flags after `--` that an evaluation takes too."""
    from dataclasses import fields

    from video_classification_arguments import DataArguments

    own = {"bf16", "use_cpu", "dataloader_num_workers", "per_device_eval_batch_size", "trust_remote_code"}
    return own | {field.name for field in fields(DataArguments)}


def command_of(run, arguments):
    """The command of a run, as a list of words."""
    launcher = [sys.executable]
    if arguments.num_processes > 1:
        # Not `accelerate launch`: without a GPU it starts one process, however many are asked for.
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(arguments.num_processes)]
    return [*launcher, str(TRAINING / run.script), *flatten(run.flags), "--output_dir", str(run.folder)]


def carry_out(runs, arguments):
    """Makes the results of all runs that have none, several at a time. The first failure stops all."""
    missing = list({run.folder: run for run in runs if run.result is None}.values())
    print(f"{len(runs) - len(missing)} of {len(runs)} runs are finished already." if runs else "", flush=True)
    processes, lock, stopped = {}, threading.Lock(), threading.Event()

    def carry_out_one(run):
        if stopped.is_set():
            return
        run.folder.mkdir(parents=True, exist_ok=True)
        command, log = command_of(run, arguments), run.folder / "run.log"
        with open(log, "w", encoding="utf-8") as file:
            with lock:
                process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
                processes[run.folder] = process
            code = process.wait()
        if stopped.is_set():
            return
        if code:
            stopped.set()  # at once, so that no other run starts
            tail = "\n".join(log.read_text(errors="replace", encoding="utf-8").splitlines()[-15:])
            raise RuntimeError(f"{shlex.join(command)}\nended with status {code}. The end of {log}:\n{tail}")
        figures = json.loads((run.folder / run.results).read_text(encoding="utf-8"))
        part = run.folder / "result.part"
        part.write_text(
            json.dumps({"accuracy": figures[run.key], "command": command, "figures": figures}, indent=1),
            encoding="utf-8",
        )
        os.replace(part, run.folder / "result.json")
        with lock:
            done.append(run)
            print(f"{len(done)} of {len(missing)}: {run.folder.name}: {100 * figures[run.key]:.1f} %", flush=True)

    done = []
    with concurrent.futures.ThreadPoolExecutor(arguments.parallel) as pool:
        waiting = [pool.submit(carry_out_one, run) for run in missing]
        try:
            for finished in concurrent.futures.as_completed(waiting):
                finished.result()
        except BaseException:
            stopped.set()
            with lock:
                for process in processes.values():
                    if process.poll() is None:
                        os.killpg(process.pid, 15)
            raise


# ---------------------------------------------------------------------------------------------------------------------
# What runs start from
# ---------------------------------------------------------------------------------------------------------------------


def start_folder(arguments, checkpoint, how, flags):
    """The folder of an image checkpoint inflated for a run's clips; made by `make_starts`."""
    number = flags.get("num_frames", ["16"])[0]
    bare = "class_token_position=none" in flags.get("config_overrides", [""])[0]
    name = f"{Path(checkpoint).name}-{how}-{number}{'-no-class-token' if bare else ''}"
    return arguments.output_dir / "starts" / name, (checkpoint, how, number, bare, flags.get("frame_stride"))


def make_start(folder, checkpoint, how, num_frames, bare, stride):
    """Inflates an image checkpoint into `folder`, whole or not at all; `bare`: without its class token."""
    try:
        from videomamba_conversion import inflate_image_model
    except ImportError:  # in a clone, the converters are beside examples/
        sys.path.append(str(Path(__file__).resolve().parents[2]))
        from conversion import inflate_image_model
    from modeling_videomamba import VideoMambaConfig, VideoMambaModel, VideoMambaVideoProcessor

    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    options = ["--checkpoint", checkpoint, "--position-init", how, "--num-frames", num_frames, "--output", str(part)]
    inflate_image_model.main(options)
    if bare and (config := VideoMambaConfig.from_pretrained(part)).class_token_position != "none":
        tensors = VideoMambaModel.from_pretrained(part).state_dict()
        del tensors["embeddings.cls_token"]
        positions = "embeddings.position_embeddings"
        if positions in tensors:
            tensors[positions] = tensors[positions][:, 1:]  # row 0 is the class token's
        config.class_token_position = "none"
        model = VideoMambaModel(config)
        model.load_state_dict(tensors)
        model.save_pretrained(part)
    processor = VideoMambaVideoProcessor.from_pretrained(part)
    processor.num_frames = int(num_frames)
    if stride is not None:
        processor.frame_stride = int(stride[0]) or None
    processor.save_pretrained(part)
    os.replace(part, folder)


def plan(name, arguments, common):
    """
    The runs of a table.

    Returns:
        `list[list[Run]]`, the runs of each row, one a seed (of table 1: the evaluations); `list[Run]`, those that have
        to be there before; and `dict` of the folders of starts to make, with the arguments of `make_start`.
    """
    table, rows, before, starts = TABLES[name], [], [], {}
    for number, row in enumerate(table.rows):
        flags, checkpoint = merge(common, row.flags), arguments.image_checkpoint[:1]
        if name == "table6" and arguments.image_checkpoint:
            checkpoint = arguments.image_checkpoint[number : number + 1]
        if row.start == "video":
            flags |= {"model_name_or_path": [arguments.video_checkpoint], "ignore_mismatched_sizes": []}
        elif row.start is not None and checkpoint:
            folder, how = start_folder(arguments, checkpoint[0], row.start, flags)
            starts[folder] = how
            flags = {key: value for key, value in flags.items() if key not in ("hidden_size", "num_frames")}
            flags |= {"model_name_or_path": [str(folder)], "ignore_mismatched_sizes": []}
        if not row.evaluate:
            rows.append([training_run(arguments, flags, seed) for seed in arguments.seeds])
            continue
        if arguments.checkpoints:
            models = arguments.checkpoints
        else:
            trained = [training_run(arguments, flags, seed) for seed in arguments.seeds]
            models = [run.folder for run in trained]
            before += trained if number == 0 else []
        rows.append([evaluation_run(arguments, flags, model, row.evaluate) for model in models])
    return rows, before, starts


# ---------------------------------------------------------------------------------------------------------------------
# Errors before anything trains
# ---------------------------------------------------------------------------------------------------------------------


def check(names, arguments, common):
    """Stops with a clear message where a table could not be finished."""
    for name in names:
        for option in TABLES[name].needs if name in TABLES else ():
            if not getattr(arguments, option):
                sys.exit(f"{name} needs --{option}: see --help.")
        if name in TABLES and "model_name_or_path" in common:
            from video_classification_model import NEW_MODEL

            if any(flag in NEW_MODEL for row in TABLES[name].rows for flag in row.flags):
                sys.exit(
                    f"{name} compares models of several sizes, but the model of --model_name_or_path keeps its size. "
                    "Leave that flag out to train from scratch, or start from --image_checkpoint."
                )
        if name == "table6" and len(arguments.image_checkpoint) == 1:
            sys.exit("table6 needs two --image_checkpoint, of width 192 and 384, or none, to train from scratch.")
        if name in PUBLISHED and not arguments.checkpoints and common:
            sys.exit(f"{name} evaluates checkpoints: name them with --checkpoints, or leave out what follows `--`.")
    configs = [read_config(path) for path in arguments.checkpoints]
    for path in [*arguments.image_checkpoint, arguments.video_checkpoint]:
        read_config(path) if path else None
    if "table1" in names:
        lengths = [config.num_frames for config in configs] or [int(common.get("num_frames", ["16"])[0])]
        for length in lengths:
            if length % 2:
                sys.exit(f"table1 reorders an even number of frames, but a model of {length} frames is given.")
    trains = [name for name in names if name in TABLES]
    if trains or (set(names) & set(PUBLISHED) and arguments.checkpoints):
        check_data(common, training=[name for name in trains if name != "table1" or not arguments.checkpoints])


def read_config(path):
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    import modeling_videomamba  # noqa: F401  registers VideoMamba in transformers' Auto classes
    from modeling_videomamba.loading_videomamba import unloadable_reason

    if reason := unloadable_reason(path):
        sys.exit(f"The checkpoint {path} cannot be read: {reason}")
    try:
        return AutoConfig.from_pretrained(path)
    except StrictDataclassError as error:
        sys.exit(f"The checkpoint {path} cannot be read: {error.__cause__}")
    except (OSError, ValueError) as error:
        sys.exit(f"The checkpoint {path} cannot be read: {str(error).splitlines()[0]}")


def check_data(common, training):
    from transformers import HfArgumentParser

    from finetune import DecodeFailures
    from several_labels import has_several
    from video_classification_arguments import DataArguments
    from video_classification_data import load_clips

    data, _ = HfArgumentParser(DataArguments).parse_args_into_dataclasses(
        flatten(common), return_remaining_strings=True
    )
    try:
        wanted = ["train"] * bool(training) + ["validation"]
        splits, labels = load_clips(data, wanted, 0, DecodeFailures(os.devnull + ".d", 10**9))
    except (OSError, ValueError) as error:
        sys.exit(f"The clips cannot be read: {error}")
    if any(map(has_several, splits.values())):
        sys.exit("The study compares accuracies of clips with one label each, but these clips have lists of labels.")
    if len(labels) < 2:
        sys.exit(f"The clips have one class, {labels}: at least two are needed.")


# ---------------------------------------------------------------------------------------------------------------------
# Tables and plots
# ---------------------------------------------------------------------------------------------------------------------


def right_clips(run):
    """Whether each validation clip was recognised, by the clip's name."""
    with open(run.folder / "predictions.csv", newline="", encoding="utf-8") as file:
        return {row["clip"]: row["label"] == row["predicted"] for row in csv.DictReader(file)}


def difference(runs, others, samples=2000):
    """
    How many points `runs` are ahead of `others`, with a 95 % interval: clips and runs are drawn with replacement, the
    same clips for both.
    """
    first, second = ([right_clips(run) for run in each] for each in (runs, others))
    clips = sorted(set.intersection(*(set(right) for right in first + second)))
    first, second = (np.array([[right[clip] for clip in clips] for right in each]) for each in (first, second))
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(samples):
        places = rng.integers(len(clips), size=len(clips))
        means = [right[rng.integers(len(right), size=len(right))][:, places].mean() for right in (first, second)]
        drawn.append(means[0] - means[1])
    low, high = np.percentile(drawn, [2.5, 97.5])
    return 100 * (first.mean() - second.mean()), 100 * low, 100 * high


def gmacs_of(folder):
    """GMACs of a trained model's clip: by the paper's rule, and with all projections and convolutions."""
    from modeling_videomamba import VideoMambaConfig
    from modeling_videomamba.configuration_videomamba import count_parameters_and_macs

    counts = count_parameters_and_macs(VideoMambaConfig.from_pretrained(folder))
    return counts["paper_macs"] / 1e9, counts["macs"] / 1e9


def table_of(name, rows):
    """Columns and lines of a finished table, all text."""
    table = TABLES[name]
    columns = [*table.names, *(["GMACs (paper's rule)", "GMACs (all)"] if table.counts else [])]
    columns += ["top-1 (%)", "runs", "minus the row above (95 % interval)"]
    columns += [f"paper: {column}" for column in table.paper]
    lines = []
    for number, (row, runs) in enumerate(zip(table.rows, rows, strict=True)):
        scores = [100 * run.result["accuracy"] for run in runs]
        mean, spread = statistics.mean(scores), f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
        counts = [f"{value:.2f}" for value in gmacs_of(runs[0].folder)] if table.counts else []
        gain = "–"
        if number:
            gain = "{:+.1f} ({:+.1f} to {:+.1f})".format(*difference(runs, rows[number - 1]))
        lines.append([*row.names, *counts, f"{mean:.1f}{spread}", str(len(scores)), gain, *map(str, row.paper)])
    return columns, lines


def published_table(name, runs, arguments):
    """As `table_of`, for tables 7 to 9: the published rows, then those of the given checkpoints."""
    from modeling_videomamba.configuration_videomamba import count_parameters_and_macs

    table = PUBLISHED[name]
    lines = [list(row) for row in table.rows]
    for checkpoint, run in zip(arguments.checkpoints, runs, strict=True):
        config, figures = read_config(checkpoint), run.result["figures"]
        cells = dict.fromkeys(table.columns, "–") | {"Method": f"**{Path(checkpoint).name}**"}
        cells |= {"Frames": str(config.num_frames), "Views": figures["views"].replace("x", "×")}
        if config.model_type == "videomamba":
            counts = count_parameters_and_macs(config)
            cells |= {"Backbone": "Mamba", "Param (M)": f"{counts['parameters'] / 1e6:.1f}"}
            cells["GFLOPs"] = f"{counts['paper_macs'] / 1e9:.0f}"
        for column, key in (("Top-1", "accuracy"), ("Top-5", "top5_accuracy")):
            if key not in figures:  # of few labels
                continue
            low, high = (100 * figures[f"{key}_{bound}"] for bound in ("low", "high"))
            cells[column] = f"{100 * figures[key]:.1f} ({low:.1f} to {high:.1f})"
        lines.append([cells[column] for column in table.columns])
    return list(table.columns), lines


def write_table(path, title, columns, lines):
    """`path`.md and `path`.csv, each whole or not at all."""
    text = [f"{title}\n", "| " + " | ".join(columns) + " |", "| " + " | ".join(["---"] * len(columns)) + " |"]
    text += ["| " + " | ".join(line) + " |" for line in lines]
    part = path.with_name(f"{path.name}.part")
    part.write_text("\n".join(text) + "\n", encoding="utf-8")
    os.replace(part, path.with_suffix(".md"))
    with open(part, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *lines])
    os.replace(part, path.with_suffix(".csv"))


def plot_table(path, name, rows):
    """Bars of the mean accuracy with every run as a dot, and the paper's figures beside them."""
    from matplotlib.figure import Figure

    table = TABLES[name]
    labels = [", ".join(part for part in row.names if part != "–") for row in table.rows]
    percent = [column for column in table.paper if column != "GFLOPs"]
    drawing = Figure(figsize=(7.5, 0.55 * len(labels) + 1.5), layout="constrained")
    axes = drawing.subplots(1, 2 if percent else 1, squeeze=False, sharey=True)[0]
    places = np.arange(len(labels))[::-1]
    scores = [[100 * run.result["accuracy"] for run in runs] for runs in rows]
    axes[0].barh(places, [statistics.mean(each) for each in scores], color="#56b4e9", height=0.6)
    for place, each in zip(places, scores, strict=True):
        axes[0].plot(each, [place] * len(each), "o", color="black", markersize=4)
    axes[0].set(yticks=places, yticklabels=labels, xlabel="top-1 (%), dots are runs", title="ours")
    for column, marker in zip(percent, "os^", strict=False):
        values = [row.paper[table.paper.index(column)] for row in table.rows]
        axes[1].plot(
            values, places, marker, label=column, color={"o": "#0072b2", "s": "#d55e00", "^": "#009e73"}[marker]
        )
    if percent:
        axes[1].set(xlabel="top-1 (%)", title="the paper's")
        axes[1].legend(fontsize=8)
    for each in axes:
        each.grid(alpha=0.3, axis="x")
    drawing.suptitle(table.title, fontsize=10)
    save(drawing, path)


def save(drawing, path):
    part = path.with_name(f"{path.name}.part")
    drawing.savefig(part, format="png", dpi=110)
    os.replace(part, path)


def measure_memory(kind, num_frames):
    """Peak GiB on the GPU for 8 clips, all included: of inference in bfloat16, and of a training step."""
    import torch

    from benchmark import MODELS

    peaks = []
    for training in (False, True):
        torch.manual_seed(0)
        model, forward = MODELS[kind](num_frames)
        dtype = torch.float32 if training else torch.bfloat16
        model.to("cuda", dtype).train(training)
        clips = torch.randn(8, num_frames, 3, 224, 224, device="cuda", dtype=dtype)
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            with torch.set_grad_enabled(training), torch.autocast("cuda", torch.bfloat16, enabled=training):
                logits = forward(clips)
            if training:
                logits.float().logsumexp(-1).sum().backward()
                model.zero_grad(set_to_none=True)
            del logits
        peaks.append(torch.cuda.max_memory_allocated() / 2**30)
        del model, forward, clips
        torch.cuda.empty_cache()
    return peaks


def figure1(arguments):
    """Figure 1: accuracy against GFLOPs and, on a GPU, against measured memory."""
    import torch

    from modeling_videomamba import VideoMambaConfig
    from modeling_videomamba.configuration_videomamba import count_parameters_and_macs

    given = dict(arguments.accuracy)
    unknown = set(given) - set(FIGURE1)
    if unknown:
        sys.exit(f"--accuracy: no model {', '.join(sorted(unknown))}; there are {', '.join(FIGURE1)}.")
    measured = torch.cuda.is_available()
    if not measured:
        print("There is no GPU: figure 1 is drawn without memory.")
    sets = ["given"] if given else ["HMDB51", "SSV2", "K400"]
    columns = [
        "Model",
        "GFLOPs (paper)",
        "GMACs (all)",
        "inference GiB",
        "training GiB",
        *(f"top-1 {s}" for s in sets),
    ]
    lines, points = [], []
    for name, (kind, num_frames, gflops, accuracies) in FIGURE1.items():
        peaks = measure_memory(kind, num_frames) if measured else [math.nan] * 2
        accuracies = {"given": given[name]} if name in given else {} if given else accuracies
        full = "–"
        if kind == "VideoMamba-S":
            counts = count_parameters_and_macs(VideoMambaConfig(num_frames=num_frames, num_labels=400))
            full = f"{counts['macs'] / 1e9:.1f}"
        memory = [f"{peak:.2f}" if measured else "–" for peak in peaks]
        lines.append([name, f"{gflops}", full, *memory, *(str(accuracies.get(each, "–")) for each in sets)])
        points.append((name, accuracies, (gflops, *peaks)))
    path = arguments.output_dir / "fig1"
    write_table(path, "Figure 1: accuracy, GFLOPs and memory of 8 clips (bfloat16, 224 × 224)", columns, lines)
    plot_figure1(path.with_suffix(".png"), sets, points, measured)


def plot_figure1(path, sets, points, measured):
    from matplotlib.figure import Figure

    across = ["GFLOPs a clip (paper)", "inference, GiB for 8 clips", "training, GiB for 8 clips"][
        : 3 if measured else 1
    ]
    drawing = Figure(figsize=(3.3 * len(across) + 1, 2.4 * len(sets) + 0.6), layout="constrained")
    axes = drawing.subplots(len(sets), len(across), squeeze=False, sharex="col", sharey="row")
    colours = dict(zip(FIGURE1, ("#56b4e9", "#0072b2", "#d55e00", "#009e73"), strict=True))
    for row, data_set in enumerate(sets):
        for column, label in enumerate(across):
            each = axes[row, column]
            for name, accuracies, values in points:
                if data_set in accuracies:
                    each.plot(values[column], accuracies[data_set], "o", ms=8, color=colours[name], label=name)
            each.grid(alpha=0.3)
            each.margins(0.2)
            if column == 0:
                each.set_ylabel(f"top-1 {data_set} (%)", fontsize=9)
            if row == len(sets) - 1:
                each.set_xlabel(label, fontsize=9)
    handles = {h.get_label(): h for row in axes for h in row[0].lines}
    drawing.legend(handles=list(handles.values()), loc="outside upper center", ncols=2, fontsize=8)
    save(drawing, path)


# ---------------------------------------------------------------------------------------------------------------------


def named_accuracy(text):
    name, equals, value = text.rpartition("=")
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PERCENT") from None


def parse(argv):
    end = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = [*TABLES, *PUBLISHED, "fig1"]
    parser.add_argument("tables", nargs="+", choices=choices, metavar="TABLE", help=", ".join(choices))
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for tables, plots and runs.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="Each row runs once per seed. (default: 0)")
    parser.add_argument("--image_checkpoint", nargs="+", default=[], help="An image VideoMamba; two for table6.")
    parser.add_argument("--video_checkpoint", help="A video VideoMamba of another data set, for table4.")
    parser.add_argument("--checkpoints", nargs="+", default=[], help="Trained models, for tables 1 and 7 to 9.")
    parser.add_argument(
        "--accuracy",
        nargs="+",
        default=[],
        type=named_accuracy,
        metavar="MODEL=PERCENT",
        help="Own models, for fig1.",
    )
    parser.add_argument("--num_processes", type=int, default=1, help="Processes of each run. (default: 1)")
    parser.add_argument("--parallel", type=int, default=1, help="Runs at a time. (default: 1)")
    parser.add_argument("--dry_run", action="store_true", help="Print the commands and stop.")
    arguments = parser.parse_args(argv[:end])
    if min(arguments.num_processes, arguments.parallel) < 1:
        parser.error("--num_processes and --parallel must be at least 1.")
    return arguments, parse_flags(argv[end + 1 :])


def main(argv=None):
    arguments, common = parse(sys.argv[1:] if argv is None else argv)
    check(arguments.tables, arguments, common) if not arguments.dry_run else None
    plans = {name: plan(name, arguments, common) for name in arguments.tables if name in TABLES}
    evaluations = {
        name: [evaluation_run(arguments, common, model, PUBLISHED[name].views) for model in arguments.checkpoints]
        for name in arguments.tables
        if name in PUBLISHED
    }
    first = [run for rows, before, _ in plans.values() for run in before]
    trained = [run for rows, _, _ in plans.values() for runs in rows for run in runs]
    evaluated = [run for run in trained if run.results == "results.json"]
    first += [run for run in trained if run.results != "results.json"]
    evaluated += [run for runs in evaluations.values() for run in runs]
    if arguments.dry_run:
        for run in {run.folder: run for run in first + evaluated}.values():
            print(shlex.join(command_of(run, arguments)))
        return

    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    for _, _, starts in plans.values():
        for folder, how in starts.items():
            if not folder.exists():
                folder.parent.mkdir(exist_ok=True)
                make_start(folder, *how)
    try:
        carry_out(first, arguments)
        carry_out(evaluated, arguments)
    except RuntimeError as error:
        sys.exit(str(error))
    for name in arguments.tables:
        path = arguments.output_dir / name
        if name in TABLES:
            rows = plans[name][0]
            write_table(path, TABLES[name].title, *table_of(name, rows))
            plot_table(path.with_suffix(".png"), name, rows)
        elif name in PUBLISHED:
            write_table(path, PUBLISHED[name].title, *published_table(name, evaluations[name], arguments))
        else:
            figure1(arguments)
        print(f"\n{path.with_suffix('.md').read_text(encoding='utf-8')}")


if __name__ == "__main__":
    main()
