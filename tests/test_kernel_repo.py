"""The selective scan for other models: the public functions of csrc/hub/, and the repository that is made of them."""

import ast
import ctypes
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hub_server import HubServer
from plain_vision_mamba import random_weights
from plain_vision_mamba import scan as plain_scan
from scan_helpers import relative_error


pytest_plugins = "cuda_emulation"  # its fixtures

ROOT = Path(__file__).parents[1]
HUB = ROOT / "csrc" / "hub"
gpu = pytest.mark.gpu


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


def random_inputs(batch, channels, length, states=16, groups=None, dtype=torch.float32, last=()):
    """Arguments by name; those named in `last` lie in memory channels last."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator) * scale

    matrix = (batch, states, length) if groups is None else (batch, groups, states, length)
    inputs = {
        "u": normal(batch, channels, length),
        "delta": normal(batch, channels, length) - 2,
        "A": -(torch.arange(1.0, states + 1) * normal(channels, states, scale=0.2).exp()),
        "B": normal(*matrix),
        "C": normal(*matrix),
        "D": normal(channels),
        "z": normal(batch, channels, length),
        "delta_bias": normal(channels, scale=0.5),
    }
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
    outputs = found if with_state else found[:1]
    sent_back = [torch.randn(t.shape, generator=generator).to(t) for t in outputs]
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


def with_last_state(scan):
    return lambda **inputs: scan(**inputs, return_last_state=True)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


# One step; several tiles, the last not whole; the length in chunks side by side. Channels that fill no block, states
# that fill no lane, and many; one group and two. Every layout of the inputs in memory.
@pytest.mark.parametrize(
    "batch, channels, length, states, groups, last, dtype",
    [
        (1, 32, 1, 16, None, (), torch.float32),
        (2, 48, 37, 16, None, (), torch.bfloat16),
        (1, 64, 150, 16, 1, ("u", "z"), torch.bfloat16),
        (2, 20, 70, 5, 2, ("delta",), torch.float32),
        (20, 64, 33, 16, None, ("u", "delta"), torch.float32),
        slow(2, 48, 37, 16, None, (), torch.float32),
        slow(2, 64, 70, 16, 2, ("u", "delta", "z"), torch.float16),
        slow(1, 32, 200, 24, None, (), torch.float32),
        slow(40, 128, 33, 16, None, (), torch.bfloat16),
    ],
)
def test_the_scan_is_that_of_mamba_ssm(interface, batch, channels, length, states, groups, last, dtype):
    inputs = random_inputs(batch, channels, length, states, groups, dtype, last)
    tolerance = 1e-5 if dtype == torch.float32 else 1.5e-2
    assert_as_written_out(with_last_state(interface.selective_scan_fn), inputs, tolerance=tolerance)


@pytest.mark.parametrize("softplus", [False, slow(True)])
def test_what_may_be_left_out(interface, softplus):
    inputs = random_inputs(1, 32, 40) | dict.fromkeys(("D", "z", "delta_bias"))
    if not softplus:
        inputs["delta"] = F.softplus(inputs["delta"])
    scan = with_last_state(interface.selective_scan_fn)
    assert_as_written_out(scan, inputs, softplus=softplus, with_state=False)
    with torch.no_grad():
        out = interface.selective_scan_fn(**inputs, delta_softplus=softplus)
        assert torch.equal(out, scan(**inputs, delta_softplus=softplus)[0])


def test_the_layout_in_memory_is_kept(interface):
    inputs = random_inputs(2, 32, 20)
    first = interface.selective_scan_fn(**inputs, delta_softplus=True)
    last = interface.selective_scan_fn(**random_inputs(2, 32, 20, last=("z",)), delta_softplus=True)
    assert first.is_contiguous() and last.transpose(1, 2).is_contiguous()
    assert torch.allclose(first, last, atol=1e-6)


def test_fast_kernels_are_launched(interface, launched):
    inputs = random_inputs(2, 32, 20)
    interface.selective_scan_fn(**inputs, delta_softplus=True)
    assert launched == ["layout"] * 4 + ["scan", "layout"]  # u, B, C and Δ in, the output and the gate out


def test_arguments_are_laid_out_as_the_kernel_reads_them(compile_for_cpu):
    arguments = hub_module("selective_scan_interface").LayoutArguments
    fields = [name for name, _ in arguments._fields_]
    offsets = ", ".join(f"offsetof(LayoutArgs, {name})" for name in fields)
    more = f"""#include <cstddef>
    extern "C" const size_t found[] = {{sizeof(LayoutArgs), {offsets}}};"""
    found = (ctypes.c_size_t * (len(fields) + 1)).in_dll(compile_for_cpu("layout.cu", (), more), "found")
    assert list(found) == [ctypes.sizeof(arguments), *(getattr(arguments, name).offset for name in fields)]


@pytest.mark.parametrize("channels, groups", [(32, None), (33, 1), (30, 2)])
def test_without_a_gpu_it_is_the_same(channels, groups):
    interface = hub_module("selective_scan_interface")
    inputs = random_inputs(2, channels, 20, groups=groups)
    assert_as_written_out(with_last_state(interface.selective_scan_fn), inputs)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"A": torch.zeros(32, 16, dtype=torch.complex64)}, "`A` must be real"),
        ({"B": torch.zeros(2, 4, 16, 20), "C": torch.zeros(2, 4, 16, 20)}, "one group of channels or two; got 4"),
        ({"delta": torch.zeros(2, 20, 32)}, r"`delta` must have the shape \(2, 32, 20\).* got \(2, 20, 32\)"),
        ({"D": torch.zeros(16)}, r"`D` must have the shape \(32,\)"),
        ({"B": torch.zeros(32, 16)}, "`B` and `C` must have the shape"),
        ({"u": torch.zeros(2, 32, 20, dtype=torch.int32)}, r"`u` must have floating point .* got torch.int32"),
        ({"u": torch.zeros(32, 20)}, r"`u` must .* \(B, E, L\).* got torch.float32, \(32, 20\)"),
    ],
)
def test_what_it_does_not_take_is_refused(change, message):
    interface = hub_module("selective_scan_interface")
    with pytest.raises(ValueError, match=message):
        interface.selective_scan_fn(**{**random_inputs(2, 32, 20), **change})


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "batch, channels, length, groups, last",
    [(1, 768, 1569, None, ()), (64, 768, 65, 1, ("z",)), (8, 200, 300, 2, ("u", "delta"))],
)
def test_the_scan_on_a_gpu(batch, channels, length, groups, last, dtype):
    interface = hub_module("selective_scan_interface")
    inputs = random_inputs(batch, channels, length, groups=groups, dtype=dtype, last=last)
    inputs = {name: t.cuda() for name, t in inputs.items()}
    tolerance = 2e-5 if dtype == torch.float32 else 1.5e-2
    assert interface.unusable_reason(inputs["u"].device, dtype) is None
    assert_as_written_out(with_last_state(interface.selective_scan_fn), inputs, tolerance=tolerance)


# --------------------------------------------------------------------------------------------------------------------
# Vision Mamba's block.
# --------------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """The tensors of Vision Mamba's mixer, under its names."""

    def __init__(self, weights, **attributes):
        super().__init__()
        width, inner = weights["out_proj.weight"].shape
        self.in_proj, self.out_proj = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, width, bias=False)
        for b in ("", "_b"):
            rank = weights[f"dt_proj{b}.weight"].shape[1]
            setattr(self, f"conv1d{b}", nn.Conv1d(inner, inner, 4, groups=inner, padding=3))
            setattr(self, f"x_proj{b}", nn.Linear(inner, rank + 32, bias=False))
            setattr(self, f"dt_proj{b}", nn.Linear(rank, inner))
            setattr(self, f"A{b}_log", nn.Parameter(torch.empty(inner, 16)))
            setattr(self, f"D{b}", nn.Parameter(torch.empty(inner)))
        self.load_state_dict(weights)
        for name, value in attributes.items():
            setattr(self, name, value)


