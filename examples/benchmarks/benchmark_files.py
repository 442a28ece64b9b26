#!/usr/bin/env python
"""
Clips a second from files to scores: what decoding, copying and the model allow, and what is reached.

    python examples/benchmarks/benchmark_files.py clips/ --num_workers 14 --output files.csv
    python examples/benchmarks/benchmark_files.py --made 340x256 640x360 1280x720 1920x1080 --num_workers 14

VideoMamba-S with random weights, 16 frames at stride 2. Every road goes over the same list of files, repeated until
decoding alone takes `--seconds`, and its time includes the start of its processes:

- `decode`: as many workers decode, and nothing comes back;
- `copy`: page-locked frames of the first clip, copied to the GPU, resized and normalised there;
- `model`: the model on a batch that is there;
- `workers resize`, `device resizes`: `ClipLoader` and `predict_clips`, with the two choices of `slot_bytes`;
- with `--compare`, `pipeline(...)` with this model and with VideoMAE-S with as many workers on a quarter of the list,
  and the loop that one would write: a `DataLoader` whose workers decode with decord or torchcodec, and resize;
- with `--nvdec`, threads decode with the GPU's video engine, through PyAV, and nothing comes back: with a decoder for
  each of a few clips (`opened`), and with one for all of a thread (`reused`; clips of one encoding).

A road that cannot run here has no figure, and the reason is printed.
"""

import argparse
import csv
import itertools
import os
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="of clips, .mp4")
    parser.add_argument("--made", nargs="*", default=[], metavar="WIDTHxHEIGHT", help="sizes of clips to make")
    parser.add_argument("--compare", action="store_true", help="time the pipelines and the plain loop, too")
    parser.add_argument("--nvdec", action="store_true", help="time decoding on the GPU through PyAV, too")
    parser.add_argument("--decoder", default="decord", choices=["decord", "torchcodec"], help="of the plain loop")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count())
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16", help="of the models")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--seconds", type=float, default=5, help="that decoding alone is to take")
    parser.add_argument("--output", type=Path, help="a CSV file")
    return parser.parse_args()


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    parse_arguments()  # before the imports below, which take seconds

import av
import torch
from av.codec.hwaccel import HWAccel
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from transformers import VideoClassificationPipeline, VideoMAEImageProcessor, VideoMAEVideoProcessor

from benchmark import videomae, videomamba
from benchmark_decoding import write_clip
from modeling_videomamba import ClipLoader, VideoMambaImageProcessor, VideoMambaVideoProcessor, predict_clips


FRAMES = 16


class Decoded(Dataset):
    """Decodes clips and returns nothing of them."""

    def __init__(self, files, processor):
        self.files, self.processor = files, processor

    def __len__(self):
        return len(self.files)

    def __getitem__(self, number):
        self.processor.fetch_videos(self.files[number], self.processor.sample_frames)
        return number


class Plain(Decoded):
    """What one would write: a library decodes, torchvision resizes and normalises."""

    decoder = None

    def __getitem__(self, number):
        if self.decoder == "decord":
            import decord

            reader = decord.VideoReader(self.files[number], num_threads=1)
            frames = torch.from_numpy(reader.get_batch(middle_frames(len(reader))).asnumpy()).permute(0, 3, 1, 2)
        else:
            from torchcodec.decoders import VideoDecoder

            reader = VideoDecoder(self.files[number], num_ffmpeg_threads=1)
            frames = reader.get_frames_at(middle_frames(len(reader)).tolist()).data
        frames = v2.functional.center_crop(v2.functional.resize(frames, 224, antialias=True), [224, 224])
        mean, std = self.processor.image_mean, self.processor.image_std
        return v2.functional.normalize(v2.functional.to_dtype(frames, torch.float32, scale=True), mean, std)


