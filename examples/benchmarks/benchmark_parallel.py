"""
One long clip over several GPUs by `context_parallel()`: time and memory against one GPU, in one run.

    python examples/benchmarks/benchmark_parallel.py --output results       # 1, 2, 4 and 8 GPUs, as many as there are
    torchrun --nproc_per_node 4 examples/benchmarks/benchmark_parallel.py   # the same, in processes that stand already
    python examples/benchmarks/benchmark_parallel.py --device cpu --hidden_size 32 --num_hidden_layers 2 \
        --image_size 32 --frames 16 --processes 1 2                         # shows that it runs

VideoMamba-S with random weights, clips of one at a time. One GPU runs the model alone; each of several holds the
frames of its own part alone. Inference is in bfloat16; a training step is forward and backward with float32 weights,
bfloat16 autocast and gradient checkpointing, of several GPUs under `DistributedDataParallel`. Before, of the shortest
clips, logits and gradients of all weights in float32 are compared with those of one GPU: the distance over the length.

Writes `parallel.csv` and `parallel.png` into the output folder. Times are between device events, of the slowest
process; memory is PyTorch's peak allocation, weights and input included, of the process that has most. `speedup` and
`memory` are ratios to one GPU. Ends with exit code 1 if a float32 difference is above 1e-5.
"""

import argparse
import csv
import gc
import itertools
import os
import socket
import statistics
import sys
import time
from pathlib import Path


LABELS, TOLERANCE = 400, 1e-5
COLUMNS = ["task", "precision", "frames", "processes", "median_ms", "min_ms", "max_ms", "peak_gib"]
COLUMNS += ["speedup", "memory", "logits_error", "gradient_error"]


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder of the table and the plot")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--frames", type=int, nargs="+", default=[1024, 2048, 4096], help="lengths of the clips")
    parser.add_argument("--processes", type=int, nargs="+", help="how many GPUs share a clip; 1, 2, 4, 8 by default")
    parser.add_argument("--tasks", nargs="+", default=["inference", "training"], choices=["inference", "training"])
    parser.add_argument("--hidden_size", type=int, default=384)
    parser.add_argument("--num_hidden_layers", type=int, default=24)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--backward_scan", default="spatiotemporal", choices=["spatiotemporal", "spatial"])
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7, help="steps of inference; of training about half")
    return parser


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    make_parser().parse_args()  # before the imports below, which take seconds

import torch
import torch.distributed as dist
import transformers
from torch.nn.parallel import DistributedDataParallel

from modeling_videomamba import VideoMambaConfig, VideoMambaForVideoClassification


def parsed_arguments():
    parser = make_parser()
    arguments = parser.parse_args()
    there = torch.cuda.device_count() if arguments.device == "cuda" else 8
    if there == 0:
        parser.error("no CUDA GPU is here: see --device")
    there = int(os.environ.get("WORLD_SIZE", there))
    arguments.processes = sorted({1, *(arguments.processes or [n for n in (2, 4, 8) if n <= there])})
    if arguments.processes[-1] > there:
        parser.error(f"--processes {arguments.processes[-1]}, but there are {there}")
    return arguments


