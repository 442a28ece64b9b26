"""Clips with several labels each: the metrics, lists and data sets, and the scripts from clips to a card."""

import csv
import json
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, List, Value, Video, load_dataset
from huggingface_hub import ModelCard, parse_eval_result_entries
from sklearn.metrics import average_precision_score
from transformers import AutoModelForVideoClassification, AutoVideoProcessor, pipeline

import classify_clips
import classify_video
import evaluate_video_classification as evaluation
import finetune
import run_video_classification as with_trainer
import run_video_classification_no_trainer as plain_loop
import several_labels
import study
import tag_video
import train_streaming
import video_classification_data as data
from finetune import DecodeFailures
from modeling_videomamba import VideoMambaConfig, VideoMambaForVideoClassification, VideoMambaImageProcessor
from modeling_videomamba.video_decoding import decode_video
from segments import Window, to_moments, to_segments
from several_labels import has_several, precisions
from tag_outputs import write_tables
from taggers import make_tagger
from tool_models import CAMERA_MOTION
from training_clips import COLOURS, tiny_processor, touch, write_coloured_clips
from video_classification_arguments import DataArguments, ModelArguments
from video_classification_model import load_model
from video_files import write_video


SEVERAL = "multi_label_classification"
TINY = ["--hidden_size", 16, "--num_hidden_layers", 1, "--image_size", 32, "--num_frames", 4, "--frame_stride", 2]
# Colours must not jitter, and a crop of any part tells them.
LEARN = ["--jitter", 0, "--learning_rate", 2e-2, "--num_train_epochs", 5, "--label_column", "labels", "--use_cpu"]


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """32 training and 16 validation clips in none to three colours."""
    return write_coloured_clips(tmp_path_factory.mktemp("coloured"), {"train": 32, "validation": 16})


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A tiny model of three other labels, one a clip, with random weights."""
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    config = VideoMambaConfig(hidden_size=16, num_hidden_layers=1, image_size=32, num_frames=4, num_labels=3)
    VideoMambaForVideoClassification(config).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    VideoMambaImageProcessor().save_pretrained(folder)
    return folder


def run(monkeypatch, script, *arguments):
    """As a user runs the script, in this process."""
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    script.main()


def read(path):
    return json.loads(Path(path).read_text())


# ---------------------------------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
def test_average_precisions_are_those_of_scikit_learn(ties):
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(60, 5)).astype(np.float32), (rng.random((60, 5)) < 0.3).astype(np.float32)
    if ties:
        scores = np.round(scores)
        scores[:, 1] = 0
        scores[:2, 0] = np.inf
    found = precisions(scores, labels)
    finite = np.nan_to_num(scores)  # of which scikit-learn takes no others
    expected = [average_precision_score(labels, finite, average=how) for how in ("macro", "micro")]
    names = ("mean_average_precision", "micro_average_precision")
    assert [found[name] for name in names] == pytest.approx(expected, rel=1e-12)
    assert found["measured_labels"] == 5

    labels[:, 2] = 0  # scikit-learn counts 0 for this one, and warns
    found = precisions(scores, labels)
    others = [0, 1, 3, 4]
    expected = average_precision_score(labels[:, others], finite[:, others])
    assert found["mean_average_precision"] == pytest.approx(expected, rel=1e-12) and found["measured_labels"] == 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        micro = average_precision_score(labels, finite, average="micro")
    assert found["micro_average_precision"] == pytest.approx(micro, rel=1e-12)


def test_average_precision_by_hand():
    """Right at ranks 1 and 3: (1 / 1 + 2 / 3) / 2. A clip that could not be read does not count."""
    scores = np.array([[3.0], [2.0], [1.0], [9.0]])
    found = precisions(scores, np.array([[1.0], [0.0], [1.0], [-100.0]]))
    assert found["mean_average_precision"] == pytest.approx((1 + 2 / 3) / 2)
    with pytest.raises(ValueError, match="no clip with a label"):
        precisions(scores, np.zeros((4, 1)))
    with pytest.raises(ValueError, match="scores are NaN"):
        precisions(np.full((4, 1), np.nan), np.ones((4, 1)))


# ---------------------------------------------------------------------------------------------------------------------
# Which clips
# ---------------------------------------------------------------------------------------------------------------------


def listed(source, root, *options, limit=0):
    clips = data.read_list(
        str(source), str(root), "train", 1, DecodeFailures(str(root.parent / "log"), limit), *options
    )
    names = data.label_names(clips)
    assert has_several(clips)
    return {
        Path(v["path"]).name: [names[n] for n in own] for v, own in zip(clips["video"], clips["label"], strict=True)
    }


def test_reads_the_lists_of_charades(tmp_path):
    """Rows as in Charades_v1_train.csv, one of them without an action; and the file of classes."""
    root, source = tmp_path / "Charades_v1_480", tmp_path / "train.csv"
    touch(root / "46GP8.mp4", root / "N11GT.mp4", root / "ABCDE.mp4")
    source.write_text(
        "id,subject,scene,script,actions,length\n"
        '46GP8,HR43,Kitchen,"A person cooks, then eats.",c092 11.90 21.20;c147 0.00 12.60;c092 22.00 23.10,24.83\n'
        "N11GT,0KZ7,Stairs,Someone runs.,c000 0.00 5.00,31.00\nABCDE,0KZ7,Stairs,Nothing happens.,,12.00\n"
    )
    assert listed(source, root) == {"46GP8.mp4": ["c092", "c147"], "N11GT.mp4": ["c000"], "ABCDE.mp4": []}
    classes = tmp_path / "Charades_v1_classes.txt"
    classes.write_text("".join(f"c{number:03d} Doing {number}\n" for number in range(157)))
    assert listed(source, root, str(classes))["46GP8.mp4"] == ["Doing 92", "Doing 147"]
    (root / "N11GT.mp4").unlink()
    with pytest.raises(RuntimeError, match=r"N11GT \(c000\): it is listed in"):
        listed(source, root)
    source.write_text("id,actions\n46GP8,c92 11.90\n")
    with pytest.raises(ValueError, match=r"has 'c92 11.90' in row 1 .* actions as 'c092 11.90 21.20;c147"):
        listed(source, root)


def test_reads_plain_lists_of_several_labels(tmp_path):
    root, source = tmp_path / "videos", tmp_path / "clips.csv"
    touch(root / "a 1.mp4", root / "b.mp4", root / "c.mp4")
    source.write_text('video,labels\na 1.mp4,"run, fast;jump"\nb.mp4,jump; jump\nc.mp4,\n')
    assert listed(source, root) == {"a 1.mp4": ["run, fast", "jump"], "b.mp4": ["jump"], "c.mp4": []}
    source.write_text('video,labels\na 1.mp4,"run, jump"\nb.mp4,run\n')
    assert listed(source, root) == {"a 1.mp4": ["run", "jump"], "b.mp4": ["run"]}

    source = tmp_path / "clips.txt"
    for text, columns in (
        ("a 1.mp4 11,2\nb.mp4 2\nc.mp4\n", "path,labels"),
        ("a 1.mp4 2 11\nb.mp4 2\nc.mp4\n", "path,labels"),
        ("a 1.mp4,2,11\nb.mp4,2\nc.mp4\n", "path,labels"),
        ("a 1.mp4 163 2 11\nb.mp4 30 2\nc.mp4 7\n", "path,frames,labels"),
    ):
        source.write_text(text)
        found = listed(source, root, None, columns)
        assert found == {"a 1.mp4": ["02", "11"], "b.mp4": ["02"], "c.mp4": []}, text
    (tmp_path / "names.txt").write_text("\n".join("abcdefghijkl"))
    assert listed(source, root, str(tmp_path / "names.txt"), "path,frames,labels")["a 1.mp4"] == ["c", "l"]
    for line, columns in (("b.mp4 run,jump", "path,labels"), ("b.mp4 1.5", "path,labels"), ("c.mp4", "path,n,labels")):
        source.write_text(line)
        with pytest.raises(
            ValueError, match=f"has the line '{line}', but {columns} was .* needs a header: video,labels"
        ):
            listed(source, root, None, columns)


def load(splits=("train", "validation"), **arguments):
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()}
    return data.load_clips(DataArguments(**arguments), splits, 0, None)


def test_data_sets_with_lists_of_labels(coloured, tmp_path):
    """Lists of names, of a folder, and of class labels, of a data set; what cannot be is named."""
    folders = {"train_dir": coloured / "train", "validation_dir": coloured / "validation", "label_column": "labels"}
    splits, names = load(**folders)
    assert names == COLOURS and splits["train"]["label"][5:9] == [[0, 2], [1, 2], [0, 1, 2], []]
    with pytest.raises(ValueError, match=r"no column \['label'\], only .*'labels'.*--label_column.*metadata.jsonl"):
        load(**folders | {"label_column": "label"})

    kind = Features(video=Video(), tags=List(ClassLabel(names=["none", "green"])))
    rows = {"video": [{"path": str(coloured / "train" / "2.mp4"), "bytes": None}], "tags": [[1]]}
    for split in ("train", "validation"):
        (tmp_path / "hub").mkdir(exist_ok=True)
        Dataset.from_dict(rows, features=kind).to_parquet(tmp_path / "hub" / f"{split}.parquet")
    hub = {"dataset_name": tmp_path / "hub", "label_column": "tags"}
    for streaming in (False, True):
        splits, names = load(**hub, streaming=streaming)
        assert names == ["none", "green"] and next(iter(splits["train"]))["label"] == [1]
    splits, _ = load(["validation"], **hub)
    assert data.match_labels(splits["validation"], ["blue", "green", "none"])["label"][:] == [[1]]
    with pytest.raises(
        ValueError, match=r"labels \['none'\], but the model or the training clips have only \['green'"
    ):
        data.match_labels(splits["validation"], ["green"])

    with pytest.raises(ValueError, match="holds names, of which a stream does not say"):
        load(dataset_name=coloured, label_column="labels", streaming=True)
    strange = shutil.copytree(coloured, tmp_path / "strange")
    text = (strange / "validation" / "metadata.jsonl").read_text()
    (strange / "validation" / "metadata.jsonl").write_text(text.replace("red", "grey"))
    with pytest.raises(ValueError, match=r"labels \['grey'\], but the model or the training clips have only"):
        load(**folders | {"validation_dir": strange / "validation"})
    with pytest.raises(ValueError, match=r"labels \['grey'\], but the training clips have only"):
        finetune.load_clips(str(strange), 0.2, 0)
    (strange / "validation" / "metadata.jsonl").write_text(text.replace(', "red"', "").replace('"red"', ""))
    with pytest.raises(ValueError, match=r"no validation clip of \['red'\].*--allow_missing_classes"):
        load(**folders | {"validation_dir": strange / "validation"})


def test_numbers_of_a_short_list_are_those_of_a_long_one(tmp_path):
    """They have as many digits as the largest, which the validation clips need not have."""
    root = tmp_path / "videos"
    touch(root / "a.mp4", root / "b.mp4")
    (tmp_path / "train.txt").write_text("a.mp4 2 11\nb.mp4 3\n")
    (tmp_path / "validation.txt").write_text("a.mp4 3 2\nb.mp4\n")
    lists = {f"{split}_list": str(tmp_path / f"{split}.txt") for split in ("train", "validation")}
    options = {"video_root": str(root), "list_columns": "path,labels", "allow_missing_classes": True}
    splits, names = load(**lists, **options)
    assert names == ["02", "03", "11"] and splits["validation"]["label"][:] == [[0, 1], []]
    with pytest.raises(ValueError, match="labels \\['02'\\], but"):
        data.match_labels(splits["train"], ["3", "11"])


@pytest.mark.parametrize("labels", [[-1], [0, None]])
def test_a_label_that_is_not_known_is_no_other(labels):
    """-1 is the Hub's number for it; as an index, it is the last label, and None is all of them."""
    with pytest.raises(ValueError, match="of which each must be a number from 0 to 2"):
        several_labels.multi_hot(labels, 3)
    assert several_labels.multi_hot([2, 0, 2], 3).tolist() == [1, 0, 1]
    for kind, column, found in (
        (List(ClassLabel(names=["b", "a"])), [labels, [1]], [[-1] if labels == [-1] else [1, None], [0]]),
        (ClassLabel(names=["b", "a"]), [-1, 1], [-1, 0]),
    ):
        clips = Dataset.from_dict({"label": column}, Features(label=kind))
        assert data.match_labels(clips, ["a", "b"])["label"][:] == found
    clips = Dataset.from_dict({"label": [["b", None], None]}, Features(label=List(Value("string"))))
    assert several_labels.labels_that_occur(clips) == {"b"}


