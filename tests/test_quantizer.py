"""Codes and steps: errors, the clip search against a loop over rows, odd rows, refusals, levels, what a calibration says."""

import math
import re
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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


def quantized(tiny, w, level=None, **variables):
    """The matrix at a level; without one, at its finest steps."""
    s = tiny(**variables)
    finest = 0.0 if s.quant_fit == "level" else 1.0
    return train_gpt.Quantizer({MATRIX: w}, s).at(finest if level is None else level)[MATRIX]


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
    found, better, plain = quantized(tiny, w, ATTN_BITS=bits, QUANT_CLIP="row"), 0, quantized(tiny, w, ATTN_BITS=bits)
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
@pytest.mark.parametrize("search", ["max", "row", "std"])
def test_rows_do_not_influence_each_other(tiny, bits, search):
    w = heavy(12, 300) * torch.logspace(-3, 3, 12)[:, None]
    whole = quantized(tiny, w, ATTN_BITS=bits, QUANT_CLIP=search)
    for r in range(12):
        alone = quantized(tiny, w[r: r + 1], ATTN_BITS=bits, QUANT_CLIP=search)
        assert torch.equal(alone.codes[0], whole.codes[r]) and torch.equal(alone.steps[0], whole.steps[r])


@pytest.mark.parametrize("fit, level", [("level", 0.0), ("level", 0.5), ("scale", 1.0), ("scale", 4.0)])
def test_zero_rows_stay_zero(tiny, fit, level):
    w = gaussian(4, 50)
    w[1] = 0
    t = quantized(tiny, w, level, QUANT_FIT=fit)
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
        train_gpt.Quantizer({"cores.1.mlp.up": gaussian(4, 8), name: w}, tiny())


def test_what_fp16_cannot_hold_is_refused_by_name(tiny):
    with pytest.raises(train_gpt.UserError, match="skip_weights"):
        train_gpt.Quantizer({"skip_weights": torch.full((2, 3), 7e4)}, tiny())


@pytest.mark.parametrize("bits", ALL_BITS)
def test_bits_decide_the_range_of_codes(tiny, bits):
    t = quantized(tiny, heavy(8, 100), ATTN_BITS=bits)
    assert t.bits == bits and int(t.codes.abs().max()) == 2 ** (bits - 1) - 1


def test_sixteen_bits_keep_fp16(tiny):
    w = gaussian(4, 9)
    t = quantized(tiny, w, ATTN_BITS=16)
    assert t.bits == 16 and torch.equal(t.weights(), w.half().float())


def test_each_kind_takes_its_own_bits(tiny):
    s = tiny(ATTN_BITS=4, MLP_BITS=5, EMBED_BITS=7, PROJ_BITS=16, BIGRAM_BITS=6)
    names = ("cores.0.attn.k", "cores.0.mlp.down", "tok_emb", "ve.table", "bigram.proj", "cores.1.attn.gate_weight",
             "bigram.table", "skip_weights", "cores.1.attn.gate_bias")
    state = {n: torch.ones(2, 4) for n in names}
    assert [t.bits for t in train_gpt.Quantizer(state, s).at(0.0).values()] == [4, 5, 7, 7, 16, 16, 6, 16, 16]
    assert train_gpt.bits_of("cores.1.attn.gate_weight", tiny(PROJ_BITS=5)) == 5, "gates are stored like the small projections"


@pytest.mark.parametrize("scale", [1.0, 1.37, 2.0, 64.0])
def test_scale_multiplies_the_searched_steps(tiny, scale):
    w = heavy(10, 300)
    at = train_gpt.Quantizer({MATRIX: w, "skip_weights": w}, tiny(QUANT_FIT="scale", ATTN_BITS=6, QUANT_CLIP="row")).at
    fine, wide = at(1.0), at(scale)
    assert torch.equal(wide[MATRIX].steps, (fine[MATRIX].steps * scale).half().float())
    assert torch.equal(wide[MATRIX].codes, to_codes(w, wide[MATRIX].steps, 6))
    assert torch.equal(wide["skip_weights"].half, w.half()), "fp16 tensors have no steps to widen"
    assert (wide[MATRIX].weights() - w).norm() >= (fine[MATRIX].weights() - w).norm() * 0.999


