"""examples/training/train_streaming.py: what it starts from, which steps count, and what it writes."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForVideoClassification, AutoVideoProcessor

import train_streaming
from modeling_videomamba import (
    VideoMambaCache,
    VideoMambaConfig,
    VideoMambaForVideoClassification,
    VideoMambaForVideoFrameClassification,
)
from training_clips import NAMES, tiny_processor
from video_files import write_moving_bars


@pytest.fixture(scope="module")
def clip_model(tmp_path_factory):
    """A classifier of whole clips with random weights: 4 frames, 2 steps in time of 4 tokens each."""
    torch.manual_seed(0)
    config = VideoMambaConfig(
        hidden_size=32, num_hidden_layers=2, num_frames=4, image_size=32, class_token_position="none",
        id2label=dict(enumerate(NAMES)), label2id={name: number for number, name in enumerate(NAMES)},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("clip model")
    VideoMambaForVideoClassification(config).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def test_a_model_of_whole_clips_becomes_one_that_streams(clip_model, tmp_path):
    old = VideoMambaForVideoClassification.from_pretrained(clip_model)
    new = train_streaming.load_streaming_model(str(clip_model))
    table = old.videomamba.embeddings.position_embeddings[0]
    mean = torch.stack([(table[i] + table[4 + i]) / 2 for i in range(4)])  # of the two steps, token by token
    torch.testing.assert_close(new.videomamba.embeddings.position_embeddings[0], mean)
    others = [name for name, _ in old.named_parameters() if "position" not in name]
    assert all(torch.equal(old.get_parameter(name), new.get_parameter(name)) for name in others)
    assert new(torch.randn(1, 4, 3, 32, 32)).logits.shape == (1, 2, 2)

    VideoMambaForVideoClassification(
        VideoMambaConfig(hidden_size=32, num_hidden_layers=1, num_frames=4, image_size=32)
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="class token"):
        train_streaming.load_streaming_model(str(tmp_path))


def test_steps_after_a_change_of_clip_do_not_count(clip_model):
    model = train_streaming.load_streaming_model(str(clip_model))
    args = SimpleNamespace(
        average_decay=0.9, learning_rate=1e-3, weight_decay=0.0, warmup_steps=1, max_steps=2, skipped_steps=1
    )
    training = train_streaming.StreamTraining(model, None, args)
    labels = training.labels_of_steps(torch.tensor([1, 0, 1]), torch.tensor([True, False, False]))
    assert labels.tolist() == [[1, 1], [-100, 0], [-100, 1]]


@pytest.mark.slow
def test_a_killed_training_goes_on_and_writes_a_model_that_streams(clip_model, tmp_path, monkeypatch, capsys):
    clips = write_moving_bars(tmp_path / "clips", {"train": 4})
    output = tmp_path / "out two"
    command = ["train_streaming.py", "--model_name_or_path", str(clip_model), "--train_dir", str(clips / "train")]
    command += ["--output_dir", str(output), "--max_steps", "6", "--save_steps", "2", "--num_streams", "4"]
    command += ["--learning_rate", "1e-2", "--warmup_steps", "1", "--jitter", "0"]
    monkeypatch.setattr(sys, "argv", command)

    train_on = train_streaming.StreamTraining.train_on

    def killed(training, batch):
        if training.step == 3:
            raise KeyboardInterrupt
        return train_on(training, batch)

    with monkeypatch.context() as patch:
        patch.setattr(train_streaming.StreamTraining, "train_on", killed)
        with pytest.raises(KeyboardInterrupt):
            train_streaming.main()
    train_streaming.main()
    assert "2 of 6 steps are done" in capsys.readouterr().out
    assert not (output / "state.pt").exists()
    train_streaming.main()
    assert "Already done" in capsys.readouterr().out
    with pytest.raises(ValueError, match="num_streams was 4 and is now 2"):
        monkeypatch.setattr(sys, "argv", [*command, "--num_streams", "2"])
        train_streaming.main()

    assert type(AutoModelForVideoClassification.from_pretrained(output)) is VideoMambaForVideoClassification
    assert json.loads((output / "config.json").read_text())["architectures"] == ["VideoMambaForVideoClassification"]
    model = VideoMambaForVideoFrameClassification.from_pretrained(output).eval()
    assert model.config.pooling_window is None and model.config.id2label == dict(enumerate(NAMES))
    frames = AutoVideoProcessor.from_pretrained(output)(str(next(clips.rglob("*.mp4"))), return_tensors="pt")
    with torch.no_grad():
        whole = model(**frames).logits
        cache = VideoMambaCache(model.config, 1)
        steps = [model(part, cache=cache, use_cache=True).logits for part in frames["pixel_values"].split(2, dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-5, rtol=0)
