"""
What a model says of a clip besides its label: Delta maps (paper, section 5.6 and figure 4) and reading maps.

A reading map takes each layer as a linear function of its tokens ("The Hidden Attention of Mamba Models", Ali et al.
2024); the functions here write the model's norm, mixer and layer so.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.utils import ModelOutput

from .cache_videomamba import pool_steps
from .selective_scan_torch import at_own_tokens, causal_convolution, in_order_of_visits, selection, selective_scan
from .tokens_videomamba import backward_order, checked_clips, class_token_index, merge_steps


@dataclass
class VideoMambaDeltaMaps(ModelOutput):
    """
    Step sizes Δ of chosen layers, mean over their channels.

    Args:
        maps (`tuple(torch.FloatTensor)`):
            For each layer `(B, 2, n_t, n_h, n_w)`: forward and backward direction, and the grid of tubelets.
        class_token (`tuple(torch.FloatTensor)`, *optional*):
            For each layer `(B, 2)`, if the model has a class token.
    """

    maps: tuple[torch.FloatTensor, ...] | None = None
    class_token: tuple[torch.FloatTensor, ...] | None = None


class VideoMambaDeltaMapsMixin:
    """`delta_maps` of a backbone, or of a model around it."""

    @torch.no_grad()
    def delta_maps(self, pixel_values, layers=None, interpolate_pos_encoding=False) -> VideoMambaDeltaMaps:
        r"""
        The step sizes Δ with which layers take up each token (paper, section 5.6 and figure 4): a token of a large Δ
        replaces what the state held, one of a small Δ is passed over.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, num_frames, num_channels, height, width)`):
                Normalised frames.
            layers (`list[int]`, *optional*):
                Which layers, counted from 0, or from the last one if negative; all by default.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `False`):
                Take clips of another length or resolution than the config's.

        Returns:
            [`VideoMambaDeltaMaps`]: in the order of `layers`, the mean over the channels of Δ after its softplus, for
            each direction and tubelet, in float32; the class token's apart. Where steps are merged, each tubelet has
            the Δ of the token that it went into.

        Raises:
            ValueError: if there is no such layer, or for clips that the model does not take.
        """
        backbone = self.base_model
        depth = len(backbone.layers)
        chosen = list(range(depth) if layers is None else layers)
        if not all(isinstance(index, int) and -depth <= index < depth for index in chosen):
            raise ValueError(f"`layers` must list integers from {-depth} to {depth - 1}, got {layers!r}.")
        chosen = [index % depth for index in chosen]
        pixel_values, grid = checked_clips(self.config, pixel_values, interpolate_pos_encoding)
        steps = grid[0]
        hidden_states = backbone.embeddings(pixel_values, grid).float()
        order = backward_order(self.config, grid, hidden_states.device)
        found = {}
        for index, layer in enumerate(backbone.layers[: max(chosen, default=-1) + 1]):
            if index in (self.config.merge_layers or ()):
                hidden_states, order, grid = merge_steps(self.config, hidden_states, grid)
            if index in chosen:
                delta = step_sizes(layer.mixer, layer.norm(hidden_states), order).transpose(0, 1)
                class_token, tubelets = split_class_token(self.config, delta)
                tubelets = tubelets.unflatten(-1, grid).repeat_interleave(steps // grid[0], dim=2)
                found[index] = tubelets, class_token.squeeze(-1)
            hidden_states = hidden_states + layer.update(hidden_states, order)
        maps, class_token = (tuple(found[index][part] for index in chosen) for part in (0, 1))
        has_class_token = self.config.class_token_position != "none"
        return VideoMambaDeltaMaps(maps=maps, class_token=class_token if has_class_token else None)


class VideoMambaReadingMapsMixin(VideoMambaDeltaMapsMixin):
    """The maps of a classifier."""

    @torch.no_grad()
    def reading_maps(self, pixel_values, labels=None, interpolate_pos_encoding=False):
        r"""
        What each tubelet contributed to a label's logit.

        Given Δ, B and C, a selective scan is linear in its input ("The Hidden Attention of Mamba Models", Ali et al.
        2024), and given the gates, the sigmoid in SiLU(x) = x · sigmoid(x) and the scales of the norms, so is all
        between the tokens and the logit: it is a sum over the tokens, and over the biases. One adjoint walk through
        the layers, on the `torch` backend and one layer at a time, gives each token's share. A layer that adds the
        same whatever its input shows nowhere in it, and neither does how a token acts on Δ, B, C, gates and norms. The
        model is taken as in evaluation, without stochastic depth.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, num_frames, num_channels, height, width)`):
                Normalised frames.
            labels (`torch.LongTensor` of shape `(B,)`, *optional*):
                The label of each clip that is asked about; the predicted one by default.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `False`):
                Take clips of another length or resolution than the config's.

        Returns:
            `torch.FloatTensor` of shape `(B, n_t, n_h, n_w)`: what each tubelet with its position adds to the logit,
            or takes from it if negative.

        Raises:
            ValueError: if there is no such label, or for clips that the model does not take.
        """
        backbone = self.base_model
        pixel_values, grid = checked_clips(self.config, pixel_values, interpolate_pos_encoding)
        last = backbone.embeddings(pixel_values, grid).float()
        order, clip_grid = backward_order(self.config, grid, last.device), grid
        walked = []  # linear functions, each with what went into it
        for index, layer in enumerate(backbone.layers):
            if index in (self.config.merge_layers or ()):
                walked.append((lambda tokens, grid=grid: merge_steps(self.config, tokens, grid)[0], last))
                last, order, grid = merge_steps(self.config, last, grid)
            walked.append((functools.partial(linear_layer, layer, order=order), last))
            last = last + layer.update(last, order)
        with torch.enable_grad():
            last = last.detach().requires_grad_()
            normed = linear_norm(backbone.norm, last)
            if self.config.class_token_position == "none":
                steps = normed.unflatten(1, (grid[0], -1)).mean(2)
                pooled = pool_steps(steps, self.config.pooling_window)[:, -1].to(normed.dtype)
            else:
                pooled = normed[:, class_token_index(self.config, math.prod(grid))]
            logits = self.classifier(pooled)
            labels = logits.argmax(-1) if labels is None else _checked_labels(labels, logits)
            (adjoint,) = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), last)
            for linear, hidden_states in reversed(walked):
                hidden_states = hidden_states.detach().requires_grad_()
                (adjoint,) = torch.autograd.grad(linear(hidden_states), hidden_states, adjoint)
        _, tubelets = split_class_token(self.config, (adjoint * walked[0][1]).sum(-1))
        return tubelets.unflatten(-1, clip_grid)


def step_sizes(mixer, hidden_states, order=None):
    """Mean over the channels of a mixer's Δ, of normed tokens (B, L, D): (2, B, L) in float32, at their own tokens."""
    x, _ = mixer.in_proj(hidden_states).chunk(2, dim=-1)
    u = F.silu(causal_convolution(in_order_of_visits(x, order), mixer.conv_weight, mixer.conv_bias))
    delta, _, _ = selection(u, mixer.x_proj_weight, mixer.dt_proj_weight, mixer.dt_proj_bias)
    forward, backward = delta.mean(-1)
    return torch.stack([forward, at_own_tokens(backward, order)])


