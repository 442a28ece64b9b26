"""The image and the video processor: what they accept, which frames they take, and what they say of bad input."""

import http.server
import io
import json
import os
import sys
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoVideoProcessor, VideoMAEImageProcessor
from transformers.dynamic_module_utils import get_imports
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.video_utils import VideoMetadata

from modeling_videomamba import VideoMambaImageProcessor, VideoMambaVideoProcessor, video_processing_videomamba
from video_files import (
    claim_frames_in_avi,
    numbered_frame,
    read_number,
    read_numbers,
    truncate,
    write_audio,
    write_video,
)


PACKAGE = Path(video_processing_videomamba.__file__).parent
CLIPS = Path(__file__).parents[2] / "shared" / "data" / "clips"
MEAN, STD = np.array(IMAGENET_DEFAULT_MEAN), np.array(IMAGENET_DEFAULT_STD)


def usable(decoder):
    try:
        return video_processing_videomamba._choose_decoder([decoder]) == decoder
    except ImportError:
        return False


needs_decord = pytest.mark.skipif(not usable("decord"), reason="decord cannot be imported")
needs_torchcodec = pytest.mark.skipif(not usable("torchcodec"), reason="torchcodec or FFmpeg's libraries are missing")
each_decoder = pytest.mark.parametrize(
    "decoder",
    ["pyav", pytest.param("torchcodec", marks=needs_torchcodec), pytest.param("decord", marks=needs_decord)],
)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def numbered(count, height=48, width=64):
    return [numbered_frame(i, height, width) for i in range(count)]


def to_pil(frames):
    return [Image.fromarray(frame) for frame in frames]


# --- frames ---------------------------------------------------------------------------------------------------------


def test_values_of_one_color():
    frames = [np.full((300, 400, 3), (10, 100, 250), np.uint8)] * 2
    pixel_values = VideoMambaImageProcessor()(frames, return_tensors="pt").pixel_values
    assert pixel_values.shape == (1, 2, 3, 224, 224) and pixel_values.dtype == torch.float32
    expected = (np.array([10, 100, 250]) / 255 - MEAN) / STD
    np.testing.assert_allclose(pixel_values.amin((0, 1, 3, 4)), expected, atol=1e-5)
    np.testing.assert_allclose(pixel_values.amax((0, 1, 3, 4)), expected, atol=1e-5)


def test_geometry_against_pil():
    rng = np.random.default_rng(0)
    frame = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((640, 480), Image.BICUBIC)
    pixel_values = VideoMambaImageProcessor()([frame], return_tensors="np").pixel_values[0, 0]
    resized = frame.resize((298, 224), Image.BILINEAR)  # the shorter edge to 224, as int(224 * 640 / 480)
    expected = np.array(resized)[:, 37:261].transpose(2, 0, 1)
    got = (pixel_values * STD[:, None, None] + MEAN[:, None, None]) * 255
    assert np.abs(got - expected).max() <= 1.01  # the two libraries round differently


@pytest.mark.parametrize(
    "options", [{}, {"do_center_crop": False}, {"size": {"height": 32, "width": 50}}, {"resample": 3}]
)
def test_agrees_with_videomae(options):
    frames = [np.random.default_rng(i).integers(0, 256, (70, 90, 3), dtype=np.uint8) for i in range(3)]
    theirs = VideoMAEImageProcessor(image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD, **options)
    expected = theirs(frames, return_tensors="pt").pixel_values
    for ours in (VideoMambaImageProcessor(**options), VideoMambaVideoProcessor(**options)):
        torch.testing.assert_close(ours(frames, return_tensors="pt").pixel_values, expected, atol=1e-5, rtol=0)


FORMS = {
    "PIL": to_pil,
    "(H, W, C) arrays": lambda frames: frames,
    "(C, H, W) arrays": lambda frames: [frame.transpose(2, 0, 1) for frame in frames],
    "(C, H, W) tensors": lambda frames: [torch.from_numpy(frame).permute(2, 0, 1) for frame in frames],
    "a mixture": lambda frames: [Image.fromarray(frames[0]), torch.from_numpy(frames[1]), *frames[2:]],
    "a (T, H, W, C) array": np.stack,
    "a (T, C, H, W) tensor": lambda frames: torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2),
    "a (B, T, H, W, C) array": lambda frames: np.stack(frames)[None],
    "a batch of lists": lambda frames: [frames],
    "a batch of arrays": lambda frames: [np.stack(frames)],
    "tuples": lambda frames: (tuple(frames),),
    "a read-only array": lambda frames: np.broadcast_to(np.stack(frames), (4, 48, 64, 3)),
    "an array with negative strides": lambda frames: np.stack(frames[::-1])[::-1],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("processor", [VideoMambaImageProcessor, VideoMambaVideoProcessor])
