"""The README's picture, from logs and results that are in this repository; nothing is trained.

    pip install -r records/requirements.txt
    python tests/bench/pictures.py          # tests/bench/pictures/overview_{light,dark}.png

Four panels. Loss: training loss of each log in results/logs, in bits per byte by the bytes of a
validation token, over the text read, so that vocabularies can be compared. Score: of each log, from
the packed file alone (right end) to its best evaluation (left end). Bytes: the default's weights by
kind at equal bits, as `train_gpt.py --dry-run` forecasts them, beside the packed script. Seconds:
the demo's log, and the forecast in results/evaluation_forecast.md.
"""
import argparse
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "records")]
import train_gpt  # noqa: E402
from artifact import pack_code  # noqa: E402
from runs import read_curves  # noqa: E402

RESULTS = HERE / "results"
THEMES = {  # GitHub's page colours
    "light": dict(page="#ffffff", ink="#1f2328", faint="#d0d7de", other="#8c959f",
                  colours=("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#9a6700")),
    "dark": dict(page="#0d1117", ink="#e6edf3", faint="#30363d", other="#7d8590",
                 colours=("#58a6ff", "#ffa657", "#3fb950", "#bc8cff", "#d29922")),
}
MARKED = ("default", "sp1024", "pr1855")  # drawn in colour; the other systems are grey


@dataclass
class Run:
    """What the picture needs of a log."""
    name: str
    read_mb: np.ndarray  # text read at each logged step, millions of bytes
    loss_bpb: np.ndarray
    from_file: float     # bpb of the packed file alone
    best: float          # bpb of its best evaluation


def read_run(path):
    """The Run of a log of train_gpt.py. Raises ValueError where something is missing."""
    log = read_curves(path)[0]
    packed = {key: score.bpb for key, score in log.scores.items()
              if re.match(r"final_int|legal_ttt", key)}
    alone = [bpb for key, bpb in packed.items() if key.endswith("roundtrip")]
    if not (alone and log.targets and log.scored_bytes):
        raise ValueError(f"{path}: holds no score of a packed file, or no ledger: not a whole run")
    token_bytes = log.scored_bytes / log.targets
    step, loss = log.curve[:, 0], log.curve[:, 1]
    width = max(1, len(step) // 12)  # a step has few tokens: the mean of neighbours is drawn
    mean = np.convolve(loss, np.ones(width) / width, "valid")
    at = np.convolve(step, np.ones(width) / width, "valid")
    return Run(path.stem, at * log.tokens_per_step * token_bytes / 1e6,
               mean / math.log(2) / token_bytes, alone[0], min(packed.values()))


def byte_parts():
    """([(kind, millions of bytes)] of the default's file, bits that are left for a weight)."""
    s = train_gpt.resolve_settings({})[0]
    code = len(pack_code((ROOT / "train_gpt.py").read_bytes()))
    weights, small = {}, 4096  # the index; then a byte for each row's step, fp16 for the rest
    for name, shape in train_gpt.parameter_shapes(s).items():
        if train_gpt.bits_of(name, s) < 16:
            kind = train_gpt.kind_of(name).kind
            weights[kind] = weights.get(kind, 0) + math.prod(shape)
            small += shape[0]
        else:
            small += 2 * math.prod(shape)
    left, count = s.artifact_budget_bytes - code - small, sum(weights.values())
    names = {"mlp": "MLP", "attn": "attention", "table": "token table",
             "mix": "MUDD"}
    parts = [(names.get(kind, kind), left * n / count / 1e6) for kind, n in weights.items()]
    parts = [(kind, mb) for kind, mb in parts if mb >= 0.01]  # gates: some kB
    parts += [("scales, gates, index", small / 1e6), ("the script, packed", code / 1e6)]
    return sorted(parts, key=lambda part: -part[1]), 8 * left / count


def second_rows():
    """[(label, [(part, seconds)])] of what is measured, forecast or fixed by the rules."""
    forecast = (RESULTS / "evaluation_forecast.md").read_text(encoding="utf-8")
    table = forecast.split("## the default")[1].split("\n## ")[0]
    parts = re.findall(r"^\| ([^|]+?) \| (?:\d+|–) \| ([\d.]+) \|", table, re.M)
    grouped = {"scoring": 0.0, "adapting": 0.0}
    for part, seconds in parts:
        grouped["adapting" if part.startswith("adapting") else "scoring"] += float(seconds)
    packing = re.findall(r"GPTQ ([\d.]+) s\n", (RESULTS / "packing_36m.txt").read_text("utf-8"))
    demo = (RESULTS / "demo.txt").read_text(encoding="utf-8")
    clock = r"^seconds: train ([\d.]+) of \S+, pack ([\d.]+), evaluation ([\d.]+)"
    train, pack, whole = map(float, re.search(clock, demo, re.M).groups())
    adapting = int(re.search(r"^legal_ttt .*eval_time:(\d+)ms", demo, re.M)[1]) / 1000
    return [("8×H100, training\n(the rules' limit)", [("training", 600.0)]),
            ("packing the default\n(measured, one core)", [("packing", float(packing[-1]))]),
            ("8×H100, evaluation\n(forecast)", list(grouped.items())),
            ("the demo, two cores\n(measured)", [
                ("training", train), ("packing", pack), ("scoring", whole - adapting),
                ("adapting", adapting)])]


def colour_of(name, theme):
    at = MARKED.index(name) if name in MARKED else None
    return theme["other"] if at is None else theme["colours"][at]


def draw_loss(axis, several, theme):
    late = []
    for run in sorted(several, key=lambda run: (*MARKED, run.name).index(run.name)):
        marked = run.name in MARKED
        axis.plot(run.read_mb, run.loss_bpb, color=colour_of(run.name, theme),
                  lw=2 if marked else 0.9, alpha=1 if marked else 0.7, zorder=2 + marked,
                  label=run.name if marked else None)
        late.extend(run.loss_bpb[run.read_mb >= 0.12 * run.read_mb.max()])
    axis.plot([], [], color=theme["other"], lw=0.9, label="other published systems")
    axis.set_ylim(min(late) - 0.05, max(late) + 0.05)
    axis.set(title="Training loss on the same text", xlabel="text read, millions of bytes",
             ylabel="bits per byte")
    axis.legend(frameon=False, labelcolor=theme["ink"])


def draw_scores(axis, several, theme):
    order = sorted(several, key=lambda run: run.best)
    for y, run in enumerate(order):
        colour = colour_of(run.name, theme)
        axis.barh(y, run.from_file - run.best, left=run.best, height=0.5, color=colour)
        axis.plot([run.best], [y], "o", color=colour, ms=4)
        axis.text(run.best, y, f"{run.best:.3f}   ", va="center", ha="right", color=theme["ink"],
                  fontsize=8)
    axis.set_yticks(range(len(order)), [run.name for run in order])
    axis.invert_yaxis()
    low, high = min(r.best for r in order), max(r.from_file for r in order)
    axis.set_xlim(low - 0.2 * (high - low), high + 0.05 * (high - low))
    axis.set(title="Score after the same text", xlabel="bits per byte on validation text: from the "
             "packed file (right end)\nto its best evaluation (left end, the number)")
    axis.grid(axis="y", visible=False)


def draw_bytes(axis, theme):
    parts, bits = byte_parts()
    for y, (kind, mb) in enumerate(parts):
        axis.barh(y, mb, height=0.6, color=theme["colours"][0])
        axis.text(mb, y, f"  {mb:.2f}", va="center", color=theme["ink"], fontsize=8)
    axis.set_yticks(range(len(parts)), [kind for kind, _ in parts])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.15 * parts[0][1])
    axis.set(title="Where 16,000,000 bytes go", xlabel=f"millions of bytes, the default model at "
             f"{bits:.2f} bits a weight (forecast)")
    axis.grid(axis="y", visible=False)


