"""Make a submission folder out of finished runs, check a folder as a reviewer does, list our folders.

    python records/submission.py pack runs/1337 runs/42 runs/2025 --name "11 layers" --author "Ada" --track track_10min_16mb
    python records/submission.py check records/track_10min_16mb/2026-03-20_mine --against records/track_10min_16mb/2026-03-01
    python records/submission.py index

`check` believes the files on disk and the logs and compares everything else with them; it knows the log lines of this
script and of its ancestors, and says what it could not check. It reads only; `--run` executes the folder's script.
`--data FOLDER` counts the bytes of the scored text again, with the byte table of this repository's train_gpt.py.
Exit status: 0; 1 where a check failed; 2 for what the caller can mend.
"""
from __future__ import annotations

import argparse
import ast
import datetime
import functools
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RECORD, NON_RECORD = "track_10min_16mb", "track_non_record_16mb"
CAP_BYTES, CAP_SECONDS, MARGIN_NATS, MOST_P = 16_000_000, 600, 0.005, 0.01
# Validation targets by vocabulary, and the UTF-8 bytes of their text. Counted at SP8192; other vocabularies end a few tokens
# earlier or later, far less than the 16.7 % of a space counted twice.
OFFICIAL_TARGETS, OFFICIAL_BYTES = {1024: 62_021_632, 8192: 40_540_160}, 151_080_891
BYTES_FROM = ("text", "pieces")  # how a run counts bytes: by side files of the shards, or by pieces
NOT_OF_THE_MODEL = ("seed", "run_id", "out_dir", "scores_path")  # settings that may differ between the seeds of a submission
LIBRARIES = {"torch", "numpy", "sentencepiece", "triton", "zstandard", "brotli", "tqdm", "flash_attn", "flash_attn_interface"}
NETWORK = {"socket", "ssl", "urllib", "http", "ftplib", "smtplib", "xmlrpc", "webbrowser", "requests", "httpx", "aiohttp",
           "huggingface_hub", "datasets", "wandb"}
# Variables in published commands that launchers and libraries read, not the script.
FOREIGN = ("TORCH", "PYTORCH", "NCCL_", "CUDA_", "OMP_", "MKL_", "TRITON", "PYTHON", "HF_", "NVIDIA", "GLOO_", "LD_", "PATH")
UTF8 = dict(encoding="utf-8", errors="backslashreplace")  # names of files may be any bytes
PASS, FAIL, WARN, UNCHECKED = "PASS", "FAIL", "WARN", "NOT CHECKED"


class Problem(Exception):
    """Something that the caller can mend; the message names what, the value, and the way out."""


# -- numbers and text ----------------------------------------------------------------------------------------------------

def number(value):
    """A finite number as float, or None for anything else (null, text, NaN, a flag)."""
    try:
        if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        pass
    return None


def half_unit(value):
    """Half of the last decimal place that a number was written with, what rounding may have taken; of the fourth at most."""
    exponent = Decimal(str(value)).as_tuple().exponent
    return 0.5 * 10.0 ** min(exponent, -4) if isinstance(exponent, int) else math.nan


def mean_std(values):
    """(mean, sample standard deviation or None for a single value)."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else None


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def listed(items):
    return ", ".join(map(str, items))


def read_json(path):
    """The object in a JSON file, numbers with a point as Decimal, so that it is known how they were rounded. Raises Problem."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"), parse_float=Decimal)
    except (ValueError, RecursionError) as problem:
        raise Problem(f"{path}: no JSON: {problem}") from None
    except OSError as problem:
        raise Problem(f"{path}: cannot be read: {problem.strerror}") from None
    if not isinstance(value, dict):
        raise Problem(f"{path}: holds {type(value).__name__} where an object {{…}} belongs")
    return value


def readable_source(path):
    """Source (bytes) of a script, packed or plain; without records/artifact.py, the file's own bytes. Raises Problem."""
    try:
        from artifact import readable_source as unpacked
    except ImportError:
        return Path(path).read_bytes()
    try:
        return unpacked(path)
    except ValueError as problem:
        raise Problem(str(problem)) from None


# -- a log ---------------------------------------------------------------------------------------------------------------

N, INT = r"([-+.\deE]+|nan|inf)", r"([\d,]+)"
RULE = b"=" * 100
SCORE_LINE = re.compile(rf"^(\w+?)(?:_exact)? val_loss[:=]{N} val_bpb[:=]{N}(.*)$", re.M)
ALIAS = "final_int8_zlib_roundtrip"  # in the ancestors' logs a second name of another evaluation, where there is another
LOG_NAME = re.compile(r"(train|log).*\.(log|txt)$|.*\.log$")


@dataclass
class Score:
    """One evaluation of a log: nats per target, bits per byte, seconds; and by how much rounding may have changed them."""
    loss: float
    bpb: float
    seconds: float | None
    loss_unit: float
    bpb_unit: float

    @property
    def bytes_per_target(self):
        return self.loss / math.log(2) / self.bpb

    @property
    def tolerance(self):
        """Of bytes_per_target, relative: what rounding explains."""
        return 1.01 * (self.loss_unit / self.loss + self.bpb_unit / self.bpb) + 1e-9


@dataclass
class Log:
    """What the log of one run says; None where it says nothing."""
    path: Path
    source: bytes | None = None  # the script, where the log begins with it
    body: str = ""
    seed: int | None = None
    named_seed: int | None = None  # the seed in the file's name
    scores: dict = field(default_factory=dict)
    code_bytes: int | None = None
    model_bytes: int | None = None
    total_bytes: int | None = None
    code_sha256: str | None = None
    train_seconds: float | None = None
    step_seconds: float = 0.0
    eval_seconds: float | None = None  # as the log says it, everything included
    pack_seconds: float | None = None
    targets: int | None = None
    scored_bytes: int | None = None
    bytes_from: str | None = None
    loss_sum: float | None = None
    ledger: str | None = None
    world_size: int | None = None
    device: str | None = None
    settings: dict = field(default_factory=dict)  # NAME → (value, set explicitly?)

    @property
    def name(self):
        return self.path.name

    @property
    def key(self):
        """Name of the last evaluation, whose score counts."""
        return next(reversed([k for k in self.scores if k != ALIAS] or list(self.scores)), None)

    @property
    def score(self):
        return self.scores[self.key]

    @property
    def timed_seconds(self):
        """Sum of the evaluations' own timers."""
        return sum(s.seconds or 0 for k, s in self.scores.items() if k != ALIAS or len(self.scores) == 1)

    @property
    def vocabulary(self):
        if "VOCAB_SIZE" in self.settings:
            return int(self.settings["VOCAB_SIZE"][0]) if self.settings["VOCAB_SIZE"][0].isdigit() else None
        found = re.search(r"vocab_size[:=](\d+)|\bsp(\d{4})\b|_(\d{4})_bpe", self.body)
        return int(next(filter(None, found.groups()))) if found else None


