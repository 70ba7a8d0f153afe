"""Bad input through main(): exit status 2, one error with the value and a way out, nothing lost.

A row of a table is a case: what is spoilt, the variables, and what the error must hold. Settings
have test_settings.py, shards alone test_data.py.
"""

import contextlib
import io
import json
import os
import re
import socket
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_gpt
from bench.fuzz import sealed
from conftest import disk_full, environment, launched, run_main, write_shard

LEAN = dict(WARMUP_STEPS=0, TTT_ENABLED=0, EVAL_STRIDE=0, ITERATIONS=2, GPTQ=0,
            VAL_LIMIT_TOKENS=128)
PREVIOUS = {"final_model.ptz": b"the artifact of yesterday", "logs/run.json": b"{}",
            "scores.npy": b"old scores"}


def case(name, spoil=None, words=(), **variables):
    """spoil(world) makes the trouble and may return variables; `words` stand in the error."""
    return pytest.param(spoil or (lambda w: None), variables, words, id=name)


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """The artifact and the last checkpoint of a finished run, as bytes."""
    done = run_main(corpus, tmp_path_factory.mktemp("trained"), CHECKPOINT_EVERY_SECONDS=1e-6,
                    **LEAN)
    checkpoint = done.out / "checkpoints" / "step_0000002.pt"
    return SimpleNamespace(artifact=done.content, checkpoint=checkpoint.read_bytes())


@pytest.fixture
def world(corpus, trained, tmp_path, monkeypatch):
    """A folder with data, the files of an earlier run in out/, and an artifact to spoil."""
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for path in corpus.folder.glob("*.bin"):
        (data / path.name).symlink_to(path)
    for name, content in PREVIOUS.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    artifact = tmp_path / "model.ptz"
    artifact.write_bytes(trained.artifact)
    return SimpleNamespace(tmp=tmp_path, data=data, out=out, artifact=artifact, trained=trained,
                           corpus=corpus, patch=monkeypatch)


def failed(world, variables):
    """main() with these variables; the one error that it ended with."""
    done = run_main(world.corpus, **{"OUT_DIR": world.out, "DATA_PATH": world.data, **LEAN,
                                     **variables})
    assert done.returncode == 2, done.stdout[-500:]
    assert re.match(r"error( on rank \d)?: ", done.stderr) and done.stderr.count("error") == 1
    return done.stderr


@pytest.fixture
def refused(world):
    def check(spoil, variables, words):
        variables = {**variables, **(spoil(world) or {})}
        error = failed(world, variables)
        missing = [word for word in words if str(word).format(w=world) not in error]
        assert not missing, f"{missing} not in: {error}"
        for name, content in PREVIOUS.items():
            numbered = world.out / name.replace(".json", ".1.json")  # where a run began
            kept = world.out / name if (world.out / name).exists() else numbered
            assert kept.read_bytes() == content, name
        assert not list(world.tmp.rglob("*.part")) and not (world.tmp / "owned").exists()
    return check


# -- data: what is done to a shard, and what is said

def shard(split, tokens):
    """Put these in the place of a split's first shard."""
    def spoil(w):
        path = w.data / f"fineweb_{split}_000000.bin"
        path.unlink()
        write_shard(path, tokens)
    return spoil


def remove(pattern):
    return lambda w: [p.unlink() for p in w.data.glob(pattern)] and None


def folder_for_shard(w):
    path = w.data / "fineweb_train_000000.bin"
    path.unlink()
    path.mkdir()


def dangling(w):
    path = w.data / "fineweb_val_000000.bin"
    path.unlink()
    path.symlink_to(w.tmp / "nowhere")


