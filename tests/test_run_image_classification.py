"""The image example and the split of a folder of pictures, on tiny pictures that colour alone tells apart."""

import json

import datasets
import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline

import run_image_classification
import split_imagefolder
from modeling_videomamba import VideoMambaForImageClassification


COLORS = {"red": (200, 40, 40), "green": (40, 200, 40)}


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name, color in COLORS.items():
        (tmp_path / "all" / name).mkdir(parents=True)
        for i in range(12):
            pixels = np.clip(np.array(color) + rng.normal(0, 30, (30 + i, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "all" / name / f"{i}.png")
    return tmp_path / "all"


def run(monkeypatch, module, *options):
    monkeypatch.setattr("sys.argv", [module.__name__, *map(str, options)])
    module.main()


def test_split_is_fixed_and_shrinks(folder, tmp_path, monkeypatch, capsys):
    for output in ("first", "second"):
        run(monkeypatch, split_imagefolder, folder, tmp_path / output, "--train_per_class", 8, "--shortest_edge", 20)
    assert "2 classes, 16 training and 8 validation" in capsys.readouterr().out
    names = [
        sorted(str(p.relative_to(tmp_path / o)) for p in (tmp_path / o).rglob("*.jpg")) for o in ("first", "second")
    ]
    assert names[0] == names[1] and len(names[0]) == 24
    parts = [{p.stem for p in (tmp_path / "first" / split / "red").iterdir()} for split in ("train", "validation")]
    assert len(parts[0]) == 8 and len(parts[1]) == 4 and not parts[0] & parts[1]
    assert Image.open(tmp_path / "first" / names[0][0]).size[1] == 20
    for options, expected in (
        ((folder, tmp_path / "first"), "exists already"),
        ((folder / "red", tmp_path / "none"), "has no sub-folders"),
        ((folder, tmp_path / "few", "--train_per_class", 12), "has 12 pictures, not more than 12"),
    ):
        with pytest.raises(SystemExit, match=expected):
            run(monkeypatch, split_imagefolder, *options)


def test_trains_a_classifier_that_the_pipeline_loads(folder, tmp_path, monkeypatch):
    data, output = tmp_path / "data", tmp_path / "out"
    run(monkeypatch, split_imagefolder, folder, data, "--train_per_class", 8)
    options = ["--dataset", data, "--output_dir", output, "--config_overrides"]
    options += ["hidden_size=16,num_hidden_layers=1,image_size=32,patch_size=16", "--disable_tqdm", "true"]
    options += ["--per_device_train_batch_size", 4, "--learning_rate", 1e-2, "--save_total_limit", 1]
    run(monkeypatch, run_image_classification, *options, "--num_train_epochs", 8)
    results = json.loads((output / "eval_results.json").read_text())
    assert results["eval_accuracy"] == 1.0
    assert type(AutoModelForImageClassification.from_pretrained(output)) is VideoMambaForImageClassification
    pictures = [Image.new("RGB", (50, 40), color) for color in COLORS.values()]
    answers = pipeline("image-classification", model=str(output))(pictures)
    assert [answer[0]["label"] for answer in answers] == list(COLORS)

    # Another start: the new labels get a new classifier.
    (data / "train" / "red").rename(data / "train" / "rouge")
    with pytest.raises(ValueError, match="labels that only train/ or only validation/ has: \\['red', 'rouge'\\]"):
        run(monkeypatch, run_image_classification, *options[:4], "--model_name_or_path", output)
    with pytest.raises(ValueError, match="There is no folder"):
        run(monkeypatch, run_image_classification, "--dataset", data / "train", "--output_dir", tmp_path / "x")


def test_a_data_set_of_the_hub_becomes_a_classifier_on_the_hub(folder, hub, python, tmp_path):
    """Other names of the columns, and the names of the labels, come from the data set itself."""
    rows = [(path, label) for label, name in enumerate(COLORS) for path in sorted((folder / name).glob("*.png"))]
    features = datasets.Features({"picture": datasets.Image(), "color": datasets.ClassLabel(names=list(COLORS))})
    files = hub.files["datasets/you/colors"] = {}
    for split, part in (("train", rows[::2]), ("validation", rows[1::2])):
        pictures = [{"path": path.name, "bytes": path.read_bytes()} for path, _ in part]
        table = datasets.Dataset.from_dict({"picture": pictures, "color": [label for _, label in part]}, features)
        table.to_parquet(tmp_path / "part.parquet")
        files[f"data/{split}-00000-of-00001.parquet"] = (tmp_path / "part.parquet").read_bytes()
    command = [run_image_classification.__file__, "--dataset", "you/colors", "--output_dir", "out", "--max_steps", 2]
    command += ["--config_overrides", "hidden_size=16,num_hidden_layers=1,image_size=32,patch_size=16"]
    command += ["--report_to", "none", "--push_to_hub", "--hub_model_id", "you/color-classifier"]
    python.run(command, tmp_path)
    pushed = hub.files["you/color-classifier"]
    assert {"model.safetensors", "preprocessor_config.json", "modeling_videomamba.py"} <= pushed.keys()
    assert json.loads(pushed["config.json"])["id2label"] == {"0": "red", "1": "green"}
    assert ModelCard(pushed["README.md"].decode()).data.datasets == ["you/colors"]
    (entry,) = parse_eval_result_entries(yaml.safe_load(pushed[".eval_results/you--colors.yaml"]))
    results = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert (entry.dataset_id, entry.value) == ("you/colors", round(results["eval_accuracy"], 4))
