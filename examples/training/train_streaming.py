#!/usr/bin/env python
"""Trains a video classifier that streams: it goes on from clip to clip, and each step in time has a label.

    python examples/training/train_streaming.py --train_dir clips/train --output_dir my-stream \
        --model_name_or_path model_cards/videomamba-tiny-camera-motion --max_steps 4000 --bf16

Each row of a batch is a stream without an end: the next batch's clips begin with the states that the last ones ended
with (gradients stop there), so that a trained model has met states of any age. A row begins anew at random. The steps
right after a change of clip do not count: the window that is classified still shows the clip before.

The model to start from may be one that takes whole clips: its backward scan is then turned frame by frame, and its
positions become their mean over time. What is written are the averaged weights, as a complete Hub repository. The same
command run again goes on from the last saved state.
"""

import os
from dataclasses import dataclass, field

from video_classification_arguments import DataArguments, check_command_line, parse_arguments


@dataclass
class StreamArguments:
    """The model, and how it is trained."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub repository of the classifier to start from."})
    output_dir: str = field(metadata={"help": "Folder for the trained model."})
    sampling_fps: float | None = field(
        default=None, metadata={"help": "Frames a second; the processor's if it is left out."}
    )
    max_steps: int = field(default=4000, metadata={"help": "Optimizer steps."})
    num_streams: int = field(default=64, metadata={"help": "Streams in a batch; each shows one clip a step."})
    begin_anew: float = field(default=0.25, metadata={"help": "Share of the streams that begin anew with a clip."})
    pooling_window: int = field(default=4, metadata={"help": "Steps in time that are classified together."})
    skipped_steps: int = field(default=2, metadata={"help": "Steps after a change of clip that do not count."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Of AdamW, at its highest."})
    weight_decay: float = field(default=0.05, metadata={"help": "Of AdamW; not of A, D, biases, norms, positions."})
    warmup_steps: int = field(default=100, metadata={"help": "Steps until the learning rate is at its highest."})
    average_decay: float = field(default=0.998, metadata={"help": "Of the running average of the weights."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that read clips."})
    logging_steps: int = field(default=100, metadata={"help": "Steps between two lines of the log."})
    save_steps: int = field(default=1000, metadata={"help": "Steps between two saved states."})
    bf16: bool = field(default=False, metadata={"help": "Autocast to bfloat16."})
    seed: int = field(default=0, metadata={"help": "Of the order of the clips, and of all that is random."})


if __name__ == "__main__":
    check_command_line(StreamArguments, DataArguments)

import torch
from accelerate import Accelerator
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, RandomSampler
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForVideoClassification,
    AutoVideoProcessor,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from finetune import DecodeFailures, keep_settings
from modeling_videomamba import (
    VideoMambaConfig,
    VideoMambaForVideoClassification,
    VideoMambaForVideoFrameClassification,
    VideoMambaImageProcessor,
)
from modeling_videomamba.configuration_videomamba import unstreamable_reason
from several_labels import IGNORED, has_several
from video_classification_data import load_clips, match_labels, transform_clips
from video_classification_model import parameter_groups, save_for_users, write_results


STREAMABLE = {"backward_scan": "spatial", "class_token_position": "none", "position_embedding_type": "spatial"}


def load_streaming_model(name):
    """A classifier that can stream, with the weights of `name`, which may take whole clips."""
    config = AutoConfig.from_pretrained(name)
    if unstreamable_reason(config) is None:
        return VideoMambaForVideoFrameClassification.from_pretrained(name)
    if config.class_token_position != "none" or config.position_embedding_type == "sinusoidal":
        raise ValueError(
            f"{name} has a class token or sinusoidal positions, and a model that streams has neither. Start from one "
            'with class_token_position="none" and learned positions, or train one from random weights.'
        )
    weights = AutoModelForVideoClassification.from_pretrained(name).state_dict()
    if config.position_embedding_type == "learned":
        key = next(key for key in weights if key.endswith("position_embeddings"))
        steps = weights[key].unflatten(1, (config.grid_size[0], -1))
        weights[key] = steps.mean(1)
    model = VideoMambaForVideoFrameClassification(VideoMambaConfig(**config.to_dict() | STREAMABLE))
    model.load_state_dict(weights)
    return model


class StreamTraining:
    """Streams through the model, batch after batch. `save` keeps what a resumed run needs."""

    def __init__(self, model, finish, args):
        self.model, self.finish, self.args, self.step, self.cache = model, finish, args, 0, None
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.average_decay))
        groups = parameter_groups(model, args.learning_rate, args.weight_decay, layer_decay=1.0)
        self.optimizer = torch.optim.AdamW(groups, fused=model.device.type == "cuda")
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, args.warmup_steps, args.max_steps)

    def labels_of_steps(self, labels, anew):
        """(B, n_t): the clip's label, but for the first steps of a clip that follows another."""
        steps = labels[:, None].repeat(1, self.model.config.grid_size[0])
        steps[~anew, : self.args.skipped_steps] = IGNORED
        return steps

    def train_on(self, batch):
        """One optimizer step with the next clip of each stream; the loss, and the share of right steps."""
        device, key = self.model.device, self.model.main_input_name
        anew = torch.rand(len(batch["labels"])) < (self.args.begin_anew if self.step else 1.0)
        labels = self.labels_of_steps(batch["labels"], anew).to(device, non_blocking=True)
        if self.cache is not None:
            self.cache.reset(anew.nonzero().flatten().to(device, non_blocking=True))
        frames = self.finish({**batch, key: batch[key].to(device, non_blocking=True)})[key]
        with torch.autocast(device.type, torch.bfloat16, enabled=self.args.bf16):
            output = self.model(frames, labels=labels, cache=self.cache, use_cache=True)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.average.update_parameters(self.model)
        self.cache, self.step = output.cache.detach(), self.step + 1
        counted = labels != IGNORED
        right = ((output.logits.argmax(-1) == labels) & counted).sum() / counted.sum()
        return torch.stack([output.loss.detach(), right])

    def parts(self):
        return {"model": self.model, "average": self.average, "optimizer": self.optimizer, "schedule": self.schedule}

    def save(self, path):
        states = {name: part.state_dict() for name, part in self.parts().items()}
        torch.save(states | {"step": self.step, "random": torch.get_rng_state()}, f"{path}.part")
        os.replace(f"{path}.part", path)

    def load(self, path):
        """Goes on from a saved state; all streams begin anew."""
        states = torch.load(path, map_location=self.model.device, weights_only=True)
        for name, part in self.parts().items():
            part.load_state_dict(states[name])
        self.step = states["step"]
        torch.set_rng_state(states["random"].cpu())


