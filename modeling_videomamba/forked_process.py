"""What has to hold in a forked process, which inherits none of its parent's threads."""

import os

import torch
from torch.utils.data import get_worker_info


def _use_one_thread():
    """
    PyTorch's OpenMP does not know that its threads are gone: what it splits among them would wait for ever. It splits
    nothing among one. (PyTorch does the same in the workers of a `DataLoader`.)
    """
    torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_use_one_thread)


def decoding_threads() -> int:
    """One in a worker of a `DataLoader`, of which there are as many as cores; elsewhere 0: as many as cores."""
    return 0 if get_worker_info() is None else 1


__all__ = ["decoding_threads"]
