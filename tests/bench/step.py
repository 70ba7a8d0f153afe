"""Where the time of a training step goes, and how far each phase is from what this device attains.

    python tests/bench/step.py                           # the default on a GPU, laptop on a CPU
    python tests/bench/step.py --against old_train_gpt.py    # both, interleaved in one run; ratios
    PRESET=laptop python tests/bench/step.py --tokens 4096   # settings as for the script
    torchrun --standalone --nproc_per_node=8 tests/bench/step.py      # with communication

Every phase is timed alone and warm: forward, backward, optimizer (with its communication), the same
collectives alone, weight averaging, the loader without compute beside it, and a step with the
loader behind it. "Attainable" is the time of a phase's parts, each measured alone in the same run:
products, attention and Newton–Schulz's products at their shapes, plus an estimate of the least
bytes of the rest over the bandwidth of a copy. Training data are random tokens in a temporary
shard, which the loader finds in the page cache. On a GPU all but the loader and the step begin
behind queued products, so that the host is ahead of the device as it is in training.
Each repeat is printed at its end, then the kernels with most time of three profiled steps, then
the tables.
"""
from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib.util
import inspect
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[2]
PHASES = ("forward", "backward", "optimizer", "communication", "average", "loader", "step")
LR_SCALE, MOMENTUM, ITERATIONS = 1.0, 0.95, 5  # the last: of Newton–Schulz
COLLECTIVES = ("sum_", "sum_later", "reduce_scatter", "all_gather")  # methods of Runtime

# Estimate: the least that elementwise work of a block moves between products and attention, whose
# reading and writing is in their time. One kernel for what touches the same tensor; a version that
# fuses some of it into a product can go below. Rows: the setting that switches it on; tensors
# [tokens, width] read or written, of width D, K·E, hidden: forward; backward.
ELEMENTWISE = (
    # x = y + b·mlp, u = RMS(x): reads mlp, y, writes x, u; reads du, dx, x, mlp, writes dmlp, dy
    ("", (4, 0, 0), (6, 0, 0)),
    # m₀·x + m₁·x₀ there: reads x₀; reads x₀, y for dm, reads and writes dx₀
    ("", (1, 0, 0), (4, 0, 0)),
    # half write x, half read it; half read x, write d, half read d
    ("unet_skips", (1, 0, 0), (1.5, 0, 0)),
    # RMS, rotation, gain of q, k: reads, writes them; reads d, q, k, writes d
    ("", (2, 2, 0), (3, 3, 0)),
    # a·v₀ + b·v: reads two, writes one; reads dv, v, v₀, dv₀, writes dv, dv₀
    ("value_residual", (0, 3, 0), (0, 6, 0)),
    # XSA and gate: reads y, v, writes y; reads dy, y, v, dv, writes dy, dv
    ("xsa_last_n", (2, 1, 0), (3, 3, 0)),
    # y = x + a·attn, u = RMS(y): as the first
    ("", (4, 0, 0), (6, 0, 0)),
    # LeakyReLU²: reads and writes one; reads d and its input, writes d
    ("", (0, 0, 2), (0, 0, 3)))
# Once, width D: reads token, bigram vectors, writes x₀; reads dx₀, x₀, writes d, table rows twice.
EMBEDDING = 3, 5
HEAD = 1, 2  # once, width V: reads logits; reads logits, writes their gradient


