"""What `pip install` puts where: the sdist, the wheel made of it, and its console commands."""

import ast
import graphlib
import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import modeling_videomamba


ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ["modeling_videomamba", "conversion", "examples", "model_cards", "csrc"]
BUILD = "from setuptools import build_meta; import sys; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def build(what, source, output):
    command = [sys.executable, "-c", BUILD, f"build_{what}", str(output)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return output / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel that is built from the sdist, unpacked as pip does it. The checkout itself is not touched."""
    folder = tmp_path_factory.mktemp("packaging")
    ignore = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, folder / "checkout", ignore=ignore)
    with tarfile.open(build("sdist", folder / "checkout", folder)) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    assert {"csrc", "docs", "examples", "model_cards", "tests", "CHANGELOG.md"} <= {p.name for p in source.iterdir()}
    with zipfile.ZipFile(build("wheel", source, folder)) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_nothing_of_a_generic_name_is_installed(installed):
    names = {path.name for path in installed.iterdir() if path.suffix != ".dist-info"}
    assert names == {"modeling_videomamba", "videomamba_conversion", "videomamba_examples"}
    for installed_name, folder in (
        ("modeling_videomamba", "modeling_videomamba"),
        ("videomamba_conversion", "conversion"),
        ("videomamba_examples/tools", "examples/tools"),
        ("videomamba_examples/training", "examples/training"),
    ):
        expected = {path.name for path in (ROOT / folder).glob("*.py")}
        assert {path.name for path in (installed / installed_name).iterdir()} == expected
    assert {path.name for path in (installed / "videomamba_examples").iterdir()} == {
        "__init__.py",
        "tools",
        "training",
    }


def test_one_version():
    changelog = re.search(r"^## ([\d.]+) ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    citation = re.search(r"^version: (\S+)", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1]
    assert modeling_videomamba.__version__ == changelog == citation


@pytest.fixture
def code(installed):
    """Python code that does what a console command of the wheel does, after some `first` lines."""
    (metadata,) = installed.glob("*.dist-info")
    scripts = importlib.metadata.PathDistribution(metadata).entry_points

    def code(name, *first):
        (script,) = scripts.select(group="console_scripts", name=name)
        lines = ["import multiprocessing, sys", f"sys.argv[0] = {name!r}", "if __name__ == '__main__':"]
        last = [f"from {script.module} import {script.attr} as run", "sys.exit(run())"]
        return "\n".join(lines) + "\n  " + "\n  ".join([*first, *last])

    return code


# numba would compile for this copy of the code.
BACKEND = {"VIDEOMAMBA_SCAN_BACKEND": "torch"}


@pytest.fixture
def run(code, installed, tmp_path):
    """Runs a console command of the wheel from an empty folder, where the checkout cannot be imported."""

    def run(name, *arguments, first=()):
        command = [sys.executable, "-c", code(name, *first), *map(str, arguments)]
        environment = {**os.environ, **BACKEND, "PYTHONPATH": str(installed)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250)

    return run


def test_classify(code, installed, python, tmp_path):
    model = ROOT / "model_cards" / "videomamba-tiny-camera-motion"
    clip = ROOT / "examples" / "tools" / "space" / "examples" / "pan-right.mp4"
    command = ["-c", code("videomamba-classify"), clip, "--model", model, "--top_k", "1"]
    printed = python.run(command, tmp_path, [installed], BACKEND)
    assert re.search(r"pan-right.mp4 .*\n +\d+\.\d% +pan right$", printed.strip()), printed


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, option",
    [
        ("classify", "--top_k"),
        ("classify-clips", "--part_size"),
        ("evaluate", "--num_crops"),
        ("finetune", "--validation_fraction"),
        ("tag", "--overlay"),
    ],
)
def test_help_names_the_command(run, command, option):
    """Without the packages of the extras."""
    hidden = [f"sys.modules[{name!r}] = None" for name in ("accelerate", "datasets", "evaluate", "matplotlib", "peft")]
    done = run(f"videomamba-{command}", "--help", first=hidden)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: videomamba-{command} ") and option in done.stdout


@pytest.mark.slow
def test_workers_of_a_command_that_are_spawned_find_its_classes(run, bars, tmp_path):
    """As on Windows and macOS: they import the script anew, from its file."""
    model = ROOT / "model_cards" / "videomamba-tiny-camera-motion"
    arguments = [bars / "validation", "--model", model, "--output", tmp_path / "scores", "--num_workers", 1]
    done = run("videomamba-classify-clips", *arguments, first=["multiprocessing.set_start_method('spawn')"])
    assert done.returncode == 0 and "4 clips; 0 could not be read" in done.stdout, done.stderr


def test_convert(run, installed, monkeypatch):
    done = run("videomamba-convert")
    assert done.returncode == 1 and "opengvlab" in done.stdout and "no family was named" in done.stderr
    monkeypatch.syspath_prepend(installed)
    command = importlib.import_module("videomamba_conversion.__main__")
    for family in command.FAMILIES:
        monkeypatch.setattr(sys, "argv", ["videomamba-convert", family, "--checkpoint", "none.pth", "--dry-run"])
        with pytest.raises(SystemExit, match="^error: .*none.pth"):
            command.main()


def parsed(folder):
    """The Python files in a folder of the repository, and their syntax trees."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


# The parts of the package, and what each may import besides itself. A module belongs to the first pattern that fits.
PARTS = {
    r"forked_process": ("process", set()),
    r"selective_scan.*|rms_norm.*": ("scan", {"process"}),
    r"(frames|image_processing|video_processing)_videomamba": ("processors", {"decoder"}),
    r".*_videomamba|context_parallel": ("model", {"scan"}),
    r"video_.*|clip_loading": ("decoder", {"process"}),
    r"__init__": ("package", {"scan", "processors", "model", "decoder"}),
}


def imports_of_package():
    """For each module the modules that it imports anywhere, within functions too."""
    graph = {}
    for path, tree in parsed("modeling_videomamba"):
        graph[path.stem] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert not [name for name in node.names if name.name.startswith("modeling_videomamba")], path
            elif isinstance(node, ast.ImportFrom) and node.level:
                graph[path.stem] |= {node.module} if node.module else {name.name for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.module.startswith("modeling_videomamba"), path
    return graph


def test_imports_of_the_package_make_no_circle():
    order = list(graphlib.TopologicalSorter(imports_of_package()).static_order())  # or a CycleError with the circle
    assert order[-1] == "__init__" and "modeling_videomamba" in order


def test_dependence_runs_one_way():
    """The scan and the decoder know nothing of the model, the model nothing of the processors."""

    def part(module):
        return next(found for pattern, found in PARTS.items() if re.fullmatch(pattern, module))

    for module, imported in imports_of_package().items():
        own, below = part(module)
        assert {part(name)[0] for name in imported} <= {own} | below, module


@pytest.mark.parametrize("module", sorted(path.stem for path in (ROOT / "modeling_videomamba").glob("*.py")))
def test_no_module_is_too_long_to_read(module):
    if module == "selective_scan_cuda_source":
        pytest.skip("written by csrc/embed.py")
    lines = (ROOT / "modeling_videomamba" / f"{module}.py").read_text(encoding="utf-8").count("\n")
    assert lines <= (700 if module == "modeling_videomamba" else 800)


def test_every_module_stands_in_the_layout():
    layout = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    (backends,) = re.findall(r"selective_scan_<backend>.py .*?: (.*)", layout)
    named = set(re.findall(r"^    (\w+\.py) ", layout, re.MULTILINE))
    named |= {f"selective_scan_{backend}.py" for backend in backends.split(", ")}
    assert named == {path.name for path in (ROOT / "modeling_videomamba").glob("*.py")}


def test_messages_are_ascii():
    """So that they can be typed into a search: `224 x 224`."""
    for path, tree in parsed("modeling_videomamba"):
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                assert node.name.isascii(), f"{path}:{node.lineno}"
            # What is raised and what is logged.
            is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if isinstance(node, ast.Raise) or (
                is_call and node.func.attr in ("error", "info", "warning", "warning_once")
            ):
                texts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
                assert all(text.isascii() for text in texts if isinstance(text, str)), f"{path}:{node.lineno}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_module_uses_underscored_names_of_another(folder):
    ours = {path.stem for path in (ROOT / folder).rglob("*.py")} | {"modeling_videomamba", "conversion"}
    for path, tree in parsed(folder):
        modules = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.level or node.module.split(".")[0] in ours):
                assert not [name.name for name in node.names if re.match("_[^_]", name.name)], path
                modules |= {name.asname or name.name for name in node.names if name.name in ours}
            elif isinstance(node, ast.Import):
                modules |= {name.asname or name.name for name in node.names if name.name.split(".")[0] in ours}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                assert not re.match("_[^_]", node.attr), f"{path}: {node.value.id}.{node.attr}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_that_windows_lacks(folder):
    """Its modules, calls and signals; and text files have an encoding, which there is not UTF-8 by default."""
    calls = {"fork", "symlink", "symlink_to", "mkfifo", "alarm", "getuid"}
    signals = {"SIGKILL", "SIGALRM", "SIGUSR1", "SIGHUP"}
    modules = {"fcntl", "grp", "pwd", "resource", "termios"}
    for path, tree in parsed(folder):
        if path.name == "benchmark_decoding.py":  # measures peak memory by a module of Unix, and says so
            continue
        for node in ast.walk(tree):
            place = f"{path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                assert not modules & {name.name for name in node.names}, place
            elif isinstance(node, ast.Attribute):
                assert node.attr not in signals | calls, place
            elif isinstance(node, ast.Call) and "encoding" not in {keyword.arg for keyword in node.keywords}:
                if isinstance(node.func, ast.Name) and node.func.id == "open":
                    assert "b" in ast.literal_eval(node.args[1]), place
                elif isinstance(node.func, ast.Attribute):
                    # Another `read_text`, which takes arguments, is importlib's.
                    assert node.func.attr != "write_text" and (node.func.attr != "read_text" or node.args), place