def draw_seconds(axis, theme):
    rows, shades = second_rows(), dict(zip(("training", "packing", "scoring", "adapting"),
                                           (theme["colours"][i] for i in (0, 4, 2, 3))))
    for y, (_, parts) in enumerate(rows):
        left = 0.0
        for part, seconds in parts:
            axis.barh(y, seconds, left=left, height=0.6, color=shades[part])
            left += seconds
        axis.text(left, y, f"  {left:.0f} s", va="center", color=theme["ink"], fontsize=8)
    axis.axvline(600, color=theme["ink"], lw=0.8, ls=":")
    axis.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 700)
    axis.set(title="Where the seconds go", xlabel="seconds (dotted: the limit of 600)")
    for part, shade in shades.items():
        axis.bar([0], [0], color=shade, label=part)
    axis.legend(frameon=False, labelcolor=theme["ink"], fontsize=8, loc="lower right",
                bbox_to_anchor=(0.83, 0.0))
    axis.grid(axis="y", visible=False)


def draw(several, theme, path):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    ink = {key: theme["ink"] for key in ("text.color", "axes.labelcolor", "xtick.color",
                                         "ytick.color", "axes.titlecolor")}
    style = {**ink, "font.size": 9, "axes.titlesize": 11, "axes.titleweight": "bold",
             "axes.titlelocation": "left", "axes.edgecolor": theme["faint"], "axes.grid": True,
             "grid.color": theme["faint"], "grid.linewidth": 0.6, "axes.axisbelow": True,
             "axes.facecolor": theme["page"], "figure.facecolor": theme["page"],
             "axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(2, 2, figsize=(11, 7.6), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        draw_loss(axes[0, 0], several, theme)
        draw_scores(axes[0, 1], several, theme)
        draw_bytes(axes[1, 0], theme)
        draw_seconds(axes[1, 1], theme)
        figure.savefig(path, dpi=140, metadata={"Software": None})
        pyplot.close(figure)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", type=Path, default=RESULTS / "logs", help="folder of the logs")
    parser.add_argument("--out", type=Path, default=HERE / "pictures")
    arguments = parser.parse_args(argv)
    several = [read_run(path) for path in sorted(arguments.logs.glob("*.txt"))]
    if not several:
        sys.exit(f"--logs {arguments.logs}: no *.txt there")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, theme in THEMES.items():
        path = arguments.out / f"overview_{name}.png"
        draw(several, theme, path)
        print(f"{path}: {path.stat().st_size:,} bytes, {len(several)} logs")


if __name__ == "__main__":
    main(sys.argv[1:])
