"""Every kind of odd or damaged file, each in a process of its own: the right frames or an error, in bounded memory."""

import multiprocessing
import os
import re
import resource
import time
from collections import Counter
from dataclasses import replace

import av
import numpy as np
import pytest

from modeling_videomamba import VideoMambaVideoProcessor
from modeling_videomamba.video_decoding import decode_video
from modeling_videomamba.video_demuxer import open_pyav, read_index, read_tables
from odd_videos import ALL, KINDS, SLOW, WHOLE
from video_files import read_numbers


pytestmark = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork"
)
MEMORY, SECONDS = 3 << 30, 20


@pytest.fixture(autouse=True)
def nothing_is_printed(request, capfd):
    yield
    if "fuzz" not in request.node.name:
        # The encoder of AV1 announces itself, and that of Cinepak counts.
        printed = [line for line in capfd.readouterr().err.splitlines() if "Svt[" not in line and "strips" not in line]
        assert not [line for line in printed if "dropped" in line or "rror" in line]


def in_child(function, *args):
    """What `function(*args)` returns or raises in a process of its own, which may take 3 GB and 20 s."""
    here, there = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_report, args=(there, function, *args))
    child.start()
    there.close()
    try:
        if not here.poll(SECONDS):
            raise AssertionError(f"no answer after {SECONDS} s")
        return here.recv()
    except EOFError:
        child.join(SECONDS)
        raise AssertionError(f"the process ended with {child.exitcode}") from None
    finally:
        child.kill()
        child.join()


def _report(pipe, function, *args):
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    try:
        pipe.send(function(*args))
    except Exception as error:
        pipe.send((type(error).__name__, str(error)))


def write_and_decode(path, write, decoder):
    """The numbers of all frames; of those that the three ways of sampling take; and which they should be."""
    write(path)
    frames, metadata = decode_video(str(path), decoder=decoder)
    assert len(frames) == metadata.total_num_frames == len(metadata.frames_indices)
    numbers = read_numbers(frames) if frames.shape[2] >= 32 else [0] * len(frames)
    some, wanted = [], []
    for choose in (
        lambda n: n // 2 + np.arange(max(1, min(5, n // 4))),
        lambda n: np.array([n - 1]),
        lambda n: [0, n // 3],
    ):
        frames, metadata = decode_video(
            str(path), lambda metadata, choose=choose: choose(metadata.total_num_frames), decoder
        )
        some += read_numbers(frames) if frames.shape[2] >= 32 else [0] * len(frames)
        wanted += [numbers[i] if i < len(numbers) else None for i in metadata.frames_indices]
    processed = VideoMambaVideoProcessor(decoder=decoder)(str(path), return_tensors="pt").pixel_values
    assert processed.shape == (1, 16, 3, 224, 224)
    return numbers, some, wanted


def check(name, tmp_path, decoder="pyav"):
    write, expected = KINDS[name]
    path = tmp_path / name
    result = in_child(write_and_decode, path, write, decoder)
    if isinstance(expected, list):
        numbers, some, wanted = result if len(result) == 3 else (result, None, None)
        assert numbers == expected and some == wanted, result
    elif len(result) == 3:
        assert expected == WHOLE, result
        # Where a part is missing, packets may be counted in one call and frames in another: each frame is a whole one.
        # Now and then a decoder takes noise for pixels without complaint, and spoils pictures up to the next key
        # frame, one in twelve. (Of 408 such files with H.264: one picture in one file, three to five in three.) Which
        # files these are depends on the encoder's version, as the noise then meets other bytes.
        for numbers in result[:2]:
            spoilt = [number for number in numbers if number not in ALL]
            assert len(spoilt) < (12 if name.startswith("noise_at") else 1), result
    else:
        kind, message = result
        assert kind == "ValueError" and str(path) in message, result
        assert expected == WHOLE or re.search(expected, message), result


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in KINDS])
def test_kind(name, tmp_path):
    check(name, tmp_path)


# Real files of such kinds, by the first digits of their SHA-1: how many frames the ffmpeg command (5.1.9) shows, and
# their mean brightness; or what is said of the file.
REAL_MEDIA = {
    "0b6bfd623282.mp4": (305, 217.295),  # LCEVC: the base layer
    "22b42bc2cfcf.mp4": (119, 107.944),  # another track ends earlier
    "23c676bd7e1f.mp4": r"only audio \(aac\), a cover picture\.$",
    "4a817b1c172a.mp4": "is encrypted, as its container says",
    "5085ede6d628.ts": "is a scrambled",
    "89f61f537071.265": (1, 64.407),  # MV-HEVC: the base view
    "970759ae23fa.ogg": r"only audio \(vorbis\), a cover picture\.$",
    "adbb647c151e.mp4": (10, 125.196),  # MV-HEVC
    "cad49efd1cf5.mp4": "is encrypted, as its container says",
    "d2659a5e2447.mp4": "is encrypted, as its container says",
    "d75221a9b380.mp4": (11, 139.426),  # MV-HEVC
    "e5508d94664a.mp4": (95, 36.937),  # every tenth frame is reported as damaged, and looks whole
    "e71002fab179.avi": (44, 116.552),  # a palette
    "efc577f42dfe.wmv": "is encrypted, as its container says",
}


