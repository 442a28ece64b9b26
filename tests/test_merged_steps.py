"""Temporal merging (`merge_layers`): against means and orders that are written out, and what does not go with it."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError

from modeling_videomamba import (
    VideoMambaConfig,
    VideoMambaForImageClassification,
    VideoMambaForVideoClassification,
    count_parameters_and_macs,
)
from modeling_videomamba import modeling_videomamba as module
from modeling_videomamba.context_parallel import ContextParallel
from modeling_videomamba.selective_scan_reference import bidirectional_selective_scan_reference
from modeling_videomamba.tokens_videomamba import merge_steps


PARAMETERS = "conv_weight conv_bias x_proj_weight dt_proj_weight dt_proj_bias A_log D".split()
EVERY_SCAN = list(itertools.product(("spatiotemporal", "spatial", "temporal"), ("first", "middle", "none")))


def small_config(**fields):
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 4, "image_size": 32, "num_labels": 3}
    return VideoMambaConfig(**{**sizes, "num_frames": 8, "merge_layers": [1], **fields})


def small_model(**fields):
    """Random weights, of which a class token, a position and a state show in the logits."""
    torch.manual_seed(0)
    model = VideoMambaForVideoClassification(small_config(**fields)).eval()
    for name, parameter in model.named_parameters():
        if "embeddings" in name or name.endswith(("x_proj_weight", "out_proj.weight", "classifier.weight")):
            parameter.data *= 5
    return model


def clip(batch=2, frames=8, size=32):
    return torch.randn(batch, frames, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("position", "tokens", "merged"),
    [
        # 4 steps of 1 × 2 tubelets: 0 1 | 2 3 | 4 5 | 6 7. The class token is 100.
        ("none", [0, 1, 2, 3, 4, 5, 6, 7], [1, 2, 5, 6]),
        ("first", [100, 0, 1, 2, 3, 4, 5, 6, 7], [100, 1, 2, 5, 6]),
        ("middle", [0, 1, 2, 3, 100, 4, 5, 6, 7], [1, 2, 100, 5, 6]),
    ],
)
def test_two_steps_become_their_mean(position, tokens, merged):
    config = small_config(class_token_position=position, backward_scan="temporal")
    tokens = torch.tensor(tokens, dtype=torch.float)[None, :, None]
    found, order, grid = merge_steps(config, torch.cat([tokens, -tokens], dim=0), (4, 1, 2))
    assert grid == (2, 1, 2) and found.is_contiguous()
    assert found[0, :, 0].tolist() == merged and found[1, :, 0].tolist() == [-token for token in merged]
    assert sorted(order.visits.tolist()) == list(range(len(merged))) and order.frames == 2
    # Of the two steps that are left, in whose middle the class token stands then.
    found, order, grid = merge_steps(config, found, grid)
    first, second = 3.0, 4.0
    expected = {"none": [first, second], "first": [100.0, first, second], "middle": [first, 100.0, second]}[position]
    assert grid == (1, 1, 2) and found[0, :, 0].tolist() == expected


def written_out(model, pixel_values):
    """
    The last residual stream of each clip in float64, in a loop over its tokens by name: a step in time and a place in
    space, or "class". Orders and means are made of these names; the scan is the sequential reference.
    """
    config, backbone = model.config, model.videomamba
    steps, places = config.grid_size[0], config.grid_size[1] * config.grid_size[2]
    first = backbone.embeddings(pixel_values, config.grid_size).double()

    def in_order(steps):
        """Names as they stand, and as the backward direction visits them."""
        names = [(step, place) for step in range(steps) for place in range(places)]
        visits = {
            "spatiotemporal": names[::-1],
            "spatial": sorted(names, key=lambda name: (name[0], -name[1])),
            "temporal": sorted(names, key=lambda name: (-name[0], name[1])),
        }[config.backward_scan]
        if config.class_token_position != "none":
            at = len(names) // 2 if config.class_token_position == "middle" else 0
            visits.insert(len(names) - at, "class")
            names.insert(at, "class")
        return names, visits

    found = []
    for stream in first:
        count = steps
        names, visits = in_order(count)
        tokens = dict(zip(names, stream, strict=True))
        for index, layer in enumerate(backbone.layers):
            if index in config.merge_layers:
                count //= 2
                merged = {name: token for name, token in tokens.items() if name == "class"}
                for step, place in itertools.product(range(count), range(places)):
                    merged[step, place] = (tokens[2 * step, place] + tokens[2 * step + 1, place]) / 2
                tokens, (names, visits) = merged, in_order(count)
            mixer = layer.mixer
            line = torch.stack([tokens[name] for name in names])
            scale = (line.square().mean(-1, keepdim=True) + layer.norm.eps).rsqrt()
            normed = line * scale * layer.norm.weight.double()
            order = module.ScanOrder(*(torch.tensor(o) for o in numbers_of(names, visits)))
            xz = normed[None] @ mixer.in_proj.weight.double().T
            weights = [getattr(mixer, name).double() for name in PARAMETERS]
            scanned = bidirectional_selective_scan_reference(xz, *weights, order=order, dtype=torch.float64)
            line = line + scanned[0] @ mixer.out_proj.weight.double().T
            tokens = dict(zip(names, line, strict=True))
        found.append(torch.stack([tokens[name] for name in names]))
    return torch.stack(found)


def numbers_of(names, visits):
    order = [names.index(name) for name in visits]
    return order, [order.index(number) for number in range(len(order))]


@pytest.mark.parametrize(("backward_scan", "position"), EVERY_SCAN)
@pytest.mark.parametrize("layers", [[0], [1, 2]])
@torch.no_grad()
def test_model_is_as_written_out(backward_scan, position, layers):
    model = small_model(backward_scan=backward_scan, class_token_position=position, merge_layers=layers)
    expected = written_out(model, clip())
    outputs = model.videomamba(clip(), output_hidden_states=True)
    torch.testing.assert_close(outputs.hidden_states[-1].double(), expected, atol=1e-4, rtol=1e-4)
    normed = F.rms_norm(expected, (32,), model.videomamba.norm.weight.double(), 1e-5)
    place = {"first": 0, "middle": 16 // 2 ** len(layers) // 2, "none": slice(None)}[position]
    pooled = normed[:, place] if position != "none" else normed.mean(1)
    torch.testing.assert_close(outputs.pooler_output.double(), pooled, atol=1e-4, rtol=1e-4)
    # What goes into the first layer, and what each gives out, before steps are merged for the next.
    lengths = [16 // 2 ** sum(layer <= index for layer in layers) for index in (0, 0, 1, 2)]
    class_token = position != "none"
    assert [states.shape[1] - class_token for states in outputs.hidden_states] == lengths


@pytest.mark.parametrize(("layers", "joined"), [([0], [1, 2]), ([1], [2]), ([1, 2], [])])
def test_sums_are_made_with_norms_but_where_steps_are_merged_between(layers, joined, monkeypatch):
    model, weights = small_model(merge_layers=layers), []

    def norm(x, weight, eps):
        return F.rms_norm(x, weight.shape, weight, eps)

    def add_and_norm(x, update, weight, eps):
        weights.append(weight)
        return x + update, norm(x + update, weight, eps)

    expected = model(clip(), output_hidden_states=True)
    monkeypatch.setattr(module, "can_fuse_rms_norm", lambda *_: not torch.is_grad_enabled())
    monkeypatch.setattr(module, "fused_rms_norm", norm)
    monkeypatch.setattr(module, "fused_add_rms_norm", add_and_norm)
    with torch.no_grad():
        found = model(clip(), output_hidden_states=True)
    assert [id(weight) for weight in weights] == [id(model.videomamba.layers[index].norm.weight) for index in joined]
    torch.testing.assert_close(found.logits, expected.logits)
    for state, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(state, other)


def test_gradients_with_checkpointed_layers_are_those_without():
    models = [small_model().train(), small_model().train()]
    # Renamed in transformers 5.23.
    enable = "activation_checkpointing_enable"
    getattr(models[1], enable if hasattr(models[1], enable) else "gradient_checkpointing_enable")()
    for model in models:
        model(clip(), labels=torch.tensor([0, 1])).loss.backward()
    for (name, plain), (_, checkpointed) in zip(*(m.named_parameters() for m in models), strict=True):
        assert plain.grad.abs().sum() > 0, name
        torch.testing.assert_close(plain.grad, checkpointed.grad, msg=name)


def test_weights_of_a_model_that_merges_nothing_are_taken_and_the_option_is_saved(tmp_path):
    plain = small_model(merge_layers=None)
    plain.save_pretrained(tmp_path / "plain")
    merging = VideoMambaForVideoClassification.from_pretrained(tmp_path / "plain", merge_layers=[1])
    assert merging.state_dict().keys() == plain.state_dict().keys()
    merging.save_pretrained(tmp_path / "merging")
    again = VideoMambaForVideoClassification.from_pretrained(tmp_path / "merging").eval()
    assert again.config.merge_layers == [1]
    with torch.no_grad():
        assert torch.equal(again(clip()).logits, small_model()(clip()).logits)
        assert not torch.equal(again(clip()).logits, plain(clip()).logits)
    assert count_parameters_and_macs(again.config)["parameters"] == sum(p.numel() for p in again.parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"merge_layers": [3]}, r"layers from 0 to 2 in ascending order, each once, got \[3\]"),
        ({"merge_layers": [-1]}, r"layers from 0 to 2 in ascending order, each once, got \[-1\]"),
        ({"merge_layers": [2, 1]}, r"in ascending order, each once, got \[2, 1\]"),
        ({"merge_layers": [1, 1]}, r"in ascending order, each once, got \[1, 1\]"),
        ({"merge_layers": [0, 1, 2]}, "has 4 steps in time, but .* takes a multiple of 8 steps, or of 16 frames"),
        ({"num_frames": 6}, "`num_frames`=6 has 3 steps in time, but .* takes a multiple of 2 steps, or of 4 frames"),
        ({"num_frames": 1, "tubelet_size": 1}, "`num_frames`=1 has 1 step in time"),
        ({"merge_layers": 1}, "merge_layers"),
    ],
)
def test_layers_that_cannot_merge(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        small_config(**fields)


def test_images_have_no_steps_to_merge():
    config = small_config(num_frames=1, tubelet_size=1, merge_layers=None)
    config.merge_layers = [1]
    with pytest.raises(StrictDataclassError, match="has 1 step in time"):
        VideoMambaForImageClassification(config)


def test_clips_of_other_lengths_halve_or_are_refused():
    model = small_model(position_embedding_type="spatial", class_token_position="none")
    assert model.videomamba(clip(frames=12), interpolate_pos_encoding=True).last_hidden_state.shape[1] == 3 * 4
    with pytest.raises(ValueError, match=r"The clip has 5 steps in time, but `merge_layers`=\[1\] halves them"):
        model(clip(frames=10), interpolate_pos_encoding=True)
    with pytest.raises(StrictDataclassError, match="`num_frames`=10 has 5 steps"):
        model.resize_position_embeddings(num_frames=10)
    assert model.config.num_frames == 8


def test_what_goes_by_parts_in_time_is_refused():
    fields = {"backward_scan": "spatial", "class_token_position": "none", "position_embedding_type": "spatial"}
    model = small_model(**fields)
    with pytest.raises(ValueError, match=r"no cache: `merge_layers` is \[1\]: a step waits"):
        model(clip(), use_cache=True)
    with pytest.raises(StrictDataclassError, match=r"`pooling_window` is 2, but .*`merge_layers` is \[1\]"):
        small_config(pooling_window=2, **fields)
    assert model.videomamba(clip()).step_pooler_output is None
    with pytest.raises(ValueError, match=r"merges no steps, but this model has `merge_layers`=\[1\]"):
        ContextParallel(model)


@pytest.mark.gpu
@pytest.mark.parametrize(("backward_scan", "position"), EVERY_SCAN)
def test_on_a_gpu_fused_or_with_gradients(backward_scan, position):
    model = small_model(backward_scan=backward_scan, class_token_position=position, merge_layers=[1, 2])
    with torch.no_grad():
        expected = model(clip()).logits
        torch.testing.assert_close(model.cuda()(clip().cuda()).logits.cpu(), expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(model(clip().cuda()).logits.detach().cpu(), expected, atol=1e-3, rtol=1e-3)
