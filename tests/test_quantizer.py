"""Codes and steps: errors, the clip search against a loop over rows, odd rows, refusals, levels,
GPTQ against its definition, what a calibration says."""

import math
import re
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import a_model
from hypothesis import given, settings, strategies as st

import train_gpt
from train_gpt import Calibration, Quantizer, to_codes, tolerances

ALL_BITS = (4, 5, 6, 7, 8)
MATRIX = "cores.0.attn.q"  # a name that ATTN_BITS governs
QUANTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)


def limit_of(bits):
    return 2 ** (bits - 1) - 1


def gaussian(rows, columns, seed=0):
    return torch.tensor(np.random.default_rng(seed).standard_normal((rows, columns))).float()


def heavy(rows, columns, seed=0):
    return torch.tensor(np.random.default_rng(seed).standard_t(3, (rows, columns))).float()


def quantized(tiny, w, level=0.0, calibration=None, **variables):
    """The matrix at a level; at its finest scales and rounded by default."""
    s = tiny(**{"QUANT_FIT": "level", **variables})
    return Quantizer({MATRIX: w}, s, calibration).at(level)[MATRIX]


@settings(database=None, max_examples=200)
@given(bits=st.sampled_from(ALL_BITS), seed=st.integers(0, 10**6), log_size=st.floats(-3, 4),
       share=st.floats(0.2, 1.2))
def test_error_is_at_most_half_a_step_inside_the_clip(bits, seed, log_size, share):
    w, limit = gaussian(5, 40, seed) * 10**log_size, limit_of(bits)
    steps = (w.abs().amax(1) * share / limit).half().float()
    codes = to_codes(w, steps, bits)
    assert codes.dtype == torch.int8 and int(codes.abs().max()) <= limit
    back, clip = codes * steps[:, None], (steps * limit).double()[:, None]
    assert torch.equal(to_codes(back, steps, bits), codes)
    back = back.double()
    error, inside = (back - w.double()).abs(), w.double().abs() <= clip
    assert (error <= 0.5 * (1 + 1e-5) * steps.double()[:, None])[inside].all()
    assert torch.equal(back[~inside], (clip * w.double().sign())[~inside]), "beyond it: the clip"


def row_error(row, step, limit):
    """Squared error of a row at a step, in float64."""
    row, step = np.float64(row), np.float64(step)
    codes = np.clip(np.rint(row / step), -limit, limit) if step else 0
    return ((row - codes * step) ** 2).sum()


@pytest.mark.parametrize("draw, bits", [(heavy, 4), (heavy, 6), (gaussian, 8)])
def test_clip_of_every_row_is_the_best_of_the_quantiles(tiny, bits, draw):
    w, limit, better = draw(40, 700) * torch.logspace(-4, 2, 40)[:, None], limit_of(bits), 0
    found = quantized(tiny, w, ATTN_BITS=bits, QUANT_CLIP="row")
    plain = quantized(tiny, w, ATTN_BITS=bits)
    floor = quantized(tiny, w, ATTN_BITS=bits, QUANT_STEP_FLOOR=0.25).scales
    assert torch.equal(floor, plain.scales.clamp_min(0.25 * (bits < 8)))
    for r in range(40):
        magnitude = np.abs(w[r].numpy().astype(np.float64))
        steps = [np.float16(clip / limit) for clip in np.quantile(magnitude, QUANTILES)]
        errors = [row_error(w[r], step, limit) for step in steps]
        mine, best = row_error(w[r], found.scales[r], limit), steps[int(np.argmin(errors))]
        # A quantile interpolated in fp32 may round to the fp16 step beside the one found here.
        beside = [np.nextafter(best, np.float16(0)), best, np.nextafter(best, np.float16(np.inf))]
        assert mine <= max(row_error(w[r], step, limit) for step in beside) * (1 + 1e-6), r
        assert mine <= errors[-1] * (1 + 1e-6), f"row {r}: worse than the row's maximum"
        better += mine < errors[-1] * 0.999
        assert plain.scales[r] == np.float16(np.float32(magnitude.max()) / limit)
    if draw is heavy and bits < 8:
        assert better > 5, "the search must matter on heavy tails"


