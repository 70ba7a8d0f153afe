"""Windows, chunks, the ledger, evaluation and test-time training: against slow references, and
against cheats."""

import math
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import train_gpt
from conftest import environment, on_ranks
from test_optimizers import by_svd
from train_gpt import LedgerError, ScoreLedger, window_plan

# -- plans ----------------------------------------------------------------------------------------

@st.composite
def plans(draw):
    """(targets, length, stride) with targets ≥ length ≥ stride."""
    length = draw(st.integers(1, 60))
    return draw(st.integers(length, 700)), length, draw(st.integers(1, length))


def chunks_of(targets, length, stride, chunk_tokens):
    """The ranges of windows that a Scorer scores between two adaptations."""
    s, tokens = train_gpt.Settings(device="cpu"), np.zeros(targets + 1, np.uint16)
    rt = train_gpt.Runtime(s)
    return train_gpt.Scorer(print, tokens, (length, stride, 0), s, rt, chunk_tokens).chunks


@settings(max_examples=100)
@given(plans(), st.integers(1, 300))
def test_every_target_is_in_one_window_and_every_window_in_one_chunk(plan, chunk):
    targets, length, stride = plan
    times = np.zeros(targets, int)
    starts, firsts, lasts = window_plan(*plan)
    for start, first, last in zip(starts.tolist(), firsts.tolist(), lasts.tolist()):
        assert 0 <= start <= first < last <= start + length <= targets
        assert first - start >= min(first, length - stride), "enough context before what is scored"
        times[first:last] += 1
    assert (times == 1).all() and (np.diff(firsts) > 0).all()
    assert len(starts) == math.ceil(targets / stride)
    chunks = chunks_of(*plan, chunk)
    assert [w for begin, end in chunks for w in range(begin, end)] == list(range(len(firsts)))
    stretches = [{int(f) // chunk for f in firsts[begin:end]} for begin, end in chunks]
    assert all(len(s) == 1 for s in stretches) and len(set.union(*stretches)) == len(chunks)


@settings(max_examples=100)
@given(plans(), st.integers(1, 40))
def test_every_target_is_in_one_pass_of_its_stream_and_streams_go_from_left_to_right(plan, streams):
    targets, length, stride = plan
    start, first, last = (x.reshape(-1, streams) for x in window_plan(*plan, streams))
    assert (start >= 0).all() and (start <= first).all() and (start + length <= targets).all()
    assert ((first <= last) & (last - start <= length) & (last - first <= stride)).all()
    assert (first[1:] == last[:-1]).all() and (first[0, 1:] == last[-1, :-1]).all()
    assert first[0, 0] == 0 and last[-1, -1] == targets and first[0].tolist() == sorted(first[0])
    sizes = last[-1] - first[0]
    assert sizes.max() - sizes.min() <= 1, "a stream shorter than a pass could not be trained on"
    assert len(first) == -(-int(sizes.max()) // stride), "and no pass more than needed"


class Onlooker:
    """Stands for a TTT: keeps what it is given and does act(ledger, first, last)."""

    def __init__(self, act=lambda ledger, first, last: None, chunk_tokens=96):
        self.act, self.given, self.chunk_tokens = act, [], chunk_tokens

    def scorer_options(self, targets):
        return dict(chunk_tokens=self.chunk_tokens)

    def begin(self, scorer):
        assert not self.given, "before the first score"

    def adapt(self, ledger, span, chunk, chunks, left):
        first, last = span
        assert last == ledger.scored
        self.given.append((first, last, chunk, chunks))
        self.act(ledger, first, last)
        return 1


@settings(max_examples=50)
@given(st.integers(1, 700), st.integers(1, 90), st.integers(0, 90), st.integers(0, 200),
       st.integers(1, 9), st.booleans())
def test_every_target_gets_its_own_score_and_all_but_the_last_chunk_are_trained_on(
        targets, segment, prefix, chunk, batch, banded):
    """Tokens are their own numbers and a score is the number of its target."""
    s = replace(train_gpt.Settings(), device="cpu", eval_seq_len=30, eval_batch_seqs=batch,
                eval_wallclock_seconds=0.0, eval_match=0)
    rt, onlooker = train_gpt.Runtime(s), Onlooker(chunk_tokens=segment + chunk)
    rt.log = lambda line: None

    def model(x, y, band=0, at_BN=None):
        asked = x if at_BN is None else x.gather(1, at_BN)
        assert band == 30 * banded and torch.equal(asked + 1, y)
        assert y.size(1) == min(segment, targets), "no position is asked in vain"
        return y.float()
    tokens, plan = np.arange(targets + 1, dtype=np.uint16), (prefix + segment, segment, 30 * banded)
    table = SimpleNamespace(count=len, source="")
    result, book = train_gpt.evaluate(model, tokens, table, s, rt, "test", plan, onlooker)
    assert (book.nll == tokens[1:]).all()
    length = min(prefix + segment, targets)
    firsts = window_plan(targets, length, segment)[1]
    count = len({int(first) // (segment + chunk) for first in firsts})
    ends = [last for _, last, *_ in onlooker.given]
    assert [first for first, *_ in onlooker.given] == [0, *ends[:-1]][:len(ends)]
    assert all(end < targets for end in ends)
    assert [c[2:] for c in onlooker.given] == [(i, count) for i in range(count - 1)]
    assert result["tokens_read"] == length * math.ceil(targets / segment)


# -- the ledger -----------------------------------------------------------------------------------

def ledger(scored, targets=20):
    book = ScoreLedger(np.arange(targets + 1, dtype=np.uint16))
    book.record(np.arange(scored), np.ones(scored, np.float32))
    return book


@pytest.mark.parametrize("scored, targets, nll, says", [
    (8, range(4), [1] * 4, "each once"), (8, range(7, 11), [1] * 4, "each once"),
    (8, [9, 9], [1, 1], "each once"), (8, [10, 9], [1, 1], "each once"),
    (8, range(8, 21), [1] * 13, "targets 8 to 20 of a text with 20"), (20, [20], [1], "with 20"),
    (8, range(-4, 0), [1] * 4, "with 20"), (8, range(-4, 4), [1] * 8, "with 20"),
    (8, [8, 9], [1], "1 scores for 2 targets"), (8, [8], [1, 1], "2 scores for 1 targets"),
    *((5, range(5, 10), [1, 1, 1, bad, 1], "target 8 ")
      for bad in (math.nan, math.inf, -math.inf))])
def test_scores_that_break_a_rule_are_refused(scored, targets, nll, says):
    book = ledger(scored)
    with pytest.raises(LedgerError, match=says):
        book.record(np.array(targets), np.array(nll, np.float32))
    assert book.scored == scored and np.isnan(book.nll[scored:]).all()


def test_an_incomplete_ledger_has_no_result(tiny):
    book, table = ledger(0), train_gpt.ByteTable(tiny())
    for n in (0, 12, 7):
        book.record(book.scored + np.arange(n), np.ones(n, np.float32))
        with pytest.raises(LedgerError):
            book.result(table)
    book.record(np.array([19]), np.ones(1, np.float32))
    assert book.result(table)["val_loss"] == 1


@pytest.mark.parametrize("first, length", [  # a negative index would count from the end
    ([0, 3, 6], 3), ([8], 1), ([4, 8], 4), ([-12, -4], 4), ([-1, 2], 3), ([3, -9], 4), ([17], 4)])
def test_rows_are_refused_before_they_are_scored(first, length):
    with pytest.raises(LedgerError):
        ledger(8).rows_for_adapting(np.array(first), length)


def test_the_token_before_a_row_must_be_scored_too():
    book = ledger(8)
    book.record(np.arange(12, 20), np.ones(8, np.float32))
    assert len(book.rows_for_adapting(np.array([0, 13]), 4)) == 2
    with pytest.raises(LedgerError, match="12 to 16"):
        book.rows_for_adapting(np.array([12]), 4)


@settings(max_examples=100)
@given(st.data(), st.integers(0, 40), st.integers(1, 12))
def test_rows_hold_the_targets_asked_for_and_the_token_before(data, scored, length):
    starts = st.lists(st.integers(0, scored - length)) if length <= scored else st.just([])
    first = data.draw(starts)
    rows = ledger(scored, 40).rows_for_adapting(np.array(first, np.int64), length)
    assert tuple(rows.shape) == (len(first), length + 1)
    assert rows.tolist() == [list(range(a, a + length + 1)) for a in first]  # token i is number i


# -- the loop -------------------------------------------------------------------------------------

def world(tiny, rt=None, **variables):
    """Settings, one rank, a model with random weights, the validation tokens and their byte table;
    windows and the model's own scores unless named."""
    s = tiny(**{"EVAL_ATTENTION": "window", "EVAL_MATCH": 0, **variables})
    rt = rt or train_gpt.Runtime(s)
    model, _ = train_gpt.build_model(s, rt)
    torch.manual_seed(11)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.15 * torch.randn_like(p))
    return SimpleNamespace(s=s, rt=rt, model=model, tokens=train_gpt.load_validation(s),
                           byte_table=train_gpt.ByteTable(s))


def run(w, tokens=None, ttt=None, shape=None):
    shape = shape or (w.s.ttt_shape if ttt else w.s.scoring_shape)
    return train_gpt.evaluate(w.model, w.tokens if tokens is None else tokens, w.byte_table, w.s,
                              w.rt, "test", shape, ttt)


def adapting(w):
    return train_gpt.chosen_ttt(w.model, w.model, w.s, w.rt)


def weights(w):
    """{name: value} of what the model computes with."""
    return {n: p.detach().clone() for n, p in w.model.named_parameters()}


def changed(w, before):
    return {n for n, p in w.model.named_parameters() if not torch.equal(p, before[n])}


class Clock:
    """The script's clock, which stands still unless a test moves it."""

    def __init__(self):
        self.now = 0.0

    def __enter__(self):
        self.real = train_gpt.time
        train_gpt.time = SimpleNamespace(perf_counter=lambda: self.now)
        return self

    def __exit__(self, *_):
        train_gpt.time = self.real


def slow_ttt(w, clock=SimpleNamespace(now=0.0), seconds=lambda n: 0.0, late=()):
    """A real one whose step n takes seconds(n) by this clock, and which is told in the chunks
    `late` that time is over. `taken` steps, those of each chunk in `epochs`."""
    ttt = adapting(w)
    ttt.taken, ttt.epochs, backward, adapt = 0, [], ttt._backward, ttt.adapt

    def slow(*rows):
        backward(*rows)
        clock.now += seconds(ttt.taken)
        ttt.taken += 1

    def counted(ledger, span, chunk, chunks, left):
        before = ttt.taken
        adapt(ledger, span, chunk, chunks, -100.0 if chunk in late else left)
        ttt.epochs.append(ttt.taken - before)
    ttt._backward, ttt.adapt = slow, counted
    return ttt


def scorer_of(w, ttt):
    """The Scorer of an evaluation with this TTT."""
    return train_gpt.Scorer(w.model, w.tokens, w.s.ttt_shape, w.s, w.rt,
                            **ttt.scorer_options(len(w.tokens) - 1))


def windows_of(begin, end, length, stride):
    """[(start, targets that count)] for the targets from begin to end: each window ends `stride`
    after the one before, the last one at the end; it reads `length` tokens, at the beginning of the
    text those that are there."""
    spans = [list(range(first, min(first + stride, end))) for first in range(begin, end, stride)]
    return [(max(span[-1] + 1 - length, 0), span) for span in spans]


@torch.no_grad()
def score_slowly(w, start, targets, length, band):
    """nll of these targets, by a forward over their window alone."""
    row = torch.from_numpy(w.tokens[start: start + length + 1].astype(np.int64))
    logits = w.model.logits(row[None, :-1], band=band)[0].double()
    nll = torch.logsumexp(logits, 1) - logits.gather(1, row[1:, None])[:, 0]
    return {t: float(nll[t - start]) for t in targets}


BANDED = dict(EVAL_ATTENTION="banded", EVAL_SEQ_LEN=16)
ONE_PASS = dict(BANDED, EVAL_SEQ_LEN=400, TTT_ENABLED=0)
SCORING = {  # settings and, if it is not theirs, the shape of a window
    "no overlap": (dict(EVAL_STRIDE=32), None),
    "long": (dict(EVAL_SEQ_LEN=48, EVAL_STRIDE=20, EVAL_BATCH_SEQS=7), None),
    "stride 1": (dict(EVAL_STRIDE=1, EVAL_BATCH_SEQS=64, VAL_LIMIT_TOKENS=192), None),
    "banded": (BANDED, None),
    "short segments": (dict(BANDED, EVAL_BATCH_SEQS=5, VAL_LIMIT_TOKENS=300), (31, 7, 32)),
    "one pass": (ONE_PASS, (9999, 9999, 16))}


@pytest.mark.parametrize("variables, shape", SCORING.values(), ids=SCORING)
def test_scores_equal_one_forward_per_window_and_change_no_weight(tiny, variables, shape):
    w = world(tiny, **variables)
    before, (result, book) = weights(w), run(w, shape=shape)
    slow, (length, stride, band) = {}, shape or w.s.scoring_shape
    for start, targets in windows_of(0, len(w.tokens) - 1, length, stride):
        slow.update(score_slowly(w, start, targets, length, band))
    assert np.abs(book.nll - [slow[t] for t in range(len(book.nll))]).max() < 1e-5
    assert np.std(book.nll) > 0.1, "a model that says the same everywhere would prove nothing"
    assert result["targets"] == len(w.tokens) - 1 == len(book.nll)
    assert np.array_equal(run(w, shape=shape)[1].nll, book.nll) and not changed(w, before)


MIXES = {
    "smear, bigram": (dict(), 2), "smear": (dict(BIGRAM_VOCAB_SIZE=0), 1),
    "bigram": (dict(SMEAR_GATE=0), 1),
    "none": (dict(SMEAR_GATE=0, BIGRAM_VOCAB_SIZE=0), 0)}


@pytest.mark.parametrize("mixing, reach", MIXES.values(), ids=MIXES)
def test_a_token_reaches_as_far_as_the_bands_and_the_mixing_of_tokens(tiny, mixing, reach):
    """Each layer carries it window − 1 tokens on and one more by its keys, a hash of two tokens one
    more, the smear gate one. A prefix of that many tokens gives the scores of one pass."""
    w = world(tiny, **ONE_PASS, **mixing)
    base, far = run(w, shape=(9999, 9999, 4))[1].nll, []
    for t in range(20, 100, 7):
        flipped = w.tokens.copy()
        assert train_gpt.BOS not in flipped[t: t + 3], "it would stop the smear gate"
        flipped[t] = 4 + (int(flipped[t]) + 5) % 300
        different = np.flatnonzero(run(w, flipped, shape=(9999, 9999, 4))[1].nll != base)
        assert different[0] == t - 1
        far.append(int(different[-1]) - t)
    assert max(far) == w.s.num_layers * 4 + reach
    one = run(w, shape=(9999, 9999, 16))
    assert one[0]["tokens_read"] == one[0]["targets"], "one pass over everything"
    for prefix, equal in ((3 * 16 + reach, True), (8, False)):
        segments = run(w, shape=(prefix + 40, 40, 16))
        assert segments[0]["tokens_read"] > one[0]["targets"]
        difference = np.abs(segments[1].nll - one[1].nll).max()
        assert difference < 1e-5 if equal else difference > 1e-3


# -- ranks ----------------------------------------------------------------------------------------

MUON = dict(TTT_OPTIMIZER="muon", TTT_LR=0.002)
# A stream has 16 times the tokens of a pass: of 352 targets 5 or 2, and documents of some 80
# tokens.
LANES = dict(TTT_LORA_RANK=2, TTT_LR=0.01, EVAL_SEQ_LEN=4, EVAL_STRIDE=4)
BANDED_LANES = dict(LANES, EVAL_ATTENTION="banded")
RANK_CASES = {
    "sgd": dict(TTT_BATCH_SEQS=2), "muon": dict(BANDED, **MUON),
    "odd clocks": dict(BANDED, EVAL_WALLCLOCK_SECONDS=8),
    "5 streams": dict(LANES, EVAL_BATCH_SEQS=1), "matches": dict(BANDED_LANES, EVAL_MATCH=1),
    "odd clocks, streams": dict(LANES, EVAL_WALLCLOCK_SECONDS=8)}


def scores_by_rank(make, rt):
    """{case: nll} of RANK_CASES on these ranks; by odd clocks a step takes 1 s on rank 0 and 1,000
    on rank 1."""
    scores = {}
    for case, variables in RANK_CASES.items():
        w = world(make, rt, **{"VAL_LIMIT_TOKENS": 352, **variables})
        if "odd clocks" in case:
            with Clock() as clock:
                slow = slow_ttt(w, clock, lambda step: 1000.0 ** rt.rank)
                scores[case] = run(w, ttt=slow)[1].nll
        else:
            scores[case] = run(w, ttt=adapting(w))[1].nll
    return scores


def save_scores(environ, folder):
    def make(**variables):
        variables = {k: str(v) for k, v in variables.items()}
        return train_gpt.resolve_settings({**environ, **variables})[0]
    torch.set_num_threads(1)
    rt = train_gpt.Runtime(make(), train_gpt.launched_ranks(os.environ))
    np.savez(folder / f"{rt.rank}.npz", **scores_by_rank(make, rt))
    rt.close()


def test_scores_do_not_depend_on_the_ranks(tiny, corpus, tmp_path):
    on_ranks(3, tmp_path / "said", save_scores, environment(corpus), tmp_path)
    ranks = [np.load(tmp_path / f"{rank}.npz") for rank in range(3)]
    one = scores_by_rank(tiny, train_gpt.Runtime(tiny()))
    assert len({nll.tobytes() for nll in one.values()}) == len(one), "all cases differ"
    for case, nll in one.items():  # orthogonalizing enlarges the last bit of a gradient
        assert np.abs(ranks[0][case] - nll).max() < (2e-3 if case == "muon" else 1e-5), case
        assert all(np.array_equal(ranks[0][case], other[case]) for other in ranks[1:]), case


# -- the match model ------------------------------------------------------------------------------

def matches_slowly(tokens):
    """[((first, second) guess, kind) for each run length] of each target, by a dictionary of all
    runs so far: the votes of the tokens that followed the last four times."""
    followed, found = {}, []
    for i in range(len(tokens) - 1):
        found.append([])
        for n in train_gpt.NGRAMS:
            run = n, tuple(tokens[max(i + 1 - n, 0): i + 1])
            voters = followed.get(run, [])[:-5:-1]  # newest first
            ranked = sorted(set(voters), key=lambda t: (-voters.count(t), voters.index(t)))
            first, second, *_ = *ranked, -1, -1
            kind = 5 * voters.count(first) + voters.count(second)
            found[-1].append(((first, second), kind))
            if i + 1 >= n:
                followed.setdefault(run, []).append(tokens[i + 1])
    return found


@settings(max_examples=60)
@given(st.integers(1, 400), st.sampled_from([2, 3, 8, 65536]), st.integers(0, 99))
def test_matches_equal_a_search_through_the_text_before(length, vocabulary, seed):
    tokens = np.random.default_rng(seed).integers(0, vocabulary, length + 1).astype(np.uint16)
    found = [list(zip(map(tuple, guesses.T.tolist()), kind.tolist()))
             for guesses, kind in train_gpt.matches(tokens, "cpu")]
    assert list(map(list, zip(*found))) == matches_slowly(tokens.tolist())


def mixed_slowly(w, nll, windows):
    """Mix guesses into these scores, window by window: (stream, first, last, round), the longest
    run first. What stream n has learned is of rounds before this one, of the streams up to n."""
    found, learned, out = matches_slowly(w.tokens.tolist()), {}, np.array(nll, np.float64)
    assert sum(last - first for _, first, last, _ in windows) == len(nll)
    for stream, first, last, now in windows:
        for t in range(first, last):
            for n, (guesses, kind) in reversed(list(enumerate(found[t]))):
                seen = learned.setdefault((n, kind), [])
                past = [c for c, of, then in seen if of <= stream and then < now]
                prior = 0.05 * (guesses[0] >= 0), 0.05 * (guesses[1] >= 0)
                weights = [(begin + sum(credits)) / (1 + len(past))
                           for begin, credits in zip(prior, list(zip(*past)) or [(), ()])]
                mine = [w_ * (guess == w.tokens[t + 1]) for w_, guess in zip(weights, guesses)]
                out[t] = -math.log((1 - sum(weights)) * math.exp(-out[t]) + sum(mine))
                seen.append(([m / math.exp(-out[t]) for m in mine], stream, now))
    return out


MATCHED = {"windows": dict(VAL_LIMIT_TOKENS=640), "banded": dict(BANDED, VAL_LIMIT_TOKENS=640),
           "adapters": dict(BANDED_LANES, VAL_LIMIT_TOKENS=480)}


@pytest.mark.parametrize("variables", MATCHED.values(), ids=MATCHED)
def test_guesses_are_mixed_in_by_what_they_were_worth_before(tiny, variables):
    lines, scores = [], []
    for match in 0, 1:
        w = world(tiny, EVAL_MATCH=match, **variables)
        w.rt.log, ttt = lines.append, adapting(w) if w.s.ttt_lora_rank else None
        scores.append(run(w, ttt=ttt))
    targets = len(w.tokens) - 1
    if ttt:
        streams, shape = ttt.scorer_options(targets)["streams"], w.s.ttt_shape
        assert streams > 2
        _, first, last = window_plan(targets, *shape[:2], streams)
        windows = [(n % streams, a, b, n // streams) for n, (a, b) in enumerate(zip(first, last))]
    else:
        windows = [(0, a, min(a + 512, targets), a) for a in range(0, targets, 512)]
    (before, plain), (_, mixed) = scores
    assert np.abs(mixed.nll - mixed_slowly(w, plain.nll, windows)).max() < 1e-5
    assert (mixed.nll < plain.nll - 0.1).any() and (mixed.nll > plain.nll).any()
    assert f"val_loss without guesses {before['val_loss']:.6f}" in lines[-1]


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_guess_does_not_hide_a_score_that_is_not_finite(tiny, monkeypatch, bad):
    """Of a target that is guessed, and of no other."""
    w, score = world(tiny, EVAL_MATCH=1, VAL_LIMIT_TOKENS=320), train_gpt.Scorer.score
    guessed = np.flatnonzero(train_gpt.MatchModel(w.tokens, 1, "cpu").right.any(0).any(0))[-1]

    def broken(*arguments):
        nll = score(*arguments)
        nll[guessed] = bad
        return nll
    monkeypatch.setattr(train_gpt.Scorer, "score", broken)
    with pytest.raises(LedgerError, match="scored (inf|nan)"):
        run(w)


def test_finding_guesses_is_inside_of_the_clock(tiny, monkeypatch):
    w, find = world(tiny, EVAL_MATCH=1, VAL_LIMIT_TOKENS=320), train_gpt.matches
    with Clock() as clock:
        def slow(*args):
            clock.now += 50
            return find(*args)
        monkeypatch.setattr(train_gpt, "matches", slow)
        assert run(w)[0]["seconds"] == 50


def test_mixed_scores_are_of_a_full_distribution():
    """Each token in the place of the last one: the probabilities of all of them sum to one, with
    each kind of match."""
    vocabulary, kinds = 8, set()
    for seed in range(60):
        rng, total = np.random.default_rng(seed), 0.0
        text = rng.integers(0, rng.choice([1, 2, 3, 7]), rng.integers(2, 100))
        p, n = rng.dirichlet(np.ones(vocabulary)), len(text) - 1
        for token in range(vocabulary):
            tokens = np.append(text, token).astype(np.uint16)
            match = train_gpt.MatchModel(tokens, 1, "cpu")
            match.mixed(np.array([0]), np.array([n]), np.full(n, 1.1))
            last = match.mixed(np.array([n]), np.array([n + 1]), -np.log(p[[token]]))
            total += math.exp(-last[0])
        kinds |= {int(kind[-1]) for _, kind in train_gpt.matches(tokens, "cpu")}
        assert total == pytest.approx(1, abs=1e-12)
    assert {5, 6, 10, 11, 12, 15, 16, 20} <= kinds


def test_a_very_bad_score_harms_no_later_one():
    """A wrong guess where the model is sure of another token."""
    tokens = np.random.default_rng(0).integers(0, 3, 201).astype(np.uint16)
    match = train_gpt.MatchModel(tokens, 1, "cpu")
    wrong = np.flatnonzero(~match.right.any(0).any(0)[:100])[-1]
    assert match.kinds[:, wrong].any(), "a guess, and no right one"
    bad = match.mixed(np.array([0]), np.array([100]),
                      np.where(np.arange(100) == wrong, 1000.0, 1.0))
    later = match.mixed(np.array([100]), np.array([200]), np.ones(100))
    assert bad[wrong] >= 1000 and np.isfinite(bad).all() and np.isfinite(later).all()


# -- test-time training ---------------------------------------------------------------------------

class SlowMuon:
    """Each matrix (Q and K: pair of heads) by itself in float64: Nesterov momentum, rows of length
    1, an orthogonalization of singular values, √(rows/columns) for tall matrices. Other parameters
    stay."""

    def __init__(self, groups, s):
        self.param_groups, self.s, self.buffers = groups, s, {}

    def step(self):
        for group in self.param_groups:
            p, = group["params"]
            if train_gpt.kind_of(group["name"]).optimizer not in ("muon", "proj_optimizer"):
                continue
            grad, beta = p.grad.double(), 0.9
            self.buffers[p] = beta * self.buffers.get(p, 0) + grad
            direction = grad + beta * self.buffers[p]
            direction = direction / direction.norm(dim=1, keepdim=True).clamp_min(1e-7)
            pairs = self.s.muon_head_pairs and group["name"].endswith((".q", ".k"))
            rows = 2 * self.s.head_dim if pairs else len(p)
            scale = group["lr"] * math.sqrt(max(1, p.size(0) / p.size(1)))
            for weights, part in zip(p.data.split(rows), direction.split(rows)):
                update = by_svd(part, train_gpt.NEWTON_SCHULZ[self.s.muon_coefficients])
                weights -= scale * torch.from_numpy(update).float()


def slow_optimizer(groups, s):
    if s.ttt_optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=s.ttt_lr, betas=(0.9, 0.999), weight_decay=0)
    if s.ttt_optimizer == "sgd":
        return torch.optim.SGD(groups, lr=s.ttt_lr, momentum=0.9)
    return SlowMuon(groups, s)


def ttt_reference(w):
    """Score a chunk by a forward per window, then train on the rows whose targets it scored."""
    s, tokens, targets, nll, chunks = w.s, w.tokens, len(w.tokens) - 1, {}, {}
    length, stride, band = s.scoring_shape
    for start, scored in windows_of(0, targets, length, stride):
        chunks.setdefault(scored[0] // s.ttt_chunk_tokens, []).append((start, scored))
    frozen = tuple(f"{part}.{i}." for part in ("blocks", "cores")
                   for i in range(s.ttt_freeze_blocks))
    params = {n: p for n, p in w.model.named_parameters() if not n.startswith(frozen)}
    optimizer = slow_optimizer([dict(params=[p], name=n) for n, p in params.items()], s)
    rates = {"up": s.ttt_fc_lr_mult, "down": s.ttt_proj_lr_mult}
    for c, windows in enumerate(chunks.values()):
        for start, scored in windows:
            nll.update(score_slowly(w, start, scored, length, band))
        if c + 1 == len(chunks):
            break
        low, high = windows[0][1][0], windows[-1][1][-1] + 1
        lr = s.ttt_lr * 0.5 * (1 + math.cos(math.pi * c / (len(chunks) - 1)))
        rows = [tokens[at: at + s.train_seq_len + 1].astype(np.int64)
                for at in range(low, high - s.train_seq_len + 1, s.train_seq_len)]
        batches = [torch.from_numpy(np.stack(rows[b: b + s.ttt_batch_seqs]))
                   for b in range(0, len(rows), s.ttt_batch_seqs)] * s.ttt_epochs
        for k, batch in enumerate(batches):
            inside = 0.5 * (1 + math.cos(math.pi * k / len(batches)))
            lr_now = lr * (inside if s.ttt_intra_cosine else 1)
            for group in optimizer.param_groups:
                group["lr"] = lr_now * rates.get(group["name"].split(".")[-1], 1.0)
            w.model.zero_grad()
            logits = w.model.logits(batch[:, :-1]).flatten(0, 1)
            torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten()).backward()
            adapted = [p for n, p in params.items() if train_gpt.ttt_factor(n, s)]
            torch.nn.utils.clip_grad_norm_(adapted, 1.0)
            optimizer.step()
    return np.array([nll[t] for t in range(targets)])


TTT_CASES = {
    "batches": dict(TTT_BATCH_SEQS=2, TTT_CHUNK_TOKENS=160),
    "micro batches": dict(MICRO_BATCH_TOKENS=32),
    "frozen": dict(TTT_FREEZE_BLOCKS=2),
    "longer windows": dict(EVAL_SEQ_LEN=64, EVAL_STRIDE=16, TTT_CHUNK_TOKENS=100),
    "banded": BANDED,
    "rates": dict(TTT_PROJ_LR_MULT=3, TTT_FC_LR_MULT=0.5),
    "cosine inside": dict(TTT_INTRA_COSINE=1, TTT_BATCH_SEQS=2),
    "adamw": dict(TTT_OPTIMIZER="adamw", TTT_LR=0.001),
    "muon": MUON,
    "no epochs": dict(TTT_EPOCHS=0), "one chunk": dict(TTT_CHUNK_TOKENS=5000),
    # Windows of 32 every 24 in chunks of 32: a chunk that scores 24 targets has no row.
    "chunks without a row": dict(EVAL_STRIDE=24, TTT_CHUNK_TOKENS=32)}


@pytest.mark.parametrize("variables", TTT_CASES.values(), ids=TTT_CASES)
def test_ttt_equals_the_slow_reference(tiny, variables):
    variables = {"VAL_LIMIT_TOKENS": 352, **variables}
    w, slow = world(tiny, **variables), world(tiny, **variables)
    plain, before = run(w)[1].nll, weights(w)
    book, reference = run(w, ttt=adapting(w))[1], ttt_reference(slow)
    error = 10 if w.s.ttt_optimizer == "muon" else 1  # orthogonalizing enlarges the last bits
    assert np.abs(book.nll - reference).max() < 3e-5 * error
    for (name, p), q in zip(w.model.named_parameters(), slow.model.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5 * error, msg=name)
    adapts = bool(w.s.ttt_epochs and w.s.ttt_chunk_tokens < 1000)
    assert (np.abs(book.nll - plain).max() > 1e-3) == adapts == bool(changed(w, before))


def lora_reference(w, initial):
    """nll, and the last learning rate and sharpness of each stream: stream by stream, a row at a
    time, AdamW without momentum in plain words. The rate of a stream rises where, for it and all
    earlier streams, all moves since the document began go down the new gradients, else it falls.
    Its sharpness goes down the gradients of the same streams."""
    s, tokens, targets = w.s, torch.from_numpy(w.tokens.astype(np.int64)), len(w.tokens) - 1
    length, stride, band = s.ttt_shape
    reach = min(length, s.context // 2 + stride)  # of a row to train on
    count = max(1, min(s.ttt_batch_seqs, targets // (16 * length)))
    ends = [targets * (n + 1) // count for n in range(count)]
    streams = [SimpleNamespace(at=begin, end=end, rate=s.ttt_lr, steps=0, sharp=torch.zeros(1),
                             state=[[x[None].clone(), 0] for x in initial])
             for begin, end in zip([0, *ends], ends)]
    nll, turn, taken = np.full(targets, np.nan), 0, 0

    def losses(stream, start, length=length):
        for weight in stream.state:
            weight[0] = weight[0].detach().requires_grad_()
        weights, row = [weight[0] for weight in stream.state], tokens[start: start + length + 1]
        stream.sharp = stream.sharp.detach().requires_grad_()
        rest = torch.zeros(1, train_gpt.AFTER_PAIRS - 1), stream.sharp[None]
        return w.model(row[None, :-1], row[None, 1:], band=band,
                       adapters=torch.cat([*(x.flatten(1) for x in weights), *rest], 1))[0]

    def mixed(nll):
        """With the base model, by windows of each stream."""
        (wide, new, band), base = s.base_shape, {}
        for begin, end in zip([0, *ends], ends):
            for start, scored in windows_of(begin, end, wide, new):
                base.update(score_slowly(w, start, scored, wide, band))
        of_base = np.exp([-base[t] for t in range(targets)])
        return -np.log((1 - s.ttt_base_weight) * np.exp(-nll) + s.ttt_base_weight * of_base)
    while True:
        turn, uphill, too_sharp = turn + 1, 0.0, 0.0
        for stream in streams:
            first, stream.at = stream.at, min(stream.at + stride, stream.end)
            start = max(stream.at - length, 0)
            nll[first:stream.at] = losses(stream, start)[first - start: stream.at - start].detach()
            stream.new = list(range(first, stream.at)) if turn * stride > reach else []
        if all(stream.at == stream.end for stream in streams):
            return mixed(nll), [(stream.rate, stream.sharp.item()) for stream in streams]
        for stream in streams:
            begun = [t for t in stream.new if tokens[t + 1] == train_gpt.BOS]
            if begun:
                stream.state, stream.steps = [[x[None].clone(), 0] for x in initial], 0
                stream.new = [t for t in stream.new if t > begun[-1]]
            if stream.new:
                start = stream.at - reach
                row = losses(stream, start, reach)
                loss = sum(row[t - start] for t in stream.new) / len(stream.new)
                *stream.grads, blame = torch.autograd.grad(
                    loss, [*(weight[0] for weight in stream.state), stream.sharp])
                too_sharp += float(blame)
                uphill += sum(float((g * (weight[0].detach() - x)).sum())
                              for g, weight, x in zip(stream.grads, stream.state, initial))
            if turn * stride > reach:
                stream.rate *= math.exp(-np.sign(uphill) * 0.3 / math.sqrt(taken + 1))
                down = -np.sign(too_sharp) * 0.03 / math.sqrt(taken + 1)
                stream.sharp = stream.sharp.detach() + down
            stream.steps += bool(stream.new)
            for n, (p, square) in enumerate(stream.state if stream.new else ()):
                square = 0.999 * square + 0.001 * stream.grads[n] ** 2
                size = (square / (1 - 0.999 ** stream.steps)).sqrt() + 1e-10
                moved = -stream.rate * (stream.grads[n] / size + 0.5 * p.detach())
                stream.state[n] = [p.detach() + moved, square]
        taken += turn * stride > reach


LORA_CASES = {
    "one stream": dict(LANES, TTT_BATCH_SEQS=1, VAL_LIMIT_TOKENS=192, TTT_LR=0.003),
    "banded": dict(BANDED_LANES, TTT_BASE_WEIGHT=0),
    "mixed": dict(BANDED_LANES, TTT_BASE_WEIGHT=0.4),
    # With documents some gradients are zero but for rounding, which AdamW makes whole steps of.
    "few rows a pass": dict(LANES, DOC_ATTENTION=0, EVAL_BATCH_SEQS=2, EVAL_SEQ_LEN=5,
                            EVAL_STRIDE=3, TTT_LR=0.003)}


@pytest.mark.parametrize("variables", LORA_CASES.values(), ids=LORA_CASES)
def test_adapters_by_document_equal_the_slow_reference(tiny, variables):
    w = world(tiny, **{"VAL_LIMIT_TOKENS": 352, **variables})
    before, ttt = weights(w), adapting(w)
    book = run(w, ttt=ttt)[1]
    first = w.model.adapter_pairs(ttt.initial[None])
    reference, ends = lora_reference(w, [x[0] for pair in first for x in pair])
    for (a,), (b,) in first:
        assert 0.5 < a.abs().max() * math.sqrt(a.size(1)) <= 1 and not b.any()
    assert np.abs(book.nll - reference).max() < 1e-4 and not changed(w, before)
    assert (w.tokens == train_gpt.BOS).sum() > 1, "a document ends"
    rates, sharpness = zip(*ends)
    assert ttt.lr.tolist() == pytest.approx(rates, rel=1e-4)
    assert ttt.sharpness.tolist() == pytest.approx(sharpness, abs=1e-6) and any(sharpness)
    assert all(b.abs().max() > w.s.ttt_lr for _, b in w.model.adapter_pairs(ttt.params)), "steps"


def test_the_base_model_scores_a_window_when_its_stream_comes_to_it(tiny, monkeypatch):
    """A pass of its rows takes a second here, and adapters are told the seconds that are left for
    them. What it reads is counted."""
    w, rows, left = world(tiny, **BANDED_LANES, VAL_LIMIT_TOKENS=352, TTT_BATCH_SEQS=1), [], []
    forward, ttt = w.model.forward, adapting(w)
    with Clock() as clock:
        def watched(x, *arguments, adapters=None, **more):
            if adapters is None:
                rows.append(x[0, -1].item())
                clock.now += 1.0
            return forward(x, *arguments, adapters=adapters, **more)

        def adapt(ledger, span, chunk, chunks, time_left):
            left.append((span[1], len(rows), clock.now + time_left))
        monkeypatch.setattr(w.model, "forward", watched)
        monkeypatch.setattr(ttt, "adapt", adapt)
        result, _ = run(w, ttt=ttt)
    windows = 352 // 2  # of four tokens, two of them scored
    assert len(rows) == windows and [n for _, n, _ in left] == [-(-t // 2) for t, _, _ in left]
    limit = 0.98 * w.s.eval_wallclock_seconds
    assert [end for _, _, end in left] == [limit - (windows - n) for _, n, _ in left]
    assert result["tokens_read"] == windows * 4 + 352 // 4 * 8


def test_tail_and_muon_choose_their_parameters(tiny):
    def chosen(**variables):
        s = tiny(**variables)
        return {n for n in train_gpt.parameter_shapes(s) if train_gpt.ttt_factor(n, s)}

    def kinds(names):
        return {train_gpt.kind_of(n).kind for n in names}
    tail = chosen(TTT_PARAMS="tail", TTT_FREEZE_BLOCKS=2)
    assert {n.split(".")[1] for n in tail if n.startswith("cores.")} == {"2"}
    assert {"tok_emb", "blocks.0.mlp_scale"} <= tail and "blocks.0.resid_mix" not in tail
    assert kinds(chosen(**MUON)) == {"attn", "mlp", "proj", "mix"}
    assert "bigram.proj" in chosen(**MUON)


def test_guesses_behind_text_that_was_not_mixed_learn_as_often():
    tokens = np.random.default_rng(1).integers(2, 9, 36_001).astype(np.uint16)
    nll, device = np.full(2000, 2.0, np.float32), torch.device("cpu")
    at_once = train_gpt.MatchModel(tokens, 1, device).mixed(
        np.array([34_000]), np.array([36_000]), nll)
    by_hand = train_gpt.MatchModel(tokens, 1, device)
    parts = [by_hand.mixed(np.array([a]), np.array([min(a + 512, 36_000)]), nll[:36_000 - a][:512])
             for a in range(34_000, 36_000, 512)]
    assert np.array_equal(at_once, np.concatenate(parts))


@pytest.mark.parametrize("variables", [MUON, BANDED_LANES], ids=["muon", "streams"])
def test_warming_up_reads_no_validation_token_and_changes_no_weight(tiny, monkeypatch, variables):
    w, seen = world(tiny, VAL_LIMIT_TOKENS=352, **variables), []
    before, w.rt.compile, w.rt.compiled = weights(w), True, lambda function, **how: function

    class Watched(train_gpt.Scorer):
        def __init__(self, model, tokens, *more, **how):
            seen.append(tokens)
            super().__init__(model, tokens, *more, **how)
    monkeypatch.setattr(train_gpt, "Scorer", Watched)
    train_gpt.warm_up_evaluations(w.model, w.model, w.s, w.rt, w.tokens)
    # Plain, full context, TTT; with adapters also the base model in streams.
    assert len(seen) == (4 if w.s.ttt_lora_rank else 3)
    assert all(len(x) == len(w.tokens) and (x != w.tokens).mean() > 0.9 for x in seen)
    assert not changed(w, before) and all(p.grad is None for p in w.model.parameters())


def test_the_compiled_step_of_adapters_equals_the_eager_one():
    """A row whose rate and activity are 0 stays as it is, bit for bit."""
    torch.manual_seed(0)
    p, grad, initial = torch.randn(3, 50), torch.randn(3, 50), torch.randn(50)
    active = torch.tensor([[True], [False], [True]])
    given = [p, grad, torch.rand(3, 50), torch.tensor([[1.0], [5.0], [9.0]]), 0.1 * active, active]
    results = []
    for how in (lambda f: f, torch.compile):
        copies = [x.clone() for x in given]
        results.append([how(train_gpt.adapter_uphill)(p, initial, grad), copies])
        how(train_gpt.adapter_descent)(*copies)
    for eager, compiled in zip(results[0][1], results[1][1]):
        assert torch.allclose(eager, compiled, rtol=1e-6, atol=1e-7)
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-5)
    assert (results[1][1][0] != p).any(1).tolist() == [True, False, True]
    assert (results[1][1][2] != given[2]).any(1).tolist() == [True, False, True]


@pytest.mark.parametrize("late", [{9, 10, 13}, set(range(99))], ids=len)
def test_a_late_step_of_adapters_costs_itself_alone(tiny, late):
    w, lines = world(tiny, **LANES, VAL_LIMIT_TOKENS=352, EVAL_WALLCLOCK_SECONDS=600), []
    w.rt.log = lines.append
    with Clock() as clock:
        ttt = slow_ttt(w, clock, lambda step: 0.25, late)
        book = run(w, ttt=ttt)[1]
    steps = len(ttt.epochs)
    assert ttt.epochs == [int(n > 0 and n not in late) for n in range(steps)] and steps > 15
    assert not np.isnan(book.nll).any() and (f"skipped={len(late & set(range(steps)))} step="
                                              f"{250 * (len(late) < 99)}ms ") in lines[-1]
    assert bool((ttt.params != ttt.initial).any()) == (len(late) < 99)


def test_a_late_chunk_costs_the_epochs_of_itself_alone(tiny):
    late = {0, 4, 5}
    w = world(tiny, **BANDED, VAL_LIMIT_TOKENS=352, TTT_EPOCHS=2, TTT_CHUNK_TOKENS=32)
    ttt = slow_ttt(w, late=late)
    run(w, ttt=ttt)
    assert ttt.epochs == [2 * (n not in late) for n in range(10)]


def test_scoring_that_starts_slowly_delays_adapting_and_does_not_end_it(tiny):
    """The first pass takes 100 s, as much as the limit, and each later one 0.1 s: while the
    forecast believes the first, chunks are skipped."""
    w = world(tiny, EVAL_WALLCLOCK_SECONDS=150, EVAL_BATCH_SEQS=1, TTT_EPOCHS=1)
    model, ttt = w.model, slow_ttt(w)
    with Clock() as clock:
        def slow(x, y, **kwargs):
            clock.now += 0.1 if clock.now else 100.0
            return model(x, y, **kwargs)
        w.model = slow
        run(w, ttt=ttt)
    assert ttt.epochs[0] == 0 and all(ttt.epochs[2:]) and clock.now <= 150


# -- causality ------------------------------------------------------------------------------------

FLIPS = {"muon": dict(MUON, TTT_BATCH_SEQS=2, EVAL_BATCH_SEQS=3, DOC_ATTENTION=0),
         "matches": dict(BANDED, EVAL_MATCH=1),
         "matches in streams": dict(BANDED_LANES, VAL_LIMIT_TOKENS=256, EVAL_MATCH=1)}


def places_of(w):
    """Tokens at and beside a border of rows, of segments in a chunk and of chunks, inside of a
    stream and between two, near both ends, and at two beginnings of documents."""
    targets, scorer = len(w.tokens) - 1, scorer_of(w, adapting(w))
    firsts, chunks = scorer.first, scorer.chunks
    inner = [p for begin, end in chunks for p in range(begin + 1, end)]
    first = [int(firsts[i]) for i in (chunks[len(chunks) // 2][0], chunks[1][0],
                                      inner[0 if scorer.streams else len(inner) // 3])]
    bos = np.flatnonzero(w.tokens == train_gpt.BOS)
    return [1, 33, targets - 1, *(f + by for f in first for by in (0, 1)),
            *bos[[len(bos) // 3, len(bos) // 2]].tolist()]


@pytest.mark.parametrize("variables", FLIPS.values(), ids=FLIPS)
def test_flipping_tokens_changes_no_earlier_score_bit_for_bit(tiny, variables):
    """Token t is target t − 1: scores [0, t) may depend on tokens 0..t alone, whatever was trained
    in between. Other tokens after t, and another token t + 1, change score t and none before."""
    w = world(tiny, **{"VAL_LIMIT_TOKENS": 320, "TTT_EPOCHS": 1, "EVAL_WALLCLOCK_SECONDS": 0,
                       **variables})
    origin = weights(w)

    def scores(tokens):
        w.model.load_state_dict(origin)
        return run(w, tokens, adapting(w))[1].nll
    base = scores(w.tokens)
    assert np.abs(base - run(w)[1].nll).max() > 1e-3, "what does nothing would prove nothing"
    for n, t in enumerate(places_of(w)):
        flipped = w.tokens.copy()
        if n % 2:
            flipped[t + 1] = train_gpt.BOS if flipped[t + 1] != train_gpt.BOS else 7
        else:
            flipped[t + 1:] = 4 + (flipped[t + 1:].astype(int) * 7 + t) % (320 - 4)
        nll = scores(flipped)
        assert np.array_equal(nll[:t], base[:t]), f"a score before token {t} knew what came later"
        assert nll[t] != base[t], f"the score of token {t + 1} did not notice the token"


# -- the evaluations of an artifact ---------------------------------------------------------------

@pytest.mark.parametrize("variables", [dict(), dict(BANDED, EVAL_SEQ_LEN=40)])
def test_an_artifact_is_scored_plain_in_full_context_and_adapted(tiny, tmp_path, variables):
    """Each is evaluate() of its plan."""
    variables = dict(VAL_LIMIT_TOKENS=320, **variables)
    w, lines, path = world(tiny, **variables), [], tmp_path / "model"
    path.write_bytes(train_gpt.pack(w.model.state_dict(), w.s, 1_000_000))
    w.rt.log = lines.append
    results, book = train_gpt.run_evaluations(w.model, w.model, path, w.s, w.rt, w.tokens,
                                              w.byte_table, None)
    label, (length, stride, band) = w.s.quant_label, w.s.scoring_shape
    full, note = (("banded", f"segment:{stride} prefix:{length - stride}") if band
                  else ("sliding", "stride:8"))
    assert list(results) == [label, full, "ttt"]
    assert any(line.startswith(f"final_{label}_{full}") and f" {note} " in line for line in lines)
    fresh = world(tiny, **variables)
    train_gpt.load_quantized(fresh.model, train_gpt.read_artifact(path)[1], path)
    windows = train_gpt.evaluate(fresh.model, w.tokens, w.byte_table, w.s, w.rt, "",
                                 (w.s.context, w.s.context, 0))[0]
    plain, plain_book = run(fresh)
    hashes = [results[kind]["sha256"] for kind in (label, full)]
    assert hashes == [windows["sha256"], plain["sha256"]]
    moved = np.abs(book.nll - plain_book.nll)
    assert moved[:stride].max() < 1e-5 and moved[-200:].max() > 1e-3


# -- cheating -------------------------------------------------------------------------------------

CHEATS = {
    "one token too many":
        lambda book, first, last: book.rows_for_adapting(np.arange(first, last + 1), 1),
    "a second score":
        lambda book, first, last: book.record(first + np.arange(8), np.zeros(8, np.float32)),
    "the next score":
        lambda book, first, last: book.record(last + np.arange(8), np.zeros(8, np.float32))}


@pytest.mark.parametrize("act", CHEATS.values(), ids=CHEATS)
def test_a_cheating_ttt_is_stopped(tiny, act):
    with pytest.raises(LedgerError):
        run(world(tiny, VAL_LIMIT_TOKENS=320), ttt=Onlooker(act))


CHEATING_LOOPS = {  # what is changed, and how its result is
    "scores twice": (train_gpt.Scorer, "score", lambda nll: np.append(nll, nll[-8:])),
    "a score too few": (train_gpt.Scorer, "score", lambda nll: nll[:-1]),
    # The published defect: tail windows that all end at N score the last targets again.
    "a target in two windows": (
        train_gpt, "window_plan", lambda plan: [np.append(x, x[-1]) for x in plan])}


@pytest.mark.parametrize("owner, name, cheat", CHEATING_LOOPS.values(), ids=CHEATING_LOOPS)
def test_a_cheating_loop_is_stopped(tiny, monkeypatch, owner, name, cheat):
    honest = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args: cheat(honest(*args)))
    with pytest.raises(LedgerError):
        run(world(tiny, VAL_LIMIT_TOKENS=320))
