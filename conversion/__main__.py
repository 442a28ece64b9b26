"""All converters as one command: `videomamba-convert FAMILY`, or `python -m conversion FAMILY` in a checkout."""

import importlib
import sys


FAMILIES = {
    "vim": ("convert_vim_to_videomamba", "Vision Mamba's image classifiers"),
    "opengvlab": ("convert_opengvlab_to_videomamba", "OpenGVLab's VideoMamba classifiers and backbones"),
    "published": ("published_checkpoints", "a published file of either, with its authors' figures in the card"),
    "image": ("inflate_image_model", "an image VideoMamba, to be inflated to a video one"),
}


def main():
    family, *options = sys.argv[1:] or [""]
    if family in FAMILIES:
        return importlib.import_module(f".{FAMILIES[family][0]}", __package__).main(options)
    lines = [f"  {name:10} {what}" for name, (_, what) in FAMILIES.items()]
    print("\n".join(["usage: videomamba-convert FAMILY [options]; FAMILY --help lists them", *lines]))
    if family in ("-h", "--help"):
        return
    sys.exit(f"error: expected a family, got {family!r}." if family else "error: no family was named.")


if __name__ == "__main__":
    main()
