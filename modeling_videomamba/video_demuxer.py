"""The packets of a video file by PyAV: its stream, when its frames are shown, and where decoding may begin."""

import math
import os
import time
from bisect import bisect_left
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction

from transformers.utils import logging

from .forked_process import decoding_threads
from .video_mp4 import offsets_and_durations, top_boxes, whole_index
from .video_packets import frame_counter
from .video_sources import as_file, first_line


# Code that travels with a checkpoint must import inside `try` what may be absent.
try:
    import av
except ImportError:
    av = None


logger = logging.get_logger(__name__)

_PYAV = int(av.__version__.split(".")[0]) if av is not None else 0

# What is refused, so that a small file cannot take all memory; docs/limits.md lists it. An environment variable of the
# same name, or an assignment to this, raises it.
VIDEO_MAX_FRAME_PIXELS = int(os.environ.get("VIDEO_MAX_FRAME_PIXELS", 2**26))  # 8192 x 8192; 8K is half of it

# Codecs whose decoder learns the size of a frame from headers that stand in the stream, or before it.
_IN_STREAM_HEADERS = {"h264", "hevc", "vvc", "mpeg1video", "mpeg2video", "mpeg4", "av1", "libdav1d", "vc1"}
_FRAGMENT = "Put its beginning before it (`cat init.mp4 part1.m4s part2.m4s > whole.mp4`)"


class _EncryptedError(Exception):
    """Raised where the container says that what is to be decoded is encrypted; `open_pyav` names the file."""


# ---------------------------------------------------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def open_pyav(source: str | bytes, name: str):
    """Opens a path or bytes with PyAV, and nothing that the file points to. Yields the container and the stream."""
    try:
        with as_file(source) as file, _open_container(file) as container:
            if container.format.name.endswith("_pipe"):
                raise ValueError(_still_image(source, name, container.format.name))
            stream = _choose_stream(container, name)
            _check_metadata(container, stream)
            codec = stream.codec_context
            if codec.height < 1 or codec.width < 1:
                raise _no_size(source, name, container, stream)
            check_frame_size(codec.height, codec.width, name)
            stream.thread_type = "AUTO"
            codec.thread_count = decoding_threads()
            try:
                yield container, stream
            finally:
                # Its threads then hold no frame. To free a decoder whose threads do, PyAV 17 waits for them with
                # Python's lock, which they may want to let the frame go: a deadlock.
                if codec.is_open:
                    codec.flush_buffers()
    except _EncryptedError:
        raise ValueError(
            f"{name} is encrypted, as its container says. Decrypt the file first, with its owner's key."
        ) from None


def _open_container(file):
    # libav sees bytes alone: neither the file's name nor what stands in a playlist makes it open anything else.
    file.name = "video"
    return av.open(
        file,
        container_options={"protocol_whitelist": "none"},
        options={"max_pixels": str(VIDEO_MAX_FRAME_PIXELS)},
        **({"metadata_errors": "ignore"} if _PYAV < 19 else {}),
    )


def _choose_stream(container, name):
    """The video stream that ffmpeg would take, or, if that holds one picture only, the first that holds more."""
    attached_picture = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if s.codec_context and not s.disposition & attached_picture]
    if not streams:
        found = [_describe_stream(stream, attached_picture) for stream in container.streams]
        hint = ""
        # Of a stream in a codec that is unknown or encrypted PyAV has no context, and so no name.
        if any(s.codec_context is None for s in container.streams.video):
            hint = " If it is encrypted, decrypt it; if its codec is unknown, encode it anew."
        raise ValueError(
            f"{name} has no video stream that can be decoded, only {', '.join(found) or 'nothing at all'}.{hint}"
        )
    streams = [s for s in streams if s.frames != 1] or streams
    best = container.streams.best("video")
    return best if best in streams else streams[0]


def _describe_stream(stream, attached_picture) -> str:
    if stream.type == "video" and stream.disposition & attached_picture:
        return "a cover picture"
    return f"{stream.type} ({stream.codec_context.name if stream.codec_context else 'codec unknown'})"


def _check_metadata(container, stream) -> None:
    """Raises an `_EncryptedError` by what the container says of the whole stream. (In MP4, packets say it.)"""
    formats = {"asf": ("ASF_Protection_Type", "encryption"), "matroska,webm": ("enc_key_id",)}
    said = {**container.metadata, **stream.metadata}
    if any(key in said for key in formats.get(container.format.name, ())):
        raise _EncryptedError


def check_encryption(packet) -> None:
    """Raises an `_EncryptedError` where the container says of a packet that it is encrypted."""
    if packet.has_sidedata("encryption_info"):
        raise _EncryptedError


def check_frame_size(height: int, width: int, name: str) -> None:
    if height * width > VIDEO_MAX_FRAME_PIXELS:
        raise ValueError(
            f"{name} has frames of {width} x {height} pixels, more than {VIDEO_MAX_FRAME_PIXELS} in all. "
            "Shrink the video, or raise VIDEO_MAX_FRAME_PIXELS (an environment variable)."
        )


