"""What the generators of labelled clips share: pictures in, a hand that shakes, the look of the film, H.264 out."""

import contextlib
import functools
import json
import math
import multiprocessing
import os
import shutil
import sys
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from tqdm import tqdm


# Frames that an action or a camera motion takes: 16 frames at stride 2, what the model sees.
WINDOW = 32
MILLISECOND = Fraction(1, 1000)
SHAKE = 0.008  # largest amplitude of each of a hand's sine waves, in short sides of the picture

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
VIDEO_SUFFIXES = {".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg"}
PICTURE_RATES = (5, 6, 8, 10, 12, 15, 15, 20, 24, 25, 30, 30, 60)  # a second, of clips that are stored in many ways
SCENERY_SIDE = 640  # scenery is shrunk to at most this many pixels on its longer side
SCENERY_FRAMES = 64  # at most this many consecutive frames of a video are used


# ---------------------------------------------------------------------------------------------------------------------
# Pictures in
# ---------------------------------------------------------------------------------------------------------------------


def find_scenery(folder, suffixes=frozenset(IMAGE_SUFFIXES | VIDEO_SUFFIXES)):
    """All images and videos under `folder`, sorted by path. Raises `FileNotFoundError` where there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder. Name a folder of still images or videos.")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    if not paths:
        raise FileNotFoundError(
            f"No image or video found in {folder} or below it. Looked for {' '.join(sorted(suffixes))}."
        )
    return paths


def hold_out(paths, split, share):
    """
    The part of `paths` that is for `split`: "train", or a held-out share for any other.

    A file's name alone decides, so that a picture that stands in two folders under one name stays on one side.
    """
    if not share:
        return paths
    held_out = [zlib.crc32(path.name.encode()) % 1000 < 1000 * share for path in paths]
    kept = [path for path, held in zip(paths, held_out, strict=True) if held == (split != "train")]
    if not kept:
        raise FileNotFoundError(
            f"None of the {len(paths)} pictures is for {split}: a picture's name decides, and a share of {share:g} is "
            "held out. Add pictures, or set --held_out 0 and give each split a folder of its own."
        )
    return kept


# One worker makes all labels over one piece of scenery in a row, so a small cache saves most of the decoding.
@functools.lru_cache(maxsize=8)
def read_scenery(path, seed):
    """The frames of an image (one) or of a part of a video (at most 64): uint8 (F, 3, H, W), no side above 640 pixels.

    `seed` chooses the part of a video longer than 8 seconds. Raises `ValueError` for what cannot be read.
    """
    try:
        if path.suffix.lower() in IMAGE_SUFFIXES:
            with Image.open(path) as image:
                frames = [np.asarray(_shrink(ImageOps.exif_transpose(image).convert("RGB")))]
        else:
            frames = _read_video(path, np.random.default_rng(seed))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, av.FFmpegError) as error:
        raise ValueError(f"{path} cannot be read as an image or a video: {error}. Repair or remove it.") from error
    if not frames:
        raise ValueError(f"{path} holds no video frame. Remove the file.")
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def _shrink(image):
    image.thumbnail((SCENERY_SIDE, SCENERY_SIDE))
    return image


def _read_video(path, rng):
    frames = []
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("it has no video stream")
        if container.duration and container.duration > 8 * av.time_base:
            container.seek(int(rng.uniform(0, 0.9) * container.duration))
        for frame in container.decode(video=0):
            scale = min(1.0, SCENERY_SIDE / max(frame.width, frame.height))
            width, height = round(frame.width * scale), round(frame.height * scale)
            if frames and frames[0].shape != (height, width, 3):
                break
            frames.append(frame.to_ndarray(format="rgb24", width=width, height=height))
            if len(frames) == SCENERY_FRAMES:
                break
    return frames


def draw_scenery(rng, width=640, height=480):
    """A picture of random shapes and lines on a cloudy ground, for when there is no image file: uint8 (1, 3, H, W)."""
    ground = Image.fromarray(rng.integers(0, 256, (rng.integers(3, 12), rng.integers(3, 16), 3), dtype=np.uint8))
    picture = ground.resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(50, 150)):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        w, h = np.exp(rng.uniform(np.log(0.01), np.log(0.25), 2)) * height
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        shape = rng.integers(4)
        if shape == 0:
            draw.rectangle((x, y, x + w, y + h), fill=colour)
        elif shape == 1:
            draw.ellipse((x, y, x + w, y + h), fill=colour)
        elif shape == 2:
            draw.polygon([tuple(point) for point in rng.uniform(-1, 1, (3, 2)) * h + (x, y)], fill=colour)
        else:
            end = (x + rng.uniform(-3, 3) * w, y + rng.uniform(-3, 3) * h)
            draw.line((x, y, *end), fill=colour, width=int(rng.integers(1, 7)))
    picture = picture.filter(ImageFilter.GaussianBlur(0.7))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]


# ---------------------------------------------------------------------------------------------------------------------
# The hand and the film
# ---------------------------------------------------------------------------------------------------------------------


def draw_look(rng):
    """Light, colour, noise and compression of a clip: a dict that JSON can hold."""
    return {
        "brightness": (rng.uniform(0.65, 1.3) * (1 + rng.uniform(-0.15, 0.15) * np.r_[-1, 1])).tolist(),  # first, last
        "contrast": float(rng.uniform(0.6, 1.25)),
        "colour": 0.0 if rng.random() < 0.08 else float(rng.uniform(0.5, 1.2)),
        "noise": float(rng.choice([0.0, rng.uniform(0, 9)])),
        "crf": int(rng.integers(18, 35)),
        "preset": str(rng.choice(["ultrafast", "superfast", "veryfast"])),
    }


def draw_storage(rng):
    """At which rates a clip is filmed and stored, in pictures and frames a second: a dict that JSON can hold."""
    picture_rate = int(rng.choice(PICTURE_RATES))
    file_rates = [picture_rate] * 2 + [rate for rate in (25, 30, 60) if rate > picture_rate]
    return {
        "picture_rate": picture_rate,
        "file_rate": int(rng.choice(file_rates)),
        "jitter": float(rng.choice([0.0, rng.uniform(0, 0.4)])),  # of the time between two frames
    }


def hand_shake(time, amplitude, rng):
    """What a hand adds to a camera's path at each of `time` (in frames), in short sides: a sum of three sine waves."""
    path = np.zeros(len(time))
    for _ in range(3):
        period = np.exp(rng.uniform(np.log(4), np.log(20)))  # frames
        size = rng.uniform(0, 1) * amplitude * min(1, period / 10)
        path += size * np.sin(2 * math.pi * (time / period + rng.random()))
    return path