@pytest.mark.parametrize("level", [0.0, 0.003, 0.02, 1.0])
def test_level_raises_the_steps_below_it_and_no_other(tiny, level):
    w = heavy(30, 300) * torch.logspace(-2, 1, 30)[:, None]
    at = train_gpt.Quantizer({MATRIX: w, "skip_weights": w}, tiny()).at
    fine, t = at(0.0)[MATRIX], at(level)[MATRIX]
    common = float(np.float16(level))
    for r in range(30):
        assert float(t.steps[r]) == (float(fine.steps[r]) if float(fine.steps[r]) > level else common)
    assert torch.equal(t.codes, to_codes(w, t.steps, 8)) and torch.equal(t.columns, torch.ones(300))
    assert torch.equal(at(level)["skip_weights"].half, w.half())
    if level == 0.02:
        assert 0 < int((t.steps == common).sum()) < 30, "some rows are raised, some are not"


# -- clips by deviations, and fake quantization

@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("name, setting", [(MATRIX, "ATTN"), ("cores.0.mlp.up", "MLP"), ("tok_emb", "EMBED")])
def test_clip_by_deviations_is_so_many_root_mean_squares(tiny, bits, name, setting):
    w, limit = heavy(9, 200) + 0.3, 2 ** (bits - 1) - 1
    s = tiny(QUANT_CLIP="std", ATTN_BITS=bits, MLP_BITS=bits, EMBED_BITS=bits, **{f"{setting}_CLIP_SIGMAS": 2.5})
    t = train_gpt.Quantizer({name: w}, s).at(0.0)[name]
    for r in range(9):
        clip = 2.5 * math.sqrt(sum(float(x) ** 2 for x in w[r]) / 200)
        assert float(t.steps[r]) == pytest.approx(clip / limit, rel=2**-10)
    assert int(t.codes.abs().max()) == limit, "heavy tails are clipped"


def test_stored_tensors_do_not_alias_the_weights(tiny):
    w = gaussian(3, 8).half().float()
    at = train_gpt.Quantizer({"skip_weights": w, MATRIX: w}, tiny()).at
    t = at(0.0)
    before = {n: t[n].weights().clone() for n in t}
    w.zero_()
    assert all(torch.equal(before[n], t[n].weights()) for n in t)


def test_fake_quantization_in_training_is_the_rounding_of_the_file(tiny):
    """What late QAT trains for for: the row-maximum clip of the artifact, but for the fp16 rounding of its steps."""
    for bits in ALL_BITS:
        w = gaussian(6, 80)
        stored = quantized(tiny, w, ATTN_BITS=bits)
        faked = train_gpt.fake_quantize(w, bits)
        step = w.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        codes = faked / step
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
        assert (codes.round() != stored.codes).float().mean() < 0.01