@pytest.mark.parametrize("search, fit", [("max", "trellis"), ("max", "level"), ("row", "scale"),
                                         ("std", "scale")])
@pytest.mark.parametrize("bits", [4, 8])
def test_huge_tiny_and_zero_rows_give_finite_fp16_steps_and_leave_others_alone(
        tiny, bits, search, fit):
    names = dict(ATTN_BITS=bits, QUANT_CLIP=search, QUANT_FIT=fit)
    for size in (0, 1e-30, 1e-12, 1e-8, 1e-6, 1e-4, 1e4, 1e6, 1e12, 1e30):
        w = torch.stack((gaussian(1, 64)[0] * size, gaussian(1, 64, 1)[0]))
        t, alone = quantized(tiny, w, **names), quantized(tiny, w[1:], **names)
        assert torch.equal(t.scales.half().float(), t.scales)
        assert torch.isfinite(t.scales).all() and (t.scales >= 0).all()
        offset = 0.26 / limit_of(bits) if fit == "trellis" else 0.0
        most = w.abs().amax(1) * (1.01 + offset) + 2**-24 * limit_of(bits)
        assert torch.isfinite(t.weights()).all()
        assert search == "std" or (t.weights().abs().amax(1) <= most).all()
        assert size or not t.codes[0].any(), "zero stays zero"
        assert torch.equal(alone.weights()[0], t.weights()[1]) and t.codes[1].any()


@pytest.mark.parametrize("name, values", [
    (MATRIX, (math.nan, math.inf, -math.inf)), ("tok_emb", (math.nan, math.inf, -math.inf)),
    ("skip_weights", (math.nan, math.inf, -math.inf, 7e4))])  # fp16 ends at 65504
def test_what_cannot_be_stored_is_refused_by_name(tiny, name, values):
    for value in values:
        w = gaussian(4, 8)
        w[2, 3] = value
        with pytest.raises(train_gpt.UserError, match=name):
            Quantizer({"cores.1.mlp.up": gaussian(4, 8), name: w}, tiny())


def test_each_kind_takes_its_own_bits(tiny):
    """They decide the range of codes; 16 bits and kept names are fp16, nothing an alias of w."""
    s = tiny(ATTN_BITS=4, MLP_BITS=5, EMBED_BITS=7, PROJ_BITS=16, BIGRAM_BITS=6,
             FP16_KEEP_NAME_PATTERNS="cores.1.mlp")
    expected = {"cores.0.attn.k": 4, "cores.0.mlp.down": 5, "tok_emb": 7, "ve.table": 7,
                "bigram.proj": 16, "cores.1.attn.gate_weight": 16, "bigram.table": 6,
                "cores.1.mlp.up": 16, "skip_weights": 16, "cores.1.attn.gate_bias": 16}
    w, gate = heavy(8, 100), "cores.1.attn.gate_weight"
    tensors, half = Quantizer({name: w for name in expected}, s).at(0.0), w.half().float()
    assert Quantizer({gate: w}, tiny(PROJ_BITS=5)).at(0.0)[gate].bits == 5, "as the projections"
    w.zero_()
    for name, t in tensors.items():
        assert t.bits == expected[name], name
        assert (torch.equal(t.weights(), half) if t.bits == 16 else
                int(t.codes.abs().max()) == limit_of(t.bits)), name


def energies_of(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(rows, generator=generator) + 0.01,
            torch.rand(columns, generator=generator) + 0.01)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.37, 2.0, 64.0])
def test_scale_multiplies_the_searched_steps(tiny, scale):
    """Those of QUANT_CLIP, all by one number, whatever a calibration says of rows and columns."""
    w, s = heavy(10, 300), tiny(QUANT_FIT="scale", ATTN_BITS=6, QUANT_CLIP="row")
    quantizer = Quantizer({MATRIX: w, "skip_weights": w}, s)
    t, searched = quantizer.at(scale), train_gpt.finest_scales(w, 6, s)
    assert torch.equal(t[MATRIX].scales, (searched * max(scale, 1.0)).half().float())
    assert torch.equal(t[MATRIX].codes, to_codes(w, t[MATRIX].scales, 6))
    assert torch.equal(t["skip_weights"].codes, w.half()), "fp16 has no steps to widen"
    calibration = Calibration({}, {MATRIX: energies_of(10, 300)})
    same = Quantizer({MATRIX: w}, s, calibration).at(scale)[MATRIX]
    assert torch.equal(same.codes, t[MATRIX].codes) and (same.columns == 1).all()


