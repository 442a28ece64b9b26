"""Delta maps and reading maps: against a model in float64, and against the matrices of a layer written out."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modeling_videomamba import (
    VideoMambaConfig,
    VideoMambaForImageClassification,
    VideoMambaForVideoClassification,
    use_scan_backend,
)
from modeling_videomamba.maps_videomamba import linear_layer
from modeling_videomamba.selective_scan_numba import IMPORT_ERROR
from modeling_videomamba.selective_scan_reference import bidirectional_selective_scan_reference
from modeling_videomamba.tokens_videomamba import backward_order, class_token_index


NUMBA = pytest.param(
    "numba", marks=pytest.mark.skipif(IMPORT_ERROR is not None, reason=f"Numba cannot be imported: {IMPORT_ERROR}")
)
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
PARAMETERS = "conv_weight conv_bias x_proj_weight dt_proj_weight dt_proj_bias A_log D".split()
EVERY_SCAN = list(itertools.product(("spatiotemporal", "spatial", "temporal"), ("first", "middle", "none")))


def small_model(layers=3, seed=0, **kwargs):
    """Random weights, none at a value that hides a mistake."""
    config = {"hidden_size": 24, "num_hidden_layers": layers, "image_size": 32, "num_frames": 6, "state_size": 5}
    torch.manual_seed(seed)
    model = VideoMambaForVideoClassification(VideoMambaConfig(**{**config, "num_labels": 4, **kwargs})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", ".D", "conv_bias", "proj.bias")):
            nn.init.normal_(parameter, 1, 0.3)
        if name.endswith(("x_proj_weight", "out_proj.weight")):
            parameter.data *= 3
    return model


def clips(batch=2, frames=6, size=32):
    return torch.randn(batch, frames, 3, size, size, generator=torch.Generator().manual_seed(1))


def rms_norm(hidden_states, norm):
    scale = (hidden_states.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    return hidden_states * scale * norm.weight.double(), scale


def step_sizes_in_float64(model, pixel_values):
    """For each layer Δ of both directions, mean over channels (B, 2, L): the whole model in float64."""
    config, model = model.config, model.videomamba
    order = backward_order(config, config.grid_size)
    hidden_states = model.embeddings(pixel_values, config.grid_size).double()
    length = hidden_states.shape[1]
    visits = torch.arange(length), torch.arange(length).flip(0) if order is None else order.visits
    maps = []
    for layer in model.layers:
        weights = {name: getattr(layer.mixer, name).double() for name in PARAMETERS}
        normed, _ = rms_norm(hidden_states, layer.norm)
        xz = normed @ layer.mixer.in_proj.weight.double().T
        x = xz[..., : config.intermediate_size]
        found = torch.empty(x.shape[0], 2, length, dtype=torch.float64)
        for direction in (0, 1):
            padded = F.pad(x[:, visits[direction]].transpose(1, 2), (config.conv_kernel - 1, 0))
            taps, bias = weights["conv_weight"][direction, :, None], weights["conv_bias"][direction]
            u = F.silu(F.conv1d(padded, taps, bias, groups=x.shape[2])).transpose(1, 2)
            time_step = (u @ weights["x_proj_weight"][direction].T)[..., : config.time_step_rank]
            delta = time_step @ weights["dt_proj_weight"][direction].T + weights["dt_proj_bias"][direction]
            found[:, direction, visits[direction]] = F.softplus(delta).mean(-1)
        maps.append(found)
        scanned = bidirectional_selective_scan_reference(xz, *weights.values(), order=order)
        hidden_states = hidden_states + scanned @ layer.mixer.out_proj.weight.double().T
    return maps


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("backend", ["torch", NUMBA, GPU])
@torch.no_grad()
def test_delta_maps_match_a_model_in_float64(backend, dtype, tolerance):
    device = "cuda" if backend == "cuda" else "cpu"
    for backward_scan, position in EVERY_SCAN:
        model = small_model(backward_scan=backward_scan, class_token_position=position).to(dtype)
        pixel_values = clips().to(dtype)
        expected = step_sizes_in_float64(model, pixel_values)
        with use_scan_backend(backend):
            found = model.to(device).delta_maps(pixel_values.to(device))
        assert len(found.maps) == 3 and all(
            m.shape == (2, 2, 3, 2, 2) and m.dtype == torch.float32 for m in found.maps
        )
        for layer, reference in enumerate(expected):
            if position == "none":
                assert found.class_token is None
            else:
                place = class_token_index(model.config, 12)
                token, reference = (
                    reference[:, :, place],
                    torch.cat([reference[:, :, :place], reference[:, :, place + 1 :]], dim=2),
                )
                assert relative_error(found.class_token[layer], token) <= tolerance
            assert relative_error(found.maps[layer].flatten(2), reference) <= tolerance


def relative_error(found, expected):
    assert found.shape == expected.shape
    return ((found.cpu().double() - expected).norm() / expected.norm()).item()


def test_delta_maps_of_chosen_layers_and_other_sizes():
    model = small_model()
    every = model.delta_maps(clips())
    some = model.delta_maps(clips(), layers=[-1, 0])
    assert len(some.maps) == len(some.class_token) == 2
    assert torch.equal(some.maps[0], every.maps[2]) and torch.equal(some.maps[1], every.maps[0])
    assert torch.equal(some.class_token[0], every.class_token[2])
    assert model.delta_maps(clips(), layers=[]).maps == ()
    larger = model.delta_maps(clips(1, 8, 48), layers=[1], interpolate_pos_encoding=True)
    assert larger.maps[0].shape == (1, 2, 4, 3, 3) and larger.class_token[0].shape == (1, 2)
    for layers in ([3], [-4], [0.0], ["1"]):
        with pytest.raises(ValueError, match="`layers` must list integers from -3 to 2"):
            model.delta_maps(clips(), layers=layers)
    with pytest.raises(ValueError, match="8 frames of 48 x 48"):
        model.delta_maps(clips(1, 8, 48))


@pytest.mark.parametrize("position", ["first", "middle", "none"])
def test_delta_maps_of_merged_steps_are_those_of_a_model_that_begins_there(position):
    """Its tokens are the means of two frames, as the tubelets of a clip of half the frames would be."""
    model = small_model(num_frames=8, class_token_position=position, merge_layers=[0])
    half = small_model(num_frames=4, class_token_position=position)
    half.load_state_dict(model.state_dict() | {k: v for k, v in half.state_dict().items() if "position" in k})
    embeddings = (each.videomamba.embeddings for each in (model, half))
    for each in embeddings:
        nn.init.constant_(each.position_embeddings, 0.1)
    frames = clips(2, 8)
    pairs = frames.unflatten(1, (2, 2, 2)).mean(2).flatten(1, 2)
    found, expected = model.delta_maps(frames), half.delta_maps(pairs)
    for layer, token in zip(found.maps, expected.maps, strict=True):
        assert layer.shape == (2, 2, 4, 2, 2)
        torch.testing.assert_close(layer, token.repeat_interleave(2, dim=2))
    if position != "none":
        torch.testing.assert_close(found.class_token, expected.class_token)


# ---- reading maps


def written_out(layer, hidden_states, visits):
    """
    A layer as one matrix, in float64: for one clip h (L, D), M (L, D, L, D) and c (L, D) with M h + c its output.

    For each direction and channel, the hidden attention of token i to token j, C_i exp(A Σ Δ) Δ_j B_j over the steps
    between their visits, is summed into a matrix of its own.
    """
    mixer = layer.mixer
    length, width = hidden_states.shape
    weights = {name: getattr(mixer, name).double() for name in PARAMETERS}
    rank, states = weights["dt_proj_weight"].shape[2], weights["A_log"].shape[2]
    normed, scale = rms_norm(hidden_states, layer.norm)
    x, z = (normed @ mixer.in_proj.weight.double().T).chunk(2, dim=1)
    inner = x.shape[1]
    into = mixer.in_proj.weight.double()[:inner] * layer.norm.weight.double()  # and each token's scale
    of_x, constant = torch.zeros(inner, length, length, dtype=torch.float64), torch.zeros_like(x)
    for direction in (0, 1):
        order = visits[direction].tolist()
        taps, bias = weights["conv_weight"][direction], weights["conv_bias"][direction]
        convolution = torch.zeros(inner, length, length, dtype=torch.float64)
        for step, tap in itertools.product(range(length), range(taps.shape[1])):
            if step - tap >= 0:
                convolution[:, order[step], order[step - tap]] = taps[:, -1 - tap]
        convolved = torch.einsum("eij,je->ie", convolution, x) + bias
        slope = torch.sigmoid(convolved)
        u = convolved * slope
        time_step, B, C = (u @ weights["x_proj_weight"][direction].T).split([rank, states, states], dim=1)
        delta = F.softplus(time_step @ weights["dt_proj_weight"][direction].T + weights["dt_proj_bias"][direction])
        A = -weights["A_log"][direction].exp()
        attention = torch.zeros(inner, length, length, dtype=torch.float64)
        for step, earlier in itertools.product(range(length), range(length)):
            if earlier <= step:
                i, j = order[step], order[earlier]
                between = delta[order[earlier + 1 : step + 1]].sum(0)
                attention[:, i, j] = ((A * between[:, None]).exp() * C[i] * B[j]).sum(1) * delta[j]
        attention += torch.diag_embed(weights["D"][direction][:, None].expand(-1, length))
        attention = attention * slope.T[:, None]
        of_x += attention @ convolution
        constant += torch.einsum("eij,e->ie", attention, bias)
    gate = F.silu(z) / 2
    out = mixer.out_proj.weight.double()
    matrix = torch.einsum("de,ie,eij,j,ef->idjf", out, gate, of_x, scale[:, 0], into)
    matrix += torch.einsum("ij,df->idjf", torch.eye(length).double(), torch.eye(width).double())
    return matrix, torch.einsum("de,ie->id", out, gate * constant)


def head_written_out(model, hidden_states, label):
    """The weight (L, D) with which the last residual stream enters a label's logit, in float64."""
    config, length = model.config, len(hidden_states)
    _, scale = rms_norm(hidden_states, model.videomamba.norm)
    weight = scale * model.videomamba.norm.weight.double() * model.classifier.weight[label].double()
    if config.class_token_position == "none":
        return weight / length
    pooled = torch.zeros_like(weight)
    place = class_token_index(config, length - 1)
    pooled[place] = weight[place]
    return pooled


