"""From launch to the first step: which GPU a rank sees, what is compiled and found again."""

import re

import pytest
import torch
from conftest import ROOT

import train_gpt
from train_gpt import UserError


def test_too_few_gpus_are_named(tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="rank 5 wants GPU 5 and sees 2"):
        train_gpt.Runtime(tiny(DEVICE="auto"), (5, 8, 5))


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
