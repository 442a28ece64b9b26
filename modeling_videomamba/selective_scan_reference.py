"""The references: the equations of the paper token by token, which never change for speed. Every backend is tested
against them. Letters in shapes and the layout of the parameters are those of `selective_scan.py`."""

import torch
import torch.nn.functional as F


def selective_scan_reference(u, delta, A, B, C, D, delta_bias, visits=None, dtype=torch.float64):
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

    Returns:
        `torch.Tensor` of shape `(B, L, E)` and type `dtype`: the output of each token, at its own position.
    """
    u, delta, A, B, C, D, delta_bias = (t.to(dtype) for t in (u, delta, A, B, C, D, delta_bias))
    length = u.shape[1]
    visits = range(length) if visits is None else visits.tolist()
    delta = F.softplus(delta + delta_bias)
    state = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    outputs = [None] * length
    for token in visits:
        step = delta[:, token, :, None]
        state = torch.exp(step * A) * state + step * B[:, token, None, :] * u[:, token, :, None]
        outputs[token] = (state * C[:, token, None, :]).sum(-1) + D * u[:, token]
    return torch.stack(outputs, dim=1)


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
    dtype=torch.float64,
):
    """
    The reference of [`bidirectional_selective_scan`], with the same arguments: one direction, then the other.

    Args:
        dtype (`torch.dtype`, defaults to `torch.float64`): in which everything is computed.

    Returns:
        `torch.Tensor` of shape `(B, L, E)` and type `dtype`.
    """
    parameters = (conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)
    xz, *parameters = (t.to(dtype) for t in (xz, *parameters))
    x, z = xz.chunk(2, dim=-1)
    length, rank, state_size = x.shape[1], dt_proj_weight.shape[2], A_log.shape[2]
    forward = torch.arange(length, device=x.device)
    backward = forward.flip(0) if order is None else order.visits
    outputs = []
    for direction, visits in enumerate((forward, backward)):
        w_conv, b_conv, w_x, w_dt, b_dt, log_a, skip = (p[direction] for p in parameters)
        visited = F.pad(x[:, visits].transpose(1, 2), (w_conv.shape[1] - 1, 0))
        convolved = F.silu(F.conv1d(visited, w_conv[:, None], b_conv, groups=w_conv.shape[0])).transpose(1, 2)
        u = convolved[:, torch.argsort(visits)]
        time_step, B, C = (u @ w_x.T).split([rank, state_size, state_size], dim=-1)
        outputs.append(
            selective_scan_reference(u, time_step @ w_dt.T, -torch.exp(log_a), B, C, skip, b_dt, visits, dtype)
        )
    return F.silu(z) * (outputs[0] + outputs[1]) / 2


def unusable_reason(device, dtype):
    """Why this backend cannot run on `device` with activations of `dtype`, or None: it always can."""
    return None


def bidirectional_selective_scan(xz, *parameters, order=None):
    """The float32 reference as a backend, named `sequential`: a Python loop over tokens, to compare with."""
    return bidirectional_selective_scan_reference(xz, *parameters, order=order, dtype=torch.float32).to(xz.dtype)
