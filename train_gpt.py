"""Train a small GPT for at most 600 s, pack it into 16,000,000 bytes, read it back, score it in bits per byte.

The claim: one file does the whole job of a parameter-golf submission. It trains on FineWeb tokens, quantizes and
packs the weights so that code + model fit the byte cap with every seed, reads that file back from disk and scores it
on the fixed validation tokens, adapting to tokens only after they were scored. Settings are environment variables.

    torchrun --standalone --nproc_per_node=8 train_gpt.py     the defaults, on 8×H100
    PRESET=demo python train_gpt.py                           the same job, small, on two CPU cores
    python train_gpt.py --help | --dry-run                    every setting | resolve and check all, train nothing

Contents: 1 Settings · 2 Runtime · 3 Data · 4 Bits per byte · 5 Model · 6 Optimizers · 7 Schedules ·
8 Weight averaging · 9 Quantizer · 10 Artifact · 11 Evaluation · 12 Training · 13 main

Shape letters: B batch, T time, D model, H query heads, K key/value heads, E head dim, V vocabulary, R rows, C columns.
A "target" is a validation token that is predicted: target i is token i+1, predicted from tokens 0..i.
"""
from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import importlib
import io
import json
import lzma
import math
import os
import pickle
import platform
import resource
import signal
import struct
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

LAUNCHED = time.perf_counter()  # before torch is imported, which takes seconds
import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel
from torch.nn.utils import parametrize

try:  # comes with the CUDA builds of torch
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

SCRIPT = Path(__file__).resolve()
SHIPPED = SCRIPT.read_bytes()  # the file as it is executed, whose bytes count: an edit during a run changes nothing
SOURCE = globals().get("UNPACKED", SHIPPED)  # what a packed file unpacks to, for the log and for readers


class UserError(Exception):
    """Something the user can mend; the message names what, the value, and the way out."""


# ---- 1. Settings: the only section that reads the environment --------------------------------------------------------

def setting(section, default, unit, meaning, off="", low=None, high=None, choices=None):
    """One environment variable: its section in --help, default, unit, meaning, the value that is "off", its range."""
    return field(default=default, metadata=dict(
        section=section, unit=unit, meaning=meaning, off=off, low=low, high=high, choices=choices))


run, data, arch, opt, sched, quant, evaluation = (functools.partial(setting, name) for name in (
    "Run", "Data", "Model", "Optimizers", "Schedule", "Quantizer and artifact", "Evaluation"))
FLAG = (0, 1)


@dataclass(frozen=True)
class Settings:
    """Every setting, resolved and checked. A field is read from the variable of the same name in capitals.

    The defaults join what is known to help the 11-layer, SP1024 family; where a default differs from the common base
    (#414), the comment gives the published reason (bits per byte, lower is better).
    """
    preset: str = run("", "name", "row of the preset table to start from", off="empty")
    run_id: str = run("", "name", "names logs/<RUN_ID>.txt and .json", off="empty: a fresh uuid4")
    seed: int = run(1337, "integer", "seeds weights and the order of training tokens", low=0, high=2**31 - 1)
    device: str = run("auto", "name", "auto takes a GPU where there is one", choices=("auto", "cuda", "cpu"))
    precision: str = run("auto", "name", "compute type; fp32 includes Newton–Schulz; auto: bf16 on a GPU, else fp32",
                         choices=("auto", "bf16", "fp32"))
    compile: str = run("auto", "name", "torch.compile; auto: on a GPU only", off="0", choices=("auto", "0", "1"))
    attention: str = run("auto", "name", "attention back end; auto: the fastest here; sdpa: PyTorch's own choice",
                         choices=("auto", "fa3", "fa4", "fa2", "cudnn", "flash", "flex", "sdpa"))
    kernels: str = run("auto", "name", "Triton kernels for the MLP and the loss; auto: where they are faster here",
                       choices=("auto", "plain", "triton"))
    out_dir: str = run(".", "folder", "where the artifact and logs/ are written")
    eval_only: str = run("", "file", "score this artifact with the settings stored in it, train nothing", off="empty")
    scores_path: str = run("", "file.npy", "keep the nll (nats, float32) of every target of the last evaluation",
                           off="empty")

    checkpoint_every_seconds: float = run(0.0, "s", "of training between checkpoints in OUT_DIR/checkpoints; SIGTERM and "
                                          "Ctrl-C write one in any case, until the last step", off="0", low=0)
    resume: str = run("", "name", "auto: go on from the last whole checkpoint or artifact of OUT_DIR, if any", off="empty",
                      choices=("", "auto"))
    nonfinite: str = run("stop", "name", "at a gradient that is not finite; skip leaves that step out and waits for the GPU at "
                         "every one", choices=("stop", "skip"))

    data_path: str = data("./data/datasets/fineweb10B_sp1024", "folder", "holds fineweb_{train,val}_*.bin")
    tokenizer_path: str = data("./data/tokenizers/fineweb_1024_bpe.model", "file", "SentencePiece model of the shards")
    vocab_size: int = data(1024, "pieces", "must equal the tokenizer's", low=2, high=65535)
    bos_token: int = data(1, "token id", "begins every document", low=0)
    train_seq_len: int = data(2048, "tokens", "length of a training row", low=2)
    train_batch_tokens: int = data(786432, "tokens", "per optimizer step, over all ranks", low=2)
    micro_batch_tokens: int = data(98304, "tokens", "most a rank holds in one pass; lower it when memory runs out", low=2)
    # Shuffled rows instead of sequential shards (#1493's line of records).
    train_order: str = data("shuffled", "name", "rows shuffled inside shuffled shards, or as they lie on disk",
                            choices=("shuffled", "sequential"))
    val_limit_tokens: int = data(0, "tokens", "score only the first so many: quick, but no legal score", off="0", low=0)

    num_layers: int = arch(11, "blocks", "depth", low=1, high=64)
    unique_layers: int = arch(0, "cores", "block i uses the matrices of core i mod this (#537)", off="0: all own", low=0)
    model_dim: int = arch(512, "channels", "width D", low=8)
    num_heads: int = arch(8, "heads", "query heads H", low=1)
    num_kv_heads: int = arch(4, "heads", "key/value heads K", low=1)
    mlp_mult: float = arch(3.0, "× D", "hidden width of the MLP", low=0.125, high=16)
    # LeakyReLU(0.5)² −0.002 to −0.003 (#549, #657). 0.75 gained 0.0018 more in one sweep, nothing against #549.
    leaky_slope: float = arch(0.5, "slope", "MLP activation is LeakyReLU(slope)²", off="0: relu²", low=0, high=1)
    logit_softcap: float = arch(30.0, "logit", "logits are softcap·tanh(logits/softcap)", off="0", low=0)
    tied_embed_init_std: float = arch(0.005, "std", "of the initial token embedding, which is also the head", low=0)
    qk_gain_init: float = arch(4.0, "factor", "initial gain of each query head", low=0)  # 1.5 → 4: −0.0039
    rope_base: float = arch(10000.0, "base", "of the rotary frequencies", low=1)
    rope_dims: int = arch(16, "channels", "of each head that rotate (16 of 64: −0.0023 with LN_SCALE)",
                          off="0: all", low=0)
    rope_ntk_reference: int = arch(1024, "tokens", "rows longer than this stretch the rotary base", off="0", low=0)
    ln_scale: int = arch(1, "flag", "block i reads its input times 1/√(i+1)", off="0", choices=FLAG)
    xsa_last_n: int = arch(11, "blocks", "the last so many use exclusive self-attention", off="0", low=0)  # −0.0017
    unet_skips: int = arch(1, "flag", "first-half block outputs are added in the second half", off="0", choices=FLAG)
    resid_mix: int = arch(1, "flag", "each block mixes the normalized embedding back in", off="0", choices=FLAG)
    # Mixing across documents is a known mistake: bos keeps the gate shut at the first token of a document.
    smear_gate: str = arch("bos", "name", "mix in the previous token; bos: not across documents", off="0",
                           choices=("0", "1", "bos"))
    bigram_vocab_size: int = arch(2048, "buckets", "of the hashed bigram embedding", off="0", low=0)
    bigram_dim: int = arch(128, "channels", "of the bigram embedding", low=1)
    trigram_vocab_size: int = arch(0, "buckets", "of a hashed trigram embedding", off="0", low=0)
    trigram_dim: int = arch(128, "channels", "of the trigram embedding", low=1)
    ve_enabled: int = arch(1, "flag", "shared value embedding", off="0", choices=FLAG)
    ve_dim: int = arch(128, "channels", "of the value embedding", low=1)
    ve_layers: str = arch("9,10", "block list", "blocks whose values get it", off="empty")
    # −0.0010 (value residual) and −0.0005 to −0.0010 (gate) at full scale, −0.015 and −0.003 in short runs.
    value_residual: str = arch("pair", "name", "V ← a·V₀ + b·V; 1: pair; embed: block output + λ·x₀", off="0",
                               choices=("0", "1", "pair", "sigmoid", "shortcut", "half", "embed"))
    gated_attention: str = arch("head", "name", "gate on attention output; 1 means head", off="0",
                                choices=("0", "1", "head", "scalar"))

    matrix_lr: float = opt(0.025, "per step", "Muon, matrices", low=0)
    scalar_lr: float = opt(0.025, "per step", "AdamW, scales, gates and mixes", low=0)
    tied_embed_lr: float = opt(0.035, "per step", "AdamW, embedding tables", low=0)
    proj_optimizer: str = opt("muon", "name", "of the two small embeddings' projections", choices=("muon", "adamw"))
    muon_wd: float = opt(0.04, "× lr", "decoupled weight decay of Muon", off="0", low=0)
    adam_wd: float = opt(0.04, "× lr", "decoupled weight decay of AdamW", off="0", low=0)
    muon_momentum: float = opt(0.99, "factor", "Nesterov momentum after its warm-up", low=0, high=0.9999)
    muon_momentum_warmup_start: float = opt(0.92, "factor", "momentum at step 0", low=0, high=0.9999)
    muon_momentum_warmup_steps: int = opt(1500, "steps", "linear momentum warm-up", off="0", low=0)
    muon_backend_steps: int = opt(5, "iterations", "of Newton–Schulz", low=1, high=12)
    # Polar Express with a floor of 0.1 on the learning rate and a fused loss: −0.0017 together (late records).
    muon_coefficients: str = opt("polar", "name", "Newton–Schulz coefficients", choices=("classic", "polar"))
    beta1: float = opt(0.9, "factor", "AdamW", low=0, high=0.99999)
    beta2: float = opt(0.95, "factor", "AdamW", low=0, high=0.99999)
    adam_eps: float = opt(1e-8, "epsilon", "AdamW", low=0)
    grad_clip_norm: float = opt(0.3, "norm", "of all gradients, after their reduction over ranks", off="0", low=0)

    iterations: int = sched(20000, "steps", "upper bound", low=0)
    max_wallclock_seconds: float = sched(600.0, "s", "training clock; a step that would pass it is not begun",
                                         off="0: ITERATIONS alone decides", low=0)
    warmup_steps: int = sched(20, "steps", "on random tokens before the clock starts, then everything is restored",
                              off="0", low=0)
    warmdown_iters: int = sched(3500, "steps", "linear fall of the learning rate at the end", off="0", low=0)
    lr_floor: float = sched(0.1, "× lr", "the warmdown ends here instead of at zero", off="0", low=0, high=1)
    ema_enabled: int = sched(1, "flag", "average the weights exponentially, bias-corrected (−0.0006)", off="0",
                             choices=FLAG)
    ema_decay: float = sched(0.997, "per step", "of the average", low=0, high=0.999999)
    swa_enabled: int = sched(0, "flag", "average snapshots late in the warmdown; with EMA too: the mean of both",
                             off="0", choices=FLAG)
    swa_every: int = sched(50, "steps", "between snapshots", low=1)
    swa_start_frac: float = sched(0.2, "share", "snapshots begin when less than this of the warmdown is left", low=0, high=1)
    qat_enabled: int = sched(0, "flag", "fake quantization from the first step", off="0", choices=FLAG)
    late_qat_threshold: float = sched(0.15, "share", "fake quantization begins when less than this of the warmdown "
                                      "is left", off="0", low=0, high=1)
    qat_bits: int = sched(6, "bits", "of fake quantization, by the maximum of the row", choices=(4, 5, 6, 7, 8))
    crownq_lambda: float = sched(0.0, "× loss", "penalty on the quantization error a row will have (CROWN-Q)", off="0",
                                 low=0)
    crownq_warmdown_only: int = sched(1, "flag", "the penalty waits for fake quantization", off="0", choices=FLAG)
    val_loss_every: int = sched(4000, "steps", "between validations while training", off="0: only after the last step",
                                low=0)
    train_log_every: int = sched(500, "steps", "between log lines after step 10", low=1)

    # The range of codes. Beyond the finest steps the fit decides what each takes in the file, and a wide range costs nothing.
    attn_bits: int = quant(8, "bits", "attention matrices; 16 keeps fp16", choices=(4, 5, 6, 7, 8, 16))
    mlp_bits: int = quant(8, "bits", "MLP matrices; 16 keeps fp16", choices=(4, 5, 6, 7, 8, 16))
    embed_bits: int = quant(8, "bits", "token and value embedding tables", choices=(4, 5, 6, 7, 8, 16))
    bigram_bits: int = quant(8, "bits", "bigram and trigram tables", choices=(4, 5, 6, 7, 8, 16))
    proj_bits: int = quant(8, "bits", "projections of the small embeddings, and gates", choices=(4, 5, 6, 7, 8, 16))
    fp16_keep_name_patterns: str = quant("", "name parts", "tensors kept as fp16, commas between", off="empty")
    gptq_lite: int = quant(1, "flag", "search the clip of every row; off: the row's maximum", off="0", choices=FLAG)
    quant_clip_scope: str = quant("row", "name", "search per row, or one quantile for a whole matrix as ancestors did",
                                  choices=("row", "matrix"))
    quant_clip_std: float = quant(0.0, "deviations", "clip of int4 to int7 rows, not searched (SDClip; published 12.85)",
                                  off="0", low=0)
    quant_clip_std_int8: float = quant(0.0, "deviations", "the same for int8 rows (published 20)", off="0", low=0)
    quant_fit: str = quant("level", "name", "to fit the budget, level: no step below a common one, weighted by what errors "
                           "cost where GPTQ calibrates; scale: all steps times one factor", choices=("level", "scale"))
    quant_step_floor: float = quant(0.0, "weight", "least step of int4–int7 rows; 0.03226 (1/31) as ancestors did",
                                    off="0", low=0)
    prune_frac: float = quant(0.0, "share", "of the smallest weights of each matrix and table set to zero", off="0",
                              low=0, high=0.9)
    gptq: int = quant(1, "flag", "calibrate: full GPTQ, and steps by what errors cost", off="0", choices=FLAG)
    gptq_batches: int = quant(8, "batches", "of TRAIN_BATCH_TOKENS, over all ranks, for the Hessians", low=1)
    gptq_text: str = quant("train", "name", "training tokens, inside the training clock, or text that the model writes itself",
                           choices=("train", "self"))
    gptq_self_rows: int = quant(64, "rows", "of TRAIN_SEQ_LEN with GPTQ_TEXT=self, over all ranks", low=1)
    gptq_reserve_seconds: float = quant(10.0, "s", "of the training clock kept for the Hessians", low=0)
    gptq_act_order: int = quant(0, "flag", "columns in falling order of the Hessian's diagonal", off="0", choices=FLAG)
    gptq_damp: float = quant(0.01, "× mean diagonal", "added to the Hessian's diagonal", low=1e-6, high=1)
    codec: str = quant("auto", "name", "of the codes: rans, lzma, auto: the smaller; zstd needs the zstandard package",
                       choices=("auto", "rans", "lzma", "zstd"))
    artifact_budget_bytes: int = quant(16_000_000, "bytes", "cap on code + model; the model gets what the code leaves",
                                       low=1)

    eval_seq_len: int = evaluation(0, "tokens", "length of a scoring window", off="0: TRAIN_SEQ_LEN", low=0)
    eval_stride: int = evaluation(64, "tokens", "scored per sliding window; banded scoring reads only if it is 0",
                                  off="0: nothing with full context", low=0)
    # Sliding windows read every token 32 times; banded scoring once or twice, for the same score or a better one.
    eval_attention: str = evaluation("banded", "name", "window: EVAL_STRIDE tokens per pass; banded: a long segment per "
                                     "pass, each layer seeing the last EVAL_SEQ_LEN keys", choices=("window", "banded"))
    eval_segment: int = evaluation(0, "tokens", "scored per banded segment", off="0: 2 × EVAL_SEQ_LEN", low=0)
    eval_prefix: int = evaluation(0, "tokens", "of context before a banded segment", off="0: EVAL_SEQ_LEN", low=0)
    eval_wallclock_seconds: float = evaluation(600.0, "s", "from the opening of the artifact on; TTT stops adapting when "
                                               "scoring what is left would pass it", off="0: no limit", low=0)
    eval_batch_seqs: int = evaluation(32, "windows", "per rank and pass", low=1)
    ttt_enabled: int = evaluation(1, "flag", "score-first test-time training over the sliding windows (−0.0021 to "
                                  "−0.0033)", off="0", choices=FLAG)
    ttt_optimizer: str = evaluation("sgd", "name", "with TTT_MOMENTUM; AdamW (0.9, 0.999); Muon on matrices alone",
                                    choices=("sgd", "adamw", "muon"))
    ttt_params: str = evaluation("all", "name", "tail: last blocks, scales, token table; scalars: scales, gates, mixes; "
                                 "lora: low-rank additions to TTT_LORA_MATRICES", choices=("all", "tail", "scalars", "lora"))
    ttt_lora_rank: int = evaluation(8, "rank", "of the low-rank additions", low=1, high=256)
    ttt_lora_matrices: str = evaluation("q,v,o,up,down", "matrix names", "that get low-rank additions, commas between")
    ttt_decay: float = evaluation(0.0, "× lr", "pull back towards the artifact's weights per step", off="0", low=0)
    ttt_lr: float = evaluation(0.002, "per step", "falling by a cosine over the chunks", low=0)
    ttt_lr_floor: float = evaluation(0.0, "× lr", "where that cosine ends", low=0, high=1)
    ttt_intra_cosine: int = evaluation(0, "flag", "times a cosine inside each chunk", off="0", choices=FLAG)
    ttt_proj_lr_mult: float = evaluation(1.0, "× lr", "of the MLP's down matrices", low=0)
    ttt_fc_lr_mult: float = evaluation(1.0, "× lr", "of the MLP's up matrices", low=0)
    ttt_attn_lr_mult: float = evaluation(1.0, "× lr", "of the attention matrices", low=0)
    ttt_embed_lr_mult: float = evaluation(1.0, "× lr", "of the embedding tables", low=0)
    ttt_temp: float = evaluation(1.0, "temperature", "fixed, on the logits while TTT scores and trains", low=0.1, high=10)
    ttt_momentum: float = evaluation(0.9, "factor", "SGD", low=0, high=0.9999)
    ttt_epochs: int = evaluation(3, "passes", "over each scored chunk", low=0)
    ttt_chunk_tokens: int = evaluation(32768, "tokens", "scored before each adaptation", low=2)
    ttt_freeze_blocks: int = evaluation(0, "blocks", "the first so many are not adapted", off="0", low=0)
    ttt_unfreeze_blocks: int = evaluation(2, "blocks", "the last so many with TTT_PARAMS=tail", low=0)
    ttt_batch_seqs: int = evaluation(256, "rows", "per TTT step, over all ranks (eight ranks held 8 × 32)", low=1)
    ttt_grad_clip: float = evaluation(1.0, "norm", "after the reduction over ranks", off="0", low=0)

    @property
    def head_dim(self):
        return self.model_dim // self.num_heads

    @property
    def mlp_hidden(self):
        return int(self.mlp_mult * self.model_dim)

    @property
    def window(self):
        """Length of a scoring window, tokens."""
        return self.eval_seq_len or self.train_seq_len

    @property
    def scoring_plan(self):
        """(tokens read, tokens scored, keys seen by each layer or 0 for all) of a pass of the full-context evaluation."""
        if self.eval_attention == "banded" and self.eval_stride:
            segment = self.eval_segment or 2 * self.window
            return (self.eval_prefix or self.window) + segment, segment, self.window
        return self.window, self.eval_stride, 0

    @property
    def cores(self):
        return self.unique_layers or self.num_layers

    @property
    def ve_blocks(self):
        """Blocks that get the value embedding, ascending."""
        return [int(i) for i in self.ve_layers.split(",") if i.strip()] if self.ve_enabled else []

    @property
    def lora_matrices(self):
        return [name.strip() for name in self.ttt_lora_matrices.split(",") if name.strip()]

    @property
    def xsa_blocks(self):
        """Blocks with exclusive self-attention; counted over cores where blocks share them, as #537 did."""
        return [i for i in range(self.num_layers) if i % self.cores >= self.cores - self.xsa_last_n]

    @property
    def quant_label(self):
        """Name of the quantized model in log keys and results: int6, or int5_6 for int5 MLP and int6 attention."""
        return f"int{self.mlp_bits}" if self.mlp_bits == self.attn_bits else f"int{self.mlp_bits}_{self.attn_bits}"


# The common base of the ancestors (#414). Each preset's line in the README says what ours does differently.
_PR414 = dict(
    train_order="sequential", leaky_slope=0.0, qk_gain_init=1.5, xsa_last_n=4, smear_gate="1", value_residual="0",
    gated_attention="0", muon_coefficients="classic", lr_floor=0.0, swa_enabled=1, quant_fit="scale", codec="lzma",
    gptq=0, attn_bits=6, mlp_bits=6, proj_bits=16, eval_attention="window", ttt_enabled=0)
# For two CPU cores: short rows and steps.
_SMALL = dict(
    train_seq_len=256, train_batch_tokens=4096, micro_batch_tokens=4096, model_dim=128, num_heads=4, num_kv_heads=2,
    rope_ntk_reference=0, bigram_dim=64, ve_dim=64, warmup_steps=2, warmdown_iters=1000, ema_decay=0.99, muon_momentum=0.95,
    muon_momentum_warmup_steps=300, val_loss_every=0, train_log_every=50, gptq_reserve_seconds=5.0,
    ttt_chunk_tokens=8192)
