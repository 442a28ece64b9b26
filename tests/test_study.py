"""The study: frame orders, the plan of every table, resumption, finished tables, and errors before anything runs."""

import csv
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments

import evaluate_video_classification as evaluation
import make_camera_motion_clips
import study
import study_tables
import video_classification_model as models
from modeling_videomamba import (
    VideoMambaConfig,
    VideoMambaForImageClassification,
    VideoMambaForVideoClassification,
    VideoMambaImageProcessor,
    VideoMambaVideoProcessor,
)
from video_classification_arguments import DataArguments, ModelArguments


CAMERA = Path(__file__).resolve().parent.parent / "model_cards" / "videomamba-tiny-camera-motion"

# Section 5.2 of the paper, which counts from 1.
PATTERNS = {
    "interleaved": [1, 8, 2, 7, 3, 6, 4, 5],
    "pairwise": [1, 2, 7, 8, 5, 6, 3, 4],
    "block-wise": [5, 6, 7, 8, 1, 2, 3, 4],
    "sequential": [1, 2, 3, 4, 5, 6, 7, 8],
}


@pytest.mark.parametrize("name", PATTERNS)
def test_frame_orders(name):
    assert [frame + 1 for frame in evaluation.frame_order(name, 8)] == PATTERNS[name]
    for count in (2, 4, 6, 16, 32):
        assert sorted(evaluation.frame_order(name, count)) == list(range(count))
    by_hand = {"interleaved": [0, 3, 1, 2], "pairwise": [0, 1, 2, 3], "block-wise": [2, 3, 0, 1]}
    assert evaluation.frame_order(name, 4) == by_hand.get(name, [0, 1, 2, 3])
    if name == "sequential":
        assert evaluation.frame_order(name, 5) == [0, 1, 2, 3, 4]
    else:
        with pytest.raises(ValueError, match=f"{name} order needs an even number of frames.* 5"):
            evaluation.frame_order(name, 5)


def test_an_evaluation_shows_the_frames_in_their_order():
    """A clip that grows lighter, of which each view is shown in the order asked for."""
    frames = torch.arange(40)[:, None, None, None].expand(40, 3, 32, 32).byte() * 6
    processor = VideoMambaVideoProcessor(
        num_frames=8, frame_stride=2, size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )

    class Metadata:
        total_num_frames = 40

    for name, pattern in PATTERNS.items():
        views = evaluation.Views(processor, processor, 2, 1, name)
        light = views([frames[views.sample_frames(Metadata)]])["pixel_values"][0].float().mean((2, 3, 4))
        assert light.shape == (2, 8)
        for view in light:
            assert view.argsort().argsort().tolist() == [place - 1 for place in pattern]


