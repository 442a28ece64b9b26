"""The selective scan: references against hand calculation and transformers' Mamba, `torch` backend against them."""

import math
import threading

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from modeling_videomamba import (
    VideoMambaConfig,
    VideoMambaForVideoClassification,
    selective_scan_torch,
    use_scan_backend,
)
from modeling_videomamba import selective_scan as seam
from modeling_videomamba.selective_scan_reference import (
    bidirectional_selective_scan_reference,
    selective_scan_reference,
)
from modeling_videomamba.tokens_videomamba import backward_order
from scan_helpers import assert_matches_reference, gradients, random_inputs, relative_error, scan_order


def test_reference_by_hand():
    """One channel, one state, three steps, worked out on paper: Δ = ln 2 by softplus(0), A = -1, so decays are 1/2."""
    u = torch.tensor([[[1.0], [2.0], [4.0]]])
    B = torch.tensor([[[1.0], [1.0], [0.5]]])
    C = torch.tensor([[[1.0], [2.0], [1.0]]])
    arguments = (u, torch.zeros(1, 3, 1), torch.tensor([[-1.0]]), B, C, torch.tensor([3.0]), torch.zeros(1))
    ln2 = math.log(2)
    # h = Δ, Δ/2 + 2Δ, (Δ/2 + 2Δ)/2 + 2Δ;  y = C h + 3 u
    expected = [ln2 + 3, 2 * 2.5 * ln2 + 6, 3.25 * ln2 + 12]
    found, state = selective_scan_reference(*arguments)
    assert state.item() == pytest.approx(3.25 * ln2)
    torch.testing.assert_close(found.flatten(), torch.tensor(expected, dtype=torch.float64))
    # Visited in the order 2, 0, 1:  h_2 = 2Δ, h_0 = Δ + Δ, h_1 = Δ + 2Δ
    expected = [2 * ln2 + 3, 2 * 3 * ln2 + 6, 2 * ln2 + 12]
    found, _ = selective_scan_reference(*arguments, visits=torch.tensor([2, 0, 1]))
    torch.testing.assert_close(found.flatten(), torch.tensor(expected, dtype=torch.float64))
    # From h = 2:  h = 1 + Δ, (1 + Δ)/2 + 2Δ, ((1 + Δ)/2 + 2Δ)/2 + 2Δ
    expected = [1 + ln2 + 3, 2 * (0.5 + 2.5 * ln2) + 6, 0.25 + 3.25 * ln2 + 12]
    found, _ = selective_scan_reference(*arguments, start=torch.full((1, 1, 1), 2.0))
    torch.testing.assert_close(found.flatten(), torch.tensor(expected, dtype=torch.float64))


