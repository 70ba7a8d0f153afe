"""A witness for changes of structure: twenty steps of each system must end where they ended before.

The figures stay until a change is meant to change results; its commit says so. Another kind of CPU
adds in another order: with the instructions of four kinds losses differed by 0.0005 at most, scores
by 0.0009.
"""
import re

import pytest
from conftest import SCRIPT

STEPS = dict(NUM_LAYERS=5, UNIQUE_LAYERS=0, MODEL_DIM=64, NUM_HEADS=4, NUM_KV_HEADS=2,
             TRAIN_SEQ_LEN=64, ROPE_NTK_REFERENCE=32, TRAIN_BATCH_TOKENS=1536,
             MICRO_BATCH_TOKENS=1536, ITERATIONS=20, MAX_WALLCLOCK_SECONDS=0, WARMUP_STEPS=1,
             WARMDOWN_ITERS=12, MUON_MOMENTUM_WARMUP_STEPS=10, TRAIN_LOG_EVERY=5, VE_LAYERS="3,4",
             XSA_LAST_N=2, EMA_DECAY=0.8, SWA_EVERY=2, EVAL_STRIDE=16, TTT_CHUNK_TOKENS=256,
             TTT_EPOCHS=2, TTT_LR=0.01, SEED=1337, CODEC="rans", GPTQ_BATCHES=2, MUON_ROW_NORM=0)
SYSTEMS = {"sp1024": dict(XSA_LAST_N=5, TTT_LORA_RANK=0),
           "": dict(XSA_LAST_N=5, VE_LAYERS="", MUON_ROW_NORM=1, TTT_LORA_RANK=4),
           "pr549": dict(CODEC="lzma"), "pr537": dict(CODEC="zstd", UNIQUE_LAYERS=4, TTT_EPOCHS=3)}
# train_loss at steps 1, 5, 10, 15, 20; model bytes without the code's; bpb of each evaluation
GOLDEN = {
    "sp1024": dict(losses=[5.7647, 3.2891, 2.6126, 1.8505, 1.3349], model_bytes=198159,
                   bpb=dict(float=1.6125, int8=1.6124, banded=1.5085, ttt=1.4912)),
    "": dict(losses=[5.765, 3.096, 2.3699, 1.7777, 1.3941], model_bytes=198154,
             bpb=dict(float=1.6117, int8=1.6113, banded=1.4976, ttt=1.361)),
    "pr549": dict(losses=[5.7636, 3.317, 2.8842, 2.3058, 1.9284], model_bytes=157953,
                  bpb=dict(float=2.0466, int6=2.04734, sliding=2.02973, ttt=2.0317)),
    "pr537": dict(losses=[5.7636, 3.3199, 2.9355, 2.385, 1.9859], model_bytes=131241,
                  bpb=dict(float=2.01547, int5_6=2.01728, sliding=1.99727, ttt=1.99258)),
}


@pytest.mark.parametrize("preset", SYSTEMS)
def test_twenty_steps_end_where_they_ended(run_script, preset):
    # The model's part of the budget is the same whatever the code takes.
    budget = SCRIPT.stat().st_size + 198_240
    done = run_script(PRESET=preset, ARTIFACT_BUDGET_BYTES=budget, **{**STEPS, **SYSTEMS[preset]})
    assert done.returncode == 0, done.stderr
    losses = re.findall(r"^step:(?:1|5|10|15|20)/20 train_loss:(\S+)", done.log, re.M)
    then, bpb = GOLDEN[preset], done.result["val_bpb"]
    assert [float(x) for x in losses] == pytest.approx(then["losses"], abs=1e-3)
    assert done.result["model_bytes"] == pytest.approx(then["model_bytes"], rel=0.002)
    assert list(bpb) == list(then["bpb"]) and bpb == pytest.approx(then["bpb"], abs=2e-3)
    packed, exact = list(bpb)[1], bpb["float"]
    lost = then["bpb"][packed] - then["bpb"]["float"]
    assert bpb[packed] - exact == pytest.approx(lost, abs=1e-3)
