"""records/runs.py: sweeps survive kills, failures and changes of mind; tables and plots say what
the files say."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import ROOT, environment
from published_logs import log_text

import runs


def status_of(arguments):
    return runs.exit_code_of(runs.main, arguments)


# A script with the face of train_gpt.py that scores what can be computed by hand. It notes its
# starts and ends, so that tests see what ran, when, and with which variables; HOLD=file:n lets it
# wait while there is the file and n runs have begun.
STUB = '''
import dataclasses, hashlib, json, os, pathlib, signal, sys, time

class UserError(Exception): pass

@dataclasses.dataclass
class Settings:
    run_id: str = ""; seed: int = 1; out_dir: str = "."; data_path: str = "somewhere"
    tokenizer_path: str = ""; vocab_size: int = 2; train_seq_len: int = 2; eval_seq_len: int = 0
    eval_only: str = ""; eval_stride: int = 1; ttt_enabled: int = 1; matrix_lr: float = 0.5
    ttt_epochs: int = 1; sleep: float = 0.0; fail: str = ""
    max_wallclock_seconds: float = 0.0

ALIASES = {"LR": "MATRIX_LR"}
shard_paths = lambda s, split: [s.data_path]
ByteTable = lambda s: None

def load_validation(s):
    if s.data_path == "nowhere":
        raise UserError("DATA_PATH=nowhere: no shards")

def resolve_settings(environ):
    values, problems = {}, []
    for f in dataclasses.fields(Settings):
        text = environ.get(f.name.upper())
        try:
            values[f.name] = f.default if text is None else type(f.default)(text)
        except ValueError:
            problems.append(f"{f.name.upper()}={text}: is not a number")
    if values.get("matrix_lr", 0) > 1:
        problems.append(f"MATRIX_LR={values['matrix_lr']}: is out of range")
    if problems:
        raise UserError(f"{len(problems)} bad settings: " + "; ".join(problems))
    return Settings(**values), set()

def note(s, what):
    gpu, threads = os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("OMP_NUM_THREADS")
    line = json.dumps([what, s.run_id, os.getpid(), gpu, threads]) + "\\n"
    fd = os.open(os.environ["NOTES"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(fd, line.encode())

def main(argv, environ):
    try:
        s, _ = resolve_settings(environ)
    except UserError as problem:
        print("error:", problem, file=sys.stderr)
        return 2
    if "--dry-run" in argv:
        return 0
    if os.environ.get("STUBBORN"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    note(s, "start")
    hold, first = os.environ.get("HOLD", ":").split(":")
    begun = lambda: open(os.environ["NOTES"]).read().count("start")
    while hold and os.path.exists(hold) and begun() >= int(first):
        time.sleep(0.01)
    time.sleep(s.sleep)
    if s.fail and s.fail in s.run_id:
        print("error: the GPU fell off the bus", file=sys.stderr)
        return 3
    code = pathlib.Path(__file__).read_bytes()
    bpb = (s.matrix_lr - 0.3) ** 2 + 0.01 * s.ttt_epochs + s.seed / 1e6
    result = dict(settings=dataclasses.asdict(s), code_sha256=hashlib.sha256(code).hexdigest(),
                  steps=5, train_seconds=s.sleep, pack_seconds=0, eval_seconds=0, code_bytes=10,
                  model_bytes=20, total_bytes=30, world_size=1, device="none",
                  val_bpb={"float": bpb + 1, "int6": bpb + 0.5, "ttt": bpb}, violations=[])
    place = pathlib.Path(s.out_dir, "logs", s.run_id + ".json")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.with_suffix(".part").write_text(json.dumps(result))
    os.replace(place.with_suffix(".part"), place)
    note(s, "end")
    return 0

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
'''


@pytest.fixture
def stub(tmp_path, monkeypatch, capsys):
    """.sweep(*flags, NAME=value, …) → (status, what it said, errors), in this process; .start the
    same in one of its own, running; .notes() → what the script noted."""
    script, noted, out, hold = (tmp_path / name for name in ("train.py", "notes", "out", "hold"))
    script.write_text(STUB)
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NOTES", str(noted))
    monkeypatch.chdir(tmp_path)

    def arguments(flags):
        return ["sweep", "--out", str(out), *map(str, flags), "--", sys.executable, str(script)]

    def held(first):
        """The variable that lets runs wait from run number `first` on, until .hold is removed."""
        hold.touch()
        return {"HOLD": f"{hold}:{first}"}

    def start(*flags, **variables):
        environ = {**os.environ, **{k: str(v) for k, v in variables.items()}}
        return subprocess.Popen([sys.executable, ROOT / "records" / "runs.py", *arguments(flags)],
                                env=environ, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE)

    def sweep(*flags, **variables):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, str(value))
            capsys.readouterr()
            return SimpleNamespace(status=status_of(arguments(flags)),
                                   **dict(zip(("said", "errors"), capsys.readouterr())))

    def notes(what="start"):
        lines = map(json.loads, noted.read_text().splitlines()) if noted.exists() else []
        return [name for kind, name, *_ in lines if kind == what] if what else [*lines]

    return SimpleNamespace(start=start, sweep=sweep, notes=notes, script=script, out=out,
                           held=held, hold=hold)


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(pid):
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


# -- what is asked for

def test_a_grid_is_read():
    grid = runs.parse_grid("MATRIX_LR=0.02,0.03 VE_LAYERS=9,10|10 LR=1e-3..0.1:log TTT_EPOCHS=1..4 "
                           "DATA_PATH='../a b',../c EMPTY=")
    assert grid == {"MATRIX_LR": ["0.02", "0.03"], "VE_LAYERS": ["9,10", "10"],
                    "LR": runs.Range("1e-3", "0.1", True),
                    "TTT_EPOCHS": runs.Range("1", "4", False), "DATA_PATH": ["../a b", "../c"],
                    "EMPTY": [""]}


@pytest.mark.parametrize("text, words", [
    ("a=1", "a=1: write NAME"), ("A=1 A=2", "A: given twice"), ("OUT_DIR=x", "--out"),
    ("A=0..1:log", "from above 0"), ("A='1", "No closing quotation"),
    ("B A=2..1 SEED=2", "B: write NAME"), ("B A=2..1 SEED=2", "A=2..1 must rise"),
    ("B A=2..1 SEED=2", "SEED: belongs")])
def test_a_bad_grid_is_refused_in_words(text, words):
    with pytest.raises(runs.UserError, match=re.escape(words)):
        runs.parse_grid(text)


def test_seeds_are_a_number_or_named():
    assert runs.parse_seeds("3") == [1337, 42, 2025] and runs.parse_seeds("1") == [1337]
    assert runs.parse_seeds("7,8") == [7, 8] and runs.parse_seeds("1337,") == [1337]
    assert runs.parse_seeds("0,") == [0]
    assert len(set(runs.parse_seeds("20"))) == 20
    for text in ("", "0", "1337", "7,7", "x", "-1,2", "1.5"):
        with pytest.raises(runs.UserError, match="--seeds"):
            runs.parse_seeds(text)


def test_names_tell_points_apart(tmp_path):
    points = [{"A": v} for v in ("a/b", "a-b", "a b", "x" * 300, "x" * 301, "", "9,10",
                                 "1")] + [{"A": "1", "B": "2"}]
    names = [runs.Run(point, 1, tmp_path).name for point in points]
    assert len(set(names)) == len(names)
    assert all(len(name) < 180 and "/" not in name and " " not in name for name in names)
    assert runs.Run({"MATRIX_LR": "0.02", "VE_LAYERS": "9,10"}, 7,
                    tmp_path).name == "MATRIX_LR=0.02_VE_LAYERS=9,10_SEED=7"


# -- sweeps

GRID = "MATRIX_LR=0.2,0.3,0.5 TTT_EPOCHS=1,2"


def test_a_sweep_runs_every_combination_once_and_a_larger_one_the_rest(stub):
    first = stub.sweep("--grid", "MATRIX_LR=0.2,0.3 TTT_EPOCHS=1,2", "--seeds", "7,8")
    expected = [f"MATRIX_LR={lr}_TTT_EPOCHS={e}_SEED={seed}" for seed in (7, 8)
                for lr in ("0.2", "0.3") for e in (1, 2)]
    assert first.status == 0 and stub.notes() == expected, "every point with the first seed first"
    for name in expected:
        result = json.loads((stub.out / name / "logs" / f"{name}.json").read_text())
        s = result["settings"]
        assert name == f"MATRIX_LR={s['matrix_lr']}_TTT_EPOCHS={s['ttt_epochs']}_SEED={s['seed']}"
    again = stub.sweep("--grid", "MATRIX_LR=0.2,0.3 TTT_EPOCHS=1,2,3", "--seeds", "7,")
    assert again.status == 0 and stub.notes()[:8] == expected and len(stub.notes()) == 10
    table = again.said[again.said.index("\nMATRIX_LR  "):].splitlines()[2:]
    assert table[0].split()[:2] == ["0.3", "1"] and len(table) == 6, "best first"


def test_other_code_or_settings_run_again_and_lose_nothing(stub):
    stub.sweep("--grid", "MATRIX_LR=0.2,0.3")
    results = {p.name: p.read_bytes() for p in stub.out.rglob("logs/*.json")}
    stub.sweep("--grid", "MATRIX_LR=0.2,0.3", VOCAB_SIZE=5)
    assert len(stub.notes()) == 4
    stub.script.write_text(STUB + "# changed\n")
    stub.sweep("--grid", "MATRIX_LR=0.2,0.3", VOCAB_SIZE=5)
    assert len(stub.notes()) == 6
    assert len(list(stub.out.glob("code/*/train.py"))) == 2
    kept = {p.name: p.read_bytes() for p in (stub.out / "earlier").glob("*.1/logs/*.json")}
    assert kept == results and len(list((stub.out / "earlier").glob("*.2/logs/*.json"))) == 2


def test_an_edit_during_a_sweep_changes_no_run(stub):
    process = stub.start("--grid", "MATRIX_LR=0.2,0.3", **stub.held(1))
    until(stub.notes)
    stub.script.write_text("syntax error(")
    stub.hold.unlink()
    process.communicate(timeout=60)
    assert process.returncode == 0 and len(stub.notes("end")) == 2


def test_a_damaged_result_is_no_finished_run(stub):
    stub.sweep("--grid", "MATRIX_LR=0.1,0.2,0.3")
    cut, nan = (next(stub.out.glob(f"MATRIX_LR=0.{i}*/logs/*.json")) for i in (2, 3))
    cut.write_bytes(cut.read_bytes()[:-40])
    nan.write_text(nan.read_text().replace('"steps": 5', '"steps": NaN'))
    stub.sweep("--grid", "MATRIX_LR=0.1,0.2,0.3")
    assert stub.notes()[3:] == stub.notes()[1:3]


@pytest.mark.parametrize("kind, flags", [(signal.SIGKILL, ["--jobs", 2]), (signal.SIGINT, [])])
def test_a_sweep_that_was_killed_goes_on(stub, kind, flags):
    """Killed when the third run has begun: its runs die with it, and those that had finished are
    not repeated."""
    process = stub.start("--grid", GRID, *flags, **stub.held(3))
    until(lambda: len(stub.notes()) >= 3)
    process.send_signal(kind)
    _, errors = process.communicate(timeout=30)
    until(lambda: not any(alive(pid) for _, _, pid, *_ in stub.notes(None)))
    ended = stub.notes("end")
    assert 1 <= len(ended) <= 2
    stub.hold.unlink()
    if kind != signal.SIGKILL:
        assert process.returncode == 130 and "stopped: " in errors
        assert "the same command goes on" in errors
    again = stub.sweep("--grid", GRID, *flags)
    assert again.status == 0 and len(stub.notes("end")) == len(set(stub.notes("end"))) == 6
    assert not [name for name in ended if stub.notes().count(name) > 1]


def test_one_failure_does_not_stop_the_others(stub):
    done = stub.sweep("--grid", "MATRIX_LR=0.2,0.3,0.5", FAIL="MATRIX_LR=0.3")
    assert done.status == 1 and len(stub.notes()) == 3 and len(stub.notes("end")) == 2
    assert "failed: MATRIX_LR=0.3_SEED=1337: ended with status 3" in done.errors
    assert "the GPU fell off the bus" in done.errors
    again = stub.sweep("--grid", "MATRIX_LR=0.2,0.3,0.5", FAIL="MATRIX_LR=0.3")
    assert again.status == 1 and len(stub.notes()) == 4, "it is tried again, and only it"


def test_everything_wrong_is_said_before_anything_runs(stub):
    done = stub.sweep("--grid", "MATRIX_LR=0.2,x,2 TTT_EPOCHS=1,1.5 NO_SUCH=1")
    assert done.status == 2 and stub.notes() == []
    for words in ("MATRIX_LR=x: is not a number", "MATRIX_LR=2.0: is out of range",
                  "TTT_EPOCHS=1.5: is not a number", "no such setting: NO_SUCH", "of 6 runs"):
        assert words in done.errors, words
    assert list(stub.out.glob("MATRIX*")) == []


@pytest.mark.parametrize("flags, variables, words", [
    (["--grid", "MATRIX_LR=0.2,0.20"], {}, "are the same run"),
    (["--grid", "LR=0.2,0.3"], {}, "are the same run"),
    (["--grid", "MATRIX_LR=0.1..0.2"], {}, "a range needs --study"),
    (["--gpus", "0,1", "--jobs", 2], {}, "--jobs 2"),
    ([], dict(DATA_PATH="nowhere"), "DATA_PATH=nowhere: no shards"),
    (["--study", 2, "--grid", "TTT_EPOCHS=1,1.5"], {}, "TTT_EPOCHS=1.5: is not"),
    (["--study", 2, "--grid", "TTT_EPOCHS=1,2", "--objective", "ttt"], dict(TTT_ENABLED="0"),
     "--objective ttt"),
    (["--study", 2], {}, "empty --grid"), (["--budget-hours", -1], {}, "-1")])
def test_bad_requests_are_refused_in_words(stub, flags, variables, words):
    done = stub.sweep(*flags, **variables)
    assert done.status == 2 and words in done.errors and stub.notes() == []


@pytest.mark.parametrize("command, words", [
    (["no_such_program", "train.py"], "no such program"),
    ([sys.executable, "absent.py"], "names no script.py"),
    ([sys.executable, "other.py"], "cannot be checked"),
    (["torchrun", "--nproc_per_node=4", "train.py"], "wants 4")])
def test_commands_that_start_nothing_are_refused(stub, tmp_path, monkeypatch, capsys, command,
                                                 words):
    (tmp_path / "other.py").write_text("print('hello')")
    (tmp_path / "torchrun").write_text("#!/bin/sh\n")
    (tmp_path / "torchrun").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert status_of(["sweep", "--gpus", "0,1", "--out", "out", "--", *command]) == 2
    assert words in capsys.readouterr().err and stub.notes() == []


def test_a_budget_begins_no_run_that_would_end_after_it(stub):
    done = stub.sweep("--grid", GRID, "--budget-hours", 0.6 / 3600, SLEEP=0.4)
    assert done.status == 0 and len(stub.notes("end")) == 1, "the first says how long one takes"
    assert re.search(r"1 of 6 runs are finished; another one, of about \d+ s, would end too late",
                     done.said)
    assert stub.sweep("--grid", GRID, "--budget-hours", 0.3 / 3600, SLEEP=0.4).status == 0
    assert len(stub.notes()) == 1, "finished runs of an earlier call say it too"


def test_jobs_run_side_by_side_and_share_the_cores(stub):
    process = stub.start("--grid", GRID, "--jobs", 3, **stub.held(1))
    until(lambda: len(stub.notes()) == 3)
    time.sleep(0.3)
    assert len(stub.notes()) == 3, "no more than so many"
    stub.hold.unlink()
    process.communicate(timeout=30)
    assert process.returncode == 0 and len(stub.notes("end")) == 6
    share = str(max(1, os.cpu_count() // 3))
    assert {(gpu, threads) for *_, gpu, threads in stub.notes(None)} == {(None, share)}


def test_each_gpu_has_one_run_at_a_time(stub):
    stub.sweep("--grid", GRID, "--gpus", "2,5", SLEEP=0.1)
    busy, used = {}, set()
    for kind, name, _, gpu, _ in stub.notes(None):
        assert busy.get(gpu) == (None if kind == "start" else name)
        busy[gpu] = name if kind == "start" else None
        used.add(gpu)
    assert used == {"2", "5"} and len(stub.notes("end")) == 6


def test_a_run_that_outlives_its_sweep_is_waited_for(stub):
    first = stub.start("--grid", "MATRIX_LR=0.2,0.3", STUBBORN=1, **stub.held(1))
    until(stub.notes)
    first.kill()
    first.communicate()
    second = stub.start("--grid", "MATRIX_LR=0.2,0.3")
    said = second.stderr.readline()
    assert "out: in use by another sweep or by runs that one left behind" in said
    assert str(stub.notes(None)[0][2]) in said
    stub.hold.unlink()
    second.communicate(timeout=30)
    assert second.returncode == 0 and len(stub.notes("end")) == len(stub.notes()) == 2


def test_tuning_on_the_official_validation_tokens_is_warned_of(stub):
    none, warned = ("--budget-hours", 1e-9), "may not be tuned"
    data = dict(DATA_PATH="data/datasets/fineweb10B_sp1024")
    assert warned in stub.sweep("--grid", "MATRIX_LR=0.2,0.3", *none, **data).errors
    assert warned not in stub.sweep(*none, **data).errors, "nothing is chosen"


# -- studies

STUDY = ["--grid", "MATRIX_LR=0.01..1:log TTT_EPOCHS=1..4 VOCAB_SIZE=3,5", "--study", 3, "--seeds",
         2]


def trials(stub):
    optuna = pytest.importorskip("optuna")
    return optuna.load_study(storage=f"sqlite:///{stub.out}/study.db", study_name="sweep").trials


@pytest.mark.slow
def test_a_study_is_killed_and_goes_on_to_its_number_of_trials(stub):
    process = stub.start(*STUDY, **stub.held(4))
    until(lambda: len(stub.notes()) == 4)
    process.kill()
    process.communicate()
    stub.hold.unlink()
    before = stub.notes()
    done = stub.sweep(*STUDY)
    told, scores = trials(stub), {}
    for path in stub.out.rglob("logs/*.json"):
        result = json.loads(path.read_text())
        s = result["settings"]
        scores.setdefault((f"{s['matrix_lr']:.6g}", s["ttt_epochs"], str(s["vocab_size"])),
                          []).append(result["val_bpb"]["ttt"])
    assert done.status == 0 and len(told) == 3 and all(t.state.name == "COMPLETE" for t in told)
    assert stub.notes()[4] == before[3] and len(stub.notes()) == 7
    assert len(set(stub.notes())) == 6, "one run was begun again"
    for t in told:
        key = f"{t.params['MATRIX_LR']:.6g}", t.params["TTT_EPOCHS"], t.params["VOCAB_SIZE"]
        assert 0.01 <= t.params["MATRIX_LR"] <= 1 and len(scores[key]) == 2
        assert t.value == pytest.approx(np.mean(scores[key]))
    best = min(told, key=lambda t: t.value)
    told = f"study: best last bpb {best.value:.4f}, trial {best.number}: MATRIX_LR="
    assert told + f"{best.params['MATRIX_LR']:.6g} " in done.said
    other = stub.sweep("--grid", "MATRIX_LR=0.01..1:log TTT_EPOCHS=1..3 VOCAB_SIZE=3,5", *STUDY[2:])
    assert other.status == 2 and "--grid TTT_EPOCHS: 1..4 → 1..3" in other.errors
    assert len(stub.notes()) == 7


def test_whole_numbers_of_a_study_keep_all_their_digits(stub):
    """The script takes no 1.5e+06. A study that is done says so, and shows its table again."""
    pytest.importorskip("optuna")
    asked = ["--grid", "TTT_EPOCHS=1000001..1999999", "--seeds", 1, "--study"]
    first, again = (stub.sweep(*asked, 2, MAX_WALLCLOCK_SECONDS=9) for _ in range(2))
    drawn = [t.params["TTT_EPOCHS"] for t in trials(stub)]
    assert first.status == again.status == 0 and len(stub.notes()) == len({*drawn}) == 2
    for number in drawn:
        assert f"TTT_EPOCHS={number}_SEED=1337" in stub.notes() and f"\n{number} " in again.said
    assert any(f"TTT_EPOCHS={number}\n" in first.said for number in drawn), "the best point"
    spent = stub.sweep(*asked, 3, "--budget-hours", 1e-7, MAX_WALLCLOCK_SECONDS=9)
    assert "2 of 3 runs are finished" in spent.said


def test_a_point_chosen_twice_is_run_once(stub):
    process = stub.start("--grid", "TTT_EPOCHS=1", "--study", 2, "--jobs", 2, **stub.held(1))
    until(stub.notes)
    time.sleep(0.3)
    stub.hold.unlink()
    process.communicate(timeout=30)
    assert process.returncode == 0 and len(stub.notes()) == 1
    assert [t.state.name for t in trials(stub)] == ["COMPLETE"] * 2


def test_a_trial_with_a_failed_seed_does_not_count_as_a_score(stub):
    pytest.importorskip("optuna")
    done = stub.sweep("--grid", "TTT_EPOCHS=1,2", "--study", 4, "--seeds", 2, FAIL="TTT_EPOCHS=1")
    told = trials(stub)
    assert done.status == 1 and len(told) == 4, "at least one trial chose the bad value"
    assert all((t.state.name == "FAIL") == (t.params["TTT_EPOCHS"] == "1") for t in told)
    assert "TTT_EPOCHS=1_SEED=42" not in stub.notes(), "the trial's other seed would be wasted"


# -- the training script

@pytest.mark.slow
def test_the_training_script_is_swept(corpus, tmp_path, capsys):
    """Its result has the settings that were asked for; else the sweep would call it unfinished."""
    environ = environment(corpus, ITERATIONS=2, EVAL_STRIDE=0, TTT_ENABLED=0, TTT_CHUNK_TOKENS=0)
    del environ["RUN_ID"]
    command = [sys.executable, ROOT / "records" / "runs.py", "sweep", "--grid", "MATRIX_LR=0.05",
               "--out", "out", "--", sys.executable, ROOT / "train_gpt.py"]
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "out" / "MATRIX_LR=0.05_SEED=1337" / "logs"
    result = json.loads(next(folder.glob("*.json")).read_text())
    [log] = runs.read_curves(next(folder.glob("*.txt")))
    assert done.stdout.splitlines()[-1].endswith(f"  {list(result['val_bpb'].values())[-1]:.4f}")
    assert status_of(["table", str(tmp_path / "out")]) == 0
    assert not capsys.readouterr().err, "no other file of the run is taken for a result"
    assert result["settings"]["matrix_lr"] == 0.05
    assert log.settings["ITERATIONS"] == "2" and log.tokens_per_step == 384
    assert log.curve[:, 0].tolist() == [1, 2]
    assert np.isfinite(log.curve).all()


# -- tables

def result(bpb, seed=1, **settings):
    """A result as the script writes it."""
    return dict(settings=dict(seed=seed, run_id=f"r{seed}", out_dir="x", matrix_lr=0.1, **settings),
                code_sha256="ab" * 32,
                steps=100, train_seconds=10.0 + seed, eval_seconds=1, code_bytes=1000,
                model_bytes=999_000,
                total_bytes=1_000_000 + seed, world_size=1, device="none",
                val_bpb={"float": bpb + 1, "int6": bpb},
                violations=[])


@pytest.fixture
def results(tmp_path):
    """A folder with results: three seeds of one setting, the third resumed, one of another."""
    folder = tmp_path / "results"
    folder.mkdir()
    for i, r in enumerate([result(2.0, 1, qk_gain_init=4.0), result(2.1, 2, qk_gain_init=4.0),
                           result(2.4, 3, qk_gain_init=4.0, resume="auto"),
                           result(2.05, 1, qk_gain_init=1.5)]):
        (folder / f"{i}.json").write_text(json.dumps(r))
    return folder


def test_the_table_joins_seeds(results, tmp_path, capsys):
    status = status_of(["table", str(results), "--csv", str(tmp_path / "t.csv"), "--markdown",
                        str(tmp_path / "t.md")])
    said = capsys.readouterr().out.splitlines()
    assert status == 0 and len(said) == 3
    assert said[0].split()[:3] == ["QK_GAIN_INIT", "seeds", "steps"], "what differs, no more"
    assert said[1].startswith("1.5 ") and " 2.0500" in said[1], "best first"
    mean, std = np.mean([2.0, 2.1, 2.4]), np.std([2.0, 2.1, 2.4], ddof=1)
    assert said[2].startswith("4.0 ")
    assert all(text in said[2] for text in ("1 2 3", f"{mean:.4f} ± {std:.4f}", "1,000,003"))
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    assert float(rows[1]["quantized_bpb"]) == pytest.approx(mean)
    assert float(rows[1]["quantized_bpb_std"]) == pytest.approx(std)
    assert rows[1]["train_seconds"] == "12.0" and rows[1]["total_bytes"] == "1000003"
    assert rows[0]["quantized_bpb_std"] == ""
    markdown = (tmp_path / "t.md").read_text().splitlines()
    assert len(markdown) == 4
    assert all(line.count("|") == markdown[0].count("|") for line in markdown)
    status_of(["table", str(results), "--sort=-last_bpb"])
    assert capsys.readouterr().out.splitlines()[1].startswith("4.0 ")
    assert status_of(["table", str(results), "--sort", "bpp"]) == 2
    assert "--sort bpp" in (said := capsys.readouterr().err) and "quantized_bpb" in said
    other = {**result(1.9, 9, qk_gain_init=4.0), "code_sha256": "cd" * 32}
    (results / "5.json").write_text(json.dumps(other))
    status_of(["table", str(results)])
    said = capsys.readouterr().out
    assert len(said.splitlines()) == 4 and "abababab" in said and "cdcdcdcd" in said


def test_a_run_id_with_a_number_at_its_end_is_no_older_attempt(tmp_path, capsys):
    """v1.1 beside v1 is of its own RUN_ID; v1.2 was kept of an earlier attempt of v1."""
    (tmp_path / "logs").mkdir()
    for name, run_id, seed in (("v1", "v1", 1), ("v1.1", "v1.1", 2), ("v1.2", "v1", 3)):
        one = result(2.0, seed)
        one["settings"]["run_id"] = run_id
        (tmp_path / "logs" / f"{name}.json").write_text(json.dumps(one, indent=1))
        (tmp_path / "logs" / f"{name}.txt").write_text(f"setting RUN_ID={run_id}  (set)\n")
    assert [p.name for p in runs.runs_in([tmp_path]) if p.suffix == ".json"] == ["v1.1.json",
                                                                                 "v1.json"]
    (tmp_path / "logs" / "v1.3.txt").write_text("another script's, which names no RUN_ID\n")
    (tmp_path / "logs" / "v1.4.txt").mkdir()
    older = [p for p in sorted(tmp_path.rglob("*.txt")) if runs.is_older_log(p)]
    assert [p.name for p in older] == ["v1.2.txt", "v1.3.txt"]


def test_damaged_foreign_and_repeated_files_are_named_and_left_out(results, capsys):
    (results / "cut.json").write_text('{"settings": {')
    (results / "foreign.json").write_text('{"settings": {}, "val_bpb": {"float": 1}}')
    (results / "list.json").write_text("[1]")
    (results / "nan.json").write_text(json.dumps(result(float("nan"))))
    (results / "binary.json").write_bytes(b"\xff\xfe\x00")
    (results / "copy.json").write_text((results / "0.json").read_text())
    assert status_of(["table", str(results), str(results / "0.json")]) == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 3 and "1 2 3" in said.out
    for name in ("cut", "foreign", "list", "nan", "binary", "copy"):
        assert f"{name}.json" in said.err
    assert len(said.err.splitlines()) == 6


@pytest.mark.parametrize("arguments, words", [
    (["table", "nowhere"], "nowhere: no such"), (["table", "."], "no results"),
    (["plot", ".", "--out", "p"], "no logs and no results")])
def test_nothing_to_show_is_said(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert status_of(arguments) == 2 and words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# -- plots

LOG = "\n".join([
    "import os",
    "'step:7/9 train_loss:9.9 train_time:9ms'  # the script's own source",
    "step:8/9 train_loss:8.8 train_time:8ms", "=" * 100,
    "setting MATRIX_LR=0.1  (set)", "setting VE_LAYERS=9,10", "tokens_per_step:2000",
    "step:1/9 train_loss:6.5 train_time:100ms step_avg:100.00ms lr_scale:1.0000",
    "step:2/9 train_loss:6.0 train_time:100ms step_avg:50.00ms lr_scale:0.5000",
    "step:4/9 train_loss:5.5 train_time:500ms step_avg:125.00ms",
    "step:9/9 val_loss:5.0 val_bpb:2.0 train_time:600ms",
    "step:6/9 train_loss:5.0.0 train_time:700ms", "step:6/9 train_lo"])


def test_a_log_is_read(tmp_path):
    (tmp_path / "a.txt").write_text(LOG)
    [log] = runs.read_curves(tmp_path / "a.txt")
    assert log.settings == {"MATRIX_LR": "0.1", "VE_LAYERS": "9,10"} and log.tokens_per_step == 2000
    np.testing.assert_array_equal(log.curve, [[1, 6.5, 100, 1], [2, 6.0, 100, 0.5],
                                              [4, 5.5, 500, np.nan]])
    steps, rates = runs.throughput(log)
    assert steps.tolist() == [4]
    assert rates.tolist() == [10_000], "two steps of 2,000 tokens in 0.4 s"


def test_a_log_that_begins_with_an_aborted_run_gives_the_finished_one(tmp_path, capsys):
    whole = log_text(1337, "colon")
    (tmp_path / "run.log").write_text(whole[: whole.index("DIAGNOSTIC")] + "\n" + whole)
    assert status_of(["table", str(tmp_path / "run.log")]) == 0
    assert "15,900,258" in capsys.readouterr().out, "its bytes"


def test_damaged_logs_are_named_and_the_rest_is_plotted(tmp_path, results, capsys):
    pytest.importorskip("matplotlib")
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "good.txt").write_text(LOG)
    for end in ("txt", "json"):
        (logs / f"good.1.{end}").write_text("an earlier attempt, not drawn")
    (logs / "bad.txt").write_bytes(b"\xff" * 100)
    assert status_of(["plot", str(tmp_path), "--out", str(tmp_path / "plots")]) == 0
    said = capsys.readouterr()
    assert "bad.txt" in said.err and "good" not in said.err
    pictures = list((tmp_path / "plots").iterdir())
    assert len(pictures) == 6 and all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)


def test_presets_side_by_side_make_no_table_of_forty_columns(tmp_path, capsys):
    for preset in "xyz":
        r = result(2.0, 1, preset=preset, **{f"name{i}": preset for i in range(40)})
        (tmp_path / f"{preset}.json").write_text(json.dumps(r))
    status_of(["table", str(tmp_path), "--csv", str(tmp_path / "t.csv")])
    said = capsys.readouterr().out
    assert said.startswith("PRESET  seeds") and "40 more settings differ" in said
    assert "NAME39" in (tmp_path / "t.csv").read_text()


# -- text logs without result files, ours and published

def publish(folder, form, names, run=""):
    folder.mkdir()
    for name, seed in names.items():
        text = re.sub(r"\S*eval_time:\S+", "", log_text(seed, form, bpb=2 + seed / 10))
        (folder / name).write_text(text.replace("  seed:", f"  run_id: {run}_s{seed}\n  seed:"))
    (folder / "submission.json").write_text("{}")
    (folder / "requirements.txt").write_text("torch\n")
    return folder


@pytest.fixture
def published(tmp_path):
    """Folders of each form: three seeds with an ablation beside, and two with a RUN_ID."""
    logs = {f"train_seed{s}.log": s for s in (1, 2, 3)}
    return (publish(tmp_path / "colons", "colon", {**logs, "train_ablation_seed9.txt": 9}),
            publish(tmp_path / "blocks", "block", {"log_s1.txt": 1, "log_s2.txt": 2}, "mine"))


def test_the_table_reads_published_logs(published, capsys):
    assert status_of(["table", *map(str, published)]) == 0
    said = capsys.readouterr()
    rows = [re.split("  +", line)[:3] for line in said.out.splitlines()[1:4]]
    assert rows == [["mine", "1 2", "5,999"], ["colons/train", "1 2 3", "5,999"],
                    ["colons/train_ablation", "9", "5,999"]] and said.err == ""
    assert all(f"{bpb:.4f} ± " in said.out for bpb in (2.15, 2.2)) and "15,900,258" in said.out
    assert "not said" in said.out, "these logs have no seconds of evaluation"


def test_every_kind_of_score_has_its_column(tmp_path):
    [demo] = runs.read_results(ROOT / "tests" / "bench" / "results" / "demo.txt")
    assert {kind: round(bpb, 4) for kind, bpb in demo["val_bpb"].items()} == {
        "float": 1.6374, "quantized": 1.6375, "banded": 1.4378, "ttt": 1.4122}
    (tmp_path / "x.txt").write_text("final_int6_no_ttt val_loss:5.2 val_bpb:2.2\n"
                                    "pre_quant_ttt val_loss:5.0 val_bpb:2.0\n"
                                    "final_ttt val_loss:5.1 val_bpb:2.1\n")
    [found] = runs.read_results(tmp_path / "x.txt")
    assert found["val_bpb"] == {"quantized": 2.2, "float": 2.0, "ttt": 2.1}


def test_folders_side_by_side_have_a_legend_that_tells_them_apart(published, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    logs = [log for folder in published for path in sorted(folder.glob("*_s*"))
            for log in runs.read_curves(path)]
    assert runs.labels_of_logs(logs) == ["colons, train_ablation", *["colons, train"] * 3,
                                         "mine", "mine"]
    assert runs.labels_of_logs(logs[-2:]) == ["all runs"] * 2
    assert status_of(["plot", *map(str, published), "--out", str(tmp_path / "p")]) == 0
    assert {p.name for p in (tmp_path / "p").iterdir()} >= {"loss.png", "bpb.png", "bytes.png"}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("settings,folder,name", [
    (dict(PRESET="large", RUN_ID="r"), "runs/x", "large"),
    (dict(PRESET="", RUN_ID="r_s42"), "x", "r"),
    (dict(RUN_ID="0b2c9df2-8d4e-4a0e-9d3c-2f0f5a1c7d11"), "LR=1_SEED=42/logs", "LR=1"),
    ({}, "seed_42/wide/logs", "wide"), ({}, "wide/seed42", "wide")])
def test_a_run_is_named_by_preset_run_id_or_folder(tmp_path, settings, folder, name):
    assert runs.run_name(settings, tmp_path / folder / "a.txt", 42) == name
