"""
What a stream carries from one part to the next: the states that the scans end with, and the mean that is classified.

transformers' own cache for linear attention (`LinearAttentionLayer` in 5.24) does not fit: it lays the convolution's
inputs out along its last axis, which would turn them around at each step, writes states in place also where gradients
go through them, and neither starts one row of a batch anew nor moves between devices.
"""

import torch
import torch.nn.functional as F

from .configuration_videomamba import unstreamable_reason
from .selective_scan import ScanState


def continued_cache(model, cache, use_cache, batch_size):
    """The cache that a model's call goes on from: the one that it was given, checked, or a new one."""
    if cache is not None and use_cache is False:
        raise ValueError("A `cache` was given with `use_cache=False`: leave out one of the two.")
    if model.training and torch.is_grad_enabled() and any(layer.gradient_checkpointing for layer in model.layers):
        raise ValueError(
            "Parts of streams cannot be trained with gradient checkpointing, which runs each layer twice and so would "
            "change its state twice. Call `model.gradient_checkpointing_disable()`, or train on whole clips."
        )
    if cache is None:
        return VideoMambaCache(model.config, batch_size, model.device, model.dtype)
    if not isinstance(cache, VideoMambaCache):
        raise ValueError(f"`cache` must be a `VideoMambaCache`, got {type(cache).__name__}: take the model's own.")
    if len(cache.states) != len(model.layers):
        raise ValueError(f"The cache is of {len(cache.states)} layers, but the model has {len(model.layers)}.")
    if cache.steps.shape[0] != batch_size:  # `len` would make the size of an exported batch a constant
        raise ValueError(f"The cache is of {len(cache.steps)} streams, but {batch_size} parts were given.")
    return cache


def pool_steps(features, window=None):
    """`VideoMambaCache.pool` of streams that begin with these steps."""
    length = 1 if window is None else window - 1
    line = F.pad(features.to(torch.promote_types(features.dtype, torch.float32)), (0, 0, length, 0))
    counts = torch.arange(1, features.shape[1] + 1, device=features.device)[None]
    return _means(_sums(line, window)[0], counts, window)


def _sums(line, window):
    """Of features (B, kept + n_t, D): the sums after each new step (B, n_t, D), and what to keep for the next ones."""
    if window is None:
        sums = line.cumsum(1)
        return sums[:, 1:], sums[:, -1:]
    # No differences of running sums, which would lose digits in an hour.
    return line.unfold(1, window, 1).sum(-1), line[:, line.shape[1] - window + 1 :]


def _means(sums, counts, window):
    return sums / (counts if window is None else counts.clamp(max=window))[..., None]


class VideoMambaCache:
    """
    The state of a batch of streams, of a size that does not grow with their length.

    Made by the model's first call with `use_cache=True`, and given to the next as `cache`, which changes it. Copied by
    `copy.deepcopy`, saved by `torch.save(cache.state_dict(), file)`.

    Attributes:
        states (`list[ScanState]`): of each layer, see [`ScanState`].
        steps (`torch.LongTensor` of shape `(B,)`): steps in time (tubelets) that each stream has seen.
        features (`torch.FloatTensor`): the sum `(B, 1, D)` of the features of all steps seen; if the config has a
            `pooling_window` W, those of the last steps, `(B, W - 1, D)`, the oldest first, zeros before the beginning.
    """

    def __init__(self, config, batch_size, device=None, dtype=None):
        """Streams that have seen nothing. `dtype` is the type of the model's activations."""
        if reason := unstreamable_reason(config):
            raise ValueError(f"This model takes whole clips, and no cache: {reason}.")
        inner, taps = config.intermediate_size, config.conv_kernel - 1
        self.window = config.pooling_window
        self.states = [
            ScanState(
                torch.zeros(2, batch_size, taps, inner, device=device, dtype=dtype),
                torch.zeros(2, batch_size, inner, config.state_size, device=device, dtype=torch.float32),
            )
            for _ in range(config.num_hidden_layers)
        ]
        self.steps = torch.zeros(batch_size, dtype=torch.long, device=device)
        length = 1 if self.window is None else self.window - 1
        self.features = torch.zeros(batch_size, length, config.hidden_size, device=device, dtype=torch.float32)

    def update(self, layer_idx, state):
        """Keeps what a layer's scan ended with."""
        if torch.is_grad_enabled() or any(tensor.requires_grad for tensor in self.states[layer_idx]):
            self.states[layer_idx] = ScanState(*state)
            return
        for tensor, new in zip(self.states[layer_idx], state, strict=True):
            tensor.copy_(new)

    def pool(self, features):
        """
        Takes up the features of the next steps.

        Args:
            features (`torch.Tensor` of shape `(B, n_t, D)`): of each step, the mean of its tokens.

        Returns:
            `torch.FloatTensor` of shape `(B, n_t, D)`: for each step the mean over all steps seen, or over the last
            `pooling_window` of them.
        """
        line = torch.cat([self.features, features.float()], dim=1)
        counts = self.steps[:, None] + torch.arange(1, features.shape[1] + 1, device=features.device)
        sums, kept = _sums(line, self.window)
        self._keep({"steps": counts[:, -1], "features": kept})
        return _means(sums, counts, self.window)

    def reset(self, rows=None):
        """
        Lets streams begin anew.

        Args:
            rows (`list[int]`, *optional*): which of the batch, or for each whether it does; all by default.
        """
        rows = torch.arange(len(self.steps), device=self.steps.device)[slice(None) if rows is None else rows]
        self._keep({name: tensor.index_fill(_batch_axis(name), rows, 0) for name, tensor in self.state_dict().items()})

    def to(self, device):
        """This cache, moved to another device."""
        self._set({name: tensor.to(device) for name, tensor in self.state_dict().items()})
        return self

    def detach(self):
        """This cache, through which no gradients go any more: truncated backpropagation through time."""
        self._set({name: tensor.detach() for name, tensor in self.state_dict().items()})
        return self

    def state_dict(self):
        """`dict[str, torch.Tensor]`: the tensors by name, not copied."""
        found = {"steps": self.steps, "features": self.features}
        for index, (conv, recurrent) in enumerate(self.states):
            found |= {f"states.{index}.conv": conv, f"states.{index}.recurrent": recurrent}
        return found

    def load_state_dict(self, state_dict):
        """
        Goes on where another cache of this model was, for as many streams.

        Raises:
            ValueError: if there are other tensors than this cache has, or tensors of other shapes.
        """
        own = self.state_dict()
        shapes, wanted = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (state_dict, own))
        if shapes != wanted:
            differ = sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name))
            raise ValueError(
                f"The saved cache is of another model or number of streams: {differ[0]!r} has the shape "
                f"{shapes.get(differ[0])}, but {wanted.get(differ[0])} was expected."
            )
        self._keep({name: state_dict[name].to(tensor.device, tensor.dtype, copy=True) for name, tensor in own.items()})

    def _keep(self, tensors):
        """New values: in place, at the addresses that a CUDA graph knows, unless gradients may go through them."""
        own = self.state_dict()
        if torch.is_grad_enabled() or any(own[name].requires_grad for name in tensors):
            return self._set(tensors)
        for name, tensor in tensors.items():
            own[name].copy_(tensor)

    def _set(self, tensors):
        for name, tensor in tensors.items():
            if name.startswith("states."):
                _, index, part = name.split(".")
                self.states[int(index)] = self.states[int(index)]._replace(**{part: tensor})
            else:
                setattr(self, name, tensor)


def _batch_axis(name):
    return 1 if name.startswith("states.") else 0


__all__ = ["VideoMambaCache", "continued_cache", "pool_steps"]