def colour(frame, parameters):
    """Saturation and contrast: uint8 (3, H, W) in, float (3, H, W) out."""
    frame = frame.float()
    frame = frame.mean(0, keepdim=True).lerp(frame, parameters["colour"])
    return (frame - 128) * parameters["contrast"] + 128


def develop(pictures, count, parameters, rng):
    """Brightness and noise: `count` float (3, height, width) in, uint8 (height, width, 3) out."""
    width, height = parameters["width"], parameters["height"]
    gain = np.linspace(*parameters["brightness"], count)
    # One field of noise, read from another place for each frame, is as good as fresh noise and much quicker.
    noise = torch.from_numpy(rng.standard_normal((3, height + 32, width + 32), dtype=np.float32))
    for picture, light, (row, column) in zip(pictures, gain, rng.integers(0, 33, (count, 2)), strict=True):
        picture *= light
        picture += parameters["noise"] * noise[:, row : row + height, column : column + width]
        yield picture.round_().clamp_(0, 255).byte().permute(1, 2, 0).contiguous().numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Clips out
# ---------------------------------------------------------------------------------------------------------------------


def frames_of_file(pictures, parameters):
    """
    The frames of a file and when each is shown. A picture is shown until the next has been taken, so that pictures of
    10 a second stand three times each in a file of 30.

    Args:
        pictures: an iterable of pictures, `picture_rate` a second, or of frames, `frame_rate` a second, if there is no
            such parameter.
        parameters: further `file_rate` (default: as many) and `jitter`, by which share of the time between two frames
            they are shown early or late.

    Yields: the picture and its time in milliseconds.
    """
    picture_rate = parameters.get("picture_rate", parameters["frame_rate"])
    file_rate = parameters.get("file_rate", picture_rate)
    jitter, number = parameters.get("jitter", 0.0), 0
    rng = np.random.default_rng(round(1e6 * jitter))
    for index, picture in enumerate(pictures, 1):
        while number * picture_rate < index * file_rate:  # before the next picture has been taken
            late = jitter * rng.uniform(-1, 1) * (number > 0)
            yield picture, round(1000 * (number + late) / file_rate)
            number += 1


