#!/usr/bin/env python
"""Trains or fine-tunes a video classifier with the `Trainer` on labelled clips, or evaluates one.

    python examples/training/run_video_classification.py --train_dir clips/train --validation_dir clips/validation \
        --model_name_or_path you/videomamba-k400 --output_dir my-classifier --do_train --do_eval

A folder of clips has one sub-folder for each label (`clips/train/pan left/a.mp4`). If the labels of the clips are
lists, a clip may have several or none (docs/training.md). Without `--model_name_or_path` a new VideoMamba of the given
size is trained from scratch; with it, `--num_frames`, `--frame_stride`, `--sampling_fps` and `--image_size` change the
model and its processor. Interrupted training goes on from the last checkpoint in `--output_dir` when the same command
is run again; other settings are refused there. The output folder is a complete Hub repository.

`--recipe examples/training/recipes/k400.args` sets the flags in that file; a flag of the command line takes precedence
over the file's. For the common case there is a short script, `finetune.py`.
"""

import os
import shutil
import sys


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    sys.modules["peft"] = None  # transformers would import it with the flags, for four seconds

from transformers import TrainingArguments

from video_classification_arguments import DataArguments, ModelArguments, check_command_line, parse_arguments


if __name__ == "__main__":
    check_command_line(ModelArguments, DataArguments, TrainingArguments)

import numpy as np
import torch
from torch.utils.data import default_collate
from transformers import Trainer, TrainerCallback, set_seed

from finetune import DecodeFailures, keep_settings, tell_place, warn_of_threads
from several_labels import IGNORED, has_several, multi_label_loss, refuse_smoothing
from video_classification_data import (
    Stopwatch,
    load_clips,
    load_metric,
    match_labels,
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
    save_for_users,
    start_push,
    to_scores,
    without_fsdp,
    write_card,
    write_predictions,
    write_results,
)


class ClipTrainer(Trainer):
    """A `Trainer` whose checkpoints appear whole or not at all, and which tells whether reading clips keeps up."""

    part = None  # the folder for a checkpoint while it is written

    def get_train_dataloader(self):
        # What is augmented on the device goes there on a stream of its own.
        placement = self.accelerator.device_placement
        self.accelerator.device_placement = placement and self.finish.augment is None
        loader = super().get_train_dataloader()
        self.accelerator.device_placement = placement
        return loader

    def _prepare_inputs(self, inputs):
        return super()._prepare_inputs(self.finish(inputs))

    def floating_point_ops(self, inputs):
        return 0  # the Trainer would count all weights in each step, to report a figure that is of tokens, not pixels

    def _get_output_dir(self, trial):
        return self.part or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        output_dir, name = self.args.output_dir, f"checkpoint-{self.state.global_step}"
        part = f"{output_dir}/checkpoint.part"
        if self.args.should_save:
            shutil.rmtree(part, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.part = part
        super()._save_checkpoint(model, trial)
        self.part = None
        if self.state.best_model_checkpoint == f"{part}/{name}":
            self.state.best_model_checkpoint = f"{output_dir}/{name}"
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(f"{part}/{name}/trainer_state.json")
            limit, best = self.args.save_total_limit, self.state.best_global_step
            keep_checkpoint(f"{part}/{name}", output_dir, self.state.global_step, limit, best)
            os.rmdir(part)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir=None, state_dict=None):
        model, self.model = self.model, without_fsdp(self.model)
        super()._save(output_dir, state_dict)
        self.model = model

    def get_batch_samples(self, epoch_iterator, *args):
        return super().get_batch_samples(self.stopwatch.watch(epoch_iterator), *args)

    def log(self, logs, *args):
        super().log({**logs, **self.stopwatch.read()} if "loss" in logs else logs, *args)


class EpochCallback(TrainerCallback):
    """Tells the clips which epoch it is, and leaves evaluations and checkpoints out of the speed."""

    def __init__(self, trainer):
        self.clips, self.stopwatch = trainer.train_dataset, trainer.stopwatch

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.clips.set_epoch(int(state.epoch))
        self.stopwatch.restart()

    def on_save(self, args, state, control, **kwargs):
        self.stopwatch.restart()

    on_evaluate = on_save


def check(model_args, data_args, training_args):
    """Refuses what cannot work, before anything is read or written."""
    if not (training_args.do_train or training_args.do_eval):
        raise ValueError("Nothing to do: add --do_train, --do_eval or both.")
    if data_args.streaming and training_args.do_train and training_args.max_steps <= 0:
        raise ValueError("A streamed data set has no known length: set --max_steps.")
    if model_args.lora_rank and training_args.fsdp:
        raise ValueError("--lora_rank and --fsdp do not work together. Adapters take little memory: leave --fsdp out.")


def make_trainer(model, processor, clips, finish, training_args, layer_decay):
    optimizer = None
    if training_args.do_train:
        groups = parameter_groups(model, training_args.learning_rate, training_args.weight_decay, layer_decay)
        kind, options = Trainer.get_optimizer_cls_and_kwargs(training_args, model)
        optimizer = (kind, {**options, "params": groups})
    several = model.config.problem_type == SEVERAL
    metric = load_metric(several)
    trainer = ClipTrainer(
        model=model,
        args=training_args,
        train_dataset=clips.get("train"),
        eval_dataset=clips.get("validation"),
        data_collator=default_collate,
        compute_loss_func=multi_label_loss if several else None,
        compute_metrics=lambda p: metric(p.predictions, p.label_ids),
        # A config may ask for hidden states as well.
        preprocess_logits_for_metrics=lambda outputs, _: outputs[0] if isinstance(outputs, tuple) else outputs,
        processing_class=processor,
        optimizer_cls_and_kwargs=optimizer,
    )
    trainer.finish = finish
    if training_args.do_train:
        trainer.stopwatch = Stopwatch(clips["train"], training_args.dataloader_num_workers)
        trainer.add_callback(EpochCallback(trainer))
    return trainer


