"""Text logs of training runs, ours and published ones, read into one form; nothing is executed.

    for log in read_logs("train_seed42.log"): print(log.seed, log.key, log.score.bpb)

Two forms are published: `step:S/N train_loss:L train_time:Tms` with `name:value` lines, and
`S/N train_loss: L train_time: 7.8m` after a block `Hyperparameters:` of `  name: value` lines.
A file may begin with the script's source, bear time stamps, and hold several runs.
"""
from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

RULE = b"=" * 100
ALIAS = "final_int8_zlib_roundtrip"  # often a second name of another evaluation, where there is one
# Scores of weights that are not those of the file, or measured only to compare.
DIAGNOSTIC = re.compile(r"diag|pre.?quant|post.?(ema|swa|train)|trained_validation|selected_final"
                        r"|last_validation|no_ttt|float", re.I)
# Settings that may differ between the seeds of one submission.
NOT_OF_THE_MODEL = re.compile(r"(?i)^(seed|run_id|resume|rank|local_rank|device"
                              r"|logfile|.*_(dir|path|files|file|name|time|host|port|tag|date))$")
STAMP = re.compile(r"^(?:\[?\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d+)?Z?\]?\s*[|:-]?\s*"
                   r"|\[?\d\d:\d\d:\d\d(?:[.,]\d+)?\]?\s+|\[(?:rank|default)\d+\]:?\s*|rank\d+: )+")
MOST_OF_A_LINE = 1000  # a longer one is a payload
N, INT = r"([-+.\deE]+|nan|inf)", r"([\d,_]+)"
LOSS, BPB = rf"\b(?:val_)?loss\s?[:= ]\s*{N}", rf"\b(?:val_)?bpb\s?[:= ]\s*{N}"
SCORE = re.compile(rf"^(.*?){LOSS}[\s,|]+{BPB}(.*)$")
REVERSED_SCORE = re.compile(rf"^(.*?){BPB}[\s,|]+{LOSS}(.*)$")
STEP = re.compile(r"^(?:step[:= ]\s*)?(\d+)/\d+[\s:|]")
WORD = re.compile(r"\b(train_loss|val_loss|val_bpb|train_time|step_avg|lr_scale)\s?[:=]"
                  r"\s*([-+\w.]+)")
OTHER_BPB = re.compile(r"\b(\w*bpb)\s?[:=]\s*(\d\.\d{3,})\b")
RUNNING = re.compile(r"\[\s*[\d.]+[/%]|\brunning|_chunk|:done\b|\bquant_gap|\bimprove|\bdelta")
SOURCE_BEGINS = re.compile(r'^("""|\'\'\'|#!|#\s*coding|import \w|from [\w.]+ import )')
SOURCE_HAS = re.compile(r"^(?:import \w|from [\w.]+ import )")
ENDS_A_RUN = re.compile(r"Total submission size|^\S* ?val_loss|_exact|^seconds:|^ledger:"
                        r"|^code_sha256:|total_eval_time|^phase:|peak memory")
BLOCK_BEGINS = re.compile(r"\W*hyper.?parameters\W*$", re.I)
BLOCK_LINE = re.compile(r"\s+(\w+)\s?[:=]\s?(.*)$")
SETTING = re.compile(r"setting (\w+)=(.*?)(  \(set\))?$")
# Optimizer steps over whole epochs of a text that the same line does not score. What (?>…) has
# found stays found: it does not try all pairs on a long line.
ADAPTS = re.compile(r"(?>.*?ttt\w*?[\s:_-])(?>.*?epochs?[\s:=]*\d+/\d).*?\bloss", re.I)
SCORES_INSIDE = re.compile(r"(?<![\w])(?:running_)?(?:bpb|bb|rb)\s?[:=]\s*\d", re.I)
CALIBRATES = re.compile(r"^(?=.*(?:gptq|hessian))(?=.*(?:calibrat|collect))", re.I)
CALIBRATED = re.compile(r"\bin ([\d.]+)\s?(ms|s)\b")

