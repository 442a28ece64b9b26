"""The short fine-tuning script and its notebook: as a user runs them, in a folder of their own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from torchvision.transforms import v2
from transformers import AutoImageProcessor, AutoModelForVideoClassification, AutoVideoProcessor, TrainingArguments

import finetune
import several_labels
from modeling_videomamba import VideoMambaConfig, VideoMambaForVideoClassification, VideoMambaVideoProcessor
from training_clips import NAMES
from video_classification_arguments import ModelArguments
from video_classification_model import load_model, parameter_groups


ROOT = Path(__file__).resolve().parent.parent
RESULTS = "eval_results.json"


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A tiny model of three labels with random weights."""
    folder = tmp_path_factory.mktemp("start")
    config = VideoMambaConfig(hidden_size=16, num_hidden_layers=1, image_size=32, num_frames=4, num_labels=3)
    VideoMambaForVideoClassification(config).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    VideoMambaVideoProcessor(num_frames=4, frame_stride=2, **sizes).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


def test_a_copied_script_trains_and_pushes(bars, start, hub, python, tmp_path):
    """In an empty folder, with what its first lines name: from other labels to the clips', and to the Hub and back."""
    for copied in (finetune, several_labels):
        shutil.copy(copied.__file__, tmp_path)
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
    assert "No log" not in card.content, "the table has the losses of short runs, too"
    assert f"was fine-tuned from {start.name} on" in card.content and card.data.license == "mit"
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


@pytest.mark.slow
def test_the_other_scripts_take_what_it_writes(bars, start, python, tmp_path):
    """Evaluated, trained further on longer clips, and given back to the script."""
    scripts, out = ROOT / "examples" / "training", [tmp_path / name for name in ("first", "views", "longer", "last")]
    command = [scripts / "finetune.py", "--dataset", bars, "--use_cpu", "--max_steps", 2]
    python.run([*command, "--model_name_or_path", start, "--output_dir", out[0]])
    look = ["--model_name_or_path", out[0], "--use_cpu", "--validation_dir", bars / "validation"]
    python.run([scripts / "evaluate_video_classification.py", *look, "--output_dir", out[1]])
    found, expected = (json.loads((out[i] / name).read_text()) for i, name in ((1, "results.json"), (0, RESULTS)))
    assert found["accuracy"] == expected["eval_accuracy"]
    more = ["--train_dir", bars / "train", "--do_train", "--max_steps", 1, "--num_frames", 8, "--report_to", "none"]
    python.run([scripts / "run_video_classification.py", *look, *more, "--output_dir", out[2]])
    python.run([*command, "--model_name_or_path", out[2], "--output_dir", out[3]])
    assert AutoVideoProcessor.from_pretrained(out[3]).num_frames == 8


def run(monkeypatch, *arguments):
    """As a user runs the script, in this process."""
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--use_cpu", *map(str, arguments)])
    finetune.main()


def test_training_again_in_the_same_folder(bars, start, tmp_path, monkeypatch, capsys):
    """Other settings and other clips are refused; the same go on, and are then already done."""
    options = ["--model_name_or_path", start, "--num_train_epochs", 2, "--logging_steps", 1, "--disable_tqdm", True]
    options += ["--num_frames", 6, "--sampling_fps", 4, "--image_size", 48, "--output_dir", tmp_path / "out"]
    save = finetune.FineTuner._save_checkpoint

    def interrupt(self, *args):
        save(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetune.FineTuner, "_save_checkpoint", interrupt)
        run(patch, *options, "--dataset", bars)
    with pytest.raises(ValueError, match="learning_rate was 0.0001 and is now 0.01"):
        run(monkeypatch, *options, "--dataset", bars, "--learning_rate", 0.01)
    other = tmp_path / "other"
    for split in ("train", "validation"):
        shutil.copytree(bars / split, other / split)
        (other / split / NAMES[0]).rename(other / split / "up")
    with pytest.raises(ValueError, match=r"dataset was '.*' and is now '.*other'; labels was \['to the left.*'up'\]"):
        run(monkeypatch, *options, "--dataset", other)
    assert "Going on" not in capsys.readouterr().out
    run(monkeypatch, *options, "--dataset", bars)
    assert "checkpoint-1: 1 of 2 steps are done" in capsys.readouterr().out
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    run(monkeypatch, *options, "--dataset", bars, "--report_to", "none")
    assert "Already done" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights
    processor = AutoVideoProcessor.from_pretrained(tmp_path / "out")
    assert (processor.num_frames, processor.sampling_fps, processor.crop_size["width"]) == (6, 4, 48)
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").crop_size["width"] == 48
    _, names, reader, *_ = load_model(ModelArguments(model_name_or_path=str(tmp_path / "out")), [], training=False)
    assert names == NAMES and reader.num_frames == 6
    inputs = processor(str(next(bars.rglob("*.mp4"))), return_tensors="pt")
    model = AutoModelForVideoClassification.from_pretrained(tmp_path / "out")
    assert inputs["pixel_values"].shape == (1, 6, 3, 48, 48) and model(**inputs).logits.shape == (1, 2)


