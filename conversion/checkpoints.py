"""What the converters share: safe loading, the table of tensors, and the Hub repository they write."""

import argparse
import functools
import hashlib
import json
import os
import pickle
import re
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from modeling_videomamba import (
    VideoMambaForImageClassification,
    VideoMambaForVideoClassification,
    VideoMambaImageProcessor,
    VideoMambaModel,
    VideoMambaVideoProcessor,
)


CHECKPOINT_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")

# A tensor name that gives away another architecture, or a variant of Vision Mamba that has no counterpart here.
STRANGERS = (
    (r"\.attn\.qkv\.|\.attention\.attention\.", "a vision transformer (ViT, DeiT, VideoMAE)"),
    (r"embeddings\.position_embeddings$", "a converted VideoMamba: `from_pretrained` loads it as it is"),
    (r"^backbone\.(layers|embeddings?)\.|^lm_head\.", "a Mamba language model"),
    (r"^layers\.\d+\.blocks\.", "a VMamba or another hierarchical model"),
    (r"^cls_token_(head|tail)$", "a Vision Mamba with two class tokens"),
    (r"^rope\.", "a Vision Mamba with rotary position embeddings (rope)"),
)

# Per direction in the source (forward, backward), stacked on a leading axis of 2 in the target.
DIRECTIONS = {
    "conv_weight": ("conv1d.weight", "conv1d_b.weight"),
    "conv_bias": ("conv1d.bias", "conv1d_b.bias"),
    "x_proj_weight": ("x_proj.weight", "x_proj_b.weight"),
    "dt_proj_weight": ("dt_proj.weight", "dt_proj_b.weight"),
    "dt_proj_bias": ("dt_proj.bias", "dt_proj_b.bias"),
    "A_log": ("A_log", "A_b_log"),
    "D": ("D", "D_b"),
}


class CheckpointError(ValueError):
    """A checkpoint, label file or output folder that cannot be used; the message says why and what to do."""


@dataclass
class Checkpoint:
    """
    The weights of one file.

    Attributes:
        tensors: the state dict.
        origin: where it came from, in words: `repo_id:filename`, or the name of a local file.
        repo_id: the Hub repository, if it came from one.
        sha256: of the file.
        args: the training script's arguments, if the file has them.
        wrapping: keys beside the state dict (optimizer, epoch, ...).
    """

    tensors: dict[str, torch.Tensor]
    origin: str
    repo_id: str | None = None
    sha256: str = ""
    args: argparse.Namespace | None = None
    wrapping: list[str] = field(default_factory=list)

    @property
    def model_name(self):
        """What its authors call it: the training script's `--model`, else the file's name."""
        name = getattr(self.args, "model", None)
        return name if isinstance(name, str) else re.split(r"[:/]", self.origin)[-1]


def load_checkpoint(source):
    """
    Load a published checkpoint without running anything it may hold.

    Args:
        source (`str`): a local `.pth`, `.pt`, `.bin` or `.safetensors` file, or `repo_id[:filename]` on the Hub.

    Returns:
        `Checkpoint`: its tensors on the CPU, memory-mapped where the format allows.

    Raises:
        CheckpointError: if there is no such file, it is damaged, wants other classes than tensors and
            `argparse.Namespace`, or holds no state dict.
    """
    path, repo_id = Path(source), None
    if path.is_dir():
        raise CheckpointError(f"{source} is a folder, expected a file: one of {', '.join(CHECKPOINT_SUFFIXES)}.")
    if not path.exists():
        repo_id, _, filename = source.partition(":")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id) or repo_id.endswith(CHECKPOINT_SUFFIXES):
            raise CheckpointError(f"There is no file {source}, and it is no Hub repository (`repo_id[:filename]`).")
        path = _download(repo_id, filename)
    contents = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)

    wrapping = []
    for key in ("model", "module"):
        if isinstance(contents, dict) and isinstance(contents.get(key), dict):
            wrapping = [str(other) for other in contents if other != key]
            args, tensors = contents.get("args"), contents[key]
            break
    else:
        args, tensors = None, contents
    if (
        not isinstance(tensors, dict)
        or not tensors
        or not all(isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in tensors.items())
    ):
        found = f"the keys {list(tensors)[:5]}" if isinstance(tensors, dict) else type(tensors).__name__
        raise CheckpointError(
            f"{source} holds no state dict: expected tensors by name, alone or under `model` or `module`; "
            f"found {found}."
        )
    origin = path.name if repo_id is None else f"{repo_id}:{path.name}"
    return Checkpoint(dict(tensors), origin, repo_id, _sha256(path), args, wrapping)