@pytest.mark.parametrize("level", [0.0, 0.003, 0.02, 10.0])
@pytest.mark.parametrize("energies", [None, energies_of(30, 300, 2)], ids=["plain", "calibrated"])
def test_a_step_is_the_level_times_its_tolerance_but_not_below_the_finest(tiny, level, energies):
    w = heavy(30, 300) * torch.logspace(-2, 1, 30)[:, None]
    calibration = Calibration({}, {MATRIX: energies}) if energies else None
    rows, columns = tolerances(*energies) if energies else (torch.ones(30), torch.ones(300))
    s = tiny(QUANT_FIT="level")
    quantizer = Quantizer({MATRIX: w, "skip_weights": w}, s, calibration)
    fine, t = quantizer.at(0.0)[MATRIX], quantizer.at(level)[MATRIX]
    wanted = (level * rows).half().float()
    assert torch.equal(t.columns, columns)
    assert (len(set(columns.tolist())) > 3) == bool(energies)
    assert torch.equal(t.scales, torch.maximum(fine.scales, wanted))
    assert torch.equal(t.codes, to_codes(w / columns, t.scales, 8))
    torch.testing.assert_close(t.weights(), t.codes * t.scales[:, None] * columns)
    assert torch.equal(quantizer.at(level)["skip_weights"].codes, w.half())
    raised = int((wanted > fine.scales).sum())
    assert {0.0: raised == 0, 0.02: 0 < raised < 30, 10.0: raised == 30}.get(level, True), raised


# -- clips by deviations, and fake quantization

@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("name, setting", [(MATRIX, "ATTN"), ("cores.0.mlp.up", "MLP"),
                                           ("tok_emb", "EMBED")])
def test_clip_by_deviations_is_so_many_root_mean_squares(tiny, bits, name, setting):
    w = heavy(9, 200) + 0.3
    s = tiny(QUANT_CLIP="std", ATTN_BITS=bits, MLP_BITS=bits, EMBED_BITS=bits,
             **{f"{setting}_CLIP_SIGMAS": 2.5})
    t = Quantizer({name: w}, s).at(0.0)[name]
    clips = 2.5 * np.sqrt(np.square(w.numpy().astype(np.float64)).mean(1))
    np.testing.assert_allclose(t.scales.numpy(), clips / limit_of(bits), rtol=2**-10)
    assert int(t.codes.abs().max()) == limit_of(bits), "heavy tails are clipped"


def test_rounding_in_training_is_the_rounding_of_the_file(tiny):
    """The finest scales of int6, clipped at a row's maximum."""
    w = gaussian(6, 80)
    assert torch.equal(train_gpt.int6(w), quantized(tiny, w, ATTN_BITS=6).weights())


# -- what a calibration says

def test_tolerances_fall_with_the_fourth_root_of_the_energy_of_row_and_column():
    """Written out, on a grid of quarter octaves; the tensor's mean energy counts by its root:
    sixteen times the energy, a quarter of the steps. Equal energies, equal tolerances."""
    rows, columns = energies_of(40, 50, 1)
    energies = rows, columns * rows.mean() / columns.mean()  # both of one tensor
    found, mean = tolerances(*energies), float(rows.mean())
    for values, energy, of_tensor in zip(found, energies, (mean, 1.0)):
        plain = [(float(e) / float(energy.mean()) + 1e-3) ** -0.25 for e in energy]
        centre = math.exp(sum(map(math.log, plain)) / len(plain)) * math.sqrt(of_tensor)
        for x, expected in zip(values.tolist(), plain):
            assert abs(math.log2(x * centre / expected)) <= 0.125 + 1e-5
            assert 4 * math.log2(x) == pytest.approx(round(4 * math.log2(x)), abs=5e-3)
    assert len(set(found[0].tolist())) < 20, "few values, which cost next to nothing in the file"
    rows, columns = tolerances(*(16 * e for e in energies))
    torch.testing.assert_close(rows, found[0] / 4, rtol=1e-6, atol=0)
    assert torch.equal(columns, found[1])
    for energy in (1e-6, 1.0, 300.0):
        rows, columns = tolerances(torch.full((40,), energy), torch.full((50,), energy))
        assert (rows == rows[0]).all() and (columns == 1).all()
        assert abs(math.log2(float(rows[0]) * energy**0.5)) <= 0.125 + 1e-6


