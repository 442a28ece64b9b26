#!/usr/bin/env python
"""Measures a model that can stream on clips whose label is known, joined without cuts.

    python examples/made_clips/measure_streaming.py clips/validation --model my-streaming-checkpoint --minutes 60

`clips/validation` has a folder for each label (`make_camera_motion_clips.py` makes such clips). Prints three tables in
Markdown: the accuracy by the number of frames seen; the steps between a change of motion and the change of the label,
for the running mean and for windows; and the accuracy in a stream that never begins anew, by its age. Before them,
what a step of a stream costs beside a whole clip. With `--output`, all is written, too, and a picture of the first.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clips", type=Path, help="Folder with a folder of clips for each label.")
    parser.add_argument("--model", required=True, help="Folder or Hub repository of a model that can stream.")
    parser.add_argument("--count", type=int, default=540, help="Clips to take. Default: %(default)s.")
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="Length of the long streams. Default: %(default)s."
    )
    parser.add_argument("--streams", type=int, default=8, help="Long streams at once. Default: %(default)s.")
    parser.add_argument("--batch_size", type=int, default=16, help="Default: %(default)s.")
    parser.add_argument("--seed", type=int, default=0, help="Order of the clips. Default: %(default)s.")
    parser.add_argument("--output", type=Path, help="Folder for measured.md and accuracy_by_frames.png.")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="Processes that read clips.")
    return parser.parse_args()


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    parse_arguments()  # before the imports below, which take seconds

import torch
from tqdm import tqdm
from transformers import AutoVideoProcessor

from modeling_videomamba import ClipLoader, VideoMambaForVideoFrameClassification
from modeling_videomamba.cache_videomamba import pool_steps
from modeling_videomamba.loading_videomamba import unloadable_reason


WINDOWS = (None, 2, 4, 8)  # steps that are classified together; None: all since the beginning
VIDEO_SUFFIXES = {".mp4", ".avi", ".mkv", ".mov", ".webm"}


def find_clips(folder, label2id, count, seed):
    """(path, number of its label) of `count` clips in random order."""
    found = sorted(path for path in Path(folder).glob("*/*") if path.suffix.lower() in VIDEO_SUFFIXES)
    if unknown := {path.parent.name for path in found} - set(label2id):
        sys.exit(f"{folder} has folders of labels that the model does not know: {', '.join(sorted(unknown))}.")
    if len(found) < 2:
        sys.exit(f"{folder} has {len(found)} clips in folders of labels, but two are needed.")
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    return [(found[i], label2id[found[i].parent.name]) for i in order[:count]]


def load(clips, processor, num_workers):
    """The clips' frames (N, T, C, height, width) in half precision, and their labels (N,)."""
    frames, labels = [], []
    loader = ClipLoader([str(path) for path, _ in clips], processor, num_workers=num_workers)
    for batch in tqdm(loader, desc="clips", unit="batch"):
        if batch.errors:
            sys.exit(f"A clip cannot be read: {next(iter(batch.errors.values()))}")
        frames.append(batch.pixel_values.half())
        labels += [clips[number][1] for number in batch.clips]
    return torch.cat(frames), torch.tensor(labels)


@torch.inference_mode()
def step_features(model, frames, cache=None):
    """The mean over the tokens of each step (B, n_t, D) of these next frames, and the cache after them."""
    model.config.pooling_window = 1
    output = model.videomamba(frames.to(model.device, model.dtype), True, cache=cache, use_cache=True)
    return output.step_pooler_output, output.cache


@torch.inference_mode()
def predictions(model, features, window):
    return model.classifier(pool_steps(features, window).to(model.dtype)).argmax(-1).cpu()


def accuracy_by_frames(model, features, labels):
    """Of clips from their beginning: {frames seen: accuracy}, with the running mean."""
    right = (predictions(model, features, None) == labels[:, None]).double().mean(0)
    return {model.config.tubelet_size * (step + 1): value for step, value in enumerate(right.tolist())}


def steps_to_change(found, labels):
    """Of each clip that follows another, (B, n_t) labels: the steps until the label is right and stays so, n_t + 1 if
    the clip ends before."""
    wrong = found != labels[:, None]
    last_wrong = torch.where(wrong, torch.arange(1, wrong.shape[1] + 1), 0).amax(1)
    return last_wrong + 1


def measure_changes(model, frames, labels, batch_size):
    """{window: steps until the label of a second clip stands, of each pair of clips with two labels}."""
    pairs = [(i, i + 1) for i in range(0, len(labels) - 1, 2) if labels[i] != labels[i + 1]]
    first, second = torch.tensor(pairs).T
    features = []
    for start in range(0, len(pairs), batch_size):
        part = slice(start, start + batch_size)
        features.append(step_features(model, torch.cat([frames[first[part]], frames[second[part]]], dim=1))[0])
    features, count = torch.cat(features), model.config.grid_size[0]
    return {
        window: steps_to_change(predictions(model, features, window)[:, count:], labels[second]) for window in WINDOWS
    }