_PR549 = dict(_PR414, leaky_slope=0.5, bigram_vocab_size=1536, proj_optimizer="adamw", ttt_enabled=1)
PRESETS = {  # a row holds only what differs from the defaults, or from the row it begins with
    "demo": dict(
        _SMALL, data_path="./data/datasets/demo", tokenizer_path="./data/tokenizers/demo_1024_bpe.model", run_id="demo",
        train_batch_tokens=2048, num_layers=3, xsa_last_n=3, ve_layers="1,2", bigram_vocab_size=8192,
        trigram_vocab_size=8192, trigram_dim=64, max_wallclock_seconds=170.0, warmdown_iters=800, ema_decay=0.97,
        muon_momentum_warmup_steps=100, ttt_chunk_tokens=2048),
    "laptop": dict(_SMALL, max_wallclock_seconds=900.0),
    "pr414": _PR414,
    "pr549": _PR549,
    "pr1092": dict(_PR549, leaky_slope=0.75, bigram_vocab_size=2048, xsa_last_n=11, max_wallclock_seconds=580.0,
                   ttt_lr=0.03),
    "pr657": dict(_PR414, leaky_slope=0.5, value_residual="sigmoid"),
    "pr490": dict(
        _PR414, leaky_slope=0.5, value_residual="pair", gated_attention="head", xsa_last_n=0, rope_dims=0, ln_scale=0,
        ve_enabled=0, bigram_vocab_size=4096, swa_enabled=0, iterations=9000, warmdown_iters=1200, muon_momentum=0.95,
        muon_momentum_warmup_start=0.85, muon_momentum_warmup_steps=500, late_qat_threshold=0.0, gptq=1, prune_frac=0.02,
        val_loss_every=1000, train_log_every=200, ttt_enabled=1, ttt_optimizer="adamw", ttt_params="tail", ttt_lr=1e-4,
        ttt_chunk_tokens=131072),
    "pr537": dict(
        _PR414, leaky_slope=0.5, unique_layers=10, seed=42, iterations=5200, warmdown_iters=3000, adam_wd=0.01,
        ema_enabled=0, late_qat_threshold=0.1, mlp_bits=5, bigram_bits=6, proj_bits=6,
        fp16_keep_name_patterns="tok_emb,cores.2.attn.k", gptq_lite=0, prune_frac=0.03, codec="zstd", val_loss_every=500,
        train_log_every=100, ttt_enabled=1, ttt_epochs=30, ttt_freeze_blocks=2, ttt_proj_lr_mult=3.0, ttt_fc_lr_mult=0.5,
        ttt_intra_cosine=1),
}

# Published names that are spelt otherwise here: our name, or what each of its values stands for. One that switches off wins
# over another for the same setting; one that switches on leaves it the other's value.
_VRL = {"0": {"VALUE_RESIDUAL": "0"}, "1": {"VALUE_RESIDUAL": "sigmoid"}}
ALIASES = {
    "VRL_ENABLED": _VRL, "VRL": _VRL, "GA_ENABLED": "GATED_ATTENTION", "WEIGHT_DECAY": "MUON_WD",
    "TTT_TEMPERATURE": "TTT_TEMP", "QAT_THRESHOLD": "LATE_QAT_THRESHOLD",
    "LATE_QAT": {"0": {"LATE_QAT_THRESHOLD": "0"}, "1": {"LATE_QAT_THRESHOLD": "0.15"}},
    "MLP_ACTIVATION": {"relu_sq": {"LEAKY_SLOPE": "0"}, "leaky_relu_sq": {"LEAKY_SLOPE": "0.5"}},
    "TTT_PERLAYER_LR": {"0": {"TTT_PROJ_LR_MULT": "1", "TTT_FC_LR_MULT": "1"},
                        "1": {"TTT_PROJ_LR_MULT": "3", "TTT_FC_LR_MULT": "0.5"}},
    "ALL_INT5": {"0": {}, "1": {"ATTN_BITS": "5", "MLP_BITS": "5"}},
}

# Published names that nothing here obeys: name → (the value that changes nothing and is let through, why not others).
REFUSED = {
    "DTG_ENABLED": ("0", "the dynamic token gate never gained anything where it was published"),
    "MTP_NUM_HEADS": ("0", "multi-token heads were declared and never used"),
    "MTP_LOSS_WEIGHT": ("0.2", "multi-token heads were declared and never used"),
    "LAWA_ENABLED": ("0", "LAWA was declared and never used: EMA_ENABLED or SWA_ENABLED average the weights"),
    "LAWA_K": ("10", "see LAWA_ENABLED"), "LAWA_FREQ": ("100", "see LAWA_ENABLED"),
    "TIE_EMBEDDINGS": ("1", "an untied head costs bytes and was never used: the head is the token table"),
    "EMBED_LR": ("0.6", "belongs to an untied head: set TIED_EMBED_LR"),
    "HEAD_LR": ("0.008", "belongs to an untied head: set TIED_EMBED_LR"),
    "GRAD_QUANT": ("0", "its published code read it and did nothing with it"),
    "MUON_BETA2": ("0.95", "its published code read it and did nothing with it"),
    "VAL_BATCH_SIZE": ("524288", "set EVAL_BATCH_SEQS, windows per rank and pass"),
    "XSA_START_LAYER": ("-4", "set XSA_LAST_N, counted from the end"),
    "QUANT_EVAL_EVERY": ("0", "the quantized model is scored once, from the file"),
    "INT8_CLIP_PERCENTILE": ("99.99984", "the clip of every row is searched: GPTQ_LITE"),
    "CONTROL_TENSOR_NAME_PATTERNS": ("", "which tensor goes where is a table by kind: see --dry-run"),
    "INT8_KEEP_FLOAT_FP32_NAME_PATTERNS": ("", "small tensors are fp16; FP16_KEEP_NAME_PATTERNS keeps others"),
}

# What the launcher, the libraries and the shell set: never ours, however close to one of our names.
FOREIGN_PREFIXES = ("TORCH", "PYTORCH", "NCCL", "CUDA", "OMP", "MKL", "GLOO", "TRITON", "PYTHON", "HF_", "NVIDIA", "LC_",
                    "XDG_", "SSH_", "SLURM", "KMP_", "UCX", "FI_", "OPAL", "OMPI", "PMI", "LD_", "GPG_", "DBUS_")
OWN_PREFIXES = ("TTT_", "MUON_", "EMA_", "SWA_", "XSA_", "BIGRAM_", "ROPE_", "QAT_", "VE_", "EVAL_", "WARMDOWN_")


def parse_value(spec, text):
    """The value of field `spec` from its text; raises ValueError with the constraint that it breaks."""
    kind, meta = type(spec.default), spec.metadata
    text = str(text).strip()
    if kind is not str:
        text = {"true": "1", "false": "0"}.get(text.lower(), text) if meta["choices"] == FLAG else text
        try:
            value = kind(text)
        except ValueError:
            raise ValueError(f"is not {'a whole number' if kind is int else 'a number'} ({meta['unit']})") from None
    else:
        value = text
    if meta["choices"] and value not in meta["choices"]:
        raise ValueError(f"must be one of {', '.join(map(str, meta['choices']))}")
    low, high = meta["low"], meta["high"]
    if kind is not str and not ((low is None or value >= low) and (high is None or value <= high) and abs(value) < 2**63):
        raise ValueError(f"is out of range: {low if low is not None else '-inf'} to {high if high is not None else 'inf'}"
                         f" ({meta['unit']})")
    return value


def near_misses(environ, known):
    """Problems with variables that nobody declared but that look like ours."""
    problems = []
    for name in sorted(environ):
        if name in known or name.startswith(FOREIGN_PREFIXES) or not name.isupper():
            continue
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.86 if len(name) > 6 else 0.88)
        if close:
            problems.append(f"{name}={environ[name]}: no such setting; did you mean {close[0]}?")
        elif name.startswith(OWN_PREFIXES):
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            problems.append(f"{name}={environ[name]}: no such setting{'; near it: ' + ', '.join(near) if near else ''}")
    return problems


def contradictions(s):
    """Problems with combinations of settings that are each fine alone."""
    T, problems = s.train_seq_len, []

    def need(condition, message):
        if not condition:
            problems.append(message)

    need(s.model_dim % s.num_heads == 0, f"MODEL_DIM={s.model_dim} must be a multiple of NUM_HEADS={s.num_heads}")
    need(s.num_heads % s.num_kv_heads == 0, f"NUM_HEADS={s.num_heads} must be a multiple of NUM_KV_HEADS={s.num_kv_heads}")
    need(s.head_dim % 2 == 0, f"MODEL_DIM/NUM_HEADS={s.head_dim} must be even for rotary embeddings")
    need(s.rope_dims % 2 == 0 and s.rope_dims <= s.head_dim,
         f"ROPE_DIMS={s.rope_dims} must be even and at most MODEL_DIM/NUM_HEADS={s.head_dim}")
    need((s.rope_dims or s.head_dim) != 2 or not s.rope_ntk_reference,
         f"ROPE_DIMS={s.rope_dims}: two rotating channels cannot be stretched: set ROPE_NTK_REFERENCE=0")
    need(s.xsa_last_n <= s.cores, f"XSA_LAST_N={s.xsa_last_n} exceeds the {s.cores} blocks with matrices of their own")
    need(s.unique_layers <= s.num_layers, f"UNIQUE_LAYERS={s.unique_layers} exceeds NUM_LAYERS={s.num_layers}")
    need(s.ttt_freeze_blocks <= s.num_layers, f"TTT_FREEZE_BLOCKS={s.ttt_freeze_blocks} exceeds NUM_LAYERS={s.num_layers}")
    need(s.bigram_vocab_size != 1, "BIGRAM_VOCAB_SIZE=1 leaves no bucket beside the first position's: 0 or at least 2")
    need(s.bos_token < s.vocab_size, f"BOS_TOKEN={s.bos_token} is outside of VOCAB_SIZE={s.vocab_size}")
    need(s.train_batch_tokens % T == 0, f"TRAIN_BATCH_TOKENS={s.train_batch_tokens} must be a multiple of TRAIN_SEQ_LEN={T}")
    need(s.micro_batch_tokens >= T, f"MICRO_BATCH_TOKENS={s.micro_batch_tokens} must hold a row of TRAIN_SEQ_LEN={T}")
    need(s.scoring_plan[2] or s.eval_stride <= s.window,
         f"EVAL_STRIDE={s.eval_stride} exceeds the scoring window of {s.window} tokens")
    need(not s.ttt_enabled or s.eval_stride, "TTT_ENABLED=1 scores with a full context: set EVAL_STRIDE, or TTT_ENABLED=0")
    row = max(T, s.window, s.scoring_plan[1])
    need(not s.ttt_enabled or s.ttt_chunk_tokens >= row,
         f"TTT_CHUNK_TOKENS={s.ttt_chunk_tokens} must hold {row} tokens, a row and what a pass scores: raise it, lower "
         "EVAL_SEGMENT, or set TTT_ENABLED=0")
    need(len(s.run_id.encode()) <= 200 and "/" not in s.run_id,
         f"RUN_ID={s.run_id} is too long or no file name: at most 200 bytes")
    need(not s.scores_path or Path(s.scores_path).suffix == ".npy", f"SCORES_PATH={s.scores_path} must name a file .npy")
    need(s.iterations or s.max_wallclock_seconds or s.eval_only, "ITERATIONS=0 and MAX_WALLCLOCK_SECONDS=0: nothing ends")
    need(not s.gptq or not s.max_wallclock_seconds or s.gptq_reserve_seconds < s.max_wallclock_seconds,
         f"GPTQ_RESERVE_SECONDS={s.gptq_reserve_seconds} leaves nothing of MAX_WALLCLOCK_SECONDS={s.max_wallclock_seconds}")
    need(s.ttt_params != "lora" or set(s.lora_matrices) <= {"q", "k", "v", "o", "up", "down"} and s.lora_matrices,
         f"TTT_LORA_MATRICES={s.ttt_lora_matrices} must name some of q, k, v, o, up, down with commas between")
    need(s.ttt_params not in ("lora", "scalars") or s.ttt_optimizer != "muon",
         f"TTT_PARAMS={s.ttt_params}: TTT_OPTIMIZER=muon is for whole matrices; take sgd or adamw")
    need(s.ttt_params != "tail" or s.ttt_unfreeze_blocks <= s.num_layers,
         f"TTT_UNFREEZE_BLOCKS={s.ttt_unfreeze_blocks} exceeds NUM_LAYERS={s.num_layers}")
    need(s.trigram_vocab_size != 1, "TRIGRAM_VOCAB_SIZE=1 leaves no bucket beside that of row beginnings: 0 or at least 2")
    try:
        bad = [i for i in s.ve_blocks if not 0 <= i < s.num_layers]
        need(not bad and len(set(s.ve_blocks)) == len(s.ve_blocks),
             f"VE_LAYERS={s.ve_layers} must name different blocks of 0..{s.num_layers - 1}, or set VE_ENABLED=0")
    except ValueError:
        problems.append(f"VE_LAYERS={s.ve_layers} must be block numbers with commas between, such as 9,10")
    return problems


def resolve_settings(environ, stored=None):
    """Settings from the environment (explicit variable > `stored` or PRESET > default), and the names set explicitly.

    `stored` are values from an artifact. Raises UserError that lists every problem at once.
    """
    specs = {f.name.upper(): f for f in fields(Settings)}
    texts, problems = {}, near_misses(environ, [*specs, *ALIASES, *REFUSED])
    for name in (n for n in (*specs, *ALIASES, *REFUSED) if n in environ):
        text, stands_for = environ[name], ALIASES.get(name)
        if name in specs:
            texts[name] = (name, text)
        elif name in REFUSED and text != REFUSED[name][0]:
            problems.append(f"{name}={text}: not supported: {REFUSED[name][1]}")
        elif isinstance(stands_for, dict) and text not in stands_for:
            targets = ", ".join(sorted({target for row in stands_for.values() for target in row}))
            problems.append(f"{name}={text}: must be one of {', '.join(stands_for)} (it stands for {targets})")
        elif stands_for:
            for target, value in (stands_for[text] if isinstance(stands_for, dict) else {stands_for: text}).items():
                if target not in environ and (text == "0" or target not in texts):
                    texts[target] = (name, value)
    preset = environ.get("PRESET", "").strip()
    if preset and preset not in PRESETS:
        problems.append(f"PRESET={preset}: unknown; there are {', '.join(PRESETS)}")
    values = dict(PRESETS.get(preset, {}), preset=preset)
    values.update(stored or {})
    for target, (name, text) in texts.items():
        try:
            values[specs[target].name] = parse_value(specs[target], text)
        except ValueError as problem:
            problems.append(f"{name}={text}: {problem}")
    for name, meaning in (("value_residual", "pair"), ("gated_attention", "head")):  # 1 is the published way to say on
        if values.get(name) == "1":
            values[name] = meaning
    resolved = Settings(**values)
    problems += contradictions(resolved)
    if problems:
        raise UserError(f"{len(problems)} bad setting{'s' * (len(problems) > 1)} (python {SCRIPT.name} --help lists all):\n"
                        + "\n".join(f"  {p}" for p in problems))
    return resolved, set(texts)