def test_calibration_that_is_not_finite_is_refused(tiny):
    """Before packing, which would end in a traceback on rank 0 while the other ranks wait."""
    s = tiny()
    model = a_model(s, 0.0)
    with torch.no_grad():
        model.cores[0]["mlp"].down[0, 0] = math.inf
    with pytest.raises(train_gpt.UserError, match="not finite; .* lower MATRIX_LR="):
        train_gpt.calibrate(model, [torch.arange(2, 2 + 33)[None]], train_gpt.Runtime(s))


def test_an_energy_of_zero_is_borne():
    """A hashed row that no text met, a matrix that nothing flows through."""
    w = gaussian(4, 5)
    for energies in ((torch.zeros(4), torch.zeros(5)),
                     (torch.tensor([0.0, 1, 2, 0]), torch.tensor([0.0, 0, 3, 1, 1]))):
        for factors in tolerances(*energies):
            assert torch.isfinite(factors).all() and (factors > 0).all()
        calibration = Calibration({}, {MATRIX: energies})
        t = Quantizer({MATRIX: w}, train_gpt.Settings(), calibration).at(2.0**-24)[MATRIX]
        assert torch.isfinite(t.weights()).all() and torch.equal(t.scales.half().float(), t.scales)


def slow_gptq(w, steps, hessian):
    """Column by column by the inverse Hessian of what is left (OBQ in order), float64, 6 bits."""
    damp = 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    inverse, left, codes = torch.linalg.inv(hessian + damp), w.double(), torch.zeros(w.shape)
    for j in range(w.size(1)):
        codes[:, j] = (left[:, j].float() / steps).round().clamp(-31, 31)
        error = (left[:, j] - codes[:, j] * steps) / inverse[j, j]
        left = left - error[:, None] * inverse[j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


@pytest.mark.parametrize("act_order", [0, 1])
def test_gptq_across_blocks_of_columns_equals_the_slow_definition(tiny, act_order):
    """300 columns are five blocks: errors of the first must reach the last, with the right sign;
    an order of the columns is undone in the codes."""
    s, w = tiny(QUANT_FIT="level", GPTQ_ACT_ORDER=act_order), gaussian(6, 300, 4)
    x = gaussian(900, 300, 5) @ (torch.eye(300) + 0.3 * gaussian(300, 300, 6) / 17)
    hessian, steps = (x.T @ x).double(), (w.abs().amax(1) / 31).half().float()
    order = hessian.diagonal().argsort(descending=True) if act_order else torch.arange(300)
    expected = torch.zeros(6, 300)
    expected[:, order] = slow_gptq(w[:, order], steps, hessian[order][:, order])
    codes = train_gpt.gptq_codes(w, steps, 6, *train_gpt.compensation(hessian, s))
    assert (codes != expected).float().mean() < 0.005  # ties at half a step may fall either way


def test_gptq_bears_an_input_that_is_always_zero(tiny):
    w, x = gaussian(24, 40), gaussian(300, 40, 1) @ gaussian(40, 40, 2)
    x[:, 3] = 0
    steps = train_gpt.finest_scales(w, 6, tiny())
    codes = train_gpt.gptq_codes(w, steps, 6, *train_gpt.compensation(x.T @ x, tiny()))
    assert torch.equal(codes[:, 3], to_codes(w, steps, 6)[:, 3])


def test_a_hessian_that_is_not_positive_gets_more_damping(tiny):
    order, factor, _ = train_gpt.compensation(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), tiny())
    assert order.tolist() == [0, 1] and factor[0, 0] == factor[1, 1] == 1 and factor[0, 1] == 0
    assert 0.5 < factor[1, 0] < 1, "2 / (1 + damping), which must exceed 1"


