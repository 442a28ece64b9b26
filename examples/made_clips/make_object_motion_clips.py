#!/usr/bin/env python
"""Makes labelled clips of moving objects, in the manner of Something-Something: most pairs differ in time alone.

    python examples/made_clips/make_object_motion_clips.py pictures/ clips/ --split train --clips_per_label 100
    python examples/made_clips/make_object_motion_clips.py pictures/ clips/ --split validation --clips_per_label 25

writes `clips/train/<label>/<label>-00000.mp4` ...: a data set in the layout that
`datasets.load_dataset("videofolder", data_dir="clips")` reads, with sixteen labels. Objects are cut from pictures and
put before other pictures. A hand holds the camera, and up to two distractors stand or drift. A fifth of the pictures
(`--held_out`) is for the splits validation and test alone.

A clip's parameters are drawn from (seed, split, label, number) alone, so the same command makes the same clips with
any number of workers, and `--resume` finishes an interrupted run. The file's `comment` tag holds them as JSON.
"""

import math
import sys

import clip_arguments


LABELS = (
    "X moves left",
    "X moves right",
    "X moves up",
    "X moves down",
    "X comes nearer",
    "X goes away",
    "X appears from behind Y",
    "X hides behind Y",
    "X and Y meet",
    "X and Y part",
    "X hits Y and Y moves",
    "X stops before Y",
    "X turns clockwise",
    "X turns counter-clockwise",
    "X is dropped",
    "X is thrown up",
)


def parse_arguments():
    return clip_arguments.parse_arguments(__doc__, LABELS, held_out=0.2)


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    parse_arguments()  # before the imports below, which take seconds

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torchvision.transforms.v2.functional import resize

from clip_generation import (
    SHAKE,
    WINDOW,
    colour,
    develop,
    draw_look,
    draw_scenery,
    hand_shake,
    make_data_set,
    read_scenery,
    write_clip,
)


# Each label whose clips, played backwards, show the other one. Of the two left, a hit played backwards is a hit in
# which X and Y have traded places, and what stops before Y would start beside Y.
REVERSED = {
    "X moves right": "X moves left",
    "X moves down": "X moves up",
    "X goes away": "X comes nearer",
    "X appears from behind Y": "X hides behind Y",
    "X and Y part": "X and Y meet",
    "X turns counter-clockwise": "X turns clockwise",
    "X is thrown up": "X is dropped",
}
PICTURES_PER_CLIP = 5  # scenery, X, Y and two distractors


def draw_parameters(rng, label):
    """
    What is random about a clip of `label`, but for its pictures: a dict that JSON can hold.

    Lengths are in short sides of the picture, x to the right and y down from its middle; times are shares of the
    WINDOW frames in the middle of the clip.
    """
    short = int(rng.integers(60, 81)) * 2
    long = int(short * rng.choice([1.0, 1.0, 4 / 3, 4 / 3, 16 / 9])) // 2 * 2
    portrait = rng.random() < 0.15
    return {
        "label": label,
        "width": short if portrait else long,
        "height": long if portrait else short,
        "num_frames": int(rng.integers(WINDOW, 41)),
        "frame_rate": int(rng.choice([10, 12, 15, 20, 24, 25, 30])),
        "action": draw_action(rng, label),
        "distractors": [_draw_distractor(rng) for _ in range(rng.integers(3))],
        "shake": float(rng.uniform(0, SHAKE) * (rng.random() < 0.7)),
        "softness": float(rng.uniform(1.0, 2.5)),  # output pixels to a scenery pixel
        "shutter": float(rng.choice([0.0, 0.0, 0.0, rng.uniform(0.3, 1.0)])),  # open for this share of a frame
        **draw_look(rng),
    }


def draw_action(rng, label):
    """Sizes, places and times of an action: a dict of numbers, which `trajectories` reads."""
    hidden = REVERSED.get(label, label) == "X hides behind Y"
    size = float(rng.uniform(0.22, 0.3) if hidden else rng.uniform(0.26, 0.4))
    return {
        "size": size,  # of X: the longer side of its picture
        "size_of_y": float(size * (rng.uniform(1.45, 1.7) if hidden else rng.uniform(0.85, 1.15))),
        "begin": float(rng.uniform(0.0, 0.15)),
        "end": float(rng.uniform(0.85, 1.0)),
        "bend": float(rng.uniform(-0.35, 0.35)),  # the speed falls (or rises) by this share from its mean to the end
        "distance": float(rng.uniform(0.4, 0.75)),
        "angle": float(rng.choice([0, math.pi]) + rng.uniform(-0.5, 0.5)),  # of the way from X to Y, clockwise
        "slant": float(rng.uniform(-0.08, 0.08)),  # what a move to one side goes to the other
        "tilt": float(rng.uniform(-0.4, 0.4)),  # radians by which X stands turned, and Y the other way
        "x": float(rng.uniform(-0.1, 0.1)),
        "y": float(rng.uniform(-0.1, 0.1)),
        "zoom": float(rng.uniform(0.55, 1.05)),  # logarithm of how much larger what comes nearer gets
        "turn": float(rng.uniform(1.0, 3.2)),  # radians
        "gap": float(rng.uniform(0.08, 0.15)),  # that X leaves where it stops before Y
        "touch": float(rng.uniform(0.4, 0.6)),  # when X reaches Y, or stops before it
        "touching": size,  # between the middles of X and Y when they touch: `render` measures it
    }


