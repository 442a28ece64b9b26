#!/usr/bin/env python
"""Fine-tunes a video classifier on labelled clips and writes, or pushes, one that `pipeline` loads.

    python finetune.py --model_name_or_path you/videomamba-k400 --dataset clips --output_dir my-classifier

`clips` is a folder with a sub-folder for each label (`clips/train/waving/*.mp4`, `clips/validation/waving/*.mp4`), or
the name of a data set of the Hub with a video and a label column. Without a validation split, a part of the training
clips is held out. `--push_to_hub` uploads the result. All flags of `transformers.TrainingArguments` work. The same
command run again goes on from the last checkpoint in `--output_dir`.

This file needs nothing but the package with its extra `train`: copy it and change it.
"""

import os
import sys
from dataclasses import dataclass, field

from transformers import HfArgumentParser, TrainingArguments


# Other defaults than those of TrainingArguments; the command line goes before them.
DEFAULTS = {
    "learning_rate": 1e-4,
    "weight_decay": 0.05,
    "warmup_steps": 0.1,  # below 1: the share of all steps
    "lr_scheduler_type": "cosine",
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "load_best_model_at_end": True,  # the one of the lowest validation loss
    "report_to": "none",
}


@dataclass
class Arguments:
    dataset: str = field(
        metadata={"help": "Folder with train/<label>/<clips> and perhaps validation/, or a data set of the Hub."}
    )
    model_name_or_path: str = field(metadata={"help": "Folder or Hub repository of the model to start from."})
    validation_fraction: float = field(
        default=0.2, metadata={"help": "Share of the training clips to hold out if there is no validation split."}
    )
    min_crop_area: float = field(
        default=0.5, metadata={"help": "Training clips are random crops of at least this share of the frame."}
    )


def make_parser():
    parser = HfArgumentParser((Arguments, TrainingArguments))
    parser.set_defaults(**DEFAULTS)
    return parser


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    make_parser().parse_args()  # before the imports below, which take seconds

import torch
from torchvision.transforms import v2
from transformers import AutoModelForVideoClassification, AutoVideoProcessor, Trainer, set_seed
from transformers.trainer_utils import get_last_checkpoint

import modeling_videomamba  # noqa: F401  registers VideoMamba with the Auto classes


try:
    import accelerate  # noqa: F401  what the Trainer stands on
    from datasets import ClassLabel, DatasetDict, Video, load_dataset
except ModuleNotFoundError as error:
    sys.exit(f"{error}. Install the extra `train`: pip install '.[train]' in a clone of videomamba-transformers.")


def load_clips(name, validation_fraction, seed):
    """The splits `train` and `validation` with the columns `video` (a path, or bytes: not decoded) and `label`."""
    clips = load_dataset(name)
    features = clips["train"].features if "train" in clips else {}
    videos = [column for column, kind in features.items() if isinstance(kind, Video)]
    labels = [column for column, kind in features.items() if isinstance(kind, ClassLabel)]
    if len(videos) != 1 or len(labels) != 1:
        raise ValueError(
            f"{name} must have a split 'train' with one column of videos and one of class labels, but has "
            f"{clips.column_names}. In a folder, each label needs a sub-folder of clips: {name}/train/<label>/<clips>."
        )
    clips = clips.select_columns([videos[0], labels[0]])
    clips = clips.rename_columns({old: new for old, new in ((videos[0], "video"), (labels[0], "label")) if old != new})
    clips = clips.cast_column("video", Video(decode=False))  # the processor decodes, only the frames that it needs
    if "validation" not in clips:
        parts = clips["train"].train_test_split(validation_fraction, seed=seed, stratify_by_column="label")
        clips = DatasetDict(train=parts["train"], validation=parts["test"])
    return clips


def transforms(processor, min_crop_area):
    """Two functions, for training and validation: a batch of rows in, `pixel_values` and `labels` out."""
    size = (processor.crop_size["height"], processor.crop_size["width"])
    augment = v2.RandomResizedCrop(size, scale=(min_crop_area, 1), antialias=True)  # all frames of a clip alike

    def read(video):
        source = video["path"] if video["bytes"] is None else video["bytes"]
        frames, _ = processor.fetch_videos(source, sample_indices_fn=processor.sample_frames)
        return frames.permute(0, 3, 1, 2)  # (T, C, H, W) uint8

    def prepare(rows, change):
        clips = [change(read(video)) for video in rows["video"]]
        # Clips may differ in size, so that the processor takes them one by one.
        pixel_values = [processor(clip, return_tensors="pt")["pixel_values"][0] for clip in clips]
        return {"pixel_values": pixel_values, "labels": rows["label"]}

    return lambda rows: prepare(rows, augment), lambda rows: prepare(rows, lambda clip: clip)


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main():
    parser = make_parser()
    parser.set_defaults(bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported())
    args, training_args = parser.parse_args_into_dataclasses()
    training_args.remove_unused_columns = False  # the transforms need the column `video`
    set_seed(training_args.seed)

    clips = load_clips(args.dataset, args.validation_fraction, training_args.seed)
    names = clips["train"].features["label"].names
    model = AutoModelForVideoClassification.from_pretrained(
        args.model_name_or_path,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
        ignore_mismatched_sizes=True,  # a new head if the clips have another number of labels
    )
    processor = AutoVideoProcessor.from_pretrained(args.model_name_or_path)
    for_training, for_validation = transforms(processor, args.min_crop_area)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=clips["train"].with_transform(for_training),
        eval_dataset=clips["validation"].with_transform(for_validation),
        compute_metrics=accuracy,
        processing_class=processor,
    )
    checkpoint = get_last_checkpoint(training_args.output_dir) if os.path.isdir(training_args.output_dir) else None
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint or checkpoint)
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    trainer.log_metrics("eval", metrics)
    trainer.save_model()
    card = {"tags": ["video-classification"], "dataset": os.path.basename(args.dataset)}
    if not os.path.isdir(args.dataset):
        card["dataset_tags"] = args.dataset  # the Hub then shows the data set beside the model
    if training_args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


if __name__ == "__main__":
    main()
