"""From launch to the first step: which GPU a rank sees, what is compiled and found again."""

import re

import pytest
import torch
from conftest import ROOT

import train_gpt
from train_gpt import UserError


@pytest.fixture
def gpus(monkeypatch):
    """gpus(n): a machine of n GPUs, as torch.cuda.device_count() tells before the driver is awake: by CUDA_VISIBLE_DEVICES.

    With awake=True the driver had read it before, and a later change has no effect on what it sees.
    """
    def make(n, environ, awake=False):
        first = environ.get("CUDA_VISIBLE_DEVICES")

        def count(named):
            return n if named is None else len([name for name in named.split(",") if name.strip()])
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count(environ.get("CUDA_VISIBLE_DEVICES")))
        monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", lambda: count(first if awake else environ.get("CUDA_VISIBLE_DEVICES")),
                            raising=False)
        return environ
    return make


@pytest.mark.parametrize("given, local, seen", [
    (None, 0, "0"), (None, 7, "7"), ("4,5,6,7", 2, "6"), ("GPU-8f1c, GPU-77aa", 1, "GPU-77aa"), ("3,1", 0, "3")])
def test_each_rank_sees_its_own_gpu_as_number_0(tiny, gpus, given, local, seen):
    environ = gpus(8, {} if given is None else {"CUDA_VISIBLE_DEVICES": given})
    assert train_gpt.own_gpu(tiny(DEVICE="auto"), environ, (local, 8, local)) == (local, 8, 0)
    assert environ["CUDA_VISIBLE_DEVICES"] == seen


@pytest.mark.parametrize("given", [{}, {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}])
def test_where_the_driver_is_awake_all_gpus_stay_in_sight(tiny, gpus, given):
    environ = gpus(8, dict(given), awake=True)
    assert train_gpt.own_gpu(tiny(DEVICE="auto"), environ, (3, 8, 3)) == (3, 8, 3) and environ == given


@pytest.mark.parametrize("variables, count, ranks", [
    (dict(DEVICE="cpu"), 8, (3, 8, 3)), (dict(DEVICE="auto"), 0, (1, 2, 1)), (dict(DEVICE="auto"), 2, (5, 8, 5)),
    (dict(DEVICE="cuda"), 8, (0, 1, 0))])
def test_elsewhere_nothing_is_changed(tiny, gpus, variables, count, ranks):
    """On a CPU, with one rank, and where there are too few GPUs, which Runtime then says."""
    environ = gpus(count, {})
    assert train_gpt.own_gpu(tiny(**variables), environ, ranks) == ranks and not environ


def test_too_few_gpus_are_named(tiny, gpus, monkeypatch):
    gpus(2, {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="rank 5 wants GPU 5 and sees 2"):
        train_gpt.Runtime(tiny(DEVICE="auto"), (5, 8, 5))


def test_the_log_says_how_long_the_start_took(run_script):
    done = run_script()
    seconds = float(re.search(r"^startup:(\S+)s from launch to the first step$", done.log, re.M)[1])
    assert 0.3 < seconds < 120
    assert done.log.index("startup:") < done.log.index("step:1/")


COUNTS = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train_gpt
status = train_gpt.main([], os.environ)
counted = torch._dynamo.utils.counters["inductor"]
print(f"compiled {{counted['fxgraph_cache_miss']}} found {{counted['fxgraph_cache_hit']}}", flush=True)
sys.exit(status)
"""


@pytest.mark.slow
def test_what_one_run_compiles_others_find(run_script, tmp_path):
    """Every rank of the next one, and the passes of another number of ranks too, whose rows are as many."""
    (tmp_path / "counts.py").write_text(COUNTS)
    few = dict(COMPILE=1, NUM_LAYERS=2, XSA_LAST_N=2, VE_LAYERS="1", GPTQ=0, TTT_ENABLED=0, EVAL_STRIDE=0, MICRO_BATCH_TOKENS=192,
               TORCHINDUCTOR_CACHE_DIR=tmp_path / "cache", script=tmp_path / "counts.py")
    counts = []
    for ranks in (1, 2, 2):
        done = run_script(ranks=ranks, **few)
        assert done.returncode == 0, done.stderr[-2000:]
        counts.append([(int(made), int(found)) for made, found in re.findall(r"compiled (\d+) found (\d+)", done.stdout)])
    (alone,), two, again = counts
    assert alone[0] > 6 and all(made < alone[0] and found >= 4 for made, found in two)
    assert all(made == 0 and found > 6 for made, found in again)
