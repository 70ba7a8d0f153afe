"""Many runs of the training script: sweep settings, put results in a table, plot them.

    python records/runs.py sweep --grid "MATRIX_LR=0.02,0.025,0.03 QK_GAIN_INIT=1.5,4" --seeds 3 \\
        --out runs/lr -- torchrun --standalone --nproc_per_node=8 train_gpt.py
    python records/runs.py sweep --grid "MATRIX_LR=0.01..0.1:log TTT_EPOCHS=1..4" --study 30 \\
        --gpus 0,1,2,3 --out runs/study -- python train_gpt.py
    python records/runs.py table runs/lr runs/study --markdown table.md
    python records/runs.py plot runs/lr --out runs/lr/plots
    python records/runs.py table path/to/published_folder runs/lr
    python records/runs.py plot path/to/published_folder runs/lr --out plots

`table` and `plot` read result files and text logs, ours and published ones (records/logs.py). A run
that its settings do not tell apart is named by its preset, else its RUN_ID, else its folder. A
sweep sets the script's environment variables. It checks every point before the first run, skips
finished runs, and goes on after a kill when it is given the same command again.
"""
from __future__ import annotations

import argparse
import collections
import contextlib
import csv
import ctypes
import fcntl
import hashlib
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "records"), str(ROOT / "data")]
from folder import markdown_table, mean_std, number  # noqa: E402
from logs import DIAGNOSTIC, NOT_OF_THE_MODEL, read_logs, subplots  # noqa: E402
from shards import DataError as UserError  # noqa: E402
from shards import atomic_write, exit_code_of, read_json, write_whole  # noqa: E402

FIRST_SEEDS = (1337, 42, 2025)
RECORD_BYTES = 16_000_000
PLACE = ("run_id", "out_dir", "scores_path")  # they name a run and its place, not what it computes
# Folders without results: the script as it ran, runs of other code, states of training.
ASIDE = ("code", "earlier", "checkpoints")


# -- results ---------------------------------------------------------------------------------------

NUMBERS = ("steps", "train_seconds", "eval_seconds", "code_bytes", "model_bytes", "total_bytes")


def read_result(path):
    """A run's result (dict) from its JSON file. Raises UserError on a damaged or foreign one."""
    result = read_json(path, "a result of the training script")
    kinds = dict(settings=dict, val_bpb=dict, code_sha256=str)
    lacking = [k for k, kind in kinds.items() if not isinstance(result.get(k), kind)]
    lacking += [k for k in NUMBERS if number(result.get(k)) is None]
    if lacking or not result["val_bpb"] or None in map(number, result["val_bpb"].values()):
        raise UserError(f"{path}: no result of the training script (bad or missing: "
                        f"{', '.join(lacking[:3] or ['val_bpb'])})")
    return result


def bpb_by_kind(result):
    """{float, quantized, sliding, …: bpb} as measured; the file's key of quantized has the bits."""
    return {"quantized" if kind.startswith("int") else kind: bpb
            for kind, bpb in result["val_bpb"].items()}


def computed_by(settings):
    """Settings without those of PLACE: two results that are equal here are of the same settings."""
    return {k: v for k, v in settings.items() if k not in PLACE}


def found(inputs, patterns):
    """The files in `inputs` and, by these patterns, in its folders, each once. Raises UserError."""
    paths = {}
    for given in map(Path, inputs):
        if not given.exists():
            raise UserError(f"{given}: no such file or folder")
        inside = (p for pattern in patterns for p in sorted(given.rglob(pattern)))
        for path in [given] if given.is_file() else inside:
            if not any(part in ASIDE or part[0] == "." for part in path.relative_to(given).parts):
                paths.setdefault(path.resolve(), path)
    return list(paths.values())


def runs_in(inputs):
    """Result files and logs in `inputs`, without the logs of earlier attempts. Raises UserError."""
    return [path for path in found(inputs, ["*.json", "*.log", "*.txt"])
            if is_result(path) and not is_older_log(path)]


def is_result(path):
    """Whether a file may be a result or a log: published folders hold other texts too."""
    if path.suffix == ".txt" and path.parent.name != "logs":
        return any(log.curve for log in read_logs(path))
    return path.name != "submission.json"


def is_older_log(path):
    """Whether the script kept this log or result of an earlier attempt, as NAME.1.txt beside
    NAME.txt. It then says RUN_ID=NAME, where that of a run of its own may be NAME.1."""
    name = re.sub(r"\.\d+\.(txt|json)$", "", path.name)
    if name == path.name or not (path.is_file() and path.with_name(f"{name}.txt").exists()):
        return False
    said = rf'^(setting RUN_ID=| *"run_id": "){re.escape(path.stem)}("|\s|$)'
    return not re.search(said, path.read_text(encoding="utf-8", errors="replace"), re.M)


def read_all(paths, read):
    """read(path) of all of them; what is damaged or foreign is named on stderr and left out."""
    for path in paths:
        try:
            yield path, read(path)
        except (UserError, OSError) as problem:
            print(f"skipped: {problem}", file=sys.stderr)


# -- sweep: the grid -------------------------------------------------------------------------------

@dataclass(frozen=True)
class Range:
    """All values from `low` to `high`, which only a study can choose from."""
    low: str
    high: str
    log: bool


NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


def parse_values(text):
    """"0.02,0.03" → list of texts ("9,10|10" where values hold commas); "0.01..0.1:log" → Range."""
    between = re.fullmatch(rf"({NUMBER})\.\.({NUMBER})(:log)?", text)
    if not between:
        return text.split("|" if "|" in text else ",")
    low, high, log = between.groups()
    if not float(low) < float(high) or log and float(low) <= 0:
        raise ValueError(f"{text} must rise{', from above 0' if log else ''}")
    return Range(low, high, bool(log))


def parse_grid(text):
    """{NAME: texts or Range} of "NAME=v,v NAME=low..high". Raises UserError with all problems."""
    grid, problems = {}, []
    try:
        words = shlex.split(text)
    except ValueError as problem:
        raise UserError(f"--grid {text}: {problem}") from problem
    for word in words:
        name, equals, values = word.partition("=")
        if not equals or not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
            problems.append(f"{word}: write NAME=value,value, the name of a setting in capitals")
        elif name.lower() in ("seed", *PLACE):
            problems.append(f"{name}: belongs to the sweep (--seeds, --out)")
        elif name in grid:
            problems.append(f"{name}: given twice")
        else:
            try:
                grid[name] = parse_values(values)
            except ValueError as problem:
                problems.append(f"{name}={problem}")
    if problems:
        raise UserError("--grid:\n" + "\n".join(f"  {p}" for p in problems))
    return grid


