"""
Whether the GPU kernels compute what the reference does, on an architecture that no test has seen: compilers and chips
have made others' kernels silently wrong.

The first call there scans a tiny problem, with all gradients. That takes milliseconds, once the kernels of the tiny
problem are compiled. The verdict is kept beside the machine code, under a name that covers the sources, the compiler
and the architecture.
"""

import hashlib
import json
import logging
import os

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .selective_scan_cuda_runtime import SOURCES, cache_folder, nvrtc_version, write_whole
from .selective_scan_reference import bidirectional_selective_scan_reference


logger = logging.getLogger(__name__)

TESTED = {(9, 0)}  # compute capabilities of the GPUs that all tests ran on
# Of ‖found - expected‖ / ‖expected‖: a few times what rounding costs. What is wrong is off by far more.
TOLERANCE = {torch.float32: 5e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
NAMES = "output xz conv_weight conv_bias x_proj_weight dt_proj_weight dt_proj_bias A_log D".split()

_reasons: dict[tuple, str | None] = {}


def mistrust_reason(backend, scan, device, dtype):
    """
    Why the kernels of a backend must not be used on this GPU, or None. Says so once in a warning.

    Args:
        backend (`str`): its name.
        scan (`Callable`): its `bidirectional_selective_scan`.
        device (`torch.device`): the GPU.
        dtype (`torch.dtype`): of the activations.
    """
    key = backend, device, dtype
    if key not in _reasons:  # looked up at every call: kernels wait for Python
        capability = torch.cuda.get_device_capability(device)
        if capability not in TESTED and _cannot_run_now(device):
            return None
        _reasons[key] = None if capability in TESTED else _reason(backend, scan, device, dtype, capability)
    return _reasons[key]


def _cannot_run_now(device):
    """While a graph is captured, or a mode looks at operators, nothing can be computed and compared."""
    return is_in_torch_dispatch_mode() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _reason(backend, scan, device, dtype, capability):
    path = _verdict_path(backend, dtype, capability)
    try:
        errors = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        errors = errors_of(scan, device, dtype)
        write_whole(path, json.dumps(errors).encode())
    # Whatever is not a number that is small enough, NaN too, is wrong.
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE[dtype]}
    if not wrong:
        return None
    found = ", ".join(f"{name} {error:.2g}" for name, error in wrong.items())
    reason = f"its kernels give wrong results on this GPU (relative errors: {found})"
    logger.warning(
        "The scan backend %r is not used: %s. Another takes its place, which is slower. Please report this line with "
        "the problem: %s, compute capability %d.%d, %s, PyTorch %s, CUDA %s, NVRTC %s. The verdict is kept in %s; "
        "remove this file to ask again.",
        backend,
        reason,
        torch.cuda.get_device_name(device),
        *capability,
        dtype,
        torch.__version__,
        torch.version.cuda,
        ".".join(map(str, nvrtc_version())),
        path,
    )
    return reason


def _verdict_path(backend, dtype, capability):
    flags = os.environ.get("VIDEOMAMBA_NVRTC_FLAGS", "")
    key = hashlib.sha256(repr((SOURCES, nvrtc_version(), flags, torch.__version__)).encode()).hexdigest()
    architecture = "sm_{}{}".format(*capability)
    return cache_folder() / f"check-{backend}-{str(dtype).removeprefix('torch.')}-{architecture}-{key}.json"


def errors_of(scan, device, dtype):
    """`{name: ‖found - expected‖ / ‖expected‖}` of a scan's output and gradients, against the float64 reference."""
    generator = torch.Generator("cpu").manual_seed(0)
    shapes = [(2, 49, 64), (2, 32, 4), (2, 32), (2, 2 + 32, 32), (2, 32, 2), (2, 32), (2, 32, 16), (2, 32)]
    options = {"device": "cpu", "dtype": torch.float32}
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        inputs = [torch.randn(shape, generator=generator, **options).to(dtype) / 2 for shape in shapes]
        grad = torch.randn(2, 49, 32, generator=generator, **options).to(dtype)
        found = _output_and_gradients(scan, inputs, grad, device)
        expected = _output_and_gradients(bidirectional_selective_scan_reference, inputs, grad, torch.device("cpu"))
    pairs = zip(NAMES, found, expected, strict=True)
    return {name: ((f.cpu().double() - e.double()).norm() / e.double().norm()).item() for name, f, e in pairs}


def _output_and_gradients(scan, inputs, grad, device):
    inputs = [tensor.to(device).detach().requires_grad_() for tensor in inputs]
    output = scan(*inputs, order=None)
    return output.detach(), *torch.autograd.grad(output, inputs, grad.to(device, output.dtype))