@pytest.mark.parametrize(("backward_scan", "position"), EVERY_SCAN)
@torch.no_grad()
def test_reading_map_of_a_layer_is_its_matrix_written_out(backward_scan, position):
    model = small_model(layers=1, backward_scan=backward_scan, class_token_position=position)
    pixel_values, labels = clips(), torch.tensor([3, 1])
    maps = model.reading_maps(pixel_values, labels)
    assert maps.shape == (2, 3, 2, 2) and maps.dtype == torch.float32
    outputs = model(pixel_values, output_hidden_states=True)
    (layer,), order = model.videomamba.layers, backward_order(model.config, model.config.grid_size)
    for clip, label in enumerate(labels.tolist()):
        before, after = (h[clip].double() for h in outputs.hidden_states)
        tokens = torch.arange(len(before))
        visits = tokens, tokens.flip(0) if order is None else order.visits
        matrix, constant = written_out(layer, before, visits)
        # Its rows sum to what the layer gave out.
        rows = torch.einsum("idjf,jf->id", matrix, before) + constant
        torch.testing.assert_close(rows, after, atol=1e-5, rtol=1e-5)
        head = head_written_out(model, after, label)
        contributions = torch.einsum("id,idjf,jf->j", head, matrix, before)
        bias = (head * constant).sum() + model.classifier.bias[label]
        torch.testing.assert_close((contributions.sum() + bias).float(), outputs.logits[clip, label])
        if position != "none":
            place = class_token_index(model.config, len(before) - 1)
            contributions = torch.cat([contributions[:place], contributions[place + 1 :]])
        torch.testing.assert_close(maps[clip].flatten().double(), contributions, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("backward_scan", "position"), EVERY_SCAN)
