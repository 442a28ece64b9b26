#!/usr/bin/env bash
# With gradient accumulation, four batches of two clips train as one batch of eight. Not so for several labels a clip or
# a regression: the stock Trainer multiplies loss and gradients of a stock VideoMAE by the number of batches, without a
# warning. For one label a clip, the numbers are equal.
#
# Why: the Trainer divides a batch's loss by the number of batches unless the model takes the loss's arguments, and it
# takes any `**kwargs` of `forward` for that. The single-label loss then divides a sum by `num_items_in_batch`. The other
# two are means of a batch that nobody divides. (transformers issue 47688, of other heads.)
# What to do: set `trainer.model_accepts_loss_kwargs = False` before `train`, or give the Trainer a
# `compute_loss_func` that uses `num_items_in_batch`.
#
# Seen on 2026-11-30, on a CPU:
#   torch 2.13.0, transformers 5.24.0, accelerate 1.15.0
#   single_label_classification: loss 1.0886 of 1 batch of 8, 1.0886 of 4 batches of 2; their steps: 1.000 times as long
#   multi_label_classification: loss 0.6895 of 1 batch of 8, 2.7579 of 4 batches of 2; their steps: 4.000 times as long
#   regression: loss 1.0770 of 1 batch of 8, 4.3080 of 4 batches of 2; their steps: 4.000 times as long
#   the same with model_accepts_loss_kwargs = False: 1.000 1.000 1.000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 numpy==2.4.6
export HF_HOME="$folder/home" HF_HUB_OFFLINE=1
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
import contextlib
import io
import sys

import accelerate
import torch
import transformers
from transformers import Trainer, TrainingArguments, VideoMAEConfig, VideoMAEForVideoClassification


transformers.logging.set_verbosity_error()
numbers = torch.Generator().manual_seed(0)
CLIPS = torch.randn(8, 2, 3, 16, 16, generator=numbers)
LABELS = {
    "single_label_classification": torch.randint(3, (8,), generator=numbers),
    "multi_label_classification": torch.randint(2, (8, 3), generator=numbers).float(),
    "regression": torch.randn(8, 3, generator=numbers),
}
SIZE = {"image_size": 16, "patch_size": 8, "num_frames": 2, "hidden_size": 16, "intermediate_size": 16}
SIZE |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 3}


def step(kind, batch_size, batches, accepts=None):
    """The logged loss of one optimizer step over all clips, and how far plain gradient descent moves the weights."""
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = VideoMAEForVideoClassification(VideoMAEConfig(**SIZE, **dropout, problem_type=kind))
    before = torch.cat([weight.detach().flatten().clone() for weight in model.parameters()])
    arguments = TrainingArguments(
        **{"output_dir": "out", "max_steps": 1, "logging_steps": 1, "save_strategy": "no", "report_to": "none"},
        **{"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": batches, "use_cpu": True},
        **{"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0},
        **{"disable_tqdm": True, "dataloader_pin_memory": False},
    )
    rows = [{"pixel_values": clip, "labels": label} for clip, label in zip(CLIPS, LABELS[kind])]
    trainer = Trainer(model, arguments, train_dataset=rows)
    if accepts is not None:
        trainer.model_accepts_loss_kwargs = accepts
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    after = torch.cat([weight.detach().flatten() for weight in model.parameters()])
    return trainer.state.log_history[0]["loss"], float((after - before).norm())


print(f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}, "
      f"accelerate {accelerate.__version__}")
found, mended = [], []
for kind in LABELS:
    (loss, length), (accumulated, longer) = step(kind, 8, 1), step(kind, 2, 4)
    print(f"{kind}: loss {loss:.4f} of 1 batch of 8, {accumulated:.4f} of 4 batches of 2; their steps: "
          f"{longer / length:.3f} times as long")
    found += [round(accumulated / loss, 3), round(longer / length, 3)]
    mended.append(round(step(kind, 2, 4, accepts=False)[1] / step(kind, 8, 1, accepts=False)[1], 3))
print("the same with model_accepts_loss_kwargs = False:", *(f"{ratio:.3f}" for ratio in mended))
sys.exit(0 if found == [1.0, 1.0, 4.0, 4.0, 4.0, 4.0] and mended == [1.0] * 3 else "The behaviour has changed.")
PYTHON
