"""Every ancestor's preset: its parameter count to the unit, and a run of it, shrunk to seconds."""

import itertools
import math
import re
import sys

import pytest

import train_gpt
from bench import step
from conftest import TINY, left

COUNTS = {"": 36_011_617, "sp1024": 27_104_846, "pr414": 26_993_756, "pr549": 26_928_220,
          "pr1092": 26_993_756, "pr657": 26_993_766, "pr490": 27_137_221, "pr537": 24_634_452,
          "pr1019": 27_067_484, "pr1218": 34_401_371, "pr1394": 35_943_512, "pr1493": 35_944_536,
          "pr1530": 35_944_602, "pr1855": 35_945_671,
          # Without the two softcaps of the originals, which no optimizer moved.
          "pr2014": 35_945_671, "pr2135": 35_945_671}
# Sizes and lengths only: parts, optimizers, bits, averaging and TTT stay those of the preset.
SHRINK = {k: TINY[k] for k in ("VOCAB_SIZE", "DEVICE", "TRAIN_SEQ_LEN", "TRAIN_BATCH_TOKENS",
                               "MICRO_BATCH_TOKENS", "MODEL_DIM", "NUM_HEADS", "NUM_KV_HEADS",
                               "ROPE_NTK_REFERENCE", "BIGRAM_VOCAB_SIZE", "BIGRAM_DIM", "VE_DIM",
                               "MAX_WALLCLOCK_SECONDS", "WARMUP_STEPS")}
SHRINK.update(ITERATIONS=8, WARMDOWN_ITERS=8, SWA_EVERY=1, EVAL_STRIDE=16, TTT_CHUNK_TOKENS=128,
              VAL_LOSS_EVERY=0, GPTQ_BATCHES=1, VAL_LIMIT_TOKENS=256)


def settings_of(preset, **more):
    environ = {k: str(v) for k, v in {"PRESET": preset, **more}.items()}
    return train_gpt.resolve_settings(environ)[0]


@pytest.mark.parametrize("preset, count", COUNTS.items())
def test_parameter_count_to_the_unit(preset, count):
    assert sum(train_gpt.parameter_counts(settings_of(preset)).values()) == count


PUBLISHED = {  # figures of the originals' commands that no run of a small model shows
    "pr1019": dict(xsa_last_n=11, bigram_vocab_size=3072, bigram_dim=112, warmdown_iters=4000,
                   matrix_lr=0.025, gptq=1, ttt_enabled=0),
    "pr1493": dict(matrix_lr=0.022, muon_momentum=0.99, qk_gain_init=5.25, gptq_batches=8),
    "pr1530": dict(matrix_lr=0.022, muon_momentum=0.97, qk_gain_init=5.0, ttt_lora_rank=96,
                   eval_stride=32, doc_attention=1, gptq_batches=8, embed_bits=8),
    "pr2014": dict(matrix_lr=0.026, qk_gain_init=5.25, train_seq_len=3072, context=3072,
                   segments=[(1024, 0.1), (2048, 0.7)], gptq_batches=2, embed_bits=7),
    "pr2135": dict(matrix_lr=0.028, qk_gain_init=5.0, train_seq_len=2048, context=2560,
                   gptq_batches=4, mlp_clip_sigmas=11.5, warmdown_frac=0.85)}


@pytest.mark.parametrize("preset, figures", PUBLISHED.items())
def test_a_preset_has_the_figures_of_the_original(preset, figures):
    s = settings_of(preset)
    assert {name: getattr(s, name) for name in figures} == figures
    forms = {p.block: p.form for p in train_gpt.pass_list(s, late=True) if p.form != "0"}
    assert forms == {"pr1019": {}, "pr1493": dict.fromkeys((7, 8, 9, 10), "one")}.get(
        preset, dict.fromkeys((8, 9, 10), "lanes"))


SMALL = dict(NUM_LAYERS=11, MODEL_DIM=32, MLP_MULT=2, PARALLEL_FROM=8, EMA_DECAY=0.5,
             BIGRAM_VOCAB_SIZE=0)
LATE = dict(SMALL, LATE_PASSES="0-5,3-5,6-10")
CHANGED = {"pr1019": {}, "pr1218": SMALL, "pr1394": LATE, "pr1493": LATE, "pr1530": LATE,
           "pr1855": LATE, "pr2014": dict(LATE, SEGMENT_SCHEDULE="8:0.1,16:0.7"),
           "pr2135": dict(LATE, EVAL_SEQ_LEN=80)}


