#!/usr/bin/env python
"""Fine-tunes a video classifier on labelled clips and writes, or pushes, one that `pipeline` loads.

    python finetune.py --model_name_or_path you/videomamba-k400 --dataset clips --output_dir my-classifier

`clips` is a folder with a sub-folder for each label (`clips/train/waving/*.mp4`, `clips/validation/waving/*.mp4`), or
the name of a data set of the Hub with a video and a label column. If the column holds lists, a clip has any number of
labels; a folder then has `clips/train/metadata.jsonl`, with lines `{"file_name": "a.mp4", "labels": ["waving"]}`.
Without a validation split, a part of the training clips is held out. Clips that cannot be read are skipped and listed.
`--push_to_hub` uploads the result. All flags of `transformers.TrainingArguments` work. The same command run again goes
on from the last checkpoint in `--output_dir`; other settings are refused there.

Copy this file with `several_labels.py`, and change it. Both need nothing but the package with its extra `train`.
"""

import json
import os
import re
import reprlib
import sys
from dataclasses import dataclass, field
from pathlib import Path


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    sys.modules["peft"] = None  # transformers would import it with the flags, for four seconds

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
    "logging_steps": 0.01,  # likewise: a hundred losses, or one a step
    "load_best_model_at_end": True,  # the one of the lowest validation loss
    "report_to": "none",
}