def parse_seeds(text):
    """Seeds of "3" (the first of 1337, 42, 2025, 2026, …) or "7,8" or "7,". Raises UserError."""
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers or len(set(numbers)) < len(numbers) or min(numbers) < 0:
        raise UserError(f"--seeds {text}: give how many (3), or different seeds with commas (7,8)")
    if "," in text:
        return numbers
    if not 1 <= numbers[0] <= 20:
        raise UserError(f"--seeds {text}: 1 to 20; the one seed {text} is written --seeds {text},")
    return [*FIRST_SEEDS, *range(FIRST_SEEDS[-1] + 1, FIRST_SEEDS[-1] + 20)][: numbers[0]]


@dataclass
class Run:
    """One run of a sweep."""
    point: dict  # {NAME: text}
    seed: int
    out: Path
    settings: dict | None = None  # those of its result, once the script has checked them
    trial: object = None

    @property
    def name(self):
        """The point; where a file name cannot hold it, with replacements and a hash."""
        told = "_".join([*(f"{k}={v}" for k, v in self.point.items()), f"SEED={self.seed}"])
        name = re.sub(r"[^\w.=,+-]", "-", told)[:150]
        return name if name == told else f"{name}_{hashlib.sha256(told.encode()).hexdigest()[:8]}"

    @property
    def folder(self):
        return self.out / self.name

    def environment(self):
        """This process's environment with the variables of the run."""
        own = {**self.point, "SEED": str(self.seed), "RUN_ID": self.name,
               "OUT_DIR": str(self.folder), "RESUME": "auto"}
        if os.environ.get("SCORES_PATH"):
            own["SCORES_PATH"] = str(self.folder / "scores.npy")
        return {**os.environ, **own}


# -- sweep: the script -----------------------------------------------------------------------------

# Runs in a process of its own, so that this one needs no torch. It answers first with the names of
# all settings, then to each environment (a line of JSON) after a --dry-run and a look at the data.
CHECKER = """
import contextlib, dataclasses, importlib.util, io, json, sys
requests, answers, said = sys.stdin, sys.stdout, io.StringIO()

def answer(**what):
    print(json.dumps(what), file=answers, flush=True)

with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
    try:
        spec = importlib.util.spec_from_file_location("checked_script", sys.argv[1])
        script = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        names = [f.name.upper() for f in dataclasses.fields(script.Settings)]
        answer(known=[*names, *script.ALIASES])
    except Exception as problem:
        answer(refused=f"{type(problem).__name__}: {problem}")
        sys.exit()
    whole = set()
    for line in requests:
        said.seek(said.truncate(0))
        environ, settings = json.loads(line), None
        try:
            if script.main(["--dry-run"], environ) == 0:
                artifact = environ.get("EVAL_ONLY", "").strip()
                s, _ = (script.settings_of_artifact(artifact, environ) if artifact
                        else script.resolve_settings(environ))
                data = (s.data_path, s.tokenizer_path, s.vocab_size, s.train_seq_len,
                        s.eval_seq_len)
                if data not in whole:
                    artifact or script.shard_paths(s, "train")
                    script.load_validation(s), script.ByteTable(s)
                    whole.add(data)
                settings = dataclasses.asdict(s)
        except script.UserError as problem:
            print(f"error: {problem}")
        answer(settings=settings, refused=said.getvalue())
"""


class Script:
    """The training script of a sweep: a copy that no edit reaches, its command, its check."""

    def __init__(self, command, out):
        """Raises UserError where `command` starts nothing, or no script that can be checked."""
        place = next((i for i, word in enumerate(command)
                      if word.endswith(".py") and Path(word).is_file()), None)
        if place is None or not shutil.which(command[0]):
            lacks = "names no script.py that exists" if place is None else "no such program"
            raise UserError(f"{shlex.join(command)}: {lacks}; after --, write what starts one run, "
                            "such as: torchrun --standalone --nproc_per_node=8 train_gpt.py")
        source = Path(command[place])
        content = source.read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.path = out / "code" / self.sha256[:12] / source.name
        if not self.path.exists():
            write_whole(self.path, content)
        self.command = [*command[:place], str(self.path), *command[place + 1:]]
        ranks = re.search(r" --nproc[-_]per[-_]node[= ](\d+)", " " + " ".join(command[:place]))
        self.ranks = int(ranks[1]) if ranks else 1
        self.checker = subprocess.Popen([sys.executable, "-c", CHECKER, str(self.path)],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        start_new_session=True)
        first = self._answer()
        if "refused" in first:
            self.close()
            raise UserError(f"{source}: cannot be checked as a training script of this project: "
                            f"{first['refused']}")
        self.known = first["known"]

    def _answer(self):
        line = self.checker.stdout.readline()
        if not line:
            raise UserError(f"{self.path}: the process that checks settings ended; "
                            f"python {self.path} --dry-run shows why")
        return json.loads(line)

    def close(self):
        """End the checking process."""
        self.checker.stdin.close()
        self.checker.wait()
        self.checker.stdout.close()

    def check(self, runs):
        """Fill in the settings of each run. Returns {what the script refuses: [runs with it]}."""
        refused = collections.defaultdict(list)
        rank = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(self.ranks)) if self.ranks > 1 else {}
        for run in runs:
            print(json.dumps({**run.environment(), **rank}), file=self.checker.stdin, flush=True)
            answer = self._answer()
            run.settings = answer["settings"]
            if run.settings is None:
                refused[answer["refused"].strip().removeprefix("error: ")].append(run)
        return refused

    def result_of(self, run):
        """The result of a finished run of these settings and this code, or None."""
        path = run.folder / "logs" / f"{run.name}.json"
        try:
            result = read_result(path)
        except UserError:
            return None
        same = (result["code_sha256"] == self.sha256
                and computed_by(result["settings"]) == computed_by(run.settings))
        artifact = run.settings.get("eval_only")
        newer = artifact and Path(artifact).stat().st_mtime > path.stat().st_mtime
        return result if same and not newer else None

    def make_place(self, run):
        """An empty folder, or that of an unfinished attempt; other runs' is moved to earlier/."""
        plan = json.dumps(dict(code_sha256=self.sha256, settings=computed_by(run.settings),
                               command=self.command), indent=1).encode()
        note = run.folder / "run.plan"
        if run.folder.exists() and not (note.exists() and note.read_bytes() == plan):
            numbered = (run.out / "earlier" / f"{run.name}.{i}" for i in itertools.count(1))
            place = next(p for p in numbered if not p.exists())
            place.parent.mkdir(exist_ok=True)
            run.folder.rename(place)
        write_whole(note, plan)


def refusal(refused, count):
    """What the script's own check refused, as one message."""
    return "\n".join(f"{message}\n    ({'all' if len(runs) == count else len(runs)} of {count} "
                     f"runs, such as {runs[0].name})" for message, runs in refused.items())


