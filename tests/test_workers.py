"""
Scripts whose workers are spawned, as on Windows and macOS, or come from a fork server, as with Python 3.14 on Linux:
what reads clips travels to them as a pickle.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modeling_videomamba import (
    VideoMambaConfig,
    VideoMambaForVideoClassification,
    VideoMambaForVideoFrameClassification,
    VideoMambaImageProcessor,
)
from training_clips import NAMES, tiny_processor


EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

# As Python runs a script, whose file the workers import anew.
RUN = """
import multiprocessing, runpy, sys
del sys.argv[0]
multiprocessing.set_start_method(sys.argv.pop(0))
runpy.run_path(sys.argv[0], run_name="__main__")
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A tiny model of the two labels of the clips, with random weights."""
    return save_model(VideoMambaForVideoClassification, tmp_path_factory.mktemp("a start"))


def save_model(kind, folder, **fields):
    config = {"hidden_size": 16, "num_hidden_layers": 1, "image_size": 32, "num_frames": 4}
    config |= {"id2label": dict(enumerate(NAMES)), "label2id": {name: number for number, name in enumerate(NAMES)}}
    kind(VideoMambaConfig(**config | fields)).save_pretrained(folder)
    processor = tiny_processor()
    processor.save_pretrained(folder)
    VideoMambaImageProcessor(size=processor.size, crop_size=processor.crop_size).save_pretrained(folder)
    return folder


def command(script, bars, start, output):
    """Its flags, for two workers and as little work as there can be."""
    model, folders = ["--model_name_or_path", start], ["--validation_dir", bars / "validation"]
    trainer = ["--use_cpu", "--max_steps", 1, "--report_to", "none", "--dataloader_num_workers", 2]
    whole = ["--train_dir", bars / "train", *folders, "--output_dir", output, "--dataloader_num_workers", 2]
    whole += ["--use_cpu", "--max_steps", 1]
    pictures, streams = bars.parent / "pictures", start.parent / "a stream"
    if script == "made_clips/measure_streaming.py":
        stream = {"backward_scan": "spatial", "position_embedding_type": "none", "class_token_position": "none"}
        save_model(VideoMambaForVideoFrameClassification, streams, **stream)
    make = [pictures, output, "--clips_per_label", 1, "--num_workers", 2]
    return {
        "training/finetune.py": [*model, "--dataset", bars, "--output_dir", output, *trainer, "--eval_strategy", "no"]
        + ["--save_strategy", "no", "--load_best_model_at_end", "False"],
        "training/run_video_classification.py": [*model, *whole, "--do_train", "--report_to", "none"],
        "training/run_video_classification_no_trainer.py": [*model, *whole],
        "training/evaluate_video_classification.py": [*model, *folders, "--output_dir", output]
        + ["--dataloader_num_workers", 2, "--use_cpu"],
        "training/run_image_classification.py": ["--dataset", pictures, "--output_dir", output, *trainer]
        + ["--config_overrides", "hidden_size=16,num_hidden_layers=1,image_size=32", "--eval_strategy", "no"],
        "training/distill_video_classification.py": ["--data", bars / "train", "--teacher", start, "--student", start]
        + ["--output_dir", output, "--epochs", 1, "--num_workers", 2],
        "tools/classify_clips.py": [bars / "validation", "--model", start, "--output", output, "--num_workers", 2],
        "made_clips/make_camera_motion_clips.py": make,
        "made_clips/make_object_motion_clips.py": [*make, "--held_out", 0],
        "made_clips/measure_streaming.py": [bars / "train", "--model", streams, "--minutes", 0.1, "--streams", 2]
        + ["--num_workers", 2],
    }[script]


@pytest.fixture(scope="module")
def pictures(bars):
    for split in ("train", "validation"):
        for number, name in enumerate(NAMES):
            folder = bars.parent / "pictures" / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for count in range(2):
                Image.fromarray(np.full((40, 40, 3), 100 * number + count, np.uint8)).save(folder / f"{count}.png")


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
@pytest.mark.parametrize(
    "script",
    [
        "training/finetune.py",
        "training/run_video_classification.py",
        "training/run_video_classification_no_trainer.py",
        "training/evaluate_video_classification.py",
        "training/run_image_classification.py",
        "training/distill_video_classification.py",
        "tools/classify_clips.py",
        "made_clips/make_camera_motion_clips.py",
        "made_clips/make_object_motion_clips.py",
        "made_clips/measure_streaming.py",
    ],
)
def test_two_workers_that_are_not_forked(script, method, bars, pictures, start, tmp_path):
    paths = [str((EXAMPLES / script).parent), str(EXAMPLES.parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    environment["VIDEOMAMBA_SCAN_BACKEND"] = "torch"
    arguments = command(script, bars, start, tmp_path / "out two")
    done = subprocess.run(
        [sys.executable, "-c", RUN, method, str(EXAMPLES / script), *map(str, arguments)],
        **{"env": environment, "capture_output": True, "text": True, "timeout": 280, "cwd": tmp_path},
    )
    assert done.returncode == 0, done.stderr
    if script == "made_clips/measure_streaming.py":
        assert "on 8 clips" in done.stdout and "| last minute |" in done.stdout
    else:
        assert any((tmp_path / "out two").iterdir())
