"""A video file, URL or bytes and wanted frame indices in, decoded frames out."""

import asyncio
import importlib
import io
import itertools
import math
import os
import stat
import time
import traceback
from bisect import bisect_left
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fractions import Fraction

import numpy as np
import torch
from torch.utils.data import get_worker_info
from transformers.utils import logging
from transformers.video_utils import VideoMetadata

from .video_packets import frame_counter


# Code that travels with a checkpoint must import inside `try` what may be absent.
try:
    import av
except ImportError:
    av = None
try:
    from huggingface_hub.utils import httpx
except ImportError:
    import httpx


logger = logging.get_logger(__name__)

_PYAV = int(av.__version__.split(".")[0]) if av is not None else 0

# What is refused, so that a small file cannot take all memory or all time; docs/limits.md lists it. Environment
# variables of the same names, or assignments to these, raise it.
VIDEO_MAX_FRAME_PIXELS = int(os.environ.get("VIDEO_MAX_FRAME_PIXELS", 2**26))  # 8192 x 8192; 8K is half of it
VIDEO_MAX_CLIP_BYTES = int(os.environ.get("VIDEO_MAX_CLIP_BYTES", 2**32))  # of all frames that one call returns
VIDEO_MAX_DOWNLOAD_BYTES = int(os.environ.get("VIDEO_MAX_DOWNLOAD_BYTES", 2**31))
VIDEO_MAX_DOWNLOAD_SECONDS = float(os.environ.get("VIDEO_MAX_DOWNLOAD_SECONDS", 900))
DOWNLOAD_TIMEOUT = 30  # seconds without an answer or without a byte