def test_reference_against_the_mamba_of_transformers():
    """Our mixer is the mean of their mixer on the sequence and, flipped, on the flipped sequence."""
    torch.manual_seed(0)
    config = VideoMambaConfig(hidden_size=32, num_hidden_layers=2)
    theirs = [MambaMixer(MambaConfig(hidden_size=32, state_size=16, time_step_rank=2), 0) for _ in range(2)]
    ours = VideoMambaForVideoClassification(config).videomamba.layers[0].mixer
    for direction, mixer in enumerate(theirs):
        with torch.no_grad():
            mixer.in_proj.weight.copy_(ours.in_proj.weight)
            mixer.out_proj.weight.copy_(ours.out_proj.weight)
            mixer.conv1d.weight.copy_(ours.conv_weight[direction, :, None])
            mixer.conv1d.bias.copy_(ours.conv_bias[direction])
            mixer.x_proj.weight.copy_(ours.x_proj_weight[direction])
            mixer.dt_proj.weight.copy_(ours.dt_proj_weight[direction])
            mixer.dt_proj.bias.copy_(ours.dt_proj_bias[direction])
            mixer.A_log.copy_(ours.A_log[direction])
            mixer.D.copy_(ours.D[direction])
    x = torch.randn(2, 70, 32)
    with torch.no_grad():
        expected = (theirs[0](x) + theirs[1](x.flip(1)).flip(1)) / 2
        for backend in ("sequential", "torch"):
            with use_scan_backend(backend):
                torch.testing.assert_close(ours(x), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("reversal", ["spatiotemporal", "spatial", "temporal"])
@pytest.mark.parametrize(
    ("grid", "class_token", "batch", "channels"),
    [
        ((1, 1, 1), "none", 1, 5),  # length 1
        ((1, 1, 1), "first", 3, 3),  # length 2
        ((3, 1, 5), "none", 1, 17),  # length 15
        ((4, 2, 2), "middle", 2, 7),  # length 17
        ((2, 4, 4), "none", 1, 8),  # exactly one chunk
        ((2, 4, 4), "first", 3, 8),  # one token more
        ((5, 7, 6), "first", 1, 20),  # 211
    ],
)
def test_torch_backend_matches_reference(grid, class_token, batch, channels, reversal):
    config = VideoMambaConfig(class_token_position=class_token, backward_scan=reversal)
    order = backward_order(config, grid)
    length = math.prod(grid) + (class_token != "none")
    assert_matches_reference(
        selective_scan_torch.bidirectional_selective_scan, random_inputs(batch, length, channels), order
    )


@pytest.mark.slow
def test_torch_backend_matches_reference_past_10_000_tokens():
    inputs = random_inputs(1, 10_241, 2, states=3, rank=1)
    assert_matches_reference(selective_scan_torch.bidirectional_selective_scan, inputs)


@pytest.mark.parametrize(("step_bias", "what"), [(8.0, "decays to 0"), (-14.0, "decays near 1")])
def test_torch_backend_with_extreme_steps(step_bias, what):
    inputs = random_inputs(2, 150, 6, step_bias=step_bias)
    # The gradient of the log of a decay that underflows to 0 is 0 in float64 only from e^-745 on.
    assert_matches_reference(selective_scan_torch.bidirectional_selective_scan, inputs, gradient_tolerance=1e-4)


def test_torch_backend_tiles_give_the_same(monkeypatch):
    """Cutting the chunks into tiles is invisible: one chunk a tile against all chunks in one."""
    inputs = random_inputs(3, 300, 6)
    results = []
    for tiles in (lambda n, *_: [slice(0, n)], lambda n, *_: [slice(i, i + 1) for i in range(n)]):
        monkeypatch.setattr(selective_scan_torch, "_tiles", tiles)
        results.append(gradients(selective_scan_torch.bidirectional_selective_scan, inputs, torch.ones(3, 300, 6)))
    torch.testing.assert_close(results[0], results[1])


def test_torch_backend_takes_strided_inputs():
    inputs = random_inputs(2, 90, 6)
    expected = selective_scan_torch.bidirectional_selective_scan(*inputs)
    strided = [t.new_full((*t.shape[:-1], 2 * t.shape[-1]), math.nan)[..., ::2].copy_(t) for t in inputs]
    strided[0] = inputs[0].transpose(0, 1).contiguous().transpose(0, 1)
    found = selective_scan_torch.bidirectional_selective_scan(*strided)
    torch.testing.assert_close(found, expected)


def test_torch_backend_in_bfloat16_keeps_its_state_in_float32():
    """Over 2000 tokens with decays near 1, a bfloat16 state would lose all small contributions."""
    inputs = [t.bfloat16() for t in random_inputs(1, 2000, 8, step_bias=-6.0)]
    expected = bidirectional_selective_scan_reference(*[t.double() for t in inputs])
    found = selective_scan_torch.bidirectional_selective_scan(*inputs)
    assert found.dtype == torch.bfloat16
    assert relative_error(found, expected) < 1e-2


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of any tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return output


def test_states_of_all_tokens_never_exist_together():
    batch, length, channels, states = 1, 40_000, 16, 16
    u, delta = torch.randn(1, batch, length, channels), torch.rand(1, batch, length, channels) * 0.1
    A = -torch.rand(1, channels, states)
    B, C = torch.randn(2, 1, batch, length, states).unbind()
    with LargestTensor() as largest:
        y, starts, _ = selective_scan_torch._scan_forward(u, delta, A, B, C)
    assert largest.elements < batch * length * channels * states / 4
    with LargestTensor() as largest:
        selective_scan_torch._scan_backward_op._init_fn(torch.ones_like(y), None, u, delta, A, B, C, starts)
    assert largest.elements < batch * length * channels * states


def test_operators_are_well_registered():
    """Schema, fake kernel, autograd and compilation of the custom operator, by PyTorch's own checker."""
    groups, batch, length, channels, states = 2, 2, 70, 3, 4
    generator = torch.Generator().manual_seed(0)
    arguments = [
        torch.randn(groups, batch, length, channels, generator=generator),
        torch.rand(groups, batch, length, channels, generator=generator),
        -torch.rand(groups, channels, states, generator=generator),
        torch.randn(groups, batch, length, states, generator=generator),
        torch.randn(groups, batch, length, states, generator=generator),
    ]
    arguments = [t.requires_grad_() for t in arguments]
    start = torch.randn(groups, batch, channels, states, generator=generator, requires_grad=True)
    for first in (None, start):
        torch.library.opcheck(selective_scan_torch._scan_op, [*arguments, first])


@pytest.mark.parametrize("reversal", ["spatiotemporal", "temporal"])
def test_model_compiles_and_exports_whole(reversal):
    torch.manual_seed(0)
    config = VideoMambaConfig(
        hidden_size=16, num_hidden_layers=2, image_size=32, num_frames=4, backward_scan=reversal, num_labels=3
    )
    model = VideoMambaForVideoClassification(config).eval()
    clip = torch.randn(2, 4, 3, 32, 32)
    expected = model(clip).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(clip).logits, expected)
    exported = torch.export.export(model, (clip,)).module()
    torch.testing.assert_close(exported(clip).logits, expected)


