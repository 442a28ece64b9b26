"""How a model is loaded and saved, beyond what transformers does: other sizes, quantised weights, NaN refused."""

import copy
import difflib
from pathlib import Path

from torch import nn

from .configuration_videomamba import VideoMambaConfig


AUTO_MAP = {
    "AutoModel": "modeling_videomamba.VideoMambaModel",
    "AutoModelForImageClassification": "modeling_videomamba.VideoMambaForImageClassification",
    "AutoModelForVideoClassification": "modeling_videomamba.VideoMambaForVideoClassification",
}


class VideoMambaLoadingMixin:
    """Stands before [`~transformers.PreTrainedModel`] among the bases of a model."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """
        As [`~PreTrainedModel.from_pretrained`]; `num_frames` and `image_size` may be given, or be others in a `config`
        than the checkpoint's. The model is then fitted to them by [`resize_position_embeddings`].

        Raises:
            ValueError: if the weights hold NaN or infinite numbers.

        Example:

        ```python
        >>> model = VideoMambaForVideoClassification.from_pretrained("you/videomamba-k400", num_frames=32)
        ```"""
        wanted = {name: kwargs.pop(name) for name in ("num_frames", "image_size") if name in kwargs}
        if isinstance(config, VideoMambaConfig) and pretrained_model_name_or_path is not None:
            # `AutoModel` has put the sizes that it was given there.
            wanted = {"num_frames": config.num_frames, "image_size": config.image_size, **wanted}
            config = copy.deepcopy(config)
            config.num_frames, config.image_size = cls._sizes_of_checkpoint(
                config, pretrained_model_name_or_path, **kwargs
            )
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = spare_classifier(kwargs["quantization_config"])
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with `output_loading_info`
        for name, weight in model.named_parameters():
            # Not of quantised ones, which only their own operators understand.
            plain = type(weight) is nn.Parameter and weight.dtype.itemsize > 1 and weight.is_floating_point()
            if not plain or weight.is_meta or not weight.numel():
                continue
            if not all(bound.isfinite() for bound in weight.detach().aminmax()):
                raise ValueError(
                    f"The weight {name!r} of {pretrained_model_name_or_path!r} holds NaN or infinite numbers: did its "
                    "training diverge? Load an earlier checkpoint."
                )
        if any(getattr(model.config, name) != size for name, size in wanted.items()):
            model.resize_position_embeddings(**wanted)
        return loaded

    @staticmethod
    def _sizes_of_checkpoint(config, name_or_path, **kwargs):
        """`num_frames` and `image_size` in a checkpoint's own `config.json`; those of `config` if it has none."""
        from_hub = {
            name: kwargs[name]
            for name in ("cache_dir", "proxies", "local_files_only", "token", "revision", "subfolder")
            if name in kwargs
        }
        try:
            own, _ = VideoMambaConfig.get_config_dict(name_or_path, **from_hub)
        except OSError:  # an adapter's folder
            own = {}
        if own.get("model_type") != VideoMambaConfig.model_type:
            return config.num_frames, config.image_size
        own = VideoMambaConfig.from_dict(own)
        return own.num_frames, own.image_size

    def save_pretrained(self, save_directory, *args, **kwargs):
        # With its code beside it, a checkpoint loads as backbone and as classifier, whichever of the two it was.
        if self._auto_class is not None:
            self.config.auto_map = {**AUTO_MAP, **(getattr(self.config, "auto_map", None) or {})}
        return super().save_pretrained(save_directory, *args, **kwargs)


def spare_classifier(quantization_config):
    """
    The same configuration, but the classifier stays as it is, unless the user has named what to spare.

    transformers spares a model's last parameter, and so a head without bias only. A quantised classifier cannot be
    trained beside adapters, and bitsandbytes' 4-bit product on a CPU takes no other number of labels than 32, 64, ...
    """
    for name in ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules"):
        if hasattr(quantization_config, name) and not getattr(quantization_config, name):
            quantization_config = copy.deepcopy(quantization_config)
            setattr(quantization_config, name, ["classifier"])
    return quantization_config


def unloadable_reason(name):
    """
    Why `name` (`str` or `Path`) is neither a folder with a model nor the name of a Hub repository, or None.

    transformers would ask the Hub for a mistyped folder: a minute without a network, which it then blames.
    """
    folder = Path(name)
    if folder.is_dir():
        if any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
            return None
        inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
        hint = f" Name one of the folders in it: {', '.join(inside[:5])}." if inside else ""
        return f"The folder {name} holds no model: it has no config.json.{hint}"
    models = {path.parent.name: path.parent for path in folder.parent.glob("*/config.json")}
    near = [str(models[found]) for found in difflib.get_close_matches(folder.name, models, 3)]
    if near or str(name).count("/") != 1 or str(name).startswith(("/", ".", "~")):
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        return f"There is no folder {name}, and a Hub repository has a name of the form owner/name.{hint}"
    return None


__all__ = ["VideoMambaLoadingMixin", "unloadable_reason"]
