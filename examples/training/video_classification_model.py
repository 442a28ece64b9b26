"""What the training and evaluation scripts do with a model: make it, group its weights, keep it, describe it."""

import copy
import json
import logging
import os
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from huggingface_hub import EvalResult, HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError
from torch.distributed.fsdp import FSDPModule
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForVideoClassification,
    AutoVideoProcessor,
    PreTrainedModel,
)

from finetune import (
    fit_processor,
    for_decoded_frames,
    licence,
    main_metric,
    write_eval_results,
)
from modeling_videomamba import VideoMambaConfig, VideoMambaImageProcessor, VideoMambaVideoProcessor
from modeling_videomamba.loading_videomamba import unloadable_reason
from several_labels import IGNORED, average_precision
from video_classification_data import first_line


logger = logging.getLogger(__name__)

# Of a new model, if the flags do not say; a trained one has its own, of which the first two cannot be changed.
NEW_MODEL = {"hidden_size": 384, "num_hidden_layers": 24, "num_frames": 16, "frame_stride": 2, "image_size": 224}
SEVERAL = "multi_label_classification"  # the `problem_type` of a config whose clips have several labels each
THRESHOLD = 0.5  # the least score of a label that is predicted, where several may be
MANIFEST = "complete.json"  # of a checkpoint: the sizes and checksums of its files, written when all else is


def load_model(args, names, training, several=False):
    """
    The model, the names of its labels, and what prepares clips for it.

    Args:
        args (`ModelArguments`): of a trained model, length, size and sampling are changed in model and processors.
        names (`list[str]`): the labels of the clips. A trained model keeps its own, in its own order, if they are the
            same or if it is only evaluated.
        training (`bool`).
        several (`bool`): a clip has a list of labels. The config says so (`problem_type`).

    Returns:
        The model; its label names; a processor that reads files, and the video and image processors that belong to the
        model (a stock video processor cannot read files without torchcodec).
    """
    trust = {"trust_remote_code": args.trust_remote_code}
    given = {name: getattr(args, name) for name in NEW_MODEL if getattr(args, name) is not None}
    sizes = NEW_MODEL | given
    stride = sizes.pop("frame_stride") or None
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    if args.config_name is not None and args.model_name_or_path is not None:
        raise ValueError("Name either a model to start from (--model_name_or_path) or one to build (--config_name).")
    if args.model_name_or_path is None:
        own = {
            **labels,
            "num_frames": sizes["num_frames"],
            "image_size": sizes["image_size"],
            "drop_path_rate": args.drop_path_rate or 0.0,
            "problem_type": SEVERAL if several else None,
        }
        if args.config_name is None:
            own |= sizes
            own["class_token_position"] = args.class_token_position
            config = VideoMambaConfig(**own | parse_overrides(args.config_overrides, VideoMambaConfig()))
        else:
            config = AutoConfig.from_pretrained(args.config_name, **own, **trust)
            config = override_config(config, args.config_overrides)
        model = AutoModelForVideoClassification.from_config(config, **trust)
        # Another architecture's config may have neither: its model takes clips of any size.
        size, frames = (getattr(config, name, sizes[name]) for name in ("image_size", "num_frames"))
        geometry = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
        processor = VideoMambaVideoProcessor(
            num_frames=frames, frame_stride=stride, sampling_fps=args.sampling_fps, **geometry
        )
        return model, names, processor, processor, VideoMambaImageProcessor(**geometry)

    if reason := unloadable_reason(args.model_name_or_path):
        raise ValueError(reason)
    config = AutoConfig.from_pretrained(args.model_name_or_path, **trust)
    known = [config.id2label[number] for number in range(config.num_labels)]
    if not training or set(names) == set(known):
        names = known
    elif not args.ignore_mismatched_sizes:
        raise ValueError(
            f"{args.model_name_or_path} knows {_shorten(known)}, but the clips have {_shorten(names)}. To fine-tune "
            "on a new data set, with a new head on the same backbone, set --ignore_mismatched_sizes. If the labels "
            "should be the same, rename the clips' folders or labels."
        )
    else:
        config.id2label, config.label2id, config.problem_type = labels["id2label"], labels["label2id"], None
    if training and several != (config.problem_type == SEVERAL):
        config.problem_type = SEVERAL if several else None
    elif several != (config.problem_type == SEVERAL):
        kinds = ["one label a clip", "several labels a clip"]
        raise ValueError(
            f"{args.model_name_or_path} was trained for {kinds[not several]}, but these clips have {kinds[several]}. "
            "Evaluate it on clips of its kind."
        )
    for name in ("drop_path_rate", "num_frames", "image_size"):
        if getattr(args, name) is not None:
            setattr(config, name, getattr(args, name))
    config = override_config(config, args.config_overrides)
    model = AutoModelForVideoClassification.from_pretrained(
        args.model_name_or_path, config=config, ignore_mismatched_sizes=args.ignore_mismatched_sizes, **trust
    )
    if len(names) == len(known) and names != known:  # the head of the other labels fits: nothing has replaced it
        model.classifier = AutoModelForVideoClassification.from_config(config, **trust).classifier
    own = config.to_dict()
    for name, value in given.items():
        if name != "frame_stride" and own.get(name, value) != value:
            logger.warning(
                "--%s %s is for new models: %s keeps its %s.", name, value, args.model_name_or_path, own[name]
            )
    return model, names, *load_processors(args, config, stride)


