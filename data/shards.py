"""Token shards on disk, and what the data scripts share: header, checks, whole-or-nothing writes,
errors.

A shard is 256 little-endian int32 (magic 20240520, version 1, number of tokens, zeros), then that
many little-endian uint16 token ids. Nothing may follow the last token.
"""

import contextlib
import hashlib
import os
import struct
import sys
import tempfile
from pathlib import Path

import numpy as np

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = HEADER_INTS * 4
TOKEN_BYTES = 2
MAX_VOCAB_SIZE = 65_536  # ids are uint16, 0 to 65,535
HOLE_TOKENS = 1_024      # this many times one token in a row is no text
CHECK_TOKENS = 1 << 20   # checked at once, a multiple of HOLE_TOKENS
MIN_CHECKED_TOKENS = 50_000             # fewer say nothing about shares
MAX_MEAN_DOCUMENT_TOKENS = 25_000       # FineWeb's documents have about 1,000
PAD_ID, BOS_ID, EOS_ID, UNK_ID = 0, 1, 2, 3


class DataError(Exception):
    """A mistake in the input that the user can mend; its message is one line with the way out."""


def shard_header(token_count: int) -> bytes:
    """The 1,024 header bytes of a shard with `token_count` tokens."""
    return struct.pack(f"<{HEADER_INTS}i", MAGIC, VERSION, token_count, *[0] * (HEADER_INTS - 3))


def check_shard(path: Path) -> int:
    """Number of tokens of the shard at `path`; DataError unless header and size are exactly
    right."""
    path = Path(path)
    size_bytes = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
    way_out = "delete it and download or build it again"
    if len(head) < HEADER_BYTES:
        raise DataError(f"{path}: {size_bytes} bytes, a shard header alone "
                        f"has {HEADER_BYTES}: {way_out}")
    magic, version, token_count = struct.unpack_from("<3i", head)
    if magic != MAGIC:
        raise DataError(f"{path}: magic number {magic}, a token shard has {MAGIC}: {way_out}")
    if version != VERSION:
        raise DataError(f"{path}: shard version {version}, only {VERSION} is known: {way_out}")
    expected_bytes = HEADER_BYTES + TOKEN_BYTES * token_count
    if token_count < 0 or size_bytes != expected_bytes:
        raise DataError(f"{path}: header says {token_count} tokens, so {expected_bytes} bytes, "
                        f"but the file has {size_bytes}: {way_out}")
    return token_count


def read_shard(path: Path) -> np.ndarray:
    """Token ids [token_count] uint16 of a checked shard, mapped from the file, not loaded."""
    if check_shard(path) == 0:
        return np.zeros(0, "<u2")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES)


def check_content(path: Path, vocab_size: int) -> None:
    """DataError unless the shard holds what tokens of documents look like.

    A hole (one token for HOLE_TOKENS, 2 KiB, in a row), ids outside of the vocabulary, one token
    that is most of the text, documents far too long or short.
    """
    counts = np.zeros(2**16, np.int64)
    tokens, way_out = read_shard(path), "delete it and download or build it again"
    for start in range(0, len(tokens), CHECK_TOKENS):
        block = tokens[start:start + CHECK_TOKENS]
        counts += np.bincount(block, minlength=2**16)
        rows = block[:len(block) // HOLE_TOKENS * HOLE_TOKENS].reshape(-1, HOLE_TOKENS)
        holes = np.flatnonzero((rows == rows[:, :1]).all(axis=1))
        if len(holes):
            row = holes[0]
            raise DataError(f"{path}: token {rows[row, 0]} fills a hole from "
                            f"token {start + row * HOLE_TOKENS} on, {HOLE_TOKENS} times or "
                            f"more: {way_out}")
    highest = int(np.flatnonzero(counts)[-1]) if len(tokens) else 0
    if highest >= vocab_size:
        raise DataError(f"{path}: token id {highest}, the vocabulary has {vocab_size} "
                        f"pieces: {way_out}")
    if len(tokens) < MIN_CHECKED_TOKENS:
        return
    if counts.max() > len(tokens) / 2:
        raise DataError(f"{path}: {counts.max() / len(tokens):.0%} of it is "
                        f"token {counts.argmax()}: {way_out}")
    if not len(tokens) / MAX_MEAN_DOCUMENT_TOKENS <= counts[BOS_ID] <= len(tokens) / 4:
        raise DataError(f"{path}: {counts[BOS_ID]} document starts (token {BOS_ID}) "
                        f"among {len(tokens)} tokens, one in 4 to {MAX_MEAN_DOCUMENT_TOKENS} was "
                        f"expected: {way_out}")


def write_shard(path: Path, token_arrays, token_count: int) -> str:
    """Write the arrays one after the other as one shard of `token_count` tokens; its sha256 in
    hex."""
    digest = hashlib.sha256()
    written_tokens = 0
    with atomic_write(path) as file:
        header = shard_header(token_count)
        file.write(header)
        digest.update(header)
        for array in token_arrays:
            block = np.ascontiguousarray(array, dtype="<u2").tobytes()
            file.write(block)
            digest.update(block)
            written_tokens += len(array)
        if written_tokens != token_count:
            raise AssertionError(f"{path}: {written_tokens} tokens written, {token_count} "
                                 "announced")
    return digest.hexdigest()


@contextlib.contextmanager
def atomic_write(path: Path):
    """A binary file that appears at `path` complete on leaving the block, or not at all on an
    error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        # mkstemp gives 600, which other users of a shared disk cannot read
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def sha256_file(path: Path) -> str:
    """SHA-256 of a file in hex, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def user_path(text: str) -> Path:
    """The path a user wrote, with ~ for the home folder."""
    return Path(os.path.expanduser(text))


def exit_code_of(main, arguments, unread: int = 0) -> int:
    """Run `main(arguments)`; what the user can mend becomes one line on stderr and exit code 2.

    Else the code is what `main` returns (None: 0), or `unread` where the reader of its output went
    away before it could. Carriage returns, which scripts saved on Windows leave behind arguments,
    are removed.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))
        # not every console writes every character
        getattr(sys, name).reconfigure(errors="backslashreplace")
    code = unread
    try:
        code = main([stripped for a in arguments if (stripped := a.rstrip("\r")) or not a]) or 0
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of stdout is gone, as with "| head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (DataError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: run the same command again", file=sys.stderr)
        return 130
    return code