class TestChoiceOfBackend:
    device, dtype = torch.device("cpu"), torch.float32

    @pytest.fixture(autouse=True)
    def without_environment(self, monkeypatch):
        monkeypatch.delenv(seam.ENVIRONMENT_VARIABLE, raising=False)

    @pytest.fixture
    def mixer(self):
        config = VideoMambaConfig(hidden_size=8, num_hidden_layers=1, scan_backend="sequential")
        return VideoMambaForVideoClassification(config).videomamba.layers[0].mixer

    def test_first_usable_one_is_taken(self, monkeypatch):
        never = seam.ScanBackend(lambda device, dtype: "never", None)
        monkeypatch.setattr(seam, "BACKENDS", {"never": never, **seam.BACKENDS})
        chosen = seam.select_scan_backend(self.device, self.dtype)
        assert chosen in seam.BACKENDS and chosen not in ("never", "sequential")

    def test_context_beats_environment_beats_config(self, monkeypatch):
        assert seam.select_scan_backend(self.device, self.dtype, "sequential") == "sequential"
        monkeypatch.setenv(seam.ENVIRONMENT_VARIABLE, "torch")
        assert seam.select_scan_backend(self.device, self.dtype, "sequential") == "torch"
        with use_scan_backend("sequential"):
            assert seam.select_scan_backend(self.device, self.dtype, "torch") == "sequential"
        assert seam.select_scan_backend(self.device, self.dtype, "sequential") == "torch"

    def test_mixer_without_a_backend_name_takes_the_first_usable_one(self, monkeypatch):
        asked = []
        spy = seam.ScanBackend(lambda *device_and_dtype: asked.append(device_and_dtype), seam.torch_scan)
        monkeypatch.setattr(seam, "BACKENDS", {"spy": spy, **seam.BACKENDS})
        mixer = VideoMambaForVideoClassification(VideoMambaConfig(hidden_size=8, num_hidden_layers=1))
        mixer = mixer.videomamba.layers[0].mixer
        hidden_states = torch.randn(2, 5, 8)
        found = mixer(hidden_states)
        assert asked == [(self.device, self.dtype)]
        names = "conv_weight conv_bias x_proj_weight dt_proj_weight dt_proj_bias A_log D".split()
        parameters = dict(mixer.named_parameters())
        scanned = bidirectional_selective_scan_reference(mixer.in_proj(hidden_states), *(parameters[n] for n in names))
        torch.testing.assert_close(found, mixer.out_proj(scanned.float()))

    def test_config_reaches_the_scan(self, mixer, monkeypatch):
        called = []
        spy = seam.ScanBackend(lambda *_: None, lambda xz, *_, order: called.append(1) or xz[..., : xz.shape[-1] // 2])
        monkeypatch.setitem(seam.BACKENDS, "sequential", spy)
        mixer(torch.zeros(1, 3, 8))
        assert called

    def test_unknown_and_unusable_names_list_the_usable(self, monkeypatch):
        monkeypatch.setitem(seam.BACKENDS, "moon", seam.ScanBackend(lambda *_: "there is no moon here", None))
        for name, fault in (("mooon", "does not exist"), ("moon", "cannot run")):
            with pytest.raises(ValueError, match=fault) as error:
                seam.select_scan_backend(self.device, self.dtype, name)
            assert "torch" in str(error.value) and "there is no moon here" in str(error.value)
        with pytest.raises(ValueError, match="mooon.*torch"), use_scan_backend("mooon"):
            pass


def test_causal_convolution_against_conv1d():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 3, 9, 5), torch.randn(2, 5, 4), torch.randn(2, 5)
    found = selective_scan_torch.causal_convolution(x, weight, bias)
    for direction in range(2):
        padded = F.pad(x[direction].transpose(1, 2), (3, 0))
        expected = F.conv1d(padded, weight[direction, :, None], bias[direction], groups=5).transpose(1, 2)
        torch.testing.assert_close(found[direction], expected)


def test_order_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"must list the 6 tokens of `xz`; got the shape \(5,\)"):
        seam.bidirectional_selective_scan(*random_inputs(1, 6, 4), order=scan_order(torch.arange(5)), backend="torch")


