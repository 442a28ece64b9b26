#!/usr/bin/env python
"""Measures a camera-motion model on the same clips, stored in many ways.

    python examples/made_clips/measure_camera_motion.py pictures --held_out 0.2 \
        --model model_cards/videomamba-tiny-camera-motion --output rates

Every clip of `make_camera_motion_clips.py` is rendered once and written again and again: filmed at 5 to 120 pictures a
second, in a file of as many frames a second, in one of more, where pictures repeat, and at uneven times. Each model
reads all files. Writes `rates.csv` (a line a model, clip and way to store it) and `rates.md`, a table of accuracies a
model, which is also printed.
"""

import argparse
import functools
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenery", help="Folder of still images or videos, and its sub-folders.")
    parser.add_argument("--model", required=True, nargs="+", help="Folders or Hub repositories.")
    parser.add_argument("--output", type=Path, required=True, help="Folder for rates.csv and rates.md.")
    parser.add_argument("--clips_per_label", type=int, default=60, help="Default: %(default)s.")
    parser.add_argument("--held_out", type=float, default=0.0, help="As of make_camera_motion_clips.py.")
    parser.add_argument("--seed", type=int, default=0, help="The same seed makes the same clips.")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="Processes that make clips.")
    args = parser.parse_args()
    if args.clips_per_label < 1 or args.num_workers < 1 or not 0 <= args.held_out < 1:
        parser.error("--clips_per_label and --num_workers must be at least 1, --held_out from 0 to below 1.")
    return args


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    parse_arguments()  # before the imports below, which take seconds

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm
from transformers import AutoModelForVideoClassification, AutoVideoProcessor

import modeling_videomamba  # noqa: F401  registers VideoMamba in transformers' Auto classes
from clip_generation import draw_scenery, find_scenery, hold_out, plan_jobs, read_scenery, write_clip
from make_camera_motion_clips import LABELS, draw_parameters, render


RATES = (5, 8, 10, 12, 15, 24, 25, 30, 50, 60, 120)  # pictures a second
FILE_RATES = (25, 30, 60)  # frames a second of files in which pictures repeat
JITTER = 0.3  # frames are early or late by up to this share of the time between two
MASTERS = (120, 50)  # rendered: each of RATES takes every n-th picture of one of them


def ways():
    """(name of the column, pictures a second, frames a second, jitter) of each way to store a clip."""
    for rate in RATES:
        yield "own rate", rate, rate, 0.0
        for file_rate in FILE_RATES:
            if file_rate > rate:
                yield f"in {file_rate}", rate, file_rate, 0.0
        yield "uneven times", rate, rate, JITTER


def read_all_ways(processors, job):
    """The number of a clip's label, and what each model sees of it, stored in each way: uint8 (ways, T, 3, H, W)."""
    torch.set_num_threads(1)
    _, (scenery,), label, seed, scenery_seed = job
    rng = np.random.default_rng(seed)
    parameters = draw_parameters(rng, label) | {"preset": "ultrafast"}
    frames = draw_scenery(rng) if scenery is None else read_scenery(scenery, scenery_seed)
    pictures = {}
    for master in MASTERS:
        filmed = parameters | {"picture_rate": master}
        pictures[master] = list(render(frames, filmed, np.random.default_rng((*seed, 1))))
    clips = [[] for _ in processors]
    with tempfile.TemporaryDirectory() as folder:
        for _, rate, file_rate, jitter in ways():
            master = next(master for master in MASTERS if master % rate == 0)
            stored = parameters | {"picture_rate": rate, "file_rate": file_rate, "jitter": jitter}
            write_clip(f"{folder}/clip.mp4", pictures[master][:: master // rate], stored)
            for processor, seen in zip(processors, clips, strict=True):
                clip = processor(f"{folder}/clip.mp4", return_tensors="pt", do_rescale=False, do_normalize=False)
                seen.append(clip["pixel_values"][0].byte())
    return LABELS.index(label), [torch.stack(seen) for seen in clips]


@torch.inference_mode()
def classify(model, processor, clips):
    """Labels and scores of uint8 (ways, T, 3, height, width)."""
    pixel_values = clips.to(model.device).float() * processor.rescale_factor
    mean, std = (
        torch.tensor(v, device=model.device).view(3, 1, 1) for v in (processor.image_mean, processor.image_std)
    )
    scores, predictions = model(pixel_values=(pixel_values - mean) / std).logits.softmax(-1).max(-1)
    return [model.config.id2label[prediction] for prediction in predictions.tolist()], scores.tolist()


def measure(names, jobs, num_workers):
    """A row a model, clip and way to store it: model, column, pictures a second, label, prediction, its score."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = [AutoModelForVideoClassification.from_pretrained(name).eval().to(device) for name in names]
    processors = [AutoVideoProcessor.from_pretrained(name) for name in names]
    rows, read = [], functools.partial(read_all_ways, processors)
    with multiprocessing.get_context("spawn").Pool(num_workers) as pool:
        results = pool.imap_unordered(read, jobs)
        for label, clips in tqdm(results, total=len(jobs), desc="clips", unit="clip", mininterval=5):
            for name, model, processor, seen in zip(names, models, processors, clips, strict=True):
                for (column, rate, *_), *found in zip(ways(), *classify(model, processor, seen), strict=True):
                    rows.append((name, column, rate, LABELS[label], *found))
    return pd.DataFrame(rows, columns=["model", "column", "pictures a second", "label", "prediction", "score"])


def tabulate(results):
    """Accuracies in %, a row a rate, as Markdown."""
    right = results.assign(right=100.0 * (results["label"] == results["prediction"]))
    table = right.pivot_table(index="pictures a second", columns="column", values="right", aggfunc="mean")
    table = table[["own rate", *(f"in {rate}" for rate in FILE_RATES), "uneven times"]]
    lines = ["| " + " | ".join(["pictures a second", *table]) + " |", "| --- " * (1 + table.shape[1]) + "|"]
    for rate, row in table.iterrows():
        lines.append(f"| {rate} | " + " | ".join("" if np.isnan(value) else f"{value:.1f}" for value in row) + " |")
    values = table.to_numpy()[~np.isnan(table.to_numpy())]
    lines += ["", f"{len(values)} ways to store a clip: mean {values.mean():.1f} %, worst {values.min():.1f} %; "]
    return "\n".join(lines) + f"{len(results) // len(values)} clips each."


def main():
    args = parse_arguments()
    scenery = hold_out(find_scenery(args.scenery), "validation", args.held_out)
    jobs = plan_jobs(scenery, args.output, "validation", LABELS, args.clips_per_label, 0.0, args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    results = measure(args.model, jobs, args.num_workers)
    results.to_csv(args.output / "rates.csv", index=False, float_format="%.4f")
    tables = [f"{name}\n\n{tabulate(rows)}\n" for name, rows in results.groupby("model", sort=False)]
    (args.output / "rates.md").write_text("\n".join(tables), encoding="utf-8")
    print("\n".join(tables))


if __name__ == "__main__":
    main()
