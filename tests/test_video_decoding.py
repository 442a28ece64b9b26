"""Decoding: the frames of real and odd files with each decoder, downloads, and what is said of files that are none."""

import asyncio
import gc
import http.server
import itertools
import math
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from modeling_videomamba import video_decoding, video_demuxer, video_frames, video_sources
from modeling_videomamba.video_decoding import choose_decoder, decode_video, decoded_frames, open_pyav
from modeling_videomamba.video_mp4 import times_of_frames, whole_index
from modeling_videomamba.video_packets import disposable_test
from video_files import (
    FILES,
    IRREGULAR,
    X265,
    claim_frames_in_avi,
    numbered_frame,
    read_number,
    read_numbers,
    truncate,
    write_audio,
    write_video,
)


def usable(decoder):
    try:
        return choose_decoder([decoder]) == decoder
    except ImportError:
        return False


needs_decord = pytest.mark.skipif(not usable("decord"), reason="decord cannot be imported")
needs_torchcodec = pytest.mark.skipif(not usable("torchcodec"), reason="torchcodec or FFmpeg's libraries are missing")


each_decoder = pytest.mark.parametrize(
    "decoder",
    ["pyav", pytest.param("torchcodec", marks=needs_torchcodec), pytest.param("decord", marks=needs_decord)],
)


def fetch(file, indices=None, decoder=None):
    """(T, H, W, 3) array of the frames at `indices` of a file, all of them if None, and the metadata."""
    return decode_video(file, None if indices is None else (lambda metadata: np.array(indices)), decoder)


@pytest.mark.parametrize("name", FILES)
@each_decoder
def test_frames_are_those_asked_for(video, name, decoder):
    frames, metadata = fetch(video(name), decoder=decoder)
    assert frames.dtype == np.uint8
    assert metadata.total_num_frames == len(frames) == 60
    assert (metadata.height, metadata.width) == frames.shape[1:3] == FILES[name].get("size", (64, 96))
    assert read_numbers(frames) == metadata.frames_indices.tolist() == list(range(60))
    assert np.ptp(frames[0], axis=-1).max() < 8 if name.startswith("grey") else np.ptp(frames[0], axis=-1).max() > 120
    for indices in ([0], [1], [17], [59], [13, 15, 17, 19], [40, 44, 48, 52, 56], [7, 7, 8, 30, 30], [59, 3, 20]):
        some, metadata = fetch(video(name), indices, decoder=decoder)
        assert read_numbers(some) == indices == metadata.frames_indices.tolist()
        np.testing.assert_array_equal(some, frames[indices])


# Of these the times of frames are unknown, made up or not to be searched.
UNSEARCHABLE = {"raw.h264", "h264.avi", "mpeg4_b_frames.avi", "mpeg2.mpg"}


@pytest.mark.parametrize("name", FILES)
def test_sections_hold_the_frames_of_their_time(video, name):
    path = video(name)
    if name in UNSEARCHABLE:
        with pytest.raises(ValueError, match=re.escape(path) + " cannot be searched by time"):
            decode_video(path, section=(0.5, 1.0))
        return
    with open_pyav(path, path) as (container, stream):
        times = [float((f.pts - stream.start_time) * stream.time_base) for f in decoded_frames(container, stream)]
    end = times[-1]
    for start, stop in ((0, None), (0, 0.3 * end), (0.4 * end, 0.7 * end), (times[30], times[31]), (0.9 * end, None)):
        expected = [i for i, time in enumerate(times) if start - 1e-6 <= time < (stop or math.inf) - 1e-6]
        frames, metadata = decode_video(path, section=(start, stop))
        assert read_numbers(frames) == expected and metadata.total_num_frames == len(expected)
    with pytest.raises(ValueError, match=re.escape(path) + " shows no frame from 100 s to 101 s"):
        decode_video(path, section=(100, 101))
    with pytest.raises(ValueError, match=re.escape(path)):  # more than libav's clock counts
        decode_video(path, section=(1e300, None))


