"""
mamba-ssm's `selective_scan_fn` on the kernels of VideoMamba.

The kernels read tokens one after the other, all channels of each. mamba-ssm's callers have channels first, so tensors
are turned on the way in and out (csrc/layout.cu), where the gate is multiplied too. What is channels last already,
seen through a transpose, is read as it lies.

Without a time-step rank, the kernels of the scan take Δ and A as they are given, and walk in one direction: the halves
of the channels take the places of the two directions.
"""

import ctypes
import functools

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .selective_scan_cuda import ScanCall, on_device_of, unusable_reason, walk_back
from .selective_scan_cuda_runtime import DTYPES, Launch, source_constant
from .selective_scan_cuda_simt import selective_scan as simt_scan
from .selective_scan_cuda_simt import unusable_reason as simt_unusable_reason
from .selective_scan_torch import selective_scan as torch_scan


LAYOUT_THREADS, LAYOUT_SIDE, SILU, SILU_SLOPE = (
    source_constant(name, "layout.cu") for name in ("LAYOUT_THREADS", "LAYOUT_SIDE", "SILU", "SILU_SLOPE")
)
TURNED = {name: source_constant(f"{name.upper()}_TURNED", "layout.cu") for name in ("x", "z", "grad")}


class Strided(ctypes.Structure):
    """`Strided` of csrc/layout.cu."""

    _fields_ = [("at", ctypes.c_void_p), *((name, ctypes.c_longlong) for name in ("batch", "channel", "token"))]


class LayoutArguments(ctypes.Structure):
    """`LayoutArgs` of csrc/layout.cu."""

    _fields_ = [
        *((name, Strided) for name in ("to", "x", "z", "grad")),
        *((name, ctypes.c_int) for name in ("channels", "tokens")),
    ]


