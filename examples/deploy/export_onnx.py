#!/usr/bin/env python
"""Exports a VideoMamba classifier to ONNX, with the settings of its processor and its labels beside it.

    python examples/deploy/export_onnx.py you/videomamba-k400 videomamba-onnx

The folder then holds `model.onnx` (input `pixel_values`, any number of clips at once; output `logits`), `config.json`
and `video_preprocessor_config.json`. examples/deploy/classify_onnx.py needs no more, and runs without PyTorch.

    python examples/deploy/export_onnx.py my-streaming-checkpoint stream-onnx --stream

writes a step of a stream: `pixel_values` of one tubelet and the state, all zeros in the beginning, give `logits` of
all that was seen and the state for the next step, each tensor under its name with `next.` before it.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a Hub repository")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--any_length", action="store_true", help="take clips of any number of frames")
    parser.add_argument("--stream", action="store_true", help="write a step of a stream (docs/streaming.md)")
    parser.add_argument("--browser", action="store_true", help="as the page takes it: single steps if it can stream")
    args = parser.parse_args()
    if args.any_length and (args.stream or args.browser):
        parser.error("--any_length is of whole clips: leave out --stream and --browser")
    return args


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    parse_arguments()  # before the imports below, which take seconds

import numpy as np
import torch
from transformers import AutoModelForVideoClassification, AutoVideoProcessor

from modeling_videomamba import VideoMambaCache, VideoMambaConfig
from modeling_videomamba.configuration_videomamba import unstreamable_reason
from modeling_videomamba.loading_videomamba import unloadable_reason


TOLERANCE = 1e-4  # largest difference of a logit, in float32, between PyTorch and ONNX Runtime


def export_onnx(model, path, any_length=False):
    """
    Writes a classifier as one ONNX file that takes any number of clips of the config's size.

    Args:
        model (`VideoMambaForVideoClassification`): exported in float32, on a CPU.
        path (`str` or `Path`): where to write; a file that is there is replaced once the new one is whole.
        any_length (`bool`): take clips of any number of frames that fills tubelets; learned positions are
            interpolated, as `interpolate_pos_encoding=True` does it.

    Raises:
        RuntimeError: with a PyTorch before 2.11, whose exporter fails on the loop over the tokens.
    """
    if torch.__version__ < (2, 11):
        raise RuntimeError(f"The export needs PyTorch 2.11 or later; this is {torch.__version__}.")
    model = model.float().cpu().eval()
    config = model.config
    height, width = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
    axes = {0: torch.export.Dim("batch")}
    frames = config.num_frames
    if any_length:
        shortest = config.tubelet_size * config.merge_factor
        axes[1] = shortest * torch.export.Dim("tubelets", min=2)
        frames += shortest  # at the config's own length the model would not interpolate
    # Two clips, since torch.export takes an axis of one for a constant.
    clips = torch.zeros(2, frames, config.num_channels, height, width)
    with torch.no_grad():
        program = torch.onnx.export(
            model,
            kwargs={"pixel_values": clips, "interpolate_pos_encoding": any_length},
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamic_shapes={"pixel_values": axes, "interpolate_pos_encoding": None},
            dynamo=True,
            verbose=False,
        )
    save(program, path)


class StreamStep(torch.nn.Module):
    """A step of streams, with the tensors of the cache (`VideoMambaCache.state_dict`) as arguments and results."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, state):
        cache = VideoMambaCache(self.model.config, pixel_values.shape[0])
        cache.load_state_dict(state)
        logits = self.model(pixel_values, cache=cache).logits
        return logits, *cache.state_dict().values()