SETTINGS = "_settings.json"  # of the run in a folder; the Hub gets no file whose name begins so
# What does not change the weights, and may differ when a run goes on.
MAY_DIFFER = re.compile(
    r"accelerator_config|allow_missing_classes|dataloader_(num|p)|ddp|debug|disable_tqdm|do_|eval_accumulation"
    r"|frame_cache|fsdp|full_determinism|gradient_checkpointing|hub|local_rank|log|max_decode|output_dir|parallelism"
    r"|per_device_eval|project|push|report_to|resume|run_name|save|skip_memory|torch_compile|torch_empty|trackio|trust"
    r"|use_cpu"
)


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
    max_decode_failures: int = field(
        default=10,
        metadata={"help": "Skip and list up to this many clips that cannot be read; one more stops the run."},
    )
    num_frames: int | None = field(default=None, metadata={"help": "Frames per clip (default: the model's)."})
    frame_stride: int | None = field(
        default=None,
        metadata={"help": "Distance between sampled frames (default: the model's); 0: over the whole clip."},
    )
    sampling_fps: float | None = field(
        default=None, metadata={"help": "Sampled frames a second, instead of a distance in frames."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Height and width of the frames in pixels (default: the model's)."}
    )


def make_parser():
    parser = HfArgumentParser((Arguments, TrainingArguments))
    parser.set_defaults(**DEFAULTS)
    return parser


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    make_parser().parse_args()  # before the imports below, which take seconds

import torch
import yaml
from huggingface_hub import EvalResultEntry, ModelCard, eval_result_entries_to_yaml
from torchvision.transforms import v2
from transformers import AutoConfig, AutoModelForVideoClassification, AutoVideoProcessor, Trainer, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from modeling_videomamba import VideoMambaImageProcessor, VideoMambaVideoProcessor
from modeling_videomamba.loading_videomamba import unloadable_reason


try:
    import accelerate  # noqa: F401  what the Trainer stands on
    from datasets import ClassLabel, DatasetDict, List, Video, load_dataset
except ModuleNotFoundError as error:
    sys.exit(f"{error}. Install the extra `train`: pip install '.[train]' in a clone of videomamba-transformers.")

from several_labels import (
    IGNORED,
    encode_label,
    has_several,
    is_text,
    labels_that_occur,
    multi_label_loss,
    number_labels,
    precisions,
    refuse_smoothing,
)


logger = logging.get_logger(__name__)


def load_data_set(name, **options):
    """`load_dataset`, which would ask the Hub for a mistyped folder."""
    if not os.path.isdir(name) and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise ValueError(f"There is no folder {name}, and a data set of the Hub has a name of the form owner/name.")
    return load_dataset(name, **options)


def load_clips(name, validation_fraction, seed):
    """
    The splits `train` and `validation` with the columns `video` (a path, or bytes: not decoded) and `label` (a
    `ClassLabel`, or lists of them).
    """
    clips = load_data_set(name, data_files=find_splits(name))
    features = clips["train"].features if "train" in clips else {}
    videos = [column for column, kind in features.items() if isinstance(kind, Video)]
    labels = [column for column, kind in features.items() if isinstance(getattr(kind, "feature", kind), ClassLabel)]
    labels = labels or [column for column, kind in features.items() if isinstance(kind, List) and is_text(kind)]
    advice = (
        f"In a folder, each label needs a sub-folder of clips: {name}/train/<label>/<clips>; or "
        f"{name}/train/metadata.jsonl says the labels of each clip."
    )
    if len(videos) != 1 or len(labels) != 1:
        raise ValueError(
            f"{name} must have a split 'train' with one column of videos and one of class labels, or of lists of "
            f"labels, but has {clips.column_names}. {advice}"
        )
    clips = clips.select_columns([videos[0], labels[0]])
    clips = clips.rename_columns({old: new for old, new in ((videos[0], "video"), (labels[0], "label")) if old != new})
    if not isinstance(clips["train"].features["label"], List) and None in clips["train"]["label"][:]:
        raise ValueError(f"Some training clips of {name} have no label. {advice}")
    clips = clips.cast_column("video", Video(decode=False))  # the processor decodes, only the frames that it needs
    if is_text(clips["train"].features["label"]):
        names = sorted(labels_that_occur(clips["train"]))
        clips = DatasetDict({split: number_labels(part, names) for split, part in clips.items()})
    if "validation" not in clips:
        # Of clips with several labels each, no part can have an equal share of every label.
        stratify = None if has_several(clips["train"]) else "label"
        parts = clips["train"].train_test_split(validation_fraction, seed=seed, stratify_by_column=stratify)
        clips = DatasetDict(train=parts["train"], validation=parts["test"])
    return clips


def find_splits(folder):
    """
    Where the splits of a local folder are, in small or large letters; None if it has no train/. Left to itself,
    datasets takes a label such as "train_in_out" for a split, and the clips of Validation/ for training clips.
    """
    names = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev")}
    folders = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    folders = [each for each in folders if any(files for *_, files in os.walk(f"{folder}/{each}", followlinks=True))]
    files = {split: [f"{each}/**" for each in folders if each.lower() in known] for split, known in names.items()}
    return {split: found for split, found in files.items() if found} if files["train"] else None


# ---------------------------------------------------------------------------------------------------------------------
# The model, and what a run leaves behind
# ---------------------------------------------------------------------------------------------------------------------


def load_model(name, labels, several=False, **size):
    """The model with these labels, one or several a clip; `size`: another `num_frames` and `image_size`."""
    config = AutoConfig.from_pretrained(name)
    model = AutoModelForVideoClassification.from_pretrained(
        name,
        **size,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
        problem_type="multi_label_classification" if several else "single_label_classification",
        ignore_mismatched_sizes=True,  # a new head if the clips have another number of labels
    )
    fit_head(model, config.id2label, labels)
    return model


def fit_head(model, id2label, labels):
    """A head that was loaded for as many other labels becomes a new one; that of these labels gets their order."""
    known = [id2label[number] for number in range(len(id2label))]
    head = [module for module in model.classifier.modules() if isinstance(module, torch.nn.Linear)][-1]
    if set(known) == set(labels):
        rows = [known.index(label) for label in labels]
        for weight in head.parameters():
            weight.data = weight.data[rows]
    elif len(known) == len(labels):
        head.reset_parameters()


def fit_processor(processor, config, frame_stride=None, sampling_fps=None):
    """
    Makes a processor give what a model of this config takes: so many frames of this size.

    Args:
        frame_stride (`int`, *optional*): another distance between sampled frames; 0 spreads them over the whole clip.
        sampling_fps (`float`, *optional*): so many sampled frames a second instead.
    """
    image_size, crop = getattr(config, "image_size", None), processor.crop_size  # some models take any size
    height, width = image_size if isinstance(image_size, list | tuple) else (image_size, image_size)
    if image_size and crop and (crop["height"], crop["width"]) != (height, width):
        edge = (processor.size or {}).get("shortest_edge")  # it may be longer than the crop
        ratio = edge / min(crop["height"], crop["width"]) if edge else 1
        processor.size = {"shortest_edge": round(ratio * min(height, width))}
        processor.crop_size = {"height": height, "width": width}
    if not isinstance(processor, VideoMambaVideoProcessor):
        return
    if frame_stride is not None or sampling_fps is not None:
        processor.frame_stride = processor.frame_stride if frame_stride is None else frame_stride or None
        processor.sampling_fps, processor.fps = sampling_fps, None
    if processor.fps is None and getattr(config, "num_frames", None):
        processor.num_frames = config.num_frames


def for_decoded_frames(processor):
    """The image processor that belongs to a video processor of this package: the same, for frames."""
    names = VideoMambaImageProcessor.valid_kwargs.__annotations__
    return VideoMambaImageProcessor(**{key: value for key, value in processor.to_dict().items() if key in names})


def keep_settings(folder, settings, writes=True):
    """
    Keeps the settings of the run in `folder`, so that no other goes on there.

    Raises:
        ValueError: a model was trained in the folder, or has begun to be, with other settings.
    """
    path = Path(folder, SETTINGS)
    known = {name: value for name, value in settings.items() if not MAY_DIFFER.match(name)}
    for name, value in known.items():
        if isinstance(value, str) and os.path.exists(value):
            known[name] = os.path.abspath(value)
    known = json.loads(json.dumps(known, default=str))
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    other = [name for name in sorted(before.keys() & known) if before[name] != known[name]]
    if other and (any(path.parent.glob("checkpoint-*")) or any(path.parent.glob("model*.safetensors"))):
        short = reprlib.Repr()
        short.maxstring = 80
        old, new = ([short.repr(run[name]) for name in other] for run in (before, known))
        found = "; ".join(f"{n} was {a} and is now {b}" for n, a, b in zip(other, old, new, strict=True))
        raise ValueError(
            f"{folder} was made with other settings: {found}. "
            "To go on there, give the same. To start anew, name another --output_dir, or remove the folder. To train "
            "its model further, name it as --model_name_or_path, with another --output_dir."
        )
    if writes:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(before | known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(part, path)


def licence(name):
    """The licence in the card of a folder or Hub repository; None if it has none."""
    path = f"{name}/README.md" if name and os.path.isdir(name) else name
    if not path or (path != name and not os.path.isfile(path)):
        return None
    try:
        card = ModelCard.load(path)
    except Exception:  # without a card or a network: those of the network's client are not of one family
        return None
    return card.data.get("license")


def main_metric(metrics):
    """Which of the metrics of an evaluation stands for it: accuracy, or mAP of clips with several labels each."""
    return next((name for name in ("accuracy", "mean_average_precision") if f"eval_{name}" in metrics), None)


def write_eval_results(folder, data_set, metrics, what):
    """`.eval_results/<data set>.yaml`, where the leaderboard of a data set of the Hub looks for a model's result."""
    name = main_metric(metrics)
    value, notes = round(metrics[f"eval_{name}"], 4), f"{name.replace('_', ' ')} on {what}"
    entry = EvalResultEntry(dataset_id=data_set, task_id="default", value=value, notes=notes)
    path = Path(folder, ".eval_results", f"{data_set.replace('/', '--')}.yaml")
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(eval_result_entries_to_yaml([entry])), encoding="utf-8")


def tell_place(checkpoint):
    """Says where a run of the `Trainer` goes on, if it does. Returns whether it is at its end already."""
    if not checkpoint:
        return False
    state = json.loads(Path(checkpoint, "trainer_state.json").read_text(encoding="utf-8"))
    step, total = state["global_step"], state["max_steps"]
    if step >= total:
        print(f"Already done: {checkpoint} is the end of this training ({total} steps). Nothing is trained.")
    else:
        print(f"Going on from {checkpoint}: {step} of {total} steps are done.")
    return step >= total


def warn_of_threads(training_args):
    """Of one process with several GPUs: the `Trainer` then divides each batch among them, in threads."""
    if training_args.n_gpu > 1:
        logger.warning(
            "This one process sees %d GPUs. The Trainer lets them share each batch, of %d examples, in threads, which "
            "is slower than one GPU alone. Start it with torchrun --nproc_per_node %d or with CUDA_VISIBLE_DEVICES=0.",
            *(training_args.n_gpu, training_args.train_batch_size, training_args.n_gpu),
        )


class ClipTransform:
    """A batch of rows in, `pixel_values` and `labels` out. (A class: workers that are spawned can take no lambda.)"""

    def __init__(self, processor, augment=None, num_labels=None):
        self.processor, self.augment = processor, augment
        self.num_labels = num_labels  # None: each clip has one

    def read(self, video):
        frames, _ = self.processor.fetch_videos(video, sample_indices_fn=self.processor.sample_frames)
        frames = frames.permute(0, 3, 1, 2)  # (T, C, H, W) uint8
        return frames if self.augment is None else self.augment(frames)

    def __call__(self, rows):
        # Clips may differ in size, so that the processor takes them one by one.
        clips = [self.processor(self.read(video), return_tensors="pt") for video in rows["video"]]
        labels = [encode_label(label, self.num_labels) for label in rows["label"]]
        return {"pixel_values": [clip["pixel_values"][0] for clip in clips], "labels": labels}


class DecodeFailures:
    """Keeps, in a file, the name of every clip that could not be read: for all workers, processes and restarts."""

    def __init__(self, folder, limit, name="decode_failures.jsonl"):
        self.path, self.limit = f"{folder}/{name}", limit

    def forget(self):
        """For a run that starts anew."""
        Path(self.path).unlink(missing_ok=True)

    def record(self, name, error):
        if name not in self.names():
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"clip": name, "error": str(error)}) + "\n")
            logger.warning("Skipped %s: %s", name, error)
        count = len(self.names())
        if count > self.limit:
            number = f"{count} clip{'s' if count != 1 else ''}"
            raise RuntimeError(
                f"{number} cannot be read, more than --max_decode_failures {self.limit}. One is {name}: {error} "
                f"All are named in {self.path}. Repair or remove these clips, or raise --max_decode_failures."
            )

    def names(self):
        if not os.path.exists(self.path):
            return set()
        return {json.loads(line)["clip"] for line in Path(self.path).read_text(encoding="utf-8").splitlines()}


