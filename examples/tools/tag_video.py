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
import collections
import csv
import io
import itertools
import json
import math
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from tool_models import THRESHOLD, add_model, gives_several, to_scores


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
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForVideoClassification, AutoVideoProcessor

from modeling_videomamba import VideoMambaConfig, VideoMambaForVideoFrameClassification
from modeling_videomamba.configuration_videomamba import unstreamable_reason
from modeling_videomamba.loading_videomamba import unloadable_reason
from modeling_videomamba.video_decoding import DecodedVideoMetadata, decoded_frames, open_pyav, read_packets
from segments import Segment as LabelledSegment
from segments import label_studio_task, report


# The film is worked through in parts, each of which ends at the first cut after PART seconds, at the latest after
# LONGEST_PART. A part knows nothing of the one before it, so going on after an interruption changes nothing.
PART, LONGEST_PART = 30, 120
CHUNK = 8  # frames that are resized together
CUT_WIDTH = 256  # pixels; cuts are looked for in a picture of this width
TOP_K = 5
LIVE_BUFFER = 2  # seconds of frames that wait for a streaming model, before the oldest are dropped


class Frame(NamedTuple):
    index: int
    pts: int | None  # time stamp in the file, to find the frame again
    time: float  # seconds since the first frame
    picture: np.ndarray  # (H, W, 3) uint8 RGB, upright
    small: np.ndarray  # (h, CUT_WIDTH, 3) uint8 BGR, for the detector of cuts


class Point(NamedTuple):
    """Where a part begins: all that is needed to go on from there."""

    index: int = 0
    pts: int | None = None
    time: float = 0.0
    origin: int | None = None  # time stamp of the film's first frame
    shot: int = 0


class Window(NamedTuple):
    shot: int
    start: float  # seconds
    end: float
    scores: dict[str, float]  # of the TOP_K labels, the best first


class Segment(NamedTuple):
    start: float  # seconds
    end: float
    shot: int
    label: str
    score: float  # mean over its windows


# ---------------------------------------------------------------------------------------------------------------------
# The film: frames, cuts, windows
# ---------------------------------------------------------------------------------------------------------------------


def read_frames(film, point):
    """Yields the `Frame`s of a film from `point` on. Damaged frames are left out."""
    wanted = point.pts if point.index else None
    with open_pyav(str(film), str(film)) as (container, stream):
        if wanted is not None:
            container.seek(wanted, stream=stream)
        frames = (frame for frame in decoded_frames(container, stream) if not frame.is_corrupt)
        if wanted is not None:
            frames = itertools.dropwhile(lambda frame: frame.pts is not None and frame.pts < wanted, frames)
            first = next(frames, None)
            if first is not None and first.pts == wanted:
                yield from _number(itertools.chain([first], frames), stream, point.index, point.origin)
                return
    # From the start, also where a seek does not land at the frame: then the frames before it are only counted.
    with open_pyav(str(film), str(film)) as (container, stream):
        frames = (frame for frame in decoded_frames(container, stream) if not frame.is_corrupt)
        yield from _number(itertools.islice(frames, point.index, None), stream, point.index, point.origin)


def _number(frames, stream, first, origin):
    for index, frame in enumerate(frames, first):
        if origin is None:
            origin = frame.pts
        timed = frame.pts is not None and origin is not None
        seconds = float((frame.pts - origin) * frame.time_base) if timed else index / float(frame_rate(stream))
        height = max(1, round(frame.height * CUT_WIDTH / frame.width))
        small = frame.to_ndarray(format="bgr24", width=CUT_WIDTH, height=height, interpolation="FAST_BILINEAR")
        yield Frame(index, frame.pts, seconds, upright(frame), small)


def upright(frame) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a decoded frame, turned as the file says."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))


def frame_rate(stream):
    return stream.average_rate or stream.base_rate or 25


class NoCuts:
    """In the place of a detector, for a film of one shot."""

    event_buffer_length = 0