def read_log(path):
    """Log of a file; nothing in it is taken on trust. Raises Problem where it cannot be read."""
    try:
        content = Path(path).read_bytes()
    except OSError as problem:
        raise Problem(f"{path}: cannot be read: {problem.strerror}") from None
    source, _, body = content.partition(b"\n" + RULE)
    begins = body and b"\nimport " in source  # what the console showed has neither source nor rule
    log = Log(Path(path), source if begins else None, (body if begins else content).decode("utf-8", "replace"))

    def last(pattern, kind=int, group=1):
        found = None
        for found in re.finditer(pattern, log.body, re.M):
            pass
        try:
            return kind(found[group].replace(",", "") if kind is int else found[group]) if found else None
        except ValueError:
            return None

    for key, loss, bpb, rest in SCORE_LINE.findall(log.body):
        try:
            timer = re.search(r"eval_time:(\d+)ms", rest)
            score = Score(float(loss), float(bpb), int(timer[1]) / 1000 if timer else None, half_unit(loss), half_unit(bpb))
        except (ValueError, ArithmeticError):
            continue
        known = log.scores.get(key)
        if known and score.seconds is None:
            score.seconds = known.seconds  # of the ancestors' two lines, the exact one has no time
        if not known or not score.loss_unit > known.loss_unit:
            log.scores[key] = score
    log.seed = last(r"\bseed:(\d+)") if last(r"\bseed:(\d+)") is not None else last(r"^setting SEED=(\d+)")
    named = re.search(r"seed[_-]?(\d+)", log.name, re.I)
    log.named_seed = int(named[1]) if named else None
    log.code_bytes, log.model_bytes = last(rf"^Code size: {INT} bytes"), last(rf"^Serialized model \S+: {INT} bytes")
    log.total_bytes = last(rf"^Total submission size(?: \S+)?: {INT} bytes")
    log.code_sha256 = last(r"^code_sha256:([0-9a-f]{64})\b", str)
    times = [last(r"^step:\d+/\d+ .*train_time:(\d+)ms", float), last(r"^stopping_early:.*train_time:(\d+)ms", float)]
    seconds = [t / 1000 for t in times if t is not None] + [last(r"^seconds: train ([\d.]+)", float)]
    log.train_seconds = max((s for s in seconds if s is not None), default=None)
    log.step_seconds = (last(r"step_avg:([\d.]+)ms", float) or 0.0) / 1000
    log.eval_seconds = last(r"^seconds: .*\bevaluation ([\d.]+)", float)
    log.pack_seconds = last(r"^seconds: .*\bpack ([\d.]+)", float)
    log.targets = last(r"^ledger: targets:(\d+)") or last(r"\bvalidation_targets:(\d+)")
    log.scored_bytes, log.loss_sum = last(r"^ledger: .*\bbytes:(\d+)"), last(r"^ledger: .*\bloss_sum:([\d.]+)", float)
    log.bytes_from = last(r"\bbytes_from:(\w+)", str)
    log.ledger = last(r"^ledger: .*\bsha256:([0-9a-f]{64})", str)
    log.world_size, log.device = last(r"\bworld_size:(\d+)"), last(r"\bdevice:(.+?)(?: \w+:|$)", str)
    for line in re.finditer(r"^setting (\w+)=(.*?)(  \(set\))?$", log.body, re.M):
        log.settings[line[1]] = (line[2], bool(line[3]))
    return log


# -- the script, without executing it ------------------------------------------------------------------------------------

def names_read(tree):
    """Environment names that a script can read: fields of its Settings class, and names in capitals that it holds as text."""
    texts = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    names = {t for t in texts if re.fullmatch(r"[A-Z][A-Z0-9_]+", t)}
    return names | {name.upper() for name in defaults_of(tree)}


def defaults_of(tree):
    """{setting: default} of a script with a `Settings` class of fields `name: type = default`, or
    `name: type = section(default, …)` as in earlier ones."""
    out = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == "Settings":
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and line.value:
                    arguments = getattr(line.value, "args", None)
                    try:
                        out[line.target.id] = ast.literal_eval(
                            arguments[0] if arguments else line.value)
                    except ValueError:
                        pass
    return out


def modules_imported(tree):
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found


# -- check ---------------------------------------------------------------------------------------------------------------

@dataclass
class Submission:
    """A folder as far as it could be read, and the findings about it: (status, what was checked, figures)."""
    folder: Path
    track: str = ""
    claims: dict | None = None  # submission.json
    logs: list = field(default_factory=list)
    code: bytes | None = None  # train_gpt.py as it lies there, whose bytes count
    source: bytes | None = None  # the same unpacked
    tree: ast.Module | None = None
    findings: list = field(default_factory=list)

    def add(self, status, what, text):
        self.findings.append((status, what, text))

    def verdict(self, what, problems, good, status=FAIL):
        """One finding: every problem, or what is good."""
        self.add(status if problems else PASS, what, "; ".join(problems) if problems else good)

    @property
    def severity(self):
        """Of what only a record must keep to."""
        return FAIL if self.track == RECORD else WARN

    @property
    def scored(self):
        return [log for log in self.logs if log.scores]

    @property
    def runs(self):
        """{seed: log}, by the seed in the log, else in its name."""
        seeds = [(log.seed if log.seed is not None else log.named_seed, log) for log in self.logs]
        return {seed if seed is not None else log.name: log for seed, log in seeds}


