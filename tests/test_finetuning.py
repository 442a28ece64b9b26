"""The training and evaluation scripts: their data, resuming after kills, two processes, pushing, bad input.

The scripts run in processes forked from a server that has imported them once, because that takes seconds.
"""

import contextlib
import csv
import dataclasses
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from datasets import IterableDataset
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from torchvision.transforms import v2
from transformers import AutoModelForVideoClassification, AutoVideoProcessor, TrainingArguments, get_scheduler

import evaluate_video_classification as evaluation
import run_video_classification_no_trainer as plain_loop
import video_classification_data as data
import video_classification_model as models
from hub_server import HubServer
from modeling_videomamba import (
    VideoMambaConfig,
    VideoMambaForVideoClassification,
    VideoMambaImageProcessor,
    VideoMambaVideoProcessor,
    video_decoding,
)
from modeling_videomamba.selective_scan import use_scan_backend
from script_runner import run_script
from video_files import write_moving_bars, write_video


EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


SCRIPTS = ["run_video_classification", "run_video_classification_no_trainer", "evaluate_video_classification"]
NAMES = ["to the left", "to the right"]
TINY = ["--hidden_size", 16, "--num_hidden_layers", 1, "--image_size", 32, "--num_frames", 4, "--frame_stride", 2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_moving_bars(tmp_path_factory.mktemp("clips"), {"train": 4, "validation": 2})


@pytest.fixture(scope="module")
def hub():
    with HubServer(large_files=True).serve() as server:
        server.readers.add("hf_reader")
        yield server


# ---------------------------------------------------------------------------------------------------------------------
# Running scripts
# ---------------------------------------------------------------------------------------------------------------------


def hub_environment(hub, home):
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_writer",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
        "VIDEOMAMBA_SCAN_BACKEND": "torch",
    }


@pytest.fixture(scope="module")
def scripts(hub, tmp_path_factory):
    """`start(name, arguments, environment)` starts a script and returns its process and the path of its log."""
    home = tmp_path_factory.mktemp("home")
    environment = hub_environment(hub, home)
    environment["PYTHONPATH"] = os.pathsep.join(str(EXAMPLES.parent / name) for name in ("examples", "", "tests"))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["script_runner", *SCRIPTS, "torch.utils.tensorboard"])
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        starter = context.Process(target=time.sleep, args=(0,))  # the server takes the environment of the first start
        starter.start()
        starter.join()
    count = iter(range(1000))

    def start(name, arguments, environment=None):
        log = home / f"{name}-{next(count)}.log"
        process = context.Process(target=run_script, args=(name, arguments, str(log), environment or {}))
        process.start()
        return process, log

    return start


def run(scripts, name, *arguments, environment=None, fails=False):
    """Runs a script to its end and returns what it printed."""
    process, log = scripts(name, arguments, environment)
    process.join(120)
    text = log.read_text() if log.exists() else ""
    assert (process.exitcode != 0) == fails, text
    return text