def main():
    args, data_args = parse_arguments(StreamArguments, DataArguments)
    keep_settings(args.output_dir, vars(args) | vars(data_args))
    path = f"{args.output_dir}/state.pt"
    if os.path.exists(f"{args.output_dir}/train_results.json"):
        print(f"Already done: {args.output_dir} holds the model of this training. Nothing is trained.")
        return
    set_seed(args.seed)
    device = Accelerator().device
    model = load_streaming_model(args.model_name_or_path).to(device).train()
    window, model.config.pooling_window = model.config.pooling_window, args.pooling_window
    processor = AutoVideoProcessor.from_pretrained(args.model_name_or_path)
    if args.sampling_fps is not None:
        processor.sampling_fps = args.sampling_fps

    failures = DecodeFailures(args.output_dir, data_args.max_decode_failures)
    splits, _ = load_clips(data_args, ["train"], args.seed, failures)
    if has_several(splits["train"]):
        raise ValueError("Streams are trained with one label a clip, but these clips have lists of labels.")
    names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    splits["train"] = match_labels(splits["train"], names)
    how = data_args, processor, processor, failures, args.seed, args.dataloader_num_workers, device
    clips, finish = transform_clips(splits, names, *how)

    training = StreamTraining(model, finish, args)
    if os.path.exists(path):
        training.load(path)
        print(f"Going on from {path}: {training.step} of {args.max_steps} steps are done.")
    remaining = args.max_steps - training.step
    loader = DataLoader(
        clips["train"],
        args.num_streams,
        sampler=RandomSampler(clips["train"], replacement=True, num_samples=remaining * args.num_streams),
        num_workers=args.dataloader_num_workers,
        pin_memory=device.type == "cuda",
    )
    found = []
    for batch in tqdm(loader, total=remaining, unit="step", mininterval=5):
        found.append(training.train_on(batch))
        if training.step % args.logging_steps == 0:
            loss, right = torch.stack(found).mean(0).tolist()
            tqdm.write(f"step {training.step}: loss {loss:.3f}, {right:.1%} of the steps right")
            found = []
        if training.step % args.save_steps == 0:
            training.save(path)

    model.config.pooling_window = window
    clip_model = VideoMambaForVideoClassification(model.config)  # the class that the Auto classes load
    clip_model.load_state_dict(training.average.module.state_dict())
    image_processor = VideoMambaImageProcessor(size=processor.size, crop_size=processor.crop_size)
    save_for_users(clip_model.eval(), [processor, image_processor], args.output_dir)
    write_results(args.output_dir, "train", {"train_steps": training.step})
    if os.path.exists(path):
        os.remove(path)


if __name__ == "__main__":
    main()
