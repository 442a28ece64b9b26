"""PyTorch VideoMamba model."""

import copy
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache_videomamba import VideoMambaCache, continued_cache, pool_steps
from .configuration_videomamba import (
    VideoMambaConfig,
    count_parameters_and_macs,
    height_and_width,
    unstreamable_reason,
)
from .context_parallel import ContextParallel
from .loading_videomamba import VideoMambaLoadingMixin
from .loss_videomamba import classification_loss, labelled_steps
from .maps_videomamba import VideoMambaDeltaMapsMixin, VideoMambaReadingMapsMixin
from .rms_norm import can_fuse_rms_norm, fused_add_rms_norm, fused_rms_norm
from .selective_scan import ScanOrder, bidirectional_selective_scan
from .tokens_videomamba import (
    backward_order,
    checked_clips,
    class_token_index,
    cut_tubelets,
    insert_class_token,
    interpolate_positions,
    merge_steps,
    sinusoidal_positions,
)


@dataclass
class VideoMambaModelOutput(BaseModelOutputWithPooling):
    """
    [`~transformers.modeling_outputs.BaseModelOutputWithPooling`], and of models that can stream:

    Args:
        step_pooler_output (`torch.FloatTensor` of shape `(B, n_t, D)`, *optional*):
            After each step in time, the mean over the tokens of all steps seen, or of the last `pooling_window` steps.
        cache (`VideoMambaCache`, *optional*):
            What the next part of these streams goes on from.
    """

    step_pooler_output: torch.FloatTensor | None = None
    cache: VideoMambaCache | None = None


@dataclass
class VideoMambaClassifierOutput(ImageClassifierOutput):
    """[`~transformers.modeling_outputs.ImageClassifierOutput`], and the `cache` of a stream (`VideoMambaCache`)."""

    cache: VideoMambaCache | None = None


class VideoMambaTubeletProjection(nn.Conv3d):
    """A convolution whose kernel is its stride, and so one matrix product, which GPUs run several times as fast."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, C, T, H, W) to (B, D, n_t, n_h, n_w); what does not fill a tubelet is left out."""
        tubelets = cut_tubelets(pixel_values, self.kernel_size)
        tokens = F.linear(tubelets, self.weight.transpose(1, 2).flatten(1), self.bias)
        return tokens.unflatten(0, (pixel_values.shape[0], -1)).permute(0, 4, 1, 2, 3)


