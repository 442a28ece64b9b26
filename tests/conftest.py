"""What all tests share: no network, two threads at most, the `gpu` marker, and the folder of real clips."""

import os
import socket
from pathlib import Path


# Before the first import of transformers or datasets, which read it once.
os.environ["HF_HUB_OFFLINE"] = "1"
# Before that of torch. A thread that waits for the others sleeps, and does not spin: beside two other busy processes
# tests took 41 s that take 10 s alone, and so 18 s.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

from script_runner import Python


# The tensors of the tests are tiny: more threads make them slower on large machines.
torch.set_num_threads(min(2, torch.get_num_threads()))

SHARED_DATA = Path(os.environ.get("SHARED_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and PyTorch sees none here"))


@pytest.fixture(scope="session", autouse=True)
def no_network():
    """Whatever connects to another machine gets an error that says so; servers on this one may be asked."""

    def connect(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"a test tried to connect to {address}: tests must not need the network")
        return original(self, address)

    original = socket.socket.connect
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect)
        yield


@pytest.fixture(scope="session")
def video(tmp_path_factory):
    """Returns the path of a file of `video_files.FILES`, of 60 numbered frames; writes it when first asked for."""
    from video_files import FILES, write_video

    folder = tmp_path_factory.mktemp("videos")

    def path(name):
        file = folder / name
        if not file.exists():
            write_video(file, 60, **FILES[name])
        return str(file)

    return path


@pytest.fixture(scope="session")
def stored(tmp_path_factory) -> Path:
    """A folder with one clip, stored in all the ways of `video_files.STORED`."""
    from video_files import STORED, write_stored

    folder = tmp_path_factory.mktemp("stored")
    for name in STORED:
        write_stored(folder / name)
    return folder


@pytest.fixture(scope="session")
def bars(tmp_path_factory) -> Path:
    """Eight training and four validation clips of a bright bar that moves to the left or to the right."""
    from video_files import write_moving_bars

    return write_moving_bars(tmp_path_factory.mktemp("moving_bars"), {"train": 4, "validation": 2})


@pytest.fixture(scope="session")
def hub():
    """The Hub that the processes of `python` know. It is used by all tests: each has repositories of its own."""
    from hub_server import HubServer

    with HubServer(large_files=True).serve() as server:
        server.readers.add("hf_reader")
        yield server


@pytest.fixture(scope="session")
def python(hub, tmp_path_factory):
    """Runs Python in processes that need not import PyTorch and transformers: a `script_runner.Python`."""
    return Python(tmp_path_factory.mktemp("python"), hub)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real video clips beside the project, which are not ours to distribute."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the real clips in {SHARED_DATA}, which is not there (SHARED_DATA=folder names another)")
    return SHARED_DATA
