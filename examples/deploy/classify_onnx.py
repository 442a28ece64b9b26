#!/usr/bin/env python
"""Names what happens in a video with a classifier that examples/deploy/export_onnx.py wrote. Needs no PyTorch:

pip install onnxruntime av pillow numpy
python classify_onnx.py videomamba-onnx clip.mp4
"""

import json
import sys
from pathlib import Path

import av
import numpy as np
import onnxruntime
import PIL.Image


def read_clip(video, settings):
    """The frames that the processor samples from the middle of a video, (1, T, 3, H, W) float32, normalised."""
    with av.open(video) as container:
        total = sum(1 for _ in container.decode(video=0))
    count, stride = settings["num_frames"], settings["frame_stride"]
    span = (count - 1) * (stride or 0) + 1
    if stride and span <= total:
        indices = (total - span) // 2 + stride * np.arange(count)
    else:
        indices = np.linspace(0, total - 1, count).round().astype(int)
    wanted = set(indices.tolist())
    with av.open(video) as container:  # once more, so that a film's frames need not all be kept
        frames = {i: frame.to_image() for i, frame in enumerate(container.decode(video=0)) if i in wanted}
    edge, height, width = settings["size"]["shortest_edge"], *settings["crop_size"].values()
    clip = []
    for frame in (frames[i] for i in indices.tolist()):
        scale = edge / min(frame.size)
        size = [edge if side == min(frame.size) else int(side * scale) for side in frame.size]
        frame = frame.resize(size, PIL.Image.Resampling(settings["resample"]))
        left, top = round((frame.width - width) / 2), round((frame.height - height) / 2)
        clip.append(np.asarray(frame.crop((left, top, left + width, top + height))))
    clip = np.stack(clip).astype(np.float32) * settings["rescale_factor"]
    clip = (clip - settings["image_mean"]) / settings["image_std"]
    return clip.transpose(0, 3, 1, 2)[None].astype(np.float32)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    labels = json.loads((folder / "config.json").read_text(encoding="utf-8"))["id2label"]
    settings = json.loads((folder / "video_preprocessor_config.json").read_text(encoding="utf-8"))
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    (logits,) = session.run(["logits"], {"pixel_values": read_clip(sys.argv[2], settings)})
    scores = np.exp(logits[0] - logits[0].max())
    for label in np.argsort(-scores)[:3]:
        print(f"{scores[label] / scores.sum():6.1%}  {labels[str(label)]}")