# ---------------------------------------------------------------------------------------------------------------------
# Plans
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "image"
    config = VideoMambaConfig(
        hidden_size=16, num_hidden_layers=1, image_size=32, num_frames=1, tubelet_size=1, num_labels=3
    )
    VideoMambaForImageClassification(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    VideoMambaImageProcessor(single_images=True, size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    return folder


COMMON = "--train_dir a/train --validation_dir a/validation --hidden_size 16 --num_hidden_layers 1 --image_size 32"


def commands(capsys, *words):
    """What a dry run prints, as (script, flags)."""
    study.main([*map(str, words), "--dry_run", "--output_dir", "out", "--", *COMMON.split()])
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    return [(Path(line[1]).name, line[2:]) for line in lines]


def parsed(script, flags):
    """Flags as the script itself understands them."""
    kinds = {
        "run_video_classification.py": (ModelArguments, DataArguments, TrainingArguments),
        "evaluate_video_classification.py": (
            ModelArguments,
            DataArguments,
            evaluation.EvaluationArguments,
        ),
    }[script]
    return HfArgumentParser(kinds).parse_args_into_dataclasses([*flags, *["--use_cpu"] * (len(kinds) == 3)])


@pytest.mark.parametrize("table", [*study_tables.TABLES, *study_tables.PUBLISHED])
def test_the_scripts_understand_every_command(table, capsys, image_checkpoint):
    options = ["--seeds", 0, 1]
    if table not in ("table6", "single_frame"):
        options += ["--image_checkpoint", image_checkpoint]
    options += ["--video_checkpoint", CAMERA] if table == "table4" else []
    options += ["--checkpoints", CAMERA] if table in study_tables.PUBLISHED else []
    found = commands(capsys, table, *options)
    understood = [parsed(*each) for each in found]
    folders = [each[2].output_dir for each in understood]
    assert len(set(folders)) == len(folders)
    rows = len(study_tables.TABLES[table].rows) if table in study_tables.TABLES else None
    expected = 1 if rows is None else 2 * rows + (2 if table == "table1" else 0)
    assert len(found) == expected
    for (script, _), (_, _, training) in zip(found, understood, strict=True):
        if script.startswith("run"):
            assert training.do_train and training.do_eval and training.seed in (0, 1)


def test_rows_change_what_they_say(capsys, image_checkpoint):
    def configs(table):
        kinds = [parsed(*each) for each in commands(capsys, table)]
        return [models.load_model(model, ["a", "b"], training=True)[0].config for model, *_ in kinds]

    assert [each.backward_scan for each in configs("table2")] == ["spatial", "temporal", "spatiotemporal"]
    assert {each.class_token_position for each in configs("table2")} == {"none"}
    assert [each.num_frames for each in configs("table5")] == [8, 16, 32]
    assert [each.hidden_size for each in configs("table6")] == [192, 384]
    one, many = configs("single_frame")
    assert one.grid_size == (1, 2, 2) and many.grid_size == (8, 2, 2)

    kinds = [
        parsed(*each) for each in commands(capsys, "table4", "--image_checkpoint", "i", "--video_checkpoint", "v")
    ]
    recipe = [(each[1].rand_augment, each[2].label_smoothing_factor) for each in kinds]
    assert recipe == [(0, 0.0), (0, 0.0), (2, 0.0), (2, 0.1)]  # one thing after the other
    assert [Path(each[0].model_name_or_path).name for each in kinds] == ["i-expand-16", "v", "v", "v"]

    orders = [parsed(*each)[2].frame_order for each in commands(capsys, "table1", "--checkpoints", CAMERA)]
    assert orders == ["interleaved", "pairwise", "block-wise", "sequential"]


def test_runs_that_tables_share_are_made_once(capsys):
    alone = [len(commands(capsys, table)) for table in ("table2", "table5", "single_frame")]
    assert alone == [3, 3, 2]
    assert len(commands(capsys, "table5", "single_frame")) == 4  # both have 16 frames


@pytest.mark.parametrize("how", ["expand", "none", "interpolate-spatial"])
@pytest.mark.parametrize("bare", [False, True])
def test_starts_are_the_image_checkpoint_inflated(image_checkpoint, tmp_path, how, bare):
    study.make_start(tmp_path / "start", str(image_checkpoint), how, "8", bare, ["3"])
    assert [path.name for path in tmp_path.iterdir()] == ["start"]
    image = VideoMambaForImageClassification.from_pretrained(image_checkpoint)
    config = VideoMambaConfig.from_pretrained(tmp_path / "start", num_labels=5)
    # As the training script loads it: sizes that differ would be drawn at random.
    model, report = VideoMambaForVideoClassification.from_pretrained(
        tmp_path / "start", config=config, output_loading_info=True
    )
    assert set(report["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert not report["mismatched_keys"] and not report["unexpected_keys"]
    assert config.class_token_position == ("none" if bare else "first") and config.num_frames == 8
    torch.testing.assert_close(
        model.videomamba.layers[0].mixer.A_log, image.videomamba.layers[0].mixer.A_log, rtol=0, atol=0
    )
    if how == "expand":
        patches = model.videomamba.embeddings.position_embeddings[0, 0 if bare else 1 :].view(4, 4, 16)
        theirs = image.videomamba.embeddings.position_embeddings[0, 1:]
        torch.testing.assert_close(patches, theirs.expand(4, -1, -1), rtol=0, atol=0)
    processor = VideoMambaVideoProcessor.from_pretrained(tmp_path / "start")
    assert (processor.num_frames, processor.frame_stride) == (8, 3)


def test_a_start_of_one_frame_reads_one_frame(image_checkpoint, tmp_path):
    study.make_start(tmp_path / "start", str(image_checkpoint), "expand", "1", True, None)
    assert VideoMambaVideoProcessor.from_pretrained(tmp_path / "start").num_frames == 1
    assert VideoMambaConfig.from_pretrained(tmp_path / "start").grid_size == (1, 2, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Carrying out, by a script that stands in for the training script: it is quick, and says how often it ran
# ---------------------------------------------------------------------------------------------------------------------

STAND_IN = """
import json, os, sys, zlib
from pathlib import Path
words = sys.argv[1:]
folder, seed = Path(words[words.index("--output_dir") + 1]), int(words[words.index("--seed") + 1])
with open("ran.txt", "a") as log:
    log.write(folder.name + "\\n")
if os.path.exists("break") and len(Path("ran.txt").read_text().split()) == 3:
    os.remove("break")
    sys.exit("the third run was killed")
scan = words[words.index("--config_overrides") + 1]
right = {"spatial": 1, "temporal": 2}.get(scan.split(",")[0].split("=")[1], 3) + seed
rows = [f"{clip},a,{'a' if clip < right else 'b'}" for clip in range(4)]
(folder / "predictions.csv").write_text("\\n".join(["clip,label,predicted", *rows]) + "\\n")
(folder / "eval_results.json").write_text(json.dumps({"eval_accuracy": right / 4}))
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    (tmp_path / "run_video_classification.py").write_text(STAND_IN)
    monkeypatch.setattr(study, "TRAINING", tmp_path)
    monkeypatch.setattr(study, "check", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table2(folder, *options):
    study.main(["table2", "--output_dir", str(folder), "--seeds", "0", "1", *options, "--", "--train_dir", "x"])


def test_a_study_that_was_killed_ends_with_the_same_table(stand_in, capsys):
    table2(stand_in / "whole", "--parallel", "3")
    whole = (stand_in / "whole" / "table2.md").read_text()
    # By hand: the seeds have 1 and 2, 2 and 3, 3 and 4 of four clips right.
    lines = whole.splitlines()
    assert "| spatial | 37.5 ± 17.7 | 2 | – | 61.9 | 43.3 |" in lines
    assert any(line.startswith("| temporal | 62.5 ± 17.7 | 2 | +25.0 (") for line in lines)
    assert any(line.startswith("| spatio-temporal | 87.5 ± 17.7 | 2 | +25.0 (") for line in lines)
    with open(stand_in / "whole" / "table2.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header[-2:] == ["paper: SSV2", "paper: HMDB51"] and [row[0] for row in rows][0] == "spatial"
    assert (stand_in / "whole" / "table2.png").read_bytes()[:4] == b"\x89PNG"

    (stand_in / "ran.txt").unlink()
    (stand_in / "break").touch()
    with pytest.raises(SystemExit, match="(?s)ended with status 1.*the third run was killed"):
        table2(stand_in / "broken")
    assert not (stand_in / "broken" / "table2.md").exists()
    table2(stand_in / "broken")
    assert (stand_in / "broken" / "table2.md").read_text() == whole
    ran = (stand_in / "ran.txt").read_text().split()
    assert len(ran) == 7 and len(set(ran)) == 6  # only the killed one ran twice
    table2(stand_in / "broken")
    assert len((stand_in / "ran.txt").read_text().split()) == 7


def test_difference_is_of_the_same_clips(tmp_path):
    even = np.arange(100) % 2 == 0
    runs = []
    for name, right in (("first", even), ("second", ~even)):
        rows = [f"{clip},a,{'a' if hit else 'b'}" for clip, hit in enumerate(right)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "predictions.csv").write_text("clip,label,predicted\n" + "\n".join(rows) + "\n")
        runs.append(study.Run(tmp_path / name, "", {}, "", ""))
    assert study.difference(runs[:1], runs[:1]) == (0, 0, 0)
    mean, low, high = study.difference(runs[:1], runs[1:])
    assert mean == 0 and -25 < low < -15 and 15 < high < 25  # ± 2 · 100 / sqrt(100)


# ---------------------------------------------------------------------------------------------------------------------
# Errors, and tables that need no training
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for label in ("pan left", "zoom in"):
        (folder / "two" / label).mkdir(parents=True)
        make_camera_motion_clips.write_demo_clip(folder / "two" / label / "a.mp4", motion=label)
    (folder / "one" / "zoom in").mkdir(parents=True)
    shutil.copy(folder / "two" / "zoom in" / "a.mp4", folder / "one" / "zoom in")
    return folder


def test_errors_before_anything_trains(tmp_path, clips, capsys, monkeypatch):
    monkeypatch.setattr(study, "carry_out", lambda *_: pytest.fail("something ran"))

    def run(*words, common=()):
        study.main([*map(str, words), "--output_dir", str(tmp_path / "out"), "--", *map(str, common)])

    two = ["--train_dir", clips / "two", "--validation_dir", clips / "two"]
    with pytest.raises(SystemExit):
        run("table10", common=two)
    assert "table10" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="table3 needs --image_checkpoint"):
        run("table3", common=two)
    with pytest.raises(SystemExit, match="nowhere cannot be read"):
        run("table3", "--image_checkpoint", tmp_path / "nowhere", common=two)
    with pytest.raises(SystemExit, match="table6 needs two --image_checkpoint"):
        run("table6", "--image_checkpoint", CAMERA, common=two)
    for table in ("table5", "table6", "single_frame"):
        with pytest.raises(SystemExit, match=f"{table} compares models of several sizes"):
            run(table, common=[*two, "--model_name_or_path", CAMERA])
    with pytest.raises(SystemExit, match="one class.*zoom in"):
        run("table2", common=["--train_dir", clips / "one", "--validation_dir", clips / "one"])
    with pytest.raises(SystemExit, match="an even number of frames.* 7 "):
        run("table1", common=[*two, "--num_frames", "7"])
    with pytest.raises(SystemExit, match="no folder .*missing"):
        run("table2", common=["--train_dir", clips / "missing", "--validation_dir", clips / "two"])
    with pytest.raises(SystemExit, match="no recipe file"):
        run("table2", common=["--recipe", "missing.args"])
    assert not (tmp_path / "out").exists()


def test_published_tables_and_figure_1_need_no_data(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    study.main(["table9", "fig1", "--output_dir", str(tmp_path)])
    assert (
        "| VideoMamba | Mamba | IN-1K | 32 | 5 × 3 | 68 | 26.8 | 77.7 | 93.3 |" in (tmp_path / "table9.md").read_text()
    )
    assert "| VideoMamba, 16 frames | 34.2 | 39.1 | – | – | 58.9 | 63.7 | 76.1 |" in (tmp_path / "fig1.md").read_text()
    assert (tmp_path / "fig1.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(SystemExit, match="no model Swin; there are VideoMamba"):
        study.main(["fig1", "--output_dir", str(tmp_path), "--accuracy", "Swin=3"])


@pytest.mark.slow
def test_multi_view_accuracy_of_a_checkpoint(tmp_path, clips):
    """The whole way, by the evaluation script itself."""
    common = f"--validation_dir {clips / 'two'} --use_cpu --per_device_eval_batch_size 1"
    study.main(["table8", "--output_dir", str(tmp_path), "--checkpoints", str(CAMERA), "--", *common.split()])
    row = (tmp_path / "table8.md").read_text().splitlines()[-1]
    assert row.startswith("| **videomamba-tiny-camera-motion** | Mamba | – | 16 | 2 × 3 |") and "| 2.6 |" in row
    result = next((tmp_path / "runs").glob("*/result.json"))
    figures = json.loads(result.read_text())["figures"]
    assert figures["clips"] == 2 and figures["views"] == "2 x 3"
    assert f"{100 * figures['accuracy']:.1f}" in row


@pytest.mark.slow
@pytest.mark.timeout(900)  # five scripts one after the other
def test_a_table_from_training_to_the_plot(tmp_path, clips, image_checkpoint):
    """Table 1 by the scripts themselves, from an image checkpoint: one training, four evaluations."""
    common = f"--train_dir {clips / 'two'} --validation_dir {clips / 'two'} --use_cpu --max_steps 1 --report_to none"
    options = ["--image_checkpoint", str(image_checkpoint), "--output_dir", str(tmp_path)]
    study.main(["table1", *options, "--", *common.split(), "--per_device_train_batch_size", "2"])
    lines = (tmp_path / "table1.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[4:]] == [
        "| interleaved",
        "| pairwise",
        "| block-wise",
        "| sequential",
    ]
    assert (tmp_path / "table1.png").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)  # four trainings one after the other
def test_two_processes_make_the_same_table(tmp_path, clips):
    """The same two clips to a step, both in one process or one in each of two: the same losses but for rounding."""
    losses, tables = [], []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        common = f"--train_dir {clips / 'two'} --validation_dir {clips / 'two'} --use_cpu --report_to none"
        common += " --hidden_size 16 --num_hidden_layers 1 --image_size 32 --num_frames 4 --max_steps 3"
        common += f" --logging_steps 1 --learning_rate 1e-2 --per_device_train_batch_size {2 // processes}"
        options = ["--output_dir", str(folder), "--num_processes", str(processes)]
        study.main(["single_frame", *options, "--", *common.split()])
        tables.append((folder / "single_frame.md").read_text())
        runs = sorted(folder.glob("runs/*/"), key=lambda run: (run / "config.json").read_text())
        history = [json.loads((run / "trainer_state.json").read_text())["log_history"] for run in runs]
        losses.append([entry["loss"] for run in history for entry in run if "loss" in entry])
        losses[-1] += [json.loads((run / "eval_results.json").read_text())["eval_loss"] for run in runs]
    assert len(set(losses[0])) == 8, "three steps and an evaluation of each of two runs"
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert tables[1] == tables[0]


@pytest.mark.gpu
def test_memory_of_figure_1():
    inference, training = study.measure_memory("VideoMamba-S", 16)
    assert 0.1 < inference < training


def test_the_command_line_is_the_scripts_own(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["study.py", "--help"])
    with pytest.raises(SystemExit):
        study.main()
    assert "table1" in capsys.readouterr().out


@pytest.mark.slow
def test_the_way_to_the_rows_of_table_7(bars, python, tmp_path):
    """The page's commands after the conversion, in their order, with a tiny model and clips of two labels."""
    config = {"hidden_size": 16, "num_hidden_layers": 1, "image_size": 32, "num_frames": 16, "num_labels": 51}
    VideoMambaForVideoClassification(VideoMambaConfig(**config)).save_pretrained(tmp_path / "in1k")
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    VideoMambaVideoProcessor(frame_stride=None, **sizes).save_pretrained(tmp_path / "in1k")
    rows = [("youtube_id", "time_start", "time_end", "label")]
    (tmp_path / "hmdb51" / "splits").mkdir(parents=True)
    (tmp_path / "kinetics" / "clips").mkdir(parents=True)
    for label in sorted(path.name for path in (bars / "train").iterdir()):
        (tmp_path / "hmdb51" / "videos" / label).mkdir(parents=True)
        files = [path for split in ("train", "validation") for path in sorted((bars / split / label).iterdir())][-4:]
        names = [f"{label} {number}.mp4" for number in range(4)]
        for file, name, number in zip(files, names, range(4), strict=True):
            shutil.copy(file, tmp_path / "hmdb51" / "videos" / label / name)
            shutil.copy(file, tmp_path / "kinetics" / "clips" / f"{label}{number}_000000_000010.mp4")
            rows.append((f"{label}{number}", "0", "10", label))
        text = "".join(f"{name} {use}\n" for name, use in zip(names, "1122", strict=True))
        (tmp_path / "hmdb51" / "splits" / f"{label}_test_split1.txt").write_text(text)
    for name in ("train", "val"):
        with open(tmp_path / "kinetics" / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows(rows)

    page = (CAMERA.parents[1] / "docs" / "study.md").read_text()
    page = page.split("## Table 7 on HMDB51, step by step")[1].split("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)[1:]
    variables, small = {}, "--use_cpu --max_steps 1 --per_device_train_batch_size 2 --image_size 32".split()
    for line in filter(str.strip, re.sub(r"\\\n", "", "".join(blocks)).splitlines()):
        if assigned := re.fullmatch(r'\s*(\w+)="(.*)"', line):
            variables[assigned[1]] = assigned[2]
            continue
        for name, value in variables.items():
            line = re.sub(rf"\${name}\b", lambda match, value=value: value, line)
        words = [word for word in shlex.split(line.replace("--torch_compile True", "")) if word != "--bf16"]
        words[words.index("--dataloader_num_workers") + 1] = "0"
        script = CAMERA.parents[1] / words[1]
        words = [str(CAMERA.parents[1] / word) if word.endswith(".args") else word for word in words[2:]]
        python.run([script, *words, *(["--use_cpu"] if script.name == "study.py" else small)], tmp_path)
    for name, frames in (("in1k-16", 16), ("in1k-32", 32), ("k400-hmdb51-16", 16), ("k400-hmdb51-32", 32)):
        processor = VideoMambaVideoProcessor.from_pretrained(tmp_path / name)
        assert (processor.num_frames, processor.frame_stride) == (frames, 2)
        assert VideoMambaConfig.from_pretrained(tmp_path / name).num_frames == frames
    table = (tmp_path / "study" / "table7.csv").read_text()
    assert all(name in table for name in ("in1k-16", "in1k-32", "k400-hmdb51-16", "k400-hmdb51-32"))