def open_submission(folder):
    """Read what there is. Raises Problem only where there is no folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise Problem(f"{folder}: no such folder; give one that holds submission.json and train_gpt.py")
    sub = Submission(folder)
    there = {p.name for p in folder.iterdir() if p.is_file() and p.stat().st_size}
    logs = sorted(n for n in there if LOG_NAME.match(n))
    missing = [f"{n} is missing or empty" for n in ("README.md", "submission.json", "train_gpt.py") if n not in there]
    sub.verdict("files", missing + ([] if logs else ["no training log (train_seed<SEED>.log)"]),
                f"README.md, submission.json, train_gpt.py, {listed(logs)}")
    if (folder / "submission.json").is_file():
        try:
            sub.claims = read_json(folder / "submission.json")
        except Problem as problem:
            sub.add(FAIL, "submission.json", str(problem))
    sub.logs = [read_log(folder / name) for name in logs]
    sub.track = str((sub.claims or {}).get("track") or "")
    if sub.track not in (RECORD, NON_RECORD):
        said, above = sub.track, folder.resolve().parent.name
        sub.track = above if above in (RECORD, NON_RECORD) else RECORD
        sub.add(FAIL if said else WARN, "track", f"submission.json says {said or 'nothing'}; checked as {sub.track}")
    if "train_gpt.py" in there:
        sub.code = (folder / "train_gpt.py").read_bytes()
        try:
            sub.source = readable_source(folder / "train_gpt.py")
            sub.tree = ast.parse(sub.source)
            sub.add(PASS, "compiles", f"train_gpt.py, {len(sub.code):,} bytes" + (
                f", unpacks to {len(sub.source):,}" if sub.source != sub.code else ""))
        except (Problem, SyntaxError, ValueError, RecursionError) as problem:
            sub.add(FAIL, "compiles", f"train_gpt.py is no Python: {problem}")
    return sub


def check_claims(sub):
    """submission.json: what must be there, and nulls."""
    if sub.claims is None:
        return
    must = [k for k in ("author", "name", "date", "val_bpb") if sub.claims.get(k) in (None, "")]
    nulls = [k for k in ("github_id", "val_loss", "bytes_total", "blurb") if sub.claims.get(k) is None]
    results = sub.claims.get("seed_results")
    for seed, row in results.items() if isinstance(results, dict) else ():
        nulls += [f"seed_results.{seed}.{k}" for k, v in row.items() if v is None] if isinstance(row, dict) else []
    try:
        datetime.datetime.fromisoformat(str(sub.claims.get("date")).replace("Z", "+00:00"))
    except ValueError:
        must += [] if "date" in must else [f"date (it is {sub.claims['date']!r}, not YYYY-MM-DD)"]
    problems = [f"missing or null: {listed(must)}"] if must else []
    sub.verdict("submission.json", problems, f"{len(sub.claims)} keys, required ones present")
    if nulls:
        sub.add(WARN, "submission.json", f"missing or null, fill in: {listed(nulls)}")


def check_logs(sub):
    """Every log whole, of the seed that it is named for, and of another run than the others."""
    problems = []
    for log in sub.logs:
        lacks = [] if log.scores else ["final score"]
        lacks += [] if log.total_bytes is not None else ["'Total submission size'"]
        ending = (log.body.rstrip().splitlines() or [""])[-1][:90]
        problems += [f"{log.name} has no {' and no '.join(lacks)}; it ends with {ending!r}"] if lacks else []
        problems += [f"{log.name}: {k} is {s.loss} nats, {s.bpb} bpb" for k, s in log.scores.items()
                     if not (math.isfinite(s.loss) and math.isfinite(s.bpb) and s.bpb > 0 and s.loss > 0)]
    sub.verdict("logs whole", problems, f"{len(sub.logs)} with score and bytes")
    for log in sub.logs:  # what comes after divides by scores
        log.scores = {k: s for k, s in log.scores.items() if math.isfinite(s.loss + s.bpb) and s.bpb > 0 and s.loss > 0}
    problems = [f"{log.name} is the log of seed {log.seed}" for log in sub.logs
                if log.seed is not None and log.named_seed is not None and log.seed != log.named_seed]
    for what, value in (("score ledger", lambda g: g.ledger), ("content", lambda g: g.body)):
        same = [[g.name for g in sub.logs if value(g) == v] for v, n in Counter(map(value, sub.logs)).items() if v and n > 1]
        problems += [f"{' and '.join(names)} have the same {what}: one run, counted twice" for names in same]
    sub.verdict("logs distinct", problems, f"seeds {listed(sub.runs)}")
    keys = {log.key for log in sub.scored}
    if len(keys) > 1:
        sub.add(FAIL, "logs alike", "the last evaluation differs: " + listed(f"{g.name}: {g.key}" for g in sub.scored))


def check_seeds(sub):
    """Three at least, and those that submission.json names."""
    seeds = [s for s, log in sub.runs.items() if log.scores]
    few = [f"{len(seeds)} finished (seeds {listed(seeds) or 'none'}); a record needs 3"] if len(seeds) < 3 else []
    sub.verdict("seeds", few, listed(seeds), sub.severity)
    claims, problems = sub.claims or {}, []
    results = claims.get("seed_results")
    for what, named in (("seeds", claims.get("seeds")), ("seed_results", list(results) if isinstance(results, dict) else None)):
        if not isinstance(named, list):
            continue
        named, logged = {re.sub(r"^seed_?", "", str(s)) for s in named}, {str(s) for s in sub.runs}
        problems += [f"{what} has {listed(sorted(named - logged))}, without a log"] if named - logged else []
        problems += [f"{what} lacks {listed(sorted(logged - named))}, which has a log"] if logged - named else []
    if isinstance(claims.get("seeds"), list) or isinstance(results, dict):
        sub.verdict("seeds named", problems, "submission.json names those with a log")


def check_code(sub):
    """One code, that of the file, for all seeds."""
    if sub.code is None:
        return
    own, problems, unknown = sha256(sub.code), [], []
    plain = (sub.source or sub.code).replace(b"\r\n", b"\n").strip()
    for log in sub.logs:
        starts = log.source is not None and log.source.replace(b"\r\n", b"\n").strip() == plain
        if log.code_sha256 and log.code_sha256 != own:
            problems.append(f"{log.name} ran {log.code_sha256[:16]}…, train_gpt.py is {own[:16]}…")
        elif log.source is not None and not starts:
            problems.append(f"{log.name} begins with another source than train_gpt.py's")
        elif not log.code_sha256 and not starts:
            unknown.append(log.name)
    sub.verdict("same code", problems, f"sha256 {own[:16]}… in {len(sub.logs) - len(unknown)} logs")
    if unknown:
        sub.add(UNCHECKED, "same code", f"neither hash nor source in {listed(unknown)}")


def check_bytes(sub):
    """Code on disk plus model of each log, against the cap, the logged sum and submission.json."""
    problems, totals, models = [], {}, {}
    for seed, log in sub.runs.items():
        if sub.code is not None and log.code_bytes is not None and log.code_bytes != len(sub.code):
            problems.append(f"{log.name}: 'Code size' {log.code_bytes:,}, train_gpt.py has {len(sub.code):,}")
        parts = (log.code_bytes, log.model_bytes)
        if None not in (*parts, log.total_bytes) and sum(parts) != log.total_bytes:
            problems.append(f"{log.name}: {parts[0]:,} + {parts[1]:,} is {sum(parts):,}, logged as {log.total_bytes:,}")
        if log.model_bytes is None:
            sub.add(UNCHECKED, "bytes", f"{log.name} does not say the model's bytes")
        elif sub.code is not None:
            models[seed], totals[seed] = log.model_bytes, len(sub.code) + log.model_bytes
    problems += [f"seed {s}: {t:,} exceeds {CAP_BYTES:,} by {t - CAP_BYTES:,}" for s, t in totals.items() if t > CAP_BYTES]
    sub.verdict("bytes", problems, f"{listed(f'{t:,}' for t in totals.values())} of {CAP_BYTES:,} (code on disk + model)")
    claims, problems = sub.claims or {}, []
    for key, true in (("bytes_total", totals), ("bytes_model", models), ("bytes_code", {"": len(sub.code or b"")})):
        if claims.get(key) is not None and true and claims[key] != max(true.values()):
            problems.append(f"{key} is {claims[key]}, not {max(true.values()):,}" + (
                " (the largest seed's)" if claims[key] in true.values() else ""))
    if totals and sub.claims:
        sub.verdict("bytes claimed", problems, "submission.json has the largest seed's")


def check_seconds(sub):
    """Training and evaluation within 600 s each, and what no timer held."""
    problems, close, seen = [], [], []
    for log in sub.logs:
        if log.train_seconds is None:
            sub.add(UNCHECKED, "train seconds", f"no train_time in {log.name}")
        elif log.train_seconds > CAP_SECONDS:
            within = log.train_seconds <= CAP_SECONDS + log.step_seconds
            (close if within else problems).append(f"{log.name}: {log.train_seconds:.2f} s exceeds {CAP_SECONDS}" + (
                " by less than a step" if within else ""))
        else:
            seen.append(f"{log.train_seconds:.1f}")
        if "gptq_calibration:start" in log.body and "code_sha256:" not in log.body:
            close.append(f"{log.name}: calibrates after the last train_time, which counts as training")
    if seen or problems:
        sub.verdict("train seconds", problems, f"{listed(seen)} of {CAP_SECONDS}", sub.severity)
    if close:
        sub.add(WARN, "train seconds", "; ".join(close))
    problems, seen, rest = [], [], []
    for log in sub.scored:
        seconds = log.eval_seconds if log.eval_seconds is not None else log.timed_seconds
        if not seconds:
            sub.add(UNCHECKED, "eval seconds", f"no eval_time in {log.name}")
            continue
        if log.eval_seconds is not None and log.eval_seconds < log.timed_seconds - 0.2:
            problems.append(f"{log.name}: {log.eval_seconds:.1f} s in all, its evaluations alone {log.timed_seconds:.1f} s")
        elif seconds > CAP_SECONDS:
            problems.append(f"{log.name}: {seconds:.1f} s exceeds {CAP_SECONDS}")
        seen.append(f"{seconds:.1f}")
        rest.append(None if log.eval_seconds is None else f"{log.eval_seconds - log.timed_seconds:.1f}")
    if seen:
        sub.verdict("eval seconds", problems, f"{listed(seen)} of {CAP_SECONDS}", sub.severity)
    if None in rest:
        sub.add(UNCHECKED, "outside of timers", "evaluation seconds are the sum of the evaluations' own timers; loading, "
                "decompression and compilation are not visible")
    elif rest:
        sub.add(PASS, "outside of timers", f"between the evaluations, inside the total: {listed(rest)} s; packing, in neither "
                f"limit: {listed(log.pack_seconds for log in sub.scored)} s")


def check_denominator(sub):
    """Loss and bpb of every evaluation must belong to the bytes of the text."""
    problems, good, unknown = [], [], []
    for log in sub.scored:
        ratios = [s.bytes_per_target for s in log.scores.values()]
        if max(ratios) / min(ratios) - 1 > max(1e-4, *(2 * s.tolerance for s in log.scores.values())):
            problems.append(f"{log.name}: bytes per target differ between evaluations: "
                            + listed(f"{k} {s.bytes_per_target:.5f}" for k, s in log.scores.items()))
        if log.targets and log.scored_bytes:
            for key, s in log.scores.items():
                implied = s.bytes_per_target * log.targets
                if abs(implied / log.scored_bytes - 1) > s.tolerance:
                    problems.append(f"{log.name}: {key} implies {implied:,.0f} bytes, logged are {log.scored_bytes:,}")
            by_ledger = (log.loss_sum or 0) / log.targets
            if by_ledger and abs(by_ledger - log.score.loss) > 1.01 * log.score.loss_unit + 1e-6 / log.targets:
                problems.append(f"{log.name}: {log.key} is {log.score.loss} nats, the ledger's sum gives {by_ledger:.8f}")
        official = OFFICIAL_TARGETS.get(log.vocabulary)
        targets, ratio = log.targets or official, log.score.bytes_per_target
        if not targets:
            unknown.append(f"{log.name}: number of targets unknown; loss and bpb imply {ratio:.4f} bytes per target")
        elif targets in OFFICIAL_TARGETS.values() and abs(ratio * targets / OFFICIAL_BYTES - 1) > 0.01:
            problems.append(f"{log.name}: {ratio * targets:,.0f} bytes implied, the validation text has about "
                            f"{OFFICIAL_BYTES:,} ({100 * (ratio * targets / OFFICIAL_BYTES - 1):+.1f} %)")
        elif official and abs(ratio * official / OFFICIAL_BYTES - 1) > 0.1:
            unknown.append(f"{log.name}: {ratio:.3f} bytes per target, official text has {OFFICIAL_BYTES / official:.3f}: "
                           "right only for another text or tokenizer")
        else:
            good.append(f"{ratio * targets:,.0f}")
    ways = {log.name: log.bytes_from for log in sub.scored if log.bytes_from}
    if len(set(ways.values())) > 1:
        each = listed(f"{way} in {name}" for name, way in ways.items())
        problems.append(f"bytes counted from {each}: score all seeds on one data folder")
    if problems or good:
        way = f"; counted from the {next(iter(ways.values()))}" if ways else ""
        sub.verdict("bits per byte", problems, f"loss ÷ ln 2 × targets ÷ bpb is {listed(good)} "
                    f"bytes, as logged or known{way}")
    if unknown:
        sub.add(WARN, "bits per byte", "; ".join(unknown))
    other = {f"{log.targets:,}" for log in sub.scored if log.targets and log.targets not in OFFICIAL_TARGETS.values()}
    if other:
        sub.add(sub.severity, "validation set", f"{listed(sorted(other))} targets; the official set has " + " or ".join(
            f"{n:,} at SP{v}" for v, n in OFFICIAL_TARGETS.items()))
    elif any(log.targets for log in sub.scored):
        sub.add(PASS, "validation set", "all official targets")
    else:
        sub.add(UNCHECKED, "validation set", "no log says how many targets were scored")


def check_scores(sub):
    """val_loss, val_bpb and their spread in submission.json against the logs."""
    if sub.claims is None or not sub.scored:
        return
    last = sub.scored[-1]
    kinds = [k for k in dict.fromkeys([last.key, *reversed(last.scores)]) if all(k in log.scores for log in sub.scored)]
    for key, attribute in (("val_bpb", "bpb"), ("val_loss", "loss")):
        claim, means = number(sub.claims.get(key)), {}
        if claim is None:
            sub.add(UNCHECKED, key, "not in submission.json as a number")
            continue
        for kind in kinds:
            rows = [log.scores[kind] for log in sub.scored]
            means[kind] = mean_std([getattr(s, attribute) for s in rows])[0]
            slack = 1.01 * (half_unit(sub.claims[key]) + max(getattr(s, f"{attribute}_unit") for s in rows))
            if abs(claim - means[kind]) <= slack:
                other = "" if kind == last.key else f"; the last evaluation is {last.key}"
                sub.add(WARN if other else PASS, key, f"{sub.claims[key]} is the mean of {kind}, {means[kind]:.6f}{other}")
                break
        else:
            as_bpb = key == "val_loss" and abs(claim - mean_std([log.score.bpb for log in sub.scored])[0]) < 1e-3
            sub.add(WARN if as_bpb else FAIL, key, f"{sub.claims[key]} " + ("is the bpb, not nats" if as_bpb else
                    "is no mean of the logs: " + listed(f"{k} {m:.6f}" for k, m in means.items())))
    stated, (_, std) = sub.claims.get("val_bpb_std"), mean_std([log.score.bpb for log in sub.scored])
    if number(stated) is None or std is None:
        if std is not None or number(stated):
            sub.add(WARN, "val_bpb_std", f"submission.json has {stated}; the {len(sub.scored)} logs give {std}")
        return
    population = std * math.sqrt(1 - 1 / len(sub.scored))
    slack = 1.01 * half_unit(stated) + 1e-7
    sub.verdict("val_bpb_std", [f"{stated}, the logs give {std:.6f} (n−1)"] if min(
        abs(float(stated) - std), abs(float(stated) - population)) > slack else [], f"{stated}, logs {std:.6f} (n−1)")


RESULT_KEYS = {"val_loss": lambda g: (g.score.loss, g.score.loss_unit), "val_bpb": lambda g: (g.score.bpb, g.score.bpb_unit),
               **{k: lambda g: (g.total_bytes, 0) for k in ("bytes_total", "total_bytes", "artifact_bytes")},
               "bytes_model": lambda g: (g.model_bytes, 0), "model_bytes": lambda g: (g.model_bytes, 0),
               "bytes_code": lambda g: (g.code_bytes, 0), "code_bytes": lambda g: (g.code_bytes, 0),
               "train_seconds": lambda g: (g.train_seconds, 0.06), "eval_seconds": lambda g: (g.eval_seconds, 0.06),
               "scored_targets": lambda g: (g.targets, 0), "scored_bytes": lambda g: (g.scored_bytes, 0),
               "seed": lambda g: (g.seed, 0)}


def differences(row, log):
    """What a row of results says otherwise than the log."""
    out = []
    for key, logged in RESULT_KEYS.items():
        value = row.get(key)
        if isinstance(value, dict):  # a result file's {kind: value}, the last of which counts
            value = next(reversed(value.values()), None)
        true, unit = logged(log)
        if number(value) is None or true is None:
            continue
        if abs(float(value) - true) > 1.01 * (unit + half_unit(value) * (unit > 0)):
            out.append(f"{key} {value} where the log has {true}")
    way = row.get("bytes_from")
    if way is not None and (way not in BYTES_FROM or way != (log.bytes_from or way)):
        known = log.bytes_from or " or ".join(BYTES_FROM)
        out.append(f"bytes_from {way} where the log has {known}")
    return out


def check_seed_results(sub):
    """Each seed's row of submission.json, and its result file where there is one, against its log."""
    problems, compared = [], 0
    results = (sub.claims or {}).get("seed_results")
    for seed, log in sub.runs.items():
        if not log.scores:
            continue
        rows = {}
        if isinstance(results, dict):
            rows["seed_results"] = results.get(str(seed), results.get(f"seed_{seed}", results.get(f"seed{seed}")))
        path = sub.folder / f"result_seed{seed}.json"
        if path.is_file():
            try:
                rows[path.name] = read_json(path)
            except Problem as problem:
                problems.append(str(problem))
        for where, row in rows.items():
            if not isinstance(row, dict):
                continue
            compared += 1
            problems += [f"{where}, seed {seed}: {d}; take both from one run"
                         for d in differences(row, log)]
            if row.get("code_sha256") and log.code_sha256 and row["code_sha256"] != log.code_sha256:
                problems.append(f"{where}, seed {seed}: code_sha256 differs from the log's")
    if compared or problems:
        sub.verdict("seed results", problems, f"{compared} rows agree with the logs")
    else:
        sub.add(UNCHECKED, "seed results", "no rows by seed in submission.json")


