#!/usr/bin/env python
"""
Puts a checkpoint into MVEB, the video embedding benchmark of the package mteb, beside VideoMAE, VideoPrism and others.

    pip install 'mteb[video]'
    python examples/benchmarks/mteb_encoder.py --model you/videomamba-k400 --tasks HMDB51Classification

Without --tasks it runs `--benchmark`, by default MVEB's tasks of videos alone. Embeddings are what `AutoModel` pools:
the class token, or the mean over tokens. mteb loads its data sets from the Hub, with torchcodec.
"""

import argparse
import sys
from pathlib import Path


BENCHMARK = "MVEB(video, v1)"


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or a Hub repository")
    parser.add_argument("--tasks", nargs="+", help="names of mteb's tasks")
    parser.add_argument("--benchmark", default=BENCHMARK, help="name of the benchmark, if there are no --tasks")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--device", help="cuda or cpu (default: a GPU if there is one)")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder of mteb's results")
    return parser.parse_args()


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    parse_arguments()  # before the imports below, which take seconds

import torch
from tqdm.auto import tqdm
from transformers import AutoModel, AutoVideoProcessor

import modeling_videomamba  # noqa: F401, registers VideoMamba with the Auto classes


try:
    import mteb
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta
except ModuleNotFoundError as error:
    sys.exit(f"{error}. pip install 'mteb[video]'")


class VideoMambaEncoder(AbsEncoder):
    """
    A model for mteb's video tasks.

    Args:
        name (`str`): folder or Hub repository of a checkpoint with its video processor, which samples the frames.
        device (`str`, *optional*): a GPU if there is one.
    """

    def __init__(self, name, device=None):
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.processor = AutoVideoProcessor.from_pretrained(name)
        self.model = AutoModel.from_pretrained(name).to(self.device).eval()
        about = {"name": f"videomamba/{Path(name).name}", "modalities": ["video"], "revision": "local"}
        about["embed_dim"] = self.model.config.hidden_size
        self.mteb_model_meta = ModelMeta.create_empty(overwrites=about)

    @torch.inference_mode()
    def encode(self, inputs, *, show_progress_bar=True, **kwargs):
        """Of a loader of rows with `video`, as datasets gives it: embeddings (clips, D), float32."""
        inputs.collate_fn = lambda rows: [row["video"] for row in rows]
        found = []
        for videos in tqdm(inputs, desc="encoding", disable=not show_progress_bar):
            clips = self.processor(videos, return_tensors="pt").to(self.device)
            found.append(self.model(**clips).pooler_output.float().cpu())
        return torch.cat(found).numpy()


def main():
    args = parse_arguments()
    tasks = mteb.get_tasks(tasks=args.tasks) if args.tasks else mteb.get_benchmark(args.benchmark)
    encoder, cache = VideoMambaEncoder(args.model, args.device), mteb.ResultCache(args.output)
    for result in mteb.evaluate(encoder, tasks, encode_kwargs={"batch_size": args.batch_size}, cache=cache):
        print(f"{result.task_name}: {result.get_score():.4f}")


if __name__ == "__main__":
    main()
