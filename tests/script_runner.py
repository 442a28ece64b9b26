"""
Runs Python as from the command line, in processes forked from a server that has imported PyTorch and transformers.

Their imports take six seconds of a core. The server imports nothing of this repository: what a process imports is
what Python finds that is started in its folder.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import time
from pathlib import Path

import torch


ROOT = Path(__file__).resolve().parent.parent
# What is slow to import.
PACKAGES = ["datasets", "evaluate", "matplotlib.pyplot", "numba", "peft", "torch.utils.tensorboard"]
PACKAGES += ["torchvision.transforms.v2", "transformers.pipelines", "transformers.trainer"]
TIMEOUT = 240  # seconds
# Without this checkout's folders, which pytest has put there, and as it is before a test adds to it: transformers adds
# the folder of remote code.
INSTALLED = [p for p in sys.path if Path(p).is_relative_to(sys.prefix) or not Path(p).resolve().is_relative_to(ROOT)]


class Python:
    """
    Args:
        folder: for what the processes print, and their HF_HOME.
        hub (`HubServer`): the Hub that they know.
    """

    def __init__(self, folder, hub):
        self.folder, self.count = folder, 0
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PACKAGES)
        # The libraries read these when they are imported: the server takes the environment of the first start.
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder), "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_writer"}
        environment |= {f"HF_HUB_DISABLE_{what}": "1" for what in ("PROGRESS_BARS", "TELEMETRY", "XET")}
        before = os.environ.copy()
        os.environ.update(environment)
        try:
            starter = self.context.Process(target=time.sleep, args=(0,))
            starter.start()
            starter.join()
        finally:
            os.environ.clear()
            os.environ.update(before)

    def start(self, command, cwd=None, path=(), environment=None):
        """
        Starts `python COMMAND` in the folder `cwd`, `self.folder` by default, with the folders `path` as PYTHONPATH.

        Returns:
            The process, and the file of what it prints.
        """
        self.count += 1
        log = self.folder / f"{self.count}.log"
        arguments = [str(word) for word in command], str(cwd or self.folder), [str(place) for place in path]
        process = self.context.Process(target=_run, args=(*arguments, INSTALLED, environment or {}, str(log)))
        process.start()
        return process, log

    def run(self, command, cwd=None, path=(), environment=None, fails=False):
        """As `start`; returns what the process has printed, once it has ended well, or badly if `fails`."""
        process, log = self.start(command, cwd, path, environment)
        process.join(TIMEOUT)
        text = log.read_text() if log.exists() else ""
        assert (process.exitcode != 0) == fails, text
        return text

    def run_together(self, count, command, cwd=None, path=()):
        """In `count` processes that find each other, with the environment that `torchrun` gives them."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        started = [self.start(command, cwd, path, environment) for environment in ranks]
        for process, _ in started:
            process.join(TIMEOUT)
        logs = "\n".join(log.read_text() for _, log in started)
        assert all(process.exitcode == 0 for process, _ in started), logs


def _run(command, cwd, path, installed, environment, log):
    """In the new process: what `python COMMAND` does."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment, PYTHONPATH=os.pathsep.join(path))
    os.chdir(cwd)
    torch.set_num_threads(min(2, torch.get_num_threads()))
    sys.path[:] = [cwd, *path, *installed]
    if command[0] == "-c":
        sys.argv = ["-c", *command[2:]]
        exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__"})
    elif command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        sys.path[0] = str(Path(command[0]).parent.resolve())
        runpy.run_path(command[0], run_name="__main__")
