#!/usr/bin/env python
"""Names what happens in videos, with the scores of a VideoMamba classifier.

    python examples/classify_video.py clip.mp4 https://example.org/other.mp4 --model you/videomamba-k400

Without a video it makes a short one with a known camera motion; without `--model` it uses the checkpoint of this
repository that tells camera motions apart.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from transformers import pipeline

import modeling_videomamba  # noqa: F401  registers VideoMamba in transformers' Auto classes
from make_camera_motion_clips import write_demo_clip


CAMERA_MOTION = Path(__file__).resolve().parent.parent / "model_cards" / "videomamba-tiny-camera-motion"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="*", metavar="video", help="files or URLs")
    parser.add_argument("--model", default=str(CAMERA_MOTION), help="a folder or a Hub repository")
    parser.add_argument("--top_k", type=int, default=3, help="labels to print for each video")
    args = parser.parse_args()
    if args.model == str(CAMERA_MOTION) and not CAMERA_MOTION.is_dir():
        parser.error("name a model with --model: an installed package brings none")

    classifier = pipeline("video-classification", model=args.model)
    with tempfile.TemporaryDirectory() as scratch:
        videos = [os.path.expanduser(video) for video in args.videos]
        if not videos:
            videos = [os.path.join(scratch, "pan-right.mp4")]
            write_demo_clip(videos[0], motion="pan right")
            print("No video given: made one in which the camera pans right.")
        for video in videos:
            start = time.perf_counter()
            try:
                answers = classifier(video, top_k=args.top_k)
            except (OSError, ValueError) as error:
                sys.exit(str(error))
            print(f"{os.path.basename(video)} ({time.perf_counter() - start:.2f} s)")
            for answer in answers:
                print(f"  {answer['score']:6.1%}  {answer['label']}")


if __name__ == "__main__":
    main()
