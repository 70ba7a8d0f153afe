"""Windows, chunks, the ledger, and the evaluation loop: against slow references, and against those who would cheat."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import train_gpt
from conftest import ROOT
from train_gpt import LedgerError, ScoreLedger, chunk_plan, sdpa, window_plan

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


class Onlooker:
    """An adapter that trains nothing and keeps which targets it was given."""

    def __init__(self):
        self.given = []

    def begin(self, scorer):
        assert not self.given, "before the first score"

    def scored(self, byte_count, loss):
        assert byte_count > 0

    def adapt(self, book, first, last, chunk, chunks, left):
        assert last == book.scored and 0 <= chunk < chunks - 1
        self.given.append((first, last))
        return 1


@settings(max_examples=100)
@given(st.integers(1, 700), st.integers(1, 90), st.integers(0, 90), st.integers(0, 200), st.integers(1, 9), st.booleans())
def test_every_target_of_any_plan_gets_its_own_score_once(targets, segment, prefix, chunk, batch, banded):
    """Tokens are their own numbers and a score is the number of its target, so that the scores say whose they are."""
    s = replace(train_gpt.Settings(), device="cpu", eval_seq_len=30, eval_batch_seqs=batch, ttt_chunk_tokens=segment + chunk,
                ttt_epochs=1, eval_wallclock_seconds=0.0)
    rt, onlooker = train_gpt.Runtime(s), Onlooker()
    rt.log = lambda line: None

    def model(x, y, window=0):
        assert window == 30 * banded and torch.equal(x + 1, y)
        return y.float()
    tokens, table = np.arange(targets + 1, dtype=np.uint16), SimpleNamespace(count=lambda tokens, first=0: len(tokens), source="")
    result, book = train_gpt.evaluate(model, tokens, table, s, rt, "test", (prefix + segment, segment, 30 * banded), onlooker)
    assert (book.nll == tokens[1:]).all()
    ends = [last for _, last in onlooker.given]
    assert [first for first, _ in onlooker.given] == [0, *ends[:-1]][:len(ends)] and all(e < targets for e in ends)
    length = min(prefix + segment, targets)
    assert result["tokens_read"] == length * (1 + math.ceil((targets - length) / segment))


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


def world(tiny, rt=None, **variables):
    """Settings, one rank, a model with random weights, the validation tokens and their byte table; windows if not said."""
    s = tiny(**{"EVAL_ATTENTION": "window", **variables})
    rt = rt or train_gpt.Runtime(s)
    model, _ = train_gpt.build_model(s, rt)
    torch.manual_seed(11)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.15 * torch.randn_like(p))
    return SimpleNamespace(s=s, rt=rt, model=model, tokens=train_gpt.load_validation(s), byte_table=train_gpt.ByteTable(s))


def run(w, tokens=None, adapter=None):
    return train_gpt.evaluate(w.model, w.tokens if tokens is None else tokens, w.byte_table, w.s, w.rt, "test",
                              w.s.scoring_plan, adapter)


def adapting(w):
    return train_gpt.Adapter(w.model, w.model, w.s, w.rt)


class Clock:
    """Stands still, for the script, but when told to go on."""

    def __init__(self):
        self.now = 0.0

    def __enter__(self):
        self.real, train_gpt.time = train_gpt.time, SimpleNamespace(perf_counter=lambda: self.now)
        return self

    def __exit__(self, *_):
        train_gpt.time = self.real


class SlowAdapter(train_gpt.Adapter):
    """A real one whose step n takes seconds(n) by this clock."""

    def __init__(self, w, clock, seconds):
        super().__init__(w.model, w.model, w.s, w.rt)
        self.clock, self.seconds, self.steps = clock, seconds, 0

    def _backward(self, batch):
        super()._backward(batch)
        self.clock.now += self.seconds(self.steps)
        self.steps += 1


def windows_of(targets, length, stride, band=0):
    """[(start, targets that count)]: the first window scores all of its own, each later one ends `stride` on, or at the end."""
    length = min(length, targets)
    out, done = [(0, list(range(length)))], length
    while done < targets:
        end = min(done + stride, targets)
        out.append((end - length, list(range(done, end))))
        done = end
    return out


@torch.no_grad()
def score_one(w, tokens, start, target):
    """nll of a target, by a forward over its window alone."""
    length, _, band = w.s.scoring_plan
    context = torch.from_numpy(tokens[start: start + length].astype(np.int64))[None]
    logits = w.model.logits(context, window=band)[0, target - start].double()
    return float(torch.logsumexp(logits, 0) - logits[int(tokens[target + 1])])


BANDED = dict(EVAL_ATTENTION="banded", EVAL_SEQ_LEN=16, EVAL_SEGMENT=40, EVAL_PREFIX=24)


@pytest.mark.parametrize("variables", [
    dict(EVAL_STRIDE=32), dict(EVAL_STRIDE=8, EVAL_BATCH_SEQS=7), dict(EVAL_STRIDE=11, EVAL_BATCH_SEQS=1000),
    dict(EVAL_SEQ_LEN=48, EVAL_STRIDE=20), dict(EVAL_STRIDE=1, EVAL_BATCH_SEQS=64, VAL_LIMIT_TOKENS=300),
    BANDED, dict(BANDED, EVAL_SEQ_LEN=32, EVAL_SEGMENT=7, EVAL_BATCH_SEQS=5, VAL_LIMIT_TOKENS=300),
    dict(BANDED, EVAL_SEGMENT=2000, TTT_ENABLED=0)])
def test_scores_equal_one_forward_per_target(tiny, variables):
    w = world(tiny, **variables)
    result, book = run(w)
    for start, targets in windows_of(len(w.tokens) - 1, *w.s.scoring_plan):
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


@pytest.mark.parametrize("attention", [dict(), BANDED], ids=["windows", "banded"])
@pytest.mark.parametrize("batch", [1, 3, 500])
def test_the_batch_size_changes_no_score(tiny, batch, attention):
    one, other = (run(world(tiny, **attention, EVAL_BATCH_SEQS=n))[1].nll for n in (8, batch))
    assert np.abs(one - other).max() < 1e-5


def test_scoring_changes_no_weight_and_repeats_itself(tiny):
    w = world(tiny)
    before = [p.detach().clone() for p in w.model.parameters()]
    one, two = run(w)[1], run(w)[1]
    assert np.array_equal(one.nll, two.nll) and all(torch.equal(a, b) for a, b in zip(before, w.model.parameters()))


# -- banded attention ------------------------------------------------------------------------------------------------

def attend_slowly(q_BTHE, k_BTKE, v_BTKE, window=0):
    """Softmax over the keys in sight, query by query; grouped heads; without a window all keys up to the query's own."""
    out, groups = [], q_BTHE.size(2) // k_BTKE.size(2)
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k_BTKE, v_BTKE))
    for t in range(q_BTHE.size(1)):
        seen = slice(max(0, t + 1 - window) if window else 0, t + 1)
        weights = (torch.einsum("bhe,bthe->bht", q_BTHE[:, t], k[:, seen]) / math.sqrt(q_BTHE.size(3))).softmax(-1)
        out.append(torch.einsum("bht,bthe->bhe", weights, v[:, seen]))
    return torch.stack(out, 1)


