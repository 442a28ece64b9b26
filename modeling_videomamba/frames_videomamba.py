"""What both processors do with decoded frames: stack, check, resize, crop and normalise them."""

from collections.abc import Iterable, Iterator, Mapping, Set
from typing import TypedDict

import numpy as np
import PIL.Image
import torch
import torchvision.transforms.v2.functional as tvF
from torchvision import tv_tensors
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
)
from transformers.utils import logging

from .video_sources import is_source


logger = logging.get_logger(__name__)

MAX_SIZE = 2**12  # of an edge of what a processor returns, in pixels


class VideoMambaFramesKwargs(TypedDict, total=False):
    """
    antialias (`bool`, *optional*, defaults to `True`):
        Resize with antialiasing, as PIL does; `False` as OpenCV does.
    crop_rounds_down (`bool`, *optional*, defaults to `False`):
        Where the pixels to cut off are odd in number, crop at the next lower place, as processors of `transformers`
        do and this one did before version 0.3, instead of at the nearest even one, as torchvision does.
    """

    antialias: bool
    crop_rounds_down: bool


class VideoMambaFramesMixin:
    """What the image and the video processor share: their defaults, and the steps from frames to `pixel_values`."""

    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"shortest_edge": 224}
    default_to_square = False
    crop_size = {"height": 224, "width": 224}
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    antialias = True
    crop_rounds_down = False
    model_input_names = ["pixel_values"]

    @classmethod
    def from_dict(cls, processor_dict, **kwargs):
        for key in ("image_processor_type", "video_processor_type"):
            named = processor_dict.get(key, "VideoMamba")
            if not str(named).startswith("VideoMamba"):  # the Auto classes pass over a class that there is not
                logger.warning("These are settings of another class (`%s` %s), read as %s.", key, named, cls.__name__)
        return super().from_dict(processor_dict, **kwargs)

    def _standardize_kwargs(self, **kwargs) -> dict:
        """The base class's, and checks of what it lets pass."""
        kwargs = super()._standardize_kwargs(**kwargs)
        for name in ("size", "crop_size"):
            for key, value in kwargs[name] or ():
                if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SIZE:
                    raise ValueError(
                        f"`{name}` has {key} {value!r}, but it must be a whole number of pixels from 1 to {MAX_SIZE}."
                    )
        resample = kwargs.get("resample")
        if resample is not None and resample not in list(PILImageResampling):
            raise ValueError(f"`resample` is {resample!r}, but must be one of {list(map(int, PILImageResampling))}.")
        return kwargs

    def center_crop(self, image: torch.Tensor, size: SizeDict, crop_rounds_down: bool = False, **kwargs):
        if crop_rounds_down or not (size.height and size.width):
            return super().center_crop(image, size, **kwargs)
        return tvF.center_crop(image, [size.height, size.width])

    def resize_and_crop(
        self,
        video: torch.Tensor,
        do_resize,
        size,
        resample,
        do_center_crop,
        crop_size,
        antialias=True,
        crop_rounds_down=False,
    ):
        """Of (T, C, H, W) or (C, H, W) frames, with the options in their standard form."""
        if do_resize:
            if do_center_crop and size.shortest_edge and not size.longest_edge:
                video, size = _cut_off_ends(video, size.shortest_edge, crop_size)
            _check_result(video, size)
            video = self.resize(video, size=size, resample=resample, antialias=antialias)
        return self.center_crop(video, crop_size, crop_rounds_down) if do_center_crop else video

    def _preprocess(
        self,
        videos: list[torch.Tensor],
        do_resize: bool,
        size,
        resample,
        do_center_crop: bool,
        crop_size,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean,
        image_std,
        antialias: bool = True,
        crop_rounds_down: bool = False,
        return_tensors=None,
        **kwargs,
    ) -> BatchFeature:
        """(T, C, H, W) tensors to `pixel_values`."""
        pixel_values = []
        for i, video in enumerate(videos):
            if video.is_floating_point():
                least, most = video.aminmax()
                if not (least.isfinite() and most.isfinite()):
                    raise ValueError(
                        f"The frames of clip {i} contain NaN or infinite numbers. Check how they were computed."
                    )
                if do_rescale and 0 < most <= 1:
                    logger.warning_once(
                        "The frames are floating point numbers of at most 1 and would be divided by 255 once more. "
                        "Pass `do_rescale=False` if they lie between 0 and 1."
                    )
            for name, values in (("image_mean", image_mean), ("image_std", image_std)):
                if do_normalize and isinstance(values, list | tuple) and len(values) not in (1, video.shape[-3]):
                    raise ValueError(
                        f"`{name}` has {len(values)} numbers, but the frames have {video.shape[-3]} channels: give "
                        "one for each, or a single number."
                    )
            video = self.resize_and_crop(
                video, do_resize, size, resample, do_center_crop, crop_size, antialias, crop_rounds_down
            )
            pixel_values.append(video)
        shapes = {tuple(video.shape) for video in pixel_values}
        if return_tensors is not None and len(shapes) > 1:
            found = ", ".join(str(tuple(video.shape)) for video in pixel_values)
            raise ValueError(
                "The videos of a batch must have the same number of frames and the same size to be stacked, but their "
                f"(T, C, H, W) are {found}. Sample the same number of frames from each (`num_frames`, with "
                "`do_sample_frames=True` for frames that are already decoded), keep `do_center_crop`, or give the "
                "videos one by one."
            )
        how = do_rescale, rescale_factor, do_normalize, image_mean, image_std
        # Frames come as channels-last views, which torchvision resizes three times as fast; but this arithmetic is
        # four times as fast on contiguous planes. Bytes are stacked, not the floats that they become.
        if return_tensors is not None:
            pixel_values = self.rescale_and_normalize(torch.stack(pixel_values).contiguous(), *how)
        else:
            pixel_values = [self.rescale_and_normalize(video.contiguous(), *how) for video in pixel_values]
        return BatchFeature(data={"pixel_values": pixel_values}, tensor_type=return_tensors)


