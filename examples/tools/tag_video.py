#!/usr/bin/env python
"""Labels a film over time: a timeline of labels from a VideoMamba classifier.

    python examples/tools/tag_video.py film.mp4                      # tags.csv, tags.json, chapters.vtt, timeline.png
    python examples/tools/tag_video.py film.mp4 --overlay            # and a copy of the film with the labels in it
    python examples/tools/tag_video.py --live rtsp://camera/stream   # a line a second; --live 0 is the first camera

Windows of as many frames as the model takes slide over the film. A model that can stream (docs/streaming.md) computes
each frame once instead and gives a label after each step of two frames, also live. PySceneDetect finds the cuts, and
nothing crosses a cut. Of a model that gives a clip several labels, all from 50 % on hold, and segments may overlap.
The film is decoded once and never held in memory. After a kill or Ctrl-C, the same command resumes, with the same
result.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from tool_models import add_model


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("film", nargs="?", type=Path, help="a video file of any length")
    parser.add_argument("--live", metavar="SOURCE", help="a camera's number or an address, such as rtsp://...")
    add_model(parser)
    parser.add_argument("--output", type=Path, help="folder to write to (default: FILM-tags)")
    parser.add_argument("--window", type=float, help="seconds per window (default: as in training)")
    parser.add_argument("--step", type=float, default=1.0, help="seconds from one window to the next (not streaming)")
    parser.add_argument("--batch_size", type=int, default=8, help="windows or steps per batch")
    parser.add_argument("--device", help="cuda or cpu (default: a GPU if there is one)")
    parser.add_argument("--windows", action="store_true", help="windows also of a model that can stream")
    parser.add_argument("--no_cuts", action="store_true", help="the film is one shot: look for no cuts")
    parser.add_argument("--overlay", action="store_true", help="also write a copy with the labels in the picture")
    parser.add_argument("--truth", type=Path, help="CSV file with start, end, label, to compare with")
    args = parser.parse_args()
    if (args.film is None) == (args.live is None):
        parser.error("give either a film or --live with a source")
    if args.step <= 0 or args.batch_size < 1 or (args.window is not None and args.window <= 0):
        parser.error("--step, --window and --batch_size must be positive")
    return args


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    parse_arguments()  # before the imports below, which take seconds

import av
import torch
from tqdm import tqdm

from film_frames import NoCuts, Point, adaptive_detector, find_cuts, frame_rate, read_frames
from live_camera import tag_live
from modeling_videomamba.loading_videomamba import unloadable_reason
from modeling_videomamba.video_decoding import open_pyav
from segments import Window, compare, to_moments, to_segments
from tag_outputs import clock, counted, draw_timeline, label_studio_task, write, write_overlay, write_tables
from taggers import make_tagger


class Journal:
    """A file with one line of JSON a part. A line that was not written to its end does not count."""

    def __init__(self, path, settings):
        self.path, self.windows, self.point, self.finished = path, [], Point(), False
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        if not lines or json.loads(lines[0]) != settings:
            if lines:
                print(f"{path} is of other settings or another film: starting anew.")
            path.write_text(json.dumps(settings) + "\n", encoding="utf-8")
            lines = lines[:1]
        for line in lines[1:]:
            part = json.loads(line)
            self.windows += [Window(*window) for window in part["windows"]]
            self.finished = part["next"] is None
            self.point = None if self.finished else Point(*part["next"])
        with open(path, "r+b") as file:  # what a kill left of a line
            whole = file.read().rfind(b"\n") + 1
            file.truncate(whole)

    def add(self, windows, point):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"windows": windows, "next": point}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.windows += windows
        self.point, self.finished = point, point is None


def tag_parts(film, tagger, point, batch_size, progress, make_detector=adaptive_detector):
    """Yields, part by part, its `Window`s and the `Point` at which the next part begins, None at the film's end."""
    shot, origin = tagger.shot(tagger, point.shot), point.origin
    windows, places, clips = [], [], []

    def take(made):
        for place, clip in made:
            places.append(place)
            clips.append(clip)
            if len(clips) == batch_size:
                classify()

    def classify():
        if clips:
            scores = tagger.classify(clips)
            windows.extend(Window(*place, s) for place, s in zip(places, scores, strict=True))
        places.clear(), clips.clear()

    for frame, is_cut, new_part in find_cuts(read_frames(film, point), tagger.rate, make_detector):
        if origin is None:
            origin = frame.pts
        if (is_cut or new_part) and frame.index != point.index:
            take(shot.end())
            if tagger.streams or new_part:
                classify()
            shot = tagger.shot(tagger, shot.number + is_cut)
        if new_part:
            yield windows, Point(frame.index, frame.pts, frame.time, origin, shot.number)
            windows = []
        take(shot.add(frame))
        progress(frame.time)
    take(shot.end())
    classify()
    yield windows, None


