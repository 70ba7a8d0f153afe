"""Windows, chunks, the ledger, and the evaluation loop: against slow references, and against those who would cheat."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import train_gpt
from train_gpt import LedgerError, ScoreLedger, chunk_plan, window_plan

quick = settings(deadline=None, database=None, max_examples=300)


@st.composite
def plans(draw):
    """(targets, length, stride) with targets ≥ length ≥ stride."""
    length = draw(st.integers(1, 60))
    return draw(st.integers(length, 700)), length, draw(st.integers(1, length))


# -- plans -----------------------------------------------------------------------------------------------------------

@quick
@given(plans())
def test_every_target_is_in_exactly_one_window_and_windows_are_exact(plan):
    targets, length, stride = plan
    times = np.zeros(targets, int)
    starts, firsts = window_plan(*plan)
    for w, (start, first) in enumerate(zip(starts.tolist(), firsts.tolist())):
        assert 0 <= start <= first < start + length <= targets, "a window lies inside, and scores inside of itself"
        times[first: start + length] += 1
        assert w == 0 or first - start >= length - stride, "tokens seen before the first target that counts"
    assert (times == 1).all()
    assert (np.diff(firsts) > 0).all() and len(starts) == 1 + math.ceil((targets - length) / stride)


@pytest.mark.parametrize("targets, length", [(0, 1), (31, 32)])
def test_too_few_targets_are_refused(targets, length):
    with pytest.raises(ValueError):
        window_plan(targets, length, 1)


@quick
@given(plans(), st.integers(1, 300))
def test_chunks_partition_the_windows_by_their_first_target(plan, chunk):
    _, firsts = window_plan(*plan)
    chunks = chunk_plan(firsts, plan[0], chunk)
    assert [w for begin, end in chunks for w in range(begin, end)] == list(range(len(firsts)))
    stretches = [{int(f) // chunk for f in firsts[begin:end]} for begin, end in chunks]
    assert all(len(s) == 1 for s in stretches) and len(set.union(*stretches)) == len(chunks)


# -- the ledger ------------------------------------------------------------------------------------------------------

def ledger(targets=20):
    return ScoreLedger(np.arange(targets + 1, dtype=np.uint16))


def test_a_second_score_is_refused():
    book = ledger()
    book.record(0, np.ones(8, np.float32))
    for first in (0, 7):
        with pytest.raises(LedgerError):
            book.record(first, np.ones(4, np.float32))
    assert book.scored == 8 and np.isnan(book.nll[8:]).all()


def test_a_gap_is_refused():
    book = ledger()
    book.record(0, np.ones(8, np.float32))
    with pytest.raises(LedgerError):
        book.record(9, np.ones(2, np.float32))


def test_scores_past_the_end_are_refused():
    book = ledger()
    with pytest.raises(LedgerError):
        book.record(0, np.ones(21, np.float32))
    book.record(0, np.ones(20, np.float32))
    with pytest.raises(LedgerError):
        book.record(20, np.ones(1, np.float32))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_refused_and_named(value):
    book, nll = ledger(), np.ones(5, np.float32)
    book.record(0, nll)
    nll[3] = value
    with pytest.raises(LedgerError, match="target 8 "):
        book.record(5, nll)
    assert book.scored == 5


def test_an_incomplete_ledger_has_no_result(byte_table):
    book = ledger()
    for n in (0, 12, 7):
        book.record(book.scored, np.ones(n, np.float32))
        with pytest.raises(LedgerError):
            book.result(byte_table)
    book.record(19, np.ones(1, np.float32))
    assert book.result(byte_table)["val_loss"] == 1


@pytest.mark.parametrize("first, last, length", [
    (0, 9, 4), (8, 9, 1), (0, 20, 20), (4, 12, 4),
    (-12, 0, 4), (-20, -10, 4), (-1, 8, 3), (-9, 8, 4)])  # a negative index counts from the end, where nothing is scored
def test_rows_are_refused_before_they_are_scored(first, last, length):
    book = ledger()
    book.record(0, np.ones(8, np.float32))
    with pytest.raises(LedgerError):
        book.rows_for_adapting(first, last, length)


@quick
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40), st.integers(1, 12))
def test_rows_hold_scored_targets_once_and_nothing_else(scored, first, last, length):
    book = ledger(40)
    book.record(0, np.ones(scored, np.float32))
    if first > last or last > scored:
        return
    rows = book.rows_for_adapting(first, last, length)
    assert tuple(rows.shape) == ((last - first) // length, length + 1)
    trained = rows[:, 1:].flatten().tolist()  # token i + 1 is target i, and tokens here are their own numbers
    assert trained == list(range(first + 1, first + 1 + len(trained))) and all(t <= scored for t in trained)


# -- the loop --------------------------------------------------------------------------------------------------------

@pytest.fixture
def byte_table(tiny):
    return train_gpt.ByteTable(tiny())


def world(tiny, **variables):
    """Settings, one rank, a model with random weights, the validation tokens and their byte table."""
    s = tiny(**variables)
    rt = train_gpt.Runtime(s)
    model, _ = train_gpt.build_model(s, rt)
    torch.manual_seed(11)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.15 * torch.randn_like(p))
    return SimpleNamespace(s=s, rt=rt, model=model, tokens=train_gpt.load_validation(s), byte_table=train_gpt.ByteTable(s))


def run(w, tokens=None, stride=None, adapter=None):
    return train_gpt.evaluate(w.model, w.tokens if tokens is None else tokens, w.byte_table, w.s, w.rt, "test",
                              stride or w.s.eval_stride, adapter)


def adapting(w):
    return train_gpt.Adapter(w.model, w.model, w.s, w.rt)


def windows_of(targets, length, stride):
    """[(start, targets that count)]: the first window scores all of its own, each later one ends `stride` on, or at the end."""
    out, done = [(0, list(range(length)))], length
    while done < targets:
        end = min(done + stride, targets)
        out.append((end - length, list(range(done, end))))
        done = end
    return out


@torch.no_grad()
def score_one(w, tokens, start, target):
    """nll of a target, by a forward over its window alone."""
    context = torch.from_numpy(tokens[start: start + w.s.window].astype(np.int64))[None]
    logits = w.model.logits(context)[0, target - start].double() / w.s.ttt_temp
    return float(torch.logsumexp(logits, 0) - logits[int(tokens[target + 1])])


@pytest.mark.parametrize("variables", [
    dict(EVAL_STRIDE=32), dict(EVAL_STRIDE=8, EVAL_BATCH_SEQS=7), dict(EVAL_STRIDE=11, EVAL_BATCH_SEQS=1000),
    dict(EVAL_SEQ_LEN=48, EVAL_STRIDE=20), dict(EVAL_STRIDE=1, EVAL_BATCH_SEQS=64, VAL_LIMIT_TOKENS=300)])
def test_scores_equal_one_forward_per_target(tiny, variables):
    w = world(tiny, **variables)
    result, book = run(w)
    for start, targets in windows_of(len(w.tokens) - 1, w.s.window, w.s.eval_stride):
        for target in targets[:: max(1, len(targets) // 3)] + targets[-1:]:
            assert abs(book.nll[target] - score_one(w, w.tokens, start, target)) < 1e-5, target
    assert np.std(book.nll) > 0.1, "a model that says the same everywhere would prove nothing"
    assert result["targets"] == len(w.tokens) - 1 == len(book.nll)


def test_bits_per_byte_by_hand(tiny, corpus):
    w = world(tiny)
    result, book = run(w)
    text_bytes = 0
    for before, token in zip(w.tokens[:-1].tolist(), w.tokens[1:].tolist()):
        if token > 3:  # 0 to 3 are pad, bos, eos, unk
            piece = corpus.tokenizer.id_to_piece(token)
            byte = piece.startswith("<0x")
            text_bytes += 1 if byte else len(piece.lstrip("▁").encode()) + (piece.startswith("▁") and before > 3)
    assert result["bytes"] == text_bytes
    assert result["val_bpb"] == pytest.approx(book.nll.astype(np.float64).sum() / np.log(2) / text_bytes, rel=1e-12)
    assert result["val_loss"] == pytest.approx(book.nll.astype(np.float64).mean(), rel=1e-12)


@pytest.mark.parametrize("batch", [1, 3, 8, 500])
def test_the_batch_size_changes_no_score(tiny, batch):
    assert np.abs(run(world(tiny, EVAL_BATCH_SEQS=batch))[1].nll - run(world(tiny))[1].nll).max() < 1e-5


def test_scoring_changes_no_weight_and_repeats_itself(tiny):
    w = world(tiny)
    before = [p.detach().clone() for p in w.model.parameters()]
    one, two = run(w)[1], run(w)[1]
    assert np.array_equal(one.nll, two.nll) and all(torch.equal(a, b) for a, b in zip(before, w.model.parameters()))


# -- test-time training ----------------------------------------------------------------------------------------------

def ttt_reference(w):
    """Score a chunk, then train on the rows whose targets it scored: one process, plain SGD, a forward per window."""
    s, tokens, nll = w.s, w.tokens, {}
    targets = len(tokens) - 1
    chunks = {}
    for start, scored in windows_of(targets, s.window, s.eval_stride):
        chunks.setdefault(scored[0] // s.ttt_chunk_tokens, []).append((start, scored))
    frozen = [f"{part}.{i}." for part in ("blocks", "cores") for i in range(s.ttt_freeze_blocks)]
    params = [p for n, p in w.model.named_parameters() if not any(n.startswith(f) for f in frozen)]
    optimizer = torch.optim.SGD(params, lr=s.ttt_lr, momentum=s.ttt_momentum)
    for c, key in enumerate(sorted(chunks)):
        for start, scored in chunks[key]:
            with torch.no_grad():
                row = torch.from_numpy(tokens[start: start + s.window + 1].astype(np.int64))
                losses = torch.nn.functional.cross_entropy(w.model.logits(row[None, :-1])[0], row[1:], reduction="none")
            nll.update({t: float(losses[t - start]) for t in scored})
        if c + 1 == len(chunks):
            break
        low, high = chunks[key][0][1][0], chunks[key][-1][1][-1] + 1
        optimizer.param_groups[0]["lr"] = s.ttt_lr * 0.5 * (1 + math.cos(math.pi * c / (len(chunks) - 1)))
        T = s.train_seq_len
        rows = [torch.from_numpy(tokens[low + r * T: low + (r + 1) * T + 1].astype(np.int64)) for r in range((high - low) // T)]
        for _ in range(s.ttt_epochs):
            for b in range(0, len(rows), s.ttt_batch_seqs):
                batch = torch.stack(rows[b: b + s.ttt_batch_seqs])
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(w.model.logits(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
                if s.ttt_grad_clip:
                    torch.nn.utils.clip_grad_norm_(params, s.ttt_grad_clip)
                optimizer.step()
    return np.array([nll[t] for t in range(targets)])


TTT_CASES = {
    "plain": dict(TTT_LR=0.05), "batches": dict(TTT_BATCH_SEQS=2, TTT_CHUNK_TOKENS=160), "no clip": dict(TTT_GRAD_CLIP=0, TTT_LR=0.01),
    "micro batches": dict(MICRO_BATCH_TOKENS=32), "no momentum": dict(TTT_MOMENTUM=0, TTT_EPOCHS=1),
    "frozen": dict(TTT_FREEZE_BLOCKS=2), "all blocks frozen": dict(TTT_FREEZE_BLOCKS=3),
    "longer windows": dict(EVAL_SEQ_LEN=64, EVAL_STRIDE=16, TTT_CHUNK_TOKENS=100),
    "no epochs": dict(TTT_EPOCHS=0), "one chunk": dict(TTT_CHUNK_TOKENS=5000),
    # Windows of 32 every 24 in chunks of 32: some chunks score 24 targets, too few for a row, and must change nothing.
    "chunks without a row": dict(EVAL_STRIDE=24, TTT_CHUNK_TOKENS=32),
    # 20 × 51 = 1,020 lies inside of the last window, which begins to count at 1,016 of 1,024: no window is left for it.
    "a stretch without a window": dict(EVAL_STRIDE=24, TTT_CHUNK_TOKENS=51)}


@pytest.mark.parametrize("variables", TTT_CASES.values(), ids=TTT_CASES)
def test_ttt_equals_the_slow_reference(tiny, variables):
    w = world(tiny, **variables)
    plain = run(w)[1].nll
    book = run(w, adapter=adapting(w))[1]
    reference_world = world(tiny, **variables)
    reference = ttt_reference(reference_world)
    assert np.abs(book.nll - reference).max() < 1e-5
    for (name, p), q in zip(w.model.named_parameters(), reference_world.model.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5, msg=name)
    adapts = w.s.ttt_epochs and w.s.ttt_chunk_tokens < 1000
    assert (np.abs(book.nll - plain).max() > 1e-3) == bool(adapts), "the adaptation must be seen in the scores"


@pytest.mark.parametrize("freeze", [0, 1, 3])
def test_frozen_blocks_do_not_change(tiny, freeze):
    w = world(tiny, TTT_FREEZE_BLOCKS=freeze)
    before = {n: p.detach().clone() for n, p in w.model.named_parameters()}
    run(w, adapter=adapting(w))
    frozen = tuple(f"{part}.{i}." for part in ("blocks", "cores") for i in range(freeze))
    changed = {n for n, p in w.model.named_parameters() if not torch.equal(p, before[n])}
    assert not any(n.startswith(frozen) for n in changed if frozen)
    assert {n for n in before if not (frozen and n.startswith(frozen))} - changed <= {"blocks.0.resid_mix"}


class Spy:
    """An adapter that keeps what the real one is given, and the weights before and after."""

    def __init__(self, inner):
        self.inner, self.calls = inner, []

    def adapt(self, book, first, last, share_done):
        assert last == book.scored
        self.calls.append((first, last, share_done))
        self.inner.adapt(book, first, last, share_done)


def test_the_last_chunk_is_scored_and_not_trained_on(tiny):
    w = world(tiny)
    spy = Spy(adapting(w))
    run(w, adapter=spy)
    targets, count = len(w.tokens) - 1, len(chunk_plan(window_plan(len(w.tokens) - 1, 32, 8)[1], len(w.tokens) - 1, 96))
    assert len(spy.calls) == count - 1 and spy.calls[-1][1] < targets
    assert [c[0] for c in spy.calls] == [0] + [c[1] for c in spy.calls[:-1]], "every scored target is trained on once, in order"
    assert [c[2] for c in spy.calls] == pytest.approx([i / (count - 1) for i in range(count - 1)])


# Token positions: inside a chunk, beside chunk borders (96), row borders (32) and window borders (8), at both ends.
POSITIONS = [1, 32, 33, 95, 96, 97, 128, 500, 512, 577, 1023]


@pytest.mark.parametrize("variables", [dict(TTT_LR=0.05), dict(TTT_BATCH_SEQS=2, EVAL_BATCH_SEQS=3, TTT_CHUNK_TOKENS=64)])
def test_flipping_later_tokens_changes_no_earlier_score_bit_for_bit(tiny, variables):
    """Token t is target t − 1: scores [0, t) may depend on tokens 0..t alone, whatever was trained in between."""
    def scores(tokens):
        w = world(tiny, **variables)
        return run(w, tokens, adapter=adapting(w))[1].nll
    original = world(tiny, **variables).tokens
    base = scores(original)
    for t in POSITIONS:
        flipped = original.copy()
        flipped[t + 1:] = 4 + (flipped[t + 1:].astype(int) * 7 + t) % (320 - 4)
        nll = scores(flipped)
        assert np.array_equal(nll[:t], base[:t]), f"a score before token {t} knew what came after it"
        assert (nll[t:] != base[t:]).any(), "tokens after it were changed, and no score noticed"


def test_flipping_one_token_is_seen_from_its_own_score_on(tiny):
    w = world(tiny)
    base = run(w)[1].nll
    for t in (5, 300, 1000):
        flipped = w.tokens.copy()
        flipped[t] = 4 + (int(flipped[t]) + 5) % 300
        different = np.flatnonzero(run(w, flipped)[1].nll != base)
        assert different[0] == t - 1 and len(different) > 2


# -- cheating --------------------------------------------------------------------------------------------------------

class Cheat:
    def __init__(self, act):
        self.adapt = act


CHEATS = {
    "rows of the next chunk": lambda book, first, last, share: book.rows_for_adapting(last, last + 32, 32),
    "one token too many": lambda book, first, last, share: book.rows_for_adapting(first, last + 1, 1),
    "all tokens": lambda book, first, last, share: book.rows_for_adapting(0, len(book.nll), 32),
    "tokens from the end": lambda book, first, last, share: book.rows_for_adapting(-40, 0, 32),
    "a second score": lambda book, first, last, share: book.record(first, np.zeros(last - first, np.float32)),
    "the next score": lambda book, first, last, share: book.record(last, np.zeros(8, np.float32)),
}


@pytest.mark.parametrize("act", CHEATS.values(), ids=CHEATS)
def test_a_cheating_adapter_is_stopped(tiny, act):
    w = world(tiny)
    with pytest.raises(LedgerError):
        run(w, adapter=Cheat(act))


@pytest.mark.parametrize("cheat", ["twice", "short", "long", "nan"])
def test_a_cheating_loop_is_stopped(tiny, monkeypatch, cheat):
    w, honest = world(tiny), train_gpt.Scorer.score

    def score(self, *args):
        nll = honest(self, *args)
        nll = {"twice": np.append(nll, nll[-8:]), "short": nll[:-1], "long": np.append(nll, 0), "nan": nll * np.nan}[cheat]
        return nll.astype(np.float32)
    monkeypatch.setattr(train_gpt.Scorer, "score", score)
    with pytest.raises(LedgerError):
        run(w)


def test_a_plan_that_scores_a_target_twice_is_stopped(tiny, monkeypatch):
    """The published defect: tail windows that all end at N and score the last targets again and again."""
    honest = train_gpt.window_plan

    def overlapping(targets, length, stride):
        start, first = honest(targets, length, stride)
        return np.append(start, start[-1]), np.append(first, first[-1])
    monkeypatch.setattr(train_gpt, "window_plan", overlapping)
    with pytest.raises(LedgerError):
        run(world(tiny))
