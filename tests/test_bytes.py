"""Bytes: the denominator of the score, against the rule token by token and against the decoded text."""

import json
import math

import numpy as np
import pytest
from conftest import VOCAB, WORDS, write_shard
from hypothesis import given, settings as hypothesis_settings, strategies as st

import sentencepiece

import train_gpt
from train_gpt import ByteTable, UserError, bits_per_byte, resolve_settings

BOS = 1


@pytest.fixture(scope="module")
def table(corpus):
    return ByteTable(resolve_settings({"TOKENIZER_PATH": str(corpus.model), "VOCAB_SIZE": str(VOCAB)})[0])


def bytes_of_target(tokenizer, before, target):
    """The rule as it is written, for one target."""
    def is_boundary(token):
        return tokenizer.is_control(token) or tokenizer.is_unknown(token) or tokenizer.is_unused(token)
    piece = tokenizer.id_to_piece(target)
    if is_boundary(target):
        return 0
    if tokenizer.is_byte(target):
        return 1
    if piece.startswith("▁"):
        return len(piece[1:].encode("utf-8")) + (0 if is_boundary(before) else 1)
    return len(piece.encode("utf-8"))


def slow_count(tokenizer, tokens):
    return sum(bytes_of_target(tokenizer, int(a), int(b)) for a, b in zip(tokens[:-1], tokens[1:]))


def test_every_pair_of_neighbours_counts_by_the_rule(corpus, table):
    """All 320² pairs, so that no piece and no boundary is left out."""
    kinds = corpus.tokenizer
    assert any(kinds.is_byte(i) for i in range(VOCAB)) and any(kinds.is_control(i) for i in range(VOCAB))
    for before in range(VOCAB):
        singles = np.array([table.base[t] + (table.space[t] and not table.boundary[before]) for t in range(VOCAB)])
        expected = np.array([bytes_of_target(kinds, before, t) for t in range(VOCAB)])
        assert (singles == expected).all(), before
    sequence = np.random.default_rng(0).integers(VOCAB, size=5000)
    assert table.count(sequence) == slow_count(kinds, sequence)


@hypothesis_settings(deadline=None, database=None, max_examples=100)
@given(tokens=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=60))
def test_any_tokens_count_by_the_rule(corpus, table, tokens):
    assert table.count(np.array(tokens, np.uint16)) == slow_count(corpus.tokenizer, tokens)


def test_counts_of_parts_add_up(corpus, table):
    """Chunks that overlap by one token score every target once."""
    tokens = corpus.tokens[:1000].astype(np.uint16)
    cuts = [0, 1, 2, 57, 400, 999]
    assert sum(table.count(tokens[a:b + 1]) for a, b in zip(cuts, cuts[1:])) == table.count(tokens)


def test_bytes_are_those_of_the_decoded_documents(corpus, table):
    kinds = corpus.tokenizer
    documents = np.split(corpus.tokens, np.flatnonzero(corpus.tokens == BOS))[1:]
    assert len(documents) == len(corpus.documents)
    texts = [kinds.decode(d[1:].tolist()) for d in documents]
    for document, text in zip(documents, texts):
        assert table.count(document) == len(text.encode("utf-8"))
    assert table.count(corpus.tokens) == sum(len(t.encode("utf-8")) for t in texts)
    assert texts == corpus.documents


@hypothesis_settings(deadline=None, database=None, max_examples=150)
@given(texts=st.lists(st.lists(st.one_of(st.sampled_from(WORDS), st.text(min_size=1, max_size=6)), min_size=1, max_size=8).map(" ".join),
                      min_size=1, max_size=3))
def test_bytes_are_those_of_any_decoded_text(corpus, table, texts):
    """Text of any script falls back to byte pieces; a document boundary adds no byte and takes none."""
    kinds = corpus.tokenizer
    encoded = [kinds.encode(text) for text in texts]
    tokens = np.array([t for ids in encoded for t in [BOS, *ids]])
    decoded = [kinds.decode(ids) for ids in encoded]
    assert table.count(tokens) == sum(len(text.encode("utf-8")) for text in decoded)


def test_byte_fallback_counts_one_each(corpus, table):
    ids = corpus.tokenizer.encode("🜁")
    fallback = [i for i in ids if corpus.tokenizer.is_byte(i)]
    assert len(fallback) == 4 and table.count(np.array([BOS, *fallback])) == 4


