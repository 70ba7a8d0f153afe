"""Bytes: the denominator of the score, against the rule token by token and the decoded text."""

import contextlib
import json

import numpy as np
import pytest
import sentencepiece
from conftest import VOCAB, WORDS, write_shard
from hypothesis import example, given, settings, strategies as st

from train_gpt import BOS, ByteTable, UserError, resolve_settings


@pytest.fixture(scope="module")
def table(corpus):
    variables = dict(TOKENIZER_PATH=str(corpus.model), VOCAB_SIZE=str(VOCAB))
    return ByteTable(resolve_settings(variables)[0])


def bytes_of_target(tokenizer, before, target):
    """The rule as it is written, for one target."""
    def is_boundary(token):
        return (tokenizer.is_control(token) or tokenizer.is_unknown(token)
                or tokenizer.is_unused(token))
    piece = tokenizer.id_to_piece(target)
    if is_boundary(target):
        return 0
    if tokenizer.is_byte(target):
        return 1
    if piece.startswith("▁"):
        return len(piece[1:].encode("utf-8")) + (0 if is_boundary(before) else 1)
    return len(piece.encode("utf-8"))


def slow_count(tokenizer, tokens):
    return sum(bytes_of_target(tokenizer, int(a), int(b)) for a, b in zip(tokens, tokens[1:]))


def test_every_pair_of_neighbours_counts_by_the_rule(corpus, table):
    """A third of the tokens before all; then a long sequence, whose parts, which overlap by one
    token, add up."""
    kinds = corpus.tokenizer
    for before in range(0, VOCAB, 3):
        pairs = [table.count(np.array([before, target])) for target in range(VOCAB)]
        assert pairs == [bytes_of_target(kinds, before, target) for target in range(VOCAB)]
    tokens, cuts = np.random.default_rng(0).integers(VOCAB, size=5000), [0, 1, 2, 57, 400, 4999]
    total = slow_count(kinds, tokens)
    assert table.count(tokens) == table.count(tokens.astype(np.uint16)) == total
    assert sum(table.count(tokens[a:b + 1]) for a, b in zip(cuts, cuts[1:])) == total
    assert table.count(tokens[:1]) == 0, "one token has no target"


def test_an_unused_piece_is_a_boundary(tiny, corpus, monkeypatch):
    monkeypatch.setattr(sentencepiece.SentencePieceProcessor, "is_unused", lambda sp, i: i == 300)
    table = ByteTable(tiny())
    assert table.count(np.array([10, 300])) == 0
    for target in range(VOCAB):
        count = bytes_of_target(corpus.tokenizer, 300, target)
        assert table.count(np.array([300, target])) == count


SOME_TEXT = st.one_of(st.sampled_from(WORDS), st.text(min_size=1, max_size=6))


@settings(database=None, max_examples=60)
@given(st.lists(st.lists(SOME_TEXT, min_size=1, max_size=8).map(" ".join), min_size=1, max_size=3))
@example(["🜁", "🜁 🜁"])
def test_bytes_are_those_of_any_decoded_text(corpus, table, texts):
    """Text of any script falls back to byte pieces; a document boundary adds no byte and takes
    none."""
    encoded = [corpus.tokenizer.encode(text) for text in texts]
    tokens = np.array([t for ids in encoded for t in [BOS, *ids]])
    decoded = "".join(corpus.tokenizer.decode(ids) for ids in encoded)
    assert table.count(tokens) == len(decoded.encode("utf-8"))


def test_a_vocabulary_without_a_single_space_is_refused(tiny, corpus, tmp_path):
    content, space = corpus.model.read_bytes(), b"\x0a\x03\xe2\x96\x81"  # a piece of three bytes
    assert content.count(space) == 1
    (tmp_path / "m").write_bytes(content.replace(space, b"\x0a\x03\x01\x01\x01"))
    with pytest.raises(UserError, match="no piece is a single space"):
        ByteTable(tiny(TOKENIZER_PATH=tmp_path / "m"))


# -- bytes from the text, and tokenizers that the table of pieces miscounts

