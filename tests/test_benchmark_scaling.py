"""examples/benchmarks/benchmark_scaling.py: training and files on one and two processes of a CPU, a tiny model."""

import csv
from pathlib import Path

import pytest

import benchmark_scaling


def test_speeds_are_those_that_the_scripts_log():
    bar = "\r 10%|#| 6/60 [00:01<00:09, loss 0.7, {} clips/s, 3% waiting for clips]"
    shown = [bar.format(speed) for speed in ("5.0", "50.0", "50.0", "200.0", "200.0", "100.5", "300.0")]
    assert benchmark_scaling.speeds_of("".join(shown)) == 200
    logged = [f"{{'loss': '0.7', 'clips_per_second': {speed}, 'waiting': 0.1}}\n" for speed in ("'5'", "'50'", "80.5")]
    assert benchmark_scaling.speeds_of("".join(logged)) == 80.5
    assert benchmark_scaling.speeds_of("".join(logged[:2])) is None


def test_gpus_are_the_first_of_those_allowed():
    found = [benchmark_scaling.first_devices(2, {"CUDA_VISIBLE_DEVICES": text}) for text in ("4,6,7", "3", "")]
    assert found == ["4,6", "3", ""] and benchmark_scaling.first_devices(2, {}) == "0,1"


TRAINING = [("training", name, "1") for name in ("plain loop", "Trainer")]
TRAINING += [("training", f"{name}, DDP", "2") for name in ("plain loop", "Trainer")]
CLIP = [(f"{task} of one clip", "16 frames", count) for task in ("inference", "training") for count in "12"]
FILES = [("files", "classify_clips.py", count) for count in "12"]


@pytest.mark.slow
@pytest.mark.parametrize(("parts", "expected"), [("training", TRAINING), ("context files", CLIP + FILES)])
def test_rows_of_one_and_two_processes(bars, tmp_path, python, parts, expected):
    options = "--tiny --processes 1 2 --num_workers 1 --batch_size 2 --max_steps 5 --files 6 --sharding DDP"
    script = Path(benchmark_scaling.__file__)
    options = [*options.split(), "--parts", *parts.split()]
    python.run([script, bars, "--output", tmp_path, *options], path=[script.parents[2]])
    with open(tmp_path / "scaling.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["task"], row["how"], row["processes"]) for row in rows] == expected
    for row in rows:
        alone = next(r for r in rows if r["task"] == row["task"] and row["how"].startswith(r["how"]))
        ratio = float(row["clips_per_s"]) / float(alone["clips_per_s"]) / int(row["processes"])
        assert float(row["efficiency"]) == pytest.approx(ratio, rel=0.01) and ratio > 0
    assert all(bool(row["decode_per_s"]) == (row["task"] == "files") for row in rows)
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