def _download(repo_id, filename, repo_type=None):
    try:
        if not filename:
            files = [name for name in HfApi().list_repo_files(repo_id) if name.endswith(CHECKPOINT_SUFFIXES)]
            if len(files) != 1:
                raise CheckpointError(
                    f"{repo_id} holds {len(files)} checkpoints, name one: "
                    + (", ".join(f"{repo_id}:{name}" for name in files) or "none has a known suffix")
                )
            filename = files[0]
        return Path(hf_hub_download(repo_id, filename, repo_type=repo_type))
    except CheckpointError:
        raise
    except Exception as error:  # no network, no such repository, no access: each has its own class
        raise CheckpointError(f"{filename or 'A checkpoint'} of {repo_id} could not be downloaded: {error}") from error


def _read_safetensors(path):
    try:
        return load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}. Download it again.") from error


def _read_pickle(path):
    with open(path, "rb") as file:
        mmap = file.read(4) == b"PK\x03\x04"  # PyTorch's older format cannot be memory-mapped
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        if wanted := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"{path} was refused: beside tensors it wants to load `{wanted[1]}`, and loading that could run code. "
                "Only tensors, plain containers and `argparse.Namespace` are allowed. If you trust the file, save "
                "its state dict alone, in safetensors."
            ) from error
        raise CheckpointError(f"{path} is damaged or not a PyTorch checkpoint. Download it again.") from error
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise CheckpointError(
            f"{path} is damaged or not a PyTorch checkpoint ({error!r}). Download it again."
        ) from error


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_sizes(checkpoint):
    """
    What the tensors of a Vision Mamba or an OpenGVLab VideoMamba say about its architecture.

    Returns:
        `dict`: fields of [`VideoMambaConfig`], and `grid`, the patches along a frame's side.

    Raises:
        CheckpointError: if it is a checkpoint of something else, named if known.
    """
    tensors, names = checkpoint.tensors, "\n".join(checkpoint.tensors)
    for pattern, what in STRANGERS:
        if found := re.search(pattern, names, re.MULTILINE):
            raise CheckpointError(
                f"{checkpoint.origin} is not supported: it looks like {what}. Found the tensor "
                f"{next(name for name in tensors if found[0] in name)}."
            )
    axes = {
        "patch_embed.proj.weight": (4, 5),
        "pos_embed": (3,),
        "layers.0.mixer.A_log": (2,),
        "layers.0.mixer.dt_proj.weight": (2,),
        "layers.0.mixer.conv1d.weight": (3,),
    }
    for name, allowed in axes.items():
        if name not in tensors or tensors[name].ndim not in allowed:
            found = f"of shape {tuple(tensors[name].shape)}" if name in tensors else "missing"
            raise CheckpointError(
                f"{checkpoint.origin} is neither a Vision Mamba nor an OpenGVLab VideoMamba: its tensor {name} is "
                f"{found}. Its first tensors are {', '.join(list(tensors)[:5])}."
            )
    if "cls_token" not in tensors:
        raise CheckpointError(f"{checkpoint.origin} is not supported: it has no class token (`cls_token`).")
    inner, states = tensors["layers.0.mixer.A_log"].shape
    positions = tensors["pos_embed"].shape[1]
    grid = round((positions - 1) ** 0.5)
    if grid**2 + 1 != positions:
        raise CheckpointError(
            f"`pos_embed` of {checkpoint.origin} has {positions} rows, expected one for the class token and one for "
            "each patch of a square frame."
        )
    hidden_size, channels, *_, patch_size = tensors["patch_embed.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if re.match(r"layers\.\d+\.", name))
    return {
        "hidden_size": hidden_size,
        "num_channels": channels,
        "patch_size": patch_size,
        "num_hidden_layers": depth,
        "expand": inner // hidden_size,
        "state_size": states,
        "time_step_rank": tensors["layers.0.mixer.dt_proj.weight"].shape[1],
        "conv_kernel": tensors["layers.0.mixer.conv1d.weight"].shape[-1],
        "grid": grid,
    }


def wide(tensor):
    """The tensor in float32 at least, to compute in: what comes out is rounded once, to the target's type."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class Remap:
    """
    A state dict on its way to another, with the table of where every tensor went.

    Attributes:
        target: the state dict that grows.
        rows: (source, what was done, target), a row for each source tensor at least, and for each target tensor;
            source or target is "-" where there is none.
        dtype: of the target: the source's, or the one that holds all of them if the source mixes several.
    """

    def __init__(self, source):
        self.source, self.target, self.rows = source, {}, []
        self.dtype = functools.reduce(torch.promote_types, {tensor.dtype for tensor in source.values()})

    def take(self, name):
        if name not in self.source:
            raise CheckpointError(f"The checkpoint has no tensor {name}.")
        return self.source[name]

    def move(self, name, target, how="copied", make=lambda tensor: tensor):
        self.put(target, make(self.take(name)))
        self.rows.append((name, how, target))

    def put(self, target, tensor):
        self.target[target] = tensor.to(self.dtype).contiguous()

    def drop(self, name, reason):
        self.rows.append((name, f"dropped: {reason}", "-"))

    def encoder(self, depth, prefix, out_proj_scale=1, final_norm="norm_f.weight"):
        """What Vision Mamba and OpenGVLab's VideoMamba have alike: class token, layers and final norm."""
        self.move("cls_token", f"{prefix}embeddings.cls_token")
        self.move("patch_embed.proj.bias", f"{prefix}embeddings.patch_embeddings.projection.bias")
        for layer in range(depth):
            ours, theirs = f"{prefix}layers.{layer}.", f"layers.{layer}."
            self.move(f"{theirs}norm.weight", f"{ours}norm.weight")
            self.move(f"{theirs}mixer.in_proj.weight", f"{ours}mixer.in_proj.weight")
            for target, pair in DIRECTIONS.items():
                both = [self.take(f"{theirs}mixer.{name}") for name in pair]
                if target == "conv_weight":
                    both = [weight.squeeze(1) for weight in both]
                if both[0].shape != both[1].shape:
                    raise CheckpointError(f"{theirs}mixer: {pair[0]} and {pair[1]} differ in shape.")
                self.put(f"{ours}mixer.{target}", torch.stack(both))
                self.rows += [
                    (f"{theirs}mixer.{name}", "copied", f"{ours}mixer.{target}[{i}]") for i, name in enumerate(pair)
                ]
            how = "copied" if out_proj_scale == 1 else f"scaled by {out_proj_scale}"
            self.move(
                f"{theirs}mixer.out_proj.weight",
                f"{ours}mixer.out_proj.weight",
                how,
                lambda weight: weight if out_proj_scale == 1 else weight * out_proj_scale,
            )
        self.move(final_norm, f"{prefix}norm.weight")


def build_model(checkpoint, config, remap, with_head):
    """
    The model with the converted weights; what they do not cover (a fresh classifier) is initialised as the model does.

    Raises:
        CheckpointError: if a tensor is left over on either side, has a wrong shape, or holds NaN or infinity.
    """
    classifier = VideoMambaForImageClassification if config.num_frames == 1 else VideoMambaForVideoClassification
    with torch.device("meta"):
        model = (classifier if with_head else VideoMambaModel)(config)
    for key in checkpoint.wrapping:
        remap.drop(key, "beside the weights")
    if with_head and "classifier.weight" not in remap.target:
        model.classifier.to_empty(device="cpu")
        model._init_weights(model.classifier)
        for name, tensor in model.classifier.named_parameters(prefix="classifier"):
            remap.put(name, tensor.detach())
            remap.rows.append(("-", "initialised", name))

    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in remap.target.items()}
    moved = {source for source, _, _ in remap.rows}
    problems = [f"nothing uses the tensor {name}" for name in checkpoint.tensors if name not in moved]
    problems += [f"nothing fills {name}" for name in wanted if name not in shapes]
    problems += [f"the model has no {name}" for name in shapes if name not in wanted]
    problems += [
        f"{name} would be {shapes[name]}, the model expects {wanted[name]}"
        for name in wanted
        if name in shapes and shapes[name] != wanted[name]
    ]
    # The extremes tell: NaN is passed on to both, and neither makes a tensor of the weights' size.
    extremes = {name: torch.stack(tensor.aminmax()) for name, tensor in remap.target.items()}
    problems += [f"{name} holds NaN or infinity" for name in extremes if not extremes[name].isfinite().all()]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise CheckpointError(f"{checkpoint.origin} does not convert: {'; '.join(problems[:5])}{more}.")
    model.load_state_dict(remap.target, assign=True)
    return model.eval()