# test_golden.py runs the other systems.
@pytest.mark.parametrize("preset", ["pr1092", "pr657", "pr490", *CHANGED])
def test_preset_trains_packs_and_scores(preset, corpus, tmp_path):
    s = settings_of(preset)
    environ = {**SHRINK, "PRESET": preset, "DATA_PATH": corpus.folder, "RUN_ID": "run",
               "TOKENIZER_PATH": corpus.model, "OUT_DIR": tmp_path,
               "TTT_LORA_RANK": s.ttt_lora_rank, **({} if preset == "pr490" else {"ROPE_DIMS": 4}),
               **CHANGED.get(preset, {})}
    assert train_gpt.main([], {k: str(v) for k, v in environ.items()}) == 0
    done = left(tmp_path)
    result, log = done.result, done.log.split("=" * 100)[-1]  # what follows the source
    full = "banded" if s.scoring_shape[2] else "sliding"
    kinds = {"float", s.quant_label, full} | ({"ttt"} if s.ttt_enabled else set())
    assert set(result["val_bpb"]) == kinds and all(0 < v < 8 for v in result["val_bpb"].values())
    assert result["preset"] == preset and result["steps"] == 8
    stored, tensors, _ = train_gpt.read_artifact(tmp_path / "final_model.ptz")
    assert {t.bits for n, t in tensors.items()
            if train_gpt.kind_of(n).kind == "mlp"} == {s.mlp_bits}
    for words, on in (("swa:start", s.swa_enabled), ("late_qat:enabled", s.late_qat_threshold),
                      ("late_passes:enabled", s.late_passes),
                      ("segments:8 tokens", s.segments),
                      ("match:ttt val_loss without guesses", s.eval_match),
                      ("ttt_lora [", s.ttt_enabled and s.ttt_lora_rank),
                      ("ttt_chunk [", s.ttt_enabled and not s.ttt_lora_rank)):
        assert (words in log) == bool(on), words
    assert f"Total submission size {s.quant_label}+{s.codec}:" in log


def test_late_passes_follow_the_depth():
    """auto: blocks 3 to 5 of 11 three times, or those at the same place of another depth."""
    for layers, order in ((11, [*range(6), 3, 4, 5, 3, 4, 5, *range(6, 11)]),
                          (4, [0, 1, 2, 1, 2, 1, 2, 3]), (1, [0, 0, 0])):
        s = settings_of("", NUM_LAYERS=layers)
        assert [p.block for p in train_gpt.pass_list(s, late=True)] == order
        assert [p.block for p in train_gpt.pass_list(s)] == list(range(layers))


def test_pr537_shares_a_core_marks_xsa_by_core_and_adapts_as_many_parameters_as_published():
    s = settings_of("pr537")
    adapted = [math.prod(shape) for name, shape in train_gpt.parameter_shapes(s).items()
               if train_gpt.ttt_factor(name, s)]
    assert sum(adapted) == 19_911_748
    passes = train_gpt.pass_list(s)
    assert [p.core for p in passes] == [*range(10), 0]
    assert [p.block for p in passes if p.xsa] == [6, 7, 8, 9]
    assert train_gpt.bits_of("tok_emb", s) == train_gpt.bits_of("cores.2.attn.k", s) == 16
    assert train_gpt.bits_of("cores.3.attn.k", s) == train_gpt.bits_of("bigram.table", s) == 6


# --- published names

