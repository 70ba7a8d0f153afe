"""What the exporter makes of real weights: every way to choose steps, at equal bytes, and what
coding them costs.

    python tests/bench/artifact.py out/final_model.ptz --data data/datasets/mix_sp1024 \\
        [--targets 65536] [--log out.txt]

The weights come from an artifact whose tensors are all fp16, as a run leaves it with
FP16_KEEP_NAME_PATTERNS=cores,emb,table,proj,blocks,gram,mixers and a large ARTIFACT_BUDGET_BYTES.
Calibration uses training rows; scores are taken on the first --targets validation tokens, rows of
the training length, and choose nothing.

    [SCRIPT_DIR=<folder of another train_gpt.py>] python tests/bench/artifact.py synthetic

times the packing and reading of the default model with drawn weights and inputs; no data is needed.
"""
from __future__ import annotations

import argparse
import io
import lzma
import math
import os
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [os.environ.get("SCRIPT_DIR", str(ROOT)), str(ROOT / "records")]
import train_gpt as T  # noqa: E402
from artifact import entropy_bits, pack_code  # noqa: E402

ANCESTOR = dict(attn_bits=6, mlp_bits=6, proj_bits=16, quant_fit="scale", quant_clip="row")
SDCLIP = dict(ANCESTOR, quant_clip="std", attn_clip_sigmas=4.0, mlp_clip_sigmas=4.0,
              embed_clip_sigmas=8.0)
SIX, LEVEL = dict(attn_bits=6, mlp_bits=6), dict(quant_fit="level")
SCHEMES = {  # name: (settings, calibrated)
    "ancestors: GPTQ-lite by row, floor 1/31": (dict(ANCESTOR, quant_step_floor=1 / 31), False),
    "GPTQ-lite by row": (ANCESTOR, False),
    "SDClip, k fitted": (SDCLIP, False),
    "full GPTQ, row maximum": (dict(ANCESTOR, quant_clip="max"), True),
    "full GPTQ, SDClip, k fitted": (SDCLIP, True),
    "level by squared error": (LEVEL, False),
    "level by what errors cost, int6 range": (dict(SIX, **LEVEL), True),
    "level by what errors cost": (LEVEL, True),
    "trellis, level by what errors cost (default)": ({}, True),
}


def sdclip(k, k_mlp, k_table, table_bits, calibrated=True):
    """SDClip as on the record line: matrices of 6 bits clipped at k and k_mlp deviations, the table
    at k_table. One number that fits the bytes multiplies all steps: it starts at a third."""
    return dict(attn_bits=6, mlp_bits=6, embed_bits=table_bits, proj_bits=8, quant_fit="scale",
                quant_clip="std", attn_clip_sigmas=k / 3, mlp_clip_sigmas=k_mlp / 3,
                embed_clip_sigmas=k_table / 3, gptq_act_order=1), calibrated


LOW_SCHEMES = {
    "SDClip of #1394, no GPTQ": sdclip(12.85, 12.85, 20, 8, False),
    "GPTQ + SDClip of #1394 and #1493": sdclip(12.85, 12.85, 20, 8),
    "the same, its table of 7 bits": sdclip(12.85, 12.85, 20, 7),
    "GPTQ + SDClip of #1855": sdclip(13, 11.5, 14, 7),
    "level by squared error, no GPTQ": (LEVEL, False),
    "level by what errors cost, no GPTQ": (dict(gptq=0, **LEVEL), True),
    "level by what errors cost": (LEVEL, True),
    "trellis, no GPTQ": (dict(gptq=0), True),
    "trellis, level by what errors cost (default)": ({}, True),
}
# Settings of the exporter, at their defaults whatever the run had.
EXPORT = ("attn_bits", "mlp_bits", "proj_bits", "quant_fit", "codec", "artifact_budget_bytes",
          "gptq", "quant_clip", "prune_frac", "fp16_keep_name_patterns", "embed_bits",
          "bigram_bits", "gptq_act_order")


def quantiles(values):
    levels = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
    return " ".join(f"{q:.4f}" for q in np.quantile(values.numpy(), levels))


def ancestors_bytes(tensors):
    """The same codes in the ancestors' container: torch.save of int8 codes and fp16 steps, lzma
    preset 6."""
    saved = {}
    for name, t in tensors.items():
        saved.update({name: t.codes} if t.bits == 16 else
                     {f"{name}.q": t.codes, f"{name}.scale": t.scales.half()})
    buffer = io.BytesIO()
    torch.save({"w": saved, "m": {name: t.bits for name, t in tensors.items()}}, buffer)
    return len(lzma.compress(buffer.getvalue(), preset=6))


def drawn(s):
    """(weights, calibration) of a model of these settings: Gaussian rows of unequal scale, inputs
    that hang together, energies that differ by row and column."""
    generator = torch.Generator().manual_seed(0)
    weights, hessians, energies, inputs = {}, {}, {}, {}

    def spread(count, deviation):
        return (deviation * torch.randn(count, generator=generator)).exp()

    for name, shape in T.parameter_shapes(s).items():
        weights[name], kind = torch.randn(shape, generator=generator), T.kind_of(name)
        if kind.bits:
            rows, columns = shape
            weights[name] *= 0.02 * spread(rows, 0.3)[:, None] * spread(columns, 0.2)
            energies[name] = spread(rows, 1.5), spread(columns, 1.0)
            if kind.calibrated:
                if columns not in inputs:
                    mixed = torch.randn(columns, columns, generator=generator) / columns**0.5
                    x = torch.randn(3 * columns, columns, generator=generator)
                    inputs[columns] = x + 2 * (x * spread(columns, 1.0)) @ mixed
                x = inputs[columns] * spread(columns, 0.5)
                hessians[name] = x.T @ x
    return weights, T.Calibration(hessians, energies)


