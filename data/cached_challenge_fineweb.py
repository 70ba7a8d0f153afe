"""Download the challenge's FineWeb tokens and tokenizer into the data/ folder beside this script.

    python data/cached_challenge_fineweb.py                      SP1024, 80 train shards, validation
    python data/cached_challenge_fineweb.py --train-shards 1     enough for a first try
    python data/cached_challenge_fineweb.py --variant sp4096

Every file is compared with the hash that the server has of it before it gets its name, and again
when the same command is run again: what is missing or damaged is fetched. Where the server gives no
hash, or cannot be reached, shards are checked for header, size, tokens in range, holes and density
of documents.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import sentencepiece
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.utils import (EntryNotFoundError, LocalEntryNotFoundError,
                                   RepositoryNotFoundError)
from tqdm import tqdm

from shards import DataError, check_content, check_shard, exit_code_of, sha256_file

DATA_ROOT = Path(__file__).resolve().parent
DEFAULT_REPO_ID = "willdepueoai/parameter-golf"
# Exports by participants, of tokenizations that the official repository does not have.
COMMUNITY_REPO_IDS = {"sp4096": "kevclark/parameter-golf", "sp8192": "kevclark/parameter-golf"}
DEFAULT_PREFIX = "datasets"
TOKENIZER_SUFFIXES = (".model", ".vocab", ".json")
DOCS_FILES = ("docs_selected.jsonl", "docs_selected.source_manifest.json")


class MissingFile(DataError):
    """The repository answers, but does not have this file."""


class Remote:
    """The dataset repository: `fetch` brings one file to its place under `data_root`, whole or not
    at all.

    Files arrive in `data_root/.download` (same disk, so that moving them is a rename).
    """

    def __init__(self, data_root: Path, repo_id: str, prefix: str):
        self.data_root, self.repo_id, self.prefix = data_root, repo_id, prefix.strip("/")
        self.staging = data_root / ".download"

    def fetch(self, relative_path: str, check=None, guess=None) -> Path:
        """Download `relative_path` (below the prefix) and return its local path.

        `check(path)` raises DataError on a bad file; `guess(path)` on one that looks bad, and is
        asked only where the server has no hash. One damaged transfer is repeated, a second is an
        error.
        """
        target = self.data_root / relative_path
        for attempt in (1, 2):
            staged = self._download(relative_path, force=attempt == 2)
            try:
                self.verify(relative_path, staged, check, guess)
                break
            except DataError as error:
                staged.unlink()
                if attempt == 2:
                    raise DataError(f"{relative_path} came damaged twice "
                                    f"from {self.repo_id}: {error}; check MATCHED_FINEWEB_REPO_ID "
                                    "and HF_ENDPOINT, or try again later") from None
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(staged, target)
        return target

    def is_complete(self, relative_path: str, check=None, guess=None) -> bool:
        """True for a local file that needs no download; one that is refused (damaged, foreign) is
        worth one."""
        path = self.data_root / relative_path
        if not path.is_file():
            return False
        try:
            self.verify(relative_path, path, check, guess)
        except DataError as error:
            tqdm.write(f"fetching again: {error}", file=sys.stderr)
            return False
        return True

    def verify(self, relative_path: str, path: Path, check=None, guess=None) -> None:
        """DataError unless `path` has the server's hash, or `guess` accepts it, and `check`
        does."""
        if check:
            check(path)
        expected = self._hash(relative_path)
        if expected and file_hash(path, expected) != expected:
            raise DataError(f"{path}: its hash is not {expected}, which the server gives: "
                            "the content is damaged or another version")
        if guess and not expected:
            guess(path)

    def _hash(self, relative_path: str) -> str | None:
        """The server's hash of a file: SHA-256 (64 digits) of large ones, Git's SHA-1 (40) of
        others, or None."""
        try:
            etag = get_hf_file_metadata(hf_hub_url(self.repo_id, self._remote_path(relative_path),
                                                   repo_type="dataset")).etag
        except Exception:  # not there or no connection: a download says so, and what is here may do
            return None
        return etag if etag and re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", etag) else None

    def _remote_path(self, relative_path: str) -> str:
        return f"{self.prefix}/{relative_path}" if self.prefix else relative_path

    def _download(self, relative_path: str, force: bool) -> Path:
        remote_path = self._remote_path(relative_path)
        where = f"{remote_path} of dataset {self.repo_id}"
        try:
            return Path(hf_hub_download(self.repo_id, remote_path, repo_type="dataset",
                                        local_dir=self.staging, force_download=force))
        except RepositoryNotFoundError:
            raise DataError(f"dataset repository {self.repo_id} not found or private: "
                            "set MATCHED_FINEWEB_REPO_ID, or HF_TOKEN for a private one") from None
        # a kind of EntryNotFoundError, but it means no connection
        except LocalEntryNotFoundError as error:
            raise DataError(f"{where} cannot be reached ({_first_line(error.__cause__ or error)}): "
                            "check the connection and HF_ENDPOINT, then run the same command "
                            "again") from None
        except EntryNotFoundError:
            raise MissingFile(f"{where} does not exist: check --variant, MATCHED_FINEWEB_REPO_ID "
                              "and MATCHED_FINEWEB_REMOTE_ROOT_PREFIX") from None
        # the HTTP library below differs from one hub version to the next
        except Exception as error:
            raise DataError(f"{where}: {type(error).__name__}: {_first_line(error)}: "
                            "run the same command again, finished files are kept") from None


def file_hash(path: Path, like: str) -> str:
    """The hash of a file of the kind of `like`: SHA-256, or Git's SHA-1 of a blob."""
    if len(like) == 64:
        return sha256_file(path)
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def dataset_name(variant: str) -> str:
    """Folder of a variant: 'sp1024' -> 'fineweb10B_sp1024'; DataError for a name of another
    form."""
    for kind in ("sp", "byte"):
        if variant.startswith(kind) and variant[len(kind):].isdecimal():
            return f"fineweb10B_{variant}"
    raise DataError(f"--variant {variant!r} is not known: write sp1024, sp4096, ... or byte260")