def _cut_off_ends(video: torch.Tensor, shortest_edge: int, crop_size: SizeDict) -> tuple[torch.Tensor, SizeDict]:
    """
    Of frames that are many times as long as wide, cuts off most of what the centre crop would throw away, before the
    resize makes it large: 2 x 16384 pixels would become 224 x 1835008.

    Returns:
        The frames and the size to which to resize them. The centre crop then has the pixels that it would have had, to
        rounding: both cuts are made where, after the resize, an edge between two pixels lies.
    """
    length, breadth = max(video.shape[-2:]), min(video.shape[-2:])
    is_wide = video.shape[-1] == length
    kept = crop_size.width if is_wide else crop_size.height
    resized = int(shortest_edge * length / max(1, breadth))
    if resized <= 8 * max(kept, shortest_edge):
        return video, SizeDict(shortest_edge=shortest_edge)
    scale = length / resized
    margin = 4 * max(1, scale) / scale + 1  # more than the widest filter reaches, in pixels of the result
    step = 1 + (resized - kept) % 2  # even places where the centre crop rounds, so that it rounds the same way
    places = np.arange(0, max(0, (resized - kept) // 2 - margin), step)[-int(max(256, 2 / scale)) :].astype(int)
    place = int(places[np.abs(places * scale - (places * scale).round()).argmin()]) if places.size else 0
    cut = round(place * scale)
    if is_wide:
        return video[..., cut : length - cut], SizeDict(height=shortest_edge, width=resized - 2 * place)
    return video[..., cut : length - cut, :], SizeDict(height=resized - 2 * place, width=shortest_edge)


def _check_result(video: torch.Tensor, size: SizeDict) -> None:
    height, width = video.shape[-2:]
    if size.shortest_edge and not size.longest_edge:
        edge = size.shortest_edge * max(height, width) / max(1, min(height, width))
        if edge > MAX_SIZE:
            raise ValueError(
                f"Frames of {width} x {height} pixels would be resized to a longer edge of {int(edge)}, more than "
                f"{MAX_SIZE}. Keep `do_center_crop`, or give `size` a height and a width."
            )


def is_column(videos) -> bool:
    """Whether it is a column of datasets, or something like it: clips or images in a row that is no list."""
    known = list | tuple | Set | Mapping | Iterator | np.ndarray | torch.Tensor | PIL.Image.Image
    return isinstance(videos, Iterable) and not isinstance(videos, known) and not is_source(videos)


def split_videos(videos) -> list:
    """One video or a batch, in any form `VideoMambaImageProcessor` takes, to a list of videos."""
    if is_column(videos):
        videos = list(videos)
    if isinstance(videos, tv_tensors.Video):  # (..., T, C, H, W)
        videos = videos.as_subclass(torch.Tensor)
        clips = videos[None] if videos.ndim == 4 else videos.flatten(0, -5)
        videos = [tv_tensors.Video(clip) for clip in clips]
    if isinstance(videos, PIL.Image.Image):
        return [[videos]]
    if isinstance(videos, np.ndarray | torch.Tensor):
        if videos.ndim == 5 and len(videos) == 0:
            raise ValueError(f"`videos` is empty: its shape is {tuple(videos.shape)}. Give at least one video.")
        if videos.ndim == 5:
            return list(videos)
        if videos.ndim == 4:
            return [videos]
        return [[videos]]
    if not isinstance(videos, list | tuple):
        raise ValueError(
            f"`videos` is a {type(videos).__name__}, but decoded frames were expected: a list of PIL images or arrays "
            f"or a (T, H, W, C) array.{_hint_for_files(videos)}"
        )
    if len(videos) == 0:
        raise ValueError("`videos` is empty: give at least one frame.")
    if all(_is_frame(frame) for frame in videos):
        return [videos]
    for i, video in enumerate(videos):
        is_array = isinstance(video, np.ndarray | torch.Tensor) and video.ndim == 4
        if not is_array and not isinstance(video, list | tuple):
            raise ValueError(
                f"videos[{i}] is {_describe(video)}, but every entry of a batch must be a video: a list of frames or "
                f"a (T, H, W, C) array.{_hint_for_files(video)}"
            )
    return list(videos)


def split_images(images) -> list:
    """One image or a batch, in any form `VideoMambaImageProcessor` takes, to a list of images."""
    if is_column(images):
        images = list(images)
    if _is_frame(images):
        return [images]
    is_batch = isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4
    if not is_batch and not isinstance(images, list | tuple):
        raise ValueError(
            f"`images` is {_describe(images)}, but one image, a list of images or a (B, H, W, C) array was expected."
        )
    if len(images) == 0:
        raise ValueError("`images` is empty: give at least one image.")
    for i, image in enumerate(images):
        if not _is_frame(image):
            raise ValueError(
                f"images[{i}] is {_describe(image)}, but every entry of a batch must be an image: a `PIL.Image` or an "
                "array of shape (H, W, C), (C, H, W) or (H, W). Clips are for models of several frames."
            )
    return list(images)


def stack_frames(video, name: str, do_convert_rgb: bool = True, input_data_format=None) -> torch.Tensor:
    """
    The frames of one video as one tensor.

    Args:
        video: a list of frames, or a (T, H, W, C) or (T, C, H, W) array.
        name: what error messages call the video.
        do_convert_rgb: make grey and transparent frames RGB.
        input_data_format: `"channels_first"` or `"channels_last"`; found from the shape if `None`.

    Returns:
        (T, C, H, W) tensor of the frames' own type.

    Raises:
        ValueError: naming the frame that is none, or that differs from the first in size or type.
    """
    if isinstance(video, tv_tensors.Video):  # its type says where the channels are
        video, input_data_format = video.as_subclass(torch.Tensor), ChannelDimension.FIRST
    if isinstance(video, np.ndarray | torch.Tensor):
        if len(video) == 0:
            raise ValueError(f"{name} has no frames: its shape is {tuple(video.shape)}.")
        return frame_tensor(video, name, do_convert_rgb, input_data_format)
    if len(video) == 0:
        raise ValueError(f"{name} has no frames.")
    frames = []
    for i, frame in enumerate(video):
        if not _is_frame(frame):
            raise ValueError(
                f"{name}[{i}] is {_describe(frame)}, but a frame must be a PIL image or an array of shape (H, W, C), "
                f"(C, H, W) or (H, W).{_hint_for_files(frame)}"
            )
        frame = frame_tensor(frame, f"{name}[{i}]", do_convert_rgb, input_data_format)
        first = frames[0] if frames else frame
        if frame.shape != first.shape:
            raise ValueError(
                f"The frames of a video must share one size, but {name}[{i}] has (channels, height, width) "
                f"{tuple(frame.shape)} and {name}[0] has {tuple(first.shape)}. Resize them, or give them as separate "
                "videos."
            )
        if frame.dtype != first.dtype:
            raise ValueError(
                f"The frames of a video must share one type, but {name}[{i}] is {frame.dtype} and {name}[0] is "
                f"{first.dtype}. Convert them, all 0 to 255 or all 0 to 1."
            )
        frames.append(frame)
    return torch.stack(frames)


def _is_frame(frame) -> bool:
    return isinstance(frame, PIL.Image.Image) or (
        isinstance(frame, np.ndarray | torch.Tensor) and frame.ndim in (2, 3)
    )


def frame_tensor(frame, name, do_convert_rgb, input_data_format) -> torch.Tensor:
    """A frame, or an array of frames, to a (..., C, H, W) tensor. Arrays with the channels last become views."""
    if isinstance(frame, PIL.Image.Image):
        if do_convert_rgb and frame.mode not in ("RGB", "I", "F") and not frame.mode.startswith("I;16"):
            frame = frame.convert("RGBA" if frame.has_transparency_data else "RGB")
        frame = np.array(frame)
        input_data_format = ChannelDimension.LAST
    if isinstance(frame, np.ndarray):
        if frame.dtype.kind not in "uif":
            raise ValueError(f"{name} has type {frame.dtype}, but pixels must be numbers: uint8 or float32, say.")
        # torch takes neither read-only arrays (without a warning) nor negative strides, as those of a flipped array.
        frame = torch.from_numpy(np.require(frame, requirements=["C", "W"]))
    if frame.dtype == torch.bool or frame.is_complex():
        raise ValueError(f"{name} has type {frame.dtype}, but pixels must be numbers: uint8 or float32, say.")
    if 0 in frame.shape:
        raise ValueError(f"{name} has no pixels: its shape is {tuple(frame.shape)}.")
    if frame.dtype == torch.uint16:
        frame = (frame.float() / 257).round().to(torch.uint8)  # 65535 is white
    elif not frame.is_floating_point() and frame.dtype != torch.uint8:
        low, high = (bound.item() for bound in frame.long().aminmax())
        if low < 0 or high > 255:
            raise ValueError(
                f"{name} is {frame.dtype} with values from {low} to {high}, but integers must lie between 0 and 255, "
                "or be uint16, of which 65535 is white. Scale them to uint8."
            )
    if frame.ndim == 2:
        frame, input_data_format = frame[None], ChannelDimension.FIRST
    if input_data_format is None:
        channels = (1, 3, 4)
        if frame.shape[-3] in channels:
            input_data_format = ChannelDimension.FIRST
        elif frame.shape[-1] in channels:
            input_data_format = ChannelDimension.LAST
        else:
            raise ValueError(
                f"{name} has shape {tuple(frame.shape)}, in which no axis can be that of the channels: there must be "
                "3 (RGB), 1 (grey) or 4 (RGBA), before or after height and width."
            )
    if ChannelDimension(input_data_format) == ChannelDimension.LAST:
        frame = frame.movedim(-1, -3)
    return _to_rgb(frame, name) if do_convert_rgb else frame


def _to_rgb(frame: torch.Tensor, name: str) -> torch.Tensor:
    """(..., C, H, W) with 1, 3 or 4 channels to (..., 3, H, W)."""
    channels = frame.shape[-3]
    if channels == 3:
        return frame
    if channels == 1:
        return frame.expand(*frame.shape[:-3], 3, *frame.shape[-2:])
    if channels == 4 and frame.dtype == torch.uint8:
        color, alpha = frame[..., :3, :, :].float(), frame[..., 3:, :, :].float() / 255
        return (color * alpha + 255 * (1 - alpha)).round().to(torch.uint8)
    found = f"4 channels of {frame.dtype}" if channels == 4 else f"{channels} channels"
    raise ValueError(
        f"{name} has {found} (shape {tuple(frame.shape)}, channels first), but RGB (3), grey (1) or, as uint8 only, "
        "RGBA (4) was expected. Keep the three colour channels, or pass `do_convert_rgb=False`."
    )


def _describe(value) -> str:
    if isinstance(value, np.ndarray | torch.Tensor):
        return f"an array of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}" if not isinstance(value, str) else f"the string {value!r}"


def _hint_for_files(value) -> str:
    if is_source(value):
        return " Files, URLs, bytes, rows and decoders are for `VideoMambaVideoProcessor`."
    if isinstance(value, Mapping):
        return f" Of a row, give the column with the video: it has {sorted(map(str, value))}."
    return ""


__all__ = [
    "VideoMambaFramesKwargs",
    "VideoMambaFramesMixin",
    "frame_tensor",
    "split_images",
    "split_videos",
    "stack_frames",
]
