"""The video processor: which frames it takes, where files may come from, and what it says of bad options."""

import io
import json
import logging
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoVideoProcessor, VideoMAEImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.video_utils import VideoMetadata

from modeling_videomamba import VideoMambaVideoProcessor
from modeling_videomamba.video_decoding import DecodedVideoMetadata, decode_video
from video_files import STORED, STORED_SAMPLES, numbered_frame, numbered_frames, read_numbers, write_video


SEGMENTS = {"frame_stride": None, "spread_in_segments": True}


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
        # In segments of 279 / 8 = 34.875 frames: 0, 35, 70, 105, 140 (139.5), 174, 209 and 244, and half a segment on.
        (
            280,
            SEGMENTS | {"num_frames": 8},
            [17, 52, 87, 122, 157, 191, 226, 261],
        ),
        (9, SEGMENTS | {"num_frames": 4}, [1, 3, 5, 7]),
        (2, SEGMENTS | {"num_frames": 4}, [0, 0, 0, 1]),
        (60, {"spread_in_segments": True}, range(14, 46, 2)),  # at a distance all the same
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


def clip_shown_at(*frame_times):
    """Metadata of a clip whose frames are shown at these times, in seconds; the last time is that of its end."""
    frame_times = np.array(frame_times, float)
    total = len(frame_times) - 1
    fps = (total - 1) / frame_times[-2] if total > 1 else 1 / frame_times[-1]
    return DecodedVideoMetadata(total, fps, frame_times=frame_times)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        # Four frames, two a second: 3 s are looked at after 0.75, 1.25, 1.75 and 2.25 s.
        (VideoMetadata(total_num_frames=24, fps=8.0), [6, 10, 14, 18]),
        (VideoMetadata(total_num_frames=12, fps=4.0), [3, 5, 7, 9]),
        (VideoMetadata(total_num_frames=6, fps=2.0), [1, 2, 3, 4]),
        (VideoMetadata(total_num_frames=3, fps=1.0), [0, 1, 1, 2]),
        # 1 s is shorter than 4 / 2 s: the middles of four equal parts, after 0.125, 0.375, 0.625 and 0.875 s.
        (VideoMetadata(total_num_frames=8, fps=8.0), [1, 3, 5, 7]),
        (VideoMetadata(total_num_frames=2, fps=2.0), [0, 0, 1, 1]),
        (VideoMetadata(total_num_frames=1, fps=1.0), [0, 0, 0, 0]),
        # The frame on screen: after 0.75, 1.25, 1.75 and 2.25 s of 3.
        (clip_shown_at(0, 0.1, 0.2, 0.76, 1.24, 1.3, 2.25, 2.4, 3), [2, 4, 5, 6]),
        # Frames of 24 a second at thousandths of a second, as Matroska has them: 12, 24, 36, 48 begin on time.
        (clip_shown_at(*np.round(np.arange(61) / 24, 3)), [12, 24, 36, 48]),
        (clip_shown_at(*np.arange(61) / 24), [12, 24, 36, 48]),
        # The last frame's duration counts: of 5 s, it is on screen for 4.
        (clip_shown_at(0, 0.5, 1, 5), [2, 2, 2, 2]),
    ],
)
def test_sampling_by_time(metadata, expected):
    processor = VideoMambaVideoProcessor(num_frames=4, sampling_fps=2)
    assert processor.sample_frames(metadata).tolist() == expected
    counted = VideoMambaVideoProcessor(num_frames=4)
    assert counted.sample_frames(metadata, sampling_fps=2).tolist() == expected
    # Frames are counted if a call says so, whatever is saved.
    if metadata.total_num_frames == 24:
        assert processor.sample_frames(metadata, frame_stride=2).tolist() == [8, 10, 12, 14]
        assert processor.sample_frames(metadata, sampling_fps=None).tolist() == [8, 10, 12, 14]


