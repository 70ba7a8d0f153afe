r"""Make a submission folder out of finished runs, check one as a reviewer does, list our folders.

    python records/submission.py pack runs/1337 runs/42 runs/2025 --name "11 layers" \
        --author "Ada" --track track_10min_16mb
    python records/submission.py check records/track_10min_16mb/2026-03-20_mine \
        --against records/track_10min_16mb/2026-03-01
    python records/submission.py index

`check` believes the files on disk and the logs, and compares everything else with them: README.md,
submission.json, the script. It reads our folders and published ones: both forms of logs
(records/logs.py), logs in subfolders, scripts in wrappers (records/unpack.py), the names that
others give to the keys of submission.json. Each line says PASS, FAIL, WARN or NOT CHECKED, what was
read, and what follows; the last line counts them. What the files do not say is NOT CHECKED, never
FAIL. The logs that count are those of the seeds that submission.json names, told from reruns by
their score; --logs chooses others. It reads only; `--run` executes the folder's script. `--data
FOLDER` counts the bytes of the scored text again, with the byte table of this repository's
train_gpt.py. Exit status: 0; 1 where a check failed; 2 for what the caller can mend.
"""
from __future__ import annotations

import argparse
import ast
import contextlib
import datetime
import functools
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
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.append(str(HERE))
sys.path.append(str(ROOT / "data"))
from folder import (BPB, CODE, FAIL, LOSS, MODEL, NON_RECORD, PASS, RECORD, STD,  # noqa: E402
                    TOTAL, UNCHECKED, UNPARSED, WARN, Problem, adapts_on_validation, defaults_of,
                    figure, listed, markdown_table, mean_std, meaning, modules_imported, names_read,
                    number, open_submission, parsed, read_json, said, sha256, texts_of)
from logs import (DIAGNOSTIC, NOT_OF_THE_MODEL, Log, agree, half_unit, plot_losses,  # noqa: E402
                  read_logs)
from shards import exit_code_of, write_whole  # noqa: E402
from unpack import readable_source  # noqa: E402

CAP_BYTES, CAP_SECONDS, MARGIN_NATS, MOST_P = 16_000_000, 600, 0.005, 0.01
# Validation targets by vocabulary, and the UTF-8 bytes of their text. Sets are cut to whole rows of
# a few thousand tokens, which changes the bytes far less than the 16.7 % of a space counted twice.
SETS = (("SP1024", 1024, 62_021_632), ("SP2048", 2048, 50_905_088), ("SP4096", 4096, 44_847_104),
        ("SP8192", 8192, 40_540_160), ("SP8192 CaseOps", 8192, 47_851_520),
        ("bytes", 256, 151_076_864))
OFFICIAL_BYTES, ROW = 151_080_891, 8192
WHOLE_TEXT = 0.005  # bytes of the whole text differ from the official ones by at most this part
BYTES_FROM = ("text", "pieces")  # how a run counts bytes: by side files of the shards, or by pieces
LIBRARIES = {"torch", "numpy", "sentencepiece", "triton", "zstandard", "brotli", "tqdm",
             "flash_attn", "flash_attn_interface"}
NETWORK = {"socket", "ssl", "urllib", "http", "ftplib", "smtplib", "xmlrpc", "webbrowser",
           "requests", "httpx", "aiohttp", "huggingface_hub", "datasets", "wandb"}
# Variables in published commands that launchers and libraries read, not the script.
FOREIGN = ("TORCH", "PYTORCH", "NCCL_", "CUDA_", "OMP_", "MKL_", "OPENBLAS_", "TRITON", "PYTHON",
           "HF_", "NVIDIA", "GLOO_", "LD_", "PATH", "MATCHED_FINEWEB", "WANDB_", "NPROC", "MASTER_",
           "RANK", "WORLD_SIZE", "LOCAL_RANK", "TOKENIZERS_PARALLELISM", "HUGGING",
           "MODAL_", "UV_", "PIP_", "VIRTUAL_ENV", "LOG_FILE", "LOGFILE")
UTF8 = dict(encoding="utf-8", errors="backslashreplace")  # names of files may be any bytes


# -- check -----------------------------------------------------------------------------------------

def check_claims(sub):
    """submission.json: what must be there, and nulls."""
    claims, places = sub.claims, (sub.claims, *sub.rows.values())
    if claims is None:
        sub.add(UNCHECKED, "submission.json",
                "none that can be read: no claim is compared with the logs")
        return
    whole = any(said(o, BPB)[0] for o in places) and claims.get("val_bpb", 0) is not None
    aliases = dict(author=("github_id", "submitter", "authors", "name"),
                   name=("submission_name", "record_name", "title", "run_name"),
                   blurb=("description", "technique_summary", "technique", "summary"))
    lacks = [k for k in ("author", "name", "date", "github_id", "blurb") if not claims.get(k)
             and not any(claims.get(other) for other in aliases.get(k, ()))]
    lacks += [kind[0] for kind in (LOSS, TOTAL) if not any(said(o, kind)[0] for o in places)]
    results = claims.get("seed_results")
    for seed, row in results.items() if isinstance(results, dict) else ():
        nulls = [k for k, v in row.items() if v is None] if isinstance(row, dict) else []
        lacks += [f"seed_results.{seed}.{k}" for k in nulls]
    try:
        date = str(claims.get("date") or "2026-01-01")
        datetime.datetime.fromisoformat(date.replace("Z", "+00:00"))
    except ValueError:
        lacks.append(f"date (it is {claims['date']!r}, not YYYY-MM-DD)")
    sub.verdict("submission.json", [not whole and "missing or null: val_bpb"],
                f"{len(claims)} keys, a score among them",
                remarks=[lacks and f"missing or null, fill in: {listed(lacks)}"])


def check_logs(sub):
    """Every log that counts whole, with finite scores."""
    if not sub.logs:
        sub.add(UNCHECKED, "logs whole", "no log: score, bytes and seconds have no evidence here")
        return
    problems = []
    for log in sub.logs:
        others = {k: v for k, v in log.other_bpb.items() if k != "last_validation"}
        if others and not log.scores:
            sub.add(UNCHECKED, "logs whole", f"{log.name} has no loss with its score: "
                    + listed(f"{k} {v}" for k, v in others.items()))
            continue
        ours = "\nsetting " in log.body or not log.scores
        lacks = [] if log.scores else ["final score"]
        lacks += ["'Total submission size'"] if log.total_bytes is None and ours else []
        if lacks:
            ending = (log.body.rstrip().splitlines() or [""])[-1][:90]
            problems.append(f"{log.name} has no {' and no '.join(lacks)}; it ends with {ending!r}")
        finite = {k: s for k, s in log.scores.items()
                  if math.isfinite(s.loss + s.bpb) and s.bpb > 0 and s.loss > 0}
        problems += [f"{log.name}: {k} is {s.loss} nats, {s.bpb} bpb"
                     for k, s in log.scores.items() if k not in finite]
        log.scores = finite  # what comes after divides by them
    good = sub.scored and f"{len(sub.scored)} with a final score"
    sub.verdict("logs whole", problems, good, sub.severity)
    check_distinct(sub)
    keys = {log.key for log in sub.scored}
    if len(keys) > 1 and not all(sub.kind in log.scores for log in sub.scored):
        sub.add(FAIL, "logs alike", "no evaluation is in all: "
                + listed(f"{g.name}: {g.key}" for g in sub.scored))


def check_distinct(sub):
    """Every log of the seed that it is named for, and of another run than the others."""
    problems = [f"{log.name} is the log of seed {log.seed}" for log in sub.logs
                if None not in (log.seed, log.named_seed) and log.seed != log.named_seed]
    numbered = sorted(log.named_seed or 0 for log in sub.logs)
    if problems and numbered in ([*range(len(numbered))], [*range(1, len(numbered) + 1)]):
        sub.add(WARN, "logs distinct", f"named by their order, not by seed: {'; '.join(problems)}")
        problems = []
    reported = []
    for what, value in (("score ledger", lambda g: g.ledger),
                        ("scores and seconds", lambda g: g.identity), ("seed", lambda g: g.seed)):
        for same, count in Counter(map(value, sub.logs)).items():
            names = " and ".join(log.name for log in sub.logs if value(log) == same)
            if count > 1 and same not in (None, "") and names not in reported:
                reported.append(names)
                problems.append(f"{names} have the same {what}: one run, counted twice; --logs "
                                "chooses")
    sub.verdict("logs distinct", problems, f"seeds {listed(sub.runs)}")


def check_seeds(sub):
    """Three at least, and those that submission.json names."""
    if not sub.logs:
        return
    seeds = [s for s, log in sub.runs.items() if log.scores]
    few = f"{len(seeds)} finished (seeds {listed(seeds) or 'none'}); a record needs 3"
    sub.verdict("seeds", [len(seeds) < 3 and few], listed(seeds), sub.severity)
    logged = {str(s) for s in sub.runs}
    finished = {str(g.run_seed) for g in sub.every_log if g.scores and g.run_seed is not None}
    names = f"{sub.claims_name} names {listed(sorted(sub.named_seeds)) or 'no seeds'}"
    if not sub.named_seeds:
        sub.add(UNCHECKED, "seeds named", names)
    elif not any(s.isdigit() for s in logged):
        sub.add(UNCHECKED, "seeds named", f"the logs do not say their seeds; {names}")
    else:
        without, more = sorted(sub.named_seeds - logged), sorted(finished - sub.named_seeds)
        lost = f"{sub.claims_name} names seeds {listed(without)}, without a log"
        beside = (f"{sub.claims_name} lacks {listed(more)}, which has a finished log: kept back, "
                  "or another experiment?")
        sub.verdict("seeds named", [without and lost], f"{names}: each has a log", sub.severity,
                    [more and beside])


