"""What datasets hands out: rows, columns and decoders give what the processor makes of the file, in pipelines too."""

import importlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset, Video
from torchvision import tv_tensors
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

from modeling_videomamba import (
    VideoMambaConfig,
    VideoMambaForVideoClassification,
    VideoMambaImageProcessor,
    VideoMambaVideoProcessor,
)
from modeling_videomamba.video_decoding import decode_video
from video_files import numbered_frame, numbered_frames, read_numbers, write_video


AS_DECODED = {"do_resize": False, "do_center_crop": False, "do_rescale": False, "do_normalize": False}
UNEVEN = [0, 40, 110, 130, 250, 270, 330, 420, 450, 500, 640, 660, 710, 830, 870, 930]  # thousandths of a second


def reader(**options):
    return VideoMambaVideoProcessor(**{"num_frames": 4, **AS_DECODED, **options})


def pixels(processor, video, **options):
    return processor(video, return_tensors="pt", **options)["pixel_values"]


def numbers(processor, video):
    return read_numbers(pixels(processor, video)[0].permute(0, 2, 3, 1).numpy())


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return [str(write_video(folder / f"{count}.mp4", count)) for count in (30, 50)]


@pytest.fixture(scope="module")
def rows(clips):
    """A data set whose video column is not decoded."""
    return Dataset.from_dict({"video": clips, "label": [0, 1]}).cast_column("video", Video(decode=False))


# ---- rows and columns ----


def test_rows_and_columns_are_the_files(clips, rows):
    processor = reader()
    expected = torch.stack([pixels(processor, clip)[0] for clip in clips])
    assert not torch.equal(expected[0], expected[1])
    data = [{"path": None, "bytes": Path(clip).read_bytes()} for clip in clips]
    streamed = rows.to_iterable_dataset()["video"]
    for videos in (rows["video"], rows["video"][:], list(rows["video"]), data, (clips[0], data[1]), streamed):
        assert torch.equal(pixels(processor, videos), expected)
    for row in (rows[1]["video"], data[1], {"path": "gone.mp4", "bytes": data[1]["bytes"]}, {"path": clips[1]}):
        assert torch.equal(pixels(processor, row), expected[1:])
    assert processor.fetch_videos(rows[1]["video"])[1].total_num_frames == 50


def test_columns_of_images_and_of_frames(tmp_path):
    frames = [PIL.Image.fromarray(frame) for frame in numbered_frames(6)]
    processor = VideoMambaImageProcessor(**AS_DECODED)
    images = Dataset.from_dict({"image": frames, "clip": [frames[i : i + 3] for i in range(6)]}).select(range(3))
    assert torch.equal(
        pixels(processor, images["image"], single_images=True), pixels(processor, frames[:3], single_images=True)
    )
    expected = pixels(processor, [frames[i : i + 3] for i in range(3)])
    assert expected.shape[:2] == (3, 3) and torch.equal(pixels(processor, images["clip"]), expected)
    assert torch.equal(pixels(VideoMambaVideoProcessor(**AS_DECODED), images["clip"]), expected)


def test_a_row_of_a_streamed_archive(clips, tmp_path):
    with zipfile.ZipFile(tmp_path / "clips.zip", "w") as archive:
        archive.write(clips[0], "a.mp4")
    row = {"path": f"zip://a.mp4::{tmp_path / 'clips.zip'}", "bytes": None}
    assert torch.equal(pixels(reader(), row), pixels(reader(), clips[0]))


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ({"path": None, "bytes": None}, "names no video"),
        ({"path": "x.mp4", "bytes": b"no video"}, "x.mp4"),
        ({"video": {"path": "x.mp4", "bytes": None}, "label": 0}, r"\['label', 'video'\]"),
        ([None, None], "videos\\[0\\] is a NoneType"),
    ],
)
def test_rows_that_are_none(video, message):
    with pytest.raises(ValueError, match=message):
        reader()(video)
    with pytest.raises(FileNotFoundError, match="nowhere.mp4"):
        reader()({"path": "nowhere.mp4", "bytes": None})


