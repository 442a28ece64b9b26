"""The scan while a model is exported: plain operators and one loop over the tokens, which ONNX calls `Scan`.

No custom operator stands in the exported graph, so that ONNX Runtime, OpenVINO and other runtimes read it. Both
directions are one loop whose body is six operators on a state of (2, B, N, E); it costs one node, whatever the length.
Log-depth doubling, several tokens a turn and chunks of the length side by side were measured too: docs/deploy.md.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch._higher_order_ops.scan import scan_op

from .selective_scan_torch import bidirectional_selective_scan as plain_bidirectional_selective_scan


def unusable_reason(device, dtype):
    """Why this backend cannot run on `device` with activations of `dtype`, or None: it always can."""
    return None


def selective_scan(u, delta, A, B, C, start=None):
    """See `selective_scan_torch.selective_scan`, whose arguments these are."""
    A = A.transpose(1, 2).contiguous()[:, None]  # (G, 1, N, E); the state that is passed on has its strides
    # Tokens first, and the axis of states or channels that a step broadcasts over: the loop's body copies nothing.
    tokens = [
        t.float().permute(2, 0, 1, 3).contiguous().unsqueeze(axis)
        for t, axis in ((delta, 3), (u.float() * delta, 3), (B, 4), (C, 3))
    ]
    first = delta.new_zeros(*delta.shape[:2], *A.shape[2:]) if start is None else start.mT.contiguous()
    # A is passed on beside the state: OpenVINO (2026.4) cannot read a loop whose body refers to a tensor outside it.
    end, _, y = scan_op(_step, [first, A], tokens, ())
    y = y.squeeze(3).permute(1, 2, 0, 3).to(u.dtype)
    return y if start is None else (y, end.mT)


def _step(state, A, delta, input, B, C):
    state = torch.exp(delta * A) * state + B * input
    return [state.clone(), A.clone(), torch.matmul(C, state)]


def softplus(x):
    """
    log(1 + exp(x)) of float32 x, of any shape, to 4e-7 of itself: max(x, 0) + log(1 + z) with z = exp(-|x|). ONNX
    Runtime's own `Softplus` works element by element and takes 4 times as long; log(z + 1) loses small step sizes to
    the rounding of z + 1. Hence the series log(1 + z) = 2 (s + s³/3 + s⁵/5 + ...) with s = z / (z + 2) <= 1/3.
    """
    z = torch.exp(-x.abs())
    s = z / (z + 2)
    square = s * s
    series = square / 11 + 1 / 9  # the next term, s¹²/13, is 1.4e-7 at most
    for power in (7, 5, 3, 1):
        series = series * square + 1 / power
    return F.relu(x) + 2 * s * series


bidirectional_selective_scan = partial(plain_bidirectional_selective_scan, scan=selective_scan, softplus=softplus)