def same_source(log, sub):
    """Whether a log begins with the script, apart from comments; None where that is not known."""
    if log.source is None:
        return None
    sources = (log.source, sub.code, sub.source)
    logged, *own = (text.replace(b"\r\n", b"\n").strip() for text in sources)
    if logged in own:
        return True
    meanings = meaning(logged), meaning(own[-1])
    return None if None in meanings else meanings[0] == meanings[1]


def check_code(sub):
    """One code, that of the file, for all seeds."""
    if sub.code is None or not sub.logs:
        return
    name, problems, unknown, good = sub.script.name, [], [], []
    hashes = {sha256(sub.code), sha256(sub.source)}
    sizes = {len(sub.code), len(sub.source), sub.code_bytes}
    for log in sub.logs:
        same = log.code_sha256 in hashes if log.code_sha256 else same_source(log, sub)
        (unknown if same is None else good if same else problems).append(log)
    other = sorted({f"{n:,}" for log in sub.logs if not sizes & set(log.code_sizes)
                    for n in log.code_sizes})
    own = sha256(sub.code)[:16]
    sub.verdict(
        "same code",
        [f"{g.name} ran {g.code_sha256[:16]}…, {name} is {own}…" if g.code_sha256 else
         f"{g.name} begins with another source than {name}'s" for g in problems],
        good and f"sha256 {own}…, or its source, in {len(good)} logs", sub.severity,
        [other and f"the logs' 'Code size' is {listed(other)}, {name} has {len(sub.code):,} bytes: "
         "not the file that ran, or packed otherwise"],
        [unknown and f"neither hash nor readable source in {listed(g.name for g in unknown)}"])


def check_bytes(sub):
    """Code on disk plus model of each log against the cap, and the sizes that the logs say."""
    problems, remarks, totals, silent = [], [], {}, []
    for seed, log in sub.runs.items():
        parts = (log.code_bytes, log.model_bytes)
        sums = {(log.model_bytes or 0) + n for n in log.code_sizes or parts[:1] if n is not None}
        if None not in (*parts, log.total_bytes) and log.total_bytes not in sums:
            text = f"{parts[0]:,} + {parts[1]:,} is {sum(parts):,}, logged as {log.total_bytes:,}"
            (problems if log.code_sha256 else remarks).append(f"{log.name}: {text}")
        known = None not in (log.model_bytes, sub.code_bytes)
        on_disk = log.model_bytes + sub.code_bytes if known else None
        total = on_disk if on_disk is not None else log.total_bytes
        if total is None:
            silent.append(log.name)
            continue
        totals[seed] = total
        over = [n for n in (on_disk, log.total_bytes) if n is not None and n > CAP_BYTES]
        several = len(set(log.code_sizes)) > 1  # before and after its compression
        packed = several and on_disk in over and len(sub.code) == max(log.code_sizes)
        counts = log.total_bytes if on_disk is None or packed else on_disk
        if (counts or 0) > CAP_BYTES:
            most = max(over)
            problems.append(f"seed {seed}: {most:,} exceeds {CAP_BYTES:,} by {most - CAP_BYTES:,}")
        elif over:
            how = f" ({len(sub.code):,} bytes, not compressed)" if packed else ""
            remarks.append(f"{log.name}: {log.total_bytes or 0:,} as logged, with {sub.script.name}"
                           f" as it lies there{how} {on_disk:,}; the cap is {CAP_BYTES:,}")
    how = "as logged; no code here" if sub.code is None else "code on disk + model of each log"
    good = f"{listed(f'{t:,}' for t in totals.values())} of {CAP_BYTES:,} ({how})"
    unknown = silent if sub.logs else ["any log: there is none"]
    sub.verdict("bytes", problems, totals and not remarks and good, remarks=remarks,
                unknown=[unknown and f"no model size in {listed(unknown)}"])
    check_code_files(sub, totals)
    check_bytes_claimed(sub, totals)


def check_code_files(sub, totals):
    """What the code files beside the script add, or would add."""
    if sub.needed or sub.unneeded:
        more = [f"{n} {b:,} (counted: {sub.script.name} names it)" for n, b in sub.needed.items()]
        if rest := [f"{n} {b:,}" for n, b in list(sub.unneeded.items())[:6]]:
            more.append(f"not counted, since the script does not name them: {listed(rest)}")
        largest = max(totals.values(), default=0)
        matters = 0 < largest <= CAP_BYTES < largest + sum(sub.unneeded.values())
        sub.add(WARN if matters else PASS, "code files", listed(more))


def check_bytes_claimed(sub, totals):
    """Which figure of the logs and files each size in submission.json is."""
    if not sub.claims or not sub.logs:
        return
    names = {}  # bytes → what they are, the first name said
    models = {s: g.model_bytes for s, g in sub.runs.items() if g.model_bytes is not None}
    logged = {s: g.total_bytes for s, g in sub.runs.items() if g.total_bytes is not None}
    for what, values in (("total on disk", totals), ("logged total", logged), ("model", models)):
        if values:
            names.setdefault((max(values.values()), what), f"the largest seed's {what}")
            names.setdefault((round(sum(values.values()) / len(values)), what), f"the mean {what}")
            for seed, value in values.items():
                names.setdefault((value, what), f"seed {seed}'s {what}")
    codes = {n for log in sub.logs for n in log.code_sizes}
    codes |= {len(sub.code or b""), len(sub.source or b""), sub.code_bytes}
    codes -= {None}
    problems, remarks, good = [], [], []
    for kind, allowed in ((TOTAL, ("total on disk", "logged total", "model")), (MODEL, ("model",)),
                          (CODE, ())):
        key, value = said(sub.claims, kind)
        # a smaller one is in MB
        if key is None or (codes == {0} if kind is CODE else not names or value < 100_000):
            continue
        found = [text for what in allowed for (n, w), text in names.items()
                 if w == what and same_count(value, n)]
        if kind is CODE and any(same_count(value, n) for n in codes):
            found = ["the code's"]
        largest = found and (found[0].startswith("the largest") or kind is CODE)
        if not found and kind is CODE and sub.code and abs(value / len(sub.code) - 1) < 0.05:
            remarks.append(f"{key} is {value}, not {listed(sorted(codes))}")
        elif not found or found[0].endswith("model") and key in ("bytes_total", "total_bytes"):
            known = sorted(codes) if kind is CODE else [
                f"{what} {n:,}" for (n, _), what in list(names.items())[:4]]
            problems.append(listed([f"{key} is {value}", *found[:1], f"not {listed(known)}"]))
        else:
            (good if largest else remarks).append(f"{key} {value} is {found[0]}")
    remarks += ["the largest seed's total counts"] if remarks else []
    sub.verdict("bytes claimed", problems, "; ".join(good), sub.severity, remarks,
                silent=f"no sizes in both {sub.claims_name} and the logs")


def same_count(claim, count):
    """Whether a claimed number of bytes is this one, as far as zeros at its end leave open."""
    zeros = len(str(claim)) - len(str(claim).rstrip("0"))
    return abs(int(claim) - count) <= (0.5 * 10 ** zeros if zeros >= 4 else 0)


def steps_late(log):
    """Steps by which training, and what read its data afterwards, passed the limit: 0, 1, 3, or
    infinity. The ancestors' loops stop by the clock, which they read once a step."""
    late = log.train_seconds + (log.calibration_seconds or 0) - CAP_SECONDS - log.train_unit
    limits = ((0, 0), (1, log.step_seconds), (3, max(3 * log.step_seconds, 0.3)))
    return next((steps for steps, seconds in limits if late <= seconds), math.inf)


def check_seconds(sub):
    """Training and evaluation within 600 s each, and what no timer held."""
    problems, close, seen = [], [], []
    for log in sub.logs:
        if log.train_seconds is None:
            sub.add(UNCHECKED, "train seconds", f"no train_time in {log.name}")
            continue
        text = f"{log.train_seconds:.{1 + (log.train_unit < 0.005)}f}"
        if after := log.calibration_seconds:
            text += f" + {after:.1f} for {log.calibration[:40]!r}"
        late = steps_late(log)
        by = {1: " by less than a step", 3: " by less than 3 steps or 0.3 s"}.get(late, "")
        if late:
            (close if by else problems).append(f"{log.name}: {text} s exceeds {CAP_SECONDS}{by}")
        else:
            seen.append(text)
        line = log.calibration or ""
        if line and log.calibration_seconds is None:
            close.append(f"{log.name}: {line[:60]!r} after the last train_time counts as training; "
                         "no seconds said")
        if re.search(r"(?<!no )val(idation)? (data|tokens|set)", line, re.I):
            problems.append(f"{log.name}: {line[:80]!r} calibrates on validation text")
    good = seen and f"{listed(dict.fromkeys(seen))} of {CAP_SECONDS}"
    sub.verdict("train seconds", problems, good, sub.severity, close)
    check_eval_seconds(sub)


def eval_seconds(sub, log):
    """Seconds of the evaluation that counts: the log's in all, else its own timer's; or None."""
    whole = log.eval_seconds if log.eval_seconds is not None else log.total_eval_seconds
    return whole if whole is not None else sub.score(log).seconds


