"""
Odd and damaged files, and what must happen to each: `KINDS`, {name: (write, expected)}.

`write(path)` writes the file, of numbered frames where there are frames. What is expected is

- a list: the numbers of the frames that are shown, in order;
- a string: a regular expression for the message of a `ValueError` that names the file;
- `WHOLE`: frames of the file in their order, each whole, or a `ValueError` that names it.
"""

import json
import struct
import wave
import zipfile
from fractions import Fraction
from functools import partial

import av
import numpy as np
from PIL import Image

from video_files import (
    FILES,
    change_edit_list,
    claim_frames_in_avi,
    numbered_frame,
    numbered_frames,
    truncate,
    write_audio,
    write_video,
)


WHOLE = "whole frames or an error"
ALL = list(range(40))
PYAV = int(av.__version__.split(".")[0])  # 19 reads animated WebP
H265 = {"codec": "libx265", "options": {"x265-params": "log-level=none", "preset": "ultrafast"}}
AV1 = {"codec": "libsvtav1", "options": {"preset": "12"}, "size": (96, 128)}
VP8 = {"codec": "libvpx", "options": {"deadline": "realtime", "cpu-used": "8"}}
VP9 = {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}}
B_FRAMES = {"options": {"bf": "2"}}


def write(path, **options):
    write_video(path, 40, **options)


# ---- whole files: containers, codecs, pixel formats ----

CODECS = {
    "msmpeg4v3.mkv": {"codec": "msmpeg4"},
    "msmpeg4v3.avi": {"codec": "msmpeg4"},
    "msmpeg4v2.avi": {"codec": "msmpeg4v2"},
    "h263p.avi": {"codec": "h263p"},
    "h263.3gp": {"codec": "h263", "size": (96, 128)},
    "h261.avi": {"codec": "h261", "size": (144, 176)},
    "wmv1.asf": {"codec": "wmv1"},
    "wmv2.wmv": {"codec": "wmv2"},
    "flv1.flv": {"codec": "flv"},
    "cinepak.avi": {"codec": "cinepak", "pix_fmt": "rgb24"},
    "cinepak.mov": {"codec": "cinepak", "pix_fmt": "rgb24"},
    "qtrle.mov": {"codec": "qtrle", "pix_fmt": "rgb24"},
    "rpza.mov": {"codec": "rpza", "pix_fmt": "rgb555le"},
    "svq1.mov": {"codec": "svq1", "pix_fmt": "yuv410p"},
    "msvideo1.avi": {"codec": "msvideo1", "pix_fmt": "rgb555le"},
    "rv10.rm": {"codec": "rv10", "size": (96, 128)},
    "rv20.rm": {"codec": "rv20", "size": (96, 128)},
    "snow.avi": {"codec": "snow"},
    "flashsv.flv": {"codec": "flashsv", "pix_fmt": "bgr24"},
    "flashsv2.flv": {"codec": "flashsv2", "pix_fmt": "bgr24"},
    "zmbv.avi": {"codec": "zmbv", "pix_fmt": "bgr0"},
    "zlib.avi": {"codec": "zlib", "pix_fmt": "bgr24"},
    "png.mov": {"codec": "png", "pix_fmt": "rgb24"},
    "apng.apng": {"codec": "apng", "pix_fmt": "rgb24"},
    "huffyuv.avi": {"codec": "huffyuv", "pix_fmt": "rgb24"},
    "utvideo.avi": {"codec": "utvideo"},
    "magicyuv.avi": {"codec": "magicyuv", "pix_fmt": "gbrp"},
    "prores.mov": {"codec": "prores_ks", "pix_fmt": "yuv444p10le"},
    "dnxhr.mov": {"codec": "dnxhd", "pix_fmt": "yuv422p", "options": {"profile": "dnxhr_lb"}, "size": (128, 256)},
    "cineform.mov": {"codec": "cfhd", "pix_fmt": "yuv422p10le"},
    "jpeg2000.mov": {"codec": "jpeg2000", "pix_fmt": "rgb24"},
    "jpegls.avi": {"codec": "jpegls", "pix_fmt": "rgb24"},
    "mjpeg.mkv": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "raw.mjpeg": {"codec": "mjpeg", "pix_fmt": "yuvj420p", "format": "mjpeg"},
    "raw.avi": {"codec": "rawvideo"},
    "raw.nut": {"codec": "rawvideo", "pix_fmt": "rgb24"},
    "y4m.y4m": {"codec": "wrapped_avframe"},
    "v210.mov": {"codec": "v210", "pix_fmt": "yuv422p10le"},
    "asv2.avi": {"codec": "asv2"},
    "dpx.mov": {"codec": "dpx", "pix_fmt": "rgb24"},
    "mpeg1.mpg": {"codec": "mpeg1video", **B_FRAMES},
    "mpeg2.ts": {"codec": "mpeg2video", **B_FRAMES},
    "mpeg2.mxf": {"codec": "mpeg2video"},
    "mpeg2.vob": {"codec": "mpeg2video", "format": "vob"},
    "raw.m2v": {"codec": "mpeg2video", "format": "mpeg2video"},
    "mpeg4.mp4": {"codec": "mpeg4", **B_FRAMES},
    "mpeg4.nut": {"codec": "mpeg4", **B_FRAMES},
    "mpeg4.3gp": {"codec": "mpeg4"},
    "h264.mov": {},
    "h264.nut": {},
    "h264.wtv": {},
    "h264.m2ts": {"format": "mpegts"},
    "h264rgb.mp4": {"codec": "libx264rgb", "pix_fmt": "rgb24"},
    "hevc.ts": H265,
    "hevc.mkv": H265,
    "av1.mp4": AV1,
    "av1.webm": AV1,
    "vp8.webm": VP8,
    "vp8.ivf": VP8,
    "vp8.avi": VP8,
    "vp9.mp4": VP9,
    "vp9_alt_ref.webm": {
        "codec": "libvpx-vp9",
        "options": {"deadline": "good", "cpu-used": "5", "lag-in-frames": "16", "auto-alt-ref": "1"},
    },
    "yuv422.mkv": {"pix_fmt": "yuv422p"},
    "yuv444_10_bit.mkv": {"pix_fmt": "yuv444p10le"},
    "nv12.mkv": {"pix_fmt": "nv12"},
    "full_range.mp4": {"pix_fmt": "yuvj420p"},
    "bgra.mov": {"codec": "qtrle", "pix_fmt": "argb"},
    "yuva.webm": {"codec": "libvpx-vp9", "pix_fmt": "yuva420p", "options": VP9["options"]},
    "float.mkv": {"codec": "ffv1", "pix_fmt": "gbrp16le"},
    "all_intra.mp4": {"gop": 1},
}
KINDS = {name: (partial(write, **options), ALL) for name, options in CODECS.items()}
KINDS |= {f"sixty_{name}": (partial(write_video, frames=60, **FILES[name]), list(range(60))) for name in FILES}