def load_processors(args, config, stride):
    """What prepares clips for a trained model, changed to its config: a reader of files, and its two processors."""
    source, trust = args.model_name_or_path, {"trust_remote_code": args.trust_remote_code}
    processor = AutoVideoProcessor.from_pretrained(source, **trust)
    fit_processor(processor, config, args.frame_stride, args.sampling_fps)
    if isinstance(processor, VideoMambaVideoProcessor):
        return processor, processor, for_decoded_frames(processor)
    image_processor = AutoImageProcessor.from_pretrained(source, **trust)
    fit_processor(image_processor, config)
    options = {"frame_stride": stride, "sampling_fps": args.sampling_fps}
    return VideoMambaVideoProcessor(num_frames=config.num_frames, **options), processor, image_processor


def parse_overrides(text, config):
    """'field=value,field=value' as a `dict`: JSON (numbers, lists, null) or text, for fields that `config` has."""
    values = {}
    for pair in filter(None, re.split(r",(?![^\[]*\])", text or "")):  # not within a list
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or not hasattr(config, name):
            raise ValueError(
                f"--config_overrides: {pair!r} is not a pair field=value of {type(config).__name__}, which has the "
                f"fields {', '.join(sorted(config.to_dict()))}."
            )
        try:
            values[name] = json.loads(value)
        except json.JSONDecodeError:
            values[name] = value
        if isinstance(values[name], int) and type(getattr(config, name)) is float:
            values[name] = float(value)
    return values


def override_config(config, text):
    """A config with the fields of `text` changed, and checked anew."""
    return type(config)(**config.to_dict() | parse_overrides(text, config)) if text else config


def _shorten(names):
    return f"{len(names)} labels {names[:5]}{' and so on' if len(names) > 5 else ''}"


def add_adapters(model, rank):
    """
    The model, frozen but for its head, with LoRA adapters (`peft`) on the projections into and out of every mixer; as
    it is if `rank` is 0.
    """
    if rank == 0:
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("--lora_rank needs peft: pip install peft") from error
    targets = [name for name, module in model.named_modules() if name.endswith(("in_proj", "out_proj"))]
    if not targets:
        raise ValueError(f"--lora_rank: {type(model).__name__} has no layers called in_proj or out_proj to adapt.")
    return get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, modules_to_save=["classifier"])
    )