class Benchmark:
    """What one process of all does: it takes part in the cases of as many processes as its rank is below."""

    def __init__(self, arguments):
        self.arguments, self.rank = arguments, dist.get_rank()
        self.device = torch.device(arguments.device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", self.rank)))
            torch.cuda.set_device(self.device)
        self.groups = {count: dist.new_group(range(count)) for count in arguments.processes}
        self.rows = []

    def run(self):
        """The rows of the table."""
        frames = self.arguments.frames
        self.check_agreement(min(frames))
        for task in self.arguments.tasks:
            for length in frames:
                self.model = self.new_model(task, length)
                for count in self.arguments.processes:
                    self.measure(task, length, count)
        return self.rows

    def new_model(self, task, frames):
        """The same in every process."""
        self.model = None
        self.collect_garbage()
        options = self.arguments
        config = VideoMambaConfig(
            hidden_size=options.hidden_size,
            num_hidden_layers=options.num_hidden_layers,
            num_frames=frames,
            image_size=options.image_size,
            num_labels=LABELS,
            backward_scan=options.backward_scan,
            class_token_position="middle" if options.backward_scan == "spatiotemporal" else "none",
        )
        torch.manual_seed(0)
        with self.device:
            model = VideoMambaForVideoClassification(config)
        model.to(torch.bfloat16 if task == "inference" else torch.float32).train(task == "training")
        if task != "inference":
            model.gradient_checkpointing_enable()
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)
        return model

    def step_of(self, task, frames, count):
        """A function that runs the model once over a clip, and returns its logits."""
        self.collect_garbage()  # what `DistributedDataParallel` left on the weights
        split = self.model if count == 1 else self.model.context_parallel(self.groups[count])
        part = slice(0, frames) if count == 1 else split.part(frames)
        options = {} if count == 1 else {"num_frames": frames}
        clip = self.clip(task, frames)[:, part].clone()
        if task == "inference":

            @torch.inference_mode()
            def step():
                return split(clip, **options).logits

            return step
        if count > 1:
            split = DistributedDataParallel(split, process_group=self.groups[count], gradient_as_bucket_view=True)
        labels = torch.zeros(1, dtype=torch.long, device=self.device)

        def step():
            self.model.zero_grad(set_to_none=True)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=task == "training"):
                outputs = split(clip, labels=labels, **options)
            outputs.loss.backward()
            return outputs.logits.detach()

        return step

    def clip(self, task, frames):
        """The same in every process; on a GPU made there."""
        size = self.arguments.image_size
        generator = torch.Generator(self.device).manual_seed(frames)
        dtype = torch.float32 if task == "agreement" else torch.bfloat16
        return torch.randn(1, frames, 3, size, size, device=self.device, dtype=dtype, generator=generator)

    def measure(self, task, frames, count):
        found = None
        if self.rank < count:
            step = self.step_of(task, frames, count)
            for _ in range(self.arguments.warmup):
                step()
            self.collect_garbage()
            repeats = self.arguments.repeats if task == "inference" else -(-self.arguments.repeats // 2)
            times = self.times(step, repeats)
            peak = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else float("nan")
            found = [1000 * f(times) for f in (statistics.median, min, max)] + [peak]
            del step
        self.model.zero_grad(set_to_none=True)
        self.add(task, "bfloat16", frames, count, found)

    def times(self, step, repeats):
        """Seconds of each step."""
        if self.device.type == "cpu":
            clock = [time.perf_counter()]
            for _ in range(repeats):
                step()
                clock.append(time.perf_counter())
            return [after - before for before, after in itertools.pairwise(clock)]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        events[0].record()
        for event in events[1:]:
            step()
            event.record()
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in itertools.pairwise(events)]

    def check_agreement(self, frames):
        """A row for each number of processes: how far float32 is from one process."""
        self.model, expected = self.new_model("agreement", frames), None
        for name, parameter in self.model.named_parameters():
            if name.endswith("A_log"):
                parameter.data -= 3  # much of a state is left at the border, and is read there
            elif name.endswith("dt_proj_bias"):
                parameter.data += 2
            elif name.endswith("x_proj_weight"):
                parameter.data *= 4
            elif "position_embeddings" in name or "cls_token" in name:
                parameter.data *= 50
        for count in self.arguments.processes:
            errors = None
            if self.rank < count:
                logits = self.step_of("agreement", frames, count)()
                gradients = torch.cat([p.grad.flatten() for p in self.model.parameters()])
                if count == 1:
                    expected = logits, gradients
                elif self.rank == 0:
                    found = zip((logits, gradients), expected, strict=True)
                    errors = [((f - e).norm() / e.norm()).item() for f, e in found]
            if count > 1:
                self.add("agreement", "float32", frames, count, None, errors)

    def add(self, task, precision, frames, count, found, errors=None):
        """A row of what the processes found, the worst of them."""
        everywhere = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, found)
        if self.rank != 0:
            return
        numbers = [max(values) for values in zip(*(f for f in everywhere if f is not None), strict=True)]
        row = dict.fromkeys(COLUMNS, "") | {"task": task, "precision": precision, "frames": frames, "processes": count}
        row |= dict(zip(COLUMNS[4:8], (f"{n:.4g}" for n in numbers), strict=False))
        alone = [r for r in self.rows if (r["task"], r["frames"], r["processes"]) == (task, frames, 1)]
        if alone:
            row["speedup"] = f"{float(alone[0]['median_ms']) / numbers[0]:.4g}"
            row["memory"] = f"{numbers[3] / float(alone[0]['peak_gib']):.4g}"
        if errors is not None:
            row |= dict(zip(COLUMNS[10:], (f"{e:.2g}" for e in errors), strict=True))
        self.rows.append(row)
        print("".join(f"{row[c]!s:>15}" for c in COLUMNS), flush=True)
        with open(self.arguments.output / "parallel.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)

    def collect_garbage(self):
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def curves_of(rows):
    """What `plot` takes, of the rows of the table."""
    speedups = {row["task"]: {} for row in rows if row["median_ms"]}
    for row in sorted(rows, key=lambda row: row["frames"]):
        if row["task"] in speedups:
            curve = speedups[row["task"]].setdefault(f"{row['frames']:,} frames", [])
            curve.append((row["processes"], float(row["speedup"] or 1)))
    return speedups


def plot(speedups, path, title):
    """
    How many times as fast as one process several are, a panel for each task, beside the ideal.

    Args:
        speedups (`dict`): of each task the curves by their labels, each a list of (processes, times as fast as one).
        path (`Path`), title (`str`): of the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(speedups), figsize=(4.6 * len(speedups), 4), squeeze=False)
    counts = sorted({count for curves in speedups.values() for points in curves.values() for count, _ in points})
    for axis, (task, curves) in zip(axes[0], speedups.items(), strict=True):
        axis.plot(counts, counts, "--", color="0.6", label="ideal")
        for label, points in curves.items():
            axis.plot(*zip(*points, strict=True), "o-", label=label)
        axis.set(xlabel="GPUs", ylabel="times as fast as one", title=task, xticks=counts)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def work(rank, arguments, port):
    """One process; 1 if results differ too much."""
    if port is not None:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(arguments.processes[-1])}
    gpu = arguments.device == "cuda"
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    elif port is not None:
        torch.set_num_threads(1)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    if dist.get_rank() == 0:
        print("".join(f"{column:>15}" for column in COLUMNS), flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = Benchmark(arguments).run()
    dist.barrier()
    dist.destroy_process_group()
    if not rows:
        return
    name = torch.cuda.get_device_name() if gpu else "CPU"
    title = f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, {time.strftime('%Y-%m-%d')}"
    plot(curves_of(rows), arguments.output / "parallel.png", title)
    print(f"\n{title}\nWrote {arguments.output / 'parallel.csv'} and parallel.png")
    errors = [float(r[column]) for r in rows for column in ("logits_error", "gradient_error") if r[column]]
    if any(not error <= TOLERANCE for error in errors):
        sys.exit(f"float32 differs from one process by {max(errors):.2g}, more than {TOLERANCE:g}")


def main():
    arguments = parsed_arguments()
    if "RANK" in os.environ:
        work(None, arguments, None)
        return
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    torch.multiprocessing.spawn(work, (arguments, port), arguments.processes[-1])


if __name__ == "__main__":
    main()