def launched_ranks(environ):
    """(rank, world size, local rank) as torchrun tells them; (0, 1, 0) without it. Raises UserError."""
    try:
        rank, world, local = (int(environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        if 0 <= rank < world and local >= 0:
            return rank, world, local
    except ValueError:
        pass
    given = ", ".join(f"{k}={environ.get(k)}" for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    raise UserError(f"{given}: not a place among ranks; start with torchrun, or unset all three")


def own_gpu(s, environ, ranks):
    """The ranks, this process from now on seeing its own GPU alone, as number 0: all then make the same code, and find it again.

    The driver reads CUDA_VISIBLE_DEVICES when it wakes, once, and counting does not wake it. Where it was awake already,
    nothing is changed.
    """
    rank, world, local = ranks
    if world == 1 or s.device == "cpu" or local >= torch.cuda.device_count():
        return ranks
    given = environ.get("CUDA_VISIBLE_DEVICES")
    named = [name.strip() for name in (given or "").split(",") if name.strip()]
    environ["CUDA_VISIBLE_DEVICES"] = named[local] if named else str(local)
    if torch._C._cuda_getDeviceCount() == 1:
        return rank, world, 0
    environ.pop("CUDA_VISIBLE_DEVICES")
    environ.update({} if given is None else {"CUDA_VISIBLE_DEVICES": given})
    return ranks


def check_launch(s, world_size):
    """What settings, ranks and installed packages must agree on, before any device is touched. Raises UserError."""
    rows = s.train_batch_tokens // s.train_seq_len
    if rows % world_size and not s.eval_only:
        raise UserError(f"TRAIN_BATCH_TOKENS={s.train_batch_tokens} makes {rows} rows, which {world_size} ranks cannot share "
                        "equally: start a number of processes that divides them")
    if s.gptq and s.gptq_text == "self" and s.gptq_self_rows < world_size:
        raise UserError(f"GPTQ_SELF_ROWS={s.gptq_self_rows}: {world_size} ranks need a row each")
    if s.artifact_budget_bytes <= len(SHIPPED):
        raise UserError(f"ARTIFACT_BUDGET_BYTES={s.artifact_budget_bytes}: the code alone has {len(SHIPPED)} bytes; raise it")
    if s.codec == "zstd":
        zstd()
    if s.ttt_enabled and not (s.ttt_freeze_blocks < s.cores if s.ttt_params == "lora" else
                              any(adapted(name, s) for name in parameter_shapes(s))):
        raise UserError(f"TTT_PARAMS={s.ttt_params}, TTT_OPTIMIZER={s.ttt_optimizer}, TTT_FREEZE_BLOCKS={s.ttt_freeze_blocks}, "
                        f"TTT_UNFREEZE_BLOCKS={s.ttt_unfreeze_blocks} leave nothing to adapt: change one, or set TTT_ENABLED=0")


def help_text():
    """Every setting by section: default, unit, meaning, what off is."""
    lines, section = [__doc__.strip(), "", f"Presets: {', '.join(PRESETS)}. Explicit variables win over PRESET=<name>, "
                      "which wins over the defaults."], None
    for spec in fields(Settings):
        meta = spec.metadata
        if meta["section"] != section:
            section = meta["section"]
            lines += ["", section]
        notes = [meta["unit"]] + ([f"of {', '.join(map(str, meta['choices']))}"] if meta["choices"] else [])
        notes += [f"off: {meta['off']}"] if meta["off"] else []
        lines.append(f"  {spec.name.upper()}={spec.default}  {meta['meaning']} [{'; '.join(notes)}]")
    return "\n".join(lines)


def find_upward(path):
    """`path` as given if absolute or present from here; else the first match in the script's folder or one above it."""
    with contextlib.suppress(RuntimeError):  # ~nobody stays as it is, and is not found
        path = Path(path).expanduser()
    path = Path(path)
    places = [path] if path.is_absolute() else [path, *(folder / path for folder in SCRIPT.parents)]
    return next((p for p in places if p.exists()), path)


# ---- 2. Runtime: ranks, device, log, clock; the only section that knows there are several processes ------------------

class Runtime:
    """This process among its ranks: device, compute type, collectives, and the log that rank 0 writes."""

    def __init__(self, s, ranks=(0, 1, 0)):
        self.rank, self.world_size, local_rank = ranks
        cuda = s.device == "cuda" or (s.device == "auto" and torch.cuda.is_available())
        if cuda and local_rank >= torch.cuda.device_count():
            raise UserError(f"DEVICE={s.device}: rank {self.rank} wants GPU {local_rank} and sees "
                            f"{torch.cuda.device_count()}; start fewer processes, or set DEVICE=cpu")
        self.device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
        self.dtype = torch.bfloat16 if s.precision == "bf16" or (s.precision == "auto" and cuda) else torch.float32
        self.compile = s.compile == "1" or (s.compile == "auto" and cuda)
        self.log_path, self.lines = None, []
        if cuda:
            torch.cuda.set_device(self.device)
        torch.set_float32_matmul_precision("highest" if self.dtype == torch.float32 else "high")
        torch.manual_seed(s.seed)
        if self.world_size > 1:
            try:
                dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
            except (ValueError, dist.DistError) as problem:
                raise UserError(f"WORLD_SIZE={self.world_size}: the ranks do not find each other ({problem}); start with "
                                "torchrun, which sets MASTER_ADDR and MASTER_PORT, or unset WORLD_SIZE") from problem

    def close(self):
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    # -- collectives: the identity with one rank; of a tensor, all but sum_ begin at once and return a function that waits

    def sum_(self, x):
        """Sum of `x` over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(x)
        return x

    def from_rank0(self, *values):
        """Rank 0's float or floats, on every rank, through the host: no wait for the GPU."""
        x = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.broadcast(x, 0)
        return x.item() if len(values) == 1 else x.tolist()

    def sum_later(self, x):
        """sum_, begun."""
        return self._begun(x, lambda: dist.all_reduce(x, async_op=True), x)

    def reduce_scatter(self, x):
        """Sum over ranks of x [n·W, ...]; each rank gets its n rows."""
        own = x.tensor_split(self.world_size)[self.rank]
        if self.device.type == "cpu":  # gloo: sum everything, keep the own part
            return self._begun(own, lambda: dist.all_reduce(x, async_op=True), x)
        out = torch.empty_like(own)
        return self._begun(own if self.world_size == 1 else out, lambda: dist.reduce_scatter_tensor(out, x, async_op=True), x)

    def all_gather(self, x):
        """Every rank's x [n, ...], as [n·W, ...]."""
        x = x.contiguous()
        out = x if self.world_size == 1 else x.new_empty(x.size(0) * self.world_size, *x.shape[1:])
        return self._begun(out, lambda: dist.all_gather_into_tensor(out, x, async_op=True), x)

    def _begun(self, out, begin, source):
        """Begin a collective; returns a function that gives `out` once it is there."""
        work = begin() if self.world_size > 1 else None

        def wait(source=source):  # not to be freed before
            if work:
                work.wait()  # a GPU's stream waits, not the host
            return out
        return wait

    def share(self, n):
        """The part (begin, end) of n items that belongs to this rank."""
        return n * self.rank // self.world_size, n * (self.rank + 1) // self.world_size

    def compiled(self, function, **how):
        """The function as torch.compile makes it, where this run compiles."""
        return torch.compile(function, dynamic=False, **how) if self.compile else function

    def synchronize(self):
        """Wait until this GPU has done everything it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def forget_peak_memory(self):
        """Count anew: what was tried before training is not training's."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_memory_bytes(self):
        """Most memory held: of this rank's GPU, or of this process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    # -- log

    def open_log(self, path):
        """Write log lines to `path` from now on; an earlier log of that name is kept beside it under a number."""
        if self.rank == 0:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.exists():
                    path.rename(next(p for n in range(1, 10**6) if not (p := path.with_suffix(f".{n}{path.suffix}")).exists()))
                path.touch()
            except OSError as problem:
                raise UserError(f"OUT_DIR: {path} cannot be written ({problem.strerror})") from problem
            self.log_path = path

    def log(self, line="", console=True):
        """A line of the log, from rank 0."""
        if self.rank == 0:
            if console:
                print(line, flush=True)
            if self.log_path:
                try:
                    with open(self.log_path, "a", encoding="utf-8") as f:
                        f.write(line + "\n")
                except OSError as problem:
                    path, self.log_path = self.log_path, None
                    raise UserError(f"{path}: cannot be written ({problem.strerror}); make room, or set OUT_DIR") from problem


class Progress:
    """Says on the console how far a long phase is and how long it will take, every ten seconds; not in the log."""

    def __init__(self, rt, label, total):
        self.rt, self.label, self.total, self.start = rt, label, total, time.perf_counter()
        self.said = self.start

    def update(self, done):
        now = time.perf_counter()
        if self.rt.rank == 0 and now - self.said >= 10 and done:
            self.said = now
            remaining = (now - self.start) * (self.total - done) / done
            print(f"progress:{self.label} {100 * done / self.total:.0f}% remaining:{max(remaining, 0):.0f}s",
                  file=sys.stderr, flush=True)


class StepClock:
    """Milliseconds of training so far, equal on every rank, without holding up the GPU.

    The host may run ahead of the GPU by two steps at most; rank 0's reading counts, so that every rank takes the same
    learning rate and stops at the same step. With it comes whether any rank was signalled to end.
    """

    def __init__(self, rt, spent_ms=0.0, signalled=lambda: False):
        self.rt, self.spent_ms, self.events, self.signalled, self.interrupted = rt, spent_ms, [], signalled, False
        rt.synchronize()
        self.start = time.perf_counter()

    def read(self):
        if self.rt.device.type == "cuda":
            self.events.append(torch.cuda.Event())
            self.events[-1].record()
            if len(self.events) > 2:
                self.events.pop(0).synchronize()
        own = self.spent_ms + 1000 * (time.perf_counter() - self.start)
        reading = torch.tensor([0.0 if self.rt.rank else own, float(bool(self.signalled()))], dtype=torch.float64)
        elapsed, self.interrupted = self.rt.sum_(reading).tolist()
        return elapsed

    @contextlib.contextmanager
    def paused(self):
        """Validation does not count as training."""
        self.rt.synchronize()
        self.spent_ms += 1000 * (time.perf_counter() - self.start)
        yield
        self.rt.synchronize()
        self.start = time.perf_counter()


def write_whole(path, content):
    """Write bytes to `path` so that it holds either its old content or all of the new."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except BaseException as problem:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        if not isinstance(problem, OSError):
            raise
        raise UserError(f"{path}: cannot be written ({problem.strerror}); the previous file, if any, is intact") from problem


# ---- 3. Data: shards, the training stream, validation tokens ---------------------------------------------------------

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 256 * 4
GET_DATA = "python data/cached_challenge_fineweb.py downloads the challenge's, python data/build_dataset.py makes your own"


def open_shard(path):
    """The tokens of a shard, uint16, mapped and not read. Raises UserError on a foreign or incomplete file."""
    try:
        size = path.stat().st_size
    except OSError as problem:
        raise UserError(f"{path}: cannot be read ({problem.strerror}); {GET_DATA}") from problem
    if size < SHARD_HEADER_BYTES:
        raise UserError(f"{path}: {size} bytes, a shard's header alone has {SHARD_HEADER_BYTES}; {GET_DATA}")
    try:
        header = np.fromfile(path, "<i4", 256)
    except OSError as problem:
        raise UserError(f"{path}: cannot be read ({problem.strerror}); {GET_DATA}") from problem
    if header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise UserError(f"{path}: begins with {header[0]}, {header[1]}, not a token shard's {SHARD_MAGIC}, {SHARD_VERSION}; "
                        f"{GET_DATA}")
    expected = SHARD_HEADER_BYTES + 2 * int(header[2])
    if size != expected or not header[2]:
        raise UserError(f"{path}: {size} bytes where its header promises {header[2]} tokens = {expected} bytes; "
                        f"delete it and fetch it again: {GET_DATA}")
    return np.memmap(path, "<u2", "r", SHARD_HEADER_BYTES)


def shard_paths(s, split):
    """The shards of a split ("train" or "val"), sorted. Raises UserError where there are none."""
    folder = find_upward(s.data_path)
    paths = sorted(folder.glob(f"fineweb_{split}_*.bin"))
    if not paths:
        raise UserError(f"DATA_PATH={s.data_path}: no fineweb_{split}_*.bin in {folder}; {GET_DATA}")
    return paths


def check_tokens(tokens, vocab_size, path):
    if tokens.size and int(tokens.max()) >= vocab_size:
        raise UserError(f"{path}: holds token {int(tokens.max())}, outside of VOCAB_SIZE={vocab_size}; DATA_PATH and "
                        "TOKENIZER_PATH must belong together")


class TrainStream:
    """Training rows as a function of (seed, position) alone: the same order for every world size, nothing to restore.

    Row r of a shard is its tokens [r·T, r·T + T]; an epoch goes through the shards, shuffled or as they lie, and
    through each one's rows likewise. Shards are mapped, so that memory holds no copy of one.
    """

    def __init__(self, s):
        self.s, self.paths = s, shard_paths(s, "train")
        self.shards = [open_shard(p) for p in self.paths]
        self.row_counts = np.array([(len(t) - 1) // s.train_seq_len for t in self.shards])
        self.epoch_rows = int(self.row_counts.sum())
        if not self.epoch_rows:
            raise UserError(f"DATA_PATH={s.data_path}: no shard holds a row of TRAIN_SEQ_LEN={s.train_seq_len} + 1 tokens")
        self.order = functools.lru_cache(4)(self._order)

    def _order(self, epoch, shard=None):
        """Order of the shards in an epoch, or of the rows in one shard of it."""
        count = len(self.shards) if shard is None else self.row_counts[shard]
        if self.s.train_order == "sequential":
            return np.arange(count)
        key = (self.s.seed, epoch) if shard is None else (self.s.seed, epoch, shard + 1)
        return np.random.default_rng(key).permutation(count)

    def row(self, position):
        """Row number `position` since the start of training: T + 1 tokens."""
        epoch, index = divmod(position, self.epoch_rows)
        shards = self.order(epoch)
        ends = np.cumsum(self.row_counts[shards])
        k = int(np.searchsorted(ends, index, side="right"))
        shard = int(shards[k])
        row = int(self.order(epoch, shard)[index - (ends[k] - self.row_counts[shard])])
        tokens = self.shards[shard][row * self.s.train_seq_len:][: self.s.train_seq_len + 1]
        check_tokens(tokens, self.s.vocab_size, self.paths[shard])
        return tokens

    def rows(self, first, last):
        """Rows [first, last) as int32 [last − first, T + 1]."""
        return torch.from_numpy(np.stack([self.row(p) for p in range(first, last)]).astype(np.int32))


class Batches:
    """This rank's rows of each step, assembled by a thread and sent to the device while the step before computes."""

    def __init__(self, stream, rt, rows_per_step, step=0):
        self.stream, self.rt, self.rows_per_step = stream, rt, rows_per_step
        self.worker = ThreadPoolExecutor(1)
        self.step, self.waiting = step, self.worker.submit(self._load, step)

    def _load(self, step):
        begin, end = self.rt.share(self.rows_per_step)
        rows = self.stream.rows(step * self.rows_per_step + begin, step * self.rows_per_step + end)
        return rows.pin_memory() if self.rt.device.type == "cuda" else rows

    def next(self):
        """Rows of the next step, int32 [rows of this rank, T + 1], on the device."""
        rows = self.waiting.result().to(self.rt.device, non_blocking=True)
        self.step += 1
        self.waiting = self.worker.submit(self._load, self.step)
        return rows

    def close(self):
        self.worker.shutdown(wait=True, cancel_futures=True)


def load_validation(s):
    """Validation tokens, uint16 [⌊(N−1)/T⌋·T + 1], N the tokens on disk. Raises UserError if that is not one row."""
    paths = shard_paths(s, "val")
    parts = [np.asarray(open_shard(p)) for p in paths]
    for path, part in zip(paths, parts):
        check_tokens(part, s.vocab_size, path)
    tokens = np.concatenate(parts)
    if s.val_limit_tokens:
        tokens = tokens[: s.val_limit_tokens + 1]
    row = -(-s.window // s.train_seq_len) * s.train_seq_len
    if len(tokens) <= row:
        raise UserError(f"{paths[0].parent}: {len(tokens)} validation tokens, a row needs {row} + 1; shorten TRAIN_SEQ_LEN "
                        "and EVAL_SEQ_LEN, raise VAL_LIMIT_TOKENS, or get more")
    return tokens[: (len(tokens) - 1) // s.train_seq_len * s.train_seq_len + 1]


# ---- 4. Bits per byte: the only road from a sum of losses to a score -------------------------------------------------

class ByteTable:
    """UTF-8 bytes that a target stands for, by the challenge's rule.

    A piece counts its bytes without the leading "▁", plus one for that "▁" unless the token before is a boundary
    (control, unknown or unused). Byte pieces count 1, boundaries 0.
    """

    def __init__(self, s):
        path = find_upward(s.tokenizer_path)
        if not path.is_file():
            raise UserError(f"TOKENIZER_PATH={s.tokenizer_path}: no such file; {GET_DATA}")
        try:
            sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as problem:
            raise UserError(f"TOKENIZER_PATH={path}: not a SentencePiece model ({problem}); {GET_DATA}") from problem
        V = sp.vocab_size()
        if V != s.vocab_size:
            raise UserError(f"TOKENIZER_PATH={path}: has {V} pieces where VOCAB_SIZE={s.vocab_size}; set VOCAB_SIZE={V} with "
                            "shards made by this tokenizer, or name the shards' own")
        self.boundary = np.array([sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in range(V)])
        pieces = [sp.id_to_piece(i) for i in range(V)]
        self.space = np.array([p.startswith("▁") for p in pieces]) & ~self.boundary
        self.base = np.array([1 if sp.is_byte(i) else len(p[p.startswith("▁"):].encode()) for i, p in enumerate(pieces)],
                             np.int64)
        self.base[self.boundary] = 0

    def count(self, tokens):
        """Bytes of targets tokens[1:], each after its predecessor."""
        before, target = tokens[:-1], tokens[1:]
        return int(self.base[target].sum() + np.count_nonzero(self.space[target] & ~self.boundary[before]))


def bits_per_byte(loss_sum, byte_count):
    """Summed nll (nats) over the UTF-8 bytes it pays for, in float64."""
    return float(loss_sum) / math.log(2) / byte_count


# ---- 5. Model --------------------------------------------------------------------------------------------------------

def rms_norm(x):
    """x over its root mean square, last dim; fp32's epsilon in every precision, so that bf16 changes no meaning."""
    return F.rms_norm(x, (x.size(-1),), eps=torch.finfo(torch.float32).eps)


def fake_quantize(w, bits):
    """w rounded to `bits` per row; gradients pass straight through (rows [R, C], step = row maximum / (2^(bits−1)−1))."""
    limit = 2 ** (bits - 1) - 1
    w32 = w.detach().float()
    step = (w32.abs().amax(dim=1, keepdim=True) / limit).clamp_min(torch.finfo(torch.float32).tiny)
    rounded = (w32 / step).round().clamp(-limit, limit) * step
    return w + (rounded - w32).to(w.dtype)


def cast(w, x, fake_bits=0):
    """w in x's type; with fake_bits rounded per row, by its maximum."""
    return (fake_quantize(w, fake_bits) if fake_bits else w).to(x.dtype)


def linear(x, w, fake_bits=0):
    """x @ wᵀ in x's type."""
    return F.linear(x, cast(w, x, fake_bits))


def leaky_square_mlp(u_ND, up_RD, down_DR, slope):
    """W₂·LeakyReLU(W₁u)² [N,D]; slope 0 is relu²."""
    return F.linear(F.leaky_relu(F.linear(u_ND, up_RD), slope).square(), down_DR)


def softcap_nll(logits_NV, targets_N, softcap, temperature):
    """nll of each target [N], nats, fp32, of logits softcap·tanh(logits/softcap)/temperature."""
    logits = softcapped(logits_NV, softcap)
    return F.cross_entropy(logits if temperature == 1 else logits / temperature, targets_N, reduction="none")


def softcapped(logits, softcap):
    """softcap·tanh(logits/softcap), fp32; softcap 0 leaves them as they are."""
    return softcap * torch.tanh(logits.float() / softcap) if softcap else logits.float()


OPERATORS = f"golf_{hashlib.sha256(SOURCE).hexdigest()[:12]}"

# The same two in Triton, for compiled models on a GPU. The first writes the hidden layer and its activation from the product
# that makes it, and multiplies by the activation's slope in the product that needs it: a quarter of the MLP's memory traffic
# is gone. The second holds fp32 logits of one row at a time.
jit = triton.jit if triton else lambda kernel: kernel
MLP_TILES = ((128, 256, 64, 8, 3), (128, 128, 64, 8, 4))  # rows, columns, depth, warps, stages: which is faster is tried


@jit
def leaky_square_kernel(a, b, h, out, rows, B_COLUMN, B_DEPTH, SLOPE: tl.constexpr, BACKWARD: tl.constexpr, N: tl.constexpr,
                        K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
    """A tile of C = A·B [rows, N]; h = C and out = LeakyReLU(C)², or backward out = C · 2·LeakyReLU(h)·LeakyReLU'(h)."""
    tile, per_group = tl.program_id(0), GROUP * (N // BN)  # GROUP tiles of rows share the columns that are in the cache
    first = tile // per_group * GROUP
    group = tl.minimum(tl.cdiv(rows, BM) - first, GROUP)
    m = ((first + tile % per_group % group) * BM + tl.arange(0, BM)).to(tl.int64)
    n = tile % per_group // group * BN + tl.arange(0, BN)
    k, inside = tl.arange(0, BK), (m < rows)[:, None]
    total = tl.zeros((BM, BN), tl.float32)
    for at in range(0, K, BK):
        left = tl.load(a + m[:, None] * K + (at + k)[None, :], mask=inside, other=0.0)
        right = tl.load(b + (at + k)[:, None] * B_DEPTH + n[None, :] * B_COLUMN)
        total = tl.dot(left, right, total)
    place = m[:, None] * N + n[None, :]
    if BACKWARD:
        x = tl.load(h + place, mask=inside, other=0.0).to(tl.float32)
        result = total * tl.where(x > 0, 2 * x, 2 * SLOPE * SLOPE * x)
    else:
        rounded = total.to(h.dtype.element_ty)
        tl.store(h + place, rounded, mask=inside)
        x = rounded.to(tl.float32)
        leaky = tl.where(x > 0, x, SLOPE * x)
        result = leaky * leaky
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


@jit
def softcap_nll_kernel(logits, targets, nll, lse, grad, out, temperature, SOFTCAP: tl.constexpr, BACKWARD: tl.constexpr,
                       V: tl.constexpr, BLOCK: tl.constexpr):
    """nll and log-sum-exp of a row of logits; or backward the row's gradient in `out`, times grad."""
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    z = tl.load(logits + row * V + i, mask=i < V, other=0.0).to(tl.float32)
    if SOFTCAP != 0:
        tanh = 2 * tl.sigmoid(2 * z / SOFTCAP) - 1
        z = SOFTCAP * tanh
    z = tl.where(i < V, z / temperature, float("-inf"))
    hit = i == tl.load(targets + row)
    if BACKWARD:
        slope = (tl.exp(z - tl.load(lse + row)) - tl.where(hit, 1.0, 0.0)) * tl.load(grad + row) / temperature
        if SOFTCAP != 0:
            slope *= 1 - tanh * tanh
        tl.store(out + row * V + i, slope.to(out.dtype.element_ty), mask=i < V)
    else:
        top = tl.max(z, 0)
        total = top + tl.log(tl.sum(tl.exp(z - top), 0))
        tl.store(lse + row, total)
        tl.store(nll + row, total - tl.sum(tl.where(hit, z, 0.0), 0))


def operator(name, schema, function, results):
    """A PyTorch operator that compilers take as it is; results(*arguments) are tensors like its own.

    torch's cache of compiled code knows it by name alone, so that the name holds what it is made of.
    """
    op = torch.library.custom_op(f"{OPERATORS}::{name}", function, mutates_args=(), schema=schema)
    op.register_fake(results)
    return op


@functools.cache
def triton_mlp():
    """leaky_square_mlp with a last argument, the row of MLP_TILES; contiguous, D in multiples of 64 and R of 256."""
    def product(a, b, b_strides, h, out, slope, backward, tile):
        BM, BN, BK, warps, stages = MLP_TILES[tile]
        leaky_square_kernel[(triton.cdiv(len(a), BM) * (h.size(1) // BN),)](
            a, b, h, out, len(a), *b_strides, slope, backward, h.size(1), a.size(1), BM, BN, BK, 8, num_warps=warps,
            num_stages=stages)

    def forward(u, up, down, slope, tile):
        h, activated = (u.new_empty(len(u), len(up)) for _ in range(2))
        product(u, up, up.stride(), h, activated, slope, False, tile)
        return F.linear(activated, down), h, activated

    def backward(dy, u, up, down, h, activated, slope, tile, *wanted):
        dh, nothing = torch.empty_like(h), dy.new_empty
        product(dy, down, (down.stride(1), down.stride(0)), h, dh, slope, True, tile)
        return (dh @ up if wanted[0] else nothing(0), dh.mT @ u if wanted[1] else nothing(0),
                dy.mT @ activated if wanted[2] else nothing(0))

    gradient = operator("mlp_backward", "(Tensor dy, Tensor u, Tensor up, Tensor down, Tensor h, Tensor activated, "
                        "float slope, int tile, bool du, bool dup, bool ddown) -> (Tensor, Tensor, Tensor)", backward,
                        lambda dy, *inputs: tuple(torch.empty_like(x) if wanted else dy.new_empty(0)
                                                  for x, wanted in zip(inputs, inputs[-3:])))
    op = operator("mlp", "(Tensor u, Tensor up, Tensor down, float slope, int tile) -> (Tensor, Tensor, Tensor)", forward,
                  lambda u, up, *_: (torch.empty_like(u), *(u.new_empty(len(u), len(up)) for _ in range(2))))

    def keep(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3], *output[1:])
        ctx.constants = inputs[3:]

    def differentiate(ctx, dy, *_):
        wanted = ctx.needs_input_grad[:3]
        found = gradient(dy.contiguous(), *ctx.saved_tensors, *ctx.constants, *wanted)
        return *(x if want else None for x, want in zip(found, wanted)), None, None
    op.register_autograd(differentiate, setup_context=keep)
    return lambda u, up, down, slope, tile: op(u.contiguous(), up.contiguous(), down.contiguous(), float(slope), tile)[0]


@functools.cache
def triton_nll():
    """softcap_nll."""
    def rows(logits, targets, nll, lse, grad, out, softcap, temperature, backward):
        V = logits.size(1)
        softcap_nll_kernel[(len(logits),)](logits, targets, nll, lse, grad, out, temperature, softcap, backward, V,
                                           triton.next_power_of_2(V), num_warps=4)
        return out

    def forward(logits, targets, softcap, temperature):
        nll, lse = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))
        rows(logits, targets, nll, lse, nll, nll, softcap, temperature, False)
        return nll, lse

    def backward(grad, logits, targets, lse, softcap, temperature):
        return rows(logits, targets, lse, lse, grad, torch.empty_like(logits), softcap, temperature, True)

    gradient = operator("nll_backward", "(Tensor grad, Tensor logits, Tensor targets, Tensor lse, float softcap, "
                        "float temperature) -> Tensor", backward, lambda grad, logits, *_: torch.empty_like(logits))
    op = operator("nll", "(Tensor logits, Tensor targets, float softcap, float temperature) -> (Tensor, Tensor)", forward,
                  lambda logits, *_: tuple(logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2)))

    def keep(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2], output[1])
        ctx.constants = inputs[2:]

    def differentiate(ctx, grad, _):
        return gradient(grad.contiguous(), *ctx.saved_tensors, *ctx.constants), None, None, None
    op.register_autograd(differentiate, setup_context=keep)
    return lambda logits, targets, softcap, temperature: op(logits.contiguous(), targets.contiguous(), float(softcap),
                                                            float(temperature))[0]


def rotary_tables(s, length):
    """cos and sin [length, rotated/2] fp32; the base is stretched for rows longer than the reference (NTK)."""
    rotated, base = s.rope_dims or s.head_dim, s.rope_base
    if s.rope_ntk_reference and s.train_seq_len > s.rope_ntk_reference:
        base *= (s.train_seq_len / s.rope_ntk_reference) ** (rotated / (rotated - 2))
    frequency = base ** (-torch.arange(0, rotated, 2, dtype=torch.float64, device="cpu") / rotated)
    angle = torch.arange(length, dtype=torch.float64, device="cpu")[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


def rotate(x_BTHE, cos, sin):
    """Rotary embedding of the first 2·cos.size(-1) channels of each head, halves paired; the rest pass."""
    half, T = cos.size(-1), x_BTHE.size(1)
    cos, sin = (t[:T, None].to(x_BTHE.dtype) for t in (cos, sin))
    x1, x2, rest = x_BTHE.split([half, half, x_BTHE.size(-1) - 2 * half], dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin, rest), dim=-1)


def exclusive(y_BTHE, v_BTKE):
    """XSA: the attention output less its part along the position's own value (grouped heads share it)."""
    B, T, H, E = y_BTHE.shape
    own = F.normalize(v_BTKE, dim=-1, eps=1e-12).unsqueeze(3)
    y = y_BTHE.view(B, T, own.size(2), -1, E)
    return (y - (y * own).sum(-1, keepdim=True) * own).view(B, T, H, E)


def sdpa(q_BTHE, k_BTKE, v_BTKE, window=0):
    """Causal attention by PyTorch's own kernels; grouped heads. With a window W each query sees the last W keys, its own
    included: blocks of W queries over 2W keys."""
    if not window:
        q, k, v = (x.transpose(1, 2) for x in (q_BTHE, k_BTKE, v_BTKE))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    B, T, H, E = q_BTHE.shape
    blocks = -(-T // window)
    rest = blocks * window - T
    q = F.pad(q_BTHE, (0, 0, 0, 0, 0, rest)).reshape(B * blocks, window, H, E).transpose(1, 2)
    k, v = (F.pad(x, (0, 0, 0, 0, window, rest)).unfold(1, 2 * window, window).permute(0, 1, 2, 4, 3).flatten(0, 1)
            for x in (k_BTKE, v_BTKE))
    query, key = torch.arange(window, device=q.device)[:, None], torch.arange(2 * window, device=q.device)
    seen = (key > query) & (key <= query + window)
    seen = seen & ((torch.arange(blocks, device=q.device) > 0)[:, None, None] | (key >= window))  # nothing before the first
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen.repeat(B, 1, 1)[:, None], enable_gqa=True)
    return y.transpose(1, 2).reshape(B, -1, H, E)[:, :T]


@functools.lru_cache
def band(length, window, device):
    """FlexAttention's mask of the last `window` keys of each query."""
    return flex_attention.create_block_mask(lambda b, h, q, k: (q >= k) & (q - k < window), None, None, length, length, device)


def flex(q_BTHE, k_BTKE, v_BTKE, window=0):
    """sdpa, with windows by FlexAttention, which skips what no query of a block sees (GPU, compiled)."""
    if not window:
        return sdpa(q_BTHE, k_BTKE, v_BTKE)
    q, k, v = (x.transpose(1, 2) for x in (q_BTHE, k_BTKE, v_BTKE))
    mask = band(q.size(2), window, q.device)
    return flex_attention.flex_attention(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)


def flash_backend(module, function):
    """The causal attention of an installed FlashAttention package, or None."""
    try:
        flash = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, OSError, RuntimeError):
        return None

    def attend(q, k, v, window=0):
        out = flash(q, k, v, causal=True, **(dict(window_size=(window - 1, 0)) if window else {}))
        return out[0] if isinstance(out, tuple) else out
    return attend


FLASH_PACKAGES = {"fa3": ("flash_attn_interface", "flash_attn_func"), "fa4": ("flash_attn.cute", "flash_attn_func"),
                  "fa2": ("flash_attn", "flash_attn_func")}
TORCH_KERNELS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def torch_attention(kernel):
    """sdpa by this one of PyTorch's kernels or none."""
    def attend(q, k, v, window=0):
        with sdpa_kernel(kernel):
            return sdpa(q, k, v, window)
    return attend


def torch_kernel_first(name):
    """A context in which PyTorch's attention takes the kernel of that name where it can, and others where it cannot, as for rows
    of one token. Compiled code is kept under that name: the context is no part of what torch's cache looks at."""
    if name not in TORCH_KERNELS:
        return contextlib.nullcontext()
    torch.compiler.config.cache_key_tag = name
    rest = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel([TORCH_KERNELS[name], *(kernel for kernel in rest if kernel != TORCH_KERNELS[name])], set_priority=True)


@dataclass(frozen=True)
class Pieces:
    """What the model computes with. The kernels are for compiled models: an eager pass, in which calibration looks at every
    product, takes the plain functions."""
    attend: object = sdpa
    mlp: object = leaky_square_mlp
    nll: object = softcap_nll

    def now(self):
        return self if torch.compiler.is_compiling() else PLAIN


PLAIN = Pieces()


def rows_per_pass(s, world_size):
    """Rows of a rank in one pass of training: as many as MICRO_BATCH_TOKENS holds, in equal passes."""
    rows, most = s.train_batch_tokens // s.train_seq_len // world_size, max(1, s.micro_batch_tokens // s.train_seq_len)
    return next((n for n in range(min(rows, most), 0, -1) if rows % n == 0), 1)


def outcome(function, inputs):
    """The result of function(*inputs), and the gradient of the sum of its squares for each input that wants one."""
    y = function(*inputs)
    wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    return [y, *torch.autograd.grad(y.float().square().sum(), wanted)]


def agree(mine, reference):
    """Do two results of `outcome` differ by no more than rounding does?"""
    return all((a.float() - b.float()).norm() <= 0.02 * b.float().norm() for a, b in zip(mine, reference, strict=True))


def usable(candidates, inputs, rt):
    """{name: function}, compiled as the model will be: the first of the candidates, and those that do not raise and give what
    it gives, gradients included, on every rank. The log says why others are out."""
    functions, reference, out = {}, None, []
    for name, function in candidates.items():
        functions[name], why = rt.compiled(function, fullgraph=True), ""
        try:
            mine = outcome(functions[name], inputs)
            if reference is not None and not agree(mine, reference):
                why = "gives something else"
            reference = mine if reference is None else reference
        except Exception as problem:  # whatever a kernel or a foreign package raises, it is not usable here
            if reference is None:
                raise
            why = f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:120]}"
        out.append(float(bool(why)))
        if why:
            rt.log(f"left out: {name}: {why}")
    return {name: function for (name, function), n in zip(functions.items(), rt.sum_(torch.tensor(out)).tolist()) if not n}


def fastest(functions, inputs, rt, repeats=5):
    """Name of the fastest of {name: function} at function(*inputs), forwards and backwards, by rank 0's clock. The first is
    taken unless another saves 2 % of its time."""
    milliseconds = []
    for function in functions.values() if len(functions) > 1 else ():
        for repeat in range(2 + repeats):
            if repeat == 2:
                rt.synchronize()
                started = time.perf_counter()
            outcome(function, inputs)
        rt.synchronize()
        milliseconds.append(1000 * (time.perf_counter() - started) / repeats)
    if not milliseconds:
        return next(iter(functions))
    first, *_ = times = rt.from_rank0(*milliseconds)
    rt.log("tried: " + " ".join(f"{name}:{ms:.2f}ms" for name, ms in zip(functions, times)))
    return list(functions)[0 if min(times) > 0.98 * first else times.index(min(times))]


def qkv_like_the_models(rows, tokens, s, rt):
    """Random q, k, v [rows, tokens, heads, E], slices of one tensor, as the model's v is in its first block."""
    widths = [heads * s.head_dim for heads in (s.num_heads, s.num_kv_heads, s.num_kv_heads)]
    generator = torch.Generator(rt.device).manual_seed(0)
    joined = torch.randn(rows, tokens, sum(widths), device=rt.device, generator=generator).to(rt.dtype)
    return [x.unflatten(-1, (-1, s.head_dim)).requires_grad_() for x in joined.split(widths, -1)]


def right_result(attend, s, rt, window=0, name="attention"):
    """Does `attend` agree with PyTorch's attention, on a small input of this model's heads? If not, the log says why."""
    label = f"{name}, window {window}" if window else name
    functions = {"": functools.partial(sdpa, window=window), label: functools.partial(attend, window=window)}
    return len(usable(functions, qkv_like_the_models(1, 256, s, rt), rt)) == 2


def choose_attention(s, rt, shape):
    """({part: name}, function) of the attention back end: the fastest of those that are right here, at rows × tokens.

    The windows of banded scoring are its own, FlexAttention's or in blocks, whichever is right first.
    """
    packages, others = {}, {}
    if rt.device.type == "cuda" and rt.dtype == torch.bfloat16:
        packages = {name: attend for name in FLASH_PACKAGES if (attend := flash_backend(*FLASH_PACKAGES[name]))}
        others = {**{name: torch_attention(kernel) for name, kernel in TORCH_KERNELS.items()}, "flex": flex}
    candidates = {**packages, **others}
    asked = [s.attention] if s.attention != "auto" else [name for name in candidates if name != "flex"]
    right = {name: candidates[name] for name in asked if name in candidates and right_result(candidates[name], s, rt, 0, name)}
    if not right and s.attention not in ("auto", "sdpa"):
        raise UserError(f"ATTENTION={s.attention}: not installed, or not working on {rt.device} with {rt.dtype}; "
                        "ATTENTION=auto takes the best that works")
    inputs = qkv_like_the_models(*shape, s, rt) if len(right) > 1 else ()
    names = dict(attention=fastest(right, inputs, rt) if right else "sdpa")
    whole = sdpa if names["attention"] in ("sdpa", *TORCH_KERNELS) else right[names["attention"]]
    if s.eval_attention != "banded":
        return names, whole
    windows = {name: packages[name] for name in names.values() if name in packages}
    windows.update({"flex": flex} if others and rt.compile else {})
    names["windows"] = next((name for name, attend in windows.items() if right_result(attend, s, rt, 128, name)), "blocks")
    if names["windows"] == "blocks" and whole is sdpa:
        return names, sdpa
    windowed = windows.get(names["windows"], sdpa)
    return names, lambda q, k, v, window=0: windowed(q, k, v, window) if window else whole(q, k, v)


def choose_pieces(s, rt):
    """({part: name}, Pieces): what is fastest on this device for the passes of this training. Raises UserError."""
    shape = rows_per_pass(s, rt.world_size), s.train_seq_len
    (names, attend), tokens = choose_attention(s, rt, shape), math.prod(shape)
    mlps, losses = {"plain": leaky_square_mlp}, {"plain": softcap_nll}
    interpreted = triton and s.kernels == "triton" and triton.knobs.runtime.interpret
    if triton and rt.compile and s.kernels != "plain" and (rt.device.type == "cuda" or interpreted):
        mlps.update({f"triton{BM}x{BN}": functools.partial(triton_mlp(), tile=i) for i, (BM, BN, BK, *_) in enumerate(MLP_TILES)
                     if s.mlp_hidden % BN == 0 and s.model_dim % BK == 0})
        losses["triton"] = triton_nll()
    elif s.kernels == "triton":
        raise UserError(f"KERNELS=triton: needs the triton package, a GPU (here: {rt.device}) and a compiled model "
                        f"(COMPILE={s.compile}); KERNELS=auto takes the kernels where they run")
    generator = torch.Generator(rt.device).manual_seed(0)

    def choose(part, candidates, *sizes, constants):
        if len(candidates) == 1:
            return "plain"
        inputs = [torch.randn(size, device=rt.device, generator=generator).to(rt.dtype).requires_grad_() for size in sizes]
        inputs += constants
        functions = usable(candidates, inputs, rt)
        if s.kernels == "auto":
            return fastest(functions, inputs, rt)
        if len(functions) == 1:
            raise UserError(f"KERNELS=triton: no kernel of the {part} is right on {rt.device}, see above; KERNELS=auto leaves "
                            "them out")
        return list(functions)[1]

    D, R, V = s.model_dim, s.mlp_hidden, s.vocab_size
    names["mlp"] = choose("mlp", mlps, (tokens, D), (R, D), (D, R), constants=[s.leaky_slope])
    targets = torch.randint(V, (tokens,), device=rt.device)
    names["nll"] = choose("nll", losses, (tokens, V), constants=[targets, s.logit_softcap, 1.0])
    rt.forget_peak_memory()
    return names, Pieces(attend, mlps[names["mlp"]], losses[names["nll"]])


# V ← a·V₀ + b·V, where V₀ is block 0's value: name → (initial parameter of a block or None, parameter → (a, b)).
# "half" does not send gradients to V₀ through the mix.
VALUE_RESIDUALS = {
    "pair": ((0.5, 0.5), lambda p: (p[0], p[1])),                          # learned pair (#413, #490)
    "sigmoid": ((-1.5,), lambda p: (p.sigmoid()[0], 1 - p.sigmoid()[0])),  # VRL (#657)
    "shortcut": ((0.0,), lambda p: (p[0], 1.0)),                           # zero-init shortcut from V₀
    "half": (None, lambda p: (0.5, 0.5)),                                  # fixed
}


def vector(*values):
    return nn.Parameter(torch.tensor(values, dtype=torch.float32))


def matrix(rows, columns):
    return nn.Parameter(torch.full((rows, columns), math.nan))  # init_weights fills every one


class Attention(nn.Module):
    """Causal self-attention: grouped queries, QK norm and gain, partial RoPE, value residual, XSA, gate."""

    def __init__(self, s, pieces):
        super().__init__()
        D, kv_dim = s.model_dim, s.num_kv_heads * s.head_dim
        self.heads, self.kv_heads, self.head_dim, self.bits, self.attend = (
            s.num_heads, s.num_kv_heads, s.head_dim, s.qat_bits if s.attn_bits < 16 else 0, pieces.attend)
        self.q, self.k, self.v, self.o = matrix(D, D), matrix(kv_dim, D), matrix(kv_dim, D), matrix(D, D)
        self.q_gain = nn.Parameter(torch.full((s.num_heads,), s.qk_gain_init))
        self.gate = s.gated_attention
        if self.gate == "head":    # y_h × σ(W_h·u + b_h), nearly open at first
            self.gate_weight, self.gate_bias = nn.Parameter(torch.zeros(s.num_heads, D)), vector(*[4.0] * s.num_heads)
        elif self.gate == "scalar":  # one learned factor on the block's attention output
            self.gate_scale = vector(1.0)

    def forward(self, u_BTD, rotary, xsa, value_embedding, mix_value, fake_quant, window):
        """Attention output [B,T,D] and the V [B,T,K,E] before the value residual; `mix_value` applies the latter."""
        B, T, D = u_BTD.shape
        bits = self.bits if fake_quant else 0
        # One product reads u once; in a gradient as well.
        weights = [fake_quantize(w, bits) if bits else w for w in (self.q, self.k, self.v)]
        if self.gate == "head":  # rows of 16 bytes: products of other widths, and slices of them, are slow
            weights += [self.gate_weight, self.gate_weight.new_zeros(-self.heads % 8, D)]
        q, k, v, *gate = linear(u_BTD, torch.cat(weights)).split([len(w) for w in weights], -1)
        if value_embedding is not None:
            v = v + value_embedding
        q = q.unflatten(-1, (self.heads, self.head_dim))
        k, own_v = (x.unflatten(-1, (self.kv_heads, self.head_dim)) for x in (k, v))
        v = mix_value(own_v)
        q = rotate(rms_norm(q) * self.q_gain.to(q.dtype)[:, None], *rotary)
        y = self.attend(q, rotate(rms_norm(k), *rotary), v, window)
        if xsa:
            y = exclusive(y, v)
        if gate:
            y = y * torch.sigmoid(gate[0] + self.gate_bias.to(u_BTD.dtype)).unsqueeze(-1)
        out = linear(y.reshape(B, T, D), self.o, bits)
        return (out * self.gate_scale.to(out.dtype) if self.gate == "scalar" else out), own_v


class MLP(nn.Module):
    """W₂·LeakyReLU(W₁u)²; slope 0 is relu²."""

    def __init__(self, s, pieces):
        super().__init__()
        self.slope, self.bits, self.pieces = s.leaky_slope, s.qat_bits if s.mlp_bits < 16 else 0, pieces
        self.up, self.down = matrix(s.mlp_hidden, s.model_dim), matrix(s.model_dim, s.mlp_hidden)

    def forward(self, u_BTD, fake_quant):
        up, down = (cast(w, u_BTD, self.bits if fake_quant else 0) for w in (self.up, self.down))
        return self.pieces.now().mlp(u_BTD.flatten(0, 1), up, down, self.slope).view_as(u_BTD)


class Core(nn.Module):
    """The matrices of a block; several blocks may share one."""

    def __init__(self, s, pieces):
        super().__init__()
        self.attn, self.mlp = Attention(s, pieces), MLP(s, pieces)


class Block(nn.Module):
    """z = m₀⊙x + m₁⊙x₀; y = z + a⊙Attn(s·RMS(z)); out = y + b⊙MLP(s·RMS(y)), around a core."""

    def __init__(self, s, index):
        super().__init__()
        D = s.model_dim
        self.input_scale = 1 / math.sqrt(index + 1) if s.ln_scale else 1.0
        self.xsa = index in s.xsa_blocks
        self.attn_scale, self.mlp_scale = nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(D))
        if s.resid_mix:
            self.resid_mix = nn.Parameter(torch.stack((torch.ones(D), torch.zeros(D))))
        initial, self.value_weights = VALUE_RESIDUALS.get(s.value_residual, (None, None)) if index else (None, None)
        if initial:
            self.value_residual = vector(*initial)
        if s.value_residual == "embed":
            self.embed_shortcut = vector(0.0)
        self.detach_first = s.value_residual == "half"

    def mix_value(self, v, first_v):
        """The value residual: a·V₀ + b·V."""
        if self.value_weights is None:
            return v
        a, b = self.value_weights(self.value_residual.to(v.dtype) if hasattr(self, "value_residual") else None)
        return a * (first_v.detach() if self.detach_first else first_v) + b * v

    def forward(self, x_BTD, x0_BTD, core, first_v, rotary, value_embedding, fake_quant, window):
        """The block's output [B,T,D] and its own V before the value residual."""
        dtype = x_BTD.dtype
        shortcut = self.embed_shortcut.to(dtype) * x0_BTD if hasattr(self, "embed_shortcut") else 0
        if hasattr(self, "resid_mix"):
            mix = self.resid_mix.to(dtype)
            x_BTD = mix[0] * x_BTD + mix[1] * x0_BTD
        attn, v = core.attn(self.input_scale * rms_norm(x_BTD), rotary, self.xsa, value_embedding,
                            lambda own: self.mix_value(own, first_v), fake_quant, window)
        y = x_BTD + self.attn_scale.to(dtype) * attn
        return y + self.mlp_scale.to(dtype) * core.mlp(self.input_scale * rms_norm(y), fake_quant) + shortcut, v


class HashEmbedding(nn.Module):
    """An embedding of a token and those before it, hashed into buckets; the last bucket is for row beginnings.

    Bucket of position t: (36313·xₜ XOR 27191·xₜ₋₁ [XOR 51497·xₜ₋₂]) mod (buckets − 1).
    """
    FACTORS = (36313, 27191, 51497)

    def __init__(self, s, order, buckets, dim, scale):
        super().__init__()
        self.order, self.table = order, nn.Parameter(torch.zeros(buckets, dim))
        self.proj, self.scale = matrix(s.model_dim, dim), vector(scale)

    def buckets(self, tokens_BT):
        last, T = self.table.size(0) - 1, tokens_BT.size(1)
        reach = self.order - 1
        terms = [factor * tokens_BT[:, reach - back: T - back] for back, factor in enumerate(self.FACTORS[: self.order])]
        return F.pad(functools.reduce(torch.bitwise_xor, terms) % last, (reach, 0), value=last)[:, -T:]

    def forward(self, tokens_BT, dtype):
        return linear(F.embedding(self.buckets(tokens_BT), self.table).to(dtype), self.proj) * self.scale.to(dtype)


class ValueEmbedding(nn.Module):
    """One table of value vectors by token, shared by some blocks, each with a factor of its own."""

    def __init__(self, s):
        super().__init__()
        self.blocks = s.ve_blocks
        self.table, self.proj = matrix(s.vocab_size, s.ve_dim), matrix(s.num_kv_heads * s.head_dim, s.ve_dim)
        self.scale, self.block_scales = vector(0.1), nn.Parameter(torch.ones(len(self.blocks)))

    def forward(self, tokens_BT, dtype):
        """{block: [B,T,K·E]}."""
        shared = linear(F.embedding(tokens_BT, self.table).to(dtype), self.proj) * self.scale.to(dtype)
        return {block: shared * self.block_scales[n].to(dtype) for n, block in enumerate(self.blocks)}


class GPT(nn.Module):
    """The model. One forward serves training, scoring, fake quantization and test-time training."""

    def __init__(self, s, dtype=torch.float32, pieces=PLAIN):
        super().__init__()
        self.s, self.dtype, self.pieces = s, dtype, pieces
        D, skips = s.model_dim, s.num_layers // 2 if s.unet_skips else 0
        self.tok_emb = matrix(s.vocab_size, D)
        self.bigram = HashEmbedding(s, 2, s.bigram_vocab_size, s.bigram_dim, 0.05) if s.bigram_vocab_size else None
        self.trigram = HashEmbedding(s, 3, s.trigram_vocab_size, s.trigram_dim, 0.03) if s.trigram_vocab_size else None
        self.ve = ValueEmbedding(s) if s.ve_blocks else None
        if s.smear_gate != "0":
            self.smear = nn.Parameter(torch.zeros(D))
        self.cores = nn.ModuleList(Core(s, pieces) for _ in range(s.cores))
        self.blocks = nn.ModuleList(Block(s, i) for i in range(s.num_layers))
        self.skip_weights = nn.Parameter(torch.ones(skips, D)) if skips else None
        for i, core in enumerate(self.cores):  # a core's gradient is the mean over the blocks that share it (#537)
            uses = len(range(i, s.num_layers, s.cores))
            for p in core.parameters() if uses > 1 else ():
                p.register_hook(lambda grad, uses=uses: grad / uses)
        for name, table in zip(("cos", "sin"), rotary_tables(s, max(s.train_seq_len, s.window, s.scoring_plan[0]))):
            self.register_buffer(name, table, persistent=False)

    def embed(self, tokens_BT):
        """RMS of token + bigram embedding, smeared with the token before: [B,T,D]."""
        e = F.embedding(tokens_BT, self.tok_emb).to(self.dtype)
        for hashed in (self.bigram, self.trigram):
            if hashed is not None:
                e = e + hashed(tokens_BT, self.dtype)
        x = rms_norm(e)
        if self.s.smear_gate == "0":
            return x
        gate = torch.sigmoid(self.smear).to(x.dtype)
        if self.s.smear_gate == "bos":
            gate = gate * (tokens_BT != self.s.bos_token).unsqueeze(-1)
        return (1 - gate) * x + gate * F.pad(x[:, :-1], (0, 0, 1, 0))

    def products(self, tokens_BT, fake_quant=False, window=0):
        """Next-token logits [B,T,V] before the softcap, compute type; position t has seen tokens 0..t, or in each layer the
        last `window` of them."""
        s, x0 = self.s, self.embed(tokens_BT)
        x, first_v, skips = x0, None, []
        value_embeddings = self.ve(tokens_BT, x.dtype) if self.ve is not None else {}
        encoder = s.num_layers // 2
        for i, block in enumerate(self.blocks):
            if self.skip_weights is not None and i >= encoder and skips:
                x = x + self.skip_weights[i - encoder].to(x.dtype) * skips.pop()
            x, v = block(x, x0, self.cores[i % s.cores], first_v, (self.cos, self.sin), value_embeddings.get(i), fake_quant,
                         window)
            first_v = v if i == 0 else first_v
            if i < encoder:
                skips.append(x)
        return linear(rms_norm(x), self.tok_emb)

    def logits(self, tokens_BT, fake_quant=False, window=0):
        """Next-token logits [B,T,V], fp32."""
        return softcapped(self.products(tokens_BT, fake_quant, window), self.s.logit_softcap)

    def forward(self, tokens_BT, targets_BT, fake_quant=False, temperature=1.0, window=0):
        """nll of each target [B,T], nats, fp32. `fake_quant` is an argument, so that a compiler cannot fold it away."""
        products = self.products(tokens_BT, fake_quant, window).flatten(0, 1)
        nll = self.pieces.now().nll(products, targets_BT.flatten(), self.s.logit_softcap, temperature)
        return nll.view_as(targets_BT)


@dataclass(frozen=True)
class Kind:
    """How a kind of parameter is trained and stored: names of settings, or numbers."""
    optimizer: str
    lr: str
    weight_decay: str
    bits: str


KINDS = {
    "attn": Kind("muon", "matrix_lr", "muon_wd", "attn_bits"),
    "mlp": Kind("muon", "matrix_lr", "muon_wd", "mlp_bits"),
    "proj": Kind("proj_optimizer", "matrix_lr", "muon_wd", "proj_bits"),
    "table": Kind("adamw", "tied_embed_lr", "adam_wd", "embed_bits"),
    "hashed": Kind("adamw", "tied_embed_lr", "adam_wd", "bigram_bits"),
    "gate": Kind("adamw", "scalar_lr", "adam_wd", "proj_bits"),
    "control": Kind("adamw", "scalar_lr", "adam_wd", ""),  # scales, gains, mixes: always fp16
}


def kind_of(name):
    """The row of KINDS for a parameter, from its name."""
    parts = name.split(".")
    if parts[0] == "cores" and parts[-1] in ("q", "k", "v", "o"):
        return "attn"
    if parts[0] == "cores" and parts[-1] in ("up", "down"):
        return "mlp"
    tables = {"tok_emb": "table", "ve.table": "table", "bigram.table": "hashed", "trigram.table": "hashed"}
    return tables.get(name, {"proj": "proj", "gate_weight": "gate"}.get(parts[-1], "control"))


@torch.no_grad()
def init_weights(model, s):
    """Fill every matrix: orthogonal, but zero for attention output and MLP down; tables normal, the bigram's zero.

    The projections of the small embeddings are orthogonal, times 1/√(2L) under Muon (#414; not so in #549).
    Raises AssertionError if a parameter is left without a value.
    """
    scaled = s.proj_optimizer == "muon"
    for name, p in model.named_parameters():
        kind = kind_of(name)
        if name.endswith((".o", ".down")):
            p.zero_()
        elif kind in ("attn", "mlp", "proj"):
            nn.init.orthogonal_(p, gain=1 / math.sqrt(2 * s.num_layers) if scaled and kind == "proj" else 1.0)
        elif name == "tok_emb":
            p.normal_(std=s.tied_embed_init_std)
        elif name == "ve.table":
            p.normal_(std=0.01)
        assert torch.isfinite(p).all(), f"{name} was left without an initial value"


def build_model(s, rt):
    """The model with its initial weights on the device, and what it computes with; every rank draws the same ones from SEED."""
    names, pieces = choose_pieces(s, rt)
    torch.manual_seed(s.seed)
    try:
        model = GPT(s, rt.dtype, pieces)
    except RuntimeError as problem:
        raise UserError(f"MODEL_DIM={s.model_dim}, BIGRAM_VOCAB_SIZE={s.bigram_vocab_size}, TRIGRAM_VOCAB_SIZE="
                        f"{s.trigram_vocab_size}: no memory for such a model ({problem})") from problem
    init_weights(model, s)
    return model.to(rt.device), names


def parameter_shapes(s):
    """{name: shape}, without allocating any. Raises UserError where the settings make no model."""
    try:
        with torch.device("meta"):
            return {name: tuple(p.shape) for name, p in GPT(s).named_parameters()}
    except RuntimeError as problem:
        raise UserError(f"MODEL_DIM={s.model_dim}, MLP_MULT={s.mlp_mult}: too large for any memory ({problem})") from problem


def parameter_counts(s):
    """{kind: parameters}."""
    counts = dict.fromkeys(KINDS, 0)
    for name, shape in parameter_shapes(s).items():
        counts[kind_of(name)] += math.prod(shape)
    return counts


# ---- 6. Optimizers ---------------------------------------------------------------------------------------------------

NEWTON_SCHULZ = {  # one triple (a, b, c) per iteration; the last one repeats
    "classic": [(3.4445, -4.7750, 2.0315)],
    "polar": [(8.15655, -22.48329, 15.87877), (4.04293, -2.80892, 0.50002), (3.89167, -2.77248, 0.50606),
              (3.28575, -2.36813, 0.46449), (2.34654, -1.70978, 0.42324)],  # Polar Express
}


def newton_schulz(g_NRC, coefficients, steps, dtype):
    """Matrices with g's singular vectors and singular values near 1 (R ≤ C), N of them at once: X ← aX + (bA + cA²)X."""
    x = g_NRC.to(dtype)
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    for i in range(steps):
        a, b, c = coefficients[min(i, len(coefficients) - 1)]
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class MuonGroup:
    """Matrices of one shape (up to transposition), stacked, padded to the ranks, each rank updating its share."""

    def __init__(self, params, rt):
        self.params, self.rt = params, rt
        self.rows, self.columns = min(params[0].shape), max(params[0].shape)
        padded = -(-len(params) // rt.world_size) * rt.world_size
        self.padding = padded - len(params)
        self.momentum = torch.zeros(padded // rt.world_size, self.rows, self.columns, device=params[0].device)
        self.scales = [math.sqrt(max(1, p.size(0) / p.size(1))) for p in params]

    def whole_momentum(self):
        """The momentum of every matrix, from all ranks: [n, R, C]."""
        return self.rt.all_gather(self.momentum)()[: len(self.params)]

    def take_momentum(self, whole):
        """This rank's share of whole_momentum, whatever number of ranks it came from."""
        padded = F.pad(whole, (0, 0, 0, 0, 0, self.padding))
        self.momentum.copy_(padded.tensor_split(self.rt.world_size)[self.rt.rank])

    def oriented(self, p):
        """p or pᵀ, so that rows ≤ columns."""
        return p if p.shape == (self.rows, self.columns) else p.mT

    def reduced_gradients(self):
        """Begin to sum the gradients over ranks; returns a function that gives this rank's share, [n, R, C]."""
        grads = [self.oriented(p.grad) for p in self.params]
        grads += [torch.zeros_like(grads[0])] * self.padding
        return self.rt.reduce_scatter(torch.stack(grads))

    def update(self, grads, lr, weight_decay, momentum, orthogonalize):
        """Begin a Muon step with Nesterov momentum and decoupled weight decay; returns a function that changes the weights."""
        self.momentum.mul_(momentum).add_(grads)
        gathered = self.rt.all_gather(orthogonalize(grads.add(self.momentum, alpha=momentum)))

        @torch.no_grad()
        def finish():
            directions = list(zip(self.params, self.scales, gathered().float()))
            torch._foreach_mul_(self.params, 1 - lr * weight_decay)
            for scale in set(self.scales):
                pairs = [(p, u if p.shape == u.shape else u.mT) for p, own, u in directions if own == scale]
                torch._foreach_add_(*map(list, zip(*pairs)), alpha=-lr * scale)
        return finish


class Optimizers:
    """Muon for matrices, AdamW for tables and small tensors; gradients are summed over ranks, then clipped, here."""

    def __init__(self, model, s, rt):
        self.s, self.rt = s, rt
        by_kind = {kind: [p for name, p in model.named_parameters() if kind_of(name) == kind] for kind in KINDS}
        optimizer_of = {kind: getattr(s, row.optimizer, row.optimizer) for kind, row in KINDS.items()}
        shapes = {}
        for kind, row in KINDS.items():
            for p in by_kind[kind] if optimizer_of[kind] == "muon" else ():
                shapes.setdefault((row.lr, row.weight_decay, min(p.shape), max(p.shape)), []).append(p)
        self.muon = [(MuonGroup(params, rt), getattr(s, lr), getattr(s, wd)) for (lr, wd, *_), params in shapes.items()]
        groups = [dict(params=by_kind[kind], lr=getattr(s, row.lr), base_lr=getattr(s, row.lr),
                       weight_decay=getattr(s, row.weight_decay))
                  for kind, row in KINDS.items() if optimizer_of[kind] == "adamw" and by_kind[kind]]
        self.adamw = torch.optim.AdamW(groups, betas=(s.beta1, s.beta2), eps=s.adam_eps, fused=True)
        self.small = [p for group in groups for p in group["params"]]
        grouped = [id(p) for group, *_ in self.muon for p in group.params] + [id(p) for p in self.small]
        assert sorted(grouped) == sorted(id(p) for p in model.parameters()), "every parameter in exactly one group"
        orthogonalize = functools.partial(newton_schulz, coefficients=NEWTON_SCHULZ[s.muon_coefficients],
                                          steps=s.muon_backend_steps, dtype=rt.dtype)
        self.orthogonalize = rt.compiled(orthogonalize)

    def _reduced_gradients(self):
        """The shares of each Muon group, with the small tensors' gradients in place: all sums over ranks are under way at once,
        the small ones together; and the square of all gradients' norm."""
        small = self.rt.sum_later(torch.cat([p.grad.flatten() for p in self.small]))
        begun = [group.reduced_gradients() for group, *_ in self.muon]
        shares = [share().float() for share in begun]
        flat = small()
        torch._foreach_copy_([p.grad for p in self.small],
                             [g.view_as(p) for p, g in zip(self.small, flat.split([p.numel() for p in self.small]))])
        own = torch.stack(torch._foreach_norm(shares)).square().sum()
        return shares, self.rt.sum_(own) + flat.square().sum()

    def state(self):
        """All that a later step depends on; a collective of all ranks."""
        return dict(muon=[group.whole_momentum() for group, *_ in self.muon], adamw=self.adamw.state_dict())

    def load(self, state):
        for (group, *_), momentum in zip(self.muon, state["muon"], strict=True):
            group.take_momentum(momentum)
        self.adamw.load_state_dict(state["adamw"])

    @torch.no_grad()
    def step(self, lr_scale, momentum, skip_bad=False):
        """Reduce, clip by the global norm, update; returns that norm (a tensor) and forgets the gradients. With skip_bad
        nothing is updated where the norm is not finite."""
        shares, square = self._reduced_gradients()
        norm = square.sqrt()
        if skip_bad and not math.isfinite(norm.item()):
            self._forget()
            return norm
        if self.s.grad_clip_norm:
            factor = (self.s.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0)
            factor = torch.where(torch.isfinite(norm), factor, 0.0)  # so that only the group that is not finite spoils weights
            torch._foreach_mul_(shares + [p.grad for p in self.small], factor)
        finish = [group.update(share, lr * lr_scale, weight_decay, momentum, self.orthogonalize)
                  for share, (group, lr, weight_decay) in zip(shares, self.muon)]
        for group in self.adamw.param_groups:
            group["lr"] = group["base_lr"] * lr_scale
        self.adamw.step()  # while the directions of the matrices travel
        for change in finish:
            change()
        self._forget()
        return norm

    def _forget(self):
        for p in [*self.small, *(p for group, *_ in self.muon for p in group.params)]:
            p.grad = None


# ---- 7. Schedules: pure functions of the step and the training clock -------------------------------------------------

def warmdown_share(s, step, elapsed_ms):
    """1, then a linear fall to 0 over the last WARMDOWN_ITERS steps.

    The end is the last of ITERATIONS or the wall-clock cap, whichever is nearer at the pace so far. A warmdown longer
    than the whole run spans the run.
    """
    shares = [1.0]
    if s.warmdown_iters and s.iterations:
        shares.append((s.iterations - step) / min(s.warmdown_iters, s.iterations))
    if s.warmdown_iters and s.max_wallclock_seconds and step:
        cap_ms = 1000 * s.max_wallclock_seconds
        shares.append((cap_ms - elapsed_ms) / min(s.warmdown_iters * elapsed_ms / step, cap_ms))
    return max(min(shares), 0.0)


def lr_scale(s, step, elapsed_ms):
    """Share of the full learning rate: the warmdown's, but falling to LR_FLOOR instead of 0."""
    return s.lr_floor + (1 - s.lr_floor) * warmdown_share(s, step, elapsed_ms)


def muon_momentum(s, step):
    """Linear from MUON_MOMENTUM_WARMUP_START to MUON_MOMENTUM."""
    share = min(step / s.muon_momentum_warmup_steps, 1.0) if s.muon_momentum_warmup_steps else 1.0
    return (1 - share) * s.muon_momentum_warmup_start + share * s.muon_momentum


def out_of_time(s, step, elapsed_ms):
    """True where the next step, at the mean pace so far, would end after the cap (less what GPTQ keeps for itself)."""
    reserve = s.gptq_reserve_seconds if s.gptq and s.gptq_text == "train" else 0
    budget_ms = 1000 * (s.max_wallclock_seconds - reserve)
    return bool(s.max_wallclock_seconds and step and elapsed_ms * (step + 1) / step > budget_ms)


def fake_quant_on(s, share):
    """Fake quantization: always, or late in the warmdown (`share` of it is left), or never."""
    return bool(s.qat_enabled or (s.late_qat_threshold and share < s.late_qat_threshold))


# ---- 8. Weight averaging ---------------------------------------------------------------------------------------------

class WeightAverage:
    """EMA and SWA of the parameters, fp32. The EMA is bias-corrected: after n steps the weights are those of
    Σ d^(n−i)·wᵢ / Σ d^(n−i), so it is right after 50 steps as after 7,000."""

    def __init__(self, model, s):
        self.s, self.params = s, list(model.parameters())
        self.ema = [torch.zeros_like(p) for p in self.params] if s.ema_enabled else None
        self.swa, self.updates, self.snapshots = None, 0, 0

    @torch.no_grad()
    def update(self, step, share):
        """After optimizer step number `step` (from 1), with `share` of the warmdown left. True at SWA's first."""
        params = [p.detach() for p in self.params]
        if self.ema:
            self.updates += 1
            decay = self.s.ema_decay
            torch._foreach_lerp_(self.ema, params, (1 - decay) / (1 - decay ** self.updates))
        if self.s.swa_enabled and share < self.s.swa_start_frac and step % self.s.swa_every == 0:
            self.swa = self.swa or [torch.zeros_like(p) for p in params]
            self.snapshots += 1
            torch._foreach_lerp_(self.swa, params, 1 / self.snapshots)
            return self.snapshots == 1
        return False

    def state(self):
        return dict(ema=self.ema, swa=self.swa, updates=self.updates, snapshots=self.snapshots)

    def load(self, state):
        self.ema, self.swa, self.updates, self.snapshots = (state[k] for k in ("ema", "swa", "updates", "snapshots"))

    @torch.no_grad()
    def apply(self):
        """Give the model its averaged weights; returns what they are: "EMA", "SWA", "EMA and SWA", or "" (as trained)."""
        averages = {"EMA": self.ema if self.updates else None, "SWA": self.swa}
        averages = {name: tensors for name, tensors in averages.items() if tensors}
        for p, *values in zip(self.params, *averages.values()):
            if values:
                p.copy_(torch.stack(values).mean(0))
        return " and ".join(averages)


# ---- 9. Quantizer: rows → integer codes and a step per row, and back -------------------------------------------------

CLIP_QUANTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)


def code_limit(bits):
    return 2 ** (bits - 1) - 1


def to_codes(w_RC, steps_R, bits):
    """Integer codes of w at the given steps, clamped to ±(2^(bits−1)−1); a row with step 0 is all zero."""
    inverse = torch.where(steps_R > 0, 1 / steps_R, torch.zeros_like(steps_R))
    return (w_RC * inverse[:, None]).round().clamp(-code_limit(bits), code_limit(bits)).to(torch.int8)


def from_codes(codes_RC, steps_R):
    return codes_RC.float() * steps_R[:, None]


def fp16_steps(steps_R):
    """Steps as fp16 can store them, never beyond its range."""
    return steps_R.clamp(max=65504.0).half().float()


def fit_steps(w_RC, bits, s):
    """The step of every row, fp16-representable: the clip among the quantiles of |w| with the least squared error.

    GPTQ-lite, decided for each row by itself (QUANT_CLIP_SCOPE=matrix: one quantile for all rows, as the ancestors did); with
    GPTQ_LITE=0 the clip is the row's maximum, with QUANT_CLIP_STD so many root mean squares of it (SDClip, #1394).
    """
    magnitude, deviations = w_RC.abs(), s.quant_clip_std if bits < 8 else s.quant_clip_std_int8
    if deviations:
        clips = deviations * w_RC.square().mean(1).sqrt()[None]
    elif s.gptq_lite:
        clips = torch.quantile(magnitude, torch.tensor(CLIP_QUANTILES, device=w_RC.device), dim=1)
    else:
        clips = magnitude.amax(1)[None]
    floor = s.quant_step_floor if bits < 8 else 0.0
    candidates = fp16_steps((clips / code_limit(bits)).clamp_min(floor))
    errors = torch.stack([(w_RC - from_codes(to_codes(w_RC, steps, bits), steps)).square().sum(1) for steps in candidates])
    if s.quant_clip_scope == "matrix":
        errors = errors.sum(1, keepdim=True).expand_as(errors)
    return candidates.gather(0, errors.argmin(0)[None])[0]


def prune(w, share):
    """w with the given share of its smallest magnitudes set to zero."""
    dropped = int(share * w.numel())
    return torch.where(w.abs() > w.abs().flatten().kthvalue(dropped).values, w, 0.0) if dropped else w


def gptq_codes(w_RC, steps_R, bits, hessian_CC, s, block=128):
    """Codes with error compensation: each column's rounding error is spread over the columns not yet rounded.

    GPTQ (Frantar et al. 2022) with the Cholesky factor of the inverse Hessian; hessian = Σ xxᵀ of the matrix' inputs.
    """
    hessian, w = hessian_CC.double(), w_RC.double()
    diagonal = hessian.diagonal().clone()
    order = diagonal.argsort(descending=True) if s.gptq_act_order else torch.arange(len(diagonal), device=w.device)
    hessian = hessian + torch.diag(torch.where(diagonal > 0, 0.0, 1.0))
    w, hessian, damp = w[:, order], hessian[order][:, order], s.gptq_damp
    while True:
        try:
            damped = hessian + damp * diagonal.mean() * torch.eye(len(diagonal), dtype=w.dtype, device=w.device)
            factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
            break
        except torch.linalg.LinAlgError:  # few calibration rows: more damping, at last as good as none compensated
            damp *= 10
            if not damp < 1e6:
                raise
    codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    for begin in range(0, w.size(1), block):
        end = min(begin + block, w.size(1))
        errors = torch.zeros(w.size(0), end - begin, dtype=w.dtype, device=w.device)
        for j in range(begin, end):
            codes[:, j] = to_codes(w[:, j: j + 1].float(), steps_R, bits)[:, 0]
            errors[:, j - begin] = (w[:, j] - codes[:, j] * steps_R) / factor[j, j]
            w[:, j:end] -= errors[:, j - begin, None] * factor[j, j:end]
        w[:, end:] -= errors @ factor[begin:end, end:]
    return torch.empty_like(codes).index_copy_(1, order, codes)


class HessianRecorder(torch.overrides.TorchFunctionMode):
    """Σ xxᵀ over the inputs x of every attention and MLP matrix while the model runs, eagerly, inside of this context.

    The forward is the one that trains: the matrices behind a product are found by following casts and joins.
    """

    def __init__(self, model):
        super().__init__()
        self.names = {id(p): [name] for name, p in model.named_parameters() if kind_of(name) in ("attn", "mlp")}
        self.made, self.sums = {}, {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.Tensor.to, torch.cat):
            names = [name for w in (args[0] if func is torch.cat else args[:1]) for name in self._behind(w)]
            if names:
                self.made[id(out)] = (names, out)  # holding `out` keeps its id its own
        elif func is F.linear and (names := self._behind(args[1])):
            x = args[0].detach().flatten(0, -2).float()
            products = x.mT @ x
            for name in names:
                self.sums[name] = self.sums.get(name, 0) + products
        return out

    def _behind(self, w):
        """Names of the matrices that w is a cast or a join of; asked once."""
        return self.names.get(id(w)) or self.made.pop(id(w), ([], None))[0]


@dataclass
class Calibration:
    """What training tokens say of the weights: Σ xxᵀ [C, C] over the inputs of attention and MLP matrices, and of every matrix
    and table the squared gradients by row [R] and by column [C]: how much an error there costs (the empirical Fisher
    information, taken as row × column)."""
    hessians: dict
    energies: dict


@torch.no_grad()
def write_rows(model, s, count, seed):
    """Rows [count, T + 1] that the model writes from BOS on, drawn from its own distribution."""
    rows = torch.full((count, 1), s.bos_token, device=model.tok_emb.device)
    generator = torch.Generator(rows.device).manual_seed(seed)
    for _ in range(s.train_seq_len if count else 0):
        rows = torch.cat((rows, torch.multinomial(model.logits(rows)[:, -1].softmax(-1), 1, generator=generator)), 1)
    return rows


def calibrate(model, batches_of_rows, rt):
    """Calibration from rows of training tokens, int [n, T + 1], summed over ranks. Leaves no gradients behind."""
    recorder, energies = HessianRecorder(model), {}
    for rows in batches_of_rows:
        with recorder:
            nll = model(rows[:, :-1].long(), rows[:, 1:].long())
        nll.sum().backward()
        for name, p in model.named_parameters():
            if kind_of(name) != "control":
                shared = len(range(int(name.split(".")[1]), model.s.num_layers, model.s.cores)) if name.startswith("cores.") else 1
                square, (by_row, by_column) = (shared * p.grad.float()).square(), energies.get(name, (0, 0))  # the sum over its blocks
                energies[name] = (by_row + square.mean(1), by_column + square.mean(0))
            p.grad = None
    missing = {name for names in recorder.names.values() for name in names} - set(recorder.sums)
    assert not missing, f"no Hessian for {sorted(missing)}"
    return Calibration({name: rt.sum_(total) for name, total in recorder.sums.items()},
                       {name: tuple(rt.sum_(e) for e in pair) for name, pair in energies.items()})


def crown_q(model):
    """Σ over matrices and rows of mean(w²)·(rowmax/15)²/12: what rounding to a 15th of the maximum will cost (#693)."""
    matrices = [p for name, p in model.named_parameters() if kind_of(name) in ("attn", "mlp")]
    return sum((w.square().mean(1) * (w.abs().amax(1) / 15).square() / 12).sum() for w in matrices)


@dataclass
class Quantized:
    """A tensor as it is stored: codes int8 [R, C] with steps [R], column factors [C] and their bits, or an fp16 array."""
    bits: int
    codes: Tensor | None = None
    steps: Tensor | None = None
    columns: Tensor | None = None
    half: Tensor | None = None
    shape: tuple = ()

    def weights(self):
        """The fp32 tensor that the file stands for."""
        return self.half.float() if self.bits == 16 else from_codes(self.codes, self.steps) * self.columns


def bits_of(name, s):
    """Bits of a parameter in the artifact: its kind's, unless it is kept as fp16 by name."""
    keep = any(part.strip() and part.strip() in name for part in s.fp16_keep_name_patterns.split(","))
    row = KINDS[kind_of(name)]
    return getattr(s, row.bits) if row.bits and not keep else 16


def on_grid(x):
    """The nearest power of 2^(1/4): rows and columns share steps, which the file then holds for next to nothing."""
    return torch.exp2((x.log2() * 4).round() / 4)


def step_weights(w_RC, energies):
    """How coarse each row's steps [R] and each column's [C] may be, beside those of other tensors.

    Equal cost everywhere would be 1/√energy of tensor, row and column. Rows and columns get only the square root of that:
    measured on a model of 2 M weights, this lost less than the full power or none.
    """
    if energies is None:
        return w_RC.new_ones(w_RC.size(0)), w_RC.new_ones(w_RC.size(1))
    mean = energies[0].mean().clamp_min(1e-30)
    rows, columns = ((e / e.mean().clamp_min(1e-30) + 1e-3) ** -0.25 for e in energies)
    rows, columns = (x / x.log().mean().exp() for x in (rows, columns))
    return on_grid(rows * mean.rsqrt()), fp16_steps(on_grid(columns))


def quantize(state, s, calibration=None):
    """A function of a level that gives {name: Quantized}: steps as fine as permitted, but none below the level times its weight
    (QUANT_FIT=level), or all times the level (scale).

    The finest steps are searched once. With a calibration matrices get full GPTQ. Raises UserError if a weight is not finite
    or too large for fp16.
    """
    fitted = {}
    for name, w in state.items():
        w, bits = w.detach().float(), bits_of(name, s)
        if not torch.isfinite(w).all() or (bits == 16 and w.abs().max() > 65504):
            raise UserError(f"{name}: holds {float(w.abs().max())}, not a weight that can be stored: training diverged; "
                            "lower MATRIX_LR, SCALAR_LR or TIED_EMBED_LR")
        if bits < 16:
            w = prune(w, s.prune_frac)
            weights, columns = step_weights(w, calibration.energies[name] if calibration and s.quant_fit == "level" else None)
            fitted[name] = (w, bits, fit_steps(w / columns, bits, s), weights, columns)
        else:
            fitted[name] = (w, bits, None, None, None)

    def stored(name, w, bits, finest, weights, columns, level, exact):
        if bits == 16:
            return Quantized(16, half=w.half().cpu(), shape=tuple(w.shape))
        steps = fp16_steps(finest * level if s.quant_fit == "scale" else torch.maximum(finest, level * weights))
        if exact and calibration and name in calibration.hessians:
            codes = gptq_codes(w / columns, steps, bits, calibration.hessians[name] * columns * columns[:, None], s)
            codes = torch.where(w == 0, 0, codes) if s.prune_frac else codes  # what is pruned stays so
        else:
            codes = to_codes(w / columns, steps, bits)
        return Quantized(bits, codes.cpu(), steps.cpu(), columns.cpu(), shape=tuple(w.shape))

    return lambda level, exact=True: {name: stored(name, *entry, level, exact) for name, entry in fitted.items()}


def error_report(state, tensors, hessians):
    """Lines that say what each quantized tensor got: step, order-0 entropy of its codes, relative error of the weights, and of
    the outputs where a Hessian is at hand; then the same by kind."""
    kinds = {}
    for name, w in state.items():
        if tensors[name].bits < 16:
            w, t = w.detach().float().cpu(), tensors[name]
            share = torch.bincount(t.codes.flatten().int() + 128).double() / max(t.codes.numel(), 1)
            entropy, error = float(-torch.xlogy(share, share).sum()) / math.log(2), w - t.weights()
            sums = np.array([w.numel(), entropy * w.numel(), float(t.steps.sum()) / max(len(t.steps), 1) * w.numel(),
                             float(error.square().sum()), float(w.square().sum())])
            kinds[kind_of(name)] = kinds.get(kind_of(name), 0) + sums
            line = described_error(f"{name} int{t.bits}", sums)
            if hessians and name in hessians:
                outputs, wrong = (float(((x @ hessians[name].cpu()) * x).sum()) for x in (w, error))
                line += f" output_error:{math.sqrt(max(wrong, 0) / max(outputs, 1e-30)):.5f}"
            yield line, False
    for kind, sums in kinds.items():
        yield described_error(kind, sums), True


def described_error(label, sums):
    count, bits, steps, wrong, total = sums
    return (f"quantized {label} weights:{count:.0f} bits_per_code:{bits / max(count, 1):.3f} mean_step:{steps / max(count, 1):.5f} "
            f"weight_error:{math.sqrt(wrong / max(total, 1e-30)):.5f}")


# ---- 10. Artifact: codes → bytes → file, and back; data only, nothing in it is ever executed -------------------------
#
# magic | header length, u32 | header, JSON | side, lzma | codes | SHA-256 of all before. The side holds an index (JSON:
# settings, tensors), then steps and fp16 arrays; codes are those of every quantized tensor, tensors of equal bits together.

ARTIFACT_MAGIC = b"PGOLF\x00\x00\x02"  # the last byte is the version
INDEX_MOST_BYTES = 1 << 20  # parsed JSON takes twenty times its text
# A file may stand for so many weights: for each of its bytes, and altogether. Nothing larger is allocated for it.
MOST_WEIGHTS_PER_BYTE, MOST_WEIGHTS = 64, 1 << 30
# Codes look like noise to a match finder: a shallow search and no literal context are smaller and 3× faster here.
LZMA_FILTERS = [dict(id=lzma.FILTER_LZMA2, lc=0, lp=0, pb=0, mode=lzma.MODE_NORMAL, mf=lzma.MF_BT4, nice_len=64, depth=1,
                     dict_size=1 << 16)]
# Settings that are not stored: where things lie and how this machine computes.
TIED_TO_THE_RUN = ("preset", "run_id", "device", "precision", "compile", "attention", "kernels", "out_dir", "eval_only", "scores_path",
                   "data_path", "tokenizer_path", "val_limit_tokens", "checkpoint_every_seconds", "resume", "nonfinite")


def squeeze(data):
    return lzma.compress(data, lzma.FORMAT_RAW, filters=LZMA_FILTERS)


def unsqueeze(data, size):
    """What squeeze was given, `size` bytes; never holds more. Raises ValueError."""
    try:
        out = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=LZMA_FILTERS).decompress(data, max_length=size + 1)
    except (lzma.LZMAError, EOFError) as problem:
        raise ValueError(problem) from problem
    if len(out) != size:
        raise ValueError(f"{len(out)} bytes where {size} are promised")
    return out


def zstd():
    """The zstandard package, asked for by CODEC=zstd alone. Raises UserError where it is missing."""
    try:
        return importlib.import_module("zstandard")
    except ImportError as problem:
        raise UserError("CODEC=zstd: the zstandard package is not installed; pip install zstandard, or CODEC=auto") from problem


def unzstd(data, size):
    package = zstd()
    try:
        out = package.ZstdDecompressor(max_window_size=1 << 27).stream_reader(io.BytesIO(data)).read(size + 1)
    except package.ZstdError as problem:
        raise ValueError(problem) from problem
    if len(out) != size:
        raise ValueError(f"{len(out)} bytes where {size} are promised")
    return out


# rANS (Duda 2013), many states side by side so that numpy does the work: a state below 2³² holds what was coded, a code of
# frequency f/2¹⁵ takes 15 − log₂ f bits of it, 16 bits at a time move to the file. Frequencies are counted for each scale of
# codes: a code's context is its row's scale plus its column's. Rows and columns of trained weights differ so much that this
# takes 5 % less than the order-0 entropy of the tensors.
RANS_LANES, RANS_BITS, CONTEXTS, SYMBOLS = 512, 15, 48, 256


def scales_of(codes_RC):
    """Quarter octaves of each row's root mean square, and of each column's after division by its rows': uint8 [R], [C]."""
    q = codes_RC.astype(np.float32)
    rows = np.maximum(np.sqrt(np.square(q).sum(1) / max(q.shape[1], 1)), 2.0 ** -4)
    columns = np.sqrt(np.square(q / rows[:, None]).sum(0) / max(q.shape[0], 1))
    return [np.rint(4 * np.log2(np.maximum(x, 2.0 ** -4)) + 16).astype(np.uint8) for x in (rows, columns)]


def contexts_of(rows, columns):
    """Context of every code, uint8 [R·C]."""
    return (rows[:, None].astype(np.int16) + columns - 16).clip(0, CONTEXTS - 1).astype(np.uint8).ravel()


def frequencies(counts):
    """Counts [CONTEXTS, SYMBOLS] as frequencies that sum to 2¹⁵ in each row, at least 1 for what occurs: uint16."""
    total = np.maximum(counts.sum(1, keepdims=True), 1)
    out = np.maximum(np.rint(counts * (1 << RANS_BITS) / total), counts > 0).astype(np.int64)
    most = out.argmax(1)
    out[np.arange(len(out)), most] += (1 << RANS_BITS) - out.sum(1)
    return out.astype(np.uint16)


def rans_tables(frequency):
    """(frequency, start) of every (context, symbol), flat uint32. Raises ValueError where a row does not sum to 2¹⁵."""
    if (frequency.sum(1, dtype=np.int64) != 1 << RANS_BITS).any():
        raise ValueError("frequencies that do not sum to one")
    wide = frequency.astype(np.uint32)
    return wide.ravel(), (np.cumsum(wide, 1, dtype=np.uint32) - wide).ravel()


def rans_encode(symbols, contexts, frequency):
    """Bytes of the symbols (uint8 [n]) under their contexts (uint8 [n]); code i goes to lane i mod RANS_LANES."""
    flat_frequency, flat_start = rans_tables(frequency)
    state, words = np.full(RANS_LANES, 1 << 16, np.uint32), []
    for at in range((len(symbols) - 1) // RANS_LANES * RANS_LANES, -1, -RANS_LANES):  # backwards: the reader goes forwards
        entry = contexts[at: at + RANS_LANES] * np.int32(SYMBOLS) + symbols[at: at + RANS_LANES]
        f, x = flat_frequency[entry], state[: len(entry)]
        full = x >> np.uint32(32 - RANS_BITS) >= f
        words.append((x[full] & np.uint32(0xFFFF)).astype("<u2"))
        x[full] >>= np.uint32(16)
        x += x // f * (np.uint32(1 << RANS_BITS) - f) + flat_start[entry]
    return state.astype("<u4").tobytes() + b"".join(w.tobytes() for w in reversed(words))


def rans_decode(data, contexts, frequency):
    """The symbols, uint8 [n]. Raises ValueError on anything that rans_encode did not write."""
    flat_frequency, flat_start = rans_tables(frequency)
    symbol_at = np.repeat(np.tile(np.arange(SYMBOLS, dtype=np.uint8), CONTEXTS), flat_frequency)
    state, words, used = np.frombuffer(data, "<u4", RANS_LANES).copy(), np.frombuffer(data, "<u2", offset=4 * RANS_LANES), 0
    symbols = np.empty(len(contexts), np.uint8)
    for at in range(0, len(contexts), RANS_LANES):
        context = contexts[at: at + RANS_LANES].astype(np.int32)
        x = state[: len(context)]
        slot = x & np.uint32((1 << RANS_BITS) - 1)
        found = symbols[at: at + RANS_LANES] = symbol_at[(context << RANS_BITS) + slot]
        entry = context * SYMBOLS + found
        x[:] = flat_frequency[entry] * (x >> np.uint32(RANS_BITS)) + slot - flat_start[entry]
        low = np.flatnonzero(x < 1 << 16)
        x[low] = x[low] << np.uint32(16) | words[used: used + len(low)]
        used += len(low)
    if used != len(words) or (state != 1 << 16).any():
        raise ValueError("codes that do not end where they should")
    return symbols


def encode_codes(codec, blocks):
    """Bytes of the codes of some tensors, int8 [R, C] each."""
    symbols = np.concatenate([np.zeros(0, np.uint8), *(b.ravel().view(np.uint8) ^ 0x80 for b in blocks)])
    if codec != "rans":
        return zstd().ZstdCompressor(level=22).compress(symbols.tobytes()) if codec == "zstd" else squeeze(symbols.tobytes())
    scales = [scales_of(b) for b in blocks]
    contexts = np.concatenate([np.zeros(0, np.uint8), *(contexts_of(*pair) for pair in scales)])
    counts = sum(np.bincount(contexts[at: at + (1 << 20)] * np.intp(SYMBOLS) + symbols[at: at + (1 << 20)],
                             minlength=CONTEXTS * SYMBOLS) for at in range(0, max(len(symbols), 1), 1 << 20))
    frequency = frequencies(counts.reshape(CONTEXTS, SYMBOLS))
    tables = squeeze(frequency.astype("<u2").T.tobytes() + b"".join(x.tobytes() for pair in scales for x in pair))
    return struct.pack("<I", len(tables)) + tables + rans_encode(symbols, contexts, frequency)


def decode_codes(codec, data, shapes):
    """The codes of tensors of these shapes, int8 [R, C] each. Raises ValueError."""
    sizes = [math.prod(shape) for shape in shapes]
    if codec == "rans":
        length, = struct.unpack_from("<I", data)
        side = unsqueeze(data[4: 4 + length], 2 * CONTEXTS * SYMBOLS + sum(map(sum, shapes)))
        frequency = np.frombuffer(side, "<u2", CONTEXTS * SYMBOLS).reshape(SYMBOLS, CONTEXTS).T
        scales = iter(np.split(np.frombuffer(side, np.uint8, offset=2 * frequency.size),
                               np.cumsum([n for shape in shapes for n in shape])[:-1]))
        contexts = np.concatenate([np.zeros(0, np.uint8), *(contexts_of(next(scales), next(scales)) for _ in shapes)])
        symbols = rans_decode(data[4 + length:], contexts, frequency)
    else:
        symbols = np.frombuffer({"lzma": unsqueeze, "zstd": unzstd}[codec](data, sum(sizes)), np.uint8)
    blocks = np.split((symbols ^ 0x80).view(np.int8), np.cumsum(sizes)[:-1])
    return [block.reshape(shape) for block, shape in zip(blocks, shapes)]


class ArtifactError(UserError):
    """The file is not an artifact, or not a whole one."""


def planes(values):
    """uint16 values as one byte string, low bytes first: the high bytes, alike among neighbours, compress better."""
    return values.astype("<u2").view(np.uint8).reshape(-1, 2).T.tobytes()


def from_planes(data):
    return np.frombuffer(data, np.uint8).reshape(2, -1).T.copy().view("<u2").ravel()


def encode_artifact(tensors, s, codec, note=""):
    """The file's bytes from {name: Quantized}; `note` says in words how the steps were fitted.

    Steps and column factors are stored as ranks among their distinct values: few of them occur where they were fitted to a
    budget.
    """
    order = sorted(tensors, key=lambda name: (tensors[name].bits, list(tensors).index(name)))
    coded = [tensors[name] for name in order if tensors[name].bits < 16]
    codes = encode_codes(codec, [t.codes.numpy() for t in coded])
    none = np.zeros(0, np.float16)
    factors = np.concatenate([none, *(x.numpy().astype(np.float16) for t in coded for x in (t.steps, t.columns))])
    distinct, ranks = np.unique(factors.view(np.uint16), return_inverse=True)
    halves = np.concatenate([none, *(tensors[n].half.flatten().numpy() for n in order if tensors[n].bits == 16)])
    stored = {f.name: getattr(s, f.name) for f in fields(s) if f.name not in TIED_TO_THE_RUN}
    index = json.dumps(dict(settings=stored, note=note, tensors=[[n, tensors[n].bits, tensors[n].shape] for n in order],
                            distinct=len(distinct)), separators=(",", ":")).encode()
    side = index + planes(distinct) + planes(ranks) + planes(halves.view(np.uint16))
    squeezed = squeeze(side)
    header = dict(codec=codec, index_bytes=len(index), side_bytes=len(side), squeezed_bytes=len(squeezed))
    header.update({"zstandard": zstd().__version__} if codec == "zstd" else {})
    header = json.dumps(header, separators=(",", ":")).encode()
    content = ARTIFACT_MAGIC + struct.pack("<I", len(header)) + header + squeezed + codes
    return content + hashlib.sha256(content).digest()


def open_artifact(content):
    """(header, index, the side after the index, bytes of the codes) of a file's content. Raises ValueError and the like;
    allocates no more than a side of the promised length, 64 times the file's at most."""
    start = len(ARTIFACT_MAGIC) + 4
    if len(content) < start + 32 or content[: len(ARTIFACT_MAGIC)] != ARTIFACT_MAGIC:
        raise ArtifactError(f"{len(content)} bytes beginning with {content[:8]!r}: not an artifact of this script")
    if hashlib.sha256(content[:-32]).digest() != content[-32:]:
        raise ArtifactError("the checksum does not match: the file is damaged or cut short; make or fetch it again")
    header_bytes, = struct.unpack_from("<I", content, start - 4)
    header, start = json.loads(content[start: start + header_bytes]), start + header_bytes
    index_bytes, side_bytes, squeezed_bytes = (int(header[k]) for k in ("index_bytes", "side_bytes", "squeezed_bytes"))
    if not (0 <= index_bytes <= min(side_bytes, INDEX_MOST_BYTES) and side_bytes <= MOST_WEIGHTS_PER_BYTE * len(content)
            and 0 <= squeezed_bytes <= len(content) - 32 - start):
        raise ValueError(f"header {header}")
    side = unsqueeze(content[start: start + squeezed_bytes], side_bytes)
    return header, json.loads(side[:index_bytes]), side[index_bytes:], memoryview(content)[start + squeezed_bytes: -32]


def described_tensors(index, most):
    """[(name, bits, shape)] of an index. Raises ValueError unless they differ, are well-formed and at most `most` weights."""
    described = [(str(name), int(bits), tuple(int(n) for n in shape)) for name, bits, shape in index["tensors"]]
    if any(bits not in (4, 5, 6, 7, 8, 16) or min(shape, default=1) < 0 or (bits < 16 and len(shape) != 2)
           for _, bits, shape in described):
        raise ValueError("a tensor of unknown bits or shape")
    if len({name for name, *_ in described}) != len(described):
        raise ValueError("a tensor twice")
    total = sum(math.prod(shape) + sum(shape) for *_, shape in described)
    if total > most:
        raise ValueError(f"{total} weights, more than such a file can hold")
    return described


def decode_artifact(content):
    """(stored settings, {name: Quantized}, note) from a file's bytes. Raises ArtifactError."""
    try:
        header, index, side, codes = open_artifact(content)
        described = described_tensors(index, min(MOST_WEIGHTS, MOST_WEIGHTS_PER_BYTE * len(content)))
        shapes = [shape for _, bits, shape in described if bits < 16]
        half_count = sum(math.prod(shape) for _, bits, shape in described if bits == 16)
        ends = np.cumsum([2 * int(index["distinct"]), 2 * sum(map(sum, shapes)), 2 * half_count])
        if ends[-1] != len(side) or ends[0] < 0:
            raise ValueError(f"tensors that do not fill the {len(side)} bytes there are")
        distinct, ranks, halves = (from_planes(side[a:b]) for a, b in zip((0, *ends), ends))
        factors = torch.from_numpy(distinct.view(np.float16)[ranks].astype(np.float32))
        halves, blocks = torch.from_numpy(halves.view(np.float16)), iter(decode_codes(header["codec"], codes, shapes))
        tensors = {}
        for name, bits, shape in described:
            if bits == 16:
                half, halves = halves[: math.prod(shape)], halves[math.prod(shape):]
                tensors[name] = Quantized(16, half=half.view(shape), shape=shape)
            else:
                steps, columns, factors = factors.split([*shape, len(factors) - sum(shape)])
                block = torch.from_numpy(next(blocks))
                if block.numel() and max(-int(block.min()), int(block.max())) > code_limit(bits):
                    raise ValueError(f"{name}: a code beyond its {bits} bits")
                tensors[name] = Quantized(bits, block, steps, columns, shape=shape)
        return dict(index["settings"]), tensors, str(index["note"])
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError, RuntimeError, struct.error) as problem:
        raise ArtifactError(f"not readable as an artifact: {type(problem).__name__}: {problem}") from problem


def pack(state, s, budget_bytes, log=lambda line: None, calibration=None):
    """The artifact's bytes, at most `budget_bytes`. If the finest steps make too much, the level below which no step may lie
    (QUANT_FIT=level; scale: the factor of all) is raised until the file fits and at most 0.2 % is left. Raises UserError if
    even the coarsest steps do not fit.
    """
    at, codec = quantize(state, s, calibration), s.codec
    if codec == "auto":
        finest = at(0.0 if s.quant_fit == "level" else 1.0, exact=False)
        blocks = [t.codes.numpy() for t in finest.values() if t.bits < 16]
        sizes = {name: len(encode_codes(name, blocks)) for name in ("rans", "lzma")}
        codec = min(sizes, key=sizes.get)
        log("artifact:codec " + codec + " of " + ", ".join(f"{k} {v} bytes" for k, v in sizes.items()))

    def encoded(octaves, exact):
        level = 2.0 ** octaves if octaves is not None else 0.0 if s.quant_fit == "level" else 1.0
        return encode_artifact(at(level, exact), s, codec, f"{s.quant_fit} {level:.6g}")

    rounded = encoded(None, False)
    content = encoded(None, True) if len(rounded) <= 1.01 * budget_bytes else rounded  # error compensation takes long
    if len(content) <= budget_bytes:
        return content
    log(f"artifact:too large by {len(content) - budget_bytes} bytes at the finest steps; coarsening")
    smallest = len(encoded(24.0, False))
    if smallest > budget_bytes:
        raise UserError(f"the model takes {smallest} bytes at the coarsest steps, {smallest - budget_bytes} more than "
                        f"the {budget_bytes} that ARTIFACT_BUDGET_BYTES={s.artifact_budget_bytes} leaves beside the code; "
                        "shrink the model or lower ATTN_BITS, MLP_BITS, EMBED_BITS")
    coded = sum(w.numel() for name, w in state.items() if bits_of(name, s) < 16)
    content, octaves = fitted_to(budget_bytes, lambda x: encoded(x, False), coded, 0.0, -24.0, 24.0)
    if calibration:
        content, octaves = fitted_to(budget_bytes, lambda x: encoded(x, True), coded, octaves, octaves - 1, octaves + 1)
    log(f"artifact:{s.quant_fit} 2^{octaves:.4f} fits {len(content)} of {budget_bytes} bytes")
    return content


def fitted_to(budget_bytes, encoded, coded, guess, low, high):
    """(content, octaves): the largest of encoded(octaves) within the budget, to 0.05 % where sizes allow. `high` is known to
    fit. Each octave more takes about a bit from each of the `coded` codes."""
    best = None
    for attempt in range(30):
        content = encoded(guess)
        size = len(content)
        low, high = (low, guess) if size <= budget_bytes else (guess, high)
        best = (content, guess) if size <= budget_bytes else best
        if 0.9995 * budget_bytes <= size <= budget_bytes:
            break
        guess += 8 * (size - 0.9998 * budget_bytes) / max(coded, 1)
        if attempt % 4 == 3 or not low < guess < high:
            guess = (low + high) / 2
    return best or (encoded(high), high)


def read_artifact(path):
    """decode_artifact of a file on disk; errors name the path."""
    try:
        return decode_artifact(Path(path).read_bytes())
    except OSError as problem:
        raise ArtifactError(f"{path}: cannot be read ({problem.strerror}); name an artifact of a run") from problem
    except ArtifactError as problem:
        raise ArtifactError(f"{path}: {problem}") from problem


def check_shapes(own, tensors, path):
    """Raises ArtifactError unless the artifact holds every parameter of that name and shape, and no other."""
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if own != found:
        wrong = sorted(name for name in own.keys() | found.keys() if own.get(name) != found.get(name))
        raise ArtifactError(f"{path}: does not hold this model: {wrong[0]} is {found.get(wrong[0], 'absent')} in the file and "
                            f"{own.get(wrong[0], 'absent')} in the model ({len(wrong)} such)")


def load_quantized(model, tensors, path):
    """Give `model` the artifact's weights: every parameter, no other name, no other shape."""
    check_shapes({name: tuple(p.shape) for name, p in model.named_parameters()}, tensors, path)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(tensors[name].weights())


def size_forecast(s):
    """Bytes of the model file at the finest steps, for Gaussian weights: the entropy of their codes, and what is fp16."""
    total = 4096  # index and header
    for name, shape in parameter_shapes(s).items():
        bits, count = bits_of(name, s), math.prod(shape)
        if bits == 16:
            total += 2 * count
        else:  # a row's clip lies near its expected maximum, √(2 ln 2C) deviations
            deviations_per_step = math.sqrt(2 * math.log(2 * shape[1])) * 0.92 / code_limit(bits)
            entropy = math.log2(math.sqrt(2 * math.pi * math.e) / deviations_per_step)
            total += int(count * min(max(entropy, 0.1), bits) / 8) + shape[0]
    return total


# ---- 11. Evaluation: one loop for plain, sliding and test-time training ----------------------------------------------

class LedgerError(RuntimeError):
    """A score that would break the law: twice, out of order, missing, or tokens handed out before they were scored."""


class ScoreLedger:
    """The only way to a score: nll of every target, once, from left to right; tokens for adapting only behind that."""

    def __init__(self, tokens):
        self.tokens, self.scored = tokens, 0
        self.nll = np.full(len(tokens) - 1, np.nan, np.float32)

    def record(self, first, nll):
        """Append the scores of targets [first, first + len(nll)). Raises LedgerError."""
        if first != self.scored:
            raise LedgerError(f"targets from {first} on offered where {self.scored} are scored: each once, in order")
        if first + len(nll) > len(self.nll):
            raise LedgerError(f"{len(nll)} scores from target {first} on, past the end at {len(self.nll)}")
        if not np.isfinite(nll).all():
            raise LedgerError(f"target {first + int(np.argmin(np.isfinite(nll)))} scored {nll[~np.isfinite(nll)][0]}")
        self.nll[first: first + len(nll)] = nll
        self.scored += len(nll)

    def rows_for_adapting(self, first, last, length):
        """Non-overlapping rows [n, length + 1] whose targets are [first, ...) up to `last`. Raises LedgerError."""
        if not 0 <= first <= last <= self.scored:
            raise LedgerError(f"tokens of targets {first} to {last} asked for where {self.scored} are scored")
        n = (last - first) // length
        index = first + np.arange(n)[:, None] * length + np.arange(length + 1)
        return torch.from_numpy(self.tokens[index].astype(np.int64))

    def result(self, byte_table):
        """Loss, bits per byte and what proves them. Raises LedgerError unless every target is scored."""
        if self.scored != len(self.nll):
            raise LedgerError(f"{self.scored} of {len(self.nll)} targets scored")
        loss_sum, byte_count = float(self.nll.sum(dtype=np.float64)), byte_table.count(self.tokens)
        return dict(val_loss=loss_sum / len(self.nll), val_bpb=bits_per_byte(loss_sum, byte_count), targets=len(self.nll),
                    bytes=byte_count, loss_sum=loss_sum, sha256=hashlib.sha256(self.nll.tobytes()).hexdigest())


def window_plan(targets, length, stride):
    """(start [W], first [W]): window w reads tokens start..start+length and scores targets first..start+length.

    The first window scores all of its targets, each later one the `stride` after those scored before, the last one
    what is left. Every target stands in exactly one window.
    """
    if targets < length:
        raise ValueError(f"{targets} targets do not fill a window of {length}")
    ends = np.append(np.arange(length, targets, stride, dtype=np.int64), targets)
    return ends - length, np.concatenate(([0], ends[:-1]))


def chunk_plan(first, targets, chunk):
    """Window ranges [(begin, end)]: each holds the windows whose first scored target lies in one stretch of `chunk`."""
    borders = np.searchsorted(first, np.arange(0, targets, chunk))
    borders = np.unique(np.append(borders, len(first)))
    return list(zip(borders[:-1].tolist(), borders[1:].tolist()))


class Scorer:
    """Scores the validation tokens pass by pass with a model, split over ranks in batches of one fixed shape.

    plan = (length, stride, band): a pass reads `length` tokens and scores the last `stride`; with a band each layer sees
    only so many keys, and what stands before the scored tokens is their prefix.
    """

    def __init__(self, model, tokens, plan, s, rt):
        self.length, stride, band = plan
        self.length = min(self.length, len(tokens) - 1)
        self.model, self.rt = functools.partial(model, window=band) if band else model, rt
        self.start, self.first = window_plan(len(tokens) - 1, self.length, stride)
        self.tokens, self.starts, self.firsts = (torch.from_numpy(x).to(rt.device) for x in (
            tokens.astype(np.int32), self.start, self.first))
        self.offsets = torch.arange(self.length + 1, device=rt.device)
        self.batch = max(1, s.eval_batch_seqs * s.window // self.length)
        self.tokens_read = 0

    @torch.no_grad()
    def warm_up(self, vocab_size):
        """Compile for the shape of a pass, on random tokens."""
        rows = torch.randint(vocab_size, (self.batch, self.length + 1), device=self.rt.device)
        self.model(rows[:, :-1], rows[:, 1:])

    @torch.no_grad()
    def score(self, begin, end, tick=lambda passes: None):
        """nll [targets] of the targets of passes [begin, end), in order, on every rank."""
        low, high = int(self.first[begin]), int(self.start[end - 1]) + self.length
        out = torch.zeros(2, high - low + 1, device=self.rt.device)  # scores, and how often; the last slot is thrown away
        mine_begin, mine_end = (begin + part for part in self.rt.share(end - begin))
        for b in range(mine_begin, mine_end, self.batch):
            w = torch.arange(b, b + self.batch, device=self.rt.device)
            mine, w = w < mine_end, w.clamp(max=mine_end - 1)  # a short batch repeats its last pass
            at = self.starts[w, None] + self.offsets
            rows = self.tokens[at].long()
            nll = self.model(rows[:, :-1], rows[:, 1:])
            fresh = (at[:, :-1] >= self.firsts[w, None]) & mine[:, None]
            place = torch.where(fresh, at[:, :-1] - low, high - low).flatten()
            out[0].scatter_(0, place, nll.flatten())
            out[1].scatter_add_(0, place, torch.ones_like(nll).flatten())
            tick((min(b + self.batch, mine_end) - mine_begin) * self.rt.world_size)
        self.tokens_read += (end - begin) * self.length
        scores, times = self.rt.sum_(out)[:, :-1].cpu().numpy()
        if not (times == 1).all():
            raise LedgerError(f"target {low + int(np.argmax(times != 1))} scored {int(times[times != 1][0])} times in one pass")
        return scores


def evaluate(model, tokens, byte_table, s, rt, label, plan, adapter=None, opened=None):
    """Score every target of `tokens` once: chunk by chunk, adapting after each chunk but the last if there is an adapter.

    plan: see Scorer. The adapter is told how many seconds it may take, so that scoring the rest ends EVAL_WALLCLOCK_SECONDS
    after `opened`; without time for one epoch it stops. Returns the ledger's result with `seconds`, and the ledger.
    """
    started, targets, scoring = time.perf_counter(), len(tokens) - 1, 0.0
    scorer, ledger = Scorer(model, tokens, plan, s, rt), ScoreLedger(tokens)
    chunks = chunk_plan(scorer.first, targets, s.ttt_chunk_tokens if adapter else 1 << 22)
    scorer.batch = min(scorer.batch, max(-(-(end - begin) // rt.world_size) for begin, end in chunks))
    if adapter:
        rt.log(f"ttt_sliding:start chunks={len(chunks)} chunk_tokens={s.ttt_chunk_tokens} total_windows={len(scorer.first)} "
               f"stride={plan[1]} ttt_lr={s.ttt_lr} ttt_epochs={s.ttt_epochs} freeze_blocks={s.ttt_freeze_blocks}")
        ends = scorer.start + scorer.length  # every number of rows that a chunk gives is a shape to compile
        adapter.warm_up({int(ends[end - 1] - scorer.first[begin]) // s.train_seq_len for begin, end in chunks[:-1]})
    if rt.compile:
        scorer.warm_up(s.vocab_size)
        rt.synchronize()
        rt.sum_(torch.zeros(1, device=rt.device))  # no rank's clock counts what another still compiles
    progress = Progress(rt, label, len(scorer.first))
    bytes_so_far, loss_so_far, epochs = 0, 0.0, s.ttt_epochs if adapter else 0
    for c, (begin, end) in enumerate(chunks):
        low, before = ledger.scored, time.perf_counter()
        ledger.record(low, scorer.score(begin, end, lambda passes: progress.update(begin + passes)))
        scoring += time.perf_counter() - before
        if adapter:
            bytes_so_far += byte_table.count(tokens[low: ledger.scored + 1])
            loss_so_far += float(ledger.nll[low: ledger.scored].sum(dtype=np.float64))
            if c % 10 == 0 or c + 1 == len(chunks):
                rt.log(f"  ttt_chunk [{c + 1}/{len(chunks)}] bpb={bits_per_byte(loss_so_far, bytes_so_far):.6f} "
                       f"time={time.perf_counter() - started:.1f}s")
        if epochs and c + 1 < len(chunks):
            spent, rest = time.perf_counter() - (opened or started), scoring / end * (len(scorer.first) - end)
            left = rt.from_rank0(0.98 * (s.eval_wallclock_seconds or math.inf) - spent - rest)
            share_done, fair = c / max(len(chunks) - 1, 1), left / (len(chunks) - 1 - c)
            done = adapter.adapt(ledger, low, ledger.scored, share_done, fair, left)
            if done != epochs:
                rt.log(f"ttt_sliding:{'epochs' if done else 'stopped'} chunk={c + 1}/{len(chunks)} epochs={done} of "
                       f"{s.ttt_epochs}: the rest of {s.eval_wallclock_seconds:g} s is for scoring")
            epochs = done
    rt.synchronize()
    return dict(ledger.result(byte_table), seconds=time.perf_counter() - started, tokens_read=scorer.tokens_read), ledger


def adapted(name, s):
    """Does test-time training change this parameter?"""
    part, _, rest = name.partition(".")
    index = int(rest.split(".")[0]) if part in ("blocks", "cores") else None
    if s.ttt_params == "lora":
        return ".lora." in name
    if s.ttt_optimizer == "muon" and kind_of(name) not in ("attn", "mlp", "proj"):
        return False
    if s.ttt_params == "scalars":
        return kind_of(name) in ("control", "gate")
    if s.ttt_params == "tail":
        last = range(s.num_layers - s.ttt_unfreeze_blocks, s.num_layers)
        inside = index in last if part == "blocks" else index in {i % s.cores for i in last}
        return inside or name == "tok_emb" or (kind_of(name) == "control" and "scale" in name)
    return index is None or index >= s.ttt_freeze_blocks


class LowRank(nn.Module):
    """w → w + B·A, B zero at first (LoRA, Hu et al. 2021)."""

    def __init__(self, w_RC, rank):
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, w_RC.size(1), generator=torch.Generator().manual_seed(0)).to(w_RC)
                                 / math.sqrt(w_RC.size(1)))
        self.up = nn.Parameter(w_RC.new_zeros(w_RC.size(0), rank))

    def forward(self, w_RC):
        return w_RC + self.up @ self.down


def add_low_rank(model, s):
    """Give every matrix of TTT_LORA_MATRICES, in blocks that are not frozen, an addition of rank TTT_LORA_RANK."""
    for i, core in list(enumerate(model.cores))[s.ttt_freeze_blocks:]:
        for part in (core.attn, core.mlp):
            for name in [n for n, _ in part.named_parameters(recurse=False) if n in s.lora_matrices]:
                low_rank = LowRank(getattr(part, name), s.ttt_lora_rank)
                parametrize.register_parametrization(part, name, low_rank)
                for p in low_rank.parameters():  # as of the matrices themselves
                    p.register_hook(lambda grad, uses=len(range(i, s.num_layers, s.cores)): grad / uses)


def plain_name(name):
    """A parameter's name without what add_low_rank puts in it: cores.0.attn.q, and cores.0.attn.q.lora.up for the addition."""
    if "parametrizations." not in name:
        return name
    name = name.replace("parametrizations.", "")
    return name.removesuffix(".original") if name.endswith(".original") else ".lora.".join(name.rsplit(".0.", 1))


class MatrixMuon(torch.optim.SGD):
    """Muon for some matrices whose gradients every rank has in full."""

    def __init__(self, groups, s, dtype):
        super().__init__(groups, lr=s.ttt_lr, momentum=s.ttt_momentum)
        self.orthogonalize = functools.partial(newton_schulz, coefficients=NEWTON_SCHULZ[s.muon_coefficients],
                                               steps=s.muon_backend_steps, dtype=dtype)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p)).mul_(group["momentum"]).add_(p.grad)
                g = p.grad.add(momentum, alpha=group["momentum"])
                u = self.orthogonalize(g[None])[0] if g.size(0) <= g.size(1) else self.orthogonalize(g.mT[None])[0].mT
                p.add_(u, alpha=-group["lr"] * math.sqrt(max(1, p.size(0) / p.size(1))))


class Adapter:
    """Test-time training: scored tokens in, weights changed. One persistent optimizer over the whole evaluation."""

    def __init__(self, model, forward, s, rt):
        self.s, self.rt, self.forward = s, rt, forward
        multipliers, total = {}, 0
        if s.ttt_params == "lora":
            add_low_rank(model, s)
        for name, p in model.named_parameters():
            name = plain_name(name)
            p.requires_grad_(adapted(name, s))
            total += p.numel()
            if p.requires_grad:
                multipliers.setdefault(self._multiplier(name), []).append(p)
        groups = [dict(params=params, factor=factor) for factor, params in multipliers.items()]
        self.params = [p for params in multipliers.values() for p in params]
        self.origin = [p.detach().clone() for p in self.params] if s.ttt_decay else []
        self.trained = sum(p.numel() for p in self.params)
        self.frozen, self.step_seconds = total - self.trained, 0.0
        self.optimizer = {"sgd": lambda: torch.optim.SGD(groups, lr=s.ttt_lr, momentum=s.ttt_momentum),
                          "adamw": lambda: torch.optim.AdamW(groups, lr=s.ttt_lr, betas=(0.9, 0.999), weight_decay=0.0),
                          "muon": lambda: MatrixMuon(groups, s, rt.dtype),
                          }[s.ttt_optimizer]()

    def _multiplier(self, name):
        """× TTT_LR for a parameter."""
        by_matrix = {"down": self.s.ttt_proj_lr_mult, "up": self.s.ttt_fc_lr_mult}
        by_kind = {"attn": self.s.ttt_attn_lr_mult, "table": self.s.ttt_embed_lr_mult, "hashed": self.s.ttt_embed_lr_mult}
        name = name.split(".lora.")[0]
        return by_matrix.get(name.rsplit(".", 1)[-1], by_kind.get(kind_of(name), 1.0))

    def warm_up(self, row_counts=()):
        """Compile (for other numbers of rows too) and time a step on random tokens; no weight changes."""
        usual = self.s.ttt_chunk_tokens // self.s.train_seq_len
        for count in [*(sorted(set(row_counts) - {0, usual}) if self.rt.compile else ()), *[usual] * (2 if self.rt.compile else 1)]:
            rows = torch.randint(self.s.vocab_size, (min(self.s.ttt_batch_seqs, count), self.s.train_seq_len + 1))
            self.rt.synchronize()
            started = time.perf_counter()
            self._gradients(rows)
            self.optimizer.zero_grad(set_to_none=True)
            self.rt.synchronize()
            self.step_seconds = time.perf_counter() - started

    def adapt(self, ledger, first, last, share_done, seconds=math.inf, left=math.inf):
        """Train on targets [first, last), all scored before; `share_done` of the chunks lie behind (0 to 1).

        Takes TTT_EPOCHS epochs, or as many as rank 0 expects to end within `seconds`, or one if that ends within what is
        `left` for all chunks; returns how many. Steps run over the rows of all ranks: their number changes nothing.
        """
        s = self.s
        rows = ledger.rows_for_adapting(first, last, s.train_seq_len)
        batches = rows.split(s.ttt_batch_seqs) if len(rows) else ()
        epoch_seconds = max(self.step_seconds * len(batches), 1e-9)
        affordable = max(seconds / epoch_seconds, min(1.0, left / epoch_seconds))
        epochs = int(self.rt.from_rank0(max(0.0, min(s.ttt_epochs, affordable))))
        across = s.ttt_lr_floor + (1 - s.ttt_lr_floor) * 0.5 * (1 + math.cos(math.pi * share_done))
        steps, started = len(batches) * epochs, time.perf_counter()
        for k in range(steps):
            inside = 0.5 * (1 + math.cos(math.pi * k / steps)) if s.ttt_intra_cosine else 1.0
            for group in self.optimizer.param_groups:
                group["lr"] = s.ttt_lr * across * inside * group["factor"]
            self._gradients(batches[k % len(batches)])
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.origin:
                with torch.no_grad():
                    torch._foreach_lerp_(self.params, self.origin, min(1.0, s.ttt_lr * across * inside * s.ttt_decay))
        if steps:
            self.rt.synchronize()
            self.step_seconds = (time.perf_counter() - started) / steps
        return epochs

    def _gradients(self, batch):
        """Gradients of the mean nll of the batch: summed over ranks, then clipped by their global norm."""
        begin, end = self.rt.share(len(batch))
        per_pass = max(1, self.s.micro_batch_tokens // self.s.train_seq_len)
        for rows in batch[begin:end].to(self.rt.device).split(per_pass) if end > begin else ():
            (self.forward(rows[:, :-1], rows[:, 1:]).sum() / batch[:, 1:].numel()).backward()
        flat = self.rt.sum_(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self.params]))
        if self.s.ttt_grad_clip:
            flat *= (self.s.ttt_grad_clip / (flat.norm() + 1e-6)).clamp(max=1.0)
        for p, g in zip(self.params, flat.split([p.numel() for p in self.params])):
            p.grad = g.view_as(p)


# ---- 12. Training ----------------------------------------------------------------------------------------------------

class Interrupted(UserError):
    """A signal ended training; its state is on disk."""


class Checkpoints:
    """The state of training in OUT_DIR/checkpoints: the last two, each whole (SHA-256 at its end) or not there."""

    def __init__(self, s, rt, stream):
        self.s, self.rt, self.folder, self.signal, self.kept = s, rt, Path(s.out_dir) / "checkpoints", 0, []
        self.data = [[p.name, p.stat().st_size, hashlib.sha256(t[: 1 << 16].tobytes()).hexdigest()]
                     for p, t in zip(stream.paths, stream.shards)]
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)
        if rt.rank == 0:
            self._sweep()

    def _sweep(self):
        """Remove what processes that are gone have left half written."""
        out = self.folder.parent
        for part in [p for folder in (self.folder, out, out / "logs") for p in folder.glob(".*.part")]:
            with contextlib.suppress(ValueError, OSError):
                try:
                    os.kill(int(part.name.split(".")[-2]), 0)
                except ProcessLookupError:
                    part.unlink()

    def _note(self, number, frame):
        """The first signal ends training after the step; a second one ends the process as it would have."""
        self.signal = number
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)

    def finish(self, path):
        """Training and packing are over: a signal, noted or yet to come, ends the run at once. Raises Interrupted."""
        def leave(number=None, frame=None):
            raise Interrupted(f"interrupted; {path} is whole: the same command with RESUME=auto scores it")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, leave)
        if self.rt.sum_(torch.tensor(float(bool(self.signal)))):
            leave()

    def key(self):
        """What a checkpoint must have been made with: the data, and all settings but those that change no weight."""
        free = (*TIED_TO_THE_RUN, "micro_batch_tokens", "train_log_every")
        return dict(data=self.data, **{f.name: getattr(self.s, f.name) for f in fields(self.s)
                                       if f.name not in free and f.metadata["section"] != "Evaluation"})

    def paths(self):
        """Checkpoints on disk, newest first."""
        return sorted((p for p in self.folder.glob("step_" + "[0-9]" * 7 + ".pt") if p.is_file()), reverse=True)

    def save(self, state, elapsed):
        """Write the state; keep it and the one before. Returns why it could not be written, or "". Raises UserError where a
        weight is not finite."""
        if not all(torch.isfinite(p).all() for p in state["model"]):
            raise UserError(f"step {state['step']}: weights are not finite, and no checkpoint is made of them: training diverged; "
                            f"lower MATRIX_LR={self.s.matrix_lr}, or set NONFINITE=skip and RESUME=auto")
        problem = ""
        if self.rt.rank == 0:
            buffer = io.BytesIO()
            torch.save(dict(state, elapsed=elapsed, settings=self.key()), buffer)
            path = self.folder / f"step_{state['step']:07d}.pt"
            try:
                write_whole(path, buffer.getvalue() + hashlib.sha256(buffer.getbuffer()).digest())
                self.kept = [*(p for p in self.kept if p != path), path][-2:]
                for old in set(self.paths()) - set(self.kept):
                    old.unlink(missing_ok=True)
                self.rt.log(f"checkpoint:step {state['step']} {path} {path.stat().st_size} bytes")
            except UserError as error:
                problem = str(error)
        return problem or "rank 0 could not write it" if self.rt.from_rank0(float(bool(problem))) else ""

    def _read(self, path):
        """The state in a file. Raises ValueError and the like where it is damaged."""
        content = path.read_bytes()
        if hashlib.sha256(content[:-32]).digest() != content[-32:]:
            raise ValueError("checksum does not match")
        return torch.load(io.BytesIO(content[:-32]), map_location=self.rt.device, weights_only=True)

    def load(self, take):
        """Hand the newest whole state to `take` with RESUME=auto; True if there was one. Raises UserError where it is of
        other settings."""
        for path in self.paths() if self.s.resume else ():
            try:
                state = self._read(path)
            except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as problem:
                self.rt.log(f"resume:{path} is damaged and left out ({problem})")
                continue
            try:
                key = self.key()
                other = [f"{k.upper()}={v}, not {key.get(k)}" for k, v in state["settings"].items() if key.get(k) != v]
                if other:
                    raise UserError(f"RESUME=auto: {path} was made with {'; '.join(other)}: set these, or another OUT_DIR")
                take(state)
            except (ValueError, RuntimeError, LookupError, TypeError, AttributeError) as problem:
                raise UserError(f"RESUME=auto: {path} is no state of this run ({type(problem).__name__}: {problem}): move it away, "
                                "or set another OUT_DIR") from problem
            self.kept = [path]
            return True
        if self.s.resume:
            self.rt.log("resume:no checkpoint, from the beginning")
        return False

    def exported(self, path, trained=None):
        """Note what training made beside the artifact's hash; without `trained`: that note, or None if of another artifact."""
        note = self.folder / "exported.json"
        try:
            now = json.loads(json.dumps(dict(sha256=hashlib.sha256(path.read_bytes()).hexdigest(), settings=self.key())))
            if trained is None:
                kept = json.loads(note.read_bytes())
                return kept["trained"] if {k: kept[k] for k in now} == now else None
        except (OSError, ValueError, LookupError, TypeError):
            return None
        try:
            write_whole(note, json.dumps(dict(now, trained=trained)).encode())
        except UserError as problem:
            self.rt.log(f"checkpoint:no note of the export: {problem}")


