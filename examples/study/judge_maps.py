#!/usr/bin/env python
"""Judges maps by numbers: deletion and insertion curves of Delta maps, reading maps, gradients and random orders.

    python examples/study/judge_maps.py --model_name_or_path my-classifier --clips clips/validation --output_dir judged

A map says which tokens matter. Deletion replaces tokens by the clip's mean colour, in the order of the map from the
largest value on: the sooner the probability of the predicted label falls, the better the map. Insertion starts from
the mean colour and restores tokens: the sooner the probability rises, the better. The area under each curve is a
number from 0 to 1. The baseline is a random order. The table says how far each map is from this baseline, clip by
clip, with 95 % bootstrap intervals over clips.

The output folder gets `maps.csv`, `maps.md` and `maps.png`.
"""

import argparse
import csv
import os
import sys
from pathlib import Path


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="Folder or Hub repository of the classifier.")
    parser.add_argument("--trust_remote_code", action="store_true", help="Run the code that comes with the model.")
    parser.add_argument("--clips", required=True, help="Folder of video files, and its sub-folders.")
    parser.add_argument("--max_clips", type=int, default=96, help="(default: %(default)s)")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for the table and the picture.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the random orders. (default: 0)")
    return parser.parse_args()


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    parse_arguments()  # before the imports below, which take seconds

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import AutoModelForVideoClassification, AutoVideoProcessor

import modeling_videomamba  # noqa: F401  registers VideoMamba in transformers' Auto classes
from modeling_videomamba.loading_videomamba import unloadable_reason


SUFFIXES = {".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v"}
STEPS = 20  # tokens are replaced in so many equal parts
RANDOM_ORDERS = 4  # their curves are averaged, clip by clip


def find_clips(folder, limit):
    """Up to `limit` video files below a folder, the same number of each sub-folder's as far as there are."""
    if not Path(folder).is_dir():
        sys.exit(f"There is no folder {folder}.")
    groups = {}
    for path in sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES):
        groups.setdefault(path.parent, []).append(path)
    rounds = [
        paths[number]
        for number in range(max(map(len, groups.values()), default=0))
        for paths in groups.values()
        if number < len(paths)
    ]
    if not rounds:
        sys.exit(f"No video found below {folder}. Looked for {' '.join(sorted(SUFFIXES))}.")
    return rounds[:limit]


def pixels_of_tokens(tokens, config):
    """A value for each tubelet, (..., n_t, n_h, n_w), for each pixel instead: (..., T, 1, H, W)."""
    patch = config.patch_size if isinstance(config.patch_size, (list, tuple)) else (config.patch_size,) * 2
    for axis, repeats in ((-3, config.tubelet_size), (-2, patch[0]), (-1, patch[-1])):
        tokens = tokens.repeat_interleave(repeats, axis)
    return tokens.unsqueeze(-3)


def sum_over_tubelets(pixels, config):
    """Pixels (T, H, W) added up tubelet by tubelet: (n_t, n_h, n_w); what does not fill one is left out."""
    patch = config.patch_size if isinstance(config.patch_size, (list, tuple)) else (config.patch_size,) * 2
    for axis, size in enumerate((config.tubelet_size, patch[0], patch[-1])):
        pixels = pixels.narrow(axis, 0, pixels.shape[axis] // size * size)
        pixels = pixels.unflatten(axis, (-1, size)).sum(axis + 1)
    return pixels


@torch.no_grad()
def curves(model, clip, order, label):
    """
    Probabilities of `label` while tokens are replaced, and while they come back.

    Args:
        model: a classifier.
        clip (`torch.Tensor` of shape `(T, C, H, W)`): normalised.
        order (`torch.LongTensor` of shape `(n,)`): the numbers of the tubelets, the most important first.
        label (`int`).

    Returns:
        `numpy.ndarray` of shape `(2, STEPS + 1)`: deletion, insertion.
    """
    config, count = model.config, len(order)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(count, device=order.device)
    done = torch.arange(STEPS + 1, device=order.device) * count / STEPS
    first = (rank < done[:, None]).view(-1, *config.grid_size)  # the most important ones, step by step
    first = pixels_of_tokens(first, config)
    frames, _, height, width = first.shape[1:]
    kept = clip[:frames, :, :height, :width]
    mean = clip.mean((0, 2, 3), keepdim=True)
    both = []
    for replaced in (first, ~first):
        changed = clip.expand(STEPS + 1, *clip.shape).clone()
        changed[:, :frames, :, :height, :width] = torch.where(replaced, mean, kept)
        both.append(model(changed).logits.float().softmax(-1)[:, label])
    return torch.stack(both).cpu().numpy()


def maps_of(model, clip, label):
    """The maps to judge, for one clip: `dict` of (n_t, n_h, n_w), larger where a token should matter more."""
    batch = clip[None]
    delta = [each[0].mean(0) for each in model.delta_maps(batch).maps]
    found = {
        "Δ, first layer": delta[0],
        "Δ, last layer": delta[-1],
        # Layers have their own ranges of Δ: each counts alike.
        "Δ, mean of layers": torch.stack([(each - each.mean()) / each.std() for each in delta]).mean(0),
        "reading map": model.reading_maps(batch, labels=torch.tensor([label], device=clip.device))[0],
    }
    pixels = batch.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(pixels).logits[0, label], pixels)
    return found | {"gradient": sum_over_tubelets(slope[0].square().sum(1), model.config).sqrt()}


