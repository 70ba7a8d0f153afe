"""The default and all presets of records side by side, shrunk: same text, seed, tokens a step.
No forecast.

    python tests/bench/presets.py --data data/datasets/mix_sp{} --text 1 --jobs 2 \\
        --out out/presets.md

Every run is train_gpt.py, 11 layers of 64 channels on rows of 256 tokens, each with its own number
of pieces: --data and --tokenizer name the same text in each, with the number in place of {}.
Schedules are shrunk by one factor (steps / 7,000), chunks by 8 as the rows are; the rest is the
preset's. One thread a run, so that jobs do not disturb each other; nothing depends on the clock.
"""
import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import train_gpt  # noqa: E402

COMMON = dict(
    DEVICE="cpu", COMPILE=0, MODEL_DIM=64, NUM_HEADS=4, NUM_KV_HEADS=2,
    TRAIN_SEQ_LEN=256, TRAIN_BATCH_TOKENS=2048, MICRO_BATCH_TOKENS=2048,
    MAX_WALLCLOCK_SECONDS=0, EVAL_WALLCLOCK_SECONDS=0, WARMUP_STEPS=0, EVAL_STRIDE=64,
    VAL_LOSS_EVERY=0, TRAIN_LOG_EVERY=20)


def environment(preset, arguments):
    """The variables of one run; schedules in proportion to the steps."""
    s = train_gpt.resolve_settings({"PRESET": preset})[0]
    data = arguments.data.format(s.vocab_size)
    tokens = sum(len(train_gpt.open_shard(path)) for path in Path(data).glob("*_train_*.bin"))
    steps = int(arguments.text * tokens) // COMMON["TRAIN_BATCH_TOKENS"]
    if not steps:
        sys.exit(f"--data {data}: {tokens} training tokens × --text {arguments.text} are no step "
                 f"of {COMMON['TRAIN_BATCH_TOKENS']}; raise --text, or make the data")
    share = steps / 7000
    variables = dict(
        COMMON, PRESET=preset, SEED=arguments.seed, RUN_ID=preset or "default", DATA_PATH=data,
        ITERATIONS=steps,
        OUT_DIR=Path(arguments.work) / (preset or "default"),
        TOKENIZER_PATH=arguments.tokenizer.format(s.vocab_size),
        WARMDOWN_ITERS=round(s.warmdown_iters * share),
        SWA_EVERY=max(1, round(s.swa_every * share)),
        MUON_MOMENTUM_WARMUP_STEPS=round(s.muon_momentum_warmup_steps * share),
        EMA_DECAY=round(s.ema_decay ** (1 / share), 6),  # 0 follows the run as it is
        TTT_CHUNK_TOKENS=s.ttt_chunk_tokens // 8,
        TTT_LORA_RANK=s.ttt_lora_rank,  # else the line above would imply 0
        ROPE_DIMS=4 if s.rope_dims else 0,
        ROPE_NTK_REFERENCE=s.rope_ntk_reference // 8, EVAL_SEQ_LEN=s.eval_seq_len // 8,
        SEGMENT_SCHEDULE=",".join(f"{COMMON['TRAIN_SEQ_LEN'] * tokens // s.train_seq_len}:{until}"
                                  for tokens, until in s.segments))
    return {**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in variables.items()}}


def run(preset, arguments):
    """Train and score one preset; its result. A finished run is read, not repeated."""
    environ = environment(preset, arguments)
    result = Path(environ["OUT_DIR"]) / "logs" / f"{environ['RUN_ID']}.json"
    if not result.exists():
        subprocess.run([sys.executable, str(ROOT / "train_gpt.py")], env=environ, check=True,
                       stdout=subprocess.DEVNULL)
    return json.loads(result.read_text())


def table(results, data):
    """Markdown: a row per system, best last score first."""
    lines = ["| system | pieces | steps | parameters | float | quantized | full context | TTT "
             "| model bytes | training s |", "|---|---|---|---|---|---|---|---|---|---|"]
    for name, r in sorted(results.items(), key=lambda item: [*item[1]["val_bpb"].values()][-1]):
        bpb = [f"{v:.4f}" for v in r["val_bpb"].values()] + ["off"]  # in the order of evaluation
        lines.append(f"| {name} | {r['settings']['vocab_size']:,} | {r['steps']} "
                     f"| {r['model_params']:,} | {' | '.join(bpb[:4])} | {r['model_bytes']:,} "
                     f"| {r['train_seconds']:.0f} |")
    r = next(iter(results.values()))
    lines += ["", f"Steps of {COMMON['TRAIN_BATCH_TOKENS']} tokens, seed {r['seed']}, "
              f"{r['scored_bytes']:,} bytes scored, "
              f"data {data}, torch {r['versions']['torch']}, {r['device']}; script "
              f"{r['code_sha256'][:16]}."]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/datasets/fineweb10B_sp{}")
    parser.add_argument("--tokenizer", default="data/tokenizers/fineweb_{}_bpe.model")
    parser.add_argument("--text", type=float, default=0.3, help="part of the training text")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    record = ["sp1024", *(p for p in train_gpt.PRESETS if p.startswith("pr"))]
    parser.add_argument("--presets", default=",".join(record), help="beside the default")
    parser.add_argument("--work", default="out/presets", help="folder of the runs, which are kept")
    parser.add_argument("--out", default="", help="write the table here too")
    arguments = parser.parse_args()
    names = ["", *arguments.presets.split(",")]
    names.sort(key=lambda name: name != "pr537")  # the longest first
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = dict(zip([n or "default" for n in names],
                           pool.map(lambda name: run(name, arguments), names)))
    text = table(results, arguments.data)
    print(text)
    if arguments.out:
        Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.out).write_text(text)


if __name__ == "__main__":
    main()
