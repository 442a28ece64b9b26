"""The model of the paper: its counts, tokens, positions, orders, losses, initialisation, and what it refuses."""

import contextlib
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn
from transformers import AutoModelForVideoClassification, BitsAndBytesConfig, TorchAoConfig
from transformers.utils import is_accelerate_available

from modeling_videomamba import (
    VideoMambaConfig,
    VideoMambaForVideoClassification,
    VideoMambaModel,
    count_parameters_and_macs,
    use_scan_backend,
)
from modeling_videomamba import modeling_videomamba as module
from modeling_videomamba.modeling_videomamba import VideoMambaEmbeddings
from modeling_videomamba.selective_scan import bidirectional_selective_scan
from modeling_videomamba.tokens_videomamba import backward_order, interpolate_positions, sinusoidal_positions


def tiny_config(**kwargs):
    defaults = {"hidden_size": 32, "num_hidden_layers": 2, "image_size": 32, "num_frames": 4, "num_labels": 3}
    return VideoMambaConfig(**{**defaults, **kwargs})


def tiny_model(**kwargs):
    torch.manual_seed(0)
    return VideoMambaForVideoClassification(tiny_config(**kwargs)).eval()


def clip(batch=2, frames=4, size=32, seed=0):
    return torch.randn(batch, frames, 3, size, size, generator=torch.Generator().manual_seed(seed))


# ---- counts


@pytest.mark.parametrize(
    ("config", "parameters", "paper_gmacs", "gmacs"),
    [
        ({"num_labels": 400}, 26_387_344, 34.24, 39.10),
        ({"num_labels": 174}, 26_300_334, 34.24, 39.10),
        ({"num_labels": 51}, 26_252_979, 34.24, 39.10),
        ({"num_labels": 400, "num_frames": 32}, 26_989_456, 68.46, 78.17),
        ({"num_labels": 51, "num_frames": 8}, 25_951_923, 17.13, 19.56),
        ({"num_labels": 400, "hidden_size": 192}, 7_443_088, 8.79, 10.53),
    ],
)
def test_counts_of_the_paper(config, parameters, paper_gmacs, gmacs):
    """The figures of the paper's tables 5 to 9, from the config and from the model itself."""
    config = VideoMambaConfig(**config)
    counts = count_parameters_and_macs(config)
    with torch.device("meta"):
        model = VideoMambaForVideoClassification(config)
    assert counts["parameters"] == parameters == sum(p.numel() for p in model.parameters())
    assert round(counts["paper_macs"] / 1e9, 2) == paper_gmacs
    assert round(counts["macs"] / 1e9, 2) == gmacs


@pytest.mark.parametrize(
    "options",
    [
        {"position_embedding_type": "sinusoidal", "class_token_position": "none"},
        {"position_embedding_type": "none", "patch_size": [8, 16], "image_size": [24, 40], "state_size": 5},
        {"tubelet_size": 1, "expand": 3, "conv_kernel": 2, "time_step_rank": 7, "num_labels": 0},
    ],
)
def test_counts_follow_every_option(options):
    config = tiny_config(**options)
    model = VideoMambaForVideoClassification(config)
    assert count_parameters_and_macs(config)["parameters"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("merge_layers", "tokens"), [(None, 33 + 33), ([1], 33 + 17)])
def test_macs_against_the_counter_of_pytorch(merge_layers, tokens):
    """PyTorch counts the matrix products and the tubelet convolution it sees; two operations a multiply-accumulate."""
    from torch.utils.flop_counter import FlopCounterMode

    config = tiny_config(hidden_size=48, image_size=64, merge_layers=merge_layers)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), use_scan_backend("torch"):
        VideoMambaForVideoClassification(config)(clip(batch=1, size=64))
    taps = 2 * tokens * config.intermediate_size * config.conv_kernel  # not a matrix product
    assert counter.get_total_flops() / 2 == count_parameters_and_macs(config)["macs"] - taps


def test_light_config():
    config = VideoMambaConfig.light(num_labels=5)
    assert (config.hidden_size, config.num_hidden_layers, config.num_labels) == (192, 24, 5)


# ---- tokens and positions


