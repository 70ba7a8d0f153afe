"""records/logs.py: both published forms of logs, and what their authors did to them, read alike."""

import math
import time

import pytest
from published_logs import BPB, TEMPLATES, log_text

import logs

def read(tmp_path, text, name="train.log"):
    content = text if isinstance(text, bytes) else text.encode("utf-8")
    (tmp_path / name).write_bytes(content)
    return logs.read_logs(tmp_path / name)


def stamped(text):
    return "".join(f"[2026-04-01 12:00:{i % 60:02}] {line}\n"
                   for i, line in enumerate(text.splitlines()))


@pytest.mark.parametrize("dress", [str, stamped, lambda t: t.replace("\n", "\r\n"),
                                   lambda t: f"  0%| | 0/9\r 50%|\x1b[A\r{t}",
                                   lambda t: t.encode("utf-16"),
                                   lambda t: f"import os\nx = "
                                             f"1\n{'=' * 100}\nversions\n{'=' * 100}\n{t}"],
                         ids=["plain", "stamped", "CRLF", "bar", "UTF-16", "source"])
@pytest.mark.parametrize("form, vocabulary", [("colon", 1024), ("block", 8192)])
def test_both_forms_say_the_same(tmp_path, form, vocabulary, dress):
    [log] = read(tmp_path, dress(log_text(
        42, form, code=79_975, model=15_896_578, train=599_900, calibration=3.5, loss=1.90573712,
        bpb=1.12868785, evaluation=83_873)))
    assert (log.seed, log.world_size, log.vocabulary) == (42, 8, vocabulary)
    assert log.targets == TEMPLATES[form][0]
    assert (log.model_bytes, log.total_bytes, log.code_bytes) == (15896578, 15976553, 79975)
    assert (log.train_seconds, log.calibration_seconds, log.steps) == (599.9, 3.5, 5999)
    assert log.step_seconds == pytest.approx(0.1, rel=1e-3) and log.tokens_per_step == 524288
    assert (log.score.loss, log.score.bpb, log.score.seconds) == (1.90573712, 1.12868785, 83.873)
    assert log.key == dict(colon="final_int6_sliding_window", block="quantized_ttt_phased")[form]
    assert [point[:2] for point in log.curve] == [(1, 6.9), (500, 2.4)]
    assert log.curve[1][2] == pytest.approx(50_000, rel=0.05) and not log.adapted
    assert log.source in (None, b"import os\nx = 1")


@pytest.mark.parametrize("form", TEMPLATES)
def test_runs_appended_to_one_file_are_split(tmp_path, form):
    runs = read(tmp_path, "".join(log_text(seed, form) for seed in (42, 7, 42)))
    assert [(log.seed, log.score.bpb) for log in runs] == [(s, BPB[s]) for s in (42, 7, 42)]
    assert all(len(log.curve) == 2 for log in runs)
    assert runs[1].name == "train.log (run 2 of 3)"


@pytest.mark.parametrize("line,key,loss,bpb", [
    ("final_int8_zlib_roundtrip sliding val_loss:1.9 val_bpb:1.1",
     "final_int8_zlib_roundtrip_sliding",
     1.9, 1.1),
    ("final eval: val_bpb=1.1, val_loss=1.9", "final_eval", 1.9, 1.1),
    ("post_train_ema decay:0.997 val_loss: 1.9 val_bpb: 1.1 eval_time:9ms", "post_train_ema", 1.9,
     1.1),
    ("slot: loss 1.9 bpb 1.1", "slot", 1.9, 1.1),
    ("ttt val_loss:1.9 val_bpb:1.1\ndiagnostic val_loss:2.0 val_bpb:1.2", "ttt", 1.9, 1.1)])
def test_scores_are_named_by_their_words(tmp_path, line, key, loss, bpb):
    [log] = read(tmp_path, line)
    assert (log.key, log.score.loss, log.score.bpb) == (key, loss, bpb)


@pytest.mark.parametrize("line", ["  ttt_chunk [1/474] val_loss:1.9 val_bpb:1.1",
                                  "ttt:done val_loss=1.9 val_bpb=1.1",
                                  "step:9/9 val_loss:1.9 val_bpb:1.1 train_time:9ms",
                                  "f(f'val_loss:{a} val_bpb:{b}')",
                                  "final val_loss:1.9.9 val_bpb:1.1"])
def test_what_is_no_evaluation_gives_no_score(tmp_path, line):
    assert not read(tmp_path, line)[0].scores


@pytest.mark.parametrize("lines,adapted", [
    ("ttt_epoch:1/2 loss:0.6 time:23.0s\nttt_epoch:2/2 loss:0.5 time:45s", True),
    ("  ttt_train [1] epoch=1/3 loss=2.3\n  ttt_chunk [1/474] bpb=1.2 time=1.3s", False),
    ("ttt:start chunks=474 epochs=3 lr=0.1", False), ("loss ttt epoch 1/2 of", False),
    ("TTT pass, epochs = 1/2, mean loss 0.6", True)])
def test_adapting_before_scoring_is_told_from_scoring_first(tmp_path, lines, adapted):
    text = log_text(42).replace("final_int6_sliding", f"{lines}\nfinal_int6_sliding", 1)
    assert [*read(tmp_path, text)[0].adapted] == ["final_int6_sliding_window"] * adapted


@pytest.mark.parametrize("name,said,seed", [
    ("train_seed7.log", "", 7), ("log_s42.txt", "", 42), ("train_log_bank_1337.txt", "", 1337),
    ("train.log", "", None), ("train_s7.log", "seed:42", None), ("train_seed7.log", "seed:42", 7)])
def test_a_seed_in_the_name(tmp_path, name, said, seed):
    assert read(tmp_path, said, name)[0].named_seed == seed


@pytest.mark.parametrize("line", [
    "ttt_" * 100 + " epoch 1/1" * 50 + " los loss" * 9, "ttt_" * 100 + " epoch 1/1" * 50 + "_loss",
    "ttt " * 200 + "epoch " * 30 + "_loss", "val_loss:1 " * 89 + "bpb", "loss" + " " * 990 + "bpb",
    "loss:1" + " |," * 300 + "bpb", "loss: " * 160 + "bpb:", "bpb:1 " * 160,
    "device: " + "a:" * 490, "gptq calibrat " * 70, "Total submission size " * 45, "step: " * 160,
    "(Code size " * 90])
def test_no_line_takes_long(tmp_path, line):
    started = time.perf_counter()
    read(tmp_path, "\n".join([line] * 50))
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize("a,b,same", [
    ("1.12", "1.1194", True), ("1.1195", "1.1194", False), ("1.1195", "1.11945", True),
    (1.5, "1.5", True), (100, "99.7", True), (100, "99.4", False), ("nan", "1.0", False)])
def test_numbers_are_compared_to_their_printed_digits(a, b, same):
    assert logs.agree(a, b) == logs.agree(b, a) == same


@pytest.mark.parametrize("content", [b"", b"\xff" * 99, b"=" * 100, b"\n" + b"=" * 100
                                     + b"\nstep:1/", b"\x00"])
def test_any_bytes_are_read(tmp_path, content):
    (tmp_path / "a.log").write_bytes(content)
    [log] = logs.read_logs(tmp_path / "a.log")
    assert not log.scores and log.train_seconds is None and math.isnan(logs.half_unit("nan"))
    with pytest.raises(OSError, match="missing.log"):
        logs.read_logs(tmp_path / "missing.log")