def load_script(path, name):
    """The script at `path` as a module."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # for its dataclasses
    spec.loader.exec_module(module)
    return module


def write_shard(module, folder, count, vocab_size):
    """A training shard of `count` random tokens."""
    header = np.zeros(256, "<i4")
    header[:3] = module.SHARD_MAGIC, module.SHARD_VERSION, count
    tokens = np.random.default_rng(0).integers(vocab_size, size=count).astype("<u2")
    Path(folder, "fineweb_train_000000.bin").write_bytes(header.tobytes() + tokens.tobytes())


@functools.cache
def filler(device):
    """A product that keeps a GPU busy for a while."""
    a, b, out = (torch.zeros(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(3))
    return functools.partial(torch.mm, a, b, out=out)


def timed(rt, work, ahead=True):
    """(milliseconds, result) of work(), which all ranks begin together; with `ahead` a GPU is busy
    before."""
    rt.synchronize()
    rt.sum_(torch.zeros(1))
    if rt.device.type != "cuda":
        start = time.perf_counter()
        result = work()
        return 1000 * (time.perf_counter() - start), result
    for _ in range(8 if ahead else 0):
        filler(rt.device)()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result = work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end), result


def alone(rt, work, repeats):
    """Median milliseconds of work(), warm; on a GPU the mean of ten in a row each time."""
    inner = 10 if rt.device.type == "cuda" else 1

    def several():
        for _ in range(inner):
            work()

    several()
    return statistics.median(timed(rt, several)[0] for _ in range(repeats)) / inner


def recorded_collectives(rt, work):
    """[(method, tensor like its input)] of the collectives in work()."""
    calls, running = [], []

    def recorder(name, method):
        def call(x):
            if not running:  # one may be made of another
                calls.append((name, torch.zeros_like(x)))
            running.append(name)
            result = method(x)
            running.pop()
            return result
        return call

    with mock.patch.multiple(rt, **{n: recorder(n, getattr(rt, n)) for n in COLLECTIVES}):
        work()
    return calls


def communicate(rt, calls):
    """The collectives [(method, tensor)]; those that only start return a function that waits."""
    for started in [getattr(rt, name)(x) for name, x in calls]:
        if callable(started):
            started()


def total_bytes(rt, name, x):
    """Bytes of the tensor that a collective of x splits, sums or gathers."""
    return x.nbytes * (rt.world_size if name == "all_gather" else 1)


def memory(rt, most=""):
    """Bytes allocated and reserved on this rank's GPU: now, which starts a new peak, or with "max_"
    the peak."""
    if rt.device.type != "cuda":
        return 0, 0
    if not most:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(rt.device)
    return [getattr(torch.cuda, f"{most}memory_{kind}")(rt.device)
            for kind in ("allocated", "reserved")]


class Version:
    """A script's model, optimizers, averages and loader, compiled and warm."""

    def __init__(self, label, module, s, rt):
        self.label, self.module, self.s, self.rt = label, module, s, rt
        self.tokens, held = s.train_batch_tokens // rt.world_size, memory(rt)
        self.model, self.chosen = module.build_model(s, rt)[:2]
        self.forward = rt.compiled(self.model)
        more = [None] * ("checkpoints" in inspect.signature(module.Trainer).parameters)
        self.trainer = module.Trainer(self.model, self.forward, s, rt, *more)
        self.averages = module.WeightAverage(self.model, s)
        self.optimizers, self.weights = self.trainer.optimizers, list(self.model.parameters())
        self.batches = module.batches_of(module.TrainStream(s), rt, self.trainer.rows_per_step)
        with self.kernels():
            self.step()
            memory(rt)
            self.step()
            self.peak = [most - before for most, before in zip(memory(rt, "max_"), held)]
            self.collectives = recorded_collectives(rt, self.step)
        self.kept = [p.detach().clone() for p in self.weights]

    # -- where earlier versions differ

    def kernels(self):
        """Earlier versions choose the kernel of attention by a context around their work."""
        first = getattr(self.module, "torch_kernel_first", None)
        return first(self.chosen["attention"]) if first else contextlib.nullcontext()

    def step(self):
        batch = next(self.batches)
        if hasattr(self.trainer, "optimize"):
            return self.trainer.optimize(batch, LR_SCALE, MOMENTUM)  # with the late passes
        return self.trainer.step(batch, LR_SCALE, MOMENTUM, False)  # without fake quantization

    def stacks(self):
        """[(Newton–Schulz, matrices of one shape)] of Muon."""
        if hasattr(self.optimizers, "muon"):
            return [(self.optimizers.orthogonalize, g.params) for g, *_ in self.optimizers.muon]
        return [(group.orthogonalize,  # earlier versions have no parts
                 [x if isinstance(x, torch.Tensor) else x[0][x[1]] for x in stack])
                for group in self.optimizers.groups if group.sharded
                for stack in group.stacks.values()]

    def blocks_run(self):
        """Passes through a block in one forward; earlier versions had one for each block."""
        passes = getattr(self.model, "passes", None)
        return len(passes[True]) if passes else self.s.num_layers

    # -- measurements

    @torch.no_grad()
    def reset(self):
        torch._foreach_copy_(self.weights, self.kept)

    def repeat(self):
        """{phase: milliseconds} of one repeat; weights are afterwards what they were."""
        rt, s, ms = self.rt, self.s, {}

        def forward():
            nll = self.forward(rows[:, :-1].long(), rows[:, 1:].long())
            return nll.sum() / s.train_batch_tokens

        with self.kernels():
            # Two batches: one is ready before.
            ms["loader"], (_, rows) = timed(
                rt, lambda: (next(self.batches), next(self.batches)), ahead=False)
            self.model.zero_grad(set_to_none=True)
            ms["forward"], loss = timed(rt, forward)
            ms["backward"] = timed(rt, loss.backward)[0]
            del loss  # and with it what its graph still holds
            ms["optimizer"] = timed(rt, lambda: self.optimizers.step(LR_SCALE, MOMENTUM))[0]
            ms["average"] = timed(rt, lambda: self.averages.update(1, 1.0))[0]
            if rt.world_size > 1:
                ms["communication"] = timed(rt, lambda: communicate(rt, self.collectives))[0]
            self.reset()
            ms["step"] = timed(rt, self.step, ahead=False)[0]
            self.reset()
        return ms

    def kernel_lines(self):
        """The kernels (on a CPU: operators) with most time in three steps, of each step."""
        where, kind, most = ((ProfilerActivity.CUDA, "device", 40)
                             if self.rt.device.type == "cuda" else (ProfilerActivity.CPU, "cpu", 5))
        with profile(activities=[where]) as seen, self.kernels():
            for _ in range(3):
                self.step()
            self.rt.synchronize()
        self.reset()
        ms = {e: getattr(e, f"self_{kind}_time_total") / 3000 for e in seen.key_averages()}
        yield f"{self.label:<5} profiled: {sum(ms.values()):.3f} ms a step; ms, calls, kernel"
        for e in sorted(ms, key=ms.get, reverse=True)[:most]:
            yield f"{self.label:<5} {ms[e]:>9.3f} {e.count / 3:>7.1f}  {e.key[:90]}"

    def elementwise_bytes(self, backward):
        """Estimated bytes of a pass's elementwise work."""
        s = self.s
        widths = s.model_dim, s.num_kv_heads * s.head_dim, s.mlp_hidden
        block = sum(n * width for switch, *counts in ELEMENTWISE
                    if not switch or str(getattr(s, switch)) != "0"
                    for n, width in zip(counts[backward], widths))
        once = EMBEDDING[backward] * s.model_dim + HEAD[backward] * s.vocab_size
        return self.tokens * self.rt.dtype.itemsize * (self.blocks_run() * block + once)

    def saved_bytes(self):
        """Bytes per token that an eager forward keeps for its backward, each storage once: two rows
        less one, so that weights and tables drop out."""
        storages, row, sizes = {}, next(self.batches)[:1], []

        def keep(x):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        for rows in row, row.repeat(2, 1):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                nll = self.model(rows[:, :-1].long(), rows[:, 1:].long())
            sizes.append(sum(storages.values()))
            storages.clear()
            del nll  # until here it held what was counted
        return (sizes[1] - sizes[0]) / self.s.train_seq_len


