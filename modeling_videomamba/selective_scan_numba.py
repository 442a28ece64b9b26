"""The scan on a CPU, compiled by Numba on the user's machine: no compiler to install, and nothing to build beforehand.

Convolution, SiLU, softplus, skip term and gate are inside the kernels (`selective_scan_numba_kernels`); the two thin
projections are PyTorch's. The kernels release the GIL and a few Python threads take units as they come. Numba's own
parallel loops would not do: its thread pools abort after a fork, or when two Python threads use them at once. Since
the cut into units does not depend on the number of threads, neither do the results.
"""

import contextlib
import ctypes
import functools
import itertools
import math
import mmap
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from transformers.utils import logging

from .forked_process import after_fork
from .selective_scan_cuda_runtime import autograd_looks_on, nobody_traces
from .selective_scan_numba_kernels import (
    BLOCK,
    CHUNK,
    IMPORT_ERROR,
    LN2,
    LOG2E,
    ROWS,
    convolve,
    convolve_backward,
    scan,
    scan_backward,
)
from .selective_scan_operators import NAMESPACE
from .selective_scan_torch import add_gradient_of_inputs_after


logger = logging.get_logger(__name__)

WORKSPACE = 2**27  # bytes
HUGE_PAGE = 2**21


def unusable_reason(device, dtype):
    """Why this backend cannot run on `device` with activations of `dtype`, or None."""
    if device.type != "cpu":
        return "it runs on the CPU only"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, not {dtype}"
    if IMPORT_ERROR is not None:
        return f"Numba cannot be imported ({IMPORT_ERROR}); `pip install numba` may mend that"
    return None


def bidirectional_selective_scan(
    xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D, order=None, state=None
):
    """See `selective_scan.bidirectional_selective_scan`."""
    parameters = (conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)
    if xz.dtype == torch.float16:  # no type of Numba's: in float32, which takes a copy and is several times as fast
        state = state and (state[0].float(), state[1])
        scanned = bidirectional_selective_scan(xz.float(), *(p.float() for p in parameters), order, state)
        return scanned.half() if state is None else (scanned[0].half(), (scanned[1][0].half(), scanned[1][1]))
    before, start = (None, None) if state is None else state
    visits = None if order is None else order.visits
    tensors = (xz, *parameters, *(state or ()))
    keep = autograd_looks_on(tensors)
    scan = _mixer if keep or not nobody_traces(tensors) else _scan_now  # a step of a stream is short
    out, _, after, end = scan(xz, *parameters, visits, before, start, keep)
    return out if state is None else (out, (after, end))


# --------------------------------------------------------------------------------------------------------------------
# Threads, and the operator that PyTorch sees.
# --------------------------------------------------------------------------------------------------------------------

_threads = None  # a pool of our own, where PyTorch's cannot be had

# Runs a function on PyTorch's own threads, if they are GNU OpenMP's (as in its Linux wheels). They wait for their next
# work in a busy loop, for milliseconds in which threads of ours would have to share the cores with them.
_on_torch_threads = getattr(ctypes.CDLL(torch._C.__file__), "GOMP_parallel", None)


@after_fork
def _forget_threads():
    global _threads, _on_torch_threads
    _threads = _on_torch_threads = None


def run_kernel(kernel, units, *arguments):
    """`kernel(unit, *arguments)` for every unit, on as many threads as PyTorch uses; of tensors, it gets arrays."""
    global _threads
    arguments = [_array(t) if isinstance(t, torch.Tensor) else t for t in arguments]
    remaining = iter(range(units))

    def work():
        for unit in remaining:
            kernel(unit, *arguments)

    threads = min(torch.get_num_threads(), units)
    if threads <= 1:
        work()
    elif _on_torch_threads is not None:
        _on_torch_threads(ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: work()), None, threads, 0)
    else:
        if _threads is None:
            _threads = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="selective_scan")
        waiting = [_threads.submit(work) for _ in range(threads - 1)]
        work()
        for future in waiting:
            future.result()


def _array(tensor):
    """The NumPy view of a contiguous tensor; of bfloat16, which NumPy lacks, as its bits."""
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


