"""Video processor class for VideoMamba: a file, URL, bytes or frames in, `pixel_values` out."""

import math
from functools import partial

import numpy as np
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import Unpack, VideosKwargs
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata, make_batched_metadata

from .frames_videomamba import VideoMambaFramesKwargs, VideoMambaFramesMixin, is_column, split_videos, stack_frames
from .video_decoding import DECODERS, decode_video
from .video_sources import is_source


MAX_NUM_FRAMES = 2**16  # that one call samples
ROUNDING = 0.001  # seconds: containers round times to this, and a frame that begins on a wanted time is on screen then


class VideoMambaVideoProcessorKwargs(VideosKwargs, VideoMambaFramesKwargs, total=False):
    r"""
    frame_stride (`int`, *optional*):
        Distance between two sampled frames; `None` spreads the sampled frames over the whole clip.
    sampling_fps (`float`, *optional*):
        Sampled frames a second of the clip, instead of a distance in frames.
    spread_in_segments (`bool`, *optional*, defaults to `False`):
        How frames are spread over the whole clip: one from the middle of each of `num_frames` equal segments, instead
        of from the first frame to the last.
    decoder (`str`, *optional*):
        `"pyav"`, `"torchcodec"` or `"decord"`; `None` takes the first that can be used, in this order.
    start_seconds (`float`, *optional*):
        Where the section of a file begins that is looked at, in seconds from its first frame.
    stop_seconds (`float`, *optional*):
        Where it ends.
    """

    frame_stride: int | None
    sampling_fps: int | float | None
    spread_in_segments: bool
    decoder: str | None
    start_seconds: int | float | None
    stop_seconds: int | float | None


