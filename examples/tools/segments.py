"""Segments of a film: joined from the labels of its windows, and how good they are against the truth."""

import csv
import itertools
import math
from collections import Counter
from typing import NamedTuple

import numpy as np

from tool_models import THRESHOLD


TIOU = [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]  # over which ActivityNet takes the mean


class Window(NamedTuple):
    shot: int
    start: float  # seconds
    end: float
    scores: dict[str, float]  # of the TOP_K labels, the best first


class Segment(NamedTuple):
    start: float  # seconds
    end: float
    label: str
    score: float = 1.0  # mean over its windows
    shot: int = 0


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
                segments.append(Segment(start, end, label, score, window.shot))
                scores.append([])
            scores[place].append(score)
            segments[place] = segments[place]._replace(end=end, score=sum(scores[place]) / len(scores[place]))
            last[window.shot, label] = place
        start = end
    return segments


def to_moments(windows):
    """Segments that name all labels that hold, which do not overlap: for what shows one thing at a time."""
    return to_segments([window._replace(scores=dict([name_all(window.scores)])) for window in windows])


def iou(a, b):
    """What two segments share, of what either covers, 0 to 1."""
    shared = max(0.0, min(a.end, b.end) - max(a.start, b.start))
    whole = (a.end - a.start) + (b.end - b.start) - shared
    return shared / whole if whole > 0 else 0.0


def average_precision(truth, found, threshold):
    """
    Of one label, over all films, as ActivityNet's evaluation takes it: the area under the precision, made monotonous.
    By falling score, a found segment is right if the true one that it shares the most with, of those that none has
    taken yet, reaches `threshold`.

    Args:
        truth, found: `{film: sequence of Segment}`.
        threshold (`float`): least tIoU of a right segment.
    """
    taken = {film: [False] * len(segments) for film, segments in truth.items()}
    total = sum(map(len, truth.values()))
    ranked = sorted(
        ((film, segment) for film, segments in found.items() for segment in segments), key=lambda x: -x[1].score
    )
    right, precision = 0, []
    for count, (film, segment) in enumerate(ranked, 1):
        by_overlap = sorted(((iou(t, segment), -i) for i, t in enumerate(truth.get(film, ()))), reverse=True)
        for overlap, place in by_overlap:
            if overlap < threshold:
                break
            if not taken[film][-place]:
                taken[film][-place] = True
                right += 1
                precision.append((right, right / count))
                break
    best, area = 0.0, 0.0
    for _, value in reversed(precision):  # at a recall, the best precision of this recall or more
        best = max(best, value)
        area += best / total
    return area


def mean_average_precision(truth, found, threshold):
    """The mean of `average_precision` over the labels of the truth; of films as there."""
    labels = {segment.label for segments in truth.values() for segment in segments}

    def only(label, films):
        return {film: [s for s in segments if s.label == label] for film, segments in films.items()}

    precisions = [average_precision(only(label, truth), only(label, found), threshold) for label in labels]
    return sum(precisions) / len(precisions) if precisions else math.nan


def f1_at(truth, found, threshold):
    """
    F1@k of Lea et al. (2017), over films as above: a found segment is right if the true one of its label that it
    shares the most with reaches `threshold` and none before it has taken that one.
    """
    counts = Counter()
    for film, segments in found.items():
        true, taken = truth.get(film, ()), set()
        for segment in segments:
            overlaps = [iou(segment, t) if t.label == segment.label else 0.0 for t in true]
            place = max(range(len(true)), key=overlaps.__getitem__, default=None)
            if place is not None and overlaps[place] >= threshold and place not in taken:
                taken.add(place)
                counts["right"] += 1
        counts["found"] += len(segments)
    wanted = sum(map(len, truth.values()))
    return 2 * counts["right"] / (counts["found"] + wanted) if counts["found"] + wanted else math.nan


def edit_score(truth, found):
    """
    1 less the edit distance (Levenshtein) between the labels of two sequences of `Segment`, as a share of the longer:
    whether the order is right, wherever the borders lie.
    """
    a, b = [segment.label for segment in truth], [segment.label for segment in found]
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return 1 - row[-1] / max(len(a), len(b), 1)


def report(truth, found):
    """A line about the segments of one film."""
    films = {"film": truth}, {"film": found}
    f1 = "/".join(f"{f1_at(*films, percent / 100):.3f}" for percent in (10, 25, 50))
    at_half = mean_average_precision(*films, 0.5)
    mean = sum(mean_average_precision(*films, threshold) for threshold in TIOU) / len(TIOU)
    return f"F1@10/25/50 {f1}, edit {edit_score(truth, found):.3f}, mAP {at_half:.3f} at tIoU 0.5, mean {mean:.3f}"


def boundary_errors(truth, found):
    """
    For each change of label in the truth, the seconds to the nearest change of `found` to the same label; infinity if
    there is none.
    """

    def changes(segments):
        return [(s.start, s.label) for before, s in itertools.pairwise(segments) if s.label != before.label]

    places = changes(found)
    return [
        min((abs(start - s) for s, other in places if other == label), default=math.inf)
        for start, label in changes(truth)
    ]


def compare(table, segments, several=False):
    """
    Prints the share of seconds in which the label is that of a CSV file with start, end, label, each second at its
    middle, and what `report` says. Of several labels at a time, that alone.
    """
    with open(table, newline="", encoding="utf-8") as file:
        truth = [Segment(float(row["start"]), float(row["end"]), row["label"]) for row in csv.DictReader(file)]
    if several:
        print(report(truth, segments))
        return

    def labels(segments, seconds):
        following, found, current = iter(segments), [], Segment(0, 0, None)
        for second in seconds:
            while current is not None and second >= current.end:
                current = next(following, None)
            found.append(current and current.label)
        return found

    seconds = np.arange(int(segments[-1].end)) + 0.5
    right = [a == b for a, b in zip(labels(segments, seconds), labels(truth, seconds), strict=True)]
    cuts = {round(segment.start, 2) for segment in truth[1:]}
    found = {round(s.start, 2) for before, s in itertools.pairwise(segments) if s.shot != before.shot}
    print(
        f"{sum(right) / len(right):.1%} of {len(right)} seconds have the right label. {len(cuts & found)} of "
        f"{len(cuts)} cuts were found at the right frame. False cuts: {len(found - cuts)}."
    )
    if errors := boundary_errors(truth, segments):
        print(f"{len(errors)} changes of the label: found {np.median(errors):.2f} s off in the median.")
    print(report(truth, segments))