def read_manifest(path: Path) -> dict:
    """The parsed manifest at `path`; DataError if it is not a JSON object."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}): delete it and download again") from None
    if not isinstance(manifest, dict):
        raise DataError(f"{path}: holds {type(manifest).__name__}, an object was expected: "
                        "delete it and download again")
    return manifest


def load_manifest(remote: Remote, skip: bool) -> dict:
    """The remote manifest, or with `skip` the local one, or {} where there is none."""
    local = remote.data_root / "manifest.json"
    if not skip:
        return read_manifest(remote.fetch("manifest.json", check=read_manifest))
    return read_manifest(local) if local.exists() else {}


def entry_named(manifest: dict, kind: str, name: str | None) -> dict | None:
    """The object called `name` in the manifest's list `kind` ('datasets' or 'tokenizers'), or
    None."""
    entries = manifest.get(kind)
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict) and name is not None and entry.get("name") == name:
            return entry
    return None


def dataset_entry(manifest: dict, name: str, strict: bool) -> dict:
    """The manifest's entry of dataset `name`, or {}; if `strict`, DataError where others are listed
    but not it."""
    entry = entry_named(manifest, "datasets", name)
    if strict and entry is None and isinstance(manifest.get("datasets"),
                                               list) and manifest["datasets"]:
        known = ", ".join(sorted(str(e.get("name"))
                                 for e in manifest["datasets"] if isinstance(e, dict)))
        raise DataError(f"manifest.json has no dataset {name}, only {known}: choose another "
                        "--variant (or --skip-manifest to try all the same)")
    return entry or {}


def dataset_folder(entry: dict, name: str) -> str:
    """Path of the dataset below the prefix, 'datasets/<name>' unless the manifest says
    otherwise."""
    return (safe_path(entry["path"]).rstrip("/") if isinstance(entry.get("path"), str)
            else f"datasets/{name}")


def safe_path(path: str) -> str:
    """`path` if it stays inside the data folder; DataError otherwise, as a manifest comes from
    outside."""
    parts = path.split("/")
    if path.startswith("/") or ".." in parts or "\\" in path or ":" in path or not parts[0]:
        raise DataError(f"manifest.json names the path {path!r}, which leads out of the data "
                        "folder: do not use this repository")
    return path


def file_count(entry: dict, split: str) -> int | None:
    """Number of shards of a split ('train' or 'val') by the manifest, or None if it does not
    say."""
    stats = entry.get("stats")
    count = stats.get(f"files_{split}") if isinstance(stats, dict) else None
    return count if isinstance(count, int) and count >= 0 else None


def tokenizer_paths(manifest: dict, entry: dict, variant: str) -> list[str]:
    """Tokenizer files of the dataset below the prefix: by the manifest, else the known name of an
    sp variant."""
    tokenizer = entry_named(manifest, "tokenizers", entry.get("tokenizer_name"))
    listed = sorted(set(_artifact_strings(tokenizer or {})))
    if listed:
        return [safe_path(path) for path in listed]
    return [f"tokenizers/fineweb_{variant[2:]}_bpe.model"] if variant.startswith("sp") else []


def _artifact_strings(value) -> list[str]:
    if isinstance(value, str):
        return [value] if value.endswith(TOKENIZER_SUFFIXES) and "/" in value else []
    children = value.values() if isinstance(value,
                                            dict) else value if isinstance(value, list) else ()
    return [path for child in children for path in _artifact_strings(child)]


def check_tokenizer(path: Path) -> None:
    """DataError unless a .model file is a SentencePiece model, a .json file JSON, and any other not
    empty."""
    try:
        if path.suffix == ".model":
            sentencepiece.SentencePieceProcessor(model_file=str(path))
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif not path.stat().st_size:
            raise ValueError("the file is empty")
    except (RuntimeError, ValueError, OSError) as error:
        raise DataError(f"{path}: not a tokenizer ({_first_line(error)}): delete it and download "
                        "again") from None


def fetch_shards(remote: Remote, folder: str, split: str, wanted: int | None, required: int,
                 vocab_size: int) -> int:
    """Make shards 0..wanted-1 of a split complete (None: as many as there are); the number now
    present.

    DataError if fewer than `required` exist.
    """
    def guess(path: Path) -> None:
        check_content(path, vocab_size)

    index = 0
    with tqdm(total=wanted, desc=f"{split} shards", unit="shard") as bar:
        while wanted is None or index < wanted:
            relative_path = f"{folder}/fineweb_{split}_{index:06d}.bin"
            if not remote.is_complete(relative_path, check_shard, guess):
                try:
                    remote.fetch(relative_path, check_shard, guess)
                except MissingFile as error:
                    if index >= required:
                        break
                    raise DataError(f"{error}; {index} of the {required} {split} shards asked for "
                                    "are there") from None
            index += 1
            bar.update()
    return index


def check_request(train_shards: int, entry: dict, name: str) -> None:
    """DataError if more train shards are asked for than the manifest lists."""
    available = file_count(entry, "train")
    if train_shards < 0:
        raise DataError(f"--train-shards {train_shards}: give 0 or more")
    if available is not None and train_shards > available:
        raise DataError(f"--train-shards {train_shards}: dataset {name} has {available} train "
                        f"shards: ask for {available} or fewer")


def download(remote: Remote, variant: str, train_shards: int, skip_manifest: bool,
             with_docs: bool) -> Path:
    """Bring tokenizer, validation and train shards (and documents) to data/; the dataset's
    folder."""
    name = dataset_name(variant)
    manifest = load_manifest(remote, skip_manifest)
    entry = dataset_entry(manifest, name, strict=not skip_manifest)
    check_request(train_shards, entry, name)
    folder = dataset_folder(entry, name)
    vocab_size = int(variant.removeprefix("byte").removeprefix("sp"))
    paths = tokenizer_paths(manifest, entry, variant)
    if not paths:
        print(f"no tokenizer is listed for {variant}; run without --skip-manifest to look again",
              file=sys.stderr)
    for path in paths:
        if not remote.is_complete(path, check_tokenizer):
            remote.fetch(path, check=check_tokenizer)
    val_shards = fetch_shards(remote, folder, "val", file_count(entry, "val") or None,
                              1, vocab_size)
    fetch_shards(remote, folder, "train", train_shards, train_shards, vocab_size)
    for path in DOCS_FILES if with_docs else ():
        if not remote.is_complete(path):
            remote.fetch(path)
    shutil.rmtree(remote.staging, ignore_errors=True)
    print(f"{remote.data_root / folder}: {train_shards} train and {val_shards} validation shards "
          "complete")
    return remote.data_root / folder


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Environment: MATCHED_FINEWEB_REPO_ID (default by --variant), "
        f"MATCHED_FINEWEB_REMOTE_ROOT_PREFIX (default {DEFAULT_PREFIX}), HF_ENDPOINT, HF_TOKEN.")
    parser.add_argument("--variant", default="sp1024", help="tokenization: sp1024 (default), "
                        f"byte260, ... from {DEFAULT_REPO_ID}, the challenge's own; "
                        + ", ".join(f"{v} from {r}" for v, r in COMMUNITY_REPO_IDS.items())
                        + ", which are exports by participants; MATCHED_FINEWEB_REPO_ID "
                        "chooses another")
    parser.add_argument("--train-shards", type=int, default=80, metavar="N", help="train shards to "
                        "have in the end (default 80; 100M tokens, 200 MB each)")
    parser.add_argument("--skip-manifest", action="store_true", help="do not fetch manifest.json; "
                        "use the local one, or the known file names")
    parser.add_argument("--with-docs", action="store_true",
                        help="also fetch the documents as text (large)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    default = COMMUNITY_REPO_IDS.get(options.variant, DEFAULT_REPO_ID)
    remote = Remote(DATA_ROOT, os.environ.get("MATCHED_FINEWEB_REPO_ID", "").strip() or default,
                    os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", DEFAULT_PREFIX).strip())
    if options.variant in COMMUNITY_REPO_IDS:
        print(f"{options.variant} from {remote.repo_id}, an export by participants",
              file=sys.stderr)
    download(remote, options.variant, options.train_shards, options.skip_manifest,
             options.with_docs)


if __name__ == "__main__":
    sys.exit(exit_code_of(main, sys.argv[1:]))
