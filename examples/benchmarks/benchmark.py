"""
The speed and memory of VideoMamba, VideoMAE, Video Swin, V-JEPA 2 and VideoPrism, on random weights and random clips.

    python examples/benchmarks/benchmark.py --output results                  # on a GPU: about ten minutes
    python examples/benchmarks/benchmark.py --output results --device cpu     # on a CPU: a few minutes

Writes `benchmark.csv` into the output folder and prints each row as soon as it is measured. Throughput is that of the
median step; the spread is from the fastest step to the slowest.

On a GPU: the length curve, clips of 8 to 2,048 frames with 1,024 frames in a batch (at most 64 clips), and single
clips of 16 frames for the latency. Inference is in bfloat16 and, as `pipeline(...)` runs it, in float32; a training
step is forward and backward with float32 weights, under bfloat16 autocast, at most 16 clips. Chosen lengths are timed
with `torch.compile` too. Memory is PyTorch's peak allocation, for inference beyond weights and input. `benchmark.png`
shows memory and frames per second; a model of linear cost keeps the latter constant. The last lines name the lengths
from which on VideoMamba is faster, and the cost of one layer on the host: kernels, and time to launch them.

On a CPU, models take turns step by step, so that other load slows all of them alike. The ratios of their times are
printed: compare these, not the times. Inference is of one clip, in float32 and, for the shortest clips, in bfloat16
too. A training step is of the tiny checkpoint's model. Two Python loops over tokens run twice, for scale: the scan
`sequential`, and transformers' Mamba, eager and without its kernels.

`--models VideoMamba-S --merge-layers 8` times VideoMamba-S and what temporal merging makes of it, and nothing besides.
"""

import argparse
import csv
import functools
import gc
import math
import os
import platform
import statistics
import sys
import time
from pathlib import Path


PRECISIONS = ["bfloat16", "float32"]
MERGED = "VideoMamba-S merged"


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="time these alone, and nothing besides")
    parser.add_argument(
        "--merge-layers",
        type=int,
        nargs="+",
        metavar="LAYER",
        help=f"time {MERGED} too, with these `merge_layers` of its config",
    )
    parser.add_argument("--frames", type=int, nargs="+", help="default: 8 to 2048 on a GPU, 16 64 on a CPU")
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=PRECISIONS,
        default=PRECISIONS,
        help="for inference on a GPU",
    )
    parser.add_argument(
        "--compiled",
        nargs="*",
        default=["VideoMamba-S", "VideoMAE-S"],
        metavar="MODEL",
        help="models to time with torch.compile too, on a GPU",
    )
    parser.add_argument("--compiled-frames", type=int, nargs="*", default=[16, 64, 256, 1024], help="for --compiled")
    parser.add_argument(
        "--compiled-training-frames", type=int, nargs="*", default=[16, 64], help="of these, for training"
    )
    parser.add_argument("--no-training", action="store_true")
    parser.add_argument("--warmup", type=int, help="default: 2 steps on a GPU, 1 on a CPU")
    parser.add_argument("--repeats", type=int, help="default: 10 steps on a GPU, 4 on a CPU")
    parser.add_argument("--output", type=Path, default=Path("results"), metavar="FOLDER")
    return parser.parse_args()


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    parse_arguments()  # before the imports below, which take seconds

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    MambaConfig,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    VideoPrismForVideoClassification,
    VideoPrismVisionConfig,
    VJEPA2Config,
    VJEPA2ForVideoClassification,
)
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.videomae import modeling_videomae

from modeling_videomamba import (
    VideoMambaConfig,
    VideoMambaForVideoClassification,
    count_parameters_and_macs,
    use_scan_backend,
)
from modeling_videomamba.selective_scan import BACKENDS, bidirectional_selective_scan, select_scan_backend
from modeling_videomamba.tokens_videomamba import sinusoidal_positions


