"""Deletion and insertion curves and the effective receptive field, on models whose answer is worked out by hand."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import judge_maps
import make_camera_motion_clips
import receptive_field
from modeling_videomamba import VideoMambaConfig, VideoMambaForVideoClassification


CHECKPOINT = Path(__file__).resolve().parent.parent / "model_cards" / "videomamba-tiny-camera-motion"
CONFIG = VideoMambaConfig(num_frames=4, image_size=32, patch_size=16, hidden_size=16, num_hidden_layers=1)  # 2 × 2 × 2


class OneTubelet(torch.nn.Module):
    """Tells label 1 by the light of one tubelet: the last frames, top right; its logit is the mean over the pixels."""

    config = CONFIG

    def forward(self, pixel_values):
        light = pixel_values[:, 2:, :, :16, 16:].mean((1, 2, 3, 4))
        return SimpleNamespace(logits=torch.stack([torch.zeros_like(light), 20 * light], dim=-1))


def test_curves_of_a_model_that_reads_one_tubelet():
    clip = torch.zeros(4, 3, 32, 32)
    clip[2:, :, :16, 16:] = 1.0  # number 5 of 8; the mean of the clip is 1 / 8
    first = torch.tensor([5, 0, 1, 2, 3, 4, 6, 7])
    deletion, insertion = judge_maps.curves(OneTubelet(), clip, first, 1)
    low, high = 1 / (1 + np.exp(-20 / 8)), 1 / (1 + np.exp(-20))
    # 20 steps of 8 tokens: the first token goes with step 1 (0.4 of a token counts as one).
    np.testing.assert_allclose(deletion, [high] + [low] * 20, atol=1e-5)
    np.testing.assert_allclose(insertion, [low] + [high] * 20, atol=1e-5)
    deletion, insertion = judge_maps.curves(OneTubelet(), clip, first.flip(0), 1)
    np.testing.assert_allclose(deletion, [high] * 18 + [low] * 3, atol=1e-5)  # 17.5 steps are seven tokens
    np.testing.assert_allclose(insertion, [low] * 18 + [high] * 3, atol=1e-5)


def test_areas_and_intervals():
    assert judge_maps.area(np.ones(21)) == pytest.approx(1)
    assert judge_maps.area(np.linspace(0, 1, 21)) == pytest.approx(0.5)
    mean, low, high = judge_maps.interval(np.arange(100) % 2 * 1.0)
    assert mean == 0.5 and 0.37 < low < 0.43 and 0.57 < high < 0.63  # ± 1.96 · 0.05


def test_sums_over_tubelets():
    pixels = torch.zeros(5, 33, 40)
    pixels[3, 17, 31] = 2.0
    pixels[4, 32, 39] = 7.0  # fills no tubelet
    sums = judge_maps.sum_over_tubelets(pixels, CONFIG)
    assert sums.shape == (2, 2, 2) and sums[1, 1, 1] == 2 and sums.sum() == 2
    np.testing.assert_array_equal(
        judge_maps.pixels_of_tokens(sums, CONFIG)[:, 0, ::16, ::16], sums.repeat_interleave(2, 0)
    )


def test_receptive_field_of_a_model_that_sees_one_tubelet():
    class Own(torch.nn.Module):
        """The state of each tubelet is its own light: the centre of 2 × 2 × 2 is number 7."""

        config = VideoMambaConfig(
            num_frames=4, image_size=32, hidden_size=1, num_hidden_layers=1, class_token_position="none"
        )

        @property
        def base_model(self):
            return self

        def forward(self, pixels):
            light = judge_maps.sum_over_tubelets(pixels[0].sum(1), CONFIG).flatten()
            return SimpleNamespace(last_hidden_state=light[None, :, None] ** 2)

    field = receptive_field.receptive_field(Own(), torch.rand(2, 4, 3, 32, 32))
    assert field.sum() == pytest.approx(1) and field[1, 1, 1] == pytest.approx(1)


@pytest.mark.parametrize("place", ["none", "first", "middle"])
def test_receptive_field_of_a_random_videomamba(place):
    """The residual stream goes straight through: the central tubelet itself moves its state most."""
    torch.manual_seed(0)
    config = VideoMambaConfig(
        num_frames=4, image_size=32, hidden_size=16, num_hidden_layers=2, class_token_position=place
    )
    field = receptive_field.receptive_field(VideoMambaForVideoClassification(config), torch.rand(1, 4, 3, 32, 32))
    assert field.shape == (2, 2, 2) and field.sum() == pytest.approx(1)
    assert field.argmax() == 7 and (field > 0).all()  # both scans together see all tubelets


def test_from_clips_to_tables_and_pictures(tmp_path, monkeypatch, capsys):
    clips = tmp_path / "clips" / "pan left"
    clips.mkdir(parents=True)
    for seed, name in enumerate("ac"):
        make_camera_motion_clips.write_demo_clip(clips / f"{name}.mp4", motion="pan left", seed=seed)
    (clips / "b.mp4").write_text("no film")
    monkeypatch.setattr(judge_maps, "STEPS", 2)
    monkeypatch.setattr(judge_maps, "RANDOM_ORDERS", 1)
    words = ["--model_name_or_path", CHECKPOINT, "--clips", tmp_path / "clips", "--output_dir", tmp_path / "judged"]
    monkeypatch.setattr(sys, "argv", ["judge_maps.py", *map(str, words)])
    judge_maps.main()
    assert "Skipped" in (said := capsys.readouterr()).err and "b.mp4 cannot be read" in said.err
    table = (tmp_path / "judged" / "maps.md").read_text()
    assert "videomamba-tiny-camera-motion, 2 clips" in table
    assert [line.split(" | ")[0] for line in table.splitlines()[4:]] == [
        "| Δ, first layer",
        "| Δ, last layer",
        "| Δ, mean of layers",
        "| reading map",
        "| gradient",
        "| random order",
    ]
    assert (tmp_path / "judged" / "maps.png").read_bytes()[:4] == b"\x89PNG"

    (clips / "c.mp4").unlink()
    with pytest.raises(SystemExit, match="Two clips"):
        judge_maps.main()

    (clips / "b.mp4").unlink()
    words = ["--models", CHECKPOINT, "--clips", tmp_path / "clips", "--output", tmp_path / "erf.png"]
    monkeypatch.setattr(sys, "argv", ["receptive_field.py", *map(str, words)])
    receptive_field.main()
    assert "spatiotemporal, trained: own frame" in capsys.readouterr().out
    assert (tmp_path / "erf.png").read_bytes()[:4] == b"\x89PNG"

    with pytest.raises(SystemExit, match="No video found below"):
        (tmp_path / "empty").mkdir()
        judge_maps.find_clips(tmp_path / "empty", 3)
