"""Settings: which value wins, what is refused and in which words, what is left alone, and that no setting is dead."""

import ast
import itertools
import re
import subprocess
import sys
import time

import pytest
from conftest import ROOT, clean_environ
from hypothesis import example, given, settings as hypothesis_settings, strategies as st

import train_gpt
from train_gpt import ALIASES, PRESETS, REFUSED, Settings, UserError, fields, parse_value, resolve_settings

SPECS = {f.name.upper(): f for f in fields(Settings)}
DEFAULTS = {f.name: f.default for f in fields(Settings)}
TREE = ast.parse(train_gpt.SOURCE.decode())  # as imported, even if somebody edits the file meanwhile


def values(s):
    return {f.name: getattr(s, f.name) for f in fields(s)}


def problems(**variables):
    """The lines of the one message that these variables earn."""
    with pytest.raises(UserError) as caught:
        resolve_settings({k: str(v) for k, v in variables.items()})
    head, *lines = str(caught.value).splitlines()
    assert re.match(rf"{len(lines)} bad settings? ", head) and "--help" in head
    return [line.strip() for line in lines]


# -- which value wins

def test_empty_environment_gives_the_defaults():
    s, explicit = resolve_settings({})
    assert values(s) == DEFAULTS and explicit == set()


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_changes_its_row_and_nothing_else(preset):
    s, explicit = resolve_settings({"PRESET": preset})
    canonical = {("value_residual", "1"): "pair", ("gated_attention", "1"): "head"}
    row = {k: canonical.get((k, v), v) for k, v in PRESETS[preset].items()}
    assert values(s) == {**DEFAULTS, **row, "preset": preset} and explicit == {"PRESET"}


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_row_is_as_good_as_variables(preset):
    """Known names, the declared type, inside the range: a row is not a way around the checks."""
    for name, value in PRESETS[preset].items():
        spec = SPECS[name.upper()]
        assert type(value) is type(spec.default) and parse_value(spec, value) == value, name


@pytest.mark.parametrize("preset", PRESETS)
def test_explicit_wins_over_preset(preset):
    """Every name of the row set back to its default undoes the preset."""
    back = {name.upper(): str(DEFAULTS[name]) for name in PRESETS[preset]}
    s, explicit = resolve_settings({"PRESET": preset, **back})
    assert values(s) == {**DEFAULTS, "preset": preset} and explicit == {"PRESET", *back}


@pytest.mark.parametrize("name", SPECS)
def test_every_variable_reaches_its_field(name):
    """A second valid value of each setting is taken over as it was written, and no other field moves."""
    spec = SPECS[name]
    other = {"TRAIN_SEQ_LEN": 1024, "NUM_LAYERS": 12, "MODEL_DIM": 1024, "NUM_HEADS": 16, "NUM_KV_HEADS": 2, "ROPE_DIMS": 8,
             "PRESET": "demo", "VE_LAYERS": "3", "MICRO_BATCH_TOKENS": 2048, "TRAIN_BATCH_TOKENS": 2048, "BOS_TOKEN": 2,
             "XSA_LAST_N": 4, "UNIQUE_LAYERS": 11, "EVAL_SEQ_LEN": 4096, "SCORES_PATH": "a/x.npy"}.get(name)
    if other is None and spec.metadata["choices"]:
        other = [c for c in spec.metadata["choices"] if c not in (spec.default, "1")][0]
    if other is None:
        low, high = spec.metadata["low"], spec.metadata["high"]
        other = (spec.default + "x" if isinstance(spec.default, str) else spec.default * 2 or (high or 4) / 2)
        other = min(other, high) if high is not None else other
        other = (low + other) / 2 if other == spec.default else other
        other = type(spec.default)(other)
    assert other != spec.default
    s, explicit = resolve_settings({name: str(other)})
    base = {**DEFAULTS, **PRESETS.get(s.preset, {})}
    assert values(s) == {**base, spec.name: other} and explicit == {name}


def test_stored_settings_stand_between_variable_and_default():
    stored = {"seed": 5, "num_layers": 12, "ttt_lr": 0.5}
    s, explicit = resolve_settings({"TTT_LR": "0.25"}, stored)
    assert values(s) == {**DEFAULTS, "seed": 5, "num_layers": 12, "ttt_lr": 0.25} and explicit == {"TTT_LR"}


