"""What has to hold in forked processes, which inherit none of their parent's threads."""

import os

import torch
from torch.utils.data import get_worker_info


def after_fork(function):
    """Decorates a function of no arguments that is called in each process that is forked from this one."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)
    return function


@after_fork
def _use_one_thread():
    """
    OpenMP does not know that its threads are gone: what PyTorch splits among them (copies, resizing, products) would
    wait for ever. Among one, nothing is split. PyTorch does the same in the workers of a `DataLoader`.
    """
    torch.set_num_threads(1)


def decoding_threads() -> int:
    """One in a worker of a `DataLoader`, of which there are as many as cores; elsewhere 0: as many as cores."""
    return 0 if get_worker_info() is None else 1


__all__ = ["after_fork", "decoding_threads"]
