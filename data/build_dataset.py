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
import shutil
import signal
import sys
import tarfile
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
from shards import (BOS_ID, EOS_ID, MAX_VOCAB_SIZE, PAD_ID, UNK_ID, DataError, atomic_write,
                    exit_code_of, read_shard, sha256_file, user_path, write_shard)

DATA_ROOT = Path(__file__).resolve().parent
COMPRESSED_SUFFIXES = {".gz", ".xz", ".zst", ".bz2"}
COMPRESSIONS = (  # first bytes, and what unpacks one stream
    (rb"\x1f\x8b\x08", lambda: zlib.decompressobj(wbits=31)),
    (rb"\xfd7zXZ\0", lambda: lzma.LZMADecompressor()),
    (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", lambda: bz2.BZ2Decompressor()),
    (rb"(\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18)",
     lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()))
FOREIGN = ((rb"PK\x03\x04", "a zip archive: unpack it and name the files in it"),
           (rb"PAR1", "a Parquet file: write its text column as JSON lines"),
           (rb"%PDF-", "a PDF: extract its text first"),
           (rb"\xff\xfe\0\0|\0\0\xfe\xff", "UTF-32: convert it to UTF-8, e.g. with iconv"),
           (rb"\xff\xfe|\xfe\xff", "UTF-16: convert it to UTF-8, e.g. with iconv"),
           (rb"version https://git-lfs", "a pointer of Git LFS: fetch its file, with git lfs pull"))
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
# What normalization and the vocabulary lose of the validation text, one number per document.
LOSSES = ("changed_documents", "white_space_bytes", "dropped_characters_bytes",
          "rewritten_characters_bytes", "unknown_tokens")


@dataclass(frozen=True)
class Settings:
    """What to build. Exactly one of val_fraction, val_docs or separate validation documents is in
    use."""
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
    """The documents of several files, read lazily, as often as asked for; errors name file and
    line."""

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
                with open(path, "rb", buffering=PEEK_BYTES) as raw:
                    before = 0
                    for text in self._documents(path, raw):
                        position = raw.tell()
                        if position != before:
                            bar.update(position - before)
                            before = position
                        yield text
                    bar.update(path.stat().st_size - before)

    def _documents(self, path: Path, raw):
        content = decompressed(path, raw)
        if is_json_lines(path, content, self.separator is None):
            return json_documents(path, text_lines(path, content), self.text_field)
        return plain_documents(text_lines(path, content), self.separator)


def text_lines(path: Path, content):
    """Yield (line number from 1, line without its end); DataError if damaged."""
    number = 0
    try:
        for number, line in enumerate(content, start=1):
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {number}: not UTF-8 ({error.reason}): convert the "
                        "file") from None
    except DECODE_ERRORS as error:
        raise damaged(path, f"after line {number}", error) from None


def damaged(path: Path, where: str, error: Exception) -> DataError:
    return DataError(f"{path}, {where}: damaged ({error}): make or fetch the file again")


def decompressed(path: Path, raw) -> io.BufferedIOBase:
    """A file object over the content of `raw`, unpacked by its first bytes, whatever the name
    says."""
    content, layers = raw, 0
    try:
        while new_decompressor := next((make for magic, make in COMPRESSIONS if
                                        re.match(magic, content.peek(16), re.DOTALL)), None):
            layers += 1
            if layers > MAX_LAYERS:  # some files unpack to themselves
                raise DataError(f"{path} is packed more than {MAX_LAYERS} times: unpack it first")
            content = io.BufferedReader(Decompressed(content, new_decompressor), PEEK_BYTES)
        head = content.peek(PEEK_BYTES)
    except DECODE_ERRORS as error:
        raise damaged(path, "at its beginning", error) from None
    found = next((what for magic, what in FOREIGN if re.match(magic, head)), None)
    if found is None and is_tar(head):
        found = "a tar archive: unpack it and name the files in it"
    if found is None and b"\0" in head:
        found = "binary, not text: give UTF-8 text or JSON lines"
    if found:
        raise DataError(f"{path} is {found}")
    return content


