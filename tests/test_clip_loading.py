"""Many clips through worker processes: the processor's pixels, the model's scores, nothing lost or left behind."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import get_worker_info

from modeling_videomamba import (
    ClipLoader,
    VideoMambaConfig,
    VideoMambaForVideoClassification,
    VideoMambaVideoProcessor,
    predict_clips,
)
from modeling_videomamba.clip_loading import _Device, _Ring
from video_files import write_video


SIZES = ((48, 64), (64, 48), (40, 100), (32, 32))  # (height, width) of the clips, in turn
BAD = 5  # the number of the clip that is none


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Fourteen clips of four frame sizes, the sixth of them damaged."""
    folder = tmp_path_factory.mktemp("many clips")
    files = [write_video(folder / f"{i}.mp4", 12 + i, size=SIZES[i % 4]) for i in range(14)]
    (folder / "5.mp4").write_text("not a clip")
    return files


@pytest.fixture(scope="module")
def processor():
    size = {"height": 32, "width": 32}
    return VideoMambaVideoProcessor(num_frames=4, size={"shortest_edge": 36}, crop_size=size)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = VideoMambaConfig(hidden_size=32, num_hidden_layers=2, num_frames=4, image_size=32, num_labels=3)
    return VideoMambaForVideoClassification(config).eval()


def collect(batches):
    """{number of a clip: its pixels}, the errors, and in which batch each clip came."""
    pixels, errors, places = {}, {}, {}
    for batch in batches:
        pixels |= dict(zip(batch.clips, batch.pixel_values if batch.clips else (), strict=True))
        places |= dict.fromkeys(batch.clips, batch.index)
        errors |= batch.errors
    return pixels, errors, places


def check_pixels(files, processor, batches):
    pixels, errors, places = collect(batches)
    assert sorted(pixels) == [i for i in range(14) if i != BAD]
    assert list(errors) == [BAD] and "begins with the text 'not a clip'" in errors[BAD]
    for number, clip in pixels.items():
        torch.testing.assert_close(
            clip, processor(files[number], return_tensors="pt")["pixel_values"][0], rtol=0, atol=0
        )
        assert places[number] == number // 4


@pytest.mark.parametrize("slot_bytes", [0, 2**20, 4 * 3 * 48 * 64])  # the last: some clips fit, some are too large
def test_pixels_are_those_of_the_processor(files, processor, slot_bytes):
    loader = ClipLoader(files, processor, 4, slot_bytes=slot_bytes)
    assert len(loader) == 4
    check_pixels(files, processor, loader)
    check_pixels(files, processor, loader)  # and once more