def format_table(remap):
    """The table of where every tensor went and came from, and two lines that sum it up."""

    def shaped(name, tensors):
        return f"{name} {tuple(tensors[name].shape)}" if name in tensors else name

    rows = [("source", "what was done", "target")]
    rows += [(shaped(s, remap.source), how, shaped(t, remap.target)) for s, how, t in remap.rows]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    done = {}
    for source, how, _ in remap.rows:
        if source in remap.source:
            done.setdefault(re.split(r"[ :]", how)[0], set()).add(source)
    done = ", ".join(f"{len(sources)} {how}" for how, sources in done.items())
    lines += [
        "",
        f"{len(remap.source)} source tensors: {done}. None left over.",
        f"{len(remap.target)} target tensors in {str(remap.dtype).removeprefix('torch.')}. None left over.",
    ]
    return "\n".join(lines)


def read_labels(source, num_labels=None):
    """
    Label names in index order.

    Args:
        source (`str`): a text file with a label a line; a `.json` file with a list, `{index: label}` or
            `{label: index}`; `repo_id:filename`, such a file of a data set on the Hub; or `kinetics-400` or
            `imagenet-1k`, whose names torchvision holds.
        num_labels (`int`, *optional*): how many there must be.

    Raises:
        CheckpointError: if there are not as many, or a file is no list of different labels.
    """
    if source == "kinetics-400":
        from torchvision.models.video import MViT_V2_S_Weights

        labels = MViT_V2_S_Weights.DEFAULT.meta["categories"]
    elif source == "imagenet-1k":
        from torchvision.models import ResNet50_Weights

        labels = ResNet50_Weights.DEFAULT.meta["categories"]
    else:
        path = Path(source)
        if not path.exists() and (on_hub := re.fullmatch(r"([\w.-]+/[\w.-]+):(.+)", source)):
            path = _download(*on_hub.groups(), repo_type="dataset")
        labels = _read_label_file(path)
    if num_labels not in (None, len(labels)):
        raise CheckpointError(f"{source} has {len(labels)} labels, the classifier has {num_labels}.")
    return labels