@pytest.mark.filterwarnings("error")
def test_forms_of_input(processor, form):
    frames = numbered(4)
    expected = VideoMambaImageProcessor()(to_pil(frames), return_tensors="pt").pixel_values
    pixel_values = processor()(FORMS[form](frames), return_tensors="pt").pixel_values
    torch.testing.assert_close(pixel_values, expected, atol=0, rtol=0)


def test_batch_of_videos_of_different_sizes():
    pixel_values = VideoMambaImageProcessor()([numbered(3), numbered(3, 80, 50)], return_tensors="pt").pixel_values
    assert pixel_values.shape == (2, 3, 3, 224, 224)
    single = VideoMambaImageProcessor()(numbered(3, 80, 50), return_tensors="pt").pixel_values
    torch.testing.assert_close(pixel_values[1:], single, atol=0, rtol=0)


def test_list_without_return_tensors():
    pixel_values = VideoMambaImageProcessor()([numbered(3), numbered(5)]).pixel_values
    assert [tuple(video.shape) for video in pixel_values] == [(3, 3, 224, 224), (5, 3, 224, 224)]


@pytest.mark.parametrize(
    "grey", [lambda x: Image.fromarray(x), lambda x: x, lambda x: x[..., None], lambda x: x[None]]
)
def test_grey_frames_become_rgb(grey):
    frame = np.random.default_rng(0).integers(0, 256, (48, 64), dtype=np.uint8)
    expected = VideoMambaImageProcessor()([frame[..., None].repeat(3, -1)], return_tensors="pt").pixel_values
    pixel_values = VideoMambaImageProcessor()([grey(frame)], return_tensors="pt").pixel_values
    torch.testing.assert_close(pixel_values, expected, atol=0, rtol=0)


@pytest.mark.parametrize("form", [Image.fromarray, lambda x: x, lambda x: x.transpose(2, 0, 1)])
def test_transparent_frames_are_laid_on_white(form):
    frame = np.zeros((48, 64, 4), np.uint8)
    frame[..., 0], frame[..., 3] = 200, 51  # a fifth opaque: (0.2 * 200 + 0.8 * 255, 0.8 * 255, 0.8 * 255)
    pixel_values = VideoMambaImageProcessor()([form(frame)], return_tensors="pt").pixel_values
    expected = (np.array([244, 204, 204]) / 255 - MEAN) / STD
    np.testing.assert_allclose(pixel_values[0, 0, :, 100, 100], expected, atol=1e-5)


BAD_FRAMES = {
    "mixed sizes": (
        [*numbered(3), *numbered(1, 40, 60)],
        r"videos\[0\]\[3\] has .*\(3, 40, 60\) and videos\[0\]\[0\]",
    ),
    "mixed types": ([numbered_frame(0), numbered_frame(1) / 255], r"videos\[0\]\[1\] is torch.float64"),
    "two channels": ([np.zeros((48, 64, 2), np.uint8)], r"videos\[0\]\[0\] has shape \(48, 64, 2\)"),
    "two channels, told which": (np.zeros((2, 48, 64, 2), np.uint8), r"videos\[0\] has .*2 channels"),
    "five channels": ([[np.zeros((5, 48, 64), np.uint8)]], r"videos\[0\]\[0\] has shape \(5, 48, 64\)"),
    "float RGBA": ([np.zeros((48, 64, 4), np.float32)], r"4 channels of torch.float32"),
    "no numbers": ([np.zeros((48, 64, 3), bool)], r"type bool"),
    "one axis": (np.zeros(48, np.uint8), r"array of shape \(48,\)"),
    "six axes": (np.zeros((1, 1, 1, 4, 4, 3), np.uint8), r"array of shape \(1, 1, 1, 4, 4, 3\)"),
    "nothing": ([], r"`videos` is empty"),
    "no frames": ([[]], r"videos\[0\] has no frames"),
    "an array without frames": (np.zeros((0, 48, 64, 3), np.uint8), r"videos\[0\] has no frames"),
    "None": (None, r"`videos` is a NoneType"),
    "None among frames": ([*numbered(2), None], r"videos\[0\] is an array.* every entry of a batch must be a video"),
    "None in a video": ([numbered(2), [None]], r"videos\[1\]\[0\] is a NoneType"),
    "a dict": ({"a": 1}, r"`videos` is a dict"),
}


@pytest.mark.parametrize("case", BAD_FRAMES)
@pytest.mark.parametrize("processor", [VideoMambaImageProcessor, VideoMambaVideoProcessor])
def test_bad_frames(processor, case):
    videos, message = BAD_FRAMES[case]
    options = {"input_data_format": "channels_last"} if "told" in case else {}
    with pytest.raises(ValueError, match=message):
        processor()(videos, return_tensors="pt", **options)


