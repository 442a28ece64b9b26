"""The Trainer example, end to end on a dozen tiny clips."""

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForVideoClassification,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    VideoMAEImageProcessor,
    VideoMAEVideoProcessor,
    pipeline,
)

import run_video_classification as example
from training_clips import NAMES


def run(bars, output, *arguments):
    """Runs the example as a user does, on the CPU, with a very small model unless told otherwise."""
    command = [
        "--train_dir",
        bars / "train",
        "--validation_dir",
        bars / "validation",
        "--output_dir",
        output,
    ]
    command += ["--use_cpu", "--report_to", "none", "--disable_tqdm", "True", "--per_device_train_batch_size", 4]
    command += ["--logging_steps", 1, "--jitter", 0, "--seed", 0]
    if "--model_name_or_path" not in arguments:
        command += ["--hidden_size", 16, "--num_hidden_layers", 2, "--image_size", 32]
        command += ["--num_frames", 4, "--frame_stride", 2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [example.__file__, *map(str, command), *map(str, arguments)])
        example.main()


@pytest.fixture(scope="module")
def trained(bars, tmp_path_factory):
    """Forty steps from scratch, with a checkpoint at the twentieth."""
    output = tmp_path_factory.mktemp("trained")
    run(
        *(
            bars,
            output,
            "--do_train",
            "--do_eval",
            "--max_steps",
            40,
            "--save_steps",
            20,
            "--learning_rate",
            1e-2,
        ),
        *("--min_crop_area", 1, "--mirror_swaps", "to the left:to the right", "--dataloader_num_workers", 1),
        *("--reversal_swaps", "to the left:to the right", "--frame_cache", output / "frames"),
    )
    return output


def test_learns_which_way_the_bar_goes(trained):
    losses = [entry["loss"] for entry in json.loads((trained / "trainer_state.json").read_text())["log_history"][:-1]]
    assert abs(losses[0] - np.log(2)) < 0.4
    assert np.mean(losses[-5:]) < 0.3
    results = json.loads((trained / "all_results.json").read_text())
    for view in ("", "mirrored_", "reversed_"):
        assert results[f"eval_{view}accuracy"] == 1.0
    assert results["eval_samples"] == 4


def test_a_curve_of_a_single_point_is_not_drawn(bars, tmp_path):
    run(bars, tmp_path, "--do_train", "--max_steps", 1)
    assert not (tmp_path / "training_curve.png").exists()
    assert "training_curve" not in (tmp_path / "README.md").read_text()


def test_says_how_fast_clips_are_read(trained):
    entries = json.loads((trained / "trainer_state.json").read_text())["log_history"][:-1]
    assert all(entry["clips_per_second"] > 0 and 0 <= entry["waiting"] <= 1 for entry in entries)
    speeds = [entry["clips_per_core_second"] for entry in entries if "clips_per_core_second" in entry]
    assert len(speeds) >= 20 and min(speeds) > 0, "an epoch is two steps; its clips may all be read in the first"


def test_output_is_a_complete_repository(trained, bars):
    files = {path.name for path in trained.iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "predictions.csv", "confusion_matrix.png"} <= files
    assert {"preprocessor_config.json", "video_preprocessor_config.json", "modeling_videomamba.py"} <= files
    with open(trained / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["predicted"] for row in rows] == [Path(row["clip"]).parent.name for row in rows] and len(rows) == 4
    classify = pipeline("video-classification", model=str(trained), device="cpu")
    for name in NAMES:
        answer = classify(str(bars / "validation" / name / "0.mp4"), top_k=2)
        assert answer[0]["label"] == name and answer[0]["score"] > 0.8


def test_interrupted_training_goes_on_to_the_same_weights(trained, bars, tmp_path):
    """The last twenty steps again, from the checkpoint in the middle: the same losses and weights to the bit."""
    shutil.copytree(trained / "checkpoint-20", tmp_path / "checkpoint-20")
    run(
        *(bars, tmp_path, "--do_train", "--max_steps", 40, "--save_steps", 20, "--learning_rate", 1e-2),
        *("--min_crop_area", 1, "--mirror_swaps", "to the left:to the right", "--dataloader_num_workers", 0),
        *("--reversal_swaps", "to the left:to the right", "--frame_cache", trained / "frames"),
    )
    first, second = (json.loads((folder / "trainer_state.json").read_text()) for folder in (trained, tmp_path))
    assert second["global_step"] == 40
    for before, after in zip(first["log_history"][:40], second["log_history"][:40], strict=True):
        assert (before["step"], before["loss"]) == (after["step"], after["loss"])
    started, expected, ended = (
        load_file(folder / "model.safetensors") for folder in (trained / "checkpoint-20", trained, tmp_path)
    )
    assert all(torch.equal(expected[name], ended[name]) for name in expected)
    assert any(not torch.equal(started[name], ended[name]) for name in started)