@pytest.mark.parametrize("text, value", [("1", 1), ("0", 0), ("true", 1), ("False", 0), (" 1 ", 1)])
def test_flags_read_words_and_digits(text, value):
    assert resolve_settings({"LN_SCALE": text})[0].ln_scale == value


@pytest.mark.parametrize("environ, name, value", [
    ({"VALUE_RESIDUAL": "1"}, "value_residual", "pair"),
    ({"GATED_ATTENTION": "1"}, "gated_attention", "head"),
    ({"VRL_ENABLED": "1"}, "value_residual", "sigmoid"),
    ({"VRL_ENABLED": "0"}, "value_residual", "0"),
    ({"VRL_ENABLED": "1", "VALUE_RESIDUAL": "half"}, "value_residual", "half"),
    ({"VALUE_RESIDUAL": "half", "VRL_ENABLED": "1"}, "value_residual", "half"),
    ({"GA_ENABLED": "1"}, "gated_attention", "head"),
    ({"GA_ENABLED": "0"}, "gated_attention", "0"),
    ({"WEIGHT_DECAY": "0.125"}, "muon_wd", 0.125),
    ({"WEIGHT_DECAY": "0.125", "MUON_WD": "0.25"}, "muon_wd", 0.25),
    ({"QAT_THRESHOLD": "0.5"}, "late_qat_threshold", 0.5),
    ({"QAT_THRESHOLD": "0.1", "LATE_QAT": "1"}, "late_qat_threshold", 0.1),  # both, as one published command has it
    ({"LATE_QAT": "1", "QAT_THRESHOLD": "0.1"}, "late_qat_threshold", 0.1),
    ({"QAT_THRESHOLD": "0.1", "LATE_QAT": "0"}, "late_qat_threshold", 0.0),  # the threshold is there, the switch is off
    ({"LATE_QAT": "0", "QAT_THRESHOLD": "0.1"}, "late_qat_threshold", 0.0),
    ({"TTT_PERLAYER_LR": "0"}, "ttt_fc_lr_mult", 1.0),
])
def test_published_names_stand_for_ours(environ, name, value):
    s, _ = resolve_settings(environ)
    assert values(s) == {**DEFAULTS, name: value}


def test_alias_wins_over_preset(monkeypatch):
    monkeypatch.setitem(PRESETS, "row", dict(muon_wd=0.5))
    assert resolve_settings({"PRESET": "row"})[0].muon_wd == 0.5
    assert resolve_settings({"PRESET": "row", "WEIGHT_DECAY": "0.25"})[0].muon_wd == 0.25


def test_aliases_point_at_settings():
    assert not set(ALIASES) & set(SPECS)
    for stands_for in ALIASES.values():
        for row in stands_for.values() if isinstance(stands_for, dict) else [{stands_for: str(getattr(Settings(), stands_for.lower()))}]:
            for target, value in row.items():
                parse_value(SPECS[target], value)


def targets(name):
    stands_for = ALIASES[name]
    return {t for row in stands_for.values() for t in row} if isinstance(stands_for, dict) else {stands_for}


@pytest.mark.parametrize("one, other", [(a, b) for a in ALIASES for b in ALIASES if a < b and targets(a) & targets(b)])
def test_order_of_variables_decides_nothing(one, other):
    """Two published names of one setting, such as LATE_QAT and QAT_THRESHOLD: what came last in the environment is no reason to win."""
    def outcome(environ):
        try:
            return values(resolve_settings(environ)[0])
        except UserError as problem:
            return str(problem)
    for a, b in itertools.product(*([*(ALIASES[n] if isinstance(ALIASES[n], dict) else ("0.1", "0.25"))] for n in (one, other))):
        assert outcome({one: a, other: b}) == outcome({other: b, one: a}), f"{one}={a} {other}={b}"


