"""Clips given part by part: what comes out against the whole clip, what a cache can do, what is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from transformers import Trainer, TrainingArguments

from modeling_videomamba import (
    VideoMambaCache,
    VideoMambaConfig,
    VideoMambaForVideoClassification,
    VideoMambaForVideoFrameClassification,
    count_parameters_and_macs,
    selective_scan_numba,
    use_scan_backend,
)


without_numba = pytest.mark.skipif(selective_scan_numba.IMPORT_ERROR is not None, reason="needs Numba")
backends = pytest.mark.parametrize("backend", ["torch", "sequential", pytest.param("numba", marks=without_numba)])


def streaming_config(**options):
    defaults = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "image_size": 48,
        "num_frames": 12,
        "num_labels": 3,
        "backward_scan": "spatial",
        "class_token_position": "none",
        "position_embedding_type": "spatial",
    }
    return VideoMambaConfig(**{**defaults, **options})


def streaming_model(kind=VideoMambaForVideoFrameClassification, **options):
    """Random weights with positions and logits large enough to show a mistake."""
    torch.manual_seed(0)
    model = kind(streaming_config(**options)).eval()
    for name, parameter in model.named_parameters():
        if "position_embeddings" in name or "classifier" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def clip(batch=2, frames=12, size=48, seed=0):
    return torch.randn(batch, frames, 3, size, size, generator=torch.Generator().manual_seed(seed))


def stream(model, frames, steps, cache=None):
    """What the model gives for parts of so many steps in time: the outputs of each."""
    outputs = []
    for part in frames.split([2 * count for count in steps], dim=1):
        outputs.append(model(part, cache=cache, use_cache=True))
        cache = outputs[-1].cache
    return outputs


def logits_of(outputs):
    return torch.cat([output.logits for output in outputs], dim=1)


# ---- the same as the whole clip


@backends
@pytest.mark.parametrize("steps", [[1] * 6, [3, 3], [1, 4, 1], [6]])
@pytest.mark.parametrize("window", [None, 1, 4])
def test_parts_are_as_the_whole_clip(backend, steps, window):
    model = streaming_model(pooling_window=window)
    with torch.no_grad(), use_scan_backend(backend):
        whole = model(clip())
        parts = stream(model, clip(), steps)
        tokens = [model.videomamba(clip()).last_hidden_state]
        cache = None
        for part in clip().split([2 * count for count in steps], dim=1):
            output = model.videomamba(part, cache=cache, use_cache=True)
            tokens.append(output.last_hidden_state)
            cache = output.cache
    assert whole.cache is None
    torch.testing.assert_close(logits_of(parts), whole.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.cat(tokens[1:], dim=1), tokens[0], atol=1e-5, rtol=0)
    assert parts[-1].cache.steps.tolist() == [6, 6]


@pytest.mark.parametrize("window", [None, 2, 4, 9])
def test_logits_are_those_of_the_mean_that_was_written_by_hand(window):
    model = streaming_model(pooling_window=window)
    with torch.no_grad():
        tokens = model.videomamba(clip()).last_hidden_state.view(2, 6, 9, 32)
        expected = [
            model.classifier(tokens[:, max(0, step - (window or 6)) : step].flatten(1, 2).mean(1))
            for step in range(1, 7)
        ]
        torch.testing.assert_close(model(clip()).logits, torch.stack(expected, dim=1), atol=1e-5, rtol=0)
        of_clips = streaming_model(VideoMambaForVideoClassification, pooling_window=window)
        torch.testing.assert_close(of_clips(clip()).logits, expected[-1], atol=1e-5, rtol=0)
        torch.testing.assert_close(stream(of_clips, clip(), [2, 3, 1])[-1].logits, expected[-1], atol=1e-5, rtol=0)


@backends
def test_a_future_frame_changes_nothing(backend):
    model, changed = streaming_model(), clip()
    changed[:, 8:] += 5
    with torch.no_grad(), use_scan_backend(backend):
        before, after = model(clip()).logits, model(changed).logits
    assert torch.equal(before[:, :4], after[:, :4])
    assert (before[:, 4:] - after[:, 4:]).abs().amin() > 0


def test_other_frame_sizes_and_longer_streams():
    """Forty steps, of which the model was made for six; positions in space are interpolated."""
    model, frames = streaming_model(), clip(1, 80, 64)
    with torch.no_grad():
        whole = model(frames, interpolate_pos_encoding=True).logits
        cache, parts = None, []
        for part in frames.split(16, dim=1):
            output = model(part, interpolate_pos_encoding=True, cache=cache, use_cache=True)
            cache, parts = output.cache, [*parts, output]
    torch.testing.assert_close(logits_of(parts), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_differs_by_its_rounding(dtype):
    with torch.no_grad():
        expected = streaming_model()(clip()).logits
        found = logits_of(stream(streaming_model().to(dtype), clip(), [1, 2, 3]))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0)


def test_autocast():
    model = streaming_model()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(logits_of(stream(model, clip(), [2] * 3)), model(clip()).logits, atol=0.1, rtol=0)


# ---- the cache


def test_streams_of_a_batch_begin_anew_on_their_own():
    model, first, second = streaming_model(), clip(), clip(seed=1)
    with torch.no_grad():
        cache = stream(model, first, [6])[-1].cache
        for rows in ([1], torch.tensor([False, True]), [-1]):
            mixed = copy.deepcopy(cache)
            mixed.reset(rows)
            assert mixed.steps.tolist() == [6, 0]
            found = model(second, cache=mixed).logits
            torch.testing.assert_close(found[1], model(second).logits[1], atol=1e-5, rtol=0)
            both = model(torch.cat([first, second], dim=1), interpolate_pos_encoding=True).logits
            torch.testing.assert_close(found[0], both[0, 6:], atol=1e-5, rtol=0)
        # Nor does what was wrong in a stream outlive its end.
        broken = stream(model, torch.full_like(first, torch.nan), [6])[-1].cache
        broken.reset()
        torch.testing.assert_close(model(second, cache=broken).logits, model(second).logits, atol=1e-5, rtol=0)
        untouched = copy.deepcopy(cache)
        cache.reset([])
        assert cache.steps.tolist() == untouched.steps.tolist()
        with pytest.raises(IndexError):
            cache.reset([2])


def test_copies_go_on_by_themselves(tmp_path):
    model, frames = streaming_model(pooling_window=3), clip()
    with torch.no_grad():
        expected = model(frames).logits[:, 3:]
        cache = stream(model, frames[:, :6], [1, 2])[-1].cache
        torch.save(cache.state_dict(), tmp_path / "cache.pt")
        copies = [
            copy.deepcopy(cache),
            cache.to("cpu"),
            VideoMambaCache(model.config, 2),
            VideoMambaCache(model.config, 2),
        ]
        copies[2].load_state_dict(cache.state_dict())
        copies[3].load_state_dict(torch.load(tmp_path / "cache.pt", weights_only=True))
        for each in copies:
            torch.testing.assert_close(
                logits_of(stream(model, frames[:, 6:], [2, 1], each)), expected, atol=1e-5, rtol=0
            )
        assert cache.steps.tolist() == [6, 6]  # `to` gave this cache itself; the other copies share nothing


def test_tensors_stay_where_they_are_in_inference():
    """So that a CUDA graph of a step can be replayed."""
    model = streaming_model()
    with torch.no_grad():
        cache = stream(model, clip(), [6])[-1].cache
        before = {name: tensor.data_ptr() for name, tensor in cache.state_dict().items()}
        stream(model, clip(), [1, 2, 3], cache)
        cache.reset([0])
    assert before == {name: tensor.data_ptr() for name, tensor in cache.state_dict().items()}
    assert sum(tensor.numel() for tensor in cache.state_dict().values()) == 2 * (2 * 2 * (3 + 16) * 64 + 32 + 1)


def test_caches_that_do_not_fit():
    model = streaming_model()
    cache = VideoMambaCache(model.config, 2)
    for other, message in (
        (streaming_config(hidden_size=64), r"'features' has the shape \(2, 1, 64\), but \(2, 1, 32\)"),
        (streaming_config(num_hidden_layers=3), r"'states.2.conv' has the shape \(2, 2, 3, 64\), but None"),
        (streaming_config(pooling_window=4), r"'features' has the shape \(2, 3, 32\)"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.load_state_dict(VideoMambaCache(other, 2).state_dict())
    with pytest.raises(ValueError, match="The cache is of 2 streams, but 3 parts were given"):
        model(clip(3), cache=cache)
    with pytest.raises(ValueError, match="The cache is of 3 layers, but the model has 2"):
        model(clip(), cache=VideoMambaCache(streaming_config(num_hidden_layers=3), 2))
    with pytest.raises(ValueError, match="must be a `VideoMambaCache`, got dict"):
        model(clip(), cache={})
    with pytest.raises(ValueError, match="`cache` was given with `use_cache=False`"):
        model(clip(), cache=cache, use_cache=False)
    assert cache.steps.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (clip(frames=5), "The part has 5 frames, but a stream goes on by whole tubelets of 2"),
        (clip(frames=1), "whole tubelets of 2"),
        (clip(frames=0), "less than one tubelet"),
        (clip(size=64), "64 x 64 pixels, but the model was made for 12 frames of 48 x 48|2 frames of 48 x 48"),
    ],
)
def test_parts_that_are_refused(frames, message):
    model = streaming_model()
    cache = VideoMambaCache(model.config, 2)
    with pytest.raises(ValueError, match=message):
        model(frames, cache=cache)
    assert cache.steps.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backward_scan": "spatiotemporal"}, "whose backward direction begins with the last frame"),
        ({"backward_scan": "temporal"}, "whose backward direction begins with the last frame"),
        ({"class_token_position": "first"}, "there is a class token"),
        ({"position_embedding_type": "learned"}, "differs from step to step"),
        ({"position_embedding_type": "sinusoidal"}, "differs from step to step"),
    ],
)
def test_models_that_cannot_stream(options, message):
    model = streaming_model(VideoMambaForVideoClassification, **options)
    with pytest.raises(ValueError, match=f"takes whole clips, and no cache: .*{message}"):
        model(clip(), use_cache=True)
    with pytest.raises(ValueError, match=f"gives no logits for each step: .*{message}"):
        streaming_model(**options)
    with pytest.raises(StrictDataclassError, match=f"`pooling_window` is 4, but .*{message}"):
        streaming_config(pooling_window=4, **options)
    assert model.videomamba(clip()).step_pooler_output is None


@pytest.mark.parametrize("window", [None, 2])
def test_means_of_steps_are_left_out_where_nobody_reads_them(window):
    """By the classifier of whole clips, whose logits stay the same."""
    model, outputs = streaming_model(VideoMambaForVideoClassification, pooling_window=window), []
    model.videomamba.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    logits, steps = model(clip()).logits, model.videomamba(clip()).step_pooler_output
    assert (outputs[0].step_pooler_output is None) == (window is None)
    assert steps.shape == (2, clip().shape[1] // model.config.tubelet_size, model.config.hidden_size)
    torch.testing.assert_close(model.classifier(steps[:, -1]), logits)


# ---- training


def parameter_gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_gradients(found, expected):
    for name, gradient in parameter_gradients(expected).items():
        torch.testing.assert_close(parameter_gradients(found)[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("backend", ["torch", pytest.param("numba", marks=without_numba)])
@pytest.mark.parametrize("window", [None, 3])
def test_gradients_through_parts_are_those_of_the_whole_clip(backend, window):
    models, labels = [streaming_model(pooling_window=window) for _ in range(2)], torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)
    with use_scan_backend(backend):
        models[0](clip(), labels=labels).loss.backward()
        F.cross_entropy(logits_of(stream(models[1], clip(), [1, 3, 2])).flatten(0, 1), labels.flatten()).backward()
    assert_same_gradients(models[1], models[0])


def test_detached_caches_pass_no_gradients():
    """Truncated backpropagation through time: the second part's gradients are as if its cache had been given."""
    models = [streaming_model() for _ in range(2)]
    cache = stream(models[0], clip(), [3, 3])[-1].cache
    assert cache.states[0].recurrent.requires_grad
    assert not cache.detach().states[0].recurrent.requires_grad
    models[0](clip(seed=1), cache=cache).logits.sum().backward()
    with torch.no_grad():
        cache = stream(models[1], clip(), [6])[-1].cache
    models[1](clip(seed=1), cache=cache).logits.sum().backward()
    assert_same_gradients(models[0], models[1])


