#!/usr/bin/env python
"""Measures a camera-motion model on the same clips, stored in many ways.

    python examples/made_clips/measure_camera_motion.py pictures --held_out 0.2 \
        --model model_cards/videomamba-tiny-camera-motion --output rates

Every clip of `make_camera_motion_clips.py` is rendered once and written again and again: filmed at 5 to 120 pictures a
second, in a file of as many frames a second, in one of more, where pictures repeat, and at uneven times. Besides,
clips are made that the model was not trained on: of two motions, with a cut, of a still camera before which much
happens. Each model reads all files. Writes `rates.csv` (a line a model, clip and way to store it), `odd.csv` (the same
of the other clips) and `rates.md`, two tables a model, which are also printed.
"""

import argparse
import functools
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path


RATES = (5, 8, 10, 12, 15, 24, 25, 30, 50, 60, 120)  # pictures a second
FILE_RATES = (25, 30, 60)  # frames a second of files in which pictures repeat
JITTER = 0.3  # frames are early or late by up to this share of the time between two
MASTERS = (120, 50)  # rendered: each of RATES takes every n-th picture of one of them


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenery", help="Folder of still images or videos, and its sub-folders.")
    parser.add_argument("--model", required=True, nargs="+", help="Folders or Hub repositories.")
    parser.add_argument("--output", type=Path, required=True, help="Folder for the tables.")
    parser.add_argument("--clips_per_label", type=int, default=60, help="Default: %(default)s.")
    parser.add_argument(
        "--rates", type=int, nargs="+", default=RATES, choices=RATES, help="Rows of the table. Default: all."
    )
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
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForVideoClassification, AutoVideoProcessor

import modeling_videomamba  # noqa: F401  registers VideoMamba in transformers' Auto classes
from clip_generation import SHAKE, draw_scenery, find_scenery, hold_out, plan_jobs, read_scenery, write_clip
from make_camera_motion_clips import AXES, LABELS, MOTIONS, draw_parameters, render


def master_of(rate):
    return next(master for master in MASTERS if master % rate == 0)


def ways(rates):
    """(name of the column, pictures a second, frames a second, jitter) of each way to store a clip."""
    for rate in rates:
        yield "own rate", rate, rate, 0.0
        for file_rate in FILE_RATES:
            if file_rate > rate:
                yield f"in {file_rate}", rate, file_rate, 0.0
        yield "uneven times", rate, rate, JITTER


def draw_second(rng, first):
    """Another label than `first`, of a motion along another axis, and how far it moves along each."""
    axis = MOTIONS.get(first, ("none", 0))[0]
    label = str(rng.choice([label for label, (other, _) in MOTIONS.items() if other != axis]))
    return label, draw_parameters(rng, label)["amount"]


def odd_clips(frames, parameters, seed):
    """
    Clips of what the model was not trained on, or only by chance: what is odd about each, the labels that are right,
    its parameters and its pictures, 30 a second.
    """
    rng, label = np.random.default_rng((*seed, 2)), parameters["label"]
    parameters = parameters | {"picture_rate": 30}
    second, amount = draw_second(rng, label)
    still = parameters | {"amount": draw_parameters(rng, "static")["amount"]}
    both = {axis: parameters["amount"][axis] + amount[axis] for axis in AXES}

    def film(changed):
        return list(render(frames, changed, np.random.default_rng((*seed, 1))))

    yield "two motions at once", {label, second}, film(parameters | {"amount": both})
    yield "another motion from the middle on", {label, second}, film(parameters | {"then": amount})
    one, other = film(parameters), list(render(frames, parameters | {"amount": amount}, rng))
    half = len(one) // 2
    yield "a cut to another motion", {label, second}, one[:half] + other[half:]
    wide = film(still)
    height, width = wide[0].shape[:2]
    top, left = height // 6, width // 6
    near = [Image.fromarray(p[top : height - top, left : width - left]).resize((width, height)) for p in wide[half:]]
    yield "a longer lens from the middle on, still camera", {"static"}, wide[:half] + [np.asarray(p) for p in near]
    crowded = film(still | {"pieces": 3, "scenery_plays": True})
    yield "three objects pass a still camera", {"static"}, crowded
    yield "strong hand shake, still camera", {"static"}, film(still | {"shake": SHAKE})
    yield "strong hand shake, moving camera", {label}, film(parameters | {"shake": SHAKE})


