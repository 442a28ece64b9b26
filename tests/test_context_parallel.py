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

backend, folder = sys.argv[1:3]
dist.init_process_group(backend)
device = torch.device("cuda", dist.get_rank()) if backend == "nccl" else "cpu"
if backend == "nccl":
    torch.cuda.set_device(device)
for name in sys.argv[3:]:
    model = VideoMambaForVideoClassification.from_pretrained(f"{folder}/{name}").to(device).train()
    if name == "checkpointed":
        model.gradient_checkpointing_enable()
    clips, labels = torch.load(f"{folder}/{name}/batch.pt", weights_only=True)
    parallel, options = DistributedDataParallel(model.context_parallel()), {}
    if name == "alone":  # each process has its own frames alone
        options = {"num_frames": clips.shape[1]}
        clips = clips[:, parallel.module.part(clips.shape[1])]
    outputs = parallel(clips, labels=labels.to(device), **options)
    outputs.loss.backward()
    found = {parameter_name: parameter.grad.cpu().clone() for parameter_name, parameter in model.named_parameters()}
    found["logits"] = outputs.logits.detach().cpu()
    with torch.inference_mode():
        found["inferred"] = model.eval().context_parallel()(clips, **options).logits.cpu()
        found["in bfloat16"] = model.bfloat16().context_parallel()(clips, **options).logits.float().cpu()
    torch.save(found, f"{folder}/{name}/found-{dist.get_rank()}.pt")
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


def assert_parts_give_what_the_whole_gives(python, folder, cases, processes, backend="gloo"):
    device = "cuda" if backend == "nccl" else "cpu"
    expected = {}
    for seed, (name, fields) in enumerate(cases.items()):
        torch.manual_seed(seed)
        model = tiny_model(**{"num_frames": 8, "num_labels": 3, "drop_path_rate": 0.0, **fields}).train()
        # Steps so long that much of a state is left at the border, where it is read; and positions that differ.
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("A_log"):
                parameter.data -= 3
            elif parameter_name.endswith("x_proj_weight"):
                parameter.data *= 4
            elif "position_embeddings" in parameter_name or "cls_token" in parameter_name:
                parameter.data *= 50
        model.save_pretrained(folder / name)
        size = model.config.image_size
        clips, labels = torch.randn(2, model.config.num_frames, 3, size, size), torch.tensor([0, 2])
        torch.save((clips, labels), folder / name / "batch.pt")
        outputs = model.to(device)(clips.to(device), labels=labels.to(device))
        outputs.loss.backward()
        found = {n: p.grad.cpu() for n, p in model.named_parameters()}
        expected[name] = found | {n: outputs.logits.detach().cpu() for n in ("logits", "inferred", "in bfloat16")}

    python.run_together(processes, ["-c", TRAIN, backend, folder, *cases], folder)
    for name, tensors in expected.items():
        for rank in range(processes):
            found = torch.load(folder / name / f"found-{rank}.pt", weights_only=True)
            assert found.keys() == tensors.keys()
            errors = {n: ((found[n] - t).norm() / t.norm()).item() for n, t in tensors.items()}
            too_large = {n: e for n, e in errors.items() if not e < (3e-2 if n == "in bfloat16" else 1e-5)}
            assert not too_large, (name, rank, too_large)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_parts_give_the_logits_and_gradients_of_the_whole(python, tmp_path, processes):
    assert_parts_give_what_the_whole_gives(python, tmp_path, CASES, processes)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize("processes", [2, 4])
def test_several_gpus(python, tmp_path, processes):
    if torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} CUDA GPUs, and there are {torch.cuda.device_count()}")
    # So long that chunks of a part are scanned side by side too.
    longer = {"num_frames": 260, "image_size": 64, "hidden_size": 64}
    cases = CASES | {"long": {**longer, "class_token_position": "middle"}, "causal": {**FRAME_CAUSAL, **longer}}
    del cases["torch"], cases["window"]  # by the backend torch
    assert_parts_give_what_the_whole_gives(python, tmp_path, cases, processes, "nccl")


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


@pytest.mark.slow
def test_a_compiled_part(alone):
    torch._dynamo.reset()
    torch.manual_seed(0)
    split, clips = tiny_model().context_parallel(), torch.randn(1, 4, 3, 32, 32)
    compiled, gradients = torch.compile(split, backend="aot_eager"), []
    for module in (split, compiled):
        module.zero_grad()
        module(clips).logits.sum().backward()
        gradients.append([p.grad for p in split.parameters()])
    torch.testing.assert_close(*gradients)


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
