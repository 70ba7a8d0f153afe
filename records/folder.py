"""A submission folder, ours or a published one, as far as it can be read; nothing is executed.

    sub = open_submission("records/track_10min_16mb/2026-04-09_x"); print(sub.kind, sub.runs)

What is read: submission.json whatever its keys are called, the script out of its wrapper and the
code files that it needs, and which of the folder's logs count. records/submission.py judges what is
read here.
"""
from __future__ import annotations

import ast
import contextlib
import fnmatch
import functools
import hashlib
import math
import re
import sys
import warnings
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent / "data")]
import shards  # noqa: E402
from logs import DIAGNOSTIC, half_unit, read_logs  # noqa: E402
from shards import DataError as Problem  # noqa: E402
from unpack import readable_source  # noqa: E402

RECORD, NON_RECORD = "track_10min_16mb", "track_non_record_16mb"
PASS, FAIL, WARN, UNCHECKED = "PASS", "FAIL", "WARN", "NOT CHECKED"


# -- numbers and text ------------------------------------------------------------------------------

def number(value):
    """A finite number as float, or None for anything else (null, text, NaN, a flag)."""
    try:
        if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
            return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number of hundreds of digits
        pass
    return None


def mean_std(values):
    """(mean, sample standard deviation or None for a single value)."""
    mean = sum(values) / len(values)
    squares = sum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else None


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def listed(items):
    return ", ".join(map(str, items))


