"""The record line's presets, shrunk, from training to the score of the file."""
import pytest

SHRUNK = dict(NUM_LAYERS=11, MODEL_DIM=32, MLP_MULT=2, PARALLEL_FROM=8, VAL_LOSS_EVERY=0, ITERATIONS=8, EVAL_STRIDE=8,
              EMA_DECAY=0.5, GPTQ_BATCHES=1, XSA_LAST_N=11, WARMUP_STEPS=2)


@pytest.mark.parametrize("preset", ["pr1218", "pr1394", "pr1493", "pr1855"])
def test_a_preset_of_the_record_line_runs_from_training_to_its_score(run_script, preset):
    late = {} if preset == "pr1218" else dict(LATE_PASSES="0-5,3-5,6-10")
    done = run_script(PRESET=preset, **SHRUNK, **late, VE_LAYERS="9,10" if preset == "pr1218" else "",
                      BIGRAM_VOCAB_SIZE=0, SMEAR_GATE="embed" if preset == "pr1855" else "0")
    assert done.returncode == 0, done.stderr
    assert ("late_passes:enabled" in done.stdout) == bool(late)
    kinds = ["float", "int6", "sliding", *(["ttt"] if preset == "pr1493" else [])]
    assert list(done.result["val_bpb"])[: len(kinds)] == kinds
    assert max(done.result["val_bpb"].values()) < 8