def save_for_users(model, processors, folder, state_dict=None):
    """
    The complete model and its processors, as `from_pretrained` and `pipeline` take them: file by file under another
    name first. LoRA adapters are merged into it, and kept in the sub-folder `adapter` as well.
    """
    part = f"{folder}/model.part"
    shutil.rmtree(part, ignore_errors=True)
    if hasattr(model, "peft_config"):
        model.save_pretrained(f"{part}/adapter")
        describe_adapter(f"{part}/adapter")
        model, state_dict = copy.deepcopy(model).merge_and_unload(), None
    without_fsdp(model).save_pretrained(part, state_dict=state_dict)
    for processor in processors:
        processor.save_pretrained(part)
    move_files(part, folder)


def describe_adapter(folder):
    """A card for LoRA adapters, instead of PEFT's blank form, which names a folder of this machine as the start."""
    base = read_json(f"{folder}/adapter_config.json")["base_model_name_or_path"] or ""
    hub_base = base if base and not os.path.exists(base) else None
    card = ModelCardData(library_name="peft", base_model=hub_base, license=licence(base))
    Path(folder, "README.md").write_text(
        f"---\n{card.to_yaml()}\n---\n\n# LoRA adapter\n\nThe adapter of the model in the folder above, which was "
        f"fine-tuned from {hub_base or Path(base).name or 'a new model'}, and which has it merged.\n",
        encoding="utf-8",
    )


def parameter_groups(model, learning_rate, weight_decay, layer_decay):
    """
    Weights for an optimizer. A, D, biases, norms, position embeddings and the class token are not decayed; with
    `layer_decay` below 1, the learning rate falls from the head, which has all of it, to the embeddings.
    """
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    layers = {name: int(match[1]) for name, _ in named if (match := re.search(r"\.(\d+)\.", name))}
    depth = 1 + max(layers.values(), default=0)
    groups = {}
    for name, weight in named:
        own = name.rpartition(".")[2]
        plain = weight.ndim < 2 or own in ("A_log", "D") or re.search("bias|norm|position_embedding|cls_token", name)
        below = depth - layers[name] if name in layers else (depth + 1 if "embeddings" in name else 0)
        settings = (0.0 if plain else weight_decay, learning_rate * layer_decay**below)
        groups.setdefault(settings, []).append(weight)
    return [{"params": weights, "weight_decay": decay, "lr": rate} for (decay, rate), weights in groups.items()]


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def keep_checkpoint(part, output_dir, step, limit, best=None):
    """
    Makes the folder `part` the checkpoint of this step. It appears whole or not at all.

    Of the others the oldest are discarded, until there are `limit` in all (if it is set); that of step `best` stays.
    """
    paths = sorted(path for path in Path(part).rglob("*") if path.is_file() and path.name != MANIFEST)
    write_json(f"{part}/{MANIFEST}", {str(path.relative_to(part)): _fingerprint(path) for path in paths})
    _discard(f"{output_dir}/checkpoint-{step}")  # a damaged one
    os.replace(part, f"{output_dir}/checkpoint-{step}")
    steps = _list_steps(output_dir)
    spare = [old for old in steps if old not in (step, best)]
    for old in spare[: max(0, len(steps) - limit) if limit else 0]:
        _discard(f"{output_dir}/checkpoint-{old}")


def _list_steps(folder):
    return sorted(int(path.name[11:]) for path in Path(folder).glob("checkpoint-*") if path.name[11:].isdigit())


def _discard(folder):
    """Deletes a folder, under another name, so that none is ever seen half deleted."""
    part = Path(folder).with_name("discarded.part")
    shutil.rmtree(part, ignore_errors=True)
    if os.path.exists(folder):
        os.replace(folder, part)
        shutil.rmtree(part)


