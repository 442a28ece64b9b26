"""
The scan on NVIDIA GPUs, in CUDA C++ that the NVRTC of the PyTorch wheel compiles at the first call: no build, no nvcc.

Two kernels: convolution and SiLU of both directions; then step size (its projection on the tensor cores), softplus,
scan, skip term, sum of the directions and gate, both directions in one launch. Between them stands one batched matrix
product, `x_proj`. Nothing is flipped or transposed: tensors are (B, L, E) throughout, and a direction is the order in
which a warp walks over the tiles of a sequence. Kept for the backward pass are `xz`, the small projection
(2, B, L, R + 2N) and the states at the borders of a few chunks of the length. The rest is recomputed, the input of
`out_proj` too, if its weight is given; the states chunk by chunk, from the last to the first.

What shapes and types decide is worked out once and kept (`ScanPlan`). A call that nothing traces goes past PyTorch's
dispatcher, so that the GPU need not wait for Python. Work space comes from PyTorch's caching allocator, which makes it
safe on several streams and in several threads.

The first call of a model compiles what it needs, in about 2 s, and keeps it in `~/.cache/videomamba`, or in
the folder that the environment variable `VIDEOMAMBA_CACHE` names.

What was tried, and how fast it is: docs/kernels.md.
"""

import contextlib
import functools
import os

import torch
from torch.autograd.function import once_differentiable

from .selective_scan_check import mistrust_reason
from .selective_scan_cuda_plan import kept_states, scan_plan, split_length, state_shape
from .selective_scan_cuda_runtime import (
    KernelArguments,
    autograd_looks_on,
    driver,
    multiprocessors_of,
    no_gpu_reason,
    nobody_traces,
    nvrtc,
)
from .selective_scan_operators import NAMESPACE
from .selective_scan_parts import last_inputs
from .selective_scan_torch import add_gradient_of_inputs_after


# Whether the state before every 8 tokens and the convolution's output are kept for the backward pass: faster, for more
# memory.
KEEP_STATES = os.environ.get("VIDEOMAMBA_KEEP_STATES") == "1"
TURN_TOKENS = 131072  # about as many tokens the backward pass recomputes the states of at a time
PARAMETER_NAMES = ("conv_w", "conv_b", "dt_w", "dt_b", "a_log", "skip")  # the kernels' names


@torch.compiler.assume_constant_result
def unusable_reason(device, dtype):
    """Why this backend cannot run on `device` with activations of `dtype`, or None."""
    if (reason := _unusable_reason(device, dtype)) is not None:
        return reason
    return mistrust_reason("cuda", bidirectional_selective_scan, device, dtype)


@functools.cache
def _unusable_reason(device, dtype):
    if (reason := no_gpu_reason(device, dtype)) is not None:
        return reason
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs compute capability 8.0 (Ampere) or later, and this GPU has {capability[0]}.{capability[1]}"
    try:
        nvrtc()
        driver()
    except OSError as error:
        return f"the libraries that compile and launch it are missing: {error}"
    return None


