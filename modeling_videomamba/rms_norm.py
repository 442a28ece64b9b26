"""RMSNorm without gradients, in one kernel for the device: the functions are those of `rms_norm_cuda`, which see."""

from .rms_norm_cuda import can_fuse_rms_norm as cuda_can_fuse
from .rms_norm_cuda import fused_add_rms_norm as cuda_add_rms_norm
from .rms_norm_cuda import fused_rms_norm as cuda_rms_norm
from .rms_norm_numba import can_fuse_rms_norm as numba_can_fuse
from .rms_norm_numba import fused_add_rms_norm as numba_add_rms_norm
from .rms_norm_numba import fused_rms_norm as numba_rms_norm


def can_fuse_rms_norm(hidden_states, weight):
    return (cuda_can_fuse if hidden_states.is_cuda else numba_can_fuse)(hidden_states, weight)


def fused_rms_norm(hidden_states, weight, eps):
    return (cuda_rms_norm if hidden_states.is_cuda else numba_rms_norm)(hidden_states, weight, eps)


def fused_add_rms_norm(hidden_states, update, weight, eps):
    return (cuda_add_rms_norm if hidden_states.is_cuda else numba_add_rms_norm)(hidden_states, update, weight, eps)
