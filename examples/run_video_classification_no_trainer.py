#!/usr/bin/env python
"""Trains or fine-tunes a video classifier with a plain loop, for those who want to change it, on Accelerate.

    accelerate launch examples/run_video_classification_no_trainer.py --train_dir clips/train \
        --validation_dir clips/validation --model_name_or_path you/videomamba-k400 --output_dir my-classifier

It takes the data and recipe files of `run_video_classification.py`. After each epoch it evaluates; the output folder
is a complete Hub repository of the best model so far. Interrupted training goes on from the last checkpoint in
`--output_dir` when the same command is run again, as if it had never stopped. `eval_results.json` has the metrics of
that model, `history.json` all losses.
"""

import math
import os
import shutil
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm
from transformers import get_scheduler

from video_classification_data import (
    DataArguments,
    DecodeFailures,
    Normalize,
    Stopwatch,
    load_accuracy,
    load_clips,
    match_labels,
    number_from,
    parse_arguments,
    transform_clips,
)
from video_classification_model import (
    ModelArguments,
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


@dataclass
class LoopArguments:
    """How to train. The names are those of `transformers.TrainingArguments`."""

    output_dir: str = field(metadata={"help": "Where the best model, checkpoints and logs go."})
    num_train_epochs: float = field(default=3, metadata={"help": "Times to go through the training clips."})
    max_steps: int = field(default=-1, metadata={"help": "Optimizer steps, if above 0, instead of epochs."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Clips a process and step."})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Clips a process and step of evaluation."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches to an optimizer step."})
    learning_rate: float = field(default=3e-4, metadata={"help": "The highest one, after the warm-up."})
    weight_decay: float = field(default=0.05, metadata={"help": "Of AdamW, for matrices and kernels."})
    warmup_steps: float = field(default=0.0, metadata={"help": "Steps, or below 1 the share of all steps."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Course of the learning rate."})
    label_smoothing_factor: float = field(default=0.0, metadata={"help": "Share of each label spread over all."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Longer gradients are cut to this length."})
    bf16: bool = field(default=False, metadata={"help": "Mixed precision with bfloat16."})
    fp16: bool = field(default=False, metadata={"help": "Mixed precision with float16."})
    torch_compile: bool = field(default=False, metadata={"help": "Compile the model: faster after a first minute."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Less memory for about a third more time."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that read clips, for each process."})
    use_cpu: bool = field(default=False, metadata={"help": "Leave the GPU alone."})
    seed: int = field(default=42, metadata={"help": "Of all that is random."})
    save_steps: int = field(default=500, metadata={"help": "Steps from checkpoint to checkpoint; ends of epochs too."})
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints to keep."})
    logging_steps: int = field(default=50, metadata={"help": "Steps over which a reported loss is averaged."})
    report_to: str = field(default="none", metadata={"help": "tensorboard, wandb or another tracker of Accelerate."})
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the best model at the end."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Its repository; else named as output_dir."})
    hub_token: str | None = field(default=None, metadata={"help": "Else the one of `hf auth login`."})
    hub_private_repo: bool | None = field(default=None, metadata={"help": "Create it as a private one."})


def save_checkpoint(accelerator, args, state):
    part = f"{args.output_dir}/checkpoint.part"
    if accelerator.is_main_process:
        shutil.rmtree(part, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(part)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(f"{part}/state.json", state)
        keep_checkpoint(part, args.output_dir, state["step"], args.save_total_limit)
    accelerator.wait_for_everyone()


def save_model(accelerator, model, processors, output_dir):
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        save_for_users(accelerator.unwrap_model(model), processors, output_dir, weights)
    accelerator.wait_for_everyone()


@torch.no_grad()
def evaluate(accelerator, model, loader, key, normalize):
    model.eval()
    metric = load_accuracy()
    scores, labels = [], []
    for batch in tqdm(loader, desc="evaluation", disable=not accelerator.is_main_process, leave=False):
        logits = model(**{key: normalize(batch[key])}).logits.float()
        logits, expected = accelerator.gather_for_metrics((logits, batch["labels"]))
        scores.append(logits.cpu())
        labels.append(expected.cpu())
    model.train()
    found = metric.compute(predictions=torch.cat(scores).numpy(), references=torch.cat(labels).numpy())
    return {f"eval_{name}": value for name, value in found.items()}


def make_accelerator(args):
    return Accelerator(
        mixed_precision="bf16" if args.bf16 else "fp16" if args.fp16 else None,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        cpu=args.use_cpu,
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


def report(accelerator, args, state, loss_sum, values, stopwatch, progress):
    """Logs the mean loss since the last report, and the speed."""
    mean = accelerator.reduce(loss_sum, "mean").item() / args.logging_steps
    if not math.isfinite(mean):
        raise FloatingPointError(f"The loss is {mean} at step {state['step']}: lower --learning_rate.")
    loss_sum.zero_()
    values["loss"] = mean
    state["history"].append({"step": state["step"], **values})
    speed = stopwatch.read()
    accelerator.log({**values, **speed}, step=state["step"])
    rate, waiting = speed["clips_per_second"], speed["waiting"]
    progress.set_postfix_str(f"loss {mean:.4f}, {rate:.1f} clips/s, {waiting:.0%} waiting for clips")


def main():
    model_args, data_args, args = parse_arguments(ModelArguments, DataArguments, LoopArguments)
    if data_args.streaming and args.max_steps <= 0:
        raise ValueError("A streamed data set has no known length: say with --max_steps how long to train.")
    os.makedirs(args.output_dir, exist_ok=True)
    accelerator = make_accelerator(args)
    settings = {**vars(model_args), **vars(data_args), **vars(args), "hub_token": None}
    repo_id = args.hub_model_id or os.path.basename(os.path.abspath(args.output_dir))
    if args.push_to_hub and accelerator.is_main_process:
        repo_id = start_push(repo_id, args.hub_token, args.hub_private_repo, settings)
    set_seed(args.seed)

    # Clips and model
    failures = DecodeFailures(args.output_dir, data_args.max_decode_failures)
    has_validation = bool(data_args.validation_dir or data_args.validation_list or data_args.dataset_name)
    checkpoint = newest_checkpoint(args.output_dir)
    with accelerator.main_process_first():  # it writes the caches that the others read
        if checkpoint is None and accelerator.is_main_process:
            failures.forget()
        splits, names = load_clips(data_args, ["train"] + ["validation"] * has_validation, args.seed, failures)
    model, names, reader, *processors = load_model(model_args, names, training=True)
    splits = {split: match_labels(clips, names) for split, clips in splits.items()}
    clips = transform_clips(splits, names, data_args, reader, processors[0], failures, args.seed)
    model = add_adapters(model, model_args.lora_rank)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if args.torch_compile:
        model.compile()
    key, normalize = processors[0].model_input_names[0], Normalize(processors[0], accelerator.device)

    # What trains it
    on_gpu = accelerator.device.type == "cuda"
    groups = parameter_groups(model, args.learning_rate, args.weight_decay, model_args.layer_decay)
    optimizer = torch.optim.AdamW(groups, fused=on_gpu)
    loader, eval_loader = make_loaders(clips, args, pin_memory=on_gpu)
    model, optimizer, loader, eval_loader = accelerator.prepare(model, optimizer, loader, eval_loader)
    total, warmup = count_steps(args, loader)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, warmup, total)
    accelerator.register_for_checkpointing(scheduler)

    # All there is to know about the place in the run, but for weights and optimizer.
    state = {"step": 0, "epoch": 0, "batch": 0, "loss_sum": 0.0, "history": [], "best": None}
    if checkpoint is not None:
        accelerator.load_state(checkpoint)
        state = read_json(f"{checkpoint}/state.json")
        accelerator.print(f"Going on from {checkpoint}.")
    if accelerator.log_with:
        accelerator.init_trackers("runs", {name: str(value) for name, value in settings.items()})

    loss_sum = torch.tensor(state["loss_sum"], device=accelerator.device)
    stopwatch = Stopwatch(clips["train"], args.dataloader_num_workers)
    progress = tqdm(total=total, initial=state["step"], disable=not accelerator.is_main_process)
    model.train()
    while state["step"] < total:
        batches = accelerator.skip_first_batches(loader, state["batch"]) if state["batch"] else loader
        for epoch_aware in (clips["train"], loader, batches):
            epoch_aware.set_epoch(state["epoch"])
        stopwatch.restart()
        for batch in stopwatch.watch(batches):
            # What is random in a step follows from its place in the run, so that a resumed one repeats it.
            torch.manual_seed(number_from(args.seed, state["epoch"], state["batch"], accelerator.process_index))
            with accelerator.accumulate(model):
                logits = model(**{key: normalize(batch[key])}).logits.float()
                loss = F.cross_entropy(logits, batch["labels"], label_smoothing=args.label_smoothing_factor)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            loss_sum += loss.detach() / args.gradient_accumulation_steps
            state["batch"] += 1
            if not accelerator.sync_gradients:
                continue
            learning_rate = scheduler.get_last_lr()[-1]
            scheduler.step()
            state["step"] += 1
            progress.update()
            if state["step"] % args.logging_steps == 0:
                report(accelerator, args, state, loss_sum, {"learning_rate": learning_rate}, stopwatch, progress)
            if state["step"] == total:
                break
            if state["step"] % args.save_steps == 0:
                state["loss_sum"] = accelerator.reduce(loss_sum, "mean").item()
                save_checkpoint(accelerator, args, state)
                stopwatch.restart()
        state.update(epoch=state["epoch"] + 1, batch=0)
        metrics = None
        if eval_loader is not None:
            metrics = evaluate(accelerator, model, eval_loader, key, normalize)
            state["history"].append({"step": state["step"], **metrics})
            accelerator.log(metrics, step=state["step"])
            accelerator.print(f"step {state['step']}: {metrics}")
        if metrics is None or state["best"] is None or metrics["eval_accuracy"] > state["best"]["eval_accuracy"]:
            save_model(accelerator, model, processors, args.output_dir)
            state["best"] = metrics
        state["loss_sum"] = accelerator.reduce(loss_sum, "mean").item()
        save_checkpoint(accelerator, args, state)

    if accelerator.is_main_process:
        write_json(f"{args.output_dir}/history.json", state["history"])
        draw_curve(args.output_dir, state["history"])
        if state["best"] is not None:
            write_results(args.output_dir, "eval", state["best"])
        pushed_to = repo_id if args.push_to_hub else None
        write_card(args.output_dir, pushed_to, model_args, data_args, state["best"], settings)
        if args.push_to_hub:
            print(finish_push(repo_id, args.hub_token, args.output_dir))
    accelerator.end_training()


if __name__ == "__main__":
    main()
