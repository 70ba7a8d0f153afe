"""Launches and bytes of a training pass of one of 8 H100s, counted without a GPU.

    PYTHONPATH=<kit> <kit>/offline tests/bench/traffic.py [PRESET=sp1024 NAME=VALUE ...]

The kit is not part of this repository. Its `offline` is an interpreter with the CUDA build of
PyTorch that takes a machine without a GPU for an H100. Its module `measure` compiles a function
and stops before a kernel is loaded. The model is as in training: with the late passes, with
FlashAttention and the MLP's Triton kernel, in bf16. GB are what generated kernels read and write,
outside of products, attention and the MLP's kernel. A minute each on a free core; no time is
measured.
"""
import sys
from pathlib import Path

import measure
import torch

measure.NEEDED, measure.FIELDS = ("resolve_settings", "GPT", "Kernels"), ()


def main(*assignments):
    measure.be_an_h100()
    script = measure.load(Path(__file__).resolve().parents[2] / "train_gpt.py")
    s = script.resolve_settings(dict(DEVICE="cuda", **dict(a.split("=") for a in assignments)))[0]
    kernels = script.Kernels(*script.attention_kernel("flash"), script.LeakySquareMLP.apply)
    model = measure.on_device(script.GPT(s, torch.bfloat16, kernels))
    rows = torch.empty(s.train_batch_tokens // 8 // s.train_seq_len, s.train_seq_len + 1,
                       dtype=torch.int64, device="cuda")
    parts = measure.measured(model, (rows[:, :-1], rows[:, 1:])).values()
    print(f"| {' '.join(assignments) or 'default'} | {sum(part[0] for part in parts)} | "
          f"{sum(part[1]['compiled'] for part in parts) / 1e9:.2f} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
