"""Fully sharded training (FSDP2), as transformers asks for it: the gradients of one process, from two."""

import pytest
import torch

from modeling_videomamba import VideoMambaConfig, VideoMambaForVideoClassification


# Each of two processes trains on its half of a batch; process 0 writes the gradients of the whole.
TRAIN = """
import sys
import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig
from modeling_videomamba import VideoMambaForVideoClassification

folder, output = sys.argv[1:]
dist.init_process_group("gloo")
rank = dist.get_rank()
model = VideoMambaForVideoClassification.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2))
assert all(type(layer).__name__ == "FSDPVideoMambaLayer" for layer in model.videomamba.layers)
pixel_values, labels = torch.load(f"{folder}/batch.pt", weights_only=True)
half = slice(2 * rank, 2 * rank + 2)
model(pixel_values[half], labels=labels[half]).loss.backward()
gradients = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
if rank == 0:
    torch.save(gradients, output)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_sharded_gradients_are_those_of_one_process(python, tmp_path):
    pytest.importorskip("transformers.distributed", reason="this transformers does not shard models")
    torch.manual_seed(0)
    config = VideoMambaConfig(
        hidden_size=32, num_hidden_layers=2, image_size=32, num_frames=4, num_labels=3, backward_scan="temporal"
    )
    model = VideoMambaForVideoClassification(config)
    model.save_pretrained(tmp_path)
    pixel_values, labels = torch.randn(4, 4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    torch.save((pixel_values, labels), tmp_path / "batch.pt")
    model(pixel_values, labels=labels).loss.backward()

    python.run_together(2, ["-c", TRAIN, tmp_path, tmp_path / "gradients.pt"])
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=name, atol=1e-6, rtol=1e-4)
