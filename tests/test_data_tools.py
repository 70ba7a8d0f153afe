"""data/: shards, the download from a server on loopback, the builder, the demo and its report."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import struct
import tarfile
import threading
from collections import Counter
from decimal import Decimal
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import sentencepiece
import zstandard
from conftest import WORDS, write_jsonl
from hypothesis import HealthCheck, given, settings, strategies as st

import build_dataset
import cached_challenge_fineweb as cached
import demo_corpus
import shards
import train_gpt
from shards import BOS_ID, DataError

FAST = settings(max_examples=40, deadline=None, database=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture])


def sentences(count: int, seed: int = 0) -> list[str]:
    """`count` different documents of 30 to 80 words; numbers and accents included."""
    rng = np.random.default_rng(seed)
    return [f"Document {seed}-{i}, café №{i}.\n" + " ".join(rng.choice(WORDS, rng.integers(30, 80)))
            for i in range(count)]


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    made = build_dataset.Settings("x", vocab_size=320)
    path.write_bytes(build_dataset.train_tokenizer(
        made, build_dataset.ListDocuments([t + " in 1984" * 9 for t in sentences(60)]), 0))
    return path


def documents_of(folder: Path, split: str) -> list[tuple[int, ...]]:
    """Token tuples of the documents of a split, without BOS; the stream must start with BOS."""
    tokens = np.concatenate([shards.read_shard(p)
                             for p in sorted(folder.glob(f"fineweb_{split}_[0-9]*.bin"))])
    assert tokens[0] == BOS_ID
    return [tuple(d[1:].tolist()) for d in np.split(tokens, np.flatnonzero(tokens == BOS_ID))[1:]]


def texts_of(folder: Path, split: str, tokenizer_path: Path) -> list[str]:
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path))
    return tokenizer.decode([list(d) for d in documents_of(folder, split)])


def folded(text: str) -> str:
    return " ".join(text.replace("№", "No").split())


def run_builder(*arguments) -> None:
    build_dataset.main([str(a) for a in ("--workers", 1, *arguments)])


# ---- shards ---------------------------------------------------------------------------------

@FAST
@given(st.lists(st.lists(st.integers(0, 65_535), max_size=50), max_size=5))
def test_shard_round_trip(tmp_path, arrays):
    path = tmp_path / "s.bin"
    tokens = [token for array in arrays for token in array]
    sha256 = shards.write_shard(path, [np.array(a, dtype=np.uint16) for a in arrays], len(tokens))
    raw = path.read_bytes()
    assert struct.unpack("<256i", raw[:1024]) == (20240520, 1, len(tokens)) + (0,) * 253
    assert list(struct.unpack(f"<{len(tokens)}H", raw[1024:])) == tokens
    assert shards.read_shard(path).tolist() == tokens
    assert sha256 == hashlib.sha256(raw).hexdigest()


@pytest.mark.parametrize("content, message", [
    (b"", "0 bytes"), (shards.shard_header(2)[:1000], "1000 bytes"),
    (shards.shard_header(2) + b"abc", "2 tokens, so 1028 bytes, but the file has 1027"),
    (shards.shard_header(2) + b"abcde", "has 1029"), (shards.shard_header(-1), "-1 tokens"),
    (struct.pack(">256i", 20240520, 1, 2, *[0] * 253) + b"abcd", "magic number -1999096831,"),
    (struct.pack("<256i", 20240520, 9, 2, *[0] * 253) + b"abcd", "version 9")])
def test_bad_shard_is_named_with_what_was_found(tmp_path, content, message):
    path = tmp_path / "bad.bin"
    path.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        shards.check_shard(path)
    assert "bad.bin" in str(caught.value) and "again" in str(caught.value)


def test_atomic_write_leaves_the_old_file_and_no_rest_on_error(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), shards.atomic_write(path) as file:
        file.write(b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("content", [
    None, b"", b"{", b"[]", b"[" * 100_000, b"\xff\xfe{\0}\0", b"9" * 5_000,
    b'{"a": 1e9999999999999999999999}'])
def test_a_file_that_holds_no_json_object_is_named_with_what_it_should_be(tmp_path, content):
    """Also one too deep, and numbers too long for Python's or for Decimal's."""
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.json.*it should be a result"):
        shards.read_json(path, "a result", parse_float=Decimal)


# ---- download -------------------------------------------------------------------------------

class Request(BaseHTTPRequestHandler):
    """One of the two that huggingface_hub makes."""
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub, range_ = self.server, self.headers.get("Range")
        path = self.path.split("/resolve/main/")[-1]
        hub.requests.append((self.command, path, range_))
        content = hub.files.get(path) if self.path.startswith("/datasets/some/repo/") else None
        if content is None:
            return self.begin(404, {"X-Error-Code": "EntryNotFound", "Content-Length": 0})
        start = int(range_.split("=")[1].split("-")[0]) if range_ else 0
        self.begin(206 if range_ else 200, {
            "ETag": f'"{hub.hash(content)}"', "X-Repo-Commit": "0" * 40,
            "Content-Length": len(content) - start,
            "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"})
        if self.command == "GET":
            damaged = hub.damaged.pop if hub.damaged_once else hub.damaged.get
            end = hub.cut.pop(path, None)
            self.close_connection |= end is not None
            self.wfile.write(damaged(path, content)[start:end])
    do_HEAD = do_GET

    def begin(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def log_message(self, *_):
        pass


class Hub(ThreadingHTTPServer):
    """A server on loopback, and the script that loads from it into the folder `data`.

    `files`: content by path; `damaged`: what is sent instead; `cut`: bytes of a path after which
    its next transfer breaks; `requests`: (method, path, range).
    """

    def __init__(self, data: Path, capsys):
        super().__init__(("127.0.0.1", 0), Request)
        self.data, self.capsys, self.files, self.requests = data, capsys, {}, []
        self.cut, self.damaged, self.damaged_once = {}, {}, False
        self.hash = lambda content: hashlib.sha256(content).hexdigest()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def run(self, *arguments, offline: bool = False) -> SimpleNamespace:
        """What the script does and says."""
        url = f"http://127.0.0.1:{self.server_port}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cached, "DATA_ROOT", self.data)
            patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
            for name in ("hf_hub_download", "hf_hub_url"):
                patch.setattr(cached, name, partial(getattr(cached, name), endpoint=url))
            patch.setenv("MATCHED_FINEWEB_REPO_ID", "some/repo")
            patch.setenv("NO_PROXY", "127.0.0.1")
            self.requests.clear()
            self.capsys.readouterr()
            code = shards.exit_code_of(cached.main, list(map(str, arguments)))
        said = self.capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=said.out, stderr=said.err)

    def fetch(self, *arguments) -> SimpleNamespace:
        process = self.run(*arguments)
        assert process.returncode == 0, process.stderr
        return process

    def refused(self, *arguments, says: tuple[str, ...], offline: bool = False) -> None:
        """The script ends in an error of one line with these words."""
        process = self.run(*arguments, offline=offline)
        assert process.returncode == 2 and "Traceback" not in process.stderr, process.stderr
        last = process.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ") and all(part in last for part in says), last

    def transfers(self) -> list[str]:
        return [path for method, path, _ in self.requests if method == "GET"]

    def local(self, path: str) -> Path:
        return self.data / path.removeprefix("datasets/")

    def same(self, *paths: str) -> bool:
        return all(self.local(path).read_bytes() == self.files[path] for path in paths)


def shard_bytes(seed: int, count: int = 3000) -> bytes:
    tokens = np.random.default_rng(seed).integers(0, 1024, count).astype("<u2")
    return shards.shard_header(count) + tokens.tobytes()


FOLDER = "datasets/datasets/fineweb10B_sp1024/"
TRAIN_0, TRAIN_1, VAL_0 = (FOLDER + f"fineweb_{name}.bin"
                           for name in ("train_000000", "train_000001", "val_000000"))
MANIFEST, MODEL = "datasets/manifest.json", "datasets/tokenizers/fineweb_1024_bpe.model"


@pytest.fixture
def hub(tokenizer_path, tmp_path, capsys):
    hub = Hub(tmp_path / "data", capsys)
    manifest = {"datasets": [{"name": "fineweb10B_sp1024", "path": "datasets/fineweb10B_sp1024",
                              "stats": {"files_train": 2, "files_val": 1}, "tokenizer_name": "t"}],
                "tokenizers": [{"name": "t", "model_path": "tokenizers/fineweb_1024_bpe.model"}]}
    hub.files = {MANIFEST: json.dumps(manifest).encode(), MODEL: tokenizer_path.read_bytes(),
                 "datasets/docs_selected.jsonl": b'{"text": "a"}\n',
                 "datasets/docs_selected.source_manifest.json": b"{}",
                 TRAIN_0: shard_bytes(0), TRAIN_1: shard_bytes(1), VAL_0: shard_bytes(2)}
    yield hub
    hub.shutdown()
    hub.server_close()


def test_download_brings_everything_and_repeats_nothing(hub):
    hub.fetch("--train-shards", 1, "--with-docs")
    expected = hub.files.keys() - {TRAIN_1}
    assert {path for path in hub.files if hub.local(path).exists()} == expected
    assert hub.same(*expected)
    hub.fetch("--train-shards", 2)
    assert hub.transfers() == [MANIFEST, TRAIN_1]
    hub.refused("--train-shards", 3, says=("--train-shards 3", "has 2 train shards", "2 or fewer"))
    assert hub.transfers() == [MANIFEST]


def test_a_download_leaves_that_of_another_variant_alone(hub):
    part = hub.data / ".download" / "sp4096" / "half a shard"
    part.parent.mkdir(parents=True)
    part.touch()
    hub.fetch("--train-shards", 1)
    assert [*(hub.data / ".download").rglob("*")] == [part.parent, part]
    part.unlink()
    part.parent.rmdir()
    hub.fetch("--train-shards", 2)
    assert not (hub.data / ".download").exists()


def test_broken_connection_goes_on_where_it_stopped(hub):
    hub.files[TRAIN_0] = shard_bytes(5, 6_500_000)  # the hub library writes blocks of 10 MiB
    hub.cut = {TRAIN_0: 12_000_000}
    process = hub.run("--train-shards", 1)
    requests = hub.requests[:]
    if process.returncode:  # older hub versions give up here, and go on in the next run
        assert "fineweb_train_000000.bin" in process.stderr and not hub.local(TRAIN_0).exists()
        hub.fetch("--train-shards", 1)
        requests += hub.requests
    assert hub.same(TRAIN_0)
    ranges = [range_ for method, path, range_ in requests if (method, path) == ("GET", TRAIN_0)]
    assert ranges[0] is None and len(ranges) == 2
    assert int(re.fullmatch(r"bytes=(\d+)-(\d+)?", ranges[1])[1]) >= 10 << 20


def test_bad_shard_on_the_server_gets_no_name(hub):
    hub.files[TRAIN_0] = struct.pack("<i", 42) + shard_bytes(0)[4:]
    hub.refused("--train-shards", 1, says=("fineweb_train_000000.bin", "magic number 42",
                                           "MATCHED_FINEWEB_REPO_ID"))
    assert hub.transfers().count(TRAIN_0) == 2 and not hub.local(TRAIN_0).exists()


def test_damaged_copy_in_the_hub_cache_is_not_used_twice(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    huggingface_hub.hf_hub_download("some/repo", TRAIN_0, repo_type="dataset",
                                    endpoint=f"http://127.0.0.1:{hub.server_port}")
    blob = next(path for path in (tmp_path / "cache").rglob("blobs/*") if path.is_file())
    blob.write_bytes(b"damaged")
    hub.fetch("--train-shards", 1)
    assert hub.same(TRAIN_0)


def with_hole(content: bytes) -> bytes:
    return content[:2048] + bytes(4096) + content[6144:]


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.mark.parametrize("damage, hash_", [
    (with_hole, lambda c: hashlib.sha256(c).hexdigest()),
    (lambda c: c[:1024] + c[1026:] + c[1024:1026], git_hash)])
def test_damage_of_the_right_size_is_found_by_the_servers_hash(hub, damage, hash_):
    hub.hash, hub.damaged = hash_, {TRAIN_0: damage(hub.files[TRAIN_0])}
    hub.refused("--train-shards", 1, says=("fineweb_train_000000.bin", "its hash is not",
                                           "came damaged twice"))
    assert not hub.local(TRAIN_0).exists()
    hub.damaged_once = True  # and the second transfer is good
    hub.fetch("--train-shards", 1)
    for path in (TRAIN_0, VAL_0):
        hub.local(path).write_bytes(damage(hub.files[path]))
    hub.local(MODEL).write_bytes(hub.files[MODEL] + b"\x0a\x02\x0a\x00")  # loads; a piece more
    process = hub.fetch("--train-shards", 1)
    assert "fetching again" in process.stderr and "its hash is not" in process.stderr
    assert hub.transfers() == [MANIFEST, MODEL, VAL_0, TRAIN_0] and hub.same(TRAIN_0, VAL_0, MODEL)


def test_without_a_hash_the_content_is_looked_at(hub):
    hub.hash = lambda content: "some-version"
    model, hub.files[MODEL] = hub.files[MODEL], b"an error page"
    hub.refused("--train-shards", 1, says=("fineweb_1024_bpe.model: not a SentencePiece model",))
    hub.files[MODEL], hub.files[VAL_0] = model, with_hole(hub.files[VAL_0])
    hub.refused("--train-shards", 1, says=("fineweb_val_000000.bin",
                                           "token 0 fills a hole from token 1024 on"))
    hub.files[VAL_0] = shard_bytes(2)
    hub.fetch("--train-shards", 1)
    hub.local(TRAIN_0).write_bytes(with_hole(hub.files[TRAIN_0]))
    hub.refused("--train-shards", 1, "--skip-manifest", offline=True, says=("cannot be reached",))
    assert "fills a hole" in hub.fetch("--train-shards", 1).stderr and hub.same(TRAIN_0)


def some_tokens(count: int = 60_000) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(4, 1024, count).astype("<u2")
    tokens[::1000] = BOS_ID
    return tokens


@pytest.mark.parametrize("change, message", [
    (lambda t: t[7000:9048].fill(0), "token 0 fills a hole from token 7168 on"),
    (lambda t: t[-2200:].fill(99), "token 99 fills a hole"),
    (lambda t: t[5:6].fill(1024), "token id 1024, the vocabulary has 1024 pieces"),
    (lambda t: t[::1000].fill(7), "0 document starts"),
    (lambda t: t[::3].fill(1), "document starts"),
    (lambda t: [t[i::20].fill(8) for i in range(1, 13)], "60% of it is token 8")])
def test_a_shard_with_wrong_content_is_named(tmp_path, change, message):
    tokens = some_tokens()
    shards.write_shard(tmp_path / "s.bin", [tokens], len(tokens))
    shards.check_content(tmp_path / "s.bin", 1024)
    change(tokens)
    shards.write_shard(tmp_path / "s.bin", [tokens], len(tokens))
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        shards.check_content(tmp_path / "s.bin", 1024)
    assert "s.bin" in str(caught.value) and "download or build it again" in str(caught.value)


@pytest.mark.parametrize("variable, variant, repository", [
    ("", "sp1024", "willdepueoai/parameter-golf"), ("", "sp8192", "kevclark/parameter-golf"),
    (" some/repo\r", "sp8192", "some/repo")])
def test_the_variant_decides_the_repository(monkeypatch, variable, variant, repository):
    asked = []
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", variable)
    monkeypatch.setattr(cached, "download", lambda remote, *_: asked.append(remote.repo_id))
    cached.main(["--variant", variant])
    assert asked == [repository]


@pytest.mark.parametrize("variant, said", [
    *((variant, "--variant") for variant in ("sp", "1024", "sp10k", "../sp1024", "")),
    ("sp1", "no dataset fineweb10B_sp1, only fineweb10B_sp1024")])
def test_an_unknown_variant_is_refused(hub, variant, said):
    hub.refused("--variant", variant, says=(said,))


def test_without_manifest_the_known_names_are_probed(hub):
    hub.files[FOLDER + "fineweb_val_000001.bin"] = shard_bytes(7)
    del hub.files[MANIFEST]
    process = hub.fetch("--train-shards", 1, "--skip-manifest")
    assert "1 train and 2 validation shards" in process.stdout and hub.local(MODEL).exists()
    hub.refused("--train-shards", 3, "--skip-manifest", says=(
        "fineweb_train_000002.bin", "does not exist", "2 of the 3 train shards"))
    assert hub.local(TRAIN_1).exists() and hub.transfers() == [TRAIN_1]
    hub.refused(says=("manifest.json", "does not exist"))
    manifest = {"datasets": [{"name": "fineweb10B_sp1024", "stats": {"files_train": "many"}}]}
    hub.files[MANIFEST] = json.dumps(manifest).encode()
    hub.fetch("--train-shards", 2)  # the manifest does not say how many there are


@pytest.mark.parametrize("path", ["/etc/x.model", "tokenizers/../../x.model", "c:/x.model",
                                  "a\\..\\x/y.model"])
def test_manifest_cannot_lead_out_of_the_data_folder(path):
    for folder, model in ((path, "t.model"), ("x", path)):
        manifest = {"datasets": [{"name": "fineweb10B_sp1", "path": folder, "tokenizer_name": "t"}],
                    "tokenizers": [{"name": "t", "model_path": model}]}
        with pytest.raises(DataError, match="out of the data folder"):
            cached.listing(manifest, "sp1", strict=True)


@pytest.mark.parametrize("manifest", [{"datasets": 5}, {"datasets": ["sp1"]}, {"datasets": [{}]},
                                      {"datasets": [{"name": "fineweb10B_sp1", "path": 5}]}])
def test_a_manifest_of_unknown_form_is_refused(manifest):
    with pytest.raises(DataError, match="unknown form.*--skip-manifest"):
        cached.listing(manifest, "sp1", strict=True)


# ---- builder --------------------------------------------------------------------------------

def test_built_dataset_round_trips_and_its_manifest_counts(tmp_path):
    texts = sentences(80)
    source = write_jsonl(tmp_path / "tales.jsonl", texts, field="body")
    run_builder(source, "--out-root", tmp_path, "--vocab-size", 400, "--val-docs", 9,
                "--shard-tokens", 1000, "--text-field", "body")
    folder, tokenizer = tmp_path / "datasets/tales", tmp_path / "tokenizers/tales_400_bpe.model"
    train, val = texts_of(folder, "train", tokenizer), texts_of(folder, "val", tokenizer)
    assert Counter(train + val) == Counter(map(folded, texts)) and len(val) == 9
    assert train != [t for t in map(folded, texts) if t in train], "training is not shuffled"
    manifest = json.loads((folder / "manifest.json").read_text())
    for split, decoded in (("train", train), ("val", val)):
        entry = manifest["splits"][split]
        assert entry["documents"] == len(decoded)
        originals = {folded(text): text for text in texts}
        assert entry["utf8_bytes"] == sum(len(originals[t].encode()) for t in decoded)
        assert [f["tokens"] for f in entry["files"][:-1]] == [1000] * (len(entry["files"]) - 1)
        assert (entry["tokens"] == sum(f["tokens"] for f in entry["files"])
                == sum(len(d) + 1 for d in documents_of(folder, split)))
        for file in entry["files"]:
            content = (folder / file["name"]).read_bytes()
            assert hashlib.sha256(content).hexdigest() == file["sha256"]
            assert shards.check_shard(folder / file["name"]) == file["tokens"]
    assert manifest["tokenizer"]["sha256"] == shards.sha256_file(tokenizer)
    assert sorted(os.listdir(tmp_path / "datasets")) == ["tales"]  # no temporary folder left


def test_new_tokenizer_has_the_challenge_settings(tokenizer_path):
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path))
    special = tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id()
    assert special == (0, 1, 2, 3)
    assert tokenizer.encode("river", out_type=str)[0][0] != "▁"          # no dummy prefix
    assert tokenizer.is_byte(tokenizer.encode("\U0001d11e")[0])          # byte fallback
    assert tokenizer.decode(tokenizer.encode("２３")) == "23"              # NFKC
    assert tokenizer.encode("1984", out_type=str) == list("1984")        # digits are split


def test_tokenizer_sees_no_validation_text():
    docs = build_dataset.ListDocuments(sentences(50))
    limit = build_dataset.val_key_limit(build_dataset.Settings("x", val_docs=20), docs)
    sample = build_dataset.sample_documents(docs, 1337, limit)
    assert len(sample) == 30 and all(build_dataset.text_key(t, 1337) >= limit for t in sample)


@FAST
@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(8, 40))
def test_tokenizer_lines_lose_nothing_and_are_short(text, width):
    build_dataset.TOKENIZER_LINE_BYTES, before = width, build_dataset.TOKENIZER_LINE_BYTES
    try:
        lines = list(build_dataset.tokenizer_lines([text]))
    finally:
        build_dataset.TOKENIZER_LINE_BYTES = before
    assert "".join(lines) == "".join(text.splitlines())
    assert all(0 < len(line.encode()) <= width for line in lines)


SHORT = st.text("ab \n", max_size=4)


@FAST
@given(texts=st.lists(SHORT | st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
                      min_size=1, max_size=12),
       val_texts=st.none() | st.lists(SHORT, min_size=1, max_size=6), seed=st.integers(0, 9))
def test_train_and_validation_are_disjoint(tmp_path, tokenizer_path, texts, val_texts, seed):
    """Validation keeps its order and loses repeats, training loses its copies."""
    made = build_dataset.Settings("d", tmp_path, tokenizer_path,
                                  val_fraction=None if val_texts else 0.4, seed=seed, force=True)
    texts, val_texts = texts + texts[:2], val_texts and val_texts + val_texts[:1]
    separate = build_dataset.ListDocuments(val_texts) if val_texts else None
    try:
        manifest = build_dataset.build(made, build_dataset.ListDocuments(texts), separate)
    except DataError:
        return  # one side empty
    train, val = (documents_of(tmp_path / "datasets/d", split) for split in ("train", "val"))
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path))
    given, given_val = ([tuple(ids) for ids in map(tokenizer.encode, some) if ids]
                        for some in (texts, val_texts or texts))
    assert sorted(train) == sorted(d for d in given if d not in val)
    assert val == [d for d in dict.fromkeys(given_val) if val_texts or d in val]
    dropped = (manifest["splits"]["train"]["dropped_copies_of_validation"],
               manifest["splits"]["val"]["dropped_repeats"])
    if val_texts:
        assert dropped == (len(given) - len(train), len(given_val) - len(val))


def test_same_bytes_whatever_the_workers_and_another_seed_differs(tmp_path, monkeypatch):
    monkeypatch.setattr(build_dataset, "BATCH_CHARS", 2000)  # many batches
    source = write_jsonl(tmp_path / "t.jsonl", sentences(150))
    contents = []
    for run, (workers, seed) in enumerate([(1, 5), (2, 5), (1, 6)]):
        root = tmp_path / str(run)
        build_dataset.main([str(source), "--out-root", str(root), "--vocab-size", "350", "--seed",
                            str(seed), "--val-fraction", "0.2", "--workers", str(workers)])
        files = [path for path in root.rglob("*") if path.is_file()]
        contents.append({path.relative_to(root): path.read_bytes() for path in files})
    assert contents[0] == contents[1] and len(contents[0]) == 5
    assert all(contents[0][name] != contents[2][name] for name in contents[0])


PACK = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress,
        ".bz2": bz2.compress}
TEXTS = sentences(300)
JSONL = "".join(json.dumps({"body": t}) + "\n" for t in TEXTS).encode()


def read(path: Path, field: str = "text", separator: str | None = None) -> list[str]:
    return list(build_dataset.FileDocuments([path], field, separator).read("x"))


def file_of(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("suffix", PACK)
def test_compression_and_json_are_told_by_content(tmp_path, suffix):
    half, pack = len(JSONL) // 2, PACK[suffix]
    for content in (pack(JSONL[:half]) + pack(JSONL[half:]),  # as parallel compressors write
                    pack(bz2.compress(JSONL))):
        for name in ("T.JSONL" + suffix.upper(), "no_suffix", "t.jsonl.gz", "t.txt" + suffix):
            assert read(file_of(tmp_path / name, content), "body") == TEXTS
    padded = lzma.compress(JSONL[:half]) + bytes(512) + lzma.compress(JSONL[half:]) + bytes(200_000)
    assert read(file_of(tmp_path / "t.xz", padded), "body") == TEXTS


@pytest.mark.parametrize("suffix", PACK)
def test_damaged_compression_is_named(tmp_path, suffix):
    content = PACK[suffix](JSONL)
    for bad in (content[:-30], content[:len(content) // 2]):
        where = r"t\.jsonl, (after line \d+|at its beginning): damaged"
        with pytest.raises(DataError, match=where):
            read(file_of(tmp_path / "t.jsonl", bad), "body")
    for rest in (b"garbage", b"\0\0\0\0garbage", JSONL):
        with pytest.raises(DataError, match="damaged"):
            read(file_of(tmp_path / "t.jsonl", content + rest), "body")


def test_what_unpacks_without_end_is_refused(tmp_path):
    content = JSONL
    for _ in range(build_dataset.MAX_LAYERS):
        content = gzip.compress(content)
    assert read(file_of(tmp_path / "t.gz", content), "body") == TEXTS
    with pytest.raises(DataError, match="t.gz is packed more than 8 times: unpack it first"):
        read(file_of(tmp_path / "t.gz", gzip.compress(content)), "body")


@pytest.mark.parametrize("content, message", [
    *((tarfile.TarInfo("t.jsonl").tobuf(form), "a tar archive")
      for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)),
    (b"PK\x03\x04" + b"x" * 99, "a zip archive"), (b"PAR1" + b"x" * 99, "a Parquet file"),
    (b"%PDF-1.7\n", "a PDF"), ("a text".encode("utf-16"), "UTF-16"),
    ("a text".encode("utf-16-be"), "binary"), (b'{"text": "a\0b"}', "binary"),
    ("a text".encode("utf-32"), "UTF-32"), (b"\0\0\xfe\xff\0\0\0a", "UTF-32"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
    (b"PK\x05\x06" + bytes(18), "binary"), (b"7z\xbc\xaf\x27\x1c\0\4", "binary"),
    (lzma.compress(b"a text", lzma.FORMAT_ALONE), "binary")])
def test_what_is_no_text_is_refused(tmp_path, content, message):
    for name, suffix in (("t.jsonl", ""), ("t.txt", ".gz"), ("t.zst", ".zst")):
        path = file_of(tmp_path / name, PACK.get(suffix, bytes)(content))
        with pytest.raises(DataError, match=re.escape(f"{path} is {message}")):
            read(path)


@pytest.mark.parametrize("content", [b'[{"text": "a"}]', b'[\n {"text": "a"}\n]',
                                     b'\xef\xbb\xbf [ "a", "b"]', b'[["a"]]'])
def test_a_json_array_is_refused_with_the_way_out(tmp_path, content):
    for name in ("t.json", "t.JSONL", "t.txt"):
        way_out = r"is a JSON array.*jq -c '\.\[\]' t\.\w+ > t_lines\.jsonl"
        with pytest.raises(DataError, match=way_out):
            read(file_of(tmp_path / name, content))


@pytest.mark.parametrize("content", [b"[1] A note.", b"{curly} text", b'"quoted": text', b""])
def test_plain_text_that_looks_a_little_like_json_stays_text(tmp_path, content):
    """A name for JSON decides otherwise; a separator makes any content plain text."""
    assert read(file_of(tmp_path / "t.txt", content)) == [content.decode()][:len(content)]
    if content:
        with pytest.raises(DataError, match="line 1: "):
            read(file_of(tmp_path / "t.NDJSON.GZ", b"plain" + content))
    assert read(file_of(tmp_path / "t.txt", b'["a"]'), separator="--") == ['["a"]']


@pytest.mark.parametrize("line, message", [
    (b'{"text": "a', "line 3: not valid JSON"),
    (b'["a"]', "line 3: a list, an object with 'text' was expected"), (b"7", "line 3: a int"),
    (b'{"txt": "a"}', "line 3: no 'text' in it, found keys ['txt']: name the right --text-field"),
    (b"{}", "line 3: no 'text' in it, found keys []"),
    (b'{"text": 5}', "line 3: 'text' is 5, not a string"),
    (b'{"text": null}', "line 3: 'text' is null, not a string"),
    (b'{"text": ["a"]}', """line 3: 'text' is ["a"], not"""),
    (b"[" * 100_000, "line 3: not valid JSON"), (b'{"text": "\xff"}', "line 3: not UTF-8"),
    (b'{"text": "\\ud800"}', "line 3: half of a surrogate")])
def test_bad_json_line_is_named(tmp_path, line, message):
    path = file_of(tmp_path / "t.jsonl", b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=re.escape(f"{path}, {message}")):
        read(path)


@pytest.mark.parametrize("content", [
    JSONL.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + JSONL, JSONL.rstrip(),
    b"\x50\x2a\x4d\x18\4\0\0\0skip" + PACK[".zst"](JSONL)],
    ids=["CRLF", "byte order mark", "no last line end", "zstd's skippable frame"])
def test_harmless_oddities_of_files_are_read(tmp_path, content):
    assert read(file_of(tmp_path / "t.txt", content), "body") == TEXTS


@pytest.mark.parametrize("content", [
    JSONL.replace(b"\n", b"\r"), JSONL + b"\x1a", b'{\n "body": "a"\n}\n',
    b'{"body": ' + b"9" * 5_000 + b"}"], ids=["Mac's line ends", "DOS's end", "pretty", "digits"])
def test_lines_that_are_no_json_are_refused(tmp_path, content):
    with pytest.raises(DataError, match=r"t.jsonl, line (1|301): not valid JSON"):
        read(file_of(tmp_path / "t.jsonl", content), "body")


AGAIN = "is not a regular file.*save it to a file"


@pytest.mark.parametrize("path, message", [("/dev/null", AGAIN), ("-", AGAIN), ("pipe", AGAIN),
                                           (".", "is a folder"), ("none", "is not there")])
def test_what_cannot_be_read_twice_is_refused(tmp_path, monkeypatch, path, message):
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"{path} {message}"):
        run_builder(path, "--name", "x")


@pytest.mark.parametrize("separator, expected", [
    (None, ["a" * 1500 + "\n\n" + "b" * 600, "c\n\nd"]), ("", ["a" * 1500, "b" * 600, "c", "d"]),
    ("c", ["a" * 1500 + "\n\n" + "b" * 600 + "\n", "\nd"])])
def test_plain_text_is_cut_where_help_says(tmp_path, tokenizer_path, separator, expected):
    path = tmp_path / "t.txt"
    path.write_text("a" * 1500 + "\n\n" + "b" * 600 + "\n\nc\n\nd\n")
    assert list(build_dataset.FileDocuments([path], separator=separator).read("x")) == expected
    flag = [] if separator is None else ["--doc-separator", separator]
    run_builder(path, "--out-root", tmp_path, "--tokenizer", tokenizer_path, "--val-docs", 1, *flag)
    splits = json.loads((tmp_path / "datasets/t/manifest.json").read_text())["splits"]
    assert splits["train"]["documents"] + splits["val"]["documents"] == len(expected)


def test_with_folded_case_the_script_counts_the_bytes_of_the_text(tmp_path):
    """Training and validation come back, the split is that of the plain text, and the script takes
    tokens, tokenizer and side files. Folded case and a tokenizer with marks need each other."""
    texts = [text.title() for text in sentences(60)]
    source = write_jsonl(tmp_path / "t.jsonl", texts)
    options = ("--out-root", tmp_path, "--vocab-size", 330, "--val-docs", 20)
    run_builder(source, *options, "--fold-case")
    run_builder(source, *options, "--name", "plain")
    found = {name: [texts_of(tmp_path / f"datasets/{name}", split,
                             tmp_path / f"tokenizers/{name}_330_bpe.model")
                    for split in ("train", "val")] for name in ("t", "plain")}
    back = [list(map(build_dataset.unfold_case, side)) for side in found["t"]]
    assert back == found["plain"] and back != found["t"]
    s = train_gpt.replace(train_gpt.Settings(), data_path=str(tmp_path / "datasets/t"),
                          tokenizer_path=str(tmp_path / "tokenizers/t_330_bpe.model"),
                          vocab_size=330, train_seq_len=32)
    table, (path,) = train_gpt.ByteTable(s), train_gpt.shard_paths(s, "val")
    tokens = np.asarray(train_gpt.open_shard(path))
    table.check_text(tokens, path)
    assert (table.source, table.count(tokens)) == (
        "text", sum(len(t.encode()) for t in texts if folded(t) in set(map(folded, back[1]))))
    for name, flags, says in (("t", [], "has pieces for the marks.*add --fold-case"),
                              ("plain", ["--fold-case"], "has no piece for the mark")):
        with pytest.raises(DataError, match=f"/{name}_330_bpe.model:? {says}"):
            run_builder(source, *options, "--name", "none", "--tokenizer",
                        tmp_path / f"tokenizers/{name}_330_bpe.model", *flags)


def test_a_build_does_not_replace_one_that_ended_meanwhile(tmp_path, tokenizer_path, monkeypatch):
    """The second finds the name taken only at its end."""
    source = write_jsonl(tmp_path / "t.jsonl", sentences(30))
    target, encode = tmp_path / "datasets/t", build_dataset.encode_splits

    def meanwhile(*arguments):
        target.mkdir()
        (target / "marker").touch()
        return encode(*arguments)
    monkeypatch.setattr(build_dataset, "encode_splits", meanwhile)
    with pytest.raises(DataError, match="datasets/t exists already"):
        run_builder(source, "--out-root", tmp_path, "--tokenizer", tokenizer_path, "--val-docs", 3)
    assert [p.name for p in target.iterdir()] == ["marker"]


def test_documents_are_read_lazily(tokenizer_path):
    """The pool must not read far ahead of what is consumed, or a corpus would end up in memory."""
    taken = []
    items = (taken.append(i) or ["a river"] for i in range(1000))
    results = build_dataset.parallel_map(_encode_nothing, items, workers=2)
    next(results)
    assert len(taken) <= 8
    results.close()


def _encode_nothing(texts):
    return texts


def test_existing_dataset_is_kept_unless_forced(tmp_path, tokenizer_path, monkeypatch):
    source = write_jsonl(tmp_path / "t.jsonl", sentences(30))
    arguments = [source, "--out-root", tmp_path, "--tokenizer", tokenizer_path, "--val-docs", 3]
    run_builder(*arguments)
    marker = tmp_path / "datasets/t/marker"
    marker.touch()
    with pytest.raises(DataError, match=r"datasets/t exists already.*--force"):
        run_builder(*arguments)
    assert marker.exists()
    bad = write_jsonl(tmp_path / "bad.jsonl", ["a"], field="other")
    with pytest.raises(DataError, match="no 'text' in it"):
        run_builder(bad, "--name", "t", "--force", *arguments[1:])
    assert marker.exists() and os.listdir(tmp_path / "datasets") == ["t"], "a failed build"

    def interrupt(*_):
        raise KeyboardInterrupt
    renames = iter([os.rename, interrupt, os.rename])  # between the old one's and the new one's
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "rename", lambda *paths: next(renames)(*paths))
        run_builder(*arguments, "--force")
    assert marker.exists() and os.listdir(tmp_path / "datasets") == ["t"]
    run_builder(*arguments, "--force")
    assert not marker.exists() and os.listdir(tmp_path / "datasets") == ["t"]


@pytest.mark.parametrize("texts, arguments, message", [
    ([], [], "no training document"), (["", " \n"], [], "no training document"),
    (sentences(5), ["--val-docs", 5], "there are 5 different documents"),
    (sentences(3), ["--vocab-size", 30_000], "--vocab-size 30000: SentencePiece refuses"),
    (["".join(chr(0x4e00 + (7 * i + k) % 600) for k in range(200)) for i in range(60)],
     ["--vocab-size", 300, "--val-docs", 3], "choose a larger vocabulary"),  # a piece for each
    (sentences(3), ["--vocab-size", 300, "--val-fraction", 1e-9], "fell to validation"),
    (sentences(3), ["--name", "../up"], "--name '../up'"),
    (sentences(3), ["--val-fraction", 1.5], "--val-fraction 1.5"),
    (sentences(3), ["--workers", 0], "--workers 0"),
    (sentences(3), ["--vocab-size", 65537], "--vocab-size 65537"),
    (sentences(3), ["--tokenizer", "none.model"], "No such file or directory: 'none.model'"),
    (sentences(3), ["--demo"], "--demo has its own text")])
def test_what_cannot_be_built_is_explained(tmp_path, texts, arguments, message):
    source = write_jsonl(tmp_path / "t.jsonl", texts)
    with pytest.raises(DataError, match=re.escape(message)):
        run_builder(source, "--out-root", tmp_path, *arguments)
    assert not list((tmp_path / "datasets").glob("*")) and not (tmp_path / "tokenizers").exists()


def test_unusable_tokenizers_are_refused(tmp_path, monkeypatch, tokenizer_path):
    (tmp_path / "junk.model").write_bytes(b"junk")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        build_dataset.load_tokenizer(tmp_path / "junk.model")
    monkeypatch.setattr(build_dataset, "MAX_VOCAB_SIZE", 300)
    build_dataset.load_tokenizer.cache_clear()
    with pytest.raises(DataError, match="320 pieces, uint16 shards hold at most 300"):
        build_dataset.load_tokenizer(tokenizer_path)
    foreign = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(20)), model_writer=foreign, vocab_size=80,
        model_type="bpe", bos_id=2, eos_id=1, minloglevel=2)
    (tmp_path / "foreign.model").write_bytes(foreign.getvalue())
    with pytest.raises(DataError, match="BOS has id 2, shards need 1"):
        build_dataset.load_tokenizer(tmp_path / "foreign.model")


# ---- demo and report ------------------------------------------------------------------------

def test_training_loses_the_paragraphs_that_validation_has():
    own = "This paragraph belongs to the training text alone, " * 5
    copy = "A sentence that is found word for word on both sides of the split, to be dropped."
    near = copy.replace("dropped", "dropped from training")
    val = ["Something else entirely stands here before the copy. " * 4 + "\n\n" + copy]
    assert demo_corpus.drop_copies([f"{own}\n\n{copy}\n\n{near}"], val) == [own]
    assert (demo_corpus.without_repeats([f"{copy}\n\nNote.", f"Note.\n\n{copy}"])
            == [f"{copy}\n\nNote.", "Note."])


@pytest.mark.parametrize("folds", [False, True])
def test_small_demo(tmp_path, folds):
    manifest = build_dataset.build_demo(
        build_dataset.Settings("demo", tmp_path, fold_case=folds), max_modules=40)
    folder, tokenizer_path = tmp_path / "datasets/demo", tmp_path / "tokenizers/demo_1024_bpe.model"
    train, val = (texts_of(folder, split, tokenizer_path) for split in ("train", "val"))
    assert folds != any(re.search("[A-Z]", text) for text in train + val)
    if folds:
        train, val = (list(map(build_dataset.unfold_case, texts)) for texts in (train, val))
    train_text, val_text = "\n".join(train).encode(), "\n".join(val).encode()

    def xz(data: bytes) -> int:
        return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))

    extra_bytes = xz(train_text + b"\n" + val_text) - xz(train_text)
    val_bytes = sum(len(t.encode()) for t in val)
    assert manifest["xz_bits_per_byte"] == pytest.approx(8 * extra_bytes / val_bytes)
    assert manifest["xz_bytes"]["val_text"] == manifest["splits"]["val"]["utf8_bytes"] == val_bytes

    def runs(texts):
        return {tuple(words[i:i + 40]) for words in map(str.split, texts)
                for i in range(len(words) - 39)}
    assert not runs(train) & runs(val), "40 words in a row stand on both sides"
    assert json.loads((folder / "manifest.json").read_text()) == manifest


@pytest.fixture
def demo_manifest(tmp_path) -> Path:
    path = tmp_path / "datasets/demo/manifest.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"xz_bits_per_byte": 2.0, "xz_bytes": {"val_text": 1000}}))
    return path


def test_report_compares_the_best_score(tmp_path, demo_manifest, capsys):
    result = tmp_path / "r.json"
    scores = {"float": 1.4, "int6": 1.6, "sliding": 1.5, "ttt": None}
    result.write_text(json.dumps({"val_bpb": scores, "total_bytes": 900, "scored_bytes": 990}))
    build_dataset.main(["--report", str(result), "--out-root", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[1:5]] == [
        ["xz", "-9e", "2.0000"], ["float", "1.4000", "the"], ["int6", "1.6000", "the"],
        ["sliding", "1.5000", "the"]]
    assert lines[5] == ("The model (sliding) needs 25.0% less than xz. Scored: 99.0% of 1,000 "
                        "bytes. Code + model: 900 bytes.")
    assert lines[6].startswith("No sample: ") and lines[7].startswith("No picture: ")
    assert len(lines) == 8


def test_report_shows_what_the_packed_model_writes(tmp_path, demo_manifest, corpus, run_script):
    """The sample repeats, comes from the run's own artifact only, and the curve is drawn."""
    assert run_script(ITERATIONS=2, TTT_ENABLED=0).returncode == 0
    result = tmp_path / "logs/run.json"
    demo_manifest.write_text(json.dumps({"tokenizer": {"path": str(corpus.model)}}))
    first, again = (build_dataset.sample(result, demo_manifest, tokens=20) for _ in range(2))
    assert first == again and first.startswith("The packed model goes on")
    assert len(first.splitlines()) > 1
    assert build_dataset.loss_picture(result).endswith("run.png")
    assert (tmp_path / "logs/run.png").read_bytes().startswith(b"\x89PNG")
    relative = json.loads(result.read_text()) | {"artifact": "runs/x/final_model.ptz"}
    result.write_text(json.dumps(relative))  # as with a relative OUT_DIR
    assert build_dataset.sample(result, demo_manifest, tokens=20) == first
    changed = json.loads(result.read_text()) | {"artifact_sha256": "0" * 64}
    result.write_text(json.dumps(changed))
    assert "No sample: " in build_dataset.sample(result, demo_manifest)


