"""Ablation: named rows of settings against a base row. Orders changes, forecasts no score.

    python tests/bench/ablate.py --data data/datasets/holdout --rows rows.txt --out out/ablate
    python tests/bench/ablate.py --data data/datasets/holdout --out out/deep --equal-time \\
        --rows "beta2: BETA2=0.99; mlp: MLP_MULT=4 LEAKY_SLOPE=0.3" NUM_LAYERS=11 MODEL_DIM=64

Protocol. Every row trains on the same number of tokens (8.2 M) with the same seeds: the default at
4 layers of 128 channels, 1,024 pieces and without TTT unless NAME=value arguments change that. DATA
holds training shards and, as fineweb_val_*.bin, documents on which no run trains (`records/runs.py
sweep --help` shows how). The official validation set is for one final score. The spread is the
sample standard deviation over the seeds of the base row, which runs first. A change wins if its
mean difference is -2 spreads or less; two seeds give a rough spread, so a close call needs more.
Losers and failures stay in the table.

Time is processor time: one thread a run, with time.process_time in place of the script's clock.
Other processes still slow a core by some percent. --equal-time repeats rows that cost more, with
ITERATIONS and WARMDOWN_ITERS divided by the cost.

Rows: a file with `name: A=1 B=2` on each line and # comments, or this text with ";" between rows.
`base` is always there. The same command skips finished runs. OUT/table.md is current after each.
"""
import argparse
import collections
import contextlib
import os
import shlex
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "records"))
import runs  # noqa: E402

PROTOCOL = """
    DEVICE=cpu COMPILE=0 VOCAB_SIZE=1024 NUM_LAYERS=4 MODEL_DIM=128 NUM_HEADS=4 NUM_KV_HEADS=2
    TRAIN_SEQ_LEN=256 EVAL_SEQ_LEN=256 TRAIN_BATCH_TOKENS=8192 MICRO_BATCH_TOKENS=8192
    ITERATIONS=1000 WARMUP_STEPS=0 MAX_WALLCLOCK_SECONDS=0 EVAL_WALLCLOCK_SECONDS=0
    VAL_LOSS_EVERY=0 VAL_LIMIT_TOKENS=98304 TTT_ENABLED=0""".split()
ON_PROCESSOR_TIME = ("import runpy, sys, time; time.perf_counter = time.process_time; "
                     "del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')")
NAMES = dict(quantized="from the file", banded="full context", sliding="full context")
KINDS = ("float", "from the file", "full context", "ttt")
COSTS_MORE = 1.03  # × the base row's time per step; less is noise
TIMED = "@time"


def parse_settings(words):
    """{NAME: text} from NAME=value words. Raises UserError."""
    settings = dict(word.partition("=")[::2] for word in words)
    bad = [n for n in settings if not n.isupper() or n.lower() in ("seed", *runs.PLACE)]
    if bad or len(settings) < len(words) or not all("=" in word for word in words):
        raise runs.UserError(f"{shlex.join(words)}: write NAME=value, each once, no SEED")
    return settings


def parse_rows(given):
    """{row: {NAME: text}}, base first, from a file or the text itself. Raises UserError."""
    text = Path(given).read_text() if Path(given).is_file() else given.replace(";", "\n")
    rows = {"base": {}}
    for line in filter(None, (line.partition("#")[0].strip() for line in text.splitlines())):
        name, colon, settings = line.partition(":")
        if not colon or name in rows or set(name) & set(" /@=|"):
            raise runs.UserError(f"--rows: {line}: write `name: A=1 B=2`, names new, no ' /@=|'")
        rows[name] = parse_settings(shlex.split(settings))
    return rows


def numbers(result):
    """What the table compares; bpb by kind of scoring, and that of the last one."""
    bpb = {NAMES.get(kind, kind): value for kind, value in runs.bpb_by_kind(result).items()}
    step = result["train_seconds"] / result["steps"]
    return {**result, **bpb, "last": [*bpb.values()][-1], "step": step}


@dataclass
class RowRun(runs.Run):
    """A run of a sweep, named after its row."""
    row: str = ""

    @property
    def name(self):
        return f"{self.row}_SEED={self.seed}"