def decode_video(file, sample=None, decoder: str | None = None, transform=None, section=None) -> tuple:
    """
    Decodes frames of a video.

    Args:
        file: a path, an `http(s)` URL, the bytes of a file or a file object opened in binary mode.
        sample: called with `metadata=` a [`~transformers.video_utils.VideoMetadata`], which says how many frames there
            are (`total_num_frames`) and how many a second (`fps`), returns the indices of the frames to decode; `None`
            for all frames.
        decoder: `"pyav"`, `"torchcodec"` or `"decord"`; `None` takes the first that can be used, in this order.
        transform: called with each decoded frame, a (3, H, W) uint8 tensor with the channels last in memory, returns
            the tensor to keep. Resizing here needs the memory of one large frame, not of all.
        section: `(start, stop)` in seconds from the first frame (`stop` may be `None`, the end): only frames that are
            shown from `start` on and before `stop` are counted and decoded. PyAV seeks to them, so that the rest of
            the file is not read, if the container allows it.

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
    if section:
        decoder = "pyav"
    decoder = choose_decoder([decoder] if decoder else DECODERS)
    source, name = _open(file)
    try:
        if section:
            frames, metadata = _read_section(source, name, sample or _all_frames, transform, *section)
        else:
            frames, metadata = _decode(decoder, source, name, sample or _all_frames, transform)
    except Exception as error:
        _forget_locals(error)
        raise
    return frames.permute(0, 2, 3, 1).numpy() if transform is None else frames, metadata


def _decode(decoder, source, name, sample, transform):
    try:
        return DECODERS[decoder](source, name, sample, transform)
    except _Unreliable as reason:
        if av is None:
            raise ValueError(
                f"{name}: {decoder} may misplace the frames of {reason}. `pip install av` reads it."
            ) from None
    return _read_pyav(source, name, sample, transform)


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
            problems[package] = _first_line(error)
    found = "; ".join(f"{package}: {problem}" for package, problem in problems.items())
    raise ImportError(
        f"A video file needs a decoder, but of {', '.join(names)} none can be used ({found}). "
        f"`pip install {next(iter(problems))}`, or give frames that are already decoded."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Where a file comes from
# ---------------------------------------------------------------------------------------------------------------------


def _open(file) -> tuple[str | bytes, str]:
    """A path, or the bytes of a file; and its name for messages."""
    if isinstance(file, bytes | bytearray):
        source, name = bytes(file), f"<{len(file)} bytes>"
    elif hasattr(file, "read"):
        name = str(getattr(file, "name", f"<{type(file).__name__}>"))
        source = _read_open_file(file, name)
    elif isinstance(file, str) and file.lower().startswith(("http://", "https://")):
        source, name = _download(file), file
    else:
        source = name = os.fspath(file)
        if os.path.isdir(source):
            raise IsADirectoryError(f"{name} is a folder, but a video file was expected.")
        if not os.path.exists(source):
            raise FileNotFoundError(f"There is no file {name} (looked in {os.getcwd()}).")
        if not os.path.isfile(source):
            raise ValueError(f"{name} is a device or a pipe, not a file. Copy the video to a file first.")
    if (len(source) if isinstance(source, bytes) else os.path.getsize(source)) == 0:
        raise ValueError(f"{name} is empty (0 bytes). Copy or download the video again.")
    return source, name


def _read_open_file(file, name: str) -> bytes:
    try:
        mode = os.fstat(file.fileno()).st_mode
    except (AttributeError, OSError, TypeError, ValueError):  # one that lives in memory, or in another library
        mode = stat.S_IFREG
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        raise ValueError(f"{name} is a device, not a file. Copy the video to a file first.")
    if file.seekable():
        file.seek(0)
    source = file.read(VIDEO_MAX_DOWNLOAD_BYTES + 1)
    if not isinstance(source, bytes):
        raise ValueError(f"{name} was opened in text mode; open it with mode 'rb'.")
    if len(source) > VIDEO_MAX_DOWNLOAD_BYTES:
        raise ValueError(
            f"{name} has more than {VIDEO_MAX_DOWNLOAD_BYTES} bytes, and an open file is read into memory. Give its "
            "path, or raise VIDEO_MAX_DOWNLOAD_BYTES."
        )
    return source


def _download(url: str) -> bytes:
    # A thread with an event loop of its own: the deadline then holds whatever the server does, byte by byte or not at
    # all, and a notebook, whose own loop is running, can download as well.
    loop = asyncio.new_event_loop()
    task = loop.create_task(asyncio.wait_for(_stream(url), VIDEO_MAX_DOWNLOAD_SECONDS))
    try:
        with ThreadPoolExecutor(1) as thread:
            future = thread.submit(loop.run_until_complete, task)
            try:
                return future.result()
            except BaseException:  # Ctrl-C, too, ends the download
                if not future.done():
                    loop.call_soon_threadsafe(task.cancel)
                raise
    except TimeoutError as error:
        raise _endless(url) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        problem = f"{type(error).__name__}: {_first_line(error)}"
        raise ConnectionError(f"{url} could not be downloaded ({problem}). Check address and network.") from error
    finally:
        loop.close()


async def _stream(url: str) -> bytes:
    data = io.BytesIO()
    headers = {"Accept-Encoding": "identity"}  # a few bytes of gzip can grow to gigabytes, and video does not shrink
    async with (
        httpx.AsyncClient(follow_redirects=True, timeout=DOWNLOAD_TIMEOUT) as client,
        client.stream("GET", url, headers=headers) as response,
    ):
        response.raise_for_status()
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding.lower() != "identity":
            raise ConnectionError(
                f"{url} was sent with the content encoding {encoding!r}, although none was asked for. Download and "
                "unpack it yourself, and give the path."
            )
        if int(response.headers.get("Content-Length", 0)) > VIDEO_MAX_DOWNLOAD_BYTES:
            raise _endless(url)
        async for chunk in response.aiter_raw():
            data.write(chunk)
            if data.tell() > VIDEO_MAX_DOWNLOAD_BYTES:
                raise _endless(url)
    return data.getvalue()


def _endless(url: str) -> ConnectionError:
    return ConnectionError(
        f"{url} did not end within {VIDEO_MAX_DOWNLOAD_BYTES} bytes and {VIDEO_MAX_DOWNLOAD_SECONDS:g} seconds. If it "
        "is a live stream, save the part that you need and give the path; else raise VIDEO_MAX_DOWNLOAD_BYTES or "
        "VIDEO_MAX_DOWNLOAD_SECONDS."
    )


class _QuietSeek:
    """A seek to where no file can be, which damaged files ask for, fails without an exception: PyAV would print it."""

    def seek(self, offset, whence=0):
        try:
            return super().seek(offset, whence)
        except (OSError, ValueError):
            return -1


class _File(_QuietSeek, io.FileIO):
    pass


class _Bytes(_QuietSeek, io.BytesIO):
    pass


def _as_file(source: str | bytes):
    return _Bytes(source) if isinstance(source, bytes) else _File(source)


# ---------------------------------------------------------------------------------------------------------------------
# What every decoder shares
# ---------------------------------------------------------------------------------------------------------------------


def _first_line(error) -> str:
    """What went wrong, in one line: libav's errors repeat a number and a name, torchcodec's have thirty lines."""
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).strip().split("\n")[0]


def _mp4_index(source: str | bytes) -> bytes | None:
    """The index (the moov box) of an MP4 or MOV file that is whole and not fragmented; None of any other file."""
    index, position = None, 0
    with _as_file(source) as file:
        size = file.seek(0, os.SEEK_END)
        while position < size:
            file.seek(position)
            header = file.read(16)
            length, box = int.from_bytes(header[:4], "big"), header[4:8]
            length = {0: size - position, 1: int.from_bytes(header[8:], "big")}.get(length, length)
            if length < 8 or position + length > size or box == b"moof" or (position == 0 and box != b"ftyp"):
                return None
            if box == b"moov":
                file.seek(position)
                index = file.read(length)
            position += length
    return index


def _no_video(source: str | bytes, name: str, error) -> ValueError:
    """The error for a file that cannot be decoded, with what the file looks like."""
    with _as_file(source) as file:
        start = file.read(48)
    if start[4:8] == b"ftyp":
        found = "an MP4 or MOV file"
        if _mp4_index(source) is None:
            found += " that lacks its index (moov) or its end, as if it had been cut short"
    elif all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start):
        found = f"a file that begins with the text {start.decode()!r}"
    else:
        found = f"a file that begins with the bytes {start[:8].hex(' ')}"
    return ValueError(
        f"{name} cannot be read as a video ({_first_line(error)}). It is {found}. Copy, download or encode it anew."
    )


def _check_frame_size(height: int, width: int, name: str) -> None:
    if height < 1 or width < 1:
        # FFmpeg says so, too, of a frame that is larger than the limit.
        raise ValueError(
            f"{name} has frames without pixels, or of more than {VIDEO_MAX_FRAME_PIXELS} pixels. Encode it anew, or "
            "raise VIDEO_MAX_FRAME_PIXELS (an environment variable)."
        )
    if height * width > VIDEO_MAX_FRAME_PIXELS:
        raise ValueError(
            f"{name} has frames of {width} x {height} pixels, more than {VIDEO_MAX_FRAME_PIXELS} in all. "
            "Shrink it, or raise VIDEO_MAX_FRAME_PIXELS (an environment variable)."
        )


def _decoding_threads() -> int:
    """One in a worker of a `DataLoader`, of which there are as many as cores; elsewhere 0: as many as cores."""
    return 0 if get_worker_info() is None else 1


def _metadata(total: int, fps, decoder: str) -> VideoMetadata:
    fps = float(fps) if fps else None
    return VideoMetadata(total_num_frames=total, fps=fps, duration=total / fps if fps else None, video_backend=decoder)


def _sample(sample, metadata: VideoMetadata, name: str) -> np.ndarray:
    indices = np.asarray(sample(metadata=metadata), dtype=np.int64)
    if indices.size == 0 or indices.min() < 0 or indices.max() >= metadata.total_num_frames:
        raise ValueError(
            f"The frames {indices.tolist()} of {name} were asked for, but it has {metadata.total_num_frames}."
        )
    metadata.frames_indices = indices
    return indices


class _Clip:
    """The frames of one clip, transformed one by one into one tensor. `shape` is (height, width) of a decoded one."""

    def __init__(self, indices: np.ndarray, name: str, transform):
        self.name, self.transform, self.frames, self.shape = name, transform, None, None
        self.places = {}  # {index of a frame: where it goes}
        for place, index in enumerate(indices.tolist()):
            self.places.setdefault(index, []).append(place)
        self.last, self.count = max(self.places), len(indices)

    def put(self, index: int, pixels: np.ndarray) -> None:
        """`pixels`: (H, W, 3) uint8 of frame `index`, which is one of those wanted."""
        shape = pixels.shape[:2]
        if self.shape not in (None, shape):
            raise ValueError(
                f"{self.name} changes its frame size: (height, width) {sorted([self.shape, shape])}. Cut it, or "
                "encode it anew with one size."
            )
        self.shape = shape
        frame = torch.from_numpy(pixels).permute(2, 0, 1)
        if self.transform is not None:
            frame = self.transform(frame)
        if self.frames is None:
            size = self.count * frame.nbytes
            if size > VIDEO_MAX_CLIP_BYTES:
                raise ValueError(
                    f"{self.count} frames of {self.name} take {size} bytes, more than {VIDEO_MAX_CLIP_BYTES}. Take "
                    "fewer, or raise VIDEO_MAX_CLIP_BYTES (an environment variable)."
                )
            channels, height, width = frame.shape
            self.frames = frame.new_empty(self.count, height, width, channels).permute(0, 3, 1, 2)
        for place in self.places[index]:
            self.frames[place] = frame


class _Progress:
    """Says what takes long: after five seconds, and then every ten."""

    def __init__(self, what: str):
        self.what, self.start = what, time.monotonic()
        self.next = self.start + 5

    def step(self, done: str) -> None:
        now = time.monotonic()
        if now > self.next:
            self.next = now + 10
            logger.warning(f"{self.what}: {done} in {now - self.start:.0f} s. Ctrl-C stops it.")


class _Unreliable(Exception):
    """Raised by a decoder for a kind of file of which it returns wrong frames, which the message names."""


# ---------------------------------------------------------------------------------------------------------------------
# PyAV
# ---------------------------------------------------------------------------------------------------------------------

# Decoders that, started at a frame that is no key frame, give an error or mark what comes as corrupt.
_CHECKS_KEYS = {"h264", "hevc", "vvc", "vp8", "vp9", "av1", "libdav1d"}


def _read_pyav(source, name, sample, transform):
    to_rgb = _ToRGB(name)
    try:
        with open_pyav(source, name) as (container, stream):
            total, times, keys = _index_packets(container, stream, name)
            if total == 0:
                raise _no_video(source, name, "there is no frame in it")
            metadata = _metadata(total, _frame_rate(stream, times), "pyav")
            clip = _Clip(_sample(sample, metadata, name), name, transform)
            complete = times is not None and _decode_from_key(container, stream, times, keys, clip, to_rgb)
        for _ in range(3):
            if complete:
                break
            with open_pyav(source, name) as (container, stream):
                # With a thread a frame, FFmpeg marks good frames of H.264 as damaged where frames follow on fields,
                # and what it makes of damaged files differs from run to run.
                stream.thread_type = "SLICE"
                complete, total = _decode_from_start(container, stream, times, clip, to_rgb)
            if total == 0:
                raise _no_video(source, name, "none of its frames can be decoded")
            if not complete:  # there are more or fewer frames than packets: sample from those that there are
                metadata, times = _metadata(total, metadata.fps, "pyav"), None
                clip = _Clip(_sample(sample, metadata, name), name, transform)
    except av.FFmpegError as error:
        raise _no_video(source, name, error) from error
    if not complete:
        raise _no_video(source, name, "each time it is read, another number of frames can be decoded")
    metadata.height, metadata.width = clip.shape
    return clip.frames, metadata


def _read_section(source, name, sample, transform, start, stop):
    """The frames that are shown from `start` to `stop`, in seconds from the first; only that part is read."""
    hint = "Leave the section out, or copy the file into another container: `ffmpeg -i FILE -c copy other.mp4`."
    try:
        with open_pyav(source, name) as (container, stream):
            if stream.start_time is None:
                raise ValueError(f"{name} cannot be searched by time: it does not say when frames are shown. {hint}")
            begin = stream.start_time + _ticks(start, stream)
            end = None if stop is None else stream.start_time + _ticks(stop, stream)
            times, keys = _index_section(container, stream, name, begin, end)
            if times is None:
                raise ValueError(
                    f"{name} cannot be searched by time: no key frame whose time can be trusted is "
                    f"found at {start:g} s. {hint}"
                )
            before = bisect_left(times, begin)  # frames that are decoded for the sake of others
            total = (len(times) if end is None else bisect_left(times, end)) - before
            if total < 1:
                section = f"from {start:g} s on" if stop is None else f"from {start:g} s to {stop:g} s"
                raise ValueError(f"{name} shows no frame {section}. Give a longer or an earlier section.")
            metadata = _metadata(total, _frame_rate(stream, times), "pyav")
            clip = _Clip(_sample(sample, metadata, name) + before, name, transform)
            if not _decode_from_key(container, stream, times, keys, clip, _ToRGB(name)):
                raise ValueError(f"{name} cannot be searched by time: its frames are not where it says. {hint}")
    except av.FFmpegError as error:
        raise _no_video(source, name, error) from error
    metadata.height, metadata.width = clip.shape
    return clip.frames, metadata


def _ticks(seconds, stream) -> int:
    """Seconds in units of the stream's clock, rounded up; 0.2 is taken for a fifth, which floating point misses."""
    ticks = math.ceil(Fraction(seconds).limit_denominator(10**6) / stream.time_base)
    return min(ticks, 2**62)  # no frame is that late, and libav takes 64 bits