@pytest.mark.parametrize(
    ("frame_times", "fps", "expected"),
    [
        # 1 s: after 0, 0.3, 0.6 and 0.9 s, the last frame's.
        ([0, 0.1, 0.2, 0.32, 0.5, 0.62, 0.7, 0.9, 1], 4, [0, 3, 5, 7]),
        ([0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.9, 1], 4, [0, 5, 6, 6]),  # nothing new between 0.05 and 0.9 s
        ([0, 0.25, 0.5, 0.75, 1], 4, [0, 1, 2, 3]),
        ([0, 0.333, 0.667, 0.999], 3, [0, 1, 2]),  # a second, in thousandths
        ([0, 0.5, 8], 8, [0, 0, 0, 0, 1, 1, 1, 1]),
    ],
)
def test_fps_goes_by_times(frame_times, fps, expected):
    found = VideoMambaVideoProcessor().sample_frames(clip_shown_at(*frame_times), fps=fps)
    assert found.tolist() == expected and found.dtype == np.int64


@pytest.mark.parametrize("rate", [5, 23.976, 25, 50])
@pytest.mark.parametrize("fps", [1, 2.5, 10])
def test_fps_of_a_constant_rate_goes_by_index(rate, fps):
    for total in (1, 2, 17, 100, 253):
        by_index = VideoMambaVideoProcessor().sample_frames(VideoMetadata(total, fps=rate), fps=fps)
        timed = clip_shown_at(*np.arange(total + 1) / rate)
        assert VideoMambaVideoProcessor().sample_frames(timed, fps=fps).tolist() == by_index.tolist()


@pytest.mark.parametrize("name", STORED)
def test_one_clip_stored_in_many_ways_gives_the_same_frames(stored, name):
    processor = VideoMambaVideoProcessor(num_frames=8, sampling_fps=5)
    for section in (None, (0, None)):
        if section is None or name != "30.avi":
            frames, metadata = decode_video(stored / name, processor.sample_frames, section=section)
            assert read_numbers(frames[:, :, 16:80]) == STORED_SAMPLES
            assert metadata.timestamps == pytest.approx(np.arange(1.3, 2.8, 0.2) - 0.02, abs=0.05)


