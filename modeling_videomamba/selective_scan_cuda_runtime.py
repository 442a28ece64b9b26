"""
Compiles the GPU backend's kernels with the NVRTC that comes with PyTorch, keeps their machine code, launches them.

Environment variables: `VIDEOMAMBA_CACHE` names the folder of the machine code, by default `~/.cache/videomamba`;
`VIDEOMAMBA_NVRTC_FLAGS` adds compiler flags, such as `-lineinfo` for a profiler.
"""

import copy
import ctypes
import functools
import hashlib
import os
import re
import shlex
import tempfile
from pathlib import Path

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .selective_scan_cuda_source import SOURCES


KERNEL_FILES = {
    **dict.fromkeys(("scan", "states", "ends", "adjoint", "pass_states"), "scan.cu"),
    **dict.fromkeys(("gate", "gate_backward", "ungate"), "scan.cu"),
    **dict.fromkeys(("conv", "conv_backward", "proj_conv_backward"), "convolution.cu"),
    "backward": "scan_backward.cu",
    "rms_norm": "norm.cu",
    "layout": "layout.cu",
    **dict.fromkeys(("simt_ends", "simt_pass", "simt_scan", "simt_backward"), "simt.cu"),
}
PLAIN_TENSORS = {torch.Tensor, torch.nn.Parameter, type(None)}
BLOCK_OVERHEAD = 1024  # bytes of shared memory that a thread block takes beside those that it asks for
INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # the option IO of csrc/primitives.cuh


def source_constant(name, file="primitives.cuh"):
    """The integer that a file of the kernels defines as `name`."""
    return int(re.search(rf"^#define {name} (\d+)", SOURCES[file], re.MULTILINE)[1])


def included_sources(name):
    """Sources that a file of the kernels consists of: `{file name: text}`, itself first."""
    found = {name: SOURCES[name]}
    for included in re.findall(r'^#include "(.+)"', SOURCES[name], re.MULTILINE):
        found |= included_sources(included)
    return found


def no_gpu_reason(device, dtype):
    """Why no kernel can run on `device` with activations of `dtype`, or None."""
    if device.type != "cuda" or torch.version.cuda is None:
        return f"it needs an NVIDIA GPU, and the tensors are on {device}"
    if dtype not in DTYPES:
        return f"it takes float32, float16 and bfloat16, not {dtype}"
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU"
    return None


@functools.cache
def multiprocessors_of(device):
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def nvrtc():
    """The NVRTC that came with PyTorch, or the system's."""
    major = torch.version.cuda.split(".")[0]
    windows = os.name == "nt"
    names = [f"nvrtc64_{major}0_0.dll" if windows else f"libnvrtc.so.{major}"]
    packages = Path(torch.__file__).parents[1] / "nvidia"
    for folder in (f"cu{major}", "cuda_nvrtc"):
        names.append(str(packages / folder / ("bin" if windows else "lib") / names[0]))
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise OSError(f"no {names[0]} on the library path or in {packages}")


@functools.cache
def compiled_architectures():
    """The compute capabilities that this NVRTC compiles for, times ten: 75 is 7.5."""
    count = ctypes.c_int()
    nvrtc().nvrtcGetNumSupportedArchs(ctypes.byref(count))
    found = (ctypes.c_int * count.value)()
    nvrtc().nvrtcGetSupportedArchs(found)
    return set(found)


@functools.cache
def driver():
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")


def _check(status, what):
    if status:
        message = ctypes.c_char_p()
        driver().cuGetErrorString(status, ctypes.byref(message))
        raise RuntimeError(f"{what} failed: {(message.value or b'unknown error').decode()}")