def _index_section(container, stream, name, begin: int, end: int | None):
    """
    Times and key frames as `_index_packets` gives them, from the last key frame that is shown at `begin` or before on.
    `None` for the times if none is found.
    """
    if container.format.name == "mpeg":  # behind a seek, libav makes up times of MPEG-PS that are wrong
        return None, []
    for seconds_before in (0, 1, 10, 100):  # where seeks go by the time of decoding, or only about, they land too late
        try:
            container.seek(begin - _ticks(seconds_before, stream), stream=stream)
        except av.FFmpegError:
            break
        _, times, keys = _index_packets(container, stream, name, end)
        first = min((shown for shown, _ in keys), default=None)
        if first is not None and first <= begin:
            return times[bisect_left(times, first) :], keys
    return None, []


@contextmanager
def open_pyav(source: str | bytes, name: str):
    """Opens a path or bytes with PyAV, and nothing that the file points to. Yields the container and the stream."""
    with _as_file(source) as file:
        # libav sees bytes alone: neither the file's name nor what stands in a playlist makes it open anything else.
        file.name = "video"
        with av.open(
            file,
            container_options={"protocol_whitelist": "none"},
            options={"max_pixels": str(VIDEO_MAX_FRAME_PIXELS)},
            **({"metadata_errors": "ignore"} if _PYAV < 19 else {}),
        ) as container:
            if container.format.name.endswith("_pipe"):
                raise ValueError(_still_image(source, name, container.format.name))
            stream = _choose_stream(container, name)
            _check_frame_size(stream.codec_context.height, stream.codec_context.width, name)
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = _decoding_threads()
            try:
                yield container, stream
            finally:
                # Its threads then hold no frame. To free a decoder whose threads do, PyAV 17 waits for them with
                # Python's lock, which they may want to let the frame go: a deadlock.
                if stream.codec_context.is_open:
                    stream.codec_context.flush_buffers()


