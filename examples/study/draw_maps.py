#!/usr/bin/env python
"""Draws what a VideoMamba looks at in a video: Delta maps (figure 4 of the paper) and a reading map.

    python examples/study/draw_maps.py clip.mp4 --model_name_or_path you/videomamba-k400 --layers 0 8 16 -1 \
        --output_dir maps

writes into the output folder:
- `maps.png`: a row for every second frame; the frame, the Delta map of each layer, and what the label was read from;
- `delta.mp4`: the input beside the Delta map of the last of `--layers`;
- `reading.mp4`: the input beside the reading map of the predicted label (or of `--label`).

docs/explain.md says what the two kinds of maps mean.
"""

import argparse
import os
import sys
from pathlib import Path


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", help="A video file.")
    parser.add_argument("--model_name_or_path", required=True, help="Folder or Hub repository of the classifier.")
    parser.add_argument("--trust_remote_code", action="store_true", help="Run the code that comes with the model.")
    parser.add_argument(
        "--layers", type=int, nargs="+", help="Layers to draw, from 0; -1 is the last. Default: four, spread evenly."
    )
    parser.add_argument(
        "--direction",
        default="mean",
        choices=("mean", "forward", "backward"),
        help="Which Δ (default: mean of both).",
    )
    parser.add_argument("--label", help="Label of the reading map (default: the predicted one).")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for the picture and the videos.")
    return parser.parse_args()


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    parse_arguments()  # before the imports below, which take seconds

import av
import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from transformers import AutoModelForVideoClassification, AutoVideoProcessor

import modeling_videomamba  # noqa: F401  registers VideoMamba in transformers' Auto classes
from modeling_videomamba.loading_videomamba import unloadable_reason


# Both keep their order for colour-blind readers; the second is white at zero.
POSITIVE, SIGNED = "viridis", "PuOr_r"


def scale_of(maps):
    """Colour map and range of a map: its 1st to 99th percentile; around zero if it has both signs."""
    low, high = np.percentile(maps, [1, 99])
    if np.min(maps) < 0:
        high = max(abs(low), abs(high), 1e-12)
        return SIGNED, Normalize(-high, high, clip=True)
    return POSITIVE, Normalize(low, max(high, low + 1e-12), clip=True)


def overlay(frames, maps):
    """
    A map in colour over its frames in grey.

    Args:
        frames: uint8 (T, H, W, 3).
        maps: float (n_t, n_h, n_w); each of its steps covers T / n_t frames.

    Returns:
        uint8 (T, H, W, 3).
    """
    colours, scale = scale_of(maps)
    steps = np.arange(len(frames)) * len(maps) // len(frames)
    rows = np.arange(frames.shape[1]) * maps.shape[1] // frames.shape[1]
    columns = np.arange(frames.shape[2]) * maps.shape[2] // frames.shape[2]
    large = np.asarray(maps)[steps][:, rows][:, :, columns]
    tint = colormaps[colours](scale(large))[..., :3] * 255
    grey = frames.mean(-1, keepdims=True)
    return (0.4 * grey + 0.6 * tint).round().astype(np.uint8)


def figure(frames, maps, path, labels=None):
    """
    Figure 4 of the paper: a row for each of up to eight frames; the frame itself, then one column for each map.

    Args:
        frames: uint8 (T, H, W, 3), what the model saw.
        maps: `dict` of a column's title and its map, float (n_t, n_h, n_w).
        path: the PNG file to write.
        labels (`list[str]`, *optional*): a word for each column's scale, such as "Δ".
    """
    frames = np.asarray(frames)
    shown = np.unique(np.linspace(0, len(frames) - 1, min(8, len(frames))).round().astype(int))
    columns, labels = len(maps) + 1, labels or [""] * len(maps)
    side = 1.25
    # The last row holds the scales.
    drawing = Figure(figsize=(side * columns + 0.3, (side + 0.06) * len(shown) + 0.9), layout="compressed")
    axes = drawing.subplots(len(shown) + 1, columns, squeeze=False, height_ratios=[1] * len(shown) + [0.08])
    pictures = {"frame": frames} | {name: overlay(frames, np.asarray(each)) for name, each in maps.items()}
    for column, (name, film) in enumerate(pictures.items()):
        axes[0, column].set_title(name, fontsize=9)
        for row, index in enumerate(shown):
            axes[row, column].imshow(film[index])
            axes[row, column].set(xticks=[], yticks=[])
    for row, index in enumerate(shown):
        axes[row, 0].set_ylabel(str(index + 1), rotation=0, ha="right", va="center", fontsize=9)
    axes[-1, 0].axis("off")
    for column, (each, label) in enumerate(zip(maps.values(), labels, strict=True), start=1):
        draw_scale(axes[-1, column], each, label)
    save_whole(drawing, path)


def draw_scale(axes, maps, label):
    """The scale of a map, as a bar with its ends."""
    colours, scale = scale_of(maps)
    axes.imshow(np.linspace(0, 1, 256)[None], cmap=colours, aspect="auto", extent=(0, 1, 0, 1))
    axes.set_yticks([])
    axes.set_xticks([0, 1], [f"{scale.vmin:.2g}", f"{scale.vmax:.2g}"], fontsize=8)
    axes.set_xlabel(label, fontsize=8)