def test_clips_of_which_none_has_a_label_are_refused(tmp_path):
    touch(tmp_path / "videos" / "a.mp4")
    (tmp_path / "train.csv").write_text("video,labels\na.mp4,\n")
    with pytest.raises(ValueError, match="None of the train clips has a label"):
        load(["train"], train_list=str(tmp_path / "train.csv"), video_root=str(tmp_path / "videos"))


def test_turned_clips_take_all_their_swapped_labels():
    args = DataArguments(jitter=0.0, min_crop_area=1.0)
    train = data.TrainTransform(None, tiny_processor(), args, [1, 0, 2], None, num_labels=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "read_frames", lambda *_: torch.zeros(4, 3, 32, 32, dtype=torch.uint8))
        found = {tuple(train(None, [0, 2])["labels"].tolist()) for _ in range(40)}
        turned = data.EvalTransform(tiny_processor(), tiny_processor(), (-1,), [1, 0, 2], num_labels=3)
        assert turned(None, [0, 2])["labels"].tolist() == [0, 1, 1] and turned(None, [])["labels"].tolist() == [0] * 3
        assert turned(None, -100)["labels"].tolist() == [-100] * 3
    assert found == {(1, 0, 1), (0, 1, 1)}


def test_a_model_of_one_label_a_clip_is_not_evaluated_on_lists(start):
    args = ModelArguments(model_name_or_path=str(start), ignore_mismatched_sizes=True)
    with pytest.raises(ValueError, match="was trained for one label a clip, but these clips have several"):
        load_model(args, COLOURS, training=False, several=True)
    model, *_ = load_model(args, COLOURS, training=True, several=True)
    assert model.config.problem_type == SEVERAL
    new, *_ = load_model(ModelArguments(hidden_size=16, num_hidden_layers=1), COLOURS, training=True, several=True)
    assert new.config.problem_type == SEVERAL and new.config.num_labels == 3