def markdown_table(head, rows):
    lines = ["| " + " | ".join(" ".join(str(cell).split()).replace("|", "\\|") for cell in line)
             + " |" for line in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def read_json(path):
    """The object in a JSON file, floats as Decimal, which keeps their digits. Raises Problem."""
    return shards.read_json(path, "an object {…}", parse_float=Decimal)


# -- what submission.json claims -------------------------------------------------------------------

# Names that are used for one thing, the usual one first.
BPB = ("val_bpb", "mean_val_bpb", "val_bpb_mean", "final_val_bpb", "bpb", "mean_bpb", "bpb_mean",
       "final_bpb", "score")
LOSS = ("val_loss", "mean_val_loss", "val_loss_mean", "val_loss_nats", "loss")
STD = ("val_bpb_std", "std_val_bpb", "bpb_std", "std_bpb", "val_bpb_std_dev")
TOTAL = ("bytes_total", "total_bytes", "artifact_bytes", "artifact_bytes_max", "max_artifact_bytes",
         "artifact_bytes_mean", "total_submission_bytes", "submission_bytes",
         "artifact_size_bytes", "bytes_total_max")
MODEL = ("bytes_model", "model_bytes", "compressed_model_bytes")  # also bytes_model_…
CODE = ("bytes_code", "code_bytes", "code_size_bytes")
WITHIN = ("results", "metrics", "result", "summary", "aggregate", "final")  # they may hold these
OTHER_SCORE = re.compile(
    r"std|pre|base|delta|sota|gain|improve|gap|float|record|target|best_|seeds", re.I)
ELSEWHERE = re.compile(r"supersed|previous|baseline|ablation|compar|reference|verif|sota|prior"
                       r"|\bold|step|layer|stride|iter|histor|curve|epoch|bits", re.I)


def figure(value, key=""):
    """A number of a JSON file, also in quotes ("15,991,930"), else None. A score gets two decimals
    at least, since writers of JSON drop zeros."""
    text = value.strip() if isinstance(value, str) else ""
    if re.fullmatch(r"\d[\d,_]*(\.\d+)?", text) and len(text) < 30:
        value = Decimal(re.sub("[,_]", "", text))
    if number(value) is None:
        return None
    short = key in (*BPB, *LOSS) and abs(value) < 1000 and half_unit(value) > 0.005
    return Decimal(str(value)).quantize(Decimal("0.01")) if short else value


def said(claims, names):
    """(key, number) of the first of these names that an object or its results have, or Nones."""
    places = [claims, *(claims[k] for k in WITHIN if isinstance(claims.get(k), dict))]
    wider = {BPB: lambda k: "bpb" in k and not OTHER_SCORE.search(k),
             MODEL: lambda k: k.startswith("bytes_model_")}.get(names, lambda k: False)
    found = [(k, figure(o[k], k)) for o in places for k in names if k in o]
    found += [(k, figure(o[k], k)) for o in places for k in filter(wider, o)]
    return next((pair for pair in found if pair[1] is not None), (None, None))


def seed_of(key):
    """Digits of the key '42', 'seed_42', 'seed42', or None."""
    found = re.fullmatch(r"(?:seed[_ -]?)?(\d{1,9})", str(key), re.I)
    return found and str(int(found[1]))


def seed_rows(value, depth=0, name=""):
    """{seed: row} of the first object or list in submission.json that is kept by seed."""
    if ELSEWHERE.search(name) or depth > 3:
        return {}
    if isinstance(value, list):
        rows = (v for v in value if isinstance(v, dict))
        return {seed_of(v["seed"]): v for v in rows if seed_of(v.get("seed"))}
    if not isinstance(value, dict):
        return {}
    rows = {seed_of(k): v if isinstance(v, dict) else {"val_bpb": v} for k, v in value.items()
            if seed_of(k) and (isinstance(v, dict) or "bpb" in name and figure(v) is not None)}
    inner = (seed_rows(v, depth + 1, str(k)) for k, v in value.items())
    return rows or next(filter(None, inner), {})


def track_of(claims, folder, readme):
    """(track, what was said of it, is it certain) by submission.json, parent folder, README."""
    stated, above = str(claims.get("track") or ""), folder.resolve().parent.name
    words = re.sub(r"[^a-z0-9]+", "_", stated.lower())
    text = f"{claims.get('name')} {claims.get('blurb')} {readme[:400]}".lower()
    if re.search(r"non_?record|unlimited|unrestricted", words) or above == NON_RECORD:
        return NON_RECORD, stated, True
    if above == RECORD or "10min" in words or words == "record":
        return RECORD, stated, bool(re.search(r"10_?min|^record$", words)) or not stated
    return (NON_RECORD if re.search(r"non.?record", text) else RECORD), stated, False


# -- the script, without executing it --------------------------------------------------------------

CODE_SUFFIXES = {".py", ".pyx", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".so"}


def names_read(tree):
    """Names of the environment that a script can read: fields of its Settings class, and names in
    capitals that it holds as text; where it makes names up (.upper()), fields of any class."""
    names = {t for t in texts_of(tree) if re.fullmatch(r"[A-Z][A-Z0-9_]*", t)}
    names |= {name.upper() for name in defaults_of(tree)}
    attributes = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    if {"upper", "environ"} <= attributes:
        classes = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
        for line in (line for node in classes for line in node.body):
            targets = getattr(line, "targets", [getattr(line, "target", None)])
            names |= {target.id.upper() for target in targets if isinstance(target, ast.Name)}
    return names


def defaults_of(tree):
    """{setting: default} of a script with a `Settings` class of fields `name: type = default`, or
    `name: type = section(default, …)` as in earlier ones."""
    out = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == "Settings":
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and line.value:
                    arguments = getattr(line.value, "args", None) or [line.value]
                    with contextlib.suppress(ValueError, RecursionError):
                        out[line.target.id] = ast.literal_eval(arguments[0])
    return out


def modules_imported(tree):
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.module or alias.name).split(".")[0] for alias in node.names}
    return found


def texts_of(tree):
    values = (n.value for n in ast.walk(tree) if isinstance(n, ast.Constant))
    return {value for value in values if isinstance(value, str)}


UNPARSED = (SyntaxError, ValueError, RecursionError, MemoryError)  # what parsed() raises