@settings(max_examples=60)
@given(st.integers(1, 40), st.integers(0, 45), st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 3)]), st.integers(1, 3),
       st.sampled_from([(torch.float64, 1e-12), (torch.float32, 1e-5)]))
def test_windowed_attention_equals_the_slow_softmax(length, window, heads, rows, kind):
    dtype, error = kind
    generator = torch.Generator().manual_seed(length * 100 + window)
    qkv = [torch.randn(rows, length, n, 4, dtype=dtype, generator=generator).requires_grad_()
           for n in (heads[0], heads[1], heads[1])]
    weights = torch.randn(rows, length, heads[0], 4, dtype=dtype, generator=generator)
    mine, slow = sdpa(*qkv, window), attend_slowly(*qkv, window)
    torch.testing.assert_close(mine, slow, rtol=0, atol=error)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), qkv) for y in (mine, slow))):
        torch.testing.assert_close(a, b, rtol=0, atol=10 * error)


MIXES = {"smear, bigram": (dict(), 2), "smear": (dict(BIGRAM_VOCAB_SIZE=0), 1), "bigram": (dict(SMEAR_GATE=0), 1),
         "smear, trigram": (dict(SMEAR_GATE=1, TRIGRAM_VOCAB_SIZE=64), 3),
         "trigram": (dict(SMEAR_GATE=0, BIGRAM_VOCAB_SIZE=0, TRIGRAM_VOCAB_SIZE=64), 2),
         "none": (dict(SMEAR_GATE=0, BIGRAM_VOCAB_SIZE=0), 0)}
