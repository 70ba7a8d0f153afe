"""Train a small GPT for at most 600 s, pack it into 16,000,000 bytes, read it back, score it.

The claim: one file does the whole job of a parameter-golf submission. It trains on FineWeb tokens,
then quantizes and packs the weights into an artifact. Code + artifact fit the byte cap with every
seed. It reads the artifact from disk, scores the validation tokens in bits per byte and adapts to
tokens only after they were scored. Settings are environment variables.

    torchrun --standalone --nproc_per_node=8 train_gpt.py     the defaults, on 8×H100
    PRESET=demo python train_gpt.py                           the same job, small, on two CPU cores
    python train_gpt.py --help | --dry-run                 list settings | check them, train nothing

Contents: 1 Settings · 2 Runtime · 3 Data · 4 Bits per byte · 5 Model · 6 Optimizers ·
7 Schedules · 8 Weight averaging · 9 Quantizer · 10 Artifact · 11 Evaluation · 12 Training · 13 main

Shape letters: B batch, T time, D model, H query heads, K key/value heads, E head dim,
V vocabulary, R rows, C columns, P numbers of an adapter, N any other count.
A "target" is a token to predict: target i is token i+1, given tokens 0..i. A "row", where no matrix
or table is meant, is one sequence of a training or TTT batch. A "step" is an optimizer step.
"""
from __future__ import annotations

import contextlib
import difflib
import fcntl
import functools
import gc
import hashlib
import importlib
import io
import itertools
import json
import lzma
import math
import mmap
import os
import platform
import re
import resource
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal, get_origin, get_type_hints

LAUNCHED = time.perf_counter()  # before torch is imported, which takes seconds
# A waiting OpenMP thread spins: on busy cores, two threads are twelve times faster with this limit.
# OpenMP reads it when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# Also cache traced graphs that hold autograd functions: with a full cache a run starts in half the
# time. The cache key includes the source and the constants of Triton kernels.
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD", "1")
import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.weak import WeakTensorKeyDictionary

try:  # optional packages; a broken one counts as missing
    import triton
    import triton.language as tl
except Exception:
    triton = tl = sys.modules["triton"] = None  # PyTorch must not import a broken one, either
try:
    import zstandard
except Exception:
    zstandard = None

SCRIPT = Path(__file__).resolve()
SHIPPED = SCRIPT.read_bytes()  # the code whose bytes count; later edits have no effect
SOURCE = globals().get("UNPACKED", SHIPPED)  # readable; a packed file's loader sets UNPACKED


class UserError(Exception):
    """An error that the user can fix; the message names the setting or file, its value, the fix."""


def in_a_line(problem):
    """Type and first line of an exception; PyTorch's messages fill a page."""
    return f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:160]}"


@contextlib.contextmanager
def explained(what, way_out, kinds=OSError):
    """Turn exceptions of `kinds` into a UserError: what failed, why, what to do."""
    try:
        yield
    except kinds as problem:
        reason = getattr(problem, "strerror", None) or in_a_line(problem)
        raise UserError(f"{what}: {reason}; {way_out}") from problem


# ---- 1. Settings: only this section and main read settings from the environment -----------------

Flag = Literal[0, 1]
Bits = Literal[4, 5, 6, 7, 8, 16]
Count = Annotated[int, 0, 2**62]
Positive = Annotated[int, 1, 2**62]
Amount = Annotated[float, 0.0, 1e18]
Fraction = Annotated[float, 0.0, 1.0]
Decay = Annotated[float, 0.0, 0.999999]
Sigmas = Annotated[float, 0.01, 1e6]


def block_list(text, count):
    """Block numbers from text such as 0-5,3-5,6; None if malformed or a number is >= count."""
    order = []
    for part in filter(None, map(str.strip, text.split(","))):
        if not re.fullmatch(r"\d{1,9}(-\d{1,9})?", part):
            return None
        first, last = int(part.split("-")[0]), int(part.split("-")[-1])
        order += range(first, min(last, count) + 1) or [count]  # 5-3 is empty: refused below
    return order if max(order, default=0) < count else None