def middle_frames(total):
    start = max(0, (total - 2 * FRAMES + 1) // 2)
    return torch.arange(start, start + 2 * FRAMES, 2).clamp(max=total - 1)


def as_plain_as_possible(files, model, processor, arguments):
    loader = DataLoader(
        Plain(files, processor),
        arguments.batch_size,
        num_workers=arguments.num_workers,
        pin_memory=arguments.device.type == "cuda",
    )
    with torch.inference_mode():
        for pixel_values in loader:
            pixel_values = pixel_values.to(arguments.device, model.dtype, non_blocking=True)
            model(pixel_values=pixel_values).logits.softmax(-1).cpu()


def through_pipeline(files, classifier, arguments, **options):
    classifier(files, batch_size=arguments.batch_size, num_workers=arguments.num_workers, top_k=1, **options)


def through_loader(files, model, processor, arguments, slot_bytes):
    def score(pixel_values):
        return {"scores": model(pixel_values=pixel_values.to(model.dtype)).logits.float().softmax(-1)}

    loader = ClipLoader(
        files,
        processor,
        arguments.batch_size,
        num_workers=arguments.num_workers,
        device=arguments.device,
        slot_bytes=slot_bytes,
    )
    return {
        number: scores
        for batch, outputs in predict_clips(score, loader)
        for number, scores in zip(batch.clips, outputs["scores"] if outputs else (), strict=True)
    }


def decode_alone(files, processor, arguments):
    workers = arguments.num_workers
    for _ in DataLoader(Decoded(files, processor), None, num_workers=workers, in_order=False):
        pass


def decode_on_gpu(files, threads, reuse, arguments):
    """By the GPU's video engine: six clips a thread. Returns clips a second."""
    own = threading.local()
    # PyTorch has made the GPU's context: FFmpeg is to take that.
    options = {"primary_ctx": "0", "current_ctx": "1"}
    hwaccel = HWAccel("cuda", str(arguments.device.index or 0), False, options, is_hw_owned=True)

    def decode(file):
        torch.zeros(1, device=arguments.device)  # makes the context that of this thread
        with av.open(file) as container:
            stream = container.streams.video[0]
            if not (reuse and hasattr(own, "decoder")):
                own.decoder = av.CodecContext.create(stream.codec_context.name, "r", hwaccel)
                own.decoder.extradata = stream.codec_context.extradata
            step, first = 1 / (stream.average_rate * stream.time_base), stream.start_time or 0
            wanted = {first + int(number * step) for number in middle_frames(stream.frames).tolist()}
            container.seek(min(wanted), stream=stream)
            left, frames = set(wanted), []
            for packet in container.demux(stream):
                for frame in own.decoder.decode(packet if packet.size else None):
                    if frame.pts in left:
                        left.remove(frame.pts)
                        planes = [torch.utils.dlpack.from_dlpack(plane.__dlpack__()) for plane in frame.planes]
                        frames.append([plane.clone() for plane in planes])
                if not left:
                    break
            own.decoder.flush_buffers()
        if left:
            raise ValueError(f"{len(left)} of {FRAMES} frames of {file} were not decoded.")

    files = (files * (6 * threads))[: 6 * threads]
    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        list(pool.map(decode, files))
    torch.cuda.synchronize()
    return len(files) / (time.perf_counter() - start)


def copy_alone(clip, processor, arguments):
    """Clips a second from page-locked memory to `pixel_values` on the GPU."""
    if arguments.device.type != "cuda":
        return None
    frames = clip.contiguous().pin_memory().permute(0, 3, 1, 2)
    batch = [frames] * arguments.batch_size

    def step():
        clips = [frames.to(arguments.device, non_blocking=True) for frames in batch]
        processor(clips, do_sample_frames=False, device=arguments.device, return_tensors="pt")

    return arguments.batch_size / seconds_of(step, arguments)


def model_alone(model, arguments):
    shape = (arguments.batch_size, FRAMES, 3, 224, 224)
    pixel_values = torch.randn(shape, device=arguments.device, dtype=model.dtype)
    with torch.inference_mode():
        return arguments.batch_size / seconds_of(lambda: model(pixel_values=pixel_values).logits, arguments)


def seconds_of(step, arguments, least=1.0):
    """Of one of many steps, which the host does not wait for."""

    def finish():
        if arguments.device.type == "cuda":
            torch.cuda.synchronize()

    step()
    finish()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < least:
        for _ in range(1 + count):  # twice as many as before
            step()
        count += 1 + count
        finish()
    return (time.perf_counter() - start) / count


def compare_scores(files, model, processor, arguments, slot_bytes):
    """How far the loader's pixels and scores are from the processor's and the model's own, in float32."""
    files, dtype = files[: 2 * arguments.batch_size], model.dtype
    model.float()
    expected = []
    with torch.inference_mode():
        for file in files:
            pixel_values = processor(file, return_tensors="pt")["pixel_values"].to(arguments.device)
            expected.append(model(pixel_values=pixel_values).logits.softmax(-1)[0].cpu())
    found = through_loader(files, model, processor, arguments, slot_bytes)
    model.to(dtype)
    expected, found = torch.stack(expected), torch.stack([found[i] for i in range(len(files))])
    same = (expected.argmax(-1) == found.argmax(-1)).sum().item()
    return f"{(expected - found).abs().max():.1e} ({same} of {len(files)} labels)"


def measure(name, files, models, arguments):
    """A row of figures, clips a second, for one list of files."""
    model, processor = models["VideoMamba-S"], VideoMambaVideoProcessor(num_frames=FRAMES, frame_stride=2)
    clip, _ = processor.fetch_videos(files[0], processor.sample_frames)
    sizes = [processor.fetch_videos(file, processor.sample_frames)[0].nbytes for file in files[:12]]
    slot_bytes = min(max(sizes), 2**27)  # that of most clips
    times = [
        time.perf_counter() for _ in DataLoader(Decoded((files * 12)[:12], processor), None, num_workers=1)
    ]  # when each was decoded; the first waits for its process
    each = (times[-1] - times[0]) / 11 / max(1, arguments.num_workers)
    least = arguments.num_workers * (2 * arguments.batch_size if arguments.compare else 4)
    count = max(least, round(arguments.seconds / each))
    files = (files * (count // len(files) + 1))[:count]
    some = files[: max(least, count // 4)]  # for what takes long
    roads = {
        "decode": lambda: decode_alone(files, processor, arguments),
        "workers resize": lambda: through_loader(files, model, processor, arguments, 0),
        "device resizes": lambda: through_loader(files, model, processor, arguments, slot_bytes),
    }
    if arguments.compare:
        ours = VideoClassificationPipeline(
            model, video_processor=processor, image_processor=VideoMambaImageProcessor(), device=arguments.device
        )
        theirs = VideoClassificationPipeline(
            models["VideoMAE-S"],
            video_processor=VideoMAEVideoProcessor() if arguments.decoder == "torchcodec" else None,
            image_processor=VideoMAEImageProcessor(),
            device=arguments.device,
        )
        options = {} if arguments.decoder == "torchcodec" else {"frame_sampling_rate": 2}
        roads["pipeline, VideoMamba-S"] = lambda: through_pipeline(some, ours, arguments)
        roads["pipeline, VideoMAE-S"] = lambda: through_pipeline(some, theirs, arguments, **options)
        Plain.decoder = arguments.decoder
        roads[f"plain loop, {arguments.decoder}"] = lambda: as_plain_as_possible(files, model, processor, arguments)
    row = {"clips": name, "count": count, "frame": "x".join(map(str, clip.shape[2:0:-1]))}
    row["copy"] = copy_alone(clip, processor, arguments)
    row["model"] = model_alone(model, arguments)
    for road, run in roads.items():
        start = time.perf_counter()
        try:
            run()
            row[road] = len(some if road.startswith("pipeline") else files) / (time.perf_counter() - start)
        except Exception as error:  # a library that is not here, or a file that another decoder cannot read
            print(f"{name}, {road}: {type(error).__name__}: {error}".split("\n")[0], flush=True)
    for threads, reuse in itertools.product((1, 4, 8), (False, True)) if arguments.nvdec else ():
        road = f"nvdec, {threads} threads, {'reused' if reuse else 'opened'}"
        try:
            row[road] = decode_on_gpu(files, threads, reuse, arguments)
        except (av.FFmpegError, NotImplementedError, RuntimeError, ValueError) as error:
            print(f"{name}, {road}: {type(error).__name__}: {error}".split("\n")[0], flush=True)
    bound = min(row[road] for road in ("decode", "copy", "model") if row[road])
    row["reached"] = max(row.get("workers resize", 0), row.get("device resizes", 0)) / bound
    for kind, most in (("workers", 0), ("device", slot_bytes)):
        row[f"scores, {kind}"] = compare_scores(files, model, processor, arguments, most)
    return row


def main():
    arguments = parse_arguments()
    arguments.device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    models = {"VideoMamba-S": videomamba(FRAMES)[0], "VideoMAE-S": videomae(FRAMES)[0]}
    for model in models.values():
        model.to(arguments.device, getattr(torch, arguments.dtype)).eval()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        lists = {}
        if arguments.folder:
            lists[arguments.folder.name] = sorted(map(str, arguments.folder.rglob("*.mp4")))
        for size in arguments.made:
            width, height = map(int, size.split("x"))
            lists[f"made, {size}"] = [f"{folder}/{size}.mp4"]
            write_clip(f"{folder}/{size}.mp4", height, width, 60)
        for name, files in lists.items():
            rows.append(measure(name, files, models, arguments))
            print(*(f"{k}: {v:.3g}" if isinstance(v, float) else f"{k}: {v}" for k, v in rows[-1].items()), sep="\n")
            print(flush=True)
    if arguments.output:
        with open(arguments.output, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, max(rows, key=len))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