@pytest.mark.parametrize("name", REFUSED)
def test_published_names_without_effect_are_refused(name):
    """The value that changes nothing passes; any other is told why it is not obeyed."""
    harmless, reason = REFUSED[name]
    assert values(resolve_settings({name: harmless})[0]) == DEFAULTS
    line, = problems(**{name: "7"})
    assert line.startswith(f"{name}=7:") and reason in line


# -- what is refused

def test_all_problems_in_one_message():
    lines = problems(MUON_MOMENTUM_WARMUP_START="092", WARMDRON_ITERS="3500", PRESET="fastest", NUM_LAYERS="eleven", SEED="-1",
                     SMEAR_GATE="maybe", VRL_ENABLED="yes", WEIGHT_DECAY="much", EVAL_STRIDE="4096", EVAL_ATTENTION="window")
    expected = [("MUON_MOMENTUM_WARMUP_START=092", "out of range", "0 to 0.9999"),
                ("WARMDRON_ITERS=3500", "did you mean WARMDOWN_ITERS?"), ("PRESET=fastest", "unknown", "demo"),
                ("NUM_LAYERS=eleven", "whole number", "blocks"), ("SEED=-1", "out of range", f"0 to {2**31 - 1}"),
                ("SMEAR_GATE=maybe", "must be one of 0, 1, bos"), ("VRL_ENABLED=yes", "must be one of 0, 1", "VALUE_RESIDUAL"),
                ("WEIGHT_DECAY=much", "not a number"), ("EVAL_STRIDE=4096", "exceeds", "2048")]
    assert len(lines) == len(expected)
    for first, *rest in expected:
        line, = [line for line in lines if line.startswith(first)]
        assert all(part in line for part in rest), line


@pytest.mark.parametrize("name", [n for n, f in SPECS.items() if not isinstance(f.default, str)])
def test_wrong_types_and_ranges_are_refused(name):
    spec = SPECS[name]
    low, high, whole = spec.metadata["low"], spec.metadata["high"], isinstance(spec.default, int)
    beyond = 1 if whole else 1e-6
    bad = ["", "x", "nan", "inf", "-inf", "1,5", "0x10"] + ["1.5", "1e3"] * whole
    bad += [low - beyond] if low is not None else []
    bad += [high + beyond] if high is not None else []
    for text in bad:
        with pytest.raises(ValueError, match="is not|out of range|must be one of"):
            parse_value(spec, text)
    for text in [spec.default, *(v for v in (low, high) if v is not None)]:
        assert parse_value(spec, str(text)) == text and type(parse_value(spec, str(text))) is type(spec.default)


@pytest.mark.parametrize("name", [n for n, f in SPECS.items() if f.metadata["choices"]])
def test_only_the_choices_are_taken(name):
    spec = SPECS[name]
    for choice in spec.metadata["choices"]:
        assert parse_value(spec, str(choice)) == choice
    assert "must be one of" in problems(**{name: "2" if "2" not in map(str, spec.metadata["choices"]) else "99"})[0]


def test_every_setting_states_unit_and_range():
    for name, spec in SPECS.items():
        assert spec.metadata["unit"] and spec.metadata["meaning"], name
        assert isinstance(spec.default, str) or spec.metadata["choices"] or spec.metadata["low"] is not None, name


def test_empty_number_is_refused_by_name():
    line, = problems(NUM_HEADS="")
    assert line.startswith("NUM_HEADS=:") and "whole number" in line


def test_empty_text_is_a_value():
    s, explicit = resolve_settings({"VE_LAYERS": "", "PRESET": "", "RUN_ID": " "})
    assert s.ve_blocks == [] and s.preset == "" and s.run_id == "" and explicit == {"VE_LAYERS", "PRESET", "RUN_ID"}


