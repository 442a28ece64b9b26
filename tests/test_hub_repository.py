"""The shipped checkpoint as a Hub repository that carries its code: assembled, copied elsewhere, loaded, pushed."""

import collections
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModelForVideoClassification, AutoVideoProcessor, pipeline
from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_imports

import make_camera_motion_clips as clips
import make_hub_repo
import modeling_videomamba
from hub_server import HubServer


CARD = "videomamba-tiny-camera-motion"
STREAM = "videomamba-tiny-camera-stream"
FOLDER = Path(make_hub_repo.__file__).parent / CARD
PACKAGE = Path(modeling_videomamba.__file__).parent
# Everything travels but the registration with the Auto classes and the loader of many files.
MODULES = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "clip_loading.py"}
MODEL_MODULES = {name for name in MODULES if not re.match("(image|video)_|frames_", name)}

# What a user would have to explain away if it stood in the output.
UNWANTED = re.compile("warn|deprecat|not supported|not available|falling back|error|backward compat", re.IGNORECASE)

# Runs a pipeline in a process in which `import modeling_videomamba` fails.
WITHOUT_THE_PACKAGE = """
import importlib, json, sys
from pathlib import Path

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "modeling_videomamba":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import huggingface_hub.constants
import torch
from transformers import AutoModel, pipeline

huggingface_hub.constants.HF_HUB_OFFLINE = True
folder, output, *videos = sys.argv[1:]
classify = pipeline("video-classification", model=folder, trust_remote_code=True)
results = classify(videos, top_k=9)
backbone = AutoModel.from_pretrained(folder, trust_remote_code=True)
pixel_values = torch.zeros(1, 16, 3, 112, 112)
assert len(backbone.delta_maps(pixel_values).maps) == backbone.config.num_hidden_layers
assert classify.model.reading_maps(pixel_values).shape == (1, *backbone.config.grid_size)
classify.model.save_pretrained(output)
modules = set()
for object in (classify.model, classify.model.config, classify.video_processor, classify.image_processor):
    if object is not classify.model:
        object.save_pretrained(output)
    package = sys.modules[type(object).__module__].__package__
    for path in Path(sys.modules[type(object).__module__].__file__).parent.glob("*.py"):
        if path.stem != "__init__":
            importlib.import_module(f"{package}.{path.stem}")
            modules.add(path.name)
print(json.dumps([results, sorted(modules)]))
"""


