"""The record line's presets, shrunk, from training to the score of the file."""
import pytest

from test_presets import run_preset

SHRUNK = dict(NUM_LAYERS=11, MODEL_DIM=32, MLP_MULT=2, PARALLEL_FROM=8, ITERATIONS=8, EMA_DECAY=0.5, BIGRAM_VOCAB_SIZE=0)


@pytest.mark.parametrize("preset", ["pr1218", "pr1394", "pr1493", "pr1855"])
def test_a_preset_of_the_record_line_runs_from_training_to_its_score(preset, corpus, tmp_path):
    late = {} if preset == "pr1218" else dict(LATE_PASSES="0-5,3-5,6-10")
    result, log = run_preset(preset, corpus, tmp_path, **SHRUNK, **late)
    assert ("late_passes:enabled" in log) == bool(late)
    kinds = ["float", "int6", "sliding", *(["ttt"] if preset == "pr1493" else [])]
    assert list(result["val_bpb"]) == kinds and max(result["val_bpb"].values()) < 8