def test_clips_that_cannot_be_read_are_skipped_and_listed(bars, start, tmp_path, monkeypatch):
    """In training another clip takes the place; in evaluation the clip does not count, in accuracy nor loss."""
    clips, out = tmp_path / "clips", tmp_path / "out"
    shutil.copytree(bars, clips)
    broken = [clips / split / NAMES[1] / "broken.mp4" for split in ("train", "validation")]
    for path in broken:
        path.write_bytes(b"no video")
    options = ["--model_name_or_path", start, "--max_steps", 2, "--per_device_eval_batch_size", 1, "--seed", 1]
    run(monkeypatch, *options, "--dataset", clips, "--output_dir", out)
    listed = [json.loads(line) for line in (out / "_decode_failures.jsonl").read_text().splitlines()]
    assert sorted(entry["clip"] for entry in listed) == sorted(map(str, broken)) and "no video" in listed[0]["error"]
    model = AutoModelForVideoClassification.from_pretrained(out)
    processor, right, losses = AutoVideoProcessor.from_pretrained(out), [], []
    for number, name in enumerate(NAMES):
        for path in sorted((bars / "validation" / name).iterdir()):
            with torch.no_grad():
                logits = model(**processor(str(path), return_tensors="pt")).logits
            right.append(int(logits.argmax()) == number)
            losses.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor([number]))))
    results = json.loads((out / RESULTS).read_text())
    assert results["eval_accuracy"] == sum(right) / 4
    assert results["eval_loss"] == pytest.approx(sum(losses) / 4, rel=1e-3)
    more = ["--dataset", clips, "--output_dir", tmp_path / "none", "--max_decode_failures", 0]
    with pytest.raises(RuntimeError, match="1 clips? cannot be read, more than --max_decode_failures 0"):
        run(monkeypatch, *options, *more)


def test_a_part_is_held_out_if_there_is_no_validation_split(bars, tmp_path):
    shutil.copytree(bars / "train", tmp_path / "train")
    splits = finetune.load_clips(str(tmp_path), 0.5, seed=0)
    assert {split: sorted(part["label"]) for split, part in splits.items()} == {
        "train": [0, 0, 1, 1],
        "validation": [0, 0, 1, 1],
    }
    paths = [{row["video"]["path"] for row in part} for part in splits.values()]
    assert not paths[0] & paths[1] and len(paths[0] | paths[1]) == 8


@pytest.mark.parametrize(("train", "validation"), [("Train", "Validation"), ("train", "Val"), ("TRAINING", "dev")])
def test_splits_are_found_however_they_are_written(bars, tmp_path, train, validation):
    """datasets knows small letters alone, and would take all clips for training."""
    shutil.copytree(bars / "train", tmp_path / train)
    shutil.copytree(bars / "validation", tmp_path / validation)
    splits = finetune.load_clips(str(tmp_path), 0.5, seed=0)
    found = {split: {Path(video["path"]).parts[-3] for video in part["video"]} for split, part in splits.items()}
    assert found == {"train": {train}, "validation": {validation}}


def test_a_validation_folder_without_clips_is_none(bars, tmp_path):
    shutil.copytree(bars / "train", tmp_path / "train")
    (tmp_path / "validation" / NAMES[0]).mkdir(parents=True)
    splits = finetune.load_clips(str(tmp_path), 0.5, seed=0)
    assert {split: len(part) for split, part in splits.items()} == {"train": 4, "validation": 4}


def test_training_clips_are_cropped_and_others_prepared_as_for_users(bars, start):
    processor = AutoVideoProcessor.from_pretrained(start)
    rows = finetune.load_clips(str(bars), 0.2, seed=0)["train"][:2]
    augment = v2.RandomResizedCrop((32, 32), scale=(0.3, 1), antialias=True)
    for_training, for_validation = finetune.ClipTransform(processor, augment), finetune.ClipTransform(processor)
    seen = for_validation(rows)
    assert seen["labels"] == rows["label"]
    for video, found in zip(rows["video"], seen["pixel_values"], strict=True):
        assert torch.equal(found, processor(video["path"], return_tensors="pt").pixel_values[0])
    torch.manual_seed(0)
    first, second = for_training(rows)["pixel_values"], for_training(rows)["pixel_values"]
    assert first[0].shape == (4, 3, 32, 32) and not torch.equal(first[0], second[0])