@pytest.mark.parametrize("options", [{}, {"options": {"crf": "35"}}, {"codec": "mpeg4"}])
def test_repeated_pictures_are_told(tmp_path, options):
    """Of pictures that stand three times each, frames 14 to 25 show 4, three times 5, 6 and 7, and twice 8."""
    path = write_video(tmp_path / "clip.mp4", [numbered_frame(i // 3) for i in range(40)], **options)
    for transform in (None, VideoMambaVideoProcessor().frame_transform()):
        _, metadata = decode_video(path, lambda metadata: range(14, 26), transform=transform)
        assert metadata.num_repeated_frames == 7
        _, metadata = decode_video(path, lambda metadata: [3, 3, 3, 6, 6, 9], transform=transform)
        assert metadata.num_repeated_frames == 0  # asked for more than once, which the indices say


@pytest.mark.parametrize("name", ["clip.mp4", "clip.avi"])
def test_pictures_that_repeat_are_sampled_around(tmp_path, name):
    """Of five pictures a second, eight frames at 20 a second show three; taken again, they show five or more."""
    frames = [numbered_frame(i // 6) for i in range(180)]
    path = write_video(tmp_path / name, frames, rate=30, codec="mpeg4" if name == "clip.avi" else "libx264")
    processor = VideoMambaVideoProcessor(num_frames=8, sampling_fps=20)
    frames, metadata = decode_video(path, processor.sample_frames)
    assert metadata.num_repeated_frames < 4 and len(set(read_numbers(frames))) >= 5
    inputs = processor(path, return_tensors="pt", return_metadata=True)
    assert inputs["video_metadata"][0].frames_indices.tolist() == metadata.frames_indices.tolist()
    frames, metadata = decode_video(path, lambda metadata: processor.sample_frames(metadata, frame_stride=1))
    assert metadata.frames_indices.tolist() == list(range(86, 94))  # frames that are counted stay


@pytest.mark.parametrize("sampling_fps", [6, 16])
@pytest.mark.parametrize("rate", [5, 30])
def test_no_picture_fills_each_tubelet_by_itself(tmp_path, rate, sampling_fps):
    """Eight pictures of 5 a second, sixteen frames wanted: each would fill a tubelet of two."""
    frames = [numbered_frame(i * 5 // rate) for i in range(8 * rate // 5)]
    path = write_video(tmp_path / "clip.mp4", frames, rate=rate, codec="libx264")
    frames, metadata = decode_video(
        path, VideoMambaVideoProcessor(num_frames=16, sampling_fps=sampling_fps).sample_frames
    )
    assert read_numbers(frames) == [0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7]
    assert metadata.repeats.tolist() == [True, True, *[False, True] * 6, False]


def test_still_scenes_repeat_nothing(tmp_path):
    path = write_video(tmp_path / "clip.mp4", [numbered_frame(5)] * 40)
    _, metadata = decode_video(path, VideoMambaVideoProcessor(num_frames=8, sampling_fps=5).sample_frames)
    assert metadata.num_repeated_frames == 0 and metadata.frames_indices[1] - metadata.frames_indices[0] == 5


def test_sampling_of_everything():
    processor = VideoMambaVideoProcessor(num_frames=None)
    assert processor.sample_frames(VideoMetadata(total_num_frames=5)).tolist() == [0, 1, 2, 3, 4]


def test_a_call_goes_before_what_is_saved():
    metadata = VideoMetadata(total_num_frames=100, fps=25.0)
    processor = VideoMambaVideoProcessor(fps=2, frame_stride=None)
    assert len(processor.sample_frames(metadata)) == 8
    assert len(processor.sample_frames(metadata, num_frames=16)) == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 4, "fps": 2}, r"`num_frames` \(4\) and `fps` \(2\) exclude each other"),
        ({"sampling_fps": 2}, "Sampling 2 frames a second needs .* or pass `sampling_fps=None` to count frames"),
        ({"fps": 2}, "Sampling 2 frames a second needs the frame rate of the clip, which is unknown"),
    ],
)
def test_sampling_errors(options, message):
    with pytest.raises(ValueError, match=message):
        VideoMambaVideoProcessor().sample_frames(VideoMetadata(total_num_frames=9), **options)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_frames", 0),
        ("num_frames", -1),
        ("num_frames", "16"),
        ("num_frames", True),
        ("frame_stride", 0),
        ("frame_stride", "2"),
        ("fps", 0),
        ("sampling_fps", 0),
        ("sampling_fps", "8"),
        ("sampling_fps", float("inf")),
        ("fps", -1),
        ("fps", float("inf")),
        ("fps", float("nan")),
        ("decoder", "ffmpeg"),
        ("start_seconds", -1),
        ("start_seconds", float("nan")),
        ("start_seconds", "2"),
        ("stop_seconds", 0),
        ("stop_seconds", float("inf")),
    ],
)
def test_bad_options(option, value):
    with pytest.raises(ValueError, match=option):
        VideoMambaVideoProcessor(**{option: value})
    with pytest.raises((ValueError, StrictDataclassError), match=option):
        VideoMambaVideoProcessor()(numbered_frames(2), **{option: value})


def test_decoded_frames_are_taken_as_they_are():
    frames = numbered_frames(20)
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
    # Each call prints it several times, in transformers' checks of types, and an hour has 100,000 times.
    assert "frame_times" not in repr(metadata)


def test_files_and_frames_do_not_mix(video):
    with pytest.raises(ValueError, match=r"mixes files.*videos\[1\] is a ndarray"):
        VideoMambaVideoProcessor()([video("h264.mp4"), numbered_frames(1)[0]])


def test_decoded_frames_need_no_decoder(monkeypatch):
    for module in ("av", "torchcodec", "decord"):
        monkeypatch.setitem(sys.modules, module, None)
    assert VideoMambaVideoProcessor()(numbered_frames(2)).pixel_values[0].shape == (2, 3, 224, 224)


def test_what_a_pipeline_passes(video):
    processor = VideoMambaVideoProcessor()
    batch = processor(video("h264.mp4"), num_frames=8, do_sample_frames=True, return_tensors="pt")
    assert list(batch) == ["pixel_values"] and batch.pixel_values.shape == (1, 8, 3, 224, 224)
    assert batch.to(torch.bfloat16).pixel_values.dtype == torch.bfloat16
    assert processor(video("h264.mp4"), do_sample_frames=False).pixel_values[0].shape[0] == 60
    assert processor(video("h264.mp4"), fps=5, return_tensors="pt").pixel_values.shape[1] == 12


def test_a_saved_fps_is_not_dropped_in_silence(video, tmp_path):
    """Pipelines name `num_frames` in every call: other frames than those of processor and model alone."""
    VideoMambaVideoProcessor(fps=5).save_pretrained(tmp_path)
    processor = VideoMambaVideoProcessor.from_pretrained(tmp_path)
    assert processor(video("h264.mp4")).pixel_values[0].shape[0] == 12
    with pytest.raises(ValueError, match=r"saved to sample 5 frames a second, and `num_frames`=16 was asked for"):
        processor(video("h264.mp4"), num_frames=16, do_sample_frames=True)
    assert processor(video("h264.mp4"), num_frames=4, fps=None).pixel_values[0].shape[0] == 4


def test_mean_and_deviation_of_another_number_of_channels():
    for name in ("image_mean", "image_std"):
        with pytest.raises(ValueError, match=f"`{name}` has 2 numbers, but the frames have 3 channels"):
            VideoMambaVideoProcessor(**{name: [0.5, 0.5]})(numbered_frames(2))
    assert VideoMambaVideoProcessor(image_mean=0.5, image_std=[0.5])(numbered_frames(2)).pixel_values[0].shape[0] == 2


def test_settings_of_a_class_that_there_is_not(tmp_path, caplog):
    settings = {"num_frames": 8, "video_processor_type": "NoSuchProcessor"}
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(settings))
    logger = logging.getLogger("modeling_videomamba.frames_videomamba")
    logger.addHandler(caplog.handler)
    processor = VideoMambaVideoProcessor.from_pretrained(tmp_path)
    logger.removeHandler(caplog.handler)
    assert processor.num_frames == 8
    assert "settings of another class (`video_processor_type` NoSuchProcessor)" in caplog.text


