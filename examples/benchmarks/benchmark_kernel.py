#!/usr/bin/env python
"""
Times the selective scan for other models, a repository that `make kernel-repo` writes, on a GPU.

    make kernel-repo OUTPUT=kernel
    python examples/benchmarks/benchmark_kernel.py kernel --output results

Against mamba-ssm and causal-conv1d where they are installed, and transformers' own path: the scan alone in mamba-ssm's
layout, a Vision Mamba block, and transformers' MambaModel of the 130M's shape. Weights are random, times medians. The
last column is the relative difference from the first implementation of a case: of outputs or of the gradient that
differs most; of MambaModel in float32, on 256 tokens.
"""

import argparse
import copy
import csv
import functools
import importlib
import itertools
import statistics
import sys
from pathlib import Path


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", help="a folder that `make kernel-repo` wrote")
    parser.add_argument("--output", default=".", help="folder for kernel.csv")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=64, help="sequences of the scan and of the block")
    parser.add_argument("--tokens", type=int, default=1569, help="their length")
    parser.add_argument("--prompts", type=int, default=4, help="sequences of MambaModel")
    parser.add_argument("--prompt-tokens", type=int, default=2048, help="their length")
    parser.add_argument("--parts", nargs="+", default=["scan", "block", "model"], choices=["scan", "block", "model"])
    return parser.parse_args()


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    parse_arguments()  # before the imports below, which take seconds

import torch
import torch.nn.functional as F
from torch import nn


CHANNELS, STATES, RANK, TAPS = 768, 16, 24, 4
COLUMNS = ["case", "implementation", "precision", "pass", "batch", "tokens", "ms", "peak_mib", "difference"]


