"""Scripts to copy. Installed, some of them are console commands, each of which runs its script."""

import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType


def _run(script):
    """Runs a script as Python does, but under the name of the command: `runpy` would put the script's in its place."""
    script = Path(__file__).parent / script
    sys.path.insert(0, str(script.parent))  # scripts import one another by name
    module = sys.modules["__main__"] = ModuleType("__main__")
    module.__file__ = str(script)  # whence processes that are spawned take its classes
    SourceFileLoader("__main__", str(script)).exec_module(module)


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