def test_a_section_is_sampled_as_a_clip_of_its_own(video):
    options = {"num_frames": 4, "return_tensors": "pt", "return_metadata": True}
    whole = VideoMambaVideoProcessor()(video("h264.mp4"), do_sample_frames=False, return_tensors="pt").pixel_values
    for processor, section in (
        (VideoMambaVideoProcessor(), {"start_seconds": 1, "stop_seconds": 1.8}),
        (VideoMambaVideoProcessor(start_seconds=1, stop_seconds=1.8), {}),
    ):
        batch = processor(video("h264.mp4"), **options, **section)
        # 25 frames a second: 25 to 44, of these the middle four at stride 2.
        torch.testing.assert_close(batch.pixel_values, whole[:, [31, 33, 35, 37]])
        assert batch.video_metadata[0].total_num_frames == 20
    with pytest.raises(ValueError, match="`start_seconds` and `stop_seconds` choose a section of a file"):
        VideoMambaVideoProcessor()(numbered_frames(20), start_seconds=1)


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


def test_the_configuration_files_are_plain(tmp_path):
    VideoMambaVideoProcessor().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "video_preprocessor_config.json").read_text())
    assert saved["num_frames"] == 16 and saved["frame_stride"] == 2
    assert saved["size"] == {"shortest_edge": 224} and saved["crop_size"] == {"height": 224, "width": 224}
    assert saved["image_mean"] == list(IMAGENET_DEFAULT_MEAN) and saved["image_std"] == list(IMAGENET_DEFAULT_STD)


@pytest.mark.parametrize("options", [{"num_frames": 10**9}, {"fps": 1e9}])
def test_more_frames_than_memory_holds(options):
    with pytest.raises(ValueError, match="frames were to be sampled, more than 65536"):
        VideoMambaVideoProcessor().sample_frames(VideoMetadata(total_num_frames=60, fps=25.0), **options)


@pytest.mark.parametrize("name", ["slow.mp4", "slow.mkv"])
def test_frames_a_second_are_those_of_the_times(tmp_path, name):
    """Forty frames, one every 100 s: in 4,000 s, one frame every 400 s is ten."""
    path = write_video(tmp_path / name, 40, pts=[100_000 * i for i in range(40)], b_frames=0)
    output = VideoMambaVideoProcessor(fps=1 / 400)(path, return_metadata=True)
    assert len(output["video_metadata"][0].frames_indices) == 10


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_device(video, device):
    """Resized and normalised on a device: the same pixels, to rounding."""
    frames, _ = decode_video(video("h264.mp4"), lambda metadata: np.arange(14, 46, 2))
    expected = VideoMambaVideoProcessor()(frames, return_tensors="pt").pixel_values
    for videos in (video("h264.mp4"), frames):
        pixel_values = VideoMambaVideoProcessor()(videos, device=device, return_tensors="pt").pixel_values
        assert pixel_values.device.type == device
        assert (pixel_values.cpu() - expected).abs().max() < (1e-5 if device == "cpu" else 0.05)
