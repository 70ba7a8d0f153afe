"""Where the time of a training step goes, and how far each phase is from what this device can attain.

    python tests/bench/step.py                                        # default model on a GPU, a small shape on a CPU
    python tests/bench/step.py --against old_train_gpt.py             # both versions, interleaved in one run; ratios
    PRESET=laptop python tests/bench/step.py --tokens 4096            # settings by environment variables, as for the script
    torchrun --standalone --nproc_per_node=8 tests/bench/step.py      # with communication; rank 0 prints its own times

Every phase is timed alone and warm: forward, backward, optimizer (with several ranks its communication is in it), the same
collectives alone, weight averaging, the loader without compute beside it, and a whole step with the loader behind it.
"Attainable" is the time of a phase's parts, each measured alone in the same run: products, attention and Newton–Schulz's
products at their own shapes, plus an estimate of the least bytes of the rest over the bandwidth of a copy. Training data are
random tokens in a temporary shard, which the loader finds in the page cache. On a GPU all but the loader and the whole step
begin behind queued products, so that the host is ahead of the device as it is in training.
"""
from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import inspect
import importlib.util
import math
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

ROOT = Path(__file__).resolve().parents[2]
PHASES = ("forward", "backward", "optimizer", "communication", "average", "loader", "step")
LR_SCALE, MOMENTUM = 1.0, 0.95
COLLECTIVES = ("sum_", "sum_later", "reduce_scatter", "all_gather")  # methods of Runtime; not every version has all

# Estimate: the least that elementwise work moves between products and attention, whose own reading and writing is in their
# time. One kernel for what touches the same tensor; a version that fuses some of it into a product can go below.
ELEMENTWISE = (  # of a block: switched on by; tensors [tokens, width] read or written, width D, K·E, hidden: forward; backward
    ("", (4, 0, 0), (6, 0, 0)),  # x = y + b·mlp, u = RMS(x): reads mlp, y, writes x, u; reads du, dx, x, mlp, writes dmlp, dy
    ("resid_mix", (1, 0, 0), (4, 0, 0)),  # m₀·x + m₁·x₀ there: reads x₀; reads x₀, y for dm, reads and writes dx₀
    ("unet_skips", (1, 0, 0), (1.5, 0, 0)),  # half write x, half read it; half read x, write d, half read d
    ("", (2, 2, 0), (3, 3, 0)),  # RMS, rotation, gain of q, k: reads, writes them; reads d, q, k, writes d
    ("value_residual", (0, 3, 0), (0, 6, 0)),  # a·v₀ + b·v: reads two, writes one; reads dv, v, v₀, dv₀, writes dv, dv₀
    ("xsa_last_n", (2, 1, 0), (3, 3, 0)),  # XSA and gate: reads y, v, writes y; reads dy, y, v, dv, writes dy, dv
    ("", (4, 0, 0), (6, 0, 0)),  # y = x + a·attn, u = RMS(y): as the first
    ("", (0, 0, 2), (0, 0, 3)))  # LeakyReLU²: reads and writes one; reads d and its input, writes d
EMBEDDING = 3, 5  # once, width D: reads token, bigram vectors, writes x₀; reads dx₀, x₀, writes d, reads, writes table rows
HEAD = 1, 2  # once, width V: reads logits; reads logits, writes their gradient


def elementwise_bytes(s, tokens, item, backward):
    """Estimated bytes of a pass's elementwise work on `tokens` in a type of `item` bytes."""
    widths = s.model_dim, s.num_kv_heads * s.head_dim, s.mlp_hidden
    block = sum(n * width for switch, *counts in ELEMENTWISE if not switch or str(getattr(s, switch)) != "0"
                for n, width in zip(counts[backward], widths))
    return tokens * item * (s.num_layers * block + EMBEDDING[backward] * s.model_dim + HEAD[backward] * s.vocab_size)