# ---------------------------------------------------------------------------------------------------------------------
# The scripts
# ---------------------------------------------------------------------------------------------------------------------


def scores_of(folder, clips, names=COLOURS):
    """What the model in a folder gives for each clip with a sigmoid, and the truth, both by `names`."""
    model, processor = (
        AutoModelForVideoClassification.from_pretrained(folder),
        AutoVideoProcessor.from_pretrained(folder),
    )
    assert model.config.problem_type == SEVERAL and [model.config.id2label[i] for i in range(3)] == names
    rows = [json.loads(line) for line in (clips / "metadata.jsonl").read_text().splitlines()]
    labels = np.array([[name in row["labels"] for name in names] for row in rows])
    paths = [str(clips / row["file_name"]) for row in rows]
    with torch.no_grad():
        inputs = [processor(path, return_tensors="pt")["pixel_values"] for path in paths]
        return paths, model.eval()(torch.cat(inputs)).logits.sigmoid().numpy(), labels


def expected_metrics(scores, labels):
    macro, micro = (average_precision_score(labels, scores, average=how) for how in ("macro", "micro"))
    return {"mean_average_precision": macro, "micro_average_precision": micro}


def check_metrics(found, scores, labels, prefix=""):
    for name, value in expected_metrics(scores, labels).items():
        assert found[prefix + name] == pytest.approx(value, abs=1e-6), name


