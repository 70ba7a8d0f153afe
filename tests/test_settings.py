"""Settings: which value wins, what is refused and in which words, what is left alone."""

import importlib.util
import re
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, clean_environ
from hypothesis import example, given, settings as hypothesis_settings, strategies as st

import train_gpt
from train_gpt import (ALIASES, DESCRIBED, PRESETS, UNREAD, TYPES, Settings, UserError, fields,
                       parse_value, resolve_settings)

DEFAULTS = {f.name: f.default for f in fields(Settings)}
NAMES = [name.upper() for name in DEFAULTS]
BOUNDS = {name: kind.__metadata__ for name, kind in TYPES.items() if hasattr(kind, "__metadata__")}
CHOICES = {name: kind.__args__ for name, kind in TYPES.items()
           if kind is not str and name not in BOUNDS}


def resolved(stored=None, **variables):
    s, explicit = resolve_settings({k: str(v) for k, v in variables.items()}, stored)
    return vars(s), explicit


def problems(world_size=1, **variables):
    """The lines of the one report that these variables earn."""
    with pytest.raises(UserError) as caught:
        resolve_settings({k: str(v) for k, v in variables.items()}, world_size=world_size)
    head, *lines = str(caught.value).splitlines()
    assert re.match(rf"{len(lines)} bad settings? ", head) and "--help" in head
    return [line.strip() for line in lines]


# -- which value wins

@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_changes_its_row_which_explicit_variables_undo(preset):
    row = {**PRESETS[preset], "preset": preset}
    assert resolved(PRESET=preset) == ({**DEFAULTS, **row}, {"PRESET"})
    assert all(parse_value(name, value) == value for name, value in PRESETS[preset].items())
    back = {name.upper(): DEFAULTS[name] for name in PRESETS[preset]}
    assert resolved(PRESET=preset, **back) == ({**DEFAULTS, "preset": preset}, {"PRESET", *back})


OTHER = dict(preset="demo", num_layers=12, model_dim=1024, num_heads=16, num_kv_heads=2,
             rope_dims=8, ve_layers="3", xsa_last_n=4, unique_layers=11, scores_path="a/x.npy",
             late_passes="0-4,3-10", embed_wd=0.1, train_seq_len=2048, micro_batch_tokens=2048,
             train_batch_tokens=2048, eval_seq_len=4096, ttt_chunk_tokens=8192,
             segment_schedule="1024:0.1, 2047:.7")


def test_every_variable_reaches_its_field_alone():
    for name, default in DEFAULTS.items():
        if name in OTHER:
            other = OTHER[name]
        elif name in CHOICES:
            other = next(c for c in CHOICES[name] if c not in (default, "1", "zstd"))
        elif name in BOUNDS:
            low, high = BOUNDS[name]
            other = type(default)(min(default * 2 or min(high, 4) / 2, high))
            other = low if other == default else other
        else:
            other = default + "x"
        row = PRESETS["demo"] if name == "preset" else {}
        weights = {"ttt_lora_rank": 0} if name.upper() in train_gpt.OF_WEIGHT_TTT else {}
        given = {"quant_fit": "level"} if name in ("gptq_act_order", "prune_frac") else {}
        given[name] = other
        expected = {**DEFAULTS, **row, **given, **weights}, {n.upper() for n in given}
        assert resolved(**{n.upper(): value for n, value in given.items()}) == expected, name


def test_stored_settings_stand_between_variable_and_default():
    stored = {"seed": 5, "num_layers": 12, "ttt_lr": 0.5}
    assert resolved(stored, TTT_LR=0.25) == ({**DEFAULTS, **stored, "ttt_lr": 0.25}, {"TTT_LR"})


def test_a_file_with_foreign_line_ends_is_read():
    """Of settings, aliases and names that nothing reads; flags are digits or words."""
    text = " 0.5\r\n"
    assert resolved(GPTQ="False")[0]["gptq"] == 0
    found = resolved(MATRIX_LR=text, QAT_THRESHOLD=text, VRL_ENABLED="True\r", PRESET="laptop\r",
                     DTG_ENABLED="False\r", EMBED_LR="0.6\r")[0]
    assert (found["matrix_lr"], found["late_qat_threshold"], found["value_residual"],
            found["preset"]) == (0.5, 0.5, "sigmoid", "laptop")