def test_only_the_section_is_read(tmp_path, monkeypatch):
    path = write_video(tmp_path / "long.mkv", 1000, gop=1)
    read = []

    class Counting(video_sources._File):
        def read(self, *args):
            read.append(super().read(*args))
            return read[-1]

    monkeypatch.setattr(video_sources, "_File", Counting)
    frames, _ = decode_video(path, lambda metadata: [0, 4], section=(20, 21))
    assert read_numbers(frames) == [500, 504]
    assert sum(map(len, read)) < os.path.getsize(path) / 2


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "decoder", [pytest.param("torchcodec", marks=needs_torchcodec), pytest.param("decord", marks=needs_decord)]
)
def test_decoders_agree(video, name, decoder):
    indices = list(range(5, 37, 2))
    expected, _ = fetch(video(name), indices, decoder="pyav")
    frames, _ = fetch(video(name), indices, decoder=decoder)
    # Their versions of swscale differ where there are odd sides or more than 8 bits, and nowhere else.
    difference = np.abs(frames.astype(int) - expected).mean()
    assert difference <= (1 if "odd" in name or "10_bit" in name else 0)


@pytest.mark.parametrize("clip", ["arm_wrestling.mp4", "mpeg4.avi"])
@each_decoder
def test_real_clips(shared_data, clip, decoder):
    path = shared_data / "clips" / clip
    with av.open(str(path)) as container:
        expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for indices in (range(60, 92, 2), [0], [len(expected) - 1], range(0, len(expected), 9)):
        frames, metadata = fetch(path, list(indices), decoder=decoder)
        assert metadata.total_num_frames == len(expected)
        np.testing.assert_array_equal(frames, np.stack([expected[i] for i in indices]))


def test_only_what_is_needed_is_decoded(tmp_path, monkeypatch):
    path = write_video(tmp_path / "long.mp4", 400, size=(32, 48), gop=20, options={"sc_threshold": "0"})
    decoded = []
    original = video_decoding.decoded_frames

    def counting(*args):
        for frame in original(*args):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(video_decoding, "decoded_frames", counting)
    _, metadata = fetch(path, list(range(205, 237, 2)), decoder="pyav")
    assert metadata.total_num_frames == 400
    assert len(decoded) == 236 - 200  # from the key frame at 200 to the last wanted frame, 235


SPARSE = {
    "h264.mp4": {"gop": 20, "options": {"sc_threshold": "0", "bf": "3"}},
    "h264.ts": {"gop": 20, "options": {"sc_threshold": "0", "bf": "3"}},
    "open_gop.mkv": {"gop": 20, "b_frames": 3, "options": {"x264-params": "open-gop=1:scenecut=0"}},
    "hevc.mp4": {**X265, "gop": 20},
    "av1.mp4": {"codec": "libsvtav1", "gop": 20, "size": (96, 128), "options": {"preset": "11"}},
    "vp9.webm": {**FILES["vp9.webm"], "gop": 20},
    "mpeg4.mp4": {"codec": "mpeg4", "gop": 20, "options": {"bf": "2"}},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
}


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_frames_are_searched_one_by_one(tmp_path, monkeypatch, name):
    path = write_video(tmp_path / name, 200, **SPARSE[name])
    frames, _ = fetch(path, decoder="pyav")
    decoded, original = [], video_decoding.decoded_frames

    def counting(*args):
        for frame in original(*args):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(video_decoding, "decoded_frames", counting)
    for indices in ([3, 71, 72, 150, 199], [0, 100], [199, 5], [40, 60, 80, 100], list(range(5, 200, 13))):
        decoded.clear()
        some, _ = fetch(path, indices, decoder="pyav")
        np.testing.assert_array_equal(some, frames[indices])
        # At most from a key frame to each; with a tail of an open group before it.
        assert len(decoded) <= 30 * len(indices) and (len(indices) > 10 or len(decoded) < 120)


@pytest.mark.parametrize("name", ["h264.mp4", "open_gop.mkv", "hevc.mp4", "av1.mp4"])
def test_frames_that_no_other_needs(tmp_path, name):
    """Without their packets, a plain decoder gives the same pictures for all others."""
    path = write_video(tmp_path / name, 60, **SPARSE[name])
    pictures = []
    for dispose in (False, True):
        with av.open(path) as container:
            stream = container.streams.video[0]
            is_disposable = disposable_test(stream)
            packets = [packet for packet in container.demux(stream) if packet.size]
            left_out = [packet.pts for packet in packets if is_disposable(packet)]
            kept = [packet for packet in packets if not dispose or packet.pts not in left_out]
            decoded = [frame for packet in [*kept, None] for frame in stream.decode(packet)]
            pictures.append({frame.pts: frame.to_ndarray() for frame in decoded})
    assert len(pictures[0]) == 60 and len(left_out) > 4
    assert pictures[1].keys() == pictures[0].keys() - set(left_out)
    for pts, picture in pictures[1].items():
        np.testing.assert_array_equal(picture, pictures[0][pts])