SIZE, LABELS = 224, 400
TINY = Path(__file__).resolve().parents[2] / "model_cards" / "videomamba-tiny-camera-motion"
LENGTHS = [8, 16, 32, 64, 128, 256, 512, 1024, 2048]
FRAMES_OF_A_BATCH, MOST_CLIPS, MOST_TRAINED = 1024, 64, 16
MOST_FRAMES_IN_FLOAT32 = 512  # beyond, one step of VideoMAE takes seconds
COLUMNS = ["task", "model", "precision", "mode", "frames", "batch"]
COLUMNS += ["median_ms", "min_ms", "max_ms", "clips_per_s", "peak_gib"]
STYLE = {"VideoMamba-S": "C0", "VideoMamba-S (mamba_ssm)": "C3", "VideoMAE-S": "C1", "Swin3D-T": "C2"}


def videomamba(frames, **options):
    config = VideoMambaConfig(
        hidden_size=384, num_hidden_layers=24, num_frames=frames, image_size=SIZE, num_labels=LABELS, **options
    )
    model = VideoMambaForVideoClassification(config)
    return model, lambda clips: model(clips).logits


def videomae(frames):
    # Its own table is made by Python loops, for minutes at 1,024 frames; this one holds the same numbers, made once.
    modeling_videomae.get_sinusoid_encoding_table = functools.cache(sinusoidal_positions)
    config = VideoMAEConfig(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        intermediate_size=1536,
        num_frames=frames,
        image_size=SIZE,
        num_labels=LABELS,
        attn_implementation="sdpa",
    )
    model = VideoMAEForVideoClassification(config)
    return model, lambda clips: model(clips).logits


def swin3d(frames):
    from torchvision.models.video import swin3d_t

    model = swin3d_t(weights=None, num_classes=LABELS)
    return model, lambda clips: model(clips.transpose(1, 2))


def vjepa2(frames):
    config = VJEPA2Config(crop_size=SIZE, frames_per_clip=frames, num_labels=LABELS, attn_implementation="sdpa")
    model = VJEPA2ForVideoClassification(config)
    model.vjepa2.predictor = None  # a classifier never runs it
    return model, lambda clips: model(clips).logits


def videoprism(frames):
    # Of patches of 18 pixels, 12 fit a row: it sees 216² pixels. Its attention is eager: it caps the scores.
    config = VideoPrismVisionConfig(image_size=SIZE, num_frames=frames, num_labels=LABELS)
    model = VideoPrismForVideoClassification(config)
    return model, lambda clips: model(clips).logits.flatten(1)


MODELS = {
    "VideoMamba-S": videomamba,
    "VideoMAE-S": videomae,
    "Swin3D-T": swin3d,
    "V-JEPA 2 ViT-L": vjepa2,
    "VideoPrism-B": videoprism,
}
LARGE = "V-JEPA 2 ViT-L", "VideoPrism-B"  # not beyond 256 frames, nor trained; on a CPU, of the shortest clips alone
# What a GPU of compute capability below 8.0 takes, and what it would take without that.
OLDER_GPUS = ["VideoMamba-S (cuda_simt)", "VideoMamba-S (torch)"]


def size_of(name, frames):
    """Parameters of a model, and the multiply-accumulates of one clip."""
    with torch.device("meta"), torch.no_grad():
        model, forward = MODELS[name](frames)
        if isinstance(model, VideoMambaForVideoClassification):
            counts = count_parameters_and_macs(model.config)
            return counts["parameters"], counts["macs"]
        model.eval().requires_grad_(False)
        with FlopCounterMode(display=False) as counter:
            forward(torch.empty(1, frames, 3, SIZE, SIZE))
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() // 2


def measure(step, warmup, repeats, enough_seconds=4.0):
    """Seconds of each of `repeats` steps after `warmup`, by device events; fewer of both if a step takes long."""
    for _ in range(warmup):
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if seconds > enough_seconds / 4:
            break
    events = []
    for _ in range(max(1, min(repeats, int(enough_seconds / seconds)))):
        events.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
        events[-1][0].record()
        step()
        events[-1][1].record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1000 for start, end in events]


