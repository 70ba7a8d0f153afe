"""Every attention kernel at one shape: is it right, milliseconds and TFLOP/s, forward and backward.

    python tests/bench/attention.py          # the heads of the default, 48 rows of 2,048 on a GPU
    python tests/bench/attention.py --rows 4 --window 2048 --tokens 6144    # as in banded scoring

train_gpt.py times no kernel: it takes the first right one in a fixed order, so that the same
machine chooses the same. The times behind that order, and behind ATTENTION=<name>, are made here.
Settings by environment variables, as for the script. FLOPs are those of the positions that a query
sees: 4·E a pair and head forward, 2.5 times that backward. On a CPU: PyTorch's choice.
"""
import argparse
import functools
import os
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt as T  # noqa: E402


def kernels(rt):
    """{name: function} of the kernels to try here; None where a package is missing."""
    names = [*T.ATTENTION, "sdpa"] if rt.device.type == "cuda" else ["sdpa"]
    return {name: T.attention_of(T.attention_kernel(name, strict=True)) for name in names}


def milliseconds(rt, work, repeats):
    """Median time of work(), warm."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        rt.synchronize()
        start = time.perf_counter()
        work()
        rt.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def measured(attend, qkv, rt, repeats):
    """(forward ms, backward ms) on q, k, v as slices of one product, as in the model."""
    attend = rt.compiled(attend)
    with torch.no_grad():
        forward = milliseconds(rt, lambda: attend(*qkv), repeats)
    y = attend(*qkv)
    grad = torch.ones_like(y)
    return forward, milliseconds(
        rt, lambda: torch.autograd.grad(y, qkv, grad, retain_graph=True), repeats)


def line_of(name, attend, qkv, small, args, flops, rt):
    """A line of the table."""
    if attend is None:
        return f"{name:8}  not installed"
    keys = min(args.window, 128)
    try:
        why = T.why_unusable(functools.partial(attend, band=keys),
                             functools.partial(kernels(rt)["sdpa"], band=keys), small, rt)
        forward, backward = measured(functools.partial(attend, band=args.window), qkv, rt,
                                     args.repeats)
    except Exception as problem:  # a kernel that does not run here is a line of the table
        text = (str(problem).splitlines() or [""])[0][:60]
        return f"{name:8}  does not run here: {type(problem).__name__}: {text}"
    return (f"{name:8}{'NO' if why else 'yes':>6}{forward:12.3f}{flops / forward / 1e9:9.4g}"
            f"{backward:13.3f}{2.5 * flops / backward / 1e9:9.4g}  {why}").rstrip()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--rows", type=int, default=48 if gpu else 2, help="rows of a pass")
    parser.add_argument("--tokens", type=int, default=2048 if gpu else 512, help="length of a row")
    parser.add_argument("--window", type=int, default=0, help="keys that a query sees; 0: all")
    parser.add_argument("--repeats", type=int, default=20 if gpu else 5)
    args = parser.parse_args()
    s = T.resolve_settings(os.environ)[0]
    rt = T.Runtime(s)
    heads = s.num_heads, s.num_kv_heads, s.num_kv_heads
    widths = [h * s.head_dim for h in heads]
    joined = torch.randn(args.rows, args.tokens, sum(widths), device=rt.device).to(rt.dtype)
    qkv = [x.unflatten(-1, (-1, s.head_dim)).requires_grad_() for x in joined.split(widths, -1)]
    small = T.random_inputs(rt, *[(1, 256, h, s.head_dim) for h in heads])
    seen = args.window or args.tokens
    pairs = args.rows * s.num_heads * (args.tokens * seen - seen * (seen - 1) / 2)
    print(f"{T.device_name(rt)}, torch {torch.__version__}, {rt.dtype}; {args.rows} rows of "
          f"{args.tokens}, {s.num_heads} heads over {s.num_kv_heads} of {s.head_dim}, window "
          f"{args.window or 'none'}")
    print(f"{'':8}{'right':>6}{'forward ms':>12}{'TFLOP/s':>9}{'backward ms':>13}{'TFLOP/s':>9}")
    for name, attend in kernels(rt).items():
        print(line_of(name, attend, qkv, small, args, 4 * s.head_dim * pairs, rt), flush=True)


if __name__ == "__main__":
    main()
