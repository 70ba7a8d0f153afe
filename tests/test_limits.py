"""Clocks and caps: what would break the rules is stopped, or said in the result, or refused before
anything starts."""

import re

import numpy as np
import pytest
import torch

import train_gpt
from test_evaluation import BANDED, Clock, run, scorer_of, slow_ttt, world


def timed(tiny, seconds, pass_seconds=0.0, **variables):
    """An evaluation of random weights by a clock that only steps, seconds(n), and passes move.

    Returns the world (with its ttt, the clock, the log's lines, the steps of each chunk, one an
    epoch, and the chunks to adapt to), the result and the ledger.
    """
    w = world(tiny, EVAL_BATCH_SEQS=1, VAL_LIMIT_TOKENS=1024, **variables)
    w.lines, model = [], w.model
    w.rt.log = w.lines.append
    with Clock() as w.clock:
        w.ttt = slow_ttt(w, w.clock, seconds)
        w.epochs, w.others = w.ttt.epochs, len(scorer_of(w, w.ttt).chunks) - 1

        def scored(x, y, **more):
            w.clock.now += pass_seconds * (not torch.is_grad_enabled())
            return model(x, y, **more)
        w.model = scored
        result, book = run(w, ttt=w.ttt)
    return w, result, book


def test_a_ttt_that_slows_down_drops_epochs_and_the_score_is_complete(tiny):
    """Steps take 1 s at first and 30 % more each; all of them with three epochs would take far more
    than the 40 s."""
    w, result, book = timed(tiny, lambda n: 1.3 ** n, EVAL_WALLCLOCK_SECONDS=40, TTT_EPOCHS=3,
                            **BANDED)
    assert w.epochs[0] == 3 and min(w.epochs) < 3 and w.clock.now <= 40 + 1.3 ** w.ttt.taken
    assert not np.isnan(book.nll).any() and result["targets"] == len(book.nll) == 1024
    late = [n + 1 for n, epochs in enumerate(w.epochs) if epochs < 3]
    said = re.findall(r"^ttt_\w+:late chunk=(\d+)/", "\n".join(w.lines), re.M)
    assert [int(n) for n in said] == late


def test_the_first_chunk_ends_in_time_though_no_step_was_timed(tiny):
    """200 epochs of it would take 100 s and more. One is taken in any case."""
    w, result, _ = timed(tiny, lambda n: 0.5, EVAL_WALLCLOCK_SECONDS=40, TTT_EPOCHS=200, **BANDED)
    assert 1 <= w.epochs[0] < 200 and w.clock.now <= 40
    assert f"ttt_weights:late chunk=1/{w.others + 1} epochs=" in "\n".join(w.lines)


@pytest.mark.parametrize("plan, step, pass_seconds", [
    (BANDED, 0.1, 0.0), (BANDED, 0.01, 0.25), ({}, 1.0, 0.2)])
def test_steps_and_scores_end_within_the_limit(tiny, plan, step, pass_seconds):
    """Whatever they take: 128 windows of 0.25 s leave little of 40 s."""
    w, result, _ = timed(tiny, lambda n: step, pass_seconds, EVAL_WALLCLOCK_SECONDS=40,
                         TTT_EPOCHS=3, **plan)
    assert w.clock.now <= 40 and result["seconds"] == pytest.approx(w.clock.now)
    passes = len(train_gpt.window_plan(1024, *w.s.scoring_shape[:2])[0])
    everything = 3 * step * w.others + passes * pass_seconds
    assert (w.epochs == [3] * w.others) == (everything <= 0.98 * 40), "nothing is left out in vain"


def test_every_tenth_chunk_late_costs_a_tenth_of_the_adaptations(tiny):
    """128 passes of 0.2 s and 31 steps of 1.07 s, every tenth half a second late, are 60.3 s of the
    60: the forecast is the median."""
    w, result, _ = timed(tiny, lambda n: 1.07 + 0.5 * (n % 10 == 9), 0.2,
                         EVAL_WALLCLOCK_SECONDS=60, TTT_EPOCHS=1, TTT_CHUNK_TOKENS=32)
    assert w.clock.now <= 60 and 0.9 * 31 <= sum(w.epochs) < len(w.epochs) == 31


