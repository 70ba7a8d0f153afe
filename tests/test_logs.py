"""records/logs.py: both published forms of logs, and what their authors did to them, read alike."""

import math
import time

import pytest

import logs

COLON = """\
W0325 00:33:17.1 673732 torch/distributed/run.py:852] Setting OMP_NUM_THREADS environment variable
val_loader:shards pattern=./data/datasets/fineweb10B_sp4096/fineweb_val_*.bin tokens:44847104
world_size:8 grad_accum_steps:1
train_batch_tokens:524288 train_seq_len:4096 max_wallclock_seconds:600.000
seed:42
warmup_step:1/20
step:0/20000 val_loss:6.93 val_bpb:4.10 train_time:0ms step_avg:0.01ms
step:1/20000 train_loss:6.9 train_time:100ms step_avg:100.00ms lr_scale:1.0000
step:500/20000 train_loss:2.4 train_time:50000ms step_avg:100.00ms
step:5999/20000 val_loss:1.95 val_bpb:1.15 train_time:599900ms step_avg:100.00ms
stopping_early: wallclock_cap train_time:599900ms step:5999/20000
gptq:collected 67 Hessians in 3.5s
DIAGNOSTIC post_ema val_loss:1.9344 val_bpb:1.1457 eval_time:2255ms
Serialized model: 106178569 bytes
Code size: 79975 bytes
Total submission size: 106258544 bytes
Serialized model int6+zstd: 15896578 bytes (payload:26658144 payload_ratio:3.94x)
Total submission size int6+zstd: 15976553 bytes
final_int6_roundtrip val_loss:1.9456 val_bpb:1.1523 eval_time:7750ms
final_sliding_window stride:64 val_loss:1.9057 val_bpb:1.1287 eval_time:83873ms
final_sliding_window_exact stride:64 val_loss:1.90573712 val_bpb:1.12868785
"""
BLOCK = """\
Hyperparameters:
  logfile: logs/r42.txt
  matrix_lr: 0.026
  seed: 42
  train_batch_tokens: 524288
  vocab_size: 4096
  world_size: 8
val_tokens: 44847104
1/20000 train_loss: 6.9 train_time: 0.0m tok/s: 12770775
500/20000 train_loss: 2.4 train_time: 0.8m tok/s: 8111933
5999/20000 val_loss: 1.95 val_bpb: 1.15
stopping_early: wallclock_cap train_time: 599900ms step: 5999/20000
diagnostic pre-quantization post-ema val_loss:1.9344 val_bpb:1.1457 eval_time:6721ms
Code size (uncompressed): 131887 bytes
Code size (compressed): 79975 bytes
GPTQ:collecting Hessians from calibration data...
GPTQ:collected 67 Hessians in 3.5s
Serialized model quantized+brotli: 15896578 bytes
Total submission size quantized+brotli: 15976553 bytes
quantized val_loss:1.9456 val_bpb:1.1523 eval_time:10116ms
ttp: b777/782 bl:2.3239 bb:1.0890 rl:2.3239 rb:1.0890 dl:8452-9229 gd:0
quantized_ttt_phased val_loss:1.90573712 val_bpb:1.12868785 eval_time:83873ms
total_eval_time:83.9s
"""
FORMS = {"colon": COLON, "block": BLOCK}


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
@pytest.mark.parametrize("form", FORMS)
def test_both_forms_say_the_same(tmp_path, form, dress):
    [log] = read(tmp_path, dress(FORMS[form]))
    assert (log.seed, log.world_size, log.vocabulary, log.targets) == (42, 8, 4096, 44847104)
    assert (log.model_bytes, log.total_bytes, log.code_bytes) == (15896578, 15976553, 79975)
    assert (log.train_seconds, log.calibration_seconds, log.steps) == (599.9, 3.5, 5999)
    assert log.step_seconds == pytest.approx(0.1, rel=1e-3) and log.tokens_per_step == 524288
    assert (log.score.loss, log.score.bpb, log.score.seconds) == (1.90573712, 1.12868785, 83.873)
    assert log.key == dict(colon="final_sliding_window", block="quantized_ttt_phased")[form]
    assert [point[:2] for point in log.curve] == [(1, 6.9), (500, 2.4)]
    assert log.curve[1][2] == pytest.approx(50_000, rel=0.05) and not log.adapted
    assert log.source in (None, b"import os\nx = 1")


@pytest.mark.parametrize("first,second", [(COLON, COLON.replace("seed:42", "seed:7")),
                                          (BLOCK, BLOCK.replace("seed: 42", "seed: 7"))])
def test_runs_appended_to_one_file_are_split(tmp_path, first, second):
    runs = read(tmp_path, first + second + first)
    assert [log.seed for log in runs] == [42, 7, 42]
    assert all(log.score.bpb == 1.12868785 and len(log.curve) == 2 for log in runs)
    assert runs[1].name == "train.log (run 2 of 3)"


@pytest.mark.parametrize("line,key,loss,bpb", [
    ("final_int8_zlib_roundtrip sliding val_loss:1.9 val_bpb:1.1",
     "final_int8_zlib_roundtrip_sliding",
     1.9, 1.1),
    ("final eval: val_bpb=1.1, val_loss=1.9", "final_eval", 1.9, 1.1),
    ("post_train_ema decay:0.997 val_loss: 1.9 val_bpb: 1.1 eval_time:9ms", "post_train_ema", 1.9,
     1.1),
    ("slot: loss 1.9 bpb 1.1", "slot", 1.9, 1.1)])
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
    text = COLON.replace("final_sliding", f"{lines}\nfinal_sliding", 1)
    assert set(read(tmp_path, text)[0].adapted) == ({"final_sliding_window"} if adapted else set())


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