def _draw_distractor(rng):
    """Size, place and drift of a thing that has nothing to do with the label."""
    angle, way = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.1) * rng.integers(2)
    return {
        "size": float(rng.uniform(0.12, 0.22)),
        "x": float(rng.uniform(-0.6, 0.6)),
        "y": float(rng.uniform(-0.45, 0.45)),
        "drift_x": float(way * math.cos(angle)),
        "drift_y": float(way * math.sin(angle)),
        "tilt": float(rng.uniform(-0.4, 0.4)),
    }


def trajectories(label, action, time):
    """
    Where the things of an action are.

    Args:
        label (`str`): one of `LABELS`.
        action (`dict`): what `draw_action` gives.
        time (`numpy.ndarray`): shares of the window, 0 to 1; before and after, things stay where they are.

    Returns:
        `dict[str, numpy.ndarray]`: for "X", and "Y" if there is one, an array of shape `(4, *time.shape)`: the place
        x and y, the logarithm of the size as a multiple of the own one, and the turn in radians, clockwise.
    """
    if label in REVERSED:
        return trajectories(REVERSED[label], action, 1 - time)
    time = np.clip((time - action["begin"]) / (action["end"] - action["begin"]), 0, 1)
    steady = time + action["bend"] * time * (1 - time)  # from 0 to 1; never stands nor turns round
    way, touching, touch = action["distance"], action["touching"], action["touch"]
    x, y, zoom, turn = action["x"], action["y"], 0.0, action["tilt"]
    first = second = None  # where X and Y are on the line from X to Y
    if label == "X moves left":
        x, y = x - way * (steady - 0.5), y + action["slant"] * (steady - 0.5)
    elif label == "X moves up":
        x, y = x + action["slant"] * (steady - 0.5), y - way * (steady - 0.5)
    elif label == "X comes nearer":
        zoom = action["zoom"] * (steady - 0.5)
    elif label == "X turns clockwise":
        turn = turn + action["turn"] * (steady - 0.5)
    elif label == "X is dropped":  # held, then falls with constant acceleration, then lies
        x, y = x + action["slant"] * time, y + (0.3 + 0.6 * way) * (np.clip((time - 0.15) / 0.65, 0, 1) ** 2 - 0.5)
    elif label == "X hides behind Y":
        second = (touching + way / 4) / 2
        first = second - (touching + way / 4) * (1 - steady)
    elif label == "X and Y meet":
        second = touching / 2 + 0.3 * way * (1 - steady)
        first = -second
    elif label == "X hits Y and Y moves":  # X stands still when it has given its motion to Y
        first = -touching / 2 - 0.45 * way * np.clip(1 - time / touch, 0, 1)
        second = touching / 2 + 0.45 * way * np.clip((time - touch) / (1 - touch), 0, 1)
    elif label == "X stops before Y":
        second = (touching + action["gap"]) / 2
        first = -second - 0.45 * way * np.clip(1 - time / touch, 0, 1)
    else:
        raise ValueError(f"{label!r} is not an action. Choose one of {', '.join(LABELS)}.")
    if first is None:
        return {"X": np.stack(np.broadcast_arrays(x, y, zoom, turn, time)[:4])}
    right, down = math.cos(action["angle"]), math.sin(action["angle"])
    return {
        name: np.stack(np.broadcast_arrays(x + place * right, y + place * down, zoom, tilt, time)[:4])
        for name, place, tilt in (("X", first, turn), ("Y", second, -turn))
    }


