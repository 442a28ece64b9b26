"""
How the GPU backend launches its kernels: what shapes and types decide, worked out once and kept (`scan_plan`).

How the length is cut, how many channels a warp takes, how each kernel is compiled, its grid and its shared memory.
"""

import functools
import math

import torch

from .selective_scan_cuda_runtime import BLOCK_OVERHEAD, DTYPES, Launch, check_shared_memory, source_constant


TILE, RUN = source_constant("TILE"), source_constant("RUN")
CONV_THREADS, CONV_CHANNELS = source_constant("CONV_THREADS"), source_constant("CONV_CHANNELS")
SHORT_RUN, FEW_TOKENS = 13, 32768  # of so few tokens the convolution takes shorter runs, to have more threads
CONV_BACKWARD_THREADS = source_constant("CONV_BACKWARD_THREADS")
CONV_RUNS, CONV_STAGES, CONV_BACKWARD_BLOCKS = (
    source_constant(name, "convolution.cu") for name in ("RUNS", "STAGES", "CONV_BACKWARD_BLOCKS")
)
WHOLE_PART = source_constant("WHOLE_PART")
ELEMENTWISE_THREADS = 256
ELEMENTWISE = "gate", "ungate", "gate_backward"  # a thread for four channels of a token
JOINED_CHUNKS = 20  # so few chunks a scan passes states between by itself


class ScanPlan:
    """
    How the length is cut, and how each kernel is compiled and launched.

    Args:
        device (`torch.device`), multiprocessors (`int`): the GPU.
        turn_tokens (`int`): about as many tokens the backward pass recomputes the states of at a time.
        dtype (`torch.dtype`), shape (`torch.Size`): of `xz`, (B, L, 2E).
        aligned (`bool`): whether `xz` begins at a multiple of 16 bytes.
        ordered (`bool`): whether the backward direction follows another order than the full reversal.
        tf32 (`bool`): whether the tensor cores' precision is enough for float32.
        stateful (`bool`): whether the directions begin with a state.
        parameters: shape, type and device of the convolution's weight and bias, dt_proj's weight and bias, A_log, D.
        options (`tuple[tuple[str, int]]`): further macros that all kernels are compiled with.
    """

    def __init__(
        self, device, multiprocessors, turn_tokens, dtype, shape, aligned, ordered, tf32, stateful, parameters,
        options=(),
    ):  # fmt: skip
        self.device, self.multiprocessors, self.dtype, self.ordered = device, multiprocessors, dtype, ordered
        self.B, self.L, self.E = shape[0], shape[1], shape[2] // 2
        self.R, self.N, self.K = parameters[2][0][-1], parameters[4][0][-1], parameters[0][0][-1]
        self.stateful, self.gated = stateful, self.R > 0  # without a rank, it is the scan alone
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
            **dict(options),
        }
        self.side_by_side, self.chunk, self.chunks, self.span = split_length(
            self.B, self.L, self.E, multiprocessors, turn_tokens
        )
        # What the backward pass walks over in one launch of a turn, and how many turns there are.
        self.places = self.L if self.side_by_side else self.span * self.chunk
        self.turns = 1 if self.side_by_side else -(-self.L // self.places)

    def launch(self, name, grid, threads, shared=0, options=None, **numbers):
        numbers = {"chunk": self.chunk, "chunks": self.chunks, "turn": -1, "span": 1, "mode": 0, "kept": 0, **numbers}
        options = {**self.options, **(options or {})}
        if self.stateful and name not in ELEMENTWISE:
            options["STATEFUL"] = 1
        check_shared_memory(name, shared, shared_memory_of(self.device))
        return Launch(name, options, grid, threads, shared, self.device, numbers)

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
            shared_memory_of(self.device),
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

    @functools.cached_property
    def kept_states(self):
        """How many states at the borders of chunks the forward pass keeps for the backward pass."""
        return kept_states(self.side_by_side, self.chunks, self.stateful)

    def state_shape(self, parts):
        return state_shape(self.B, parts, self.E, self.N)

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
    def part(self):
        """
        Launches for what a part of a sequence ends with from zero, if other parts are elsewhere: those of its chunks,
        and what follows from these; then the same of adjoint states.
        """
        numbers = {} if self.side_by_side else self.whole
        return [
            (
                self.walk(name, mode=WHOLE_PART, **self.whole),
                self.pass_states[adjoint].at(mode=adjoint | WHOLE_PART, **numbers),
            )
            for adjoint, name in enumerate(("ends", "adjoint"))
        ]

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
        kept = 0 if self.side_by_side or not self.kept_states else self.chunk
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


scan_plan = functools.lru_cache(maxsize=256)(ScanPlan)


def state_shape(batch, parts, channels, states):
    """States as the lanes hold them, see `fragment` in csrc/walk.cuh."""
    return 2, batch, parts, -(-channels // 16), -(-states // 8), 32, 4


def kept_states(side_by_side, chunks, stateful):
    """States at the borders of chunks; of one chunk, the first is not zero if the directions begin with a state."""
    return chunks if side_by_side or chunks > 1 or stateful else 0


def _rows(batch, channels):
    """Warps of a walk over whole sequences, if each takes 16 channels."""
    return 2 * batch * -(-channels // 16)


@functools.cache
def shared_memory_of(device):
    """Bytes of a multiprocessor."""
    if device.type != "cuda":
        return SHARED_OF_HOPPER
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin + BLOCK_OVERHEAD


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
SHARED_OF_HOPPER = 233_472  # bytes of a multiprocessor


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
    if share > 1 and 2 * shared_bytes(kernel, share, 0, rank, states, dtype, tf32) + BLOCK_OVERHEAD > capacity:
        share = 1
    blocks, split = max(share, 1), int(share < 1)
    # What the settings promise does not hold for float32 and many states, which want more registers.
    plain = dtype == torch.float32 or states > 16
    warps, resident = (1, 1) if plain else WALKS[kernel, share]
    shared = shared_bytes(kernel, blocks, split, rank, states, dtype, tf32)
    if kernel != "backward" and 2 * warps * shared + BLOCK_OVERHEAD > capacity:
        warps = 1  # of many states or a high rank, one warp a direction may fit where two do not
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
        resident = max(1, min(most // warps, capacity // (size + BLOCK_OVERHEAD)))
        groups = -(-channels // 16)
        return resident * warps * groups / (-(-groups // warps) * warps), size, resident

    choices = [(w, buffers) for w in TEAMS if w <= min(most, widest) for buffers in (2, 1)]
    choices = [c for c in choices if filling(*c)[1] + BLOCK_OVERHEAD <= capacity] or choices[-1:]
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
    # Without a rank, what is given for Δ comes through shared memory: of the scan, in the place of the gate's tiles.
    tiles = 2 * projection_bytes(rank, states, dtype) + (4 if kernel == "scan" or rank == 0 else 2) * tile
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
