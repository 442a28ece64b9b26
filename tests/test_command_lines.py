"""What a script says before it works: its help, without waiting, and what is missing. Packages are hidden."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCRIPTS = sorted(
    str(path.relative_to(EXAMPLES))
    for folder in ("tools", "training")
    for path in (EXAMPLES / folder).glob("*.py")
    if "def main()" in path.read_text(encoding="utf-8")
)
EXTRAS = ["accelerate", "datasets", "evaluate", "matplotlib", "pandas", "peft", "pyarrow", "scenedetect", "sklearn"]
# What takes seconds to import. Those that show the flags of `TrainingArguments` need PyTorch for that.
SLOW = ["torchvision", "modeling_videomamba", "av", "numba"]
SHOW_TRAINING_ARGUMENTS = ["finetune", "run_image_classification", "run_video_classification"]

RUN = """
import runpy, sys
for name in sys.argv.pop(1).split():
    sys.modules[name] = None  # as if it were not installed
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""

pytestmark = pytest.mark.slow


def run(script, *arguments, hidden=(), folder=None):
    """Runs a script as Python does, without the packages `hidden`, and with those in `folder` before all others."""
    script = EXAMPLES / script
    paths = [str(path) for path in (folder, script.parent, EXAMPLES.parent) if path is not None]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", RUN, " ".join(hidden), str(script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("script", [*SCRIPTS, "made_clips/measure_camera_motion.py"])
def test_help_waits_for_nothing(script):
    quick = Path(script).stem not in SHOW_TRAINING_ARGUMENTS
    done = run(script, "--help", hidden=EXTRAS + SLOW + ["torch"] * quick)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {Path(script).name} ")
    assert quick or "--gradient_accumulation_steps" in done.stdout


@pytest.mark.parametrize("script", sorted(set(SCRIPTS) - {"tools/classify_video.py", "tools/tag_video.py"}))
def test_a_missing_extra_is_said_in_one_line(script):
    done = run(script, hidden=EXTRAS)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert any(name in line for name in EXTRAS) and " in a clone of videomamba-transformers." in line


@pytest.mark.parametrize("script", ["tools/classify_clips.py", "training/finetune.py"])
def test_a_broken_package_is_no_missing_extra(script, tmp_path):
    """torchvision for another PyTorch: it is there, but cannot be imported."""
    error = "Could not load this library: libtorchvision, which is for another PyTorch"
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(f"raise ImportError({error!r})")
    done = run(script, folder=tmp_path)
    assert done.returncode != 0 and error in done.stderr and "nstall the extra" not in done.stderr