@pytest.mark.parametrize("act_order", [0, 1])
def test_gptq_with_column_factors_is_gptq_of_the_rescaled_problem(tiny, act_order):
    """Inputs times c and weights over c are the same layer: its codes, under Σ (cx)(cx)ᵀ made of
    explicit inputs. What PRUNE_FRAC set to zero stays zero."""
    s = tiny(QUANT_FIT="level", GPTQ_ACT_ORDER=act_order)
    w, energies = gaussian(24, 40), energies_of(24, 40, 3)
    x = gaussian(300, 40, 1) @ gaussian(40, 40, 2)
    calibration = Calibration({MATRIX: x.T @ x}, {MATRIX: energies})
    quantizer = Quantizer({MATRIX: w}, s, calibration)
    t, plain = (quantizer.at(0.1, compensate)[MATRIX] for compensate in (True, False))
    scaled = x * t.columns
    prepared = train_gpt.compensation(scaled.T @ scaled, s)
    codes = train_gpt.gptq_codes(w / t.columns, t.scales, t.bits, *prepared)
    assert (t.codes != codes).float().mean() < 0.002
    error, rounded = ((x @ (w - q.weights()).T).norm() for q in (t, plain))
    assert torch.equal(plain.scales, t.scales) and error < 0.8 * rounded
    pruned, smallest = (quantized(tiny, w, 0.1, calibration, PRUNE_FRAC=0.3),
                        w.abs() <= w.abs().flatten().kthvalue(288).values)
    assert not pruned.codes[smallest].any() and t.codes[smallest].any()
    assert pruned.codes[w.abs() > 0.5].any()


def correlated(columns, seed=0):
    """Inputs [4 × columns, columns] of different size, with correlations."""
    mixed = torch.eye(columns) + gaussian(columns, columns, seed) / columns**0.5
    sizes = 0.5 + gaussian(1, columns, seed + 2).abs()
    return gaussian(4 * columns, columns, seed + 1) @ mixed * sizes


def slow_trellis(w, factor, costs, block=64):
    """Values for one row of weights in units of its scale, path by path. The best path into each
    state of four bits survives; after each block only the best of all."""
    best = {(0, 0, 0, 0): (0.0, [])}
    for j in range(len(w)):
        found = {}
        for bits, (cost, values) in best.items():
            offset = 0.25 if sum(bits[1:]) % 2 else -0.25
            wanted = w[j] + factor[j, :j] @ (w[:j] - np.array(values))
            for bit in (0, 1):
                odd = bit ^ bits[0]
                value = 2 * round((wanted - offset - odd) / 2) + odd + offset
                total, after = cost + costs[j] * (wanted - value) ** 2, (*bits[1:], bit)
                if after not in found or total < found[after][0]:
                    found[after] = total, [*values, value]
        best = found
        if (j + 1) % block == 0:
            best = dict([min(found.items(), key=lambda item: item[1][0])])
    return min(best.values())[1]


