"""Build a tokenizer, token shards and a manifest from your own text or the embedded demo corpus.

    python data/build_dataset.py stories.jsonl.zst            new tokenizer, 5 % validation
    python data/build_dataset.py a.txt b.txt.gz --name books --val-docs 50
    python data/build_dataset.py t.jsonl --val-input v.jsonl --tokenizer data/tokenizers/x.model
    python data/build_dataset.py --demo                       Python's documentation, no download
    python data/build_dataset.py --report result.json         a demo model's score beside xz's

The result is data/datasets/<name>/ with fineweb_train_*.bin, fineweb_val_*.bin and manifest.json,
and data/tokenizers/<name>_<vocabulary>_bpe.model unless --tokenizer is given. Beside each
validation shard stands fineweb_val_bytes_*.bin: for every token the UTF-8 bytes of the text that it
stands for.

The same inputs and seed give the same bytes whatever --workers is. Documents are read one by one;
what stays in memory is about 24 bytes per document and at most 100 MB of text for a new tokenizer.
"""

import argparse
import bz2
import collections
import functools
import hashlib
import heapq
import io
import json
import lzma
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import textwrap
import zlib
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import zstandard
from tqdm import tqdm

import demo_corpus
from shards import (BOS_ID, EOS_ID, MAX_VOCAB_SIZE, PAD_ID, UNK_ID, DataError, exit_code_of,
                    read_json, read_shard, sha256_file, user_path, write_shard, write_whole)

DATA_ROOT = Path(__file__).resolve().parent
COMPRESSED_SUFFIXES = {".gz", ".xz", ".zst", ".bz2"}
COMPRESSIONS = (  # first bytes, and what unpacks one stream
    (rb"\x1f\x8b\x08", lambda: zlib.decompressobj(wbits=31)),
    (rb"\xfd7zXZ\0", lzma.LZMADecompressor),
    (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", bz2.BZ2Decompressor),
    (rb"(\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18)",
     lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()))
FOREIGN = ((rb"PK\x03\x04", "a zip archive: unpack it and name the files in it"),
           (rb".{257}ustar", "a tar archive: unpack it and name the files in it"),
           (rb"PAR1", "a Parquet file: write its text column as JSON lines"),
           (rb"%PDF-", "a PDF: extract its text first"),
           (rb"\xff\xfe\0\0|\0\0\xfe\xff", "UTF-32: convert it to UTF-8, e.g. with iconv"),
           (rb"\xff\xfe|\xfe\xff", "UTF-16: convert it to UTF-8, e.g. with iconv"),
           (rb"version https://git-lfs", "a pointer of Git LFS: fetch its file, with git lfs pull"),
           (rb"[^\0]*\0", "binary, not text: give UTF-8 text or JSON lines"))
MAX_LAYERS = 8                       # of compression in one another
PEEK_BYTES = 1 << 16                 # of an input, to see what it is
JSON_LINES = {".jsonl", ".ndjson", ".json"}
DECODE_ERRORS = (EOFError, OSError, lzma.LZMAError, zlib.error, zstandard.ZstdError)
MIN_DOCUMENT_CHARS = 2_000           # of a plain text file cut at blank lines
TOKENIZER_SAMPLE_CHARS = 100_000_000
TOKENIZER_LINE_BYTES = 4_000         # SentencePiece skips lines longer than 4,192 bytes
BATCH_CHARS = 500_000                # text sent to a worker at once
DEMO_VAL_FRACTION = 0.045
MAX_COUNT = 65_535                   # bytes of one token: side files are uint16
# Of --fold-case: the word begins with a capital; it is all capitals; a capital follows; the next
# character, which looks like a mark, is none.
TITLE, UPPER, CAPITAL, LITERAL = CASE_MARKS = "\ue001\ue002\ue003\ue004"
SPACE = r"[ \t\r\n]"
# What normalization and the vocabulary lose of the validation text, one number per document.
LOSSES = ("changed_documents", "white_space_bytes", "dropped_characters_bytes",
          "rewritten_characters_bytes", "unknown_tokens")


@dataclass(frozen=True)
class Settings:
    """What to build; one of val_fraction, val_docs or separate validation documents is in use."""
    name: str
    out_root: Path = DATA_ROOT
    tokenizer: Path | None = None      # None: train one
    vocab_size: int = 1024             # of a new tokenizer
    val_fraction: float | None = None  # share of documents
    val_docs: int | None = None        # number of documents
    shard_tokens: int = 100_000_000
    seed: int = 1337
    workers: int = 1
    force: bool = False
    fold_case: bool = False            # write capitals as marks

    @property
    def target(self) -> Path:
        return self.out_root / "datasets" / self.name

    @property
    def new_tokenizer(self) -> Path:
        return self.out_root / "tokenizers" / f"{self.name}_{self.vocab_size}_bpe.model"


# ---------------------------------------------------------------------------------------------
# Reading documents
# ---------------------------------------------------------------------------------------------

def what_is(path: Path) -> str:
    """Why a path that is no regular file cannot be an input."""
    if path.is_dir():
        return "a folder: name the files in it"
    if path.exists() or str(path) == "-":
        return "not a regular file: inputs are read several times, so save it to a file first"
    return "not there: check the path"


class FileDocuments:
    """The documents of several files, read lazily and repeatedly; errors name file and line."""

    def __init__(self, paths: list[Path], text_field: str = "text", separator: str | None = None):
        self.paths, self.text_field, self.separator = paths, text_field, separator
        for path in paths:
            if not path.is_file():
                raise DataError(f"{path} is {what_is(path)}")

    def read(self, label: str):
        """Yield the text of every document, with a progress bar over the bytes on disk."""
        total = sum(path.stat().st_size for path in self.paths)
        with tqdm(total=total, desc=label, unit="B", unit_scale=True, mininterval=0.5) as bar:
            for path in self.paths:
                done = bar.n
                with open(path, "rb", buffering=PEEK_BYTES) as raw:
                    for text in self._documents(path, raw):
                        bar.update(done + raw.tell() - bar.n)
                        yield text
                bar.update(done + path.stat().st_size - bar.n)

    def _documents(self, path: Path, raw):
        content = decompressed(path, raw)
        if is_json_lines(path, content, self.separator is None):
            return json_documents(path, text_lines(path, content), self.text_field)
        return plain_documents(text_lines(path, content), self.separator)


class ListDocuments(list):
    """Documents that are in memory already, with the interface of FileDocuments."""

    def read(self, label: str):
        return tqdm(self, desc=label, unit="doc", mininterval=0.5)


def text_lines(path: Path, content):
    """Yield (line number from 1, line without its end); DataError if damaged."""
    number = 0
    try:
        for number, line in enumerate(content, start=1):
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {number}: not UTF-8 ({error.reason}): "
                        "convert the file") from None
    except DECODE_ERRORS as error:
        raise damaged(path, f"after line {number}", error) from None


