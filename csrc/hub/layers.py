"""What the package `kernels` puts in the place of a model's own functions: names for transformers' `KernelConfig`."""

import torch
from torch import nn

from .bimamba import bimamba_forward
from .selective_scan_interface import selective_scan_fn as scan


class selective_scan_fn(nn.Module):  # named as transformers' Mamba models ask for it
    """The scan of transformers' Mamba, with its arguments; the last two choose between its own ways."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D=None,
        z=None,
        delta_bias=None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        use_mambapy: bool = False,
        use_associative_scan: bool = False,
        **kwargs,
    ):
        return scan(hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


class BiMamba(nn.Module):
    """The block of Vision Mamba and of OpenGVLab's VideoMamba; see `bimamba_forward`."""

    def forward(self, hidden_states, inference_params=None):
        return bimamba_forward(self, hidden_states, inference_params)