def test_times_of_frames(video):
    _, metadata = decode_video(video("irregular.mp4"), lambda metadata: [0, 30, 59])
    np.testing.assert_allclose(metadata.frame_times[:-1], (np.array(IRREGULAR) - IRREGULAR[0]) / 1000, atol=1e-3)
    assert metadata.num_damaged_frames == 0
    seen = []
    decode_video(video("late.mkv"), lambda metadata: seen.append(metadata.frame_times) or [0], section=(1, 1.5))
    np.testing.assert_allclose(seen[0], np.arange(len(seen[0])) / 25, atol=1e-3)
    assert decode_video(video("raw.h264"), lambda metadata: [0])[1].frame_times is None


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
def test_forked_workers_can_discard_what_was_decoded_before(video):
    """What is left in reference cycles must own no threads: a child does not inherit them, and would wait for them."""
    gc.collect()
    gc.disable()
    try:
        decode_video(video("h264.mp4"), lambda metadata: np.arange(8))
        child = multiprocessing.get_context("fork").Process(target=gc.collect)
        child.start()
        child.join(30)
        child.kill()
    finally:
        gc.enable()
    child.join()
    assert child.exitcode == 0


@pytest.mark.parametrize("extension", ["mp4", "mkv"])
@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
@each_decoder
def test_rotation(tmp_path, extension, quarters, decoder):
    path = write_video(tmp_path / f"turned.{extension}", 4, codec="mpeg4", rotation=90 * quarters)
    frames, metadata = fetch(path, decoder=decoder)
    upright = np.rot90(numbered_frame(2), quarters)  # both count counter-clockwise
    assert frames.shape[1:] == upright.shape and (metadata.height, metadata.width) == upright.shape[:2]
    assert np.abs(frames[2].astype(int) - upright).mean() < 12
    assert read_numbers(np.rot90(frames, -quarters, axes=(1, 2))) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("mirror", "expected"), [("hflip", lambda x: x[:, ::-1]), ("vflip", lambda x: x[::-1]), (None, lambda x: x)]
)
def test_mirroring(tmp_path, mirror, expected):
    with av.open(str(tmp_path / "mirrored.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        stream.set_display_rotation(0, **({mirror: True} if mirror else {}))
        container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered_frame(5), format="rgb24")))
        container.mux(stream.encode())
    frames, _ = fetch(tmp_path / "mirrored.mp4", decoder="pyav")
    assert np.abs(frames[0].astype(int) - expected(numbered_frame(5))).mean() < 12


def test_edit_list_that_cuts_off_the_beginning(tmp_path):
    path = write_video(
        tmp_path / "cut.mp4",
        60,
        gop=100,
        pts=[40 * i - 200 for i in range(60)],
        container_options={"avoid_negative_ts": "disabled"},
    )
    for decoder in ("pyav", "decord") if usable("decord") else ("pyav",):
        frames, metadata = fetch(path, [0, 30, 54], decoder=decoder)
        assert metadata.total_num_frames == 55
        assert read_numbers(frames) == [5, 35, 59]


@pytest.mark.parametrize("claim", [20, 600])
def test_container_that_lies_about_its_length(video, tmp_path, claim):
    path = claim_frames_in_avi(video("mpeg4.avi"), tmp_path / "lie.avi", claim)
    with av.open(path) as container:
        assert container.streams.video[0].frames == claim
    frames, metadata = fetch(path)
    assert metadata.total_num_frames == 60 and read_numbers(frames) == list(range(60))


@pytest.mark.parametrize(
    ("name", "keep", "low", "high"), [("h264.mkv", 0.6, 15, 45), ("h264.ts", 0.6, 15, 45), ("mpeg4.avi", 0.6, 15, 45)]
)
def test_files_cut_in_the_middle(video, tmp_path, capfd, name, keep, low, high):
    path = truncate(video(name), tmp_path / name, keep)
    frames, metadata = fetch(path)
    assert low < metadata.total_num_frames < high
    assert read_numbers(frames) == list(range(metadata.total_num_frames))
    assert capfd.readouterr() == ("", "")


