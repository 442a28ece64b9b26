"""`--model` of the tools: a folder, a Hub repository, or in a clone the checkpoint of camera motion."""

from pathlib import Path


CAMERA_MOTION = Path(__file__).resolve().parents[2] / "model_cards" / "videomamba-tiny-camera-motion"


def add_model(parser):
    """Adds `--model` to a parser; outside a clone it must be given."""
    shipped = CAMERA_MOTION.is_dir()
    text = "a folder or a Hub repository"
    text += " (default: the model of camera motion that ships here)" if shipped else ""
    default = str(CAMERA_MOTION) if shipped else None
    parser.add_argument("--model", default=default, required=not shipped, help=text)