@torch.no_grad()
def test_reading_map_of_all_layers_is_the_product_of_their_matrices(backward_scan, position):
    model = small_model(layers=2, backward_scan=backward_scan, class_token_position=position)
    pixel_values = clips(1)
    outputs = model(pixel_values, output_hidden_states=True)
    label = outputs.logits.argmax().item()
    order = backward_order(model.config, model.config.grid_size)
    states = [h[0].double() for h in outputs.hidden_states]
    tokens = torch.arange(len(states[0]))
    weight = head_written_out(model, states[-1], label)
    for layer, hidden_states in zip(reversed(model.videomamba.layers), states[-2::-1], strict=True):
        matrix, _ = written_out(layer, hidden_states, (tokens, tokens.flip(0) if order is None else order.visits))
        weight = torch.einsum("id,idjf->jf", weight, matrix)
    contributions = (weight * states[0]).sum(1)
    if position != "none":
        place = class_token_index(model.config, len(tokens) - 1)
        contributions = torch.cat([contributions[:place], contributions[place + 1 :]])
    found = model.reading_maps(pixel_values)
    torch.testing.assert_close(found.flatten().double(), contributions, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("backward_scan", "position"), EVERY_SCAN)
@torch.no_grad()
def test_reading_map_where_steps_are_merged_is_the_product_of_all_matrices(backward_scan, position):
    """Of two steps of 2 × 2 tubelets, which the second layer sees as one: half of a token's share is each one's."""
    options = {"backward_scan": backward_scan, "class_token_position": position, "merge_layers": [1]}
    model = small_model(layers=2, num_frames=4, **options)
    pixel_values = clips(1, 4)
    outputs = model(pixel_values, output_hidden_states=True)
    label = outputs.logits.argmax().item()
    states = [h[0].double() for h in outputs.hidden_states]
    class_token = position != "none"
    before, after = (class_token_index(model.config, count) if class_token else count for count in (8, 4))
    mean = torch.zeros(4 + class_token, 8 + class_token, dtype=torch.float64)
    for place in range(4):
        row, *columns = (at + (at >= token) for at, token in ((place, after), (place, before), (place + 4, before)))
        mean[row, columns] = 0.5
    if class_token:
        mean[after, before] = 1

    def matrix(layer, hidden_states, steps):
        order = backward_order(model.config, (steps, 2, 2))
        tokens = torch.arange(len(hidden_states))
        visits = tokens, tokens.flip(0) if order is None else order.visits
        return written_out(layer, hidden_states, visits)[0]

    first, second = model.videomamba.layers
    weight = head_written_out(model, states[2], label)
    weight = torch.einsum("id,idjf->jf", weight, matrix(second, mean @ states[1], 1))
    weight = torch.einsum("id,idjf->jf", mean.T @ weight, matrix(first, states[0], 2))
    contributions = (weight * states[0]).sum(1)
    if class_token:
        contributions = torch.cat([contributions[:before], contributions[before + 1 :]])
    found = model.reading_maps(pixel_values)
    assert found.shape == (1, 2, 2, 2)
    torch.testing.assert_close(found.flatten().double(), contributions, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("position", "options"),
    [("first", {}), ("none", {}), ("none", {"backward_scan": "spatial", "pooling_window": 1})],
)
def test_reading_map_sums_to_the_logit_without_biases(position, options):
    """Of a model whose biases are zero and whose class token, which no map shows, is zero too."""
    model = small_model(class_token_position=position, position_embedding_type="none", **options)
    with torch.no_grad():
        for layer in model.videomamba.layers:
            layer.mixer.conv_bias.zero_()
        model.classifier.bias.zero_()
        if position == "first":
            model.videomamba.embeddings.cls_token.zero_()
        logits = model(clips()).logits
    for label in range(4):
        maps = model.reading_maps(clips(), torch.full((2,), label))
        torch.testing.assert_close(maps.sum((1, 2, 3)), logits[:, label], atol=1e-5, rtol=1e-4)