# attribute, a text that such a line holds, the pattern, type of the value; the last line counts.
FIELDS = [(name, hint, re.compile(pattern), kind) for name, hint, pattern, kind in (
    ("seed", "eed", r"(?<!\w)[Ss](?:eed|EED)\s?[:=]\s*(\d+)\b", int),
    ("code_bytes", "ode size", rf"[Cc]ode size(?: \(\w+\))?\s?: {INT}", int),
    ("model_bytes", "Serialized model ", rf"Serialized model [^:\s][^:]*: {INT}", int),
    ("total_bytes", "Total submission size", rf"Total submission size(?: [^:]+)?: {INT}", int),
    ("code_sha256", "code_sha256:", r"^code_sha256:([0-9a-f]{64})\b", str),
    ("eval_seconds", "seconds: ", r"^seconds: .*\bevaluation ([\d.]+)", float),
    ("pack_seconds", "seconds: ", r"^seconds: .*\bpack ([\d.]+)", float),
    ("timed_train", "seconds: ", r"^seconds: train ([\d.]+)", float),
    ("total_eval_seconds", "total_eval_time", r"total_eval_time\s?[:=]\s*([\d.]+)\s?s\b", float),
    ("targets", "tokens", rf"(?<!\w)(?:val|target)_tokens\s?[:=]\s*{INT}", int),
    ("targets", "val_loader", rf"^val_loader:.*\btokens:\s?{INT}", int),
    ("targets", "validation_targets", r"\bvalidation_targets:(\d+)", int),
    ("targets", "ledger: ", r"^ledger: targets:(\d+)", int),
    ("scored_bytes", "ledger: ", r"^ledger: .*\bbytes:(\d+)", int),
    ("loss_sum", "ledger: ", r"^ledger: .*\bloss_sum:([\d.]+)", float),
    ("ledger", "ledger: ", r"^ledger: .*\bsha256:([0-9a-f]{64})", str),
    ("bytes_from", "bytes_from", r"\bbytes_from:(\w+)", str),
    ("world_size", "world_size", r"(?<!\w)world_size\s?[:=]\s*(\d+)", int),
    ("world_size", " ws:", r" ws:(\d+)", int),
    ("device", "device:", r"\bdevice:(.+?)(?: \w+:|$)", str),
    ("device", "NVIDIA", r"^\|\s+\d+\s+(NVIDIA [\w -]+?)\s{2,}", str),
    ("tokens_per_step", "okens", r"(?<!\w)(?:tokens_per_step|train_batch_tokens)\s?[:=]\s*(\d+)",
     int),
    ("vocab_size", "vocab_size", r"vocab_size\s?[:=]\s*(\d+)", int),
    ("named_vocabulary", "sp", r"(?<![a-z])sp(\d{3,5})(?=\b|_)", int),
    ("named_vocabulary", "_bpe", r"fineweb_(\d{3,5})_bpe", int),
)]


def half_unit(printed):
    """Half of the last decimal place that a number was written with: what rounding took at most."""
    exponent = Decimal(str(printed)).as_tuple().exponent
    return 0.5 * 10.0 ** exponent if isinstance(exponent, int) else math.nan


def agree(a, b):
    """Whether two printed numbers are one: equal as far as the one with fewer digits goes."""
    unit = max(half_unit(a), half_unit(b))
    return abs(float(a) - float(b)) <= unit * (1 + 1e-6)


def seconds_of(text):
    """(seconds, half of the last printed unit) of '599950ms', '7.8m'. Raises ValueError."""
    found = re.fullmatch(r"([\d.]+)(ms|s|m|min)?", text)
    if not found:
        raise ValueError(text)
    scale = {"ms": 1e-3, None: 1e-3, "s": 1.0, "m": 60.0, "min": 60.0}[found[2]]
    return float(found[1]) * scale, half_unit(found[1]) * scale


@dataclass
class Score:
    """One evaluation of a log: nats per target, bits per byte, seconds; and what rounding took."""
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

    def printed(self, attribute):
        """The number as it was printed, for `agree`."""
        unit = getattr(self, f"{attribute}_unit")
        places = max(0, round(-math.log10(2 * unit))) if unit > 0 else 8
        return f"{getattr(self, attribute):.{places}f}"


