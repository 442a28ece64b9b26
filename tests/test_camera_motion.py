"""The clips of the virtual camera, judged by what can be measured in the written files, and the shipped checkpoint."""

import json
import sys
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Video, load_dataset
from PIL import Image
from transformers import TrainingArguments, pipeline

import clip_generation
import make_camera_motion_clips as clips
import measure_camera_motion
import modeling_videomamba  # noqa: F401  registers VideoMamba in transformers' Auto classes
import video_classification_data as data
from video_classification_arguments import DataArguments, ModelArguments, parse_arguments


ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "made_clips" / "make_camera_motion_clips.py"
CHECKPOINT = ROOT / "model_cards" / "videomamba-tiny-camera-motion"


# What the picture does when the camera does it, worked out by hand: where the left, right, upper and lower parts of
# the picture go, as the signs of (dx, dy), x to the right and y down.
LEFT, RIGHT, UP, DOWN, STILL = (-1, 0), (1, 0), (0, -1), (0, 1), (0, 0)
EXPECTED = {
    #                        left   right  upper  lower
    "static": (STILL, STILL, STILL, STILL),
    "pan left": (RIGHT, RIGHT, RIGHT, RIGHT),  # the scene moves against the camera
    "pan right": (LEFT, LEFT, LEFT, LEFT),
    "tilt up": (DOWN, DOWN, DOWN, DOWN),
    "tilt down": (UP, UP, UP, UP),
    "zoom in": (LEFT, RIGHT, UP, DOWN),  # everything flees from the centre
    "zoom out": (RIGHT, LEFT, DOWN, UP),
    "roll clockwise": (DOWN, UP, LEFT, RIGHT),  # the picture turns counter-clockwise
    "roll counter-clockwise": (UP, DOWN, RIGHT, LEFT),
}


