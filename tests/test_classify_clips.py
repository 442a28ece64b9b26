"""examples/tools/classify_clips.py and explore_features.py: every clip once, to the same result after a kill."""

import csv
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForVideoClassification, AutoVideoProcessor

from modeling_videomamba import VideoMambaConfig, VideoMambaForVideoClassification, VideoMambaVideoProcessor
from video_files import STORED, STORED_SAMPLES, stored_picture, truncate, write_moving_bars


pytest.importorskip("sklearn", reason="needs scikit-learn: pip install scikit-learn")
import classify_clips  # noqa: E402
import explore_features  # noqa: E402
from tool_models import CAMERA_MOTION  # noqa: E402


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Ten clips of two labels and two files that are none, in a folder."""
    root = write_moving_bars(tmp_path_factory.mktemp("data"), {"clips": 5}) / "clips"
    (root / "to the left" / "notes.mp4").write_text("not a clip")
    truncate(root / "to the left" / "0.mp4", root / "to the right" / "cut.mp4", 0.4)
    return root


def run(monkeypatch, module, *arguments):
    monkeypatch.setattr("sys.argv", [f"{module.__name__}.py", *map(str, arguments)])
    module.main()


def classify(monkeypatch, source, output, *options):
    options = ("--num_workers", "0", "--batch_size", "3", "--part_size", "5", *options)
    run(monkeypatch, classify_clips, source, "--output", output, *options)


def read(output):
    files = sorted(map(str, Path(output).glob("part-*.parquet")))
    return datasets.load_dataset("parquet", data_files=files, split="train").with_format("numpy")


@pytest.fixture(scope="module")
def features(clips, tmp_path_factory):
    output = tmp_path_factory.mktemp("features") / "out"
    with pytest.MonkeyPatch.context() as patch:
        classify(patch, clips, output, "--columns", "scores", "pooled", "tokens")
    return output


def test_columns_are_those_of_the_model(clips, features):
    table = read(features)
    expected = sorted(str(path) for path in clips.glob("*/[0-4].mp4"))
    assert table["clip"][:].tolist() == expected
    assert table["label"][:].tolist() == ["to the left"] * 5 + ["to the right"] * 5
    model = AutoModelForVideoClassification.from_pretrained(str(CAMERA_MOTION))
    inputs = AutoVideoProcessor.from_pretrained(str(CAMERA_MOTION))(expected, return_tensors="pt")
    with torch.no_grad():
        scores = model(**inputs).logits.softmax(-1).numpy()
        base = model.base_model(**inputs)
    np.testing.assert_allclose(table["scores"][:], scores, atol=1e-5)
    np.testing.assert_allclose(table["pooled"][:], base.pooler_output, atol=1e-4)
    np.testing.assert_allclose(table["tokens"][:], base.last_hidden_state, atol=2e-3, rtol=2e-3)
    labels = [model.config.id2label[i] for i in scores.argmax(1)]
    assert table["prediction"][:].tolist() == labels
    with open(features / "unreadable.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["clip"]).name for row in rows] == ["notes.mp4", "cut.mp4"]
    assert "begins with the text 'not a clip'" in rows[0]["reason"]


def test_after_a_kill_the_same_command_does_what_is_missing(clips, features, tmp_path, monkeypatch):
    output = tmp_path / "again"
    shutil.copytree(features, output)
    (output / "part-00001.parquet").unlink()
    (output / "part-00001.1234.tmp").write_bytes(b"half a file")
    untouched = (output / "part-00000.parquet").stat().st_mtime_ns
    options = ("--columns", "scores", "pooled", "tokens", "--num_workers", "1")
    classify(monkeypatch, clips, output, *options)
    assert (output / "part-00000.parquet").stat().st_mtime_ns == untouched
    for part in range(3):
        name = f"part-{part:05d}.parquet"
        assert (output / name).read_bytes() == (features / name).read_bytes()
    with pytest.raises(SystemExit, match="was begun with another columns"):
        classify(monkeypatch, clips, output)
    # As with a default that has changed: what is printed says what to give.
    with pytest.raises(SystemExit, match=r"another batch_size \(3, now 4\)\. Give the one that it was begun with"):
        classify(monkeypatch, clips, output, *options, "--batch_size", "4")


def test_one_clip_stored_in_many_ways_gets_the_same_scores(stored, tmp_path, monkeypatch):
    sizes = {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 1, "num_frames": 8, "image_size": 64}
    torch.manual_seed(0)
    model = VideoMambaForVideoClassification(VideoMambaConfig(**sizes, num_labels=5)).eval()
    for name, parameter in model.named_parameters():
        if "position_embeddings" in name or "classifier" in name:
            torch.nn.init.normal_(parameter, std=0.5)  # so that each frame shows in the scores
    crop = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    processor = VideoMambaVideoProcessor(num_frames=8, sampling_fps=5, **crop)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "checkpoint")
    classify(monkeypatch, stored, tmp_path / "out", "--model", str(tmp_path / "checkpoint"))
    table = read(tmp_path / "out")
    assert [Path(clip).name for clip in table["clip"][:]] == sorted(STORED)

    def scores(numbers):
        clip = processor([stored_picture(number) for number in numbers], return_tensors="pt")
        with torch.no_grad():
            return model(**clip).logits.softmax(-1)[0].numpy()

    expected, others = scores(STORED_SAMPLES), scores(np.add(STORED_SAMPLES, 1))
    assert np.abs(table["scores"][:] - expected).max() < 0.5 * np.abs(others - expected).max()


def test_clips_that_have_come_since_are_done_in_new_parts(clips, features, tmp_path, monkeypatch):
    source, output = tmp_path / "clips", tmp_path / "out"
    shutil.copytree(clips, source)
    late = [source / "to the left" / "0.mp4", source / "to the right" / "4.mp4"]  # one is first of all, one last
    for file in late:
        file.rename(tmp_path / file.name)
    classify(monkeypatch, source, output)
    before = {path.name: path.read_bytes() for path in output.glob("*.parquet")}
    for file in late:
        (tmp_path / file.name).rename(file)
    classify(monkeypatch, source, output)
    assert {name: (output / name).read_bytes() for name in before} == before
    assert read(output)["clip"][-2:].tolist() == [str(file) for file in late]
    # Those of the whole folder in one run, but for the order.
    found, expected = read(output), read(features)
    places = np.argsort(found["clip"][:])
    names = [str(Path(name).relative_to(source)) for name in found["clip"][:][places]]
    assert names == [str(Path(name).relative_to(clips)) for name in expected["clip"][:]]
    np.testing.assert_allclose(found["scores"][:][places], expected["scores"][:], atol=1e-5)
    late[0].unlink()
    with pytest.raises(SystemExit, match=r"was begun with .*0\.mp4, no longer in the source"):
        classify(monkeypatch, source, output)


def test_processes_share_the_parts(clips, tmp_path, monkeypatch, features):
    """As under `accelerate launch`, one process after the other."""

    class State(classify_clips.PartialState):
        def __init__(self, index):
            self.index = index

        device = torch.device("cpu")
        num_processes = 2
        process_index = property(lambda self: self.index)
        is_main_process = property(lambda self: self.index == 0)

    monkeypatch.setattr(classify_clips, "gather_object", lambda values: values)
    output = tmp_path / "shared"
    for index, parts in ((0, [0, 2]), (1, [0, 1, 2])):
        monkeypatch.setattr(classify_clips, "PartialState", lambda index=index, **options: State(index))
        classify(monkeypatch, clips, output, "--columns", "scores")
        assert [path.name for path in sorted(output.glob("*.parquet"))] == [f"part-{i:05d}.parquet" for i in parts]
    assert read(output)["clip"][:].tolist() == read(features)["clip"][:].tolist()


def test_lists_and_data_sets(clips, tmp_path, monkeypatch, capsys):
    file = clips / "to the left" / "0.mp4"
    (tmp_path / "clips.txt").write_text(f"{file}\n\n{tmp_path / 'none.mp4'}\n")
    (tmp_path / "clips.csv").write_text(f"path,label\n{file},left\n")
    classify(monkeypatch, tmp_path / "clips.txt", tmp_path / "a")
    assert ": 1 clip; 1 could not be read" in capsys.readouterr().out
    assert classify_clips.list_clips(file, "train") == ([classify_clips.Clip(str(file), None)], None)
    classify(monkeypatch, tmp_path / "clips.csv", tmp_path / "b")
    data = datasets.Dataset.from_dict(
        {"clip": [{"bytes": file.read_bytes(), "path": "x.mp4"}], "label": [1]},
        features=datasets.Features(
            {"clip": datasets.Video(decode=False), "label": datasets.ClassLabel(names=["right", "left"])}
        ),
    )
    (tmp_path / "data").mkdir()
    data.to_parquet(str(tmp_path / "data" / "train.parquet"))
    classify(monkeypatch, tmp_path / "data", tmp_path / "c")
    a, b, c = (read(tmp_path / name) for name in "abc")
    assert c["clip"][0] == "0:x.mp4" and c["label"][0] == b["label"][0] == "left"
    np.testing.assert_array_equal(a["scores"][:], c["scores"][:])
    np.testing.assert_array_equal(a["scores"][:], b["scores"][:])
    with pytest.raises(SystemExit, match="no folder of videos, no list"):
        classify(monkeypatch, tmp_path / "nothing", tmp_path / "d")


def test_nearest_clips(clips, features, tmp_path, monkeypatch, capsys):
    query = clips / "to the right" / "1.mp4"
    run(
        monkeypatch,
        explore_features,
        "nearest",
        features,
        "--query",
        query,
        "--count",
        4,
        "--output",
        tmp_path / "a.png",
    )
    inside = capsys.readouterr().out
    assert len(inside.splitlines()) == 5 and str(query) not in inside
    assert Image.open(tmp_path / "a.png").width == 840
    # A copy under another name is not in the table: the model finds its features, and the original comes first.
    shutil.copy(query, tmp_path / "copy.mp4")
    options = ("--query", tmp_path / "copy.mp4", "--count", 5, "--output", tmp_path / "b.png")
    run(monkeypatch, explore_features, "nearest", features, *options)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1.000") and lines[0].endswith(str(query))
    assert [line.split("  ")[2] for line in lines[1:5]] == [line.split("  ")[2] for line in inside.splitlines()[:4]]


def test_linear_probe(features, tmp_path, monkeypatch, capsys):
    run(monkeypatch, explore_features, "probe", features)
    probe, baseline = capsys.readouterr().out.splitlines()
    # Moving bars are easy. Wilson's intervals by hand: with z² = 3.8415, 10 of 10 give 10 / (10 + z²) = 72.2 %, and
    # 5 of 10 give 50 % ± z / 2 / sqrt(10 + z²) = 26.3 %.
    by_hand = {8: "80.0% (49.0% to 94.3%)", 9: "90.0% (59.6% to 98.2%)", 10: "100.0% (72.2% to 100.0%)"}
    starts = tuple(f"linear probe: {interval} of 10 clips, 2 labels, 5 folds" for interval in by_hand.values())
    assert probe.startswith(starts)
    assert baseline.startswith("most frequent label: 50.0% (23.7% to 76.3%) of 10 clips")
    with pytest.raises(SystemExit, match="has no part-"):
        run(monkeypatch, explore_features, "probe", tmp_path)
