"""Pictures and videos of Delta maps and reading maps: each value at its place, the scale drawn, bad input named."""

import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

import draw_maps
import make_camera_motion_clips


CHECKPOINT = Path(__file__).resolve().parent.parent / "model_cards" / "videomamba-tiny-camera-motion"


def test_each_value_is_drawn_at_its_tubelet():
    maps = np.zeros((2, 2, 4))
    maps[1, 0, 3] = 1.0  # the second half of the frames, top right
    drawn = draw_maps.overlay(np.zeros((4, 20, 40, 3), np.uint8), maps)
    different = (drawn != drawn[0, 0, 0]).any(-1)
    expected = np.zeros((4, 20, 40), bool)
    expected[2:, :10, 30:] = True
    np.testing.assert_array_equal(different, expected)


def test_scales():
    colours, scale = draw_maps.scale_of(np.linspace(0, 1, 101))
    assert (scale.vmin, scale.vmax) == pytest.approx((0.01, 0.99))
    signed, scale = draw_maps.scale_of(np.linspace(-3, 1, 101))
    assert scale.vmin == -scale.vmax and signed != colours  # white is zero
    _, scale = draw_maps.scale_of(np.ones(8))  # a constant map has a range too
    assert scale.vmin < scale.vmax


def run(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["draw_maps.py", *map(str, arguments)])
        draw_maps.main()


def test_from_a_file_to_pictures(tmp_path, capsys):
    clip, folder = tmp_path / "clip.mp4", tmp_path / "maps"
    make_camera_motion_clips.write_demo_clip(clip, motion="pan left", seed=100)
    run(clip, "--model_name_or_path", CHECKPOINT, "--layers", 0, -1, "--output_dir", folder)
    assert "pan left" in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {"maps.png", "delta.mp4", "reading.mp4"}
    with Image.open(folder / "maps.png") as picture:
        assert picture.width > 300 and picture.height > 800  # eight rows, four columns
    for name in ("delta", "reading"):
        with av.open(str(folder / f"{name}.mp4")) as container:
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert frames.shape == (16, 224, 2 * 224 + 64, 3)
        seen, drawn = frames[:, :, :224], frames[:, :, 224:448]
        assert seen.std() > 20 and np.abs(seen.astype(int) - drawn).mean() > 20
        assert frames[:, :, 448:].std() > 20  # the scale

    with pytest.raises(SystemExit, match="layers 0 to 7"):
        run(clip, "--model_name_or_path", CHECKPOINT, "--layers", 8, "--output_dir", folder)
    with pytest.raises(SystemExit, match="'spin' is not one of.*pan right"):
        run(clip, "--model_name_or_path", CHECKPOINT, "--label", "spin", "--output_dir", folder)
    with pytest.raises(SystemExit, match="no file .*gone.mp4"):
        run(tmp_path / "gone.mp4", "--model_name_or_path", CHECKPOINT, "--output_dir", folder)
