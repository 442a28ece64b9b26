"""The arithmetic and the kernels of the CPU backend, compiled by Numba; `selective_scan_numba` runs them.

Work is cut into units that never share a sum: one clip's block of `BLOCK` channels, walked token by token in the order
of visits, with its states (N, BLOCK) in the first-level cache. The innermost loops run over the block's channels, a
number known at compile time, so LLVM turns them into vector instructions; a call of the C library's `exp` would stop
it, hence the polynomials. The backward pass walks chunks of `CHUNK` tokens from the last to the first, and recomputes
the states of a chunk from the one that the forward pass left at its border.
"""

from pathlib import Path

import numpy as np

from .selective_scan_cuda_runtime import cache_folder


try:
    from llvmlite import ir
    from numba import config, njit, types
    from numba.extending import intrinsic, overload

    IMPORT_ERROR = None
except ImportError as error:
    IMPORT_ERROR = error

BLOCK = 64  # channels of a unit
CHUNK = 32  # tokens between two kept states
AHEAD = 8  # tokens by which loads run ahead of their use
ROWS = 256  # tokens of a unit of the convolution
NORM_ROWS = 64  # tokens of a unit of the norm

# --------------------------------------------------------------------------------------------------------------------
# Functions of one number, inlined into the kernels. Errors are relative and below 4e-7, but for one.
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
    """
    Compile a kernel, and keep the result on disk: beside this file, or else in the user's cache directory.

    What pip has installed is kept among the GPU's kernels. pip does not remove what it has not written, and Python
    would take the folder that remains for the package, even where another copy is installed since.
    """
    if IMPORT_ERROR is not None:
        return function
    given = config.CACHE_DIR
    try:
        if not given and Path(__file__).parents[1].name in ("site-packages", "dist-packages"):
            config.CACHE_DIR = str(cache_folder())
        return _compiled("contract", nogil=True, cache=True)(function)
    except RuntimeError:  # nowhere to write
        return _compiled("contract", nogil=True)(function)
    finally:
        config.CACHE_DIR = given


if IMPORT_ERROR is None:

    @intrinsic
    def _bits(context, x):
        return types.int32(types.float32), lambda _, builder, sig, args: builder.bitcast(args[0], ir.IntType(32))

    @intrinsic
    def _from_bits(context, x):
        return types.float32(types.int32), lambda _, builder, sig, args: builder.bitcast(args[0], ir.FloatType())

    @intrinsic
    def _disjoint(context):
        """
        Have LLVM vectorise the calling function in earnest: with a promise that its array arguments do not overlap, so
        that it need not make sure, and with 512-bit vectors if the CPU has them, where by itself it stays with 256.
        """

        def generate(context, builder, signature, args):
            for argument in builder.function.args:
                pointee = getattr(argument.type, "pointee", None)
                # Of the pointers, those to data, not to what Numba knows about their memory.
                if isinstance(pointee, ir.FloatType) or pointee == ir.IntType(16):
                    argument.add_attribute("noalias")
            # llvmlite does not know this attribute and would refuse it; `set.add` passes by its check.
            set.add(builder.function.attributes, '"prefer-vector-width"="512"')
            return context.get_dummy_value()

        return types.void(), generate

    @intrinsic
    def _hot(context):
        """Have LLVM compile the calling function by itself, so that its loops have all registers."""

        def generate(context, builder, signature, args):
            builder.function.attributes.add("noinline")
            return context.get_dummy_value()

        return types.void(), generate

    @intrinsic
    def _fetch_line(context, address):
        """Start to load the cache line at an address."""

        def generate(context, builder, signature, args):
            pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
            prefetch = builder.module.declare_intrinsic(
                "llvm.prefetch", (pointer,), ir.FunctionType(ir.VoidType(), (pointer, number, number, number))
            )
            to_read, to_keep, data = number(0), number(3), number(1)
            builder.call(prefetch, (builder.inttoptr(args[0], pointer), to_read, to_keep, data))
            return context.get_dummy_value()

        return types.void(types.intp), generate

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
    """
    2 to the power of x, for x up to 127. NaN stays NaN. What would fall below 2**-100 becomes that: a state times less
    may be a denormal number, with which a loop takes ten times as long.
    """
    x = np.float32(-100) if x < np.float32(-100) else x
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
def _rough_exp2(x):
    """The same with two terms fewer: errors below 2.7e-4 of the result and, from -1/2 to 0, of what it lacks to 1."""
    x = np.float32(-100) if x < np.float32(-100) else x
    rounded = x + ROUNDER
    f = x - (rounded - ROUNDER)
    p = np.float32(0.05392669) * f + np.float32(0.24174207)
    p = p * f + np.float32(0.69332998)
    p = p * f + np.float32(1)
    return _from_bits(np.int32(_bits(p) + np.int32(_bits(rounded) << np.int32(23))))