def test_tubelets_are_cut_frame_by_frame_and_remainders_dropped():
    config = tiny_config(
        num_frames=5, image_size=[35, 50], position_embedding_type="none", class_token_position="none"
    )
    assert config.grid_size == (2, 2, 3)
    embeddings = VideoMambaEmbeddings(config)
    pixels = torch.randn(1, 5, 3, 35, 50)
    tokens = embeddings(pixels, config.grid_size)
    assert tokens.shape == (1, 12, 32)
    # Token 7 is time 1, row 0, column 1.
    tubelet = pixels[0, 2:4, :, 0:16, 16:32].transpose(0, 1)
    projection = embeddings.patch_embeddings.projection
    expected = (projection.weight * tubelet).flatten(1).sum(1) + projection.bias
    torch.testing.assert_close(tokens[0, 7], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("position", "index"), [("first", 0), ("middle", 4)])
def test_class_token_stands_in_its_place(position, index):
    embeddings = VideoMambaEmbeddings(tiny_config(class_token_position=position))
    with torch.no_grad():
        embeddings.cls_token.fill_(7.0)
        embeddings.position_embeddings.copy_(torch.arange(9.0)[None, :, None].expand(1, 9, 32))
        embeddings.patch_embeddings.projection.weight.zero_()
        embeddings.patch_embeddings.projection.bias.zero_()
    tokens = embeddings(clip(), (2, 2, 2))[0, :, 0].tolist()
    patches = [float(i) for i in range(1, 9)]
    assert tokens == patches[:index] + [7.0] + patches[index:]


def test_pooled_output_is_the_class_token_or_the_mean():
    for position, pick in (
        ("first", lambda h: h[:, 0]),
        ("middle", lambda h: h[:, 4]),
        ("none", lambda h: h.mean(1)),
    ):
        output = tiny_model(class_token_position=position).videomamba(clip())
        torch.testing.assert_close(output.pooler_output, pick(output.last_hidden_state))


