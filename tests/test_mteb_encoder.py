"""The wrapper for mteb's video tasks, on a tiny task of files of this machine."""

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoVideoProcessor

from modeling_videomamba import VideoMambaConfig, VideoMambaForVideoClassification, VideoMambaVideoProcessor


mteb = pytest.importorskip("mteb", reason="needs mteb, whose tasks the wrapper is for")

from mteb.abstasks.classification import AbsTaskClassification  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402

from mteb_encoder import BENCHMARK, VideoMambaEncoder  # noqa: E402


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    config = VideoMambaConfig(hidden_size=32, num_hidden_layers=1, num_frames=8, image_size=32, patch_size=8)
    VideoMambaForVideoClassification(config).save_pretrained(tmp_path)
    size = {"height": 32, "width": 32}
    VideoMambaVideoProcessor(num_frames=8, frame_stride=None, size=size, crop_size=size).save_pretrained(tmp_path)
    return tmp_path


def make_task(bars):
    """Two kinds of clips, as mteb's own tasks of video classification have them."""

    class MovingBars(AbsTaskClassification):
        metadata = TaskMetadata(
            name="MovingBars",
            description="bars that move to the left or to the right",
            dataset={"path": "local/bars", "revision": "1"},
            type="VideoClassification",
            category="v2c",
            modalities=["video"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="accuracy",
        )
        input_column_name = "video"
        samples_per_label, n_experiments = 4, 2

        def load_data(self, **kwargs):
            def rows(split):
                files = sorted((bars / split).rglob("*.mp4"))
                labels = sorted({file.parent.name for file in files})
                columns = {"video": list(map(str, files)), "label": [labels.index(f.parent.name) for f in files]}
                features = datasets.Features(video=datasets.Video(decode=False), label=datasets.Value("int64"))
                return datasets.Dataset.from_dict(columns, features)

            self.dataset = datasets.DatasetDict(train=rows("train"), test=rows("validation"))
            self.data_loaded = True

    return MovingBars()


def test_a_task_of_mteb_runs_and_the_embeddings_are_the_pooled_states(checkpoint, bars, tmp_path):
    encoder, seen, encode = VideoMambaEncoder(str(checkpoint), "cpu"), [], VideoMambaEncoder.encode

    def remember(*args, **kwargs):
        seen.append(encode(encoder, *args, **kwargs))
        return seen[-1]

    encoder.encode = remember
    results = mteb.evaluate(encoder, make_task(bars), cache=mteb.ResultCache(tmp_path / "results"))
    (result,) = results
    assert result.task_name == "MovingBars" and 0 <= result.get_score() <= 1
    files = sorted((bars / "validation").rglob("*.mp4"))
    model, processor = AutoModel.from_pretrained(checkpoint), AutoVideoProcessor.from_pretrained(checkpoint)
    with torch.no_grad():
        expected = model(**processor(list(map(str, files)), return_tensors="pt")).pooler_output.numpy()
    rows = np.concatenate(seen)
    for row in expected:
        assert np.abs(rows - row).max(1).min() < 1e-5


def test_the_benchmark_that_is_run_asks_for_videos_alone():
    tasks = list(mteb.get_benchmark(BENCHMARK))
    assert len(tasks) > 5 and all(task.metadata.modalities == ["video"] for task in tasks)
    assert mteb.get_tasks(tasks=["HMDB51Classification"])  # of the first lines of the script