def clip_name(video):
    return video["path"] or f"a clip of {len(video['bytes'])} bytes"


class Clips(torch.utils.data.Dataset):
    """
    Rows as the model takes them, when a worker asks for them. Of a clip that cannot be read, the next one takes the
    place in training; in evaluation it becomes a black clip with the label -100.
    """

    def __init__(self, rows, transform, failures):
        self.rows, self.transform, self.failures = rows, transform, failures

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        for place in range(index, index + len(self)):
            row = self.rows[place % len(self)]
            try:
                clips = self.transform({name: [value] for name, value in row.items()})
                return {name: values[0] for name, values in clips.items()}
            except (OSError, ValueError) as error:
                self.failures.record(clip_name(row["video"]), error)
            if self.transform.augment is None:
                processor = self.transform.processor
                size = (processor.crop_size["height"], processor.crop_size["width"])
                black = torch.zeros(processor.num_frames, 3, *size)
                return {"pixel_values": black, "labels": encode_label(IGNORED, self.transform.num_labels)}
        raise RuntimeError(f"None of the {len(self)} clips can be read; they are named in {self.failures.path}.")


class FineTuner(Trainer):
    def get_decay_parameter_names(self, model):
        """Those of a `Trainer`, but for positions, the class token, and the state-space model's A and D."""
        other = re.compile(r"(A_log|\.D|position_embeddings|cls_token)$")
        return [name for name in super().get_decay_parameter_names(model) if not other.search(name)]

    def create_model_card(self, *args, **kwargs):
        """That of the `Trainer`, which says of a model whose start is a folder that it was trained from scratch."""
        start = self.model.config._name_or_path
        if os.path.isdir(start):
            kwargs["license"] = kwargs.get("license") or licence(start)
        super().create_model_card(*args, **kwargs)
        measured = [entry for entry in self.state.log_history if main_metric(entry)]
        if kwargs.get("dataset_tags") and measured and self.is_world_process_zero():
            what = "what was kept for validation"
            write_eval_results(self.args.output_dir, kwargs["dataset_tags"], measured[-1], what)
        if os.path.isdir(start) and self.is_world_process_zero():
            path = Path(self.args.output_dir, "README.md")
            text, name = path.read_text(encoding="utf-8"), Path(start).absolute().name
            path.write_text(
                text.replace("was trained from scratch on", f"was fine-tuned from {name} on"), encoding="utf-8"
            )

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if isinstance(self.processing_class, VideoMambaVideoProcessor):
            for_decoded_frames(self.processing_class).save_pretrained(output_dir or self.args.output_dir)


