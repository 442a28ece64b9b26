#!/usr/bin/env python
"""Multi-view evaluation of a video classifier, as in papers: the mean score of several views of each clip.

    python examples/training/evaluate_video_classification.py --model_name_or_path you/videomamba-k400 \
        --validation_dir clips/validation --num_clips 5 --num_crops 3 --output_dir results

`--num_clips` parts of a clip, spread evenly from its beginning to its end, are each seen in `--num_crops` squares,
spread evenly along the longer side of the frames. One part is the one in the middle, as the model's own processor
takes it; one square is the one in the middle. With `accelerate launch` the clips are shared among processes; each clip
is counted once. The output folder gets `results.json`, `predictions.csv`, `scores.npz`, `classes.csv` and
`confusion_matrix.png`.
"""

import os
from dataclasses import dataclass, field

from video_classification_arguments import DataArguments, ModelArguments, check_command_line, parse_arguments


@dataclass
class EvaluationArguments:
    """How to look at the clips."""

    _argument_group_name = "evaluation"

    output_dir: str = field(metadata={"help": "Folder for the results."})
    num_clips: int = field(default=1, metadata={"help": "Clips per video."})
    num_crops: int = field(default=1, metadata={"help": "Crops per frame."})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Videos per process and step."})
    max_views_per_step: int = field(default=64, metadata={"help": "Views that go through the model at once."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that read videos, for each process."})
    bf16: bool = field(default=False, metadata={"help": "Mixed precision with bfloat16."})
    use_cpu: bool = field(default=False, metadata={"help": "Do not use a GPU."})
    frame_order: str = field(
        default="sequential",
        metadata={
            "choices": ["sequential", "block-wise", "pairwise", "interleaved"],
            "help": "Show the frames of each view in another order (paper, section 5.2).",
        },
    )


if __name__ == "__main__":
    check_command_line(ModelArguments, DataArguments, EvaluationArguments)

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import v2
from tqdm import tqdm

from finetune import IGNORED, DecodeFailures
from modeling_videomamba.video_decoding import DecodedVideoMetadata
from video_classification_data import (
    Clips,
    Normalize,
    load_accuracy,
    load_clips,
    match_labels,
    read_frames,
)
from video_classification_model import load_model, write_json, write_predictions


def frame_order(name, num_frames):
    """
    The orders of frames of section 5.2 and table 1, which the paper gives for 8 frames, for any even number of them.

    - `"sequential"`: as they are;
    - `"block-wise"`: 5 6 7 8 1 2 3 4, the second half before the first;
    - `"pairwise"`: 1 2 7 8 5 6 3 4, the first pair, then the other pairs from the last to the second;
    - `"interleaved"`: 1 8 2 7 3 6 4 5, from both ends to the middle.

    Returns:
        `list[int]`: frame numbers from 0.

    Raises:
        ValueError: for an odd number of frames, but in sequential order.
    """
    frames = list(range(num_frames))
    if name == "sequential":
        return frames
    if num_frames % 2:
        raise ValueError(
            f"The {name} order needs an even number of frames, but the model takes {num_frames}. Leave it out, or "
            "take another model."
        )
    half = num_frames // 2
    if name == "block-wise":
        return frames[half:] + frames[:half]
    pairs = [[2 * number, 2 * number + 1] for number in range(half)]
    if name == "pairwise":
        return sum([pairs[0], *reversed(pairs[1:])], [])
    if name == "interleaved":
        return sum([[number, num_frames - 1 - number] for number in range(half)], [])
    raise ValueError(f"{name!r} is not an order of frames: sequential, block-wise, pairwise or interleaved.")


class ViewsTransform:
    """Reads a video once and cuts its views out of it: uint8 (views, T, C, H, W), which `Normalize` takes."""

    def __init__(self, reader, processor, num_clips, num_crops, order="sequential"):
        self.reader, self.processor, self.num_clips, self.num_crops = reader, processor, num_clips, num_crops
        self.order = frame_order(order, reader.num_frames)
        self.size = (processor.crop_size["height"], processor.crop_size["width"])
        self.shortest_edge = processor.size.get("shortest_edge") or max(self.size)

    def sample(self, metadata):
        """Frame indices (num_clips · T,). A video shorter than a part is spread over it, as the reader does."""
        total, (frames, stride) = metadata.total_num_frames, (self.reader.num_frames, self.reader.frame_stride)
        if getattr(self.reader, "sampling_fps", None) and self.num_clips > 1:
            return self.sample_by_time(metadata)
        span = (frames - 1) * stride + 1 if stride is not None else total
        if self.num_clips > 1 and stride is None:
            # Each clip spreads over the whole video and begins a little later: OpenGVLab's test of sparse sampling.
            step = (total - 1) / frames
            shifts = (step / (self.num_clips + 1) * np.arange(1, self.num_clips + 1)).astype(int)
            starts = np.round(step * np.arange(frames)).astype(int)
            return np.minimum(shifts[:, None] + starts, total - 1).ravel()
        if self.num_clips == 1 or span >= total:
            return np.tile(self.reader.sample_frames(metadata), self.num_clips)
        starts = np.linspace(0, total - span, self.num_clips).round().astype(int)
        return (starts[:, None] + stride * np.arange(frames)).ravel()

    def sample_by_time(self, metadata):
        """Each clip is the middle of a section as long as what the model sees; the sections spread over the video."""
        times = getattr(metadata, "frame_times", None)
        if times is None:
            times = np.arange(metadata.total_num_frames + 1) / metadata.fps
        length, indices = self.reader.num_frames / self.reader.sampling_fps, []
        for start in np.linspace(0, max(0, times[-1] - length), self.num_clips):
            ends = np.clip(times - start, 0, min(length, times[-1]))  # those outside are shown for no time
            section = DecodedVideoMetadata(metadata.total_num_frames, metadata.fps, frame_times=ends)
            indices.append(self.reader.sample_frames(section))
        return np.concatenate(indices)

    def __call__(self, video, label):
        views = self.num_clips * self.num_crops
        if label == IGNORED:
            empty = torch.zeros(views, self.reader.num_frames, 3, *self.size, dtype=torch.uint8)
            return {"views": empty, "labels": label}
        frames = read_frames(self.reader, video, self.sample)
        frames = v2.functional.resize(frames, self.shortest_edge, antialias=getattr(self.processor, "antialias", True))
        height, width = self.size
        spare = (max(0, frames.shape[-2] - height), max(0, frames.shape[-1] - width))
        crops = []
        for share in np.linspace(0, 1, self.num_crops) if self.num_crops > 1 else [0.5]:
            # The places along the longer side; in the middle of the shorter one.
            top = spare[0] * (share if spare[0] > spare[1] else 0.5)
            left = spare[1] * (share if spare[1] >= spare[0] else 0.5)
            crops.append(v2.functional.crop(frames, round(top), round(left), height, width))
        views = torch.stack(crops)
        return {"views": views.unflatten(1, (self.num_clips, -1)).flatten(0, 1)[:, self.order], "labels": label}


@torch.no_grad()
def score(model, processor, dataset, args, process):
    """The scores of the clips, the mean over their views, and their labels; None where another process has them."""
    # Each process takes every n-th clip: none twice, none left out, whatever the number of processes.
    own = range(process.process_index, len(dataset), process.num_processes)
    on_gpu = process.device.type == "cuda"
    loader = DataLoader(
        Subset(dataset, own),
        args.per_device_eval_batch_size,
        num_workers=args.dataloader_num_workers,
        pin_memory=on_gpu,
    )
    key, normalize = processor.model_input_names[0], Normalize(processor, process.device)
    scores, labels = [], []
    for batch in tqdm(loader, desc="evaluation", disable=not process.is_main_process):
        chunks = []
        for views in batch["views"].flatten(0, 1).split(args.max_views_per_step):
            with torch.autocast(process.device.type, torch.bfloat16, enabled=args.bf16):
                logits = model(**{key: normalize(views.to(process.device, non_blocking=True))}).logits
            chunks.append(logits.float().softmax(-1))
        scores.append(torch.cat(chunks).unflatten(0, (len(batch["labels"]), -1)).mean(1).cpu())
        labels += batch["labels"].tolist()
    parts = list(zip(own, torch.cat(scores).numpy() if scores else [], labels, strict=True))
    parts = sorted(gather_object(parts) if process.num_processes > 1 else parts, key=lambda part: part[0])
    if not process.is_main_process:
        return None, None
    if [part[0] for part in parts] != list(range(len(dataset))):
        raise RuntimeError(f"{len(parts)} results came back for {len(dataset)} clips.")
    return np.stack([part[1] for part in parts]), np.array([part[2] for part in parts])


def summarise(scores, labels):
    """Accuracies with their intervals, and how many clips were counted and skipped."""
    counted = int((labels != IGNORED).sum())
    return load_accuracy().compute(predictions=scores, references=labels) | {
        "clips": counted,
        "skipped": len(labels) - counted,
    }


def report(results):
    """The results in a line."""
    count = results["clips"]
    text = f"{count} clip{'s' if count != 1 else ''}, {results['views']} views: "
    for title, name in (("top-1", "accuracy"), ("top-5", "top5_accuracy")):
        if name in results:
            share, low, high = (results[f"{name}{bound}"] for bound in ("", "_low", "_high"))
            text += f"{title} {share:.1%} ({low:.1%} to {high:.1%}), "
    return f"{text}mean of classes {results['mean_class_accuracy']:.1%}; {results['skipped']} could not be read"


def main():
    model_args, data_args, args = parse_arguments(ModelArguments, DataArguments, EvaluationArguments)
    if model_args.model_name_or_path is None:
        raise ValueError("Name the model to evaluate with --model_name_or_path.")
    if min(args.num_clips, args.num_crops) < 1:
        raise ValueError(f"--num_clips {args.num_clips} and --num_crops {args.num_crops} must both be at least 1.")
    if data_args.streaming:
        raise ValueError("Evaluation shares the clips among processes by their numbers: leave out --streaming.")
    process = PartialState(cpu=args.use_cpu)
    os.makedirs(args.output_dir, exist_ok=True)
    failures = DecodeFailures(args.output_dir, data_args.max_decode_failures)
    with process.main_process_first():  # it writes the caches that the others read
        if process.is_main_process:
            failures.forget()
        splits, names = load_clips(data_args, ["validation"], 0, failures)
    model, names, reader, processor, _ = load_model(model_args, names, training=False)
    clips = match_labels(splits["validation"], names)
    transform = ViewsTransform(reader, processor, args.num_clips, args.num_crops, args.frame_order)
    dataset = Clips(clips, transform, failures)
    scores, labels = score(model.eval().to(process.device), processor, dataset, args, process)
    if not process.is_main_process:
        return

    results = summarise(scores, labels)
    results |= {"views": f"{args.num_clips} x {args.num_crops}", "frame_order": args.frame_order}
    write_predictions(args.output_dir, dataset.names(len(scores)), labels, scores, names)
    np.savez_compressed(f"{args.output_dir}/scores.npz", scores=scores, labels=labels)
    write_json(f"{args.output_dir}/results.json", results)
    print(report(results))


if __name__ == "__main__":
    main()
