"""What the tests of the training scripts share: a tiny processor, and clips for it."""

import json
from pathlib import Path

import numpy as np

from modeling_videomamba import VideoMambaVideoProcessor
from video_files import write_video


NAMES = ["to the left", "to the right"]


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def still_clip(folder):
    frame = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    frame = np.repeat(np.repeat(frame[::8, ::8], 8, 0), 8, 1)
    return {
        "path": write_video(folder / "still.mp4", [frame] * 8, options={"crf": "0"}, pix_fmt="yuv444p"),
        "bytes": None,
    }


def tiny_processor():
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    return VideoMambaVideoProcessor(num_frames=4, frame_stride=2, **sizes)


COLOURS = ["blue", "green", "red"]


def write_coloured_clips(root, counts) -> Path:
    """
    Clips of noise in up to three colours, every eighth in none: `root/<split>/<number>.mp4`, and the colours of each
    in `metadata.jsonl`. `counts` gives the clips by split, in multiples of eight.
    """
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        folder, lines = Path(root, split), []
        folder.mkdir(parents=True)
        for number in range(count):
            labels = [colour for place, colour in enumerate(COLOURS) if number >> place & 1]
            frames = rng.integers(0, 40, (8, 32, 32, 3), dtype=np.uint8)
            for colour in labels:
                frames[..., 2 - COLOURS.index(colour)] += 180
            write_video(folder / f"{number}.mp4", frames, pix_fmt="yuv444p", options={"crf": "10"})
            lines.append(json.dumps({"file_name": f"{number}.mp4", "labels": labels}))
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    return Path(root)