class Trainer:
    """The training loop and what it needs: model, optimizers, averages, batches."""

    def __init__(self, model, forward, s, rt):
        self.model, self.forward, self.s, self.rt = model, forward, s, rt
        self.rows_per_step = s.train_batch_tokens // s.train_seq_len
        self.micro_rows = rows_per_pass(s, rt.world_size)
        self.optimizers = Optimizers(model, s, rt)

    def step(self, rows, scale, momentum, fake_quant):
        """One optimizer step on this rank's rows; returns the mean nll of the rank's tokens and the gradient norm."""
        total = self.s.train_batch_tokens
        loss = torch.zeros((), device=self.rt.device)
        for micro in rows.split(self.micro_rows):
            nll = self.forward(micro[:, :-1].long(), micro[:, 1:].long(), fake_quant).sum() / total
            nll.backward()
            loss += nll.detach()
        if self.s.crownq_lambda and (fake_quant or not self.s.crownq_warmdown_only):
            (self.s.crownq_lambda / self.rt.world_size * crown_q(self.model)).backward()
        return loss * self.rt.world_size, self.optimizers.step(scale, momentum, self.s.nonfinite == "skip")

    def warm_up(self):
        """Run every compiled variant on random tokens, then restore weights and optimizers: no compilation is timed."""
        s, rt = self.s, self.rt
        if not s.warmup_steps:
            return
        kept = [p.detach().clone() for p in self.model.parameters()]
        variants = sorted({False, bool(s.qat_enabled or s.late_qat_threshold)} if not s.qat_enabled else {True})
        rows = torch.randint(s.vocab_size, (self.rows_per_step // rt.world_size, s.train_seq_len + 1), dtype=torch.int32,
                             device=rt.device)
        for i in range(max(s.warmup_steps, len(variants))):
            self.step(rows, 1.0, s.muon_momentum, variants[i % len(variants)])
            if i + 1 in (1, s.warmup_steps) or (i + 1) % 10 == 0:
                rt.log(f"warmup_step:{i + 1}/{s.warmup_steps}")
        with torch.no_grad():
            torch._foreach_copy_(list(self.model.parameters()), kept)
        self.optimizers = Optimizers(self.model, s, rt)
        rt.synchronize()
        if rt.compile:
            counted = torch._dynamo.utils.counters
            hits, misses = (counted["inductor"][f"fxgraph_cache_{kind}"] for kind in ("hit", "miss"))
            rt.log(f"compile:variants {len(variants)} graph_breaks {sum(counted['graph_break'].values())} graphs_compiled {misses} "
                   f"graphs_from_cache {hits}")

    def train(self, stream, validate, checkpoints):
        """Train until ITERATIONS or the clock; then give the model its averaged weights.

        `validate(step)` scores the model as it stands; its time is not training's, that of writing checkpoints is. Returns
        steps and milliseconds. Raises Interrupted after a signal, with the state saved.
        """
        s, rt = self.s, self.rt
        averages, progress = WeightAverage(self.model, s), Progress(rt, "train", 1)
        step, elapsed, quantizing, done = self._resume(checkpoints, averages)
        batches, saved_at = Batches(stream, rt, self.rows_per_step, step), elapsed
        rt.log(f"startup:{time.perf_counter() - LAUNCHED:.1f}s from launch to the first step")
        clock = StepClock(rt, elapsed, lambda: checkpoints.signal)

        def save(done):
            """Without room on the disk training goes on, unless it is to end here."""
            weights = [p.detach() for p in self.model.parameters()]
            problem = checkpoints.save(dict(step=step, quantizing=quantizing, done=done, model=weights, averages=averages.state(),
                                            optimizers=self.optimizers.state()), elapsed)
            if problem and clock.interrupted:
                raise UserError(f"interrupted at step {step}, and the state could not be kept: {problem}")
            if problem:
                rt.log(f"checkpoint:none at step {step}: {problem}")

        while not done:
            elapsed = clock.read() if step else 0.0
            if clock.interrupted or 0 < s.checkpoint_every_seconds <= (elapsed - saved_at) / 1000:
                save(done=False)
                saved_at = elapsed = clock.read()
                if clock.interrupted:
                    batches.close()
                    raise Interrupted(f"interrupted at step {step}; RESUME=auto with the same settings goes on from there")
            if out_of_time(s, step, elapsed * (step + 4) / max(step, 1)):  # near the end, up to two running steps count
                rt.synchronize()
                elapsed = clock.read()
            stop = step >= s.iterations > 0 or out_of_time(s, step, elapsed)
            if stop or (s.val_loss_every and step and step % s.val_loss_every == 0):
                with clock.paused():
                    elapsed = rt.from_rank0(clock.spent_ms)
                    self._log_validation(validate(step), step, elapsed)
            if stop:
                clock.read()  # has a signal come during the last validation?
                if s.checkpoint_every_seconds or clock.interrupted:
                    save(done=True)
                if clock.interrupted:
                    batches.close()
                    raise Interrupted(f"interrupted after the last step, {step}; RESUME=auto with the same settings goes on from there")
                break
            scale, share = lr_scale(s, step, elapsed), warmdown_share(s, step, elapsed)
            if fake_quant_on(s, share) and not quantizing:
                quantizing = True
                rt.log(f"{'qat' if s.qat_enabled else 'late_qat'}:enabled step:{step} scale:{scale:.4f}")
            loss, norm = self.step(batches.next(), scale, muon_momentum(s, step), quantizing)
            step += 1
            if averages.update(step, share):
                rt.log(f"swa:start step:{step}")
            if rt.device.type == "cpu" or s.nonfinite == "skip" or step <= 10 or step % 100 == 0:
                self._check_finite(loss, norm, step)
            if step <= 10 or step % s.train_log_every == 0:
                self._log_step(loss, step, clock.read(), scale)
            progress.update(max(step / s.iterations if s.iterations else 0,
                                elapsed / 1000 / s.max_wallclock_seconds if s.max_wallclock_seconds else 0))
        batches.close()
        if s.max_wallclock_seconds and (step < s.iterations or not s.iterations):
            rt.log(f"stopping_early: wallclock_cap train_time:{elapsed:.0f}ms step:{step}/{s.iterations}")
        applied = averages.apply()
        rt.log(f"{'ema' if 'EMA' in applied else 'average'}:applying {applied or 'no average, but the last'} weights")
        return step, elapsed

    def _resume(self, checkpoints, averages):
        """(step, milliseconds, fake quantization on?, training done?) to begin with; the state is loaded where there is one."""
        begin = [0, 0.0, False, False]

        def take(state):
            if [p.shape for p in state["model"]] != [p.shape for p in self.model.parameters()]:
                raise ValueError("weights of another model")
            self.optimizers.load(state["optimizers"])
            averages.load(state["averages"])
            with torch.no_grad():
                torch._foreach_copy_(list(self.model.parameters()), state["model"])
            begin[:] = (state[k] for k in ("step", "elapsed", "quantizing", "done"))

        if checkpoints.load(take):
            self.rt.log(f"resume:step {begin[0]} train_time:{begin[1]:.0f}ms")
        return begin

    def _check_finite(self, loss, norm, step):
        """Skip or stop where loss or gradient is not finite; names step, rank and group."""
        flags = torch.zeros(self.rt.world_size, device=self.rt.device)
        flags[self.rt.rank] = (~torch.isfinite(loss)).float()
        flags = self.rt.sum_(flags).tolist()
        if not any(flags) and math.isfinite(norm.item()):
            return
        rank = next((r for r, flag in enumerate(flags) if flag), self.rt.rank)
        bad = {kind_of(name) if "." in name else name for name, p in self.model.named_parameters() if not torch.isfinite(p).all()}
        here = f"step {step}, rank {rank}: train_loss {loss.item()} on rank {self.rt.rank}, gradient norm {norm.item()}"
        if self.s.nonfinite == "skip" and not bad:
            self.rt.log(f"nonfinite:{'loss alone' if math.isfinite(norm.item()) else 'skipped'} {here}")
            return
        raise UserError(f"{here}, not finite{', nor are weights of ' + ', '.join(sorted(bad)) if bad else ''}: training diverged; "
                        f"lower MATRIX_LR={self.s.matrix_lr}, SCALAR_LR={self.s.scalar_lr} or TIED_EMBED_LR="
                        f"{self.s.tied_embed_lr}, or set NONFINITE=skip; checkpoints from before, if any, are kept")

    def calibration(self, stream, step):
        """Calibration, and the milliseconds of it that are training's.

        On the training rows that would have come next, no longer than GPTQ_RESERVE_SECONDS allows; or on text that the model
        writes itself, which is not training. Passes are of 8 rows; where a rank's share of a batch is no multiple of that, the
        steps depend a little on the number of ranks.
        """
        s, rt = self.s, self.rt
        rt.synchronize()
        started, first = time.perf_counter(), step * self.rows_per_step
        limit = 0.8 * s.gptq_reserve_seconds if s.max_wallclock_seconds and s.gptq_text == "train" else math.inf

        def batches():
            passes = 0
            for n in range(s.gptq_batches if s.gptq_text == "train" else 1):
                count = self.rows_per_step if s.gptq_text == "train" else s.gptq_self_rows
                begin, end = rt.share(count)
                rows = (stream.rows(first + n * count + begin, first + n * count + end).to(rt.device) if s.gptq_text == "train"
                        else write_rows(self.model, s, end - begin, s.seed + rt.rank))
                for part in rows.split(min(self.micro_rows, 8)):  # small passes: eager, and their gradients are what is counted
                    passes += 1
                    rt.synchronize()  # what was asked for so far is done when the clock is read
                    if limit < math.inf and rt.from_rank0(time.perf_counter() - started) > limit and passes > 1:
                        rt.log(f"gptq_calibration:stopped after {limit:.1f} s of GPTQ_RESERVE_SECONDS={s.gptq_reserve_seconds:g}")
                        return
                    yield part

        rt.log(f"gptq_calibration:start text:{s.gptq_text}")
        calibration = calibrate(self.model, batches(), rt)
        rt.synchronize()
        seconds = time.perf_counter() - started
        rt.log(f"gptq_calibration:done matrices:{len(calibration.hessians)} time:{1000 * seconds:.0f}ms")
        return calibration, 1000 * seconds if s.gptq_text == "train" else 0.0

    def _log_step(self, loss, step, elapsed, scale):
        mean = self.rt.sum_(loss.clone()).item() / self.rt.world_size
        self.rt.log(f"step:{step}/{self.s.iterations} train_loss:{mean:.4f} train_time:{elapsed:.0f}ms "
                    f"step_avg:{elapsed / step:.2f}ms lr_scale:{scale:.4f}")

    def _log_validation(self, result, step, elapsed):
        self.rt.log(f"step:{step}/{self.s.iterations} val_loss:{result['val_loss']:.4f} val_bpb:{result['val_bpb']:.4f} "
                    f"train_time:{elapsed:.0f}ms step_avg:{elapsed / max(step, 1):.2f}ms")


# ---- 13. main: settings → runtime → data → train → average → quantize → write → read back → evaluate → report --------

def versions(rt):
    """Versions of what the result depends on."""
    gpu = rt.device.type == "cuda"
    return dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
                sentencepiece=sentencepiece.__version__, cuda=torch.version.cuda if gpu else None)


