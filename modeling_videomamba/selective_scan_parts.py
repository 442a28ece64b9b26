"""
A sequence cut over processes: each scans its part, and gets from the others what each direction begins with.

A scan is linear in the state that it begins with. So the parts are first walked from zero, all at once; what each
ends with, and how much of what it began with is left by then, exp(A ΣΔ), goes to all processes in one all-gather; and
each works out what its part begins with. Before that, the last inputs of the convolution go to the part after in
another. Adjoint states and the gradients of those inputs go the other way.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from .selective_scan_torch import causal_convolution, in_order_of_visits, selection


class ScanPart:
    """
    This process's part of a sequence whose other parts the other processes of a group scan at the same time.

    Args:
        order (`ScanOrder`, *optional*): in which the backward direction visits the tokens of this part, after those of
            all parts before it. If not given, the full reversal, which begins with the last token of the last part.
        group (`torch.distributed.ProcessGroup`, *optional*): the processes, in the order of their parts; all if not
            given. No process waits on the host for another, if the group's backend does not, as NCCL.
    """

    def __init__(self, order=None, group=None):
        self.order, self.group = order, group
        self.rank, self.processes = dist.get_rank(group), dist.get_world_size(group)

    def gather(self, tensor):
        """Every process's tensor, stacked along a new first axis. Gradients go through it."""
        return _AllGather.apply(tensor, self.group)

    def sources(self, adjoint=False):
        """For each direction the processes of the parts before this one (adjoint: after it), the farthest first."""
        lower, higher = list(range(self.rank)), list(range(self.processes - 1, self.rank, -1))
        first, last = (higher, lower) if adjoint else (lower, higher)
        return first, last if self.order is None else first

    def from_neighbour(self, tensor, adjoint=False):
        """What the part before has of a tensor with an axis of both directions first (adjoint: after); or zeros."""
        gathered = self.gather(tensor)
        sources = enumerate(self.sources(adjoint))
        return torch.stack([gathered[ranks[-1], i] if ranks else _nothing_of(gathered) for i, ranks in sources])

    def start(self, ends, sums, A_log, adjoint=False):
        """
        What each direction begins with.

        Args:
            ends (`torch.FloatTensor` of shape `(2, B, E, N)`): what it ends with in this part if it begins with zero;
                adjoint: the adjoint state before this part, if that after it were zero.
            sums (`torch.FloatTensor` of shape `(2, B, E)`): over the part, of Δ. Two processes do not need them.
            A_log (`torch.Tensor` of shape `(2, E, N)`).
            adjoint (`bool`): go against the order of visits.

        Returns:
            `torch.FloatTensor` of shape `(2, B, E, N)`.
        """
        if self.processes > 2:
            gathered = self.gather(torch.cat([ends, sums[..., None]], dim=-1))
            ends, sums = gathered.split([gathered.shape[-1] - 1, 1], dim=-1)
            decay = torch.exp(sums * -torch.exp(A_log.float())[:, None])
        else:
            ends = self.gather(ends)
        states = []
        for direction, ranks in enumerate(self.sources(adjoint)):
            state = ends[ranks[0], direction] if ranks else _nothing_of(ends)
            for rank in ranks[1:]:
                state = torch.addcmul(ends[rank, direction], decay[rank, direction], state)
            states.append(state)
        return torch.stack(states)


def _nothing_of(gathered):
    """Zeros, through which the backward pass still comes by: all processes must take part in its collectives."""
    return gathered[0, 0].clone().zero_()


def last_inputs(x, count, order):
    """The last `count` inputs of the convolution (2, B, count, E) of each direction, of x (B, L, E)."""
    first = x.shape[1] - count
    return torch.stack([x[:, first:], x[:, :count].flip(1) if order is None else x[:, order.visits[first:]]])


def scan_part(scan, part, xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D):
    """
    `selective_scan.bidirectional_selective_scan` of a `ScanPart`, by two scans of a backend that begins with a state
    and knows nothing of processes: from zero for the states that the others want, and once more from what it got.
    """
    parameters = conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D
    x, count, order = xz[..., : xz.shape[2] // 2], conv_weight.shape[2] - 1, part.order
    before, sums = part.from_neighbour(last_inputs(x, count, order)), None
    zero = torch.zeros(2, x.shape[0], *A_log.shape[1:], device=x.device)
    _, (_, ends) = scan(xz, *parameters, order=order, state=(before, zero))
    if part.processes > 2:
        u = torch.cat([before, in_order_of_visits(x, order)], dim=2)
        u = F.silu(causal_convolution(u, conv_weight, conv_bias))[:, :, count:]
        sums = selection(u, x_proj_weight, dt_proj_weight, dt_proj_bias)[0].sum(2)
    start = part.start(ends, sums, A_log)
    return scan(xz, *parameters, order=order, state=(before, start))[0]


class _AllGather(torch.autograd.Function):
    """Each process's tensor, stacked; each gets back the sum of all gradients of its own."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        gathered = tensor.new_empty(dist.get_world_size(group), *tensor.shape)
        # Named anew in PyTorch 2.14. Gloo wants the parts one after the other, not stacked.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(gathered.flatten(), tensor.flatten(), group=group)
        return gathered

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad[dist.get_rank(ctx.group)], None


__all__ = ["ScanPart", "last_inputs", "scan_part"]