def train(trainer, processors, checkpoint):
    """Trains and writes the model."""
    output_dir = trainer.args.output_dir
    is_over = tell_place(checkpoint) if trainer.is_world_process_zero() else False
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    state_dict = None
    if trainer.is_fsdp_enabled:  # the checkpoints may be in shards; this is for users
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        state_dict = trainer.accelerator.get_state_dict(trainer.model)
    trainer.save_state()
    if not is_over:
        trainer.log_metrics("train", metrics)
    if trainer.is_world_process_zero():
        save_for_users(trainer.accelerator.unwrap_model(trainer.model), processors, output_dir, state_dict)
        if not is_over:
            write_results(output_dir, "train", metrics)
        draw_curve(output_dir, trainer.state.log_history)


def evaluate(trainer, clips, names):
    """Measures and writes the metrics and the predictions."""
    output_dir = trainer.args.output_dir
    result = trainer.predict(clips["validation"], metric_key_prefix="eval")
    counted = result.label_ids.reshape(len(result.label_ids), -1)[:, 0] != IGNORED
    metrics = result.metrics | {"eval_samples": int(counted.sum())}
    for view in {"mirrored", "reversed"} & set(clips):
        metrics |= trainer.predict(clips[view], metric_key_prefix=f"eval_{view}").metrics
    trainer.log_metrics("eval", metrics)
    if trainer.is_world_process_zero():
        write_results(output_dir, "eval", metrics)
        logits = torch.from_numpy(np.asarray(result.predictions)).float()
        scores = to_scores(logits, several=result.label_ids.ndim == 2).numpy()
        write_predictions(output_dir, clips["validation"].names(len(scores)), result.label_ids, scores, names)
    return metrics


def main():
    # On a CPU unless there is a GPU: else several processes would not know of each other there.
    defaults = {"use_cpu": not torch.accelerator.is_available()}
    kinds = ModelArguments, DataArguments, TrainingArguments
    model_args, data_args, training_args = parse_arguments(*kinds, **defaults)
    check(model_args, data_args, training_args)
    warn_of_threads(training_args)
    settings = {**vars(model_args), **vars(data_args), **training_args.to_dict()}
    output_dir, token = training_args.output_dir, training_args.hub_token
    # The Trainer would push in the background and write its own card; here it is one commit at the end.
    push, training_args.push_to_hub = training_args.push_to_hub, False
    repo_id = training_args.hub_model_id or os.path.basename(os.path.abspath(output_dir))
    if training_args.do_train:
        keep_settings(output_dir, settings, training_args.process_index == 0)
    if push and training_args.process_index == 0:
        repo_id = start_push(repo_id, token, training_args.hub_private_repo, settings)
    training_args.remove_unused_columns = False  # the transforms name the columns
    # The host need not wait for the GPU: neither for a copy of clips nor, at each step, to see if the loss is NaN.
    training_args.accelerator_config.non_blocking = True
    training_args.logging_nan_inf_filter = False
    set_seed(training_args.seed)

    failures = DecodeFailures(output_dir, data_args.max_decode_failures)
    checkpoint = training_args.resume_from_checkpoint
    if training_args.do_train and checkpoint is None:
        checkpoint = newest_checkpoint(output_dir)
    wanted = ["train"] * training_args.do_train + ["validation"] * training_args.do_eval
    with training_args.main_process_first():  # it writes the caches that the others read
        if checkpoint is None and training_args.process_index == 0:
            failures.forget()
        splits, names = load_clips(data_args, wanted, training_args.seed, failures)
    if training_args.do_train:
        found = {"labels": names} | ({} if data_args.streaming else {"train_clips": len(splits["train"])})
        keep_settings(output_dir, found, training_args.process_index == 0)
    several = any(map(has_several, splits.values()))
    refuse_smoothing(several, training_args.label_smoothing_factor)
    model, names, reader, *processors = load_model(model_args, names, training_args.do_train, several)
    splits = {split: match_labels(clips, names) for split, clips in splits.items()}
    how = training_args.seed, training_args.dataloader_num_workers, training_args.device
    clips, finish = transform_clips(splits, names, data_args, reader, processors[0], failures, *how)
    if training_args.do_train:
        model = add_adapters(model, model_args.lora_rank)

    trainer = make_trainer(model, processors[0], clips, finish, training_args, model_args.layer_decay)
    if training_args.do_train:
        train(trainer, processors, checkpoint)
    metrics = evaluate(trainer, clips, names) if training_args.do_eval else None
    if training_args.do_train and trainer.is_world_process_zero():
        write_card(output_dir, repo_id if push else None, model_args, data_args, metrics, settings)
        if push:
            print(finish_push(repo_id, token, output_dir))
    trainer.accelerator.wait_for_everyone()  # a process that is gone early makes torchrun stop the others
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
