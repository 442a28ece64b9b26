"""
The scan on NVIDIA GPUs of compute capability below 8.0 (T4, V100), without tensor cores and asynchronous copies.

Convolution and projections are plain PyTorch's, as in `selective_scan_torch`; the recurrence is a CUDA kernel in
float32 (csrc/simt.cu), which NVRTC compiles at the first call. The forward pass keeps a state before every
`SIMT_CHUNK` tokens, from which the backward pass walks through the others again. These GPUs know no bfloat16: float32
takes its place inside.
"""

import ctypes
import functools

import torch

from .selective_scan_check import mistrust_reason
from .selective_scan_cuda_plan import shared_memory_of
from .selective_scan_cuda_runtime import (
    DTYPES,
    Launch,
    check_shared_memory,
    compiled_architectures,
    driver,
    multiprocessors_of,
    no_gpu_reason,
    source_constant,
)
from .selective_scan_operators import NAMESPACE
from .selective_scan_torch import bidirectional_selective_scan as plain_bidirectional_selective_scan


CHUNK, CHANNELS = (source_constant(name, "simt.cu") for name in ("SIMT_CHUNK", "SIMT_CHANNELS"))
BLOCKS_PER_MULTIPROCESSOR = 4  # so many are aimed at by cutting the length
PASS_THREADS = 128


@torch.compiler.assume_constant_result
def unusable_reason(device, dtype):
    """Why this backend cannot run on `device` with activations of `dtype`, or None."""
    if (reason := _unusable_reason(device, dtype)) is not None:
        return reason
    return mistrust_reason("cuda_simt", bidirectional_selective_scan, device, dtype)


@functools.cache
def _unusable_reason(device, dtype):
    if (reason := no_gpu_reason(device, dtype)) is not None:
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    try:
        driver()
        if 10 * major + minor not in compiled_architectures():
            return f"the compiler that comes with this PyTorch knows no GPU of compute capability {major}.{minor}"
    except OSError as error:
        return f"the libraries that compile and launch it are missing: {error}"
    return None