class Products(TorchFunctionMode):
    """Counts the products of an eager forward of `tokens` tokens: {(rows per token, K, N): n}."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens, self.counts = tokens, Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, w = args[:2]
            self.counts[x.numel() / x.size(-1) / self.tokens, w.size(1), w.size(0)] += 1
        return func(*args, **(kwargs or {}))


def rate(flop, ms):
    """TFLOP/s, as text."""
    return f"{flop / ms / 1e9:.3f}"


class Floor:
    """What this device attains: copies, products, collectives. A shape is measured once."""

    def __init__(self, rt, repeats):
        self.rt, self.repeats, self.collective = rt, repeats, {}
        self.product = functools.cache(self._product)
        self.iteration = functools.cache(self._iteration)
        cuda = rt.device.type == "cuda"
        n, dtype = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
        a, b = (self.random(n, n).to(dtype) for _ in range(2))
        self.best = f"{n}³ {dtype} {rate(2 * n**3, self.alone(lambda: a @ b))} TFLOP/s"
        x, y = (torch.zeros(2**28 if cuda else 2**25, device=rt.device) for _ in range(2))
        self.copy = 2 * x.nbytes / self.alone(lambda: x.copy_(y))  # bytes per ms, as below
        for name in ("sum_", "reduce_scatter", "all_gather") if rt.world_size > 1 else ():
            parts = 1 if name == "all_gather" else rt.world_size
            part = x[: len(x) // 8 // rt.world_size * parts]
            ms = self.alone(lambda: communicate(rt, [(name, part)]))
            self.collective[name.rstrip("_")] = total_bytes(rt, name, part) / ms

    def alone(self, work):
        return alone(self.rt, work, self.repeats)

    def random(self, *shape):
        return torch.randn(shape, device=self.rt.device).to(self.rt.dtype)

    def _product(self, M, K, N):
        """Milliseconds of x[M,K]·wᵀ, its dgrad g[M,N]·w and its wgrad gᵀ·x."""
        x, g, w = self.random(M, K), self.random(M, N), self.random(N, K)
        return [self.alone(work) for work in (
            lambda: torch.mm(x, w.mT), lambda: torch.mm(g, w), lambda: torch.mm(g.mT, x))]

    def _iteration(self, n, R, C):
        """Milliseconds of the three products of a Newton–Schulz iteration for n matrices [R,C]."""
        x, gram = self.random(n, R, C), self.random(n, R, R)
        pairs = (x, x.mT), (gram, gram), (gram, x)
        return sum(self.alone(lambda: torch.bmm(a, b)) for a, b in pairs)

    def attention(self, version):
        """Milliseconds of one block's attention alone on all rows, forward and backward."""
        s, rt, rows = version.s, self.rt, version.tokens // version.s.train_seq_len
        attend = rt.compiled(version.model.cores[0].attn.attend)
        qkv = [self.random(rows, s.train_seq_len, heads, s.head_dim).requires_grad_()
               for heads in (s.num_heads, s.num_kv_heads, s.num_kv_heads)]
        back = []
        with version.kernels():
            for _ in range(self.repeats + 1):
                y = attend(*qkv)
                grad = torch.randn_like(y)
                back.append(timed(rt, lambda: torch.autograd.grad(y, qkv, grad))[0])
            return self.alone(lambda: attend(*qkv)), statistics.median(back[1:])