def compile_kernel(name, options, architecture, flags=()):
    """
    Compile a kernel by NVRTC.

    Args:
        name (`str`): one of `KERNEL_FILES`.
        options (`dict[str, int]`): macros of csrc/primitives.cuh, and their values.
        architecture (`str`): such as `"sm_90"`.
        flags (`Sequence[str]`): further ones of NVRTC.

    Returns:
        the machine code (`bytes`, a cubin), and what the compiler had to say (`str`).

    Raises:
        RuntimeError: if the source does not compile; the compiler's messages, with file and line, are in it.
    """
    library, file = nvrtc(), KERNEL_FILES[name]
    headers = {included: source for included, source in included_sources(file).items() if included != file}
    program = ctypes.c_void_p()

    def check(status):
        if status:
            library.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise RuntimeError(f"NVRTC: {library.nvrtcGetErrorString(status).decode()}{log()}")

    def log():
        size = ctypes.c_size_t()
        if not program or library.nvrtcGetProgramLogSize(program, ctypes.byref(size)):
            return ""
        text = ctypes.create_string_buffer(size.value)
        library.nvrtcGetProgramLog(program, text)
        return "\n" + text.value.decode(errors="replace")

    def strings(values):
        return (ctypes.c_char_p * len(values))(*(value.encode() for value in values))

    texts, names = strings(headers.values()), strings(headers)
    source = SOURCES[file].encode(), file.encode()
    check(library.nvrtcCreateProgram(ctypes.byref(program), *source, len(headers), texts, names))
    try:
        arguments = [*compiler_arguments(name, options, architecture), *flags]
        check(library.nvrtcCompileProgram(program, len(arguments), strings(arguments)))
        size = ctypes.c_size_t()
        check(library.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        cubin = ctypes.create_string_buffer(size.value)
        check(library.nvrtcGetCUBIN(program, cubin))
        return cubin.raw, log()
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def compiler_arguments(name, options, architecture):
    """Flags for a kernel that NVRTC and nvcc both take."""
    macros = {f"{name.upper()}_KERNEL": 1, **options}
    extra = shlex.split(os.environ.get("VIDEOMAMBA_NVRTC_FLAGS", ""))
    return [f"-arch={architecture}", "-std=c++17", *(f"-D{macro}={value}" for macro, value in macros.items()), *extra]


def nvrtc_version():
    """Of the compiler: (13, 0)."""
    version = ctypes.c_int(), ctypes.c_int()
    nvrtc().nvrtcVersion(*(ctypes.byref(v) for v in version))
    return tuple(v.value for v in version)


def cache_folder():
    """Where machine code is kept, and what is known of it."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("VIDEOMAMBA_CACHE") or Path(cache) / "videomamba")


def cubin_path(name, options, architecture):
    """Where the machine code of a kernel is kept: named by all that goes into it."""
    sources = included_sources(KERNEL_FILES[name])
    key = repr((sources, compiler_arguments(name, options, architecture), list(nvrtc_version())))
    return cache_folder() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()}.cubin"


def _cached_cubin(name, options, architecture):
    path = cubin_path(name, options, architecture)
    try:
        return path.read_bytes()
    except OSError:
        cubin, _ = compile_kernel(name, options, architecture)
    write_whole(path, cubin)
    return cubin


def write_whole(path, content):
    """Keep bytes in a file, whole or not at all. In a folder that cannot be written they are made at each start."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
        os.replace(file.name, path)
    except OSError:
        pass


def check_shared_memory(name, wanted, capacity):
    """Refuse a kernel whose thread block wants more shared memory than the GPU gives one."""
    if wanted > capacity - BLOCK_OVERHEAD:
        raise ValueError(
            f"The kernel {name} wants {wanted:,} bytes of shared memory for these sizes of states and time-step rank, "
            f"but this GPU gives a thread block {capacity - BLOCK_OVERHEAD:,}. Scan with another backend: "
            '`VideoMambaConfig(scan_backend="torch")`.'
        )


@functools.cache
def _function(name, options, device_index):
    """A loaded kernel, on one GPU."""
    major, minor = torch.cuda.get_device_capability(device_index)
    cubin = _cached_cubin(name, dict(options), f"sm_{major}{minor}")
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    with torch.cuda.device(device_index):
        torch.cuda.current_stream().synchronize()  # the context exists from here on
        _check(driver().cuModuleLoadData(ctypes.byref(module), cubin), f"loading the kernel {name}")
    _check(driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()), f"finding the kernel {name}")
    max_dynamic_shared = 8
    limit = torch.cuda.get_device_properties(device_index).shared_memory_per_block_optin
    driver().cuFuncSetAttribute(function, max_dynamic_shared, limit)
    return function


