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
import math
import os

import torch

from .selective_scan_cuda_runtime import (
    DTYPES,
    KernelArguments,
    Launch,
    driver,
    no_gpu_reason,
    nobody_looks_on,
    nvrtc,
    source_constant,
)


TILE, RUN = source_constant("TILE"), source_constant("RUN")
CONV_THREADS, CONV_CHANNELS = source_constant("CONV_THREADS"), source_constant("CONV_CHANNELS")
SHORT_RUN, FEW_TOKENS = 13, 32768  # of so few tokens the convolution takes shorter runs, to have more threads
CONV_BACKWARD_THREADS = source_constant("CONV_BACKWARD_THREADS")
CONV_RUNS, CONV_STAGES, CONV_BACKWARD_BLOCKS = (
    source_constant(name, "convolution.cu") for name in ("RUNS", "STAGES", "CONV_BACKWARD_BLOCKS")
)
ELEMENTWISE_THREADS = 256

# Each copy of this code in a process (one travels with every Hub repository) has operators of its own.
_NAMESPACE = __package__.replace("modeling_videomamba", "videomamba").replace(".", "_")

# Whether the state before every 8 tokens and the convolution's output are kept for the backward pass: faster, for more
# memory.
KEEP_STATES = os.environ.get("VIDEOMAMBA_KEEP_STATES") == "1"
TURN_TOKENS = 131072  # about as many tokens the backward pass recomputes the states of at a time
JOINED_CHUNKS = 20  # so few chunks a scan passes states between by itself
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


# --------------------------------------------------------------------------------------------------------------------
# What shapes and types decide.
# --------------------------------------------------------------------------------------------------------------------


