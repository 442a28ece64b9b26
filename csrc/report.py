"""
Prints registers, spills and shared memory of the kernels of VideoMamba-S, as a Markdown table.

    python csrc/report.py [--architecture sm_90] [--compiler nvcc|nvrtc]

nvcc is taken if it is on the path, else the NVRTC that comes with PyTorch. Neither needs a GPU.
"""

import argparse
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="sm_90")
    parser.add_argument("--compiler", choices=["nvcc", "nvrtc"], default="nvcc" if shutil.which("nvcc") else "nvrtc")
    return parser.parse_args()


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    parse_arguments()  # before the imports below, which take seconds

import torch

from modeling_videomamba import selective_scan_cuda_plan as plan
from modeling_videomamba import selective_scan_cuda_runtime as runtime


CSRC = Path(__file__).resolve().parent
CHANNELS, RANK, STATES, TAPS = 768, 24, 16, 4


def configurations():
    """Kernel, activations' type, note, options, threads of a block, dynamic shared memory of a block."""
    for dtype in (torch.bfloat16, torch.float32):
        common = {"IO": runtime.DTYPES[dtype], "PT": runtime.DTYPES[dtype], "CHANNELS": CHANNELS, "N": STATES}
        common |= {"R": RANK, "K": TAPS, "VEC": 1}
        for kernel, share in plan.WALKS:
            if dtype == torch.float32 and share != 1:
                continue
            options, threads, shared = plan.walk_settings(kernel, share, RANK, STATES, CHANNELS, dtype)
            note = {0.5: "two warps for 16 channels", 1: "16 channels a warp", 2: "32 channels a warp"}[share]
            yield kernel, dtype, note, {**common, **options}, threads, shared
        for kernel in ("conv", "conv_backward"):
            yield kernel, dtype, f"{plan.CONV_CHANNELS} channels a thread", common, plan.CONV_THREADS, 0
        if dtype != torch.float32:
            shared = plan.conv_backward_bytes(RANK, STATES)
            note = "2 channels a thread, with the projection"
            yield "proj_conv_backward", dtype, note, common, plan.CONV_BACKWARD_THREADS, shared
        yield "pass_states", dtype, "a state a thread", common, 128, 0


def compiler_report(compiler, kernel, options, architecture):
    """What ptxas says of a kernel."""
    if compiler == "nvrtc":
        return runtime.compile_kernel(kernel, options, architecture, ("--ptxas-options=-v",))[1]
    arguments = [*runtime.compiler_arguments(kernel, options, architecture), "-Xptxas=-v", "-cubin", "-o", "/dev/null"]
    command = ["nvcc", *arguments, str(CSRC / runtime.KERNEL_FILES[kernel])]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(result.stderr)
    return result.stderr


def main():
    arguments = parse_arguments()
    found = list(configurations())
    with ThreadPoolExecutor() as pool:
        reports = pool.map(lambda c: compiler_report(arguments.compiler, c[0], c[3], arguments.architecture), found)
        print(f"VideoMamba-S on {arguments.architecture}, by {arguments.compiler}:\n")
        print("| kernel | type | | registers | spilled bytes | threads a block | shared memory a block |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for (kernel, dtype, note, _, threads, shared), report in zip(found, reports, strict=True):
            registers = re.search(r"Used (\d+) registers", report)[1]
            spilled = sum(map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report).groups()))
            type_name = str(dtype).removeprefix("torch.")
            print(
                f"| `{kernel}` | {type_name} | {note} | {registers} | {spilled} | {threads} | {shared:,} |", flush=True
            )


if __name__ == "__main__":
    main()
