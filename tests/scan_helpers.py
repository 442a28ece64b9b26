"""Random arguments of the selective scan, and how its backends are compared with the float64 reference."""

import torch

from modeling_videomamba.selective_scan import ScanOrder
from modeling_videomamba.selective_scan_reference import bidirectional_selective_scan_reference


PARAMETER_NAMES = ["xz", "conv_weight", "conv_bias", "x_proj_weight", "dt_proj_weight", "dt_proj_bias", "A_log", "D"]


def random_inputs(batch, length, channels, states=16, rank=3, taps=4, step_bias=-3.0, seed=0):
    """Random float32 arguments of `bidirectional_selective_scan`; `step_bias` shifts Δ before its softplus."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator) * scale

    return [
        normal(batch, length, 2 * channels),
        normal(2, channels, taps, scale=0.5),
        normal(2, channels, scale=0.1),
        normal(2, rank + 2 * states, channels, scale=channels**-0.5),
        normal(2, channels, rank, scale=rank**-0.5),
        normal(2, channels) + step_bias,
        torch.arange(1.0, states + 1).log() + normal(2, channels, states, scale=0.1),
        normal(2, channels),
    ]


def scan_order(visits):
    """Any permutation of the tokens (L,) as the order of the backward direction."""
    return ScanOrder(visits, torch.argsort(visits))


def gradients(function, inputs, output_gradient):
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    output = function(*inputs)
    output.backward(output_gradient.to(output.dtype))
    return output.detach(), [t.grad for t in inputs]


def relative_error(found, expected):
    assert found.shape == expected.shape
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


def assert_matches_reference(function, inputs, order=None, tolerance=1e-5, gradient_tolerance=1e-5):
    """Forward and every gradient against the float64 reference, each named in the failure."""
    generator = torch.Generator().manual_seed(1)
    batch, length, width = inputs[0].shape
    output_gradient = torch.randn(batch, length, width // 2, generator=generator)

    def in_float64(*tensors):
        return bidirectional_selective_scan_reference(*tensors, order=order, dtype=torch.float64)

    expected, expected_gradients = gradients(in_float64, [t.double() for t in inputs], output_gradient)
    found, found_gradients = gradients(lambda *t: function(*t, order=order), inputs, output_gradient)
    errors = {"output": relative_error(found, expected)}
    assert errors["output"] <= tolerance, errors
    for name, value, wanted in zip(PARAMETER_NAMES, found_gradients, expected_gradients, strict=True):
        errors[name] = relative_error(value, wanted)
    too_large = {name: e for name, e in errors.items() if not e <= gradient_tolerance}
    assert not too_large, too_large
