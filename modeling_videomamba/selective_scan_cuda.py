"""
The scan on NVIDIA GPUs, in CUDA C++ that the NVRTC of the PyTorch wheel compiles at the first call: no build, no nvcc.

Two kernels: convolution and SiLU of both directions; then step size (its projection on the tensor cores), softplus,
scan, skip term, sum of the directions and gate, both directions in one launch. Between them stands one batched matrix
product, `x_proj`. Nothing is flipped or transposed: tensors are (B, L, E) throughout, and a direction is the order in
which a warp walks over the tiles of a sequence. Kept for the backward pass are `xz`, the small projection
(2, B, L, R + 2N) and the states at the borders of a few chunks of the length. The rest is recomputed, the input of
`out_proj` too, if its weight is given; the states chunk by chunk, from the last to the first.

What shapes and types decide is worked out once and kept (`ScanPlan`); a call without gradients goes past PyTorch's
dispatcher, so that one clip need not wait for Python. Work space comes from PyTorch's caching allocator, which makes
it safe on several streams and in several threads.

The first call of a model compiles what it needs, in about 2 s, and keeps it in `~/.cache/videomamba`, or in
the folder that the environment variable `VIDEOMAMBA_CACHE` names.

What was tried, and how fast it is: docs/kernels.md.
"""

import contextlib
import functools
import os

import torch

from .selective_scan_cuda_plan import scan_plan, split_length, state_shape
from .selective_scan_cuda_runtime import (
    KernelArguments,
    driver,
    multiprocessors_of,
    no_gpu_reason,
    nobody_looks_on,
    nvrtc,
)
from .selective_scan_operators import NAMESPACE


# Whether the state before every 8 tokens and the convolution's output are kept for the backward pass: faster, for more
# memory.
KEEP_STATES = os.environ.get("VIDEOMAMBA_KEEP_STATES") == "1"
TURN_TOKENS = 131072  # about as many tokens the backward pass recomputes the states of at a time
PARAMETER_NAMES = ("conv_w", "conv_b", "dt_w", "dt_b", "a_log", "skip")  # the kernels' names


@torch.compiler.assume_constant_result
def unusable_reason(device, dtype):
    """Why this backend cannot run on `device` with activations of `dtype`, or None."""
    return _unusable_reason(device, dtype)


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


class _Call:
    """A plan, and the kernels' arguments: those of all kernels from the start, others as they become known."""

    def __init__(self, xz, conv_weight, conv_bias, dt_weight, dt_bias, A_log, D, visits, structure):
        parameters = (conv_weight, conv_bias, dt_weight, dt_bias, A_log, D)
        device, dtype, shape = xz.device, xz.dtype, xz.shape
        start = xz.data_ptr()
        described = tuple((p.shape, p.dtype, p.device) for p in parameters)
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
            described,
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

    def set(self, **arguments):
        for name, value in arguments.items():
            setattr(self.arguments, name, value.data_ptr() if isinstance(value, torch.Tensor) else value)

    def run(self, launch, **arguments):
        """Queue a kernel, with more tensors or numbers among its arguments, which stay for those after it."""
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

    def chunk_states(self, joined):
        """State before each chunk, if they are walked side by side; or, for a `joined` scan, after each from zero."""
        plan = self.plan
        states, sums = self.new(*plan.state_shape(plan.chunks)), self.new(2, plan.B, plan.chunks, plan.E)
        self.run(plan.ends, states=states, sums=sums)
        if not joined:
            self.run(plan.pass_states[0])
        return states, sums

    def chunk_adjoints(self, dout):
        """Adjoint state after each chunk, likewise."""
        plan = self.plan
        adjoint, sums = self.new(*plan.state_shape(plan.chunks)), self.new(2, plan.B, plan.chunks, plan.E)
        u, y = self.arguments.u, self.arguments.y
        ungated = torch.empty_like(dout)
        self.run(plan.ungate, y=ungated)
        self.run(plan.adjoint, u=ungated, adjoint=adjoint, sums=sums)
        self.run(plan.pass_states[1])
        self.set(u=u, y=y)
        return adjoint


def _tf32_is_allowed():
    """PyTorch's own setting for products of float32 matrices."""
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)  # since PyTorch 2.9
    return matmul.allow_tf32 if precision is None else precision == "tf32"


@contextlib.contextmanager
def _on(tensor):
    """The GPU of a tensor is the current one, and autocast is off."""
    with torch.cuda.device_of(tensor), torch.autocast(tensor.device.type, enabled=False):
        yield


def _project(u, weight):
    """`u` (2, B, L, E) times `weight` (2, P, E), transposed: (2, B, L, P)."""
    rows = u.view(2, -1, u.shape[3])
    return torch.bmm(rows, weight.transpose(1, 2)).view(*u.shape[:3], -1)