def decode(path):
    """Grey frames of a video file, float (T, H, W), and the container's comment."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="gray").astype(float) for frame in container.decode(video=0)]
        return np.stack(frames), container.metadata.get("comment")


def shift_between(first, second):
    """How far (dx, dy) the picture has moved between two frames: the peak of their phase correlation."""
    window = np.outer(np.hanning(first.shape[0]), np.hanning(first.shape[1]))
    spectra = [np.fft.fft2((frame - frame.mean()) * window) for frame in (first, second)]
    cross = spectra[1] * spectra[0].conj()
    peak = np.fft.ifft2(cross / (np.abs(cross) + 1e-3 * np.abs(cross).max())).real
    dy, dx = np.unravel_index(peak.argmax(), peak.shape)
    height, width = peak.shape
    return (dx + width // 2) % width - width // 2, (dy + height // 2) % height - height // 2


def part_shifts(frames, step=4):
    """How far the left, right, upper and lower parts of the picture move between frames `step` apart: the median."""
    height, width = frames.shape[1:]
    h, w = height // 2, width // 2
    shifts = []
    for top, left in [(h // 2, 0), (h // 2, width - w), (0, w // 2), (height - h, w // 2)]:
        part = frames[:, top : top + h, left : left + w]
        pairs = zip(part[:-step:2], part[step::2], strict=True)
        shifts.append(np.median([shift_between(first, second) for first, second in pairs], axis=0))
    return shifts


def test_the_recipe_swaps_the_labels_that_a_mirror_and_time_swap(monkeypatch):
    """By the hand-worked table: a mirror swaps the halves and turns dx round, reversed time turns all ways round."""
    recipe = ROOT / "examples" / "training" / "recipes" / "camera_motion.args"
    monkeypatch.setattr(sys, "argv", ["script", "--recipe", str(recipe), "--use_cpu"])
    _, arguments, _ = parse_arguments(ModelArguments, DataArguments, TrainingArguments)
    names = list(clips.LABELS)
    mirror = data.parse_swaps(arguments.mirror_swaps, names)
    reversal = data.parse_swaps(arguments.reversal_swaps, names)
    for number, name in enumerate(names):
        left, right, upper, lower = EXPECTED[name]
        mirrored = tuple((-dx, dy) for dx, dy in (right, left, upper, lower))
        assert EXPECTED[names[mirror[number]]] == mirrored
        assert EXPECTED[names[reversal[number]]] == tuple((-dx, -dy) for dx, dy in EXPECTED[name])


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("label", clips.LABELS)
def test_scene_moves_against_the_camera(tmp_path, label, seed):
    clips.write_demo_clip(tmp_path / "clip.mp4", motion=label, seed=seed)
    frames, _ = decode(tmp_path / "clip.mp4")
    assert frames.shape == (48, 240, 320)
    found = part_shifts(frames)
    # How far the parts move the way each motion would move them, in pixels. These ways are at right angles to each
    # other, but for opposites.
    along = {motion: np.sum(np.array(ways) * found) / 4 for motion, ways in EXPECTED.items()}
    if label == "static":
        assert np.abs(found).max() <= 1, found
    else:
        assert along.pop(label) > 1.5, (found, along)
        assert max(along.values()) < 1, (found, along)


def plain(label, **changes):
    """The parameters of a clip without anything that disturbs: no shake, noise, pieces or easing."""
    amount = dict.fromkeys(clips.AXES, 0.0) | changes.pop("amount", {})
    return {
        **clips.draw_parameters(np.random.default_rng(0), label),
        **{"width": 96, "height": 64, "num_frames": 32, "view": 1.0, "softness": 1.0, "shutter": 0.0, "shake": 0.0},
        **{"pieces": 0, "scenery_plays": False, "noise": 0.0, "contrast": 1.0, "colour": 1.0, "brightness": [1, 1]},
        **{"easing": {"depth": 0.0, "cycles": 1.0, "phase": 0.0}, "amount": amount},
        **changes,
    }


def blob_path(frames):
    """Centre (x, y) of the only bright blob in each frame."""
    weight = np.clip(frames.astype(float) - 40, 0, None)
    rows, columns = np.indices(frames.shape[1:])
    total = weight.sum((1, 2))
    return np.stack([(weight * columns).sum((1, 2)) / total, (weight * rows).sum((1, 2)) / total], 1)


def test_amount_of_a_pan_is_a_share_of_the_short_side():
    scenery = torch.full((1, 3, 64, 127), 20, dtype=torch.uint8)  # as wide as what is seen
    scenery[..., 30:34, 60:66] = 255
    parameters = plain("pan right", amount={"x": 0.5})
    frames = np.stack(list(clips.render(scenery, parameters, np.random.default_rng(0))))
    path = blob_path(frames[..., 0])
    # Half the short side (64 pixels) in 32 frames is one pixel a frame; the scene goes to the left.
    np.testing.assert_allclose(path[0], [62.5, 31.5], atol=0.3)
    np.testing.assert_allclose(path[-1], [31.5, 31.5], atol=0.3)
    np.testing.assert_allclose(np.diff(path[:, 0]), -1, atol=0.3)


def test_zoom_and_roll_move_the_picture_as_far_as_they_say():
    """The mean displacement over a square is what `amount` says, for all four axes."""
    grid = (np.arange(200) + 0.5) / 200 - 0.5
    radius = np.hypot(*np.meshgrid(grid, grid)).mean()
    for axis in clips.AXES:
        parameters = plain("static", amount={axis: 0.1}, num_frames=33)
        moved = np.ptp(clips.camera_path(parameters, np.random.default_rng(0)), axis=0)
        x, y, log_zoom, roll = moved
        np.testing.assert_allclose(np.hypot(x, y) + radius * (log_zoom + roll), 0.1, rtol=1e-3)


@pytest.mark.parametrize("label", clips.LABELS)
def test_what_is_drawn_at_random_leaves_the_label_right(label):
    """The motion never stops or turns, and what is off the axis stays far below it."""
    for seed in range(60):
        rng = np.random.default_rng(seed)
        parameters = clips.draw_parameters(rng, label)
        assert parameters["num_frames"] >= clip_generation.WINDOW
        path = clips.camera_path(parameters | {"shake": 0.0}, rng)
        size = np.abs(path[-1] - path[0]) * (1, 1, clips.MEAN_RADIUS, clips.MEAN_RADIUS)
        if label == "static":
            assert size.max() < 0.01
            continue
        axis, sign = clips.MOTIONS[label]
        main = clips.AXES.index(axis)
        assert (np.diff(path[:, main]) * sign > 0).all()
        assert np.delete(size, main).max() <= clips.OFF_AXIS * size[main] * 1.0001
        assert size[main] > 0.05 * 0.9 > 5 * clips.STATIC_DRIFT


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with a still, a still in a sub-folder that a camera held upright, and a short video."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "more").mkdir()
    rng = np.random.default_rng(0)
    first, second = (clip_generation.draw_scenery(rng, 240, 180)[0].permute(1, 2, 0).numpy() for _ in range(2))
    Image.fromarray(first).save(folder / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(second).save(folder / "more" / "b.jpg", exif=exif)
    clips.write_demo_clip(folder / "c.mp4", motion="static")
    return folder


def make(*arguments):
    """Runs the script as a user does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        clip_generation.make_data_set(clips.parse_arguments(), clips.LABELS, clips.make_clip)


