"""Scripts to copy. Installed, some of them are console commands, each of which runs its script."""

import runpy
import sys
from pathlib import Path


def _run(script):
    script = Path(__file__).parent / script
    sys.path.insert(0, str(script.parent))  # as Python does for a script: they import one another by name
    try:
        runpy.run_path(str(script), run_name="__main__")
    except ModuleNotFoundError as error:
        sys.exit(f"{error}. Install what this command uses: pip install 'videomamba-transformers[tools,train]'.")


def classify():
    _run("tools/classify_video.py")


def classify_clips():
    _run("tools/classify_clips.py")


def evaluate():
    _run("training/evaluate_video_classification.py")


def finetune():
    _run("training/finetune.py")


def tag():
    _run("tools/tag_video.py")
