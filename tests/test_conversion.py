"""The converters, against plain forward passes of the families they read, and against bad input."""

import argparse
import io
import json
import os
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForVideoClassification,
    AutoVideoProcessor,
    pipeline,
)

from conversion import (
    checkpoints,
    convert_opengvlab_to_videomamba,
    convert_vim_to_videomamba,
    inflate_image_model,
    published_checkpoints,
)
from conversion.convert_opengvlab_to_videomamba import join_positions
from conversion.inflate_image_model import inflate_patches, initialize_positions
from modeling_videomamba import (
    VideoMambaConfig,
    VideoMambaForImageClassification,
    VideoMambaForVideoClassification,
    VideoMambaModel,
)
from plain_vision_mamba import opengvlab_videomamba, random_weights, vision_mamba
from video_files import write_video


ROOT = Path(__file__).resolve().parents[1]
TINY = {"hidden_size": 32, "depth": 2, "grid": 4}
VIM_NAME = "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"


def save_vim(path, weights, **args):
    """As Vision Mamba's training script does it."""
    model_args = argparse.Namespace(model=VIM_NAME, lr=5e-4, **args)
    torch.save({"model": weights, "optimizer": {"state": {}}, "epoch": 299, "args": model_args}, path)
    return path


@pytest.fixture
def vim(tmp_path):
    """A tiny Vision Mamba file and its weights."""
    weights = random_weights("vim", labels=7, **TINY)
    return save_vim(tmp_path / "vim_t_midclstok.pth", weights), weights


@pytest.fixture
def opengvlab(tmp_path):
    """A tiny OpenGVLab file and its weights."""
    weights = random_weights("opengvlab", labels=7, **TINY)
    path = tmp_path / "videomamba_t16_x_f8_res64.pth"
    torch.save(weights, path)
    return path, weights


def convert(converter, source, output, *options):
    converter.main(["--checkpoint", str(source), "--output", str(output), *options])
    return output


def refusal(converter, source, output, *options):
    """The error's text; nothing may be left behind."""
    before = sorted(Path(output).parent.iterdir())
    with pytest.raises(SystemExit) as stop:
        convert(converter, source, output, *options)
    assert sorted(Path(output).parent.iterdir()) == before
    return str(stop.value)


