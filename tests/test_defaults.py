"""Another default device or dtype of PyTorch changes nothing: no tensor of the package's own takes it."""

import contextlib

import numpy as np
import pytest
import torch
from torch import nn

from modeling_videomamba import (
    ClipLoader,
    VideoMambaConfig,
    VideoMambaForVideoClassification,
    VideoMambaForVideoFrameClassification,
    VideoMambaImageProcessor,
    VideoMambaVideoProcessor,
    selective_scan_numba,
)
from modeling_videomamba.selective_scan import ScanState, bidirectional_selective_scan
from modeling_videomamba.tokens_videomamba import backward_order


@contextlib.contextmanager
def other_defaults():
    """As of a program that calls `torch.set_default_device("cuda")`; what is on "meta" holds no numbers."""
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def assert_same(compute):
    """`compute()` gives the same values, dtypes and devices. What it keeps from call to call, the others made."""
    selective_scan_numba._compile.cache_clear()
    selective_scan_numba._full_reversal.cache_clear()
    selective_scan_numba._workspace.memory = selective_scan_numba._workspace.memory[:0]
    with other_defaults():
        found = compute()
    expected = compute()
    assert len(expected) == len(found) > 0
    for one, other in zip(expected, found, strict=True):
        assert (one.dtype, one.device) == (other.dtype, other.device)
        assert torch.equal(one, other)


def tiny_model(cls=VideoMambaForVideoClassification, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "num_frames": 4, "image_size": 32}
    return cls(VideoMambaConfig(**{**sizes, "num_labels": 3, **options})).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["numba", "torch", "export", "sequential"])
@pytest.mark.parametrize("reversed_tokens", ["temporal", "spatiotemporal"])
def test_scans(backend, dtype, reversed_tokens):
    order = backward_order(VideoMambaConfig(backward_scan=reversed_tokens, class_token_position="none"), (2, 2, 3))
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 12, 12), (2, 6, 4), (2, 6), (2, 2 + 10, 6), (2, 6, 2), (2, 6), (2, 6, 5), (2, 6)]
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]

    def compute():
        xz = inputs[0].to(dtype)
        output = bidirectional_selective_scan(xz, *inputs[1:], order=order, backend=backend)
        return output, *torch.autograd.grad(output.float().pow(2).sum(), inputs)

    assert_same(compute)


def test_the_cpu_kernels_are_not_compiled_again_for_float64():
    model, clips = tiny_model(), torch.randn(1, 4, 3, 32, 32)
    with other_defaults():
        model(clips, labels=torch.zeros(1, dtype=torch.long, device="cpu")).loss.backward()
    kernels = selective_scan_numba.scan, selective_scan_numba.scan_backward
    assert all(kernel.signatures for kernel in kernels)
    assert not [types for kernel in kernels for types in kernel.signatures if "float64" in str(types)]


@pytest.mark.parametrize("backend", ["numba", "torch", "export", "sequential"])
def test_scans_that_go_on(backend):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 5, 12), (2, 6, 4), (2, 6), (2, 2 + 10, 6), (2, 6, 2), (2, 6), (2, 6, 5), (2, 6)]
    xz, *parameters = (torch.randn(shape, generator=generator) for shape in shapes)
    state = ScanState(*(torch.randn(shape, generator=generator) for shape in ((2, 2, 3, 6), (2, 2, 6, 5))))

    def compute():
        output, after = bidirectional_selective_scan(xz, *parameters, order=None, state=state, backend=backend)
        return output, *after

    assert_same(compute)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"class_token_position": "middle", "backward_scan": "spatial", "position_embedding_type": "sinusoidal"},
        {"problem_type": "multi_label_classification", "class_token_position": "none", "backward_scan": "temporal"},
    ],
)
def test_models(options):
    model = tiny_model(**options)
    clips, labels = torch.randn(2, 8, 3, 48, 32), torch.tensor([0, 2])
    if "problem_type" in options:
        labels = nn.functional.one_hot(labels, 3).float()

    def compute():
        outputs = model(clips, labels=labels, interpolate_pos_encoding=True, output_hidden_states=True)
        gradients = torch.autograd.grad(outputs.loss, list(model.parameters()), allow_unused=True)
        return outputs.loss, outputs.logits, *outputs.hidden_states, *(g for g in gradients if g is not None)

    assert_same(compute)


def test_streams():
    streams = {"backward_scan": "spatial", "class_token_position": "none", "position_embedding_type": "spatial"}
    model = tiny_model(VideoMambaForVideoFrameClassification, **streams, pooling_window=2)
    clips = torch.randn(2, 8, 3, 32, 32)

    def compute():
        first = model(clips[:, :4], use_cache=True)
        return first.logits, model(clips[:, 4:], cache=first.cache).logits

    with torch.no_grad():
        assert_same(compute)


def test_maps():
    model, clips = tiny_model(), torch.randn(1, 4, 3, 32, 32)

    def compute():
        delta, reading = model.delta_maps(clips), model.reading_maps(clips, labels=[1])
        return [value for maps in (delta, reading) for value in _tensors(maps)]

    assert_same(compute)


def _tensors(values):
    if isinstance(values, torch.Tensor):
        return [values]
    values = values.values() if isinstance(values, dict) else values
    return [tensor for value in values for tensor in _tensors(value)]


def test_models_are_made_and_loaded_with_whole_positions(tmp_path):
    model = tiny_model(position_embedding_type="sinusoidal")
    model.save_pretrained(tmp_path)
    clips = torch.randn(1, 4, 3, 32, 32)

    def compute():
        loaded = VideoMambaForVideoClassification.from_pretrained(tmp_path, dtype=torch.float32, device_map="cpu")
        return loaded(clips).logits, *loaded.parameters()

    with torch.no_grad():
        assert_same(compute)


@pytest.mark.parametrize("decoder", ["pyav", "torchcodec", "decord"])
@pytest.mark.parametrize("sampling", [{}, {"sampling_fps": 5}])
def test_files(video, decoder, sampling):
    if decoder != "pyav":
        pytest.importorskip(decoder, reason=f"needs the decoder {decoder}", exc_type=(ImportError, RuntimeError))
    processor = VideoMambaVideoProcessor(num_frames=4, crop_size=32, size={"shortest_edge": 40}, **sampling)
    clip = video("h264.mp4")
    assert_same(lambda: (processor(clip, decoder=decoder, return_tensors="pt")["pixel_values"],))


def test_frames():
    size = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
    frames = np.random.default_rng(0).integers(0, 256, (6, 48, 64, 3), dtype=np.uint8)
    for processor in (VideoMambaVideoProcessor(num_frames=4, **size), VideoMambaImageProcessor(**size)):
        assert_same(lambda: (processor(list(frames), return_tensors="pt")["pixel_values"],))  # noqa: B023


@pytest.mark.parametrize("num_workers", [0, 1])
def test_many_clips(video, num_workers):
    processor = VideoMambaVideoProcessor(num_frames=4, crop_size=32, size={"shortest_edge": 40})
    files = [video("h264.mp4")] * 3

    def compute():
        loader = ClipLoader(files, processor, batch_size=2, num_workers=num_workers)
        return [batch.pixel_values for batch in loader]

    assert_same(compute)
