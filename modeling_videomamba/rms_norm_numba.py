"""
RMSNorm of the float32 residual stream on a CPU, without gradients: one pass over memory where PyTorch takes six, or
with the sum before it seven. With gradients, in a compiled model or without Numba the model's own lines run.
"""

import torch

from .selective_scan_cuda_runtime import nobody_looks_on
from .selective_scan_numba import run_kernel, unusable_reason
from .selective_scan_numba_kernels import NORM_ROWS, rms_norm


def can_fuse_rms_norm(hidden_states, weight):
    """Whether [`fused_rms_norm`] takes these tensors, and nobody wants their gradients."""
    return (
        hidden_states.device.type == weight.device.type == "cpu"
        and nobody_looks_on((hidden_states, weight))
        and hidden_states.dtype == torch.float32
        and weight.dtype in (torch.float32, torch.bfloat16)
        and hidden_states.is_contiguous()
        and weight.is_contiguous()
        and unusable_reason(weight.device, weight.dtype) is None
    )


def fused_rms_norm(hidden_states, weight, eps):
    """See `rms_norm_cuda.fused_rms_norm`; the weight is float32 or bfloat16."""
    return _run(hidden_states, weight.new_empty(0), weight, eps, hidden_states.new_empty(0))


def fused_add_rms_norm(hidden_states, update, weight, eps):
    """See `rms_norm_cuda.fused_add_rms_norm`."""
    total = torch.empty_like(hidden_states)
    return total, _run(hidden_states, update, weight, eps, total)


def _run(hidden_states, update, weight, eps, total):
    out = torch.empty_like(hidden_states, dtype=weight.dtype)
    size = weight.shape[0]
    rows = out.numel() // size
    tables = (t.view(t.numel() // size, size) for t in (hidden_states, update, total, out))
    run_kernel(rms_norm, -(-rows // NORM_ROWS), *tables, weight, eps)
    return out