def packing(say):
    """Seconds of wall time and of processor time that packing and reading the default model take,
    and what every try of it cost."""
    s = T.Settings()
    weights, calibration = drawn(s)
    count, budget = sum(w.numel() for w in weights.values()), 16_000_000 - 48_000
    say(f"{count} weights, {8 * budget / count:.2f} bits each; torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads")
    tries, encode = [], T.encode_artifact

    def counted(*arguments):
        content = encode(*arguments)
        tries.append((time.perf_counter(), len(content)))
        return content

    T.encode_artifact = counted

    def timed(label, function, *arguments):
        wall, cpu = time.perf_counter(), time.process_time()
        result = function(*arguments)
        say(f"{label:<12} wall {time.perf_counter() - wall:6.1f} s"
            f"  processor {time.process_time() - cpu:6.1f} s"
            + "".join(f"\n    {budget - size:>9} bytes left after {at - wall:.1f} s"
                      for at, size in tries))
        tries.clear()
        return result

    timed("pack, plain", T.pack, weights, s, budget)
    content = timed("pack, GPTQ", T.pack, weights, s, budget, lambda line: None, calibration)
    tensors = timed("read", T.decode_artifact, content)[1]
    for inner in ("attn.q", "mlp.up", "mlp.down", "tok_emb"):
        lost = total = 0.0
        for name, hessian in calibration.hessians.items():
            if inner in name:
                w = weights[name].double()
                error = w - tensors[name].weights()
                lost += float(((error @ hessian.double()) * error).sum())
                total += float(((w @ hessian.double()) * w).sum())
        say(f"{inner:<12} error of the outputs ÷ outputs {math.sqrt(lost / total):.5f}")
    say(f"{100 * (1 - len(content) / budget):.3f} % of {budget} bytes left")


def low_bits(bits, s, weights, calibration, scored, exact, say):
    """A table for each size of the file: what LOW_SCHEMES lose, and the multiples of the deviation
    at which SDClip came to clip."""
    bare = T.Calibration({}, calibration.energies)
    for each in bits:
        budget = int(each * sum(w.numel() for w in weights.values()) / 8)
        say(f"\nat most {budget} bytes, {each:.2f} bits a weight")
        say(f"{'steps':<42} {'bytes':>9} {'bpb':>9} {'− float':>9}  {'k, table':>12}")
        for name, (changes, calibrated) in LOW_SCHEMES.items():
            rule = replace(s, **changes)
            content = T.pack(weights, rule, budget, calibration=(
                None if not calibrated else calibration if rule.gptq else bare))
            _, tensors, note = T.decode_artifact(content)
            level, bpb = max(float(note.split()[-1]), 1.0), scored(tensors, name)
            fitted = (f"{level * rule.attn_clip_sigmas:.1f} {level * rule.embed_clip_sigmas:.1f}"
                      if rule.quant_clip == "std" else "")
            say(f"{name:<42} {len(content):>9} {bpb:>9.6f} {bpb - exact:>+9.6f}  {fitted:>12}")


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
    parser.add_argument("--data", type=Path, help="shards; needed but for `synthetic`")
    parser.add_argument("--tokenizer", type=Path,
                        default=ROOT / "data/tokenizers/fineweb_1024_bpe.model")
    parser.add_argument("--targets", type=int, default=65536)
    parser.add_argument("--calibration-rows", type=int, default=128)
    parser.add_argument("--share", type=float, default=1.0,
                        help="of the bytes that 4.75 bits a weight take")
    parser.add_argument("--bits", type=float, nargs="+",
                        help="bits of the file for each weight: instead of --share, the rules of "
                             "the record line beside ours at each of these")
    parser.add_argument("--spread-seeds", type=int, default=10)
    parser.add_argument("--log", type=Path)
    arguments = parser.parse_args()
    lines = []

    def say(line=""):
        print(line, flush=True)
        lines.append(line)
        if arguments.log:
            arguments.log.write_text("\n".join(lines) + "\n")

    if str(arguments.artifact) == "synthetic":
        return packing(say)
    if not arguments.data:
        parser.error("--data: name the folder of shards to calibrate and score on")
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
        shape = s.context, s.context, 0
        return T.evaluate(model, tokens, byte_table, s, rt, label, shape)[0]["val_bpb"]

    exact = scored({name: T.Quantized(16, w) for name, w in weights.items()}, "float")
    code = len(pack_code((ROOT / "train_gpt.py").read_bytes()))
    budget = 16_000_000 - code if s.model_dim >= 512 else count * 4.75 / 8
    if arguments.bits:
        say(f"float: {exact:.6f} bpb on {len(tokens) - 1} targets")
        return low_bits(arguments.bits, s, weights, calibration, scored, exact, say)
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