def test_inference_with_a_cache_of_training_leaves_its_gradients():
    models = [streaming_model() for _ in range(2)]
    for model, looks_on in zip(models, (False, True), strict=True):
        output = model(clip(), use_cache=True)
        if looks_on:
            with torch.no_grad():
                model(clip(seed=1), cache=output.cache)
        output.logits.sum().backward()
    assert_same_gradients(models[1], models[0])


def test_gradient_checkpointing():
    models = [streaming_model().train() for _ in range(2)]
    models[1].gradient_checkpointing_enable()
    for model in models:
        model(clip(), labels=torch.tensor([0, 1])).loss.backward()
    assert_same_gradients(models[1], models[0])
    for given in ({"use_cache": True}, {"cache": VideoMambaCache(models[1].config, 2)}):
        with pytest.raises(ValueError, match="cannot be trained with gradient checkpointing"):
            models[1](clip(), **given)
    with torch.no_grad():
        assert models[1](clip(), use_cache=True).cache is not None


def test_losses_of_steps_and_of_clips():
    logits = streaming_model()(clip()).logits.detach()
    steps = torch.tensor([[0, 1, 2, 0, -100, 2]] * 2)
    loss = streaming_model()(clip(), labels=steps).loss
    torch.testing.assert_close(loss.detach(), F.cross_entropy(logits.flatten(0, 1), steps.flatten()))
    for labels in (torch.tensor([2, 0]), torch.tensor([[2], [0]])):
        loss = streaming_model()(clip(), labels=labels).loss
        torch.testing.assert_close(loss.detach(), F.cross_entropy(logits[:, -1], labels.flatten()))
    kind, numbers = {"problem_type": "multi_label_classification"}, torch.rand(2, 6, 3)
    for labels, found in ((numbers, logits), (numbers[:, 0], logits[:, -1])):
        loss = streaming_model(**kind)(clip(), labels=labels).loss
        torch.testing.assert_close(loss.detach(), F.binary_cross_entropy_with_logits(found, labels))
    # As many steps as labels: numbers of two axes are then of clips.
    three = streaming_model(num_frames=6, **kind)
    expected = F.binary_cross_entropy_with_logits(three(clip(frames=6)).logits[:, -1], numbers[:, 0])
    torch.testing.assert_close(three(clip(frames=6), labels=numbers[:, 0]).loss, expected)
    one = streaming_model(num_labels=1)
    found = one(clip()).logits.detach()[..., 0]
    for labels, of in ((numbers[..., 0], found), (numbers[:, 0, 0], found[:, -1])):
        torch.testing.assert_close(one(clip(), labels=labels).loss.detach(), F.mse_loss(of, labels))
    with pytest.raises(ValueError, match=r"`labels` is torch.int64 of shape \(2, 5\)"):
        streaming_model()(clip(), labels=steps[:, :5])
    with pytest.raises(ValueError, match="must be a tensor"):
        streaming_model()(clip(), labels=[0, 1])


