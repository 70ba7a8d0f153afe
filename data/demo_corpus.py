"""The demo corpus: documentation that every CPython carries, and what xz needs for a part of it.

One document per pydoc topic, and one per standard library module: its docstrings with their
signatures, and its comment blocks. Test suites are left out.
"""

import ast
import hashlib
import lzma
import re
import sysconfig
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from shards import DataError

EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "turtledemo",
                    "__pycache__"}
MIN_DOCUMENT_CHARS = 200
MAX_VAL_DOCUMENT_CHARS = 24_000  # one huge module must not make up the validation text
MIN_REPEATED_CHARS = 40          # shorter paragraphs ("Raises ValueError.") repeat by nature
SHINGLE_WORDS = 8
MIN_CORPUS_CHARS = 500_000


def documents(max_modules: int | None = None) -> list[str]:
    """The corpus (of `max_modules` modules only), in a fixed order, no paragraph twice."""
    found = [*_topics(), *_modules(max_modules)]
    chars = sum(map(len, found))
    if max_modules is None and chars < MIN_CORPUS_CHARS:
        raise DataError(f"the standard library at {sysconfig.get_path('stdlib')} has {chars} "
                        f"characters of documentation, {MIN_CORPUS_CHARS} are needed: "
                        "use a full CPython")
    return [text for text in without_repeats(found) if len(text) >= MIN_DOCUMENT_CHARS]


def _topics():
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions ship it in a separate package
        return
    for name in sorted(topics):
        yield topics[name].strip()


def _modules(max_modules: int | None):
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in sorted(root.rglob("*.py"))
             if not EXCLUDED_FOLDERS & set(path.relative_to(root).parts)]
    for path in paths[:max_modules]:
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        text = module_text(path.read_text(encoding="utf-8", errors="replace"))
        if text:
            yield f"Module {module}\n\n{text}"


def module_text(source: str) -> str:
    """Docstrings (with signatures) and comment blocks of Python source, ordered by line."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    return "\n\n".join(text for _, text in sorted([*_docstrings(tree), *_comment_blocks(source)]))


def _docstrings(tree: ast.Module):
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        text = ast.get_docstring(node)
        if text and isinstance(node, ast.Module):
            yield 0, text
        elif text:
            head = (f"class {node.name}({', '.join(map(ast.unparse, node.bases))})"
                    if isinstance(node, ast.ClassDef) else f"{node.name}({ast.unparse(node.args)})")
            yield node.lineno, f"{head}\n{text}"


def _comment_blocks(source: str):
    block, first_line = [], 0
    for number, line in enumerate([*source.splitlines(), ""], start=1):
        line = line.strip()
        if line.startswith("#") and not line.startswith("#!"):
            first_line = first_line or number
            block.append(line.lstrip("#").strip())
            continue
        text = "\n".join(block).strip()
        if len(text) >= MIN_REPEATED_CHARS and any(c.isalpha() for c in text):
            yield first_line, text
        block, first_line = [], 0


def paragraphs(text: str) -> list[tuple[str, str]]:
    """(paragraph, its words) of a text."""
    return [(paragraph, " ".join(paragraph.split())) for paragraph in re.split(r"\n\s*\n", text)]


def without_repeats(texts: list[str]) -> list[str]:
    """Each text without the paragraphs that stood before, in it or in another (license texts)."""
    seen, result = set(), []
    for text in texts:
        kept = []
        for paragraph, words in paragraphs(text):
            if len(words) < MIN_REPEATED_CHARS or words not in seen:
                kept.append(paragraph)
            seen.add(words)
        result.append("\n\n".join(kept))
    return result


def split(texts: list[str], seed: int, val_fraction: float) -> tuple[list[str], list[str]]:
    """(train, validation) documents; training paragraphs that validation has are dropped.

    Validation takes documents in the order of a hash until it has `val_fraction` of the characters.
    """
    goal_chars = val_fraction * sum(map(len, texts))
    chosen, val_chars = set(), 0
    for text in sorted(texts, key=lambda t: hashlib.sha256(f"{seed}\n{t}".encode()).digest()):
        if val_chars < goal_chars and len(text) <= MAX_VAL_DOCUMENT_CHARS:
            chosen.add(text)
            val_chars += len(text)
    val = [text for text in texts if text in chosen]
    return drop_copies([text for text in texts if text not in chosen], val), val


def drop_copies(train: list[str], val: list[str]) -> list[str]:
    """`train` without paragraphs that `val` has, or half of whose 8-word runs it has."""
    val_paragraphs = {words for text in val for _, words in paragraphs(text)}
    val_shingles = {shingle for text in val for shingle in _shingles(text)}

    def is_copy(words: str) -> bool:
        if len(words) >= MIN_REPEATED_CHARS and words in val_paragraphs:
            return True
        shingles = _shingles(words)
        return bool(shingles) and 2 * sum(s in val_shingles for s in shingles) >= len(shingles)

    cleaned = ("\n\n".join(paragraph for paragraph, words in paragraphs(text) if not is_copy(words))
               for text in train)
    return [text for text in cleaned if len(text) >= MIN_DOCUMENT_CHARS]


def _shingles(text: str) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[i:i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1)]


def xz_comparison(train_texts: list[str], val_texts: list[str]) -> dict:
    """What `xz -9e` needs for the validation text once it has seen the training text.

    Keys: xz_bits_per_byte, and xz_bytes with the counts it follows from. Documents are joined by
    newlines for xz, which the validation bytes do not count. Needs about 700 MB per process.
    """
    train = "\n".join(train_texts).encode()
    both = train + b"\n" + "\n".join(val_texts).encode()
    with ProcessPoolExecutor(2) as pool:
        train_bytes, both_bytes = pool.map(_xz_size, [train, both])
    val_bytes = len("".join(val_texts).encode())
    return {"xz_bits_per_byte": 8 * (both_bytes - train_bytes) / val_bytes,
            "xz_bytes": {"train": train_bytes, "train_and_val": both_bytes, "val_text": val_bytes}}


def _xz_size(data: bytes) -> int:
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