def test_mp4_cut_in_the_middle(tmp_path, capfd):
    whole = write_video(tmp_path / "whole.mp4", 60, container_options={"movflags": "faststart"})
    path = truncate(whole, tmp_path / "cut.mp4", 0.6)
    with av.open(path) as container:
        assert container.streams.video[0].frames == 60  # what it promises
    for decoder in ("pyav", "decord") if usable("decord") else ("pyav",):
        frames, metadata = fetch(path, decoder=decoder)
        assert 15 < metadata.total_num_frames < 45
        assert read_numbers(frames) == list(range(metadata.total_num_frames))
        last, _ = decode_video(path, lambda metadata: np.array([metadata.total_num_frames - 1]), decoder)
        np.testing.assert_array_equal(last[0], frames[-1])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("extension", ["mp4", "mkv", "avi"])
@each_decoder
def test_one_frame(tmp_path, extension, decoder):
    path = write_video(tmp_path / f"one.{extension}", [numbered_frame(77)], codec="mpeg4")
    frames, metadata = fetch(path, [0] * 16, decoder=decoder)
    assert metadata.total_num_frames == 1 and read_numbers(frames) == [77] * 16


def test_change_of_frame_size(tmp_path):
    for i, size in enumerate([(64, 96), (48, 80)]):
        write_video(tmp_path / f"{i}.ts", 20, size=size)
    both = (tmp_path / "0.ts").read_bytes() + (tmp_path / "1.ts").read_bytes()
    with pytest.raises(ValueError, match=r"changes its frame size: .*\(48, 80\), \(64, 96\)"):
        fetch(both, decoder="pyav")


@pytest.mark.parametrize("case", ["empty", "text", "html", "noise", "moov", "audio", "mp4 audio", "jpeg", "playlist"])
@each_decoder
def test_files_that_are_no_video(tmp_path, capfd, video, case, decoder):
    path = tmp_path / "clip.mp4"
    if case == "mp4 audio":
        write_audio(path)
    elif case == "audio":
        write_audio(path := tmp_path / "sound.m4a")
    elif case == "moov":
        truncate(video("h264.mp4"), path, 0.5)
    elif case == "jpeg":
        Image.fromarray(numbered_frame(0)).save(path, "jpeg")
    else:
        path.write_bytes(
            {
                "empty": b"",
                "text": b"not a video at all\n" * 40,
                "html": b"<!doctype html><title>404</title>",
                "noise": np.random.default_rng(0).bytes(9999),
                "playlist": b"#EXTM3U\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
            }[case]
        )
    message = {
        "empty": "is empty",
        "text": "begins with the text 'not a video",
        "html": "begins with the text '<!doctype html>",
        "noise": "begins with the bytes",
        "moov": "lacks its index",
        "jpeg": "still image",
        "playlist": "begins with the text '#EXTM3U",
    }.get(case, "no video stream")
    with pytest.raises(ValueError, match=message) as error:
        fetch(path, decoder=decoder)
    assert str(path) in str(error.value)
    with pytest.raises(ValueError, match=message):
        fetch(path.read_bytes(), decoder=decoder)
    assert capfd.readouterr() == ("", "")


def test_cover_picture_is_no_video(tmp_path, video):
    path = write_audio(tmp_path / "song.mp4", cover=numbered_frame(0))
    with av.open(path) as container:
        assert [stream.type for stream in container.streams] == ["audio", "video"]
    with pytest.raises(ValueError, match="no video stream"):
        fetch(path, decoder="pyav")


def test_paths_that_are_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.mp4"):
        fetch(str(tmp_path / "nowhere.mp4"))
    with pytest.raises(IsADirectoryError, match="is a folder"):
        fetch(tmp_path)
    if os.path.exists("/dev/zero"):
        with pytest.raises(ValueError, match="device"):
            fetch("/dev/zero")
        with open("/dev/zero", "rb") as file, pytest.raises(ValueError, match="/dev/zero is a device"):
            fetch(file)
    (tmp_path / "notes.txt").write_text("text")
    with open(tmp_path / "notes.txt") as file, pytest.raises(ValueError, match="text mode"):
        fetch(file)


