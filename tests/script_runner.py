"""Runs scripts in processes of their own."""

import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch


def run_script(name, arguments, log, environment):
    """
    A script of examples/, in a process forked from a server that has imported it already: as if called from the
    command line, what it prints in the file `log`.
    """
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    sys.argv = [name, *map(str, arguments)]
    importlib.import_module(name).main()


def run_in_processes(count, code, *arguments):
    """Runs Python code in processes that find each other, and says what went wrong in one of them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    processes = [
        subprocess.Popen(command, env=environment | rank, stderr=subprocess.PIPE, text=True) for rank in ranks
    ]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)
