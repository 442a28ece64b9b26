"""torchvision's Video Swin Transformer as a `transformers` model, so that it trains and is tested as VideoMamba is."""

from torch import nn
from torch.nn.functional import cross_entropy
from torchvision.models.video.swin_transformer import PatchEmbed3d, SwinTransformer3d
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput


class Swin3DConfig(PreTrainedConfig):
    """The arguments of torchvision's `SwinTransformer3d`; the defaults are those of `swin3d_t`."""

    model_type = "swin3d"

    def __init__(
        self,
        embed_dim=96,
        depths=(2, 2, 6, 2),
        num_heads=(3, 6, 12, 24),
        window_size=(8, 7, 7),
        patch_size=(2, 4, 4),
        drop_path_rate=0.1,
        **kwargs,
    ):
        self.embed_dim, self.drop_path_rate = embed_dim, drop_path_rate
        self.depths, self.num_heads = list(depths), list(num_heads)
        self.window_size, self.patch_size = list(window_size), list(patch_size)
        super().__init__(**kwargs)


class Swin3DForVideoClassification(PreTrainedModel):
    """Takes `pixel_values`, float (B, T, C, H, W), and `labels`, int64 (B,)."""

    config_class = Swin3DConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.swin = SwinTransformer3d(
            config.patch_size,
            config.embed_dim,
            config.depths,
            config.num_heads,
            config.window_size,
            stochastic_depth_prob=config.drop_path_rate,
            num_classes=config.num_labels,
            patch_embed=PatchEmbed3d,
        )
        self.post_init()

    def _init_weights(self, module):
        """As torchvision's constructor, which is not asked when a head for other labels replaces a loaded one."""
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                init.zeros_(module.bias)

    def forward(self, pixel_values, labels=None):
        logits = self.swin(pixel_values.transpose(1, 2))
        loss = None if labels is None else cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)
