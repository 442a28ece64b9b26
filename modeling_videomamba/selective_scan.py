"""The seam between the model and the selective scan: one function that the mixer calls, and the choice of backend.

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
    bidirectional_selective_scan(xz, conv_weight, ..., order, state)   # the signature of the function below

and add one line to `BACKENDS`. What a backend takes and returns of a state is a pair of tensors, in the shapes and
types of a `ScanState`. (Both functions are imported by name, because only `from .x import y` is followed when
transformers copies code to the Hub.)
"""

import functools
import os
import threading
from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .selective_scan_cuda import bidirectional_selective_scan as cuda_scan
from .selective_scan_cuda import unusable_reason as cuda_unusable_reason
from .selective_scan_cuda_simt import bidirectional_selective_scan as cuda_simt_scan
from .selective_scan_cuda_simt import unusable_reason as cuda_simt_unusable_reason
from .selective_scan_export import bidirectional_selective_scan as export_scan
from .selective_scan_export import unusable_reason as export_unusable_reason
from .selective_scan_mamba_ssm import bidirectional_selective_scan as mamba_ssm_scan
from .selective_scan_mamba_ssm import unusable_reason as mamba_ssm_unusable_reason
from .selective_scan_numba import bidirectional_selective_scan as numba_scan
from .selective_scan_numba import unusable_reason as numba_unusable_reason
from .selective_scan_parts import ScanPart, scan_part
from .selective_scan_reference import bidirectional_selective_scan as sequential_scan
from .selective_scan_reference import unusable_reason as sequential_unusable_reason
from .selective_scan_torch import bidirectional_selective_scan as torch_scan
from .selective_scan_torch import unusable_reason as torch_unusable_reason


class ScanOrder(NamedTuple):
    """
    The order in which the backward direction visits L tokens.

    Attributes:
        visits (`torch.LongTensor` of shape `(L,)`): `visits[k]` is the token visited at step k; each token once.
        places (`torch.LongTensor` of shape `(L,)`): its inverse, `places[visits[k]] == k`.
        reversal (`str`, *optional*): how `visits` can be worked out instead of looked up. The tokens are `frames`
            frames of equally many; `"temporal"` visits the last frame first, each from its first token to its last;
            `"spatial"` visits the first frame first, each from its last token to its first. None is any order.
        frames (`int`): number of frames, 1 for an order without such a structure.
        class_token (`int`, *optional*): index of a token among the L that belongs to no frame. It is visited at step
            `L - 1 - class_token`, its mirrored place.
    """

    visits: torch.Tensor
    places: torch.Tensor
    reversal: str | None = None
    frames: int = 1
    class_token: int | None = None


class ScanState(NamedTuple):
    """
    What a scan carries from one part of a sequence to the next: index 0 is the forward direction, 1 the backward one.

    Each direction goes on from its own: in the order of its visits, the part of a `ScanState` comes before this one.

    Attributes:
        conv (`torch.Tensor` of shape `(2, B, K - 1, E)`): the last inputs of the convolution, the latest visited last.
            They are copies of activations, so they have the type of these, which loses nothing.
        recurrent (`torch.FloatTensor` of shape `(2, B, E, N)`): the state h, of all tokens visited so far; float32, as
            a sum over thousands of tokens must be.
    """

    conv: torch.Tensor
    recurrent: torch.Tensor


# --------------------------------------------------------------------------------------------------------------------
# The choice of backend.
# --------------------------------------------------------------------------------------------------------------------


class ScanBackend(NamedTuple):
    unusable_reason: Callable
    bidirectional_selective_scan: Callable
    fuses_out_proj: bool = False  # takes `out_proj_weight` too, and keeps less for the backward pass
    takes_state: bool = True  # begins with a state, and returns the one it ends with
    takes_part: bool = False  # passes states between processes within its scan; of others, see `scan_part`


