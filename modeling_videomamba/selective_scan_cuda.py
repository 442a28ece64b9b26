"""
The scan on NVIDIA GPUs, in CUDA C++ that the NVRTC of the PyTorch wheel compiles at the first call: no build, no nvcc.

Two kernels: convolution and SiLU of both directions; then step size (its projection on the tensor cores), softplus,
scan, skip term, sum of the directions and gate, both directions in one launch. Between them stands one batched matrix
product, `x_proj`. Nothing is flipped or transposed: tensors are (B, L, E) throughout, and a direction is the order in
which a warp walks over the tiles of a sequence. Kept for the backward pass are `xz`, the small projection
(2, B, L, R + 2N) and the states at the borders of a few chunks of the length. The rest is recomputed, the input of
`out_proj` too, if its weight is handed over; the states chunk by chunk, from the last to the first.

The first call of a model compiles what it needs, in about 2 s, and keeps it in `~/.cache/videomamba`, or
in the folder that the environment variable `VIDEOMAMBA_CACHE` names.

What was tried, and how fast it is: docs/kernels.md.
"""

import functools

import torch

from .selective_scan_cuda_runtime import KernelArguments, driver, launch, nvrtc, source_constant


TILE, RUN = source_constant("TILE"), source_constant("RUN")
CONV_THREADS, CONV_CHANNELS = source_constant("CONV_THREADS"), source_constant("CONV_CHANNELS")

# Each copy of this code in a process (one travels with every Hub repository) has operators of its own.
_NAMESPACE = __package__.replace("modeling_videomamba", "videomamba").replace(".", "_")

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_TURN_TOKENS = 32768  # about as many tokens the backward pass recomputes the states of at a time


@torch.compiler.assume_constant_result
def unusable_reason(device, dtype):
    """Why this backend cannot run on `device` with activations of `dtype`, or None."""
    if device.type != "cuda" or torch.version.cuda is None:
        return f"it needs an NVIDIA GPU, and the tensors are on {device}"
    if dtype not in DTYPES:
        return f"it takes float32, float16 and bfloat16, not {dtype}"
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs compute capability 8.0 (Ampere) or later, and this GPU has {capability[0]}.{capability[1]}"
    try:
        nvrtc()
        driver()
    except OSError as error:
        return f"the libraries that compile and launch it are missing: {error}"
    return None


