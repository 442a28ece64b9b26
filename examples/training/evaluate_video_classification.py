#!/usr/bin/env python
"""Multi-view evaluation of a video classifier, as in papers: the mean score of several views of each clip.

    python examples/training/evaluate_video_classification.py --model_name_or_path you/videomamba-k400 \
        --validation_dir clips/validation --num_clips 5 --num_crops 3 --output_dir results

`--num_clips` parts of a clip, spread evenly from its beginning to its end, are each seen in `--num_crops` squares,
spread evenly along the longer side of the frames. One part is the one in the middle, as the model's own processor
takes it; one square is the one in the middle. With `accelerate launch` the clips are shared among processes; each clip
is counted once. The output folder gets `results.json`, `predictions.csv`, `scores.npz`, `classes.csv` and
`confusion_matrix.png`. Of clips with several labels each, the scores are those of a sigmoid, and measured are the
average precisions, as scikit-learn defines them; there is no confusion matrix.
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
from torchvision.transforms import v2
from tqdm import tqdm

from finetune import DecodeFailures
from modeling_videomamba import ClipLoader, predict_clips
from modeling_videomamba.video_decoding import DecodedVideoMetadata
from several_labels import IGNORED, has_several, multi_hot
from video_classification_data import (
    Normalize,
    clip_name,
    load_clips,
    load_metric,
    match_labels,
)
from video_classification_model import SEVERAL, load_model, to_scores, write_json, write_predictions


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


class Videos:
    """The files of a data set, by number: paths, URLs or bytes."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        video = self.rows[number]["video"]
        return video["path"] if video["bytes"] is None else video["bytes"]


class Views:
    """
    In a processor's place in `ClipLoader`: of a video it reads, once, the frames of all clips, resizes them, and cuts
    the views out of them where they are to be seen: uint8 (B, views, T, C, H, W), which `Normalize` takes.
    """

    start_seconds = stop_seconds = None
    do_center_crop = True  # for the loader, which reserves memory for frames of `crop_size`

    def __init__(self, reader, processor, num_clips, num_crops, order="sequential"):
        self.reader, self.num_clips, self.num_crops = reader, num_clips, num_crops
        self.order, self.decoder = frame_order(order, reader.num_frames), reader.decoder
        self.size = (processor.crop_size["height"], processor.crop_size["width"])
        self.shortest_edge = processor.size.get("shortest_edge") or max(self.size)
        self.antialias = getattr(processor, "antialias", True)
        self.num_frames = num_clips * reader.num_frames
        self.crop_size = {"height": self.shortest_edge, "width": 2 * self.shortest_edge}

    def sample_frames(self, metadata):
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

    def frame_transform(self, device=None):
        def resize(frames):
            return v2.functional.resize(frames.to(device), self.shortest_edge, antialias=self.antialias)

        return resize

    def crops(self, frames):
        """Squares of (num_clips · T, C, height, width), along the longer side and in the middle of the shorter one."""
        height, width = self.size
        spare = (max(0, frames.shape[-2] - height), max(0, frames.shape[-1] - width))
        for share in np.linspace(0, 1, self.num_crops) if self.num_crops > 1 else [0.5]:
            top = spare[0] * (share if spare[0] > spare[1] else 0.5)
            left = spare[1] * (share if spare[1] >= spare[0] else 0.5)
            yield v2.functional.crop(frames, round(top), round(left), height, width)

    def __call__(self, videos, **options):
        shape = (len(videos), self.num_crops, self.num_clips, len(self.order), 3, *self.size)
        views = videos[0].new_empty(shape)
        for video, frames in enumerate(videos):
            for number, crop in enumerate(self.crops(frames)):
                for place, source in enumerate(self.order):
                    views[video, number, :, place] = crop[source :: len(self.order)]
        return {"pixel_values": views.flatten(1, 2)}


