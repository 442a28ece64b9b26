"""The backend of the public kernels, with a kernel folder of our own in their place: their interface, in PyTorch."""

import json
import os
import subprocess
import sys

import pytest


# What the two public functions compute, written for tensors (B, E, L) as their documentation says it.
KERNELS = """
import torch
import torch.nn.functional as F


def causal_conv1d_fn(x, weight, bias, activation):
    assert activation == "silu"
    padded = F.pad(x, (weight.shape[1] - 1, 0))
    return F.silu(F.conv1d(padded, weight[:, None], bias, groups=x.shape[1]))


def selective_scan_fn(u, delta, A, B, C, D, delta_bias, delta_softplus):
    assert delta_softplus and B.is_contiguous() and C.is_contiguous()
    delta = F.softplus(delta + delta_bias[:, None])
    state, outputs = torch.zeros(*u.shape[:2], A.shape[1]), []
    for k in range(u.shape[2]):
        state = torch.exp(delta[..., k, None] * A) * state + delta[..., k, None] * B[:, None, :, k] * u[..., k, None]
        outputs.append((state * C[:, None, :, k]).sum(-1) + D * u[..., k])
    return torch.stack(outputs, dim=2)
"""

COMPARE = """
import torch
from modeling_videomamba.selective_scan import ScanOrder
from modeling_videomamba.selective_scan_mamba_ssm import bidirectional_selective_scan, unusable_reason
from modeling_videomamba.selective_scan_reference import bidirectional_selective_scan_reference
from scan_helpers import random_inputs

print(unusable_reason(torch.device("cpu"), torch.float32))
inputs = random_inputs(2, 9, 8)
visits = torch.tensor([3, 0, 8, 1, 7, 2, 6, 4, 5])
for order in (None, ScanOrder(visits, torch.argsort(visits))):
    expected = bidirectional_selective_scan_reference(*inputs, order=order, dtype=torch.float64)
    found = bidirectional_selective_scan(*inputs, order=order)
    print((found - expected).abs().max().item() < 1e-5 < expected.abs().max().item())
"""


def test_kernels_of_a_local_folder_match_the_reference(tmp_path):
    pytest.importorskip("kernels", reason="needs the package kernels")
    variant = tmp_path / "build" / "torch-universal"
    variant.mkdir(parents=True)
    (variant / "__init__.py").write_text(KERNELS)
    metadata = {"id": "mamba", "name": "mamba", "version": 1, "license": "Apache-2.0", "backend": {"type": "cpu"}}
    (variant / "metadata.json").write_text(json.dumps({**metadata, "python-depends": []}))
    environment = {"VIDEOMAMBA_HUB_KERNELS": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", COMPARE]
    found = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert found.stdout.splitlines()[1:] == ["True", "True"], found.stderr
    assert "needs an NVIDIA GPU" in found.stdout.splitlines()[0]


@pytest.mark.parametrize(
    "package, kernel", [("mamba-ssm", "selective_scan_cuda"), ("causal-conv1d", "causal_conv1d_cuda")]
)
def test_a_package_without_its_kernel_is_named(package, kernel, tmp_path):
    """As `pip install` leaves it where it found no nvcc: the Python files alone."""
    interface = tmp_path / "mamba_ssm" / "ops"
    interface.mkdir(parents=True)
    (tmp_path / "causal_conv1d.py").write_text("causal_conv1d_fn = None")
    (interface / "selective_scan_interface.py").write_text("selective_scan_fn = None")
    broken = interface / "selective_scan_interface.py" if package == "mamba-ssm" else tmp_path / "causal_conv1d.py"
    broken.write_text(f"import {kernel}")
    ask = f"import sys, torch\nsys.modules[{kernel!r}] = None\n"  # even where it is built
    ask += "from modeling_videomamba.selective_scan_mamba_ssm import unusable_reason\n"
    command = [sys.executable, "-c", ask + "print(unusable_reason(torch.device('cuda'), torch.float32))"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    environment.pop("VIDEOMAMBA_HUB_KERNELS", None)
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert f"({package} is installed without its CUDA kernel {kernel}: build it" in found.stdout, found.stderr
