"""The references: the equations of the paper token by token, which never change for speed. Every backend is tested
against them. Letters in shapes and the layout of the parameters are those of `selective_scan.py`."""

import torch
import torch.nn.functional as F


def selective_scan_reference(u, delta, A, B, C, D, delta_bias, visits=None, dtype=torch.float64, start=None):
    """
    One direction's selective scan, token by token (paper, equations (1) to (3), with Mamba's B̄ = Δ B).

    Args:
        u (`torch.Tensor` of shape `(B, L, E)`): input sequence.
        delta (`torch.Tensor` of shape `(B, L, E)`): step size before bias and softplus.
        A (`torch.Tensor` of shape `(E, N)`): state matrix, negative.
        B (`torch.Tensor` of shape `(B, L, N)`): input matrix of each token.
        C (`torch.Tensor` of shape `(B, L, N)`): output matrix of each token.
        D (`torch.Tensor` of shape `(E,)`): skip term.
        delta_bias (`torch.Tensor` of shape `(E,)`): added to `delta` before the softplus.
        visits (`torch.LongTensor` of shape `(L,)`, *optional*): `visits[k]` is the token visited at step k; ascending
            if not given.
        dtype (`torch.dtype`, defaults to `torch.float64`): in which everything is computed.
        start (`torch.Tensor` of shape `(B, E, N)`, *optional*): the state before the first step; zero if not given.

    Returns:
        `torch.Tensor` of shape `(B, L, E)` and type `dtype`: the output of each token, at its own position; and the
        state after the last step, `(B, E, N)`.
    """
    u, delta, A, B, C, D, delta_bias = (t.to(dtype) for t in (u, delta, A, B, C, D, delta_bias))
    length = u.shape[1]
    visits = range(length) if visits is None else visits.tolist()
    delta = F.softplus(delta + delta_bias)
    state = u.new_zeros(u.shape[0], u.shape[2], A.shape[1]) if start is None else start.to(dtype)
    outputs = [None] * length
    for token in visits:
        step = delta[:, token, :, None]
        state = torch.exp(step * A) * state + step * B[:, token, None, :] * u[:, token, :, None]
        outputs[token] = (state * C[:, token, None, :]).sum(-1) + D * u[:, token]
    return torch.stack(outputs, dim=1), state


def bidirectional_selective_scan_reference(
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
    dtype=torch.float64,
):
    """
    The reference of [`bidirectional_selective_scan`], with the same arguments: one direction, then the other.

    Args:
        dtype (`torch.dtype`, defaults to `torch.float64`): in which everything is computed.

    Returns:
        `torch.Tensor` of shape `(B, L, E)` and type `dtype`; and the state it ends with, if `state` is given.
    """
    parameters = (conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)
    xz, *parameters = (t.to(dtype) for t in (xz, *parameters))
    x, z = xz.chunk(2, dim=-1)
    length, rank, state_size, taps = x.shape[1], dt_proj_weight.shape[2], A_log.shape[2], conv_weight.shape[2]
    conv, recurrent = (None, (None, None)) if state is None else state
    if conv is None:
        conv = x.new_zeros(2, x.shape[0], taps - 1, x.shape[2])
    forward = torch.arange(length, device=x.device)
    backward = forward.flip(0) if order is None else order.visits
    outputs, inputs_after, states_after = [], [], []
    for direction, visits in enumerate((forward, backward)):
        w_conv, b_conv, w_x, w_dt, b_dt, log_a, skip = (p[direction] for p in parameters)
        visited = torch.cat([conv[direction].to(dtype), x[:, visits]], dim=1)
        convolved = F.conv1d(visited.transpose(1, 2), w_conv[:, None], b_conv, groups=w_conv.shape[0])
        convolved = F.silu(convolved).transpose(1, 2)
        u = convolved[:, torch.argsort(visits)]
        time_step, B, C = (u @ w_x.T).split([rank, state_size, state_size], dim=-1)
        arguments = (u, time_step @ w_dt.T, -torch.exp(log_a), B, C, skip, b_dt, visits, dtype)
        y, after = selective_scan_reference(*arguments, start=recurrent[direction])
        outputs.append(y)
        inputs_after.append(visited[:, length:])
        states_after.append(after)
    out = F.silu(z) * (outputs[0] + outputs[1]) / 2
    return out if state is None else (out, (torch.stack(inputs_after), torch.stack(states_after)))


def unusable_reason(device, dtype):
    """Why this backend cannot run on `device` with activations of `dtype`, or None: it always can."""
    return None


def bidirectional_selective_scan(xz, *parameters, order=None, state=None):
    """The float32 reference as a backend, named `sequential`: a Python loop over tokens, to compare with."""
    found = bidirectional_selective_scan_reference(xz, *parameters, order=order, state=state, dtype=torch.float32)
    if state is None:
        return found.to(xz.dtype)
    out, (conv, recurrent) = found
    return out.to(xz.dtype), (conv.to(xz.dtype), recurrent)