def _read_label_file(path):
    try:
        text = path.read_text(encoding="utf-8")
        labels = json.loads(text) if path.suffix == ".json" else [line.strip() for line in text.rstrip().split("\n")]
        if isinstance(labels, dict):
            by_index = labels if all(key.isdecimal() for key in labels) else {v: k for k, v in labels.items()}
            by_index = {int(index): label for index, label in by_index.items()}
            if sorted(by_index) != list(range(len(labels))):
                raise ValueError(f"its indices are not 0 to {len(labels) - 1}, each once")
            labels = [by_index[index] for index in range(len(labels))]
        if not isinstance(labels, list) or not all(isinstance(label, str) and label for label in labels):
            raise ValueError("a label is empty or no text")
        if len(set(labels)) != len(labels):
            raise ValueError(f"{next(label for label in labels if labels.count(label) > 1)!r} is there twice")
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"The label file {path} cannot be used: {error}.") from error
    return labels


def label_fields(labels):
    """The config's fields for these label names."""
    return {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}


def run(parser, convert, argv=None):
    """
    Parse the command line, convert, print the table, write the folder, and push it if asked.

    Args:
        parser (`argparse.ArgumentParser`): one of `command_lines`.
        convert: a function from the parsed options to (remap, model, sampling, card).
        argv (`list[str]`, *optional*): the command line's, by default.
    """
    options = parser.parse_args(argv)
    if options.private and not options.push_to_hub:
        parser.error("--private needs --push-to-hub")
    if not options.dry_run and not options.output:
        parser.error("--output is needed, unless --dry-run")
    try:
        if not options.dry_run:
            check_output(options.output, options.overwrite)
        remap, model, sampling, card = convert(options)
        if not options.dry_run:
            files = write_repository(model, sampling, card, options.output, options.overwrite)
    except (ValueError, StrictDataclassError, OSError, RuntimeError) as error:  # the last two: a full disk, shapes
        raise SystemExit(f"error: {error}") from error
    print(format_table(remap))
    if options.dry_run:
        return
    print(f"\nWrote {options.output}: {', '.join(files)}")
    if options.push_to_hub:
        api = HfApi()
        try:
            repo_id = api.create_repo(options.push_to_hub, private=options.private or None, exist_ok=True).repo_id
            url = api.upload_folder(
                repo_id=repo_id,
                folder_path=options.output,
                allow_patterns=files,
                commit_message="Add converted weights",
            )
        except Exception as error:  # no network, no token, no access: each has its own class
            raise SystemExit(f"error: {options.output} is written, but not pushed: {error}") from error
        print(f"Pushed to {url}")