def check_eval_seconds(sub):
    """The evaluation that counts within 600 s; diagnostics beside it do not count."""
    problems, seen, rest, diagnostics = [], [], [], Counter()
    for log in sub.scored:
        seconds = eval_seconds(sub, log)
        timed = sum(s.seconds or 0 for k, s in log.scores.items() if not DIAGNOSTIC.search(k))
        if seconds is None:
            sub.add(UNCHECKED, "eval seconds", f"no eval_time of {sub.kind} in {log.name}")
            continue
        if log.eval_seconds is not None and seconds < timed - 0.2:
            problems.append(f"{log.name}: {seconds:.1f} s in all, its evaluations alone "
                            f"{timed:.1f} s")
        elif seconds > CAP_SECONDS:
            problems.append(f"{log.name}: {seconds:.1f} s exceeds {CAP_SECONDS}")
        seen.append(f"{seconds:.1f}")
        rest.append(None if log.eval_seconds is None else f"{seconds - timed:.1f}")
        diagnostics.update({k: s.seconds for k, s in log.scores.items()
                            if s.seconds and k != sub.kind})
    beside = listed(f"{k} {n / len(sub.scored):.0f}" for k, n in diagnostics.items())
    beside = f"; not in it: {beside} s" if beside and None in rest else ""
    sub.verdict("eval seconds", problems,
                seen and f"{listed(seen)} of {CAP_SECONDS}, {sub.kind}{beside}", sub.severity)
    packing = listed(log.pack_seconds for log in sub.scored)
    sub.verdict("outside of timers", [], rest and None not in rest and "between the evaluations, "
                f"inside the total: {listed(rest)} s; packing, in neither limit: {packing} s",
                unknown=[None in rest and "evaluation seconds are the evaluation's own timer; "
                         "loading, decompression and compilation are not visible"])


def check_adaptation(sub):
    """Weights adapted to the validation text before its only scoring."""
    adapted = [log for log in sub.scored if sub.kind in log.adapted]
    if not adapted:
        return
    line = adapted[0].adapted[sub.kind][:80]
    text = (f"{listed(g.name for g in adapted)}: {line!r} and no score in these epochs; {sub.kind} "
            "scores after them")
    if sub.tree is not None and not adapts_on_validation(sub.tree):
        sub.add(UNCHECKED, "score before update",
                f"{text}. On which text it steps is not visible in {sub.script.name}")
    else:
        sub.add(sub.severity, "score before update", f"{text}: adapted to the text first")


def official_set(targets, vocabulary=None):
    """Name of the validation set of so many targets, of that vocabulary if known, or None."""
    return next((name for name, pieces, count in SETS if abs(targets - count) < ROW
                 and vocabulary in (None, pieces)), None)


def check_denominator(sub):
    """Loss and bpb of every evaluation must belong to the bytes of the text."""
    problems, good, unknown = [], [], []
    for log in sub.scored:
        score = sub.score(log)
        compare_evaluations(sub, log, problems, unknown)
        if log.targets and log.scored_bytes:
            for key, s in log.scores.items():
                implied = s.bytes_per_target * log.targets
                if abs(implied / log.scored_bytes - 1) > s.tolerance:
                    text = f"{key} implies {implied:,.0f} bytes, logged are {log.scored_bytes:,}"
                    (problems if s is score else unknown).append(f"{log.name}: {text}")
            by_ledger = (log.loss_sum or 0) / log.targets
            slack = 1.01 * log.score.loss_unit + 1e-6 / log.targets
            if by_ledger and abs(by_ledger - log.score.loss) > slack:
                problems.append(f"{log.name}: {log.key} is {log.score.loss} nats, the ledger's "
                                f"sum gives {by_ledger:.8f}")
        judge_bytes(log, score.bytes_per_target, problems, good, unknown)
    ways = {log.name: log.bytes_from for log in sub.scored if log.bytes_from}
    if len(set(ways.values())) > 1:
        each = listed(f"{way} in {name}" for name, way in ways.items())
        problems.append(f"bytes counted from {each}: score all seeds on one data folder")
    way = f"; counted from the {next(iter(ways.values()))}" if ways else ""
    sub.verdict("bits per byte", problems, good and "loss ÷ ln 2 × targets ÷ bpb is "
                f"{listed(good)} bytes, as logged or known{way}", unknown=unknown,
                silent="no log with a loss and a score")
    check_validation_set(sub)


def compare_evaluations(sub, log, problems, unknown):
    """All evaluations of a log have the same bytes per target, or scored other parts of the text: a
    problem unless another evaluation or the bytes of the text confirm the score that counts."""
    score, kinds = sub.score(log), {k: s for k, s in log.scores.items() if not DIAGNOSTIC.search(k)}
    ratios = [s.bytes_per_target for s in kinds.values()] or [score.bytes_per_target]
    most = max(1e-4 if log.ledger else 2e-3, *(2 * s.tolerance for s in log.scores.values()))
    if max(ratios) / min(ratios) - 1 <= most:
        return
    ratio, targets = score.bytes_per_target, log.targets or 0
    known = [s.bytes_per_target for s in log.scores.values() if s is not score]
    known += [log.scored_bytes / targets] if targets and log.scored_bytes else []
    known += [OFFICIAL_BYTES / targets] if official_set(targets) else []
    confirmed = any(abs(ratio / other - 1) <= most for other in known)
    (unknown if confirmed else problems).append(
        f"{log.name}: bytes per target differ between evaluations: "
        + listed(f"{k} {s.bytes_per_target:.5f}" for k, s in log.scores.items()))


def judge_bytes(log, ratio, problems, good, unknown):
    """Sort what the bytes per target of a log imply for the whole text into one of three lists."""
    if log.targets:
        implied, official = ratio * log.targets, official_set(log.targets)
        off = implied / OFFICIAL_BYTES - 1
        if abs(off) <= 0.01 or log.scored_bytes and not official:
            good.append(f"{implied:,.0f}")
        elif not official:
            unknown.append(f"{log.name}: {implied:,.0f} bytes implied for {log.targets:,} targets, "
                           "whose text is not known")
        else:
            problems.append(f"{log.name}: {implied:,.0f} bytes implied, the validation text has "
                            f"about {OFFICIAL_BYTES:,} ({100 * off:+.1f} %)")
        return
    off = {name: ratio * n / OFFICIAL_BYTES - 1 for name, v, n in SETS if v == log.vocabulary}
    fits = [name for name, share in off.items() if abs(share) <= 0.01]
    twice = [share for share in off.values() if 0.15 < share < 0.18]
    if fits:
        good.append(f"{ratio:.4f} per target, as {fits[0]} has")
    elif twice:
        problems.append(f"{log.name}: {ratio:.4f} bytes per target, {100 * max(twice):+.1f} % to "
                        "what this vocabulary has: each space counted twice?")
    else:
        unknown.append(f"{log.name}: number of targets unknown; loss and bpb imply {ratio:.4f} "
                       "bytes per target"
                       + listed(f", {name} has {ratio / (1 + x):.4f}" for name, x in off.items()))


def check_validation_set(sub):
    """All targets of an official set, or the whole text by its bytes."""
    problems, good, unknown = [], [], []
    for log in sub.scored:
        shrunk = [f"{k}={log.settings[k]}" for k, whole in WHOLE_SET.items()
                  if log.settings.get(k, whole[0]) not in whole]
        limit = str(log.settings.get("VAL_LIMIT_TOKENS", ""))
        if limit.isdigit() and 0 < int(limit) < (log.targets or 0) + ROW:
            shrunk.append(f"VAL_LIMIT_TOKENS={limit}")
        if shrunk:
            problems.append(f"{log.name}: {listed(shrunk)} scores a part")
        elif log.targets and (name := official_set(log.targets, log.vocabulary)):
            good.append(f"{log.targets:,} targets, all of {name}")
        elif log.targets:
            share = sub.score(log).bytes_per_target * log.targets / OFFICIAL_BYTES
            text = f"{log.targets:,} targets, {100 * share:.1f} % of the text by its bytes"
            whole = listed(f"{n:,}" for _, v, n in SETS if v == log.vocabulary)
            if abs(share - 1) <= WHOLE_TEXT:
                good.append(text)
            elif abs(share - 1) <= 0.03:
                unknown.append(f"{log.name}: {text}: another text or tokenizer, or a part")
            else:
                official = f"; the official set has {whole}" if whole else ""
                problems.append(f"{log.name}: {text}{official}")
    sub.verdict("validation set", problems, listed(dict.fromkeys(good)), sub.severity,
                unknown=unknown, silent="no log says how many targets were scored")


# Settings of published scripts that make the validation set smaller, and their values that do not.
WHOLE_SET = {"VAL_DOC_FRACTION": ("1", "1.0"), "MAX_VAL_TOKENS": ("0", "-1", "", "None"),
             "VAL_MAX_TOKENS": ("0", "-1", "", "None"), "TTT_EVAL_BATCHES": ("", "0", "None")}


def check_scores(sub):
    """val_loss, val_bpb and their spread in submission.json against the logs."""
    if sub.claims is None:
        return
    if not sub.scored:
        sub.add(UNCHECKED, "val_bpb", f"no log with a score to compare {sub.claims_name} with")
        return
    for names, attribute in ((BPB, "bpb"), (LOSS, "loss")):
        key, claim = said(sub.claims, names)
        if key is None:
            sub.add(UNCHECKED, names[0], f"not in {sub.claims_name} as a number")
        else:
            sub.add(*which_score(sub, key, claim, attribute))
    key, stated = said(sub.claims, STD)
    _, std = mean_std([sub.score(log).bpb for log in sub.scored])
    if key is None or std is None:
        if std is not None or key and stated:
            sub.add(WARN, "val_bpb_std",
                    f"{sub.claims_name} has {stated}; the {len(sub.scored)} logs give {std}")
        return
    population = std * math.sqrt(1 - 1 / len(sub.scored))
    # rounded, or cut off
    slack = 2.02 * half_unit(stated) + max(sub.score(log).bpb_unit for log in sub.scored)
    wrong = min(abs(float(stated) - std), abs(float(stated) - population)) > slack
    sub.verdict(key, [wrong and f"{stated}, the logs give {std:.6f} (n−1)"],
                f"{stated}, logs {std:.6f} (n−1)", sub.severity)


