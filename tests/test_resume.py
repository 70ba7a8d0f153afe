"""Interruption: whatever ends a run, the same command with RESUME=auto goes on, and ends where the
whole run would have."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from types import SimpleNamespace

import pytest
import torch

import train_gpt
from conftest import disk_full, environment, launched, run_main
from train_gpt import Trainer, UserError

# Everything that a step leaves to a later one is on; nothing depends on the clock; a checkpoint
# after every step.
LEAN = dict(WARMUP_STEPS=0, TTT_ENABLED=0, EVAL_STRIDE=0, VAL_LIMIT_TOKENS=256, SWA_ENABLED=1,
            SWA_EVERY=1, CHECKPOINT_EVERY_SECONDS=1e-6, GPTQ=0)


def lean_run(corpus, out, **variables):
    done = run_main(corpus, out, **{**LEAN, **variables})
    done.checkpoints = steps_in(out)
    return done


@pytest.fixture
def job(corpus, tmp_path):
    """job(NAME=value, ...) runs the script in tmp_path/run; what it left and said."""
    return lambda **variables: lean_run(corpus, tmp_path / "run", **variables)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """The run that nothing interrupts."""
    done = lean_run(corpus, tmp_path_factory.mktemp("whole"))
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def stopped_at_4(corpus, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, 4)
        done = lean_run(corpus, tmp_path_factory.mktemp("stopped"))
    assert done.returncode == 130 and done.checkpoints == [3, 4]
    return done


@pytest.fixture
def stopped(stopped_at_4, tmp_path):
    """tmp_path/run with what a run left that was stopped at step 4; its folder of checkpoints."""
    shutil.copytree(stopped_at_4.out, tmp_path / "run")
    return tmp_path / "run" / "checkpoints"


def script_process(corpus, folder, ranks=1, **variables):
    """The script, started."""
    environ = environment(corpus, **{**LEAN, "OUT_DIR": folder, **variables})
    return subprocess.Popen(launched(ranks), env=environ, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def steps_in(folder):
    return sorted(int(p.stem[5:]) for p in (folder / "checkpoints").glob("step_*.pt")
                  if p.stem[5:].isdigit())


def state_of(folder, step):
    """The checkpoint of a step, read by hand: without Checkpoints.load."""
    content = (folder / "checkpoints" / f"step_{step:07d}.pt").read_bytes()
    assert hashlib.sha256(content[:-32]).digest() == content[-32:]
    return torch.load(io.BytesIO(content[:-32]), weights_only=True)


def equal(a, b):
    """Same structure, same bits."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def at_step(monkeypatch, number, act):
    """Trainer.optimize does act(trainer) before its `number`-th call from now on (from 1)."""
    step, calls = Trainer.optimize, []

    def acting(trainer, *args):
        calls.append(1)
        if len(calls) == number:
            act(trainer)
        return step(trainer, *args)
    monkeypatch.setattr(Trainer, "optimize", acting)


def signal_at(monkeypatch, number, which=signal.SIGTERM):
    at_step(monkeypatch, number, lambda trainer: os.kill(os.getpid(), which))


# -- signals

@pytest.mark.parametrize("which, every", [("SIGTERM", 0), ("SIGINT", 1e-6)])
def test_a_signal_ends_the_run_with_its_state_and_resuming_loses_nothing(job, whole, monkeypatch,
                                                                         which, every):
    """Model, momentum, moments, averages, scores, the artifact: as if nothing had been."""
    with monkeypatch.context() as patch:
        signal_at(patch, 3, getattr(signal, which))
        stopped = job(CHECKPOINT_EVERY_SECONDS=every)
    assert stopped.returncode == 130 and not stopped.content and stopped.checkpoints[-1] == 3
    assert "interrupted at step 3; RESUME=auto with the same settings" in stopped.stdout
    assert whole.checkpoints == [5, 6] and not list(whole.out.rglob("*.part"))
    assert "Traceback" not in stopped.stderr and "error" not in stopped.stderr
    done = job(CHECKPOINT_EVERY_SECONDS=1e-6, RESUME="auto")
    assert done.returncode == 0 and "resume:step 3 " in done.stdout
    assert "step:3/6" not in done.stdout and "step:4/6" in done.stdout
    assert done.content == whole.content and done.result["val_loss"] == whole.result["val_loss"]
    assert done.result["ledger_sha256"] == whole.result["ledger_sha256"]
    for step in (5, 6):
        one, other = state_of(whole.out, step), state_of(done.out, step)
        for state in (one, other):
            assert state["elapsed"] > 0 and state["save_ms"] > 0
            del state["elapsed"], state["step_ms"], state["save_ms"]
        assert equal(one, other)