class ScanPlan:
    """
    How the length is cut, and how each kernel is compiled and launched.

    Args:
        device (`torch.device`), multiprocessors (`int`): the GPU.
        turn_tokens (`int`): see `TURN_TOKENS`.
        dtype (`torch.dtype`), shape (`torch.Size`): of `xz`, (B, L, 2E).
        aligned (`bool`): whether `xz` begins at a multiple of 16 bytes.
        ordered (`bool`): whether the backward direction follows another order than the full reversal.
        tf32 (`bool`): whether the tensor cores' precision is enough for float32.
        parameters: shape, type and device of the convolution's weight and bias, dt_proj's weight and bias, A_log, D.
    """

    def __init__(self, device, multiprocessors, turn_tokens, dtype, shape, aligned, ordered, tf32, parameters):
        self.device, self.multiprocessors, self.dtype, self.ordered = device, multiprocessors, dtype, ordered
        self.B, self.L, self.E = shape[0], shape[1], shape[2] // 2
        self.R, self.N, self.K = parameters[2][0][-1], parameters[4][0][-1], parameters[0][0][-1]
        self.tf32 = tf32 and dtype == torch.float32
        self.exact = dtype == torch.float32  # of the backward pass
        # A kernel does not look where its pointers lead.
        for (found, _, place), last in zip(parameters, ((self.K,), (), (self.R,), (), (self.N,), ()), strict=True):
            if found != (2, self.E, *last) or place != device:
                raise ValueError(
                    f"A parameter of the scan has the shape {tuple(found)} on {place}; with `xz` of the shape "
                    f"{tuple(shape)} on {device} it must be {(2, self.E, *last)} there."
                )
        types = {t for _, t, _ in parameters}
        self.parameter_dtype = types.pop() if len(types) == 1 and types <= {torch.float32, dtype} else torch.float32
        self.options = {
            "IO": DTYPES[dtype],
            "PT": DTYPES[self.parameter_dtype],
            "N": self.N,
            "R": self.R,
            "K": self.K,
            "CHANNELS": self.E,
            "VEC": int(self.E % 8 == 0 and aligned),
            "ORDERED": int(ordered),
            "WIDE": int(self.L * shape[2] * dtype.itemsize >= 2**32),
        }
        self.side_by_side, self.chunk, self.chunks, self.span = split_length(
            self.B, self.L, self.E, multiprocessors, turn_tokens
        )
        # What the backward pass walks over in one launch of a turn, and how many turns there are.
        self.places = self.L if self.side_by_side else self.span * self.chunk
        self.turns = 1 if self.side_by_side else -(-self.L // self.places)

    def launch(self, name, grid, threads, shared=0, options=None, **numbers):
        numbers = {"chunk": self.chunk, "chunks": self.chunks, "turn": -1, "span": 1, "mode": 0, "kept": 0, **numbers}
        return Launch(name, {**self.options, **(options or {})}, grid, threads, shared, self.device, numbers)

    def walk(self, name, side_by_side=1, joined=False, keep=False, **numbers):
        """Launch of a kernel whose warps walk over the sequence, or over chunks of it `side_by_side`."""
        tf32 = self.tf32 and name in ("scan", "ends")
        share = self.share(name, side_by_side, tf32)
        options, threads, shared = walk_settings(
            name,
            share,
            self.R,
            self.N,
            self.E,
            self.dtype,
            tf32,
            _shared_memory(self.device),
            widest_team(self.E, self.B * side_by_side, self.multiprocessors),
        )
        channels = 16 * options["BLOCKS"] * options["W"]  # of a thread block
        grid = (-(-self.E // channels), side_by_side, self.B)
        options |= {"TF32": int(tf32), "JOINED": int(joined), "KEEP": int(keep)}
        return self.launch(name, grid, threads, shared, options, **numbers)

    def share(self, name, side_by_side, tf32):
        """Blocks of 16 channels that a warp takes. Of many, it takes two, and shares more; but each of the GPU's
        schedulers wants about three warps, so that of few, two warps share one, with half of the states each."""
        warps, schedulers = _rows(self.B, self.E) * side_by_side, 4 * self.multiprocessors
        if name == "backward" or (self.dtype == torch.float32 and not tf32):
            return 1
        if warps >= 5 * schedulers and not tf32:
            return 2
        return 0.5 if name == "scan" and self.N == 16 and warps < 2 * schedulers else 1

    def elementwise(self, name):
        """Launch of a kernel with a thread for four channels of a token."""
        threads = self.B * self.L * -(-self.E // 4)
        return self.launch(name, (-(-threads // ELEMENTWISE_THREADS), 1, 1), ELEMENTWISE_THREADS)

    def state_shape(self, parts):
        return _state_shape(self.B, parts, self.E, self.N)

    @functools.cached_property
    def conv_groups(self):
        """Of channels: a thread of the convolution takes one."""
        return self.E // CONV_CHANNELS if self.options["VEC"] else self.E

    @functools.cached_property
    def conv(self):
        walks = 2 * self.conv_groups if self.ordered else self.conv_groups  # for each direction, or for both
        run = SHORT_RUN if self.B * self.L <= FEW_TOKENS else RUN
        grid = (-(-walks // CONV_THREADS), -(-self.L // run), self.B)
        return self.launch("conv", grid, CONV_THREADS, options={"RUN": run})

    @functools.cached_property
    def conv_takes_projection(self):
        """Whether the convolution's backward pass takes that of `x_proj` along, which is written for these alone."""
        width = self.R + 2 * self.N  # of which a warp keeps its part of the weight in registers
        aligned = self.options["VEC"] == 1 and width % 2 == 0
        return aligned and width <= 96 and self.K == 4 and not (self.exact or self.ordered)

    @functools.cached_property
    def conv_backward(self):
        """One launch, or along an order one for each direction."""
        if self.conv_takes_projection:
            groups = -(-self.E // (CONV_BACKWARD_THREADS // 2))
            places = run_places(self.L, groups * self.B, self.multiprocessors)
            grid = (groups, -(-self.L // (CONV_RUNS * places)), self.B)
            shared = conv_backward_bytes(self.R, self.N)
            return [self.launch("proj_conv_backward", grid, CONV_BACKWARD_THREADS, shared, chunk=places)]
        grid = (-(-self.conv_groups // CONV_THREADS), -(-self.L // RUN), self.B)
        modes = (1, 2) if self.ordered else (0,)
        return [self.launch("conv_backward", grid, CONV_THREADS, mode=mode) for mode in modes]

    @functools.cached_property
    def ends(self):
        return self.walk("ends", self.chunks)

    @functools.cached_property
    def adjoint(self):
        return self.walk("adjoint", self.chunks)

    @functools.cached_property
    def pass_states(self):
        """Launches for states and for adjoint states."""
        size = -(-self.E // 16) * -(-self.N // 8) * 128
        return [self.launch("pass_states", (-(-size // 128), self.B, 2), 128, mode=mode) for mode in (0, 1)]

    @functools.cached_property
    def whole(self):
        """How a walk goes that takes all chunks in one launch: side by side, or as one."""
        if self.side_by_side:
            return {"side_by_side": self.chunks}
        return {"chunk": self.chunk * self.chunks, "chunks": 1}

    @functools.cached_property
    def scan(self):
        """The forward scan, by what it keeps for the backward pass: see `_forward`."""
        joined = self.side_by_side and self.chunks <= JOINED_CHUNKS
        kept = 0 if self.side_by_side or self.chunks == 1 else self.chunk
        options = {"joined": joined}, {"kept": kept}, {"keep": True}
        return [self.walk("scan", **self.whole, **own) for own in options]

    @functools.cached_property
    def backward_of_kept(self):
        """The adjoint walk, if the scan kept all it starts from."""
        return self.walk("backward", **self.whole)

    @functools.cached_property
    def states(self):
        return self.walk("states", self.walked, span=self.walked)

    @functools.cached_property
    def walked(self):
        """Chunks of which the backward pass has the states at a time."""
        return self.chunks if self.side_by_side else self.span

    @functools.cached_property
    def backward(self):
        if self.side_by_side:
            return self.backward_of_kept
        return self.walk("backward", chunk=self.places, chunks=self.turns)

    @functools.cached_property
    def gate(self):
        return self.elementwise("gate")

    @functools.cached_property
    def ungate(self):
        return self.elementwise("ungate")

    @functools.cached_property
    def gate_backward(self):
        return self.elementwise("gate_backward")


_plan = functools.lru_cache(maxsize=256)(ScanPlan)


def _state_shape(batch, parts, channels, states):
    """States as the lanes hold them, see `fragment` in csrc/walk.cuh."""
    return 2, batch, parts, -(-channels // 16), -(-states // 8), 32, 4


def _rows(batch, channels):
    """Warps of a walk over whole sequences, if each takes 16 channels."""
    return 2 * batch * -(-channels // 16)


@functools.cache
def _multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _shared_memory(device):
    """Bytes of a multiprocessor."""
    if device.type != "cuda":
        return SHARED_OF_HOPPER
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin + 1024


def split_length(batch, length, channels, multiprocessors, turn_tokens):
    """
    How the length is cut. If there are few sequences and channels, its chunks are walked side by side, which costs a
    second walk. If there are many, the scan keeps its states at the borders of chunks, and the backward pass takes a
    few chunks at a time, the last first, to hold few states: these are recomputed side by side, and the adjoint state
    is passed on from turn to turn.

    Returns:
        whether the chunks of the scan are walked side by side, tokens in a chunk, chunks, chunks in a turn.
    """
    schedulers = 4 * multiprocessors
    rows = _rows(batch, channels)
    tiles = -(-length // TILE)
    side_by_side = rows < 1.2 * schedulers and tiles > 2
    if side_by_side:
        turns, span = 1, _chunks_side_by_side(rows, tiles, schedulers)
    else:
        turns = min(-(-batch * length // turn_tokens), tiles)
        span = max(1, min(4, -(-5 * schedulers // rows)))
    chunk = -(-tiles // (turns * span)) * TILE
    return side_by_side, chunk, -(-length // chunk), span


def _chunks_side_by_side(rows, tiles, schedulers):
    """
    Two warps for each scheduler, if there are as many tiles; up to twelve, in chunks of six tiles or more, and so many
    that rounds of two warps a scheduler are full: the last round runs alone.
    """
    few = 2 * schedulers // rows
    most = min(tiles // 6, int(12 * schedulers / rows))
    if most <= few:
        return min(few, -(-tiles // 2))

    def fullness(wanted):
        chunks = -(-tiles // -(-tiles // wanted))
        rounds = chunks * rows / (2 * schedulers)
        return rounds / math.ceil(rounds), wanted

    return max(range(few, most + 1), key=fullness)


def run_places(length, blocks, multiprocessors):
    """
    Places in a run of `proj_conv_backward`, of which a thread block has a few. It walks over three more at either end,
    four at a step: long runs waste little; short ones, if there are few sequences, fill the GPU.

    Args:
        length (`int`): tokens.
        blocks (`int`): thread blocks with the same places: those of all channels and sequences.
        multiprocessors (`int`): of the GPU.
    """
    shortest, longest = 26, 122
    filling = -(-CONV_BACKWARD_BLOCKS * multiprocessors // blocks)
    parts = max(-(-length // (CONV_RUNS * longest)), min(filling, -(-length // (CONV_RUNS * shortest))))
    return -(-(-(-length // (CONV_RUNS * parts)) + 6) // 4) * 4 - 6


# (kernel, blocks of 16 channels a warp): (warps a direction in a thread block, thread blocks on a multiprocessor);
# measured on an H200 and an H100
WALKS = {
    ("scan", 0.5): (1, 4),
    ("scan", 1): (1, 8),
    ("scan", 2): (1, 7),
    ("states", 1): (2, 4),
    ("states", 2): (2, 3),
    ("ends", 1): (2, 4),
    ("ends", 2): (1, 7),
    ("adjoint", 1): (2, 4),
    ("adjoint", 2): (1, 7),
    ("backward", 1): (6, 1),
}
SHARED_OF_HOPPER = 233_472  # bytes of a multiprocessor; a thread block takes 1,024 more than it asks for


TEAMS = 6, 3, 2, 1  # warps a direction in a thread block of the adjoint walk


def widest_team(channels, walks, multiprocessors):
    """
    Warps that may share a thread block of the adjoint walk: as many as can be, if that fills the GPU; else as many as
    leave the fewest on the busiest multiprocessor, but not one alone, whose sums over few channels cost more.

    Args:
        channels (`int`): E.
        walks (`int`): sequences, or chunks of them side by side.
        multiprocessors (`int`): of the GPU.
    """

    def blocks(warps):
        return -(-channels // (16 * warps)) * walks

    if blocks(TEAMS[0]) > multiprocessors:
        return TEAMS[0]
    return min(TEAMS[:-1], key=lambda warps: -(-blocks(warps) // multiprocessors) * warps)


def walk_settings(
    kernel, share, rank, states, channels, dtype, tf32=False, capacity=SHARED_OF_HOPPER, widest=TEAMS[0]
):
    """
    How a walk is compiled and launched.

    Args:
        kernel (`str`), share (`float`): a key of `WALKS`; 0.5 are two warps for one block of 16 channels.
        rank, states, channels (`int`): R, N and E.
        dtype (`torch.dtype`): of the activations.
        tf32 (`bool`): whether float32 may be multiplied on the tensor cores.
        capacity (`int`): bytes of shared memory of a multiprocessor.
        widest (`int`): see `widest_team`.

    Returns:
        its options (`dict`), threads of a block, bytes of shared memory of a block.
    """
    blocks, split = max(share, 1), int(share < 1)
    # What the settings promise does not hold for float32 and many states, which want more registers.
    plain = dtype == torch.float32 or states > 16
    warps, resident = (1, 1) if plain else WALKS[kernel, share]
    shared = shared_bytes(kernel, blocks, split, rank, states, dtype, tf32)
    options = {"BLOCKS": blocks, "W": warps, "MINBLOCKS": resident, "SPLIT": split}
    size = shared * 2 * warps
    if kernel == "backward":
        team, size = team_settings(warps * resident, shared, rank, states, channels, dtype, capacity, widest)
        options |= team
    return options, 64 * options["W"] << split, size


def team_settings(most, shared, rank, states, channels, dtype, capacity, widest):
    """
    Of the adjoint walk, how many warps a direction make a thread block: they add up their gradients. As many as can be
    are on a multiprocessor, then in as few blocks as can be.

    Args:
        most (`int`): warps a direction that its registers take.
        shared (`int`): bytes of shared memory of a warp.
        rank, states, channels, dtype, capacity, widest: see `walk_settings`.

    Returns:
        options (`dict`), bytes of shared memory of a block.
    """

    def filling(warps, buffers):
        """Of warps that have channels, how many a multiprocessor takes; bytes of a block; blocks there."""
        size = 2 * warps * shared + 2 * team_bytes(warps, buffers, rank, states, dtype)
        resident = max(1, min(most // warps, capacity // (size + 1024)))
        groups = -(-channels // 16)
        return resident * warps * groups / (-(-groups // warps) * warps), size, resident

    choices = [(w, buffers) for w in TEAMS if w <= min(most, widest) for buffers in (2, 1)]
    choices = [c for c in choices if filling(*c)[1] + 1024 <= capacity] or choices[-1:]
    warps, buffers = max(choices, key=lambda choice: filling(*choice)[0])
    _, size, resident = filling(warps, buffers)
    return {"W": warps, "MINBLOCKS": resident, "BUFFERS": buffers}, size


def projection_bytes(rank, states, dtype):
    """Shared memory of a tile of the projection: `PROJ_TILE`."""
    return -(-TILE * (rank + 2 * states) * dtype.itemsize // 16) * 16


def shared_bytes(kernel, blocks, split, rank, states, dtype, tf32=False):
    """Shared memory of a warp, or of the two of a split one: `FORWARD_SHARED` and `BACKWARD_SHARED` of csrc/."""
    size, exact = dtype.itemsize, dtype == torch.float32 and not tf32
    if exact:
        step_size = 16 * blocks * (-(-rank // 4) * 4 + 4) * 4
    else:
        step_size = -(-2 * blocks * -(-rank // 8) // 4) * 512 + 128 * blocks
    tile = TILE * size * (16 * blocks + 16 * (blocks > 1))
    if kernel == "backward":
        group = -(-states // 8) * 128
        sums = 4 * group if exact else -(-rank // 8) * 512
        return 7 * tile + 5 * TILE * 20 * 4 + group * size + 1536 + step_size + sums
    steps = TILE * (16 * blocks + 4) * 4  # Δ, and the outputs of each half
    tiles = 2 * projection_bytes(rank, states, dtype) + (4 if kernel == "scan" else 2) * tile
    return tiles + (3 if split else 1) * steps + step_size


def team_bytes(warps, buffers, rank, states, dtype):
    """Shared memory of the `warps` of a direction of the adjoint walk: `BACKWARD_TEAM_SHARED`."""
    sums = 0 if dtype == torch.float32 else buffers * warps * (-(-states // 8) * 512 + 512)
    return 2 * projection_bytes(rank, states, dtype) + sums


def conv_backward_bytes(rank, states):
    """Shared memory of a block of `proj_conv_backward`: `CONV_BACKWARD_SHARED`."""
    projection = (4 * -(-(rank + 2 * states) // 8) + 15) // 32 * 64 + 32  # values of a row
    channels = CONV_BACKWARD_THREADS // 2
    return CONV_STAGES * CONV_RUNS * (3 * (4 * channels + 16) + 2 * (4 * projection + 16)) * 2


# --------------------------------------------------------------------------------------------------------------------
# A call.
# --------------------------------------------------------------------------------------------------------------------


class _Call:
    """A plan, and the kernels' arguments: those of all kernels from the start, others as they become known."""

    def __init__(self, xz, conv_weight, conv_bias, dt_weight, dt_bias, A_log, D, visits, structure):
        parameters = (conv_weight, conv_bias, dt_weight, dt_bias, A_log, D)
        device, dtype, shape = xz.device, xz.dtype, xz.shape
        start = xz.data_ptr()
        described = tuple((p.shape, p.dtype, p.device) for p in parameters)
        tf32 = dtype == torch.float32 and _tf32_is_allowed()
        self.plan = plan = _plan(
            device,
            _multiprocessors(device),
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
            f"GiB beside its input, and {free / 2**30:.1f} GiB are free on {plan.device}. Take fewer or shorter clips "
            "at a time, bfloat16, or, in training, gradient checkpointing."
        )


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
    side_by_side, _, chunks, _ = split_length(batch, length, channels, _multiprocessors(xz.device), TURN_TOKENS)
    parts = chunks if side_by_side or chunks > 1 else 0
    parts = (0, parts, -(-length // 8))[for_backward]
    states = _state_shape(batch, parts, channels, A_log.shape[2]) if parts else (0,)
    return (
        xz.new_empty(batch, length, outputs),
        xz.new_empty(2, batch, length, x_proj_weight.shape[1]),
        xz.new_empty(states, dtype=xz.dtype if for_backward == 2 else torch.float32),
        xz.new_empty((2, batch, length, channels) if for_backward == 2 and visits is None else 0),
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