def passes(version, floor):
    """{forward, backward: (FLOP, bytes, attainable ms)}, and the lines of the products table."""
    s, tokens, blocks, lines = version.s, version.tokens, version.blocks_run(), []
    flop, ms = [0, 0], [0.0, 0.0]
    with Products(s.train_seq_len) as products, version.kernels():
        version.model(*torch.randint(s.vocab_size, (2, 1, s.train_seq_len),
                                     device=version.rt.device))  # tokens, targets
    for (ratio, K, N), n in products.counts.items():
        M = round(ratio * tokens)
        times = floor.product(M, K, N)
        for i, part in enumerate((times[:1], times[1:])):
            flop[i], ms[i] = flop[i] + n * len(part) * 2 * M * K * N, ms[i] + n * sum(part)
        lines.append(f"{version.label:<5} {f'{M} × {K} × {N}':<22} {n:>5}"
                     + "".join(f" {t:>9.3f} {rate(2 * M * K * N, t):>8}" for t in times))
    pairs = 2 * tokens * s.train_seq_len * s.num_heads * s.head_dim  # causal: 4·T²/2·H·E a row
    result = {}
    for i, (phase, t, f) in enumerate(zip(PHASES, floor.attention(version), (pairs, 2.5 * pairs))):
        lines.append(f"{version.label:<5} {'attention, ' + phase:<22} {blocks:>5} {t:>9.3f} "
                     f"{rate(f, t):>8}")
        moved = version.elementwise_bytes(i)
        result[phase] = flop[i] + blocks * f, moved, ms[i] + blocks * t + moved / floor.copy
    return result, lines