def test_every_published_name_is_understood():
    """As a setting, an alias, or refused with the reason; none is silently ignored."""
    published = """DATA_PATH TOKENIZER_PATH RUN_ID SEED VAL_BATCH_SIZE VAL_LOSS_EVERY
    TRAIN_LOG_EVERY ITERATIONS WARMDOWN_ITERS WARMUP_STEPS TRAIN_BATCH_TOKENS TRAIN_SEQ_LEN
    EVAL_SEQ_LEN MAX_WALLCLOCK_SECONDS QK_GAIN_INIT VOCAB_SIZE NUM_LAYERS NUM_KV_HEADS MODEL_DIM
    NUM_HEADS MLP_MULT TIE_EMBEDDINGS ROPE_BASE LOGIT_SOFTCAP EMBED_LR HEAD_LR TIED_EMBED_LR
    TIED_EMBED_INIT_STD MATRIX_LR SCALAR_LR MUON_MOMENTUM MUON_BACKEND_STEPS
    MUON_MOMENTUM_WARMUP_START MUON_MOMENTUM_WARMUP_STEPS BETA1 BETA2 ADAM_EPS GRAD_CLIP_NORM
    EVAL_STRIDE MTP_NUM_HEADS MTP_LOSS_WEIGHT MUON_BETA2 SWA_ENABLED SWA_EVERY MUON_WD ADAM_WD
    QAT_ENABLED BIGRAM_VOCAB_SIZE BIGRAM_DIM XSA_LAST_N ROPE_DIMS LN_SCALE DTG_ENABLED
    LATE_QAT_THRESHOLD VE_ENABLED VE_DIM VE_LAYERS CONTROL_TENSOR_NAME_PATTERNS
    INT8_KEEP_FLOAT_FP32_NAME_PATTERNS LAWA_ENABLED LAWA_K LAWA_FREQ GATED_ATTENTION VALUE_RESIDUAL
    TTT_ENABLED TTT_LR TTT_EPOCHS TTT_CHUNK_TOKENS TTT_FREEZE_BLOCKS TTT_MOMENTUM TTT_BATCH_SEQS
    TTT_GRAD_CLIP TTT_OPTIMIZER TTT_TEMP TRIGRAM_VOCAB_SIZE TRIGRAM_DIM GRAD_QUANT VRL_ENABLED
    GA_ENABLED CROWNQ_LAMBDA VRL CROWNQ_WARMDOWN_ONLY EMA_ENABLED EMA_DECAY LATE_QAT QAT_THRESHOLD
    TTT_UNFREEZE_BLOCKS XSA_START_LAYER TTT_TEMPERATURE UNIQUE_LAYERS MLP_ACTIVATION WEIGHT_DECAY
    EVAL_BATCH_SEQS SWA_START_FRAC ALL_INT5 PRUNE_FRAC GPTQ_LITE QUANT_EVAL_EVERY TTT_PERLAYER_LR
    TTT_PROJ_LR_MULT TTT_FC_LR_MULT TTT_INTRA_COSINE FP16_KEEP_NAME_PATTERNS
    INT8_CLIP_PERCENTILE""".split()
    own = {f.name.upper() for f in train_gpt.fields(train_gpt.Settings)}
    assert not set(published) - own - set(train_gpt.ALIASES)


def test_the_bench_of_a_step_times_the_late_passes_in_every_phase(tiny, corpus):
    """Forward and backward of one list and a step of the other would not add up."""
    s = tiny(LATE_PASSES="auto", DATA_PATH=corpus.folder)
    version, ran = step.Version("new", train_gpt, s, train_gpt.Runtime(s)), []
    forward = version.model.forward

    def watched(*x, late=True, **more):
        ran.append(late)
        return forward(*x, late=late, **more)
    version.forward = version.trainer.forward = watched
    assert version.repeat()["step"] > 0 and len(ran) > 1 and all(ran)


@pytest.mark.parametrize("survives", [1, 2])
def test_the_bench_of_a_step_prints_as_it_goes(monkeypatch, capsys, survives):
    """A part that is killed leaves each repeat that it finished, and then its kernels."""
    repeats, repeat = itertools.count(1), step.Version.repeat
    monkeypatch.setattr(step.Version, "repeat", lambda self: (
        repeat(self) if next(repeats) <= survives else pytest.fail("killed")))
    monkeypatch.setattr(step, "report", lambda *given: pytest.fail("killed"))
    monkeypatch.setattr(sys, "argv", ["step.py", "--tokens", "256", "--repeats", "2"])
    for name, value in dict(PRESET="demo", DEVICE="cpu").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(pytest.fail.Exception, match="killed"):
        step.main()
    printed = capsys.readouterr().out
    assert re.findall(r"^new   repeat (\d): .*backward \d+\.\d{3}, .*step \d", printed, re.M) == [
        str(n + 1) for n in range(survives)]
    kernels = re.findall(r"^new +(\d+\.\d{3}) +\d+\.\d  \S+", printed, re.M)
    assert len(kernels) == 5 * (survives == 2)
    assert kernels == sorted(kernels, key=float, reverse=True)