def test_sinusoidal_positions_by_formula():
    table = sinusoidal_positions(50, 12)
    assert table.shape == (1, 50, 12)
    for position, channel in ((0, 0), (0, 1), (7, 4), (49, 11)):
        angle = position / 10000 ** (2 * (channel // 2) / 12)
        expected = math.sin(angle) if channel % 2 == 0 else math.cos(angle)
        assert table[0, position, channel].item() == pytest.approx(expected, abs=1e-6)
    assert sinusoidal_positions(3, 5).shape == (1, 3, 5)


def test_interpolated_positions_are_linear_in_time_and_space():
    """A table that is linear along one axis stays on the same line between its end points (half-pixel centres)."""
    grid, new_grid = (2, 4, 4), (4, 8, 2)
    time = torch.tensor([0.0, 4.0]).view(2, 1, 1).expand(grid)
    rows = torch.arange(4.0).view(1, 4, 1).expand(grid)
    positions = torch.stack([time, rows, torch.ones(grid)], dim=-1).view(1, 32, 3)
    found = interpolate_positions(positions, grid, new_grid).view(*new_grid, 3)
    assert found[:, 0, 0, 0].tolist() == [0.0, 1.0, 3.0, 4.0]
    assert found[0, :, 0, 1].tolist() == [0.0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0]
    assert (found[..., 2] == 1).all()
    torch.testing.assert_close(interpolate_positions(positions, grid, grid), positions)


@pytest.mark.parametrize("kind", ["learned", "sinusoidal", "none"])
@pytest.mark.parametrize(("frames", "size"), [(8, 32), (4, 48), (2, 16)])
def test_other_sizes_need_interpolation(kind, frames, size):
    model = tiny_model(position_embedding_type=kind)
    pixels = clip(frames=frames, size=size)
    with pytest.raises(ValueError, match=rf"{frames} frames of {size} x {size}.*4 frames of 32 x 32"):
        model(pixels)
    assert model(pixels, interpolate_pos_encoding=True).logits.isfinite().all()


def test_interpolation_changes_nothing_at_the_configured_size():
    model = tiny_model()
    torch.testing.assert_close(model(clip()).logits, model(clip(), interpolate_pos_encoding=True).logits)


# ---- orders


@pytest.mark.parametrize(
    ("reversal", "class_token", "expected"),
    [
        # 3 frames of 1 × 2 patches: tokens 0 1 | 2 3 | 4 5
        ("spatiotemporal", "none", None),
        ("spatial", "none", [1, 0, 3, 2, 5, 4]),
        ("temporal", "none", [4, 5, 2, 3, 0, 1]),
        # with the class token first: 0 is the class token, 1 2 | 3 4 | 5 6; it is visited last
        ("spatial", "first", [2, 1, 4, 3, 6, 5, 0]),
        ("temporal", "first", [5, 6, 3, 4, 1, 2, 0]),
        # in the middle: 0 1 | 2 (3) 4 | 5 6
        ("spatial", "middle", [1, 0, 4, 3, 2, 6, 5]),
        ("temporal", "middle", [5, 6, 2, 3, 4, 0, 1]),
    ],
)
def test_backward_orders_by_hand(reversal, class_token, expected):
    config = tiny_config(backward_scan=reversal, class_token_position=class_token)
    order = backward_order(config, (3, 1, 2))
    if expected is None:
        assert order is None
        return
    assert order.visits.tolist() == expected
    assert order.places[order.visits].tolist() == order.visits[order.places].tolist() == list(range(len(expected)))


def test_backward_orders_are_kept_for_each_size_but_not_where_something_traces():
    config, device = tiny_config(backward_scan="temporal", class_token_position="middle"), torch.device("cpu")
    with torch.inference_mode():
        order = backward_order(config, (5, 7, 9), device)
    assert not order.visits.is_inference() and not order.places.is_inference()
    assert backward_order(copy.deepcopy(config), [5, 7, 9], device) is order
    assert backward_order(config, (7, 5, 9), device).visits.tolist() != order.visits.tolist()
    for other in (tiny_config(backward_scan="temporal"), tiny_config(backward_scan="spatial")):
        fresh = backward_order(other, (5, 7, 9))  # of no device, and so not kept
        assert torch.equal(backward_order(other, (5, 7, 9), device).visits, fresh.visits)
    with FakeTensorMode():
        assert isinstance(backward_order(config, (5, 7, 9), device).visits, FakeTensor)
    assert backward_order(config, (5, 7, 9), torch.device("meta")).visits.is_meta
    assert backward_order(config, (5, 7, 9), device) is order


@pytest.mark.parametrize("class_token", ["first", "middle", "none"])
@pytest.mark.parametrize("reversal", ["spatial", "temporal"])
def test_backward_orders_can_be_worked_out_from_their_structure(reversal, class_token):
    """As a kernel would: step to token by the numbers of the order alone."""
    order = backward_order(tiny_config(backward_scan=reversal, class_token_position=class_token), (3, 5, 7))
    length, visits = len(order.visits), []
    per_frame = 35
    for step in range(length):
        patch = step
        if order.class_token is not None:
            if step == length - 1 - order.class_token:
                visits.append(order.class_token)
                continue
            patch -= step > length - 1 - order.class_token
        frame, rest = divmod(patch, per_frame)
        if order.reversal == "spatial":
            token = frame * per_frame + per_frame - 1 - rest
        else:
            token = (order.frames - 1 - frame) * per_frame + rest
        visits.append(token + (order.class_token is not None and token >= order.class_token))
    assert (order.reversal, order.frames) == (reversal, 3)
    assert order.visits.tolist() == visits


def test_sinusoids_that_are_kept_are_those_of_the_clip(tmp_path):
    """Loaded, resized, moved and rounded, and for clips of another size: always as if they were made anew."""
    model = tiny_model(position_embedding_type="sinusoidal")
    model.save_pretrained(tmp_path)
    loaded, resized, moved, rounded = (VideoMambaForVideoClassification.from_pretrained(tmp_path) for _ in range(4))
    resized.resize_position_embeddings(num_frames=8)
    with torch.device("meta"):
        assert VideoMambaForVideoClassification(model.config).videomamba.embeddings.sinusoids.device.type == "cpu"
    moved.to("meta").to_empty(device="cpu")
    rounded.bfloat16().float()
    for found in (model, loaded, resized, moved, rounded):
        table = sinusoidal_positions(math.prod(found.config.grid_size), 32)
        assert torch.equal(found.videomamba.embeddings.sinusoids, table)
    torch.testing.assert_close(
        resized(clip(frames=8)).logits, loaded(clip(frames=8), interpolate_pos_encoding=True).logits
    )


@pytest.mark.parametrize("average", [get_ema_multi_avg_fn(0.9999), get_ema_multi_avg_fn(0.3), get_swa_multi_avg_fn()])
@pytest.mark.parametrize("backward_scan", ["spatiotemporal", "spatial", "temporal"])
def test_averaged_weights_scan_in_the_same_order(backward_scan, average):
    """Weights that do not change are averaged to themselves; buffers, which may be averaged too, there are none."""
    model = tiny_model(backward_scan=backward_scan, position_embedding_type="sinusoidal")
    averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    for _ in range(5):
        averaged.update_parameters(model)
    assert not list(model.buffers()) and averaged.n_averaged == 5
    for backend in ("sequential", "torch", None):
        with use_scan_backend(backend) if backend else contextlib.nullcontext():
            assert torch.equal(averaged(clip()).logits, model(clip()).logits)


def test_class_token_sees_all_tokens_and_the_reversals_differ():
    """Every patch changes the class token's logits under each reversal, and no two reversals give the same."""
    logits = []
    for reversal in ("spatiotemporal", "spatial", "temporal"):
        model = tiny_model(backward_scan=reversal)
        pixels = clip(batch=1).requires_grad_()
        model(pixels).logits.sum().backward()
        per_tubelet = pixels.grad.abs().view(2, 2, 3, 2, 16, 2, 16).sum(dim=(1, 2, 4, 6))
        assert (per_tubelet > 0).all()
        logits.append(model(pixels).logits)
    assert not torch.allclose(logits[0], logits[1]) and not torch.allclose(logits[1], logits[2])
    assert not torch.allclose(logits[0], logits[2])


# ---- the mixer's output projection


def test_out_proj_is_handed_over_only_if_nothing_is_attached_to_it(monkeypatch):
    """A fused scan takes the weight and passes by the module, and with it whatever hangs on it."""
    handed_over = []

    def scan(*tensors, out_proj_weight=None, **kwargs):
        handed_over.append(out_proj_weight is not None)
        return bidirectional_selective_scan(*tensors, out_proj_weight=out_proj_weight, **kwargs)

    class Adapter(nn.Linear):
        """Stands for one that was put in the projection's place."""

    class Quantised(torch.Tensor):
        """Stands for a weight that only its own operators understand."""

    monkeypatch.setattr(module, "bidirectional_selective_scan", scan)
    mixer = tiny_model().videomamba.layers[0].mixer
    hidden_states = torch.randn(2, 9, 32)
    plain = [nn.Linear(64, 32, bias=False) for _ in range(5)]
    called = []
    plain[1].register_forward_hook(lambda *_: called.append("hook"))
    plain[2].register_full_backward_hook(lambda *_: None)
    plain[3].forward = lambda x: called.append("forward") or F.linear(x, plain[3].weight)
    plain[4].weight = nn.Parameter(plain[4].weight.detach().as_subclass(Quantised))
    others = [nn.Linear(64, 32), Adapter(64, 32, bias=False)]
    for out_proj, expected in zip([*plain, *others], [True] + 6 * [False], strict=True):
        mixer.out_proj = out_proj
        found = mixer(hidden_states)
        assert handed_over.pop() is expected
        mixer.out_proj = nn.Identity()
        torch.testing.assert_close(found, F.linear(mixer(hidden_states), out_proj.weight, out_proj.bias))
        handed_over.pop()
    assert called == ["hook", "forward"]


def test_a_sum_is_made_with_the_norm_after_it_unless_somebody_looks_on(monkeypatch):
    model, joined = tiny_model().eval(), []
    layers = model.videomamba.layers

    def norm(x, weight, eps):
        return F.rms_norm(x, weight.shape, weight, eps)

    def add_and_norm(x, update, weight, eps):
        joined.append(weight)
        return x + update, norm(x + update, weight, eps)

    expected = model(clip()).logits.detach()
    monkeypatch.setattr(module, "can_fuse_rms_norm", lambda *_: not torch.is_grad_enabled())
    monkeypatch.setattr(module, "fused_rms_norm", norm)
    monkeypatch.setattr(module, "fused_add_rms_norm", add_and_norm)
    with torch.no_grad():
        torch.testing.assert_close(model(clip()).logits, expected)
        assert [id(weight) for weight in joined] == [id(layer.norm.weight) for layer in layers[1:]]
        joined.clear()
        called = []
        hook = layers[0].register_forward_hook(lambda *_: called.append("hook"))
        torch.testing.assert_close(model(clip()).logits, expected)
        hook.remove()
        assert called == ["hook"] and not joined
        # What transformers attaches to record them stays attached.
        for _ in range(2):
            joined.clear()
            recorded = model(clip(), output_hidden_states=True).hidden_states
            assert len(recorded) == len(layers) + 1 and len(joined) == len(layers) - 1
        joined.clear()
        torch.testing.assert_close(model(clip()).logits, expected)
        assert len(joined) == len(layers) - 1
    for found, alone in zip(recorded, model(clip(), output_hidden_states=True).hidden_states, strict=True):
        torch.testing.assert_close(found, alone)


# ---- outputs, losses, training


def test_hidden_states_are_the_float32_residual_stream():
    model = tiny_model().to(torch.bfloat16)
    outputs = model.videomamba(clip(), output_hidden_states=True)
    assert len(outputs.hidden_states) == 3
    assert all(h.dtype == torch.float32 and h.shape == (2, 9, 32) for h in outputs.hidden_states)
    assert outputs.last_hidden_state.dtype == torch.bfloat16
    torch.testing.assert_close(model.videomamba.norm(outputs.hidden_states[-1]), outputs.last_hidden_state)


def test_losses():
    logits = tiny_model()(clip()).logits.detach()
    labels = torch.tensor([2, 0])
    torch.testing.assert_close(tiny_model()(clip(), labels=labels).loss.detach(), F.cross_entropy(logits, labels))
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    loss = tiny_model(problem_type="multi_label_classification")(clip(), labels=labels).loss
    torch.testing.assert_close(loss.detach(), F.binary_cross_entropy_with_logits(logits, labels))
    labels = torch.tensor([[0.3, -1.0, 2.0], [0.0, 0.5, 1.0]])
    loss = tiny_model(problem_type="regression")(clip(), labels=labels).loss
    torch.testing.assert_close(loss.detach(), F.mse_loss(logits, labels))


def test_gradient_checkpointing_gives_the_same_gradients():
    models = [tiny_model().train(), tiny_model().train()]
    # Renamed in transformers 5.23.
    enable = "activation_checkpointing_enable"
    getattr(models[1], enable if hasattr(models[1], enable) else "gradient_checkpointing_enable")()
    assert all(layer.gradient_checkpointing for layer in models[1].videomamba.layers)
    for model in models:
        model(clip(), labels=torch.tensor([0, 1])).loss.backward()
    for (name, plain), (_, checkpointed) in zip(*(m.named_parameters() for m in models), strict=True):
        torch.testing.assert_close(plain.grad, checkpointed.grad, msg=name)


def test_stochastic_depth_grows_with_depth_and_skips_whole_samples():
    model = tiny_model(num_hidden_layers=3, drop_path_rate=0.5)
    layers = model.videomamba.layers
    assert [layer.residual.drop_path_rate for layer in layers] == [0.0, 0.25, 0.5]
    hidden = torch.randn(400, 3, 32)
    kept = layers[2](hidden) - hidden
    updates = layers[2].train()(hidden) - hidden
    skipped = (updates == 0).flatten(1).all(1)
    assert 140 <= skipped.sum() <= 260  # five standard deviations are 50
    torch.testing.assert_close(updates[~skipped], 2 * kept[~skipped])
    torch.testing.assert_close(layers[0].train()(hidden), layers[0].eval()(hidden))


def test_initialisation_is_mambas():
    torch.manual_seed(0)
    model = VideoMambaModel(VideoMambaConfig(hidden_size=128, num_hidden_layers=9, image_size=32))
    mixer = model.layers[3].mixer
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(2, 256, 16))
    steps = F.softplus(mixer.dt_proj_bias)
    assert steps.min() >= 1e-3 * 0.999 and steps.max() <= 0.1 * 1.001
    assert abs(steps.log().mean() - math.log(1e-2)) < 0.2  # even in the logarithm
    assert (mixer.D == 1).all()
    for weight, fan_in, depth in ((mixer.in_proj.weight, 128, 1), (mixer.out_proj.weight, 256, 9)):
        # A uniform distribution on ±b has the standard deviation b / √3.
        assert weight.std().item() == pytest.approx((fan_in * depth * 3) ** -0.5, rel=0.03)
    assert model.embeddings.position_embeddings.std().item() == pytest.approx(0.02, rel=0.1)


def test_training_from_scratch_learns():
    """Sixteen random clips are learned by heart."""
    torch.manual_seed(0)
    model = tiny_model().train()
    pixels, labels = clip(batch=16), torch.arange(16) % 3
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = model(pixels, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 0.9 and losses[-1] < 0.1


def test_round_trip_through_a_folder(tmp_path):
    model = tiny_model(class_token_position="middle", backward_scan="temporal")
    model.save_pretrained(tmp_path)
    again = VideoMambaForVideoClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(again(clip()).logits, model(clip()).logits, rtol=0, atol=0)
    assert again.config.backward_scan == "temporal"
    backbone = VideoMambaModel.from_pretrained(tmp_path)
    torch.testing.assert_close(backbone(clip()).pooler_output, model.videomamba(clip()).pooler_output)


# ---- bad input


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(4, 3, 32, 32), r"5 axes .*\(4, 3, 32, 32\)"),
        (torch.zeros(1, 4, 1, 32, 32), "1 channels.*expects 3"),
        (torch.zeros(1, 3, 4, 32, 32), "4 channels.*expects 3"),
        (torch.zeros(1, 4, 3, 32, 32, dtype=torch.uint8), "floating point.*uint8"),
        (torch.zeros(1, 4, 3, 32, 32, dtype=torch.complex64), "floating point.*complex64"),
        (torch.zeros(1, 4, 3, 32, 32, dtype=torch.bool), "floating point.*bool.*processor"),
        *(
            (torch.zeros(1, 4, 3, 32, 32).to(kind), rf"16 bits or more, got {kind}\. Convert .*to\(torch.bfloat16\)")
            for kind in (torch.float8_e4m3fn, torch.float8_e5m2)
        ),
        (torch.zeros(1, 4, 3, 32, 32).to_sparse(), r"dense, got the layout torch.sparse_coo: call `to_dense\(\)`"),
        (torch.zeros(1, 96, 128).to_sparse_csr(), r"dense, got the layout torch.sparse_csr: call `to_dense\(\)`"),
        (torch.nested.nested_tensor([torch.zeros(4, 3, 32, 32)]), "one dense tensor, got a nested one. Stack"),
        (torch.zeros(1, 4, 3, 32, 32, device="meta"), "device meta.*holds no frames.* on the model's device.*'cpu'"),
        (torch.zeros(0, 4, 3, 32, 32), r"\(0, 4, 3, 32, 32\) holds no clip"),
        (None, "must be a `torch.Tensor`, got NoneType.*processor"),
        ([[0.0]], "must be a `torch.Tensor`, got list"),
        (torch.zeros(1, 4, 3, 32, 32).numpy(), "must be a `torch.Tensor`, got ndarray"),
    ],
)
def test_pixel_values_that_are_refused(pixels, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(pixels)


def test_clip_smaller_than_a_tubelet_is_refused():
    with pytest.raises(ValueError, match="less than one tubelet of 2 frames of 16 x 16"):
        tiny_model()(clip(frames=1), interpolate_pos_encoding=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 1}, "num_frames.*tubelet_size"),
        ({"image_size": 8}, "image_size.*patch_size"),
        ({"image_size": [32, 32, 32]}, "image_size"),
        ({"class_token_position": "last"}, "(?s)class_token_position.*first.*last"),
        ({"backward_scan": "diagonal"}, "(?s)backward_scan.*spatiotemporal"),
        ({"position_embedding_type": "rope"}, "(?s)position_embedding_type.*learned"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"time_step_rank": "large"}, "(?s)time_step_rank.*auto"),
        ({"time_step_min": 1.0, "time_step_max": 0.1}, "time_step_min"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers.*at most 4096"),
        ({"layer_norm_epsilon": math.nan}, "layer_norm_epsilon.*positive"),
        ({"layer_norm_epsilon": -1.0}, "layer_norm_epsilon.*positive"),
        ({"initializer_range": math.inf}, "initializer_range"),
        ({"id2label": {0: "a", 2: "b"}, "num_labels": 2}, "id2label.*0 to 1.*got the numbers 0, 2"),
    ],
)
def test_configs_that_contradict_themselves(options, message):
    with pytest.raises(StrictDataclassError, match=message):
        tiny_config(**options)


