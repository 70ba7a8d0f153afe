"""The artifact: the coder, round trips, fitting a budget, and what happens to files that are damaged or made to hurt."""

import ast
import json
import lzma
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
from hypothesis import HealthCheck, example, given, settings, strategies as st

import train_gpt
from train_gpt import (ARTIFACT_MAGIC, CONTEXTS, RANS_BITS, RANS_LANES, SYMBOLS, ArtifactError, Quantized, Settings,
                       decode_artifact, decode_codes, encode_artifact, frequencies, rans_decode, rans_encode)

def encode_codes(codec, blocks):
    return train_gpt.CODECS[codec][0](blocks)


quick = settings(deadline=None, database=None, max_examples=100, suppress_health_check=list(HealthCheck))


# -- the coder -------------------------------------------------------------------------------------------------------

def counted(symbols, contexts):
    """Frequencies of symbols under their contexts, counted in a dictionary's way."""
    counts = np.zeros((CONTEXTS, SYMBOLS), np.int64)
    np.add.at(counts, (contexts, symbols), 1)
    return frequencies(counts)


def slow_rans(symbols, contexts, frequency):
    """rANS as its paper has it: one code at a time, Python integers, a list of states; words in reading order."""
    states, words = [1 << 16] * RANS_LANES, []
    for i in reversed(range(len(symbols))):
        row, symbol, lane = [int(f) for f in frequency[contexts[i]]], int(symbols[i]), i % RANS_LANES
        f, start = row[symbol], sum(row[:symbol])
        if (states[lane] // f << RANS_BITS) + states[lane] % f + start >= 1 << 32:
            words.append(states[lane] & 0xFFFF)
            states[lane] >>= 16
        states[lane] = (states[lane] // f << RANS_BITS) + states[lane] % f + start
    return b"".join(struct.pack("<I", x) for x in states) + b"".join(struct.pack("<H", w) for w in reversed(words))


LENGTHS = (0, 1, 2, RANS_LANES - 1, RANS_LANES, RANS_LANES + 1, 2 * RANS_LANES, 1500)
DRAWS = {  # what codes may look like, the extremes first
    "constant": lambda rng, n: np.full(n, rng.integers(256)), "lowest and highest": lambda rng, n: 255 * rng.integers(0, 2, n),
    "all values": lambda rng, n: rng.integers(0, 256, n), "in turn": lambda rng, n: np.arange(n) % 256,
    "mostly one": lambda rng, n: np.where(rng.random(n) < 0.999, 128, rng.integers(0, 256, n)),
    "bell": lambda rng, n: np.clip(np.rint(128 + 20 * rng.standard_normal(n)), 0, 255)}


def some_codes(draw, n, contexts, seed):
    rng = np.random.default_rng(seed)
    return DRAWS[draw](rng, n).astype(np.uint8), rng.integers(CONTEXTS - contexts, CONTEXTS, n).astype(np.uint8)


@quick
@given(st.sampled_from([*DRAWS]), st.sampled_from(LENGTHS) | st.integers(0, 4000), st.integers(1, CONTEXTS), st.integers(0, 99))
def test_any_codes_under_any_contexts_come_back(draw, n, contexts, seed):
    symbols, context = some_codes(draw, n, contexts, seed)
    frequency = counted(symbols, context)
    assert np.array_equal(rans_decode(rans_encode(symbols, context, frequency), context, frequency), symbols)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("draw", DRAWS)
def test_the_coder_writes_what_a_slow_one_writes(draw, n):
    symbols, context = some_codes(draw, n, 5, n)
    frequency = counted(symbols, context)
    assert rans_encode(symbols, context, frequency) == slow_rans(symbols, context, frequency)


@pytest.mark.parametrize("draw", DRAWS)
def test_the_coder_takes_the_entropy_under_its_contexts_and_hardly_more(draw):
    """0.3 % for frequencies in 2¹⁵ths, and four bytes a lane for the states."""
    symbols, context = some_codes(draw, 200_000, 7, 0)
    counts = np.zeros((CONTEXTS, SYMBOLS))
    np.add.at(counts, (context, symbols), 1)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    entropy = -(counts[counts > 0] * np.log2(share[counts > 0])).sum() / 8
    size = len(rans_encode(symbols, context, counted(symbols, context)))
    assert entropy <= size + 4 * RANS_LANES and size <= 1.003 * entropy + 4 * RANS_LANES


@settings(quick, max_examples=40)
@given(st.lists(st.sampled_from([0, 1, 2, 3, 127, 128, 129, 2**15, 2**31]) | st.integers(0, 10**6), min_size=SYMBOLS,
                max_size=SYMBOLS))
@example([1] * SYMBOLS)
@example([1000] * 253 + [1] * 3)  # each share rounds up: what they take too much, the first must give
@example([10**9] + [1] * 255)
def test_frequencies_sum_to_one_and_leave_nothing_out(row):
    counts = np.zeros((CONTEXTS, SYMBOLS), np.int64)
    counts[3], counts[4, 7] = row, 5
    out = frequencies(counts).astype(np.int64)
    assert (out.sum(1) == 1 << RANS_BITS).all() and (out[counts > 0] >= 1).all()
    occupied = counts.sum(1) > 0
    assert not out[occupied][counts[occupied] == 0].any(), "no room for what does not occur"


def test_rans_refuses_what_it_did_not_write():
    """Cut, extended, overwritten or random: ValueError, and soon."""
    symbols, context = some_codes("bell", 3000, 9, 1)
    frequency, rng = counted(symbols, context), np.random.default_rng(0)
    good, started = rans_encode(symbols, context, frequency), time.perf_counter()
    bad = [good[:n] for n in (*range(0, len(good), 97), len(good) - 1, len(good) - 2)]
    bad += [good + bytes(n) for n in (1, 2, 3, 4, 100)] + [rng.bytes(n) for n in (0, 1, 100, 2048, 2050, len(good), 10_000)]
    bad += [good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1:] for at in range(0, len(good), 61)]
    for data in bad:
        with pytest.raises(ValueError):
            rans_decode(data, context, frequency)
    assert time.perf_counter() - started < 0.05 * len(bad) + 1
    for spoilt in (0, 1):  # a row that sums to more or less than one
        wrong = frequency.copy()
        wrong[spoilt, 3] += 1
        for coder in (lambda: rans_decode(good, context, wrong), lambda: rans_encode(symbols, context, wrong)):
            with pytest.raises(ValueError, match="sum"):
                coder()


@st.composite
def code_blocks(draw):
    """Codes of some tensors, int8 [R, C], of every size and spread, empty ones too."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shapes = draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=4))
    spread = [0, 0.3, 1, 10, 100, 1000]
    return [np.clip(np.rint(rng.standard_normal(shape) * rng.choice(spread, shape[:1])[:, None]), -127, 127).astype(np.int8)
            for shape in shapes]


@pytest.mark.parametrize("codec", CODECS)
@quick
@given(code_blocks())
def test_codes_of_tensors_come_back(codec, blocks):
    back = decode_codes(codec, encode_codes(codec, blocks), [b.shape for b in blocks])
    assert len(back) == len(blocks) and all(np.array_equal(a, b) and b.dtype == np.int8 for a, b in zip(blocks, back))


@pytest.mark.parametrize("codec", CODECS)
def test_codes_that_are_damaged_are_refused_or_have_the_right_shapes(codec):
    rng = np.random.default_rng(0)
    blocks = [rng.integers(-31, 32, (20, 30)).astype(np.int8), rng.integers(-3, 4, (7, 5)).astype(np.int8)]
    shapes, good = [b.shape for b in blocks], encode_codes(codec, blocks)
    for n in range(200):
        bad = rng.bytes(n) if n < 50 else good[:rng.integers(len(good))] if n < 100 else bytearray(good)
        if n >= 100:
            bad[rng.integers(len(good))] ^= 1 << rng.integers(8)
        try:
            assert [b.shape for b in decode_codes(codec, bytes(bad), shapes)] == shapes and n >= 50
        except (ValueError, struct.error):
            pass


def test_rows_and_columns_of_different_spread_take_less_than_their_order_0_entropy():
    """What the contexts are for; where all codes are alike they must not cost much."""
    rng = np.random.default_rng(0)
    for spread, most in ((0.0, 1.005), (0.6, 0.93)):  # by rows alone it would be 0.98
        scale = 6 * np.exp(spread * rng.standard_normal((600, 1))) * np.exp(spread * rng.standard_normal((1, 500)))
        block = np.clip(np.rint(scale * rng.standard_normal((600, 500))), -127, 127).astype(np.int8)
        share = np.unique(block, return_counts=True)[1] / block.size
        assert len(encode_codes("rans", [block])) < most * -(share * np.log2(share)).sum() * block.size / 8 + 4 * RANS_LANES


# -- round trip ------------------------------------------------------------------------------------------------------

def some_halves(rng, shape):
    """Finite fp16 values from 0 on, as fp32."""
    return torch.from_numpy(rng.integers(0, 0x7C00, shape, dtype=np.uint16).view(np.float16).astype(np.float32))


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
            codes = torch.from_numpy(rng.integers(-limit, limit + 1, shape).astype(np.int8))
            tensors[name] = Quantized(bits, codes, some_halves(rng, shape[0]), some_halves(rng, shape[1]), shape=shape)
    return tensors


def raw(t):
    """A tensor's stored content, bit for bit."""
    arrays = [t.half.numpy()] if t.bits == 16 else [t.codes.numpy(), t.steps.numpy(), t.columns.numpy()]
    return (t.bits, tuple(t.shape), *[(a.dtype, a.shape, a.tobytes()) for a in arrays])


@pytest.mark.parametrize("codec", CODECS)
@quick
@given(stored_tensors(), st.text(max_size=20), st.integers(0, 2**31 - 1), st.floats(0, 1))
def test_decode_gives_back_what_encode_was_given(codec, tensors, note, seed, slope):
    s = replace(Settings(), seed=seed, leaky_slope=slope, ve_layers="3,4")
    stored, back, back_note = decode_artifact(encode_artifact(tensors, replace(s, codec=codec), note))
    assert {n: raw(t) for n, t in back.items()} == {n: raw(t) for n, t in tensors.items()}
    assert back_note == note
    assert stored == {f.name: getattr(s, f.name) for f in fields(s) if f.name not in train_gpt.TIED_TO_THE_RUN} | dict(codec=codec)


def test_the_header_says_what_lies_where(good):
    content = good["rans"]
    header, index, side, codes = train_gpt.open_artifact(content)
    length, = struct.unpack_from("<I", content, START - 4)
    assert len(content) == START + length + header["squeezed_bytes"] + len(codes) + 32
    assert header["side_bytes"] == header["index_bytes"] + len(side) and header["codec"] == "rans"
    assert content[:8] == b"PGOLF\x00\x00\x02" and set(index) == {"settings", "note", "tensors", "distinct"}


@pytest.fixture
def model_state(tiny):
    """Parameters of the tiny model, random."""
    model = train_gpt.GPT(tiny())
    torch.manual_seed(3)
    return {n: torch.randn_like(p) * 0.1 for n, p in model.named_parameters()}


@pytest.mark.parametrize("codec", CODECS)
def test_encoding_twice_gives_the_same_bytes(model_state, tiny, codec):
    at, s = train_gpt.Quantizer(model_state, tiny()).at, tiny(CODEC=codec)
    assert encode_artifact(at(0.01), s) == encode_artifact(at(0.01), s)


def test_paths_and_devices_of_the_run_stay_out(model_state, tiny, corpus):
    """Nothing of the machine that trained belongs in a submission's model file."""
    stored, *_ = decode_artifact(encode_artifact(train_gpt.Quantizer(model_state, tiny()).at(0.0), tiny()))
    assert not {"out_dir", "run_id", "device", "eval_only", "scores_path"} & stored.keys()


@pytest.mark.parametrize("fit, finest", [("level", 0.0), ("scale", 1.0)])
def test_a_model_comes_back_as_its_quantized_weights(model_state, tiny, tmp_path, fit, finest):
    s, path = tiny(QUANT_FIT=fit), tmp_path / "m.ptz"
    train_gpt.write_whole(path, train_gpt.pack(model_state, s, 10**6))
    model, tensors = train_gpt.GPT(s), train_gpt.read_artifact(path)[1]
    train_gpt.load_quantized(model, tensors, path)
    expected = train_gpt.Quantizer(model_state, s).at(finest)
    for n, p in model.named_parameters():
        assert torch.equal(p, expected[n].weights()), n


def test_a_file_of_zstd_needs_its_package(good, monkeypatch):
    monkeypatch.setattr(train_gpt, "zstandard", lambda: None)
    with pytest.raises(ArtifactError, match="zstd: pip install zstandard"):
        decode_artifact(good["zstd"])
    decode_artifact(good["rans"])


# -- fitting a budget ------------------------------------------------------------------------------------------------

def weights_of(shapes, draw, seed=0, rows=0.0):
    """Random weights for {name: shape}, matrices with standard deviation 0.02, times e^(rows·N) for each row."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal if draw == "gaussian" else lambda shape: rng.standard_t(3, shape)
    return {n: torch.from_numpy((0.02 * noise(shape) * np.exp(rows * rng.standard_normal((shape[0], 1)))).astype(np.float32))
            for n, shape in shapes.items()}


SMALL = {"tok_emb": (64, 160), "cores.0.attn.q": (160, 160), "cores.0.mlp.up": (160, 96), "skip_weights": (2, 96)}


def finest_and_coarsest(state, s, codec):
    at = train_gpt.Quantizer(state, s).at
    return [len(encode_artifact(at(level), replace(s, codec=codec))) for level in ((0.0 if s.quant_fit == "level" else 1.0), 2.0**24)]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("fit", ["level", "scale"])
@pytest.mark.parametrize("draw", ["gaussian", "heavy"])
def test_pack_fits_every_reachable_budget_and_wastes_little(draw, fit, codec):
    """Close to the budget wherever anybody would ship it; where codes are mostly zeros the size itself has jumps of 1 %."""
    s, state = replace(Settings(), codec=codec, quant_fit=fit), weights_of(SMALL, draw)
    most, least = finest_and_coarsest(state, s, codec)
    finest = train_gpt.Quantizer(state, s).at(0.0 if fit == "level" else 1.0)
    assert least < most / 3
    for share in (0.02, 0.5, 0.95):
        budget, lines = int(least + share * (most - least)), []
        content = train_gpt.pack(state, s, budget, lines.append)
        assert len(content) <= budget
        close = 0.98 if codec == "zstd" else 0.998  # whole Huffman bits: zstd's sizes jump more
        assert len(content) >= close * budget or share < 0.3, f"{len(content)} bytes for {budget}"
        _, tensors, note = decode_artifact(content)
        level = float(note.removeprefix(fit))
        said = re.fullmatch(rf"artifact:{fit} 2\^(\S+) fits {len(content)} of {budget} bytes", lines[-1])
        assert float(said[1]) == pytest.approx(math.log2(level), abs=2e-4)
        for name, t in tensors.items():
            if t.bits < 16:
                expected = finest[name].steps * level if fit == "scale" else finest[name].steps.clamp_min(level)
                torch.testing.assert_close(t.steps, expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("seed", range(10))
def test_level_lands_just_under_the_budget_whatever_the_weights(seed):
    """Ten draws of other size, other spread of rows, other tails and other budgets: at most 0.2 % is left."""
    rng = np.random.default_rng(seed)
    state = weights_of(SMALL, ("gaussian", "heavy")[seed % 2], seed, rows=0.15 * seed)
    state = {n: w * math.exp(rng.normal(0, 2)) if w.ndim == 2 and n != "skip_weights" else w for n, w in state.items()}
    s = replace(Settings(), codec="rans")
    most, least = finest_and_coarsest(state, s, "rans")
    budget = int(least + rng.uniform(0.45, 0.95) * (most - least))
    assert 0.998 * budget <= len(train_gpt.pack(state, s, budget)) <= budget


@pytest.mark.parametrize("fit", ["level", "scale"])
@pytest.mark.parametrize("draw", ["gaussian", "heavy"])
def test_a_higher_level_never_makes_a_larger_file(draw, fit):
    state, s = weights_of(SMALL, draw, rows=0.5), replace(Settings(), quant_fit=fit)
    at = train_gpt.Quantizer(state, s).at
    levels = [0.0, *(2.0**octave for octave in range(-14, 0))] if fit == "level" else [2.0**octave for octave in range(0, 12)]
    sizes = [len(encode_artifact(at(level), s)) for level in levels]
    assert all(b <= a + 0.003 * sizes[0] for a, b in zip(sizes, sizes[1:])) and sizes[-1] < 0.4 * sizes[0], sizes


def test_level_errs_less_than_scale_in_as_many_bytes():
    """One step for all is what least squared error asks for; steps in proportion to the row waste bits on small rows."""
    state, errors = weights_of(SMALL, "gaussian", rows=1.0), {}
    budget = int(0.55 * finest_and_coarsest(state, replace(Settings(), quant_fit="scale"), "rans")[0])
    for fit in ("level", "scale"):
        tensors = decode_artifact(train_gpt.pack(state, replace(Settings(), quant_fit=fit, codec="rans"), budget))[1]
        errors[fit] = sum(float((w - tensors[n].weights()).square().sum()) for n, w in state.items())
    assert errors["level"] < 0.7 * errors["scale"], errors


@pytest.mark.parametrize("fit", ["level", "scale"])
def test_pack_does_not_coarsen_what_fits_as_it_is(fit):
    state, s = weights_of(SMALL, "gaussian"), replace(Settings(), codec="rans", quant_fit=fit)
    level = 0.0 if fit == "level" else 1.0
    finest = encode_artifact(train_gpt.Quantizer(state, s).at(level), s, f"{fit} {level:.6g}")
    assert train_gpt.pack(state, s, len(finest)) == finest
    assert float(decode_artifact(train_gpt.pack(state, s, len(finest) - 1))[2].split()[1]) > level


def test_a_calibrated_pack_fits_with_the_codes_of_gptq():
    """Steps are searched with plain rounding, since error compensation takes long; what is written is compensated, and fits."""
    rng, lines = np.random.default_rng(0), []
    state, s = weights_of(SMALL, "gaussian"), replace(Settings(), codec="rans")
    inputs = {n: torch.from_numpy(rng.standard_normal((400, w.size(1))).astype(np.float32)) @ torch.randn(w.size(1), w.size(1))
              for n, w in state.items() if n.startswith("cores")}
    calibration = train_gpt.Calibration({n: x.T @ x for n, x in inputs.items()},
                                        {n: (torch.rand(w.size(0)), torch.rand(w.size(1))) for n, w in state.items()})
    budget = int(0.7 * len(train_gpt.pack(state, s, 10**7, calibration=calibration)))
    content = train_gpt.pack(state, s, budget, lines.append, calibration)
    assert 0.998 * budget <= len(content) <= budget
    tensors = decode_artifact(content)[1]
    for n, x in inputs.items():
        rounded = train_gpt.to_codes(state[n] / tensors[n].columns, tensors[n].steps, tensors[n].bits)
        plain = (x @ (state[n] - train_gpt.from_codes(rounded, tensors[n].steps) * tensors[n].columns).T).norm()
        assert (x @ (state[n] - tensors[n].weights()).T).norm() < 0.8 * plain


@pytest.mark.parametrize("fit", ["level", "scale"])
@pytest.mark.parametrize("budget", [0, -50_000, 1500])
def test_an_unreachable_budget_is_refused_with_the_overshoot(budget, fit):
    state, s = weights_of(SMALL, "gaussian"), replace(Settings(), quant_fit=fit)
    with pytest.raises(train_gpt.UserError) as refusal:
        train_gpt.pack(state, s, budget)
    words = str(refusal.value).split()
    size, over = int(words[words.index("takes") + 1]), int(words[words.index("more") - 1])
    assert size - over == budget and "ARTIFACT_BUDGET_BYTES" in str(refusal.value)
    assert 0.99 * size < len(train_gpt.pack(state, s, size)) <= size, "so many bytes more would do"


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_model_without_codes_has_nothing_to_coarsen(tiny, calibrated):
    state = {"skip_weights": torch.ones(4, 100)}
    assert decode_artifact(train_gpt.pack(state, tiny(), 10**5))[1]["skip_weights"].shape == (4, 100)
    with pytest.raises(train_gpt.UserError, match="more than"):
        train_gpt.pack(state, tiny(), 100, calibration=train_gpt.Calibration({}, {}) if calibrated else None)


@pytest.mark.slow
@pytest.mark.parametrize("draw", ["gaussian", "heavy"])
def test_the_full_model_fits_sixteen_million_bytes(draw):
    s = Settings()
    shapes = train_gpt.parameter_shapes(s)
    count, budget, lines = sum(map(math.prod, shapes.values())), 16_000_000 - len(train_gpt.SHIPPED), []
    rng = np.random.default_rng(0)
    noise = rng.standard_normal if draw == "gaussian" else lambda shape: rng.standard_t(3, shape)
    state = {n: torch.from_numpy(0.02 * noise(shape).astype(np.float32)) for n, shape in shapes.items()}
    started = time.perf_counter()
    content = train_gpt.pack(state, s, budget, lines.append)
    print(f"\n{draw}: {count} weights, {len(content)} of {budget} bytes in {time.perf_counter() - started:.1f} s; {lines}")
    assert 0.998 * budget <= len(content) <= budget
    assert {n: tuple(t.shape) for n, t in decode_artifact(content)[1].items()} == shapes


# -- damaged and hostile files ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def good():
    """{codec: a small artifact}, all bits present."""
    return fuzz.honest_files()


def refused(content, most_bytes=1 << 24):
    """Is refused with ArtifactError, while no more than `most_bytes` are allocated."""
    tracemalloc.start()
    try:
        with pytest.raises(ArtifactError):
            decode_artifact(content)
        assert tracemalloc.get_traced_memory()[1] < most_bytes
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("codec", CODECS)
def test_a_truncated_file_is_refused(good, codec):
    """Also with a new checksum, but for the last bytes of lzma and zstd: the mark that ends the stream."""
    content = good[codec]
    for length in [*range(0, 60), *range(60, len(content), 7), len(content) - 1]:
        with pytest.raises(ArtifactError):
            decode_artifact(content[:length])
        if length < len(content) - (0 if codec == "rans" else 8):
            with pytest.raises(ArtifactError):
                decode_artifact(sealed(content[:max(length - 32, 0)]))


def test_every_single_flipped_bit_is_noticed(good):
    content = good["rans"]
    for position in range(0, 8 * len(content), 11):
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(ArtifactError):
            decode_artifact(bytes(damaged))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" + bytes(500), b"\x80\x02}q\x00." * 50, bytes(1000), sealed(b""),
                                     *(sealed(b"PGOLF\x00\x00" + bytes([version]) + bytes(100)) for version in (0, 1, 2, 3))])
def test_foreign_files_are_refused(content):
    refused(content)


def test_a_file_of_the_first_version_is_not_mistaken_for_this_one(good):
    content = good["lzma"]
    with pytest.raises(ArtifactError, match="not an artifact of this script"):
        decode_artifact(sealed(content[:7] + b"\x01" + content[8:-32]))


def test_a_wrong_checksum_is_refused(good):
    refused(good["rans"][:-32] + bytes(32))


@pytest.mark.parametrize("codec", CODECS)
def test_appended_bytes_are_refused(good, codec):
    refused(good[codec] + b"x")


DEEP = b"[" * 100_000
HOSTILE_HEADERS = {
    "not JSON": b"\xff\xfe", "empty": b"", "a list": b"[1,2,3]", "a number": b"7", "null": b"null", "deep": DEEP,
    "deep objects": b'{"a":' * 100_000,
    "no codec": b'{"side_bytes":5,"index_bytes":2,"squeezed_bytes":9}', "no sizes": b'{"codec":"lzma"}'}
HOSTILE_HEADER_VALUES = {
    "side of 2^62": dict(side_bytes=2**62), "negative side": dict(side_bytes=-1), "negative index": dict(index_bytes=-1),
    "index beyond side": dict(index_bytes=10**6), "squeezed beyond file": dict(squeezed_bytes=10**6),
    "negative squeezed": dict(squeezed_bytes=-1),
    "null": dict(side_bytes=None), "a list": dict(index_bytes=[1]), "text": dict(squeezed_bytes="many"),
    "NaN": dict(side_bytes=math.nan),
    "infinity": dict(side_bytes=math.inf), "minus infinity": dict(index_bytes=-math.inf), "codec unknown": dict(codec="pickle"),
    "codec a list": dict(codec=["lzma"]), "codec null": dict(codec=None), "1e400": dict(index_bytes=10**400),
    "squeezed one short": dict(squeezed_bytes=20), "side one short": dict(side_bytes=50),
    "lzma around rans": dict(codec="lzma")}


def honest_parts(good, codec="rans"):
    header, index, side, codes = taken_apart(good[codec])
    return index, side, codes, header


@pytest.mark.parametrize("header", HOSTILE_HEADERS.values(), ids=HOSTILE_HEADERS)
def test_hostile_headers_are_refused(good, header):
    index, side, codes, _ = honest_parts(good)
    refused(put_together(index, side, codes, header))


@pytest.mark.parametrize("values", HOSTILE_HEADER_VALUES.values(), ids=HOSTILE_HEADER_VALUES)
def test_hostile_header_values_are_refused(good, values):
    index, side, codes, _ = honest_parts(good)
    decode_artifact(put_together(index, side, codes, dict(codec="rans")))  # what is put together honestly is read
    refused(put_together(index, side, codes, {"codec": "rans", **values}))


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**32 - 1])
def test_a_header_length_that_lies_is_refused(good, length):
    content = good["rans"]
    refused(sealed(content[: START - 4] + struct.pack("<I", length) + content[START:-32]))


def index_of(*described, **changed):
    return {**dict(settings={}, note="", distinct=0, tensors=[list(d) for d in described]), **changed}


HOSTILE_INDICES = {
    "a list": [], "a number": 3, "null": None, "text": "tensors", "no tensors": dict(settings={}, note="", distinct=0),
    "tensors null": index_of(tensors=None), "tensors a number": index_of(tensors=5),
    "entry too short": index_of(["a", 6]), "entry a number": index_of(tensors=[4]),
    "bits 3": index_of(["a", 3, [0, 0]]), "bits 32": index_of(["a", 32, [0, 0]]), "bits -6": index_of(["a", -6, [0, 0]]),
    "bits null": index_of(["a", None, [0, 0]]), "bits infinite": index_of(["a", math.inf, [0, 0]]),
    "negative shape": index_of(["a", 6, [-1, 4]]), "two negatives": index_of(["a", 6, [-2, -2]]),
    "negative fp16": index_of(["a", 16, [-4]]),
    "codes of one dimension": index_of(["a", 6, [0]]), "codes of three": index_of(["a", 6, [0, 0, 0]]),
    "oversized": index_of(["a", 6, [2**40, 2**40]]), "oversized fp16": index_of(["a", 16, [2**62]]),
    "empty but long": index_of(["a", 16, [2**80, 0]]), "empty codes, long rows": index_of(["a", 6, [0, 2**80]]),
    "shape text": index_of(["a", 6, "xy"]), "shape null": index_of(["a", 6, None]),
    "shape nested": index_of(["a", 6, [[1], [1]]]),
    "shape infinite": index_of(["a", 16, [math.inf]]), "shape NaN": index_of(["a", 16, [math.nan]]),
    "a name twice": index_of(["a", 16, [0]], ["a", 16, [0]]),
    "settings null": index_of(settings=None), "settings a number": index_of(settings=7),
    "settings text": index_of(settings="abc"),
    "no note": dict(settings={}, distinct=0, tensors=[]), "no distinct": dict(settings={}, note="", tensors=[]),
    "distinct negative": index_of(distinct=-1), "distinct huge": index_of(distinct=2**80),
    "distinct null": index_of(distinct=None),
    "distinct NaN": index_of(distinct=math.nan), "distinct a list": index_of(distinct=[]),
    "distinct that are not there": index_of(distinct=1),
    "deep": DEEP, "deep objects": b'{"tensors":' * 100_000, "not UTF-8": b'{"tensors":"\xff\xff"}',
    "a number of 5,000 digits": b'{"distinct":' + b"9" * 5000 + b"}",
}


def test_an_index_of_nothing_is_read():
    """What the hostile ones below differ from."""
    assert decode_artifact(put_together(index_of(["a", 16, [0]], ["b", 6, [0, 0]])))[1].keys() == {"a", "b"}


@pytest.mark.parametrize("index", HOSTILE_INDICES.values(), ids=HOSTILE_INDICES)
def test_hostile_indices_are_refused(index):
    refused(put_together(index), 1 << 25)


def one_tensor(codes, ranks=(0, 0, 0), bits=4):
    """An artifact of one tensor [1, 2] with step and column factors of 1."""
    side = train_gpt.planes(np.array([1.0], np.float16).view(np.uint16)) + train_gpt.planes(np.array(ranks))
    return put_together(index_of(["a", bits, [1, 2]], distinct=1), side, train_gpt.squeeze(bytes(c + 128 for c in codes)))


def test_codes_outside_of_their_bits_are_refused():
    """A code beyond ±7 in a 4-bit tensor was never written by the packer; nor is −128 one of eight bits."""
    assert decode_artifact(one_tensor([7, -7]))[1]["a"].weights().tolist() == [[7.0, -7.0]]
    for bits, code in ((4, 8), (4, -8), (5, 16), (6, -32), (7, 64), (8, -128)):
        refused(one_tensor([0, code], bits=bits))


def test_a_rank_beyond_the_distinct_steps_is_refused():
    refused(one_tensor([1, 1], ranks=(0, 1, 0)))
    refused(one_tensor([1, 1], ranks=(0, 0, 65535)))


@pytest.mark.parametrize("codec", CODECS)
def test_tensors_must_fill_side_and_codes_exactly(good, codec):
    index, side, codes, _ = honest_parts(good, codec)
    name = dict(codec=codec)
    decode_artifact(put_together(index, side, codes, name))
    refused(put_together(index, side + b"\x00", codes, name))
    refused(put_together(index, side[:-1], codes, name))
    refused(put_together(dict(index, distinct=index["distinct"] - 1), side, codes, name))
    refused(put_together(dict(index, tensors=index["tensors"][:-1]), side, codes, name))
    refused(put_together(index, side, codes[: len(codes) // 2], name))


def test_a_decompression_bomb_costs_no_memory(good):
    """16 MiB of zeros behind a header that promises little, or that promises them."""
    index, side, codes, _ = honest_parts(good)
    text = json.dumps(index).encode()
    small = dict(codec="rans", side_bytes=len(text) + len(side), index_bytes=len(text))
    refused(put_together(text, side + bytes(1 << 24), codes, small), 1 << 22)
    refused(put_together(text, side + bytes(1 << 24), codes, dict(small, side_bytes=1 << 18)), 1 << 22)
    refused(put_together(text, side + bytes(1 << 24), codes, dict(codec="rans")), 1 << 22)


@pytest.mark.parametrize("codec", CODECS)
def test_codes_and_tables_that_are_bombs_cost_no_memory(good, codec):
    index, side, codes, _ = honest_parts(good, codec)
    bomb = train_gpt.zstd(bytes(1 << 24)) if codec == "zstd" else train_gpt.squeeze(bytes(1 << 24))
    bomb = struct.pack("<I", len(bomb)) + bomb if codec == "rans" else bomb
    refused(put_together(index, side, bomb, dict(codec=codec)), 1 << 23)


def test_codes_that_cost_no_bits_are_not_taken_without_bound():
    """A symbol of frequency one takes no space: a file of some kilobytes could stand for any number of weights."""
    shape = (1200, 1200)
    zeros = Quantized(6, torch.zeros(shape, dtype=torch.int8), torch.ones(1200), torch.ones(1200), shape=shape)
    content = encode_artifact({"a": zeros}, Settings())
    assert train_gpt.MOST_WEIGHTS_PER_BYTE * len(content) < 1200 * 1200
    refused(content, 1 << 20)


def test_an_index_made_of_a_million_lists_is_refused_unread():
    """Parsed JSON takes twenty times its text: an index is small, and one of megabytes must not be parsed at all."""
    rng = random.Random(0)
    entries = b"".join(b"[%d]," % rng.getrandbits(40) for _ in range(1 << 17))
    index = b'{"settings":{},"note":"","distinct":0,"tensors":[' + entries + b"[]]}"
    assert len(index) > train_gpt.INDEX_MOST_BYTES and 30 * len(put_together(index)) > len(index)
    refused(put_together(index), 2 * len(index) + (1 << 20))


def test_mutated_files_are_refused_or_harmless(good, tmp_path):
    """1,500 here, 100,000 in bench/fuzz.py. Memory stays that of an honest file, but for what an index may take."""
    rng, parts, outcomes = random.Random(7), {codec: taken_apart(content) for codec, content in good.items()}, set()
    tracemalloc.start()
    try:
        most = max(fuzz.measured(content)[2] for content in good.values()) + (1 << 21)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for n in range(1500):
                name, content = fuzz.mutated(good, parts, rng)
                result, _, peak = fuzz.measured(content)
                outcomes.add((name, result))
                assert peak < most, f"{name}: {peak} bytes"
                if result == "harmless" and n % 50 == 0:
                    fuzz.read_as_a_run_does(content, tmp_path)
    finally:
        tracemalloc.stop()
    assert {name for name, result in outcomes if result == "refused"} == {m.__name__ for m in fuzz.MUTATIONS}
    assert {"index_fields", "settings_in_the_index", "arrays"} <= {name for name, result in outcomes if result == "harmless"}


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
    """What reads an artifact makes arrays and numbers of it. A run's own checkpoints, which are no submission's, are read with
    weights_only, and only they are."""
    tree = ast.parse(train_gpt.SOURCE.decode())
    calls = [(ast.unparse(node.func), ast.unparse(node)) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert all("weights_only=True" in text for name, text in calls if name == "torch.load")
    assert not {"eval", "exec", "compile", "__import__", "np.load", "torch.jit.load"} & {name for name, _ in calls}
    assert not re.search(r"pickle|marshal|shelve|joblib", ast.unparse(tree))


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
    tensors, name = train_gpt.Quantizer(model_state, s).at(0.0), "cores.1.mlp.up"
    if change == "missing":
        del tensors[name]
    elif change == "extra":
        tensors["cores.9.mlp.up"] = tensors[name]
    elif change == "renamed":
        tensors["cores.1.mlp.pu"] = tensors.pop(name)
    else:
        shape = (4, 32) if change == "shape" else tensors[name].shape[::-1]
        tensors[name] = Quantized(6, torch.zeros(shape, dtype=torch.int8), torch.ones(shape[0]), torch.ones(shape[1]),
                                  shape=tuple(shape))
    model = train_gpt.GPT(s)
    with torch.no_grad():
        [p.fill_(7.0) for p in model.parameters()]
    with pytest.raises(ArtifactError, match="cores.*does not hold this model|does not hold this model.*cores"):
        train_gpt.load_quantized(model, tensors, Path("x.ptz"))
    assert all((p == 7).all() for p in model.parameters())
