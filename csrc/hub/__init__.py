"""
VideoMamba's selective scan for other models: mamba-ssm's `selective_scan_fn`, and both directions of a Vision Mamba
block in one call. On NVIDIA GPUs it is CUDA C++ that PyTorch's NVRTC compiles at the first call; elsewhere PyTorch.
"""

from . import layers
from .bimamba import bimamba_forward, bimamba_inner_fn_no_out_proj
from .selective_scan_interface import selective_scan_fn


__all__ = ["bimamba_forward", "bimamba_inner_fn_no_out_proj", "layers", "selective_scan_fn"]
