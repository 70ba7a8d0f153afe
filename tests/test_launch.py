"""From launch to the first step: which GPU a rank sees, what is compiled and found again; what a
terminal shows."""

import contextlib
import io
import re

import pytest
import torch
from conftest import ROOT, environment

import train_gpt
from train_gpt import UserError


def test_too_few_gpus_are_named(tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="rank 5 wants GPU 5 and sees 2"):
        train_gpt.Runtime(tiny(DEVICE="auto"), (5, 8, 5))


def test_the_time_that_is_left_is_told_from_where_a_phase_began(tiny, monkeypatch, capsys):
    """As after a resume, or a validation on the way: half was done before, 12 s take a tenth."""
    rt, now = train_gpt.Runtime(tiny()), [100.0]
    monkeypatch.setattr(train_gpt.time, "perf_counter", lambda: now[0])
    for fraction in (0.5, 0.6):
        rt.progress("train", fraction)
        now[0] += 12
    rt.progress("validation", 0.5)
    rt.progress("train", 0.8)
    now[0] += 20
    rt.progress("train", 0.9)
    left = re.findall(r"progress:train \d+% remaining:(\d+)s", capsys.readouterr().err)
    assert left == ["48", "20"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_one_progress_line_in_place_of_steps(corpus, tmp_path):
    variables = dict(OUT_DIR=tmp_path, ITERATIONS=60, TRAIN_LOG_EVERY=1, TTT_ENABLED=0, GPTQ=0)
    with contextlib.redirect_stdout(Terminal()) as screen, contextlib.redirect_stderr(screen):
        assert train_gpt.main([], environment(corpus, **variables)) == 0
    written = screen.getvalue()
    assert re.search(r"progress:train step:\d+ train_loss:\d\.\d+ \d+ms \d+% remaining:\d+s\r",
                     written)
    seen = [line.rpartition("\r\033[K")[2] for line in written.split("\n")]
    assert not [line for line in seen if re.match(r"progress|step:\d+/60 train_loss", line)]
    log = (tmp_path / "logs/run.txt").read_text().rpartition("=" * 100)[2]
    steps = re.findall(r"^step:(\d+)/60 train_loss", log, re.M)
    assert steps == [str(n) for n in range(1, 61)] and "progress:train" not in log
    scores = [line for line in seen if line.startswith("final_")]
    assert scores == re.findall("^final_.*", log, re.M)


COUNTS = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train_gpt
status = train_gpt.main([], os.environ)
counted = torch._dynamo.utils.counters["inductor"]
made, found = counted["fxgraph_cache_miss"], counted["fxgraph_cache_hit"]
print(f"compiled {{made}} found {{found}}", flush=True)
sys.exit(status)
"""


@pytest.mark.slow
def test_what_one_run_compiles_others_find(run_script, tmp_path):
    """Every rank of the next one, and the passes of another number of ranks too, whose rows are as
    many."""
    (tmp_path / "counts.py").write_text(COUNTS)
    few = dict(COMPILE=1, NUM_LAYERS=2, XSA_LAST_N=2, VE_LAYERS="1", GPTQ=0, TTT_ENABLED=0,
               EVAL_STRIDE=0, MICRO_BATCH_TOKENS=192,
               TORCHINDUCTOR_CACHE_DIR=tmp_path / "cache", script=tmp_path / "counts.py")
    counts = []
    for ranks in (1, 2, 2):
        done = run_script(ranks=ranks, **few)
        assert done.returncode == 0, done.stderr[-2000:]
        counts.append([(int(made), int(found)) for made,
                       found in re.findall(r"compiled (\d+) found (\d+)", done.stdout)])
    (alone,), two, again = counts
    assert alone[0] > 6 and all(made < alone[0] and found >= 4 for made, found in two)
    assert all(made == 0 and found > 6 for made, found in again)