def check_settings(sub):
    """Names set in the logs and in the README's commands that the script cannot read; settings that differ between seeds."""
    if sub.tree is None:
        return
    known = names_read(sub.tree)
    unread, shown = {}, 0
    for log in sub.logs:
        named = {*log.settings, *re.findall(r"^(?:export )?([A-Z][A-Z0-9_]{3,})=\S", log.body, re.M)}
        shown += len(named)
        for name in sorted(n for n in named - known if not n.startswith(FOREIGN)):
            unread.setdefault(name, []).append(log.name)
    if shown:
        sub.verdict("settings read", [f"{n} (in {listed(where)}): the script does not read it" for n, where in unread.items()],
                    f"the script reads all that the logs name, {shown // len(sub.logs)} each")
    else:
        sub.add(UNCHECKED, "settings read", "the logs name no settings")
    readme = sub.folder / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    blocks = [b for b in re.findall(r"^```.*?^```", text, re.M | re.S) if "train_gpt.py" in b or "export " in b]
    commands = {name for b in blocks for name in re.findall(r"\b([A-Z][A-Z0-9_]{2,})=", b)}
    unread = sorted(n for n in commands - known if not n.startswith(FOREIGN))
    if commands:
        sub.verdict("README's commands", [f"{listed(unread)}: the script does not read it"] if unread else [],
                    f"the script reads {listed(sorted(commands))}", WARN)
    named = {log.name: {k.lower(): v for k, (v, _) in log.settings.items()} for log in sub.logs if log.settings}
    if named:
        sub.verdict("same settings", differing_settings(named), f"in {len(named)} of {len(sub.logs)} logs")