# ---------------------------------------------------------------------------------------------------------------------
# What is said of files that cannot be read
# ---------------------------------------------------------------------------------------------------------------------


def _still_image(source, name, format) -> str:
    with as_file(source) as file:
        start = file.read(21)
    if start[:4] == b"RIFF" and start[8:16] == b"WEBPVP8X" and start[20] & 2:
        return f"{name} is an animated WebP, which FFmpeg cannot read. Open it with PIL and give its frames as a list."
    return (
        f"{name} is a still image ({format}), but a video was expected. Open images with PIL, say, and give the "
        "frames of each video as a list."
    )


def _no_size(source, name, container, stream) -> ValueError:
    """The error for a stream whose frames have no size: FFmpeg gives none, too, if they are larger than the limit."""
    codec = stream.codec_context
    if container.format.name == "mpegts" and _is_scrambled(source):
        return ValueError(f"{name} is a scrambled (encrypted) transport stream. Descramble it first.")
    if codec.name in _IN_STREAM_HEADERS and not codec.extradata:
        return ValueError(
            f"{name} does not say how large its frames are: the header of its {codec.name} stream is missing, as in a "
            f"fragment of DASH or HLS without its beginning. {_FRAGMENT}, or record from a key frame on."
        )
    return ValueError(
        f"{name} has frames without pixels, or of more than {VIDEO_MAX_FRAME_PIXELS} pixels. Encode it anew, or "
        "raise VIDEO_MAX_FRAME_PIXELS (an environment variable)."
    )


def _is_scrambled(source) -> bool:
    """Whether the first packets of an MPEG transport stream say that their payload is scrambled (ISO/IEC 13818-1)."""
    with as_file(source) as file:
        data = file.read(2**20)
    for size, header in ((188, 0), (192, 4)):  # Blu-ray puts a time before each packet
        packets = [data[place : place + 4] for place in range(header, len(data) - 3, size)]
        if packets and sum(packet[0] == 0x47 for packet in packets) > 0.9 * len(packets):
            return any(packet[0] == 0x47 and packet[3] & 0xC0 for packet in packets)
    return False


def no_video(source: str | bytes, name: str, error) -> ValueError:
    """The error for a file that cannot be decoded, with what the file looks like."""
    with as_file(source) as file:
        start = file.read(48)
    advice = "Copy, download or encode it anew."
    boxes = [box for box, _, _ in top_boxes(source)] if start[4:8] in _MP4_BOXES else []
    if start[:4] == b"\x1f\x43\xb6\x75" or (boxes and b"moov" not in boxes and b"moof" in boxes):
        found, advice = "a fragment, as DASH and HLS serve them, without its beginning", f"{_FRAGMENT}."
    elif b"moov" in boxes and b"mdat" not in boxes and None not in boxes:
        found = "the beginning of a fragmented MP4, without the fragments that hold its frames"
        advice = "Put them behind it (`cat init.mp4 part1.m4s part2.m4s > whole.mp4`)."
    elif boxes:
        found = "an MP4 or MOV file"
        if b"moov" not in boxes or None in boxes:
            found += " that lacks its index (moov) or its end, as if it had been cut short"
    elif all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start):
        found = f"a file that begins with the text {start.decode()!r}"
    else:
        found = f"a file that begins with the bytes {start[:8].hex(' ')}"
    return ValueError(f"{name} cannot be read as a video ({first_line(error)}). It is {found}. {advice}")


_MP4_BOXES = (b"ftyp", b"styp", b"moof", b"sidx", b"emsg", b"prft")


class Progress:
    """Says what takes long: after five seconds, and then every ten."""

    def __init__(self, what: str):
        self.what, self.start = what, time.monotonic()
        self.next = self.start + 5

    def step(self, frames: int) -> None:
        now = time.monotonic()
        if now > self.next:
            self.next = now + 10
            logger.warning(f"{self.what}: {frames} frames in {now - self.start:.0f} s. Ctrl-C stops it.")


# ---------------------------------------------------------------------------------------------------------------------
# Packets, and their index
# ---------------------------------------------------------------------------------------------------------------------


def read_packets(container, *streams):
    """The packets of streams, of which the others are not read; where the file is damaged, those before."""
    for stream in container.streams:  # what is wrong with the others must not end the reading
        stream.discard = av.stream.Discard.default if stream in streams else av.stream.Discard.all
    try:
        yield from container.demux(*streams)
    except (av.FFmpegError, IndexError):  # PyAV 18 stumbles at the end of files where streams begin in the middle
        pass


@dataclass
class Index:
    """
    What the packets of a stream say.

    Args:
        total: the number of frames.
        times: their times of presentation in units of the stream's clock, ascending; `None` where the file does not
            say.
        last_duration: how long the last of them is shown, in the same units; `None` where the file does not say.
        keys: (time of presentation, time of decoding) of the key frames, ascending.
        side_data: (time of decoding, side data) of the packets with which something comes that the decoder needs from
            then on, such as a palette. Who seeks has to bring it along.
    """

    total: int = 0
    times: list[int] | None = field(default_factory=list)
    last_duration: int | None = None
    keys: list[tuple[int, int | None]] = field(default_factory=list)
    side_data: list = field(default_factory=list)