def load_script(path, name):
    """The script at `path` as a module of its own."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


def write_shard(module, folder, count, vocab_size):
    """A training shard of `count` random tokens."""
    header = np.zeros(256, "<i4")
    header[:3] = module.SHARD_MAGIC, module.SHARD_VERSION, count
    tokens = np.random.default_rng(0).integers(vocab_size, size=count).astype("<u2")
    (Path(folder) / "fineweb_train_000000.bin").write_bytes(header.tobytes() + tokens.tobytes())


@functools.cache
def filler(device):
    """A product that keeps a GPU busy for a while."""
    a, b, out = (torch.zeros(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(3))
    return functools.partial(torch.mm, a, b, out=out)


def timed(rt, work, ahead=True):
    """(milliseconds, result) of work(), begun by all ranks together; with `ahead` a GPU has something to do before."""
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
    """[(method, tensor like the one it was given)] of the collectives that work() asks `rt` for."""
    calls, running = [], []

    def recorder(name, method):
        def call(x):
            calls.extend([(name, torch.zeros_like(x))] if not running else [])  # one may be made of another
            running.append(name)
            result = method(x)
            running.pop()
            return result
        return call

    with mock.patch.multiple(rt, **{name: recorder(name, getattr(rt, name)) for name in COLLECTIVES if hasattr(rt, name)}):
        work()
    return calls


def communicate(rt, calls):
    """The collectives [(method, tensor)]; in some versions one begins and returns a function that waits for it."""
    for begun in [getattr(rt, name)(x) for name, x in calls]:
        if callable(begun):
            begun()


def memory(rt, most=""):
    """Bytes allocated and reserved on this rank's GPU, now, which begins a new peak, or at "max_" since then."""
    if rt.device.type != "cuda":
        return 0, 0
    if not most:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(rt.device)
    return [getattr(torch.cuda, f"{most}memory_{what}")(rt.device) for what in ("allocated", "reserved")]