# ---- frames that are no packets, packets that are no frames ----


def copy_packets(source, target, change, format=None):
    """Copies a file packet by packet; `change(packet, i)` changes it, or returns the packets to write instead."""
    with av.open(str(source)) as old, av.open(str(target), "w", format=format) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        count = 0
        for packet in old.demux(video=0):
            if packet.size:
                for written in change(packet, count) or [packet]:
                    written.stream = stream
                    new.mux(written)
                count += 1


def hidden_vp8_frames(path):
    """Key frames only; every third comes a second time, before itself, as a frame that is only referred to."""
    plain = path.with_suffix(".plain.webm")
    write_video(plain, 40, gop=1, **VP8)

    def twice(packet, i):
        packet.pts = packet.dts = 40 * i
        packet.time_base = Fraction(1, 1000)
        if i % 3 == 0:
            data = bytearray(bytes(packet))
            data[0] &= ~0x10
            hidden = av.Packet(bytes(data))
            hidden.pts = hidden.dts = 40 * i - 20 if i else 0
            hidden.time_base, hidden.is_keyframe = Fraction(1, 1000), True
            packet.pts = packet.dts = 40 * i + (1 if i == 0 else 0)
            return [hidden, packet]
        return None

    copy_packets(plain, path, twice)


class H264Writer:
    """H.264 of raw samples (macroblocks of type I_PCM), in which each frame is one picture or two fields."""

    def __init__(self, height, width):
        self.rows, self.columns = height // 16, width // 16

    def write(self, path, frames, is_fields):
        with open(path, "wb") as file:
            number = 0
            for i, frame in enumerate(frames):
                if i % 10 == 0:
                    file.write(self.parameter_sets())
                    number = 0
                luma = (16 + frame.astype(float).mean(-1) * 219 / 255).astype(np.uint8)
                for field in (0, 1) if is_fields(i) else (None,):
                    is_idr = i % 10 == 0 and field in (None, 0)
                    file.write(self.picture(luma if field is None else luma[field::2], number, field, is_idr))
                number = (number + 1) % 16

    def parameter_sets(self):
        sequence = [(8, 77), (8, 0), (8, 30), 0, 0, 2, 1, (1, 0), self.columns - 1, self.rows // 2 - 1]
        sequence += [(1, 0), (1, 0), (1, 1), (1, 0), (1, 0)]
        picture = [0, 0, (1, 0), (1, 0), 0, 0, 0, (1, 0), (2, 0), 0, 0, 0, (1, 1), (1, 0), (1, 0)]
        return self.unit(0x67, self.bits(sequence)) + self.unit(0x68, self.bits(picture))

    def picture(self, luma, number, field, is_idr):
        slice_header = [0, 7, 0, (4, number), (1, int(field is not None))]
        slice_header += [(1, field)] if field is not None else []
        slice_header += [0, (1, 0), (1, 0)] if is_idr else [(1, 0)]
        bits = self.bits([*slice_header, 0, 1], stop=False)
        data = bytearray()
        for row in range(luma.shape[0] // 16):
            for column in range(self.columns):
                bits += self.bits([25], stop=False)
                bits += "0" * (-len(bits) % 8)
                data += int(bits, 2).to_bytes(len(bits) // 8, "big")
                bits = ""
                data += luma[16 * row : 16 * row + 16, 16 * column : 16 * column + 16].tobytes() + bytes([128]) * 128
        return self.unit(0x65 if is_idr else 0x61, data + b"\x80")

    @staticmethod
    def bits(values, stop=True):
        """Numbers as Exp-Golomb codes, pairs (bits, value) as they are."""
        text = ""
        for value in values:
            if isinstance(value, tuple):
                text += f"{value[1]:0{value[0]}b}"
            else:
                code = f"{value + 1:b}"
                text += "0" * (len(code) - 1) + code
        return text + "1" if stop else text

    @staticmethod
    def unit(header, payload):
        if isinstance(payload, str):
            payload += "0" * (-len(payload) % 8)
            payload = int(payload, 2).to_bytes(len(payload) // 8, "big")
        escaped, zeros = bytearray(), 0
        for byte in payload:
            if zeros >= 2 and byte <= 3:
                escaped.append(3)
                zeros = 0
            escaped.append(byte)
            zeros = zeros + 1 if byte == 0 else 0
        return b"\0\0\0\1" + bytes([header]) + bytes(escaped)


def h264_fields(path, is_fields):
    """Frames for which `is_fields(i)` are two pictures, and two packets, of a field each."""
    raw = path.with_suffix(".h264")
    H264Writer(64, 96).write(raw, numbered_frames(40, 64, 96), is_fields)
    if path == raw:
        return
    times = [time for i in range(40) for time in ((40 * i, 40 * i + 20) if is_fields(i) else (40 * i,))]

    def set_times(packet, i):
        packet.time_base = Fraction(1, 1000)
        packet.pts = packet.dts = times[i]

    copy_packets(raw, path, set_times)


def two_streams(path, codec="libx264", picture_first=True, size=(64, 96)):
    """A stream of one picture, number 777, beside the video."""
    with av.open(str(path), "w") as container:
        streams = []
        for is_picture in (picture_first, not picture_first):
            stream = container.add_stream(codec if is_picture else "libx264", rate=25)
            stream.height, stream.width = size if is_picture else (64, 96)
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" and is_picture else "yuv420p"
            streams.append((stream, [777] if is_picture else ALL))
        for stream, numbers in streams:
            for number in numbers:
                frame = numbered_frame(number, stream.height, stream.width)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())


def default_stream(path):
    """Two videos; the second, of numbers from 100 on, is marked as the default."""
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("mpeg4", rate=25) for _ in range(2)]
        for stream in streams:
            stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        streams[0].disposition, streams[1].disposition = 0, av.stream.Disposition.default
        for i in ALL:
            for number, stream in zip((i, 100 + i), streams, strict=True):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered_frame(number), format="rgb24")))
        for stream in streams:
            container.mux(stream.encode())