class _Scan:
    """One call's shapes, parameters and launch settings."""

    def __init__(self, xz, conv_weight, conv_bias, dt_weight, dt_bias, A_log, D, order):
        self.B, self.L, self.E = xz.shape[0], xz.shape[1], xz.shape[2] // 2
        self.xz, self.order, self.device = xz, order, xz.device
        self.R, self.N = dt_weight.shape[2], A_log.shape[2]
        parameters = (conv_weight, conv_bias, dt_weight, dt_bias, A_log, D)
        size = self.L * xz.shape[2] * xz.element_size()
        if size >= 2**32:
            raise ValueError(
                f"{self.L} tokens of {xz.shape[2]} values in {xz.dtype} are {size / 2**30:.1f} GiB; the scan backend "
                "'cuda' takes sequences of less than 4 GiB, as offsets in them have 32 bits. Cut them, or choose "
                "another backend with `use_scan_backend`."
            )
        # A kernel does not look where its pointers lead.
        for parameter, last in zip(
            parameters, ((conv_weight.shape[2],), (), (self.R,), (), (self.N,), ()), strict=True
        ):
            if parameter.shape != (2, self.E, *last) or parameter.device != xz.device:
                raise ValueError(
                    f"A parameter of the scan has the shape {tuple(parameter.shape)} on {parameter.device}; with `xz` "
                    f"of the shape {tuple(xz.shape)} on {xz.device} it must be {(2, self.E, *last)} there."
                )
        common = conv_weight.dtype
        if common not in (torch.float32, xz.dtype) or any(p.dtype != common for p in parameters):
            common = torch.float32
        names = ("conv_w", "conv_b", "dt_w", "dt_b", "a_log", "skip")
        self.tensors = {n: p.to(common).contiguous() for n, p in zip(names, parameters, strict=True)}
        self.tensors["xz"] = xz
        if order is not None:
            self.tensors["order"] = order.to(xz.device, torch.int64).contiguous()
        self.options = {
            "IO": DTYPES[xz.dtype],
            "PT": DTYPES[common],
            "N": self.N,
            "R": self.R,
            "K": conv_weight.shape[2],
            "CHANNELS": self.E,
            "VEC": int(self.E % 8 == 0 and xz.data_ptr() % 16 == 0),
            "ORDERED": int(order is not None),
        }
        self.rows = _rows(self.B, self.E)
        self.conv_groups = self.E // CONV_CHANNELS if self.options["VEC"] else self.E  # a thread takes one
        self.side_by_side, self.chunk, self.chunks, self.span = _plan(self.B, self.L, self.E, xz.device)
        self.modes = (0,) if order is None else (1, 2)  # launches of a walk: both directions at once, or one by one

    def new(self, *shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=self.device)

    def launch(self, name, grid, threads, options=None, shared=0, numbers=None, **tensors):
        defaults = {"B": self.B, "L": self.L, "chunk": self.chunk, "chunks": self.chunks, "turn": -1, "span": 1}
        numbers = {**defaults, **(numbers or {})}
        pointers = {n: t.data_ptr() for n, t in {**self.tensors, **tensors}.items() if t is not None}
        options = {**self.options, **(options or {})}
        launch(name, options, KernelArguments(**numbers, **pointers), grid, threads, shared, self.device)

    def walk(self, name, modes=None, numbers=None, side_by_side=1, **tensors):
        """Launch a kernel whose warps walk over the sequence, or over chunks of it `side_by_side`."""
        options, threads, shared = walk_settings(name, self.share(name, side_by_side), self.R, self.N, self.xz.dtype)
        channels = 16 * options["BLOCKS"] * options["W"]  # of a thread block
        grid = (-(-self.E // channels), side_by_side, self.B)
        for mode in modes or self.modes:
            self.launch(name, grid, threads, options, shared, {"mode": mode, **(numbers or {})}, **tensors)

    def share(self, name, side_by_side):
        """Blocks of 16 channels that a warp takes. Of many, it takes two, and shares more; but each of the GPU's
        schedulers wants about three warps, so that of few, two warps share one, with half of the states each."""
        warps, schedulers = self.rows * side_by_side, 4 * _multiprocessors(self.device)
        if name not in ("scan", "states") or not self.options["IO"]:
            return 1
        if warps >= 5 * schedulers:
            return 2
        return 0.5 if name == "scan" and self.N == 16 and warps < 2 * schedulers else 1

    def convolve(self):
        """Convolution and SiLU: (2, B, L, E), each direction's tokens at their own places."""
        u = self.new(2, self.B, self.L, self.E, dtype=self.xz.dtype)
        walks = self.conv_groups if self.order is None else 2 * self.conv_groups  # for both directions, or for each
        grid = (-(-walks // CONV_THREADS), -(-self.L // RUN), self.B)
        self.launch("conv", grid, CONV_THREADS, u=u)
        return u

    def state_shape(self, parts):
        return _state_shape(self.B, parts, self.E, self.N)

    def chunk_states(self, u, proj):
        """State before each chunk, if they are walked side by side."""
        return self.pass_states("ends", "states", 0, u=u, proj=proj)

    def chunk_adjoints(self, dout, proj):
        """Adjoint state after each chunk, likewise."""
        dy = (dout * torch.nn.functional.silu(self.xz[..., self.E :].float()) / 2).to(dout.dtype)
        return self.pass_states("adjoint", "adjoint", 1, u=dy, proj=proj)

    def pass_states(self, walk, states, against, **tensors):
        """What each chunk starts from, given from a walk what each ends with from zero."""
        found = {states: self.new(*self.state_shape(self.chunks)), "sums": self.new(2, self.B, self.chunks, self.E)}
        self.walk(walk, side_by_side=self.chunks, **found, **tensors)
        size = -(-self.E // 16) * -(-self.N // 8) * 128
        self.launch("pass_states", (-(-size // 128), self.B, 2), 128, numbers={"mode": against}, **found)
        return found[states]


def _state_shape(batch, parts, channels, states):
    """States as the lanes hold them, see `fragment` in the source."""
    return 2, batch, parts, -(-channels // 16), -(-states // 8), 32, 4


def _rows(batch, channels):
    """Warps of a walk over whole sequences, if each takes 16 channels."""
    return 2 * batch * -(-channels // 16)


@functools.cache
def _multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count


def _plan(batch, length, channels, device):
    """
    How the length is cut. If there are few sequences and channels, its chunks are walked side by side, which costs a
    second walk. If there are many, the scan keeps its states at the borders of chunks, and the backward pass takes a
    few chunks at a time, the last first, to hold few states: these are recomputed side by side, and the adjoint state
    is handed on from turn to turn.

    Returns:
        whether the chunks of the scan are walked side by side, tokens in a chunk, chunks, chunks in a turn.
    """
    schedulers = 4 * _multiprocessors(device)
    rows = _rows(batch, channels)
    tiles = -(-length // TILE)
    side_by_side = rows < 1.2 * schedulers and tiles > 2
    if side_by_side:
        turns, span = 1, min(-(-3 * schedulers // rows), -(-tiles // 2))
    else:
        turns = min(-(-batch * length // _TURN_TOKENS), tiles)
        span = max(1, min(4, -(-5 * schedulers // rows)))
    chunk = -(-tiles // (turns * span)) * TILE
    return side_by_side, chunk, -(-length // chunk), span


# (kernel, blocks of 16 channels a warp): (warps a direction in a thread block, thread blocks on a multiprocessor);
# measured on an H200
WALKS = {
    ("scan", 0.5): (1, 4),
    ("scan", 1): (1, 8),
    ("scan", 2): (1, 7),
    ("states", 1): (2, 4),
    ("states", 2): (2, 3),
    ("ends", 1): (2, 4),
    ("adjoint", 1): (2, 4),
    ("backward", 1): (2, 3),
}


def walk_settings(kernel, share, rank, states, dtype):
    """
    How a walk is compiled and launched.

    Args:
        kernel (`str`), share (`float`): a key of `WALKS`; 0.5 are two warps for one block of 16 channels.
        rank, states (`int`): R and N.
        dtype (`torch.dtype`): of the activations.

    Returns:
        its options (`dict`), threads of a block, bytes of shared memory of a block.
    """
    blocks, split = max(share, 1), int(share < 1)
    # What the settings promise does not hold for float32 and many states, which want more registers.
    plain = dtype == torch.float32 or states > 16
    warps, resident = (1, 1) if plain else WALKS[kernel, share]
    shared = shared_bytes(kernel, blocks, split, rank, states, dtype)
    options = {"BLOCKS": blocks, "W": warps, "MINBLOCKS": resident, "SPLIT": split}
    return options, 64 * warps << split, shared * 2 * warps


def shared_bytes(kernel, blocks, split, rank, states, dtype):
    """Shared memory of a warp, or of the two of a split one: `FORWARD_SHARED` and `BACKWARD_SHARED` of csrc/."""
    size, exact = dtype.itemsize, dtype == torch.float32
    proj_tile = -(-TILE * (rank + 2 * states) * size // 16) * 16
    step_size = 0 if exact else -(-2 * blocks * -(-rank // 8) // 4) * 512 + 128 * blocks
    tile = TILE * size * (16 * blocks + 16 * (blocks > 1))
    if kernel == "backward":
        group = -(-states // 8) * 512
        return 2 * proj_tile + 7 * tile + 5 * TILE * 20 * 4 + group + 1536 + (group if exact else step_size)
    steps = TILE * (16 * blocks + 4) * 4  # Δ, and the outputs of each half
    return 2 * proj_tile + (4 if kernel == "scan" else 2) * tile + (3 if split else 1) * steps + step_size


def _project(u, weight):
    """`u` (2, B, L, E) times `weight` (2, P, E), transposed: (2, B, L, P)."""
    rows = u.view(2, -1, u.shape[3])
    return torch.bmm(rows, weight.transpose(1, 2)).view(*u.shape[:3], -1)


@torch.library.custom_op(f"{_NAMESPACE}::bidirectional_scan_cuda", mutates_args=())
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
    order: torch.Tensor | None,
    for_backward: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.cuda.device_of(xz), torch.autocast(xz.device.type, enabled=False):
        scan = _Scan(xz, conv_weight, conv_bias, dt_proj_weight, dt_proj_bias, A_log, D, order)
        out = scan.new(scan.B, scan.L, scan.E, dtype=xz.dtype)
        u = scan.convolve()
        proj = _project(u, x_proj_weight)
        if scan.side_by_side:
            states = scan.chunk_states(u, proj)
            scan.walk("scan", side_by_side=scan.chunks, u=u, proj=proj, out=out, states=states)
        else:
            keep = for_backward and scan.chunks > 1
            states = scan.new(*scan.state_shape(scan.chunks)) if keep else scan.new(0)
            numbers = {"chunk": scan.chunk * scan.chunks, "chunks": 1, "kept": scan.chunk if keep else 0}
            scan.walk("scan", numbers=numbers, u=u, proj=proj, out=out, states=states)
        if out_proj_weight is not None:
            out = torch.nn.functional.linear(out, out_proj_weight)
    return out, proj, states


@_scan_op.register_fake
def _(xz, *rest):
    _, _, x_proj_weight, _, _, A_log, _, out_proj_weight, _, for_backward = rest
    batch, length, channels = xz.shape[0], xz.shape[1], xz.shape[2] // 2
    outputs = channels if out_proj_weight is None else out_proj_weight.shape[0]
    side_by_side, _, chunks, _ = _plan(batch, length, channels, xz.device)
    keep = side_by_side or (for_backward and chunks > 1)
    states = _state_shape(batch, chunks, channels, A_log.shape[2]) if keep else (0,)
    return (
        xz.new_empty(batch, length, outputs),
        xz.new_empty(2, batch, length, x_proj_weight.shape[1]),
        xz.new_empty(states, dtype=torch.float32),
    )


@torch.library.custom_op(f"{_NAMESPACE}::bidirectional_scan_cuda_backward", mutates_args=())
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
    order: torch.Tensor | None,
    proj: torch.Tensor,
    states: torch.Tensor,
) -> list[torch.Tensor]:
    dxz = torch.empty_like(xz)
    dout = dout.contiguous()
    if dout.data_ptr() % 16:
        dout = dout.clone()
    with torch.cuda.device_of(xz), torch.autocast(xz.device.type, enabled=False):
        scan = _Scan(xz, conv_weight, conv_bias, dt_proj_weight, dt_proj_bias, A_log, D, order)
        B, L, E, R, N = scan.B, scan.L, scan.E, scan.R, scan.N
        dprojected, y = dout, None
        if out_proj_weight is not None:
            dout = dprojected @ out_proj_weight
            y = torch.empty_like(dout)
        u = scan.convolve()
        du, ddelta = torch.empty_like(u), torch.empty_like(u)
        tensors = {"u": u, "proj": proj, "dout": dout, "out": dxz, "du": du, "ddelta": ddelta, "y": y}
        dproj = torch.empty_like(proj)
        dA, d_skip, d_dt_bias = _walk_back(scan, states, tensors, dproj[..., R:])
        ddelta, u, du, dproj = ddelta.view(2, -1, E), u.view(2, -1, E), du.view(2, -1, E), dproj.view(2, -1, R + 2 * N)
        torch.bmm(ddelta, dt_proj_weight.to(xz.dtype), out=dproj[..., :R])
        d_dt_weight = torch.bmm(ddelta.transpose(1, 2), proj.view(2, -1, R + 2 * N)[..., :R])
        d_x_weight = torch.bmm(dproj.transpose(1, 2), u)
        du.baddbmm_(dproj, x_proj_weight)
        K = scan.options["K"]
        runs = -(-L // RUN)
        dconv = scan.new(B, runs, 2, K + 1, E)
        for mode in scan.modes:
            grid = (-(-scan.conv_groups // CONV_THREADS), runs, B)
            scan.launch("conv_backward", grid, CONV_THREADS, numbers={"mode": mode}, du=du, out=dxz, dvec=dconv)
        dconv = dconv.sum(dim=(0, 1))
        gradients = [dconv[:, :K].transpose(1, 2), dconv[:, K], d_x_weight, d_dt_weight, d_dt_bias, dA, d_skip]
        parameters = [conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D]
        if y is not None:
            gradients.append(dprojected.flatten(0, 1).T @ y.flatten(0, 1))
            parameters.append(out_proj_weight)
    # The outputs of an operator may not share memory: what does is not contiguous here.
    return [dxz, *(g.contiguous().to(p.dtype) for g, p in zip(gradients, parameters, strict=True))]


def _walk_back(scan, states, tensors, dbc):
    """
    Writes `out`, `du`, `ddelta` and `y` of `tensors`, and into `dbc` (2, B, L, 2N) the gradients of B and C.

    Returns:
        in float32, the gradients of A_log, D and the bias of Δ.
    """
    B, L, E, N, io = scan.B, scan.L, scan.E, scan.N, scan.xz.dtype
    if scan.side_by_side:
        turns, places, adjoint = [-1], L, scan.chunk_adjoints(tensors["dout"], tensors["proj"])
        walks, numbers, span = scan.chunks, {}, scan.chunks
    else:
        span, places = scan.span, scan.span * scan.chunk
        walks, adjoint = -(-L // places), scan.new(*scan.state_shape(1))
        turns, numbers = range(walks), {"chunk": places, "chunks": walks}
    sub = scan.new(*scan.state_shape(-(-places // 8)))
    partial = scan.new(2, -(-E // 16), B, places, 2 * N, dtype=io if io == torch.bfloat16 else torch.float32)
    da, dvec = scan.new(*scan.state_shape(walks)), scan.new(2, B, walks, 2, E)
    tensors = {**tensors, "states": states, "sub": sub, "adjoint": adjoint, "dbc": partial, "da": da, "dvec": dvec}
    for mode in scan.modes:
        for turn in turns:
            scan.walk("states", (mode,), {"turn": turn, "span": span}, span, **tensors)
            scan.walk("backward", (mode,), {"turn": turn, **numbers}, walks if turn < 0 else 1, **tensors)
            for direction in (0, 1) if mode == 0 else (mode - 1,):
                first = places * (turn if direction and mode == 0 else walks - 1 - turn) if turn >= 0 else 0
                tokens = slice(first, min(first + places, L))
                found = partial[direction, :, :, : tokens.stop - first].sum(0).to(io)  # accumulates in float32
                if direction and scan.order is not None:
                    tokens = scan.tensors["order"][tokens]
                dbc[direction][:, tokens] = found
    # (block, group, g, q, row, column): channel = block * 16 + g * 2 + row, state = group * 8 + 2q + column
    dA = da.sum(dim=(1, 2)).view(2, -1, -(-N // 8), 8, 4, 2, 2).permute(0, 1, 3, 5, 2, 4, 6)
    dA = dA.reshape(2, -(-E // 16) * 16, -1)[:, :E, :N]
    return dA, dvec[..., 0, :].sum(dim=(1, 2)), dvec[..., 1, :].sum(dim=(1, 2))


@_backward_op.register_fake
def _(dout, xz, *rest):
    *parameters, _, _, _ = rest  # order, proj, states
    tensors = [xz, *(p for p in parameters if p is not None)]
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]


def _setup_context(ctx, inputs, output):
    *tensors, _ = inputs  # for_backward
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx, dout, dproj, dstates):
    *inputs, out_proj_weight, order, proj, states = ctx.saved_tensors
    gradients = _backward_op(dout, *inputs, out_proj_weight, order, proj, states)
    return *gradients, *([None] if out_proj_weight is None else []), None, None


_scan_op.register_autograd(_backward, setup_context=_setup_context)


def bidirectional_selective_scan(
    xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D, order=None, out_proj_weight=None
):
    """See `selective_scan.bidirectional_selective_scan`; the backward pass makes the input of `out_proj` again."""
    if A_log.is_complex():
        raise ValueError("The scan backend 'cuda' takes a real `A_log`, got a complex one")
    x_proj_weight = x_proj_weight.to(xz.dtype)
    if out_proj_weight is not None:
        out_proj_weight = out_proj_weight.to(xz.dtype)
    parameters = (conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)
    visits = None if order is None else order.visits
    return _scan_op(xz.contiguous(), *parameters, out_proj_weight, visits, torch.is_grad_enabled())[0]
