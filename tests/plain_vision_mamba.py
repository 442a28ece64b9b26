"""
Vision Mamba and OpenGVLab's VideoMamba as plain as can be: the references of the conversion tests.

They read the published tensor names and use nothing of this package: one clip at a time, a sequential scan.
"""

import math

import torch
import torch.nn.functional as F


def scan(x, z, weights, prefix, b):
    """One direction of a mixer on x and its gate z (L, E); `b` is "" or "_b", the suffix of its tensors' names."""
    w = {name: weights[f"{prefix}{name}"] for name in (f"conv1d{b}.weight", f"conv1d{b}.bias", f"x_proj{b}.weight")}
    length, inner = x.shape
    taps = w[f"conv1d{b}.weight"][:, 0]
    padded = torch.cat([x.new_zeros(3, inner), x])
    x = F.silu(sum(padded[k : k + length] * taps[:, k] for k in range(4)) + w[f"conv1d{b}.bias"])
    rank = weights[f"{prefix}dt_proj{b}.weight"].shape[1]
    delta, into, out = (x @ w[f"x_proj{b}.weight"].T).split([rank, 16, 16], dim=1)
    delta = F.softplus(delta @ weights[f"{prefix}dt_proj{b}.weight"].T + weights[f"{prefix}dt_proj{b}.bias"])
    decay = -weights[f"{prefix}A{b}_log"].exp()
    state, y, step = x.new_zeros(inner, 16), torch.empty_like(x), delta * x
    for t in range(length):
        state = (delta[t, :, None] * decay).exp() * state + step[t, :, None] * into[t]
        y[t] = state @ out[t]
    return (y + weights[f"{prefix}D{b}"] * x) * F.silu(z)


def encode(tokens, weights, divide):
    """Tokens (L, D) through all layers and the final norm; the directions' sum is divided by `divide`."""

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers."))
    for i in range(depth):
        mixer = f"layers.{i}.mixer."
        x, z = (norm(tokens, weights[f"layers.{i}.norm.weight"]) @ weights[f"{mixer}in_proj.weight"].T).chunk(2, dim=1)
        forward = scan(x, z, weights, mixer, "")
        backward = scan(x.flip(0), z.flip(0), weights, mixer, "_b").flip(0)
        tokens = tokens + (forward + backward) / divide @ weights[f"{mixer}out_proj.weight"].T
    return norm(tokens, weights["norm_f.weight" if "norm_f.weight" in weights else "norm.weight"])


def vision_mamba(image, weights):
    """Logits of an image (3, H, W); the class token stands before the middle patch, in `pos_embed` too."""
    kernel = weights["patch_embed.proj.weight"]
    patches = F.conv2d(image[None], kernel, weights["patch_embed.proj.bias"], stride=kernel.shape[-1])[0].flatten(1).T
    middle = len(patches) // 2
    tokens = torch.cat([patches[:middle], weights["cls_token"][0], patches[middle:]]) + weights["pos_embed"][0]
    return encode(tokens, weights, divide=2)[middle] @ weights["head.weight"].T + weights["head.bias"]


def opengvlab_videomamba(clip, weights):
    """Logits of a clip (T, 3, H, W), or the normed class token if there is no head: it stands first."""
    kernel = weights["patch_embed.proj.weight"]
    embed = F.conv3d if kernel.ndim == 5 else F.conv2d
    clip = clip.transpose(0, 1) if kernel.ndim == 5 else clip[0]
    stride = (kernel.shape[2], *kernel.shape[3:]) if kernel.ndim == 5 else kernel.shape[2:]
    frames = embed(clip[None], kernel, weights["patch_embed.proj.bias"], stride=stride)[0]
    frames = frames if kernel.ndim == 5 else frames[:, None]
    tokens = [weights["cls_token"][0, 0] + weights["pos_embed"][0, 0]]
    for t in range(frames.shape[1]):
        for s, patch in enumerate(frames[:, t].flatten(1).T):
            time = weights["temporal_pos_embedding"][0, t] if "temporal_pos_embedding" in weights else 0
            tokens.append(patch + weights["pos_embed"][0, 1 + s] + time)
    pooled = encode(torch.stack(tokens), weights, divide=1)[0]
    return pooled @ weights["head.weight"].T + weights["head.bias"] if "head.weight" in weights else pooled


def random_weights(kind, hidden_size=192, depth=24, grid=14, frames=8, labels=400, patch_size=16, seed=0):
    """
    Random weights in the published layout of `kind`: "vim", "opengvlab", "opengvlab-image" or "opengvlab-mask".

    No two tensors are alike, and none is at a value that hides a mistake: norms are not 1, biases not 0.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, std=1.0, mean=0.0):
        return torch.empty(shape).normal_(mean, std, generator=generator)

    d, e, r = hidden_size, 2 * hidden_size, math.ceil(hidden_size / 16)
    kernel = (3, patch_size, patch_size) if kind in ("vim", "opengvlab-image") else (3, 1, patch_size, patch_size)
    weights = {
        "cls_token": normal(1, 1, d),
        "pos_embed": normal(1, 1 + grid**2, d, std=0.5),
        "patch_embed.proj.weight": normal(d, *kernel, std=0.05),
        "patch_embed.proj.bias": normal(d, std=0.1),
    }
    if kind in ("opengvlab", "opengvlab-mask"):
        weights["temporal_pos_embedding"] = normal(1, frames, d, std=0.5)
    for i in range(depth):
        mixer = f"layers.{i}.mixer."
        weights[f"layers.{i}.norm.weight"] = normal(d, std=0.2, mean=1)
        weights[f"{mixer}in_proj.weight"] = normal(2 * e, d, std=d**-0.5)
        weights[f"{mixer}out_proj.weight"] = normal(d, e, std=(e * depth) ** -0.5)
        for b in ("", "_b"):
            weights[f"{mixer}conv1d{b}.weight"] = normal(e, 1, 4, std=0.5)
            weights[f"{mixer}conv1d{b}.bias"] = normal(e, std=0.2)
            weights[f"{mixer}x_proj{b}.weight"] = normal(r + 32, e, std=e**-0.5)
            weights[f"{mixer}dt_proj{b}.weight"] = normal(e, r, std=r**-0.5)
            weights[f"{mixer}dt_proj{b}.bias"] = normal(e, std=1.0, mean=-4)
            weights[f"{mixer}A{b}_log"] = torch.arange(1.0, 17).log() + normal(e, 16, std=0.1)
            weights[f"{mixer}D{b}"] = normal(e, std=0.3, mean=1)
    weights["norm.weight" if kind == "opengvlab-mask" else "norm_f.weight"] = normal(d, std=0.2, mean=1)
    if kind == "opengvlab-mask":
        weights["clip_decoder.0.head.weight"], weights["clip_decoder.0.head.bias"] = normal(512, d), normal(512)
        weights["clip_decoder.0.norm.weight"], weights["clip_decoder.0.norm.bias"] = normal(512), normal(512)
    else:
        weights["head.weight"], weights["head.bias"] = normal(labels, d, std=d**-0.5), normal(labels, std=0.1)
    return weights