def parsed(source):
    """The tree of a script. Raises UNPARSED."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes in others' text
        return ast.parse(source)


@functools.lru_cache(maxsize=16)
def meaning(source):
    """A script without comments and docstrings, to compare; None where it cannot be parsed."""
    with contextlib.suppress(*UNPARSED):
        tree = parsed(source)
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            first = body[0] if isinstance(body, list) and body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                first.value.value = None
        return ast.dump(tree)


def adapts_on_validation(tree):
    """Whether the script calls something named after adaptation with validation tokens."""
    calls = (n for n in ast.walk(tree) if isinstance(n, ast.Call)
             and re.search(r"ttt|adapt", ast.unparse(n.func), re.I))
    with contextlib.suppress(RecursionError):
        return any("val" in str(getattr(a, "id", getattr(a, "attr", getattr(a, "arg", ""))))
                   for n in calls for a in ast.walk(n)
                   if isinstance(a, (ast.Name, ast.Attribute, ast.keyword)))
    return False


# -- open a folder ---------------------------------------------------------------------------------

@dataclass
class Submission:
    """A folder as far as it could be read, and the findings: (status, what was checked, text)."""
    folder: Path
    track: str = ""
    claims: dict | None = None  # submission.json
    claims_name: str = "submission.json"
    rows: dict = field(default_factory=dict)  # seed → what submission.json says of it
    readme: str = ""
    every_log: list = field(default_factory=list)
    logs: list = field(default_factory=list)  # those that count
    kind: str | None = None  # the evaluation whose score is claimed, else the last one
    script: Path | None = None
    code: bytes | None = None  # the script as it lies there, whose bytes count
    source: bytes | None = None  # the same unpacked
    tree: ast.Module | None = None
    results: dict = field(default_factory=dict)  # seed → its result file
    needed: dict = field(default_factory=dict)  # further files that the script names → bytes
    unneeded: dict = field(default_factory=dict)  # further code files → bytes
    findings: list = field(default_factory=list)

    def add(self, status, what, text):
        self.findings.append((status, what, text))

    def verdict(self, what, problems, good, status=FAIL, remarks=(), unknown=(), silent=""):
        """Findings: all problems, else what is good; remarks; what is unknown. `silent` is unknown
        where there is nothing else. Empty texts count for nothing."""
        problems, remarks, unknown = (list(filter(None, x)) for x in (problems, remarks, unknown))
        if not (problems or good or remarks or unknown):
            unknown = [silent] if silent else []
        for status, texts in ((status if problems else PASS, problems or [good]), (WARN, remarks),
                              (UNCHECKED, unknown)):
            if texts and texts[0]:
                self.add(status, what, "; ".join(texts))

    @property
    def severity(self):
        """Of what only a record must keep to."""
        return FAIL if self.track == RECORD else WARN

    @property
    def scored(self):
        return [log for log in self.logs if log.scores]

    def score(self, log):
        return log.scores.get(self.kind) or log.score

    @property
    def runs(self):
        """{seed: log}, by the seed in the log, else in its name, else by name."""
        return {log.run_seed if log.run_seed is not None else log.name: log for log in self.logs}

    @property
    def code_bytes(self):
        return None if self.code is None else len(self.code) + sum(self.needed.values())

    @property
    def named_seeds(self):
        """Those that submission.json names, as text."""
        seeds = (self.claims or {}).get("seeds")
        seeds = seeds if isinstance(seeds, list) else [(self.claims or {}).get("seed")]
        return {*self.rows, *(seed_of(s) for s in seeds if seed_of(s))}


def open_claims(sub, there):
    """submission.json, or another JSON file of the folder with a score and an author or a track."""
    others = [n for n in sorted(there) if n.endswith(".json") and n != "submission.json"]
    for name in ["submission.json"] * ("submission.json" in there) or others:
        try:
            claims = read_json(sub.folder / name)
        except Problem as problem:
            if name == "submission.json":
                sub.add(FAIL, "submission.json", str(problem))
            continue
        keys = {"author", "track", "github_id", "submission_name"} & claims.keys()
        if name == "submission.json" or keys and said(claims, BPB)[0]:
            sub.claims, sub.claims_name, sub.rows = claims, name, seed_rows(claims)
            return


def open_script(sub, there):
    """The script, unpacked where it is wrapped, and the code files that it needs."""
    scripts = sorted((n for n in there if re.fullmatch(r"train\w*\.py", n)),
                     key=lambda n: (n != "train_gpt.py", len(n), n))
    if not scripts:
        sub.add(UNCHECKED, "compiles",
                "no train_gpt.py, so nothing is known of its bytes, settings and imports")
        return
    sub.script = sub.folder / scripts[0]
    sub.code = sub.source = sub.script.read_bytes()
    name = sub.script.name
    try:
        sub.source = readable_source(sub.script)
    except ValueError as problem:
        sub.add(UNCHECKED, "wrapper", f"{name}: {problem}: nothing is known of what it holds")
        return
    try:
        sub.tree = parsed(sub.source)
        sub.add(PASS, "compiles", f"{name}, {len(sub.code):,} bytes" + (
            f", unpacks to {len(sub.source):,}" if sub.source != sub.code else ""))
    except UNPARSED as problem:
        if "f-string" in str(problem) and sys.version_info < (3, 12):
            sub.add(UNCHECKED, "compiles", f"{name} has an f-string that only Python 3.12 and "
                    f"later read; check it with such a one: {problem}")
        else:
            sub.add(FAIL, "compiles", f"{name} is no Python: {problem}")
    find_needed(sub)


def find_needed(sub):
    """Sort the folder's further code files: those that the script imports or names, the rest."""
    # a wrapper's second file may be of any kind
    loads = texts_of(parsed(sub.code)) if sub.source != sub.code else set()
    files = {p.relative_to(sub.folder).as_posix(): p for p in sorted(sub.folder.rglob("*"))
             if (p.suffix in CODE_SUFFIXES or p.name in loads) and p.is_file() and p != sub.script
             and not any(part.startswith(".") for part in p.relative_to(sub.folder).parts)}
    sub.needed = {name: path.stat().st_size for name, path in files.items() if path.name in loads}
    trees = [sub.tree] if sub.tree else []
    for tree in trees:  # grows while it is walked
        wanted = modules_imported(tree) | {t.split("/")[-1] for t in texts_of(tree)
                                           if 3 < len(t) < 120}
        for name, path in files.items():
            top = name.split("/")[0].removesuffix(".py")
            if name not in sub.needed and (top in wanted or path.name in wanted):
                sub.needed[name] = path.stat().st_size
                with contextlib.suppress(*UNPARSED):
                    trees += [parsed(path.read_bytes())] if path.suffix == ".py" else []
    sub.unneeded = {name: path.stat().st_size for name, path in files.items()
                    if name not in sub.needed}