@functools.lru_cache(maxsize=256)
def _layout(shape, dtype, device, options):
    batch, channels, tokens = shape
    grid = -(-tokens // LAYOUT_SIDE), -(-channels // LAYOUT_SIDE), batch
    shared = LAYOUT_SIDE // 2 * (LAYOUT_SIDE + 1) * 8
    options = {"IO": DTYPES[dtype], "PT": 0, **dict(options)}
    return Launch("layout", options, grid, LAYOUT_THREADS, shared, device, {})


def _channels_last(t):
    return t.stride(1) < t.stride(2)


def _is_paired(t):
    """Whether two channels of a tensor that lie side by side in memory can be accessed at once."""
    batch, channel, token = t.stride()
    return channel == 1 and not (batch % 2 or token % 2 or t.data_ptr() % (2 * t.itemsize))


def _turn(to, x, z=None, of_z=SILU, grad=None):
    """Writes into `to` the product of x, of what `of_z` makes of z, and of `grad`: all (B, E, L) in any strides."""
    tensors = {"to": to, "x": x, "z": z, "grad": grad}
    last = {name: _channels_last(t) for name, t in tensors.items() if t is not None}
    arguments = LayoutArguments(channels=to.shape[1], tokens=to.shape[2])
    for name in last:
        setattr(arguments, name, Strided(tensors[name].data_ptr(), *tensors[name].stride()))
    options = (
        ("OF_Z", 0 if z is None else of_z),
        ("GRAD", int(grad is not None)),
        ("BY_TOKENS", int(not last["to"])),
        ("TURNED", sum(TURNED[name] for name in last if last[name] != last["to"])),
        ("PAIRED", int(to.shape[1] % 2 == 0 and all(_is_paired(tensors[name]) for name in last if last[name]))),
    )
    stream = torch.cuda.current_stream(to.device).cuda_stream if to.device.type == "cuda" else 0
    _layout(tuple(to.shape), to.dtype, to.device, options)(arguments, stream)
    return to


def _rows(x, *factors):
    """x (B, E, L), times factors of `_turn`, as (B, L, E) without gaps."""
    if not factors and x.transpose(1, 2).is_contiguous() and x.data_ptr() % 16 == 0:
        return x.transpose(1, 2)
    rows = torch.empty(x.shape[0], x.shape[2], x.shape[1], dtype=x.dtype, device=x.device)
    _turn(rows.transpose(1, 2), x, *factors)
    return rows


def _columns(rows, *factors, like):
    """rows (B, L, E), times factors of `_turn`, as (B, E, L); in memory channels last if `like` is, else first."""
    columns = rows.transpose(1, 2)
    if not _channels_last(like):
        return _turn(torch.empty(columns.shape, dtype=rows.dtype, device=rows.device), columns, *factors)
    return _turn(torch.empty_like(rows).transpose(1, 2), columns, *factors) if factors else columns


def _side_by_side(B, C):
    """B and C (B, G, N, L) as (G, B, L, 2N)."""
    batch, groups, states, tokens = B.shape
    proj = torch.empty(groups, batch, tokens, 2 * states, dtype=B.dtype, device=B.device)
    for group in range(groups):
        for half, matrix in zip(proj[group].transpose(1, 2).chunk(2, dim=1), (B, C), strict=True):
            _turn(half, matrix[:, group])
    return proj


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        with on_device_of(x):
            return _rows(x).clone() if x.transpose(1, 2).is_contiguous() else _rows(x)

    @staticmethod
    def backward(ctx, grad):
        return _Turned.apply(grad)


@torch.compiler.disable
def turned(x):
    """x (B, X, Y) as (B, Y, X) without gaps."""
    if unusable_reason(x.device, x.dtype) is not None or x.transpose(1, 2).is_contiguous():
        return x.transpose(1, 2).contiguous()
    return _Turned.apply(x)


@functools.lru_cache(maxsize=16)
def _in_order(length, device):
    return torch.arange(length, device=device)


def _call(rows, A, D, delta_bias, common, softplus, stateful):
    """The kernels' call on rows (B, L, E), with parameters (E, N), (E,) and (E,); the last two may be None."""

    def halves(parameter):
        return parameter.float().reshape(2, A.shape[0] // 2, *parameter.shape[1:])

    zero = A.new_zeros(A.shape[0], dtype=torch.float32)
    nothing = halves(A[:, :0])  # neither a convolution nor a projection
    D, delta_bias = (halves(zero if p is None else p) for p in (D, delta_bias))
    options = ("COMMON", int(common)), ("SOFTPLUS", int(softplus))
    order = _in_order(rows.shape[1], rows.device), (0, 1, -1)
    parameters = nothing, halves(zero), nothing, delta_bias, halves(A), D
    return ScanCall(rows, *parameters, *order, nothing if stateful else None, options)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, delta_bias, softplus, stateful, keep):
        """As `selective_scan_fn`, all of one type but the parameters, B and C (B, G, N, L) of one or two groups."""
        ctx.options = B.shape[1] == 1, softplus, stateful
        with on_device_of(u):
            rows = _rows(u)
            call = _call(rows, A, D, delta_bias, *ctx.options)
            proj = _side_by_side(B, C)
            y = torch.empty_like(rows)
            call.set(proj=proj, out=y)
            call.set_aligned(u=_rows(delta))
            if stateful:
                call.begin_with(None)
            kept = call.scan(int(keep))
            last_state = call.end.permute(1, 0, 2, 3).flatten(1, 2) if stateful else None
            del rows, call  # the scan is queued: what is turned next may take their memory
            if z is None:
                out = _columns(y, like=u)
            else:
                out = _columns(y, z, like=z if _channels_last(z) else u)
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, proj, kept, None if z is None else y)
        ctx.set_materialize_grads(False)
        return out, last_state

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, d_last_state):
        u, delta, A, B, C, D, z, delta_bias, proj, kept, y = ctx.saved_tensors
        common, softplus, stateful = ctx.options
        with on_device_of(u):
            dout = torch.zeros_like(u) if dout is None else dout
            rows = _rows(u)
            call = _call(rows, A, D, delta_bias, *ctx.options)
            dy = call.aligned(_rows(dout) if z is None else _rows(dout, z))
            du, ddelta, dproj = torch.empty_like(dy), torch.empty_like(dy), call.new(2, *proj.shape[1:], dtype=u.dtype)
            call.set(proj=proj, dout=dy, du=du, ddelta=ddelta, states=kept)
            call.set_aligned(u=_rows(delta))
            if stateful:
                call.begin_with(None if d_last_state is None else d_last_state.unflatten(1, (2, -1)).transpose(0, 1))
            dA, dD, d_bias, _ = walk_back(call, dy, dproj, None, None)
            du, ddelta = _columns(du, like=u), _columns(ddelta, like=delta)
            dz = None if z is None else _columns(y, z, SILU_SLOPE, dout, like=z)
        dproj = dproj.sum(0, keepdim=True) if common else dproj
        dB, dC = dproj.permute(1, 0, 3, 2).chunk(2, dim=2)
        found = du, ddelta, dA.flatten(0, 1), dB, dC, dD.flatten(), dz, d_bias.flatten()
        inputs = u, delta, A, B, C, D, z, delta_bias
        return (*(None if t is None else g.to(t.dtype) for g, t in zip(found, inputs, strict=True)), None, None, None)


@torch.compiler.disable
def _on_cuda(*tensors, softplus, stateful):
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return _Scan.apply(*tensors, softplus, stateful, keep)


