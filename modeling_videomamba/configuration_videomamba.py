"""VideoMamba model configuration."""

import math
from typing import Literal

import torch
from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig


MAX_LAYERS = 4096  # a file that asks for a thousand million must not keep the machine busy for ever


@strict
class VideoMambaConfig(PreTrainedConfig):
    r"""
    Configuration of a VideoMamba model ([paper](https://arxiv.org/abs/2407.08476)). The defaults give the paper's
    model: 24 layers of width 384 on 16 frames of 224 × 224 pixels. `VideoMambaConfig.light()` gives its small one.

    Args:
        image_size (`int` or `list[int]`, *optional*, defaults to 224):
            Height and width of a frame in pixels; two numbers if they differ.
        patch_size (`int` or `list[int]`, *optional*, defaults to 16):
            Height and width of a tubelet in pixels.
        num_channels (`int`, *optional*, defaults to 3):
            Colour channels of a frame.
        num_frames (`int`, *optional*, defaults to 16):
            Frames of a clip.
        tubelet_size (`int`, *optional*, defaults to 2):
            Frames of a tubelet.
        hidden_size (`int`, *optional*, defaults to 384):
            Width of the residual stream, D.
        num_hidden_layers (`int`, *optional*, defaults to 24):
            Number of blocks.
        state_size (`int`, *optional*, defaults to 16):
            States of each inner channel, N.
        conv_kernel (`int`, *optional*, defaults to 4):
            Taps of the causal convolution.
        expand (`int`, *optional*, defaults to 2):
            Inner channels for each hidden one: E = expand · D.
        time_step_rank (`int` or `str`, *optional*, defaults to `"auto"`):
            Rank R of the projection that gives the step size Δ; `"auto"` is ⌈D / 16⌉.
        time_step_min (`float`, *optional*, defaults to 0.001), time_step_max (`float`, *optional*, defaults to 0.1):
            At initialisation the step sizes are spread between these, evenly in their logarithm.
        time_step_floor (`float`, *optional*, defaults to 0.0001):
            Smallest step size at initialisation.
        layer_norm_epsilon (`float`, *optional*, defaults to 1e-5):
            Added to the mean square in the RMS norms.
        position_embedding_type (`str`, *optional*, defaults to `"learned"`):
            `"learned"`, `"sinusoidal"` or `"none"` (paper, section 4.2); `"spatial"` learns positions in space,
            the same at every step in time, so that a clip may be given part by part.
        class_token_position (`str`, *optional*, defaults to `"first"`):
            `"first"` as in the paper, `"middle"` as in Vision Mamba, or `"none"`: the mean over all tokens is
            classified instead.
        backward_scan (`str`, *optional*, defaults to `"spatiotemporal"`):
            What the backward direction reverses (paper, section 4.4): all tokens (`"spatiotemporal"`), the tokens
            within each frame (`"spatial"`), or the frames (`"temporal"`).
        merge_layers (`list[int]`, *optional*):
            Layers, counted from 0, before each of which the mean of two neighbouring steps in time takes their place,
            tubelet by tubelet, so that it and all later ones see half the tokens. It adds no weights.
        pooling_window (`int`, *optional*):
            Of models that can stream: how many of the last steps in time (tubelets) are classified, as their mean; all
            that were seen by default.
        drop_path_rate (`float`, *optional*, defaults to 0.0):
            Stochastic depth: probability to skip the last block in training; it grows linearly from 0 at the first.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the initial class token, position embeddings, tubelet convolution and classifier.
        scan_backend (`str`, *optional*):
            Force one implementation of the selective scan by name; the fastest usable one is taken by default.

    Raises:
        StrictDataclassError: of huggingface_hub, for a value that cannot be, or values that contradict each other,
            naming them; when a config is made, loaded or saved, and when a model is made of it.

    Example:

    ```python
    >>> from modeling_videomamba import VideoMambaConfig, VideoMambaModel

    >>> model = VideoMambaModel(VideoMambaConfig())  # the paper's model, random weights
    >>> model.config.hidden_size
    384
    ```"""

    model_type = "videomamba"
    keys_to_ignore_at_inference = ["hidden_states"]  # the Trainer then gathers the logits alone
    base_model_fsdp_plan = {"layers.*": "free_full_weight", "norm": "keep_full_weight"}

    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    num_frames: int = 16
    tubelet_size: int = 2
    hidden_size: int = 384
    num_hidden_layers: int = 24
    state_size: int = 16
    conv_kernel: int = 4
    expand: int = 2
    time_step_rank: int | Literal["auto"] = "auto"
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    layer_norm_epsilon: float = 1e-5
    position_embedding_type: Literal["learned", "spatial", "sinusoidal", "none"] = "learned"
    class_token_position: Literal["first", "middle", "none"] = "first"
    backward_scan: Literal["spatiotemporal", "spatial", "temporal"] = "spatiotemporal"
    merge_layers: list[int] | tuple[int, ...] | None = None
    pooling_window: int | None = None
    drop_path_rate: float | int = 0.0
    initializer_range: float = 0.02
    scan_backend: str | None = None

    def __post_init__(self, **kwargs):
        if self.time_step_rank == "auto":
            self.time_step_rank = math.ceil(self.hidden_size / 16)
        super().__post_init__(**kwargs)

    def __setattr__(self, name, value):
        """Labels are numbered by integers. For another number of labels, what kind of problem it was is forgotten."""
        if name in ("id2label", "label2id") and value is not None:
            value = _by_integers(name, value)
            if name == "id2label" and len(value) != len(self.__dict__.get("id2label") or value):
                self.problem_type = None
        elif name == "dtype" and isinstance(value, str) and not isinstance(getattr(torch, value, None), torch.dtype):
            raise ValueError(
                f"`dtype` is {value!r}, but must name a type of PyTorch, such as 'float32' or 'bfloat16'."
            )
        super().__setattr__(name, value)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As [`~PreTrainedConfig.from_dict`]; a `problem_type` that is given is set after the number of labels."""
        if "problem_type" in kwargs:
            kwargs["problem_type"] = kwargs.pop("problem_type")  # is the last now
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def light(cls, **kwargs):
        """The paper's light model (table 6): 24 layers of width 192. `kwargs` override any other field."""
        return cls(**{"hidden_size": 192, **kwargs})

    @property
    def intermediate_size(self):
        """Inner channels E of a mixer."""
        return self.expand * self.hidden_size

    @property
    def grid_size(self):
        """Tubelets of a clip along time, height and width: (n_t, n_h, n_w) of section 4.1."""
        return tubelet_grid(self, self.num_frames, *height_and_width(self.image_size))

    @property
    def position_grid(self):
        """The part of `grid_size` whose tubelets have learned positions of their own: all, or one step in time."""
        return (1, *self.grid_size[1:]) if self.position_embedding_type == "spatial" else self.grid_size

    @property
    def merge_factor(self):
        """Steps in time (tubelets) that a token of the last layer stands for; a clip has a multiple of so many."""
        return 2 ** len(self.merge_layers or ())

    def validate_architecture(self):
        """Part of `@strict`-powered validation: sizes that are none, or that leave no tubelet."""
        for name in (
            "num_channels",
            "num_frames",
            "tubelet_size",
            "hidden_size",
            "num_hidden_layers",
            "state_size",
            "conv_kernel",
            "expand",
            "time_step_rank",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be a positive integer, got {getattr(self, name)!r}.")
        for name in ("image_size", "patch_size"):
            value = getattr(self, name)
            sizes = [value] if isinstance(value, int) else list(value)
            if len(sizes) not in (1, 2) or any(size < 1 for size in sizes):
                raise ValueError(f"`{name}` must be one or two positive integers (height, width), got {value!r}.")
        if self.pooling_window is not None and self.pooling_window < 1:
            raise ValueError(f"`pooling_window` must be a positive integer or None, got {self.pooling_window!r}.")
        if self.pooling_window is not None and (reason := unstreamable_reason(self)):
            raise ValueError(f"`pooling_window` is {self.pooling_window}, but this model cannot stream: {reason}.")
        if self.num_hidden_layers > MAX_LAYERS:
            raise ValueError(f"`num_hidden_layers` must be at most {MAX_LAYERS}, got {self.num_hidden_layers}.")
        if self.num_frames < self.tubelet_size:
            raise ValueError(
                f"A clip of `num_frames`={self.num_frames} is shorter than one tubelet of "
                f"`tubelet_size`={self.tubelet_size} frames; lower `tubelet_size` or raise `num_frames`."
            )
        if 0 in self.grid_size:
            raise ValueError(
                f"A frame of `image_size`={self.image_size} is smaller than one patch of "
                f"`patch_size`={self.patch_size}; lower `patch_size` or raise `image_size`."
            )

    def validate_merge_layers(self):
        """Part of `@strict`-powered validation: merging before layers that there are not, or of steps that are not."""
        layers = list(self.merge_layers or ())
        if layers != sorted(set(layers)) or not all(0 <= layer < self.num_hidden_layers for layer in layers):
            raise ValueError(
                f"`merge_layers` must list layers from 0 to {self.num_hidden_layers - 1} in ascending order, each "
                f"once, got {self.merge_layers}."
            )
        if reason := unmergeable_reason(self, self.grid_size[0]):
            raise ValueError(f"A clip of `num_frames`={self.num_frames} {reason}.")

    def validate_ranges(self):
        """Part of `@strict`-powered validation: numbers outside the range in which they mean something."""
        longest = self.time_step_max
        if not 0 < self.time_step_floor <= longest < math.inf or not 0 < self.time_step_min <= longest:
            raise ValueError(
                "Step sizes must satisfy 0 < `time_step_min` <= `time_step_max` < inf and 0 < `time_step_floor` <= "
                f"`time_step_max`, got {self.time_step_min}, {self.time_step_max} and {self.time_step_floor}."
            )
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"`drop_path_rate` is a probability in [0, 1), got {self.drop_path_rate}.")
        if not 0 < self.layer_norm_epsilon < math.inf:
            raise ValueError(f"`layer_norm_epsilon` must be positive and finite, got {self.layer_norm_epsilon}.")
        if not 0 <= self.initializer_range < math.inf:
            raise ValueError(f"`initializer_range` must be finite and not negative, got {self.initializer_range}.")

    def validate_labels(self):
        """Part of `@strict`-powered validation: labels that are not numbered from 0."""
        if sorted(self.id2label) != list(range(len(self.id2label))):
            raise ValueError(
                f"`id2label` must name the labels 0 to {len(self.id2label) - 1}, each once, got the numbers "
                f"{', '.join(map(str, self.id2label))}."
            )


