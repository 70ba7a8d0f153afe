"""Every attention back end at one shape: forward and backward in milliseconds and TFLOP/s, and whether it is right.

    python tests/bench/attention.py                                   # the default model's heads, 48 rows of 2,048 on a GPU
    python tests/bench/attention.py --rows 4 --window 2048 --tokens 6144   # with a window, as banded scoring asks for it

Settings by environment variables, as for the script. FLOPs are those of the positions that a query sees: 4·E a pair and head
forward, 2.5 times that backward. On a CPU: PyTorch's own kernels.
"""
import argparse
import functools
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt as T  # noqa: E402


def back_ends(rt):
    """{name: function} of what can be asked for here; None where it is not installed."""
    found, torch_kernels = {"sdpa": T.sdpa}, {name: T.torch_attention(kernel, strict=True) for name, kernel in T.TORCH_KERNELS.items()}
    if rt.device.type == "cuda":
        return {**{name: T.flash_attention(name) for name in T.FLASH_PACKAGES}, **torch_kernels,
                "flex": T.flex, **found}
    return {**found, "flash": torch_kernels["flash"], "math": T.torch_attention(SDPBackend.MATH)}


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


def measured(attend, qkv, window, rt, repeats):
    """(forward ms, backward ms) on q, k, v as slices of one product, which is how the model has them."""
    attend = rt.compiled(functools.partial(attend, window=window))
    with torch.no_grad():
        forward = milliseconds(rt, lambda: attend(*qkv), repeats)
    y = attend(*qkv)
    grad = torch.ones_like(y)
    return forward, milliseconds(rt, lambda: torch.autograd.grad(y, qkv, grad, retain_graph=True), repeats)


def masked(name, length, window, rt):
    """What this back end takes for a window: FlexAttention a mask, the others the number of keys."""
    return T.band_mask(length, window, rt.device) if name == "flex" and window else window


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--rows", type=int, default=48 if gpu else 2, help="rows of a pass")
    parser.add_argument("--tokens", type=int, default=2048 if gpu else 512, help="length of a row")
    parser.add_argument("--window", type=int, default=0, help="keys that a query sees; 0: all before it")
    parser.add_argument("--repeats", type=int, default=20 if gpu else 5)
    args = parser.parse_args()
    s = T.resolve_settings(os.environ)[0]
    rt = T.Runtime(s)
    widths = [h * s.head_dim for h in (s.num_heads, s.num_kv_heads, s.num_kv_heads)]
    joined = torch.randn(args.rows, args.tokens, sum(widths), device=rt.device).to(rt.dtype)
    qkv = [x.unflatten(-1, (-1, s.head_dim)).requires_grad_() for x in joined.split(widths, -1)]
    seen = args.window or args.tokens
    pairs = args.rows * s.num_heads * (args.tokens * seen - seen * (seen - 1) / 2)
    flops = 4 * s.head_dim * pairs
    print(f"{T.device_name(rt)}, torch {torch.__version__}, {rt.dtype}; {args.rows} rows of {args.tokens}, {s.num_heads} heads over "
          f"{s.num_kv_heads} of {s.head_dim}, window {args.window or 'none'}")
    print(f"{'':8}{'right':>6}{'forward ms':>12}{'TFLOP/s':>9}{'backward ms':>13}{'TFLOP/s':>9}")
    for name, attend in back_ends(rt).items():
        if attend is None:
            print(f"{name:8}  not installed")
            continue
        try:
            small = T.random_inputs(rt, *[(1, 256, heads, s.head_dim) for heads in (s.num_heads, s.num_kv_heads, s.num_kv_heads)])
            window = min(args.window, 128)
            right = not T.failure(functools.partial(attend, window=masked(name, 256, window, rt)),
                                  functools.partial(T.sdpa, window=window), small, rt)
            forward, backward = measured(attend, qkv, masked(name, args.tokens, args.window, rt), rt, args.repeats)
        except Exception as problem:  # a back end that does not run here is a line of the table
            print(f"{name:8}  does not run here: {type(problem).__name__}: {str(problem).splitlines()[0][:90]}")
            continue
        print(f"{name:8}{'yes' if right else 'NO':>6}{forward:12.3f}{flops / forward / 1e9:9.4g}{backward:13.3f}"
              f"{2.5 * flops / backward / 1e9:9.4g}", flush=True)


if __name__ == "__main__":
    main()