ONE_PASS = dict(EVAL_SEGMENT=5000, TTT_ENABLED=0)


@pytest.mark.parametrize("mixing, reach", MIXES.values(), ids=MIXES)
def test_a_token_reaches_as_far_as_the_bands_and_the_mixing_of_tokens(tiny, mixing, reach):
    """Each layer carries it window − 1 tokens on, a hash of two tokens one more, of three two, the smear gate one."""
    w = world(tiny, **dict(BANDED, **ONE_PASS, EVAL_SEQ_LEN=4, EVAL_STRIDE=4, VAL_LIMIT_TOKENS=128), **mixing)
    base, far = run(w)[1].nll, []
    for t in (20, 47, 70):
        flipped = w.tokens.copy()
        assert train_gpt.BOS not in flipped[t: t + 3], "a beginning of a document would stop the smear gate"
        flipped[t] = 4 + (int(flipped[t]) + 5) % 300
        different = np.flatnonzero(run(w, flipped)[1].nll != base)
        assert different[0] == t - 1
        far.append(int(different[-1]) - t)
    assert max(far) == w.s.num_layers * (w.s.window - 1) + reach


@pytest.mark.parametrize("mixing, reach", MIXES.values(), ids=MIXES)
def test_segments_with_a_full_prefix_equal_one_pass(tiny, mixing, reach):
    prefix = 3 * (16 - 1) + reach
    one = run(world(tiny, **dict(BANDED, **ONE_PASS), **mixing))
    assert one[0]["tokens_read"] == one[0]["targets"], "one pass over everything"
    segments = run(world(tiny, **dict(BANDED, EVAL_PREFIX=prefix, EVAL_SEGMENT=40), **mixing))
    assert segments[0]["tokens_read"] > 1.5 * one[0]["targets"]
    assert np.abs(segments[1].nll - one[1].nll).max() < 1e-5
    short = run(world(tiny, **dict(BANDED, EVAL_PREFIX=8, EVAL_SEGMENT=40), **mixing))
    assert np.abs(short[1].nll - one[1].nll).max() > 1e-3, "a prefix that is too short must be seen"


def test_a_wide_band_is_no_band(tiny):
    """Segments, prefix and window as long as the text: a plain causal forward."""
    w = world(tiny, **ONE_PASS, EVAL_ATTENTION="banded", EVAL_SEQ_LEN=1024)
    row = torch.from_numpy(w.tokens.astype(np.int64))[None]
    with torch.no_grad():
        assert np.abs(run(w)[1].nll - w.model(row[:, :-1], row[:, 1:])[0].numpy()).max() < 1e-5


# -- ranks -----------------------------------------------------------------------------------------------------------

RANK_CASES = {  # the first three score only
    "sliding": dict(), "banded": dict(BANDED, EVAL_BATCH_SEQS=3), "one banded pass": dict(BANDED, **ONE_PASS),
    "ttt": dict(TTT_BATCH_SEQS=2), "banded ttt": BANDED, "adamw": dict(BANDED, TTT_OPTIMIZER="adamw", TTT_LR=0.001),
    "muon": dict(BANDED, TTT_OPTIMIZER="muon", TTT_LR=0.002), "odd clocks": dict(BANDED, EVAL_WALLCLOCK_SECONDS=8)}


def scores_by_rank(make, rt):
    """{case: nll} of RANK_CASES on these ranks; by odd clocks a step takes 1 s on rank 0 and 1,000 on rank 1."""
    scores = {}
    for n, (case, variables) in enumerate(RANK_CASES.items()):
        w = world(make, rt, VAL_LIMIT_TOKENS=600, **variables)
        if case == "odd clocks":
            with Clock() as clock:
                scores[case] = run(w, adapter=SlowAdapter(w, clock, lambda step: 1000.0 ** rt.rank))[1].nll
        else:
            scores[case] = run(w, adapter=adapting(w) if n >= 3 else None)[1].nll
    return scores