def stored(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# ---- exactness ----


@torch.no_grad()
def test_static_clip_gives_vision_mambas_logits(tmp_path):
    weights = random_weights("vim", labels=1000)
    source = save_vim(tmp_path / "vim_t_midclstok_76p1acc.pth", weights, input_size=224)
    options = ["--num-frames", "2", "--tubelet-size", "2", "--class-token-position", "middle", "--keep-head"]
    model = AutoModelForVideoClassification.from_pretrained(
        convert(convert_vim_to_videomamba, source, tmp_path / "out", *options)
    )
    image = randn(3, 224, 224)
    expected = vision_mamba(image, weights)
    logits = model(image.expand(1, 2, -1, -1, -1)).logits[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert model.config.id2label[1] == "goldfish" and len(model.config.id2label) == 1000

    # The logits depend on which row of `pos_embed` is whose, by far more than the bound.
    first = weights["pos_embed"].roll(1, dims=1)
    assert (vision_mamba(image, {**weights, "pos_embed": first}) - expected).abs().max() > 1e-2


@torch.no_grad()
def test_vision_mamba_stays_the_image_classifier_that_it_is(vim, tmp_path):
    source, weights = vim
    folder = convert(convert_vim_to_videomamba, source, tmp_path / "out", "--num-frames", "1", "--keep-head")
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert type(model) is VideoMambaForImageClassification and model.config.class_token_position == "middle"
    images = randn(2, 3, 64, 64)
    expected = torch.stack([vision_mamba(image, weights) for image in images])
    torch.testing.assert_close(model(images).logits, expected, rtol=0, atol=1e-5)

    # As its authors test it: the crop is 7/8 of a bicubic image's shorter edge (their datasets.py).
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    processor = AutoImageProcessor.from_pretrained(folder)
    assert processor.size["shortest_edge"] == 73 and processor.resample == 3
    found = pipeline("image-classification", model=str(folder))([picture, picture], top_k=7, batch_size=2)
    scores = model(**processor(picture, return_tensors="pt")).logits.softmax(-1)[0]
    for answers in found:
        assert {a["label"]: a["score"] for a in answers} == pytest.approx(
            {f"LABEL_{i}": score.item() for i, score in enumerate(scores)}, abs=1e-6
        )
    assert not (folder / "video_preprocessor_config.json").exists()
    assert "AutoModelForImageClassification" in (folder / "README.md").read_text()


@pytest.mark.parametrize(("frames", "depth"), [(8, 12), (16, 2)])
@torch.no_grad()
def test_opengvlab_classifier_gives_its_own_logits(tmp_path, frames, depth):
    weights = random_weights("opengvlab", frames=frames, depth=depth)
    source = tmp_path / f"videomamba_t16_k400_f{frames}_res224.pth"
    torch.save(weights if frames == 8 else {"module": weights}, source)
    folder = convert(convert_opengvlab_to_videomamba, source, tmp_path / "out")
    model = AutoModelForVideoClassification.from_pretrained(folder)
    clip = randn(frames, 3, 224, 224)
    logits = model(clip[None]).logits[0]
    torch.testing.assert_close(logits, opengvlab_videomamba(clip, weights), rtol=0, atol=1e-4)
    assert model.config.id2label[0] == "abseiling" and model.config.num_labels == 400


@torch.no_grad()
@pytest.mark.parametrize(
    "name, data_set, first, note",
    [
        ("videomamba_t16_k400_f8_res224.pth", None, "abseiling", None),
        ("checkpoint.pth", "Kinetics_sparse", "abseiling", None),
        ("checkpoint-best.pth", None, "abseiling", "assumed because there are 400"),
        ("mamba_mit_f8.pth", None, "LABEL_0", "the file speaks of mit"),
        ("checkpoint.pth", "SSV2", "LABEL_0", "the file speaks of ssv2"),
    ],
)
def test_names_that_a_file_does_not_hold_are_said_to_be_assumed(tmp_path, capsys, name, data_set, first, note):
    weights = random_weights("opengvlab", labels=400, hidden_size=192, depth=1)
    args = {} if data_set is None else {"args": argparse.Namespace(data_set=data_set)}
    torch.save({"model": weights, **args}, tmp_path / name)
    folder = convert(convert_opengvlab_to_videomamba, tmp_path / name, tmp_path / "out")
    assert AutoModelForVideoClassification.from_pretrained(folder).config.id2label[0] == first
    for text in (capsys.readouterr().err, (folder / "README.md").read_text(encoding="utf-8")):
        assert (note in text) if note else ("assumed" not in text and "speaks of" not in text)


def test_opengvlab_mask_pt_becomes_a_backbone(tmp_path, capsys):
    weights = random_weights("opengvlab-mask", **TINY)
    torch.save({"model": weights}, tmp_path / "videomamba_m16_k400_mask_pt_f8_res224.pth")
    folder = convert(
        convert_opengvlab_to_videomamba, tmp_path / "videomamba_m16_k400_mask_pt_f8_res224.pth", tmp_path / "out"
    )
    assert capsys.readouterr().out.count("dropped: serves training alone") == 4
    model = AutoModel.from_pretrained(folder)
    assert type(model) is VideoMambaModel and model.config.architectures == ["VideoMambaModel"]
    clip = randn(8, 3, 64, 64)
    torch.testing.assert_close(
        model(clip[None]).pooler_output[0], opengvlab_videomamba(clip, weights), rtol=0, atol=1e-4
    )


@torch.no_grad()
def test_opengvlab_image_classifier(tmp_path):
    weights = random_weights("opengvlab-image", labels=1000, **TINY)
    torch.save({"model": weights}, tmp_path / "videomamba_t16_in1k_res224.pth")
    folder = convert(convert_opengvlab_to_videomamba, tmp_path / "videomamba_t16_in1k_res224.pth", tmp_path / "out")
    model = AutoModelForVideoClassification.from_pretrained(folder)
    image = randn(1, 3, 64, 64)
    torch.testing.assert_close(model(image[None]).logits[0], opengvlab_videomamba(image, weights), rtol=0, atol=1e-4)
    assert model.config.id2label[0] == "tench"


@pytest.mark.parametrize(
    ("hidden_size", "depth", "grid", "frames", "labels"),
    [(576, 1, 14, 64, 174), (32, 32, 18, 16, 10), (32, 2, 24, 64, 180)],
)
def test_opengvlab_sizes_are_read_from_the_tensors(tmp_path, hidden_size, depth, grid, frames, labels):
    weights = random_weights("opengvlab", hidden_size, depth, grid, frames, labels)
    torch.save({"model": weights}, tmp_path / "checkpoint.pth")
    folder = convert(convert_opengvlab_to_videomamba, tmp_path / "checkpoint.pth", tmp_path / "out")
    config = VideoMambaConfig.from_pretrained(folder)
    assert (config.hidden_size, config.num_hidden_layers, config.num_labels) == (hidden_size, depth, labels)
    assert (config.image_size, config.num_frames, config.tubelet_size) == (16 * grid, frames, 1)
    assert (config.time_step_rank, config.state_size, config.conv_kernel) == (hidden_size // 16, 16, 4)
    assert config.id2label[0] == "LABEL_0"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_every_bit(tmp_path, dtype):
    weights = {name: tensor.to(dtype) for name, tensor in random_weights("vim", labels=7, **TINY).items()}
    folder = convert(
        convert_vim_to_videomamba, save_vim(tmp_path / "vim.pth", weights), tmp_path / "vim", "--keep-head"
    )
    ours = stored(folder)
    assert {tensor.dtype for tensor in ours.values()} == {dtype}
    assert VideoMambaConfig.from_pretrained(folder).dtype == dtype
    layer, mixer = "videomamba.layers.1.", weights["layers.1.mixer.A_b_log"]
    assert torch.equal(ours[f"{layer}mixer.A_log"][1], mixer)
    assert torch.equal(ours[f"{layer}mixer.out_proj.weight"], weights["layers.1.mixer.out_proj.weight"])
    assert torch.equal(ours["videomamba.embeddings.position_embeddings"][0, 0], weights["pos_embed"][0, 8])
    assert torch.equal(ours["videomamba.embeddings.position_embeddings"][0, 1:9], weights["pos_embed"][0, :8])
    assert torch.equal(ours["videomamba.embeddings.position_embeddings"][0, -8:], weights["pos_embed"][0, 9:])

    weights = {name: tensor.to(dtype) for name, tensor in random_weights("opengvlab", labels=7, **TINY).items()}
    torch.save(weights, tmp_path / "videomamba.pth")
    ours = stored(convert(convert_opengvlab_to_videomamba, tmp_path / "videomamba.pth", tmp_path / "opengvlab"))
    assert {tensor.dtype for tensor in ours.values()} == {dtype}
    out_proj = ours["videomamba.layers.1.mixer.out_proj.weight"]
    assert torch.equal(out_proj.double(), 2 * weights["layers.1.mixer.out_proj.weight"].double())
    # The sums are rounded once.
    step_3 = weights["pos_embed"][0, 1:].double() + weights["temporal_pos_embedding"][0, 3].double()
    assert torch.equal(ours["videomamba.embeddings.position_embeddings"][0, 1 + 3 * 16 : 1 + 4 * 16], step_3.to(dtype))


def test_mixed_precision_takes_the_type_that_holds_both(tmp_path):
    weights = random_weights("vim", labels=7, **TINY)
    weights = {k: v if k.endswith("_log") else v.bfloat16() for k, v in weights.items()}
    ours = stored(convert(convert_vim_to_videomamba, save_vim(tmp_path / "vim.pth", weights), tmp_path / "out"))
    assert torch.equal(ours["layers.0.mixer.A_log"][0], weights["layers.0.mixer.A_log"])
    assert torch.equal(ours["norm.weight"], weights["norm_f.weight"].float())


# ---- what changes on the way ----


def test_patches_are_inflated_by_repeating_and_averaging():
    weight = torch.tensor([[[[3.0, -6.0]]]])
    assert inflate_patches(weight, 3).tolist() == [[[[[1.0, -2.0]], [[1.0, -2.0]], [[1.0, -2.0]]]]]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("expand", [[0, 4], [8, 12], [0, 4], [8, 12]]),
        # Two tokens (0 and 8 in the first channel) become four: at -1/4, 1/4, 3/4 and 5/4 of the way, ends clamped.
        ("interpolate-spatial", [[0, 4], [2, 6], [6, 10], [8, 12]]),
        # 0, 4 become the channels 0, 1, 3, 4, of which the first step has 0 and 3, the second 1 and 4.
        ("interpolate-embedding", [[0, 3], [8, 11], [1, 4], [9, 12]]),
    ],
)
def test_position_initialisations_by_hand(how, expected):
    image = torch.tensor([[0.0, 4.0], [8.0, 12.0]])  # two patches of two channels, for two steps in time
    assert initialize_positions(image, 2, how).tolist() == expected


def test_random_positions_are_the_models():
    positions = initialize_positions(torch.full((100, 64), 7.0), 8, "random", initializer_range=0.02)
    assert positions.shape == (800, 64)
    assert abs(positions.mean()) < 1e-3 and abs(positions.std() - 0.02) < 1e-3


@pytest.mark.parametrize("how", ["expand", "interpolate-spatial", "interpolate-embedding", "random"])
def test_position_initialisation_from_the_command_line(vim, tmp_path, how):
    source, weights = vim
    table = stored(convert(convert_vim_to_videomamba, source, tmp_path / "out", "--position-init", how))[
        "embeddings.position_embeddings"
    ]
    patches = torch.cat([weights["pos_embed"][0, :8], weights["pos_embed"][0, 9:]])
    assert table.shape == (1, 1 + 8 * 16, 32)
    assert torch.equal(table[0, 0], weights["pos_embed"][0, 8])  # the class token's, whatever the others are
    if how == "random":
        assert abs(table[0, 1:].std() - 0.02) < 2e-3
    else:
        assert torch.equal(table[0, 1:], initialize_positions(patches, 8, how))


@pytest.mark.parametrize(("asked", "place"), [("first", "first"), ("middle", "middle"), ("keep", "middle")])
def test_class_token_position(vim, tmp_path, asked, place):
    folder = convert(convert_vim_to_videomamba, vim[0], tmp_path / "out", "--class-token-position", asked)
    assert VideoMambaConfig.from_pretrained(folder).class_token_position == place


def test_another_image_size_interpolates_in_space(vim, tmp_path):
    source, weights = vim
    weights["pos_embed"][:] = 3.0  # a constant stays one
    folder = convert(convert_vim_to_videomamba, save_vim(source, weights), tmp_path / "out", "--image-size", "96")
    assert VideoMambaConfig.from_pretrained(folder).grid_size == (8, 6, 6)
    table = stored(folder)["embeddings.position_embeddings"]
    torch.testing.assert_close(table, torch.full((1, 1 + 8 * 36, 32), 3.0))


def test_fresh_head_is_initialised_as_the_model_does(vim, tmp_path):
    folder = convert(convert_vim_to_videomamba, vim[0], tmp_path / "out", "--num-labels", "400")
    ours = stored(folder)
    assert ours["classifier.weight"].shape == (400, 32) and not ours["classifier.bias"].any()
    assert abs(ours["classifier.weight"].std() - 0.02) < 1e-3


def test_spatial_and_temporal_positions_join_frame_by_frame():
    spatial, temporal = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[10.0], [20.0], [30.0]]])
    assert join_positions(spatial, temporal).flatten().tolist() == [11, 12, 21, 22, 31, 32]