class VideoMambaVideoProcessor(VideoMambaFramesMixin, BaseVideoProcessor):
    r"""
    Reads a video, samples frames from it and turns them into `pixel_values` as [`VideoMambaImageProcessor`] does. Of a
    file it decodes only what the sampled frames need.

    **Which frames.** With `sampling_fps`, `num_frames` frames at that many a second around the middle of the clip:
    those on screen at the wanted times, however many frames a second the file holds. Of a clip shorter than
    `num_frames / sampling_fps` seconds, those on screen in the middles of `num_frames` equal parts. Of a file in which
    half of these repeat the picture before, frames are taken again, as often as its pictures change; if it is too
    short for that, and each picture fills a tubelet of two frames, one frame later.

    Without it, `num_frames` frames at a distance of `frame_stride`, from the middle of the clip (the paper: 16
    at stride 2, section 5.1). With `frame_stride=None` they are spread evenly over the whole clip, the first and the
    last frame included: of n frames those at `round(i * (n - 1) / (num_frames - 1))`. A clip with fewer than
    `(num_frames - 1) * frame_stride + 1` frames is sampled in this second way too, so one with fewer than `num_frames`
    frames repeats frames, each about equally often. With `fps` the whole clip is sampled at that rate instead, and the
    number of frames follows from its length.

    **When.** `do_sample_frames=None`, the default, samples from files, URLs and bytes, and takes frames that are
    already decoded as they are, as VideoMAE's processor does. `True` samples from both (of decoded frames there must
    then be at least `num_frames`), `False` from neither.

    Args:
        num_frames (`int`, *optional*, defaults to 16):
            Frames to sample. `None`, without `fps`: all of them.
        frame_stride (`int`, *optional*, defaults to 2):
            Distance between sampled frames, or `None`, as above. Frames are counted in the order in which they are
            shown, whatever the time between them.
        sampling_fps (`float`, *optional*):
            Sampled frames a second; takes the place of `frame_stride`, as above. Of the two, what a call names goes
            before what is saved. Decoded frames need `fps` in their `video_metadata`.
        spread_in_segments (`bool`, *optional*, defaults to `False`):
            Where frames are spread over the whole clip, take those at `round(i * s) + int(s / 2)` for n frames and
            `s = (n - 1) / num_frames`, as OpenGVLab's evaluation does.
        fps (`float`, *optional*):
            Frames to sample a second of the whole clip, from its first frame to its last, at times as equal as its
            frames allow. Excludes `num_frames`: what a call names goes before what is
            saved, and of the saved two `fps`. A call that names `num_frames` must say `fps=None` if `fps` is saved.
        do_sample_frames (`bool`, *optional*):
            As above.
        decoder (`str`, *optional*):
            `"pyav"`, `"torchcodec"` or `"decord"`; `None` takes the first that can be used, in this order.
        start_seconds, stop_seconds (`float`, *optional*):
            Look at a section of each file alone, from the first to before the second, in seconds from the first frame.
            PyAV seeks to it, so that the rest of a long file is not read.
        kwargs:
            Those of every video processor of `transformers` ([`~transformers.processing_utils.VideosKwargs`]), with
            the defaults of [`VideoMambaImageProcessor`].
    """

    do_sample_frames = None
    num_frames = 16
    frame_stride = 2
    sampling_fps = None
    spread_in_segments = False
    decoder = None
    start_seconds = None
    stop_seconds = None
    valid_kwargs = VideoMambaVideoProcessorKwargs

    def __init__(self, **kwargs: Unpack[VideoMambaVideoProcessorKwargs]):
        super().__init__(**kwargs)
        _check_sampling(self.num_frames, self.frame_stride, self.sampling_fps, self.fps, self.decoder)
        _section(self.start_seconds, self.stop_seconds)

    def preprocess(self, videos, **kwargs: Unpack[VideoMambaVideoProcessorKwargs]) -> BatchFeature:
        r"""
        Args:
            videos:
                One video or a list of them: a path, an `http(s)` URL, the bytes of a file or a file object opened in
                binary mode; or decoded frames in any form that [`VideoMambaImageProcessor`] takes. Of datasets, a
                column, a row `{"path": ..., "bytes": ...}` or a decoder (torchcodec's `VideoDecoder`), of which the
                sampled frames alone are read.
            kwargs:
                Overrides for this call. `return_tensors="pt"` stacks the batch; `return_metadata=True` adds
                `video_metadata`, a list of [`~transformers.video_utils.VideoMetadata`] with the number of frames of
                each clip, its frame rate (frames a second), the indices of the sampled frames and the decoder.

        Returns:
            [`~transformers.BatchFeature`] with `pixel_values`, float32 (B, T, C, H, W): a tensor with
            `return_tensors="pt"`, otherwise a list of B tensors.

        Raises:
            FileNotFoundError, IsADirectoryError: there is no such file.
            ConnectionError: a URL could not be downloaded.
            ImportError: no decoder, or not the one asked for.
            ValueError: a file that is no video or of which no frame can be decoded, or frames that do not go together.
                The message names the file, or the video and the frame.
        """
        validate_typed_dict(self.valid_kwargs, kwargs)
        decoder = kwargs.pop("decoder", None) or self.decoder
        names = "frame_stride", "sampling_fps", "spread_in_segments"
        distance = {name: kwargs.pop(name) for name in names if name in kwargs}
        num_frames = kwargs.pop("num_frames", None)
        if num_frames is not None and self.fps is not None and "fps" not in kwargs:
            # Not in silence: `pipeline` names `num_frames` in every call, and would get other frames than were saved.
            raise ValueError(
                f"This processor was saved to sample {self.fps} frames a second, and `num_frames`={num_frames} was "
                "asked for, as `pipeline` always does. For pipelines, save it with `fps=None`, `num_frames` and "
                "`sampling_fps`; in a call of your own, add `fps=None`."
            )
        fps = kwargs.pop("fps", None)
        do_sample_frames = kwargs.pop("do_sample_frames", self.do_sample_frames)
        section = _section(
            kwargs.pop("start_seconds", self.start_seconds), kwargs.pop("stop_seconds", self.stop_seconds)
        )
        _check_sampling(num_frames, distance.get("frame_stride"), distance.get("sampling_fps"), fps, decoder)
        sample = partial(self.sample_frames, num_frames=num_frames, fps=fps, **distance)

        if is_column(videos):
            if num_frames is not None and do_sample_frames:
                # `pipeline` does not see that a column holds many clips, and would give the labels of the first alone.
                raise ValueError(
                    "A column was given, of which `pipeline` would classify the first clip alone. Give it a list, "
                    "`list(column)`, or transformers' `KeyDataset(dataset, name)`; in a call of your own, leave out "
                    "`do_sample_frames`."
                )
            videos = list(videos)
        files = _list_files(videos)
        if files is not None:
            # Each frame is resized as soon as it is decoded: of large ones, one is in memory at a time.
            transform = self.frame_transform(**kwargs)
            sample_file = None if do_sample_frames is False else sample
            decoded = [decode_video(file, sample_file, decoder, transform, section) for file in files]
            frames, metadata = [frames for frames, _ in decoded], [about for _, about in decoded]
            kwargs.update(do_resize=False, do_center_crop=False)
        elif section is not None:
            raise ValueError(
                "`start_seconds` and `stop_seconds` choose a section of a file, but decoded frames were given."
            )
        else:
            do_convert_rgb = kwargs.get("do_convert_rgb", self.do_convert_rgb)
            input_data_format = kwargs.get("input_data_format", self.input_data_format)
            frames = [
                stack_frames(video, f"videos[{i}]", do_convert_rgb, input_data_format)
                for i, video in enumerate(split_videos(videos))
            ]
            metadata = make_batched_metadata(frames, kwargs.get("video_metadata"))
            if len(metadata) != len(frames):
                raise ValueError(
                    f"`video_metadata` has {len(metadata)} entries for {len(frames)} videos: give one each."
                )
            if do_sample_frames:
                frames = [_pick(video, metadata[i], sample, f"videos[{i}]") for i, video in enumerate(frames)]

        # From here on the base class sees (T, C, H, W) tensors, sampled and in RGB.
        kwargs.update(do_sample_frames=False, input_data_format="channels_first", video_metadata=metadata)
        return super().preprocess(frames, **kwargs)

    def frame_transform(self, **kwargs):
        """A function that resizes and crops (..., C, H, W) frames: with the saved options, but for those of a call."""
        kwargs = {name: kwargs.get(name, getattr(self, name, None)) for name in self.valid_kwargs.__annotations__}
        kwargs, device = self._standardize_kwargs(**kwargs), kwargs["device"]
        names = "do_resize", "size", "resample", "do_center_crop", "crop_size", "antialias", "crop_rounds_down"
        options = {name: kwargs[name] for name in names}
        return lambda frame: self.resize_and_crop(frame if device is None else frame.to(device), **options)

    def sample_frames(
        self, metadata: VideoMetadata, num_frames: int | None = None, fps: float | None = None, **kwargs
    ) -> np.ndarray:
        """
        Which frames to take, by the rules in the description of the class.

        Args:
            metadata: `total_num_frames` and, for sampling by `fps` or `sampling_fps`, `fps` of the clip, or its
                `frame_times`, as the decoder of this package gives them.
            num_frames, fps: at most one of them; the saved values if both are `None`.
            frame_stride, sampling_fps: the saved values if neither is given.
            spread_in_segments: the saved value if not given.

        Returns:
            (T,) int64 frame indices, ascending, in the order in which the frames are shown. With `sampling_fps`, and
            of metadata that is asked by time: (T,) float64 seconds from the first frame, at which they are on screen.
        """
        frame_stride = kwargs.get("frame_stride", self.frame_stride)
        sampling_fps = kwargs.get("sampling_fps", None if "frame_stride" in kwargs else self.sampling_fps)
        if num_frames is not None and fps is not None:
            raise ValueError(f"`num_frames` ({num_frames}) and `fps` ({fps}) exclude each other: give only one.")
        if num_frames is None and fps is None:
            num_frames, fps = (None, self.fps) if self.fps is not None else (self.num_frames, None)
        total = metadata.total_num_frames
        if fps is not None:
            if not metadata.fps:
                raise ValueError(
                    f"Sampling {fps} frames a second needs the frame rate of the clip, which is unknown. Give it in "
                    "`video_metadata`, or use `num_frames` instead of `fps`."
                )
            num_frames = max(1, math.floor(total / metadata.fps * fps + 1e-6))
        elif num_frames is None:
            return np.arange(total)
        if num_frames > MAX_NUM_FRAMES:
            raise ValueError(f"{num_frames} frames were to be sampled, more than {MAX_NUM_FRAMES}. Take fewer.")
        if fps is not None:
            return _spread_by_time(getattr(metadata, "frame_times", None), total, num_frames)
        if sampling_fps is not None:
            return _sample_by_time(metadata, num_frames, sampling_fps)
        if frame_stride is not None:
            span = (num_frames - 1) * frame_stride + 1
            if span <= total:
                return (total - span) // 2 + frame_stride * np.arange(num_frames)
        if kwargs.get("spread_in_segments", self.spread_in_segments):
            segment = (total - 1) / num_frames
            return (segment * np.arange(num_frames)).round().astype(np.int64) + int(segment / 2)
        return np.linspace(0, total - 1, num_frames).round().astype(np.int64)

    def fetch_videos(self, video_url_or_urls, sample_indices_fn=None, decoder: str | None = None):
        """
        Decodes files.

        Args:
            video_url_or_urls: a path, an `http(s)` URL, the bytes of a file, a binary file object, a row or a decoder
                of datasets; or a list.
            sample_indices_fn: called with `metadata=` a [`~transformers.video_utils.VideoMetadata`], returns the
                indices of the frames to decode; all frames if `None`.
            decoder: `"pyav"`, `"torchcodec"` or `"decord"`; the saved one if `None`.

        Returns:
            (T, H, W, 3) uint8 RGB tensor, upright, and its metadata; for a list, a list of the tensors and a list of
            the metadata.
        """
        if isinstance(video_url_or_urls, list | tuple):
            pairs = [self.fetch_videos(entry, sample_indices_fn, decoder) for entry in video_url_or_urls]
            return [video for video, _ in pairs], [metadata for _, metadata in pairs]
        frames, metadata = decode_video(video_url_or_urls, sample_indices_fn, decoder or self.decoder)
        return torch.from_numpy(frames), metadata