def test_damage_in_the_middle_gives_an_error_or_whole_frames(video, tmp_path, capfd):
    data = bytearray(Path(video("mjpeg.avi")).read_bytes())
    middle = len(data) // 2
    data[middle : middle + 9000] = bytes(9000)
    (tmp_path / "damaged.avi").write_bytes(data)
    frames, metadata = fetch(tmp_path / "damaged.avi", decoder="pyav")
    numbers = read_numbers(frames)
    assert 30 < metadata.total_num_frames == len(frames) < 60
    assert numbers[:25] == list(range(25)) and numbers[-5:] == list(range(55, 60))
    data[2000:-2000] = bytes(len(data) - 4000)
    (tmp_path / "damaged.avi").write_bytes(data)
    frames, metadata = fetch(tmp_path / "damaged.avi", decoder="pyav")
    assert set(read_numbers(frames)) <= set(range(60))
    assert capfd.readouterr() == ("", "")


@each_decoder
def test_bytes_with_every_decoder(video, decoder):
    data = Path(video("h264.mp4")).read_bytes()
    frames, metadata = fetch(data, [3, 9, 33], decoder=decoder)
    assert read_numbers(frames) == [3, 9, 33] and metadata.video_backend == decoder


# --- limits, errors, processes ----


def test_limits(video, monkeypatch):
    path = video("h264.mp4")
    monkeypatch.setattr(video_frames, "VIDEO_MAX_CLIP_BYTES", 3 * 64 * 96 * 8)
    assert len(fetch(path, range(8))[0]) == 8
    with pytest.raises(
        ValueError, match="9 frames of .*h264.mp4 take 165888 bytes, more than 147456.*raise VIDEO_MAX_"
    ):
        fetch(path, range(9))
    monkeypatch.setattr(video_demuxer, "VIDEO_MAX_FRAME_PIXELS", 64 * 96 - 1)
    with pytest.raises(ValueError, match="h264.mp4 has frames .*6143.*raise VIDEO_MAX_FRAME_PIXELS"):
        fetch(path)


