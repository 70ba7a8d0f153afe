"""The artifact: the coder, round trips, fitting a budget, and what happens to files that are
damaged or made to hurt."""

import json
import math
import os
import random
import re
import struct
import time
import tracemalloc
import warnings
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bench import fuzz
from bench.fuzz import CODECS, START, put_together, sealed, taken_apart
from hypothesis import HealthCheck, given, settings, strategies as st

import train_gpt
from train_gpt import (ARTIFACT_MAGIC, CONTEXTS, RANS_BITS, RANS_STATES, SYMBOLS, Calibration,
                       Quantized, Quantizer, Settings, UserError, decode_artifact, encode_artifact,
                       frequencies, pack, rans_decode, rans_encode)

quick = settings(database=None, max_examples=100, suppress_health_check=list(HealthCheck))


# -- the coder

def counts_of(symbols, contexts):
    counts = np.zeros((CONTEXTS, SYMBOLS), np.int64)
    np.add.at(counts, (contexts, symbols), 1)
    return counts


def slow_rans(symbols, contexts, frequency):
    """rANS as its paper has it: one code at a time, Python integers, a list of states."""
    states, words = [1 << 16] * RANS_STATES, []
    for i in reversed(range(len(symbols))):
        row, symbol = [int(f) for f in frequency[contexts[i]]], int(symbols[i])
        lane, f, start = i % RANS_STATES, row[symbol], sum(row[:symbol])
        if (states[lane] // f << RANS_BITS) + states[lane] % f + start >= 1 << 32:
            words.insert(0, states[lane] & 0xFFFF)
            states[lane] >>= 16
        states[lane] = (states[lane] // f << RANS_BITS) + states[lane] % f + start
    return struct.pack(f"<{RANS_STATES}I{len(words)}H", *states, *words)


LENGTHS = (0, 1, 2, RANS_STATES - 1, RANS_STATES, RANS_STATES + 1, 2 * RANS_STATES, 1500)
DRAWS = {  # what codes may look like, the extremes first
    "constant": lambda rng, n: np.full(n, rng.integers(256)),
    "lowest and highest": lambda rng, n: 255 * rng.integers(0, 2, n),
    "all values": lambda rng, n: rng.integers(0, 256, n), "in turn": lambda rng, n: np.arange(n),
    "mostly one": lambda rng, n: np.where(rng.random(n) < 0.999, 128, rng.integers(0, 256, n)),
    "bell": lambda rng, n: np.clip(np.rint(128 + 20 * rng.standard_normal(n)), 0, 255)}


def some_codes(draw, n, contexts, seed):
    """(codes, contexts, frequencies)."""
    rng = np.random.default_rng(seed)
    symbols = DRAWS[draw](rng, n).astype(np.int64).astype(np.uint8)
    context = rng.integers(CONTEXTS - contexts, CONTEXTS, n).astype(np.uint8)
    return symbols, context, frequencies(counts_of(symbols, context))


@quick
@given(st.sampled_from([*DRAWS]), st.sampled_from(LENGTHS) | st.integers(0, 4000),
       st.integers(1, CONTEXTS), st.integers(0, 99))
def test_any_codes_under_any_contexts_come_back(draw, n, contexts, seed):
    symbols, context, frequency = some_codes(draw, n, contexts, seed)
    data = rans_encode(symbols, context, frequency)
    assert np.array_equal(rans_decode(data, context, frequency), symbols)


@pytest.mark.parametrize("draw", DRAWS)
def test_the_coder_writes_what_a_slow_one_writes(draw):
    for n in LENGTHS:
        codes = some_codes(draw, n, 5, n)
        assert rans_encode(*codes) == slow_rans(*codes), n


@pytest.mark.parametrize("draw", DRAWS)
def test_the_coder_takes_the_entropy_under_its_contexts_and_hardly_more(draw):
    """0.3 % for frequencies in 2¹⁵ths, and four bytes a lane for the states."""
    symbols, context, frequency = some_codes(draw, 200_000, 7, 0)
    counts = counts_of(symbols, context)
    p = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    entropy = -(counts[counts > 0] * np.log2(p[counts > 0])).sum() / 8
    size = len(rans_encode(symbols, context, frequency))
    assert entropy - 4 * RANS_STATES <= size <= 1.003 * entropy + 4 * RANS_STATES


def test_frequencies_sum_to_one_and_leave_nothing_out():
    rng = np.random.default_rng(0)
    often = np.array([0, 1, 2, 3, 127, 128, 129, 2**15, 2**31, 10**6])
    rows = [rng.choice(often, SYMBOLS, p=p) for p in rng.dirichlet(np.ones(len(often)), 40)]
    # the third: each rounds up, and what they take too much, the first must give
    for row in (*rows, [1] * SYMBOLS, [1000] * 253 + [1] * 3, [10**9] + [1] * 255, [0] * SYMBOLS):
        counts = np.zeros((CONTEXTS, SYMBOLS), np.int64)
        counts[3], counts[4, 7] = row, 5
        out = frequencies(counts).astype(np.int64)
        assert (out.sum(1) == 1 << RANS_BITS).all() and (out[counts > 0] >= 1).all()
        occupied = counts.sum(1) > 0
        assert not out[occupied][counts[occupied] == 0].any(), "no room for what does not occur"


def test_rans_refuses_what_it_did_not_write():
    """Cut, extended, overwritten or random: ValueError, and soon."""
    symbols, context, frequency = some_codes("bell", 3000, 9, 1)
    rng, good = np.random.default_rng(0), rans_encode(symbols, context, frequency)
    bad = [good[:n] for n in (*range(0, len(good), 97), len(good) - 1, len(good) - 2)]
    bad += [good + bytes(n) for n in (1, 2, 3, 4, 100)]
    bad += [rng.bytes(n) for n in (0, 1, 100, 2048, 2050, len(good), 10_000)]
    bad += [good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1:]
            for at in range(0, len(good), 61)]
    started = time.perf_counter()
    for data in bad:
        with pytest.raises(ValueError):
            rans_decode(data, context, frequency)
    assert time.perf_counter() - started < 0.05 * len(bad) + 1
    frequency[0, 3] += 1
    for coder, data in ((rans_decode, good), (rans_encode, symbols)):
        with pytest.raises(ValueError, match="sum"):
            coder(data, context, frequency)


def test_rows_and_columns_of_different_spread_take_less_than_their_order_0_entropy():
    """What the contexts are for; where all codes are alike they must not cost much."""
    rng = np.random.default_rng(0)
    for spread, most in ((0.0, 1.005), (0.6, 0.93)):  # by rows alone it would be 0.98
        rows, columns = (np.exp(spread * rng.standard_normal(n)) for n in ((600, 1), (1, 500)))
        block = np.rint(6 * rows * columns * rng.standard_normal((600, 500)))
        block = np.clip(block, -127, 127).astype(np.int8)
        counts = np.unique(block, return_counts=True)[1]
        entropy = -(counts * np.log2(counts / block.size)).sum() / 8
        coded = train_gpt.CODECS["rans"][0](block.ravel().view(np.uint8) ^ 0x80, [block])
        assert len(coded) < most * entropy + 4 * RANS_STATES


# -- round trip

@st.composite
def stored_tensors(draw):
    """{name: Quantized} of random names, shapes and contents; fp16 arrays of any bits, NaN too."""
    tensors, trellis = {}, draw(st.booleans())
    for name in draw(st.lists(st.text(min_size=1, max_size=12), unique=True, max_size=6)):
        bits = draw(st.sampled_from([4, 5, 6, 7, 8, 16]))
        rng = np.random.default_rng(draw(st.integers(0, 2**32)))

        def halves(shape, most):
            values = np.asarray(rng.integers(0, most, shape, dtype=np.uint16)).view(np.float16)
            return torch.from_numpy(values.copy())
        if bits == 16:
            shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
            tensors[name] = Quantized(16, halves(shape, 2**16))
        else:
            shape, limit = (draw(st.integers(0, 40)), draw(st.integers(0, 40))), 2 ** (bits - 1) - 1
            spread = rng.choice([0, 0.3, 1, 10, 100, 1000], (shape[0], 1))
            codes = np.rint(rng.standard_normal(shape) * spread).clip(-limit, limit)
            tensors[name] = Quantized(bits, torch.from_numpy(codes.astype(np.int8)),
                                      *(halves(n, 0x7C00).float() for n in shape), trellis)
    return tensors


def raw(t):
    """A tensor's stored content, bit for bit."""
    arrays = [a for a in (t.codes, t.scales, t.columns) if a is not None]
    return t.bits, t.trellis, *[(a.dtype, a.shape, a.numpy().tobytes()) for a in arrays]


@pytest.mark.parametrize("codec", CODECS)
@settings(quick, max_examples=25)
@given(stored_tensors(), st.text(max_size=20), st.integers(0, 2**31 - 1), st.floats(0, 1))
def test_decode_gives_back_what_encode_was_given(codec, tensors, note, seed, slope):
    """Tensors, note, and all settings but those of the machine and its paths."""
    s = replace(Settings(), seed=seed, leaky_slope=slope, ve_layers="3,4", codec=codec)
    content = encode_artifact(tensors, s, note)
    stored, back, back_note = decode_artifact(content)
    assert {n: raw(t) for n, t in back.items()} == {n: raw(t) for n, t in tensors.items()}
    assert back_note == note and encode_artifact(tensors, s, note) == content
    assert stored == {f.name: getattr(s, f.name) for f in fields(s)
                      if f.name not in train_gpt.NOT_STORED}
    assert not {"out_dir", "run_id", "device", "eval_only", "scores_path"} & stored.keys()


@pytest.fixture
def model_state(tiny):
    """Parameters of the tiny model, random."""
    model = train_gpt.GPT(tiny())
    torch.manual_seed(3)
    return {n: torch.randn_like(p) * 0.1 for n, p in model.named_parameters()}


@pytest.mark.parametrize("fit", ["trellis", "level", "scale"])
def test_a_model_comes_back_as_its_quantized_weights(model_state, tiny, tmp_path, fit):
    s, path = tiny(QUANT_FIT=fit), tmp_path / "m.ptz"
    train_gpt.write_whole(path, pack(model_state, s, 10**6))
    model, expected = train_gpt.GPT(s), Quantizer(model_state, s).at(0.0)
    train_gpt.load_quantized(model, train_gpt.read_artifact(path)[1], path)
    for n, p in model.named_parameters():
        assert torch.equal(p, expected[n].weights()), n


# -- fitting a budget

SMALL = {"tok_emb": (64, 160), "cores.0.attn.q": (160, 160), "cores.0.mlp.up": (160, 96),
         "skip_weights": (2, 96)}


def weights_of(draw, seed=0, rows=0.0, shapes=SMALL):
    """Random weights, standard deviation 0.02, times e^(rows·N) for each row."""
    rng, state = np.random.default_rng(seed), {}
    for name, shape in shapes.items():
        noise = rng.standard_normal(shape) if draw == "gaussian" else rng.standard_t(3, shape)
        wide = noise * np.exp(rows * rng.standard_normal((shape[0],) + (1,) * (len(shape) - 1)))
        state[name] = torch.from_numpy((0.02 * wide).astype(np.float32))
    return state


def finest_and_coarsest(state, s):
    quantizer = Quantizer(state, s)
    return [len(encode_artifact(quantizer.at(x, compensate=False), s)) for x in (0.0, 2.0**24)]


@pytest.mark.parametrize("codec, draw, fit", [
    ("rans", "heavy", "trellis"), ("rans", "gaussian", "level"), ("rans", "heavy", "scale"),
    ("lzma", "heavy", "level"), ("zstd", "gaussian", "scale")])
def test_pack_lands_under_any_budget_or_raises(codec, draw, fit):
    """Weights of any size and spread of rows: no file is larger than its budget. Little is left
    wherever anybody would ship it; where codes are mostly zeros the size has jumps of 1 %. Below
    the coarsest scales it raises, and says how many bytes more would do."""
    rng, s = np.random.default_rng(0), replace(Settings(), codec=codec, quant_fit=fit)
    close = 0.98 if codec == "zstd" else 0.998  # whole Huffman bits: zstd's sizes jump more
    state = {n: w * math.exp(rng.normal(0, 2)) if n != "skip_weights" else w
             for n, w in weights_of(draw, rows=rng.random()).items()}
    (most, least), finest = finest_and_coarsest(state, s), Quantizer(state, s).at(0.0)
    for part in (rng.uniform(0, 0.2), rng.uniform(0.45, 0.95), rng.uniform(0.95, 1.1)):
        budget, lines = int(least + part * (most - least)) + 16, []  # 16: the note's digits
        content = pack(state, s, budget, lines.append)
        assert len(content) <= budget
        assert len(content) >= close * budget or part < 0.45 or part > 1
        _, tensors, note = decode_artifact(content)
        told, level = note.split()[0], float(note.split()[1])
        assert told in (fit, fit.replace("trellis", "level"))  # it yields where bits are few
        assert lines == [f"artifact:{note} takes {len(content)} of {budget} bytes"]
        for name, t in tensors.items():
            if t.bits < 16:
                fine, kept = finest[name].scales, t.scales > 0  # a trellis may drop rows
                expected = fine * max(level, 1.0) if fit == "scale" else fine.clamp_min(level)
                torch.testing.assert_close(t.scales[kept], expected[kept], rtol=2e-3, atol=1e-6)
    for budget in (-50_000, 0, int(rng.uniform(0.1, 0.98) * least)):
        with pytest.raises(UserError, match="ARTIFACT_BUDGET_BYTES") as refusal:
            pack(state, s, budget)
        size, over = map(int, re.search(r"takes (\d+) .* scales, (\d+) more",
                                        str(refusal.value)).groups())
        assert size - over == budget
    assert 0.98 * size < len(pack(state, s, size)) <= size


def test_a_trellis_yields_to_rounding_where_there_are_few_bits():
    """The note says which it is; where there are bits enough the trellis has less error."""
    state, errors = weights_of("gaussian"), {}
    coded = sum(w.numel() for n, w in state.items() if n != "skip_weights")
    for bits in (0.7, 1.2, 3.0):
        for fit in ("level", "trellis"):
            content = pack(state, replace(Settings(), quant_fit=fit), int(bits * coded / 8) + 1200)
            _, tensors, note = decode_artifact(content)
            assert note.split()[0] == ("level" if bits < 1 else fit)
            errors[bits, fit] = sum(float((w - tensors[n].weights()).square().sum())
                                    for n, w in state.items())
    assert errors[0.7, "trellis"] == pytest.approx(errors[0.7, "level"], rel=0.01)
    for bits, most in ((1.2, 0.97), (3.0, 0.85)):
        assert errors[bits, "trellis"] < most * errors[bits, "level"], errors


@pytest.mark.parametrize("fit", ["level", "scale"])
def test_pack_does_not_coarsen_what_fits_as_it_is(fit):
    state, s = weights_of("gaussian"), replace(Settings(), quant_fit=fit)
    finest = encode_artifact(Quantizer(state, s).at(0.0), s, f"{fit} 0")
    assert pack(state, s, len(finest)) == finest
    assert float(decode_artifact(pack(state, s, len(finest) - 1))[2].split()[1]) > 0


def test_a_calibrated_pack_fits_with_the_codes_of_gptq(monkeypatch):
    """Steps are searched with plain rounding, since error compensation takes long; what is
    written is compensated, and fits."""
    rng, state, s = np.random.default_rng(0), weights_of("gaussian"), Settings()
    torch.manual_seed(0)
    inputs = {n: torch.from_numpy(rng.standard_normal((400, w.size(1))).astype(np.float32))
              @ torch.randn(w.size(1), w.size(1)) for n, w in state.items() if "cores" in n}
    calibration = Calibration(
        {n: x.T @ x for n, x in inputs.items()},
        {n: (torch.rand(w.size(0)), torch.rand(w.size(1))) for n, w in state.items()})
    budget = len(pack(state, s, 10**7, calibration=calibration)) // 2
    content = pack(state, s, budget, calibration=calibration)
    assert 0.998 * budget <= len(content) <= budget
    tensors = decode_artifact(content)[1]
    for n, x in inputs.items():
        t = tensors[n]
        rounded = train_gpt.to_codes(state[n] / t.columns, t.scales, t.bits)
        plain = replace(t, codes=rounded, trellis=False)
        error, plain = ((x @ (state[n] - q.weights()).T).norm() for q in (t, plain))
        assert error < 0.8 * plain
    monkeypatch.setattr(train_gpt, "gptq_codes", lambda w, *_: torch.randint(
        -127, 128, w.shape, dtype=torch.int8))  # compensated codes that never fit
    s = replace(s, quant_fit="level")  # a trellis would make zeros of such rows
    assert len(pack(state, s, budget, calibration=calibration)) <= budget


def test_a_level_is_soon_found_where_it_changes_few_codes():
    """An octave saves 400 bytes, not the 125,000 that are presumed of 10⁶ codes."""
    tried = []

    def encoded(level):
        tried.append(level)
        return bytes(1_002_000 - int(400 * math.log2(1 + level * 2.0**20)))
    content, _ = train_gpt.fitted(encoded, 10**6, 10**6, 0.0, 2.0**-3)
    assert 0.999 * 10**6 <= len(content) <= 10**6 and len(tried) < 16


@pytest.mark.parametrize("calibration", [None, Calibration({}, {})], ids=["plain", "calibrated"])
def test_a_model_without_codes_has_nothing_to_coarsen(calibration):
    state = {"skip_weights": torch.ones(4, 100)}
    content = pack(state, Settings(), 10**5, calibration=calibration)
    assert decode_artifact(content)[1]["skip_weights"].codes.shape == (4, 100)
    with pytest.raises(UserError, match="more than"):
        pack(state, Settings(), 100, calibration=calibration)


@pytest.mark.slow
def test_the_full_model_fits_sixteen_million_bytes():
    s = Settings()
    shapes, budget = train_gpt.parameter_shapes(s), 16_000_000 - len(train_gpt.SHIPPED)
    content = pack(weights_of("heavy", shapes=shapes), s, budget)
    assert 0.998 * budget <= len(content) <= budget
    found = decode_artifact(content)[1]
    assert {n: tuple(t.codes.shape) for n, t in found.items()} == shapes


# -- damaged and hostile files

@pytest.fixture(scope="module")
def good():
    """{codec: a small artifact}, all bits present."""
    return fuzz.honest_files()


def refused(content, most_bytes=1 << 24):
    """Is refused with UserError, while no more than `most_bytes` are allocated."""
    tracemalloc.start()
    try:
        with pytest.raises(UserError):
            decode_artifact(content)
        assert tracemalloc.get_traced_memory()[1] < most_bytes
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("codec", CODECS)
def test_a_truncated_or_extended_file_is_refused(good, codec):
    """Also with a new checksum, but for the last bytes of lzma and zstd, which mark the end."""
    content = good[codec]
    for length in [*range(0, 60, 3), *range(60, len(content), 31), len(content) - 1]:
        refused(content[:length])
        if length < len(content) - (0 if codec == "rans" else 8):
            refused(sealed(content[:max(length - 32, 0)]))
    refused(content + b"x")


def test_flipped_bits_other_versions_and_foreign_files_are_refused(good):
    content = good["rans"]
    for foreign in (b"", b"PK\x03\x04" + bytes(500), bytes(1000), sealed(b""),
                    sealed(ARTIFACT_MAGIC[:-1] + b"\x03" + bytes(100))):
        refused(foreign)
    with pytest.raises(UserError, match="not an artifact of this script"):
        decode_artifact(sealed(content[:7] + b"\x01" + content[8:-32]))
    for length in (0, 1, 2**31, 2**32 - 1):  # of the header
        refused(sealed(content[: START - 4] + struct.pack("<I", length) + content[START:-32]))
    for position in range(0, 8 * len(content), 23):
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << position % 8
        refused(bytes(damaged))
    refused(content[:-32] + bytes(32))


DEEP = b"[" * 100_000
HOSTILE_HEADERS = [
    b"\xff\xfe", b"", b"[1,2,3]", b"7", b"null", DEEP, b'{"a":' * 100_000, b'{"codec":"lzma"}',
    b'{"side_bytes":5,"index_bytes":2,"squeezed_bytes":9}', dict(side_bytes=2**62),
    dict(side_bytes=-1), dict(index_bytes=-1), dict(index_bytes=10**6), dict(squeezed_bytes=10**6),
    dict(index_bytes=10**400), dict(squeezed_bytes=-1), dict(side_bytes=None),
    dict(index_bytes=[1]), dict(squeezed_bytes="many"), dict(side_bytes=math.nan),
    dict(index_bytes=-math.inf), dict(codec="pickle"), dict(codec=["lzma"]), dict(codec=None),
    dict(squeezed_bytes=20), dict(side_bytes=50), dict(codec="lzma")]


def test_hostile_headers_are_refused(good):
    _, *parts = taken_apart(good["rans"])
    for header in HOSTILE_HEADERS:
        refused(put_together(*parts, {"codec": "rans", **header} if isinstance(header, dict)
                             else header))


def index_of(*described, **changed):
    return dict(settings={}, note="", distinct=0, trellis=False, tensors=[*described]) | changed


HOSTILE_INDICES = [
    [], 3, None, "tensors", DEEP, b'{"tensors":' * 100_000, b'{"tensors":"\xff\xff"}',
    dict(settings={}, note="", distinct=0), dict(settings={}, distinct=0, tensors=[]),
    *(index_of(["b", 6, [0, 0]], trellis=value) for value in ("false", [0], {}, 2, None, True)),
    dict(settings={}, note="", tensors=[]), b'{"distinct":' + b"9" * 5000 + b"}",
    index_of(tensors=None), index_of(tensors=5), index_of(["a", 6]), index_of(4),
    index_of(["a", 16, [0]], ["a", 16, [0]]),  # a name twice
    *(index_of(["a", bits, [0, 0]]) for bits in (3, 32, -6, None, math.inf)),
    *(index_of(["a", 6, shape]) for shape in (
        [-1, 4], [-2, -2], [0], [0, 0, 0], [2**40, 2**40], [0, 2**80], "xy", None, [[1], [1]])),
    *(index_of(["a", 16, shape]) for shape in ([-4], [2**62], [2**80, 0], [math.nan])),
    *(index_of(settings=value) for value in (None, 7, "abc")),
    *(index_of(distinct=value) for value in (-1, 1, 2**80, None, math.nan, []))]


def test_hostile_indices_are_refused():
    honest = index_of(["a", 16, [0]], ["b", 6, [0, 0]])  # what they differ from
    assert decode_artifact(put_together(honest))[1].keys() == {"a", "b"}
    for index in HOSTILE_INDICES:
        refused(put_together(index), 1 << 25)


def one_tensor(codes, ranks=(0, 0, 0), bits=4):
    """An artifact of one tensor [1, 2] with step and column factors of 1."""
    ranks = np.array(ranks, "<u2").view(np.uint8).reshape(-1, 2).T.tobytes()
    return put_together(index_of(["a", bits, [1, 2]], distinct=1),
                        np.float16(1).tobytes() + ranks,
                        train_gpt.squeeze(bytes(c + 128 for c in codes)))


def test_codes_outside_of_their_bits_and_ranks_beyond_the_steps_are_refused():
    """No packer writes a code beyond ±7 in a 4-bit tensor, nor −128 in one of eight bits."""
    assert decode_artifact(one_tensor([7, -7]))[1]["a"].weights().tolist() == [[7.0, -7.0]]
    for bits, code in ((4, 8), (4, -8), (5, 16), (6, -32), (7, 64), (8, -128)):
        refused(one_tensor([0, code], bits=bits))
    for ranks in ((0, 1, 0), (0, 0, 65535)):
        refused(one_tensor([1, 1], ranks))


@pytest.mark.parametrize("codec", CODECS)
def test_tensors_must_fill_side_and_codes_exactly(good, codec):
    (_, index, side, codes), name = taken_apart(good[codec]), dict(codec=codec)
    decode_artifact(put_together(index, side, codes, name))
    fewer = dict(index, distinct=index["distinct"] - 1), dict(index, tensors=index["tensors"][:-1])
    for parts in ((index, side + b"\x00", codes), (index, side[:-1], codes),
                  *((changed, side, codes) for changed in fewer),
                  (index, side, codes[: len(codes) // 2])):
        refused(put_together(*parts, name))


@pytest.mark.parametrize("codec", CODECS)
def test_a_decompression_bomb_costs_no_memory(good, codec):
    """32 MiB of zeros behind a header that promises little, or that promises them; or as codes."""
    _, index, side, codes = taken_apart(good[codec])
    text, zeros = json.dumps(index).encode(), bytes(1 << 25)
    small = dict(codec=codec, side_bytes=len(text) + len(side), index_bytes=len(text))
    for header in (small, dict(small, side_bytes=1 << 18), dict(codec=codec)):
        refused(put_together(text, side + zeros, codes, header), 1 << 22)
    bomb = train_gpt.CODECS["zstd" if codec == "zstd" else "lzma"][0](zeros, [])
    bomb = struct.pack("<I", len(bomb)) + bomb if codec == "rans" else bomb
    refused(put_together(index, side, bomb, dict(codec=codec)), 1 << 22)


def test_codes_that_cost_no_bits_are_not_taken_without_bound():
    """A symbol of frequency one takes no space: a file of some kilobytes could stand for any
    number of weights."""
    n, shape = torch.ones(5000), (5000, 5000)
    zeros = Quantized(6, torch.zeros(shape, dtype=torch.int8), n, n)
    content = encode_artifact({"a": zeros}, Settings())
    assert len(content) < 1 << 18
    refused(content, 1 << 20)


@pytest.mark.parametrize("sparse", [True, False])
def test_what_pack_makes_can_be_read_however_few_bytes_it_has(sparse):
    """A table of buckets that no token hit costs no bits; nor do most weights in a tiny budget."""
    w = torch.randn(2600, 2600, generator=torch.Generator().manual_seed(0))
    w *= torch.arange(2600)[:, None] % 50 == 0 if sparse else 1
    s = Settings(quant_fit="level", gptq=0)
    content = pack({"cores.0.mlp.up": w}, s, 90_000)
    assert w.numel() > 64 * len(content)
    stored = decode_artifact(content)[1]["cores.0.mlp.up"].weights()
    assert (stored - w).norm() < w.norm()


def test_an_index_made_of_a_million_lists_is_refused_unread():
    """Parsed JSON takes twenty times its text: one of megabytes must not be parsed at all."""
    rng = random.Random(0)
    entries = b"".join(b"[%d]," % rng.getrandbits(40) for _ in range(1 << 17))
    index = b'{"settings":{},"note":"","distinct":0,"tensors":[' + entries + b"[]]}"
    content = put_together(index)
    assert len(index) > train_gpt.MOST_INDEX_BYTES and 30 * len(content) > len(index)
    refused(content, 2 * len(index) + (1 << 20))


def test_mutated_files_are_refused_or_harmless(good, tmp_path):
    """400 here, 100,000 in bench/fuzz.py. Memory stays that of an honest file, but for what an
    index may take."""
    rng, outcomes = random.Random(7), set()
    parts = {codec: taken_apart(content) for codec, content in good.items()}
    tracemalloc.start()
    try:
        most = max(fuzz.measured(content)[2] for content in good.values()) + (1 << 21)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for n in range(400):
                name, content = fuzz.mutated(good, parts, rng)
                result, _, peak = fuzz.measured(content)
                outcomes.add((name, result))
                assert peak < most, f"{name}: {peak} bytes"
                if result == "harmless" and n % 50 == 0:
                    fuzz.read_as_a_run_does(content, tmp_path)
    finally:
        tracemalloc.stop()
    assert {(m.__name__, "refused") for m in fuzz.MUTATIONS} <= outcomes
    assert {(name, "harmless") for name in ("index_fields", "settings_in_the_index", "arrays")
            } <= outcomes


# -- files

@pytest.mark.parametrize("problem", [OSError(28, "No space left on device"), KeyboardInterrupt(),
                                     MemoryError()])
@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, where,
                                                                   problem):
    path = tmp_path / "a" / "b" / "model.ptz"
    for content in (b"one", b"old"):
        train_gpt.write_whole(path, content)
        assert path.read_bytes() == content and [*path.parent.iterdir()] == [path]

    def fail(*_):
        raise problem
    monkeypatch.setattr(os, where, fail)
    with pytest.raises(UserError if isinstance(problem, OSError) else type(problem)):
        train_gpt.write_whole(path, b"new content")
    assert path.read_bytes() == b"old" and [*path.parent.iterdir()] == [path]


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "transposed", "renamed"])
def test_another_models_artifact_is_refused_and_loads_nothing(model_state, tiny, change):
    tensors, name = Quantizer(model_state, tiny()).at(0.0), "cores.1.mlp.up"
    t = tensors.pop(name)
    shape = (4, 32) if change == "shape" else t.codes.shape[::-1]
    other = Quantized(6, torch.zeros(shape, dtype=torch.int8), *map(torch.ones, shape))
    tensors |= {"missing": {}, "extra": {name: t, "cores.9.mlp.up": t}, "shape": {name: other},
                "transposed": {name: other}, "renamed": {"cores.1.mlp.pu": t}}[change]
    model = train_gpt.GPT(tiny())
    with torch.no_grad():
        [p.fill_(7.0) for p in model.parameters()]
    with pytest.raises(UserError, match="does not hold this model: cores"):
        train_gpt.load_quantized(model, tensors, Path("x.ptz"))
    assert all((p == 7).all() for p in model.parameters())
