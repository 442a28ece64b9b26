"""Runs a script of examples/ in a process forked from a server that has imported it already."""

import importlib
import os
import sys

import torch


def run_script(name, arguments, log, environment):
    """In a process of its own: the script as if called from the command line, what it prints in the file `log`."""
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    sys.argv = [name, *map(str, arguments)]
    importlib.import_module(name).main()
