"""The artifact: round trips, fitting a budget, and what happens to files that are damaged or made to hurt."""

import ast
import hashlib
import json
import lzma
import math
import os
import struct
import time
import tracemalloc
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

import train_gpt
from train_gpt import ARTIFACT_MAGIC, ArtifactError, Quantized, Settings, decode_artifact, encode_artifact

quick = settings(deadline=None, database=None, max_examples=150, suppress_health_check=list(HealthCheck))
START = len(ARTIFACT_MAGIC) + 4
try:
    import zstandard  # noqa: F401
    CODECS = ["lzma", "zstd"]
except ImportError:
    CODECS = ["lzma"]


# -- round trip ------------------------------------------------------------------------------------------------------

@st.composite
def stored_tensors(draw):
    """{name: Quantized} of random names, shapes and contents; fp16 arrays of any bits at all, NaN included."""
    tensors = {}
    for name in draw(st.lists(st.text(min_size=1, max_size=12), unique=True, max_size=6)):
        bits = draw(st.sampled_from([4, 5, 6, 7, 8, 16]))
        rng = np.random.default_rng(draw(st.integers(0, 2**32)))
        if bits == 16:
            shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
            half = rng.integers(0, 2**16, shape, dtype=np.uint16).reshape(shape)
            tensors[name] = Quantized(16, half=torch.from_numpy(half.view(np.float16).copy()), shape=shape)
        else:
            shape, limit = (draw(st.integers(0, 6)), draw(st.integers(0, 9))), 2 ** (bits - 1) - 1
            steps = rng.integers(0, 0x7C00, shape[0], dtype=np.uint16).view(np.float16).astype(np.float32)
            codes = torch.from_numpy(rng.integers(-limit, limit + 1, shape).astype(np.int8))
            tensors[name] = Quantized(bits, codes, torch.from_numpy(steps), shape=shape)
    return tensors


def raw(t):
    """A tensor's stored content, bit for bit."""
    arrays = [t.half.numpy()] if t.bits == 16 else [t.codes.numpy(), t.steps.numpy()]
    return (t.bits, tuple(t.shape), *[(a.dtype, a.shape, a.tobytes()) for a in arrays])


@pytest.mark.parametrize("codec", CODECS)
@quick
@given(stored_tensors(), st.floats(1, 64), st.integers(0, 2**31 - 1), st.floats(0, 1))
def test_decode_gives_back_what_encode_was_given(codec, tensors, widening, seed, slope):
    s = replace(Settings(), seed=seed, leaky_slope=slope, codec=codec, ve_layers="3,4")
    stored, back, back_widening = decode_artifact(encode_artifact(tensors, s, widening))
    assert {n: raw(t) for n, t in back.items()} == {n: raw(t) for n, t in tensors.items()}
    assert back_widening == widening
    assert stored == {f.name: getattr(s, f.name) for f in fields(s) if f.name not in train_gpt.TIED_TO_THE_RUN}


def test_encoding_twice_gives_the_same_bytes(model_state, tiny):
    at = train_gpt.quantize(model_state, tiny())
    assert encode_artifact(at(1.0), tiny(), 1.0) == encode_artifact(at(1.0), tiny(), 1.0)


def test_paths_and_devices_of_the_run_stay_out(model_state, tiny, corpus):
    """Nothing of the machine that trained belongs in a submission's model file."""
    stored, *_ = decode_artifact(encode_artifact(train_gpt.quantize(model_state, tiny())(1.0), tiny(), 1.0))
    assert not {"out_dir", "run_id", "device", "eval_only", "scores_path"} & stored.keys()


@pytest.fixture
def model_state(tiny):
    """Parameters of the tiny model, random."""
    model = train_gpt.GPT(tiny())
    torch.manual_seed(3)
    return {n: torch.randn_like(p) * 0.1 for n, p in model.named_parameters()}


