"""Scripts to copy. Installed, some of them are console commands, each of which runs its script."""

import runpy
import sys
from pathlib import Path


def _run(script):
    folder = str(Path(__file__).parent)
    sys.path.insert(0, folder)  # as Python does for a script: they import one another by name
    try:
        runpy.run_path(f"{folder}/{script}", run_name="__main__")
    except ModuleNotFoundError as error:
        sys.exit(f"{error}. Install what this command uses: pip install 'videomamba-transformers[tools,train]'.")


def classify():
    _run("classify_video.py")


def classify_clips():
    _run("classify_clips.py")


def evaluate():
    _run("evaluate_video_classification.py")


def tag():
    _run("tag_video.py")