CONTRADICTIONS = [  # settings, each of them good, and the words of the one problem they make together
    (dict(MODEL_DIM=510, BIGRAM_VOCAB_SIZE=0), "MODEL_DIM=510 must be a multiple of NUM_HEADS=8"),
    (dict(NUM_KV_HEADS=3), "NUM_HEADS=8 must be a multiple of NUM_KV_HEADS=3"),
    (dict(MODEL_DIM=136, ROPE_DIMS=16), "MODEL_DIM/NUM_HEADS=17 must be even"),
    (dict(ROPE_DIMS=15), "ROPE_DIMS=15 must be even"),
    (dict(ROPE_DIMS=66), "at most MODEL_DIM/NUM_HEADS=64"),
    (dict(ROPE_DIMS=2), "cannot be stretched"),
    (dict(XSA_LAST_N=12), "XSA_LAST_N=12 exceeds"),
    (dict(UNIQUE_LAYERS=12), "UNIQUE_LAYERS=12 exceeds NUM_LAYERS=11"),
    (dict(TTT_FREEZE_BLOCKS=12), "TTT_FREEZE_BLOCKS=12 exceeds NUM_LAYERS=11"),
    (dict(BIGRAM_VOCAB_SIZE=1), "BIGRAM_VOCAB_SIZE=1 leaves no bucket"),
    (dict(BOS_TOKEN=1024), "BOS_TOKEN=1024 is outside of VOCAB_SIZE=1024"),
    (dict(TRAIN_BATCH_TOKENS=2049), "TRAIN_BATCH_TOKENS=2049 must be a multiple of TRAIN_SEQ_LEN=2048"),
    (dict(MICRO_BATCH_TOKENS=2047), "MICRO_BATCH_TOKENS=2047 must hold a row of TRAIN_SEQ_LEN=2048"),
    (dict(EVAL_STRIDE=2049, EVAL_ATTENTION="window"), "EVAL_STRIDE=2049 exceeds the scoring window of 2048"),
    (dict(EVAL_STRIDE=0), "TTT_ENABLED=1 scores with a full context"),
    (dict(TTT_CHUNK_TOKENS=2047, EVAL_ATTENTION="window"), "TTT_CHUNK_TOKENS=2047 must hold 2048 tokens, a row"),
    (dict(TTT_CHUNK_TOKENS=4095, EVAL_SEQ_LEN=4096, EVAL_ATTENTION="window"), "TTT_CHUNK_TOKENS=4095 must hold 4096 tokens"),
    (dict(TTT_CHUNK_TOKENS=5999, EVAL_ATTENTION="banded", EVAL_SEGMENT=6000), "TTT_CHUNK_TOKENS=5999 must hold 6000 tokens"),
    (dict(TTT_CHUNK_TOKENS=4095, EVAL_ATTENTION="banded"), "TTT_CHUNK_TOKENS=4095 must hold 4096 tokens"),  # twice the window
    (dict(ITERATIONS=0, MAX_WALLCLOCK_SECONDS=0), "ITERATIONS=0 and MAX_WALLCLOCK_SECONDS=0: nothing ends"),
    (dict(GPTQ=1, GPTQ_RESERVE_SECONDS=600), "GPTQ_RESERVE_SECONDS=600.0 leaves nothing of MAX_WALLCLOCK_SECONDS=600.0"),
    (dict(TTT_UNFREEZE_BLOCKS=12, TTT_PARAMS="tail"), "TTT_UNFREEZE_BLOCKS=12 exceeds NUM_LAYERS=11"),
    (dict(TTT_PARAMS="lora", TTT_LORA_MATRICES="q,gate"), "TTT_LORA_MATRICES=q,gate must name some of q, k, v, o, up, down"),
    (dict(TTT_PARAMS="lora", TTT_LORA_MATRICES=" , "), "must name some of q, k, v, o, up, down"),
    (dict(TTT_PARAMS="lora", TTT_OPTIMIZER="muon"), "TTT_PARAMS=lora: TTT_OPTIMIZER=muon is for whole matrices"),
    (dict(TTT_PARAMS="scalars", TTT_OPTIMIZER="muon"), "TTT_PARAMS=scalars: TTT_OPTIMIZER=muon is for whole matrices"),
    (dict(TRIGRAM_VOCAB_SIZE=1), "TRIGRAM_VOCAB_SIZE=1 leaves no bucket"),
    (dict(RUN_ID="../elsewhere"), "RUN_ID=../elsewhere is too long or no file name"),
    (dict(RUN_ID="é" * 101), "is too long or no file name: at most 200 bytes"),
    (dict(SCORES_PATH="scores.txt"), "SCORES_PATH=scores.txt must name a file .npy"),
    (dict(MODEL_DIM=16, ROPE_DIMS=0), "cannot be stretched"),  # every channel of a head of two is ROPE_DIMS=2
    (dict(VE_LAYERS="9,11"), "VE_LAYERS=9,11 must name different blocks of 0..10"),
    (dict(VE_LAYERS="9,-1"), "VE_LAYERS=9,-1 must name different blocks of 0..10"),
    (dict(VE_LAYERS="9,9"), "VE_LAYERS=9,9 must name different blocks of 0..10"),
    (dict(VE_LAYERS="9;10"), "VE_LAYERS=9;10 must be block numbers with commas between"),
]