def newest_checkpoint(folder):
    """The newest complete, undamaged `checkpoint-<step>` in `folder`, or None. Says which ones it passes over."""
    for step in reversed(_list_steps(folder)):
        path = Path(folder, f"checkpoint-{step}")
        try:
            files = read_json(path / MANIFEST)
            damaged = [name for name, fingerprint in files.items() if _fingerprint(path / name) != fingerprint]
        except (OSError, ValueError) as error:
            damaged = [str(error)]
        if not damaged:
            return str(path)
        logger.warning("%s is incomplete or damaged (%s). Resuming from the one before.", path, ", ".join(damaged))
    return None


def without_fsdp(model):
    """
    The model; or, if FSDP2 has sharded it, an empty one of its class, to `save_pretrained` the gathered weights with:
    FSDP2 gives a model a class of its own, whose code would be saved instead of the model's.
    """
    if not isinstance(model, FSDPModule):
        return model
    model_class = next(kind for kind in type(model).__mro__[1:] if issubclass(kind, PreTrainedModel))
    with torch.device("meta"):
        return model_class(model.config)


def move_files(part, folder):
    """Moves complete files and folders to where they belong, each in one step."""
    for name in os.listdir(part):
        if os.path.isdir(f"{folder}/{name}"):
            _discard(f"{folder}/{name}")
        os.replace(f"{part}/{name}", f"{folder}/{name}")
    os.rmdir(part)


def _fingerprint(path):
    checksum, size = 0, 0
    with open(path, "rb") as file:
        while chunk := file.read(2**22):
            checksum, size = zlib.crc32(chunk, checksum), size + len(chunk)
    return [size, checksum]


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves behind
# ---------------------------------------------------------------------------------------------------------------------


def to_scores(logits, several):
    """Logits (..., labels) to probabilities: of one label among them, or of each for itself."""
    return logits.sigmoid() if several else logits.softmax(-1)


