"""What the tests share: a tiny corpus with its tokenizer, tiny settings, ways to run the script."""

import contextlib
import errno
import io
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run here as Python
# before torch: the suite runs in two processes, which must not fight for cores
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import sentencepiece  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "train_gpt.py"
sys.path[:0] = [str(ROOT), str(ROOT / "data"), str(ROOT / "records")]
import train_gpt  # noqa: E402

# The same examples in every run, so that a change alone decides whether the suite passes.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

VOCAB = 320
# A model of three blocks that trains in a second, with every part of sp1024 switched on.
TINY = dict(
    PRESET="sp1024", VOCAB_SIZE=VOCAB, DEVICE="cpu", TRAIN_SEQ_LEN=32, TRAIN_BATCH_TOKENS=384,
    NUM_LAYERS=3,
    MICRO_BATCH_TOKENS=384, MODEL_DIM=32, NUM_HEADS=4, NUM_KV_HEADS=2, ROPE_DIMS=4, XSA_LAST_N=3,
    ROPE_NTK_REFERENCE=16, BIGRAM_VOCAB_SIZE=64, BIGRAM_DIM=8, VE_DIM=8, VE_LAYERS="1,2",
    ITERATIONS=6, MAX_WALLCLOCK_SECONDS=0, WARMUP_STEPS=1, WARMDOWN_ITERS=3, VAL_LOSS_EVERY=0,
    MUON_MOMENTUM_WARMUP_STEPS=4, TRAIN_LOG_EVERY=5, EVAL_STRIDE=8, EVAL_BATCH_SEQS=8,
    TTT_LORA_RANK=0, TTT_CHUNK_TOKENS=96, TTT_BATCH_SEQS=16, TTT_EPOCHS=2, TTT_LR=0.05)
WORDS = ("river stone quiet lamp orchard winter copper signal harbor meadow paper engine violet "
         "thunder basket garden mirror candle forest bridge window silver ocean timber castle "
         "rocket planet hollow ribbon marble café naïve 北京").split()


# A shell lets what runs in its background ignore SIGINT, and so would the script.
signal.signal(signal.SIGINT, signal.default_int_handler)
HANDLERS = {number: signal.getsignal(number) for number in train_gpt.SIGNALS}


@pytest.fixture(autouse=True)
def handlers():
    """A run's handling of signals ends with its test. That of a run in a module's fixture ends
    before the test: a forked pool that is terminated must not raise what a run raises."""
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)
    yield
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


def clean_environ(**variables):
    """This process's environment without any setting of the script, plus `variables`; one thread,
    so that sums repeat."""
    known = {f.name.upper() for f in train_gpt.fields(train_gpt.Settings)}
    base = {k: v for k, v in os.environ.items() if k not in known
            and not k.startswith("TORCHELASTIC")}
    return {**base, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in variables.items()}}


def write_shard(path, tokens):
    header = np.zeros(256, "<i4")
    header[:3] = train_gpt.SHARD_MAGIC, train_gpt.SHARD_VERSION, len(tokens)
    Path(path).write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())


def write_jsonl(path, texts, field="text"):
    lines = (json.dumps({field: text}) + "\n" for text in texts)
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with two train shards, one validation shard (1,031 tokens) and the tokenizer; and
    the documents."""
    folder, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    documents = [" ".join(rng.choice(WORDS, rng.integers(5, 40))) + f" {rng.integers(10**6)}."
                 for _ in range(400)]
    (folder / "text.txt").write_text("\n".join(documents), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tiny"), vocab_size=VOCAB,
        model_type="bpe", byte_fallback=True, split_digits=True, add_dummy_prefix=False, pad_id=0,
        bos_id=1, eos_id=2, unk_id=3, hard_vocab_limit=True, minloglevel=2, num_threads=1)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tiny.model"))
    tokens = [t for ids in tokenizer.encode(documents) for t in [1, *ids]]
    write_shard(folder / "fineweb_val_000000.bin", tokens[:1031])
    write_shard(folder / "fineweb_train_000000.bin", tokens[1031:6031])
    write_shard(folder / "fineweb_train_000001.bin", tokens[6031:9031])
    return SimpleNamespace(folder=folder, tokenizer=tokenizer, model=folder / "tiny.model",
                           tokens=np.array(tokens), documents=documents)


@pytest.fixture
def tiny(corpus):
    """tiny(NAME=value, ...) → Settings of the tiny model, resolved as from the environment."""
    def make(**variables):
        environ = {**TINY, "DATA_PATH": corpus.folder, "TOKENIZER_PATH": corpus.model, **variables}
        return train_gpt.resolve_settings({k: str(v) for k, v in environ.items()})[0]
    return make


def environment(corpus, **variables):
    """The environment of a tiny run."""
    return clean_environ(**{**TINY, "DATA_PATH": corpus.folder, "TOKENIZER_PATH": corpus.model,
                            "RUN_ID": "run", **variables})


def launched(ranks=1, script=SCRIPT):
    """The command of the script; by torchrun where there are several ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [sys.executable, *(torchrun if ranks > 1 else []), str(script)]


