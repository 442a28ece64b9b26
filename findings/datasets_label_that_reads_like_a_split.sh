#!/usr/bin/env bash
# `load_dataset(folder)` of train/<label>/<files> and validation/<label>/<files> gives the two splits that the folders
# name. Not if a label reads like a split, as "train_in_out" does: datasets looks for such words in every folder on the
# way to a file. Files of that label are then in the training split twice, and those of validation/ once.
# `load_dataset("imagefolder", data_dir="folder/train")` has that label alone. There is no warning.
#
# What to do: say where the splits are, data_files={"train": "train/**", "validation": "validation/**"}, or {"train": "**"}
# of one split's folder.
#
# Seen on 2026-11-30:
#   datasets 5.2.0
#   3 + 3 training and 2 + 2 validation pictures are read as {'train': 11, 'validation': 4}
#   the 3 + 3 training pictures alone as 3 of the labels ['train_in_out']
#   with data_files: {'train': 6, 'validation': 4}
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet datasets==5.2.0 pillow==12.0.0
cd "$folder"
HF_HOME="$folder/cache" HF_DATASETS_DISABLE_PROGRESS_BARS=1 "$folder/env/bin/python" - <<'PYTHON'
import sys
from pathlib import Path

import datasets
from PIL import Image

for split, count in (("train", 3), ("validation", 2)):
    for label in ("bridge_up", "train_in_out"):
        Path("set", split, label).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (8, 8)).save(f"set/{split}/{label}/{number}.png")

print(f"datasets {datasets.__version__}")
whole = datasets.load_dataset("set")
print("3 + 3 training and 2 + 2 validation pictures are read as", {name: len(rows) for name, rows in whole.items()})
part = datasets.load_dataset("imagefolder", data_dir="set/train", split="train", drop_labels=False)
print("the 3 + 3 training pictures alone as", len(part), "of the labels", part.features["label"].names)
files = {"train": "train/**", "validation": "validation/**"}
told = datasets.load_dataset("set", data_files=files)
print("with data_files:", {name: len(rows) for name, rows in told.items()})
sys.exit(0 if len(whole["train"]) != 6 and len(part) == 3 and len(told["train"]) == 6 else "The behaviour has changed.")
PYTHON