def test_opengvlab_num_frames_interpolates_in_time_alone(opengvlab, tmp_path):
    source, weights = opengvlab
    weights["temporal_pos_embedding"] = torch.arange(8.0)[None, :, None].expand(-1, -1, 32)
    torch.save(weights, source)
    folder = convert(convert_opengvlab_to_videomamba, source, tmp_path / "out", "--num-frames", "16")
    assert AutoVideoProcessor.from_pretrained(folder).num_frames == 16
    table = stored(folder)["videomamba.embeddings.position_embeddings"]
    in_time = [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.25, 3.75, 4.25, 4.75, 5.25, 5.75, 6.25, 6.75, 7]
    expected = weights["pos_embed"][0, None, 1:] + torch.tensor(in_time)[:, None, None]
    torch.testing.assert_close(table[0, 1:], expected.flatten(0, 1))
    assert torch.equal(table[:, 0], weights["pos_embed"][:, 0])


# ---- our own image models ----


def image_model(folder, dtype=torch.float32, **fields):
    """A tiny random image classifier of ours, saved; no tensor of it is at a value that hides a mistake."""
    torch.manual_seed(0)
    fields = {"class_token_position": "middle", "num_labels": 7, **fields}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "image_size": 64, "num_frames": 1, "tubelet_size": 1}
    model = VideoMambaForImageClassification(VideoMambaConfig(**sizes, **fields))
    for parameter in model.parameters():
        parameter.data.add_(torch.empty_like(parameter).normal_(std=0.1))
    model.to(dtype).save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("how", ["expand", "interpolate-spatial", "interpolate-embedding", "sinusoidal", "none"])