def read_all_ways(processors, rates, job):
    """
    The number of a clip's label, and what each model sees of it, stored in each way and then of the odd clips: uint8
    (ways + odd, T, 3, H, W). And of each odd clip its kind and the labels that are right.
    """
    torch.set_num_threads(1)
    _, (scenery,), label, seed, scenery_seed = job
    rng = np.random.default_rng(seed)
    parameters = draw_parameters(rng, label) | {"preset": "ultrafast"}
    frames = draw_scenery(rng) if scenery is None else read_scenery(scenery, scenery_seed)
    pictures = {}
    for master in {master_of(rate) for rate in rates}:
        filmed = parameters | {"picture_rate": master}
        pictures[master] = list(render(frames, filmed, np.random.default_rng((*seed, 1))))
    clips, odd = [[] for _ in processors], []
    with tempfile.TemporaryDirectory() as folder:

        def store_and_read(pictures, stored):
            write_clip(f"{folder}/clip.mp4", pictures, parameters | stored)
            for processor, seen in zip(processors, clips, strict=True):
                clip = processor(f"{folder}/clip.mp4", return_tensors="pt", do_rescale=False, do_normalize=False)
                seen.append(clip["pixel_values"][0].byte())

        for _, rate, file_rate, jitter in ways(rates):
            master = master_of(rate)
            stored = {"picture_rate": rate, "file_rate": file_rate, "jitter": jitter}
            store_and_read(pictures[master][:: master // rate], stored)
        for kind, right, filmed in odd_clips(frames, parameters, seed):
            store_and_read(filmed, {"picture_rate": 30})
            odd.append((kind, right))
    return label, odd, [torch.stack(seen) for seen in clips]


@torch.inference_mode()
def classify(model, processor, clips):
    """Labels and scores of uint8 (ways, T, 3, height, width)."""
    pixel_values = clips.to(model.device).float() * processor.rescale_factor
    mean, std = (
        torch.tensor(v, device=model.device).view(3, 1, 1) for v in (processor.image_mean, processor.image_std)
    )
    scores, predictions = model(pixel_values=(pixel_values - mean) / std).logits.softmax(-1).max(-1)
    return [model.config.id2label[prediction] for prediction in predictions.tolist()], scores.tolist()


def measure(names, rates, jobs, num_workers):
    """
    A row a model, clip and way to store it: model, column, pictures a second, label, prediction, its score. And a row
    a model and odd clip: model, kind, right labels, prediction, its score.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = [AutoModelForVideoClassification.from_pretrained(name).eval().to(device) for name in names]
    processors = [AutoVideoProcessor.from_pretrained(name) for name in names]
    rows, odd_rows, read = [], [], functools.partial(read_all_ways, processors, rates)
    with multiprocessing.get_context("spawn").Pool(num_workers) as pool:
        results = pool.imap_unordered(read, jobs)
        for label, odd, clips in tqdm(results, total=len(jobs), desc="clips", unit="clip", mininterval=5):
            for name, model, processor, seen in zip(names, models, processors, clips, strict=True):
                found = list(zip(*classify(model, processor, seen), strict=True))
                for (column, rate, *_), answer in zip(ways(rates), found[: -len(odd)], strict=True):
                    rows.append((name, column, rate, label, *answer))
                for (kind, right), answer in zip(odd, found[-len(odd) :], strict=True):
                    odd_rows.append((name, kind, "|".join(sorted(right)), *answer))
    rates = pd.DataFrame(rows, columns=["model", "column", "pictures a second", "label", "prediction", "score"])
    return rates, pd.DataFrame(odd_rows, columns=["model", "kind", "right", "prediction", "score"])


def tabulate(results):
    """Accuracies in %, a row a rate, as Markdown."""
    right = results.assign(right=100.0 * (results["label"] == results["prediction"]))
    table = right.pivot_table(index="pictures a second", columns="column", values="right", aggfunc="mean")
    columns = ["own rate", *(f"in {rate}" for rate in FILE_RATES), "uneven times"]
    table = table[[column for column in columns if column in table]]
    lines = ["| " + " | ".join(["pictures a second", *table]) + " |", "| --- " * (1 + table.shape[1]) + "|"]
    for rate, row in table.iterrows():
        lines.append(f"| {rate} | " + " | ".join("" if np.isnan(value) else f"{value:.1f}" for value in row) + " |")
    values = table.to_numpy()[~np.isnan(table.to_numpy())]
    lines += ["", f"{len(values)} ways to store a clip: mean {values.mean():.1f} %, worst {values.min():.1f} %; "]
    return "\n".join(lines) + f"{len(results) // len(values)} clips each."


def tabulate_odd(results):
    """How often a right label comes first, and with which scores, a row a kind of odd clip, as Markdown."""
    answers = zip(results["prediction"], results["right"], strict=True)
    right = [prediction in labels.split("|") for prediction, labels in answers]
    results = results.assign(right=right, sure=results["score"] > 0.9)
    lines = ["| clips | right | mean score | scores above 0.9 |", "| --- " * 4 + "|"]
    for kind, rows in results.groupby("kind", sort=False):
        lines.append(f"| {kind} | {rows.right.mean():.1%} | {rows.score.mean():.2f} | {rows.sure.mean():.0%} |")
    return "\n".join(lines)


def main():
    args = parse_arguments()
    scenery = hold_out(find_scenery(args.scenery), "validation", args.held_out)
    jobs = plan_jobs(scenery, args.output, "validation", LABELS, args.clips_per_label, 0.0, args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    results, odd = measure(args.model, args.rates, jobs, args.num_workers)
    results.to_csv(args.output / "rates.csv", index=False, float_format="%.4f")
    odd.to_csv(args.output / "odd.csv", index=False, float_format="%.4f")
    tables = [
        f"{name}\n\n{tabulate(rows)}\n\n{tabulate_odd(odd[odd.model == name])}\n"
        for name, rows in results.groupby("model", sort=False)
    ]
    (args.output / "rates.md").write_text("\n".join(tables), encoding="utf-8")
    print("\n".join(tables))


if __name__ == "__main__":
    main()