@pytest.mark.parametrize("name", REAL_MEDIA)
def test_real_media(shared_data, name):
    path = str(shared_data / "real_media" / name)
    if not os.path.exists(path):
        pytest.skip("needs the real files in ../shared/data/real_media, which is not there")
    expected = REAL_MEDIA[name]
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected) as error:
            decode_video(path)
        assert path in str(error.value)
        return
    frames, metadata = decode_video(path)
    assert len(frames) == expected[0] == metadata.total_num_frames
    assert abs(frames.mean(dtype=np.float64) - expected[1]) < 0.01
    assert metadata.num_damaged_frames == (10 if name.startswith("e5508") else 0)
    indices = [len(frames) // 2, len(frames) - 1]
    some, _ = decode_video(path, lambda metadata: indices)
    np.testing.assert_array_equal(some, frames[indices])


@pytest.mark.parametrize("name", ["palette.avi", "palette_changes.avi", "palette.mov", "headers_change.flv"])
def test_sections_have_what_comes_once(tmp_path, name):
    path = tmp_path / name
    KINDS[name][0](path)
    frames, _ = decode_video(str(path))
    for start, stop in ((0, 10), (12, 15), (24, 40)):
        section, _ = decode_video(str(path), section=(start / 25, stop / 25))
        np.testing.assert_array_equal(section, frames[start:stop])


def test_damaged_frames_keep_their_places(tmp_path):
    path = tmp_path / "damaged_pictures.mkv"
    KINDS[path.name][0](path)
    frames, metadata = decode_video(str(path))
    assert read_numbers(frames) == ALL and metadata.num_damaged_frames == 4
    frames, metadata = decode_video(str(path), lambda metadata: [8, 9, 9, 10])
    assert read_numbers(frames) == [8, 9, 9, 10] and metadata.num_damaged_frames == 2
    _, metadata = decode_video(str(path), lambda metadata: [10, 18])
    assert metadata.num_damaged_frames == 0


MP4 = [name for name in KINDS if name.endswith((".mp4", ".mov", ".3gp"))]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in MP4])
def test_tables_say_what_packets_say(name, tmp_path):
    path = tmp_path / name
    KINDS[name][0](path)
    try:
        with open_pyav(str(path), name) as (container, stream):
            tables, packets = read_tables(str(path), container, stream), read_index(container, stream, name)
    except (ValueError, av.FFmpegError):
        return
    # (Which frames are key frames libav tells from the packets of H.264, where tables say something else.)
    assert tables is None or replace(tables, keys=[]) == replace(packets, keys=[])
    assert tables is not None or name not in ("h264.mov", "av1.mp4", "full_range.mp4", "sixty_h264.mp4", "slow.mp4")


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["torchcodec", "decord"])
@pytest.mark.parametrize("name", MP4)
def test_other_decoders_return_the_same_frames(name, tmp_path, decoder):
    pytest.importorskip(decoder)
    KINDS[name][0](tmp_path / name)
    outcomes = []
    for which in ("pyav", decoder):
        try:
            outcomes.append(decode_video(str(tmp_path / name), decoder=which)[0])
        except ValueError as error:
            outcomes.append(str(error))
    np.testing.assert_array_equal(*outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["torchcodec", "decord"])
@pytest.mark.parametrize("name", KINDS)
def test_kind_with_another_decoder(name, tmp_path, decoder):
    pytest.importorskip(decoder)
    check(name, tmp_path, decoder)


def mutate(data: bytes, rng) -> bytes:
    """Flips, overwrites, cuts out or cuts off some bytes."""
    data = bytearray(data)
    # Half of the damage hits the first kilobyte, where most of what is not pixels stands.
    place = int(rng.integers(min(1024, len(data)) if rng.random() < 0.5 else len(data)))
    match rng.integers(4):
        case 0:
            for _ in range(rng.integers(1, 20)):
                data[min(len(data) - 1, place + int(rng.integers(200)))] ^= 1 << rng.integers(8)
        case 1:
            data[place : place + 8] = rng.choice([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", rng.bytes(4)])
        case 2:
            del data[place : place + int(rng.integers(1, 500))]
        case 3:
            del data[place + 1 :]
    return bytes(data)


def decode_mutated(path, data):
    path.write_bytes(data)
    frames, _ = decode_video(str(path), lambda metadata: np.linspace(0, metadata.total_num_frames - 1, 5).astype(int))
    return "frames", str(frames.shape)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_fuzz(tmp_path):
    """FUZZ_SECONDS=3600 runs it for an hour; FUZZ_SEED=n begins with another file."""
    names = [
        "h264.mov",
        "hevc.mkv",
        "vp9.mp4",
        "vp8.webm",
        "mpeg4.mp4",
        "mpeg2.ts",
        "mpeg1.mpg",
        "flv1.flv",
        "wmv2.wmv",
    ]
    names += [
        "msmpeg4v3.avi",
        "fields_mixed.ts",
        "apng.apng",
        "sixty_animation.gif",
        "qtrle.mov",
        "raw.m2v",
        "av1.webm",
    ]
    originals = {}
    for name in names:
        in_child(KINDS[name][0], tmp_path / name)
        originals[name] = (tmp_path / name).read_bytes()
    end, seed, found = (
        time.monotonic() + float(os.environ.get("FUZZ_SECONDS", 60)),
        int(os.environ.get("FUZZ_SEED", 0)),
        {},
    )
    counts = Counter()
    while time.monotonic() < end:
        rng, seed = np.random.default_rng(seed), seed + 1
        name = names[rng.integers(len(names))]
        path = tmp_path / f"damaged_{name}"
        try:
            kind, message = in_child(decode_mutated, path, mutate(originals[name], rng))
        except AssertionError as error:
            kind, message = "AssertionError", str(error)
        counts[kind] += 1
        if kind != "frames" and (kind != "ValueError" or str(path) not in message):
            found[f"{name}, seed {seed - 1}"] = f"{kind}: {message}"
    print(f"{sum(counts.values())} files: {dict(counts)}")
    assert not found, found