def run_twice(scripts, name, *arguments):
    """Runs a script in two processes, with the environment that `torchrun` gives them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    started = [scripts(name, arguments, environment) for environment in ranks]
    for process, log in started:
        process.join(120)
        assert process.exitcode == 0, log.read_text()


def training(folders, output, *more):
    clips = ["--train_dir", folders / "train", "--validation_dir", folders / "validation"]
    return [*clips, "--output_dir", output, "--use_cpu", *TINY, "--logging_steps", 1, *more]


def losses(output):
    path = output / "history.json"
    history = json.loads(path.read_text()) if path.exists() else read_trainer_state(output)
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def read_trainer_state(output):
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def listed(source, root, split="train", limit=0):
    clips = data.read_list(str(source), str(root), split, 1, data.DecodeFailures(str(root.parent / "log"), limit))
    names = clips.features["label"].names
    return {os.path.relpath(v["path"], root): names[n] for v, n in zip(clips["video"], clips["label"], strict=True)}


def test_reads_the_lists_of_kinetics(tmp_path):
    root, source = tmp_path / "videos", tmp_path / "train.csv"
    touch(root / "abseiling" / "-3B32lodo2M_000059_000069.mp4", root / "0QuUVTUdlO8_000060_000070.mkv")
    source.write_text(
        "label,youtube_id,time_start,time_end,split,is_cc\n"
        'abseiling,-3B32lodo2M,59,69,train,0\n"zumba, slow",0QuUVTUdlO8,60,70,train,0\nyoga,missing0000,0,10,train,0\n'
    )
    with pytest.raises(RuntimeError, match=r"--max_decode_failures 0.*missing0000_000000_000010 \(yoga\)"):
        listed(source, root)
    found = {"abseiling/-3B32lodo2M_000059_000069.mp4": "abseiling", "0QuUVTUdlO8_000060_000070.mkv": "zumba, slow"}
    shutil.rmtree(tmp_path / "log")
    assert listed(source, root, limit=1) == found


def test_reads_plain_lists(tmp_path):
    root, source = tmp_path / "videos", tmp_path / "clips.csv"
    touch(root / "a" / "1.mp4", root / "b" / "1.mp4")
    source.write_text("video,label\na/1.mp4,fight\nb/1.mp4,peace\n")
    assert listed(source, root) == {"a/1.mp4": "fight", "b/1.mp4": "peace"}
    source.write_text("file,class\na/1.mp4,fight\n")
    with pytest.raises(ValueError, match="lists no train clips: columns label, youtube_id.* were expected"):
        listed(source, root)
    with pytest.raises(ValueError, match="--video_root"):
        data.read_list(str(source), None, "train", 1, None)


def test_reads_the_lists_of_breakfast_coin_and_lvu(tmp_path):
    root, source = tmp_path / "videos", tmp_path / "train.csv"
    touch(root / "P03" / "cam01" / "P03_cereals.avi", root / "P04_tea.avi", root / "a b.mp4")
    source.write_text("P03/cam01/P03_cereals.avi,0\nP04_tea.avi,10\n")
    found = {"P03/cam01/P03_cereals.avi": "00", "P04_tea.avi": "10"}  # in the order of the numbers
    assert listed(source, root) == found
    source.write_text("P03/cam01/P03_cereals.avi 0 61.5\na b.mp4 1 90\n")
    names = tmp_path / "names.txt"
    names.write_text("cereals\ntea\n")
    clips = data.read_list(str(source), str(root), "train", 1, data.DecodeFailures(str(tmp_path), 0), str(names))
    assert clips.features["label"].names == ["cereals", "tea"] and clips["label"] == [0, 1]
    source.write_text("P04_tea.avi,2\n")
    with pytest.raises(ValueError, match="names 2 labels, but .*train.csv has a label 2"):
        data.read_list(str(source), str(root), "train", 1, data.DecodeFailures(str(tmp_path), 0), str(names))
    source = tmp_path / "COIN.json"
    rows = {"P04_tea": ("MakeTea", "training"), "a b": ("BoilNoodles", "testing")}
    rows = {name: {"class": label, "subset": subset, "annotation": []} for name, (label, subset) in rows.items()}
    source.write_text(json.dumps({"database": rows}))
    assert listed(source, root) == {"P04_tea.avi": "MakeTea"}
    assert listed(source, root, "validation") == {"a b.mp4": "BoilNoodles"}


def test_reads_the_lists_of_something_something(tmp_path):
    root, source = tmp_path / "videos", tmp_path / "something-something-v2-train.json"
    touch(root / "78687.webm", root / "42326.webm")
    rows = [("78687", "Holding [something] next to [something]"), ("42326", "Folding [something]")]
    rows = [{"id": i, "label": "holding a potato", "template": t, "placeholders": ["a potato"]} for i, t in rows]
    source.write_text(json.dumps(rows))
    assert listed(source, root) == {
        "78687.webm": "Holding something next to something",
        "42326.webm": "Folding something",
    }


def test_reads_the_splits_of_hmdb51(tmp_path):
    root, source = tmp_path / "videos", tmp_path / "splits"
    source.mkdir()
    names = ["a_brush_hair_u_nm_np1_ba_goo_0", "b#c_brush_hair_h_cm_np1_le_goo_0", "d_brush_hair_u_cm_np2_ri_goo_1"]
    touch(*(root / "brush_hair" / f"{name}.avi" for name in names), root / "sit" / "e_sit_f_cm_np1_fr_med_2.avi")
    uses = zip(names, (1, 2, 0), strict=True)
    (source / "brush_hair_test_split1.txt").write_text("".join(f"{name}.avi {use} \n" for name, use in uses))
    (source / "brush_hair_test_split2.txt").write_text(f"{names[2]}.avi 1 \n")
    (source / "sit_test_split1.txt").write_text("e_sit_f_cm_np1_fr_med_2.avi 1 \n")
    assert listed(source, root) == {
        f"brush_hair/{names[0]}.avi": "brush_hair",
        "sit/e_sit_f_cm_np1_fr_med_2.avi": "sit",
    }
    assert listed(source, root, "validation") == {f"brush_hair/{names[1]}.avi": "brush_hair"}
    with pytest.raises(ValueError, match="lists no train clips"):
        listed(tmp_path, root)


def still_clip(folder):
    frame = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    frame = np.repeat(np.repeat(frame[::8, ::8], 8, 0), 8, 1)
    return {
        "path": write_video(folder / "still.mp4", [frame] * 8, options={"crf": "0"}, pix_fmt="yuv444p"),
        "bytes": None,
    }


def tiny_processor():
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    return VideoMambaVideoProcessor(num_frames=4, frame_stride=2, **sizes)


def test_augmentation_is_the_same_for_all_frames_and_repeats_with_the_seed(tmp_path):
    """Of a still clip all frames stay alike; clips, epochs and seeds differ; the same three give the same clip."""
    processor, rows = tiny_processor(), [{"video": still_clip(tmp_path), "label": 0}] * 12
    args = data.DataArguments(rand_augment=2, rand_augment_magnitude=9, random_erasing=0.5, mirror_swaps="")
    augment = data.TrainTransform(processor, processor, args, [0], None)
    clips = data.Clips(rows, augment, None, seed=1, training=True)
    state = torch.get_rng_state()
    seen = [clips[index]["pixel_values"] for index in range(12)]
    assert torch.equal(state, torch.get_rng_state()), "drawing must not disturb the other random numbers"
    for frames in seen:
        assert frames.shape == (4, 3, 32, 32) and torch.equal(frames, frames[:1].expand_as(frames))
    assert len({frames.sum().item() for frames in seen}) == 12
    mean_colour = torch.tensor([round(255 * mean) for mean in processor.image_mean]).view(3, 1, 1)
    erased = [int((frames[0] == mean_colour).all(0).sum()) > 15 for frames in seen]
    assert any(erased) and not all(erased)
    again = data.Clips(rows, augment, None, seed=1, training=True)
    assert torch.equal(again[5]["pixel_values"], seen[5])
    again.set_epoch(1)
    assert not torch.equal(again[5]["pixel_values"], seen[5])


def test_workers_of_a_stream_augment_their_clips_differently():
    rows = IterableDataset.from_generator(
        lambda files: ({"video": None, "label": 0} for _ in files), gen_kwargs={"files": list(range(8))}
    )
    clips = data.ClipStream(rows, lambda video, label: torch.rand(()), None, seed=1)
    loader = torch.utils.data.DataLoader(clips, batch_size=None, num_workers=2)
    drawn = [clip.item() for clip in loader]
    assert len(drawn) == len(set(drawn)) == 8
    assert [clip.item() for clip in loader] == drawn


def test_names_and_skips_clips_that_cannot_be_read(tmp_path, caplog):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    rows = [{"video": {"path": str(tmp_path / "broken.mp4"), "bytes": None}, "label": 1}]
    rows += [{"video": still_clip(tmp_path), "label": 0}, {"video": {"path": "gone.mp4", "bytes": None}, "label": 1}]
    processor = tiny_processor()
    show = data.EvalTransform(processor, processor)
    failures = data.DecodeFailures(str(tmp_path / "out"), 1)

    seen = data.Clips(rows, show, failures)[0]
    assert seen["labels"] == -100 and seen["pixel_values"].shape == (4, 3, 32, 32)
    assert "broken.mp4" in caplog.text
    replaced = data.Clips(rows, show, failures, training=True)[0]  # known by now: does not count twice
    assert replaced["labels"] == 0
    with pytest.raises(RuntimeError, match="2 clips cannot be read.*--max_decode_failures 1.*gone.mp4"):
        data.Clips(rows, show, failures)[2]
    assert failures.names() == {str(tmp_path / "broken.mp4"), "gone.mp4"}
    with pytest.raises(RuntimeError, match="2 clips cannot be read"):  # the same again, without mending anything
        data.Clips(rows, show, data.DecodeFailures(str(tmp_path / "out"), 1))[2]


def test_accuracy_by_hand():
    """Seven labels; label 0 is right in 1 of 2 clips, label 6 in 0 of 1 but second; one clip could not be read."""
    scores = np.zeros((4, 7))
    scores[0, 0] = 1
    scores[1] = [0, 7, 6, 5, 4, 3, 2]
    scores[2] = [1, 9, 1, 1, 1, 1, 8]
    found = data.load_accuracy().compute(predictions=scores, references=[0, 0, 6, -100])
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["top5_accuracy"] == pytest.approx(2 / 3)
    assert found["mean_class_accuracy"] == pytest.approx((1 / 2 + 0) / 2)


def test_weight_decay_and_layer_decay_reach_the_right_weights():
    config = VideoMambaConfig(hidden_size=16, num_hidden_layers=2, image_size=32, num_frames=4)
    model = VideoMambaForVideoClassification(config)
    groups = models.parameter_groups(model, 1.0, 0.05, 0.5)
    name_of = {weight: name for name, weight in model.named_parameters()}
    found = {name_of[weight]: (group["weight_decay"], group["lr"]) for group in groups for weight in group["params"]}
    assert set(found) == set(name_of.values())
    decayed = {name.removeprefix("videomamba.") for name, (decay, _) in found.items() if decay}
    mixer = ("in_proj.weight", "conv_weight", "x_proj_weight", "dt_proj_weight", "out_proj.weight")
    assert decayed == {
        *("embeddings.patch_embeddings.projection.weight", "classifier.weight"),
        *(f"layers.{layer}.mixer.{name}" for layer in range(2) for name in mixer),
    }
    rates = {name: rate for name, (_, rate) in found.items()}
    assert rates["classifier.weight"] == rates["videomamba.norm.weight"] == 1
    assert rates["videomamba.layers.1.mixer.A_log"] == 0.5 and rates["videomamba.layers.0.norm.weight"] == 0.25
    assert rates["videomamba.embeddings.cls_token"] == 0.125


@pytest.mark.parametrize("name, epochs, rate", [("breakfast", 70, 2e-4), ("coin", 40, 2e-4), ("lvu", 70, 4e-4)])
def test_recipes_of_long_videos_are_their_authors(name, epochs, rate, monkeypatch):
    """Five epochs of warm-up, 32 frames spread over the whole video (OpenGVLab's scripts of VideoMamba-Ti)."""
    command = ["script", "--use_cpu", "--output_dir", "out", "--recipe", str(EXAMPLES / f"recipes/{name}.args")]
    monkeypatch.setattr(sys, "argv", command)
    for kind in (TrainingArguments, plain_loop.LoopArguments):
        model, clips, loop = data.parse_arguments(models.ModelArguments, data.DataArguments, kind)
        assert (model.num_frames, model.frame_stride, loop.learning_rate) == (32, 0, rate)
        assert loop.num_train_epochs == epochs and loop.warmup_steps * epochs == pytest.approx(5, abs=0.01)
        assert clips.mirror_swaps == "" and clips.random_erasing == 0.25


@pytest.mark.parametrize("name, mirrored", [("k400", True), ("ssv2", False), ("hmdb51", True)])
def test_recipes_train_as_the_paper_says(name, mirrored, tmp_path, monkeypatch):
    """One epoch of warm-up to 3e-4 and a cosine to zero, with either script; no mirrored clip of SSV2."""
    command = ["script", "--use_cpu", "--output_dir", str(tmp_path), "--recipe"]
    recipe = str(EXAMPLES / f"recipes/{name}.args")
    monkeypatch.setattr(sys, "argv", [*command, recipe, "--seed", "7"])
    for kind in (TrainingArguments, plain_loop.LoopArguments):
        _, clips, loop = data.parse_arguments(models.ModelArguments, data.DataArguments, kind)
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
    splits = {"train": [{"video": {"path": write_video(tmp_path / "bar.mp4", 8), "bytes": None}, "label": 0}] * 40}
    seen = data.transform_clips(splits, ["a", "b"], plain, reader, reader, None, 0)["train"]
    clips = (seen[index]["pixel_values"].int() for index in range(40))
    red_is_left = {bool(clip[0, 0, 4, 1] > clip[0, 0, 4, -2] + 60) for clip in clips}
    assert red_is_left == ({True, False} if mirrored else {True})
    monkeypatch.setattr(sys, "argv", [*command, "no such recipe"])
    with pytest.raises(FileNotFoundError, match="no such recipe"):
        data.parse_arguments(plain_loop.LoopArguments)


def test_bytes_normalized_on_the_device_are_what_the_processor_gives(tmp_path):
    """The path of the frames as uint8 against that of float32: the processor's for users, and torchvision's."""
    processor, clip = tiny_processor(), still_clip(tmp_path)
    normalize = data.Normalize(processor, "cpu")
    frames = data.EvalTransform(processor, processor)(clip, 0)["pixel_values"]
    assert frames.dtype == torch.uint8
    expected = processor(clip["path"], return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(normalize(frames), expected, atol=1e-6, rtol=1e-6)
    augment = data.TrainTransform(processor, processor, data.DataArguments(rand_augment=1), None, None)
    frames = augment(clip, 0)["pixel_values"]
    assert frames.dtype == torch.uint8
    as_float = v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize(processor.image_mean, processor.image_std)]
    )
    torch.testing.assert_close(normalize(frames), as_float(frames), atol=1e-6, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------

AUGMENTED = ["--rand_augment", 1, "--random_erasing", 0.5, "--mirror_swaps", "to the left:to the right"]


@pytest.mark.parametrize(
    "name, kills, steps", [("run_video_classification_no_trainer", 10, 40), ("run_video_classification", 3, 20)]
)
def test_killed_at_any_moment_it_goes_on_as_if_nothing_had_happened(folders, scripts, tmp_path, name, kills, steps):
    """The same losses to the bit, and never half a checkpoint; a damaged one is passed over."""
    settings = [*AUGMENTED, "--num_hidden_layers", 2, "--drop_path_rate", 0.5, "--per_device_train_batch_size", 2]
    settings += ["--max_steps", steps, "--gradient_accumulation_steps", 2, "--save_steps", 1, "--save_total_limit", 3]
    settings += ["--do_train", "--report_to", "none"] if name == "run_video_classification" else []
    run(scripts, name, *training(folders, tmp_path / "whole", *settings))
    expected = losses(tmp_path / "whole")
    assert list(expected) == list(range(1, steps + 1)) and len(set(expected.values())) > 0.8 * steps

    output, rng = tmp_path / "killed", random.Random(0)
    for kill in range(kills):
        before = checkpoints(output)
        process, log = scripts(name, training(folders, output, *settings))
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
    run(scripts, name, *training(folders, output, *settings))
    assert losses(output) == expected
    assert (output / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert not list(output.glob("*.part"))


@pytest.mark.parametrize("name", ["run_video_classification_no_trainer", "run_video_classification"])
def test_lora_trains_adapters_that_load_and_merge(folders, hub, scripts, tmp_path, name):
    """What is pushed are the merged model, and the adapter, which on the model that it started from does the same."""
    config = VideoMambaConfig(hidden_size=16, num_hidden_layers=1, image_size=32, num_frames=4, scan_backend="torch")
    config.id2label, config.label2id = dict(enumerate(NAMES)), {label: i for i, label in enumerate(NAMES)}
    start, repository = tmp_path / "start", f"you/lora-{name}"
    torch.manual_seed(0)
    for part in (VideoMambaForVideoClassification(config), tiny_processor(), VideoMambaImageProcessor()):
        part.save_pretrained(start)
    command = training(folders, tmp_path / "out", "--lora_rank", 2, "--model_name_or_path", start, "--max_steps", 4)
    command += ["--learning_rate", 1e-2, "--save_steps", 2, "--report_to", "none", "--push_to_hub"]
    command += ["--hub_model_id", repository, *(["--do_train", "--do_eval"] if name[-1] == "n" else [])]
    run(scripts, name, *command)
    expected = losses(tmp_path / "out")
    assert len(expected) == 4
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    run(scripts, name, *command)
    assert losses(tmp_path / "out") == expected, "resumed from the adapters in the middle"

    files = {file: content for file, content in hub.files[repository].items() if not file.endswith((".png", ".csv"))}
    for file, content in files.items():
        touch(tmp_path / "pushed" / file)
        (tmp_path / "pushed" / file).write_bytes(content)
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


def checkpoints(folder):
    return sorted(int(path.name[11:]) for path in folder.glob("checkpoint-*"))


def test_two_processes_train_and_evaluate_as_one(folders, scripts, tmp_path):
    """The same clips to a step, half in each process: the same losses but for rounding, with both scripts."""
    settings = [*AUGMENTED, "--num_train_epochs", 2, "--max_grad_norm", 0.1, "--label_smoothing_factor", 0.1]
    for name in ("run_video_classification_no_trainer", "run_video_classification"):
        more = settings
        if name == "run_video_classification":
            more = [*settings, "--do_train", "--do_eval", "--report_to", "none", "--save_steps", 2]
        one, two = tmp_path / name / "one", tmp_path / name / "two"
        run(scripts, name, *training(folders, one, *more, "--per_device_train_batch_size", 4))
        run_twice(scripts, name, *training(folders, two, *more, "--per_device_train_batch_size", 2))
        assert len(losses(one)) == 4 and len(set(losses(one).values())) == 4
        assert losses(two) == pytest.approx(losses(one), abs=2e-6)
    manifest = json.loads((two / "checkpoint-4" / models.MANIFEST).read_text())
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(manifest) and not list(two.glob("*.part"))

    # Three clips for two processes: one of them gets a clip more, and none is counted twice.
    few = tmp_path / "few" / "validation"
    shutil.copytree(folders / "validation", few)
    (few / NAMES[0] / "1.mp4").unlink()
    look = ["--model_name_or_path", one, "--validation_dir", few, "--use_cpu", "--num_clips", 2, "--num_crops", 3]
    run(scripts, "evaluate_video_classification", *look, "--output_dir", tmp_path / "alone")
    run_twice(scripts, "evaluate_video_classification", *look, "--output_dir", tmp_path / "together")
    for file in ("predictions.csv", "classes.csv", "results.json"):
        assert (tmp_path / "alone" / file).read_text() == (tmp_path / "together" / file).read_text()
    with open(tmp_path / "together" / "predictions.csv", newline="") as file:
        rows = [row["clip"] for row in csv.DictReader(file)]
    assert len(rows) == len(set(rows)) == 3


def test_a_damaged_checkpoint_of_the_trainer_is_passed_over(folders, scripts, tmp_path):
    settings = [*AUGMENTED, "--do_train", "--max_steps", 6, "--save_steps", 2, "--report_to", "none"]
    name, output = "run_video_classification", tmp_path / "out"
    command = training(folders, output, *settings, "--per_device_train_batch_size", 4)
    run(scripts, name, *command)
    expected, weights = losses(output), (output / "model.safetensors").read_bytes()
    (output / "checkpoint-6" / models.MANIFEST).unlink()  # as if killed while it was written
    scheduler = output / "checkpoint-4" / "scheduler.pt"
    scheduler.write_bytes(scheduler.read_bytes()[:-100])
    (output / "model.safetensors").unlink()
    text = run(scripts, name, *command)
    assert "checkpoint-6 is incomplete or damaged" in text and "(scheduler.pt)" in text
    assert losses(output) == expected and (output / "model.safetensors").read_bytes() == weights


def test_keeps_the_newest_and_the_best_checkpoints(tmp_path):
    def keep(step, limit, best=None):
        touch(tmp_path / "written" / "weights")
        models.keep_checkpoint(tmp_path / "written", tmp_path, step, limit, best)
        return checkpoints(tmp_path)

    assert [keep(step, None) for step in (8, 9, 10, 11)][-1] == [8, 9, 10, 11]
    assert keep(12, 3, best=8) == [8, 11, 12]
    assert keep(9, 2) == [9, 12], "one of an earlier, longer run counts, but what has just been written stays"
    assert keep(13, 1) == [13] and keep(13, 1) == [13]
    assert models.newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-13")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-13"}


class Clock:
    """Stands in for `time`, and moves when told to."""

    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.mark.parametrize("reading, hints", [(3.0, 1), (0.3, 0)])
def test_says_what_to_do_if_reading_limits_the_speed(monkeypatch, caplog, reading, hints):
    """Batches of four clips that come after `reading` seconds and take the model one; two CPU seconds to read one."""
    PartialState()
    clock, clips = Clock(), data.ClipReader(None, None, None)
    monkeypatch.setattr(data, "time", clock)

    def batches():
        for _ in range(3):
            clock.now += reading
            clips.work += torch.tensor([4.0, 8.0])
            yield {"labels": torch.zeros(4)}

    stopwatch = data.Stopwatch(clips, 2)
    for _ in range(3):
        clock.now += 100  # an evaluation
        stopwatch.restart()
        for _ in stopwatch.watch(batches()):
            clock.now += 1
        values = stopwatch.read()
        assert values["clips_per_second"] == pytest.approx(4 / (1 + reading))
        assert values["waiting"] == pytest.approx(reading / (1 + reading)) and values["clips_per_core_second"] == 0.5
    assert caplog.text.count("Raise --dataloader_num_workers (it is 2") == hints
    if hints:
        assert (
            "75% of the time" in caplog.text and "0.5 of them a second; the model could take up to 4.0" in caplog.text
        )


def test_workers_decode_with_one_thread_each(tmp_path):
    """They share the cores already; a single process uses them all, which libav calls 0 threads."""
    path = write_video(tmp_path / "clip.mp4", 8)

    class Threads(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            with video_decoding.open_pyav(path, "clip.mp4") as (_, stream):
                return stream.codec_context.thread_count

    assert Threads()[0] == 0 and next(iter(torch.utils.data.DataLoader(Threads(), num_workers=1))).item() == 1


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


def test_views_lie_where_papers_put_them(tmp_path):
    """Of 30 numbered frames of 64 x 96: clips at the two ends; crops at the left, in the middle, at the right."""
    processor = tiny_processor()
    path = write_video(tmp_path / "numbered.mp4", 30, size=(64, 96), options={"crf": "0"}, pix_fmt="yuv444p")
    video = {"path": path, "bytes": None}
    views, normalize = evaluation.ViewsTransform(processor, processor, 2, 3), data.Normalize(processor, "cpu")
    found = normalize(views(video, 1)["views"])
    assert found.shape == (6, 4, 3, 32, 32)
    frames, _ = processor.fetch_videos(path)
    shrunk = torch.nn.functional.interpolate(
        frames.permute(0, 3, 1, 2).float(), (32, 48), mode="bilinear", antialias=True, align_corners=False
    )
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (processor.image_mean, processor.image_std))
    expected = [
        ((shrunk[start : start + 7 : 2, :, :, left : left + 32] / 255 - mean) / std)
        for left in (0, 8, 16)
        for start in (0, 23)
    ]
    torch.testing.assert_close(found, torch.stack(expected), atol=0.02, rtol=0)  # rounded to whole numbers, or not

    one = normalize(evaluation.ViewsTransform(processor, processor, 1, 1)(video, 0)["views"])
    torch.testing.assert_close(one, processor(path, return_tensors="pt")["pixel_values"], atol=1e-5, rtol=0)


def test_clips_of_sparse_sampling_begin_one_after_the_other():
    """Of 41 frames, 4 are wanted: 10 apart, from 0; three clips are shifted by quarters of these 10."""
    reader = types.SimpleNamespace(num_frames=4, frame_stride=None)
    transform = evaluation.ViewsTransform(reader, tiny_processor(), 3, 1)
    found = transform.sample(types.SimpleNamespace(total_num_frames=41)).reshape(3, 4).tolist()
    assert found == [[2, 12, 22, 32], [5, 15, 25, 35], [7, 17, 27, 37]]
    short = transform.sample(types.SimpleNamespace(total_num_frames=2)).reshape(3, 4)
    assert short.min() >= 0 and short.max() <= 1


def test_scores_are_the_mean_over_views(folders, tmp_path, monkeypatch):
    """Against a loop over views with the model alone; the report's numbers against those of the predictions."""
    config = VideoMambaConfig(hidden_size=16, num_hidden_layers=1, image_size=32, num_frames=4, initializer_range=1.0)
    config.id2label, config.label2id = dict(enumerate(NAMES)), {name: i for i, name in enumerate(NAMES)}
    torch.manual_seed(0)
    model = VideoMambaForVideoClassification(config).eval()
    model.save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    broken = tmp_path / "clips" / NAMES[0] / "broken.mp4"
    shutil.copytree(folders / "validation", tmp_path / "clips")
    broken.write_bytes(b"no video")
    command = ["--model_name_or_path", tmp_path / "model", "--validation_dir", tmp_path / "clips", "--use_cpu"]
    command += ["--output_dir", tmp_path / "out", "--num_clips", 2, "--num_crops", 2, "--max_decode_failures", 1]
    VideoMambaImageProcessor().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, [*command, "--max_views_per_step", 3])])
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        evaluation.main()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["clips"] == 4 and results["skipped"] == 1 and "1 could not be read" in printed.getvalue()

    processor = AutoVideoProcessor.from_pretrained(tmp_path / "model")
    transform, normalize = evaluation.ViewsTransform(processor, processor, 2, 2), data.Normalize(processor, "cpu")
    saved = np.load(tmp_path / "out" / "scores.npz")
    with open(tmp_path / "out" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    right = []
    for row, scores in zip(rows, saved["scores"][saved["labels"] >= 0], strict=True):
        with torch.no_grad():
            views = normalize(transform(row_clip(row), 0)["views"])
            views = [model(view[None]).logits.softmax(-1)[0] for view in views]
        expected = torch.stack(views).mean(0)
        np.testing.assert_allclose(scores, expected, atol=1e-5)
        assert row["label"] == Path(row["clip"]).parent.name and row["predicted"] == NAMES[expected.argmax()]
        right.append(row["label"] == row["predicted"])
    assert results["accuracy"] == np.mean(right)
    assert (tmp_path / "out" / "confusion_matrix.png").stat().st_size > 1000


def row_clip(row):
    return {"path": row["clip"], "bytes": None}


def test_bootstrap_interval_is_that_of_the_binomial():
    """Of 400 clips with 300 right, the normal approximation gives 0.75 +- 1.96 * 0.02165."""
    low, high = evaluation.bootstrap(np.repeat([1.0, 0.0], [300, 100]), 4000)
    assert low == pytest.approx(0.7076, abs=0.004) and high == pytest.approx(0.7924, abs=0.004)


# ---------------------------------------------------------------------------------------------------------------------
# The Hub
# ---------------------------------------------------------------------------------------------------------------------

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


def test_trains_on_a_data_set_of_the_hub_and_pushes_what_others_can_load(folders, hub, scripts, tmp_path):
    paths = sorted(folders.rglob("*.mp4"))
    hub.files["datasets/you/clips"] = {str(path.relative_to(folders)): path.read_bytes() for path in paths}
    settings = ["--dataset_name", "you/clips", "--use_cpu", *TINY, "--max_steps", 2, "--push_to_hub"]
    settings += ["--logging_steps", 1, "--report_to", "none", "--hub_token", "hf_secret"]
    trainer = ["--do_train", "--do_eval", "--hub_model_id", "you/trained", "--hub_private_repo", "True"]
    run(scripts, "run_video_classification", *settings, *trainer, "--output_dir", tmp_path / "trained")
    plain = ["--hub_model_id", "you/plain", "--streaming"]
    run(scripts, "run_video_classification_no_trainer", *settings, *plain, "--output_dir", tmp_path / "plain")
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
            *("accuracy", "top5_accuracy", "mean_class_accuracy"),
        }
        assert card.datasets == ["you/clips"] and card.pipeline_tag == "video-classification"

    model = AutoModelForVideoClassification.from_pretrained(tmp_path / "trained").eval()
    clip = folders / "validation" / NAMES[0] / "0.mp4"
    pixels = AutoVideoProcessor.from_pretrained(tmp_path / "trained")(str(clip), return_tensors="pt")["pixel_values"]
    torch.save(pixels, tmp_path / "pixels.pt")
    inputs = ["you/trained", tmp_path / "pixels.pt", clip, tmp_path / "logits.pt"]
    environment = {**os.environ, **hub_environment(hub, tmp_path / "empty")}
    done = subprocess.run(
        [sys.executable, "-c", FROM_THE_HUB, *map(str, inputs)],
        **{"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 120},
    )
    assert done.returncode == 0, done.stderr
    scores, labels, names = json.loads(done.stdout.splitlines()[-1])
    with torch.no_grad(), use_scan_backend("torch"):
        expected = model(pixels).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), expected)
    found = {entry["label"]: entry["score"] for entry in scores}
    expected = dict(zip(NAMES, expected.softmax(-1)[0].tolist(), strict=True))
    assert found == pytest.approx(expected, abs=1e-6)
    assert sorted(labels) == [0, 0, 1, 1] and names == NAMES


