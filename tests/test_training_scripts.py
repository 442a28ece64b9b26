"""The training scripts as users run them: recipes, kills and resumption, two processes, LoRA, the Hub."""

import csv
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset
from huggingface_hub import ModelCard, parse_eval_result_entries
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForVideoClassification,
    AutoVideoProcessor,
    TrainingArguments,
    get_scheduler,
)
from transformers.video_utils import VideoMetadata

import evaluate_video_classification as evaluation
import finetune
import run_image_classification
import run_video_classification
import run_video_classification_no_trainer as plain_loop
import video_classification_data as data
import video_classification_model as models
from finetune import DecodeFailures
from modeling_videomamba import (
    VideoMambaConfig,
    VideoMambaForVideoClassification,
    VideoMambaImageProcessor,
    VideoMambaVideoProcessor,
)
from modeling_videomamba.selective_scan import use_scan_backend
from training_clips import NAMES, tiny_processor, touch
from video_classification_arguments import DataArguments, ModelArguments, parse_arguments
from video_files import write_video


EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "training"
TINY = ["--hidden_size", 16, "--num_hidden_layers", 1, "--image_size", 32, "--num_frames", 4, "--frame_stride", 2]
CPU = torch.device("cpu")
AUGMENTED = ["--rand_augment", 1, "--random_erasing", 0.5, "--mirror_swaps", "to the left:to the right"]


def run(python, name, *arguments, fails=False):
    """Runs a script to its end and returns what it printed."""
    return python.run([EXAMPLES / f"{name}.py", *arguments], fails=fails)


def run_twice(python, name, *arguments):
    python.run_together(2, [EXAMPLES / f"{name}.py", *arguments])


def training(bars, output, *more):
    clips = ["--train_dir", bars / "train", "--validation_dir", bars / "validation"]
    return [*clips, "--output_dir", output, "--use_cpu", *TINY, "--logging_steps", 1, *more]


