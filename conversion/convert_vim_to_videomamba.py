"""
Vision Mamba's image classifiers (hustvl/Vim) become VideoMamba, to start video training from (paper, 4.1 and 4.2).

    python -m conversion.convert_vim_to_videomamba \\
        --checkpoint hustvl/Vim-small-midclstok:vim_s_midclstok_80p5acc.pth --num-labels 400 --output videomamba-small
"""

import argparse

import torch
import torch.nn.functional as F

from conversion.checkpoints import (
    CheckpointError,
    Remap,
    add_arguments,
    build_model,
    label_fields,
    load_checkpoint,
    model_card,
    positive,
    read_labels,
    read_sizes,
    run,
    wide,
)
from modeling_videomamba import VideoMambaConfig
from modeling_videomamba.modeling_videomamba import interpolate_positions


POSITION_INITS = ("expand", "interpolate-spatial", "interpolate-embedding", "random")
FRAME_STRIDE = 2  # of the paper's clips (section 5.1)


def inflate_patches(weight, tubelet_size):
    """The 2D patch convolution (D, C, p, p), repeated and averaged over time: (D, C, s_t, p, p) (section 4.1)."""
    return (wide(weight) / tubelet_size).unsqueeze(2).expand(-1, -1, tubelet_size, -1, -1)


def initialize_positions(positions, num_steps, how, initializer_range=0.02):
    """
    Position embeddings of a clip from those of an image (section 4.2, options 3-1 to 3-4).

    Args:
        positions (`torch.Tensor` of shape `(N, D)`): of the image's patches, row by row.
        num_steps (`int`): tubelets along time, n_t.
        how (`str`):
            - `"expand"`: the image's at every step;
            - `"interpolate-spatial"`: the sequence of N tokens interpolated linearly to n_t · N tokens;
            - `"interpolate-embedding"`: each embedding interpolated linearly from D to D · n_t channels, which are
              read as (D, n_t): step t takes the channels t, t + n_t, t + 2 n_t, ...;
            - `"random"`: as the model initialises its own.
        initializer_range (`float`): standard deviation of `"random"`.

    Returns:
        `torch.Tensor` of shape `(n_t · N, D)`, frame by frame.
    """
    length, dim = positions.shape
    if how == "expand":
        return positions.repeat(num_steps, 1)
    if how == "random":
        return torch.nn.init.trunc_normal_(positions.new_empty(num_steps * length, dim), std=initializer_range)
    if how == "interpolate-spatial":
        video = F.interpolate(positions.T[None], size=num_steps * length, mode="linear")[0].T
    elif how == "interpolate-embedding":
        video = F.interpolate(positions[None], size=dim * num_steps, mode="linear")[0]
        video = video.view(length, dim, num_steps).permute(2, 0, 1).flatten(0, 1)
    else:
        raise ValueError(f"`how` must be one of {', '.join(POSITION_INITS)}, got {how!r}.")
    return video


def convert_state_dict(state_dict, config, source_grid, position_init="expand", head="drop"):
    """
    Vision Mamba's tensors to ours.

    Args:
        state_dict (`dict[str, torch.Tensor]`): of Vision Mamba.
        config (`VideoMambaConfig`): of the model to fill.
        source_grid (`int`): patches along the side of the checkpoint's image.
        position_init (`str`): see `initialize_positions`.
        head (`str`): `"keep"` ImageNet's, make a `"fresh"` one, or `"drop"` it and fill the backbone alone.

    Returns:
        `Remap`: its `target` is the new state dict, its `rows` the table of where every tensor went.
    """
    remap = Remap(state_dict)
    prefix = "" if head == "drop" else "videomamba."
    remap.move(
        "patch_embed.proj.weight",
        f"{prefix}embeddings.patch_embeddings.projection.weight",
        f"inflated: repeated {config.tubelet_size} times over time and averaged",
        lambda weight: inflate_patches(weight, config.tubelet_size),
    )

    # Vision Mamba puts the class token before the middle patch, and lays `pos_embed` out in that order.
    table, target = wide(remap.take("pos_embed")), f"{prefix}embeddings.position_embeddings"
    middle = source_grid**2 // 2
    class_token = table[:, middle : middle + 1]
    patches = torch.cat([table[:, :middle], table[:, middle + 1 :]], dim=1)
    steps, height, width = config.grid_size
    resized = (height, width) != (source_grid, source_grid)
    if resized:
        patches = interpolate_positions(patches, (1, source_grid, source_grid), (1, height, width))
    positions = initialize_positions(patches[0], steps, position_init, config.initializer_range)
    remap.put(target, torch.cat([class_token, positions[None]], dim=1))
    remap.rows.append(("pos_embed", f"re-ordered: row {middle}, the class token's", f"{target}[:, 0]"))
    how = {
        "expand": f"re-ordered: the other rows, repeated at {steps} steps in time",
        "interpolate-spatial": f"interpolated: the other rows, from {height * width} to {len(positions)} tokens",
        "interpolate-embedding": f"interpolated: the other rows, from {config.hidden_size} to "
        f"{steps * config.hidden_size} channels, read as {steps} steps in time",
        "random": "dropped: the other rows, random positions were asked for",
    }[position_init]
    how += f", after going from {source_grid} × {source_grid} to {height} × {width} patches" if resized else ""
    if position_init == "random":
        remap.rows += [("pos_embed", how, "-"), ("-", "initialised", f"{target}[:, 1:]")]
    else:
        remap.rows.append(("pos_embed", how, f"{target}[:, 1:]"))

    remap.encoder(config.num_hidden_layers, prefix)
    for name in ("weight", "bias"):
        if head == "keep":
            remap.move(f"head.{name}", f"classifier.{name}")
        elif f"head.{name}" in state_dict:
            remap.drop(f"head.{name}", "a fresh classifier was asked for" if head == "fresh" else "no classifier")
    return remap