def device_name(rt):
    if rt.device.type == "cuda":
        return torch.cuda.get_device_name(rt.device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def log_start(s, rt, explicit):
    """The log's first entries: source, versions, GPU, every setting, so that a run can be told from its log alone."""
    rt.log(SOURCE.decode(), console=False)
    rt.log("=" * 100, console=False)
    rt.log("versions: " + " ".join(f"{k} {v}" for k, v in versions(rt).items()), console=False)
    if rt.device.type == "cuda" and rt.rank == 0:
        with contextlib.suppress(OSError):
            rt.log(subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout, console=False)
    for spec in fields(s):
        mark = "  (set)" if spec.name.upper() in explicit else ""
        rt.log(f"setting {spec.name.upper()}={getattr(s, spec.name)}{mark}", console=False)
    rt.log(f"run:{s.run_id} preset:{s.preset or 'none'} device:{device_name(rt)} world_size:{rt.world_size} "
           f"dtype:{str(rt.dtype).removeprefix('torch.')} compile:{int(rt.compile)} seed:{s.seed}")


def log_shape(s, log, counts):
    """Parameters by group and what a step holds."""
    log("parameters: " + " ".join(f"{kind}:{n}" for kind, n in counts.items()))
    log(f"model_params:{sum(counts.values())}")
    log(f"XSA:last_{s.xsa_last_n} active_layers:{s.xsa_blocks}")
    log(f"tokens_per_step:{s.train_batch_tokens} rows:{s.train_batch_tokens // s.train_seq_len} "
        f"row_tokens:{s.train_seq_len}")


def dry_run(s, ranks):
    """What a run would be, without data or device."""
    counts = parameter_counts(s)
    print(f"settings are good; preset:{s.preset or 'none'} world_size:{ranks[1]}")
    log_shape(s, print, counts)
    code, model = len(SHIPPED), size_forecast(s)
    fits = model <= s.artifact_budget_bytes - code
    print(f"size: code {code} + model {model} at the finest steps (Gaussian weights) = {code + model} of "
          f"{s.artifact_budget_bytes} bytes{'' if fits else f'; coarser steps will fit the model into {s.artifact_budget_bytes - code}'}")
    print(f"training: {s.iterations or 'any number of'} steps at most, {s.max_wallclock_seconds or 'no limit of'} s")
    length, stride, band = s.scoring_plan
    print(f"evaluation: {s.eval_attention}, {f'{length} tokens a pass to score {stride}' if stride else 'plain only'}"
          f"{f', {band} keys a layer' if band else ''}; TTT {'on' if s.ttt_enabled else 'off'}")


def run_evaluations(model, forward, path, s, rt, tokens, byte_table, opened):
    """Read the artifact from disk and score it: plain, sliding, TTT. Returns {kind: result} and the last ledger."""
    label, results, plan = s.quant_label, {}, s.scoring_plan
    full = "banded" if plan[2] else "sliding"
    tempered = forward if s.ttt_temp == 1 else lambda x, y, window=0: forward(x, y, False, s.ttt_temp, window)

    def timed(kind, key, plan, note="", adapter=None):
        scoring = tempered if adapter else forward
        try:
            results[kind], ledger = evaluate(scoring, tokens, byte_table, s, rt, kind, plan, adapter, opened)
        except LedgerError as problem:
            raise LedgerError(f"{path}, {kind}: {problem}{f'; lower TTT_LR={s.ttt_lr}?' if adapter else ''}") from problem
        r = results[kind]
        for suffix, digits in (("", 4), ("_exact", 8)):
            rt.log(f"{key}{suffix} val_loss:{r['val_loss']:.{digits}f} val_bpb:{r['val_bpb']:.{digits}f} {note}"
                   f"eval_time:{1000 * r['seconds']:.0f}ms")
        return ledger

    load_quantized(model, read_artifact(path)[1], path)
    ledger = timed(label, f"final_{label}_roundtrip", (s.window, s.window, 0))
    if plan[1]:
        note = f"stride:{plan[1]} " if full == "sliding" else f"segment:{plan[1]} prefix:{plan[0] - plan[1]} "
        ledger = timed(full, f"final_{label}_{full}{'_window' if full == 'sliding' else ''}", plan, note)
    if s.ttt_enabled:
        adapter = Adapter(model, tempered, s, rt)
        rt.log(f"ttt_sliding:params unfrozen={adapter.trained} frozen={adapter.frozen}")
        ledger = timed("ttt", "legal_ttt", plan, adapter=adapter)
        r = results["ttt"]
        rt.log(f"ttt_sliding:done val_loss={r['val_loss']:.6f} val_bpb={r['val_bpb']:.6f} elapsed={r['seconds']:.1f}s")
    return results, ledger


UNTRAINED = dict(steps=0, train_tokens=0, train_seconds=0.0, pack_seconds=0.0)


def train_and_pack(model, forward, s, rt, tokens, byte_table, path):
    """Train, average, quantize, write. Returns what the result file says of it."""
    stream, trainer = TrainStream(s), Trainer(model, forward, s, rt)
    checkpoints = Checkpoints(s, rt, stream)
    kept = checkpoints.exported(path) if s.resume and rt.rank == 0 else None
    if rt.from_rank0(float(kept is not None)):
        rt.log(f"resume:{path} is finished, on to its evaluation")
        checkpoints.finish(path)
        return kept or dict(UNTRAINED), {}
    trainer.warm_up()
    plain = (s.window, s.window, 0)
    steps, train_ms = trainer.train(
        stream, lambda step: evaluate(forward, tokens, byte_table, s, rt, "validation", plain)[0], checkpoints)
    calibration, calibration_ms = trainer.calibration(stream, steps) if s.gptq else (None, 0.0)
    train_ms += calibration_ms
    if rt.device.type == "cuda":
        rt.log(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 2**20} MiB "
               f"reserved: {torch.cuda.max_memory_reserved() // 2**20} MiB")
    floating, _ = evaluate(forward, tokens, byte_table, s, rt, "float", plain)
    rt.log(f"DIAGNOSTIC post_ema val_loss:{floating['val_loss']:.4f} val_bpb:{floating['val_bpb']:.4f} "
           f"eval_time:{1000 * floating['seconds']:.0f}ms")
    started, problem = time.perf_counter(), ""
    if rt.rank == 0:
        try:
            state = dict(model.named_parameters())
            content = pack(state, s, s.artifact_budget_bytes - len(SHIPPED), rt.log, calibration)
            tensors = decode_artifact(content)[1]  # what cannot be read is not written
            write_whole(path, content)
            for line, console in error_report(state, tensors, calibration.hessians if calibration else None):
                rt.log(line, console)
        except UserError as error:
            problem = str(error)
    if rt.from_rank0(float(bool(problem))):
        raise UserError(problem or "packing failed on rank 0")
    trained = dict(steps=steps, train_tokens=steps * s.train_batch_tokens, train_seconds=train_ms / 1000,
                   pack_seconds=time.perf_counter() - started)
    if rt.rank == 0:
        checkpoints.exported(path, trained)
    checkpoints.finish(path)
    return trained, {"float": floating}


