#!/usr/bin/env python
"""Exports a VideoMamba classifier to ONNX, with the settings of its processor and its labels beside it.

    python examples/export_onnx.py you/videomamba-k400 videomamba-onnx

The folder then holds `model.onnx` (input `pixel_values`, any number of clips at once; output `logits`), `config.json`
and `video_preprocessor_config.json`: all that examples/classify_onnx.py needs, which runs without PyTorch.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForVideoClassification, AutoVideoProcessor

import modeling_videomamba  # noqa: F401  registers VideoMamba in transformers' Auto classes


TOLERANCE = 1e-4  # largest difference of a logit, in float32, between PyTorch and ONNX Runtime


def export_onnx(model, path):
    """
    Writes a classifier as one ONNX file that takes any number of clips of the config's size.

    Args:
        model (`VideoMambaForVideoClassification`): exported in float32, on a CPU.
        path (`str` or `Path`): where to write; a file that is there is replaced once the new one is whole.
    """
    model = model.float().cpu().eval()
    config = model.config
    height, width = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
    # Two clips, since torch.export takes an axis of one for a constant.
    clips = torch.zeros(2, config.num_frames, config.num_channels, height, width)
    with torch.no_grad():
        program = torch.onnx.export(
            model,
            kwargs={"pixel_values": clips},
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
            dynamo=True,
            verbose=False,
        )
    with tempfile.TemporaryDirectory(dir=Path(path).parent) as scratch:
        whole = os.path.join(scratch, "model.onnx")
        program.save(whole, external_data=False)
        os.replace(whole, path)


def largest_difference(model, path):
    """The largest difference of a logit between PyTorch and ONNX Runtime, over one and over three random clips."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    shape = session.get_inputs()[0].shape[1:]
    differences = []
    for batch in (1, 3):
        clips = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))
        (logits,) = session.run(["logits"], {"pixel_values": clips.numpy()})
        with torch.no_grad():
            differences.append((model(clips).logits - torch.from_numpy(logits)).abs().max().item())
    return max(differences)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a Hub repository")
    parser.add_argument("output", type=Path, help="folder to write")
    args = parser.parse_args()

    model = AutoModelForVideoClassification.from_pretrained(args.model, dtype=torch.float32).eval()
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "model.onnx"
    export_onnx(model, path)
    model.config.save_pretrained(args.output)
    AutoVideoProcessor.from_pretrained(args.model).save_pretrained(args.output)
    difference = largest_difference(model, path)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB; logits within {difference:.1g} of PyTorch's on random clips")
    if not difference <= TOLERANCE:
        sys.exit(f"That is more than {TOLERANCE:g}: do not use this file, and report it with the versions you have.")


if __name__ == "__main__":
    main()
