#!/usr/bin/env bash
# transformers' pipeline for video classification takes `frame_sampling_rate`, and `num_frames` from the model's config.
# With a checkpoint that has a video processor, as new ones do, the rate is dropped without a word: 1 and 4 give the
# same frames. And V-JEPA 2, a video classifier of transformers itself, cannot be used without `num_frames`: its config
# calls the number `frames_per_clip`.
#
# Why: `preprocess` has a branch for image processors, which uses both, and one for video processors, which hands on
# `num_frames` alone. The default is read from `config.num_frames` in both.
# What to do: set `fps`, or whatever the checkpoint's own video processor samples by, on `pipe.video_processor`; give
# V-JEPA 2's pipeline `num_frames`.
#
# Seen on 2026-11-30, on a CPU:
#   torch 2.14.1, transformers 5.24.0
#   VideoMAE, frame_sampling_rate=1: the processor is asked for {'num_frames': 4, 'do_sample_frames': True}
#   VideoMAE, frame_sampling_rate=4: the processor is asked for {'num_frames': 4, 'do_sample_frames': True}
#   V-JEPA 2: AttributeError: 'VJEPA2Config' object has no attribute 'num_frames'
#   V-JEPA 2, num_frames=4: the processor is asked for {'num_frames': 4, 'do_sample_frames': True}
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.14.1 torchvision==0.29.1 transformers==5.24.0 av==18.1.0 \
    numpy==2.4.6
export HF_HOME="$folder/home" HF_HUB_OFFLINE=1
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
import sys

import torch
import transformers
from transformers import (
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    VideoMAEVideoProcessor,
    VJEPA2Config,
    VJEPA2ForVideoClassification,
    VJEPA2VideoProcessor,
    pipeline,
)
from transformers.feature_extraction_utils import BatchFeature


transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
print(f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}")
videomae = VideoMAEConfig(
    image_size=32, patch_size=16, num_frames=4, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
    intermediate_size=32,
)
vjepa = VJEPA2Config(
    crop_size=32, frames_per_clip=4, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_pooler_layers=1,
    pred_hidden_size=32, pred_num_hidden_layers=1, pred_num_attention_heads=2,
)


def asked(pipe, key, **options):
    """What the pipeline asks of its video processor, which here decodes nothing, or the error."""
    requests = []

    def processor(video, return_tensors=None, **request):
        requests.append(request)
        return BatchFeature({key: torch.zeros(1, 4, 3, 32, 32)})

    pipe.video_processor = processor
    try:
        pipe("clip.mp4", **options)
    except AttributeError as error:
        return f"AttributeError: {error}"
    return f"the processor is asked for {requests[0]}"


size = {"size": {"height": 32, "width": 32}, "crop_size": {"height": 32, "width": 32}}
mae = pipeline(
    "video-classification", model=VideoMAEForVideoClassification(videomae), image_processor=None,
    video_processor=VideoMAEVideoProcessor(**size), device="cpu",
)
jepa = pipeline(
    "video-classification", model=VJEPA2ForVideoClassification(vjepa), image_processor=None,
    video_processor=VJEPA2VideoProcessor(**size), device="cpu",
)
seen = {
    f"VideoMAE, frame_sampling_rate={rate}": asked(mae, "pixel_values", frame_sampling_rate=rate) for rate in (1, 4)
}
seen["V-JEPA 2"] = asked(jepa, "pixel_values_videos")
seen["V-JEPA 2, num_frames=4"] = asked(jepa, "pixel_values_videos", num_frames=4)
for name, what in seen.items():
    print(f"{name}: {what}")
request = "the processor is asked for {'num_frames': 4, 'do_sample_frames': True}"
missing = "AttributeError: 'VJEPA2Config' object has no attribute 'num_frames'"
sys.exit(0 if list(seen.values()) == [request, request, missing, request] else "The behaviour has changed.")
PYTHON
