"""examples/benchmarks/benchmark_parallel.py: two processes on a CPU, a tiny model."""

import csv
import math
from pathlib import Path

import pytest

import benchmark_parallel


@pytest.mark.slow
def test_rows_of_two_processes(python, tmp_path):
    options = "--device cpu --hidden_size 32 --num_hidden_layers 2 --image_size 32 --frames 16 24 --repeats 2"
    python.run_together(2, [benchmark_parallel.__file__, *options.split(), "--output", tmp_path], tmp_path)
    with open(tmp_path / "parallel.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    measured = [(task, "bfloat16", str(n), p) for task in ("inference", "training") for n in (16, 24) for p in "12"]
    found = [tuple(r[c] for c in ("task", "precision", "frames", "processes")) for r in rows]
    assert found == [("agreement", "float32", "16", "2"), *measured]
    assert 0 <= float(rows[0]["logits_error"]) < 1e-5 and 0 < float(rows[0]["gradient_error"]) < 1e-5
    for alone, two in zip(rows[1::2], rows[2::2], strict=True):
        assert 0 < float(two["min_ms"]) <= float(two["median_ms"]) <= float(two["max_ms"])
        assert math.isclose(float(two["speedup"]), float(alone["median_ms"]) / float(two["median_ms"]), rel_tol=0.01)
    assert Path(tmp_path, "parallel.png").stat().st_size > 10_000
