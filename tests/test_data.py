"""Data: what open_shard refuses, which tokens are validated, and the order of training rows."""

import mmap
import queue
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_shard

import train_gpt
from train_gpt import batches_of, Runtime, TrainStream, UserError, load_validation, open_shard

T = 8  # row length of the synthetic shards
# 5, 3, 0, 6 and 2 rows: with a rest, without, too short for one
LENGTHS = (5 * T + 1, 3 * T + 4, T, 7 * T, 2 * T + 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five train shards in which no token occurs twice, so that a row's first token says where it
    comes from."""
    path, begin = tmp_path_factory.mktemp("shards"), 0
    for i, n in enumerate(LENGTHS):
        write_shard(path / f"fineweb_train_{i:06d}.bin", np.arange(begin, begin + n))
        begin += n
    write_shard(path / "fineweb_val_000000.bin", np.arange(100))
    write_shard(path / "fineweb_val_000001.bin", np.arange(100, 203))
    return path


FILE_ROWS = [list(range(sum(LENGTHS[:i]) + r * T, sum(LENGTHS[:i]) + r * T + T + 1))
             # every row as it lies on disk
             for i, n in enumerate(LENGTHS) for r in range((n - 1) // T)]
EPOCH = len(FILE_ROWS)


@pytest.fixture
def stream(tiny, folder):
    """stream(NAME=value, ...) → TrainStream over the synthetic shards."""
    return lambda **variables: TrainStream(tiny(**{**dict(DATA_PATH=folder, VOCAB_SIZE=1000,
                                                          TRAIN_SEQ_LEN=T), **variables}))


def runtime(rank=0, world_size=1):
    """A place among ranks without any process group."""
    rt = object.__new__(Runtime)
    rt.rank, rt.world_size, rt.device = rank, world_size, torch.device("cpu")
    return rt


# -- shards

def header(magic=20240520, version=1, count=10):
    words = np.zeros(256, "<i4")
    words[:3] = magic, version, count
    return words.tobytes()


@pytest.mark.parametrize("content, words", [
    (b"", ("0 bytes", "1024")), (b"x" * 1023, ("1023 bytes", "1024")),
    (header() + b"\0" * 18, ("1042 bytes", "10 tokens = 1044 bytes")),
    (header() + b"\0" * 22, ("1046 bytes", "10 tokens = 1044 bytes")),
    (header(count=0), ("1024 bytes", "0 tokens")), (header(count=-1) + b"\0" * 20, ("-1 tokens",)),
    (header(magic=20240521) + b"\0" * 20, ("20240521", "20240520")),
    (header(version=2) + b"\0" * 20, ("20240520, 2", "20240520, 1"))])
def test_bad_shards_are_refused_by_path_and_value(tmp_path, content, words):
    path = tmp_path / "fineweb_train_000000.bin"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        open_shard(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert all(word in str(caught.value) for word in (*words, train_gpt.GET_DATA))


def test_a_shard_is_mapped_read_only(tmp_path):
    write_shard(tmp_path / "s.bin", [0, 258, 65535])
    found = open_shard(tmp_path / "s.bin")
    assert found.tolist() == [0, 258, 65535] and not found.flags.writeable


def test_shards_are_sorted_by_name(tiny, tmp_path):
    for name in ("fineweb_train_000010", "fineweb_train_000002", "fineweb_val_000000",
                 "fineweb_train_000001"):
        write_shard(tmp_path / f"{name}.bin", [1, 2, 3])
    (tmp_path / "fineweb_train_000003.bin.part").write_bytes(b"")
    names = [p.name for p in train_gpt.shard_paths(tiny(DATA_PATH=tmp_path), "train")]
    assert names == [f"fineweb_train_{i:06d}.bin" for i in (1, 2, 10)]


def test_find_upward_looks_here_then_above_the_script(tmp_path, monkeypatch):
    script, here = tmp_path / "a" / "b" / "train_gpt.py", tmp_path / "elsewhere"
    script.parent.mkdir(parents=True)
    here.mkdir()
    monkeypatch.setattr(train_gpt, "SCRIPT", script)
    monkeypatch.chdir(here)
    # nowhere: as given, for the error message
    assert str(train_gpt.find_upward("data/x")) == "data/x"
    # each nearer to the script than the one before
    for folder in (tmp_path, tmp_path / "a", tmp_path / "a" / "b"):
        (folder / "data" / "x").mkdir(parents=True)
        assert train_gpt.find_upward("data/x") == folder / "data" / "x"
    (here / "data" / "x").mkdir(parents=True)
    assert train_gpt.find_upward("data/x").resolve() == here / "data" / "x"
    assert train_gpt.find_upward(tmp_path / "a" / "data" / "x") == tmp_path / "a" / "data" / "x"
    assert train_gpt.find_upward(tmp_path / "data" / "y") == tmp_path / "data" / "y"


# -- validation tokens

@pytest.mark.parametrize("length, limit", [(2, 0), (7, 0), (101, 0), (202, 0), (32, 100), (32, 64)])
def test_validation_is_the_first_whole_rows_of_targets(tiny, folder, length, limit):
    tokens = load_validation(tiny(DATA_PATH=folder, TRAIN_SEQ_LEN=length, TRAIN_BATCH_TOKENS=length,
                                  EVAL_STRIDE=1, TTT_CHUNK_TOKENS=1000, VAL_LIMIT_TOKENS=limit))
    targets = min(203 - 1, limit or 202) // length * length
    assert tokens.tolist() == list(range(targets + 1)) and tokens.dtype == np.uint16


@pytest.mark.parametrize("count, window", [(32, 0), (64, 40), (64, 64)])
def test_validation_shorter_than_a_row_is_refused(tiny, tmp_path, count, window):
    write_shard(tmp_path / "fineweb_val_000000.bin", range(count))
    said = rf"{count} validation tokens, a row needs {64 if window else 32} \+ 1"
    with pytest.raises(UserError, match=said):
        load_validation(tiny(DATA_PATH=tmp_path, EVAL_SEQ_LEN=window, TTT_ENABLED=0))
    write_shard(tmp_path / "fineweb_val_000001.bin", range(65 - count))
    load_validation(tiny(DATA_PATH=tmp_path, EVAL_SEQ_LEN=window, TTT_ENABLED=0))


# -- the training stream

def epoch_rows(stream, epoch=0):
    return stream.rows(epoch * EPOCH, (epoch + 1) * EPOCH).tolist()


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_each_row_of_an_epoch_comes_exactly_once(stream, order):
    """Rows are whole slices of a shard: what an epoch gives, sorted, is what lies on disk."""
    s = stream(TRAIN_ORDER=order)
    assert s.epoch_rows == EPOCH == 16 and s.rows(14, 19).dtype == torch.int32
    for epoch in range(3):
        assert sorted(epoch_rows(s, epoch)) == FILE_ROWS
        assert (epoch_rows(s, epoch) == FILE_ROWS) == (order == "sequential")


def test_shuffled_order_depends_on_seed_and_position_alone(stream):
    a, b = stream(SEED=3), stream(SEED=3)
    forwards = [a.row(p).tolist() for p in range(3 * EPOCH)]
    backwards = [b.row(p).tolist() for p in reversed(range(3 * EPOCH))]
    assert forwards == backwards[::-1]
    torch.manual_seed(1)
    np.random.seed(1)
    assert stream(SEED=3, MODEL_DIM=64).rows(5, 21).tolist() == forwards[5:21]


def shard_order(rows):
    shards = np.searchsorted(np.cumsum(LENGTHS), [row[0] for row in rows], side="right").tolist()
    return [a for a, b in zip(shards, [None, *shards]) if a != b]


def test_shuffling_keeps_a_shard_together_and_shuffles_shards(stream):
    """One shard is read at a time, in another order with another epoch or seed."""
    rows = [epoch_rows(stream(SEED=seed), epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(a != b for i, a in enumerate([*rows, FILE_ROWS]) for b in rows[:i])
    for orders in ([shard_order(epoch_rows(stream(), epoch)) for epoch in range(6)],
                   [shard_order(epoch_rows(stream(SEED=seed))) for seed in range(6)]):
        assert all(sorted(order) == [0, 1, 3, 4] for order in orders)
        assert len({tuple(order) for order in orders}) > 2


# -- batches

def test_a_row_with_a_token_outside_of_the_vocabulary_is_refused(stream):
    """Before training only the beginning of each shard is checked."""
    rows = stream(TRAIN_ORDER="sequential", VOCAB_SIZE=LENGTHS[0] + 1)
    assert rows.row(4)[-1] == LENGTHS[0] - 1
    with pytest.raises(UserError, match="fineweb_train_000001.bin: holds token 49, outside of"):
        rows.row(5)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_together_read_the_stream_in_order(stream, world_size):
    """Step by step, the rows of all ranks one after another are the stream's, across epochs, for
    any world size."""
    s, per_step, steps = stream(), 6, 6
    ranks = [batches_of(s, runtime(rank, world_size), per_step) for rank in range(world_size)]
    for step in range(steps):
        rows = [next(batches) for batches in ranks]
        assert {len(r) for r in rows} == {per_step // world_size}
        assert torch.cat(rows).tolist() == [s.row(p).tolist()
                                            for p in range(step * per_step, (step + 1) * per_step)]
    for batches in ranks:
        batches.close()


def test_the_kernel_is_told_of_a_shard_when_the_one_before_begins(tiny, tmp_path, monkeypatch):
    mapped, told = [], []

    class Mapping(mmap.mmap):
        def __init__(self, *given, **named):
            mapped.append(self)

        def madvise(self, advice):
            told.append((mapped.index(self), advice))
    monkeypatch.setattr(mmap, "mmap", Mapping)
    for shard in range(4):  # of three rows
        write_shard(tmp_path / f"fineweb_train_{shard:06d}.bin", 100 * shard + np.arange(3 * T + 1))
    stream = TrainStream(tiny(DATA_PATH=tmp_path, VOCAB_SIZE=1000, TRAIN_SEQ_LEN=T))
    for epoch in range(2):
        told.clear()
        after = []  # what it was told after each row
        for position in range(12):
            shard = stream.row(12 * epoch + position)[0] // 100
            after.append(list(told))
            before = 3 * max(0, position // 3 - 1)
            assert (shard, mmap.MADV_WILLNEED) in after[before]
        assert len(after[0]) == 2  # not of all at once


def test_four_batches_are_read_ahead():
    loaded = queue.Queue()

    def rows(first, last):
        loaded.put(first)
        return torch.zeros(last - first, T + 1, dtype=torch.int32)
    batches = batches_of(SimpleNamespace(rows=rows), runtime(), 4)
    next(batches)
    assert [loaded.get(timeout=60) for _ in range(5)] == [0, 4, 8, 12, 16]
    next(batches)
    assert loaded.get(timeout=60) == 20
    batches.close()
    assert loaded.empty()


def test_close_ends_the_loading_thread(stream):
    before = set(threading.enumerate())
    batches = batches_of(stream(), runtime(), 4)
    next(batches)
    assert set(threading.enumerate()) > before
    batches.close()
    assert set(threading.enumerate()) == before


def test_loading_errors_reach_the_training_loop():
    def rows(first, last):
        if first == 4:
            raise UserError("token outside")
        return torch.zeros(last - first, T + 1, dtype=torch.int32)
    batches = batches_of(SimpleNamespace(rows=rows), runtime(), 4)
    next(batches)
    with pytest.raises(UserError, match="token outside"):
        next(batches)
    batches.close()


@pytest.mark.parametrize("n, world_size", [(1, 1), (6, 3), (7, 3), (2, 5), (0, 4)])
def test_parts_cover_everything_once(n, world_size):
    shares = [runtime(rank, world_size).part(n) for rank in range(world_size)]
    assert [i for begin, end in shares for i in range(begin, end)] == list(range(n))
    assert max(e - b for b, e in shares) - min(e - b for b, e in shares) <= 1


def test_training_documents_that_are_validation_documents_are_counted(tiny, corpus, tmp_path):
    """All of them where a training shard is the validation shard, none where texts differ; those in
    the middle of a long shard are seen."""
    validation = train_gpt.load_validation(tiny())
    write_shard(tmp_path / "fineweb_val_000000.bin", corpus.tokens[:1031])
    write_shard(tmp_path / "fineweb_train_000000.bin", corpus.tokens[:1031])
    stream = train_gpt.TrainStream(tiny(DATA_PATH=tmp_path))
    documents, shared = train_gpt.contamination(stream, np.asarray(validation))
    assert documents >= shared >= documents - 1 > 3
    assert train_gpt.contamination(train_gpt.TrainStream(tiny()), np.asarray(validation))[1] == 0
    others = np.tile(corpus.tokens[1031:], 20)
    write_shard(tmp_path / "fineweb_train_000000.bin", np.concatenate(
        [others, *[corpus.tokens[:1031]] * 5, others]))
    stream = train_gpt.TrainStream(tiny(DATA_PATH=tmp_path))
    assert train_gpt.contamination(stream, np.asarray(validation))[1] > 3
