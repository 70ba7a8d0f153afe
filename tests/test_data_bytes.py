"""The bytes of text behind each validation token, for tokenizers of every kind."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from conftest import write_jsonl
from hypothesis import given, settings, strategies as st

import build_dataset
import shards
from shards import BOS_ID, DataError

WORDS = ("of the river stone quiet lamp in the orchard winter copper signal to be harbor meadow "
         "paper engine violet thunder basket garden mirror candle forest bridge window silver "
         "ocean timber").split()
PLAIN = dict(model_type="bpe", byte_fallback=True, add_dummy_prefix=False,
             normalization_rule_name="nmt_nfkc")
KEEP_SPACES = dict(remove_extra_whitespaces=False, normalization_rule_name="identity")
# Every kind that a table of pieces with a leading "▁" miscounts, three of each.
KINDS = {
    "prefix": {},
    "space behind": dict(treat_whitespace_as_suffix=True),
    "space behind, unigram": dict(treat_whitespace_as_suffix=True, model_type="unigram"),
    "space behind, dummy": dict(treat_whitespace_as_suffix=True, add_dummy_prefix=True),
    "space inside": dict(split_by_whitespace=False),
    "space inside, unigram": dict(split_by_whitespace=False, model_type="unigram",
                                  max_sentencepiece_length=32),
    "space inside and behind": dict(split_by_whitespace=False, treat_whitespace_as_suffix=True),
    "spaces": dict(allow_whitespace_only_pieces=True, **KEEP_SPACES),
    "spaces inside": dict(allow_whitespace_only_pieces=True, split_by_whitespace=False,
                          **KEEP_SPACES),
    "spaces, declared": dict(user_defined_symbols=["▁▁", "▁▁▁▁", "▁▁▁▁▁▁▁▁"], **KEEP_SPACES),
    "symbol with a space": dict(user_defined_symbols=["in the", "to be"]),
    "symbol of two bytes": dict(user_defined_symbols=["μ"]),
    "symbol with space in front": dict(user_defined_symbols=["▁of▁the", "▁in"]),
    "symbol with space behind": dict(user_defined_symbols=["river▁", "the▁▁"], **KEEP_SPACES),
    "no lone space": dict(lone_space=False),
    "no lone space, unigram": dict(lone_space=False, model_type="unigram"),
    "no lone space, dummy": dict(lone_space=False, add_dummy_prefix=True),
    "unknown": dict(byte_fallback=False),
    "unknown, unigram": dict(byte_fallback=False, model_type="unigram"),
    "unknown, many": dict(byte_fallback=False, character_coverage=0.98),
    "dummy": dict(add_dummy_prefix=True),
    "lower case": dict(normalization_rule_name="nmt_nfkc_cf"),
    "unchanged": dict(normalization_rule_name="identity"),
}
CLEAN = ["of the river in the forest to be of the stone", "river",
         "naïve café of the 北京 \U0001d11e lamp", "the  river    stone\n    quiet        lamp"]
UNCLEAN = ["  two  leading, trailing ½ \n\n", "ﬁne ａｂ №5 x\u200by \ufeff", "a\x01b\x07 \u00a0 c",
           "e\u0301 \u212b ㍿", "tab\t\tend\r\n"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """kind -> (path, tokenizer), trained on first use."""
    folder, made = tmp_path_factory.mktemp("tokenizers"), {}

    def get(kind: str, marked=False):
        if (kind, marked) not in made:
            rng, model = np.random.default_rng(0), io.BytesIO()
            lines = ["  " * int(rng.integers(3)) + " ".join(rng.choice(WORDS, 20)) + "    of the"
                     for _ in range(300)]
            options = {**PLAIN, **KINDS[kind]}
            if marked:
                options["user_defined_symbols"] = list(build_dataset.CASE_MARKS)
            lone_space = options.pop("lone_space", True)
            sentencepiece.SentencePieceTrainer.train(**{
                "sentence_iterator": iter(lines), "model_writer": model, "vocab_size": 380,
                "hard_vocab_limit": False, "pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3,
                "minloglevel": 2, **options})
            path = folder / f"{len(made)}.model"
            content = model.getvalue()
            if not lone_space:  # the piece "▁" (field 1, 3 bytes) becomes one that no text has
                assert content.count(b"\x0a\x03\xe2\x96\x81") == 1
                content = content.replace(b"\x0a\x03\xe2\x96\x81", b"\x0a\x03\x01\x01\x01")
            path.write_bytes(content)
            made[kind, marked] = path, build_dataset.load_tokenizer(path)
        return made[kind, marked]

    return get


def counted(tokenizer, text: str, folds=False) -> tuple[list[int], list[int]]:
    """(tokens, bytes of each) of a document, without BOS."""
    made = build_dataset.encode_for_val(tokenizer, text, folds)
    tokens, counts = (np.frombuffer(data, "<u2").tolist() for data in (made.tokens, made.counts))
    assert (tokens[0], counts[0]) == (BOS_ID, 0) and len(tokens) == len(counts)
    assert tokens[1:] == tokenizer.encode(build_dataset.fold_case(text) if folds else text)
    return tokens[1:], counts[1:]


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_a_document_are_those_of_its_text(tokenizers, kind):
    _, tokenizer = tokenizers(kind)
    for text in CLEAN + UNCLEAN:
        tokens, counts = counted(tokenizer, text)
        assert sum(counts) == len(text.encode()) or not tokens, text


CASES = [*CLEAN, *UNCLEAN, "The NASA's iPhone, A café  In\nÉcole ABc", "a\ue001B \ue004",
         " Of  THE\tRiver"]


@settings(max_examples=300, deadline=None, database=None)
@given(st.text(st.sampled_from("abAB \n\té北." + build_dataset.CASE_MARKS), max_size=12))
def test_folded_case_comes_back(text):
    folded = build_dataset.fold_case(text)
    assert build_dataset.unfold_case(folded) == text and not re.search("[A-Z]", folded)


def test_a_mark_stands_before_the_space_and_leaves_the_word_its_piece():
    title, upper, capital, literal = build_dataset.CASE_MARKS
    for text, expected in (
            ("in The NASA", f"in{title} the{upper} nasa"), ("A b", f"{title}a b"),
            ("iPhone éX", f"i{capital}phone é{title}x"), (title, literal + title)):
        assert build_dataset.fold_case(text) == expected


@pytest.mark.parametrize("kind", ["prefix", "space behind", "dummy", "spaces", "unknown"])
def test_with_folded_case_bytes_are_those_of_the_text_and_marks_have_none(tokenizers, kind):
    """Also where a tokenizer knows no marks, and spells them in bytes or as unknown."""
    for marked in (False, True):
        _, tokenizer = tokenizers(kind, marked)
        marks = {tokenizer.piece_to_id(mark) for mark in build_dataset.CASE_MARKS} if marked else ()
        for text in CASES:
            tokens, counts = counted(tokenizer, text, folds=True)
            assert sum(counts) == len(text.encode()) or not tokens, text
            assert min(counts, default=0) >= 0
            if "\ue001" not in text:
                assert not any(n for t, n in zip(tokens, counts) if t in marks), text


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "no lone" not in kind])
def test_each_token_has_the_bytes_that_its_piece_stands_for(tokenizers, kind):
    """On text that normalization leaves alone; "▁" is a space, a dummy space is none."""
    _, tokenizer = tokenizers(kind)
    for text in CLEAN[:3]:
        tokens, counts = counted(tokenizer, text)
        pieces = [tokenizer.id_to_piece(t) for t in tokens]
        expected = [1 if tokenizer.is_byte(t) else len(p.replace("▁", " ").encode())
                    for t, p in zip(tokens, pieces)]
        if pieces[0].startswith("▁"):
            expected[0] -= 1
        elif pieces[-1].endswith("▁"):
            expected[-1] -= 1
        known = [t != tokenizer.unk_id() for t in tokens]
        assert ([c for c, k in zip(counts, known) if k]
                == [e for e, k in zip(expected, known) if k]), (text, pieces)


def test_a_character_that_becomes_two_gives_each_token_the_bytes_of_its_piece(tokenizers):
    _, tokenizer = tokenizers("symbol of two bytes")
    tokens, counts = counted(tokenizer, "river ㎲")
    assert tokenizer.decode(tokens) == "river μs" and counts[-2:] == [2, 1]


@settings(max_examples=60, deadline=None, database=None)
@given(st.text(st.sampled_from("ab  \n\t½ﬁ北é\u0301\u200b\x00\x01▁\U0001d11e")
               | st.characters(exclude_categories=["Cs"]), max_size=30),
       st.sampled_from(["prefix", "space behind", "spaces, declared", "unknown", "dummy",
                        "lower case"]))
def test_any_text_in_any_kind_adds_up(tokenizers, text, kind):
    _, tokenizer = tokenizers(kind)
    tokens, counts = counted(tokenizer, text)
    assert sum(counts) == len(text.encode()) or not tokens
    changed, *lost = build_dataset.lost_bytes(tokenizer, text)
    if kind != "unknown" and "▁" not in text and "\x00" not in text:
        assert sum(lost) == len(text.encode()) - len(tokenizer.decode(tokens).encode())
        assert changed or tokenizer.decode(tokens) == re.sub(r"[\t\n\r]", " ", text)


@pytest.mark.parametrize("text, spaces, dropped, rewritten", [
    ("plain text\nof two lines", 0, 0, 0), ("a  b   c ", 4, 0, 0), ("\n\n a", 3, 0, 0),
    ("a\u00a0b", 1, 0, 0), ("a\x01b\x02", 0, 2, 0), ("a\x7fb", 0, 1, 0), ("a\u200bb", 2, 0, 0),
    ("ﬁ", 0, 0, 1), ("ａｂ", 0, 0, 4), ("½", 0, 0, -3), ("  x\x01 ﬁ", 2, 1, 1)])
def test_what_normalization_loses_has_a_name(tokenizers, text, spaces, dropped, rewritten):
    _, tokenizer = tokenizers("prefix")
    assert build_dataset.lost_bytes(tokenizer, text)[1:] == (spaces, dropped, rewritten)


def build(tmp_path, tokenizer_path, val: list[str], *arguments) -> tuple[Path, dict]:
    source = write_jsonl(tmp_path / "t.jsonl", [f"training {i} of the river" for i in range(9)])
    build_dataset.main([str(a) for a in (
        source, "--val-input", write_jsonl(tmp_path / "v.jsonl", val), "--tokenizer",
        tokenizer_path, "--out-root", tmp_path, "--workers", 1, "--force", *arguments)])
    folder = tmp_path / "datasets/t"
    return folder, json.loads((folder / "manifest.json").read_text())


def test_the_manifest_names_side_files_beside_the_shards(tmp_path, tokenizers, capsys):
    path, tokenizer = tokenizers("prefix")
    folder, manifest = build(tmp_path, path, CLEAN + UNCLEAN + CLEAN[:1], "--shard-tokens", 50)
    val = manifest["splits"]["val"]
    assert len(val["files"]) > 2 and val["dropped_repeats"] == 1
    tokens = np.concatenate([shards.read_shard(folder / f["name"]) for f in val["files"]])
    counts = np.concatenate([shards.read_shard(folder / f["bytes_name"]) for f in val["files"]])
    assert [f["bytes_name"] for f in val["files"]] == [f["name"].replace("val_", "val_bytes_")
                                                       for f in val["files"]]
    assert tokens.tolist() == [t for text in CLEAN + UNCLEAN
                               for t in [BOS_ID, *tokenizer.encode(text)]]
    starts = np.flatnonzero(tokens == BOS_ID)
    assert (np.add.reduceat(counts, starts, dtype=int).tolist()
            == [len(t.encode()) for t in CLEAN + UNCLEAN])
    for file in val["files"]:
        assert shards.sha256_file(folder / file["bytes_name"]) == file["bytes_sha256"]
        assert shards.read_shard(folder / file["bytes_name"]).sum() == file["utf8_bytes"]
    assert val["utf8_bytes"] == sum(f["utf8_bytes"] for f in val["files"])
    decoded = sum(len(tokenizer.decode(tokenizer.encode(t)).encode()) for t in CLEAN + UNCLEAN)
    assert val["bytes_lost_by_normalization"] == val["utf8_bytes"] - decoded
    assert not list(folder.glob("fineweb_train_bytes_*"))
    assert "bytes_name" not in manifest["splits"]["train"]["files"][0]
    said = capsys.readouterr().out
    assert f"{val['normalization']['white_space_bytes']} of white space" in said
    assert "dropped characters" in said
    assert f"changes {val['normalization']['changed_documents']} of 9 validation documents" in said


@pytest.mark.parametrize("text", ["a" + " " * 65_536 + "b", "a" + "\n" * 70_000,
                                  "a" + "\x01" * 70_000 + " b"])
def test_more_bytes_than_a_side_file_can_hold_are_refused(tmp_path, tokenizers, text):
    with pytest.raises(DataError,
                       match=r"validation document 'a.*fall to one token.*at most 65535: shorten"):
        build(tmp_path, tokenizers("prefix")[0], [text])
    assert not (tmp_path / "datasets/t").exists()