def damaged(path: Path, where: str, error: Exception) -> DataError:
    return DataError(f"{path}, {where}: damaged ({error}): make or fetch the file again")


def decompressed(path: Path, raw) -> io.BufferedIOBase:
    """A file over the content of `raw`, unpacked by its first bytes, whatever the name says."""
    content, layers = raw, 0
    try:
        while new_decompressor := next((make for magic, make in COMPRESSIONS
                                        if re.match(magic, content.peek(16), re.DOTALL)), None):
            layers += 1
            if layers > MAX_LAYERS:  # some files unpack to themselves
                raise DataError(f"{path} is packed more than {MAX_LAYERS} times: unpack it first")
            content = io.BufferedReader(Blocks(unpacked(content, new_decompressor)), PEEK_BYTES)
        head = content.peek(PEEK_BYTES)
    except DECODE_ERRORS as error:
        raise damaged(path, "at its beginning", error) from None
    for magic, what in FOREIGN:
        if re.match(magic, head, re.DOTALL):
            raise DataError(f"{path} is {what}")
    return content


def unpacked(raw, new_decompressor):
    """Yield the content of all streams or frames of a packed file, which zeros may pad.

    Unlike the libraries' readers it reports a file that is cut short, and skips nothing in silence.
    """
    stream = None
    while block := raw.read(1 << 16):
        while block := block if stream else block.lstrip(b"\0"):
            stream = stream or new_decompressor()
            yield stream.decompress(block)
            block, stream = (stream.unused_data, None) if stream.eof else (b"", stream)
    if stream:
        raise EOFError("ends in the middle of its compressed data")


class Blocks(io.RawIOBase):
    """A file over an iterator of its blocks."""

    def __init__(self, blocks):
        self.blocks, self.rest = filter(None, blocks), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        self.rest = self.rest or memoryview(next(self.blocks, b""))
        size = min(len(buffer), len(self.rest))
        buffer[:size], self.rest = self.rest[:size], self.rest[size:]
        return size


def is_json_lines(path: Path, content, guess: bool) -> bool:
    """Whether to read JSON lines: by the name, or if `guess` by the first bytes; refuses arrays."""
    inner = path.with_suffix("") if path.suffix.lower() in COMPRESSED_SUFFIXES else path
    named = inner.suffix.lower() in JSON_LINES
    head = content.peek(PEEK_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
    if (named or guess) and re.match(rb'\[\s*[{\["]', head):
        raise DataError(f"{path} is a JSON array, JSON lines have one object per line: "
                        f"jq -c '.[]' {path.name} > {inner.stem}_lines.jsonl makes them")
    return named or guess and bool(re.match(rb'\{\s*"(?:[^"\\]|\\.)*"\s*:', head))


def json_documents(path: Path, lines, text_field: str):
    """Yield the text of every JSON line; blank lines are skipped."""
    for number, line in lines:
        if not line.strip():
            continue
        where, mend = f"{path}, line {number}", "mend or remove the line"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not valid JSON ({error}): {mend}; each line is one object"
                            ) from None
        if not isinstance(record, dict):
            raise DataError(f"{where}: a {type(record).__name__}, an object with {text_field!r} "
                            f"was expected: {mend}")
        if text_field not in record:
            raise DataError(f"{where}: no {text_field!r} in it, found keys {sorted(record)[:8]}: "
                            "name the right --text-field")
        text = record[text_field]
        if not isinstance(text, str):
            raise DataError(f"{where}: {text_field!r} is {json.dumps(text)[:40]}, not a string: "
                            f"{mend}, or name another --text-field")
        if re.search("[\ud800-\udfff]", text):
            raise DataError(f"{where}: half of a surrogate pair, not a character: {mend}")
        yield text


def plain_documents(lines, separator: str | None):
    """Yield documents: cut at lines equal to `separator`; None: at blank ones after 2,000 chars."""
    kept, chars = [], 0
    for _, line in lines:
        if (chars >= MIN_DOCUMENT_CHARS and not line.strip() if separator is None
                else line.strip() == separator.strip()):
            yield "\n".join(kept)
            kept, chars = [], 0
        else:
            kept.append(line)
            chars += len(line) + 1
    if kept:
        yield "\n".join(kept)


# ---------------------------------------------------------------------------------------------
# Splitting
# ---------------------------------------------------------------------------------------------

def text_key(text: str, seed: int) -> int:
    """64 bits that depend on text and seed only, so that copies fall to the same side."""
    return key_of(text.encode(), key=str(seed).encode())


def key_of(content: bytes, key: bytes = b"") -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8, key=key).digest(), "big")


def val_key_limit(settings: Settings, train) -> int:
    """Documents with a smaller key are for validation (0: these come separately)."""
    count = settings.val_docs
    if count is None:
        return int((settings.val_fraction or 0) * 2**64)
    keys = array("Q", (text_key(text, settings.seed) for text in train.read("choosing validation")
                       if text.strip()))
    keys = np.unique(np.frombuffer(keys, "u8"))
    if len(keys) <= count:
        raise DataError(f"--val-docs {count}: there are {len(keys)} different documents and "
                        "training needs at least one: give a smaller number or more text")
    return int(keys[count])


