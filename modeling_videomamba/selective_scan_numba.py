"""The scan on a CPU, compiled by Numba on the user's machine: no compiler to install, and nothing to build beforehand.

Work is cut into units that never share a sum: one clip's block of `BLOCK` channels, walked token by token in the order
of visits, with its states (N, BLOCK) in the first-level cache. The innermost loops run over the block's channels, a
number known at compile time, so LLVM turns them into vector instructions; a call of the C library's `exp` would stop
it, hence the polynomials. Convolution, SiLU, softplus, skip term and gate are inside; the two thin projections are
PyTorch's. The backward pass walks chunks of `CHUNK` tokens from the last to the first, and recomputes the states of a
chunk from the one that the forward pass left at its border.

The kernels release the GIL and a few Python threads take units as they come. Numba's own parallel loops would not do:
its thread pools abort after a fork, or when two Python threads use them at once. Since the cut into units does not
depend on the number of threads, neither do the results.
"""

import functools
import itertools
import math
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from transformers.utils import logging


try:
    from llvmlite import ir
    from numba import njit, types
    from numba.extending import intrinsic, overload

    IMPORT_ERROR = None
except ImportError as error:
    IMPORT_ERROR = error

logger = logging.get_logger(__name__)

BLOCK = 64  # channels of a unit
CHUNK = 32  # tokens between two kept states
ROWS = 64  # tokens of a unit of the convolution
WORKSPACE = 2**26  # bytes


def unusable_reason(device, dtype):
    """Why this backend cannot run on `device` with activations of `dtype`, or None."""
    if device.type != "cpu":
        return "it runs on the CPU only"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, not {dtype}"
    if IMPORT_ERROR is not None:
        return f"Numba cannot be imported ({IMPORT_ERROR}); `pip install numba` may mend that"
    return None


def bidirectional_selective_scan(
    xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D, order=None
):
    """See `selective_scan.bidirectional_selective_scan`."""
    parameters = (conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)
    if order is None:
        order = torch.arange(xz.shape[1] - 1, -1, -1)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (xz, *parameters))
    return _mixer(xz, *parameters, order, keep)[0]


# --------------------------------------------------------------------------------------------------------------------
# Functions of one number, inlined into the kernels. Errors are relative and below 4e-7.
# --------------------------------------------------------------------------------------------------------------------

LOG2E = np.float32(1.4426950408889634)
LN2 = np.float32(0.6931471805599453)
ROUNDER = np.float32(1.5 * 2**23)  # adding it rounds a float32 to an integer, which then stands in the low bits


def _compiled(*fastmath, **options):
    """Compile a function at its first call, without Python's checks; nothing at all if Numba is missing."""

    def decorate(function):
        if IMPORT_ERROR is not None:
            return function
        return njit(fastmath=set(fastmath), error_model="numpy", **options)(function)

    return decorate


def _kernel(function):
    """Compile a kernel, and keep the result on disk: beside this file, or else in the user's cache directory."""
    try:
        return _compiled("contract", nogil=True, cache=True)(function)
    except RuntimeError:  # nowhere to write
        return _compiled("contract", nogil=True)(function)


if IMPORT_ERROR is None:

    @intrinsic
    def _bits(context, x):
        return types.int32(types.float32), lambda _, builder, sig, args: builder.bitcast(args[0], ir.IntType(32))

    @intrinsic
    def _from_bits(context, x):
        return types.float32(types.int32), lambda _, builder, sig, args: builder.bitcast(args[0], ir.FloatType())

    @intrinsic
    def _hot(context):
        """Have LLVM compile the calling function by itself, so that its loops have all registers, and for 512-bit
        vectors if the CPU has them; of its own accord it stays with 256."""

        def generate(context, builder, signature, args):
            builder.function.attributes.add("noinline")
            # llvmlite does not know this one and would refuse it; `set.add` passes by its check.
            set.add(builder.function.attributes, '"prefer-vector-width"="512"')
            return context.get_dummy_value()

        return types.void(), generate

    def _to_float(x):
        """A float32 as it is, or the bits of a bfloat16 as a float32."""

    def _to_type_of(x, row):
        """A float32 as it is, or as the bits of the nearest bfloat16 if `row` holds such bits."""

    @overload(_to_float)
    def _(x):
        if x == types.uint16:
            return lambda x: _from_bits(np.int32(np.int32(x) << np.int32(16)))
        return lambda x: x

    @overload(_to_type_of)
    def _(x, row):
        if row.dtype == types.uint16:

            def to_bfloat16(x, row):
                bits = np.uint32(_bits(x))
                to_even = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
                return np.uint16((bits + to_even) >> np.uint32(16))

            return to_bfloat16
        return lambda x, row: x