def test_the_trainer_streams_and_resumes(folders, scripts, tmp_path):
    """The clips of a stream come in the same order again; each of its validation clips is counted once."""
    clips = ["--dataset_name", folders, "--streaming", "--use_cpu", *TINY, *AUGMENTED, "--report_to", "none"]
    clips += ["--do_train", "--do_eval", "--max_steps", 4, "--save_steps", 2, "--logging_steps", 1]
    command = [*clips, "--per_device_train_batch_size", 3, "--output_dir", tmp_path]
    run(scripts, "run_video_classification", *command)
    expected, weights = losses(tmp_path), (tmp_path / "model.safetensors").read_bytes()
    assert len(set(expected.values())) == 4
    shutil.rmtree(tmp_path / "checkpoint-4")
    (tmp_path / "model.safetensors").unlink()
    run(scripts, "run_video_classification", *command)
    assert losses(tmp_path) == expected and (tmp_path / "model.safetensors").read_bytes() == weights
    with open(tmp_path / "classes.csv", newline="") as file:
        assert [(row["label"], row["clips"]) for row in csv.DictReader(file)] == [(name, "2") for name in NAMES]


def test_says_before_training_that_it_may_not_push(folders, hub, scripts, tmp_path):
    for name in ("run_video_classification", "run_video_classification_no_trainer"):
        more = ["--push_to_hub", "--hub_model_id", "you/forbidden"] + ["--do_train"] * (name[-1] == "n")
        command = training(folders, tmp_path / name, *more, "--hub_token", "hf_reader")
        text = run(scripts, name, *command, fails=True)
        assert "PermissionError: Cannot write to the Hub repository you/forbidden" in text and "hf auth login" in text
        assert "you/forbidden" not in hub.files and not list(tmp_path.rglob("*.safetensors"))


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


