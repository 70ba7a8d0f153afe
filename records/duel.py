"""A published script beside ours on a CPU: same shards, seed, tokens and small shape.

    python records/duel.py path/to/their/train_gpt.py [NAME=VALUE …] [--ours PRESET] [--steps N]

Their script runs unchanged, in a copy of its folder, by on_cpu.py; ours as it is. Both get the
settings NAME=VALUE. DATA_PATH and TOKENIZER_PATH name the tokens, here or in the environment. The
table has a row for each: bits per byte of the last weights, after averaging, from the file, with
full context, after TTT; bytes; seconds. Defaults of schedules and averages are shrunk in proportion
to the steps, numbers of blocks to NUM_LAYERS. No forecast: at this size, systems for 8×H100 may
change places.
Exit status: 0; 1 where a script failed, after its last lines; 2 for a wrong argument.
"""
from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.append(str(HERE))
sys.path.append(str(ROOT / "data"))
from logs import ALIAS, plot_losses, read_logs  # noqa: E402
from shards import (  # noqa: E402
    DataError, exit_code_of, read_json, read_shard, user_path, write_shard)
from unpack import readable_source  # noqa: E402

FULL_RUN_STEPS = 7000  # of the published systems on 8×H100; their schedules are made for it
SHAPE = dict(NUM_LAYERS=4, MODEL_DIM=128, NUM_HEADS=4, NUM_KV_HEADS=2, TRAIN_SEQ_LEN=256,
             EVAL_SEQ_LEN=256, EVAL_STRIDE=64, TRAIN_BATCH_TOKENS=8192, SEED=1337,
             MAX_WALLCLOCK_SECONDS=0, WARMUP_STEPS=0, VAL_LOSS_EVERY=0,
             DATA_PATH="data/datasets/fineweb10B_sp1024",
             TOKENIZER_PATH="data/tokenizers/fineweb_1024_bpe.model")
COUNTS_STEPS = ("WARMDOWN_ITERS", "MUON_MOMENTUM_WARMUP_STEPS", "SWA_EVERY")
NUMBERS_BLOCKS = ("VE_LAYERS", "LOOP_START", "LOOP_END", "PARALLEL_FROM",
                  "PARALLEL_RESIDUAL_START", "PARALLEL_START_LAYER", "TTT_FREEZE_BLOCKS",
                  "UNIQUE_LAYERS")
STAGES = {  # column: the labels of its lines in the logs, the best first
    "last weights": ("last_validation",),
    "averaged": (r"post[-_]?(ema|swa|avg)", r"\b(ema|swa)\b", r"diagnostic"),
    "from the file": (r"int\d\w*_roundtrip$(?<!%s)" % ALIAS, r"^quantized$", r"roundtrip$"),
    "full context": (r"banded", r"sliding"),
    "after TTT": (r"ttt",)}
REASONS = (  # what the output says: why, in words
    (r"stand-in for attention does not know (\w+)",
     "its attention has {0}, for which there is no stand-in"),
    (r"No module named '?([\w.]+)", "it needs the module {0}, which is not installed"),
    (r"active driver|triton\S* .*(driver|cuda)|Triton kernel", "its Triton kernels need a GPU"),
    (r"CUDA_HOME|nvcc|cpp_extension|load_inline",
     "it compiles CUDA code, for which there is no stand-in"),
    (r"not compiled with CUDA|no NVIDIA driver|libcuda|dummy base class|'_cuda",
     "it calls something of CUDA that on_cpu.py does not stand in for"),
    (r"No such file or directory: '?([^'\n]+)", "it needs the file {0}"),
    (r"IndexError: (?:index|list index)",
     "a setting that numbers blocks may not fit NUM_LAYERS; give it by --theirs-only NAME=VALUE"),
    (r"MemoryError|can't allocate memory", "the memory ran out"))


@dataclass
class Side:
    """One of the two scripts and what came of it."""
    name: str
    command: list
    folder: Path
    settings: dict
    seconds: float = 0.0
    status: int = 0
    log: object = None
    unread: list = field(default_factory=list)  # settings that its source does not name

    @property
    def said(self):
        return self.folder.with_suffix(".txt")


# -- before the runs

