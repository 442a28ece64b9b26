"""transformers' own model tests, for the version of transformers that is installed.

The mixins by which transformers tests each of its models stand in its source distribution and not in its wheel.
`load` downloads that distribution once, with pip, into `tests/.cache`, and imports modules of its `tests`:

    (common,) = load("test_modeling_common")
    class MyModelTest(common.ModelTesterMixin, unittest.TestCase): ...

`python tests/transformers_sources.py` only downloads.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path
from unittest import mock


CACHE = Path(__file__).parent / ".cache"

# Modules that the tests import and the distribution leaves out, with what of them our tests use; any other name in
# them is an empty class. ("tests" is transformers' folder: it imports some of them by that absolute name.)
STAND_INS = {
    "fetch_hub_objects_for_ci": {"url_to_local_path": lambda url: url},
    "tests.exporters": {},
    "tests.generation": {},
    "tests.pipelines": {},
    "tests.utils": {
        # Values of the fields that every config has, each other than the field's default.
        "config_common_kwargs": {
            "architectures": ["SomeModel"],
            "chunk_size_feed_forward": 5,
            "dtype": "float16",
            "id2label": {0: "running", 1: "jumping", 2: "falling"},
            "is_encoder_decoder": True,
            "label2id": {"running": 0, "jumping": 1, "falling": 2},
            "output_attentions": True,
            "output_hidden_states": True,
            "problem_type": "regression",
            "return_dict": False,
        },
    },
}


class SourcesUnavailable(RuntimeError):
    """The source distribution of transformers could not be downloaded; the message says why and what to do."""


def fetch() -> Path:
    """Returns the `tests` folder of the installed version of transformers; downloads it if it is not in the cache."""
    version = importlib.metadata.version("transformers")
    folder = CACHE / f"transformers-{version}"
    if folder.is_dir():
        return folder / "tests"
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--retries", "1", "--dest", scratch]
        source = ["--no-deps", "--no-binary", "transformers", f"transformers=={version}"]
        done = subprocess.run(pip + source, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.strip()] or ["it printed nothing"]
            raise SourcesUnavailable(
                f"transformers' own tests could not be downloaded: pip says '{errors[-1].strip()}'. With a network, "
                "run `python tests/transformers_sources.py`."
            )
        (archive,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            members = [member for member in tar if "tests" in Path(member.name).parts[1:2]]
            tar.extractall(scratch, members, filter="data")
        (unpacked,) = Path(scratch).glob("*/tests")
        # The table of transformers' tiny models on the Hub, also left out: ours are made by the test.
        (unpacked / "utils").mkdir()
        (unpacked / "utils" / "tiny_model_summary.json").write_text("{}")
        try:
            unpacked.parent.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster
                raise
    return folder / "tests"


class _StandIn(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _StandInImporter(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if self._listed(name):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _StandIn(spec.name)

    def exec_module(self, module):
        vars(module).update(STAND_INS[self._listed(module.__name__)])

    def _listed(self, name):
        return next((known for known in STAND_INS if name == known or name.startswith(known + ".")), None)


def load(*names: str, **stand_ins: dict) -> list[types.ModuleType]:
    """Imports modules of transformers' tests, e.g. "test_modeling_common", as `tests.test_modeling_common`.

    Args:
        names: the modules.
        stand_ins: for a package of `STAND_INS`, by its last name, what its modules shall hold besides.
    Raises:
        SourcesUnavailable: they are not in the cache and cannot be downloaded.
    """
    package = types.ModuleType("tests")
    package.__path__ = [str(fetch())]
    sys.modules["tests"] = package
    sys.meta_path.append(_StandInImporter())
    for name, contents in stand_ins.items():
        STAND_INS[f"tests.{name}"].update(contents)
    # Some would load a second transformers, from the sources beside them, to look up its classes by name.
    with mock.patch("transformers.utils.direct_transformers_import", lambda path: sys.modules["transformers"]):
        return [importlib.import_module(f"tests.{name}") for name in names]


if __name__ == "__main__":
    try:
        print(fetch())
    except SourcesUnavailable as error:
        sys.exit(str(error))
