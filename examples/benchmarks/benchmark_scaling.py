#!/usr/bin/env python
"""
What several GPUs bring: training, one long clip over all of them, and files to scores, in one table and one plot.

    python examples/benchmarks/benchmark_scaling.py clips/ --output results      # on 1, 2, 4 and 8 GPUs, as there are
    python examples/benchmarks/benchmark_scaling.py clips/ --tiny --processes 1 2    # on a CPU: shows that it runs

VideoMamba-S with random weights, 16 frames. Each figure is of a command of this repository, run as a user runs it:

- `training`: both full scripts with `DistributedDataParallel` and FSDP2, bfloat16, `--batch_size` clips a GPU, of 48
  clips whose frames are soon cached: the median of the speeds that they log, without the first two;
- `inference` and `training` of `one clip`: `benchmark_parallel.py`, clips of 2,048 and 4,096 frames (its own table and
  plot lie beside);
- `files`: `classify_clips.py`, bfloat16, with as many workers a GPU as for one; `decode` is what all workers of that
  row decode with nothing behind them.

The clips of the folder are listed again and again. Writes `scaling.csv` and `scaling.png`; `efficiency` is the speed
over that of one GPU times their number.
"""

import argparse
import csv
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path


HERE = Path(__file__).resolve().parent
PARTS = ["training", "context", "files"]
COLUMNS = ["task", "how", "processes", "clips_per_s", "efficiency", "decode_per_s"]
WRAP = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": "VideoMambaLayer"}
FSDP = WRAP | {"reshard_after_forward": "true", "cpu_ram_efficient_loading": "false"}
CONFIG = '{"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": '
CONFIG += '["VideoMambaLayer"], "state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": false}'


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of clips, .mp4")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder of the table and the plot")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--processes", type=int, nargs="+", help="numbers of GPUs; by default 1, 2, 4, 8 as there are")
    parser.add_argument("--sharding", nargs="*", choices=["DDP", "FSDP2"], default=["DDP", "FSDP2"])
    parser.add_argument("--num_workers", type=int, help="for each GPU; by default its share of the cores, but one")
    parser.add_argument("--batch_size", type=int, default=16, help="clips a GPU and step of training")
    parser.add_argument("--max_steps", type=int, default=60, help="of training; the speed is logged ten times")
    parser.add_argument("--files", type=int, default=6000, help="files to score on each GPU")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on a CPU, with processes for GPUs")
    parser.add_argument("--timeout", type=float, default=600, help="seconds that one command may take")
    return parser.parse_args()


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    parse_arguments()  # before the imports below, which take seconds

import torch
import transformers

from benchmark import LABELS
from benchmark_files import decode_alone
from benchmark_parallel import plot
from modeling_videomamba import VideoMambaConfig, VideoMambaForVideoClassification, VideoMambaVideoProcessor


def first_devices(count, environment):
    """`CUDA_VISIBLE_DEVICES` for the first `count` GPUs of those that `environment` allows."""
    devices = environment.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count))))
    return ",".join(devices.split(",")[:count])


