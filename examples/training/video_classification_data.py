"""Clips for the training and evaluation scripts: where they come from, how they are read, augmented and scored."""

import contextlib
import hashlib
import os
import tempfile
import time
from pathlib import Path

import datasets
import evaluate
import numpy as np
import torch
from accelerate import PartialState
from datasets import ClassLabel, List, Video, load_dataset
from torchvision.transforms import v2
from transformers.utils import logging

from finetune import clip_name
from several_labels import (
    IGNORED,
    encode_label,
    has_several,
    is_text,
    labels_that_occur,
    number_labels,
    precisions,
)
from video_classification_lists import read_list


logger = logging.get_logger(__name__)


# ---------------------------------------------------------------------------------------------------------------------
# Which clips
# ---------------------------------------------------------------------------------------------------------------------


def load_clips(args, wanted, seed, failures):
    """
    The clips of each wanted split ("train", "validation").

    Returns:
        `dict` of `datasets.Dataset` (or `IterableDataset`, with `args.streaming`) by split, each with the columns
        `video` (a path or the bytes of a file, not decoded) and `label` (a `ClassLabel`, or lists of them, with the
        names of the first split), and the list of these names.
    """
    lists = args.train_list is not None or args.validation_list is not None
    folders = args.train_dir is not None or args.validation_dir is not None
    if lists + folders + (args.dataset_name is not None) != 1:
        raise ValueError(
            "Name either folders (--train_dir, --validation_dir) or a data set (--dataset_name), or lists "
            "(--train_list, --validation_list)."
        )
    if args.streaming and args.dataset_name is None:
        raise ValueError(
            "--streaming is for a data set of the Hub (--dataset_name); folders and lists need no streaming."
        )
    splits, names = {}, None
    for split in wanted:
        if args.dataset_name is not None:
            clips = _load_from_hub(args, getattr(args, f"{split}_split"))
        else:
            source = getattr(args, f"{split}_list" if lists else f"{split}_dir")
            if source is None:
                raise ValueError(
                    f"The {split} clips are needed: name them with --{split}_{'list' if lists else 'dir'}."
                )
            if lists:
                options = {"label_list": args.label_list, "list_columns": args.list_columns}
                clips = read_list(source, args.video_root, split, args.hmdb51_split, failures, **options)
            else:
                clips = _load_folder(source)
        columns = [args.video_column, args.label_column] if not lists else ["video", "label"]
        if clips.features is None:  # a streamed data set without a description
            raise ValueError(f"{args.dataset_name} does not say which columns it has. Leave out --streaming.")
        missing = set(columns) - set(clips.features)
        if missing:
            raise ValueError(
                f"The {split} clips have no column {sorted(missing)}, only {list(clips.features)}. Name them with "
                "--video_column and --label_column; of a folder, each label needs a sub-folder of its own, or its "
                "metadata.jsonl must have that column."
            )
        video, label = (clips.features[column] for column in columns)
        if not isinstance(video, Video):
            raise ValueError(f"The column {columns[0]} must hold videos, but holds {video}.")
        if not (isinstance(getattr(label, "feature", label), ClassLabel) or is_text(label)):
            raise ValueError(f"The column {columns[1]} must hold class labels, or lists of labels, but holds {label}.")
        # The video processor decodes, only the frames it needs; here a clip stays a path, or the bytes of a file.
        clips = clips.decode(False) if args.streaming else clips.cast_column(columns[0], Video(decode=False))
        clips = clips.select_columns(columns)
        # A stream takes no name that stays.
        names_of_columns = zip(columns, ["video", "label"], strict=True)
        clips = clips.rename_columns({old: new for old, new in names_of_columns if old != new})
        if is_text(clips.features["label"]):
            if args.streaming:
                raise ValueError(
                    f"The column {columns[1]} holds names, of which a stream does not say how many there are. Leave "
                    "out --streaming, or make it lists of class labels."
                )
            clips = number_labels(clips, sorted(labels_that_occur(clips)))
        names = names or label_names(clips)
        if not names:
            raise ValueError(f"None of the {split} clips has a label.")
        clips = match_labels(clips, names)
        limit = getattr(args, "max_train_samples" if split == "train" else "max_eval_samples")
        if limit is not None and args.streaming:
            clips = clips.take(limit)
        elif limit is not None and limit < len(clips):
            clips = clips.shuffle(seed=seed).select(range(limit))
        splits[split] = clips
    several = {split: has_several(clips) for split, clips in splits.items()}
    if len(set(several.values())) > 1:
        raise ValueError(f"One split has one label a clip, the other lists of labels ({several}). Give both alike.")
    if {"train", "validation"} <= set(splits) and not (args.streaming or args.allow_missing_classes):
        absent = sorted(_classes(splits["train"]) - _classes(splits["validation"]))
        if absent and args.max_eval_samples is None:
            raise ValueError(
                f"There is no validation clip of {[names[label] for label in absent]}. Add some, or set "
                "--allow_missing_classes, and nothing will be known about these classes."
            )
    return splits, names