def trained(folder, text, **options):
    (folder / "t.txt").write_text(text, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(**{**dict(
        input=str(folder / "t.txt"), model_prefix=str(folder / "m"), vocab_size=300,
        model_type="bpe", byte_fallback=True, add_dummy_prefix=False, pad_id=0, bos_id=1, eos_id=2,
        unk_id=3, minloglevel=2, num_threads=1, hard_vocab_limit=False), **options})
    return folder / "m.model"


TEXT = "\n".join(["the end of the day in the city of the sun"] * 40
                 + ["    if x:", "        return the value of it"] * 30)
MISCOUNTED = {"space behind": dict(treat_whitespace_as_suffix=True),
              "space inside": dict(split_by_whitespace=False),
              "user symbol with a space": dict(user_defined_symbols=["the end"]),
              "several spaces": dict(user_defined_symbols=["▁▁▁▁"], remove_extra_whitespaces=False)}


@pytest.mark.parametrize("options", MISCOUNTED.values(), ids=MISCOUNTED)
def test_a_tokenizer_that_the_table_miscounts_is_refused_unless_the_text_was_counted(
        tiny, tmp_path, options):
    model = trained(tmp_path, TEXT, **options)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    s = tiny(TOKENIZER_PATH=model, VOCAB_SIZE=sp.vocab_size(), DATA_PATH=tmp_path)
    with pytest.raises(UserError, match="pieces such as .* hold spaces.*build_dataset.py"):
        ByteTable(s)
    tokens = np.array([BOS, *sp.encode("the end of the day")])
    write_shard(tmp_path / "fineweb_val_000000.bin", tokens)
    counts = np.zeros(len(tokens), int)
    counts[-1] = len("the end of the day")
    write_shard(tmp_path / "fineweb_val_bytes_000000.bin", counts)
    table = ByteTable(s)
    assert table.source == "text" and table.count(tokens) == 18 and table.count(tokens[:3]) == 0


def test_side_files_must_fit_the_tokens_and_the_text(tiny, tmp_path):
    def manifest(count):
        content = dict(splits=dict(val=dict(utf8_bytes=count)))
        (tmp_path / "manifest.json").write_text(json.dumps(content))
    tokens = np.array([BOS, 10, 11, 12])
    write_shard(tmp_path / "fineweb_val_000000.bin", tokens)
    for counts, text in (([0, 1, 2], None), ([0, 1, 2, 3], 7)):
        write_shard(tmp_path / "fineweb_val_bytes_000000.bin", counts)
        manifest(text)
        with pytest.raises(UserError, match=r"fineweb_val_bytes_000000.bin: \d entries, \d bytes "
                                            "in all, for 4 tokens"):
            ByteTable(tiny(DATA_PATH=tmp_path))
    manifest(6)
    assert ByteTable(tiny(DATA_PATH=tmp_path)).count(tokens) == 6
    write_shard(tmp_path / "fineweb_val_bytes_000000.bin", [0, 1, 2, 3] + [0] * 2048)
    with pytest.raises(UserError, match="val_bytes_000000.bin: tokens 1024 to 2048 are all 0"):
        ByteTable(tiny(DATA_PATH=tmp_path))
    digits = tmp_path / "digits"
    digits.mkdir()
    write_shard(digits / "fineweb_val_000000.bin", [BOS] + [10, 11] * 1500)
    write_shard(digits / "fineweb_val_bytes_000000.bin", [0] + [1] * 3000)
    assert ByteTable(tiny(DATA_PATH=digits)).source == "text", "a long number is no hole"


def test_shards_of_another_tokenizer_are_refused(tiny, tmp_path, corpus):
    """As many pieces, other pieces: by the manifest's hash, and without a manifest by encoding
    again what the tokens decode to."""
    text = "\n".join(d[::-1] for d in corpus.documents)
    other = tiny(TOKENIZER_PATH=trained(tmp_path, text, vocab_size=VOCAB, hard_vocab_limit=True,
                                        split_digits=True))
    validation = np.asarray(corpus.tokens[:1031])
    with pytest.raises(UserError, match="do not belong together"):
        ByteTable(other).check_text(validation, "x")
    ByteTable(tiny()).check_text(validation, "x")
    ByteTable(tiny()).check_text(np.tile(validation, 80), "x")
    noise = np.random.default_rng(0).integers(1, VOCAB, 80_000)
    with pytest.raises(UserError, match="x.bin and TOK.* belong together, or the shard is damaged"):
        table = ByteTable(tiny())
        table.check_text(np.concatenate([np.tile(validation, 40), noise]), "x.bin", scored=False)
    for content, refusal in ((dict(tokenizer=dict(sha256="0" * 64)), "not the tokenizer that made"),
                             (dict(tokenizer="x", splits=[1]), ""), ([], "")):
        (tmp_path / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=refusal) if refusal else contextlib.nullcontext():
            ByteTable(tiny(DATA_PATH=tmp_path))


def test_unknown_pieces_are_refused_whatever_their_bytes(tiny, tmp_path, corpus):
    """A model that says "something unknown" has not said the text, also where its bytes count."""
    tokens = np.array(corpus.tokens[:200])
    tokens[50] = corpus.tokenizer.unk_id()
    write_shard(tmp_path / "fineweb_val_000000.bin", tokens)
    write_shard(tmp_path / "fineweb_val_bytes_000000.bin", np.full(200, 2))
    for s, source in ((tiny(), "pieces"), (tiny(DATA_PATH=tmp_path), "text")):
        table = ByteTable(s)
        with pytest.raises(UserError, match="x: 1 tokens are unknown pieces, .*fallback"):
            table.check_text(tokens, "x")
        assert table.source == source
