"""From a file to logits in forked processes, after the same in their parent, at real frame sizes and with threads."""

import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from modeling_videomamba import VideoMambaConfig, VideoMambaForVideoClassification, VideoMambaVideoProcessor
from modeling_videomamba.selective_scan import use_scan_backend
from video_files import write_video


pytestmark = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork"
)
SHAPE = {"num_frames": 4, "image_size": 224, "hidden_size": 64, "num_hidden_layers": 2, "num_labels": 3}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("clips") / "clip.mp4", 12, size=(256, 340))


def classify(clip, backend):
    torch.manual_seed(0)
    model = VideoMambaForVideoClassification(VideoMambaConfig(**SHAPE)).eval()
    pixels = VideoMambaVideoProcessor(num_frames=4)(clip, return_tensors="pt")
    with torch.no_grad(), use_scan_backend(backend):
        return model(**pixels).logits.numpy()


@pytest.mark.parametrize("backend", ["torch", pytest.param("numba", marks=pytest.mark.slow)])
def test_from_file_to_logits(clip, backend):
    if backend == "numba":
        pytest.importorskip("numba")
    expected = classify(clip, backend)
    here, there = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=lambda: there.send(classify(clip, backend)))
    child.start()
    try:
        assert here.poll(60), "no answer from the forked process within a minute"
        np.testing.assert_allclose(here.recv(), expected, atol=1e-5)
    finally:
        child.kill()
        child.join()


MAP = """
import sys
import torch
from datasets import Dataset
from modeling_videomamba import VideoMambaVideoProcessor

processor = VideoMambaVideoProcessor(num_frames=4)
read = lambda row: {"mean": processor(row["path"], return_tensors="pt").pixel_values.mean().item()}
rows = [{"path": sys.argv[1]}] * 4
expected = read(rows[0])["mean"]
means = Dataset.from_list(rows).map(read, num_proc=2)["mean"]
print(torch.get_num_threads(), [abs(mean - expected) < 1e-5 for mean in means])
"""


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core, so one thread")
def test_map_of_datasets(clip, tmp_path):
    """In a fresh process, with PyTorch's default threads, which the parent keeps."""
    pytest.importorskip("datasets")
    environment = {**os.environ, "HF_HOME": str(tmp_path)}
    environment.pop("OMP_NUM_THREADS", None)
    run = subprocess.run(
        [sys.executable, "-c", MAP, clip], env=environment, capture_output=True, text=True, timeout=120
    )
    threads, _, same = run.stdout.partition(" ")
    assert int(threads) > 1 and same.strip() == "[True, True, True, True]", run.stderr
