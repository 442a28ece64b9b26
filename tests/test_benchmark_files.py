"""examples/benchmarks/benchmark_files.py: each road over the same files, and scores that are the processor's."""

import csv

import pytest
import torch
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

import benchmark_files
from modeling_videomamba import VideoMambaConfig, VideoMambaForVideoClassification


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_frames": 16, "image_size": 224, "num_labels": 3}


@pytest.mark.slow
def test_roads(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    videomamba = VideoMambaForVideoClassification(VideoMambaConfig(**SMALL, scan_backend="torch"))
    config = VideoMAEConfig(**SMALL, num_attention_heads=2, intermediate_size=16)
    monkeypatch.setattr(benchmark_files, "videomamba", lambda frames: (videomamba, None))
    monkeypatch.setattr(benchmark_files, "videomae", lambda frames: (VideoMAEForVideoClassification(config), None))
    options = "--made 96x64 --compare --num_workers 1 --batch_size 2 --seconds 0.1 --dtype float32 --device cpu"
    monkeypatch.setattr("sys.argv", ["script", *options.split(), "--output", str(tmp_path / "files.csv")])
    benchmark_files.main()
    with open(tmp_path / "files.csv", newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert row["frame"] == "96x64" and row["copy"] == ""
    for road in (
        "decode",
        "model",
        "workers resize",
        "device resizes",
        "pipeline, VideoMamba-S",
        "pipeline, VideoMAE-S",
    ):
        assert float(row[road]) > 0, road
    for kind in ("workers", "device"):
        difference, labels = row[f"scores, {kind}"].split(maxsplit=1)
        assert float(difference) < 1e-5 and labels == "(4 of 4 labels)"
    assert row.get("plain loop, decord") or "plain loop, decord: ModuleNotFoundError" in capsys.readouterr().out
