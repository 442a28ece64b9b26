"""`pipeline("video-classification")` on real files: from a local folder, and with code that travels with weights."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from functools import partial

import pytest
import torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForVideoClassification, AutoVideoProcessor, pipeline

from modeling_videomamba import (
    VideoMambaConfig,
    VideoMambaForVideoClassification,
    VideoMambaImageProcessor,
    VideoMambaModel,
    VideoMambaVideoProcessor,
)
from video_files import write_video


LABELS = ["falling", "rising", "resting", "turning", "waiting", "walking"]

# What a user would have to explain away if it stood in the output.
UNWANTED = re.compile("warn|deprecat|not supported|not available|falling back|error|backward compat", re.IGNORECASE)

# Runs a pipeline in a process in which `import modeling_videomamba` fails.
WITHOUT_THE_PACKAGE = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "modeling_videomamba":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModel, pipeline

folder, output, *inputs = sys.argv[1:]
classify = pipeline("video-classification", model=folder, trust_remote_code=True)
results = [classify(inputs[0], top_k=2), classify(inputs, top_k=6)]
backbone = AutoModel.from_pretrained(folder, trust_remote_code=True)
pixel_values = torch.zeros(1, 4, 3, 32, 32)
assert len(backbone.delta_maps(pixel_values).maps) == backbone.config.num_hidden_layers
assert classify.model.reading_maps(pixel_values).shape == (1, *backbone.config.grid_size)
classify.model.save_pretrained(output)
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A complete repository folder of a small random model, as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("hub") / "videomamba-random"
    torch.manual_seed(0)
    config = VideoMambaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        image_size=32,
        num_frames=4,
        initializer_range=1.0,  # scores that differ visibly
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    VideoMambaForVideoClassification(config).save_pretrained(folder)
    VideoMambaVideoProcessor(num_frames=4, **sizes).save_pretrained(folder)
    VideoMambaImageProcessor(**sizes).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return [write_video(folder / f"{name}.mp4", frames) for name, frames in (("long", 30), ("short", 9))]


@pytest.fixture(scope="module")
def server(clips):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = partial(Quiet, directory=os.path.dirname(clips[0]))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


@pytest.fixture(scope="module")
def classify(repository):
    return pipeline("video-classification", model=str(repository))


def expected_scores(repository, path):
    """The same by hand: processor, model, softmax."""
    processor = AutoVideoProcessor.from_pretrained(repository)
    model = AutoModelForVideoClassification.from_pretrained(repository)
    with torch.no_grad():
        scores = model(**processor(path, return_tensors="pt")).logits.softmax(-1)[0].tolist()
    return dict(zip(LABELS, scores, strict=True))


def as_dict(result):
    return {entry["label"]: entry["score"] for entry in result}


def test_auto_classes_know_the_folder(repository):
    assert type(AutoModel.from_pretrained(repository)) is VideoMambaModel
    assert type(AutoModelForVideoClassification.from_pretrained(repository)) is VideoMambaForVideoClassification
    assert type(AutoVideoProcessor.from_pretrained(repository)) is VideoMambaVideoProcessor
    assert type(AutoImageProcessor.from_pretrained(repository)) is VideoMambaImageProcessor


def test_file(classify, repository, clips):
    expected = expected_scores(repository, clips[0])
    assert len({round(score, 3) for score in expected.values()}) > 3, "the scores must tell the labels apart"
    found = classify(clips[0], top_k=6)
    assert as_dict(found) == pytest.approx(expected, abs=1e-6)
    best = sorted(expected, key=expected.get, reverse=True)[:2]
    assert [entry["label"] for entry in found[:2]] == best
    assert [entry["label"] for entry in classify(clips[0], top_k=2)] == best


def test_list_of_files(classify, repository, clips):
    found = classify(clips, top_k=6)
    assert len(found) == 2
    for path, result in zip(clips, found, strict=True):
        assert as_dict(result) == pytest.approx(expected_scores(repository, path), abs=1e-6)


def test_url(classify, clips, server):
    assert classify(f"{server}/long.mp4") == classify(clips[0])


def test_nothing_is_printed_that_needs_an_explanation(repository, clips, capfd, caplog):
    pipeline("video-classification", model=str(repository))(clips[0])
    printed = "".join(capfd.readouterr()) + caplog.text
    assert not UNWANTED.search(printed), printed


def test_code_that_travels_with_the_weights(classify, repository, clips, server, tmp_path):
    """Offline, where the package cannot be imported; the model saved there carries its code on."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    output = tmp_path / "saved again"
    inputs = [clips[0], clips[1]]
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(repository), str(output), *inputs]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    top, all_of_both = json.loads(run.stdout.splitlines()[-1])
    assert top == all_of_both[0][:2]
    for path, result in zip(inputs, all_of_both, strict=True):
        assert as_dict(result) == pytest.approx(as_dict(classify(path, top_k=6)), abs=1e-6)
    noise = [line for line in run.stderr.splitlines() if "Loading weights" not in line]
    noise = "\n".join(noise + run.stdout.splitlines()[:-1])
    assert not UNWANTED.search(noise), noise
    modules = {path.name for path in output.glob("*.py")}
    assert {"configuration_videomamba.py", "modeling_videomamba.py", "selective_scan.py"} <= modules


def test_remote_and_local_code_in_one_process(repository, clips):
    """Both register the same operators; either keeps working after the other was loaded."""
    local = AutoModelForVideoClassification.from_pretrained(repository)
    remote = AutoModelForVideoClassification.from_pretrained(repository, trust_remote_code=True)
    pixels = torch.randn(1, 4, 3, 32, 32)
    for model in (local, remote, local):
        model.zero_grad()
        model(pixels).logits.sum().backward()
        assert model.classifier.weight.grad is not None
    torch.testing.assert_close(local(pixels).logits, remote(pixels).logits)