# ---- torchvision ----


def test_tv_tensors_have_their_channels_in_front():
    # Of any other array of these sizes, the last axis would be taken for that of the channels.
    video = tv_tensors.Video(torch.randint(0, 256, (2, 3, 5, 2, 8, 3), dtype=torch.uint8))
    for processor in (reader(do_convert_rgb=False), VideoMambaImageProcessor(**AS_DECODED, do_convert_rgb=False)):
        for found, expected in (
            (video[0, 0], video[:1, 0]),
            (video[0], video[0]),
            (video, video.flatten(0, 1)),
            (list(video[0].unbind()), video[0]),
        ):
            wrapped = (
                [tv_tensors.Video(clip) for clip in found] if isinstance(found, list) else tv_tensors.Video(found)
            )
            result = pixels(processor, wrapped)
            assert type(result) is torch.Tensor and torch.equal(result, expected.as_subclass(torch.Tensor))


# ---- decoders ----


@dataclass
class About:
    num_frames: int
    average_fps: float
    begin_stream_seconds: float
    end_stream_seconds: float


@dataclass
class Batch:
    data: torch.Tensor
    pts_seconds: torch.Tensor


class Decoder:
    """Numbered frames at given times, behind the methods of torchcodec's decoder; it notes which frames are read."""

    def __init__(self, times, end, make=lambda frames: frames):
        self.times, self.make, self.read = times, make, []
        self.metadata = About(len(times), (len(times) - 1) / (times[-1] - times[0]), times[0], end)

    def __len__(self):
        return len(self.times)

    def get_frames_at(self, indices):
        self.read += list(indices)
        frames = np.stack([numbered_frame(index) for index in indices])
        times = torch.tensor([self.times[index] for index in indices], dtype=torch.float64)
        return Batch(self.make(torch.from_numpy(frames).permute(0, 3, 1, 2)), times)

    def get_frames_played_at(self, seconds):
        return self.get_frames_at([max(i for i, time in enumerate(self.times) if time <= at) for at in seconds])


@pytest.mark.parametrize(
    "make", [lambda frames: frames, lambda frames: frames.permute(0, 2, 3, 1), lambda frames: frames / 255]
)
def test_a_decoder_reads_what_is_sampled_alone(make):
    decoder = Decoder([10 + i / 25 for i in range(40)], 11.6, make)
    inputs = reader()(decoder, return_tensors="pt", return_metadata=True)
    assert decoder.read == [16, 18, 20, 22]
    expected = torch.from_numpy(np.stack([numbered_frame(i) for i in decoder.read])).permute(0, 3, 1, 2)
    assert torch.equal(inputs["pixel_values"][0], expected)
    metadata = inputs["video_metadata"][0]
    assert metadata.frames_indices.tolist() == decoder.read and metadata.total_num_frames == 40
    assert (metadata.height, metadata.width, metadata.num_repeated_frames) == (64, 96, 0)


def test_a_decoder_is_asked_by_time():
    # 0.96 s from the first frame, which is shown at 2 s: after 0.12, 0.36, 0.6 and 0.84 s, the clip being short.
    decoder = Decoder([2 + time / 1000 for time in UNEVEN], 2.96)
    assert numbers(reader(sampling_fps=3), decoder) == [2, 6, 9, 13] == decoder.read
    # ... and 50 ms apart: after 0.405, 0.455, 0.505 and 0.555 s.
    assert numbers(reader(sampling_fps=20), decoder) == [6, 8, 9, 9]
    inputs = reader(sampling_fps=20)(decoder, return_metadata=True)
    assert inputs["video_metadata"][0].num_repeated_frames == 0  # the same frame twice is no repeated picture
    assert reader(sampling_fps=20)([decoder, decoder], return_tensors="pt")["pixel_values"].shape[:2] == (2, 4)


