"""
Cost of turning a file into `pixel_values`: CPU time and peak memory of 16 frames at stride 2.

    python examples/benchmarks/benchmark_decoding.py                      # made clips, 340 x 256 to 7680 x 4320
    python examples/benchmarks/benchmark_decoding.py clip.mp4 --decoder torchcodec
    python examples/benchmarks/benchmark_decoding.py film.mp4 --spread 8 16   # frames spread evenly over a film

Each clip is read in a process of its own. The memory is what the process grows by, above what it has after its imports
and a first small clip (not measured on Windows). To measure another version of the package, set
PYTHONPATH=folder/of/that/version.
"""

import argparse
import importlib
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", nargs="*", help="files; made clips of eight sizes if none is given")
    parser.add_argument(
        "--decoder", choices=["pyav", "torchcodec", "decord"], help="the first that can be used if not given"
    )
    parser.add_argument(
        "--repeats", type=int, default=11, help="of which the median is printed; with --spread the least"
    )
    parser.add_argument("--spread", type=int, nargs="+", help="compare the decoders by so many frames of each clip")
    return parser.parse_args()


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    parse_arguments()  # before the imports below, which take seconds

import av
import numpy as np
import torch

from modeling_videomamba import VideoMambaVideoProcessor
from modeling_videomamba.video_decoding import decode_video


SIZES = [(256, 340), (272, 640), (240, 426), (480, 854), (720, 1280), (1080, 1920), (2160, 3840), (4320, 7680)]


def write_clip(path, height, width, frames):
    """H.264 of a texture that moves, with a key frame every 12 frames."""
    texture = np.random.default_rng(0).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    texture = np.kron(texture, np.ones((8, 8, 1), np.uint8))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast", "crf": "30", "bf": "2"})
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = height, width, "yuv420p", 12
        for i in range(frames):
            frame = np.roll(texture, 3 * i, axis=1)[:height, :width]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def measure(pipe, warm_up, path, decoder, repeats):
    processor = VideoMambaVideoProcessor(decoder=decoder)
    processor(warm_up)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    processor(path, return_tensors="pt")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    times = []
    for _ in range(repeats):
        start = time.process_time()
        processor(path, return_tensors="pt")
        times.append(1000 * (time.process_time() - start))
    pipe.send((statistics.median(times), memory / 1024))


def read_spread(library, path, count):
    """`count` frames from the first to the last of a film, with what a library offers for it and all cores."""

    def spread(total):
        return np.linspace(0, total - 1, count).round().astype(int)

    if library == "torchcodec":
        decoder = importlib.import_module("torchcodec.decoders").VideoDecoder(
            path, dimension_order="NHWC", seek_mode="exact", num_ffmpeg_threads=0
        )
        return decoder.get_frames_at(indices=spread(len(decoder)).tolist()).data.numpy()
    if library == "decord":
        decord = importlib.import_module("decord")
        decord.logging.set_level(decord.logging.QUIET)
        reader = decord.VideoReader(path)
        return reader.get_batch(spread(len(reader))).asnumpy()
    return decode_video(path, lambda metadata: spread(metadata.total_num_frames), "pyav")[0]


def time_spread(pipe, library, path, count, repeats):
    times = []
    try:
        for _ in range(repeats):
            start, cpu_start = time.perf_counter(), time.process_time()
            frames = read_spread(library, path, count)
            times.append((time.perf_counter() - start, time.process_time() - cpu_start))
        pipe.send(([min(column) for column in zip(*times, strict=True)], frames[:, ::64, ::64].astype(int)))
    except Exception as error:  # one of a library that is not installed, or cannot read the film
        pipe.send((type(error).__name__, None))


def compare_spread(context, films, counts, repeats):
    """Least seconds of wall-clock and of CPU time, of each library in a process of its own, in turn."""
    libraries = ("this package", "torchcodec", "decord")
    print(f"{'film':<24} {'frames':>6} " + " ".join(f"{library:>18}" for library in libraries))
    for film in films:
        for count in counts:
            results = [run(context, time_spread, library, film, count, repeats) for library in libraries]
            cells = []
            for seconds, frames in results:
                cell = seconds if frames is None else "{:.2f} ({:.2f}) s".format(*seconds)
                if frames is not None and (
                    frames.shape != results[0][1].shape or abs(frames - results[0][1]).max() > 8
                ):
                    cell += " other"  # frames than this package gives
                cells.append(f"{cell:>18}")
            print(f"{Path(film).name:<24} {count:>6} " + " ".join(cells), flush=True)


def run(context, function, *args):
    """What a function sends through a pipe, called in a process of its own."""
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=function, args=(there, *args))
    process.start()
    there.close()
    result = here.recv()
    process.join()
    return result


def main():
    args = parse_arguments()
    context = multiprocessing.get_context()
    if args.spread:
        return compare_spread(context, args.clips, args.spread, args.repeats)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        warm_up = str(Path(folder, "small.mp4"))
        write_clip(warm_up, 64, 96, 40)
        print(f"{'clip':<24} {'CPU ms':>8} {'MiB':>8}")
        for clip in args.clips or SIZES:
            name, repeats = str(clip), args.repeats
            if clip in SIZES:
                height, width = clip
                name, clip = f"{width} x {height}", str(Path(folder, "clip.mp4"))
                large = height * width > 2**22
                write_clip(clip, height, width, 36 if large else 150)
                repeats = min(repeats, 3) if large else repeats
            milliseconds, mebibytes = run(context, measure, warm_up, clip, args.decoder, repeats)
            print(f"{Path(name).name:<24} {milliseconds:>8.0f} {mebibytes:>8.0f}", flush=True)


if __name__ == "__main__":
    main()
