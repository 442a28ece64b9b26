"""The frames of a film, one after the other, from any of them on; and where its shots begin, and its parts.

PySceneDetect finds the cuts. The film is never held in memory.
"""

import collections
import itertools
import sys
from typing import NamedTuple

import numpy as np

from modeling_videomamba.video_decoding import decoded_frames, open_pyav


# The film is worked through in parts, each of which ends at the first cut after PART seconds, at the latest after
# LONGEST_PART. A part knows nothing of the one before it, so going on after an interruption changes nothing.
PART, LONGEST_PART = 30, 120
CUT_WIDTH = 256  # pixels; cuts are looked for in a picture of this width


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


def adaptive_detector():
    try:
        from scenedetect.detectors import AdaptiveDetector
    except ModuleNotFoundError:
        sys.exit("Finding cuts needs PySceneDetect: pip install scenedetect")
    return AdaptiveDetector()


def find_cuts(frames, rate, make_detector=adaptive_detector):
    """Yields (frame, whether a shot begins with it, whether a part does), a few frames after they came in."""
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


def _feed(detector, frame, rate):
    if isinstance(detector, NoCuts):
        return []
    from scenedetect import FrameTimecode

    cuts = detector.process_frame(FrameTimecode(frame.index, float(rate)), frame.small)
    return [cut.frame_num for cut in cuts]
