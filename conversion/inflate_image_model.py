"""
An image VideoMamba, distilled, trained or converted, becomes a video one to start training from (paper, 4.1 and 4.2).

    videomamba-convert image \\
        --checkpoint you/videomamba-imagenet --num-frames 16 --num-labels 400 --output videomamba-k400-start

Vision Mamba's own files go through the same functions: see `videomamba-convert vim`.
"""

import sys
from pathlib import Path

from .command_lines import POSITION_INITS, image_parser


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    image_parser().parse_args()  # before the imports below, which take seconds

import torch
import torch.nn.functional as F

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
    run,
    wide,
)


FRAME_STRIDE = 2  # of the paper's clips (section 5.1)


def inflate_patches(weight, tubelet_size):
    """
    The patch convolution of an image model, repeated over time and averaged (section 4.1).

    Args:
        weight (`torch.Tensor` of shape `(D, C, p, p)` or `(D, C, 1, p, p)`).
        tubelet_size (`int`): frames of a tubelet, s_t.

    Returns:
        `torch.Tensor` of shape `(D, C, s_t, p, p)`.
    """
    weight = weight if weight.ndim == 5 else weight.unsqueeze(2)
    return (wide(weight) / tubelet_size).expand(-1, -1, tubelet_size, -1, -1)


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
        raise ValueError(f"`how` must be one of {', '.join(POSITION_INITS[:4])}, got {how!r}.")
    return video


def inflate_embeddings(remap, weight, positions, class_row, source_grid, config, position_init, prefix):
    """
    Fill the tubelet convolution and the positions of a video model, after all else of it.

    With `position_init` `"sinusoidal"` or `"none"` there is no table, and the class token's row of it is added to the
    class token.

    Args:
        remap (`Remap`): on its way from an image model to a video model.
        weight, positions (`str`): the source's names of its patch convolution and of its positions (1, N (+ 1), D).
        class_row (`int` or `None`): the row of the positions that is the class token's.
        source_grid (`tuple[int, int]`): patches of the source's image along height and width.
        config (`VideoMambaConfig`): of the model to fill.
        position_init (`str`): one of `POSITION_INITS`.
        prefix (`str`): of the target's names.
    """
    remap.move(
        weight,
        f"{prefix}embeddings.patch_embeddings.projection.weight",
        f"inflated: repeated {config.tubelet_size} times over time and averaged",
        lambda weight: inflate_patches(weight, config.tubelet_size),
    )
    if positions not in remap.source:  # sinusoidal ones, or none
        return
    table, target = wide(remap.take(positions)), f"{prefix}embeddings.position_embeddings"
    class_rows, patches = table[:, :0], table
    if class_row is not None:
        class_rows = table[:, class_row : class_row + 1]
        patches = torch.cat([table[:, :class_row], table[:, class_row + 1 :]], dim=1)
    if position_init in ("sinusoidal", "none"):
        if class_row is not None:
            class_token = f"{prefix}embeddings.cls_token"
            remap.put(class_token, wide(remap.target[class_token]) + class_rows)
            remap.rows.append((positions, f"added: row {class_row}, the class token's", class_token))
        remap.drop(positions, f"the other rows, {position_init} positions were asked for")
        return

    steps, height, width = config.grid_size
    resized = (height, width) != source_grid
    if resized:
        patches = interpolate_positions(patches, (1, *source_grid), (1, height, width))
    video = initialize_positions(patches[0], steps, position_init, config.initializer_range)
    remap.put(target, torch.cat([class_rows, video[None]], dim=1))
    place = f"{target}[:, {len(class_rows[0])}:]"
    if class_row is not None:
        remap.rows.append((positions, f"re-ordered: row {class_row}, the class token's", f"{target}[:, 0]"))
    how = {
        "expand": f"re-ordered: the other rows, repeated at {steps} steps in time",
        "interpolate-spatial": f"interpolated: the other rows, from {height * width} to {len(video)} tokens",
        "interpolate-embedding": f"interpolated: the other rows, from {config.hidden_size} to "
        f"{steps * config.hidden_size} channels, read as {steps} steps in time",
        "random": "dropped: the other rows, random positions were asked for",
    }[position_init]
    how += f", after going from {' × '.join(map(str, source_grid))} to {height} × {width} patches" if resized else ""
    if position_init == "random":
        remap.rows += [(positions, how, "-"), ("-", "initialised", place)]
    else:
        remap.rows.append((positions, how, place))


def position_embedding_type(position_init):
    """The config's field for one of `POSITION_INITS`."""
    return position_init if position_init in ("sinusoidal", "none") else "learned"


def inflate_state_dict(state_dict, source_config, config, position_init="expand", head="drop"):
    """
    The tensors of our image model to those of our video model.

    Args:
        state_dict (`dict[str, torch.Tensor]`): of [`VideoMambaForImageClassification`], or of [`VideoMambaModel`].
        source_config, config (`VideoMambaConfig`): of the image model, and of the video model to fill.
        position_init (`str`): one of `POSITION_INITS`.
        head (`str`): `"keep"` the image classifier, make a `"fresh"` one, or `"drop"` it and fill the backbone alone.

    Returns:
        `Remap`: its `target` is the new state dict, its `rows` the table of where every tensor went.
    """
    remap = Remap(state_dict)
    theirs = "videomamba." if any(name.startswith("videomamba.") for name in state_dict) else ""
    ours = "" if head == "drop" else "videomamba."
    weight, positions = (
        f"{theirs}embeddings.{name}" for name in ("patch_embeddings.projection.weight", "position_embeddings")
    )
    for name in state_dict:
        if name.startswith("classifier."):
            if head == "keep":
                remap.move(name, name)
            else:
                remap.drop(name, "a fresh classifier was asked for" if head == "fresh" else "no classifier")
        elif name not in (weight, positions):
            remap.move(name, ours + name.removeprefix(theirs))
    class_row = None if source_config.class_token_position == "none" else 0
    grid = source_config.grid_size[1:]
    inflate_embeddings(remap, weight, positions, class_row, grid, config, position_init, ours)
    return remap


