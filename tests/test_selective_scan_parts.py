"""Scans of a sequence cut over processes, against the float64 reference of the whole. Here, processes are threads."""

import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from modeling_videomamba import selective_scan_cuda, selective_scan_numba
from modeling_videomamba import selective_scan_cuda_runtime as runtime
from modeling_videomamba.selective_scan import BACKENDS, ScanPart, ScanState, bidirectional_selective_scan
from modeling_videomamba.selective_scan_parts import scan_part
from modeling_videomamba.selective_scan_reference import bidirectional_selective_scan_reference
from scan_helpers import PARAMETER_NAMES, part_orders, random_inputs, random_state, relative_error, scan_order


pytest_plugins = "cuda_emulation"  # its fixtures

without_numba = pytest.mark.skipif(selective_scan_numba.IMPORT_ERROR is not None, reason="needs Numba")


class Board:
    """Where the threads show each other their tensors."""

    def __init__(self, count):
        self.shown, self.barrier = [None] * count, threading.Barrier(count, timeout=20)

    def exchange(self, rank, tensor):
        self.shown[rank] = tensor.detach().clone()
        self.barrier.wait()
        found = torch.stack(self.shown)
        self.barrier.wait()
        return found


class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, part):
        ctx.part = part
        return part.board.exchange(part.rank, tensor)

    @staticmethod
    def backward(ctx, grad):
        return ctx.part.board.exchange(ctx.part.rank, grad)[:, ctx.part.rank].sum(0), None


class PartOfThread(ScanPart):
    def __init__(self, order, board, rank):
        self.order, self.board, self.rank, self.processes = order, board, rank, len(board.shown)

    def gather(self, tensor):
        return Gather.apply(tensor, self)


def scanned_in_parts(scan_of, inputs, sent_back, lengths, orders):
    """Outputs and gradients of `inputs`, of threads that each scan a part by `scan_of(part)`."""
    xz, *parameters = inputs
    parts, sent_back = xz.split(lengths, dim=1), sent_back.split(lengths, dim=1)
    board = Board(len(lengths))

    def run(rank):
        leaves = [t.detach().clone().requires_grad_() for t in (parts[rank], *parameters)]
        try:
            scan = scan_of(PartOfThread(orders[rank], board, rank))
            with torch.inference_mode():
                inferred = scan(*leaves)
            output = scan(*leaves)
            gradients = torch.autograd.grad(output, leaves, sent_back[rank].to(output.dtype))
        except BaseException:
            board.barrier.abort()
            raise
        return inferred, output.detach(), *gradients

    with ThreadPoolExecutor(len(lengths)) as threads:
        inferred, outputs, d_xz, *of_parameters = zip(*threads.map(run, range(len(lengths))), strict=True)
    sums = [torch.stack(gradients).double().sum(0) for gradients in of_parameters]
    return [torch.cat(inferred, 1), torch.cat(outputs, 1), torch.cat(d_xz, 1), *sums]


def whole_order(lengths, orders):
    if orders[0] is None:
        return None
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return scan_order(torch.cat([start + order.visits for start, order in zip(starts, orders, strict=True)]))


def assert_parts_match_the_whole(scan_of, inputs, lengths, kind, tolerance=1e-5, gradient_tolerance=1e-5):
    orders = part_orders(kind, lengths)
    leaves = [t.detach().double().requires_grad_() for t in inputs]
    expected = bidirectional_selective_scan_reference(*leaves, order=whole_order(lengths, orders), dtype=torch.float64)
    sent_back = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    expected = [expected, expected, *torch.autograd.grad(expected, leaves, sent_back.double())]
    found = scanned_in_parts(scan_of, inputs, sent_back, lengths, orders)
    names = ["output without gradients", "output", *PARAMETER_NAMES]
    errors = {n: relative_error(f, e) for n, f, e in zip(names, found, expected, strict=True)}
    too_large = {n: e for n, e in errors.items() if not e <= (tolerance if "output" in n else gradient_tolerance)}
    assert not too_large, too_large


def by_two_scans(name):
    return lambda part: functools.partial(scan_part, BACKENDS[name].bidirectional_selective_scan, part)


def fused(part):
    return functools.partial(BACKENDS["cuda"].bidirectional_selective_scan, order=part.order, part=part)


@pytest.mark.parametrize("backend", ["torch", "sequential", pytest.param("numba", marks=without_numba)])
@pytest.mark.parametrize(
    ("lengths", "kind", "options"),
    [
        ([7, 40], "reversal", {}),
        ([36, 3, 9], "spatial", {"states": 5, "taps": 2}),
        ([3, 5, 4, 3], "any", {}),
        ([4, 5, 4, 4], "reversal", {"taps": 5}),
        ([2, 1], "reversal", {"taps": 1}),
    ],
)
def test_parts_match_the_reference_of_the_whole(backend, lengths, kind, options):
    inputs = random_inputs(2, sum(lengths), 5, step_bias=-1.0, **options)
    assert_parts_match_the_whole(by_two_scans(backend), inputs, lengths, kind)


