"""Image processor class for VideoMamba: decoded frames in, `pixel_values` out."""

import torch
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import logging

from .frames_videomamba import (
    VideoMambaFramesKwargs,
    VideoMambaFramesMixin,
    frame_tensor,
    split_images,
    split_videos,
    stack_frames,
)
from .video_processing_videomamba import VideoMambaVideoProcessor


logger = logging.get_logger(__name__)


class VideoMambaImageProcessorKwargs(ImagesKwargs, VideoMambaFramesKwargs, total=False):
    """
    single_images (`bool`, *optional*, defaults to `self.single_images`):
        Every image is an example of its own, for a model of one frame, and not a frame of a clip.
    """

    single_images: bool


class VideoMambaImageProcessor(VideoMambaFramesMixin, TorchvisionBackend):
    r"""
    Turns decoded frames into `pixel_values`: resize so that the shorter edge has `size["shortest_edge"]` pixels, crop
    the centre, divide by 255, normalise with ImageNet's mean and standard deviation.

    The shorter edge goes to 224 pixels, bilinear with antialiasing, of which 224 × 224 are kept, as VideoMAE does.
    (Vision Mamba tests images at a bicubic 256-pixel edge: `size={"shortest_edge": 256}, resample=3` does that.)

    The keyword arguments are those of every image processor of `transformers`
    ([`~transformers.processing_utils.ImagesKwargs`]); each can be set here, and again in a call. With
    `single_images=True`, for [`VideoMambaForImageClassification`], a list of images is a batch of images, which may
    differ in size, and `pixel_values` are (B, C, H, W).
    """

    valid_kwargs = VideoMambaImageProcessorKwargs
    single_images = False

    def __init__(self, **kwargs: Unpack[VideoMambaImageProcessorKwargs]):
        super().__init__(**kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        # Where the video processor cannot be loaded, this pipeline would silently go on with the image processor
        # and give other scores. Without either it stops; but as it keeps the reason to itself, it is said here.
        if kwargs.get("_from_pipeline") == "video-classification":
            try:
                VideoMambaVideoProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
            except Exception as error:
                logger.error(f"The video processor of {pretrained_model_name_or_path} cannot be loaded: {error}")
                raise
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def preprocess(self, videos, **kwargs: Unpack[VideoMambaImageProcessorKwargs]) -> BatchFeature:
        r"""
        Args:
            videos:
                One video or a batch. A video is a list of frames, each a `PIL.Image` or a numpy or torch array of
                shape (H, W, C), (C, H, W) or (H, W); or one array of shape (T, H, W, C) or (T, C, H, W). A batch is a
                list of videos, or one array with a leading batch axis. Values from 0 to 255; pass `do_rescale=False`
                for values from 0 to 1. Grey frames (one channel or none) become RGB by repetition, and transparent
                ones are laid on white, unless `do_convert_rgb=False`. With `single_images=True`, one image or a batch:
                a list of frames as above, or an array (B, H, W, C) or (B, C, H, W).
            kwargs:
                Overrides for this call; `return_tensors="pt"` stacks the batch.

        Returns:
            [`~transformers.BatchFeature`] with `pixel_values`, float32 (B, T, C, H, W), or (B, C, H, W) with
            `single_images=True`: a tensor with `return_tensors="pt"`, otherwise a list of B tensors.

        Raises:
            ValueError: an input that is no video, frames of different sizes, types or a wrong number of channels, or
                videos of different lengths to be stacked. The message names the video and the frame.
        """
        inputs = super().preprocess(videos, **kwargs)
        if kwargs.get("single_images", self.single_images):
            images = inputs["pixel_values"]
            inputs["pixel_values"] = [image[0] for image in images] if isinstance(images, list) else images[:, 0]
        return inputs

    def _prepare_image_like_inputs(
        self, images, *args, do_convert_rgb=None, input_data_format=None, device=None, single_images=False, **kwargs
    ) -> list[torch.Tensor]:
        """Videos in any accepted form, or images as videos of one frame, to a list of (T, C, H, W) tensors."""
        how = do_convert_rgb, input_data_format
        if single_images:
            videos = [frame_tensor(image, f"images[{i}]", *how)[None] for i, image in enumerate(split_images(images))]
        else:
            videos = [stack_frames(video, f"videos[{i}]", *how) for i, video in enumerate(split_videos(images))]
        return [video if device is None else video.to(device) for video in videos]


__all__ = ["VideoMambaImageProcessor"]
