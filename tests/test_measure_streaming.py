"""examples/made_clips/measure_streaming.py: its counts by hand, and the command on a few clips."""

import pytest
import torch
from PIL import Image

import measure_streaming
from modeling_videomamba import VideoMambaConfig, VideoMambaForVideoFrameClassification, VideoMambaVideoProcessor


@pytest.fixture
def model():
    """Two labels, steps of two frames, clips of three steps; random weights."""
    torch.manual_seed(0)
    config = VideoMambaConfig(
        hidden_size=32, num_hidden_layers=1, num_frames=6, image_size=32, backward_scan="spatial",
        class_token_position="none", position_embedding_type="spatial", id2label={0: "to the left", 1: "to the right"},
    )  # fmt: skip
    model = VideoMambaForVideoFrameClassification(config).eval()
    torch.nn.init.normal_(model.classifier.weight, std=0.5)
    return model


def test_steps_to_the_change_of_a_label():
    found = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0], [0, 0, 0]])
    assert measure_streaming.steps_to_change(found, torch.ones(5)).tolist() == [1, 2, 3, 4, 4]


def test_measures_are_those_of_the_model(model):
    frames, labels = torch.randn(4, 6, 3, 32, 32), torch.tensor([0, 1, 1, 1])
    features, _ = measure_streaming.step_features(model, frames)
    model.config.pooling_window = None
    with torch.no_grad():
        logits = model(frames).logits
        both = model(torch.cat([frames[:1], frames[1:2]], dim=1), interpolate_pos_encoding=True).logits[0, 3:]
    expected = (logits.argmax(-1) == labels[:, None]).double().mean(0).tolist()
    assert measure_streaming.accuracy_by_frames(model, features, labels) == dict(zip((2, 4, 6), expected, strict=True))

    # One pair of clips has two labels.
    changes = measure_streaming.measure_changes(model, frames, labels, batch_size=2)
    wrong = [step for step, label in enumerate(both.argmax(-1).tolist(), 1) if label != 1]
    assert changes[None].tolist() == [max(wrong, default=0) + 1]
    assert set(changes) == {None, 2, 4, 8}


@pytest.mark.slow
def test_command(model, bars, tmp_path, monkeypatch, capsys):
    model.save_pretrained(tmp_path / "a model")
    processor = VideoMambaVideoProcessor(
        num_frames=6, sampling_fps=8, size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    processor.save_pretrained(tmp_path / "a model")
    command = ["measure_streaming.py", str(bars / "train"), "--model", str(tmp_path / "a model"), "--num_workers", "0"]
    monkeypatch.setattr(
        "sys.argv", [*command, "--minutes", "0.1", "--streams", "2", "--output", str(tmp_path / "measured")]
    )
    measure_streaming.main()
    printed = capsys.readouterr().out
    assert "| frames seen | 2 | 4 | 6 |" in printed and "| window of 4 |" in printed
    assert "on 8 clips" in printed and "| last minute |" in printed
    assert "One step takes" in printed
    assert (tmp_path / "measured" / "measured.md").read_text().strip() in printed
    with Image.open(tmp_path / "measured" / "accuracy_by_frames.png") as picture:
        assert picture.size == (900, 480)
