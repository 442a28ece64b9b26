#!/usr/bin/env python
"""Trains or fine-tunes a video classifier with a plain loop, for those who want to change it, on Accelerate.

    accelerate launch examples/training/run_video_classification_no_trainer.py --train_dir clips/train \
        --validation_dir clips/validation --model_name_or_path you/videomamba-k400 --output_dir my-classifier

It takes the data and recipe files of `run_video_classification.py`. After each epoch it evaluates; the output folder
is a complete Hub repository of the best model so far. Interrupted training goes on from the last checkpoint in
`--output_dir` when the same command is run again, as if it had never stopped; other settings are refused there.
`eval_results.json` has the metrics of that model, `history.json` all losses.
"""

import contextlib
import itertools
import math
import os
import shutil
from dataclasses import dataclass, field

from video_classification_arguments import DataArguments, ModelArguments, check_command_line, parse_arguments


@dataclass
class LoopArguments:
    """How to train. The names are those of `transformers.TrainingArguments`."""

    _argument_group_name = "training"

    output_dir: str = field(metadata={"help": "Folder for the best model, checkpoints and logs."})
    num_train_epochs: float = field(default=3, metadata={"help": "Passes over the training clips."})
    max_steps: int = field(default=-1, metadata={"help": "Optimizer steps, if above 0, instead of epochs."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Training clips per process and step."})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Evaluation clips per process and step."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches per optimizer step."})
    learning_rate: float = field(default=3e-4, metadata={"help": "Peak learning rate, after the warm-up."})
    weight_decay: float = field(default=0.05, metadata={"help": "Decay of AdamW, for matrices and kernels."})
    warmup_steps: float = field(default=0.0, metadata={"help": "Warm-up steps; below 1, the share of all steps."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    label_smoothing_factor: float = field(default=0.0, metadata={"help": "Share of each label spread over all."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Longer gradients are scaled to this norm."})
    bf16: bool = field(default=False, metadata={"help": "Mixed precision with bfloat16."})
    fp16: bool = field(default=False, metadata={"help": "Mixed precision with float16."})
    torch_compile: bool = field(default=False, metadata={"help": "Compile the model: faster after a first minute."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Less memory for about a third more time."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that read clips, for each process."})
    use_cpu: bool = field(default=False, metadata={"help": "Do not use a GPU."})
    seed: int = field(default=42, metadata={"help": "Random seed."})
    save_steps: int = field(default=500, metadata={"help": "Steps between checkpoints; also one per epoch."})
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints to keep."})
    logging_steps: int = field(default=50, metadata={"help": "Steps over which a reported loss is averaged."})
    report_to: str = field(default="none", metadata={"help": "tensorboard, wandb or another tracker of Accelerate."})
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the best model at the end."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Hub repository (default: as output_dir)."})
    hub_token: str | None = field(default=None, metadata={"help": "Hub token (default: that of `hf auth login`)."})
    hub_private_repo: bool | None = field(default=None, metadata={"help": "Create a private repository."})


if __name__ == "__main__":
    check_command_line(ModelArguments, DataArguments, LoopArguments)

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedType, set_seed
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm
from transformers import get_scheduler

from finetune import DecodeFailures, keep_settings, main_metric
from several_labels import has_several, multi_label_loss, refuse_smoothing
from video_classification_data import (
    Stopwatch,
    load_clips,
    load_metric,
    match_labels,
    number_from,
    transform_clips,
)
from video_classification_model import (
    SEVERAL,
    add_adapters,
    draw_curve,
    finish_push,
    keep_checkpoint,
    load_model,
    newest_checkpoint,
    parameter_groups,
    read_json,
    save_for_users,
    start_push,
    write_card,
    write_json,
    write_results,
)


class Training:
    """A run: what trains the model, and `state`, which is all there is to know about the place in it besides."""

    def __init__(self, accelerator, args, model, clips, finish, processors, layer_decay):
        self.accelerator, self.args, self.clips, self.processors = accelerator, args, clips, processors
        self.key, self.finish = processors[0].model_input_names[0], finish
        self.several = model.config.problem_type == SEVERAL
        on_gpu = accelerator.device.type == "cuda"
        groups = parameter_groups(model, args.learning_rate, args.weight_decay, layer_decay)
        loaders = make_loaders(clips, args, pin_memory=on_gpu)
        # What is augmented on the device goes there on a stream of its own.
        placement = [None, None, None if finish.augment is None else False, None]
        self.model, self.optimizer, self.loader, self.eval_loader = accelerator.prepare(
            model, torch.optim.AdamW(groups, fused=on_gpu), *loaders, device_placement=placement
        )
        self.total, warmup = count_steps(args, self.loader)
        self.scheduler = get_scheduler(args.lr_scheduler_type, self.optimizer, warmup, self.total)
        accelerator.register_for_checkpointing(self.scheduler)
        self.state = {"step": 0, "epoch": 0, "batch": 0, "loss_sum": 0.0, "history": [], "best": None}

    def resume(self, checkpoint):
        self.accelerator.load_state(checkpoint)
        self.state = read_json(f"{checkpoint}/state.json")
        step = self.state["step"]
        if step >= self.total:
            text = f"Already done: {checkpoint} is the end of this training ({step} steps). Nothing is trained."
        else:
            text = f"Going on from {checkpoint}: {step} of {self.total} steps are done."
        self.accelerator.print(text)

    def run(self):
        self.loss_sum = torch.tensor(self.state["loss_sum"], device=self.accelerator.device)
        self.stopwatch = Stopwatch(self.clips["train"], self.args.dataloader_num_workers)
        shown = self.accelerator.is_main_process
        self.progress = tqdm(total=self.total, initial=self.state["step"], disable=not shown)
        self.model.train()
        while self.state["step"] < self.total:
            self.train_epoch()
            self.state.update(epoch=self.state["epoch"] + 1, batch=0)
            metrics = None if self.eval_loader is None else self.evaluate()
            best = self.state["best"]
            best_by = f"eval_{main_metric(metrics or {})}"
            if metrics is None or best is None or metrics[best_by] > best[best_by]:
                self.save_model()
                self.state["best"] = metrics
            self.save_checkpoint()

    def train_epoch(self):
        accelerator, state = self.accelerator, self.state
        batches = self.loader
        if state["batch"]:
            batches = accelerator.skip_first_batches(batches, state["batch"])
        for epoch_aware in (self.clips["train"], self.loader, batches):
            epoch_aware.set_epoch(state["epoch"])
        self.stopwatch.restart()
        batches = iter(self.stopwatch.watch(batches))
        while group := list(itertools.islice(batches, self.args.gradient_accumulation_steps)):
            learning_rate = self.scheduler.get_last_lr()[-1]
            self.train_step(group)
            state["step"] += 1
            self.progress.update()
            if state["step"] % self.args.logging_steps == 0:
                self.report(learning_rate)
            if state["step"] == self.total:
                return
            if state["step"] % self.args.save_steps == 0:
                self.save_checkpoint()
                self.stopwatch.restart()

    def train_step(self, group):
        """One step of the optimizer, on the mean loss of the clips of these batches (fewer at the end of an epoch)."""
        accelerator, args, state = self.accelerator, self.args, self.state
        count = sum(len(batch["labels"]) for batch in group)
        for number, batch in enumerate(group, 1):
            # What is random in a batch follows from its place in the run, so that a resumed one repeats it.
            torch.manual_seed(number_from(args.seed, state["epoch"], state["batch"], accelerator.process_index))
            state["batch"] += 1
            batch = self.finish(batch)
            # Processes add up their gradients once, at the last batch.
            with contextlib.nullcontext() if number == len(group) else accelerator.no_sync(self.model):
                outputs = self.model(**{self.key: batch[self.key]})
                loss = self.loss(outputs, batch["labels"])
                loss = loss * (len(batch["labels"]) / count)
                accelerator.backward(loss)
            self.loss_sum += loss.detach()
        accelerator.clip_grad_norm_(self.model.parameters(), args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()

    def loss(self, outputs, labels):
        if self.several:
            return multi_label_loss(outputs, labels)
        return F.cross_entropy(outputs.logits.float(), labels, label_smoothing=self.args.label_smoothing_factor)

    def report(self, learning_rate):
        """Logs the mean loss since the last report, and the speed."""
        step = self.state["step"]
        loss = self.mean_loss_sum() / self.args.logging_steps
        if not math.isfinite(loss):
            raise FloatingPointError(f"The loss is {loss} at step {step}: lower --learning_rate.")
        self.loss_sum.zero_()
        values, speed = {"learning_rate": learning_rate, "loss": loss}, self.stopwatch.read()
        self.state["history"].append({"step": step, **values})
        self.accelerator.log({**values, **speed}, step=step)
        rate, waiting = speed["clips_per_second"], speed["waiting"]
        self.progress.set_postfix_str(f"loss {loss:.4f}, {rate:.1f} clips/s, {waiting:.0%} waiting for clips")

    def mean_loss_sum(self):
        return self.accelerator.reduce(self.loss_sum, "mean").item()

    @torch.no_grad()
    def evaluate(self):
        accelerator, step = self.accelerator, self.state["step"]
        self.model.eval()
        scores, labels = [], []
        for batch in tqdm(self.eval_loader, desc="evaluation", disable=not accelerator.is_main_process, leave=False):
            logits = self.model(**{self.key: self.finish(batch)[self.key]}).logits.float()
            logits, expected = accelerator.gather_for_metrics((logits, batch["labels"]))
            scores.append(logits.cpu())
            labels.append(expected.cpu())
        self.model.train()
        found = load_metric(self.several)(torch.cat(scores).numpy(), torch.cat(labels).numpy())
        metrics = {f"eval_{name}": value for name, value in found.items()}
        self.state["history"].append({"step": step, **metrics})
        accelerator.log(metrics, step=step)
        accelerator.print(f"step {step}: {metrics}")
        return metrics

    def save_model(self):
        weights = self.accelerator.get_state_dict(self.model)
        if self.accelerator.is_main_process:
            model = self.accelerator.unwrap_model(self.model)
            save_for_users(model, self.processors, self.args.output_dir, weights)
        self.accelerator.wait_for_everyone()

    def save_checkpoint(self):
        accelerator, output_dir = self.accelerator, self.args.output_dir
        self.state["loss_sum"] = self.mean_loss_sum()
        part = f"{output_dir}/checkpoint.part"
        if accelerator.is_main_process:
            shutil.rmtree(part, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(part)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_json(f"{part}/state.json", self.state)
            keep_checkpoint(part, output_dir, self.state["step"], self.args.save_total_limit)
        accelerator.wait_for_everyone()


def make_accelerator(args):
    return Accelerator(
        mixed_precision="bf16" if args.bf16 else "fp16" if args.fp16 else None,
        cpu=args.use_cpu or not torch.accelerator.is_available(),  # else processes would not know of each other
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.output_dir,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed, non_blocking=True),
    )


def make_loaders(clips, args, pin_memory):
    """The loaders of the training and of the validation clips; None where there are none."""
    settings = {"num_workers": args.dataloader_num_workers, "pin_memory": pin_memory}
    shuffle = None if isinstance(clips["train"], IterableDataset) else True
    loader = DataLoader(clips["train"], args.per_device_train_batch_size, shuffle, **settings)
    if "validation" not in clips:
        return loader, None
    return loader, DataLoader(clips["validation"], args.per_device_eval_batch_size, **settings)


def count_steps(args, loader):
    """Optimizer steps of the whole run, and those of the warm-up."""
    total = args.max_steps
    if total <= 0:
        total = math.ceil(args.num_train_epochs * math.ceil(len(loader) / args.gradient_accumulation_steps))
    return total, int(args.warmup_steps if args.warmup_steps >= 1 else math.ceil(total * args.warmup_steps))


def load(model_args, data_args, args, accelerator, fresh):
    """The clips of each split and the model to train on them, with its processors."""
    failures = DecodeFailures(args.output_dir, data_args.max_decode_failures)
    has_validation = bool(data_args.validation_dir or data_args.validation_list or data_args.dataset_name)
    with accelerator.main_process_first():  # it writes the caches that the others read
        if fresh and accelerator.is_main_process:
            failures.forget()
        splits, names = load_clips(data_args, ["train"] + ["validation"] * has_validation, args.seed, failures)
    found = {"labels": names} | ({} if data_args.streaming else {"train_clips": len(splits["train"])})
    keep_settings(args.output_dir, found, accelerator.is_main_process)
    several = any(map(has_several, splits.values()))
    refuse_smoothing(several, args.label_smoothing_factor)
    model, names, reader, *processors = load_model(model_args, names, True, several)
    splits = {split: match_labels(clips, names) for split, clips in splits.items()}
    how = args.seed, args.dataloader_num_workers, accelerator.device
    clips, finish = transform_clips(splits, names, data_args, reader, processors[0], failures, *how)
    model = add_adapters(model, model_args.lora_rank)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if args.torch_compile:
        model.compile()
    return clips, finish, model, processors


def main():
    model_args, data_args, args = parse_arguments(ModelArguments, DataArguments, LoopArguments)
    if data_args.streaming and args.max_steps <= 0:
        raise ValueError("A streamed data set has no known length: set --max_steps.")
    os.makedirs(args.output_dir, exist_ok=True)
    accelerator = make_accelerator(args)
    if model_args.lora_rank and accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError("--lora_rank and FSDP do not work together. Adapters take little memory: use --multi_gpu.")
    settings = {**vars(model_args), **vars(data_args), **vars(args), "hub_token": None}
    repo_id = args.hub_model_id or os.path.basename(os.path.abspath(args.output_dir))
    keep_settings(args.output_dir, settings, accelerator.is_main_process)
    if args.push_to_hub and accelerator.is_main_process:
        repo_id = start_push(repo_id, args.hub_token, args.hub_private_repo, settings)
    set_seed(args.seed)

    checkpoint = newest_checkpoint(args.output_dir)
    clips, finish, model, processors = load(model_args, data_args, args, accelerator, fresh=checkpoint is None)
    training = Training(accelerator, args, model, clips, finish, processors, model_args.layer_decay)
    if checkpoint is not None:
        training.resume(checkpoint)
    if accelerator.log_with:
        accelerator.init_trackers("runs", {name: str(value) for name, value in settings.items()})
    training.run()

    if accelerator.is_main_process:
        history, metrics = training.state["history"], training.state["best"]
        write_json(f"{args.output_dir}/history.json", history)
        draw_curve(args.output_dir, history)
        if metrics is not None:
            write_results(args.output_dir, "eval", metrics)
        write_card(args.output_dir, repo_id if args.push_to_hub else None, model_args, data_args, metrics, settings)
        if args.push_to_hub:
            print(finish_push(repo_id, args.hub_token, args.output_dir))
    accelerator.end_training()


if __name__ == "__main__":
    main()