def test_finetune_learns_several_labels(coloured, start, tmp_path, monkeypatch):
    """Colours are learnt; a clip that cannot be read counts neither in the loss nor in the metrics."""
    clips, out = shutil.copytree(coloured, tmp_path / "clips"), tmp_path / "out"
    (clips / "validation" / "broken.mp4").write_bytes(b"no video")
    with open(clips / "validation" / "metadata.jsonl", "a") as file:
        file.write('\n{"file_name": "broken.mp4", "labels": ["red"]}')
    options = ["--model_name_or_path", start, "--dataset", clips, "--use_cpu", "--learning_rate", 1e-2]
    options += ["--num_train_epochs", 3, "--metric_for_best_model", "mean_average_precision", "--output_dir", out]
    run(monkeypatch, finetune, *options)
    _, scores, labels = scores_of(out, coloured / "validation")
    results = read(out / "eval_results.json")
    check_metrics(results, scores, labels, "eval_")
    assert results["eval_micro_average_precision"] > 0.9 and results["eval_measured_labels"] == 3
    loss = -np.log(np.where(labels, scores, 1 - scores)).mean()
    assert results["eval_loss"] == pytest.approx(loss, rel=1e-3)
    card = ModelCard.load(out / "README.md").content
    assert f"- Mean Average Precision: {round(results['eval_mean_average_precision'], 4)}" in card
    assert "ccuracy" not in card
    # From several labels a clip to one: the kind is changed with the head.
    model = finetune.load_model(out, ["a", "b"])
    assert model.config.problem_type == "single_label_classification"
    with pytest.raises(ValueError, match="--label_smoothing_factor 0.1 is for one label a clip.*Set it to 0"):
        run(monkeypatch, finetune, *options[:-1], tmp_path / "other", "--label_smoothing_factor", 0.1)