def _frame_times(metadata: VideoMetadata, sampling_fps: float) -> np.ndarray:
    """
    When each frame of a clip is shown and when the last one ends, (total_num_frames + 1,), in seconds from the first;
    where only the frame rate is known, as if all were shown equally long.
    """
    frame_times = getattr(metadata, "frame_times", None)
    if frame_times is not None:
        return frame_times
    if not metadata.fps:
        raise ValueError(
            f"Sampling {sampling_fps} frames a second needs the frame rate of the clip, which is unknown. Give it in "
            "`video_metadata`, or pass `sampling_fps=None` to count frames instead."
        )
    return np.arange(metadata.total_num_frames + 1) / metadata.fps


def _sample_by_time(metadata: VideoMetadata, num_frames: int, sampling_fps: float) -> np.ndarray:
    """
    The frames on screen at `num_frames` times around the middle (their times, of what is asked by time).

    If the metadata is of frames half of which repeat the picture before: those at the rate at which pictures change.
    Where the clip is too short for that, and each picture fills a tubelet of two frames, so that nothing moves within
    any, the pictures are shown one frame later.
    """
    if getattr(metadata, "is_asked_by_time", False):
        frame_times, duration = None, metadata.duration
    else:
        frame_times = _frame_times(metadata, sampling_fps)
        duration = float(frame_times[-1])

    def at(rate):
        wanted = _wanted_times(duration, num_frames, rate)
        if frame_times is None:
            return wanted
        return np.asarray(np.searchsorted(frame_times[1:-1], wanted, side="right"))

    repeats = getattr(metadata, "repeats", None)
    if repeats is None:
        return at(sampling_fps)
    before, others = metadata.frames_indices, at(sampling_fps * max(1, (~repeats).sum()) / len(repeats))
    later = np.concatenate([others[:1], others[:-1]])
    fill_tubelets = repeats[::2].mean() > 0.75 and repeats[1::2].mean() < 0.25
    if before is not None and (np.array_equal(before, later) or (fill_tubelets and np.array_equal(before, others))):
        return later
    return others