def logits_alone(outputs, labels):
    """Of what a model puts out: a config may ask for hidden states as well."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def accuracy(prediction):
    known = prediction.label_ids != IGNORED
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids)[known].mean())}


def multi_label_metrics(prediction):
    return precisions(prediction.predictions, prediction.label_ids)


def main():
    parser = make_parser()
    parser.set_defaults(bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported())
    parser.set_defaults(use_cpu=not torch.accelerator.is_available())  # else processes would not know of each other
    args, training_args = parser.parse_args_into_dataclasses()
    training_args.remove_unused_columns = False  # the transforms need the column `video`
    set_seed(training_args.seed)
    if reason := unloadable_reason(args.model_name_or_path):
        sys.exit(reason)
    warn_of_threads(training_args)

    clips = load_clips(args.dataset, args.validation_fraction, training_args.seed)
    several, label = has_several(clips["train"]), clips["train"].features["label"]
    names = (label.feature if several else label).names
    refuse_smoothing(several, training_args.label_smoothing_factor)
    settings = {**vars(args), **training_args.to_dict(), "labels": names, "train_clips": len(clips["train"])}
    keep_settings(training_args.output_dir, settings, training_args.process_index == 0)
    sizes = {name: getattr(args, name) for name in ("num_frames", "image_size") if getattr(args, name) is not None}
    model = load_model(args.model_name_or_path, names, several, **sizes)
    processor = AutoVideoProcessor.from_pretrained(args.model_name_or_path)
    fit_processor(processor, model.config, args.frame_stride, args.sampling_fps)
    size = (processor.crop_size["height"], processor.crop_size["width"])
    augment = v2.RandomResizedCrop(size, scale=(args.min_crop_area, 1), antialias=True)  # all frames of a clip alike
    failures = DecodeFailures(training_args.output_dir, args.max_decode_failures, "_decode_failures.jsonl")
    count = len(names) if several else None
    trainer = FineTuner(
        model=model,
        args=training_args,
        train_dataset=Clips(clips["train"], ClipTransform(processor, augment, count), failures),
        eval_dataset=Clips(clips["validation"], ClipTransform(processor, num_labels=count), failures),
        compute_loss_func=multi_label_loss if several else None,
        compute_metrics=multi_label_metrics if several else accuracy,
        preprocess_logits_for_metrics=logits_alone,
        processing_class=processor,
    )
    checkpoint = get_last_checkpoint(training_args.output_dir) if os.path.isdir(training_args.output_dir) else None
    checkpoint = training_args.resume_from_checkpoint or checkpoint
    if not checkpoint and training_args.process_index == 0:
        failures.forget()
    tell_place(checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
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
