"""A witness for changes of structure: twenty steps of each system must end where they ended before.

The figures stay until a change is meant to change results; its commit says so. Another kind of CPU
adds in another order, and training amplifies it: 0.0001 after 10 steps, 0.013 after 15 were seen.
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
    "sp1024": dict(losses=[5.7647, 3.289, 2.617, 1.851, 1.3345], model_bytes=198163,
                   bpb=dict(float=1.6129, int8=1.61317, banded=1.50909, ttt=1.49157)),
    "": dict(losses=[5.765, 3.0966, 2.3481, 1.7878, 1.4073], model_bytes=198151,
             bpb=dict(float=1.62389, int8=1.62392, banded=1.50624, ttt=1.38981)),
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
    losses = [float(x) for x in losses]
    assert losses[:3] == pytest.approx(then["losses"][:3], abs=1e-3)
    assert losses[3:] == pytest.approx(then["losses"][3:], abs=0.03)
    assert done.result["model_bytes"] == pytest.approx(then["model_bytes"], rel=0.01)
    assert list(bpb) == list(then["bpb"]) and bpb == pytest.approx(then["bpb"], abs=0.01)
    packed, exact = list(bpb)[1], bpb["float"]
    lost = then["bpb"][packed] - then["bpb"]["float"]
    assert bpb[packed] - exact == pytest.approx(lost, abs=1e-3)