@pytest.mark.parametrize("environ, name, value", [
    (dict(VALUE_RESIDUAL=1), "value_residual", "pair"),
    (dict(GATED_ATTENTION=1), "gated_attention", "head"),
    (dict(VRL_ENABLED=1), "value_residual", "sigmoid"),
    (dict(VRL_ENABLED=1, VALUE_RESIDUAL="pair"), "value_residual", "pair"),
    (dict(GA_ENABLED=1), "gated_attention", "head"),
    (dict(WEIGHT_DECAY=0.125), "muon_wd", 0.125),
    (dict(WEIGHT_DECAY=".0"), "muon_wd", 0.0),
    (dict(WEIGHT_DECAY=0.125, MUON_WD=0.25), "muon_wd", 0.25),
    (dict(QAT_ENABLED=1), "late_qat_threshold", 2.0),
    (dict(QAT_THRESHOLD=0.1, LATE_QAT=1), "late_qat_threshold", 0.1),  # as one published command
    (dict(LATE_QAT=1, QAT_THRESHOLD=0.1), "late_qat_threshold", 0.1),  # in any order
    (dict(QAT_THRESHOLD=0.1, LATE_QAT=0), "late_qat_threshold", 0.0),
    (dict(VE_ENABLED=0), "ve_layers", ""), (dict(VE_LAYERS=""), "ve_layers", ""),
    (dict(GPTQ_LITE=1), "quant_clip", "row"),
    (dict(VAL_BATCH_SIZE=65536), "eval_batch_seqs", 4),
    (dict(VAL_BATCH_SIZE=65536, EVAL_BATCH_SEQS=8), "eval_batch_seqs", 8),
    (dict(TTT_PERLAYER_LR=0, TTT_LORA_RANK=64), "ttt_fc_lr_mult", 1.0)])
def test_published_names_stand_for_ours(environ, name, value):
    assert resolved(**environ)[0] == {**DEFAULTS, name: value}


def test_an_alias_wins_over_a_preset():
    assert resolved(PRESET="pr1493")[0]["muon_wd"] != 0.25
    assert resolved(PRESET="pr1493", WEIGHT_DECAY=0.25)[0]["muon_wd"] == 0.25


def test_a_published_name_that_nothing_reads_passes_at_its_published_value_alone():
    assert resolved(TTT_LORA_RANK=64, **UNREAD)[0] == DEFAULTS, "some imply TTT_LORA_RANK=0"
    for line in problems(**dict.fromkeys(UNREAD, "7")):
        assert line.endswith("=7: nothing here reads it: unset it")
    published = dict(BETA1="0.9", ROPE_BASE="10000.0", GPTQ_RESERVE_SECONDS="0.0")
    assert resolved(**published)[0] == DEFAULTS
    assert resolved(TTT_MOMENTUM="0.9", TTT_GRAD_CLIP="1.0")[0]["ttt_lora_rank"] == 0


# -- what is refused

def test_everything_wrong_stands_in_one_report():
    """Values, names, aliases, combinations, and the number of ranks."""
    lines = problems(
        5, MUON_MOMENTUM_WARMUP_START="092", WARMDRON_ITERS=3500, PRESET="fastest", SEED=-1,
        NUM_LAYERS="eleven", SMEAR_GATE="maybe", VRL_ENABLED="yes", WEIGHT_DECAY="much",
        MTP_NUM_HEADS=2, EVAL_STRIDE=4096, EVAL_ATTENTION="window", EVAL_BATCH=8)
    expected = [("MUON_MOMENTUM_WARMUP_START=092", "out of range", "0 to 0.99"),
                ("WARMDRON_ITERS=3500", "did you mean WARMDOWN_ITERS"),
                ("EVAL_BATCH=8", "or EVAL_BATCH_SEQS"),  # EVAL_MATCH is nearer
                ("PRESET=fastest", "unknown", "demo"), ("NUM_LAYERS=eleven", "whole number"),
                ("SEED=-1", "out of range"), ("SMEAR_GATE=maybe", "must be one of 0, 1, bos"),
                ("VRL_ENABLED=yes", "must be one of 0, 1"), ("WEIGHT_DECAY=much", "not a number"),
                ("MTP_NUM_HEADS=2", "nothing here reads it"), ("EVAL_STRIDE=4096", "exceeds"),
                ("TRAIN_BATCH_TOKENS=786432", "384 rows on 5 ranks")]
    assert len(lines) == len(expected)
    for first, *rest in expected:
        line, = [line for line in lines if line.startswith(first)]
        assert all(part in line for part in rest), line