def differing_settings(named):
    """Lines 'NAME: value in a, value in b' of settings that differ, other than those that may; `named` is {name: settings}."""
    lines = []
    for key in sorted({k for settings in named.values() for k in settings} - set(NOT_OF_THE_MODEL)):
        values = {name: settings.get(key, "absent") for name, settings in named.items()}
        if len(set(map(str, values.values()))) > 1:
            lines.append(f"{key.upper()}: " + listed(f"{v} in {name}" for name, v in values.items()))
    return lines


def check_imports(sub):
    """What the script imports and which addresses and outside paths it holds: a list to look at, no proof."""
    if sub.tree is None:
        return
    modules = modules_imported(sub.tree)
    strange = []
    for name in sorted((modules - LIBRARIES - set(sys.stdlib_module_names)) | modules & NETWORK):
        beside = sub.folder / f"{name}.py"
        strange.append(f"imports {name}" + (" (network)" if name in NETWORK else "") + (
            f" (a file here: its {beside.stat().st_size:,} bytes count as code)" if beside.is_file() else ""))
    texts = {n.value for n in ast.walk(sub.tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    strange += [f"holds {t[:60]!r}" for t in sorted(texts) if re.fullmatch(r"(/[\w.]|~/|\.\./|\w+://)\S+|curl|wget|pip", t)]
    sub.verdict("imports and paths", strange, f"nothing foreign in {len(modules)} imports", WARN)


def check_compliance(sub):
    """What submission.json promises of limits, against the logs."""
    promises, problems = (sub.claims or {}).get("compliance"), []
    if not isinstance(promises, dict) or not sub.scored:
        return
    totals = [len(sub.code or b"") + log.model_bytes for log in sub.logs if log.model_bytes is not None]
    seconds = [log.eval_seconds if log.eval_seconds is not None else log.timed_seconds for log in sub.scored]
    true = dict(train=all((log.train_seconds or 0) <= CAP_SECONDS + log.step_seconds for log in sub.logs),
                eval=max(seconds) <= CAP_SECONDS, bytes=max(totals, default=0) <= CAP_BYTES, seeds=len(sub.scored) >= 3,
                set=all(log.targets in (None, *OFFICIAL_TARGETS.values()) for log in sub.scored))
    for name, pattern in dict(train="train.*600", eval="eval.*600", bytes="(bytes|artifact).*16", seeds="three_seeds",
                              set="full_validation_set").items():
        problems += [f"{key}: true, the logs say otherwise" for key, value in promises.items()
                     if re.match(pattern, key) and value is True and not true[name]]
    sub.verdict("compliance", problems, "submission.json promises nothing that the logs contradict")


def check_hardware(sub):
    """A record was run on 8 H100s."""
    seen = {(log.world_size, log.device) for log in sub.logs if log.device or log.world_size}
    if not seen:
        sub.add(UNCHECKED, "hardware", f"not in the logs; submission.json says {(sub.claims or {}).get('hardware')}")
        return
    wrong = [f"{n}×{device}" for n, device in seen if n not in (None, 8) or (device and "H100" not in device)]
    sub.verdict("hardware", [f"{listed(wrong)}; a record runs on 8×H100"] if wrong and sub.track == RECORD else [],
                listed(f"{n or '?'}×{device or '?'}" for n, device in seen))


def reference_scores(against, ratio):
    """(mean, std, n) in nats per target of what is to be beaten: a folder, or 'mean,std,n[,bpb]'. Raises Problem.

    `ratio` is nats per target for one bit per byte; a folder's bpb is converted by it, since its tokens may be others.
    """
    if Path(against).is_dir():
        other = open_submission(against)
        values = [log.score.bpb * ratio for log in other.scored]
        if not values:
            raise Problem(f"--against {against}: no log with a score; give its figures as mean,std,n")
        return *mean_std(values), len(values)
    parts = [p.strip() for p in against.split(",")]
    scale = ratio if parts[3:] == ["bpb"] else 1
    try:
        mean, std, n = float(parts[0]) * scale, float(parts[1]) * scale, int(parts[2])
        if parts[3:] not in ([], ["bpb"]) or not (mean > 0 and std >= 0 and n >= 2 and math.isfinite(mean + std)):
            raise ValueError
    except (ValueError, IndexError):
        raise Problem(f"--against {against}: neither a folder nor mean,std,n in nats (n ≥ 2), "
                      "such as 1.8875,0.0010,3 or 1.1194,0.0006,3,bpb") from None
    return mean, std, n


def check_improvement(sub, against):
    """Welch's t-test: better than the record by 0.005 nats at p < 0.01."""
    if not against:
        sub.add(WARN if sub.track == RECORD else UNCHECKED, "improvement", "no record to beat given (--against)")
        return
    if not sub.scored:
        return
    ratio = mean_std([log.score.loss / log.score.bpb for log in sub.scored])[0]
    old, old_std, old_n = reference_scores(against, ratio)
    new, new_std = mean_std([log.score.loss for log in sub.scored])
    gain = f"{new:.5f} against {old:.5f} nats: {old - new:+.5f} better" + (
        " (is that record in bpb? then append ,bpb)" if old < new / 1.3 else "")
    if new_std is None or old_std is None:
        sub.add(sub.severity, "improvement", f"{gain}; a single run has no spread, so there is no p")
        return
    if not new_std and not old_std:
        p = 0.0 if old - new > MARGIN_NATS else 1.0
    else:
        from scipy.stats import ttest_ind_from_stats
        p = float(ttest_ind_from_stats(old - MARGIN_NATS, old_std, old_n, new, new_std, len(sub.scored), equal_var=False,
                                       alternative="greater").pvalue)
    gain += f"; Welch's p = {p:.3g} for {MARGIN_NATS} or less"
    sub.verdict("improvement", [] if p < MOST_P else [f"{gain}, must be < {MOST_P}"], gain, sub.severity)


def check_artifacts(sub, artifacts):
    """Artifacts at hand have the bytes that a log counted."""
    for path in artifacts:
        if not path.is_file():
            raise Problem(f"--artifact {path}: no such file")
        size, named = path.stat().st_size, re.search(r"seed[_-]?(\d+)", path.name)
        seeds = [s for s, log in sub.runs.items() if log.model_bytes == size]
        right = str(named[1]) in map(str, seeds) if named else bool(seeds)
        logged = listed(f"seed {s} {log.model_bytes}" for s, log in sub.runs.items())
        sub.verdict("artifact", [] if right else [f"{path.name} has {size:,} bytes; the logs: {logged}"],
                    f"{path.name}, {size:,} bytes, is seed {listed(seeds)}'s")
    if not artifacts:
        sub.add(UNCHECKED, "artifact", "none at hand (--artifact F): model bytes are the logs'")


@functools.lru_cache
def bytes_in(data, tokenizer, vocabulary, targets):
    """(bytes, how they were counted) of the first targets of a data folder, by this repository's
    script. Raises Problem."""
    sys.path.insert(0, str(ROOT))
    import train_gpt
    s = replace(train_gpt.Settings(), data_path=data, tokenizer_path=tokenizer, train_seq_len=1,
                vocab_size=vocabulary, eval_seq_len=0, val_limit_tokens=targets)
    try:
        byte_table, tokens = train_gpt.ByteTable(s), train_gpt.load_validation(s)
        byte_table.check_text(tokens, f"{s.data_path}: validation")
    except train_gpt.UserError as problem:
        raise Problem(f"--data {data}: {problem}") from None
    if len(tokens) - 1 < targets:
        raise Problem(f"--data {data}: {len(tokens) - 1:,} validation targets, the logs have "
                      f"{targets:,}; give the folder that the runs were scored on")
    return byte_table.count(tokens), byte_table.source


def check_text(sub, data, tokenizer):
    """The bytes of each log against the data: its side files where there are any, else the table of
    pieces."""
    logs = [log for log in sub.logs if log.targets and log.scored_bytes and log.vocabulary]
    lacks = ("no data folder given (--data F): bytes are the logs'" if not data else
             "no log says targets, bytes and vocabulary" if not logs else
             None if (ROOT / "train_gpt.py").is_file() else "this repository's script is not there")
    if lacks:
        sub.add(UNCHECKED, "bytes of text", lacks)
        return
    problems, good = [], []
    for log in logs:
        model = tokenizer or log.settings.get("TOKENIZER_PATH", ("",))[0]
        if not model:
            raise Problem(f"--data {data}: {log.name} names no tokenizer; give it with --tokenizer")
        count, way = bytes_in(data, model, log.vocabulary, log.targets)
        if (count, way) == (log.scored_bytes, log.bytes_from or way):
            good.append(f"{count:,} bytes of {log.targets:,} targets, counted from the {way}")
        else:
            logged = f" from the {log.bytes_from}" if log.bytes_from else ""
            problems.append(f"{log.name}: {log.scored_bytes:,} bytes{logged}, the data has "
                            f"{count:,} from the {way}: give the data that it was scored on, or "
                            "score its artifact on these (EVAL_ONLY)")
    sub.verdict("bytes of text", problems, f"{listed(dict.fromkeys(good))}, as logged")


def ends_well(command, cwd, environ, seconds):
    """('' or what went wrong, last line of its output) of a command."""
    try:
        done = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, errors="replace", timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not done after {seconds} s", ""
    lines = (done.stdout + done.stderr).strip().splitlines()
    return f"exit status {done.returncode}" if done.returncode else "", lines[-1][:200] if lines else ""


def check_by_running(sub, artifacts, given):
    """Executes the submission's script: a dry run inside a copy of the folder with the logged settings; audits artifacts."""
    if sub.source is None or b"--dry-run" not in sub.source:
        sub.add(UNCHECKED, "dry run", "train_gpt.py knows no --dry-run: started, it would train")
    else:
        known = names_read(sub.tree) if sub.tree else set()
        environ = {k: v for k, v in os.environ.items() if k not in known and not k.startswith("TORCHELASTIC")}
        settings = sub.logs[0].settings if sub.logs else {}
        environ |= {k: v for k, (v, explicit) in settings.items() if explicit}
        with tempfile.TemporaryDirectory() as scratch:  # a script may write beside itself
            copy = shutil.copytree(sub.folder, Path(scratch) / "folder")
            problem, line = ends_well([sys.executable, "train_gpt.py", "--dry-run"], copy, environ, 120)
        sub.verdict("dry run", [f"{problem}: {line}"] if problem else [], f"inside the folder, settings of a log: {line}")
    audit, logged = HERE / "audit.py", sub.logs[0].settings if sub.logs else {}
    data = {name: value or logged[name][0] for value, name in
            zip(given, ("DATA_PATH", "TOKENIZER_PATH")) if value or name in logged}
    for path in artifacts:
        if not audit.is_file():
            sub.add(UNCHECKED, "audit", "records/audit.py is not there")
            break
        command = [sys.executable, str(audit), str(path.resolve()), "--script", str((sub.folder / "train_gpt.py").resolve())]
        problem, line = ends_well(command, ROOT, {**os.environ, **data}, 600)
        if problem == "exit status 2":  # no data here, or nothing that it can read
            sub.add(UNCHECKED, "audit", f"{path.name}: {line}")
        else:
            sub.verdict("audit", [f"{path.name}: {problem}: {line}"] if problem else [], f"{path.name}: {line}")


CHECKS = (check_claims, check_logs, check_seeds, check_code, check_bytes, check_seconds, check_denominator, check_scores,
          check_seed_results, check_compliance, check_settings, check_imports, check_hardware)


def check(folder, against=None, run=False, artifacts=(), data=None, tokenizer=None):
    """Submission with its findings. Raises Problem for arguments that make no sense."""
    sub = open_submission(folder)
    for one in CHECKS:
        one(sub)
    check_improvement(sub, against)
    artifacts = [Path(a) for a in artifacts] or sorted(sub.folder.glob("*.ptz"))
    check_artifacts(sub, artifacts)
    given = [path and os.path.abspath(path) for path in (data, tokenizer)]
    check_text(sub, *given)
    if run:
        check_by_running(sub, artifacts, given)
    return sub


def verdict_lines(sub):
    width = max(len(what) for _, what, _ in sub.findings)
    counts = Counter(status for status, *_ in sub.findings)
    lines = [f"{status:<11}  {what:<{width}}  {text}" for status, what, text in sub.findings]
    return [*lines, f"{sub.track}: " + listed(f"{counts[s]} {s}" for s in (FAIL, WARN, UNCHECKED, PASS))]


# -- pack ----------------------------------------------------------------------------------------------------------------

@dataclass
class Run:
    """One finished run: its result file, the object in it, and its log."""
    path: Path
    result: dict
    log: Log

    @property
    def seed(self):
        return self.result["seed"]


def result_files(place):
    """Result files of a run folder, of a folder of such, or the file itself. Raises Problem."""
    place = Path(place)
    if place.is_file():
        return [place]
    for pattern in ("logs/*.json", "*.json", "*/logs/*.json"):
        found = sorted(place.glob(pattern))
        if found:
            return found
    raise Problem(f"{place}: no result there; give an OUT_DIR that holds logs/<RUN_ID>.json, or that file")


def open_run(path):
    """Run of a result file. Raises Problem where it is none, unfinished, or not that of its log."""
    result = read_json(path)
    needs = dict(seed=int, settings=dict, code_sha256=str, val_loss=dict, val_bpb=dict, total_bytes=int, code_bytes=int,
                 steps=int, train_seconds=(Decimal, int), eval_seconds=(Decimal, int))
    lacks = [key for key, kind in needs.items() if not isinstance(result.get(key), kind)]
    if lacks:
        raise Problem(f"{path}: no result of a run: it has no {listed(lacks)}")
    if result["settings"].get("eval_only"):
        raise Problem(f"{path}: a run with EVAL_ONLY trained nothing; give the result of the run that trained")
    log_path = path.with_suffix(".txt")
    if not log_path.is_file():
        raise Problem(f"{path}: its log {log_path.name} is not beside it")
    log = read_log(log_path)
    wrong = differences(result, log) if log.scores else ["the log has no final score"]
    wrong += ["the log has another code_sha256"] if log.code_sha256 != result["code_sha256"] else []
    if wrong:
        raise Problem(f"{path}: not the result of {log_path.name}: {'; '.join(wrong)}")
    return Run(path, result, log)


def open_runs(places):
    """Runs of all places, by seed; they must be seeds of one thing. Raises Problem."""
    runs = [open_run(path) for place in places for path in result_files(place)]
    for seed, n in Counter(run.seed for run in runs).items():
        if n > 1:
            paths = listed(run.path for run in runs if run.seed == seed)
            raise Problem(f"{n} results of seed {seed}: {paths}; name the files to take")
    codes = {str(run.path): run.result["code_sha256"] for run in runs}
    if len(set(codes.values())) > 1:
        raise Problem("the runs are of different code: " + listed(f"{h[:16]}… in {p}" for p, h in codes.items()))
    varying = differing_settings({str(run.path): run.result["settings"] for run in runs})
    if varying:
        raise Problem("the runs have different settings:\n  " + "\n  ".join(varying))
    return runs


def find_script(runs, given=None):
    """Bytes of the script that ran: the given one; else one beside a run, this repository's, or from a log. Raises Problem."""
    wanted, run = runs[0].result["code_sha256"], runs[0]
    beside = [folder / "train_gpt.py" for r in runs for folder in list(r.path.resolve().parents)[:3]]
    paths = [Path(given)] if given else [*beside, ROOT / "train_gpt.py"]
    candidates = {str(p): p.read_bytes() for p in dict.fromkeys(paths) if p.is_file()}
    if run.log.source is not None and not given:
        candidates[f"source in {run.log.path}"] = run.log.source
        try:
            from artifact import pack_code
            candidates[f"source in {run.log.path}, packed"] = pack_code(run.log.source)
        except ImportError:
            pass
    for content in candidates.values():
        if sha256(content) == wanted:
            return content
    raise Problem(f"no script has the sha256 of the runs, {wanted[:16]}…:\n  " + "\n  ".join(
        f"{sha256(c)[:16]}…  {name}" for name, c in candidates.items()) + "\ngive the script that ran with --script")


def hardware_of(result):
    ranks, device = result.get("world_size") or 1, result.get("device") or "unknown"
    return f"{ranks}×{device}" if "CPU" not in device or ranks > 1 else device


def summary(runs, args, code):
    """The object of submission.json."""
    last = [(next(reversed(r.result["val_loss"].values())), next(reversed(r.result["val_bpb"].values()))) for r in runs]
    (loss, _), (bpb, std) = mean_std([float(v) for v, _ in last]), mean_std([float(v) for _, v in last])
    rows = {}
    for run, (run_loss, run_bpb) in zip(runs, last):
        r = run.result
        rows[str(run.seed)] = dict(val_loss=float(run_loss), val_bpb=float(run_bpb), **{
            f"{kind}_bpb": float(v) for kind, v in list(r["val_bpb"].items())[:-1]}, steps=r["steps"], train_seconds=round(
            float(r["train_seconds"]), 1), eval_seconds=round(float(r["eval_seconds"]), 1), bytes_total=r["total_bytes"])
    results = [r.result for r in runs]
    first, ledgers = results[0], all("ledger_sha256" in r for r in results)
    return dict(
        author=args.author, github_id=args.github_id, name=args.name, date=args.date, track=args.track,
        val_loss=round(loss, 8), val_bpb=round(bpb, 8), val_bpb_std=None if std is None else round(std, 8),
        seeds=[r.seed for r in runs], seed_results=rows, bytes_code=len(code),
        bytes_model=max(r["total_bytes"] for r in results) - len(code), bytes_total=max(r["total_bytes"] for r in results),
        hardware=hardware_of(first), pytorch_version=first.get("versions", {}).get("torch"), blurb=args.blurb or args.name,
        compliance=dict(
            score_before_update=ledgers, each_target_once=ledgers, artifact_read_from_disk="artifact" in first,
            train_seconds_under_600=all(r["train_seconds"] <= CAP_SECONDS for r in results),
            eval_seconds_under_600=all(r["eval_seconds"] <= CAP_SECONDS for r in results),
            bytes_under_16mb=all(r["total_bytes"] <= CAP_BYTES for r in results), three_seeds=len(runs) >= 3,
            full_validation_set=all(r.get("scored_targets") in OFFICIAL_TARGETS.values() for r in results),
            validation_targets=first.get("scored_targets"), validation_bytes=first.get("scored_bytes")))


def table(head, rows):
    lines = ["| " + " | ".join(map(str, line)) + " |" for line in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def results_table(runs, facts):
    kinds = list(runs[0].result["val_bpb"])
    rows = [[r.seed, *(f"{r.result['val_bpb'][k]:.4f}" for k in kinds), f"{next(reversed(r.result['val_loss'].values())):.4f}",
             f"{r.result['steps']:,}", f"{r.result['train_seconds']:.1f}", f"{r.result['eval_seconds']:.1f}",
             f"{r.result['total_bytes']:,}"] for r in runs]
    if len(runs) > 1:
        means = [mean_std([float(r.result["val_bpb"][k]) for r in runs]) for k in kinds]
        rows.append(["mean ± std", *(f"{m:.4f} ± {s:.4f}" for m, s in means), f"{facts['val_loss']:.4f}", "", "", "", ""])
    head = ["seed", *(f"{k}, bpb" for k in kinds), "val_loss, nats", "steps", "training, s", "evaluation, s", "bytes"]
    return table(head, rows)


def settings_table(run, source):
    """What differs from the defaults, and whether the command or the preset said so."""
    defaults, rows = defaults_of(ast.parse(source)), []
    for key, value in run.result["settings"].items():
        default = defaults.get(key, "unknown")
        same = str(value) == str(default) or number(value) == number(default) is not None
        if not same and key not in (*NOT_OF_THE_MODEL, "preset"):
            explicit = run.log.settings.get(key.upper(), ("", False))[1]
            rows.append([f"`{key.upper()}`", f"`{value}`", f"`{default}`", "command" if explicit else
                         f"preset {run.result['settings'].get('preset') or 'none'}"])
    return table(["setting", "value", "default", "set by"], rows) if rows else "None differs from the default."


def command_of(run):
    """The command of a run, from the settings that were set explicitly, on one GPU or with torchrun."""
    values = {k: v for k, (v, explicit) in run.log.settings.items() if explicit}
    ranks = run.result.get("world_size") or 1
    start = f"torchrun --standalone --nproc_per_node={ranks}" if ranks > 1 else "python"
    return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in values.items()), start, "train_gpt.py"])


