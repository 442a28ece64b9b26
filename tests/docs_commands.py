"""The fenced blocks of the Markdown pages as commands and snippets, on data so small that each takes seconds."""

import csv
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import ViTConfig, ViTImageProcessor, ViTModel

import modeling_videomamba as ours
from make_camera_motion_clips import LABELS
from plain_vision_mamba import random_weights
from training_clips import tiny_processor
from video_files import numbered_frames, write_moving_bars, write_video


ROOT = Path(__file__).resolve().parent.parent
SHIPPED = "model_cards/videomamba-tiny-camera-motion"
# What cannot run in a test: the beginning of a command, and why.
LEFT_OUT = {
    "pip install": "asks a package index",
    "make": "makes .venv; test_packaging.py and the tests themselves do what it does",
    "pre-commit": "comes from the line above it, which asks a package index",
    "ffmpeg": "makes the films of a measurement that no test makes",
    "hf upload": "asks the Hub for rights",
    "python -m http.server": "serves until it is stopped",
    "python examples/tools/space/app.py": "serves until it is stopped; test_space.py starts the page",
    "python examples/deploy/browser/build.py": "asks npm; test_export.py builds the page",
    "python examples/benchmarks/benchmark.py": "times whole models for an hour; test_benchmark.py runs a small one",
    "python examples/benchmarks/benchmark_parallel.py": "needs several GPUs",
    "python examples/benchmarks/benchmark_kernel.py": "needs a GPU",
    "python examples/benchmarks/benchmark_decoding.py": "measures for minutes; no figure is made in a test",
    "python examples/tools/tag_video.py --live": "waits for a camera; test_tag_video.py has one",
    "python examples/training/run_video_classification.py --recipe examples/training/recipes/camera_motion_"
    "tagger.args": "goes on from the weights of version 0.2, which do not ship",
    "python examples/training/train_streaming.py": "test_train_streaming.py runs it",
    "python examples/made_clips/measure_camera_motion.py": "renders for minutes",
    "accelerate launch --num_processes 2": "needs two GPUs; test_training_scripts.py runs two processes",
    "torchrun --nproc_per_node 2": "needs two GPUs; test_training_scripts.py runs two processes",
}
# Flags with the values that make a command small; None leaves out the flag, which asks for a GPU or a compiler.
SMALL = {
    **dict.fromkeys(
        ["--epochs", "--num_train_epochs", "--max_steps", "--logging_steps", "--dataloader_num_workers"], "1"
    ),
    **dict.fromkeys(["--clips_per_label", "--train_per_class"], "5"),
    **dict.fromkeys(["--per_device_train_batch_size", "--per_device_eval_batch_size", "--repeats"], "1"),
    **dict.fromkeys(["--num_workers", "--seeds"], "1"),
    **{
        "--dataloader_num_workers": "0",
        "--num_clips": "1",
        "--num_crops": "1",
        "--minutes": "0.2",
        "--warmup_steps": "0",
    },
    **dict.fromkeys(["--bf16", "--torch_compile", "--report_to", "--dataloader_persistent_workers"]),
}
TRAIN_BY_TRAINER = ("finetune", "run_image_classification", "run_video_classification")
# A new model of such a size, where a command trains one.
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "image_size": 32}