def judge(model, clip, label, rng):
    """Curves of each map on a clip, and of random orders: `dict` of (2, STEPS + 1)."""
    orders = {name: each.flatten().argsort(descending=True) for name, each in maps_of(model, clip, label).items()}
    result = {name: curves(model, clip, order, label) for name, order in orders.items()}
    count = len(next(iter(orders.values())))
    drawn = [torch.from_numpy(rng.permutation(count)).to(clip.device) for _ in range(RANDOM_ORDERS)]
    return result | {"random order": np.mean([curves(model, clip, order, label) for order in drawn], axis=0)}


def area(curve):
    """Area under curves of STEPS + 1 points over a width of 1, along the last axis."""
    return (curve[..., 1:] + curve[..., :-1]).mean(-1) / 2


def interval(values, samples=2000):
    """Mean of one value a clip, and the 95 % interval from drawing clips with replacement."""
    rng = np.random.default_rng(0)
    drawn = values[rng.integers(len(values), size=(samples, len(values)))].mean(1)
    return values.mean(), *np.percentile(drawn, [2.5, 97.5])


def table_of(results):
    """Columns and lines: the areas of each map, and how far they are from those of random orders."""
    areas = {name: area(np.stack([each[name] for each in results])) for name in results[0]}  # (clips, 2)
    columns = ["map", "deletion area (lower is better)", "minus random", "insertion area (higher is better)"]
    columns += ["minus random"]
    lines = []
    for name, values in areas.items():
        cells = [name]
        for kind in range(2):
            cells.append("{:.3f} ({:.3f} to {:.3f})".format(*interval(values[:, kind])))
            ahead = values[:, kind] - areas["random order"][:, kind]
            known = name != "random order"
            cells.append("{:+.3f} ({:+.3f} to {:+.3f})".format(*interval(ahead)) if known else "–")
        lines.append(cells)
    return columns, lines


def plot(results, path, title):
    """Mean curves of each map, with the intervals over clips as bands."""
    colours = ["#56b4e9", "#0072b2", "#009e73", "#d55e00", "#cc79a7", "#000000"]  # safe for colour-blind readers
    styles = ["-", "--", "-.", "-", "--", ":"]
    drawing = Figure(figsize=(9, 3.8), layout="constrained")
    share = np.linspace(0, 100, STEPS + 1)
    for kind, axes in enumerate(drawing.subplots(1, 2, sharey=True)):
        for name, colour, style in zip(results[0], colours, styles, strict=True):
            points = [interval(np.array([each[name][kind, step] for each in results])) for step in range(STEPS + 1)]
            mean, low, high = np.array(points).T
            axes.plot(share, mean, style, color=colour, label=name)
            axes.fill_between(share, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.set(title=("deletion", "insertion")[kind], xlim=(0, 100), ylim=(0, 1))
        axes.set_xlabel(("tokens replaced by the mean colour (%)", "tokens brought back (%)")[kind])
        axes.grid(alpha=0.3)
    drawing.axes[0].set_ylabel("probability of the predicted label")
    drawing.axes[1].legend(fontsize=8)
    drawing.suptitle(title, fontsize=10)
    part = f"{path}.part"
    drawing.savefig(part, format="png", dpi=110)
    os.replace(part, path)


def main():
    args = parse_arguments()
    if reason := unloadable_reason(args.model_name_or_path):
        sys.exit(reason)
    paths, trust = find_clips(args.clips, args.max_clips), {"trust_remote_code": args.trust_remote_code}
    model = AutoModelForVideoClassification.from_pretrained(args.model_name_or_path, **trust)
    if not hasattr(model, "delta_maps"):
        sys.exit(f"{args.model_name_or_path} is a {type(model).__name__}, which has no Δ. Name a VideoMamba.")
    processor = AutoVideoProcessor.from_pretrained(args.model_name_or_path, **trust)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).eval()
    rng, results = np.random.default_rng(args.seed), []
    passes = 2 * (STEPS + 1) * (5 + RANDOM_ORDERS)
    print(f"Clips: {len(paths)}. The model judges each {passes} times: on a CPU a minute a clip or more.")
    for path in tqdm(paths, unit="clip"):
        try:
            clip = processor(str(path), return_tensors="pt")["pixel_values"][0].to(device)
        except (OSError, ValueError) as error:
            tqdm.write(f"Skipped {path}: {error}", file=sys.stderr)
            continue
        with torch.no_grad():
            label = int(model(clip[None]).logits.argmax(-1))
        results.append(judge(model, clip, label, rng))
    if len(results) < 2:
        sys.exit("Two clips that can be read are needed: the intervals are over clips.")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    columns, lines = table_of(results)
    title = f"{Path(args.model_name_or_path).name}, {len(results)} clips, 95 % intervals over clips"
    with open(args.output_dir / "maps.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *lines])
    rows = [columns, ["---"] * len(columns), *lines]
    text = f"{title}\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)
    (args.output_dir / "maps.md").write_text(text, encoding="utf-8")
    plot(results, args.output_dir / "maps.png", title)
    print(text)


if __name__ == "__main__":
    main()