def test_a_model_comes_back_as_its_quantized_weights(model_state, tiny, tmp_path):
    s, path = tiny(), tmp_path / "m.ptz"
    train_gpt.write_whole(path, train_gpt.pack(model_state, s, 10**6))
    model, tensors = train_gpt.GPT(s), train_gpt.read_artifact(path)[1]
    train_gpt.load_quantized(model, tensors, path)
    expected = train_gpt.quantize(model_state, s)(1.0)
    for n, p in model.named_parameters():
        assert torch.equal(p, expected[n].weights()), n


# -- fitting a budget ------------------------------------------------------------------------------------------------

def weights_of(shapes, draw, seed=0):
    """Random weights for {name: shape}, matrices with standard deviation 0.02."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal if draw == "gaussian" else lambda shape: rng.standard_t(3, shape)
    return {n: torch.from_numpy(0.02 * noise(shape).astype(np.float32)) for n, shape in shapes.items()}


SHAPES = {"tok_emb": (128, 256), "cores.0.attn.q": (256, 256), "cores.0.mlp.up": (384, 256), "cores.0.mlp.down": (256, 384),
          "skip_weights": (2, 256)}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("draw", ["gaussian", "heavy"])
def test_pack_fits_every_reachable_budget_and_wastes_little(draw, codec):
    """Close to the budget wherever anybody would ship it; where codes are mostly zeros the size itself has jumps of 1 %."""
    s, state = replace(Settings(), codec=codec), weights_of(SHAPES, draw)
    at = train_gpt.quantize(state, s)
    most, least = (len(encode_artifact(at(f), s, f)) for f in (1.0, 64.0))
    assert least < most / 3
    for share in (0.02, 0.15, 0.4, 0.6, 0.8, 0.93, 0.99):
        budget, lines = int(least + share * (most - least)), []
        content = train_gpt.pack(state, s, budget, lines.append)
        assert len(content) <= budget
        close = 0.995 if codec == "lzma" else 0.98  # whole Huffman bits: zstd's sizes jump more
        assert len(content) >= close * budget or share < 0.3, f"{len(content)} bytes for {budget}"
        widening = decode_artifact(content)[2]
        assert 1 < widening < 64 and any(f"{widening:.4f}" in line for line in lines), "the log says what was given up"
        assert content == encode_artifact(at(widening), s, widening)


def test_pack_does_not_widen_what_fits_as_it_is():
    state = weights_of(SHAPES, "gaussian")
    finest = encode_artifact(train_gpt.quantize(state, Settings())(1.0), Settings(), 1.0)
    assert train_gpt.pack(state, Settings(), len(finest)) == finest
    assert decode_artifact(train_gpt.pack(state, Settings(), len(finest) - 1))[2] > 1


@pytest.mark.parametrize("budget", [0, -50_000, 5000])
def test_an_unreachable_budget_is_refused_with_the_overshoot(budget):
    state, s = weights_of(SHAPES, "gaussian"), Settings()
    with pytest.raises(train_gpt.UserError) as refusal:
        train_gpt.pack(state, s, budget)
    words = str(refusal.value).split()
    size, over = int(words[words.index("takes") + 1]), int(words[words.index("more") - 1])
    assert size - over == budget and "ARTIFACT_BUDGET_BYTES" in str(refusal.value)


def test_a_model_without_codes_has_nothing_to_widen(tiny):
    state = {"skip_weights": torch.ones(4, 100)}
    with pytest.raises(train_gpt.UserError, match="more than"):
        train_gpt.pack(state, tiny(), 100)


@pytest.mark.slow
@pytest.mark.parametrize("draw", ["gaussian", "heavy"])
def test_the_full_model_fits_sixteen_million_bytes(draw):
    s = Settings()
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in train_gpt.GPT(s).named_parameters()}
    count, budget, lines = sum(map(math.prod, shapes.values())), 16_000_000 - train_gpt.SCRIPT.stat().st_size, []
    state, started = weights_of(shapes, draw), time.perf_counter()
    content = train_gpt.pack(state, s, budget, lines.append)
    print(f"\n{draw}: {count} weights, {len(content)} of {budget} bytes in {time.perf_counter() - started:.1f} s; {lines}")
    assert 0.995 * budget <= len(content) <= budget or len(lines) == 0
    stored, tensors, widening = decode_artifact(content)
    assert {n: tuple(t.shape) for n, t in tensors.items()} == shapes and widening >= 1


# -- damaged and hostile files ---------------------------------------------------------------------------------------

def sealed(content):
    return content + hashlib.sha256(content).digest()


def taken_apart(content):
    """(header, index, data) of an artifact made with lzma."""
    length, = struct.unpack_from("<I", content, START - 4)
    header = json.loads(content[START: START + length])
    body = lzma.decompress(content[START + length: -32], lzma.FORMAT_RAW, filters=train_gpt.LZMA_FILTERS)
    return header, json.loads(body[: header["index_bytes"]]), body[header["index_bytes"]:]


def put_together(index, data=b"", header=None, tail=b""):
    """An artifact with a right checksum around whatever is given; `index` and `header` as objects or bytes."""
    index = index if isinstance(index, bytes) else json.dumps(index).encode()
    body = index + data
    fitting = dict(codec="lzma", body_bytes=len(body), index_bytes=len(index))
    header = header if isinstance(header, bytes) else json.dumps({**fitting, **(header or {})}).encode()
    payload = lzma.compress(body, lzma.FORMAT_RAW, filters=train_gpt.LZMA_FILTERS)
    return sealed(ARTIFACT_MAGIC + struct.pack("<I", len(header)) + header + payload + tail)


@pytest.fixture(scope="module")
def good():
    """A small artifact, all bits present."""
    shapes = {"tok_emb": (6, 8), "cores.0.attn.q": (8, 8), "cores.0.mlp.up": (9, 8), "skip_weights": (2, 8)}
    return train_gpt.pack(weights_of(shapes, "gaussian"), Settings(), 10**6)


def refused(content, most_bytes=1 << 24):
    """Is refused with ArtifactError, while no more than `most_bytes` are allocated."""
    tracemalloc.start()
    try:
        with pytest.raises(ArtifactError):
            decode_artifact(content)
        assert tracemalloc.get_traced_memory()[1] <= most_bytes
    finally:
        tracemalloc.stop()


def test_the_forger_of_these_tests_forges_well(good):
    header, index, data = taken_apart(good)
    copy = decode_artifact(put_together(index, data))
    assert {n: raw(t) for n, t in copy[1].items()} == {n: raw(t) for n, t in decode_artifact(good)[1].items()}


def test_a_truncated_file_is_refused(good):
    """Also with a new checksum, but for the last bytes: the mark that ends the stream, after the body is complete."""
    for length in [*range(0, 60), *range(60, len(good), 7), len(good) - 1]:
        with pytest.raises(ArtifactError):
            decode_artifact(good[:length])
        if length < len(good) - 8:
            with pytest.raises(ArtifactError):
                decode_artifact(sealed(good[:max(length - 32, 0)]))


def test_every_single_flipped_bit_is_noticed(good):
    for position in range(0, 8 * len(good), 5):
        damaged = bytearray(good)
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(ArtifactError):
            decode_artifact(bytes(damaged))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" + bytes(500), b"\x80\x02}q\x00." * 50, bytes(1000),
                                     sealed(b"PGOLF\x00\x00\x02" + bytes(100)), sealed(b"")])
def test_foreign_files_are_refused(content):
    refused(content)


def test_a_wrong_checksum_is_refused(good):
    refused(good[:-32] + bytes(32))


def test_appended_bytes_are_refused(good):
    refused(good + b"x")


DEEP = b"[" * 100_000
HOSTILE_HEADERS = {
    "not JSON": b"\xff\xfe", "empty": b"", "a list": b"[1,2,3]", "a number": b"7", "null": b"null", "deep": DEEP,
    "deep objects": b'{"a":' * 100_000, "no codec": b'{"body_bytes":5,"index_bytes":2}', "no sizes": b'{"codec":"lzma"}'}
HOSTILE_HEADER_VALUES = {
    "body of 2^62": dict(body_bytes=2**62), "body just over the most": dict(body_bytes=train_gpt.ARTIFACT_MOST_BYTES + 1),
    "negative body": dict(body_bytes=-1), "negative index": dict(index_bytes=-1), "index beyond body": dict(index_bytes=10**6),
    "null": dict(body_bytes=None), "a list": dict(index_bytes=[1]), "text": dict(body_bytes="many"), "NaN": dict(body_bytes=math.nan),
    "infinity": dict(body_bytes=math.inf), "minus infinity": dict(index_bytes=-math.inf), "codec unknown": dict(codec="pickle"),
    "codec a list": dict(codec=["lzma"]), "codec null": dict(codec=None), "1e400": dict(index_bytes=10**400),
    "body one short": dict(body_bytes=20), "zstd around lzma": dict(codec="zstd")}


@pytest.mark.parametrize("header", HOSTILE_HEADERS.values(), ids=HOSTILE_HEADERS)
def test_hostile_headers_are_refused(good, header):
    _, index, data = taken_apart(good)
    refused(put_together(index, data, header))


@pytest.mark.parametrize("values", HOSTILE_HEADER_VALUES.values(), ids=HOSTILE_HEADER_VALUES)
def test_hostile_header_values_are_refused(good, values):
    _, index, data = taken_apart(good)
    refused(put_together(index, data, values))


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**32 - 1])
def test_a_header_length_that_lies_is_refused(good, length):
    refused(sealed(good[: START - 4] + struct.pack("<I", length) + good[START:-32]))


def tensor(*described):
    return dict(settings={}, widening=1.0, tensors=[list(d) for d in described])


HOSTILE_INDICES = {
    "a list": [], "a number": 3, "null": None, "text": "tensors", "no tensors": dict(settings={}, widening=1.0),
    "tensors null": dict(settings={}, widening=1.0, tensors=None), "tensors a number": dict(settings={}, widening=1.0, tensors=5),
    "entry too short": tensor(["a", 6]), "entry a number": dict(settings={}, widening=1.0, tensors=[4]),
    "bits 3": tensor(["a", 3, [1, 1]]), "bits 32": tensor(["a", 32, [1, 1]]), "bits -6": tensor(["a", -6, [1, 1]]),
    "bits null": tensor(["a", None, [1, 1]]), "bits infinite": tensor(["a", math.inf, [1, 1]]),
    "negative shape": tensor(["a", 6, [-1, 4]]), "two negatives": tensor(["a", 6, [-2, -2]]), "negative fp16": tensor(["a", 16, [-4]]),
    "codes of one dimension": tensor(["a", 6, [4]]), "codes of three": tensor(["a", 6, [1, 2, 2]]),
    "oversized": tensor(["a", 6, [2**40, 2**40]]), "oversized fp16": tensor(["a", 16, [2**62]]),
    "empty but long": tensor(["a", 16, [2**80, 0]]), "empty codes, long rows": tensor(["a", 6, [0, 2**80]]),
    "shape text": tensor(["a", 6, "xy"]), "shape null": tensor(["a", 6, None]), "shape nested": tensor(["a", 6, [[1], [1]]]),
    "shape infinite": tensor(["a", 16, [math.inf]]), "shape NaN": tensor(["a", 16, [math.nan]]),
    "a name twice": tensor(["a", 16, [0]], ["a", 16, [0]]),
    "settings null": dict(settings=None, widening=1.0, tensors=[]), "settings a number": dict(settings=7, widening=1.0, tensors=[]),
    "settings text": dict(settings="abc", widening=1.0, tensors=[]), "widening null": dict(settings={}, widening=None, tensors=[]),
    "widening a list": dict(settings={}, widening=[], tensors=[]), "widening text": dict(settings={}, widening="wide", tensors=[]),
    "widening 1e400": dict(settings={}, widening=10**400, tensors=[]), "deep": DEEP, "deep objects": b'{"tensors":' * 100_000,
    "not UTF-8": b'{"tensors":"\xff\xff"}', "a number of 5,000 digits": b'{"widening":' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("index", HOSTILE_INDICES.values(), ids=HOSTILE_INDICES)
def test_hostile_indices_are_refused(index):
    refused(put_together(index), 1 << 25)


def test_codes_outside_of_their_bits_are_refused():
    """A code beyond ±7 in a 4-bit tensor was never written by the packer; taken as it is it would wrap around."""
    for code in (15, 200, 255):
        refused(put_together(tensor(["a", 4, [1, 2]]), bytes([7, code]) + bytes(2)))


def test_tensors_must_fill_the_body_exactly(good):
    _, index, data = taken_apart(good)
    refused(put_together(index, data + b"\x00"))
    refused(put_together(index, data[:-1]))
    refused(put_together(dict(index, tensors=index["tensors"][:-1]), data))


def test_a_decompression_bomb_costs_no_memory(good):
    """64 MiB of zeros behind a header that promises little."""
    _, index, data = taken_apart(good)
    index = json.dumps(index).encode()
    small = dict(body_bytes=len(index) + len(data), index_bytes=len(index))
    refused(put_together(index, data + bytes(1 << 26), small), 1 << 22)
    refused(put_together(index, data + bytes(1 << 26), dict(small, body_bytes=1 << 20)), 1 << 23)


def test_an_index_made_of_a_million_lists_is_refused_unread():
    """Parsed JSON takes twenty times its text: an index is small, and one of megabytes must not be parsed at all."""
    index = b'{"settings":{},"widening":1.0,"tensors":[' + b"[]," * (1 << 20) + b"[]]}"
    refused(put_together(index), 4 * len(index) + (1 << 22))


numbers = st.one_of(st.integers(-2**70, 2**70), st.integers(-3, 40), st.floats(), st.booleans(), st.none(), st.text(max_size=3))
junk = st.recursive(numbers, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
                    max_leaves=5)


def decodes_soundly_or_is_refused(content):
    """ArtifactError and nothing else, or tensors that are what the file says they are."""
    tracemalloc.start()
    try:
        _, tensors, widening = decode_artifact(content)
        for t in tensors.values():
            assert tuple(t.weights().shape) == tuple(t.shape) and isinstance(widening, float)
    except ArtifactError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 24


@quick
@given(st.data())
def test_any_mutation_of_header_or_index_is_refused_or_harmless(good, data):
    header, index, body = taken_apart(good)
    target = data.draw(st.sampled_from(["header", "index", "entry", "bits", "shape", "size"]))
    entry = data.draw(st.integers(0, len(index["tensors"]) - 1))
    if target == "header":
        header = {data.draw(st.sampled_from([*header])): data.draw(junk)}
    else:
        header = None
        if target == "index":
            index[data.draw(st.sampled_from([*index]))] = data.draw(junk)
        elif target == "entry":
            index["tensors"][entry] = data.draw(junk)
        elif target == "bits":
            index["tensors"][entry][1] = data.draw(numbers)
        elif target == "shape":
            index["tensors"][entry][2] = data.draw(st.lists(numbers, max_size=3) | junk)
        else:
            shape = index["tensors"][entry][2]
            shape[data.draw(st.integers(0, len(shape) - 1))] = data.draw(numbers)
    decodes_soundly_or_is_refused(put_together(index, body, header))


@quick
@given(st.data())
def test_any_mutation_of_bytes_under_a_right_checksum_is_refused_or_harmless(good, data):
    content = bytearray(good[:-32])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at: at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    decodes_soundly_or_is_refused(sealed(bytes(content)))


@quick
@given(st.data())
def test_any_mutation_of_the_body_is_refused_or_harmless(good, data):
    _, index, body = taken_apart(good)
    index, content = json.dumps(index).encode(), bytearray(json.dumps(index).encode() + body)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(index) + 40))
        content[at: at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    cut = data.draw(st.sampled_from([len(index), len(index) - 1, len(index) + 1]))
    decodes_soundly_or_is_refused(put_together(bytes(content[:cut]), bytes(content[cut:])))


@quick
@given(st.binary(max_size=400))
def test_random_bytes_are_refused(content):
    for whole in (content, sealed(ARTIFACT_MAGIC + content), sealed(ARTIFACT_MAGIC + struct.pack("<I", 4) + b"{}  " + content)):
        with pytest.raises(ArtifactError):
            decode_artifact(whole)


# -- files -----------------------------------------------------------------------------------------------------------

def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "short").write_bytes(b"PGOLF")
    for name in ("absent", "folder", "short"):
        with pytest.raises(ArtifactError, match=str(tmp_path / name)):
            train_gpt.read_artifact(tmp_path / name)


def test_nothing_here_can_execute_a_file():
    """No pickle in any guise: what reads an artifact can only ever make arrays and numbers of it."""
    tree = ast.parse(train_gpt.SCRIPT.read_text(encoding="utf-8"))
    modules = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"} & {
        part for m in modules for part in m.split(".")}
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not {"torch.load", "torch.save", "torch.jit.load", "eval", "exec", "compile", "__import__", "np.load"} & set(calls)
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module")]
    assert not any(isinstance(a, ast.Constant) and "pickle" in str(a.value) for node in imported for a in node.args)
    assert not any(word.arg == "allow_pickle" for node in ast.walk(tree) if isinstance(node, ast.Call) for word in node.keywords)


@pytest.mark.parametrize("problem", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, where, problem):
    path = tmp_path / "model.ptz"
    train_gpt.write_whole(path, b"old")

    def fail(*_):
        raise problem
    monkeypatch.setattr(os, where, fail)
    with pytest.raises(train_gpt.UserError if isinstance(problem, OSError) else type(problem)):
        train_gpt.write_whole(path, b"new content")
    assert [p.name for p in tmp_path.iterdir()] == ["model.ptz"] and path.read_bytes() == b"old"


def test_a_folder_that_cannot_be_made_is_said_in_words(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(train_gpt.UserError, match="file"):
        train_gpt.write_whole(tmp_path / "file" / "model.ptz", b"x")


def test_a_write_replaces_and_makes_folders(tmp_path):
    path = tmp_path / "a" / "b" / "model.ptz"
    for content in (b"one", b"another"):
        train_gpt.write_whole(path, content)
        assert path.read_bytes() == content and [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "transposed", "renamed"])
def test_another_models_artifact_is_refused_and_loads_nothing(model_state, tiny, change):
    s = tiny()
    tensors, name = train_gpt.quantize(model_state, s)(1.0), "cores.1.mlp.up"
    if change == "missing":
        del tensors[name]
    elif change == "extra":
        tensors["cores.9.mlp.up"] = tensors[name]
    elif change == "renamed":
        tensors["cores.1.mlp.pu"] = tensors.pop(name)
    else:
        shape = (4, 32) if change == "shape" else tensors[name].shape[::-1]
        tensors[name] = Quantized(6, torch.zeros(shape, dtype=torch.int8), torch.ones(shape[0]), shape=tuple(shape))
    model = train_gpt.GPT(s)
    with torch.no_grad():
        [p.fill_(7.0) for p in model.parameters()]
    with pytest.raises(ArtifactError, match="cores.*does not hold this model|does not hold this model.*cores"):
        train_gpt.load_quantized(model, tensors, Path("x.ptz"))
    assert all((p == 7).all() for p in model.parameters())