def test_the_trainer_and_the_evaluation(coloured, tmp_path, monkeypatch, capsys):
    """From clips to a card; the evaluation gives the same with one view, and the mean of sigmoids with several."""
    out = tmp_path / "out"
    clips = ["--validation_dir", coloured / "validation", "--label_column", "labels", "--use_cpu"]
    command = [*LEARN, *TINY, "--train_dir", coloured / "train", *clips, "--do_train", "--do_eval"]
    command += ["--eval_strategy", "epoch", "--save_strategy", "epoch", "--load_best_model_at_end"]
    command += [
        "--metric_for_best_model",
        "mean_average_precision",
        "--report_to",
        "none",
        "--mirror_swaps",
        "red:blue",
    ]
    with pytest.raises(ValueError, match="--label_smoothing_factor"):
        run(monkeypatch, with_trainer, *command, "--output_dir", out, "--label_smoothing_factor", 0.1)
    command[-1] = ""
    run(monkeypatch, with_trainer, *command, "--output_dir", out)
    paths, scores, labels = scores_of(out, coloured / "validation")
    results = read(out / "eval_results.json")
    check_metrics(results, scores, labels, "eval_")
    assert results["eval_mean_average_precision"] > 0.9 and results["eval_samples"] == 16
    state = read(out / "trainer_state.json")
    assert state["best_metric"] == max(entry.get("eval_mean_average_precision", 0) for entry in state["log_history"])

    with open(out / "predictions.csv", newline="") as file:
        rows = {row["clip"]: row for row in csv.DictReader(file)}
    for path, own, truth in zip(paths, scores, labels, strict=True):
        row, names = rows[path], np.array(COLOURS)
        assert row["labels"] == ";".join(names[truth]) and row["predicted"] == ";".join(names[own >= 0.5])
        found = list(map(float, filter(None, row["scores"].split(";"))))
        assert found == pytest.approx(own[own >= 0.5], abs=1e-3)
    with open(out / "classes.csv", newline="") as file:
        classes = list(csv.DictReader(file))
    for number, row in enumerate(classes):
        assert row["label"] == COLOURS[number] and int(row["clips"]) == labels[:, number].sum()
        expected = average_precision_score(labels[:, number], scores[:, number])
        assert float(row["average_precision"]) == pytest.approx(expected, abs=1e-4)

    card = ModelCard.load(out / "README.md")
    by_name = {result.metric_name: result for result in card.data.eval_results}
    assert set(by_name) == {"mean_average_precision", "micro_average_precision"}
    assert by_name["mean_average_precision"].metric_type == "mean_average_precision"
    assert by_name["mean_average_precision"].metric_value == round(results["eval_mean_average_precision"], 4)
    assert "over the 3 labels" in card.content and "Wilson" not in card.content and "sigmoid" in card.content

    look = ["--model_name_or_path", out, *clips]
    run(monkeypatch, evaluation, *look, "--output_dir", tmp_path / "one")
    found = read(tmp_path / "one" / "results.json")
    check_metrics(found, scores, labels)
    assert "16 clips, 1 x 1 views: mAP " in capsys.readouterr().out
    run(monkeypatch, evaluation, *look, "--num_clips", 2, "--num_crops", 2, "--output_dir", tmp_path / "four")
    saved = np.load(tmp_path / "four" / "scores.npz")
    model, processor = AutoModelForVideoClassification.from_pretrained(out), AutoVideoProcessor.from_pretrained(out)
    views = evaluation.Views(processor, processor, 2, 2)
    frames, _ = decode_video(paths[5], views.sample_frames, transform=views.frame_transform())
    with torch.no_grad():
        each = model.eval()(data.Normalize(processor, "cpu")(views([frames])["pixel_values"][0])).logits.sigmoid()
    with open(tmp_path / "four" / "predictions.csv", newline="") as file:
        place = [row["clip"] for row in csv.DictReader(file)].index(paths[5])
    np.testing.assert_allclose(saved["scores"][place], each.mean(0), atol=1e-5)
    check_metrics(read(tmp_path / "four" / "results.json"), saved["scores"], saved["labels"])

    found = pipeline("video-classification", model=str(out))(paths[7], function_to_apply="sigmoid")
    assert {entry["label"]: entry["score"] for entry in found} == pytest.approx(
        dict(zip(COLOURS, scores[7].tolist(), strict=True)), abs=1e-5
    )
    with pytest.raises(ValueError, match="was trained for several labels a clip, but these clips have one"):
        bars = tmp_path / "single" / "red"
        shutil.copytree(coloured / "validation", bars, ignore=shutil.ignore_patterns("*.jsonl"))
        run(monkeypatch, evaluation, *look[:2], "--validation_dir", bars.parent, "--use_cpu", "--output_dir", tmp_path)