LOG_NAME = re.compile(r"(train|log|seed|run).*\.(log|txt|out)$|.*\.log$", re.I)
NO_LOG = re.compile(r"requirements|readme|license|notes|\.md$", re.I)
BESIDE = re.compile(r"ablat|baseline|sweep|smoke|dry.?run|debug|compare|superseded|\bold|prev|fail"
                    r"|proxy|screen|checkpoint|warmup|rerun|reprod|_eval|eval_|quant_", re.I)
MOST_LOGS, MOST_LOG_BYTES = 40, 32_000_000


def find_logs(sub):
    """All logs of the folder, those at the top first; copies once. Raises Problem."""
    candidates = []
    for path in sorted(sub.folder.rglob("*"), key=lambda p: (len(p.parts), p)):
        name = path.relative_to(sub.folder).as_posix()
        hidden = any(part.startswith(".") for part in Path(name).parts)
        text = path.suffix in (".log", ".txt", ".out") and not NO_LOG.search(path.name)
        if text and not hidden and path.is_file() and 0 < path.stat().st_size < MOST_LOG_BYTES:
            candidates.append((path, name))
    if len(candidates) > MOST_LOGS:
        sub.add(UNCHECKED, "logs",
                f"the first {MOST_LOGS} of {len(candidates)} text files; --logs chooses")
    seen, logs = set(), []
    for path, name in candidates[:MOST_LOGS]:
        digest = sha256(path.read_bytes())
        if digest in seen and re.search(r"seed", name, re.I) is None:
            continue
        seen.add(digest)
        runs = read_logs(path, name)
        if "/" not in name and LOG_NAME.match(name) or any(g.scores or g.curve for g in runs):
            logs += runs
    return logs