def timing_lines(runs):
    lines = []
    for run in runs:
        timers = listed(f"{key} {s.seconds:.1f}" for key, s in run.log.scores.items() if s.seconds is not None)
        pack = run.result.get("pack_seconds")
        lines.append(f"- Seed {run.seed}: training {run.result['train_seconds']:.1f} of {CAP_SECONDS} s; evaluation "
                     f"{run.result['eval_seconds']:.1f} of {CAP_SECONDS} s ({timers})"
                     + (f"; packing {pack:.1f} s, outside both" if pack is not None else "") + ".")
    return "\n".join(lines)


def readme_text(runs, facts, source, verdict):
    """The README of a folder; `verdict` are the lines of its check."""
    first = runs[0].result
    spread = f"± {facts['val_bpb_std']:.4f} over {len(runs)} seeds" if len(runs) > 1 else "one seed"
    violations = sorted({str(v) for r in runs for v in r.result.get("violations") or []})
    return "\n".join([
        f"# {facts['name']}", "", *([facts["blurb"], ""] if facts["blurb"] != facts["name"] else []),
        f"**{facts['val_bpb']:.4f} bits per byte** ({spread}), {facts['bytes_total']:,} bytes (largest seed), "
        f"{facts['hardware']}, PyTorch {facts['pytorch_version']}.", "", results_table(runs, facts), "",
        f"{first.get('model_params', 0):,} parameters; {first.get('scored_targets', 0):,} validation targets, "
        f"{first.get('scored_bytes', 0):,} bytes"
        + (f", counted from the {first['bytes_from']}" if "bytes_from" in first else "")
        + ". The last evaluation counts.", "",
        *([f"What makes it no legal record: {'; '.join(violations)}.", ""] if violations else []), "![loss](loss.png)", "",
        "## Settings that differ from the default", "", settings_table(runs[0], source), "",
        "## Command", "", "```", *map(command_of, runs), "```", "", "## Timing", "", timing_lines(runs), "",
        "## What the checks said", "", "```", *verdict, "```", "",
        "`train_seed<SEED>.log` begins with the source of the script; `result_seed<SEED>.json` holds all settings, the hash "
        f"of the code ({first['code_sha256'][:16]}…) and of the score ledger; `train_gpt.py` is the script as it ran.", ""])


