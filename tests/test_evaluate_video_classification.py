"""Multi-view evaluation: which views, their mean, and its interval."""

import contextlib
import csv
import io
import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from transformers import (
    AutoVideoProcessor,
)

import evaluate_video_classification as evaluation
import video_classification_data as data
from modeling_videomamba import (
    VideoMambaConfig,
    VideoMambaForVideoClassification,
    VideoMambaImageProcessor,
)
from modeling_videomamba.video_decoding import decode_video
from training_clips import NAMES, tiny_processor
from video_files import write_video


def seen(views, path):
    """All views of a file."""
    frames, _ = decode_video(path, views.sample_frames, transform=views.frame_transform())
    return views([frames])["pixel_values"][0]


def test_views_lie_where_papers_put_them(tmp_path):
    """Of 30 numbered frames of 64 x 96: clips at the two ends; crops at the left, in the middle, at the right."""
    processor = tiny_processor()
    path = write_video(tmp_path / "numbered.mp4", 30, size=(64, 96), options={"crf": "0"}, pix_fmt="yuv444p")
    views, normalize = evaluation.Views(processor, processor, 2, 3), data.Normalize(processor, "cpu")
    found = normalize(seen(views, path))
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

    one = normalize(seen(evaluation.Views(processor, processor, 1, 1), path))
    torch.testing.assert_close(one, processor(path, return_tensors="pt")["pixel_values"], atol=1e-5, rtol=0)


def test_clips_of_sparse_sampling_begin_one_after_the_other():
    """Of 41 frames, 4 are wanted: 10 apart, from 0; three clips are shifted by quarters of these 10."""
    reader = types.SimpleNamespace(num_frames=4, frame_stride=None, decoder=None)
    views = evaluation.Views(reader, tiny_processor(), 3, 1)
    found = views.sample_frames(types.SimpleNamespace(total_num_frames=41)).reshape(3, 4).tolist()
    assert found == [[2, 12, 22, 32], [5, 15, 25, 35], [7, 17, 27, 37]]
    short = views.sample_frames(types.SimpleNamespace(total_num_frames=2)).reshape(3, 4)
    assert short.min() >= 0 and short.max() <= 1


def test_scores_are_the_mean_over_views(bars, tmp_path, monkeypatch):
    """Against a loop over views with the model alone; the report's numbers against those of the predictions."""
    config = VideoMambaConfig(hidden_size=16, num_hidden_layers=1, image_size=32, num_frames=4, initializer_range=1.0)
    config.id2label, config.label2id = dict(enumerate(NAMES)), {name: i for i, name in enumerate(NAMES)}
    torch.manual_seed(0)
    model = VideoMambaForVideoClassification(config).eval()
    model.save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    broken = tmp_path / "clips" / NAMES[0] / "broken.mp4"
    shutil.copytree(bars / "validation", tmp_path / "clips")
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
    views, normalize = evaluation.Views(processor, processor, 2, 2), data.Normalize(processor, "cpu")
    saved = np.load(tmp_path / "out" / "scores.npz")
    with open(tmp_path / "out" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    right = []
    for row, scores in zip(rows, saved["scores"][saved["labels"] >= 0], strict=True):
        with torch.no_grad():
            each = [model(view[None]).logits.softmax(-1)[0] for view in normalize(seen(views, row["clip"]))]
        expected = torch.stack(each).mean(0)
        np.testing.assert_allclose(scores, expected, atol=1e-5)
        assert row["label"] == Path(row["clip"]).parent.name and row["predicted"] == NAMES[expected.argmax()]
        right.append(row["label"] == row["predicted"])
    assert results["accuracy"] == np.mean(right)
    assert (tmp_path / "out" / "confusion_matrix.png").stat().st_size > 1000


def test_the_report_has_wilsons_intervals():
    """All right: the share's interval is no point. Of two labels, five guesses say nothing."""
    labels = np.tile([0, 1], 20)
    results = evaluation.summarise(np.eye(2)[labels], labels) | {"views": "1 x 1"}
    low = binomtest(40, 40).proportion_ci(0.95, "wilson").low
    assert results["accuracy_low"] == pytest.approx(low, abs=1e-4) and results["accuracy_high"] == 1
    text = "40 clips, 1 x 1 views: top-1 100.0% (91.2% to 100.0%), mean of classes 100.0%; 0 could not be read"
    assert evaluation.report(results) == text
    scores, labels = np.eye(7)[[0, 1, 2, 3]], np.array([0, 1, 6, -100])
    results = evaluation.summarise(scores, labels) | {"views": "1 x 1"}
    interval = binomtest(2, 3).proportion_ci(0.95, "wilson")
    assert [results["top5_accuracy_low"], results["top5_accuracy_high"]] == pytest.approx(
        [interval.low, interval.high], abs=1e-4
    )
    assert (results["clips"], results["skipped"]) == (3, 1) and "top-5 66.7% (20.8% to 93.9%)" in evaluation.report(
        results
    )
    assert evaluation.report(results | {"clips": 1}).startswith("1 clip,")