def blocks(page):
    """The fenced blocks of a page: (line, language, text)."""
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^( *)```(\w+)\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL):
        lines = found[3].splitlines()
        yield (
            text.count("\n", 0, found.start()) + 1,
            found[2],
            "\n".join(line.removeprefix(found[1]) for line in lines),
        )


def words_of(scripts, folder):
    """
    The commands that a shell would start, as lists of words, for each of the scripts of a page.

    Bash reads them: its variables, loops and functions last from one script to the next. It finds no program, and
    writes down what it was to start.
    """
    log = folder / "commands"
    lines = ['command_not_found_handle() { printf "%s\\0" "$#" "$@" >&3; }']
    for script in scripts:
        lines += ['printf "%s\\0" next >&3', script]
    with open(log, "wb") as file:
        reading = subprocess.run(
            ["/bin/bash", "-c", "exec 3>&1 >/dev/null\n" + "\n".join(lines)],
            stdout=file,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={"PATH": "/nowhere", "TIMEFORMAT": ""},  # `time` says nothing
            timeout=60,
        )
    assert not reading.stderr, reading.stderr
    found, words = [], iter(log.read_text(encoding="utf-8").split("\0")[:-1])
    for word in words:
        if word == "next":
            found.append([])
        else:
            found[-1].append([next(words) for _ in range(int(word))])
    return found


def shrink(words):
    """The same command with little to do."""
    small, skip = [], 0
    for i, word in enumerate(words):
        if skip:
            skip -= 1
        elif word in SMALL:
            values = next((n for n, other in enumerate(words[i + 1 :]) if other.startswith("-")), len(words) - i - 1)
            if not (word == "--max_steps" and words[i + 1] == "0") and SMALL[word] is not None:
                small += [word, SMALL[word]] if values else [word]
            skip = values
        else:
            small.append(word)
    return small


def python_words(words):
    """What to give to Python for a command of a page."""
    program, *rest = shrink(words)
    if program == "accelerate":
        rest = rest[1:]  # `launch`: one process
    elif program == "videomamba-convert":
        rest = ["-m", "conversion", *rest]
    elif program.startswith("videomamba-"):
        name = program.removeprefix("videomamba-").replace("-", "_")
        rest = ["-c", f"import sys; sys.argv[0] = {program!r}; from examples import {name}; {name}()", *rest]
    else:
        assert program in ("python", "torchrun"), f"no test runs {program}: {words}"
    rest = [SHIPPED if word.endswith("/train-...") else word for word in rest]  # a run's folder, whose name is a hash
    script = Path(rest[0]).stem
    if script.startswith("make_") and "--clips_per_label" not in rest:
        rest += ["--clips_per_label", "2"]
    if script == "study":
        rest.insert(rest.index("--") if "--" in rest else len(rest), "--dry_run")  # test_study.py runs them
    elif script.startswith("run_") or script in TRAIN_BY_TRAINER:
        by_trainer = script in TRAIN_BY_TRAINER
        rest += ["--max_steps", "1", "--per_device_train_batch_size", "2"]
        rest += ["--use_cpu"] * by_trainer + ["--report_to", "none"]
        if script == "run_image_classification":
            return rest
        rest += ["--max_decode_failures", "0"]
        if not {"--model_name_or_path", "--config_name"} & set(rest):
            rest += [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
    return rest


# ---------------------------------------------------------------------------------------------------------------------
# What the pages speak of
# ---------------------------------------------------------------------------------------------------------------------


def write_tiny_model(folder, **fields):
    """A classifier of two labels with both processors."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "image_size": 32, "num_frames": 4}
    model = ours.VideoMambaForVideoClassification(ours.VideoMambaConfig(**sizes | fields))
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    crop = {"height": 32, "width": 32}
    ours.VideoMambaImageProcessor(size={"shortest_edge": 32}, crop_size=crop).save_pretrained(folder)


def write_image_model(folder):
    config = ours.VideoMambaConfig(**TINY, num_frames=1, tubelet_size=1, num_labels=2)
    ours.VideoMambaForImageClassification(config).save_pretrained(folder)
    crop = {"height": 32, "width": 32}
    processor = ours.VideoMambaImageProcessor(single_images=True, size={"shortest_edge": 32}, crop_size=crop)
    processor.save_pretrained(folder)


def write_data(folder, made=()):
    """What a reader has: a clone, clips, pictures, and the data sets that the pages name, without the `made` ones."""
    for name in ("conversion", "docs", "examples", "model_cards", "modeling_videomamba"):
        (folder / name).symlink_to(ROOT / name)
    write_video(folder / "clip.mp4", numbered_frames(40))
    write_video(folder / "film.mkv", [np.zeros((32, 32, 3), np.uint8)] * 3620, rate=1)
    rng = np.random.default_rng(0)
    for name in ("caltech101", "pictures", "pictures-by-split/train", "pictures-by-split/validation"):
        for label in ("ant", "bass"):
            (folder / name / label).mkdir(parents=True)
            for number in range(12):
                small = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
                picture = Image.fromarray(small).resize((160, 120), Image.Resampling.BICUBIC)
                picture.save(folder / name / label / f"image_{number:04d}.jpg")
    picture.save(folder / "picture.jpg")
    for name in ("fights", "labelled-clips", "folds/0", "surveillance_fights", "clips"):
        write_moving_bars(folder / name, {"train": 2, "validation": 2})
    for name in ("clips/train", "clips/validation"):
        (folder / name / "to the left").rename(folder / name / "fight")
        (folder / name / "to the right").rename(folder / name / "no_fight")
    shutil.copy(folder / "clip.mp4", folder / "clips/validation/fight/fi097.mp4")
    streaming = {"backward_scan": "spatial", "class_token_position": "none", "position_embedding_type": "none"}
    streaming |= {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
    write_tiny_model(folder / "my-streaming-checkpoint", **streaming)
    write_lists(folder)
    for name in made:
        shutil.rmtree(folder / name)


def write_lists(folder):
    """HMDB51, Kinetics-400, COIN and Charades as their authors give them, of two labels."""
    labels = ["to the left", "to the right"]
    for name in ("hmdb51/splits", "kinetics/clips", "coin/videos"):
        (folder / name).mkdir(parents=True)
    rows, coin = [], {}
    for label in labels:
        (folder / "hmdb51/videos" / label).mkdir(parents=True)
        lines = []
        for number in range(4):
            source = (
                folder / "labelled-clips" / ("train" if number < 2 else "validation") / label / f"{number % 2}.mp4"
            )
            name = f"{label.replace(' ', '_')}_{number}"
            (folder / "hmdb51/videos" / label / f"{name}.avi").symlink_to(source)
            lines.append(f"{name}.avi {1 + number // 2} \n")
            video = f"{len(rows):011d}"
            (folder / "kinetics/clips" / f"{video}_000000_000010.mp4").symlink_to(source)
            rows.append([label, video, 0, 10, "train" if number < 2 else "val"])
            (folder / "coin/videos" / f"{name}.mp4").symlink_to(source)
            coin[name] = {"class": label, "subset": "training" if number < 2 else "testing"}
        (folder / "hmdb51/splits" / f"{label}_test_split1.txt").write_text("".join(lines))
    for split in ("train", "val"):
        with open(folder / "kinetics" / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("label", "youtube_id", "time_start", "time_end", "split")])
            csv.writer(file).writerows(row for row in rows if row[-1] == split)
    (folder / "COIN.json").write_text(json.dumps({"database": coin}))
    (folder / "Charades").mkdir()
    (folder / "Charades" / "Charades_v1_classes.txt").write_text("c000 Holding clothes\nc001 Opening a door\n")
    (folder / "Charades_v1_480").symlink_to(folder / "coin/videos")
    for split, subset in (("train", "training"), ("test", "testing")):
        ids = [name for name, row in coin.items() if row["subset"] == subset]
        actions = ["c000 0.00 0.30;c001 0.10 0.20", "c001 0.00 0.30", ""]
        lines = [f"{name},{actions[number % 3]},0.32" for number, name in enumerate(ids)]
        text = "\n".join(["id,actions,length", *lines])
        (folder / "Charades" / f"Charades_v1_{split}.csv").write_text(text, encoding="utf-8")


def fill_hub(hub, folder):
    """The repositories of the pages: tiny models, and files in the formats of other projects."""

    def upload(name, folder):
        hub.files[name] = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    write_tiny_model(folder / "tiny")
    write_image_model(folder / "image")
    for name in ("videomamba-k400", "videomamba-tiny-k400-f32"):
        upload(f"you/{name}", folder / "tiny")
    upload("you/videomamba-imagenet", folder / "image")
    sizes = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 24}
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=16)).save_pretrained(folder / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    upload("openai/clip-vit-base-patch16", folder / "vit")
    for repository, name, family, labels in (
        ("OpenGVLab/VideoMamba", "videomamba_s16_k400_f16_res224.pth", "opengvlab", 400),
        ("hustvl/Vim-small-midclstok", "vim_s_midclstok_80p5acc.pth", "vim", 1000),
    ):
        weights = random_weights(family, labels=labels, hidden_size=384, depth=1, frames=16)
        torch.save({"model": weights}, folder / name)
        hub.files[repository] = {name: (folder / name).read_bytes()}
