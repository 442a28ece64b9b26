"""`classify_clips.py --dense`: each feature is of the frames that a toolbox takes it to be of."""

import csv
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForVideoClassification, AutoVideoProcessor

import classify_clips
import dense_features
from modeling_videomamba.video_decoding import decode_video
from tool_models import CAMERA_MOTION
from video_files import write_video


def run(monkeypatch, source, output, *options):
    command = ["classify_clips.py", source, "--output", output, "--dense", 16, *options]
    monkeypatch.setattr("sys.argv", [str(word) for word in command])
    classify_clips.main()


@pytest.fixture
def films(tmp_path):
    """A film of 120 frames, one that is shorter than a window, and a file that is none."""
    folder = tmp_path / "films"
    (folder / "more").mkdir(parents=True)
    write_video(folder / "long.mp4", 120, rate=24)
    write_video(folder / "more" / "short.mkv", 30, rate=24)
    (folder / "broken.mp4").write_text("no film")
    return folder


def test_each_feature_is_of_its_window(films, tmp_path, monkeypatch, capsys):
    """The shipped model sees 16 frames at 6 a second: 64 of 24 a second. Windows begin at
    frames 0, 16, 32 and 48; the last eight frames are in none."""
    out = tmp_path / "out"
    run(monkeypatch, films, out, "--batch_size", 3)
    about = json.loads((out / "features.json").read_text())
    assert about["feature_stride"] == 16 and set(about["database"]) == {"long", "short"}
    long = about["database"]["long"]
    assert (long["frames"], long["feature_length"], long["window_size"], long["offset_frames"]) == (120, 4, 64, 32)
    assert [long[name] for name in ("fps", "duration", "window_seconds")] == pytest.approx([24, 120 / 24, 64 / 24])
    model = AutoModelForVideoClassification.from_pretrained(CAMERA_MOTION).eval()
    processor = AutoVideoProcessor.from_pretrained(CAMERA_MOTION)

    def feature(frames):
        """Of frames at the middles of sixteen equal parts."""
        places = [int((number + 0.5) * len(frames) / 16) for number in range(16)]
        with torch.no_grad():
            return model.base_model(**processor(list(frames[places]), return_tensors="pt")).pooler_output[0]

    frames, _ = decode_video(str(films / "long.mp4"))
    found = np.load(out / "long.npy")
    assert found.dtype == np.float32 and found.shape == (4, about["feature_dim"])
    for number, row in enumerate(found):
        np.testing.assert_allclose(row, feature(frames[16 * number : 16 * number + 64]), atol=2e-4)
    frames, _ = decode_video(str(films / "more" / "short.mkv"))
    np.testing.assert_allclose(np.load(out / "short.npy"), feature(frames)[None], atol=2e-4)
    with open(out / "unreadable.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["clip"].endswith("broken.mp4") and "2 films; 1 could not be read" in capsys.readouterr().out

    # After an interruption only what is missing is done; of other settings, nothing.
    (out / "short.npy").unlink()
    before = (out / "long.npy").stat().st_mtime_ns
    run(monkeypatch, films, out)
    assert (out / "long.npy").stat().st_mtime_ns == before and (out / "short.npy").exists()
    with pytest.raises(SystemExit, match="begun with another feature_stride"):
        run(monkeypatch, films, out, "--dense", 8)


def test_names_must_differ(films, tmp_path, monkeypatch):
    write_video(films / "more" / "long.mkv", 4)
    with pytest.raises(SystemExit, match="several files called long"):
        run(monkeypatch, films, tmp_path / "out")


@pytest.mark.parametrize("name", ["settings", "features"])
def test_names_of_the_tables_are_refused(films, tmp_path, monkeypatch, name):
    """Of such a film the description would take the place of the folder's: the next run would stop at it."""
    write_video(films / f"{name}.mp4", 4)
    with pytest.raises(SystemExit, match=f"a file called {name}, .* {name}.json"):
        run(monkeypatch, films, tmp_path / "out")


def test_a_film_without_frames_is_named(monkeypatch):
    monkeypatch.setattr(dense_features, "read_frames", lambda *_: iter(()))
    tagger = dense_features.FeatureTagger(str(CAMERA_MOTION), "cpu", 25)
    with pytest.raises(ValueError, match="a.mp4: no frame can be decoded"):
        dense_features.slide("a.mp4", tagger, 2)


def test_frames_that_cannot_be_decoded_move_no_feature(films, monkeypatch):
    """In their places the one before them is seen: else all later features would be of another time."""
    tagger = dense_features.FeatureTagger(str(CAMERA_MOTION), "cpu", 24)
    tagger.step = 16
    whole, count = dense_features.slide(films / "long.mp4", tagger, 8)
    read = dense_features.read_frames
    gap = range(3, 15)  # in the first window
    monkeypatch.setattr(dense_features, "read_frames", lambda *a: (f for f in read(*a) if f.index not in gap))
    found, same_count = dense_features.slide(films / "long.mp4", tagger, 8)
    assert same_count == count == 120 and found.shape == whole.shape
    np.testing.assert_array_equal(found[1:], whole[1:])
    assert np.abs(found[0] - whole[0]).max() > 1e-3


def test_after_ctrl_c_it_says_how_to_go_on(films, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(dense_features, "write_features", interrupt)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, films, tmp_path / "out")
    assert stop.value.code == 130 and "Run the same command to do the rest" in capsys.readouterr().out