def test_epochs_follow_the_time_and_are_said(tiny):
    """TTT_EPOCHS=-1: one before a step was timed, then up to ten."""
    for limit, few in ((60, True), (1000, False)):
        w = timed(tiny, lambda n: 0.5, 0.1, EVAL_WALLCLOCK_SECONDS=limit, TTT_EPOCHS=-1,
                  TTT_CHUNK_TOKENS=32)[0]
        assert w.epochs[0] == 1 and set(w.epochs[1:]) <= set(range(1, 10 if few else 11))
        assert few or w.epochs[1:] == [10] * 30
        said = re.findall(r"ttt_chunk \[(\d+)/32\] .* epochs=(\d+)$", "\n".join(w.lines), re.M)
        assert said == [(str(n + 1), str(w.epochs[n])) for n in (0, 10, 20, 30)]
        assert w.clock.now <= limit and (not few or w.clock.now > 50), "time is used"


@pytest.mark.parametrize("step, share", [(0.23, 0.9), (100.0, 0.0)])
def test_adapters_with_every_tenth_step_late_end_in_time(tiny, step, share):
    """128 passes of 0.2 s and 124 steps, some half a second late, in 60 s; a step of 100 s is the
    only one and hinders no scoring."""
    w, result, book = timed(tiny, lambda n: step + 0.5 * (n % 10 == 9), 0.2, TTT_LORA_RANK=2,
                            TTT_BASE_WEIGHT=0, TTT_BATCH_SEQS=1, EVAL_WALLCLOCK_SECONDS=60)
    assert w.clock.now <= max(60, step + 128 * 0.2 + 1e-6) and len(w.epochs) == 127
    assert share <= sum(w.epochs) / 124 < 1 and not np.isnan(book.nll).any()
    assert result["seconds"] == pytest.approx(w.clock.now)


def test_what_went_before_the_evaluation_counts(tiny):
    """Reading the file, plain and sliding scores: 30 of 40 s are gone when adapting begins."""
    w = world(tiny, EVAL_WALLCLOCK_SECONDS=40)
    with Clock() as clock:
        clock.now = 130.0
        ttt = slow_ttt(w, clock, lambda n: 0.6)  # two epochs of ten chunks would take 12 s
        train_gpt.evaluate(w.model, w.tokens, w.byte_table, w.s, w.rt, "ttt", w.s.scoring_shape,
                           ttt, opened=100.0)
    assert 136 < clock.now <= 140


def test_without_a_limit_every_chunk_but_the_last_gets_all_epochs(tiny):
    w = timed(tiny, lambda n: 1e6, 1e6, EVAL_WALLCLOCK_SECONDS=0, TTT_EPOCHS=3, **BANDED)[0]
    assert w.epochs == [3] * w.others and not any(":late" in line for line in w.lines)


def test_what_breaks_a_rule_is_in_the_result(run_script):
    done = run_script(VAL_LIMIT_TOKENS=320, TTT_ENABLED=0, EVAL_STRIDE=0, ITERATIONS=1)
    assert done.result["violations"] == ["VAL_LIMIT_TOKENS=320: not the whole validation set"]
    assert "not a legal record: VAL_LIMIT_TOKENS=320" in done.stdout
    done = run_script(VAL_LIMIT_TOKENS=10**6, TTT_ENABLED=0, EVAL_STRIDE=0, ITERATIONS=1)
    assert not done.result["violations"], "no limit, if there are fewer tokens"


def test_memory_that_runs_out_names_what_to_lower(run_script, monkeypatch):
    """With the value that was too much, and one that suits a smaller GPU."""
    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    monkeypatch.setattr(train_gpt, "run_job", run_out)
    done = run_script()
    assert done.returncode == 2
    for words in ("MICRO_BATCH_TOKENS=384", "32768", "EVAL_BATCH_SEQS=8", "2.00 GiB"):
        assert words in done.stderr
