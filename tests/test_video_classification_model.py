"""Models for the training scripts: any config, the optimizer's groups, checkpoints kept."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForVideoClassification, AutoVideoProcessor
from transformers.video_utils import VideoMetadata

import video_classification_model as models
from modeling_videomamba import (
    VideoMambaConfig,
    VideoMambaForImageClassification,
    VideoMambaForVideoClassification,
    VideoMambaImageProcessor,
)
from training_clips import NAMES, touch
from video_classification_arguments import ModelArguments
from video_files import write_video


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


@pytest.fixture
def trained(tmp_path):
    """A folder of a model of four frames of 32 pixels, cropped from 40, that are spread over the clip."""
    new = {"hidden_size": 16, "num_hidden_layers": 1, "image_size": 32, "num_frames": 4, "frame_stride": 0}
    model, _, reader, video, images = models.load_model(ModelArguments(**new), NAMES, True)
    assert reader.frame_stride is None
    for part in (model, video, images):
        if part is not model:
            part.size = {"shortest_edge": 40}
        part.save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


def test_a_trained_model_keeps_its_width_and_says_so(trained, caplog):
    def load(**arguments):
        return models.load_model(ModelArguments(model_name_or_path=str(trained), **arguments), NAMES, True)

    load(hidden_size=16, num_frames=4, frame_stride=0)
    assert not caplog.records
    again, *_ = load(hidden_size=32, num_hidden_layers=2)
    assert again.config.hidden_size == 16 and len(again.videomamba.layers) == 1
    assert [record.args[:2] + record.args[3:] for record in caplog.records] == [
        ("hidden_size", 32, 16),
        ("num_hidden_layers", 2, 1),
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_frames": 8, "frame_stride": 3, "image_size": 64},
        {"frame_stride": 3, "config_overrides": "num_frames=8,image_size=64"},
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_length_size_and_sampling_of_a_trained_model_change(trained, tmp_path, arguments, training):
    """Model and processors together, also in a folder without `preprocessor_config.json`."""
    clip = write_video(tmp_path / "clip.mp4", 60)
    before = AutoModelForVideoClassification.from_pretrained(trained)
    (trained / "preprocessor_config.json").unlink()
    arguments = ModelArguments(model_name_or_path=str(trained), **arguments)
    model, names, reader, video, images = models.load_model(arguments, NAMES, training)
    assert names == NAMES and model.config.num_frames == reader.num_frames == 8 and model.config.image_size == 64
    sizes = [dict(part.size)["shortest_edge"] for part in (reader, video, images)]
    assert sizes == [80, 80, 80], "the crop is still 32 / 40 of the shorter edge"
    assert images.crop_size["height"] == 64 and images.crop_size["width"] == 64
    for part in (model, video, images):
        part.save_pretrained(tmp_path / "longer")
    saved = AutoVideoProcessor.from_pretrained(tmp_path / "longer")
    inputs = saved(clip, return_tensors="pt", return_metadata=True)
    assert inputs.pop("video_metadata")[0].frames_indices.tolist() == [19, 22, 25, 28, 31, 34, 37, 40]
    assert inputs["pixel_values"].shape == (1, 8, 3, 64, 64)
    again = AutoModelForVideoClassification.from_pretrained(tmp_path / "longer")
    with torch.no_grad():
        # Of the same weights, whose positions are interpolated to the longer clip.
        expected = before(**inputs, interpolate_pos_encoding=True).logits
        assert torch.allclose(again(**inputs).logits, expected, atol=1e-5)


def test_sampling_by_time_and_by_frame_take_each_other_s_place(trained):
    def load(folder, **arguments):
        *_, reader, _, _ = models.load_model(ModelArguments(model_name_or_path=str(folder), **arguments), NAMES, True)
        return reader

    by_time = load(trained, sampling_fps=5)
    metadata = VideoMetadata(total_num_frames=100, fps=20.0)
    assert by_time.sample_frames(metadata).tolist() == [44, 48, 52, 56]
    by_time.save_pretrained(trained)
    assert load(trained).sample_frames(metadata).tolist() == [44, 48, 52, 56]
    assert load(trained, frame_stride=1).sample_frames(metadata).tolist() == [48, 49, 50, 51]
    by_time.fps, by_time.sampling_fps = 1, None  # a number of frames that grows with the clip
    by_time.save_pretrained(trained)
    assert load(trained, frame_stride=1).sample_frames(metadata).tolist() == [48, 49, 50, 51]


def test_an_image_model_is_a_video_model_of_one_frame(tmp_path):
    config = VideoMambaConfig(hidden_size=16, num_hidden_layers=1, image_size=32, num_frames=1, tubelet_size=1)
    VideoMambaForImageClassification(config).save_pretrained(tmp_path)
    sizes = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
    VideoMambaImageProcessor(single_images=True, **sizes).save_pretrained(tmp_path)
    model, _, reader, *_ = models.load_model(ModelArguments(model_name_or_path=str(tmp_path)), ["LABEL_0"], False)
    inputs = reader(write_video(tmp_path / "clip.mp4", 9), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 1, 3, 32, 32) and model(**inputs).logits.shape == (1, 2)


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


def test_a_field_may_be_a_list():
    text = "merge_layers=[1, 2],image_size=[32,48], backward_scan=spatial"
    expected = {"merge_layers": [1, 2], "image_size": [32, 48], "backward_scan": "spatial"}
    assert models.parse_overrides(text, VideoMambaConfig()) == expected