@dataclass(frozen=True)
class Settings:
    """Every setting, resolved and checked; each is read from the variable of its name in capitals.

    The annotation holds the choices or bounds, the comment behind it is the help text; comments
    above it give evidence. The defaults are the model of record #1855 (pull request 1855 of the
    challenge), with changes that measured better. A figure such as −0.002 is a change in bits per
    byte: published, or measured by us on a small model, such as 4 × 128 (blocks × width)."""
    # == Run
    preset: str = ""  # row of the preset table to start from
    run_id: str = ""  # names logs/<RUN_ID>.txt and .json; empty: a fresh uuid4
    seed: Annotated[int, 0, 2**31 - 1] = 1337  # of the weights and of the order of training rows
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: a GPU where there is one
    compile: Literal["auto", "0", "1"] = "auto"  # torch.compile; auto: on a GPU only
    attention: Literal["auto", "fa3", "cudnn", "flash", "fa2", "fa4", "sdpa"] = "auto"
        # kernel; auto: the first that is correct here; sdpa: PyTorch's choice
    kernels: Literal["auto", "plain", "triton"] = "auto"
        # MLP kernel; auto: triton in a compiled model on a GPU, if correct
    out_dir: str = "."  # folder of the artifact, checkpoints/ and logs/
    eval_only: str = ""  # score this artifact with the settings stored in it, train nothing
    scores_path: str = ""  # file.npy: nll (nats, float32) of each target in the last evaluation
    checkpoint_every_seconds: Amount = 0.0  # of training; 0: after a signal, and while packing
    resume: Literal["", "auto"] = ""  # auto: continue from OUT_DIR's last checkpoint or artifact

    # == Data
    data_path: str = "./data/datasets/fineweb10B_sp8192"  # folder of fineweb_{train,val}_*.bin
    tokenizer_path: str = "./data/tokenizers/fineweb_8192_bpe.model"  # SentencePiece model
    vocab_size: Annotated[int, 2, 65536] = 8192  # pieces; must equal the tokenizer's
    train_seq_len: Annotated[int, 2, 2**31] = 2048  # tokens of a training row
    train_batch_tokens: Positive = 786432  # per optimizer step, over all ranks
    micro_batch_tokens: Positive = 98304  # most tokens a rank computes at once; lower it for memory
    train_order: Literal["shuffled", "sequential"] = "shuffled"  # of shards, and of rows in them
    val_limit_tokens: Count = 0  # score only the first N: not a legal score; 0: all

    # == Model
    num_layers: Annotated[int, 1, 64] = 11  # blocks
    unique_layers: Count = 0  # weight sets (cores); block i uses i mod this (#537); 0: NUM_LAYERS
    model_dim: Annotated[int, 8, 2**20] = 512  # channels D
    num_heads: Positive = 8  # query heads H
    num_kv_heads: Positive = 4  # key/value heads K
    mlp_mult: Annotated[float, 0.125, 16.0] = 4.0  # hidden width of the MLP over D
    # LeakyReLU(0.5)²: −0.002 to −0.003 (#549, #657). 0.75: −0.0018 in one sweep, none against #549.
    leaky_slope: Fraction = 0.5  # the MLP activation is LeakyReLU(slope)²; 0: relu²
    logit_softcap: Amount = 30.0  # c of c·tanh(logits/c); 0: off
    qk_gain_init: Amount = 5.0  # initial gain of each query head; 1.5 → 4: −0.0039 (#1218)
    rope_dims: Count = 16  # channels of a head that rotate (16: −0.0023 with LN_SCALE); 0: all
    rope_ntk_reference: Count = 0  # rows longer than this raise the rotary base; 0: off
    # −0.043 at 400 steps of 4 × 128, −0.009 at 2,500, one seed each; no record has it.
    key_offset: Flag = 1  # a key's channels without RoPE come from the token before
    ln_scale: Flag = 1  # norm outputs of block i × 1/√(i+1)
    xsa_last_n: Count = 11  # number of last cores with exclusive self-attention (XSA): −0.0017
    # −0.015 and −0.016 at 600 steps of 4 × 128 with rows of 1,024 tokens, two seeds.
    doc_attention: Flag = 1  # attention and the key offset end where a document begins (#1530)
    # Depth recurrence (#1394, #1493): late in training, blocks run in another order. −0.003
    # (#1285). In short runs it loses: +0.023 at equal time (400 steps of 11 × 64, one seed).
    late_passes: str = "auto"  # blocks and ranges of blocks, in the order they run; auto:
        # 0-5,3-5,3-5,6-10 for 11 blocks, scaled to NUM_LAYERS; empty: no switch
    late_passes_from: Fraction = 0.35  # switch at this fraction of clock or ITERATIONS, the earlier
    parallel: Literal["0", "one", "lanes"] = "lanes"
        # blocks from PARALLEL_FROM on: one: attention and MLP read the same input (#1493); lanes:
        # two residual streams with learned routing (#1529)
    parallel_from: Count = 0  # first of those blocks; 0: 8/11 of NUM_LAYERS
    unet_skips: Literal["0", "1", "gated"] = "gated"
        # skips from the first half of the passes to the second; 1: added; gated: blended (#1218)
    # 4 × 128: −0.005 to −0.018 at 600 steps, three seeds; −0.022 at 2,500, one. 11 × 64: −0.018 at
    # 400, one. Speedrun #81: 65 of 1,480 steps fewer.
    mudd: Flag = 1  # mix earlier outputs, with weights per token, into the last block's input
        # (with lanes, that of its attention) and into the output
    # Value 1 mixes across documents, a known mistake; bos closes the gate where one starts.
    smear_gate: Literal["0", "1", "bos", "embed"] = "embed"
        # mix in the previous token; bos: not at BOS; embed: as bos, before the norm (#1667)
    bigram_vocab_size: Count = 0  # buckets of the hashed bigram embedding; 0: off
    bigram_dim: Positive = 128  # channels of the bigram embedding
    ve_dim: Positive = 128  # channels of the value embedding
    ve_layers: str = ""  # blocks whose values get the value embedding, such as 9,10; empty: off
    # −0.0010 (value residual) and −0.0005 to −0.0010 (gate) at full scale.
    value_residual: Literal["0", "1", "pair", "sigmoid"] = "pair"
        # V ← a·V₀ + b·V; pair: learned a and b; sigmoid: a = σ(λ), b = 1 − a; 1: pair; 0: off
    gated_attention: Literal["0", "1", "head", "sparse"] = "sparse"
        # gate on each head's output; reads all channels (head, 1) or 12 (sparse, #1787); 0: off

    # == Optimizers
    matrix_lr: Amount = 0.026  # Muon, matrices
    scalar_lr: Amount = 0.02  # AdamW: scales, gates and mixes
    tied_embed_lr: Amount = 0.03  # AdamW, embedding tables
    proj_optimizer: Literal["muon", "adamw"] = "muon"  # of bigram and value projections
    muon_wd: Amount = 0.095  # decoupled weight decay of Muon, × learning rate; see CAUTIOUS_WD
    adam_wd: Amount = 0.02  # weight decay of AdamW
    embed_wd: Annotated[float, -1.0, 1e18] = 0.085  # of embedding tables; -1: ADAM_WD
    # By steps, a figure for each seed. 4 × 128: +0.004 at 400, −0.009 at 2,500; with late passes
    # +0.009 and 0.000 at 661. 11 × 64: −0.010 at 400, −0.009 and −0.001 at 1,000.
    cautious_wd: Flag = 1  # Muon decays only weights that its step moves towards 0, by
        # 2 × MUON_WD × rate × (rate / full rate) (nanogpt speedrun #43)
    # −0.0010 at full scale (#1285); −0.0058 at 300 steps of 4 × 128, one seed.
    muon_row_norm: Flag = 1  # normalize rows before Newton–Schulz (MuonEq-R)
    # Speedrun #80: −0.0012 nats, 16 runs. 4 × 128: −0.003 to −0.016 at 600 steps, four seeds;
    # −0.009 at 2,500, one.
    muon_head_pairs: Flag = 1  # orthogonalize Q and K in pairs of heads, not as whole matrices
    muon_momentum: Decay = 0.97  # Nesterov momentum after its warm-up
    muon_momentum_warmup_start: Decay = 0.92  # momentum at step 0
    muon_momentum_warmup_steps: Count = 1500  # of linear growth; 0: none
    # Polar Express with LR_FLOOR=0.1 and a fused loss: −0.0017 together.
    muon_coefficients: Literal["classic", "polar"] = "polar"  # of Newton–Schulz
    beta2: Decay = 0.99  # AdamW; β₁ is 0.9
    grad_clip_norm: Amount = 0.3  # cap on the global gradient norm, over ranks; 0: off

    # == Schedule
    iterations: Count = 20000  # most optimizer steps; 0: the clock alone decides
    max_wallclock_seconds: Amount = 600.0  # training clock; 0: ITERATIONS alone decides
    warmup_steps: Count = 20  # on random tokens before the clock; then weights are restored
    warmdown_iters: Count = 3500  # steps of linear decay of the learning rate, see WARMDOWN_FRAC
    warmdown_frac: Fraction = 0.85  # the decay as a fraction of the run; 0: use WARMDOWN_ITERS
    lr_floor: Fraction = 0.1  # final learning rate over the peak
    ema_enabled: Flag = 1  # average the weights exponentially (−0.0006)
    ema_decay: Decay = 0.0  # per step; 0: 0.6 × EMA over 1/21 of the run so far + 0.4 × last
    swa_enabled: Flag = 0  # average snapshots late in the warmdown; with EMA: the mean of both
    swa_every: Positive = 50  # steps between snapshots
    late_qat_threshold: Amount = 0.0
        # int6 fake quantization once this fraction of the warmdown is left; 0: never, > 1: always
    segment_schedule: str = ""
        # 1024:0.1,2048:0.7 ends attention every 1,024 tokens of a row in the first tenth of the
        # run, then every 2,048 until 0.7 (#2014); needs DOC_ATTENTION=1; empty: at documents alone
    val_loss_every: Count = 4000  # steps between validations; 0: only after the last step
    train_log_every: Positive = 500  # steps between log lines after step 10

    # == Quantizer and artifact
    attn_bits: Bits = 8  # of codes of attention matrices, before entropy coding; 16: fp16
    mlp_bits: Bits = 8  # of MLP matrices
    embed_bits: Bits = 8  # of token and value embedding tables
    bigram_bits: Bits = 8  # of the bigram table
    proj_bits: Bits = 8  # of gates, MUDD's hidden layers, bigram and value projections
    fp16_keep_name_patterns: str = ""  # substrings of names of fp16 tensors, comma-separated
    quant_fit: Literal["trellis", "level", "scale"] = "trellis"
        # how scales grow until the model fits. scale: all by one factor. level: to a common
        # minimum, which GPTQ multiplies by the row's tolerance. trellis: as level, trellis-coded
    quant_clip: Literal["max", "row", "std"] = "max"  # a row's clip; max: maximum; row: searched
        # quantile; std: root mean square × *_CLIP_SIGMAS (SDClip, #1394)
    attn_clip_sigmas: Sigmas = 12.85  # QUANT_CLIP=std: of attention and what PROJ_BITS stores
    mlp_clip_sigmas: Sigmas = 12.85  # QUANT_CLIP=std: of the MLP
    embed_clip_sigmas: Sigmas = 20.0  # QUANT_CLIP=std: of embedding tables
    quant_step_floor: Amount = 0.0  # lower bound of scales below 8 bits; #1218: 0.03226 (1/31)
    prune_frac: Annotated[float, 0.0, 0.9] = 0.0  # fraction of weights set to 0, smallest first
    gptq: Flag = 1  # calibrate: GPTQ codes and, unless QUANT_FIT=scale, scales by error cost
    gptq_batches: Positive = 8  # of TRAIN_BATCH_TOKENS, for calibration; fewer if time is short
    gptq_act_order: Flag = 0  # columns in descending order of the Hessian's diagonal
    codec: Literal["rans", "lzma", "zstd"] = "rans"  # of the codes; zstd needs zstandard
    artifact_budget_bytes: Positive = 16_000_000  # for code + model

    # == Evaluation
    eval_seq_len: Count = 0  # tokens of a scoring window; 0: TRAIN_SEQ_LEN
    # LoRA TTT, 64 → 32: −0.003 (4 × 128) and −0.008 (demo) in less than twice the time.
    eval_stride: Count = 32  # tokens per step of adapters or sliding window; 0: plain scoring only
    # Tokens read for each that is scored: 32 in windows of stride 64, 1.5 in banded segments.
    eval_attention: Literal["banded", "window"] = "banded"
        # window: windows with stride EVAL_STRIDE; banded: segments of 2 × EVAL_SEQ_LEN tokens, each
        # after EVAL_SEQ_LEN tokens of context; a query sees the last EVAL_SEQ_LEN keys. Adapters
        # read windows of EVAL_SEQ_LEN + EVAL_STRIDE tokens instead
    # −0.075 in the demo; −0.001 to −0.003 for a model at 1.10 bpb.
    eval_match: Flag = 1  # mix in guesses by matches in the text before, where windows overlap
    eval_wallclock_seconds: Amount = 600.0  # since opening the artifact; caps TTT; 0: no limit
    eval_batch_seqs: Positive = 32  # a rank reads about this × EVAL_SEQ_LEN tokens at once
    ttt_enabled: Flag = 1  # score-first test-time training
    # LoRA per document: −0.002 to −0.004 (#1530). Weights per chunk: −0.0021 to −0.0033 (#549).
    ttt_lora_rank: Count = 64  # rank of the adapters, reset at each document; 0: train the weights,
        # chunk by chunk. TTT_OPTIMIZER and the settings below it imply 0, unless this is set too.
    # With guesses: −0.0032 (4 × 128), −0.0038 (demo), −0.0012 (a strong model of 135 M weights).
    ttt_base_weight: Annotated[float, 0.0, 0.99] = 0.3  # weight of the base model (without
        # adapters) in TTT's mixture; 0: none
    ttt_lr: Amount = 0.001  # adapters: the initial rate; weights: cosine decay over the chunks
    ttt_batch_seqs: Positive = 256  # rows per TTT step, or streams of adapters, over all ranks
    ttt_optimizer: Literal["sgd", "adamw", "muon"] = "sgd"  # muon: matrices only
    ttt_params: Literal["all", "tail"] = "all"  # tail: blocks not frozen, scales, token table
    ttt_intra_cosine: Flag = 0  # also a cosine in each chunk
    ttt_proj_lr_mult: Amount = 1.0  # × TTT_LR for the MLP's down matrices
    ttt_fc_lr_mult: Amount = 1.0  # × TTT_LR for the MLP's up matrices
    ttt_epochs: Annotated[int, -1, 1000] = 3  # over each chunk; -1: up to 10, as time allows
    ttt_chunk_tokens: Annotated[int, 0, 2**31] = 0  # scored between adaptations; 0: a 64th of the
        # validation set, at most 32768, at least a training row and a window's targets
    ttt_freeze_blocks: Count = 0  # first blocks that are not adapted

    head_dim = property(lambda s: s.model_dim // s.num_heads)
    mlp_hidden = property(lambda s: int(s.mlp_mult * s.model_dim))
    cores = property(lambda s: s.unique_layers or s.num_layers)
    ve_blocks = property(lambda s: block_list(s.ve_layers, s.num_layers))  # in the order given
    context = property(lambda s: s.eval_seq_len or s.train_seq_len)  # tokens before a target
    # Smallest TTT chunk: the larger of a training row and a window's targets.
    least_chunk = property(lambda s: max(s.train_seq_len, s.scoring_shape[1]))

    @property
    def scoring_shape(self):
        """(tokens read, tokens scored, keys a query sees or 0 for all) of a scoring window."""
        if self.eval_attention == "banded" and self.eval_stride:
            return 3 * self.context, 2 * self.context, self.context
        return self.context, self.eval_stride, 0

    @property
    def ttt_shape(self):
        """The scoring_shape of TTT. Adapters score EVAL_STRIDE targets at a time. Their windows
        have no band: it hides the first token of a row, where attention that needs nothing goes in
        many models (attention sink, Xiao et al. 2023)."""
        if not self.ttt_lora_rank or not self.scoring_shape[2]:
            return self.scoring_shape
        return self.context + self.eval_stride, self.eval_stride, 0

    # The scoring_shape of the base model beside adapters: a window scores its second half.
    base_shape = property(lambda s: (s.context, -(-s.context // 2), 0))

    @property
    def late_order(self):
        """Blocks in the order of LATE_PASSES, or None if it is invalid."""
        end = self.num_layers
        first, after = round(3 * end / 11), round(5 * end / 11) + 1
        if self.late_passes == "auto":
            return [*range(after), *2 * [*range(first, after)], *range(after, end)]
        return block_list(self.late_passes, end) if self.late_passes else list(range(end))

    @property
    def segments(self):
        """[(tokens, fraction of the run up to which they hold)], or None if invalid."""
        pairs = re.findall(r"([0-9]{1,9}):(0?\.[0-9]+)", self.segment_schedule)
        valid = ",".join(map(":".join, pairs)) == self.segment_schedule.replace(" ", "")
        return [(int(tokens), float(until)) for tokens, until in pairs] if valid else None

    @property
    def quant_label(self):
        """The quantized model in log keys: int6, or int5_6 for int5 MLP and int6 attention."""
        same = self.mlp_bits == self.attn_bits
        return f"int{self.mlp_bits}" if same else f"int{self.mlp_bits}_{self.attn_bits}"


BOS = 1  # begins every document, with every tokenizer of the challenge and of data/

PRESETS = {}  # a row holds what differs from the defaults, or from the row it begins with
# Our settings for a vocabulary of 1,024 pieces and 27 M weights, with this quantizer.
PRESETS["sp1024"] = dict(
    data_path="./data/datasets/fineweb10B_sp1024", vocab_size=1024,
    tokenizer_path="./data/tokenizers/fineweb_1024_bpe.model", mlp_mult=3.0, qk_gain_init=4.0,
    rope_ntk_reference=1024, late_passes="", parallel="0", unet_skips="1", smear_gate="bos",
    bigram_vocab_size=2048, ve_layers="9,10", gated_attention="head", matrix_lr=0.025,
    scalar_lr=0.025, tied_embed_lr=0.035, muon_wd=0.04, adam_wd=0.04, embed_wd=-1.0,
    muon_momentum=0.99, beta2=0.95, warmdown_frac=0.0, late_qat_threshold=0.15)
# For two CPU cores: short rows and small steps. Such rows seldom hold two documents.
PRESETS["laptop"] = dict(
    PRESETS["sp1024"], doc_attention=0, train_seq_len=256, train_batch_tokens=4096,
    micro_batch_tokens=4096, model_dim=128, num_heads=4, num_kv_heads=2, rope_ntk_reference=0,
    bigram_dim=64, ve_dim=64, warmup_steps=2, warmdown_iters=1000, muon_momentum=0.95,
    muon_momentum_warmup_steps=300, val_loss_every=0, train_log_every=50,
    max_wallclock_seconds=900.0)
PRESETS["demo"] = dict(
    PRESETS["laptop"], data_path="./data/datasets/demo", run_id="demo",
    tokenizer_path="./data/tokenizers/demo_1024_bpe.model", train_batch_tokens=2048, num_layers=3,
    xsa_last_n=3, ve_layers="1,2", bigram_vocab_size=8192, max_wallclock_seconds=170.0,
    warmdown_iters=800, muon_momentum_warmup_steps=100)
# The base of the earlier records; records/README.md lists our differences.
PRESETS["pr414"] = dict(
    PRESETS["sp1024"], train_order="sequential", leaky_slope=0.0, qk_gain_init=1.5, key_offset=0,
    doc_attention=0, xsa_last_n=4, smear_gate="1", value_residual="0", gated_attention="0",
    muon_coefficients="classic", lr_floor=0.0, ema_decay=0.997, swa_enabled=1, quant_fit="scale",
    quant_clip="row", codec="lzma", gptq=0, attn_bits=6, mlp_bits=6, proj_bits=16,
    eval_attention="window", eval_stride=64, eval_match=0, ttt_enabled=0, muon_row_norm=0,
    muon_head_pairs=0, cautious_wd=0, mudd=0, ttt_lora_rank=0, ttt_lr=0.002,
    ttt_chunk_tokens=32768)
PRESETS["pr549"] = dict(PRESETS["pr414"], leaky_slope=0.5, bigram_vocab_size=1536,
                        proj_optimizer="adamw", ttt_enabled=1)
PRESETS["pr1092"] = dict(PRESETS["pr549"], leaky_slope=0.75, bigram_vocab_size=2048, xsa_last_n=11,
                         max_wallclock_seconds=580.0, ttt_lr=0.03)
PRESETS["pr1019"] = dict(
    PRESETS["pr549"], xsa_last_n=11, bigram_vocab_size=3072, bigram_dim=112, warmdown_iters=4000,
    gptq=1, gptq_act_order=1, gptq_batches=1, quant_step_floor=0.03226, ttt_enabled=0)
PRESETS["pr657"] = dict(PRESETS["pr414"], leaky_slope=0.5, value_residual="sigmoid")
PRESETS["pr490"] = dict(
    PRESETS["pr414"], leaky_slope=0.5, value_residual="pair", gated_attention="head", xsa_last_n=0,
    rope_dims=0, ln_scale=0, ve_layers="", bigram_vocab_size=4096, swa_enabled=0, iterations=9000,
    warmdown_iters=1200, muon_momentum=0.95, muon_momentum_warmup_start=0.85,
    muon_momentum_warmup_steps=500, late_qat_threshold=0.0, gptq=1, prune_frac=0.02,
    val_loss_every=1000, train_log_every=200, ttt_enabled=1, ttt_optimizer="adamw",
    ttt_params="tail", ttt_freeze_blocks=9, ttt_lr=1e-4, ttt_chunk_tokens=131072)
PRESETS["pr537"] = dict(
    PRESETS["pr414"], leaky_slope=0.5, unique_layers=10, seed=42, iterations=5200,
    warmdown_iters=3000, adam_wd=0.01, ema_enabled=0, late_qat_threshold=0.1, mlp_bits=5,
    bigram_bits=6, proj_bits=6, fp16_keep_name_patterns="tok_emb,cores.2.attn.k", quant_clip="max",
    prune_frac=0.03, codec="zstd", val_loss_every=500, train_log_every=100, ttt_enabled=1,
    ttt_epochs=30, ttt_freeze_blocks=2, ttt_proj_lr_mult=3.0, ttt_fc_lr_mult=0.5,
    ttt_intra_cosine=1)
# The record line. From pr1855 on, ours lack CaseOps, the low-rank correction of the weights and the
# global phases of TTT. A match in the text before stands for pr2135's n-gram tilt.
PRESETS["pr1855"] = dict(
    key_offset=0, mudd=0, value_residual="0", muon_head_pairs=0, cautious_wd=0, ema_decay=0.9965,
    quant_fit="scale", quant_clip="std", attn_bits=6, mlp_bits=6, embed_bits=7, proj_bits=16,
    mlp_clip_sigmas=11.5, attn_clip_sigmas=13.0, embed_clip_sigmas=14.0, gptq_act_order=1,
    gptq_batches=2, eval_attention="window", eval_stride=48, eval_match=0, ttt_lora_rank=80,
    ttt_base_weight=0.0, ttt_lr=1.8e-4)
PRESETS["pr2014"] = dict(
    PRESETS["pr1855"], train_seq_len=3072, segment_schedule="1024:0.1,2048:0.7", qk_gain_init=5.25,
    ttt_lr=1.35e-4)
PRESETS["pr2135"] = dict(PRESETS["pr1855"], matrix_lr=0.028, gptq_batches=4, eval_seq_len=2560,
                         eval_match=1, ttt_lr=1.44e-4)
PRESETS["pr1493"] = dict(
    PRESETS["pr1855"], doc_attention=0, parallel="one", parallel_from=7, smear_gate="0",
    gated_attention="0", muon_coefficients="classic", qk_gain_init=5.25, matrix_lr=0.022,
    muon_momentum=0.99, beta2=0.95, warmdown_frac=0.72, lr_floor=0.0, mlp_clip_sigmas=12.85,
    attn_clip_sigmas=12.85, embed_bits=8, embed_clip_sigmas=20.0, gptq_batches=8, eval_stride=64,
    ttt_lora_rank=0, ttt_lr=0.005, ttt_chunk_tokens=32768)
PRESETS["pr1530"] = dict(
    PRESETS["pr1493"], doc_attention=1, parallel="lanes", parallel_from=0, qk_gain_init=5.0,
    muon_momentum=0.97, eval_stride=32, ttt_lora_rank=96, ttt_lr=1e-4, ttt_chunk_tokens=0)
PRESETS["pr1394"] = dict(
    PRESETS["pr1493"], late_passes="0-5,4-5,4-5,6-10", late_passes_from=0.5, parallel="0",
    qk_gain_init=4.0, matrix_lr=0.02, muon_wd=0.085, ema_decay=0.997, warmdown_frac=0.667,
    ttt_enabled=0)
PRESETS["pr1218"] = dict(
    PRESETS["pr1394"], data_path="./data/datasets/fineweb10B_sp4096", vocab_size=4096,
    tokenizer_path="./data/tokenizers/fineweb_4096_bpe.model", ve_layers="9,10", late_passes="",
    muon_row_norm=0, quant_clip="row", quant_step_floor=0.03226)

# Published name → our name, or {value: our settings}, or a function of the text. Where two aliases
# set the same setting, an alias of value 0 wins, else the first. Our name wins over an alias.
_VRL = {"0": {"VALUE_RESIDUAL": "0"}, "1": {"VALUE_RESIDUAL": "sigmoid"}}
ALIASES = {
    "VRL_ENABLED": _VRL, "VRL": _VRL, "GA_ENABLED": "GATED_ATTENTION", "WEIGHT_DECAY": "MUON_WD",
    "QAT_THRESHOLD": "LATE_QAT_THRESHOLD",
    "LATE_QAT": {"0": {"LATE_QAT_THRESHOLD": "0"}, "1": {"LATE_QAT_THRESHOLD": "0.15"}},
    "QAT_ENABLED": {"0": {}, "1": {"LATE_QAT_THRESHOLD": "2"}},
    "VE_ENABLED": {"0": {"VE_LAYERS": ""}, "1": {"VE_LAYERS": "9,10"}},
    "GPTQ_LITE": {"0": {"QUANT_CLIP": "max"}, "1": {"QUANT_CLIP": "row"}},
    "MLP_ACTIVATION": {"relu_sq": {"LEAKY_SLOPE": "0"}, "leaky_relu_sq": {"LEAKY_SLOPE": "0.5"}},
    "TTT_PERLAYER_LR": {"0": {"TTT_PROJ_LR_MULT": "1", "TTT_FC_LR_MULT": "1"},
                        "1": {"TTT_PROJ_LR_MULT": "3", "TTT_FC_LR_MULT": "0.5"}},
    "ALL_INT5": {"0": {}, "1": {"ATTN_BITS": "5", "MLP_BITS": "5"}},
    # Tokens of a validation batch over 8 ranks, in windows of 2,048: 524288 → 32.
    "VAL_BATCH_SIZE": lambda text: {"EVAL_BATCH_SEQS": str(max(1, int(text) // 16384))},
}

# Published names that nothing here reads, each with the only value that is accepted.
UNREAD = dict(pair.split("=") for pair in """DTG_ENABLED=0 MTP_NUM_HEADS=0 MTP_LOSS_WEIGHT=0.2
    LAWA_ENABLED=0 LAWA_K=10 LAWA_FREQ=100 TIE_EMBEDDINGS=1 EMBED_LR=0.6 HEAD_LR=0.008 GRAD_QUANT=0
    MUON_BETA2=0.95 MUON_BACKEND_STEPS=5 ADAM_EPS=1e-8 SWA_START_FRAC=0.2 BETA1=0.9 ROPE_BASE=10000
    TTT_MOMENTUM=0.9 TTT_GRAD_CLIP=1 GPTQ_RESERVE_SECONDS=0 TIED_EMBED_INIT_STD=0.005
    CROWNQ_LAMBDA=0 CROWNQ_WARMDOWN_ONLY=1 TRIGRAM_VOCAB_SIZE=0 TRIGRAM_DIM=128
    TTT_UNFREEZE_BLOCKS=2 XSA_START_LAYER=-4 TTT_TEMP=1 TTT_TEMPERATURE=1 QUANT_EVAL_EVERY=0
    INT8_CLIP_PERCENTILE=99.99984 CONTROL_TENSOR_NAME_PATTERNS= INT8_KEEP_FLOAT_FP32_NAME_PATTERNS=
    """.split())
ALIASES |= {name: {value: {}} for name, value in UNREAD.items()}

# Variables of TTT on the weights: setting any of them implies TTT_LORA_RANK=0.
_NAMES = [f.name.upper() for f in fields(Settings)]
OF_WEIGHT_TTT = {*_NAMES[_NAMES.index("TTT_OPTIMIZER"):], "TTT_MOMENTUM", "TTT_GRAD_CLIP"}


def described_settings():
    """{setting: (section, help text)}, from the comments of the class above."""
    body = "\n".join(SOURCE.decode().splitlines())  # without the \r of some editors
    body = body.partition("\nclass Settings:")[2].partition("@property")[0]
    found, body = {}, body.replace("\n        # ", "  # ")  # help of several lines, on one
    for part in body.split("\n    # == ")[1:]:
        section, lines = part.split("\n", 1)
        for name, text in re.findall(r"^    (\w+): .+? = .+?(?:  # (.+))?$", lines, re.M):
            found[name] = section, text.replace("  # ", " ")
    return found


DESCRIBED = described_settings()
TYPES = get_type_hints(Settings, include_extras=True)


def type_text(name):
    """The choices or bounds of a setting in words."""
    declared = TYPES[name]
    if declared is str:
        return "text"
    if get_origin(declared) is Literal:
        return "one of " + ", ".join(str(c) or "(empty)" for c in declared.__args__)
    low, high = declared.__metadata__
    return f"{low} to {high}" if isinstance(low, int) else f"{low:g} to {high:g}"


def plain_text(text):
    """A variable's text, stripped; true and false, in any letter case, as 1 and 0."""
    text = text.strip()
    return {"true": "1", "false": "0"}.get(text.lower(), text)


def parse_value(name, text):
    """The value of a setting from its text. Raises ValueError with the constraint it breaks."""
    declared, text = TYPES[name], str(text).strip()
    if declared is str:
        return text
    if get_origin(declared) is Literal:
        choices = {str(choice): choice for choice in declared.__args__}
        value = choices.get(plain_text(text) if declared is Flag else text)
        if value is None:
            raise ValueError(f"must be {type_text(name)}")
        return value
    number, (low, high) = declared.__origin__, declared.__metadata__
    try:
        value = number(text)
    except ValueError:
        raise ValueError("is not a " + ("whole number" if number is int else "number")) from None
    if not low <= value <= high:
        raise ValueError(f"is out of range: {type_text(name)}")
    return value


def near_misses(environ):
    """Problems with unknown variables that look like a misspelt setting.

    Not reported, since other programs use them: short names, names without an underscore, paths
    (MODEL_DIR), and names like one of Run or Data with fewer than two underscores."""
    ours = [n.upper() for n, (section, _) in DESCRIBED.items()
            if section not in ("Run", "Data") or n.count("_") > 1]
    ours += [n for n in ALIASES if "_" in n and n not in UNREAD]
    prefixes = ("TTT_", "MUON_", "EMA_", "SWA_", "XSA_", "BIGRAM_", "ROPE_", "QAT_", "WARMDOWN_",
                "GPTQ_")
    paths = ("_DIR", "_PATH", "_FILE", "_HOME", "_NAME")
    for name in sorted({*environ} - {*_NAMES, *ALIASES}):
        if "_" not in name or len(name) < 7 or not name.isupper() or name.endswith(paths):
            continue
        near = difflib.get_close_matches(name, ours, n=3, cutoff=0.7)
        similar = difflib.get_close_matches(name, near[:1], cutoff=0.86)
        # A misspelt name has about the length of ours: NUM_THREADS is not NUM_HEADS.
        if any(abs(len(n) - len(name)) < 2 for n in similar) or name.startswith(prefixes):
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            yield f"{name}={environ[name]}: no such setting{hint}"


# A rule: (condition that must hold, settings it concerns, message where it fails).

def model_rules(s):
    """Rules of the model and of the order of its passes."""
    T, last, ends = s.train_seq_len, s.num_layers - 1, [until for _, until in s.segments or ()]
    return [
        (s.model_dim % s.num_heads == 0, "MODEL_DIM NUM_HEADS", "must be a multiple of NUM_HEADS"),
        (s.num_heads % s.num_kv_heads == 0, "NUM_HEADS NUM_KV_HEADS",
         "must be a multiple of NUM_KV_HEADS"),
        (s.head_dim % 2 == 0 and s.rope_dims % 2 == 0 and s.rope_dims <= s.head_dim, "ROPE_DIMS",
         f"must be even and at most MODEL_DIM/NUM_HEADS={s.head_dim}, which must be even"),
        ((s.rope_dims or s.head_dim) != 2 or not s.rope_ntk_reference,
         "ROPE_DIMS ROPE_NTK_REFERENCE",
         "NTK needs more than two channels that rotate: set ROPE_NTK_REFERENCE=0"),
        (max(s.unique_layers, s.ttt_freeze_blocks) <= s.num_layers,
         "UNIQUE_LAYERS TTT_FREEZE_BLOCKS NUM_LAYERS", "must be at most NUM_LAYERS"),
        (s.late_order and s.late_order[0] == 0 and len({*s.late_order}) == s.num_layers,
         "LATE_PASSES", f"must be blocks of 0..{last} and ranges such as 0-{last}, commas between, "
         "0 first and each at least once; auto fits NUM_LAYERS; empty: off"),
        (not s.late_passes or s.late_passes_from < 1, "LATE_PASSES_FROM LATE_PASSES",
         "the late passes would be scored but never trained: lower the first, or empty the second"),
        # Rows of 512 tokens or fewer are for tests: on a GPU cumulative_lengths may join segments.
        (s.segments is not None and sorted({0.0, *ends}) == [0.0, *ends]
         and all((1024 if T > 512 else 1) <= tokens < T for tokens, _ in s.segments),
         "SEGMENT_SCHEDULE TRAIN_SEQ_LEN", "must be tokens:fraction, commas between; fewer tokens "
         "than TRAIN_SEQ_LEN, 1024 or more if that is above 512; rising fractions between 0 and 1"),
        (not s.segment_schedule or s.doc_attention, "SEGMENT_SCHEDULE DOC_ATTENTION",
         "segments need DOC_ATTENTION=1: set it, or empty the first"),
        (s.ve_blocks is not None and len(set(s.ve_blocks)) == len(s.ve_blocks), "VE_LAYERS",
         f"must be different blocks of 0..{last}, commas between; or empty"),
        (s.bigram_vocab_size != 1, "BIGRAM_VOCAB_SIZE", "must be 0 or at least 2"),
    ]


def run_rules(s, world_size):
    """Rules of batches, scoring, files, limits and the quantizer."""
    T, rows = s.train_seq_len, s.train_batch_tokens // s.train_seq_len
    return [
        (s.train_batch_tokens % T == 0, "TRAIN_BATCH_TOKENS TRAIN_SEQ_LEN",
         "must be a multiple of TRAIN_SEQ_LEN"),
        (s.eval_only or rows % world_size == 0, "TRAIN_BATCH_TOKENS TRAIN_SEQ_LEN",
         f"{rows} rows on {world_size} ranks; start a number of processes that divides the rows"),
        (s.micro_batch_tokens >= T, "MICRO_BATCH_TOKENS TRAIN_SEQ_LEN",
         "must hold a row; raise it"),
        (s.eval_stride <= s.context or (s.ttt_shape if s.ttt_enabled else s.scoring_shape)[2],
         "EVAL_STRIDE", f"exceeds the scoring window of {s.context} tokens; lower it"),
        (not s.ttt_enabled or s.eval_stride, "TTT_ENABLED EVAL_STRIDE",
         "TTT scores with a full context: set EVAL_STRIDE, or TTT_ENABLED=0"),
        (not s.ttt_enabled or s.ttt_lora_rank or s.ttt_chunk_tokens == 0
         or s.ttt_chunk_tokens >= s.least_chunk, "TTT_CHUNK_TOKENS",
         f"must hold {s.least_chunk} tokens, the longer of a row and a window's targets; or be 0"),
        (len(s.run_id.encode("utf-8", "surrogateescape")) <= 200 and "/" not in s.run_id,
         "RUN_ID", "must be a file name of at most 200 bytes"),
        (not s.scores_path or Path(s.scores_path).suffix == ".npy", "SCORES_PATH",
         "must name a file .npy"),
        (s.embed_wd >= 0 or s.embed_wd == -1, "EMBED_WD", "must be at least 0, or -1 for ADAM_WD"),
        (s.iterations or s.max_wallclock_seconds or s.eval_only,
         "ITERATIONS MAX_WALLCLOCK_SECONDS", "nothing ends the training; set one"),
        (s.artifact_budget_bytes > len(SHIPPED), "ARTIFACT_BUDGET_BYTES",
         f"the code alone has {len(SHIPPED)} bytes; raise it"),
        (s.quant_fit != "trellis" or not s.gptq_act_order, "QUANT_FIT GPTQ_ACT_ORDER",
         "a trellis takes columns in order: set QUANT_FIT=level, or GPTQ_ACT_ORDER=0"),
        (s.quant_fit != "trellis" or not s.prune_frac, "QUANT_FIT PRUNE_FRAC",
         "codes of a trellis have no zeros: set QUANT_FIT=level, or PRUNE_FRAC=0"),
        (s.codec != "zstd" or zstandard, "CODEC",
         "the package zstandard does not import: pip install zstandard, or CODEC=rans"),
    ]


def translated(environ):
    """{SETTING: (variable, text)} of the variables that are set, and a list of problems."""
    texts = {name: (name, environ[name]) for name in _NAMES if name in environ}
    problems = list(near_misses(environ))
    for name in (n for n in ALIASES if n in environ):
        text, meaning = plain_text(environ[name]), ALIASES[name]
        text = re.sub(r"(?<=\d)\.0$", "", text)  # published commands write 10000 and 10000.0
        try:
            if isinstance(meaning, str):
                stands_for = {meaning: text}
            else:
                stands_for = meaning(text) if callable(meaning) else meaning[text]
        except (KeyError, ValueError):
            what = ("nothing here reads it: unset it" if name in UNREAD else "must be " + (
                "a whole number" if callable(meaning) else f"one of {', '.join(meaning)}"))
            problems.append(f"{name}={text}: {what}")
            continue
        for target, value in stands_for.items():
            if target not in environ and (text == "0" or target not in texts):
                texts[target] = name, value
    return texts, problems


def resolve_settings(environ, stored=None, world_size=1):
    """(Settings, names set explicitly) from the environment.

    An explicit variable wins over `stored` (of an artifact), which wins over PRESET and defaults.
    Raises UserError that lists every problem at once."""
    texts, problems = translated(environ)
    preset = environ.get("PRESET", "").strip()
    if preset and preset not in PRESETS:
        problems.append(f"PRESET={preset}: unknown; there are {', '.join(PRESETS)}")
    values = {**PRESETS.get(preset, {}), **(stored or {})}
    for target, (name, text) in texts.items():
        try:
            values[target.lower()] = parse_value(target.lower(), text)
        except ValueError as problem:
            problems.append(f"{name}={text.strip()}: {problem}")
    if OF_WEIGHT_TTT & {*environ, *texts} and "TTT_LORA_RANK" not in texts:
        values["ttt_lora_rank"] = 0
    for name, on in (("value_residual", "pair"), ("gated_attention", "head")):
        if values.get(name) == "1":  # its published value for "on"
            values[name] = on
    s = Settings(**values)
    broken = [f"{', '.join(f'{n}={getattr(s, n.lower())}' for n in names.split())}: {message}"
              for holds, names, message in model_rules(s) + run_rules(s, world_size) if not holds]
    if not broken and s.ttt_enabled and not s.ttt_lora_rank and not any(
            ttt_factor(name, s) for name in parameter_shapes(s)):
        broken = [f"TTT_PARAMS={s.ttt_params}, TTT_OPTIMIZER={s.ttt_optimizer}, TTT_FREEZE_BLOCKS="
                  f"{s.ttt_freeze_blocks} leave nothing to adapt: change one, or set TTT_ENABLED=0"]
    problems += broken
    if problems:
        plural = "s" if len(problems) > 1 else ""
        raise UserError(f"{len(problems)} bad setting{plural} (python {SCRIPT.name} --help lists "
                        "all):\n" + "\n".join(f"  {p}" for p in problems))
    return s, set(texts)


def launched_ranks(environ):
    """(rank, world size, local rank) from torchrun; (0, 1, 0) without it. Raises UserError."""
    names = dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0)
    with contextlib.suppress(ValueError):
        rank, world, local = (int(environ.get(name, default)) for name, default in names.items())
        if 0 <= rank < world and local >= 0:
            return rank, world, local
    given = ", ".join(f"{name}={environ.get(name)}" for name in names)
    raise UserError(f"{given}: not a valid rank; start with torchrun, or unset all three")


def help_text():
    """Every setting by section: default, choices or bounds, meaning."""
    lines = [__doc__.strip(), "", f"Presets: {', '.join(PRESETS)}. Explicit variables win over "
             "PRESET=<name>, which wins over the defaults."]
    for name, (section, text) in DESCRIBED.items():
        lines += ["", section] if section not in lines else []
        bounds = re.sub(rf"(.+) to ({2**62}|1e\+18)", r"at least \1", type_text(name))
        lines.append(f"  {name.upper()}={getattr(Settings, name)}  {text} [{bounds}]")
    return "\n".join(lines)


def user_path(text):
    return Path(os.path.expanduser(text))  # an unknown ~user stays as it is


def find_upward(path):
    """`path` if absolute or found from the working directory, else from the script's folder up."""
    path = user_path(path)
    places = [folder / path for folder in (Path(), *SCRIPT.parents)]  # all the same if absolute
    return next(filter(os.path.exists, places), path)


# ---- 2. Runtime: ranks, device, log, clock; only this section calls torch.distributed -----------

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Runtime:
    """This process among its ranks: device, compute type, collectives, and rank 0's log."""

    def __init__(self, s, ranks=(0, 1, 0)):
        self.rank, self.world_size, local_rank = ranks
        cuda = s.device == "cuda" or (s.device == "auto" and torch.cuda.is_available())
        if cuda and local_rank >= torch.cuda.device_count():
            raise UserError(f"DEVICE={s.device}: rank {self.rank} wants GPU {local_rank} and sees "
                            f"{torch.cuda.device_count()}; start fewer processes, or DEVICE=cpu")
        self.device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
        self.dtype = torch.bfloat16 if cuda else torch.float32
        self.compile = s.compile == "1" or (s.compile == "auto" and cuda)
        self.log_path, self.phase = None, ("", 0.0, 0.0, 0.0)
        self.terminal = all(stream and stream.isatty() for stream in (sys.stdout, sys.stderr))
        self.training, self.signal = False, 0
        if cuda:
            torch.cuda.set_device(self.device)
        torch.set_float32_matmul_precision("high" if cuda else "highest")
        torch.manual_seed(s.seed)
        if self.world_size > 1:
            with explained(f"WORLD_SIZE={self.world_size}: the ranks cannot connect", "start with "
                           "torchrun, or unset WORLD_SIZE", (ValueError, dist.DistError)):
                dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")

    def close(self):
        if dist.is_initialized():
            dist.destroy_process_group()

    # -- collectives; with one rank nothing is sent. sum_later, reduce_scatter and all_gather only
    # start: they return a function that waits for the result, so that many can be in flight.

    def sum_(self, x):
        """Sum of `x` over ranks, in place."""
        return self.sum_later(x)()

    def from_rank0(self, value):
        """Rank 0's value, of any type, on every rank; through the host, without GPU work."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
        return box[0]

    def any_rank(self, flag):
        """Is `flag` true on any rank? A barrier of the hosts, not of the GPUs."""
        return bool(self.sum_(torch.tensor(float(bool(flag)))))

    def barrier(self):
        """Wait for the other hosts. Exempt what exists by now from garbage collection: scanning
        the compiler's objects can take half a second each time."""
        gc.collect()
        gc.freeze()
        self.any_rank(False)

    def sum_later(self, x):
        return self._started(dist.all_reduce, x)

    # torch 2.13 has the first name of each pair and warns about the second.
    REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    def reduce_scatter(self, x):
        """Start a sum over ranks of x [n·W, ...]; each rank gets its n rows."""
        return self._started(Runtime.REDUCE_SCATTER, x, len(x) // self.world_size)

    def all_gather(self, x):
        """Start to gather every rank's x [n, ...] as [n·W, ...]."""
        return self._started(Runtime.ALL_GATHER, x.contiguous(), len(x) * self.world_size)

    def _started(self, collective, x, rows=None):  # the result has `rows` rows; None: it is in x
        if self.world_size == 1:
            return lambda: x
        tensors = (x,) if rows is None else (x.new_empty(rows, *x.shape[1:]), x)
        work = collective(*tensors, async_op=True)

        def wait():
            work.wait()  # blocks the stream of a GPU, not the host
            return tensors[0]  # `tensors` keeps x alive
        return wait

    def part(self, n):
        """The range (begin, end) of n items that this rank works on."""
        return n * self.rank // self.world_size, n * (self.rank + 1) // self.world_size

    # -- signals and device

    def on_signal(self, number=0, frame=None):
        """End the run. While training or packing, only note the first signal: the run ends after
        the step, with its state saved, or after packing."""
        if not self.training or self.signal:
            raise KeyboardInterrupt("interrupted; if a checkpoint or an artifact is saved, the "
                                    "same command with RESUME=auto goes on from it")
        self.signal = number

    def compiled(self, function, **options):
        """The function under torch.compile, where this run compiles."""
        return torch.compile(function, dynamic=False, **options) if self.compile else function

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # -- log

    def progress(self, label, fraction, facts=""):
        """Print the progress of a long phase, outside the log: on a terminal one line, rewritten
        every half second, elsewhere a new line every ten seconds."""
        now = time.perf_counter()
        if label != self.phase[0]:
            self.phase = label, fraction, now, now
        _, begun, start, last = self.phase
        due = now - last >= (0.5 if self.terminal else 10)
        if fraction > begun and due and self.rank == 0:
            self.phase = label, begun, start, now
            left = max(0, (now - start) * (1 - fraction) / (fraction - begun))
            printed(f"progress:{label} {facts}{100 * fraction:.0f}% remaining:{left:.0f}s",
                    sys.stderr, end="" if self.terminal else "\n")

    def log(self, line="", console=True):
        """Log a line on rank 0. A file that fails is dropped; the run continues."""
        if self.rank:
            return
        try:
            if self.log_path:
                with open(self.log_path, "a", encoding="utf-8", errors="replace") as f:
                    f.write(line + "\n")
        except OSError as problem:
            path, self.log_path = self.log_path, None
            self.log(f"{path}: no more lines are written ({problem.strerror}); the run goes on")
        if console:
            printed(line, sys.stdout)


def printed(line, stream, end="\n"):
    """Print a line, on a terminal in place of the progress line. Characters that the stream cannot
    encode are escaped. A stream that fails is redirected to /dev/null; the run continues."""
    encoding = getattr(stream, "encoding", None) or "utf-8"  # None where it was closed before
    try:
        line = "\r\033[K" * stream.isatty() + line
        print(line.encode(encoding, "backslashreplace").decode(encoding), end=end, file=stream,
              flush=True)
    except (AttributeError, OSError, ValueError):
        # Python's flush at exit must not fail either.
        with contextlib.suppress(AttributeError, OSError, ValueError), open(os.devnull, "w") as f:
            os.dup2(f.fileno(), stream.fileno())


class StepClock:
    """The training clock. All ranks read rank 0's, so they use the same learning rate and stop at
    the same step. `interrupted`: a rank has noted a signal."""

    def __init__(self, rt, spent_ms=0.0):
        self.rt, self.events, self.interrupted = rt, [], False
        rt.synchronize()
        self.start = time.perf_counter() - spent_ms / 1000

    def read(self, exact=False):
        """Milliseconds, equal on all ranks. Unless `exact`, the GPU may be two steps behind."""
        if exact:
            self.rt.synchronize()
        elif self.rt.device.type == "cuda":
            self.events.append(torch.cuda.current_stream().record_event())
            if len(self.events) > 2:
                self.events.pop(0).synchronize()
        elapsed = 0.0 if self.rt.rank else 1000 * (time.perf_counter() - self.start)
        both = torch.tensor([elapsed, float(self.rt.signal)], dtype=torch.float64)
        elapsed, self.interrupted = self.rt.sum_(both).tolist()
        return elapsed


def write_whole(path, content):
    """Write bytes to `path` atomically: it holds either its old content or all of the new."""
    path = user_path(path)
    part = path.with_name(f".{path.name}.part")
    with explained(f"{path} cannot be written", "the previous file, if any, is intact"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "wb") as f:
                f.write(content)
                f.flush()
                os.fsync(f.fileno())
            os.replace(part, path)
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


# ---- 3. Data: shards, the training stream, validation tokens ------------------------------------

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 256 * 4
GET_DATA = ("python data/cached_challenge_fineweb.py --variant sp8192 (or sp4096, sp1024, as "
            "VOCAB_SIZE) downloads the challenge's, python data/build_dataset.py TEXT makes your "
            "own, python data/build_dataset.py --demo makes those of PRESET=demo")


def get_data(s):
    """GET_DATA with this vocabulary's variant in its command, if the challenge has such shards."""
    known = s.vocab_size in (8192, 4096, 1024)
    return re.sub(r"sp8192 \(.*?\)", f"sp{s.vocab_size}", GET_DATA) if known else GET_DATA


def open_shard(path, whole=False):
    """The tokens of a shard, uint16, memory-mapped. Raises UserError if it is incomplete or holds a
    span of 1,024 zeros: one of at least 64 evenly spaced spans, with `whole` any."""
    with explained(f"{path} cannot be read", GET_DATA):
        size = path.stat().st_size
        header = np.fromfile(path, "<i4", 256)
    magic, version, count = [*header[:3].tolist(), 0, 0, 0][:3]
    expected = SHARD_HEADER_BYTES + 2 * count
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION) or size != expected or count < 1:
        raise UserError(f"{path}: {size} bytes, begins with {magic}, {version} and promises "
                        f"{count} tokens = {expected} bytes; a shard begins with {SHARD_MAGIC}, "
                        f"{SHARD_VERSION}; delete it and get it again: {GET_DATA}")
    tokens = np.memmap(path, "<u2", "r", SHARD_HEADER_BYTES)
    spans = tokens[: count // 1024 * 1024].reshape(-1, 1024)
    every = 1 if whole else max(1, len(spans) // 64)
    holes = np.flatnonzero(~spans[::every].any(1))
    if len(holes):
        where = int(holes[0]) * 1024 * every
        raise UserError(f"{path}: tokens {where} to {where + 1024} are all 0: damaged; delete it "
                        f"and fetch it again: {GET_DATA}")
    return tokens


def shard_paths(s, split):
    """The shards of a split ("train" or "val"), sorted. Raises UserError where there are none."""
    folder = find_upward(s.data_path)
    paths = sorted(folder.glob(f"fineweb_{split}_[0-9]*.bin"))
    if not paths:
        raise UserError(f"DATA_PATH={s.data_path}: no fineweb_{split}_*.bin in {folder}; "
                        + get_data(s))
    return paths


def sample_parts(tokens):
    """About 64 evenly spaced spans of 4,096 tokens + a document key; a small shard entirely."""
    return [tokens[a: a + 4128] for a in range(0, len(tokens), max(4096, len(tokens) >> 6))]


def document_keys(tokens):
    """The first 32 tokens of each document of at least 32, as a set of bytes."""
    documents = np.split(tokens, np.flatnonzero(tokens == BOS))[1:]
    return {document[:32].tobytes() for document in documents if len(document) >= 32}


def contamination(stream, validation):
    """(sampled training documents, how many of them begin like a validation document)."""
    known = document_keys(validation)
    seen = [document_keys(part) for tokens in stream.shards for part in sample_parts(tokens)]
    return sum(map(len, seen)), sum(len(keys & known) for keys in seen)


def check_tokens(tokens, vocab_size, path):
    if tokens.size and int(tokens.max()) >= vocab_size:
        raise UserError(f"{path}: holds token {int(tokens.max())}, outside of VOCAB_SIZE="
                        f"{vocab_size}; DATA_PATH and TOKENIZER_PATH must belong together")


class TrainStream:
    """Training rows as a function of (seed, position) alone: the same order for every world size.

    Row r of a shard is its tokens r·T to r·T + T, both included. An epoch visits the shards, and
    the rows of each shard, both shuffled or both in order. Shards are memory-mapped, not copied."""

    def __init__(self, s):
        self.s, self.paths = s, shard_paths(s, "train")
        self.shards = [open_shard(p) for p in self.paths]
        self.row_counts = np.array([(len(t) - 1) // s.train_seq_len for t in self.shards])
        self.epoch_rows = int(self.row_counts.sum())
        if not self.epoch_rows:
            raise UserError(f"DATA_PATH={s.data_path}: no shard holds a row of TRAIN_SEQ_LEN="
                            f"{s.train_seq_len} + 1 tokens")
        self.order = functools.lru_cache(4)(self._order)

    def _order(self, epoch, shard=-1):
        """Order of the shards in an epoch (-1), or of the rows in one of its shards."""
        count = len(self.shards) if shard < 0 else self.row_counts[shard]
        if shard >= 0:  # shuffled reads of 4 kB defeat the read-ahead of the system
            self.shards[shard]._mmap.madvise(mmap.MADV_WILLNEED)
        if self.s.train_order == "sequential":
            return np.arange(count)
        return np.random.default_rng((self.s.seed, epoch, shard + 1)).permutation(count)

    def row(self, position):
        """Row number `position` since the start of training: T + 1 tokens."""
        epoch, index = divmod(position, self.epoch_rows)
        shards = self.order(epoch)
        ends = np.cumsum(self.row_counts[shards])
        k = int(np.searchsorted(ends, index, side="right"))
        shard = int(shards[k])
        row = int(self.order(epoch, shard)[index - (ends[k] - self.row_counts[shard])])
        if k + 1 < len(shards):
            self.order(epoch, int(shards[k + 1]))  # the system reads the next one ahead
        tokens = self.shards[shard][row * self.s.train_seq_len:][: self.s.train_seq_len + 1]
        check_tokens(tokens, self.s.vocab_size, self.paths[shard])
        return tokens

    def rows(self, first, last):
        """Rows [first, last) as int32 [last − first, T + 1]."""
        rows = np.stack([self.row(p) for p in range(first, last)])
        return torch.from_numpy(rows.astype(np.int32))


def batches_of(stream, rt, rows_per_step, step=0, ahead=4):
    """Yield this rank's rows, int32 [n, T + 1] a step, on the device; a thread reads ahead."""
    def load(step):
        begin, end = (step * rows_per_step + n for n in rt.part(rows_per_step))
        rows = stream.rows(begin, end)
        return rows.pin_memory() if rt.device.type == "cuda" else rows

    with ThreadPoolExecutor(1) as worker:
        waiting = [worker.submit(load, step + i) for i in range(ahead)]
        for following in itertools.count(step + ahead):
            rows = waiting.pop(0).result().to(rt.device, non_blocking=True)
            waiting.append(worker.submit(load, following))
            yield rows


def load_validation(s):
    """Validation tokens, uint16 [⌊(N−1)/T⌋·T + 1]; N are on disk, at most VAL_LIMIT_TOKENS + 1.
    Raises UserError."""
    paths = shard_paths(s, "val")
    parts = [np.asarray(open_shard(p, whole=True)) for p in paths]
    for path, part in zip(paths, parts):
        check_tokens(part, s.vocab_size, path)
    tokens = np.concatenate(parts)
    if s.val_limit_tokens:
        tokens = tokens[: s.val_limit_tokens + 1]
    need = -(-s.context // s.train_seq_len) * s.train_seq_len
    if len(tokens) <= need:
        raise UserError(f"{paths[0].parent}: {len(tokens)} validation tokens, a row needs {need} + "
                        "1; shorten TRAIN_SEQ_LEN and EVAL_SEQ_LEN, raise VAL_LIMIT_TOKENS, or "
                        "get more")
    return tokens[: (len(tokens) - 1) // s.train_seq_len * s.train_seq_len + 1]


# ---- 4. Bits per byte: the only way from a sum of losses to a score -----------------------------

def manifest_of(s, *keys):
    """The value under these nested keys of the data folder's manifest.json, or None."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        manifest = json.loads((find_upward(s.data_path) / "manifest.json").read_bytes())
        return functools.reduce(lambda found, key: found[key], keys, manifest)
    return None


class ByteTable:
    """UTF-8 bytes of each target: counted from the text where fineweb_val_bytes_*.bin exist, else
    from the pieces, by the challenge's rule.

    That rule: a piece counts its bytes without the leading "▁", plus one for that "▁" unless the
    token before is a boundary (control, unknown or unused). Byte pieces count 1, boundaries 0. A
    tokenizer whose pieces it miscounts is refused."""

    def __init__(self, s):
        path = self.path = find_upward(s.tokenizer_path)
        if not path.is_file():
            raise UserError(f"TOKENIZER_PATH={s.tokenizer_path}: no such file; {get_data(s)}")
        with explained(f"TOKENIZER_PATH={path}: not a SentencePiece model", GET_DATA,
                       (RuntimeError, OSError)):
            sp = self.sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        V = sp.vocab_size()
        if V != s.vocab_size:
            raise UserError(f"TOKENIZER_PATH={path}: has {V} pieces where VOCAB_SIZE="
                            f"{s.vocab_size}; set VOCAB_SIZE={V} with shards made by this "
                            "tokenizer, or name that of the shards")
        made_by = manifest_of(s, "tokenizer", "sha256")
        if made_by not in (None, hashlib.sha256(path.read_bytes()).hexdigest()):
            raise UserError(f"TOKENIZER_PATH={path}: not the tokenizer that made the shards of "
                            f"DATA_PATH={s.data_path}; name the one of sha256 {made_by}")
        self.boundary = np.array([sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i)
                                  for i in range(V)])
        pieces = [sp.id_to_piece(i) for i in range(V)]
        self.space = np.array([p.startswith("▁") for p in pieces]) & ~self.boundary
        self.base = np.array([1 if sp.is_byte(i) else len(p[p.startswith("▁"):].encode())
                              for i, p in enumerate(pieces)], np.int64)
        self.base[self.boundary] = 0
        self.byte_counts, self.source = self._counted(s), "text"
        if self.byte_counts is None:
            self.source = "pieces"
            self._check_pieces(path, pieces)

    def _counted(self, s):
        """Bytes of every validation token, from the text, or None. Raises UserError."""
        paths = sorted(find_upward(s.data_path).glob("fineweb_val_bytes_*.bin"))
        if not paths:
            return None
        counts = np.concatenate([open_shard(p, whole=True) for p in paths])
        tokens = sum(len(open_shard(p)) for p in shard_paths(s, "val"))
        text = manifest_of(s, "splits", "val", "utf8_bytes")
        total = int(counts.sum(dtype=np.int64))
        if len(counts) != tokens or text not in (None, total):
            raise UserError(f"{paths[0]}: {len(counts)} entries, {total} bytes in all, for "
                            f"{tokens} tokens and {text} bytes of text: build the dataset again")
        return counts

    def _check_pieces(self, path, pieces):
        pieces = [p for p, edge in zip(pieces, self.boundary) if not edge]
        inside = [p for p in pieces if "▁" in p[1:] or " " in p]
        if inside or "▁" not in pieces:
            what = (f"{len(inside)} pieces such as {inside[0]!r} hold spaces, which the table of "
                    "pieces miscounts" if inside else "no piece is a single space")
            raise UserError(f"TOKENIZER_PATH={path}: {what}; build the dataset with "
                            "data/build_dataset.py, which counts the bytes of the text")

    def check_text(self, tokens, path, scored=True):
        """Raise UserError unless tokens and tokenizer match. Whole documents from the beginning,
        then from a sample, are decoded and encoded again; in each, at least half of the tokens must
        be in documents that come back equal. With `scored`, unknown pieces are an error, too."""
        check_tokens(tokens, len(self.base), path)
        if scored and (unknown := np.count_nonzero(tokens == self.sp.unk_id())):
            raise UserError(f"{path}: {unknown} tokens are unknown pieces, which stand for any "
                            "text; use a tokenizer with byte fallback, such as "
                            "data/build_dataset.py makes")
        samples = [[tokens[: 1 << 15]]]
        if len(tokens) > 1 << 15:  # these alone are not enough: they cut long documents
            samples.append(sample_parts(tokens))
        for parts in samples:
            documents = [ids[1:].tolist() for part in parts  # those between two BOS
                         for ids in np.split(part, np.flatnonzero(part == BOS))[1:-1]]
            again = self.sp.encode([self.sp.decode(ids) for ids in documents])
            same = sum(len(ids) for ids, new in zip(documents, again) if ids == new)
            total = sum(map(len, documents))
            if same < 0.5 * total:
                raise UserError(f"{path} and TOKENIZER_PATH={self.path} do not belong together, "
                                f"or the shard is damaged: {same} of {total} tokens come back "
                                f"when they are decoded and encoded again; {GET_DATA}")

    def count(self, tokens):
        """Bytes of the targets tokens[1:], where tokens are the first of the validation set."""
        if self.byte_counts is not None:
            return int(self.byte_counts[1: len(tokens)].sum(dtype=np.int64))
        before, target = tokens[:-1], tokens[1:]
        spaces = np.count_nonzero(self.space[target] & ~self.boundary[before])
        return int(self.base[target].sum() + spaces)


def bits_per_byte(loss_sum, byte_count):
    """Bits per byte: summed nll (nats) over the bytes of its targets."""
    return float(loss_sum) / math.log(2) / byte_count


# ---- 5. Model -----------------------------------------------------------------------------------

def rms_norm(x):
    """x over its root mean square, last dim; fp32's epsilon also in bf16."""
    return F.rms_norm(x, (x.size(-1),), eps=torch.finfo(torch.float32).eps)


def scaled_rms_norm(x_BTHE, gain_H):
    """gain·rms_norm(x). The gain multiplies the reciprocal norm, not the result: its gradient is
    then a sum of B·T·H numbers, not of B·T·H·E."""
    x32 = x_BTHE.to(torch.promote_types(x_BTHE.dtype, torch.float32))
    factor = gain_H * (x32.square().mean(-1) + torch.finfo(torch.float32).eps).rsqrt()
    return (x32 * factor.unsqueeze(-1)).to(x_BTHE.dtype)


def linear(x, w_RC):
    """x @ wᵀ in x's type."""
    return F.linear(x, w_RC.to(x.dtype))


def adapted(y_BTR, u_BTD, pair=None):
    """y + B·A·u, LoRA with pair (A [B,r,D], B [B,R,r]) per row; without one, y."""
    if not pair:
        return y_BTR
    a, b = (x.to(u_BTD.dtype) for x in pair)
    return y_BTR + (u_BTD @ a.mT) @ b.mT


def leaky_square_mlp(u_ND, up_RD, down_DR, slope):
    """W₂·LeakyReLU(W₁u)² [N,D]; slope 0 is relu²."""
    return F.linear(F.leaky_relu(F.linear(u_ND, up_RD), slope).square(), down_DR)


# leaky_square_mlp as a Triton kernel, for compiled models on a GPU. It fuses the activation into
# the first matrix product, and its derivative into the backward product. It stores LeakyReLU(x)²
# with the sign of x as its last bit; the derivative follows from the two.
jit = triton.jit if triton else lambda kernel: kernel
MLP_TILE = dict(BM=128, BN=256, BK=64, GROUP=8, num_warps=8, num_stages=3)


@jit
def leaky_square_kernel(a, b, h, out, rows, SLOPE: tl.constexpr, BACKWARD: tl.constexpr,
                        N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                        BK: tl.constexpr, GROUP: tl.constexpr):
    """A tile of the product P [rows, N]. Forward: P = a·bᵀ, a [rows, K], b [N, K], and out =
    LeakyReLU(P)²; h is not read. Backward: P = a·b, b [K, N], and out = P × the derivative of
    LeakyReLU² where the activation is h."""
    tile, per_group = tl.program_id(0), GROUP * (N // BN)  # GROUP row tiles reuse cached columns
    first = tile // per_group * GROUP
    group = tl.minimum(tl.cdiv(rows, BM) - first, GROUP)
    m = ((first + tile % per_group % group) * BM + tl.arange(0, BM)).to(tl.int64)
    n = tile % per_group // group * BN + tl.arange(0, BN)
    k, inside = tl.arange(0, BK), (m < rows)[:, None]
    total = tl.zeros((BM, BN), tl.float32)
    for at in range(0, K, BK):
        left = tl.load(a + m[:, None] * K + (at + k)[None, :], mask=inside, other=0.0)
        if BACKWARD:
            right = tl.load(b + (at + k)[:, None] * N + n[None, :])
        else:
            right = tl.load(b + (at + k)[:, None] + n[None, :] * K)
        total = tl.dot(left, right, total)
    place = m[:, None] * N + n[None, :]
    dtype: tl.constexpr = out.dtype.element_ty
    integer: tl.constexpr = tl.int16 if dtype.primitive_bitwidth == 16 else tl.int32
    if BACKWARD:
        y = tl.load(h + place, mask=inside, other=0.0)
        slope = tl.where((y.to(integer, bitcast=True) & 1) != 0, -2 * SLOPE, 2.0)
        # Rounded, because in fp32 the compiler spills 288 bytes of registers instead of 44.
        result = total * (slope * tl.sqrt(y.to(tl.float32))).to(dtype).to(tl.float32)
    else:
        leaky = tl.where(total < 0, SLOPE * total, total)
        rounded = (leaky * leaky).to(dtype)
        bits = rounded.to(integer, bitcast=True)
        wrong = (bits & 1) != (total < 0).to(integer)  # then the neighbour on the side of leaky²
        up = leaky * leaky >= rounded.to(tl.float32)
        bits += tl.where(wrong, tl.where(up, 1, -1), 0).to(integer)
        result = bits.to(dtype, bitcast=True)
    tl.store(out + place, result.to(dtype), mask=inside)


class LeakySquareMLP(torch.autograd.Function):
    """leaky_square_mlp by kernel; D in multiples of BK, R of BN."""

    @staticmethod
    def product(a, b, h, R, slope, backward):
        out = a.new_empty(len(a), R)
        tiles = -(-len(a) // MLP_TILE["BM"]) * (R // MLP_TILE["BN"])
        leaky_square_kernel[(tiles,)](a, b, h, out, len(a), slope, backward, R, a.size(1),
                                      **MLP_TILE)
        return out

    @staticmethod
    def forward(ctx, u_ND, up_RD, down_DR, slope):
        u, up, down = u_ND.contiguous(), up_RD.contiguous(), down_DR.contiguous()
        h = LeakySquareMLP.product(u, up, u, len(up), slope, False)
        ctx.save_for_backward(u, up, down, h)
        ctx.slope = slope
        return F.linear(h, down)

    @staticmethod
    def backward(ctx, dy):
        u, up, down, h = ctx.saved_tensors
        dy = dy.contiguous()
        ddown = dy.mT @ h  # this order fuses best; the compiler drops unused products
        dh = LeakySquareMLP.product(dy, down, h, len(up), ctx.slope, True)
        dup = dh.mT @ u
        return dh @ up, dup, ddown, None


def rotary_tables(s, length):
    """cos and sin [length, rotated/2] fp32; NTK raises the base for rows above the reference."""
    rotated, base = s.rope_dims or s.head_dim, 10000.0
    if s.rope_ntk_reference and s.train_seq_len > s.rope_ntk_reference:
        base *= (s.train_seq_len / s.rope_ntk_reference) ** (rotated / (rotated - 2))
    frequency = base ** (-torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


def rotate(x_BTHE, cos, sin, change=None):
    """Rotary embedding of the first 2·cos.size(-1) channels of each head, halves paired.
    `change` is applied to the other channels."""
    half, T = cos.size(-1), x_BTHE.size(1)
    cos, sin = (t[:T, None].to(x_BTHE.dtype) for t in (cos, sin))
    x1, x2, rest = x_BTHE.split([half, half, x_BTHE.size(-1) - 2 * half], dim=-1)
    rest = rest if change is None else change(rest)  # torch 2.11 cannot compile `if change`
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin, rest), dim=-1)


def offset_keys(k_BTKE, starts_BT=None):
    """Replace the channels by those of the previous position, except at the first position and at
    document starts. A query that matches a token then reads the value of the next token, in one
    layer (partial key offset, nanogpt speedrun #49)."""
    moved = torch.cat((k_BTKE[:, :1], k_BTKE[:, :-1]), dim=1)
    return moved if starts_BT is None else torch.where(starts_BT[..., None, None], k_BTKE, moved)


class GatedXSA(torch.autograd.Function):
    """XSA: the attention output minus its projection on its position's v, times each head's gate.
    The backward pass takes the heads of a group one by one: the compiler makes one kernel of it."""

    @staticmethod
    def forward(ctx, y_BTHE, v_BTKE, gate_BTH):
        ctx.save_for_backward(y_BTHE, v_BTKE, gate_BTH)
        y, gate = (x.unflatten(2, (v_BTKE.size(2), -1)) for x in (y_BTHE, gate_BTH.unsqueeze(-1)))
        v = v_BTKE.unsqueeze(3)
        along = (y * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True).clamp_min(1e-24)
        return ((y - along * v) * gate).flatten(2, 3)

    @staticmethod
    def backward(ctx, grad):
        y_BTHE, v, gate_BTH = ctx.saved_tensors
        dy, dv, dgate, v_square = [], 0, [], v.square().sum(-1, keepdim=True).clamp_min(1e-24)
        for y, d, gate in zip(*(x.unflatten(2, (v.size(2), -1)).unbind(3) for x in (
                y_BTHE, grad, gate_BTH.unsqueeze(-1)))):
            y_along = (y * v).sum(-1, keepdim=True) / v_square
            rest = y - y_along * v
            dgate.append((d * rest).sum(-1))
            d = d * gate
            d_along = (d * v).sum(-1, keepdim=True) / v_square
            dy.append(d - d_along * v)
            dv = dv - y_along * d - d_along * (rest - y_along * v)
        dv = dv.as_strided(dv.shape, dv.stride())  # else the compiler computes dv for each use
        return torch.stack(dy, 3).flatten(2, 3), dv, torch.stack(dgate, 3).flatten(2)


# -- attention, causal: attend(q, k, v, visible(x, band, starts)), x any tensor [B, T, ...]. A query
# sees the last `band` keys (0: all); with starts [B, T], true where a document starts, only those
# of its document. visible() runs once in a forward pass, attend() once in each block.

def visible_mask(x, band=0, starts_BT=None):
    """True where a query sees a key, [T, T] or [B, 1, T, T]; None: plain causal attention."""
    if not band and starts_BT is None:
        return None
    T = x.size(1)
    mask = torch.ones(T, T, dtype=torch.bool, device=x.device).tril().triu(1 - (band or T))
    if starts_BT is None:
        return mask
    document = starts_BT.cumsum(1)
    return (mask & (document[:, :, None] == document[:, None]))[:, None]


def sdpa(q_BTHE, k_BTKE, v_BTKE, mask=None):
    """Causal attention of grouped heads by PyTorch."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHE, k_BTKE, v_BTKE))
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
    return y.transpose(1, 2)


def cumulative_lengths(starts_BT):
    """Where rows and documents start in the flat batch [B·T], int32, for variable-length kernels.
    Their number is fixed: the rows and 64 + B·T/512 documents, padded with B·T. If there are more,
    the last ones are joined. FineWeb has one document per 800 tokens; segments of long rows have
    1,024 or more. The padding takes time: FlashAttention starts thread blocks for it."""
    N, T = starts_BT.numel(), starts_BT.size(1)
    position = torch.arange(N, device=starts_BT.device)
    documents = torch.where(starts_BT.flatten(), position, N).sort().values[: 64 + N // 512]
    borders = torch.cat((position[::T], documents)).sort().values
    return F.pad(borders, (0, 1), value=N).int()


class TorchFlash:
    """PyTorch's FlashAttention 2, called as the packages are. A private operator, because SDPA
    takes neither a band nor documents, and varlen_attn of PyTorch 2.11 no grouped heads."""

    @staticmethod
    def flash_attn_func(q, k, v, causal, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
                        max_seqlen_k=None, window_size=(-1, -1)):
        T, (left, right) = max_seqlen_q or q.size(1), window_size
        return torch.ops.aten._flash_attention_forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, T, T, 0.0, causal, False, window_size_left=left,
            window_size_right=right)

    flash_attn_varlen_func = flash_attn_func


# In the order in which ATTENTION=auto tries them where documents do not count.
ATTENTION = {"fa3": "flash_attn_interface", "cudnn": SDPBackend.CUDNN_ATTENTION,
             "flash": TorchFlash, "fa2": "flash_attn", "fa4": "flash_attn.cute"}


def flash_attention(module):
    """(attend, visible) of a package of FlashAttention, or of TorchFlash."""
    def visible(x, band=0, starts_BT=None):
        return band, None if starts_BT is None else cumulative_lengths(starts_BT)

    def attend(q, k, v, band_and_borders=(0, None)):
        (band, borders), T = band_and_borders, q.size(1)
        sides = {"window_size": (band - 1, 0)} if band else {}
        if borders is None:
            out = module.flash_attn_func(q, k, v, causal=True, **sides)
        else:
            out = module.flash_attn_varlen_func(
                *(x.flatten(0, 1) for x in (q, k, v)), cu_seqlens_q=borders,
                cu_seqlens_k=borders, max_seqlen_q=T, max_seqlen_k=T, causal=True, **sides)
        return (out[0] if isinstance(out, tuple) else out).view_as(q)
    return attend, visible


def cudnn_attention(strict=False):
    """(attend, visible) of cuDNN. If it refuses an input, PyTorch's next kernel takes it; the last,
    MATH, stores all scores. strict, to test cuDNN, leaves out the others, with a mask only MATH."""
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION,
             SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    plain, masked = (order[:1], order[:-1]) if strict else (order, order)

    def attend(q, k, v, mask=None):
        with sdpa_kernel(plain if mask is None else masked, set_priority=True):
            return sdpa(q, k, v, mask)
    return attend, visible_mask


def attention_kernel(name, strict=False):
    """(attend, visible) of the kernel `name`, sdpa's for any other name; None if its package is
    missing. For strict see cudnn_attention."""
    kernel = ATTENTION.get(name)
    if kernel is None:
        return sdpa, visible_mask
    if kernel is SDPBackend.CUDNN_ATTENTION:
        return cudnn_attention(strict)
    try:
        module = importlib.import_module(kernel) if isinstance(kernel, str) else kernel
    except Exception:  # a broken package counts as missing
        return None
    return flash_attention(module)


@dataclass(frozen=True)
class Kernels:
    """The functions a model computes with."""
    attend: object = sdpa
    visible: object = visible_mask
    mlp: object = leaky_square_mlp


def why_unusable(function, reference, inputs, rt):
    """Why the compiled function is unusable here, or "". Its result and gradients must differ from
    the reference by at most 2 % of the norm. Any exception is a reason, too."""
    wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]

    def outcome(f):
        y = f(*inputs)
        return [y, *torch.autograd.grad(y.float().square().sum(), wanted)]
    try:
        compiled = rt.compiled(lambda *inputs: function(*inputs), fullgraph=True)
        pairs = zip(outcome(compiled), outcome(reference), strict=True)
        if all((a.float() - b.float()).norm() <= 0.02 * b.float().norm() for a, b in pairs):
            return ""
        return "gives another result"
    except Exception as problem:
        return in_a_line(problem)


def first_right(part, candidates, reference, inputs, rt):
    """Name of the first candidate that is right on every rank, or ""; the log says why not."""
    for name, function in candidates.items():
        why = (function if isinstance(function, str)  # a reason
               else why_unusable(function, reference, inputs, rt) if function else "not installed")
        if not rt.any_rank(why):
            return name
        rt.log(f"{part}: not {name}: {why or 'unusable on another rank'}")
    return ""


def random_inputs(rt, *shapes):
    return [torch.randn(x, device=rt.device, dtype=rt.dtype, requires_grad=True) for x in shapes]


def choose_kernels(s, rt):
    """({part: name}, Kernels): for each part the kernel that is set, or the first that is correct
    here. Attention is tried on two rows whose documents are longer than a kernel's tile and than
    the test's band. A band is tried only if scoring is banded. Raises UserError."""
    gpu, N, D, R = rt.device.type == "cuda", 1024, s.model_dim, s.mlp_hidden
    position = torch.arange(N, device=rt.device).expand(2, N)
    starts = position == 350 if s.doc_attention else None

    def as_used(kernel):
        bands = [0, 130] if s.scoring_shape[2] else [0]
        return kernel and (lambda *qkv: torch.cat([
            kernel[0](*qkv, kernel[1](qkv[0], band, starts)) for band in bands]))

    # For documents cuDNN comes last: it would read a mask [B, T, T].
    order = sorted(ATTENTION, key=lambda name: s.doc_attention and name == "cudnn")
    attention = {n: as_used(attention_kernel(n, strict=True)) for n in order if gpu}
    heads = s.num_heads, s.num_kv_heads, s.num_kv_heads
    by_triton = (gpu and triton and rt.compile
                 and R % MLP_TILE["BN"] == D % MLP_TILE["BK"] == 0)  # whole tiles
    triton_mlp = LeakySquareMLP.apply if by_triton else "needs Triton, COMPILE=1 and whole tiles"

    def chosen(part, setting, plain, candidates, reference, inputs):
        asked = getattr(s, setting)
        if asked == plain:
            return plain
        if asked != "auto":
            candidates = {asked: candidates.get(asked)}
        name = first_right(part, candidates, reference, inputs, rt)
        if not name and asked != "auto":
            raise UserError(f"{setting.upper()}={asked}: not installed, or its {part} not right on "
                            f"{rt.device} with COMPILE={s.compile} (triton needs a GPU, compiled "
                            f"code and MODEL_DIM in multiples of {MLP_TILE['BK']}, the MLP's width "
                            f"of {MLP_TILE['BN']}); {setting.upper()}=auto takes what works")
        return name or plain

    names = dict(
        attention=chosen("attention", "attention", "sdpa", attention, as_used((sdpa, visible_mask)),
                         random_inputs(rt, *((2, N, count, s.head_dim) for count in heads))),
        mlp=chosen("mlp", "kernels", "plain", {"triton": triton_mlp} if gpu else {},
                   leaky_square_mlp, [*random_inputs(rt, (256, D), (R, D), (D, R)), s.leaky_slope]))
    if gpu and s.doc_attention and names["attention"] in ("cudnn", "sdpa"):
        rt.log("attention:slow, DOC_ATTENTION=1 without FlashAttention reads a mask [B, T, T] in "
               "each pass; DOC_ATTENTION=0 needs none")
    mlp = LeakySquareMLP.apply if names["mlp"] == "triton" else leaky_square_mlp
    return names, Kernels(*attention_kernel(names["attention"]), mlp)


@dataclass(frozen=True)
class Pass:
    """One run of a block: its scales are `block`'s, its matrices `core`'s."""
    block: int
    core: int
    push: bool        # keep the output as a skip
    skip: int | None  # row of skip_weights for the skip that is added to the input
    xsa: bool
    form: str         # how attention and MLP join the residual stream: "0", "one" or "lanes"


def pass_list(s, late=False):
    """The passes in the order they run, before or after the switch to LATE_PASSES; the only code
    that decides this order.

    The first half keeps its outputs, the second half takes them, last in first out. XSA is counted
    over cores, as in #537. Lanes begin in the second half."""
    order = s.late_order if late else list(range(s.num_layers))
    half, passes = len(order) // 2, []
    first_parallel = s.parallel_from or round(8 * s.num_layers / 11)
    for position, block in enumerate(order):
        core, skips, second_half = block % s.cores, s.unet_skips != "0", position >= half
        parallel = block >= first_parallel and (second_half or s.parallel == "one")
        passes.append(Pass(
            block, core, push=skips and not second_half,
            skip=position - half if skips and half <= position < 2 * half else None,
            xsa=core >= s.cores - s.xsa_last_n, form=s.parallel if parallel else "0"))
    return passes


def matrix(rows, columns):
    return nn.Parameter(torch.full((rows, columns), math.nan))  # init_weights fills every one


class Attention(nn.Module):
    """Grouped queries, QK norm and gain, partial RoPE, value residual, XSA (#414), gate (#413)."""

    def __init__(self, s, kernels):
        super().__init__()
        D, kv_dim = s.model_dim, s.num_kv_heads * s.head_dim
        self.heads, self.kv_heads, self.head_dim = s.num_heads, s.num_kv_heads, s.head_dim
        self.attend, self.gate, self.key_offset = kernels.attend, s.gated_attention, s.key_offset
        self.q, self.k, self.v, self.o = (matrix(rows, D) for rows in (D, kv_dim, kv_dim, D))
        if s.muon_head_pairs:
            self.q.part_rows = self.k.part_rows = 2 * s.head_dim
        self.q_gain = nn.Parameter(torch.full((s.num_heads,), s.qk_gain_init))
        if self.gate == "head":  # y_h × σ(W_h·u + b_h), nearly open at first
            self.gate_weight = nn.Parameter(torch.zeros(s.num_heads, D))
            self.gate_bias = nn.Parameter(torch.full((s.num_heads,), 4.0))
        elif self.gate == "sparse":  # y_h × σ(W_h·u[:12] / 2), half open at first
            self.gate_weight = nn.Parameter(torch.zeros(s.num_heads, min(12, D)))

    def project(self, u_BTD):
        """q [B,T,H,E], k and v [B,T,K,E] and the logits of a "head" gate [B,T,H] (else empty), by
        one product: it reads u once, forward and backward."""
        weights = [self.q, self.k, self.v]
        if self.gate == "head":  # padded to whole heads: one kernel then concatenates all gradients
            padding = self.gate_weight.new_zeros(-self.heads % self.head_dim, u_BTD.size(-1))
            weights += [self.gate_weight, padding]
        heads = linear(u_BTD, torch.cat(weights)).unflatten(-1, (-1, self.head_dim))
        q, k, v, gate = heads.split([self.heads, self.kv_heads, self.kv_heads,
                                     heads.size(2) - self.heads - 2 * self.kv_heads], dim=2)
        return q, k, v, gate.flatten(2)[..., : self.heads]

    def forward(self, u_BTD, block, first_v, rotary, xsa, value_embedding, visible, starts_BT):
        """Output [B,T,D], scaled for the block, and v [B,T,K,E] before the value residual."""
        q, k, v, gate = self.project(u_BTD)
        unmixed_v = v if value_embedding is None else v + value_embedding.view_as(v)
        v = block.mix_value(unmixed_v, first_v)
        q = rotate(scaled_rms_norm(q, self.q_gain), *rotary)
        offset = functools.partial(offset_keys, starts_BT=starts_BT) if self.key_offset else None
        k = rotate(rms_norm(k), *rotary, offset)
        y = self.attend(q, k, v, visible)
        if self.gate == "head":
            gate = torch.sigmoid(gate + self.gate_bias.to(y.dtype))
        elif self.gate == "sparse":
            read = linear(u_BTD[..., : self.gate_weight.size(1)], self.gate_weight)
            gate = torch.sigmoid(0.5 * read)
        else:
            gate = y.new_ones(y.shape[:-1])
        y = GatedXSA.apply(y, v, gate) if xsa else y * gate.unsqueeze(-1)
        # Scaling the rows of the matrix is cheaper than a pass over the activations.
        return linear(y.flatten(-2), self.o * block.attn_scale[:, None]), unmixed_v


class MLP(nn.Module):
    def __init__(self, s, kernels):
        super().__init__()
        self.slope, self.kernels = s.leaky_slope, kernels
        self.up, self.down = matrix(s.mlp_hidden, s.model_dim), matrix(s.model_dim, s.mlp_hidden)

    def forward(self, u_BTD, out_scale_D):
        up, down = (w.to(u_BTD.dtype) for w in (self.up, self.down * out_scale_D[:, None]))
        # Eager code, in which calibration observes each product, takes the plain function.
        mlp = self.kernels.mlp if torch.compiler.is_compiling() else leaky_square_mlp
        return mlp(u_BTD.flatten(0, 1), up, down, self.slope).view_as(u_BTD)


class Block(nn.Module):
    """The scales and mixes of a block, around a core's attention and MLP."""

    def __init__(self, s, index):
        super().__init__()
        D = s.model_dim
        self.input_scale = 1 / math.sqrt(index + 1) if s.ln_scale else 1.0
        self.attn_scale, self.mlp_scale = (nn.Parameter(torch.ones(D)) for _ in range(2))
        self.resid_mix = nn.Parameter(torch.tensor([[1.0] * D, [0.0] * D]))
        initial = dict(pair=(0.5, 0.5), sigmoid=(-1.5,)).get(s.value_residual) if index else None
        self.value_residual = nn.Parameter(torch.tensor(initial)) if initial else None

    def mix_value(self, v, first_v):
        """The value residual a·V₀ + b·V, V₀ from the first pass: (a, b) learned (#413, #490), or
        (σ(λ), 1 − σ(λ)) (VRL, #657). Block 0 has none, so it must run first."""
        if self.value_residual is None:
            return v
        p = self.value_residual.expand(*v.shape[:3], -1)  # so one kernel reduces both gradients
        a, *b = p.to(v.dtype).split(1, dim=-1)
        return a * first_v + b[0] * v if b else torch.lerp(v, first_v, a.sigmoid())

    def attention(self, z_BTD, core, first_v, pair, *context):
        """attn_scale ⊙ Attn(u) + LoRA(u), u = input_scale · rms_norm(z); and v before the value
        residual. context: the other arguments of Attention.forward."""
        u = self.input_scale * rms_norm(z_BTD)
        a, v = core.attn(u, self, first_v, *context)
        return adapted(a, u, pair), v

    def mlp(self, y_BTD, core, pair):
        """mlp_scale ⊙ MLP(u) + LoRA(u), u = input_scale · rms_norm(y)."""
        u = self.input_scale * rms_norm(y_BTD)
        return adapted(core.mlp(u, self.mlp_scale), u, pair)


class BigramEmbedding(nn.Module):
    """An embedding of a token and the one before it, hashed into buckets; the last bucket is for
    row beginnings. Bucket of t: (36313·xₜ XOR 27191·xₜ₋₁) mod (buckets − 1)."""

    def __init__(self, s):
        super().__init__()
        self.table = matrix(s.bigram_vocab_size, s.bigram_dim)
        self.proj = matrix(s.model_dim, s.bigram_dim)
        self.scale = nn.Parameter(torch.tensor([0.05]))

    def forward(self, tokens_BT, dtype):
        last = self.table.size(0) - 1
        hashed = ((36313 * tokens_BT[:, 1:]) ^ (27191 * tokens_BT[:, :-1])) % last
        rows = F.embedding(F.pad(hashed, (1, 0), value=last), self.table).to(dtype)
        return linear(rows, self.proj) * self.scale.to(dtype)


class ValueEmbedding(nn.Module):
    """One table of value vectors per token for some blocks, each with its scale."""

    def __init__(self, s):
        super().__init__()
        self.blocks = s.ve_blocks
        self.table = matrix(s.vocab_size, s.ve_dim)
        self.proj = matrix(s.num_kv_heads * s.head_dim, s.ve_dim)
        self.scale = nn.Parameter(torch.tensor([0.1]))
        self.block_scales = nn.Parameter(torch.ones(len(self.blocks)))

    def forward(self, tokens_BT, dtype):
        """{block: [B,T,K·E]}."""
        rows = F.embedding(tokens_BT, self.table).to(dtype)
        values = linear(rows, self.proj) * self.scale.to(dtype)
        return {b: values * self.block_scales[n].to(dtype) for n, b in enumerate(self.blocks)}


class Mixer(nn.Module):
    """x + Σ cᵢ·otherᵢ; an MLP of 64 channels reads each token's three factors c from x (MUDDFormer,
    Xiao et al. 2025; nanogpt speedrun #81)."""

    def __init__(self, s):
        super().__init__()
        self.read = matrix(64, s.model_dim)
        self.write, self.bias = (nn.Parameter(torch.zeros(shape)) for shape in ((3, 64), (3,)))

    def forward(self, x_BTD, *others):
        hidden = F.gelu(linear(rms_norm(x_BTD), self.read))
        factors = 0.1 * (linear(hidden, self.write) + self.bias.to(x_BTD.dtype))
        return x_BTD + sum(c * other for c, other in zip(factors.split(1, dim=-1), others))


AFTER_PAIRS = 16  # numbers behind the pairs of an adapter row: one is used, 16 align rows


class GPT(nn.Module):
    """The model. One forward serves training, scoring and TTT."""

    def __init__(self, s, dtype=torch.float32, kernels=Kernels()):
        super().__init__()
        self.s, self.dtype, self.kernels = s, dtype, kernels
        self.passes = {late: pass_list(s, late) for late in (False, True)}
        D = s.model_dim
        skip_rows = max(sum(p.skip is not None for p in order) for order in self.passes.values())
        self.tok_emb = matrix(s.vocab_size, D)
        self.bigram = BigramEmbedding(s) if s.bigram_vocab_size else None
        self.ve = ValueEmbedding(s) if s.ve_blocks else None
        smeared = {"0": 0, "embed": 1 + min(12, D)}.get(s.smear_gate, D)
        self.smear = nn.Parameter(torch.zeros(smeared)) if smeared else None
        self.cores = nn.ModuleList(  # the matrices of a block; several blocks may share a core
            nn.ModuleDict(dict(attn=Attention(s, kernels), mlp=MLP(s, kernels)))
            for _ in range(s.cores))
        self.blocks = nn.ModuleList(Block(s, i) for i in range(s.num_layers))
        self.skip_weights = nn.Parameter(torch.ones(skip_rows, D)) if skip_rows else None
        gated = skip_rows and s.unet_skips == "gated"
        self.skip_gates = nn.Parameter(torch.zeros(skip_rows, D)) if gated else None
        if s.parallel == "lanes":  # of each block and lane: factors of lane, attention, MLP
            self.lanes = nn.Parameter(torch.tensor([[[1.1, 1.0, 1.0]] * 2] * s.num_layers))
        self.mixers = nn.ModuleList(Mixer(s) for _ in range(2 * s.mudd))
        # Before the first step all passes return multiples of x₀. The mixers' gradients are then
        # rounding errors, which Muon and AdamW would turn into steps of full size.
        down = self.cores[0].mlp.down  # 0 before the first step
        for p in (p for mixer in self.mixers for p in (mixer.write, mixer.bias)):
            p.register_hook(lambda grad: grad * down.any())
        for n, core in enumerate(self.cores):
            blocks = sum(p.core == n for p in self.passes[False])
            for p in core.parameters() if blocks > 1 else ():
                p.blocks = blocks  # its gradient is the mean over them, as in #537
                p.register_hook(lambda grad, blocks=blocks: grad / blocks)
        longest = max(s.train_seq_len, s.context, s.scoring_shape[0], s.ttt_shape[0])
        self.cos, self.sin = (nn.Buffer(t, persistent=False) for t in rotary_tables(s, longest))

    def embed(self, tokens_BT):
        """Normalized sum of token and bigram embeddings [B,T,D]. The smear gate mixes in the token
        before; "embed": before the bigram embedding and the norm, else after."""
        e = F.embedding(tokens_BT, self.tok_emb).to(self.dtype)
        not_bos = (tokens_BT != BOS).unsqueeze(-1)
        if self.s.smear_gate == "embed":
            w, strength = self.smear.to(e.dtype).split([len(self.smear) - 1, 1])
            gate = strength * torch.sigmoid(F.linear(e[..., : len(w)], w[None]))
            e = e + gate * not_bos * F.pad(e[:, :-1], (0, 0, 1, 0))
        e = e if self.bigram is None else e + self.bigram(tokens_BT, self.dtype)
        x = rms_norm(e)
        if self.s.smear_gate not in ("1", "bos"):
            return x
        gate = torch.sigmoid(self.smear).to(x.dtype)
        gate = gate * not_bos if self.s.smear_gate == "bos" else gate
        return (1 - gate) * x + gate * F.pad(x[:, :-1], (0, 0, 1, 0))

    def adapter_shapes(self):
        """(outputs R, inputs D) of each adapter: attention and MLP of every pass, the logits."""
        D = self.s.model_dim
        return [(D, D)] * 2 * len(self.passes[True]) + [(self.s.vocab_size, D)]

    def adapter_pairs(self, flat_BP):
        """Cut [B,P] into pairs (A [B,r,D], B [B,R,r]), one for each of adapter_shapes; P gives the
        rank r. AFTER_PAIRS numbers follow; the last, s, multiplies the logits by 1 + s."""
        sites = self.adapter_shapes()
        rank = flat_BP.size(1) // sum(map(sum, sites))
        shapes = [shape for R, D in sites for shape in ((rank, D), (R, rank))]
        *parts, _ = flat_BP.split([*map(math.prod, shapes), AFTER_PAIRS], 1)
        parts = [part.unflatten(1, shape) for part, shape in zip(parts, shapes)]
        return list(zip(parts[::2], parts[1::2]))

    def logits(self, tokens_BT, band=0, late=True, adapters=None, at_BN=None, segment=None):
        """Next-token logits [B,T,V] after the softcap, fp32; [B,N,V] at positions `at`.

        Position t sees tokens 0..t, or in each layer the last `band` keys. `late`: the passes
        are those after the switch to LATE_PASSES. `adapters` [B,P]: see adapter_pairs; B·A·u is
        added to the output of each site for its input u. `segment`: attention ends every so many
        tokens (a tensor: a number would be compiled in)."""
        pairs = () if adapters is None else self.adapter_pairs(adapters)
        x = x0 = self.embed(tokens_BT)
        values = self.ve(tokens_BT, x.dtype) if self.ve is not None else {}
        first_v, skips, lane, middle, rotary = None, [], None, None, (self.cos, self.sin)
        starts = tokens_BT == BOS if self.s.doc_attention else None
        if segment is not None:
            position = torch.arange(tokens_BT.size(1), device=tokens_BT.device)
            starts |= (position % segment == 0) & (position > 0)
        visible = self.kernels.visible(tokens_BT, band, starts)
        for i, p in enumerate(self.passes[late]):
            if i == len(self.passes[late]) // 2:
                middle = x
            if self.mixers and i == len(self.passes[late]) - 1:
                x = mixed = self.mixers[0](x, x0, middle, x)
            block, core = self.blocks[p.block], self.cores[p.core]
            to_attention, to_mlp = pairs[2 * i: 2 * i + 2] or (None, None)
            lane = x if p.form == "lanes" and lane is None else lane
            if p.skip is not None:
                skip = self.skip_weights[p.skip].to(x.dtype) * skips.pop()
                x = (x + skip if self.skip_gates is None else
                     torch.lerp(skip, x, torch.sigmoid(self.skip_gates[p.skip]).to(x.dtype)))
            mix = block.resid_mix.to(x.dtype)
            z = mix[0] * x + mix[1] * x0
            a, v = block.attention(z, core, first_v, to_attention, rotary, p.xsa,
                                   values.get(p.block), visible, starts)
            first_v = v if first_v is None else first_v
            if p.form == "lanes":
                m = block.mlp(lane, core, to_mlp)
                x, lane = (keep * old + of_a * a + of_m * m for old, (keep, of_a, of_m)
                           in zip((x, lane), self.lanes[p.block].to(x.dtype)))
            else:
                y = z + a
                x = y + block.mlp(z if p.form == "one" else y, core, to_mlp)
            if p.push:
                skips.append(x)
        x = x if lane is None else (x + lane) / 2
        x = rms_norm(self.mixers[1](x, x0, middle, mixed) if self.mixers else x)
        if at_BN is not None:
            x = x.gather(1, at_BN[..., None].expand(-1, -1, x.size(-1)))
        cap, raw = self.s.logit_softcap, adapted(linear(x, self.tok_emb), x, *pairs[-1:])
        logits = cap * torch.tanh(raw.float() / cap) if cap else raw.float()
        return logits if adapters is None else logits * (1 + adapters[:, -1:, None])

    def forward(self, tokens_BT, targets_BN, band=0, late=True, adapters=None, at_BN=None,
                segment=None):
        """nll of each target, nats, fp32: of all positions, N = T, or of positions `at`. What
        changes during a run is an argument, so that a compiler cannot fold it away."""
        logits = self.logits(tokens_BT, band, late, adapters, at_BN, segment).flatten(0, 1)
        return F.cross_entropy(logits, targets_BN.flatten(), reduction="none").view_as(targets_BN)


# -- kinds of parameters: one table says how each parameter is initialized, trained and stored

@dataclass(frozen=True)
class Kind:
    """How parameters whose names match are initialized, trained, stored, adapted. From `optimizer`
    on, each text names a setting; `optimizer` may also name a row of OPTIMIZERS."""
    kind: str
    pattern: str
    init: object      # "orthogonal", a standard deviation; None: the constructor's value
    optimizer: str
    lr: str
    decay: str
    bits: str         # "": always fp16
    clip: str         # factor of the root mean square with QUANT_CLIP=std
    calibrated: bool  # the Hessian of its inputs is recorded for GPTQ
    ttt_lr: str = ""  # factor of TTT_LR; "": 1


_MATRIX, _TABLE = ("muon", "matrix_lr", "muon_wd"), ("adamw", "tied_embed_lr", "embed_wd")
_SCALAR = ("adamw", "scalar_lr", "adam_wd")
_ATTN, _MLP = ("attn_bits", "attn_clip_sigmas"), ("mlp_bits", "mlp_clip_sigmas")
_EMBED, _PROJ = ("embed_bits", "embed_clip_sigmas"), ("proj_bits", "attn_clip_sigmas")
KINDS = (
    Kind("attn", r"cores\.\d+\.attn\.[qkv]", "orthogonal", *_MATRIX, *_ATTN, True),
    Kind("attn", r"cores\.\d+\.attn\.o", 0.0, *_MATRIX, *_ATTN, True),
    Kind("mlp", r"cores\.\d+\.mlp\.up", "orthogonal", *_MATRIX, *_MLP, True, "ttt_fc_lr_mult"),
    Kind("mlp", r"cores\.\d+\.mlp\.down", 0.0, *_MATRIX, *_MLP, True, "ttt_proj_lr_mult"),
    Kind("proj", r"(bigram|ve)\.proj", "orthogonal", "proj_optimizer", *_MATRIX[1:],
         *_PROJ, False),
    Kind("mix", r"mixers\.\d\.read", "orthogonal", *_MATRIX, *_PROJ, False),
    Kind("table", "tok_emb", 0.005, *_TABLE, *_EMBED, True),  # also the output head
    Kind("table", r"ve\.table", 0.01, *_TABLE, *_EMBED, False),
    Kind("hashed", r"bigram\.table", 0.0, *_TABLE, "bigram_bits", "embed_clip_sigmas", False),
    Kind("gate", r"cores\.\d+\.attn\.gate_weight", None, *_SCALAR, *_PROJ, False),
    Kind("control", r"cores\.\d+\.attn\.(q_gain|gate_bias)|mixers\.\d\.(write|bias)"
         r"|blocks\.\d+\.(attn_scale|mlp_scale|resid_mix|value_residual)"
         r"|smear|skip_weights|skip_gates|lanes|(bigram|ve)\.scale|ve\.block_scales",
         None, *_SCALAR, "", "", False),
)


@functools.cache
def kind_of(name):
    """The row of KINDS for a parameter. Raises LookupError unless exactly one row matches."""
    rows = [row for row in KINDS if re.fullmatch(row.pattern, name)]
    if len(rows) != 1:
        raise LookupError(f"{name}: {len(rows)} rows of KINDS match; a parameter needs one")
    return rows[0]


@torch.no_grad()
def init_weights(model, s):
    """Fill every parameter by its row of KINDS. Raises AssertionError where one stays empty."""
    for name, p in model.named_parameters():
        row = kind_of(name)
        if row.init == "orthogonal":  # × 1/√(2L) for projections under Muon (#414; not so in #549)
            small = row.kind == "proj" and s.proj_optimizer == "muon"
            nn.init.orthogonal_(p, gain=1 / math.sqrt(2 * s.num_layers) if small else 1.0)
        elif row.init is not None:
            p.normal_(std=row.init) if row.init else p.zero_()
        assert torch.isfinite(p).all(), f"{name} was left without an initial value"


def enough_memory(s):
    return explained(f"MODEL_DIM={s.model_dim}, BIGRAM_VOCAB_SIZE={s.bigram_vocab_size}: no memory "
                     "for such a model", "lower these or MLP_MULT", RuntimeError)


def build_model(s, rt):
    """(model with its initial weights on the device, equal on every rank; names of its kernels)."""
    names, kernels = choose_kernels(s, rt)
    torch.manual_seed(s.seed)
    with enough_memory(s):
        model = GPT(s, rt.dtype, kernels)
    init_weights(model, s)
    return model.to(rt.device), names


@functools.lru_cache(8)
def parameter_shapes(s):
    """{name: shape}, without allocating. Raises UserError where the settings make no model."""
    with enough_memory(s), torch.device("meta"):
        return {name: tuple(p.shape) for name, p in GPT(s).named_parameters()}


def parameter_counts(s):
    """{kind: parameters}."""
    counts = {row.kind: 0 for row in KINDS}
    for name, shape in parameter_shapes(s).items():
        counts[kind_of(name).kind] += math.prod(shape)
    return counts


# ---- 6. Optimizers ------------------------------------------------------------------------------

NEWTON_SCHULZ = {  # a triple (a, b, c) per iteration
    "classic": [(3.4445, -4.7750, 2.0315)] * 5,
    "polar": [(8.15655, -22.48329, 15.87877), (4.04293, -2.80892, 0.50002),  # Polar Express
              (3.89167, -2.77248, 0.50606), (3.28575, -2.36813, 0.46449),
              (2.34654, -1.70978, 0.42324)],
}


def newton_schulz(g_NRC, coefficients, dtype):
    """N matrices with the singular vectors of g and singular values near 1. An iteration is
    X ← aX + (bA + cA²)X, A = XXᵀ. A tall matrix is transposed first, so that A is small."""
    tall = g_NRC.size(1) > g_NRC.size(2)
    x = (g_NRC.mT if tall else g_NRC).to(dtype)
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon:
    """A group of matrices under Muon (Jordan et al. 2024): Nesterov momentum, orthogonalized.

    Matrices of one shape form a stack, padded to a multiple of the world size; a parameter with an
    attribute `part_rows` counts as several matrices of so many rows. Each rank sums the gradients
    of its part of a stack, updates its momentum, sends the directions."""
    sharded = True

    def __init__(self, params, lr, decay, s, rt):
        self.params, self.lr, self.decay, self.s, self.rt = params, lr, decay, s, rt
        self.orthogonalize = rt.compiled(functools.partial(
            newton_schulz, coefficients=NEWTON_SCHULZ[s.muon_coefficients], dtype=rt.dtype))
        self.stacks = {}  # {shape: [(parameter, slice of its rows)]}
        for p in params:
            height = getattr(p, "part_rows", len(p))
            for part in (slice(at, at + height) for at in range(0, len(p), height)):
                self.stacks.setdefault(p[part].shape, []).append((p, part))
        self.momenta = [torch.zeros(-(-len(stack) // rt.world_size), *shape,
                                    device=params[0].device)
                        for shape, stack in self.stacks.items()]

    def reduce(self):
        """Start to sum the gradients over ranks; returns a function that waits for this rank's part
        of the sums, tensors that may be scaled in place."""
        pending = []
        for stack in self.stacks.values():
            grads = [torch.zeros_like(p[part]) if p.grad is None else p.grad[part]
                     for p, part in stack]
            grads += [torch.zeros_like(grads[0])] * (-len(stack) % self.rt.world_size)
            pending.append(self.rt.reduce_scatter(torch.stack(grads)))
        return lambda: [wait().float() for wait in pending]

    def update(self, grads, lr_scale, momentum):
        """Update the momenta, start to gather the directions; returns a function to apply them."""
        pending = []
        for grad, buffer in zip(grads, self.momenta):
            buffer.mul_(momentum).add_(grad)
            direction = grad.add(buffer, alpha=momentum)
            if self.s.muon_row_norm:
                direction = direction / direction.norm(dim=-1, keepdim=True).clamp_min(1e-7)
            pending.append(self.rt.all_gather(self.orthogonalize(direction)))
        return lambda: self.apply(pending, lr_scale)

    def apply(self, pending, lr_scale):
        """Decay the weights and subtract lr·√max(1, rows/columns) times the directions. Cautious:
        about half of the weights agree in sign with their direction, hence the factor 2."""
        step_size = self.lr * lr_scale
        decay = step_size * self.decay
        if not self.s.cautious_wd:
            torch._foreach_mul_(self.params, 1 - decay)
        for ((rows, columns), stack), wait in zip(self.stacks.items(), pending):
            weights, directions = [p[part] for p, part in stack], wait().float()[: len(stack)]
            if self.s.cautious_wd and decay:
                agreeing = torch.stack(weights)
                agreeing *= agreeing * directions > 0
                torch._foreach_add_(weights, agreeing.unbind(), alpha=-2 * lr_scale * decay)
            torch._foreach_add_(weights, directions.unbind(),
                                alpha=-step_size * math.sqrt(max(1, rows / columns)))

    def state(self):
        """The momenta of all ranks, [n, R, C] each; a collective."""
        return [self.rt.all_gather(momentum)()[: len(stack)]
                for momentum, stack in zip(self.momenta, self.stacks.values())]

    def load(self, state):
        """Take this rank's part of `state`, whatever number of ranks wrote it."""
        for momentum, full in zip(self.momenta, state, strict=True):
            mine = full[len(momentum) * self.rt.rank:][: len(momentum)]
            momentum[: len(mine)] = mine  # the rest is padding, always 0


TTT_MOMENTUM = 0.9  # of SGD, and of Muon at test time


class TorchGroup:
    """A group of parameters under AdamW or SGD of torch. Every rank updates all of it."""
    sharded = False

    def __init__(self, params, lr, decay, s, rt, sgd=False):
        self.params, self.lr, self.rt = params, lr, rt
        self.optimizer = (
            torch.optim.SGD(params, lr, momentum=TTT_MOMENTUM, weight_decay=decay) if sgd else
            torch.optim.AdamW(params, lr, (0.9, s.beta2), weight_decay=decay, fused=True))
        self.state, self.load = self.optimizer.state_dict, self.optimizer.load_state_dict

    def reduce(self):
        grads = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self.params]
        wait = self.rt.sum_later(torch.cat(grads))
        return lambda: [g.view_as(p) for p, g in zip(
            self.params, wait().split([p.numel() for p in self.params]))]

    def update(self, grads, lr_scale, momentum):
        for p, grad in zip(self.params, grads):
            p.grad = grad
        self.optimizer.param_groups[0]["lr"] = self.lr * lr_scale
        self.optimizer.step()
        return lambda: None  # the step is complete


OPTIMIZERS = {"muon": Muon, "adamw": TorchGroup, "sgd": functools.partial(TorchGroup, sgd=True)}


class Optimizers:
    """Groups of parameters, each with its optimizer, under one clipping of the global norm."""

    def __init__(self, groups, clip_norm, rt):
        self.clip_norm, self.rt = clip_norm, rt
        # Muon first: AdamW computes during its all-gather
        self.groups = sorted(groups, key=lambda group: not group.sharded)
        self.params = [p for group in groups for p in group.params]
        assert len({id(p) for p in self.params}) == len(self.params), "a parameter in two groups"

    @torch.no_grad()
    def step(self, lr_scale, momentum):
        """Sum over ranks, all sums in flight at once; clip, update, drop the gradients. Returns the
        global norm (a tensor)."""
        grads = [wait() for wait in [group.reduce() for group in self.groups]]
        squares = torch.zeros(2, device=self.params[0].device)  # [not sharded, sharded]
        for group, parts in zip(self.groups, grads):
            squares[int(group.sharded)] += torch.stack(torch._foreach_norm(parts)).square().sum()
        norm = (self.rt.sum_(squares[1]) + squares[0]).sqrt()
        if self.clip_norm:
            factor = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([g for parts in grads for g in parts], factor)
        for finish in [group.update(parts, lr_scale, momentum)
                       for group, parts in zip(self.groups, grads)]:
            finish()
        for p in self.params:
            p.grad = None
        return norm


def training_optimizers(model, s, rt):
    """The optimizers that KINDS names, a group for each optimizer, rate and decay."""
    groups = {}
    for name, p in model.named_parameters():
        row = kind_of(name)
        decay = getattr(s, row.decay)
        decay = s.adam_wd if decay < 0 else decay
        key = getattr(s, row.optimizer, row.optimizer), getattr(s, row.lr), decay
        groups.setdefault(key, []).append(p)
    return Optimizers([OPTIMIZERS[optimizer](params, lr, decay, s, rt)
                       for (optimizer, lr, decay), params in groups.items()],
                      s.grad_clip_norm, rt)


# ---- 7. Schedules: pure functions of the step and the training clock ----------------------------

def progress_of(s, step, elapsed_ms):
    """Completed fraction of the run, by ITERATIONS or by the clock, whichever is larger."""
    by_clock = elapsed_ms / 1000 / s.max_wallclock_seconds if s.max_wallclock_seconds else 0.0
    return max(step / s.iterations if s.iterations else 0.0, by_clock)


def warmdown_left(s, step, elapsed_ms):
    """1, then a linear decay to 0 over the last WARMDOWN_FRAC of the run or WARMDOWN_ITERS steps.

    The end is ITERATIONS or the cap of the clock, whichever is nearer at the pace so far."""
    if s.warmdown_frac:
        return min(1.0, max(0.0, 1 - progress_of(s, step, elapsed_ms)) / s.warmdown_frac)
    end = s.iterations or math.inf  # in steps
    if s.max_wallclock_seconds and step:
        end = min(end, 1000 * s.max_wallclock_seconds / elapsed_ms * step)
    warmdown = min(s.warmdown_iters, end)
    return min(1.0, max(0.0, end - step) / warmdown) if warmdown else 1.0


def lr_scale(s, step, elapsed_ms):
    """Fraction of the full learning rate: the warmdown's, decaying to LR_FLOOR instead of 0."""
    return s.lr_floor + (1 - s.lr_floor) * warmdown_left(s, step, elapsed_ms)


def muon_momentum(s, step):
    """Linear from MUON_MOMENTUM_WARMUP_START to MUON_MOMENTUM."""
    warm = min(step / s.muon_momentum_warmup_steps, 1.0) if s.muon_momentum_warmup_steps else 1.0
    return (1 - warm) * s.muon_momentum_warmup_start + warm * s.muon_momentum


def segment_tokens(s, step, elapsed_ms):
    """Tokens of a segment at this step; after the end of SEGMENT_SCHEDULE, those of a row."""
    done = progress_of(s, step, elapsed_ms)
    return next((tokens for tokens, until in s.segments if done < until), s.train_seq_len)


def out_of_time(s, step, elapsed_ms, step_ms=0.0, steps=1):
    """True if `steps` more steps would end after the clock's cap. Each is assumed to take the mean
    of all so far, or `step_ms` if that is more: late passes are slower."""
    step_ms = max(step_ms, elapsed_ms / max(step, 1))
    return bool(s.max_wallclock_seconds and step
                and elapsed_ms + steps * step_ms > 1000 * s.max_wallclock_seconds)


# ---- 8. Weight averaging ------------------------------------------------------------------------

class WeightAverage:
    """EMA and SWA of the parameters, fp32.

    An EMA of fixed decay d is bias-corrected: Σ d^(n−i)·wᵢ / Σ d^(n−i). With EMA_DECAY=0 step n
    mixes in a fraction 21/(n + 20) of the newest weights. The average then spans the last 1/21 of
    any run, as a decay of 0.997 does in the 7,000 steps that it was tuned for.
    Without SWA the model then gets 0.6 of it and 0.4 of the last weights, since an average lags
    behind (nanogpt speedrun, track 3; −0.0012 to −0.0019 at 400 steps of 4 × 128, six runs)."""

    def __init__(self, model, s):
        self.s, self.params = s, [p.detach() for p in model.parameters()]
        self.ema, self.swa, self.snapshots = None, None, 0

    def update(self, step, left):
        """`step` counts from 1; `left`: fraction of the warmdown. True at SWA's first snapshot."""
        params, d = self.params, self.s.ema_decay
        if self.s.ema_enabled:
            self.ema = self.ema or [torch.zeros_like(p) for p in params]
            fraction = (1 - d) / (1 - d ** step) if d else 21 / (step + 20)
            torch._foreach_lerp_(self.ema, params, fraction)
        if self.s.swa_enabled and left < 0.2 and step % self.s.swa_every == 0:
            self.swa = self.swa or [torch.zeros_like(p) for p in params]
            self.snapshots += 1
            torch._foreach_lerp_(self.swa, params, 1 / self.snapshots)
            return self.snapshots == 1
        return False

    def apply(self):
        """Give the model its averaged weights; returns "EMA", "SWA", "EMA and SWA", or ""."""
        averages = {name: ws for name, ws in (("EMA", self.ema), ("SWA", self.swa)) if ws}
        blend = 0.6 if self.ema and not self.swa and not self.s.ema_decay else 1.0
        for p, *values in zip(self.params, *averages.values()):
            if values:
                p.lerp_(torch.stack(values).mean(0), blend)
        return " and ".join(averages)


# ---- 9. Quantizer: weights → finest scales → scales at a level → codes, and back ----------------
#
# One number, the level, decides the file's size; `pack` finds the lowest that fits. The scale of a
# row of weights is the larger of its finest scale (clip / largest code) and level × tolerance.
# Codes are weights / scales, rounded or coded in a trellis; they take about their entropy.

def diverged(what, s):
    return UserError(f"{what}; training diverged: lower MATRIX_LR={s.matrix_lr}, SCALAR_LR="
                     f"{s.scalar_lr} or TIED_EMBED_LR={s.tied_embed_lr}; earlier checkpoints are "
                     "kept")


def bits_of(name, s):
    """Bits of a parameter in the artifact: its kind's, unless its name is kept as fp16."""
    keep = filter(None, map(str.strip, s.fp16_keep_name_patterns.split(",")))
    bits = kind_of(name).bits
    return getattr(s, bits) if bits and not any(part in name for part in keep) else 16


def code_limit(bits):
    return 2 ** (bits - 1) - 1


def as_fp16(x):
    """x rounded to fp16, at most 65504; returned as fp32."""
    return x.clamp(max=65504.0).half().float()


def to_codes(w_RC, scales_R, bits):
    """Integer codes of w at these scales, clamped to ±(2^(bits−1)−1); scale 0: all zero."""
    inverse, limit = scales_R.reciprocal().nan_to_num(posinf=0.0), code_limit(bits)
    return (w_RC * inverse[:, None]).round().clamp(-limit, limit).to(torch.int8)


def int6(w_RC):
    """w rounded to int6, one scale per row, from its maximum."""
    scales_R = as_fp16(w_RC.abs().amax(1) / code_limit(6))
    return to_codes(w_RC, scales_R, 6) * scales_R[:, None]


def finest_scales(w_RC, bits, s, deviations=0.0):
    """Finest scale of each row [R], fp16: its clip over the largest code.

    max: the maximum; row: the quantile of |w| with the least squared error (GPTQ-lite); std: a
    multiple of the root mean square (SDClip, #1394)."""
    if s.quant_clip == "std":
        clips = deviations * w_RC.square().mean(1).sqrt()[None]
    elif s.quant_clip == "max":
        clips = w_RC.abs().amax(1)[None]
    else:
        quantiles = w_RC.new_tensor((0.999, 0.9995, 0.9999, 0.99999, 1.0))
        clips = torch.quantile(w_RC.abs(), quantiles, dim=1)
    floor = s.quant_step_floor if bits < 8 else 0.0
    candidates = as_fp16((clips / code_limit(bits)).clamp_min(floor))
    errors = torch.stack([(w_RC - to_codes(w_RC, scales, bits) * scales[:, None]).square().sum(1)
                          for scales in candidates])
    return candidates.gather(0, errors.argmin(0)[None])[0]


def tolerances(row_energy, column_energy):
    """Tolerances of rows [R] and factors of columns [C]. Let g be the mean squared gradient of a
    row or column (see Calibration), ḡ the mean of g, and r = (g/ḡ + 0.001)^(−1/4) divided by its
    geometric mean. The factor of a column is r, the tolerance of a row r/√ḡ.

    The power −1/2 of g/ḡ would make the cost of errors equal everywhere; −1/4 had the lowest loss
    on a model of 2 M weights. Values are powers of 2^(1/4): few distinct ones take few bytes."""
    mean = row_energy.mean().clamp_min(1e-30)  # the same for rows and columns
    logs = [-(energy / mean + 1e-3).log2() for energy in (row_energy, column_energy)]
    rows, columns = (x - x.mean() for x in logs)  # 4·log₂ r
    rows = torch.exp2((rows - 2 * mean.log2()).round() / 4)
    return rows, as_fp16(torch.exp2(columns.round() / 4))


def compensation(hessian_CC, s):
    """(order of columns, shifts [C, C], costs of errors [C]), fp32; hessian: Σ xxᵀ of inputs.

    With H = VVᵀ, V upper triangular (Cholesky of the reversed matrix), errors e of a row cost
    |eV|². After errors in the columns before j, the best shift of column j is Σᵢ eᵢVᵢⱼ/Vⱼⱼ (LDLQ,
    Chee et al. 2023; it gives the codes of GPTQ)."""
    ranked = s.gptq_act_order * hessian_CC.diagonal()  # without GPTQ_ACT_ORDER the order stays
    order = ranked.argsort(descending=True, stable=True)
    hessian = hessian_CC.double()[order][:, order]
    diagonal, damp = hessian.diagonal(), 0.01 * hessian.diagonal().mean()  # diagonal is a view
    diagonal += diagonal == 0  # inputs that are always 0
    failed = True
    while failed:  # not positive definite: few calibration rows
        diagonal += damp
        factor, failed = torch.linalg.cholesky_ex(
            hessian.flip(0, 1), check_errors=not torch.isfinite(damp))
        damp *= 10
    factor = factor.flip(0, 1).mT  # Vᵀ
    pivots = factor.diagonal()
    return order, (factor / pivots[:, None]).float(), pivots.square().float()


# Trellis-coded quantization (Marcellin, Fischer 1990). Let u_j = (code_j + u_{j−4}) mod 2, and 0
# before the first column. If u_{j−1} + u_{j−2} + u_{j−3} is odd, code_j stands for code_j + ¼, else
# for −(code_j + ¼). So the codes before choose one of two grids, n + ¼ or n − ¼. The best path
# through the 16 states (u_{j−4}, ..., u_{j−1}) has a fifth less squared error than rounding at the
# same entropy, from 1.1 bits up. Due to the sign, the codes of both grids have one distribution,
# which saves 0.006 bits a code at 3.5 bits and 0.13 at 1.2.
#
# TRELLIS[u_{j−4}, u_{j−3} u_{j−2} u_{j−1} as a binary number, u_j]: the fractional part of code j's
# value, in units of two scales. 0 or ½: even or odd codes; ±⅛: the ±¼ of the grid.
TRELLIS = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])[:, None] / 4 - 0.125 + torch.tensor(
    [[[0.0, 0.5]], [[0.5, 0.0]]])


def trellis_signs(codes_RC):
    """The sign, ±1, that a trellis gives each code, int8. Negated codes have the same signs."""
    odd = F.pad((codes_RC & 1).byte(), (4, -codes_RC.size(1) % 4)).unflatten(1, (-1, 4))
    u = odd.cumsum(1, dtype=torch.uint8).flatten(1)  # modulo 256
    return 2 * ((u[:, 1:-3] + u[:, 2:-2] + u[:, 3:-1])[:, : codes_RC.size(1)] & 1).char() - 1


def trellis_values(codes_RC):
    """What codes of a trellis stand for, in scales."""
    return trellis_signs(codes_RC) * (codes_RC + 0.25)


def viterbi_step(paths_nPMR, longer, cost, worse, error):
    """The cost of each state after a column that adds `worse`. `longer`, [n + 1, P, M, R], gets the
    errors of the cheaper path into each state: those of `paths`, then of this column."""
    n, P, M, R = paths_nPMR.shape
    total = cost.view(P, M, 1, R) + worse
    from_0 = total[0] <= total[1]
    torch.where(from_0, paths_nPMR[:, 0, :, None], paths_nPMR[:, 1, :, None],
                out=longer[:n].view(n, M, P, R))
    torch.where(from_0, error[0], error[1], out=longer[n].view(M, P, R))
    return torch.minimum(total[0], total[1])


def gptq_codes(w_RC, scales_R, bits, order, shifts_CC, costs_C, trellis=False):
    """Codes with error compensation: later columns make up for the errors of earlier ones (GPTQ,
    Frantar et al. 2022). trellis: a Viterbi search. Of the paths into each state only the cheapest
    is kept, with its own errors; after each block only the cheapest of all. On a GPU the products
    are TF32."""
    grid = (TRELLIS if trellis else torch.zeros(1, 1, 1)).to(w_RC.device)[..., None]
    # P·M states: P values of u_{j−4}, M of the three after it; u_j has P values, too. Weights are
    # in units of P scales. Without a trellis P = M = 1.
    P, M, R, block = *grid.shape[:2], len(w_RC), 64
    w_CR = (w_RC / (P * scales_R[:, None])).nan_to_num(0.0, 0.0, 0.0).T[order]  # scale 0: 0
    w_CR.clamp_(-2.0 ** 16, 2.0 ** 16)  # clipped weights may be huge; w − error must be exact
    high = torch.full_like(grid, code_limit(bits) // P)
    low = -high - (grid > 0.25).float()  # odd codes are 2·near + 1
    errors = torch.empty_like(w_CR)
    paths, other = w_CR.new_empty(2, block, P, M, R)  # errors of each state's path
    cost = w_CR.new_full((P * M, R), math.inf)
    cost[0] = 0.0
    for begin in range(0, len(w_CR), block):
        part = slice(begin, begin + block)
        shifted = w_CR[part] + shifts_CC[part, :begin] @ errors[:begin]
        for j, column in enumerate(shifted):
            shift = torch.tensordot(shifts_CC[begin + j, begin: begin + j], paths[:j], 1)
            off = (column + shift)[:, :, None] - grid
            near = off.clamp(low, high).round()
            error = w_CR[begin + j] - (near + grid)
            if trellis:
                # above 1 only if clipped, then on every path
                worse = costs_C[begin + j] * (off - near).clamp(-1.0, 1.0).square()
                cost = viterbi_step(paths[:j], other[: j + 1], cost, worse, error)
                paths, other = other, paths
            else:
                paths[j] = error[:, 0]
        n = len(shifted)
        best = cost.view(P * M, R).argmin(0, keepdim=True)
        errors[part] = paths[:n].flatten(1, 2).gather(1, best.expand(n, 1, R))[:, 0]
        cost = torch.full_like(cost.view(P * M, R), math.inf).scatter(0, best, 0.0)
    codes = ((P * (w_CR - errors)).round() * (scales_R != 0)).to(torch.int8)[order.argsort()].T
    return codes * trellis_signs(codes) if trellis else codes


class HessianRecorder(torch.overrides.TorchFunctionMode):
    """Σ xxᵀ over the inputs x of each calibrated matrix while the model runs eagerly inside this
    context. It follows each weight through .to(), mul and cat, so the forward needs no hooks."""

    def __init__(self, model):
        super().__init__()
        self.sums, self.names = {}, WeakTensorKeyDictionary(
            {p: [name] for name, p in model.named_parameters() if kind_of(name).calibrated})

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.Tensor.to, torch.Tensor.mul, torch.cat):
            sources = args[0] if func is torch.cat else args[:1]
            if names := [name for w in sources for name in self.names.get(w, [])]:
                self.names[out] = names
        elif func is F.linear and (names := self.names.get(args[1])):
            x = args[0].detach().flatten(0, -2).float()
            products = x.mT @ x
            for name in names:
                self.sums[name] = self.sums.get(name, 0) + products
        return out


@dataclass
class Calibration:
    """Statistics of training tokens. hessians: Σ xxᵀ [C, C] over the inputs x of each matrix.
    energies: for each matrix or table the squared gradients of micro-batches, averaged over each
    row [R] and each column [C], and summed. They estimate what an error costs (a factored empirical
    Fisher information)."""
    hessians: dict
    energies: dict


def calibrate(model, batches_of_rows, rt):
    """Calibration on rows of tokens, int [n, T + 1], summed over ranks. Leaves no gradients."""
    recorder, energies = HessianRecorder(model), {}
    for rows in batches_of_rows:
        with recorder:
            nll = model(rows[:, :-1].long(), rows[:, 1:].long())
        nll.sum().backward()
        for name, p in model.named_parameters():
            if kind_of(name).bits:
                grad = p.grad.float() * getattr(p, "blocks", 1)  # undo the hook's mean
                square, (by_row, by_column) = grad.square(), energies.get(name, (0, 0))
                energies[name] = by_row + square.mean(1), by_column + square.mean(0)
            p.grad = None
    missing = [name for name, _ in model.named_parameters()
               if kind_of(name).calibrated and name not in recorder.sums]
    assert not missing, f"no Hessian for {missing}"
    found = Calibration({name: rt.sum_(total) for name, total in recorder.sums.items()},
                        {name: tuple(rt.sum_(e) for e in pair) for name, pair in energies.items()})
    sums = [*found.hessians.values(), *itertools.chain(*found.energies.values())]
    if not all(torch.isfinite(x).all() for x in sums):
        raise diverged("calibration: activations or gradients are not finite", model.s)
    return found


@dataclass
class Quantized:
    """A tensor as stored: int8 codes [R, C] with scales [R] and column factors [C], in a trellis or
    not; or, with 16 bits, its fp16 values as codes."""
    bits: int
    codes: Tensor
    scales: Tensor | None = None
    columns: Tensor | None = None
    trellis: bool = False

    def weights(self):
        """The fp32 tensor that the file stands for."""
        w = trellis_values(self.codes) if self.trellis else self.codes.float()
        return w if self.bits == 16 else w * self.scales[:, None] * self.columns


@dataclass
class Prepared:
    """A matrix ready for any level: w [R, C], its weights over the column factors, and what does
    not depend on the level."""
    bits: int
    w: Tensor
    finest: Tensor      # scales [R] at level 0
    tolerances: Tensor  # [R]
    columns: Tensor     # factors [C]
    compensation: tuple | None  # what compensation() returned; None: rounding only

    def at(self, level, compensate, trellis):
        """The Quantized of a level. A trellis needs `compensate`."""
        w, scales = self.w, as_fp16(torch.maximum(self.finest, level * self.tolerances))
        if compensate and self.compensation:
            most = 1024 if w.device.type == "cpu" else max(len(w), 1)  # rows that fit caches
            codes = torch.cat([gptq_codes(*rows, self.bits, *self.compensation, trellis)
                               for rows in zip(w.split(most), scales.split(most))])
        else:
            codes = to_codes(w, scales, self.bits)
        if trellis:  # it has no zeros: a row that is nearer to 0 than to its codes becomes 0
            errors = w - trellis_values(codes) * scales[:, None]
            kept = errors.square().sum(1) < w.square().sum(1)
            codes, scales = codes * kept[:, None], scales * kept
        else:
            codes *= w != 0  # pruned: 0
        return Quantized(self.bits, codes.cpu(), scales.cpu(), self.columns.cpu(), trellis)


class Quantizer:
    """Quantizes all tensors at a level; level 0 gives every row its finest scale.

    QUANT_FIT=scale: tolerances are the finest scales; level, trellis: 1, or those of tolerances()
    where there is a Calibration. Raises UserError where a weight is not finite or too large."""

    def __init__(self, state, s, calibration=None):
        self.s, self.fp16, self.matrices = s, {}, {}
        for name, w in state.items():
            w, bits = w.detach().float(), bits_of(name, s)
            if not torch.isfinite(w).all() or (bits == 16 and w.abs().max() > 65504):
                raise diverged(f"{name} holds {float(w.abs().max())}: cannot be stored", s)
            if bits == 16:
                self.fp16[name] = Quantized(bits, w.half().cpu())
                continue
            if dropped := int(s.prune_frac * w.numel()):
                w = w * (w.abs() > w.abs().flatten().kthvalue(dropped).values)
            rows, columns = w.new_ones(w.size(0)), w.new_ones(w.size(1))
            if calibration and s.quant_fit != "scale":
                rows, columns = tolerances(*calibration.energies[name])
            w = w / columns
            finest = finest_scales(w, bits, s, getattr(s, kind_of(name).clip))
            rows = finest if s.quant_fit == "scale" else rows
            hessian = calibration.hessians.get(name) if calibration else None
            if hessian is None and s.quant_fit == "trellis":
                hessian = torch.eye(len(columns), device=w.device)  # all errors cost the same
            self.matrices[name] = Prepared(
                bits, w, finest, rows, columns, None if hessian is None else compensation(
                    hessian * columns * columns[:, None], s))

    def at(self, level, compensate=True):
        """{name: Quantized} at a level. compensate=False: plain rounding, no GPTQ or trellis."""
        trellis = compensate and self.s.quant_fit == "trellis"
        # A thread for each matrix: PyTorch's own do not help with arrays as small as those of
        # gptq_codes. A GPU computes one matrix after the other in any case.
        on_cpu = all(matrix.w.device.type == "cpu" for matrix in self.matrices.values())
        with ThreadPoolExecutor(torch.get_num_threads(), "", torch.set_num_threads, (1,)) as pool:
            found = (pool.map if on_cpu else map)(
                lambda matrix: matrix.at(level, compensate, trellis), self.matrices.values())
            return {**self.fp16, **dict(zip(self.matrices, found))}


# ---- 10. Artifact: codes → bytes → file, and back; data only, nothing in it is executed ---------
#
# magic | header length, u32 | header, JSON | side, lzma | codes | SHA-256 of all before. "side" is
# side information: an index (JSON: settings, tensors), then scales and fp16 arrays. The codes are
# those of every quantized tensor, tensors of equal bits together.

ARTIFACT_MAGIC = b"PGOLF\x00\x00\x02"  # the last byte is the version
MOST_INDEX_BYTES = 1 << 20  # of the JSON that is parsed, which takes 20 times as much memory
# Codes hold no matches worth a search: less search and no literal context pack smaller and faster.
LZMA_FILTERS = [dict(id=lzma.FILTER_LZMA2, lc=0, lp=0, pb=0, mode=lzma.MODE_NORMAL,
                     mf=lzma.MF_BT4, nice_len=64, depth=1, dict_size=1 << 16)]
# Settings that are not stored: those of files, of this machine and of this run, except the seed.
NOT_STORED = {"data_path", "tokenizer_path", "val_limit_tokens"} | {
    name for name, (section, _) in DESCRIBED.items() if section == "Run" and name != "seed"}

# Settings that decide what training makes: a resumed run and EVAL_ONLY must have the same.
OF_TRAINING = [name for name, (section, _) in DESCRIBED.items() if section != "Evaluation"
               and name not in NOT_STORED | {"micro_batch_tokens", "train_log_every",
                                             "val_loss_every", "warmup_steps"}]


# rANS (Duda 2013): a state below 2³² holds what was coded; a code of frequency f/2¹⁵ adds
# 15 − log₂ f bits; 16 bits at a time move to the file. 512 interleaved states vectorize in numpy.
# Frequencies are counted by context: 4·log₂ of the magnitude of the code's row plus that of its
# column. Rows and columns of trained weights differ so much that this takes 5 % less than the
# order-0 entropy of the tensors. 48 contexts span a factor of 2¹²; 8-bit codes need fewer.
RANS_STATES, RANS_BITS, CONTEXTS, SYMBOLS = 512, 15, 48, 256


def log_magnitudes(codes_RC):
    """4·log₂ + 16 of the root mean square of each row of codes, uint8 [R]; the same of each column,
    after each row is divided by its root mean square, uint8 [C]."""
    q, least = codes_RC.astype(np.float32), 2.0 ** -4
    rows = np.maximum(np.sqrt(np.square(q).sum(1) / max(q.shape[1], 1)), least)
    columns = np.sqrt(np.square(q / rows[:, None]).sum(0) / max(q.shape[0], 1))
    return [np.rint(4 * np.log2(np.maximum(x, least)) + 16).astype(np.uint8)
            for x in (rows, columns)]


def contexts_of(magnitudes):
    """Context of every code, uint8 [n], from magnitudes [rows, columns, rows, columns, ...]."""
    sums = (rows[:, None].astype(np.int16) + columns - 16
            for rows, columns in zip(magnitudes[::2], magnitudes[1::2]))
    contexts = (total.clip(0, CONTEXTS - 1).astype(np.uint8).tobytes() for total in sums)
    return np.frombuffer(b"".join(contexts), np.uint8)


def frequencies(counts):
    """Counts [CONTEXTS, SYMBOLS] scaled to uint16, 2¹⁵ in a row; at least 1 for what occurs."""
    total = np.maximum(counts.sum(1, keepdims=True), 1)
    out = np.maximum(np.rint(counts * (1 << RANS_BITS) / total), counts > 0).astype(np.int64)
    out[np.arange(len(out)), out.argmax(1)] += (1 << RANS_BITS) - out.sum(1)
    return out.astype(np.uint16)


def rans_tables(frequency):
    """(frequency, start) of every (context, symbol), flat uint32. Raises ValueError."""
    if (frequency.sum(1, dtype=np.int64) != 1 << RANS_BITS).any():
        raise ValueError("frequencies that do not sum to one")
    wide = frequency.astype(np.uint32)
    return wide.ravel(), (np.cumsum(wide, 1, dtype=np.uint32) - wide).ravel()


def rans_encode(symbols, contexts, frequency):
    """Bytes of symbols (uint8 [n]) under contexts (uint8 [n]); symbol i goes to state i mod 512."""
    entries = contexts.astype(np.uint16) * SYMBOLS + symbols
    frequency, start = (t.astype(np.uint16)[entries] for t in rans_tables(frequency))
    state, words = np.full(RANS_STATES, 1 << 16, np.uint32), []
    for at in reversed(range(0, len(symbols), RANS_STATES)):  # the decoder goes forwards
        part = slice(at, at + RANS_STATES)
        f, x = frequency[part], state[: len(symbols) - at]
        full = np.flatnonzero(x >> np.uint32(32 - RANS_BITS) >= f)
        words.append(x[full].astype("<u2"))  # the low 16 bits
        x[full] >>= np.uint32(16)
        x += x // f * (np.uint32(1 << RANS_BITS) - f) + start[part]
    return state.astype("<u4").tobytes() + b"".join(w.tobytes() for w in reversed(words))


def rans_decode(data, contexts, frequency):
    """The symbols, uint8 [n]. Raises ValueError on anything that rans_encode did not write."""
    flat_frequency, flat_start = rans_tables(frequency)
    symbol_at = np.repeat(np.tile(np.arange(SYMBOLS, dtype=np.uint8), CONTEXTS), flat_frequency)
    state = np.frombuffer(data, "<u4", RANS_STATES).copy()
    words, used = np.frombuffer(data, "<u2", offset=4 * RANS_STATES), 0
    symbols = np.empty(len(contexts), np.uint8)
    for at in range(0, len(contexts), RANS_STATES):
        context = contexts[at: at + RANS_STATES].astype(np.int32)
        x = state[: len(context)]
        slot = x & np.uint32((1 << RANS_BITS) - 1)
        found = symbols[at: at + RANS_STATES] = symbol_at[(context << RANS_BITS) + slot]
        entry = context * SYMBOLS + found
        x[:] = flat_frequency[entry] * (x >> np.uint32(RANS_BITS)) + slot - flat_start[entry]
        low = np.flatnonzero(x < 1 << 16)
        x[low] = x[low] << np.uint32(16) | words[used: used + len(low)]
        used += len(low)
    if used != len(words) or (state != 1 << 16).any():
        raise ValueError("codes that do not end where they should")
    return symbols


# A codec is a pair. Encode: (symbols uint8 [n], their matrices [R, C]) → bytes. Decode: (bytes, n,
# shapes of the matrices) → n symbols, or n + 1, which the caller refuses, if the bytes hold more;
# raises on bad bytes.

def squeeze(data, matrices=()):
    return lzma.compress(data, lzma.FORMAT_RAW, filters=LZMA_FILTERS)


def unsqueeze(data, size, shapes=()):
    reader = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=LZMA_FILTERS)
    return reader.decompress(data, max_length=size + 1)


def unzstd(data, size, shapes):
    if not zstandard:
        raise ValueError("its codec is zstd: pip install zstandard")
    limited = zstandard.ZstdDecompressor(max_window_size=1 << 27)
    return limited.stream_reader(io.BytesIO(data)).read(size + 1)


def rans(symbols, matrices):
    magnitudes = [x for matrix in matrices for x in log_magnitudes(matrix)]
    contexts = contexts_of(magnitudes)
    counts = np.bincount(contexts * np.intp(SYMBOLS) + symbols, minlength=CONTEXTS * SYMBOLS)
    frequency = frequencies(counts.reshape(CONTEXTS, SYMBOLS))
    tables = squeeze(b"".join(x.tobytes() for x in (frequency.astype("<u2").T, *magnitudes)))
    return struct.pack("<I", len(tables)) + tables + rans_encode(symbols, contexts, frequency)


def unrans(data, size, shapes):
    length, = struct.unpack_from("<I", data)
    ends = 2 * CONTEXTS * SYMBOLS + np.cumsum([0, *(n for shape in shapes for n in shape)])
    tables = np.frombuffer(unsqueeze(data[4: 4 + length], int(ends[-1])), np.uint8)
    frequency, *magnitudes = np.split(tables, ends)
    frequency = frequency.view("<u2").reshape(SYMBOLS, CONTEXTS).T
    return rans_decode(data[4 + length:], contexts_of(magnitudes), frequency)


CODECS = {"rans": (rans, unrans), "lzma": (squeeze, unsqueeze), "zstd": (
    lambda symbols, matrices: zstandard.ZstdCompressor(level=22).compress(symbols), unzstd)}


def compact_json(**values):
    return json.dumps(values, separators=(",", ":")).encode()


def encode_artifact(tensors, s, note=""):
    """The file's bytes from {name: Quantized}; `note` says how the scales were fitted.

    Scales and column factors are stored as indices into the table of their distinct values."""
    order = sorted(tensors, key=lambda name: tensors[name].bits)
    coded = [tensors[name] for name in order if tensors[name].bits < 16]
    factors = [x.half().numpy().tobytes() for t in coded for x in (t.scales, t.columns)]
    distinct, refs = np.unique(np.frombuffer(b"".join(factors), np.uint16), return_inverse=True)
    halves = [tensors[n].codes.numpy().tobytes() for n in order if tensors[n].bits == 16]
    halves = np.frombuffer(b"".join(halves), np.uint16)
    stored = {f.name: getattr(s, f.name) for f in fields(s) if f.name not in NOT_STORED}
    described = [[n, tensors[n].bits, tuple(tensors[n].codes.shape)] for n in order]
    trellis, = {t.trellis for t in coded} or {False}  # all agree, or this raises
    index = compact_json(settings=stored, note=note, tensors=described, distinct=len(distinct),
                         trellis=trellis and "signed")
    # all low bytes, then all high bytes: high bytes are alike, so they compress better together
    side = index + b"".join(values.astype("<u2").view(np.uint8).reshape(-1, 2).T.tobytes()
                            for values in (distinct, refs, halves))
    squeezed, matrices = squeeze(side), [t.codes.numpy() for t in coded]
    symbols = np.frombuffer(b"".join(codes.tobytes() for codes in matrices), np.uint8) ^ 0x80
    header = compact_json(codec=s.codec, index_bytes=len(index), side_bytes=len(side),
                          squeezed_bytes=len(squeezed))
    content = (ARTIFACT_MAGIC + struct.pack("<I", len(header)) + header + squeezed
               + CODECS[s.codec][0](symbols, matrices))
    return content + hashlib.sha256(content).digest()


def most_in(content):
    """The most weights, or bytes of the side, that a file may claim before they are allocated. A
    small file may be of a sparse model."""
    return 64 * max(len(content), 1 << 18)


def open_artifact(content):
    """(header, index, the side after the index, bytes of the codes) of a file's content. Raises
    ValueError and the like."""
    start = len(ARTIFACT_MAGIC) + 4
    if not content.startswith(ARTIFACT_MAGIC):
        raise ValueError(f"{len(content)} bytes beginning with {content[:8]!r}")
    if hashlib.sha256(content[:-32]).digest() != content[-32:]:
        raise ValueError("the checksum does not match")
    header_bytes, = struct.unpack_from("<I", content, start - 4)
    header, start = json.loads(content[start: start + header_bytes]), start + header_bytes
    index_bytes, side_bytes, squeezed_bytes = (
        int(header[k]) for k in ("index_bytes", "side_bytes", "squeezed_bytes"))
    if not (0 <= index_bytes <= min(side_bytes, MOST_INDEX_BYTES)
            and side_bytes <= most_in(content)):
        raise ValueError(f"header {header}")
    side = unsqueeze(content[start: start + squeezed_bytes], side_bytes)
    codes = memoryview(content)[start + squeezed_bytes: -32]
    return header, json.loads(side[:index_bytes]), side[index_bytes:], codes


def decode_artifact(content, path="the artifact"):
    """(stored settings, {name: Quantized}, note) from a file's bytes. Raises UserError."""
    with explained(f"{path}: not an artifact of this script, or damaged or cut short",
                   "make or fetch it again", Exception):  # whatever bad bytes raise
        header, index, side, codes = open_artifact(content)
        described = [(str(name), int(bits), tuple(map(int, shape)))
                     for name, bits, shape in index["tensors"]]
        weights = sum(math.prod(shape) + sum(shape) for *_, shape in described)
        if (weights > most_in(content)
                or len({name for name, *_ in described}) < len(described)
                or any(bits not in Bits.__args__ or min(shape, default=0) < 0
                       or (bits < 16 and len(shape) != 2) for _, bits, shape in described)):
            raise ValueError(f"{weights} weights are too many, or a tensor is listed twice or has "
                             "an impossible shape")
        shapes = [shape for _, bits, shape in described if bits < 16]
        sizes = [math.prod(shape) for shape in shapes]
        lengths = [n for shape in shapes for n in shape]
        half_sizes = [math.prod(shape) for _, bits, shape in described if bits == 16]
        # split raises unless its sizes add up
        side = torch.from_numpy(np.frombuffer(side, np.uint8).copy()).split(
            [2 * int(index["distinct"]), 2 * sum(lengths), 2 * sum(half_sizes)])
        distinct, refs, halves = (
            part.view(2, -1).T.numpy().copy().view("<u2").ravel() for part in side)
        factors = distinct.view(np.float16)[refs].astype(np.float32)
        factors = iter(torch.from_numpy(factors).split(lengths))
        halves = iter(torch.from_numpy(halves.view(np.float16)).split(half_sizes))
        symbols = np.frombuffer(CODECS[header["codec"]][1](codes, sum(sizes), shapes), np.uint8)
        if (trellis := index.get("trellis", False)) not in (False, "signed"):
            raise ValueError(f"trellis {trellis!r}: of an earlier version, whose script reads "
                             "it")
        matrices, tensors = iter(torch.from_numpy((symbols ^ 0x80).view(np.int8)).split(sizes)), {}
        for name, bits, shape in described:
            parts = [next(halves)] if bits == 16 else [next(matrices), next(factors), next(factors)]
            tensors[name] = Quantized(bits, parts[0].view(shape), *parts[1:],
                                      trellis=bits < 16 and bool(trellis))
            if bits < 16 and (parts[0].short().abs() > code_limit(bits)).any():
                raise ValueError(f"{name}: a code beyond its {bits} bits")
        return dict(index["settings"]), tensors, str(index["note"])


def read_artifact(path, sha256=""):
    """decode_artifact of a file; errors name it. Raises UserError if its SHA-256 is another."""
    with explained(f"{path} cannot be read", "name an artifact of a run"):
        content = user_path(path).read_bytes()
    if sha256 and sha256 != (found := hashlib.sha256(content).hexdigest()):
        raise UserError(f"{path}: SHA-256 {found}, where this run wrote or found {sha256}: the "
                        f"file was replaced; EVAL_ONLY={path} scores what is there")
    return decode_artifact(content, path)


def fitted(encoded, budget_bytes, coded, level, start):
    """(content, level) of the lowest level that is found to fit; of the coarsest if none does.

    The first of at most 30 trials is `level`; if it is 0 and fits, it is returned. Then log₂(level)
    is searched in log₂(start) ± 24, until at most 0.1 % of the budget is free or the level is known
    to 0.001 octaves. Doubling the level saves at most one bit for each of `coded` codes, so the
    first move is 8·Δbytes/coded octaves. The octaves per byte double after two trials in a row that
    both fit, or both do not."""
    guess, best, octaves_per_byte, fits = math.log2(start), None, 0.0, None
    low, high = guess - 24, guess + 24
    for _ in range(30):
        content, before = encoded(level), fits
        left = budget_bytes - len(content)
        fits = left >= 0
        if fits:
            high, best = guess, (content, level)
            if level == 0 or left <= 0.001 * budget_bytes:
                break
        elif level:  # that level 0 is too large says nothing about `guess`
            low = guess
        if high - low < 0.001:
            break
        octaves_per_byte = 2 * octaves_per_byte if fits == before else 8 / max(coded, 1)
        guess -= octaves_per_byte * (left - 0.0005 * budget_bytes)  # aim at 0.05 % free
        guess = guess if low < guess < high else (low + high) / 2
        level = 2.0 ** guess
    return best or (encoded(2.0 ** high), 2.0 ** high)


def pack(state, s, budget_bytes, log=lambda line: None, calibration=None):
    """The artifact's bytes, at most `budget_bytes`: with the finest scales, or at the lowest level
    that `fitted` finds within the budget. Raises UserError where even the coarsest do not fit."""
    coded, rule = sum(w.numel() for name, w in state.items() if bits_of(name, s) < 16), s
    if s.quant_fit == "trellis" and 8 * budget_bytes <= coded:
        rule = replace(s, quant_fit="level")  # at so few bits rounding loses less
    quantizer = Quantizer(state, rule, calibration)
    # Of each matrix, the level that coarsens half of the rows.
    coarsening = [float((w.finest / w.tolerances).nanmedian())
                  for w in quantizer.matrices.values()]
    coarsening = [x for x in coarsening if x > 0] or [1.0]  # nan: all weights are 0
    start = max(statistics.median(coarsening), 2.0 ** -24)  # the least of fp16

    def fit(compensate, level):
        """(content, level that was found, name of the rule), beginning at this level."""
        name = rule.quant_fit if compensate else rule.quant_fit.replace("trellis", "level")
        return *fitted(
            lambda x: encode_artifact(quantizer.at(x, compensate), s, f"{name} {x:.6g}"),
            budget_bytes, coded, level, level or start), name

    content, level, note = fit(False, 0.0)  # plain rounding first: GPTQ is slow
    if len(content) > budget_bytes:
        raise UserError(f"the model takes {len(content)} bytes at the coarsest scales, "
                        f"{len(content) - budget_bytes} more than ARTIFACT_BUDGET_BYTES="
                        f"{s.artifact_budget_bytes} leaves beside the code; shrink the model")
    if calibration or rule.quant_fit == "trellis":
        compensated = fit(True, level)
        if len(compensated[0]) <= budget_bytes:  # else the rounded codes are kept
            content, level, note = compensated
    log(f"artifact:{note} {level:.6g} takes {len(content)} of {budget_bytes} bytes")
    return content


def check_shapes(expected, tensors, path):
    """Raises UserError unless the artifact holds these parameters and no other."""
    found = {name: tuple(t.codes.shape) for name, t in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(f"{path}: does not hold this model: {name} is "
                                f"{found.get(name, 'absent')} in the file and "
                                f"{expected.get(name, 'absent')} in the model")


def load_quantized(model, tensors, path):
    """Give `model` the artifact's weights: every parameter, no other name, no other shape."""
    check_shapes({name: tuple(p.shape) for name, p in model.named_parameters()}, tensors, path)
    for name, p in model.named_parameters():
        p.data.copy_(tensors[name].weights())


def size_forecast(s):
    """Bytes of the model at the finest scales for Gaussian weights: entropy of codes, and fp16."""
    total = 4096  # index and header
    for name, shape in parameter_shapes(s).items():
        bits = bits_of(name, s)
        if bits < 16:  # maximum of C Gaussians, 512 to 2,048: some 0.88 × √(2 ln 2C) deviations
            clip = (getattr(s, kind_of(name).clip) if s.quant_clip == "std"
                    else math.sqrt(2 * math.log(2 * shape[1])) * 0.88)
            entropy = math.log2(math.sqrt(2 * math.pi * math.e) * code_limit(bits) / clip)
            bits, total = min(max(entropy, 0.1), bits), total + shape[0]
        total += int(math.prod(shape) * bits / 8)
    return total


# ---- 11. Evaluation: one loop for plain scoring, full context and test-time training ------------

class LedgerError(RuntimeError):
    """A breach of the rules: a target scored twice, never, or with a number that is not finite; or
    tokens wanted before they were scored."""


class ScoreLedger:
    """The nll of every target, once: the only source of a score. It hands out tokens for adapting
    only after they were scored."""

    def __init__(self, tokens):
        self.tokens, self.scored, self.total = tokens, 0, 0.0
        self.nll = np.full(len(tokens) - 1, np.nan, np.float32)

    def record(self, targets, nll):
        """Take the scores of these targets, in order of the text. Raises LedgerError."""
        if len(targets) != len(nll):
            raise LedgerError(f"{len(nll)} scores for {len(targets)} targets")
        if ((targets < 0) | (targets >= len(self.nll))).any():
            raise LedgerError(f"scores for targets {targets.min()} to {targets.max()} of a text "
                              f"with {len(self.nll)}")
        if (np.diff(targets) <= 0).any() or not np.isnan(self.nll[targets]).all():
            raise LedgerError(f"targets from {targets.min()} on are not all new: score each once")
        total = float(nll.sum(dtype=np.float64))
        if not math.isfinite(total):
            bad = int((~np.isfinite(nll)).argmax())
            raise LedgerError(f"target {targets[bad]} scored {nll[bad]}")
        self.nll[targets] = nll
        self.scored += len(nll)
        self.total += total

    def rows_for_adapting(self, first, length):
        """Rows [n, length + 1]: row i holds the targets [first[i], first[i] + length) and the token
        before them. Raises LedgerError unless all of these tokens are scored."""
        index = first[:, None] + np.arange(length + 1)  # of tokens: target t is token t + 1
        outside = (first < 0) | (first + length > len(self.nll))
        if outside.any() or np.isnan(self.nll[(index - 1).clip(min=0)]).any():
            raise LedgerError(f"tokens of targets {first.min()} to {first.max() + length} are "
                              "wanted, but not all of them are scored")
        return torch.from_numpy(self.tokens[index].astype(np.int64))

    def result(self, byte_table):
        """Loss, bits per byte and what proves them. Raises LedgerError unless it is full."""
        if self.scored != len(self.nll):
            raise LedgerError(f"{self.scored} of {len(self.nll)} targets scored")
        loss_sum, byte_count = float(self.nll.sum(dtype=np.float64)), byte_table.count(self.tokens)
        return dict(val_loss=loss_sum / len(self.nll), val_bpb=bits_per_byte(loss_sum, byte_count),
                    targets=len(self.nll), bytes=byte_count, bytes_from=byte_table.source,
                    loss_sum=loss_sum, sha256=hashlib.sha256(self.nll.tobytes()).hexdigest())


def window_plan(targets, length, stride, streams=1):
    """(start, first, last), int64 arrays: window w reads the tokens [start, start + length) and
    scores targets [first, last). Exactly one window scores each target.

    Streams are equal contiguous parts of the targets. Window n·streams + i scores the n-th `stride`
    targets of stream i; windows beyond a stream's end score nothing."""
    borders = np.arange(streams + 1) * targets // streams
    steps = -(-int(np.diff(borders).max()) // stride)
    begin = borders[:-1] + np.arange(steps)[:, None] * stride
    first, last = (np.minimum(begin + n, borders[1:]).ravel() for n in (0, stride))
    return np.maximum(last - length, 0), first, last


def joined(first, last):
    """(n, target) of each target in the ranges [first[n], last[n]), one after the other."""
    counts = last - first
    n = np.repeat(np.arange(len(counts)), counts)
    return n, np.arange(len(n)) + (first - np.cumsum(counts) + counts)[n]


class Scorer:
    """Scores the validation tokens in windows, split over ranks in batches of one fixed shape.

    shape = (length, stride, band): a window reads `length` tokens and scores `stride` of them, the
    last ones except where the text begins. With a band, each query attends to the last `band` keys.
    `chunks` are the ranges of windows scored between two calls of adapt(): those whose first target
    lies in the same chunk_tokens targets, or with streams (see window_plan) one of each stream."""

    def __init__(self, model, tokens, shape, s, rt, chunk_tokens=1 << 22, streams=0):
        (length, stride, band), targets = shape, len(tokens) - 1
        self.length, self.stride = min(length, targets), min(stride, targets)
        self.rt, self.streams = rt, streams
        self.model = functools.partial(model, band=band)
        self.start, self.first, self.last = window_plan(
            targets, self.length, self.stride, streams or 1)
        turn = np.arange(len(self.first)) // streams if streams else self.first // chunk_tokens
        borders = [0, *(np.flatnonzero(np.diff(turn)) + 1).tolist(), len(turn)]
        self.chunks = list(zip(borders, borders[1:]))
        self.tokens = tokens.astype(np.int64, copy=False)
        most = max(-(-(end - begin) // rt.world_size) for begin, end in self.chunks)
        held = -(-s.eval_batch_seqs * s.context // self.length)  # most windows at once
        self.batch = -(-most // -(-most // held))  # equal batches

    def warm_up(self):
        """Compile for the shape of a batch: score one on each rank and forget it."""
        self.score(0, min(self.batch * self.rt.world_size, len(self.first)))

    @torch.no_grad()
    def score(self, begin, end, tick=lambda windows: None, more_of=lambda windows: {}):
        """nll of the targets of windows [begin, end), in order, on every rank. tick(n): called
        after n windows. more_of(windows of the range): more arguments for the model."""
        fresh = self.last[begin:end] - self.first[begin:end]  # targets that each window scores
        low, high = (begin + n for n in self.rt.part(end - begin))
        place = int(fresh[: low - begin].sum())
        out = torch.zeros(int(fresh.sum()), device=self.rt.device)
        for b in range(low, high, self.batch):
            w = np.arange(b, b + self.batch).clip(max=high - 1)  # a short batch repeats a window
            start, first, last = (x[w, None] for x in (self.start, self.first, self.last))
            scored = (last - self.stride).clip(min=start) + np.arange(self.stride)
            new = (scored >= first) & (scored < last)
            new[high - b:] = False
            rows, targets, at, new = (torch.from_numpy(x).to(self.rt.device) for x in (
                self.tokens[start + np.arange(self.length)], self.tokens[scored + 1],
                scored - start, new))
            scores = self.model(rows, targets, at_BN=at, **more_of(w - begin))[new]
            out[place: place + len(scores)] = scores
            place += len(scores)
            tick((min(b + self.batch, high) - low) * self.rt.world_size)
        return self.rt.sum_(out).cpu().numpy()


class BaseModel:
    """Mixes the base model (the model without adapters, p₀) into the one with them, p: their
    distribution is w·p₀ + (1 − w)·p, with a fixed weight w.

    p₀ is cheap: each window scores its second half, with the first as context. A stream's next
    window is scored when the adapters reach its targets. Each p₀ sees only the text before its
    target, as p does."""

    def __init__(self, model, tokens, streams, s, rt):
        self.scorer = Scorer(model, tokens, s.base_shape, s, rt, streams=streams)
        self.weight, self.done = s.ttt_base_weight, 0
        self.seconds_left = 0.0  # a forecast for the windows that are left
        self.nll = np.full(len(tokens) - 1, np.nan, np.float32)

    def reach(self, targets):
        """Score the next windows, until these targets have scores."""
        while np.isnan(self.nll[targets]).any() and self.done < len(self.scorer.chunks):
            started, (begin, end) = time.perf_counter(), self.scorer.chunks[self.done]
            windows = self.scorer.first[begin:end], self.scorer.last[begin:end]
            self.nll[joined(*windows)[1]] = self.scorer.score(begin, end)
            self.done, seconds = self.done + 1, time.perf_counter() - started
            self.seconds_left = seconds * (len(self.scorer.chunks) - self.done)

    def mixed(self, targets, nll):
        """The nll of these targets after mixing."""
        p, p0 = (-x.astype(np.float64) for x in (nll, self.nll[targets]))
        return -np.logaddexp(math.log1p(-self.weight) + p, math.log(self.weight) + p0)


def base_model(model, scorer, s, rt):
    """The BaseModel for what `scorer` scores, or None where the settings mix none in."""
    if scorer.streams and s.ttt_base_weight:
        return BaseModel(model, scorer.tokens, scorer.streams, s, rt)


NGRAMS = (1, 2, 3, 4, 6, 8, 12, 16)  # lengths n of the n-grams that matches() looks for


def matches(tokens, device):
    """Yield (two guesses, int64 [2, N]; kind, uint8 [N]) for each of NGRAMS, by earlier tokens.

    Where the last n tokens occurred before, the tokens after their last four occurrences vote. The
    two with the most votes are the guesses; of a tie, the newer; -1: none. kind is 5·(votes of the
    first) + (votes of the second). n-grams get numbers by sorting pairs of those of their halves
    (prefix doubling, Manber & Myers 1990)."""
    x = torch.from_numpy(tokens.astype(np.int64)).to(device)
    N, numbers = len(x) - 1, {0: x.new_zeros(len(x) - 1), 1: x[:-1]}
    for n in NGRAMS:
        rest = n - n // 2  # incomplete n-grams at the beginning of the text equal no other
        incomplete = -1 - torch.arange(rest if n > 1 else 0, device=device)
        halves = torch.cat((incomplete, numbers[n // 2]))[:N] << 32 | numbers[rest]
        halves, order = halves.sort(stable=True)
        same = F.pad(halves[1:] == halves[:-1], (1, 0))
        numbers[n] = torch.empty_like(order).scatter_(0, order, (~same).cumsum(0))
        last = torch.empty_like(order).scatter_(0, order, torch.where(same, order.roll(1), -1))
        past = [last]
        while len(past) < 4:
            past.append(torch.where(past[-1] < 0, -1, last[past[-1]]))
        followed = torch.stack([torch.where(at < 0, -1, x[at + 1]) for at in past])
        votes = (followed[:, None] == followed).sum(1, dtype=torch.uint8) * (followed >= 0)
        rank = 4 * votes + torch.arange(3, -1, -1, dtype=torch.uint8, device=device)[:, None]
        first, newest = rank.max(0)
        guess = torch.where(first < 4, -1, followed.gather(0, newest[None])[0])
        second, newest = rank.masked_fill(followed == guess, 0).max(0)
        other = torch.where(second < 4, -1, followed.gather(0, newest[None])[0])
        yield torch.stack((guess, other)), 5 * (first // 4) + second // 4


class MatchModel:
    """Mixes the guesses of matches() into the model's distribution, the longest n-grams' first.
    Each n replaces p, the distribution so far, by (1 − w₁ − w₂)·p, plus w₁ on the first guess and
    w₂ on the second: a full distribution, fixed before the target is seen (the match model of PAQ,
    Mahoney 2005; for language models Grave et al. 2017).

    The weights of each kind of each length are the mean responsibilities of its first and of its
    second guesses so far: the posterior probability that the token came from the guess and not from
    p. As a prior each kind begins with one match, of responsibility 0.05 for each guess. This is
    causal: a stream uses only earlier text, its own scores and those of the streams before it. So
    the same scores can be computed in the order of the text."""

    def __init__(self, tokens, streams, device):
        self.streams, self.device, self.done, self.gained = streams, device, 0, 0.0
        target, N = torch.from_numpy(tokens[1:].astype(np.int64)).to(device), len(tokens) - 1
        # Of each length, the longest first: which guesses are right, and their kind.
        self.right = torch.empty(len(NGRAMS), 2, N, dtype=torch.bool, device=device)
        self.kinds = torch.empty(len(NGRAMS), N, dtype=torch.uint8, device=device)
        for n, (guesses, kinds) in enumerate(matches(tokens, device), 1):
            self.right[-n], self.kinds[-n] = guesses == target, kinds
        # Of each length, stream and kind: responsibilities of first, of second guesses; matches.
        kind = torch.arange(25, device=device)
        prior = torch.stack((kind > 0, kind % 5 > 0, kind >= 0)).double()
        prior[:2] *= 0.05
        self.sums = prior[:, None].repeat(len(NGRAMS), 1, streams, 1)

    def mixed(self, first, last, nll):
        """The nll of targets after mixing; range n, [first[n], last[n]), is of stream n. With one
        stream its ranges are joined and mixed in rounds of 512 targets or, if more, a 64th of those
        so far."""
        if self.streams > 1:
            return self._mix(first, last, nll)
        out, begin, end = [], first[:1], last[-1]
        while begin[0] < end:
            part, nll = np.split(nll, [max(512, self.done // 64)])
            out.append(self._mix(begin, begin + len(part), part))
            begin, self.done = begin + len(part), self.done + len(part)
        return np.concatenate(out)

    def _mix(self, first, last, nll):
        """Mix a range of each stream with the weights so far; then learn from it."""
        before = nll.astype(np.float64)
        stream, targets, mixed = (torch.from_numpy(x).to(self.device)
                                  for x in (*joined(first, last), before))
        right = self.right[:, :, targets]
        places = (25 * stream + self.kinds[:, targets])[:, None].expand(-1, 3, -1)
        weights = (self.sums[:, :2] / self.sums[:, 2:]).flatten(2).gather(2, places[:, :2])
        guessed = (weights * right).sum(1).log()  # -inf: no guess is right
        steps = []
        for of_model, of_guesses in zip(torch.log1p(-weights.sum(1)), guessed):
            mixed = -torch.logaddexp(of_model - mixed, of_guesses)
            steps.append(mixed)
        responsible = (guessed + torch.stack(steps)).exp()[:, None] * right
        new = torch.zeros_like(self.sums).flatten(2).scatter_add_(
            2, places, F.pad(responsible, (0, 0, 0, 1), value=1.0))
        self.sums += new.view_as(self.sums).cumsum(2)
        after = mixed.cpu().numpy()
        self.gained += float((before - after).sum())
        return after


def evaluate(model, tokens, byte_table, s, rt, label, shape, ttt=None, opened=None):
    """Score every target of `tokens` once, in windows of this shape (see Scorer); ttt, a
    WeightTTT or LoraTTT, trains after each chunk but the last. Returns the ledger's result with
    `seconds` and `tokens_read`, and the ledger.

    ttt.adapt gets the time left: 98 % of EVAL_WALLCLOCK_SECONDS, less the time since `opened` and
    a forecast of the remaining scoring."""
    how = ttt.scorer_options(len(tokens) - 1) if ttt else {}
    scorer = Scorer(model, tokens, shape, s, rt, **how)
    ledger, chunks, scoring = ScoreLedger(tokens), scorer.chunks, []
    base = base_model(model, scorer, s, rt)
    rt.barrier()  # no clock includes another rank's earlier work
    started = time.perf_counter()
    match = (MatchModel(tokens, scorer.streams or 1, rt.device)
             if s.eval_match and shape[1] < shape[0] else None)
    if ttt:
        ttt.begin(scorer)
    limit = 0.98 * s.eval_wallclock_seconds or math.inf  # 2 % for errors of the forecast
    deadline, windows = (opened or started) + limit, len(scorer.first)
    for c, (begin, end) in enumerate(chunks):
        first, last = scorer.first[begin:end], scorer.last[begin:end]
        targets = joined(first, last)[1]
        if base:
            base.reach(targets)
        before = time.perf_counter()
        scores = scorer.score(begin, end, lambda n: rt.progress(label, (begin + n) / windows),
                              getattr(ttt, "arguments", lambda windows: {}))
        if base:
            scores = base.mixed(targets, scores)
        if match and np.isfinite(scores).all():  # the ledger refuses any other
            scores = match.mixed(first, last, scores)
        ledger.record(targets, scores)
        scoring.append((time.perf_counter() - before) / (end - begin))
        if ttt and c + 1 < len(chunks):
            rest = statistics.median(scoring[-9:]) * (windows - end)
            rest += base.seconds_left if base else 0.0
            span = int(first[0]), int(last[-1])
            ttt.adapt(ledger, span, c, len(chunks), deadline - time.perf_counter() - rest)
    rt.synchronize()
    seconds = time.perf_counter() - started
    if match:
        rt.log(f"match:{label} val_loss without guesses "
               f"{(ledger.total + match.gained) / ledger.scored:.6f}")
    read = sum(len(x.first) * x.length for x in [scorer] + ([base.scorer] if base else []))
    return dict(ledger.result(byte_table), seconds=seconds, tokens_read=read), ledger


def ttt_factor(name, s):
    """Factor of TTT_LR for a parameter in test-time training; 0: it is not adapted."""
    row, numbered = kind_of(name), re.match(r"(?:blocks|cores)\.(\d+)", name)
    if s.ttt_params == "tail":  # a core is in the tail if one of its blocks is
        tail = {part for p in pass_list(s) if p.block >= s.ttt_freeze_blocks
                for part in (f"blocks.{p.block}", f"cores.{p.core}")}
        wanted = (numbered and numbered[0] in tail or name == "tok_emb"
                  or row.kind == "control" and "scale" in name)
    else:
        wanted = not numbered or int(numbered[1]) >= s.ttt_freeze_blocks
    if not wanted or (s.ttt_optimizer == "muon"
                      and row.optimizer not in ("muon", "proj_optimizer")):
        return 0.0
    return getattr(s, row.ttt_lr) if row.ttt_lr else 1.0


class WeightTTT:
    """Test-time training of the weights on scored tokens. It owns optimizer, schedule, budget and
    log; the optimizer's state lasts for the evaluation."""

    def __init__(self, model, forward, s, rt):
        self.s, self.rt, self.forward, self.step_seconds = s, rt, forward, []
        groups = {}
        for name, p in model.named_parameters():
            factor = ttt_factor(name, s)
            p.requires_grad_(factor > 0)
            if factor:
                groups.setdefault(factor, []).append(p)
        make, tuned = OPTIMIZERS[s.ttt_optimizer], replace(s, beta2=0.999)
        self.optimizers = Optimizers([make(params, factor * s.ttt_lr, 0.0, tuned, rt)
                                      for factor, params in groups.items()], 1.0, rt)
        rows = min(s.ttt_batch_seqs, s.ttt_chunk_tokens // s.train_seq_len)
        self.micro_rows = min(-(-rows // rt.world_size), s.micro_batch_tokens // s.train_seq_len)

    def scorer_options(self, targets):
        """The Scorer's option: what it scores between two calls of adapt()."""
        return dict(chunk_tokens=self.s.ttt_chunk_tokens)

    def begin(self, scorer):
        self.started, params = time.perf_counter(), self.optimizers.params
        self.rt.log(f"ttt_weights:start chunks={len(scorer.chunks)} chunk_tokens="
                    f"{self.s.ttt_chunk_tokens} parameters={sum(p.numel() for p in params)}")

    def warm_up(self, scorer):
        """Compile for the one shape of a micro-batch, on the scorer's tokens and random ones. No
        weight changes, but the state of the optimizers does: adapt with another WeightTTT."""
        scorer.warm_up()
        self._backward(torch.randint(self.s.vocab_size, (self.micro_rows * self.rt.world_size,
                                                         self.s.train_seq_len + 1)))
        self.optimizers.step(0.0, TTT_MOMENTUM)  # rate 0; compiles Muon's products

    def adapt(self, ledger, span, chunk, chunks, left=math.inf):
        """Train on `span`, the targets [first, last) just scored, chunk number `chunk` of `chunks`.
        A step uses rows of all ranks.

        Epochs: TTT_EPOCHS (-1: 1 until a step was timed, then 10), but no more than fit into this
        chunk's equal part of the seconds `left`; before a step was timed, none begins after it. If
        none fits, one if it fits into `left`."""
        s, (first, last), length = self.s, span, self.s.train_seq_len
        rows = ledger.rows_for_adapting(np.arange(first, last - length + 1, length), length)
        batches = rows.split(s.ttt_batch_seqs) if len(rows) else ()
        epochs = s.ttt_epochs if s.ttt_epochs >= 0 else 10 if self.step_seconds else 1
        if self.step_seconds:
            epoch = max(statistics.median(self.step_seconds[-9:]) * len(batches), 1e-9)
            affordable = max(left / (chunks - 1 - chunk) / epoch, min(1.0, left / epoch))
            epochs = int(max(0, min(epochs, affordable)))
        epochs = self.rt.from_rank0(epochs if left > 0 else 0)
        across = 0.5 * (1 + math.cos(math.pi * chunk / (chunks - 1)))
        steps, started = len(batches) * epochs, time.perf_counter()
        for k in range(steps):
            if k and k % len(batches) == 0 and not self.step_seconds:  # no step was timed yet
                self.rt.synchronize()
                late = time.perf_counter() - started > left / (chunks - 1 - chunk)
                if self.rt.from_rank0(late):
                    epochs, steps = k // len(batches), k
                    break
            inside = 0.5 * (1 + math.cos(math.pi * k / steps)) if s.ttt_intra_cosine else 1.0
            self._backward(batches[k % len(batches)])
            self.optimizers.step(across * inside, TTT_MOMENTUM)
        if steps:
            self.rt.synchronize()
            self.step_seconds.append((time.perf_counter() - started) / steps)
        wanted = s.ttt_epochs if s.ttt_epochs >= 0 else 1
        if epochs < wanted:
            self.rt.log(f"ttt_weights:late chunk={chunk + 1}/{chunks} epochs={epochs} of {wanted}: "
                        f"scoring needs the rest of EVAL_WALLCLOCK_SECONDS="
                        f"{s.eval_wallclock_seconds:g}")
        if chunk % 10 == 0 or chunk + 2 == chunks:
            self.rt.log(f"  ttt_chunk [{chunk + 1}/{chunks}] val_loss="
                        f"{ledger.total / ledger.scored:.6f} "
                        f"time={time.perf_counter() - self.started:.1f}s epochs={epochs}")

    def _backward(self, batch):
        """This rank's part of the gradients of the batch's mean nll, in micro-batches of one
        shape: a short one repeats a row, whose second nll is ignored."""
        begin, end = self.rt.part(len(batch))
        for at in range(begin, end, self.micro_rows):
            rows = torch.arange(at, at + self.micro_rows).clamp(max=end - 1)
            x = batch[rows].to(self.rt.device)
            nll = self.forward(x[:, :-1], x[:, 1:])[: end - at]
            (nll.sum() / batch[:, 1:].numel()).backward()


# These two take all adapters of a rank, [n, P], by default [32, 3 M] on 8 GPUs. They are compiled,
# so that memory is read once.

def adapter_uphill(p_NP, initial_P, grad_NP):
    """⟨gradient, adapters − initial adapters⟩ of each stream."""
    return (grad_NP * (p_NP - initial_P)).sum(1)


def adapter_descent(p_NP, grad_NP, squares_NP, steps_N1, rates_N1, active_N1):
    """One step of AdamW without momentum, in place; β₂ 0.999, decay 0.5. Streams that are
    not active have the rate 0 and keep their squares."""
    squares_NP.lerp_(grad_NP.square(), 0.001 * active_N1)
    correction = 1 - 0.999 ** steps_N1.clamp(min=1)
    direction = grad_NP / ((squares_NP / correction).sqrt() + 1e-10) + 0.5 * p_NP
    p_NP.sub_(rates_N1 * direction)


class LoraTTT:
    """Test-time training by low-rank adapters that follow the documents (#1530).

    The targets are split into streams, scored side by side, EVAL_STRIDE targets at a time. A stream
    has a pair (A, B) for each of adapter_shapes, B zero at first. After each stride a pair takes
    one step of AdamW without momentum on the stride's mean nll. Training rows have half of the
    scoring context: with a quarter TTT gained 0.0003 to 0.0027 bpb less, with the whole no more. A
    smaller stride gains more. Where a document ends, the pair is reset.

    Each stream has a learning rate. Let h = ⟨gradient, pairs − initial pairs⟩, summed over this
    stream and the streams before it, whose tokens are all earlier. If h < 0, larger steps since the
    document began would have been better: step n multiplies the rate by exp(HYPER/√n). If h > 0, it
    divides the rate by that (a hypergradient's sign, Baydin et al. 2018). With the last step alone
    in h, rates end far too low.

    Adapted models are overconfident. So each stream has a sharpness s, 0 at first; its logits are
    multiplied by 1 + s. The sign of its gradient, summed over the same streams, moves s by
    0.1·HYPER/√n. No document resets s. Gain: 0.0022 (demo), 0.0028 (a strong model), nothing at
    4 × 128."""
    HYPER = 0.3

    def __init__(self, model, s, rt):
        self.s, self.rt, self.step_seconds, self.skipped = s, rt, [], 0
        self.shapes = model.adapter_shapes()
        self.uphill, self.descend = rt.compiled(adapter_uphill), rt.compiled(adapter_descent)
        model.requires_grad_(False)

    def scorer_options(self, targets):
        """The Scorer's option: adapt() follows a window of each stream. A stream has at least
        16 times the targets that a window has tokens, if the text is long enough: rows that
        begin in the stream before it cannot be trained on."""
        streams = min(self.s.ttt_batch_seqs, targets // (16 * self.s.ttt_shape[0]))
        return dict(streams=max(1, streams))

    def begin(self, scorer):
        """Make the adapters of this rank's n streams, [n, P], and their optimizer's state."""
        self.scorer, self.started = scorer, time.perf_counter()
        self.low, self.high = self.rt.part(scorer.streams)
        self.length = min(scorer.length, self.s.context // 2 + scorer.stride)  # of training rows
        generator, parts = torch.Generator().manual_seed(self.s.seed), []
        for R, D in self.shapes:
            uniform = 2 * torch.rand(self.s.ttt_lora_rank * D, generator=generator) - 1
            parts += [uniform / math.sqrt(D), torch.zeros(R * self.s.ttt_lora_rank)]
        self.initial = torch.cat([*parts, torch.zeros(AFTER_PAIRS)]).to(self.rt.device)
        held, most = self.high - self.low, scorer.batch * scorer.length // self.length
        batches = -(-held // most) or 1  # a rank may have no stream
        self.batch = -(-held // batches) or 1
        self.params = self.initial.repeat(held, 1).requires_grad_()
        self.squares = torch.zeros_like(self.params)
        self.steps = torch.zeros(held, 1, device=self.rt.device)
        self.lr = torch.full((scorer.streams,), self.s.ttt_lr, device=self.rt.device)
        self.sharpness = torch.zeros_like(self.lr)

    def arguments(self, windows):
        """The adapters of these windows of a chunk: window n belongs to stream n."""
        rows, params = windows - self.low, self.params
        if not np.array_equal(rows, np.arange(len(params))):  # else no copy, as on 8 GPUs
            params = params[torch.from_numpy(rows).to(params.device)]
        return dict(adapters=params)

    def warm_up(self, scorer):
        """Compile for the one shape of a batch, on the scorer's tokens and random ones."""
        self.begin(scorer)
        scorer.score(*scorer.chunks[0], more_of=self.arguments)
        rows = torch.randint(self.s.vocab_size, (len(self.params), self.length + 1))  # of weight 0
        self._backward(rows, torch.zeros(len(rows), scorer.stride))
        self._step(self.steps < 0)  # no stream is active

    def adapt(self, ledger, span, chunk, chunks, left=math.inf):
        """Reset the adapters of streams where a document ended, then take a step of every stream on
        the targets it just scored. The step is skipped if the seconds `left` are too few for it."""
        rt, scorer, started = self.rt, self.scorer, time.perf_counter()
        mine = slice(chunk * scorer.streams + self.low, chunk * scorer.streams + self.high)
        last, length = scorer.last[mine], self.length  # only the last chunk has short windows
        step = statistics.median(self.step_seconds[-9:] or [0])
        skip = rt.any_rank(left < step and rt.rank == 0)  # rank 0's clock decides
        self.skipped += skip
        if (chunk + 1) * scorer.stride > length:  # else rows would begin in another stream
            rows = ledger.rows_for_adapting(last - length, length)
            ends = rows[:, -scorer.stride:] == BOS
            new = ends.flip(1).cumsum(1).flip(1) == 0  # what follows the last BOS is trained on
            ended = ends.any(1)
            self.params.data[ended, :-1] = self.initial[:-1]
            self.squares[ended], self.steps[ended] = 0, 0
            if not skip:
                self._backward(rows, new / new.sum(1, keepdim=True).clamp(min=1))
                self._step(new.any(1, keepdim=True).to(rt.device))
                rt.synchronize()
                self.step_seconds.append(time.perf_counter() - started)
        if chunk % max(1, chunks // 10) == 0 or chunk + 2 == chunks:
            rt.log(f"  ttt_lora [{chunk + 1}/{chunks}] streams={scorer.streams} val_loss="
                   f"{ledger.total / ledger.scored:.6f} lr={self.lr.median():.2e} skipped="
                   f"{self.skipped} step={1000 * step:.0f}ms "
                   f"time={time.perf_counter() - self.started:.1f}s")

    def _backward(self, rows, weights):
        """Gradients of each stream's weighted nll of its last targets, in batches of one shape."""
        stride, device = self.scorer.stride, self.rt.device
        at = torch.arange(self.length - stride, self.length, device=device).expand(self.batch, -1)
        for begin in range(0, len(rows), self.batch):
            stream = np.arange(begin, begin + self.batch).clip(max=len(rows) - 1)
            x, w = (t[torch.from_numpy(stream)].to(device) for t in (rows, weights))
            nll = self.scorer.model(x[:, :-1], x[:, -stride:], at_BN=at,
                                    **self.arguments(stream + self.low))
            (nll * w)[: len(rows) - begin].sum().backward()

    def _step(self, active_N1):
        """Update rate and sharpness of all streams; then AdamW's step for the `active` ones."""
        p, uphill = self.params.detach(), torch.zeros(2, len(self.lr), device=self.lr.device)
        mine = slice(self.low, self.high)
        grad = torch.zeros_like(p) if self.params.grad is None else self.params.grad
        uphill[1, mine] = grad[:, -1]
        grad[:, -1] = 0  # not AdamW's
        uphill[0, mine] = self.uphill(p, self.initial, grad)
        change = self.HYPER / math.sqrt(len(self.step_seconds) + 1)  # it has an entry for each step
        of_rate, of_sharpness = -change * self.rt.sum_(uphill).cumsum(1).sign()
        self.lr *= torch.exp(of_rate)
        self.sharpness += 0.1 * of_sharpness
        self.steps += active_N1
        self.descend(p, grad, self.squares, self.steps, self.lr[mine, None] * active_N1, active_N1)
        p[:, -1] = self.sharpness[mine]
        self.params.grad = None


def chosen_ttt(model, forward, s, rt):
    return LoraTTT(model, s, rt) if s.ttt_lora_rank else WeightTTT(model, forward, s, rt)


# ---- 12. Training -------------------------------------------------------------------------------

class Checkpoints:
    """Checkpoints of training in OUT_DIR/checkpoints: the last two, each whole or absent.

    Each holds a key: the settings that OF_TRAINING names, hashes of data and code."""
    NAMES = "step_" + "[0-9]" * 7 + ".pt"
    CARRIED = ("step", "elapsed", "step_ms", "save_ms", "fake_quant", "late")  # of a Trainer
    AVERAGES = ("ema", "swa", "snapshots")  # of its averages

    def __init__(self, s, rt, stream, validation):
        self.rt, self.kept, self.every = rt, [], s.checkpoint_every_seconds
        self.folder = user_path(s.out_dir) / "checkpoints"
        self.exported_path = self.folder / "exported.json"
        self.text = [hashlib.sha256(validation.tobytes()).hexdigest(), s.context]
        data = [[p.name, len(t), hashlib.sha256(t[: 1 << 16].tobytes()).hexdigest()]
                for p, t in zip(stream.paths, stream.shards)]
        self.key = dict({name: getattr(s, name) for name in OF_TRAINING},
                        data=hashlib.sha256(compact_json(data=data)).hexdigest(),
                        code=hashlib.sha256(SOURCE).hexdigest())

    def save(self, trainer):
        """Write the state; remove all but this run's last two. A collective of all ranks. Returns
        "", or why it could not be written. Raises UserError where a weight is not finite."""
        state = dict({name: getattr(trainer, name) for name in self.CARRIED}, key=self.key,
                     averages={name: getattr(trainer.averages, name) for name in self.AVERAGES},
                     optimizers=[group.state() for group in trainer.optimizers.groups],
                     model=trainer.weights)
        if not all(torch.isfinite(p).all() for p in state["model"]):
            raise diverged(f"step {trainer.step}: weights are not finite", trainer.s)
        path, problem = self.folder / f"step_{trainer.step:07d}.pt", ""
        if self.rt.rank == 0 and path not in self.kept:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            content = buffer.getvalue()
            try:
                write_whole(path, content + hashlib.sha256(content).digest())
                self.kept = [*self.kept[-1:], path]
                self.remove({*self.folder.glob(self.NAMES), self.exported_path} - {*self.kept})
                self.rt.log(f"checkpoint:step {trainer.step} {path} {len(content) + 32} bytes")
            except UserError as error:
                problem = str(error)
                self.rt.log(f"checkpoint:none at step {trainer.step}: {problem}")
        return self.rt.from_rank0(problem)

    def resume(self, trainer):
        """Load the newest whole state. Raises UserError if its key differs."""
        for path in sorted(self.folder.glob(self.NAMES), reverse=True):
            with explained(f"RESUME=auto: {path} cannot be read or is no state of this run",
                           "move it away, or set another OUT_DIR", Exception):
                content = path.read_bytes()
                if hashlib.sha256(content[:-32]).digest() != content[-32:]:
                    self.rt.log(f"resume:{path} is damaged and left out")
                    continue
                state = torch.load(io.BytesIO(content[:-32]), map_location=self.rt.device,
                                   weights_only=True)
                other = [f"{name.upper()}={state['key'].get(name)}, not {value}"
                         for name, value in self.key.items() if state["key"].get(name) != value]
                if not other:
                    for group, saved in zip(trainer.optimizers.groups, state["optimizers"],
                                            strict=True):
                        group.load(saved)
                    vars(trainer.averages).update(state["averages"])
                    torch._foreach_copy_(trainer.weights, state["model"])
                    vars(trainer).update({name: state[name] for name in self.CARRIED})
                    self.kept = [path]
                    self.rt.log(f"resume:step {trainer.step} train_time:{trainer.elapsed:.0f}ms")
                    return
            raise UserError(f"RESUME=auto: {path} was made with {'; '.join(other)}: set these, "
                            "with the same data (DATA) and script (CODE), or another OUT_DIR")
        self.rt.log("resume:no checkpoint, from the beginning")

    def remove(self, paths):
        for path in paths:
            with contextlib.suppress(OSError):
                path.unlink()

    def export(self, trained, results):
        """Store the facts of training, with the artifact's hash: a resumed run skips training.
        Without CHECKPOINT_EVERY_SECONDS the checkpoints go."""
        with contextlib.suppress(UserError):
            write_whole(self.exported_path, compact_json(
                key=self.key, trained=trained, results=results, text=self.text))
            self.remove(() if self.every else self.kept)

    def exported(self, path):
        """What `export` stored of the artifact at `path`, or None. The results only if they are of
        this validation text."""
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            note = json.loads(self.exported_path.read_bytes())
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            if (note["key"], note["trained"]["artifact_sha256"]) == (self.key, sha256):
                return note["trained"], note["results"] if note["text"] == self.text else {}
        return None


class Trainer:
    """The training loop and what it needs: model, optimizers, averages."""

    def __init__(self, model, forward, s, rt, checkpoints):
        self.model, self.forward, self.s, self.rt = model, forward, s, rt
        self.checkpoints = checkpoints
        self.rows_per_step = s.train_batch_tokens // s.train_seq_len
        mine, most = self.rows_per_step // rt.world_size, s.micro_batch_tokens // s.train_seq_len
        # Rows of a micro-batch: the most that MICRO_BATCH_TOKENS holds, in equal parts.
        self.micro_rows = max(n for n in range(1, min(mine, most) + 1) if mine % n == 0)
        # Calibration squares the summed gradient of a micro-batch: over many rows it cancels.
        self.calibration_rows = min(self.micro_rows, 8)
        self.optimizers = training_optimizers(model, s, rt)
        self.averages = WeightAverage(model, s)
        self.weights = [p.detach() for p in model.parameters()]
        self.int6 = rt.compiled(int6)
        self.matrices = [p for name, p in model.named_parameters()  # those that QAT rounds
                         if kind_of(name).kind in ("attn", "mlp") and bits_of(name, s) < 16]
        self.step, self.elapsed, self.step_ms = 0, 0.0, 0.0
        self.sums_ms = 0.0  # of a calibration's sums over ranks
        # Of the last checkpoint, at first a guess; the next begins only if as much is left.
        self.save_ms = 50 * s.max_wallclock_seconds  # a twentieth of the clock
        self.scheduled = s  # for schedules: its clock ends where calibration begins
        self.last_loss = ""  # for the progress line; reading it from a GPU stalls it
        # Both stay on once set. Without LATE_PASSES there is one list, and `late` is on at once.
        self.fake_quant, self.late = False, not s.late_passes
        self.segment = s.train_seq_len  # tokens, by SEGMENT_SCHEDULE

    # -- the loop

    def train(self, batches, validate):
        """Train until ITERATIONS or the clock; then give the model its averaged weights.

        `validate()` scores the model as it is. Its time does not count as training time; that of
        writing checkpoints does, except after the last step. Raises KeyboardInterrupt after a
        signal, with the state saved."""
        s, rt, saved_at, clock = self.s, self.rt, self.elapsed, StepClock(self.rt, self.elapsed)
        rt.log(f"startup:{time.perf_counter() - LAUNCHED:.1f}s from launch to the first step")
        while True:
            if clock.interrupted:
                problem = self.checkpoints.save(self)
                raise KeyboardInterrupt(f"interrupted at step {self.step}; " + (
                    problem or "RESUME=auto with the same settings goes on from there"))
            due = self.elapsed - saved_at >= 1000 * s.checkpoint_every_seconds > 0
            if due and not self.over(least_ms=self.save_ms):
                self.checkpoints.save(self)
                before, self.elapsed = self.elapsed, clock.read()
                saved_at, self.save_ms = self.elapsed, self.elapsed - before
            over = self.over()
            if over or (s.val_loss_every and self.step and self.step % s.val_loss_every == 0):
                self.elapsed = clock.read(exact=True)
                if over:  # a signal ends the run at once from here on, if this state is on disk
                    rt.training = bool(self.checkpoints.save(self))
                result = validate()
                self.log(f"val_loss:{result['val_loss']:.4f} val_bpb:{result['val_bpb']:.4f}")
                clock = StepClock(rt, self.elapsed)
            if over:
                break
            loss, norm, scale = self.train_step(next(batches))
            before, self.elapsed = self.elapsed, clock.read()
            if self.over(steps=4):  # an inexact reading may miss two running steps; two as a margin
                self.elapsed = clock.read(exact=True)
            # a mean over about ten steps: late passes are slower than the mean of all steps
            self.step_ms = 0.9 * self.step_ms + 0.1 * (self.elapsed - before)
            self.check_and_log(loss, norm, scale)
            rt.progress("train", progress_of(self.scheduled, self.step, self.elapsed),
                        f"step:{self.step} {self.last_loss} {self.step_ms:.0f}ms ")
        if not (self.step >= s.iterations > 0):
            rt.log(f"stopping_early: wallclock_cap train_time:{self.elapsed:.0f}ms "
                   f"step:{self.step}/{s.iterations}")
        if not self.late:
            rt.log("late_passes:never trained, although they are scored: lower LATE_PASSES_FROM="
                   f"{s.late_passes_from} or take more steps")
        applied = self.averages.apply()
        rt.log(f"{'ema' if 'EMA' in applied else 'average'}:applying "
               f"{applied or 'no average, but the last'} weights")

    def over(self, steps=1, least_ms=0.0):
        """Is training over, because ITERATIONS are done or so many `steps`, each of at least
        `least_ms`, no longer fit?"""
        return self.step >= self.s.iterations > 0 or out_of_time(
            self.scheduled, self.step, self.elapsed, max(self.step_ms, least_ms), steps)

    def train_step(self, rows):
        """One step. Returns (mean nll of this rank's tokens, norm of all gradients, lr_scale)."""
        s = self.scheduled
        scale = lr_scale(s, self.step, self.elapsed)
        left = warmdown_left(s, self.step, self.elapsed)
        if not self.fake_quant and left < s.late_qat_threshold:
            self.fake_quant = True
            self.rt.log(f"late_qat:enabled step:{self.step} scale:{scale:.4f}")
        if not self.late and progress_of(s, self.step, self.elapsed) >= s.late_passes_from:
            self.late = True
            self.rt.log(f"late_passes:enabled step:{self.step} order:{s.late_order}")
        tokens = segment_tokens(s, self.step, self.elapsed)
        if tokens != self.segment:
            self.segment = tokens
            self.rt.log(f"segments:{tokens} tokens step:{self.step}")
        loss, norm = self.optimize(rows, scale, muon_momentum(s, self.step), self.late,
                                   self.fake_quant)
        self.step += 1
        if self.averages.update(self.step, left):
            self.rt.log(f"swa:start step:{self.step}")
        return loss, norm, scale

    def optimize(self, rows, scale, momentum, late=True, rounded=False):
        """One optimizer step on this rank's rows, in micro-batches. Returns their mean nll and the
        norm of all gradients, on the device. `rounded`: the gradients are those of int6 weights;
        they change the exact ones (straight-through)."""
        loss = torch.zeros((), device=self.rt.device)
        # A tensor: a number would be compiled in.
        segment = torch.full((), self.segment, device=self.rt.device) if self.s.segments else None
        exact = [p.detach().clone() for p in self.matrices] if rounded else ()
        for p, w in zip(self.matrices, exact):
            p.data.copy_(self.int6(w))
        for micro in rows.split(self.micro_rows):
            x, y = micro[:, :-1].long(), micro[:, 1:].long()
            part = self.forward(x, y, late=late, segment=segment).sum() / self.s.train_batch_tokens
            part.backward()
            loss += part.detach()
        for p, w in zip(self.matrices, exact):
            p.data.copy_(w)
        return loss * self.rt.world_size, self.optimizers.step(scale, momentum)

    def check_and_log(self, loss, norm, scale):
        """Log the step if it is due. Raises UserError if its loss or norm is not finite. Reading
        them stalls a GPU: it checks only its first ten, every hundredth and logged steps."""
        rt, logged = self.rt, self.step <= 10 or self.step % self.s.train_log_every == 0
        if not logged and self.step % 100 and rt.device.type == "cuda":
            return
        losses = rt.all_gather(loss.view(1))().tolist()
        bad = [f"{x} on rank {rank}" for rank, x in enumerate(losses) if not math.isfinite(x)]
        if bad or not math.isfinite(norm):
            raise diverged(f"step {self.step}: train_loss {', '.join(bad) or losses[0]}, gradient "
                           f"norm {norm:g}: not finite", self.s)
        loss_text = f"train_loss:{statistics.fmean(losses):.4f}"
        self.last_loss = loss_text if rt.device.type == "cpu" else f"{loss_text} at {self.step}"
        if logged:  # a terminal shows the progress line instead
            self.log(loss_text, f" lr_scale:{scale:.4f}", not rt.terminal)

    def log(self, loss_text, more="", console=True):
        self.rt.log(f"step:{self.step}/{self.s.iterations} {loss_text} train_time:"
                    f"{self.elapsed:.0f}ms step_avg:{self.elapsed / max(self.step, 1):.2f}ms{more}",
                    console)

    # -- before the clock, and at its end

    def warm_up(self):
        """Run every compiled variant on random tokens, unless WARMUP_STEPS=0; then restore weights
        and optimizers. No compilation is timed. Sets the seconds reserved for calibration."""
        s, rt = self.s, self.rt
        kept = [w.clone() for w in self.weights]
        rows = torch.randint(  # as batches_of: compiled code depends on type and strides
            s.vocab_size, (self.rows_per_step // rt.world_size, s.train_seq_len + 1),
            dtype=torch.int32, device=rt.device)
        early, rounded = s.late_passes and s.late_passes_from > 0, s.late_qat_threshold > 0
        variants = [False, True] if early else [True]
        steps = max(s.warmup_steps, len(variants)) if s.warmup_steps else 0
        if steps and rt.compile:
            rt.log("compile:training, which takes minutes where the compiler's cache is empty")
        for i in range(steps):
            self.optimize(rows, 1.0, s.muon_momentum, variants[i % len(variants)], rounded)
            if i + 1 in (1, steps) or (i + 1) % 10 == 0:
                rt.log(f"warmup_step:{i + 1}/{steps}")
        if s.gptq and s.max_wallclock_seconds:
            cap = s.max_wallclock_seconds
            self.scheduled = replace(s, max_wallclock_seconds=cap - self.measured_reserve(rows))
        torch._foreach_copy_(self.weights, kept)
        self.optimizers = training_optimizers(self.model, s, rt)
        if rt.compile:
            counted = torch._dynamo.utils.counters
            hits, misses = (counted["inductor"][f"fxgraph_cache_{k}"] for k in ("hit", "miss"))
            rt.log(f"compile:variants {len(variants)} graph_breaks "
                   f"{sum(counted['graph_break'].values())} graphs_compiled {misses} "
                   f"graphs_from_cache {hits}")

    def measured_reserve(self, rows):
        """Seconds that GPTQ_BATCHES will take, plus a quarter; at most a tenth of the clock."""
        parts, spent = rows.split(self.calibration_rows), []
        for count in (1, 1, 3):  # the first loads kernels
            clock = StepClock(self.rt)
            calibrate(self.model, parts[:1] * count, self.rt)
            spent.append(clock.read(exact=True) / 1000)
        one, three = min(spent[:2]), spent[2]  # each sums over ranks once
        part = max((three - one) / 2, three / 12)  # at least 1/4 of the mean, if `one` was slow
        self.sums_ms = 1000 * max(0.0, one - part)
        seconds = one + part * (len(parts) * self.s.gptq_batches - 1)
        return min(1.25 * seconds, 0.1 * self.s.max_wallclock_seconds)

    def calibration(self, batches):
        """Calibration inside the clock, on the next training rows. It stops when another
        micro-batch, as long as the longest so far, and the sums over ranks would no longer fit."""
        s, began, clock = self.s, self.elapsed, StepClock(self.rt, self.elapsed)
        self.rt.log("gptq_calibration:start")

        def micro_batches(longest=0.0):
            for rows in itertools.islice(batches, s.gptq_batches):
                for part in rows.split(self.calibration_rows):
                    needed = longest + max(longest, self.sums_ms)
                    if longest and 0 < 1000 * s.max_wallclock_seconds < self.elapsed + needed:
                        self.rt.log("gptq_calibration:stopped early, MAX_WALLCLOCK_SECONDS="
                                    f"{s.max_wallclock_seconds:g} is near")
                        return
                    yield part
                    before, self.elapsed = self.elapsed, clock.read(exact=True)
                    longest = max(longest, self.elapsed - before)

        found = calibrate(self.model, micro_batches(), self.rt)
        self.elapsed = clock.read(exact=True)
        self.rt.log(f"gptq_calibration:done matrices:{len(found.hessians)} "
                    f"time:{self.elapsed - began:.0f}ms")
        return found


# ---- 13. main: settings → data → train → average → quantize → write → read back → evaluate ------

def versions(rt):
    return dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
                sentencepiece=sentencepiece.__version__,
                cuda=torch.version.cuda if rt.device.type == "cuda" else None)


def device_name(rt):
    if rt.device.type == "cuda":
        return torch.cuda.get_device_name(rt.device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def log_start(s, rt, explicit):
    """Log source, versions, GPU and every setting, so that the log alone can repeat the run."""
    gpu = ""
    if rt.device.type == "cuda" and rt.rank == 0:
        with contextlib.suppress(OSError):
            gpu = subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout
    lines = [SOURCE.decode(), "=" * 100,
             "versions: " + " ".join(f"{k} {v}" for k, v in versions(rt).items()), gpu]
    lines += [f"setting {name.upper()}={value}{'  (set)' if name.upper() in explicit else ''}"
              for name, value in vars(s).items()]
    rt.log("\n".join(lines), console=False)
    rt.log(f"run:{s.run_id} preset:{s.preset or 'none'} device:{device_name(rt)} world_size:"
           f"{rt.world_size} dtype:{str(rt.dtype).removeprefix('torch.')} "
           f"compile:{int(rt.compile)} seed:{s.seed}")


def log_shape(s, log):
    """Parameters by kind, what a step holds, what adapts at test time."""
    counts = parameter_counts(s)
    log("parameters: " + " ".join(f"{kind}:{n}" for kind, n in counts.items()))
    log(f"model_params:{sum(counts.values())}")
    log(f"XSA:last_{s.xsa_last_n} active_layers:{[p.block for p in pass_list(s) if p.xsa]}")
    log(f"tokens_per_step:{s.train_batch_tokens} rows:{s.train_batch_tokens // s.train_seq_len} "
        f"row_tokens:{s.train_seq_len}")
    rank, weights = f"adapters of rank {s.ttt_lora_rank}", f"weights, {s.ttt_optimizer}"
    log("TTT:" + ("off" if not s.ttt_enabled else rank if s.ttt_lora_rank else weights))


def dry_run(s, world_size):
    """Describe the run of these settings; needs no device. Opens data and tokenizer, if there."""
    say = functools.partial(printed, stream=sys.stdout)
    say(f"settings are good; preset:{s.preset or 'none'} world_size:{world_size}")
    log_shape(s, say)
    code, model = len(SHIPPED), size_forecast(s)
    room = s.artifact_budget_bytes - code
    weights = sum(parameter_counts(s).values())
    fits = "" if model <= room else (f"; coarser scales will fit the model into {room}, "
                                     f"{8 * room / weights:.2f} bits a weight")
    say(f"size: code {code} + model {model} at the finest scales (Gaussian weights) = "
        f"{code + model} of {s.artifact_budget_bytes} bytes{fits}")
    try:
        shards = [] if s.eval_only else [open_shard(path) for path in shard_paths(s, "train")]
        say(f"data: {len(shards)} training shards and {len(load_validation(s)) - 1} validation "
            f"targets in {find_upward(s.data_path)}, bytes counted from {ByteTable(s).source}")
    except UserError as problem:
        say(f"data: not ready: {problem}")


def locked(path):
    """The file at `path`, made if absent and locked until it is closed; None if another process
    holds its lock."""
    file = open(path, "a+", encoding="utf-8", errors="replace")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:  # not every file system has locks
        pass
    return file


def claim_places(s, rt, path, log_path):
    """Check before training that the outputs can be written, lock OUT_DIR for one training run and
    open the log. An older log of that name and its result get a number. Raises UserError."""
    if rt.rank:
        return
    if not s.eval_only:
        with explained(f"OUT_DIR={s.out_dir} cannot be used", "set OUT_DIR to another folder"):
            path.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(path.parent).free
            lock = path.parent / ".lock"
            rt.lock = locked(lock)
            if not rt.lock:
                raise UserError(f"OUT_DIR={s.out_dir}: another run is at work there: "
                                f"{lock.read_bytes().decode(errors='replace')}; set another "
                                "OUT_DIR, or wait for it")
        with contextlib.suppress(OSError):
            rt.lock.truncate(0)
            print(f"process {os.getpid()} on {platform.node()}, RUN_ID={s.run_id}", end="",
                  file=rt.lock, flush=True)
        if free < s.artifact_budget_bytes:
            raise UserError(f"OUT_DIR={s.out_dir}: {free} bytes free are less than ARTIFACT_BUDGET_"
                            f"BYTES={s.artifact_budget_bytes}; make room, or set another OUT_DIR")
    for place in path, log_path.with_suffix(".json"):
        if place.is_dir():
            raise UserError(f"OUT_DIR={s.out_dir}: {place} is a folder; move it away")
    if s.scores_path:
        with explained(f"SCORES_PATH={s.scores_path} cannot be written", "name another file"):
            target = user_path(s.scores_path)
            target.parent.mkdir(parents=True, exist_ok=True)
            open(target, "ab").close()
            if not target.stat().st_size:  # else an interrupted run leaves an empty file
                target.unlink()
    with explained(f"OUT_DIR: {log_path} cannot be written", "set OUT_DIR to another folder"):
        log_path.parent.mkdir(parents=True, exist_ok=True)
        name = re.compile(re.escape(log_path.stem) + r"\.(\d{1,9})\.(txt|json)")
        taken = [int(m[1]) for m in map(name.fullmatch, os.listdir(log_path.parent)) if m]
        n = 1 + max(taken, default=0)  # the highest is the newest
        if log_path.exists():
            unused = locked(log_path)
            if not unused:
                raise UserError(f"RUN_ID={s.run_id}: another run writes {log_path}; set another "
                                "RUN_ID or OUT_DIR")
            unused.close()
        for old in log_path, log_path.with_suffix(".json"):
            if old.exists():
                old.rename(old.with_suffix(f".{n}{old.suffix}"))
        rt.log_lock = locked(log_path)
    rt.log_path = log_path


def train_and_pack(model, forward, s, rt, tokens, byte_table, path):
    """Train, average, quantize, write. Returns (facts of training, {stage: result})."""
    stream = TrainStream(s)
    count = max(4128, (1 << 18) // len(stream.paths))  # tokens to check in a shard
    for file, shard in zip(stream.paths, stream.shards):
        byte_table.check_text(shard[:count], file, scored=False)
    documents, repeated = contamination(stream, tokens)
    rt.log(f"contamination:{repeated} of {documents} sampled training documents begin like "
           "documents of the validation set" + "; no training token is BOS=1" * (not documents))
    checkpoints = Checkpoints(s, rt, stream, tokens)
    if stored := rt.from_rank0(s.resume and checkpoints.exported(path)):
        rt.log(f"resume:{path} is finished, on to its evaluation")
        trained, results = stored
        return dict(trained, validation_documents_in_training=repeated), results

    def plain(label, late=True):
        scored = functools.partial(forward, late=late)
        return evaluate(scored, tokens, byte_table, s, rt, label, (s.context, s.context, 0))[0]

    rt.training = True
    trainer = Trainer(model, forward, s, rt, checkpoints)
    trainer.warm_up()
    if s.resume:
        checkpoints.resume(trainer)
    with contextlib.closing(batches_of(stream, rt, trainer.rows_per_step, trainer.step)) as reader:
        batches = itertools.chain([next(reader)], reader)  # the first is read before the clock
        rt.barrier()  # on every rank
        trainer.train(batches, lambda: plain("validation", trainer.late))
        calibration = trainer.calibration(batches) if s.gptq else None
    floating = plain("float")
    rt.log(f"DIAGNOSTIC post_ema val_loss:{floating['val_loss']:.4f} "
           f"val_bpb:{floating['val_bpb']:.4f} eval_time:{1000 * floating['seconds']:.0f}ms")
    started = time.perf_counter()
    written = write_artifact(dict(model.named_parameters()), s, rt, calibration, path)
    trained = dict(steps=trainer.step, train_tokens=trainer.step * s.train_batch_tokens,
                   train_seconds=trainer.elapsed / 1000, pack_seconds=time.perf_counter() - started,
                   validation_documents_in_training=repeated, **written)
    results = {"float": floating}
    if rt.rank == 0:
        checkpoints.export(trained, results)
    rt.training = False  # from here on a signal ends the run at once
    if rt.any_rank(rt.signal):
        rt.on_signal()
    return trained, results


def facts_of(content):
    """The entries of the result file that identify an artifact: its hash and size."""
    return dict(artifact_sha256=hashlib.sha256(content).hexdigest(), model_bytes=len(content))


def write_artifact(state, s, rt, calibration, path):
    """Rank 0 packs, checks and writes the artifact; to the temporary folder if `path` fails.
    Returns facts_of the file or raises UserError, on every rank."""
    facts = problem = None
    if rt.rank == 0:
        try:
            content = pack(state, s, s.artifact_budget_bytes - len(SHIPPED), rt.log, calibration)
            decode_artifact(content)  # what cannot be read is not written
            facts = facts_of(content)
            write_whole(path, content)
        except UserError as error:
            problem = str(error)
            if facts:
                rescue = Path(tempfile.gettempdir()) / f"{path.stem}.{os.getpid()}{path.suffix}"
                with contextlib.suppress(UserError):
                    write_whole(rescue, content)
                    problem += f"; the artifact is in {rescue}: EVAL_ONLY={rescue} scores it"
    facts, problem = rt.from_rank0((facts, problem))
    if problem:
        raise UserError(problem)
    return facts


def warm_up_evaluations(model, forward, s, rt, tokens):
    """Compile what the evaluations run, on random tokens, before the artifact is opened."""
    if not rt.compile:
        return
    started, plain = time.perf_counter(), (s.context, s.context, 0)
    tokens = np.random.default_rng(0).integers(s.vocab_size, size=len(tokens), dtype=np.uint16)
    for shape in [plain, s.scoring_shape] if s.eval_stride else [plain]:
        Scorer(forward, tokens, shape, s, rt).warm_up()
    if s.ttt_enabled:
        ttt = chosen_ttt(model, forward, s, rt)
        scorer = Scorer(forward, tokens, s.ttt_shape, s, rt, **ttt.scorer_options(len(tokens) - 1))
        ttt.warm_up(scorer)
        if base := base_model(forward, scorer, s, rt):
            base.scorer.warm_up()
        model.requires_grad_(True)
    rt.synchronize()
    rt.log(f"compile:evaluation {time.perf_counter() - started:.1f}s before the evaluation's clock")


def run_evaluations(model, forward, path, s, rt, tokens, byte_table, opened, sha256=""):
    """Read the artifact from disk and score it: plain, full context, TTT. Returns {stage: result}
    and the last ledger. Raises UserError if the file has another SHA-256, LedgerError."""
    load_quantized(model, read_artifact(path, sha256)[1], path)
    final, (length, stride, band), results = f"final_{s.quant_label}_", s.scoring_shape, {}
    stages = [(s.quant_label, final + "roundtrip", (s.context, s.context, 0), "")]
    if band:
        note = f"segment:{stride} prefix:{length - stride} "
        stages.append(("banded", final + "banded", s.scoring_shape, note))
    elif stride:
        stages.append(("sliding", final + "sliding_window", s.scoring_shape, f"stride:{stride} "))
    if s.ttt_enabled:
        stages.append(("ttt", "legal_ttt", s.ttt_shape, ""))
    for stage, key, shape, note in stages:
        ttt = chosen_ttt(model, forward, s, rt) if stage == "ttt" else None
        try:
            r, ledger = evaluate(forward, tokens, byte_table, s, rt, stage, shape, ttt, opened)
        except LedgerError as problem:
            hint = f"; lower TTT_LR={s.ttt_lr}?" if ttt else ""
            raise LedgerError(f"{path}, {stage}: {problem}{hint}") from problem
        results[stage] = r
        for suffix, digits in (("", 4), ("_exact", 8)):
            rt.log(f"{key}{suffix} val_loss:{r['val_loss']:.{digits}f} "
                   f"val_bpb:{r['val_bpb']:.{digits}f} {note}eval_time:{1000 * r['seconds']:.0f}ms")
    return results, ledger


def report(s, rt, path, trained, results, ledger, eval_seconds):
    """Write the result file and the log's last lines: what a reviewer checks."""
    last, code, model = list(results.values())[-1], len(SHIPPED), trained["model_bytes"]
    peak = (torch.cuda.max_memory_allocated() if rt.device.type == "cuda" else
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            * (1 if sys.platform == "darwin" else 1024))
    repeated, total = trained["validation_documents_in_training"], code + model
    violations = [f"{name} {value:,} exceeds {limit:,}" for name, value, limit in (
        ("total_bytes", total, 16_000_000), ("eval_seconds", eval_seconds, 600),
        ("train_seconds", trained["train_seconds"], 600)) if value > limit]
    if repeated:
        violations.append(f"{repeated} sampled training documents begin like documents of the "
                          "validation set")
    if 0 < s.val_limit_tokens < last["targets"] + s.train_seq_len:  # less than a row is cut always
        violations.append(f"VAL_LIMIT_TOKENS={s.val_limit_tokens}: not the whole validation set")
    if s.eval_only:
        violations.append("EVAL_ONLY: the training was another run's, not checked here")
    result = dict(
        preset=s.preset, settings=vars(s), seed=s.seed, world_size=rt.world_size,
        device=device_name(rt), versions=versions(rt),
        code_sha256=hashlib.sha256(SHIPPED).hexdigest(), code_bytes=code, total_bytes=total,
        model_params=sum(parameter_counts(s).values()), **trained, eval_seconds=eval_seconds,
        scored_targets=last["targets"], scored_bytes=last["bytes"], bytes_from=last["bytes_from"],
        peak_memory_bytes=peak, val_loss={stage: r["val_loss"] for stage, r in results.items()},
        val_bpb={stage: r["val_bpb"] for stage, r in results.items()},
        ledger_sha256=last["sha256"], artifact=str(path), violations=violations)
    label = f"{s.quant_label}+{s.codec}"
    for line in (f"peak memory allocated: {peak // 2**20} MiB",
                 f"Serialized model {label}: {model} bytes",
                 f"Code size: {code} bytes",
                 f"Total submission size {label}: {total} bytes of {s.artifact_budget_bytes}",
                 f"code_sha256:{result['code_sha256']}",
                 f"seconds: train {trained['train_seconds']:.1f} of {s.max_wallclock_seconds:g}, "
                 f"pack {trained['pack_seconds']:.1f}, evaluation {eval_seconds:.1f}",
                 f"ledger: targets:{last['targets']} bytes:{last['bytes']} loss_sum:"
                 f"{last['loss_sum']:.6f} sha256:{last['sha256']}",
                 *(f"not a legal record: {line}" for line in violations)):
        rt.log(line)
    if rt.rank == 0:
        logs = user_path(s.out_dir) / "logs"
        write_whole(logs / f"{s.run_id}.json", json.dumps(result, indent=1).encode())
        if s.scores_path:
            buffer = io.BytesIO()
            np.save(buffer, ledger.nll)
            write_whole(s.scores_path, buffer.getvalue())


def settings_of_artifact(path, environ, world_size=1):
    """(Settings, names set explicitly) for EVAL_ONLY: those stored in the file; explicit variables
    may change all but OF_TRAINING. Raises UserError."""
    stored, tensors, _ = read_artifact(path)
    for name, value in stored.items():
        with explained(f"{path}: holds {name}={value}", "score it with the script that made it",
                       ValueError):
            if name not in TYPES or name in NOT_STORED:  # such as OUT_DIR
                raise ValueError("no artifact of this script has that")
            stored[name] = parse_value(name, value)
    s, explicit = resolve_settings(environ, stored, world_size)
    absent = [name.upper() for name, (section, _) in DESCRIBED.items()
              if section == "Model" and name not in stored and name.upper() not in explicit]
    if absent:
        raise UserError(f"{path}: made by an earlier version that did not store "
                            f"{', '.join(absent)}: set each; where it had none to 0, a list to "
                            "empty")
    other = [f"{name.upper()}={stored[name]}, not {getattr(s, name)}" for name in OF_TRAINING
             if stored.get(name, getattr(s, name)) != getattr(s, name)]
    if other:
        raise UserError(f"EVAL_ONLY={path}: made with other settings: {'; '.join(other)}; "
                        "unset these")
    check_shapes(parameter_shapes(s), tensors, path)
    return s, explicit


def run_job(s, rt, explicit):
    """The whole job, in the order the data flows."""
    tokens, byte_table = load_validation(s), ByteTable(s)
    if not byte_table.count(tokens[:1 << 20]):
        raise UserError(f"DATA_PATH={s.data_path}: the first tokens of fineweb_val_* decode to no "
                        f"bytes with TOKENIZER_PATH={s.tokenizer_path}")
    byte_table.check_text(tokens, f"DATA_PATH={s.data_path}: validation")
    s = replace(s, run_id=s.run_id or str(uuid.uuid4()))
    out = user_path(s.out_dir)
    path = user_path(s.eval_only) if s.eval_only else out / "final_model.ptz"
    claim_places(s, rt, path, out / "logs" / f"{s.run_id}.txt")
    log_start(s, rt, explicit)
    log_shape(s, rt.log)
    if rt.compile:
        with explained("torch.compile does not work here", "mend it, or set COMPILE=0, which is "
                       "several times slower on a GPU", Exception):
            rt.compiled(lambda x: x * 2 + 1)(torch.ones(8, device=rt.device))
    model, names = build_model(s, rt)
    rt.log(" ".join(f"{part}:{name}" for part, name in names.items())
           + f" validation_targets:{len(tokens) - 1} bytes_from:{byte_table.source}")
    forward = rt.compiled(model)
    if s.eval_only:
        trained, results = dict(steps=0, train_tokens=0, train_seconds=0.0, pack_seconds=0.0,
                                validation_documents_in_training=0,
                                **rt.from_rank0(facts_of(path.read_bytes()))), {}
    else:
        trained, results = train_and_pack(model, forward, s, rt, tokens, byte_table, path)
    # Artifact and result keep 0 (automatic), so another validation set gets its own chunk.
    chunk = s.ttt_chunk_tokens or max(s.least_chunk, min(32768, len(tokens) // 64))
    resolved = replace(s, ttt_chunk_tokens=chunk)
    warm_up_evaluations(model, forward, resolved, rt, tokens)
    opened = time.perf_counter()
    scored, ledger = run_evaluations(model, forward, path, resolved, rt, tokens, byte_table, opened,
                                     trained["artifact_sha256"])
    seconds = time.perf_counter() - opened
    report(s, rt, path, trained, {**results, **scored}, ledger, seconds)


def main(argv, environ):
    """Exit status: 0 done; 2 an explained error; 130 interrupted (training saves its state)."""
    unknown = [a for a in argv if a not in ("--help", "-h", "--dry-run")]
    if unknown or "--help" in argv or "-h" in argv:
        text = (f"{' '.join(unknown)}: settings are environment variables; the only flags are "
                "--help and --dry-run" if unknown else help_text())
        printed(text, sys.stderr if unknown else sys.stdout)
        return 2 if unknown else 0
    rt, s, rank = None, None, 0
    try:
        ranks = rank, world_size, _ = launched_ranks(environ)
        artifact = environ.get("EVAL_ONLY", "").strip()
        s, explicit = (settings_of_artifact(artifact, environ, world_size) if artifact
                       else resolve_settings(environ, None, world_size))
        if "--dry-run" in argv:
            dry_run(s, world_size)
            return 0
        with explained(f"TORCHINDUCTOR_CACHE_DIR={environ.get('TORCHINDUCTOR_CACHE_DIR', '')}: "
                       "PyTorch's compiler cannot make its cache",
                       "set it to a folder that can be written"):
            torch._dynamo.config.cache_size_limit = 64  # imports it, which makes the folder
        rt = Runtime(s, ranks)
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # under nohup
                signal.signal(number, rt.on_signal)
        run_job(s, rt, explicit)
        rt.close()
        return 0
    except KeyboardInterrupt as problem:
        text = str(problem) or "interrupted"
        rt.log(text) if rt else printed(text, sys.stdout)
        return 130
    except (UserError, LedgerError, torch.OutOfMemoryError) as problem:
        if rank:  # if all ranks fail, rank 0 prints, and torchrun ends the others meanwhile
            time.sleep(5)
        if isinstance(problem, torch.OutOfMemoryError):
            problem = ("GPU memory ran out; lower MICRO_BATCH_TOKENS="
                       f"{s.micro_batch_tokens} (training; 32768 should suit 24 GB) or "
                       f"EVAL_BATCH_SEQS={s.eval_batch_seqs} (scoring and TTT): {problem}")
        printed(f"error{f' on rank {rank}' if rank else ''}: {problem}", sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
