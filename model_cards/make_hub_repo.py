#!/usr/bin/env python
"""Assembles the complete Hub repository of a checkpoint: the files of its folder here, and the code beside them.

    python model_cards/make_hub_repo.py videomamba-tiny-camera-motion output-folder --push-to-hub you/camera-motion

What it writes loads with `trust_remote_code=True` where this package is not installed, wherever it is copied.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("card", help="a folder of model_cards/, by name")
    parser.add_argument("output", help="the folder to write")
    parser.add_argument("--push-to-hub", metavar="REPO", help="also upload it to this Hub repository")
    parser.add_argument("--private", action="store_true", help="make the Hub repository private if it is new")
    return parser.parse_args()


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    parse_arguments()  # before the imports below, which take seconds

from huggingface_hub import HfApi
from transformers.dynamic_module_utils import get_relative_import_files

import modeling_videomamba


CARDS = Path(__file__).resolve().parent
PACKAGE = Path(modeling_videomamba.__file__).parent


def find_code(folder):
    """The package's modules that an `auto_map` in the folder reaches, followed as transformers does."""
    reached = set()
    for path in folder.glob("*.json"):
        for name in json.loads(path.read_text(encoding="utf-8")).get("auto_map", {}).values():
            module = PACKAGE / f"{name.partition('.')[0]}.py"
            reached |= {module, *map(Path, get_relative_import_files(module))}
    return sorted(reached)


def assemble(card, output):
    """
    Write the repository.

    Args:
        card (`str`): the name of a folder in `model_cards/`, or the path of one like them.
        output (`str` or `Path`): a folder that does not exist yet, or is empty.

    Returns:
        `list[str]`: the names of the files.

    Raises:
        ValueError: if there is no such card, or something is in `output`.
    """
    folder, output = CARDS / card, Path(output)
    if not (folder / "config.json").is_file():
        known = ", ".join(sorted(path.parent.name for path in CARDS.glob("*/config.json")))
        raise ValueError(f"{card!r} is no checkpoint folder (it has no config.json). Here are: {known}.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder. Name another one.")
    code = find_code(folder)
    if not code:
        raise ValueError(f"No JSON file in {folder} has an `auto_map`, so it is unclear which code belongs to it.")
    output.mkdir(parents=True, exist_ok=True)
    files = [path for path in folder.iterdir() if path.is_file()] + code
    for path in files:
        shutil.copyfile(path, output / path.name)
    return sorted(path.name for path in files)


def main():
    arguments = parse_arguments()
    try:
        files = assemble(arguments.card, arguments.output)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"Wrote {arguments.output}: {', '.join(files)}")
    if arguments.push_to_hub:
        api = HfApi()
        try:
            repo_id = api.create_repo(arguments.push_to_hub, private=arguments.private or None, exist_ok=True).repo_id
            url = api.upload_folder(repo_id=repo_id, folder_path=arguments.output, allow_patterns=files)
        except Exception as error:  # no network, no token, no access: each has its own class
            sys.exit(f"error: {arguments.output} is written, but not pushed: {error}")
        print(f"Pushed to {url}")


if __name__ == "__main__":
    main()