RANKS_SCRIPT = f"""
import os, sys
sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]}
import test_evaluation as tests
from test_evaluation import np, train_gpt, torch
torch.set_num_threads(1)
def make(**variables):
    return train_gpt.resolve_settings({{**os.environ, **{{k: str(v) for k, v in variables.items()}}}})[0]
rt = train_gpt.Runtime(make(), train_gpt.launched_ranks(os.environ))
scores = tests.scores_by_rank(make, rt)
np.savez(f"{{os.environ['OUT_DIR']}}/{{rt.rank}}.npz", **scores)
rt.close()
os._exit(0)  # the scores are kept; how libraries take their threads down is not what is tested
"""


def test_scores_do_not_depend_on_the_ranks(tiny, run_script, tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS_SCRIPT)
    done = run_script(ranks=2, script=script)
    assert done.returncode == 0, done.stderr
    ranks = [np.load(tmp_path / f"{rank}.npz") for rank in (0, 1)]
    one = scores_by_rank(tiny, train_gpt.Runtime(tiny()))
    assert len({nll.tobytes() for nll in one.values()}) == len(one), "all cases differ, and clocks leave epochs out"
    for case, nll in one.items():  # PyTorch's Muon orthogonalizes in bf16, which enlarges the last bit of a gradient
        assert np.abs(ranks[0][case] - nll).max() < (2e-3 if case == "muon" else 1e-5), case
        assert np.array_equal(ranks[0][case], ranks[1][case]), case


# -- test-time training ----------------------------------------------------------------------------------------------

def rate_of(name, s):
    """× TTT_LR of a parameter."""
    return {"up": s.ttt_fc_lr_mult, "down": s.ttt_proj_lr_mult}.get(name.split(".")[-1], 1.0)