def test_fake_quantization_rounds_to_six_bits(tiny):
    """The whole model under fake quantization equals the same model with its matrices rounded by hand."""
    s, bits = tiny(), 6
    model, _ = train_gpt.build_model(s, train_gpt.Runtime(s))
    tokens = torch.randint(s.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
        faked = model(tokens[:, :-1], tokens[:, 1:], True)
        exact = model(tokens[:, :-1], tokens[:, 1:])
        for name, p in model.named_parameters():
            if train_gpt.kind_of(name).kind in ("attn", "mlp"):
                step = p.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
                p.copy_((p / step).round() * step)
        torch.testing.assert_close(faked, model(tokens[:, :-1], tokens[:, 1:]), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(faked, exact, rtol=1e-6, atol=1e-6)


# -- what a calibration says

def energies_of(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, generator=generator) + 0.01, torch.rand(columns, generator=generator) + 0.01


def test_equal_energies_give_equal_steps():
    w = gaussian(7, 11)
    for energy in (1e-6, 1.0, 300.0):
        rows, columns = train_gpt.tolerances(w, (torch.full((7,), energy), torch.full((11,), energy)))
        assert (rows == rows[0]).all() and torch.equal(columns, torch.ones(11))
        assert float(rows[0]) == pytest.approx(energy**-0.5, rel=2**0.125 - 1 + 1e-6)  # on a grid of quarter octaves
    rows, columns = train_gpt.tolerances(w, None)
    assert torch.equal(rows, torch.ones(7)) and torch.equal(columns, torch.ones(11))


def test_a_tensor_of_sixteen_times_the_energy_gets_a_quarter_of_the_steps():
    """And of no other: rows and columns keep their proportions."""
    w, (by_row, by_column) = gaussian(20, 30), energies_of(20, 30)
    rows, columns = train_gpt.tolerances(w, (by_row, by_column))
    again, same = train_gpt.tolerances(w, (16 * by_row, 16 * by_column))
    torch.testing.assert_close(again, rows / 4, rtol=1e-6, atol=0)
    assert torch.equal(same, columns)


def test_weights_of_rows_and_columns_fall_with_the_fourth_root_of_their_energy():
    """Written out; the sizes stand on a grid of quarter octaves and the columns' mean is one."""
    w, energies = gaussian(40, 50), energies_of(40, 50, 1)
    for found, energy, mean in zip(train_gpt.tolerances(w, energies), energies, (float(energies[0].mean()), None)):
        plain = [(float(e) / float(energy.mean()) + 1e-3) ** -0.25 for e in energy]
        centre = math.exp(sum(map(math.log, plain)) / len(plain))
        for x, expected in zip(found.tolist(), plain):
            expected = expected / centre / (math.sqrt(mean) if mean else 1)
            assert abs(math.log2(x / expected)) <= 0.125 + 1e-5
            assert 4 * math.log2(x) == pytest.approx(round(4 * math.log2(x)), abs=5e-3)
    assert len(set(found.tolist())) < 20, "few values, which the file holds for next to nothing"


def test_an_energy_of_zero_is_borne():
    """A hashed row that no text met, a matrix that nothing flows through."""
    w = gaussian(4, 5)
    for energies in ((torch.zeros(4), torch.zeros(5)), (torch.tensor([0.0, 1, 2, 0]), torch.tensor([0.0, 0, 3, 1, 1]))):
        rows, columns = train_gpt.tolerances(w, energies)
        assert torch.isfinite(rows).all() and torch.isfinite(columns).all() and (rows > 0).all() and (columns > 0).all()
        calibration = train_gpt.Calibration({}, {MATRIX: energies})
        t = train_gpt.Quantizer({MATRIX: w}, train_gpt.Settings(), calibration).at(2.0**-24)[MATRIX]
        assert torch.isfinite(t.weights()).all() and torch.equal(t.steps.half().float(), t.steps)


def test_a_calibrated_step_is_the_level_times_its_weight(tiny):
    w, energies, level = heavy(30, 60), energies_of(30, 60, 2), 0.01
    s, calibration = tiny(), train_gpt.Calibration({}, {MATRIX: energies})
    rows, columns = train_gpt.tolerances(w, energies)
    t, fine = (train_gpt.Quantizer({MATRIX: w}, s, calibration).at(x)[MATRIX] for x in (level, 0.0))
    assert torch.equal(t.columns, columns) and len(set(columns.tolist())) > 3
    assert torch.equal(t.steps, torch.maximum(fine.steps, level * rows).half().float())
    assert torch.equal(t.codes, to_codes(w / columns, t.steps, 8))
    torch.testing.assert_close(t.weights(), t.codes * t.steps[:, None] * columns)
    scaled = train_gpt.Quantizer({MATRIX: w}, tiny(QUANT_FIT="scale"), calibration).at(1.0)[MATRIX]
    assert torch.equal(scaled.columns, torch.ones(60)), "scale takes nothing but the searched steps"


@pytest.mark.parametrize("act_order", [0, 1])
def test_gptq_with_column_factors_is_gptq_of_the_rescaled_problem(tiny, act_order):
    """Inputs times c and weights divided by c are the same layer: its codes, under Σ (cx)(cx)ᵀ made of explicit inputs."""
    s, w, energies = tiny(GPTQ_ACT_ORDER=act_order), gaussian(24, 40), energies_of(24, 40, 3)
    x = gaussian(300, 40, 1) @ gaussian(40, 40, 2)
    calibration = train_gpt.Calibration({MATRIX: x.T @ x}, {MATRIX: energies})
    t = train_gpt.Quantizer({MATRIX: w}, s, calibration).at(0.1)[MATRIX]
    scaled = x * t.columns
    codes = train_gpt.gptq_codes(w / t.columns, t.steps, t.bits, scaled.T @ scaled, s)
    assert (t.codes != codes).float().mean() < 0.002  # ties at half a step may fall either way
    plain = train_gpt.Quantizer({MATRIX: w}, s, calibration).at(0.1, compensate=False)[MATRIX]
    error, rounded = ((x @ (w - q.weights()).T).norm() for q in (t, plain))
    assert torch.equal(plain.steps, t.steps) and error < 0.8 * rounded


def some_rows(s, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(s.vocab_size, (count, s.train_seq_len + 1), generator=generator, dtype=torch.int32)


def trained_a_little(s):
    """A model whose zero matrices have become something."""
    model, _ = train_gpt.build_model(s, train_gpt.Runtime(s))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model


def test_calibration_is_what_explicit_gradients_and_inputs_say(tiny):
    """Hessians from each matrix' input, found by differentiating its product; energies pass by pass from autograd."""
    s, passes = tiny(TRAIN_SEQ_LEN=16, BIGRAM_VOCAB_SIZE=32), [2, 3, 1]
    rt, model = train_gpt.Runtime(s), trained_a_little(s)
    rows = some_rows(s, sum(passes)).split(passes)
    found = train_gpt.calibrate(model, rows, rt)
    parameters = dict(model.named_parameters())
    assert all(p.grad is None for p in parameters.values())
    quantizable = {n for n in parameters if train_gpt.kind_of(n).bits}
    assert set(found.energies) == quantizable
    assert set(found.hessians) == {n for n in parameters if train_gpt.kind_of(n).calibrated} > {"tok_emb", "cores.0.attn.q"}
    for name in quantizable:
        by_row = by_column = 0
        for part in rows:
            nll = model(part[:, :-1].long(), part[:, 1:].long()).double().sum()
            square = torch.autograd.grad(nll, parameters[name])[0].double() ** 2
            by_row = by_row + torch.stack([row.sum() / len(row) for row in square])
            by_column = by_column + torch.stack([column.sum() / len(column) for column in square.T])
        for mine, expected in zip(found.energies[name], (by_row, by_column)):
            close = (mine.double() - expected).abs() <= 1e-3 * expected + 1e-6 * expected.max()
            assert mine.shape == expected.shape and close.all(), name
    inputs, linear = [], F.linear
    scales = {"cores.0.mlp.down": "blocks.0.mlp_scale", "cores.2.attn.o": "blocks.2.attn_scale"}  # of the outputs
    for name in (*scales, "cores.1.mlp.up", "tok_emb"):
        taken = parameters[name].detach() * (parameters[scales[name]].detach()[:, None] if name in scales else 1)
        try:
            F.linear = lambda x, w: inputs.extend([x] * (w.shape == taken.shape and torch.equal(w, taken))) or linear(x, w)
            with torch.no_grad():
                [model(part[:, :-1].long(), part[:, 1:].long()) for part in rows]
        finally:
            F.linear = linear
        expected = sum(torch.outer(x, x).double() for batch in inputs for x in batch.reshape(-1, batch.size(-1)))
        torch.testing.assert_close(found.hessians[name].double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        inputs.clear()


def test_the_model_writes_rows_of_its_own(tiny):
    """From BOS on, the same for the same seed, and distributed as the model says."""
    s = tiny(TRAIN_SEQ_LEN=12, BIGRAM_VOCAB_SIZE=32)
    model = trained_a_little(s)
    rows = train_gpt.write_rows(model, s, 5, 3)
    assert rows.shape == (5, 13) and (rows[:, 0] == train_gpt.BOS).all()
    assert 0 <= int(rows.min()) and int(rows.max()) < s.vocab_size
    assert torch.equal(rows, train_gpt.write_rows(model, s, 5, 3))
    assert not torch.equal(rows, train_gpt.write_rows(model, s, 5, 4))
    assert len({tuple(r) for r in rows.tolist()}) == 5 and train_gpt.write_rows(model, s, 0, 3).shape[0] == 0
    with torch.no_grad():
        model.tok_emb.mul_(2)  # far from uniform, and not all on one token
        share = model.logits(torch.full((1, 1), train_gpt.BOS))[0, -1].softmax(-1).double()
    n = 4000
    first = train_gpt.write_rows(model, replace(s, train_seq_len=2), n, 0)[:, 1]
    drawn = torch.bincount(first, minlength=s.vocab_size).double()
    likely = share * n >= 5
    chi = float(((drawn - n * share).square() / (n * share))[likely].sum())
    assert likely.sum() > 5 and float(share.max()) > 3 / s.vocab_size
    assert chi < int(likely.sum()) + 5 * math.sqrt(2 * int(likely.sum())), f"χ² {chi} for {int(likely.sum())} tokens"


class CountedRows:
    """A stream whose rows take a given time each to come."""

    def __init__(self, s, seconds=0.0):
        self.s, self.seconds, self.asked = s, seconds, []

    def rows(self, begin, end):
        self.asked.append((begin, end))
        time.sleep(self.seconds)
        return some_rows(self.s, end - begin, begin)


def calibrated(s, stream, step=6, elapsed=0.0):
    """(Calibration, milliseconds, log lines) of a Trainer's calibration."""
    rt, lines = train_gpt.Runtime(s), []
    rt.log = lambda line, **_: lines.append(line)
    model = trained_a_little(s)
    trainer = train_gpt.Trainer(model, model, s, rt, None)
    trainer.step, trainer.elapsed = step, elapsed
    return trainer.calibration(stream), trainer.elapsed - elapsed, lines


def test_calibration_takes_the_rows_that_would_have_come_next(tiny):
    s = tiny(GPTQ_BATCHES=3)
    stream = CountedRows(s)
    calibration, ms, lines = calibrated(s, stream)
    assert stream.asked == [(72, 84), (84, 96), (96, 108)], "twelve rows a step, six steps done"
    assert ms > 0 and lines[0] == "gptq_calibration:start text:train"
    matrices = int(re.fullmatch(r"gptq_calibration:done matrices:(\d+) time:\d+ms", lines[-1])[1])
    assert matrices == len(calibration.hessians) == 3 * 6 + 1 and len(lines) == 2


def test_calibration_ends_before_the_clock_does(tiny):
    """On training text it is inside of the clock: it takes what fits, says so, and what it has seen serves."""
    s = tiny(GPTQ_BATCHES=50, MAX_WALLCLOCK_SECONDS=600)
    stream, started = CountedRows(s, 0.2), time.perf_counter()
    calibration, ms, lines = calibrated(s, stream, elapsed=598_500.0)
    assert 1 < len(stream.asked) < 8 and time.perf_counter() - started < 5 and 500 < ms <= 1500
    assert [line for line in lines if re.fullmatch(r"gptq_calibration:stopped after \d+ passes, MAX_WALLCLOCK_SECONDS=600 is near", line)]
    assert len(calibration.hessians) == 19


def test_calibration_without_a_clock_takes_all_its_batches(tiny):
    s = tiny(GPTQ_BATCHES=4, MAX_WALLCLOCK_SECONDS=0, GPTQ_RESERVE_SECONDS=0.1)
    stream = CountedRows(s, 0.05)
    assert not any("stopped" in line for line in calibrated(s, stream)[2]) and len(stream.asked) == 4


def test_a_calibration_without_time_sees_one_pass(tiny):
    """Training is done and must not be lost for it."""
    s = tiny(MAX_WALLCLOCK_SECONDS=600)
    calibration, _, lines = calibrated(s, CountedRows(s, 0.01), elapsed=600_000.0)
    assert len(calibration.hessians) == 19 and any("stopped after 1 pass" in line for line in lines)


def test_the_reserve_is_what_calibration_took(tiny):
    """Measured before the clock starts; an explicit number of seconds stays as it is."""
    for variables, expected in ((dict(GPTQ_RESERVE_SECONDS=3), lambda ms: ms == 3000), (dict(), lambda ms: 0 < ms < 60_000),
                                (dict(MAX_WALLCLOCK_SECONDS=0), lambda ms: ms == 0), (dict(GPTQ=0), lambda ms: ms == 0)):
        s = tiny(**{"MAX_WALLCLOCK_SECONDS": 600, **variables})
        rt = train_gpt.Runtime(s)
        rt.log = lambda *_: None
        model = trained_a_little(s)
        trainer = train_gpt.Trainer(model, model, s, rt, None)
        before = [p.detach().clone() for p in model.parameters()]
        trainer.warm_up()
        assert expected(trainer.reserve_ms), variables
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_gptq_across_blocks_of_columns_equals_the_slow_definition(tiny):
    """Column by column by the inverse Hessian of what is left (OBQ in order), float64: 300 columns are three blocks."""
    s, w = tiny(), gaussian(6, 300, 4)
    x = gaussian(900, 300, 5) @ (torch.eye(300) + 0.3 * gaussian(300, 300, 6) / 17)
    hessian = (x.T @ x).double()
    steps = (w.abs().amax(1) / 31).half().float()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(300, dtype=torch.float64)
    left, expected = w.double().clone(), torch.zeros(6, 300)
    inverse = torch.linalg.inv(damped)
    for j in range(300):
        expected[:, j] = (left[:, j].float() / steps).round().clamp(-31, 31)
        error = (left[:, j] - expected[:, j] * steps) / inverse[j, j]
        left -= error[:, None] * inverse[j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    codes = train_gpt.gptq_codes(w, steps, 6, hessian, s)
    assert (codes != expected).float().mean() < 0.005


def test_calibration_on_self_written_text_is_not_training(tiny, monkeypatch):
    s, counts = tiny(GPTQ_TEXT="self", MAX_WALLCLOCK_SECONDS=600), []
    monkeypatch.setattr(train_gpt, "write_rows", lambda _, s, count, seed: counts.append((count, seed)) or some_rows(s, count))
    calibration, ms, lines = calibrated(s, SimpleNamespace(rows=lambda *_: pytest.fail("training tokens were asked for")))
    assert ms == 0.0 and counts == [(64, s.seed)] and len(calibration.hessians) == 19
    assert lines[0] == "gptq_calibration:start text:self" and not any("stopped" in line for line in lines)