def test_codes_of_a_trellis_are_those_of_the_slow_search(tiny):
    """70 columns are two blocks. Their values follow from the codes alone."""
    w, x = 3 * gaussian(5, 70), correlated(70)
    _, factor, costs = prepared = train_gpt.compensation(x.T @ x, tiny())
    codes = train_gpt.gptq_codes(w, torch.full((5,), 0.5), 8, *prepared, trellis=True)
    values = train_gpt.Quantized(8, codes, torch.ones(5), torch.ones(70), trellis=True).weights()
    for row, found, code in zip(w.double().numpy() / 0.5, values, codes):
        u = [0, 0, 0, 0]
        for value, c in zip(found.tolist(), code.tolist()):
            assert value == (1 if sum(u[-3:]) % 2 else -1) * (c + 0.25)
            u.append((c + u[-4]) % 2)
        expected = slow_trellis(row, factor.double().numpy(), costs.double().numpy())
        assert found.tolist() == expected


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("columns", [*range(1, 10), 64, 65, 130])
def test_codes_of_a_trellis_use_their_range_whatever_the_size_of_weights(tiny, bits, columns):
    """Nothing errs by more than 1¼ scales; clipped weights are compared with the clip."""
    size = 10.0 ** torch.arange(-30, 31, 5)
    w = torch.cat((gaussian(13, columns) * size[:, None], torch.zeros(1, columns),
                   limit_of(bits) * gaussian(1, columns, 1).sign()))
    scales = torch.ones(15)
    scales[0] = 0.0
    prepared, limit = train_gpt.compensation(torch.eye(columns), tiny()), limit_of(bits)
    codes = train_gpt.gptq_codes(w, scales, bits, *prepared, trellis=True)
    stored = train_gpt.Quantized(bits, codes, scales, torch.ones(columns), True).weights()
    assert -limit <= int(codes.min()) and int(codes.max()) <= limit
    assert not codes[0].any() and not stored[0].any()
    assert columns < 64 or {-limit, limit} <= set(codes[-1].tolist())
    clipped = w.clamp(-limit, limit)
    assert ((stored - clipped)[1:].abs() <= 1.26).all()


def test_matrices_are_coded_the_same_by_any_number_of_threads(tiny):
    state = {f"cores.{i}.attn.{kind}": gaussian(40, 70, 3 * i) for i in range(3) for kind in "qk"}
    quantizer = Quantizer(state, tiny())
    one, threads = quantizer.at(0.3), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        three = quantizer.at(0.3)
        assert torch.get_num_threads() == 3, "the threads of the main thread stay"
    finally:
        torch.set_num_threads(threads)
    assert [*one] == [*three] == [*state]
    assert all(torch.equal(one[name].codes, three[name].codes) for name in state)


def test_rows_that_a_trellis_would_spoil_are_zeros(tiny):
    """A trellis has no zeros: rows of zeros stay so, and so do rows far below their scale."""
    w = torch.cat((gaussian(1, 64), 0.01 * gaussian(2, 64), torch.zeros(1, 64)))
    w[1, 5] = 9.0  # worth its scale
    stored = Quantizer({MATRIX: w}, tiny()).at(1.0)[MATRIX]
    assert stored.trellis and stored.weights()[0].any() and stored.weights()[1, 5] > 8
    assert not stored.weights()[2:].any() and not stored.codes[2:].any()


def some_rows(s, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = count, s.train_seq_len + 1
    return torch.randint(s.vocab_size, shape, generator=generator, dtype=torch.int32)


def calibrated_names(model):
    return {n for n, _ in model.named_parameters() if train_gpt.kind_of(n).calibrated}


def test_calibration_is_what_explicit_gradients_and_inputs_say(tiny):
    """Energies pass by pass from autograd; Hessians from the inputs of each matrix' product."""
    s, passes = tiny(TRAIN_SEQ_LEN=16, BIGRAM_VOCAB_SIZE=32, LATE_PASSES="0-2,1-2"), [2, 3, 1]
    model = a_model(s, 0.05)
    rows = some_rows(s, sum(passes)).split(passes)
    found = train_gpt.calibrate(model, rows, train_gpt.Runtime(s))
    parameters = dict(model.named_parameters())
    assert all(p.grad is None for p in parameters.values())
    assert set(found.energies) == {n for n in parameters if train_gpt.kind_of(n).bits}
    assert set(found.hessians) == calibrated_names(model) > {"tok_emb", "cores.0.attn.q"}
    for name, energies in found.energies.items():
        squares = []
        for part in rows:
            nll = model(part[:, :-1].long(), part[:, 1:].long()).double().sum()
            squares.append(torch.autograd.grad(nll, parameters[name])[0].double() ** 2)
        for mine, axis in zip(energies, (1, 0)):
            expected = sum(square.mean(axis) for square in squares)
            close = (mine.double() - expected).abs() <= 1e-3 * expected + 1e-6 * expected.max()
            assert mine.shape == expected.shape and close.all(), name
    scales = {"cores.0.mlp.down": "blocks.0.mlp_scale", "cores.2.attn.o": "blocks.2.attn_scale"}
    for name in (*scales, "cores.1.mlp.up", "tok_emb"):
        taken = parameters[name].detach()
        if name in scales:  # the scale of a block's output multiplies the rows of its matrix
            taken = taken * parameters[scales[name]].detach()[:, None]
        x = inputs_of(model, taken, rows).double()
        expected = x.T @ x
        torch.testing.assert_close(found.hessians[name].double(), expected, rtol=1e-4,
                                   atol=1e-5 * float(expected.abs().max()))


def inputs_of(model, matrix, rows):
    """What the model multiplies by this matrix, [n, C]."""
    inputs, linear = [], F.linear

    def watched(x, w):
        inputs.extend([x.flatten(0, -2)] * (w.shape == matrix.shape and torch.equal(w, matrix)))
        return linear(x, w)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "linear", watched)
        for part in rows:
            model(part[:, :-1].long(), part[:, 1:].long())
    return torch.cat(inputs)


