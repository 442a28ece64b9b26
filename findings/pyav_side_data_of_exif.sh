#!/usr/bin/env bash
# A frame's side data can be read, or is empty. Not so in PyAV 18.1: of any JPEG, PNG or WebP picture with EXIF data, which
# is what cameras and phones write, `frame.side_data` raises "31 is not a valid Type", because FFmpeg 8.1 knows types that
# PyAV's table does not name. The rotation of a frame, which is side data too, cannot be read then.
#
# What to do: catch the ValueError, and take the types that have no name away with the filter `sidedata=mode=delete`.
# PyAV's main branch has a complete table since August 2026.
#
# Seen on 2026-11-30:
#   PyAV 18.1.0, Pillow 12.3.0, libavutil 60.26.102
#   plain.jpg: side data of 0 kinds; exif.jpg: ValueError: 31 is not a valid Type
#   plain.png: side data of 0 kinds; exif.png: ValueError: 31 is not a valid Type
#   plain.webp: side data of 0 kinds; exif.webp: ValueError: 31 is not a valid Type
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet av==18.1.0 numpy==2.4.6 pillow==12.3.0
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
import sys

import av
import PIL
from PIL import Image


def side_data(path):
    with av.open(path) as container:
        frame = next(container.decode(video=0))
        try:
            return f"side data of {len(frame.side_data)} kinds"
        except ValueError as error:
            return f"ValueError: {error}"


picture = Image.linear_gradient("L").convert("RGB")
exif = Image.Exif()
exif[0x010E] = "a gradient"  # ImageDescription
version = ".".join(map(str, av.library_versions["libavutil"]))
print(f"PyAV {av.__version__}, Pillow {PIL.__version__}, libavutil {version}")
holds = True
for kind in ("jpg", "png", "webp"):
    picture.save(f"plain.{kind}")
    picture.save(f"exif.{kind}", exif=exif)
    plain, tagged = side_data(f"plain.{kind}"), side_data(f"exif.{kind}")
    print(f"plain.{kind}: {plain}; exif.{kind}: {tagged}")
    holds &= plain.startswith("side data") and tagged == "ValueError: 31 is not a valid Type"
sys.exit(0 if holds else "The behaviour has changed.")
PYTHON
