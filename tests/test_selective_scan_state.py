"""Scans that begin with a state and return one, of every backend, against the float64 reference of the whole."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from modeling_videomamba import selective_scan as seam
from modeling_videomamba import selective_scan_cuda, selective_scan_numba, use_scan_backend
from modeling_videomamba.selective_scan import BACKENDS, ScanState, bidirectional_selective_scan
from modeling_videomamba.selective_scan_reference import bidirectional_selective_scan_reference
from scan_helpers import (
    assert_parts_match_reference,
    part_orders,
    random_inputs,
    random_state,
    relative_error,
    scan_order,
)


pytest_plugins = "cuda_emulation"  # its fixtures

without_numba = pytest.mark.skipif(selective_scan_numba.IMPORT_ERROR is not None, reason="needs Numba")
ON_CPU = ["torch", "sequential", pytest.param("numba", marks=without_numba), "export"]
backends = pytest.mark.parametrize("backend", ON_CPU)


@backends
@pytest.mark.parametrize(
    ("lengths", "kind", "options"),
    [
        ([1, 1, 2, 1, 5, 33], "any", {}),  # shorter than the convolution; more than a chunk
        ([36, 3], "spatial", {"states": 5, "taps": 2}),
        ([2, 2, 2], "reversal", {"taps": 5}),
        ([4, 1], "any", {"taps": 1}),
    ],
)
def test_parts_match_the_reference_of_the_whole(backend, lengths, kind, options):
    inputs = random_inputs(2, sum(lengths), 5, step_bias=-1.0, **options)
    assert_parts_match_reference(BACKENDS[backend].bidirectional_selective_scan, inputs, lengths, kind)


@pytest.mark.parametrize("backend", ["torch", pytest.param("numba", marks=without_numba)])
@pytest.mark.parametrize("step_bias", [-12.0, 5.0])
def test_random_cuts(backend, step_bias):
    """With steps that forget nothing, and that forget all."""
    generator = torch.Generator().manual_seed(int(step_bias))
    cuts = torch.randperm(149, generator=generator)[:6].add(1).sort().values.tolist()
    lengths = [after - before for before, after in zip([0, *cuts], [*cuts, 150], strict=True)]
    inputs = random_inputs(1, 150, 66, step_bias=step_bias)
    assert_parts_match_reference(BACKENDS[backend].bidirectional_selective_scan, inputs, lengths)


@pytest.mark.parametrize("backend", ["torch", pytest.param("numba", marks=without_numba)])
def test_bfloat16_differs_by_its_rounding_alone(backend):
    inputs = [t.bfloat16() for t in random_inputs(2, 80, 20)]
    scan = BACKENDS[backend].bidirectional_selective_scan
    assert_parts_match_reference(scan, inputs, [32, 1, 47], tolerance=1e-2, gradient_tolerance=2e-2)


@without_numba
def test_clips_beyond_the_workspace_run_in_groups(monkeypatch):
    monkeypatch.setattr(selective_scan_numba, "WORKSPACE", 4 * 4 * 20 * 48 * 2)
    scan = BACKENDS["numba"].bidirectional_selective_scan
    assert_parts_match_reference(scan, random_inputs(5, 40, 24), [20, 20])


@backends
def test_over_processes_the_backward_direction_goes_on_from_the_part_after(backend):
    """With the full reversal, and states that were found by two walks over the parts."""
    inputs = random_inputs(2, 11, 6, step_bias=-1.0)
    xz, *parameters = inputs
    parts, state = xz.split([4, 1, 6], dim=1), [torch.zeros_like(t) for t in random_state(inputs)]
    starts = [[None, None, None], [None, None, None]]
    for direction, order in enumerate(([0, 1, 2], [2, 1, 0])):
        after = state
        for i in order:
            starts[direction][i] = after
            with use_scan_backend(backend):
                _, after = bidirectional_selective_scan(parts[i], *parameters, state=after)
    found = []
    for i, part in enumerate(parts):
        forward, backward = (starts[direction][i] for direction in range(2))
        begins = ScanState(*(torch.stack([f[0], b[1]]) for f, b in zip(forward, backward, strict=True)))
        with use_scan_backend(backend):
            found.append(bidirectional_selective_scan(part, *parameters, state=begins)[0])
    expected = bidirectional_selective_scan_reference(*inputs)
    assert relative_error(torch.cat(found, dim=1), expected) < 1e-6


@backends
def test_zeros_are_as_no_state_and_rows_know_nothing_of_each_other(backend):
    inputs = random_inputs(3, 7, 6)
    xz, *parameters = inputs
    conv, recurrent = random_state(inputs)
    with use_scan_backend(backend):
        expected = bidirectional_selective_scan(*inputs)
        zeros = ScanState(torch.zeros_like(conv), torch.zeros_like(recurrent))
        torch.testing.assert_close(bidirectional_selective_scan(*inputs, state=zeros)[0], expected)
        for tensor in (conv, recurrent):
            tensor[:, 1], tensor[:, 2] = float("nan"), 0
        found, after = bidirectional_selective_scan(*inputs, state=ScanState(conv, recurrent))
        alone, after_alone = bidirectional_selective_scan(
            xz[:1], *parameters, state=ScanState(conv[:, :1], recurrent[:, :1])
        )
    torch.testing.assert_close(found[2], expected[2])
    torch.testing.assert_close(found[:1], alone)
    torch.testing.assert_close(after.recurrent[:, :1], after_alone.recurrent)
    assert found[1].isnan().all() and after.recurrent[:, 1].isnan().all()


@backends
def test_what_comes_later_changes_nothing_before(backend):
    """By exactly zero."""
    inputs = random_inputs(1, 12, 6)
    orders = part_orders("spatial", [6, 6])
    results = []
    for change in (0.0, 1.0):
        xz, *parameters = inputs
        later = xz[:, 6:] + change
        with use_scan_backend(backend):
            first, state = bidirectional_selective_scan(
                xz[:, :6], *parameters, order=orders[0], state=random_state(inputs)
            )
            bidirectional_selective_scan(later, *parameters, order=orders[1], state=state)
        results.append([first, *state])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@backends
def test_gradients_of_the_state_alone(backend):
    """Nobody looks at the outputs."""
    tensors = [*random_inputs(1, 5, 6), *random_state(random_inputs(1, 5, 6))]
    gradients = []
    for scan in (BACKENDS[backend].bidirectional_selective_scan, bidirectional_selective_scan_reference):
        leaves = [t.clone().requires_grad_() for t in tensors]
        _, (_, recurrent) = scan(*leaves[:8], state=tuple(leaves[8:]))
        gradients.append(
            torch.autograd.grad(recurrent.square().sum(), leaves, allow_unused=True, materialize_grads=True)
        )
    for found, expected in zip(*gradients, strict=True):
        assert relative_error(found, expected) < 1e-5 or expected.abs().max() == found.abs().max() == 0


@backends
def test_a_state_goes_with_the_projection_and_another_type(backend):
    inputs = [t.bfloat16() for t in random_inputs(1, 5, 6)]
    conv, recurrent = random_state(inputs)
    weight = torch.randn(4, 6).bfloat16()
    with use_scan_backend(backend):
        scanned, after = bidirectional_selective_scan(*inputs, state=ScanState(conv, recurrent))
        # A cache may hold it in a type of its own.
        found = bidirectional_selective_scan(
            *inputs, out_proj_weight=weight, state=ScanState(conv.float(), recurrent.double())
        )
    torch.testing.assert_close(found[0], F.linear(scanned, weight))
    for tensor, expected in zip(found[1], after, strict=True):
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)


@pytest.mark.parametrize("backend", ["torch", pytest.param("numba", marks=without_numba)])
def test_a_compiled_step_is_compiled_once(backend):
    torch._dynamo.reset()
    inputs, counter = random_inputs(2, 6, 4), CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def step(xz, parameters, state):
        return bidirectional_selective_scan(xz, *parameters, state=state, backend=backend)

    xz, *parameters = inputs
    found = expected = ScanState(*random_state(inputs))
    with torch.no_grad():
        for i in range(4):
            out, found = step(xz + i, parameters, found)
            wanted, expected = bidirectional_selective_scan(xz + i, *parameters, state=expected, backend=backend)
            torch.testing.assert_close(out, wanted)
            torch.testing.assert_close(found, expected)
    assert counter.frame_count == 1


def test_a_step_exports_with_its_state():
    inputs = random_inputs(1, 6, 4)
    visits = torch.tensor([2, 1, 0, 5, 4, 3])

    class Step(torch.nn.Module):
        def forward(self, xz, conv, recurrent, *parameters):
            state = ScanState(conv, recurrent)
            out, state = bidirectional_selective_scan(xz, *parameters, order=scan_order(visits), state=state)
            return out, *state

    xz, *parameters = inputs
    arguments = (xz, *random_state(inputs), *parameters)
    exported = torch.export.export(Step(), arguments)
    assert not any("videomamba" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(*arguments), Step()(*arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda conv, recurrent: (conv[:, :, 1:], recurrent), r"`state.conv` .* \(2, 1, 3, 6\) .* got \(2, 1, 2, 6\)"),
        (lambda conv, recurrent: (conv, recurrent.mT), r"`state.recurrent` .* \(2, 1, 6, 16\) .* got \(2, 1, 16, 6\)"),
        (lambda conv, recurrent: (conv.to("meta"), recurrent), r"`state.conv` .* on cpu.* on meta"),
    ],
)
def test_a_state_of_another_shape_or_device_is_refused(change, message):
    inputs = random_inputs(1, 5, 6)
    with pytest.raises(ValueError, match=message):
        bidirectional_selective_scan(*inputs, state=ScanState(*change(*random_state(inputs))))


def test_a_backend_that_cannot_begin_with_a_state_is_passed_by_or_refused(monkeypatch):
    monkeypatch.delenv(seam.ENVIRONMENT_VARIABLE, raising=False)
    without = seam.ScanBackend(lambda *_: None, None, takes_state=False)
    monkeypatch.setattr(seam, "BACKENDS", {"mamba_ssm": without, "torch": seam.BACKENDS["torch"]})
    inputs = random_inputs(1, 5, 6)
    state = ScanState(*random_state(inputs))
    bidirectional_selective_scan(*inputs, state=state)
    with pytest.raises(ValueError, match="mamba_ssm: its kernels cannot begin with a state"):
        bidirectional_selective_scan(*inputs, state=state, backend="mamba_ssm")


# How the work is cut: see test_selective_scan_gpu.py. A part of one token, a part without and one with whole tiles.
@pytest.mark.parametrize(
    ("multiprocessors", "lengths", "channels", "kind", "dtype", "turn_tokens"),
    [
        (1, [1, 2, 20], 24, "reversal", torch.bfloat16, None),
        (132, [1, 70], 24, "reversal", torch.bfloat16, None),
        pytest.param(1, [1, 1, 2, 20], 24, "any", torch.float32, None, marks=pytest.mark.slow),
        pytest.param(132, [50, 3, 70], 24, "any", torch.float32, None, marks=pytest.mark.slow),
        pytest.param(132, [48, 3, 600], 24, "spatial", torch.bfloat16, None, marks=pytest.mark.slow),
        pytest.param(1, [33, 4], 24, "any", torch.float16, None, marks=pytest.mark.slow),
        pytest.param(0.1, [33, 20], 40, "reversal", torch.bfloat16, None, marks=pytest.mark.slow),
        pytest.param(0.1, [36, 3], 40, "spatial", torch.bfloat16, None, marks=pytest.mark.slow),
        pytest.param(0.1, [70, 1], 40, "reversal", torch.bfloat16, 75, marks=pytest.mark.slow),
        pytest.param(1, [70, 35], 40, "any", torch.float32, 75, marks=pytest.mark.slow),
        pytest.param(1, [15, 2], 15, "any", torch.bfloat16, None, marks=pytest.mark.slow),
        pytest.param(0.1, [150, 1, 2], 72, "reversal", torch.bfloat16, None, marks=pytest.mark.slow),
    ],
)
def test_cuda_kernels_on_the_cpu(on_cpu, monkeypatch, multiprocessors, lengths, channels, kind, dtype, turn_tokens):
    on_cpu(multiprocessors)
    if turn_tokens:
        monkeypatch.setattr(selective_scan_cuda, "TURN_TOKENS", turn_tokens)
    inputs = [t.to(dtype) for t in random_inputs(2, sum(lengths), channels, rank=6, step_bias=-1.0)]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    scan = BACKENDS["cuda"].bidirectional_selective_scan
    assert_parts_match_reference(scan, inputs, lengths, kind, tolerance, 10 * tolerance)


@pytest.mark.parametrize("kept", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_cuda_operator_is_a_good_citizen(on_cpu, kept):
    on_cpu(1)
    inputs = random_inputs(1, 18, 24, rank=6)
    arguments = [t.requires_grad_() for t in (*inputs, *random_state(inputs))]
    arguments = (*arguments[:8], None, None, *arguments[8:], [0, 1, -1], 2 if kept else 1)
    torch.library.opcheck(torch.ops.videomamba.bidirectional_scan_cuda.default, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["reversal", "any", "spatial"])
@pytest.mark.parametrize(("batch", "lengths"), [(1, [3, 1, 1569, 300]), (64, [198, 3, 33]), (300, [33, 18])])
def test_parts_on_a_gpu(batch, lengths, kind, dtype):
    inputs = [t.to("cuda", dtype) for t in random_inputs(batch, sum(lengths), 48, rank=6, step_bias=-1.0)]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    scan = BACKENDS["cuda"].bidirectional_selective_scan
    assert_parts_match_reference(scan, inputs, lengths, kind, tolerance, 10 * tolerance, device="cuda")


@pytest.mark.gpu
def test_replay_of_a_step_as_a_cuda_graph():
    """The state lies where it lay: each replay goes on from the one before."""
    inputs = [t.to("cuda", torch.bfloat16) for t in random_inputs(4, 4 * 198, 64, rank=6)]
    xz, *parameters = inputs
    start = random_state(inputs)
    with torch.no_grad():
        expected, _ = bidirectional_selective_scan(
            xz, *parameters, order=scan_order(torch.arange(4 * 198, device="cuda")), state=ScanState(*start)
        )
        part, order = torch.empty_like(xz[:, :198]), scan_order(torch.arange(198, device="cuda"))
        state = ScanState(*(t.clone() for t in start))

        def step():
            out, after = bidirectional_selective_scan(part, *parameters, order=order, state=state)
            for tensor, new in zip(state, after, strict=True):
                tensor.copy_(new)
            return out

        step()  # compiles
        for tensor, first in zip(state, start, strict=True):
            tensor.copy_(first)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
        found = []
        for tokens in xz.split(198, dim=1):
            part.copy_(tokens)
            graph.replay()
            found.append(out.clone())
    assert relative_error(torch.cat(found, dim=1), expected) < 1e-2


@pytest.mark.parametrize(
    ("multiprocessors", "lengths", "dtype"),
    [
        (132, [70, 1], torch.float32),
        pytest.param(1, [1, 37], torch.float32, marks=pytest.mark.slow),
        pytest.param(132, [33, 2], torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_simt_kernels_on_the_cpu(on_cpu, multiprocessors, lengths, dtype):
    on_cpu(multiprocessors)
    inputs = [t.to(dtype) for t in random_inputs(1, sum(lengths), 24, step_bias=-1.0)]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    scan = BACKENDS["cuda_simt"].bidirectional_selective_scan
    assert_parts_match_reference(scan, inputs, lengths, "any", tolerance, 10 * tolerance)