def test_wrong_types_and_ranges_are_refused():
    for name in [n for n, kind in TYPES.items() if kind is not str]:
        bad = ["", "x", "nan", "-inf", "1,5", "0x10"]
        bad += ["1.5", "1e3"] if isinstance(DEFAULTS[name], int) else []
        if name in BOUNDS:
            low, high = BOUNDS[name]
            bad += [low - 1, high * 2]
            assert [parse_value(name, v) for v in (low, high)] == [low, high]
        else:
            assert [parse_value(name, str(c)) for c in CHOICES[name]] == list(CHOICES[name])
            bad = ["99", "x"]
        for text in bad:
            with pytest.raises(ValueError, match="is not|out of range|must be one of"):
                parse_value(name, text)
        assert type(parse_value(name, str(DEFAULTS[name]))) is type(DEFAULTS[name])


CONTRADICTIONS = [  # settings, each of them good, and the words of the one problem they make
    (dict(MODEL_DIM=516), "MODEL_DIM=516, NUM_HEADS=8: must be a multiple"),
    (dict(NUM_KV_HEADS=3), "NUM_HEADS=8, NUM_KV_HEADS=3: must be a multiple"),
    (dict(MODEL_DIM=136, ROPE_DIMS=16), "MODEL_DIM/NUM_HEADS=17, which must be even"),
    (dict(ROPE_DIMS=15), "ROPE_DIMS=15"), (dict(ROPE_DIMS=66), "ROPE_DIMS=66"),
    (dict(ROPE_DIMS=2, ROPE_NTK_REFERENCE=1024), "NTK needs more than two channels"),
    (dict(MODEL_DIM=16, ROPE_DIMS=0, ROPE_NTK_REFERENCE=1024), "NTK needs more than two channels"),
    (dict(UNIQUE_LAYERS=12), "UNIQUE_LAYERS=12"),
    (dict(TTT_FREEZE_BLOCKS=12), "TTT_FREEZE_BLOCKS=12, NUM_LAYERS=11: must be at most"),
    (dict(BIGRAM_VOCAB_SIZE=1), "BIGRAM_VOCAB_SIZE=1"),
    (dict(TRAIN_BATCH_TOKENS=2049),
     "TRAIN_BATCH_TOKENS=2049, TRAIN_SEQ_LEN=2048: must be a multiple"),
    (dict(MICRO_BATCH_TOKENS=2047), "MICRO_BATCH_TOKENS=2047, TRAIN_SEQ_LEN=2048: must hold a row"),
    *((dict(EVAL_STRIDE=2049, EVAL_ATTENTION=plan), "EVAL_STRIDE=2049: exceeds the scoring window")
      for plan in ("window", "banded")),
    (dict(EVAL_STRIDE=0), "TTT_ENABLED=1, EVAL_STRIDE=0: TTT scores with a full context"),
    (dict(TTT_CHUNK_TOKENS=2047, EVAL_ATTENTION="window"),
     "TTT_CHUNK_TOKENS=2047: must hold 2048"),
    (dict(TTT_CHUNK_TOKENS=4095), "TTT_CHUNK_TOKENS=4095: must hold 4096"),  # twice the window
    (dict(ITERATIONS=0, MAX_WALLCLOCK_SECONDS=0), "nothing ends the training"),
    (dict(RUN_ID="../elsewhere"), "RUN_ID=../elsewhere"), (dict(RUN_ID="é" * 101), "200 bytes"),
    (dict(SCORES_PATH="scores.txt"), "SCORES_PATH=scores.txt: must name a file .npy"),
    (dict(ARTIFACT_BUDGET_BYTES=100), "the code alone has"),
    *((dict(VE_LAYERS=text), f"VE_LAYERS={text}: must be different blocks of 0..10")
      for text in ("9,11", "9,-1", "9,9")),
    (dict(VE_LAYERS="9;10"), "VE_LAYERS=9;10: must be different blocks of 0..10"),
    *((dict(LATE_PASSES=text), f"LATE_PASSES={text}: must be blocks of 0..10")
      for text in ("0-11", "11", "5-3", "-1", "a", ",", "0-9", "1-10,0", "0-99999999999999")),
    *((dict(SEGMENT_SCHEDULE=text),
       f"SEGMENT_SCHEDULE={text}, TRAIN_SEQ_LEN=2048: must be tokens:fraction")
      for text in ("1024", "1024:1.0", "1100:0.5,1300:0.2", "1100:0.3,1300:0.3",
                   "1100:.0", "1100:0.1;1300:0.2", "1100:-0.1", ",", "0:0.5", "1023:0.5",
                   "2048:0.5")),
    (dict(TRAIN_SEQ_LEN=1024, SEGMENT_SCHEDULE="1023:0.5"), "1024 or more if that is above 512"),
    (dict(SEGMENT_SCHEDULE="1024:0.5", DOC_ATTENTION=0),
     "SEGMENT_SCHEDULE=1024:0.5, DOC_ATTENTION=0: segments need DOC_ATTENTION=1"),
    (dict(LATE_PASSES_FROM=1), "LATE_PASSES_FROM=1.0, LATE_PASSES=auto: the late passes would be"),
    (dict(GPTQ_ACT_ORDER=1), "QUANT_FIT=trellis, GPTQ_ACT_ORDER=1: a trellis takes columns in"),
    (dict(PRUNE_FRAC=0.1), "QUANT_FIT=trellis, PRUNE_FRAC=0.1: codes of a trellis have no zeros"),
    *((dict(variables, TTT_OPTIMIZER="muon", TTT_FREEZE_BLOCKS=11), "leave nothing to adapt")
      for variables in (dict(TTT_PARAMS="tail"), dict(MUDD=0)))]


