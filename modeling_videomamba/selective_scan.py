"""The seam between the model and the selective scan: two oracles, one function the mixer calls, the choice of backend.

What a mixer computes between its two projections, for each of the two directions (paper, sections 3.2 and 4.4):

    u        = SiLU(causal depthwise convolution of x)          along the direction
    δ, B, C  = split(x_proj(u))
    Δ        = softplus(dt_proj(δ))
    h_k      = exp(Δ_k A) h_{k-1} + Δ_k B_k u_k                 equation (3), discretised as Mamba's code does it
    y_k      = C_k h_k + D u_k

and then the gated mean of both: `SiLU(z) * (y_forward + y_backward) / 2`.

A direction is an order in which tokens are visited, never a flipped copy that somebody else has to flip back: outputs
land at their own token. Letters in shapes: B batch, L tokens, E inner channels, N states, R time-step rank, K taps of
the convolution. Parameters carry a leading axis of size 2: index 0 is the forward direction, index 1 the backward one.

To add a backend, write `selective_scan_<name>.py` beside this file with

    unusable_reason(device: torch.device, dtype: torch.dtype) -> str | None
    bidirectional_selective_scan(xz, conv_weight, ..., order)          # the signature of the function below

and add one line to `BACKENDS`. (Both are imported by name, because only `from .x import y` is followed when
transformers copies code to the Hub.)
"""

import os
from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .selective_scan_cuda import bidirectional_selective_scan as cuda_scan
from .selective_scan_cuda import unusable_reason as cuda_unusable_reason
from .selective_scan_mamba_ssm import bidirectional_selective_scan as mamba_ssm_scan
from .selective_scan_mamba_ssm import unusable_reason as mamba_ssm_unusable_reason
from .selective_scan_numba import bidirectional_selective_scan as numba_scan
from .selective_scan_numba import unusable_reason as numba_unusable_reason
from .selective_scan_torch import bidirectional_selective_scan as torch_scan
from .selective_scan_torch import unusable_reason as torch_unusable_reason


# --------------------------------------------------------------------------------------------------------------------
# Oracles. They follow the equations and never change for speed.
# --------------------------------------------------------------------------------------------------------------------


def selective_scan_reference(u, delta, A, B, C, D, delta_bias, order=None, dtype=torch.float64):
    """
    One direction's selective scan, token by token (paper, equations (1) to (3), with Mamba's B̄ = Δ B).

    Args:
        u (`torch.Tensor` of shape `(B, L, E)`): input sequence.
        delta (`torch.Tensor` of shape `(B, L, E)`): step size before bias and softplus.
        A (`torch.Tensor` of shape `(E, N)`): state matrix, negative.
        B (`torch.Tensor` of shape `(B, L, N)`): input matrix of each token.
        C (`torch.Tensor` of shape `(B, L, N)`): output matrix of each token.
        D (`torch.Tensor` of shape `(E,)`): skip term.
        delta_bias (`torch.Tensor` of shape `(E,)`): added to `delta` before the softplus.
        order (`torch.LongTensor` of shape `(L,)`, *optional*): `order[k]` is the token visited at step k; ascending
            if not given.
        dtype (`torch.dtype`, defaults to `torch.float64`): in which everything is computed.

    Returns:
        `torch.Tensor` of shape `(B, L, E)` and type `dtype`: the output of each token, at its own position.
    """
    u, delta, A, B, C, D, delta_bias = (t.to(dtype) for t in (u, delta, A, B, C, D, delta_bias))
    length = u.shape[1]
    visits = range(length) if order is None else order.tolist()
    delta = F.softplus(delta + delta_bias)
    state = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    outputs = [None] * length
    for token in visits:
        step = delta[:, token, :, None]
        state = torch.exp(step * A) * state + step * B[:, token, None, :] * u[:, token, :, None]
        outputs[token] = (state * C[:, token, None, :]).sum(-1) + D * u[:, token]
    return torch.stack(outputs, dim=1)