# ---------------------------------------------------------------------------------------------
# Case (CaseOps, pull request #1729 of the challenge)
# ---------------------------------------------------------------------------------------------

def fold_case(text: str) -> str:
    """The text with a-z for A-Z and CASE_MARKS: "in The NASA" is "in" TITLE " the" UPPER " nasa".

    #1729 has the mark behind the white space, which costs a second token: "the" and " the" are
    different pieces.
    """
    def folded(match) -> str:
        space, word = match.groups()  # all letters around a capital
        if len(word) > 1 and word.isupper():
            return UPPER + space + word.lower()
        rest = re.sub("[A-Z]", lambda capital: CAPITAL + capital[0].lower(), word[1:])
        return TITLE * word[0].isupper() + space + word[0].lower() + rest
    text = re.sub(f"[{CASE_MARKS}]", rf"{LITERAL}\g<0>", text)
    before = rf"(?<!{SPACE})({SPACE}*)(?<![A-Za-z])"  # all white space, or none
    return re.sub(before + "([a-z]*[A-Z][A-Za-z]*)", folded, text)


def unfold_case(text: str) -> str:
    """The inverse of fold_case; marks where it puts none are dropped."""
    def unfolded(match) -> str:
        literal, mark, space, word = match.groups()
        if mark is None:
            return literal
        capitals = len(word) if mark == UPPER else 1
        return space + word[:capitals].upper() + word[capitals:]
    return re.sub(rf"{LITERAL}(.?)|([{CASE_MARKS}])({SPACE}*)([a-z]*)", unfolded, text,
                  flags=re.DOTALL)


def mark_bytes(text: str) -> np.ndarray:
    """For each UTF-8 byte of a folded text: is it one of a mark?"""
    marks = re.finditer(f"{LITERAL}.|[{CASE_MARKS}]", text, flags=re.DOTALL)
    begins = np.cumsum([0, *(len(character.encode()) for character in text)])
    flags = np.zeros(begins[-1], bool)
    for mark in marks:
        flags[begins[mark.start()]:begins[mark.start() + 1]] = True
    return flags


# ---------------------------------------------------------------------------------------------
# Tokenizer
# ---------------------------------------------------------------------------------------------

def train_tokenizer(settings: Settings, train, key_limit: int) -> bytes:
    """A SentencePiece BPE model of training documents only (a sample of at most 100 MB)."""
    model = io.BytesIO()
    texts = sample_documents(train, settings.seed, key_limit)
    lines = tokenizer_lines(map(fold_case, texts) if settings.fold_case else texts)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model, model_type="bpe", byte_fallback=True,
            vocab_size=settings.vocab_size, split_digits=True, add_dummy_prefix=False,
            normalization_rule_name="nmt_nfkc", num_threads=1, minloglevel=2,
            user_defined_symbols=list(CASE_MARKS) if settings.fold_case else [],
            pad_id=PAD_ID, bos_id=BOS_ID, eos_id=EOS_ID, unk_id=UNK_ID)
    except (RuntimeError, ValueError) as error:
        reason = str(error).split(") ]")[-1].split("] ")[-1].strip() or str(error)
        way_out = ("choose a larger vocabulary" if "required_chars" in reason else
                   "choose a smaller vocabulary (260 at least) or give more text")
        raise DataError(f"--vocab-size {settings.vocab_size}: SentencePiece refuses ({reason}): "
                        f"{way_out}") from None
    return model.getvalue()


def sample_documents(train, seed: int, key_limit: int) -> list[str]:
    """Training documents with the smallest keys, up to TOKENIZER_SAMPLE_CHARS, by their keys."""
    heap, chars = [], 0
    for text in train.read("sampling for the tokenizer"):
        key = text_key(text, seed)
        if key < key_limit or not text.strip():
            continue
        heapq.heappush(heap, (-key, text))
        chars += len(text)
        while chars > TOKENIZER_SAMPLE_CHARS and len(heap) > 1:
            chars -= len(heapq.heappop(heap)[1])
    if not heap:
        raise DataError("no training document with any text in the inputs: "
                        "give more text, or less validation")
    return [text for _, text in sorted(heap, reverse=True)]


def tokenizer_lines(texts):
    """Yield the lines of the texts, long ones cut so that SentencePiece does not skip them."""
    n = TOKENIZER_LINE_BYTES // 4  # a character has 4 bytes at most
    piece = re.compile(rf".{{1,{n}}}$|.{{1,{n - 1}}}(?= )|.{{1,{n}}}")
    for text in texts:
        for line in text.splitlines():
            yield from piece.findall(line)


@functools.lru_cache(maxsize=1)
def load_tokenizer(path: Path) -> sentencepiece.SentencePieceProcessor:
    """The SentencePiece model, loaded once per process; DataError if it cannot make shards."""
    try:
        # Read here: SentencePiece cannot open names that are not UTF-8.
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except (RuntimeError, OSError) as error:
        raise DataError(f"--tokenizer {path}: not a SentencePiece model ({error}): "
                        "give a .model file") from None
    if tokenizer.vocab_size() > MAX_VOCAB_SIZE:
        raise DataError(f"--tokenizer {path}: {tokenizer.vocab_size()} pieces, uint16 shards hold "
                        f"at most {MAX_VOCAB_SIZE}: choose a smaller tokenizer")
    if tokenizer.bos_id() != BOS_ID:
        raise DataError(f"--tokenizer {path}: BOS has id {tokenizer.bos_id()}, shards need "
                        f"{BOS_ID}: train one with --vocab-size instead")
    return tokenizer


# ---------------------------------------------------------------------------------------------
# Encoding
# ---------------------------------------------------------------------------------------------