def export_step(model, path):
    """
    Writes one step of a classifier that can stream as an ONNX file that takes any number of streams.

    Args:
        model (`VideoMambaForVideoClassification`): exported in float32, on a CPU.
        path (`str` or `Path`): where to write; a file that is there is replaced once the new one is whole.
    """
    model = model.float().cpu().eval()
    config, batch = model.config, torch.export.Dim("batch")
    height, width = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
    state = VideoMambaCache(config, 2).state_dict()
    with torch.no_grad():
        program = torch.onnx.export(
            StreamStep(model).eval(),
            kwargs={
                "pixel_values": torch.zeros(2, config.tubelet_size, config.num_channels, height, width),
                "state": state,
            },
            input_names=["pixel_values", *state],
            output_names=["logits", *(f"next.{name}" for name in state)],
            dynamic_shapes={
                "pixel_values": {0: batch},
                "state": {name: {int(name.startswith("states.")): batch} for name in state},
            },
            dynamo=True,
            verbose=False,
        )
    save(program, path)


def save(program, path):
    with tempfile.TemporaryDirectory(dir=Path(path).parent) as scratch:
        whole = os.path.join(scratch, "model.onnx")
        program.save(whole, external_data=False)
        os.replace(whole, path)


def largest_difference(model, path, any_length=False):
    """The largest difference of a logit between PyTorch and ONNX Runtime, over batches of one and of three clips."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    frames, shortest = model.config.num_frames, model.config.tubelet_size * model.config.merge_factor
    differences = []
    for batch, length in ((1, frames), (3, frames + 2 * shortest if any_length else frames)):
        shape = (batch, length, *session.get_inputs()[0].shape[2:])
        clips = torch.randn(shape, generator=torch.Generator().manual_seed(batch))
        (logits,) = session.run(["logits"], {"pixel_values": clips.numpy()})
        with torch.no_grad():
            expected = model(clips, interpolate_pos_encoding=any_length).logits
        differences.append((expected - torch.from_numpy(logits)).abs().max().item())
    return max(differences)


def run_stream(session, clips, tubelet):
    """The logits (B, num_labels) after the last step of clips (B, T, C, H, W), given step by step."""
    inputs = {entry.name: entry for entry in session.get_inputs()}
    del inputs["pixel_values"]
    types = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    state = {
        name: np.zeros([side if isinstance(side, int) else len(clips) for side in entry.shape], types[entry.type])
        for name, entry in inputs.items()
    }
    for start in range(0, clips.shape[1], tubelet):
        logits, *after = session.run(None, {"pixel_values": clips[:, start : start + tubelet], **state})
        state = dict(zip(state, after, strict=True))
    return logits


def largest_difference_of_streams(model, path):
    """As `largest_difference`, of streams that are as long as two clips."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    differences = []
    for batch in (1, 3):
        shape = (batch, 2 * model.config.num_frames, *session.get_inputs()[0].shape[2:])
        clips = torch.randn(shape, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected = model(clips, use_cache=True).logits
        logits = torch.from_numpy(run_stream(session, clips.numpy(), model.config.tubelet_size))
        differences.append((expected - logits).abs().max().item())
    return max(differences)


def main():
    args = parse_arguments()
    if reason := unloadable_reason(args.model):
        sys.exit(reason)
    model = AutoModelForVideoClassification.from_pretrained(args.model, dtype=torch.float32).eval()
    if args.browser and isinstance(model.config, VideoMambaConfig) and unstreamable_reason(model.config) is None:
        args.stream, model.config.pooling_window = True, 1  # stream.js makes the means
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "model.onnx"
    print(f"Exporting {args.model}: half a minute for a small model, minutes for a large one ...", flush=True)
    if args.stream:
        export_step(model, path)
    else:
        export_onnx(model, path, args.any_length)
    # All fields, so that readers need no defaults; and none of the code that `save_pretrained` puts beside a model.
    model.config.to_json_file(args.output / "config.json", use_diff=False)
    AutoVideoProcessor.from_pretrained(args.model).to_json_file(args.output / "video_preprocessor_config.json")
    print("Comparing the file's logits with PyTorch's ...", flush=True)
    if args.stream:
        difference = largest_difference_of_streams(model, path)
    else:
        difference = largest_difference(model, path, args.any_length)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB; logits within {difference:.1g} of PyTorch's on random clips")
    if not difference <= TOLERANCE:
        sys.exit(f"The difference is more than {TOLERANCE:g}: do not use this file, and report your versions.")


if __name__ == "__main__":
    main()