def flagged(path, are_keys, **options):
    """A file whose every packet is flagged as a key frame, or none."""
    plain = path.with_name(f"plain_{path.name}")
    write_video(plain, 40, **options)

    def flag(packet, i):
        packet.is_keyframe = are_keys

    copy_packets(plain, path, flag)


KINDS |= {
    "hidden_vp8.webm": (hidden_vp8_frames, ALL),
    "hidden_vp8.mkv": (hidden_vp8_frames, ALL),
    "fields_mixed.ts": (partial(h264_fields, is_fields=lambda i: i >= 15), ALL),
    "fields_mixed.mkv": (partial(h264_fields, is_fields=lambda i: i >= 15), ALL),
    "fields_mixed.h264": (partial(h264_fields, is_fields=lambda i: i >= 15), ALL),
    "fields_first.ts": (partial(h264_fields, is_fields=lambda i: i < 25), ALL),
    "fields_all.ts": (partial(h264_fields, is_fields=lambda i: True), ALL),
    "fields_all.mkv": (partial(h264_fields, is_fields=lambda i: True), ALL),
    "fields_none.ts": (partial(h264_fields, is_fields=lambda i: False), ALL),
    "interlaced.mp4": (partial(write, options={"x264-params": "interlaced=1"}), ALL),
    "picture_before.mp4": (two_streams, ALL),
    "picture_before.mkv": (two_streams, ALL),
    "picture_before.ts": (two_streams, ALL),
    "large_picture_before.mp4": (partial(two_streams, size=(320, 480)), ALL),
    "jpeg_before.mp4": (partial(two_streams, codec="mjpeg"), ALL),
    "jpeg_before.mkv": (partial(two_streams, codec="mjpeg"), ALL),
    "picture_after.mp4": (partial(two_streams, picture_first=False), ALL),
    "picture_after.mkv": (partial(two_streams, picture_first=False), ALL),
    "default_second.mkv": (default_stream, [100 + i for i in ALL]),
    "default_second.mp4": (default_stream, [100 + i for i in ALL]),
}
for is_key, suffix in ((True, "all_keys"), (False, "no_keys")):
    KINDS |= {
        f"{suffix}_{name}": (partial(flagged, are_keys=is_key, **options), ALL)
        for name, options in {
            "mpeg4.mp4": {"codec": "mpeg4"},
            "mpeg4.avi": {"codec": "mpeg4"},
            "msmpeg4.avi": {"codec": "msmpeg4"},
            "h263p.avi": {"codec": "h263p"},
            "wmv2.wmv": {"codec": "wmv2"},
            "cinepak.mov": {"codec": "cinepak", "pix_fmt": "rgb24"},
            "qtrle.mov": {"codec": "qtrle", "pix_fmt": "rgb24"},
            "h264.mp4": {},
            "h264.mkv": {},
            "hevc.mkv": H265,
            "vp8.mkv": VP8,
            "snow.mkv": {"codec": "snow"},
        }.items()
    }