# -- calibration and the clock

class SlowRows:
    """A stream whose rows take a given time each to come."""

    def __init__(self, s, seconds=0.0):
        self.s, self.seconds, self.asked = s, seconds, []

    def rows(self, begin, end):
        self.asked.append((begin, end))
        time.sleep(self.seconds)
        return some_rows(self.s, end - begin, begin)


def a_trainer(s, lines):
    rt, model = train_gpt.Runtime(s), a_model(s, 0.05)
    rt.log = lambda line, **_: lines.append(line)
    return train_gpt.Trainer(model, model, s, rt, None)


def calibrated(s, stream, elapsed=0.0):
    """(milliseconds, log lines) of a calibration after six steps, which knows every matrix."""
    lines = []
    trainer = a_trainer(s, lines)
    trainer.elapsed = elapsed
    batches = train_gpt.batches_of(stream, trainer.rt, trainer.rows_per_step, 6)
    assert set(trainer.calibration(batches).hessians) == calibrated_names(trainer.model)
    batches.close()
    return trainer.elapsed - elapsed, lines


def test_calibration_takes_the_rows_that_would_have_come_next(tiny):
    """All of them, where there is no clock."""
    s = tiny(GPTQ_BATCHES=3, MAX_WALLCLOCK_SECONDS=0)
    stream = SlowRows(s, 0.05)
    ms, lines = calibrated(s, stream)
    steps = [(72, 84), (84, 96), (96, 108)]
    assert stream.asked[:3] == steps, "twelve rows a step, six steps done"
    assert ms > 0 and len(lines) == 2 and lines[0] == "gptq_calibration:start"
    assert re.fullmatch(r"gptq_calibration:done matrices:\d+ time:\d+ms", lines[1])


def test_calibration_ends_before_the_clock_does(tiny):
    """On training text it takes what fits, one pass at least, and says so."""
    s = tiny(GPTQ_BATCHES=50, MAX_WALLCLOCK_SECONDS=600)
    stream = SlowRows(s, 0.2)
    ms, lines = calibrated(s, stream, elapsed=598_500.0)
    assert 1 < len(stream.asked) < 12 and 500 < ms <= 1500
    assert lines[1] == "gptq_calibration:stopped early, MAX_WALLCLOCK_SECONDS=600 is near"
    _, lines = calibrated(s, SlowRows(s), elapsed=600_000.0)
    assert "stopped early" in lines[1], "training is done and must not be lost for it"
    one = tiny(GPTQ_BATCHES=1, MAX_WALLCLOCK_SECONDS=600, TRAIN_BATCH_TOKENS=128)
    _, lines = calibrated(one, SlowRows(one), elapsed=601_000.0)
    assert len(lines) == 2 and "done" in lines[1], "nothing was left out"


@pytest.mark.parametrize("variables, least, most", [
    ({}, 1e-6, 60), (dict(MAX_WALLCLOCK_SECONDS=0), 0, 0), (dict(GPTQ=0), 0, 0)])