@_compiled("contract")
def _exp2(x):
    """2 to the power of x, for x up to 127; what would fall below 2**-126 becomes that. NaN stays NaN."""
    x = np.float32(-126) if x < np.float32(-126) else x
    rounded = x + ROUNDER
    f = x - (rounded - ROUNDER)
    # Minimax on [-1/2, 1/2], and exactly 1 at 0, where the decays of small steps are.
    p = np.float32(0.0013264727) * f + np.float32(0.009671513)
    p = p * f + np.float32(0.055507336)
    p = p * f + np.float32(0.24022242)
    p = p * f + np.float32(0.693147)
    p = p * f + np.float32(1)
    return _from_bits(np.int32(_bits(p) + np.int32(_bits(rounded) << np.int32(23))))


@_compiled("contract")
def _softplus(x):
    """log(1 + exp(x))."""
    e = _exp2(-abs(x) * LOG2E)
    # log(1 + e) / e, minimax on [0, 1].
    p = np.float32(0.005364821) * e - np.float32(0.030065781)
    p = p * e + np.float32(0.07920452)
    p = p * e - np.float32(0.13753802)
    p = p * e + np.float32(0.19153655)
    p = p * e - np.float32(0.24857163)
    p = p * e + np.float32(0.33321324)
    p = p * e - np.float32(0.49999648)
    p = p * e + np.float32(1)
    return (x if x > np.float32(0) else np.float32(0)) + p * e


@_compiled("contract")
def _sigmoid(x):
    x = x * -LOG2E
    return np.float32(1) / (np.float32(1) + _exp2(np.float32(126) if x > np.float32(126) else x))


# --------------------------------------------------------------------------------------------------------------------
# Walks through one chunk of at most CHUNK tokens with one block of channels: where nearly all the time goes.
# Arrays (rows, BLOCK) are aligned, and a channel beyond the last is a column of zeros.
#   step_size, step_input (CHUNK, BLOCK)    Δ and Δ u
#   A (N, BLOCK)                            times log2(e)
#   BC (CHUNK, 2N)                          B, then C
#   y (CHUNK, BLOCK)                        C h is added to it
# --------------------------------------------------------------------------------------------------------------------


@_compiled("contract")
def _walk(steps, step_size, step_input, A, BC, state, y):
    """Advance `state` (N, BLOCK), in place."""
    _hot()
    num_states = A.shape[0]
    for k in range(steps):
        size_k, input_k, y_k = step_size[k], step_input[k], y[k]
        for n in range(num_states):
            b, b_out = BC[k, n], BC[k, num_states + n]
            A_n, state_n = A[n], state[n]
            for c in range(BLOCK):
                h = _exp2(size_k[c] * A_n[c]) * state_n[c] + input_k[c] * b
                state_n[c] = h
                y_k[c] += h * b_out


@_compiled("contract")
def _walk_again(steps, step_size, step_input, A, BC, states, decay, y):
    """The same, keeping all: row k N + n of `states` is the state before step k, that of `decay` is exp(Δ_k A)."""
    _hot()
    num_states = A.shape[0]
    for k in range(steps):
        size_k, input_k, y_k = step_size[k], step_input[k], y[k]
        for n in range(num_states):
            b, b_out = BC[k, n], BC[k, num_states + n]
            A_n, decay_n = A[n], decay[k * num_states + n]
            before, after = states[k * num_states + n], states[(k + 1) * num_states + n]
            for c in range(BLOCK):
                a = _exp2(size_k[c] * A_n[c])
                h = a * before[c] + input_k[c] * b
                decay_n[c] = a
                after[c] = h
                y_k[c] += h * b_out