def linear_layer(layer, hidden_states, order=None):
    """What a layer gives out, (B, L, D), as a linear function of its tokens; without stochastic depth."""
    return hidden_states + linear_mixer(layer.mixer, linear_norm(layer.norm, hidden_states), order)


def linear_norm(norm, hidden_states):
    """What a norm gives out, with the scale that it finds held fixed."""
    scale = torch.rsqrt(hidden_states.square().mean(-1, keepdim=True) + norm.eps).detach()
    return (hidden_states * scale * norm.weight.float()).to(norm.weight.dtype)


def linear_mixer(mixer, hidden_states, order=None):
    """
    What a mixer gives out, linear in its tokens but for the bias of the convolution: what depends on the input
    besides, Δ, B, C, the gate and the sigmoid inside the convolution's SiLU, is held fixed.
    """
    x, z = mixer.in_proj(hidden_states).chunk(2, dim=-1)
    convolved = causal_convolution(in_order_of_visits(x, order), mixer.conv_weight, mixer.conv_bias)
    u = convolved * torch.sigmoid(convolved).detach()
    delta, B, C = selection(u.detach(), mixer.x_proj_weight, mixer.dt_proj_weight, mixer.dt_proj_bias)
    y = selective_scan(u, delta, -torch.exp(mixer.A_log.float()), B, C) + u * mixer.D.to(u.dtype)[:, None, None]
    return mixer.out_proj((y[0] + at_own_tokens(y[1], order)) * (F.silu(z) / 2).detach())


def split_class_token(config, tokens):
    """Values of all tokens (..., L): the class token's (..., 1), empty without one, and the tubelets'."""
    has_class_token = int(config.class_token_position != "none")
    place = class_token_index(config, tokens.shape[-1] - has_class_token)
    before, class_token, after = tokens.tensor_split([place, place + has_class_token], dim=-1)
    return class_token, torch.cat([before, after], dim=-1)


def _checked_labels(labels, logits):
    labels = torch.as_tensor(labels, device=logits.device)
    batch, num_labels = logits.shape
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if not whole or labels.shape != (batch,) or not ((0 <= labels) & (labels < num_labels)).all():
        raise ValueError(
            f"`labels` must hold an integer from 0 to {num_labels - 1} for each of {batch} clips, got {labels}."
        )
    return labels.long()


__all__ = ["VideoMambaDeltaMaps", "VideoMambaDeltaMapsMixin", "VideoMambaReadingMapsMixin"]
