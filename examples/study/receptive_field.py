#!/usr/bin/env python
"""Draws how far a VideoMamba sees: the effective receptive field of its central token, in space and time.

    python examples/study/receptive_field.py --models spatial temporal full --clips clips/validation --output erf.png

For each model, trained and with fresh random weights, the picture shows how strongly each tubelet of the input affects
the last hidden state of the central tubelet. The measure is the squared gradient of a random projection of that state
(on average, the squared Jacobian), summed over the pixels of a tubelet, mean over clips and projections. The shares
of a model add up to 1; the number over a frame is the frame's share. The colours are logarithmic.
"""

import argparse
import os
import sys
from pathlib import Path


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="Folders or Hub repositories of trained models.")
    parser.add_argument("--clips", required=True, help="Folder of video files, and its sub-folders.")
    parser.add_argument("--max_clips", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="The PNG file to write.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the random weights. (default: 0)")
    return parser.parse_args()


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    parse_arguments()  # before the imports below, which take seconds

import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from transformers import AutoModelForVideoClassification, AutoVideoProcessor

import modeling_videomamba  # noqa: F401  registers VideoMamba in transformers' Auto classes
from judge_maps import find_clips, sum_over_tubelets
from modeling_videomamba.loading_videomamba import unloadable_reason
from modeling_videomamba.tokens_videomamba import class_token_index


def receptive_field(model, clips, projections=4, seed=0):
    """
    Share of each tubelet in the gradient energy of the central tubelet's last state.

    Args:
        model: a VideoMamba classifier, or its backbone.
        clips (`torch.Tensor` of shape `(B, T, C, H, W)`): normalised.
        projections (`int`): random directions of the state, +1 or -1 in each channel, that are averaged.
        seed (`int`): of these.

    Returns:
        `torch.Tensor` of shape `(n_t, n_h, n_w)`, which adds up to 1.
    """
    backbone, config = model.base_model, model.config
    steps, rows, columns = config.grid_size
    steps //= config.merge_factor  # of the last states
    centre = (steps // 2 * rows + rows // 2) * columns + columns // 2
    if config.class_token_position != "none":
        centre += centre >= class_token_index(config, steps * rows * columns)
    generator, energy = torch.Generator().manual_seed(seed), 0
    for clip in clips.split(1):
        pixels = clip.clone().requires_grad_()
        state = backbone(pixels).last_hidden_state[0, centre].float()
        for number in range(projections):
            signs = torch.randint(0, 2, state.shape, generator=generator).to(state) * 2 - 1
            (slope,) = torch.autograd.grad(signs @ state, pixels, retain_graph=number + 1 < projections)
            energy = energy + slope[0].double().square().sum(1)
    energy = sum_over_tubelets(energy, config)
    return (energy / energy.sum()).float().cpu()


def figure(fields, path):
    """A row for each model, a column for each step in time; `fields` is a `dict` of (n_t, n_h, n_w)."""
    steps = max(len(each) for each in fields.values())
    top = max(float(each.max()) for each in fields.values())
    scale = LogNorm(top * 1e-5, top, clip=True)
    drawing = Figure(figsize=(1.05 * steps + 2.2, 1.2 * len(fields) + 0.4), layout="constrained")
    axes = drawing.subplots(len(fields), steps, squeeze=False)
    for row, (name, field) in zip(axes, fields.items(), strict=True):
        for step, each in enumerate(row):
            if step >= len(field):
                each.axis("off")
                continue
            image = each.imshow(field[step], cmap="viridis", norm=scale)
            each.set_title(f"{100 * field[step].sum():.1f} %", fontsize=8)
            each.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    drawing.colorbar(image, ax=axes, label="share of the gradient energy", shrink=0.7)
    part = f"{path}.part"
    drawing.savefig(part, format="png", dpi=110)
    os.replace(part, path)


def main():
    args = parse_arguments()
    for source in args.models:
        if reason := unloadable_reason(source):
            sys.exit(reason)
    paths, fields = find_clips(args.clips, args.max_clips), {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for source in args.models:
        trained = AutoModelForVideoClassification.from_pretrained(source)
        processor = AutoVideoProcessor.from_pretrained(source)
        clips = torch.cat([processor(str(path), return_tensors="pt")["pixel_values"] for path in paths]).to(device)
        torch.manual_seed(args.seed)
        fresh = type(trained)(trained.config)
        for kind, model in (("random", fresh), ("trained", trained)):
            name = f"{trained.config.backward_scan}\n{kind}"
            fields[name] = field = receptive_field(model.to(device).eval(), clips)
            steps = field.sum((1, 2))
            own = len(field) // 2
            print(
                f"{name.replace(chr(10), ', ')}: own frame {steps[own]:.1%}, frames before {steps[:own].sum():.1%}, "
                f"after {steps[own + 1 :].sum():.1%}; half of the energy in {half(field)} of {field.numel()} tubelets"
            )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure(fields, args.output)


def half(field):
    """The fewest tubelets that hold half of the energy."""
    return int(np.searchsorted(np.cumsum(np.sort(field.flatten().numpy())[::-1]), 0.5) + 1)


if __name__ == "__main__":
    main()