def report(s, rt, path, counts, trained, results, ledger, eval_seconds):
    """Write the result file and the log's last lines: what a reviewer checks."""
    last = list(results.values())[-1]
    model_bytes, label = path.stat().st_size, s.quant_label
    total = len(SHIPPED) + model_bytes
    result = dict(
        preset=s.preset, settings={f.name: getattr(s, f.name) for f in fields(s)}, seed=s.seed, world_size=rt.world_size,
        device=device_name(rt), versions=versions(rt), code_sha256=hashlib.sha256(SHIPPED).hexdigest(), code_bytes=len(SHIPPED),
        model_bytes=model_bytes, total_bytes=total, model_params=sum(counts.values()), **trained, eval_seconds=eval_seconds,
        scored_targets=last["targets"], scored_bytes=last["bytes"], peak_memory_bytes=rt.peak_memory_bytes(),
        val_loss={kind: r["val_loss"] for kind, r in results.items()},
        val_bpb={kind: r["val_bpb"] for kind, r in results.items()}, ledger_sha256=last["sha256"], artifact=str(path))
    label += "+" + open_artifact(path.read_bytes())[0]["codec"]
    rt.log(f"Serialized model {label}: {model_bytes} bytes")
    rt.log(f"Code size: {len(SHIPPED)} bytes")
    rt.log(f"Total submission size {label}: {total} bytes of {s.artifact_budget_bytes}")
    rt.log(f"code_sha256:{result['code_sha256']}")
    rt.log(f"seconds: train {trained['train_seconds']:.1f} of {s.max_wallclock_seconds:g}, pack {trained['pack_seconds']:.1f}, "
           f"evaluation {eval_seconds:.1f}")
    rt.log(f"ledger: targets:{last['targets']} bytes:{last['bytes']} loss_sum:{last['loss_sum']:.6f} sha256:{last['sha256']}")
    over = dict(total_bytes=(total, 16_000_000), train_seconds=(trained["train_seconds"], 600),
                eval_seconds=(eval_seconds, 600))
    result["violations"] = [f"{key} {value:g} exceeds {limit:,}" for key, (value, limit) in over.items() if value > limit]
    if s.val_limit_tokens:
        result["violations"].append(f"VAL_LIMIT_TOKENS={s.val_limit_tokens}: not the whole validation set")
    for line in result["violations"]:
        rt.log(f"not a legal record: {line}")
    if rt.rank == 0:
        write_whole(Path(s.out_dir) / "logs" / f"{s.run_id}.json", json.dumps(result, indent=1).encode())
        if s.scores_path:
            buffer = io.BytesIO()
            np.save(buffer, ledger.nll)
            write_whole(s.scores_path, buffer.getvalue())


