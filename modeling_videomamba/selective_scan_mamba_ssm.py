"""
The scan with the public CUDA kernels, mamba-ssm's `selective_scan_fn` and causal-conv1d, where a user has built them.

It is there to compare with, and for GPUs that the `cuda` backend does not know. The kernels want channels first and
know one direction: what that costs (transposes, flips, two launches of everything) other Vision-Mamba codes pay too.

Without these packages, built kernels can come from the Kernel Hub through the package `kernels`: set the environment
variable `VIDEOMAMBA_HUB_KERNELS` to a repository, `kernels-community/mamba-ssm`, or to a folder with one.
"""

import os
from pathlib import Path

import torch


HUB_KERNELS = "VIDEOMAMBA_HUB_KERNELS"
HUB_VERSION = 5  # of kernels-community/mamba-ssm, which transformers takes too
# What each package compiles; without nvcc it may be installed without that.
COMPILED = {"causal_conv1d_cuda": "causal-conv1d", "selective_scan_cuda": "mamba-ssm"}

causal_conv1d_fn = selective_scan_fn = None
try:
    if source := os.environ.get(HUB_KERNELS):
        from kernels import get_kernel, get_local_kernel

        module = get_local_kernel(Path(source)) if os.path.isdir(source) else get_kernel(source, version=HUB_VERSION)
        causal_conv1d_fn, selective_scan_fn = module.causal_conv1d_fn, module.selective_scan_fn
    else:
        from causal_conv1d import causal_conv1d_fn
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    _import_error = None
except Exception as error:  # a build against another PyTorch fails with an OSError, a lack of it with an ImportError
    _import_error = f"{type(error).__name__}: {error}"
    if (package := COMPILED.get(getattr(error, "name", None))) is not None:
        _import_error = f"{package} is installed without its CUDA kernel {error.name}: build it again, with nvcc"


def unusable_reason(device, dtype):
    """Why this backend cannot run on `device` with activations of `dtype`, or None."""
    if _import_error is not None:
        return (
            f"it needs the packages mamba-ssm and causal-conv1d, or {HUB_KERNELS}=kernels-community/mamba-ssm and the "
            f"package kernels ({_import_error})"
        )
    if device.type != "cuda":
        return f"it needs an NVIDIA GPU, and the tensors are on {device}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float32, float16 and bfloat16, not {dtype}"
    return None


def bidirectional_selective_scan(
    xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D, order=None
):
    """See `selective_scan.bidirectional_selective_scan`."""
    x, z = xz.transpose(1, 2).chunk(2, dim=1)  # (B, E, L)
    rank, state_size = dt_proj_weight.shape[2], A_log.shape[2]
    outputs = []
    for direction in range(2):
        visits = x
        if direction:
            visits = x.flip(2) if order is None else x[:, :, order.visits]
        u = causal_conv1d_fn(
            visits, conv_weight[direction].to(x.dtype), conv_bias[direction].to(x.dtype), activation="silu"
        )
        projected = u.transpose(1, 2) @ x_proj_weight[direction].to(u.dtype).T
        time_step, B, C = projected.split([rank, state_size, state_size], dim=-1)
        y = selective_scan_fn(
            u,
            (time_step @ dt_proj_weight[direction].to(u.dtype).T).transpose(1, 2),
            -torch.exp(A_log[direction].float()),
            B.transpose(1, 2).contiguous(),
            C.transpose(1, 2).contiguous(),
            D[direction].float(),
            delta_bias=dt_proj_bias[direction].float(),
            delta_softplus=True,
        )
        if direction:
            y = y.flip(2) if order is None else y[:, :, order.places]
        outputs.append(y)
    gated = (outputs[0] + outputs[1]) * (torch.nn.functional.silu(z) / 2)
    return gated.transpose(1, 2).contiguous()