def plain_block(hidden_states, weights):
    """Both directions of a sequence (L, D), by the sequential scan; and what they add up to before `out_proj`."""
    x, z = (hidden_states @ weights["in_proj.weight"].T).chunk(2, dim=1)
    backward = plain_scan(x.flip(0), z.flip(0), weights, "", "_b").flip(0)
    summed = plain_scan(x, z, weights, "", "") + backward
    return summed @ weights["out_proj.weight"].T, summed


@pytest.fixture(params=["cpu", "emulated", pytest.param("cuda", marks=gpu)])
def block(request, monkeypatch):
    """The module of the block, its device; tensors of a mixer and hidden states (2, 21, 32), in float64."""
    module, device = hub_module("bimamba"), request.param
    if device == "emulated":
        request.getfixturevalue("interface")
        monkeypatch.setattr(module, "cuda_unusable_reason", lambda device, dtype: None)
        device = "cpu"
    weights = random_weights("vim", hidden_size=32, depth=1, grid=2, labels=2)
    weights = {name.removeprefix("layers.0.mixer."): t.double() for name, t in weights.items() if ".mixer." in name}
    hidden_states = torch.randn(2, 21, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return module, device, weights, hidden_states


def test_a_vision_mamba_block_in_one_line(block, monkeypatch):
    module, device, weights, hidden_states = block
    mixer = Block(weights).to(device)
    leaves = {name: t.clone().requires_grad_() for name, t in weights.items()}
    expected = torch.stack([plain_block(sequence, leaves)[0] for sequence in hidden_states])
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    expected_gradients = torch.autograd.grad(expected, list(leaves.values()), gradient)
    monkeypatch.setattr(Block, "forward", module.bimamba_forward)
    found = mixer(hidden_states.float().to(device))
    assert relative_error(found.cpu(), expected) < 1e-5
    wanted = dict(mixer.named_parameters())
    found = torch.autograd.grad(found, [wanted[name] for name in leaves], gradient.float().to(device))
    errors = {n: relative_error(f.cpu(), e) for n, f, e in zip(leaves, found, expected_gradients, strict=True)}
    assert max(errors.values()) < 1e-5, errors
    halved = Block(weights, if_devide_out=True, init_layer_scale=0.1, gamma=3.0).to(device)
    assert relative_error(halved(hidden_states.float().to(device)).cpu(), 1.5 * expected) < 1e-5


def test_both_directions_in_mamba_ssm_s_layout(block):
    module, device, weights, hidden_states = block
    expected = torch.stack([plain_block(sequence, weights)[1] for sequence in hidden_states]).transpose(1, 2)
    w = {name: t.float().to(device).requires_grad_() for name, t in weights.items()}
    xz = (hidden_states.float().to(device) @ w["in_proj.weight"].T).transpose(1, 2).contiguous()
    directions = [
        (
            w[f"conv1d{b}.weight"], w[f"conv1d{b}.bias"], w[f"x_proj{b}.weight"], w[f"dt_proj{b}.weight"],
            -w[f"A{b}_log"].exp(), w[f"D{b}"], w[f"dt_proj{b}.bias"],
        )
        for b in ("", "_b")
    ]  # fmt: skip
    found = module.bimamba_inner_fn_no_out_proj(xz, *directions)
    assert relative_error(found.detach().cpu(), expected) < 1e-5
    (in_one,) = torch.autograd.grad(found.square().sum(), w["in_proj.weight"])
    mixer = Block(weights).to(device)
    mixer.out_proj = nn.Identity()
    mixer.out_proj.weight, mixer.out_proj.bias = torch.eye(expected.shape[1], device=device), None
    out = module.bimamba_forward(mixer, hidden_states.float().to(device))
    (in_other,) = torch.autograd.grad(out.square().sum(), mixer.in_proj.weight)
    assert relative_error(in_one, in_other) < 1e-5


def test_blocks_of_another_kind_are_refused():
    module = hub_module("bimamba")
    with pytest.raises(ValueError, match="no `conv1d_b`"):
        module.bimamba_forward(nn.Linear(2, 2), torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match="found inference_params"):
        module.bimamba_forward(nn.Linear(2, 2), torch.zeros(1, 2, 2), inference_params={})


# --------------------------------------------------------------------------------------------------------------------
# The repository.
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    output = tmp_path_factory.mktemp("kernel") / "repository"
    command = [sys.executable, ROOT / "csrc" / "make_kernel_repo.py", output]
    made = subprocess.run(command, capture_output=True, text=True, check=True)
    assert made.stdout.startswith("Wrote ")
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1 and "is not an empty folder" in again.stderr
    return output


def test_one_command_publishes_it(tmp_path):
    hub, output = HubServer(), tmp_path / "out"
    command = [sys.executable, ROOT / "csrc" / "make_kernel_repo.py", output, "--push-to-hub", "you/scan"]
    with hub.serve():
        environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0"}
        made = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert made.returncode == 0 and "Pushed to" in made.stdout, made.stderr
    assert hub.branches == {"kernels/you/scan": ["v1"]}
    files = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    assert set(hub.files["kernels/you/scan"]) == files


def test_the_repository_holds_what_the_kernel_hub_asks_for(repository):
    assert (repository / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    card = (repository / "README.md").read_text()
    assert card.startswith("---\n") and "license: apache-2.0" in card and "PACKAGE_VERSION" not in card
    variants = sorted(path.name for path in (repository / "build").iterdir())
    assert variants == ["torch-cpu", "torch-cuda"]
    for variant in variants:
        metadata = json.loads((repository / "build" / variant / "metadata.json").read_text())
        assert metadata["backend"] == {"type": variant.removeprefix("torch-")}
        assert metadata["version"] == 1 and metadata["license"] == "Apache-2.0" and metadata["id"].isidentifier()


def test_its_modules_stand_alone_in_python_3_9_syntax(repository):
    for path in repository.glob("build/*/*.py"):
        here = {other.stem for other in path.parent.glob("*.py")}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 9))):
            if isinstance(node, ast.ImportFrom) and node.level:
                wanted = [node.module] if node.module else [alias.name for alias in node.names]
                assert node.level == 1 and here.issuperset(wanted), (path, wanted)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                root = module.split(".")[0]
                assert root == "torch" or root in sys.stdlib_module_names, (path, module)


