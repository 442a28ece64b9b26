"""The flags that the training and evaluation scripts share. Nothing here takes seconds to import."""

import argparse
import importlib.util
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser


EXTRA = ("accelerate", "datasets", "evaluate", "matplotlib", "pandas")  # what every training script imports


@dataclass
class DataArguments:
    """Which clips, and how they are augmented in training."""

    _argument_group_name = "the clips"

    train_dir: str | None = field(default=None, metadata={"help": "Folder of training clips, a sub-folder per label."})
    validation_dir: str | None = field(default=None, metadata={"help": "The same for validation."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Instead of folders: a data set of the Hub with a video and a label column."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Which configuration of that data set."})
    train_split: str = field(default="train", metadata={"help": "Name of its split to train on."})
    validation_split: str = field(default="validation", metadata={"help": "Name of its split to evaluate on."})
    streaming: bool = field(
        default=False, metadata={"help": "Stream the data set instead of downloading it; needs --max_steps."}
    )
    train_list: str | None = field(
        default=None,
        metadata={
            "help": "Instead of folders: an annotation file of Kinetics (CSV), Something-Something V2 or COIN (JSON), "
            "HMDB51's folder of split files, OpenGVLab's lists of Breakfast, COIN and LVU, Charades' CSV file, or a "
            "CSV file with the columns video and label, or video and labels: several, between semicolons."
        },
    )
    validation_list: str | None = field(default=None, metadata={"help": "The same for validation."})
    video_root: str | None = field(default=None, metadata={"help": "The folder that holds the clips of the lists."})
    label_list: str | None = field(
        default=None, metadata={"help": "File with a label name per line, for lists that hold numbers."}
    )
    list_columns: str | None = field(
        default=None,
        metadata={
            "help": "What stands in the columns of lists without a header, if there are more than a path and a label: "
            "'path,label,seconds', for example, or 'path,labels'. What is neither path nor label is not used."
        },
    )
    hmdb51_split: int = field(default=1, metadata={"help": "Which of HMDB51's three splits: 1, 2 or 3."})
    video_column: str = field(default="video", metadata={"help": "Column of the data set that holds the videos."})
    label_column: str = field(
        default="label", metadata={"help": "Column of the data set that holds the labels, or lists of them."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use this many clips, drawn at random."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use this many clips, drawn at random."})
    max_decode_failures: int = field(
        default=0,
        metadata={"help": "Skip and list up to this many clips that cannot be read; one more stops the run."},
    )
    allow_missing_classes: bool = field(
        default=False, metadata={"help": "Train although some classes have no validation clip."}
    )
    frame_cache: str | None = field(
        default=None,
        metadata={"help": "Keep decoded training frames in this folder, so that later epochs need not decode again."},
    )
    min_crop_area: float = field(
        default=0.5, metadata={"help": "Training frames are random crops of at least this share of the area."}
    )
    jitter: float = field(default=0.2, metadata={"help": "Largest change of brightness and contrast in training."})
    repeat_frames: float = field(
        default=0.0,
        metadata={
            "help": "Share of the training clips that repeat frames, as if filmed at fewer frames a second, down to "
            "a quarter, and stored at as many as before."
        },
    )
    rand_augment: int = field(default=0, metadata={"help": "RandAugment operations per training clip."})
    rand_augment_magnitude: int = field(default=9, metadata={"help": "Magnitude of these operations: 0 to 30."})
    random_erasing: float = field(
        default=0.0, metadata={"help": "Share of the training clips in which a rectangle is blanked in all frames."}
    )
    mirror_swaps: str | None = field(
        default=None,
        metadata={
            "help": "Mirror half the training clips, left to right. These labels swap, and evaluation is "
            "repeated on mirrored clips: 'pan left:pan right,turn left:turn right'; '' if a mirror changes no label."
        },
    )
    reversal_swaps: str | None = field(
        default=None, metadata={"help": "The same for clips played backwards: 'open the door:close the door'."}
    )


@dataclass
class ModelArguments:
    """Which model: a trained one, or the size of a new VideoMamba."""

    _argument_group_name = "the model"

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub repository to start from; a new VideoMamba if left out."}
    )
    config_name: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub repository with the config.json of another video classifier, to train it from "
            "scratch on the same frames; its weights, if there are any, are not read."
        },
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that comes with that repository."})
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Give the model a new head if the clips have other labels."}
    )
    hidden_size: int | None = field(default=None, metadata={"help": "Width of a new model (384)."})
    num_hidden_layers: int | None = field(default=None, metadata={"help": "Layers of a new model (24)."})
    num_frames: int | None = field(
        default=None, metadata={"help": "Frames per clip (default: the model's, or 16 for a new one)."}
    )
    frame_stride: int | None = field(
        default=None,
        metadata={
            "help": "Distance between sampled frames (default: the model's, or 2 for a new one); 0 spreads the frames "
            "over the whole clip."
        },
    )
    sampling_fps: float | None = field(
        default=None,
        metadata={
            "help": "So many frames a second are read around the middle, by the times at which they are shown; takes "
            "the place of --frame_stride."
        },
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "Height and width of the frames in pixels (default: the model's, or 224 for a new one)."},
    )
    class_token_position: str = field(default="first", metadata={"help": "first, middle or none, for a new model."})
    drop_path_rate: float | None = field(
        default=None,
        metadata={"help": "Stochastic depth in training (default: the model's; 0 for a new model)."},
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "Any other fields of the model's config: 'backward_scan=spatial,position_embedding_type=none'."
        },
    )
    lora_rank: int = field(
        default=0, metadata={"help": "Train LoRA adapters of this rank on the projections, and the head; needs peft."}
    )
    layer_decay: float = field(
        default=1.0, metadata={"help": "Learning rate of a layer as a share of the next layer's."}
    )


def parse_arguments(*kinds, **defaults):
    """The command line as objects of the given dataclasses; of two values, a flag goes before a recipe."""
    option = {
        "metavar": "FILE",
        "help": "A file of flags, such as those in recipes/; # begins a comment.",
    }
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--recipe", **option)
    recipe, flags = early.parse_known_args()
    if recipe.recipe is not None:
        flags = shlex.split(Path(recipe.recipe).read_text(encoding="utf-8"), comments=True) + flags
    parser = HfArgumentParser(kinds)
    parser.set_defaults(**defaults)
    parser.add_argument("--recipe", **option)  # for --help
    return parser.parse_args_into_dataclasses(flags)[: len(kinds)]


def check_command_line(*kinds):
    """Answers `--help`, or names the packages that are missing: before a script imports what takes seconds."""
    if {"-h", "--help"} & set(sys.argv):
        parse_arguments(*kinds)
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"This script needs {', '.join(missing)}. Install the extra `train`: pip install '.[train]' in a clone of "
            "videomamba-transformers."
        )