def make(*arguments):
    """Runs the script as `make hub-repo` does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [make_hub_repo.__file__, *map(str, arguments)])
        make_hub_repo.main()


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """Assembled, zipped, and unpacked in another place."""
    folder = tmp_path_factory.mktemp("assembled")
    make(CARD, folder / "here")
    archive = shutil.make_archive(folder / "packed", "zip", folder / "here")
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "camera-motion"
    shutil.unpack_archive(archive, elsewhere)
    shutil.rmtree(folder)
    return elsewhere


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for motion in ("pan left", "zoom in"):
        clips.write_demo_clip(folder / f"{motion}.mp4", motion=motion, seed=3)
    return [str(path) for path in sorted(folder.iterdir())]


@pytest.mark.parametrize(
    "labels, loss_of", [([[0.5]], F.mse_loss), ([[1.0, 0.0, 1.0]], F.binary_cross_entropy_with_logits)]
)
def test_the_shipped_model_can_be_trained_for_other_kinds_of_labels(labels, loss_of):
    """A kind of problem is not shipped with it."""
    assert "problem_type" not in json.loads((FOLDER / "config.json").read_text())
    labels, sizes = torch.tensor(labels), {"num_frames": 2, "image_size": 32}
    model = AutoModelForVideoClassification.from_pretrained(
        FOLDER, num_labels=labels.shape[1], ignore_mismatched_sizes=True, **sizes
    )
    outputs = model(torch.zeros(1, 2, 3, 32, 32), labels=labels)
    torch.testing.assert_close(outputs.loss, loss_of(outputs.logits, labels))


@pytest.mark.parametrize("card", [CARD, STREAM])
def test_the_folder_in_git_has_no_code_and_no_links(card):
    folder = FOLDER.parent / card
    assert not [path.name for path in folder.iterdir() if path.is_symlink() or path.suffix == ".py"]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 16e6
    config = json.loads((folder / "config.json").read_text())
    assert sorted(config["label2id"]) == sorted(clips.LABELS)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_what_may_be_absent_is_imported_inside_try(module):
    """transformers refuses remote code with an import, outside of `try`, that is not installed."""
    allowed = {"PIL", "huggingface_hub", "numpy", "torch", "torchvision", "transformers"}
    assert set(get_imports(PACKAGE / module)) - set(sys.stdlib_module_names) <= allowed


def test_it_holds_the_folder_and_all_modules(repository):
    files = {path.name: path.read_bytes() for path in repository.iterdir()}
    assert files == {
        **{path.name: path.read_bytes() for path in FOLDER.iterdir()},
        **{name: (PACKAGE / name).read_bytes() for name in MODULES},
    }


def test_it_loads_offline_where_the_package_is_not_installed(repository, videos, python, tmp_path):
    """And what is saved there carries the code on."""
    output = tmp_path / "saved again"
    # numba would compile for this copy of the code.
    command, backend = ["-c", WITHOUT_THE_PACKAGE, repository, output, *videos], {"VIDEOMAMBA_SCAN_BACKEND": "torch"}
    *printed, last = python.run(command, tmp_path, environment=backend).splitlines()
    results, modules = json.loads(last)
    assert set(modules) == MODULES
    local = pipeline("video-classification", model=str(FOLDER))
    for path, found in zip(videos, results, strict=True):
        assert found[0]["label"] == Path(path).stem
        expected = {entry["label"]: entry["score"] for entry in local(path, top_k=9)}
        assert {entry["label"]: entry["score"] for entry in found} == pytest.approx(expected, abs=1e-5)
    # torchao, where it is installed, is imported by transformers, and PyTorch warns of it.
    usual = ("Loading weights", "torch/utils/_pytree.py")
    noise = "\n".join(line for line in printed if not any(words in line for words in usual))
    assert not UNWANTED.search(noise), noise
    assert {path.name for path in output.glob("*.py")} == MODULES


def test_copies_of_the_code_in_one_process(repository, tmp_path, monkeypatch):
    """The package and two repositories: each registers operators, and keeps working after the others were loaded."""
    monkeypatch.setenv("VIDEOMAMBA_SCAN_BACKEND", "torch")  # numba would compile for each copy
    shutil.copytree(repository, tmp_path / "another")
    # (The Auto classes would prefer the installed package to a folder's code.)
    name = "modeling_videomamba.VideoMambaForVideoClassification"
    remote = [get_class_from_dynamic_module(name, folder) for folder in (repository, tmp_path / "another")]
    classes = [AutoModelForVideoClassification, *remote]
    models = [model_class.from_pretrained(repository) for model_class in classes]
    assert len({type(model) for model in models}) == 3
    pixels = torch.randn(1, 4, 3, 32, 32)
    expected = models[0](pixels, interpolate_pos_encoding=True).logits
    for model in models + models:
        logits = model(pixels, interpolate_pos_encoding=True).logits
        logits.sum().backward()
        torch.testing.assert_close(logits, expected)
    operators = collections.defaultdict(set)
    for operator in torch._C._dispatch_get_all_op_names():
        namespace, _, name = operator.partition("::")
        operators[namespace].add(name)
    spaces = {name.__module__.rpartition(".")[0].replace(".", "_") for name in remote}
    assert all(operators[space] == operators["videomamba"] for space in spaces)


def test_the_streaming_checkpoint_streams_with_the_code_that_it_brings(videos, tmp_path, monkeypatch):
    monkeypatch.setenv("VIDEOMAMBA_SCAN_BACKEND", "torch")
    make(STREAM, tmp_path / "stream")
    code = "modeling_videomamba.VideoMambaForVideoFrameClassification"
    model = get_class_from_dynamic_module(code, tmp_path / "stream").from_pretrained(tmp_path / "stream").eval()
    processor = AutoVideoProcessor.from_pretrained(tmp_path / "stream")
    for path in videos:
        frames, cache = processor(path, return_tensors="pt")["pixel_values"], None
        for step in frames.split(2, dim=1):
            with torch.no_grad():
                output = model(step, cache=cache, use_cache=True)
            cache = output.cache
        assert model.config.id2label[output.logits[0, -1].argmax().item()] == Path(path).stem
    answers = pipeline("video-classification", model=str(FOLDER.parent / STREAM))(videos, top_k=1)
    assert [answer[0]["label"] for answer in answers] == [Path(path).stem for path in videos]


@pytest.mark.parametrize("name", ["my classifier", "model (1)", "lr=1e-4", "modèle", "2nd.model"])
def test_folders_of_any_name(repository, tmp_path, monkeypatch, name):
    """As `--output_dir "out two"` makes them. Names of operators are letters, digits and underscores."""
    monkeypatch.setenv("VIDEOMAMBA_SCAN_BACKEND", "torch")  # numba would compile for each copy
    shutil.copytree(repository, tmp_path / name)
    code = "modeling_videomamba.VideoMambaForVideoClassification"
    model = get_class_from_dynamic_module(code, tmp_path / name).from_pretrained(tmp_path / name)
    pixels = torch.randn(1, 4, 3, 32, 32)
    expected = AutoModelForVideoClassification.from_pretrained(repository)
    torch.testing.assert_close(
        *(classifier(pixels, interpolate_pos_encoding=True).logits for classifier in (model, expected))
    )


def test_a_backbone_saved_alone_brings_its_code(repository, tmp_path, monkeypatch):
    """Of a classifier whose code came with a repository: all that its `auto_map` names, and it loads from there."""
    monkeypatch.setenv("VIDEOMAMBA_SCAN_BACKEND", "torch")
    code = "modeling_videomamba.VideoMambaForVideoClassification"
    classifier = get_class_from_dynamic_module(code, repository).from_pretrained(repository)
    classifier.base_model.save_pretrained(tmp_path / "backbone")
    assert {path.name for path in (tmp_path / "backbone").glob("*.py")} >= MODEL_MODULES
    code = json.loads((tmp_path / "backbone" / "config.json").read_text())["auto_map"]["AutoModel"]
    assert code == "modeling_videomamba.VideoMambaModel"
    backbone = get_class_from_dynamic_module(code, tmp_path / "backbone").from_pretrained(tmp_path / "backbone")
    pixels = torch.randn(1, 4, 3, 32, 32)
    torch.testing.assert_close(
        *(model(pixels, interpolate_pos_encoding=True).pooler_output for model in (backbone, classifier.base_model))
    )


def test_it_is_pushed(monkeypatch, tmp_path, capsys):
    hub = HubServer()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with hub.serve():
        monkeypatch.setattr(make_hub_repo, "HfApi", lambda: HfApi(endpoint=hub.url, token="hf_test"))
        make(CARD, tmp_path / "out", "--push-to-hub", "you/camera-motion", "--private")
    assert hub.created == {"you/camera-motion": True}
    assert set(hub.files["you/camera-motion"]) == {path.name for path in (tmp_path / "out").iterdir()}
    assert "Pushed to" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="is written, but not pushed"):
        make(CARD, tmp_path / "other", "--push-to-hub", "you/camera-motion")  # the server is gone


def test_what_it_refuses(tmp_path):
    with pytest.raises(SystemExit, match="'nothing' is no checkpoint folder.*Here are: .*" + CARD):
        make("nothing", tmp_path / "out")
    (tmp_path / "mine.txt").write_text("not to be touched")
    with pytest.raises(SystemExit, match="is not an empty folder"):
        make(CARD, tmp_path)
    with pytest.raises(SystemExit, match="is not an empty folder"):
        make(CARD, tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_card_says_what_was_measured():
    """As huggingface_hub reads it; the figures are those of the card's own table."""
    card = ModelCard.load(FOLDER / "README.md")
    data = card.data
    assert data.license == "apache-2.0" and data.library_name == "transformers"
    assert data.pipeline_tag == "video-classification" and data.metrics == ["accuracy"] and data.datasets
    (result,) = data.eval_results
    assert (result.task_type, result.metric_type, result.dataset_split) == (
        "video-classification",
        "accuracy",
        "validation",
    )
    right, clips_counted = re.search(r"as they are \| [\d.]+ % \(([\d,]+) of ([\d,]+)\)", card.text).groups()
    share = int(right.replace(",", "")) / int(clips_counted.replace(",", ""))
    assert result.metric_value == pytest.approx(share, abs=5e-5)