def label_names(clips):
    """The names of the labels, in the order of their numbers."""
    label = clips.features["label"]
    return (label.feature if has_several(clips) else label).names


def _classes(clips):
    return labels_that_occur(clips) if has_several(clips) else set(clips["label"])


def _load_folder(folder):
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"There is no folder {folder}. It should hold a sub-folder of clips for each label.")
    labelled = any(entry.is_dir() for entry in os.scandir(folder))
    # Without a pattern, datasets takes a label such as "train_in_out" for the split, and leaves out all others.
    files = {"train": "**"}
    return load_dataset("videofolder", data_dir=folder, data_files=files, split="train", drop_labels=not labelled)


def _load_from_hub(args, split):
    name, config = args.dataset_name, args.dataset_config_name
    try:
        return load_dataset(name, config, split=split, streaming=args.streaming)
    except (ConnectionError, OSError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ConnectionError(
            f"The data set {name} could not be loaded ({first_line(error)}). Check its name, the network and "
            "your token (`hf auth whoami`), or give folders with --train_dir and --validation_dir."
        ) from error


def first_line(error):
    return f"{type(error).__name__}: {error}".splitlines()[0]


def match_labels(clips, names):
    """Numbers the labels of `clips` as in `names`."""
    own = label_names(clips)
    if all(map(str.isdecimal, [*own, *names])):  # of a list, with as many digits as its largest number has
        known = {int(name): name for name in names}
        own = [label if label in names else known.get(int(label), label) for label in own]
    unknown = set(own) - set(names)
    if unknown:
        raise ValueError(
            f"The clips have labels {sorted(unknown)}, but the model or the training clips have only {names}."
        )
    if own == names:
        return clips
    new, features = {number: names.index(name) for number, name in enumerate(own)}, clips.features.copy()
    if has_several(clips):
        features["label"] = List(ClassLabel(names=names))
        return clips.map(
            lambda labels: {"label": [new.get(label, label) for label in labels or []]},
            input_columns="label",
            features=features,
        )
    features["label"] = ClassLabel(names=names)
    return clips.map(lambda label: {"label": new.get(label, label)}, input_columns="label", features=features)


# ---------------------------------------------------------------------------------------------------------------------
# Reading them
# ---------------------------------------------------------------------------------------------------------------------


class DecodeError(ValueError):
    """A clip that cannot be read."""


class ClipReader:
    """
    Reads and transforms clips when a worker asks for them, and notes how long that takes.

    What is random about a clip follows from `seed`, the epoch and its index alone (in a stream, the index in its
    worker), so that a resumed run sees what an uninterrupted one would have seen.
    """

    def __init__(self, clips, transform, failures, seed=0, training=False):
        self.clips, self.transform, self.failures, self.training = clips, transform, failures, training
        # Workers see the epoch change and add to the work. (If two add at once, one may be lost: it is an estimate.)
        self.seed, self.epoch = seed, torch.zeros((), dtype=torch.int64).share_memory_()
        self.work = torch.zeros(2, dtype=torch.float64).share_memory_()  # clips read, and CPU seconds for them

    def set_epoch(self, epoch):
        self.epoch.fill_(epoch)

    def read(self, row, index):
        """A transformed clip; None if it cannot be read, which is written down."""
        start = time.process_time()
        try:
            with seeded(self.seed, int(self.epoch), index):
                clip = self.transform(row["video"], row["label"])
        except DecodeError as error:
            self.failures.record(clip_name(row["video"]), error)
            return None
        self.work += torch.tensor([1.0, time.process_time() - start])
        return clip


class Clips(ClipReader, torch.utils.data.Dataset):
    """
    Clips by their number. Of one that cannot be read, the next one takes the place in training; in evaluation it
    becomes a black clip with the label -100.
    """

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        for place in range(index, index + len(self)):
            clip = self.read(self.clips[place % len(self)], index)
            if clip is not None:
                return clip
            if not self.training:
                return self.transform(None, IGNORED)
        raise RuntimeError(f"None of the {len(self)} clips can be read; they are named in {self.failures.path}.")

    def names(self, count):
        """What to call the first `count` clips in a table."""
        return [clip_name(video) for video in self.clips["video"][:count]]


class ClipStream(ClipReader, torch.utils.data.IterableDataset):
    """Clips of a streamed data set, in training in random order. One that cannot be read is left out."""

    def __init__(self, clips, transform, failures, seed=0, training=False):
        clips = clips.shuffle(seed=seed, buffer_size=256) if training else clips
        super().__init__(clips, transform, failures, seed, training)

    def set_epoch(self, epoch):
        super().set_epoch(epoch)
        self.clips.set_epoch(epoch)

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()  # each has its own part of the clips, and counts from zero
        for index, row in enumerate(self.clips):
            clip = self.read(row, index if worker is None else (worker.id, index))
            if clip is not None:
                yield clip

    def names(self, count):
        """What to call the first `count` clips in a table."""
        return [f"clip {number}" for number in range(count)]


class Stopwatch:
    """Whether reading clips keeps up with the model: what share of the time the training loop waits for them."""

    def __init__(self, clips, workers):
        self.clips, self.workers, self.readings, self.told = clips, workers, 0, False
        self.restart()

    def restart(self):
        """What went by until now, such as an evaluation, does not count."""
        self.start, self.waited, self.seen = time.perf_counter(), 0.0, 0
        self.before = self.clips.work.clone()

    def watch(self, batches):
        """The same batches, while the time until each of them comes is taken."""
        batches = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            self.seen += len(batch["labels"])
            yield batch

    def read(self):
        """Figures for the log, since the last reading. Says once what to do if reading is what limits the speed."""
        elapsed, (read, seconds) = time.perf_counter() - self.start, (self.clips.work - self.before).tolist()
        waiting, process = self.waited / elapsed, PartialState()
        values = {"clips_per_second": process.num_processes * self.seen / elapsed, "waiting": waiting}
        if seconds > 0:
            values["clips_per_core_second"] = read / seconds
        # At first the model's kernels are compiled and the workers started.
        if waiting > 0.3 and self.readings > 0 and not self.told and process.is_main_process:
            self.told = True
            logger.warning(
                "%.0f%% of the time is spent waiting for clips. A core reads and augments %.1f clips a second; the "
                "model could take up to %.1f. Raise --dataloader_num_workers (it is %d, and this machine has %d "
                "cores), or keep the decoded frames with --frame_cache.",
                *(100 * waiting, read / max(seconds, 1e-9), self.seen / max(elapsed - self.waited, 1e-9)),
                *(self.workers, os.cpu_count()),
            )
        self.readings += 1
        self.restart()
        return values


@contextlib.contextmanager
def seeded(*keys):
    """Random numbers that depend on `keys` alone; afterwards the generator goes on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(number_from(*keys))  # that of the CPU: a worker must not touch the GPU's
        yield


def number_from(*keys):
    """A seed that depends on all of `keys`, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(keys).encode()).digest()[:8], "little") >> 1


