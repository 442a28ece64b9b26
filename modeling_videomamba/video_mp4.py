"""What an MP4 or MOV file says of itself (ISO/IEC 14496-12): whether it is whole, and what is odd about its video."""

import os
from itertools import accumulate

from .video_packets import H264FieldCounter
from .video_sources import as_file


_QUARTER_TURNS = {(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)}
_SAMPLE_ENTRY, _VISUAL_SAMPLE_ENTRY = 8, 86  # bytes of `stsd` before its entries, of a video's entry before its boxes


def top_boxes(source: str | bytes):
    """
    Yields (type, position, length) of each box of a file that begins as MP4 and MOV files do. The last one's type is
    None where the file ends before the box does, or where what follows is no box.
    """
    position = 0
    with as_file(source) as file:
        size = file.seek(0, os.SEEK_END)
        while position < size:
            file.seek(position)
            header = file.read(16)
            length, box = int.from_bytes(header[:4], "big"), header[4:8]
            length = {0: size - position, 1: int.from_bytes(header[8:], "big")}.get(length, length)
            if length < 8 or position + length > size:
                yield None, position, 0
                return
            yield box, position, length
            position += length


def whole_index(source: str | bytes) -> bytes | None:
    """The index (the payload of `moov`) of an MP4 or MOV file that is whole and not fragmented; None of others."""
    index = None
    for i, (box, position, length) in enumerate(top_boxes(source)):
        if box in (None, b"moof") or (i == 0 and box != b"ftyp"):
            return None
        if box == b"moov":
            with as_file(source) as file:
                file.seek(position)
                index = file.read(length)[8:]
    return index


def what_is_odd(index: bytes, codecs) -> str | None:
    """
    What keeps torchcodec 0.17 or decord 0.6 from returning the frames that ffmpeg shows: damage apart, they do where
    this returns None. `codecs`: the sample entries of those that the decoder reads well.
    """
    tracks = list(_video_tracks(index))
    if len(tracks) != 1:
        return "several video tracks, or none"
    table = _first(tracks[0], b"mdia", b"minf", b"stbl")
    if not _number(_first(table, b"stss"), 4):  # without this table, every frame is said to be a key frame
        return "no table of key frames"
    for check in (
        _odd_codec(_first(table, b"stsd"), codecs),
        _odd_turn(index, tracks[0]),
        _odd_times(index, tracks[0]),
    ):
        if check:
            return check
    return None


def _odd_codec(entries: bytes, codecs) -> str | None:
    codec, entry = entries[_SAMPLE_ENTRY + 4 : _SAMPLE_ENTRY + 8], entries[_SAMPLE_ENTRY + _VISUAL_SAMPLE_ENTRY :]
    if codec not in codecs or _number(entries, 4) != 1:
        return f"a codec other than {', '.join(codec.decode() for codec in codecs)}, or several"
    height, width = (_number(entries, _SAMPLE_ENTRY + place, 2) for place in (34, 32))
    avc, hevc, av1, vp9 = (_first(entry, box) for box in (b"avcC", b"hvcC", b"av1C", b"vpcC"))
    if height % 2 or width % 2 or _first(entry, b"clap") or _first(entry, b"lhvC"):
        return "odd sides, a clean aperture or several views"
    deep = (
        (avc and avc[1] not in (66, 77, 88, 100))  # the profiles of 8 bits and 4:2:0
        or (hevc and (hevc[16] & 3 != 1 or (hevc[17] | hevc[18]) & 7))
        or (av1 and (av1[2] & 0x40 or av1[2] & 0x0C != 0x0C))
        or (vp9 and (vp9[6] >> 4 != 8 or vp9[6] >> 1 & 7 > 1))
    )
    if deep or not (avc or hevc or av1 or vp9):
        return "more than 8 bits, or colours other than 4:2:0"
    if (avc and H264FieldCounter(avc).needed) or (hevc and hevc[6] & 0xC0 != 0x80):
        return "fields, or frames that are not marked as progressive"
    return None


def _odd_turn(index: bytes, track: bytes) -> str | None:
    for box, place in ((_first(index, b"mvhd"), 36), (_first(track, b"tkhd"), 40)):
        if box:
            place += 12 * (box[0] == 1)
            turn = [_number(box, place + 4 * i, signed=True) / 65536 for i in (0, 1, 3, 4)]
            if tuple(turn) not in (_QUARTER_TURNS if place in (40, 52) else {(1, 0, 0, 1)}):
                return "a display matrix that is more than a quarter turn"
    return None


