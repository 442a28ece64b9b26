"""The clips of moving things: hand-worked trajectories, what the written pictures show, and the data set's layout."""

import json
import math
import sys

import av
import numpy as np
import pytest
import torch
from datasets import Video, load_dataset
from PIL import Image

import clip_generation
import make_object_motion_clips as clips


PLAIN = {"width": 128, "height": 96, "num_frames": 32, "distractors": [], "shake": 0.0, "shutter": 0.0} | {
    "softness": 1.0,
    "brightness": [1.0, 1.0],
    "contrast": 1.0,
    "colour": 1.0,
    "noise": 0.0,
}
# A thing that is tracked by its colour: X is green, Y is red, the scenery black.
PICTURES = [torch.full((3, 60, 80), 0, dtype=torch.uint8) for _ in range(5)]
PICTURES[1][1], PICTURES[2][0] = 255, 255


def plain(label, seed=0, **action):
    """The parameters of a clip without anything that disturbs: no shake, noise, blur or distractor."""
    parameters = clips.draw_parameters(np.random.default_rng(seed), label) | PLAIN
    level = {"angle": 0.0, "bend": 0.0, "begin": 0.0, "end": 1.0, "x": 0.0, "y": 0.0, "tilt": 0.0, "slant": 0.0}
    parameters["action"] |= level | action
    return parameters


def film(parameters, seed=0):
    return np.stack(list(clips.render(PICTURES, parameters, np.random.default_rng(seed))))


def track(frames, channel):
    """Middle (x, y) and area of what has a colour, in each frame; no middle where there is nothing."""
    weight = frames[..., channel].astype(float) / 255
    rows, columns = np.indices(frames.shape[1:3])
    area = weight.sum((1, 2))
    with np.errstate(invalid="ignore"):
        return (weight * columns).sum((1, 2)) / area, (weight * rows).sum((1, 2)) / area, area


# Signs of how X's (x, y), the logarithm of its size and its turn change, worked out by hand: y grows downwards, and
# what turns clockwise as the viewer sees it turns from x to y.
EXPECTED = {
    "X moves left": (-1, 0, 0, 0),
    "X moves right": (1, 0, 0, 0),
    "X moves up": (0, -1, 0, 0),
    "X moves down": (0, 1, 0, 0),
    "X comes nearer": (0, 0, 1, 0),
    "X goes away": (0, 0, -1, 0),
    "X turns clockwise": (0, 0, 0, 1),
    "X turns counter-clockwise": (0, 0, 0, -1),
    "X is dropped": (0, 1, 0, 0),
    "X is thrown up": (0, -1, 0, 0),
}


@pytest.mark.parametrize("label", EXPECTED)
def test_trajectories_of_one_thing(label):
    for seed in range(20):
        action = plain(label, seed)["action"] | {"bend": 0.3}
        things = clips.trajectories(label, action, np.linspace(0, 1, 33))
        assert list(things) == ["X"]
        change = np.diff(things["X"], axis=1)
        wanted = np.array(EXPECTED[label])
        assert (np.sign(change.sum(1)) == wanted).all()
        assert (change * wanted[:, None] >= -1e-9).all()  # it never turns back
        assert np.abs(change[wanted == 0]).max() < 1e-9


def test_what_is_dropped_accelerates_and_what_is_thrown_up_slows_down():
    time = np.linspace(0, 1, 101)
    y = clips.trajectories("X is dropped", plain("X is dropped")["action"], time)["X"][1]
    speed = np.diff(y)
    falling = (time[:-1] > 0.16) & (time[1:] < 0.8)
    assert (speed[time[1:] < 0.15] == 0).all() and (speed[time[:-1] > 0.8] == 0).all()
    np.testing.assert_allclose(np.diff(speed[falling]), np.diff(speed[falling])[0], rtol=1e-6)  # as gravity does
    assert np.diff(speed[falling])[0] > 0
    y = clips.trajectories("X is thrown up", plain("X is thrown up")["action"], time)["X"][1]
    np.testing.assert_allclose(np.diff(y), -speed[::-1], atol=1e-12)


def line(label, seed=0, **action):
    """Places of X and Y on a level line at 101 times."""
    things = clips.trajectories(label, plain(label, seed, **action)["action"], np.linspace(0, 1, 101))
    return things["X"][0], things["Y"][0]