def write_clip(path, frames, parameters):
    """
    Writes uint8 (H, W, 3) frames, or pictures that `frames_of_file` repeats, as H.264 in MP4, whole or not at all,
    with `parameters` as the comment tag.
    """
    rate = parameters.get("file_rate", parameters.get("picture_rate", parameters["frame_rate"]))
    temporary = Path(path).with_suffix(f".{os.getpid()}.part")
    try:
        with av.open(str(temporary), "w", format="mp4") as container:
            container.metadata["comment"] = json.dumps(parameters)
            stream = container.add_stream("libx264", rate=rate)
            stream.options = {"crf": str(parameters["crf"]), "preset": parameters["preset"]}
            stream.options |= {"x264-params": "mbtree=0"}  # with it, x264 writes other bytes each time
            stream.width, stream.height, stream.pix_fmt = parameters["width"], parameters["height"], "yuv420p"
            stream.thread_count = 1
            if parameters.get("jitter"):
                stream.codec_context.time_base = MILLISECOND
            for picture, time in frames_of_file(frames, parameters):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                if parameters.get("jitter"):
                    frame.pts, frame.time_base = time, MILLISECOND
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def plan_jobs(scenery, output, split, labels, clips_per_label, drawn_fraction, seed, pictures_per_clip=1):
    """
    One job a clip: output file, picture files (None: draw it), label, the clip's and the pictures' seed.

    Every label gets the same pictures as often as the others, so that pictures give nothing away.
    """
    split_seed = zlib.crc32(split.encode())
    rng = np.random.default_rng([seed, split_seed])
    jobs, order = [], []
    for number in range(clips_per_label):
        sources = []
        for _ in range(pictures_per_clip):
            order = order or list(rng.permutation(len(scenery)))
            sources.append(None if rng.random() < drawn_fraction else scenery[order.pop()])
        for index, label in enumerate(labels):
            path = output / split / label / f"{label.replace(' ', '-')}-{number:05d}.mp4"
            jobs.append((path, sources, label, (seed, split_seed, index, number), (seed, split_seed, number)))
    return jobs


def make_data_set(arguments, labels, make_clip, pictures_per_clip=1):
    """
    Makes the clips of one split, in several processes.

    Args:
        arguments (`argparse.Namespace`): from `clip_arguments.parse_arguments`.
        labels (`tuple[str]`): the classes.
        make_clip (`Callable`): makes the clip of one job of `plan_jobs`; a function of a module. It takes `storage`
            if the arguments have it.
        pictures_per_clip (`int`): picture files that a clip needs.
    """
    if "storage" in arguments:
        make_clip = functools.partial(make_clip, storage=arguments.storage)
    try:
        scenery = hold_out(find_scenery(arguments.scenery), arguments.split, arguments.held_out)
    except FileNotFoundError as error:
        sys.exit(str(error))
    folder = arguments.output / arguments.split
    if arguments.overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    elif not arguments.resume and folder.is_dir() and any(folder.iterdir()):
        sys.exit(f"{folder} is not empty. Add --resume to finish it or --overwrite to replace it.")

    jobs = plan_jobs(
        scenery,
        arguments.output,
        arguments.split,
        labels,
        arguments.clips_per_label,
        arguments.drawn_fraction,
        arguments.seed,
        pictures_per_clip,
    )
    missing = [job for job in jobs if not job[0].exists()]
    for label in labels:
        (folder / label).mkdir(parents=True, exist_ok=True)
    for unfinished in folder.rglob("*.part"):  # of a run that was killed
        unfinished.unlink()
    workers = min(arguments.num_workers, len(missing))
    if not missing:
        print(f"{folder}: all {len(jobs)} clips are there.")
        return
    with contextlib.ExitStack() as stack:
        made = map(make_clip, missing)
        if workers > 1:
            # Spawned, not forked: a fork would copy the state of libraries (PyTorch's threads) that do not survive it.
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(context.Pool(workers, initializer=torch.set_num_threads, initargs=(1,)))
            made = pool.imap_unordered(make_clip, missing, chunksize=len(labels))
        try:
            for _ in tqdm(made, total=len(missing), desc=f"{arguments.split} clips", unit="clip"):
                pass
        except (ValueError, OSError, av.FFmpegError) as error:
            sys.exit(f"{error}\nThe clips made so far are kept; add --resume to go on.")
    print(f"{folder}: {len(jobs)} clips, {len(labels)} labels, from {len(scenery)} images and videos.")
