"""The CPU backend of the scan: against the float64 reference at awkward sizes, with threads, forks and compilers."""

import math
import multiprocessing
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import modeling_videomamba
from modeling_videomamba import VideoMambaConfig, VideoMambaForVideoClassification, rms_norm_numba, use_scan_backend
from modeling_videomamba import selective_scan as seam
from modeling_videomamba import selective_scan_numba as backend
from modeling_videomamba import selective_scan_numba_kernels as kernels
from modeling_videomamba.selective_scan_reference import bidirectional_selective_scan_reference
from modeling_videomamba.tokens_videomamba import backward_order
from scan_helpers import assert_matches_reference, gradients, random_inputs, random_state, relative_error, scan_order


pytestmark = pytest.mark.skipif(
    backend.IMPORT_ERROR is not None, reason=f"Numba cannot be imported: {backend.IMPORT_ERROR}"
)


@pytest.mark.parametrize("order", ["reversal", "temporal", "spatial", "any"])
@pytest.mark.parametrize(
    ("batch", "length", "channels", "options"),
    [
        (1, 1, 5, {}),
        (3, 2, 1, {}),  # shorter than the convolution
        (2, 31, 64, {"rank": 1}),
        (1, 32, 65, {}),  # a whole chunk; one channel more than a block
        (2, 33, 20, {"states": 7, "taps": 2}),
        (1, 211, 130, {"taps": 5}),
    ],
)
def test_matches_reference(batch, length, channels, options, order):
    if order == "any":
        visits = scan_order(torch.randperm(length, generator=torch.Generator().manual_seed(3)))
    elif order == "reversal" or length == 1:
        visits = None
    else:
        config = VideoMambaConfig(class_token_position="first", backward_scan=order)
        frames = next(n for n in (7, 5, 3, 2, 1) if (length - 1) % n == 0)
        visits = backward_order(config, (frames, 1, (length - 1) // frames))
    inputs = random_inputs(batch, length, channels, **options)
    assert_matches_reference(backend.bidirectional_selective_scan, inputs, visits, 1e-5, 1e-4)


@pytest.mark.slow
def test_matches_reference_past_10_000_tokens():
    assert_matches_reference(
        backend.bidirectional_selective_scan, random_inputs(1, 10_241, 2, states=3, rank=1), None, 1e-5, 1e-4
    )


@pytest.mark.parametrize("step_bias", [-30.0, -12.0, 5.0, 60.0])
def test_extreme_steps(step_bias):
    """Steps so short that nothing is forgotten, and so long that everything is: exp(ΔA) underflows."""
    inputs = random_inputs(1, 100, 9, step_bias=step_bias)
    assert_matches_reference(backend.bidirectional_selective_scan, inputs, None, 1e-5, 1e-4)


@pytest.mark.parametrize("step_bias", [-12.0, -3.0, 5.0, 60.0])
def test_bfloat16_loses_no_more_than_its_rounding(step_bias):
    """Against float64. Inputs, projections and output are rounded, which makes 4.5e-3 at most."""
    inputs = random_inputs(1, 500, 70, step_bias=step_bias)
    rounded = [t.bfloat16() if place in (0, 3) else t for place, t in enumerate(inputs)]
    found = backend.bidirectional_selective_scan(*rounded)
    in_float32 = backend.bidirectional_selective_scan(*(t.float() for t in rounded))
    expected = bidirectional_selective_scan_reference(*(t.double() for t in rounded), dtype=torch.float64)
    assert found.dtype == torch.bfloat16 and relative_error(in_float32, expected) < 1e-5
    assert relative_error(found, expected) < 5e-3


def test_short_exponential():
    """Against float64; near 1, what counts is how far from 1 a decay is, which many steps multiply."""
    exponents = torch.cat([torch.linspace(-100, 0, 4001), -torch.logspace(-7, -0.31, 400)])
    found = torch.tensor([kernels._rough_exp2(x) for x in exponents.numpy()], dtype=torch.float64)
    expected = torch.exp2(exponents.double())
    assert ((found - expected).abs() < 2.7e-4 * expected).all() and found[4000] == 1
    small = (exponents > -0.5) & (exponents < -1e-3)  # nearer to 1, float32 has too few digits to tell
    lacking = -torch.expm1(exponents[small].double() * math.log(2))
    assert ((1 - found[small] - lacking).abs() < 3.5e-4 * lacking).all()


def test_steps_so_large_that_nothing_stays():
    """Decays have a floor far above the smallest normal number, 2**-126: the products of states with it are normal."""
    for power in (kernels._exp2, kernels._rough_exp2):
        assert power(torch.tensor(-1000.0).numpy()[()]) == 2.0**-100
    inputs = random_inputs(1, 40, 70, step_bias=9)
    assert_matches_reference(backend.bidirectional_selective_scan, inputs, None, 1e-5, 1e-4)


def test_takes_strided_inputs():
    inputs = random_inputs(2, 40, 24)
    strided = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in inputs]
    assert not any(t.is_contiguous() for t in strided if t.shape[-1] > 1 and t.shape[0] > 1)
    expected = backend.bidirectional_selective_scan(*inputs)
    assert torch.equal(backend.bidirectional_selective_scan(*strided), expected)


def test_memory_of_parameters_is_not_locked():
    """FSDP frees and fills it at every layer, which PyTorch refuses once a NumPy view was taken."""
    xz, *parameters = random_inputs(1, 40, 24)
    parameters = [p.requires_grad_() for p in parameters]
    backend.bidirectional_selective_scan(xz, *parameters).sum().backward()
    for parameter in parameters:
        parameter.untyped_storage().resize_(0)


def test_clips_beyond_the_workspace_run_in_groups(monkeypatch):
    inputs = random_inputs(5, 40, 24)
    output_gradient = torch.randn(5, 40, 24)
    expected, expected_gradients = gradients(backend.bidirectional_selective_scan, inputs, output_gradient)
    monkeypatch.setattr(backend, "WORKSPACE", 4 * 4 * 40 * 48 * 2)  # two clips of the backward pass, four forward
    found, found_gradients = gradients(backend.bidirectional_selective_scan, inputs, output_gradient)
    assert relative_error(found, expected) < 1e-6
    assert all(relative_error(f, e) < 1e-5 for f, e in zip(found_gradients, expected_gradients, strict=True))


def test_nan_is_not_swallowed():
    inputs = random_inputs(1, 50, 6)
    inputs[0][0, 10, 2] = float("nan")
    output = backend.bidirectional_selective_scan(*inputs)
    assert output[0, :, 2].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_differs_by_its_rounding_alone(dtype):
    inputs = [t.to(dtype) for t in random_inputs(2, 300, 70)]
    output_gradient = torch.randn(2, 300, 70).to(dtype)
    found, found_gradients = gradients(backend.bidirectional_selective_scan, inputs, output_gradient)
    expected, expected_gradients = gradients(
        bidirectional_selective_scan_reference, [t.double() for t in inputs], output_gradient
    )
    assert found.dtype == dtype
    assert relative_error(found, expected) < 0.01
    for gradient, reference, tensor in zip(found_gradients, expected_gradients, inputs, strict=True):
        assert gradient.dtype == tensor.dtype
        assert relative_error(gradient, reference) < 0.02


def test_float32_parameters_serve_bfloat16_activations_under_autocast():
    inputs = random_inputs(1, 60, 16)
    inputs[0] = inputs[0].bfloat16()
    output_gradient = torch.randn(1, 60, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found, found_gradients = gradients(backend.bidirectional_selective_scan, inputs, output_gradient)
    expected = bidirectional_selective_scan_reference(*inputs)
    assert found.dtype == torch.bfloat16 and relative_error(found, expected) < 0.01
    assert [g.dtype for g in found_gradients] == [t.dtype for t in inputs]


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["PyTorch's threads", "own threads"])
def whose_threads(request, monkeypatch):
    if request.param == "own threads":
        monkeypatch.setattr(backend, "_on_torch_threads", None)
    elif backend._on_torch_threads is None:
        pytest.skip("this PyTorch's threads are not GNU OpenMP's")


def test_same_bits_whatever_the_number_of_threads(set_threads, whose_threads):
    inputs = random_inputs(3, 200, 150)
    output_gradient = torch.randn(3, 200, 150)
    results = []
    for threads in (1, 2, 5):
        set_threads(threads)
        output, grads = gradients(backend.bidirectional_selective_scan, inputs, output_gradient)
        results.append([output, *grads])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_two_python_threads_at_once(whose_threads):
    many = [random_inputs(2, 90 + i, 80, seed=i) for i in range(6)]
    output_gradients = [torch.randn(2, 90 + i, 80) for i in range(6)]

    def work(i):
        return gradients(backend.bidirectional_selective_scan, many[i], output_gradients[i])

    expected = [work(i) for i in range(6)]
    with ThreadPoolExecutor(3) as pool:
        for (found, found_gradients), (output, reference) in zip(pool.map(work, range(6)), expected, strict=True):
            assert torch.equal(found, output)
            assert all(torch.equal(f, r) for f, r in zip(found_gradients, reference, strict=True))


class ScannedDataset(torch.utils.data.Dataset):
    inputs = random_inputs(1, 100, 140)

    def __len__(self):
        return 3

    def __getitem__(self, index):
        # A DataLoader leaves its workers one thread, and PyTorch's own hang if a child asks for more. Ours must not.
        torch.get_num_threads = lambda: 2
        return backend.bidirectional_selective_scan(*self.inputs)[0]


def scan_in_forked_workers(own_threads):
    if own_threads:
        backend._on_torch_threads = None
    expected = ScannedDataset()[0]  # starts threads, which no child has
    assert backend._threads is not None or backend._on_torch_threads is not None
    loader = torch.utils.data.DataLoader(
        ScannedDataset(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    assert all(torch.equal(output, expected) for output in loader)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_works_in_forked_data_loader_workers(whose_threads):
    # In a process of its own: what other tests leave, threads and locks, must not decide whether a child hangs.
    own_threads = backend._on_torch_threads is None
    process = multiprocessing.get_context("spawn").Process(target=scan_in_forked_workers, args=(own_threads,))
    process.start()
    process.join(150)
    process.kill()
    process.join()
    assert process.exitcode == 0


def test_operators_are_well_registered():
    inputs = [t.requires_grad_() for t in random_inputs(1, 35, 6)]
    order = torch.arange(34, -1, -1)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    state = [t.requires_grad_() for t in random_state(inputs)]
    for before, start in ((None, None), state):
        torch.library.opcheck(backend._mixer, (*inputs, order, before, start, True), test_utils=checks)
    detached = [t.detach() for t in (*inputs, order, *state)]
    torch.library.opcheck(backend._mixer, (*detached, False), test_utils=checks)


def test_model_compiles_whole():
    torch.manual_seed(0)
    config = VideoMambaConfig(hidden_size=16, num_hidden_layers=2, image_size=32, num_frames=2, num_labels=3)
    model = VideoMambaForVideoClassification(config)
    pixel_values = torch.randn(1, 2, 3, 32, 32)
    labels = torch.tensor([1])
    with use_scan_backend("numba"):
        model(pixel_values, labels=labels).loss.backward()
        expected = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        compiled(pixel_values, labels=labels).loss.backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_is_the_default_on_a_cpu(monkeypatch):
    monkeypatch.delenv(seam.ENVIRONMENT_VARIABLE, raising=False)
    cpu = torch.device("cpu")
    assert seam.select_scan_backend(cpu, torch.float32) == "numba"
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert seam.select_scan_backend(cpu, dtype) == "numba"
    assert seam.select_scan_backend(cpu, torch.float64) == "torch"


@pytest.mark.parametrize(
    ("order", "found"),
    [
        ([4, 2, 1, 0], r"\(4,\) with 4 positions from 0 to 4"),
        ([-1, 2, 1, 0], r"\(4,\) with 4 positions from -1 to 2"),
        ([3, 2, 2, 0], r"\(4,\) with 3 positions from 0 to 3"),
        ([2, 1, 0], r"\(3,\) with 3 positions from 0 to 2"),
    ],
)
def test_order_that_is_no_permutation_is_refused(order, found):
    with pytest.raises(ValueError, match=f"position from 0 to 3 once, for 4 tokens; got the shape {found}"):
        backend.bidirectional_selective_scan(*random_inputs(1, 4, 3), order=scan_order(torch.tensor(order)))


def run_python(code, **environment):
    root = Path(modeling_videomamba.__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(root), **environment},
        capture_output=True,
        text=True,
        timeout=250,
    )


def test_without_numba_the_torch_backend_serves():
    code = """
import sys
sys.modules["numba"] = None
import torch
from modeling_videomamba import selective_scan
print(selective_scan.select_scan_backend(torch.device("cpu"), torch.float32))
try:
    selective_scan.select_scan_backend(torch.device("cpu"), torch.float32, "numba")
except ValueError as error:
    print(error)
"""
    run = run_python(code, VIDEOMAMBA_SCAN_BACKEND="")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("torch\n")
    assert "numba: Numba cannot be imported" in run.stdout and "pip install numba" in run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("place", ["modules", "site-packages"])
def test_compiled_code_is_kept_and_its_making_told_once(place, tmp_path):
    """
    Code of a checkpoint lies in a folder of its own; there, too, only the first process compiles. Where pip installs,
    nothing is written that pip would not remove: the folder that remained would be taken for the package.
    """
    package = tmp_path / place / "checkpoint"
    shutil.copytree(Path(modeling_videomamba.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    code = f"""
import sys
sys.path.insert(0, {str(package.parent)!r})
import torch
from checkpoint import selective_scan_numba
xz, *parameters = (torch.ones(shape) for shape in
    ((1, 3, 4), (2, 2, 4), (2, 2), (2, 3, 2), (2, 2, 1), (2, 2), (2, 2, 1), (2, 2)))
print(selective_scan_numba.bidirectional_selective_scan(xz, *parameters).sum().item())
"""
    folders = {"NUMBA_CACHE_DIR": "", "VIDEOMAMBA_CACHE": str(tmp_path / "cache")}
    first, second = (run_python(code, **folders) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert first.stderr.count("Compiled the CPU scan's forward pass for torch.float32") == 1, first.stderr
    assert "Compiled" not in second.stderr
    assert first.stdout == second.stdout
    kept = tmp_path / "cache" if place == "site-packages" else package
    assert {path.is_relative_to(kept) for path in tmp_path.rglob("*.nbi")} == {True}


# ---- the norm of the residual stream


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 97, 36), (1, 5, 1), (3, 0, 8), (64, 20)])
def test_rms_norm(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x, update = 3 * torch.randn(shape, generator=generator), torch.randn(shape, generator=generator).to(dtype)
    weight = torch.linspace(-1, 2, shape[-1]).to(dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 3e-3
    total, found_of_sum = rms_norm_numba.fused_add_rms_norm(x, update, weight, 1e-5)
    torch.testing.assert_close(total, x + update, rtol=0, atol=0)
    for found, of in ((rms_norm_numba.fused_rms_norm(x, weight, 1e-5), x), (found_of_sum, total)):
        expected = torch.nn.functional.rms_norm(of.double(), shape[-1:], weight.double(), 1e-5)
        assert found.dtype == dtype and found.shape == of.shape
        assert (found.double() - expected).norm() <= tolerance * expected.norm()


def test_rms_norm_is_left_to_pytorch_where_more_than_its_values_are_wanted():
    x, weight = torch.randn(4, 8), torch.nn.Parameter(torch.ones(8))
    fits = rms_norm_numba.can_fuse_rms_norm
    assert not fits(x, weight)  # gradients
    with torch.no_grad():
        assert fits(x, weight) and fits(x, weight.bfloat16())
        assert not fits(x, weight.half()) and not fits(x.double(), weight.double())
        assert not fits(x.T.contiguous().T, weight) and not fits(x.to("meta"), weight.to("meta"))