def measure_ages(model, frames, labels, streams, minutes, fps):
    """Whether each clip's label stands at its end, (streams, clips), in streams that go on from clip to clip; the mean
    is over the steps of a clip. No stream begins anew, and each takes the clips in another order."""
    clips = max(2, round(minutes * 60 * fps / frames.shape[1]))
    generator, cache, right = torch.Generator().manual_seed(0), None, []
    for _ in tqdm(range(clips), desc="stream", unit="clip"):
        chosen = torch.randint(len(labels), (streams,), generator=generator)
        features, cache = step_features(model, frames[chosen], cache)
        right.append(predictions(model, features, None)[:, -1] == labels[chosen])
    return torch.stack(right, dim=1)


@torch.inference_mode()
def time_steps(model, frame, turns=100):
    """Median milliseconds of a step of a stream and of a whole clip, taken in turns; `frame` (C, height, width)."""
    clip = frame.to(model.device, model.dtype).expand(1, model.config.num_frames, -1, -1, -1)
    step, model.config.pooling_window = clip[:, : model.config.tubelet_size], None
    cache, taken = model(step, use_cache=True).cache, ([], [])

    def wait():
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    for turn in range(turns + 5):
        for times, pixels, options in zip(taken, (step, clip), ({"cache": cache, "use_cache": True}, {}), strict=True):
            wait()
            started = time.perf_counter()
            model(pixels, **options)
            wait()
            if turn >= 5:  # the first ones warm up
                times.append(1000 * (time.perf_counter() - started))
    return tuple(map(statistics.median, taken))


def draw_accuracy(path, seen, fps):
    """The accuracy by the number of frames seen (and seconds), of `accuracy_by_frames`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    axes.plot(list(seen), [100 * value for value in seen.values()], marker="o", color="#0072b2")
    for frames, value in seen.items():
        axes.annotate(f"{100 * value:.1f}", (frames, 100 * value), (0, -12), textcoords="offset points", ha="center")
    axes.set(xlabel="frames seen", ylabel="accuracy (%)", xticks=list(seen), ylim=(None, 100))
    axes.secondary_xaxis("top", (lambda x: x / fps, lambda x: x * fps)).set_xlabel("seconds")
    axes.grid(alpha=0.3)
    axes.spines["right"].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main():
    args = parse_arguments()
    if reason := unloadable_reason(args.model):
        sys.exit(reason)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = VideoMambaForVideoFrameClassification.from_pretrained(args.model).to(device).eval()
    processor = AutoVideoProcessor.from_pretrained(args.model)
    fps = processor.sampling_fps or 24 / (processor.frame_stride or 1)
    label2id = {label: number for number, label in model.config.id2label.items()}
    clips = find_clips(args.clips, label2id, args.count, args.seed)
    frames, labels = load(clips, processor, args.num_workers)

    features = torch.cat([step_features(model, part)[0] for part in frames.split(args.batch_size)])
    report = [f"{args.model} on {len(labels)} clips of {args.clips}, {fps:g} frames a second, on {device}"]
    step, clip = time_steps(model, frames[0, 0])
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    report.append(
        f"One step takes {step:.1f} ms, a whole clip {clip:.1f} ms: {step / clip:.2f} of it (median{threads})."
    )
    seen = accuracy_by_frames(model, features, labels)
    report.append(table(["frames seen", *seen], [["accuracy", *(f"{value:.1%}" for value in seen.values())]]))

    rows, count = [], model.config.grid_size[0]
    for window, steps in measure_changes(model, frames, labels, args.batch_size).items():
        stands = steps <= count
        name = "running mean" if window is None else f"window of {window}"
        rows.append((name, f"{steps.double().median():g}", f"{stands.double().mean():.1%}", len(steps)))
    report.append(
        table(["steps classified together", "median steps to the change", f"stands within {count}", "changes"], rows)
    )

    right = measure_ages(model, frames, labels, args.streams, args.minutes, fps).double()
    minute = max(1, round(60 * fps / frames.shape[1]))
    ages = [("first clips", right[:, :1]), ("first minute", right[:, :minute]), ("last minute", right[:, -minute:])]
    rows = [(name, f"{r.mean():.1%}", r.numel()) for name, r in ages]
    report.append(table(["age of the stream", "accuracy", "clips"], rows))
    print("\n" + "\n\n".join(report))
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "measured.md").write_text("\n\n".join(report) + "\n", encoding="utf-8")
        draw_accuracy(args.output / "accuracy_by_frames.png", seen, fps)


if __name__ == "__main__":
    main()
