"""What the exporter makes of real weights: every way to choose steps, at equal bytes, and what
coding them costs.

    python tests/bench/artifact.py out/final_model.ptz --data data/datasets/mix_sp1024 \\
        [--targets 65536] [--log out.txt]

The weights come from an artifact whose tensors are all fp16, as a run leaves it with
FP16_KEEP_NAME_PATTERNS=cores,emb,table,proj,blocks,gram and a large ARTIFACT_BUDGET_BYTES.
Calibration uses training rows; scores are taken on the first --targets validation tokens, rows of
the training length, and choose nothing.
"""
from __future__ import annotations

import argparse
import io
import lzma
import math
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "records")]
import train_gpt as T  # noqa: E402
from artifact import entropy_bits, pack_code  # noqa: E402

ANCESTOR = dict(attn_bits=6, mlp_bits=6, proj_bits=16, quant_fit="scale", quant_clip="row")
SDCLIP = dict(ANCESTOR, quant_clip="std", attn_clip_sigmas=4.0, mlp_clip_sigmas=4.0,
              embed_clip_sigmas=8.0)
SIX = dict(attn_bits=6, mlp_bits=6)
SCHEMES = {  # name: (settings, calibrated)
    "ancestors: GPTQ-lite by row, floor 1/31": (dict(ANCESTOR, quant_step_floor=1 / 31), False),
    "GPTQ-lite by row": (ANCESTOR, False),
    "SDClip, k fitted": (SDCLIP, False),
    "full GPTQ, row maximum": (dict(ANCESTOR, quant_clip="max"), True),
    "full GPTQ, SDClip, k fitted": (SDCLIP, True),
    "level by squared error": ({}, False),
    "level by what errors cost, int6 range": (SIX, True),
    "level by what errors cost (default)": ({}, True),
}
# Settings of the exporter, at their defaults whatever the run had.
EXPORT = ("attn_bits", "mlp_bits", "proj_bits", "quant_fit", "codec", "artifact_budget_bytes",
          "gptq", "quant_clip", "prune_frac", "fp16_keep_name_patterns")


def quantiles(values):
    levels = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
    return " ".join(f"{q:.4f}" for q in np.quantile(values.numpy(), levels))


def ancestors_bytes(tensors):
    """The same codes in the ancestors' container: torch.save of int8 codes and fp16 steps, lzma
    preset 6."""
    saved = {}
    for name, t in tensors.items():
        saved.update({name: t.codes} if t.bits == 16 else
                     {f"{name}.q": t.codes, f"{name}.scale": t.steps.half()})
    buffer = io.BytesIO()
    torch.save({"w": saved, "m": {name: t.bits for name, t in tensors.items()}}, buffer)
    return len(lzma.compress(buffer.getvalue(), preset=6))


