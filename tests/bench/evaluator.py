"""Banded scoring against sliding windows, ways to adapt at test time, and guesses from the text
before, on one artifact.

    python tests/bench/evaluator.py plans out/final_model.ptz --data data/datasets/mix_sp1024
    python tests/bench/evaluator.py ttt out/final_model.ptz --data data/datasets/mix_sp1024
    python tests/bench/evaluator.py match out/final_model.ptz --data data/datasets/mix_sp1024

`plans`: bpb, seconds and tokens through the model of sliding windows (stride = window / 32) and of
banded segments with several prefixes. `ttt`: every variant gets the same seconds for scoring and
adapting on a stretch of training tokens that the run has hardly met, and says how many tokens went
forward through the model; the best one is then run once on the validation tokens. `match`: the last
training tokens, scored with a full context; what EVAL_MATCH gains there when more and more of the
training tokens count as text before them.
"""
from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import train_gpt as T  # noqa: E402

ADAPTERS = {name: getattr(T.Settings(), name) for name in ("ttt_lora_rank", "ttt_base_weight",
                                                           "ttt_lr", "ttt_batch_seqs")}
SGD = dict(ttt_lora_rank=0, ttt_optimizer="sgd", ttt_lr=0.002, ttt_epochs=3)  # over all weights
ADAMW = dict(SGD, ttt_optimizer="adamw")
MUON = dict(SGD, ttt_optimizer="muon", ttt_epochs=1)
VARIANTS = {
    "none": dict(SGD, ttt_epochs=0),
    "adapters of rank 64 (default but for guesses)": ADAPTERS,
    "the same without the base model": dict(ADAPTERS, ttt_base_weight=0.0),
    "the same of rank 8": dict(ADAPTERS, ttt_lora_rank=8, ttt_base_weight=0.0),
    "SGD 0.002, 3 epochs (#549)": SGD,
    "SGD 0.01, 3 epochs": dict(SGD, ttt_lr=0.01),
    "SGD 0.01, 3 epochs, chunks of a quarter": dict(SGD, ttt_lr=0.01, chunk_parts=4),
    "SGD 0.01, as many epochs as fit": dict(SGD, ttt_lr=0.01, ttt_epochs=-1),
    "SGD 0.01, 3 epochs, down 3×, up ½×": dict(SGD, ttt_lr=0.01, ttt_proj_lr_mult=3.0,
                                               ttt_fc_lr_mult=0.5),
    "SGD 0.03, 3 epochs (#1092)": dict(SGD, ttt_lr=0.03),
    "SGD 0.002, 30 epochs, down 3×, up ½×, cosine inside (#537)": dict(
        SGD, ttt_epochs=30, ttt_proj_lr_mult=3.0, ttt_fc_lr_mult=0.5, ttt_intra_cosine=1,
        ttt_freeze_blocks=2),
    "AdamW 1e-4, 3 epochs, last two blocks (#490)": dict(ADAMW, ttt_lr=1e-4, ttt_params="tail"),
    "AdamW 1e-4, 3 epochs": dict(ADAMW, ttt_lr=1e-4),
    "AdamW 5e-4, 3 epochs": dict(ADAMW, ttt_lr=5e-4),
    "Muon 1e-3, 1 epoch": dict(MUON, ttt_lr=1e-3),
    "Muon 5e-3, 1 epoch": dict(MUON, ttt_lr=5e-3),
    "Muon 5e-3, 1 epoch, chunks of a quarter": dict(MUON, ttt_lr=5e-3, chunk_parts=4),
    "Muon 1e-3, as many epochs as fit": dict(MUON, ttt_lr=1e-3, ttt_epochs=-1),
}


def opened(arguments, **changes):
    """(settings, runtime, model with the artifact's weights, byte table)."""
    environ = dict(DATA_PATH=str(arguments.data), TOKENIZER_PATH=str(arguments.tokenizer),
                   EVAL_ONLY=str(arguments.artifact), VAL_LIMIT_TOKENS=str(arguments.targets),
                   **changes)
    s, _ = T.settings_of_artifact(arguments.artifact, environ)
    rt = T.Runtime(s)
    model = T.build_model(s, rt)[0]
    T.load_quantized(model, T.read_artifact(arguments.artifact)[1], arguments.artifact)
    return s, rt, model, T.ByteTable(s)


