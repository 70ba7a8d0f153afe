"""Seconds of the evaluation on 8×H100 by arithmetic: counted work over assumed rates.

    python tests/bench/forecast.py                  # the default; other settings work as well
    TTT_LORA_RANK=0 python tests/bench/forecast.py  # weights adapted chunk by chunk instead

Counted from the settings: tokens that each part reads, FLOPs of products and attention, passes.
Launches and bytes of a pass outside of products and attention come from results/traffic_sm90.md.
Every assumption is printed beside the table. Nothing here is measured.
"""
import math
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt  # noqa: E402

RANKS = 8
TARGETS = {1024: 62_021_632, 8192: 40_540_160}  # of the official validation set, by vocabulary
PRODUCTS = 0.50 * 989e12   # FLOP/s of bf16 products of these sizes
ATTENTION = 0.35 * 989e12  # FLOP/s of causal attention
MEMORY = 0.80 * 3.35e12    # bytes/s
LAUNCH = 6e-6              # s of the host for a kernel of a compiled graph
LINKS = 350e9              # bytes/s of a sum over ranks
# Of the host between the passes of a chunk of TTT, from one CPU core: s of the ledger's records of
# 256 streams, of the rows of 32 streams, of mixing with the base model, of mixing guesses (45 eager
# operators). Weights, which have one stream, are given the same.
RECORDS, ROWS, BASE, GUESSES = 0.3e-3, 0.5e-3, 0.2e-3, 0.8e-3
# Times that a step reads or writes all numbers of a stream's adapters: 3 for their gradients, 2 for
# the rule of the rate, 5 for AdamW. A batch holds all streams of a rank, so nothing is gathered.
UPDATE_PASSES = 10
# (launches, bytes a token) of a pass of the default with its late passes (traffic_sm90.md): of
# scoring with adapters, of their gradients, of the gradients of weights.
SCORING, ADAPTING, TRAINING = ((336, 30.06e9 / (32 * 2080)), (454, 27.94e9 / (32 * 1056)),
                               (508, 85.80e9 / (48 * 2048)))


def seconds_of(s, tokens, heads, passes, keys, kind):
    """(seconds, GPU seconds) of one rank for `tokens` in so many passes, `keys` seen by a query;
    `heads`: of how many of them logits are computed."""
    shapes, order = train_gpt.parameter_shapes(s), train_gpt.pass_list(s, late=True)
    core = sum(math.prod(shape) for name, shape in shapes.items()
               if name.startswith("cores.0.") and len(shape) == 2)
    factor = {SCORING: 1, ADAPTING: 2, TRAINING: 3}[kind]
    products = 2 * (core * len(order) * tokens + s.vocab_size * s.model_dim * heads) * factor
    attention = 4 * keys * s.model_dim * len(order) * tokens * (1 if kind == SCORING else 3.5)
    launches, size = kind
    work = products / PRODUCTS + attention / ATTENTION + size * tokens / MEMORY
    return max(work, passes * launches * LAUNCH), work


def parts(s):
    """(name, tokens over all ranks, seconds, GPU seconds) of each part; the host's have none."""
    targets = TARGETS[s.vocab_size]
    batch = max(1, s.eval_batch_seqs * s.context // s.scoring_shape[0])
    mine = targets / RANKS

    def scored(length, stride, band=0):
        tokens = mine * length / stride
        passes, keys = tokens / (batch * length), band or length / 2
        return tokens * RANKS, *seconds_of(s, tokens, mine, passes, keys, SCORING)

    yield "plain", *scored(s.context, s.context)
    yield "full context", *scored(*s.scoring_shape)
    if not s.ttt_enabled:
        return
    length, stride, _ = s.ttt_shape
    yield "scoring of TTT", *scored(*s.ttt_shape)
    chunk, base = s.ttt_chunk_tokens or 32768, s.ttt_lora_rank and s.ttt_base_weight
    if s.ttt_lora_rank:  # a chunk has a stride of each stream
        chunk = stride * min(s.ttt_batch_seqs, targets // (16 * length))
    if base:
        yield "the base model beside adapters", *scored(*s.base_shape)
    yield "the host between passes", 0, targets / chunk * (RECORDS + ROWS + bool(base) * BASE), 0
    if s.eval_match:
        yield "mixing of guesses", 0, targets / chunk * GUESSES, 0
    if s.ttt_lora_rank:  # forward again, and the gradients of activations and adapters alone
        length = min(length, s.context // 2 + stride)
        tokens = mine * length / stride
        busy, work = seconds_of(s, tokens, mine, tokens / (batch * s.context), length / 2, ADAPTING)
        sites = [(s.model_dim, s.model_dim)] * 2 * len(train_gpt.pass_list(s, late=True))
        numbers = s.ttt_lora_rank * sum(map(sum, [*sites, (s.vocab_size, s.model_dim)]))
        # Of each stream's adapters and their state, once per step: each stream takes a step.
        update = mine / stride * 4 * numbers * UPDATE_PASSES / MEMORY
        yield "adapting of TTT", tokens * RANKS, busy + update, work + update
        return
    epochs = s.ttt_epochs if s.ttt_epochs >= 0 else 10
    steps = targets / chunk * epochs
    counts = sum(train_gpt.parameter_counts(s).values())
    trained = mine * epochs
    busy, work = seconds_of(s, trained, trained, steps, s.train_seq_len / 2, TRAINING)
    update = steps * (4 * counts / LINKS * 2 + 5 * 4 * counts / MEMORY)
    yield "adapting of TTT", targets * epochs, busy + update, work + update


def main(environ):
    s = train_gpt.resolve_settings(environ)[0]
    if s.vocab_size not in TARGETS:
        sys.exit(f"VOCAB_SIZE={s.vocab_size}: the official targets are known for "
                 f"{', '.join(map(str, TARGETS))} alone; choose such a preset")
    print(f"assumed: products {PRODUCTS / 1e12:.0f} TFLOP/s, attention {ATTENTION / 1e12:.0f}, "
          f"memory {MEMORY / 1e12:.2f} TB/s, {LAUNCH * 1e6:.0f} us a launch, links "
          f"{LINKS / 1e9:.0f} GB/s; a chunk of TTT: {RECORDS * 1e3} ms of the host for records, "
          f"{ROWS * 1e3} for rows, {BASE * 1e3} for mixing with the base model, {GUESSES * 1e3} "
          "for guesses; launches and kB a token: " + ", ".join(
              f"{name} {launches} and {size / 1e3:.0f}" for name, (launches, size) in dict(
                  scoring=SCORING, adapting=ADAPTING, training=TRAINING).items()))
    print("| part | tokens, millions | seconds | of it the GPU works |\n|---|---|---|---|")
    total = 0.0
    for name, tokens, seconds, work in parts(s):
        total += seconds
        counted = f"{tokens / 1e6:.0f}" if tokens else "–"
        part = f"{100 * work / seconds:.0f} %" if tokens else "–"
        print(f"| {name} | {counted} | {seconds:.1f} | {part} |")
    print(f"| all, of 600 s | | {total:.1f} | |")
    print(f"| left, {100 - total / 6:.0f} %, before what is not counted | | {600 - total:.1f} | |")


if __name__ == "__main__":
    main(dict(os.environ))
