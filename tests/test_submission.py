"""records/submission.py: a sound folder passes, each planted fault is found by its check, packing
keeps what ran."""

import io
import json
import math
import os
import re
import runpy
import shutil
import sys

import pytest

from conftest import ROOT, VOCAB, write_shard

import submission
import train_gpt
from submission import FAIL, PASS, UNCHECKED, WARN


def status_of(arguments):
    return submission.exit_code_of(submission.main, arguments)


TARGETS, BYTES, MODEL_BYTES = 62_021_632, 151_080_891, 15_000_000
LOSSES = {1337: 1.8901, 42: 1.8909, 2025: 1.8897}
BEATEN = "1.9000,0.0006,3"  # nats
SOURCE = '''"""A stand-in for the script."""
import os
import torch

class Settings:
    preset: str = run("", "name")
    run_id: str = run("", "name")
    seed: int = run(1337, "integer")
    out_dir: str = run(".", "folder")
    iterations: int = run(20000, "steps")
    vocab_size: int = run(1024, "pieces")
    matrix_lr: float = run(0.025, "rate")

WORLD_SIZE = os.environ.get("WORLD_SIZE", "1")
'''


def bpb_of(loss, targets=TARGETS, byte_count=BYTES):
    return loss / math.log(2) * targets / byte_count


def settings_of(seed, **more):
    return dict(preset="", run_id=f"r{seed}", seed=seed, out_dir=f"runs/{seed}", iterations=9000,
                vocab_size=1024, matrix_lr=0.025, **more)


def log_text(seed, loss, code=SOURCE.encode(), targets=TARGETS, byte_count=BYTES,
             explicit=("iterations",), way="pieces", **settings):
    """A log as train_gpt.py writes it, of an imagined run."""
    lines = [f"setting {k.upper()}={v}" + "  (set)" * (k in explicit)
             for k, v in settings_of(seed, **settings).items()]
    lines += [f"run:r{seed} preset:none device:NVIDIA H100 80GB HBM3 world_size:8 dtype:bfloat16 "
              f"compile:1 seed:{seed}",
              f"attention:sdpa validation_targets:{targets} bytes_from:{way}"]
    lines += [f"step:{s}/9000 train_loss:{7 - s / 2000:.4f} train_time:{84 * s}ms step_avg:84.00ms"
              for s in (1, 2, 500, 7000)]
    lines += ["step:7100/9000 val_loss:1.9400 val_bpb:1.1400 train_time:599950ms step_avg:84.50ms"]
    for key, shift, seconds in (("final_int6_roundtrip", 0.04, 20),
                                ("final_int6_sliding_window", 0.005, 80), ("legal_ttt", 0, 400)):
        score, bpb = loss + shift, bpb_of(loss + shift, targets, byte_count)
        for suffix, digits in (("", 4), ("_exact", 8)):
            lines.append(f"{key}{suffix} val_loss:{score:.{digits}f} val_bpb:{bpb:.{digits}f} "
                         + "stride:64 " * ("sliding" in key) + f"eval_time:{1000 * seconds}ms")
    lines += [f"Serialized model int6+lzma: {MODEL_BYTES} bytes", f"Code size: {len(code)} bytes",
              f"Total submission size int6+lzma: {MODEL_BYTES + len(code)} bytes of 16000000",
              f"code_sha256:{submission.sha256(code)}",
              "seconds: train 599.9 of 600, pack 20.0, evaluation 510.0",
              f"ledger: targets:{targets} bytes:{byte_count} loss_sum:{loss * targets:.6f} "
              f"sha256:{submission.sha256(str(seed).encode())}"]
    return SOURCE + "\n" + "=" * 100 + "\n" + "\n".join(lines) + "\n"


def result_of(seed, loss, code=SOURCE.encode(), **settings):
    """The result file of the same run."""
    kinds = {"float": loss + 0.03, "int6": loss + 0.04, "sliding": loss + 0.005, "ttt": loss}
    return dict(preset="", settings=settings_of(seed, **settings), seed=seed, world_size=8,
                device="NVIDIA H100 80GB HBM3", versions=dict(torch="2.13.0+cu128", numpy="2.4.6"),
                code_sha256=submission.sha256(code), code_bytes=len(code), model_bytes=MODEL_BYTES,
                total_bytes=MODEL_BYTES + len(code), steps=7100, train_seconds=599.95,
                pack_seconds=20.0, eval_seconds=510.0, scored_targets=TARGETS, scored_bytes=BYTES,
                bytes_from="pieces", val_loss=kinds, ledger_sha256="", artifact="final_model.ptz",
                val_bpb={k: bpb_of(v) for k, v in kinds.items()})


@pytest.fixture
def runs(tmp_path):
    """make(code=…, NAME=value) → folder of three imagined runs, runs/<seed>/logs/."""
    def make(folder="runs", code=SOURCE.encode(), **settings):
        for seed, loss in LOSSES.items():
            logs = tmp_path / folder / str(seed) / "logs"
            logs.mkdir(parents=True)
            (logs / "run.txt").write_text(log_text(seed, loss, code, **settings), encoding="utf-8")
            (logs / "run.json").write_text(json.dumps(result_of(seed, loss, code, **settings)))
        return tmp_path / folder
    return make