def bidirectional_selective_scan_reference(
    xz,
    conv_weight,
    conv_bias,
    x_proj_weight,
    dt_proj_weight,
    dt_proj_bias,
    A_log,
    D,
    order=None,
    dtype=torch.float64,
):
    """
    The oracle of [`bidirectional_selective_scan`]: same arguments, one direction after the other, token by token.

    Returns:
        `torch.Tensor` of shape `(B, L, E)` and type `dtype`.
    """
    parameters = (conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)
    xz, *parameters = (t.to(dtype) for t in (xz, *parameters))
    x, z = xz.chunk(2, dim=-1)
    length, rank, state_size = x.shape[1], dt_proj_weight.shape[2], A_log.shape[2]
    forward = torch.arange(length, device=x.device)
    backward = forward.flip(0) if order is None else order
    outputs = []
    for direction, visits in enumerate((forward, backward)):
        w_conv, b_conv, w_x, w_dt, b_dt, log_a, skip = (p[direction] for p in parameters)
        visited = F.pad(x[:, visits].transpose(1, 2), (w_conv.shape[1] - 1, 0))
        convolved = F.silu(F.conv1d(visited, w_conv[:, None], b_conv, groups=w_conv.shape[0])).transpose(1, 2)
        u = convolved[:, torch.argsort(visits)]
        time_step, B, C = (u @ w_x.T).split([rank, state_size, state_size], dim=-1)
        outputs.append(
            selective_scan_reference(u, time_step @ w_dt.T, -torch.exp(log_a), B, C, skip, b_dt, visits, dtype)
        )
    return F.silu(z) * (outputs[0] + outputs[1]) / 2


def sequential_scan(xz, *parameters, order=None):
    """The float32 oracle as a backend: a Python loop over tokens, for comparison and for doubt."""
    return bidirectional_selective_scan_reference(xz, *parameters, order=order, dtype=torch.float32).to(xz.dtype)


# --------------------------------------------------------------------------------------------------------------------
# The choice of backend.
# --------------------------------------------------------------------------------------------------------------------


class ScanBackend(NamedTuple):
    unusable_reason: Callable
    bidirectional_selective_scan: Callable
    projects: bool = False  # takes `out_proj_weight` too, and keeps less for the backward pass


# Fastest first; the first usable one is taken. `sequential` runs only when it is named, since `torch` always can.
BACKENDS = {
    "cuda": ScanBackend(cuda_unusable_reason, cuda_scan, projects=True),
    "mamba_ssm": ScanBackend(mamba_ssm_unusable_reason, mamba_ssm_scan),
    "numba": ScanBackend(numba_unusable_reason, numba_scan),
    "torch": ScanBackend(torch_unusable_reason, torch_scan),
    "sequential": ScanBackend(torch_unusable_reason, sequential_scan),
}

ENVIRONMENT_VARIABLE = "VIDEOMAMBA_SCAN_BACKEND"

_forced_backend = None  # set by `use_scan_backend`; a plain global, because torch.compile cannot trace a ContextVar


@contextmanager
def use_scan_backend(name):
    """
    Force the scan backend by name within a `with` block, over the environment variable and the model's config.

    Args:
        name (`str`): one of `BACKENDS`.

    Raises:
        ValueError: if there is no backend of that name.
    """
    global _forced_backend
    if name not in BACKENDS:
        raise ValueError(f"Unknown scan backend {name!r}; there are: {', '.join(BACKENDS)}.")
    previous, _forced_backend = _forced_backend, name
    try:
        yield
    finally:
        _forced_backend = previous


