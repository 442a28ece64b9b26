#!/usr/bin/env bash
# A seek to a key frame gives the frames that reading from the beginning gives. Not so for uncompressed video of 8 bits
# with a palette in AVI and MOV: every frame is a key frame, but whoever opens the file and seeks gets black pictures,
# without an error.
#
# Why: the palette stands in the file's header. libavformat hands it out once, as side data of the first packet that is
# read, and a seek skips that packet if it was not read yet. msrle decodes right: its decoder takes the palette from the
# header. (PyAV issue 1987.)
# What to do: decode the first frame before the seek, or keep the side data "palette" of the first packet and attach it
# to the first one behind the seek.
#
# Seen on 2026-11-30:
#   PyAV 18.1.0, libavformat 62.12.102
#   raw.avi: mean grey from the beginning 46.9, behind a seek 0.0, with the first frame decoded before 46.9
#   raw.mov: mean grey from the beginning 46.9, behind a seek 0.0, with the first frame decoded before 46.9
#   msrle.avi: mean grey from the beginning 46.9, behind a seek 46.9, with the first frame decoded before 46.9
#   side data of the packets of raw.avi: palette, none, none
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet av==18.1.0 numpy==2.4.6
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
import sys

import av
import numpy as np


FILES = {"raw.avi": "rawvideo", "raw.mov": "rawvideo", "msrle.avi": "msrle"}


def write(path, codec):
    """40 frames, 10 a second: a bright bar that moves over a dark ground."""
    palette = np.zeros((256, 4), np.uint8)  # alpha, red, green, blue
    palette[:, 0] = 255
    palette[1, 1:], palette[2, 1:] = 235, 20
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "pal8"
        for time in range(40):
            picture = np.full((48, 64), 2, np.uint8)
            picture[:, time : time + 8] = 1
            frame = av.VideoFrame.from_ndarray((picture, palette), format="pal8")
            frame.pts = time
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def brightness(path, seek=False, first=False):
    """The mean of a frame in the middle, a key frame."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        if first:
            next(container.decode(stream))
        if seek:
            container.seek(int(2 / stream.time_base), stream=stream)
        frames = list(container.decode(stream))
        return round(float(frames[len(frames) // 2].to_ndarray(format="gray").mean()), 1)


print(f"PyAV {av.__version__}, libavformat {'.'.join(map(str, av.library_versions['libavformat']))}")
found = {}
for path, codec in FILES.items():
    write(path, codec)
    found[path] = whole, behind, after_first = (
        brightness(path),
        brightness(path, seek=True),
        brightness(path, seek=True, first=True),
    )
    print(
        f"{path}: mean grey from the beginning {whole}, behind a seek {behind}, with the first frame decoded before "
        f"{after_first}"
    )
with av.open("raw.avi") as container:
    side_data = [[data.data_type for data in packet.iter_sidedata()] for packet in container.demux(video=0)]
print("side data of the packets of raw.avi:", ", ".join(" ".join(kinds) or "none" for kinds in side_data[:3]))
black = all(found[path][0] == found[path][2] > 0 == found[path][1] for path in ("raw.avi", "raw.mov"))
sys.exit(0 if black and len(set(found["msrle.avi"])) == 1 else "The behaviour has changed.")
PYTHON