def table_row(task, name, precision, mode, frames, batch, times, peak):
    """One row of the table, as a dict, of a step's seconds and its GiB."""
    median = statistics.median(times)
    numbers = [1000 * median, 1000 * min(times), 1000 * max(times), batch / median, peak]
    return dict(
        zip(COLUMNS, [task, name, precision, mode, frames, batch, *(f"{n:.4g}" for n in numbers)], strict=True)
    )


def run_case(task, name, precision, mode, frames, batch, arguments):
    """One row of the table on a GPU."""
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    torch._dynamo.reset()
    training = task == "training"
    dtype = torch.float32 if training else getattr(torch, precision)
    model, forward = MODELS[name.split(" (")[0]](frames)
    model.to(device, dtype).train(training)
    clips = torch.randn(batch, frames, 3, SIZE, SIZE, device=device, dtype=dtype)
    labels = torch.arange(batch, device=device) % LABELS
    if mode == "compiled":
        # For a single clip what costs is launching the kernels, and a training step launches a thousand: a CUDA graph
        # launches them all at once.
        model.compile(mode="reduce-overhead" if batch == 1 or training else None)

    def training_step():
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = torch.nn.functional.cross_entropy(forward(clips), labels)
        loss.backward()
        model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def inference_step():
        forward(clips)

    backend = name.partition(" (")[2].rstrip(")") or select_scan_backend(device, clips.dtype)
    with use_scan_backend(backend):
        step = training_step if training else inference_step
        # From the first step on: a CUDA graph takes its memory when it is recorded.
        held = 0 if training else torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        if mode == "compiled":
            step(), step()
        times = measure(step, arguments.warmup, arguments.repeats)
    peak = (torch.cuda.max_memory_allocated() - held) / 2**30
    return table_row(task, name, precision, mode, frames, batch, times, peak)