@pytest.mark.parametrize("processor", [VideoMambaImageProcessor, VideoMambaVideoProcessor])
def test_videos_of_different_lengths_cannot_be_stacked(processor):
    with pytest.raises(ValueError, match=r"\(3, 3, 224, 224\), \(5, 3, 224, 224\).*num_frames"):
        processor()([numbered(3), numbered(5)], return_tensors="pt")


@pytest.mark.parametrize("file", ["clip.mp4", b"bytes", Path("clip.mp4"), ["clip.mp4"], [["clip.mp4"]]])
def test_image_processor_takes_no_files(file):
    with pytest.raises(ValueError, match="VideoMambaVideoProcessor"):
        VideoMambaImageProcessor()(file)


def test_frames_that_are_already_rescaled(caplog):
    frames = np.stack(numbered(2)).astype(np.float32) / 255
    expected = VideoMambaImageProcessor()(np.stack(numbered(2)).astype(np.float32), return_tensors="pt").pixel_values
    pixel_values = VideoMambaImageProcessor()(frames, do_rescale=False, return_tensors="pt").pixel_values
    torch.testing.assert_close(pixel_values, expected, atol=1e-4, rtol=0)

    warned = []
    logger = sys.modules[VideoMambaImageProcessor.__module__].logger
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(logger), "warning_once", lambda self, message: warned.append(message))
        VideoMambaImageProcessor()(frames)
        VideoMambaImageProcessor()(frames * 255)
    assert len(warned) == 1 and "do_rescale=False" in warned[0]


# --- which frames ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "options", "expected"),
    [
        (60, {}, range(14, 46, 2)),  # 31 frames, 14 before and 15 after
        (31, {}, range(0, 31, 2)),  # just long enough
        (30, {}, [0, 2, 4, 6, 8, 10, 12, 14, 15, 17, 19, 21, 23, 25, 27, 29]),  # too short: the whole clip
        (8, {}, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]),
        (2, {}, [0] * 8 + [1] * 8),
        (1, {}, [0] * 16),
        (10, {"num_frames": 4, "frame_stride": 1}, [3, 4, 5, 6]),
        (10, {"num_frames": 1}, [4]),
        (100, {"num_frames": 4, "frame_stride": None}, [0, 33, 66, 99]),
        (100, {"fps": 2}, [0, 14, 28, 42, 57, 71, 85, 99]),  # 4 s at 2 frames a second
        (3, {"fps": 2}, [0]),
        (5, {"fps": 50}, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]),
    ],
)
def test_sampling(total, options, expected):
    metadata = VideoMetadata(total_num_frames=total, fps=25.0)
    called = VideoMambaVideoProcessor().sample_frames(metadata, **options)
    saved = VideoMambaVideoProcessor(**options).sample_frames(metadata)
    assert called.tolist() == saved.tolist() == list(expected)
    assert called.dtype == np.int64


def test_sampling_of_everything():
    processor = VideoMambaVideoProcessor(num_frames=None)
    assert processor.sample_frames(VideoMetadata(total_num_frames=5)).tolist() == [0, 1, 2, 3, 4]


def test_a_call_goes_before_what_is_saved():
    metadata = VideoMetadata(total_num_frames=100, fps=25.0)
    processor = VideoMambaVideoProcessor(fps=2, frame_stride=None)
    assert len(processor.sample_frames(metadata)) == 8
    assert len(processor.sample_frames(metadata, num_frames=16)) == 16


@pytest.mark.parametrize("options", [{"num_frames": 4, "fps": 2}, {"fps": 2}])
def test_sampling_errors(options):
    with pytest.raises(ValueError, match="`num_frames`.*`fps`|frame rate"):
        VideoMambaVideoProcessor().sample_frames(VideoMetadata(total_num_frames=9), **options)


@pytest.mark.parametrize(
    ("option", "value"), [("num_frames", 0), ("num_frames", -1), ("frame_stride", 0), ("decoder", "ffmpeg")]
)
def test_bad_options(option, value):
    with pytest.raises(ValueError, match=option):
        VideoMambaVideoProcessor(**{option: value})
    with pytest.raises(ValueError, match=option):
        VideoMambaVideoProcessor()(numbered(2), **{option: value})


