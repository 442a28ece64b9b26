"""VideoMamba for transformers: importing this package registers it with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForVideoClassification,
    AutoVideoProcessor,
)

from .cache_videomamba import VideoMambaCache
from .clip_loading import ClipLoader, predict_clips
from .configuration_videomamba import VideoMambaConfig, count_parameters_and_macs
from .image_processing_videomamba import VideoMambaImageProcessor
from .modeling_videomamba import (
    VideoMambaForImageClassification,
    VideoMambaForVideoClassification,
    VideoMambaForVideoFrameClassification,
    VideoMambaModel,
    VideoMambaPreTrainedModel,
)
from .selective_scan import use_scan_backend
from .video_processing_videomamba import VideoMambaVideoProcessor


__version__ = "0.3.0"

AutoConfig.register(VideoMambaConfig.model_type, VideoMambaConfig, exist_ok=True)
AutoModel.register(VideoMambaConfig, VideoMambaModel, exist_ok=True)
AutoModelForImageClassification.register(VideoMambaConfig, VideoMambaForImageClassification, exist_ok=True)
AutoModelForVideoClassification.register(VideoMambaConfig, VideoMambaForVideoClassification, exist_ok=True)
AutoImageProcessor.register(
    VideoMambaConfig, image_processor_classes={"torchvision": VideoMambaImageProcessor}, exist_ok=True
)
AutoVideoProcessor.register(VideoMambaConfig, VideoMambaVideoProcessor, exist_ok=True)

# `save_pretrained` and `push_to_hub` then put this code beside what they save, for `trust_remote_code=True`. (The
# classes of models say so themselves.)
VideoMambaConfig.register_for_auto_class()
VideoMambaImageProcessor.register_for_auto_class("AutoImageProcessor")
VideoMambaVideoProcessor.register_for_auto_class("AutoVideoProcessor")


__all__ = [
    "ClipLoader",
    "VideoMambaCache",
    "VideoMambaConfig",
    "VideoMambaForImageClassification",
    "VideoMambaForVideoClassification",
    "VideoMambaForVideoFrameClassification",
    "VideoMambaImageProcessor",
    "VideoMambaModel",
    "VideoMambaPreTrainedModel",
    "VideoMambaVideoProcessor",
    "count_parameters_and_macs",
    "predict_clips",
    "use_scan_backend",
]
