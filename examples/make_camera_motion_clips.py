#!/usr/bin/env python
"""Makes labelled clips of camera motion by moving a virtual camera over still images or videos.

    python examples/make_camera_motion_clips.py pictures/ clips/ --split train --clips_per_label 1000

writes `clips/train/<label>/<label>-00000.mp4` ...: a data set in the layout that
`datasets.load_dataset("videofolder", data_dir="clips")` reads, with nine labels: static, pan left, pan right, tilt up,
tilt down, zoom in, zoom out, roll clockwise, roll counter-clockwise. The words speak of the camera: when it pans right
the scene moves left in the picture, when it tilts up the scene moves down, when it rolls clockwise the picture turns
counter-clockwise.

A clip's parameters are drawn from (seed, split, label, number) alone, so the same command makes the same clips with
any number of workers, and `--resume` finishes an interrupted run. They stand, as JSON, in the file's `comment` tag.
"""

import argparse
import contextlib
import functools
import json
import math
import multiprocessing
import os
import shutil
import sys
import zlib
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm


LABELS = (
    "static",
    "pan left",
    "pan right",
    "tilt up",
    "tilt down",
    "zoom in",
    "zoom out",
    "roll clockwise",
    "roll counter-clockwise",
)

# What the camera does in each label: the axis of its motion and the sign. The scenery has x to the right and y down.
MOTIONS = {
    "pan left": ("x", -1),
    "pan right": ("x", +1),
    "tilt up": ("y", -1),
    "tilt down": ("y", +1),
    "zoom in": ("zoom", +1),
    "zoom out": ("zoom", -1),
    "roll clockwise": ("roll", +1),
    "roll counter-clockwise": ("roll", -1),
}
AXES = ("x", "y", "zoom", "roll")

# One unit for all four axes: how far the picture moves on average over its area, in short sides of the picture, during
# WINDOW frames (16 frames at stride 2, what the model sees). A point of a square lies 0.3826 sides from the centre on
# average, so a zoom by exp(u / 0.3826) or a roll by u / 0.3826 radians moves the picture by about u.
WINDOW = 32
MEAN_RADIUS = 0.3826
AMOUNT = {"x": (0.06, 0.45), "y": (0.06, 0.45), "zoom": (0.055, 0.26), "roll": (0.055, 0.30)}
OFF_AXIS = 0.2  # at most this share of the main motion on each of the other three axes
STATIC_DRIFT = 0.006  # the same, for a static camera, which has no main motion to take a share of
SHAKE = 0.008  # amplitude of each of the hand's sine waves, on x, y and roll

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
VIDEO_SUFFIXES = {".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg"}
SCENERY_SIDE = 640  # scenery is shrunk to at most this many pixels on its longer side
SCENERY_FRAMES = 64  # at most this many consecutive frames of a video are used