@pytest.mark.slow
def test_limits_of_the_environment():
    code = (
        "from modeling_videomamba import video_demuxer, video_frames; "
        "print(video_demuxer.VIDEO_MAX_FRAME_PIXELS, video_frames.VIDEO_MAX_CLIP_BYTES)"
    )
    environment = {**os.environ, "VIDEO_MAX_FRAME_PIXELS": "12", "VIDEO_MAX_CLIP_BYTES": "34"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["12", "34"]


def test_frames_are_transformed_one_by_one(video):
    seen = []

    def halve(frame):
        seen.append(tuple(frame.shape))
        return frame[:, ::2, ::2]

    frames, metadata = decode_video(video("h264.mp4"), lambda metadata: [30, 30, 4], transform=halve)
    assert frames.shape == (3, 3, 32, 48) and seen == [(3, 64, 96)] * 2
    assert read_numbers(frames.permute(0, 2, 3, 1)) == [30, 30, 4]
    assert (metadata.height, metadata.width) == (64, 96)


@each_decoder
def test_frames_are_put_where_the_caller_says(video, decoder):
    memory, shapes = torch.zeros(3 * 64 * 96 * 3 + 1, dtype=torch.uint8), []

    def empty(shape):
        shapes.append(shape)
        return memory[:-1].view(shape)

    frames, _ = decode_video(video("h264.mp4"), lambda metadata: [30, 30, 4], decoder, empty=empty)
    assert shapes == [(3, 64, 96, 3)] and memory[-1] == 0
    assert read_numbers(memory[:-1].view(3, 64, 96, 3)) == [30, 30, 4]
    assert np.shares_memory(frames, memory.numpy())


def test_an_error_that_is_kept_keeps_no_decoder(tmp_path, video):
    errors = []
    for keep in (0.3, 0.6):
        path = truncate(video("h264.mp4"), tmp_path / "cut.mp4", keep)
        with pytest.raises(ValueError) as caught:
            fetch(path)
        errors.append(caught.value)
    for size in ((64, 96), (48, 80)):
        write_video(tmp_path / f"{size[0]}.ts", 20, size=size)
    with pytest.raises(ValueError, match="changes its frame size") as caught:
        fetch((tmp_path / "64.ts").read_bytes() + (tmp_path / "48.ts").read_bytes())
    errors.append(caught.value)
    kept = [type(thing).__name__ for thing in gc.get_objects() if str(type(thing)).startswith("<class 'av.")]
    assert not {"VideoCodecContext", "InputContainer", "VideoReformatter"} & set(kept)


def test_what_takes_long_is_said(video, monkeypatch):
    said, clock = [], itertools.count(step=3)
    monkeypatch.setattr(video_demuxer.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(video_demuxer.logger, "warning", said.append)
    fetch(video("h264.mkv"), [0])
    assert 5 < len(said) < 60  # at most one in ten seconds, for 60 packets of three
    assert "h264.mkv is read through to count its frames: " in said[0] and "Ctrl-C" in said[0]


def read_many(path, times):
    for _ in range(times):
        frames, _ = decode_video(path, lambda metadata: np.arange(5, 17, 4))
        assert read_numbers(frames) == [5, 9, 13]


@pytest.mark.parametrize("times", [10, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_processes(video, method, times):
    """Decoded before, and in the child; from several threads at once, while other threads fork."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {method}")
    context, path = multiprocessing.get_context(method), video("h264.mp4")
    read_many(path, 2)
    rounds, each = (1, times) if method == "spawn" else (times, 2)
    threads = [threading.Thread(target=read_many, args=(path, times)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(rounds):
        child = context.Process(target=read_many, args=(path, each))
        child.start()
        child.join(200)  # what 200 readings take beside two threads, on a busy machine, several times over
        child.kill()
        child.join()
        assert child.exitcode == 0
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("times", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_threads(video, times):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: read_many(video("h264.mp4"), times), range(4)))


# --- downloads ------------------------------------------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    files, requests = {}, []

    def do_GET(self):
        self.requests.append(self.path)
        if self.path == "/slow":
            time.sleep(1.5)
        if self.path == "/moved.mp4":
            self.send_response(302)
            self.send_header("Location", "/clip.mp4")
            self.end_headers()
            return
        if self.path.startswith("/drip"):
            self.wfile.write(b"HTTP/1.1 200 OK\r\n" + (b"" if self.path == "/drip_headers" else b"\r\n"))
            try:
                for _ in range(100):
                    self.wfile.write(b"X-More: 1\r\n" if self.path == "/drip_headers" else b"x")
                    time.sleep(0.1)
            except OSError:
                pass
            return
        if self.path in ("/gzip", "/long"):
            self.send_response(200)
            self.send_header(
                *{"/gzip": ("Content-Encoding", "gzip"), "/long": ("Content-Length", "9" * 12)}[self.path]
            )
            self.end_headers()
            return
        body = self.files.get(self.path)
        self.send_response(404 if body is None else 200)
        self.end_headers()
        self.wfile.write(body or b"<html>no such page</html>")
        if self.path == "/endless":
            try:
                for _ in range(300):
                    self.wfile.write(bytes(1 << 16))
                    time.sleep(0.01)
            except OSError:
                pass

    def log_message(self, *args):
        pass


@pytest.fixture
def server(video):
    Handler.files = {
        "/clip.mp4": Path(video("h264.mp4")).read_bytes(),
        "/page": b"<html>hello</html>",
        "/endless": b"x",
    }
    Handler.requests = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *args: None  # clients that hang up are part of the test
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_urls(server, video, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # speaks of the Hub, not of an address that the user gave
    expected, _ = fetch(video("h264.mp4"), [3, 30])
    for path in ("/clip.mp4", "/moved.mp4"):
        np.testing.assert_array_equal(fetch(server + path, [3, 30])[0], expected)
    with pytest.raises(ConnectionError, match="/missing.mp4 could not be downloaded .*404"):
        fetch(server + "/missing.mp4")
    with pytest.raises(ValueError, match="/page cannot be read as a video .*<html>hello"):
        fetch(server + "/page")
    with pytest.raises(ConnectionError, match="could not be downloaded"):
        fetch("http://127.0.0.1:9/refused.mp4")
    with pytest.raises(ConnectionError, match="could not be downloaded"):
        fetch("http://")


def test_urls_that_never_end(server, monkeypatch):
    monkeypatch.setattr(video_sources, "DOWNLOAD_TIMEOUT", 0.2)
    with pytest.raises(ConnectionError, match="/slow could not be downloaded .*Timeout"):
        fetch(server + "/slow")
    monkeypatch.setattr(video_sources, "VIDEO_MAX_DOWNLOAD_BYTES", 1 << 18)
    with pytest.raises(ConnectionError, match="/endless did not end within 262144 bytes"):
        fetch(server + "/endless")


@pytest.mark.parametrize("path", ["/drip", "/drip_headers"])
def test_the_deadline_holds_byte_by_byte(server, monkeypatch, path):
    monkeypatch.setattr(video_sources, "VIDEO_MAX_DOWNLOAD_SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=f"{path} did not end within .* 0.5 seconds"):
        fetch(server + path)
    assert time.monotonic() - start < 5  # the server would go on for ten


def test_what_is_compressed_or_too_long_is_not_downloaded(server):
    with pytest.raises(ConnectionError, match="content encoding 'gzip'.*Download and unpack it yourself"):
        fetch(server + "/gzip")
    with pytest.raises(ConnectionError, match="/long did not end within 2147483648 bytes"):
        fetch(server + "/long")


def test_urls_within_a_running_event_loop(server, video):
    """As in a notebook."""

    async def run():
        return fetch(server + "/clip.mp4", [3])[0]

    np.testing.assert_array_equal(asyncio.run(run()), fetch(video("h264.mp4"), [3])[0])


def test_nothing_else_is_opened(server, tmp_path, video):
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{server}/clip.mp4\n#EXT-X-ENDLIST\n"
    concat = f"ffconcat version 1.0\nfile {video('h264.mp4')}\n"
    for name, text in {"list.m3u8": playlist, "list.mp4": playlist, "concat.mp4": concat}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match="cannot be read as a video"):
            fetch(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        fetch(f"concat:{video('h264.mp4')}")
    assert Handler.requests == []


# --- decoders -------------------------------------------------------------------------------------------------------


def test_missing_decoders(video, monkeypatch):
    for module in ("av", "torchcodec", "decord"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match="pip install av"):
        fetch(video("h264.mp4"))
    with pytest.raises(ImportError, match="of decord none can be used .*pip install decord"):
        fetch(video("h264.mp4"), decoder="decord")


@needs_decord
def test_the_next_decoder_stands_in(video, monkeypatch):
    assert fetch(video("h264.mp4"), [0])[1].video_backend == "pyav"
    # decord would return wrong frames of this one.
    assert fetch(video("h264.ts"), [0], decoder="decord")[1].video_backend == "pyav"
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    monkeypatch.setattr(video_decoding, "av", None)
    frames, metadata = fetch(video("h264.mp4"), [2, 50])
    assert read_numbers(frames) == [2, 50] and metadata.video_backend == "decord"
    with pytest.raises(ValueError, match="h264.ts: decord may return wrong frames.*pip install av"):
        fetch(video("h264.ts"), [0])


def test_numbers_survive_compression():
    """The ruler of these tests."""
    for number in (0, 1, 512, 1023, 365):
        assert read_number(numbered_frame(number)) == number
        assert read_number(numbered_frame(number, 97, 131)) == number


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [i / 25 for i in range(6)]),
        ({"b_frames": 0}, [i / 25 for i in range(6)]),
        ({"rate": 30, "codec": "mpeg4"}, [i / 30 for i in range(6)]),
        ({"pts": [0, 40, 50, 200, 250]}, [0, 0.04, 0.05, 0.2, 0.25]),  # how long the last is shown, libav chooses
        ({"pts": [3000, 3040, 3050, 3200, 3250]}, [0, 0.04, 0.05, 0.2, 0.25]),
    ],
)
def test_times_of_frames_by_hand(tmp_path, options, expected):
    """The times of packets, and for the other decoders those of the index of MP4; both are counted from the first."""
    path = write_video(tmp_path / "clip.mp4", 5, **options)
    _, metadata = fetch(path)
    assert metadata.frame_times == pytest.approx(expected + [metadata.frame_times[-1]] * (6 - len(expected)), abs=1e-4)
    assert metadata.frame_times[-1] > metadata.frame_times[-2]
    times, last_duration, clock = times_of_frames(whole_index(path))
    ends = np.array([*times, times[-1] + last_duration]) - times[0]
    assert ends * clock == pytest.approx(metadata.frame_times, abs=1e-9)