def _wanted_times(duration: float, num_frames: int, sampling_fps: float) -> np.ndarray:
    """`num_frames` times around the middle of a clip of `duration` seconds; the frames on screen then are sampled."""
    distance = min(1 / sampling_fps, duration / num_frames)
    return duration / 2 + distance * (np.arange(num_frames) - (num_frames - 1) / 2) + ROUNDING


def _spread_by_time(frame_times: np.ndarray | None, total: int, num_frames: int) -> np.ndarray:
    """The frames that begin nearest to times at equal distances from the first frame's to the last one's."""
    starts = np.arange(total) if frame_times is None else frame_times[:-1]
    places = np.interp(np.linspace(0, starts[-1], num_frames), starts, np.arange(total))
    return places.round(6).round().astype(np.int64)


def _check_sampling(num_frames, frame_stride, sampling_fps, fps, decoder) -> None:
    for name, value in (("num_frames", num_frames), ("frame_stride", frame_stride)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"`{name}` is {value!r}, but must be a whole number of at least 1, or None.")
    for name, value in (("fps", fps), ("sampling_fps", sampling_fps)):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 < value < math.inf):
            raise ValueError(
                f"`{name}` is {value!r}, but must be a finite number of frames a second above 0, or None."
            )
    if decoder is not None and decoder not in DECODERS:
        raise ValueError(f"`decoder` is {decoder!r}, but must be one of {', '.join(DECODERS)}, or None.")


