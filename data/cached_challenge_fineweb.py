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
import contextlib
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.utils import (EntryNotFoundError, LocalEntryNotFoundError,
                                   RepositoryNotFoundError)
from huggingface_hub.utils.sha import git_hash
from tqdm import tqdm

from shards import (DataError, check_content, check_shard, exit_code_of, read_json, sha256_file)

DATA_ROOT = Path(__file__).resolve().parent
DEFAULT_REPO_ID = "willdepueoai/parameter-golf"
# Exports by participants, of tokenizations that the official repository does not have.
COMMUNITY_REPO_IDS = {"sp4096": "kevclark/parameter-golf", "sp8192": "kevclark/parameter-golf"}
DEFAULT_PREFIX = "datasets"
DOCS_FILES = ("docs_selected.jsonl", "docs_selected.source_manifest.json")


class MissingFile(DataError):
    """The repository answers, but does not have this file."""


class Remote:
    """The dataset repository; a file reaches its place under `data_root` whole or not at all.

    A `check(path, hashed)` raises DataError on a bad file; `hashed`: it has the server's hash.
    Files arrive in `data_root/.download/variant` (same disk, so that moving them is a rename; a
    folder for each variant, so that two may be downloaded at once).
    """

    def __init__(self, data_root: Path, repo_id: str, prefix: str, variant: str):
        self.data_root, self.repo_id, self.prefix = data_root, repo_id, prefix.strip("/")
        self.staging = data_root / ".download" / variant

    def ensure(self, relative_path: str, check=None) -> None:
        """Fetch a file (named below the prefix) unless it is here and right."""
        path = self.data_root / relative_path
        if path.is_file():
            try:
                return self.verify(relative_path, path, check)
            except DataError as error:
                tqdm.write(f"fetching again: {error}", file=sys.stderr)
        self.fetch(relative_path, check)

    def fetch(self, relative_path: str, check=None) -> Path:
        """Download a file; its local path. A damaged transfer is repeated once."""
        target = self.data_root / relative_path
        for attempt in (1, 2):
            staged = self._download(relative_path, force=attempt == 2)
            try:
                self.verify(relative_path, staged, check)
                break
            except DataError as error:
                staged.unlink()
                if attempt == 2:
                    raise DataError(f"{relative_path} came damaged twice from {self.repo_id}: "
                                    f"{error}; check MATCHED_FINEWEB_REPO_ID and HF_ENDPOINT, "
                                    "or try again later") from None
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(staged, target)
        return target

    def verify(self, relative_path: str, path: Path, check) -> None:
        """DataError unless `path` has the server's hash, if known, and `check` accepts it."""
        expected = self._hash(relative_path)
        if expected and file_hash(path, expected) != expected:
            raise DataError(f"{path}: its hash is not {expected}, which the server gives: "
                            "the content is damaged or another version")
        if check:
            check(path, bool(expected))

    def _hash(self, relative_path: str) -> str | None:
        """The server's hash: SHA-256 (64 digits) of large files, Git's SHA-1 (40) of others."""
        try:
            etag = get_hf_file_metadata(hf_hub_url(self.repo_id, self._remote_path(relative_path),
                                                   repo_type="dataset")).etag
        except Exception:  # not there or no connection: a download says so, and what is here may do
            return None
        return etag if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", etag or "") else None

    def _remote_path(self, relative_path: str) -> str:
        return f"{self.prefix}/{relative_path}".lstrip("/")

    def _download(self, relative_path: str, force: bool) -> Path:
        remote_path = self._remote_path(relative_path)
        where = f"{remote_path} of dataset {self.repo_id}"
        try:
            return Path(hf_hub_download(self.repo_id, remote_path, repo_type="dataset",
                                        local_dir=self.staging, force_download=force))
        except RepositoryNotFoundError:
            raise DataError(f"dataset repository {self.repo_id} not found or private: "
                            "set MATCHED_FINEWEB_REPO_ID, or HF_TOKEN for a private one") from None
        except LocalEntryNotFoundError as error:  # an EntryNotFoundError that means no connection
            raise DataError(f"{where} cannot be reached ({first_line(error.__cause__ or error)}): "
                            "check the connection and HF_ENDPOINT, then run the command again"
                            ) from None
        except EntryNotFoundError:
            raise MissingFile(f"{where} does not exist: check --variant, MATCHED_FINEWEB_REPO_ID "
                              "and MATCHED_FINEWEB_REMOTE_ROOT_PREFIX") from None
        except Exception as error:  # the HTTP library differs from one hub version to the next
            raise DataError(f"{where}: {type(error).__name__}: {first_line(error)}: "
                            "run the same command again, finished files are kept") from None


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def file_hash(path: Path, like: str) -> str:
    """The hash of a file of the kind of `like`: SHA-256, or Git's SHA-1 of a blob."""
    return sha256_file(path) if len(like) == 64 else git_hash(path.read_bytes())


def vocab_size_of(variant: str) -> int:
    """1024 of 'sp1024', 260 of 'byte260'; DataError for a name of another form."""
    found = re.fullmatch(r"(?:sp|byte)([0-9]+)", variant)
    if not found:
        raise DataError(f"--variant {variant!r} is not known: write sp1024, sp4096, ... or byte260")
    return int(found[1])


def read_manifest(path: Path) -> dict:
    return read_json(path, "a manifest: delete it and download again")


@dataclass(frozen=True)
class Listing:
    """What a manifest says of a variant: paths below the prefix; numbers (None: not known)."""
    folder: str
    tokenizers: list[str]
    train_shards: int | None
    val_shards: int | None