def load(splits=("train", "validation"), **arguments):
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()}
    return data.load_clips(data.DataArguments(**arguments), splits, 0, None)


def test_bad_data_is_refused_with_advice(folders, tmp_path):
    both = {"train_dir": folders / "train", "validation_dir": folders / "validation"}
    splits, names = load(**both)
    assert names == NAMES and len(splits["train"]) == 8
    with pytest.raises(ValueError, match=r"no column \['film'\], only \['video', 'label'\].*--video_column"):
        load(**both, video_column="film")
    with pytest.raises(ValueError, match=r"no column \['label'\]"):
        load(["validation"], validation_dir=folders / "validation" / NAMES[0])
    with pytest.raises(ValueError, match="must hold videos"):
        load(**both, video_column="label")
    with pytest.raises(ValueError, match="--streaming is for a data set of the Hub"):
        load(**both, streaming=True)
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        load(["train"], train_dir=tmp_path / "nowhere")
    with pytest.raises(ConnectionError, match="you/nowhere could not be loaded.*--train_dir"):
        load(dataset_name="you/nowhere")
    shutil.copytree(folders / "validation" / NAMES[0], tmp_path / "validation" / NAMES[0])
    shutil.copytree(folders / "validation" / NAMES[0], tmp_path / "strange" / "upwards")
    missing = {"train_dir": folders / "train", "validation_dir": tmp_path / "validation"}
    with pytest.raises(ValueError, match=r"no validation clip of \['to the right'\].*--allow_missing_classes"):
        load(**missing)
    with pytest.raises(ValueError, match=r"labels \['upwards'\], which the model or the training clips lack"):
        load(train_dir=folders / "train", validation_dir=tmp_path / "strange")


def test_says_that_frames_are_repeated(tmp_path, caplog):
    data.logger.warning_once.cache_clear()
    video = {"path": write_video(tmp_path / "short.mp4", 3), "bytes": None}
    for _ in range(2):
        assert len(data.read_frames(tiny_processor(), video)) == 4
    assert caplog.text.count("fewer frames than the 4 of the model") == 1