def find_cuts(frames, rate, make_detector=None):
    """Yields (frame, whether a shot begins with it, whether a part does), a few frames after they came in."""
    make_detector = make_detector or adaptive_detector
    detector, waiting, cuts, part = make_detector(), collections.deque(), set(), None
    for frame in itertools.chain(frames, [None]):
        if frame is not None:
            waiting.append(frame)
            cuts.update(_feed(detector, frame, rate))
        while waiting and (frame is None or len(waiting) > detector.event_buffer_length):
            first = waiting.popleft()
            if part is None:
                part = first.time
            is_cut = first.index in cuts
            new_part = first.time - part >= (PART if is_cut else LONGEST_PART)
            if new_part:
                detector, part = make_detector(), first.time
                for again in (first, *waiting):
                    _feed(detector, again, rate)
            yield first, is_cut, new_part
            cuts.discard(first.index)


def adaptive_detector():
    try:
        from scenedetect.detectors import AdaptiveDetector
    except ModuleNotFoundError:
        sys.exit("Finding cuts needs PySceneDetect: pip install scenedetect")
    return AdaptiveDetector()


def _feed(detector, frame, rate):
    if isinstance(detector, NoCuts):
        return []
    from scenedetect import FrameTimecode

    cuts = detector.process_frame(FrameTimecode(frame.index, float(rate)), frame.small)
    return [cut.frame_num for cut in cuts]


class Shot:
    """Slides the window over the frames of one shot, of which it holds one window, resized."""

    def __init__(self, tagger, number):
        self.tagger, self.number = tagger, number
        self.count, self.waiting, self.frames = 0, [], collections.deque(maxlen=tagger.length)

    def add(self, frame):
        self.waiting.append(frame)
        if len(self.waiting) == CHUNK:
            yield from self.resize()

    def resize(self):
        same_size = itertools.groupby(self.waiting, key=lambda frame: frame.picture.shape)
        for _, group in same_size:
            group = list(group)
            pixels = self.tagger.prepare(np.stack([frame.picture for frame in group]))
            for frame, picture in zip(group, pixels, strict=True):
                self.frames.append((frame.time, picture))
                self.count += 1
                if self.count >= self.tagger.length and (self.count - self.tagger.length) % self.tagger.step == 0:
                    yield self.window()
        self.waiting = []

    def end(self):
        """What no window has reached yet: the last frames, or all of a shot that is shorter than a window."""
        yield from self.resize()
        if self.count and (self.count < self.tagger.length or (self.count - self.tagger.length) % self.tagger.step):
            yield self.window()

    def window(self):
        times, pictures = zip(*self.frames, strict=True)
        chosen = torch.stack([pictures[i] for i in self.tagger.sample(len(pictures), times)])
        return (self.number, times[0], times[-1] + 1 / self.tagger.rate), chosen


class Sampler:
    """Chooses, of frames that come in at `rate` a second, `fps` a second: those on screen in the middles of parts."""

    def __init__(self, rate, fps):
        self.rate, self.fps = rate, fps
        self.count, self.start, self.until, self.last = 0, None, None, None

    def add(self, seconds, frame):
        """The frames that are chosen now that one comes in that is shown from `seconds` on."""
        if self.start is None:
            self.start, self.last = seconds, frame
        chosen, self.until = [], seconds + 1 / self.rate
        while (wanted := self.start + (self.count + 0.5) / self.fps) < self.until - 1e-6:
            chosen.append((wanted, frame if wanted >= seconds else self.last))
            self.count += 1
        self.last = frame
        return chosen


class StreamShot:
    """The steps in time of one shot: of each, the sampled frames."""

    def __init__(self, tagger, number):
        self.tagger, self.number = tagger, number
        self.sampler, self.waiting, self.steps = Sampler(tagger.rate, tagger.fps), [], 0
        tagger.begin()

    def add(self, frame):
        for _, chosen in self.sampler.add(frame.time, frame):
            yield from self.take(chosen)

    def take(self, frame, until=math.inf):
        """The next sampled frame: yields where the steps that are classified together begin and end, and the last."""
        self.waiting.append(self.tagger.prepare(frame.picture[None])[0])
        if len(self.waiting) < self.tagger.tubelet:
            return
        tubelet, self.waiting, self.steps = torch.stack(self.waiting), [], self.steps + 1
        seconds, first = self.tagger.tubelet / self.tagger.fps, self.sampler.start
        start = first + max(0, self.steps - self.tagger.pooled) * seconds
        yield (self.number, start, min(first + self.steps * seconds, until)), tubelet

    def end(self):
        """Of what is less than a step the last frame is repeated, so that a short shot has a label too."""
        while self.sampler.last is not None and (self.waiting or not self.steps):
            yield from self.take(self.sampler.last, self.sampler.until)