# Fastest first; the first usable one is taken. Those after `torch`, which always can, run only when they are named;
# `export` also while a model is exported.
BACKENDS = {
    "cuda": ScanBackend(cuda_unusable_reason, cuda_scan, fuses_out_proj=True, takes_part=True),
    "mamba_ssm": ScanBackend(mamba_ssm_unusable_reason, mamba_ssm_scan, takes_state=False),
    "cuda_simt": ScanBackend(cuda_simt_unusable_reason, cuda_simt_scan),
    "numba": ScanBackend(numba_unusable_reason, numba_scan),
    "torch": ScanBackend(torch_unusable_reason, torch_scan),
    "export": ScanBackend(export_unusable_reason, export_scan),
    "sequential": ScanBackend(sequential_unusable_reason, sequential_scan),
}

ENVIRONMENT_VARIABLE = "VIDEOMAMBA_SCAN_BACKEND"

# Set by `use_scan_backend`: by this thread, and by any, the latest last, for the threads in which autograd scans
# checkpointed layers again. (torch.compile cannot trace a ContextVar, nor a subclass of `threading.local`.)
_forced = threading.local()
_forced_somewhere = []


@contextmanager
def use_scan_backend(name):
    """
    Force the scan backend by name within a `with` block, over the environment variable and the model's config. Each
    thread follows its own block; those without one, as autograd's are, follow the latest.

    Args:
        name (`str`): one of `BACKENDS`.

    Raises:
        ValueError: if there is no backend of that name.
    """
    if name not in BACKENDS:
        raise ValueError(f"Unknown scan backend {name!r}; there are: {', '.join(BACKENDS)}.")
    previous = getattr(_forced, "name", None)
    _forced.name = name
    _forced_somewhere.append(name)
    try:
        yield
    finally:
        _forced.name = previous
        _forced_somewhere.remove(name)


def select_scan_backend(device, dtype, name=None, takes_state=False):
    """
    The name of the backend that will scan tensors of this device and dtype.

    Args:
        device (`torch.device`): where the tensors are.
        dtype (`torch.dtype`): type of the activations.
        name (`str`, *optional*): a backend to force, as the model's config does. Weaker than `use_scan_backend` and
            than the environment variable `VIDEOMAMBA_SCAN_BACKEND`.
        takes_state (`bool`, defaults to `False`): whether it must be able to begin with a state.

    Raises:
        ValueError: if a forced backend does not exist or cannot run here; it lists those that can, and why the
            others cannot.
    """
    forced = getattr(_forced, "name", None) or (_forced_somewhere[-1] if _forced_somewhere else None)
    name = forced or os.environ.get(ENVIRONMENT_VARIABLE) or name
    if name is None:
        # Dynamo of PyTorch 2.11 takes any compilation for an export.
        if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
            return "export"
        for name, backend in BACKENDS.items():
            if _unusable_reason(backend, device, dtype, takes_state) is None:
                return name
    if name in BACKENDS and _unusable_reason(BACKENDS[name], device, dtype, takes_state) is None:
        return name
    reasons = {b: _unusable_reason(backend, device, dtype, takes_state) for b, backend in BACKENDS.items()}
    usable = ", ".join(b for b, reason in reasons.items() if reason is None)
    unusable = "".join(f"\n  {b}: {reason}" for b, reason in reasons.items() if reason is not None)
    raise ValueError(
        f"The scan backend {name!r} was asked for, but "
        + ("cannot run" if name in BACKENDS else "does not exist")
        + f" on {device} with {dtype}. Usable here: {usable}."
        + (f" Not usable:{unusable}" if unusable else "")
    )


