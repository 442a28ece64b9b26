"""Clips for the training scripts: lists and folders, augmentation, streams, what cannot be read, accuracy."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from datasets import ClassLabel, Dataset, IterableDataset
from torchvision.transforms import v2

import finetune
import video_classification_data as data
from finetune import DecodeFailures
from modeling_videomamba import video_decoding
from training_clips import NAMES, still_clip, tiny_processor, touch
from video_classification_arguments import DataArguments
from video_files import write_video


def listed(source, root, split="train", limit=0):
    clips = data.read_list(str(source), str(root), split, 1, DecodeFailures(str(root.parent / "log"), limit))
    names = clips.features["label"].names
    return {os.path.relpath(v["path"], root): names[n] for v, n in zip(clips["video"], clips["label"], strict=True)}


def test_reads_the_lists_of_kinetics(tmp_path):
    root, source = tmp_path / "videos", tmp_path / "train.csv"
    touch(root / "abseiling" / "-3B32lodo2M_000059_000069.mp4", root / "0QuUVTUdlO8_000060_000070.mkv")
    source.write_text(
        "label,youtube_id,time_start,time_end,split,is_cc\n"
        'abseiling,-3B32lodo2M,59,69,train,0\n"zumba, slow",0QuUVTUdlO8,60,70,train,0\nyoga,missing0000,0,10,train,0\n'
    )
    with pytest.raises(RuntimeError, match=r"--max_decode_failures 0.*missing0000_000000_000010 \(yoga\)"):
        listed(source, root)
    found = {"abseiling/-3B32lodo2M_000059_000069.mp4": "abseiling", "0QuUVTUdlO8_000060_000070.mkv": "zumba, slow"}
    shutil.rmtree(tmp_path / "log")
    assert listed(source, root, limit=1) == found


def test_reads_plain_lists(tmp_path):
    root, source = tmp_path / "videos", tmp_path / "clips.csv"
    touch(root / "a" / "1.mp4", root / "b" / "1.mp4")
    source.write_text("video,label\na/1.mp4,fight\nb/1.mp4,peace\n")
    assert listed(source, root) == {"a/1.mp4": "fight", "b/1.mp4": "peace"}
    source.write_text("file,class\na/1.mp4,fight\n")
    with pytest.raises(ValueError, match="has the line 'file,class', but path,label was expected.*needs a header"):
        listed(source, root)
    source.write_text("video,label\n")
    with pytest.raises(ValueError, match="has the line 'video,label'"):
        listed(source, root)
    source.write_text("")
    with pytest.raises(ValueError, match="lists no train clips: columns label, youtube_id.* were expected"):
        listed(source, root)
    with pytest.raises(ValueError, match="--video_root"):
        data.read_list(str(source), None, "train", 1, None)


def test_reads_the_lists_of_something_something(tmp_path):
    root, source = tmp_path / "videos", tmp_path / "something-something-v2-train.json"
    touch(root / "78687.webm", root / "42326.webm")
    rows = [("78687", "Holding [something] next to [something]"), ("42326", "Folding [something]")]
    rows = [{"id": i, "label": "holding a potato", "template": t, "placeholders": ["a potato"]} for i, t in rows]
    source.write_text(json.dumps(rows))
    assert listed(source, root) == {
        "78687.webm": "Holding something next to something",
        "42326.webm": "Folding something",
    }


def test_reads_the_splits_of_hmdb51(tmp_path):
    root, source = tmp_path / "videos", tmp_path / "splits"
    source.mkdir()
    names = ["a_brush_hair_u_nm_np1_ba_goo_0", "b#c_brush_hair_h_cm_np1_le_goo_0", "d_brush_hair_u_cm_np2_ri_goo_1"]
    touch(*(root / "brush_hair" / f"{name}.avi" for name in names), root / "sit" / "e_sit_f_cm_np1_fr_med_2.avi")
    uses = zip(names, (1, 2, 0), strict=True)
    (source / "brush_hair_test_split1.txt").write_text("".join(f"{name}.avi {use} \n" for name, use in uses))
    (source / "brush_hair_test_split2.txt").write_text(f"{names[2]}.avi 1 \n")
    (source / "sit_test_split1.txt").write_text("e_sit_f_cm_np1_fr_med_2.avi 1 \n")
    assert listed(source, root) == {
        f"brush_hair/{names[0]}.avi": "brush_hair",
        "sit/e_sit_f_cm_np1_fr_med_2.avi": "sit",
    }
    assert listed(source, root, "validation") == {f"brush_hair/{names[1]}.avi": "brush_hair"}
    with pytest.raises(ValueError, match="lists no train clips"):
        listed(tmp_path, root)


def test_reads_the_lists_of_breakfast_coin_and_lvu(tmp_path):
    root, source = tmp_path / "videos", tmp_path / "train.csv"
    touch(root / "P03" / "cam01" / "P03_cereals.avi", root / "P04_tea.avi", root / "a b.mp4")
    source.write_text("P03/cam01/P03_cereals.avi,0\nP04_tea.avi,10\n")
    found = {"P03/cam01/P03_cereals.avi": "00", "P04_tea.avi": "10"}  # in the order of the numbers
    assert listed(source, root) == found
    source.write_text("P03/cam01/P03_cereals.avi 0 61.5\na b.mp4 1 90\n")
    names = tmp_path / "names.txt"
    names.write_text("cereals\ntea\n")
    settings = (str(root), "train", 1, DecodeFailures(str(tmp_path), 0), str(names))
    clips = data.read_list(str(source), *settings, "path,label,seconds")
    assert clips.features["label"].names == ["cereals", "tea"] and clips["label"] == [0, 1]
    source.write_text("P03/cam01/P03_cereals.avi,61,0\na b.mp4, 90, 1\n")
    assert data.read_list(str(source), *settings, "path, frames, label")["label"] == [0, 1]
    source.write_text("P04_tea.avi,2\n")
    with pytest.raises(ValueError, match="names 2 labels, but .*train.csv has a label 2"):
        data.read_list(str(source), str(root), "train", 1, DecodeFailures(str(tmp_path), 0), str(names))
    source = tmp_path / "COIN.json"
    rows = {"P04_tea": ("MakeTea", "training"), "a b": ("BoilNoodles", "testing")}
    rows = {name: {"class": label, "subset": subset, "annotation": []} for name, (label, subset) in rows.items()}
    source.write_text(json.dumps({"database": rows}))
    assert listed(source, root) == {"P04_tea.avi": "MakeTea"}
    assert listed(source, root, "validation") == {"a b.mp4": "BoilNoodles"}


@pytest.mark.parametrize("line", ["a b.mp4 0 2", "a.mp4 0 2", "a.mp4,0,2", "a.mp4,30,1"])
def test_three_columns_are_no_two(line, tmp_path):
    """Two labels, frames and a label, or a label and seconds: nobody can tell."""
    touch(tmp_path / "videos" / "a.mp4", tmp_path / "videos" / "a b.mp4")
    (tmp_path / "list.txt").write_text(line + "\n")
    with pytest.raises(ValueError, match="list.txt has 3 columns in the line .*--list_columns"):
        listed(tmp_path / "list.txt", tmp_path / "videos")
    with pytest.raises(ValueError, match="--list_columns must begin with path and hold label once"):
        data.read_list(str(tmp_path / "list.txt"), str(tmp_path), "train", 1, None, None, "label,path")


def test_side_files_are_no_clips(tmp_path):
    """What stands beside a clip under its name: a picture, a note, a subtitle; and another clip of that name."""
    root, source = tmp_path / "videos", tmp_path / "labels.json"
    source.write_text(json.dumps([{"id": 7, "template": "Folding [something]"}]))
    touch(*(root / f"7{suffix}" for suffix in (".jpg", ".json", ".txt", ".srt", ".npy", ".webm", ".webm.part")))
    touch(root / "thumbnails" / "7.png")
    assert listed(source, root) == {"7.webm": "Folding something"}
    touch(root / "again" / "7.MP4")
    with pytest.raises(ValueError, match=r"lists 7, which may be .*7.*7.*Remove one of them, or list its path"):
        listed(source, root)
    (tmp_path / "paths.csv").write_text("video,label\n7.webm,x\nagain/7.MP4,x\n")
    assert set(listed(tmp_path / "paths.csv", root)) == {"7.webm", "again/7.MP4"}


def test_paths_in_any_form(tmp_path):
    root, source = tmp_path / "videos", tmp_path / "list.csv"
    touch(root / "a" / "1.mp4", root / "b.mp4", tmp_path / "elsewhere" / "c.mp4")
    rows = f"./a/1.mp4,x\n{root / 'b.mp4'},x\n{tmp_path / 'elsewhere' / 'c.mp4'},y\n"
    source.write_text("video,label\n" + rows, encoding="utf-8-sig")  # with a byte-order mark
    assert listed(source, root) == {"a/1.mp4": "x", "b.mp4": "x", "../elsewhere/c.mp4": "y"}
    source.write_text("./a/1.mp4 0\n", encoding="utf-8-sig")
    assert listed(source, root) == {"a/1.mp4": "0"}


def test_lists_that_cannot_be_read_are_named(tmp_path):
    touch(tmp_path / "a.mp4")
    source = tmp_path / "list.csv"
    for text, message in (
        ("video,label\na.mp4\n", "list.csv says nothing of label in row 1 after the header"),
        ("video,label\na.mp4,\n", "list.csv says nothing of label in row 1"),
        ("label,youtube_id,time_start,time_end\nx,a,0\n", "list.csv says nothing of time_end in row 1"),
        ("a.mp4,caf\xe9\n", "list.csv is not UTF-8 text.*0xe9"),
        ("a.mp4,zero\n", "list.csv has the line 'a.mp4,zero', but path,label was expected, the label as a number"),
    ):
        source.write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=message):
            listed(source, tmp_path)
    source = tmp_path / "labels.json"
    for text, message in (
        ("[", "labels.json is no JSON"),
        ('[{"template": "x"}]', "labels.json has an entry that is another than expected .*'id'"),
        ('{"database": {"a": {"subset": "training"}}}', "labels.json has an entry .*'class'"),
    ):
        source.write_text(text)
        with pytest.raises(ValueError, match=message):
            listed(source, tmp_path)


def load(splits=("train", "validation"), **arguments):
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()}
    return data.load_clips(DataArguments(**arguments), splits, 0, None)


def test_bad_data_is_refused_with_advice(bars, tmp_path):
    both = {"train_dir": bars / "train", "validation_dir": bars / "validation"}
    splits, names = load(**both)
    assert names == NAMES and len(splits["train"]) == 8
    with pytest.raises(ValueError, match=r"no column \['film'\], only \['video', 'label'\].*--video_column"):
        load(**both, video_column="film")
    with pytest.raises(ValueError, match=r"no column \['label'\]"):
        load(["validation"], validation_dir=bars / "validation" / NAMES[0])
    with pytest.raises(ValueError, match="must hold videos"):
        load(**both, video_column="label")
    with pytest.raises(ValueError, match="--streaming is for a data set of the Hub"):
        load(**both, streaming=True)
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        load(["train"], train_dir=tmp_path / "nowhere")
    with pytest.raises(ConnectionError, match="you/nowhere could not be loaded.*--train_dir"):
        load(dataset_name="you/nowhere")
    shutil.copytree(bars / "validation" / NAMES[0], tmp_path / "validation" / NAMES[0])
    shutil.copytree(bars / "validation" / NAMES[0], tmp_path / "strange" / "upwards")
    missing = {"train_dir": bars / "train", "validation_dir": tmp_path / "validation"}
    with pytest.raises(ValueError, match=r"no validation clip of \['to the right'\].*--allow_missing_classes"):
        load(**missing)
    with pytest.raises(ValueError, match=r"labels \['upwards'\], but the model or the training clips have only"):
        load(train_dir=bars / "train", validation_dir=tmp_path / "strange")


def test_a_label_may_read_like_a_split(bars, tmp_path):
    """Left to itself, datasets takes `train_in_out` for the training split: no other label, or too many clips."""
    labels = dict(zip(NAMES, ("train_in_out", "val"), strict=True))
    for split in ("train", "validation"):
        for old, new in labels.items():
            shutil.copytree(bars / split / old, tmp_path / split / new)
    both = {"train_dir": tmp_path / "train", "validation_dir": tmp_path / "validation"}
    for clips in (load(**both)[0], finetune.load_clips(str(tmp_path), 0.1, 0)):
        for split in ("train", "validation"):
            files = sorted(str(path) for path in (tmp_path / split).rglob("*.mp4"))
            assert sorted(video["path"] for video in clips[split]["video"]) == files
            assert clips[split].features["label"].names == sorted(labels.values())


def test_labels_are_numbered_as_the_model_does():
    clips = Dataset.from_dict({"label": [0, 1, 1]}).cast_column("label", ClassLabel(names=["b", "c"]))
    assert data.match_labels(clips, ["a", "c", "b"])["label"] == [2, 1, 1]


def test_augmentation_is_the_same_for_all_frames_and_repeats_with_the_seed(tmp_path):
    """Of a still clip all frames stay alike; clips, epochs and seeds differ; the same three give the same clip."""
    processor, rows = tiny_processor(), [{"video": still_clip(tmp_path), "label": 0}] * 12
    args = DataArguments(rand_augment=2, rand_augment_magnitude=9, random_erasing=0.5, mirror_swaps="")
    augment = data.TrainTransform(processor, processor, args, [0], None)
    clips = data.Clips(rows, augment, None, seed=1, training=True)
    state = torch.get_rng_state()
    seen = [clips[index]["pixel_values"] for index in range(12)]
    assert torch.equal(state, torch.get_rng_state()), "drawing must not disturb the other random numbers"
    for frames in seen:
        assert frames.shape == (4, 3, 32, 32) and torch.equal(frames, frames[:1].expand_as(frames))
    assert len({frames.sum().item() for frames in seen}) == 12
    mean_colour = torch.tensor([round(255 * mean) for mean in processor.image_mean]).view(3, 1, 1)
    erased = [int((frames[0] == mean_colour).all(0).sum()) > 15 for frames in seen]
    assert any(erased) and not all(erased)
    again = data.Clips(rows, augment, None, seed=1, training=True)
    assert torch.equal(again[5]["pixel_values"], seen[5])
    again.set_epoch(1)
    assert not torch.equal(again[5]["pixel_values"], seen[5])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("options", [{"jitter": 0.6}, {"rand_augment": 2, "random_erasing": 0.5, "jitter": 0.0}])
def test_a_batch_augmented_on_the_device_is_what_workers_make_of_each_clip(device, options, tmp_path):
    """Against the same clips, each augmented by itself on the CPU."""
    processor, rows = tiny_processor(), [{"video": still_clip(tmp_path), "label": 0}] * 24
    args, made = DataArguments(mirror_swaps="", **options), []
    for defers in (False, True):
        transform = data.TrainTransform(processor, processor, args, [0], None, defers)
        clips = data.Clips(rows, transform, None, seed=1, training=True)
        made.append(torch.utils.data.default_collate([clips[index] for index in range(24)]))
    whole, deferred = made
    assert not torch.equal(whole["pixel_values"], deferred["pixel_values"])
    expected = data.Normalize(processor, "cpu")(whole["pixel_values"])
    state = torch.get_rng_state()
    finish = data.DeviceTransform(processor, torch.device(device), transform.augment)
    found = finish(deferred)
    assert torch.equal(state, torch.get_rng_state())
    assert set(found) == {"pixel_values", "labels"} and found["pixel_values"].device.type == device
    difference = (found["pixel_values"].cpu() - expected).abs() * 255 * torch.tensor(processor.image_std).view(3, 1, 1)
    # Where a frame is turned, a pixel half way between two may become either.
    assert (difference > 1.01).float().mean() < (1e-3 if device == "cuda" and "rand_augment" in options else 1e-9)
    assert torch.equal(finish(whole)["pixel_values"].cpu(), expected) or device == "cuda"


def test_bytes_normalized_on_the_device_are_what_the_processor_gives(tmp_path):
    """The path of the frames as uint8 against that of float32: the processor's for users, and torchvision's."""
    processor, clip = tiny_processor(), still_clip(tmp_path)
    normalize = data.Normalize(processor, "cpu")
    frames = data.EvalTransform(processor, processor)(clip, 0)["pixel_values"]
    assert frames.dtype == torch.uint8
    expected = processor(clip["path"], return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(normalize(frames), expected, atol=1e-6, rtol=1e-6)
    augment = data.TrainTransform(processor, processor, DataArguments(rand_augment=1), None, None)
    frames = augment(clip, 0)["pixel_values"]
    assert frames.dtype == torch.uint8
    as_float = v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize(processor.image_mean, processor.image_std)]
    )
    torch.testing.assert_close(normalize(frames), as_float(frames), atol=1e-6, rtol=1e-6)


class FakeProcessor:
    """Gives frames whose value is their number and their column, so that flips can be seen."""

    model_input_names = ["pixel_values"]
    crop_size = {"height": 8, "width": 8}
    image_mean, image_std = [0.0] * 3, [1.0] * 3
    num_frames, frame_stride, sampling_fps, spread_in_segments = 4, 2, None, False
    sample_frames, total_num_frames = None, 8
    reads = 0

    def fetch_videos(self, source, sample_indices_fn):
        self.reads += 1
        time, column = torch.meshgrid(torch.arange(4), torch.arange(8), indexing="ij")
        return (10 * time + column)[:, None, :, None].expand(4, 8, 8, 3).to(torch.uint8), self

    def __call__(self, frames, return_tensors, do_rescale, do_normalize):
        return {"pixel_values": frames[None]}


@pytest.mark.parametrize("flip", [(), (-1,), (0,)])
def test_turned_views_take_the_swapped_labels(flip):
    clip = {"path": None, "bytes": b"a clip"}
    swaps = data.parse_swaps("a:b", ["a", "b", "c"]) if flip else None
    turn = data.EvalTransform(FakeProcessor(), FakeProcessor(), flip, swaps)
    frames = turn(clip, 0)["pixel_values"]
    first, last = frames[0, 0, 0, 0], frames[-1, 0, 0, -1]
    assert (first, last) == {(): (0, 37), (-1,): (7, 30), (0,): (30, 7)}[flip]
    assert [turn(clip, label)["labels"] for label in (0, 2)] == ([1, 2] if flip else [0, 2])


def test_training_clips_turn_together_with_their_labels():
    arguments = DataArguments(min_crop_area=1.0, jitter=0.0)
    augment = data.TrainTransform(FakeProcessor(), FakeProcessor(), arguments, [1, 0], [0, 1])
    augment.augment = torch.nn.Identity()
    seen = set()
    for _ in range(64):
        out = augment({"path": None, "bytes": b"a clip"}, 0)
        frames = out["pixel_values"]
        mirrored, backwards = bool(frames[0, 0, 0, 0] % 10 == 7), bool(frames[0, 0, 0, 0] >= 30)
        assert out["labels"] == int(mirrored)
        seen.add((mirrored, backwards))
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("rate", "phase", "expected"),
    [
        (1.0, 0.5, [0, 1, 2, 3, 4, 5, 6, 7]),
        (0.5, 0.0, [0, 0, 2, 2, 4, 4, 6, 6]),
        (0.5, 0.5, [0, 1, 1, 3, 3, 5, 5, 7]),  # the second is taken one frame after the first
        (0.25, 0.0, [0, 0, 0, 0, 4, 4, 4, 4]),
        (0.75, 0.0, [0, 0, 2, 3, 4, 4, 6, 7]),  # taken after 0, 1.33, 2.67, 4, 5.33 and 6.67: seen at the next whole
    ],
)
def test_repeated_frames_by_hand(rate, phase, expected):
    found = data.filmed_at(torch.tensor(rate), torch.tensor(phase), 8)
    assert found.tolist() == expected


def test_frame_cache_reads_each_clip_once(tmp_path):
    reader, clip = FakeProcessor(), {"path": None, "bytes": b"a clip"}
    first, second = (data.read_frames_once(reader, clip, str(tmp_path), 4) for _ in range(2))
    assert reader.reads == 1 and first.shape == (4, 3, 4, 4) and torch.equal(first, second)
    data.read_frames_once(reader, {"path": None, "bytes": b"another"}, str(tmp_path), 4)
    assert reader.reads == 2 and len(list(tmp_path.iterdir())) == 2


def test_says_that_frames_are_repeated(tmp_path, caplog):
    data.logger.warning_once.cache_clear()
    video = {"path": write_video(tmp_path / "short.mp4", 3), "bytes": None}
    for _ in range(2):
        assert len(data.read_frames(tiny_processor(), video)) == 4
    assert caplog.text.count("fewer frames than the 4 of the model") == 1


@pytest.mark.parametrize(
    "device, options, num_workers, on_the_device",
    [
        ("cpu", {}, 8, False),
        ("cuda", {}, 8, True),
        ("cuda", {"streaming": True}, 8, False),
        ("cuda", {"frame_cache": "frames"}, 8, False),
        ("cuda", {"frame_cache": "frames"}, 0, True),
    ],
)
def test_who_augments(device, options, num_workers, on_the_device):
    assert data.augments_there(DataArguments(**options), num_workers, torch.device(device)) is on_the_device


def test_workers_of_a_stream_augment_their_clips_differently():
    rows = IterableDataset.from_generator(
        lambda files: ({"video": None, "label": 0} for _ in files), gen_kwargs={"files": list(range(8))}
    )
    clips = data.ClipStream(rows, lambda video, label: torch.rand(()), None, seed=1)
    loader = torch.utils.data.DataLoader(clips, batch_size=None, num_workers=2)
    drawn = [clip.item() for clip in loader]
    assert len(drawn) == len(set(drawn)) == 8
    assert [clip.item() for clip in loader] == drawn


def test_workers_decode_with_one_thread_each(tmp_path):
    """They share the cores already; a single process uses them all, which libav calls 0 threads."""
    path = write_video(tmp_path / "clip.mp4", 8)

    class Threads(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            with video_decoding.open_pyav(path, "clip.mp4") as (_, stream):
                return stream.codec_context.thread_count

    assert Threads()[0] == 0 and next(iter(torch.utils.data.DataLoader(Threads(), num_workers=1))).item() == 1


def test_names_and_skips_clips_that_cannot_be_read(tmp_path, caplog):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    rows = [{"video": {"path": str(tmp_path / "broken.mp4"), "bytes": None}, "label": 1}]
    rows += [{"video": still_clip(tmp_path), "label": 0}, {"video": {"path": "gone.mp4", "bytes": None}, "label": 1}]
    processor = tiny_processor()
    show = data.EvalTransform(processor, processor)
    failures = DecodeFailures(str(tmp_path / "out"), 1)

    seen = data.Clips(rows, show, failures)[0]
    assert seen["labels"] == -100 and seen["pixel_values"].shape == (4, 3, 32, 32)
    assert "broken.mp4" in caplog.text
    replaced = data.Clips(rows, show, failures, training=True)[0]  # known by now: does not count twice
    assert replaced["labels"] == 0
    with pytest.raises(RuntimeError, match="2 clips cannot be read.*--max_decode_failures 1.*gone.mp4"):
        data.Clips(rows, show, failures)[2]
    assert failures.names() == {str(tmp_path / "broken.mp4"), "gone.mp4"}
    with pytest.raises(RuntimeError, match="2 clips cannot be read"):  # the same again, without mending anything
        data.Clips(rows, show, DecodeFailures(str(tmp_path / "out"), 1))[2]


class Clock:
    """Stands in for `time`, and moves when told to."""

    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.mark.parametrize("reading, hints", [(3.0, 1), (0.3, 0)])
def test_says_what_to_do_if_reading_limits_the_speed(monkeypatch, caplog, reading, hints):
    """Batches of four clips that come after `reading` seconds and take the model one; two CPU seconds to read one."""
    PartialState()
    clock, clips = Clock(), data.ClipReader(None, None, None)
    monkeypatch.setattr(data, "time", clock)

    def batches():
        for _ in range(3):
            clock.now += reading
            clips.work += torch.tensor([4.0, 8.0])
            yield {"labels": torch.zeros(4)}

    stopwatch = data.Stopwatch(clips, 2)
    for _ in range(3):
        clock.now += 100  # an evaluation
        stopwatch.restart()
        for _ in stopwatch.watch(batches()):
            clock.now += 1
        values = stopwatch.read()
        assert values["clips_per_second"] == pytest.approx(4 / (1 + reading))
        assert values["waiting"] == pytest.approx(reading / (1 + reading)) and values["clips_per_core_second"] == 0.5
    assert caplog.text.count("Raise --dataloader_num_workers (it is 2") == hints
    if hints:
        assert "75% of the time" in caplog.text and "0.5 clips a second; the model could take up to 4.0" in caplog.text


def test_accuracy_by_hand():
    """Seven labels; label 0 is right in 1 of 2 clips, label 6 in 0 of 1 but second; one clip could not be read."""
    scores = np.zeros((4, 7))
    scores[0, 0] = 1
    scores[1] = [0, 7, 6, 5, 4, 3, 2]
    scores[2] = [1, 9, 1, 1, 1, 1, 8]
    found = data.load_accuracy().compute(predictions=scores, references=[0, 0, 6, -100])
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["top5_accuracy"] == pytest.approx(2 / 3)
    assert found["mean_class_accuracy"] == pytest.approx((1 / 2 + 0) / 2)


def test_accuracy_has_wilsons_interval():
    logits = np.zeros((100, 2))
    logits[:50, 1] = 1
    found = data.load_accuracy().compute(predictions=logits, references=np.ones(100, int))
    # Newcombe's worked values for 50 of 100.
    found = [found[name] for name in ("accuracy", "accuracy_low", "accuracy_high")]
    np.testing.assert_allclose(found, [0.5, 0.4038, 0.5962], atol=1e-4)
