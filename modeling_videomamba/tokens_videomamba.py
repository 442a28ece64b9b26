"""
Between a clip and its tokens: which clips the model takes, where their tokens stand, in which order they are visited,
and how steps in time are merged. Functions of a config and a size; nothing here has weights.
"""

import functools
import math

import torch
import torch.nn.functional as F

from .configuration_videomamba import height_and_width, tubelet_grid, unmergeable_reason
from .selective_scan import ScanOrder
from .selective_scan_cuda_runtime import nobody_traces


def checked_clips(config, pixel_values, interpolate_pos_encoding=False, are_parts=False):
    """
    Refuse a batch of clips that the model would not understand.

    Args:
        config (`VideoMambaConfig`).
        pixel_values (`torch.Tensor` of shape `(B, T, C, H, W)`).
        interpolate_pos_encoding (`bool`): take clips of another length or frame size than the config's.
        are_parts (`bool`): take parts of streams: any number of whole tubelets.

    Returns:
        the clips `(B, T, C, H, W)`, and their tubelets along time, height and width, `tuple[int, int, int]`.
    """
    if not isinstance(pixel_values, torch.Tensor):
        raise ValueError(
            f"`pixel_values` must be a `torch.Tensor`, got {type(pixel_values).__name__}. Pass the frames through the "
            'model\'s video or image processor with `return_tensors="pt"` first.'
        )
    if pixel_values.is_nested:
        raise ValueError("`pixel_values` must be one dense tensor, got a nested one. Stack clips of one size.")
    if pixel_values.layout != torch.strided:
        raise ValueError(f"`pixel_values` must be dense, got the layout {pixel_values.layout}: call `to_dense()`.")
    if pixel_values.ndim == 4 and config.num_frames == 1:
        pixel_values = pixel_values[:, None]
    if pixel_values.ndim != 5:
        raise ValueError(
            "`pixel_values` must have 5 axes (batch, frames, channels, height, width), got the shape "
            f"{tuple(pixel_values.shape)}. A single clip needs a batch axis: `pixel_values[None]`. A model of one "
            "frame also takes images, (batch, channels, height, width)."
        )
    batch, num_frames, channels, height, width = pixel_values.shape
    if batch == 0:
        raise ValueError(f"`pixel_values` of shape {tuple(pixel_values.shape)} holds no clip.")
    if channels != config.num_channels:
        raise ValueError(
            f"`pixel_values` of shape {tuple(pixel_values.shape)} has {channels} channels on axis 2, the model "
            f"expects {config.num_channels}. The axes are (batch, frames, channels, height, width)."
        )
    if pixel_values.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        way = "Pass the frames through the model's video or image processor first."
        if pixel_values.is_floating_point():
            way = "Convert normalised frames: `pixel_values.to(torch.bfloat16)`."
        raise ValueError(
            "`pixel_values` must be normalised frames, floating point numbers of 16 bits or more, got "
            f"{pixel_values.dtype}. {way}"
        )
    expected = (num_frames if are_parts else config.num_frames, *height_and_width(config.image_size))
    grid = tubelet_grid(config, num_frames, height, width)
    if are_parts and num_frames % config.tubelet_size:
        raise ValueError(
            f"The part has {num_frames} frames, but a stream goes on by whole tubelets of {config.tubelet_size} "
            "frames. Keep what is left over for the next part."
        )
    if (num_frames, height, width) != expected and not interpolate_pos_encoding:
        raise ValueError(
            f"The clip has {num_frames} frames of {height} x {width} pixels, but the model was made for "
            f"{expected[0]} frames of {expected[1]} x {expected[2]}. Resample the clip, or pass "
            "`interpolate_pos_encoding=True`."
        )
    if 0 in grid:
        raise ValueError(
            f"The clip has {num_frames} frames of {height} x {width} pixels, less than one tubelet of "
            f"{config.tubelet_size} frames of {' x '.join(map(str, height_and_width(config.patch_size)))}."
        )
    if reason := unmergeable_reason(config, grid[0]):
        raise ValueError(f"The clip {reason}.")
    return pixel_values, grid


