"""Segments (start and end in seconds, label, score) of films: for Label Studio, and how good they are.

`tag_video.py` writes the first, and prints the second if it is told the truth.
"""

import math
from collections import Counter
from typing import NamedTuple


class Segment(NamedTuple):
    start: float  # seconds
    end: float
    label: str
    score: float = 1.0


TIOU = [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]  # over which ActivityNet takes the mean


def label_studio_task(film, model, segments, rate):
    """
    A task with the segments as predictions, as Label Studio imports it for `<Video name="video" value="$video"/>` and
    `<TimelineLabels name="label" toName="video">`.

    Args:
        film (`str`), model (`str`): the video's address, and who made the predictions.
        segments (sequence of `Segment`).
        rate (`float`): frames a second, by which Label Studio counts, from 1.

    Returns:
        `dict`, an entry of the list that a file for import holds.
    """
    result = []
    for number, segment in enumerate(segments, 1):
        first = round(segment.start * rate) + 1
        frames = {"start": first, "end": max(first, round(segment.end * rate))}
        region = {"id": f"segment-{number}", "from_name": "label", "to_name": "video", "type": "timelinelabels"}
        region["value"] = {"ranges": [frames], "timelinelabels": [segment.label]}
        result.append({**region, "score": round(segment.score, 4)})
    mean = sum(segment.score for segment in segments) / len(segments) if segments else 0.0
    return {
        "data": {"video": str(film)},
        "predictions": [{"model_version": str(model), "score": round(mean, 4), "result": result}],
    }


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
