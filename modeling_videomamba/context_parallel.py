"""Context parallelism: one long clip over several processes, each with its share of the length."""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import ImageClassifierOutput

from .selective_scan_cuda_simt import selective_scan as cuda_selective_scan
from .selective_scan_cuda_simt import unusable_reason as cuda_unusable_reason
from .selective_scan_torch import causal_convolution, selection
from .selective_scan_torch import selective_scan as torch_selective_scan
from .tokens_videomamba import checked_clips, class_token_index


TINY_STEP = 2.0**-40  # decays nothing in float32, and multiplies without rounding


class ContextParallel(nn.Module):
    """
    A classifier whose clips are cut along time, a part for each process of a group.

    Every process is given the same clips and labels and returns the same outputs as the model alone would. Between
    processes go the few tokens at the border that the convolution looks at, and the states that parts end with: per
    layer, two small all-gathers. The scan walks each part twice, and is not fused with the projections.

    Gradients are those of the model alone once they are averaged over the processes, as `DistributedDataParallel`
    does it around this module. Gradient checkpointing follows the model's own switch. With stochastic depth, all
    processes must draw the same numbers (`torch.manual_seed`).

    Args:
        model (`VideoMambaForVideoClassification`): on this process's device, with the same weights everywhere.
        group (`torch.distributed.ProcessGroup`, *optional*): the processes, in the order of their parts; all if not
            given.

    Raises:
        ValueError: for a backward scan other than `"spatiotemporal"`.

    Example, started by `torchrun --nproc_per_node 4`:

    ```python
    >>> torch.distributed.init_process_group()
    >>> model = VideoMambaForVideoClassification.from_pretrained(folder).to(device)
    >>> logits = model.context_parallel()(clips).logits  # `clips` may be in host memory
    ```"""

    def __init__(self, model, group=None):
        super().__init__()
        if model.config.backward_scan != "spatiotemporal":
            raise ValueError(
                "Context parallelism needs a model with `backward_scan='spatiotemporal'`, because parts of the length "
                f"are scanned forward and in full reversal; this model has {model.config.backward_scan!r}."
            )
        self.model = model
        self.group = group
        self.rank, self.processes = dist.get_rank(group), dist.get_world_size(group)

    def forward(self, pixel_values, labels=None, interpolate_pos_encoding=False):
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, num_frames, num_channels, height, width)`): whole clips, on
                any device; a process copies the frames of its part to its own.
            labels, interpolate_pos_encoding: as the model's.

        Returns:
            [`~transformers.modeling_outputs.ImageClassifierOutput`]: `logits`, and `loss` if `labels` are given.

        Raises:
            ValueError: for clips that the model does not take, or with fewer steps in time than processes.
        """
        backbone, config = self.model.videomamba, self.model.config
        pixel_values, grid = checked_clips(config, pixel_values, interpolate_pos_encoding)
        hidden_states, class_token = self.embed(pixel_values, grid)
        for layer in backbone.layers:
            if layer.training and layer.gradient_checkpointing:
                hidden_states = checkpoint(self.layer, layer, hidden_states, use_reentrant=False)
            else:
                hidden_states = self.layer(layer, hidden_states)
        if backbone.embeddings.has_class_token:
            # Of any token and nothing, where it is not: all processes must take part in the backward pass.
            found = class_token is not None
            share = backbone.norm(hidden_states[:, class_token if found else 0]) * found
        else:
            share = backbone.norm(hidden_states).float().sum(dim=1) / math.prod(grid)
        pooled = _Sum.apply(share, self.group).to(backbone.norm.weight.dtype)
        logits = self.model.classifier(pooled)
        loss = None
        if labels is not None:
            loss = self.model.loss_function(labels, logits, config)
        return ImageClassifierOutput(loss=loss, logits=logits)

    def embed(self, pixel_values, grid):
        """This process's tokens (B, L of its part, D) in float32, and where the class token is among them, or None."""
        embeddings, config = self.model.videomamba.embeddings, self.model.config
        halo = config.conv_kernel - 1
        if grid[0] < self.processes or grid[1] * grid[2] < halo:
            raise ValueError(
                f"Clips of {grid[0]} steps in time, each of {grid[1] * grid[2]} tubelets, cannot be cut over "
                f"{self.processes} processes: each process needs a step, and a step needs {halo} tubelets or more."
            )
        first, after = (grid[0] * rank // self.processes for rank in (self.rank, self.rank + 1))
        frames = pixel_values[:, first * config.tubelet_size : after * config.tubelet_size]
        tokens = embeddings.patch_embeddings(frames.to(self.model.device, non_blocking=True))
        first, after = (step * grid[1] * grid[2] for step in (first, after))
        positions, class_token = embeddings.positions_for(grid, tokens)
        if positions is not None:
            tokens = tokens + positions[:, first:after]
        if class_token is None:
            return tokens.float(), None
        place = class_token_index(config, math.prod(grid)) - first
        if not 0 <= place < after - first:
            # So that it has a gradient in every process.
            return (tokens + 0 * class_token).float(), None
        class_token = class_token.expand(tokens.shape[0], -1, -1)
        return torch.cat([tokens[:, :place], class_token, tokens[:, place:]], dim=1).float(), place

    def layer(self, layer, hidden_states):
        return layer.residual(hidden_states, self.mix(layer.mixer, layer.norm(hidden_states)))

    def mix(self, mixer, hidden_states):
        """`VideoMambaMixer.forward` of a part."""
        x, z = mixer.in_proj(hidden_states).chunk(2, dim=-1)
        halo = mixer.conv_weight.shape[2] - 1
        before, after = self.neighbours(x, halo)
        convolved = causal_convolution(
            torch.stack([torch.cat([before, x], dim=1), torch.cat([x, after], dim=1).flip(1)]),
            mixer.conv_weight,
            mixer.conv_bias,
        )
        u = F.silu(convolved[:, :, halo:])
        delta, B, C = selection(u, mixer.x_proj_weight, mixer.dt_proj_weight, mixer.dt_proj_bias)
        y = self.scan(u, delta, -torch.exp(mixer.A_log.float()), B, C) + u * mixer.D.to(u.dtype)[:, None, None]
        return mixer.out_proj((y[0] + y[1].flip(1)) * (F.silu(z) / 2))

    def neighbours(self, x, count):
        """The last `count` tokens of the part before and the first ones of the part after; zeros at the ends."""
        borders = _AllGather.apply(torch.stack([x[:, :count], x[:, x.shape[1] - count :]]), self.group)
        outside = torch.zeros_like(borders[0, 0])
        before = borders[self.rank - 1, 1] if self.rank else outside
        after = borders[self.rank + 1, 0] if self.rank + 1 < self.processes else outside
        return before, after

    def scan(self, u, delta, A, B, C):
        """The scan of a part of each direction, (2, B, L, E) in the order of visits, from what parts before left."""
        dtype, u, B, C = u.dtype, u.float(), B.float(), C.float()
        on_gpu = cuda_unusable_reason(u.device, u.dtype) is None
        scan = cuda_selective_scan if on_gpu else torch_selective_scan
        # N tokens more stand for the states: read by C = 1 and written by B = 1, one state each.
        batch, states, channels = u.shape[1], A.shape[2], u.shape[3]
        one = torch.eye(states, device=u.device).expand(2, batch, -1, -1)
        none, silent = torch.zeros_like(one), u.new_zeros(2, batch, states, channels)

        def joined(*tokens):
            return torch.cat(tokens, dim=2)

        ends = scan(joined(u, silent), joined(delta, silent), A, joined(B, none), joined(C, one))[:, :, -states:]
        start = self.start(ends.transpose(2, 3), delta.sum(2), A).transpose(2, 3)
        u, delta = joined(start / TINY_STEP, u), joined(torch.full_like(silent, TINY_STEP), delta)
        return scan(u, delta, A, joined(one, B), joined(none, C))[:, :, states:].to(dtype)

    def start(self, ends, sums, A):
        """
        What a part begins with, (2, B, E, N): of all parts' `ends` from zero and sums of Δ, (2, B, E), those of the
        parts before; of the second direction, which comes from the other end, after.
        """
        gathered = _AllGather.apply(torch.cat([ends, sums[..., None]], dim=-1), self.group)
        state = [torch.zeros_like(ends[0]) for _ in range(2)]
        before = range(self.rank), range(self.processes - 1, self.rank, -1)
        for direction in range(2):
            for part in before[direction]:
                end, total = gathered[part, direction, ..., :-1], gathered[part, direction, ..., -1:]
                state[direction] = torch.exp(total * A[direction]) * state[direction] + end
        return torch.stack(state)


class _AllGather(torch.autograd.Function):
    """Each process's tensor, stacked; each gets back the sum of all gradients of its own."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, tensor.contiguous(), group=group)
        return torch.stack(gathered)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad[dist.get_rank(ctx.group)], None


class _Sum(torch.autograd.Function):
    """The sum over processes. All work out the same loss of it, and average its gradients: hence the factor."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.processes = dist.get_world_size(group)
        tensor = tensor.clone()
        dist.all_reduce(tensor, group=group)
        return tensor

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.processes, None


__all__ = ["ContextParallel"]