def test_decoded_frames_are_taken_as_they_are():
    frames = numbered(20)
    processor = VideoMambaVideoProcessor(do_resize=False, do_center_crop=False, do_normalize=False, do_rescale=False)

    def numbers(**options):
        video = processor(frames, return_tensors="np", **options).pixel_values[0]
        return read_numbers(video.transpose(0, 2, 3, 1))

    assert numbers() == numbers(do_sample_frames=False, num_frames=4) == list(range(20))
    assert numbers(do_sample_frames=True, num_frames=4) == [6, 8, 10, 12]
    assert numbers(do_sample_frames=True, num_frames=4, frame_stride=None) == [0, 6, 13, 19]
    metadata = {"total_num_frames": 20, "fps": 5.0}
    assert numbers(do_sample_frames=True, fps=1, video_metadata=metadata) == [0, 6, 13, 19]
    with pytest.raises(ValueError, match=r"videos\[0\] has 20 decoded frames, but 21"):
        numbers(do_sample_frames=True, num_frames=21)
    with pytest.raises(ValueError, match=r"`video_metadata` says 30"):
        numbers(do_sample_frames=True, video_metadata={"total_num_frames": 30})
    with pytest.raises(ValueError, match="entries|entry"):
        numbers(video_metadata=[metadata, metadata])


# --- files ----------------------------------------------------------------------------------------------------------

X265 = {"codec": "libx265", "options": {"x265-params": "log-level=none:open-gop=1", "preset": "ultrafast"}}
IRREGULAR = np.cumsum(np.random.default_rng(0).integers(10, 200, 60)).tolist()
FILES = {
    "h264.mp4": {"audio": True},
    "no_b_frames.mp4": {"b_frames": 0},
    "one_key_frame.mp4": {"gop": 250},
    "open_gop.mp4": {"b_frames": 3, "options": {"x264-params": "open-gop=1"}},
    "fragmented.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "irregular.mp4": {"pts": IRREGULAR},
    "irregular.mkv": {"pts": IRREGULAR},
    "late.mp4": {"pts": [2000 + 40 * i for i in range(60)]},
    "late.mkv": {"pts": [2000 + 40 * i for i in range(60)]},
    "h264.mkv": {},
    "h264.ts": {"audio": True},
    "h264.flv": {},
    "h264.avi": {},
    "raw.h264": {"format": "h264"},
    "mpeg4.avi": {"codec": "mpeg4"},
    "mpeg4_b_frames.avi": {"codec": "mpeg4", "options": {"bf": "2"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"bf": "2"}},
    "wmv2.wmv": {"codec": "wmv2"},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}},
    "hevc.mp4": X265,
    "odd_mpeg4.mp4": {"codec": "mpeg4", "size": (97, 131)},
    "odd_h264.mp4": {"pix_fmt": "yuv444p", "size": (97, 131)},
    "odd_vp8.webm": {"codec": "libvpx", "size": (97, 131)},
    "h264_10_bit.mp4": {"pix_fmt": "yuv420p10le"},
    "hevc_10_bit.mp4": {**X265, "pix_fmt": "yuv420p10le"},
    "ffv1_10_bit.mkv": {"codec": "ffv1", "pix_fmt": "yuv420p10le"},
    "grey.mp4": {"pix_fmt": "gray"},
    "grey_16_bit.mkv": {"codec": "ffv1", "pix_fmt": "gray16le"},
    "animation.gif": {"codec": "gif", "pix_fmt": "rgb8"},
}


@pytest.fixture(scope="session")
def video(tmp_path_factory):
    """Returns the path of a file of `FILES`, of 60 numbered frames; writes it when first asked for."""
    folder = tmp_path_factory.mktemp("videos")

    def path(name):
        file = folder / name
        if not file.exists():
            write_video(file, 60, **FILES[name])
        return str(file)

    return path


def fetch(file, indices=None, **options):
    """(T, H, W, 3) array of the frames at `indices` of a file, and the metadata."""
    sample = None if indices is None else (lambda metadata: np.array(indices))
    frames, metadata = VideoMambaVideoProcessor().fetch_videos(file, sample, **options)
    return frames.numpy(), metadata


@pytest.mark.parametrize("name", FILES)
@each_decoder
def test_frames_are_those_asked_for(video, name, decoder):
    frames, metadata = fetch(video(name), decoder=decoder)
    assert frames.dtype == np.uint8
    assert metadata.total_num_frames == len(frames) == 60
    assert (metadata.height, metadata.width) == frames.shape[1:3] == FILES[name].get("size", (64, 96))
    assert read_numbers(frames) == metadata.frames_indices.tolist() == list(range(60))
    assert np.ptp(frames[0], axis=-1).max() < 8 if name.startswith("grey") else np.ptp(frames[0], axis=-1).max() > 120
    for indices in ([0], [1], [17], [59], [13, 15, 17, 19], [40, 44, 48, 52, 56], [7, 7, 8, 30, 30], [59, 3, 20]):
        some, metadata = fetch(video(name), indices, decoder=decoder)
        assert read_numbers(some) == indices == metadata.frames_indices.tolist()
        np.testing.assert_array_equal(some, frames[indices])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "decoder", [pytest.param("torchcodec", marks=needs_torchcodec), pytest.param("decord", marks=needs_decord)]
)
def test_decoders_agree(video, name, decoder):
    indices = list(range(5, 37, 2))
    expected, _ = fetch(video(name), indices, decoder="pyav")
    frames, _ = fetch(video(name), indices, decoder=decoder)
    # Their versions of swscale differ where there are odd sides or more than 8 bits, and nowhere else.
    difference = np.abs(frames.astype(int) - expected).mean()
    assert difference <= (1 if "odd" in name or "10_bit" in name else 0)