def plot_loss(runs, path):
    """Training and validation loss of every seed over steps, as PNG."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(figsize=(7, 4), dpi=120)
    for i, run in enumerate(runs):
        for name, style, label in (("train_loss", "-", "training"), ("val_loss", "o", "validation")):
            points = re.findall(rf"^step:(\d+)/\d+ {name}:(\d+\.?\d*)", run.log.body, re.M)
            if points:
                axes.plot([int(s) for s, _ in points], [float(v) for _, v in points], style, color=f"C{i}", markersize=4,
                          linewidth=1, label=f"seed {run.seed}, {label}")
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def requirements_of(result):
    """The packages of a run, at its versions."""
    names = {k: str(result.get("versions", {}).get(k) or "").split("+")[0] for k in ("torch", "numpy", "sentencepiece")}
    lines = [f"{k}=={v}" if v else k for k, v in names.items()]
    return "\n".join(lines + (["zstandard"] if result["settings"].get("codec") == "zstd" else [])) + "\n"


def fill_folder(folder, runs, facts, code, with_artifact):
    """Write everything but the README's verdict, which needs the rest."""
    (folder / "submission.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n",
                                            **UTF8)
    (folder / "train_gpt.py").write_bytes(code)
    (folder / "requirements.txt").write_text(requirements_of(runs[0].result))
    for run in runs:
        shutil.copyfile(run.log.path, folder / f"train_seed{run.seed}.log")
        shutil.copyfile(run.path, folder / f"result_seed{run.seed}.json")
        if with_artifact:
            name = Path(str(run.result.get("artifact"))).name
            artifact = next((p / name for p in run.path.resolve().parents[:2] if (p / name).is_file()), None)
            if artifact is None or artifact.stat().st_size != run.log.model_bytes:
                raise Problem(f"--with-artifact: {name} of {run.log.model_bytes} bytes is not at {run.path.parent.parent}")
            shutil.copyfile(artifact, folder / f"final_model_seed{run.seed}{''.join(Path(name).suffixes)}")
    plot_loss(runs, folder / "loss.png")


