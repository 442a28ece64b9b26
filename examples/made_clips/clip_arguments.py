"""The command line of the generators of clips, apart from them: `--help` need not wait for PyTorch."""

import argparse
import os
from pathlib import Path


def parse_arguments(description, labels, held_out=0.0, storages=()):
    """
    Args:
        description (`str`): of the script; its first line is shown.
        labels (`tuple[str]`): the classes.
        held_out (`float`): default of `--held_out`.
        storages (`tuple[str]`): what `--storage` can be, the default first; without any there is no such flag.

    Returns:
        `argparse.Namespace`: what `clip_generation.make_data_set` takes.
    """
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("scenery", help="Folder of still images or videos, and its sub-folders.")
    parser.add_argument("output", type=Path, help="Folder of the data set; the clips go to OUTPUT/SPLIT/LABEL/.")
    parser.add_argument("--split", default="train", choices=["train", "validation", "test"])
    parser.add_argument(
        "--clips_per_label", type=int, default=100, help=f"There are {len(labels)} labels. (default: %(default)s)"
    )
    parser.add_argument("--drawn_fraction", type=float, default=0.0, help="Share of clips over drawn pictures.")
    parser.add_argument(
        "--held_out",
        type=float,
        default=held_out,
        help="Share of the pictures, chosen by name, that only the other splits than train show; 0 if each split "
        "has a folder of its own. (default: %(default)s)",
    )
    if storages:
        parser.add_argument("--storage", default=storages[0], choices=storages, help="Rates of the files.")
    parser.add_argument("--seed", type=int, default=0, help="The same seed makes the same clips.")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="Processes that make clips.")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="Keep existing clips and make the missing ones.")
    group.add_argument("--overwrite", action="store_true", help="Delete OUTPUT/SPLIT first.")
    arguments = parser.parse_args()
    if arguments.clips_per_label < 1 or arguments.num_workers < 1:
        parser.error("--clips_per_label and --num_workers must be at least 1.")
    if not 0 <= arguments.drawn_fraction <= 1 or not 0 <= arguments.held_out < 1:
        parser.error("--drawn_fraction must be from 0 to 1, --held_out from 0 to below 1.")
    return arguments
