"""The scan in plain PyTorch, for every device: chunks of the length run side by side, and pass their states on.

A Python loop over L tokens is slow because each step is a handful of tiny operations. Here the length is cut into
chunks of `CHUNK` tokens and the loop runs over the `CHUNK` positions, all chunks at once, twice: first from a zero
state, to learn what state each chunk ends with; then from the right state, which the chunks pass on in between (a
chunk's whole decay is exp(A ΣΔ)). The states of all tokens, (B, L, E, N), never exist together: the chunks are worked
off in tiles that fit the cache, and the backward pass recomputes them from the states at the chunk borders.
"""

import torch
import torch.nn.functional as F

from .selective_scan_operators import NAMESPACE


CHUNK = 32  # tokens a chunk


def unusable_reason(device, dtype):
    """Why this backend cannot run on `device` with activations of `dtype`, or None: it always can."""
    return None


def bidirectional_selective_scan(
    xz,
    conv_weight,
    conv_bias,
    x_proj_weight,
    dt_proj_weight,
    dt_proj_bias,
    A_log,
    D,
    order=None,
    state=None,
    scan=None,
    softplus=F.softplus,
):
    """
    See `selective_scan.bidirectional_selective_scan`. Both directions run as one batch with a leading axis of 2.
    `scan` takes the place of [`selective_scan`] if given, `softplus` that of PyTorch's.
    """
    x, z = xz.chunk(2, dim=-1)
    length, start = x.shape[1], None
    x = in_order_of_visits(x, order)
    if state is not None:
        before, start = state
        x = torch.cat([before, x], dim=2)
    u = F.silu(causal_convolution(x, conv_weight, conv_bias))
    if state is not None:
        u = u[:, :, u.shape[2] - length :]
    delta, B, C = selection(u, x_proj_weight, dt_proj_weight, dt_proj_bias, softplus)
    y = (scan or selective_scan)(u, delta, -torch.exp(A_log.float()), B, C, start)
    if state is not None:
        y, end = y
    y = y + u * D.to(u.dtype)[:, None, None]
    out = (y[0] + at_own_tokens(y[1], order)) * (F.silu(z) / 2)
    return out if state is None else (out, (x[:, :, length:].clone(), end))


def in_order_of_visits(x, order):
    """x (B, L, E) as each direction sees it (2, B, L, E): the backward one in the order of its visits."""
    return torch.stack([x, x.flip(1) if order is None else x[:, order.visits]])


def at_own_tokens(y, order):
    """What the backward direction gave, (B, L, ...) in the order of its visits, each at its own token."""
    return y.flip(1) if order is None else y[:, order.places]