@pytest.mark.parametrize("variables, words", CONTRADICTIONS, ids=lambda x: None if isinstance(x, str) else "-".join(x))
def test_contradictions_are_named(variables, words):
    for name, value in variables.items():
        parse_value(SPECS[name], value)  # each is fine alone
    lines = problems(**variables)
    assert any(words in line for line in lines), lines
    if "MODEL_DIM" not in variables:  # an odd width breaks several rules at once
        assert len(lines) == 1, lines


def test_every_contradiction_has_a_case():
    """The rows are read from the source, so that a new one without a case above is noticed."""
    function, = [n for n in TREE.body if isinstance(n, ast.FunctionDef) and n.name == "contradictions"]
    messages = [call.args[-1] for call in ast.walk(function) if isinstance(call, ast.Call) and (
        getattr(call.func, "id", "") == "need" or getattr(call.func, "attr", "") == "append")]
    messages = [m for m in messages if not isinstance(m, ast.Name)]
    said = [line for variables, _ in CONTRADICTIONS for line in problems(**variables)]
    assert len(messages) >= 17
    for message in messages:
        parts = [c.value for c in ast.walk(message) if isinstance(c, ast.Constant) and isinstance(c.value, str)]
        pattern = ".*".join(re.escape(part) for part in parts)
        assert any(re.search(pattern, line) for line in said), f"no case for: {' … '.join(parts)}"


@pytest.mark.parametrize("variables", [
    dict(TTT_ENABLED=0, EVAL_STRIDE=0), dict(TTT_ENABLED=0, TTT_CHUNK_TOKENS=2), dict(ROPE_DIMS=2, ROPE_NTK_REFERENCE=0),
    dict(ITERATIONS=0), dict(MAX_WALLCLOCK_SECONDS=0), dict(VE_LAYERS="99", VE_ENABLED=0), dict(VE_LAYERS=" 9, 10 "),
    dict(EVAL_STRIDE=2048), dict(XSA_LAST_N=11, UNIQUE_LAYERS=11, TTT_FREEZE_BLOCKS=11), dict(BIGRAM_VOCAB_SIZE=2),
    dict(EVAL_SEQ_LEN=1024, EVAL_STRIDE=1024)])
def test_borders_of_the_contradictions_are_allowed(variables):
    resolve_settings({k: str(v) for k, v in variables.items()})


# -- misspelt names, and names that are not ours