def test_config_is_checked_again_when_it_is_loaded(tmp_path):
    config = tiny_config()
    config = copy.deepcopy(config)
    config.num_frames = 1
    config.to_json_file(tmp_path / "config.json")
    with pytest.raises(StrictDataclassError, match="tubelet_size"):
        VideoMambaConfig.from_pretrained(tmp_path)


def test_config_is_checked_again_when_a_model_is_made_of_it(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    for options, message in (
        ({"backward_scan": "diagonal"}, "(?s)backward_scan.*spatiotemporal.*diagonal"),
        ({"patch_size": 64}, "image_size.*patch_size"),
    ):
        with pytest.raises(StrictDataclassError, match=message):
            VideoMambaForVideoClassification.from_pretrained(tmp_path, **options)


def test_config_that_contradicts_itself_is_not_saved(tmp_path):
    config = tiny_config()
    config.tubelet_size = 8
    with pytest.raises(StrictDataclassError, match="num_frames.*tubelet_size"):
        config.save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match="(?s)class_token_position.*first.*last"):
        config.class_token_position = "last"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_of_a_diverged_training_are_refused(tmp_path, bad):
    model = tiny_model()
    with torch.no_grad():
        model.videomamba.layers[1].mixer.D[1, 7] = bad
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'videomamba.layers.1.mixer.D' of .* holds NaN or infinite numbers"):
        VideoMambaForVideoClassification.from_pretrained(tmp_path)


