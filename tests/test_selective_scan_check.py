"""Kernels that check themselves on an architecture that no test has seen, and shared memory that a chip has not."""

import json
import logging

import pytest
import torch

from modeling_videomamba import selective_scan_check, selective_scan_cuda, selective_scan_cuda_simt
from modeling_videomamba import selective_scan_cuda_plan as plan
from modeling_videomamba.selective_scan import bidirectional_selective_scan, select_scan_backend
from modeling_videomamba.selective_scan_reference import bidirectional_selective_scan_reference


pytest_plugins = "cuda_emulation"  # its fixtures

CPU = torch.device("cpu")
# Bytes of shared memory that a thread block may have, by compute capability (CUDA C++ Programming Guide, table of
# technical specifications).
LIMITS = {"7.5": 64 * 1024, "8.6": 99 * 1024, "8.9": 99 * 1024, "12.0": 99 * 1024}


@pytest.fixture
def new_chip(on_cpu, monkeypatch, tmp_path):
    """The kernels run on the CPU, as if on a GPU of compute capability 13.7, with nothing known of it."""
    on_cpu(1)
    monkeypatch.setenv("VIDEOMAMBA_CACHE", str(tmp_path))
    monkeypatch.setattr(selective_scan_check, "_reasons", {})
    monkeypatch.setattr(selective_scan_check, "nvrtc_version", lambda: (13, 9))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (13, 7))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Chip of Tomorrow")
    for backend in (selective_scan_cuda, selective_scan_cuda_simt):
        monkeypatch.setattr(backend, "_unusable_reason", lambda device, dtype: None)
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_kernels_are_used_and_asked_once(new_chip, monkeypatch, launched, dtype):
    with torch.inference_mode(), torch.device("meta"):  # as a first call may be
        assert select_scan_backend(CPU, dtype) == "cuda"
    assert {"scan", "backward"} <= set(launched)
    (verdict,) = new_chip.iterdir()
    assert "-sm_137-" in verdict.name and "check-cuda" in verdict.name
    errors = json.loads(verdict.read_text())
    assert set(errors) == set(selective_scan_check.NAMES) and 0 < max(errors.values()) < 1e-2
    launched.clear()
    assert select_scan_backend(CPU, dtype) == "cuda"
    monkeypatch.setattr(selective_scan_check, "_reasons", {})  # another process
    assert select_scan_backend(CPU, dtype) == "cuda" and not launched


@pytest.mark.parametrize("fault", [lambda out: out * 1.1, lambda out: out * float("nan"), lambda out: out.flip(1)])
def test_wrong_kernels_give_way_to_the_next_backend_with_a_line_to_report(new_chip, monkeypatch, caplog, fault):
    right = selective_scan_cuda.bidirectional_selective_scan
    monkeypatch.setattr(selective_scan_cuda, "bidirectional_selective_scan", lambda *a, **k: fault(right(*a, **k)))
    with caplog.at_level(logging.WARNING):
        assert select_scan_backend(CPU, torch.float32) == "cuda_simt"
        assert select_scan_backend(CPU, torch.float32) == "cuda_simt"
    (record,) = caplog.records
    for told in ("Chip of Tomorrow", "13.7", torch.__version__, "NVRTC 13.9", "output", str(new_chip)):
        assert told in record.getMessage()
    assert selective_scan_cuda.unusable_reason(CPU, torch.float32).startswith("its kernels give wrong results")
    # And the verdict outlives the process.
    monkeypatch.setattr(selective_scan_check, "_reasons", {})
    monkeypatch.setattr(selective_scan_check, "errors_of", lambda *args: pytest.fail("asked again"))
    assert selective_scan_cuda.unusable_reason(CPU, torch.float32) is not None


def test_a_wrong_gradient_alone_is_found(new_chip):
    class Skewed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, out):
            return out.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.1

    def scan(*inputs, order):
        return Skewed.apply(bidirectional_selective_scan_reference(*inputs, order=order))

    errors = selective_scan_check.errors_of(scan, CPU, torch.float32)
    assert errors["output"] < 1e-5 and all(abs(errors[name] - 0.1) < 1e-3 for name in selective_scan_check.NAMES[1:])


def test_tested_architectures_are_not_asked(new_chip, monkeypatch, launched):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert select_scan_backend(CPU, torch.float32) == "cuda"
    assert not launched and not list(new_chip.iterdir())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", [selective_scan_cuda, selective_scan_cuda_simt])
def test_this_gpu_passes(monkeypatch, tmp_path, backend, dtype):
    monkeypatch.setattr(selective_scan_check, "TESTED", set())
    monkeypatch.setattr(selective_scan_check, "_reasons", {})
    monkeypatch.setenv("VIDEOMAMBA_CACHE", str(tmp_path))
    assert backend.unusable_reason(torch.device("cuda", 0), dtype) is None
    (verdict,) = tmp_path.glob("check-*.json")
    assert max(json.loads(verdict.read_text()).values()) < selective_scan_check.TOLERANCE[dtype] / 2


# ---- shared memory ----


@pytest.mark.parametrize("limit", sorted(set(LIMITS.values())))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [12, 24, 36])  # VideoMamba-Ti, -S and -M
def test_every_plan_of_the_paper_fits(limit, dtype, rank):
    for kernel, share in plan.WALKS:
        if dtype == torch.float32 and share != 1:
            continue
        _, _, size = plan.walk_settings(kernel, share, rank, 16, 32 * rank, dtype, capacity=limit + 1024)
        assert size <= limit, (kernel, share)
    assert plan.conv_backward_bytes(rank, 16) <= limit
    assert selective_scan_cuda_simt.shared_bytes(16) <= limit


@pytest.mark.parametrize(
    "kernel, share, rank, states, dtype, before, after",
    [
        ("states", 2, 160, 16, torch.bfloat16, (2, 2), (2, 1)),  # one warp a direction
        ("scan", 2, 96, 256, torch.bfloat16, (2, 1), (1, 1)),  # 16 channels a warp
    ],
)
def test_the_next_plan_where_the_first_wants_too_much(kernel, share, rank, states, dtype, before, after):
    for limit, expected in ((227 * 1024, before), (LIMITS["8.6"], after)):
        options, _, size = plan.walk_settings(kernel, share, rank, states, 768, dtype, capacity=limit + 1024)
        assert (options["BLOCKS"], options["W"]) == expected and size <= limit


def scan_inputs(states, rank):
    shapes = [(1, 5, 48), (2, 24, 4), (2, 24), (2, rank + 2 * states, 24), (2, 24, rank), (2, 24), (2, 24, states)]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) / 4 for shape in (*shapes, (2, 24))]


@pytest.mark.parametrize("capability", LIMITS)
def test_what_fits_in_no_plan_is_refused_by_name(on_cpu, monkeypatch, capability):
    on_cpu(1)
    backend = selective_scan_cuda_simt if capability == "7.5" else selective_scan_cuda
    for module in (plan, selective_scan_cuda_simt):
        monkeypatch.setattr(module, "shared_memory_of", lambda device: LIMITS[capability] + 1024)
    plan.scan_plan.cache_clear()
    inputs = [tensor.requires_grad_() for tensor in scan_inputs(states=300, rank=96)]
    with pytest.raises(ValueError, match=f"of shared memory .* {LIMITS[capability]:,}.*scan_backend"):
        backend.bidirectional_selective_scan(*inputs, order=None).sum().backward()
    plan.scan_plan.cache_clear()
    assert bidirectional_selective_scan(*inputs, backend="torch").shape == (1, 5, 24)  # as the message advises