def check_output(output, overwrite):
    """Refuse an output that is a file, or a folder with something in it unless it may be overwritten."""
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"The output {output} is a file, expected a folder or nothing.")
    if not overwrite and output.is_dir() and any(output.iterdir()):
        raise CheckpointError(f"The output folder {output} is not empty. Name another one, or pass --overwrite.")


def make_processors(config, sampling):
    """
    The processors of a model: of files and of frames, or of images alone for a model of one frame. `sampling`: the
    settings of the video processor that say which frames it takes.
    """
    size = config.image_size
    if config.num_frames == 1:
        # Both families test their image classifiers so: the crop has 7/8 of the bicubic image's shorter edge.
        settings = {"shortest_edge": int(size / 0.875)}, PILImageResampling.BICUBIC
    else:
        settings = {"shortest_edge": size}, PILImageResampling.BILINEAR
    image = {
        "size": settings[0],
        "resample": settings[1],
        "crop_size": {"height": size, "width": size},
        "image_mean": IMAGENET_DEFAULT_MEAN,
        "image_std": IMAGENET_DEFAULT_STD,
    }
    if config.num_frames == 1:
        return [VideoMambaImageProcessor(single_images=True, **image)]
    video = VideoMambaVideoProcessor(num_frames=config.num_frames, **image, **sampling)
    return [video, VideoMambaImageProcessor(**image, antialias=video.antialias)]