@pytest.mark.parametrize("clip", ["arm_wrestling.mp4", "mpeg4.avi"])
@each_decoder
def test_real_clips(clip, decoder):
    path = CLIPS / clip
    if not path.exists():
        pytest.skip("the folder of real clips beside the project is absent")
    with av.open(str(path)) as container:
        expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for indices in (range(60, 92, 2), [0], [len(expected) - 1], range(0, len(expected), 9)):
        frames, metadata = fetch(path, list(indices), decoder=decoder)
        assert metadata.total_num_frames == len(expected)
        np.testing.assert_array_equal(frames, np.stack([expected[i] for i in indices]))


def test_only_what_is_needed_is_decoded(tmp_path, monkeypatch):
    path = write_video(tmp_path / "long.mp4", 400, size=(32, 48), gop=20, options={"sc_threshold": "0"})
    decoded = []
    original = video_processing_videomamba._decoded_frames

    def counting(container, stream):
        for frame in original(container, stream):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(video_processing_videomamba, "_decoded_frames", counting)
    _, metadata = fetch(path, list(range(205, 237, 2)), decoder="pyav")
    assert metadata.total_num_frames == 400
    assert len(decoded) == 236 - 200  # from the key frame at 200 to the last wanted frame, 235


@pytest.mark.parametrize("extension", ["mp4", "mkv"])
@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
@each_decoder
def test_rotation(tmp_path, extension, quarters, decoder):
    path = write_video(tmp_path / f"turned.{extension}", 4, codec="mpeg4", rotation=90 * quarters)
    frames, metadata = fetch(path, decoder=decoder)
    upright = np.rot90(numbered_frame(2), quarters)  # both count counter-clockwise
    assert frames.shape[1:] == upright.shape and (metadata.height, metadata.width) == upright.shape[:2]
    assert np.abs(frames[2].astype(int) - upright).mean() < 12
    assert read_numbers(np.rot90(frames, -quarters, axes=(1, 2))) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("mirror", "expected"), [("hflip", lambda x: x[:, ::-1]), ("vflip", lambda x: x[::-1]), (None, lambda x: x)]
)
def test_mirroring(tmp_path, mirror, expected):
    with av.open(str(tmp_path / "mirrored.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        stream.set_display_rotation(0, **({mirror: True} if mirror else {}))
        container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered_frame(5), format="rgb24")))
        container.mux(stream.encode())
    frames, _ = fetch(tmp_path / "mirrored.mp4", decoder="pyav")
    assert np.abs(frames[0].astype(int) - expected(numbered_frame(5))).mean() < 12


def test_edit_list_that_cuts_off_the_beginning(tmp_path):
    path = write_video(
        tmp_path / "cut.mp4",
        60,
        gop=100,
        pts=[40 * i - 200 for i in range(60)],
        container_options={"avoid_negative_ts": "disabled"},
    )
    for decoder in ("pyav", "decord") if usable("decord") else ("pyav",):
        frames, metadata = fetch(path, [0, 30, 54], decoder=decoder)
        assert metadata.total_num_frames == 55
        assert read_numbers(frames) == [5, 35, 59]


@pytest.mark.parametrize("claim", [20, 600])
def test_container_that_lies_about_its_length(video, tmp_path, claim):
    path = claim_frames_in_avi(video("mpeg4.avi"), tmp_path / "lie.avi", claim)
    with av.open(path) as container:
        assert container.streams.video[0].frames == claim
    output = VideoMambaVideoProcessor()(path, return_metadata=True, frame_stride=None)
    assert output["video_metadata"][0].total_num_frames == 60
    assert output["video_metadata"][0].frames_indices[-1] == 59


@pytest.mark.parametrize(
    ("name", "keep", "low", "high"), [("h264.mkv", 0.6, 15, 45), ("h264.ts", 0.6, 15, 45), ("mpeg4.avi", 0.6, 15, 45)]
)
def test_files_cut_in_the_middle(video, tmp_path, capfd, name, keep, low, high):
    path = truncate(video(name), tmp_path / name, keep)
    frames, metadata = fetch(path)
    assert low < metadata.total_num_frames < high
    assert read_numbers(frames) == list(range(metadata.total_num_frames))
    assert capfd.readouterr() == ("", "")


