"""What the compiler makes of a block, counted without a GPU: kernels, bytes moved and kept.

    python tests/bench/graphs.py [script ...]     # default: this repository's; ten minutes each

The default model in bf16, compiled for this CPU with 2 and with 4 blocks; half the difference is a
block. The last line is what the whole default keeps for a token of a micro-batch. Bytes are in
units of a tensor [tokens, D], products included. The compiler counts a slice as the whole tensor
where a kernel reads it along another one, so that a joined product looks dearer than it is; fusion
on a GPU differs in details.
"""
import collections
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
ROWS, T = 16, 1024


def counted(script, blocks, rows, late):
    """[kernels forward, backward, units moved forward, backward, bytes kept per token] of a model
    of so many blocks, in rows of T tokens, with these LATE_PASSES."""
    from torch._inductor import metrics
    torch._logging.set_logs(inductor_metrics=True)  # without it nothing is counted
    spec = importlib.util.spec_from_file_location("counted_script", script)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    settings = dict(NUM_LAYERS=blocks, LATE_PASSES=late, DEVICE="cpu",
                    COMPILE=1, TRAIN_SEQ_LEN=T, TRAIN_BATCH_TOKENS=rows * T,
                    MICRO_BATCH_TOKENS=rows * T)
    s = module.resolve_settings({k: str(v) for k, v in settings.items()})[0]
    rt = module.Runtime(s)
    rt.dtype = torch.bfloat16
    model = module.build_model(s, rt)[0]
    tokens = torch.randint(s.vocab_size, (rows, T + 1))
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    kept, found = collections.Counter(), []

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    metrics.reset()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        nll = torch.compile(model, dynamic=False)(tokens[:, :-1], tokens[:, 1:])
    unit = rows * T * s.model_dim * 2
    for work in (lambda: None, nll.sum().backward):
        work()
        found.append((metrics.generated_kernel_count, metrics.num_bytes_accessed / unit))
        metrics.reset()
    (kernels, units), (kernels_back, units_back) = found
    kept_bytes = sum(n for place, n in kept.items() if place not in own)
    return [kernels, kernels_back, units, units_back, kept_bytes / (rows * T)]


def in_a_process(script, blocks, rows=ROWS, late=""):
    """counted() in a fresh process without the compiler's cache."""
    done = subprocess.run(
        [sys.executable, __file__, "--count", script, str(blocks), str(rows), late],
        capture_output=True, text=True, check=True,
        env=dict(os.environ, TORCHINDUCTOR_FORCE_DISABLE_CACHES="1"))
    return [float(x) for x in done.stdout.split()[-5:]]


def main(scripts):
    def row(label, n):
        print(f"{label:40}{n[0]:9.1f}{n[1]:9.1f}{n[2]:8.1f}{n[3]:9.1f}{n[4]:12,.0f}", flush=True)

    print(f"{'a block of':40}{'kernels':>9}{'backward':>9}{'units':>8}{'backward':>9}{'kept':>12}")
    for script in scripts:
        two, four = (in_a_process(script, blocks) for blocks in (2, 4))
        block = [(b - a) / 2 for a, b in zip(two, four)]
        row(script[-39:], block)
        row("  without blocks", [a - 2 * b for a, b in zip(two, block)])
        one, three = (in_a_process(script, 11, rows, "auto")[-1] for rows in (1, 3))
        kept = (3 * three - one) / 2  # of one row more: without what is kept once
        print(f"{'  the default, with its late passes':69}{kept:12,.0f}", flush=True)


if __name__ == "__main__":
    if "--count" in sys.argv:
        script, blocks, rows, late = sys.argv[-4:]
        print(*counted(script, int(blocks), int(rows), late))
    elif any(a.startswith("-") for a in sys.argv[1:]):
        sys.exit(__doc__)
    else:
        main(sys.argv[1:] or [str(ROOT / "train_gpt.py")])
