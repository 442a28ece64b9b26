#!/usr/bin/env python
"""Names what happens in a video with a classifier that examples/deploy/export_onnx.py wrote. Needs no PyTorch:

pip install onnxruntime av pillow numpy
python classify_onnx.py videomamba-onnx clip.mp4
"""

import argparse
import json
import sys
from pathlib import Path


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the folder that export_onnx.py wrote")
    parser.add_argument("video", help="a video file")
    return parser.parse_args()


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    parse_arguments()  # before the imports below, of packages that may be missing

import av
import numpy as np
import onnxruntime
import PIL.Image


def choose_frames(times, settings):
    """
    The frames that the processor samples. `times`: when each is shown and when the last one ends, in seconds from the
    first.
    """
    total, count, stride = len(times) - 1, settings["num_frames"], settings["frame_stride"]
    if settings.get("sampling_fps"):
        distance = min(1 / settings["sampling_fps"], times[-1] / count)
        wanted = times[-1] / 2 + distance * (np.arange(count) - (count - 1) / 2)
        return np.searchsorted(times[1:-1], wanted + 0.001, side="right")  # containers round times to a thousandth
    span = (count - 1) * (stride or 0) + 1
    if stride and span <= total:
        return (total - span) // 2 + stride * np.arange(count)
    if settings.get("spread_in_segments"):
        segment = (total - 1) / count
        return (segment * np.arange(count)).round().astype(int) + int(segment / 2)
    return np.linspace(0, total - 1, count).round().astype(int)


def frame_times(frames, rate):
    """The times of `choose_frames`; of a file that does not say when its frames are shown, by their rate."""
    shown = [(frame.pts, frame.duration or 0, frame.time_base) for frame in frames]
    starts, unit = [pts for pts, _, _ in shown], float(shown[0][2] or 1)
    if None in starts or len(set(starts)) < len(starts):
        return np.arange(len(starts) + 1) / float(rate)
    last = shown[-1][1] or (starts[-1] - starts[0]) / max(1, len(starts) - 1)
    return (np.array([*starts, starts[-1] + last]) - starts[0]) * unit


def shrink(frame, settings):
    """A decoded frame, turned upright, resized and cropped: (H, W, 3) uint8."""
    pixels = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
    image = PIL.Image.fromarray(np.ascontiguousarray(pixels))
    edge, height, width = settings["size"]["shortest_edge"], *settings["crop_size"].values()
    scale = edge / min(image.size)
    size = tuple(edge if side == min(image.size) else int(side * scale) for side in image.size)
    filter = PIL.Image.Resampling(settings["resample"])
    if settings.get("antialias", True):
        image = image.resize(size, filter)
    elif filter != PIL.Image.Resampling.BILINEAR:
        raise ValueError(
            f"`resample` is {filter}, but without `antialias` Pillow resizes as the processor if it is 2."
        )
    else:
        places = image.width / size[0], 0, 0, 0, image.height / size[1], 0
        image = image.transform(size, PIL.Image.Transform.AFFINE, places, filter)
    left, top = (image.width - width) / 2, (image.height - height) / 2
    if settings.get("crop_rounds_down"):
        left, top = left // 1, top // 1
    left, top = round(left), round(top)
    return np.asarray(image.crop((left, top, left + width, top + height)))


def read_clip(video, settings):
    """The frames that the processor samples from a video, (1, T, 3, H, W) float32, normalised."""
    with av.open(video) as container:
        stream = container.streams.video[0]
        indices = choose_frames(frame_times(container.decode(stream), stream.average_rate or 25), settings)
    wanted = set(indices.tolist())
    with av.open(video) as container:  # once more, so that a film's frames need not all be kept
        frames = {i: shrink(frame, settings) for i, frame in enumerate(container.decode(video=0)) if i in wanted}
    clip = [frames[i] for i in indices.tolist()]
    clip = np.stack(clip).astype(np.float32) * settings["rescale_factor"]
    clip = (clip - settings["image_mean"]) / settings["image_std"]
    return clip.transpose(0, 3, 1, 2)[None].astype(np.float32)


if __name__ == "__main__":
    args = parse_arguments()
    config = json.loads((args.model / "config.json").read_text(encoding="utf-8"))
    settings = json.loads((args.model / "video_preprocessor_config.json").read_text(encoding="utf-8"))
    session = onnxruntime.InferenceSession(args.model / "model.onnx")
    (logits,) = session.run(["logits"], {"pixel_values": read_clip(args.video, settings)})
    powers = np.exp(logits[0] - logits[0].max())
    several = config["problem_type"] == "multi_label_classification"  # each label has a score of its own
    scores = 1 / (1 + np.exp(-logits[0])) if several else powers / powers.sum()
    for label in np.argsort(-scores)[:3]:
        print(f"{scores[label]:6.1%}  {config['id2label'][str(label)]}")