def write_folder(folder, text_of=log_text):
    """A sound record folder, written by hand and not by `pack`."""
    folder.mkdir(parents=True)
    (folder / "train_gpt.py").write_text(SOURCE)
    (folder / "README.md").write_text(
        "# Imagined\n\n```\nITERATIONS=9000 torchrun --nproc_per_node=8 train_gpt.py\n```\n")
    for seed, loss in LOSSES.items():
        (folder / f"train_seed{seed}.log").write_text(text_of(seed, loss), encoding="utf-8")
    losses = list(LOSSES.values())
    bpbs = [bpb_of(v) for v in losses]
    std = math.sqrt(sum((b - sum(bpbs) / 3) ** 2 for b in bpbs) / 2)
    total = MODEL_BYTES + len(SOURCE)
    rows = {str(s): dict(val_loss=v, val_bpb=round(bpb_of(v), 6), bytes_total=total) for s,
            v in LOSSES.items()}
    facts = dict(author="Ada", github_id="ada", name="Imagined", date="2026-03-20",
                 track="track_10min_16mb",
                 blurb="Nothing new.", val_loss=round(sum(losses) / 3, 6),
                 val_bpb=round(sum(bpbs) / 3, 6),
                 val_bpb_std=round(std, 6), seeds=list(LOSSES), seed_results=rows,
                 bytes_code=len(SOURCE), bytes_total=total,
                 compliance=dict(train_seconds_under_600=True, full_validation_set=True))
    (folder / "submission.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture
def sound(tmp_path):
    return write_folder(tmp_path / "track_10min_16mb" / "2026-03-20_imagined")


def found(folder, status, **options):
    """[(what, text)] of a check's findings with this status."""
    return [(what, text) for s, what, text in submission.check(folder, **options).findings
            if s == status]


def change(folder, name, old, new):
    """Replace text that must be there."""
    text = (folder / name).read_text(encoding="utf-8")
    assert re.search(old, text, re.M), old
    (folder / name).write_text(re.sub(old, new, text, flags=re.M), encoding="utf-8")


def claim(folder, **values):
    path = folder / "submission.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def swap(folder):
    a, b = folder / "train_seed42.log", folder / "train_seed2025.log"
    texts = a.read_text(), b.read_text()
    b.write_text(texts[0]), a.write_text(texts[1])


def grown(folder, model_bytes):
    for seed in LOSSES:
        change(folder, f"train_seed{seed}.log", f"^(Serialized .*): {MODEL_BYTES}",
               rf"\1: {model_bytes}")
        change(folder, f"train_seed{seed}.log", r"^(Total .*?): \d+",
               rf"\1: {model_bytes + len(SOURCE)}")


def counted_otherwise(folder, byte_count, targets=TARGETS):
    for seed, loss in LOSSES.items():
        (folder / f"train_seed{seed}.log").write_text(log_text(seed, loss, targets=targets,
                                                               byte_count=byte_count))


def script(folder, addition):
    """Another script, of which the logs know."""
    code = SOURCE + addition
    (folder / "train_gpt.py").write_text(code)
    for seed, loss in LOSSES.items():
        text = log_text(seed, loss, code.encode()).replace(SOURCE, code, 1)
        (folder / f"train_seed{seed}.log").write_text(text)
    claim(folder, bytes_code=len(code), bytes_total=MODEL_BYTES + len(code), seed_results={})


def result_with(folder, **values):
    result = {**result_of(42, LOSSES[42]), **values}
    (folder / "result_seed42.json").write_text(json.dumps(result))


LOG = "train_seed42.log"
FAULTS = {  # what is planted: how, and the finding that must name it
    "no README": (lambda f: (f / "README.md").unlink(), FAIL, "files", r"README\.md is missing"),
    "invalid JSON": (lambda f: (f / "submission.json").write_text('{"author": "Ada",}'), FAIL,
        "submission.json", "line 1 column"),
    "null score": (lambda f: claim(f, val_bpb=None), FAIL, "submission.json",
        "missing or null: val_bpb"),
    "no date": (lambda f: claim(f, date="soon"), WARN, "submission.json", "'soon'"),
    "unknown track": (lambda f: claim(f, track="track_5min"), WARN, "track", "track_5min"),
    "oversize model": (lambda f: grown(f, 15_999_999), FAIL, "bytes", "exceeds 16,000,000 by"),
    "code changed after the run": (lambda f: (f / "train_gpt.py").write_text(SOURCE + "# more\n"),
        FAIL, "same code", "train_seed42"),
    "other code, one seed": (lambda f: change(f, LOG, "^code_sha256:....", "code_sha256:dead"),
        FAIL, "same code", "42.log ran dead"),
    "wrong sum": (lambda f: change(f, LOG, r"^(Total .*?): \d+", r"\1: 15000001"), FAIL, "bytes",
        "logged as 15,000,001"),
    "bytes that no log has": (lambda f: claim(f, bytes_total=15_000_001), FAIL, "bytes claimed",
        "bytes_total is 15000001"),
    "seed without log": (lambda f: (f / LOG).unlink(), FAIL, "seeds named",
        "names seeds 42, without a log"),
    "two seeds only": (lambda f: (f / LOG).unlink(), FAIL, "seeds", "2 finished"),
    "seed kept back": (lambda f: claim(f, seeds=[1337, 42], seed_results=None), WARN, "seeds named",
        "lacks 2025, which has a finished log"),
    "swapped logs": (swap, FAIL, "logs distinct", r"42\.log is the log of seed 2025"),
    "one run twice": (lambda f: (f / LOG).write_text((f /
        "train_seed2025.log").read_text().replace("seed:2025", "seed:42")), FAIL, "logs distinct",
        "same score ledger"),
    "truncated log": (lambda f: (f / LOG).write_text((f / LOG).read_text()[:len(SOURCE) + 400]),
        FAIL, "logs whole", "42.log has no"),
    "NaN score": (lambda f: change(f, LOG, r"(legal_ttt_exact) val_loss:\S+ val_bpb:\S+",
        r"\1 val_loss:nan val_bpb:nan"), FAIL, "logs whole", "legal_ttt is nan"),
    "bpb not of the loss": (lambda f: change(f, LOG, r"^(legal_ttt_exact .* val_bpb):\S+",
        r"\1:1.10000000"), FAIL, "bits per byte", "legal_ttt implies"),
    "loss not of the ledger": (lambda f: change(f, LOG, r"loss_sum:\S+", "loss_sum:117000000.0"),
        FAIL, "bits per byte", "ledger's sum"),
    "space counted twice": (lambda f: counted_otherwise(f, 176_300_000), FAIL, "bits per byte",
        r"\+16\.7 %"),
    "part of the validation set": (lambda f: counted_otherwise(f, 2_554_000, 2**20), FAIL,
        "validation set", "1,048,576 targets"),
    "score of another evaluation": (lambda f: claim(f, val_bpb=round(bpb_of(sum(LOSSES.values()) / 3
        + 0.005), 6)), WARN, "val_bpb", "mean of final_int6_sliding_window"),
    "loss no log has": (lambda f: claim(f, val_loss=1.88), FAIL, "val_loss", "no mean"),
    "bpb as loss": (lambda f: claim(f, val_loss=round(bpb_of(sum(LOSSES.values()) / 3), 4)), WARN,
        "val_loss", "is the bpb"),
    "spread too small": (lambda f: claim(f, val_bpb_std=0.0001), FAIL, "val_bpb_std",
        "the logs give"),
    "row of another seed": (lambda f: claim(f, seed_results={"42": {"val_bpb": 1.1}}), FAIL,
        "seed results", "seed 42: val_bpb 1.1"),
    "result of bytes counted otherwise": (lambda f: result_with(f, bytes_from="text"), FAIL,
        "seed results", "bytes_from text where the log has pieces; take both from one run"),
    "result of other bytes": (lambda f: result_with(f, scored_bytes=BYTES - 9), FAIL,
        "seed results", f"scored_bytes {BYTES - 9} where the log has {BYTES};"),
    "training too long": (lambda f: change(f, LOG, "train_time:599950ms", "train_time:601000ms"),
        FAIL, "train seconds", "601.00 s"),
    "training a moment too long": (lambda f: change(f, LOG, "train_time:599950ms",
        "train_time:600030ms"), WARN, "train seconds", "by less than a step"),
    "evaluation too long": (lambda f: change(f, LOG, r"evaluation 510\.0", "evaluation 601.0"),
        FAIL, "eval seconds", "601.0 s"),
    "evaluation shorter than its parts": (lambda f: change(f, LOG, r"evaluation 510\.0",
        "evaluation 300.0"), FAIL, "eval seconds", "its evaluations alone 500.0 s"),
    "promise not kept": (lambda f: change(f, LOG, "train_time:599950ms", "train_time:601000ms"),
        FAIL, "compliance", "train_seconds_under"),
    "setting that nobody reads": (lambda f: change(f, LOG, "^(setting ITERATIONS=.*)",
        r"\1\nsetting WARMDRON_ITERS=3500"), FAIL, "settings read", "WARMDRON_ITERS"),
    "command that nobody reads": (lambda f: change(f, "README.md", "ITERATIONS=9000",
        "ITERATION=9000"), WARN, "README's commands", "ITERATION:"),
    "seeds of different settings": (lambda f: change(f, LOG, "MATRIX_LR=0.025", "MATRIX_LR=0.03"),
        FAIL, "same settings", "MATRIX_LR: .*0.03 in train_seed42.log"),
    "network": (lambda f: script(f, "import urllib.request\n"), WARN, "imports and paths",
        r"urllib \(network\)"),
    "uncounted module": (lambda f: script(f, "import helper\n") or (f /
        "helper.py").write_text("A = 1\n"), WARN, "imports and paths", "6 bytes count as code"),
    "one GPU": (lambda f: change(f, LOG, "world_size:8", "world_size:1"), FAIL, "hardware",
        "1×NVIDIA"),
    "what the log itself says": (lambda f: change(f, LOG, "^(ledger: .*)",
        r"\1\nnot a legal record: 57 sampled training documents"), FAIL, "own verdict",
        "42.log: 57 sampled training documents"),
    "a limit just below the set": (lambda f: change(f, LOG, "^(setting ITERATIONS=.*)",
        rf"\1\nsetting VAL_LIMIT_TOKENS={TARGETS + 9}"), FAIL, "validation set",
        "VAL_LIMIT_TOKENS=.* scores a part"),
    "the set of another vocabulary": (lambda f: counted_otherwise(f, 100_000_000, 40_540_160),
        FAIL, "validation set", "40,540,160 targets, .*; the official set has 62,021,632"),
}


def test_a_sound_folder_passes(sound):
    sub = submission.check(sound, against=BEATEN)
    assert {(s, what) for s, what, _ in sub.findings if s != PASS} == {
        (UNCHECKED, what) for what in ("artifact", "bytes of text", "README's figures")}
    assert status_of(["check", str(sound), "--against", BEATEN]) == 0


@pytest.mark.parametrize("fault", FAULTS)
def test_the_planted_fault_is_found(sound, fault, capsys):
    plant, status, what, pattern = FAULTS[fault]
    plant(sound)
    assert [text for name, text in found(sound, status)
            if name == what and re.search(pattern, text)], found(sound, status)
    failed = found(sound, FAIL, against=BEATEN)
    assert status_of(["check", str(sound), "--against", BEATEN]) == (1 if failed else 0)
    assert f"{status:<11}  {what}" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["two seeds only", "training too long",
                                   "part of the validation set", "one GPU"])