def which_score(sub, key, claim, attribute):
    """(status, key, text): which figure of the logs a claimed score is."""
    means = {}
    kinds = dict.fromkeys([sub.kind, *reversed(sub.scored[-1].scores)])
    for kind in [k for k in kinds if all(k in g.scores for g in sub.scored)]:
        means[kind] = mean_std([getattr(g.scores[kind], attribute) for g in sub.scored])[0]
        if found := as_evaluation(sub, claim, attribute, kind, means[kind]):
            return found[0], key, f"{claim} is {found[1]}"
    for explain in (as_cut_off, as_listed, as_bpb, as_other):
        if found := explain(sub, claim, attribute, means):
            return found[0], key, f"{claim} is {found[1]}"
    text = f"{claim} is no mean of the logs: " + listed(f"{k} {m:.6f}" for k, m in means.items())
    aside = [g.name for g in sub.every_log if claim is not None and g not in sub.logs
             for s in g.scores.values() if agree(claim, s.printed(attribute))]
    text += f"; {aside[0]} has it, which does not count" if aside else ""
    return FAIL if attribute == "bpb" else sub.severity, key, text


def as_evaluation(sub, claim, attribute, kind, mean):
    """(status, what it is) of a claim that is an evaluation's mean, or one seed's; or None."""
    units = [getattr(log.scores[kind], f"{attribute}_unit") for log in sub.scored]
    single = [s for s, log in sub.runs.items() if kind in log.scores
              and agree(claim, log.scores[kind].printed(attribute))]
    last = sub.scored[-1].key
    other = "" if kind == last else f"; the last evaluation is {last}"
    if abs(float(claim) - mean) <= 1.01 * (half_unit(claim) + max(units)):
        doubt = sub.severity if DIAGNOSTIC.search(kind) else WARN
        return doubt if other else PASS, f"the mean of {kind}, {mean:.6f}{other}"
    if single:
        of_all = f"the mean of {len(units)} logs is {mean:.6f}"
        return WARN, f"seed {single[0]}'s {kind}; {of_all}{other}"
    return None


# Readers of a claimed score that is no evaluation's: (status, what it is), or None.

def as_cut_off(sub, claim, attribute, means):
    """A mean with its last digits cut off."""
    most = min(1e-4, 2 * half_unit(claim))
    cut = next((k for k, m in means.items() if 0 <= m - float(claim) < most), None)
    return cut and (WARN, f"the mean of {cut}, {means[cut]:.6f}, cut off and not rounded")


def as_listed(sub, claim, attribute, means):
    """The mean of what submission.json lists."""
    several = [[said(row, BPB if attribute == "bpb" else LOSS)[1] for row in sub.rows.values()]]
    if attribute == "bpb":
        several += [[*map(figure, v)] for k, v in sub.claims.items()
                    if "bpb" in k and isinstance(v, list)]
    for values in several:
        if values and None not in values:
            mean = sum(map(float, values)) / len(values)
            if abs(float(claim) - mean) < min(1e-4, 2.02 * half_unit(claim)):
                status = UNCHECKED if len(values) > len(sub.scored) else PASS
                return status, (f"the mean of the {len(values)} scores that {sub.claims_name} "
                                f"lists; {len(sub.scored)} of them have a log")
    return None


def as_bpb(sub, claim, attribute, means):
    """A loss that is the score in bits."""
    mean = mean_std([sub.score(g).bpb for g in sub.scored])[0]
    in_bits = attribute == "loss" and abs(float(claim) - mean) < 1e-3
    return (WARN, "the bpb, not nats") if in_bits else None


def as_other(sub, claim, attribute, means):
    """What stands in the logs outside of an evaluation."""
    values = {}
    for log in sub.scored:
        others = log.other_bpb if attribute == "bpb" else {
            "last_validation": str(v) for _, v in log.validation[-1:]}
        for label, text in others.items():
            values.setdefault(label, []).append(text)
    for label, texts in values.items():
        mean = f"{sum(map(float, texts)) / len(texts):.5f}"
        if any(agree(claim, text) for text in (mean, *texts)):
            before = label == "last_validation"
            where = " of the training, before quantization" if before else ""
            return sub.severity if before else WARN, (
                f"{label}{where}; {sub.kind} gives {means.get(sub.kind, math.nan):.6f}")
    return None


# Readers for RESULT_KEYS and COLUMNS: what a log has for a figure, texts as printed.

def close_to(attribute):
    """Of a score, any evaluation's."""
    return lambda g: [s.printed(attribute) for s in reversed(g.scores.values())]


def exactly(*names):
    return lambda g: [v for n in names if (v := getattr(g, n)) is not None]


def timed(name):
    return lambda g: [] if getattr(g, name) is None else [f"{getattr(g, name):.1f}"]


def step_milliseconds(log):
    return [f"{1000 * log.step_seconds:.2f}"] if log.step_seconds else []


STEPS, PER_STEP = ("steps", "train_steps", "step_stop"), ("step_avg_ms", "ms_per_step")
TRAINING = ("train_seconds", "wallclock_seconds", "train_time_s")
SOFT = (*STEPS, *PER_STEP, *TRAINING, "eval_seconds")  # what does not decide
RESULT_KEYS = {key: logged for keys, logged in (
    (BPB, close_to("bpb")), (LOSS, close_to("loss")), (STEPS, exactly("steps")),
    (TOTAL, exactly("total_bytes", "model_bytes")), (MODEL, exactly("model_bytes")),
    (CODE, exactly("code_bytes")), (PER_STEP, step_milliseconds),
    (TRAINING, timed("train_seconds")), (("eval_seconds",), timed("eval_seconds")),
    (("scored_targets",), exactly("targets")), (("scored_bytes",), exactly("scored_bytes")),
    (("seed",), exactly("seed"))) for key in keys}


def comparable(row, log, totals=()):
    """(key, figure, what the log has for it) of what a row of results and the log both say."""
    for key, logged in RESULT_KEYS.items():
        value = row.get(key)
        if isinstance(value, dict):  # a result file's {kind: value}, the last of which counts
            value = next(reversed(value.values()), None)
        value, known = figure(value, key), logged(log)
        known += totals if known and key in TOTAL else []
        if value is not None and known:
            yield key, value, known


def differences(row, log, totals=()):
    """What a row of results says otherwise than the log; `totals` are also right sizes."""
    out = [f"{key} {value} where the log has {known[0]}"
           for key, value, known in comparable(row, log, totals) if not any(
               agree(value, k) if isinstance(k, str) or key in BPB else value == k for k in known)]
    way = row.get("bytes_from")
    if way is not None and (way not in BYTES_FROM or way != (log.bytes_from or way)):
        known = log.bytes_from or " or ".join(BYTES_FROM)
        out.append(f"bytes_from {way} where the log has {known}")
    return out


def check_seed_results(sub):
    """Each seed's row of submission.json, and its result file if there is one, against its log."""
    problems, remarks, compared = [], [], 0
    for seed, log in sub.runs.items():
        if not log.scores:
            continue
        known = log.model_bytes and sub.code_bytes
        on_disk = [log.model_bytes + sub.code_bytes] if known else []
        rows = {"seed_results": sub.rows.get(str(seed))}
        path = sub.folder / f"result_seed{seed}.json"
        if path.is_file():
            try:
                rows[path.name] = sub.results[str(seed)] = read_json(path)
            except Problem as problem:
                problems.append(str(problem))
        for where, row in rows.items():
            if not isinstance(row, dict):
                continue
            compared += len(list(comparable(row, log)))
            for d in differences(row, log, on_disk):
                soft = d.split()[0] in SOFT and where == "seed_results"
                (remarks if soft else problems).append(
                    f"{where}, seed {seed}: {d}; take both from one run")
            if row.get("code_sha256") and log.code_sha256 and row["code_sha256"] != log.code_sha256:
                problems.append(f"{where}, seed {seed}: code_sha256 differs from the log's")
    for key in SOFT:  # of the whole submission
        lines = [differences({key: (sub.claims or {}).get(key)}, log) for log in sub.scored]
        remarks += [f"{sub.claims_name}: {d[0]}" for d in lines[:1]] if lines and all(lines) else []
    sub.verdict("seed results", problems, compared and f"{compared} figures agree with the logs",
                sub.severity, remarks, [not compared and not problems and "no rows by seed in "
                f"{sub.claims_name}, no log of such a seed, or no figure that both have"])


# -- README ----------------------------------------------------------------------------------------

def readme_rows(text):
    """(header cells, cells) of every row of the README's tables, without the marks of Markdown."""
    header = None
    for line in text.splitlines():
        cells = [re.sub(r"[*`~]", "", c).strip() for c in line.strip().strip("|").split("|")]
        if not line.strip().startswith("|"):
            header = None
        elif header is None:
            header = cells
        elif not re.fullmatch(r"[-:\s|]+", line.strip()):
            yield header, cells


# Columns of a table by seed: what they hold, pattern of the head, of a number, what the log has.
COLUMNS = (
    ("bpb", re.compile(r"bp[bp]\b", re.I), r"\d\.\d{3,}",
     lambda g: [*close_to("bpb")(g), *g.other_bpb.values()]),
    ("loss", re.compile(r"\bloss\b", re.I), r"\d\.\d{3,}",
     lambda g: close_to("loss")(g) + [v for _, v in g.validation[-1:]]),
    ("steps", re.compile(r"^(train )?steps$", re.I), r"\d{3,6}", exactly("steps")),
    ("ms per step", re.compile(r"ms ?/ ?step|step.?avg|ms per step", re.I), r"\d+(?:\.\d+)?",
     step_milliseconds),
    ("bytes", re.compile(r"bytes|artifact|size", re.I), r"\d{7,8}",
     exactly("total_bytes", "model_bytes")))