def ttt_reference(w):
    """Score a chunk, then train on the rows whose targets it scored: one process, plain SGD, a forward per window."""
    s, tokens, nll, (length, _, band) = w.s, w.tokens, {}, w.s.scoring_plan
    targets = len(tokens) - 1
    chunks = {}
    for start, scored in windows_of(targets, *w.s.scoring_plan):
        chunks.setdefault(scored[0] // s.ttt_chunk_tokens, []).append((start, scored))
    frozen = [f"{part}.{i}." for part in ("blocks", "cores") for i in range(s.ttt_freeze_blocks)]
    params = {n: p for n, p in w.model.named_parameters() if not any(n.startswith(f) for f in frozen)}
    origin = {n: p.detach().clone() for n, p in params.items()}
    groups = [dict(params=[p], name=n) for n, p in params.items()]
    optimizer = (torch.optim.SGD(groups, lr=s.ttt_lr, momentum=s.ttt_momentum) if s.ttt_optimizer == "sgd" else
                 torch.optim.AdamW(groups, lr=s.ttt_lr, betas=(0.9, 0.999), weight_decay=0))
    for c, key in enumerate(sorted(chunks)):
        for start, scored in chunks[key]:
            with torch.no_grad():
                row = torch.from_numpy(tokens[start: start + length + 1].astype(np.int64))
                logits = w.model.logits(row[None, :-1], window=band)[0]
                losses = torch.nn.functional.cross_entropy(logits, row[1:], reduction="none")
            nll.update({t: float(losses[t - start]) for t in scored})
        if c + 1 == len(chunks):
            break
        low, high = chunks[key][0][1][0], chunks[key][-1][1][-1] + 1
        lr = s.ttt_lr * 0.5 * (1 + math.cos(math.pi * c / (len(chunks) - 1)))
        T = s.train_seq_len
        rows = [torch.from_numpy(tokens[low + r * T: low + (r + 1) * T + 1].astype(np.int64)) for r in range((high - low) // T)]
        batches = [rows[b: b + s.ttt_batch_seqs] for b in range(0, len(rows), s.ttt_batch_seqs)] * s.ttt_epochs
        for k, batch in enumerate(batches):
            lr_now = lr * (0.5 * (1 + math.cos(math.pi * k / len(batches))) if s.ttt_intra_cosine else 1)
            for group in optimizer.param_groups:
                group["lr"] = lr_now * rate_of(group["name"], s)
            batch = torch.stack(batch)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(w.model.logits(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
            if s.ttt_grad_clip:
                torch.nn.utils.clip_grad_norm_(params.values(), s.ttt_grad_clip)
            optimizer.step()
            with torch.no_grad():
                for n, p in params.items():
                    p.add_((origin[n] - p) * min(1, lr_now * s.ttt_decay))
    return np.array([nll[t] for t in range(targets)])


TTT_CASES = {
    "plain": dict(TTT_LR=0.05), "batches": dict(TTT_BATCH_SEQS=2, TTT_CHUNK_TOKENS=160),
    "no clip": dict(TTT_GRAD_CLIP=0, TTT_LR=0.01),
    "micro batches": dict(MICRO_BATCH_TOKENS=32), "no momentum": dict(TTT_MOMENTUM=0, TTT_EPOCHS=1),
    "frozen": dict(TTT_FREEZE_BLOCKS=2), "all blocks frozen": dict(TTT_FREEZE_BLOCKS=3),
    "longer windows": dict(EVAL_SEQ_LEN=64, EVAL_STRIDE=16, TTT_CHUNK_TOKENS=100),
    "banded": BANDED, "banded, segment 8": dict(BANDED, EVAL_SEGMENT=8, TTT_BATCH_SEQS=2, EVAL_BATCH_SEQS=50),
    "decay": dict(TTT_DECAY=4), "adamw": dict(TTT_OPTIMIZER="adamw", TTT_LR=0.001),
    "rates": dict(TTT_PROJ_LR_MULT=3, TTT_FC_LR_MULT=0.5),
    "cosine inside": dict(TTT_INTRA_COSINE=1, TTT_BATCH_SEQS=2),
    "no epochs": dict(TTT_EPOCHS=0), "one chunk": dict(TTT_CHUNK_TOKENS=5000),
    # Windows of 32 every 24 in chunks of 32: some chunks score 24 targets, too few for a row, and must change nothing.
    "chunks without a row": dict(EVAL_STRIDE=24, TTT_CHUNK_TOKENS=32),
    # 20 × 51 = 1,020 lies inside of the last window, which begins to count at 1,016 of 1,024: no window is left for it.
    "a stretch without a window": dict(EVAL_STRIDE=24, TTT_CHUNK_TOKENS=51, VAL_LIMIT_TOKENS=1024)}


@pytest.mark.parametrize("variables", TTT_CASES.values(), ids=TTT_CASES)
def test_ttt_equals_the_slow_reference(tiny, variables):
    variables = {"VAL_LIMIT_TOKENS": 512, **variables}
    w = world(tiny, **variables)
    plain = run(w)[1].nll
    book = run(w, adapter=adapting(w))[1]
    reference_world = world(tiny, **variables)
    reference = ttt_reference(reference_world)
    assert np.abs(book.nll - reference).max() < 3e-5  # 1.3e-5 by rounding, over 20 chunks of large steps; adapting moves 1e-3
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


def adapt_once(w, adapter, targets=96):
    """One adaptation to the first targets, as after their scores."""
    book = ScoreLedger(w.tokens)
    book.record(0, np.zeros(targets, np.float32))
    return adapter.adapt(book, 0, targets, 0, 10)


def weights(w):
    """{name: value} of what the model computes with."""
    return {n: p.detach().clone() for n, p in w.model.named_parameters()}


def test_muon_changes_matrices_alone_each_by_a_step_in_all_directions(tiny):
    w = world(tiny, TTT_OPTIMIZER="muon", TTT_LR=0.01, TTT_EPOCHS=1, TTT_MOMENTUM=0)
    before = weights(w)
    assert adapt_once(w, adapting(w)) == 1
    after = weights(w)
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == {n for n in before if train_gpt.kind_of(n).kind in ("attn", "mlp", "proj")} and "bigram.proj" in moved
    for name in moved:  # orthogonalized, scaled for tall matrices: all singular values are about one learning rate
        rows, columns = before[name].shape
        steps = torch.linalg.svdvals(after[name] - before[name]) / (0.01 * max(1, rows / columns) ** 0.5)
        assert steps.max() < 1.4 and steps.median() > 0.5, name


def test_muon_of_ttt_is_that_of_training(tiny):
    """Momentum and orthogonalization by their definitions, in float64, over three steps."""
    w = world(tiny, TTT_OPTIMIZER="muon", TTT_LR=0.01, TTT_EPOCHS=3, TTT_GRAD_CLIP=0, MUON_ROW_NORM=0)
    p = dict(w.model.named_parameters())["cores.1.mlp.up"]
    mine, buffer = p.detach().double().clone(), torch.zeros_like(p, dtype=torch.float64)
    adapter, seen = adapting(w), []
    p.register_hook(lambda grad: seen.append(grad.double()))
    adapt_once(w, adapter)
    for grad in seen:
        buffer = 0.9 * buffer + grad
        u, sigma, vh = torch.linalg.svd(grad + 0.9 * buffer, full_matrices=False)
        sigma = sigma / (sigma.norm() + 1e-7)
        for a, b, c in train_gpt.NEWTON_SCHULZ["polar"]:
            sigma = a * sigma + b * sigma ** 3 + c * sigma ** 5
        mine -= 0.01 * math.sqrt(p.size(0) / p.size(1)) * (u * sigma) @ vh
    assert len(seen) == 3 and (p.double() - mine).abs().max() < 1e-4


@pytest.mark.parametrize("variables", [
    dict(TTT_OPTIMIZER="muon", TTT_PARAMS="tail", TTT_FREEZE_BLOCKS=3),
    dict(TTT_OPTIMIZER="muon", TTT_FREEZE_BLOCKS=3, BIGRAM_VOCAB_SIZE=0, VE_LAYERS="")])
def test_settings_that_leave_nothing_to_adapt_are_refused_before_anything_starts(tiny, variables):
    with pytest.raises(train_gpt.UserError, match="leave nothing to adapt"):
        tiny(**variables)


def test_tail_and_scalars_choose_their_parameters(tiny):
    s = tiny(TTT_PARAMS="tail", TTT_FREEZE_BLOCKS=2)
    tail = {n for n in train_gpt.parameter_shapes(s) if train_gpt.ttt_factor(n, s)}
    assert {n for n in tail if n.startswith("cores.")} == {n for n in train_gpt.parameter_shapes(s) if n.startswith("cores.2.")}
    assert "tok_emb" in tail and "blocks.0.mlp_scale" in tail and "blocks.0.resid_mix" not in tail
    s = tiny(TTT_PARAMS="scalars")
    assert {train_gpt.kind_of(n).kind for n in train_gpt.parameter_shapes(s) if train_gpt.ttt_factor(n, s)} == {"control", "gate"}


WAYS = {"sgd": dict(), "adamw": dict(TTT_OPTIMIZER="adamw"), "muon": dict(TTT_OPTIMIZER="muon")}


@pytest.mark.parametrize("variables", WAYS.values(), ids=WAYS)
def test_a_huge_decay_leaves_the_weights_of_the_artifact(tiny, variables):
    w = world(tiny, TTT_DECAY=1e9, **variables)
    plain, before = run(w)[1].nll, weights(w)
    assert np.array_equal(run(w, adapter=adapting(w))[1].nll, plain)
    assert all(torch.equal(p, before[n]) for n, p in weights(w).items())


def test_more_decay_keeps_the_weights_nearer_to_those_of_the_artifact(tiny):
    distance = []
    for decay in (0, 1, 10):
        w = world(tiny, TTT_DECAY=decay)
        before = weights(w)
        run(w, adapter=adapting(w))
        distance.append(float(sum((p - before[n]).square().sum() for n, p in weights(w).items())))
    assert distance[0] > 1.2 * distance[1] > 2 * distance[2] > 0


@pytest.mark.parametrize("variables", WAYS.values(), ids=WAYS)
def test_warming_up_changes_no_weight(tiny, variables):
    w = world(tiny, **variables)
    adapter, before = adapting(w), weights(w)
    adapter.warm_up()
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in w.model.named_parameters())


def test_a_late_chunk_costs_its_own_adaptation_alone(tiny):
    """Every fourth chunk is told that no time is left."""
    w = world(tiny)
    adapter, book, epochs = adapting(w), ScoreLedger(w.tokens), []
    book.record(0, np.zeros(960, np.float32))
    for chunk in range(10):
        epochs.append(adapter.adapt(book, 96 * chunk, 96 * chunk + 96, chunk, 11, -1.0 if chunk % 4 == 3 else math.inf))
    assert epochs == [2, 2, 2, 0, 2, 2, 2, 0, 2, 2]


class Spy:
    """An adapter that keeps what the real one is given."""

    def __init__(self, inner):
        self.inner, self.calls = inner, []

    def begin(self, scorer):
        self.inner.begin(scorer)

    def scored(self, byte_count, loss):
        self.inner.scored(byte_count, loss)

    def adapt(self, book, first, last, chunk, chunks, left):
        assert last == book.scored
        self.calls.append((first, last, chunk, chunks))
        return self.inner.adapt(book, first, last, chunk, chunks, left)


def test_the_last_chunk_is_scored_and_not_trained_on(tiny):
    w = world(tiny)
    spy = Spy(adapting(w))
    run(w, adapter=spy)
    targets, count = len(w.tokens) - 1, len(chunk_plan(window_plan(len(w.tokens) - 1, 32, 8)[1], len(w.tokens) - 1, 96))
    assert len(spy.calls) == count - 1 and spy.calls[-1][1] < targets
    assert [c[0] for c in spy.calls] == [0] + [c[1] for c in spy.calls[:-1]], "every scored target is trained on once, in order"
    assert [c[2:] for c in spy.calls] == [(i, count) for i in range(count - 1)]


# Token positions: inside a chunk, beside chunk borders (96), row borders (32) and window borders (8), at both ends.
POSITIONS = [1, 32, 33, 95, 96, 97, 128, 500, 512, 577, 607]
FLIPS = {"sliding": dict(VAL_LIMIT_TOKENS=608),
         "small batches": dict(TTT_BATCH_SEQS=2, EVAL_BATCH_SEQS=3, TTT_CHUNK_TOKENS=64, VAL_LIMIT_TOKENS=512),
         "banded": BANDED, "adamw": dict(BANDED, TTT_OPTIMIZER="adamw", TTT_LR=0.001, VAL_LIMIT_TOKENS=512),
         "muon": dict(TTT_OPTIMIZER="muon", TTT_LR=0.01, TTT_DECAY=1, VAL_LIMIT_TOKENS=320)}


def borders_of(w):
    """Token positions at and beside a border of segments in a chunk, at and beside a border of chunks, and of two BOS."""
    targets = len(w.tokens) - 1
    _, firsts = window_plan(targets, *w.s.scoring_plan[:2])
    chunks = chunk_plan(firsts, targets, w.s.ttt_chunk_tokens)
    middle = len(chunks) // 2
    inner = [p for begin, end in chunks for p in range(begin + 1, end)]
    first = [int(firsts[i]) for i in (chunks[middle][0], chunks[1][0], inner[len(inner) // 3])]
    bos = np.flatnonzero(w.tokens == train_gpt.BOS)
    return [*(f + by for f in first for by in (0, 1)), *bos[[len(bos) // 3, len(bos) // 2]].tolist()]


def adapted_scores(tiny, tokens, variables):
    w = world(tiny, **variables)
    return run(w, tokens, adapter=adapting(w))[1].nll


@pytest.mark.parametrize("variables", FLIPS.values(), ids=FLIPS)
def test_flipping_later_tokens_changes_no_earlier_score_bit_for_bit(tiny, variables):
    """Token t is target t − 1: scores [0, t) may depend on tokens 0..t alone, whatever was trained in between."""
    w = world(tiny, **variables)
    base = adapted_scores(tiny, w.tokens, variables)
    assert np.abs(base - run(w)[1].nll).max() > 1e-3, "an adaptation that does nothing would prove nothing"
    for t in POSITIONS if variables is FLIPS["sliding"] else borders_of(w):
        flipped = w.tokens.copy()
        flipped[t + 1:] = 4 + (flipped[t + 1:].astype(int) * 7 + t) % (320 - 4)
        nll = adapted_scores(tiny, flipped, variables)
        assert np.array_equal(nll[:t], base[:t]), f"a score before token {t} knew what came after it"
        assert (nll[t:] != base[t:]).any(), "tokens after it were changed, and no score noticed"


@pytest.mark.parametrize("plan", [dict(), BANDED], ids=["sliding", "banded"])
def test_flipping_one_token_is_seen_from_its_own_score_on(tiny, plan):
    w = world(tiny, **(variables := dict(plan, VAL_LIMIT_TOKENS=512)))
    base = adapted_scores(tiny, w.tokens, variables)
    for n, t in enumerate([5, 500, *borders_of(w)]):
        flipped = w.tokens.copy()
        flipped[t] = 4 + (int(flipped[t]) + 5) % 300 if n % 3 or flipped[t] == train_gpt.BOS else train_gpt.BOS
        different = np.flatnonzero(adapted_scores(tiny, flipped, variables) != base)
        assert different[0] == t - 1 and len(different) > 2


# -- the evaluations of an artifact ----------------------------------------------------------------------------------

@pytest.mark.parametrize("variables", [
    dict(), BANDED, dict(BANDED, TTT_TEMP=0.8),
    dict(BANDED, EVAL_STRIDE=64, TTT_TEMP=1.1), dict(BANDED, EVAL_SEQ_LEN=64, EVAL_SEGMENT=7)])
def test_an_artifact_is_scored_plain_in_full_context_and_adapted(tiny, tmp_path, variables):
    """Each is evaluate() of its plan; only the adapted scores have the temperature."""
    w, lines, path = world(tiny, **variables), [], tmp_path / "model"
    path.write_bytes(train_gpt.pack(w.model.state_dict(), w.s, 1_000_000))
    w.rt.log = lines.append
    results, book = train_gpt.run_evaluations(w.model, w.model, path, w.s, w.rt, w.tokens, w.byte_table, None)
    full, note = ("banded", f"segment:{w.s.eval_segment} prefix:24") if variables else ("sliding", "stride:8")
    assert list(results) == [w.s.quant_label, full, "ttt"]
    assert any(line.startswith(f"final_{w.s.quant_label}_{full}") and f" {note} " in line for line in lines)
    fresh = world(tiny, **variables)
    train_gpt.load_quantized(fresh.model, train_gpt.read_artifact(path)[1], path)
    windows = train_gpt.evaluate(fresh.model, w.tokens, w.byte_table, w.s, w.rt, "", (w.s.window, w.s.window, 0))[0]
    plain, plain_book = run(fresh)
    assert (results[w.s.quant_label]["sha256"], results[full]["sha256"]) == (windows["sha256"], plain["sha256"])
    length, _, band = w.s.scoring_plan
    rows = torch.from_numpy(w.tokens[None, :length + 1].astype(np.int64))
    with torch.no_grad():
        first = fresh.model(rows[:, :-1], rows[:, 1:], False, w.s.ttt_temp, band)[0].numpy()
    assert np.abs(book.nll[:length] - first).max() < 1e-5 and np.abs(book.nll[-200:] - plain_book.nll[-200:]).max() > 1e-3


# -- cheating --------------------------------------------------------------------------------------------------------

class Cheat:
    def __init__(self, act):
        self.act = act

    def begin(self, scorer):
        pass

    def scored(self, byte_count, loss):
        pass

    def adapt(self, book, first, last, chunk, chunks, left):
        self.act(book, first, last)
        return 1


CHEATS = {
    "rows of the next chunk": lambda book, first, last: book.rows_for_adapting(last, last + 32, 32),
    "one token too many": lambda book, first, last: book.rows_for_adapting(first, last + 1, 1),
    "all tokens": lambda book, first, last: book.rows_for_adapting(0, len(book.nll), 32),
    "tokens from the end": lambda book, first, last: book.rows_for_adapting(-40, 0, 32),
    "a second score": lambda book, first, last: book.record(first, np.zeros(last - first, np.float32)),
    "the next score": lambda book, first, last: book.record(last, np.zeros(8, np.float32)),
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