# How the work is cut: see test_selective_scan_gpu.py. One chunk, chunks side by side, chunks in turns.
@pytest.mark.parametrize(
    ("multiprocessors", "lengths", "channels", "kind", "dtype", "turn_tokens", "keep"),
    [
        (1, [3, 20], 24, "reversal", torch.bfloat16, None, False),
        (132, [70, 48, 33], 24, "reversal", torch.float32, None, False),
        pytest.param(132, [48, 66], 24, "spatial", torch.bfloat16, None, True, marks=pytest.mark.slow),
        pytest.param(132, [400, 700], 24, "reversal", torch.bfloat16, None, False, marks=pytest.mark.slow),
        pytest.param(1, [3, 4, 20], 24, "any", torch.float16, None, False, marks=pytest.mark.slow),
        pytest.param(0.1, [33, 20, 5], 40, "reversal", torch.bfloat16, None, True, marks=pytest.mark.slow),
        pytest.param(0.1, [80, 70, 70], 40, "reversal", torch.bfloat16, 75, False, marks=pytest.mark.slow),
        pytest.param(1, [70, 35], 40, "any", torch.float32, 75, False, marks=pytest.mark.slow),
        pytest.param(1, [15, 8], 15, "any", torch.bfloat16, None, False, marks=pytest.mark.slow),
    ],
)
def test_cuda_kernels_on_the_cpu(
    on_cpu, monkeypatch, multiprocessors, lengths, channels, kind, dtype, turn_tokens, keep
):
    on_cpu(multiprocessors)
    one_at_a_time, queue = threading.Lock(), runtime.Launch.queue

    def queue_alone(*arguments):
        with one_at_a_time:
            queue(*arguments)

    monkeypatch.setattr(runtime.Launch, "queue", queue_alone)
    monkeypatch.setattr(selective_scan_cuda, "KEEP_STATES", keep)
    if turn_tokens:
        monkeypatch.setattr(selective_scan_cuda, "TURN_TOKENS", turn_tokens)
    inputs = [t.to(dtype) for t in random_inputs(2, sum(lengths), channels, rank=6, step_bias=-1.0)]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert_parts_match_the_whole(fused, inputs, lengths, kind, tolerance, 10 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_the_fused_projection(on_cpu, monkeypatch, dtype):
    """Of the only part there is, through the seam."""
    on_cpu(1)
    monkeypatch.setitem(BACKENDS, "cuda", BACKENDS["cuda"]._replace(unusable_reason=lambda *_: None))
    inputs = [t.to(dtype).requires_grad_() for t in random_inputs(2, 20, 24, rank=6, step_bias=-1.0)]
    weight = torch.randn(5, 24).to(dtype).requires_grad_()
    part, leaves = PartOfThread(None, Board(1), 0), [*inputs, weight]
    found = bidirectional_selective_scan(*inputs, order=part, backend="cuda", out_proj_weight=weight)
    with torch.inference_mode():
        inferred = bidirectional_selective_scan(*inputs, order=part, backend="cuda", out_proj_weight=weight)
    expected = bidirectional_selective_scan_reference(*inputs) @ weight.T.double()
    sent_back = torch.randn_like(expected)
    gradients = [torch.autograd.grad(out, leaves, sent_back.to(out.dtype)) for out in (found, expected)]
    for value, wanted in zip([inferred, found, *gradients[0]], [expected, expected, *gradients[1]], strict=True):
        assert relative_error(value, wanted) < (1e-5 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("backend", ["torch", pytest.param("numba", marks=without_numba), None])
def test_a_part_goes_through_the_seam_as_an_order_does(backend):
    inputs, weight = random_inputs(1, 12, 6), torch.randn(4, 6)
    order = part_orders("spatial", [12])[0]
    part = PartOfThread(order, Board(1), 0)
    found, expected = (
        bidirectional_selective_scan(*inputs, order=o, backend=backend, out_proj_weight=weight) for o in (part, order)
    )
    torch.testing.assert_close(found, expected)


def test_parts_that_cannot_be_scanned_are_refused():
    inputs, part = random_inputs(1, 2, 6), PartOfThread(None, Board(1), 0)
    with pytest.raises(ValueError, match="A part has 2 tokens, but the convolution looks back at 3"):
        bidirectional_selective_scan(*inputs, order=part)
    with pytest.raises(ValueError, match="gets its state from the other processes"):
        bidirectional_selective_scan(*inputs, order=part, state=ScanState(*random_state(inputs)))
    longer = PartOfThread(part_orders("spatial", [12])[0], Board(1), 0)
    with pytest.raises(ValueError, match="must list the 9 tokens"):
        bidirectional_selective_scan(*random_inputs(1, 9, 6), order=longer)
    with pytest.raises(ValueError, match="mamba_ssm: its kernels cannot begin with a state"):
        bidirectional_selective_scan(*random_inputs(1, 9, 6), order=part, backend="mamba_ssm")