def test_out_proj_is_fused_where_gradients_are_wanted(monkeypatch):
    fused = []

    def scan(*tensors, order=None, out_proj_weight=None):
        fused.append(out_proj_weight is not None)
        scanned = seam.torch_scan(*tensors, order=order)
        return scanned if out_proj_weight is None else F.linear(scanned, out_proj_weight)

    inputs, weight = random_inputs(2, 7, 6), torch.randn(5, 6)
    expected = F.linear(bidirectional_selective_scan_reference(*inputs).float(), weight)
    for fuses, grad in ((True, True), (True, False), (False, True)):
        monkeypatch.setitem(seam.BACKENDS, "torch", seam.ScanBackend(lambda *_: None, scan, fuses_out_proj=fuses))
        with torch.set_grad_enabled(grad):
            found = seam.bidirectional_selective_scan(*inputs, backend="torch", out_proj_weight=weight)
        assert fused.pop() is (fuses and grad)
        torch.testing.assert_close(found, expected)


def test_threads_force_backends_side_by_side():
    """Blocks that overlap in time end in any order; afterwards nothing is forced, and each thread had its own."""
    cpu, both_in, first_out = torch.device("cpu"), threading.Barrier(2), threading.Event()
    default, found = seam.select_scan_backend(cpu, torch.float32), {}

    def run(name, waits):
        with use_scan_backend(name):
            both_in.wait(10)
            found[name] = seam.select_scan_backend(cpu, torch.float32)
            if waits:
                first_out.wait(10)
        first_out.set()

    threads = [threading.Thread(target=run, args=arguments) for arguments in (("torch", False), ("sequential", True))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"torch": "torch", "sequential": "sequential"}
    assert seam.select_scan_backend(cpu, torch.float32) == default
    # Autograd has threads of its own, in which checkpointed layers are scanned again.
    with use_scan_backend("sequential"):
        other = threading.Thread(target=lambda: found.update(other=seam.select_scan_backend(cpu, torch.float32)))
        other.start()
        other.join()
    assert found["other"] == "sequential"