class HandMade:
    """A tokenizer of nine pieces, one of each sort."""
    PIECES = [("<pad>", "control"), ("<unk>", "unknown"), ("<dead>", "unused"), ("<0x41>", "byte"), ("▁", ""), ("▁a", ""), ("é", ""),
              ("▁北京", ""), ("x", "")]

    def unk_id(self):
        return 1

    def __init__(self, model_file):
        for sort in ("control", "unknown", "unused", "byte"):
            setattr(self, f"is_{sort}", lambda i, sort=sort: self.PIECES[i][1] == sort)

    def vocab_size(self):
        return len(self.PIECES)

    def id_to_piece(self, i):
        return self.PIECES[i][0]


@pytest.mark.parametrize("before, target, count", [
    (6, 0, 0), (6, 1, 0), (6, 2, 0), (6, 3, 1), (0, 3, 1),         # control, unknown, unused: nothing; a byte: one
    (6, 4, 1), (0, 4, 0), (1, 4, 0), (2, 4, 0), (3, 4, 1),         # a space alone, after text and after boundaries
    (6, 5, 2), (0, 5, 1), (2, 5, 1), (4, 5, 2), (6, 6, 2), (0, 6, 2), (6, 7, 7), (1, 7, 6), (6, 8, 1)])
def test_each_sort_of_piece_by_hand(monkeypatch, tmp_path, before, target, count):
    monkeypatch.setattr(train_gpt.sentencepiece, "SentencePieceProcessor", HandMade)
    (tmp_path / "m").write_bytes(b"")
    table = ByteTable(resolve_settings({"TOKENIZER_PATH": str(tmp_path / "m"), "VOCAB_SIZE": "9"})[0])
    assert table.count(np.array([before, target])) == count


def test_one_token_has_no_target(table):
    assert table.count(np.array([5])) == 0


# -- bytes from the text, and tokenizers that the table of pieces miscounts

def trained(folder, text, **options):
    (folder / "t.txt").write_text(text, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(**{**dict(
        input=str(folder / "t.txt"), model_prefix=str(folder / "m"), vocab_size=300, model_type="bpe", byte_fallback=True,
        add_dummy_prefix=False, pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2, num_threads=1, hard_vocab_limit=False), **options})
    return folder / "m.model"


TEXT = "\n".join(["the end of the day in the city of the sun"] * 40 + ["    if x:", "        return the value of it"] * 30)
MISCOUNTED = {"space behind": dict(treat_whitespace_as_suffix=True), "space inside": dict(split_by_whitespace=False),
              "user symbol with a space": dict(user_defined_symbols=["the end"]),
              "several spaces": dict(user_defined_symbols=["▁▁▁▁"], remove_extra_whitespaces=False)}


@pytest.mark.parametrize("options", MISCOUNTED.values(), ids=MISCOUNTED)
def test_a_tokenizer_whose_spaces_the_table_miscounts_is_refused_unless_the_text_was_counted(tiny, tmp_path, options):
    model = trained(tmp_path, TEXT, **options)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    s = dict(TOKENIZER_PATH=model, VOCAB_SIZE=sp.vocab_size(), DATA_PATH=tmp_path)
    with pytest.raises(UserError, match="pieces such as .* hold spaces.*build_dataset.py"):
        ByteTable(tiny(**s))
    tokens = np.array([BOS, *sp.encode("the end of the day")])
    write_shard(tmp_path / "fineweb_val_000000.bin", tokens)
    counts = np.zeros(len(tokens), int)
    counts[-1] = len("the end of the day")
    write_shard(tmp_path / "fineweb_val_bytes_000000.bin", counts)
    table = ByteTable(tiny(**s))
    assert table.source == "text" and table.count(tokens) == 18 and table.count(tokens[:3]) == 0
    assert table.count(tokens[-2:], first=len(tokens) - 2) == 18


def test_side_files_must_fit_the_tokens_and_the_text(tiny, tmp_path, corpus):
    tokens = np.array([BOS, 10, 11, 12])
    write_shard(tmp_path / "fineweb_val_000000.bin", tokens)
    for counts, text in (([0, 1, 2], None), ([0, 1, 2, 3], 7)):
        write_shard(tmp_path / "fineweb_val_bytes_000000.bin", counts)
        (tmp_path / "manifest.json").write_text(json.dumps(dict(splits=dict(val=dict(utf8_bytes=text)))))
        with pytest.raises(UserError, match=r"fineweb_val_bytes_000000.bin: \d entries, \d bytes in all, for 4 tokens"):
            ByteTable(tiny(DATA_PATH=tmp_path))
    (tmp_path / "manifest.json").write_text(json.dumps(dict(splits=dict(val=dict(utf8_bytes=6)))))
    assert ByteTable(tiny(DATA_PATH=tmp_path)).count(tokens) == 6


def test_a_vocabulary_without_a_single_space_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(HandMade, "PIECES", [p for p in HandMade.PIECES if p[0] != "▁"])
    monkeypatch.setattr(train_gpt.sentencepiece, "SentencePieceProcessor", HandMade)
    (tmp_path / "m").write_bytes(b"")
    with pytest.raises(UserError, match="no piece is a single space"):
        ByteTable(tiny(TOKENIZER_PATH=tmp_path / "m", VOCAB_SIZE=8))


def test_shards_of_another_tokenizer_are_refused(tiny, tmp_path, corpus):
    """As many pieces, other pieces: by the manifest's hash, and without a manifest by encoding again what they decode to."""
    other = trained(tmp_path, "\n".join(d[::-1] for d in corpus.documents), vocab_size=VOCAB, hard_vocab_limit=True, split_digits=True)
    table = ByteTable(tiny(TOKENIZER_PATH=other))
    with pytest.raises(UserError, match="do not belong together"):
        table.check_text(np.asarray(corpus.tokens[:1031]), tiny(TOKENIZER_PATH=other))
    ByteTable(tiny()).check_text(np.asarray(corpus.tokens[:1031]), tiny())
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(dict(tokenizer=dict(sha256="0" * 64))))
    with pytest.raises(UserError, match="not the tokenizer that made the shards"):
        ByteTable(tiny(DATA_PATH=tmp_path / "data"))