def test_contradictions_are_named():
    for variables, words in CONTRADICTIONS:
        for name, value in variables.items():
            parse_value(name.lower(), value)  # each is fine alone
        line, = problems(**variables)
        assert words in line


def test_a_package_that_does_not_import_is_named(monkeypatch):
    monkeypatch.setattr(train_gpt, "zstandard", None)
    assert problems(CODEC="zstd")[0].startswith("CODEC=zstd: the package zstandard")


def test_borders_of_the_contradictions_are_allowed():
    for variables in (
            dict(TTT_ENABLED=0, EVAL_STRIDE=0), dict(TTT_ENABLED=0, TTT_CHUNK_TOKENS=2),
            dict(ROPE_DIMS=2, ROPE_NTK_REFERENCE=0), dict(ITERATIONS=0), dict(VE_LAYERS=" 9, 10 "),
            dict(MAX_WALLCLOCK_SECONDS=0), dict(EVAL_STRIDE=2048), dict(BIGRAM_VOCAB_SIZE=2),
            dict(XSA_LAST_N=12, UNIQUE_LAYERS=11, TTT_FREEZE_BLOCKS=11),
            *(dict(NUM_LAYERS=layers) for layers in range(1, 13)),
            dict(LATE_PASSES="0-10, 3,3-5"), dict(EVAL_SEQ_LEN=1024, EVAL_STRIDE=1024),
            dict(EVAL_STRIDE=4096, TTT_ENABLED=0)):  # banded windows do not slide
        resolved(**variables)


# -- misspelt names, and names that are not ours

# What torchrun, NCCL, CUDA, a shell, a batch system, a container or a user set.
ORDINARY = """
RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID TORCH_LOGS
TORCHINDUCTOR_CACHE_DIR PYTORCH_CUDA_ALLOC_CONF TRITON_CACHE_DIR NCCL_DEBUG NCCL_IB_HCA
CUDA_VISIBLE_DEVICES CUDA_DEVICE_ORDER NVIDIA_VISIBLE_DEVICES OMP_NUM_THREADS MKL_NUM_THREADS
HF_HOME HF_TOKEN WANDB_MODE PYTHONPATH VIRTUAL_ENV CONDA_PREFIX PATH HOME SHELL SHLVL TERM LANG
TMPDIR EDITOR LS_COLORS SSH_CLIENT XDG_SESSION_ID LD_LIBRARY_PATH MAKEFLAGS SLURM_JOB_ID
SLURM_NTASKS KUBERNETES_PORT RUNPOD_GPU_COUNT GITHUB_RUN_ID AWS_REGION PYTEST_CURRENT_TEST
MODEL_DIR MODEL_NAME COMPILER DEVICES SEEDS KERNEL KERNELS_DIR RUNID RUN_NAME RUN_DIR DATA_DIR
DATA_ROOT DATASET_PATH OUTPUT_DIR OUT OUTDIR LOG_DIR TOKENIZER TOKENIZER_NAME VOCAB SEED_VALUE
BATCH_SIZE TRAIN_BATCH_SIZE LEARNING_RATE LR EPOCHS NUM_EPOCHS NUM_WORKERS NUM_GPUS NUM_THREADS
MAX_STEPS TRAIN_DATA VAL_DATA EVAL_DATA EVAL_STEPS EVAL_OUTPUT_DIR EMA_DIR ITERATION STEPS
ATTENTION_BACKEND BETA CODECS RESUMED PRESETS GPT COMPILE_FLAGS DEVICE_ID CHECKPOINT_DIR
""".split()