class Tagger:
    """A classifier, its processor, and the window that slides: `length` and `step` in frames."""

    shot, streams = Shot, False

    def __init__(self, model, device, rate, window=None, step=1.0):
        self.model = self.load(model).to(device).eval()
        self.processor = AutoVideoProcessor.from_pretrained(model)
        self.device, self.several = device, gives_several(self.model.config)
        self.set_window(rate, window, step)

    def load(self, model):
        return AutoModelForVideoClassification.from_pretrained(model)

    def set_window(self, rate, window=None, step=1.0):
        """From frames a second, and window and step in seconds."""
        self.rate = float(rate)
        frames, stride = self.processor.num_frames, self.processor.frame_stride
        # A model that samples from whole clips has no length of its own: the clips of Kinetics have ten seconds.
        own = 10 if stride is None else ((frames - 1) * stride + 1) / self.rate
        if self.processor.sampling_fps:
            own = frames / self.processor.sampling_fps
        window = window or own
        self.length, self.step = max(1, round(window * self.rate)), max(1, round(step * self.rate))

    def settings(self):
        """What the results depend on."""
        return [self.length, self.step, self.sample(self.length)]

    def prepare(self, pictures):
        """(T, H, W, 3) uint8 to (T, C, height, width), normalised, on the model's device."""
        return self.processor(pictures, do_sample_frames=False, device=self.device, return_tensors="pt")[
            "pixel_values"
        ][0]

    def sample(self, count, times=None):
        """The frames of a window that the model sees, by the processor's rule; `times`: when they are shown."""
        window = DecodedVideoMetadata(total_num_frames=count, fps=self.rate)
        if times is not None:
            window.frame_times = np.array([*times, times[-1] + 1 / self.rate]) - times[0]
        return self.processor.sample_frames(window).tolist()

    @torch.inference_mode()
    def classify(self, clips):
        """Scores of the best labels for each clip, a list of (T, C, height, width)."""
        return self.best(self.model(torch.stack(clips)).logits)

    def best(self, logits):
        """The TOP_K labels with their scores, of logits (B, num_labels); of several a clip, also more that hold."""
        names, found = self.model.config.id2label, []
        for row in to_scores(logits, self.model.config):
            count = max(TOP_K, self.several * int((row >= THRESHOLD).sum()))
            best = zip(*(part.tolist() for part in row.topk(min(count, len(row)))), strict=True)
            found.append({names[label]: round(score, 4) for score, label in best})
        return found


class StreamTagger(Tagger):
    """
    A classifier that can stream, and its cache: each frame is computed once. A label is of the last `pooled` steps of
    `tubelet` frames, `fps` of which are sampled in a second; by default of as many as a clip in training has.
    """

    shot, streams = StreamShot, True

    def load(self, model):
        return VideoMambaForVideoFrameClassification.from_pretrained(model)

    def set_window(self, rate, window=None, step=1.0):
        super().set_window(rate, window, step)
        config, processor = self.model.config, self.processor
        self.tubelet = config.tubelet_size
        self.fps = processor.sampling_fps or self.rate / (processor.frame_stride or self.length / processor.num_frames)
        self.pooled = config.pooling_window or config.grid_size[0]
        if window is not None:
            self.pooled = max(1, round(window * self.fps / self.tubelet))
        config.pooling_window = self.pooled
        self.begin()

    def settings(self):
        return [self.tubelet, self.fps, self.pooled]

    def begin(self):
        """Lets a new stream begin."""
        self.cache = None

    @torch.inference_mode()
    def choose_threads(self):
        """
        On a CPU, one thread for single steps, unless several are much faster: they wait for one another many times in
        a step, and on a busy machine that takes longer than the step.
        """
        size, seconds = self.processor.crop_size, {}
        step = torch.zeros(1, self.tubelet, self.model.config.num_channels, size["height"], size["width"])
        for threads in (torch.get_num_threads(), 1):
            torch.set_num_threads(threads)
            times = []
            for _ in range(4):
                started = time.perf_counter()
                self.model(step, interpolate_pos_encoding=True, use_cache=True)
                times.append(time.perf_counter() - started)
            seconds[threads] = min(times)
        threads = max(seconds)
        torch.set_num_threads(threads if 1.5 * seconds[threads] < seconds[1] else 1)

    @torch.inference_mode()
    def classify(self, clips):
        """Scores of the best labels after each of these next steps, a list of (tubelet, C, height, width)."""
        output = self.model(torch.cat(clips)[None], cache=self.cache, use_cache=True)
        self.cache = output.cache
        return self.best(output.logits[0])