def test_what_only_a_record_must_keep_to_is_no_failure_elsewhere(sound, fault):
    claim(sound, track="track_non_record_16mb", compliance={})
    FAULTS[fault][0](sound)
    assert FAULTS[fault][2] not in [what for what, _ in found(sound, FAIL)]


def test_no_value_in_the_json_stops_the_check(sound):
    given = json.loads((sound / "submission.json").read_text())
    for value in (None, "x", [[]], {"42": 1}, {"42": {"val_bpb": "x"}}, True, -1, 1e400, 10**400):
        for key in given:
            claim(sound, **{**given, key: value})
            submission.check(sound, against=BEATEN)


def test_no_place_to_cut_a_log_stops_the_check_or_passes(sound):
    text = (sound / LOG).read_text()
    for end in range(0, text.index("Total submission"), 131):
        (sound / LOG).write_text(text[:end])
        assert "logs whole" in [what for what, _ in found(sound, FAIL)] or not end


# -- the record to beat

def p_value(folder, against):
    return next(float(re.search(r"p = (\S+?) for", text)[1]) for _, what,
                text in submission.check(folder, against).findings
                if what == "improvement")


def test_the_p_value_is_welchs_of_the_raw_losses(sound, tmp_path):
    """The tool has means and deviations; scipy's test of the lists themselves must agree."""
    stats = pytest.importorskip("scipy.stats")
    old = [1.8963, 1.8975, 1.8990, 1.8968]
    mean, std = submission.mean_std(old)
    expected = stats.ttest_ind([v - 0.005 for v in old], list(LOSSES.values()), equal_var=False,
                               alternative="greater").pvalue
    assert 0.01 < expected < 0.5
    against = f"{mean},{std},{len(old)}"
    assert p_value(sound, against) == pytest.approx(expected, rel=0.01)
    assert "improvement" in [what for what, _ in found(sound, FAIL, against=against)]