def cut_object(picture, rng, box=False):
    """
    A thing cut from a picture, with a soft edge.

    A thing before a plain ground is cut along its outline; of another picture, the middle becomes an ellipse, a box
    with round corners or a blob.

    Args:
        picture: uint8 (3, H, W).
        rng: `numpy.random.Generator` for the shape.
        box: cut a square with round corners, to hide things behind.

    Returns:
        float (4, h, w): red, green and blue from 0 to 255, times the opacity, and the opacity.
    """
    height, width = picture.shape[1:]
    outline = None if box else _outline(picture)
    if outline is not None:
        rows, columns = (np.flatnonzero(outline.any(axis)) for axis in (1, 0))
        part = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        mask = torch.from_numpy(outline[part]).float()
        cut = picture[:, part[0], part[1]]
    else:
        aspect = 1.0 if box else float(np.clip(width / height, 0.75, 1.33))  # width to height
        h = int(min(height, width / aspect) * rng.uniform(0.75, 0.95))
        w = min(width, int(h * aspect))
        cut = picture[:, (height - h) // 2 : (height - h) // 2 + h, (width - w) // 2 : (width - w) // 2 + w]
        v, u = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
        shape = "box" if box else rng.choice(["ellipse", "box", "blob"])
        if shape == "blob":
            angle, radius = torch.atan2(v, u), torch.hypot(u, v)
            waves = sum(rng.uniform(0, 0.09) * torch.cos(k * angle + rng.uniform(0, 2 * math.pi)) for k in (2, 3, 5))
            mask = (radius <= 0.82 + waves).float()
        else:
            power = 8 if shape == "box" else 2
            mask = (u.abs() ** power + v.abs() ** power <= 1).float()
    scale = 96 / max(mask.shape)
    size = [max(8, round(side * scale)) for side in mask.shape]
    # A transparent rim, so that the edge is soft on all sides.
    mask = F.pad(resize(mask[None], size, antialias=True), (2, 2, 2, 2))
    mask = F.avg_pool2d(mask, 3, stride=1, padding=1)
    cut = F.pad(resize(cut, size, antialias=True)[None].float(), (2, 2, 2, 2), mode="replicate")[0]
    return torch.cat([cut * mask, mask])


def _outline(picture):
    """Where a picture (3, H, W) differs from its plain border, as bool (H, W); None if the border is not plain."""
    pixels = picture.permute(1, 2, 0).numpy().astype(np.int16)
    depth = 1 + min(pixels.shape[:2]) // 40
    border = np.concatenate(
        [edge.reshape(-1, 3) for edge in (pixels[:depth], pixels[-depth:], pixels[:, :depth], pixels[:, -depth:])]
    )
    ground = np.median(border, axis=0)
    if (np.abs(border - ground).max(1) < 20).mean() < 0.9:
        return None
    differs = Image.fromarray((np.abs(pixels - ground).max(2) > 24).astype(np.uint8) * 255)
    for smooth in (ImageFilter.MedianFilter(5), ImageFilter.MaxFilter(5), ImageFilter.MinFilter(5)):
        differs = differs.filter(smooth)
    mask = np.asarray(differs) > 0
    return mask if 0.15 < mask.mean() < 0.85 else None


def reach(thing, size, turn, angle):
    """How far a thing of `size`, turned by `turn`, reaches from its middle in the direction `angle`, in its unit."""
    rows, columns = np.nonzero(thing[3].numpy() > 0.5)
    height, width = thing.shape[1:]
    right, down = columns + 0.5 - width / 2, rows + 0.5 - height / 2
    along = np.cos(angle - turn) * right + np.sin(angle - turn) * down
    return float(along.max() * size / max(height, width))


def render(pictures, parameters, rng):
    """
    The clip, frame by frame.

    Args:
        pictures: five of uint8 (3, H, W): scenery, X, Y and two distractors.
        parameters: what `draw_parameters` gives.
        rng: `numpy.random.Generator` for the place in the scenery, the shapes, the shake and the noise.

    Yields: `num_frames` times uint8 (height, width, 3).
    """
    label, action = parameters["label"], dict(parameters["action"])
    width, height, count = parameters["width"], parameters["height"], parameters["num_frames"]
    short, substeps = min(width, height), 3 if parameters["shutter"] else 1
    frame = (np.arange(count)[:, None] + parameters["shutter"] * np.arange(substeps) / substeps).ravel()
    time = (frame + 0.5 - count / 2) / WINDOW + 0.5

    hides = REVERSED.get(label, label) == "X hides behind Y"
    pictures = [colour(picture, parameters).clamp(0, 255).byte() for picture in pictures]
    cuts = {"X": cut_object(pictures[1], rng), "Y": cut_object(pictures[2], rng, box=hides)}
    sizes, tilt, angle = {"X": action["size"], "Y": action["size_of_y"]}, action["tilt"], action["angle"]
    action["touching"] = reach(cuts["X"], sizes["X"], tilt, angle)
    action["touching"] += reach(cuts["Y"], sizes["Y"], -tilt, angle + math.pi)
    things = []  # from the farthest to the nearest: (cut, size, path)
    for distractor, picture in zip(parameters["distractors"], pictures[3:], strict=False):
        path = [distractor[axis] + distractor[f"drift_{axis}"] * (time - 0.5) for axis in ("x", "y")]
        path += [0 * time, 0 * time + distractor["tilt"]]
        things.append((cut_object(picture, rng), distractor["size"], np.stack(path)))
    things += [(cuts[name], sizes[name], path) for name, path in trajectories(label, action, time).items()]

    shake = np.stack([hand_shake(frame, parameters["shake"], rng) for _ in range(3)])
    shake[2] *= 2  # radians that move the rim of the picture about as far
    scenery = _place_scenery(pictures[0], parameters, rng)

    def see(step):
        x, y, roll = shake[:, step]
        turned = np.array([[math.cos(roll), math.sin(roll)], [-math.sin(roll), math.cos(roll)]])
        picture = _see_scenery(scenery, width, height, turned.T, np.array([x, y]))
        for thing, size, path in things:
            place_x, place_y, zoom, turn = path[:, step]
            centre = turned @ (place_x - x, place_y - y) * short + (width / 2, height / 2)
            _paste(picture, thing, centre, size * short * math.exp(zoom), turn - roll)
        return picture

    def frames():
        for index in range(count):
            yield sum(see(index * substeps + step) for step in range(substeps)) / substeps

    yield from develop(frames(), parameters["num_frames"], parameters, rng)


def _place_scenery(picture, parameters, rng):
    """A part of the picture, soft, as large as the frame and a rim of an eighth of its short side: float (3, h, w)."""
    rim = min(parameters["width"], parameters["height"]) // 8
    height, width = parameters["height"] + 2 * rim, parameters["width"] + 2 * rim
    scale = rng.uniform(0.7, 1.0) * min(picture.shape[1] / height, picture.shape[2] / width)
    h, w = max(2, int(height * scale)), max(2, int(width * scale))
    top, left = rng.integers(picture.shape[1] - h + 1), rng.integers(picture.shape[2] - w + 1)
    part = picture[:, top : top + h, left : left + w]
    soft = [max(2, round(side / parameters["softness"])) for side in (height, width)]
    return resize(resize(part, soft, antialias=True), [height, width]).float()


def _see_scenery(scenery, width, height, turned, place):
    """What a camera turned by the matrix `turned`, at `place` in short sides, sees: float (3, height, width)."""
    rows, columns = scenery.shape[1:]
    matrix = turned * (width, height) / np.array([[columns], [rows]])
    shift = 2 * place * min(width, height) / (columns, rows)
    if not place.any() and np.allclose(turned, np.eye(2)):
        top, left = (rows - height) // 2, (columns - width) // 2
        return scenery[:, top : top + height, left : left + width].clone()
    theta = torch.from_numpy(np.concatenate([matrix, shift[:, None]], 1)).float()[None]
    grid = F.affine_grid(theta, (1, 3, height, width), align_corners=False)
    return F.grid_sample(scenery[None], grid, padding_mode="border", align_corners=False)[0]


def _paste(picture, thing, centre, size, turn):
    """Puts a thing over `picture` (3, H, W), in place; `centre` (x, y) and `size` in pixels, `turn` clockwise."""
    (height, width), (h, w) = picture.shape[1:], np.array(thing.shape[1:]) * size / max(thing.shape[1:])
    cos, sin = math.cos(turn), math.sin(turn)
    spread = 0.5 * np.array([abs(cos) * w + abs(sin) * h, abs(sin) * w + abs(cos) * h])
    left, top = np.maximum(np.floor(centre - spread), 0).astype(int)
    right, bottom = np.minimum(np.ceil(centre + spread), (width, height)).astype(int)
    if left >= right or top >= bottom:
        return
    x = torch.arange(left, right) + 0.5 - centre[0]
    y = (torch.arange(top, bottom) + 0.5 - centre[1])[:, None]
    grid = torch.stack([(cos * x + sin * y) * (2 / w), (cos * y - sin * x) * (2 / h)], -1).float()
    seen = F.grid_sample(thing[None], grid[None], align_corners=False)[0]
    under = picture[:, top:bottom, left:right]
    under.mul_(1 - seen[3:]).add_(seen[:3])


def make_clip(job):
    """Makes one clip. `job`: output file, five picture files (None: draw it), label, the clip's and a picture seed."""
    path, sources, label, seed, picture_seed = job
    rng = np.random.default_rng(seed)
    parameters = draw_parameters(rng, label)
    pictures = [draw_scenery(rng) if source is None else read_scenery(source, picture_seed) for source in sources]
    parameters["pictures"] = ["drawn" if source is None else source.name for source in sources]
    write_clip(path, render([frames[0] for frames in pictures], parameters, rng), parameters)


if __name__ == "__main__":
    make_data_set(parse_arguments(), LABELS, make_clip, PICTURES_PER_CLIP)