def make_tagger(model, *arguments, windows=False):
    """A `StreamTagger` for a model that can stream, a `Tagger` for any other, or if `windows` are asked for."""
    config = AutoConfig.from_pretrained(model)
    streams = not windows and isinstance(config, VideoMambaConfig) and unstreamable_reason(config) is None
    return (StreamTagger if streams else Tagger)(model, *arguments)


def tag_parts(film, tagger, point, batch_size, progress, make_detector=None):
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


# ---------------------------------------------------------------------------------------------------------------------
# The journal: what is done, part by part
# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------
# What comes out
# ---------------------------------------------------------------------------------------------------------------------


def labels_that_hold(scores, several):
    """Of a window's scores, those of the labels that hold: the best; or of `several`, all that reach THRESHOLD."""
    if several:
        return {label: score for label, score in scores.items() if score >= THRESHOLD}
    return dict(itertools.islice(scores.items(), 1))


def name_all(scores):
    """All labels that hold in a text, and the least of their scores."""
    held = labels_that_hold(scores, several=True)
    return "; ".join(held), min(held.values(), default=0.0)


def to_segments(windows, several=False):
    """
    Joins neighbouring windows of one shot and one label. Between two windows the border lies in the middle. Of several
    labels a window, the segments of one may overlap those of another.
    """
    segments, scores, last, start = [], [], {}, windows[0].start if windows else 0.0
    for i, window in enumerate(windows):
        after = windows[i + 1] if i + 1 < len(windows) else None
        end = window.end
        if after is not None:
            same_shot = after.shot == window.shot
            end = (window.start + window.end + after.start + after.end) / 4 if same_shot else after.start
        before, last = last, {}
        for label, score in labels_that_hold(window.scores, several).items():
            place = before.get((window.shot, label), len(segments))
            if place == len(segments):
                segments.append(Segment(start, end, window.shot, label, score))
                scores.append([])
            scores[place].append(score)
            segments[place] = segments[place]._replace(end=end, score=sum(scores[place]) / len(scores[place]))
            last[window.shot, label] = place
        start = end
    return segments


def to_moments(windows):
    """Segments that name all labels that hold, which do not overlap: for what shows one thing at a time."""
    return to_segments([window._replace(scores=dict([name_all(window.scores)])) for window in windows])


