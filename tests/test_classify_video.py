"""examples/tools/classify_video.py, and what all tools say of a model that is not there."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import classify_video
from modeling_videomamba.loading_videomamba import unloadable_reason
from tool_models import CAMERA_MOTION


# Runs the script and says, on the last line, how often garbage was looked for with PyTorch's objects not yet set
# aside, how many objects are, whether garbage is looked for again, and what was imported.
WATCHED = """
import gc, json, runpy, sys
looks = []
gc.callbacks.append(lambda phase, _: looks.append("torch" in sys.modules and not gc.get_freeze_count()))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print(json.dumps([sum(looks), gc.get_freeze_count(), gc.isenabled(), sorted(sys.modules)]))
"""


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the script; returns its exit status and what it prints to each of the two outputs."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["classify_video.py", *map(str, arguments)])
        try:
            classify_video.main()
            status = 0
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


def test_what_cannot_be_read_is_named_and_the_others_are_done(run, tmp_path):
    clip = classify_video.EXAMPLE
    status, printed, errors = run(tmp_path / "missing.mp4", tmp_path, clip, "--top_k", 1)
    assert status == 1 and f"There is no file {tmp_path / 'missing.mp4'}" in errors
    assert f"{tmp_path} is a folder" in errors and "videomamba-classify-clips" in errors
    assert printed.splitlines()[0].startswith("pan-right.mp4 (") and printed.split()[-2:] == ["pan", "right"]
    assert run(clip)[0] == 0


def test_json_and_csv_hold_what_is_printed(run, tmp_path):
    name = str(tmp_path / 'a "quoted", clip.mp4')
    shutil.copy(classify_video.EXAMPLE, name)
    _, text, _ = run(name, "--top_k", 2)
    lines = [json.loads(line) for line in run(name, name, "--format", "json", "--top_k", 2)[1].splitlines()]
    assert len(lines) == 2 and lines[0] == lines[1] and lines[0]["video"] == name
    rows = list(csv.DictReader(io.StringIO(run(name, "--format", "csv", "--top_k", 2)[1])))
    scores = [(score["label"], score["score"]) for score in lines[0]["scores"]]
    assert [(row["label"], float(row["score"])) for row in rows] == scores and rows[0]["video"] == name
    assert text.splitlines()[1:] == [f"  {score:6.1%}  {label}" for label, score in scores]


def test_a_mistyped_model_is_no_question_to_the_hub(run, tmp_path, monkeypatch):
    """Tests have no network: were the Hub asked, the message would be another."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(CAMERA_MOTION, tmp_path / "models" / "my-classifier")
    (tmp_path / "empty").mkdir()
    for name, hint in (
        ("my-clasifier", None),
        ("models/my-clasifier", "Did you mean models/my-classifier?"),
        ("models", "Name one of the folders in it: my-classifier."),
        ("empty", None),
        ("./you/videomamba", None),
        (tmp_path / "you" / "none", None),
    ):
        message, printed, _ = run(classify_video.EXAMPLE, "--model", name)
        assert str(name) in message and not printed
        assert message.endswith(hint or "config.json." if name == "empty" else hint or "of the form owner/name.")
    assert unloadable_reason("you/videomamba-k400") is None and unloadable_reason("models/my-classifier") is None


@pytest.mark.slow
def test_a_cold_start_does_only_what_one_clip_needs():
    """
    No search for garbage among what the imports bring, and no import of what other tools use. (Of the extras,
    transformers imports accelerate, if it is there.)
    """
    script = Path(classify_video.__file__)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(script.parent), str(script.parents[2])])}
    command = [sys.executable, "-c", WATCHED, str(script), "--top_k", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    *_, label, watched = done.stdout.splitlines()
    looks, set_aside, looks_again, modules = json.loads(watched)
    assert label.endswith("pan right") and {"torch", "modeling_videomamba"} <= set(modules)
    assert looks == 0 and set_aside > 100_000 and looks_again
    others = {"datasets", "evaluate", "gradio", "matplotlib", "onnxruntime", "pandas", "peft", "pyarrow", "sklearn"}
    assert others & set(modules) == set()


def test_outside_a_clone_one_sentence_says_what_to_give(monkeypatch, capsys, tmp_path):
    import tool_models

    monkeypatch.setattr(tool_models, "CAMERA_MOTION", tmp_path / "none")
    monkeypatch.setattr(sys, "argv", ["videomamba-classify", "clip.mp4"])
    with pytest.raises(SystemExit):
        classify_video.parse_arguments()
    assert capsys.readouterr().err.splitlines()[-1].endswith("the following arguments are required: --model")