def read_index(container, stream, name: str, end: int | None = None) -> Index:
    """Reads through the file without decoding, to its end or until all is read that is shown before `end`."""
    index = Index()
    times, keys, durations = index.times, index.keys, {}
    begins_frame, kind = frame_counter(stream), _side_data_that_comes_once(container, stream)
    progress = Progress(f"{name} is read through to count its frames")
    for packet in read_packets(container, stream):
        progress.step(len(times))
        dts = packet.dts
        if end is not None and dts is not None and dts >= end:
            break  # what comes is shown later than it is decoded
        # Packets to be discarded are those before the start of an edit list: decoded, but not shown.
        if packet.is_discard and packet.is_keyframe and None not in (packet.pts, dts):
            keys.append((packet.pts, dts))
        if not packet.size or packet.is_discard or (begins_frame is not None and not begins_frame(packet)):
            continue
        times.append(packet.pts)
        durations[packet.pts] = packet.duration
        if packet.is_keyframe:
            keys.append((packet.pts, dts))
        if kind is not None and packet.has_sidedata(kind):
            index.side_data.append((dts, packet.get_sidedata(kind)))
    index.total = len(times)
    # AVI stores no times of presentation: libav makes them up, and wrongly if there are B-frames.
    made_up = container.format.name == "avi" and stream.codec_context.has_b_frames
    if made_up or None in times or len(set(times)) < len(times):
        index.times, index.keys = None, []
    else:
        times.sort()
        index.last_duration = durations[times[-1]] if times else None
        keys.sort(key=lambda key: key[0])
    return index


def read_tables(source, container, stream) -> Index | None:
    """The same of a whole MP4 or MOV by its tables, without reading what they list; `None` where they do not do."""
    if not container.format.name.startswith("mov,") or frame_counter(stream) is not None:
        return None
    moov = whole_index(source)
    samples = None if moov is None else offsets_and_durations(moov, stream.id)
    if samples is None or len(samples) != len(stream.index_entries) or _side_data_that_comes_once(container, stream):
        return None
    index, durations = Index(len(samples)), {}
    for entry, (offset, duration) in zip(stream.index_entries, samples, strict=True):
        if entry.is_discard or not entry.size:
            return None
        index.times.append(entry.timestamp + offset)
        durations[index.times[-1]] = duration
        if entry.is_keyframe:
            index.keys.append((entry.timestamp + offset, entry.timestamp))
    if len(set(index.times)) < len(index.times):
        return None
    index.times.sort()
    index.keys.sort()
    index.last_duration = durations[index.times[-1]]
    return index


def _side_data_that_comes_once(container, stream) -> str | None:
    """
    The kind of side data that a demuxer hands out once, and not anew behind a seek: palettes (AVI, MOV, Matroska) and
    new headers of a codec (FLV, NUT; MOV hands those out whenever they change).
    """
    if stream.codec_context.format is not None and stream.codec_context.format.name == "pal8":
        return "palette"
    return "new_extradata" if container.format.name in ("flv", "nut") else None


def ticks(seconds, stream) -> int:
    """Seconds in units of the stream's clock, rounded up; 0.2 is taken for a fifth, which floating point misses."""
    count = math.ceil(Fraction(seconds).limit_denominator(10**6) / stream.time_base)
    return min(count, 2**62)  # no frame is that late, and libav takes 64 bits


def read_index_of_section(container, stream, name: str, begin: int, end: int | None) -> Index | None:
    """The index from the last key frame that is shown at `begin` or before on; `None` if none is found."""
    if container.format.name == "mpeg":  # behind a seek, libav makes up times of MPEG-PS that are wrong
        return None
    starts = [begin - ticks(seconds_before, stream) for seconds_before in (0, 1, 10, 100)]
    if _side_data_that_comes_once(container, stream) is not None:
        starts = [None]  # from the start of the file: a seek there would lose what comes with the first packet
    for start in starts:  # where seeks go by the time of decoding, or only about, they land too late
        try:
            if start is not None:
                container.seek(start, stream=stream)
        except av.FFmpegError:
            break
        index = read_index(container, stream, name, end)
        first = index.keys[0][0] if index.keys else None
        if first is not None and first <= begin:
            index.times = index.times[bisect_left(index.times, first) :]
            return index
    return None


def frame_rate(stream, times):
    """Frames a second: what the file declares, unless the times of its frames say something else."""
    declared = stream.average_rate
    if not times or len(times) < 2:
        return declared
    measured = (len(times) - 1) / float((times[-1] - times[0]) * stream.time_base)
    return declared if declared and abs(declared / measured - 1) < 0.02 else measured


__all__ = [
    "Index",
    "Progress",
    "check_encryption",
    "check_frame_size",
    "frame_rate",
    "no_video",
    "open_pyav",
    "read_index",
    "read_index_of_section",
    "read_packets",
    "read_tables",
    "ticks",
]
