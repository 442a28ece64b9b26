#!/usr/bin/env python
"""Splits a folder of pictures, one sub-folder a class, into `train/` and `validation/`, and shrinks them.

    python examples/made_clips/split_imagefolder.py caltech101 split --train_per_class 30 --shortest_edge 128

The split is fixed: in each class, the first pictures in the order of the SHA-256 of their file names train.
"""

import argparse
import hashlib
import sys
from pathlib import Path


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder with a sub-folder of pictures for each class")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--train_per_class", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--shortest_edge", type=int, default=128, help="larger pictures shrink (default: %(default)s)")
    parser.add_argument("--quality", type=int, default=90, help="JPEG quality (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    parse_arguments()  # before the imports below, which take seconds

from PIL import Image, ImageOps


def main():
    args = parse_arguments()
    classes = sorted(path for path in args.source.iterdir() if path.is_dir()) if args.source.is_dir() else []
    if not classes:
        raise SystemExit(f"error: {args.source} has no sub-folders: one for each class was expected.")
    if args.output.exists():
        raise SystemExit(f"error: {args.output} exists already. Remove it, or name another folder.")
    counts = {"train": 0, "validation": 0}
    for folder in classes:
        pictures = sorted(folder.iterdir(), key=lambda path: hashlib.sha256(path.name.encode()).digest())
        if len(pictures) <= args.train_per_class:
            raise SystemExit(f"error: {folder} has {len(pictures)} pictures, not more than {args.train_per_class}.")
        for number, path in enumerate(pictures):
            split = "train" if number < args.train_per_class else "validation"
            target = args.output / split / folder.name / f"{path.stem}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(path) as picture:
                picture = ImageOps.exif_transpose(picture).convert("RGB")
                scale = min(1, args.shortest_edge / min(picture.size))
                picture = picture.resize([max(1, round(edge * scale)) for edge in picture.size], Image.BICUBIC)
                picture.save(target, quality=args.quality, optimize=True)
            counts[split] += 1
    print(f"{args.output}: {len(classes)} classes, {counts['train']} training and {counts['validation']} validation.")


if __name__ == "__main__":
    main()