def _decay(x, like):
    """2 to the power of x, at the accuracy of the numbers of an array."""


if IMPORT_ERROR is None:

    @overload(_decay)
    def _(x, like):
        if like.dtype == types.uint16:
            return lambda x, like: _rough_exp2(x)
        return lambda x, like: _exp2(x)


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
# Walks through one chunk of at most CHUNK tokens with one block of channels: where nearly all the time goes. A row is
# BLOCK channels; those beyond the last are zeros. There are tables of a row a token, Δ (`size`), Δ u (`size_u`), y;
# and of a row a state, A log2(e), h. BC (CHUNK, 2N) holds B and C.
# --------------------------------------------------------------------------------------------------------------------


@_compiled()
def _tables(count, rows):
    """
    `count` tables of zeros (rows + 1, BLOCK), from the start of a cache line.

    The row that nobody needs keeps row k of two tables from lying at the same place of two pages, where a processor
    takes a store to the one for a store to the other.
    """
    size = count * (rows + 1) * BLOCK
    memory = np.zeros(size + 16, np.float32)
    start = -(memory.ctypes.data // 4) % 16
    return memory[start : start + size].reshape((count, rows + 1, BLOCK))


@_compiled("contract")
def _walk(steps, size, size_u, y, BC, A, h, like):
    """Advance h by some steps, in place, and add C h to y; decays are as accurate as `like`."""
    _hot()
    _disjoint()
    num_states = BC.shape[1] // 2
    for k in range(steps):
        size_k, size_u_k, y_k = size[k], size_u[k], y[k]
        for n in range(num_states):
            b, b_out = BC[k, n], BC[k, num_states + n]
            A_n, h_n = A[n], h[n]
            for c in range(BLOCK):
                new = _decay(size_k[c] * A_n[c], like) * h_n[c] + size_u_k[c] * b
                h_n[c] = new
                y_k[c] += new * b_out


@_compiled("contract")
def _walk_again(steps, size, size_u, y, BC, A, h, decay):
    """The same, but all is kept: row k N + n of h is the state before step k, and that of `decay` is exp(Δ_k A)."""
    _hot()
    _disjoint()
    num_states = BC.shape[1] // 2
    for k in range(steps):
        size_k, size_u_k, y_k = size[k], size_u[k], y[k]
        for n in range(num_states):
            b, b_out = BC[k, n], BC[k, num_states + n]
            A_n, decay_n = A[n], decay[k * num_states + n]
            before, after = h[k * num_states + n], h[(k + 1) * num_states + n]
            for c in range(BLOCK):
                a = _exp2(size_k[c] * A_n[c])
                new = a * before[c] + size_u_k[c] * b
                decay_n[c] = a
                after[c] = new
                y_k[c] += new * b_out


# Reassociation, for the sums over channels to run in vectors.
@_compiled("contract", "reassoc")
def _walk_back(steps, size, size_u, BC, A, h, decay, d_y, adjoint, d_size, d_size_u, d_A, d_BC):
    """
    From the last step to the first, through what `_walk_again` kept; `grad` is the gradient of a step's new state.

    Updates `adjoint`, which a step passes to the one before it; adds to d_size (by way of the decay alone), d_size_u
    and d_A; sets d_BC.
    """
    _hot()
    _disjoint()
    num_states = BC.shape[1] // 2
    for k in range(steps - 1, -1, -1):
        size_k, size_u_k, d_y_k, d_size_k, d_size_u_k = size[k], size_u[k], d_y[k], d_size[k], d_size_u[k]
        for n in range(num_states):
            b, b_out = BC[k, n], BC[k, num_states + n]
            A_n, adjoint_n, d_A_n, decay_n = A[n], adjoint[n], d_A[n], decay[k * num_states + n]
            before, after = h[k * num_states + n], h[(k + 1) * num_states + n]
            d_b, d_b_out = np.float32(0), np.float32(0)
            for c in range(BLOCK):
                grad = adjoint_n[c] + d_y_k[c] * b_out
                d_b_out += d_y_k[c] * after[c]
                d_b += grad * size_u_k[c]
                d_size_u_k[c] += grad * b
                grad *= decay_n[c]
                adjoint_n[c] = grad
                grad *= before[c]
                d_size_k[c] += grad * A_n[c]
                d_A_n[c] += grad * size_k[c]
            d_BC[k, n], d_BC[k, num_states + n] = d_b, d_b_out


# --------------------------------------------------------------------------------------------------------------------
# Rows, by which a chunk is loaded before the walk and stored after it. The arguments that are written to come last.
# --------------------------------------------------------------------------------------------------------------------


def _row(function):
    return _compiled("contract", forceinline=True)(function)


@_row
def _fetch(row):
    """Start to load a row."""
    for i in range(0, row.size * row.itemsize, 64):
        _fetch_line(row.ctypes.data + i)


@_row
def _fill(value, row):
    for c in range(row.size):
        row[c] = value


@_row
def _copy(source, target):
    """As many numbers as the shorter of two rows holds."""
    _disjoint()
    for c in range(min(source.size, target.size)):
        target[c] = source[c]


@_row
def _copy_block(source, target):
    """`_copy` of rows whose length the compiler knows: with `_copy`, the scan in float32 takes 4 % longer."""
    _disjoint()
    for c in range(BLOCK):
        target[c] = source[c]


@_row
def _load_state(state, h):
    """Of a block's channels, (E, N) to a row a state."""
    for c in range(state.shape[0]):
        for n in range(state.shape[1]):
            h[n, c] = state[c, n]


@_row
def _store_state(h, state):
    for c in range(state.shape[0]):
        for n in range(state.shape[1]):
            state[c, n] = h[n, c]


@_row
def _convert(source, target):
    _disjoint()
    for c in range(source.size):
        target[c] = _to_float(source[c])


@_row
def _discretize(u, delta, bias, D, size, size_u, y):
    _disjoint()
    for c in range(u.size):
        value = _to_float(u[c])
        step = _softplus(_to_float(delta[c]) + bias[c])
        size[c] = step
        size_u[c] = step * value
        y[c] = D[c] * value


@_row
def _gate(z, y_forward, y_backward, out):
    _disjoint()
    for c in range(z.size):
        gate = _to_float(z[c])
        mean = np.float32(0.5) * (y_forward[c] + y_backward[c])
        out[c] = _to_type_of(mean * gate * _sigmoid(gate), out)


@_row
def _gate_backward(z, grad, d_y):
    _disjoint()
    for c in range(z.size):
        gate = _to_float(z[c])
        d_y[c] = np.float32(0.5) * _to_float(grad[c]) * gate * _sigmoid(gate)


@_row
def _gate_gradient(z, grad, y_forward, y_backward, d_z):
    _disjoint()
    for c in range(z.size):
        gate = _to_float(z[c])
        mean = np.float32(0.5) * (y_forward[c] + y_backward[c])
        sigmoid = _sigmoid(gate)
        slope = sigmoid * (np.float32(1) + gate * (np.float32(1) - sigmoid))
        d_z[c] = _to_type_of(_to_float(grad[c]) * mean * slope, d_z)


@_row
def _discretize_backward(u, delta, bias, D, size, d_y, d_size, d_size_u, d_u, d_delta, d_D, d_bias):
    _disjoint()
    for c in range(u.size):
        value = _to_float(u[c])
        d_u[c] = d_size_u[c] * size[c] + d_y[c] * D[c]
        d_raw = (d_size[c] * LN2 + d_size_u[c] * value) * _sigmoid(_to_float(delta[c]) + bias[c])
        d_delta[c] = d_raw
        d_D[c] += d_y[c] * value
        d_bias[c] += d_raw


@_row
def _add_product(a, b, total):
    _disjoint()
    for c in range(min(a.size, b.size)):
        total[c] += a[c] * _to_float(b[c])


@_row
def _add(x, total):
    _disjoint()
    for c in range(x.size):
        total[c] += x[c]


@_row
def _sum(a, b, total):
    _disjoint()
    for c in range(total.size):
        total[c] = a[c] + _to_float(b[c])


@_compiled("contract", "reassoc", forceinline=True)
def _sum_of_squares(x):
    total = np.float32(0)
    for c in range(x.size):
        total += x[c] * x[c]
    return total


@_row
def _scale(x, weight, scale, out):
    _disjoint()
    for c in range(out.size):
        out[c] = _to_type_of(x[c] * scale * _to_float(weight[c]), out)


@_row
def _silu(x, out):
    _disjoint()
    for c in range(out.size):
        out[c] = _to_type_of(x[c] * _sigmoid(x[c]), out)


@_row
def _silu_backward(x, d_out, d_x):
    _disjoint()
    for c in range(d_out.size):
        sigmoid = _sigmoid(x[c])
        d_x[c] = d_out[c] * sigmoid * (np.float32(1) + x[c] * (np.float32(1) - sigmoid))


@_row
def _round(x, out):
    _disjoint()
    for c in range(out.size):
        out[c] = _to_type_of(x[c], out)


# --------------------------------------------------------------------------------------------------------------------
# Chunks. By themselves, so that Numba sees that it need not count references to the rows. They are of the tokens that
# one direction of a clip visits in `steps` steps from `begin` on, and of the channels from `first` to `last`.
# --------------------------------------------------------------------------------------------------------------------


@_compiled()
def _load_chunk(begin, steps, visits, first, last, u, delta, BC, bias, D, size, size_u, y, BC_chunk):
    _hot()
    for k in range(steps):
        token, ahead = visits[begin + k], visits[min(begin + k + AHEAD, visits.size - 1)]
        _fetch(u[ahead, first:last])
        _fetch(delta[ahead, first:last])
        _copy(BC[token], BC_chunk[k])
        _discretize(u[token, first:last], delta[token, first:last], bias, D, size[k], size_u[k], y[k])


@_compiled()
def _keep_chunk(begin, steps, visits, y, y_forward):
    _hot()
    for k in range(steps):
        _copy_block(y[k], y_forward[visits[begin + k]])


@_compiled()
def _gate_chunk(begin, steps, visits, first, last, xz, y_forward, y, out):
    _hot()
    channels = out.shape[1]
    for k in range(steps):
        token, ahead = visits[begin + k], visits[min(begin + k + AHEAD, visits.size - 1)]
        _fetch(y_forward[ahead])
        _fetch(xz[ahead, channels + first : channels + last])
        _fetch(out[ahead, first:last])
        z = xz[token, channels + first : channels + last]
        _gate(z, y_forward[token], y[k], out[token, first:last])


# --------------------------------------------------------------------------------------------------------------------
# Kernels. Each call does one unit. xz (B, L, 2E) and what else has the activations' type is float32, or uint16 with
# the bits of bfloat16; `visits` (2, L) lists the tokens in the order in which each direction visits them. Of a state,
# `before` (B, 2, K - 1, E) are the inputs before the first step, and `start` (B, 2, E, N) is h before it; without one,
# they and what is written of a state are empty.
# --------------------------------------------------------------------------------------------------------------------


@_kernel
def rms_norm(unit, x, update, total, out, weight, eps):
    """
    out (rows, D) = root-mean-square norm of x (rows, D), in `NORM_ROWS` rows; weight (D,) has the type of `out`. With
    an update (rows, D) of that type, it is of x + update instead, which goes to `total`; without, both have no rows.
    """
    _hot()
    rows, channels = out.shape
    for row in range(unit * NORM_ROWS, min((unit + 1) * NORM_ROWS, rows)):
        source = x[row]
        if update.shape[0] > 0:
            _sum(x[row], update[row], total[row])
            source = total[row]
        scale = np.float32(1) / np.sqrt(_sum_of_squares(source) / np.float32(channels) + np.float32(eps))
        _scale(source, weight, scale, out[row])


@_kernel
def convolve(unit, xz, weight, bias, visits, before, u, after):
    """
    u (2, B, L, E) = SiLU(causal convolution of x) in `ROWS` steps of a direction; weight (2, K, E), bias (2, E).
    Writes into `after`, shaped as `before`, the inputs before the step that would come next.
    """
    _hot()
    _, batch, length, channels = u.shape
    taps = weight.shape[1]
    tiles = (length + ROWS - 1) // ROWS
    direction, clip, tile = unit // tiles // batch, unit // tiles % batch, unit % tiles
    total = np.empty(channels, np.float32)
    for step in range(tile * ROWS, min((tile + 1) * ROWS, length)):
        ahead = visits[direction, min(step + AHEAD, length - 1)]
        _fetch(xz[clip, ahead, :channels])
        _fetch(u[direction, clip, ahead])
        _copy(bias[direction], total)
        skipped = max(0, taps - 1 - step)
        for tap in range(skipped):
            if before.shape[2] > 0:
                _add_product(weight[direction, tap], before[clip, direction, step + tap], total)
        for tap in range(skipped, taps):
            _add_product(weight[direction, tap], xz[clip, visits[direction, step - (taps - 1) + tap]], total)
        _silu(total, u[direction, clip, visits[direction, step]])
    if after.size > 0 and tile == tiles - 1:
        for tap in range(taps - 1):
            step = length - (taps - 1) + tap
            if step < 0:
                _copy(before[clip, direction, length + tap], after[clip, direction, tap])
            else:
                _copy(xz[clip, visits[direction, step], :channels], after[clip, direction, tap])


@_kernel
def scan(unit, xz, u, delta, BC, A, D, delta_bias, visits, start, out, states, end):
    """
    Both directions of a block of channels, and their gated mean.

    u (2, B, L, E), delta (2, B, L, E) before bias and softplus, BC (2, B, L, 2N), A (2, N, E) times log2(e), D and
    delta_bias (2, E). Writes out (B, L, E), into `states` (B, 2, ceil(L / CHUNK), N, E) the state that each chunk
    starts from, unless it has no chunks, and into `end` h after the last step.
    """
    _hot()
    _, batch, length, channels = u.shape
    num_states = A.shape[1]
    blocks = (channels + BLOCK - 1) // BLOCK
    clip, first = unit // blocks, unit % blocks * BLOCK
    last = min(first + BLOCK, channels)
    by_state, by_token = _tables(2, num_states), _tables(3, CHUNK)
    A_block, h = by_state[0], by_state[1]
    size, size_u, y = by_token[0], by_token[1], by_token[2]
    BC_chunk, y_forward = np.empty((CHUNK, 2 * num_states), np.float32), np.empty((length, BLOCK), np.float32)
    for direction in range(2):
        D_block, bias_block = D[direction, first:last], delta_bias[direction, first:last]
        for n in range(num_states):
            _copy(A[direction, n, first:last], A_block[n])
            _fill(np.float32(0), h[n])
        if start.size > 0:
            _load_state(start[clip, direction, first:last], h)
        for begin in range(0, length, CHUNK):
            steps = min(CHUNK, length - begin)
            if states.shape[2] > 0:
                for n in range(num_states):
                    _copy(h[n], states[clip, direction, begin // CHUNK, n, first:last])
            _load_chunk(
                begin, steps, visits[direction], first, last, u[direction, clip], delta[direction, clip],
                BC[direction, clip], bias_block, D_block, size, size_u, y, BC_chunk,
            )  # fmt: skip
            _walk(steps, size, size_u, y, BC_chunk, A_block, h, xz)
            if direction == 0:
                _keep_chunk(begin, steps, visits[direction], y, y_forward)
            else:
                _gate_chunk(begin, steps, visits[direction], first, last, xz[clip], y_forward, y, out[clip])
        if end.size > 0:
            _store_state(h, end[clip, direction, first:last])


@_kernel
def scan_backward(
    unit, xz, grad, u, delta, BC, A, D, delta_bias, visits, states, d_end, d_xz, d_u, d_delta, d_BC, d_params, d_start
):
    """
    Gradients of `scan`, whose arguments it takes, given `grad`, that of `out`, and that of `end`.

    Writes the half of d_xz (B, L, 2E) that is the gate's; d_u and d_delta (2, B, L, E); and partial sums: d_BC
    (blocks, 2, B, L, 2N) of this block of channels, d_params (B, 2, N + 2, E) of this clip: A's, D's, delta_bias'.
    And d_start, of `start`.
    """
    _hot()
    _, batch, length, channels = u.shape
    num_states = A.shape[1]
    blocks = (channels + BLOCK - 1) // BLOCK
    clip, block = unit // blocks, unit % blocks
    first = block * BLOCK
    last = min(first + BLOCK, channels)
    by_state, by_token, sums = _tables(3, num_states), _tables(6, CHUNK), _tables(1, 1)[0]
    A_block, adjoint, d_A = by_state[0], by_state[1], by_state[2]
    size, size_u, y = by_token[0], by_token[1], by_token[2]
    d_y, d_size, d_size_u = by_token[3], by_token[4], by_token[5]
    kept = _tables(2, (CHUNK + 1) * num_states)
    h, decay, d_D, d_bias = kept[0], kept[1], sums[0], sums[1]
    BC_chunk, y_forward = np.empty((CHUNK, 2 * num_states), np.float32), np.empty((length, BLOCK), np.float32)
    d_BC_chunk = np.empty_like(BC_chunk)
    for direction in range(2):
        D_block, bias_block = D[direction, first:last], delta_bias[direction, first:last]
        _fill(np.float32(0), d_D)
        _fill(np.float32(0), d_bias)
        for n in range(num_states):
            _copy(A[direction, n, first:last], A_block[n])
            _fill(np.float32(0), adjoint[n])
            _fill(np.float32(0), d_A[n])
        if d_end.size > 0:
            _load_state(d_end[clip, direction, first:last], adjoint)
        for chunk in range((length - 1) // CHUNK, -1, -1):
            start = chunk * CHUNK
            steps = min(CHUNK, length - start)
            for n in range(num_states):
                _copy(states[clip, direction, chunk, n, first:last], h[n])
            for k in range(steps):
                token = visits[direction, start + k]
                _copy(BC[direction, clip, token], BC_chunk[k])
                u_k, delta_k = u[direction, clip, token, first:last], delta[direction, clip, token, first:last]
                z, grad_k = xz[clip, token, channels + first : channels + last], grad[clip, token, first:last]
                _discretize(u_k, delta_k, bias_block, D_block, size[k], size_u[k], y[k])
                _gate_backward(z, grad_k, d_y[k])
                _fill(np.float32(0), d_size[k])
                _fill(np.float32(0), d_size_u[k])
            _walk_again(steps, size, size_u, y, BC_chunk, A_block, h, decay)
            _walk_back(
                steps, size, size_u, BC_chunk, A_block, h, decay, d_y, adjoint, d_size, d_size_u, d_A, d_BC_chunk
            )
            for k in range(steps):
                token = visits[direction, start + k]
                _copy(d_BC_chunk[k], d_BC[block, direction, clip, token])
                u_k, delta_k = u[direction, clip, token, first:last], delta[direction, clip, token, first:last]
                d_u_k, d_delta_k = d_u[direction, clip, token, first:last], d_delta[direction, clip, token, first:last]
                _discretize_backward(
                    u_k, delta_k, bias_block, D_block, size[k], d_y[k], d_size[k], d_size_u[k], d_u_k, d_delta_k, d_D,
                    d_bias,
                )  # fmt: skip
                if direction == 0:
                    _copy_block(y[k], y_forward[token])
                    continue
                z = xz[clip, token, channels + first : channels + last]
                d_z = d_xz[clip, token, channels + first : channels + last]
                _gate_gradient(z, grad[clip, token, first:last], y_forward[token], y[k], d_z)
        for n in range(num_states):
            _copy(d_A[n], d_params[clip, direction, n, first:last])
        _copy(d_D, d_params[clip, direction, num_states, first:last])
        _copy(d_bias, d_params[clip, direction, num_states + 1, first:last])
        if d_start.size > 0:
            _store_state(adjoint, d_start[clip, direction, first:last])


@_kernel
def convolve_backward(unit, xz, weight, bias, visits, before, d_u, d_xz, d_params, d_before):
    """
    Gradients of `convolve`, whose arguments it takes, for a block of channels of a clip, given d_u (2, B, L, E).

    Writes the half of d_xz (B, L, 2E) that is x's, d_params (B, 2, K + 1, E) of this clip: the taps', the bias'. And
    d_before, of `before`.
    """
    _hot()
    _, batch, length, channels = d_u.shape
    taps = weight.shape[1]
    blocks = (channels + BLOCK - 1) // BLOCK
    clip, first = unit // blocks, unit % blocks * BLOCK
    last = min(first + BLOCK, channels)
    d_x, by_tap, totals = _tables(1, length)[0], _tables(4, taps + 1), _tables(1, 2)[0]
    weights, inputs, sums, d_earlier = by_tap[0], by_tap[1], by_tap[2], by_tap[3]
    total, d_total = totals[0], totals[1]
    for direction in range(2):
        for tap in range(taps):
            _copy(weight[direction, tap, first:last], weights[tap])
        _copy(bias[direction, first:last], weights[taps])
        for tap in range(taps + 1):
            _fill(np.float32(0), sums[tap])
            _fill(np.float32(0), d_earlier[tap])
        for step in range(length):
            skipped = max(0, taps - 1 - step)
            _copy(weights[taps], total)
            for tap in range(skipped):
                if before.shape[2] > 0:
                    _convert(before[clip, direction, step + tap, first:last], inputs[tap])
                    _add_product(weights[tap], inputs[tap], total)
            for tap in range(skipped, taps):
                x = xz[clip, visits[direction, step - (taps - 1) + tap], first:last]
                _convert(x, inputs[tap])
                _add_product(weights[tap], inputs[tap], total)
            _silu_backward(total, d_u[direction, clip, visits[direction, step], first:last], d_total)
            _add(d_total, sums[taps])
            for tap in range(skipped):
                if before.shape[2] > 0:
                    _add_product(d_total, inputs[tap], sums[tap])
                    _add_product(d_total, weights[tap], d_earlier[step + tap])
            for tap in range(skipped, taps):
                _add_product(d_total, inputs[tap], sums[tap])
                _add_product(d_total, weights[tap], d_x[visits[direction, step - (taps - 1) + tap]])
        for tap in range(taps + 1):
            _copy(sums[tap], d_params[clip, direction, tap, first:last])
        for row in range(before.shape[2]):
            _round(d_earlier[row], d_before[clip, direction, row, first:last])
    for token in range(length):
        _round(d_x[token], d_xz[clip, token, first:last])