def _by_integers(name, labels):
    """`id2label` or `label2id` with integers as numbers, which may be given as text."""
    if not isinstance(labels, dict):
        raise ValueError(
            f"`{name}` is a {type(labels).__name__}, but must be a dict. Of a list of names, `dict(enumerate(names))` "
            "makes an `id2label`."
        )
    try:
        if name == "id2label":
            return {int(number): label for number, label in labels.items()}
        return {label: int(number) for label, number in labels.items()}
    except (TypeError, ValueError):
        raise ValueError(f"`{name}` must number the labels by integers, got {labels}.") from None


def height_and_width(size):
    """(height, width) of a size given as one number or two."""
    if isinstance(size, int):
        return size, size
    return (size[0], size[0]) if len(size) == 1 else tuple(size)


def tubelet_grid(config, num_frames, height, width):
    """
    Tubelets of a clip along time, height and width; what does not fill a tubelet is cut off (paper, section 4.1).

    Args:
        config (`VideoMambaConfig`): for the size of a tubelet.
        num_frames, height, width (`int`): size of the clip in frames and pixels.

    Returns:
        `tuple[int, int, int]`: (n_t, n_h, n_w).
    """
    patch_height, patch_width = height_and_width(config.patch_size)
    return num_frames // config.tubelet_size, height // patch_height, width // patch_width