def check_grid(grid, script, runs):
    """Check all runs before any is started. Raises UserError: what is unknown, what is refused."""
    problems = []
    if unknown := [name for name in grid if name not in script.known]:
        problems.append(f"--grid: no such setting: {', '.join(unknown)}; "
                        f"python {script.path.name} --help lists all")
    if refused := script.check(runs):
        problems.append(refusal(refused, len(runs)))
    if problems:
        raise UserError("\n".join(problems))


def check_different(runs):
    """Two points of the same settings are a misunderstanding that costs a run. Raises UserError."""
    seen = {}
    for run in runs:
        other = seen.setdefault(json.dumps(computed_by(run.settings), sort_keys=True), run)
        if other is not run:
            raise UserError(f"--grid: {other.name} and {run.name} are the same run: drop one")


def tuning_warning(run, what):
    """Say that validation tokens are not for tuning, where the official ones would be used."""
    if "fineweb10B" in run.settings["data_path"]:
        print(f"warning: DATA_PATH={run.settings['data_path']} looks like the challenge's "
              f"validation tokens; a record's settings may not be tuned on them. For {what} use a "
              "folder whose fineweb_val_*.bin is held-out training text "
              "(python records/runs.py sweep --help shows how).", file=sys.stderr)


# -- sweep: where runs come from -------------------------------------------------------------------

class Grid:
    """All combinations, with the first seed, then the next: an early end leaves a whole grid."""

    def __init__(self, grid, seeds, out, script):
        if ranges := [name for name, values in grid.items() if isinstance(values, Range)]:
            raise UserError(f"--grid: {', '.join(ranges)}: a range needs --study N to choose from "
                            "it; or list the values")
        points = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
        self.runs = collections.deque(Run(point, seed, out) for seed in seeds for point in points)
        self.total, self.before = len(self.runs), 0
        check_grid(grid, script, self.runs)
        check_different(self.runs)
        if len(points) > 1:
            tuning_warning(self.runs[0], "choosing among points")

    def next(self):
        """The next run, or None."""
        return self.runs.popleft() if self.runs else None

    def finished(self, run, result):
        """Told of every run; `result` is None where it failed."""


class Study:
    """Optuna's choice of points. OUT/study.db keeps the trials; those that a kill cut off go on."""

    def __init__(self, grid, seeds, out, script, trials, objective):
        self.seeds, self.out, self.script, self.objective = seeds, out, script, objective
        self.queue, self.values = collections.deque(), {}
        self.wanted, self.total = trials, trials * len(seeds)
        corners = self._check(grid)
        settings = corners[0].settings
        self._check_objective(settings)
        import optuna
        self.distributions = {name: self._distribution(optuna, name, values, settings)
                              for name, values in grid.items()}
        tuning_warning(corners[0], "--study")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.states = optuna.trial.TrialState
        storage = f"sqlite:///{(out / 'study.db').resolve()}"
        known = optuna.create_study(storage=storage, study_name="sweep", load_if_exists=True).trials
        sampler = optuna.samplers.TPESampler(seed=len(known), constant_liar=True)
        self.study = optuna.load_study(storage=storage, study_name="sweep", sampler=sampler)
        self._check_same(grid, settings)
        self.cut_off = [t for t in known if t.state == self.states.RUNNING]
        self.begun = sum(t.state == self.states.COMPLETE for t in known)
        self.before = self.begun * len(seeds)  # runs of earlier calls, which next() leaves out

    def _check(self, grid):
        """Runs with each end and value, beside the others' first values. Raises UserError."""
        if not grid:
            raise UserError("--study: an empty --grid leaves nothing to choose")
        ends = {name: [v.low, v.high] if isinstance(v, Range) else v for name, v in grid.items()}
        first = {name: values[0] for name, values in ends.items()}
        corners = [Run({**first, name: value}, self.seeds[0], self.out)
                   for name, values in ends.items() for value in values]
        check_grid(grid, self.script, corners)
        return corners

    @staticmethod
    def _distribution(optuna, name, values, settings):
        kinds = optuna.distributions
        if not isinstance(values, Range):
            return kinds.CategoricalDistribution(values)
        whole = isinstance(settings.get(name.lower()), int)
        kind, of = (kinds.IntDistribution, int) if whole else (kinds.FloatDistribution, float)
        return kind(of(values.low), of(values.high), log=values.log)

    def _check_objective(self, settings):
        """A score that these runs will not have would be found missing only after the first."""
        banded, full = settings.get("eval_attention") == "banded", settings["eval_stride"]
        off = {"float": settings["eval_only"], "sliding": banded or not full,
               "banded": not banded or not full, "ttt": not settings["ttt_enabled"]}
        if off.get(self.objective):
            raise UserError(f"--objective {self.objective}: these settings do not evaluate that")

    def _check_same(self, grid, settings):
        """A study goes on with what it was begun with. Raises UserError that names the changes."""
        fixed = {k: v for k, v in computed_by(settings).items()
                 if k.upper() not in grid and k != "seed"}
        told = {f"--grid {name}": f"{v.low}..{v.high}{':log' * v.log}" if isinstance(v, Range)
                else v for name, v in grid.items()}
        now = {**told, "--seeds": self.seeds, "--objective": self.objective,
               "code": self.script.sha256, **fixed}
        begun = self.study.user_attrs.get("begun with", now)
        changed = [f"{k}: {begun.get(k)} → {now.get(k)}" for k in {**begun, **now}
                   if begun.get(k) != now.get(k)]
        if changed:
            raise UserError(f"{self.out}: holds a study that was begun otherwise; undo this, "
                            "or take another --out:\n  " + "\n  ".join(changed))
        self.study.set_user_attr("begun with", now)

    def next(self):
        """The next run, or None: of a trial that was cut off, else of a new one."""
        while not self.queue and (self.cut_off or self.begun < self.wanted):
            self.begun += 1
            trial = self.cut_off.pop(0) if self.cut_off else self.study.ask(self.distributions)
            if trial.params.keys() != self.distributions.keys():  # killed while it was asked for
                self.study.tell(trial.number, state=self.states.FAIL)
                self.begun -= 1
                continue
            point = {name: as_setting(value) for name, value in trial.params.items()}
            runs = [Run(point, seed, self.out, trial=trial.number) for seed in self.seeds]
            if refused := self.script.check(runs):
                tqdm.write(refusal(refused, len(runs)), file=sys.stderr)
                self.study.tell(trial.number, state=self.states.FAIL)
            else:
                self.queue.extend(runs)
        return self.queue.popleft() if self.queue else None

    def finished(self, run, result):
        """Tell Optuna when all seeds of a trial are there; one that failed ends its trial."""
        bpb = bpb_by_kind(result) if result else {}
        if self.objective != "last" and result and self.objective not in bpb:
            tqdm.write(f"{run.name}: has no {self.objective} score", file=sys.stderr)
            bpb = {}
        if not bpb:
            self.queue = collections.deque(r for r in self.queue if r.trial != run.trial)
            if self.values.pop(run.trial, {}) is not None:
                self.study.tell(run.trial, state=self.states.FAIL)
            self.values[run.trial] = None
        elif (values := self.values.setdefault(run.trial, {})) is not None:
            last = list(bpb.values())[-1]
            values[run.seed] = last if self.objective == "last" else bpb[self.objective]
            if len(values) == len(self.seeds):
                self.study.tell(run.trial, float(np.mean(list(values.values()))))

    def summary(self):
        """The best trial in words."""
        if not any(t.state == self.states.COMPLETE for t in self.study.trials):
            return "study: no trial was finished"
        best = self.study.best_trial
        point = " ".join(f"{k}={as_setting(v)}" for k, v in best.params.items())
        return f"study: best {self.objective} bpb {best.value:.4f}, trial {best.number}: {point}"