def read_frames(reader, video, sample=None):
    """Decodes the frames the model will see, and no others: uint8 (T, C, H, W). Raises `DecodeError`."""
    try:
        frames, metadata = reader.fetch_videos(video, sample_indices_fn=sample or reader.sample_frames)
    except (OSError, ValueError) as error:
        raise DecodeError(f"{error}") from error
    if sample is None and metadata.total_num_frames < len(frames):
        logger.warning_once(f"Some clips have fewer frames than the {len(frames)} of the model: frames are repeated.")
    return frames.permute(0, 3, 1, 2)


def read_frames_once(reader, video, folder, shortest_edge):
    """As `read_frames`, but shrunk, and from a file in `folder` if they have been read before."""
    what = video["bytes"] or f"{video['path']} {os.path.getmtime(video['path'])}".encode()
    how = f"{reader.num_frames} {reader.sampling_fps or reader.frame_stride} {shortest_edge}".encode()
    how += b" a second" if reader.sampling_fps else b" in segments" if reader.spread_in_segments else b""
    file = f"{folder}/{hashlib.sha256(what + how).hexdigest()}.npy"
    if not os.path.exists(file):
        frames = read_frames(reader, video)
        if min(frames.shape[2:]) > shortest_edge:
            frames = v2.functional.resize(frames, shortest_edge, antialias=True)
        os.makedirs(folder, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as part:
            np.save(part, frames.numpy())
        os.replace(part.name, file)
    return torch.from_numpy(np.load(file))


class TrainTransform:
    """
    Reads a clip and augments it, all its frames alike: uint8 (T, C, H, W), for `DeviceTransform`. If it `defers`, the
    steps after the crop are left to that, which gets the state of the random numbers. With `num_labels`, a clip has a
    list of labels, which becomes a vector.
    """

    def __init__(self, reader, processor, args, mirror_swaps, reversal_swaps, defers=False, num_labels=None):
        self.num_labels = num_labels
        self.reader, self.cache, self.key = reader, args.frame_cache, processor.model_input_names[0]
        self.mirror_swaps, self.reversal_swaps, self.repeat_frames = mirror_swaps, reversal_swaps, args.repeat_frames
        size = (processor.crop_size["height"], processor.crop_size["width"])
        self.shortest_edge, self.defers = round(1.15 * max(size)), defers
        self.crop = v2.RandomResizedCrop(size, scale=(args.min_crop_area, 1), antialias=True)
        steps = [v2.ColorJitter(brightness=args.jitter, contrast=args.jitter)]
        if args.rand_augment:
            steps.insert(0, v2.RandAugment(num_ops=args.rand_augment, magnitude=args.rand_augment_magnitude))
        if args.random_erasing:
            mean_colour = [round(255 * mean) for mean in processor.image_mean]
            steps.append(v2.RandomErasing(p=args.random_erasing, value=mean_colour))
        self.augment = v2.Compose(steps)

    def __call__(self, video, label):
        if self.cache is None:
            frames = read_frames(self.reader, video)
        else:
            frames = read_frames_once(self.reader, video, self.cache, self.shortest_edge)
        if self.mirror_swaps is not None and torch.rand(()) < 0.5:
            frames, label = frames.flip(-1), swap(label, self.mirror_swaps)
        if self.reversal_swaps is not None and torch.rand(()) < 0.5:
            frames, label = frames.flip(0), swap(label, self.reversal_swaps)
        if torch.rand(()) < self.repeat_frames:
            frames = frames[filmed_at(0.25 ** torch.rand(()), torch.rand(()), len(frames))]
        frames = self.crop(frames)
        label = encode_label(label, self.num_labels)
        if self.defers:
            return {self.key: frames, "labels": label, "random_state": torch.get_rng_state().numpy().tobytes()}
        return {self.key: self.augment(frames), "labels": label}


def filmed_at(rate, phase, count):
    """
    Which of `count` frames is on screen at the time of each, had only `rate` (0 to 1) times as many been taken: the
    latest taken, where the first but one is taken `(1 - phase) / rate` frames after the first, `phase` from 0 to 1.
    """
    number = torch.floor(torch.arange(count) * rate + phase)
    return torch.ceil((number - phase) / rate).clamp(min=0).long()


class EvalTransform:
    """
    Reads a clip and prepares it as for users of the model, but for `Normalize`: uint8 (T, C, H, W). `flip` turns axes
    round: 0 is time, -1 is width. `num_labels` as in `TrainTransform`.
    """

    def __init__(self, reader, processor, flip=(), swaps=None, num_labels=None):
        self.num_labels = num_labels
        self.reader, self.processor, self.key = reader, processor, processor.model_input_names[0]
        self.flip, self.swaps = flip, swaps

    def __call__(self, video, label):
        if label == IGNORED:
            size = (self.processor.crop_size["height"], self.processor.crop_size["width"])
            frames = torch.zeros((self.reader.num_frames, 3, *size), dtype=torch.uint8)
        else:
            frames = read_frames(self.reader, video).flip(self.flip)
            label = label if self.swaps is None else swap(label, self.swaps)
        frames = self.processor(frames, return_tensors="pt", do_rescale=False, do_normalize=False)[self.key][0]
        label = encode_label(label, self.num_labels)
        return {self.key: frames, "labels": label}


class Normalize:
    """
    The last step of the processors, on the model's device: uint8 in, float32 out. As bytes, clips take a quarter of
    the memory and of the way there.
    """

    def __init__(self, processor, device):
        kind = {"dtype": torch.float32, "device": device}
        self.mean, self.std = (
            255 * torch.tensor(values, **kind).view(3, 1, 1) for values in (processor.image_mean, processor.image_std)
        )

    def __call__(self, frames):
        return frames.to(self.mean.device).to(self.mean.dtype).sub_(self.mean).div_(self.std)


class DeviceTransform:
    """
    The last steps, for a batch that is to go, or is, on the model's device: what `TrainTransform` deferred, with each
    clip's own random numbers, and `Normalize`. A GPU copies and augments on a stream of its own, beside the model.
    """

    def __init__(self, processor, device, augment=None):
        self.key, self.device, self.augment = processor.model_input_names[0], device, augment
        self.normalize = Normalize(processor, device)
        # Some of torchvision's steps wait for all that their stream has been given: not for the model's, too.
        self.stream = torch.cuda.Stream(device) if augment is not None and device.type == "cuda" else None

    def __call__(self, batch):
        if "random_state" not in batch:
            return {**batch, self.key: self.normalize(batch[self.key])}
        states = batch["random_state"]
        with torch.cuda.stream(self.stream):  # None: nothing
            batch = {name: batch[name].to(self.device, non_blocking=True) for name in (self.key, "labels")}
            for frames, state in zip(batch[self.key], states, strict=True):
                with torch.random.fork_rng(devices=[]):
                    torch.set_rng_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
                    frames.copy_(self.augment(frames))
            batch[self.key] = self.normalize(batch[self.key])
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            for tensor in batch.values():
                tensor.record_stream(current)
        return batch


def augments_there(args, num_workers, device):
    """
    Whether clips are augmented on the device. Not those of a stream: Accelerate joins and splits its batches, which
    must be tensors. Nor where workers need not decode: they have the time, and the host then has less to launch.
    """
    return device.type == "cuda" and not args.streaming and not (args.frame_cache and num_workers)


def transform_clips(splits, names, args, reader, processor, failures, seed, num_workers, device):
    """
    The clips of each split as a data set that reads them, and augments those for training, when they are asked for;
    of the validation clips also "mirrored" and "reversed", where `args` says what these do to the labels.

    Returns:
        `dict` of data sets, and the `DeviceTransform` for batches of them.
    """
    mirror, reversal = parse_swaps(args.mirror_swaps, names), parse_swaps(args.reversal_swaps, names)
    make, clips, augment = ClipStream if args.streaming else Clips, {}, None
    num_labels = len(names) if any(map(has_several, splits.values())) else None
    if "train" in splits:
        defers = augments_there(args, num_workers, device)
        transform = TrainTransform(reader, processor, args, mirror, reversal, defers, num_labels)
        clips["train"] = make(splits["train"], transform, failures, seed, training=True)
        augment = transform.augment if defers else None
    if "validation" in splits:
        transform = EvalTransform(reader, processor, num_labels=num_labels)
        clips["validation"] = make(splits["validation"], transform, failures)
        for view, flip, swaps in (("mirrored", (-1,), mirror), ("reversed", (0,), reversal)):
            if swaps is not None and swaps != list(range(len(names))):
                transform = EvalTransform(reader, processor, flip, swaps, num_labels)
                clips[view] = make(splits["validation"], transform, failures)
    return clips, DeviceTransform(processor, device, augment)


def parse_swaps(text, names):
    """'a:b,c:d' as a list that gives each label's number after the swap; None if `text` is None."""
    if text is None:
        return None
    swaps = list(range(len(names)))
    for pair in filter(None, text.split(",")):
        try:
            first, second = (names.index(name.strip()) for name in pair.split(":"))
        except ValueError:
            raise ValueError(f"{pair!r} is not a pair 'label:label' of the labels {names}.") from None
        swaps[first], swaps[second] = second, first
    return swaps


def swap(label, swaps):
    """A label's number after a swap, or those of several."""
    return swaps[label] if isinstance(label, int) else [swaps[each] for each in label or []]


def load_metric(several):
    """A function of scores (clips, labels) and labels: the metrics of clips with one label each, or `several`."""
    if several:
        return precisions
    metric = load_accuracy()
    return lambda scores, labels: metric.compute(predictions=scores, references=labels)


def load_accuracy():
    """The metric of `clip_accuracy.py`, by its path, so that it needs no network."""
    return evaluate.load(str(Path(__file__).with_name("clip_accuracy.py")), keep_in_memory=True)
