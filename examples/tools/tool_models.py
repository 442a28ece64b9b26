"""`--model` of the tools: a folder, a Hub repository, or in a clone the checkpoint of camera motion; its scores."""

from pathlib import Path


CAMERA_MOTION = Path(__file__).resolve().parents[2] / "model_cards" / "videomamba-tiny-camera-motion"
THRESHOLD = 0.5  # the least score of a label that holds, where several may


def add_model(parser):
    """Adds `--model` to a parser; outside a clone it must be given."""
    shipped = CAMERA_MOTION.is_dir()
    text = "a folder or a Hub repository"
    text += " (default: the model of camera motion that ships here)" if shipped else ""
    default = str(CAMERA_MOTION) if shipped else None
    parser.add_argument("--model", default=default, required=not shipped, help=text)


def gives_several(config):
    """Whether a model was trained on clips with several labels each: its scores do not sum to 1."""
    return config.problem_type == "multi_label_classification"


def to_scores(logits, config):
    """Of logits (..., num_labels): the probability of each label for itself, or of one among all."""
    return logits.float().sigmoid() if gives_several(config) else logits.float().softmax(-1)