# Reassociation, for the sums over channels to run in vectors.
@_compiled("contract", "reassoc")
def _walk_back(steps, step_size, step_input, A, BC, states, decay, grad_y, adjoint, d_A, d_size, d_input, d_BC):
    """
    From the last step to the first, through what `_walk_again` kept. λ = adjoint + C ∂y is the gradient of a state.

    Updates `adjoint` (N, BLOCK), adds to d_A (N, BLOCK), d_size and d_input (CHUNK, BLOCK), sets d_BC (CHUNK, 2N).
    """
    _hot()
    num_states = A.shape[0]
    for k in range(steps - 1, -1, -1):
        size_k, input_k, grad_k, d_size_k, d_input_k = step_size[k], step_input[k], grad_y[k], d_size[k], d_input[k]
        for n in range(num_states):
            b, b_out = BC[k, n], BC[k, num_states + n]
            A_n, adjoint_n, d_A_n, decay_n = A[n], adjoint[n], d_A[n], decay[k * num_states + n]
            before, after = states[k * num_states + n], states[(k + 1) * num_states + n]
            d_b, d_b_out = np.float32(0), np.float32(0)
            for c in range(BLOCK):
                grad_state = adjoint_n[c] + grad_k[c] * b_out
                d_b_out += grad_k[c] * after[c]
                d_b += grad_state * input_k[c]
                d_input_k[c] += grad_state * b
                passed_on = grad_state * decay_n[c]
                adjoint_n[c] = passed_on
                grad_log_decay = passed_on * before[c]
                d_size_k[c] += grad_log_decay * A_n[c]
                d_A_n[c] += grad_log_decay * size_k[c]
            d_BC[k, n], d_BC[k, num_states + n] = d_b, d_b_out