def _unusable_reason(backend, device, dtype, takes_state):
    if takes_state and not backend.takes_state:
        return "its kernels cannot begin with a state"
    return backend.unusable_reason(device, dtype)


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
    out_proj_weight=None,
    state=None,
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
        order (`ScanOrder` or `ScanPart`, *optional*): in which the backward direction visits the tokens; the full
            reversal if not given. A `ScanPart` says that the tokens are a part of a sequence whose other parts other
            processes scan at the same time; all must call this function, and, for gradients, go back through it.
        backend (`str`, *optional*): see [`select_scan_backend`].
        out_proj_weight (`torch.Tensor` of shape `(hidden_size, E)`, *optional*): the result is multiplied by it, if
            given. A backend that fuses this product need not keep its input for the backward pass.
        state (`ScanState`, *optional*): what each direction begins with, as the call with the part before it returned;
            without one, with zeros. Gradients go through it.

    Returns:
        `torch.Tensor` of shape `(B, L, E)`, or `(B, L, hidden_size)` if projected, and the type of `xz`. Inside, Δ,
        A, the state and the sums are float32 whatever the type of `xz`. If `state` is given, a pair: this tensor, and
        the `ScanState` that each direction ends with, after the last of its visits.

    Raises:
        ValueError: if `order` has another length than `xz`, or is of a part that is shorter than the convolution
            looks back, or that is given a state; or `state` has not the shapes of a `ScanState` or lies on
            another device; or if the backend that was asked for cannot begin with a state. What `order` holds is
            looked at on a CPU with Numba alone; it must be each token once.
    """
    part = order if isinstance(order, ScanPart) else None
    if part is not None:
        order = part.order
        _check_part(xz, conv_weight.shape[2] - 1, state)
    if order is not None and order.visits.shape != (xz.shape[1],):
        raise ValueError(
            f"`order` must list the {xz.shape[1]} tokens of `xz`; got the shape {tuple(order.visits.shape)}."
        )
    chosen = BACKENDS[select_scan_backend(xz.device, xz.dtype, backend, takes_state=(state or part) is not None)]
    parameters = (conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)
    scan = chosen.bidirectional_selective_scan
    # Without gradients nothing is kept, and the product runs as fast outside.
    if out_proj_weight is not None and chosen.fuses_out_proj and torch.is_grad_enabled():
        scan, out_proj_weight = functools.partial(scan, out_proj_weight=out_proj_weight), None
    if part is not None:
        out = (
            scan(xz, *parameters, order=order, part=part)
            if chosen.takes_part
            else scan_part(scan, part, xz, *parameters)
        )
    elif state is None:
        out = scan(xz, *parameters, order=order)
    else:
        state = _checked_state(state, xz, conv_weight.shape[2], A_log.shape[2])
        out, after = scan(xz, *parameters, order=order, state=state)
    if out_proj_weight is not None:
        out = F.linear(out, out_proj_weight)
    return out if state is None else (out, ScanState(*after))


def _check_part(xz, taps_before, state):
    if state is not None:
        raise ValueError("A part of a sequence gets its state from the other processes: leave out `state`.")
    if xz.shape[1] < taps_before:
        raise ValueError(
            f"A part has {xz.shape[1]} tokens, but the convolution looks back at {taps_before}: use fewer processes."
        )


def _checked_state(state, xz, taps, num_states):
    """The state's tensors in the types that backends take."""
    conv, recurrent = state
    batch, channels = xz.shape[0], xz.shape[2] // 2
    for name, tensor, shape in (
        ("conv", conv, (2, batch, taps - 1, channels)),
        ("recurrent", recurrent, (2, batch, channels, num_states)),
    ):
        if tensor.shape != shape or tensor.device != xz.device:
            raise ValueError(
                f"`state.{name}` must have the shape {shape} on {xz.device}, for `xz` of the shape "
                f"{tuple(xz.shape)}; got {tuple(tensor.shape)} on {tensor.device}."
            )
    return conv.to(xz.dtype), recurrent.float()


__all__ = [
    "ScanOrder",
    "ScanPart",
    "ScanState",
    "bidirectional_selective_scan",
    "select_scan_backend",
    "use_scan_backend",
]