def test_a_folder_to_beat_and_its_figures_in_nats_or_bpb_are_the_same(sound, tmp_path):
    pytest.importorskip("scipy")
    older = write_folder(tmp_path / "older", lambda seed,
                         loss: log_text(seed, loss + 0.0065 + (seed == 42) * 0.001))
    values = [log.score for log in submission.open_submission(older).scored]
    nats, bpb = (submission.mean_std([getattr(v, a) for v in values]) for a in ("loss", "bpb"))
    ps = [p_value(sound, a) for a in (str(older), f"{nats[0]},{nats[1]},3",
                                      f"{bpb[0]},{bpb[1]},3,bpb")]
    assert ps == pytest.approx([ps[0]] * 3, rel=0.01) and 0.001 < ps[0] < 0.5


@pytest.mark.parametrize("more, warned", [(0.009, False), (0.02, True)])
def test_a_folder_that_scored_another_text_is_no_fair_record_to_beat(sound, tmp_path, more, warned):
    """The table of pieces may differ from the text by less than one per cent."""
    pytest.importorskip("scipy")
    older = write_folder(tmp_path / "older", lambda seed, loss: log_text(
        seed, loss + 0.02, byte_count=int(BYTES * (1 + more))))
    warnings = [text for what, text in found(sound, WARN, against=str(older))
                if what == "improvement"]
    assert [f"{BYTES:,} to {int(BYTES * (1 + more)):,}" in text for text in warnings] == (
        [True] if warned else [])


@pytest.mark.parametrize("against", ["nowhere", "1.9,0.1", "1.9,-1,3", "1.9,0.1,3,furlongs"])
def test_a_senseless_record_to_beat_is_refused(sound, against, capsys):
    assert status_of(["check", str(sound), "--against", against]) == 2
    assert against in capsys.readouterr().err


def test_an_artifact_has_the_bytes_of_its_seed(sound, tmp_path):
    right, wrong = tmp_path / "final_model_seed42.int6.ptz", tmp_path / "final_model_seed7.int6.ptz"
    for path in (right, wrong):
        with open(path, "wb") as f:
            f.truncate(MODEL_BYTES)
    assert "artifact" in [w for w, _ in found(sound, PASS, artifacts=[right])]
    assert not found(sound, FAIL, artifacts=[right])
    assert [w for w, _ in found(sound, FAIL, artifacts=[wrong])] == ["artifact"]
    with open(right, "ab") as f:
        f.write(b"x")
    assert [w for w, _ in found(sound, FAIL, artifacts=[right])] == ["artifact"]


