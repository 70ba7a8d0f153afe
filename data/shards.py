"""Token shards on disk, and what the data scripts share: checks, atomic writes, errors.

A shard is 256 little-endian int32 (magic 20240520, version 1, number of tokens, zeros), then that
many little-endian uint16 token ids. Nothing may follow the last token.
"""

import contextlib
import hashlib
import json
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


def bad_shard(path: Path, reason: str) -> DataError:
    return DataError(f"{path}: {reason}: delete it and download or build it again")


def shard_header(token_count: int) -> bytes:
    """The 1,024 header bytes of a shard with `token_count` tokens."""
    return struct.pack(f"<{HEADER_INTS}i", MAGIC, VERSION, token_count, *[0] * (HEADER_INTS - 3))


def check_shard(path: Path) -> int:
    """Number of tokens of the shard at `path`; DataError unless header and size are right."""
    with open(path, "rb") as file:
        head, size_bytes = file.read(HEADER_BYTES), os.fstat(file.fileno()).st_size
    if len(head) < HEADER_BYTES:
        raise bad_shard(path, f"{size_bytes} bytes, a shard header alone has {HEADER_BYTES}")
    magic, version, token_count = struct.unpack_from("<3i", head)
    if (magic, version) != (MAGIC, VERSION):
        raise bad_shard(path, f"magic number {magic}, version {version}, "
                              f"a token shard has {MAGIC}, {VERSION}")
    expected_bytes = HEADER_BYTES + TOKEN_BYTES * token_count
    if token_count < 0 or size_bytes != expected_bytes:
        raise bad_shard(path, f"header says {token_count} tokens, so {expected_bytes} bytes, "
                              f"but the file has {size_bytes}")
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
    counts, tokens = np.zeros(2**16, np.int64), read_shard(path)
    for start in range(0, len(tokens), CHECK_TOKENS):
        block = tokens[start:start + CHECK_TOKENS]
        counts += np.bincount(block, minlength=2**16)
        rows = block[:len(block) // HOLE_TOKENS * HOLE_TOKENS].reshape(-1, HOLE_TOKENS)
        holes = np.flatnonzero((rows == rows[:, :1]).all(axis=1))
        if len(holes):
            begin = start + holes[0] * HOLE_TOKENS
            raise bad_shard(path, f"token {rows[holes[0], 0]} fills a hole from token {begin} on, "
                                  f"{HOLE_TOKENS} times or more")
    highest = counts.nonzero()[0].max(initial=0)
    if highest >= vocab_size:
        raise bad_shard(path, f"token id {highest}, the vocabulary has {vocab_size} pieces")
    if len(tokens) < MIN_CHECKED_TOKENS:
        return
    if counts.max() > len(tokens) / 2:
        raise bad_shard(path, f"{counts.max() / len(tokens):.0%} of it is token {counts.argmax()}")
    if not len(tokens) / MAX_MEAN_DOCUMENT_TOKENS <= counts[BOS_ID] <= len(tokens) / 4:
        raise bad_shard(path, f"{counts[BOS_ID]} document starts among {len(tokens)} tokens, "
                              f"one in 4 to {MAX_MEAN_DOCUMENT_TOKENS} was expected")


def write_shard(path: Path, token_arrays, token_count: int) -> str:
    """Write the arrays one after the other as one shard of `token_count` tokens; its sha256."""
    with atomic_write(path) as file:
        file.write(shard_header(token_count))
        for array in token_arrays:
            file.write(np.ascontiguousarray(array, dtype="<u2"))
        if file.tell() != HEADER_BYTES + TOKEN_BYTES * token_count:
            raise AssertionError(f"{path}: {file.tell()} bytes, {token_count} tokens announced")
    return sha256_file(path)


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


def write_whole(path: Path, content: bytes) -> None:
    """Write bytes so that `path` holds either its old content or all of the new."""
    with atomic_write(path) as file:
        file.write(content)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, what: str, **options) -> dict:
    """The JSON object in a file, which should be `what`."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"), **options)
    except FileNotFoundError:
        raise DataError(f"{path} is not there; it should be {what}") from None
    except (ValueError, OSError, ArithmeticError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); it should be {what}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}; it should be {what}")
    return content


def user_path(text: str) -> Path:
    """The path a user wrote, with ~ for the home folder."""
    return Path(os.path.expanduser(text))


def exit_code_of(main, arguments, unread: int = 0) -> int:
    """Run `main(arguments)`; what the user can mend is told on stderr, with exit code 2.

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
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is not installed: pip install -r requirements.txt, and the "
              "requirements.txt of the tool's folder", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: run the same command again", file=sys.stderr)
        return 130
    return code