def write_repository(model, sampling, card, output, overwrite=False):
    """
    Write a complete Hub repository: weights, config, processors, code and model card.

    It is written beside `output` under a temporary name and then renamed, so that an interrupted run leaves nothing
    at `output`. When an earlier folder is overwritten, files of other names stay.

    Args:
        model (`VideoMambaModel` or `VideoMambaForVideoClassification`).
        sampling (`dict`): settings of the video processor, which say how it samples and resizes frames.
        card (`str`): the model card.
        output (`str`): the folder.
        overwrite (`bool`): whether there may be something in it.

    Returns:
        `list[str]`: the names of the files.

    Raises:
        CheckpointError: see `check_output`.
    """
    check_output(output, overwrite)
    output = Path(output).resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", suffix=".partial", dir=output.parent) as scratch:
        new, old = Path(scratch, "new"), Path(f"{scratch}.old")
        model.save_pretrained(new)
        for processor in make_processors(model.config, sampling):
            processor.save_pretrained(new)
        (new / "README.md").write_text(card, encoding="utf-8")
        files = sorted(path.name for path in new.iterdir())
        if output.is_dir():
            os.replace(output, old)
        try:
            os.replace(new, output)
        except BaseException:
            if old.is_dir():
                os.replace(old, output)
            raise
    if old.is_dir():
        for path in old.iterdir():
            if path.name not in files:
                shutil.move(path, output / path.name)
        shutil.rmtree(old)
    return files


def model_card(checkpoint, model, family, license_source, settings):
    """
    A model card that states where the weights came from and what was done to them.

    Args:
        checkpoint (`Checkpoint`): the source.
        model (`VideoMambaModel` or `VideoMambaForVideoClassification`): the result.
        family (`str`): whose format the source has, as a Markdown link.
        license_source (`str`): a sentence that says where the licence is stated.
        settings (`list[str]`): a sentence for each setting of the conversion.
    """
    config = model.config
    with_head = isinstance(model, VideoMambaForVideoClassification)  # or its subclass for images
    kind = f"A classifier of {config.num_labels} labels" if with_head else "A backbone without a classifier"
    if config.num_frames == 1:
        media, what, processor, example = "image", "images", "AutoImageProcessor", 'Image.open("picture.jpg")'
    else:
        media, what = "video", f"clips of {config.num_frames} frames"
        processor, example = "AutoVideoProcessor", '"clip.mp4"'
    auto = f"AutoModelFor{media.capitalize()}Classification" if with_head else "AutoModel"
    header = ["license: apache-2.0", "library_name: transformers", "tags:", "- videomamba", f"- {media}"]
    header += [f"pipeline_tag: {media}-classification"] if with_head else []
    header += [f"base_model: {checkpoint.repo_id}"] if checkpoint.repo_id else []
    front_matter = "\n".join(header)
    listed = "\n".join(f"- {setting}" for setting in settings)
    return f"""---
{front_matter}
---

# VideoMamba from {checkpoint.origin}

{kind}: {config.num_hidden_layers} layers of width {config.hidden_size}, for {what} of \
{config.image_size} × {config.image_size} pixels.

## Source and licence

Converted from `{checkpoint.origin}` (SHA-256 `{checkpoint.sha256}`), a checkpoint in the format of {family}. \
{license_source} If the file is somebody else's, their licence counts.

## Conversion

{listed}
- The weights have the source's precision: {str(model.dtype).removeprefix("torch.")}.

## Accuracy

Nobody has measured the accuracy of these converted weights.

## Use

```python
{"from PIL import Image" + chr(10) if media == "image" else ""}from transformers import {auto}, {processor}

repo = "..."  # this folder, or its name on the Hub
processor = {processor}.from_pretrained(repo, trust_remote_code=True)
model = {auto}.from_pretrained(repo, trust_remote_code=True)
outputs = model(**processor({example}, return_tensors="pt"))
```
"""