USE = """
import sys
from pathlib import Path
import torch
from kernels import get_local_kernel
kernel = get_local_kernel(Path(sys.argv[1]))
assert not any(name.startswith("modeling_videomamba") for name in sys.modules)
generator = torch.Generator().manual_seed(0)
u, delta, z = (torch.randn(2, 8, 9, generator=generator) for _ in range(3))
B, C = (torch.randn(2, 4, 9, generator=generator) for _ in range(2))
print(kernel.selective_scan_fn(u, delta, -torch.ones(8, 4), B, C, z=z, delta_softplus=True).square().sum().item())
print(sorted(kernel.__all__), kernel.layers.BiMamba.__name__)
"""


def test_the_package_kernels_loads_it(repository):
    pytest.importorskip("kernels", reason="needs the package kernels")
    path = os.pathsep.join(path for path in sys.path if path and Path(path).resolve() != ROOT)
    command = [sys.executable, "-c", USE, str(repository)]
    found = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, cwd=repository, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    generator = torch.Generator().manual_seed(0)
    u, delta, z = (torch.randn(2, 8, 9, generator=generator) for _ in range(3))
    B, C = (torch.randn(2, 4, 9, generator=generator) for _ in range(2))
    expected, _ = written_out(u, delta, -torch.ones(8, 4), B, C, z=z, delta_softplus=True)
    sum_of_squares, names = found.stdout.splitlines()
    assert float(sum_of_squares) == pytest.approx(expected.square().sum().item(), rel=1e-5)
    assert "selective_scan_fn" in names and names.endswith("BiMamba")


def test_mamba_of_transformers_runs_on_it(repository, monkeypatch):
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    spec = importlib.util.spec_from_file_location("scan_of_kernel_repo", repository / "build/torch-cpu/__init__.py")
    kernel = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, kernel)
    spec.loader.exec_module(kernel)
    own = modeling.mamba_selective_scan
    theirs = inspect.signature(getattr(own, "forward", own)).parameters.values()
    ours = list(inspect.signature(kernel.layers.selective_scan_fn.forward).parameters.values())[1:]
    assert [(p.name, p.kind) for p in ours] == [(p.name, p.kind) for p in theirs]  # which `kernels` compares
    torch.manual_seed(0)
    config = modeling.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=50)
    model = modeling.MambaModel(config).eval()
    tokens = torch.randint(50, (2, 12))
    with torch.no_grad():
        expected = model(tokens, use_cache=True)
        calls, scan = [], kernel.layers.selective_scan_fn()
        monkeypatch.setattr(modeling, "mamba_selective_scan", lambda *a, **k: calls.append(k) or scan(*a, **k))
        found = model(tokens, use_cache=True)
    assert len(calls) == 2 and relative_error(found.last_hidden_state, expected.last_hidden_state) < 1e-5