def test_trajectories_of_two_things():
    x, y = line("X and Y meet", touching=0.3)
    assert (np.diff(x) > 0).all() and (np.diff(y) < 0).all()
    np.testing.assert_allclose([x[-1], y[-1]], [-0.15, 0.15])

    x, y = line("X hits Y and Y moves", touching=0.3, touch=0.5)
    assert (np.diff(x[:51]) > 0).all() and (np.diff(y[:51]) == 0).all()
    assert (np.diff(x[50:]) == 0).all() and (np.diff(y[50:]) > 0).all()
    assert y[50] - x[50] == pytest.approx(0.3)  # they touch

    x, y = line("X stops before Y", touching=0.3, touch=0.5, gap=0.1)
    assert (np.diff(x[:51]) > 0).all() and (np.diff(x[50:]) == 0).all() and (np.diff(y) == 0).all()
    assert y[-1] - x[-1] == pytest.approx(0.4)

    x, y = line("X hides behind Y", touching=0.3)
    assert y[0] - x[0] > 0.3 and x[-1] == pytest.approx(y[-1]) and (np.diff(y) == 0).all()


def test_a_hit_played_backwards_is_a_hit_in_which_x_and_y_have_traded_places():
    time = np.linspace(0, 1, 50)
    action = plain("X hits Y and Y moves", touching=0.3, touch=0.42, tilt=0.2, angle=0.3, begin=0.1, end=0.9)["action"]
    traded = action | {"angle": 0.3 + math.pi, "touch": 1 - 0.42, "tilt": -0.2}
    forth = clips.trajectories("X hits Y and Y moves", action, time)
    back = clips.trajectories("X hits Y and Y moves", traded, 1 - time)
    np.testing.assert_allclose(forth["X"], back["Y"], atol=1e-12)
    np.testing.assert_allclose(forth["Y"], back["X"], atol=1e-12)


@pytest.mark.parametrize("label", clips.REVERSED)
def test_reversed_time_turns_a_pair_into_each_other(label):
    """In the rendered frames themselves, without noise; any shape, size and speed."""
    parameters = clips.draw_parameters(np.random.default_rng(3), label) | PLAIN
    forth = film(parameters)
    back = film(parameters | {"label": clips.REVERSED[label]})
    assert np.abs(forth.astype(int) - back[::-1]).max() <= 1
    assert np.abs(forth.astype(int) - back).max() > 100  # time is what tells them apart


def test_a_mirror_swaps_left_and_right_and_the_turns():
    time = np.linspace(0, 1, 20)
    mirror = np.array([-1, 1, 1, -1])[:, None]  # x, y, zoom, turn
    for label, other in (("X moves left", "X moves right"), ("X turns clockwise", "X turns counter-clockwise")):
        action = plain(label, x=0.1, y=0.05, tilt=0.3)["action"]
        forth = clips.trajectories(label, action, time)["X"]
        mirrored = clips.trajectories(other, action | {"x": -0.1, "tilt": -0.3}, time)["X"]
        np.testing.assert_allclose(forth * mirror, mirrored, atol=1e-12)


def test_rendered_things_go_where_they_should():
    short = 96
    x, y, _ = track(film(plain("X moves left", distance=0.5)), 1)
    np.testing.assert_allclose(np.diff(x), -0.5 * short / 32, atol=0.05)  # half the short side in 32 frames
    np.testing.assert_allclose(y, short / 2 - 0.5, atol=0.6)
    np.testing.assert_allclose((x[0] + x[-1]) / 2, 128 / 2 - 0.5, atol=0.6)

    *_, area = track(film(plain("X comes nearer", zoom=0.8)), 1)
    assert (np.diff(area) > 0).all()
    assert np.log(area[-1] / area[0]) == pytest.approx(2 * 0.8 * 31 / 32, abs=0.06)

    frames = film(plain("X hits Y and Y moves", touch=0.5))
    (x, *_), (y, *_) = track(frames, 1), track(frames, 0)
    assert np.ptp(x[16:]) < 0.5 and np.ptp(y[:16]) < 0.5  # a pixel where one covers the other's rim
    assert (np.diff(x[:15]) > 0.3).all() and (np.diff(y[17:]) > 0.3).all()
    both = (frames[16, ..., 0] > 200).any(0) | (frames[16, ..., 1] > 200).any(0)
    assert np.ptp(np.flatnonzero(both)) + 1 - both.sum() <= 3  # no gap between them, but for soft edges


def test_what_hides_is_gone_at_the_end_and_what_appears_was_not_there():
    for seed in range(4):
        parameters = clips.draw_parameters(np.random.default_rng(seed), "X hides behind Y") | PLAIN
        *_, area = track(film(parameters, seed), 1)
        assert area[-1] < 1 < 30 < area[0]
        *_, area = track(film(parameters | {"label": "X appears from behind Y"}, seed), 1)
        assert area[0] < 1 < 30 < area[-1]


