#!/usr/bin/env python
"""Joins labelled clips into one film with known cuts, to try `tag_video.py` on.

    python examples/made_clips/join_clips.py clips/validation film.mp4 --minutes 10

takes clips of `clips/validation/<label>/` in random order until the film is long enough, each whole, and writes beside
it `film.csv`: start and end in seconds and the label of each shot. `make_camera_motion_clips.py` makes such clips.
"""

import argparse
import csv
import os
import random
import sys
from pathlib import Path


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path, help="folder with one folder of clips for each label")
    parser.add_argument("film", type=Path, help="the MP4 file to write")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0, help="the same seed joins the same clips in the same order")
    return parser.parse_args()


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    parse_arguments()  # before the imports below, which take seconds

import av
import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm


VIDEO_SUFFIXES = {".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg"}


def join_clips(clips, film, seconds, width=320, height=240, rate=24, seed=0):
    """Writes `film`, whole or not at all, and yields (start, end, label) of each of its shots, in frames.

    Args:
        clips: list of (path, label). No clip follows itself, and all are used before one is used again.
        film: the file to write, H.264 in MP4. A clip fills the frame; what stands out at the sides is cut off.
        seconds: the film ends with the clip that reaches this length.
        rate: frames a second. Clips are joined frame by frame, whatever their own rate.
    """
    if len({path for path, _ in clips}) < 2:
        raise ValueError(f"{len(clips)} clips cannot be joined into a film: give at least two.")
    rng, order, position, last = random.Random(seed), [], 0, None
    temporary = Path(film).with_suffix(".part")
    try:
        with av.open(str(temporary), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=rate, options={"crf": "23", "preset": "veryfast"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            while position < seconds * rate:
                if not order:
                    order = rng.sample(clips, len(clips))
                    if order[-1] == last:
                        order.reverse()
                last = path, label = order.pop()
                start = position
                with av.open(str(path)) as clip:
                    for frame in clip.decode(video=0):
                        picture = ImageOps.fit(Image.fromarray(frame.to_ndarray(format="rgb24")), (width, height))
                        frame = av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")
                        frame.pts = position
                        container.mux(stream.encode(frame))
                        position += 1
                yield start, position, label
            container.mux(stream.encode())
        os.replace(temporary, film)
    finally:
        temporary.unlink(missing_ok=True)


def main():
    args = parse_arguments()
    clips = sorted(path for path in args.clips.glob("*/*") if path.suffix.lower() in VIDEO_SUFFIXES)
    rate = 24
    try:
        shots = join_clips([(path, path.parent.name) for path in clips], args.film, args.minutes * 60, rate=rate)
        with (
            open(args.film.with_suffix(".csv"), "w", newline="", encoding="utf-8") as file,
            tqdm(desc="shots", unit="shot") as bar,
        ):
            table = csv.writer(file)
            table.writerow(["start", "end", "label"])
            for start, end, label in shots:
                table.writerow([f"{start / rate:.3f}", f"{end / rate:.3f}", label])
                bar.update()
    except (OSError, ValueError) as error:
        sys.exit(f"{error} (Looked for {args.clips}/<label>/<clip>.)")
    print(f"{args.film}: {end / rate / 60:.1f} minutes, {bar.n} shots")


if __name__ == "__main__":
    main()
