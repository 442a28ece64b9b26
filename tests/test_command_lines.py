"""What a script says before it works: its help, without waiting, and what is missing. Packages are hidden."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
# Whatever can be run.
ALL_SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("conversion", "csrc", "docs", "examples", "model_cards")
    for path in (ROOT / folder).rglob("*.py")
    if '\nif __name__ == "__main__":\n' in path.read_text(encoding="utf-8")
)
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("tools", "training")
    for path in (EXAMPLES / folder).glob("*.py")
    if "def main()" in path.read_text(encoding="utf-8")
)
EXTRAS = ["accelerate", "datasets", "evaluate", "matplotlib", "pandas", "peft", "pyarrow", "scenedetect", "sklearn"]
EXTRAS += ["gradio", "onnxruntime"]
# What takes seconds to import. Those that show the flags of `TrainingArguments` need PyTorch for that.
SLOW = ["torchvision", "modeling_videomamba", "av", "numba"]
SHOW_TRAINING_ARGUMENTS = ["finetune", "run_image_classification", "run_video_classification"]
NEED_NO_EXTRA = {"examples/tools/classify_video.py", "examples/tools/tag_video.py"}
# The command of a folder, where help names that and not the script.
COMMANDS = {"conversion": "videomamba-convert"}

RUN = """
import runpy, sys
for name in sys.argv.pop(1).split():
    sys.modules[name] = None  # as if it were not installed
sys.argv.pop(0)
if sys.argv[0].startswith("conversion"):
    runpy.run_module(sys.argv[0].removesuffix(".py").replace("/", "."), run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""

pytestmark = pytest.mark.slow


def run(script, *arguments, hidden=(), folder=None):
    """Runs a script as Python does, without the packages `hidden`, and with those in `folder` before all others."""
    paths = [str(path) for path in (folder, (ROOT / script).parent, ROOT) if path is not None]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", RUN, " ".join(hidden), script, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("script", ALL_SCRIPTS)
def test_help_waits_for_nothing(script, tmp_path):
    """What takes seconds to import is hidden, or there but not to be imported."""
    (tmp_path / "peft.py").write_text("raise SystemExit('peft is imported')")
    quick = Path(script).stem not in SHOW_TRAINING_ARGUMENTS
    hidden = {*EXTRAS, *SLOW, *["torch"] * quick} - {"peft"}
    done = run(script, "--help", hidden=hidden, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {COMMANDS.get(Path(script).parent.name, Path(script).name)} ")
    assert quick or "--gradient_accumulation_steps" in done.stdout


@pytest.mark.parametrize("family", ["image", "opengvlab", "published", "vim"])
def test_help_of_a_converter_waits_for_nothing(family):
    done = run("conversion/__main__.py", family, "--help", hidden=[*SLOW, "torch", "transformers", "huggingface_hub"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: videomamba-convert {family} ") and "--checkpoint SRC" in done.stdout


@pytest.mark.parametrize("script", sorted(set(SCRIPTS) - NEED_NO_EXTRA))
def test_a_missing_extra_is_said_in_one_line(script):
    done = run(script, hidden=EXTRAS)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert any(name in line for name in EXTRAS) and " in a clone of videomamba-transformers." in line


@pytest.mark.parametrize("script", ["examples/tools/classify_clips.py", "examples/training/finetune.py"])
def test_a_broken_package_is_no_missing_extra(script, tmp_path):
    """torchvision for another PyTorch: it is there, but cannot be imported."""
    error = "Could not load this library: libtorchvision, which is for another PyTorch"
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(f"raise ImportError({error!r})")
    done = run(script, folder=tmp_path)
    assert done.returncode != 0 and error in done.stderr and "nstall the extra" not in done.stderr