NOT_OF_THE_RUN = re.compile(r"gain|delta|Δ|gap|std|vs\b|sota|baseline|improve", re.I)


def check_readme(sub):
    """Figures of the README's tables by seed, and its first scores, against the logs."""
    if not sub.readme or not sub.scored:
        sub.add(UNCHECKED, "README's figures", "no README, or no log with a score")
        return
    logs = {str(s): log for s, log in sub.runs.items()}
    wrong, remarks, compared, right = [], [], 0, set()
    for header, cells in readme_rows(sub.readme):
        seed = cells[0].removeprefix("seed ").strip()
        if not re.match(r"(?i)seed", header[0]) or seed not in logs:
            continue
        agreeing, differing = compare_row(sub, logs[seed], seed, header, cells)
        compared += len(agreeing) + len(differing)
        right |= {seed} if "bpb" in agreeing else set()
        # of several scores, one that no log has may come from another evaluation
        for what, text in differing:
            sole = what == "bpb" and "bpb" not in agreeing
            (wrong if sole else remarks).append((seed, text))
    remarks = [text for _, text in remarks] + [text for seed, text in wrong if seed in right]
    wrong = [text for seed, text in wrong if seed not in right]
    lines = [line for line in sub.readme.splitlines() if re.search("bpb", line, re.I)][:6]
    head = [n for line in lines for n in re.findall(r"(?<![\d.])[0-4]\.\d{3,}\b", line)]
    if head and not any(agree(n, k) for n in head for k in scores_known(sub)):
        remarks.append(f"the README's first scores are {listed(head[:3])}; {sub.claims_name} and "
                       "the logs have none of them")
    agrees = (compared or head) and not remarks
    sub.verdict("README's figures", wrong,
                agrees and f"its first scores and {compared} figures by seed agree", sub.severity,
                remarks[:6], silent="no score near its beginning and no table by seed")


def compare_row(sub, log, seed, header, cells):
    """([what agrees with a log], [(what, text) of what does not]) of a row of a table by seed."""
    agreeing, differing = [], []
    for head, cell in zip(header[1:], cells[1:]):
        what, known, value = column_of(head, cell, log)
        if what == "bpb":
            rows = (sub.rows.get(seed), sub.results.get(seed))
            known += [v for row in rows for v in scores_in(row)]
            known += [v for g in sub.every_log if str(g.run_seed) == seed
                      for v in close_to(what)(g)]
        if any(agree(value, k) for k in known):
            agreeing.append(what)
        elif known:
            logged = listed(dict.fromkeys(known[:3]))
            differing.append((what, f"seed {seed}, {head!r}: {value}, the log has {logged}"))
    return agreeing, differing


def scores_known(sub):
    """All scores of submission.json and of the logs that count, and their mean."""
    claimed = [said(o, BPB)[1] for o in (sub.claims or {}, *sub.rows.values())]
    logged = [v for g in sub.logs for v in (*close_to("bpb")(g), *g.other_bpb.values())]
    mean = mean_std([sub.score(g).bpb for g in sub.scored])[0]
    return [v for v in claimed if v is not None] + logged + [f"{mean:.5f}"]


def scores_in(row, name=""):
    """All bits per byte in a row of results, at any depth."""
    if isinstance(row, dict):
        return [v for k, inner in row.items() for v in scores_in(inner, f"{name} {k}")]
    return [row] if "bpb" in name and number(row) is not None else []


def column_of(head, cell, log):
    """(what a table's column holds, what the log has of it, the number in this cell), or blanks."""
    text = cell.replace(",", "")
    for what, pattern, form, logged in COLUMNS:
        found = re.fullmatch(rf"~?({form})(?: ?(?:B|bytes|ms))?", text)
        if pattern.search(head) and found and not NOT_OF_THE_RUN.search(head):
            return what, logged(log), found[1]
    return "", [], ""


def commands_in(text):
    """{NAME: value} that the README's commands give to the script, also by exports before it."""
    out = {}
    for block in re.findall(r"^[ \t]*```.*?^[ \t]*```", text, re.M | re.S):
        if "train_gpt.py" not in block:
            continue
        pending = {}
        for line in re.sub(r"\\\s*\n", " ", block).splitlines():
            found = re.findall(r"(?<![\w-])([A-Z][A-Z0-9_]{2,})=('[^']*'|\"[^\"]*\"|\S*)",
                               line.split(" #")[0])
            if "train_gpt.py" in line:
                out |= pending | dict(found)
            elif re.match(r"\s*(?:export\b|(?:[A-Z][A-Z0-9_]*=\S*\s+)*"
                          r"[A-Z][A-Z0-9_]*=\S*\s*$)", line):
                pending |= dict(found)
    return out


def check_settings(sub):
    """Settings that differ between seeds; names in logs and commands that no code reads."""
    named = {log.name: log.settings for log in sub.logs if log.settings}
    if len(named) > 1:
        sub.verdict("same settings", differing_settings(named),
                    f"in {len(named)} of {len(sub.logs)} logs", sub.severity)
    if sub.tree is None:
        sub.add(UNCHECKED, "settings read", "no script that can be read")
        return
    known = names_read(sub.tree)
    for name in sub.needed:
        if name.endswith(".py"):
            with contextlib.suppress(*UNPARSED, OSError):
                known |= names_read(parsed((sub.folder / name).read_bytes()))
    unread, shown = {}, 0
    for log in sub.logs:
        ours = {n for n in log.settings if f"\nsetting {n}=" in "\n" + log.body}
        names = {*ours, *re.findall(r"^(?:export )?([A-Z][A-Z0-9_]{3,})=\S", log.body, re.M)}
        shown += len(names)
        for name in sorted(n for n in names - known if not n.startswith(FOREIGN)):
            unread.setdefault(name, []).append(log.name)
    sub.verdict("settings read", [f"{n} (in {listed(where)}): the script does not read it"
                                  for n, where in unread.items()],
                shown and "the script reads all that the logs name, "
                f"{shown // len(sub.logs)} each",
                FAIL if any(log.explicit or log.code_sha256 for log in sub.logs) else WARN,
                silent="the logs name no settings")
    commands = commands_in(sub.readme)
    unread = sorted(n for n in commands if n not in known and not n.startswith(FOREIGN))
    odd = [f"{n}={v}: is 0.{v[1:]} meant?" for n, v in commands.items() if re.fullmatch(r"0\d+", v)]
    sub.verdict("README's commands",
                [unread and f"{listed(unread)}: the script does not read it", *odd],
                commands and f"the script reads {listed(sorted(commands))}", WARN)


def differing_settings(named):
    """Lines 'NAME: value in a, value in b' of settings in {name: settings} that may not differ."""
    lines, keys = [], {k for settings in named.values() for k in settings}
    for key in sorted(k for k in keys if not NOT_OF_THE_MODEL.match(k)):
        values = {name: settings.get(key, "absent") for name, settings in named.items()}
        if len(set(map(str, values.values()))) > 1:
            lines.append(f"{key.upper()}: " + listed(f"{v} in {n}" for n, v in values.items()))
    return lines


def check_imports(sub):
    """Imports, addresses and outside paths of the script: a list to look at, no proof."""
    if sub.tree is None:
        return
    modules, strange = modules_imported(sub.tree), []
    for name in sorted((modules - LIBRARIES - set(sys.stdlib_module_names)) | modules & NETWORK):
        here = sum(b for n, b in sub.needed.items() if n.split("/")[0] in (name, f"{name}.py"))
        strange.append(f"imports {name}" + " (network)" * (name in NETWORK)
                       + (f" (a file here: its {here:,} bytes count as code)" if here else ""))
    strange += [f"holds {t[:60]!r}" for t in sorted(texts_of(sub.tree))
                if re.fullmatch(r"(/[\w.]|~/|\.\./|\w+://)\S+|curl|wget|pip", t)]
    sub.verdict("imports and paths", strange, f"nothing foreign in {len(modules)} imports", WARN)


def check_compliance(sub):
    """What submission.json promises of limits, against the logs."""
    promises, problems = (sub.claims or {}).get("compliance"), []
    if not isinstance(promises, dict) or not sub.scored:
        return
    found = {(status, what) for status, what, _ in sub.findings}
    seconds = [s for log in sub.scored if (s := eval_seconds(sub, log)) is not None]
    timed_logs = [log for log in sub.logs if log.train_seconds is not None]
    compared = 0
    for pattern, known, true in (
            ("train.*600", timed_logs, all(steps_late(log) < math.inf for log in timed_logs)),
            ("eval.*600", seconds, max(seconds, default=0) <= CAP_SECONDS),
            ("(bytes|artifact).*16", any(log.total_bytes is not None for log in sub.logs),
             (FAIL, "bytes") not in found),
            ("three_seeds", True, len(sub.scored) >= 3),
            ("full_validation_set", any(log.targets for log in sub.scored),
             not found & {(FAIL, "validation set"), (WARN, "validation set")})):
        keys = [k for k, v in promises.items() if re.match(pattern, k) and v is True]
        compared += len(keys) if known else 0
        problems += [] if true else [f"{k}: true, the logs say otherwise" for k in keys]
    good = compared and f"the logs contradict none of {compared} promises"
    sub.verdict("compliance", problems, good, silent="no promise that the logs can confirm")


def check_own_verdict(sub):
    """What our script itself says against a run in its log."""
    sub.verdict("own verdict", dict.fromkeys(
        f"{log.name}: {text}" for log in sub.logs
        for text in re.findall(r"^not a legal record: (.*)", log.body, re.M)), "", sub.severity)