def test_in_a_finished_folder_other_settings_are_refused(trained, bars, tmp_path, capsys):
    """Nothing would be trained, and the card would name what was never used."""
    same = ("--do_train", "--do_eval", "--max_steps", 40, "--save_steps", 20, "--min_crop_area", 1)
    same += ("--mirror_swaps", "to the left:to the right", "--reversal_swaps", "to the left:to the right")
    for name in ("training_args.json", "README.md", "model.safetensors", "train_results.json", "_settings.json"):
        shutil.copy(trained / name, tmp_path)
    shutil.copytree(trained / "checkpoint-40", tmp_path / "checkpoint-40")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match="other settings: learning_rate was 0.01 and is now 0.1. To go on there"):
        run(bars, tmp_path, *same, "--learning_rate", 0.1)
    shutil.copytree(bars, tmp_path / "clips")
    with pytest.raises(ValueError, match="other settings: train_dir was '.*' and is now '.*clips/train'; validation"):
        run(tmp_path / "clips", tmp_path, *same, "--learning_rate", 0.01)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    # The same settings; where frames are cached and what is logged may differ.
    run(bars, tmp_path, *same, "--learning_rate", 0.01, "--logging_steps", 7)
    assert "Already done" in capsys.readouterr().out
    for name in ("model.safetensors", "train_results.json"):
        assert (tmp_path / name).read_bytes() == before[name]


def test_a_checkpoint_is_whole_or_not_there(bars, tmp_path, monkeypatch):
    """Interrupted between its files; then again to the end, where the best one is kept and loaded."""
    settings = ("--do_train", "--do_eval", "--max_steps", 4, "--save_steps", 1, "--eval_strategy", "steps")
    settings += ("--eval_steps", 1, "--load_best_model_at_end", "--metric_for_best_model", "loss")
    settings += ("--save_total_limit", 1, "--learning_rate", 1e-2)
    save_rng_state = example.Trainer._save_rng_state

    def interrupt(self, folder):
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        save_rng_state(self, folder)

    monkeypatch.setattr(example.Trainer, "_save_rng_state", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(bars, tmp_path, *settings)
    assert (tmp_path / "checkpoint.part" / "checkpoint-2" / "model.safetensors").exists()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    monkeypatch.undo()
    run(bars, tmp_path, *settings)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    rows = [entry for entry in state["log_history"] if "eval_loss" in entry]
    best = min(rows, key=lambda row: row["eval_loss"])["step"]
    assert state["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{best}") and not [*tmp_path.glob("*.part")]
    assert json.loads((tmp_path / f"checkpoint-{best}" / "trainer_state.json").read_text())["best_global_step"] == best
    weights = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path, tmp_path / f"checkpoint-{best}")]
    assert weights[0] == weights[1]


def test_fine_tunes_to_new_labels_and_keeps_known_ones(trained, bars, tmp_path):
    renamed = tmp_path / "clips" / "train"
    shutil.copytree(bars / "train" / NAMES[0], renamed / "west")
    shutil.copytree(bars / "train" / NAMES[1], renamed / "east")
    shutil.copytree(bars / "train" / NAMES[1], renamed / "again")
    arguments = ("--model_name_or_path", trained, "--do_train", "--max_steps", 1)
    with pytest.raises(ValueError, match="knows 2 labels.*clips have 3 labels.*--ignore_mismatched_sizes"):
        run(tmp_path / "clips", tmp_path / "new", *arguments)
    run(tmp_path / "clips", tmp_path / "new", *arguments, "--ignore_mismatched_sizes")
    model = AutoModelForVideoClassification.from_pretrained(tmp_path / "new")
    assert model.config.id2label == {0: "again", 1: "east", 2: "west"} and model.classifier.out_features == 3

    start = load_file(trained / "model.safetensors")
    shutil.rmtree(renamed / "again")
    run(tmp_path / "clips", tmp_path / "two", *arguments, "--ignore_mismatched_sizes", "--learning_rate", 0)
    end = load_file(tmp_path / "two" / "model.safetensors")
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert changed == {"classifier.weight", "classifier.bias"}, "as many labels as before, but others: a new head"

    run(bars, tmp_path / "same", "--model_name_or_path", trained, "--do_eval")
    assert json.loads((tmp_path / "same" / "eval_results.json").read_text())["eval_accuracy"] == 1.0
    with pytest.raises(ValueError, match="east.*but the model or the training clips have only"):
        shutil.copytree(renamed, tmp_path / "clips" / "validation")
        run(tmp_path / "clips", tmp_path / "same", "--model_name_or_path", trained, "--do_eval")


def test_other_models_train_too(bars, tmp_path):
    """A stock model, whose own processor could not read the files here."""
    config = VideoMAEConfig(
        **{"image_size": 32, "num_frames": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"intermediate_size": 16},
    )
    VideoMAEForVideoClassification(config).save_pretrained(tmp_path / "start")
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    VideoMAEVideoProcessor(**sizes).save_pretrained(tmp_path / "start")
    VideoMAEImageProcessor(**sizes).save_pretrained(tmp_path / "start")
    arguments = ("--do_train", "--do_eval", "--max_steps", 2, "--min_crop_area", 0.5)
    arguments += ("--model_name_or_path", tmp_path / "start", "--ignore_mismatched_sizes")
    run(bars, tmp_path / "end", *arguments)
    model = AutoModelForVideoClassification.from_pretrained(tmp_path / "end")
    assert isinstance(model, VideoMAEForVideoClassification) and model.config.label2id == {NAMES[0]: 0, NAMES[1]: 1}


def test_errors_say_what_is_missing(bars, tmp_path):
    with pytest.raises(ValueError, match="Nothing to do"):
        run(bars, tmp_path)
    with pytest.raises(ValueError, match="either folders .* or a data set"):
        run(bars, tmp_path, "--do_train", "--dataset_name", "someone/clips")
    with pytest.raises(ValueError, match="'up:down' is not a pair"):
        run(bars, tmp_path, "--do_train", "--mirror_swaps", "up:down")
    with pytest.raises(ValueError, match="no column"):
        run(bars, tmp_path, "--do_train", "--label_column", "class")