MEND = "data/cached_challenge_fineweb.py"
DATA = [
    case("folder missing", words=("DATA_PATH=nowhere", MEND), DATA_PATH="nowhere"),
    case("no validation shard", remove("*val*"), ("no fineweb_val_*.bin", "{w.data}", MEND)),
    case("no training shard", remove("*train*"), ("no fineweb_train_*.bin", "{w.data}", MEND)),
    *(row for split in ("train", "val") for row in (
        case(f"{split}: token of another vocabulary", shard(split, [1, *range(300, 321)] * 150),
             (f"fineweb_{split}_000000.bin: holds token 320", "VOCAB_SIZE=320", "TOKENIZER_PATH")),
        case(f"{split}: a hole", shard(split, [5, 6] * 512 + [0] * 2048),
             (f"fineweb_{split}_000000.bin: tokens 1024 to 2048 are all 0: damaged", MEND)))),
    case("train: damaged", shard("train", np.random.default_rng(0).integers(1, 320, 5000)), (
        "fineweb_train_000000.bin and TOKENIZER_PATH=", "do not belong together", MEND)),
    case("a folder", folder_for_shard, ("fineweb_train_000000.bin cannot be read: Is a dir", MEND)),
    case("dangling link", dangling, ("fineweb_val_000000.bin cannot be read: No such file", MEND)),
    case("training shorter than a row",
         lambda w: remove("*train_000001*")(w) or shard("train", [5] * 20)(w),
         ("no shard holds a row of TRAIN_SEQ_LEN=32",)),
    case("limit below a row", words=("VAL_LIMIT_TOKENS", "6 validation tokens"),
         VAL_LIMIT_TOKENS=5),
    case("validation without a byte", shard("val", [1] * 500), ("fineweb_val",)),
]


# -- tokenizers

def tokenizer(content):
    def spoil(w):
        path = w.tmp / "spoilt.model"
        path.write_bytes(content(w.corpus.model.read_bytes()))
        return {"TOKENIZER_PATH": path}
    return spoil