def pairs(arguments, parser):
    """{NAME: value} of NAME=VALUE texts."""
    wrong = [text for text in arguments if not re.fullmatch(r"[A-Z]\w*=.*", text, re.S)]
    if wrong:
        parser.error(f"{wrong[0]}: not NAME=VALUE")
    return dict(text.split("=", 1) for text in arguments)


def scaled(settings, default_of, steps):
    """The settings, and defaults of schedules, averages and block numbers fit to a short run."""
    share, found, blocks = steps / FULL_RUN_STEPS, {}, int(settings.get("NUM_LAYERS", 0))
    of = int(default_of("NUM_LAYERS") or blocks)
    for name in NUMBERS_BLOCKS if blocks < of else ():
        if numbers := re.findall(r"\d+", str(default_of(name) or "")):
            places = dict.fromkeys((2 * int(n) + 1) * blocks // (2 * of) for n in numbers)
            found[name] = ",".join(map(str, places))
    for name in COUNTS_STEPS:
        if default := default_of(name):
            found[name] = max(1, round(float(default) * share))
    if default := float(default_of("EMA_DECAY") or 0):
        found["EMA_DECAY"] = round(default ** (1 / share), 6)
    return {**found, **settings}


def default_in(source):
    """default_of(NAME) → the number that the source gives an environment variable, or None."""
    def default_of(name):
        found = re.search(rf"""(?:environ\.get|getenv)\(\s*["']{name}["'],\s*"""
                          r"""["']?([\d.,_]+)["']?\)""", source)
        return found and found[1]
    return default_of


def lay_out_data(folder, settings, val_tokens):
    """Links in `folder` to the training shards and the tokenizer, also by the names that scripts
    want under DATA_DIR, and a shard of the first validation tokens. Returns the settings that name
    them. Raises OSError, DataError, also where that would write over what it reads."""
    import sentencepiece
    source, model = (user_path(settings[n]).resolve() for n in ("DATA_PATH", "TOKENIZER_PATH"))
    train, val = (sorted(source.glob(f"fineweb_{kind}_*.bin")) for kind in ("train", "val"))
    if not train or not val:
        raise DataError(f"DATA_PATH={source}: no fineweb_train_*.bin and fineweb_val_*.bin there; "
                        "say DATA_PATH=… and TOKENIZER_PATH=…")
    if not model.is_file():
        raise DataError(f"TOKENIZER_PATH={model}: no such file")
    manifest = source / "manifest.json"
    made = read_json(manifest, "a data set's manifest").get("settings") if manifest.exists() else {}
    if isinstance(made, dict) and made.get("fold_case"):
        raise DataError(f"DATA_PATH={source}: built with --fold-case, and published scripts count "
                        "its marks as bytes of text; build it without")
    vocab_size = sentencepiece.SentencePieceProcessor(model_file=str(model)).vocab_size()
    row = int(settings["TRAIN_SEQ_LEN"])
    tokens = read_shard(val[0])[:val_tokens // row * row + 1]
    shards = folder / "datasets" / f"fineweb10B_sp{vocab_size}"
    tokenizer = folder / "tokenizers" / f"fineweb_{vocab_size}_bpe.model"
    for name, read, written in (("DATA_PATH", source, shards),
                                ("TOKENIZER_PATH", model.parent, tokenizer.parent)):
        if read.is_relative_to(folder.parent.resolve()) or read == written.resolve():
            raise DataError(f"{name}={settings[name]} lies in --out {folder.parent}, where files "
                            "would be written over it; say --out with another folder")
    shutil.rmtree(shards, ignore_errors=True)  # links of an earlier duel
    for path in (shards, tokenizer.parent):
        path.mkdir(parents=True, exist_ok=True)
    write_shard(shards / "fineweb_val_000000.bin", [tokens], len(tokens))
    for path, target in [(shards / path.name, path) for path in train] + [(tokenizer, model)]:
        path.unlink(missing_ok=True)
        path.symlink_to(target)
    return dict(DATA_DIR=folder, DATA_PATH=shards, TOKENIZER_PATH=tokenizer, VOCAB_SIZE=vocab_size)


def their_side(script, out, settings, steps):
    """Their script and the files of its folder that it names, copied to where it may write."""
    content, folder = script.read_bytes(), out / "theirs"
    try:
        source = readable_source(script)
    except ValueError as problem:
        print(f"{problem}: it runs as it is; its settings are not known")
        source = None
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in script.resolve().parent.iterdir():
        named = re.search(rb"\b%s\b" % re.escape(path.stem.encode()), content + (source or b""))
        if path.is_file() and (path.name == script.name or named and path.suffix != ".log"):
            shutil.copy(path, folder)
    text = (source or b"").decode("utf-8", "replace")
    side = Side("theirs", [str(HERE / "on_cpu.py"), script.name], folder, {
        "RUN_ID": "theirs", "VAL_BATCH_SIZE": 65536, "VAL_BATCH_TOKENS": 65536,
        "EMBEDDING_DIM": settings.get("MODEL_DIM", SHAPE["MODEL_DIM"]),
        **scaled(settings, default_in(text), steps)})
    side.unread = [name for name in (*SHAPE, "ITERATIONS", "VOCAB_SIZE")
                   if source and not re.search(rf"\b{name}\b", text)
                   and not (name.endswith("_PATH") and "DATA_DIR" in text)]
    return side


def our_side(preset, out, settings, steps):
    sys.path.append(str(ROOT))
    from train_gpt import UserError, resolve_settings

    try:
        defaults = resolve_settings({"PRESET": preset})[0]
    except UserError as problem:
        raise DataError(f"--ours {preset}: {problem}") from None
    wanted = scaled(settings, lambda name: getattr(defaults, name.lower(), None), steps)
    if int(settings["NUM_LAYERS"]) < defaults.num_layers and re.search(r"\d", defaults.late_passes):
        wanted.setdefault("LATE_PASSES", "auto")  # the preset's passes name blocks
    rows = int(settings["TRAIN_SEQ_LEN"])
    least = 1024 if rows > 512 else 1  # the script takes no shorter segments
    segments = [(rows * tokens // defaults.train_seq_len, until)
                for tokens, until in defaults.segments]
    wanted.setdefault("SEGMENT_SCHEDULE", ",".join(
        f"{tokens}:{until}" for tokens, until in segments if tokens >= least))
    folder = out / "ours"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return Side("ours", [str(ROOT / "train_gpt.py")], folder, {
        "PRESET": preset, "RUN_ID": "ours", "OUT_DIR": folder, "DEVICE": "cpu", "COMPILE": 0,
        "MICRO_BATCH_TOKENS": settings["TRAIN_BATCH_TOKENS"], **wanted})


# -- the runs

def run(side):
    """Run one script and read its log: of what it printed and newly wrote, what says more."""
    before = set(side.folder.rglob("*"))
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
               **{name: str(value) for name, value in side.settings.items()}}
    started = time.perf_counter()
    with open(side.said, "wb") as said:
        side.status = subprocess.run([sys.executable, *side.command], env=environ, stdout=said,
                                     cwd=side.folder, stderr=subprocess.STDOUT).returncode
    side.seconds = time.perf_counter() - started
    wrote = [path for path in side.folder.rglob("*")
             if path.suffix in (".txt", ".log") and path.is_file() and path not in before]
    logs = [log for path in (side.said, *wrote) for log in read_logs(path)[-1:]]
    side.log = max(logs, key=lambda log: (len(log.scores), len(log.curve)))


def why(side):
    """Why a script failed, in words."""
    text = side.said.read_text(errors="replace")
    for pattern, words in REASONS:
        if found := re.search(pattern, text):
            return words.format(*found.groups())
    return f"it ended with status {side.status}"


# -- what came of them

def bpb_of(log, patterns):
    """Bits per byte of the stage that the patterns name, or NaN."""
    scores = {**{label: float(bpb) for label, bpb in log.other_bpb.items()},
              **{label: score.bpb for label, score in log.scores.items()}}
    for pattern in patterns:
        for label, bpb in reversed(scores.items()):
            if re.search(pattern, label, re.I) and (pattern == "ttt" or "ttt" not in label.lower()):
                return bpb
    return math.nan


def shown(value, form="{:.4f}"):
    return "–" if value is None or math.isnan(value) else form.format(value)


def table(sides):
    """The rows as Markdown, columns aligned."""
    scores = [[bpb_of(side.log, patterns) for patterns in STAGES.values()] for side in sides]
    rows = [["", *STAGES, "model bytes", "code bytes", "training s", "all s"]]
    rows.append(["---"] * len(rows[0]))
    for side, log, bpbs in zip(sides, (side.log for side in sides), scores):
        rows.append([side.name, *map(shown, bpbs), shown(log.model_bytes, "{:,}"),
                     shown(log.code_bytes, "{:,}"), shown(log.train_seconds, "{:.0f}"),
                     f"{side.seconds:.0f}"])
    rows.append(["ours − theirs", *(shown(b - a, "{:+.4f}") for a, b in zip(*scores)), *[""] * 4])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |"
                     for row in rows)


def notes(sides, steps):
    """What the table must not be read without: other numbers of steps than were asked for."""
    return "".join(f"\nThe last step in the log of {side.name} is {side.log.steps or 'unknown'}, "
                   f"not {steps}.\n" for side in sides if side.log.steps != steps)


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=user_path)
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="for both")
    parser.add_argument("--ours", default="", metavar="PRESET", help="our preset; default: none")
    for name in ("theirs", "ours"):
        parser.add_argument(f"--{name}-only", action="append", default=[], metavar="NAME=VALUE",
                            help=f"a setting for {name} alone")
    parser.add_argument("--steps", type=int, default=1000, help="of training (1000)")
    parser.add_argument("--val-tokens", type=int, default=98304, help="scored (98304)")
    parser.add_argument("--jobs", type=int, default=1, choices=(1, 2), help="2: both at once")
    parser.add_argument("--out", type=user_path, default=Path("runs/duel"), help="of logs, results")
    return parser


