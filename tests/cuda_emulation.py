"""Runs the CUDA kernels of csrc/ on the CPU, compiled as C++ (`cuda_on_cpu.h`): a pytest plugin with fixtures.

What was compiled is kept in `tests/.cache`, under a name that covers all that goes into it.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import torch

from modeling_videomamba import selective_scan_cuda, selective_scan_cuda_simt
from modeling_videomamba import selective_scan_cuda_runtime as runtime


SHIM = Path(__file__).with_name("cuda_on_cpu.h")
CSRC = Path(__file__).parents[1] / "csrc"
CACHE = Path(__file__).parent / ".cache" / "emulated_kernels"
FLAGS = ["-O1", "-std=c++17", "-fPIC", "-w", "-U_FORTIFY_SOURCE"]  # which forbids jumps from stack to stack


@functools.cache
def prepared_compiler():
    """The compiler, and a folder of its own in the cache, where the shim lies compiled. Skips the test without one."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++, to compile the CUDA kernels for the CPU")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    sources = [path.read_text() for path in (SHIM, *sorted(CSRC.glob("*.cu*")))]
    key = hashlib.sha256(repr((compiler, version, FLAGS, sources)).encode()).hexdigest()[:16]
    folder = CACHE / key
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        for other in CACHE.iterdir():  # of other sources, but for those that another process may be using
            if time.time() - other.stat().st_mtime > 24 * 3600:
                shutil.rmtree(other, ignore_errors=True)
        made = Path(tempfile.mkdtemp(dir=CACHE))
        shim = shutil.copy(SHIM, made)
        # GCC takes what lies beside a header under this name.
        subprocess.run([compiler, *FLAGS, "-x", "c++-header", "-o", f"{shim}.gch", shim], check=True)
        try:
            made.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(made)
    return compiler, folder


@functools.cache
def compiled_for_cpu(file, options, more):
    """
    A library of a file of csrc/.

    Args:
        file (`str`): its name.
        options (`tuple[tuple[str, int]]`): macros.
        more (`str`): C++ that follows it.
    """
    compiler, folder = prepared_compiler()
    name = hashlib.sha256(repr((file, options, more)).encode()).hexdigest()[:16]
    library = folder / f"{name}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as here:
            source, made = Path(here, "source.cpp"), Path(here, "made.so")
            source.write_text(f'#include "../{SHIM.name}"\n#include "{CSRC / file}"\n{more}\n')
            macros = [f"-D{macro}={value}" for macro, value in options]
            subprocess.run([compiler, *FLAGS, "-shared", *macros, "-o", made, source], check=True)
            made.replace(library)
    return ctypes.CDLL(str(library))


def queue_on_cpu(launch, arguments, stream):
    """Takes the place of `Launch.queue`."""
    assert launch.shared <= 227 * 1024, "more shared memory than a Hopper GPU has"
    # The limit of registers is nothing to a CPU.
    options = ((f"{launch.name.upper()}_KERNEL", 1), *((k, v) for k, v in launch.options.items() if k != "MINBLOCKS"))
    struct = {"rms": "NormArgs", "simt": "SimtArgs", "layout": "LayoutArgs"}.get(launch.name.split("_")[0], "Args")
    start = f"""extern "C" void launch(const {struct} *args, int x, int y, int z, int threads) {{
        run_on_cpu([=] {{ {launch.name}(*args); }}, x, y, z, threads);
    }}"""
    library = compiled_for_cpu(runtime.KERNEL_FILES[launch.name], options, start)
    library.launch(ctypes.byref(arguments), *launch.grid, launch.threads)


@pytest.fixture(scope="session")
def compile_for_cpu():
    return compiled_for_cpu


@pytest.fixture
def on_cpu(monkeypatch):
    """Send launches to the CPU; gives a function that sets how many multiprocessors the scan shall plan for."""

    def new(call, *shape, dtype=torch.float32):
        return torch.full(shape, float("nan"), dtype=dtype, device="cpu")

    monkeypatch.setattr(runtime.Launch, "queue", queue_on_cpu)
    monkeypatch.setattr(selective_scan_cuda.ScanCall, "new", new)
    monkeypatch.setattr(selective_scan_cuda_simt._Walks, "new", new)

    def plan_for(multiprocessors):
        for backend in (selective_scan_cuda, selective_scan_cuda_simt):
            monkeypatch.setattr(backend, "multiprocessors_of", lambda device: multiprocessors)

    return plan_for


@pytest.fixture
def launched(on_cpu, monkeypatch):
    """The names of the kernels that were launched."""
    names, queue = [], runtime.Launch.queue
    monkeypatch.setattr(
        runtime.Launch, "queue", lambda launch, *arguments: names.append(launch.name) or queue(launch, *arguments)
    )
    return names
