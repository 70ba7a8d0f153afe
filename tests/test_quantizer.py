"""Codes and steps: errors, the clip search against a loop over rows, odd rows, refusals, widening."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import train_gpt
from train_gpt import from_codes, to_codes

quick = settings(deadline=None, database=None, max_examples=100)
ALL_BITS = (4, 5, 6, 7, 8)
MATRIX = "cores.0.attn.q"  # a name that ATTN_BITS governs
QUANTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)


def gaussian(rows, columns, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32))


def heavy(rows, columns, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_t(3, (rows, columns)).astype(np.float32))


def quantized(tiny, w, widening=1.0, **variables):
    return train_gpt.quantize({MATRIX: w}, tiny(**variables))(widening)[MATRIX]


@pytest.mark.parametrize("bits", ALL_BITS)
@quick
@given(seed=st.integers(0, 10**6), log_size=st.floats(-3, 4), share=st.floats(0.2, 1.2))
def test_error_is_at_most_half_a_step_inside_the_clip(bits, seed, log_size, share):
    w = gaussian(5, 40, seed) * 10**log_size
    limit = 2 ** (bits - 1) - 1
    steps = (w.abs().amax(1) * share / limit).half().float()
    codes = to_codes(w, steps, bits)
    assert codes.dtype == torch.int8 and int(codes.abs().max()) <= limit
    back, clip = from_codes(codes, steps).double(), (steps * limit).double()[:, None]
    error, inside = (back - w.double()).abs(), w.double().abs() <= clip
    assert (error <= 0.5 * (1 + 1e-5) * steps.double()[:, None])[inside].all()
    assert torch.equal(back[~inside], (clip * w.double().sign())[~inside]), "beyond the clip the clip itself is stored"


@pytest.mark.parametrize("bits", ALL_BITS)
def test_codes_survive_another_round(bits):
    w = heavy(6, 200)
    steps = (w.abs().amax(1) / (2 ** (bits - 1) - 1)).half().float()
    codes = to_codes(w, steps, bits)
    assert torch.equal(to_codes(from_codes(codes, steps), steps, bits), codes)


def row_error(row, step, limit):
    """Squared error of a row at a step, in float64."""
    row, step = np.float64(row), np.float64(step)
    return ((row - np.clip(np.rint(row / step), -limit, limit) * step) ** 2).sum() if step else (row**2).sum()


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("draw", [gaussian, heavy])
def test_clip_of_every_row_is_the_best_of_the_quantiles(tiny, bits, draw):
    w, limit = draw(40, 700), 2 ** (bits - 1) - 1
    w *= torch.logspace(-4, 2, 40)[:, None]
    found, better, plain = quantized(tiny, w, ATTN_BITS=bits), 0, quantized(tiny, w, ATTN_BITS=bits, GPTQ_LITE=0)
    for r in range(40):
        magnitude = np.sort(np.abs(w[r].numpy().astype(np.float64)))
        position = [q * (len(magnitude) - 1) for q in QUANTILES]
        clips = [magnitude[int(p)] + (p % 1) * (magnitude[min(int(p) + 1, 699)] - magnitude[int(p)]) for p in position]
        candidates = [np.float16(clip / limit) for clip in clips]
        errors = [row_error(w[r], step, limit) for step in candidates]
        mine, least = row_error(w[r], found.steps[r], limit), candidates[int(np.argmin(errors))]
        # A quantile interpolated in fp32 may round to the fp16 step beside the one found here.
        beside = [np.nextafter(least, np.float16(0)), least, np.nextafter(least, np.float16(np.inf))]
        assert mine <= max(row_error(w[r], step, limit) for step in beside) * (1 + 1e-6), r
        assert mine <= errors[-1] * (1 + 1e-6), f"row {r}: worse than the row's maximum"
        better += mine < errors[-1] * 0.999
        assert plain.steps[r] == np.float16(np.float32(magnitude[-1]) / limit)
    if draw is heavy and bits < 8:
        assert better > 5, "the search must matter on heavy tails"


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("search", [0, 1])
def test_rows_do_not_influence_each_other(tiny, bits, search):
    w = heavy(12, 300) * torch.logspace(-3, 3, 12)[:, None]
    whole = quantized(tiny, w, ATTN_BITS=bits, GPTQ_LITE=search)
    for r in range(12):
        alone = quantized(tiny, w[r: r + 1], ATTN_BITS=bits, GPTQ_LITE=search)
        assert torch.equal(alone.codes[0], whole.codes[r]) and torch.equal(alone.steps[0], whole.steps[r])


@pytest.mark.parametrize("widening", [1.0, 4.0])
def test_zero_rows_stay_zero(tiny, widening):
    w = gaussian(4, 50)
    w[1] = 0
    t = quantized(tiny, w, widening)
    assert (t.codes[1] == 0).all() and (t.weights()[1] == 0).all()
    assert torch.isfinite(t.weights()).all() and (t.weights()[0] != 0).any()


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e-8, 1e-6, 1e-4, 1e4, 1e6, 1e12, 1e30])
def test_huge_and_tiny_rows_give_finite_fp16_steps(tiny, bits, size):
    w = torch.stack((gaussian(1, 64)[0] * size, gaussian(1, 64, 1)[0]))
    t = quantized(tiny, w, ATTN_BITS=bits)
    assert torch.equal(t.steps.half().float(), t.steps) and torch.isfinite(t.steps).all() and (t.steps >= 0).all()
    assert torch.isfinite(t.weights()).all()
    assert (t.weights().abs() <= w.abs().amax(1, keepdim=True) * 1.01 + 2**-24 * (2 ** (bits - 1) - 1)).all()
    assert torch.equal(quantized(tiny, w[1:], ATTN_BITS=bits).weights()[0], t.weights()[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [MATRIX, "tok_emb", "skip_weights"])
def test_a_weight_that_is_not_finite_is_refused_by_name(tiny, name, value):
    w = gaussian(4, 8)
    w[2, 3] = value
    with pytest.raises(train_gpt.UserError, match=name):
        train_gpt.quantize({"cores.1.mlp.up": gaussian(4, 8), name: w}, tiny())


def test_what_fp16_cannot_hold_is_refused_by_name(tiny):
    with pytest.raises(train_gpt.UserError, match="skip_weights"):
        train_gpt.quantize({"skip_weights": torch.full((2, 3), 7e4)}, tiny())


@pytest.mark.parametrize("bits", ALL_BITS)
def test_bits_decide_the_range_of_codes(tiny, bits):
    t = quantized(tiny, heavy(8, 100), ATTN_BITS=bits, GPTQ_LITE=0)
    assert t.bits == bits and int(t.codes.abs().max()) == 2 ** (bits - 1) - 1


def test_sixteen_bits_keep_fp16(tiny):
    w = gaussian(4, 9)
    t = quantized(tiny, w, ATTN_BITS=16)
    assert t.bits == 16 and torch.equal(t.weights(), w.half().float())


def test_each_kind_takes_its_own_bits(tiny):
    s = tiny(ATTN_BITS=4, MLP_BITS=5, EMBED_BITS=7, PROJ_BITS=16)
    state = {n: torch.ones(2, 4) for n in ("cores.0.attn.k", "cores.0.mlp.down", "tok_emb", "bigram.proj", "skip_weights")}
    assert [t.bits for t in train_gpt.quantize(state, s)(1.0).values()] == [4, 5, 7, 16, 16]


@pytest.mark.parametrize("widening", [1.0, 1.37, 2.0, 64.0])
def test_widening_multiplies_the_searched_steps(tiny, widening):
    w = heavy(10, 300)
    at = train_gpt.quantize({MATRIX: w, "skip_weights": w}, tiny())
    fine, wide = at(1.0), at(widening)
    assert torch.equal(wide[MATRIX].steps, (fine[MATRIX].steps * widening).half().float())
    assert torch.equal(wide[MATRIX].codes, to_codes(w, wide[MATRIX].steps, 6))
    assert torch.equal(wide["skip_weights"].half, w.half()), "fp16 tensors have no steps to widen"
    assert (wide[MATRIX].weights() - w).norm() >= (fine[MATRIX].weights() - w).norm() * 0.999


def test_stored_tensors_do_not_alias_the_weights(tiny):
    w = gaussian(3, 8).half().float()
    at = train_gpt.quantize({"skip_weights": w, MATRIX: w}, tiny())
    t = at(1.0)
    before = {n: t[n].weights().clone() for n in t}
    w.zero_()
    assert all(torch.equal(before[n], t[n].weights()) for n in t)


def test_fake_quantization_in_training_is_the_rounding_of_the_file(tiny):
    """What late QAT trains for: the row-maximum clip of the artifact, but for the fp16 rounding of its steps."""
    for bits in ALL_BITS:
        w = gaussian(6, 80)
        stored = quantized(tiny, w, ATTN_BITS=bits, GPTQ_LITE=0)
        faked = train_gpt.fake_quantize(w, bits)
        step = w.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        codes = faked / step
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
        assert (codes.round() != stored.codes).float().mean() < 0.01