def test_the_plain_loop_trains_and_resumes_on_a_list(coloured, tmp_path, monkeypatch):
    """On Charades' kind of list. Stopped after an epoch, it ends with the weights of a run that was not."""
    lists = {}
    for split in ("train", "validation"):
        lists[split], lines = tmp_path / f"{split}.csv", ["id,actions"]
        for row in map(json.loads, (coloured / split / "metadata.jsonl").read_text().splitlines()):
            name = f"{split}-{row['file_name']}"
            touch(tmp_path / "root" / name)
            shutil.copy(coloured / split / row["file_name"], tmp_path / "root" / name)
            actions = [f"c{COLOURS.index(colour):03d} 0.00 0.30" for colour in row["labels"]]
            lines.append(f"{Path(name).stem},{';'.join(actions)}")
        lists[split].write_text("\n".join(lines))
    command = [*LEARN, *TINY, "--video_root", tmp_path / "root", "--train_list", lists["train"]]
    command += ["--validation_list", lists["validation"], "--logging_steps", 1]
    with pytest.raises(ValueError, match="--label_smoothing_factor"):
        run(monkeypatch, plain_loop, *command, "--output_dir", tmp_path / "no", "--label_smoothing_factor", 0.1)
    run(monkeypatch, plain_loop, *command, "--output_dir", tmp_path / "whole")
    config = AutoModelForVideoClassification.from_pretrained(tmp_path / "whole").config
    assert config.problem_type == SEVERAL and config.id2label == {0: "c000", 1: "c001", 2: "c002"}
    results = read(tmp_path / "whole" / "eval_results.json")
    assert results["eval_micro_average_precision"] > 0.9 and "eval_accuracy" not in results
    save = plain_loop.Training.save_checkpoint

    def interrupt(self):
        save(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(plain_loop.Training, "save_checkpoint", interrupt)
        run(patch, plain_loop, *command, "--output_dir", tmp_path / "stopped")
    run(monkeypatch, plain_loop, *command, "--output_dir", tmp_path / "stopped")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert weights[0] == weights[1]


def test_the_leaderboards_entry_names_its_metric(tmp_path):
    finetune.write_eval_results(tmp_path, "you/clips", {"eval_mean_average_precision": 0.51239}, "the split test")
    (entry,) = parse_eval_result_entries(yaml.safe_load((tmp_path / ".eval_results" / "you--clips.yaml").read_text()))
    assert (entry.value, entry.notes) == (0.5124, "mean average precision on the split test")


def test_what_takes_one_label_a_clip_says_so(coloured, start, tmp_path, monkeypatch):
    clips = ["--train_dir", coloured / "train", "--label_column", "labels", "--output_dir", tmp_path]
    config = VideoMambaConfig(
        **{"hidden_size": 16, "num_hidden_layers": 1, "image_size": 32, "num_frames": 4, "num_labels": 3},
        **train_streaming.STREAMABLE,
    )
    VideoMambaForVideoClassification(config).save_pretrained(tmp_path / "stream")
    tiny_processor().save_pretrained(tmp_path / "stream")
    with pytest.raises(ValueError, match="Streams are trained with one label a clip"):
        run(monkeypatch, train_streaming, *clips, "--model_name_or_path", tmp_path / "stream")
    common = {"train_dir": [str(coloured / "train")], "label_column": ["labels"]}
    common["validation_dir"] = [str(coloured / "validation")]
    with pytest.raises(SystemExit, match="The study compares accuracies of clips with one label each"):
        study.check_data(common, ["train"])


# ---------------------------------------------------------------------------------------------------------------------
# The tools
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """The shipped checkpoint, as if it had been trained on clips with several labels, and its logits of one clip."""
    folder = shutil.copytree(CAMERA_MOTION, tmp_path_factory.mktemp("several") / "model")
    config = read(folder / "config.json")
    (folder / "config.json").write_text(json.dumps(config | {"problem_type": SEVERAL}))
    model, processor = (
        AutoModelForVideoClassification.from_pretrained(folder),
        AutoVideoProcessor.from_pretrained(folder),
    )
    with torch.no_grad():
        logits = model.eval()(**processor(str(classify_video.EXAMPLE), return_tensors="pt")).logits[0]
    scores = dict(zip(model.config.id2label.values(), logits.sigmoid().tolist(), strict=True))
    scores = dict(sorted(scores.items(), key=lambda pair: -pair[1]))
    holding = [label for label, score in scores.items() if score >= 0.5]
    assert len(holding) > 1 and sum(scores.values()) > 1.1, "else a softmax would do"
    return folder, scores, holding


def test_classify_video_prints_all_that_hold(several, monkeypatch, capsys):
    folder, scores, holding = several
    run(monkeypatch, classify_video, "--model", folder, "--top_k", 1)
    expected = [f"  {scores[label]:6.1%}  {label}" for label in holding]
    assert capsys.readouterr().out.splitlines()[1:] == expected


def test_classify_clips_has_a_column_of_all_that_hold(several, tmp_path, monkeypatch):
    folder, scores, holding = several
    source = tmp_path / "clips.csv"
    source.write_text(f"path,labels\n{classify_video.EXAMPLE},pan right;zoom in\n")
    run(monkeypatch, classify_clips, source, "--model", folder, "--output", tmp_path / "out", "--num_workers", 0)
    (row,) = load_dataset("parquet", data_files=str(tmp_path / "out" / "*.parquet"), split="train")
    assert row["predictions"] == holding and row["prediction"] == holding[0] and row["label"] == "pan right;zoom in"
    assert sorted(row["scores"]) == pytest.approx(sorted(scores.values()), abs=1e-5)
    # A data set's lists of names or numbers.
    names = ["a", "b"]
    assert classify_clips._name([1, 0], names) == "b;a" and classify_clips._name(["x"], None) == "x"


def test_segments_of_several_labels_overlap(tmp_path):
    """Worked out by hand: "a" holds in two windows of a shot and again in the next, "b" in the second and third."""
    scores = [{"a": 0.9, "b": 0.1}, {"b": 0.8, "a": 0.5}, {"b": 0.6, "a": 0.4}, {"a": 0.3, "b": 0.2}, {"a": 0.7}]
    places = [(0, 0, 2), (0, 1, 3), (0, 2, 4), (0, 3, 5), (1, 5, 7)]
    windows = [Window(*place, own) for place, own in zip(places, scores, strict=True)]
    segments = to_segments(windows, several=True)
    found = [(s.start, s.end, s.shot, s.label, round(s.score, 4)) for s in segments]
    assert found == [(0, 2.5, 0, "a", 0.7), (1.5, 3.5, 0, "b", 0.7), (5, 7, 1, "a", 0.7)]
    moments = to_moments(windows)
    parts = [(0, 1.5, "a"), (1.5, 2.5, "b; a"), (2.5, 3.5, "b"), (3.5, 5, ""), (5, 7, "a")]
    assert [(s.start, s.end, s.label) for s in moments] == parts
    write_tables(tmp_path, "film.mp4", "model", segments, windows, moments)
    assert (tmp_path / "chapters.vtt").read_text() == (
        "WEBVTT\n\n1\n00:00:00.000 --> 00:00:01.500\na\n\n2\n00:00:01.500 --> 00:00:02.500\nb; a\n\n"
        "3\n00:00:02.500 --> 00:00:03.500\nb\n\n4\n00:00:05.000 --> 00:00:07.000\na\n"
    )
    assert len((tmp_path / "tags.csv").read_text().splitlines()) == 4


def test_tag_video_writes_all_that_hold(several, tmp_path, monkeypatch, capsys):
    folder, *_ = several
    film = write_video(tmp_path / "film.mp4", 50)
    truth = tmp_path / "truth.csv"
    truth.write_text("start,end,label\n0,2,pan left\n0,2,zoom in\n")
    command = [film, "--model", folder, "--output", tmp_path / "out", "--no_cuts", "--overlay", "--device", "cpu"]
    run(monkeypatch, tag_video, *command, "--truth", truth)
    content = read(tmp_path / "out" / "tags.json")
    wanted = {label for window in content["windows"] for label, score in window["scores"].items() if score >= 0.5}
    assert {segment["label"] for segment in content["segments"]} == wanted
    logits = torch.tensor([[3.0, 2, 1, 0.5, 0.4, 0.3, -0.2, -1, -2], [-1.0] * 9])
    found = make_tagger(folder, "cpu", 25).best(logits)  # five labels, and more if more hold
    assert list(found[0].values()) == pytest.approx(logits[0, :6].sigmoid().tolist(), abs=1e-4) and len(found[1]) == 5
    (task,) = read(tmp_path / "out" / "label_studio.json")
    assert len(task["predictions"][0]["result"]) == len(content["segments"])
    printed = capsys.readouterr().out
    assert "F1@10/25/50" in printed and "seconds have the right label" not in printed
    for name in ("timeline.png", "overlay.mp4", "chapters.vtt"):
        assert (tmp_path / "out" / name).stat().st_size > 0


def test_a_film_in_which_nothing_holds(several, tmp_path, monkeypatch):
    monkeypatch.setattr("segments.THRESHOLD", 1.1)
    film = write_video(tmp_path / "film.mp4", 30)
    command = [film, "--model", several[0], "--output", tmp_path / "out", "--no_cuts", "--overlay", "--device", "cpu"]
    run(monkeypatch, tag_video, *command)
    assert read(tmp_path / "out" / "tags.json")["segments"] == []
    assert (tmp_path / "out" / "chapters.vtt").read_text().strip() == "WEBVTT"