class Version:
    """One script's model, optimizers, averages and loader, compiled and warm."""

    def __init__(self, label, module, s, rt):
        self.label, self.module, self.s, self.rt, self.tokens = label, module, s, rt, s.train_batch_tokens // rt.world_size
        held = memory(rt)
        self.model, self.chosen = module.build_model(s, rt)[:2]
        self.forward = rt.compiled(self.model) if hasattr(rt, "compiled") else (
            torch.compile(self.model, dynamic=False) if rt.compile else self.model)
        more = [None] * ("checkpoints" in inspect.signature(module.Trainer).parameters)  # earlier versions do without
        self.trainer = module.Trainer(self.model, self.forward, s, rt, *more)
        self.averages = module.WeightAverage(self.model, s)
        self.optimizers, self.weights = self.trainer.optimizers, list(self.model.parameters())
        self.batches = module.Batches(module.TrainStream(s), rt, self.trainer.rows_per_step)
        with self.kernels():
            self.step()
            memory(rt)
            self.step()
            self.peak = [most - before for most, before in zip(memory(rt, "max_"), held)]
            self.collectives = recorded_collectives(rt, self.step)
        self.kept = [p.detach().clone() for p in self.weights]

    def kernels(self):
        """The choice of attention kernels that the script makes around its work, if it makes one."""
        if hasattr(self.module, "torch_kernel_first"):
            return self.module.torch_kernel_first(self.chosen["attention"])
        return getattr(self.module, "sdpa_priority", lambda rt: contextlib.nullcontext())(self.rt)

    def step(self):
        step = getattr(self.trainer, "optimize", None) or self.trainer.step
        return step(self.batches.next(), LR_SCALE, MOMENTUM, False)

    @torch.no_grad()
    def reset(self):
        torch._foreach_copy_(self.weights, self.kept)

    def repeat(self):
        """{phase: milliseconds} of one repeat; weights are afterwards what they were."""
        rt, ms = self.rt, {}
        with self.kernels():
            ms["loader"], (_, rows) = timed(rt, lambda: (self.batches.next(), self.batches.next()), ahead=False)  # one is ready
            self.model.zero_grad(set_to_none=True)
            ms["forward"], loss = timed(rt, lambda: self.forward(rows[:, :-1].long(), rows[:, 1:].long(), False).sum()
                                        / self.s.train_batch_tokens)
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

    def groups(self, ranks):
        """[(matrices of a rank, R, C)] of each Muon group, with so many ranks."""
        if hasattr(self.optimizers, "muon"):  # an earlier version
            stacks = [group.params for group, *_ in self.optimizers.muon]
        else:
            stacks = [stack for group in self.optimizers.groups if group.sharded for stack in group.stacks.values()]
        return [(-(-len(stack) // ranks), *sorted(stack[0].shape)) for stack in stacks]

    def saved_bytes(self):
        """Bytes per token that an eager forward keeps for its backward, each storage once: two rows less one, so that weights
        and tables drop out."""
        storages, row, sizes = {}, self.batches.next()[:1], []

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
    """Counts the products of an eager forward of `tokens` tokens: {(rows per token, K, N): times}."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens, self.counts = tokens, Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, w = args[:2]
            self.counts[x.numel() / x.size(-1) / self.tokens, w.size(1), w.size(0)] += 1
        return func(*args, **(kwargs or {}))


def rate(flop, ms):
    """TFLOP/s, in words."""
    return f"{flop / ms / 1e9:.3f}"


class Floor:
    """What this device attains: copies, products, collectives. A shape that two versions have is measured once."""

    def __init__(self, rt, repeats):
        self.rt, self.repeats, self.collective = rt, repeats, {}
        self.product, self.iteration = functools.cache(self._product), functools.cache(self._iteration)
        cuda = rt.device.type == "cuda"
        n, dtype = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
        a, b = (self.random(n, n).to(dtype) for _ in range(2))
        self.best = f"{n}³ {dtype} {rate(2 * n**3, self.alone(lambda: a @ b))} TFLOP/s"
        x, y = (torch.zeros(2**28 if cuda else 2**25, device=rt.device) for _ in range(2))
        self.copy = 2 * x.nbytes / self.alone(lambda: x.copy_(y))  # bytes per ms, as below
        for name in ("sum_", "reduce_scatter", "all_gather") if rt.world_size > 1 else ():
            part = x[: len(x) // 8 // rt.world_size * (1 if name == "all_gather" else rt.world_size)]
            ms = self.alone(lambda: communicate(rt, [(name, part)]))
            self.collective[name.removesuffix("later").rstrip("_")] = whole_bytes(rt, name, part) / ms

    def alone(self, work):
        return alone(self.rt, work, self.repeats)

    def random(self, *shape):
        return torch.randn(shape, device=self.rt.device).to(self.rt.dtype)

    def _product(self, M, K, N):
        """Milliseconds of x[M,K]·wᵀ, its dgrad g[M,N]·w and its wgrad gᵀ·x."""
        x, g, w = self.random(M, K), self.random(M, N), self.random(N, K)
        return [self.alone(work) for work in (lambda: torch.mm(x, w.mT), lambda: torch.mm(g, w), lambda: torch.mm(g.mT, x))]

    def _iteration(self, n, R, C):
        """Milliseconds of the three products of a Newton–Schulz iteration for n matrices [R,C]."""
        x, gram = self.random(n, R, C), self.random(n, R, R)
        return sum(self.alone(lambda: torch.bmm(a, b)) for a, b in ((x, x.mT), (gram, gram), (gram, x)))

    def attention(self, version):
        """Milliseconds of one block's attention alone on all rows, forward and backward."""
        s, rt, attend = version.s, self.rt, version.model.cores[0].attn.attend  # the one that was chosen for the model
        attend = torch.compile(attend, dynamic=False) if rt.compile else attend
        qkv = [self.random(version.tokens // s.train_seq_len, s.train_seq_len, heads, s.head_dim).requires_grad_()
               for heads in (s.num_heads, s.num_kv_heads, s.num_kv_heads)]
        back = []
        with version.kernels():
            for _ in range(self.repeats + 1):
                y = attend(*qkv)
                grad = torch.randn_like(y)
                back.append(timed(rt, lambda: torch.autograd.grad(y, qkv, grad))[0])
            return self.alone(lambda: attend(*qkv)), statistics.median(back[1:])


def whole_bytes(rt, name, x):
    """Bytes of the whole tensor that a collective of x shares out, sums or collects."""
    return x.nbytes * (rt.world_size if name == "all_gather" else 1)


def passes(version, floor):
    """{forward, backward: (FLOP, bytes, attainable milliseconds)}, and the lines of the products table."""
    s, tokens, lines = version.s, version.tokens, []
    flop, ms = [0, 0], [0.0, 0.0]
    with Products(s.train_seq_len) as products, version.kernels():
        version.model(*torch.randint(s.vocab_size, (2, 1, s.train_seq_len), device=version.rt.device))  # tokens, targets
    for (ratio, K, N), n in products.counts.items():
        M = round(ratio * tokens)
        times = floor.product(M, K, N)
        for i, part in enumerate((times[:1], times[1:])):
            flop[i], ms[i] = flop[i] + n * len(part) * 2 * M * K * N, ms[i] + n * sum(part)
        lines.append(f"{version.label:<5} {f'{M} × {K} × {N}':<22} {n:>5}"
                     + "".join(f" {t:>9.3f} {rate(2 * M * K * N, t):>8}" for t in times))
    pairs = 2 * tokens * s.train_seq_len * s.num_heads * s.head_dim  # FLOP of a causal forward: 4·T²/2·H·E for each row
    sides = list(zip(("attention, forward", "attention, backward"), floor.attention(version), (pairs, 2.5 * pairs)))
    lines += [f"{version.label:<5} {name:<22} {s.num_layers:>5} {t:>9.3f} {rate(f, t):>8}" for name, t, f in sides]
    moved = [elementwise_bytes(s, tokens, version.rt.dtype.itemsize, i) for i in (0, 1)]
    return {phase: (flop[i] + s.num_layers * f, moved[i], ms[i] + s.num_layers * t + moved[i] / floor.copy)
            for i, (phase, (_, t, f)) in enumerate(zip(PHASES, sides))}, lines


def attainable(version, floor):
    """{phase: (FLOP, bytes, attainable milliseconds)}, and the lines of the products table."""
    s, rt = version.s, version.rt
    result, lines = passes(version, floor)
    talk = [(name.removesuffix("later").rstrip("_"), whole_bytes(rt, name, x))
            for name, x in version.collectives if rt.world_size > 1]
    result["communication"] = 0, sum(size for _, size in talk), sum(size / floor.collective[name] for name, size in talk)
    groups, steps = version.groups(rt.world_size), s.muon_backend_steps
    small = sum(p.numel() for p in version.optimizers.small)
    matrices = sum(p.numel() for p in version.weights) - small
    # fp32: every rank reads all gradients, reads and writes all parameters, two moments of small ones and its share of momentum
    moved = 4 * (3 * matrices + 2 * matrices / rt.world_size + 7 * small)
    result["optimizer"] = (sum(steps * n * (4 * R * R * C + 2 * R**3) for n, R, C in groups), moved, moved / floor.copy
                           + steps * sum(floor.iteration(*group) for group in groups) + result["communication"][2])
    moved = 4 * 3 * (matrices + small) * s.ema_enabled  # reads parameters, reads and writes averages
    result["average"] = 0, moved, moved / floor.copy
    result["step"] = tuple(sum(result[phase][i] for phase in ("forward", "backward", "optimizer")) for i in range(3))
    return result, lines


def phase_lines(version, measured, floors, others):
    """The rows of the phase table for one version; others: the older version's measurements, for the newer's rows."""
    for phase in PHASES:
        if phase not in measured:
            yield f"{version.label:<5} {phase:<14} {'none':>10}"
            continue
        low, middle, high = np.percentile(measured[phase], [25, 50, 75])
        line = f"{version.label:<5} {phase:<14} {middle:>10.3f} {high - low:>8.3f} "
        if phase in floors:
            flop, moved, best = floors[phase]
            line += f"{flop / 1e12:>9.4f} {moved / 1e9:>8.3f} {best:>14.3f} {best / middle:>11.2f}"
        ratio = f"{np.median(others[phase]) / middle:>10.3f}" if others else ""
        yield f"{line:<86}{ratio}".rstrip()


def eight_gpus(version, middle, floor, bus):
    """Estimate, in words: a step of 8 GPUs with these tokens each, from one device; `bus` in GB/s is assumed."""
    rt, now, then = version.rt, 0.0, 0.0
    with torch.no_grad():
        for (n, R, C), (share, *_) in zip(version.groups(1), version.groups(8)):
            x = torch.randn(n, R, C, device=rt.device)
            ms = floor.alone(lambda: version.optimizers.orthogonalize(x))
            now, then = now + ms, then + ms * share / n
    sent = 7 / 8 * sum(x.nbytes * (2 if name.startswith("sum") else -(-len(x) // 8) * 8 / len(x))
                       for name, x in version.collectives)  # a ring's; groups padded to the ranks
    both, optimizer, talk = middle["forward"] + middle["backward"], max(middle["optimizer"] - now, 0) + then, sent / bus / 1e6
    total = both + optimizer + talk
    return (f"{version.label:<5} estimate for 8 GPUs: {total:.2f} ms a step, {8000 * version.tokens / total:,.0f} tokens/s =\n"
            f"{'':<5} {both:.2f} forward, backward as measured + {optimizer:.2f} optimizer (Newton–Schulz {now:.2f} measured, "
            f"a rank's share {then:.2f})\n{'':<5} + {talk:.2f} communication ({sent / 1e9:.3f} GB at an assumed {bus:g} GB/s)")


def summary(version, measured, floor, bus):
    """Lines on speed, loader, memory, and the estimate for 8 GPUs."""
    middle = {phase: float(np.median(values)) for phase, values in measured.items()}
    share, tokens = middle["loader"] / middle["step"], version.s.train_batch_tokens
    yield (f"{version.label:<5} {1000 * tokens / middle['step']:,.0f} tokens/s; loader {100 * share:.2f} % of a step: "
           f"{'hidden' if share < 1 else 'not hidden'}")
    if version.rt.device.type == "cuda":
        yield f"{version.label:<5} peak memory allocated {version.peak[0] >> 20:,} MiB, reserved {version.peak[1] >> 20:,} MiB"
    else:
        yield f"{version.label:<5} kept for backward by an eager forward: {version.saved_bytes():,.0f} bytes per token"
    if version.rt.world_size == 1:
        yield eight_gpus(version, middle, floor, bus)


def report(versions, measured, floor, bus):
    """All that is printed, line by line."""
    s, rt, cuda = versions[0].s, versions[0].rt, versions[0].rt.device.type == "cuda"
    for v in versions:
        yield f"{v.label:<5} {v.module.__file__}, {hashlib.sha256(Path(v.module.__file__).read_bytes()).hexdigest()[:16]}, computes with {v.chosen}"
    device = torch.cuda.get_device_name(rt.device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    yield f"{device}, torch {torch.__version__}, {rt.dtype}, compile {'on' if rt.compile else 'off'}, repeats {floor.repeats}"
    yield (f"preset {s.preset or 'none'}, {s.num_layers} × {s.model_dim}, rows of {s.train_seq_len}; ranks {rt.world_size}, "
           f"tokens of each {versions[0].tokens}")
    yield f"attained: product {floor.best}; copy {floor.copy / 1e6:.1f} GB/s" + "".join(
        f"; {name} {speed / 1e6:.2f} GB/s" for name, speed in floor.collective.items())
    floors = {v: attainable(v, floor) for v in versions}
    yield (f"\n{'':<5} {'phase':<14} {'ms':>10} {'± IQR':>8} {'TFLOP':>9} {'GB':>8} {'attainable ms':>14} {'÷ measured':>11}"
           + " old ÷ new" * (len(versions) > 1))
    for i, v in enumerate(versions):
        yield from phase_lines(v, measured[v], floors[v][0], measured[versions[1]] if versions[i + 1:] else None)
    yield "GB (communication's apart) are estimates, and with them attainable; a step's is forward + backward + optimizer."
    yield (f"\n{'':<5} {'M × K × N of x·wᵀ':<22} {'times':>5} {'ms':>9} {'TFLOP/s':>8} {'dgrad ms':>9} {'TFLOP/s':>8} "
           f"{'wgrad ms':>9} {'TFLOP/s':>8}")
    yield from (line for v in versions for line in floors[v][1])
    yield ""
    for v in versions:
        yield from summary(v, measured[v], floor, bus)


def prepared(arguments, folder, on_gpu):
    """The versions, new first, in one process group."""
    paths = dict(new=arguments.script, **(dict(old=arguments.against) if arguments.against else {}))
    modules = {label: load_script(path, f"train_gpt_{label}") for label, path in paths.items()}
    ranks = modules["new"].launched_ranks(os.environ)
    environ = dict({} if on_gpu else dict(PRESET="laptop"), **os.environ) | dict(
        DATA_PATH=folder, TRAIN_BATCH_TOKENS=str(arguments.tokens * ranks[1]), MICRO_BATCH_TOKENS=str(arguments.tokens))
    settings = {}
    for label, module in modules.items():
        try:
            settings[label] = module.resolve_settings(environ)[0]
        except module.UserError as problem:
            raise SystemExit(f"error: {problem}") from None
    for s in settings.values():
        assert arguments.tokens % s.train_seq_len == 0, f"--tokens must be a multiple of TRAIN_SEQ_LEN={s.train_seq_len}"
    write_shard(modules["new"], folder, 8 * arguments.tokens * ranks[1] + 1, min(s.vocab_size for s in settings.values()))
    torch._dynamo.config.cache_size_limit = 64  # as the script sets it
    versions = []
    for label, module in modules.items():
        with mock.patch("torch.distributed.init_process_group") if versions else contextlib.nullcontext():
            rt = module.Runtime(settings[label], ranks)
        versions.append(Version(label, module, settings[label], rt))
    return versions


def main():
    cuda = torch.cuda.is_available() and os.environ.get("DEVICE") != "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", type=Path, default=ROOT / "train_gpt.py")
    parser.add_argument("--against", type=Path, help="an older version of it, to be compared in the same run")
    parser.add_argument("--tokens", type=int, default=98304 if cuda else 4096, help="of a rank in a step")
    parser.add_argument("--repeats", type=int, default=20 if cuda else 7)
    parser.add_argument("--bus", type=float, default=350, help="GB/s between 8 GPUs that the estimate for them assumes")
    parser.add_argument("--out", type=Path, help="what is printed is appended to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        versions = prepared(arguments, folder, cuda)
        measured = {v: {} for v in versions}
        for _ in range(arguments.repeats):
            for v in versions:
                for phase, ms in v.repeat().items():
                    measured[v].setdefault(phase, []).append(ms)
        rt = versions[0].rt
        rt.log_path = arguments.out if rt.rank == 0 else None
        for line in report(versions, measured, Floor(rt, arguments.repeats), arguments.bus):
            rt.log(line)
        for v in versions:
            v.batches.close()
        rt.close()


if __name__ == "__main__":
    main()
