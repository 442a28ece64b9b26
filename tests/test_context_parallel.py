"""One clip over several processes, against the model alone."""

import pytest
import torch

from modeling_videomamba import (
    VideoMambaConfig,
    VideoMambaForVideoClassification,
    VideoMambaForVideoFrameClassification,
)


# Each process takes its part of the same clips; what each found is written.
TRAIN = """
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from modeling_videomamba import VideoMambaForVideoClassification

folder = sys.argv[1]
dist.init_process_group("gloo")
for name in sys.argv[2:]:
    model = VideoMambaForVideoClassification.from_pretrained(f"{folder}/{name}").train()
    if name == "checkpointed":
        model.gradient_checkpointing_enable()
    clips, labels = torch.load(f"{folder}/{name}/batch.pt", weights_only=True)
    parallel, options = DistributedDataParallel(model.context_parallel()), {}
    if name == "alone":  # each process has its own frames alone
        options = {"num_frames": clips.shape[1]}
        clips = clips[:, parallel.module.part(clips.shape[1])]
    outputs = parallel(clips, labels=labels, **options)
    outputs.loss.backward()
    found = {parameter_name: parameter.grad for parameter_name, parameter in model.named_parameters()}
    torch.save({"logits": outputs.logits.detach(), **found}, f"{folder}/{name}/found-{dist.get_rank()}.pt")
dist.destroy_process_group()
"""

# The class token in the first or a later part, or none; parts of equal and of other lengths; both orders.
FRAME_CAUSAL = {"backward_scan": "spatial", "class_token_position": "none", "position_embedding_type": "spatial"}
CASES = {
    "middle": {"class_token_position": "middle"},
    "first": {"class_token_position": "first", "num_frames": 10},
    "checkpointed": {"class_token_position": "none", "position_embedding_type": "sinusoidal", "num_frames": 14},
    "torch": {"class_token_position": "middle", "num_frames": 10, "scan_backend": "torch"},
    "alone": {**FRAME_CAUSAL, "num_frames": 10},
    "window": {**FRAME_CAUSAL, "num_frames": 14, "pooling_window": 5, "scan_backend": "torch"},
}


def tiny_model(**fields):
    config = VideoMambaConfig(
        **{"hidden_size": 32, "num_hidden_layers": 2, "image_size": 32, "num_frames": 4, **fields}
    )
    return VideoMambaForVideoClassification(config).eval()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_parts_give_the_logits_and_gradients_of_the_whole(python, tmp_path, processes):
    expected = {}
    for seed, (name, fields) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        model = tiny_model(**{"num_frames": 8, "num_labels": 3, "drop_path_rate": 0.0, **fields}).train()
        # Steps so long that much of a state is left at the border, and positions that differ.
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("A_log"):
                parameter.data -= 3
            elif "position_embeddings" in parameter_name or "cls_token" in parameter_name:
                parameter.data *= 50
        model.save_pretrained(tmp_path / name)
        clips, labels = torch.randn(2, model.config.num_frames, 3, 32, 32), torch.tensor([0, 2])
        torch.save((clips, labels), tmp_path / name / "batch.pt")
        outputs = model(clips, labels=labels)
        outputs.loss.backward()
        expected[name] = {"logits": outputs.logits.detach(), **{n: p.grad for n, p in model.named_parameters()}}

    python.run_together(processes, ["-c", TRAIN, tmp_path, *CASES], tmp_path)
    for name, tensors in expected.items():
        for rank in range(processes):
            found = torch.load(tmp_path / name / f"found-{rank}.pt", weights_only=True)
            assert found.keys() == tensors.keys()
            errors = {n: ((found[n] - t).norm() / t.norm()).item() for n, t in tensors.items()}
            assert all(error < 1e-5 for error in errors.values()), (name, rank, errors)


@pytest.fixture
def alone():
    """A process group of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_orders_whose_parts_do_not_follow_each_other_are_refused(alone):
    for order in ("temporal", "spatial"):
        with pytest.raises(ValueError, match=f"parts in time follow .* model has '{order}' and 'first'"):
            tiny_model(backward_scan=order).context_parallel()


def test_frames_of_another_part_are_refused(alone):
    split = tiny_model(num_frames=8).context_parallel()
    split.processes = 3
    assert split.part(8) == slice(0, 2)
    with pytest.raises(ValueError, match=r"`num_frames=8`, process 0 of 3 takes the frames 0 to 1 alone"):
        split(torch.zeros(1, 8, 3, 32, 32), num_frames=8)


def test_logits_of_steps_are_refused(alone):
    model = VideoMambaForVideoFrameClassification(tiny_model(**FRAME_CAUSAL).config)
    with pytest.raises(ValueError, match="No logits of steps"):
        model.context_parallel()


def test_clips_with_fewer_steps_than_processes_are_refused(alone):
    split = tiny_model().context_parallel()
    split.processes = 3
    with pytest.raises(ValueError, match="Clips of 2 steps in time, each of 4 tubelets, .* over 3 processes"):
        split(torch.zeros(1, 4, 3, 32, 32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_weights_and_autocast(alone, dtype):
    torch.manual_seed(0)
    model = tiny_model()
    clips = torch.randn(2, 4, 3, 32, 32)
    expected = model(clips).logits
    with torch.autocast("cpu", dtype):
        found = [model.context_parallel()(clips).logits]
    model.to(dtype)
    found += [model.context_parallel()(clips.to(dtype)).logits]
    assert found[1].dtype == dtype
    for logits in found:
        assert (logits - expected).norm() < 2e-2 * expected.norm()