def pack(args):
    """Make the folder whole or not at all, then print what its check says. Returns the exit status."""
    runs = open_runs(args.places)
    code = find_script(runs, args.script)
    args.date = args.date or datetime.date.fromtimestamp(max(r.path.stat().st_mtime for r in runs)).isoformat()
    slug = re.sub(r"\W+", "_", args.name).strip("_")[:60] or "run"
    target = Path(args.out or HERE / args.track / f"{args.date}_{slug}")
    if target.exists():
        raise Problem(f"{target} is there already; move it away, or name another folder with --out")
    facts = summary(runs, args, code)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".packing-") as scratch:
        folder = Path(scratch) / target.name
        folder.mkdir()
        fill_folder(folder, runs, facts, code, args.with_artifact)
        source = readable_source(folder / "train_gpt.py")
        for verdict in (["…"], None):  # the check looks at the README too
            sub = None if verdict else check(folder)
            text = readme_text(runs, facts, source, verdict or verdict_lines(sub))
            (folder / "README.md").write_text(text, **UTF8)
        folder.rename(target)
    print("\n".join([*verdict_lines(sub), f"written: {target}"]))
    return int(any(status == FAIL for status, *_ in sub.findings))


# -- index ---------------------------------------------------------------------------------------------------------------

def index_row(folder):
    """Row of records/README.md for a folder. Raises Problem."""
    facts = read_json(folder / "submission.json")
    bpb, std, compliance = (facts.get(k) for k in ("val_bpb", "val_bpb_std", "compliance"))
    if number(bpb) is None:
        raise Problem(f"{folder / 'submission.json'}: val_bpb is {bpb!r}, no number")
    text, compliance = f"{bpb:.4f}", compliance if isinstance(compliance, dict) else {}
    if number(std) is not None:
        text += f" ± {std:.4f} ({len(facts.get('seeds') or [])} seeds)"
    if compliance.get("full_validation_set") is False and compliance.get("validation_targets"):
        text += f" ({compliance['validation_targets']:,} targets)"
    total = f"{facts['bytes_total']:,}" if number(facts.get("bytes_total")) is not None else "?"
    track = "record, 16 MB" if folder.parent.name == RECORD else "non-record, 16 MB"
    return [f"[{folder.name}]({folder.parent.name}/{folder.name})", track, text, total, facts.get("name") or "?"]


def index(records=HERE):
    """Write the table of records/README.md anew from the folders; the text around it stays. Returns the exit status."""
    rows, problems = [], []
    for folder in sorted(p for p in records.glob("track_*/*") if p.is_dir() and not p.name.startswith(".")):
        try:
            rows.append(index_row(folder))
        except Problem as problem:
            problems.append(str(problem))
    readme = records / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else "# Our runs\n"
    old = re.search(r"^\|.*?(?=^(?!\|)|\Z)", text, re.M | re.S)
    new = table(["folder", "track", "val_bpb", "bytes", "what"], rows) + "\n"
    text = text[:old.start()] + new + text[old.end():] if old else text.rstrip("\n") + "\n\n" + new
    part = readme.with_name(f".README.md.{os.getpid()}.part")
    part.write_text(text, **UTF8)
    os.replace(part, readme)
    print("\n".join([*(f"left out: {p}" for p in problems), f"{readme}: {len(rows)} folders"]))
    return int(bool(problems))


# -- command line --------------------------------------------------------------------------------------------------------

def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    path = os.path.expanduser
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("pack", help="make a folder out of finished runs")
    p.add_argument("places", nargs="+", type=path, metavar="RUN", help="OUT_DIR of a run, or its logs/<RUN_ID>.json; one per seed")
    p.add_argument("--name", required=True)
    p.add_argument("--author", required=True)
    p.add_argument("--github-id", default="")
    p.add_argument("--blurb", default="", help="a sentence or two on what is new")
    p.add_argument("--track", choices=(RECORD, NON_RECORD), default=NON_RECORD)
    p.add_argument("--date", help="YYYY-MM-DD; default: of the newest result")
    p.add_argument("--out", type=path, help="folder to make; default: records/<track>/<date>_<name>")
    p.add_argument("--script", type=path, help="the script that ran, if it lies neither beside the runs nor here")
    p.add_argument("--with-artifact", action="store_true", help="copy the artifacts too")
    p = commands.add_parser("check", help="one line per check: PASS, FAIL, WARN, NOT CHECKED")
    p.add_argument("folder", type=path)
    p.add_argument("--against", type=path, help="the record to beat: its folder, or mean,std,n in nats (or mean,std,n,bpb)")
    p.add_argument("--artifact", type=path, action="append", default=[], help="a packed model, to count its bytes")
    p.add_argument("--data", type=path, help="folder with the validation shards, to count their bytes")
    p.add_argument("--tokenizer", type=path, help="SentencePiece model of these shards (default: "
                   "the logs')")
    p.add_argument("--run", action="store_true", help="also EXECUTE its train_gpt.py (--dry-run) and audit artifacts")
    commands.add_parser("index", help="write the table of records/README.md anew")
    return parser.parse_args(argv)


def main(argv):
    args = arguments(argv)
    try:
        if args.command == "pack":
            return pack(args)
        if args.command == "index":
            return index()
        sub = check(args.folder, args.against, args.run, args.artifact, args.data, args.tokenizer)
        print("\n".join(verdict_lines(sub)))
        return int(any(status == FAIL for status, *_ in sub.findings))
    except Problem as problem:
        print(f"error: {problem}", file=sys.stderr)
    except ImportError as problem:
        print(f"error: {problem.name} is not installed: pip install -r records/requirements.txt", file=sys.stderr)
    except BrokenPipeError:
        raise
    except OSError as problem:
        print(f"error: {problem.filename or 'output'}: {problem.strerror}; nothing was left half "
              "written", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted; nothing was left half written", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.path.append(str(ROOT / "data"))
    from shards import exit_code_of
    sys.exit(exit_code_of(main, sys.argv[1:], unread=141))  # what nobody read has passed nothing