def claimed_bpb(sub, log):
    """The bpb that submission.json gives for a log: of its seed, else of all."""
    row = sub.rows.get(str(log.run_seed)) or {}
    return said(row, BPB)[1] if said(row, BPB)[0] else said(sub.claims or {}, BPB)[1]


def distance(log, bpb):
    """How far the nearest evaluation of a log is from a score."""
    known = (s.bpb for s in log.scores.values() if math.isfinite(s.bpb))
    return min((abs(score - float(bpb)) for score in known), default=math.inf)


def choose_logs(sub, globs):
    """Set the logs that count: those that `globs` name, else of each seed that submission.json
    names the one with its score, else one of each seed. Returns {other log: why it does not}."""
    aside, known = {}, {}
    if globs:
        sub.logs = [g for g in sub.every_log if any(fnmatch.fnmatch(n, p) for p in globs
                    for n in (g.name, g.path.name, g.path.relative_to(sub.folder).as_posix()))]
        if not sub.logs:
            raise Problem(f"--logs {' '.join(globs)}: no log of that name; there are "
                          f"{listed(g.name for g in sub.every_log)}")
        return {g.name: "not among --logs" for g in sub.every_log if g not in sub.logs}
    groups = {}
    # a copy under another seed's name is not put aside: that is a fault
    for log in sorted(sub.every_log, key=lambda g: g.named_seed is None):
        first = known.setdefault(log.identity, log)
        if first is not log and log.named_seed in (None, first.run_seed):
            aside[log.name] = f"a copy of {first.name}"
        elif not log.curve and log.run_seed is None and len(sub.every_log) > 1:
            aside[log.name] = "no training in it"
        else:
            seed = log.named_seed if log.named_seed is not None else log.seed
            groups.setdefault(log.name if seed is None else str(seed), []).append(log)
    named = sub.named_seeds & groups.keys()
    for seed, logs in groups.items():
        unnamed = named and seed not in named and (logs[0].run_seed is not None or distance(
            logs[0], said(sub.claims or {}, BPB)[1] or math.inf) > 5e-5)
        best = None if unnamed else completed(best_log(sub, logs, len(groups) > 1), logs)
        sub.logs += [best] if best else []
        aside |= {g.name: "its seed is not named in submission.json" if unnamed
                  else "a rerun, or another experiment"
                  for g in logs if g is not best and not (best and g.name in best.name)}
    if not sub.logs:
        sub.logs, aside = sub.every_log[:], {}
    bpb = said(sub.claims or {}, BPB)[1]
    right = [g for g in sub.logs
             if bpb is not None and distance(g, bpb) <= max(half_unit(bpb), 5e-5)]
    # without seeds, only the score tells experiments apart
    if right and any(g.run_seed is None for g in sub.logs):
        aside |= {g.name: "another score than submission.json's" for g in sub.logs
                  if g not in right}
        sub.logs = right
    return aside


def rivals(sub, aside):
    """Finished logs beside of a seed that counts, which no name tells to be another experiment."""
    counted = {log.run_seed for log in sub.logs} - {None}
    return [g for g in sub.every_log if g.name in aside and g.scores and g.run_seed in counted
            and not BESIDE.search(g.name) and "a copy" not in aside[g.name]]