def test_mp4_cut_in_the_middle(tmp_path, capfd):
    whole = write_video(tmp_path / "whole.mp4", 60, container_options={"movflags": "faststart"})
    path = truncate(whole, tmp_path / "cut.mp4", 0.6)
    with av.open(path) as container:
        assert container.streams.video[0].frames == 60  # what it promises
    for decoder in ("pyav", "decord") if usable("decord") else ("pyav",):
        frames, metadata = fetch(path, decoder=decoder)
        assert 15 < metadata.total_num_frames < 45
        assert read_numbers(frames) == list(range(metadata.total_num_frames))
        pixel_values = VideoMambaVideoProcessor(frame_stride=None)(path, return_tensors="pt").pixel_values
        assert pixel_values.shape == (1, 16, 3, 224, 224)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("extension", ["mp4", "mkv", "avi"])
@each_decoder
def test_one_frame(tmp_path, extension, decoder):
    path = write_video(tmp_path / f"one.{extension}", [numbered_frame(77)], codec="mpeg4")
    output = VideoMambaVideoProcessor(decoder=decoder)(path, return_tensors="pt", return_metadata=True)
    assert output.pixel_values.shape == (1, 16, 3, 224, 224)
    assert (output.pixel_values == output.pixel_values[:, :1]).all()
    assert output["video_metadata"][0].frames_indices.tolist() == [0] * 16


def test_change_of_frame_size(tmp_path):
    for i, size in enumerate([(64, 96), (48, 80)]):
        write_video(tmp_path / f"{i}.ts", 20, size=size)
    both = (tmp_path / "0.ts").read_bytes() + (tmp_path / "1.ts").read_bytes()
    with pytest.raises(ValueError, match=r"changes its frame size: .*\(48, 80\), \(64, 96\)"):
        fetch(both, decoder="pyav")


@pytest.mark.parametrize("case", ["empty", "text", "html", "noise", "moov", "audio", "mp4 audio", "jpeg", "playlist"])
@each_decoder
def test_files_that_are_no_video(tmp_path, capfd, video, case, decoder):
    path = tmp_path / "clip.mp4"
    if case == "mp4 audio":
        write_audio(path)
    elif case == "audio":
        write_audio(path := tmp_path / "sound.m4a")
    elif case == "moov":
        truncate(video("h264.mp4"), path, 0.5)
    elif case == "jpeg":
        Image.fromarray(numbered_frame(0)).save(path, "jpeg")
    else:
        path.write_bytes(
            {
                "empty": b"",
                "text": b"not a video at all\n" * 40,
                "html": b"<!doctype html><title>404</title>",
                "noise": np.random.default_rng(0).bytes(9999),
                "playlist": b"#EXTM3U\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
            }[case]
        )
    message = {
        "empty": "is empty",
        "text": "begins with the text 'not a video",
        "html": "begins with the text '<!doctype html>",
        "noise": "begins with the bytes",
        "moov": "lacks its index",
        "jpeg": "still image",
        "playlist": "begins with the text '#EXTM3U",
    }.get(case, "no video stream")
    if decoder == "torchcodec" and "audio" in case:
        message = "cannot be read as a video"
    processor = VideoMambaVideoProcessor(decoder=decoder)
    with pytest.raises(ValueError, match=message) as error:
        processor(path)
    assert str(path) in str(error.value)
    with pytest.raises(ValueError, match=message):
        processor(path.read_bytes())
    assert capfd.readouterr() == ("", "")


def test_cover_picture_is_no_video(tmp_path, video):
    path = write_audio(tmp_path / "song.mp4", cover=numbered_frame(0))
    with av.open(path) as container:
        assert [stream.type for stream in container.streams] == ["audio", "video"]
    with pytest.raises(ValueError, match="no video stream"):
        fetch(path, decoder="pyav")


def test_paths_that_are_no_file(tmp_path):
    processor = VideoMambaVideoProcessor()
    with pytest.raises(FileNotFoundError, match="nowhere.mp4"):
        processor(str(tmp_path / "nowhere.mp4"))
    with pytest.raises(IsADirectoryError, match="is a folder"):
        processor(tmp_path)
    if os.path.exists("/dev/zero"):
        with pytest.raises(ValueError, match="device"):
            processor("/dev/zero")
    with pytest.raises(ValueError, match=r"mixes files.*videos\[1\] is a ndarray"):
        processor([str(tmp_path), numbered_frame(0)])
    (tmp_path / "notes.txt").write_text("text")
    with open(tmp_path / "notes.txt") as file, pytest.raises(ValueError, match="text mode"):
        processor(file)