def unmergeable_reason(config, steps):
    """Why a clip of so many steps in time (tubelets) does not halve as often as the config says, or None."""
    if steps % config.merge_factor == 0:
        return None
    return (
        f"has {steps} {'step' if steps == 1 else 'steps'} in time, but `merge_layers`={list(config.merge_layers)} "
        f"halves them, which takes a multiple of {config.merge_factor} steps, or of "
        f"{config.merge_factor * config.tubelet_size} frames"
    )


def unstreamable_reason(config):
    """Why clips of this model cannot be given part by part, or None: a later frame would change earlier tokens."""
    if config.backward_scan != "spatial":
        return (
            f"`backward_scan` is {config.backward_scan!r}, whose backward direction begins with the last frame; with "
            '"spatial" both directions visit frames in their order'
        )
    if config.class_token_position != "none":
        return f'there is a class token (`class_token_position` is {config.class_token_position!r}, not "none")'
    if config.position_embedding_type in ("learned", "sinusoidal"):
        return (
            f"`position_embedding_type` is {config.position_embedding_type!r}, which differs from step to step; "
            '"spatial" and "none" do not'
        )
    if config.merge_layers:
        return f"`merge_layers` is {list(config.merge_layers)}: a step waits for the one that it is merged with"
    return None


def count_parameters_and_macs(config):
    """
    Parameters of [`VideoMambaForVideoClassification`] and multiply-accumulates of one clip, counted from the config.

    Args:
        config (`VideoMambaConfig`): of any size.

    Returns:
        `dict[str, int]`:
            - `parameters`;
            - `paper_macs`: the count by the paper's rule, which has the tubelet convolution and the mixers' two outer
              projections alone, because what happens inside the fused CUDA call is not seen by a counter;
            - `macs`: all projections and convolutions, the classifier's too. The recurrence itself is in neither.
    """
    d, e, n, r, k = (
        config.hidden_size,
        config.intermediate_size,
        config.state_size,
        config.time_step_rank,
        config.conv_kernel,
    )
    patches = math.prod(config.grid_size)
    has_class_token = config.class_token_position != "none"
    merges = [sum(layer <= index for layer in config.merge_layers or ()) for index in range(config.num_hidden_layers)]
    tokens = sum(patches // 2**merged + has_class_token for merged in merges)  # of all layers
    tubelet = config.num_channels * config.tubelet_size * math.prod(height_and_width(config.patch_size))

    outer = d * 2 * e + e * d
    inner = 2 * (e * k + e * (r + 2 * n) + r * e)  # both directions: convolution, x_proj, dt_proj
    direction_vectors = 2 * (e + e + e * n + e)  # both directions: biases of the convolution and of dt_proj, A, D
    layer = outer + inner + direction_vectors + d  # and the norm

    class_token = d * has_class_token
    learned_positions = 0
    if config.position_embedding_type in ("learned", "spatial"):
        learned_positions = (math.prod(config.position_grid) + has_class_token) * d
    embeddings = tubelet * d + d + class_token + learned_positions
    classifier = (d + 1) * config.num_labels if config.num_labels > 0 else 0

    paper_macs = patches * tubelet * d + tokens * outer
    return {
        "parameters": embeddings + config.num_hidden_layers * layer + d + classifier,
        "paper_macs": paper_macs,
        "macs": paper_macs + tokens * inner + d * config.num_labels,
    }


__all__ = ["VideoMambaConfig", "count_parameters_and_macs", "unstreamable_reason"]