def tag_film(args, device):
    try:
        with open_pyav(str(args.film), str(args.film)) as (container, stream):
            rate = frame_rate(stream)
            duration = (container.duration or 0) / av.time_base
    except av.FFmpegError as error:
        raise ValueError(f"{args.film} cannot be read as a video ({error.strerror}).") from error
    tagger = make_tagger(args.model, device, rate, args.window, args.step, windows=args.windows)
    folder = args.output or Path(f"{args.film.stem}-tags")
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "film": [str(args.film.resolve()), args.film.stat().st_size],
        "model": [str(args.model), tagger.model.config.to_dict()["id2label"]],
        "window": tagger.settings(),
        "cuts": not args.no_cuts,
    }
    journal = Journal(folder / "journal.jsonl", json.loads(json.dumps(settings)))
    started, before, interrupted = time.perf_counter(), None if journal.finished else journal.point.time, False
    if not journal.finished:
        if journal.point.index:
            print(f"Resuming at {clock(journal.point.time)}.")
        bar = tqdm(total=round(duration) or None, initial=int(journal.point.time), unit=" s of film", desc="tagging")

        def advance(seconds):
            bar.update(int(seconds) - bar.n)

        try:
            detector = NoCuts if args.no_cuts else adaptive_detector
            parts = tag_parts(args.film, tagger, journal.point, args.batch_size, advance, detector)
            for windows, point in parts:
                journal.add(windows, point)
        except KeyboardInterrupt:
            interrupted = True
        bar.close()
    if not journal.windows:
        sys.exit(130 if interrupted else f"{args.film}: no frame can be decoded.")

    segments = to_segments(journal.windows, tagger.several)
    moments = to_moments(journal.windows) if tagger.several else segments
    write_tables(folder, args.film, args.model, segments, journal.windows, moments)
    task = label_studio_task(args.film, args.model, segments, float(rate))
    write(folder / "label_studio.json", json.dumps([task], indent=1) + "\n")
    draw_timeline(folder / "timeline.png", args.film, segments, moments)
    if interrupted:
        print(f"Stopped; {folder} holds the result up to {clock(moments[-1].end)}. Run the command again to go on.")
        sys.exit(130)
    if before is not None:
        seconds = time.perf_counter() - started
        print(
            f"{moments[-1].end - before:.1f} s of film in {seconds:.1f} s: "
            f"{(moments[-1].end - before) / seconds:.1f} times as fast as it plays"
        )
    if args.overlay:
        write_overlay(folder / "overlay.mp4", args.film, moments)
    print(f"{folder}: {counted(moments[-1].shot + 1, 'shot')}, {counted(len(segments), 'segment')}")
    if args.truth:
        compare(args.truth, segments, tagger.several)


def main():
    args = parse_arguments()
    if reason := unloadable_reason(args.model):
        sys.exit(reason)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.live is not None:
        tag_live(args, device)
        return
    if not args.film.is_file():
        sys.exit(f"There is no file {args.film}.")
    try:
        tag_film(args, device)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