class VideoMambaPatchEmbeddings(nn.Module):
    """Clip (B, T, C, H, W) to tubelet tokens (B, n_t · n_h · n_w, D), frame by frame (paper, section 4.1)."""

    def __init__(self, config: VideoMambaConfig):
        super().__init__()
        tubelet = (config.tubelet_size, *height_and_width(config.patch_size))
        self.projection = VideoMambaTubeletProjection(
            config.num_channels, config.hidden_size, kernel_size=tubelet, stride=tubelet
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if pixel_values.is_meta and not self.projection.weight.is_meta:
            raise ValueError(
                "`pixel_values` is on the device meta, and so holds no frames, but the model has weights. Make the "
                f"clip on the model's device: `device={str(self.projection.weight.device)!r}`."
            )
        pixel_values = pixel_values.to(self.projection.weight.dtype)
        return self.projection(pixel_values.transpose(1, 2)).flatten(2).transpose(1, 2)


class VideoMambaEmbeddings(nn.Module):
    """
    Tubelet tokens with their positions, and the class token in its place (paper, sections 4.1 to 4.3).

    Learned positions are one table of (1, L, D), or of one step in time, which all share. If there is a class token,
    its row is row 0 wherever the token stands in the sequence, and the tubelets' rows follow in order.
    """

    def __init__(self, config: VideoMambaConfig):
        super().__init__()
        self.config = config
        self.patch_embeddings = VideoMambaPatchEmbeddings(config)
        self.has_class_token = config.class_token_position != "none"
        if self.has_class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        if config.position_embedding_type in ("learned", "spatial"):
            num_tokens = math.prod(config.position_grid) + self.has_class_token
            self.position_embeddings = nn.Parameter(torch.zeros(1, num_tokens, config.hidden_size))
        elif config.position_embedding_type == "sinusoidal":
            # No buffer: others average, round and offload buffers.
            self.sinusoids = sinusoidal_positions(math.prod(config.grid_size), config.hidden_size)

    def forward(self, pixel_values: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
        """Clips (B, T, C, H, W), and how many tubelets they hold along time, height and width; tokens (B, L, D)."""
        tokens = self.patch_embeddings(pixel_values)
        positions, class_token = self.positions_for(grid, tokens)
        if positions is not None:
            tokens = tokens + positions
        if class_token is None:
            return tokens
        return insert_class_token(self.config, tokens, class_token.expand(tokens.shape[0], -1, -1))

    def positions_for(self, grid, tokens):
        """
        Positions of the tubelets (1, n_t · n_h · n_w, D) in the type and on the device of `tokens`, and the class
        token with its own (1, 1, D); None for what the config has not.
        """
        positions, class_token = None, self.cls_token if self.has_class_token else None
        if self.config.position_embedding_type == "sinusoidal":
            sinusoids = self.sinusoids
            if sinusoids.shape[1] != math.prod(grid):
                sinusoids = sinusoidal_positions(math.prod(grid), self.config.hidden_size)
            positions = sinusoids.to(tokens)
        elif self.config.position_embedding_type in ("learned", "spatial"):
            positions = self.position_embeddings[:, self.has_class_token :]
            shared = self.config.position_embedding_type == "spatial"
            wanted = (1, *grid[1:]) if shared else grid
            if wanted != self.config.position_grid:
                positions = interpolate_positions(positions, self.config.position_grid, wanted)
            if shared and grid[0] > 1:
                positions = positions.repeat(1, grid[0], 1)
            if self.has_class_token:
                class_token = class_token + self.position_embeddings[:, :1]
        return positions, class_token

    def _apply(self, *args, **kwargs):
        super()._apply(*args, **kwargs)
        device = self.patch_embeddings.projection.weight.device
        if self.config.position_embedding_type == "sinusoidal" and device.type != "meta":
            self.sinusoids = self.sinusoids.to(device)
        return self


class VideoMambaRMSNorm(nn.Module):
    """Root-mean-square norm of the float32 residual stream, computed in float32, out in the weights' type."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if can_fuse_rms_norm(hidden_states, self.weight):
            return fused_rms_norm(hidden_states, self.weight, self.eps)
        normed = F.rms_norm(hidden_states.float(), self.weight.shape, self.weight.float(), self.eps)
        return normed.to(self.weight.dtype)

    def of_sum(self, hidden_states: torch.Tensor, update: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream with a layer's update added, and the norm of it."""
        weight = self.weight  # looked up once: kernels wait for Python
        if update.dtype == weight.dtype and update.is_contiguous() and can_fuse_rms_norm(hidden_states, weight):
            return fused_add_rms_norm(hidden_states, update, weight, self.eps)
        hidden_states = hidden_states + update
        return hidden_states, self(hidden_states)

    def extra_repr(self):
        return f"{self.weight.shape[0]}, eps={self.eps}"


class VideoMambaMixer(nn.Module):
    """
    The spatio-temporal forward and backward SSM (paper, section 4.4 and figure 3).

    `in_proj`, the gate and `out_proj` serve both directions; all else has a leading axis of 2, forward then backward.
    """

    def __init__(self, config: VideoMambaConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.scan_backend = config.scan_backend
        inner, states, rank = config.intermediate_size, config.state_size, int(config.time_step_rank)
        self.in_proj = nn.Linear(config.hidden_size, 2 * inner, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(2, inner, config.conv_kernel))
        self.conv_bias = nn.Parameter(torch.empty(2, inner))
        self.x_proj_weight = nn.Parameter(torch.empty(2, rank + 2 * states, inner))
        self.dt_proj_weight = nn.Parameter(torch.empty(2, inner, rank))
        self.dt_proj_bias = nn.Parameter(torch.empty(2, inner))
        self.A_log = nn.Parameter(torch.empty(2, inner, states))
        self.D = nn.Parameter(torch.empty(2, inner))
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(
        self, hidden_states: torch.Tensor, order: ScanOrder | None = None, cache: VideoMambaCache | None = None
    ) -> torch.Tensor:
        out_proj = self.out_proj
        plain = is_plain_linear(out_proj)
        mixed = bidirectional_selective_scan(
            self.in_proj(hidden_states),
            self.conv_weight,
            self.conv_bias,
            self.x_proj_weight,
            self.dt_proj_weight,
            self.dt_proj_bias,
            self.A_log,
            self.D,
            order=order,
            backend=self.scan_backend,
            out_proj_weight=out_proj.weight if plain else None,
            state=None if cache is None else cache.states[self.layer_idx],
        )
        if cache is not None:
            mixed, state = mixed
            cache.update(self.layer_idx, state)
        return mixed if plain else out_proj(mixed)


def is_untouched(module, kind):
    """
    Whether a module is of this class and does what it does and nothing else, so that it need not be called for it.

    It is not if anything was attached to it (a hook, another `forward`, as Accelerate's offloading gives it) or if
    something stands in its place (an adapter, a quantised layer, a sharded one).
    """
    return (
        type(module) is kind
        and "forward" not in module.__dict__  # PyTorch 2.7 cannot trace `vars`
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
    )


def is_plain_linear(module):
    """Whether a module is a product with a matrix and nothing else; the matrix may be no other tensor (torchao)."""
    plain = is_untouched(module, nn.Linear) and module.bias is None
    return plain and type(module.weight) in (nn.Parameter, torch.Tensor)


class VideoMambaResidual(nn.Module):
    """
    The residual connection, with stochastic depth in training. `output_hidden_states` records what goes in and out
    here: the hooks that transformers attaches for it, and leaves, keep nobody from calling a layer's parts.
    """

    def __init__(self, drop_path_rate: float):
        super().__init__()
        self.drop_path_rate = drop_path_rate

    def forward(
        self, hidden_states: torch.Tensor, update: torch.Tensor, norm: VideoMambaRMSNorm | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The residual stream (B, L, D) with a layer's update; and its norm, if the next layer's is given."""
        if self.drop_path_rate > 0 and self.training:
            keep = 1 - self.drop_path_rate
            update = update * update.new_empty(update.shape[0], 1, 1).bernoulli_(keep).div_(keep)
        return (hidden_states + update, None) if norm is None else norm.of_sum(hidden_states, update)

    def extra_repr(self):
        return f"drop_path_rate={self.drop_path_rate:.3g}"


class VideoMambaLayer(GradientCheckpointingLayer):
    """Pre-norm block: x + mixer(norm(x)), on a residual stream x (B, L, D) that stays in float32."""

    def __init__(self, config: VideoMambaConfig, layer_idx: int):
        super().__init__()
        drop_path_rate = config.drop_path_rate * layer_idx / max(config.num_hidden_layers - 1, 1)
        self.norm = VideoMambaRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer = VideoMambaMixer(config, layer_idx)
        self.residual = VideoMambaResidual(drop_path_rate)

    def update(
        self, hidden_states: torch.Tensor, order: ScanOrder | None = None, cache: VideoMambaCache | None = None
    ) -> torch.Tensor:
        """What the layer adds to the residual stream, but for stochastic depth."""
        return self.mixer(self.norm(hidden_states), order, cache)

    def forward(
        self,
        hidden_states: torch.Tensor,
        order: ScanOrder | None = None,
        cache: VideoMambaCache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        return self.residual(hidden_states, self.update(hidden_states, order, cache))[0]

    def may_join(self):
        """Whether its parts may be called without it, so that its sum is made with the norm of the next layer."""
        return is_untouched(self, VideoMambaLayer) and is_untouched(self.norm, VideoMambaRMSNorm)


class VideoMambaPreTrainedModel(VideoMambaLoadingMixin, PreTrainedModel):
    """Weight initialisation, loading and saving for all VideoMamba models."""

    config: VideoMambaConfig
    base_model_prefix = "videomamba"
    main_input_name = "pixel_values"
    input_modalities = "video"
    supports_gradient_checkpointing = True
    _input_embed_layer = "patch_embeddings"
    _no_split_modules = ["VideoMambaEmbeddings", "VideoMambaLayer"]
    _can_record_outputs = {"hidden_states": VideoMambaResidual}

    def __init__(self, config: VideoMambaConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.config.validate()  # `from_pretrained` sets the fields that it is given after the config was made

    @torch.no_grad()
    def resize_position_embeddings(self, num_frames=None, image_size=None):
        """
        Fit the model to clips of another length or frame size, for example to fine-tune a 16-frame model on 32 frames.

        Learned position embeddings are interpolated in time and space; the class token keeps its own. They stay the
        same parameter, so that an optimizer made before goes on training them. One that has made a step already holds
        moments of the old size, and is to be made anew unless the number of tubelets stays; so is what
        `DistributedDataParallel` or a compiler made of the model. The config follows; a processor has to be told by
        its `num_frames`, `size` and `crop_size`.

        Args:
            num_frames (`int`, *optional*):
                Frames of a clip from now on; unchanged by default.
            image_size (`int` or `list[int]`, *optional*):
                Height and width of a frame in pixels from now on; unchanged by default.

        Raises:
            StrictDataclassError: if a clip of that size holds no tubelet. The model is then as it was.

        Example:

        ```python
        >>> model = VideoMambaForVideoClassification.from_pretrained(
        ...     "you/videomamba-k400", num_labels=51, ignore_mismatched_sizes=True
        ... )
        >>> model.resize_position_embeddings(num_frames=32)
        ```"""
        resized = copy.deepcopy(self.config)
        resized.num_frames = self.config.num_frames if num_frames is None else num_frames
        resized.image_size = self.config.image_size if image_size is None else image_size
        resized.validate()
        embeddings, grid, new_grid = self.base_model.embeddings, self.config.position_grid, resized.position_grid
        if self.config.position_embedding_type in ("learned", "spatial") and grid != new_grid:
            table = embeddings.position_embeddings
            class_token, tubelets = table.tensor_split([int(embeddings.has_class_token)], dim=1)
            table.data = torch.cat([class_token, interpolate_positions(tubelets, grid, new_grid)], dim=1)
            table.grad = None
        elif self.config.position_embedding_type == "sinusoidal" and grid != new_grid:
            sinusoids = sinusoidal_positions(math.prod(new_grid), self.config.hidden_size)
            embeddings.sinusoids = sinusoids.to(embeddings.sinusoids.device)
        self.config.num_frames, self.config.image_size = resized.num_frames, resized.image_size

    def floating_point_ops(self, inputs):
        """
        Operations of a forward and a backward pass: six for each multiply-accumulate of the forward pass.

        Args:
            inputs (`dict[str, torch.Tensor]`): the model's, with `pixel_values`.
        """
        clips, _ = checked_clips(self.config, inputs[self.main_input_name], interpolate_pos_encoding=True)
        batch, num_frames, _, height, width = clips.shape
        config = copy.deepcopy(self.config)
        config.num_frames, config.image_size = num_frames, [height, width]
        return 6 * batch * count_parameters_and_macs(config)["macs"]

    @torch.no_grad()
    def _init_weights(self, module):
        """As Mamba's code does it: S4D-real A, step sizes spread over a range, `out_proj` scaled by the depth."""
        config = self.config
        if isinstance(module, VideoMambaMixer):
            for weight in (module.in_proj.weight, module.x_proj_weight[0], module.x_proj_weight[1]):
                init.kaiming_uniform_(weight, a=math.sqrt(5))
            bound = config.conv_kernel**-0.5
            init.uniform_(module.conv_weight, -bound, bound)
            init.uniform_(module.conv_bias, -bound, bound)
            bound = int(config.time_step_rank) ** -0.5
            init.uniform_(module.dt_proj_weight, -bound, bound)
            # The bias is the inverse of the softplus at the wanted step size.
            log_range = math.log(config.time_step_min), math.log(config.time_step_max)
            step = torch.empty_like(module.dt_proj_bias, dtype=torch.float32).uniform_(*log_range).exp()
            step = step.clamp(min=config.time_step_floor)
            init.copy_(module.dt_proj_bias, step + torch.log(-torch.expm1(-step)))
            states = torch.arange(1, config.state_size + 1, dtype=torch.float32, device=module.A_log.device)
            init.copy_(module.A_log, states.log().expand_as(module.A_log))
            init.ones_(module.D)
            bound = (config.intermediate_size * config.num_hidden_layers) ** -0.5
            init.uniform_(module.out_proj.weight, -bound, bound)
        elif isinstance(module, VideoMambaRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, VideoMambaEmbeddings):
            if module.has_class_token:
                init.trunc_normal_(module.cls_token, std=config.initializer_range)
            if config.position_embedding_type in ("learned", "spatial"):
                init.trunc_normal_(module.position_embeddings, std=config.initializer_range)
        elif isinstance(module, nn.Conv3d) or module is getattr(self, "classifier", None):
            init.trunc_normal_(module.weight, std=config.initializer_range)
            init.zeros_(module.bias)


class VideoMambaModel(VideoMambaDeltaMapsMixin, VideoMambaPreTrainedModel):
    """
    The bare VideoMamba encoder: tubelet tokens in, their final normed states out.

    Args:
        config (`VideoMambaConfig`).
    """

    _auto_class = "AutoModel"

    def __init__(self, config: VideoMambaConfig):
        super().__init__(config)
        self.embeddings = VideoMambaEmbeddings(config)
        self.layers = nn.ModuleList(VideoMambaLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = VideoMambaRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        interpolate_pos_encoding: bool = False,
        cache: VideoMambaCache | None = None,
        use_cache: bool | None = None,
        output_steps: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VideoMambaModelOutput:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, num_frames, num_channels, height, width)`):
                Normalised frames, as a [`VideoMambaVideoProcessor`] or [`VideoMambaImageProcessor`] gives them. A
                model of one frame also takes images `(B, num_channels, height, width)`.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `False`):
                Take clips of another length or resolution than the config's; learned position embeddings are
                interpolated in time and space.
            cache (`VideoMambaCache`, *optional*):
                What the streams have seen before `pixel_values`, which are then the next frames: whole tubelets, as
                many as there are. The cache is changed.
            use_cache (`bool`, *optional*):
                Return a cache: the one that is given, or a new one for streams that begin here.
            output_steps (`bool`, *optional*, defaults to `True`):
                Return `step_pooler_output`, if the model can stream.

        Returns:
            [`VideoMambaModelOutput`]: `last_hidden_state` `(B, L, D)`, all tokens in order, the class token among
            them; `pooler_output` `(B, D)`, the class token, or the mean over tokens if there is none (of a stream,
            over those of all parts, or of its `pooling_window`); `hidden_states` on request, the residual stream
            before the first and after each layer, `(B, L, D)` in float32; `merge_layers` halve the tubelets in L.

        Raises:
            ValueError: if `pixel_values` has another rank, size or type than the model takes; or for a cache, if later
                frames change what this model makes of earlier ones, if it is of another number of streams, or if
                layers are checkpointed.
        """
        streams = bool(use_cache) or cache is not None
        pixel_values, grid = checked_clips(self.config, pixel_values, interpolate_pos_encoding, streams)
        if streams:
            cache = continued_cache(self, cache, use_cache, pixel_values.shape[0])
        hidden_states = self.encode(functools.partial(self.embed, pixel_values, grid), grid, cache, **kwargs)
        last_hidden_state = self.norm(hidden_states)
        if self.embeddings.has_class_token:
            # Not of `last_hidden_state`: so `torch.compile` leaves that out of a classifier, which wants no more.
            pooled = self.norm(hidden_states[:, class_token_index(self.config, hidden_states.shape[1] - 1)])
        else:
            pooled = last_hidden_state.mean(dim=1)
        steps, window = None, self.config.pooling_window is not None
        if (output_steps or streams or window) and unstreamable_reason(self.config) is None:
            steps = last_hidden_state.unflatten(1, (grid[0], -1)).mean(2)
            steps = cache.pool(steps) if streams else pool_steps(steps, self.config.pooling_window)
            steps = steps.to(last_hidden_state.dtype)
            if streams or window:
                pooled = steps[:, -1]
        return VideoMambaModelOutput(
            last_hidden_state=last_hidden_state, pooler_output=pooled, step_pooler_output=steps, cache=cache
        )

    def embed(self, pixel_values, grid):
        """The residual stream before the first layer, (B, L, D) in float32, and the order of the backward scan."""
        hidden_states = self.embeddings(pixel_values, grid).float()
        return hidden_states, backward_order(self.config, grid, hidden_states.device)

    def encode(self, embed, grid, cache=None, **kwargs):
        """
        The residual stream after all layers, of what `embed()` gives, which nobody else shall hold on to. In inference
        on a GPU, or on a CPU with Numba, each sum is made with the norm after it.
        """
        hidden_states, order = embed()
        layers, merges = list(self.layers), self.config.merge_layers or ()
        joins = can_fuse_rms_norm(hidden_states, self.norm.weight) and all(layer.may_join() for layer in layers)
        tokens = None  # the norm that was made with a sum
        for index, layer in enumerate(layers):
            if index in merges:
                hidden_states, order, grid = merge_steps(self.config, hidden_states, grid)
            if not joins:
                hidden_states = layer(hidden_states, order, cache, **kwargs)
                continue
            tokens = layer.mixer(layer.norm(hidden_states) if tokens is None else tokens, order, cache)
            after = None if index + 1 in {*merges, len(layers)} else layers[index + 1].norm
            hidden_states, tokens = layer.residual(hidden_states, tokens, after)
        return hidden_states


class VideoMambaForVideoClassification(VideoMambaReadingMapsMixin, VideoMambaPreTrainedModel):
    """
    VideoMamba with a linear classifier on the class token, or on the mean over tokens if the config has none.

    Args:
        config (`VideoMambaConfig`).
    """

    _auto_class: str | None = "AutoModelForVideoClassification"

    def __init__(self, config: VideoMambaConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.loss_function = classification_loss
        self.videomamba = VideoMambaModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        cache: VideoMambaCache | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VideoMambaClassifierOutput:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, num_frames, num_channels, height, width)`):
                Normalised frames, as a [`VideoMambaVideoProcessor`] or [`VideoMambaImageProcessor`] gives them.
            labels (`torch.LongTensor` of shape `(B,)`, *optional*):
                Class of each clip in `[0, num_labels)`: cross-entropy. With `config.problem_type`
                `"multi_label_classification"`, float `(B, num_labels)`: binary cross-entropy; with `"regression"`
                or one label, float `(B, num_labels)` or `(B,)`: mean squared error.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `False`):
                Take clips of another length or resolution than the config's.
            cache, use_cache: see [`VideoMambaModel`]; the logits are then those of all parts so far, or of the
                `pooling_window`.

        Returns:
            [`VideoMambaClassifierOutput`]: `loss` if `labels` are given, `logits` `(B, num_labels)`, `cache` with
            `use_cache`, and `hidden_states` on request.

        Example:

        ```python
        >>> import torch
        >>> from transformers import AutoModelForVideoClassification, AutoVideoProcessor
        >>> import modeling_videomamba

        >>> folder = "model_cards/videomamba-tiny-camera-motion"
        >>> processor = AutoVideoProcessor.from_pretrained(folder)
        >>> model = AutoModelForVideoClassification.from_pretrained(folder)
        >>> inputs = processor("clip.mp4", return_tensors="pt")
        >>> with torch.no_grad():
        ...     label = model(**inputs).logits.argmax(-1).item()
        >>> print(model.config.id2label[label])
        pan left
        ```"""
        options = {"cache": cache, "use_cache": use_cache, "output_steps": False, "return_dict": True}
        outputs = self.videomamba(pixel_values, interpolate_pos_encoding, **options, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return VideoMambaClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, cache=outputs.cache
        )

    def context_parallel(self, group=None):
        """This classifier with its clips cut along time over the processes of a group, see [`ContextParallel`]."""
        return ContextParallel(self, group)


class VideoMambaForVideoFrameClassification(VideoMambaForVideoClassification):
    """
    The classifier with logits after each step in time, of models that can stream. Its weights are those of
    [`VideoMambaForVideoClassification`], whose logits of a whole clip are these after the last step.

    Args:
        config (`VideoMambaConfig`): with `backward_scan="spatial"`, `class_token_position="none"` and
            `position_embedding_type` `"spatial"` or `"none"`.

    Raises:
        ValueError: for any other config.
    """

    _auto_class = None

    def __init__(self, config: VideoMambaConfig):
        if reason := unstreamable_reason(config):
            raise ValueError(f"This config gives no logits for each step: {reason}.")
        super().__init__(config)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        cache: VideoMambaCache | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VideoMambaClassifierOutput:
        r"""
        Args:
            pixel_values, interpolate_pos_encoding, cache, use_cache: see [`VideoMambaModel`].
            labels (`torch.Tensor`, *optional*):
                Of each clip, as [`VideoMambaForVideoClassification`] takes them, for a loss after the last step; or of
                each step, with one axis more, `(B, n_t)` or `(B, n_t, num_labels)`.

        Returns:
            [`VideoMambaClassifierOutput`]: `logits` `(B, n_t, num_labels)`: after each step those of what was seen so
            far, or of the last `pooling_window` steps; `loss`, `cache` and `hidden_states` as there.
        """
        outputs = self.videomamba(
            pixel_values, interpolate_pos_encoding, cache=cache, use_cache=use_cache, return_dict=True, **kwargs
        )
        logits = self.classifier(outputs.step_pooler_output)
        loss = None
        if labels is not None:
            loss = self.loss_function(*labelled_steps(labels, logits, self.config), self.config, **kwargs)
        return VideoMambaClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, cache=outputs.cache
        )

    def context_parallel(self, group=None):
        raise ValueError("No logits of steps over several processes: take VideoMambaForVideoClassification.")


class VideoMambaForImageClassification(VideoMambaForVideoClassification):
    """
    The classifier for images: VideoMamba at one frame, which is Vision Mamba (paper, section 3).

    `pixel_values` are `(B, num_channels, height, width)`; all else is as in [`VideoMambaForVideoClassification`],
    whose weights have the same names.

    Args:
        config (`VideoMambaConfig`): with `num_frames=1, tubelet_size=1`.

    Raises:
        ValueError: if the config has more frames than one.

    Example:

    ```python
    >>> from modeling_videomamba import VideoMambaConfig, VideoMambaForImageClassification

    >>> config = VideoMambaConfig(num_frames=1, tubelet_size=1, class_token_position="middle", num_labels=1000)
    >>> model = VideoMambaForImageClassification(config)  # Vision Mamba, random weights
    ```"""

    input_modalities = "image"
    _auto_class = "AutoModelForImageClassification"

    def __init__(self, config: VideoMambaConfig):
        if config.num_frames != 1:
            raise ValueError(
                f"An image classifier sees one frame, but the config has `num_frames`={config.num_frames} and "
                f"`tubelet_size`={config.tubelet_size}. Set both to 1, or use `VideoMambaForVideoClassification`."
            )
        super().__init__(config)


# The pipelines ask these tables of names, also for code that came with a checkpoint.
MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.setdefault(
    VideoMambaConfig.model_type, VideoMambaForImageClassification.__name__
)
MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES.setdefault(
    VideoMambaConfig.model_type, VideoMambaForVideoClassification.__name__
)


__all__ = [
    "VideoMambaForImageClassification",
    "VideoMambaForVideoClassification",
    "VideoMambaForVideoFrameClassification",
    "VideoMambaModel",
    "VideoMambaPreTrainedModel",
]