def select_scan_backend(device, dtype, name=None):
    """
    The name of the backend that will scan tensors of this device and dtype.

    Args:
        device (`torch.device`): where the tensors are.
        dtype (`torch.dtype`): type of the activations.
        name (`str`, *optional*): a backend to force, as the model's config does. Weaker than `use_scan_backend` and
            than the environment variable `VIDEOMAMBA_SCAN_BACKEND`.

    Raises:
        ValueError: if a forced backend does not exist or cannot run here; it lists those that can, and why the
            others cannot.
    """
    name = _forced_backend or os.environ.get(ENVIRONMENT_VARIABLE) or name
    if name is None:
        return next(b for b in BACKENDS if BACKENDS[b].unusable_reason(device, dtype) is None)
    if name in BACKENDS and BACKENDS[name].unusable_reason(device, dtype) is None:
        return name
    reasons = {b: backend.unusable_reason(device, dtype) for b, backend in BACKENDS.items()}
    usable = ", ".join(b for b, reason in reasons.items() if reason is None)
    unusable = "".join(f"\n  {b}: {reason}" for b, reason in reasons.items() if reason is not None)
    raise ValueError(
        f"The scan backend {name!r} was asked for, but "
        + ("cannot run" if name in BACKENDS else "does not exist")
        + f" on {device} with {dtype}. Usable here: {usable}."
        + (f" Not usable:{unusable}" if unusable else "")
    )


def bidirectional_selective_scan(
    xz,
    conv_weight,
    conv_bias,
    x_proj_weight,
    dt_proj_weight,
    dt_proj_bias,
    A_log,
    D,
    order=None,
    backend=None,
    out_proj=None,
):
    """
    Convolution, projections and selective scan of both directions, and their gated mean (paper, section 4.4).

    Args:
        xz (`torch.Tensor` of shape `(B, L, 2E)`): what `in_proj` gives, the input x and the gate z side by side.
        conv_weight (`torch.Tensor` of shape `(2, E, K)`): causal depthwise convolution.
        conv_bias (`torch.Tensor` of shape `(2, E)`).
        x_proj_weight (`torch.Tensor` of shape `(2, R + 2N, E)`): rows are the time step's R, then B's N, then C's N.
        dt_proj_weight (`torch.Tensor` of shape `(2, E, R)`).
        dt_proj_bias (`torch.Tensor` of shape `(2, E)`): added before the softplus.
        A_log (`torch.Tensor` of shape `(2, E, N)`): A = -exp(A_log).
        D (`torch.Tensor` of shape `(2, E)`): skip term.
        order (`torch.LongTensor` of shape `(L,)`, *optional*): `order[k]` is the token that the backward direction
            visits at step k; the full reversal if not given.
        backend (`str`, *optional*): see [`select_scan_backend`].
        out_proj (`torch.nn.Module`, *optional*): applied to the result, if given. A backend that knows it need not
            keep its input for the backward pass. Only a plain `nn.Linear` without bias and hooks is handed over so;
            any other module, such as an adapter in its place, is called.

    Returns:
        `torch.Tensor` of shape `(B, L, E)`, or `(B, L, hidden_size)` if projected, and the type of `xz`. Inside, Δ,
        A, the state and the sums are float32 whatever the type of `xz`.

    Raises:
        ValueError: if `order` has another length than `xz`. What it holds is looked at on a CPU with Numba alone; it
            must be each token once.
    """
    if order is not None and order.shape != (xz.shape[1],):
        raise ValueError(f"`order` must list the {xz.shape[1]} tokens of `xz`; got the shape {tuple(order.shape)}.")
    chosen = BACKENDS[select_scan_backend(xz.device, xz.dtype, backend)]
    parameters = (conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)
    if chosen.projects and torch.is_grad_enabled() and _is_plain_linear(out_proj):
        return chosen.bidirectional_selective_scan(xz, *parameters, order=order, out_proj_weight=out_proj.weight)
    scanned = chosen.bidirectional_selective_scan(xz, *parameters, order=order)
    return scanned if out_proj is None else out_proj(scanned)


def _is_plain_linear(module):
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return type(module) is nn.Linear and module.bias is None and not any(getattr(module, name) for name in hooks)


__all__ = [
    "bidirectional_selective_scan",
    "bidirectional_selective_scan_reference",
    "select_scan_backend",
    "selective_scan_reference",
    "use_scan_backend",
]