def _still_image(source, name, format) -> str:
    with _as_file(source) as file:
        start = file.read(21)
    if start[:4] == b"RIFF" and start[8:16] == b"WEBPVP8X" and start[20] & 2:
        return f"{name} is an animated WebP, which FFmpeg cannot read. Open it with PIL and give its frames as a list."
    return (
        f"{name} is a still image ({format}), but a video was expected. Open images with PIL, say, and give the "
        "frames of each video as a list."
    )


def _choose_stream(container, name):
    """The video stream that ffmpeg would take, or, if that holds one picture only, the first that holds more."""
    attached_picture = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if s.codec_context and not s.disposition & attached_picture]
    if not streams:
        # Of a stream in a codec that is unknown or encrypted PyAV has no context, and so no name.
        found = [
            f"{s.type} ({s.codec_context.name if s.codec_context else 'codec unknown'})" for s in container.streams
        ]
        raise ValueError(
            f"{name} has no video stream that can be decoded, only {', '.join(found) or 'nothing at all'}. If it is "
            "encrypted, decrypt it; if its codec is unknown, encode it anew."
        )
    streams = [s for s in streams if s.frames != 1] or streams
    best = container.streams.best("video")
    return best if best in streams else streams[0]


def _index_packets(container, stream, name, end: int | None = None) -> tuple[int, list[int] | None, list[tuple]]:
    """
    Reads through the file without decoding, to its end or until all is read that is shown before `end`.

    Returns:
        The number of frames; their times of presentation, ascending, or `None` where the file does not say; and the
        times of presentation and of decoding of the key frames.
    """
    times, keys = [], []
    begins_frame = frame_counter(stream)
    progress = _Progress(f"{name} is read through to count its frames")
    for packet in read_packets(container, stream):
        progress.step(f"{len(times)} frames")
        if end is not None and packet.dts is not None and packet.dts >= end:
            break  # what comes is shown later than it is decoded
        # Packets to be discarded are those before the start of an edit list: decoded, but not shown.
        if not packet.size or packet.is_discard or packet.is_corrupt or not begins_frame(packet):
            continue
        times.append(packet.pts)
        if packet.is_keyframe:
            keys.append((packet.pts, packet.dts))
    # AVI stores no times of presentation: libav makes them up, and wrongly if there are B-frames.
    made_up = container.format.name == "avi" and stream.codec_context.has_b_frames
    if made_up or None in times or len(set(times)) < len(times):
        return len(times), None, []
    return len(times), sorted(times), keys