def test_the_reserve_is_measured_before_the_clock_starts(tiny, variables, least, most):
    """At most a tenth of the clock. The schedules end where it begins."""
    trainer = a_trainer(tiny(**{"MAX_WALLCLOCK_SECONDS": 600, **variables}), [])
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.warm_up()
    kept = trainer.s.max_wallclock_seconds - trainer.scheduled.max_wallclock_seconds
    assert least <= kept <= most
    assert all(torch.equal(p, q) for p, q in zip(trainer.model.parameters(), before))


def test_what_comes_once_in_a_calibration_is_reserved_once_and_gets_its_time(tiny, monkeypatch):
    """Half a second, such as sums over ranks, and a tenth for each micro-batch."""
    def slow(model, parts, rt, calibrate=train_gpt.calibrate):
        found = calibrate(model, (time.sleep(0.1) or part for part in parts), rt)
        time.sleep(0.5)
        return found
    monkeypatch.setattr(train_gpt, "calibrate", slow)
    s, lines = tiny(GPTQ_BATCHES=50, MAX_WALLCLOCK_SECONDS=600), []
    trainer = a_trainer(s, lines)
    trainer.warm_up()
    kept = trainer.s.max_wallclock_seconds - trainer.scheduled.max_wallclock_seconds
    parts = 50 * (trainer.rows_per_step // trainer.calibration_rows)
    assert 1.25 * 0.1 * parts < kept < min(60, 1.25 * 0.5 * parts), "a tenth of the clock is 60"
    trainer.elapsed = 598_500.0
    batches = train_gpt.batches_of(SlowRows(s), trainer.rt, trainer.rows_per_step)
    trainer.calibration(batches)
    batches.close()
    assert "stopped early" in lines[-2] and 599_200 < trainer.elapsed <= 600_100


@pytest.mark.parametrize("share, lists", [(0, {True}), (0.5, {False, True})])
def test_the_passes_that_will_run_are_warmed_up_and_no_others(tiny, share, lists):
    s, seen = tiny(LATE_PASSES="auto", LATE_PASSES_FROM=share, WARMUP_STEPS=2), []
    trainer = a_trainer(s, [])

    def forward(x, y, late, segment):
        seen.append(late)
        return trainer.model(x, y, late=late, segment=segment)
    trainer.forward = forward
    trainer.warm_up()
    assert set(seen) == lists


@pytest.mark.parametrize("variables, kept", [
    (dict(ATTN_BITS=16), r"cores\.\d+\.mlp\.(up|down)"),
    (dict(UNIQUE_LAYERS=1), r"cores\.\d+\.(attn\.[qkvo]|mlp\.(up|down))")])
def test_a_step_of_qat_moves_exact_weights_by_gradients_of_rounded_ones(tiny, variables, kept):
    """Rounded are the matrices that are stored in codes."""
    s = tiny(MICRO_BATCH_TOKENS=64, GRAD_CLIP_NORM=0, **variables)
    trainer = a_trainer(s, [])
    named, rows = dict(trainer.model.named_parameters()), some_rows(s, trainer.rows_per_step)
    exact = {name: p.detach().clone() for name, p in named.items()}
    for name, p in named.items():
        if re.fullmatch(kept, name):
            p.data.copy_(train_gpt.int6(p.data))
    trainer.model(rows[:, :-1].long(), rows[:, 1:].long()).mean().backward()
    wanted = {name: p.grad.clone() for name, p in named.items()}
    for name, p in named.items():
        p.grad = None
        p.data.copy_(exact[name])
    taken = {}
    trainer.optimizers.step = lambda scale, momentum: taken.update(
        (name, (p.grad.clone(), p.detach().clone())) for name, p in named.items())
    trainer.optimize(rows, 1.0, 0.9, rounded=True)
    for name, (grad, weights) in taken.items():
        assert torch.equal(weights, exact[name]), f"{name} is not the exact one"
        torch.testing.assert_close(grad, wanted[name], rtol=1e-4, atol=1e-7)
