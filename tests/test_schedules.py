"""Learning rate, momentum, the clock, fake quantization and weight averaging."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from torch import nn

import train_gpt
from train_gpt import Settings

PUBLISHED = Settings(warmdown_frac=0.0)  # the warmdown is WARMDOWN_ITERS
quick = settings(deadline=None, database=None, max_examples=100)
paces_ms = st.floats(0.01, 10**5)
caps = st.floats(0.1, 10**5)


@quick
@given(st.integers(1, 10**4), st.integers(0, 10**4), st.integers(1, 10**4))
def test_by_iterations_it_is_the_published_line(total, warmdown, step):
    assume(warmdown <= total and step <= total)
    s = replace(PUBLISHED, lr_floor=0.0, warmdown_iters=warmdown, iterations=total,
                max_wallclock_seconds=0.0)
    expected = min((total - step) / warmdown, 1) if warmdown else 1
    assert train_gpt.lr_scale(s, step, 1.0) == pytest.approx(expected, abs=1e-12)


@quick
@given(caps, st.integers(1, 10**4), st.integers(1, 10**4), paces_ms)
def test_by_the_clock_it_is_the_published_line(cap, warmdown, step, pace):
    """scale = remaining / (warmdown · elapsed/step) once that is below one."""
    s = replace(PUBLISHED, lr_floor=0.0, warmdown_iters=warmdown, iterations=0,
                max_wallclock_seconds=cap)
    elapsed, length = step * pace, warmdown * pace
    assume(length <= 1000 * cap)
    expected = min(max((1000 * cap - elapsed) / length, 0.0), 1.0)
    assert train_gpt.lr_scale(s, step, elapsed) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("by_clock", [False, True])
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_a_warmdown_longer_than_the_run_spans_the_run(by_clock, floor):
    s = replace(PUBLISHED, lr_floor=floor, warmdown_iters=10**6, iterations=0 if by_clock else 200,
                max_wallclock_seconds=20.0 if by_clock else 0.0)  # 200 steps of 100 ms
    for step in range(201):
        assert (train_gpt.lr_scale(s, step, step * 100.0)
                == pytest.approx(floor + (1 - floor) * (1 - step / 200), abs=1e-9))


def test_the_nearer_end_rules():
    s = replace(PUBLISHED, lr_floor=0.0, warmdown_iters=100, iterations=1000,
                max_wallclock_seconds=100.0)
    assert train_gpt.lr_scale(s, 950, 950.0) == pytest.approx(0.5), "1 ms a step: by iterations"
    assert train_gpt.lr_scale(s, 190, 95_000.0) == pytest.approx(0.1), "500 ms: by the clock"


def test_muon_momentum_is_a_line_then_constant():
    s = replace(PUBLISHED, muon_momentum=0.99, muon_momentum_warmup_start=0.92,
                muon_momentum_warmup_steps=1500)
    for step, expected in ((0, 0.92), (750, 0.955), (1500, 0.99), (9000, 0.99)):
        assert train_gpt.muon_momentum(s, step) == pytest.approx(expected, abs=1e-12)
    assert train_gpt.muon_momentum(replace(s, muon_momentum_warmup_steps=0), 0) == 0.99


@quick
@given(caps, st.lists(st.floats(0.001, 0.2), min_size=1, max_size=5), st.floats(0, 0.5))
def test_no_step_is_begun_that_would_pass_the_cap_and_none_is_wasted(cap, first, reserve):
    """Some steps of any length, then each takes the mean of those before: the run takes the most
    that fit beside the reserve, up to rounding of the clock."""
    s, step = replace(PUBLISHED, max_wallclock_seconds=cap * (1 - reserve)), len(first)
    room = 1000 * s.max_wallclock_seconds
    begun = elapsed = 1000 * cap * sum(first)
    while not train_gpt.out_of_time(s, step, elapsed):
        elapsed, step = elapsed + elapsed / step, step + 1
    assert elapsed <= max(room * (1 + 1e-9), begun) and elapsed + elapsed / step > room * (1 - 1e-9)


def test_warmdown_of_a_share_of_the_run():
    s = replace(PUBLISHED, warmdown_frac=0.5, iterations=100, max_wallclock_seconds=10.0,
                lr_floor=0.0)
    assert [train_gpt.lr_scale(s, step, 0.0) for step in (0, 50, 75, 100)] == [1, 1, 0.5, 0]
    assert train_gpt.lr_scale(s, 10, 7500.0) == 0.5, "the nearer end counts"


def test_segments_hold_up_to_their_part_of_the_run():
    s = replace(PUBLISHED, segment_schedule="16:0.1,64:.7", iterations=100,
                max_wallclock_seconds=10.0)
    found = [train_gpt.segment_tokens(s, step, 0.0) for step in range(100)]
    assert found == [16] * 10 + [64] * 60 + [s.train_seq_len] * 30
    assert train_gpt.segment_tokens(s, 10, 7000.0) == s.train_seq_len, "the nearer end counts"


def test_a_slow_step_is_foreseen():
    """After the switch to more passes a step takes longer than the mean so far."""
    s = replace(PUBLISHED, max_wallclock_seconds=10.0)
    assert not train_gpt.out_of_time(s, 9, 9000.0)
    assert train_gpt.out_of_time(s, 9, 9000.0, step_ms=1500.0)
    assert train_gpt.out_of_time(s, 8, 8000.0, steps=3)


# -- averaging -------------------------------------------------------------------------------------

class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5))


def trained(s, steps, scale=lambda step: 1.0):
    """A toy whose weights jump at every step; these [steps, 17] in float64; the average by `s`;
    the steps of first snapshots."""
    torch.manual_seed(0)
    model, history, firsts = Toy(), [], []
    average = train_gpt.WeightAverage(model, s)
    for step in range(1, steps + 1):
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn_like(p) + 0.01 * step)
        history.append(flat(model))
        if average.update(step, scale(step)):
            firsts.append(step)
    return model, np.array(history), average, firsts


def flat(model):
    return np.concatenate([p.detach().double().numpy().ravel() for p in model.parameters()])


def ema_of(history, decay):
    """Σ d^(n−i)·wᵢ / Σ d^(n−i), written out."""
    weights = decay ** np.arange(len(history) - 1, -1, -1.0)
    return (weights[:, None] * history).sum(0) / weights.sum()


@pytest.mark.parametrize("steps, decay", [(1, 0.9), (2, 0.997), (300, 0.997)])
def test_ema_is_the_bias_corrected_weighted_sum(steps, decay):
    model, history, average, _ = trained(replace(PUBLISHED, ema_decay=decay), steps)
    assert average.apply() == "EMA"
    np.testing.assert_allclose(flat(model), ema_of(history, decay), atol=1e-5)


@pytest.mark.parametrize("steps", [1, 30, 300])
def test_without_a_decay_the_ema_reaches_back_over_a_21st_of_the_run(steps):
    """And 0.4 of the last weights. Update n takes 21/(n + 20) of the newest: a mean age of n/22."""
    model, history, average, _ = trained(Settings(), steps)
    expected, weights = np.zeros(history.shape[1]), np.zeros(steps)
    for n, w in enumerate(history, 1):
        fraction = 21 / (n + 20)
        expected = (1 - fraction) * expected + fraction * w
        weights *= 1 - fraction
        weights[n - 1] = fraction
    average.apply()
    np.testing.assert_allclose(flat(model), 0.6 * expected + 0.4 * history[-1], atol=1e-5)
    assert weights.sum() == pytest.approx(1)
    assert (steps == 1
            or (weights * np.arange(steps, 0, -1)).sum() == pytest.approx(steps / 22, abs=1.1))


def late(step):
    return 1.0 if step <= 30 else 0.1


@pytest.mark.parametrize("ema", [0, 1])
def test_the_mean_of_snapshots_is_applied_and_halved_with_the_ema(ema):
    s = replace(PUBLISHED, ema_enabled=ema, ema_decay=0.9, swa_enabled=1, swa_every=7)
    model, history, average, firsts = trained(s, 80, late)
    expected = history[[step - 1 for step in range(31, 81) if step % 7 == 0]].mean(0)
    expected = (ema_of(history, 0.9) + expected) / 2 if ema else expected
    assert firsts == [35] and average.apply() == ("EMA and SWA" if ema else "SWA")
    np.testing.assert_allclose(flat(model), expected, atol=1e-5)


@pytest.mark.parametrize("s", [replace(PUBLISHED, ema_enabled=0),
                               replace(PUBLISHED, ema_enabled=0, swa_enabled=1, swa_every=1000)])
def test_without_an_average_weights_stay_as_trained(s):
    model, history, average, _ = trained(s, 40, late)
    assert average.apply() == ""
    assert (flat(model) == history[-1]).all()