def choose_head(options, tensors, weight, origin, known_labels=None):
    """
    What becomes of the classifier, from the options of `command_lines.add_inflation_arguments`.

    Args:
        options (`argparse.Namespace`).
        tensors (`dict[str, torch.Tensor]`): the source's.
        weight (`str`): the source's name of its classifier's weight.
        origin (`str`): what error messages call the source.
        known_labels (`str`, *optional*): names for a kept classifier, if the options have none; see `read_labels`.

    Returns:
        `tuple[str, dict]`: `"keep"`, `"fresh"` or `"drop"`, and the config's fields for its labels.
    """
    if options.keep_head and weight not in tensors:
        raise CheckpointError(f"{origin} has no `{weight}`, so that --keep-head has nothing to keep.")
    num_labels = len(tensors[weight]) if options.keep_head else options.num_labels
    names = options.labels or (known_labels if options.keep_head else None)
    if names:
        fields = label_fields(read_labels(names, num_labels))
    else:
        fields = {"num_labels": num_labels} if num_labels else {}
    return ("keep" if options.keep_head else "fresh" if fields else "drop"), fields


def inflation_settings(options, config, source_size, head):
    """Sentences for the model card, from the options of `command_lines.add_inflation_arguments`."""
    return [
        f"`--num-frames {config.num_frames} --tubelet-size {config.tubelet_size}`: the patch convolution was "
        f"repeated {config.tubelet_size} times over time and averaged.",
        f"`--image-size {config.image_size}`; the checkpoint's is {source_size}.",
        f"`--position-init {options.position_init}`, for {config.grid_size[0]} steps in time.",
        {
            "first": "The class token stands before all tokens.",
            "middle": "The class token stands in the middle of the tokens.",
            "none": "There is no class token.",
        }[config.class_token_position],
        {
            "keep": "`--keep-head`: the classifier is the image classifier's, trained on images alone.",
            "fresh": f"The classifier is fresh, of {config.num_labels} labels: train it before use.",
            "drop": "There is no classifier.",
        }[head],
    ]


def load_image_model(source):
    """
    Config and weights of one of our image models.

    Args:
        source (`str`): a folder as `save_pretrained` writes it, or a Hub repository.

    Returns:
        `tuple[VideoMambaConfig, Checkpoint]`.

    Raises:
        CheckpointError: if it is another model, or not one of images.
    """
    try:
        fields, _ = VideoMambaConfig.get_config_dict(source)
    except OSError as error:
        raise CheckpointError(f"{source} is neither a folder with a `config.json` nor a Hub repository.") from error
    if fields.get("model_type") != VideoMambaConfig.model_type:
        raise CheckpointError(
            f"{source} is a {fields.get('model_type')} model, expected VideoMamba. Vision Mamba's own files are for "
            "`videomamba-convert vim`."
        )
    config = VideoMambaConfig.from_dict(fields)
    if config.num_frames != 1:
        raise CheckpointError(
            f"{source} is a model for clips of {config.num_frames} frames, expected one for images (`num_frames` 1). "
            "For another number of frames call the model's `resize_position_embeddings`."
        )
    folder = Path(source)
    checkpoint = load_checkpoint(
        str(folder / "model.safetensors") if folder.is_dir() else f"{source}:model.safetensors"
    )
    checkpoint.origin = folder.resolve().name if folder.is_dir() else source
    return config, checkpoint


def convert(options):
    """From the command line's options to what `run` writes."""
    source, checkpoint = load_image_model(options.checkpoint)
    tensors, place = checkpoint.tensors, options.class_token_position
    if source.position_embedding_type != "learned" and options.position_init != source.position_embedding_type:
        raise CheckpointError(
            f"{checkpoint.origin} has no learned positions to {options.position_init}. Pass `--position-init "
            f"{source.position_embedding_type}`, which it was trained with."
        )
    if source.class_token_position == "none" and place in ("first", "middle"):
        raise CheckpointError(f"{checkpoint.origin} has no class token to put {place}. Leave out the option.")
    head, fields = choose_head(options, tensors, "classifier.weight", checkpoint.origin)
    if head == "keep" and not options.labels:
        fields = {}
    kept = {k: v for k, v in source.to_dict().items() if head == "keep" or k not in ("id2label", "label2id")}
    changed = {
        "num_frames": options.num_frames,
        "tubelet_size": options.tubelet_size or min(2, options.num_frames),
        "image_size": options.image_size or source.image_size,
        "position_embedding_type": position_embedding_type(options.position_init),
        "class_token_position": source.class_token_position if place in (None, "keep") else place,
    }
    config = VideoMambaConfig.from_dict({**kept, **fields, **changed})
    remap = inflate_state_dict(tensors, source, config, options.position_init, head)
    model = build_model(checkpoint, config, remap, with_head=head != "drop")
    card = model_card(
        checkpoint,
        model,
        "VideoMamba for images",
        "Its own card states its licence.",
        inflation_settings(options, config, source.image_size, head),
    )
    return remap, model, {"frame_stride": FRAME_STRIDE}, card


def main(argv=None):
    run(image_parser(), convert, argv)


if __name__ == "__main__":
    main()
