"""Kill a run at random moments and at the worst ones, resume it until it ends, and compare with a
run that nobody disturbed.

    python tests/bench/kill.py                          ten random moments, eleven chosen, a chain
    python tests/bench/kill.py --ranks 2 --kills 3      two gloo ranks under torchrun, fewer moments

Every death is SIGKILL: nothing is flushed, nothing is tidied up. After each one every checkpoint,
artifact, note and result on disk must read whole (*.part are what a kill leaves; the next run
replaces them). At the end losses, scores of every target and the artifact's bytes must be those of
the undisturbed run. Needs the demo's data: python data/build_dataset.py --demo.
Exit status 1 where anything differs.
"""
import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

RUN = dict(PRESET="demo", DEVICE="cpu", RUN_ID="run", MODEL_DIM=64, TRAIN_SEQ_LEN=128,
           TRAIN_BATCH_TOKENS=1024,
           BIGRAM_VOCAB_SIZE=512, BIGRAM_DIM=32, VE_DIM=32, ITERATIONS=60, WARMDOWN_ITERS=30,
           WARMUP_STEPS=1,
           MAX_WALLCLOCK_SECONDS=0, CHECKPOINT_EVERY_SECONDS=0.1, SWA_ENABLED=1, SWA_EVERY=5,
           GPTQ=1, GPTQ_BATCHES=2,
           VAL_LIMIT_TOKENS=8192, RESUME="auto", OMP_NUM_THREADS=1)
# (which file, how many of them before it, where in write_whole): moments too short to be hit by
# chance.
MOMENTS = [("step_", 0, "written"), ("step_", 2, "synced"), ("step_", 2, "replaced"),
           ("step_", 5, "written"),
           ("final_model", 0, "written"),
           ("final_model", 0, "synced"), ("final_model", 0, "replaced"), ("exported", 0, "synced"),
           ("exported", 0, "replaced"),
           ("run.json", 0, "synced"), ("run.json", 0, "replaced")]


def child(moment):
    """The script itself, but killed in the middle of writing the file that `moment` names."""
    import train_gpt
    name, before, where = moment.split(":")
    seen, fsync, replace = [], os.fsync, os.replace

    def die(at, path):
        if Path(path).name.lstrip(".").startswith(name) and where == at:
            seen.append(path)
            if len(seen) > int(before):
                os.kill(os.getpid(), signal.SIGKILL)

    def synced(number):
        path = os.readlink(f"/proc/self/fd/{number}")
        named = Path(path).name.lstrip(".").startswith(name)
        if named and where == "written" and len(seen) >= int(before):
            os.ftruncate(number, os.fstat(number).st_size // 2)  # as a write that got half way
        die("written", path)
        fsync(number)

    def replaced(part, path):
        die("synced", path)
        replace(part, path)
        die("replaced", path)
    os.fsync, os.replace = synced, replaced
    return train_gpt.main([], os.environ)


def start(folder, ranks, moment=""):
    """The run in `folder`, resumed where there is something, in a process group of its own."""
    environ = {**os.environ, **{k: str(v) for k, v in RUN.items()}, "OUT_DIR": str(folder),
               "SCORES_PATH": str(folder / "scores.npy")}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone",
              f"--nproc_per_node={ranks}"] if ranks > 1 else [sys.executable]
    what = [__file__, "--child", moment] if moment else [str(ROOT / "train_gpt.py")]
    folder.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen([*launch, *map(str, what)], env=environ, cwd=ROOT,
                            start_new_session=True,
                            stdout=subprocess.DEVNULL,
                            stderr=open(folder / "stderr.txt", "w"))


