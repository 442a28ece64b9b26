#!/usr/bin/env bash
# `save_pretrained` of a model that was loaded with `trust_remote_code=True` writes the model's code beside the weights,
# so that the folder loads again. Not so for the backbone inside a classifier: `classifier.backbone.save_pretrained`
# writes the weights, the config and the config's code. The model's code is missing, without a warning, although
# `auto_map` in the saved config names that file. `AutoModel.from_pretrained` of the folder then fails.
#
# Why: an Auto class marks the class that it loads, and only a marked class saves its code; the backbone's class was
# made by the classifier. After `AutoModel.from_pretrained` of the same repository, whose result may be thrown away, the
# same call saves the code.
# What to do: load the backbone with `AutoModel` and save that, or call `register_for_auto_class` on its class.
#
# Seen on 2026-11-29:
#   transformers 5.24.0
#   the classifier, saved:           config.json configuration_tiny.py model.safetensors modeling_tiny.py
#   its backbone, saved alone:       config.json configuration_tiny.py model.safetensors
#   auto_map of that backbone:       AutoModel is modeling_tiny.TinyModel
#   that backbone, loaded:           OSError: backbone does not appear to have a file named modeling_tiny.py
#   the same save, after AutoModel:  config.json configuration_tiny.py model.safetensors modeling_tiny.py
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.24.0
export HF_HOME="$folder/home" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
cd "$folder"
mkdir repository

cat > repository/configuration_tiny.py <<'PYTHON'
from transformers import PreTrainedConfig


class TinyConfig(PreTrainedConfig):
    model_type = "tiny"
    width: int = 4
PYTHON

cat > repository/modeling_tiny.py <<'PYTHON'
import torch
from transformers import PreTrainedModel

from .configuration_tiny import TinyConfig


class TinyModel(PreTrainedModel):
    config_class = TinyConfig
    base_model_prefix = "backbone"

    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Linear(config.width, config.width)
        self.post_init()


class TinyClassifier(PreTrainedModel):
    config_class = TinyConfig
    base_model_prefix = "backbone"

    def __init__(self, config):
        super().__init__(config)
        self.backbone = TinyModel(config)
        self.head = torch.nn.Linear(config.width, 2)
        self.post_init()
PYTHON

cat > repository/config.json <<'JSON'
{
  "model_type": "tiny",
  "architectures": ["TinyClassifier"],
  "auto_map": {
    "AutoConfig": "configuration_tiny.TinyConfig",
    "AutoModel": "modeling_tiny.TinyModel",
    "AutoModelForImageClassification": "modeling_tiny.TinyClassifier"
  }
}
JSON

"$folder/env/bin/python" - <<'PYTHON'
import json
import os
import sys

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification


transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
trust = {"trust_remote_code": True}


def files(folder):
    return sorted(name for name in os.listdir(folder) if not name.startswith("_"))


config = AutoConfig.from_pretrained("repository", **trust)
AutoModelForImageClassification.from_config(config, **trust).save_pretrained("repository")

classifier = AutoModelForImageClassification.from_pretrained("repository", **trust)
classifier.save_pretrained("classifier")
classifier.backbone.save_pretrained("backbone")
print("transformers", transformers.__version__)
print("the classifier, saved:          ", *files("classifier"))
print("its backbone, saved alone:      ", *files("backbone"))
with open("backbone/config.json") as file:
    print("auto_map of that backbone:       AutoModel is", json.load(file)["auto_map"]["AutoModel"])
try:
    AutoModel.from_pretrained("backbone", **trust)
    loaded = "loads"
except OSError as error:
    loaded = f"OSError: {error}".partition(". Checkout")[0]
print("that backbone, loaded:          ", loaded)

AutoModel.from_pretrained("repository", **trust)
classifier.backbone.save_pretrained("backbone-again")
print("the same save, after AutoModel: ", *files("backbone-again"))

code = "modeling_tiny.py"
missing = code in files("classifier") and code not in files("backbone") and code in files("backbone-again")
sys.exit(0 if missing and loaded != "loads" else "The behaviour has changed.")
PYTHON