def save_whole(drawing, path):
    """A figure as a PNG file, whole or not at all."""
    part = f"{path}.part"
    try:
        drawing.savefig(part, format="png", dpi=110, bbox_inches="tight")
        os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)


def overlay_video(frames, maps, path, frame_rate=8, label=""):
    """
    The input, the map over it and its scale, side by side, as H.264 in MP4, whole or not at all.

    Args:
        frames: uint8 (T, H, W, 3), what the model saw.
        maps: float (n_t, n_h, n_w).
        path: the MP4 file to write.
        frame_rate (`int`): frames a second.
        label (`str`): a word for the scale, such as "Δ, layer 8".
    """
    frames, maps = np.asarray(frames), np.asarray(maps)
    enlarge = max(1, round(224 / frames.shape[1]))
    films = [film.repeat(enlarge, 1).repeat(enlarge, 2) for film in (frames, overlay(frames, maps))]
    height, width = films[0].shape[1:3]
    height, width = height // 2 * 2, (2 * width + 64) // 2 * 2  # H.264 wants even sides
    bar = _scale_strip(maps, label, height)
    part = f"{path}.part"
    try:
        with av.open(part, "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=frame_rate, options={"crf": "18", "preset": "veryfast"})
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            for seen, drawn in zip(*films, strict=True):
                picture = np.concatenate([seen[:height], drawn[:height], bar], axis=1)[:, :width]
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")))
            container.mux(stream.encode())
        os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)


def _scale_strip(maps, label, height):
    """The scale as a picture: uint8 (height, 64, 3)."""
    colours, scale = scale_of(maps)
    drawing = Figure(figsize=(0.64, height / 100), dpi=100)
    axes = drawing.add_axes([0.08, 0.08, 0.2, 0.84])
    axes.imshow(np.linspace(1, 0, 256)[:, None], cmap=colours, aspect="auto", extent=(0, 1, 0, 1))
    axes.yaxis.tick_right()
    axes.set_xticks([])
    axes.set_yticks([0, 1], [f"{scale.vmin:.2g}", f"{scale.vmax:.2g}"], fontsize=7)
    axes.text(1.6, 0.5, label, rotation=90, va="center", fontsize=8)
    canvas = FigureCanvasAgg(drawing)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:height, :64, :3]


def seen_frames(pixel_values, processor):
    """The frames as the model saw them: uint8 (T, H, W, 3), from normalised (T, 3, H, W)."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    frames = (pixel_values.cpu().float() * std + mean) * 255
    return frames.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def delta_map(model, pixel_values, layers, direction="mean"):
    """Δ of chosen layers on one clip (1, T, 3, H, W), averaged over channels: a list of float (n_t, n_h, n_w)."""
    maps = model.delta_maps(pixel_values, layers=layers).maps
    select = {"mean": lambda each: each.mean(0), "forward": lambda each: each[0], "backward": lambda each: each[1]}
    return [select[direction](each[0]).cpu().numpy() for each in maps]


def main():
    args = parse_arguments()
    if reason := unloadable_reason(args.model_name_or_path):
        sys.exit(reason)
    if not os.path.isfile(args.video):
        sys.exit(f"There is no file {args.video}.")
    trust = {"trust_remote_code": args.trust_remote_code}
    model = AutoModelForVideoClassification.from_pretrained(args.model_name_or_path, **trust)
    if not hasattr(model, "delta_maps"):
        sys.exit(f"{args.model_name_or_path} is a {type(model).__name__}, which has no Δ. Name a VideoMamba.")
    processor = AutoVideoProcessor.from_pretrained(args.model_name_or_path, **trust)
    depth, names = model.config.num_hidden_layers, model.config.id2label
    layers = args.layers or np.unique(np.linspace(0, depth - 1, min(4, depth)).round().astype(int)).tolist()
    if not all(-depth <= layer < depth for layer in layers):
        sys.exit(f"--layers {layers}: the model has the layers 0 to {depth - 1}; -1 is the last.")
    number = None
    if args.label is not None:
        if args.label not in names.values():
            sys.exit(f"--label {args.label!r} is not one of the model's labels: {', '.join(names.values())}.")
        number = torch.tensor([model.config.label2id[args.label]])

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).eval()
    pixel_values = processor(args.video, return_tensors="pt")["pixel_values"].to(device)
    with torch.no_grad():
        scores = model(pixel_values).logits.softmax(-1)[0]
    number = scores.argmax()[None] if number is None else number.to(device)
    label = names[int(number)]
    reading = model.reading_maps(pixel_values, labels=number)[0].cpu().numpy()
    frames = seen_frames(pixel_values[0], processor)
    deltas = {
        f"Δ, layer {layer % depth}": each
        for layer, each in zip(layers, delta_map(model, pixel_values, layers, args.direction), strict=True)
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    words = ["Δ"] * len(deltas) + ["share of the logit"]
    figure(frames, {**deltas, "read from": reading}, args.output_dir / "maps.png", words)
    name, last = list(deltas.items())[-1]
    overlay_video(frames, last, args.output_dir / "delta.mp4", label=name)
    overlay_video(frames, reading, args.output_dir / "reading.mp4", label=f"read for {label}")
    print(f"{args.video}: {label}, {scores[int(number)]:.1%}. Maps of layers {layers} are in {args.output_dir}.")


if __name__ == "__main__":
    main()