def test_linearized_layer_gives_the_same_output():
    for backward_scan in ("spatiotemporal", "spatial"):
        model = small_model(backward_scan=backward_scan).videomamba
        hidden_states = torch.randn(2, 13, 24)
        order = backward_order(model.config, (3, 2, 2))
        for layer in model.layers:
            found = linear_layer(layer, hidden_states, order)
            torch.testing.assert_close(found, layer(hidden_states, order), atol=1e-5, rtol=1e-5)


def test_reading_maps_leave_no_gradients_and_take_other_sizes_and_types():
    model = small_model()
    model.reading_maps(clips())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.reading_maps(clips(1, 8, 48), interpolate_pos_encoding=True).shape == (1, 4, 3, 3)
    expected = model.reading_maps(clips())
    labels = model(clips()).logits.argmax(-1)
    found = model.bfloat16().reading_maps(clips().bfloat16(), labels)
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("labels", [[0, 4], [-1, 0], [0], [0.0, 1.0], [[0], [1]], [True, False]])
def test_labels_that_there_are_not(labels):
    with pytest.raises(ValueError, match="`labels` must hold an integer from 0 to 3 for each of 2 clips"):
        small_model(layers=1).reading_maps(clips(), torch.tensor(labels))


def test_maps_of_images():
    config = VideoMambaConfig(hidden_size=24, num_hidden_layers=2, image_size=48, num_frames=1, tubelet_size=1)
    model = VideoMambaForImageClassification(config)
    images = torch.randn(2, 3, 48, 48)
    assert model.delta_maps(images).maps[1].shape == (2, 2, 1, 3, 3)
    assert model.reading_maps(images).shape == (2, 1, 3, 3)


def test_reading_maps_know_no_stochastic_depth():
    model = small_model(drop_path_rate=0.9)
    expected = model.reading_maps(clips())
    torch.testing.assert_close(model.train().reading_maps(clips()), expected)
    assert model.training and model.videomamba.layers[2].training