def test_damage_in_the_middle_gives_an_error_or_whole_frames(video, tmp_path, capfd):
    data = bytearray(Path(video("mjpeg.avi")).read_bytes())
    middle = len(data) // 2
    data[middle : middle + 9000] = bytes(9000)
    (tmp_path / "damaged.avi").write_bytes(data)
    frames, metadata = fetch(tmp_path / "damaged.avi", decoder="pyav")
    numbers = read_numbers(frames)
    assert 30 < metadata.total_num_frames == len(frames) < 60
    assert numbers[:25] == list(range(25)) and numbers[-5:] == list(range(55, 60))
    data[2000:-2000] = bytes(len(data) - 4000)
    (tmp_path / "damaged.avi").write_bytes(data)
    frames, metadata = fetch(tmp_path / "damaged.avi", decoder="pyav")
    assert set(read_numbers(frames)) <= set(range(60))
    assert capfd.readouterr() == ("", "")


# --- where a file may come from -------------------------------------------------------------------------------------


def test_sources(video):
    path = video("h264.mp4")
    data = Path(path).read_bytes()
    buffer = io.BytesIO()
    buffer.write(data)  # stands at its end
    processor = VideoMambaVideoProcessor()
    expected = processor(path, return_tensors="pt").pixel_values
    with open(path, "rb") as file:
        for source in (Path(path), data, bytearray(data), buffer, buffer, file, [path], [[path]]):
            torch.testing.assert_close(processor(source, return_tensors="pt").pixel_values, expected)
    batch = processor([path, data], return_tensors="pt").pixel_values
    torch.testing.assert_close(batch, expected.repeat(2, 1, 1, 1, 1))


@each_decoder
def test_bytes_with_every_decoder(video, decoder):
    data = Path(video("h264.mp4")).read_bytes()
    frames, metadata = fetch(data, [3, 9, 33], decoder=decoder)
    assert read_numbers(frames) == [3, 9, 33] and metadata.video_backend == decoder