class Scaling:
    """The table, and what the commands are given."""

    def __init__(self, arguments):
        self.arguments, self.output, self.rows = arguments, arguments.output.resolve(), []
        self.output.mkdir(parents=True, exist_ok=True)
        self.clips = sorted(path.resolve() for path in arguments.folder.rglob("*.mp4"))
        self.size = {"hidden_size": 32, "num_hidden_layers": 2, "image_size": 32} if arguments.tiny else {}
        sizes = self.size or {"hidden_size": 384, "num_hidden_layers": 24, "image_size": 224}
        edge = sizes["image_size"]
        self.processor = VideoMambaVideoProcessor(
            num_frames=16, frame_stride=2, size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge}
        )
        model = VideoMambaForVideoClassification(VideoMambaConfig(**sizes, num_frames=16, num_labels=LABELS))
        for part in (model, self.processor):
            part.save_pretrained(self.output / "model")

    def run(self):
        for part in self.arguments.parts:
            for count in self.arguments.processes:
                getattr(self, part)(count)

    def add(self, task, how, count, speed, decode=None):
        row = {"task": task, "how": how, "processes": count, "clips_per_s": f"{speed:.4g}"}
        alone = [r for r in self.rows if (r["task"], r["processes"]) == (task, 1) and how.startswith(r["how"])]
        row["efficiency"] = f"{speed / count / float(alone[0]['clips_per_s']):.3g}" if alone else "1"
        row["decode_per_s"] = f"{decode:.4g}" if decode else ""
        self.rows.append(row)
        print(*(f"{row[column]!s:>{width}}" for column, width in zip(COLUMNS, (26, 24, 10, 12, 12, 13), strict=True)))
        sys.stdout.flush()
        with open(self.output / "scaling.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)

    def command(self, name, count, *words, launcher=()):
        """What a command prints that sees `count` GPUs; None if it fails, and then its last lines are printed."""
        command = [sys.executable, *map(str, [*launcher, *words])]
        # One process that saw more would let the Trainer use them all, in threads.
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": first_devices(count, os.environ)}
        environment |= {"OMP_NUM_THREADS": "1"} if self.arguments.tiny else {}
        log = self.output / "log.txt"
        with open(log, "w", encoding="utf-8") as file:
            try:
                status = subprocess.run(
                    command, stdout=file, stderr=file, env=environment, timeout=self.arguments.timeout
                ).returncode
            except subprocess.TimeoutExpired:
                status = f"none after {self.arguments.timeout:g} s"
        text = log.read_text(encoding="utf-8")
        if status != 0:
            print(f"{name}: status {status}", *text.splitlines()[-12:], sep="\n    ", flush=True)
            return None
        return text

    def listed(self, count, different=None):
        clips = self.clips[:different]
        return (clips * (count // len(clips) + 1))[:count]

    # -----------------------------------------------------------------------------------------------------------------

    def training(self, count):
        arguments = self.arguments
        clips = self.listed(arguments.max_steps * arguments.batch_size * count, 48)
        with open(self.output / "train.csv", "w", newline="", encoding="utf-8") as file:
            rows = [(path, number % 2) for number, path in enumerate(clips)]
            csv.writer(file).writerows([("video", "label"), *rows])
        options = {"train_list": self.output / "train.csv", "video_root": "/", "frame_cache": self.output / "frames"}
        options |= self.size | {"max_steps": arguments.max_steps, "logging_steps": max(1, arguments.max_steps // 10)}
        options |= {"per_device_train_batch_size": arguments.batch_size, "report_to": "none"}
        options |= {"dataloader_num_workers": arguments.num_workers, "save_steps": 10**6}
        options |= {"use_cpu": True} if arguments.tiny else {"bf16": True}
        for script, name in (("_no_trainer", "plain loop"), ("", "Trainer")):
            for sharding in ["one GPU"] if count == 1 else arguments.sharding:
                flags = options | {"output_dir": self.output / f"{name} {sharding} {count}"}
                words = [HERE.parent / "training" / f"run_video_classification{script}.py"]
                words += [word for key, value in flags.items() for word in (f"--{key}", value)]
                if not script:
                    words += ["--do_train", "--save_strategy", "no"]
                    words += ["--fsdp", "full_shard", "--fsdp_config", CONFIG] if sharding == "FSDP2" else []
                    words += ["--ddp_find_unused_parameters", "False"] if sharding == "DDP" else []
                launcher = self.launcher(count, sharding == "FSDP2" and script)
                text = self.command(f"{name}, {sharding}, {count}", count, *words, launcher=launcher)
                if speeds := speeds_of(text or ""):
                    self.add("training", f"{name}{f', {sharding}' if count > 1 else ''}", count, speeds)

    def launcher(self, count, wraps=False):
        if count == 1:
            return ()
        if not wraps:
            return "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count
        words = ["-m", "accelerate.commands.launch", "--num_processes", count, "--use_fsdp", "--fsdp_version", 2]
        words += [word for key, value in FSDP.items() for word in (f"--fsdp_{key}", value)]
        return *words, "--fsdp_state_dict_type", "SHARDED_STATE_DICT"

    def context(self, count):
        if count != self.arguments.processes[-1]:  # the script runs all of them
            return
        words = [HERE / "benchmark_parallel.py", "--output", self.output, "--processes", *self.arguments.processes]
        if self.arguments.tiny:
            words += [word for key, value in self.size.items() for word in (f"--{key}", value)]
            words += ["--device", "cpu", "--frames", 16, "--repeats", 2]
        else:
            words += ["--frames", 2048, 4096]
        if self.command("one clip", count, *words) is None:
            return
        with open(self.output / "parallel.csv", newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row["median_ms"]:
                    speed = 1000 / float(row["median_ms"])
                    self.add(f"{row['task']} of one clip", f"{row['frames']} frames", int(row["processes"]), speed)

    def files(self, count):
        arguments, clips = self.arguments, self.listed(self.arguments.files * count)
        name, listing = f"files, {count}", self.output / "files.txt"
        listing.write_text("".join(f"{path}\n" for path in clips), encoding="utf-8")
        words = [HERE.parent / "tools" / "classify_clips.py", listing, "--model", self.output / "model"]
        words += ["--output", self.output / name, "--num_workers", arguments.num_workers, "--dtype"]
        words += ["float32" if arguments.tiny else "bfloat16"]
        text = self.command(name, count, *words, launcher=self.launcher(count))
        if found := re.search(r": ([\d.]+) clips a second", text or ""):
            workers = argparse.Namespace(num_workers=count * arguments.num_workers)
            start = time.perf_counter()
            decode_alone([str(path) for path in clips], self.processor, workers)
            decode = len(clips) / (time.perf_counter() - start)
            self.add("files", "classify_clips.py", count, float(found[1]), decode)


def speeds_of(text):
    """The median of the speeds that a training script logged, but the first two; None if there are none."""
    found = re.findall(r"([\d.]+) clips/s, \d+% waiting|'clips_per_second': '?([\d.]+)", text)
    speeds = [float(a or b) for a, b in found]
    # A progress bar shows its last speed again and again.
    speeds = [speed for number, speed in enumerate(speeds) if number == 0 or speed != speeds[number - 1]]
    return statistics.median(speeds[2:]) if len(speeds) > 2 else None


def curves_of(rows):
    """What `plot` takes, of the rows of the table: each way to run on several GPUs, from its row on one."""
    speedups = {row["task"]: {} for row in rows}
    for task, how in dict.fromkeys((row["task"], row["how"]) for row in rows):
        own = [row for row in rows if row["task"] == task and how.startswith(row["how"])]
        if len(own) > 1:
            speedups[task][how] = [(row["processes"], row["processes"] * float(row["efficiency"])) for row in own]
    return speedups


def main():
    arguments = parse_arguments()
    there = 8 if arguments.tiny else torch.cuda.device_count()
    if there == 0:
        sys.exit("No CUDA GPU is here: --tiny shows on a CPU that it runs.")
    counts = arguments.processes or [count for count in (2, 4, 8) if count <= there]
    arguments.processes = sorted({1, *counts})
    if arguments.num_workers is None:
        arguments.num_workers = max(1, len(os.sched_getaffinity(0)) // arguments.processes[-1] - 1)
    print(*(f"{column:>{width}}" for column, width in zip(COLUMNS, (26, 24, 10, 12, 12, 13), strict=True)), flush=True)
    scaling = Scaling(arguments)
    scaling.run()
    name = "CPU, a tiny model" if arguments.tiny else torch.cuda.get_device_name()
    title = f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, {time.strftime('%Y-%m-%d')}"
    plot(curves_of(scaling.rows), scaling.output / "scaling.png", title)
    print(f"\n{title}\nWrote {scaling.output / 'scaling.csv'} and scaling.png")


if __name__ == "__main__":
    main()