class KernelArguments(ctypes.Structure):
    """`Args` of csrc/primitives.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "xz u proj dout conv_w conv_b dt_w dt_b a_log skip order".split()),
        *(
            (name, ctypes.c_void_p)
            for name in "out du ddelta y states sums sub adjoint da dvec d_dt_w partial".split()
        ),
        *((name, ctypes.c_int) for name in "B L mode chunk chunks turn span kept".split()),
        *((name, ctypes.c_int) for name in "reversal frames frame class_token".split()),
        ("frame_inverse", ctypes.c_uint32),
        *((name, ctypes.c_void_p) for name in "x_w dproj start end total before after".split()),
    ]


class Launch:
    """
    A kernel and how it is launched: all that stays the same from call to call.

    Args:
        name (`str`): one of `KERNEL_FILES`.
        options (`dict[str, int]`): macros that it is compiled with, at its first launch.
        grid (`tuple[int, int, int]`), threads (`int`), shared (`int`): thread blocks, threads of a block, bytes of its
            dynamic shared memory.
        device (`torch.device`): the GPU.
        numbers (`dict[str, int]`): of `KernelArguments`.
    """

    def __init__(self, name, options, grid, threads, shared, device, numbers):
        self.name, self.options, self.device = name, options, device
        self.grid, self.threads, self.shared = grid, threads, shared
        self.numbers = numbers
        self.function = None

    def at(self, **numbers):
        """The same with other numbers."""
        changed = copy.copy(self)
        changed.numbers = {**self.numbers, **numbers}
        return changed

    def __call__(self, arguments, stream):
        """
        Queue the kernel.

        Args:
            arguments (`ctypes.Structure`): pointers and sizes; the launch's own numbers are written into them. CUDA
                copies them before this returns, so they serve the next launch of the same thread.
            stream (`int`): handle of a CUDA stream of the current GPU.
        """
        for name, value in self.numbers.items():
            setattr(arguments, name, value)
        self.queue(arguments, stream)

    def queue(self, arguments, stream):
        if self.function is None:
            self.function = _function(self.name, tuple(self.options.items()), self.device.index)
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        launch = self.function, *self.grid, self.threads, 1, 1, self.shared, stream, parameters, None
        status = _launch_kernel()(*launch)
        if status == INVALID_CONTEXT:  # the first that a thread has to do with the GPU, as autograd's may
            _enter_context(self.device.index)
            status = _launch_kernel()(*launch)
        _check(status, f"launching the kernel {self.name} on a grid of {self.grid}")


def _enter_context(device_index):
    """Make the GPU's context, which PyTorch shares, this thread's."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _check(driver().cuDeviceGet(ctypes.byref(device), device_index), "finding the GPU")
    _check(driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "finding the GPU's context")
    _check(driver().cuCtxSetCurrent(context), "entering the GPU's context")


def nobody_looks_on(tensors):
    """Whether neither autograd nor a tracer need see an operator, so that its kernels may be launched at once."""
    return nobody_traces(tensors) and not autograd_looks_on(tensors)


def nobody_traces(tensors):
    """Whether no compiler, tracer, mode, transform or class of tensors need see an operator; autograd still may."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or is_in_torch_dispatch_mode()
        or torch._C._are_functorch_transforms_active()
        or not PLAIN_TENSORS.issuperset(map(type, tensors))
    )


def autograd_looks_on(tensors):
    """Whether gradients of these tensors, or None, are wanted."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


@functools.cache
def _launch_kernel():
    function = driver().cuLaunchKernel
    function.argtypes = [ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3]
    return function