def add_gradient_of_inputs_after(gradient, visits, d_xz, d_before):
    """
    Adds the gradient of the last inputs of the convolution, (2, B, K - 1, E), to those of what they were taken from.

    Args:
        gradient (`torch.Tensor` of shape `(2, B, K - 1, E)`).
        visits (`torch.LongTensor` of shape `(L,)`): of the backward direction; None for the full reversal.
        d_xz (`torch.Tensor` of shape `(B, L, 2E)`), d_before (`torch.Tensor` of shape `(2, B, K - 1, E)`): gradients
            of the tokens, and of the inputs before them. Changed in place.
    """
    length, count = d_xz.shape[1], gradient.shape[2]
    kept = max(0, count - length)  # of those before
    d_before[:, :, length:] += gradient[:, :, :kept]
    forward = torch.arange(length, device=d_xz.device)
    for tokens, of_tokens in zip((forward, forward.flip(0) if visits is None else visits), gradient, strict=True):
        d_xz[:, tokens[max(0, length - count) :], : d_xz.shape[2] // 2] += of_tokens[:, kept:]


def selection(u, x_proj_weight, dt_proj_weight, dt_proj_bias, softplus=F.softplus):
    """
    What the input selects: of u (2, B, L, E) the step sizes Δ (2, B, L, E), after the softplus and in float32, and B
    and C (2, B, L, N).
    """
    rank = dt_proj_weight.shape[2]
    projected = torch.matmul(u, x_proj_weight.to(u.dtype).transpose(1, 2)[:, None])
    time_step, B, C = projected.tensor_split([rank, (rank + projected.shape[-1]) // 2], dim=-1)
    delta = torch.matmul(time_step, dt_proj_weight.to(u.dtype).transpose(1, 2)[:, None])
    return softplus(delta.float() + dt_proj_bias.float()[:, None, None]), B, C


def causal_convolution(x, weight, bias):
    """
    Depthwise causal convolution over L of x (2, B, L, E) with weight (2, E, K) and bias (2, E): K shifted
    multiply-adds, so that the channels stay last.
    """
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    length, taps = x.shape[2], weight.shape[2]
    padded = F.pad(x, (0, 0, taps - 1, 0))
    out = bias[:, None, None]
    for k in range(taps):
        out = torch.addcmul(out, padded[:, :, k : k + length], weight[:, None, None, :, k])
    return out


@torch.library.custom_op(f"{NAMESPACE}::selective_scan", mutates_args=())
def _scan_op(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    start: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y, starts, end = _scan_forward(u, delta, A, B, C, start)
    return y.to(u.dtype), starts, end


def selective_scan(u, delta, A, B, C, start=None):
    """
    The recurrence h_k = exp(Δ_k A) h_{k-1} + Δ_k B_k u_k, y_k = C_k h_k in ascending order, for G groups at once.

    Args:
        u (`torch.Tensor` of shape `(G, B, L, E)`): input sequence.
        delta (`torch.FloatTensor` of shape `(G, B, L, E)`): step size after the softplus.
        A (`torch.FloatTensor` of shape `(G, E, N)`): state matrix, negative.
        B, C (`torch.Tensor` of shape `(G, B, L, N)`): input and output matrices.
        start (`torch.FloatTensor` of shape `(G, B, E, N)`, *optional*): the state before the first token; zero if not
            given.

    Returns:
        `torch.Tensor` of shape `(G, B, L, E)` and the type of `u`; and the state after the last token, if `start` is
        given.
    """
    y, _, end = _scan_op(u, delta, A, B, C, start)
    return y if start is None else (y, end)


@_scan_op.register_fake
def _(u, delta, A, B, C, start):
    groups, batch, length, channels = u.shape
    chunks = (length + CHUNK - 1) // CHUNK
    return (
        torch.empty_like(u, memory_format=torch.contiguous_format),
        u.new_empty((groups, batch * chunks, A.shape[2], channels), dtype=torch.float32),
        u.new_empty(0 if start is None else start.shape, dtype=torch.float32),
    )


def _setup_context(ctx, inputs, output):
    ctx.has_start = inputs[-1] is not None
    ctx.save_for_backward(*inputs[:-1], output[1])
    ctx.set_materialize_grads(False)  # nobody wants that of `starts`


def _backward(ctx, grad_y, grad_starts, grad_end):
    u, *rest = ctx.saved_tensors  # once: gradient checkpointing makes them anew
    grad_y = torch.zeros_like(u) if grad_y is None else grad_y
    grad_end = grad_end if ctx.has_start else None
    *gradients, d_start = _scan_backward_op(grad_y, grad_end, u, *rest)
    return *gradients, d_start if ctx.has_start else None


_scan_op.register_autograd(_backward, setup_context=_setup_context)


def _tiles(count, channels, state_size, device):
    """Slices of the chunks that are worked off together: as many as fit a core's cache, or many on a GPU, where each
    operation costs a launch."""
    budget = 2**25 if device.type == "cuda" else 2**19  # state elements of 4 bytes
    size = max(1, budget // (channels * state_size))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _chunked(x, length):
    """(G, B, L, ...) to float32 (G, B * chunks, CHUNK, ...), padded with zeros: a step with Δ = 0 changes no state."""
    groups, batch = x.shape[:2]
    x = F.pad(x.float(), (0, 0, 0, -length % CHUNK))
    return x.reshape(groups, -1, CHUNK, x.shape[-1])


def _pass_states(ends, decay, batch, start, reverse=False):
    """
    What each chunk starts from, (B * chunks, N, E), given what each ends with from zero, its whole decay, and what the
    first one starts from, (B, E, N), or None for zero.
    """
    ends, decay = (t.unflatten(0, (batch, -1)) for t in (ends, decay))
    starts = torch.zeros_like(ends)
    if start is not None:
        starts[:, -1 if reverse else 0] = start.mT
    order = range(ends.shape[1] - 1, 0, -1) if reverse else range(ends.shape[1] - 1)
    for chunk in order:
        following = chunk - 1 if reverse else chunk + 1
        torch.addcmul(ends[:, chunk], decay[:, chunk], starts[:, chunk], out=starts[:, following])
    return starts.flatten(0, 1)


def _steps(x, dim):
    """Views of x (T, CHUNK, ...) for each step, with an axis of 1 at `dim` to broadcast over states or channels."""
    return x.unsqueeze(dim).unbind(1)


def _advance(state, decay, delta, input, A, B):
    """One step of the recurrence, in place: state (T, N, E); `decay` is a buffer of the same shape."""
    torch.mul(delta, A, out=decay).exp_()
    return state.mul_(decay).addcmul_(input, B)


def _scan_forward(u, delta, A, B, C, start=None):
    batch, length, channels = u.shape[1:]
    A = A.transpose(1, 2).contiguous()  # (G, N, E): the channels, which are many, are the vectorised axis
    delta, B, C = (_chunked(t, length) for t in (delta, B, C))
    input = _chunked(u, length) * delta
    y = torch.empty_like(input)
    ends = input.new_empty(*input.shape[:2], A.shape[1], channels)
    starts = torch.zeros_like(ends)
    tiles = _tiles(input.shape[1], channels, A.shape[1], u.device)
    several = length > CHUNK
    for g in range(u.shape[0]):
        if several:
            for tile in tiles:
                state = ends[g, tile].zero_()
                decay = torch.empty_like(state)
                views = _steps(delta[g, tile], 2), _steps(input[g, tile], 2), _steps(B[g, tile], 3)
                for d, v, b in zip(*views, strict=True):
                    _advance(state, decay, d, v, A[g], b)
            whole_decay = torch.exp(delta[g].sum(1)[:, None] * A[g])
            starts[g] = _pass_states(ends[g], whole_decay, batch, None if start is None else start[g])
        elif start is not None:
            starts[g] = start[g].mT
        for tile in tiles:
            state = ends[g, tile].copy_(starts[g, tile])
            decay = torch.empty_like(state)
            views = [_steps(t[g, tile], 2) for t in (delta, input, C, y)]
            for d, v, c, out, b in zip(*views, _steps(B[g, tile], 3), strict=True):
                torch.bmm(c, _advance(state, decay, d, v, A[g], b), out=out)
    y = y.reshape(u.shape[0], batch, -1, channels)[:, :, :length].contiguous()
    # Steps past the end have changed nothing.
    end = y.new_empty(0) if start is None else ends.unflatten(1, (batch, -1))[:, :, -1].mT.contiguous()
    return y, starts, end


@torch.library.custom_op(f"{NAMESPACE}::selective_scan_backward", mutates_args=())
def _scan_backward_op(
    grad_y: torch.Tensor,
    grad_end: torch.Tensor | None,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    starts: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of u, delta, A, B, C and of the state before the first token."""
    groups, batch, length, channels = u.shape
    A_t = A.transpose(1, 2).contiguous()
    grad, u_c, delta_c, B_c, C_c = (_chunked(t, length) for t in (grad_y, u, delta, B, C))
    input = u_c * delta_c
    count, states = input.shape[1], A_t.shape[1]
    d_input, d_delta, d_B, d_C = (torch.empty_like(t) for t in (input, delta_c, B_c, C_c))
    d_A, d_start = torch.zeros_like(A_t), starts.new_empty(groups, batch, channels, states)
    steps = min(length, CHUNK)
    # All states of a tile are alive at once here, so it is smaller than the forward's.
    tiles = _tiles(count, channels, states * 4, u.device)
    for g in range(groups):
        # The adjoint of the state runs the other way: λ_k = exp(Δ_{k+1} A) λ_{k+1} + C_k ∂y_k. What is passed from a
        # chunk to the one before it is exp(Δ_first A) λ_first; `passed` holds what each chunk receives.
        passed, after = torch.zeros_like(starts[g]), None if grad_end is None else grad_end[g]
        if length > CHUNK:
            ends = torch.empty_like(passed)
            for tile in tiles:
                adjoint = ends[tile].zero_()
                decay = torch.empty_like(adjoint)
                for step in reversed(range(steps)):
                    adjoint.addcmul_(grad[g, tile, step, None], C_c[g, tile, step, :, None])
                    torch.mul(delta_c[g, tile, step, None], A_t[g], out=decay).exp_()
                    adjoint.mul_(decay)
            whole_decay = torch.exp(delta_c[g].sum(1)[:, None] * A_t[g])
            passed = _pass_states(ends, whole_decay, batch, after, reverse=True)
        elif after is not None:
            passed.copy_(after.mT)
        for tile in tiles:
            history = input.new_empty(steps + 1, *starts[g, tile].shape)
            history[0] = starts[g, tile]
            decay = torch.empty_like(history[0])
            for step in range(steps):
                torch.mul(delta_c[g, tile, step, None], A_t[g], out=decay).exp_()
                torch.mul(history[step], decay, out=history[step + 1])
                history[step + 1].addcmul_(input[g, tile, step, None], B_c[g, tile, step, :, None])
            adjoint = passed[tile]
            for step in reversed(range(steps)):
                torch.bmm(history[step + 1], grad[g, tile, step, :, None], out=d_C[g, tile, step, :, None])
                adjoint.addcmul_(grad[g, tile, step, None], C_c[g, tile, step, :, None])
                torch.bmm(B_c[g, tile, step, None], adjoint, out=d_input[g, tile, step, None])
                torch.bmm(adjoint, input[g, tile, step, :, None], out=d_B[g, tile, step, :, None])
                torch.mul(delta_c[g, tile, step, None], A_t[g], out=decay).exp_()
                adjoint.mul_(decay)
                through_decay = torch.mul(history[step], adjoint, out=decay)  # ∂/∂(Δ A)
                torch.sum(through_decay * A_t[g], dim=1, out=d_delta[g, tile, step])
                d_A[g] += (through_decay * delta_c[g, tile, step, None]).sum(0)
        d_start[g] = passed.unflatten(0, (batch, -1))[:, 0].mT  # each tile's adjoint has walked on to its first token
    d_delta[:, :, steps:] = 0
    d_delta.addcmul_(d_input, u_c)
    d_u = d_input.mul_(delta_c)

    def unchunk(x, like):
        return x.reshape(groups, batch, -1, x.shape[-1])[:, :, :length].to(like.dtype).contiguous()

    d_A = d_A.transpose(1, 2).contiguous()
    return unchunk(d_u, u), unchunk(d_delta, delta), d_A, unchunk(d_B, B), unchunk(d_C, C), d_start


@_scan_backward_op.register_fake
def _(grad_y, grad_end, u, delta, A, B, C, starts):
    like_inputs = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (u, delta, A, B, C))
    return *like_inputs, starts.new_empty(*u.shape[:2], u.shape[3], A.shape[2])