# ---- side data ----


def paletted(path, codec="rawvideo", change_at=40):
    """Pictures of 8 bits with a palette, which the container hands out once; from frame `change_at` on another."""
    palettes = np.zeros((2, 256, 4), np.uint8)  # ARGB
    palettes[:, :, 0] = 255
    palettes[:, 1:3, 1:] = np.array([[20, 235], [235, 20]])[..., None]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "pal8"
        for i in ALL:
            bright, changed = numbered_frame(i).mean(-1) > 127, i >= change_at
            frame = av.VideoFrame.from_ndarray(
                (1 + (bright != changed).astype(np.uint8), palettes[int(changed)]), format="pal8"
            )
            frame.pts, frame.time_base = i, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def lcevc_message(path):
    """H.264 with an (empty) layer of LCEVC beside each picture, in a message of ITU-T T.35."""
    payload = bytes([0xB4, 0x00, 0x50, 0x00]) + bytes(8)
    unit = H264Writer.unit(6, bytes([4, len(payload)]) + payload + b"\x80")[4:]

    def add(packet, i):
        changed = av.Packet(len(unit).to_bytes(4, "big") + unit + bytes(packet))
        changed.pts, changed.dts, changed.time_base = packet.pts, packet.dts, packet.time_base
        changed.is_keyframe = packet.is_keyframe
        return [changed]

    copy_packets(_plain(path), path, add)


def headers_change(path):
    """FLV whose second half has another header, which comes once."""
    parts = [path.with_name(f"{quantizer}.flv") for quantizer in (20, 44)]
    for part in parts:
        write_video(part, 40, b_frames=0, gop=10, options={"profile": "baseline", "qp": part.stem})
    with av.open(str(parts[1])) as other, av.open(str(path), "w") as new, av.open(str(parts[0])) as old:
        stream = new.add_stream_from_template(old.streams.video[0])
        header = av.packet.PacketSideData(1, len(other.streams.video[0].codec_context.extradata))  # new extradata
        memoryview(header)[:] = other.streams.video[0].codec_context.extradata
        for i, packets in enumerate(zip(old.demux(video=0), other.demux(video=0), strict=True)):
            packet = packets[i >= 20]
            if i == 20:
                packet.set_sidedata(header)
            if packet.size:
                packet.stream = stream
                new.mux(packet)


KINDS |= {
    "palette.avi": (paletted, ALL),
    "palette.mov": (paletted, ALL),
    "palette_changes.avi": (partial(paletted, change_at=20), ALL),
    "palette_msrle.avi": (partial(paletted, codec="msrle"), ALL),
    "palette_smc.mov": (partial(paletted, codec="smc"), ALL),
    "palette_png.nut": (partial(paletted, codec="png"), ALL),
    "lcevc.mp4": (lcevc_message, ALL),
    "headers_change.flv": (headers_change, ALL),
}

# ---- what decoders other than PyAV get wrong ----