def as_setting(value):
    """A value that a study drew as the text of a variable; whole numbers with all digits."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# -- sweep: the runs themselves --------------------------------------------------------------------

GRACE_SECONDS = 40  # torchrun gives its workers 30 to end
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with_parent():
    """In a child, before it becomes the run: SIGTERM when the sweep dies, kill -9 included."""
    if LIBC:
        LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def only_sweep_in(out):
    """Hold `out` for this sweep and its runs, which inherit the lock and may outlive the sweep."""
    with open(out / ".lock", "a+") as file:
        for attempt in range(GRACE_SECONDS + 20):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == 0:
                    file.seek(0)
                    at_work = file.read().strip() or "?"
                    busy = (f"{out}: in use by another sweep or by runs that one left behind "
                            f"(process {at_work})")
                    print(f"{busy}; waiting for a minute", file=sys.stderr)
                time.sleep(1)
        else:
            raise UserError(f"{busy}; wait for them or end them, or take another --out")
        yield file


class Slots:
    """Places where runs go on at the same time: GPUs, or plain ones."""

    def __init__(self, script, lock, gpus, jobs):
        self.script, self.lock, self.running = script, lock, {}  # {slot: (run, process, start)}
        self.slots = list(gpus) or list(range(jobs))
        self.extra = {slot: {"CUDA_VISIBLE_DEVICES": slot} if gpus else {} for slot in self.slots}
        if len(self.slots) > 1 and not os.environ.get("OMP_NUM_THREADS"):  # they share the cores
            for variables in self.extra.values():
                variables["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // len(self.slots)))

    def free(self):
        return [slot for slot in self.slots if slot not in self.running]

    def busy_with(self, run):
        return any(other.folder == run.folder for other, _, _ in self.running.values())

    def start(self, run):
        slot = self.free()[0]
        self.script.make_place(run)
        with open(run.folder / "console.out", "ab") as console:
            process = subprocess.Popen(
                self.script.command, env={**run.environment(), **self.extra[slot]},
                stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT,
                start_new_session=True, preexec_fn=end_with_parent, pass_fds=[self.lock.fileno()])
        self.running[slot] = run, process, time.monotonic()
        self.lock.truncate(0)
        print(os.getpid(), *(p.pid for _, p, _ in self.running.values()), sep=", ", file=self.lock,
              flush=True)

    def ended(self):
        """The runs that ended since the last call: (run, exit status, seconds)."""
        for slot, (run, process, start) in list(self.running.items()):
            if process.poll() is not None:
                del self.running[slot]
                yield run, process.returncode, time.monotonic() - start

    def end_all(self, at_once):
        """SIGTERM to all, SIGKILL to what does not end in time or when at_once() becomes true."""
        processes = [process for _, process, _ in self.running.values()]
        deadline, kind = time.monotonic() + GRACE_SECONDS, signal.SIGTERM
        while any(process.poll() is None for process in processes):
            if at_once() or time.monotonic() > deadline:
                kind = signal.SIGKILL
            for process in processes if kind else ():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, kind)
            kind = None
            time.sleep(0.05)


def why_it_failed(run, status):
    """The run's own words, from the end of what it printed."""
    path = run.folder / "console.out"
    printed = path.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in printed.splitlines() if line.strip()]
    errors = [i for i, line in enumerate(lines) if re.match(r"error\b", line)]
    words = lines[errors[-1]: errors[-1] + 4] if errors else lines[-3:]
    ending = (f"ended by signal {-status}" if status < 0 else
              f"ended with status {status}" if status else "left no whole result")
    return "\n    ".join([f"failed: {run.name}: {ending}; all it said is in {path}", *words])