class ScanCall:
    """
    A plan, and the kernels' arguments: those of all kernels from the start, others as they become known. `options` are
    further ones of the plan.
    """

    def __init__(
        self, xz, conv_weight, conv_bias, dt_weight, dt_bias, A_log, D, visits, structure, before, options=()
    ):
        parameters = (conv_weight, conv_bias, dt_weight, dt_bias, A_log, D)
        device, dtype, shape = xz.device, xz.dtype, xz.shape
        start = xz.data_ptr()
        described = tuple([(p.shape, p.dtype, p.device) for p in parameters])
        tf32 = dtype == torch.float32 and _tf32_is_allowed()
        self.plan = plan = scan_plan(
            device,
            multiprocessors_of(device),
            TURN_TOKENS,
            dtype,
            shape,
            start % 16 == 0,
            visits is not None,
            tf32,
            before is not None,
            described,
            options,
        )
        self.device, self.visits = device, visits
        self.stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        common = plan.parameter_dtype
        # The kernels run after this call returns; the allocator keeps what is freed for the same stream.
        self.parameters = [
            p if p.dtype == common and p.is_contiguous() else p.to(common).contiguous() for p in parameters
        ]
        pointers = {n: p.data_ptr() for n, p in zip(PARAMETER_NAMES, self.parameters, strict=True)}
        self.arguments = KernelArguments(B=plan.B, L=plan.L, xz=start, **pointers)
        if visits is not None:
            self.visits = visits.to(device, torch.int64).contiguous()
            reversal, frames, class_token = structure
            frame = (plan.L - (class_token >= 0)) // frames
            if frame > 1 and plan.L * frame < 2**32:  # otherwise `frame_inverse` would not be exact
                self.set(reversal=reversal, frames=frames, frame=frame, class_token=class_token)
                self.set(frame_inverse=-(-(2**32) // frame))
            self.set(order=self.visits)
        self.end = None
        if before is not None:
            self.set_aligned(before=before)

    def begin_with(self, start):
        """The states of the directions, or adjoint states; zero if None. Also makes room for those they end with."""
        self.end = self.new(2, self.plan.B, self.plan.E, self.plan.N)
        self.set(end=self.end)
        if start is not None:
            self.set_aligned(start=start)

    def set(self, **arguments):
        for name, value in arguments.items():
            setattr(self.arguments, name, value.data_ptr() if isinstance(value, torch.Tensor) else value)

    def set_aligned(self, **arguments):
        """The same for tensors of a caller."""
        self.set(**{name: self.aligned(value) for name, value in arguments.items()})

    def aligned(self, tensor):
        """As kernels read it, which take 16 bytes at once."""
        tensor = tensor.contiguous()
        if tensor.data_ptr() % 16:
            tensor = tensor.clone()
        self.parameters.append(tensor)
        return tensor

    def run(self, launch, **arguments):
        """Queue a kernel, with more tensors or numbers among its arguments, which stay for those after it."""
        if arguments:
            self.set(**arguments)
        launch(self.arguments, self.stream)

    def new(self, *shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=self.device)

    def convolve(self):
        """Convolution and SiLU: (2, B, L, E), each direction's tokens at their own places."""
        plan = self.plan
        u = self.new(2, plan.B, plan.L, plan.E, dtype=plan.dtype)
        self.run(plan.conv, u=u)
        return u

    def chunk_states(self, joined, exchange):
        """State before each chunk, if they are walked side by side; or, for a `joined` scan, after each from zero."""
        plan = self.plan
        parts = plan.chunks if plan.side_by_side else 1
        states, sums = self.new(*plan.state_shape(parts)), self.new(2, plan.B, parts, plan.E)
        self.set(states=states, sums=sums)
        if exchange is None:
            self.run(plan.ends)
        else:
            ends, whole = plan.part[0]
            total = self.new(2, plan.B, plan.E)
            self.run(ends)
            self.run(whole, total=total)
            self.set_aligned(start=exchange(self.end, total))
        if plan.side_by_side and not joined:
            self.run(plan.pass_states[0])
        return states, sums

    def scan(self, for_backward, exchange=None):
        """Queue the forward scan; returns the states that are kept for the backward pass, see `_forward`."""
        plan = self.plan
        scan, states = plan.scan[for_backward], None
        if plan.side_by_side or exchange is not None:
            states, sums = self.chunk_states(scan.options["JOINED"], exchange)  # kept until the scan is queued
        if for_backward == 1 and not plan.side_by_side:
            states = None
            if plan.kept_states:
                states = self.new(*plan.state_shape(plan.kept_states))
                self.set(states=states)
        kept = states if for_backward else None
        if for_backward == 2:
            kept = self.new(*plan.state_shape(-(-plan.L // 8)), dtype=plan.dtype)
            self.set(sub=kept)
        self.run(scan)
        return kept

    def chunk_adjoints(self, dout, exchange):
        """Adjoint state after each chunk, likewise."""
        plan = self.plan
        parts = plan.chunks if plan.side_by_side else 1
        adjoint, sums = self.new(*plan.state_shape(parts)), self.new(2, plan.B, parts, plan.E)
        u, y = self.arguments.u, self.arguments.y
        if plan.gated:
            ungated = torch.empty_like(dout)
            self.run(plan.ungate, y=ungated)
            self.set(u=ungated)
        self.set(adjoint=adjoint, sums=sums)
        if exchange is None:
            self.run(plan.adjoint)
        else:
            ends, whole = plan.part[1]
            total = self.new(2, plan.B, plan.E)
            self.run(ends)
            self.run(whole, total=total)
            self.set_aligned(start=exchange(self.end, total, adjoint=True))
        if plan.side_by_side:
            self.run(plan.pass_states[1])
        self.set(u=u, y=y)
        return adjoint


def _tf32_is_allowed():
    """PyTorch's own setting for products of float32 matrices."""
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)  # since PyTorch 2.9
    return matmul.allow_tf32 if precision is None else precision == "tf32"


def on_device_of(xz):
    """A context in which the GPU of `xz` is the current one, and autocast, if it is to another type, is off."""
    device = xz.device
    if device.type == "cuda" and torch.cuda.current_device() != device.index:
        return _switched(xz)
    if torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) != xz.dtype:
        return _switched(xz)
    return contextlib.nullcontext()  # the other takes the host as long as two launches


@contextlib.contextmanager
def _switched(tensor):
    with torch.cuda.device_of(tensor), torch.autocast(tensor.device.type, enabled=False):
        yield


def _project(u, weight):
    """`u` (2, B, L, E) times `weight` (2, P, E), transposed: (2, B, L, P)."""
    rows = u.view(2, -1, u.shape[3])
    return torch.bmm(rows, weight.transpose(1, 2)).view(*u.shape[:3], -1)


def _forward(
    xz, conv_w, conv_b, x_proj_weight, dt_w, dt_b, A_log, D, visits, before, start, structure, for_backward,
    exchange=None,
):  # fmt: skip
    """
    The gated mean of both directions (B, L, E), the small projection; what is kept for the backward pass: nothing
    (`for_backward` 0), the states at the borders of chunks (1), or the state before every 8 tokens and the
    convolution's output, unless an order has put the scan's in its place (2); and the state that it ends with, if it
    began with one. `exchange(states that it ends with from zero, sums of Δ)` gives `start` where other processes
    have the parts before.
    """
    call = ScanCall(xz, conv_w, conv_b, dt_w, dt_b, A_log, D, visits, structure, before)
    plan, after = call.plan, None
    _check_memory(plan)
    out = call.new(plan.B, plan.L, plan.E, dtype=plan.dtype)
    if plan.stateful:
        after = call.new(*before.shape, dtype=plan.dtype)
        call.set(after=after)
        call.begin_with(start)
    u = call.convolve()
    proj = _project(u, x_proj_weight)
    call.set(proj=proj, out=out)
    kept = call.scan(for_backward, exchange)
    if plan.ordered:
        call.run(plan.gate)
    return out, proj, kept, u if for_backward == 2 and not plan.ordered else None, after, call.end


def _check_memory(plan):
    """Of long sequences: say before the first launch if there is not room for what this layer makes."""
    size = plan.B * plan.L * (3 * plan.E + 2 * (plan.R + 2 * plan.N)) * plan.dtype.itemsize
    if size < 2**30 or plan.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return
    free = torch.cuda.mem_get_info(plan.device)[0]
    free += torch.cuda.memory_reserved(plan.device) - torch.cuda.memory_allocated(plan.device)
    if size > free:
        raise torch.OutOfMemoryError(
            f"The scan of {plan.B} x {plan.L} tokens with {plan.E} channels in {plan.dtype} needs {size / 2**30:.1f} "
            f"GiB beside its input, and {free / 2**30:.1f} GiB are free on {plan.device}. Use fewer or shorter clips "
            "at a time, bfloat16, or, in training, gradient checkpointing."
        )


def _scan(xz, *arguments):
    """`_forward` for the arguments of the operator, multiplied by the weight of `out_proj` if that is given."""
    *parameters, out_proj_weight, visits, before, start, structure, for_backward = arguments
    with on_device_of(xz):
        out, *others = _forward(xz, *parameters, visits, before, start, structure, for_backward)
        if out_proj_weight is not None:
            out = torch.nn.functional.linear(out, out_proj_weight)
    return out, *others


@torch.library.custom_op(f"{NAMESPACE}::bidirectional_scan_cuda", mutates_args=())
def _scan_op(
    xz: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor,
    x_proj_weight: torch.Tensor,
    dt_proj_weight: torch.Tensor,
    dt_proj_bias: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
    out_proj_weight: torch.Tensor | None,
    visits: torch.Tensor | None,
    before: torch.Tensor | None,
    start: torch.Tensor | None,
    structure: list[int],
    for_backward: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    parameters = (conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)
    out, proj, *rest = _scan(xz, *parameters, out_proj_weight, visits, before, start, structure, for_backward)
    types = torch.float32, xz.dtype, xz.dtype, torch.float32
    rest = [xz.new_empty(0, dtype=t) if r is None else r for r, t in zip(rest, types, strict=True)]
    return out, proj, *rest


@_scan_op.register_fake
def _(xz, *rest):
    _, _, x_proj_weight, _, _, A_log, _, out_proj_weight, visits, before, start, _, for_backward = rest
    batch, length, channels = xz.shape[0], xz.shape[1], xz.shape[2] // 2
    outputs = channels if out_proj_weight is None else out_proj_weight.shape[0]
    side_by_side, _, chunks, _ = split_length(batch, length, channels, multiprocessors_of(xz.device), TURN_TOKENS)
    parts = (0, kept_states(side_by_side, chunks, before is not None), -(-length // 8))[for_backward]
    states = state_shape(batch, parts, channels, A_log.shape[2]) if parts else (0,)
    after, end = (0, 0) if before is None else (before.shape, start.shape)
    return (
        xz.new_empty(batch, length, outputs),
        xz.new_empty(2, batch, length, x_proj_weight.shape[1]),
        xz.new_empty(states, dtype=xz.dtype if for_backward == 2 else torch.float32),
        xz.new_empty((2, batch, length, channels) if for_backward == 2 and visits is None else 0),
        xz.new_empty(after),
        xz.new_empty(end, dtype=torch.float32),
    )


@torch.library.custom_op(f"{NAMESPACE}::bidirectional_scan_cuda_backward", mutates_args=())
def _backward_op(
    dout: torch.Tensor,
    d_after: torch.Tensor | None,
    d_end: torch.Tensor | None,
    xz: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor,
    x_proj_weight: torch.Tensor,
    dt_proj_weight: torch.Tensor,
    dt_proj_bias: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
    out_proj_weight: torch.Tensor | None,
    visits: torch.Tensor | None,
    before: torch.Tensor | None,
    proj: torch.Tensor,
    states: torch.Tensor,
    u: torch.Tensor,
    structure: list[int],
    kept: bool,
) -> list[torch.Tensor]:
    parameters = (conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)
    with on_device_of(xz):
        return _gradients(
            dout, d_after, d_end, xz, *parameters, out_proj_weight, visits, before, proj, states, u, structure, kept
        )


def _gradients(
    dout, d_after, d_end, xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D,
    out_proj_weight, visits, before, proj, states, u, structure, kept, exchange=None,
):  # fmt: skip
    """
    Of all floating-point arguments of the forward pass that are there, each of its argument's type. `exchange`
    is called with `adjoint=True`, for adjoint states.
    """
    dxz = torch.empty_like(xz)
    call = ScanCall(xz, conv_weight, conv_bias, dt_proj_weight, dt_proj_bias, A_log, D, visits, structure, before)
    plan = call.plan
    B, E, R, N, K = plan.B, plan.E, plan.R, plan.N, plan.K
    dprojected, y = dout, None
    if out_proj_weight is not None:
        dout = dprojected @ out_proj_weight
    dout = call.aligned(dout)
    if out_proj_weight is not None or plan.ordered:
        y = torch.empty_like(dout)
        call.set(y=y)
    if not (kept and visits is None):
        u = call.convolve()
    du, dproj = torch.empty_like(u), torch.empty_like(proj)
    call.set(u=u, proj=proj, dout=dout, out=dxz, du=du, states=states)
    if plan.stateful:
        call.begin_with(d_end)
        d_before = call.new(*before.shape, dtype=plan.dtype)
    if plan.exact:
        ddelta = torch.empty_like(u)
        call.set(ddelta=ddelta)
        dA, d_skip, d_dt_bias, _ = walk_back(call, dout, dproj[..., R:], states if kept else None, exchange)
        ddelta, rows = ddelta.view(2, -1, E), dproj.view(2, -1, R + 2 * N)
        torch.bmm(ddelta, dt_proj_weight.to(xz.dtype), out=rows[..., :R])
        d_dt_weight = torch.bmm(ddelta.transpose(1, 2), proj.view(2, -1, R + 2 * N)[..., :R])
    else:
        dA, d_skip, d_dt_bias, d_dt_weight = walk_back(call, dout, dproj, states if kept else None, exchange)
    u, du, dproj = u.view(2, -1, E), du.view(2, -1, E), dproj.view(2, -1, R + 2 * N)
    d_x_weight = torch.bmm(dproj.transpose(1, 2), u)
    if plan.conv_takes_projection:
        x_proj_weight = x_proj_weight.contiguous()
        call.set(x_w=x_proj_weight, dproj=dproj)
    else:
        du.baddbmm_(dproj, x_proj_weight)
    dconv = call.new(B, plan.conv_backward[0].grid[1], 2, K + 1, E)
    if plan.stateful:
        call.set(after=d_before)
    for launch in plan.conv_backward:
        call.run(launch, dvec=dconv)
    dconv = dconv.sum(dim=(0, 1))
    gradients = [dxz, dconv[:, :K].transpose(1, 2), dconv[:, K], d_x_weight, d_dt_weight, d_dt_bias, dA, d_skip]
    types = [t.dtype for t in (xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)]
    if out_proj_weight is not None:
        gradients.append(dprojected.flatten(0, 1).T @ y.flatten(0, 1))
        types.append(out_proj_weight.dtype)
    if plan.stateful:
        if d_after is not None:
            add_gradient_of_inputs_after(d_after, visits, dxz, d_before)
        gradients += [d_before, call.end]
        types += [before.dtype, torch.float32]
    # The outputs of an operator may not share memory: what does is not contiguous here.
    return [g.contiguous().to(t) for g, t in zip(gradients, types, strict=True)]


def walk_back(call, dout, dproj, sub, exchange):
    """
    Writes `out`, `du` and `y` of the call, and into `dproj` (2, B, L, R + 2N) the gradients of the projection. In
    float32, `dproj` are those of B and C alone (2, B, L, 2N), and `ddelta` is written.

    Returns:
        in float32, the gradients of A_log, D, the bias of Δ and, but for float32, dt_proj's weight.
    """
    plan = call.plan
    B, L, E, R, N, places = plan.B, plan.L, plan.E, plan.R, plan.N, plan.places
    kept, turns, backward = sub is not None, plan.turns, plan.backward
    if kept:
        turns, places, backward = 1, L, plan.backward_of_kept
    if plan.side_by_side or exchange is not None:
        adjoint = call.chunk_adjoints(dout, exchange)
    else:
        adjoint = call.new(*plan.state_shape(1))
    walks = plan.chunks if plan.side_by_side else turns
    if not kept:
        sub = call.new(*plan.state_shape(-(-places // 8)), dtype=plan.dtype)
    partial_type = torch.bfloat16 if plan.dtype == torch.bfloat16 else torch.float32
    partial = call.new(2, plan.backward.grid[0], B, places, dproj.shape[3], dtype=partial_type)
    da, dvec, d_dt_w = call.new(*plan.state_shape(walks)), call.new(2, B, walks, 2, E), None
    call.set(sub=sub, adjoint=adjoint, partial=partial, da=da, dvec=dvec)
    if not plan.exact:
        d_dt_w = call.new(2, B * walks, E, R)
        call.set(d_dt_w=d_dt_w)
    for turn in range(turns):
        at = -1 if plan.side_by_side or kept else turn
        if not kept:
            call.run(plan.states.at(turn=at) if at >= 0 else plan.states)
        call.run(backward.at(turn=at) if at >= 0 else backward)
        for direction in (0, 1):
            first = places * (turn if direction and not plan.ordered else turns - 1 - turn)
            tokens = slice(first, min(first + places, L))
            found = partial[direction, :, :, : tokens.stop - first]
            if partial_type == plan.dtype and not (direction and plan.ordered):
                torch.sum(found, 0, out=dproj[direction, :, tokens])  # accumulates in float32
                continue
            if direction and plan.ordered:
                tokens = call.visits[tokens]
            dproj[direction][:, tokens] = found.sum(0).to(plan.dtype)
    if plan.ordered and plan.gated:
        call.run(plan.gate_backward)
    # (block, group, g, q, row, column): channel = block * 16 + g * 2 + row, state = group * 8 + 2q + column
    dA = da.sum(dim=(1, 2)).view(2, -1, -(-N // 8), 8, 4, 2, 2).permute(0, 1, 3, 5, 2, 4, 6)
    dA = dA.reshape(2, -(-E // 16) * 16, -1)[:, :E, :N]
    d_skip, d_dt_bias = dvec.sum(dim=(1, 2)).unbind(1)
    return dA, d_skip, d_dt_bias, None if plan.exact else d_dt_w.sum(1)


@_backward_op.register_fake
def _(dout, d_after, d_end, xz, *rest):
    *parameters, _, before, _, _, _, _, _ = rest  # visits, before, proj, states, u, structure, kept
    A_log = parameters[5]
    tensors = [xz, *(p for p in parameters if p is not None)]
    gradients = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]
    if before is not None:
        start = (2, before.shape[1], *A_log.shape[1:])
        gradients += [before.new_empty(before.shape), before.new_empty(start, dtype=torch.float32)]
    return gradients


def _setup_context(ctx, inputs, output):
    *tensors, _, ctx.structure, ctx.for_backward = inputs
    ctx.save_for_backward(*tensors, *output[1:4])
    ctx.set_materialize_grads(False)  # nobody wants those of what is kept, which are as large


def _backward(ctx, dout, _, __, ___, d_after, d_end):
    *inputs, out_proj_weight, visits, before, proj, states, u = ctx.saved_tensors
    xz = inputs[0]
    if dout is None:
        dout = xz.new_zeros(*xz.shape[:2], xz.shape[2] // 2 if out_proj_weight is None else out_proj_weight.shape[0])
    if before is None:  # without a state, their outputs are empty
        d_after = d_end = None
    rest = (out_proj_weight, visits, before, proj, states, u, ctx.structure, ctx.for_backward == 2)
    arguments = (dout, d_after, d_end, *inputs, *rest)
    if torch.is_grad_enabled() or not nobody_traces(arguments[:-2]):
        gradients = _backward_op(*arguments)
    else:
        with on_device_of(xz):
            gradients = _gradients(*arguments)
    of_inputs, others = gradients[:8], gradients[8:]
    of_projection = others.pop(0) if out_proj_weight is not None else None
    return *of_inputs, of_projection, None, *(others or (None, None)), None, None


_scan_op.register_autograd(_backward, setup_context=_setup_context)


class _PartScan(torch.autograd.Function):
    """The scan of a part, with the collectives of both passes between its kernels."""

    @staticmethod
    def forward(ctx, part, structure, keep, xz, *parameters_and_out):
        *parameters, out_proj_weight = parameters_and_out
        visits = None if part.order is None else part.order.visits
        x, taps, A_log = xz[..., : xz.shape[2] // 2], parameters[0].shape[2], parameters[5]
        with on_device_of(xz):
            before = part.from_neighbour(last_inputs(x, taps - 1, part.order))
            exchange = functools.partial(part.start, A_log=A_log)
            out, proj, states, u, _, _ = _forward(xz, *parameters, visits, before, None, structure, keep, exchange)
            if out_proj_weight is not None:
                out = torch.nn.functional.linear(out, out_proj_weight)
        ctx.part, ctx.structure, ctx.kept = part, structure, keep == 2
        ctx.save_for_backward(xz, *parameters, out_proj_weight, visits, before, proj, states, u)
        return out

    @staticmethod
    def backward(ctx, dout):
        xz, *parameters, out_proj_weight, visits, before, proj, states, u = ctx.saved_tensors
        with on_device_of(xz):
            exchange = functools.partial(ctx.part.start, A_log=parameters[5])
            rest = (out_proj_weight, visits, before, proj, states, u, ctx.structure, ctx.kept)
            gradients = _gradients(dout, None, None, xz, *parameters, *rest, exchange)
            d_xz, d_before = gradients[0], gradients[-2]
            # The last inputs here are those before the first one of the part after.
            d_after = ctx.part.from_neighbour(d_before, adjoint=True)
            add_gradient_of_inputs_after(d_after, visits, d_xz, d_before)
        return None, None, None, *gradients[:8], gradients[8] if out_proj_weight is not None else None


@torch.compiler.disable
def _scan_part(*arguments):
    return _PartScan.apply(*arguments)


class _Scan(torch.autograd.Function):
    """The operator for autograd alone: PyTorch's dispatcher takes the host as long as all launches."""

    @staticmethod
    def forward(ctx, xz, *arguments):
        """As the operator, but for what is kept for the backward pass, which is no output; weights of any type."""
        *parameters, out_proj_weight, visits, before, start, structure, for_backward = arguments
        ctx.types = parameters[2].dtype, None if out_proj_weight is None else out_proj_weight.dtype
        inputs = (*_typed(xz, parameters, out_proj_weight), visits, before, start, structure, for_backward)
        output = _scan(*inputs)
        _setup_context(ctx, inputs, output)
        return output[0], *output[4:]

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, d_after, d_end):
        gradients = list(_backward(ctx, dout, None, None, None, d_after, d_end))
        for place, dtype in zip((3, 8), ctx.types, strict=True):
            if gradients[place] is not None:
                gradients[place] = gradients[place].to(dtype)
        return tuple(gradients)


def _typed(xz, parameters, out_proj_weight):
    """`xz` without gaps, and the parameters, those that PyTorch multiplies by in its type."""
    conv_weight, conv_bias, x_proj_weight, *others = parameters
    if x_proj_weight.dtype != xz.dtype:
        x_proj_weight = x_proj_weight.to(xz.dtype)
    if out_proj_weight is not None:
        out_proj_weight = out_proj_weight.to(xz.dtype)
    return xz.contiguous(), conv_weight, conv_bias, x_proj_weight, *others, out_proj_weight


def bidirectional_selective_scan(
    xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D, order=None,
    out_proj_weight=None, state=None, part=None,
):  # fmt: skip
    """
    See `selective_scan.bidirectional_selective_scan`; the backward pass makes the input of `out_proj` again. `part` is
    the `ScanPart` whose order is given.
    """
    if A_log.is_complex():
        raise ValueError("The scan backend 'cuda' takes a real `A_log`, got a complex one")
    parameters = (conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)
    visits, structure = (None, [0, 1, -1]) if order is None else (order.visits, _structure(order))
    keep = (2 if KEEP_STATES else 1) if torch.is_grad_enabled() else 0
    if part is not None:
        return _scan_part(part, structure, keep, *_typed(xz, parameters, out_proj_weight))
    before, start = (None, None) if state is None else state
    rest = visits, before, start, structure
    tensors = (xz, *parameters, out_proj_weight, before, start)
    if not nobody_traces(tensors):  # `torch.compile` and modes see an operator
        out, _, _, _, *after = _scan_op(*_typed(xz, parameters, out_proj_weight), *rest, keep)
    elif autograd_looks_on(tensors):
        out, *after = _Scan.apply(xz, *parameters, out_proj_weight, *rest, keep)
    else:
        out, _, _, _, *after = _scan(*_typed(xz, parameters, out_proj_weight), *rest, 0)
    return out if state is None else (out, tuple(after))


def _structure(order):
    """Kind of reversal, frames and class token of a `ScanOrder`, as the kernels take them."""
    reversal = {None: 0, "spatial": 1, "temporal": 2}[order.reversal]
    return [reversal, order.frames, -1 if order.class_token is None else order.class_token]
