"""All converters as one command: `videomamba-convert FAMILY`, or `python -m conversion FAMILY` in a checkout."""

import importlib
import sys

from . import command_lines


FAMILIES = {
    "vim": ("convert_vim_to_videomamba", command_lines.vim_parser, "Vision Mamba's image classifiers"),
    "opengvlab": (
        "convert_opengvlab_to_videomamba",
        command_lines.opengvlab_parser,
        "OpenGVLab's VideoMamba classifiers and backbones",
    ),
    "published": (
        "published_checkpoints",
        command_lines.published_parser,
        "a published file of either, with its authors' figures in the card",
    ),
    "image": ("inflate_image_model", command_lines.image_parser, "an image VideoMamba, to be inflated to a video one"),
}


def main():
    family, *options = sys.argv[1:] or [""]
    if family in FAMILIES:
        module, parser, _ = FAMILIES[family]
        if {"-h", "--help"} & set(options):
            parser().parse_args(options)  # before the import below, which takes seconds
        return importlib.import_module(f".{module}", __package__).main(options)
    lines = [f"  {name:10} {what}" for name, (_, _, what) in FAMILIES.items()]
    print("\n".join(["usage: videomamba-convert FAMILY [options]; FAMILY --help lists them", *lines]))
    if family in ("-h", "--help"):
        return
    sys.exit(f"error: expected a family, got {family!r}." if family else "error: no family was named.")


if __name__ == "__main__":
    main()