@pytest.fixture
def scored(sound, corpus, tmp_path):
    """scored(way, side, more) → options of a check on data with side files or without; the logs
    have the bytes of its first 900 targets and some more, counted in that way."""
    def make(way, side=None, more=0, manifest="{}", targets=900, tokens=None):
        data = shutil.copytree(corpus.folder, tmp_path / "data")
        (data / "manifest.json").write_text(manifest)
        table = train_gpt.ByteTable(train_gpt.Settings(
            data_path=str(data), tokenizer_path=str(corpus.model), vocab_size=VOCAB))
        count = int(sum(side[1:901]) if side else table.count(corpus.tokens[:901])) + more
        if tokens:
            write_shard(data / "fineweb_val_000000.bin", tokens)
        if side:
            write_shard(data / "fineweb_val_bytes_000000.bin", side)
        for seed, loss in LOSSES.items():
            text = log_text(seed, loss, targets=targets, byte_count=count, way=way)
            text = text.replace("VOCAB_SIZE=1024", f"VOCAB_SIZE={VOCAB}")
            (sound / f"train_seed{seed}.log").write_text(text.replace(" bytes_from:\n", "\n"))
        return dict(data=str(data), tokenizer=str(corpus.model))
    return make


SIDE = [3] * 1031


@pytest.mark.parametrize("case,status,pattern", [
    (dict(way="pieces"), PASS, r"\d bytes of 900 targets, counted from the pieces, as logged$"),
    (dict(way="text", side=[2, 3] * 515 + [5]), PASS, "^2,250 bytes of .* from the text, as"),
    (dict(way="", side=SIDE, manifest='{"splits": {"val": {"utf8_bytes": 3093}}}'), PASS,
     "^2,700 bytes .* from the text"),
    (dict(way="text", side=SIDE, more=-9), FAIL,
     "42.log: 2,691 bytes from the text, the data has 2,700 from the text: give .*EVAL_ONLY"),
    (dict(way="pieces", side=SIDE), FAIL, "2,700 bytes from the pieces, .* from the text"),
    (dict(way="", more=1), FAIL, r"\d bytes, the data has"),
])
def test_bytes_are_counted_again_where_the_data_is(sound, scored, case, status, pattern):
    texts = dict(found(sound, status, **scored(**case)))
    assert re.search(pattern, texts["bytes of text"]), texts


@pytest.mark.parametrize("case,options,words", [
    (dict(way="text", side=SIDE[1:]), {}, "1030 entries, 3090 bytes in all, for 1031 tokens"),
    (dict(way="pieces", tokens=[3] * 1031), {}, "tokens are unknown pieces"),
    (dict(way="pieces", targets=2000), {}, "1,030 validation targets, the logs have 2,000"),
    (dict(way="pieces"), dict(data="nowhere"), "nowhere: DATA_PATH="),
    (dict(way="pieces"), dict(tokenizer="none.model"), "none.model: no such file"),
    (dict(way="pieces"), dict(tokenizer=None), "names no tokenizer; give it with --tokenizer"),
])
def test_data_that_cannot_be_counted_is_refused(sound, scored, capsys, case, options, words):
    given = {**scored(**case), **options}
    flags = [text for key, value in given.items() if value for text in (f"--{key}", value)]
    assert status_of(["check", str(sound), *flags]) == 2
    assert capsys.readouterr().err.startswith("error: --data ")
    with pytest.raises(submission.Problem, match=words):
        submission.check(sound, **given)


@pytest.mark.parametrize("script, says", [
    ("open('started', 'w')", "knows no --dry-run"),
    ("import time  # --dry-run\ntime.sleep(60)", "not done after 0.2 s")])
def test_a_dry_run_is_of_a_script_that_knows_it_and_not_for_long(sound, monkeypatch, script, says):
    monkeypatch.setattr(submission, "DRY_RUN_SECONDS", 0.2)
    (sound / "train_gpt.py").write_text(script)
    assert says in dict(found(sound, UNCHECKED, run=True))["dry run"]
    assert not list(sound.rglob("started"))


def test_a_dry_run_starts_the_script_whatever_its_name(sound):
    (sound / "train_gpt.py").rename(sound / "train_gpt_final.py")
    (sound / "train_gpt_final.py").write_text("print('ready')  # --dry-run")
    assert "ready" in dict(found(sound, PASS, run=True))["dry run"]


@pytest.mark.parametrize("code, seconds, status, says", [
    ("sys.exit(0)", 60, PASS, "train_gpt.py"), ("sys.exit(1)", 60, FAIL, "exit status 1"),
    ("sys.exit(2)", 60, UNCHECKED, "train_gpt.py"), ("", 60, UNCHECKED, "is not there"),
    ("time.sleep(60)", 0.2, UNCHECKED, "not done after 0.2 s")])
def test_the_audits_exit_status_is_the_finding(sound, tmp_path, monkeypatch, code, seconds, status,
                                               says):
    monkeypatch.setattr(submission, "HERE", tmp_path)
    monkeypatch.setattr(submission, "AUDIT_SECONDS", seconds)
    (artifact := tmp_path / "a.ptz").write_bytes(b"")
    if code:
        (tmp_path / "audit.py").write_text(f"import sys, time\nprint(sys.argv[2:])\n{code}\n")
    assert says in dict(found(sound, status, run=True, artifacts=[artifact]))["audit"]


