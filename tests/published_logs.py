"""Logs in the two forms that others publish: name:value lines, and name: value lines after a block
of settings."""

import math

BPB = {42: 1.11941234, 1337: 1.11984321, 7: 1.11912345}
SOURCE = """import os
import sys

class Hyperparameters:
    seed = int(os.environ.get("SEED", 1337))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.04))
    ttt_lr = float(os.environ.get("TTT_LR", 0.01))

def adapt(model, val_tokens):
    return model, val_tokens
"""
TEMPLATES = {  # targets of SP1024 and of CaseOps
    "colon": (62_021_632, """\
W0325 00:33:17.1 673732 torch/distributed/run.py:852] Setting OMP_NUM_THREADS environment variable
val_loader:shards pattern=./data/datasets/fineweb10B_sp1024/fineweb_val_*.bin tokens:{targets}
world_size:8 grad_accum_steps:1
train_batch_tokens:524288 train_seq_len:4096 max_wallclock_seconds:600.000
seed:{seed}
warmup_step:1/20
step:0/20000 val_loss:6.93 val_bpb:4.10 train_time:0ms step_avg:0.01ms
step:1/20000 train_loss:6.9 train_time:100ms step_avg:100.00ms lr_scale:1.0000
step:500/20000 train_loss:2.4 train_time:50000ms step_avg:100.00ms
step:5999/20000 val_loss:1.95 val_bpb:1.1500 train_time:{train}ms step_avg:100.00ms
stopping_early: wallclock_cap train_time:{train}ms step:5999/20000
gptq:calibrated 68 layers in {calibration}s
DIAGNOSTIC post_ema val_loss:{other:.4f} val_bpb:1.1400 eval_time:2255ms
Serialized model: 106178569 bytes
Code size: {code} bytes
Total submission size: 106258544 bytes
Serialized model int6+zstd: {model} bytes (payload:26658144 payload_ratio:3.94x)
Total submission size int6+zstd: {total} bytes
final_int6_roundtrip val_loss:{other:.4f} val_bpb:1.1400 eval_time:300000ms
final_int6_sliding_window val_loss:{loss:.4f} val_bpb:{bpb:.4f} stride:64 eval_time:{evaluation}ms
final_int6_sliding_window_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}
"""),
    "block": (47_851_520, """\
Hyperparameters:
  logfile: logs/{seed}.txt
  matrix_lr: 0.026
  seed: {seed}
  train_batch_tokens: 524288
  val_doc_fraction: 1.0
  vocab_size: 8192
  world_size: 8
val_tokens: {targets}
1/20000 train_loss: 6.9 train_time: 0.0m tok/s: 12770775
500/20000 train_loss: 2.4 train_time: 0.8m tok/s: 8111933
5999/20000 val_loss: 1.95 val_bpb: 1.1500
stopping_early: wallclock_cap train_time: {train}ms step: 5999/20000
diagnostic pre-quantization post-ema val_loss:{other:.8f} val_bpb:1.1400 eval_time:400000ms
Code size (uncompressed): 131887 bytes
Code size (compressed): {code} bytes
GPTQ:collecting Hessians from calibration data...
GPTQ:collected 67 Hessians in {calibration}s
Serialized model quantized+brotli: {model} bytes
Total submission size quantized+brotli: {total} bytes
quantized val_loss:{stored:.8f} val_bpb:1.1523 eval_time:10116ms
ttp: b777/782 bl:2.3239 bb:1.0890 rl:2.3239 rb:1.0890 dl:8452-9229 gd:0
quantized_ttt_phased val_loss:{loss:.8f} val_bpb:{bpb:.8f} eval_time:{evaluation}ms
total_eval_time:{seconds:.1f}s
""")}


def log_text(seed, form="colon", code=len(SOURCE), model=15_900_000, byte_count=151_076_000,
             evaluation=400_000, **changes):
    targets, template = TEMPLATES[form]
    ratio = math.log(2) * byte_count / targets
    bpb = changes.pop("bpb", BPB.get(seed, 1.12))
    values = dict(seed=seed, targets=targets, train=595_000, calibration=0.0, code=code,
                  model=model, total=code + model, bpb=bpb, loss=bpb * ratio, other=1.14 * ratio,
                  stored=1.1523 * ratio, evaluation=evaluation, seconds=evaluation / 1000)
    return template.format(**{**values, **changes})