def test_clockwise_is_clockwise_for_the_viewer():
    picture = torch.zeros(3, 60, 60, dtype=torch.uint8)
    picture[1, :, 36:] = 255  # the right part of the thing is green
    pictures = [PICTURES[0], picture, *PICTURES[2:]]
    parameters = plain("X turns clockwise", turn=1.5, tilt=0.75)  # from 0 to 1.5 radians
    frames = np.stack(list(clips.render(pictures, parameters, np.random.default_rng(0))))
    x, y, _ = track(frames, 1)
    assert x[0] > 64 and abs(y[0] - 48) < 3  # on the right
    assert y[-1] > 51 and abs(x[-1] - 64) < 3  # now below
    parameters["label"] = "X turns counter-clockwise"
    frames = np.stack(list(clips.render(pictures, parameters, np.random.default_rng(0))))
    assert track(frames, 1)[1][0] > 51


def test_a_thing_before_a_plain_ground_is_cut_along_its_outline():
    picture = torch.full((3, 100, 120), 250, dtype=torch.uint8)
    picture[:, 30:80, 20:90] = 40
    picture[:, 30:50, 20:60] = 250  # an L
    thing = clips.cut_object(picture, np.random.default_rng(0))
    inside = thing[3] > 0.5
    height, width = inside.shape
    assert not inside[height // 5, width // 4] and inside[height // 5, 4 * width // 5] and inside[4 * height // 5, 10]
    shown = thing[:3, inside] / thing[3, inside]
    assert (shown < 60).float().mean() > 0.9  # a thin rim of the ground at most
    # How far it reaches: half its longer side along x, and after a quarter turn along y.
    assert clips.reach(thing, 1.0, 0.0, 0.0) == pytest.approx(0.5, abs=0.05)
    assert clips.reach(thing, 1.0, math.pi / 2, math.pi / 2) == pytest.approx(0.5, abs=0.05)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(40):
        pixels = clip_generation.draw_scenery(rng, 96, 72)[0].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"picture_{number}.png")
    return folder


def make(*arguments):
    """Runs the script as a user does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_object_motion_clips.py", *map(str, arguments)])
        clip_generation.make_data_set(clips.parse_arguments(), clips.LABELS, clips.make_clip, clips.PICTURES_PER_CLIP)


def shown(folder):
    """What stands in the comment of each clip below a folder."""
    found = {}
    for path in sorted(folder.rglob("*.mp4")):
        with av.open(str(path)) as container:
            found[path] = json.loads(container.metadata["comment"])
    return found


def test_data_set_is_a_videofolder_whose_splits_share_no_picture(pictures, tmp_path):
    for split in ("train", "validation"):
        make(pictures, tmp_path, "--split", split, "--clips_per_label", 1, "--num_workers", 1)
    data = load_dataset("videofolder", data_dir=str(tmp_path)).cast_column("video", Video(decode=False))
    assert sorted(data["train"].features["label"].names) == sorted(clips.LABELS)
    assert len(data["train"]) == len(data["validation"]) == 16
    used = {}
    for split in ("train", "validation"):
        found = shown(tmp_path / split)
        assert all(path.parent.name == parameters["label"] for path, parameters in found.items())
        # The pictures of a label's clips are those of any other's: they give nothing away.
        assert len({tuple(parameters["pictures"]) for parameters in found.values()}) == 1
        used[split] = {name for parameters in found.values() for name in parameters["pictures"]}
    assert len(used["train"]) == len(used["validation"]) == 5
    assert not used["train"] & used["validation"]

    first = sorted(tmp_path.rglob("*.mp4"))[0]
    before = first.read_bytes()
    first.unlink()
    make(pictures, tmp_path, "--clips_per_label", 1, "--num_workers", 1, "--resume")
    assert first.read_bytes() == before  # the same seed, the same clip


def test_held_out_pictures_go_by_their_names(pictures, tmp_path):
    paths = clip_generation.find_scenery(pictures)
    parts = [clip_generation.hold_out(paths, split, 0.2) for split in ("train", "validation", "test")]
    assert parts[1] == parts[2] and sorted(parts[0] + parts[1]) == paths
    assert clip_generation.hold_out(paths, "train", 0) == paths
    with pytest.raises(FileNotFoundError, match="is for validation.*--held_out 0"):
        clip_generation.hold_out(parts[0], "validation", 0.2)
