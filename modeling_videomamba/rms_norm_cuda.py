"""
RMSNorm of the float32 residual stream on NVIDIA GPUs, without gradients: one kernel where PyTorch takes three, or with
the sum before it four.

With gradients, in a compiled model or elsewhere the model's own lines run.
"""

import ctypes
import functools

import torch

from .selective_scan_cuda import unusable_reason
from .selective_scan_cuda_runtime import DTYPES, Launch, nobody_looks_on


THREADS = 128  # of a block: four rows


class NormArguments(ctypes.Structure):
    """`NormArgs` of csrc/norm.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "out", "update", "sum")),
        ("rows", ctypes.c_longlong),
        ("eps", ctypes.c_float),
    ]


def can_fuse_rms_norm(hidden_states, weight):
    """Whether [`fused_rms_norm`] takes these tensors, and nobody wants their gradients."""
    size = weight.shape[0]
    return (
        hidden_states.is_cuda
        and nobody_looks_on((hidden_states, weight))
        and hidden_states.dtype == torch.float32
        and hidden_states.is_contiguous()
        and weight.is_contiguous()
        and hidden_states.data_ptr() % 16 == 0
        and size % 4 == 0
        and size <= 2048
        and unusable_reason(hidden_states.device, weight.dtype) is None
        and hidden_states.device.index == torch.cuda.current_device() == weight.device.index
    )


def fused_rms_norm(hidden_states, weight, eps):
    """
    Root-mean-square norm over the last axis.

    Args:
        hidden_states (`torch.FloatTensor` of shape `(..., D)`): float32, contiguous.
        weight (`torch.Tensor` of shape `(D,)`): float32, float16 or bfloat16.
        eps (`float`): added to the mean square.

    Returns:
        `torch.Tensor` of shape `(..., D)` and the type of `weight`; computed in float32.
    """
    return _run(hidden_states, weight, eps)


def fused_add_rms_norm(hidden_states, update, weight, eps):
    """
    The sum of the residual stream and what a layer adds to it, and its norm.

    Args:
        hidden_states, weight, eps: see [`fused_rms_norm`].
        update (`torch.Tensor` of shape `(..., D)`): contiguous, in the type of `weight`.

    Returns:
        the sum `(..., D)` in float32, and the norm of it, `(..., D)` in the type of `weight`.
    """
    total = torch.empty_like(hidden_states)
    return total, _run(hidden_states, weight, eps, update=update.data_ptr(), sum=total.data_ptr())


def _run(hidden_states, weight, eps, **more):
    out = torch.empty_like(hidden_states, dtype=weight.dtype)
    rows = hidden_states.numel() // weight.shape[0]
    if rows:
        pointers = {"x": hidden_states.data_ptr(), "weight": weight.data_ptr(), "out": out.data_ptr(), **more}
        arguments = NormArguments(rows=rows, eps=eps, **pointers)
        stream = torch.cuda.current_stream(weight.device).cuda_stream if weight.is_cuda else 0
        _launch(weight.device, weight.dtype, weight.shape[0], rows)(arguments, stream)
    return out


@functools.lru_cache(maxsize=256)
def _launch(device, dtype, size, rows):
    options = {"IO": DTYPES[dtype], "PT": DTYPES[dtype], "CHANNELS": size, "VEC": 1}
    return Launch("rms_norm", options, (-(-rows * 32 // THREADS), 1, 1), THREADS, 0, device, {})