@dataclass
class Log:
    """What the log of one run says; None where it says nothing."""
    path: Path
    name: str = ""
    source: bytes | None = None  # the script, where the log begins with it
    body: str = ""
    seed: int | None = None
    named_seed: int | None = None  # the seed in the file's name
    scores: dict = field(default_factory=dict)
    other_bpb: dict = field(default_factory=dict)  # label → text, of scores without a loss
    code_bytes: int | None = None
    code_sizes: list = field(default_factory=list)  # all that were printed, (un)compressed
    model_bytes: int | None = None
    total_bytes: int | None = None
    code_sha256: str | None = None
    train_seconds: float | None = None
    train_unit: float = 0.0  # half of the last digit that train_seconds was printed with
    timed_train: float | None = None
    steps: int | None = None
    step_seconds: float = 0.0
    calibration: str | None = None  # the line that says that data were read after the loop
    calibration_seconds: float | None = None
    eval_seconds: float | None = None  # as the log says it, everything included
    total_eval_seconds: float | None = None
    pack_seconds: float | None = None
    targets: int | None = None
    scored_bytes: int | None = None
    bytes_from: str | None = None
    loss_sum: float | None = None
    ledger: str | None = None
    world_size: int | None = None
    device: str | None = None
    tokens_per_step: int = 0
    vocab_size: int | None = None
    named_vocabulary: int | None = None
    # evaluation → optimizer steps on its text before it
    adapted: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)  # NAME → value as text
    explicit: set = field(default_factory=set)  # names that the command set
    curve: list = field(default_factory=list)  # (step, loss, milliseconds, learning-rate scale)
    validation: list = field(default_factory=list)  # (step, loss)

    @property
    def key(self):
        """Name of the last evaluation, whose score counts."""
        names = [k for k in self.scores if k != ALIAS] or list(self.scores)
        return next(reversed([k for k in names if not DIAGNOSTIC.search(k)] or names), None)

    @property
    def score(self):
        return self.scores[self.key]

    @property
    def vocabulary(self):
        said = self.settings.get("VOCAB_SIZE")
        return int(said) if said and said.isdigit() else self.vocab_size or self.named_vocabulary

    @property
    def run_seed(self):
        return self.seed if self.seed is not None else self.named_seed

    @property
    def identity(self):
        """What only a copy of the same run has in common with it."""
        scores = tuple((k, s.loss, s.bpb) for k, s in self.scores.items())
        return (scores, self.train_seconds, self.steps, self.total_bytes) if scores and (
            self.train_seconds is not None) else self.body.strip()


def label_of(text):
    """Name of an evaluation from the words before its loss: no numbers, no `_exact`."""
    words = [w for w in text.split() if not re.fullmatch(r"[\w.]+[:=][-+\d.eE%]+", w)]
    name = re.sub(r"[^\w.-]+", "_", " ".join(words)).strip("_")
    return re.sub(r"_exact\b", "", name) or "final"


def seed_in(name, before=r"seed[_-]?"):
    """The seed in a file's name, or None."""
    found = re.search(rf"{before}(\d+)(?=\D|$)", name, re.I)
    return int(found[1]) if found else None