def attainable(version, floor):
    """{phase: (FLOP, bytes, attainable ms)}, and the lines of the products table."""
    s, rt = version.s, version.rt
    result, lines = passes(version, floor)
    talk = [(name.removesuffix("_later").rstrip("_"), total_bytes(rt, name, x))
            for name, x in version.collectives if rt.world_size > 1]
    result["communication"] = (0, sum(size for _, size in talk),
                               sum(size / floor.collective[name] for name, size in talk))
    parts = [(-(-len(stack) // rt.world_size), *sorted(stack[0].shape))
             for _, stack in version.stacks()]
    matrices = sum(p.numel() for _, stack in version.stacks() for p in stack)
    small = sum(p.numel() for p in version.weights) - matrices
    # fp32: every rank reads all gradients, reads and writes all parameters, two moments of the
    # small ones and its part of the momentum.
    moved = 4 * (3 * matrices + 2 * matrices / rt.world_size + 7 * small)
    result["optimizer"] = (
        sum(ITERATIONS * n * (4 * R * R * C + 2 * R**3) for n, R, C in parts), moved,
        moved / floor.copy + ITERATIONS * sum(floor.iteration(*part) for part in parts)
        + result["communication"][2])
    moved = 4 * 3 * (matrices + small) * s.ema_enabled  # parameters read, averages read, written
    result["average"] = 0, moved, moved / floor.copy
    result["step"] = tuple(sum(result[phase][i] for phase in ("forward", "backward", "optimizer"))
                           for i in range(3))
    return result, lines


def phase_lines(version, measured, floors, others):
    """The rows of the phase table for one version; others: the older version's measurements."""
    for phase in PHASES:
        if phase not in measured:
            yield f"{version.label:<5} {phase:<14} {'none':>10}"
            continue
        low, middle, high = np.percentile(measured[phase], [25, 50, 75])
        line = f"{version.label:<5} {phase:<14} {middle:>10.3f} {high - low:>8.3f} "
        if phase in floors:
            flop, moved, best = floors[phase]
            line += (f"{flop / 1e12:>9.4f} {moved / 1e9:>8.3f} {best:>14.3f} "
                     f"{best / middle:>11.2f}")
        ratio = f"{np.median(others[phase]) / middle:>10.3f}" if others else ""
        yield f"{line:<86}{ratio}".rstrip()


def eight_gpus(version, middle, floor, bus):
    """Estimate: a step of 8 GPUs with these tokens each, from one device; `bus` (GB/s) assumed."""
    now = then = 0.0
    with torch.no_grad():
        for orthogonalize, stack in version.stacks():
            x = torch.randn(len(stack), *sorted(stack[0].shape), device=version.rt.device)
            ms = floor.alone(lambda: orthogonalize(x))
            now, then = now + ms, then + ms * -(-len(stack) // 8) / len(stack)
    sent = 7 / 8 * sum(x.nbytes * (2 if name.startswith("sum") else -(-len(x) // 8) * 8 / len(x))
                       for name, x in version.collectives)  # a ring's; padded to the ranks
    both = middle["forward"] + middle["backward"]
    optimizer, talk = max(middle["optimizer"] - now, 0) + then, sent / bus / 1e6
    total = both + optimizer + talk
    return (f"{version.label:<5} estimate for 8 GPUs: {total:.2f} ms a step, "
            f"{8000 * version.tokens / total:,.0f} tokens/s =\n"
            f"{'':<5} {both:.2f} forward, backward as measured + {optimizer:.2f} optimizer "
            f"(Newton–Schulz {now:.2f} measured, a rank's part {then:.2f})\n"
            f"{'':<5} + {talk:.2f} communication ({sent / 1e9:.3f} GB at an assumed {bus:g} GB/s)")


def summary(version, measured, floor, bus):
    """Lines on speed, loader, memory, and the estimate for 8 GPUs."""
    middle = {phase: float(np.median(values)) for phase, values in measured.items()}
    part, label = middle["loader"] / middle["step"], f"{version.label:<5}"
    yield (f"{label} {1000 * version.s.train_batch_tokens / middle['step']:,.0f} tokens/s; loader "
           f"{100 * part:.2f} % of a step: {'hidden' if part < 1 else 'not hidden'}")
    if version.rt.device.type == "cuda":
        allocated, reserved = (f"{n >> 20:,} MiB" for n in version.peak)
        yield f"{label} peak memory allocated {allocated}, reserved {reserved}"
    else:
        yield (f"{label} kept for backward by an eager forward: {version.saved_bytes():,.0f} "
               "bytes per token")
    if version.rt.world_size == 1:
        yield eight_gpus(version, middle, floor, bus)


def report(versions, measured, floor, bus):
    """The output, line by line."""
    s, rt = versions[0].s, versions[0].rt
    for v in versions:
        digest = hashlib.sha256(Path(v.module.__file__).read_bytes()).hexdigest()[:16]
        yield f"{v.label:<5} {v.module.__file__}, {digest}, computes with {v.chosen}"
    device = (torch.cuda.get_device_name(rt.device) if rt.device.type == "cuda"
              else f"CPU, {torch.get_num_threads()} threads")
    yield (f"{device}, torch {torch.__version__}, {rt.dtype}, compile "
           f"{'on' if rt.compile else 'off'}, repeats {floor.repeats}")
    yield (f"preset {s.preset or 'none'}, {s.num_layers} × {s.model_dim}, rows of "
           f"{s.train_seq_len}; ranks {rt.world_size}, tokens of each {versions[0].tokens}")
    yield f"attained: product {floor.best}; copy {floor.copy / 1e6:.1f} GB/s" + "".join(
        f"; {name} {speed / 1e6:.2f} GB/s" for name, speed in floor.collective.items())
    floors = {v: attainable(v, floor) for v in versions}
    yield (f"\n{'':<5} {'phase':<14} {'ms':>10} {'± IQR':>8} {'TFLOP':>9} {'GB':>8} "
           f"{'attainable ms':>14} {'÷ measured':>11}" + " old ÷ new" * (len(versions) > 1))
    for i, v in enumerate(versions):
        older = measured[versions[1]] if versions[i + 1:] else None
        yield from phase_lines(v, measured[v], floors[v][0], older)
    yield ("GB (communication's apart) are estimates, and with them attainable; a step's is "
           "forward + backward + optimizer.")
    yield (f"\n{'':<5} {'M × K × N of x·wᵀ':<22} {'times':>5} {'ms':>9} {'TFLOP/s':>8} "
           f"{'dgrad ms':>9} {'TFLOP/s':>8} {'wgrad ms':>9} {'TFLOP/s':>8}")
    yield from (line for v in versions for line in floors[v][1])
    yield ""
    for v in versions:
        yield from summary(v, measured[v], floor, bus)


def prepared(arguments, folder, on_gpu):
    """The versions, new first, in one process group."""
    paths = dict(new=arguments.script, old=arguments.against)
    modules = {label: load_script(path, f"train_gpt_{label}")
               for label, path in paths.items() if path}
    ranks = modules["new"].launched_ranks(os.environ)
    environ = {**({} if on_gpu else dict(PRESET="laptop")), **os.environ, "DATA_PATH": folder,
               "TRAIN_BATCH_TOKENS": str(arguments.tokens * ranks[1]),
               "MICRO_BATCH_TOKENS": str(arguments.tokens)}
    settings = {}
    for label, module in modules.items():
        try:
            s = settings[label] = module.resolve_settings(environ)[0]
        except module.UserError as problem:
            raise SystemExit(f"error: {problem}") from None
        if arguments.tokens % s.train_seq_len:
            raise SystemExit(f"error: --tokens must be rows of TRAIN_SEQ_LEN={s.train_seq_len}")
    write_shard(modules["new"], folder, 8 * arguments.tokens * ranks[1] + 1,
                min(s.vocab_size for s in settings.values()))
    torch._dynamo.config.cache_size_limit = 64  # as the script sets it
    versions = []
    for label, module in modules.items():
        again = mock.patch("torch.distributed.init_process_group")
        with again if versions else contextlib.nullcontext():
            rt = module.Runtime(settings[label], ranks)
        versions.append(Version(label, module, settings[label], rt))
    return versions


def main():
    cuda = torch.cuda.is_available() and os.environ.get("DEVICE") != "cpu"
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--script", type=Path, default=ROOT / "train_gpt.py")
    add("--against", type=Path, help="another version, compared in the same run")
    add("--tokens", type=int, default=98304 if cuda else 4096, help="of a rank in a step")
    add("--repeats", type=int, default=20 if cuda else 7)
    add("--bus", type=float, default=350, help="GB/s between 8 GPUs, assumed for the estimate")
    add("--out", type=Path, help="append the output to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        versions = prepared(arguments, folder, cuda)
        measured, rt = {v: {} for v in versions}, versions[0].rt
        rt.log_path = arguments.out if rt.rank == 0 else None
        for n in range(arguments.repeats):
            for v in versions:
                found = v.repeat()
                rt.log(f"{v.label:<5} repeat {n + 1}: "
                       + ", ".join(f"{phase} {ms:.3f}" for phase, ms in found.items()))
                for phase, ms in found.items():
                    measured[v].setdefault(phase, []).append(ms)
        for line in itertools.chain(*(v.kernel_lines() for v in versions)):
            rt.log(line)
        for line in report(versions, measured, Floor(rt, arguments.repeats), arguments.bus):
            rt.log(line)
        for v in versions:
            v.batches.close()
        rt.close()


if __name__ == "__main__":
    main()
