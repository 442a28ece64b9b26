"""Context parallelism: one long clip over several processes, each with its share of the length."""

import functools
import math

import torch
import torch.distributed as dist
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from .selective_scan import ScanPart
from .tokens_videomamba import backward_order, checked_clips, class_token_index


class ContextParallel(nn.Module):
    """
    A classifier whose clips are cut along time, a part for each process of a group.

    Every process is given the same clips and labels and returns the same outputs as the model alone would. Between
    processes go the few tokens at the border that the convolution looks at, and the states that parts end with: per
    layer, two small all-gathers, on which no process waits on the host.

    Gradients are those of the model alone once they are averaged over the processes, as `DistributedDataParallel`
    does it around this module. Gradient checkpointing follows the model's own switch. With stochastic depth, all
    processes must draw the same numbers (`torch.manual_seed`).

    Args:
        model (`VideoMambaForVideoClassification`): on this process's device, with the same weights everywhere.
        group (`torch.distributed.ProcessGroup`, *optional*): the processes, in the order of their parts; all if not
            given.

    Raises:
        ValueError: for a backward scan other than `"spatiotemporal"`, or `"spatial"` without a class token; or
            for a model that merges steps.

    Example, started by `torchrun --nproc_per_node 4`:

    ```python
    >>> torch.distributed.init_process_group()
    >>> model = VideoMambaForVideoClassification.from_pretrained(folder).to(device)
    >>> logits = model.context_parallel()(clips).logits  # `clips` may be in host memory
    ```"""

    def __init__(self, model, group=None):
        super().__init__()
        config = model.config
        without_token = config.class_token_position == "none"
        if not (config.backward_scan == "spatiotemporal" or (config.backward_scan == "spatial" and without_token)):
            raise ValueError(
                "Context parallelism needs a model whose parts in time follow each other in both directions: "
                "`backward_scan='spatiotemporal'`, or `'spatial'` with `class_token_position='none'`; this model has "
                f"{config.backward_scan!r} and {config.class_token_position!r}."
            )
        if config.merge_layers:
            raise ValueError(
                "Context parallelism cuts clips along time and merges no steps, but this model has `merge_layers`="
                f"{list(config.merge_layers)}."
            )
        self.model = model
        self.group = group
        self.rank, self.processes = dist.get_rank(group), dist.get_world_size(group)

    def part(self, num_frames):
        """Which frames of a clip of so many this process looks at (`slice`): the others need not be decoded here."""
        tubelet = self.model.config.tubelet_size
        first, after = self._steps(num_frames // tubelet)
        return slice(first * tubelet, after * tubelet)

    def _steps(self, count):
        """The steps in time of this process's part: the first, and the first of the next part."""
        return [count * rank // self.processes for rank in (self.rank, self.rank + 1)]

    def forward(self, pixel_values, labels=None, interpolate_pos_encoding=False, num_frames=None):
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, num_frames, num_channels, height, width)`): whole clips, on
                any device; a process copies the frames of its part to its own.
            labels, interpolate_pos_encoding: as the model's.
            num_frames (`int`, *optional*): if `pixel_values` are the frames [`part`] of the clips alone, how many the
                whole clips have.

        Returns:
            [`~transformers.modeling_outputs.ImageClassifierOutput`]: `logits`, and `loss` if `labels` are given.

        Raises:
            ValueError: for clips that the model does not take, or with fewer steps in time than processes.
        """
        backbone, config = self.model.videomamba, self.model.config
        frames, grid = self._checked_part(pixel_values, interpolate_pos_encoding, num_frames)
        first, after = (step * grid[1] * grid[2] for step in self._steps(grid[0]))
        class_token = class_token_index(config, math.prod(grid)) - first if backbone.embeddings.has_class_token else -1
        has_it = 0 <= class_token < after - first
        embed = functools.partial(self.embed, frames, grid, class_token if has_it else None)
        hidden_states = backbone.encode(embed, grid)
        if backbone.embeddings.has_class_token:
            # Of any token and nothing, where it is not: all processes must take part in the backward pass.
            share = backbone.norm(hidden_states[:, class_token if has_it else 0]) * has_it
        else:
            pooled = min(math.prod(grid), (config.pooling_window or grid[0]) * grid[1] * grid[2])
            before = max(0, math.prod(grid) - pooled - first)  # tokens before the window
            share = backbone.norm(hidden_states)[:, before:].sum(dim=1, dtype=torch.float32) / pooled
        pooled = _Sum.apply(share, self.group).to(backbone.norm.weight.dtype)
        logits = self.model.classifier(pooled)
        loss = None
        if labels is not None:
            loss = self.model.loss_function(labels, logits, config)
        return ImageClassifierOutput(loss=loss, logits=logits)

    def _checked_part(self, pixel_values, interpolate_pos_encoding, num_frames):
        """This process's frames, and the tubelets of whole clips along time, height and width."""
        config, whole = self.model.config, pixel_values
        if num_frames is not None:
            wanted = self.part(num_frames)
            if pixel_values.ndim != 5 or pixel_values.shape[1] != wanted.stop - wanted.start:
                raise ValueError(
                    f"With `num_frames={num_frames}`, process {self.rank} of {self.processes} takes the frames "
                    f"{wanted.start} to {wanted.stop - 1} alone; got the shape {tuple(pixel_values.shape)}."
                )
            whole = pixel_values[:, :1].to("meta").expand(-1, num_frames, -1, -1, -1)
        whole, grid = checked_clips(config, whole, interpolate_pos_encoding)
        halo = config.conv_kernel - 1
        if grid[0] < self.processes or grid[1] * grid[2] < halo:
            raise ValueError(
                f"Clips of {grid[0]} steps in time, each of {grid[1] * grid[2]} tubelets, cannot be cut over "
                f"{self.processes} processes: each process needs a step, and a step needs {halo} tubelets or more."
            )
        return whole[:, self.part(whole.shape[1])] if num_frames is None else pixel_values, grid

    def embed(self, frames, grid, class_token):
        """As the model's, of this process's frames; the class token at an index among the tokens, if it is here."""
        embeddings, config = self.model.videomamba.embeddings, self.model.config
        tokens = embeddings.patch_embeddings(frames.to(self.model.device, non_blocking=True))
        steps = self._steps(grid[0])
        positions, token = embeddings.positions_for(grid, tokens)
        if positions is not None:
            first, after = (step * grid[1] * grid[2] for step in steps)
            tokens = tokens + positions[:, first:after]
        if class_token is not None:
            token = token.expand(tokens.shape[0], -1, -1)
            tokens = torch.cat([tokens[:, :class_token], token, tokens[:, class_token:]], dim=1)
        elif token is not None:
            tokens = tokens + 0 * token  # so that it has a gradient in every process
        order = backward_order(config, (steps[1] - steps[0], *grid[1:]), tokens.device)
        return tokens.float(), ScanPart(order, self.group)


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