def plans(arguments, say):
    window = T.settings_of_artifact(arguments.artifact, {})[0].context
    s, rt, model, table = opened(arguments, EVAL_SEQ_LEN=str(24 * window), EVAL_MATCH="0",
                                 TTT_ENABLED="0")
    s = replace(s, eval_seq_len=window)  # the model has rotary tables for the longest plan
    tokens = T.load_validation(s)
    say(f"{len(tokens) - 1} validation targets, window {window}")
    say(f"{'plan':<44} {'bpb':>9} {'seconds':>8} {'tokens read':>12} {'tokens ÷':>9} {'time ÷':>7}")
    rows = [(f"window, stride window/{part}", (window, window // part, 0)) for part in (32, 4)]
    rows += [(f"banded, segment {segment * window}, prefix {int(prefix * window)}",
              (int((prefix + segment) * window), segment * window, window))
             for segment, prefix in ((2, 0), (2, 0.5), (2, 1), (2, 2), (8, 1), (8, 4), (8, 16))]
    first = None
    for name, plan in rows:
        result = T.evaluate(model, tokens, table, s, rt, name, plan)[0]
        first = first or result
        fewer, faster = (first[key] / result[key] for key in ("tokens_read", "seconds"))
        say(f"{name:<44} {result['val_bpb']:>9.5f} {result['seconds']:>8.1f} "
            f"{result['tokens_read']:>12} {fewer:>9.1f} {faster:>7.1f}")


def adapted_score(arguments, changes, tokens, seconds):
    """(bpb before, bpb, seconds, tokens through the model) of one variant from the artifact's
    weights, which scores and adapts within `seconds`."""
    s, rt, model, table = opened(arguments, EVAL_ATTENTION="banded", EVAL_MATCH="0")
    if changes.get("ttt_params") == "tail":
        changes = dict(changes, ttt_freeze_blocks=s.num_layers - 2)
    changes = dict(changes)
    chunk = max(s.least_chunk, arguments.chunk // changes.pop("chunk_parts", 1))
    s = replace(s, eval_wallclock_seconds=seconds, ttt_chunk_tokens=chunk, **changes)
    given, read = (model, tokens, table, s, rt), []
    before = T.evaluate(*given, "before", s.scoring_shape)[0]
    model.register_forward_pre_hook(lambda _, given: read.append(given[0].numel()))
    ttt, started = T.chosen_ttt(model, model, s, rt), time.perf_counter()
    after = T.evaluate(*given, "ttt", s.ttt_shape, ttt, started)[0]
    return before["val_bpb"], after["val_bpb"], after["seconds"], sum(read)


def ttt(arguments, say):
    s = opened(arguments)[0]
    shard = np.asarray(T.TrainStream(s).shards[-1])
    held_out = shard[len(shard) - arguments.targets - 1:].copy()
    say(f"{arguments.targets} tokens at the end of the training shard, chunks of "
        f"{arguments.chunk}, {arguments.seconds:g} s each, banded")
    say(f"{'variant':<62} {'before':>8} {'after':>8} {'gain':>9} {'seconds':>8} {'forward':>10}")
    results = {}
    for name, changes in VARIANTS.items():
        before, after, seconds, read = adapted_score(arguments, changes, held_out,
                                                     arguments.seconds)
        results[name] = after
        say(f"{name:<62} {before:>8.5f} {after:>8.5f} {before - after:>+9.5f} {seconds:>8.1f} "
            f"{read:>10,}")
    best = min(results, key=results.get)
    before, after, seconds, _ = adapted_score(arguments, VARIANTS[best], T.load_validation(s),
                                              arguments.seconds)
    say(f"on the validation tokens, once, {best}: {before:.5f} → {after:.5f} in {seconds:.1f} s")


def match(arguments, say):
    s, rt, model, byte_table = opened(arguments)
    tokens = np.concatenate([T.open_shard(path) for path in T.shard_paths(s, "train")])
    scored = tokens[-(arguments.targets + 1):]
    scorer = T.Scorer(model, scored, s.scoring_shape, s, rt)
    nll, to_bits = scorer.score(0, len(scorer.first)), T.bits_per_byte
    size = byte_table.count(scored)
    say(f"{len(nll)} targets, {size} bytes, {to_bits(nll.sum(dtype=float), size):.5f} bpb\n"
        f"{'tokens before':>13} {'bpb':>9} {'gain':>8} {'seconds':>8}")
    before = len(tokens) - len(scored)
    for count in (0, before // 64, before // 8, before):
        started = time.perf_counter()
        guesses = T.MatchModel(tokens[before - count:], 1, rt.device)
        mixed = guesses.mixed(scorer.first + count, scorer.last + count, nll)
        say(f"{count:>13,} {to_bits(mixed.sum(), size):>9.5f} "
            f"{to_bits((nll - mixed).sum(), size):>8.5f} {time.perf_counter() - started:>8.1f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("plans", "ttt", "match"))
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path,
                        default=ROOT / "data/tokenizers/fineweb_1024_bpe.model")
    parser.add_argument("--targets", type=int, default=65536)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--log", type=Path)
    arguments = parser.parse_args()

    def say(line):
        print(line, flush=True)
        if arguments.log:
            with open(arguments.log, "a", encoding="utf-8") as f:
                f.write(line + "\n")

    dict(plans=plans, ttt=ttt, match=match)[arguments.what](arguments, say)


if __name__ == "__main__":
    main()
