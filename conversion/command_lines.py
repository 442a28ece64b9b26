"""The command lines of the converters, apart from them: `--help` need not wait for PyTorch."""

import argparse


POSITION_INITS = ("expand", "interpolate-spatial", "interpolate-embedding", "random", "sinusoidal", "none")


def vim_parser():
    parser = argparse.ArgumentParser(
        prog="videomamba-convert vim",
        description="Convert a Vision Mamba image classifier into a VideoMamba to start video training from. "
        "Sizes are read from the checkpoint. Without --num-labels, --labels or --keep-head the result is a backbone.",
    )
    add_arguments(parser)
    add_inflation_arguments(
        parser,
        "first as in VideoMamba, middle, or where the checkpoint has it: in the middle in all that Vision Mamba has "
        "published (default: first; keep for one frame)",
    )
    return parser


def opengvlab_parser():
    parser = argparse.ArgumentParser(
        prog="videomamba-convert opengvlab",
        description="Convert one of OpenGVLab's VideoMamba checkpoints, with the same logits. Sizes, frames, "
        "resolution and labels are read from it; a file of masked pre-training becomes a backbone.",
    )
    add_arguments(parser)
    parser.add_argument(
        "--num-frames",
        type=positive,
        help="frames of a clip; another number than the checkpoint's interpolates in time",
    )
    return parser


def published_parser():
    parser = argparse.ArgumentParser(
        prog="videomamba-convert published",
        description="Convert a published file with its complete card: what it is, what its authors report, and how.",
    )
    add_arguments(parser)
    parser.add_argument("--list", action=_List, nargs=0, help="print the table of the published files")
    return parser


class _List(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        from .published_checkpoints import markdown_table

        print(markdown_table())
        parser.exit()


def image_parser():
    parser = argparse.ArgumentParser(
        prog="videomamba-convert image",
        description="Make a VideoMamba for clips out of one for images. Without --num-labels, --labels or --keep-head "
        "the result is a backbone.",
    )
    add_arguments(parser, "a folder of an image model, or repo_id")
    add_inflation_arguments(parser, "first, middle, or where the checkpoint has it (default: keep)")
    return parser


def positive(text):
    """A positive whole number."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def add_arguments(parser, source="a .pth, .pt, .bin or .safetensors file, or repo_id[:filename]"):
    """The options that all converters have; `source` is the help text of --checkpoint."""
    parser.add_argument("--checkpoint", required=True, metavar="SRC", help=source)
    parser.add_argument("--output", metavar="DIR", help="the folder to write; needed unless --dry-run")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier conversion in --output")
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help="label names: a line each, or .json; repo_id:filename of a data set; or kinetics-400 or imagenet-1k",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the table of tensors and write nothing")
    parser.add_argument("--push-to-hub", metavar="REPO", help="also upload the folder to this Hub repository")
    parser.add_argument("--private", action="store_true", help="make the Hub repository private if it is new")


def add_inflation_arguments(parser, class_token_help):
    """The options of the converters of image models."""
    parser.add_argument("--num-frames", type=positive, default=16, help="frames of a clip (default: %(default)s)")
    parser.add_argument("--tubelet-size", type=positive, help="frames of a tubelet (default: 2; 1 for one frame)")
    parser.add_argument("--image-size", type=positive, help="side of a frame in pixels (default: the checkpoint's)")
    parser.add_argument(
        "--position-init",
        choices=POSITION_INITS,
        default="expand",
        help="how the image's position embeddings become the clip's, see section 4.2 (default: %(default)s)",
    )
    parser.add_argument("--class-token-position", choices=("first", "middle", "keep"), help=class_token_help)
    heads = parser.add_mutually_exclusive_group()
    heads.add_argument("--num-labels", type=positive, help="make a fresh classifier of so many labels")
    heads.add_argument("--keep-head", action="store_true", help="keep the image classifier")