# What torchrun, NCCL, CUDA, OpenMP, a shell, a batch system, a container or an editor set.
ORDINARY = """
RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK ROLE_NAME ROLE_WORLD_SIZE MASTER_ADDR MASTER_PORT
TORCHELASTIC_RESTART_COUNT TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_RUN_ID TORCHELASTIC_USE_AGENT_STORE TORCHELASTIC_ERROR_FILE
TORCH_NCCL_ASYNC_ERROR_HANDLING TORCH_LOGS TORCH_HOME TORCHINDUCTOR_CACHE_DIR TORCH_CUDA_ARCH_LIST TORCH_COMPILE_DEBUG
PYTORCH_CUDA_ALLOC_CONF PYTORCH_ALLOC_CONF PYTORCH_VERSION TRITON_CACHE_DIR NCCL_DEBUG NCCL_P2P_DISABLE NCCL_IB_HCA NCCL_SOCKET_IFNAME
NCCL_VERSION NCCL_NVLS_ENABLE CUDA_VISIBLE_DEVICES CUDA_HOME CUDA_DEVICE_ORDER CUDA_DEVICE_MAX_CONNECTIONS CUDA_LAUNCH_BLOCKING
CUDA_VERSION CUDNN_VERSION CUBLAS_WORKSPACE_CONFIG NVIDIA_VISIBLE_DEVICES NVIDIA_DRIVER_CAPABILITIES NVIDIA_REQUIRE_CUDA NV_CUDA_LIB_VERSION
OMP_NUM_THREADS OMP_PROC_BIND MKL_NUM_THREADS KMP_AFFINITY OPENBLAS_NUM_THREADS NUMEXPR_MAX_THREADS GLOO_SOCKET_IFNAME UCX_TLS
FI_PROVIDER OMPI_COMM_WORLD_RANK PMI_RANK PMIX_RANK OPAL_PREFIX MPI_HOME HF_HOME HF_TOKEN HF_HUB_CACHE HF_DATASETS_CACHE
TRANSFORMERS_CACHE TOKENIZERS_PARALLELISM WANDB_MODE PYTHONPATH PYTHONUNBUFFERED PYTHONHASHSEED PYTHONDONTWRITEBYTECODE PYTHONSTARTUP
VIRTUAL_ENV VIRTUAL_ENV_PROMPT CONDA_PREFIX CONDA_DEFAULT_ENV CONDA_SHLVL CONDA_EXE PIP_CACHE_DIR UV_CACHE_DIR PYENV_ROOT
PATH HOME USER LOGNAME SHELL SHLVL PWD OLDPWD TERM TERM_PROGRAM COLORTERM LANG LANGUAGE LC_ALL LC_CTYPE TZ TMPDIR TEMP TMP EDITOR VISUAL
PAGER LESS LESSOPEN LESSCLOSE MANPATH MANPAGER INFOPATH HOSTNAME HOSTTYPE OSTYPE MACHTYPE HISTFILE HISTSIZE HISTCONTROL PS1 PS2
PROMPT_COMMAND BASH_ENV BASH_VERSION BASHOPTS SHELLOPTS COLUMNS LINES UID EUID PPID IFS LS_COLORS MAIL DISPLAY WAYLAND_DISPLAY XAUTHORITY
TMUX TMUX_PANE STY SUDO_USER SUDO_UID SUDO_COMMAND SSH_CLIENT SSH_CONNECTION SSH_TTY SSH_AUTH_SOCK GPG_TTY XDG_RUNTIME_DIR
XDG_SESSION_ID XDG_DATA_DIRS DBUS_SESSION_BUS_ADDRESS LD_LIBRARY_PATH LD_PRELOAD LIBRARY_PATH CPATH PKG_CONFIG_PATH CC CXX CFLAGS
CXXFLAGS LDFLAGS MAKEFLAGS CMAKE_PREFIX_PATH SLURM_JOB_ID SLURM_PROCID SLURM_LOCALID SLURM_NTASKS SLURM_NODELIST SLURM_CPUS_PER_TASK
SLURM_GPUS SLURM_STEP_ID SBATCH_PARTITION SRUN_DEBUG PBS_JOBID LSB_JOBID KUBERNETES_SERVICE_HOST KUBERNETES_PORT DOCKER_HOST
DOCKER_CONFIG DEBIAN_FRONTEND CONTAINER_ID RUNPOD_POD_ID RUNPOD_GPU_COUNT PUBLIC_KEY JUPYTER_TOKEN CI GITHUB_ACTIONS GITHUB_RUN_ID
GITHUB_SHA RUNNER_OS RUNNER_TEMP HTTP_PROXY HTTPS_PROXY NO_PROXY SSL_CERT_FILE REQUESTS_CA_BUNDLE CURL_CA_BUNDLE AWS_REGION
AWS_DEFAULT_REGION GOOGLE_APPLICATION_CREDENTIALS NVM_DIR JAVA_HOME GOPATH CARGO_HOME RUSTUP_HOME INVOCATION_ID JOURNAL_STREAM
SYSTEMD_EXEC_PID PYTEST_CURRENT_TEST PYTEST_VERSION COVERAGE_FILE MPLBACKEND QT_QPA_PLATFORM MODULEPATH LOADEDMODULES
""".split()