def without_source(content):
    """(source or None, [lines of the log without it]) of a file's bytes."""
    wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")  # what PowerShell's > writes
    text = content.decode("utf-16" if wide else "utf-8", "replace")
    source, _, rest = content.partition(b"\n" + RULE)
    begins = bool(rest) and any(map(SOURCE_HAS.match,
                                    source.decode("utf-8", "replace").split("\n")))
    parts = re.split(r"(?m)^={100}\s*$", re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", text))
    lines = []
    for part in parts[:-1]:
        part = part.split("\n")
        if any(map(SOURCE_HAS.match, part)):  # what stands above is the end of the run before
            part = part[:next(i for i, line in enumerate(part) if SOURCE_BEGINS.match(line))]
        lines += part
    lines += re.split(r"\r\n|[\r\n]", parts[-1])  # a progress bar returns to the line's beginning
    lines = [line[:MOST_OF_A_LINE].rstrip("\r") for line in lines]
    stamped = "[0123456789r"  # what a stamp begins with; most lines need no search
    lines = [STAMP.sub("", line) if line[:1] in stamped else line for line in lines]
    return (source if begins else None), lines


def split_runs(lines):
    """[lines of each run] of a file: a run begins where the steps begin again."""
    begins, last, ended = [0], -1, None
    for i, line in enumerate(lines):
        if found := STEP.match(line):
            step = int(found[1]) if "_loss" in line else last
            if step < last / 2 and last > 2:
                begins.append((ended if ended is not None else i - 1) + 1)
                ended = None
            last = step
        elif ENDS_A_RUN.search(line):
            ended = i
    return [lines[a:b] for a, b in zip(begins, [*begins[1:], len(lines)])]


def read_step(log, line, step):
    """A line of the training loop: a point of the curve or a validation."""
    words = dict(WORD.findall(line))
    try:
        seconds, unit = seconds_of(words["train_time"]) if "train_time" in words else (None, 0.0)
        if "train_loss" in words:
            scale = float(words["lr_scale"]) if "lr_scale" in words else math.nan
            ms = math.nan if seconds is None else 1000 * seconds
            log.curve.append((step, float(words["train_loss"]), ms, scale))
        if "val_loss" in words:
            log.validation.append((step, float(words["val_loss"])))
        if "val_bpb" in words:
            log.other_bpb["last_validation"] = str(Decimal(words["val_bpb"]))
        if seconds is not None:
            read_time(log, seconds, unit)
        if "step_avg" in words:
            log.step_seconds = seconds_of(words["step_avg"])[0]
        log.steps = max(step, log.steps or 0)
    except (ValueError, ArithmeticError):  # a line that was cut off
        pass


def read_time(log, seconds, unit):
    """The latest training time; one in milliseconds is preferred to one in minutes."""
    if log.train_seconds is None or seconds + unit >= log.train_seconds or unit < log.train_unit:
        log.train_seconds, log.train_unit = seconds, unit


def read_score(log, found):
    """Name of the evaluation on a line, or None; of two lines of one, more digits count."""
    label, loss, bpb, rest = found.groups()
    if found.re is REVERSED_SCORE:
        loss, bpb = bpb, loss
    if RUNNING.search(label):
        return None
    try:
        timer = re.search(r"(?:eval_)?(?:time|elapsed)\s?[:=]\s*([\d.]+)(ms|s)\b", label + rest)
        seconds = seconds_of(timer[1] + timer[2])[0] if timer else None
        score = Score(float(loss), float(bpb), seconds, half_unit(loss), half_unit(bpb))
    except (ValueError, ArithmeticError):
        return None
    sliding = re.match(r"\s*sliding\b", rest)
    key = label_of(label) + ("_sliding" if sliding else "")
    known = log.scores.get(key)
    if known and score.seconds is None:
        score.seconds = known.seconds  # of the ancestors' two lines, the exact one has no time
    if not known or not score.loss_unit > known.loss_unit:
        if "_exact" not in label:  # measured again: now the last
            log.scores.pop(key, None)
        log.scores[key] = score
    return key


def read_calibration(log, line):
    """Reading of training data after the loop, and its seconds where they are printed."""
    if re.search(r"reserv|self.?gen|random|autoregress|\bAR\b|_batches\s?[:=]", line):
        return
    log.calibration = line.strip()
    if found := CALIBRATED.search(line):
        seconds, _ = seconds_of(found[1] + found[2])
        log.calibration_seconds = (log.calibration_seconds or 0) + seconds


def read_fields(log, line):
    """Everything of the table FIELDS that a line says."""
    for name, hint, pattern, kind in FIELDS:
        if hint in line and (found := pattern.search(line)):
            text = next(filter(None, found.groups()))
            try:
                value = kind(re.sub("[,_]", "", text) if kind is int else text)
            except ValueError:
                continue
            setattr(log, name, value)
            if name == "code_bytes":
                log.code_sizes.append(value)


def read_run(log, lines):
    """Fill a Log from the lines of its run."""
    block = scored_inside = False
    adapts = None
    for line in lines:
        if "_loss" in line and (step := STEP.match(line)):
            read_step(log, line, int(step[1]))
            continue
        if block and (found := BLOCK_LINE.match(line)):
            log.settings[found[1].upper()] = found[2].strip()
            continue
        block = "arameters" in line and bool(BLOCK_BEGINS.match(line))
        if line.startswith("setting ") and (found := SETTING.match(line)):
            log.settings[found[1]] = found[2]
            log.explicit |= {found[1]} if found[3] else set()
        elif "bpb" in line and (found := SCORE.match(line) or REVERSED_SCORE.match(line)):
            key = read_score(log, found)
            if key and adapts and not scored_inside:
                log.adapted.setdefault(key, adapts)
        else:
            adapts = adapts or (line.strip() if ADAPTS.match(line) else None)
            scored_inside = scored_inside or bool(adapts and SCORES_INSIDE.search(line))
            if "train_time" in line and (found := WORD.search(line)):
                read_step(log, line, int((re.search(r"step:\s*(\d+)", line) or [0, 0])[1]))
            if CALIBRATES.search(line):
                read_calibration(log, line)
            if not RUNNING.search(line):
                log.other_bpb |= {f"{line.split()[0].strip(':')} {k}": v
                                  for k, v in OTHER_BPB.findall(line)}
        read_fields(log, line)
    finish(log)


def finish(log):
    """What follows from the whole run."""
    for name in ("seed", "world_size", "vocab_size"):
        said = log.settings.get(name.upper(), "")
        if said.isdigit() and getattr(log, name) is None:
            setattr(log, name, int(said))
    batch = log.settings.get("TRAIN_BATCH_TOKENS", "")
    log.tokens_per_step = log.tokens_per_step or (int(batch) if batch.isdigit() else 0)
    if log.seed is log.named_seed is None:  # train_s42.log, train_log_42.txt
        log.named_seed = seed_in(log.path.stem, r"[_-]s?")
    if log.timed_train is not None:  # everything that read training data is in it
        log.train_seconds = max(log.timed_train, log.train_seconds or 0)
        log.calibration = log.calibration_seconds = None
    if not log.step_seconds and log.steps and log.train_seconds:
        log.step_seconds = log.train_seconds / log.steps
    if log.code_bytes is None and None not in (log.model_bytes, log.total_bytes):
        if 0 < log.total_bytes - log.model_bytes < 1_000_000:
            log.code_bytes = log.total_bytes - log.model_bytes


def read_logs(path, name=None):
    """[Log] of the runs in a file, at least one. Raises OSError."""
    path = Path(path)
    source, lines = without_source(path.read_bytes())
    runs, logs = split_runs(lines), []
    for i, run in enumerate(runs):
        called = (name or path.name) + (f" (run {i + 1} of {len(runs)})" if len(runs) > 1 else "")
        log = Log(path, called, source, "\n".join(run), named_seed=seed_in(path.name))
        read_run(log, run)
        logs.append(log)
    return logs


# -- pictures --------------------------------------------------------------------------------------

def subplots(down=1, across=1, size=(8, 4.5), **options):
    """(figure, axes), to be saved as a file: needs no display, and nothing keeps it open."""
    from matplotlib.figure import Figure
    figure = Figure(size, layout="constrained")
    return figure, figure.subplots(down, across, **options)


def plot_losses(path, logs, title=None):
    """Training and validation loss of {name: log} over steps, as PNG."""
    figure, axes = subplots()
    for i, (name, log) in enumerate(logs.items()):
        kinds = ((log.curve, "-", "training"), (log.validation, "o", "validation"))
        for points, form, what in kinds:
            if points:
                axes.plot(*[*zip(*points)][:2], form, color=f"C{i}", ms=4, lw=1,
                          label=f"{name}, {what}")
    axes.set(xlabel="step", ylabel="loss, nats per token", title=title)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