def _elsewhere(scan, u, delta, A, B, C, D, z, delta_bias, softplus):
    """By a scan (G, B, L, E / G) of other devices."""
    exact, groups = torch.promote_types(u.dtype, torch.float32), B.shape[1]
    delta = delta.to(exact)
    if delta_bias is not None:
        delta = delta + delta_bias.to(exact)[:, None]
    if softplus:
        delta = F.softplus(delta)

    def grouped(x):
        return x.unflatten(1, (groups, -1)).permute(1, 0, 3, 2)

    start = u.new_zeros(groups, u.shape[0], u.shape[1] // groups, A.shape[1], dtype=torch.float32)
    arguments = (
        grouped(u),
        grouped(delta),
        A.to(exact).unflatten(0, (groups, -1)),
        *(t.permute(1, 0, 3, 2) for t in (B, C)),
    )
    y, end = scan(*arguments, start)
    y = y.permute(1, 0, 3, 2).flatten(1, 2).to(exact)
    if D is not None:
        y = y + D.to(exact)[:, None] * u
    if z is not None:
        y = y * F.silu(z.to(exact))
    return y.to(u.dtype), end.transpose(0, 1).flatten(1, 2)


def selective_scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):
    """
    The selective scan of Mamba, with the arguments of mamba-ssm's function of this name.

    Args:
        u (`torch.Tensor` of shape `(B, E, L)`): input; float32, float16 or bfloat16. `delta`, `B`, `C` and `z` are
            converted to its type if they have another.
        delta (`torch.Tensor` of shape `(B, E, L)`): step size.
        A (`torch.Tensor` of shape `(E, N)`): state matrix, negative and real.
        B, C (`torch.Tensor` of shape `(B, N, L)` or `(B, G, N, L)`): of one group of channels, or of two, each with
            half of the channels.
        D (`torch.Tensor` of shape `(E,)`, *optional*): skip term.
        z (`torch.Tensor` of shape `(B, E, L)`, *optional*): the gate; the output is multiplied by its SiLU.
        delta_bias (`torch.Tensor` of shape `(E,)`, *optional*): added to `delta`.
        delta_softplus (`bool`): whether the step size is the softplus of that.
        return_last_state (`bool`): whether to return the last state too.

    Returns:
        `torch.Tensor` of shape `(B, E, L)` and the type of `u`; in memory channels first, but channels last where `u`
        or `z` is. With `return_last_state`, also the state after the last token, float32 `(B, E, N)`. Both are
        differentiable in all inputs. State, Δ and sums are float32.

    Raises:
        ValueError: for other shapes, and complex `A`.
    """
    B, C = (t.unsqueeze(1) if t.ndim == 3 else t for t in (B, C))
    _check(u, delta, A, B, C, D, z, delta_bias)
    tensors = (
        u,
        delta.to(u.dtype),
        A,
        B.to(u.dtype),
        C.to(u.dtype),
        D,
        None if z is None else z.to(u.dtype),
        delta_bias,
    )
    if u.shape[1] % 2 == 0 and unusable_reason(u.device, u.dtype) is None:
        out, last_state = _on_cuda(*tensors, softplus=delta_softplus, stateful=return_last_state)
    else:
        scan = simt_scan if simt_unusable_reason(u.device, u.dtype) is None else torch_scan
        out, last_state = _elsewhere(scan, *tensors, delta_softplus)
    return (out, last_state) if return_last_state else out


def _check(u, delta, A, B, C, D, z, delta_bias):
    if u.ndim != 3 or not u.is_floating_point():
        raise ValueError(f"`u` must have floating point numbers, (B, E, L); got {u.dtype}, {tuple(u.shape)}.")
    batch, channels, tokens = u.shape
    if A.is_complex() or A.ndim != 2:
        raise ValueError(f"`A` must be real, of the shape (E, N); got {A.dtype}, {tuple(A.shape)}.")
    if B.ndim != 4 or C.ndim != 4:
        raise ValueError(
            f"`B` and `C` must have the shape (B, N, L), or (B, G, N, L); got {tuple(B.shape)}, {tuple(C.shape)}."
        )
    groups, states = B.shape[1], A.shape[1]
    if groups not in (1, 2) or channels % groups:
        raise ValueError(f"`B` and `C` may have one group of channels or two; got {groups}, for {channels} channels.")
    matrix = batch, groups, states, tokens
    wanted = {"delta": (delta, u.shape), "A": (A, (channels, states)), "B": (B, matrix), "C": (C, matrix)}
    wanted |= {"D": (D, (channels,)), "z": (z, u.shape), "delta_bias": (delta_bias, (channels,))}
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and (tensor.shape != shape or tensor.device != u.device):
            raise ValueError(
                f"`{name}` must have the shape {tuple(shape)} on {u.device}, for `u` of the shape {tuple(u.shape)}; "
                f"got {tuple(tensor.shape)} on {tensor.device}."
            )
