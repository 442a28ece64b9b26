#!/usr/bin/env python
"""Nearest clips and a linear probe, from the features of `classify_clips.py --columns pooled`.

    python examples/tools/explore_features.py nearest features --query clip.mp4 --output nearest.png
    python examples/tools/explore_features.py probe features

`nearest` draws the clips whose features are nearest to those of a given one, by cosine similarity. `probe` trains a
linear classifier on the features of labelled clips, and prints its accuracy on held-out folds with Wilson's 95 %
interval, beside the baseline of always giving the most frequent label.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("nearest", help="the clips nearest to a given one")
    command.add_argument("features", help="the --output of classify_clips.py")
    command.add_argument("--query", required=True, help="a clip: a file, or its name in the table")
    command.add_argument("--count", type=int, default=9)
    command.add_argument("--output", default="nearest.png", help="the picture to write")
    command = commands.add_parser("probe", help="a linear classifier on the features")
    command.add_argument("features", help="the --output of classify_clips.py")
    command.add_argument("--folds", type=int, default=5)
    command.add_argument("--C", type=float, default=1.0, help="inverse strength of the L2 penalty")
    return parser.parse_args()


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    parse_arguments()  # before the imports below, which take seconds

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from classify_clips import Classifier
from modeling_videomamba.video_decoding import decode_video


try:
    import datasets
    from scipy.stats import binomtest
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.neighbors import NearestNeighbors
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
except ModuleNotFoundError as error:
    sys.exit(f"{error}. Install the extra `tools`: pip install '.[tools]' in a clone of videomamba-transformers.")

WIDTH, HEIGHT, COLUMNS = 160, 120, 5


def read_features(folder):
    """The table of a folder, and its pooled features as float32 (clips, D)."""
    files = sorted(str(file) for file in Path(folder).glob("part-*.parquet"))
    if not files:
        raise ValueError(f"{folder} has no part-*.parquet: make them with classify_clips.py --columns pooled.")
    table = datasets.load_dataset("parquet", data_files=files, split="train")
    if "pooled" not in table.column_names:
        raise ValueError(f"{folder} has no pooled features: run classify_clips.py with --columns pooled.")
    return table, np.array(table.with_format("numpy")["pooled"][:], np.float32)


def query_features(folder, query, table, features):
    """The features of a clip: from the table, or computed by the model that made the table."""
    if query in table["clip"]:
        return features[table["clip"].index(query)]
    settings = json.loads((Path(folder) / "settings.json").read_text(encoding="utf-8"))
    args = SimpleNamespace(model=settings["model"], dtype=settings["dtype"], columns=["pooled"])
    classifier = Classifier(args, torch.device("cpu"))
    with torch.inference_mode():
        return classifier(classifier.processor(query, return_tensors="pt")["pixel_values"])["pooled"][0].numpy()


def find_nearest(features, query, count):
    """The numbers of the nearest clips and their cosine similarities."""
    search = NearestNeighbors(n_neighbors=min(count, len(features)), metric="cosine").fit(features)
    distances, numbers = search.kneighbors(query[None])
    return numbers[0].tolist(), (1 - distances[0]).tolist()


def draw_sheet(path, clips):
    """The middle frame of each (name, caption), in rows."""
    rows = -(-len(clips) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (WIDTH + 8), rows * (HEIGHT + 44)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, (name, caption) in enumerate(clips):
        left, top = number % COLUMNS * (WIDTH + 8) + 4, number // COLUMNS * (HEIGHT + 44) + 4
        try:
            frames, _ = decode_video(name, lambda metadata: [metadata.total_num_frames // 2])
            sheet.paste(ImageOps.pad(Image.fromarray(frames[0]), (WIDTH, HEIGHT)), (left, top))
        except (OSError, ValueError):  # of a data set's clip there is no file
            draw.rectangle((left, top, left + WIDTH, top + HEIGHT), outline="grey")
        draw.multiline_text((left, top + HEIGHT + 2), caption, fill="black", font=font)
    temporary = f"{path}.{os.getpid()}.tmp"
    sheet.save(temporary, "PNG")
    os.replace(temporary, path)


def nearest(args):
    table, features = read_features(args.features)
    query = query_features(args.features, args.query, table, features)
    numbers, similarities = find_nearest(features, query, args.count + 1)
    found = [(table[i], s) for i, s in zip(numbers, similarities, strict=True) if table[i]["clip"] != args.query]
    sheet = [(args.query, f"query\n{Path(args.query).name[:26]}")]
    for row, similarity in found[: args.count]:
        print(f"{similarity:.3f}  {row['label'] or ''}  {row['clip']}")
        sheet.append((row["clip"], f"{similarity:.3f}  {row['label'] or ''}\n{Path(row['clip']).name[:26]}"))
    draw_sheet(args.output, sheet)
    print(args.output)


def probe(args):
    table, features = read_features(args.features)
    known = [i for i, label in enumerate(table["label"]) if label is not None]
    labels = np.array([table["label"][i] for i in known])
    names, counts = np.unique(labels, return_counts=True)
    folds = min([args.folds, *counts.tolist()])
    if len(names) < 2 or folds < 2:
        raise ValueError(
            f"A probe needs two labels or more with two clips or more each; {args.features} has "
            f"{dict(zip(names.tolist(), counts.tolist(), strict=True))}."
        )
    model = make_pipeline(StandardScaler(), LogisticRegression(C=args.C, max_iter=1000))
    split = StratifiedKFold(folds, shuffle=True, random_state=0)
    predicted = cross_val_predict(model, features[known], labels, cv=split)
    for title, right in (
        ("linear probe", predicted == labels),
        ("most frequent label", labels == names[counts.argmax()]),
    ):
        interval = binomtest(int(right.sum()), len(right)).proportion_ci(0.95, "wilson")
        print(
            f"{title}: {right.mean():.1%} ({interval.low:.1%} to {interval.high:.1%}) of {len(right)} clips, "
            f"{len(names)} labels, {folds} folds"
        )


def main():
    args = parse_arguments()
    datasets.disable_progress_bars()
    try:
        {"nearest": nearest, "probe": probe}[args.command](args)
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