def find_scenery(folder):
    """All images and videos under `folder`, sorted by path. Raises `FileNotFoundError` where there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder. Name a folder of still images or videos.")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES)
    if not paths:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))
        raise FileNotFoundError(f"No image or video found in {folder} or below it. Looked for {suffixes}.")
    return paths


# One worker makes all nine labels over one piece of scenery in a row, so a small cache saves most of the decoding.
@functools.lru_cache(maxsize=2)
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
        raise ValueError(f"{path} cannot be read as an image or a video: {error}. Mend or remove it.") from error
    if not frames:
        raise ValueError(f"{path} holds no video frame. Remove it.")
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


def draw_parameters(rng, label):
    """What is random about a clip of `label`, but for the scenery and the pieces in front: a dict JSON can hold."""
    short = int(rng.integers(60, 101)) * 2
    long = int(short * rng.choice([1.0, 4 / 3, 4 / 3, 16 / 9, 16 / 9])) // 2 * 2
    amount = dict.fromkeys(AXES, 0.0)
    off_axis = STATIC_DRIFT
    if label != "static":
        axis, sign = MOTIONS[label]
        low, high = AMOUNT[axis]
        amount[axis] = sign * float(np.exp(rng.uniform(np.log(low), np.log(high))))
        off_axis = OFF_AXIS * abs(amount[axis])
    for other in AXES:
        if amount[other] == 0:
            amount[other] = float(rng.uniform(-off_axis, off_axis) * rng.integers(2))
    return {
        "label": label,
        "width": short if (portrait := rng.random() < 0.15) else long,
        "height": long if portrait else short,
        "num_frames": int(rng.integers(WINDOW, 49)),
        "frame_rate": int(rng.choice([10, 12, 15, 20, 24, 25, 30])),
        "amount": amount,
        # The speed is 1 + depth * cos(...) times its mean: it swells and ebbs but never stops.
        "easing": {
            "depth": float(rng.uniform(0, 0.7)),
            "cycles": float(rng.uniform(0.25, 1.0)),
            "phase": float(rng.uniform(0, 2 * math.pi)),
        },
        "shake": float(rng.uniform(0, SHAKE) * (rng.random() < 0.7)),
        "view": float(rng.uniform(0.6, 1.0)),  # how much of the room the path leaves the camera's view takes
        "softness": float(rng.choice([1.0, 1.0, rng.uniform(1.0, 2.5)])),  # output pixels to a scenery pixel
        "shutter": float(rng.choice([0.0, 0.0, rng.uniform(0.3, 1.0)])),  # open for this share of a frame
        "pieces": int(rng.choice([0, 0, 1, 2, 3])),
        "scenery_plays": bool(rng.random() < 0.5),
        "brightness": (rng.uniform(0.65, 1.3) * (1 + rng.uniform(-0.15, 0.15) * np.r_[-1, 1])).tolist(),  # first, last
        "contrast": float(rng.uniform(0.6, 1.25)),
        "colour": 0.0 if rng.random() < 0.08 else float(rng.uniform(0.5, 1.2)),
        "noise": float(rng.choice([0.0, rng.uniform(0, 9)])),
        "crf": int(rng.integers(18, 35)),
        "preset": str(rng.choice(["ultrafast", "superfast", "veryfast"])),
    }


def camera_path(parameters, rng, substeps=1):
    """The camera at `num_frames * substeps` times: (x, y, log zoom, roll in radians), x and y in short sides."""
    count, easing = parameters["num_frames"], parameters["easing"]
    time = (np.arange(count)[:, None] + parameters["shutter"] * np.arange(substeps) / substeps).ravel()
    fine = np.linspace(0, count, 16 * count + 1)
    speed = 1 + easing["depth"] * np.cos(2 * math.pi * easing["cycles"] * fine / WINDOW + easing["phase"])
    travelled = np.r_[0, np.cumsum((speed[1:] + speed[:-1]) / 2 * np.diff(fine))]
    middle = (fine >= (count - WINDOW) / 2) & (fine <= (count + WINDOW) / 2)
    progress = np.interp(time, fine, travelled) / np.ptp(travelled[middle])
    path = np.stack([parameters["amount"][axis] * progress for axis in AXES], 1)
    for axis in (0, 1, 3):
        for _ in range(3):
            period = np.exp(rng.uniform(np.log(4), np.log(20)))  # frames
            amplitude = rng.uniform(0, 1) * parameters["shake"] * min(1, period / 10)
            path[:, axis] += amplitude * np.sin(2 * math.pi * (time / period + rng.random()))
    return path / (1, 1, MEAN_RADIUS, MEAN_RADIUS)


def render(scenery, parameters, rng):
    """What the camera sees, frame by frame.

    Args:
        scenery: uint8 (F, 3, H, W); more than one frame is a video, which plays underneath where `scenery_plays`.
        parameters: what `draw_parameters` gives.
        rng: `numpy.random.Generator` for the shake, the place in the scenery, the pieces in front and the noise.

    Yields: `num_frames` times uint8 (height, width, 3).
    """
    width, height, count = parameters["width"], parameters["height"], parameters["num_frames"]
    substeps = 3 if parameters["shutter"] else 1
    x, y, zoom, roll = camera_path(parameters, rng, substeps).T
    # Column 0 of `axes` is where the camera's right points in the scenery, column 1 its down, after rolling clockwise.
    axes = np.stack([np.cos(roll), -np.sin(roll), np.sin(roll), np.cos(roll)], 1).reshape(-1, 2, 2)
    axes = axes * np.exp(-zoom)[:, None, None]
    place = np.stack([x, y], 1) * min(width, height)
    corners = np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]]) * (width / 2, height / 2)
    swept = (place[:, None] + np.einsum("tij,cj->tci", axes, corners)).reshape(-1, 2)
    low, high = swept.min(0), swept.max(0)

    # The view is made as large as the path allows, so that it never leaves the scenery.
    side = np.array(scenery.shape[:1:-1])  # width, height
    scale = parameters["view"] * min(side / (high - low))
    origin = (side - scale * (high - low)) * rng.random(2) - scale * low
    # Scenery coordinates from -1 to 1 (grid_sample's) of a point of the picture, u and v from -1 to 1:
    # centre + to_right * u + to_down * v.
    centre = torch.from_numpy(2 * (origin + scale * place) / side - 1).float()
    to_right, to_down = torch.from_numpy(scale * axes * (width, height) / side[:, None]).float().unbind(2)
    u = ((torch.arange(width) + 0.5) * 2 / width - 1)[:, None]
    v = ((torch.arange(height) + 0.5) * 2 / height - 1)[:, None, None]

    def view(frame, step):
        grid = (centre[step] + to_right[step] * u) + to_down[step] * v
        return torch.nn.functional.grid_sample(frame[None], grid[None], padding_mode="border", align_corners=False)[0]

    # Forth and back, where the video is shorter than the clip.
    turn, there_and_back = rng.integers(len(scenery)), max(1, 2 * len(scenery) - 2)
    turn = (turn + parameters["scenery_plays"] * np.arange(count)) % there_and_back
    used, turn = np.unique(np.minimum(turn, there_and_back - turn) % len(scenery), return_inverse=True)
    # Shrunk to about one pixel of the output, or to fewer where the picture is to be soft.
    size = [max(2, round(length / max(1.0, scale * parameters["softness"]))) for length in scenery.shape[2:]]
    frames = [_colour(frame, parameters) for frame in resize(scenery[used], size, antialias=True)]

    pieces = [_cut_piece(frames[0], width, height, rng) for _ in range(parameters["pieces"])]
    gain = np.linspace(*parameters["brightness"], count)
    # One field of noise, read from another place for each frame, is as good as fresh noise and much quicker.
    noise = torch.from_numpy(rng.standard_normal((3, height + 32, width + 32), dtype=np.float32))
    noise_place = rng.integers(0, 33, (count, 2))
    for index in range(count):
        picture = view(frames[turn[index]], index * substeps)
        for step in range(1, substeps):
            picture += view(frames[turn[index]], index * substeps + step)
        picture /= substeps
        for piece in pieces:
            _paste_piece(picture, index - count / 2, *piece)
        picture *= gain[index]
        row, column = noise_place[index]
        picture += parameters["noise"] * noise[:, row : row + height, column : column + width]
        yield picture.round_().clamp_(0, 255).byte().permute(1, 2, 0).contiguous().numpy()


def _colour(frame, parameters):
    """Saturation and contrast: uint8 (3, H, W) in, float (3, H, W) out."""
    frame = frame.float()
    frame = frame.mean(0, keepdim=True).lerp(frame, parameters["colour"])
    return (frame - 128) * parameters["contrast"] + 128


def _cut_piece(source, width, height, rng):
    """An ellipse or a box from `source` (3, H, W), its mask, its place (row, column) half way, and its way a frame."""
    short = min(height, width)
    h, w = np.minimum(rng.uniform(0.1, 0.32, 2) * short, source.shape[1:]).astype(int).tolist()
    top, left = rng.integers(source.shape[1] - h + 1), rng.integers(source.shape[2] - w + 1)
    colour = torch.from_numpy(rng.uniform(0.4, 1.4, 3)).float()[:, None, None]
    piece = source[:, top : top + h, left : left + w].flip(2) * colour
    v, u = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    mask = (u**2 + v**2 <= 1).float() if rng.random() < 0.6 else torch.ones(h, w)
    angle, speed = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.6) * short / WINDOW
    place = rng.random(2) * (height, width) - (h / 2, w / 2)
    return piece, mask, place, speed * np.array([math.sin(angle), math.cos(angle)])


def _paste_piece(picture, time, piece, mask, place, way):
    """Puts a piece over `picture` (3, H, W), in place, where it is `time` frames after the middle of the clip."""
    (height, width), (h, w) = picture.shape[1:], mask.shape
    row, column = np.round(place + time * way).astype(int).tolist()
    top, bottom, left, right = max(0, row), min(height, row + h), max(0, column), min(width, column + w)
    if top < bottom and left < right:
        rows, columns = slice(top - row, bottom - row), slice(left - column, right - column)
        under = picture[:, top:bottom, left:right]
        under.lerp_(piece[:, rows, columns], mask[rows, columns].expand_as(under))


def write_clip(path, frames, parameters):
    """Writes uint8 (H, W, 3) frames as H.264 in MP4, whole or not at all, with `parameters` as the comment tag."""
    temporary = Path(path).with_suffix(f".{os.getpid()}.part")
    try:
        with av.open(str(temporary), "w", format="mp4") as container:
            container.metadata["comment"] = json.dumps(parameters)
            stream = container.add_stream("libx264", rate=parameters["frame_rate"])
            stream.options = {"crf": str(parameters["crf"]), "preset": parameters["preset"]}
            stream.options |= {"x264-params": "mbtree=0"}  # with it, x264 writes other bytes each time
            stream.width, stream.height, stream.pix_fmt = parameters["width"], parameters["height"], "yuv420p"
            stream.thread_count = 1
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_demo_clip(path, motion="pan right", seed=0):
    """Writes a two-second clip of one camera motion over a drawn picture: 320x240 H.264 in MP4, 24 frames a second.

    Args:
        path: the file to write.
        motion: one of `LABELS`.
        seed: draws another picture and another path.
    """
    if motion not in LABELS:
        raise ValueError(f"motion={motion!r} is not a camera motion. Choose one of {', '.join(LABELS)}.")
    rng = np.random.default_rng([seed, LABELS.index(motion)])
    parameters = draw_parameters(rng, motion) | {"width": 320, "height": 240, "num_frames": 48, "frame_rate": 24}
    parameters |= {"softness": 1.0, "noise": 0.0, "crf": 23, "brightness": [1.0, 1.0], "contrast": 1.0, "colour": 1.0}
    parameters |= {"pieces": 0, "shutter": 0.0}
    for axis in AXES:
        middle = math.sqrt(math.prod(AMOUNT[axis]))
        is_main = motion != "static" and axis == MOTIONS[motion][0]
        parameters["amount"][axis] = MOTIONS[motion][1] * middle if is_main else 0.0
    write_clip(path, render(draw_scenery(rng), parameters, rng), parameters)


def make_clip(job):
    """Makes one clip. `job`: output file, scenery file (None: draw it), label, the clip's and the scenery's seed."""
    path, scenery, label, seed, scenery_seed = job
    rng = np.random.default_rng(seed)
    parameters = draw_parameters(rng, label)
    frames = draw_scenery(rng) if scenery is None else read_scenery(scenery, scenery_seed)
    parameters["scenery"] = "drawn" if scenery is None else scenery.name
    write_clip(path, render(frames, parameters, rng), parameters)


def plan_jobs(scenery, output, split, clips_per_label, drawn_fraction, seed):
    """One job a clip. Every label gets the same scenery as often as the others, so that scenery gives nothing away."""
    split_seed = zlib.crc32(split.encode())
    rng = np.random.default_rng([seed, split_seed])
    jobs, order = [], []
    for number in range(clips_per_label):
        order = order or list(rng.permutation(len(scenery)))
        source = None if rng.random() < drawn_fraction else scenery[order.pop()]
        for index, label in enumerate(LABELS):
            path = output / split / label / f"{label.replace(' ', '-')}-{number:05d}.mp4"
            jobs.append((path, source, label, (seed, split_seed, index, number), (seed, split_seed, number)))
    return jobs


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scenery", help="Folder of still images or videos, and its sub-folders.")
    parser.add_argument("output", type=Path, help="Folder of the data set; the clips go to OUTPUT/SPLIT/LABEL/.")
    parser.add_argument("--split", default="train", choices=["train", "validation", "test"])
    parser.add_argument("--clips_per_label", type=int, default=100, help="Nine times as many clips are made.")
    parser.add_argument("--drawn_fraction", type=float, default=0.0, help="Share of clips over drawn pictures.")
    parser.add_argument("--seed", type=int, default=0, help="The same seed makes the same clips.")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="Processes that make clips.")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="Keep the clips that are there and make the others.")
    group.add_argument("--overwrite", action="store_true", help="Delete OUTPUT/SPLIT first.")
    arguments = parser.parse_args()

    if arguments.clips_per_label < 1 or arguments.num_workers < 1 or not 0 <= arguments.drawn_fraction <= 1:
        parser.error("--clips_per_label and --num_workers must be at least 1, --drawn_fraction between 0 and 1.")
    try:
        scenery = find_scenery(arguments.scenery)
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
        arguments.clips_per_label,
        arguments.drawn_fraction,
        arguments.seed,
    )
    missing = [job for job in jobs if not job[0].exists()]
    for label in LABELS:
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
            made = pool.imap_unordered(make_clip, missing, chunksize=len(LABELS))
        try:
            for _ in tqdm(made, total=len(missing), desc=f"{arguments.split} clips", unit="clip"):
                pass
        except (ValueError, OSError, av.FFmpegError) as error:
            sys.exit(f"{error}\nThe clips made so far are kept; add --resume to go on.")
    print(f"{folder}: {len(jobs)} clips, {len(LABELS)} labels, from {len(scenery)} images and videos.")


if __name__ == "__main__":
    main()