def settings_of_artifact(path, environ):
    """Settings for EVAL_ONLY: those stored in the file, changed by explicit variables where that does not contradict the
    model or the way it was trained. Raises UserError."""
    stored, tensors, _ = read_artifact(path)
    known = {f.name: f for f in fields(Settings) if f.name not in TIED_TO_THE_RUN}  # none says where to write
    for name, value in stored.items():
        try:
            stored[name] = parse_value(known[name], value)
        except KeyError:
            raise ArtifactError(f"{path}: holds {name}, a setting that no artifact of this script has") from None
        except ValueError as problem:
            raise ArtifactError(f"{path}: holds {name}={value}, which {problem}") from problem
    s, explicit = resolve_settings(environ, stored)
    fixed = [name for name in stored if getattr(s, name) != stored[name] and (
        known[name].metadata["section"] == "Model"
        or name in ("vocab_size", "bos_token", "train_seq_len", "attn_bits", "mlp_bits"))]
    if fixed:
        raise UserError(f"EVAL_ONLY={path}: made with other settings: " + "; ".join(
            f"{name.upper()}={stored[name]}, not {getattr(s, name)}" for name in fixed) + "; unset these")
    check_shapes(parameter_shapes(s), tensors, path)
    return s, explicit


def run_job(s, rt, explicit):
    """The whole job, in the order the data flows."""
    s = replace(s, run_id=s.run_id or str(uuid.uuid4()))
    tokens, byte_table = load_validation(s), ByteTable(s)
    if not byte_table.count(tokens):
        raise UserError(f"DATA_PATH={s.data_path}: the tokens of fineweb_val_* stand for no text by TOKENIZER_PATH={s.tokenizer_path}")
    rt.open_log(Path(s.out_dir) / "logs" / f"{s.run_id}.txt")
    log_start(s, rt, explicit)
    counts = parameter_counts(s)
    log_shape(s, rt.log, counts)
    model, names = build_model(s, rt)
    rt.log(" ".join(f"{part}:{name}" for part, name in names.items()) + f" validation_targets:{len(tokens) - 1}")
    forward = rt.compiled(model)
    path = Path(s.eval_only) if s.eval_only else Path(s.out_dir) / "final_model.int6.ptz"
    trained, results = dict(UNTRAINED), {}
    with torch_kernel_first(names["attention"]):
        if not s.eval_only:
            trained, results = train_and_pack(model, forward, s, rt, tokens, byte_table, path)
        started = time.perf_counter()
        scored, ledger = run_evaluations(model, forward, path, s, rt, tokens, byte_table, started)
        seconds = time.perf_counter() - started
    report(s, rt, path, counts, trained, {**results, **scored}, ledger, seconds)


