"""Clocks and caps: what would break the rules is stopped, or said in the result, or refused before anything starts."""

import time

import pytest

import train_gpt
from train_gpt import ByteTable, Runtime, UserError, build_model, check_launch, evaluate, load_validation, window_plan


class SlowAdapter:
    """Adapts nothing, slowly."""

    def __init__(self, seconds):
        self.seconds, self.calls = seconds, 0

    def adapt(self, ledger, first, last, share_done):
        self.calls += 1
        time.sleep(self.seconds)


def adapted_evaluation(s, adapter, log=None):
    rt = Runtime(s)
    rt.log = log or rt.log
    model, _ = build_model(s, rt)
    tokens = load_validation(s)
    return evaluate(model, tokens, ByteTable(s), s, rt, "ttt", s.eval_stride, adapter, time.perf_counter())[0]


def test_an_adapter_that_is_too_slow_is_stopped_and_the_score_is_complete(tiny):
    s, lines = tiny(EVAL_WALLCLOCK_SECONDS="2"), []
    patient = adapted_evaluation(s, SlowAdapter(0.0))
    slow = SlowAdapter(0.7)
    started = time.perf_counter()
    result = adapted_evaluation(s, slow, lines.append)
    assert time.perf_counter() - started < 5 and 1 <= slow.calls <= 4
    assert any(line.startswith("ttt_sliding:stopped") for line in lines)
    assert result["sha256"] == patient["sha256"], "scored to the end, each target once"


def test_without_a_limit_every_chunk_but_the_last_is_adapted_to(tiny):
    s, adapter = tiny(EVAL_WALLCLOCK_SECONDS="0"), SlowAdapter(0.0)
    adapted_evaluation(s, adapter)
    _, first = window_plan(len(load_validation(s)) - 1, s.window, s.eval_stride)
    assert adapter.calls == len(train_gpt.chunk_plan(first, len(load_validation(s)) - 1, s.ttt_chunk_tokens)) - 1


def test_what_breaks_a_rule_is_in_the_result(run_script):
    done = run_script(VAL_LIMIT_TOKENS=320, TTT_ENABLED=0, EVAL_STRIDE=0)
    assert done.result["violations"] == ["VAL_LIMIT_TOKENS=320: not the whole validation set"]
    assert "not a legal record: VAL_LIMIT_TOKENS=320" in done.stdout


@pytest.mark.parametrize("variables, ranks, said", [
    (dict(), 5, "TRAIN_BATCH_TOKENS=384 makes 12 rows, which 5 ranks cannot share"),
    (dict(ARTIFACT_BUDGET_BYTES=100), 1, "ARTIFACT_BUDGET_BYTES=100: the code alone has"),
])
def test_refused_before_anything_starts(tiny, variables, ranks, said):
    with pytest.raises(UserError, match=said):
        check_launch(tiny(**variables), ranks)


def test_a_missing_codec_is_refused_before_training(tiny, monkeypatch):
    def absent(name):
        raise ImportError(name)
    monkeypatch.setattr(train_gpt.importlib, "import_module", absent)
    with pytest.raises(UserError, match="CODEC=zstd: the zstandard package is not installed"):
        check_launch(tiny(CODEC="zstd"), 1)
    check_launch(tiny(), 1)


def test_hessians_do_not_depend_on_the_number_of_ranks(tiny):
    """The parts of two ranks, summed by hand, are what one rank collects."""
    s = tiny(GPTQ="1", GPTQ_BATCHES="2")
    stream = train_gpt.TrainStream(s)
    sums = []
    for world in (1, 2):
        total = {}
        for rank in range(world):
            rt = Runtime(s)
            model, _ = build_model(s, rt)
            trainer = train_gpt.Trainer(model, model, s, rt)
            rt.rank, rt.world_size, rt.sum_ = rank, world, lambda x: x
            for name, h in trainer.hessians(stream, 3)[0].items():
                total[name] = total.get(name, 0) + h
        sums.append(total)
    for name, h in sums[0].items():
        train_gpt.torch.testing.assert_close(h, sums[1][name])