def listing(manifest: dict, variant: str, strict: bool) -> Listing:
    """The entry of a variant, or known names; `strict`: DataError if only others are listed."""
    name = f"fineweb10B_{variant}"
    try:
        datasets, tokenizers = ({entry.get("name"): entry for entry in manifest.get(kind) or []}
                                for kind in ("datasets", "tokenizers"))
        if strict and datasets and name not in datasets:
            raise DataError(f"manifest.json has no dataset {name}, only {', '.join(datasets)}: "
                            "choose another --variant (or --skip-manifest to try all the same)")
        entry = datasets.get(name, {})
        folder = entry.get("path", f"datasets/{name}")
        files = tokenizers.get(entry.get("tokenizer_name"), {})
        files = [files[key] for key in ("model_path", "vocab_path", "path") if files.get(key)]
        if not files and variant.startswith("sp"):
            files = [f"tokenizers/fineweb_{variant[2:]}_bpe.model"]
        for path in (folder, *files):
            if path.startswith("/") or ".." in path or set(path) & set("\\:"):
                raise DataError(f"manifest.json names the path {path!r}, which leads out of the "
                                "data folder: do not use this repository")
        counts = [entry.get("stats", {}).get(f"files_{split}") for split in ("train", "val")]
    except (AttributeError, LookupError, TypeError) as error:
        raise DataError(f"manifest.json has an unknown form ({error!r}): delete it and use "
                        "--skip-manifest") from None
    return Listing(folder.rstrip("/"), files, *(n if isinstance(n, int) else None for n in counts))


def check_tokenizer(path: Path, hashed: bool) -> None:
    """DataError unless a .model file is one of SentencePiece."""
    try:
        if path.suffix == ".model":
            sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise DataError(f"{path}: not a SentencePiece model ({first_line(error)})") from None


def fetch_shards(remote: Remote, folder: str, split: str, wanted: int | None,
                 vocab_size: int) -> int:
    """Make the first `wanted` shards of a split complete (None: all that exist); their number."""
    def check(path: Path, hashed: bool) -> None:
        check_shard(path) if hashed else check_content(path, vocab_size)

    present = 0
    with tqdm(total=wanted, desc=f"{split} shards", unit="shard") as bar:
        while wanted is None or present < wanted:
            try:
                remote.ensure(f"{folder}/fineweb_{split}_{present:06d}.bin", check)
            except MissingFile as error:
                if wanted is None and present:
                    break
                raise DataError(f"{error}; {present} of the {wanted or 1} {split} shards asked for "
                                "are there") from None
            present += 1
            bar.update()
    return present


def download(remote: Remote, variant: str, train_shards: int, skip_manifest: bool,
             with_docs: bool) -> None:
    """Bring tokenizer, validation and train shards (and documents) to data/."""
    vocab_size, path = vocab_size_of(variant), remote.data_root / "manifest.json"
    if not skip_manifest:
        remote.fetch("manifest.json", lambda path, hashed: read_manifest(path))
    listed = listing(read_manifest(path) if path.exists() else {}, variant, not skip_manifest)
    if train_shards < 0:
        raise DataError(f"--train-shards {train_shards}: give 0 or more")
    if listed.train_shards is not None and train_shards > listed.train_shards:
        raise DataError(f"--train-shards {train_shards}: {variant} has {listed.train_shards} train "
                        f"shards: ask for {listed.train_shards} or fewer")
    if not listed.tokenizers:
        print(f"no tokenizer is listed for {variant}; run without --skip-manifest to look again",
              file=sys.stderr)
    for path in listed.tokenizers:
        remote.ensure(path, check_tokenizer)
    val_shards = fetch_shards(remote, listed.folder, "val", listed.val_shards or None, vocab_size)
    fetch_shards(remote, listed.folder, "train", train_shards, vocab_size)
    for path in DOCS_FILES if with_docs else ():
        remote.ensure(path)
    shutil.rmtree(remote.staging, ignore_errors=True)
    with contextlib.suppress(OSError):  # another download is at work beside
        remote.staging.parent.rmdir()
    print(f"{remote.data_root / listed.folder}: {train_shards} train and {val_shards} validation "
          "shards complete")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Environment: MATCHED_FINEWEB_REPO_ID (default by --variant), "
        f"MATCHED_FINEWEB_REMOTE_ROOT_PREFIX (default {DEFAULT_PREFIX}), HF_ENDPOINT, HF_TOKEN.")
    community = ", ".join(f"{v} from {repo}" for v, repo in COMMUNITY_REPO_IDS.items())
    parser.add_argument("--variant", default="sp1024", help="tokenization: sp1024 (default), "
                        f"byte260, ... from {DEFAULT_REPO_ID}, the challenge's own; {community}, "
                        "exports by participants; MATCHED_FINEWEB_REPO_ID chooses another")
    parser.add_argument("--train-shards", type=int, default=80, metavar="N",
                        help="train shards to have (default 80; 100M tokens, 200 MB each)")
    parser.add_argument("--skip-manifest", action="store_true",
                        help="use the local manifest.json, or the known file names")
    parser.add_argument("--with-docs", action="store_true",
                        help="also fetch the documents as text (large)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    default = COMMUNITY_REPO_IDS.get(options.variant, DEFAULT_REPO_ID)
    remote = Remote(DATA_ROOT, os.environ.get("MATCHED_FINEWEB_REPO_ID", "").strip() or default,
                    os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", DEFAULT_PREFIX).strip(),
                    options.variant)
    if options.variant in COMMUNITY_REPO_IDS:
        print(f"{options.variant} from {remote.repo_id}, an export by participants",
              file=sys.stderr)
    download(remote, options.variant, options.train_shards, options.skip_manifest,
             options.with_docs)


if __name__ == "__main__":
    sys.exit(exit_code_of(main, sys.argv[1:]))