def test_an_innocent_variable_never_ends_a_run():
    innocent = {**dict.fromkeys(ORDINARY, "x"), "_": "x", "no_proxy": "x", "muon_wdd": "x",
                "BASH_FUNC_which%%": "x"}
    assert resolved(**innocent) == (DEFAULTS, set())


# Names from Run and Data with less than two underscores are left alone: see RUNID and DEVICES.
LONG = [n for n in [*NAMES, *ALIASES] if n not in UNREAD and "_" in n and len(n) > 8 and not (
    n.lower() in DESCRIBED and DESCRIBED[n.lower()][0] in ("Run", "Data") and n.count("_") < 2)]


@hypothesis_settings(max_examples=80)
@given(st.sampled_from(LONG), st.sampled_from(["drop", "swap", "replace", "insert"]),
       st.integers(1, 99), st.sampled_from("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
@example("WARMDOWN_ITERS", "replace", 6, "R")
def test_a_misspelt_setting_is_reported_and_the_suggestion_is_good(name, how, place, letter):
    i = place % len(name)
    typo = {"drop": name[:i] + name[i + 1:], "swap": name[:i] + name[i:i + 2][::-1] + name[i + 2:],
            "replace": name[:i] + letter + name[i + 1:],
            "insert": name[:i] + letter + name[i:]}[how]
    if typo in {*NAMES, *ALIASES} or "_" not in typo:
        return
    line, = problems(**{typo: "1"})
    assert line.startswith(f"{typo}=1: no such setting; did you mean ")
    for suggestion in re.findall(r"[A-Z_\d]{3,}", line.partition("did you mean ")[2]):
        assert suggestion in {*NAMES, *ALIASES} - {*UNREAD}, "not one that is then refused"


def test_unknown_names_of_our_families_are_reported():
    names = ("MUON_NESTEROV EMA_START_FRACTION SWA_FOREVER TTT_LRR QAT_AFTER_STEP TTT_LORA_ALPHA "
             "MATRX_LR NUM_LAYER").split()
    lines = problems(**dict.fromkeys(names, "1"))
    assert sorted(line.partition("=1: no such setting")[0] for line in lines) == sorted(names)


# -- ranks

@pytest.mark.parametrize("environ, ranks", [
    ({}, (0, 1, 0)), ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (5, 8, 1))])
def test_ranks_are_read(environ, ranks):
    assert train_gpt.launched_ranks(environ) == ranks


@pytest.mark.parametrize("environ", [
    dict(RANK="1"), dict(RANK="8", WORLD_SIZE="8"), dict(RANK="-1"), dict(WORLD_SIZE="two"),
    dict(LOCAL_RANK="-1"), dict(WORLD_SIZE="0")])
def test_impossible_ranks_are_refused(environ):
    with pytest.raises(UserError, match=", ".join(f"{k}={v}" for k, v in environ.items())):
        train_gpt.launched_ranks(environ)


# -- the command line

def test_help_explains_every_setting_in_its_section(capsys):
    assert train_gpt.main(["--help"], {}) == 0
    out, sections = capsys.readouterr().out, {section for section, _ in DESCRIBED.values()}
    assert list(DESCRIBED) == list(DEFAULTS) and all(preset in out for preset in PRESETS)
    assert all(out.splitlines().count(section) == 1 for section in sections)
    for name, (section, text) in DESCRIBED.items():
        line, = [line for line in out.splitlines() if line.startswith(f"  {name.upper()}=")]
        assert section and len(text) > 2 and f"={DEFAULTS[name]}  {text} [" in line, name
        assert out.index(f"\n{section}\n") < out.index(line)


def test_a_copy_with_crlf_line_ends_knows_the_same_settings(tmp_path, monkeypatch):
    """Git writes such copies on Windows; what is stored, and what a resumed run must have in
    common, follow from the sections."""
    path = tmp_path / "crlf.py"
    path.write_bytes(train_gpt.SOURCE.replace(b"\n", b"\r\n"))
    spec = importlib.util.spec_from_file_location("crlf", path)
    copy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "crlf", copy)
    spec.loader.exec_module(copy)
    assert copy.DESCRIBED == DESCRIBED
    assert (copy.NOT_STORED, copy.OF_TRAINING) == (train_gpt.NOT_STORED, train_gpt.OF_TRAINING)


