#!/usr/bin/env bash
# Mamba's authors train A_log and D without weight decay, and mark both with `_no_weight_decay = True`. transformers'
# Trainer decays them in transformers' own Mamba, and the scale of the last norm as well, without a word. The mark
# changes nothing.
#
# Why: the Trainer leaves out `nn.LayerNorm`, biases, and names such as `norm` or `layernorm`. Mamba's norm is of another
# class, and the last one is called `norm_f`. No attribute of a parameter is looked at.
# What to do: override `get_decay_parameter_names` of the Trainer.
#
# Seen on 2026-11-30, on a CPU:
#   torch 2.13.0, transformers 5.24.0, accelerate 1.15.0
#   decayed, of those that are no matrix of a linear layer, convolution or embedding: layers.0.mixer.A_log layers.0.mixer.D norm_f.weight
#   the same with the two marked: layers.0.mixer.A_log layers.0.mixer.D norm_f.weight
#   not decayed: layers.0.norm.weight layers.0.mixer.conv1d.bias layers.0.mixer.dt_proj.bias
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 numpy==2.4.6
export HF_HOME="$folder/home" HF_HUB_OFFLINE=1
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
import sys

import accelerate
import torch
import transformers
from transformers import MambaConfig, MambaModel, Trainer, TrainingArguments


transformers.logging.set_verbosity_error()


def decayed(model):
    """Names of the parameters in groups of the optimizer that have a weight decay, and of the others."""
    arguments = TrainingArguments("out", weight_decay=0.1, use_cpu=True, report_to="none")
    groups = Trainer(model, arguments).create_optimizer().param_groups
    inside = {id(weight) for group in groups if group["weight_decay"] for weight in group["params"]}
    names = [name for name, _ in model.named_parameters()]
    return [n for n in names if id(model.get_parameter(n)) in inside], [
        n for n in names if id(model.get_parameter(n)) not in inside
    ]


def unusual(model, names):
    plain = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Embedding)
    return [name for name in names if not isinstance(model.get_submodule(name.rpartition(".")[0]), plain)]


model = MambaModel(MambaConfig(vocab_size=16, hidden_size=16, num_hidden_layers=1, state_size=4))
print(f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}, "
      f"accelerate {accelerate.__version__}")
before, left_out = decayed(model)
print("decayed, of those that are no matrix of a linear layer, convolution or embedding:", *unusual(model, before))
mixer = model.layers[0].mixer
mixer.A_log._no_weight_decay = mixer.D._no_weight_decay = True
after, _ = decayed(model)
print("the same with the two marked:", *unusual(model, after))
print("not decayed:", *left_out)
expected = ["layers.0.mixer.A_log", "layers.0.mixer.D", "norm_f.weight"]
same = sorted(unusual(model, before)) == expected and after == before and "layers.0.norm.weight" in left_out
sys.exit(0 if same else "The behaviour has changed.")
PYTHON