TOKENIZERS = [
    case("missing", words=("TOKENIZER_PATH=nowhere.model", MEND), TOKENIZER_PATH="nowhere.model"),
    case("text", tokenizer(lambda b: b"These are words, no model.\n" * 20), ("spoilt.model", MEND)),
    case("cut short", tokenizer(lambda b: b[: len(b) // 2]), ("spoilt.model",)),
    case("other size", words=("has 320 pieces where VOCAB_SIZE=512", "set VOCAB_SIZE=320"),
         VOCAB_SIZE=512),
]


# -- what only the model or the machine shows to be too much

TOO_MUCH = [
    case("a budget below the coarsest model", words=("ARTIFACT_BUDGET_BYTES=", "shrink the model"),
         ARTIFACT_BUDGET_BYTES=len(train_gpt.SHIPPED) + 100),
    case("a table too large for the machine", words=("memory", "BIGRAM_VOCAB_SIZE"),
         BIGRAM_VOCAB_SIZE=10**15),
    case("a compiler that fails", lambda w: w.patch.setattr(
        train_gpt.Runtime, "compiled", lambda *_: (lambda x: 1 / 0)),
         ("torch.compile does not work here: ZeroDivisionError", "COMPILE=0"), COMPILE=1)]


# -- artifacts

def artifact(content):
    def spoil(w):
        w.artifact.write_bytes(content(w.trained.artifact))
        return {"EVAL_ONLY": w.artifact}
    return spoil


def not_a_number(content):
    """One of its weights, under a right checksum."""
    stored, tensors, note = train_gpt.decode_artifact(content)
    next(t.codes for t in tensors.values() if t.bits == 16).view(-1)[0] = float("nan")
    s = train_gpt.replace(train_gpt.Settings(), **stored)
    return train_gpt.encode_artifact(tensors, s, note)


def artifact_of(**variables):
    return lambda w: {"EVAL_ONLY": w.artifact, **variables}


ARTIFACTS = [
    case("missing", words=("nowhere.ptz", "No such file", "name an artifact"),
         EVAL_ONLY="nowhere.ptz"),
    case("cut short", artifact(lambda b: b[:-1]),
         ("model.ptz", "damaged or cut short", "fetch it again")),
    case("a checkpoint", lambda w: w.artifact.write_bytes(w.trained.checkpoint)
         and {"EVAL_ONLY": w.artifact},
         ("model.ptz", "not an artifact")),
    case("weights not a number", artifact(not_a_number), ("nan",)),
    case("other settings", artifact_of(MODEL_DIM=48, MLP_BITS=5, LEAKY_SLOPE=0.25, VOCAB_SIZE=512,
                                       CODEC="lzma", MATRIX_LR=0.5),
         ("made with other settings", "MODEL_DIM=32, not 48", "MLP_BITS=", "LEAKY_SLOPE=",
          "VOCAB_SIZE=320, not 512", "CODEC=rans, not lzma", "not 0.5", "unset these")),
    case("TTT diverges", artifact_of(TTT_ENABLED=1, EVAL_STRIDE=8, TTT_LR=1e12,
                                     VAL_LIMIT_TOKENS=1000),
         ("TTT_LR",)),
]


# -- checkpoints that RESUME=auto finds

def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return sealed(buffer.getvalue())


def checkpoint(content):
    """Checkpoints are read before anything is written; the earlier files stay in any case."""
    def spoil(w):
        (w.out / "checkpoints").mkdir()
        (w.out / "checkpoints" / "step_0000002.pt").write_bytes(content(w.trained.checkpoint))
        return {"RESUME": "auto"}
    return spoil


def changed(**values):
    def again(content):
        state = torch.load(io.BytesIO(content[:-32]), weights_only=True)
        return saved({**state, **values})
    return again


FOREIGN = {
    "tensors missing": changed(model=[]),
    "other optimizers": changed(optimizers=dict(muon=[], adamw={})),
    "sealed nothing": lambda b: sealed(b""),
    "code": lambda b: sealed(b"cos\nsystem\n(S'touch owned'\ntR."),
    "an object": lambda b: saved(SimpleNamespace(a=1)), "a list": lambda b: saved([1, 2])}
CHECKPOINTS = [case(f"checkpoint: {name}", checkpoint(content), (
    "{w.out}/checkpoints/step_0000002.pt cannot be read or is no state of this run",
    "another OUT_DIR")) for name, content in FOREIGN.items()]


# -- places that cannot be written

def in_the_way(name):
    def spoil(w):
        (w.tmp / name).parent.mkdir(parents=True, exist_ok=True)
        (w.tmp / name).write_bytes(b"in the way")
        return {"OUT_DIR": w.tmp / "new"}
    return spoil


def taken_by_folder(name):
    def spoil(w):
        (w.tmp / "new" / name / "inner").mkdir(parents=True)
        return {"OUT_DIR": w.tmp / "new"}
    return spoil


PLACES = [
    case("OUT_DIR is a file", in_the_way("new"), ("OUT_DIR={w.tmp}/new cannot be used",)),
    case("logs is a file", in_the_way("new/logs"), ("OUT_DIR", "logs", "cannot be written")),
    case("the artifact's name is a folder's", taken_by_folder("final_model.ptz"),
         ("OUT_DIR={w.tmp}/new", "final_model.ptz is a folder")),
    case("the result's name is a folder's", taken_by_folder("logs/run.json"),
         ("{w.tmp}/new/logs/run.json is a folder",)),
    case("the scores' place", words=("SCORES_PATH=/proc/nobody/s.npy cannot be written",),
         SCORES_PATH="/proc/nobody/s.npy"),
    case("disk too small", lambda w: w.patch.setattr(
        train_gpt.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6)),
         ("OUT_DIR={w.out}", "1000000 bytes free", "make room")),
    case("disk full at the artifact", lambda w: disk_full(w.patch, "final_model"),
         ("{w.out}/final_model.ptz cannot be written", "No space left", "intact"))]


@pytest.mark.parametrize("spoil, variables, words", [
    *DATA, *TOKENIZERS, *TOO_MUCH, *ARTIFACTS, *CHECKPOINTS, *PLACES])
def test_refused(refused, spoil, variables, words):
    refused(spoil, variables, words)


def test_an_artifact_without_room_in_its_place_is_kept_elsewhere(world):
    """The hours of training are in it; the error says where it is and how to score it."""
    world.patch.setattr(train_gpt.tempfile, "gettempdir", lambda: str(world.tmp))
    disk_full(world.patch, "out/.final_model")
    error = failed(world, {})
    rescue = re.search(r"EVAL_ONLY=(\S+) scores it", error)[1]
    assert "No space left" in error and train_gpt.read_artifact(rescue)


def test_a_second_run_in_the_same_folder_is_refused(world):
    """It is told whose folder it is, and leaves no log; the first run goes on."""
    said, log_start = [], train_gpt.log_start

    def start_another(*arguments):
        said.append(failed(world, dict(RUN_ID="second")))
        log_start(*arguments)
    world.patch.setattr(train_gpt, "log_start", start_another)
    done = run_main(world.corpus, world.out, **LEAN)
    assert done.returncode == 0 and not list(world.out.rglob("second*"))
    assert re.search(f"OUT_DIR={world.out}: another run is at work there: process {os.getpid()} on "
                     r"\S+, RUN_ID=run; set another OUT_DIR", said[0]), said


def test_a_log_that_another_run_writes_is_left_to_it(world):
    """An evaluation takes no lock on OUT_DIR, but may have the RUN_ID of the training there."""
    said, log_start, again = [], train_gpt.log_start, dict(EVAL_ONLY=world.out / "final_model.ptz")
    assert run_main(world.corpus, world.out, **LEAN).returncode == 0
    with world.patch.context() as patch:
        def evaluate_too(*arguments):
            names = {*os.listdir(world.out / "logs")}
            said.append(failed(world, again))
            assert names == {*os.listdir(world.out / "logs")}
            log_start(*arguments)
        patch.setattr(train_gpt, "log_start", evaluate_too)
        assert run_main(world.corpus, world.out, **LEAN).returncode == 0
    assert f"RUN_ID=run: another run writes {world.out / 'logs' / 'run.txt'}" in said[0]
    assert run_main(world.corpus, world.out, **{**LEAN, **again}).returncode == 0


def test_the_home_of_an_unknown_user_is_a_folder_like_any_other(world, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    done = run_main(world.corpus, "~nobody-of-that-name/out", **LEAN)
    assert done.returncode == 0 and (tmp_path / "~nobody-of-that-name/out/logs/run.json").exists()


def test_a_log_a_console_and_a_triton_that_fail_do_not_end_training(corpus, tmp_path):
    """No file may hold more than half of the source, with which the log begins, as on a full disk;
    nobody reads the console; a broken package does not import."""
    (tmp_path / "triton.py").write_text("raise OSError('a broken triton')")
    environ = environment(corpus, OUT_DIR=tmp_path, PYTHONPATH=tmp_path, **LEAN)
    limited = ["bash", "-c", 'ulimit -f "$0"; exec "$@"', str(len(train_gpt.SHIPPED) // 2048)]
    process = subprocess.Popen([*limited, *launched()], env=environ, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    said = process.stdout.readline()
    process.stdout.close()  # as `| head -1`, or a terminal that is closed
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0 and not error and "run.txt: no more lines are written" in said
    assert json.loads((tmp_path / "logs" / "run.json").read_text())["steps"] == 2
    assert train_gpt.read_artifact(tmp_path / "final_model.ptz")
    with contextlib.redirect_stdout(None):  # closed before the start, as by `>&-`
        assert train_gpt.main(["--help"], {}) == 0


@pytest.mark.slow
def test_a_cache_that_cannot_be_made_is_said_in_words(corpus, tmp_path):
    environ = environment(corpus, OUT_DIR=tmp_path, TORCHINDUCTOR_CACHE_DIR="/proc/none", **LEAN)
    done = subprocess.run(launched(), capture_output=True, text=True, env=environ)
    assert done.returncode == 2 and "cannot make its cache: No such" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


# -- launching

@pytest.fixture
def port():
    """A port that somebody else listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


LAUNCHES = [
    (dict(WORLD_SIZE=2), ("WORLD_SIZE=2", "MASTER_ADDR", "torchrun")),
    (dict(WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT="many"),
     ("WORLD_SIZE=2", "many", "torchrun")),
    (dict(WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT="taken"),
     ("WORLD_SIZE=2", "{port}", "torchrun")),
    (dict(DEVICE="cuda", WORLD_SIZE=1), ("DEVICE=cuda", "DEVICE=cpu")),
]


@pytest.mark.parametrize("variables, words", LAUNCHES,
                         ids=["-".join(f"{k}={v}" for k, v in row[0].items()) for row in LAUNCHES])
def test_launches(world, port, variables, words):
    if variables.get("DEVICE") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    variables = {k: str(port) if v == "taken" else str(v) for k, v in variables.items()}
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"):
        world.patch.delenv(name, raising=False)
    world.patch.setattr(train_gpt.time, "sleep", lambda seconds: None)  # before rank 1 speaks
    launch = {"RANK": "0", **variables} if "WORLD_SIZE" in variables else variables
    for name, value in launch.items():  # the process group reads the process's environment
        world.patch.setenv(name, value)
    error = failed(world, launch)
    assert all(word.format(port=port) in error for word in words), error
    assert not torch.distributed.is_initialized()