class Rows:
    """The source of runs: base with all seeds, then the others by seed. Keeps the table."""

    def __init__(self, rows, base, seeds, out, script):
        self.rows, self.base, self.seeds, self.out, self.results = rows, base, seeds, out, {}
        others = [row for row in rows if row != "base"]
        order = [("base", s) for s in seeds] + [(row, s) for s in seeds for row in others]
        self.runs = collections.deque(RowRun({**base, **rows[r]}, s, out, row=r) for r, s in order)
        self.total = len(order)
        if unknown := {name for run in self.runs for name in run.point} - set(script.known):
            raise runs.UserError(f"no such setting: {', '.join(sorted(unknown))}")
        if refused := script.check(self.runs):
            raise runs.UserError(runs.refusal(refused, self.total))
        runs.check_different(self.runs)
        runs.tuning_warning(self.runs[0], "choosing among rows")
        tokens = [r.settings["iterations"] * r.settings["train_batch_tokens"] for r in self.runs]
        for run, count in zip(self.runs, tokens):
            if count != tokens[0] and not run.row.endswith(TIMED):
                raise runs.UserError(f"{run.row}: {count:,} tokens, the base row {tokens[0]:,}")

    def next(self):
        return self.runs.popleft() if self.runs else None

    def finished(self, run, result):
        if result:
            self.results[run.row, run.seed] = result
        runs.write_whole(self.out / "table.md", self.table().encode())

    def of(self, row, key):
        """A number of the row's results by seed; NaN where there is none."""
        there = [self.results.get((row, seed)) for seed in self.seeds]
        return np.array([numbers(r).get(key, np.nan) if r else np.nan for r in there])

    def cost(self, row):
        """Time per step, × the base row's."""
        return np.nanmean(self.of(row, "step") / self.of("base", "step"))

    def with_equal_time(self):
        """The rows, and again with fewer steps those that cost more."""
        rows, names = dict(self.rows), ("ITERATIONS", "WARMDOWN_ITERS")
        for row in self.rows:
            if (cost := self.cost(row)) > COSTS_MORE:
                full = next(r["settings"] for (name, _), r in self.results.items() if name == row)
                fewer = {n: str(int(full[n.lower()] / cost)) for n in names}
                rows[row + TIMED] = {**self.rows[row], **fewer}
        return rows

    def table(self):
        """Markdown: the spread first, then every row."""
        spread = {kind: np.nanstd(self.of("base", kind), ddof=1) for kind in (*KINDS, "last")}
        told = ", ".join(f"{kind} {value:.4f}" for kind, value in spread.items())
        lines = [f"Spread of the base row's seeds, bpb: {told}.", "",
                 f"Seeds: bpb {'; '.join(KINDS)}. Δ: mean difference to base (× the spread).", "",
                 f"| row | settings | tokens | {' | '.join(f'seed {s}' for s in self.seeds)} | "
                 "Δ float | Δ last | time per step, × base | model bytes |",
                 "|---" * (7 + len(self.seeds)) + "|"]
        for row, settings in self.rows.items():
            tokens, size = (np.nanmean(self.of(row, k)) for k in ("train_tokens", "model_bytes"))
            scores = zip(*(self.of(row, kind) for kind in KINDS))
            delta = {k: np.nanmean(self.of(row, k) - self.of("base", k)) for k in ("float", "last")}
            cells = [row, " ".join(f"{k}={v}" for k, v in settings.items()), f"{tokens:,.0f}",
                     *("; ".join(f"{v:.4f}" for v in seed) for seed in scores),
                     *(f"{d:+.4f} ({d / spread[k]:+.1f}×)" for k, d in delta.items()),
                     f"{self.cost(row):.3f}", f"{size:,.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
        common = " ".join(f"{k}={v}" for k, v in self.base.items() if not k.endswith("_PATH"))
        lines += ["", f"All rows: {common}.", "Processor seconds per step of the base row: "
                  f"{np.nanmean(self.of('base', 'step')):.3f}."]
        for r in list(self.results.values())[:1]:
            lines += [f"Scored: {r['scored_targets']:,} targets, {r['scored_bytes']:,} bytes. "
                      f"{r['device']}, torch {r['versions']['torch']}, "
                      f"script {r['code_sha256'][:12]}."]
        return "\n".join(lines) + "\n"


def ablate(a):
    """Exit status: 0 all rows are finished, 1 a run failed, 130 interrupted. Raises UserError."""
    rows, seeds, out = parse_rows(a.rows), runs.parse_seeds(a.seeds), Path(a.out)
    base = {**parse_settings(PROTOCOL), "DATA_PATH": a.data, "TOKENIZER_PATH": a.tokenizer,
            **parse_settings(a.settings)}
    os.environ["OMP_NUM_THREADS"] = "1"
    warnings.simplefilter("ignore", RuntimeWarning)  # means of rows that have no result yet
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", ON_PROCESSOR_TIME, a.script]
    with runs.only_sweep_in(out) as lock, contextlib.closing(runs.Script(command, out)) as script:
        for _ in range(1 + a.equal_time):
            source = Rows(rows, base, seeds, out, script)
            sweep = runs.Sweep(source, script, runs.Slots(script, lock, [], a.jobs), 0)
            sweep.go()
            if sweep.interrupts:
                return 130
            rows = source.with_equal_time()
    print(source.table())
    return 1 if sweep.failed else 0


def main():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--data", required=True, help="folder of training and held-out shards")
    parser.add_argument("--tokenizer", default="data/tokenizers/fineweb_1024_bpe.model")
    parser.add_argument("--script", default=str(ROOT / "train_gpt.py"))
    parser.add_argument("--rows", default="", help="file or text; empty: the base row alone")
    parser.add_argument("--seeds", default="1337,42", help="as in records/runs.py")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one core each")
    parser.add_argument("--out", required=True, help="folder of the runs and of table.md")
    parser.add_argument("--equal-time", action="store_true", help="repeat what costs more")
    parser.add_argument("settings", nargs="*", metavar="NAME=value", help="changes the protocol")
    try:
        return ablate(parser.parse_intermixed_args())
    except (runs.UserError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
