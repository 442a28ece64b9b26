"""The benchmark script: what it makes of its rows, and the table that it puts in VideoMAE's place."""

import sys

import pytest
import torch
from transformers.models.videomae import modeling_videomae

import benchmark
from benchmark import MODELS


def row(model, frames, clips_per_s, batch=2):
    return benchmark.table_row("inference", model, "bfloat16", "eager", frames, batch, [batch / clips_per_s], 1.0)


def test_crossing_points_lie_where_the_curves_meet():
    """10 and 40 clips/s against 20 and 20: the ratio goes from 1/2 at 16 frames to 2 at 64, so it is 1 at 32."""
    rows = [row("VideoMamba-S", 16, 10), row("VideoMamba-S", 64, 40), row("Swin3D-T", 16, 5)]
    rows += [row("VideoMAE-S", 16, 20), row("VideoMAE-S", 64, 20)]
    rows.append(row("VideoMAE-S", 16, 1e-3, batch=1))  # a latency, no point of the curve
    assert benchmark.crossing_points(rows) == [("inference", "bfloat16", "eager", 32)]


@pytest.mark.parametrize(("ours", "expected"), [((10, 10), None), ((30, 30), 16)])
def test_crossing_points_outside_of_what_was_timed(ours, expected):
    rows = [row("VideoMamba-S", 16, ours[0]), row("VideoMamba-S", 64, ours[1])]
    rows += [row("VideoMAE-S", 16, 20), row("VideoMAE-S", 64, 20)]
    assert benchmark.crossing_points(rows) == [("inference", "bfloat16", "eager", expected)]


def test_the_table_of_videomae_holds_its_numbers():
    original = modeling_videomae.get_sinusoid_encoding_table(50, 24)
    torch.testing.assert_close(benchmark.sinusoidal_positions(50, 24), original)


def test_the_plot_shows_each_panel(tmp_path):
    rows = [row("VideoMamba-S", frames, 100 / frames) for frames in (8, 16)]
    rows += [row("VideoMAE-S", frames, 200 / frames**2) for frames in (8, 16)]
    benchmark.plot(rows, tmp_path / "benchmark.png", "random numbers")
    assert (tmp_path / "benchmark.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("name", "frames", "millions", "gmacs"),
    [
        ("VideoMAE-S", 16, 22, 57),  # table 6 of its paper
        ("Swin3D-T", 32, 28.2, 88),  # table 1 of its paper
        ("V-JEPA 2 ViT-L", 16, 303 + 50, None),  # a ViT-L, and a pooler of three layers and one of cross-attention
        ("VideoPrism-B", 16, 114 + 10, None),  # its paper's backbone, and a pooling head
    ],
)
def test_parameters_and_multiply_accumulates_are_those_of_the_papers(name, frames, millions, gmacs):
    parameters, macs = benchmark.size_of(name, frames)
    assert parameters / 1e6 == pytest.approx(millions, rel=0.01)
    assert gmacs is None or macs / 1e9 == pytest.approx(gmacs, rel=0.01)


@pytest.mark.parametrize(
    ("words", "timed"),
    [
        ([], [*MODELS]),
        (["--merge-layers", "8"], [*MODELS, "VideoMamba-S merged"]),
        (["--models", "VideoMamba-S", "--merge-layers", "8", "16"], ["VideoMamba-S", "VideoMamba-S merged"]),
    ],
)
def test_models_that_are_timed(words, timed, monkeypatch):
    monkeypatch.setattr(benchmark, "MODELS", dict(benchmark.MODELS))
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--frames", "16", "--device", "cpu", "--no-training", *words])
    arguments = benchmark.parse_arguments()
    benchmark.choose_models(arguments)
    assert arguments.models == timed
    cases = list(benchmark.cases(arguments))
    assert {name for _, name, *_ in cases} - {*benchmark.OLDER_GPUS} == set(timed)
    assert any(name in benchmark.OLDER_GPUS for _, name, *_ in cases) == ("--models" not in words)
    if words:
        assert benchmark.size_of("VideoMamba-S merged", 16)[1] < 0.8 * benchmark.size_of("VideoMamba-S", 16)[1]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_takes_the_clips_of_the_benchmark(name):
    with torch.device("meta"), torch.no_grad():
        model, forward = benchmark.MODELS[name](16)
        clips = torch.empty(2, 16, 3, benchmark.SIZE, benchmark.SIZE)
        if name == "VideoMamba-S":
            pytest.skip("nothing scans on the device meta; test_modeling.py runs the model")
        assert forward(clips).shape == (2, benchmark.LABELS)