@pytest.mark.parametrize("content, message", [
    ({"scored_bytes": 990}, "val_bpb is None"),
    ({"val_bpb": {"int6": "low"}, "scored_bytes": 9}, "val_bpb.int6 is 'low'"),
    ({"val_bpb": {"int6": float("nan")}, "scored_bytes": 9}, "val_bpb.int6 is nan"),
    ({"val_bpb": {"int6": 1.0}, "scored_bytes": 1001}, "scored_bytes is 1001"),
    ({"val_bpb": {"int6": 10**400}, "scored_bytes": 9}, "val_bpb.int6 is 1000"),
    ({"val_bpb": {"int6": 1.0}}, "scored_bytes is None")])
def test_report_refuses_a_wrong_result(tmp_path, demo_manifest, content, message):
    result = tmp_path / "r.json"
    result.write_text(json.dumps(content))
    with pytest.raises(DataError, match=re.escape(message)):
        build_dataset.report(result, demo_manifest)


def test_report_refuses_a_wrong_manifest(tmp_path, demo_manifest):
    result = file_of(tmp_path / "r.json", b'{"val_bpb": {"int6": 1.0}, "scored_bytes": 9}')
    for manifest in ({"xz_bits_per_byte": 2.0},
                     {"xz_bits_per_byte": 0.0, "xz_bytes": {"val_text": 9}},
                     {"xz_bits_per_byte": 2.0, "xz_bytes": [9]}):
        demo_manifest.write_text(json.dumps(manifest))
        with pytest.raises(DataError, match="build the demo again with --demo --force"):
            build_dataset.report(result, demo_manifest)
    with pytest.raises(DataError, match="run build_dataset.py --demo first"):
        build_dataset.report(result, tmp_path / "none.json")
