"""A video file, URL or bytes and wanted frame indices in, decoded frames out."""

import importlib
import os
import traceback
from bisect import bisect_left, bisect_right
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter

import numpy as np
import torch
from transformers.video_utils import VideoMetadata

from .forked_process import decoding_threads
from .video_demuxer import (
    Progress,
    check_frame_size,
    frame_rate,
    no_video,
    open_pyav,
    read_index,
    read_index_of_section,
    read_packets,
    read_tables,
    ticks,
)
from .video_frames import Clip, ToRGB, decoded_frames, needed_packets
from .video_mp4 import times_of_frames, what_is_odd, whole_index
from .video_sources import as_file, first_line, is_decoder, open_source


# Code that travels with a checkpoint must import inside `try` what may be absent.
try:
    import av
except ImportError:
    av = None


@dataclass
class DecodedVideoMetadata(VideoMetadata):
    """
    What is known of a decoded file.

    Args:
        frame_times: (total_num_frames + 1,) float64 array: frame i is on screen from `frame_times[i]` to
            `frame_times[i + 1]`, in seconds from the first frame; `None` where the file does not say.
        num_damaged_frames: how many of the returned frames the decoder reported as damaged.
        num_repeated_frames: how many of the returned frames show the picture of another frame, the one before them,
            to what compression changes. Files whose pictures change less often than their frames have such frames.
        repeats: of each returned frame but the first, whether it shows the picture of the one before, which may be the
            same frame, asked for twice; `(T - 1,)` bool, `None` before frames are decoded.
        is_asked_by_time: whether frames are asked for by index or by time, in seconds from the first: of a decoder
            that does not list its frames' times. Of frames that were asked for by time, `frames_indices` is `None`.
    """

    frame_times: np.ndarray | None = field(default=None, repr=False)  # printed by each check of types otherwise
    num_damaged_frames: int = 0
    num_repeated_frames: int = 0
    repeats: np.ndarray | None = field(default=None, repr=False)
    is_asked_by_time: bool = False

    @property
    def timestamps(self) -> list[float]:
        """When the sampled frames are shown, in seconds from the first of all."""
        if self.frame_times is None or self.frames_indices is None:
            return super().timestamps
        return self.frame_times[self.frames_indices].tolist()


def decode_video(file, sample=None, decoder: str | None = None, transform=None, section=None, empty=None) -> tuple:
    """
    Decodes frames of a video.

    Args:
        file: a path, an `http(s)` URL, the bytes of a file or a file object opened in binary mode; or, as datasets
            gives them, a row `{"path": ..., "bytes": ...}` or a decoder, such as torchcodec's `VideoDecoder`.
        sample: called with `metadata=` a [`~transformers.video_utils.VideoMetadata`], which says how many frames there
            are (`total_num_frames`) and how many a second (`fps`), returns the indices of the frames to decode, or of
            metadata that is asked by time the seconds (floating point) at which they are shown; `None` for all frames.
            Where half of the frames repeat pictures, it is called again, at most twice, with the metadata of the
            result (its `repeats` are set), and may choose others.
        decoder: `"pyav"`, `"torchcodec"` or `"decord"`; `None` takes the first that can be used, in this order.
        transform: called with each decoded frame, a (3, H, W) uint8 tensor with the channels last in memory, returns
            the tensor to keep. Resizing here needs the memory of one large frame, not of all.
        section: `(start, stop)` in seconds from the first frame (`stop` may be `None`, the end): only frames that are
            shown from `start` on and before `stop` are counted and decoded. PyAV seeks to them, so that the rest of
            the file is not read, if the container allows it.
        empty: called with (T, H, W, C), returns the contiguous uint8 tensor into which the frames are put, such as
            shared memory; `None` for memory of their own.

    Returns:
        The frames, turned upright as the file's rotation says: a (T, H, W, 3) uint8 RGB array, or with `transform` a
        tensor of what it returned, stacked. And the metadata, with `frames_indices`. Frames are counted in the order
        in which they are shown.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        ConnectionError: a URL could not be downloaded.
        ImportError: no decoder, or not the one asked for.
        ValueError: a file that is no video, of which no frame can be decoded, or which is larger than the limits of
            this module; a section without frames, or of a file that cannot be searched by time. The message names the
            file.
    """
    new_clip = partial(Clip, transform=transform, empty=empty)
    if is_decoder(file):
        made, file = file, _file_of(file)
        if file is None:
            frames, metadata = _read_around(lambda chosen: _read_decoder(made, chosen, new_clip, section), sample)
            return frames.permute(0, 2, 3, 1).numpy() if transform is None else frames, metadata
    if section:
        decoder = "pyav"
    decoder = choose_decoder([decoder] if decoder else DECODERS)
    source, name = open_source(file)

    def read(sample):
        if section:
            return _read_section(source, name, sample, new_clip, *section)
        return _decode(decoder, source, name, sample, new_clip)

    try:
        frames, metadata = _read_around(read, sample)
    except Exception as error:
        _forget_locals(error)
        raise
    return frames.permute(0, 2, 3, 1).numpy() if transform is None else frames, metadata