def test_every_step_is_a_place_to_stop(job, whole, monkeypatch):
    """Stopped after each of the first steps, with settings that do not matter: one result."""
    for step in range(1, 4):
        with monkeypatch.context() as patch:
            signal_at(patch, 1)
            stopped = job(RESUME="auto", CHECKPOINT_EVERY_SECONDS=0, VAL_LOSS_EVERY=step,
                          WARMUP_STEPS=step, TRAIN_LOG_EVERY=step)
        assert stopped.returncode == 130
        assert stopped.checkpoints == ([step - 1, step] if step > 1 else [1])
    done = job(RESUME="auto")
    assert done.returncode == 0 and done.content == whole.content
    assert done.result["val_loss"] == whole.result["val_loss"]


def wait_for(process, words):
    """Read the process's output until a line holds `words`; what was read."""
    read = ""
    for line in process.stdout:
        read += line
        if words in line:
            return read
    raise AssertionError(f"ended without {words!r}: {read[-2000:]}{process.stderr.read()[-2000:]}")


def test_a_closed_terminal_loses_nothing(corpus, tmp_path):
    """SIGHUP to torchrun, which sends it on; nobody reads the console then."""
    process = script_process(corpus, tmp_path, 2, ITERATIONS=10**6, CHECKPOINT_EVERY_SECONDS=0)
    wait_for(process, "step:2/")
    process.send_signal(signal.SIGHUP)
    process.stdout.close()
    process.communicate(timeout=60)
    step, = steps_in(tmp_path)
    assert process.returncode == 1 and state_of(tmp_path, step)
    assert f"interrupted at step {step};" in (tmp_path / "logs" / "run.txt").read_text()


def test_a_signal_to_another_rank_ends_all():
    """`kill` reaches one process alone; the clock's collective carries the signal of any rank."""
    rt = SimpleNamespace(rank=0, signal=0, device=torch.device("cpu"), synchronize=lambda: None,
                         sum_=lambda x: x + torch.tensor([0.0, signal.SIGTERM]))
    clock = train_gpt.StepClock(rt)
    clock.read()
    assert clock.interrupted


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_signal_while_packing_loses_no_training(job, whole, monkeypatch, tmp_path, on_disk):
    """No checkpoint is asked for. The run ends at once, since torchrun kills it after 30 s, and the
    state after the last step is on disk; if that cannot be written, after the artifact."""
    pack = train_gpt.pack
    if not on_disk:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "checkpoints").touch()  # not a folder

    def signalled(*args):
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGTERM)
        return pack(*args)
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "pack", signalled)
        stopped = job(CHECKPOINT_EVERY_SECONDS=0)
    assert stopped.returncode == 130 and "RESUME=auto" in stopped.stdout
    if not on_disk:
        assert stopped.content == whole.content
        return
    assert stopped.checkpoints == [6] and not stopped.content
    monkeypatch.setattr(Trainer, "optimize", lambda *_: pytest.fail("trained again"))
    done = job(CHECKPOINT_EVERY_SECONDS=0, RESUME="auto")
    assert done.content == whole.content and not done.checkpoints, "none is asked for"


def test_an_interrupted_run_goes_on_where_an_older_one_of_the_same_settings_was_finished(
        job, whole, monkeypatch):
    assert job().returncode == 0
    with monkeypatch.context() as patch:
        signal_at(patch, 3)
        assert job().returncode == 130
    done = job(RESUME="auto")
    assert "resume:step 3 " in done.stdout and done.content == whole.content


def test_a_finished_run_is_scored_anew_on_another_text(job, monkeypatch):
    """Nothing that was found out about the text before goes into the new result."""
    first = job()
    assert "float" in first.result["val_loss"] and not any(
        "documents" in line for line in first.result["violations"])
    monkeypatch.setattr(train_gpt, "contamination", lambda *_: (10, 3))
    again = job(RESUME="auto", VAL_LIMIT_TOKENS=512)
    assert "is finished, on to its evaluation" in again.stdout
    assert "float" not in again.result["val_loss"]
    assert any(line.startswith("3 sampled") for line in again.result["violations"])
    assert "float" in job(RESUME="auto").result["val_loss"], "the text of before"


# -- checkpoints on disk