def write(path, text):
    temporary = path.with_suffix(path.suffix + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def clock(seconds, separator="."):
    thousandths = round(seconds * 1000)
    return f"{thousandths // 3600000:02}:{thousandths // 60000 % 60:02}:{thousandths // 1000 % 60:02}" + (
        f"{separator}{thousandths % 1000:03}"
    )


def counted(number, noun):
    return f"{number} {noun}{'s' * (number != 1)}"


def write_tables(folder, film, model, segments, windows, moments=None):
    """tags.csv, tags.json and chapters.vtt, which is of the moments if the segments overlap."""
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(Segment._fields)
    rows.writerows([f"{s.start:.3f}", f"{s.end:.3f}", s.shot, s.label, f"{s.score:.4f}"] for s in segments)
    write(folder / "tags.csv", table.getvalue())

    content = {
        "film": str(film),
        "model": str(model),
        "segments": [segment._asdict() for segment in segments],
        "windows": [window._asdict() for window in windows],
    }
    write(folder / "tags.json", json.dumps(content, indent=1) + "\n")

    cues = []
    for number, s in enumerate([s for s in moments or segments if s.label], 1):
        name = " ".join(s.label.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        cues.append(f"{number}\n{clock(s.start)} --> {clock(s.end)}\n{name}\n")
    write(folder / "chapters.vtt", "WEBVTT\n\n" + "\n".join(cues))


def draw_timeline(path, film, segments, moments):
    """A row for each label, the ten that last longest; above them the cuts and pictures from the film."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError:
        print(f"{path.name} needs matplotlib: pip install matplotlib")
        return
    seconds = collections.Counter()
    for s in segments:
        seconds[s.label] += s.end - s.start
    labels = sorted(label for label, _ in seconds.most_common(10))
    end, height = moments[-1].end, 0.32 * max(1, len(labels))
    figure, (strip, axes) = plt.subplots(
        2, 1, figsize=(12, 1.6 + height), height_ratios=[1.1, height], layout="constrained"
    )
    count = 12
    for i in range(count):
        picture = picture_at(film, (i + 0.5) * end / count)
        if picture is not None:
            strip.imshow(picture, extent=(i, i + 0.97, 0, 0.97 * picture.shape[0] / picture.shape[1]), aspect="equal")
    strip.set(xlim=(0, count), ylim=(0, 0.75))
    strip.axis("off")
    for row, label in enumerate(labels):
        own = [s for s in segments if s.label == label]
        color = plt.get_cmap("tab10")(row % 10)
        colors = [(*color[:3], 0.3 + 0.7 * s.score) for s in own]
        axes.broken_barh([(s.start, s.end - s.start) for s in own], (row - 0.4, 0.8), facecolors=colors)
    cuts = [s.start for s, before in zip(moments[1:], moments, strict=False) if s.shot != before.shot]
    if len(cuts) <= 300:
        axes.vlines(cuts, -0.5, len(labels) - 0.5, color="black", linewidth=0.4, alpha=0.5)
    axes.set(xlim=(0, end), ylim=(max(1, len(labels)) - 0.5, -0.5), yticks=range(len(labels)), yticklabels=labels)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, steps=[1, 3, 6, 10]))
    axes.xaxis.set_major_formatter(lambda value, _: clock(value)[:8].removeprefix("00:"))
    axes.set_title(f"{Path(film).name}: {counted(len(cuts) + 1, 'shot')}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    temporary = path.with_suffix(".part")
    figure.savefig(temporary, dpi=100, format="png")
    plt.close(figure)
    os.replace(temporary, path)


def picture_at(film, seconds):
    """One small frame near a time, or None where a film cannot be searched."""
    try:
        with open_pyav(str(film), str(film)) as (container, stream):
            container.seek(int(seconds / stream.time_base) + (stream.start_time or 0), stream=stream)
            frame = next(decoded_frames(container, stream), None)
    except av.FFmpegError:
        return None
    if frame is None:
        return None
    picture = Image.fromarray(upright(frame))
    picture.thumbnail((160, 120))
    return np.asarray(picture)


def write_overlay(path, film, moments):
    """Copies the film with the label of each moment in its lower left corner; sound comes along."""
    with open_pyav(str(film), str(film)) as (container, stream):
        first = next(decoded_frames(container, stream))
        height, width = burn(upright(first), "").shape[:2]
    temporary = path.with_suffix(".part")
    try:
        with (
            open_pyav(str(film), str(film)) as (source, stream),
            av.open(str(temporary), "w", format="mp4") as target,
            tqdm(total=round(moments[-1].end), unit=" s of film", desc=path.name) as bar,
        ):
            sound = next((s for s in source.streams.audio if s.codec_context.name in ("aac", "mp3", "ac3")), None)
            sound_copy = target.add_stream_from_template(sound) if sound else None
            video = target.add_stream("libx264", rate=frame_rate(stream), options={"crf": "20", "preset": "veryfast"})
            video.height, video.width, video.pix_fmt = height, width, "yuv420p"
            if first.pts is not None:
                video.codec_context.time_base = first.time_base
            count, current = 0, 0
            for packet in read_packets(source, *filter(None, (stream, sound))):
                if packet.stream is sound:
                    if packet.dts is not None:
                        packet.stream = sound_copy
                        target.mux(packet)
                    continue
                try:
                    frames = packet.decode()
                except av.FFmpegError:
                    continue
                for frame in frames:
                    timed = frame.pts is not None and first.pts is not None
                    seconds = (frame.pts - first.pts) * frame.time_base if timed else count / frame_rate(stream)
                    while current + 1 < len(moments) and seconds >= moments[current].end:
                        current += 1
                    label, score = moments[current].label, moments[current].score
                    picture = burn(upright(frame), f"{label}  {score:.0%}" if label else "")
                    burned = av.VideoFrame.from_ndarray(picture, format="rgb24")
                    if timed:
                        burned.pts, burned.time_base = frame.pts, frame.time_base
                    target.mux(video.encode(burned))
                    count += 1
                    bar.update(int(seconds) - bar.n)
            target.mux(video.encode())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def burn(picture, text):
    """Writes text into (H, W, 3); the sides become even, as H.264 needs them."""
    height, width = (side // 2 * 2 for side in picture.shape[:2])
    image = Image.fromarray(picture[:height, :width])
    if not text:
        return np.asarray(image)
    draw = ImageDraw.Draw(image)
    size = max(12, height // 18)
    font = ImageFont.load_default(size)
    left, top = size // 2, height - 2 * size
    box = draw.textbbox((left, top), text, font=font)
    draw.rectangle((box[0] - 4, box[1] - 4, box[2] + 4, box[3] + 4), fill=(0, 0, 0))
    draw.text((left, top), text, font=font, fill=(255, 255, 255))
    return np.asarray(image)


def boundary_errors(rows, segments):
    """
    For each change of label in a table of (start, end, label), the seconds to the nearest change of `segments` to the
    same label; infinity if there is none.
    """
    changes = [(s.start, s.label) for before, s in itertools.pairwise(segments) if s.label != before.label]
    wanted = [(row[0], row[2]) for before, row in itertools.pairwise(rows) if row[2] != before[2]]
    return [
        min((abs(start - s) for s, found in changes if found == label), default=math.inf) for start, label in wanted
    ]


def compare(truth, segments, several=False):
    """
    The share of seconds in which the label is that of a table with start, end, label; each second at its middle. Of
    several labels at a time, only what `report` says.
    """
    with open(truth, newline="", encoding="utf-8") as file:
        rows = [(float(row["start"]), float(row["end"]), row["label"]) for row in csv.DictReader(file)]
    if several:
        print(report([LabelledSegment(*row) for row in rows], segments))
        return

    def labels(rows, seconds):
        rows, found, current = iter(rows), [], (0, 0, None)
        for second in seconds:
            while current is not None and second >= current[1]:
                current = next(rows, None)
            found.append(current and current[2])
        return found

    seconds = np.arange(int(segments[-1].end)) + 0.5
    answers = labels([(s.start, s.end, s.label) for s in segments], seconds)
    right = [a == b for a, b in zip(answers, labels(rows, seconds), strict=True)]
    cuts = {round(row[0], 2) for row in rows[1:]}
    found = {round(s.start, 2) for s, before in zip(segments[1:], segments, strict=False) if s.shot != before.shot}
    print(
        f"{sum(right) / len(right):.1%} of {len(right)} seconds have the right label. {len(cuts & found)} of "
        f"{len(cuts)} cuts were found at the right frame. False cuts: {len(found - cuts)}."
    )
    if errors := boundary_errors(rows, segments):
        print(f"{len(errors)} changes of the label: found {np.median(errors):.2f} s off in the median.")
    print(report([LabelledSegment(*row) for row in rows], segments))


# ---------------------------------------------------------------------------------------------------------------------
# Live
# ---------------------------------------------------------------------------------------------------------------------


class Live:
    """Reads a live source in a thread of its own and keeps its last frames. What was not wanted in time is dropped."""

    BEHIND = 0.5  # seconds that decoding may lag behind the source before it skips to the next key frame

    def __init__(self, source):
        self.container = av.open(*camera(source)) if source.isdigit() else av.open(source, timeout=10)
        self.stream = self.container.streams.video[0]
        self.rate = float(frame_rate(self.stream))
        self.lock, self.received, self.lag, self.ended, self.error = threading.Lock(), 0, 0.0, False, None

    def start(self, length):
        """Begins to read, and keeps the last `length` frames."""
        self.frames = collections.deque(maxlen=length)
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        before = offset = None
        try:
            for frame in self.container.decode(self.stream):
                now, came = time.monotonic(), 1
                if frame.time is not None:
                    # The clock against the source's time stamps: what it is at best is no lag. A lag that stays while
                    # only key frames are decoded is the source's own, which stood still for a while: it is forgiven.
                    delay = now - frame.time
                    if before is not None:
                        forgiven = 0.5 * (now - before[0]) if self.lag > self.BEHIND else 0
                        offset = min(delay, offset + forgiven)
                        came = max(1, round((frame.time - before[1]) * self.rate))
                    else:
                        offset = delay
                    before, self.lag = (now, frame.time), delay - offset
                is_late = self.lag > self.BEHIND
                self.stream.codec_context.skip_frame = "NONKEY" if is_late else "DEFAULT"
                with self.lock:
                    if is_late:
                        self.frames.clear()
                    self.received += came
                    self.frames.append((now, frame))
        except av.FFmpegError as error:
            self.error = error
        self.ended = True


def camera(number):
    if sys.platform == "darwin":
        return number, "r", "avfoundation"
    if sys.platform == "win32":
        return f"video={number}", "r", "dshow"
    return f"/dev/video{number}", "r", "v4l2"


def slide_live(live, tagger, step):
    """Yields, every `step` seconds, the scores of the last window, when its last frame came, and frames dropped."""
    live.start(tagger.length)
    taken, next_time = 0, time.monotonic()
    while not live.ended:
        next_time = max(next_time + step, time.monotonic())
        time.sleep(max(0, next_time - time.monotonic()))
        with live.lock:
            frames, received = list(live.frames), live.received
        if len(frames) < tagger.length or received == taken:
            continue
        missed = max(0, received - taken - tagger.length) if taken else 0
        taken = received
        chosen = np.stack([upright(frames[i][1]) for i in tagger.sample(len(frames))])
        yield tagger.classify([tagger.prepare(chosen)])[0], frames[-1][0], missed


def stream_live(live, tagger, _):
    """The same as soon as the frames of a step are there. After a gap in the source a stream begins anew."""
    live.start(int(LIVE_BUFFER * live.rate))
    shot, taken, missed, before = None, 0, 0, None
    while not live.ended or live.frames:
        with live.lock:
            frames, received = list(live.frames), live.received
            live.frames.clear()
        missed += max(0, received - taken - len(frames))
        taken = received
        steps, came = [], None
        for arrived, frame in frames:
            seconds = arrived if frame.time is None else frame.time
            if before is None or not 0 <= seconds - before <= live.BEHIND:
                shot, steps = StreamShot(tagger, 0), []
            before = seconds
            for _, chosen in shot.sampler.add(seconds, frame):
                made = list(shot.take(SimpleNamespace(picture=upright(chosen))))
                steps, came = steps + made, arrived if made else came
        if steps:
            yield tagger.classify([tubelet for _, tubelet in steps])[-1], came, missed
            missed = 0
        elif not frames:
            time.sleep(0.005)


def tag_live(args, device):
    """Prints a line every `--step` seconds or after each step: time of day, label, score, latency, frames dropped."""
    # First: a camera does not wait; and its kernels are compiled now.
    tagger = make_tagger(args.model, device, 25, windows=args.windows)
    some = np.zeros((tagger.processor.num_frames, 64, 64, 3), np.uint8)
    tagger.classify([tagger.prepare(some)])
    if tagger.streams and device == "cpu":
        tagger.choose_threads()
    try:
        live = Live(args.live)
    except (OSError, IndexError) as error:
        sys.exit(f"{args.live} cannot be opened as a live source: {error}. Give the number of a camera or an address.")
    tagger.set_window(live.rate, args.window, args.step)
    labels_of = stream_live if tagger.streams else slide_live
    latencies, dropped = [], 0
    try:
        for scores, came, missed in labels_of(live, tagger, args.step):
            dropped += missed
            label, score = name_all(scores) if tagger.several else next(iter(scores.items()))
            latencies.append(time.monotonic() - came + live.lag)
            now = time.strftime("%H:%M:%S")
            print(f"{now}  {label:24} {score:6.1%}  latency {latencies[-1] * 1000:4.0f} ms  {missed} frames dropped")
            sys.stdout.flush()
    except KeyboardInterrupt:
        pass
    if live.error is not None and not isinstance(live.error, av.EOFError):
        print(f"The source ended: {live.error}")
    if latencies:
        print(f"{len(latencies)} lines, median latency {np.median(latencies) * 1000:.0f} ms, {dropped} frames dropped")


# ---------------------------------------------------------------------------------------------------------------------


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
