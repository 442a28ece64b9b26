"""Models for the training scripts: any config, the optimizer's groups, checkpoints kept."""

import pytest
from huggingface_hub.errors import StrictDataclassError

import video_classification_model as models
from modeling_videomamba import (
    VideoMambaConfig,
    VideoMambaForVideoClassification,
)
from training_clips import NAMES, touch
from video_classification_arguments import ModelArguments


def test_any_field_of_the_config_can_be_set(tmp_path):
    """A new model follows the fields from the start; a trained one keeps the rest; nonsense is named."""

    def load(**arguments):
        return models.load_model(ModelArguments(**arguments), NAMES, True)

    overrides = "backward_scan=spatial,position_embedding_type=none,hidden_size=32,num_frames=8,layer_norm_epsilon=1"
    model, _, reader, *processors = load(num_hidden_layers=1, image_size=32, config_overrides=overrides)
    config = model.config
    assert (config.backward_scan, config.position_embedding_type, config.layer_norm_epsilon) == ("spatial", "none", 1)
    assert config.hidden_size == 32 and config.time_step_rank == 2, "what follows from other fields follows"
    assert "videomamba.embeddings.position_embeddings" not in model.state_dict()
    assert config.num_frames == reader.num_frames == 8
    for part in (model, *processors):
        part.save_pretrained(tmp_path)
    again, *_ = load(model_name_or_path=str(tmp_path), config_overrides="backward_scan=temporal,scan_backend=torch")
    before, after = config.to_dict(), again.config.to_dict()
    changed = {name for name in before if before[name] != after[name]} - {"architectures", "dtype", "_name_or_path"}
    assert changed == {"backward_scan", "scan_backend"} and again.config.backward_scan == "temporal"
    for bad, message in {
        "backward_scans=spatial": "'backward_scans=spatial' is not a pair .* of VideoMambaConfig.*hidden_size",
        "backward_scan": "'backward_scan' is not a pair",
        "backward_scan=up": "'backward_scan' expected one of .'spatiotemporal'.* got up",
    }.items():
        with pytest.raises((ValueError, StrictDataclassError), match=message):
            load(model_name_or_path=str(tmp_path), config_overrides=bad)


def test_a_trained_model_keeps_its_size_and_says_so(tmp_path, caplog):
    """Flags of new models, as recipes have them, change no trained one; those that ask for another are named."""

    def load(**arguments):
        return models.load_model(ModelArguments(**arguments), NAMES, True)

    new = {"hidden_size": 16, "num_hidden_layers": 1, "image_size": 32, "num_frames": 4, "frame_stride": 0}
    model, _, reader, *processors = load(**new)
    assert reader.frame_stride is None
    for part in (model, *processors):
        part.save_pretrained(tmp_path)
    load(model_name_or_path=str(tmp_path), **new)
    load(model_name_or_path=str(tmp_path))
    assert not caplog.records
    again, _, reader, *_ = load(model_name_or_path=str(tmp_path), num_frames=8, frame_stride=2, image_size=32)
    assert again.config.num_frames == reader.num_frames == 4 and reader.frame_stride is None
    assert [record.args[:2] + record.args[3:] for record in caplog.records] == [
        ("num_frames", 8, 4),
        ("frame_stride", 2, 0),
    ]


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


def checkpoints(folder):
    return sorted(int(path.name[11:]) for path in folder.glob("checkpoint-*"))


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