def test_damaged_checkpoints_fall_back_to_the_one_before_or_the_beginning(job, whole, stopped):
    newest = stopped / "step_0000004.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1  # a bit of a weight, which nothing but the checksum notices
    newest.write_bytes(content)
    done = job(RESUME="auto")
    assert done.returncode == 0 and "step_0000004.pt is damaged and left out" in done.stdout
    assert "resume:step 3 " in done.stdout and done.content == whole.content
    for path in (stopped / "exported.json", stopped.parent / "final_model.ptz"):
        path.unlink()
    for path in stopped.glob("*.pt"):
        path.write_bytes(path.read_bytes()[:-100])
    done = job(RESUME="auto")  # its checkpoints 1 to 4 come below the damaged 5 and 6
    assert done.returncode == 0 and done.stdout.count("is damaged and left out") == 2
    assert "no checkpoint, from the beginning" in done.stdout and done.checkpoints == [5, 6]


def test_settings_that_change_weights_are_refused_by_name_and_others_may_differ(job, stopped,
                                                                               tmp_path):
    before = {p: p.read_bytes() for p in stopped.iterdir()}
    refused = job(RESUME="auto", MATRIX_LR=0.03, EMA_ENABLED=0)
    assert refused.returncode == 2 and refused.stderr.count(", not ") == 2
    for part in ("MATRIX_LR=0.025, not 0.03", "EMA_ENABLED=1, not 0", "another OUT_DIR"):
        assert part in refused.stderr
    assert not refused.content and {p: p.read_bytes() for p in stopped.iterdir()} == before
    done = job(RESUME="auto", TRAIN_LOG_EVERY=1, MICRO_BATCH_TOKENS=192, EVAL_BATCH_SEQS=4,
               TTT_LR=0.1, SCORES_PATH=tmp_path / "scores.npy")
    assert done.returncode == 0 and "resume:step 4 " in done.stdout