@pytest.mark.slow
@pytest.mark.parametrize("of_steps", [True, False])
def test_the_stock_trainer_learns_steps_or_clips(of_steps, tmp_path):
    """Sixteen random clips by heart; the label of each step is the clip's."""
    data = []
    for index in range(16):
        label = torch.tensor(index % 3)
        data.append({"pixel_values": clip(1, seed=index)[0], "labels": label.expand(6) if of_steps else label})
    model = streaming_model().train()
    arguments = TrainingArguments(
        tmp_path, max_steps=60, per_device_train_batch_size=8, learning_rate=3e-3, report_to=[], use_cpu=True, seed=0
    )
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    prediction = trainer.predict(data)
    assert prediction.predictions.shape == (16, 6, 3)
    wanted = torch.arange(16) % 3
    assert (torch.tensor(prediction.predictions[:, -1].argmax(-1)) == wanted).all()
    trainer.save_model(tmp_path / "saved")
    loaded = VideoMambaForVideoClassification.from_pretrained(tmp_path / "saved")
    found = loaded(data[0]["pixel_values"][None]).logits[0]
    torch.testing.assert_close(found.detach(), torch.tensor(prediction.predictions[0, -1]), atol=1e-4, rtol=0)


# ---- compiled steps; sizes and counts


@pytest.mark.slow
def test_a_compiled_step_is_compiled_once():
    model, frames = streaming_model(pooling_window=2), clip()
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    step = torch.compile(model, fullgraph=True, backend=count)
    with torch.no_grad(), use_scan_backend("torch"):
        cache = VideoMambaCache(model.config, 2)
        found = torch.cat([step(part, cache=cache).logits for part in frames.split(2, dim=1)], dim=1)
        torch.testing.assert_close(found, model(frames).logits, atol=1e-5, rtol=0)
    assert len(graphs) == 1