def _odd_times(index: bytes, track: bytes) -> str | None:
    """An edit list that cuts or delays, or times of presentation before those of decoding."""
    table = _first(track, b"mdia", b"minf", b"stbl")
    durations = _runs(_first(table, b"stts"))
    offsets = _runs(_first(table, b"ctts")) or [0] * len(durations)
    if not offsets or len(offsets) != len(durations) or max(offsets) >= 2**31:
        return "negative composition offsets"
    edits = _first(track, b"edts", b"elst")
    if not edits:
        return None
    long = 8 if edits[0] == 1 else 4
    begin = _number(edits, 8 + long, long, signed=True)
    duration, timescales = _number(edits, 8, long), []
    for box in (_first(track, b"mdia", b"mdhd"), _first(index, b"mvhd")):
        timescales.append(_number(box, 20 if box[:1] == b"\1" else 12))
    shown = _shown(table)
    end = begin + duration * timescales[0] / max(1, timescales[1])
    if _number(edits, 4) != 1 or begin != min(shown) or (duration and end <= max(shown)):
        return "an edit list that cuts, delays or repeats"
    return None


def _shown(table: bytes) -> list[int]:
    """When the frames of a table of samples are shown, in the order of decoding and in units of the track's clock."""
    durations = _runs(_first(table, b"stts"))
    offsets = _runs(_first(table, b"ctts")) or [0] * len(durations)
    return [time + offset for time, offset in zip(accumulate(durations, initial=0), offsets, strict=False)]


def times_of_frames(index: bytes) -> tuple[list[int], int | None, float]:
    """
    When the frames of the video track are shown, of a file about which nothing is odd.

    Returns: the times, ascending; how long the last frame is shown; and the seconds that are the unit of both.
    """
    track = next(_video_tracks(index))
    table = _first(track, b"mdia", b"minf", b"stbl")
    header = _first(track, b"mdia", b"mdhd")
    timed = sorted(zip(_shown(table), _runs(_first(table, b"stts")), strict=True))
    clock = 1 / max(1, _number(header, 20 if header[:1] == b"\1" else 12))
    return [time for time, _ in timed], timed[-1][1] if timed else None, clock


def _video_tracks(index: bytes):
    return (track for track in _children(index, b"trak") if _first(track, b"mdia", b"hdlr")[8:12] == b"vide")


def offsets_and_durations(index: bytes, number: int) -> list[tuple[int, int]] | None:
    """
    How much later than decoded each frame of a track is shown, and how long the decoder has for it, in units of its
    clock; `None` where that does not tell when it is shown.
    """
    for track in _children(index, b"trak"):
        header = _first(track, b"tkhd")
        if _number(header, 20 if header[:1] == b"\1" else 12) == number:
            table = _first(track, b"mdia", b"minf", b"stbl")
            if _odd_times(index, track):
                return None
            durations = _runs(_first(table, b"stts"))
            return list(zip(_runs(_first(table, b"ctts")) or [0] * len(durations), durations, strict=True))
    return None


def _runs(box: bytes) -> list[int]:
    """The values of a table of runs, (count, value) each, one for each frame."""
    values = []
    for place in range(8, min(len(box), 8 + 8 * _number(box, 4)), 8):
        values += [_number(box, place + 4)] * min(_number(box, place), 2**24)
    return values


def _children(data: bytes, wanted: bytes):
    """The payloads of the boxes of a type."""
    position = 0
    while position + 8 <= len(data):
        length = _number(data, position)
        if length < 8:
            return
        if data[position + 4 : position + 8] == wanted:
            yield data[position + 8 : position + length]
        position += length


def _first(data: bytes, *path) -> bytes:
    """The payload of the first box at the end of a path of types; empty if there is none."""
    for box in path:
        data = next(_children(data, box), b"")
    return data


def _number(data: bytes, place: int, length: int = 4, signed: bool = False) -> int:
    return int.from_bytes(data[place : place + length], "big", signed=signed)


__all__ = ["offsets_and_durations", "times_of_frames", "top_boxes", "what_is_odd", "whole_index"]