def cases(arguments):
    """What is run on a GPU, case by case: the arguments of `run_case`."""
    baselines, older = list(arguments.models), []
    if not arguments.selected:
        older = OLDER_GPUS
        if BACKENDS["mamba_ssm"].unusable_reason(torch.device(arguments.device), torch.bfloat16) is None:
            baselines.insert(1, "VideoMamba-S (mamba_ssm)")

    def models(frames, precision):
        # Swin's windows do not grow with the clip; beyond 64 frames of float32 it does not fit.
        found = [m for m in baselines if m != "Swin3D-T" or frames <= 64 and precision == "bfloat16"]
        found = [m for m in found if m not in LARGE or frames <= 256 and precision == "bfloat16"]
        return found + older * (frames == 16 and precision == "float32")

    def modes(name, frames):
        yield "eager"
        if name in arguments.compiled and frames in arguments.compiled_frames:
            yield "compiled"

    for precision in arguments.precisions:
        for frames in arguments.frames:
            if precision == "float32" and frames > MOST_FRAMES_IN_FLOAT32:
                continue
            full = max(1, min(MOST_CLIPS, FRAMES_OF_A_BATCH // frames))
            for batch in sorted({1, full}) if frames == 16 else [full]:
                for name in models(frames, precision):
                    for mode in modes(name, frames) if precision == "bfloat16" else ["eager"]:
                        yield "inference", name, precision, mode, frames, batch
    for frames in [] if arguments.no_training else arguments.frames:
        batch = max(1, min(MOST_TRAINED, FRAMES_OF_A_BATCH // frames))
        for name in models(frames, "bfloat16") + older * (frames == 16):
            if frames > 1024 or name in LARGE or name == "Swin3D-T" and frames > 32:
                continue  # more than a GPU of 80 GB holds, without gradient checkpointing
            for mode in modes(name, frames):
                if mode == "eager" or frames in arguments.compiled_training_frames:
                    yield "training", name, "bfloat16", mode, frames, batch


def crossing_points(rows):
    """
    From how many frames on VideoMamba-S is at least as fast as VideoMAE-S.

    Returns:
        `list[tuple]`: task, precision, mode, and frames, interpolated on logarithmic axes; None if it is not within
        the lengths that both were timed at.
    """
    found = []
    speed = {}
    for r in rows:
        single = int(r["batch"]) == 1 and int(r["frames"]) == 16
        if r["model"] in ("VideoMamba-S", "VideoMAE-S") and not single and not math.isnan(float(r["clips_per_s"])):
            kind = r["task"], r["precision"], r["mode"]
            speed.setdefault(kind, {}).setdefault(int(r["frames"]), {})[r["model"]] = float(r["clips_per_s"])
    for kind, lengths in speed.items():
        ratios = {f: v["VideoMamba-S"] / v["VideoMAE-S"] for f, v in sorted(lengths.items()) if len(v) == 2}
        crossing = None
        pairs = list(ratios.items())
        if pairs and all(ratio >= 1 for _, ratio in pairs):
            crossing = pairs[0][0]
        for (f0, r0), (f1, r1) in zip(pairs, pairs[1:], strict=False):
            if r0 < 1 <= r1:
                crossing = round(f0 * (f1 / f0) ** (math.log(r0) / math.log(r0 / r1)))
        found.append((*kind, crossing))
    return found


def host_share(arguments):
    """Of one clip of 16 frames, eager, in bfloat16: kernels and host time a layer, and the GPU's own time."""
    for name in ("VideoMamba-S", "VideoMAE-S"):
        torch.manual_seed(0)
        model, forward = MODELS[name](16)
        model.to(arguments.device, torch.bfloat16).eval()
        clip = torch.randn(1, 16, 3, SIZE, SIZE, device=arguments.device, dtype=torch.bfloat16)
        layers = model.config.num_hidden_layers
        with torch.no_grad():
            for _ in range(3):
                forward(clip)
            torch.cuda.synchronize()
            times = []
            for _ in range(20):
                start = time.perf_counter()
                forward(clip)
                times.append(time.perf_counter() - start)
                torch.cuda.synchronize()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                forward(clip)
                torch.cuda.synchronize()
        kernels = [e for e in profile.key_averages() if e.self_device_time_total > 0]
        count, busy = sum(e.count for e in kernels), sum(e.self_device_time_total for e in kernels) / 1000
        host = 1000 * statistics.median(times)
        print(
            f"One clip of 16 frames, eager: {name} {count} kernels ({count / layers:.1f} a layer), "
            f"host {host:.2f} ms ({1000 * host / layers:.0f} µs a layer), GPU busy {busy:.2f} ms"
        )


def scan_alone(batch, frames, arguments):
    """The operator between a mixer's two projections, and its scan kernel beside what the chip allows."""
    device = torch.device(arguments.device)
    length, inner, states, rank = frames // 2 * (SIZE // 16) ** 2 + 1, 768, 16, 24
    shapes = [(2, inner, 4), (2, inner), (2, rank + 2 * states, inner), (2, inner, rank), (2, inner)]
    tensors = [torch.randn(batch, length, 2 * inner), *(torch.randn(s) * s[-1] ** -0.5 for s in shapes)]
    tensors += [torch.randn(2, inner, states) / 2, torch.ones(2, inner)]
    tensors = [t.to(device, torch.bfloat16) for t in tensors]

    @torch.no_grad()
    def step():
        bidirectional_selective_scan(*tensors)

    whole = statistics.median(measure(step, arguments.warmup, arguments.repeats))
    print(
        f"\nOne layer at {frames} frames × {batch}: everything between its projections {1000 * whole:.3f} ms", end=""
    )
    if select_scan_backend(device, torch.bfloat16) == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(arguments.repeats):
                step()
            torch.cuda.synchronize()
        kernels = {e.key: e.self_device_time_total / 1e3 / arguments.repeats for e in profile.key_averages()}
        properties = torch.cuda.get_device_properties(device)
        clock = getattr(properties, "clock_rate", 1_980_000) * 1e3
        # 16 special-function results a clock and multiprocessor; one exponential a state, one more for the softplus.
        results = batch * length * inner * (states + 1)
        floor = 1e3 * results / (16 * properties.multi_processor_count * clock)
        print(f"; the scan takes {kernels['scan'] / 2:.3f} ms a direction (exponentials alone: {floor:.3f} ms)")
    else:
        print()


def cpu_comparisons(arguments):
    """What is run on a CPU, group by group: the arguments of `run_side_by_side`."""

    def inference_step(name, frames, dtype):
        torch.manual_seed(0)
        model, forward = MODELS[name](frames)
        model.to(dtype).eval()
        clips = torch.randn(1, frames, 3, SIZE, SIZE, dtype=dtype)
        return torch.no_grad()(lambda: forward(clips))

    for frames in arguments.frames:
        for dtype in (torch.float32, torch.bfloat16) if frames == min(arguments.frames) else (torch.float32,):
            small = frames == min(arguments.frames) and dtype == torch.float32
            names = [m for m in arguments.models if m not in LARGE or small]
            steps = {name: inference_step(name, frames, dtype) for name in names}
            yield "inference", str(dtype)[6:], frames, 1, steps, arguments.warmup, arguments.repeats

    if arguments.selected:
        return
    if not arguments.no_training:
        torch.manual_seed(0)
        model = VideoMambaForVideoClassification(VideoMambaConfig.from_pretrained(TINY))
        clips = torch.randn(8, model.config.num_frames, 3, model.config.image_size, model.config.image_size)
        labels = torch.arange(8)

        def training_step():
            model(clips, labels=labels).loss.backward()
            model.zero_grad(set_to_none=True)

        steps = {f"VideoMamba tiny ({b})": use_scan_backend(b)(training_step) for b in ("torch", "numba")}
        yield "training", "float32", model.config.num_frames, 8, steps, arguments.warmup, arguments.repeats

    frames = min(arguments.frames)
    step = inference_step("VideoMamba-S", frames, torch.float32)
    # What Mamba costs on a CPU today: the Python loop of transformers' own mixer, for 24 layers and two directions.
    mixer = MambaMixer(MambaConfig(hidden_size=384, state_size=16, time_step_rank=24), layer_idx=0)
    tokens = torch.randn(1, 1 + frames // 2 * (SIZE // 16) ** 2, 384)
    steps = {"transformers' Mamba × 48": torch.no_grad()(lambda: [mixer(tokens) for _ in range(48)])}
    steps |= {f"VideoMamba-S ({b})": use_scan_backend(b)(step) for b in ("sequential", "torch", "numba")}
    yield "inference", "float32", frames, 1, steps, 0, 2


def run_side_by_side(task, precision, frames, batch, steps, warmup, repeats):
    """Rows of the table for steps that take turns."""
    times = {name: [] for name in steps}
    for turn in range(warmup + repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return [table_row(task, name, precision, "eager", frames, batch, times[name], float("nan")) for name in steps]


def plot(rows, path, title):
    """Frames per second by the length of a clip, a panel for each task and precision, and the memory of inference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    rows = [r for r in rows if r["model"] not in OLDER_GPUS]  # of one length
    rows = [r for r in rows if not (int(r["frames"]) == 16 and int(r["batch"]) == 1)] or rows
    panels = {}
    for r in rows:
        panels.setdefault(f"{r['task']}, {r['precision']}", []).append(r)
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.4), squeeze=False)
    for axis, (name, found) in zip(axes[0], panels.items(), strict=True):
        for model, mode in dict.fromkeys((r["model"], r["mode"]) for r in found):
            points = [
                (int(r["frames"]), int(r["frames"]) * float(r["clips_per_s"]))
                for r in found
                if (r["model"], r["mode"]) == (model, mode)
            ]
            label = f"{model}, compiled" if mode == "compiled" else model
            style = "s--" if mode == "compiled" else "o-"
            axis.plot(*zip(*sorted(points), strict=True), style, color=STYLE.get(model, "C4"), label=label)
        axis.set(xscale="log", yscale="log", xlabel="frames in a clip", ylabel="frames per second", title=name)
        ticks = sorted({int(r["frames"]) for r in found})
        axis.set_xticks(ticks, ticks)
        axis.minorticks_off()
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:,g}")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def cpu_name():
    """What the ratios depend on: the kind of processor, its vectors and matrix units, and PyTorch's threads."""
    units = torch.backends.cpu.get_cpu_capability() + (" with AMX" if torch.cpu._is_amx_tile_supported() else "")
    return f"{platform.machine()} CPU, {units}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def replace_file(path, write):
    """`write(temporary path)`, then rename: nobody finds half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    write(temporary)
    os.replace(temporary, path)


def print_ratios(rows):
    """How the first of some rows compares with each of the others, by the fastest and by the median steps."""
    first, *others = rows
    for row in others:
        fastest, median = (float(first[column]) / float(row[column]) for column in ("min_ms", "median_ms"))
        print(f"    {first['model']} takes {fastest:.2f} × (medians: {median:.2f} ×) the time of {row['model']}")


def choose_models(arguments):
    """Makes `models` the list of what is timed, and `selected` whether it was chosen; exits for an unknown model."""
    if arguments.merge_layers:
        MODELS[MERGED] = functools.partial(videomamba, merge_layers=arguments.merge_layers)
    for option in ("compiled", "models"):
        if unknown := set(getattr(arguments, option) or []) - set(MODELS):
            sys.exit(f"--{option}: no model {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")
    arguments.selected = arguments.models is not None
    arguments.models = list(dict.fromkeys(arguments.models)) if arguments.selected else list(MODELS)
    if arguments.merge_layers and MERGED not in arguments.models:
        arguments.models.append(MERGED)


def main():
    arguments = parse_arguments()
    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    gpu = arguments.device.startswith("cuda")
    defaults = {"frames": LENGTHS, "warmup": 3, "repeats": 10}
    if not gpu:
        defaults = {"frames": [16, 64], "warmup": 1, "repeats": 4}
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    choose_models(arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    processor = torch.cuda.get_device_name() if gpu else cpu_name()
    title = (
        f"{processor}, torch {torch.__version__}, transformers {transformers.__version__}, {time.strftime('%Y-%m-%d')}"
    )
    print(f"{title}\nRandom weights, {SIZE}² pixels, medians of up to {arguments.repeats} steps\n")
    for name in arguments.models:
        parameters, macs = size_of(name, 16)
        print(f"{name}: {parameters / 1e6:.1f} M parameters, {macs / 1e9:.0f} GMACs a clip of 16 frames")
    print("".join(f"{column:>26}" if column == "model" else f"{column:>12}" for column in COLUMNS))
    rows = []

    def write_csv(path):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)

    def add(row):
        rows.append(row)
        print("".join(f"{row[c]!s:>26}" if c == "model" else f"{row[c]!s:>12}" for c in COLUMNS), flush=True)
        replace_file(arguments.output / "benchmark.csv", write_csv)

    if not gpu:
        for comparison in cpu_comparisons(arguments):
            found = run_side_by_side(*comparison)
            for row in found:
                add(row)
            print_ratios(found)
        print(f"\nWrote {arguments.output / 'benchmark.csv'}")
        return
    for case in cases(arguments):
        try:
            row = run_case(*case, arguments)
        except (RuntimeError, ValueError) as error:  # out of memory, or a size that the model refuses
            row = dict(zip(COLUMNS, [*case, *["nan"] * 5], strict=True))
            print(f"{case}: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
        add(row)
        gc.collect()
        torch.cuda.empty_cache()
    if arguments.selected:
        return
    for task, precision, mode, frames in crossing_points(rows):
        print(f"{task} in {precision}, {mode}: VideoMamba-S at least as fast as VideoMAE-S from {frames} frames on")
    host_share(arguments)
    for batch, frames in ((64, 16), (16, 64), (1, 1024)):
        scan_alone(batch, frames, arguments)
    replace_file(arguments.output / "benchmark.png", lambda path: plot(rows, path, title))
    print(f"\nWrote {arguments.output / 'benchmark.csv'} and benchmark.png")


if __name__ == "__main__":
    main()
