"""
OpenGVLab's VideoMamba checkpoints become ours, with the same logits.

    videomamba-convert opengvlab \\
        --checkpoint OpenGVLab/VideoMamba:videomamba_s16_k400_f16_res224.pth --output videomamba-small-k400
"""

import re
import sys

from .command_lines import opengvlab_parser


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    opengvlab_parser().parse_args()  # before the imports below, which take seconds

import torch

from modeling_videomamba import VideoMambaConfig
from modeling_videomamba.tokens_videomamba import interpolate_positions

from .checkpoints import (
    CheckpointError,
    Remap,
    build_model,
    label_fields,
    load_checkpoint,
    model_card,
    read_labels,
    read_sizes,
    run,
    wide,
)


# What serves training alone: heads of masked pre-training and of self-distillation.
TRAINING_HEADS = re.compile(r"(clip_decoder|distill_head)\.")
# Their evaluation's frames: those in the middle of equal segments, shrunk by OpenCV.
EVALUATION = {"frame_stride": None, "spread_in_segments": True, "antialias": False}
KNOWN_LABELS = {400: "kinetics-400", 1000: "imagenet-1k"}
# How the name of a file, or its training script's `--data_set`, says what it was trained on.
DATA_SETS = {"kinetics-400": r"k400|kinetics", "imagenet-1k": r"in1k|imnet|imagenet"}
OTHER_DATA_SETS = r"k600|k700|k710|ssv[12]|sth|mit|anet|hacs|ucf|hmdb|breakfast|coin|lvu"


def join_positions(spatial, temporal):
    """
    Separate embeddings as one table: P[t, s] = S[s] + T[t].

    Args:
        spatial (`torch.Tensor` of shape `(1, n_h · n_w, D)`): S.
        temporal (`torch.Tensor` of shape `(1, n_t, D)`): T.

    Returns:
        `torch.Tensor` of shape `(1, n_t · n_h · n_w, D)`, frame by frame.
    """
    return (spatial[:, None] + temporal[:, :, None]).flatten(1, 2)


def convert_state_dict(state_dict, config):
    """
    The tensors of OpenGVLab's VideoMamba to ours; with a classifier if they have `head.weight`.

    Args:
        state_dict (`dict[str, torch.Tensor]`): OpenGVLab's.
        config (`VideoMambaConfig`): of the model to fill.

    Returns:
        `Remap`: its `target` is the new state dict, its `rows` the table of where every tensor went.
    """
    remap = Remap(state_dict)
    with_head = "head.weight" in state_dict
    prefix = "videomamba." if with_head else ""
    of_image = remap.take("patch_embed.proj.weight").ndim == 4
    remap.move(
        "patch_embed.proj.weight",
        f"{prefix}embeddings.patch_embeddings.projection.weight",
        "inflated: one frame deep" if of_image else "copied",
        lambda weight: weight.unsqueeze(2) if of_image else weight,
    )

    spatial, target = wide(remap.take("pos_embed")), f"{prefix}embeddings.position_embeddings"
    steps, *space = config.grid_size
    remap.rows.append(("pos_embed", "copied: row 0, the class token's", f"{target}[:, 0]"))
    if "temporal_pos_embedding" in state_dict:
        temporal, how = wide(remap.take("temporal_pos_embedding")), "added to every patch of its step in time"
        if (before := temporal.shape[1]) != steps:
            temporal = interpolate_positions(temporal, (before, 1, 1), (steps, 1, 1))
            how = f"interpolated: from {before} to {steps} steps in time, then {how}"
        remap.rows.append(("temporal_pos_embedding", how, f"{target}[:, 1:]"))
    else:  # an image classifier
        temporal = spatial.new_zeros(1, steps, config.hidden_size)
    remap.rows.append(("pos_embed", f"added at {steps} steps in time: the patches' rows", f"{target}[:, 1:]"))
    remap.put(target, torch.cat([spatial[:, :1], join_positions(spatial[:, 1:], temporal)], dim=1))

    # OpenGVLab's two directions are summed, ours are averaged.
    final_norm = "norm_f.weight" if "norm_f.weight" in state_dict else "norm.weight"
    remap.encoder(config.num_hidden_layers, prefix, out_proj_scale=2, final_norm=final_norm)
    if with_head:
        remap.move("head.weight", "classifier.weight")
        remap.move("head.bias", "classifier.bias")
    for name in state_dict:
        if TRAINING_HEADS.match(name):
            remap.drop(name, "serves training alone")
    return remap