# -- pack

ARGUMENTS = ["--name", "Imagined, again", "--author", "Ada", "--github-id", "ada", "--track",
             "track_10min_16mb"]


@pytest.fixture
def pack(tmp_path):
    pytest.importorskip("matplotlib")
    def run(*places, out="packed", more=()):
        return status_of(["pack", *map(str, places), *ARGUMENTS, "--out", str(tmp_path / out),
                          *more])
    return run


def test_what_pack_makes_passes_its_check(runs, pack, tmp_path, capsys):
    place = runs()
    assert pack(place) == 0, capsys.readouterr()
    folder = tmp_path / "packed"
    assert (folder / "train_gpt.py").read_bytes() == SOURCE.encode(), "from the log"
    for seed in LOSSES:
        logs = place / str(seed) / "logs"
        for kept, made in ((f"train_seed{seed}.log", "run.txt"),
                           (f"result_seed{seed}.json", "run.json")):
            assert (folder / kept).read_bytes() == (logs / made).read_bytes()
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    facts = json.loads((folder / "submission.json").read_text())
    assert facts["val_loss"] == pytest.approx(sum(LOSSES.values()) / 3)
    assert sorted(facts["seeds"]) == sorted(LOSSES)
    assert facts["hardware"] == "8×NVIDIA H100 80GB HBM3"
    assert facts["bytes_total"] == MODEL_BYTES + len(SOURCE)
    assert facts["compliance"]["full_validation_set"] is True
    sub = submission.check(folder, against=BEATEN)
    assert {s for s, *_ in sub.findings} == {PASS, UNCHECKED}, submission.verdict_lines(sub)
    readme = (folder / "README.md").read_text()
    assert "| `ITERATIONS` | `9000` | `20000` | command |" in readme and "MATRIX_LR" not in readme
    assert "PASS         same code" in readme
    assert f"{BYTES:,} bytes, counted from the pieces. The last" in readme
    assert sorted(p.name for p in tmp_path.iterdir()) == ["packed", "runs"], "nothing else is left"


def test_the_logs_of_a_resumed_run_are_packed(runs, pack, tmp_path, capsys):
    """Each part is kept, as far back as the parts say that they went on; the check takes the last.
    run.1.txt is of another run of that name; run.4.txt of a start that was refused, run.5.txt of
    another seed, run.6.txt of another RUN_ID; run.x.txt and 7.txt belong to other runs. Step 500
    was lost: run.txt goes on from step 2."""
    place = runs()
    logs = place / "42" / "logs"
    text = (logs / "run.txt").read_text()
    parts = {name: "".join(line for line in text.splitlines(keepends=True)
                           if not line.startswith("step:") or line.split("/")[0] in steps)
             for name, steps in (("run.1.txt", ["step:1"]), ("run.2.txt", ["step:1", "step:2"]),
                                 ("run.3.txt", ["step:500"]),
                                 ("run.txt", ["step:7000", "step:7100"]))}
    for name, part in parts.items():
        unfinished = part.partition("final_int6")[0] if name in ("run.2.txt", "run.3.txt") else part
        resumed = "resume:step 2 train_time:168ms\n" if name in ("run.3.txt", "run.txt") else ""
        (logs / name).write_text(unfinished.replace("step:", resumed + "step:", 1))
    (logs / "run.4.txt").write_text(text.partition("step:")[0])
    (logs / "run.5.txt").write_text(log_text(7, 1.9))
    (logs / "run.6.txt").write_text(text.replace("RUN_ID=r42", "RUN_ID=r42.6"))
    for name in ("run.x.txt", "run.07.txt", "7.txt"):
        (logs / name).write_text(text)
    assert pack(place) == 0, capsys.readouterr()
    kept = {p.name: p.read_bytes() for p in (tmp_path / "packed").glob("train_seed42*.log")}
    assert kept == {made: (logs / name).read_bytes() for made, name in (
        ("train_seed42.log", "run.txt"), ("train_seed42_prev1.log", "run.2.txt"),
        ("train_seed42_prev2.log", "run.3.txt"))}
    run = submission.open_run(logs / "run.json")
    assert [point[0] for point in run.log.curve] == [1, 2, 7000]
    sub = submission.check(tmp_path / "packed", against=BEATEN)
    assert {s for s, *_ in sub.findings} == {PASS, UNCHECKED}, submission.verdict_lines(sub)


def test_a_seed_that_was_resumed_after_its_export_is_packed_beside_the_others(runs, pack, tmp_path):
    """It has RESUME=auto and, by an older script, no float score."""
    place = runs(resume="")
    log, result = (place / "42" / "logs" / f"run.{kind}" for kind in ("txt", "json"))
    log.write_text(log.read_text().replace("setting RESUME=\n", "setting RESUME=auto  (set)\n"))
    kept = json.loads(result.read_text())
    kept["settings"]["resume"] = "auto"
    for scores in kept["val_bpb"], kept["val_loss"]:
        del scores["float"]
    result.write_text(json.dumps(kept))
    pack(place)
    sub = submission.check(tmp_path / "packed")
    assert ("same settings", PASS) in [(what, status) for status, what, _ in sub.findings]
    assert "float, bpb" not in (tmp_path / "packed" / "README.md").read_text()