def _frame_rate(stream, times):
    """Frames a second: what the file declares, unless the times of its frames say something else."""
    declared = stream.average_rate
    if not times or len(times) < 2:
        return declared
    measured = (len(times) - 1) / float((times[-1] - times[0]) * stream.time_base)
    return declared if declared and abs(declared / measured - 1) < 0.02 else measured


def _decode_from_key(container, stream, times, keys, clip, to_rgb) -> bool:
    """
    Decodes from the last key frame before the first wanted frame. False if what comes is not, frame by frame, what the
    times say: damage, or wrong times, or no key frame, or seeks that fail or all land too late.
    """
    codec = stream.codec_context.codec
    must_be_key = not codec.intra_only and codec.name not in _CHECKS_KEYS
    first = times[min(clip.places)]
    before = sorted((key for key in keys if key[0] <= first), key=lambda key: key[0])[-2:]
    if not before:
        return False
    # MP4 and Matroska find a key frame by its time of presentation, MPEG-TS by that of decoding, MPEG-PS only about.
    for offset in (*before[-1], before[0][1]):
        if offset is None:
            continue
        try:
            container.seek(offset, stream=stream)
        except av.FFmpegError:
            continue  # a file that can be read, but not searched
        if _decode_run(container, stream, times, bisect_left(times, before[-1][0]), clip, to_rgb, must_be_key):
            return True
    return False