@pytest.fixture(scope="module")
def data_set(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    make(pictures, folder, "--clips_per_label", 3, "--num_workers", 1, "--seed", 1)
    return folder


def test_data_set_is_a_videofolder(data_set):
    clips_of = load_dataset("videofolder", data_dir=str(data_set), split="train").cast_column(
        "video", Video(decode=False)
    )
    names = clips_of.features["label"].names
    assert sorted(names) == sorted(clips.LABELS)
    assert len(clips_of) == 27
    for clip in clips_of:
        frames, comment = decode(clip["video"]["path"])
        parameters = json.loads(comment)
        assert parameters["label"] == names[clip["label"]]
        assert frames.shape == (parameters["num_frames"], parameters["height"], parameters["width"])
        assert frames.std() > 4  # a picture, and none of it black for want of scenery
    assert not list(data_set.rglob("*.part"))


def test_every_label_gets_the_same_scenery(data_set):
    scenery = [
        [json.loads(decode(path)[1])["scenery"] for path in sorted((data_set / "train" / label).iterdir())]
        for label in clips.LABELS
    ]
    assert all(used == scenery[0] for used in scenery)
    assert len(set(scenery[0])) == 3


def test_same_seed_same_clips_and_resume_makes_only_what_is_missing(data_set, pictures, tmp_path):
    jobs = clip_generation.plan_jobs(
        clip_generation.find_scenery(pictures), tmp_path, "train", clips.LABELS, 3, 0.0, seed=1
    )
    for job in jobs[::13]:
        job[0].parent.mkdir(parents=True)
        clips.make_clip(job)
        assert job[0].read_bytes() == (data_set / job[0].relative_to(tmp_path)).read_bytes()
    kept, removed = jobs[0][0], jobs[13][0]
    kept.write_bytes(b"made before")
    removed.unlink()
    removed.with_suffix(".1.part").write_bytes(b"half a clip")
    arguments = (pictures, tmp_path, "--clips_per_label", 2, "--num_workers", 1, "--seed", 1)
    with pytest.raises(SystemExit, match="is not empty. Add --resume"):
        make(*arguments)
    make(*arguments, "--resume")
    assert kept.read_bytes() == b"made before"
    assert not list(tmp_path.rglob("*.part"))
    assert removed.read_bytes() == (data_set / removed.relative_to(tmp_path)).read_bytes()
    assert sum(1 for _ in tmp_path.rglob("*.mp4")) == 18 + 1  # the third of the jobs above has another number


@pytest.mark.slow
def test_several_processes_make_the_same_clips(data_set, pictures, tmp_path):
    make(pictures, tmp_path, "--clips_per_label", 3, "--num_workers", 2, "--seed", 1)
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.mp4")}
    assert made == {path.relative_to(data_set): path.read_bytes() for path in data_set.rglob("*.mp4")}


def test_other_seed_other_clips(pictures, tmp_path):
    scenery = clip_generation.find_scenery(pictures)
    written = []
    for seed in (0, 1):
        path, *job = clip_generation.plan_jobs(scenery, tmp_path, "train", clips.LABELS, 1, 0.0, seed)[0]
        clips.make_clip((tmp_path / f"{seed}.mp4", *job))
        written.append((tmp_path / f"{seed}.mp4").read_bytes())
    assert written[0] != written[1]


def test_bad_scenery_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        clip_generation.find_scenery(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(FileNotFoundError, match="No image or video found"):
        clip_generation.find_scenery(tmp_path)
    for name, content in (("torn.jpg", b"\xff\xd8\xff\xe0 torn"), ("text.mp4", b"not a video"), ("empty.png", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            clip_generation.read_scenery(tmp_path / name, 0)
    with pytest.raises(SystemExit, match="empty.png cannot be read .*\n.*--resume"):
        (tmp_path / "torn.jpg").unlink()
        (tmp_path / "text.mp4").unlink()
        make(tmp_path, tmp_path / "out", "--clips_per_label", 1, "--num_workers", 1)
    with pytest.raises(ValueError, match="spin.*pan right"):
        clips.write_demo_clip(tmp_path / "demo.mp4", motion="spin")
    assert not (tmp_path / "demo.mp4").exists()


def test_shipped_checkpoint_knows_all_nine_motions(tmp_path):
    """Freshly made clips over pictures that no training clip showed, from the file to the label."""
    classify = pipeline("video-classification", model=str(CHECKPOINT), device="cpu")
    right = 0
    for label in clips.LABELS:
        for seed in (100, 101):
            clips.write_demo_clip(tmp_path / "clip.mp4", motion=label, seed=seed)
            right += classify(str(tmp_path / "clip.mp4"), top_k=1)[0]["label"] == label
    assert right == 18


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({"picture_rate": 10}, [(0, 0), (1, 100), (2, 200)]),
        ({"picture_rate": 10, "file_rate": 30}, [(i // 3, round(1000 * i / 30)) for i in range(9)]),
        # Pictures are taken after 0, 0.1 and 0.2 s, frames shown after 0, 0.04, 0.08, 0.12 ... s
        ({"picture_rate": 10, "file_rate": 25}, list(zip([0, 0, 0, 1, 1, 2, 2, 2], range(0, 320, 40), strict=True))),
    ],
)
def test_pictures_are_shown_until_the_next_by_hand(rates, expected):
    assert list(clip_generation.frames_of_file(range(3), {"frame_rate": 24, **rates})) == expected


def test_table_of_rates_by_hand():
    rows = [
        ("own rate", 5, "static", "static"),
        ("own rate", 5, "pan left", "static"),
        ("in 25", 5, "tilt up", "tilt up"),
    ]
    results = pd.DataFrame(rows, columns=["column", "pictures a second", "label", "prediction"])
    for column in ("in 30", "in 60", "uneven times"):
        results.loc[len(results)] = (column, 8, "static", "static")
    assert measure_camera_motion.tabulate(results).splitlines()[2:4] == [
        "| 5 | 50.0 | 100.0 |  |  |  |",
        "| 8 |  |  | 100.0 | 100.0 | 100.0 |",
    ]
    assert "5 ways to store a clip: mean 90.0 %, worst 50.0 %" in measure_camera_motion.tabulate(results)


def test_table_of_odd_clips_by_hand():
    rows = [("a cut", "pan left|static", "static", 0.95), ("a cut", "pan left|static", "tilt up", 0.45)]
    results = pd.DataFrame(rows, columns=["kind", "right", "prediction", "score"])
    assert measure_camera_motion.tabulate_odd(results).splitlines()[2:] == ["| a cut | 50.0% | 0.70 | 50% |"]


def test_another_motion_from_the_middle_on():
    rng = np.random.default_rng(0)
    parameters = clips.draw_parameters(rng, "pan left") | {"shake": 0.0, "frame_rate": 24, "num_frames": 48}
    zero = dict.fromkeys(clips.AXES, 0.0)
    turned = parameters | {"amount": zero | {"x": -0.3}, "then": zero | {"y": 0.2}}
    x, y, zoom, roll = clips.camera_path(turned, rng).T
    assert (np.diff(x[:24]) < 0).all() and np.allclose(np.diff(x[25:]), 0)
    assert np.allclose(np.diff(y[:24]), 0) and (np.diff(y[25:]) > 0).all()
    assert not zoom.any() and not roll.any()