def test_a_text_with_other_tokens_is_whole_by_its_bytes(runs, pack, tmp_path):
    """The challenge's validation text by a tokenizer of one's own."""
    place = runs()
    for path in place.rglob("run.*"):
        path.write_text(path.read_text().replace(str(TARGETS), str(TARGETS - 9_000_000)))
    pack(place)
    facts = json.loads((tmp_path / "packed" / "submission.json").read_text())
    assert facts["compliance"]["full_validation_set"] is True
    assert facts["compliance"]["validation_targets"] == TARGETS - 9_000_000
    for path in place.rglob("run.json"):
        result = json.loads(path.read_text())
        result["settings"]["val_limit_tokens"] = TARGETS - 9_000_000
        path.write_text(json.dumps(result))
    pack(place, out="part")
    facts = json.loads((tmp_path / "part" / "submission.json").read_text())
    assert facts["compliance"]["full_validation_set"] is False


def test_a_packed_script_is_counted_packed_and_read_unpacked(runs, pack, tmp_path):
    artifact = pytest.importorskip("artifact")
    code = artifact.pack_code(SOURCE.encode())
    assert pack(runs(code=code)) == 0
    assert (tmp_path / "packed" / "train_gpt.py").read_bytes() == code
    findings = {what: text for status, what, text in submission.check(tmp_path / "packed").findings
                if status == PASS}
    assert f"{len(code):,} bytes, unpacks to {len(SOURCE):,}" in findings["compiles"]
    assert {"same code", "settings read", "bytes"} <= set(findings)


def edited_result(place, **values):
    path = place / "42" / "logs" / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def of_other_settings(place):
    (place / "42" / "logs" / "run.txt").write_text(log_text(42, LOSSES[42], gptq=1))
    edited_result(place, settings=result_of(42, LOSSES[42], gptq=1)["settings"])


def of_other_code(place):
    code = SOURCE.encode() + b"# other\n"
    (place / "42" / "logs" / "run.txt").write_text(log_text(42, LOSSES[42], code))
    (place / "42" / "logs" / "run.json").write_text(json.dumps(result_of(42, LOSSES[42], code)))


REFUSALS = {
    "other settings": (of_other_settings, r"GPTQ: .*1 in \S*42"),
    "other code": (of_other_code, "different code: .*42"),
    "one seed twice": (lambda p: shutil.copytree(p / "42", p / "43"),
        "2 results of seed 42: .*43.*name the files"),
    "a scoring run": (lambda p: edited_result(p, settings=dict(eval_only="a.ptz")),
        "EVAL_ONLY trained nothing"),
    "the log of another run": (lambda p: edited_result(p, val_bpb={"ttt": 1.0}),
        r"not the result of run\.txt: val_bpb 1\.0"),
    "a score that is none": (lambda p: edited_result(p, val_bpb={"ttt": "1.1"}),
        "no such val_bpb"),
    "seconds that are none": (lambda p: edited_result(p, pack_seconds="soon"),
        "no such pack_seconds"),
    "half a result": (lambda p: (p / "42" / "logs" / "run.json").write_text('{"seed": 42'),
        r"run\.json: cannot be read as JSON"),
    "a lost script": (lambda p: [change(p, f, "^import torch$", "") for f in
        p.glob("*/logs/*.txt")], "no script has the sha256.*--script"),
    "a folder in the way": (lambda p: (p.parent / "packed").mkdir(), "is there already"),
}


def test_pack_refuses_a_given_script_that_did_not_run(runs, pack, tmp_path, capsys):
    place, other = runs(), tmp_path / "other.py"
    other.write_text(SOURCE + "# other\n")
    assert pack(place, more=["--script", str(other)]) == 2 and "other.py" in capsys.readouterr().err
    other.write_text(SOURCE)
    assert pack(place, more=["--script", str(other)]) == 0


@pytest.mark.parametrize("case", REFUSALS)
def test_pack_refuses_and_leaves_nothing(runs, pack, tmp_path, capsys, case):
    place = runs()
    REFUSALS[case][0](place)
    before = sorted(tmp_path.rglob("*"))
    assert pack(place) == 2
    assert re.search(REFUSALS[case][1], capsys.readouterr().err, re.S)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_a_real_run_packs_checks_and_starts(run_once, corpus, tmp_path_factory, pack, tmp_path,
                                            capsys):
    """Ties the imagined logs above to what train_gpt.py writes."""
    out = tmp_path_factory.mktemp("real")
    done = run_once(OUT_DIR=out, SEED=42, ITERATIONS=2, EVAL_STRIDE=32, TTT_EPOCHS=1)
    assert done.returncode == 0, done.stderr[-2000:]
    assert status_of(["pack", str(out), "--name", "Tiny", "--author", "Ada",
                      "--github-id", "ada", "--out", str(tmp_path / "packed"),
                      "--with-artifact"]) == 0, capsys.readouterr()
    sub = submission.check(tmp_path / "packed", run=True, data=str(corpus.folder))
    statuses = {what: status for status, what, _ in sub.findings}
    warned = {what for what, s in statuses.items() if s == WARN}
    assert warned <= {"seeds", "validation set", "bits per byte", "imports and paths"}
    assert {"same code", "bytes", "eval seconds", "val_bpb", "seed results", "settings read",
            "artifact", "dry run", "bytes of text"} <= {
        what for what, s in statuses.items() if s == PASS}, submission.verdict_lines(sub)
    assert sub.logs[0].source == sub.source