def test_unknown_flags_are_refused(capsys):
    for argv in (["--seed=3", "--dry-run"], ["help"]):
        assert train_gpt.main(argv, {}) == 2
        out = capsys.readouterr()
        assert argv[0] in out.err and "environment variables" in out.err and not out.out


def test_bad_settings_end_before_any_device(capsys, monkeypatch):
    monkeypatch.setattr(train_gpt, "Runtime", lambda *_: pytest.fail("a device was touched"))
    environ = {"SEED": "x", "NUM_LAYERZ": "3", "RANK": "0", "WORLD_SIZE": "5"}
    assert train_gpt.main([], environ) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: 3 bad settings")
    assert all(word in err for word in ("SEED=x", "NUM_LAYERZ=3", "5 ranks"))


def test_dry_run_needs_no_data_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for preset, count, variant in (("", 36011617, "sp8192"), ("pr1218", 34401371, "sp4096"),
                                   ("pr414", 26993756, "sp1024")):
        environ = dict(DATA_PATH="nowhere", TOKENIZER_PATH="nowhere", PRESET=preset)
        assert train_gpt.main(["--dry-run"], environ) == 0
        said = capsys.readouterr().out
        assert f"model_params:{count}" in said.splitlines() and "settings are good" in said
        assert "data: not ready: DATA_PATH=nowhere: no fineweb_train_*.bin" in said
        assert f"cached_challenge_fineweb.py --variant {variant} downloads" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("changes, said", [
    ({}, "2 training shards and 1024 validation targets"),
    ({"VOCAB_SIZE": "4096"}, "not ready: TOKENIZER_PATH="),
    ({"TOKENIZER_PATH": "nowhere"}, "not ready: TOKENIZER_PATH=nowhere: no such file")])
def test_dry_run_checks_the_data_that_are_there(corpus, changes, said, capsys):
    environ = {**TINY, "DATA_PATH": corpus.folder, "TOKENIZER_PATH": corpus.model, **changes}
    assert train_gpt.main(["--dry-run"], {k: str(v) for k, v in environ.items()}) == 0
    line, = [x for x in capsys.readouterr().out.splitlines() if x.startswith("data: ")]
    assert said in line


@pytest.mark.parametrize("environ, said", [
    (dict(), "adapters of rank 64"), (dict(TTT_CHUNK_TOKENS="65536"), "weights, sgd"),
    (dict(TTT_CHUNK_TOKENS="65536", TTT_LORA_RANK="8"), "adapters of rank 8"),
    (dict(PRESET="pr490"), "weights, adamw"), (dict(TTT_ENABLED="0"), "off")])
def test_dry_run_says_what_adapts(environ, said, capsys):
    """A setting of weights implies no adapters: nobody should find that out from the score."""
    assert train_gpt.main(["--dry-run"], environ) == 0
    assert f"TTT:{said}" in capsys.readouterr().out.splitlines()


def test_import_has_no_side_effects(tmp_path):
    check = """if True:
        import os, random, sys, threading, signal
        import numpy, torch
        import torch.distributed as dist
        def state():
            return (dict(os.environ), os.getcwd(), os.listdir("."), threading.active_count(),
                    random.getstate()[1], numpy.random.get_state()[1].tolist(),
                    torch.get_rng_state().tolist(), torch.get_num_threads(),
                    torch.get_default_dtype(), torch.get_float32_matmul_precision(),
                    torch.is_grad_enabled(), signal.getsignal(signal.SIGHUP))
        before = state()
        sys.path.insert(0, sys.argv[1])
        import train_gpt
        assert state() == before, [(a, b) for a, b in zip(before, state()) if a != b]
        assert not dist.is_initialized() and not torch.cuda.is_initialized()
        """
    done = subprocess.run([sys.executable, "-B", "-c", check, ROOT], cwd=tmp_path, text=True,
                          env=clean_environ(), capture_output=True, timeout=60)
    assert done.returncode == 0 and not done.stdout and not done.stderr, done.stdout + done.stderr