def test_clips_of_one_size_are_resized_together(files, processor, monkeypatch):
    """Of the first four, three have one size; of the next four, two have one and two another, in turns."""
    batches, together, resize = [[0, 4, 1, 8, 9], [2, 12, 6, 4, 3], [13]], [], _Device.resize

    def watched(device):
        together.append(sorted(Counter(clip.frames.shape for clip in device.large).values()))
        resize(device)

    monkeypatch.setattr(_Device, "resize", watched)
    for batch in ClipLoader(files, processor, batch_sampler=batches, slot_bytes=2**20):
        assert batch.clips == batches[batch.index]
        expected = processor([files[i] for i in batch.clips], return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(batch.pixel_values, expected, rtol=0, atol=0)
    assert together == [[1, 3], [1], [2, 2], [1], [1]]


def test_a_clip_that_cannot_be_read_and_is_asked_for_twice(files, processor):
    batches = list(ClipLoader(files, processor, batch_sampler=[[BAD, 0, BAD], [1]]))
    assert [(batch.clips, list(batch.errors)) for batch in batches] == [([0], [BAD]), ([1], [])]


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_however_workers_start(files, processor, start):
    check_pixels(files, processor, ClipLoader(files, processor, 4, num_workers=3, multiprocessing_context=start))


def test_a_section_of_each_file(files):
    processor = VideoMambaVideoProcessor(num_frames=2, start_seconds=0.2, crop_size={"height": 32, "width": 32})
    (batch,) = ClipLoader(files[:2], processor)
    expected = [processor(file, return_tensors="pt")["pixel_values"] for file in files[:2]]
    torch.testing.assert_close(batch.pixel_values, torch.cat(expected), rtol=0, atol=0)


def test_clips_that_fit_no_slot(files):
    """How many frames there will be is not known, nor how large they are: then the loader's pipe carries them."""
    processor = VideoMambaVideoProcessor(num_frames=None, fps=25, do_center_crop=False, do_resize=False)
    (batch,) = ClipLoader(files[:1], processor)
    torch.testing.assert_close(batch.pixel_values, processor(files[0], return_tensors="pt")["pixel_values"])
    assert batch.pixel_values.shape == (1, 12, 3, 48, 64)


def test_scores_are_those_of_the_model(files, processor, model):
    def score(pixel_values):
        assert torch.is_inference_mode_enabled()
        return {"scores": model(pixel_values).logits.softmax(-1)}

    loader = ClipLoader(files, processor, batch_sampler=[[13, 0], [BAD], [2, BAD, 3, 1]])
    results = [(batch.clips, outputs) for batch, outputs in predict_clips(score, loader)]
    assert [clips for clips, _ in results] == [[13, 0], [], [2, 3, 1]]
    assert results[1][1] == {}
    assert not torch.is_inference_mode_enabled()
    for clips, outputs in (results[0], results[2]):
        inputs = processor([files[i] for i in clips], return_tensors="pt")
        with torch.no_grad():
            expected = model(**inputs).logits.softmax(-1)
        torch.testing.assert_close(outputs["scores"], expected, rtol=0, atol=1e-5)


def test_what_the_model_raises_arrives(files, processor):
    def fail(pixel_values):
        raise RuntimeError("out of memory, say")

    with pytest.raises(RuntimeError, match="out of memory, say"):
        list(predict_clips(fail, ClipLoader(files, processor)))


def test_bad_arguments(files, processor):
    with pytest.raises(ValueError, match="`batch_size` is 0"):
        ClipLoader(files, processor, 0)


def test_little_shared_memory_is_the_loader_s_own(files, processor, monkeypatch):
    """Else two loaders would count on the same memory, and a worker would die of a bus error. Of much, none is taken
    before it is used: that would take time."""

    def taken(free):
        pages, reserve = [], os.posix_fallocate
        monkeypatch.setattr(os, "fstatvfs", lambda _: SimpleNamespace(f_bavail=free, f_frsize=1))
        monkeypatch.setattr(os, "posix_fallocate", lambda *where: pages.append(where[-1]) or reserve(*where))
        ring = _Ring(2, 2**22)
        monkeypatch.undo()
        return sum(pages) >= ring.bytes.nbytes, 512 * os.fstat(ring.memory._state[0][0].fd).st_blocks

    asked, held = taken(2**26)
    assert asked and held >= 2**23
    asked, held = taken(2**33)
    assert not asked and held < 2**23


def test_where_another_process_was_faster_the_memory_is_looked_for_once_more(monkeypatch):
    calls = []

    def full(*where):
        calls.append(where)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fstatvfs", lambda _: SimpleNamespace(f_bavail=2**26, f_frsize=1))
    monkeypatch.setattr(os, "posix_fallocate", full)
    assert _Ring(2, 2**22).bytes.shape == (2, 2**22) and len(calls) == 2


class SlowFirst(list):
    """Clips of which the first takes long."""

    def __getitem__(self, number):
        if number == 0 and get_worker_info() is not None:
            time.sleep(3)
        return super().__getitem__(number)


@pytest.mark.slow
def test_a_slow_clip_does_not_hold_up_the_others(files, processor):
    """Only its own batch, and that of the clip that waits for the same worker."""
    batches = list(ClipLoader(SlowFirst(files), processor, 2, num_workers=2))
    assert sorted(batch.index for batch in batches[:-2]) == [2, 3, 4, 5, 6]


INTERRUPTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started this with Ctrl-C ignored
from modeling_videomamba import ClipLoader, VideoMambaVideoProcessor
for batch in ClipLoader(sys.argv[1:] * 10000, VideoMambaVideoProcessor(num_frames=4), num_workers=2):
    print(batch.index, flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_the_process(files, number):
    command = [sys.executable, "-c", INTERRUPTED, files[0]]
    # A session of its own: the signal reaches it and its workers as from a terminal, and nothing else.
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        process.stdout.readline()
        group = [pid for pid in filter(str.isdigit, os.listdir("/proc")) if in_group(pid, process.pid)]
        assert len(group) == 3
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.kill()
        process.wait(60)
        for _ in range(60):  # workers look every five seconds whether their parent lives
            if not any(in_group(pid, process.pid) for pid in group):
                break
            time.sleep(0.5)
        else:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail("workers were left")


def in_group(pid, group):
    try:
        return os.getpgid(int(pid)) == group
    except ProcessLookupError:
        return False


@pytest.mark.gpu
def test_on_a_gpu(files, processor, model):
    """Resized by workers: the same pixels. Resized on the GPU: to one level of 255. Scores to 1e-5, and 1e-2."""
    levels = 1.001 / 255 / min(processor.image_std)
    inputs = processor([file for i, file in enumerate(files) if i != BAD], return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits.softmax(-1)
    model = model.to("cuda")
    try:
        for slot_bytes, pixels_differ, scores_differ in ((0, 1e-5, 1e-5), (2**20, levels, 1e-2)):
            loader = ClipLoader(files, processor, 4, num_workers=2, device="cuda", slot_bytes=slot_bytes)
            pixels, scores = {}, {}
            for batch, outputs in predict_clips(
                lambda x: {"pixels": x, "scores": model(x).logits.softmax(-1)}, loader
            ):
                pixels |= dict(zip(batch.clips, outputs["pixels"], strict=True))
                scores |= dict(zip(batch.clips, outputs["scores"], strict=True))
            pixels, scores = (torch.stack([found[i] for i in sorted(found)]) for found in (pixels, scores))
            torch.testing.assert_close(pixels, inputs["pixel_values"], rtol=0, atol=pixels_differ)
            torch.testing.assert_close(scores, expected, rtol=0, atol=scores_differ)
    finally:
        model.to("cpu")