def check_hardware(sub):
    """A record was run on 8 H100s."""
    seen = {(log.world_size, log.device) for log in sub.logs if log.device or log.world_size}
    wrong = [f"{n}×{device}" for n, device in seen
             if n not in (None, 8) or (device and "H100" not in device)]
    text = listed(f"{n or '?'}×{device or '?'}" for n, device in seen)
    told = wrong or seen and all(n and device for n, device in seen)
    record, claim = wrong and sub.track == RECORD, (sub.claims or {}).get("hardware")
    lacks = f"{text}: the logs do not name device and number" if seen else "not in the logs"
    sub.verdict("hardware", [record and f"{listed(wrong)}; a record runs on 8×H100"],
                told and text, silent=f"{lacks}; submission.json says {claim}")


def scores_to_beat(other, ratio):
    """(mean, std, n) in nats of a folder: of its logs, else of submission.json. Raises Problem."""
    values = [other.score(log).bpb for log in other.scored]
    rows = [float(v) for row in other.rows.values() if (v := said(row, BPB)[1]) is not None]
    values = values if len(values) > 1 or not rows else rows
    if values:
        mean, std = mean_std(values)
        return mean * ratio, None if std is None else std * ratio, len(values)
    (_, mean), (_, std) = said(other.claims or {}, BPB), said(other.claims or {}, STD)
    if mean is None or std is None or len(other.named_seeds) < 2:
        raise Problem(f"--against {other.folder}: no log with a score, and no mean, deviation and "
                      "seeds in its submission.json; give its figures as mean,std,n")
    return float(mean) * ratio, float(std) * ratio, len(other.named_seeds)


def reference_scores(against, ratio):
    """(mean, std, n) in nats per target of a folder or 'mean,std,n[,bpb]'. Raises Problem. `ratio`,
    nats for one bit per byte, converts a folder's bpb, since its tokens may be others."""
    if Path(against).is_dir():
        return scores_to_beat(open_submission(against), ratio)
    parts = [p.strip() for p in against.split(",")]
    scale = ratio if parts[3:] == ["bpb"] else 1
    try:
        mean, std, n = float(parts[0]) * scale, float(parts[1]) * scale, int(parts[2])
        if parts[3:] not in ([], ["bpb"]) or not (mean > 0 and std >= 0 and n >= 2
                                                  and math.isfinite(mean + std)):
            raise ValueError
    except (ValueError, IndexError):
        raise Problem(f"--against {against}: neither a folder nor mean,std,n in nats (n ≥ 2), "
                      "such as 1.8875,0.0010,3 or 1.1194,0.0006,3,bpb") from None
    return mean, std, n


def check_improvement(sub, against):
    """Welch's t-test: better than the record by 0.005 nats at p < 0.01."""
    if not against:
        sub.add(WARN if sub.track == RECORD else UNCHECKED, "improvement",
                "no record to beat given (--against)")
        return
    if not sub.scored:
        return
    scores = [sub.score(log) for log in sub.scored]  # those that are claimed
    ratio = mean_std([score.loss / score.bpb for score in scores])[0]
    old, old_std, old_n = reference_scores(against, ratio)
    if Path(against).is_dir():
        texts = {log.scored_bytes for log in (*sub.scored, *open_submission(against).scored)}
        texts -= {None}
        if texts and max(texts) > 1.01 * min(texts):  # the table of pieces errs by less
            sub.add(WARN, "improvement", f"not of the same text: the logs of the two score "
                    f"{min(texts):,} to {max(texts):,} bytes")
    new, new_std = mean_std([score.loss for score in scores])
    gain = f"{new:.5f} against {old:.5f} nats: {abs(old - new):.5f} " + (
        "better" if new <= old else "worse") + (
        " (is that record in bpb? then append ,bpb)" if old < new / 1.3 else "")
    if new_std is None or old_std is None:
        sub.add(sub.severity, "improvement",
                f"{gain}; a single run has no spread, so there is no p")
        return
    from scipy.stats import ttest_ind_from_stats
    p = ttest_ind_from_stats(old - MARGIN_NATS, old_std, old_n, new, new_std, len(scores),
                             equal_var=False, alternative="greater").pvalue
    gain += f"; Welch's p = {p:.3g} for {MARGIN_NATS} or less"
    sub.verdict("improvement", [not p < MOST_P and f"{gain}, must be < {MOST_P}"], gain,
                sub.severity)


def check_artifacts(sub, artifacts):
    """Artifacts at hand have the bytes that a log counted."""
    models = {log.model_bytes for log in sub.every_log} - {None}
    for path in artifacts:
        if not path.is_file():
            raise Problem(f"--artifact {path}: no such file")
        size, named = path.stat().st_size, re.search(r"seed[_-]?(\d+)", path.name)
        text = f"{path.name}, {size:,} bytes"
        if not models:
            sub.add(UNCHECKED, "artifact", f"{text}; no log says a model's size")
            continue
        seeds = [s for s, log in sub.runs.items() if log.model_bytes == size]
        right = str(named[1]) in map(str, seeds) if named else bool(seeds)
        logged = listed(f"seed {s} {log.model_bytes}" for s, log in sub.runs.items())
        wrong = f"{path.name} has {size:,} bytes; the logs: {logged}"
        sub.verdict("artifact", [not right and wrong], f"{text}, is seed {listed(seeds)}'s",
                    WARN if size in models and not named else FAIL)
    if not artifacts:
        sub.add(UNCHECKED, "artifact", "none at hand (--artifact F): model bytes are the logs'")


@functools.lru_cache
def bytes_in(data, tokenizer, vocabulary, targets):
    """(bytes, how counted) of the first targets of a data folder, by our script. Raises Problem."""
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
    """The bytes of each log against the data: its side files if any, else the table of pieces."""
    logs = [log for log in sub.logs if log.targets and log.scored_bytes and log.vocabulary]
    lacks = ("no data folder given (--data F): bytes are the logs'" if not data else
             "no log says targets, bytes and vocabulary" if not logs else
             None if (ROOT / "train_gpt.py").is_file() else "this repository's script is not there")
    if lacks:
        sub.add(UNCHECKED, "bytes of text", lacks)
        return
    problems, good = [], []
    for log in logs:
        model = tokenizer or log.settings.get("TOKENIZER_PATH", "")
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


DRY_RUN_SECONDS, AUDIT_SECONDS = 300, 1800  # what takes longer is NOT CHECKED


def ended(command, cwd, environ, seconds):
    """(exit status, last line of its output) of a command; None and a text if it takes longer."""
    try:
        done = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True,
                              errors="replace", timeout=seconds)
    except subprocess.TimeoutExpired:
        return None, f"not done after {seconds:g} s"
    lines = (done.stdout + done.stderr).strip().splitlines()
    return done.returncode, lines[-1][:200] if lines else ""


def check_by_running(sub, artifacts, given):
    """Executes the script: a dry run in a copy of the folder with logged settings; the audits."""
    if sub.source is None or b"--dry-run" not in sub.source:
        sub.add(UNCHECKED, "dry run", "train_gpt.py knows no --dry-run: started, it would train")
    else:
        known = names_read(sub.tree) if sub.tree else set()
        environ = {k: v for k, v in os.environ.items()
                   if k not in known and not k.startswith("TORCHELASTIC")}
        environ |= {k: log.settings[k] for log in sub.logs[:1] for k in log.explicit}
        environ |= {k: path for k, path in zip(("DATA_PATH", "TOKENIZER_PATH"), given) if path}
        with tempfile.TemporaryDirectory() as scratch:  # a script may write beside itself
            copy = shutil.copytree(sub.folder, Path(scratch) / "folder")
            command = [sys.executable, sub.script.name, "--dry-run"]
            status, line = ended(command, copy, environ, DRY_RUN_SECONDS)
        late, failed = status is None, bool(status)
        sub.verdict("dry run", [failed and f"exit status {status}: {line}"],
                    not late and f"inside the folder, settings of a log: {line}",
                    unknown=[late and line])
    audit, logged = HERE / "audit.py", sub.logs[0].settings if sub.logs else {}
    data = {name: value or logged[name] for value, name in
            zip(given, ("DATA_PATH", "TOKENIZER_PATH")) if value or name in logged}
    for path in artifacts:
        if not audit.is_file():
            sub.add(UNCHECKED, "audit", "records/audit.py is not there")
            break
        command = [sys.executable, str(audit), str(path.resolve()), "--script",
                   str((sub.script or sub.folder / "train_gpt.py").resolve())]
        status, line = ended(command, ROOT, {**os.environ, **data}, AUDIT_SECONDS)
        if status in (None, 2):  # too slow; no data here, or nothing that it can read
            sub.add(UNCHECKED, "audit", f"{path.name}: {line}")
        else:
            sub.verdict("audit", [status and f"{path.name}: exit status {status}: {line}"],
                        f"{path.name}: {line}")


CHECKS = (check_claims, check_logs, check_seeds, check_code, check_bytes, check_seconds,
          check_adaptation, check_denominator, check_scores, check_seed_results, check_readme,
          check_compliance, check_own_verdict, check_settings, check_imports, check_hardware)


def check(folder, against=None, run=False, artifacts=(), data=None, tokenizer=None, logs=()):
    """Submission with its findings. Raises Problem for arguments that make no sense."""
    sub = open_submission(folder, logs)
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


def exit_status(sub):
    return int(any(status == FAIL for status, *_ in sub.findings))


def verdict_lines(sub):
    width = max(len(what) for _, what, _ in sub.findings)
    counts = Counter(status for status, *_ in sub.findings)
    lines = [f"{status:<11}  {what:<{width}}  {text}" for status, what, text in sub.findings]
    total = listed(f"{counts[s]} {s}" for s in (FAIL, WARN, UNCHECKED, PASS))
    return [*lines, f"verdict as {sub.track}: {total}"]


# -- pack ------------------------------------------------------------------------------------------