@pytest.mark.parametrize("place", ["first", "middle", "none"])
@torch.no_grad()
def test_one_tubelet_of_a_still_image_gives_the_image_models_logits(tmp_path, how, place):
    # Of one step in time nothing is left to choose: every initialisation is exact.
    kind = how if how in ("sinusoidal", "none") else "learned"
    image_classifier = image_model(tmp_path / "image", position_embedding_type=kind, class_token_position=place)
    options = ["--num-frames", "4", "--tubelet-size", "4", "--position-init", how, "--keep-head"]
    model = AutoModelForVideoClassification.from_pretrained(
        convert(inflate_image_model, tmp_path / "image", tmp_path / "video", *options)
    )
    assert type(model) is VideoMambaForVideoClassification and model.config.num_frames == 4
    images = randn(2, 3, 64, 64)
    clips = images[:, None].expand(-1, 4, -1, -1, -1)
    torch.testing.assert_close(model(clips).logits, image_classifier(images).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_expanded_positions_give_every_step_the_images_tokens(tmp_path):
    image_classifier = image_model(tmp_path / "image", class_token_position="first")
    folder = convert(inflate_image_model, tmp_path / "image", tmp_path / "video", "--num-frames", "8")
    model = AutoModel.from_pretrained(folder)
    assert type(model) is VideoMambaModel and model.config.grid_size == (4, 4, 4)
    image = randn(1, 3, 64, 64)
    of_image = image_classifier.videomamba(image, output_hidden_states=True).hidden_states[0]
    of_clip = model(image[:, None].expand(-1, 8, -1, -1, -1), output_hidden_states=True).hidden_states[0]
    torch.testing.assert_close(of_clip[:, :1], of_image[:, :1])
    torch.testing.assert_close(of_clip[:, 1:].unflatten(1, (4, 16)), of_image[:, None, 1:].expand(-1, 4, -1, -1))


def test_both_converters_inflate_alike(vim, tmp_path):
    source, _ = vim
    one_frame = convert(convert_vim_to_videomamba, source, tmp_path / "image", "--num-frames", "1", "--keep-head")
    for options in (
        ["--num-frames", "8", "--keep-head", "--class-token-position", "first"],
        ["--num-frames", "6", "--tubelet-size", "3", "--position-init", "interpolate-embedding", "--image-size", "96"],
        ["--num-frames", "4", "--position-init", "none"],
        ["--num-frames", "4", "--position-init", "sinusoidal", "--class-token-position", "middle"],
    ):
        from_vim = convert(convert_vim_to_videomamba, source, tmp_path / "a", *options, "--overwrite")
        from_ours = convert(inflate_image_model, one_frame, tmp_path / "b", *options, "--overwrite")
        first, second = stored(from_vim), stored(from_ours)
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
        if "--class-token-position" in options:
            configs = [VideoMambaConfig.from_pretrained(folder).to_dict() for folder in (from_vim, from_ours)]
            assert configs[0] == configs[1]


def test_without_a_table_the_class_token_keeps_its_position(vim, tmp_path):
    source, weights = vim
    ours = stored(convert(convert_vim_to_videomamba, source, tmp_path / "out", "--position-init", "none"))
    assert "embeddings.position_embeddings" not in ours
    assert torch.equal(ours["embeddings.cls_token"][0, 0], weights["cls_token"][0, 0] + weights["pos_embed"][0, 8])


def test_labels_and_precision_of_an_image_model_follow(tmp_path):
    image_model(tmp_path / "image", torch.bfloat16, id2label=dict(enumerate("abcdefg")))
    kept = convert(inflate_image_model, tmp_path / "image", tmp_path / "kept", "--keep-head")
    config = VideoMambaConfig.from_pretrained(kept)
    assert list(config.id2label.values()) == list("abcdefg") and config.dtype == torch.bfloat16
    fresh = convert(inflate_image_model, tmp_path / "image", tmp_path / "fresh", "--num-labels", "3")
    assert VideoMambaConfig.from_pretrained(fresh).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert AutoVideoProcessor.from_pretrained(fresh).num_frames == 16


def test_what_cannot_be_inflated(vim, tmp_path):
    def refused(source, *options):
        return refusal(inflate_image_model, source, tmp_path / "out", *options)

    assert "neither a folder" in refused(tmp_path / "nowhere")
    clips = convert(convert_vim_to_videomamba, vim[0], tmp_path / "clips", "--num-frames", "4")
    assert "for clips of 4 frames" in refused(clips)
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "config.json").write_text('{"model_type": "vit"}')
    assert "is a vit model" in refused(tmp_path / "vit")
    image_model(tmp_path / "sines", position_embedding_type="sinusoidal", class_token_position="none")
    assert "`--position-init sinusoidal`" in refused(tmp_path / "sines")
    sinusoidal = ("--position-init", "sinusoidal")
    assert "no class token to put first" in refused(tmp_path / "sines", *sinusoidal, "--class-token-position", "first")
    (tmp_path / "sines" / "model.safetensors").write_bytes(b"")
    assert "Download it again" in refused(tmp_path / "sines", *sinusoidal)


