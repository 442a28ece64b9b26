"""Packets in, frames out: the packet decoder, the colour converter, and the clip that the frames are put into."""

import itertools
import os
from bisect import bisect_right
from fractions import Fraction

import numpy as np
import torch

from .video_demuxer import check_encryption, read_packets
from .video_packets import disposable_test
from .video_sources import first_line


# Code that travels with a checkpoint must import inside `try` what may be absent.
try:
    import av
except ImportError:
    av = None


# What is refused, so that a small file cannot take all memory; docs/limits.md lists it. An environment variable of the
# same name, or an assignment to this, raises it.
VIDEO_MAX_CLIP_BYTES = int(os.environ.get("VIDEO_MAX_CLIP_BYTES", 2**32))  # of all frames that one call returns


def decoded_frames(container, stream, packets=None):
    """
    The frames of `packets`, without damaged ones, in the order in which they are shown; of all packets from where the
    container stands if none are given.
    """
    # At the end, None makes the decoder give out what it holds back.
    for packet in itertools.chain(read_packets(container, stream) if packets is None else packets, [None]):
        if packet is not None:
            check_encryption(packet)
        try:
            frames = stream.decode(packet)
        except av.FFmpegError:
            continue
        yield from frames


def needed_packets(container, stream, side_data, times, wanted, dropped: set | None):
    """
    The packets that have to be decoded for some frames, from where the container stands, which is a key frame.

    Args:
        side_data: that of an `Index`: what came with packets before those that are read now is given to the first.
        times: the times of presentation of the frames from here to the last that is wanted. After their packets, none
            is decoded any more, so that the container has to be searched anew after this.
        wanted: those of the wanted ones among them.
        dropped: the times of packets that are left out, as no other frame needs them, are put here; `None`: none are.
    """
    times, is_disposable = set(times), disposable_test(stream) if dropped is not None else None
    packets = read_packets(container, stream)
    if side_data:
        packets = _bring_along(packets, side_data)
    for packet in packets:
        if is_disposable is not None and packet.pts not in wanted and packet.size and is_disposable(packet):
            dropped.add(packet.pts)
        else:
            yield packet
        times.discard(packet.pts)
        if not times:
            yield from itertools.islice(packets, 1)  # it may be the second field of the last
            return


def _bring_along(packets, side_data):
    """Gives the first packet what came last before it, if it does not come with something itself."""
    first = next(packets, None)
    if first is None:
        return
    if first.dts is not None:
        place = bisect_right([dts for dts, _ in side_data], first.dts)
        if place > 0 and not first.has_sidedata(side_data[place - 1][1].data_type):
            first.set_sidedata(side_data[place - 1][1])
    yield first
    yield from packets


class ToRGB:
    """
    Decoded frames to (H, W, 3) uint8, upright.

    One thread converts, and only one frame is asked for its side data: a frame that has been asked stays in memory
    until the garbage collector comes, with what converted it. Where that had threads, a worker forked meanwhile, whose
    collector comes first, would wait for threads that it does not have, for ever.
    """

    def __init__(self, name: str):
        self.name, self.matrix = name, None
        self.reformatter = av.video.reformatter.VideoReformatter()

    def __call__(self, frame) -> np.ndarray:
        try:
            pixels = self.reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        except av.FFmpegError as error:
            raise ValueError(
                f"{self.name} has colours that FFmpeg cannot convert to RGB ({first_line(error)}: pixel format "
                f"{frame.format.name}, colour matrix {int(frame.colorspace)} of ITU-T H.273). Encode it in BT.709."
            ) from error
        if self.matrix is None:
            self.matrix = bytes(_side_data(frame).get("DISPLAYMATRIX") or b"")
        if not self.matrix:
            return pixels
        # A point (x, y) of the frame is shown at (a x + c y, b x + d y), y downwards: to the nearest quarter turn.
        a, b, _, c, d = np.frombuffer(self.matrix, np.int32)[:5]
        if abs(b) > abs(a):
            pixels, a, d = pixels.transpose(1, 0, 2), c, b
        return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def _side_data(frame):
    try:
        return frame.side_data
    except ValueError:  # PyAV 18 has no names for what is newer, such as views of MV-HEVC and layers of LCEVC
        return _without_unnamed_side_data(frame).side_data


def _without_unnamed_side_data(frame):
    """The frame behind a chain of filters, each of which takes away side data of a number that PyAV does not name."""
    graph = av.filter.Graph()
    graph.threads = 1
    nodes = [
        graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1)
        )
    ]
    for number in set(range(64)) - {kind.value for kind in av.sidedata.sidedata.Type}:
        nodes.append(graph.add("sidedata", f"mode=delete:type={number}"))
    graph.link_nodes(*nodes, graph.add("buffersink")).configure()
    graph.push(frame)
    return graph.pull()


class Clip:
    """
    The frames of one clip, transformed one by one into one tensor, which `empty` makes of (T, H, W, C) if it is given.
    `shape` is (height, width) of a decoded one.
    """

    def __init__(self, indices: np.ndarray, name: str, transform, empty=None):
        self.name, self.transform, self.empty, self.frames, self.shape = name, transform, empty, None, None
        self.damaged = set()  # indices
        self.places = {}  # {index of a frame: where it goes}
        for place, index in enumerate(indices.tolist()):
            self.places.setdefault(index, []).append(place)
        self.last, self.count = max(self.places), len(indices)

    def put(self, index: int, pixels: np.ndarray, damaged: bool = False) -> None:
        """`pixels`: (H, W, 3) uint8 of frame `index`, which is one of those wanted; a decoder may call it damaged."""
        (self.damaged.add if damaged else self.damaged.discard)(index)
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
            shape = (self.count, height, width, channels)
            self.frames = (frame.new_empty(shape) if self.empty is None else self.empty(shape)).permute(0, 3, 1, 2)
        for place in self.places[index]:
            self.frames[place] = frame


__all__ = ["Clip", "ToRGB", "decoded_frames", "needed_packets"]
