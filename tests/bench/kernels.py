"""Every kernel of attention or of the MLP at one shape: is it right, milliseconds and TFLOP/s.

    python tests/bench/kernels.py          # attention of the default, 48 rows of 2,048 on a GPU
    python tests/bench/kernels.py --document 800    # as in training: attention ends at documents
    python tests/bench/kernels.py --rows 10 --tokens 6144 --window 2048    # as in banded scoring
    python tests/bench/kernels.py --mlp    # the compiler's MLP, the Triton kernel by its tiles

train_gpt.py times no kernel: it takes the first right one in a fixed order, so that the same
machine chooses the same. The times behind that order, behind MLP_TILE and behind ATTENTION=<name>
are made here. Settings by environment variables, as for the script. FLOPs of attention are those of
the positions that a query sees: 4·E a pair and head forward, 2.5 times that backward; of the MLP
4·D·R a token, twice that backward. On a CPU: PyTorch's choice.
"""
import argparse
import functools
import os
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt as T  # noqa: E402

TILES = [dict(zip(("BM", "BN", "BK", "num_warps", "num_stages"), tile)) for tile in (
    (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 256, 32, 8, 4), (256, 128, 64, 8, 3),
    (128, 128, 64, 8, 3), (128, 128, 64, 4, 4), (64, 256, 64, 8, 4))]  # the first: the script's


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


def measured(function, inputs, rt, repeats):
    """(forward ms, backward ms)."""
    function = rt.compiled(function)
    with torch.no_grad():
        forward = milliseconds(rt, lambda: function(*inputs), repeats)
    y = function(*inputs)
    grad = torch.ones_like(y)
    return forward, milliseconds(
        rt, lambda: torch.autograd.grad(y, inputs, grad, retain_graph=True), repeats)


def line_of(name, function, inputs, small, reference, repeats, flops, backward_flops, rt):
    """A line of the table. small: (function, inputs) to compare with the reference."""
    if function is None:
        return f"{name:18}  not installed"
    try:
        why = T.why_unusable(small[0], reference, small[1], rt)
        forward, backward = measured(function, inputs, rt, repeats)
    except Exception as problem:  # a kernel that does not run here is a line of the table
        return f"{name:18}  does not run here: {T.in_a_line(problem)}"
    return (f"{name:18}{'NO' if why else 'yes':>6}{forward:12.3f}{flops / forward / 1e9:9.4g}"
            f"{backward:13.3f}{backward_flops / backward / 1e9:9.4g}  {why}").rstrip()


def attention_lines(s, rt, args):
    """q, k, v are slices of one product; what a query sees is made beforehand: as in the model."""
    heads = s.num_heads, s.num_kv_heads, s.num_kv_heads
    widths = [h * s.head_dim for h in heads]
    joined = torch.randn(args.rows, args.tokens, sum(widths), device=rt.device).to(rt.dtype)
    qkv = [x.unflatten(-1, (-1, s.head_dim)).requires_grad_() for x in joined.split(widths, -1)]
    small = T.random_inputs(rt, *[(1, 256, h, s.head_dim) for h in heads])
    chance = 1 / args.document if args.document else 0
    starts = torch.rand(args.rows, args.tokens, generator=torch.Generator().manual_seed(0)) < chance
    starts[:, 0] = True
    borders = starts.flatten().nonzero().flatten()
    lengths = torch.diff(borders, append=torch.tensor([starts.numel()])).double()
    seen = lengths.clamp(max=args.window or args.tokens)
    flops = 4 * s.head_dim * s.num_heads * float((seen * (lengths - (seen - 1) / 2)).sum())
    band, starts = min(args.window, 128), starts.to(rt.device) if args.document else None
    few = (torch.arange(256, device=rt.device) == 100)[None] if args.document else None

    def bound(kernel, x, band, starts):
        visible = kernel[1](x, band, starts)
        return lambda q, k, v: kernel[0](q, k, v, visible)

    exact = bound(T.attention_kernel("sdpa"), small[0], band, few)
    for name in [*T.ATTENTION, "sdpa"] if rt.device.type == "cuda" else ["sdpa"]:
        kernel = T.attention_kernel(name, strict=True)  # None: a package is missing
        yield (name, kernel and bound(kernel, qkv[0], args.window, starts), qkv,
               kernel and (bound(kernel, small[0], band, few), small), exact, args.repeats, flops,
               2.5 * flops, rt)


def mlp_lines(s, rt, args):
    N, D, R = args.rows * args.tokens, s.model_dim, s.mlp_hidden
    inputs, small = T.random_inputs(rt, (N, D), (R, D), (D, R)), T.random_inputs(
        rt, (256, D), (R, D), (D, R))
    plain = functools.partial(T.leaky_square_mlp, slope=s.leaky_slope)
    flops = 4.0 * N * D * R
    rows = {"the compiler's": (plain, {})}
    if rt.device.type == "cuda":
        rows |= {" × ".join(map(str, tile.values())): (
            lambda u, up, down: T.LeakySquareMLP.apply(u, up, down, s.leaky_slope), tile)
            for tile in TILES}
    for name, (function, tile) in rows.items():
        with mock.patch.dict(T.MLP_TILE, tile):
            torch._dynamo.reset()  # compiled code holds the tile
            yield (name, function, inputs, (function, small), plain, args.repeats, flops,
                   2 * flops, rt)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--mlp", action="store_true", help="the MLP instead of attention")
    parser.add_argument("--rows", type=int, default=48 if gpu else 2, help="rows of a pass")
    parser.add_argument("--tokens", type=int, default=2048 if gpu else 512, help="length of a row")
    parser.add_argument("--window", type=int, default=0, help="keys that a query sees; 0: all")
    parser.add_argument("--document", type=int, default=0,
                        help="mean tokens of a document, where attention ends; 0: rows alone")
    parser.add_argument("--repeats", type=int, default=20 if gpu else 5)
    args = parser.parse_args()
    s = T.resolve_settings(os.environ)[0]
    rt = T.Runtime(s)
    what = (f"MLP {s.model_dim} → {s.mlp_hidden}, BM × BN × BK × warps × stages" if args.mlp else
            f"{s.num_heads} heads over {s.num_kv_heads} of {s.head_dim}, window "
            f"{args.window or 'none'}, documents of {args.document or args.tokens} tokens")
    print(f"{T.device_name(rt)}, torch {torch.__version__}, {rt.dtype}; {args.rows} rows of "
          f"{args.tokens}, {what}")
    print(f"{'':18}{'right':>6}{'forward ms':>12}{'TFLOP/s':>9}{'backward ms':>13}{'TFLOP/s':>9}")
    for row in (mlp_lines if args.mlp else attention_lines)(s, rt, args):
        print(line_of(*row), flush=True)


if __name__ == "__main__":
    main()