def _section(start, stop) -> tuple[float, float | None] | None:
    if start is None and stop is None:
        return None
    start = 0 if start is None else start
    are_times = all(isinstance(value, int | float) and 0 <= value < math.inf for value in (start, stop or 0))
    if not are_times or (stop is not None and stop <= start):
        raise ValueError(
            f"`start_seconds` is {start!r} and `stop_seconds` is {stop!r}, but they must be numbers of seconds, the "
            "first at least 0 and the second more than the first, or None."
        )
    return start, stop


def _list_files(videos) -> list | None:
    """The files in `videos`, if it is a file or a list of files; None if it holds frames."""
    if is_source(videos):
        return [videos]
    if not isinstance(videos, list | tuple):
        return None
    # Chat templates wrap each video in a list of its own.
    videos = [video[0] if isinstance(video, list | tuple) and len(video) == 1 else video for video in videos]
    are_files = [is_source(video) for video in videos]
    if not any(are_files):
        return None
    if not all(are_files):
        i = are_files.index(False)
        raise ValueError(
            f"`videos` mixes files with other things: videos[{i}] is a {type(videos[i]).__name__}. Give either files, "
            "URLs and bytes, or decoded frames."
        )
    return videos


def _pick(frames: torch.Tensor, metadata: VideoMetadata, sample, name: str) -> torch.Tensor:
    """Samples from frames that are already decoded, (T, C, H, W)."""
    if metadata.total_num_frames != len(frames):
        raise ValueError(
            f"{name} has {len(frames)} frames, but its `video_metadata` says {metadata.total_num_frames}. Sampling "
            "needs the whole clip; pass `do_sample_frames=False` if these frames have been sampled already."
        )
    indices = sample(metadata=metadata)
    if len(indices) > len(frames):
        raise ValueError(
            f"{name} has {len(frames)} decoded frames, but {len(indices)} were to be sampled. Give more frames, a "
            "smaller `num_frames` or `fps`, or `do_sample_frames=False` to take the frames as they are. (Only "
            "frames of files are repeated.)"
        )
    metadata.frames_indices = indices
    return frames[torch.from_numpy(indices)]


__all__ = ["VideoMambaVideoProcessor"]
