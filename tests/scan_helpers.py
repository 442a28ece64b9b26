"""Random arguments of the selective scan, and how its backends are compared with the float64 reference."""

import torch

from modeling_videomamba.selective_scan import ScanOrder
from modeling_videomamba.selective_scan_reference import bidirectional_selective_scan_reference


PARAMETER_NAMES = ["xz", "conv_weight", "conv_bias", "x_proj_weight", "dt_proj_weight", "dt_proj_bias", "A_log", "D"]
STATE_NAMES = ["conv", "recurrent"]


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


def random_state(inputs, seed=2):
    """A state to begin with, for the arguments of `random_inputs`."""
    generator = torch.Generator(inputs[0].device).manual_seed(seed)
    batch, channels, taps, states = inputs[0].shape[0], *inputs[1].shape[1:], inputs[6].shape[2]

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=inputs[0].device)

    return [normal(2, batch, taps - 1, channels).to(inputs[0].dtype), normal(2, batch, channels, states)]


def part_orders(kind, lengths, device="cpu"):
    """An order for each part: None, the reversal of it; the tokens of three frames reversed; or any."""
    generator = torch.Generator().manual_seed(7)

    def order(length):
        if kind == "reversal":
            return None
        if kind == "any":
            return scan_order(torch.randperm(length, generator=generator).to(device))
        frames = 3 if length % 3 == 0 else 1
        visits = torch.arange(length, device=device).view(frames, -1).flip(1).flatten()
        return ScanOrder(visits, torch.argsort(visits), "spatial", frames)

    return [order(length) for length in lengths]


def scan_in_parts(function, lengths, orders):
    """A function of the arguments and of both tensors of a state, that goes on from part to part."""

    def scan(xz, *rest):
        *parameters, conv, recurrent = rest
        state, outputs = (conv, recurrent), []
        for part, order in zip(xz.split(lengths, dim=1), orders, strict=True):
            output, state = function(part, *parameters, order=order, state=state)
            outputs.append(output)
        return torch.cat(outputs, dim=1), *state

    return scan


def assert_parts_match_reference(
    function, inputs, lengths, kind="any", tolerance=1e-5, gradient_tolerance=1e-4, device="cpu"
):
    """
    A sequence scanned part by part, both directions in the order of the parts, from a random state: outputs, the state
    at the end and every gradient, of what came in too, against the float64 reference of the whole.
    """
    orders = part_orders(kind, lengths, device)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    visits = [
        start + (torch.arange(length, device=device).flip(0) if order is None else order.visits)
        for start, length, order in zip(starts, lengths, orders, strict=True)
    ]
    tensors = [*inputs, *random_state(inputs)]
    generator = torch.Generator().manual_seed(3)
    results = []
    for scan, parts, part_order in (
        (bidirectional_selective_scan_reference, [sum(lengths)], [scan_order(torch.cat(visits))]),
        (function, lengths, orders),
    ):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        outputs = scan_in_parts(scan, parts, part_order)(*leaves)
        if not results:
            sent_back = [torch.randn(o.shape, generator=generator).to(device) for o in outputs]
        results.append(
            [
                *outputs,
                *torch.autograd.grad(
                    outputs, leaves, [g.to(o.dtype) for g, o in zip(sent_back, outputs, strict=True)]
                ),
            ]
        )
    with torch.no_grad():
        results.append([*scan_in_parts(function, lengths, orders)(*tensors)])
    names = ["output", *(f"{n} after" for n in STATE_NAMES), *PARAMETER_NAMES, *STATE_NAMES]
    expected, found, inferred = results
    types = [tensors[i].dtype for i in (0, -2, -1)]
    assert [t.dtype for t in found] == types + [t.dtype for t in tensors]
    errors = {n: relative_error(f, e) for n, f, e in zip(names, found, expected, strict=True)}
    errors |= {
        f"{n} without gradients": relative_error(f, e)
        for n, f, e in zip(names[:3], inferred, expected[:3], strict=True)
    }
    limit = {n: tolerance if n in names[:3] or "without" in n else gradient_tolerance for n in errors}
    too_large = {n: e for n, e in errors.items() if not e <= limit[n]}
    assert not too_large, too_large
