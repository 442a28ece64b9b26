#!/usr/bin/env bash
# A checkpoint may bring its own code, and lie in a folder of any name. If that code uses transformers'
# `@auto_docstring`, as every model of the library does, and the folder is called `models`, then loading it prints
# "[ERROR] Config not found" on standard output, where a script's results may stand. Elsewhere nothing is printed, and
# the docstring calls the model "None" and links to https://huggingface.co/None.
#
# Why: `get_model_name` takes a file for one of the library's own if the folder two levels above it is called `models`.
# Remote code is copied to `transformers_modules/<folder>/<hash>/`.
# What to do: leave the decorator out of code that travels with a checkpoint, and write the docstring.
#
# Seen on 2026-11-29, transformers 5.24.0:
#   transformers 5.24.0
#   folder checkpoint: 0 errors printed; the docstring: This is the configuration class to store the configuration of a None.
#   folder models: 1 errors printed, the first: [ERROR] Config not found for aceaec1459e46ef6. You can manually add it ...
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet transformers==5.24.0
cd "$folder"
export HF_HOME="$folder/home" HF_HUB_OFFLINE=1
"$folder/env/bin/python" - <<'PYTHON'
import contextlib
import io
import json
import sys
from pathlib import Path

import transformers
from transformers import AutoConfig


CODE = '''
from transformers import PreTrainedConfig
from transformers.utils import auto_docstring


@auto_docstring
class TinyConfig(PreTrainedConfig):
    model_type = "tiny"
    hidden_size: int = 8
'''


def load(name):
    """What loading the configuration in a folder of this name prints, and its docstring."""
    Path(name).mkdir()
    Path(name, "configuration_tiny.py").write_text(CODE)
    auto_map = {"AutoConfig": "configuration_tiny.TinyConfig"}
    Path(name, "config.json").write_text(json.dumps({"model_type": "tiny", "auto_map": auto_map}))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        config = AutoConfig.from_pretrained(f"./{name}", trust_remote_code=True)
    return printed.getvalue().splitlines(), type(config).__doc__


print("transformers", transformers.__version__)
quiet, docstring = load("checkpoint")
sentence = next(line for line in docstring.splitlines() if line.strip()).split(". ")[0]
print(f"folder checkpoint: {len(quiet)} errors printed; the docstring: {sentence}.")
loud, _ = load("models")
print(f"folder models: {len(loud)} errors printed, the first: {loud[0] if loud else 'none'}")
same = not quiet and "None" in docstring and loud and loud[0].startswith("[ERROR] Config not found")
sys.exit(0 if same else "The behaviour has changed.")
PYTHON