def test_unknown_pieces_are_refused_where_only_the_table_counts(tiny, corpus):
    tokens = np.array(corpus.tokens[:200])
    tokens[50] = corpus.tokenizer.unk_id()
    with pytest.raises(UserError, match="unknown pieces"):
        ByteTable(tiny()).check_text(tokens, tiny())


# -- what is refused

def test_missing_tokenizer_is_named(tiny, tmp_path):
    for path in (tmp_path / "none.model", tmp_path):
        with pytest.raises(UserError, match=f"TOKENIZER_PATH={path}: no such file"):
            ByteTable(tiny(TOKENIZER_PATH=path))


@pytest.mark.parametrize("content", [b"", b"not a model", bytes(range(256)) * 40])
def test_foreign_file_is_no_tokenizer(tiny, tmp_path, content):
    (tmp_path / "x.model").write_bytes(content)
    with pytest.raises(UserError, match=f"TOKENIZER_PATH={tmp_path}/x.model: not a SentencePiece model"):
        ByteTable(tiny(TOKENIZER_PATH=tmp_path / "x.model"))


def test_cut_tokenizer_is_refused(tiny, tmp_path, corpus):
    (tmp_path / "x.model").write_bytes(corpus.model.read_bytes()[:1000])
    with pytest.raises(UserError, match=f"TOKENIZER_PATH={tmp_path}/x.model"):
        ByteTable(tiny(TOKENIZER_PATH=tmp_path / "x.model"))


@pytest.mark.parametrize("size", [VOCAB - 1, VOCAB + 1])
def test_other_vocabulary_size_is_refused(tiny, size):
    with pytest.raises(UserError, match=f"has {VOCAB} pieces where VOCAB_SIZE={size}"):
        ByteTable(tiny(VOCAB_SIZE=size))


# -- the score

@pytest.mark.parametrize("nats, count, bits", [(0.0, 5, 0.0), (8 * math.log(2), 4, 2.0), (1.0, 1, 1.4426950408889634),
                                               (np.float32(3.0), 2, 2.1640425613334453)])
def test_bits_per_byte_by_hand(nats, count, bits):
    assert bits_per_byte(nats, count) == pytest.approx(bits, rel=1e-14)
    assert type(bits_per_byte(nats, count)) is float


def test_bits_per_byte_is_what_the_tokens_say(corpus, table):
    """A model that gives every token 1/320 pays log₂ 320 bits a token."""
    tokens = corpus.tokens[:1031]
    nll = np.full(1030, math.log(VOCAB), np.float64)
    text_bytes = slow_count(corpus.tokenizer, tokens)
    assert bits_per_byte(nll.sum(), table.count(tokens)) == pytest.approx(1030 * math.log2(VOCAB) / text_bytes, rel=1e-12)