def main(argv, environ):
    """Exit status: 0 done, 2 something that the user can mend, said in words, 130 interrupted with the state saved."""
    unknown = [a for a in argv if a not in ("--help", "-h", "--dry-run")]
    if unknown or "--help" in argv or "-h" in argv:
        print(help_text() if not unknown else f"{' '.join(unknown)}: settings are environment variables; "
              "the only flags are --help and --dry-run", file=sys.stderr if unknown else sys.stdout)
        return 2 if unknown else 0
    rt, handlers = None, {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        ranks = launched_ranks(environ)
        artifact = environ.get("EVAL_ONLY", "").strip()
        s, explicit = settings_of_artifact(artifact, environ) if artifact else resolve_settings(environ)
        check_launch(s, ranks[1])
        if "--dry-run" in argv:
            dry_run(s, ranks)
            return 0
        torch._dynamo.config.cache_size_limit = 64
        rt = Runtime(s, own_gpu(s, environ, ranks))
        run_job(s, rt, explicit)
        rt.close()
        return 0
    except torch.OutOfMemoryError as problem:
        print(f"error: GPU memory ran out; lower MICRO_BATCH_TOKENS={s.micro_batch_tokens} (training and TTT; 32768 should suit "
              f"24 GB) or EVAL_BATCH_SEQS={s.eval_batch_seqs} (scoring): {problem}", file=sys.stderr, flush=True)
        return 2
    except (Interrupted, KeyboardInterrupt) as problem:
        said = str(problem) or "interrupted; RESUME=auto goes on from what is saved, if anything is"
        rt.log(said) if rt else print(said)
        return 130
    except (UserError, LedgerError) as problem:
        rank = rt.rank if rt else int(environ.get("RANK", 0) if environ.get("RANK", "0").isdecimal() else 0)
        if rank:  # what all ranks met is said once, by rank 0, whose end also ends the others
            time.sleep(5)
        print(f"error{f' on rank {rank}' if rank else ''}: {problem}", file=sys.stderr, flush=True)
        return 2
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
