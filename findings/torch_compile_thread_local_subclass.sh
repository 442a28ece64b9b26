#!/usr/bin/env bash
# Code that is compiled with torch.compile reads an attribute of an object, and is compiled again when the attribute
# changes. Not so if the object is of a subclass of `threading.local` whose class holds the default: after the attribute
# was set, compiled code goes on with the default, without a warning.
#
# Why: the compiled code was traced while the attribute came from the class, and does not look whether the thread has one
# of its own since. With a plain `threading.local()` and `getattr(local, name, default)` it looks.
# What to do: that, or a module's global.
#
# Seen on 2026-11-29, PyTorch 2.7.1, 2.13.0 and 2.14.1, on a CPU:
#   torch 2.13.0
#   plain threading.local: default 0, then set to 7: compiled code gives 7
#   subclass with a default: default 0, then set to 7: compiled code gives 0, the same code without torch.compile 7
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
"$folder/env/bin/python" - <<'PYTHON'
import sys
import threading

import torch


class WithDefault(threading.local):
    number = 0


plain, with_default = threading.local(), WithDefault()


def of_plain(x):
    return x + getattr(plain, "number", 0)


def of_subclass(x):
    return x + with_default.number


def after_it_was_set(function, local):
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    before = int(compiled(torch.zeros(1)))
    local.number = 7
    return before, int(compiled(torch.zeros(1))), int(function(torch.zeros(1)))


print("torch", torch.__version__.split("+")[0])
first, second, _ = after_it_was_set(of_plain, plain)
print(f"plain threading.local: default {first}, then set to 7: compiled code gives {second}")
before, stale, eager = after_it_was_set(of_subclass, with_default)
print(
    f"subclass with a default: default {before}, then set to 7: compiled code gives {stale}, the same code without "
    f"torch.compile {eager}"
)
sys.exit(0 if (second, stale, eager) == (7, 0, 7) else "The behaviour has changed.")
PYTHON
