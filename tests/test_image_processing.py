"""The image processor, and what the video processor shares with it: forms of frames, geometry, bad frames."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, VideoMAEImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from modeling_videomamba import VideoMambaImageProcessor, VideoMambaVideoProcessor
from video_files import numbered_frame, numbered_frames


MEAN, STD = np.array(IMAGENET_DEFAULT_MEAN), np.array(IMAGENET_DEFAULT_STD)


def to_pil(frames):
    return [Image.fromarray(frame) for frame in frames]


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


@pytest.mark.parametrize("processor_class", [VideoMambaImageProcessor, VideoMambaVideoProcessor])
@pytest.mark.parametrize(
    ("spare", "left", "rounded_down"),  # half of the spare columns are cut off on the left
    [
        (0, 0, 0),
        (1, 0, 0),
        (2, 1, 1),
        (3, 2, 1),
        (4, 2, 2),
        (5, 2, 2),
        (6, 3, 3),
        (7, 4, 3),
        (-1, -0, -0),
        (-3, -1, -1),
    ],
)
def test_crop_goes_to_the_nearest_place_halves_to_even(processor_class, spare, left, rounded_down, tmp_path):
    columns = np.broadcast_to(np.arange(1, 9 + spare, dtype=np.uint8), (8, 3, 8 + spare)).transpose(0, 2, 1)
    raw = {"do_resize": False, "do_rescale": False, "do_normalize": False, "crop_size": 8}
    for options, first in (({}, left), ({"crop_rounds_down": True}, rounded_down)):
        expected = [place + 1 if 0 <= place < 8 + spare else 0 for place in range(first, first + 8)]
        processor_class(**raw, **options).save_pretrained(tmp_path)
        for processor, call in ((processor_class.from_pretrained(tmp_path), {}), (processor_class(**raw), options)):
            found = processor([columns], return_tensors="np", **call)["pixel_values"]
            assert found[0, 0, 0, 0].tolist() == expected


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
    frames = numbered_frames(4)
    expected = VideoMambaImageProcessor()(to_pil(frames), return_tensors="pt").pixel_values
    pixel_values = processor()(FORMS[form](frames), return_tensors="pt").pixel_values
    torch.testing.assert_close(pixel_values, expected, atol=0, rtol=0)


@pytest.mark.parametrize("resample", range(4))
@pytest.mark.parametrize("size", [(10, 1000), (1000, 10), (30, 3001), (400, 7001), (1, 300), (3, 401), (64, 1003)])
def test_long_frames_are_cut_before_they_grow(size, resample):
    """To rounding, the pixels of the whole frame resized and then cropped."""
    frame = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    pixels = torch.from_numpy(frame).permute(2, 0, 1)
    processor = VideoMambaImageProcessor(
        size={"shortest_edge": 64}, crop_size=48, do_normalize=False, do_rescale=False
    )
    whole = processor.resize(pixels, processor.size, resample)
    expected = processor.center_crop(whole, processor.crop_size)
    got = processor([frame], resample=resample, input_data_format="channels_last", return_tensors="pt").pixel_values[
        0, 0
    ]
    assert (got.int() - expected.int()).abs().max() <= 2 and (got.int() - expected.int()).abs().float().mean() < 0.05


def test_longest_frames_take_little_memory(monkeypatch):
    resized = []
    original = VideoMambaImageProcessor.resize

    def resize(self, image, *args, **kwargs):
        resized.append(original(self, image, *args, **kwargs))
        return resized[-1]

    monkeypatch.setattr(VideoMambaImageProcessor, "resize", resize)
    frame = np.zeros((2, 65535, 3), np.uint8)
    assert VideoMambaImageProcessor()([frame]).pixel_values[0].shape == (1, 3, 224, 224)
    assert resized[0].shape[-1] < 4000  # and not 7 million
    with pytest.raises(ValueError, match="65535 x 2 pixels would be resized to a longer edge of 7339920"):
        VideoMambaImageProcessor(do_center_crop=False)([frame])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_size": 0}, "`crop_size` has height 0"),
        ({"crop_size": {"height": -5, "width": 8}}, "`crop_size` has height -5"),
        ({"size": {"shortest_edge": -1}}, "`size` has shortest_edge -1"),
        ({"size": {"height": 10**9, "width": 8}}, "`size` has height 1000000000"),
        ({"resample": 99}, "resampl|99"),
    ],
)
@pytest.mark.parametrize("processor", [VideoMambaImageProcessor, VideoMambaVideoProcessor])
def test_bad_sizes(processor, options, message):
    with pytest.raises(ValueError, match=message):
        processor(**options)
    with pytest.raises((ValueError, TypeError), match=message):
        processor()(numbered_frames(2), **options)


def test_batch_of_videos_of_different_sizes():
    pixel_values = VideoMambaImageProcessor()(
        [numbered_frames(3), numbered_frames(3, 80, 50)], return_tensors="pt"
    ).pixel_values
    assert pixel_values.shape == (2, 3, 3, 224, 224)
    single = VideoMambaImageProcessor()(numbered_frames(3, 80, 50), return_tensors="pt").pixel_values
    torch.testing.assert_close(pixel_values[1:], single, atol=0, rtol=0)


def test_list_without_return_tensors():
    pixel_values = VideoMambaImageProcessor()([numbered_frames(3), numbered_frames(5)]).pixel_values
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
        [*numbered_frames(3), *numbered_frames(1, 40, 60)],
        r"videos\[0\]\[3\] has .*\(3, 40, 60\) and videos\[0\]\[0\]",
    ),
    "mixed types": ([numbered_frame(0), numbered_frame(1) / 255], r"videos\[0\]\[1\] is torch.float64"),
    "two channels": ([np.zeros((48, 64, 2), np.uint8)], r"videos\[0\]\[0\] has shape \(48, 64, 2\)"),
    "two channels, told which": (np.zeros((2, 48, 64, 2), np.uint8), r"videos\[0\] has .*2 channels"),
    "five channels": ([[np.zeros((5, 48, 64), np.uint8)]], r"videos\[0\]\[0\] has shape \(5, 48, 64\)"),
    "float RGBA": ([np.zeros((48, 64, 4), np.float32)], r"4 channels of torch.float32"),
    "no numbers": ([np.zeros((48, 64, 3), bool)], r"type bool"),
    "complex numbers": (torch.zeros(2, 3, 48, 64, dtype=torch.complex64), r"type torch.complex64"),
    "a bool tensor": ([torch.zeros(3, 48, 64, dtype=torch.bool)], r"type torch.bool"),
    "no pixels": (np.zeros((2, 0, 0, 3), np.uint8), r"videos\[0\] has no pixels"),
    "no height": ([np.zeros((0, 64, 3), np.uint8)], r"videos\[0\]\[0\] has no pixels"),
    "an empty batch": (np.zeros((0, 2, 48, 64, 3), np.uint8), r"`videos` is empty"),
    "one axis": (np.zeros(48, np.uint8), r"array of shape \(48,\)"),
    "six axes": (np.zeros((1, 1, 1, 4, 4, 3), np.uint8), r"array of shape \(1, 1, 1, 4, 4, 3\)"),
    "nothing": ([], r"`videos` is empty"),
    "no frames": ([[]], r"videos\[0\] has no frames"),
    "an array without frames": (np.zeros((0, 48, 64, 3), np.uint8), r"videos\[0\] has no frames"),
    "None": (None, r"`videos` is a NoneType"),
    "None among frames": (
        [*numbered_frames(2), None],
        r"videos\[0\] is an array.* every entry of a batch must be a video",
    ),
    "None in a video": ([numbered_frames(2), [None]], r"videos\[1\]\[0\] is a NoneType"),
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
        processor()([numbered_frames(3), numbered_frames(5)], return_tensors="pt")


@pytest.mark.parametrize("file", ["clip.mp4", b"bytes", Path("clip.mp4"), ["clip.mp4"], [["clip.mp4"]]])
def test_image_processor_takes_no_files(file):
    with pytest.raises(ValueError, match="VideoMambaVideoProcessor"):
        VideoMambaImageProcessor()(file)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("processor", [VideoMambaImageProcessor(), VideoMambaVideoProcessor()])
def test_frames_that_are_no_numbers(processor, bad):
    clips = np.full((2, 3, 40, 40, 3), 0.5, np.float32)
    clips[1, 2, 7, 8, 1] = bad
    with pytest.raises(ValueError, match="frames of clip 1 contain NaN or infinite"):
        processor(clips, do_rescale=False, return_tensors="pt")


def test_frames_that_are_already_rescaled(caplog):
    frames = np.stack(numbered_frames(2)).astype(np.float32) / 255
    expected = VideoMambaImageProcessor()(
        np.stack(numbered_frames(2)).astype(np.float32), return_tensors="pt"
    ).pixel_values
    pixel_values = VideoMambaImageProcessor()(frames, do_rescale=False, return_tensors="pt").pixel_values
    torch.testing.assert_close(pixel_values, expected, atol=1e-4, rtol=0)

    warned = []
    logger = sys.modules[VideoMambaImageProcessor.__module__].logger
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(logger), "warning_once", lambda self, message: warned.append(message))
        VideoMambaImageProcessor()(frames)
        VideoMambaImageProcessor()(frames * 255)
    assert len(warned) == 1 and "do_rescale=False" in warned[0]


@pytest.mark.parametrize("processor", [VideoMambaImageProcessor(), VideoMambaVideoProcessor()])
@pytest.mark.parametrize("form", ["image", "array", "tensor"])
def test_frames_of_16_bits_are_scaled(processor, form):
    grey = np.linspace(0, 65535, 224 * 224).astype(np.uint16).reshape(224, 224)
    frame = {
        "image": lambda: Image.fromarray(grey),
        "array": lambda: grey,
        "tensor": lambda: torch.from_numpy(grey),
    }
    found = processor([frame[form]()], return_tensors="pt", do_normalize=False).pixel_values[0, 0]
    assert (found - torch.from_numpy(grey / 65535).float()).abs().max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("processor", [VideoMambaImageProcessor(), VideoMambaVideoProcessor()])
@pytest.mark.parametrize("value", [-1, 256, 4095])
def test_integers_that_are_no_pixels(processor, value):
    pixels = np.full((224, 224, 3), value, np.int32)
    for frame in (pixels, Image.fromarray(pixels[..., 0])):
        with pytest.raises(ValueError, match=f"int32 with values from {value} to {value}, but integers must lie"):
            processor([frame], return_tensors="pt")


def test_save_and_load(tmp_path):
    images = VideoMambaImageProcessor(size={"shortest_edge": 64}, crop_size=32)
    images.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is VideoMambaImageProcessor and loaded.to_dict() == images.to_dict()


# ---- images, for a model of one frame ----


def test_single_images_are_clips_of_one_frame(tmp_path):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((60, 80), (90, 50))]
    grey = rng.integers(0, 256, (70, 60), dtype=np.uint8)
    settings = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
    VideoMambaImageProcessor(single_images=True, **settings).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    clips = VideoMambaImageProcessor(**settings)
    forms = (to_pil([*pictures, grey]), [*pictures, grey], [*pictures, Image.fromarray(grey)])
    for images in forms:
        batch = processor(images, return_tensors="pt").pixel_values
        assert batch.shape == (3, 3, 32, 32)
        for image, pixel_values in zip([*pictures, grey], batch, strict=True):
            expected = clips([image], return_tensors="pt").pixel_values[0, 0]
            torch.testing.assert_close(pixel_values, expected)
    assert torch.equal(processor(pictures[0], return_tensors="pt").pixel_values, batch[:1])
    stacked = processor(np.stack([pictures[0]] * 2), return_tensors="np").pixel_values
    np.testing.assert_array_equal(stacked, batch[[0, 0]].numpy())
    assert [image.shape for image in processor(pictures).pixel_values] == [(3, 32, 32)] * 2
    # Whoever asks for clips in a call gets them.
    assert processor(pictures[:1], single_images=False, return_tensors="pt").pixel_values.shape == (1, 1, 3, 32, 32)


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ([], "`images` is empty"),
        ([[np.zeros((40, 40, 3), np.uint8)]], r"images\[0\] is a list"),
        ("picture.jpg", "`images` is the string 'picture.jpg'"),
        (np.zeros((1, 2, 40, 40, 3), np.uint8), "`images` is an array of shape"),
        ([np.zeros((40, 40, 2), np.uint8)], r"images\[0\] has shape \(40, 40, 2\)"),
    ],
)
def test_what_is_no_image(images, expected):
    with pytest.raises(ValueError, match=expected):
        VideoMambaImageProcessor(single_images=True)(images, return_tensors="pt")