def test_what_a_decoder_cannot_do_is_said():
    decoder = Decoder([i / 25 for i in range(40)], 1.6)
    with pytest.raises(ValueError, match="A section of <Decoder>"):
        reader()(decoder, start_seconds=1)
    with pytest.raises(ValueError, match="are for `VideoMambaVideoProcessor`"):
        VideoMambaImageProcessor()(decoder)
    decoder.metadata.num_frames = None
    with pytest.raises(ValueError, match="how many frames"):
        reader()(decoder)


def torchcodec_decoder(*args, **options):
    try:
        made = importlib.import_module("torchcodec.decoders").VideoDecoder
    except Exception as error:
        pytest.skip(f"torchcodec or FFmpeg's libraries are missing: {error}".splitlines()[0])
    return made(*args, **options)


@pytest.mark.parametrize("sampling", [{}, {"sampling_fps": 8}, {"sampling_fps": 20}, {"frame_stride": None}])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain.mp4", {}),
        ("short.mp4", {"frames": 3}),
        ("turned.mp4", {"rotation": 90}),
        ("upside-down.mp4", {"rotation": 180}),
        ("uneven.mkv", {"frames": 16, "pts": UNEVEN, "rate": 20}),
    ],
)
def test_torchcodec_gives_the_frames_of_the_file(tmp_path, name, options, sampling):
    path = str(write_video(tmp_path / name, **options))
    expected = pixels(reader(**sampling), path)
    for decoder in (torchcodec_decoder(path), torchcodec_decoder(path, dimension_order="NHWC")):
        assert torch.equal(pixels(reader(**sampling), decoder), expected)
    decoder = torchcodec_decoder(path, output_dtype=torch.float32)  # of which FFmpeg converts the colours otherwise
    assert (pixels(reader(**sampling), decoder).short() - expected.short()).abs().max() <= 3


def test_decoders_of_a_column_are_the_files(clips, tmp_path):
    """Also of AVI, of which torchcodec's own frames are others."""
    torchcodec_decoder(clips[0])
    clips = [*clips, str(write_video(tmp_path / "b_frames.avi", 40))]
    column = Dataset.from_dict({"video": clips}).cast_column("video", Video())["video"]
    for sampling in ({}, {"sampling_fps": 8}, {"num_frames": None, "fps": 3}):
        expected = [pixels(reader(**sampling), clip)[0] for clip in clips]
        found = reader(**sampling)(column)["pixel_values"]
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


# ---- the pipeline ----


def test_pipeline(clips, rows, tmp_path):
    torch.manual_seed(0)
    config = VideoMambaConfig(hidden_size=32, num_hidden_layers=1, image_size=32, num_frames=4, initializer_range=1.0)
    VideoMambaForVideoClassification(config).save_pretrained(tmp_path)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    VideoMambaVideoProcessor(num_frames=4, **sizes).save_pretrained(tmp_path)
    classify = pipeline("video-classification", model=str(tmp_path))
    expected = [classify(clip) for clip in clips]
    assert expected[0] != expected[1]
    assert [classify(row) for row in rows["video"]] == expected
    assert classify(list(rows["video"])) == expected == list(classify(KeyDataset(rows, "video")))
    decoders = [Decoder([i / 25 for i in range(count)], count / 25) for count in (30, 50)]
    found = classify(decoders)
    assert [decoder.read for decoder in decoders] == [[11, 13, 15, 17], [21, 23, 25, 27]]
    assert found[0] != found[1]
    frames = torch.from_numpy(decode_video(clips[0])[0]).permute(0, 3, 1, 2)
    assert classify(tv_tensors.Video(frames)) == expected[0]
    with pytest.raises(ValueError, match="KeyDataset"):  # transformers would classify the first clip alone
        classify(rows["video"])