def _forward(xz, conv_w, conv_b, x_proj_weight, dt_w, dt_b, A_log, D, visits, structure, for_backward):
    """
    The gated mean of both directions (B, L, E), the small projection, and what is kept for the backward pass: nothing
    (`for_backward` 0), the states at the borders of chunks (1), or the state before every 8 tokens and the
    convolution's output, unless an order has put the scan's in its place (2).
    """
    call = _Call(xz, conv_w, conv_b, dt_w, dt_b, A_log, D, visits, structure)
    plan = call.plan
    _check_memory(plan)
    out = call.new(plan.B, plan.L, plan.E, dtype=plan.dtype)
    u = call.convolve()
    proj = _project(u, x_proj_weight)
    call.set(proj=proj, out=out)
    scan, states = plan.scan[for_backward], None
    if plan.side_by_side:
        states, sums = call.chunk_states(scan.options["JOINED"])  # kept until the scan is queued
    elif for_backward == 1 and plan.chunks > 1:
        states = call.new(*plan.state_shape(plan.chunks))
        call.set(states=states)
    kept = states if for_backward else None
    if for_backward == 2:
        kept = call.new(*plan.state_shape(-(-plan.L // 8)), dtype=plan.dtype)
        call.set(sub=kept)
    call.run(scan)
    if plan.ordered:
        call.run(plan.gate)
    return out, proj, kept, u if for_backward == 2 and not plan.ordered else None


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
    structure: list[int],
    for_backward: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    parameters = (conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)
    with _on(xz):
        out, proj, states, u = _forward(xz, *parameters, visits, structure, for_backward)
        if out_proj_weight is not None:
            out = torch.nn.functional.linear(out, out_proj_weight)
    if states is None:
        states = xz.new_empty(0, dtype=torch.float32)
    return out, proj, states, xz.new_empty(0) if u is None else u


@_scan_op.register_fake
def _(xz, *rest):
    _, _, x_proj_weight, _, _, A_log, _, out_proj_weight, visits, _, for_backward = rest
    batch, length, channels = xz.shape[0], xz.shape[1], xz.shape[2] // 2
    outputs = channels if out_proj_weight is None else out_proj_weight.shape[0]
    side_by_side, _, chunks, _ = split_length(batch, length, channels, multiprocessors_of(xz.device), TURN_TOKENS)
    parts = chunks if side_by_side or chunks > 1 else 0
    parts = (0, parts, -(-length // 8))[for_backward]
    states = state_shape(batch, parts, channels, A_log.shape[2]) if parts else (0,)
    return (
        xz.new_empty(batch, length, outputs),
        xz.new_empty(2, batch, length, x_proj_weight.shape[1]),
        xz.new_empty(states, dtype=xz.dtype if for_backward == 2 else torch.float32),
        xz.new_empty((2, batch, length, channels) if for_backward == 2 and visits is None else 0),
    )


@torch.library.custom_op(f"{NAMESPACE}::bidirectional_scan_cuda_backward", mutates_args=())
def _backward_op(
    dout: torch.Tensor,
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
    proj: torch.Tensor,
    states: torch.Tensor,
    u: torch.Tensor,
    structure: list[int],
    kept: bool,
) -> list[torch.Tensor]:
    dxz = torch.empty_like(xz)
    dout = dout.contiguous()
    if dout.data_ptr() % 16:
        dout = dout.clone()
    with _on(xz):
        call = _Call(xz, conv_weight, conv_bias, dt_proj_weight, dt_proj_bias, A_log, D, visits, structure)
        plan = call.plan
        B, E, R, N, K = plan.B, plan.E, plan.R, plan.N, plan.K
        dprojected, y = dout, None
        if out_proj_weight is not None:
            dout = dprojected @ out_proj_weight
        if out_proj_weight is not None or plan.ordered:
            y = torch.empty_like(dout)
            call.set(y=y)
        if not (kept and visits is None):
            u = call.convolve()
        du, dproj = torch.empty_like(u), torch.empty_like(proj)
        call.set(u=u, proj=proj, dout=dout, out=dxz, du=du, states=states)
        if plan.exact:
            ddelta = torch.empty_like(u)
            call.set(ddelta=ddelta)
            dA, d_skip, d_dt_bias, _ = _walk_back(call, dout, dproj[..., R:], states if kept else None)
            ddelta, rows = ddelta.view(2, -1, E), dproj.view(2, -1, R + 2 * N)
            torch.bmm(ddelta, dt_proj_weight.to(xz.dtype), out=rows[..., :R])
            d_dt_weight = torch.bmm(ddelta.transpose(1, 2), proj.view(2, -1, R + 2 * N)[..., :R])
        else:
            dA, d_skip, d_dt_bias, d_dt_weight = _walk_back(call, dout, dproj, states if kept else None)
        u, du, dproj = u.view(2, -1, E), du.view(2, -1, E), dproj.view(2, -1, R + 2 * N)
        d_x_weight = torch.bmm(dproj.transpose(1, 2), u)
        if plan.conv_takes_projection:
            x_proj_weight = x_proj_weight.contiguous()
            call.set(x_w=x_proj_weight, dproj=dproj)
        else:
            du.baddbmm_(dproj, x_proj_weight)
        dconv = call.new(B, plan.conv_backward[0].grid[1], 2, K + 1, E)
        for launch in plan.conv_backward:
            call.run(launch, dvec=dconv)
        dconv = dconv.sum(dim=(0, 1))
        gradients = [dconv[:, :K].transpose(1, 2), dconv[:, K], d_x_weight, d_dt_weight, d_dt_bias, dA, d_skip]
        parameters = [conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D]
        if out_proj_weight is not None:
            gradients.append(dprojected.flatten(0, 1).T @ y.flatten(0, 1))
            parameters.append(out_proj_weight)
    # The outputs of an operator may not share memory: what does is not contiguous here.
    return [dxz, *(g.contiguous().to(p.dtype) for g, p in zip(gradients, parameters, strict=True))]


def _walk_back(call, dout, dproj, sub):
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
    adjoint = call.chunk_adjoints(dout) if plan.side_by_side else call.new(*plan.state_shape(1))
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
            call.run(plan.states.at(turn=at))
        call.run(backward.at(turn=at))
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
    if plan.ordered:
        call.run(plan.gate_backward)
    # (block, group, g, q, row, column): channel = block * 16 + g * 2 + row, state = group * 8 + 2q + column
    dA = da.sum(dim=(1, 2)).view(2, -1, -(-N // 8), 8, 4, 2, 2).permute(0, 1, 3, 5, 2, 4, 6)
    dA = dA.reshape(2, -(-E // 16) * 16, -1)[:, :E, :N]
    d_skip, d_dt_bias = dvec.sum(dim=(1, 2)).unbind(1)
    return dA, d_skip, d_dt_bias, None if plan.exact else d_dt_w.sum(1)


@_backward_op.register_fake
def _(dout, xz, *rest):
    *parameters, _, _, _, _, _, _ = rest  # visits, proj, states, u, structure, kept
    tensors = [xz, *(p for p in parameters if p is not None)]
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.structure, ctx.for_backward = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)  # nobody wants those of what is kept, which are as large


def _backward(ctx, dout, *_):
    *inputs, out_proj_weight, visits, proj, states, u = ctx.saved_tensors
    gradients = _backward_op(
        dout, *inputs, out_proj_weight, visits, proj, states, u, ctx.structure, ctx.for_backward == 2
    )
    return *gradients, *([None] if out_proj_weight is None else []), None, None, None


_scan_op.register_autograd(_backward, setup_context=_setup_context)


def bidirectional_selective_scan(
    xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D, order=None, out_proj_weight=None
):
    """See `selective_scan.bidirectional_selective_scan`; the backward pass makes the input of `out_proj` again."""
    if A_log.is_complex():
        raise ValueError("The scan backend 'cuda' takes a real `A_log`, got a complex one")
    if x_proj_weight.dtype != xz.dtype:
        x_proj_weight = x_proj_weight.to(xz.dtype)
    parameters = (conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)
    visits, structure = (None, [0, 1, -1]) if order is None else (order.visits, _structure(order))
    if out_proj_weight is None and nobody_looks_on((xz, *parameters)):
        with _on(xz) if _must_switch(xz) else contextlib.nullcontext():
            return _forward(xz.contiguous(), *parameters, visits, structure, 0)[0]
    if out_proj_weight is not None:
        out_proj_weight = out_proj_weight.to(xz.dtype)
    keep = (2 if KEEP_STATES else 1) if torch.is_grad_enabled() else 0
    return _scan_op(xz.contiguous(), *parameters, out_proj_weight, visits, structure, keep)[0]


def _must_switch(xz):
    """Whether another GPU than that of `xz` is the current one, or autocast is on."""
    if xz.device.type != "cuda":
        return torch.is_autocast_enabled(xz.device.type)
    return torch.is_autocast_enabled("cuda") or torch.cuda.current_device() != xz.device.index


def _structure(order):
    """Kind of reversal, frames and class token of a `ScanOrder`, as the kernels take them."""
    reversal = {None: 0, "spatial": 1, "temporal": 2}[order.reversal]
    return [reversal, order.frames, -1 if order.class_token is None else order.class_token]
