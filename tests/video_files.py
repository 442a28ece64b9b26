"""Small test videos, written with PyAV, in which every frame carries its own number.

The number is drawn as ten black or white blocks over the full height of the frame, so that it survives lossy
compression, odd sizes, chroma subsampling and grey formats: a test reads from the pixels alone which frame it got.
"""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


BITS = 10


def numbered_frame(number: int, height: int = 64, width: int = 96) -> np.ndarray:
    """(height, width, 3) uint8 RGB: bit k of `number` as the brightness of the k-th of ten vertical bars.

    The upper left eighth is red and the lower left eighth blue, which tells every rotation and mirroring apart.
    """
    frame = np.empty((height, width, 3), np.uint8)
    edges = np.linspace(width // 8, width, BITS + 1).astype(int)
    for bit in range(BITS):
        frame[:, edges[bit] : edges[bit + 1]] = 235 if number >> bit & 1 else 20
    frame[:, : width // 8] = 128
    frame[: height // 2, : width // 8] = (200, 30, 30)
    frame[height // 2 :, : width // 8] = (30, 30, 200)
    return frame


def numbered_frames(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    return [numbered_frame(i, height, width) for i in range(count)]


def read_number(frame: np.ndarray) -> int:
    """The number drawn into a (height, width, 3) frame by `numbered_frame`."""
    width = frame.shape[1]
    edges = np.linspace(width // 8, width, BITS + 1).astype(int)
    grey = np.asarray(frame, np.float32).mean(axis=(0, 2))
    return sum(1 << bit for bit in range(BITS) if grey[edges[bit] + 1 : edges[bit + 1] - 1].mean() > 127)


def read_numbers(video: np.ndarray) -> list[int]:
    return [read_number(frame) for frame in video]


def write_video(
    path,
    frames=30,
    *,
    size=(64, 96),
    codec="libx264",
    pix_fmt="yuv420p",
    rate=25,
    gop=12,
    b_frames=2,
    pts=None,
    rotation=None,
    options=None,
    container_options=None,
    audio=False,
    format=None,
    title=None,
) -> str:
    """Writes a video and returns its path as a string.

    `frames` is a number of numbered frames, or an iterable of (H, W, 3) uint8 arrays; `size` is (height, width);
    `pts` gives each frame's time in units of 1 / 1000 s (for variable frame rates); `rotation` is the display
    rotation in degrees to write into the container, counter-clockwise as libav counts; `title` names the video's track
    in Matroska, and the whole elsewhere.
    """
    if isinstance(frames, int):
        frames = [numbered_frame(i, *size) for i in range(frames)]
    frames = list(frames)
    with av.open(str(path), "w", format=format, options={**(container_options or {})}) as container:
        options = dict(options or {})
        if codec == "libx264":
            options = {"preset": "veryfast", "bf": str(b_frames), **options}
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.gop_size = gop
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if title is not None:
            stream.metadata["title"] = container.metadata["title"] = title
        sound = container.add_stream("aac", rate=8000) if audio else None
        for i, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            if pts is not None:
                frame.pts, frame.time_base = pts[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            _mux_tone(container, sound, seconds=len(frames) / rate)
    return str(path)


# Kinds of whole files, written with 60 numbered frames: {file name: options of `write_video`}.
X265 = {"codec": "libx265", "options": {"x265-params": "log-level=none:open-gop=1", "preset": "ultrafast"}}
IRREGULAR = np.cumsum(np.random.default_rng(0).integers(10, 200, 60)).tolist()
FILES = {
    "h264.mp4": {"audio": True},
    "no_b_frames.mp4": {"b_frames": 0},
    "one_key_frame.mp4": {"gop": 250},
    "open_gop.mp4": {"b_frames": 3, "options": {"x264-params": "open-gop=1"}},
    "fragmented.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "irregular.mp4": {"pts": IRREGULAR},
    "irregular.mkv": {"pts": IRREGULAR},
    "late.mp4": {"pts": [2000 + 40 * i for i in range(60)]},
    "late.mkv": {"pts": [2000 + 40 * i for i in range(60)]},
    "h264.mkv": {},
    "h264.ts": {"audio": True},
    "h264.flv": {},
    "h264.avi": {},
    "raw.h264": {"format": "h264"},
    "mpeg4.avi": {"codec": "mpeg4"},
    "mpeg4_b_frames.avi": {"codec": "mpeg4", "options": {"bf": "2"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"bf": "2"}},
    "wmv2.wmv": {"codec": "wmv2"},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}},
    "hevc.mp4": X265,
    "odd_mpeg4.mp4": {"codec": "mpeg4", "size": (97, 131)},
    "odd_h264.mp4": {"pix_fmt": "yuv444p", "size": (97, 131)},
    "odd_vp8.webm": {"codec": "libvpx", "size": (97, 131)},
    "h264_10_bit.mp4": {"pix_fmt": "yuv420p10le"},
    "hevc_10_bit.mp4": {**X265, "pix_fmt": "yuv420p10le"},
    "ffv1_10_bit.mkv": {"codec": "ffv1", "pix_fmt": "yuv420p10le"},
    "grey.mp4": {"pix_fmt": "gray"},
    "grey_16_bit.mkv": {"codec": "ffv1", "pix_fmt": "gray16le"},
    "animation.gif": {"codec": "gif", "pix_fmt": "rgb8"},
}


# Ways to store one clip for `write_stored`: {file name: options of `write_video`}.
STORED = {
    "15.mp4": {"rate": 15},
    "24.mp4": {"rate": 24},
    "30.mp4": {"rate": 30},
    "60.mp4": {"rate": 60},
    "120.mp4": {"rate": 120},
    "no-edit-list.mp4": {"rate": 30, "b_frames": 0},
    "cut.mp4": {"rate": 30, "b_frames": 0},
    "turned.mp4": {"rate": 30, "rotation": 90},
    "30.mkv": {"rate": 30},
    "24.webm": {"rate": 24, "codec": "libvpx"},
    "30.avi": {"rate": 30, "codec": "mpeg4"},
    "30.ts": {"rate": 30},
    "uneven.mp4": {"rate": 30, "pts": [round(1000 * i / 30 + 8 * (-1) ** i * (i > 0)) for i in range(120)]},
    "uneven.mkv": {"rate": 30, "pts": [round(1000 * i / 30 - 8 * (-1) ** i * (i > 0)) for i in range(120)]},
}
# The pictures on screen at eight times of these clips, 0.2 s apart around the middle: after 1.3 s (picture 19.5),
# 1.5 s (22.5) ... 2.7 s (40.5). A processor with `num_frames=8, sampling_fps=5` takes them.
STORED_SAMPLES = [19, 22, 25, 28, 31, 34, 37, 40]


def write_stored(path) -> str:
    """
    Writes four seconds of 15 numbered pictures each, 64 x 96 with the number in the central square, in the way of
    `STORED` that the path's name tells. Of `cut.mp4`, an edit list cuts off another half a second before them.
    """
    options = STORED[Path(path).name]
    rate = options["rate"]
    numbers = [15 * i // rate for i in range(4 * rate)]
    if Path(path).name == "cut.mp4":
        numbers = [500] * (rate // 2) + numbers
    frames = [stored_picture(number) for number in numbers]
    if "rotation" in options:
        frames = [np.rot90(frame, -options["rotation"] // 90) for frame in frames]
    write_video(path, frames, **options)
    if Path(path).name == "cut.mp4":
        clock = 512 * rate  # of the track: ticks a second, which libav chooses
        change_edit_list(path, lambda duration, begin: (duration - 500, begin + clock // 2))
    return str(path)


def stored_picture(number: int) -> np.ndarray:
    """A picture of the clips of `STORED`."""
    return np.pad(numbered_frame(number, 64, 64), ((0, 0), (16, 16), (0, 0)), constant_values=128)


def change_edit_list(path, change) -> None:
    """Changes the one entry of an MP4's edit list, (duration, beginning) in units of 1/1000 s and of the track."""
    data = bytearray(Path(path).read_bytes())
    entry = data.index(b"elst") + 12
    data[entry : entry + 8] = struct.pack(">Ii", *change(*struct.unpack(">Ii", data[entry : entry + 8])))
    Path(path).write_bytes(data)


def write_moving_bars(root, counts) -> Path:
    """Clips of a bright bar that moves to the left or to the right: `root/<split>/<label>/<number>.mp4`.

    `counts` gives the clips for each label by split: {"train": 4, "validation": 2}.
    """
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        for name in ("to the left", "to the right"):
            folder = Path(root, split, name)
            folder.mkdir(parents=True)
            for number in range(count):
                frames = rng.integers(0, 40, (8, 36, 48, 3), dtype=np.uint8)
                for time, frame in enumerate(frames):
                    place = 4 + 5 * time
                    frame[:, place : place + 6] = 220
                write_video(folder / f"{number}.mp4", frames[:, :, ::-1] if name == "to the left" else frames)
    return Path(root)


def write_audio(path, seconds: float = 0.5, cover: np.ndarray | None = None) -> str:
    """A sound file without a video, but with a cover picture if `cover` gives one: (H, W, 3) uint8."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        if cover is not None:
            picture = container.add_stream("mjpeg", rate=1)
            picture.height, picture.width, picture.pix_fmt = *cover.shape[:2], "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
            container.mux(picture.encode(av.VideoFrame.from_ndarray(cover, format="rgb24")) + picture.encode())
        _mux_tone(container, stream, seconds)
    return str(path)


def _mux_tone(container, stream, seconds):
    wave = (0.1 * np.sin(np.arange(int(8000 * seconds)) * 0.3)).astype(np.float32)
    for start in range(0, len(wave) - 1023, 1024):
        frame = av.AudioFrame.from_ndarray(wave[None, start : start + 1024], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 8000, start, Fraction(1, 8000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def truncate(path, target, keep: float) -> str:
    """Copies the first `keep` (0 to 1) of a file's bytes."""
    data = Path(path).read_bytes()
    Path(target).write_bytes(data[: int(len(data) * keep)])
    return str(target)


def claim_frames_in_avi(path, target, count: int) -> str:
    """Copies an AVI file and makes its headers claim `count` frames."""
    data = bytearray(Path(path).read_bytes())
    header = data.index(b"avih") + 8
    data[header + 16 : header + 20] = count.to_bytes(4, "little")  # dwTotalFrames
    stream = data.index(b"strh") + 8
    data[stream + 32 : stream + 36] = count.to_bytes(4, "little")  # dwLength
    Path(target).write_bytes(data)
    return str(target)