def _read_around(read, sample):
    """Reads the frames that `sample` chooses, and at most twice others, while half of them repeat pictures."""
    frames, metadata = read(sample or _all_frames)
    for _ in range(2):
        repeats = metadata.repeats
        if sample is None or repeats is None or 2 * repeats.sum() <= len(repeats):
            break
        others = np.asarray(sample(metadata=metadata))
        if metadata.frames_indices is not None and np.array_equal(others, metadata.frames_indices):
            break
        frames, metadata = read(lambda metadata, others=others: others)
    return frames, metadata


def _decode(decoder, source, name, sample, new_clip):
    try:
        return DECODERS[decoder](source, name, sample, new_clip)
    except _Unreliable as reason:
        if av is None:
            raise ValueError(
                f"{name}: {decoder} may return wrong frames of this file, or none ({reason}). PyAV reads the file: "
                "pip install av"
            ) from None
    return _read_pyav(source, name, sample, new_clip)


def _forget_locals(error: BaseException) -> None:
    """Who keeps an error, as of one bad file of thousands, shall not keep its decoder, with threads and frames."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _all_frames(metadata: VideoMetadata) -> np.ndarray:
    return np.arange(metadata.total_num_frames)


def choose_decoder(names) -> str:
    """The first of `names` that can be used here; an `ImportError` that says why, if none can."""
    problems = {}
    for name in names:
        package = "av" if name == "pyav" else name
        try:
            module = importlib.import_module(package)
            # torchcodec can be imported without FFmpeg's shared libraries, but decodes nothing then.
            if getattr(module, "ffmpeg_major_version", "") is not None:
                return name
            problems[package] = "FFmpeg's shared libraries are not installed"
        except Exception as error:  # that of a broken installation need not be an ImportError
            problems[package] = first_line(error)
    found = "; ".join(f"{package}: {problem}" for package, problem in problems.items())
    raise ImportError(
        f"A video file needs a decoder, but of {', '.join(names)} none can be used ({found}). "
        f"`pip install {next(iter(problems))}`, or give frames that are already decoded."
    )


# ---------------------------------------------------------------------------------------------------------------------
# What every decoder shares
# ---------------------------------------------------------------------------------------------------------------------


def _metadata(total: int, fps, decoder: str, frame_times=None) -> DecodedVideoMetadata:
    fps = float(fps) if fps else None
    return DecodedVideoMetadata(
        total_num_frames=total,
        fps=fps,
        duration=total / fps if fps else None,
        video_backend=decoder,
        frame_times=frame_times,
    )


def _frame_times(times, last_duration, clock, fps) -> np.ndarray | None:
    """
    `frame_times` of [`DecodedVideoMetadata`].

    Args:
        times: when frames are shown, ascending, in units of `clock` seconds; `None` if that is not known.
        last_duration: for how many of these units the last one is shown. Where the file does not say, as long as the
            others are on average; where there are no others, by the frame rate `fps`.
    """
    if times is None:
        return None
    if not last_duration or last_duration < 0:
        last_duration = (
            (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else float(1 / ((fps or 1) * clock))
        )
    # Of whole numbers, so that the seconds of a frame are the same whatever the file's first time is.
    return (np.append(times, times[-1] + last_duration) - times[0]) * float(clock)


def _sample(sample, metadata: VideoMetadata, name: str) -> np.ndarray:
    indices = np.asarray(sample(metadata=metadata), dtype=np.int64)
    if indices.size == 0 or indices.min() < 0 or indices.max() >= metadata.total_num_frames:
        raise ValueError(
            f"The frames {indices.tolist()} of {name} were asked for, but there are {metadata.total_num_frames}."
        )
    metadata.frames_indices = indices
    return indices


class _Unreliable(Exception):
    """Raised by a decoder for a file of which it may return wrong frames, or none; the message says why."""


# ---------------------------------------------------------------------------------------------------------------------
# PyAV
# ---------------------------------------------------------------------------------------------------------------------

# Decoders that, started at a frame that is no key frame, give an error or mark what comes as corrupt.
_CHECKS_KEYS = {"h264", "hevc", "vvc", "vp8", "vp9", "av1", "libdav1d"}

# Of 255: the means of parts of a repeated picture differ by at most the first after compression, and something moves
# if they change by more than the second. (Of 240 surveillance clips of full rate, 2 count half their frames so.)
_COMPRESSION, _MOTION = 4, 16

# A seek pays if it saves decoding at least so many frames.
_WORTH_A_SEEK = 8


def _read_pyav(source, name, sample, new_clip):
    to_rgb = ToRGB(name)
    try:
        with open_pyav(source, name) as (container, stream):
            index = read_tables(source, container, stream) or read_index(container, stream, name)
            if index.total == 0:
                raise no_video(source, name, "the file has no frame")
            fps = frame_rate(stream, index.times)
            frame_times = _frame_times(index.times, index.last_duration, stream.time_base, fps)
            metadata = _metadata(index.total, fps, "pyav", frame_times)
            clip = new_clip(_sample(sample, metadata, name), name)
            complete = index.times is not None and _decode_from_keys(container, stream, index, clip, to_rgb)
        times = index.times
        for _ in range(3):
            if complete:
                break
            with open_pyav(source, name) as (container, stream):
                # With a thread a frame, FFmpeg marks good frames of H.264 as damaged where frames follow on fields,
                # and what it makes of damaged files differs from run to run.
                stream.thread_type = "SLICE"
                complete, total = _decode_from_start(container, stream, times, clip, to_rgb)
            if total == 0:
                raise no_video(source, name, "none of its frames can be decoded")
            if not complete:  # there are more or fewer frames than packets: sample from those that there are
                metadata, times = _metadata(total, metadata.fps, "pyav"), None
                clip = new_clip(_sample(sample, metadata, name), name)
    except av.FFmpegError as error:
        raise no_video(source, name, error) from error
    if not complete:
        raise no_video(source, name, "each reading decodes another number of frames")
    return _finish(clip, metadata)


def _finish(clip, metadata, order=None):
    metadata.height, metadata.width = clip.shape
    metadata.num_damaged_frames = sum(len(clip.places[index]) for index in clip.damaged)
    order = metadata.frames_indices if order is None else order
    metadata.repeats = _find_repeats(clip.frames, order)
    metadata.num_repeated_frames = int((metadata.repeats & (np.diff(order) > 0)).sum())
    return clip.frames, metadata


def _find_repeats(frames, indices):
    """
    Of (T, C, H, W) frames, whether each but the first shows the picture of the one before, (T - 1,) bool: it is the
    same frame (of the same index or time), or looks like it. In a still scene only the same frame counts.
    """
    same = np.diff(indices) == 0
    if frames.dtype != torch.uint8 or frames.ndim != 4 or len(indices) < 2:
        return same
    # Means of green over a fourteenth of height and width: to them compression does little, motion anywhere much.
    green = frames[:, min(1, frames.shape[1] - 1), ::4, ::2].float()
    means = torch.nn.functional.avg_pool2d(green, [max(1, side // 14) for side in green.shape[1:]])
    change = (means[1:] - means[:-1]).abs().flatten(1).amax(1).cpu().numpy()
    return same | (change <= _COMPRESSION) if change.max() > _MOTION else same


def _read_section(source, name, sample, new_clip, start, stop):
    """The frames that are shown from `start` to `stop`, in seconds from the first; only that part is read."""
    hint = "Leave the section out, or copy the file into another container: `ffmpeg -i FILE -c copy other.mp4`."
    try:
        with open_pyav(source, name) as (container, stream):
            if stream.start_time is None:
                raise ValueError(f"{name} cannot be searched by time: no time is known for its frames. {hint}")
            begin = stream.start_time + ticks(start, stream)
            end = None if stop is None else stream.start_time + ticks(stop, stream)
            index = read_index_of_section(container, stream, name, begin, end)
            if index is None:
                raise ValueError(
                    f"{name} cannot be searched by time: no key frame whose time can be trusted is "
                    f"found at {start:g} s. {hint}"
                )
            times = index.times
            before = bisect_left(times, begin)  # frames that are decoded for the sake of others
            total = (len(times) if end is None else bisect_left(times, end)) - before
            if total < 1:
                section = f"from {start:g} s on" if stop is None else f"from {start:g} s to {stop:g} s"
                raise ValueError(f"{name} shows no frame {section}. Give a longer or an earlier section.")
            shown, fps, last_duration = times[before : before + total], frame_rate(stream, times), index.last_duration
            if before + total < len(times):
                last_duration = times[before + total] - shown[-1]
            frame_times = _frame_times(shown, last_duration, stream.time_base, fps)
            metadata = _metadata(total, fps, "pyav", frame_times)
            clip = new_clip(_sample(sample, metadata, name) + before, name)
            if not _decode_from_keys(container, stream, index, clip, ToRGB(name)):
                raise ValueError(f"{name} cannot be searched by time: the times of its frames are wrong. {hint}")
    except av.FFmpegError as error:
        raise no_video(source, name, error) from error
    return _finish(clip, metadata)


def _decode_from_keys(container, stream, index, clip, to_rgb) -> bool:
    """
    Decodes the wanted frames, each from the last key frame before it, or on from the wanted frame before. False if
    what comes is not, frame by frame, what the times say: damage, or wrong times, or no key frame, or seeks that fail
    or all land too late.
    """
    runs = _plan(index, sorted(clip.places))
    dropped = set()
    if runs and all(_decode_run(container, stream, index, *run, clip, to_rgb, dropped) for run in runs):
        return True
    if len(runs) < 2 and not dropped:
        return False
    return _decode_run(container, stream, index, runs[0][0], runs[-1][1], clip, to_rgb, None)


def _plan(index, wanted) -> list[tuple[int, int]]:
    """Pairs of the key frame to begin with (an index of `index.keys`) and the last frame to decode from there."""
    runs = []
    for position in wanted:
        key = bisect_right(index.keys, index.times[position], key=itemgetter(0)) - 1
        if key < 0:
            return []
        begin = bisect_left(index.times, index.keys[key][0])
        if runs and begin - runs[-1][1] < _WORTH_A_SEEK:
            key = runs.pop()[0]
        runs.append((key, position))
    return runs


def _decode_run(container, stream, index, key: int, last: int, clip, to_rgb, dropped) -> bool:
    """Decodes from a key frame to frame `last`, without what others do not need unless `dropped` is None."""
    shown, decoded = index.keys[key]
    begin = bisect_left(index.times, shown)
    # MP4 and Matroska find a key frame by its time of presentation, MPEG-TS by that of decoding, MPEG-PS only about.
    for offset in (shown, decoded, index.keys[max(0, key - 1)][1]):
        if offset is None:
            continue
        try:
            container.seek(offset, stream=stream)
        except av.FFmpegError:
            continue  # a file that can be read, but not searched
        if _put_frames(container, stream, index, begin, last, clip, to_rgb, dropped):
            return True
    return False


def _put_frames(container, stream, index, position: int, last: int, clip, to_rgb, dropped) -> bool:
    """Decodes the wanted frames, if from `position` to `last` every frame comes at its time, undamaged."""
    codec, times = stream.codec_context.codec, index.times
    must_be_key = not codec.intra_only and codec.name not in _CHECKS_KEYS
    started, shown = False, times[position : last + 1]
    wanted = {times[place] for place in clip.places if position <= place <= last}
    packets = needed_packets(container, stream, index.side_data, shown, wanted, dropped)
    for frame in decoded_frames(container, stream, packets):
        if frame.pts is None:
            return False
        if not started and frame.pts < times[position]:
            continue  # the seek landed earlier, or the frame needs one from before the key frame
        if not started and must_be_key and frame.pict_type != av.video.frame.PictureType.I:
            return False  # a container can call any frame a key frame, and this decoder would not notice
        started = True
        while position < last and times[position] in (dropped or ()):
            position += 1
        if frame.pts != times[position] or frame.is_corrupt:
            return False
        if position in clip.places:
            clip.put(position, to_rgb(frame))
        if position == last:
            return True
        position += 1
    return False


def _decode_from_start(container, stream, times, clip, to_rgb) -> tuple[bool, int]:
    """
    Decodes to the last wanted frame; or to the end, if the frames do not come at the times of the packets: then there
    may be more or fewer of them. (Where the times are unknown, the number of packets is taken as that of the frames.)
    Damaged frames are shown in their places, as ffmpeg shows them.

    Returns:
        Whether these are the wanted frames, and how many frames there were.
    """
    total, damaged, as_expected = 0, 0, True
    progress = Progress(f"{clip.name} has to be decoded from its beginning")
    for frame in decoded_frames(container, stream):
        progress.step(total)
        damaged += frame.is_corrupt
        if total in clip.places:
            clip.put(total, to_rgb(frame), frame.is_corrupt)
        if times is not None and (total >= len(times) or frame.pts != times[total]):
            as_expected = False
        total += 1
        if total > clip.last and as_expected:
            break
    if 2 * damaged > total:
        raise ValueError(
            f"{clip.name}: the decoder reports damage in {damaged} of {total} frames, up to the last that is wanted. "
            "If the file is encrypted, decrypt it; else copy, download or encode it anew."
        )
    return (total > clip.last and as_expected) or (times is not None and total == len(times)), total


# ---------------------------------------------------------------------------------------------------------------------
# torchcodec and decord
# ---------------------------------------------------------------------------------------------------------------------


def _leave_odd_files_to_pyav(source, codecs) -> bytes:
    """Only whole MP4 or MOV files with nothing odd about their one video track are read. Returns their index."""
    index = whole_index(source)
    reason = "a file that is no whole MP4 or MOV" if index is None else what_is_odd(index, codecs)
    if reason:
        raise _Unreliable(reason)
    return index


def _metadata_of_index(index: bytes, total: int, fps, decoder: str) -> DecodedVideoMetadata:
    times, last_duration, clock = times_of_frames(index)
    if len(times) != total:  # the decoder counts others
        return _metadata(total, fps, decoder)
    return _metadata(total, fps, decoder, _frame_times(times, last_duration, clock, fps))


def _read_torchcodec(source, name, sample, new_clip):
    # torchcodec 0.17 returns other frames than those asked for, or none, of AVI, MPEG-PS and MPEG-TS files, of hidden
    # frames of VP8, of H.264 in fields, where key frames are marked wrongly, and where a picture is the first stream.
    index = _leave_odd_files_to_pyav(source, (b"avc1", b"hvc1", b"hev1", b"av01", b"vp09"))
    with _passing_failures_on():
        # "exact" reads through the file first, as the other decoders do, so that indices are right.
        decoder = importlib.import_module("torchcodec.decoders").VideoDecoder(
            source,
            dimension_order="NHWC",
            seek_mode="exact",
            num_ffmpeg_threads=decoding_threads(),
            device="cpu",  # else PyTorch's default device
        )
        about = decoder.metadata
        metadata = _metadata_of_index(index, about.num_frames, about.average_fps, "torchcodec")
    check_frame_size(about.height, about.width, name)
    clip = new_clip(_sample(sample, metadata, name), name)
    _put_batches(clip, lambda indices: decoder.get_frames_at(indices=indices).data.numpy())
    return _finish(clip, metadata)


def _read_decord(source, name, sample, new_clip):
    # decord 0.6 returns wrong frames, without a word, from AVI, MPEG-PS, MPEG-TS and WMV files, from HEVC and MPEG-4,
    # where an edit list cuts off the beginning, and where the table of key frames is empty or absent; and it overlooks
    # the rotation of Matroska files.
    index = _leave_odd_files_to_pyav(source, (b"avc1",))
    decord = importlib.import_module("decord")
    decord.logging.set_level(decord.logging.QUIET)
    with _passing_failures_on():
        file = as_file(source) if isinstance(source, bytes) else source
        reader = decord.VideoReader(file, ctx=decord.cpu(0), num_threads=decoding_threads())
        metadata = _metadata_of_index(index, len(reader), reader.get_avg_fps(), "decord")
    clip = new_clip(_sample(sample, metadata, name), name)
    _put_batches(clip, lambda indices: reader.get_batch(indices).asnumpy())
    return _finish(clip, metadata)


@contextmanager
def _passing_failures_on():
    try:
        yield
    except Exception as error:
        raise _Unreliable(f"a file on which the decoder fails ({first_line(error)})") from error


def _put_batches(clip, decode) -> None:
    """Decodes the wanted frames, ascending and a few at a time, so that not all are in memory before they shrink."""
    wanted = sorted(clip.places)
    for start in range(0, len(wanted), 8):
        batch = wanted[start : start + 8]
        with _passing_failures_on():
            decoded = decode(batch)
        for index, pixels in zip(batch, decoded, strict=True):
            clip.put(index, pixels)


# ---------------------------------------------------------------------------------------------------------------------
# Decoders that others made
# ---------------------------------------------------------------------------------------------------------------------


def _file_of(decoder):
    """
    The file from which datasets made a decoder, as a row, if it lies on this machine and PyAV takes the same stream of
    it; else `None`. Read from the file, frames are right where torchcodec's are not: of AVI, say.
    """
    row = getattr(decoder, "_hf_encoded", None)
    if av is None or not isinstance(row, dict):
        return None
    if row.get("bytes") is None and not os.path.isfile(row.get("path") or ""):
        return None
    try:
        with open_pyav(*open_source(row)) as (_, stream):
            return row if stream.index == decoder.stream_index else None
    except (OSError, ValueError, av.FFmpegError):
        return None


def _read_decoder(decoder, sample, new_clip, section):
    """Of a decoder like torchcodec's, the wanted frames alone: by index, or by time if `sample` gives times."""
    about, package = decoder.metadata, type(decoder).__module__.partition(".")[0]
    name = str(getattr(about, "path", None) or f"<{type(decoder).__name__}>")
    if section:
        raise ValueError(f"A section of {name} was asked for, but it is a decoder: give the file, or the frames.")
    if not about.num_frames:
        raise ValueError(f"{name} does not say how many frames it has. Make the decoder with `seek_mode='exact'`.")
    metadata, times = _metadata(about.num_frames, about.average_fps, package), []
    begin, end = (getattr(about, f"{side}_stream_seconds", None) for side in ("begin", "end"))
    if begin is not None and end is not None and hasattr(decoder, "get_frames_played_at"):
        metadata.is_asked_by_time, metadata.duration = True, end - begin

    def decode(keys):
        if wanted.dtype.kind == "f":
            batch = decoder.get_frames_played_at(seconds=seconds[keys])
            times.extend(batch.pts_seconds.tolist())
        else:
            batch = decoder.get_frames_at(indices=keys)
        return _rgb_bytes(batch.data)

    wanted = np.asarray(sample(metadata=metadata))
    if wanted.dtype.kind == "f":
        seconds = torch.from_numpy((begin + wanted).clip(begin, np.nextafter(end, begin)))
        clip = new_clip(np.arange(len(wanted)), name)
    else:
        clip = new_clip(_sample(lambda metadata: wanted, metadata, name), name)
    try:
        _put_batches(clip, decode)
    except _Unreliable as error:
        raise ValueError(f"{name}: {package} cannot decode the wanted frames ({error}).") from error
    return _finish(clip, metadata, np.array(times) if times else None)


def _rgb_bytes(frames: torch.Tensor) -> np.ndarray:
    """RGB frames of either order of axes, and of 0 to 255 or of 0 to 1 in floating point, to (T, H, W, 3) uint8."""
    if frames.is_floating_point():
        frames = (frames * 255).round().to(torch.uint8)
    return (frames.movedim(1, -1) if frames.shape[1] == 3 else frames).cpu().numpy()


# In the order of preference: PyAV is as fast as the others, and the only one of which no test file gets wrong frames;
# docs/limits.md has the figures.
DECODERS = {"pyav": _read_pyav, "torchcodec": _read_torchcodec, "decord": _read_decord}


__all__ = [
    "DECODERS",
    "DecodedVideoMetadata",
    "choose_decoder",
    "decode_video",
    "decoded_frames",
    "open_pyav",
    "read_packets",
]
