#!/usr/bin/env bash
# An average of a number with itself is that number. Not so for integer buffers in PyTorch's AveragedModel: with
# `use_buffers=True` and `get_ema_multi_avg_fn(0.9999)`, a buffer of int64 that never changes loses 1 at some places
# with the second update. A permutation is then no permutation, without a warning.
#
# Why: the average, p * decay + p * (1 - decay), is worked out in float32 and copied into the integer buffer, which cuts
# off what follows the point: 124.99999 becomes 124. Batch normalisation's `num_batches_tracked` is such a buffer, too.
# What to do: leave `use_buffers` at False, and the buffers are copied.
#
# Seen on 2026-11-29, PyTorch 2.13.0 and 2.14.1, on a CPU:
#   torch 2.13.0
#   a permutation of 196 numbers, averaged with itself twice: 34 places are smaller by 1, 167 distinct numbers are left
#   the first of them: 125 became 124
#   with use_buffers=False: 0 places differ
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
"$folder/env/bin/python" - <<'PYTHON'
import sys

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class Shuffle(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.register_buffer("order", torch.randperm(196, generator=torch.Generator().manual_seed(0)))


def averaged(use_buffers):
    model = Shuffle()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9999), use_buffers=use_buffers)
    for _ in range(2):
        average.update_parameters(model)
    return model.order, average.module.order


before, after = averaged(use_buffers=True)
smaller = after == before - 1
print("torch", torch.__version__.split("+")[0])
print(
    f"a permutation of 196 numbers, averaged with itself twice: {int(smaller.sum())} places are smaller by 1, "
    f"{len(after.unique())} distinct numbers are left"
)
if smaller.any():
    print(f"the first of them: {int(before[smaller][0])} became {int(after[smaller][0])}")
copied = sum(a != b for a, b in zip(*(order.tolist() for order in averaged(use_buffers=False))))
print(f"with use_buffers=False: {copied} places differ")
sys.exit(0 if smaller.any() and not copied else "The behaviour has changed.")
PYTHON