def refuse_variants(checkpoint, sizes):
    """Refuse files that have Vision Mamba's tensors, or some of them, but another architecture."""
    name, patch = checkpoint.model_name, checkpoint.tensors["patch_embed.proj.weight"]
    if "temporal_pos_embedding" in checkpoint.tensors or patch.ndim == 5 or name.startswith("videomamba"):
        raise CheckpointError(
            f"{checkpoint.origin} is one of OpenGVLab's VideoMamba. Use conversion.convert_opengvlab_to_videomamba."
        )
    # A stride of 8 leaves no trace in the shapes but a larger grid: 27 × 27 patches of 16 pixels in 224.
    image_size, patch_size = getattr(checkpoint.args, "input_size", None), sizes["patch_size"]
    image_size = image_size if isinstance(image_size, int) else 224
    overlapping = (image_size - patch_size) // max(patch_size // 2, 1) + 1
    if "stride8" in name or (sizes["grid"] == overlapping and sizes["grid"] * patch_size != image_size):
        raise CheckpointError(
            f"{checkpoint.origin} is not supported: it was fine-tuned with a stride of {patch_size // 2}, so that "
            f"its {sizes['grid']} × {sizes['grid']} patches overlap; VideoMamba's do not. Take the checkpoint that "
            "was trained with a stride of 16: its name has no `ft`."
        )


def convert(options):
    """From the command line's options to what `run` writes."""
    checkpoint = load_checkpoint(options.checkpoint)
    sizes = read_sizes(checkpoint)
    refuse_variants(checkpoint, sizes)
    grid = sizes.pop("grid")

    head, fields = "drop", {}
    if options.keep_head:
        head = "keep"
        if "head.weight" not in checkpoint.tensors:
            raise CheckpointError(
                f"{checkpoint.origin} has no `head.weight`, so that --keep-head has nothing to keep."
            )
        num_labels = len(checkpoint.tensors["head.weight"])
        names = options.labels or ("imagenet-1k" if num_labels == 1000 else None)
        fields = label_fields(read_labels(names, num_labels)) if names else {"num_labels": num_labels}
    elif options.labels:
        head, fields = "fresh", label_fields(read_labels(options.labels, options.num_labels))
    elif options.num_labels:
        head, fields = "fresh", {"num_labels": options.num_labels}

    config = VideoMambaConfig(
        **sizes,
        **fields,
        num_frames=options.num_frames,
        tubelet_size=options.tubelet_size,
        image_size=options.image_size or grid * sizes["patch_size"],
        class_token_position="first" if options.class_token_position == "first" else "middle",
    )
    remap = convert_state_dict(checkpoint.tensors, config, grid, options.position_init, head)
    model = build_model(checkpoint, config, remap, with_head=head != "drop")
    card = model_card(
        checkpoint,
        model,
        "[Vision Mamba](https://github.com/hustvl/Vim)",
        "That project is licensed under Apache-2.0, in the file LICENSE.txt of its repository.",
        [
            f"`--num-frames {config.num_frames} --tubelet-size {config.tubelet_size}`: the patch convolution was "
            f"repeated {config.tubelet_size} times over time and averaged.",
            f"`--image-size {config.image_size}`; the checkpoint's is {grid * config.patch_size}.",
            f"`--position-init {options.position_init}`, for {config.grid_size[0]} steps in time.",
            f"`--class-token-position {options.class_token_position}`: the class token stands "
            + ("before all tokens." if config.class_token_position == "first" else "in the middle of the tokens."),
            {
                "keep": "`--keep-head`: the classifier is the image classifier's, trained on images alone.",
                "fresh": f"The classifier is fresh, of {config.num_labels} labels: train it before use.",
                "drop": "There is no classifier.",
            }[head],
        ],
    )
    return remap, model, FRAME_STRIDE, card


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m conversion.convert_vim_to_videomamba",
        description="Convert a Vision Mamba image classifier into a VideoMamba to start video training from. "
        "Sizes are read from the checkpoint. Without --num-labels, --labels or --keep-head the result is a backbone.",
    )
    add_arguments(parser)
    parser.add_argument("--num-frames", type=positive, default=16, help="frames of a clip (default: %(default)s)")
    parser.add_argument("--tubelet-size", type=positive, default=2, help="frames of a tubelet (default: %(default)s)")
    parser.add_argument(
        "--image-size", type=positive, help="side of a frame in pixels (default: the checkpoint's, 224)"
    )
    parser.add_argument(
        "--position-init",
        choices=POSITION_INITS,
        default="expand",
        help="how the image's position embeddings become the clip's, see section 4.2 (default: %(default)s)",
    )
    parser.add_argument(
        "--class-token-position",
        choices=("first", "middle", "keep"),
        default="first",
        help="first as in VideoMamba, middle, or where the checkpoint has it: in the middle in all that Vision Mamba "
        "has published (default: %(default)s)",
    )
    heads = parser.add_mutually_exclusive_group()
    heads.add_argument("--num-labels", type=positive, help="make a fresh classifier of so many labels")
    heads.add_argument("--keep-head", action="store_true", help="keep the image classifier (ImageNet's 1000 labels)")
    run(parser, convert, argv)


if __name__ == "__main__":
    main()