def write_predictions(folder, clip_names, labels, scores, names):
    """
    `predictions.csv`, one row a clip; `classes.csv`, one row a class; and the picture `confusion_matrix.png`.

    `scores` are probabilities, (clips, labels). Clips that could not be read, with the label -100, are left out. Of
    clips with several labels each, whose `labels` are 0 or 1 (clips, labels), there is no picture.
    """
    labels, names = np.asarray(labels), np.array(names)
    kept = np.flatnonzero(labels.reshape(len(labels), -1)[:, 0] != IGNORED)
    clip_names, labels, scores = np.array(clip_names)[kept], labels[kept], np.asarray(scores)[kept]
    if labels.ndim == 2:
        _write_lists_of_labels(folder, clip_names, labels, scores, names)
        return
    predicted = scores.argmax(-1)
    clips = {"clip": clip_names, "label": names[labels], "predicted": names[predicted]}
    table = pd.DataFrame({**clips, "score": scores.max(-1)})
    table.to_csv(f"{folder}/predictions.csv", index=False, float_format="%.4f")
    counts = np.zeros((len(names), len(names)), int)
    np.add.at(counts, (labels, predicted), 1)
    right = pd.Series(counts.diagonal())  # whose 0 / 0 is a gap in the file
    classes = {"label": names, "clips": counts.sum(1), "recognised": right}
    table = pd.DataFrame({**classes, "recall": right / counts.sum(1), "precision": right / counts.sum(0)})
    table.to_csv(f"{folder}/classes.csv", index=False, float_format="%.4f")

    from matplotlib.figure import Figure  # a second to import, which runs that never get here are spared

    side = min(40, 1.5 + 0.6 * len(names))
    figure = Figure(figsize=(side + 0.5, side), layout="tight")
    axes = figure.subplots()
    axes.imshow(counts / counts.sum(1, keepdims=True).clip(1), cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    title = f"{np.mean(predicted == labels):.1%} of {len(labels)} clip{'s' * (len(labels) != 1)}"
    axes.set(xlabel="predicted", ylabel="label", title=title)
    if len(names) <= 60:
        for row, column in np.argwhere(counts):
            colour = "white" if counts[row, column] > counts[row].sum() / 2 else "black"
            axes.text(column, row, counts[row, column], ha="center", va="center", color=colour)
    figure.savefig(f"{folder}/confusion_matrix.png", dpi=80)


def _write_lists_of_labels(folder, clip_names, labels, scores, names):
    """Labels of a clip stand between semicolons; predicted are those that reach the threshold."""
    truth, predicted = labels > 0, scores >= THRESHOLD
    columns = {"labels": [names[row] for row in truth], "predicted": [names[row] for row in predicted]}
    columns["scores"] = [[f"{s:.4f}" for s in row[own]] for row, own in zip(scores, predicted, strict=True)]
    columns = {name: [";".join(each) for each in lists] for name, lists in columns.items()}
    pd.DataFrame({"clip": clip_names, **columns}).to_csv(f"{folder}/predictions.csv", index=False)
    right, wanted, found = (pd.Series(part.sum(0)) for part in (truth & predicted, truth, predicted))
    columns = {"label": names, "clips": wanted, "recognised": right}
    columns |= {"recall": right / wanted, "precision": right / found}
    each = [average_precision(truth[:, i], scores[:, i]) if n else None for i, n in enumerate(wanted)]
    table = pd.DataFrame({**columns, "average_precision": pd.Series(each, dtype=float)})
    table.to_csv(f"{folder}/classes.csv", index=False, float_format="%.4f")


def draw_curve(folder, history):
    """`training_curve.png` of entries with `step` and `loss` or the main metric, if there are two points of either."""
    path = Path(folder, "training_curve.png")
    path.unlink(missing_ok=True)
    measured = f"eval_{next(filter(None, map(main_metric, history)), 'accuracy')}"
    if all(sum(key in entry for entry in history) < 2 for key in ("loss", measured)):
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="tight")
    left = figure.subplots()
    right = left.twinx()
    for axes, key, colour in ((left, "loss", "tab:blue"), (right, measured, "tab:orange")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        few = key == measured or len(points) < 10
        axes.plot(*zip(*points, strict=True), color=colour, marker="." if few else None)
        axes.set_ylabel(key, color=colour)
    right.set_ylim(0, 1)
    left.set_xlabel("optimizer steps")
    figure.savefig(path, dpi=80)


# How the Hub calls the metrics of a card.
METRIC_TYPES = {"accuracy": "accuracy", "top5_accuracy": "accuracy", "mean_class_accuracy": "recall"}
METRIC_TYPES |= {"mean_average_precision": "mean_average_precision", "micro_average_precision": "average_precision"}


def write_card(folder, repo_id, model_args, data_args, metrics, settings):
    """
    `README.md`: a model card with the metrics where the Hub looks for them, and `training_args.json`;
    of clips that are a data set of the Hub, also `.eval_results/`.

    `repo_id` is where it will be on the Hub, or None; `metrics` are those of the validation clips, or None; `settings`
    are all arguments of the run.
    """
    data_set, base = data_args.dataset_name, model_args.model_name_or_path
    hub_data, hub_base = (name if name and not os.path.exists(name) else None for name in (data_set, base))
    local = Path(data_set or data_args.train_list or data_args.train_dir or data_args.validation_dir).absolute()
    clips = hub_data or (local.name if data_set else local.parent.name)
    title = repo_id.rpartition("/")[2] if repo_id else Path(folder).absolute().name
    results = [
        EvalResult(
            task_type="video-classification",
            dataset_type=hub_data or "videofolder",
            dataset_name=clips,
            dataset_split=data_args.validation_split,
            metric_type=kind,
            metric_name=name,
            metric_value=round(metrics[f"eval_{name}"], 4),
        )
        for name, kind in METRIC_TYPES.items()
        if metrics and f"eval_{name}" in metrics
    ]
    if hub_data and results:
        write_eval_results(folder, hub_data, metrics, f"the split {data_args.validation_split}")
    card = ModelCardData(
        model_name=title,
        license=licence(base),
        library_name="transformers",
        pipeline_tag="video-classification",
        datasets=[hub_data] if hub_data else None,
        base_model=hub_base,
        eval_results=results or None,
    )
    measured = "".join(f"| {result.metric_name} | {result.metric_value:.4f} |\n" for result in results)
    if measured:
        measured = f"| on the validation clips | |\n| --- | --- |\n{measured}\n{_about_metrics(metrics)}\n\n"
    curve = "![training curve](training_curve.png)\n\n" if Path(folder, "training_curve.png").exists() else ""
    origin = f"fine-tuned from {hub_base or Path(base).name}" if base else "trained from scratch"
    if model_args.lora_rank:
        origin += f" (LoRA of rank {model_args.lora_rank}, merged; the adapter alone is in `adapter/`)"
    several = read_json(f"{folder}/config.json").get("problem_type") == SEVERAL
    kind = "A video classifier, which gives each label a score of its own" if several else "A video classifier"
    options = ', function_to_apply="sigmoid"' if several else ""  # said to pipelines of before transformers 5.23, too
    Path(folder, "README.md").write_text(
        f"---\n{card.to_yaml()}\n---\n\n# {title}\n\n{kind}, {origin} on {clips}.\n\n```python\n"
        f'from transformers import pipeline\n\nclassifier = pipeline("video-classification", '
        f'model="{repo_id or "."}", trust_remote_code=True)\nclassifier("clip.mp4"{options})\n```\n\n{measured}'
        f"{curve}The arguments of the run are in `training_args.json`.\n",
        encoding="utf-8",
    )
    write_json(f"{folder}/training_args.json", settings)


def _about_metrics(metrics):
    if "eval_accuracy_low" in metrics:
        low, high = (metrics[f"eval_accuracy_{bound}"] for bound in ("low", "high"))
        return f"The 95 % interval (Wilson's) of the accuracy is {low:.4f} to {high:.4f}."
    return (
        f"The mean is over the {metrics['eval_measured_labels']} labels that some validation clip has; the other "
        "metric takes all pairs of clip and label as one ranking."
    )


def write_json(path, value):
    part = Path(f"{path}.part")
    part.write_text(json.dumps(value, indent=1, sort_keys=True, default=str) + "\n", encoding="utf-8")
    os.replace(part, path)


def write_results(folder, split, metrics):
    """`<split>_results.json`, and `all_results.json` with the metrics of all splits, as the `Trainer` names them."""
    path = Path(folder, "all_results.json")
    write_json(path, (read_json(path) if path.exists() else {}) | metrics)
    write_json(f"{folder}/{split}_results.json", metrics)


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def start_push(repo_id, token, private, settings):
    """Creates the Hub repository and writes the arguments into it, so that missing rights show before training."""
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        content = json.dumps(settings, indent=1, sort_keys=True, default=str).encode()
        api.upload_file(
            path_or_fileobj=content,
            path_in_repo="training_args.json",
            repo_id=repo_id,
            commit_message="Training starts: its arguments",
        )
    except Exception as error:  # those of the network's client are not of one family
        kind = PermissionError if isinstance(error, HfHubHTTPError) else ConnectionError
        raise kind(
            f"Cannot write to the Hub repository {repo_id} ({first_line(error)}). Log in with a token that has write "
            "permission (`hf auth login`), check --hub_model_id and the network, or leave out --push_to_hub."
        ) from error
    return repo_id


def finish_push(repo_id, token, folder):
    """Uploads what a run left in `folder`, but for checkpoints, logs, pickles and the predictions for each clip."""
    return HfApi(token=token).upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=["*.safetensors", "*.json", "*.py", "*.md", "*.png", "*.yaml", "classes.csv"],
        ignore_patterns=["checkpoint-*", "runs/*", "*.part/*", "_*"],
        commit_message="End of training",
    )