def main(argv):
    parser = build_parser()
    arguments = parser.parse_intermixed_args(argv)
    both, theirs, ours = (pairs(texts, parser) for texts in (
        arguments.settings, arguments.theirs_only, arguments.ours_only))
    if not arguments.script.is_file():
        parser.error(f"{arguments.script}: no such file")
    if arguments.script.resolve().is_relative_to(arguments.out.resolve()):
        parser.error(f"{arguments.script} lies in --out {arguments.out}, whose folders are emptied")
    if min(arguments.steps, arguments.val_tokens) < 1:
        parser.error("--steps and --val-tokens must be 1 or more")
    out, steps = arguments.out.resolve(), arguments.steps
    named = {n: os.environ[n] for n in ("DATA_PATH", "TOKENIZER_PATH") if n in os.environ}
    log_every = max(1, steps // 50)
    settings = {**SHAPE, "ITERATIONS": steps, "TRAIN_LOG_EVERY": log_every, **named, **both}
    for name, value in [*settings.items(), *theirs.items(), *ours.items()]:
        if name in ("TRAIN_SEQ_LEN", "NUM_LAYERS") and not re.fullmatch("[1-9][0-9]*", str(value)):
            parser.error(f"{name}={value}: must be a whole number, 1 or more")
    marks = out / ".duel", out / "duel.md"  # of a duel, which may empty the folders beside them
    found = [name for name in ("data", "theirs", "ours") if (out / name).exists()]
    if found and not any(mark.exists() for mark in marks):
        parser.error(f"--out {arguments.out}: holds {', '.join(found)}, which no duel made; say "
                     "--out with another folder")
    settings.update(lay_out_data(out / "data", settings, arguments.val_tokens))
    marks[0].touch()
    sides = [their_side(arguments.script, out, {**settings, **theirs}, steps),
             our_side(arguments.ours, out, {**settings, **ours}, steps)]
    for side in sides:
        print(f"{side.name}: log in {side.said}")
        if side.unread:
            print(f"{side.name}: its source does not name {', '.join(side.unread)}")
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(run, sides))
    failed = [side for side in sides if side.status]
    for side in failed:
        print(f"\n{side.name} did not finish: {why(side)}. Its last lines:\n",
              *side.said.read_text(errors="replace").splitlines()[-12:], sep="\n")
    title = (f"{arguments.script.parent.name}/{arguments.script.name} and ours "
             f"({arguments.ours or 'default'}), {steps} steps of {settings['TRAIN_BATCH_TOKENS']} "
             f"tokens, seed {settings['SEED']}")
    text = (f"{title}. Bits per byte; seconds of one CPU thread, theirs in bfloat16 where it asks "
            f"for that, ours in float32.\n\n{table(sides)}\n{notes(sides, steps)}")
    (out / "duel.md").write_text(text, encoding="utf-8")
    plot_losses(out / "duel.png", {side.name: side.log for side in sides}, title)
    print(f"\n{text}\n{out / 'duel.md'}, {out / 'duel.png'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(exit_code_of(main, sys.argv[1:]))