def guess_labels(checkpoint, num_labels):
    """
    The label names of a file that holds none, and what is not sure about them.

    Returns:
        What `read_labels` takes, or None; and a sentence, or None if the file's name says the data set.
    """
    known = KNOWN_LABELS.get(num_labels)
    if known is None:
        return None, None
    said = f"{checkpoint.origin} {getattr(checkpoint.args, 'data_set', '')}".lower()
    words = r"(?<![a-z0-9])({})(?![a-z0-9])"
    if re.search(words.format(DATA_SETS[known]), re.sub("_", " ", said)):
        return known, None
    others = "|".join([*(DATA_SETS[name] for name in DATA_SETS if name != known), OTHER_DATA_SETS])
    if found := re.search(words.format(others), re.sub("_", " ", said)):
        return None, (
            f"The labels have numbers for names: there are as many as in {known}, but the file speaks of {found[0]}. "
            "`--labels` names a list."
        )
    return known, (
        f"The label names are those of {known}, assumed because there are {num_labels}: the file does not say what it "
        "was trained on. `--labels` names another list."
    )


def convert(options):
    """From the command line's options to what `run` writes."""
    checkpoint = load_checkpoint(options.checkpoint)
    sizes = read_sizes(checkpoint)
    if checkpoint.model_name.startswith("vim_") or "midclstok" in checkpoint.origin:
        # Its tensors have the names and shapes of OpenGVLab's image classifiers, but another meaning.
        raise CheckpointError(f"{checkpoint.origin} is a Vision Mamba. Use `videomamba-convert vim`.")

    tensors, grid = checkpoint.tensors, sizes.pop("grid")
    patches, temporal = tensors["patch_embed.proj.weight"], tensors.get("temporal_pos_embedding")
    tubelet_size = patches.shape[2] if patches.ndim == 5 else 1
    source_frames = tubelet_size * (temporal.shape[1] if temporal is not None else 1)
    fields, unsure = {}, None
    if "head.weight" in tensors:
        num_labels = len(tensors["head.weight"])
        names, unsure = (options.labels, None) if options.labels else guess_labels(checkpoint, num_labels)
        if unsure:
            print(f"note: {unsure}", file=sys.stderr)
        fields = label_fields(read_labels(names, num_labels)) if names else {"num_labels": num_labels}
    elif options.labels:
        raise CheckpointError(f"{checkpoint.origin} has no classifier (`head.weight`), so that --labels has no use.")

    config = VideoMambaConfig(
        **sizes,
        **fields,
        num_frames=options.num_frames or source_frames,
        tubelet_size=tubelet_size,
        image_size=grid * sizes["patch_size"],
        class_token_position="first",
    )
    remap = convert_state_dict(tensors, config)
    model = build_model(checkpoint, config, remap, with_head="head.weight" in tensors)
    frames = f"`--num-frames {config.num_frames}`"
    card = model_card(
        checkpoint,
        model,
        "[OpenGVLab's VideoMamba](https://github.com/OpenGVLab/VideoMamba)",
        "That project is licensed under Apache-2.0, in the file LICENSE of its repository.",
        [
            f"{frames}, as the checkpoint."
            if config.num_frames == source_frames
            else f"{frames}; the checkpoint's {source_frames} were interpolated in time.",
            "Spatial and temporal position embeddings were added up into one table.",
            "`out_proj` was doubled: the original sums the two directions, this model averages them.",
            *[unsure] * bool(unsure),
        ],
    )
    return remap, model, EVALUATION, card


def main(argv=None):
    run(opengvlab_parser(), convert, argv)


if __name__ == "__main__":
    main()