# ---- the table ----


@pytest.mark.parametrize("converter", [convert_vim_to_videomamba, convert_opengvlab_to_videomamba])
def test_dry_run_prints_where_every_tensor_went_and_writes_nothing(converter, vim, opengvlab, tmp_path, capsys):
    source, weights = vim if converter is convert_vim_to_videomamba else opengvlab
    before = sorted(tmp_path.iterdir())
    converter.main(["--checkpoint", str(source), "--dry-run"])
    assert sorted(tmp_path.iterdir()) == before
    words = capsys.readouterr().out.split()
    assert set(weights) <= set(words)
    with torch.device("meta"):
        model = VideoMambaModel(VideoMambaConfig(hidden_size=32, num_hidden_layers=2))
    prefix = "" if converter is convert_vim_to_videomamba else "videomamba."
    targets = {word.split("[")[0] for word in words}
    assert {prefix + name for name in model.state_dict()} <= targets
    assert f"{len(weights)} source tensors:" in " ".join(words)


def test_tensors_left_over_on_either_side_are_errors(vim, tmp_path):
    source, weights = vim
    cases = {
        "nothing uses the tensor layers.0.mixer.gamma": {**weights, "layers.0.mixer.gamma": torch.ones(32)},
        "no tensor layers.1.mixer.D_b": {k: v for k, v in weights.items() if k != "layers.1.mixer.D_b"},
        "norm.weight would be (33,), the model expects (32,)": {**weights, "norm_f.weight": torch.ones(33)},
        "holds NaN or infinity": {**weights, "cls_token": weights["cls_token"] / 0},
    }
    for expected, changed in cases.items():
        assert expected in refusal(convert_vim_to_videomamba, save_vim(source, changed), tmp_path / "out")


# ---- safety and bad input ----