def workers(process):
    """torchrun's ranks, or the process itself."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True,
                            text=True).stdout.split()
    return [int(pid) for pid in listed] or [process.pid]


def broken(folder):
    """What on disk does not read whole."""
    import train_gpt
    bad = []
    for path in [*folder.glob("checkpoints/*"), *folder.glob("*.ptz"), *folder.glob("logs/*.json"),
                 *folder.glob("*.npy")]:
        content = path.read_bytes()
        try:
            if path.suffix == ".part":
                continue
            elif path.suffix == ".pt" and hashlib.sha256(content[:-32]).digest() != content[-32:]:
                raise ValueError("checksum")
            elif path.suffix == ".ptz":
                train_gpt.decode_artifact(content)
            elif path.suffix == ".json":
                json.loads(content)
            elif path.suffix == ".npy":
                train_gpt.np.load(path)
        except (ValueError, train_gpt.UserError) as problem:
            bad.append(f"{path.name}: {problem}")
    return bad


def outcome(folder):
    """All that must not depend on interruptions."""
    result = json.loads((folder / "logs" / "run.json").read_text())
    return dict(artifact=hashlib.sha256((folder / "final_model.ptz").read_bytes()).hexdigest()[:16],
                scores=hashlib.sha256((folder / "scores.npy").read_bytes()).hexdigest()[:16],
                steps=result["steps"],
                **{f"loss of {kind}": loss for kind, loss in result["val_loss"].items()})


def phase(folder):
    """Where a run stands, from its files and the end of its log."""
    log = folder / "logs" / "run.txt"
    lines = log.read_text(errors="replace").splitlines()[-1:] if log.exists() else []
    steps = [p.stem for p in sorted(folder.glob("checkpoints/step_*.pt"))]
    artifact = "artifact" if list(folder.glob("*.ptz")) else "no artifact"
    return f"{' '.join(steps) or 'no checkpoint'}; {artifact}; log: {''.join(lines)[:30]!r}"


def finish(folder, ranks):
    process = start(folder, ranks)
    if process.wait(600):
        error = (folder / "stderr.txt").read_text()[-500:]
        return f"resumed run ended with {process.returncode}: {error}"
    return ""


def report(label, folder, expected, trouble):
    """A line of the log; False where something differs."""
    got = {} if trouble else outcome(folder)
    trouble = trouble or "; ".join(f"{k} {got[k]}, not {v}" for k,
                                   v in expected.items() if got[k] != v)
    parts = len(list(folder.rglob("*.part")))
    verdict = "DIFFERS" if trouble else "equal  "
    print(f"{verdict} {label}; left over: {parts} .part{'; ' if trouble else ''}{trouble}",
          flush=True)
    return not trouble


def struck(folder, ranks, seconds=None, moment=""):
    """Start the run and have it killed: after `seconds` (a random rank), or at a moment of rank 0.
    Says what was found."""
    process, began = start(folder, ranks, moment), time.monotonic()
    if seconds is not None:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.kill(random.choice(workers(process)), signal.SIGKILL)
    status, state, bad = process.wait(600), phase(folder), broken(folder)
    return f"{time.monotonic() - began:5.1f} s, status {status}, {state}", "; ".join(f"broken {b}"
                                                                                     for b in bad)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--kills", type=int, default=10,
                        help="random moments, and links of the chain")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child)
    random.seed(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        root, ranks, good = Path(temporary), arguments.ranks, True
        began = time.monotonic()
        trouble = finish(root / "whole", ranks)
        seconds = time.monotonic() - began
        if trouble:
            print(trouble)
            return 1
        expected = outcome(root / "whole")
        print(f"undisturbed, {ranks} rank{'s' * (ranks > 1)}: {seconds:.1f} s, {expected}",
              flush=True)
        # spread over what follows the imports, a random moment in each part
        for i in range(arguments.kills):
            at = seconds * (0.3 + 0.7 * (i + random.random()) / arguments.kills)
            said, trouble = struck(root / f"random {i}", ranks, at)
            good &= report(f"killed after {said}", root / f"random {i}", expected,
                           trouble or finish(root / f"random {i}", ranks))
        # torchrun takes its time
        for i, (name, before, where) in enumerate(MOMENTS[:: 3 if ranks > 1 else 1]):
            said, trouble = struck(root / f"moment {i}", ranks, moment=f"{name}:{before}:{where}")
            good &= report(f"killed at {name} number {before + 1}, {where}: {said}",
                           root / f"moment {i}", expected,
                           trouble or finish(root / f"moment {i}", ranks))
        for i in range(arguments.kills):  # one run, killed again and again
            said, trouble = struck(root / "chain", ranks, seconds * random.uniform(0.35, 0.6))
            print(f"        chain, kill {i + 1}: {said}{'; ' + trouble if trouble else ''}",
                  flush=True)
            good &= not trouble
        good &= report("chain, ended", root / "chain", expected, finish(root / "chain", ranks))
    print("all equal, nothing broken" if good else "SOMETHING DIFFERS")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
