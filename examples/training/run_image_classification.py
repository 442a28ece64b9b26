#!/usr/bin/env python
"""Trains or fine-tunes an image classifier: VideoMamba at one frame, or any other of `transformers`.

    python examples/training/run_image_classification.py --dataset pictures --model_name_or_path my-backbone \
        --output_dir out
    python examples/training/run_image_classification.py --dataset pictures --output_dir out \
        --config_overrides hidden_size=192,num_hidden_layers=8,image_size=112

`pictures` is a folder (`pictures/train/<label>/*.jpg`, `pictures/validation/<label>/*.jpg`), or the name of a data
set of the Hub with an image and a label column. Without `--model_name_or_path` a VideoMamba is trained from random
weights. All flags of `transformers.TrainingArguments` work; the same command run again goes on from the last
checkpoint, and other settings are refused in its folder.
`videomamba-convert image` makes a video model of the result.
"""

import os
import sys
from dataclasses import dataclass, field


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    sys.modules["peft"] = None  # transformers would import it with the flags, for four seconds

from transformers import HfArgumentParser, TrainingArguments


# Other defaults than those of TrainingArguments; the command line goes before them.
DEFAULTS = {
    "learning_rate": 1e-3,
    "weight_decay": 0.05,
    "warmup_steps": 0.1,  # below 1: the share of all steps
    "lr_scheduler_type": "cosine",
    "logging_steps": 0.01,  # likewise
    "label_smoothing_factor": 0.1,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 256,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "report_to": "none",
}


@dataclass
class Arguments:
    dataset: str = field(
        metadata={"help": "Folder with train/<label>/<pictures> and validation/, or a data set of the Hub."}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub repository of the model to start from."}
    )
    from_scratch: bool = field(
        default=False, metadata={"help": "Use only the config of that model, with random weights."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Fields of the config of a new model: hidden_size=192,image_size=112."}
    )
    min_crop_area: float = field(
        default=0.3, metadata={"help": "Training pictures are random crops of at least this share of the area."}
    )


def make_parser():
    parser = HfArgumentParser((Arguments, TrainingArguments))
    parser.set_defaults(**DEFAULTS)
    return parser


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    make_parser().parse_args()  # before the imports below, which take seconds

import torch
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, set_seed
from transformers.trainer_utils import get_last_checkpoint

from modeling_videomamba import VideoMambaConfig, VideoMambaImageProcessor
from modeling_videomamba.loading_videomamba import unloadable_reason


try:
    import accelerate  # noqa: F401  what the Trainer stands on
    from datasets import ClassLabel, Image
except ModuleNotFoundError as error:
    sys.exit(f"{error}. Install the extra `train`: pip install '.[train]' in a clone of videomamba-transformers.")

from finetune import (
    FineTuner,
    accuracy,
    fit_head,
    keep_settings,
    load_data_set,
    logits_alone,
    tell_place,
    warn_of_threads,
)


def load_pictures(name):
    """Train and validation pictures as lists of (PIL image, label number), and the names of the labels."""
    if os.path.isdir(name):
        parts = [f"{name}/{split}" for split in ("train", "validation")]
        if missing := [part for part in parts if not os.path.isdir(part)]:
            raise ValueError(f"There is no folder {missing[0]}: train/<label>/<pictures> and validation/ are needed.")
        train, validation = (ImageFolder(part) for part in parts)
        if train.classes != validation.classes:
            different = sorted(set(train.classes) ^ set(validation.classes))
            raise ValueError(f"{name} has labels that only train/ or only validation/ has: {different[:5]}.")
        return train, validation, train.classes
    splits = load_data_set(name)
    features = splits["train"].features if {"train", "validation"} <= set(splits) else {}
    columns = [[c for c, kind in features.items() if isinstance(kind, wanted)] for wanted in (Image, ClassLabel)]
    if [len(found) for found in columns] != [1, 1]:
        raise ValueError(
            f"{name} must have splits train and validation with one column of images and one of class labels, but has "
            f"{splits.column_names}."
        )
    (image,), (label,) = columns
    pairs = [HubPictures(splits[split], image, label) for split in ("train", "validation")]
    return *pairs, features[label].names


class HubPictures:
    def __init__(self, rows, image, label):
        self.rows, self.image, self.label = rows, image, label

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        return row[self.image], row[self.label]


class Pictures(torch.utils.data.Dataset):
    """What the model takes: `pixel_values` and `labels`; training pictures are cropped at random and mirrored."""

    def __init__(self, pairs, processor, augment=None):
        self.pairs, self.processor, self.augment = pairs, processor, augment

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        picture, label = self.pairs[index]
        options = {}
        if self.augment is not None:
            picture, options = self.augment(picture.convert("RGB")), {"do_resize": False, "do_center_crop": False}
        return {
            "pixel_values": self.processor(picture, return_tensors="pt", **options).pixel_values[0],
            "labels": label,
        }


def load_model(args, names):
    """The classifier, with the labels `names`, and its image processor."""
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    path = args.model_name_or_path
    if path is None:
        config = VideoMambaConfig(num_frames=1, tubelet_size=1, **labels)
    else:
        if reason := unloadable_reason(path):
            raise ValueError(reason)
        config = AutoConfig.from_pretrained(path, **labels)
    if args.config_overrides:
        config.update_from_string(args.config_overrides)
        config = type(config).from_dict(config.to_dict())  # its checks, and what follows from other fields
    if path is not None and not args.from_scratch:
        model = AutoModelForImageClassification.from_pretrained(path, config=config, ignore_mismatched_sizes=True)
        fit_head(model, AutoConfig.from_pretrained(path).id2label, names)
    else:
        model = AutoModelForImageClassification.from_config(config)
    if path is not None:
        return model, AutoImageProcessor.from_pretrained(path)
    size = config.image_size
    crop = {"height": size, "width": size}
    return model, VideoMambaImageProcessor(
        single_images=True, size={"shortest_edge": round(size / 0.875)}, crop_size=crop
    )


def main():
    parser = make_parser()
    parser.set_defaults(bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported())
    parser.set_defaults(use_cpu=not torch.accelerator.is_available())  # else processes would not know of each other
    args, training_args = parser.parse_args_into_dataclasses()
    warn_of_threads(training_args)
    set_seed(training_args.seed)
    train, validation, names = load_pictures(args.dataset)
    settings = {**vars(args), **training_args.to_dict(), "labels": names, "train_clips": len(train)}
    keep_settings(training_args.output_dir, settings, training_args.process_index == 0)
    model, processor = load_model(args, names)
    size = processor.crop_size or processor.size
    augment = v2.Compose(
        [
            v2.RandomResizedCrop((size["height"], size["width"]), scale=(args.min_crop_area, 1), antialias=True),
            v2.RandomHorizontalFlip(),
        ]
    )
    trainer = FineTuner(
        model=model,
        args=training_args,
        train_dataset=Pictures(train, processor, augment),
        eval_dataset=Pictures(validation, processor),
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=logits_alone,
        processing_class=processor,
    )
    checkpoint = get_last_checkpoint(training_args.output_dir) if os.path.isdir(training_args.output_dir) else None
    checkpoint = training_args.resume_from_checkpoint or checkpoint
    tell_place(checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    trainer.log_metrics("eval", metrics)
    trainer.save_model()
    card = {"tags": ["image-classification"], "dataset": os.path.basename(args.dataset)}
    if not os.path.isdir(args.dataset):
        card["dataset_tags"] = args.dataset  # the Hub then shows the data set beside the model
    if training_args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


if __name__ == "__main__":
    main()