def test_from_file_to_pixel_values(video):
    with av.open(video("h264.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    theirs = VideoMAEImageProcessor(image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD)
    expected = theirs([frames[i] for i in range(14, 46, 2)], return_tensors="pt").pixel_values
    output = VideoMambaVideoProcessor()(video("h264.mp4"), return_tensors="pt", return_metadata=True)
    torch.testing.assert_close(output["pixel_values"], expected, atol=1e-5, rtol=0)
    metadata = output["video_metadata"][0]
    assert (metadata.total_num_frames, metadata.fps, metadata.duration) == (60, 25.0, 2.4)
    assert (metadata.height, metadata.width, metadata.video_backend) == (64, 96, "pyav")
    assert metadata.frames_indices.tolist() == list(range(14, 46, 2))
    assert metadata.timestamps[0] == 14 / 25


def test_what_a_pipeline_passes(video):
    processor = VideoMambaVideoProcessor()
    batch = processor(video("h264.mp4"), num_frames=8, do_sample_frames=True, return_tensors="pt")
    assert list(batch) == ["pixel_values"] and batch.pixel_values.shape == (1, 8, 3, 224, 224)
    assert batch.to(torch.bfloat16).pixel_values.dtype == torch.bfloat16
    assert processor(video("h264.mp4"), do_sample_frames=False).pixel_values[0].shape[0] == 60
    assert processor(video("h264.mp4"), fps=5, return_tensors="pt").pixel_values.shape[1] == 12


class Handler(http.server.BaseHTTPRequestHandler):
    files, requests = {}, []

    def do_GET(self):
        self.requests.append(self.path)
        if self.path == "/slow":
            time.sleep(1.5)
        if self.path == "/moved.mp4":
            self.send_response(302)
            self.send_header("Location", "/clip.mp4")
            self.end_headers()
            return
        body = self.files.get(self.path)
        self.send_response(404 if body is None else 200)
        self.end_headers()
        self.wfile.write(body or b"<html>no such page</html>")
        if self.path == "/endless":
            try:
                for _ in range(300):
                    self.wfile.write(bytes(1 << 16))
                    time.sleep(0.01)
            except OSError:
                pass

    def log_message(self, *args):
        pass


@pytest.fixture
def server(video):
    Handler.files = {
        "/clip.mp4": Path(video("h264.mp4")).read_bytes(),
        "/page": b"<html>hello</html>",
        "/endless": b"x",
    }
    Handler.requests = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *args: None  # clients that hang up are part of the test
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_urls(server, video, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # speaks of the Hub, not of an address that the user gave
    processor = VideoMambaVideoProcessor()
    expected = processor(video("h264.mp4"), return_tensors="pt").pixel_values
    for path in ("/clip.mp4", "/moved.mp4"):
        torch.testing.assert_close(processor(server + path, return_tensors="pt").pixel_values, expected)
    with pytest.raises(ConnectionError, match="/missing.mp4 could not be downloaded .*404"):
        processor(server + "/missing.mp4")
    with pytest.raises(ValueError, match="/page cannot be read as a video .*<html>hello"):
        processor(server + "/page")
    with pytest.raises(ConnectionError, match="could not be downloaded"):
        processor("http://127.0.0.1:9/refused.mp4")
    with pytest.raises(ConnectionError, match="could not be downloaded"):
        processor("http://")


def test_urls_that_never_end(server, monkeypatch):
    monkeypatch.setattr(video_processing_videomamba, "DOWNLOAD_TIMEOUT", 0.2)
    with pytest.raises(ConnectionError, match="/slow could not be downloaded .*Timeout"):
        VideoMambaVideoProcessor()(server + "/slow")
    monkeypatch.setattr(video_processing_videomamba, "DOWNLOAD_MAX_BYTES", 1 << 18)
    with pytest.raises(ConnectionError, match="/endless did not end within 262144 bytes"):
        VideoMambaVideoProcessor()(server + "/endless")


def test_nothing_else_is_opened(server, tmp_path, video):
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{server}/clip.mp4\n#EXT-X-ENDLIST\n"
    concat = f"ffconcat version 1.0\nfile {video('h264.mp4')}\n"
    for name, text in {"list.m3u8": playlist, "list.mp4": playlist, "concat.mp4": concat}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match="cannot be read as a video"):
            fetch(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        fetch(f"concat:{video('h264.mp4')}")
    assert Handler.requests == []


# --- decoders -------------------------------------------------------------------------------------------------------


def test_missing_decoders(video, monkeypatch):
    for module in ("av", "torchcodec", "decord"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match="pip install av"):
        VideoMambaVideoProcessor()(video("h264.mp4"))
    with pytest.raises(ImportError, match="of decord none can be used .*pip install decord"):
        VideoMambaVideoProcessor(decoder="decord")(video("h264.mp4"))
    assert VideoMambaVideoProcessor()(numbered(2)).pixel_values[0].shape == (2, 3, 224, 224)


@needs_decord
def test_the_next_decoder_stands_in(video, monkeypatch):
    assert fetch(video("h264.mp4"), [0])[1].video_backend == "pyav"
    # decord would return wrong frames of this one.
    assert fetch(video("h264.ts"), [0], decoder="decord")[1].video_backend == "pyav"
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    monkeypatch.setattr(video_processing_videomamba, "av", None)
    frames, metadata = fetch(video("h264.mp4"), [2, 50])
    assert read_numbers(frames) == [2, 50] and metadata.video_backend == "decord"
    with pytest.raises(ValueError, match="h264.ts: decord misplaces the frames.*pip install av"):
        fetch(video("h264.ts"), [0])


# --- saving and loading ---------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    processor = VideoMambaVideoProcessor(num_frames=8, frame_stride=None, decoder="pyav", size={"shortest_edge": 64})
    processor.save_pretrained(tmp_path)
    for loaded in (VideoMambaVideoProcessor.from_pretrained(tmp_path), AutoVideoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is VideoMambaVideoProcessor
        assert (loaded.num_frames, loaded.frame_stride, loaded.decoder) == (8, None, "pyav")
        assert loaded.to_dict() == processor.to_dict()
    changed = AutoVideoProcessor.from_pretrained(tmp_path, frame_stride=3, decoder="decord")
    assert (changed.frame_stride, changed.decoder) == (3, "decord")
    assert changed.sample_frames(VideoMetadata(total_num_frames=22)).tolist() == list(range(0, 22, 3))

    images = VideoMambaImageProcessor(size={"shortest_edge": 64}, crop_size=32)
    images.save_pretrained(tmp_path / "images")
    loaded = AutoImageProcessor.from_pretrained(tmp_path / "images")
    assert type(loaded) is VideoMambaImageProcessor and loaded.to_dict() == images.to_dict()


@pytest.mark.parametrize("module", ["image_processing_videomamba.py", "video_processing_videomamba.py"])
def test_what_traveling_code_requires(module):
    """transformers refuses remote code with an import, outside of `try`, that is not installed."""
    allowed = {"PIL", "huggingface_hub", "numpy", "torch", "torchvision", "transformers"}
    assert set(get_imports(PACKAGE / module)) - set(sys.stdlib_module_names) <= allowed


def test_the_configuration_files_are_plain(tmp_path):
    VideoMambaVideoProcessor().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "video_preprocessor_config.json").read_text())
    assert saved["num_frames"] == 16 and saved["frame_stride"] == 2
    assert saved["size"] == {"shortest_edge": 224} and saved["crop_size"] == {"height": 224, "width": 224}
    assert saved["image_mean"] == list(IMAGENET_DEFAULT_MEAN) and saved["image_std"] == list(IMAGENET_DEFAULT_STD)


def test_numbers_survive_compression():
    """The ruler of these tests."""
    for number in (0, 1, 512, 1023, 365):
        assert read_number(numbered_frame(number)) == number
        assert read_number(numbered_frame(number, 97, 131)) == number