def test_an_incomplete_group_of_batches_counts_by_its_clips(bars, tmp_path, monkeypatch):
    """Eight clips, two a batch, three batches a step: the second step has one batch, with a loss like any other's."""
    steps = {}
    for name, options in {
        "3 + 1": ("--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 3, "--num_train_epochs", 1),
        "4": ("--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 4, "--max_steps", 1),
        "1": ("--per_device_train_batch_size", 8, "--max_steps", 1),
    }.items():
        # Weights go down by the gradient itself.
        monkeypatch.setattr(torch.optim, "AdamW", lambda groups, fused: torch.optim.SGD(groups, lr=1.0))
        rate = 0 if name == "3 + 1" else 1
        command = training(bars, tmp_path / name, *options, "--max_grad_norm", 1e9, "--learning_rate", rate)
        monkeypatch.setattr(sys, "argv", ["script", *map(str, command), "--weight_decay", "0"])
        monkeypatch.setenv("VIDEOMAMBA_SCAN_BACKEND", "torch")
        plain_loop.main()
        steps[name] = losses(tmp_path / name), load_file(tmp_path / name / "model.safetensors")
    assert [round(loss, 1) for loss in steps["3 + 1"][0].values()] == [0.7, 0.7]
    assert steps["4"][0][1] == pytest.approx(steps["1"][0][1], rel=1e-5)
    for weight, expected in zip(steps["4"][1].values(), steps["1"][1].values(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-6)


def losses(output):
    path = output / "history.json"
    history = json.loads(path.read_text()) if path.exists() else read_trainer_state(output)
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def read_trainer_state(output):
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


def write_clips_that_redden(folder, names, count):
    """Clips of `count` frames whose red says which frame it is, 20 + 4 · number, and whose blue grows to the right."""
    frames = np.zeros((count, 32, 64, 3), np.uint8)
    frames[..., 0] = 20 + 4 * np.arange(count)[:, None, None]
    frames[..., 2] = 3 * np.arange(64)
    for name in names:
        touch(folder / name)
        write_video(folder / name, frames, pix_fmt="yuv444p", options={"crf": "0"})


def frame_numbers(frames):
    """Of (..., T, C, H, W) uint8, as `write_clips_that_redden` has coloured them."""
    return ((frames[..., 0, :, :].float().mean((-2, -1)) - 20) / 4).round().int()


@pytest.mark.parametrize(
    "name, script, lines",
    [
        ("breakfast", "run_video_classification", "P03/cam01/{0}.avi,0\nP04/cam01/{1}.avi,1\n"),
        ("coin", "run_video_classification_no_trainer", None),  # COIN's own file
        ("lvu", "run_video_classification", "{0}.mp4,0,61\n{1}.mp4,1,143\n"),
    ],
    ids=["breakfast", "coin", "lvu"],
)
def test_recipes_of_long_videos_train_and_are_tested_as_their_authors_do(
    name, script, lines, python, tmp_path, monkeypatch
):
    """From the authors' lists to scores, with the views that the recipe names; each covers the whole video."""
    recipe, root, count = EXAMPLES / f"recipes/{name}.args", tmp_path / "videos", 57
    parts = {"train": ["first", "second"], "validation": ["third", "fourth"]}
    lists = {part: tmp_path / f"{part}.csv" for part in parts}
    if lines is None:
        lists = dict.fromkeys(parts, tmp_path / "COIN.json")
        subsets = {"train": "training", "validation": "testing"}
        rows = {
            clip: {"class": label, "subset": subsets[part], "recipe_type": 0, "annotation": []}
            for part, clips in parts.items()
            for clip, label in zip(clips, ["BoilNoodles", "MakeTea"], strict=True)
        }
        lists["train"].write_text(json.dumps({"database": rows}))
        write_clips_that_redden(root, [f"0/{clip}.mp4" for clip in rows], count)
    else:
        for part, clips in parts.items():
            lists[part].write_text(lines.format(*clips))
            write_clips_that_redden(root, [line.split(",")[0] for line in lines.format(*clips).split()], count)
    lists = ["--train_list", lists["train"], "--validation_list", lists["validation"], "--video_root", root]
    lists += ["--list_columns", "path,label,seconds"] if name == "lvu" else []
    tiny = ["--hidden_size", 16, "--num_hidden_layers", 1, "--image_size", 32, "--per_device_train_batch_size", 2]
    command = ["--recipe", recipe, *lists, *tiny, "--use_cpu", "--output_dir", tmp_path / "out", "--max_steps", 2]
    command += ["--logging_steps", 1, "--report_to", "none"]
    run(python, script, *command, *["--do_train"] * (script[-1] == "n"))
    assert list(losses(tmp_path / "out")) == [1, 2]

    monkeypatch.setattr(sys, "argv", ["script", *map(str, command)])
    model, clips, loop = parse_arguments(ModelArguments, DataArguments, plain_loop.LoopArguments)
    assert loop.num_train_epochs * loop.warmup_steps == pytest.approx(5, abs=0.01), "five epochs of warm-up"
    reader = models.load_model(model, ["a", "b"], training=True)[2]
    plain = dataclasses.replace(clips, rand_augment=0, random_erasing=0.0)
    splits, names = data.load_clips(plain, ["train"], 0, DecodeFailures(str(tmp_path), 0))
    seen = data.transform_clips(splits, names, plain, reader, tiny_processor(), None, 0, 0, CPU)[0]["train"][0]
    numbers = frame_numbers(seen["pixel_values"])
    assert len(numbers) == 32 and (numbers[0], numbers[-1]) == (0, count - 1)
    assert set(numbers.diff().tolist()) == {1, 2}  # 56 / 31 apart

    shown = []

    class Watched(data.Normalize):
        def __call__(self, frames):
            shown.append(frames)
            return super().__call__(frames)

    monkeypatch.setattr(evaluation, "Normalize", Watched)
    views = re.search(r"--num_crops (\d+) --num_clips (\d+)", recipe.read_text(encoding="utf-8"))
    command = ["--model_name_or_path", tmp_path / "out", *lists[2:], "--use_cpu", "--output_dir", tmp_path / "tested"]
    monkeypatch.setattr(sys, "argv", ["script", *map(str, command), *views[0].split()])
    evaluation.main()
    scores = np.load(tmp_path / "tested" / "scores.npz")
    assert scores["scores"].shape == (2, 2) and scores["labels"].tolist() == [0, 1]
    crops, parts = 3, 10 if name == "coin" else 4
    shown = torch.cat(shown).unflatten(0, (2, crops, parts))
    # A frame every 56 / 32; the clips begin one after the other in the first such step, and none goes beyond the end.
    numbers = frame_numbers(shown)
    step = (count - 1) / 32
    shifts = [int(step * part / (parts + 1)) for part in range(1, parts + 1)]
    expected = torch.tensor([[round(step * frame) + shift for frame in range(32)] for shift in shifts])
    assert torch.equal(numbers, expected.expand(2, crops, parts, 32).int())
    blue = shown[..., 2, :, :].float().mean((-2, -1))[0, :, 0, 0]
    assert blue.tolist() == pytest.approx([46.5, 94.5, 142.5], abs=2)  # 3 · (15.5 + 0, 16 or 32)


# As on a GPU, whose name alone is missing: the workers leave to `DeviceTransform` what follows the crop.
DEFERRING = """
import runpy, sys
sys.path.insert(0, sys.argv[1].rpartition("/")[0])
import video_classification_data as data

transform_clips, TrainTransform = data.transform_clips, data.TrainTransform
data.TrainTransform = lambda *args: TrainTransform(*args[:5], defers=True)

def deferring(*args):
    clips, _ = transform_clips(*args)
    return clips, data.DeviceTransform(args[4], args[-1], clips["train"].transform.augment)

data.transform_clips = deferring
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run_video_classification", "run_video_classification_no_trainer"])
def test_training_sees_the_same_whoever_augments(name, python, bars, tmp_path):
    more = [*AUGMENTED, "--max_steps", 3, "--per_device_train_batch_size", 4]
    more += ["--do_train", "--report_to", "none"] if name == "run_video_classification" else []
    run(python, name, *training(bars, tmp_path / "workers", *more))
    python.run(["-c", DEFERRING, EXAMPLES / f"{name}.py", *training(bars, tmp_path / "device", *more)])
    assert len(losses(tmp_path / "device")) == 3
    assert losses(tmp_path / "device") == losses(tmp_path / "workers")


@pytest.mark.parametrize("name, mirrored", [("k400", True), ("ssv2", False), ("hmdb51", True)])
def test_recipes_train_as_the_paper_says(name, mirrored, tmp_path, monkeypatch):
    """One epoch of warm-up to 3e-4 and a cosine to zero, with either script; no mirrored clip of SSV2."""
    command = ["script", "--use_cpu", "--output_dir", str(tmp_path), "--recipe"]
    recipe = str(EXAMPLES / f"recipes/{name}.args")
    monkeypatch.setattr(sys, "argv", [*command, recipe, "--seed", "7"])
    for kind in (TrainingArguments, plain_loop.LoopArguments):
        _, clips, loop = parse_arguments(ModelArguments, DataArguments, kind)
        assert loop.seed == 7
    steps_an_epoch = 5000
    total, warmup = plain_loop.count_steps(loop, range(steps_an_epoch))
    assert warmup == pytest.approx(steps_an_epoch, rel=2e-3)
    optimizer = torch.optim.AdamW([torch.zeros(1)], loop.learning_rate)
    rate = get_scheduler(loop.lr_scheduler_type, optimizer, warmup, total).lr_lambdas[0]
    at = [loop.learning_rate * rate(step) for step in (warmup // 2, warmup, (warmup + total) // 2, total)]
    assert at == pytest.approx([1.5e-4, 3e-4, 1.5e-4, 0], abs=1e-7)

    reader = tiny_processor()
    plain = dataclasses.replace(clips, rand_augment=0, random_erasing=0.0, min_crop_area=1.0)
    row = {"video": {"path": write_video(tmp_path / "bar.mp4", 8), "bytes": None}, "label": 0}
    splits = {"train": Dataset.from_list([row] * 40).cast_column("label", ClassLabel(names=["a", "b"]))}
    seen = data.transform_clips(splits, ["a", "b"], plain, reader, reader, None, 0, 0, CPU)[0]["train"]
    clips = (seen[index]["pixel_values"].int() for index in range(40))
    red_is_left = {bool(clip[0, 0, 4, 1] > clip[0, 0, 4, -2] + 60) for clip in clips}
    assert red_is_left == ({True, False} if mirrored else {True})
    monkeypatch.setattr(sys, "argv", [*command, "no such recipe"])
    with pytest.raises(FileNotFoundError, match="no such recipe"):
        parse_arguments(plain_loop.LoopArguments)


@pytest.mark.parametrize("frames, rate", [(32, 25), (66, 25), (254, 25), (513, 25), (250, 19.82)])
def test_the_first_frame_of_tank_state_is_not_seen(frames, rate, monkeypatch, tmp_path):
    """It tells the label."""
    recipe = str(EXAMPLES / "recipes/tank_state.args")
    monkeypatch.setattr(sys, "argv", ["script", "--use_cpu", "--output_dir", str(tmp_path), "--recipe", recipe])
    model, *_ = parse_arguments(ModelArguments, DataArguments, TrainingArguments)
    clip = VideoMetadata(total_num_frames=frames, fps=rate)
    distance = {"frame_stride": model.frame_stride or None, "sampling_fps": model.sampling_fps}
    reader = VideoMambaVideoProcessor(num_frames=model.num_frames, **distance)
    assert reader.sample_frames(clip).min() > 0


def checkpoints(folder):
    return sorted(int(path.name[11:]) for path in folder.glob("checkpoint-*"))


@pytest.mark.parametrize(
    "name, kills, steps", [("run_video_classification_no_trainer", 7, 28), ("run_video_classification", 2, 14)]
)
def test_killed_at_any_moment_it_goes_on_as_if_nothing_had_happened(bars, python, tmp_path, name, kills, steps):
    """The same losses to the bit, and never half a checkpoint; a damaged one is passed over."""
    settings = [*AUGMENTED, "--num_hidden_layers", 2, "--drop_path_rate", 0.5, "--per_device_train_batch_size", 2]
    settings += ["--max_steps", steps, "--gradient_accumulation_steps", 2, "--save_steps", 1, "--save_total_limit", 3]
    settings += ["--do_train", "--report_to", "none"] if name == "run_video_classification" else []
    run(python, name, *training(bars, tmp_path / "whole", *settings))
    expected = losses(tmp_path / "whole")
    assert list(expected) == list(range(1, steps + 1)) and len(set(expected.values())) > 0.8 * steps

    output, rng = tmp_path / "killed", random.Random(0)
    for kill in range(kills):
        before = checkpoints(output)
        process, log = python.start([EXAMPLES / f"{name}.py", *training(bars, output, *settings)])
        # Let it make a checkpoint of its own; then any moment will do.
        deadline = time.monotonic() + 60
        while process.is_alive() and time.monotonic() < deadline and checkpoints(output)[-1:] == before[-1:]:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL, log.read_text()
        found = checkpoints(output)
        assert all((output / f"checkpoint-{step}" / models.MANIFEST).exists() for step in found)
        assert models.newest_checkpoint(output) == str(output / f"checkpoint-{found[-1]}")
        if kill == 4:  # one byte in the middle of the newest one goes wrong
            damaged = output / f"checkpoint-{found[-1]}" / "optimizer.bin"
            content = bytearray(damaged.read_bytes())
            content[len(content) // 2] ^= 1
            damaged.write_bytes(content)
        if kill == 5:
            assert f"checkpoint-{before[-1]} is incomplete or damaged (optimizer.bin)" in log.read_text()
            assert f"Going on from {output}/checkpoint-{before[-2]}" in log.read_text()
    run(python, name, *training(bars, output, *settings))
    assert losses(output) == expected
    assert (output / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert not list(output.glob("*.part"))
    if name == "run_video_classification":  # tests/test_run_video_classification.py has the same of it
        return
    assert "Already done" in run(python, name, *training(bars, output, *settings))
    text = run(python, name, *training(bars, output, *settings, "--learning_rate", 1), fails=True)
    assert "other settings: learning_rate was 0.0003 and is now 1.0." in text
    assert (output / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_a_damaged_checkpoint_of_the_trainer_is_passed_over(bars, python, tmp_path):
    settings = [*AUGMENTED, "--do_train", "--max_steps", 6, "--save_steps", 2, "--report_to", "none"]
    name, output = "run_video_classification", tmp_path / "out"
    command = training(bars, output, *settings, "--per_device_train_batch_size", 4)
    run(python, name, *command)
    expected, weights = losses(output), (output / "model.safetensors").read_bytes()
    (output / "checkpoint-6" / models.MANIFEST).unlink()  # as if killed while it was written
    scheduler = output / "checkpoint-4" / "scheduler.pt"
    scheduler.write_bytes(scheduler.read_bytes()[:-100])
    (output / "model.safetensors").unlink()
    text = run(python, name, *command)
    assert "checkpoint-6 is incomplete or damaged" in text and "(scheduler.pt)" in text
    assert losses(output) == expected and (output / "model.safetensors").read_bytes() == weights


def test_two_processes_train_and_evaluate_as_one(bars, python, tmp_path):
    """The same clips to a step, half in each process: the same losses but for rounding, with both scripts."""
    settings = [*AUGMENTED, "--num_train_epochs", 2, "--max_grad_norm", 0.1, "--label_smoothing_factor", 0.1]
    for name in ("run_video_classification_no_trainer", "run_video_classification"):
        more = settings
        if name == "run_video_classification":
            more = [*settings, "--do_train", "--do_eval", "--report_to", "none", "--save_steps", 2]
        one, two = tmp_path / name / "one", tmp_path / name / "two"
        run(python, name, *training(bars, one, *more, "--per_device_train_batch_size", 4))
        run_twice(python, name, *training(bars, two, *more, "--per_device_train_batch_size", 2))
        assert len(losses(one)) == 4 and len(set(losses(one).values())) == 4
        assert losses(two) == pytest.approx(losses(one), abs=2e-6)
    manifest = json.loads((two / "checkpoint-4" / models.MANIFEST).read_text())
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(manifest) and not list(two.glob("*.part"))

    # Three clips for two processes: one of them gets a clip more, and none is counted twice.
    few = tmp_path / "few" / "validation"
    shutil.copytree(bars / "validation", few)
    (few / NAMES[0] / "1.mp4").unlink()
    look = ["--model_name_or_path", one, "--validation_dir", few, "--use_cpu", "--num_clips", 2, "--num_crops", 3]
    run(python, "evaluate_video_classification", *look, "--output_dir", tmp_path / "alone")
    run_twice(python, "evaluate_video_classification", *look, "--output_dir", tmp_path / "together")
    for file in ("predictions.csv", "classes.csv", "results.json"):
        assert (tmp_path / "alone" / file).read_text() == (tmp_path / "together" / file).read_text()
    with open(tmp_path / "together" / "predictions.csv", newline="") as file:
        rows = [row["clip"] for row in csv.DictReader(file)]
    assert len(rows) == len(set(rows)) == 3


def test_processes_without_a_gpu_know_of_each_other(monkeypatch, tmp_path):
    """Without `cpu`, Accelerate would let each of them train or evaluate alone, on the same files."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(plain_loop, "Accelerator", lambda **options: options)
    monkeypatch.setattr(evaluation, "PartialState", lambda cpu: sys.exit(f"cpu={cpu}"))
    flags = dict.fromkeys(("bf16", "fp16", "use_cpu"), False)
    arguments = SimpleNamespace(report_to="none", output_dir=str(tmp_path), seed=0, **flags)
    assert plain_loop.make_accelerator(arguments)["cpu"]
    command = ["script", "--model_name_or_path", "m", "--validation_dir", "v", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="cpu=True"):
        evaluation.main()
    for script in (finetune, run_image_classification, run_video_classification):  # the Trainer's
        monkeypatch.setattr(
            finetune.HfArgumentParser,
            "parse_args_into_dataclasses",
            lambda self, *_: sys.exit(f"cpu={self.get_default('use_cpu')}"),
        )
        with pytest.raises(SystemExit, match="cpu=True"):
            script.main()


@pytest.mark.slow
def test_compiled_training_has_the_same_losses(bars, python, tmp_path):
    for name in ("run_video_classification_no_trainer", "run_video_classification"):
        more = ["--max_steps", 4, "--report_to", "none", *(["--do_train"] if name[-1] == "n" else [])]
        run(python, name, *training(bars, tmp_path / name, *more))
        run(python, name, *training(bars, tmp_path / f"{name}-compiled", *more, "--torch_compile", "True"))
        assert losses(tmp_path / f"{name}-compiled") == pytest.approx(losses(tmp_path / name), abs=1e-5)
        model = AutoModelForVideoClassification.from_pretrained(tmp_path / f"{name}-compiled")
        assert model.config.id2label == dict(enumerate(NAMES))


@pytest.mark.parametrize("name", ["run_video_classification_no_trainer", "run_video_classification"])
def test_lora_trains_adapters_that_load_and_merge(bars, hub, python, tmp_path, name):
    """What is pushed are the merged model, and the adapter, which on the model that it started from does the same."""
    config = VideoMambaConfig(hidden_size=16, num_hidden_layers=1, image_size=32, num_frames=4, scan_backend="torch")
    config.id2label, config.label2id = dict(enumerate(NAMES)), {label: i for i, label in enumerate(NAMES)}
    start, repository = tmp_path / "start", f"you/lora-{name}"
    touch(start / "README.md")
    (start / "README.md").write_text("---\nlicense: mit\n---\n")
    torch.manual_seed(0)
    for part in (VideoMambaForVideoClassification(config), tiny_processor(), VideoMambaImageProcessor()):
        part.save_pretrained(start)
    command = training(bars, tmp_path / "out", "--lora_rank", 2, "--model_name_or_path", start, "--max_steps", 4)
    command += ["--learning_rate", 1e-2, "--save_steps", 2, "--report_to", "none", "--push_to_hub"]
    command += ["--hub_model_id", repository, *(["--do_train", "--do_eval"] if name[-1] == "n" else [])]
    run(python, name, *command)
    expected = losses(tmp_path / "out")
    assert len(expected) == 4
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    run(python, name, *command)
    assert losses(tmp_path / "out") == expected, "resumed from the adapters in the middle"

    files = {file: content for file, content in hub.files[repository].items() if not file.endswith((".png", ".csv"))}
    for file, content in files.items():
        touch(tmp_path / "pushed" / file)
        (tmp_path / "pushed" / file).write_bytes(content)
    for card in ("README.md", "adapter/README.md"):
        text = (tmp_path / "pushed" / card).read_text()
        assert ModelCard(text).data.license == "mit" and "fine-tuned from start" in text
        assert str(tmp_path) not in text and "More Information Needed" not in text
    merged = AutoModelForVideoClassification.from_pretrained(tmp_path / "pushed").eval()
    before = AutoModelForVideoClassification.from_pretrained(start).eval()
    changed = {k for k, w in before.state_dict().items() if not torch.equal(w, merged.state_dict()[k])}
    mixer = "videomamba.layers.0.mixer"
    assert changed == {f"{mixer}.in_proj.weight", f"{mixer}.out_proj.weight", "classifier.weight", "classifier.bias"}
    adapted = PeftModel.from_pretrained(before, tmp_path / "pushed" / "adapter").eval()
    clips = torch.randn(2, 4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(adapted(pixel_values=clips).logits, merged(clips).logits, atol=1e-5, rtol=1e-5)
    weight = f"{mixer}.in_proj.weight"
    delta = merged.state_dict()[weight] - load_file(start / "model.safetensors")[weight]
    assert torch.linalg.matrix_rank(delta, rtol=1e-3) == 2


# In a process with an empty cache, in which `import modeling_videomamba` fails.
FROM_THE_HUB = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "modeling_videomamba":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch
from datasets import Video, load_dataset
from transformers import AutoModelForVideoClassification, pipeline

name, pixels, clip, output = sys.argv[1:]
model = AutoModelForVideoClassification.from_pretrained(name, trust_remote_code=True).eval()
with torch.no_grad():
    logits = model(torch.load(pixels, weights_only=True)).logits
torch.save(logits, output)
scores = pipeline("video-classification", model=name, trust_remote_code=True)(clip)
clips = load_dataset("you/clips", split="validation").cast_column("video", Video(decode=False))
print(json.dumps([scores, list(clips["label"]), clips.features["label"].names]))
"""


def test_trains_on_a_data_set_of_the_hub_and_pushes_what_others_can_load(bars, hub, python, tmp_path):
    paths = sorted(bars.rglob("*.mp4"))
    hub.files["datasets/you/clips"] = {str(path.relative_to(bars)): path.read_bytes() for path in paths}
    settings = ["--dataset_name", "you/clips", "--use_cpu", *TINY, "--max_steps", 2, "--push_to_hub"]
    settings += ["--logging_steps", 1, "--report_to", "none", "--hub_token", "hf_secret"]
    trainer = ["--do_train", "--do_eval", "--hub_model_id", "you/trained", "--hub_private_repo", "True"]
    run(python, "run_video_classification", *settings, *trainer, "--output_dir", tmp_path / "trained")
    plain = ["--hub_model_id", "you/plain", "--streaming"]
    run(python, "run_video_classification_no_trainer", *settings, *plain, "--output_dir", tmp_path / "plain")
    assert hub.created["you/trained"] and not hub.created["you/plain"], "private, or not"

    wanted = {"README.md", "config.json", "model.safetensors", "training_args.json", "training_curve.png"}
    wanted |= {"video_preprocessor_config.json", "preprocessor_config.json", "modeling_videomamba.py"}
    for name in ("trained", "plain"):
        files = hub.files[f"you/{name}"]
        assert wanted <= set(files)
        assert not [file for file in files if "checkpoint" in file or file.endswith((".bin", ".pt", ".part", ".mp4"))]
        assert files["model.safetensors"] == (tmp_path / name / "model.safetensors").read_bytes()
        assert files["model.safetensors"] in hub.uploaded.values(), "weights go to large file storage"
        assert "hf_secret" not in files["training_args.json"].decode()
        card = ModelCard(files["README.md"].decode()).data
        assert {result.metric_name for result in card.eval_results} == {
            *("accuracy", "mean_class_accuracy"),  # of two labels, five guesses say nothing
        }
        (entry,) = parse_eval_result_entries(yaml.safe_load(files[".eval_results/you--clips.yaml"]))
        accuracy = next(result for result in card.eval_results if result.metric_name == "accuracy")
        assert (entry.dataset_id, entry.value) == ("you/clips", accuracy.metric_value)
        assert entry.notes == f"accuracy on the split {accuracy.dataset_split}"
        assert card.datasets == ["you/clips"] and card.pipeline_tag == "video-classification"

    model = AutoModelForVideoClassification.from_pretrained(tmp_path / "trained").eval()
    clip = bars / "validation" / NAMES[0] / "0.mp4"
    pixels = AutoVideoProcessor.from_pretrained(tmp_path / "trained")(str(clip), return_tensors="pt")["pixel_values"]
    torch.save(pixels, tmp_path / "pixels.pt")
    inputs = ["you/trained", tmp_path / "pixels.pt", clip, tmp_path / "logits.pt"]
    printed = python.run(["-c", FROM_THE_HUB, *inputs], tmp_path, environment={"VIDEOMAMBA_SCAN_BACKEND": "torch"})
    scores, labels, names = json.loads(printed.splitlines()[-1])
    with torch.no_grad(), use_scan_backend("torch"):
        expected = model(pixels).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), expected)
    found = {entry["label"]: entry["score"] for entry in scores}
    expected = dict(zip(NAMES, expected.softmax(-1)[0].tolist(), strict=True))
    assert found == pytest.approx(expected, abs=1e-6)
    assert sorted(labels) == [0, 0, 1, 1] and names == NAMES


def test_the_trainer_streams_and_resumes(bars, python, tmp_path):
    """The clips of a stream come in the same order again; each of its validation clips is counted once."""
    clips = ["--dataset_name", bars, "--streaming", "--use_cpu", *TINY, *AUGMENTED, "--report_to", "none"]
    clips += ["--do_train", "--do_eval", "--max_steps", 4, "--save_steps", 2, "--logging_steps", 1]
    command = [*clips, "--per_device_train_batch_size", 3, "--output_dir", tmp_path]
    run(python, "run_video_classification", *command)
    expected, weights = losses(tmp_path), (tmp_path / "model.safetensors").read_bytes()
    assert len(set(expected.values())) == 4
    shutil.rmtree(tmp_path / "checkpoint-4")
    (tmp_path / "model.safetensors").unlink()
    run(python, "run_video_classification", *command)
    assert losses(tmp_path) == expected and (tmp_path / "model.safetensors").read_bytes() == weights
    with open(tmp_path / "classes.csv", newline="") as file:
        assert [(row["label"], row["clips"]) for row in csv.DictReader(file)] == [(name, "2") for name in NAMES]


def test_says_before_training_that_it_may_not_push(bars, hub, python, tmp_path):
    for name in ("run_video_classification", "run_video_classification_no_trainer"):
        more = ["--push_to_hub", "--hub_model_id", "you/forbidden"] + ["--do_train"] * (name[-1] == "n")
        command = training(bars, tmp_path / name, *more, "--hub_token", "hf_reader")
        text = run(python, name, *command, fails=True)
        assert "PermissionError: Cannot write to the Hub repository you/forbidden" in text and "hf auth login" in text
        assert "you/forbidden" not in hub.files and not list(tmp_path.rglob("*.safetensors"))
