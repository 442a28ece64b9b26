"""What the tests of the training scripts share: a tiny processor, and clips for it."""

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
