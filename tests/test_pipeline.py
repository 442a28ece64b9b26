"""`pipeline("video-classification")` on real files, from a local folder."""

import http.server
import json
import multiprocessing
import os
import re
import shutil
import sys
import threading
from functools import partial
from pathlib import Path

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
from modeling_videomamba.video_decoding import decode_video
from video_files import write_video


LABELS = ["falling", "rising", "resting", "turning", "waiting", "walking"]

# What a user would have to explain away if it stood in the output.
UNWANTED = re.compile("warn|deprecat|not supported|not available|falling back|error|backward compat", re.IGNORECASE)


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


def test_lists_and_generators_in_batches(classify, clips):
    expected = [as_dict(classify(clip, top_k=6)) for clip in clips * 2]
    # What transformers' pipelines hand to their workers cannot be pickled: where workers are not forked, none.
    workers = int(multiprocessing.get_start_method() == "fork")
    for inputs in (clips * 2, (clip for clip in clips * 2)):
        found = list(classify(inputs, top_k=6, batch_size=3, num_workers=workers))
        assert len(found) == 4
        for result, scores in zip(found, expected, strict=True):
            assert as_dict(result) == pytest.approx(scores, abs=1e-6)


def test_frames_and_bytes(classify, clips):
    frames, _ = decode_video(clips[0])
    expected = classify(clips[0])
    data = Path(clips[0]).read_bytes()
    for video in (frames, torch.from_numpy(frames), data, Path(clips[0])):
        assert classify(video) == expected
    assert classify([data, frames]) == [expected, expected]


def test_the_documented_way_past_bad_clips(classify, clips, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    page = (Path(__file__).parents[1] / "docs" / "limits.md").read_text()
    code = next(code for code in re.findall("```python\n(.*?)```", page, re.DOTALL) if "classify_each" in code)
    names = {}
    exec(code, names)
    results = list(
        names["classify_each"](classify, [clips[0], str(tmp_path / "bad.mp4"), "nowhere.mp4", clips[1]], top_k=1)
    )
    assert results[0] == classify(clips[0], top_k=1) and results[3] == classify(clips[1], top_k=1)
    assert type(results[1]) is ValueError and type(results[2]) is FileNotFoundError


@pytest.mark.parametrize(
    "change", [{"num_frames": "16"}, {"num_frames": 0}, {"frame_stride": "2"}, {"decoder": "ffmpeg"}, None]
)
def test_bad_video_configuration_stops_the_pipeline(repository, tmp_path, change, caplog, monkeypatch):
    """It would go on with the image processor otherwise, and give other scores."""
    folder = tmp_path / "bad"
    shutil.copytree(repository, folder)
    file = folder / "video_preprocessor_config.json"
    file.write_text("" if change is None else json.dumps({**json.loads(file.read_text()), **change}))
    said = []
    monkeypatch.setattr(sys.modules[VideoMambaImageProcessor.__module__].logger, "error", said.append)
    with pytest.raises(ValueError, match="requires either a video processor or an image processor"):
        pipeline("video-classification", model=str(folder))
    assert len(said) == 1 and (next(iter(change)) if change else "not a valid JSON") in said[0]


def test_a_saved_fps_stops_the_pipeline(repository, clips, tmp_path):
    """A pipeline names the config's `num_frames` in every call: frames that are not those of processor and model."""
    folder = tmp_path / "by rate"
    shutil.copytree(repository, folder)
    file = folder / "video_preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_frames": None, "fps": 5}))
    with pytest.raises(ValueError, match="saved to sample 5 frames a second, and `num_frames`=4 was asked for"):
        pipeline("video-classification", model=str(folder))(clips[0])


class Malicious:
    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_weights_cannot_run_code(repository, tmp_path):
    folder = tmp_path / "malicious"
    shutil.copytree(repository, folder)
    (folder / "model.safetensors").unlink()
    trap = Malicious()
    trap.folder = str(tmp_path / "trap")
    torch.save({"classifier.weight": trap}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match="[Ww]eights.only|Unsupported|safetensors"):
        AutoModel.from_pretrained(folder)
    assert not (tmp_path / "trap").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)  # the trap works
    assert (tmp_path / "trap").exists()