def _decode_run(container, stream, times, position: int, clip, to_rgb, must_be_key: bool) -> bool:
    """Decodes the wanted frames, if from `position` to the last of them every frame comes at its time, undamaged."""
    started = False
    for frame in decoded_frames(container, stream):
        if frame.pts is None:
            return False
        if not started and frame.pts < times[position]:
            continue  # the seek landed earlier, or the frame needs one from before the key frame
        if not started and must_be_key and frame.pict_type != av.video.frame.PictureType.I:
            return False  # a container can call any frame a key frame, and this decoder would not notice
        started = True
        if frame.pts != times[position] or frame.is_corrupt:
            return False
        if position in clip.places:
            clip.put(position, to_rgb(frame))
        if position == clip.last:
            return True
        position += 1
    return False


def _decode_from_start(container, stream, times, clip, to_rgb) -> tuple[bool, int]:
    """
    Decodes to the last wanted frame; or to the end, if the frames do not come at the times of the packets: then there
    may be more or fewer of them. (Where the times are unknown, the number of packets is taken as that of the frames.)

    Returns:
        Whether these are the wanted frames, and how many frames there were.
    """
    total, as_expected = 0, True
    progress = _Progress(f"{clip.name} has to be decoded from its beginning")
    for frame in decoded_frames(container, stream):
        progress.step(f"{total} frames")
        if frame.is_corrupt:
            as_expected = as_expected and times is None
            continue
        if total in clip.places:
            clip.put(total, to_rgb(frame))
        if times is not None and (total >= len(times) or frame.pts != times[total]):
            as_expected = False
        total += 1
        if total > clip.last and as_expected:
            return True, total
    return times is not None and total == len(times), total