class _Workspace(threading.local):
    """
    Memory for what lives no longer than a call, kept from call to call.

    Fresh memory costs a page fault for every 4 KiB, and those took a third of the time of a forward pass.
    """

    memory = torch.empty(0, dtype=torch.uint8, device="cpu")

    def take(self, *wanted):
        """Contiguous tensors for pairs of a shape and a dtype, which share nothing and hold anything."""
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in wanted]
        ends = list(itertools.accumulate(-(-size // 64) * 64 for size in sizes))
        memory = self.memory
        if memory.numel() < ends[-1]:
            memory = _fresh_memory(ends[-1])
            if ends[-1] <= WORKSPACE:
                self.memory = memory
        starts = [0, *ends[:-1]]
        return [
            memory[start : start + size].view(dtype).view(shape)
            for start, size, (shape, dtype) in zip(starts, sizes, wanted, strict=True)
        ]


def _fresh_memory(size):
    """
    Bytes, on Linux in pages of 2 MiB if it has them: a unit reads a column of a table, where each row or two lie on
    another page of 4 KiB.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    mapped = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # of a kernel without them
        mapped.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(mapped, dtype=torch.uint8)
    return memory[-memory.data_ptr() % HUGE_PAGE :][:size]


_workspace = _Workspace()


def _groups(xz, tensors):
    """Slices of the batch, each of as many clips as the workspace holds `tensors` (2, L, E) float32 of."""
    batch, length, width = xz.shape
    size = max(1, WORKSPACE // max(1, tensors * length * width * 4))
    return [slice(start, min(start + size, batch)) for start in range(0, batch, size)]


def _blocks(channels):
    return (channels + BLOCK - 1) // BLOCK


@functools.lru_cache(maxsize=8)
def _full_reversal(length):
    forward = torch.arange(length, device="cpu")
    return torch.stack([forward, forward.flip(0)])


def _visits(order, length):
    """What the kernels trust: both directions' order of visits (2, L), in which each token has its turn."""
    if order is None:
        return _full_reversal(length)
    return _checked_visits(order.long().numpy().tobytes(), length)


@functools.lru_cache(maxsize=8)
def _checked_visits(order, length):
    """The same for an order given as bytes, which nobody changes later."""
    order, forward = torch.frombuffer(bytearray(order), dtype=torch.long), torch.arange(length, device="cpu")
    if not torch.equal(order.sort().values, forward):
        raise ValueError(
            f"`order` must hold each position from 0 to {length - 1} once, for {length} tokens; got the shape "
            f"{tuple(order.shape)} with {order.unique().numel()} positions from {order.min()} to {order.max()}."
        )
    return torch.stack([forward, order])


def _shared_arguments(conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D, visits):
    """What the kernels take, of the parameters: (weight, bias, visits) of `convolve`, (A, ..., visits) of `scan`."""

    def copy(parameter):  # a NumPy view would lock a parameter's own memory, which FSDP frees and fills
        return parameter.to(torch.float32, copy=True, memory_format=torch.contiguous_format)

    A = copy(A_log.transpose(1, 2)).exp_().mul_(-LOG2E)
    return (copy(conv_weight.transpose(1, 2)), copy(conv_bias), visits), (A, copy(D), copy(dt_proj_bias), visits)


def _project(xz, for_convolution, before, after, x_proj_weight, dt_proj_weight, u, delta):
    """
    Fill u, delta (2, B, L, E), `after`; returns time steps (2, B L, R) before `dt_proj`, and BC (2, B, L, 2N).

    delta, before its bias, has the type of u, as in Mamba's own code: that rounds it no more than the time steps that
    it is made of. BC is float32.
    """
    run_kernel(convolve, 2 * xz.shape[0] * ((xz.shape[1] + ROWS - 1) // ROWS), xz, *for_convolution, before, u, after)
    rank = dt_proj_weight.shape[2]
    projected = torch.bmm(u.flatten(1, 2), x_proj_weight.to(u.dtype).transpose(1, 2))
    time_step, BC = projected[..., :rank], projected[..., rank:]
    torch.bmm(time_step, dt_proj_weight.to(u.dtype).transpose(1, 2), out=delta.flatten(1, 2))
    return time_step, BC.float().contiguous().view(*u.shape[:3], -1)


def _by_clip(tensor, batch, dtype=torch.float32):
    """A tensor of a state, (2, B, ...), as the kernels take it, (B, 2, ...)."""
    if tensor is None:
        return torch.empty(batch, 2, 0, 0, dtype=dtype, device="cpu")
    return tensor.transpose(0, 1).contiguous()


def _forward(xz, *rest):
    *parameters, order, before, start, keep_states = rest
    xz = xz.contiguous()
    batch, visits = xz.shape[0], _visits(order, xz.shape[1])
    for_convolution, for_scan = _shared_arguments(*parameters, visits)
    _, _, x_proj_weight, dt_proj_weight, _, A_log, _ = parameters
    out, states = _outputs(xz, A_log, keep_states)
    inputs, starts = _by_clip(before, batch, xz.dtype), _by_clip(start, batch)
    after, ends = torch.empty_like(inputs), torch.empty_like(starts)
    for clips in _groups(xz, 2):
        shape = (2, *out[clips].shape)
        u, delta = _workspace.take(*[(shape, xz.dtype)] * 2)
        kept = inputs[clips], after[clips]
        _, BC = _project(xz[clips], for_convolution, *kept, x_proj_weight, dt_proj_weight, u, delta)
        run_kernel(
            scan, shape[1] * _blocks(shape[3]), xz[clips], u, delta, BC, *for_scan, starts[clips],
            out[clips], states[clips], ends[clips],
        )  # fmt: skip
    if start is None:
        return out, states, xz.new_empty(0), states.new_empty(0)
    return out, states, *(tensor.transpose(0, 1).contiguous() for tensor in (after, ends))


def _outputs(xz, A_log, keep_states):
    batch, length, width = xz.shape
    chunks = (length + CHUNK - 1) // CHUNK if keep_states else 0
    shape = (batch, 2, chunks, A_log.shape[2], width // 2)
    return xz.new_empty(batch, length, width // 2), xz.new_empty(shape, dtype=torch.float32)


def _backward(grad, d_after, d_end, states, xz, *rest):
    *parameters, order, before = rest
    xz, grad = xz.contiguous(), grad.to(xz.dtype).contiguous()
    batch, visits = xz.shape[0], _visits(order, xz.shape[1])
    for_convolution, for_scan = _shared_arguments(*parameters, visits)
    conv_weight, _, x_proj_weight, dt_proj_weight, _, A_log, _ = parameters
    channels, taps, num_states = conv_weight.shape[1], conv_weight.shape[2], A_log.shape[2]
    blocks = _blocks(channels)
    d_xz = torch.empty_like(xz)
    d_scan, d_conv, d_x_proj, d_dt_proj = 0, 0, 0, 0
    inputs, d_ends = _by_clip(before, batch, xz.dtype), _by_clip(d_end, batch)
    d_inputs = torch.empty_like(inputs)
    d_starts = d_ends.new_empty((batch, 2, 0, 0) if before is None else (batch, 2, channels, num_states))
    for clips in _groups(xz, 4):
        shape = (2, *grad[clips].shape)
        u, delta, d_u, d_delta = _workspace.take(*[(shape, xz.dtype)] * 2, *[(shape, torch.float32)] * 2)
        kept = inputs[clips], _by_clip(None, 0, xz.dtype)
        time_step, BC = _project(xz[clips], for_convolution, *kept, x_proj_weight, dt_proj_weight, u, delta)
        d_BC, d_params = BC.new_empty(blocks, *BC.shape), BC.new_empty(shape[1], 2, num_states + 2, channels)
        run_kernel(
            scan_backward, shape[1] * blocks, xz[clips], grad[clips], u, delta, BC, *for_scan, states[clips],
            d_ends[clips], d_xz[clips], d_u, d_delta, d_BC, d_params, d_starts[clips],
        )  # fmt: skip
        d_scan = d_scan + d_params.sum(0)

        d_delta, u = d_delta.flatten(1, 2), u.flatten(1, 2)
        d_dt_proj = d_dt_proj + torch.bmm(d_delta.transpose(1, 2), time_step.float())
        d_time_step = torch.bmm(d_delta, dt_proj_weight.float())
        d_projected = torch.cat([d_time_step, d_BC.sum(0).flatten(1, 2)], dim=-1).to(u.dtype)
        d_x_proj = d_x_proj + torch.bmm(d_projected.transpose(1, 2), u)
        d_u.flatten(1, 2).add_(torch.bmm(d_projected, x_proj_weight.to(u.dtype)))

        d_params = BC.new_empty(shape[1], 2, taps + 1, channels)
        run_kernel(
            convolve_backward, shape[1] * blocks, xz[clips], *for_convolution, inputs[clips], d_u,
            d_xz[clips], d_params, d_inputs[clips],
        )  # fmt: skip
        d_conv = d_conv + d_params.sum(0)
    d_A, d_D, d_bias = d_scan.split([num_states, 1, 1], dim=1)
    d_A_log = (LN2 * d_A * for_scan[0]).transpose(1, 2)
    d_before, d_start = d_inputs.transpose(0, 1), d_starts.transpose(0, 1)
    if d_after is not None:
        add_gradient_of_inputs_after(d_after, visits[1], d_xz, d_before)
    return (
        d_xz, d_conv[:, :taps].transpose(1, 2), d_conv[:, taps], d_x_proj, d_dt_proj, d_bias[:, 0], d_A_log, d_D[:, 0],
        *(() if before is None else (d_before, d_start)),
    )  # fmt: skip


@functools.cache
def _compile(dtype, backward):
    """Compile what is needed for activations of `dtype`, or load it from disk, by a run on one token."""
    kernels = (convolve, scan, scan_backward, convolve_backward)

    def compiled():
        return sum(len(kernel.signatures) - sum(kernel.stats.cache_hits.values()) for kernel in kernels)

    before, started = compiled(), time.perf_counter()
    xz = torch.zeros(1, 1, 2, dtype=dtype, device="cpu")
    shapes = ((2, 1, 1), (2, 1), (2, 3, 1), (2, 1, 1), (2, 1), (2, 1, 1), (2, 1))
    parameters = (*(xz.new_zeros(shape, dtype=torch.float32) for shape in shapes), xz.new_zeros(1).long(), None)
    out, states, _, _ = _forward(xz, *parameters, None, True)
    if backward:
        _backward(out, None, None, states, xz, *parameters)
    if compiled() > before:
        place = scan.stats.cache_path
        logger.warning(
            f"Compiled the CPU scan's {'backward' if backward else 'forward'} pass for {dtype} in "
            f"{time.perf_counter() - started:.1f} s. "
            + (
                f"Later runs load the result from {place}."
                if place
                else "Set NUMBA_CACHE_DIR to a writable folder, so that later runs can load the result."
            )
        )


@torch.library.custom_op(f"{NAMESPACE}::mixer_cpu", mutates_args=())
def _mixer(
    xz: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor,
    x_proj_weight: torch.Tensor,
    dt_proj_weight: torch.Tensor,
    dt_proj_bias: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
    order: torch.Tensor | None,
    before: torch.Tensor | None,
    start: torch.Tensor | None,
    keep_states: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The mixer's output (B, L, E), the states at the borders of chunks if the backward pass will want them, and the two
    tensors of the state that it ends with if it began with one.
    """
    parameters = (conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)
    return _scan_now(xz, *parameters, order, before, start, keep_states)


def _scan_now(xz, *rest):
    """What `_mixer` computes, without PyTorch's dispatcher."""
    _compile(xz.dtype, backward=False)
    with torch.autocast("cpu", enabled=False):
        return _forward(xz, *rest)


@_mixer.register_fake
def _(xz, *rest):
    *_, A_log, _, _, before, start, keep_states = rest
    out, states = _outputs(xz, A_log, keep_states)
    after, end = (0, 0) if start is None else (before.shape, start.shape)
    return out, states, xz.new_empty(after), states.new_empty(end)


@torch.library.custom_op(f"{NAMESPACE}::mixer_cpu_backward", mutates_args=())
def _mixer_backward(
    grad: torch.Tensor,
    grad_after: torch.Tensor | None,
    grad_end: torch.Tensor | None,
    states: torch.Tensor,
    xz: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor,
    x_proj_weight: torch.Tensor,
    dt_proj_weight: torch.Tensor,
    dt_proj_bias: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
    order: torch.Tensor | None,
    before: torch.Tensor | None,
    start: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Gradients of all floating-point arguments that are there, each of its argument's type."""
    inputs = (xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)
    _compile(xz.dtype, backward=True)
    with torch.autocast("cpu", enabled=False):
        gradients = _backward(grad, grad_after, grad_end, states, *inputs, order, before)
    if before is not None:
        inputs += (before, start)
    return [g.to(t.dtype).contiguous() for g, t in zip(gradients, inputs, strict=True)]


@_mixer_backward.register_fake
def _(grad, grad_after, grad_end, states, *inputs):
    *inputs, _, before, start = inputs
    if before is not None:
        inputs += [before, start]
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs]


def _save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(output[1], *inputs[:-1])
    ctx.set_materialize_grads(False)  # nobody wants that of the states at the borders of chunks


def _autograd(ctx, grad_out, _, grad_after, grad_end):
    states, xz, *rest = ctx.saved_tensors
    if grad_out is None:
        grad_out = xz.new_zeros(*xz.shape[:2], xz.shape[2] // 2)
    if rest[-1] is None:  # without a state, their outputs are empty
        grad_after = grad_end = None
    gradients = _mixer_backward(grad_out, grad_after, grad_end, states, xz, *rest)
    of_state = gradients[8:] or (None, None)
    return *gradients[:8], None, *of_state, None


_mixer.register_autograd(_autograd, setup_context=_save_for_backward)
