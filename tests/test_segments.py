"""Segments for Label Studio, and their metrics against cases worked out by hand from the published definitions."""

import json

import pytest

import segments
import tag_outputs
from segments import Segment


def at(*rows):
    return [Segment(*row) for row in rows]


def test_a_task_has_frames_from_one_and_all_that_a_region_needs():
    found = at((0.0, 2.0, "walk", 0.75), (2.0, 2.01, "run", 0.25))
    task = tag_outputs.label_studio_task("film.mp4", "you/model", found, rate=25.0)
    assert json.loads(json.dumps(task)) == task and task["data"] == {"video": "film.mp4"}
    (prediction,) = task["predictions"]
    assert (prediction["model_version"], prediction["score"]) == ("you/model", 0.5)
    first, second = prediction["result"]
    assert first["value"] == {"ranges": [{"start": 1, "end": 50}], "timelinelabels": ["walk"]}
    assert second["value"]["ranges"] == [{"start": 51, "end": 51}]  # not empty, and beside the one before
    assert (first["type"], first["from_name"], first["to_name"]) == ("timelinelabels", "label", "video")
    assert first["id"] != second["id"] and first["score"] == 0.75


def test_overlap():
    a, b = at((0, 4, "x"), (2, 8, "x"))
    assert segments.iou(a, b) == pytest.approx(2 / 8)
    assert segments.iou(a, a) == 1 and segments.iou(a, Segment(4, 5, "x")) == 0


def test_average_precision():
    # Two true segments. Found by falling score: right, wrong, right. Precision 1/1 at recall 1/2, 2/3 at recall 1.
    truth = {"film": at((0, 10, "x"), (20, 30, "x"))}
    found = {"film": at((20, 30, "x", 0.5), (0, 10, "x", 0.9), (12, 18, "x", 0.7))}
    assert segments.average_precision(truth, found, 0.5) == pytest.approx((1 + 2 / 3) / 2)
    # A second answer to the same segment is wrong, and in another film there is nothing to find.
    found = {"film": at((0, 10, "x", 0.9), (0, 9, "x", 0.8)), "other": at((0, 10, "x", 0.95))}
    assert segments.average_precision(truth, found, 0.5) == pytest.approx(1 / 2 / 2)
    # Precision is made monotonous: wrong, right, right has 2/3 at both recalls.
    found = {"film": at((50, 60, "x", 0.9), (0, 10, "x", 0.8), (20, 30, "x", 0.7))}
    assert segments.average_precision(truth, found, 0.5) == pytest.approx(2 / 3)
    # (0, 8) shares 0.8 of (0, 10).
    found = {"film": at((0, 8, "x"))}
    assert segments.average_precision(truth, found, 0.8) == pytest.approx(1 / 2)
    assert segments.average_precision(truth, found, 0.85) == 0


def test_the_best_true_segment_that_is_taken_gives_way_to_the_next():
    truth = {"film": at((0, 10, "x"), (4, 14, "x"))}
    found = {"film": at((0, 10, "x", 0.9), (1, 11, "x", 0.8))}  # the second: 9/11 of the first, 7/13 of the other
    assert segments.average_precision(truth, found, 0.5) == pytest.approx(1)
    assert segments.average_precision(truth, found, 0.6) == pytest.approx(1 / 2)


def test_mean_average_precision_is_over_labels_that_are_there():
    truth = {"film": at((0, 10, "x"), (10, 20, "y"))}
    found = {"film": at((0, 10, "x"), (10, 20, "z"))}
    assert segments.mean_average_precision(truth, found, 0.5) == pytest.approx(1 / 2)


def test_f1():
    # Of four found, two right: (0, 5) has 5/10 of x, and (9, 20) 10/11 of y; the second x is too much, z is nowhere.
    truth = {"film": at((0, 10, "x"), (10, 20, "y"), (20, 30, "x"))}
    found = {"film": at((0, 5, "x"), (5, 9, "x"), (9, 20, "y"), (20, 30, "z"))}
    assert segments.f1_at(truth, found, 0.5) == pytest.approx(2 * 2 / (4 + 3))
    assert segments.f1_at(truth, found, 0.51) == pytest.approx(2 * 1 / (4 + 3))
    assert segments.f1_at({**truth, "other": at((0, 1, "x"))}, found, 0.5) == pytest.approx(2 * 2 / (4 + 4))


@pytest.mark.parametrize(
    ("truth", "found", "expected"),
    [
        ("abc", "abc", 1),
        ("abc", "ac", 2 / 3),  # one is missing
        ("abc", "abbc", 3 / 4),  # one too much
        ("abc", "axc", 2 / 3),
        ("ab", "ba", 0),
        ("", "ab", 0),
        ("kitten", "sitting", 1 - 3 / 7),
    ],
)
def test_edit(truth, found, expected):
    one, other = (at(*((i, i + 1, label) for i, label in enumerate(labels))) for labels in (truth, found))
    assert segments.edit_score(one, other) == pytest.approx(expected)


def test_the_report_of_perfect_segments():
    truth = at((0, 10, "x"), (10, 20, "y"))
    assert segments.report(truth, truth) == (
        "F1@10/25/50 1.000/1.000/1.000, edit 1.000, mAP 1.000 at tIoU 0.5, mean 1.000"
    )