@dataclass
class Run:
    """One finished run: its result file, the object in it, its log, with the whole curve, and the
    logs of its parts before it was resumed, the last first."""
    path: Path
    result: dict
    log: Log
    earlier: list

    @property
    def seed(self):
        return self.result["seed"]


def result_files(place):
    """Result files of a run folder, of a folder of such, or the file itself. Raises Problem."""
    place = Path(place)
    if place.is_file():
        return [place]
    for pattern in ("logs/*.json", "*.json", "*/logs/*.json"):
        if found := sorted(place.glob(pattern)):
            return found
    raise Problem(f"{place}: no result there; give an OUT_DIR with logs/<RUN_ID>.json, or a file")


RESUMED = re.compile(r"^resume:(?:step (\d+)|.* is finished)", re.M)


def earlier_logs(path, log):
    """[(log, last step that counts)] of the parts before a run was resumed, the last first. The
    script numbers them RUN_ID.1.txt and so on; a part that went on says from which step. Logs of
    another seed or RUN_ID, and of starts that trained nothing, are left out."""
    names = map(re.compile(re.escape(path.stem) + r"\.([1-9]\d*)\.txt").fullmatch,
                (p.name for p in path.parent.iterdir()))
    numbers, found, last = sorted(int(name[1]) for name in names if name), [], math.inf
    while numbers and (resumed := RESUMED.search(log.body)):
        part = read_logs(path.with_suffix(f".{numbers.pop()}.txt"))[-1]
        of_part, of_log = ((x.seed, x.settings.get("RUN_ID")) for x in (part, log))
        if of_part == of_log and (part.curve or "\ncheckpoint:step" in part.body):
            last = min(last, int(resumed[1] or sys.maxsize))
            found.append((part, last))
            log = part
    return found


def open_run(path):
    """Run of a result file. Raises Problem where it is none, unfinished, or not that of its log."""
    result = read_json(path)
    needs = dict(seed=int, settings=dict, code_sha256=str, val_loss=dict, val_bpb=dict,
                 total_bytes=int, code_bytes=int, steps=int, train_seconds=(Decimal, int),
                 eval_seconds=(Decimal, int))
    lacks = [key for key, kind in needs.items() if not isinstance(result.get(key), kind)]
    optional = dict(device=str, versions=dict, world_size=int, pack_seconds=(Decimal, int),
                    scored_targets=int, scored_bytes=int, violations=list)
    lacks += [key for key, kind in optional.items()
              if key in result and not isinstance(result[key], kind)]
    lacks += [key for key in ("val_loss", "val_bpb") if key not in lacks and not (
        result[key] and all(number(value) is not None for value in result[key].values()))]
    if lacks:
        raise Problem(f"{path}: no result of a run: it has no such {listed(lacks)}")
    if result["settings"].get("eval_only"):
        raise Problem(f"{path}: a run with EVAL_ONLY trained nothing; give the one that trained")
    log_path = path.with_suffix(".txt")
    if not log_path.is_file():
        raise Problem(f"{path}: its log {log_path.name} is not beside it")
    log = read_logs(log_path)[-1]
    wrong = differences(result, log) if log.scores else ["the log has no final score"]
    wrong += ["the log has another code_sha256"] if log.code_sha256 != result["code_sha256"] else []
    if wrong:
        raise Problem(f"{path}: not the result of {log_path.name}: {'; '.join(wrong)}")
    earlier = earlier_logs(path, log)
    for name in "curve", "validation":  # without the steps that were lost or done again
        points = {point[0]: point for part, last in reversed(earlier)
                  for point in getattr(part, name) if point[0] <= last}
        points.update((point[0], point) for point in getattr(log, name))
        log = replace(log, **{name: list(points.values())})
    return Run(path, result, log, [part for part, _ in earlier])


def open_runs(places):
    """Runs of all places, by seed; they must be seeds of one thing. Raises Problem."""
    runs = [open_run(path) for place in places for path in result_files(place)]
    for seed, n in Counter(run.seed for run in runs).items():
        if n > 1:
            paths = listed(run.path for run in runs if run.seed == seed)
            raise Problem(f"{n} results of seed {seed}: {paths}; name the files to take")
    codes = {str(run.path): run.result["code_sha256"] for run in runs}
    if len(set(codes.values())) > 1:
        raise Problem("the runs are of different code: "
                      + listed(f"{h[:16]}… in {p}" for p, h in codes.items()))
    varying = differing_settings({str(run.path): run.result["settings"] for run in runs})
    if varying:
        raise Problem("the runs have different settings:\n  " + "\n  ".join(varying))
    return runs


def find_script(runs, given=None):
    """Bytes of the script that ran: given, beside a run, ours, or in a log. Raises Problem."""
    wanted, run = runs[0].result["code_sha256"], runs[0]
    beside = [p / "train_gpt.py" for r in runs for p in [*r.path.resolve().parents][:3]]
    paths = [Path(given)] if given else [*beside, ROOT / "train_gpt.py"]
    candidates = {str(p): p.read_bytes() for p in dict.fromkeys(paths) if p.is_file()}
    if run.log.source is not None and not given:
        candidates[f"source in {run.log.path}"] = run.log.source
        with contextlib.suppress(ImportError):
            from artifact import pack_code
            candidates[f"source in {run.log.path}, packed"] = pack_code(run.log.source)
    for content in candidates.values():
        if sha256(content) == wanted:
            return content
    raise Problem(f"no script has the sha256 of the runs, {wanted[:16]}…:\n  "
                  + "\n  ".join(f"{sha256(c)[:16]}…  {name}" for name, c in candidates.items())
                  + "\ngive the script that ran with --script")


def hardware_of(result):
    ranks, device = result.get("world_size") or 1, result.get("device") or "unknown"
    return f"{ranks}×{device}" if "CPU" not in device or ranks > 1 else device


def seed_row(run):
    """A run in submission.json's seed_results."""
    r = run.result
    before = {f"{kind}_bpb": float(v) for kind, v in list(r["val_bpb"].items())[:-1]}
    return dict(val_loss=last(r["val_loss"]), val_bpb=last(r["val_bpb"]), **before,
                steps=r["steps"], train_seconds=round(float(r["train_seconds"]), 1),
                eval_seconds=round(float(r["eval_seconds"]), 1), bytes_total=r["total_bytes"])


def last(scores):
    """The score of the last evaluation, which counts."""
    return float(next(reversed(scores.values())))


def summary(runs, args, code):
    """The object of submission.json."""
    results, first = [r.result for r in runs], runs[0].result
    loss, _ = mean_std([last(r["val_loss"]) for r in results])
    bpb, std = mean_std([last(r["val_bpb"]) for r in results])
    largest = max(r["total_bytes"] for r in results)
    ledgers = all("ledger_sha256" in r for r in results)
    compliance = dict(
        score_before_update=ledgers, each_target_once=ledgers,
        artifact_read_from_disk="artifact" in first,
        train_seconds_under_600=all(r["train_seconds"] <= CAP_SECONDS for r in results),
        eval_seconds_under_600=all(r["eval_seconds"] <= CAP_SECONDS for r in results),
        bytes_under_16mb=largest <= CAP_BYTES, three_seeds=len(runs) >= 3,
        full_validation_set=all(
            official_set(r.get("scored_targets") or 0) or (
                not r["settings"].get("val_limit_tokens")
                and abs((r.get("scored_bytes") or 0) / OFFICIAL_BYTES - 1) <= WHOLE_TEXT)
            for r in results),
        validation_targets=first.get("scored_targets"), validation_bytes=first.get("scored_bytes"))
    return dict(
        author=args.author, github_id=args.github_id, name=args.name, date=args.date,
        track=args.track, val_loss=round(loss, 8), val_bpb=round(bpb, 8),
        val_bpb_std=None if std is None else round(std, 8), seeds=[r.seed for r in runs],
        seed_results={str(run.seed): seed_row(run) for run in runs}, bytes_code=len(code),
        bytes_model=largest - len(code), bytes_total=largest, hardware=hardware_of(first),
        pytorch_version=first.get("versions", {}).get("torch"), blurb=args.blurb or args.name,
        compliance=compliance)


def results_table(runs, facts):
    kinds = [kind for kind in runs[0].result["val_bpb"]  # older scripts resumed without "float"
             if all(kind in run.result["val_bpb"] for run in runs)]
    rows = [[run.seed, *(f"{r['val_bpb'][k]:.4f}" for k in kinds), f"{last(r['val_loss']):.4f}",
             f"{r['steps']:,}", f"{r['train_seconds']:.1f}", f"{r['eval_seconds']:.1f}",
             f"{r['total_bytes']:,}"] for run in runs for r in [run.result]]
    if len(runs) > 1:
        means = [mean_std([float(r.result["val_bpb"][k]) for r in runs]) for k in kinds]
        rows.append(["mean ± std", *(f"{m:.4f} ± {s:.4f}" for m, s in means),
                     f"{facts['val_loss']:.4f}", "", "", "", ""])
    return markdown_table(["seed", *(f"{k}, bpb" for k in kinds), "val_loss, nats", "steps",
                           "training, s", "evaluation, s", "bytes"], rows)


def settings_table(run, source):
    """What differs from the defaults, and whether the command or the preset said so."""
    defaults, settings, rows = defaults_of(ast.parse(source)), run.result["settings"], []
    for key, value in settings.items():
        default, name = defaults.get(key, "unknown"), key.upper()
        same = str(value) == str(default) or number(value) == number(default) is not None
        if not same and key != "preset" and not NOT_OF_THE_MODEL.match(key):
            by = ("command" if name in run.log.explicit else
                  f"preset {settings.get('preset') or 'none'}")
            rows.append([f"`{name}`", f"`{value}`", f"`{default}`", by])
    if not rows:
        return "None differs from the default."
    return markdown_table(["setting", "value", "default", "set by"], rows)


