"""The benchmark script: what it makes of its rows, and the table that it puts in VideoMAE's place."""

import pytest
import torch
from transformers.models.videomae import modeling_videomae

import benchmark


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