class Payload:
    """Runs a command when it is unpickled without care."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_by_name_and_does_not_run(vim, tmp_path, zipped):
    source, weights = vim
    ran = tmp_path / "ran"
    contents = {"model": weights, "args": argparse.Namespace(lr=1), "more": Payload(f"echo > {ran}")}
    torch.save(contents, source, _use_new_zipfile_serialization=zipped)
    error = refusal(convert_vim_to_videomamba, source, tmp_path / "out")
    assert f"{os.system.__module__}.system" in error and not ran.exists()
    torch.load(source, weights_only=False)  # the payload does work
    assert ran.exists()


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "empty", "text"])
def test_damaged_file(vim, tmp_path, kind):
    _, weights = vim
    source = tmp_path / ("vim.safetensors" if kind == "safetensors" else "vim.pth")
    if kind == "safetensors":
        save_file(weights, source)
    else:
        torch.save(weights, source, _use_new_zipfile_serialization=kind == "zip")
    whole = source.read_bytes()
    source.write_bytes({"empty": b"", "text": b"Not Found"}.get(kind, whole[: len(whole) // 2]))
    assert "Download it again" in refusal(convert_vim_to_videomamba, source, tmp_path / "out")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_every_file_format_gives_the_same_weights(vim, tmp_path, kind):
    reference, weights = vim
    source = tmp_path / ("other.safetensors" if kind == "safetensors" else "other.bin")
    if kind == "safetensors":
        save_file(weights, source)
    else:
        torch.save(weights, source, _use_new_zipfile_serialization=kind == "zip")
    ours = stored(convert(convert_vim_to_videomamba, source, tmp_path / "a"))
    expected = stored(convert(convert_vim_to_videomamba, reference, tmp_path / "b"))
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)


def without(weights, *names):
    return {name: tensor for name, tensor in weights.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda w: {"blocks.0.attn.qkv.weight": torch.ones(2, 2), "pos_embed": torch.ones(1, 197, 4)}, "transformer"),
        (
            lambda w: {"backbone.layers.0.mixer.A_log": torch.ones(2, 2), "lm_head.weight": torch.ones(2, 2)},
            "language",
        ),
        (lambda w: {"layers.0.blocks.0.op.A_logs": torch.ones(2, 2)}, "VMamba"),
        (lambda w: {"vit.encoder.layer.0.attention.attention.query.weight": torch.ones(2, 2)}, "transformer"),
        (lambda w: {"conv1.weight": torch.ones(2, 2)}, "neither a Vision Mamba nor"),
        (lambda w: {**without(w, "cls_token"), "cls_token_head": w["cls_token"]}, "two class tokens"),
        (lambda w: {**w, "rope.freqs_cos": torch.ones(4)}, "rope"),
        (lambda w: without(w, "cls_token"), "no class token"),
        (lambda w: {**w, "pos_embed": torch.ones(1, 730, 32)}, "stride of 8"),
        (lambda w: {**w, "pos_embed": torch.ones(1, 16, 32)}, "16 rows"),
        (lambda w: {**w, "temporal_pos_embedding": torch.ones(1, 8, 32)}, "videomamba-convert opengvlab"),
    ],
)
def test_other_architectures_are_refused_by_name(vim, tmp_path, change, expected):
    source, weights = vim
    torch.save({"model": change(weights)}, source)
    assert expected in refusal(convert_vim_to_videomamba, source, tmp_path / "out")


def test_a_vision_mamba_is_no_opengvlab_image_classifier(vim, tmp_path):
    assert "videomamba-convert vim" in refusal(convert_opengvlab_to_videomamba, vim[0], tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--num-frames", "1", "--tubelet-size", "2"], "shorter than one tubelet"),
        (["--keep-head"], "no `head.weight`"),
        (["--image-size", "8"], "smaller than one patch"),
    ],
)
def test_options_that_do_not_fit(vim, tmp_path, options, expected):
    source, weights = vim
    save_vim(source, without(weights, "head.weight", "head.bias"))
    assert expected in refusal(convert_vim_to_videomamba, source, tmp_path / "out", *options)


@pytest.mark.parametrize("source", ["nowhere.pth", "no/where.pth", "someone/some-model", "someone/some-model:a.pth"])
def test_no_such_source(tmp_path, source):
    expected = "could not be downloaded" if source.startswith("someone") else "There is no file"
    assert expected in refusal(convert_vim_to_videomamba, source, tmp_path / "out")


def test_a_repository_of_several_checkpoints_needs_a_file_name(tmp_path, monkeypatch):
    names = ["README.md", "vim_s_midclstok_80p5acc.pth", "vim_s_midclstok_ft_81p6acc.pth"]
    monkeypatch.setattr(HfApi, "list_repo_files", lambda *args: names)
    error = refusal(convert_vim_to_videomamba, "hustvl/Vim-small-midclstok", tmp_path / "out")
    assert "hustvl/Vim-small-midclstok:vim_s_midclstok_80p5acc.pth" in error and "README" not in error


def test_output_with_something_in_it_is_left_alone(vim, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    convert(convert_vim_to_videomamba, vim[0], output)  # an empty folder will do
    (output / "mine.txt").write_text("mine")
    (output / "config.json").write_text("old")
    assert "--overwrite" in refusal(convert_vim_to_videomamba, vim[0], output)
    assert (output / "config.json").read_text() == "old"
    convert(convert_vim_to_videomamba, vim[0], output, "--overwrite", "--num-labels", "3")
    assert VideoMambaConfig.from_pretrained(output).num_labels == 3
    assert (output / "mine.txt").read_text() == "mine"
    assert "is a file" in refusal(convert_vim_to_videomamba, vim[0], output / "mine.txt")


@pytest.mark.parametrize("exists", [False, True])
def test_an_interrupted_run_leaves_what_was_there(vim, tmp_path, monkeypatch, exists):
    source, output = vim[0], tmp_path / "out"
    if exists:
        convert(convert_vim_to_videomamba, source, output, "--num-labels", "3")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    for place in (
        (checkpoints.VideoMambaImageProcessor, "save_pretrained"),  # after the weights are written
        (checkpoints.VideoMambaForVideoClassification, "save_pretrained"),
    ):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(*place, interrupt)
            convert(convert_vim_to_videomamba, source, output, "--num-labels", "5", "--overwrite")
        assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels.txt", "walk\nrun\njump\n"),
        ("labels.json", '["walk", "run", "jump"]'),
        ("labels.json", '{"0": "walk", "2": "jump", "1": "run"}'),
        ("labels.json", '{"run": "1", "walk": "0", "jump": "2"}'),  # as Something-Something V2 has it
    ],
)
def test_label_files(vim, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    folder = convert(convert_vim_to_videomamba, vim[0], tmp_path / "out", "--labels", str(tmp_path / name))
    config = VideoMambaConfig.from_pretrained(folder)
    assert config.id2label == {0: "walk", 1: "run", 2: "jump"} and config.label2id["jump"] == 2


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("labels.txt", "walk\nrun\n", "has 2 labels, the classifier has 7"),
        ("labels.txt", "walk\nrun\nwalk", "'walk' is there twice"),
        ("labels.txt", "walk\n\nrun", "a label is empty"),
        ("labels.json", '{"walk": 1, "run": 2}', "indices are not 0 to 1"),
        ("labels.json", "[1, 2]", "no text"),
        ("labels.json", "{", "cannot be used"),
    ],
)
def test_bad_label_files(opengvlab, tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    error = refusal(convert_opengvlab_to_videomamba, opengvlab[0], tmp_path / "out", "--labels", str(tmp_path / name))
    assert expected in error


def test_labels_of_a_data_set_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "labels.json").write_text('{"run": "1", "walk": "0"}')
    asked = []
    monkeypatch.setattr(
        checkpoints, "hf_hub_download", lambda *args, **kwargs: asked.append((args, kwargs)) or tmp_path / args[1]
    )
    assert checkpoints.read_labels("someone/some-actions:labels.json", 2) == ["walk", "run"]
    assert asked == [(("someone/some-actions", "labels.json"), {"repo_type": "dataset"})]


def test_kinetics_names_for_a_fresh_classifier(vim, tmp_path):
    folder = convert(convert_vim_to_videomamba, vim[0], tmp_path / "out", "--labels", "kinetics-400")
    assert VideoMambaConfig.from_pretrained(folder).id2label[399] == "zumba"


# ---- the repository, through the command line and a Hub ----


def test_vim_command_downloads_converts_and_pushes(vim, hub, python, tmp_path):
    source, name = "hustvl/Vim-small-midclstok", "vim_s_midclstok_80p5acc.pth"
    hub.files[source] = {name: vim[0].read_bytes(), "vim_s_midclstok_ft_81p6acc.pth": b""}
    options = ["--checkpoint", f"{source}:{name}", "--output", str(tmp_path / "out"), "--num-labels", "51"]
    command = ["-m", "conversion.convert_vim_to_videomamba", *options, "--push-to-hub", "you/vm", "--private"]
    printed = python.run(command, ROOT)
    assert "None left over" in printed and "you/vm" in printed
    assert hub.created["you/vm"], "private"
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert hub.files["you/vm"] == files
    assert {
        "README.md",
        "config.json",
        "model.safetensors",
        "modeling_videomamba.py",
        "configuration_videomamba.py",
        "video_processing_videomamba.py",
        "image_processing_videomamba.py",
        "frames_videomamba.py",
        "maps_videomamba.py",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
    } <= files.keys()
    card = files["README.md"].decode()
    assert "license: apache-2.0" in card and f"base_model: {source}" in card and f"{source}:{name}" in card
    assert "--position-init expand" in card and "%" not in card
    auto_map = json.loads(files["config.json"])["auto_map"]
    assert auto_map["AutoModelForVideoClassification"] == "modeling_videomamba.VideoMambaForVideoClassification"


def test_opengvlab_command_gives_a_classifier_that_runs(opengvlab, hub, python, tmp_path):
    hub.files["OpenGVLab/VideoMamba"] = {"README.md": b"", opengvlab[0].name: opengvlab[0].read_bytes()}
    output = tmp_path / "out"
    options = ["--checkpoint", "OpenGVLab/VideoMamba", "--output", output]
    python.run(["-m", "conversion.convert_opengvlab_to_videomamba", *options], ROOT)
    model = AutoModelForVideoClassification.from_pretrained(output)
    video, image = AutoVideoProcessor.from_pretrained(output), AutoImageProcessor.from_pretrained(output)
    assert (video.num_frames, video.frame_stride, video.spread_in_segments) == (8, None, True)
    assert video.antialias is image.antialias is False
    for processor in (video, image):
        assert list(processor.image_mean) == [0.485, 0.456, 0.406] and processor.crop_size["height"] == 64
    clip = torch.randint(0, 256, (8, 3, 80, 100), dtype=torch.uint8)
    with torch.no_grad():
        assert model(**video(clip, return_tensors="pt")).logits.shape == (1, 7)


@pytest.mark.parametrize("size", [(240, 320), (320, 240), (272, 640), (480, 848), (101, 227), (360, 361), (50, 40)])
def test_frames_of_opengvlab_files_are_those_of_their_evaluation(tmp_path, size):
    """Their loader takes the middles of segments, shrinks the shorter side with OpenCV and crops the centre."""
    cv2 = pytest.importorskip("cv2", reason="needs OpenCV")
    path = write_video(tmp_path / "clip.mkv", 50, size=size, codec="ffv1", pix_fmt="bgr0")
    config = VideoMambaConfig(num_frames=8, image_size=112)
    video, _ = checkpoints.make_processors(config, convert_opengvlab_to_videomamba.EVALUATION)
    frames = video.fetch_videos(path)[0].numpy()
    found = video(path, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]

    shrunk = tuple(112 if side == min(size) else int(112 * side / min(size)) for side in size)
    top, left = (int(round((side - 112) / 2.0)) for side in shrunk)
    segment = 49 / 8
    for i, ours in enumerate(found):
        index = min(int(np.round(segment * i)) + int(segment / 2), 49)
        theirs = cv2.resize(frames[index], shrunk[::-1], interpolation=cv2.INTER_LINEAR)
        theirs = theirs[top : top + 112, left : left + 112].transpose(2, 0, 1)
        assert np.abs(ours - theirs.astype(int)).max() <= 1


def test_command_line_errors_are_one_line(vim, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        convert_vim_to_videomamba.main(["--checkpoint", str(vim[0])])
    assert stop.value.code == 2 and "--output is needed" in capsys.readouterr().err
    for bad in (["--private"], ["--num-labels", "0"], ["--num-labels", "3", "--keep-head"]):
        with pytest.raises(SystemExit) as stop:
            convert(convert_vim_to_videomamba, vim[0], tmp_path / "out", *bad)
        assert stop.value.code == 2


# ---- another frame count or image size for what is already converted ----


@torch.no_grad()
def test_resize_position_embeddings(vim, tmp_path):
    folder = convert(convert_vim_to_videomamba, vim[0], tmp_path / "out", "--num-labels", "5", "--num-frames", "4")
    model = VideoMambaForVideoClassification.from_pretrained(folder)
    table = model.videomamba.embeddings.position_embeddings
    table.copy_(randn(*table.shape))
    before = table.clone()
    clip = randn(1, 8, 3, 96, 96)
    expected = model(clip, interpolate_pos_encoding=True).logits

    model.resize_position_embeddings(num_frames=8)
    after = model.videomamba.embeddings.position_embeddings
    first, second = before[0, 1:].view(2, 16, 32)
    by_hand = torch.stack([first, 0.75 * first + 0.25 * second, 0.25 * first + 0.75 * second, second])
    torch.testing.assert_close(after[0, 1:], by_hand.flatten(0, 1))
    assert torch.equal(after[:, 0], before[:, 0]) and after.requires_grad
    assert model.config.num_frames == 8 and model.config.image_size == 64

    model.resize_position_embeddings(image_size=96)
    torch.testing.assert_close(model(clip).logits, expected, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "resized")
    again = AutoModelForVideoClassification.from_pretrained(tmp_path / "resized")
    torch.testing.assert_close(again(clip).logits, expected, rtol=0, atol=1e-5)


def test_resize_position_embeddings_refuses_and_leaves_the_model_alone():
    model = VideoMambaModel(VideoMambaConfig(hidden_size=32, num_hidden_layers=1, image_size=32))
    before = model.embeddings.position_embeddings
    for size in ({"num_frames": 1}, {"image_size": 8}, {"num_frames": 0}, {"num_frames": 4, "image_size": -1}):
        with pytest.raises(StrictDataclassError, match="`(num_frames|image_size)`"):
            model.resize_position_embeddings(**size)
        assert model.embeddings.position_embeddings is before
        assert model.config.num_frames == 16 and model.config.image_size == 32


def test_source_in_memory_is_not_changed(opengvlab):
    _, weights = opengvlab
    before = {name: tensor.clone() for name, tensor in weights.items()}
    config = VideoMambaConfig(
        hidden_size=32, num_hidden_layers=2, image_size=64, num_frames=8, tubelet_size=1, num_labels=7
    )
    remap = convert_opengvlab_to_videomamba.convert_state_dict(weights, config)
    assert all(torch.equal(weights[name], before[name]) for name in before)
    buffer = io.BytesIO()
    torch.save(remap.target, buffer)  # plain tensors, that anything may be done with
    with torch.device("meta"):
        wanted = VideoMambaForVideoClassification(config).state_dict()
    assert {name: tensor.shape for name, tensor in remap.target.items()} == {k: v.shape for k, v in wanted.items()}


# ---- the published files ----


def test_the_page_holds_the_table_of_published_files(capsys):
    with pytest.raises(SystemExit) as stop:
        published_checkpoints.main(["--list"])
    assert stop.value.code == 0
    table = capsys.readouterr().out
    assert table.strip() in (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    assert table.count("\n| `videomamba_") == 58 and table.count("\n| `vim_") == 3
    row = published_checkpoints.PUBLISHED["videomamba_m16_k400_mask_ft_f64_res224to384.pth"]
    assert (row.hidden_size, row.num_frames, row.image_size, row.accuracy) == (576, 64, 384, 85.0)
    assert row.name == "videomamba-middle-k400-mask-f64-384"
    assert published_checkpoints.PUBLISHED["vim_s_midclstok_80p5acc.pth"].source == (
        "hustvl/Vim-small-midclstok:vim_s_midclstok_80p5acc.pth"
    )
    names = [row.name for row in published_checkpoints.PUBLISHED.values()]
    assert len(names) == len(set(names))


def test_kinetics_classifier_on_my_clip_in_three_commands(hub, python, tmp_path, monkeypatch, capsys):
    """As docs/checkpoints.md has it, with a smaller file of that format, of one layer and random weights."""
    name = "videomamba_t16_k400_f8_res224.pth"
    weights = random_weights("opengvlab", hidden_size=192, depth=1, frames=8, labels=400)
    torch.save({"model": weights}, tmp_path / name)
    hub.files["OpenGVLab/VideoMamba"] = {name: (tmp_path / name).read_bytes()}
    output = tmp_path / "videomamba-k400"
    options = ["--checkpoint", f"OpenGVLab/VideoMamba:{name}", "--output", output]
    python.run(["-m", "conversion.published_checkpoints", *options, "--push-to-hub", "you/videomamba-k400"], ROOT)
    card = ModelCard(hub.files["you/videomamba-k400"]["README.md"].decode())
    result = card.data.eval_results[0]
    assert (result.metric_value, result.dataset_name) == (76.9, "Kinetics-400") and not result.verified
    assert "authors' own" in result.metric_name and "8 frames × 3 crops × 4 clips" in result.metric_name
    assert result.source_url.endswith("video_sm/MODEL_ZOO.md") and result.source_url in card.text
    assert "--num_crops 3 --num_clips 4" in card.text and "nobody has measured" in card.text

    clip = write_video(tmp_path / "clip.mp4", frames=20)
    monkeypatch.setattr("sys.argv", ["classify_video.py", clip, "--model", str(output)])
    runpy.run_path(str(ROOT / "examples" / "tools" / "classify_video.py"), run_name="__main__")
    labels = set(VideoMambaConfig.from_pretrained(output).id2label.values())
    answers = [line.split("%  ")[1] for line in capsys.readouterr().out.splitlines() if "%  " in line]
    assert len(answers) == 3 and set(answers) <= labels and "zumba" in labels


def test_wrong_and_renamed_published_files(tmp_path):
    def refused(name, weights, *options):
        torch.save({"model": weights}, tmp_path / name)
        return refusal(published_checkpoints, tmp_path / name, tmp_path / "out", *options)

    video = random_weights("opengvlab", labels=174, frames=16, hidden_size=192, depth=1)
    error = refused("videomamba_t16_ssv2_f16.pth", video)
    assert "none of the published files" in error and "videomamba_t16_ssv2_f16_res224.pth" in error
    assert "174 labels of Something-Something V2" in refused("videomamba_t16_ssv2_f16_res224.pth", video)
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({f"template {i}": str(i) for i in range(174)}))
    options = ["--labels", str(labels)]
    assert "num_frames 16 (not 8)" in refused("videomamba_t16_ssv2_f8_res224.pth", video, *options)
    assert "hidden_size 192 (not 384)" in refused("videomamba_s16_ssv2_f16_res224.pth", video, *options)
    assert "num_labels 174 (not 10)" in refused("videomamba_t16_breakfast_f32_res224.pth", video, *options)
    labels.write_text('["walk", "run"]')
    assert "has 2 labels, the classifier has 174" in refused("videomamba_t16_ssv2_f16_res224.pth", video, *options)
    vim = random_weights("vim", labels=1000, hidden_size=192, depth=1)
    assert "num_labels 7" in refused("vim_t_midclstok_76p1acc.pth", random_weights("vim", 192, 1, labels=7))
    assert "is one of OpenGVLab" in refused("vim_s_midclstok_80p5acc.pth", video)
    torch.save({"model": vim}, tmp_path / "vim_t_midclstok_76p1acc.pth")
    folder = convert(published_checkpoints, tmp_path / "vim_t_midclstok_76p1acc.pth", tmp_path / "vim")
    card = ModelCard.load(folder / "README.md")
    assert card.data.eval_results[0].metric_value == 76.1 and card.data.pipeline_tag == "image-classification"
    assert type(AutoModelForImageClassification.from_pretrained(folder)) is VideoMambaForImageClassification
