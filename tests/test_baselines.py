"""Other video classifiers in the training scripts: from a config.json, torchvision's Swin, and models in shards."""

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchvision.models.video import swin3d_t
from transformers import (
    AutoConfig,
    AutoModelForVideoClassification,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    set_seed,
)

from modeling_videomamba import (
    VideoMambaConfig,
    VideoMambaForVideoClassification,
    VideoMambaImageProcessor,
    VideoMambaVideoProcessor,
)
from video_classification_arguments import ModelArguments
from video_classification_model import load_model, without_fsdp


EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "training"


TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def test_config_name_builds_another_model_from_scratch(tmp_path):
    trained = VideoMAEForVideoClassification(VideoMAEConfig(**TINY, image_size=32, num_frames=4))
    trained.save_pretrained(tmp_path)  # with weights, which must not be read
    arguments = ModelArguments(config_name=str(tmp_path), num_frames=8, frame_stride=0, image_size=48)
    set_seed(3)
    model, names, reader, processor, image_processor = load_model(arguments, ["calm", "fight", "other"], True)
    set_seed(3)
    expected = VideoMAEForVideoClassification(
        VideoMAEConfig(**TINY, image_size=48, num_frames=8, num_labels=3, tubelet_size=2)
    )
    assert type(model) is VideoMAEForVideoClassification and model.config.id2label == dict(enumerate(names))
    for (name, weight), (other_name, other) in zip(
        model.state_dict().items(), expected.state_dict().items(), strict=True
    ):
        assert name == other_name and torch.equal(weight, other), name
    assert reader.num_frames == 8 and reader.frame_stride is None
    frames = torch.randint(0, 256, (8, 3, 60, 80), dtype=torch.uint8)
    pixels = processor(frames, return_tensors="pt")[processor.model_input_names[0]]
    assert pixels.shape == (1, 8, 3, 48, 48) and model(pixels).logits.shape == (1, 3)
    assert image_processor.crop_size["height"] == 48


def test_a_model_cannot_be_both_trained_and_from_scratch(tmp_path):
    arguments = ModelArguments(config_name=str(tmp_path), model_name_or_path=str(tmp_path))
    with pytest.raises(ValueError, match="--model_name_or_path.*--config_name"):
        load_model(arguments, ["a", "b"], True)


def test_the_baseline_called_small_is_videomae_small():
    # ViT-S has 22 million weights: 12 blocks of 12 D² + 13 D; here a tubelet's 2·16·16·3 pixels go in, 2 logits out.
    config = AutoConfig.from_pretrained(EXAMPLES / "baselines" / "videomae-small")
    with torch.device("meta"):
        model = AutoModelForVideoClassification.from_config(config)
    width, blocks = 384, 12
    embedding, norm, head = width * (2 * 16 * 16 * 3 + 1), 2 * width, 2 * (width + 1)
    # VideoMAE's keys have no bias, as in the authors' code: D fewer in each block. transformers 5.17 gives them one.
    expected = blocks * (12 * width**2 + 13 * width - width) + embedding + norm + head
    weights = (weight for name, weight in model.named_parameters() if not name.endswith("key.bias"))
    assert sum(weight.numel() for weight in weights) == expected


def test_swin_is_torchvisions(tmp_path):
    set_seed(0)
    original = swin3d_t(num_classes=3).eval()
    config = AutoConfig.from_pretrained(EXAMPLES / "baselines" / "swin3d-tiny", num_labels=3, trust_remote_code=True)
    model = AutoModelForVideoClassification.from_config(config, trust_remote_code=True).eval()
    model.swin.load_state_dict(original.state_dict())
    clips, labels = torch.randn(2, 4, 3, 64, 64), torch.tensor([2, 0])
    with torch.no_grad():
        expected = original(clips.permute(0, 2, 1, 3, 4))
        output = model(clips, labels=labels)
    torch.testing.assert_close(output.logits, expected)
    torch.testing.assert_close(output.loss, -expected.log_softmax(-1)[[0, 1], labels].mean())
    rates = {block.stochastic_depth.p for block in original.modules() if hasattr(block, "stochastic_depth")}
    assert {block.stochastic_depth.p for block in model.modules() if hasattr(block, "stochastic_depth")} == rates

    model.save_pretrained(tmp_path)
    again = AutoModelForVideoClassification.from_pretrained(tmp_path, trust_remote_code=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(clips).logits, expected)


def test_a_head_for_other_labels_is_drawn_anew(tmp_path):
    config = AutoConfig.from_pretrained(EXAMPLES / "baselines" / "swin3d-tiny", num_labels=9, trust_remote_code=True)
    trained = AutoModelForVideoClassification.from_config(config, trust_remote_code=True)
    trained.save_pretrained(tmp_path)
    arguments = ModelArguments(str(tmp_path), trust_remote_code=True, ignore_mismatched_sizes=True)
    VideoMambaVideoProcessor().save_pretrained(tmp_path)
    VideoMambaImageProcessor().save_pretrained(tmp_path)
    set_seed(0)
    model, *_ = load_model(arguments, ["fight", "no fight"], True)
    head = model.swin.head
    assert head.weight.shape == (2, 768) and head.bias.tolist() == [0, 0]
    assert 0.9 * 0.02 < head.weight.std() < 1.1 * 0.02 and head.weight.abs().max() < 0.1
    for (name, weight), old in zip(model.named_parameters(), trained.parameters(), strict=True):
        assert "head" in name or torch.equal(weight, old), name


@pytest.fixture
def one_process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_a_sharded_model_is_saved_as_the_model_it_was(one_process_group, tmp_path):
    set_seed(0)
    config = VideoMambaConfig(hidden_size=16, num_hidden_layers=2, image_size=32, num_frames=4, scan_backend="torch")
    model = VideoMambaForVideoClassification(config).eval()
    assert without_fsdp(model) is model
    model.save_pretrained(tmp_path / "before")
    clips = torch.randn(1, 4, 3, 32, 32)
    with torch.no_grad():
        expected = model(clips).logits
    for layer in model.videomamba.layers:
        fully_shard(layer, mesh=one_process_group)
    fully_shard(model, mesh=one_process_group)
    assert type(model) is not VideoMambaForVideoClassification  # else this would test nothing
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    without_fsdp(model).save_pretrained(tmp_path / "after", state_dict=weights)
    before, after = ({f.name for f in (tmp_path / when).iterdir()} for when in ("before", "after"))
    assert before == after  # the code is VideoMamba's, not FSDP's
    config_before, config_after = ((tmp_path / when / "config.json").read_text() for when in ("before", "after"))
    assert config_before == config_after
    again = VideoMambaForVideoClassification.from_pretrained(tmp_path / "after").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(clips).logits, expected)