def completed(best, logs):
    """The log of an evaluation by itself, with the rest from the training log of the same seed."""
    trainings = [g for g in logs if best and not best.curve and g.curve and g.path != best.path]
    if not trainings:
        return best
    training, names = trainings[0], ("total_bytes", "model_bytes", "targets", "world_size")
    return replace(training, name=f"{training.name} + {best.name}", scores=best.scores,
                   other_bpb=training.other_bpb | best.other_bpb, adapted=best.adapted,
                   total_eval_seconds=best.total_eval_seconds,
                   **{n: v for n in names if (v := getattr(best, n)) is not None})


def best_log(sub, logs, others):
    """Of one seed's logs the finished one nearest to its claimed score; None: side experiments."""
    def place(log):
        bpb = claimed_bpb(sub, log)
        return (not log.scores, 0 if bpb is None else round(distance(log, bpb), 5), not log.curve,
                log.total_bytes is None, bool(BESIDE.search(log.name)), log.name.count("/"))
    best = min(logs, key=place)
    nameless = best.run_seed is None and BESIDE.search(best.name)
    side = nameless or not best.scores and best.named_seed is None
    return None if side and others and sub.rows.get(str(best.run_seed)) is None else best


def choose_kind(sub):
    """Name of the evaluation that counts: the last common one whose score is claimed, or last."""
    if not sub.scored:
        return None
    last = sub.scored[-1]
    kinds = [k for k in dict.fromkeys([last.key, *reversed(last.scores)])
             if all(k in log.scores for log in sub.scored)]
    claim = said(sub.claims or {}, BPB)[1]
    for kind in kinds if claim is not None else ():
        rows = [log.scores[kind] for log in sub.scored]
        near = [mean_std([s.bpb for s in rows])[0], *(s.bpb for s in rows)]
        if any(abs(v - float(claim)) <= half_unit(claim) + max(s.bpb_unit for s in rows)
               for v in near):
            return kind
    return next((k for k in kinds if not DIAGNOSTIC.search(k)), last.key)


def open_submission(folder, globs=()):
    """Read what there is. Raises Problem where there is no folder, or no log that `globs` name."""
    folder = Path(folder)
    if not folder.is_dir():
        raise Problem(f"{folder}: no such folder; give one with submission.json and train_gpt.py")
    sub = Submission(folder)
    there = {p.name for p in folder.iterdir() if p.is_file() and p.stat().st_size}
    readme = next((n for n in sorted(there) if n.lower() in ("readme.md", "readme.txt", "readme")),
                  None)
    sub.readme = (folder / readme).read_text(encoding="utf-8", errors="replace") if readme else ""
    open_claims(sub, there)
    sub.track, stated, certain = track_of(sub.claims or {}, folder, sub.readme)
    sub.every_log = find_logs(sub)
    aside = choose_logs(sub, globs)
    open_script(sub, there)
    read = {"README.md": readme, "submission.json": sub.claims is not None and sub.claims_name,
            "train_gpt.py": sub.script and sub.script.name}
    lacks = [n for n in read if n not in there and n.lower() != str(read[n]).lower()]
    missing = [f"{n} is missing or empty" + (f"; {read[n]} is read" if read[n] else "")
               for n in lacks]
    severity = FAIL if not all(read[n] for n in lacks) or not sub.logs else sub.severity
    sub.verdict("files", missing + ([] if sub.logs else ["no training log (train_seed<SEED>.log)"]),
                f"README.md, submission.json, train_gpt.py; logs that count: "
                f"{listed(g.name for g in sub.logs)}", severity)
    sub.findings.insert(0, sub.findings.pop())
    if aside:
        shown = [f"{name} ({why})" for name, why in list(aside.items())[:8]]
        sub.add(WARN if rivals(sub, aside) else PASS, "logs beside", f"{len(aside)} do not count: "
                f"{listed(shown)}{', …' * (len(aside) > 8)}; --logs chooses")
    sub.kind = choose_kind(sub)
    if not certain:
        sub.add(WARN, "track",
                f"{sub.claims_name} says {stated or 'nothing'}; checked as {sub.track}")
    return sub