def test_a_head_of_other_labels_is_a_new_one(start):
    """As many labels: of other names, of the same in another order, and the same."""
    torch.manual_seed(0)
    old = AutoModelForVideoClassification.from_pretrained(start).classifier
    names = ["LABEL_0", "LABEL_1", "LABEL_2"]
    same = finetune.load_model(start, names)
    assert (
        torch.equal(same.classifier.weight, old.weight) and same.config.problem_type == "single_label_classification"
    )
    turned = finetune.load_model(start, [names[2], names[0], names[1]])
    assert torch.equal(turned.classifier.weight, old.weight[[2, 0, 1]])
    assert turned.config.label2id == {"LABEL_2": 0, "LABEL_0": 1, "LABEL_1": 2}
    for labels in (["a", "b", "c"], ["LABEL_0", "LABEL_1", "LABEL_3"]):
        model = finetune.load_model(start, labels)
        assert not torch.isclose(model.classifier.weight, old.weight).any(dim=1).all()
        assert model.config.id2label == dict(enumerate(labels))


def test_what_is_decayed_is_what_the_full_scripts_decay(start, tmp_path):
    """Matrices and kernels: neither A, D, positions, the class token, norms nor biases."""
    model = AutoModelForVideoClassification.from_pretrained(start)
    arguments = TrainingArguments(output_dir=str(tmp_path), weight_decay=0.1, use_cpu=True, report_to="none")
    groups = finetune.FineTuner(model, arguments).create_optimizer().param_groups
    others = parameter_groups(model, learning_rate=1e-3, weight_decay=0.1, layer_decay=1.0)
    decayed, expected = (
        {id(w) for group in g if group["weight_decay"] for w in group["params"]} for g in (groups, others)
    )
    assert decayed == expected
    names = {name.rpartition("mixer.")[2] for name, weight in model.named_parameters() if id(weight) in decayed}
    matrices = {"in_proj.weight", "conv_weight", "x_proj_weight", "dt_proj_weight", "out_proj.weight"}
    assert names == matrices | {"classifier.weight", "videomamba.embeddings.patch_embeddings.projection.weight"}


def test_a_folder_without_labels_is_refused(bars, tmp_path):
    shutil.copytree(bars / "train" / NAMES[0], tmp_path / "train")
    with pytest.raises(ValueError, match="each label needs a sub-folder of clips"):
        finetune.load_clips(str(tmp_path), 0.2, seed=0)
    # The names of the splits are no labels.
    shutil.copytree(bars / "validation" / NAMES[1], tmp_path / "validation")
    with pytest.raises(ValueError, match="Some training clips .* have no label.* each label needs a sub-folder"):
        finetune.load_clips(str(tmp_path), 0.2, seed=0)


@pytest.mark.parametrize("name", ["clps", "./clips/mine", "../clips", "/my/clips"])
def test_a_mistyped_folder_is_not_looked_for_on_the_hub(name):
    with pytest.raises(ValueError, match=f"There is no folder {name}"):
        finetune.load_data_set(name)


def notebook():
    """Its cells as one piece of plain Python."""
    cells = json.loads((ROOT / "examples" / "training" / "finetune.ipynb").read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_two_workers_of_the_notebook_that_are_not_forked(method, tmp_path):
    """As by default in Python 3.14. A notebook has no file to import anew; nor has code that comes as an argument."""
    code = notebook().replace("WORKERS = 0", "WORKERS = 2").replace("LEARNING_RATE = (4,", "LEARNING_RATE = (1,")
    code = code.replace("print(trainer.evaluate())", "")  # evaluated after the epoch; workers take seconds to start
    assert "WORKERS = 2" in code and "= (1, 8" in code and "trainer.evaluate" not in code
    code = f"import multiprocessing\nmultiprocessing.set_start_method({method!r})\n{code}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VIDEOMAMBA_SCAN_BACKEND": "torch", "MPLBACKEND": "agg"}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 280}
    done = subprocess.run([sys.executable, "-c", code], **options)
    assert "is called" in done.stdout, done.stderr


def test_the_notebook_runs_from_top_to_bottom(python, tmp_path):
    """It learns the clips it makes."""
    (tmp_path / "notebook.py").write_text(notebook())
    printed = python.run(["notebook.py"], tmp_path)
    accuracy = float(printed.split("'eval_accuracy': ")[-1].split(",")[0])
    assert accuracy > 0.8, "of two labels"
    assert (tmp_path / "my-classifier" / "model.safetensors").exists() and printed.count("is called") == 2


def test_one_process_that_sees_several_gpus_is_told_so(monkeypatch):
    told = []
    monkeypatch.setattr(finetune.logger, "warning", lambda text, *values: told.append(text % values))
    arguments = TrainingArguments(use_cpu=True, per_device_train_batch_size=8, report_to="none")
    finetune.warn_of_threads(arguments)
    assert not told
    arguments._n_gpu = 4
    finetune.warn_of_threads(arguments)
    assert len(told) == 1 and "sees 4 GPUs" in told[0] and "32 examples" in told[0] and "--nproc_per_node 4" in told[0]