def is_tar(head: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(head[:tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


class Decompressed(io.RawIOBase):
    """All streams or frames of a compressed file, with the zeros that may pad them.

    Unlike the libraries' readers it reports a file that is cut short, and skips nothing in silence.
    """

    def __init__(self, raw, new_decompressor):
        self.raw, self.new = raw, new_decompressor
        self.stream, self.pending, self.output = None, b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.output:
            block = self.pending or self.raw.read(1 << 16)
            self.pending = b""
            if not block:
                if self.stream:
                    raise EOFError("ends in the middle of its compressed data")
                return 0
            if not self.stream:
                block = block.lstrip(b"\0")
                if not block:
                    continue
                self.stream = self.new()
            self.output = self.stream.decompress(block)
            if self.stream.eof:
                self.pending, self.stream = self.stream.unused_data, None
        size = min(len(buffer), len(self.output))
        buffer[:size], self.output = self.output[:size], self.output[size:]
        return size


def is_json_lines(path: Path, content, guess: bool) -> bool:
    """Whether to read JSON lines: by the first bytes if `guess`, else by the name; refuses an
    array."""
    inner = path.with_suffix("") if path.suffix.lower() in COMPRESSED_SUFFIXES else path
    named = inner.suffix.lower() in JSON_LINES
    head = content.peek(PEEK_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
    if named and not re.match(rb"\[", head):
        return True
    if (named or guess) and re.match(rb'\[\s*[{\["]', head):
        raise DataError(f"{path} is a JSON array, JSON lines have one object per line: "
                        f"jq -c '.[]' {path.name} > {inner.stem}_lines.jsonl makes them")
    return named or guess and bool(re.match(rb'\{\s*"(?:[^"\\]|\\.)*"\s*:', head))


def json_documents(path: Path, lines, text_field: str):
    """Yield the text of every JSON line; blank lines are skipped."""
    for number, line in lines:
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not valid JSON ({error}): mend or remove the line; "
                            "each line is one object") from None
        if not isinstance(record, dict):
            raise DataError(f"{where}: a {type(record).__name__}, an object with {text_field!r} "
                            "was expected: mend or remove the line")
        if text_field not in record:
            raise DataError(f"{where}: no {text_field!r} in it, found keys {sorted(record)[:8]}: "
                            "name the right --text-field")
        text = record[text_field]
        if not isinstance(text, str):
            raise DataError(f"{where}: {text_field!r} is {json.dumps(text)[:40]}, not a string: "
                            "mend or remove the line, or name another --text-field")
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise DataError(f"{where}: half of a surrogate pair, not a character: mend the line")
        yield text


def plain_documents(lines, separator: str | None):
    """Yield documents: cut at lines equal to `separator`, or (None) at blank lines after 2,000
    characters."""
    kept, chars = [], 0
    for _, line in lines:
        blank = not line.strip()
        cut = (blank and chars >= MIN_DOCUMENT_CHARS if separator is None
               else line.strip() == separator.strip())
        if cut:
            yield "\n".join(kept)
            kept, chars = [], 0
        else:
            kept.append(line)
            chars += len(line) + 1
    if kept:
        yield "\n".join(kept)


class ListDocuments:
    """Documents that are in memory already, with the interface of FileDocuments."""

    def __init__(self, texts: list[str]):
        self.texts = texts

    def read(self, label: str):
        return iter(tqdm(self.texts, desc=label, unit="doc", mininterval=0.5))


# ---------------------------------------------------------------------------------------------
# Splitting
# ---------------------------------------------------------------------------------------------

def text_key(text: str, seed: int) -> int:
    """64 bits that depend on the document's text and the seed only, so copies always fall
    together."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8,
                                          key=str(seed).encode()).digest(), "big")


def val_key_limit(settings: Settings, train) -> int:
    """Documents whose key is below this limit are for validation (0: none, they come
    separately)."""
    if settings.val_docs is not None:
        return _limit_for_count(settings.val_docs, settings.seed, train)
    return int((settings.val_fraction or 0) * 2**64)


def _limit_for_count(count: int, seed: int, train) -> int:
    """The key that has exactly `count` smaller ones among the distinct documents."""
    smallest, members = [], set()  # heap of negated keys, the largest on top
    for text in train.read("choosing validation"):
        key = text_key(text, seed)
        if not text.strip() or key in members:
            continue
        if len(smallest) <= count:
            heapq.heappush(smallest, -key)
            members.add(key)
        elif key < -smallest[0]:
            members.remove(-heapq.heapreplace(smallest, -key))
            members.add(key)
    if len(smallest) <= count:
        raise DataError(f"--val-docs {count}: there are {len(smallest)} different documents and "
                        "training needs at least one: give a smaller number or more text")
    return -smallest[0]


# ---------------------------------------------------------------------------------------------
# Tokenizer
# ---------------------------------------------------------------------------------------------

def train_tokenizer(settings: Settings, train, key_limit: int) -> bytes:
    """A SentencePiece BPE model trained on training documents only (a sample by hash of at most 100
    MB)."""
    model = io.BytesIO()
    lines = iter(tokenizer_lines(sample_documents(train, settings.seed, key_limit)))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model, model_type="bpe",
            vocab_size=settings.vocab_size, byte_fallback=True, split_digits=True,
            normalization_rule_name="nmt_nfkc", add_dummy_prefix=False, pad_id=PAD_ID,
            bos_id=BOS_ID, eos_id=EOS_ID, unk_id=UNK_ID, num_threads=1, minloglevel=2)
    except (RuntimeError, ValueError) as error:
        reason = str(error).split(") ]")[-1].split("] ")[-1].strip() or str(error)
        raise DataError(f"--vocab-size {settings.vocab_size}: SentencePiece refuses ({reason}): "
                        "choose a smaller vocabulary (260 at least) or give more text") from None
    return model.getvalue()


def sample_documents(train, seed: int, key_limit: int) -> list[str]:
    """Training documents with the smallest keys, up to TOKENIZER_SAMPLE_CHARS, in the order of
    their keys."""
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
        raise DataError("no training document with any text in the inputs: give more text, or less "
                        "validation")
    return [text for _, text in sorted(heap, reverse=True)]


def tokenizer_lines(texts):
    """Yield the lines of the texts, long ones cut so that SentencePiece does not skip them."""
    for text in texts:
        for line in text.splitlines():
            while line:
                piece = line[:TOKENIZER_LINE_BYTES // 4]  # a character has 4 bytes at most
                if len(piece) < len(line) and " " in piece[1:]:
                    piece = piece[:piece.rindex(" ")]
                yield piece
                line = line[len(piece):]


@functools.lru_cache(maxsize=1)
def load_tokenizer(path: str) -> sentencepiece.SentencePieceProcessor:
    """The SentencePiece model at `path`, loaded once per process; DataError if it cannot make
    shards."""
    if not Path(path).is_file():
        raise DataError(f"--tokenizer {path}: no such file: give a SentencePiece .model file")
    try:
        # Read here: SentencePiece cannot open names that are not UTF-8.
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=Path(path).read_bytes())
    except (RuntimeError, OSError) as error:
        raise DataError(f"--tokenizer {path}: not a SentencePiece model ({error}): give a .model "
                        "file") from None
    if tokenizer.vocab_size() > MAX_VOCAB_SIZE:
        raise DataError(f"--tokenizer {path}: {tokenizer.vocab_size()} pieces, uint16 shards hold "
                        f"at most {MAX_VOCAB_SIZE}: choose a smaller tokenizer")
    if tokenizer.bos_id() != BOS_ID:
        raise DataError(f"--tokenizer {path}: BOS has id {tokenizer.bos_id()}, shards "
                        f"need {BOS_ID}: train one with --vocab-size instead")
    return tokenizer


# ---------------------------------------------------------------------------------------------
# Encoding
# ---------------------------------------------------------------------------------------------

class Spool:
    """Encoded documents of one split in temporary files, with an index in memory (24 bytes a
    document, validation 56)."""

    def __init__(self, path: Path):
        self.token_file, self.count_file = open(path,
                                                "w+b"), open(path.with_suffix(".bytes"), "w+b")
        self.starts, self.keys, self.text_bytes = array("Q", [0]), array("Q"), array("Q")
        self.lost = array("q")  # validation only: LOSSES of every document

    def add(self, document: "Encoded") -> None:
        self.token_file.write(document.tokens)
        self.count_file.write(document.counts)
        self.starts.append(self.starts[-1] + len(document.tokens) // 2)
        digest = hashlib.blake2b(document.tokens, digest_size=8).digest()
        self.keys.append(int.from_bytes(digest, "big"))
        self.text_bytes.append(document.text_bytes)
        self.lost.extend(document.lost)

    def __len__(self) -> int:
        return len(self.keys)

    def _mapped(self, file) -> np.ndarray:
        file.flush()
        return np.memmap(file, dtype="<u2", mode="r") if self.starts[-1] else np.zeros(0, "<u2")

    def tokens(self) -> np.ndarray:
        """All tokens [token_count] uint16, mapped from the file."""
        return self._mapped(self.token_file)

    def counts(self) -> np.ndarray:
        """Bytes of text of all tokens [token_count] uint16, mapped from the file; validation
        only."""
        return self._mapped(self.count_file)

    def close(self) -> None:
        self.token_file.close()
        self.count_file.close()


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


def encode_batch(tokenizer_path: str, seed: int, key_limit: int, texts: list[str]) -> list[Encoded]:
    """The texts that have tokens, encoded; those with a key below `key_limit` for validation."""
    tokenizer = load_tokenizer(tokenizer_path)
    for_val = [text_key(text, seed) < key_limit for text in texts]
    plain = iter(tokenizer.encode([text for text, val in zip(texts, for_val) if not val]))
    made = (encode_for_val(tokenizer, text) if val else Encoded(
        _with_bos(next(plain)), len(text.encode()), False) for text, val in zip(texts, for_val))
    return [document for document in made if len(document.tokens) > 2]


def _with_bos(ids: list[int]) -> bytes:
    return np.array([BOS_ID, *ids], dtype="<u2").tobytes()


def encode_for_val(tokenizer, text: str) -> Encoded:
    """A validation document with the bytes of text behind each token."""
    found = tokenizer.encode(text, return_type="offset_mapping", return_bytes=True)
    raw, ids = text.encode(), found["ids"]
    counts = token_bytes(tokenizer, ids, [end for _, end in found["offsets"]], len(raw))
    if counts and max(counts) > MAX_COUNT:
        where = sum(counts[:counts.index(max(counts))])
        raise DataError(f"validation document {text[:40]!r}: {max(counts)} bytes of text fall to "
                        f"one token (at byte {where}), side files hold at most {MAX_COUNT}: "
                        "shorten the run of white space or unknown characters there")
    unknown = ids.count(tokenizer.unk_id())
    return Encoded(_with_bos(ids), len(raw), True, np.array([0, *counts], dtype="<u2").tobytes(),
                   (*lost_bytes(tokenizer, text), unknown))


def token_bytes(tokenizer, ids: list[int], ends: list[int], total: int) -> list[int]:
    """UTF-8 bytes of the text behind each token; together exactly `total`, the bytes of the
    document.

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
    return (1 if tokenizer.is_byte(id_)
            else len(tokenizer.id_to_piece(id_).replace("▁", " ").encode()))


def lost_bytes(tokenizer, text: str) -> tuple[int, int, int, int]:
    """LOSSES without the last: 1 if normalization changes more than line ends; then the bytes by
    cause."""
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
    """Yield (item, function(item)) in order; reads at most 4 items per worker ahead (Pool.imap
    reads all)."""
    if workers == 1:
        yield from ((item, function(item)) for item in items)
        return
    # Ctrl-C is ours
    with multiprocessing.Pool(workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        running = collections.deque()
        for item in items:
            running.append((item, pool.apply_async(function, (item,))))
            if len(running) >= 4 * workers:
                done, result = running.popleft()
                yield done, result.get()
        while running:
            done, result = running.popleft()
            yield done, result.get()


def encode(settings: Settings, documents, label: str, tokenizer_path: Path, key_limit: int,
           train: Spool, val: Spool) -> None:
    """Encode the documents into `val` (key below `key_limit`) or `train`; texts without tokens are
    left out."""
    work = functools.partial(encode_batch, str(tokenizer_path), settings.seed, key_limit)
    for _, encoded in parallel_map(work, batches(documents.read(label)), settings.workers):
        for document in encoded:
            (val if document.for_val else train).add(document)


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------

def chosen_documents(train: Spool, val: Spool, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the documents to write: train shuffled and without copies of validation, val each
    once.

    Copies are found by their tokens, so texts that differ in what the tokenizer normalizes count as
    well.
    """
    val_keys, first = np.unique(np.frombuffer(val.keys, dtype="u8"), return_index=True)
    order = np.random.default_rng(seed).permutation(len(train))
    is_copy = np.isin(np.frombuffer(train.keys, dtype="u8"), val_keys)
    return order[~is_copy[order]], np.sort(first)


def write_split(folder: Path, split: str, spool: Spool, indices: np.ndarray,
                shard_tokens: int) -> dict:
    """Write the documents as shards of `shard_tokens` tokens, the last one shorter; their manifest
    entry.

    Validation shards get side files with the bytes of text behind each token.
    """
    starts = np.frombuffer(spool.starts, dtype="u8").astype(np.int64)
    lengths = starts[indices + 1] - starts[indices]
    total = int(lengths.sum())
    pieces = _pieces(spool.tokens(), starts[indices], lengths, shard_tokens)
    counts = _pieces(spool.counts(), starts[indices], lengths,
                     shard_tokens) if split == "val" else None
    files = []
    for number in range(-(-total // shard_tokens)):
        count = min(shard_tokens, total - number * shard_tokens)
        name = f"fineweb_{split}_{number:06d}.bin"
        files.append({"name": name, "tokens": count,
                      "sha256": write_shard(folder / name, next(pieces), count)})
        if counts:
            name = f"fineweb_{split}_bytes_{number:06d}.bin"
            sha256 = write_shard(folder / name, next(counts), count)
            files[-1] |= {"bytes_name": name, "bytes_sha256": sha256,
                          "utf8_bytes": int(read_shard(folder / name).sum(dtype=np.int64))}
    text_bytes = int(np.frombuffer(spool.text_bytes, dtype="u8")[indices].sum())
    entry = {"documents": len(indices), "tokens": total, "utf8_bytes": text_bytes, "files": files}
    if counts:
        if sum(file["utf8_bytes"] for file in files) != text_bytes:
            raise AssertionError(f"{folder}: the side files do not add up to the {text_bytes} "
                                 "bytes of text")
        lost = np.frombuffer(spool.lost,
                             dtype="i8").reshape(-1, len(LOSSES))[indices].sum(axis=0).tolist()
        entry |= {"bytes_lost_by_normalization": sum(lost[1:4]),
                  "normalization": dict(zip(LOSSES, lost))}
    return entry


def _pieces(tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray, shard_tokens: int):
    """Yield per shard an iterator over arrays that fill it exactly; a document may go on in the
    next shard."""
    documents = zip(starts.tolist(), lengths.tolist())
    rest = collections.deque()

    def one_shard():
        room = shard_tokens
        while room:
            start, length = rest.popleft() if rest else next(documents, (0, 0))
            if not length:
                return
            taken = min(length, room)
            yield tokens[start:start + taken]
            room -= taken
            if taken < length:
                rest.append((start + taken, length - taken))

    while True:
        yield one_shard()


def check_free(settings: Settings) -> None:
    """DataError if the dataset or the new tokenizer exists already and --force is not given."""
    taken = [settings.target] if settings.target.exists() else []
    if settings.tokenizer is None and settings.new_tokenizer.exists():
        taken.append(settings.new_tokenizer)
    if taken and not settings.force:
        raise DataError(f"{' and '.join(map(str, taken))} exists already: choose another --name, "
                        "or replace it with --force")


def publish(staging: Path, target: Path) -> None:
    """Rename the finished folder to its name; an old one of that name goes only once the new one is
    there."""
    old = staging.with_name(staging.name + ".old")
    if target.exists():
        os.rename(target, old)
    try:
        os.rename(staging, target)
    except BaseException:
        if old.exists():
            os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


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
        folder = Path(temporary) / settings.name
        folder.mkdir()
        tokenizer_path, model, key_limit = prepare_tokenizer(settings, train, Path(temporary))
        splits = encode_splits(settings, train, val, tokenizer_path, key_limit, folder)
        manifest = make_manifest(settings, tokenizer_path, splits, source or {})
        manifest |= finish(folder, load_tokenizer(str(tokenizer_path))) if finish else {}
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n",
                                              encoding="utf-8")
        if model is not None:
            with atomic_write(settings.new_tokenizer) as file:
                file.write(model)
        publish(folder, settings.target)
    return manifest


def prepare_tokenizer(settings: Settings, train, temporary: Path) -> tuple[Path, bytes | None, int]:
    """(path to encode with, bytes of a new model or None, validation key limit); the model is
    checked."""
    if settings.tokenizer is not None:
        load_tokenizer(str(settings.tokenizer))  # complain before the passes over the text
        return settings.tokenizer, None, val_key_limit(settings, train)
    key_limit = val_key_limit(settings, train)
    model = train_tokenizer(settings, train, key_limit)
    path = temporary / "tokenizer.model"
    path.write_bytes(model)
    return path, model, key_limit


def encode_splits(settings: Settings, train, val, tokenizer_path: Path, key_limit: int,
                  folder: Path) -> dict:
    """Encode everything and write the shards; the manifest's `splits`."""
    spools = [Spool(folder.parent / f"{split}.spool") for split in ("train", "val")]
    train_spool, val_spool = spools
    try:
        if val is not None:
            encode(settings, val, "encoding validation", tokenizer_path, 2**64,
                   train_spool, val_spool)
        encode(settings, train, "encoding", tokenizer_path, key_limit, train_spool, val_spool)
        train_indices, val_indices = chosen_documents(train_spool, val_spool, settings.seed)
        check_split(settings, len(train_indices), len(val_indices), len(train_spool))
        splits = {"train": write_split(folder, "train",
                                       train_spool, train_indices, settings.shard_tokens),
                  "val": write_split(folder, "val", val_spool, val_indices, settings.shard_tokens)}
        splits["train"]["dropped_copies_of_validation"] = len(train_spool) - len(train_indices)
        splits["val"]["dropped_repeats"] = len(val_spool) - len(val_indices)
    finally:
        for spool in spools:
            spool.close()
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
    """The manifest; it holds nothing that differs between runs (no time, no --workers, no output
    folder)."""
    trained = settings.tokenizer is None
    return {
        "name": settings.name,
        "tokenizer": {"path": f"tokenizers/{settings.new_tokenizer.name}" if trained
                      else str(settings.tokenizer),
                      "sha256": sha256_file(tokenizer_path), "trained_here": trained,
                      "vocab_size": load_tokenizer(str(tokenizer_path)).vocab_size()},
        "splits": splits,
        "settings": {"val_fraction": settings.val_fraction, "val_docs": settings.val_docs,
                     "shard_tokens": settings.shard_tokens, "seed": settings.seed, **source},
        "versions": {"sentencepiece": sentencepiece.__version__},
    }


# ---------------------------------------------------------------------------------------------
# Demo and report
# ---------------------------------------------------------------------------------------------

def decoded_documents(folder: Path, split: str, tokenizer) -> list[str]:
    """The texts of a split as its tokens decode: what a model is scored on."""
    tokens = np.concatenate([read_shard(path)
                             for path in sorted(folder.glob(f"fineweb_{split}_[0-9]*.bin"))])
    documents = np.split(tokens, np.flatnonzero(tokens == BOS_ID))[1:]
    return tokenizer.decode([document[1:].tolist() for document in documents])


def normal_lines(text: str) -> str:
    """The text as the demo's tokenizer decodes it, with its lines: xz and the model count the same
    bytes."""
    normalizer = sentencepiece.SentencePieceNormalizer(rule_name="nmt_nfkc", add_dummy_prefix=False,
                                                       escape_whitespaces=False,
                                                       remove_extra_whitespaces=True)
    return "\n".join(filter(None, map(normalizer.normalize, text.splitlines())))


def build_demo(settings: Settings, max_modules: int | None = None) -> dict:
    """Build the demo corpus (of `max_modules` modules only, if given) with xz's figure in the
    manifest."""
    check_free(settings)
    train, val = demo_corpus.split(demo_corpus.documents(max_modules), settings.seed,
                                   DEMO_VAL_FRACTION)
    train, val = ([normal_lines(text) for text in texts] for texts in (train, val))

    def xz_figure(folder: Path, tokenizer) -> dict:
        return demo_corpus.xz_comparison(decoded_documents(folder, "train", tokenizer),
                                         decoded_documents(folder, "val", tokenizer))

    python = ".".join(map(str, sys.version_info[:3]))
    return build(settings, ListDocuments(train), ListDocuments(val),
                 source={"corpus": f"documentation in CPython {python}"}, finish=xz_figure)


def report(result_path: Path, manifest_path: Path) -> str:
    """Bits per byte of the demo's validation text: what xz needs, and the model after each step."""
    result = _read_json(result_path, "the result file that train_gpt.py writes")
    manifest = _read_json(manifest_path, "the demo's manifest: run build_dataset.py --demo first")
    xz_bpb, sizes = manifest.get("xz_bits_per_byte"), manifest.get("xz_bytes")
    val_bytes = sizes.get("val_text") if isinstance(sizes, dict) else None
    if not (isinstance(xz_bpb, float) and xz_bpb > 0 and isinstance(val_bytes, int)):
        raise DataError(f"{manifest_path}: no xz_bits_per_byte and xz_bytes in it: build the demo "
                        "again with --demo --force")
    scores = _scores(result, result_path)
    scored_bytes = result.get("scored_bytes")
    if not isinstance(scored_bytes, (int, float)) or not 0 < scored_bytes <= val_bytes:
        raise DataError(f"{result_path}: scored_bytes is {scored_bytes!r}, the demo's validation "
                        f"text has {val_bytes}: this is not a run on the demo; train on it (or on "
                        "this build of it) and try again")
    # float is not the artifact
    shipped = {name: bpb for name, bpb in scores.items() if name != "float"} or scores
    best = min(shipped, key=shipped.get)
    ratio = shipped[best] / xz_bpb
    rows = {"xz -9e": (xz_bpb, "after it has read the training text")}
    rows |= {name: (bpb, next((told for start, told in TOLD.items() if name.startswith(start)), ""))
             for name, bpb in scores.items()}
    size = result.get("total_bytes")
    return "\n".join([
        "bits per byte of the validation text; less is better",
        *(f"  {name:8} {bpb:.4f}  {told}".rstrip() for name, (bpb, told) in rows.items()),
        f"The model ({best}) needs {abs(1 - ratio):.1%} {'less' if ratio < 1 else 'more'} than xz. "
        f"Scored: {scored_bytes / val_bytes:.1%} of {val_bytes:,} bytes."
        + (f" Code + model: {size:,} bytes." if isinstance(size, int) else "")])


# What each score of a result is, by the beginning of its name.
TOLD = {"float": "the trained weights, in rows of the training length",
        "int": "the same, from the packed file",
        "banded": "the packed file, every token with full context",
        "sliding": "the packed file, every token with full context",
        "ttt": "the packed file, adapting to text that is already scored"}


PROMPT = "This module provides"


def sample(result_path: Path, manifest_path: Path, tokens: int = 200, heat: float = 0.9) -> str:
    """PROMPT as the artifact of a result goes on with it; or one line that says why not."""
    result, manifest = _read_json(result_path, "a result"), _read_json(manifest_path, "a manifest")
    sys.path.insert(0, str(DATA_ROOT.parent))
    try:
        # OUT_DIR/logs/x.json, whose OUT_DIR may have been relative to another folder; EVAL_ONLY may
        # have named a file elsewhere
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
    dice, text = torch.Generator().manual_seed(s.seed), [BOS_ID, *tokenizer.encode(PROMPT)]
    with torch.inference_mode():
        for _ in range(tokens):
            logits = model.logits(torch.tensor([text[-s.train_seq_len:]]))[0, -1] / heat
            logits[BOS_ID] = -torch.inf  # one document
            text.append(int(torch.multinomial(logits.softmax(-1), 1, generator=dice)))
    lines = textwrap.wrap(tokenizer.decode(text), 96)
    return "\n".join([f"The packed model goes on after \"{PROMPT}\" (temperature {heat}):",
                      *(f"  {line}" for line in lines)])


def loss_picture(result_path: Path) -> str:
    """Draw the training loss of the log beside a result; says where, or why not."""
    sys.path.append(str(DATA_ROOT.parent / "records"))
    try:
        import matplotlib
        from runs import read_curves
        log = read_curves(result_path.with_suffix(".txt"))[0]
    except (ImportError, ValueError) as problem:
        return f"No picture: {problem}"
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axis.plot(log.curve[:, 0], log.curve[:, 1], marker=".", lw=1.2)
    axis.set(xlabel="step", ylabel="training loss, nats per token", title=result_path.stem)
    axis.grid(alpha=0.3)
    picture = result_path.with_suffix(".png")
    figure.savefig(picture, dpi=130)
    pyplot.close(figure)
    return f"Training loss by step: {picture}"


def _read_json(path: Path, what: str) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} is not there; it should be {what}") from None
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); it should be {what}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}; it should be {what}")
    return content


def _scores(result: dict, path: Path) -> dict[str, float]:
    """The numbers in `val_bpb` by name; DataError if there are none or one is not a positive
    number."""
    val_bpb = result.get("val_bpb")
    scores = {k: v
              for k, v in val_bpb.items() if v is not None} if isinstance(val_bpb, dict) else {}
    for name, bpb in scores.items():
        if isinstance(bpb, bool) or not isinstance(bpb, (int, float)) or not 0 < bpb < 1e9:
            raise DataError(f"{path}: val_bpb.{name} is {bpb!r}, a positive number was expected: "
                            "run the training again")
    if not scores:
        raise DataError(f"{path}: val_bpb is {val_bpb!r}, an object with scores was expected: "
                        "give the result file of train_gpt.py")
    return scores


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
    add("--vocab-size", type=int, default=1024,
        help="pieces of the tokenizer to train (default %(default)s)")
    validation = parser.add_mutually_exclusive_group()
    validation.add_argument("--val-fraction", type=float,
                            help="share of documents for validation (default 0.05)")
    validation.add_argument("--val-docs", type=int, metavar="N",
                            help="this many documents for validation")
    validation.add_argument("--val-input", type=user_path, nargs="+", metavar="PATH",
                            help="files of validation documents")
    add("--text-field", default="text", help="key of the text in JSON lines (default %(default)s)")
    add("--doc-separator", metavar="LINE", help="plain text: a line equal to this ends a document "
        "('' is every blank line). Default: a document ends at the first blank line "
        f"after {MIN_DOCUMENT_CHARS} characters, and at the end of the file")
    add("--shard-tokens", type=int, default=100_000_000,
        help="tokens per shard (default %(default)s)")
    add("--seed", type=int, default=1337,
        help="decides the split and the order of training (default %(default)s)")
    add("--workers", type=int, default=min(os.cpu_count() or 1, 16),
        help="processes that encode (default: one per core, at most 16: %(default)s)")
    add("--force", action="store_true",
        help="replace an existing dataset and tokenizer of this name")
    add("--demo", action="store_true",
        help="build the demo corpus from the documentation that comes with Python: pydoc topics, "
        "and docstrings and comment blocks of the standard library")
    add("--report", type=user_path, metavar="RESULT.json", help="a run on the demo beside xz, some "
        "text that it writes, and a picture of its loss; builds nothing")
    return parser


def settings_from(options: argparse.Namespace) -> Settings:
    """Checked settings; DataError naming every flag that is out of range."""
    checks = [
        (1 <= options.workers <= 1024, f"--workers {options.workers}: 1 to 1024"),
        (1 <= options.shard_tokens < 2**31,
         f"--shard-tokens {options.shard_tokens}: 1 to 2147483647"),
        (260 <= options.vocab_size <= MAX_VOCAB_SIZE, f"--vocab-size {options.vocab_size}: 260 "
         f"(bytes and control pieces) to {MAX_VOCAB_SIZE} (uint16 shards)"),
        (options.seed >= 0, f"--seed {options.seed}: 0 or more"),
        (options.val_docs is None or options.val_docs > 0,
         f"--val-docs {options.val_docs}: 1 or more"),
        (options.val_fraction is None or 0 < options.val_fraction < 1,
         f"--val-fraction {options.val_fraction}: above 0, below 1"),
        (options.demo or bool(options.inputs),
         "no inputs: name text or JSONL files, or use --demo"),
        (not (options.demo and (options.inputs or options.val_input or options.val_docs
                                or options.val_fraction)),
         "--demo has its own text and split: leave out inputs and --val-*"),
    ]
    problems = [message for fine, message in checks if not fine]
    name = options.name or ("demo" if options.demo else options.inputs[0].name.split(".")[0]
                            if options.inputs else "x")
    if not name or name.startswith(".") or set(name) & set("/\\:"):
        problems.append(f"--name {name!r}: a plain folder name")
    if problems:
        raise DataError("; ".join(problems))
    separate = options.demo or options.val_input or options.val_docs
    fraction = options.val_fraction if options.val_fraction or separate else 0.05
    return Settings(name, options.out_root, options.tokenizer, options.vocab_size, fraction,
                    options.val_docs,
                    options.shard_tokens, options.seed, options.workers, options.force)


def build_from_files(settings: Settings, options: argparse.Namespace) -> dict:
    def documents(paths):
        return FileDocuments(paths, options.text_field, options.doc_separator) if paths else None

    def described(paths):
        return [{"name": path.name, "bytes": path.stat().st_size} for path in paths or []]

    train, val = documents(options.inputs), documents(options.val_input)
    source = {"inputs": described(options.inputs), "val_inputs": described(options.val_input),
              "text_field": options.text_field, "doc_separator": options.doc_separator}
    return build(settings, train, val, source)


def summary(settings: Settings, manifest: dict) -> str:
    """What was built, a line per split."""
    lines = [f"{settings.target}  (tokenizer {manifest['tokenizer']['path']})"]
    for split, entry in manifest["splits"].items():
        lines.append(f"{split}: {entry['documents']:,} documents, {entry['tokens']:,} tokens, "
                     f"{entry['utf8_bytes']:,} bytes of text, {len(entry['files'])} shards")
    lines += normalization_lines(manifest["splits"]["val"])
    if "xz_bits_per_byte" in manifest:
        lines.append(f"xz -9e needs {manifest['xz_bits_per_byte']:.4f} bits per byte of "
                     "validation text")
    return "\n".join(lines)


def normalization_lines(val: dict) -> list[str]:
    """What of the validation text the tokens do not hold, by name; nothing if they hold
    everything."""
    found, lines = val["normalization"], []
    if found["changed_documents"]:
        lines.append(
            f"the tokenizer's normalization changes {found['changed_documents']:,} "
            f"of {val['documents']:,} validation documents and "
            f"loses {val['bytes_lost_by_normalization']:,} bytes: {found['white_space_bytes']:,} "
            f"of white space, {found['dropped_characters_bytes']:,} of dropped "
            f"characters, {found['rewritten_characters_bytes']:,} by rewritten characters (NFKC); "
            "bits per byte count the original text")
    if found["unknown_tokens"]:
        lines.append(f"{found['unknown_tokens']:,} validation tokens are unknown pieces, which "
                     "stand for any text: no fair score; use a tokenizer with byte fallback")
    return lines


def main(arguments: list[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    if options.report:
        folder = options.out_root / "datasets" / (options.name or "demo")
        manifest = folder / "manifest.json"
        print(report(options.report, manifest))
        print(sample(options.report, manifest))
        print(loss_picture(options.report))
        return
    settings = settings_from(options)
    manifest = build_demo(settings) if options.demo else build_from_files(settings, options)
    print(summary(settings, manifest))


if __name__ == "__main__":
    sys.exit(exit_code_of(main, sys.argv[1:]))