def left(out, returncode=0, stdout="", stderr=""):
    """What a run said and what it left in its folder: .result (logs/run.json), .log, .content (the
    artifact's bytes); None where not written."""
    places = dict(result="logs/run.json", log="logs/run.txt", content="final_model.ptz")
    out = Path(out)
    found = {name: (out / path).read_bytes() if (out / path).is_file() else None
             for name, path in places.items()}
    found["result"] = found["result"] and json.loads(found["result"])
    found["log"] = (found["log"] or b"").decode()
    return SimpleNamespace(out=out, returncode=returncode, stdout=stdout, stderr=stderr,
                           artifact=out / "final_model.ptz", **found)


def run_main(corpus, OUT_DIR, **variables):
    """A tiny run inside of this process, and what it left."""
    torch.set_num_threads(1)
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        status = train_gpt.main([], environment(corpus, OUT_DIR=OUT_DIR, **variables))
    return left(OUT_DIR, status, stdout.getvalue(), stderr.getvalue())


def script_runner(corpus, folder):
    """run(NAME=value, ...) → run_main in this folder, or in OUT_DIR; by a process of its own where
    there are several ranks or another script."""
    def run(ranks=1, script=None, OUT_DIR=folder, **variables):
        if ranks == 1 and not script:
            return run_main(corpus, OUT_DIR, **variables)
        environ = environment(corpus, OUT_DIR=OUT_DIR, **variables)
        done = subprocess.run(launched(ranks, script or SCRIPT), env=environ, cwd=folder,
                              capture_output=True, text=True, timeout=300)
        return left(OUT_DIR, done.returncode, done.stdout, done.stderr)
    return run


def as_rank(rank, ranks, port, said, act, arguments):
    """What a process of on_ranks does. It ends at once: how libraries take their threads down is
    not what is tested."""
    with open(said, "a", buffering=1) as sys.stdout:
        sys.stderr, status = sys.stdout, 1
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        try:
            status = act(*arguments)
        except BaseException:
            traceback.print_exc()
    os._exit(status or 0)


def on_ranks(ranks, said, act, *arguments):
    """act(*arguments) on so many ranks, with gloo between them. They are forked from a process that
    has imported PyTorch once. `said` is a file for their output."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "torch.distributed"])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started = [context.Process(target=as_rank, args=(rank, ranks, port, said, act, arguments),
                               daemon=True) for rank in range(ranks)]
    for process in started:
        process.start()
    for process in started:
        process.join(200)
    assert [process.exitcode for process in started] == [0] * ranks, Path(said).read_text()


def disk_full(patch, word):
    """The disk is full when a file with `word` in its path is flushed."""
    real = os.fsync

    def fsync(number):
        if word in os.readlink(f"/proc/self/fd/{number}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(number)
    patch.setattr(os, "fsync", fsync)


@torch.no_grad()
def a_model(s, noise=0.1, **kernels):
    """A model with noise on its initial weights, the same each time."""
    torch.manual_seed(5)
    model = train_gpt.GPT(s, kernels=train_gpt.Kernels(**kernels))
    train_gpt.init_weights(model, s)
    for p in model.parameters():
        p.add_(noise * torch.randn_like(p))
    return model


class Device(str):
    """A CPU that says it is of another type."""


def a_rank(kind="cpu", **more):
    """What a choice of kernels needs of a Runtime; `lines` is its log."""
    device = Device("cpu")
    device.type = kind
    told = dict(device=device, compile=False, world_size=1, rank=0, lines=[], any_rank=bool,
                dtype=torch.bfloat16 if kind == "cuda" else torch.float32,
                compiled=lambda function, **how: function)
    rank = SimpleNamespace(**{**told, **more})
    rank.log = rank.lines.append
    return rank


@pytest.fixture
def run_script(corpus, tmp_path):
    """script_runner of this test's own folder."""
    return script_runner(corpus, tmp_path)


@pytest.fixture(scope="module")
def run_once(corpus, tmp_path_factory):
    """script_runner for runs that several tests of a file look at."""
    return script_runner(corpus, tmp_path_factory.mktemp("runs"))


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in one order, so that equal inputs give equal bits."""
    torch.set_num_threads(1)