def cut_tubelets(pixel_values, tubelet):
    """
    Clips `(B, C, T, H, W)` to the pixels of their tubelets, of (frames, rows, columns) `tubelet`: `(B · n_t, n_h, n_w,
    frames · C · rows · columns)`. What does not fill a tubelet is left out.
    """
    frames, rows, columns = tubelet
    batch, channels, *size = pixel_values.shape
    n_t, n_h, n_w = (length // step for length, step in zip(size, tubelet, strict=True))
    pixels = pixel_values.transpose(1, 2)[:, : n_t * frames, :, : n_h * rows, : n_w * columns]
    # No more than six axes, which is what ExecuTorch's XNNPACK takes.
    pixels = pixels.reshape(batch * n_t, frames * channels, n_h, rows, n_w, columns)
    return pixels.permute(0, 2, 4, 1, 3, 5).flatten(3)


def class_token_index(config, num_patches):
    """Where the class token stands among `num_patches` tubelet tokens: before the first, or before the middle one."""
    return num_patches // 2 if config.class_token_position == "middle" else 0


def insert_class_token(config, tokens, class_token):
    """Tubelet tokens (B, n_t · n_h · n_w, D) with the class token (B, 1, D) in its place."""
    place = class_token_index(config, tokens.shape[1])
    return torch.cat([tokens[:, :place], class_token, tokens[:, place:]], dim=1)


def sinusoidal_positions(num_positions, dim):
    """
    Sine and cosine of each position at `dim / 2` frequencies, interleaved ("Attention is all you need", section 3.5).

    Returns:
        `torch.FloatTensor` of shape `(1, num_positions, dim)`, on the CPU, where there is float64.
    """
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2, device="cpu").double() / dim)
    angles = torch.arange(num_positions, device="cpu").double()[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[None, :, :dim].float()


def interpolate_positions(positions, grid, new_grid):
    """
    Learned position embeddings for another grid of tubelets: trilinear in time, height and width.

    Args:
        positions (`torch.Tensor` of shape `(1, n_t · n_h · n_w, D)`): of the tubelets alone, without a class token.
        grid, new_grid (`tuple[int, int, int]`): (n_t, n_h, n_w), theirs and the wanted one.

    Returns:
        `torch.Tensor` of shape `(1, new n_t · n_h · n_w, D)` and the type of `positions`.
    """
    volume = positions.unflatten(1, grid).permute(0, 4, 1, 2, 3)
    volume = F.interpolate(volume.float(), size=new_grid, mode="trilinear", align_corners=False)
    return volume.flatten(2).transpose(1, 2).to(positions.dtype)


def backward_order(config, grid, device=None):
    """
    The order in which the backward direction visits the tokens (paper, section 4.4 and figure 2 b).

    A class token stands in the mirrored place of this order, so that a first token, which sees nothing on the way
    forward, is visited last on the way back, whatever is reversed.

    Args:
        config (`VideoMambaConfig`).
        grid (`tuple[int, int, int]`): (n_t, n_h, n_w).
        device (`torch.device`, *optional*): of the order's tensors.

    Returns:
        `ScanOrder` of L tokens, or None for the full reversal.
    """
    if config.backward_scan == "spatiotemporal":
        return None
    place = None if config.class_token_position == "none" else class_token_index(config, math.prod(grid))
    kept = isinstance(device, torch.device) and device.type != "meta" and nobody_traces(())
    if kept and device.type == "cuda":
        kept = not torch.cuda.is_current_stream_capturing()  # a graph's tensors are the graph's own
    return (_kept_order if kept else _order)(config.backward_scan, tuple(grid), place, device)


def merge_steps(config, tokens, grid):
    """
    The mean of two neighbouring steps in time, tubelet by tubelet, in their place. The class token moves to where it
    stands among so many tokens.

    Args:
        config (`VideoMambaConfig`).
        tokens (`torch.Tensor` of shape `(B, L, D)`).
        grid (`tuple[int, int, int]`): (n_t, n_h, n_w) of the tubelets, with an even n_t.

    Returns:
        what goes into the layers from here on: the tokens, their `backward_order`, and the grid (n_t / 2, n_h, n_w).
    """
    has_class_token = config.class_token_position != "none"
    steps, *space = grid
    if has_class_token:
        place = class_token_index(config, math.prod(grid))
        before, class_token, after = tokens.tensor_split([place, place + 1], dim=1)
        tokens = torch.cat([before, after], dim=1) if place else after  # of a first token without a copy
    grid = steps // 2, *space
    tokens = tokens.unflatten(1, (grid[0], 2, -1)).mean(2).flatten(1, 2)
    if has_class_token:
        tokens = insert_class_token(config, tokens, class_token)
    return tokens, backward_order(config, grid, tokens.device), grid


def _order(reversal, grid, place, device):
    """The order of a reversal, with a class token at `place` or without one (None)."""
    frames, *space = grid
    patches = torch.arange(math.prod(grid), device=device).view(frames, math.prod(space))
    visits = patches.flip(1 if reversal == "spatial" else 0).flatten()
    if place is None:
        return ScanOrder(visits, visits, reversal, frames)  # a reversal is its own inverse
    step = visits.numel() - place
    return ScanOrder(_inserted(visits, step, place), _inserted(visits, place, step), reversal, frames, place)


@functools.lru_cache(maxsize=64)
def _kept_order(reversal, grid, place, device):
    """The same, made once for all models, threads and streams: no buffer, which others average, round and offload."""
    with torch.inference_mode(False):  # autograd saves no tensor that was made in it
        order = _order(reversal, grid, place, "cpu")
        # The copy is waited for, so that any stream may read it.
        visits = order.visits.to(device)
        return order._replace(visits=visits, places=visits if place is None else order.places.to(device))


def _inserted(permutation, index, number):
    """A permutation with one more number at an index, before which and above which the others make room."""
    moved = permutation + (permutation >= number)
    return torch.cat([moved[:index], moved.new_full((1,), number), moved[index:]])


__all__ = [
    "backward_order",
    "checked_clips",
    "class_token_index",
    "insert_class_token",
    "interpolate_positions",
    "merge_steps",
    "sinusoidal_positions",
]
