#!/usr/bin/env python
"""Makes labelled clips of camera motion by moving a virtual camera over still images or videos.

    python examples/made_clips/make_camera_motion_clips.py pictures/ clips/ --split train --clips_per_label 1000

writes `clips/train/<label>/<label>-00000.mp4` ...: a data set in the layout that
`datasets.load_dataset("videofolder", data_dir="clips")` reads, with nine labels: static, pan left, pan right, tilt up,
tilt down, zoom in, zoom out, roll clockwise, roll counter-clockwise. The labels name the camera's motion:
when it pans right the scene moves left in the picture, when it tilts up the scene moves down, when it rolls clockwise
the picture turns counter-clockwise.

A clip's parameters are drawn from (seed, split, label, number) alone, so the same command makes the same clips with
any number of workers, and `--resume` finishes an interrupted run. The file's `comment` tag holds them as JSON.

`--storage varied` keeps each clip's motion in time, but stores it as files are found: 5 to 60 pictures a second, in
files of as many frames a second or, with pictures repeated, of more, at even or uneven times.
"""

import math
import sys

import clip_arguments


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


def parse_arguments():
    return clip_arguments.parse_arguments(__doc__, LABELS, storages=("plain", "varied"))


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    parse_arguments()  # before the imports below, which take seconds

import numpy as np
import torch
from torchvision.transforms.v2.functional import resize

from clip_generation import (
    SHAKE,
    WINDOW,
    colour,
    develop,
    draw_look,
    draw_scenery,
    draw_storage,
    hand_shake,
    make_data_set,
    read_scenery,
    write_clip,
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
MEAN_RADIUS = 0.3826
AMOUNT = {"x": (0.06, 0.45), "y": (0.06, 0.45), "zoom": (0.055, 0.26), "roll": (0.055, 0.30)}
OFF_AXIS = 0.2  # at most this share of the main motion on each of the other three axes
STATIC_DRIFT = 0.006  # the same, for a static camera, which has no main motion to take a share of


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
        **draw_look(rng),
    }


def picture_times(parameters):
    """When each picture is taken, and how long the shutter is open: in frames of `frame_rate` a second."""
    distance = parameters["frame_rate"] / parameters.get("picture_rate", parameters["frame_rate"])
    count = max(2, round(parameters["num_frames"] / distance))
    return distance * np.arange(count), parameters["shutter"] * min(1, distance)


def camera_path(parameters, rng, substeps=1):
    """The camera at `substeps` times of each picture: (x, y, log zoom, roll in radians), x and y in short sides."""
    count, easing = parameters["num_frames"], parameters["easing"]
    times, open_for = picture_times(parameters)
    time = (times[:, None] + open_for * np.arange(substeps) / substeps).ravel()
    fine = np.linspace(0, count, 16 * count + 1)
    speed = 1 + easing["depth"] * np.cos(2 * math.pi * easing["cycles"] * fine / WINDOW + easing["phase"])
    travelled = np.r_[0, np.cumsum((speed[1:] + speed[:-1]) / 2 * np.diff(fine))]
    middle = (fine >= (count - WINDOW) / 2) & (fine <= (count + WINDOW) / 2)
    progress = np.interp(time, fine, travelled) / np.ptp(travelled[middle])
    parts = [(parameters["amount"], progress)]
    if "then" in parameters:  # another motion, from the middle on
        half = np.interp(count / 2, fine, travelled) / np.ptp(travelled[middle])
        parts = [(parameters["amount"], progress.clip(max=half)), (parameters["then"], (progress - half).clip(min=0))]
    path = sum(np.stack([amount[axis] * along for axis in AXES], 1) for amount, along in parts)
    for axis in (0, 1, 3):
        path[:, axis] += hand_shake(time, parameters["shake"], rng)
    return path / (1, 1, MEAN_RADIUS, MEAN_RADIUS)


def render(scenery, parameters, rng):
    """What the camera sees, frame by frame.

    Args:
        scenery: uint8 (F, 3, H, W); more than one frame is a video, which plays underneath where `scenery_plays`.
        parameters: what `draw_parameters` gives.
        rng: `numpy.random.Generator` for the shake, the place in the scenery, the pieces in front and the noise.

    Yields: uint8 (height, width, 3), one for each of `picture_times`.
    """
    width, height = parameters["width"], parameters["height"]
    times, _ = picture_times(parameters)
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
    turn = (turn + parameters["scenery_plays"] * times.astype(int)) % there_and_back
    used, turn = np.unique(np.minimum(turn, there_and_back - turn) % len(scenery), return_inverse=True)
    # Shrunk to about one pixel of the output, or to fewer where the picture is to be soft.
    size = [max(2, round(length / max(1.0, scale * parameters["softness"]))) for length in scenery.shape[2:]]
    frames = [colour(frame, parameters) for frame in resize(scenery[used], size, antialias=True)]

    pieces = [_cut_piece(frames[0], width, height, rng) for _ in range(parameters["pieces"])]

    def pictures():
        for index, time in enumerate(times):
            picture = view(frames[turn[index]], index * substeps)
            for step in range(1, substeps):
                picture += view(frames[turn[index]], index * substeps + step)
            picture /= substeps
            for piece in pieces:
                _paste_piece(picture, time - parameters["num_frames"] / 2, *piece)
            yield picture

    yield from develop(pictures(), len(times), parameters, rng)


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


def make_clip(job, storage="plain"):
    """Makes one clip. `job`: output file, scenery file (None: draw it), label, the clip's and the scenery's seed."""
    path, (scenery,), label, seed, scenery_seed = job
    rng = np.random.default_rng(seed)
    parameters = draw_parameters(rng, label)
    if storage == "varied":  # a generator of its own: all else is drawn as for a plain clip
        parameters |= draw_storage(np.random.default_rng((*seed, 1)))
    frames = draw_scenery(rng) if scenery is None else read_scenery(scenery, scenery_seed)
    parameters["scenery"] = "drawn" if scenery is None else scenery.name
    write_clip(path, render(frames, parameters, rng), parameters)


if __name__ == "__main__":
    make_data_set(parse_arguments(), LABELS, make_clip)