def test_other_data_is_refused(job, stopped, corpus, tmp_path):
    """Half of the steps on other tokens is no run that anybody can repeat."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "fineweb_val_000000.bin").symlink_to(corpus.folder / "fineweb_val_000000.bin")
    (other / "fineweb_train_000000.bin").symlink_to(corpus.folder / "fineweb_train_000001.bin")
    refused = job(RESUME="auto", DATA_PATH=other)
    assert refused.returncode == 2 and " DATA=" in refused.stderr


def test_a_new_run_over_an_older_one_keeps_its_own_checkpoints(job, stopped, monkeypatch):
    """The older one got further. What is resumed later must be the new one. A file that is not
    ours stays, what a kill left half written goes: a part is as large as a checkpoint."""
    (stopped / "step_best.pt").write_bytes(b"a copy that somebody keeps")
    (stopped / ".step_0000002.pt.part").write_bytes(b"half")
    (stopped.parent / ".final_model.ptz.part").write_bytes(b"half")
    with monkeypatch.context() as patch:
        signal_at(patch, 3)
        again = job(SEED=7)
    assert again.returncode == 130 and 3 in again.checkpoints
    assert "resume:" not in again.stdout and "step:1/6" in again.stdout
    done = job(SEED=7, RESUME="auto")
    assert done.returncode == 0 and "resume:step 3 " in done.stdout
    assert (stopped / "step_best.pt").exists() and not list(stopped.parent.rglob("*.part"))


# -- after training

def test_a_finished_artifact_goes_straight_to_its_evaluation(job, whole, tmp_path, monkeypatch):
    """Killed while it was scored: nothing is trained again, and every target is scored anew. No
    empty file stands for scores."""
    def dead(*args):
        raise MemoryError
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "run_evaluations", dead)
        with pytest.raises(MemoryError):
            job(SCORES_PATH=tmp_path / "scores.npy")
    assert not (tmp_path / "scores.npy").exists()
    monkeypatch.setattr(Trainer, "train", lambda *_: pytest.fail("trained again"))
    again = job(RESUME="auto")
    assert again.returncode == 0 and "is finished, on to its evaluation" in again.stdout
    assert again.content == whole.content
    assert again.result["ledger_sha256"] == whole.result["ledger_sha256"]
    assert again.result["steps"] == 6 and again.result["train_seconds"] > 0
    assert again.result["val_loss"] == whole.result["val_loss"], "that of the float weights, too"


def test_a_finished_artifact_of_other_settings_is_refused(job, whole, tmp_path):
    shutil.copytree(whole.out, tmp_path / "run")
    again = job(RESUME="auto", MLP_BITS=7)
    assert again.returncode == 2 and "MLP_BITS=8, not 7" in again.stderr
    assert again.content == whole.content


@pytest.mark.parametrize("name", ["final_model.ptz", "checkpoints/exported.json"])
def test_an_artifact_that_is_not_this_runs_is_made_again(job, whole, tmp_path, name):
    shutil.copytree(whole.out, tmp_path / "run")
    (tmp_path / "run" / name).write_bytes((whole.out / name).read_bytes()[:-20])
    again = job(RESUME="auto")
    assert again.returncode == 0 and "is finished" not in again.stdout
    assert "resume:step 6" in again.stdout and again.content == whole.content


# -- what is not finite

def nan_loss(trainer):
    """From here on the next pass of this trainer ends in a loss that is not a number."""
    forward = trainer.forward

    def broken(*arguments, **options):
        trainer.forward = forward
        return forward(*arguments, **options) * float("nan")
    trainer.forward = broken


def test_a_loss_that_is_not_finite_stops_with_step_rank_and_the_checkpoint_kept(job, whole,
                                                                                monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 4, nan_loss)
        stopped = job()
    assert stopped.returncode == 2 and "step 4: train_loss nan on rank 0" in stopped.stderr
    assert "gradient norm nan" in stopped.stderr and "MATRIX_LR=0.025" in stopped.stderr
    assert stopped.checkpoints == [2, 3] and not stopped.content
    assert all(torch.isfinite(p).all() for p in state_of(stopped.out, 3)["model"])
    assert job(RESUME="auto").content == whole.content, "the cause gone, the run goes on"


def test_a_gradient_that_is_not_finite_stops_too(job, monkeypatch):
    def poison(trainer):
        trainer.model.tok_emb.register_hook(lambda g: g * float("inf"))
    at_step(monkeypatch, 2, poison)
    stopped = job()
    assert stopped.returncode == 2 and "step 2: train_loss 5" in stopped.stderr
    assert "not finite" in stopped.stderr and not stopped.content


def test_no_checkpoint_is_written_of_weights_that_are_not_finite(job, monkeypatch):
    """On a GPU most steps are not looked at; two such states must not replace the good ones."""
    monkeypatch.setattr(Trainer, "check_and_log", lambda *_: None)
    at_step(monkeypatch, 4, nan_loss)
    stopped = job()
    assert stopped.returncode == 2 and "not finite" in stopped.stderr
    assert stopped.checkpoints == [2, 3]


@pytest.mark.parametrize("obstacle", ["disk", "folder"])
def test_training_goes_on_where_a_checkpoint_cannot_be_written(job, whole, monkeypatch, tmp_path,
                                                               obstacle):
    if obstacle == "folder":
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "checkpoints").write_bytes(b"in the way")
    disk_full(monkeypatch, "step_")
    done = job()
    assert done.returncode == 0 and "checkpoint:none at step 3: " in done.stdout
    assert done.content == whole.content


# -- the clock

@pytest.fixture
def slow_checkpoints(monkeypatch):
    """To write one takes 0.8 s."""
    write = train_gpt.write_whole

    def slow(path, content):
        time.sleep(0.8 if path.name.startswith("step_") else 0)
        write(path, content)
    monkeypatch.setattr(train_gpt, "write_whole", slow)


@pytest.mark.parametrize("every, gptq, checkpoints", [(1000, 1, 1), (0.7, 1, 2), (2.88, 0, 1)])
def test_training_ends_in_time_though_a_checkpoint_takes_long(job, slow_checkpoints, every, gptq,
                                                              checkpoints):
    """None is begun that would pass the cap, and no first one shortly before the cap; the last is
    not training."""
    done = job(ITERATIONS=10**6, MAX_WALLCLOCK_SECONDS=3, CHECKPOINT_EVERY_SECONDS=every,
               GPTQ=gptq)
    assert done.returncode == 0 and 1 < done.result["train_seconds"] <= 3
    assert done.stdout.count("checkpoint:step") == checkpoints
    assert max(done.checkpoints) == done.result["steps"]


def test_no_step_begins_after_the_cap_because_a_checkpoint_took_long(job, slow_checkpoints,
                                                                     monkeypatch):
    steps, real = [], Trainer.optimize

    def timed(trainer, *args):
        steps.append(time.perf_counter())
        return real(trainer, *args)
    monkeypatch.setattr(Trainer, "optimize", timed)
    done = job(ITERATIONS=10**6, MAX_WALLCLOCK_SECONDS=1, CHECKPOINT_EVERY_SECONDS=0.5)
    assert done.returncode == 0 and steps[-1] - steps[0] < 1, "what it took is training's"


def test_the_clock_goes_on_where_it_stood(job, monkeypatch):
    with monkeypatch.context() as patch:
        signal_at(patch, 2)
        at_step(patch, 2, lambda trainer: time.sleep(0.5))
        stopped = job(ITERATIONS=10**6, MAX_WALLCLOCK_SECONDS=2)
    spent = state_of(stopped.out, 2)["elapsed"]
    done = job(ITERATIONS=10**6, MAX_WALLCLOCK_SECONDS=2, RESUME="auto")
    assert stopped.returncode == 130 and spent > 500 and done.returncode == 0
    assert spent / 1000 < done.result["train_seconds"] < 2.5


def test_snapshots_are_carried_on(job, monkeypatch):
    def taken(trainer):
        trainer.averages.swa = [p.detach() + 1 for p in trainer.averages.params]
        trainer.averages.snapshots = 2
    with monkeypatch.context() as patch:
        at_step(patch, 2, taken)
        signal_at(patch, 3)
        stopped = job(CHECKPOINT_EVERY_SECONDS=0)
    saved, found = state_of(stopped.out, 3)["averages"], {}
    at_step(monkeypatch, 1, lambda trainer: found.update(vars(trainer.averages)))
    assert job(RESUME="auto", CHECKPOINT_EVERY_SECONDS=0).checkpoints == []
    assert found["snapshots"] == saved["snapshots"] == 2 and equal(found["swa"], saved["swa"])


# -- several ranks

@pytest.mark.slow
def test_another_number_of_ranks_goes_on_with_equal_losses(corpus, tmp_path):
    """One rank stops, two go on and stop (SIGTERM to torchrun), one finishes: as one rank from
    beginning to end."""
    def run(name, ranks, stop=0, **variables):
        process = script_process(corpus, tmp_path / name, ranks, TRAIN_LOG_EVERY=1, ITERATIONS=40,
                                 WARMDOWN_ITERS=20,
                                 **variables)
        read = ""
        if stop:
            read = wait_for(process, f"step:{stop}/")
            process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
        return process.returncode, read + out, err
    assert run("whole", 1)[0] == 0
    assert run("parts", 1, stop=8)[0] == 130
    first = steps_in(tmp_path / "parts")[-1]
    status, out, _ = run("parts", 2, stop=first + 8, RESUME="auto")
    second = steps_in(tmp_path / "parts")[-1]
    assert status and 8 <= first < second < 40 and f"resume:step {first} " in out
    assert "interrupted at step" in out
    status, out, err = run("parts", 1, RESUME="auto")
    assert status == 0 and f"resume:step {second} " in out, err[-2000:]
    one, other = (json.loads((tmp_path / name / "logs" / "run.json").read_text())["val_loss"]
                  for name in ("whole", "parts"))
    assert other["float"] == pytest.approx(one["float"], abs=1e-5)
    assert other["int8"] == pytest.approx(one["int8"], abs=1e-3)


@pytest.mark.slow
def test_a_dead_rank_ends_the_others_and_is_named(corpus, tmp_path):
    process = script_process(corpus, tmp_path, 2, ITERATIONS=10**6)
    watchdog = threading.Timer(100, process.kill)
    watchdog.start()
    try:
        wait_for(process, "step:5/")
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)],
                                  capture_output=True,
                                  text=True).stdout.split()
        [victim] = [pid for pid in children if b"\0RANK=1\0" in b"\0"
                    + open(f"/proc/{pid}/environ", "rb").read()]
        os.kill(int(victim), signal.SIGKILL)
        killed = time.monotonic()
        _, err = process.communicate(timeout=100)
    finally:
        watchdog.cancel()
    assert time.monotonic() - killed < 60 and process.returncode != 0
    assert "Signal 9 (SIGKILL)" in err and "rank      : 1" in err
    for pid in children:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
    step = steps_in(tmp_path)[-1]
    assert state_of(tmp_path, step)["step"] == step, "what was saved before is whole"


def test_the_rank_whose_loss_is_not_finite_is_the_one_named(tiny):
    """Rank 0 speaks, of the rank that it was: rank 1's loss is bad, rank 0's is not."""
    trainer = object.__new__(Trainer)
    trainer.s, trainer.step, trainer.rt = tiny(), 7, train_gpt.Runtime(tiny())
    trainer.rt.world_size = 2
    trainer.rt.all_gather = lambda x: lambda: torch.cat((x, torch.tensor([float("nan")])))
    with pytest.raises(UserError) as stopped:
        trainer.check_and_log(torch.tensor(5.0), torch.tensor(float("nan")), 1.0)
    assert "step 7: train_loss nan on rank 1, gradient norm nan" in str(stopped.value)