def load(arguments):
    """(settings, runtime, model, weights, validation tokens, byte table, calibration, seconds that
    it took)."""
    stored, tensors, _ = T.read_artifact(arguments.artifact)
    environ = dict(DATA_PATH=str(arguments.data), TOKENIZER_PATH=str(arguments.tokenizer),
                   VAL_LIMIT_TOKENS=str(arguments.targets))
    stored = {k: v for k, v in stored.items() if k in T.Settings.__dataclass_fields__}
    s = replace(T.resolve_settings(environ, stored)[0], eval_batch_seqs=16,
                **{k: getattr(T.Settings(), k) for k in EXPORT})
    rt = T.Runtime(s)
    model = T.build_model(s, rt)[0]
    T.load_quantized(model, tensors, arguments.artifact)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    stream, started = T.TrainStream(s), time.perf_counter()
    first = stream.epoch_rows - arguments.calibration_rows  # rows that a short run did not reach
    calibration = T.calibrate(model, stream.rows(first, stream.epoch_rows).split(8), rt)
    seconds = time.perf_counter() - started
    return s, rt, model, weights, T.load_validation(s), T.ByteTable(s), calibration, seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path,
                        default=ROOT / "data/tokenizers/fineweb_1024_bpe.model")
    parser.add_argument("--targets", type=int, default=65536)
    parser.add_argument("--calibration-rows", type=int, default=128)
    parser.add_argument("--share", type=float, default=1.0,
                        help="of the bytes that 4.75 bits a weight take")
    parser.add_argument("--spread-seeds", type=int, default=10)
    parser.add_argument("--log", type=Path)
    arguments = parser.parse_args()
    lines = []

    def say(line=""):
        print(line, flush=True)
        lines.append(line)
        if arguments.log:
            arguments.log.write_text("\n".join(lines) + "\n")

    s, rt, model, weights, tokens, byte_table, calibration, seconds = load(arguments)
    count = sum(w.numel() for w in weights.values())
    say(f"{count} weights; calibration on {arguments.calibration_rows} rows of "
        f"{s.train_seq_len}: {seconds:.0f} s; torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads")
    matrices = [w for name, w in weights.items() if T.kind_of(name).kind in ("attn", "mlp")]
    deviations, maxima = (torch.cat(x) for x in zip(*((w.std(1), w.abs().amax(1))
                                                      for w in matrices)))
    say(f"row deviation, quantiles 0 5 25 50 75 95 100 %: {quantiles(deviations)}")
    say(f"row maximum ÷ deviation: {quantiles(maxima / deviations)}")

    def scored(tensors, label):
        T.load_quantized(model, tensors, label)
        return T.evaluate(model, tokens, byte_table, s, rt, label, (s.window, s.window, 0),
                          kernels=model.kernels)[0]["val_bpb"]

    exact = scored({name: T.Quantized(16, w) for name, w in weights.items()}, "float")
    code = len(pack_code((ROOT / "train_gpt.py").read_bytes()))
    budget = 16_000_000 - code if s.model_dim >= 512 else count * 4.75 / 8
    budget = int(arguments.share * budget)
    say(f"float: {exact:.6f} bpb on {len(tokens) - 1} targets; every file at most {budget} bytes "
        f"(packed code: {code})")
    say()
    say(f"{'steps':<42} {'bytes':>10} {'bpb':>9} {'− float':>9} {'squared error':>13} "
        f"{'codes ÷ H0':>10} {'pack s':>7} {'read s':>7}")
    for name, (changes, calibrated) in SCHEMES.items():
        notes, started = [], time.perf_counter()
        content = T.pack(weights, replace(s, **changes), budget, notes.append,
                         calibration if calibrated else None)
        packed, started = time.perf_counter() - started, time.perf_counter()
        tensors = T.decode_artifact(content)[1]
        read = time.perf_counter() - started
        error = sum(float((w - tensors[n].weights()).square().sum()) for n, w in weights.items())
        blocks = [t.codes.numpy() for t in tensors.values() if t.bits < 16]
        entropy = sum(map(entropy_bits, blocks)) / 8
        coded = len(T.open_artifact(content)[3]) / entropy
        bpb = scored(tensors, name)
        say(f"{name:<42} {len(content):>10} {bpb:>9.6f} {bpb - exact:>+9.6f} {error:>13.1f} "
            f"{coded:>10.4f} {packed:>7.1f} {read:>7.1f}")
        for note in notes:
            print("   ", note, flush=True)
    say()
    symbols = np.frombuffer(b"".join(block.tobytes() for block in blocks), np.uint8) ^ 0x80
    for codec in ("rans", "lzma", "zstd"):
        started = time.perf_counter()
        size = len(T.CODECS[codec][0](symbols, blocks))
        say(f"codes of the last row by {codec}: {size} bytes, {size / entropy:.4f} of their "
            f"order-0 entropy, {time.perf_counter() - started:.1f} s")
    old = ancestors_bytes(tensors)
    say(f"the same codes in torch.save and lzma preset 6: {old} bytes, ours {len(content)}: "
        f"{old - len(content)} saved")
    generator = np.random.default_rng(0)
    for seed in range(arguments.spread_seeds):
        spread, changed = math.exp(generator.normal(0, 0.7)), dict(weights)
        for n, w in weights.items():
            if w.ndim == 2:
                rows = np.exp(generator.normal(0, 0.1 * seed, (len(w), 1))).astype(np.float32)
                changed[n] = w * spread * torch.from_numpy(rows)
        started, content = time.perf_counter(), T.pack(changed, s, budget)
        say(f"seed {seed}: weights × {spread:.3f}, rows × e^N(0, {0.1 * seed:.1f}): "
            f"{len(content)} bytes, {100 * (1 - len(content) / budget):.3f} % left, "
            f"{time.perf_counter() - started:.1f} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    say(f"peak memory {peak:.2f} GiB")


if __name__ == "__main__":
    main()