def test_names_of_any_bytes_are_packed(runs, pack, tmp_path):
    name = os.fsdecode(b"caf\xc3\xa9\xff")
    assert pack(runs(), out=name, more=["--blurb", name]) == 0
    assert json.loads((tmp_path / name / "submission.json").read_text())["blurb"] == name
    assert status_of(["check", str(tmp_path / name)]) == 0


# -- surroundings of the tools

def unread():
    """A stream whose reader is gone; it buffers nothing."""
    reader, writer = os.pipe()
    os.close(reader)
    return io.TextIOWrapper(open(writer, "wb", 0), "utf-8", write_through=True)


STREAMS = {"ascii": lambda: io.TextIOWrapper(io.BytesIO(), "ascii"), "closed": lambda: None,
           "unread": unread}
STARTS = {  # arguments, what they print, status where nobody reads that
    "records/submission": (["check", "~/track_10min_16mb/2026-03-20_imagined\r"],
                           rb"PASS .*\\u2026", 141),
    "records/runs": (["table", "~/\udcff\r", "~/42\r", "\r"], rb"1\.\d+ \\xb1 0", 0),
    "records/artifact": (["pack-code", "~/\udcff/a.py", "-o", "~/\udcff\u2026.py\r"],
                         rb"/\\udcff\\u2026\.py: ", 0),
    "records/audit": (["~/\udcff\u2026.ptz\r"], b"", 2),
    "data/build_dataset": (["~/\udcff/a.py\r", "--val-input", "~/val.txt\r", "--tokenizer",
                            "~/\udcfe.model\r", "--out-root", "~/out\r", "--name", "\u2026\udcff",
                            "--workers", "1\r", "\r"],
                           rb"/out/datasets/\\u2026\\udcff  \(tokenizer .*\\udcfe\.model", 0),
}


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("tool", STARTS)
def test_tools_start_in_odd_surroundings(sound, corpus, tmp_path, monkeypatch, capsys, tool,
                                         stream):
    """~ and carriage returns in arguments, names that are not UTF-8, odd standard streams."""
    for seed, name in ((1337, "\udcff"), (42, "42")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.json").write_text(json.dumps(result_of(seed, LOSSES[seed])))
    for name in ("\udcff/a.py", "val.txt"):
        (tmp_path / name).write_text(f"# {name!r}\n{SOURCE}")
    shutil.copyfile(corpus.model, tmp_path / "\udcfe.model")
    arguments, says, status = STARTS[tool]
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(sys, "argv", [tool, *arguments])
    monkeypatch.setattr(sys, "stdout", out := STREAMS[stream]())
    if stream == "closed":
        monkeypatch.setattr(sys, "stderr", None)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / f"{tool}.py"), run_name="__main__")
    errors, audits = capsys.readouterr().err, tool == "records/audit"
    assert ended.value.code == (status if stream == "unread" or audits else 0), errors
    if audits and stream != "closed":
        assert errors == f"error: {tmp_path}/\\udcff\u2026.ptz: no such file\n"
    else:
        assert "error" not in errors  # the builder shows its progress
    if stream == "ascii":
        assert re.search(says, out.buffer.getvalue())


# -- index

def test_index_lists_the_folders_and_keeps_the_text(tmp_path, capsys):
    write_folder(tmp_path / "track_10min_16mb" / "2026-03-20_a")
    broken = write_folder(tmp_path / "track_non_record_16mb" / "b")
    (broken / "submission.json").write_text("{")
    claim(write_folder(tmp_path / "track_non_record_16mb" / "c"), val_bpb=1.85169, val_bpb_std=None,
          bytes_total=None,
          compliance=dict(full_validation_set=False, validation_targets=507648))
    claim(write_folder(tmp_path / "track_non_record_16mb" / "d"), seeds=3,  # another's form
          compliance=dict(full_validation_set=False, validation_targets="a part"))
    readme = tmp_path / "README.md"
    readme.write_text("# Ours\n\nAbove.\n\n| folder |\n|---|\n| gone |\n\nBelow.\n")
    assert submission.index(tmp_path) == 1 and "left out: " in capsys.readouterr().out
    text = readme.read_text()
    assert text.startswith("# Ours\n\nAbove.\n\n| folder | track | val_bpb | bytes | what |\n"
                           "|---|---|---|---|---|\n| [")
    assert text.endswith("|\n\nBelow.\n") and "gone" not in text
    assert ("| [2026-03-20_a](track_10min_16mb/2026-03-20_a) | record, 16 MB | "
            "1.1195 ± 0.0004 (3 seeds) | 15,000,") in text
    assert ("| [c](track_non_record_16mb/c) | non-record, 16 MB | 1.8517 (507,648 targets) | ? | "
            "Imagined |") in text
    assert "| [d](track_non_record_16mb/d) | non-record, 16 MB | 1.1195 ± 0.0004 |" in text
    submission.index(tmp_path)
    assert readme.read_text() == text, "a second time changes nothing"


def test_the_records_of_this_repository_pass():
    for folder in (ROOT / "records").glob("track_*/*"):
        assert not found(folder, FAIL), folder