class SimtArguments(ctypes.Structure):
    """`SimtArgs` of csrc/simt.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "u delta grad A B C y du ddelta ends sums kept dA dBC".split()),
        *((name, ctypes.c_int) for name in "groups batch length channels span spans adjoint".split()),
        *((name, ctypes.c_void_p) for name in "start end".split()),
    ]


def split_length(sequences, length, channels, multiprocessors):
    """
    How the length is cut: tokens a span, a multiple of `CHUNK`, and number of spans.

    A second walk pays only where one would leave most of the GPU idle.
    """
    blocks = sequences * -(-channels // CHANNELS)
    wanted = BLOCKS_PER_MULTIPROCESSOR * multiprocessors // blocks
    if wanted < 3:
        wanted = 1
    chunks = -(-length // CHUNK)
    span = -(-chunks // min(wanted, chunks)) * CHUNK
    return span, -(-length // span)


class _Walks:
    """
    The kernels over one set of tensors: u, delta (G, B, L, E), A (G, E, N), B and C (G, B, L, N), in float32; from
    zero, or with a state, which then is what they start with and end with, or its gradients.
    """

    def __init__(self, u, delta, A, B, C, stateful):
        self.groups, self.batch, self.length, self.channels = u.shape
        self.states = A.shape[2]
        self.device = u.device
        self.sequences = self.groups * self.batch
        self.span, self.spans = split_length(self.sequences, self.length, self.channels, multiprocessors_of(u.device))
        self.tensors = {"u": u, "delta": delta, "A": A, "B": B, "C": C}
        self.stateful = stateful

    def new(self, *shape):
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def run(self, name, grid, threads=4 * CHANNELS, shared=0, adjoint=0, **tensors):
        self.tensors |= tensors
        sizes = {name: getattr(self, name) for name in "groups batch length channels span spans".split()}
        pointers = {name: t.data_ptr() for name, t in self.tensors.items() if t.numel()}
        options = {"IO": DTYPES[torch.float32], "PT": DTYPES[torch.float32], "N": self.states}
        if self.stateful:
            options["STATEFUL"] = 1
        check_shared_memory(name, shared, shared_memory_of(self.device))
        launch = Launch(name, options, grid, threads, shared, self.device, {})
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        launch(SimtArguments(**pointers, **sizes, adjoint=adjoint), stream)

    def grid(self):
        return -(-self.channels // CHANNELS), self.spans, self.sequences

    def pass_between_spans(self, adjoint, start=None):
        """What each span begins with, or, walking back, receives; unused where there is one that begins with zero."""
        if self.stateful:
            self.tensors["end"] = self.new(self.groups, self.batch, self.channels, self.states)
        if start is not None:
            (start,) = _float32((start,))
            self.tensors |= {"start": start, "ends": start}
        if self.spans == 1:
            return
        shape = self.sequences, self.spans, self.channels
        self.run("simt_ends", self.grid(), adjoint=adjoint, ends=self.new(*shape, self.states), sums=self.new(*shape))
        blocks = -(-self.channels * self.states // PASS_THREADS)
        self.run("simt_pass", (blocks, self.sequences, 1), PASS_THREADS, adjoint=adjoint)


def _float32(tensors):
    return [t.float().contiguous() for t in tensors]


@torch.library.custom_op(f"{NAMESPACE}::selective_scan_simt", mutates_args=())
def _scan_op(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    start: torch.Tensor | None,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.cuda.device_of(u):
        walks = _Walks(*_float32((u, delta, A, B, C)), stateful=start is not None)
        y, kept = walks.new(*u.shape), walks.new(*_kept_shape(u, A, keep))
        walks.pass_between_spans(adjoint=0, start=start)
        walks.run("simt_scan", walks.grid(), y=y, kept=kept)
    return y.to(u.dtype), kept, walks.tensors.get("end", y.new_empty(0))


def _kept_shape(u, A, keep):
    groups, batch, length, channels = u.shape
    return (groups, batch, (length + CHUNK - 1) // CHUNK if keep else 0, channels, A.shape[2])


@_scan_op.register_fake
def _(u, delta, A, B, C, start, keep):
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    shapes = _kept_shape(u, A, keep), 0 if start is None else start.shape
    return y, *(u.new_empty(shape, dtype=torch.float32) for shape in shapes)


@torch.library.custom_op(f"{NAMESPACE}::selective_scan_simt_backward", mutates_args=())
def _scan_backward_op(
    grad: torch.Tensor,
    grad_end: torch.Tensor | None,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    kept: torch.Tensor,
    stateful: bool,
) -> list[torch.Tensor]:
    """Gradients of u, delta, A, B, C and, if there is one, of the state before the first token."""
    with torch.cuda.device_of(u):
        walks = _Walks(*_float32((u, delta, A, B, C)), stateful)
        (walks.tensors["grad"],) = _float32((grad,))
        walks.pass_between_spans(adjoint=1, start=grad_end)
        grid, states = walks.grid(), walks.states
        du, ddelta = walks.new(*u.shape), walks.new(*u.shape)
        dA = walks.new(walks.groups, walks.batch * walks.spans, *A.shape[1:])
        dBC = walks.new(*u.shape[:2], grid[0], walks.length, 2 * states)
        shared = shared_bytes(states)
        walks.run("simt_backward", grid, shared=shared, du=du, ddelta=ddelta, dA=dA, dBC=dBC, kept=kept)
        dB, dC = dBC[..., :states].sum(2), dBC[..., states:].sum(2)
    gradients = zip((du, ddelta, dA.sum(1), dB, dC), (u, delta, A, B, C), strict=True)
    of_start = [walks.tensors["end"]] if stateful else []
    return [*(found.to(t.dtype).contiguous() for found, t in gradients), *of_start]


def shared_bytes(states):
    """`SIMT_SHARED` of csrc/simt.cu; a test compares the two."""
    quarter = -(-states // 4)
    return CHANNELS // 8 * CHUNK * 4 * (-(-2 * quarter // 8) * 8) * 4


@_scan_backward_op.register_fake
def _(grad, grad_end, u, delta, A, B, C, kept, stateful):
    gradients = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (u, delta, A, B, C)]
    if stateful:
        gradients.append(kept.new_empty(*u.shape[:2], *A.shape[1:]))
    return gradients


def _setup_context(ctx, inputs, output):
    *tensors, start, _ = inputs
    ctx.stateful = start is not None
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_y, grad_kept, grad_end):
    u, *rest = ctx.saved_tensors
    grad_y = torch.zeros_like(u) if grad_y is None else grad_y
    gradients = _scan_backward_op(grad_y, grad_end if ctx.stateful else None, u, *rest, ctx.stateful)
    return *gradients, *([] if ctx.stateful else [None]), None


_scan_op.register_autograd(_backward, setup_context=_setup_context)


def selective_scan(u, delta, A, B, C, start=None):
    """See `selective_scan_torch.selective_scan`, whose arguments these are."""
    y, _, end = _scan_op(u, delta, A, B, C, start, torch.is_grad_enabled())
    return y if start is None else (y, end)


def bidirectional_selective_scan(xz, *parameters, order=None, state=None):
    """See `selective_scan.bidirectional_selective_scan`."""
    options = {"order": order, "scan": selective_scan}
    if xz.dtype != torch.bfloat16:
        return plain_bidirectional_selective_scan(xz, *parameters, **options, state=state)
    with torch.autocast(xz.device.type, enabled=False):
        in_float32 = (t.float() for t in (xz, *parameters))
        if state is None:
            return plain_bidirectional_selective_scan(*in_float32, **options).to(xz.dtype)
        before, start = state
        out, (after, end) = plain_bidirectional_selective_scan(*in_float32, **options, state=(before.float(), start))
        return out.to(xz.dtype), (after.to(xz.dtype), end)