class Spool:
    """Encoded documents of one split in temporary files, with an index of them in memory (24 bytes
    a document, validation 64)."""

    def __init__(self, folder: Path):
        self.token_file, self.count_file = (tempfile.TemporaryFile(dir=folder) for _ in range(2))
        self.starts, self.keys, self.text_bytes = array("q", [0]), array("Q"), array("q")
        self.lost = array("q")  # validation only: LOSSES of every document

    def add(self, document: "Encoded") -> None:
        self.token_file.write(document.tokens)
        self.count_file.write(document.counts)
        self.starts.append(self.starts[-1] + len(document.tokens) // 2)
        self.keys.append(key_of(document.tokens))
        self.text_bytes.append(document.text_bytes)
        self.lost.extend(document.lost)

    def __len__(self) -> int:
        return len(self.keys)

    def mapped(self, file) -> np.ndarray:
        """The tokens, or bytes of text behind each (validation), [token_count], not loaded."""
        file.flush()
        return np.memmap(file, dtype="<u2", mode="r") if file.tell() else np.zeros(0, "<u2")


@dataclass(frozen=True)
class Encoded:
    """One document: its tokens with BOS in front, and what the manifest says of its text.

    `counts` and `lost` are empty for training, where nothing is scored.
    """
    tokens: bytes
    text_bytes: int
    for_val: bool
    counts: bytes = b""
    lost: tuple[int, ...] = ()


def encode_batch(tokenizer_path: Path, seed: int, key_limit: int, folds: bool, texts: list[str]):
    """The texts that have tokens, encoded; those with a key below `key_limit` for validation."""
    tokenizer, read = load_tokenizer(tokenizer_path), fold_case if folds else str
    for_val = [text_key(text, seed) < key_limit for text in texts]
    plain = iter(tokenizer.encode([read(text) for text, val in zip(texts, for_val) if not val]))
    made = (encode_for_val(tokenizer, text, folds) if val
            else Encoded(_with_bos(next(plain)), len(text.encode()), False)
            for text, val in zip(texts, for_val))
    return [document for document in made if len(document.tokens) > 2]


def _with_bos(ids: list[int]) -> bytes:
    return np.array([BOS_ID, *ids], dtype="<u2").tobytes()


def encode_for_val(tokenizer, text: str, folds: bool = False) -> Encoded:
    """A validation document with the bytes of text behind each token; marks have none."""
    raw, text = text.encode(), fold_case(text) if folds else text
    found = tokenizer.encode(text, return_type="offset_mapping", return_bytes=True)
    ids, length = found["ids"], len(text.encode())
    counts = token_bytes(tokenizer, ids, [end for _, end in found["offsets"]], length)
    if folds:
        marks = np.append(0, np.cumsum(mark_bytes(text)))
        counts = (counts - np.diff(marks[np.cumsum([0, *counts])])).tolist()
    if counts and max(counts) > MAX_COUNT:
        where = sum(counts[:counts.index(max(counts))])
        raise DataError(f"validation document {text[:40]!r}: {max(counts)} bytes of text fall to "
                        f"one token (at byte {where}), side files hold at most {MAX_COUNT}: "
                        "shorten the run of white space or unknown characters there")
    unknown = ids.count(tokenizer.unk_id())
    return Encoded(_with_bos(ids), len(raw), True, np.array([0, *counts], dtype="<u2").tobytes(),
                   (*lost_bytes(tokenizer, text), unknown))


def token_bytes(tokenizer, ids: list[int], ends: list[int], total: int) -> list[int]:
    """UTF-8 bytes of the text behind each token; together `total`, the bytes of the document.

    `ends`: where the text behind each token ends, in bytes. A token takes what normalization
    dropped in front of it, the last one also what is behind. Of a stretch that is normalized as one
    (a character in byte pieces, a symbol with a space) SentencePiece gives all to the last token;
    here each gets the bytes of its piece, if there are enough, and the last one the rest.
    """
    if not ids:
        return []
    counts = np.diff([0, *ends[:-1], total]).tolist()
    first = 0  # of the tokens that wait for their bytes
    for i, count in enumerate(counts):
        if not count:
            continue
        if first < i:
            if first and counts[first - 1] < _piece_bytes(tokenizer, ids[first - 1]):
                first -= 1  # the stretch begins inside this token
            *shares, last = (_piece_bytes(tokenizer, id_) for id_ in ids[first:i + 1])
            rest = sum(counts[first:i + 1]) - sum(shares)
            if rest >= last:
                counts[first:i + 1] = [*shares, rest]
        first = i + 1
    return counts


def _piece_bytes(tokenizer, id_: int) -> int:
    piece = tokenizer.id_to_piece(id_)
    return 1 if tokenizer.is_byte(id_) else len(piece.replace("▁", " ").encode())


def lost_bytes(tokenizer, text: str) -> tuple[int, int, int, int]:
    """LOSSES without the last: 1 if normalization changes more than line ends; bytes by cause."""
    normal = _without_dummy(tokenizer, tokenizer.normalize(text)).replace("▁", " ")
    if normal in (text, re.sub(r"[\t\n\r]", " ", text)):  # a line end for a space loses no byte
        return 0, 0, 0, 0
    before, after = collections.Counter(text), collections.Counter(normal)
    kinds = {c: _becomes(tokenizer, c) for c in before}

    def size(kind: str) -> int:
        return sum(n * len(c.encode()) for c, n in before.items() if kinds[c] == kind)

    spaces, dropped = size(" ") - after[" "], size("")
    return 1, spaces, dropped, len(text.encode()) - len(normal.encode()) - spaces - dropped


@functools.lru_cache(maxsize=1 << 16)
def _becomes(tokenizer, character: str) -> str:
    """What normalization makes of a character between two others, "▁" as a space."""
    if character.isascii() and character.isprintable():
        return character
    return _without_dummy(tokenizer, tokenizer.normalize(f"0{character}0"))[1:-1].replace("▁", " ")


def _without_dummy(tokenizer, normal: str) -> str:
    """Normalized text without the space that some tokenizers add in front or behind."""
    dummy = tokenizer.normalize("0")
    return normal[dummy.startswith("▁"):len(normal) - dummy.endswith("▁")] if normal else normal


def batches(texts):
    """Yield lists of consecutive texts of about BATCH_CHARS together."""
    batch, chars = [], 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def parallel_map(function, items, workers: int):
    """Yield function(item) in order; reads 4 items per worker ahead at most, Pool.imap all."""
    if workers == 1:
        yield from map(function, items)
        return
    ignored = signal.SIGINT, signal.SIG_IGN  # by the workers: Ctrl-C is for this process
    with multiprocessing.Pool(workers, signal.signal, ignored) as pool:
        running = collections.deque()
        for item in items:
            running.append(pool.apply_async(function, (item,)))
            if len(running) >= 4 * workers:
                yield running.popleft().get()
        while running:
            yield running.popleft().get()


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------

def chosen_documents(train: Spool, val: Spool, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the documents to write: train shuffled and without copies of val, val each once.

    Copies are found by their tokens: what normalization makes equal counts as a copy.
    """
    val_keys, first = np.unique(np.frombuffer(val.keys, dtype="u8"), return_index=True)
    order = np.random.default_rng(seed).permutation(len(train))
    is_copy = np.isin(np.frombuffer(train.keys, dtype="u8"), val_keys)
    return order[~is_copy[order]], np.sort(first)


def write_split(folder: Path, split: str, spool: Spool, indices: np.ndarray,
                shard_tokens: int) -> dict:
    """Write the documents as shards of `shard_tokens` tokens, the last one shorter, those of
    validation with the bytes of text behind each token beside them; their manifest entry."""
    starts, lengths = np.frombuffer(spool.starts, "i8")[indices], np.diff(spool.starts)[indices]
    ends, total = np.cumsum(lengths), int(lengths.sum())  # of the documents in the split
    shifts = starts + lengths - ends                      # from there to the spool

    def write(name: str, values: np.ndarray, begin: int, end: int) -> str:
        """Write the tokens `begin` to `end` of the split, of one document or several."""
        first, last = np.searchsorted(ends, [begin, end - 1], "right")
        bounds = [begin, *ends[first:last].tolist(), end]
        pieces = (values[a + shift:b + shift] for a, b, shift in
                  zip(bounds, bounds[1:], shifts[first:last + 1].tolist()))
        return write_shard(folder / name, pieces, end - begin)

    files, tokens, counts = [], spool.mapped(spool.token_file), spool.mapped(spool.count_file)
    for number, begin in enumerate(range(0, total, shard_tokens)):
        end = min(begin + shard_tokens, total)
        name, bytes_name = (f"fineweb_{kind}_{number:06d}.bin" for kind in (split, "val_bytes"))
        files.append({"name": name, "tokens": end - begin,
                      "sha256": write(name, tokens, begin, end)})
        if split == "val":
            sha256 = write(bytes_name, counts, begin, end)
            files[-1] |= {"bytes_name": bytes_name, "bytes_sha256": sha256,
                          "utf8_bytes": int(read_shard(folder / bytes_name).sum(dtype=np.int64))}
    text_bytes = int(np.frombuffer(spool.text_bytes, "i8")[indices].sum())
    entry = {"documents": len(indices), "tokens": total, "utf8_bytes": text_bytes, "files": files}
    if split == "val":
        if sum(file["utf8_bytes"] for file in files) != text_bytes:
            raise AssertionError(f"{folder}: side files do not add up to {text_bytes} bytes")
        lost = np.frombuffer(spool.lost, "i8").reshape(-1, len(LOSSES))[indices].sum(0).tolist()
        entry |= {"bytes_lost_by_normalization": sum(lost[1:4]),
                  "normalization": dict(zip(LOSSES, lost))}
    return entry


def check_free(settings: Settings) -> None:
    """DataError if the dataset or the new tokenizer exists already and --force is not given."""
    made = [settings.target, *([] if settings.tokenizer else [settings.new_tokenizer])]
    taken = [str(path) for path in made if path.exists()]
    if taken and not settings.force:
        raise DataError(f"{' and '.join(taken)} exists already: choose another --name, "
                        "or replace it with --force")


def publish(folder: Path, target: Path) -> None:
    """Rename the finished folder to its name; an old one goes only once the new one is there."""
    old = folder.with_name("old")  # in the temporary folder, which is removed
    try:
        if target.exists():
            os.rename(target, old)
        os.rename(folder, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise


# ---------------------------------------------------------------------------------------------
# The whole build
# ---------------------------------------------------------------------------------------------

def build(settings: Settings, train, val=None, source: dict | None = None, finish=None) -> dict:
    """Build the dataset from documents with a `read(label)` method; its manifest.

    `val`: separate validation documents, else the settings split `train`. `source`: where the text
    is from, for the manifest. `finish(folder, tokenizer)` returns further manifest keys.
    """
    check_free(settings)
    datasets = settings.target.parent
    datasets.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{settings.name}.", suffix=".part",
                                     dir=datasets) as temporary:
        folder = Path(temporary) / "new"
        folder.mkdir()
        path = settings.tokenizer or Path(temporary) / "tokenizer.model"
        if settings.tokenizer:
            tokenizer = load_tokenizer(path)  # complain before the passes over the text
            unknown = [mark for mark in CASE_MARKS
                       if tokenizer.piece_to_id(mark) == tokenizer.unk_id()]
            if not unknown and not settings.fold_case:
                raise DataError(f"--tokenizer {path}: has pieces for the marks of folded case: "
                                "add --fold-case, or leave out --tokenizer to train one without")
            if unknown and settings.fold_case:
                raise DataError(f"--fold-case: {path} has no piece for the mark {unknown[0]!r}: "
                                "leave out --tokenizer to train one that has, or --fold-case")
        key_limit = val_key_limit(settings, train)
        if not settings.tokenizer:
            path.write_bytes(train_tokenizer(settings, train, key_limit))
        splits = encode_splits(settings, train, val, path, key_limit, folder)
        manifest = make_manifest(settings, path, splits, source or {})
        manifest |= finish(folder, load_tokenizer(path)) if finish else {}
        content = json.dumps(manifest, indent=1) + "\n"
        (folder / "manifest.json").write_text(content, encoding="utf-8")
        check_free(settings)  # another build may have taken the name meanwhile
        if not settings.tokenizer:
            write_whole(settings.new_tokenizer, path.read_bytes())
        publish(folder, settings.target)
    return manifest


def encode_splits(settings: Settings, train, val, tokenizer_path: Path, key_limit: int,
                  folder: Path) -> dict:
    """Encode everything and write the shards; the manifest's `splits`."""
    train_spool, val_spool = Spool(folder.parent), Spool(folder.parent)
    for documents, label, limit in ((val, "encoding validation", 2**64),
                                    (train, "encoding", key_limit)):
        if documents is None:
            continue
        work = functools.partial(encode_batch, tokenizer_path, settings.seed, limit,
                                 settings.fold_case)
        for encoded in parallel_map(work, batches(documents.read(label)), settings.workers):
            for document in encoded:
                (val_spool if document.for_val else train_spool).add(document)
    chosen = chosen_documents(train_spool, val_spool, settings.seed)
    check_split(settings, *map(len, chosen), len(train_spool))
    splits = {split: write_split(folder, split, spool, indices, settings.shard_tokens)
              for split, spool, indices in (("train", train_spool, chosen[0]),
                                            ("val", val_spool, chosen[1]))}
    splits["train"]["dropped_copies_of_validation"] = len(train_spool) - len(chosen[0])
    splits["val"]["dropped_repeats"] = len(val_spool) - len(chosen[1])
    return splits


def check_split(settings: Settings, train_docs: int, val_docs: int, seen_train_docs: int) -> None:
    """DataError if a side is empty."""
    if not train_docs and seen_train_docs:
        raise DataError(f"all {seen_train_docs} training documents stand in the validation text "
                        "too: give other training text")
    if not train_docs and not val_docs:
        raise DataError("no document with any text in the inputs: check the paths and --text-field")
    if not val_docs:
        raise DataError(f"none of {train_docs} documents fell to validation: use --val-docs 10 or "
                        "so, more text, or --doc-separator to cut it into more documents")
    if not train_docs:
        raise DataError(f"all {val_docs} documents fell to validation: lower --val-fraction "
                        f"({settings.val_fraction}) or use --doc-separator to cut the text into "
                        "more documents")


def make_manifest(settings: Settings, tokenizer_path: Path, splits: dict, source: dict) -> dict:
    """The manifest: nothing that differs between runs (no time, no --workers, no output folder)."""
    trained = settings.tokenizer is None
    path = f"tokenizers/{settings.new_tokenizer.name}" if trained else str(settings.tokenizer)
    return {
        "name": settings.name,
        "tokenizer": {"path": path, "sha256": sha256_file(tokenizer_path), "trained_here": trained,
                      "vocab_size": load_tokenizer(tokenizer_path).vocab_size()},
        "splits": splits,
        "settings": {"val_fraction": settings.val_fraction, "val_docs": settings.val_docs,
                     "shard_tokens": settings.shard_tokens, "seed": settings.seed,
                     "fold_case": settings.fold_case, **source},
        "versions": {"sentencepiece": sentencepiece.__version__},
    }


# ---------------------------------------------------------------------------------------------
# Demo and report
# ---------------------------------------------------------------------------------------------

def decoded_documents(folder: Path, split: str, tokenizer, folds: bool = False) -> list[str]:
    """The texts of a split as its tokens decode: what a model is scored on."""
    paths = sorted(folder.glob(f"fineweb_{split}_[0-9]*.bin"))
    tokens = np.concatenate([read_shard(path) for path in paths])
    documents = np.split(tokens, np.flatnonzero(tokens == BOS_ID))[1:]
    texts = tokenizer.decode([document[1:].tolist() for document in documents])
    return list(map(unfold_case, texts)) if folds else texts


def normal_lines(text: str) -> str:
    """The text as the demo's tokenizer decodes it, by line: xz and the model count equal bytes."""
    normalizer = sentencepiece.SentencePieceNormalizer(
        rule_name="nmt_nfkc", add_dummy_prefix=False, escape_whitespaces=False,
        remove_extra_whitespaces=True)
    return "\n".join(filter(None, map(normalizer.normalize, text.splitlines())))


def build_demo(settings: Settings, max_modules: int | None = None) -> dict:
    """Build the demo corpus (of `max_modules` only, if given), with xz's figure in the manifest."""
    check_free(settings)
    texts = demo_corpus.documents(max_modules)
    train, val = (ListDocuments(map(normal_lines, side))
                  for side in demo_corpus.split(texts, settings.seed, DEMO_VAL_FRACTION))

    def xz_figure(folder: Path, tokenizer) -> dict:
        return demo_corpus.xz_comparison(*(
            decoded_documents(folder, split, tokenizer, settings.fold_case)
            for split in ("train", "val")))

    python = ".".join(map(str, sys.version_info[:3]))
    return build(settings, train, val, {"corpus": f"documentation in CPython {python}"}, xz_figure)


# What each score of a result is, by its name without digits.
TOLD = {"float": "the trained weights, in rows of the training length",
        "int": "the same, from the packed file",
        "banded": "the packed file, every token with full context",
        "sliding": "the packed file, every token with full context",
        "ttt": "the packed file, adapting to text that is already scored"}


def report(result_path: Path, manifest_path: Path) -> str:
    """Bits per byte of the demo's validation text: what xz needs, and the model after each step."""
    result = read_json(result_path, "the result file that train_gpt.py writes")
    manifest = read_json(manifest_path, "the demo's manifest: run build_dataset.py --demo first")
    xz_bpb, sizes = manifest.get("xz_bits_per_byte"), manifest.get("xz_bytes")
    val_bytes = sizes.get("val_text") if isinstance(sizes, dict) else None
    if not (isinstance(xz_bpb, float) and xz_bpb > 0 and isinstance(val_bytes, int)):
        raise DataError(f"{manifest_path}: no xz_bits_per_byte and xz_bytes in it: build the demo "
                        "again with --demo --force")
    scores, scored_bytes = _scores(result, result_path), result.get("scored_bytes")
    if not isinstance(scored_bytes, (int, float)) or not 0 < scored_bytes <= val_bytes:
        raise DataError(f"{result_path}: scored_bytes is {scored_bytes!r}, the demo's validation "
                        f"text has {val_bytes}: this is not a run on the demo; train on it (or on "
                        "this build of it) and try again")
    packed = {name: bpb for name, bpb in scores.items() if name != "float"} or scores
    best = min(packed, key=packed.get)
    ratio, size = packed[best] / xz_bpb, result.get("total_bytes")
    return "\n".join([
        "bits per byte of the validation text; less is better",
        f"  xz -9e   {xz_bpb:.4f}  after it has read the training text",
        *(f"  {name:8} {bpb:.4f}  {TOLD.get(name.rstrip('0123456789_'), '')}".rstrip()
          for name, bpb in scores.items()),
        f"The model ({best}) needs {abs(1 - ratio):.1%} {'less' if ratio < 1 else 'more'} than xz. "
        f"Scored: {scored_bytes / val_bytes:.1%} of {val_bytes:,} bytes."
        + (f" Code + model: {size:,} bytes." if isinstance(size, int) else "")])


def _scores(result: dict, path: Path) -> dict[str, float]:
    """The numbers in `val_bpb` by name; DataError if there are none or one is not positive."""
    val_bpb = result.get("val_bpb")
    if not isinstance(val_bpb, dict) or not any(val_bpb.values()):
        raise DataError(f"{path}: val_bpb is {val_bpb!r}, an object with scores was expected: "
                        "give the result file of train_gpt.py")
    scores = {name: bpb for name, bpb in val_bpb.items() if bpb is not None}
    for name, bpb in scores.items():
        if not isinstance(bpb, (int, float)) or not 0 < bpb < 1e9:
            raise DataError(f"{path}: val_bpb.{name} is {bpb!r}, a positive number was expected: "
                            "run the training again")
    return scores


PROMPT = "This module provides"


def sample(result_path: Path, manifest_path: Path, tokens: int = 200, heat: float = 0.9) -> str:
    """PROMPT as the artifact of a result goes on with it; or one line that says why not."""
    result, manifest = read_json(result_path, "a result"), read_json(manifest_path, "a manifest")
    sys.path.insert(0, str(DATA_ROOT.parent))
    try:
        # Beside logs/: OUT_DIR may have been relative. EVAL_ONLY may have named a file elsewhere.
        artifact = result_path.resolve().parent.parent / Path(result["artifact"]).name
        artifact = artifact if artifact.is_file() else Path(result["artifact"])
        pieces = manifest_path.parents[2] / manifest["tokenizer"]["path"]
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
        import torch
        import train_gpt as T
    except (ImportError, LookupError, OSError, TypeError) as problem:
        return f"No sample: {type(problem).__name__}: {problem}"
    try:
        s = T.settings_of_artifact(artifact, {"DEVICE": "cpu"})[0]
        model = T.GPT(s)
        T.load_quantized(model, T.read_artifact(artifact, result["artifact_sha256"])[1], artifact)
    except (T.UserError, LookupError) as problem:  # another run's file, another version's
        return f"No sample: {problem}"
    torch.set_num_threads(1)  # passes are short: more threads would wait for each other
    folds = manifest.get("settings", {}).get("fold_case")
    read, write = (fold_case, unfold_case) if folds else (str, str)
    dice, text = torch.Generator().manual_seed(s.seed), [BOS_ID, *tokenizer.encode(read(PROMPT))]
    with torch.inference_mode():
        for _ in range(tokens):
            logits = model.logits(torch.tensor([text[-s.train_seq_len:]]))[0, -1] / heat
            logits[BOS_ID] = -torch.inf  # one document
            text.append(int(torch.multinomial(logits.softmax(-1), 1, generator=dice)))
    lines = textwrap.wrap(write(tokenizer.decode(text)), 96)
    return "\n".join([f"The packed model goes on after \"{PROMPT}\" (temperature {heat}):",
                      *(f"  {line}" for line in lines)])


def loss_picture(result_path: Path) -> str:
    """Draw the training loss of the log beside a result; says where, or why not."""
    sys.path.append(str(DATA_ROOT.parent / "records"))
    picture = result_path.with_suffix(".png")
    try:
        from logs import plot_losses, read_logs
        log = read_logs(result_path.with_suffix(".txt"))[0]
        if not log.curve:
            return f"No picture: {log.path} has no steps of a training"
        plot_losses(picture, {result_path.stem: log})
    except (ImportError, OSError) as problem:
        return f"No picture: {problem}"
    return f"Training loss by step: {picture}"


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------

def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="*", type=user_path,
        help="JSON lines or plain text, also packed by gzip, xz, zstd or bzip2: told by content")
    add("--name", help="folder under datasets/ (default: name of the first input)")
    add("--out-root", type=user_path, default=DATA_ROOT,
        help="where datasets/ and tokenizers/ are (default: %(default)s)")
    add("--tokenizer", type=user_path, metavar="MODEL",
        help="use this SentencePiece model instead of training one")
    add("--vocab-size", type=int, default=Settings.vocab_size,
        help="pieces of the tokenizer to train (default %(default)s)")
    one_of = parser.add_mutually_exclusive_group().add_argument
    one_of("--val-fraction", type=float, help="share of documents for validation (default 0.05)")
    one_of("--val-docs", type=int, metavar="N", help="this many documents for validation")
    one_of("--val-input", type=user_path, nargs="+", metavar="PATH",
           help="files of validation documents")
    add("--text-field", default="text", help="key of the text in JSON lines (default %(default)s)")
    add("--doc-separator", metavar="LINE",
        help="plain text: a line equal to this ends a document ('' is every blank line). Default: "
             f"it ends at the first blank line after {MIN_DOCUMENT_CHARS} characters or the file's")
    add("--fold-case", action="store_true",
        help="write capitals as marks in front of lower letters and their space (after CaseOps, "
             "#1729), so that The and the share a piece; bytes are still those of the text")
    add("--shard-tokens", type=int, default=Settings.shard_tokens,
        help="tokens per shard (default %(default)s)")
    add("--seed", type=int, default=Settings.seed,
        help="decides the split and the order of training (default %(default)s)")
    add("--workers", type=int, default=min(os.cpu_count() or 1, 16),
        help="processes that encode (default: one per core, at most 16: %(default)s)")
    add("--force", action="store_true", help="replace a dataset and tokenizer of this name")
    add("--demo", action="store_true",
        help="build from the documentation that comes with Python: pydoc topics, docstrings and "
             "comment blocks of the standard library")
    add("--report", type=user_path, metavar="RESULT.json",
        help="a run on the demo beside xz, some text that it writes, and a picture of its loss; "
             "builds nothing")
    return parser


def settings_from(o: argparse.Namespace) -> Settings:
    """Checked settings of the options; DataError naming every flag that is out of range."""
    own_split = o.val_input or o.val_docs is not None or o.val_fraction is not None
    default_name = "demo" if o.demo else o.inputs[0].name.split(".")[0] if o.inputs else "x"
    name = default_name if o.name is None else o.name
    checks = [
        (1 <= o.workers <= 1024, f"--workers {o.workers}: 1 to 1024"),
        (1 <= o.shard_tokens < 2**31, f"--shard-tokens {o.shard_tokens}: 1 to 2147483647"),
        (260 <= o.vocab_size <= MAX_VOCAB_SIZE, f"--vocab-size {o.vocab_size}: 260 (bytes and "
         f"control pieces) to {MAX_VOCAB_SIZE} (uint16 shards)"),
        (o.seed >= 0, f"--seed {o.seed}: 0 or more"),
        (o.val_docs is None or o.val_docs > 0, f"--val-docs {o.val_docs}: 1 or more"),
        (o.val_fraction is None or 0 < o.val_fraction < 1,
         f"--val-fraction {o.val_fraction}: above 0, below 1"),
        (o.demo or o.inputs, "no inputs: name text or JSONL files, or use --demo"),
        (not o.demo or not (o.inputs or own_split),
         "--demo has its own text and split: leave out inputs and --val-*"),
        (name and not name.startswith(".") and not set(name) & set("/\\:"),
         f"--name {name!r}: a plain folder name")]
    problems = [message for fine, message in checks if not fine]
    if problems:
        raise DataError("; ".join(problems))
    fraction = o.val_fraction if o.demo or own_split else 0.05
    return Settings(name, o.out_root, o.tokenizer, o.vocab_size, fraction, o.val_docs,
                    o.shard_tokens, o.seed, o.workers, o.force, o.fold_case)


def build_from_files(settings: Settings, options: argparse.Namespace) -> dict:
    train, val = (FileDocuments(paths, options.text_field, options.doc_separator) if paths else None
                  for paths in (options.inputs, options.val_input))

    def described(paths):
        return [{"name": path.name, "bytes": path.stat().st_size} for path in paths or []]
    source = {"inputs": described(options.inputs), "val_inputs": described(options.val_input),
              "text_field": options.text_field, "doc_separator": options.doc_separator}
    return build(settings, train, val, source)


def summary(settings: Settings, manifest: dict) -> str:
    """What was built, a line per split."""
    lines = [f"{settings.target}  (tokenizer {manifest['tokenizer']['path']})"]
    for split, entry in manifest["splits"].items():
        lines.append(f"{split}: {entry['documents']:,} documents, {entry['tokens']:,} tokens, "
                     f"{entry['utf8_bytes']:,} bytes of text, {len(entry['files'])} shards")
    if repeats := manifest["splits"]["val"]["dropped_repeats"]:
        lines.append(f"val: {repeats:,} repeated documents left out")
    lines += normalization_lines(manifest["splits"]["val"])
    if "xz_bits_per_byte" in manifest:
        lines.append(f"xz -9e needs {manifest['xz_bits_per_byte']:.4f} bits per byte of validation "
                     "text")
    return "\n".join(lines)


def normalization_lines(val: dict) -> list[str]:
    """What of the validation text the tokens do not hold, by name; nothing if they hold all."""
    n, lines = val["normalization"], []
    if n["changed_documents"]:
        lines.append(
            f"the tokenizer's normalization changes {n['changed_documents']:,} of "
            f"{val['documents']:,} validation documents and loses "
            f"{val['bytes_lost_by_normalization']:,} bytes: {n['white_space_bytes']:,} of white "
            f"space, {n['dropped_characters_bytes']:,} of dropped characters, "
            f"{n['rewritten_characters_bytes']:,} by rewritten characters (NFKC); bits per byte "
            "count the original text")
    if n["unknown_tokens"]:
        lines.append(f"{n['unknown_tokens']:,} validation tokens are unknown pieces, which stand "
                     "for any text: no fair score; use a tokenizer with byte fallback")
    return lines


def main(arguments: list[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    if options.report:
        manifest = options.out_root / "datasets" / (options.name or "demo") / "manifest.json"
        print(report(options.report, manifest))
        print(sample(options.report, manifest))
        print(loss_picture(options.report))
        return
    settings = settings_from(options)
    manifest = build_demo(settings) if options.demo else build_from_files(settings, options)
    print(summary(settings, manifest))


if __name__ == "__main__":
    sys.exit(exit_code_of(main, sys.argv[1:]))