def score(model, processor, clips, views, failures, args, process):
    """
    The scores of the clips, the mean over their views, and their labels, (clips,) or of several a clip, 0 or 1,
    (clips, labels); None where another process has them. A clip that cannot be read has the label -100, and is written
    down.
    """
    # Each process takes every n-th clip: none twice, none left out, whatever the number of processes.
    own, count = list(range(process.process_index, len(clips), process.num_processes)), args.per_device_eval_batch_size
    loader = ClipLoader(
        Videos(clips),
        views,
        batch_sampler=[own[start : start + count] for start in range(0, len(own), count)],
        num_workers=args.dataloader_num_workers,
        device=process.device,
    )
    several, count = model.config.problem_type == SEVERAL, model.config.num_labels
    key, normalize = processor.model_input_names[0], Normalize(processor, process.device)

    def look(pixel_values):
        scores = []
        for part in pixel_values.flatten(0, 1).split(args.max_views_per_step):
            with torch.autocast(process.device.type, torch.bfloat16, enabled=args.bf16):
                scores.append(to_scores(model(**{key: normalize(part)}).logits.float(), several))
        return {"scores": torch.cat(scores).unflatten(0, pixel_values.shape[:2]).mean(1)}

    parts, shown = [], process.is_main_process
    for batch, outputs in tqdm(predict_clips(look, loader), "evaluation", len(loader), disable=not shown):
        for number, reason in batch.errors.items():
            failures.record(clip_name(clips[number]["video"]), reason)
            parts.append((number, np.zeros(count, np.float32), IGNORED))
        found = outputs["scores"].numpy() if outputs else ()
        parts += [(number, row, clips[number]["label"]) for number, row in zip(batch.clips, found, strict=True)]
    parts = sorted(gather_object(parts) if process.num_processes > 1 else parts, key=lambda part: part[0])
    if not process.is_main_process:
        return None, None
    if [part[0] for part in parts] != list(range(len(clips))):
        raise RuntimeError(f"{len(parts)} results came back for {len(clips)} clips.")
    labels = [multi_hot(part[2], count).numpy() if several else part[2] for part in parts]
    return np.stack([part[1] for part in parts]), np.array(labels)


def summarise(scores, labels):
    """Accuracies with their intervals, or average precisions, and how many clips were counted and skipped."""
    counted = int((labels.reshape(len(labels), -1)[:, 0] != IGNORED).sum())
    return load_metric(labels.ndim == 2)(scores, labels) | {"clips": counted, "skipped": len(labels) - counted}


def report(results):
    """The results in a line."""
    count = results["clips"]
    text = f"{count} clip{'s' if count != 1 else ''}, {results['views']} views: "
    if "mean_average_precision" in results:
        macro, micro = results["mean_average_precision"], results["micro_average_precision"]
        text += f"mAP {macro:.1%} over {results['measured_labels']} labels, micro {micro:.1%}"
        return f"{text}; {results['skipped']} could not be read"
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
    # Without `cpu`, two processes on a machine without a GPU would not know of each other.
    process = PartialState(cpu=args.use_cpu or not torch.accelerator.is_available())
    os.makedirs(args.output_dir, exist_ok=True)
    failures = DecodeFailures(args.output_dir, data_args.max_decode_failures)
    with process.main_process_first():  # it writes the caches that the others read
        if process.is_main_process:
            failures.forget()
        splits, names = load_clips(data_args, ["validation"], 0, failures)
    several = has_several(splits["validation"])
    model, names, reader, processor, _ = load_model(model_args, names, False, several)
    clips = match_labels(splits["validation"], names)
    views = Views(reader, processor, args.num_clips, args.num_crops, args.frame_order)
    scores, labels = score(model.eval().to(process.device), processor, clips, views, failures, args, process)
    if not process.is_main_process:
        return

    results = summarise(scores, labels)
    results |= {"views": f"{args.num_clips} x {args.num_crops}", "frame_order": args.frame_order}
    write_predictions(args.output_dir, [clip_name(video) for video in clips["video"]], labels, scores, names)
    np.savez_compressed(f"{args.output_dir}/scores.npz", scores=scores, labels=labels)
    write_json(f"{args.output_dir}/results.json", results)
    print(report(results))


if __name__ == "__main__":
    main()
