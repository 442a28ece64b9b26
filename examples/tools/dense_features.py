"""
What `classify_clips.py --dense` writes: features of windows that slide over films, for temporal detection.

ActionFormer and OpenTAD read such `<film>.npy`, (T, C) float32: feature `i` is of `window_size` frames, from frame
`i * feature_stride` on.
"""

import json
import os
from pathlib import Path

import numpy as np
import torch

from film_frames import Point, frame_rate, read_frames
from modeling_videomamba.video_decoding import open_pyav
from taggers import Shot, Tagger


LONGEST_GAP = 60  # seconds in which no frame can be decoded; time stamps that jump further are wrong


class FeatureTagger(Tagger):
    """In a tagger's place: of windows, what the classifier reads."""

    @torch.inference_mode()
    def classify(self, clips):
        """(B, C) float32 of a list of (T, 3, height, width)."""
        pixels = torch.stack(clips).to(self.model.dtype)
        return self.model.base_model(pixels).pooler_output.float().cpu()


def slide(film, tagger, batch_size):
    """
    The features of a film, (T, C) float32, and how many frames it has. No window crosses the film's end; a film that
    is shorter than a window is one window. Where frames cannot be decoded, the one before them is seen again.
    """
    shot, clips, features, count = Shot(tagger, 0), [], [], 0

    def take(made):
        clips.extend(clip for _, clip in made)
        while len(clips) >= batch_size:
            features.append(tagger.classify(clips[:batch_size]))
            del clips[:batch_size]

    before = None
    for frame in read_frames(film, Point()):
        missing = round(frame.time * tagger.rate) - count
        if before is not None and missing <= LONGEST_GAP * tagger.rate:
            for _ in range(missing):  # else all later features would be of another time
                take(shot.add(before._replace(time=count / tagger.rate)))
                count += 1
        take(shot.add(frame))
        before, count = frame, count + 1
    take(shot.end() if count < tagger.length else shot.resize())
    if clips:
        features.append(tagger.classify(clips))
    if not features:
        raise ValueError(f"{film}: no frame can be decoded.")
    return torch.cat(features).numpy(), count


def write_features(film, folder, tagger, stride, batch_size):
    """`<film>.json`, what toolboxes ask about the features, and then `<film>.npy`: whole or not at all."""
    with open_pyav(str(film), str(film)) as (_, stream):
        rate = frame_rate(stream)
    tagger.set_window(rate)
    tagger.step = stride
    features, frames = slide(film, tagger, batch_size)
    fps, path = float(rate), Path(folder, f"{Path(film).stem}.npy")
    about = {"fps": fps, "frames": frames, "duration": frames / fps, "feature_length": len(features)}
    about |= {"feature_stride": stride, "window_size": tagger.length, "offset_frames": tagger.length // 2}
    about |= {"feature_stride_seconds": stride / fps, "window_seconds": tagger.length / fps}
    path.with_suffix(".json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    with open(path.with_suffix(f".{os.getpid()}.tmp"), "wb") as part:
        np.save(part, features)
    os.replace(part.name, path)
