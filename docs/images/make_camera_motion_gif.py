#!/usr/bin/env python
"""Makes camera_motion.gif: three clips of a virtual camera over photographs, and what the shipped model says of them.

    python docs/images/make_camera_motion_gif.py caltech101

`caltech101` is the folder of Caltech-101's classes (https://data.caltech.edu/records/mzrjq-6wc02, CC BY 4.0). None of
its pictures was in the model's training data.
"""

import argparse
import sys
import tempfile
from pathlib import Path


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("caltech101", help="the folder of the classes, with its pictures in it")
    return parser.parse_args()


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    parse_arguments()  # before the imports below, which take seconds

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from transformers import pipeline


HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "made_clips")]

from clip_generation import read_scenery, write_clip  # noqa: E402
from make_camera_motion_clips import AXES, MOTIONS, draw_parameters, render  # noqa: E402
from modeling_videomamba.video_decoding import decode_video  # noqa: E402


CLIPS = [  # picture, motion, its size in short sides of the frame
    ("helicopter/image_0067.jpg", "pan right", 0.35),
    ("elephant/image_0008.jpg", "zoom in", 0.16),
    ("joshua_tree/image_0023.jpg", "roll clockwise", 0.18),
]
WIDTH, HEIGHT, FRAMES, STRIP, GAP = 216, 144, 32, 26, 6


def write_camera_clip(path, picture, motion, size):
    rng = np.random.default_rng(0)
    parameters = draw_parameters(rng, motion) | {"width": WIDTH, "height": HEIGHT, "num_frames": FRAMES}
    parameters |= {"frame_rate": 16, "view": 1.0, "softness": 1.0, "shutter": 0.0, "shake": 0.002, "pieces": 0}
    parameters |= {"brightness": [1.0, 1.0], "contrast": 1.0, "colour": 1.0, "noise": 0.0, "crf": 18}
    axis, sign = MOTIONS[motion]
    parameters["amount"] = dict.fromkeys(AXES, 0.0) | {axis: sign * size}
    write_clip(path, render(read_scenery(picture, 0), parameters, rng), parameters)


def panel(frame, answer):
    """One frame of a clip above the best label with its score."""
    image = Image.new("RGB", (WIDTH, HEIGHT + STRIP), "white")
    image.paste(Image.fromarray(frame), (0, 0))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    draw.text((2, HEIGHT + 4), answer["label"], fill="black", font=font)
    draw.text((WIDTH - 2, HEIGHT + 4), f"{answer['score']:.1%}", fill="black", font=font, anchor="ra")
    return image


def main(caltech101):
    classify = pipeline("video-classification", model=str(ROOT / "model_cards" / "videomamba-tiny-camera-motion"))
    panels = []
    with tempfile.TemporaryDirectory() as folder:
        for picture, motion, size in CLIPS:
            path = f"{folder}/clip.mp4"
            write_camera_clip(path, Path(caltech101, picture), motion, size)
            (answer,) = classify(path, top_k=1)
            print(f"{picture}, {motion}: {answer}")
            panels.append([panel(frame, answer) for frame in decode_video(path)[0]])
    sheets = []
    for row in zip(*panels, strict=True):
        sheet = Image.new("RGB", (len(row) * (WIDTH + GAP) - GAP, HEIGHT + STRIP), "white")
        for index, image in enumerate(row):
            sheet.paste(image, (index * (WIDTH + GAP), 0))
        sheets.append(sheet)
    # One palette for all frames, without dithering: a third of the bytes.
    palette = sheets[len(sheets) // 2].quantize(96)
    sheets = [sheet.quantize(palette=palette, dither=Image.Dither.NONE) for sheet in sheets]
    output = HERE / "camera_motion.gif"
    sheets[0].save(output, save_all=True, append_images=sheets[1:], duration=70, loop=0, optimize=True)
    print(f"{output}: {output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(parse_arguments().caltech101)