# ---- other ways to load and to call it


@pytest.mark.parametrize("kind", ["learned", "sinusoidal"])
@pytest.mark.parametrize("auto", [False, True])
def test_from_pretrained_fits_the_model_to_the_sizes_asked_for(kind, auto, tmp_path):
    model = tiny_model(position_embedding_type=kind, backward_scan="temporal")
    model.save_pretrained(tmp_path)
    pixels = clip(frames=8, size=48)
    expected = model(pixels, interpolate_pos_encoding=True).logits
    changed = VideoMambaConfig.from_pretrained(tmp_path)
    changed.num_frames, changed.image_size = 8, 48
    model_class = AutoModelForVideoClassification if auto else VideoMambaForVideoClassification
    for options in ({"num_frames": 8, "image_size": 48}, {"config": changed}):
        found = model_class.from_pretrained(tmp_path, **options)
        assert (found.config.num_frames, found.config.image_size) == (8, 48)
        torch.testing.assert_close(found(pixels).logits, expected)
    assert (changed.num_frames, changed.image_size) == (8, 48)
    with pytest.raises(StrictDataclassError, match="`num_frames`=1 is shorter than one tubelet"):
        model_class.from_pretrained(tmp_path, num_frames=1)


@pytest.mark.parametrize("sizes", [{"num_frames": 8}, {"num_frames": 2, "image_size": 64}, {"image_size": 33}])
@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_positions_that_were_resized_are_trained_by_an_optimizer_made_before(optimizer_class, sizes):
    model = tiny_model(class_token_position="middle")
    optimizer = optimizer_class(model.parameters(), lr=0.1)
    model.resize_position_embeddings(**sizes)
    before = model.videomamba.embeddings.position_embeddings.detach().clone()
    frames, size = model.config.num_frames, model.config.image_size
    model(clip(frames=frames, size=size), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    after = model.videomamba.embeddings.position_embeddings
    assert after.shape[1] == 1 + math.prod(model.config.grid_size)
    assert (after != before).flatten(0, 1).any(1).all()
    torch.testing.assert_close(
        model(clip(frames=frames, size=size)).logits,
        model(clip(frames=frames, size=size), interpolate_pos_encoding=True).logits,
    )


def test_an_optimizer_with_moments_of_the_old_positions_does_not_go_on_silently():
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def step():
        pixels = clip(frames=model.config.num_frames, size=model.config.image_size)
        model(pixels, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    model.resize_position_embeddings(image_size=40)  # as many tubelets
    step()
    model.resize_position_embeddings(num_frames=8)
    with pytest.raises(RuntimeError, match="size"):
        step()


def test_tuples_instead_of_outputs():
    model = tiny_model()
    expected = model(clip()).logits
    torch.testing.assert_close(model(clip(), return_dict=False)[0], expected)
    model.config.return_dict = False
    torch.testing.assert_close(model(clip())[0], expected)
    assert model.reading_maps(clip()).shape == (2, 2, 2, 2)


def test_floating_point_operations_of_a_batch():
    """Six for each multiply-accumulate: two forward, four backward."""
    model = tiny_model()
    inputs = {"pixel_values": clip(batch=5)}
    assert model.floating_point_ops(inputs) == 30 * count_parameters_and_macs(model.config)["macs"]
    longer = count_parameters_and_macs(tiny_config(num_frames=8))
    assert model.floating_point_ops({"pixel_values": clip(batch=1, frames=8)}) == 6 * longer["macs"]


whole_model_on_disk = pytest.mark.skipif(
    not is_accelerate_available("1.15.0"), reason="Accelerate before 1.15 refuses a device_map of the disk alone"
)


@pytest.mark.parametrize("options", [{}, {"backward_scan": "spatial", "position_embedding_type": "sinusoidal"}])
@pytest.mark.parametrize(
    "device_map",
    [
        pytest.param({"": "disk"}, marks=whole_model_on_disk),
        {"videomamba": "disk", "classifier": "cpu"},
        {"videomamba.embeddings": "disk", "videomamba.norm": "cpu", "classifier": "disk"}
        | {"videomamba.layers.0": "cpu", "videomamba.layers.1": "disk"},
    ],
    ids=["all", "backbone", "by layers"],
)
@pytest.mark.filterwarnings("ignore")
def test_weights_that_lie_on_disk(options, device_map, tmp_path):
    """Accelerate brings each module's weights when the module is called."""
    model = tiny_model(**options)
    model.save_pretrained(tmp_path / "model")
    offloaded = VideoMambaForVideoClassification.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "weights"
    )
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    torch.testing.assert_close(offloaded(clip()).logits, model(clip()).logits)


def test_weights_that_lie_in_memory_until_they_are_wanted():
    accelerate = pytest.importorskip("accelerate", reason="offloading is Accelerate's")
    expected = tiny_model()(clip()).logits
    model = accelerate.cpu_offload(tiny_model(), execution_device="cpu")
    assert all(parameter.is_meta for parameter in model.parameters())
    torch.testing.assert_close(model(clip()).logits, expected)


@pytest.mark.skipif(
    torch.__version__ < (2, 11), reason="function transforms of PyTorch 2.7 and 2.9 read no tensor's values"
)
def test_function_transforms_of_the_reference():
    """The fused backends have a first derivative alone; the reference is plain PyTorch."""
    model, pixels = tiny_model(num_hidden_layers=1, hidden_size=16), clip()
    expected = model(pixels).logits
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def first_logit(parameters, pixels):
        return torch.func.functional_call(model, parameters, (pixels[None],)).logits[0, 0]

    with use_scan_backend("sequential"):
        found = torch.vmap(lambda pixels: model(pixels[None]).logits[0])(pixels)
        torch.testing.assert_close(found, expected)
        each = torch.vmap(torch.func.grad(first_logit), in_dims=(None, 0))(parameters, pixels)
        wanted = torch.autograd.grad(expected[:, 0].sum(), list(model.parameters()))
        for (name, gradient), reference in zip(each.items(), wanted, strict=True):
            torch.testing.assert_close(gradient.sum(0), reference, msg=name, atol=1e-6, rtol=1e-4)
        # A second derivative: of the squared length of the gradient, against a difference quotient.
        pixels = pixels.requires_grad_()

        def gradient_at(pixels, **kwargs):
            return torch.autograd.grad(model(pixels).logits[:, 0].sum(), pixels, **kwargs)[0]

        gradient = gradient_at(pixels, create_graph=True)
        (product,) = torch.autograd.grad(gradient.square().sum() / 2, pixels)  # Hessian times gradient
        step = 1e-2 / gradient.detach().norm()
        ahead, behind = (gradient_at(pixels + sign * step * gradient.detach()) for sign in (1, -1))
        torch.testing.assert_close(product, (ahead - behind) / (2 * step), atol=1e-5, rtol=5e-2)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore")
def test_adapters_on_quantised_weights(bits, tmp_path):
    """QLoRA: the classifier, which is trained, is spared; the mixers' projections are not."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, for 4-bit and 8-bit weights")
    peft = pytest.importorskip("peft", reason="needs peft, for adapters")
    original = tiny_model(hidden_size=64)  # bitsandbytes' 4-bit blocks are of 64 weights
    original.save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = VideoMambaForVideoClassification.from_pretrained(tmp_path, quantization_config=quantization)
    assert quantization.llm_int8_skip_modules is None
    assert type(model.classifier) is nn.Linear
    assert f"{bits}bit" in type(model.videomamba.layers[0].mixer.out_proj).__name__
    expected = original(clip()).logits
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            torch.testing.assert_close(model(clip()).logits, expected, atol=0.1, rtol=0.1)
    model = peft.prepare_model_for_kbit_training(model)
    lora = peft.LoraConfig(r=4, target_modules="all-linear", modules_to_save=["classifier"])
    model = peft.get_peft_model(model, lora).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(pixel_values=clip(), labels=torch.tensor([0, 1])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.filterwarnings("ignore")
def test_quantised_weights_are_not_taken_raw(device, tmp_path):
    """torchao keeps `nn.Linear` and swaps its weight; with gradients on, a fused scan would take that weight."""
    # Not among the extras: with it, every import of transformers prints warnings (torchao 0.18, PyTorch 2.14).
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao, for weights in 8 bits")
    original = tiny_model()
    original.save_pretrained(tmp_path)
    quantization = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    model = VideoMambaForVideoClassification.from_pretrained(tmp_path, quantization_config=quantization).to(device)
    out_proj = model.videomamba.layers[0].mixer.out_proj
    assert type(out_proj) is nn.Linear and type(out_proj.weight) is not nn.Parameter
    assert type(model.classifier.weight) is nn.Parameter
    pixels = clip().to(device).requires_grad_()
    logits = model(pixels).logits
    torch.testing.assert_close(logits.cpu(), original(clip()).logits, atol=0.02, rtol=0.05)
    logits.sum().backward()
    assert pixels.grad.abs().sum() > 0