@_compiled()
def _zeros(rows):
    """(rows, BLOCK) zeros that start on a cache line."""
    memory = np.zeros(rows * BLOCK + 16, np.float32)
    start = -(memory.ctypes.data // 4) % 16
    return memory[start : start + rows * BLOCK].reshape((rows, BLOCK))


@_compiled()
def _fill(row, value):
    for c in range(row.size):
        row[c] = value


@_compiled()
def _copy(source, target):
    """As many numbers as the shorter of two rows holds."""
    for c in range(min(source.size, target.size)):
        target[c] = source[c]


# --------------------------------------------------------------------------------------------------------------------
# Kernels. Each call does one unit. xz (B, L, 2E) and what else has the activations' type is float32, or uint16 with
# the bits of bfloat16; `visits` (2, L) lists the tokens in the order in which each direction visits them.
# --------------------------------------------------------------------------------------------------------------------


@_kernel
def _convolve(unit, xz, weight, bias, visits, u):
    """u (2, B, L, E) = SiLU(causal convolution of x) in `ROWS` steps of a direction; weight (2, K, E), bias (2, E)."""
    _hot()
    _, batch, length, channels = u.shape
    taps = weight.shape[1]
    tiles = (length + ROWS - 1) // ROWS
    direction, clip, tile = unit // tiles // batch, unit // tiles % batch, unit % tiles
    total = np.empty(channels, np.float32)
    for step in range(tile * ROWS, min((tile + 1) * ROWS, length)):
        _copy(bias[direction], total)
        for tap in range(max(0, taps - 1 - step), taps):
            x = xz[clip, visits[direction, step - (taps - 1) + tap]]
            w = weight[direction, tap]
            for c in range(channels):
                total[c] += w[c] * _to_float(x[c])
        row = u[direction, clip, visits[direction, step]]
        for c in range(channels):
            row[c] = _to_type_of(total[c] * _sigmoid(total[c]), row)


@_kernel
def _scan(unit, xz, u, delta, BC, A, D, delta_bias, visits, out, states):
    """
    Both directions of a block of channels, and their gated mean.

    u (2, B, L, E), delta (2, B, L, E) before bias and softplus, BC (2, B, L, 2N), A (2, N, E) times log2(e), D and
    delta_bias (2, E). Writes out (B, L, E), and into `states` (B, 2, ceil(L / CHUNK), N, E) the state that each chunk
    starts from, unless it has no chunks. Spoils delta[0], which holds the forward direction's y for a while.
    """
    _hot()
    _, batch, length, channels = u.shape
    num_states = A.shape[1]
    blocks = (channels + BLOCK - 1) // BLOCK
    clip, first = unit // blocks, unit % blocks * BLOCK
    last = min(first + BLOCK, channels)
    A_block, state = _zeros(num_states), _zeros(num_states)
    step_size, step_input, y = _zeros(CHUNK), _zeros(CHUNK), _zeros(CHUNK)
    BC_chunk = np.empty((CHUNK, 2 * num_states), np.float32)
    for direction in range(2):
        D_block, bias_block = D[direction, first:last], delta_bias[direction, first:last]
        for n in range(num_states):
            _copy(A[direction, n, first:last], A_block[n])
            _fill(state[n], 0)
        for start in range(0, length, CHUNK):
            steps = min(CHUNK, length - start)
            if states.shape[2] > 0:
                for n in range(num_states):
                    _copy(state[n], states[clip, direction, start // CHUNK, n, first:last])
            for k in range(steps):
                token = visits[direction, start + k]
                _copy(BC[direction, clip, token], BC_chunk[k])
                u_k, delta_k = u[direction, clip, token, first:last], delta[direction, clip, token, first:last]
                size_k, input_k, y_k = step_size[k], step_input[k], y[k]
                for c in range(last - first):
                    size_k[c] = _softplus(delta_k[c] + bias_block[c])
                    input_k[c] = size_k[c] * _to_float(u_k[c])
                    y_k[c] = D_block[c] * _to_float(u_k[c])
            _walk(steps, step_size, step_input, A_block, BC_chunk, state, y)
            for k in range(steps):
                token = visits[direction, start + k]
                y_k, y_forward = y[k], delta[0, clip, token, first:last]
                if direction == 0:
                    _copy(y_k, y_forward)
                    continue
                z, row = xz[clip, token, channels + first : channels + last], out[clip, token, first:last]
                for c in range(last - first):
                    gate = _to_float(z[c])
                    gate *= np.float32(0.5) * _sigmoid(gate)
                    row[c] = _to_type_of((y_forward[c] + y_k[c]) * gate, row)


@_kernel
def _scan_backward(unit, xz, grad, u, delta, BC, A, D, delta_bias, visits, states, d_xz, d_u, d_delta, d_BC, d_params):
    """
    Gradients of `_scan`, whose arguments it takes and spoils, given `grad`, that of `out`.

    Writes the half of d_xz (B, L, 2E) that is the gate's; d_u and d_delta (2, B, L, E); and partial sums: d_BC
    (blocks, 2, B, L, 2N) of this block of channels, d_params (B, 2, N + 2, E) of this clip: A's, D's, delta_bias'.
    """
    _hot()
    _, batch, length, channels = u.shape
    num_states = A.shape[1]
    blocks = (channels + BLOCK - 1) // BLOCK
    clip, block = unit // blocks, unit % blocks
    first = block * BLOCK
    last = min(first + BLOCK, channels)
    A_block, adjoint, sums = _zeros(num_states), _zeros(num_states), _zeros(num_states + 2)
    kept, decay = _zeros((CHUNK + 1) * num_states), _zeros(CHUNK * num_states)
    u_rows, step_size, step_input, y = _zeros(CHUNK), _zeros(CHUNK), _zeros(CHUNK), _zeros(CHUNK)
    grad_y, d_size, d_input = _zeros(CHUNK), _zeros(CHUNK), _zeros(CHUNK)
    BC_chunk = np.empty((CHUNK, 2 * num_states), np.float32)
    d_BC_chunk = np.empty_like(BC_chunk)
    for direction in range(2):
        D_block, bias_block = D[direction, first:last], delta_bias[direction, first:last]
        d_D, d_bias = sums[num_states], sums[num_states + 1]
        for n in range(num_states + 2):
            _fill(sums[n], 0)
        for n in range(num_states):
            _copy(A[direction, n, first:last], A_block[n])
            _fill(adjoint[n], 0)
        for chunk in range((length - 1) // CHUNK, -1, -1):
            start = chunk * CHUNK
            steps = min(CHUNK, length - start)
            for n in range(num_states):
                _copy(states[clip, direction, chunk, n, first:last], kept[n])
            for k in range(steps):
                token = visits[direction, start + k]
                _copy(BC[direction, clip, token], BC_chunk[k])
                u_k, delta_k = u[direction, clip, token, first:last], delta[direction, clip, token, first:last]
                z, grad_k = xz[clip, token, channels + first : channels + last], grad[clip, token, first:last]
                u_row, size_k, input_k, y_k, grad_y_k = u_rows[k], step_size[k], step_input[k], y[k], grad_y[k]
                for c in range(last - first):
                    u_row[c] = _to_float(u_k[c])
                    size_k[c] = _softplus(delta_k[c] + bias_block[c])
                    input_k[c] = size_k[c] * u_row[c]
                    y_k[c] = D_block[c] * u_row[c]
                    gate = _to_float(z[c])
                    grad_y_k[c] = _to_float(grad_k[c]) * np.float32(0.5) * gate * _sigmoid(gate)
                _fill(d_size[k], 0)
                _fill(d_input[k], 0)
            _walk_again(steps, step_size, step_input, A_block, BC_chunk, kept, decay, y)
            _walk_back(
                steps, step_size, step_input, A_block, BC_chunk, kept, decay, grad_y, adjoint, sums, d_size, d_input,
                d_BC_chunk,
            )  # fmt: skip
            for k in range(steps):
                token = visits[direction, start + k]
                _copy(d_BC_chunk[k], d_BC[block, direction, clip, token])
                delta_k = delta[direction, clip, token, first:last]
                d_u_k, d_delta_k = d_u[direction, clip, token, first:last], d_delta[direction, clip, token, first:last]
                u_row, size_k, grad_y_k = u_rows[k], step_size[k], grad_y[k]
                d_size_k, d_input_k = d_size[k], d_input[k]
                for c in range(last - first):
                    d_u_k[c] = d_input_k[c] * size_k[c] + grad_y_k[c] * D_block[c]
                    slope = _sigmoid(delta_k[c] + bias_block[c])
                    d_delta_k[c] = (d_size_k[c] * LN2 + d_input_k[c] * u_row[c]) * slope
                    d_D[c] += grad_y_k[c] * u_row[c]
                    d_bias[c] += d_delta_k[c]
                y_k, y_forward = y[k], delta[0, clip, token, first:last]
                if direction == 0:
                    _copy(y_k, y_forward)
                    continue
                z = xz[clip, token, channels + first : channels + last]
                d_z = d_xz[clip, token, channels + first : channels + last]
                grad_k = grad[clip, token, first:last]
                for c in range(last - first):
                    gate = _to_float(z[c])
                    sigmoid = _sigmoid(gate)
                    slope = np.float32(0.5) * sigmoid * (np.float32(1) + gate * (np.float32(1) - sigmoid))
                    d_z[c] = _to_type_of(_to_float(grad_k[c]) * (y_forward[c] + y_k[c]) * slope, d_z)
        for n in range(num_states + 2):
            _copy(sums[n], d_params[clip, direction, n, first:last])


@_kernel
def _convolve_backward(unit, xz, weight, bias, visits, d_u, d_xz, d_params):
    """
    Gradients of `_convolve`, whose arguments it takes, for a block of channels of a clip, given d_u (2, B, L, E).

    Writes the half of d_xz (B, L, 2E) that is x's, and d_params (B, 2, K + 1, E) of this clip: the taps', the bias'.
    """
    _hot()
    _, batch, length, channels = d_u.shape
    taps = weight.shape[1]
    blocks = (channels + BLOCK - 1) // BLOCK
    clip, first = unit // blocks, unit % blocks * BLOCK
    last = min(first + BLOCK, channels)
    d_x, sums, weights, inputs, total = _zeros(length), _zeros(taps + 1), _zeros(taps + 1), _zeros(taps), _zeros(1)[0]
    for direction in range(2):
        for tap in range(taps):
            _copy(weight[direction, tap, first:last], weights[tap])
        _copy(bias[direction, first:last], weights[taps])
        for tap in range(taps + 1):
            _fill(sums[tap], 0)
        for step in range(length):
            skipped = max(0, taps - 1 - step)
            _copy(weights[taps], total)
            for tap in range(skipped, taps):
                x = xz[clip, visits[direction, step - (taps - 1) + tap], first:last]
                x_tap, w = inputs[tap], weights[tap]
                for c in range(last - first):
                    x_tap[c] = _to_float(x[c])
                    total[c] += w[c] * x_tap[c]
            d_u_k, d_bias = d_u[direction, clip, visits[direction, step], first:last], sums[taps]
            for c in range(last - first):
                sigmoid = _sigmoid(total[c])
                total[c] = d_u_k[c] * sigmoid * (np.float32(1) + total[c] * (np.float32(1) - sigmoid))
                d_bias[c] += total[c]
            for tap in range(skipped, taps):
                d_x_k, d_w = d_x[visits[direction, step - (taps - 1) + tap]], sums[tap]
                x_tap, w = inputs[tap], weights[tap]
                for c in range(last - first):
                    d_w[c] += total[c] * x_tap[c]
                    d_x_k[c] += total[c] * w[c]
        for tap in range(taps + 1):
            _copy(sums[tap], d_params[clip, direction, tap, first:last])
    for token in range(length):
        row, d_x_k = d_xz[clip, token, first:last], d_x[token]
        for c in range(last - first):
            row[c] = _to_type_of(d_x_k[c], row)


# --------------------------------------------------------------------------------------------------------------------
# Threads, and the operator that PyTorch sees.
# --------------------------------------------------------------------------------------------------------------------

_threads = None


def _forget_threads():
    """A forked process has none of its parent's threads."""
    global _threads
    _threads = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def _run(kernel, units, *arrays):
    """`kernel(unit, *arrays)` for every unit, on as many threads as PyTorch uses."""
    global _threads
    arrays = [_array(t) for t in arrays]
    remaining = iter(range(units))

    def work():
        for unit in remaining:
            kernel(unit, *arrays)

    helpers = min(torch.get_num_threads(), units) - 1
    if helpers > 0 and _threads is None:
        _threads = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="selective_scan")
    waiting = [_threads.submit(work) for _ in range(helpers)]
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

    memory = torch.empty(0, dtype=torch.uint8)

    def take(self, *wanted):
        """Contiguous tensors for pairs of a shape and a dtype, which share nothing and hold anything."""
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in wanted]
        ends = list(itertools.accumulate(-(-size // 64) * 64 for size in sizes))
        memory = self.memory
        if memory.numel() < ends[-1]:
            memory = torch.empty(ends[-1], dtype=torch.uint8)
            if ends[-1] <= WORKSPACE:
                self.memory = memory
        starts = [0, *ends[:-1]]
        return [
            memory[start : start + size].view(dtype).view(shape)
            for start, size, (shape, dtype) in zip(starts, sizes, wanted, strict=True)
        ]


_workspace = _Workspace()


def _groups(xz, tensors):
    """Slices of the batch, each of as many clips as have room in the workspace for `tensors` times (2, L, E) float32."""
    batch, length, width = xz.shape
    size = max(1, WORKSPACE // max(1, tensors * length * width * 4))
    return [slice(start, min(start + size, batch)) for start in range(0, batch, size)]


def _blocks(channels):
    return (channels + BLOCK - 1) // BLOCK


def _shared_arguments(conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D, order):
    """What the kernels take, of the parameters: (weight, bias, visits) of `_convolve`, (A, ..., visits) of `_scan`."""
    (length,) = order.shape
    if length and not 0 <= order.min() <= order.max() < length:
        raise ValueError(f"`order` must hold positions among {length} tokens, got {order.min()} to {order.max()}.")
    visits = torch.stack([torch.arange(length), order])
    weight, A = conv_weight.float().transpose(1, 2).contiguous(), -LOG2E * A_log.float().exp().transpose(1, 2)
    convolution = weight, conv_bias.float().contiguous(), visits
    return convolution, (A.contiguous(), D.float().contiguous(), dt_proj_bias.float().contiguous(), visits)


def _project(xz, convolution, x_proj_weight, dt_proj_weight, u, delta):
    """Fill u and delta (2, B, L, E); returns the time steps (2, B L, R) before `dt_proj` and BC (2, B, L, 2N)."""
    _run(_convolve, 2 * xz.shape[0] * ((xz.shape[1] + ROWS - 1) // ROWS), xz, *convolution, u)
    rank = dt_proj_weight.shape[2]
    projected = torch.bmm(u.flatten(1, 2), x_proj_weight.to(u.dtype).transpose(1, 2)).float()
    time_step, BC = projected[..., :rank], projected[..., rank:]
    torch.bmm(time_step, dt_proj_weight.float().transpose(1, 2), out=delta.flatten(1, 2))
    return time_step, BC.reshape(*u.shape[:3], -1)


def _forward(
    xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D, order, keep_states
):
    xz = xz.contiguous()
    out, states = _outputs(xz, A_log, keep_states)
    convolution, scan = _shared_arguments(
        conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D, order
    )
    for clips in _groups(xz, 2):
        shape = (2, *out[clips].shape)
        u, delta = _workspace.take((shape, xz.dtype), (shape, torch.float32))
        _, BC = _project(xz[clips], convolution, x_proj_weight, dt_proj_weight, u, delta)
        _run(_scan, shape[1] * _blocks(shape[3]), xz[clips], u, delta, BC, *scan, out[clips], states[clips])
    return out, states


def _outputs(xz, A_log, keep_states):
    batch, length, width = xz.shape
    chunks = (length + CHUNK - 1) // CHUNK if keep_states else 0
    shape = (batch, 2, chunks, A_log.shape[2], width // 2)
    return xz.new_empty(batch, length, width // 2), xz.new_empty(shape, dtype=torch.float32)


def _backward(
    grad, states, xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D, order
):
    xz, grad = xz.contiguous(), grad.to(xz.dtype).contiguous()
    channels, taps, num_states = conv_weight.shape[1], conv_weight.shape[2], A_log.shape[2]
    convolution, scan = _shared_arguments(
        conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D, order
    )
    blocks = _blocks(channels)
    d_xz = torch.empty_like(xz)
    d_scan, d_conv, d_x_proj, d_dt_proj = 0, 0, 0, 0
    for clips in _groups(xz, 4):
        shape = (2, *grad[clips].shape)
        u, delta, d_u, d_delta = _workspace.take((shape, xz.dtype), *[(shape, torch.float32)] * 3)
        time_step, BC = _project(xz[clips], convolution, x_proj_weight, dt_proj_weight, u, delta)
        d_BC, d_params = BC.new_empty(blocks, *BC.shape), BC.new_empty(shape[1], 2, num_states + 2, channels)
        _run(
            _scan_backward, shape[1] * blocks, xz[clips], grad[clips], u, delta, BC, *scan, states[clips],
            d_xz[clips], d_u, d_delta, d_BC, d_params,
        )  # fmt: skip
        d_scan = d_scan + d_params.sum(0)

        d_delta, u = d_delta.flatten(1, 2), u.flatten(1, 2)
        d_dt_proj = d_dt_proj + torch.bmm(d_delta.transpose(1, 2), time_step)
        d_time_step = torch.bmm(d_delta, dt_proj_weight.float())
        d_projected = torch.cat([d_time_step, d_BC.sum(0).flatten(1, 2)], dim=-1).to(u.dtype)
        d_x_proj = d_x_proj + torch.bmm(d_projected.transpose(1, 2), u)
        d_u.flatten(1, 2).add_(torch.bmm(d_projected, x_proj_weight.to(u.dtype)))

        d_params = BC.new_empty(shape[1], 2, taps + 1, channels)
        _run(_convolve_backward, shape[1] * blocks, xz[clips], *convolution, d_u, d_xz[clips], d_params)
        d_conv = d_conv + d_params.sum(0)
    d_A, d_D, d_bias = d_scan.split([num_states, 1, 1], dim=1)
    d_A_log = (LN2 * d_A * scan[0]).transpose(1, 2)
    return (
        d_xz, d_conv[:, :taps].transpose(1, 2), d_conv[:, taps], d_x_proj, d_dt_proj, d_bias[:, 0], d_A_log, d_D[:, 0]
    )  # fmt: skip


@functools.cache
def _compile(dtype, backward):
    """Compile what is needed for activations of `dtype`, or load it from disk, by a run on one token."""
    kernels = (_convolve, _scan, _scan_backward, _convolve_backward)

    def compiled():
        return sum(len(kernel.signatures) - sum(kernel.stats.cache_hits.values()) for kernel in kernels)

    before, started = compiled(), time.perf_counter()
    xz = torch.zeros(1, 1, 2, dtype=dtype)
    shapes = ((2, 1, 1), (2, 1), (2, 3, 1), (2, 1, 1), (2, 1), (2, 1, 1), (2, 1))
    parameters = (*(torch.zeros(shape) for shape in shapes), torch.zeros(1, dtype=torch.long))
    out, states = _forward(xz, *parameters, keep_states=True)
    if backward:
        _backward(out, states, xz, *parameters)
    if compiled() > before:
        logger.warning(
            f"Compiled the CPU scan's {'backward' if backward else 'forward'} pass for {dtype} in "
            f"{time.perf_counter() - started:.1f} s, once: later runs load it from {_scan.stats.cache_path}."
        )


@torch.library.custom_op("videomamba::mixer_cpu", mutates_args=())
def _mixer(
    xz: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor,
    x_proj_weight: torch.Tensor,
    dt_proj_weight: torch.Tensor,
    dt_proj_bias: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
    order: torch.Tensor,
    keep_states: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mixer's output (B, L, E), and the states at the borders of chunks if the backward pass will want them."""
    _compile(xz.dtype, backward=False)
    with torch.autocast("cpu", enabled=False):
        return _forward(
            xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D, order, keep_states
        )


@_mixer.register_fake
def _(xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D, order, keep_states):
    return _outputs(xz, A_log, keep_states)


@torch.library.custom_op("videomamba::mixer_cpu_backward", mutates_args=())
def _mixer_backward(
    grad: torch.Tensor,
    states: torch.Tensor,
    xz: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor,
    x_proj_weight: torch.Tensor,
    dt_proj_weight: torch.Tensor,
    dt_proj_bias: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
    order: torch.Tensor,
) -> list[torch.Tensor]:
    """Gradients of all floating-point arguments, each of its argument's type."""
    inputs = (xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)
    _compile(xz.dtype, backward=True)
    with torch.autocast("cpu", enabled=False):
        gradients = _backward(grad, states, *inputs, order)
    return [g.to(t.dtype).contiguous() for g, t in zip(gradients, inputs, strict=True)]


@_mixer_backward.register_fake
def _(grad, states, *inputs):
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs[:-1]]


def _save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(output[1], *inputs[:-1])


def _autograd(ctx, grad_out, grad_states):
    return *_mixer_backward(grad_out, *ctx.saved_tensors), None, None


_mixer.register_autograd(_autograd, setup_context=_save_for_backward)