def test_ordinary_environment_is_left_alone():
    assert len(ORDINARY) > 80
    s, explicit = resolve_settings({**dict.fromkeys(ORDINARY, "x"), "_": "x", "no_proxy": "x", "BASH_FUNC_which%%": "x"})
    assert values(s) == DEFAULTS and explicit == set()


@pytest.mark.parametrize("prefix", train_gpt.FOREIGN_PREFIXES)
def test_foreign_prefixes_are_left_alone_however_close(prefix):
    name = prefix + "MUON_MOMENTUM_WARMUP_STEPS"
    assert values(resolve_settings({name: "1"})[0]) == DEFAULTS and problems(**{"X_" + name[len(prefix):]: "1"})


LONG = sorted(name for name in [*SPECS, *ALIASES, *REFUSED] if len(name) >= 8)


@hypothesis_settings(deadline=None, database=None, max_examples=150)
@given(st.sampled_from(LONG), st.sampled_from(["drop", "swap", "replace", "insert"]), st.integers(0, 99),
       st.sampled_from("ABCDEFGHIJKLMNOPQRSTUVWXYZ_"))
@example("WARMDOWN_ITERS", "replace", 6, "R")
def test_one_letter_typos_are_reported(name, how, place, letter):
    i = place % len(name)
    typo = {"drop": name[:i] + name[i + 1:], "swap": name[:i] + name[i:i + 2][::-1] + name[i + 2:],
            "replace": name[:i] + letter + name[i + 1:], "insert": name[:i] + letter + name[i:]}[how]
    if typo in SPECS or typo in ALIASES or typo in REFUSED:
        return
    line, = problems(**{typo: "1"})
    assert line.startswith(f"{typo}=1: no such setting")


@pytest.mark.parametrize("name", ["TTT_WARMUP_PASSES", "MUON_NESTEROV", "EMA_START_FRACTION", "SWA_FOREVER", "QAT_AFTER_STEP"])
def test_unknown_names_of_our_families_are_reported(name):
    assert problems(**{name: "1"})[0].startswith(f"{name}=1: no such setting")


# -- ranks

@pytest.mark.parametrize("environ, ranks", [({}, (0, 1, 0)), ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (5, 8, 1))])
def test_ranks_are_read(environ, ranks):
    assert train_gpt.launched_ranks(environ) == ranks


@pytest.mark.parametrize("environ", [dict(RANK="1"), dict(RANK="8", WORLD_SIZE="8"), dict(RANK="-1"), dict(WORLD_SIZE="two"),
                                     dict(LOCAL_RANK="-1"), dict(WORLD_SIZE="0")])
def test_impossible_ranks_are_refused(environ):
    with pytest.raises(UserError, match=", ".join(f"{k}={v}" for k, v in environ.items())):
        train_gpt.launched_ranks(environ)


# -- the command line

def test_help_prints_every_setting_once(capsys):
    assert train_gpt.main(["--help"], {}) == 0
    out = capsys.readouterr().out
    for name, spec in SPECS.items():
        lines = [line for line in out.splitlines() if line.startswith(f"  {name}=")]
        assert len(lines) == 1 and lines[0].startswith(f"  {name}={spec.default}  {spec.metadata['meaning']} ["), name
        assert spec.metadata["unit"] in lines[0] and spec.metadata["off"] in lines[0]
    assert all(preset in out for preset in PRESETS)


def test_unknown_flags_are_refused(capsys):
    assert train_gpt.main(["--seed=3", "--dry-run"], {}) == 2
    out = capsys.readouterr()
    assert "--seed=3" in out.err and not out.out


def test_bad_settings_end_before_any_device(capsys, monkeypatch):
    monkeypatch.setattr(train_gpt, "Runtime", lambda *_: pytest.fail("a device was touched"))
    assert train_gpt.main([], {"SEED": "x", "NUM_LAYERZ": "3"}) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: 2 bad settings") and "SEED=x" in err and "NUM_LAYERZ=3" in err


