#!/usr/bin/env bash
# Validating that a field holds one of several types takes no time that depends on the value. Not so in the strict
# dataclasses of huggingface_hub, by which transformers checks configs and the keyword arguments of processors: for each
# type of a union before the right one, the whole value is printed into the message of an error that nobody sees. A
# dataclass that holds an array of a film's 20,000 frame times is printed several times for each call of a processor.
#
# What to do: `field(repr=False)` for large members of a value that goes through such a check.
#
# Seen on 2026-11-30:
#   huggingface_hub 2.4.0
#   int | str | list[int] | Film with a Film: valid, and printed 2 times
#   Film | int | str with a Film: valid, and printed 0 times
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet huggingface_hub==2.4.0
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
import sys
from dataclasses import dataclass

import huggingface_hub
from huggingface_hub.dataclasses import strict


class Film:
    printed = 0

    def __repr__(self):
        Film.printed += 1
        return "a film"


@strict
@dataclass
class Last:
    film: int | str | list[int] | Film


@strict
@dataclass
class First:
    film: Film | int | str


print(f"huggingface_hub {huggingface_hub.__version__}")
found = []
for name, kind in (("int | str | list[int] | Film", Last), ("Film | int | str", First)):
    Film.printed = 0
    kind(film=Film())
    found.append(Film.printed)
    print(f"{name} with a Film: valid, and printed {Film.printed} times")
sys.exit(0 if found[0] > 0 == found[1] else "The behaviour has changed.")
PYTHON