class Sweep:
    """Takes runs from a source, keeps the slots busy with them, counts what became of them."""

    def __init__(self, source, script, slots, budget_hours):
        self.source, self.script, self.slots = source, script, slots
        self.deadline = time.monotonic() + 3600 * budget_hours if budget_hours else math.inf
        self.seconds = []  # of the finished runs
        self.failed = self.done = self.interrupts = 0
        self.waiting, self.over = None, False  # over: the budget is spent

    def expected_seconds(self, run):
        """The mean of finished runs; before there is one, the cap of its training."""
        cap = run.settings.get("max_wallclock_seconds", 0)
        return float(np.mean(self.seconds)) if self.seconds else cap

    def go(self):
        """Until nothing is left, the budget is spent, or a signal comes."""
        # Noted, not raised: an exception between the start of a run and the note of it loses it.
        before = {kind: signal.signal(kind, self._interrupt)
                  for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            # Trials may fail before their last seed: the bar's total is then not reached.
            with tqdm(total=self.source.total, unit="run", disable=None) as self.bar:
                while not self.interrupts:
                    self._fill()
                    if not self.slots.running:
                        break
                    time.sleep(0.1)
                    for run, status, seconds in self.slots.ended():
                        self._take(run, status, seconds)
                    self._show()
            if self.interrupts and self.slots.running:
                print("ending the runs; once more ends them at once", file=sys.stderr)
        finally:
            self.slots.end_all(lambda: self.interrupts > 1)
            for kind, handler in before.items():
                signal.signal(kind, handler)

    def _interrupt(self, *_):
        self.interrupts += 1

    def _fill(self):
        while self.slots.free() and not self.over and not self.interrupts:
            run = self.waiting = self.waiting or self.source.next()
            if run is None or self.slots.busy_with(run):  # a study may choose a point twice
                return
            if result := self.script.result_of(run):
                kinds = ("train_seconds", "pack_seconds", "eval_seconds")
                self.seconds.append(sum(result.get(kind, 0) for kind in kinds))
                if not self.bar.disable:
                    self.bar.initial += 1  # took no time: the bar's forecast leaves it out
                self._count(run, result)
            elif time.monotonic() + self.expected_seconds(run) <= self.deadline:
                self.slots.start(run)
            else:
                self.over = True
                return
            self.waiting = None

    def _take(self, run, status, seconds):
        result = self.script.result_of(run) if status == 0 else None
        if result:
            self.seconds.append(seconds)
            scores = "  ".join(f"{kind} {bpb:.4f}" for kind, bpb in bpb_by_kind(result).items())
            tqdm.write(f"{run.name}: {scores}  ({seconds:.0f} s)")
        else:
            self.failed += 1
            tqdm.write(why_it_failed(run, status), file=sys.stderr)
        self._count(run, result)

    def _count(self, run, result):
        self.done += result is not None
        self.bar.update(1)
        self.source.finished(run, result)

    def _show(self):
        """The last line of the oldest run, beside the bar."""
        if self.bar.disable or not self.slots.running:
            return
        run = next(iter(self.slots.running.values()))[0]
        with open(run.folder / "console.out", "rb") as console:
            console.seek(max(0, os.fstat(console.fileno()).st_size - 300))
            lines = console.read().decode("utf-8", "replace").split("\n")
        last = next((line.strip()[:60] for line in reversed(lines) if line.strip()), "")
        self.bar.set_postfix_str(last, refresh=False)
        self.bar.refresh()


def sweep(arguments, command):
    """Exit status: 0 all done or the budget spent, 1 a run failed, 130 interrupted."""
    grid, seeds, out = parse_grid(arguments.grid), parse_seeds(arguments.seeds), Path(arguments.out)
    gpus = [gpu.strip() for gpu in arguments.gpus.split(",") if gpu.strip()]
    command = command or [sys.executable, str(ROOT / "train_gpt.py")]
    if len(set(gpus)) < len(gpus) or (gpus and arguments.jobs > 1) or arguments.jobs < 1:
        raise UserError(f"--gpus {arguments.gpus} --jobs {arguments.jobs}: give different GPUs, or "
                        "a number of jobs")
    if arguments.study < 0 or arguments.budget_hours < 0:
        raise UserError(f"--study {arguments.study} --budget-hours {arguments.budget_hours}: must "
                        "not be negative")
    tqdm.monitor_interval = 0  # no thread of its own: this process forks
    out.mkdir(parents=True, exist_ok=True)
    again = "the same command goes on from here"
    with only_sweep_in(out) as lock, contextlib.closing(Script(command, out)) as script:
        if gpus and script.ranks > 1:
            raise UserError("--gpus gives each run one GPU, "
                            f"and {shlex.join(command)} wants {script.ranks}: drop one of them")
        source = (Study(grid, seeds, out, script, arguments.study, arguments.objective)
                  if arguments.study else Grid(grid, seeds, out, script))
        slots = Slots(script, lock, gpus, arguments.jobs)
        running = Sweep(source, script, slots, arguments.budget_hours)
        running.go()
    done = running.done + source.before
    finished = f"{done} of {source.total} runs are finished"
    if running.interrupts:
        print(f"stopped: {finished}; {again}", file=sys.stderr)
        return 130
    if done:
        print(as_text(table_rows([path for path in found([out], ["logs/*.json"])
                                  if not is_older_log(path)])))
    if arguments.study:
        print(source.summary())
    if running.over:
        seconds = running.expected_seconds(running.waiting)
        print(f"--budget-hours {arguments.budget_hours:g}: {finished}; another one, of about "
              f"{seconds:.0f} s, would end too late; {again}")
    if running.failed:
        plural = "s" * (running.failed > 1)
        print(f"{running.failed} run{plural} failed; {again} and repeats them", file=sys.stderr)
    return 1 if running.failed else 0


# -- table -----------------------------------------------------------------------------------------

def conditions(result):
    """What a result depends on besides its seed: all settings, the code, the machine."""
    settings = {k.upper(): v for k, v in computed_by(result["settings"]).items()
                if k not in ("seed", "resume")}
    of_log = {"run": result["run"]} if "run" in result else {}
    return {**of_log, **settings, "code": result["code_sha256"][:8],
            "gpus": result.get("world_size"), "device": result.get("device")}


def run_name(settings, path, seed):
    """What a person calls a run: its preset, else its RUN_ID, else its folder, without the seed."""
    said = {k.upper(): str(v) for k, v in settings.items() if v not in (None, "")}
    if said.get("PRESET", "none") != "none":
        return said["PRESET"]
    folders = [f.name for f in Path(path).resolve().parents if f.name not in ("logs", "runs")]
    drawn = re.fullmatch(r"[0-9a-f]{8}-[0-9a-f-]{27}", said.get("RUN_ID", ""))
    for name in ([said["RUN_ID"]] if "RUN_ID" in said and not drawn else []) + folders:
        if bare := re.sub(rf"(?i)(?:[_-]?seed[=_-]?|[_-]s?|^){seed}$", "", name):
            return bare
    return Path(path).stem


# The first that the name of an evaluation, without no_ttt, has; weights not of the file come first.
KINDS = ((DIAGNOSTIC.pattern, "float"), ("ttt", "ttt"), ("sliding", "sliding"),
         ("banded", "banded"), ("", "quantized"))


def result_of_log(log):
    """A text log as a result file, None for what it does not say. Raises UserError: no score."""
    if not log.scores:
        raise UserError(f"{log.path}: {log.name} has no final score")
    settings = {k.lower(): v for k, v in log.settings.items() if not NOT_OF_THE_MODEL.match(k)}
    scores = {}
    for key in (*log.scores, log.key):  # the one that counts is the last
        words = re.sub("no_ttt", "", key, flags=re.I)
        kind = next(name for pattern, name in KINDS if re.search(pattern, words, re.I))
        scores.pop(kind, None)
        scores[kind] = log.scores[key].bpb
    whole = log.eval_seconds if log.eval_seconds is not None else log.total_eval_seconds
    return dict(settings={**settings, "seed": log.run_seed},
                run=run_name(log.settings, log.path, log.run_seed), val_bpb=scores,
                code_sha256=log.code_sha256 or "unknown", steps=log.steps,
                train_seconds=log.train_seconds, total_bytes=log.total_bytes,
                eval_seconds=whole if whole is not None else log.score.seconds,
                world_size=log.world_size, device=log.device)


def bare_stem(path, seed):
    """The name of a log without its seed."""
    return run_name({}, Path("/", path.stem, "x"), seed)


def told_apart(results):
    """[(path, result)], runs also named by file where one folder holds several experiments."""
    stems = collections.defaultdict(set)
    for path, result in results:
        if "run" in result:
            stems[result["run"]].add(bare_stem(path, result["settings"]["seed"]))
    for path, result in results:
        if len(stems[result.get("run")]) > 1:
            result["run"] += f"/{bare_stem(path, result['settings']['seed'])}"
    return results


def read_results(path):
    """The results in a result file or a text log. Raises UserError, OSError: there is none."""
    if path.suffix == ".json":
        return [read_result(path)]
    runs = read_logs(path)
    return [result_of_log(log) for log in [run for run in runs if run.scores] or runs]


def is_log_of_result(path, paths):
    """Whether a text log has its result file among the paths, which then says more."""
    beside = {path.with_suffix(".json"),
              path.with_name(path.name.replace("train_seed", "result_seed")).with_suffix(".json")}
    return path.suffix != ".json" and any(other in beside for other in paths)


def differing(several):
    """Names whose values differ between the dicts that have them, in the dicts' order."""
    names = dict.fromkeys(name for one in several for name in one)
    return [name for name in names if len({str(one[name]) for one in several if name in one}) > 1]


def telling(several, most):
    """The differing names; if more than `most`, the first that suffice, such as the preset's."""
    names = differing(several)
    if len(names) <= most:
        return names
    chosen, apart = [], 1
    for name in names:
        now = len({tuple(str(one.get(n)) for n in (*chosen, name)) for one in several})
        if now > apart:
            chosen, apart = [*chosen, name], now
    return chosen


def table_rows(paths):
    """A row per group of runs that differ in the seed alone, the best last score first: {differing
    settings…, seeds, steps, …}, a text or a list of one number per run."""
    groups, places = {}, {}
    read = read_all([p for p in paths if not is_log_of_result(p, paths)], read_results)
    for path, result in told_apart([(path, r) for path, several in read for r in several]):
        key = json.dumps(conditions(result), sort_keys=True)
        group, _ = groups.setdefault(key, []), places.setdefault(key, path)
        if result in group:
            print(f"skipped: {path}: a copy of another of these results", file=sys.stderr)
        else:
            group.append(result)
    names, rows = differing([conditions(g[0]) for g in groups.values()]), []
    kinds = dict.fromkeys(k for group in groups.values() for r in group for k in bpb_by_kind(r))
    for key, group in groups.items():
        known, settings = conditions(group[0]), group[0]["settings"]
        row = {name: str(known.get(name, "")) for name in names}
        for column in ("PRESET", "run"):
            if row.get(column) == "":
                row[column] = run_name(settings, places[key], settings.get("seed"))
        row["seeds"] = " ".join(str(r["settings"].get("seed")) for r in group)
        for column in ("steps", "train_seconds", "eval_seconds", "total_bytes"):
            row[column] = [r[column] for r in group if r[column] is not None]
        row["percent_of_cap"] = [100 * size / RECORD_BYTES for size in row["total_bytes"]]
        for kind in kinds:
            row[f"{kind}_bpb"] = [bpb_by_kind(r)[kind] for r in group if kind in bpb_by_kind(r)]
        row["last_bpb"] = [list(r["val_bpb"].values())[-1] for r in group]
        violations = (str(v) for r in group for v in r.get("violations", ["not recorded"]))
        row["violations"] = "; ".join(dict.fromkeys(violations))
        rows.append(row)
    return sorted(rows, key=lambda row: np.mean(row["last_bpb"]))


def settings_in(row):
    """The settings of a row of the table: all that stands before the seeds."""
    return dict(itertools.takewhile(lambda item: item[0] != "seeds", row.items()))


def sorted_by(rows, key):
    """Rows in rising order of a column, falling with a minus before its name. Raises UserError."""
    name = key.removeprefix("-")
    if rows and name not in rows[0]:
        raise UserError(f"--sort {key}: no such column; there are {', '.join(rows[0])}")

    def place(row):
        try:
            return 0, float(row[name] if isinstance(row[name], str)
                            else np.mean(row[name] or [math.inf])), ""
        except ValueError:
            return 1, 0.0, row[name]

    return sorted(rows, key=place, reverse=key.startswith("-"))


def cell(name, value):
    """A table's text: mean over seeds, for scores with the deviation; for bytes the largest."""
    if isinstance(value, str):
        return value
    if not value:
        return "off" if name.endswith("_bpb") else "not said"
    if name in ("total_bytes", "percent_of_cap"):
        return f"{max(value):,}" if name == "total_bytes" else f"{max(value):.2f}"
    mean, std = mean_std(value)
    if name.endswith("_bpb"):
        return f"{mean:.4f}" + ("" if std is None else f" ± {std:.4f}")
    return f"{mean:,.0f}" if name == "steps" or mean >= 100 else f"{mean:.1f}"


def cells(rows):
    """(headings, rows of texts, notes below), without columns that are the same for all."""
    hidden, notes, settings = {"last_bpb"}, [], [settings_in(row) for row in rows]
    if implied := settings[0].keys() - telling(settings, 8):
        hidden |= implied
        notes.append(f"{len(implied)} more settings differ: --csv has them all")
    if len({row["violations"] for row in rows}) == 1:
        hidden.add("violations")
        if rows[0]["violations"]:
            notes.append(f"violations, of every run: {rows[0]['violations']}")
    names = [name for name in rows[0] if name not in hidden]
    headings = [n.replace("_", " ") if n.islower() else n for n in names]
    return headings, [[cell(n, row[n]) for n in names] for row in rows], notes


def as_text(rows):
    """Columns aligned with spaces."""
    if not rows:
        return "no results"
    headings, texts, notes = cells(rows)
    widths = [max(map(len, column)) for column in zip(headings, *texts)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip()
             for line in [headings, *texts]]
    return "\n".join([*lines, *notes])


def as_markdown(rows):
    headings, texts, notes = cells(rows)
    return "\n\n".join([markdown_table(headings, texts), *notes]) + "\n"


def as_csv(rows):
    """All digits: mean (for bytes the largest) of every column, and the deviation of scores."""
    lines = []
    for row in rows:
        lines.append(line := {})
        for name, value in row.items():
            mean, std = ("", "") if isinstance(value, str) or not value else mean_std(value)
            largest = mean != "" and name in ("total_bytes", "percent_of_cap")
            line[name] = value if isinstance(value, str) else max(value) if largest else mean
            if name.endswith("_bpb"):
                line[f"{name}_std"] = std
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def table(arguments, _):
    """Print and write the table. Raises UserError where there is no result at all."""
    rows = table_rows(runs_in(arguments.inputs))
    if not rows:
        raise UserError(f"{' '.join(arguments.inputs)}: no results of runs there")
    rows = sorted_by(rows, arguments.sort)
    print(as_text(rows))
    for path, form in ((arguments.csv, as_csv), (arguments.markdown, as_markdown)):
        if path:
            write_whole(path, form(rows).encode())
    return 0


# -- plot ------------------------------------------------------------------------------------------

def read_curves(path):
    """[Log] with array `curve` [points, 4]: step, loss, milliseconds, rate. Raises UserError."""
    logs = [log for log in read_logs(path) if log.curve]
    if not logs:
        raise UserError(f"{path}: holds no lines step:S/N train_loss:… or S/N train_loss: …")
    for log in logs:
        log.curve = np.array(log.curve)
    return logs


def labels_of_logs(logs):
    """Texts for the legend: by settings where all logs name the same settings, else by run."""
    settings = [{k: v for k, v in log.settings.items() if k == "PRESET"
                 or not NOT_OF_THE_MODEL.match(k)} for log in logs]
    names = [run_name(log.settings, log.path, log.run_seed) for log in logs]
    if settings[0] and all(one.keys() == settings[0].keys() for one in settings):
        if any(one.get("PRESET") for one in settings):
            settings = [{**one, "PRESET": one["PRESET"] or name}
                        for one, name in zip(settings, names)]
        return labels_of(settings)
    folders = [run_name({}, log.path, log.run_seed) for log in logs]
    stems = [bare_stem(log.path, log.run_seed) for log in logs]
    for more in (folders, stems):  # what one name has several of, tells them apart
        several = collections.defaultdict(set)
        for name, part in zip(names, more):
            several[name].add(part)
        names = [f"{name}, {part}" if len(several[name]) > 1 else name
                 for name, part in zip(names, more)]
    return names if len(set(names)) > 1 else ["all runs"] * len(logs)


def labels_of(several, between=" "):
    """Texts that tell dicts of settings apart, with … where more than what is said differs."""
    names = telling(several, 4)
    more = ["…"] if len(names) < len(differing(several)) else []
    told = [[f"{name}={str(one[name])[-40:]}" for name in names if name in one] for one in several]
    return [between.join(parts + more) if parts else "all runs" for parts in told]


def colours(count):
    """Ten well told apart colours while they suffice, else a scale."""
    from matplotlib import colormaps
    few, many = colormaps["tab10"], colormaps["turbo"]
    return [few(i) if count <= 10 else many(0.05 + 0.9 * i / (count - 1)) for i in range(count)]


def throughput(log):
    """(steps, tokens per second since the log line before), but for two in one millisecond."""
    step, _, ms, _ = log.curve.T
    rises = np.diff(ms) > 0
    return step[1:][rises], log.tokens_per_step * np.diff(step)[rises] / np.diff(ms)[rises] * 1000


def curve_figure(title, logs, panels):
    """Panels (x label, y label, log → x and y) with a colour per setting and a line per seed."""
    texts = labels_of_logs(logs)
    different = dict.fromkeys(texts)
    shades = dict(zip(different, colours(len(different))))
    fig, axes = subplots(len(panels), size=(9, 3.8 * len(panels) + 1), squeeze=False)
    for axis, (across, upward, xy) in zip(axes[:, 0], panels):
        late = []  # after the first tenth: decides the height, or the fall before would flatten it
        for log, text in zip(logs, texts):
            x, y = xy(log)
            axis.plot(x, y, color=shades[text], lw=1.2, alpha=0.8, label=text,
                      marker="." if len(x) < 50 else None, ms=3)
            late.extend(y[x >= 0.1 * max(x, default=0)])
        if title == "Training loss" and late:
            axis.set_ylim(min(late) - 0.03 * np.ptp(late), max(late) + 0.03 * np.ptp(late) + 1e-3)
        axis.set(xlabel=across, ylabel=upward)
        axis.yaxis.set_major_formatter(lambda y, _: f"{y:,.6g}")
        axis.grid(alpha=0.3)
    axes[0, 0].set_title(title)
    if 1 < len(shades) <= 24:
        handles = dict(zip(*reversed(axes[0, 0].get_legend_handles_labels())))
        fig.legend(handles.values(), handles.keys(), loc="outside lower center", fontsize=8,
                   ncols=2 if len(shades) > 3 else 1)
    return fig


def curves(logs):
    """{file name: figure} of what changes during training."""
    figures = {"loss.png": curve_figure("Training loss", logs, [
        ("step", "nats per token", lambda log: log.curve[:, :2].T),
        ("training time, seconds", "nats per token",
         lambda log: (log.curve[:, 2] / 1000, log.curve[:, 1]))])}
    if scaled := [log for log in logs if np.isfinite(log.curve[:, 3]).any()]:
        figures["lr_scale.png"] = curve_figure("Learning-rate scale", scaled, [
            ("step", "share of the full rate", lambda log: log.curve[:, [0, 3]].T)])
    if timed := [log for log in logs if log.tokens_per_step and len(throughput(log)[0])]:
        figures["throughput.png"] = curve_figure("Throughput between log lines", timed, [
            ("step", "tokens per second", throughput)])
    return figures


def rows_figure(rows, title, across):
    """(figure, axis) with a place for every row of the table, the first on top."""
    labels = labels_of([settings_in(row) for row in rows], "\n")
    height = max(0.6, 0.2 * (1 + labels[0].count("\n")))
    fig, axis = subplots(size=(9, 1.8 + height * len(rows)))
    axis.set_yticks(range(len(rows)), labels, fontsize=8)
    axis.set(title=title, xlabel=across, ylim=(len(rows) - 0.5, -0.5))
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    return fig, axis


def scores(rows):
    """Every bpb of every setting: a point per seed, mean and standard deviation."""
    across = "bits per byte (dots: seeds; diamond and bar: their mean ± standard deviation)"
    fig, axis = rows_figure(rows, "Scores, best last one first", across)
    kinds = [name for name in rows[0] if name.endswith("_bpb") and name != "last_bpb"]
    for i, (kind, shade) in enumerate(zip(kinds, colours(len(kinds)))):
        there = [(y + 0.16 * (i - (len(kinds) - 1) / 2), row[kind]) for y, row in enumerate(rows)
                 if row[kind]]
        means, stds = zip(*(mean_std(values) for _, values in there))
        bars = [std or math.nan for std in stds]
        axis.errorbar(means, [y for y, _ in there], xerr=bars, fmt="D", ms=4, lw=1, c=shade,
                      capsize=2, label=kind.removesuffix("_bpb"))
        points = [(value, y) for y, values in there for value in values]
        axis.plot(*zip(*points), "o", c=shade, ms=4, mec="white", zorder=3)
    fig.legend(loc="outside lower center", ncols=len(kinds), fontsize=8)
    return fig


def score_by_setting(rows):
    """The last bpb against each setting that differs; None where none does."""
    names = telling([settings_in(row) for row in rows], 9)
    if not names:
        return None
    across, down = min(3, len(names)), -(-len(names) // 3)
    fig, axes = subplots(down, across, (4.2 * across, 3.4 * down), squeeze=False, sharey=True)
    for axis, name in itertools.zip_longest(axes.flat, names):
        if name is None:
            axis.axis("off")
            continue
        values = list({row[name] for row in rows})
        numeric = all(re.fullmatch(NUMBER, value) for value in values)
        if numeric and len(values) > 6:  # a study's: on an axis of their own
            place = {value: float(value) for value in values}
            if min(place.values()) > 0 and max(place.values()) >= 10 * min(place.values()):
                axis.set_xscale("log")
        else:  # a grid's: side by side, with the best that each allows
            order = sorted(values, key=float if numeric else str)
            place = {value: i for i, value in enumerate(order)}
            best = [min(np.mean(row["last_bpb"]) for row in rows if row[name] == value)
                    for value in order]
            axis.plot(range(len(order)), best, "-", color="tab:red", lw=1, label="best mean")
            axis.set_xticks(range(len(order)), [v[:24] for v in order], fontsize=8,
                            rotation=30 if len(order) > 4 else 0)
            axis.margins(x=0.1)
            axis.legend(fontsize=8)
        for row in rows:
            axis.plot([place[row[name]]] * len(row["last_bpb"]), row["last_bpb"], "o", ms=4,
                      alpha=0.5, color="tab:blue")
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
    fig.supylabel("last bpb of each run", fontsize=10)
    return fig


def sizes(rows):
    """Bytes of the largest seed against the cap of a record."""
    across = "bytes, code + model of the largest seed (dashed: 16,000,000)"
    fig, axis = rows_figure(rows, "Size", across)
    most = [max(row["total_bytes"], default=0) for row in rows]
    bars = axis.barh(range(len(rows)), most, height=0.6,
                     color=["tab:red" if n > RECORD_BYTES else "tab:blue" for n in most])
    texts = [f"{n:,} ({100 * n / RECORD_BYTES:.2f} %)" for n in most]
    axis.bar_label(bars, texts, padding=4, fontsize=8)
    axis.axvline(RECORD_BYTES, color="black", ls="--", lw=1)
    axis.set_xlim(0, 1.3 * max(RECORD_BYTES, *most))
    axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g} M")
    return fig


def plot(arguments, _):
    """Write the PNGs. Raises UserError where there is nothing to plot."""
    paths = runs_in(arguments.inputs)
    texts = [p for p in paths if p.suffix != ".json"]
    logs = [log for _, several in read_all(texts, read_curves) for log in several]
    finished = {log.path for log in logs if log.scores}
    rows = table_rows([p for p in paths if p.suffix == ".json" or p in finished])
    figures = curves(logs) if logs else {}
    if rows:
        figures |= {"bpb.png": scores(rows), "bytes.png": sizes(rows),
                    "bpb_by_setting.png": score_by_setting(rows)}
    if not figures:
        raise UserError(f"{' '.join(arguments.inputs)}: no logs and no results of runs there")
    for name, figure in figures.items():
        if figure:
            with atomic_write(Path(arguments.out) / name) as file:
                figure.savefig(file, format="png", dpi=130)
            print(Path(arguments.out) / name)
    return 0


# -- main ------------------------------------------------------------------------------------------

SWEEP_HELP = """
Runs all combinations of --grid × --seeds, each in a folder of its own under --out, named after its
point. What starts one run stands after --; it gets the grid's variables, SEED, RUN_ID and OUT_DIR
in its environment, next to those set already. The script is copied into --out first: editing it
changes no run of a sweep that is under way.

Given the same command again, a sweep skips what is finished with the same settings and the same
code, and runs the rest: what failed, and what a kill cut off. Folders of other settings or other
code are moved to OUT/earlier.

--grid "A=1,2 B=x,y" lists values; "A=9,10|8,9" where values hold commas. For --study also ranges:
"A=0.01..0.1", "A=2..8", and "A=0.01..0.1:log" on a log scale.

Tuning on the validation tokens is not allowed for a record. Let the score that you choose by come
from a folder whose validation shard is training text that is held out, for example:

    mkdir data/datasets/tuning && cd data/datasets/tuning
    ln -s ../fineweb10B_sp1024/fineweb_train_0000[0-6]*.bin .
    ln -s ../fineweb10B_sp1024/fineweb_train_000079.bin fineweb_val_000000.bin
    cd - && PRESET=sp1024 DATA_PATH=data/datasets/tuning VAL_LIMIT_TOKENS=4000000 \\
        python records/runs.py sweep …
"""


def build_parser():
    plain, path = argparse.RawDescriptionHelpFormatter, os.path.expanduser
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    commands = parser.add_subparsers(dest="command", required=True)
    usage = "%(prog)s --out FOLDER [--grid …] [--seeds …] [options] -- COMMAND [ARGUMENT …]"
    p = commands.add_parser("sweep", help="run a grid or a study", description=SWEEP_HELP,
                            formatter_class=plain, usage=usage)
    p.add_argument("--grid", default="", help='"NAME=value,value NAME=…"; empty: only the seeds')
    p.add_argument("--seeds", default="1",
                   help="how many of 1337, 42, 2025, …; or the seeds themselves: 7,8 (default 1)")
    p.add_argument("--out", type=path, required=True, help="folder of the runs")
    p.add_argument("--gpus", default="",
                   help="0,1,2: runs at once, each on one of these GPUs (default: one run on all)")
    p.add_argument("--jobs", type=int, default=1, help="so many at once on the CPU (default 1)")
    p.add_argument("--budget-hours", type=float, default=0,
                   help="begin no run that, at the mean time of the finished ones, would end later "
                        "than this from now (0: no limit)")
    p.add_argument("--study", type=int, default=0, metavar="N",
                   help="let Optuna choose N points (0: the whole grid)")
    p.add_argument("--objective", default="last",
                   choices=("last", "float", "quantized", "sliding", "banded", "ttt"),
                   help="score that a study lowers, mean over seeds (default: last evaluation)")
    p.set_defaults(do=sweep)
    p = commands.add_parser(
        "table", help="results side by side",
        description="Results in a table: settings that differ, steps, seconds, bytes, scores (mean "
                    "± standard deviation over seeds), violations of a record's rules.")
    p.add_argument("inputs", type=path, nargs="+", metavar="PATH",
                   help="result files (logs/*.json), text logs, ours or published, or folders")
    p.add_argument("--sort", default="last_bpb", metavar="KEY",
                   help="column to sort by, as in the CSV; --sort=-KEY falls")
    p.add_argument("--csv", type=path, metavar="FILE", help="write it with all digits too")
    p.add_argument("--markdown", type=path, metavar="FILE", help="write it as Markdown too")
    p.set_defaults(do=table)
    p = commands.add_parser(
        "plot", help="curves and scores as PNG",
        description="Curves of the logs and scores of the results, as PNG files; several folders "
                    "make one picture with a legend.")
    p.add_argument("inputs", type=path, nargs="+", metavar="PATH",
                   help="text logs (.txt, .log), ours or published, result files, or folders")
    p.add_argument("--out", type=path, required=True, help="folder for the pictures")
    p.set_defaults(do=plot)
    return parser


def main(argv):
    """Exit status: 0 done, 1 a run failed, 130 interrupted."""
    split = argv.index("--") if "--" in argv else len(argv)
    arguments = build_parser().parse_args(argv[:split])
    return arguments.do(arguments, argv[split + 1:])


if __name__ == "__main__":
    sys.exit(exit_code_of(main, sys.argv[1:]))