def command_of(run):
    """The command of a run, with the settings that were set explicitly."""
    values = {k: v for k, v in run.log.settings.items() if k in run.log.explicit}
    ranks = run.result.get("world_size") or 1
    start = f"torchrun --standalone --nproc_per_node={ranks}" if ranks > 1 else "python"
    return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in values.items()), start, "train_gpt.py"])


def timing_line(run):
    r, pack = run.result, run.result.get("pack_seconds")
    timers = listed(f"{key} {s.seconds:.1f}" for key, s in run.log.scores.items()
                    if s.seconds is not None)
    outside = f"; packing {pack:.1f} s, outside both" if pack is not None else ""
    return (f"- Seed {run.seed}: training {r['train_seconds']:.1f} of {CAP_SECONDS} s; evaluation "
            f"{r['eval_seconds']:.1f} of {CAP_SECONDS} s ({timers}){outside}.")


README = """\
# {name}

{blurb}**{val_bpb:.4f} bits per byte** ({spread}), {bytes_total:,} bytes (largest seed), \
{hardware}, PyTorch {pytorch_version}.

{results}

{parameters:,} parameters; {targets:,} validation targets, {bytes:,} bytes{counted}. \
The last evaluation counts.

{violations}![loss](loss.png)

## Settings that differ from the default

{settings}

## Command

```
{commands}
```

## Timing

{timing}

## What the checks said

```
{verdict}
```

`train_seed<SEED>.log` begins with the source of the script; `_prev1`, `_prev2`, ... are the parts \
before a run was resumed. `result_seed<SEED>.json` holds all settings, the hash of the code \
({sha256}…) and of the score ledger; `train_gpt.py` is the script as it ran.
"""


def readme_text(runs, facts, source, verdict):
    """The README of a folder; `verdict` are the lines of its check."""
    first = runs[0].result
    spread = f"± {facts['val_bpb_std']:.4f} over {len(runs)} seeds" if len(runs) > 1 else "one seed"
    violations = "; ".join(sorted({str(v) for r in runs for v in r.result.get("violations") or []}))
    return README.format(**{
        **facts, "blurb": facts["blurb"] + "\n\n" if facts["blurb"] != facts["name"] else "",
        "spread": spread, "results": results_table(runs, facts),
        "parameters": first.get("model_params", 0), "targets": first.get("scored_targets", 0),
        "bytes": first.get("scored_bytes", 0),
        "counted": f", counted from the {first['bytes_from']}" if "bytes_from" in first else "",
        "violations": violations and f"What makes it no legal record: {violations}.\n\n",
        "settings": settings_table(runs[0], source), "commands": "\n".join(map(command_of, runs)),
        "timing": "\n".join(map(timing_line, runs)), "verdict": "\n".join(verdict),
        "sha256": first["code_sha256"][:16]})


def requirements_of(result):
    """The packages of a run, at its versions."""
    names = {k: str(result.get("versions", {}).get(k) or "").split("+")[0]
             for k in ("torch", "numpy", "sentencepiece")}
    lines = [f"{k}=={v}" if v else k for k, v in names.items()]
    lines += ["zstandard"] if result["settings"].get("codec") == "zstd" else []
    return "\n".join(lines) + "\n"


def fill_folder(folder, runs, facts, code, with_artifact):
    """Write everything but the README's verdict, which needs the rest."""
    text = json.dumps(facts, indent=1, ensure_ascii=False) + "\n"
    (folder / "submission.json").write_text(text, **UTF8)
    (folder / "train_gpt.py").write_bytes(code)
    (folder / "requirements.txt").write_text(requirements_of(runs[0].result))
    for run in runs:
        shutil.copyfile(run.log.path, folder / f"train_seed{run.seed}.log")
        for n, part in enumerate(reversed(run.earlier), 1):
            shutil.copyfile(part.path, folder / f"train_seed{run.seed}_prev{n}.log")
        shutil.copyfile(run.path, folder / f"result_seed{run.seed}.json")
        if with_artifact:
            name = Path(str(run.result.get("artifact"))).name
            there = [p / name for p in run.path.resolve().parents[:2] if (p / name).is_file()]
            if not there or there[0].stat().st_size != run.log.model_bytes:
                raise Problem(f"--with-artifact: {name} of {run.log.model_bytes} bytes is not at "
                              f"{run.path.parent.parent}")
            suffixes = "".join(Path(name).suffixes)
            shutil.copyfile(there[0], folder / f"final_model_seed{run.seed}{suffixes}")
    plot_losses(folder / "loss.png", {f"seed {run.seed}": run.log for run in runs})


def pack(args):
    """Make the folder whole or not at all; print what its check says. Returns the exit status."""
    runs = open_runs(args.places)
    code = find_script(runs, args.script)
    newest = max(r.path.stat().st_mtime for r in runs)
    args.date = args.date or datetime.date.fromtimestamp(newest).isoformat()
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
        try:
            source = readable_source(folder / "train_gpt.py")
        except ValueError as problem:
            raise Problem(str(problem)) from None
        for verdict in (["…"], None):  # the check looks at the README too
            sub = None if verdict else check(folder)
            text = readme_text(runs, facts, source, verdict or verdict_lines(sub))
            (folder / "README.md").write_text(text, **UTF8)
        folder.rename(target)
    print(*verdict_lines(sub), f"written: {target}", sep="\n")
    return exit_status(sub)


# -- index -----------------------------------------------------------------------------------------

def index_row(folder):
    """Row of records/README.md for a folder. Raises Problem."""
    facts = read_json(folder / "submission.json")
    bpb, std, compliance = (facts.get(k) for k in ("val_bpb", "val_bpb_std", "compliance"))
    if number(bpb) is None:
        raise Problem(f"{folder / 'submission.json'}: val_bpb is {bpb!r}, no number")
    text, compliance = f"{bpb:.4f}", compliance if isinstance(compliance, dict) else {}
    seeds, targets = facts.get("seeds"), compliance.get("validation_targets")
    if number(std) is not None:
        text += f" ± {std:.4f}" + (f" ({len(seeds)} seeds)" if isinstance(seeds, list) else "")
    if compliance.get("full_validation_set") is False and number(targets):
        text += f" ({targets:,} targets)"
    total = f"{facts['bytes_total']:,}" if number(facts.get("bytes_total")) is not None else "?"
    track = "record, 16 MB" if folder.parent.name == RECORD else "non-record, 16 MB"
    return [f"[{folder.name}]({folder.parent.name}/{folder.name})", track, text, total,
            facts.get("name") or "?"]


def index(records=HERE):
    """Write the table of records/README.md anew; the rest stays. Returns the exit status."""
    rows, problems = [], []
    folders = [p for p in records.glob("track_*/*") if p.is_dir() and not p.name.startswith(".")]
    for folder in sorted(folders):
        try:
            rows.append(index_row(folder))
        except Problem as problem:
            problems.append(str(problem))
    readme = records / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else "# Our runs\n"
    old = re.search(r"^\|.*?(?=^(?!\|)|\Z)", text, re.M | re.S)
    new = markdown_table(["folder", "track", "val_bpb", "bytes", "what"], rows) + "\n"
    text = text[:old.start()] + new + text[old.end():] if old else text.rstrip("\n") + "\n\n" + new
    write_whole(readme, text.encode(**UTF8))
    print(*(f"left out: {p}" for p in problems), f"{readme}: {len(rows)} folders", sep="\n")
    return int(bool(problems))


# -- command line ----------------------------------------------------------------------------------

def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    path = os.path.expanduser
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("pack", help="make a folder out of finished runs")
    p.add_argument("places", nargs="+", type=path, metavar="RUN",
                   help="OUT_DIR of a run, or its logs/<RUN_ID>.json; one per seed")
    p.add_argument("--name", required=True)
    p.add_argument("--author", required=True)
    p.add_argument("--github-id", default="")
    p.add_argument("--blurb", default="", help="a sentence or two on what is new")
    p.add_argument("--track", choices=(RECORD, NON_RECORD), default=NON_RECORD)
    p.add_argument("--date", help="YYYY-MM-DD; default: of the newest result")
    p.add_argument("--out", type=path, help="folder; default: records/<track>/<date>_<name>")
    p.add_argument("--script", type=path, help="the script that ran, if it is not beside the runs")
    p.add_argument("--with-artifact", action="store_true", help="copy the artifacts too")
    p = commands.add_parser("check", help="one line per check: PASS, FAIL, WARN, NOT CHECKED")
    p.add_argument("folder", type=path)
    p.add_argument("--against", type=path,
                   help="the record to beat: its folder, or mean,std,n in nats (or mean,std,n,bpb)")
    p.add_argument("--logs", nargs="+", default=[], metavar="GLOB",
                   help="the logs that count, by name (default: those of the seeds that "
                        "submission.json names, told from reruns by their score)")
    p.add_argument("--artifact", type=path, action="append", default=[], help="a packed model")
    p.add_argument("--data", type=path, help="folder with the validation shards, to count bytes")
    p.add_argument("--tokenizer", type=path, help="its SentencePiece model (default: the logs')")
    p.add_argument("--run", action="store_true",
                   help="also EXECUTE its train_gpt.py (--dry-run) and audit artifacts")
    commands.add_parser("index", help="write the table of records/README.md anew")
    return parser.parse_args(argv)


def main(argv):
    args = arguments(argv)
    if args.command == "pack":
        return pack(args)
    if args.command == "index":
        return index()
    sub = check(args.folder, args.against, args.run, args.artifact, args.data, args.tokenizer,
                args.logs)
    print("\n".join(verdict_lines(sub)))
    return exit_status(sub)


if __name__ == "__main__":
    sys.exit(exit_code_of(main, sys.argv[1:], unread=141))  # what nobody read has passed nothing