def load_repository(folder):
    """The public functions of a built repository, as the package `kernels` imports it."""
    path = Path(folder, "build", "torch-cuda", "__init__.py")
    spec = importlib.util.spec_from_file_location("videomamba_scan", path)
    module = sys.modules["videomamba_scan"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def installed(module, name):
    """A function of a package, or None."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:
        print(f"without {module}: {type(error).__name__}: {error}")
        return None


def measure(step, repeats):
    """
    Median milliseconds of a step on the GPU, and its peak of memory beyond what was there, in MiB. Steps are queued,
    one behind the other, as layers are: the GPU waits for Python only if Python takes longer.
    """
    for _ in range(min(3, repeats)):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        step()
        end.record()
    torch.cuda.synchronize()
    median = statistics.median(start.elapsed_time(end) for start, end in events)
    return median, (torch.cuda.max_memory_allocated() - held) / 2**20


def relative_error(found, expected):
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


# --------------------------------------------------------------------------------------------------------------------
# The scan alone.
# --------------------------------------------------------------------------------------------------------------------


def scan_inputs(batch, tokens, dtype, device):
    def normal(*shape):
        return torch.randn(*shape, device=device)

    sequences = [normal(batch, CHANNELS, tokens).to(dtype) for _ in range(3)]
    matrices = [normal(batch, STATES, tokens).to(dtype) for _ in range(2)]
    A = -torch.arange(1.0, STATES + 1, device=device).repeat(CHANNELS, 1)
    u, delta, z = sequences
    return {"u": u, "delta": delta, "A": A, "B": matrices[0], "C": matrices[1], "D": normal(CHANNELS), "z": z,
            "delta_bias": normal(CHANNELS) - 3}  # fmt: skip


def time_scans(scans, arguments):
    for dtype, left_out in itertools.product((torch.bfloat16, torch.float32), (("z",), ())):
        torch.manual_seed(0)
        inputs = scan_inputs(arguments.batch, arguments.tokens, dtype, arguments.device)
        inputs = {name: t.requires_grad_() for name, t in inputs.items() if name not in left_out}
        yield from time_scan("scan" if left_out else "scan with gate", scans, inputs)


def time_scan(case, scans, inputs):
    gradient, first = torch.randn_like(inputs["u"]), {}
    for name, scan in scans.items():

        def forward(scan=scan):
            return scan(**inputs, delta_softplus=True)

        def both(forward=forward):
            return torch.autograd.grad(forward(), list(inputs.values()), gradient)

        yield from rows(case, name, inputs["u"].dtype, gradient.shape[::2], forward, both, first)


def rows(case, name, dtype, shape, forward, both, first, repeats=20):
    """Of the forward pass alone, and of both; `first` holds what the first implementation of the case found."""
    for direction, step in (("forward", forward), ("forward and backward", both)):
        with torch.set_grad_enabled(step is both):
            found = step()
        found = found if isinstance(found, tuple) else (found,)
        expected = first.setdefault(direction, found)
        difference = max(relative_error(f, e) for f, e in zip(found, expected, strict=True))
        del found, expected
        yield row(case, name, dtype, direction, *shape, step, difference, repeats)


def row(case, name, dtype, direction, batch, tokens, step, difference, repeats=20):
    with torch.set_grad_enabled(direction != "forward"):
        ms, peak = measure(step, repeats)
    precision = str(dtype).removeprefix("torch.")
    return [case, name, precision, direction, batch, tokens, f"{ms:.3f}", f"{peak:.0f}", f"{difference:.1e}"]


# --------------------------------------------------------------------------------------------------------------------
# Vision Mamba's block, in its own layout.
# --------------------------------------------------------------------------------------------------------------------


class VimBlock(nn.Module):
    """Vision Mamba's mixer, channels first, with a convolution and a scan to be given; VideoMamba-S's shape."""

    def __init__(self, scan, convolution):
        super().__init__()
        self.scan, self.convolution = scan, convolution
        self.in_proj = nn.Linear(CHANNELS // 2, 2 * CHANNELS, bias=False)
        self.out_proj = nn.Linear(CHANNELS, CHANNELS // 2, bias=False)
        for b in ("", "_b"):
            convolution = nn.Conv1d(CHANNELS, CHANNELS, TAPS, groups=CHANNELS, padding=TAPS - 1)
            setattr(self, f"conv1d{b}", convolution)
            setattr(self, f"x_proj{b}", nn.Linear(CHANNELS, RANK + 2 * STATES, bias=False))
            setattr(self, f"dt_proj{b}", nn.Linear(RANK, CHANNELS))
            A = torch.arange(1.0, STATES + 1).repeat(CHANNELS, 1)
            setattr(self, f"A{b}_log", nn.Parameter(A.log()))
            setattr(self, f"D{b}", nn.Parameter(torch.ones(CHANNELS)))
        nn.init.constant_(self.dt_proj.bias, -4.0)
        nn.init.constant_(self.dt_proj_b.bias, -4.0)

    def direction(self, xz, b):
        batch, _, tokens = xz.shape
        x, z = xz.chunk(2, dim=1)
        conv, x_proj, dt_proj = (getattr(self, f"{name}{b}") for name in ("conv1d", "x_proj", "dt_proj"))
        x = self.convolution(x, conv.weight.squeeze(1), conv.bias, activation="silu")
        rows = F.linear(x.transpose(1, 2).reshape(batch * tokens, CHANNELS), x_proj.weight)
        time_step, B, C = rows.split([RANK, STATES, STATES], dim=1)
        delta = (dt_proj.weight @ time_step.T).view(CHANNELS, batch, tokens).transpose(0, 1)
        B, C = (t.reshape(batch, tokens, STATES).transpose(1, 2).contiguous() for t in (B, C))
        A, D = -getattr(self, f"A{b}_log").float().exp(), getattr(self, f"D{b}").float()
        return self.scan(x, delta, A, B, C, D, z, dt_proj.bias.float(), delta_softplus=True)

    def forward(self, hidden_states):
        batch, tokens, width = hidden_states.shape
        xz = self.in_proj.weight @ hidden_states.reshape(batch * tokens, width).T
        xz = xz.view(-1, batch, tokens).transpose(0, 1)
        out = self.direction(xz, "") + self.direction(xz.flip(2), "_b").flip(2)
        return self.out_proj(out.transpose(1, 2))


def time_blocks(scans, repository, convolution, arguments):
    torch.manual_seed(0)
    block = VimBlock(None, convolution).to(arguments.device, torch.bfloat16)
    for name, parameter in block.named_parameters():
        if "A" in name or name in ("D", "D_b"):
            parameter.data = parameter.data.float()
    hidden_states = torch.randn(
        arguments.batch, arguments.tokens, CHANNELS // 2, device=arguments.device, dtype=torch.bfloat16
    )
    gradient = torch.randn_like(hidden_states)
    ways = {name: (scan, block) for name, scan in scans.items()}
    ways["ours (bimamba_forward)"] = None, functools.partial(repository.bimamba_forward, block)
    first = {}
    for name, (scan, run) in ways.items():
        block.scan = scan

        def both(run=run):
            return torch.autograd.grad(run(hidden_states), list(block.parameters()), gradient)

        forward = functools.partial(run, hidden_states)
        shape = arguments.batch, arguments.tokens
        yield from rows("Vision Mamba block", name, torch.bfloat16, shape, forward, both, first, 10)


# --------------------------------------------------------------------------------------------------------------------
# transformers' MambaModel.
# --------------------------------------------------------------------------------------------------------------------


def plain_mamba():
    """transformers' module of Mamba, as it is where mamba-ssm is not installed."""
    hidden = {name: sys.modules.get(name) for name in ("mamba_ssm", "causal_conv1d")}
    sys.modules.update(dict.fromkeys(hidden))
    module = importlib.import_module("transformers.models.mamba.modeling_mamba")
    for name, loaded in hidden.items():
        if loaded is None:
            del sys.modules[name]
        else:
            sys.modules[name] = loaded
    return module


def time_mamba(scans, repository, convolution, arguments):
    modeling = plain_mamba()
    own = modeling.mamba_selective_scan, modeling.causal_conv1d_fn
    config = modeling.MambaConfig(hidden_size=768, num_hidden_layers=24, use_cache=False)
    torch.manual_seed(0)
    model = modeling.MambaModel(config).to(arguments.device, torch.bfloat16).eval()
    tokens = torch.randint(config.vocab_size, (arguments.prompts, arguments.prompt_tokens), device=arguments.device)

    def as_transformers_calls(scan):
        def call(*tensors, use_mambapy=False, use_associative_scan=False, **options):
            return scan(*tensors, **options)

        return call

    taken = {name: as_transformers_calls(scan) for name, scan in scans.items()}
    taken["ours"] = repository.layers.selective_scan_fn()
    ways = {"transformers": own} | {name: (scan, own[1]) for name, scan in taken.items()}
    if convolution is not None:
        ways |= {f"{name} + causal-conv1d": (scan, convolution) for name, scan in taken.items()}
    exact, first = copy.deepcopy(model).float(), None
    for name, (scan, convolve) in ways.items():
        modeling.mamba_selective_scan, modeling.causal_conv1d_fn = scan, convolve
        with torch.no_grad():
            found = exact(tokens[:, :256]).last_hidden_state
        first = found if first is None else first
        repeats = 1 if scan is own[0] else 10
        step, difference = functools.partial(model, tokens), relative_error(found, first)
        yield row("MambaModel 130M", name, torch.bfloat16, "forward", *tokens.shape, step, difference, repeats)
    modeling.mamba_selective_scan, modeling.causal_conv1d_fn = own


def main():
    arguments = parse_arguments()
    repository = load_repository(arguments.repository)
    scans = {"ours": repository.selective_scan_fn}
    theirs = installed("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
    convolution = installed("causal_conv1d", "causal_conv1d_fn")
    if theirs is not None:
        scans["mamba-ssm"] = theirs
    rows = []
    parts = {
        "scan": lambda: time_scans(scans, arguments),
        "block": lambda: time_blocks(scans, repository, convolution or plain_mamba().causal_conv1d_fn, arguments),
        "model": lambda: time_mamba(scans, repository, convolution, arguments),
    }
    for part in arguments.parts:
        for found in parts[part]():
            print(",".join(map(str, found)), flush=True)
            rows.append(found)
    path = Path(arguments.output, "kernel.csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