def test_one_table_of_positions_for_all_steps():
    for options, rows in (({}, 9), ({"class_token_position": "middle", "backward_scan": "temporal"}, 10)):
        config = streaming_config(**options)
        with torch.device("meta"):
            model = VideoMambaForVideoClassification(config)
        assert model.videomamba.embeddings.position_embeddings.shape == (1, rows, 32)
        assert count_parameters_and_macs(config)["parameters"] == sum(p.numel() for p in model.parameters())


def test_positions_in_space_are_resized_and_those_in_time_are_the_same():
    model = streaming_model()
    table = model.videomamba.embeddings.position_embeddings
    before = table.detach().clone()
    model.resize_position_embeddings(num_frames=40)
    assert torch.equal(table, before) and model.config.num_frames == 40
    with torch.no_grad():
        expected = model(clip(1, 12, 80), interpolate_pos_encoding=True).logits
        model.resize_position_embeddings(num_frames=12, image_size=80)
        assert table.shape == (1, 25, 32)
        torch.testing.assert_close(model(clip(1, 12, 80)).logits, expected)
        volume = before.view(3, 3, 32).permute(2, 0, 1)[None]
        by_hand = F.interpolate(volume, (5, 5), mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
    torch.testing.assert_close(table.detach()[0], by_hand.flatten(0, 1), atol=1e-5, rtol=1e-5)