ANCESTORS = [(dict(GATED_ATTENTION=0, VALUE_RESIDUAL=0), 26_993_756),
             (dict(GATED_ATTENTION=0, VALUE_RESIDUAL=0, BIGRAM_VOCAB_SIZE=1536), 26_928_220),
             (dict(GATED_ATTENTION=0, VALUE_RESIDUAL="sigmoid"), 26_993_766),
             (dict(VE_ENABLED=0, BIGRAM_VOCAB_SIZE=4096), 27_137_221),
             (dict(GATED_ATTENTION=0, VALUE_RESIDUAL=0, UNIQUE_LAYERS=10, XSA_LAST_N=4), 24_634_452)]


@pytest.mark.parametrize("variables, count", ANCESTORS)
def test_ancestor_shapes_have_their_parameter_counts(variables, count):
    s, _ = resolve_settings({k: str(v) for k, v in variables.items()})
    assert sum(train_gpt.parameter_counts(s).values()) == count


def test_dry_run_needs_no_data_and_no_time(tmp_path):
    variables, count = ANCESTORS[0]
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-B", ROOT / "train_gpt.py", "--dry-run"], cwd=tmp_path, capture_output=True, text=True,
                          env=clean_environ(**variables, DATA_PATH="nowhere", TOKENIZER_PATH="nowhere"), timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"model_params:{count}" in done.stdout.splitlines() and "settings are good" in done.stdout
    assert time.monotonic() - started < 60 and not list(tmp_path.iterdir())


def test_import_has_no_side_effects(tmp_path):
    check = """if True:
        import os, random, sys, threading
        import numpy, torch
        import torch.distributed as dist
        def state():
            return (dict(os.environ), os.getcwd(), os.listdir("."), threading.active_count(), random.getstate()[1],
                    numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), torch.get_num_threads(),
                    torch.get_default_dtype(), torch.get_float32_matmul_precision(), torch.is_grad_enabled(), dist.is_initialized(),
                    torch.cuda.is_initialized())
        before = state()
        sys.path.insert(0, sys.argv[1])
        import train_gpt
        assert state() == before, [(a, b) for a, b in zip(before, state()) if a != b]
        assert not dist.is_initialized() and not torch.cuda.is_initialized()
        """
    done = subprocess.run([sys.executable, "-B", "-c", check, ROOT], cwd=tmp_path, capture_output=True, text=True,
                          env=clean_environ(), timeout=120)
    assert done.returncode == 0 and not done.stdout and not done.stderr, done.stdout + done.stderr


# -- the source

def test_environment_is_touched_by_main_alone():
    """os.environ is handed to main at the bottom of the file; everything else gets a mapping."""
    touching = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
    for node in TREE.body:
        for inner in ast.walk(node):
            if isinstance(inner, ast.Attribute) and getattr(inner.value, "id", "") == "os" and inner.attr in touching:
                assert isinstance(node, ast.If) and "__name__" in ast.unparse(node.test), f"line {inner.lineno}"
            if isinstance(inner, ast.ImportFrom) and inner.module == "os":
                assert not touching & {a.name for a in inner.names}, f"line {inner.lineno}"


def read_names(*nodes):
    """Names x read as s.x or <anything>.s.x, self.x inside Settings itself."""
    owners = {"s", "self"}
    return {n.attr for node in nodes for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load) and (
        getattr(n.value, "id", "") in owners - {"self"} or getattr(n.value, "attr", "") == "s")}


def test_no_setting_is_dead():
    """Read outside of Settings and of the checks: directly, through a property of Settings, or by name through KINDS."""
    checks = ("Settings", "contradictions", "resolve_settings", "near_misses", "parse_value", "help_text")
    alive = read_names(*[n for n in TREE.body if getattr(n, "name", "") not in checks])
    alive |= {name for row in train_gpt.KINDS.values() for name in vars(row).values()}
    [declared] = [n for n in TREE.body if getattr(n, "name", "") == "Settings"]
    properties = {n.name: n for n in declared.body if isinstance(n, ast.FunctionDef)}
    assert properties.keys() <= alive, f"properties nobody reads: {properties.keys() - alive}"
    for function in properties.values():
        alive |= {n.attr for n in ast.walk(function) if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "self"}
    assert set(DEFAULTS) <= alive, f"settings nobody reads: {set(DEFAULTS) - alive}"