def read_packets(container, *streams):
    """The packets of streams; where the file is damaged, those before."""
    try:
        yield from container.demux(*streams)
    except (av.FFmpegError, IndexError):  # PyAV 18 stumbles at the end of files where streams begin in the middle
        pass


def decoded_frames(container, stream):
    """The frames from where the container stands, in the order in which they are shown, without damaged packets."""
    for packet in itertools.chain(read_packets(container, stream), [None]):
        try:
            frames = stream.decode(packet)  # None makes the decoder give out what it holds back
        except av.FFmpegError:
            continue
        yield from frames


class _ToRGB:
    """
    Decoded frames to (H, W, 3) uint8, upright.

    One thread converts, and only one frame is asked for its side data: a frame that has been asked stays in memory
    until the garbage collector comes, with what converted it. Where that had threads, a worker forked meanwhile, whose
    collector comes first, would wait for threads that it does not have, for ever.
    """

    def __init__(self, name: str):
        self.name, self.matrix = name, None
        self.reformatter = av.video.reformatter.VideoReformatter()
        self.options = {"threads": 1} if _PYAV >= 17 else {}  # before, there were no threads

    def __call__(self, frame) -> np.ndarray:
        try:
            pixels = self.reformatter.reformat(frame, format="rgb24", **self.options).to_ndarray()
        except av.FFmpegError as error:
            raise ValueError(
                f"{self.name} has colours that FFmpeg cannot convert to RGB ({_first_line(error)}: pixel format "
                f"{frame.format.name}, colour matrix {int(frame.colorspace)} of ITU-T H.273). Encode it in BT.709."
            ) from error
        if self.matrix is None:
            self.matrix = bytes(frame.side_data.get("DISPLAYMATRIX") or b"")
        if not self.matrix:
            return pixels
        # A point (x, y) of the frame is shown at (a x + c y, b x + d y), y downwards: to the nearest quarter turn.
        a, b, _, c, d = np.frombuffer(self.matrix, np.int32)[:5]
        if abs(b) > abs(a):
            pixels, a, d = pixels.transpose(1, 0, 2), c, b
        return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


