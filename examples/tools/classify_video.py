#!/usr/bin/env python
"""Names what happens in videos, with the scores of a VideoMamba classifier.

    python examples/tools/classify_video.py clip.mp4 https://example.org/other.mp4 --model you/videomamba-k400

Without a video, the script takes a short clip in which the camera pans right. Without `--model`, it uses this
repository's checkpoint for camera motion.
"""

import argparse
import os
import sys
import time
from pathlib import Path


CAMERA_MOTION = Path(__file__).resolve().parents[2] / "model_cards" / "videomamba-tiny-camera-motion"
EXAMPLE = Path(__file__).resolve().parent / "space" / "examples" / "pan-right.mp4"


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="*", metavar="video", help="files or URLs")
    parser.add_argument("--model", default=str(CAMERA_MOTION), help="a folder or a Hub repository")
    parser.add_argument("--top_k", type=int, default=3, help="labels to print for each video")
    args = parser.parse_args()
    if args.model == str(CAMERA_MOTION) and not CAMERA_MOTION.is_dir():
        parser.error("name a model with --model: the installed package has none")
    if not args.videos and not EXAMPLE.is_file():
        parser.error("name a video: the installed package has none")
    return args


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    parse_arguments()  # before the imports below, which take seconds

from transformers import pipeline

import modeling_videomamba  # noqa: F401  registers VideoMamba in transformers' Auto classes


def main():
    args = parse_arguments()
    classifier = pipeline("video-classification", model=args.model)
    for video in map(os.path.expanduser, args.videos or [str(EXAMPLE)]):
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
