"""
Vision Mamba's image classifiers (hustvl/Vim) become VideoMamba, to start video training from (paper, 4.1 and 4.2).

    videomamba-convert vim \\
        --checkpoint hustvl/Vim-small-midclstok:vim_s_midclstok_80p5acc.pth --num-labels 400 --output videomamba-small

With `--num-frames 1 --keep-head` it stays the image classifier that it is, with the same logits.
"""

import sys

from .command_lines import vim_parser


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    vim_parser().parse_args()  # before the imports below, which take seconds

from modeling_videomamba import VideoMambaConfig

from .checkpoints import (
    CheckpointError,
    Remap,
    build_model,
    load_checkpoint,
    model_card,
    read_sizes,
    run,
)
from .inflate_image_model import (
    FRAME_STRIDE,
    choose_head,
    inflate_embeddings,
    inflation_settings,
    position_embedding_type,
)


def convert_state_dict(state_dict, config, source_grid, position_init="expand", head="drop"):
    """
    Vision Mamba's tensors to ours.

    Args:
        state_dict (`dict[str, torch.Tensor]`): of Vision Mamba.
        config (`VideoMambaConfig`): of the model to fill.
        source_grid (`int`): patches along the side of the checkpoint's image.
        position_init (`str`): one of `POSITION_INITS`.
        head (`str`): `"keep"` ImageNet's, make a `"fresh"` one, or `"drop"` it and fill the backbone alone.

    Returns:
        `Remap`: its `target` is the new state dict, its `rows` the table of where every tensor went.
    """
    remap = Remap(state_dict)
    prefix = "" if head == "drop" else "videomamba."
    remap.encoder(config.num_hidden_layers, prefix)
    # Vision Mamba puts the class token before the middle patch, and lays `pos_embed` out in that order.
    grid, middle = (source_grid, source_grid), source_grid**2 // 2
    inflate_embeddings(remap, "patch_embed.proj.weight", "pos_embed", middle, grid, config, position_init, prefix)
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
            f"{checkpoint.origin} is one of OpenGVLab's VideoMamba. Use `videomamba-convert opengvlab`."
        )
    # A stride of 8 leaves no trace in the shapes but a larger grid: 27 × 27 patches of 16 pixels in 224.
    image_size, patch_size = getattr(checkpoint.args, "input_size", None), sizes["patch_size"]
    image_size = image_size if isinstance(image_size, int) else 224
    overlapping = (image_size - patch_size) // max(patch_size // 2, 1) + 1
    if "stride8" in name or (sizes["grid"] == overlapping and sizes["grid"] * patch_size != image_size):
        raise CheckpointError(
            f"{checkpoint.origin} is not supported: it was fine-tuned with a stride of {patch_size // 2}, so that "
            f"its {sizes['grid']} x {sizes['grid']} patches overlap; VideoMamba's do not. Take the checkpoint that "
            "was trained with a stride of 16: its name has no `ft`."
        )


def convert(options):
    """From the command line's options to what `run` writes."""
    checkpoint = load_checkpoint(options.checkpoint)
    sizes = read_sizes(checkpoint)
    refuse_variants(checkpoint, sizes)
    grid = sizes.pop("grid")

    tensors = checkpoint.tensors
    known = "imagenet-1k" if "head.weight" in tensors and len(tensors["head.weight"]) == 1000 else None
    head, fields = choose_head(options, tensors, "head.weight", checkpoint.origin, known)
    # Images go into the same model; clips have the class token first, as in the paper.
    place = options.class_token_position or ("keep" if options.num_frames == 1 else "first")
    config = VideoMambaConfig(
        **sizes,
        **fields,
        num_frames=options.num_frames,
        tubelet_size=options.tubelet_size or min(2, options.num_frames),
        image_size=options.image_size or grid * sizes["patch_size"],
        position_embedding_type=position_embedding_type(options.position_init),
        class_token_position="first" if place == "first" else "middle",
    )
    remap = convert_state_dict(tensors, config, grid, options.position_init, head)
    model = build_model(checkpoint, config, remap, with_head=head != "drop")
    card = model_card(
        checkpoint,
        model,
        "[Vision Mamba](https://github.com/hustvl/Vim)",
        "That project is licensed under Apache-2.0, in the file LICENSE.txt of its repository.",
        inflation_settings(options, config, grid * config.patch_size, head),
    )
    return remap, model, {"frame_stride": FRAME_STRIDE}, card


def main(argv=None):
    run(vim_parser(), convert, argv)


if __name__ == "__main__":
    main()
