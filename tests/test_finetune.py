"""The short fine-tuning script and its notebook: as a user runs them, in a folder of their own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForVideoClassification, AutoVideoProcessor

import finetune
from modeling_videomamba import VideoMambaConfig, VideoMambaForVideoClassification, VideoMambaVideoProcessor
from training_clips import NAMES


ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A tiny model of three labels with random weights."""
    folder = tmp_path_factory.mktemp("start")
    config = VideoMambaConfig(hidden_size=16, num_hidden_layers=1, image_size=32, num_frames=4, num_labels=3)
    VideoMambaForVideoClassification(config).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    VideoMambaVideoProcessor(num_frames=4, frame_stride=2, **sizes).save_pretrained(folder)
    return folder


def test_the_script_alone_trains_and_pushes(bars, start, hub, python, tmp_path):
    """Copied alone into an empty folder: from labels of its own to the clips', and to the Hub, whence it loads."""
    shutil.copy(finetune.__file__, tmp_path)
    command = ["finetune.py", "--model_name_or_path", start, "--dataset", bars, "--output_dir", "my-classifier"]
    command += ["--num_train_epochs", 2, "--learning_rate", 1e-2, "--use_cpu", "--push_to_hub"]
    command += ["--warmup_steps", 0]  # else the first of two steps, which may be the best one, changes nothing
    python.run([*command, "--hub_model_id", "you/my-classifier"], tmp_path)
    files = hub.files["you/my-classifier"]
    wanted = {"README.md", "config.json", "model.safetensors", "video_preprocessor_config.json"}
    assert wanted | {"modeling_videomamba.py", "selective_scan.py"} <= set(files)
    assert not [name for name in files if name.startswith("checkpoint")]
    card = ModelCard(files["README.md"].decode())
    assert "video-classification" in card.data.tags and "- Accuracy: " in card.content
    assert str(tmp_path.parent) not in card.content, "paths of this machine are nobody's business"

    pushed = tmp_path / "pushed"
    for name, content in files.items():
        if "/" not in name:
            pushed.mkdir(exist_ok=True)
            (pushed / name).write_bytes(content)
    model = AutoModelForVideoClassification.from_pretrained(pushed).eval()
    assert model.config.id2label == dict(enumerate(NAMES))
    before = AutoModelForVideoClassification.from_pretrained(start).state_dict()
    after = model.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert "videomamba.layers.0.mixer.in_proj.weight" in changed
    pixels = AutoVideoProcessor.from_pretrained(pushed)(
        str(next(bars.rglob("*.mp4"))), return_tensors="pt"
    ).pixel_values
    assert pixels.shape == (1, 4, 3, 32, 32) and model(pixels).logits.shape == (1, 2)
    results = json.loads((tmp_path / "my-classifier" / "eval_results.json").read_text())
    assert results["epoch"] == 2 and 0 <= results["eval_accuracy"] <= 1


def test_a_part_is_held_out_if_there_is_no_validation_split(bars, tmp_path):
    shutil.copytree(bars / "train", tmp_path / "train")
    splits = finetune.load_clips(str(tmp_path), 0.5, seed=0)
    assert {split: sorted(part["label"]) for split, part in splits.items()} == {
        "train": [0, 0, 1, 1],
        "validation": [0, 0, 1, 1],
    }
    paths = [{row["video"]["path"] for row in part} for part in splits.values()]
    assert not paths[0] & paths[1] and len(paths[0] | paths[1]) == 8


def test_training_clips_are_cropped_and_others_prepared_as_for_users(bars, start):
    processor = AutoVideoProcessor.from_pretrained(start)
    rows = finetune.load_clips(str(bars), 0.2, seed=0)["train"][:2]
    for_training, for_validation = finetune.transforms(processor, min_crop_area=0.3)
    seen = for_validation(rows)
    assert seen["labels"] == rows["label"]
    for video, found in zip(rows["video"], seen["pixel_values"], strict=True):
        assert torch.equal(found, processor(video["path"], return_tensors="pt").pixel_values[0])
    torch.manual_seed(0)
    first, second = for_training(rows)["pixel_values"], for_training(rows)["pixel_values"]
    assert first[0].shape == (4, 3, 32, 32) and not torch.equal(first[0], second[0])


def test_a_folder_without_labels_is_refused(bars, tmp_path):
    shutil.copytree(bars / "train" / NAMES[0], tmp_path / "train")
    with pytest.raises(ValueError, match="each label needs a sub-folder of clips"):
        finetune.load_clips(str(tmp_path), 0.2, seed=0)


def test_the_notebook_runs_from_top_to_bottom(python, tmp_path):
    """Its cells are plain Python: together they are a script. It learns the clips it makes."""
    cells = json.loads((ROOT / "examples" / "training" / "finetune.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    (tmp_path / "notebook.py").write_text("\n\n".join(code))
    printed = python.run(["notebook.py"], tmp_path)
    accuracy = float(printed.split("'eval_accuracy': ")[-1].split(",")[0])
    assert accuracy > 0.8, "of two labels"
    assert (tmp_path / "my-classifier" / "model.safetensors").exists() and printed.count("is called") == 2
