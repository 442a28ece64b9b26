"""The selective scan for other models: the public functions of csrc/hub/, and the repository that is made of them."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F


from plain_vision_mamba import random_weights
from plain_vision_mamba import scan as plain_scan
from scan_helpers import relative_error


ROOT = Path(__file__).parents[1]
HUB = ROOT / "csrc" / "hub"
NAMES = "u delta A B C D z delta_bias".split()


def hub_module(name):
    """A module of csrc/hub/ as it stands in a built repository: beside the package's modules."""
    full_name = f"modeling_videomamba.{name}"
    if full_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(full_name, HUB / f"{name}.py")
        sys.modules[full_name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[full_name]


@pytest.fixture
def interface(on_cpu, monkeypatch):
    """The module of `selective_scan_fn`, with its kernels on the CPU, planned for two multiprocessors."""
    module = hub_module("selective_scan_interface")
    monkeypatch.setattr(module, "unusable_reason", lambda device, dtype: None)
    on_cpu(2)
    return module


def written_out(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """mamba-ssm's function as plain as can be: outputs and the last state."""
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    if B.ndim == 4:
        B, C = (t.repeat_interleave(u.shape[1] // t.shape[1], dim=1) for t in (B, C))  # (B, E, N, L)
    else:
        B, C = B[:, None], C[:, None]
    state, outputs = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        step = delta[:, :, t, None]
        state = (step * A).exp() * state + step * u[:, :, t, None] * B[..., t]
        outputs.append((state * C[..., t]).sum(-1))
    y = torch.stack(outputs, dim=2)
    if D is not None:
        y = y + D[:, None] * u
    return (y if z is None else y * F.silu(z)), state


def random_inputs(batch, channels, length, states=16, groups=None, dtype=torch.float32, last=(), seed=0):
    """Arguments by name; those named in `last` lie in memory channels last."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator) * scale

    matrix = (batch, states, length) if groups is None else (batch, groups, states, length)
    inputs = dict(
        u=normal(batch, channels, length),
        delta=normal(batch, channels, length) - 2,
        A=-(torch.arange(1.0, states + 1) * normal(channels, states, scale=0.2).exp()),
        B=normal(*matrix),
        C=normal(*matrix),
        D=normal(channels),
        z=normal(batch, channels, length),
        delta_bias=normal(channels, scale=0.5),
    )
    for name in ("u", "delta", "B", "C", "z"):
        inputs[name] = inputs[name].to(dtype)
    for name in last:
        inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    return inputs


def outputs_and_gradients(function, inputs, softplus, with_state):
    """Outputs, the last state, and the gradients of all inputs, for fixed random gradients of both outputs."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items() if t is not None}
    found = function(**leaves, delta_softplus=softplus)
    generator = torch.Generator().manual_seed(5)
    sent_back = [torch.randn(t.shape, generator=generator) for t in found]
    outputs = found if with_state else found[:1]
    sent_back = [g.to(t.dtype) for g, t in zip(sent_back, outputs)]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), sent_back)
    return {"out": found[0], "state": found[1], **dict(zip(leaves, gradients, strict=True))}


def assert_as_written_out(function, inputs, softplus=True, with_state=True, tolerance=1e-5):
    exact = {name: None if t is None else t.double() for name, t in inputs.items()}
    expected = outputs_and_gradients(written_out, exact, softplus, with_state)
    found = outputs_and_gradients(function, inputs, softplus, with_state)
    for name, t in inputs.items():
        assert t is None or found[name].dtype == t.dtype
    assert found["out"].dtype == inputs["u"].dtype and found["state"].dtype == torch.float32
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    too_large = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not too_large, too_large


LAYOUTS = (), ("u", "z"), ("delta",), ("u", "delta", "z", "B", "C")


# A tile and less, several, chunks side by side; channels that fill no block; one state, many; two groups.
@pytest.mark.parametrize(
    "batch, channels, length, states, groups, last, dtype",
    [
        (1, 32, 1, 16, None, (), torch.float32),
        (2, 48, 37, 16, None, (), torch.float32),
        (2, 48, 37, 16, None, (), torch.bfloat16),
        (3, 64, 150, 16, 1, ("u", "z"), torch.bfloat16),
        (2, 20, 70, 5, 2, ("delta",), torch.float32),
        (2, 64, 70, 16, 2, ("u", "delta", "z"), torch.float16),
        (1, 32, 200, 24, None, (), torch.float32),
        (40, 128, 33, 16, None, (), torch.bfloat16),
        (40, 128, 33, 16, None, ("u", "delta"), torch.float32),
    ],
)
def test_the_scan_is_that_of_mamba_ssm(interface, batch, channels, length, states, groups, last, dtype):
    inputs = random_inputs(batch, channels, length, states, groups, dtype, last)

    def scan(**inputs):
        return interface.selective_scan_fn(**inputs, return_last_state=True)

    assert_as_written_out(scan, inputs, tolerance=1e-5 if dtype == torch.float32 else 1.5e-2)
