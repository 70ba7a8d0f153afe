"""Training losses of a new version beside those of an old one, and of the old one with another
seed, which is the noise.

    python tests/bench/losses.py <old log> <old log, another seed> <new log>

Logs of train_gpt.py with the same settings but for the seed. Prints the losses that all have,
|new − old| and |seed − old|; at the end the means of both over the second half, and whether the
version changed the losses by more than the seed did.
"""
import re
import statistics
import sys
from pathlib import Path


def losses(path):
    """{step: train_loss} of a log."""
    text = Path(path).read_text(encoding="utf-8")
    return {int(step): float(loss)
            for step, loss in re.findall(r"^step:(\d+)/\d+ train_loss:(\S+)", text, re.M)}


def main(paths):
    old, seed, new = map(losses, paths)
    steps = sorted(old.keys() & seed.keys() & new.keys())
    if not steps:
        sys.exit(f"no step:… train_loss:… lines in common in {', '.join(map(str, paths))}")
    print(f"{'step':>6}{'old':>9}{'seed':>9}{'new':>9}{'|new-old|':>11}{'|seed-old|':>12}")
    for step in steps:
        print(f"{step:6}{old[step]:9.4f}{seed[step]:9.4f}{new[step]:9.4f}"
              f"{abs(new[step] - old[step]):11.4f}{abs(seed[step] - old[step]):12.4f}")
    late = steps[len(steps) // 2:]
    change, noise = (statistics.mean(abs(x[n] - old[n]) for n in late) for x in (new, seed))
    print(f"mean over the second half: version {change:.5f}, seed {noise:.5f}: "
          + ("within the noise" if change <= noise else "CHANGED"))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(sys.argv[1:])