# ---------------------------------------------------------------------------------------------------------------------
# torchcodec and decord
# ---------------------------------------------------------------------------------------------------------------------


def _leave_odd_files_to_pyav(source, codecs) -> None:
    """Only whole MP4 or MOV files with one video track, in one of the codecs, and with key frames are read."""
    index = _mp4_index(source) or b""
    key_frames = index.partition(b"stss")[2][4:8]  # how many; without this table every frame is said to be one
    if not any(codec in index for codec in codecs) or index.count(b"vide") != 1 or not any(key_frames):
        codecs = b", ".join(codecs).decode()
        raise _Unreliable(f"files other than whole MP4s of one video track ({codecs}) with key frames")


def _read_torchcodec(source, name, sample, transform):
    # torchcodec 0.17 returns other frames than those asked for, or none, of AVI, MPEG-PS and MPEG-TS files, of hidden
    # frames of VP8, of H.264 in fields, where key frames are marked wrongly, and where a picture is the first stream.
    _leave_odd_files_to_pyav(source, (b"avc1", b"hvc1", b"hev1", b"av01", b"vp09"))
    try:
        # "exact" reads through the file first, as the other decoders do, so that indices are right.
        decoder = importlib.import_module("torchcodec.decoders").VideoDecoder(
            source, dimension_order="NHWC", seek_mode="exact", num_ffmpeg_threads=_decoding_threads()
        )
        about = decoder.metadata
        metadata = _metadata(about.num_frames, about.average_fps, "torchcodec")
    except Exception as error:
        raise _no_video(source, name, error) from error
    _check_frame_size(about.height, about.width, name)
    clip = _Clip(_sample(sample, metadata, name), name, transform)
    _put_batches(clip, source, lambda indices: decoder.get_frames_at(indices=indices).data.numpy())
    metadata.height, metadata.width = clip.shape
    return clip.frames, metadata


def _read_decord(source, name, sample, transform):
    # decord 0.6 returns wrong frames, without a word, from AVI, MPEG-PS, MPEG-TS and WMV files, from HEVC and MPEG-4,
    # where an edit list cuts off the beginning, and where the table of key frames is empty or absent; and it overlooks
    # the rotation of Matroska files.
    _leave_odd_files_to_pyav(source, (b"avc1",))
    decord = importlib.import_module("decord")
    decord.logging.set_level(decord.logging.QUIET)
    try:
        file = _as_file(source) if isinstance(source, bytes) else source
        reader = decord.VideoReader(file, ctx=decord.cpu(0), num_threads=_decoding_threads())
        start = reader.get_frame_timestamp([0])[0, 0]
        metadata = _metadata(len(reader), reader.get_avg_fps(), "decord")
    except Exception as error:
        raise _no_video(source, name, error) from error
    if start < 0:
        raise _Unreliable("files with an edit list that cuts off the beginning")
    clip = _Clip(_sample(sample, metadata, name), name, transform)
    _put_batches(clip, source, lambda indices: reader.get_batch(indices).asnumpy())
    metadata.height, metadata.width = clip.shape
    return clip.frames, metadata


def _put_batches(clip, source, decode) -> None:
    """Decodes the wanted frames, ascending and a few at a time, so that not all are in memory before they shrink."""
    wanted = sorted(clip.places)
    for start in range(0, len(wanted), 8):
        batch = wanted[start : start + 8]
        try:
            decoded = decode(batch)
        except Exception as error:
            raise _no_video(source, clip.name, error) from error
        for index, pixels in zip(batch, decoded, strict=True):
            clip.put(index, pixels)


# In the order of preference: PyAV is as fast as the others, and the only one of which no test file gets wrong frames;
# docs/limits.md has the figures.
DECODERS = {"pyav": _read_pyav, "torchcodec": _read_torchcodec, "decord": _read_decord}


__all__ = ["DECODERS", "choose_decoder", "decode_video", "decoded_frames", "open_pyav", "read_packets"]