def mirrored(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        stream.set_display_rotation(90, hflip=True)
        for i in ALL:
            frame = np.ascontiguousarray(np.rot90(numbered_frame(i, 96, 64)[:, ::-1], -1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def edit_list(path, change):
    write_video(path, 40, gop=10, b_frames=0)
    change_edit_list(path, change)


NEGATIVE = {"container_options": {"movflags": "negative_cts_offsets"}}
KINDS |= {
    "mirrored_and_turned.mp4": (mirrored, ALL),
    "edit_list_cuts_the_end.mp4": (partial(edit_list, change=lambda duration, begin: (800, begin)), ALL[:20]),
    "edit_list_cuts_the_beginning.mp4": (
        partial(edit_list, change=lambda duration, begin: (duration, begin + 10 * 512)),
        ALL[10:],
    ),
    "negative_offsets.mp4": (partial(write, **NEGATIVE), ALL),
    "ten_bits.mp4": (partial(write, pix_fmt="yuv420p10le"), ALL),
    "interlaced_and_cropped.mp4": (partial(write, size=(72, 96), options={"x264-params": "interlaced=1"}), ALL),
}

# ---- times ----


def shifted(path, change, **options):
    plain = path.with_name(f"plain_{path.name}")
    write_video(plain, 40, **options)

    def shift(packet, i):
        packet.pts, packet.dts = change(packet.pts, i), change(packet.dts, i)

    copy_packets(plain, path, shift)


def join(path, *parts):
    path.write_bytes(b"".join(part for part in parts))


def encoded(path, frames=40, **options) -> bytes:
    plain = path.with_name(f"plain_{path.name}")
    write_video(plain, frames, **options)
    return plain.read_bytes()


def sound_begins_later(path):
    """A recording in which sound begins behind what libav looks at when it opens the file, and before its end."""
    rng = np.random.default_rng(0)
    options = {"codec": "mpeg2video", "gop": 1, "options": {"qmin": "1", "qmax": "1"}}
    parts = []
    for numbers in (ALL[:24], ALL[24:30], ALL[30:]):
        sound = numbers[0] == 24
        frames = [numbered_frame(i, 400, 560).astype(int) for i in numbers]
        noise = 0 if sound else 90  # makes the other parts large
        frames = [np.clip(frame + rng.integers(-noise, noise + 1, frame.shape), 0, 255) for frame in frames]
        at = {"output_ts_offset": str(numbers[0] / 25)}
        parts.append(encoded(path, [f.astype(np.uint8) for f in frames], audio=sound, container_options=at, **options))
    join(path, *parts)


KINDS |= {
    "clock_wraps.ts": (partial(shifted, change=lambda pts, i: pts + 2**33 - 70000), ALL),
    "late.ts": (partial(shifted, change=lambda pts, i: pts + 90000 * 3600), ALL),
    "gap.ts": (partial(shifted, change=lambda pts, i: pts + (90000 * 20 if i > 20 else 0), b_frames=0), ALL),
    "gap.mkv": (partial(shifted, change=lambda pts, i: pts + (9000 if i > 20 else 0), b_frames=0), ALL),
    "slow.mkv": (partial(write, pts=[100_000 * i for i in ALL], b_frames=0), ALL),
    "slow.mp4": (partial(write, pts=[100_000 * i for i in ALL], b_frames=0), ALL),
    "fast.mp4": (partial(write, pts=ALL, b_frames=0), ALL),
    "cut_off_beginning.mp4": (
        partial(
            write,
            gop=100,
            pts=[40 * i - 200 for i in ALL],
            container_options={"avoid_negative_ts": "disabled"},
        ),
        ALL[5:],
    ),
    "sound_begins_later.ts": (sound_begins_later, WHOLE),
    "joined.ts": (lambda path: join(path, encoded(path), encoded(path)), WHOLE),
    "two_frames.mp4": (partial(write_video, frames=2), [0, 1]),
    "one_frame.mkv": (partial(write_video, frames=1), [0]),
    "one_frame.gif": (partial(write_video, frames=1, codec="gif", pix_fmt="rgb8"), [0]),
}

# ---- colours ----


def colour_matrix(path, matrix):
    # PyAV 19's `frame.reformat` shares one that has threads, for which a forked process would wait.
    reformatter = av.video.reformatter.VideoReformatter()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv444p"
        stream.codec_context.colorspace = matrix
        for i in ALL:
            frame = av.VideoFrame.from_ndarray(numbered_frame(i), format="rgb24")
            frame = reformatter.reformat(frame, format="yuv444p", threads=1)
            frame.colorspace = matrix
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


KINDS |= {f"colours_{i}.mkv": (partial(colour_matrix, matrix=i), ALL) for i in (1, 2, 4, 5, 6, 7, 9)}
KINDS |= {f"colours_{i}.mkv": (partial(colour_matrix, matrix=i), "colour matrix") for i in (8, 10, 11, 12, 13, 14)}

# ---- sizes ----


def huge_gif(path, size=(16000, 16000)):
    """A GIF that says it is as large as `size`, and has a picture of one pixel."""
    header = b"GIF89a" + struct.pack("<HH", *size) + b"\x80\0\0" + bytes(6)
    picture = b"\x2c" + struct.pack("<HHHH", 0, 0, 1, 1) + b"\0\x02\x02\x44\x01\0"
    path.write_bytes(header + picture * 3 + b"\x3b")


def patched(path, write, change):
    write(path)
    path.write_bytes(change(path.read_bytes()))


def no_size(data: bytes) -> bytes:
    """An MP4 whose track header and sample entry say 0 x 0."""
    entry = data.index(b"mp4v")
    return data[: entry + 28] + bytes(4) + data[entry + 32 :]


KINDS |= {
    "huge.gif": (huge_gif, "more than 67108864 pixels.*raise VIDEO_MAX_FRAME_PIXELS"),
    "largest.gif": (partial(huge_gif, size=(65535, 65535)), WHOLE),
    "wide.mkv": (partial(write_video, frames=4, size=(2, 16384), codec="ffv1", gop=1), ALL[:4]),
    "wide.mov": (partial(write_video, frames=4, size=(2, 65535), codec="png", pix_fmt="rgb24"), ALL[:4]),
    "tall.mkv": (partial(write_video, frames=4, size=(8192, 66), codec="ffv1", gop=1), ALL[:4]),
    "row.mkv": (partial(write_video, frames=4, size=(1, 96), codec="ffv1", gop=1, pix_fmt="bgr0"), ALL[:4]),
    "pixel.mkv": (lambda path: write_video(path, [np.zeros((1, 1, 3), np.uint8)] * 9, codec="ffv1"), [0] * 9),
    "odd.mkv": (partial(write, size=(97, 131), codec="ffv1", pix_fmt="yuv444p"), ALL),
    "no_size.mp4": (partial(patched, write=partial(write, codec="mpeg4"), change=no_size), ALL),
    "size_changes.ts": (
        lambda path: join(path, encoded(path), encoded(path, size=(48, 80))),
        "changes its frame size",
    ),
}

# ---- damage ----

DAMAGED = {
    "mp4": {"container_options": {"movflags": "faststart"}},
    "mkv": {},
    "ts": {},
    "avi": {"codec": "mpeg4"},
    "flv": {},
    "mpg": {"codec": "mpeg2video"},
    "webm": VP9,
    "gif": {"codec": "gif", "pix_fmt": "rgb8"},
}


def cut(path, keep, **options):
    plain = path.with_name(f"plain_{path.name}")
    write_video(plain, 40, **options)
    truncate(plain, path, keep)


def another_track_ends(path):
    """An MP4 whose sound, of the same time as the video, stands behind it and is cut off."""
    video, sound, plain = (path.with_name(name) for name in ("video.mp4", "sound.m4a", f"plain_{path.name}"))
    write_video(video, 40, b_frames=0)
    write_audio(sound)
    with (
        av.open(str(video)) as first,
        av.open(str(sound)) as second,
        av.open(str(plain), "w", options={"movflags": "faststart"}) as new,
    ):
        streams = [new.add_stream_from_template(old.streams[0]) for old in (first, second)]
        for old, stream in zip((first, second), streams, strict=True):
            for packet in old.demux(old.streams[0]):
                if packet.size:
                    shift = 0 if old is first else int(2 / packet.time_base)  # behind the video, by an edit list
                    packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, stream
                    new.mux(packet)
    data = plain.read_bytes().replace(b"edts", b"free")
    with av.open(str(plain)) as container:
        path.write_bytes(data[: min(packet.pos for packet in container.demux(audio=0) if packet.size)])


def damaged_pictures(path):
    """MPEG-4 of key frames alone; of every tenth the last bytes are missing, which the decoder reports."""
    plain = path.with_name(f"plain_{path.name}")
    write_video(plain, 40, codec="mpeg4", gop=1)

    def damage(packet, i):
        if i % 10 != 9:
            return None
        damaged = av.Packet(bytes(packet)[: -packet.size // 4] + bytes(packet.size // 4))
        damaged.pts, damaged.dts, damaged.time_base = packet.pts, packet.dts, packet.time_base
        damaged.is_keyframe = True
        return [damaged]

    copy_packets(plain, path, damage)


def overwritten(path, where, **options):
    plain = path.with_name(f"plain_{path.name}")
    write_video(plain, 40, **options)
    data = bytearray(plain.read_bytes())
    start = int(where * len(data))
    data[start : start + len(data) // 10] = np.random.default_rng(0).bytes(len(data) // 10)
    path.write_bytes(data)


for extension, options in DAMAGED.items():
    for keep in (0.1, 0.5, 0.9):
        KINDS[f"cut_at_{keep}.{extension}"] = (partial(cut, keep=keep, **options), WHOLE)
    for where in (0.0, 0.45, 0.85):
        KINDS[f"noise_at_{where}.{extension}"] = (partial(overwritten, where=where, **options), WHOLE)
KINDS |= {
    "noise_behind.mp4": (lambda path: join(path, encoded(path), np.random.default_rng(0).bytes(5000)), ALL),
    "noise_before.ts": (lambda path: join(path, np.random.default_rng(0).bytes(1000), encoded(path)), WHOLE),
    "zeros_before.mp4": (lambda path: join(path, bytes(1000), encoded(path)), WHOLE),
    "another_track_ends.mp4": (another_track_ends, ALL),
    "damaged_pictures.mkv": (damaged_pictures, ALL),
    "no_index.mp4": (partial(cut, keep=0.5), "lacks its index"),
    "claims_more.avi": (lambda path: claim_frames_in_avi(_plain(path, codec="mpeg4"), path, 4000), ALL),
    "claims_less.avi": (lambda path: claim_frames_in_avi(_plain(path, codec="mpeg4"), path, 4), ALL),
    "claims_2_to_the_32.avi": (lambda path: claim_frames_in_avi(_plain(path, codec="mpeg4"), path, 2**32 - 1), ALL),
}


def _plain(path, **options):
    return write_video(path.with_name(f"plain_{path.name}"), 40, **options)


def replaced(path, old, new, **options):
    path.write_bytes(encoded(path, **options).replace(old, new))


# ---- encrypted files, fragments ----

KEY = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "0123456789abcdef" * 2, "encryption_kid": "f" * 32}


def encrypted_webm(path):
    """WebM whose track says that it is encrypted, in the place of its title. (EBML; the payload stays as it was.)"""
    title = b"x" * 32
    content = bytes.fromhex("5033 8101 5035 93 47e1 8105 47e2 8c") + b"0123456789ab"  # type, algorithm, key
    content = bytes.fromhex("6240") + bytes([0x80 | len(content)]) + content
    content += b"\xec" + bytes([0x80 | (len(title) - len(content) - 2)]) + bytes(len(title) - len(content) - 2)  # void
    replaced(path, b"\x53\x6e\xa0" + title, b"\x6d\x80\xa0" + content, title=title.decode(), **VP8)


def protected_wmv(path):
    """WMV whose list of further descriptions is one of further encryption."""
    names = (bytes.fromhex("40a4d0d207e3d21197f000a0c95ea850"), bytes.fromhex("14e68a292226174cb935dae07ee9289c"))
    replaced(path, *names, codec="wmv2", title="t")


def scrambled_ts(path):
    """A transport stream whose packets of video say that they are scrambled, as they are."""
    data, rng = bytearray(encoded(path)), np.random.default_rng(0)
    for place in range(0, len(data), 188):
        if data[place + 1] & 0x1F == 1 and data[place + 2] == 0:
            start = 4 + (data[place + 3] & 0x20 and 1 + data[place + 4])
            data[place + 3] |= 0x80
            data[place + start : place + 188] = rng.bytes(188 - start)
    path.write_bytes(data)


def headerless_ts(path):
    """A part of H.264 without its parameter sets: a segment of HLS that needs the one before."""

    def strip(packet, i):
        units = bytes(packet).split(b"\0\0\1")
        stripped = av.Packet(b"\0\0\1".join(unit for unit in units if not unit or unit[0] & 31 not in (7, 8)))
        stripped.pts, stripped.dts, stripped.time_base = packet.pts, packet.dts, packet.time_base
        return [stripped]

    raw = path.with_suffix(".h264")
    write_video(raw, 40, b_frames=0, options={"x264-params": "repeat-headers=1"}, format="h264")
    copy_packets(raw, path, strip)


def fragments(path, part):
    """The beginning of a fragmented file, or what comes behind it."""
    options = {"movflags": "frag_keyframe+empty_moov"}
    mark = b"moof" if path.suffix == ".mp4" else b"\x1f\x43\xb6\x75"
    data = encoded(path, container_options=options) if path.suffix == ".mp4" else encoded(path, **VP8)
    place = data.index(mark) - 4 * (mark == b"moof")
    path.write_bytes(data[:place] if part == "beginning" else data[place:])


ENCRYPTED = "is encrypted, as its container says"
KINDS |= {
    "encrypted_h264.mp4": (partial(write, container_options=KEY), ENCRYPTED),
    "encrypted_fragments.mp4": (
        partial(write, container_options={**KEY, "movflags": "frag_keyframe+empty_moov"}),
        ENCRYPTED,
    ),
    "encrypted_hevc.mp4": (partial(write, container_options=KEY, **H265), ENCRYPTED),
    "encrypted.webm": (encrypted_webm, ENCRYPTED),
    "protected.wmv": (protected_wmv, ENCRYPTED),
    "scrambled.ts": (scrambled_ts, "a scrambled"),
    "headerless.ts": (headerless_ts, "header of its h264 stream is missing"),
    "fragments.mp4": (partial(fragments, part="rest"), "without its beginning.*Put its beginning before it"),
    "fragments.webm": (partial(fragments, part="rest"), "without its beginning.*Put its beginning before it"),
    "beginning.mp4": (partial(fragments, part="beginning"), "without the fragments.*Put them behind it"),
}

# ---- no video at all ----


def text(path, content):
    path.write_text(content)


def picture(path, format, frames=1):
    images = [Image.fromarray(frame) for frame in numbered_frames(frames)]
    images[0].save(path, format, **({"save_all": True, "append_images": images[1:]} if frames > 1 else {}))


def sound(path):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(8000)
        file.writeframes(bytes(8000))


def archive(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("clip.mp4", encoded(path.with_suffix(".mp4")))


PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n"
TEXTS = {
    "playlist.m3u8": PLAYLIST.format("other.mp4"),
    "playlist_of_url.mp4": PLAYLIST.format("http://127.0.0.1:9/clip.mp4"),
    "playlist_of_file.mp4": PLAYLIST.format("file:///etc/passwd"),
    "concat.mp4": "ffconcat version 1.0\nfile other.mp4\n",
    "session.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    "manifest.mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period/></MPD>',
    "captions.srt": "1\n00:00:00,000 --> 00:00:01,000\nhello\n",
    "captions.vtt": "WEBVTT\n\n00:00.000 --> 00:01.000\nhello\n",
    "captions.ass": "[Script Info]\nScriptType: v4.00+\n\n[Events]\nDialogue: 0,0:00:00.00,0:00:01.00,x,,0,0,0,,hi\n",
    "page.html": "<!doctype html><title>404</title>",
    "data.json": json.dumps({"a": 1}),
    "notes.txt": "not a video at all\n" * 40,
}
KINDS |= {name: (partial(text, content=content), "cannot be read|no video stream") for name, content in TEXTS.items()}
KINDS |= {
    "empty.mp4": (lambda path: path.write_bytes(b""), "is empty"),
    "zeros.mp4": (lambda path: path.write_bytes(bytes(9999)), "cannot be read"),
    "noise.mp4": (lambda path: path.write_bytes(np.random.default_rng(0).bytes(9999)), "cannot be read"),
    "archive.zip": (archive, "cannot be read"),
    "still.jpg": (partial(picture, format="jpeg"), "still image"),
    "still.png": (partial(picture, format="png"), "still image"),
    "still.bmp": (partial(picture, format="bmp"), "still image"),
    "still.tiff": (partial(picture, format="tiff"), "still image"),
    "still.webp": (partial(picture, format="webp"), "still image"),
    "animated.webp": (partial(picture, format="webp", frames=9), list(range(9)) if PYAV >= 19 else "animated WebP"),
    "sound.wav": (sound, "no video stream"),
    "sound.m4a": (write_audio, "no video stream"),
    "sound_with_cover.mp4": (partial(write_audio, cover=numbered_frame(0)), r"only audio \(aac\), a cover picture.$"),
    "unknown_codec.mkv": (partial(replaced, old=b"V_MPEG4/ISO/AVC", new=b"V_MPEG4/ISO/XYZ"), "codec unknown"),
    "unknown_codec.mp4": (partial(replaced, old=b"mp4v", new=b"zzzz", codec="mpeg4"), WHOLE),
    "encrypted.mp4": (partial(replaced, old=b"avc1", new=b"encv"), WHOLE),
}

# What the default run leaves out: the same in other containers, and what test_video_decoding.py has as well.
QUICK_CODECS = {
    "h263p.avi",
    "cinepak.avi",
    "qtrle.mov",
    "rpza.mov",
    "flashsv.flv",
    "apng.apng",
    "raw.mjpeg",
    "raw.nut",
}
QUICK_CODECS |= {
    "mpeg2.ts",
    "mpeg4.nut",
    "h264rgb.mp4",
    "hevc.ts",
    "av1.mp4",
    "vp8.avi",
    "vp9_alt_ref.webm",
    "yuva.webm",
}
SLOW = {
    name for name in KINDS if name.startswith(("sixty_", "noise_at_0.8", "cut_at_0.9", "cut_at_0.1", "noise_at_0.0"))
}
SLOW |= set(CODECS) - QUICK_CODECS
SLOW |= {f"colours_{i}.mkv" for i in (2, 4, 5, 6, 11, 12, 13)}
SLOW |= {
    f"no_keys_{name}" for name in ("mpeg4.mp4", "mpeg4.avi", "msmpeg4.avi", "wmv2.wmv", "cinepak.mov", "qtrle.mov")
}
SLOW |= {
    "all_keys_mpeg4.avi",
    "all_keys_cinepak.mov",
    "all_keys_h264.mp4",
    "fields_none.ts",
    "large_picture_before.mp4",
}
