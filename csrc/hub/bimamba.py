"""Both directions of the block that Vision Mamba and OpenGVLab's VideoMamba share ("bimamba v2"), in one scan."""

import torch
import torch.nn.functional as F

from .selective_scan_cuda import bidirectional_selective_scan as cuda_scan
from .selective_scan_cuda import unusable_reason as cuda_unusable_reason
from .selective_scan_cuda_simt import bidirectional_selective_scan as cuda_simt_scan
from .selective_scan_cuda_simt import unusable_reason as cuda_simt_unusable_reason
from .selective_scan_interface import turned
from .selective_scan_torch import bidirectional_selective_scan as torch_scan


def bidirectional_scan(xz, parameters):
    """
    Convolution, projections, scan and gate of both directions, on whatever `xz` is.

    Args:
        xz (`torch.Tensor` of shape `(B, L, 2E)`): the input and the gate, side by side.
        parameters: of each direction the weight (E, 1, K) and bias (E,) of the convolution, the weights of `x_proj`
            (R + 2N, E) and `dt_proj` (E, R), the bias of `dt_proj` (E,), `A_log` (E, N) and `D` (E,).

    Returns:
        `torch.Tensor` of shape `(B, L, E)`: the mean of the directions, each at its own token.
    """
    stacked = [torch.stack(both) for both in zip(*parameters, strict=True)]
    stacked[0] = stacked[0].flatten(2)
    scan = torch_scan
    if cuda_unusable_reason(xz.device, xz.dtype) is None:
        scan = cuda_scan
    elif cuda_simt_unusable_reason(xz.device, xz.dtype) is None:
        scan = cuda_simt_scan
    return scan(xz, *stacked)


def bimamba_inner_fn_no_out_proj(xz, forward, backward):
    """
    What Vision Mamba's block computes by two calls of `mamba_inner_fn_no_out_proj`, on `xz` and on its reversal.

    Args:
        xz (`torch.Tensor` of shape `(B, 2E, L)`): the input and the gate, channels first; float32, float16, bfloat16.
        forward, backward: of each direction `(conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, D,
            delta_bias)`, in the shapes (E, 1, K), (E,), (R + 2N, E), (E, R), (E, N), (E,) and (E,). A is negative, and
            the softplus of Δ is taken.

    Returns:
        `torch.Tensor` of shape `(B, E, L)` and the type of `xz`: the sum of both directions, gated, each output at its
        own token: `out + out_b.flip([-1])` of the block.
    """
    parameters = []
    for conv_weight, conv_bias, x_proj_weight, dt_weight, A, D, dt_bias in (forward, backward):
        parameters.append((conv_weight, conv_bias, x_proj_weight, dt_weight, dt_bias, torch.log(-A), D))
    return 2 * turned(bidirectional_scan(turned(xz), parameters))


def bimamba_forward(self, hidden_states, inference_params=None):
    """
    A `forward` for the class `Mamba` of Vision Mamba's and OpenGVLab's code: `Mamba.forward = bimamba_forward`.
    Nothing is transposed or flipped.

    Args:
        self: the block, with `in_proj`, `conv1d`, `x_proj`, `dt_proj`, `A_log`, `D`, the same of the backward
            direction (`conv1d_b` and so on; `A_b_log`, `D_b`), and `out_proj`. If it has `if_devide_out` and that is
            true, the directions' mean is taken, else their sum; `gamma` multiplies the output if `init_layer_scale` is
            set.
        hidden_states (`torch.Tensor` of shape `(B, L, D)`).
        inference_params: must be None.

    Returns:
        `torch.Tensor` of shape `(B, L, D)`.

    Raises:
        ValueError: if the block has no backward direction with weights of its own, or a state is asked for.
    """
    if inference_params is not None or not hasattr(self, "conv1d_b"):
        raise ValueError(
            "bimamba_forward computes a whole sequence through a block of two directions (`bimamba_type='v2'`); found "
            f"{'inference_params' if inference_params is not None else 'no `conv1d_b`'}. Leave this block as it is."
        )
    parameters = [
        (conv.weight, conv.bias, x_proj.weight, dt_proj.weight, dt_proj.bias, A_log, D)
        for conv, x_proj, dt_proj, A_log, D in (
            (self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D),
            (self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b),
        )
    ]
    mean = bidirectional_scan(self.in_proj(hidden_states), parameters)
    weight = self.out_proj.weight * (1 if getattr(self, "if_devide_out", False) else 2)
    out = F.linear(mean, weight, self.out_proj.bias)
    return out * self.gamma if getattr(self, "init_layer_scale", None) is not None else out
