"""`submission.py check` on small folders of each form that others publish: sound ones have no FAIL,
planted faults are named, and what the files do not say is NOT CHECKED."""

import ast
import base64
import json
import lzma
import re

import pytest
from published_logs import BPB, SOURCE, log_text

import submission
from submission import FAIL, PASS, UNCHECKED, WARN

MEAN = sum(BPB.values()) / 3
ADAPTING = SOURCE + "adapt(None, val_tokens=[])\n"
WRAPPER = "import lzma as L,base64 as B\nexec(L.decompress(B.b85decode({!r})))\n"


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content),
                        encoding="utf-8")
    return folder


README = """# Record: val_bpb 1.1195

| Seed | Steps | **val_bpb** | ms/step | Artifact (bytes) |
|---|---:|---:|---|---|
| 42 | 5,999 | **1.1194** | {ms} | {total:,} |
| Mean | | 1.1195 | | |

```bash
pip install brotli
MATCHED_FINEWEB_REPO_ID=x/y python3 data/cached_challenge_fineweb.py --variant sp1024
for SEED in 42 1337 7; do
  NCCL_NET=Socket SEED=$SEED MATRIX_LR=0.03 \\
  torchrun --standalone --nproc_per_node=8 train_gpt.py > train_seed${{SEED}}.log
done
```
"""


def readme(code=len(SOURCE), ms="100.0"):
    return README.format(ms=ms, total=15_900_000 + code)


def colon():
    """name:value logs, rows by seed, the script plain."""
    rows = {str(s): dict(val_bpb=round(b, 5), artifact_bytes=15_900_000 + len(SOURCE))
            for s, b in BPB.items()}
    claims = dict(author="a", github_id="a", name="n", date="2026-04-09", track="10min_16mb",
                  val_bpb=1.1195,
                  val_bpb_std=0.0004, seeds=list(BPB), seed_results=rows, bytes_total=15_900_000
                  + len(SOURCE))
    return {"train_gpt.py": SOURCE, "README.md": readme(), "submission.json": claims,
            **{f"train_seed{s}.log": log_text(s) for s in BPB}}


def block():
    """name: value logs, the script in a wrapper that also lies there readable, results in an
    object."""
    code = WRAPPER.format(base64.b85encode(lzma.compress(SOURCE.encode())).decode())
    rows = {f"seed_{s}": dict(val_bpb=round(b, 5), artifact_bytes=15_900_000 + len(code))
            for s, b in BPB.items()}
    claims = dict(author="a", record_name="n", track="track_10min_16mb",
                  results={**rows, "mean_val_bpb": round(MEAN, 5), "std_val_bpb": 0.0003})
    return {"train_gpt.py": code, "train_gpt_human.py": SOURCE, "README.md": readme(len(code),
                                                                                    ms="99.2"),
            "submission.json": claims,
            **{f"logs/run_{s}.txt": log_text(s, "block", len(code)) for s in BPB}}


def beside():
    """Reruns, ablations and copies beside the logs that count; scores as a list; another JSON
    name."""
    files = {f"log_seed{s}_v1.1.txt": log_text(s) for s in BPB}
    files |= {f"log_seed{s}_v1.0.txt": log_text(s, bpb=b + 0.01, model=16_100_000)
              for s, b in BPB.items()}
    files |= {"train.log": log_text(42), "log_ablation_base.txt": log_text(42, bpb=1.2),
              "requirements.txt": "torch\n"}
    claims = dict(author="a", github_id="a", name="n", blurb="b", date="2026-03-25T00:00:00Z",
                  val_bpb=round(MEAN, 8),
                  seeds={str(s): {"val_bpb": round(b, 4)} for s, b in BPB.items()},
                  artifact_bytes=15_900_000 + len(SOURCE))
    return {"train_gpt.py": SOURCE, "README.md": readme(), "submission_final.json": claims, **files}


def appended():
    """All runs in one file, no seeds named."""
    claims = dict(author="a", github_id="a", name="n", date="2026-03-22", val_bpb=round(MEAN, 5),
                  val_bpb_seeds=[round(b, 5) for b in BPB.values()], bytes_total=15_900_000
                  + len(SOURCE), bytes_code=len(SOURCE))
    return {"train_gpt.py": SOURCE, "README.md": readme(), "submission.json": claims,
            "train.log": "".join(map(log_text, BPB))}


FORMS = dict(colon=colon, block=block, beside=beside, appended=appended)


def checked(tmp_path, files, **options):
    folder = write(tmp_path / "track_10min_16mb" / "f", files)
    if "submission_final.json" in files:
        folder = folder.rename(tmp_path / "track_10min_16mb" / "g")
    return submission.check(folder, **options)


def said(sub, status):
    return [(what, text) for s, what, text in sub.findings if s == status]


@pytest.mark.parametrize("form", FORMS)
def test_a_clean_folder_of_each_form_has_no_failure(tmp_path, form):
    sub = checked(tmp_path, FORMS[form]())
    missing = [("files", "submission.json is missing or empty; submission_final.json is read")]
    assert said(sub, FAIL) == (missing if form == "beside" else []), submission.verdict_lines(sub)
    assert {"compiles", "logs whole", "logs distinct", "seeds", "bytes", "train seconds",
            "eval seconds", "bits per byte",
            "validation set", "README's figures", "README's commands"} <= {
        what for what, _ in said(sub, PASS)}
    [score] = [text for what, text in said(sub, PASS) if what in ("val_bpb", "mean_val_bpb")]
    assert re.search(f"is the mean of {sub.kind}, {MEAN:.6f}", score) and len(sub.logs) == 3
    assert submission.verdict_lines(sub)[-1].startswith(f"verdict as track_10min_16mb: "
                                                        f"{len(said(sub, FAIL))} FAIL")


def edit(name, old, new):
    def plant(files):
        for path in [p for p in files if re.fullmatch(name, p)]:
            text = files[path] if isinstance(files[path], str) else json.dumps(files[path])
            assert old in text, (path, old)
            files[path] = text.replace(old, new)
    return plant


def logs_with(**changes):
    def plant(files):
        form = "block" if any(p.startswith("logs/") for p in files) else "colon"
        code = len(files["train_gpt.py"])
        files |= {p: log_text(s, form, code, **changes) for s in BPB for p in files
                  if re.search(rf"(?<!\d){s}\.(log|txt)$", p)}
    return plant


def claim(**values):
    return lambda files: files["submission.json"].update(values)


def drop(pattern):
    def plant(files):
        for path in [p for p in files if re.search(pattern, p)]:
            del files[path]
    return plant


def both(*plants):
    return lambda files: [plant(files) for plant in plants]


ADAPTED = both(edit(".*log", "final_int6_sliding", "ttt_epoch:1/2 loss:0.6\nfinal_int6_sliding"),
               edit("train_gpt.py", SOURCE, ADAPTING))
FAULTS = {  # form, what is planted, the finding that must name it
    "a part by a setting": ("block", edit("logs/.*", "fraction: 1.0", "fraction: 0.5"), FAIL,
        "validation set", "VAL_DOC_FRACTION=0.5 scores a part"),
    "bytes counted otherwise": ("block", logs_with(byte_count=164_594_398), FAIL, "bits per byte",
        r"\+8\.9 %"),
    "targets that nobody says": ("colon", edit(".*log", "tokens:62021632", ""), PASS,
        "bits per byte", "2.4359 per target, as SP1024 has"),
    "spaces counted twice, of unknown targets": ("colon", both(logs_with(byte_count=176_300_000),
        edit(".*log", "tokens:62021632", "")), FAIL, "bits per byte", r"\+16\.7 % .*counted twice"),
    "adapted first": ("colon", ADAPTED, FAIL, "score before update",
        "'ttt_epoch:1/2 loss:0.6' and no score"),
    "calibration past the end": ("colon", edit(".*log", "layers in 0.0s", "layers in 9.0s"), FAIL,
        "train seconds", r"595\.00 \+ 9\.0 for 'gptq:cal.* exceeds 600"),
    "calibrated on validation text": ("colon", edit(".*log", "gptq:calibrated",
        "gptq:val data calibrated"), FAIL, "train seconds", "on validation text"),
    "a copy under another seed": ("colon", lambda f: f.update({"train_seed7.log":
        f["train_seed42.log"]}), FAIL, "logs distinct",
        "train_seed7.log is the log of seed 42.*same scores"),
    "a score one digit off": ("colon", claim(val_bpb=1.1196), FAIL, "val_bpb",
        "1.1196 is no mean of the logs"),
    "the best seed's score": ("colon", claim(val_bpb=1.11912345), WARN, "val_bpb",
        "is seed 7's .*; the mean of 3 logs is"),
    "a score before quantization": ("colon", claim(val_bpb=1.15), FAIL, "val_bpb",
        "before quantization"),
    "a diagnostic's score": ("block", lambda f:
        f["submission.json"]["results"].update(mean_val_bpb=1.14), FAIL, "mean_val_bpb",
        "mean of diagnostic_pre-quantization.*; the last evaluation is"),
    "steps of a row": ("colon", claim(seed_results={"42": {"val_bpb": 1.1194, "steps": 6100}}),
        WARN, "seed results", "steps 6100 where the log has 5999"),
    "README's score": ("colon", edit("README.md", "**1.1194**", "**1.0810**"), FAIL,
        "README's figures", "seed 42, 'val_bpb': 1.0810, the log has 1.11941234"),
    "README's headline": ("colon", edit("README.md", "1.1195", "1.0810"), WARN, "README's figures",
        r"first scores are .*1\.0810"),
    "README's steps": ("colon", edit("README.md", "5,999", "6,029"), WARN, "README's figures",
        "'Steps': 6029, the log has 5999"),
    "a value without its point": ("colon", edit("README.md", "=0.03", "=092"), WARN,
        "README's commands", r"MATRIX_LR=092: is 0\.92 meant"),
    "other code": ("colon", edit(".*log", f"Code size: {len(SOURCE)}", "Code size: 99999"), WARN,
        "same code", "99,999"),
    "a module that is imported": ("colon", both(edit("train_gpt.py", "import sys", "import helper"),
        lambda f: f.update({"helper.py": "#" * 100_000})), FAIL, "bytes", "exceeds 16,000,000 by"),
    "a module that is not": ("colon", lambda f: f.update({"prepare_data.py": "#" * 100_000}), WARN,
        "code files", "not counted, since the script does not name them: prepare_data.py 100,000"),
    "a second file": ("colon", both(edit("train_gpt.py", SOURCE,
        "exec(open('source.py').read())\n"), lambda f: f.update({"source.py": SOURCE})), PASS,
        "code files", r"source.py 2\d\d \(counted: train_gpt.py names it"),
    "a damaged wrapper": ("block", edit("train_gpt.py", "b85decode('", "b85decode('!!"), UNCHECKED,
        "wrapper", "train_gpt.py"),
    "two runs of a seed": ("colon", lambda f: f.update({"again.log": log_text(42, bpb=1.1234)}),
        WARN, "logs beside", "again.log .a rerun, or another experiment"),
    "a summary of the logs": ("colon", lambda f: f.update({"results.txt":
        "final val_loss:1.8 val_bpb:1.1\n"}), PASS, "logs beside",
        "results.txt .no training in it"),
    "steps that look like seeds": ("colon", claim(step_results={"1000": {"val_bpb": 1.3}},
        seed_results=None), PASS, "seeds named", ""),
    "a promise that nobody can confirm": ("colon", claim(compliance={"no_slot": True}),
        UNCHECKED, "compliance", ""),
    "no log": ("colon", drop(r"\.log$"), UNCHECKED, "bytes", "there is none"),
    "no code": ("colon", drop("train_gpt.py"), UNCHECKED, "settings read", "no script"),
    "no sizes": ("colon", both(edit(".*log", "Serialized model int6", "x"), edit(".*log",
        "Total submission size", "y")), UNCHECKED, "bytes", "no model size in train_seed"),
    "no timer": ("colon", edit(".*log", "eval_time:400000ms", ""), UNCHECKED, "eval seconds",
        "no eval_time of final_int6_sl"),
    "no claims": ("colon", drop("json"), UNCHECKED, "submission.json", "no claim is compared"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(tmp_path, fault):
    form, plant, status, what, pattern = FAULTS[fault]
    files = FORMS[form]()
    plant(files)
    sub = checked(tmp_path, files)
    assert [text for name, text in said(sub, status) if name == what
            and re.search(pattern, text)], "\n".join(
        submission.verdict_lines(sub))
    if status != FAIL and not fault.startswith("no "):
        assert not said(sub, FAIL), submission.verdict_lines(sub)


def test_the_evaluation_of_a_seed_may_have_a_log_of_its_own(tmp_path):
    files = colon()
    for seed in BPB:
        training, evaluation = files.pop(f"train_seed{seed}.log").split("final_int6_sliding", 1)
        files |= {f"train_seed{seed}.log": training,
                  f"eval_seed{seed}.log": f"seed:{seed}\nfinal_int6_sliding{evaluation}"}
    sub = checked(tmp_path, files)
    assert not said(sub, FAIL) and len(sub.logs) == 3, submission.verdict_lines(sub)
    assert {"bytes", "train seconds", "eval seconds", "val_bpb",
            "validation set"} <= {what for what, _ in said(sub, PASS)}


@pytest.mark.parametrize("logs,names", [(["*_v1.0.txt"], "v1.0"),
                                        (["log_seed42_v1.1.txt", "train.log"], "42_v1.1|train")])
def test_the_logs_that_count_can_be_chosen(tmp_path, logs, names):
    sub = checked(tmp_path, beside(), logs=logs)
    assert sub.logs and all(re.search(names, log.name) for log in sub.logs)
    with pytest.raises(submission.Problem, match="--logs none: no log of that name; there are"):
        submission.check(sub.folder, logs=["none"])


def test_a_record_to_beat_without_logs_is_read_from_its_figures(tmp_path, capsys):
    pytest.importorskip("scipy")
    new = write(tmp_path / "track_10min_16mb" / "new", colon())
    old = {k: v for k, v in colon().items() if "log" not in k}
    old["submission.json"] |= dict(val_bpb=1.13, val_bpb_std=0.0004, seed_results=None)
    found = dict(said(submission.check(new, against=str(write(tmp_path / "old", old))), PASS))
    assert "1.89" in found["improvement"] and "Welch's p = " in found["improvement"]
    assert submission.main(["check", str(new), "--against", str(new)]) == 1
    assert "FAIL         improvement" in capsys.readouterr().out


def test_the_score_that_is_claimed_is_the_one_to_beat_with(tmp_path):
    """An evaluation after the claimed one, of a part of the text: the claim is right."""
    pytest.importorskip("scipy")
    files, plain = colon(), colon()
    for seed in BPB:
        files[f"train_seed{seed}.log"] += f"last_words val_loss:{1 + seed / 1e6} val_bpb:0.9\n"
    against = "1.1300,0.0004,3,bpb"
    found, clean = (checked(tmp_path / name, f, against=against)
                    for name, f in (("a", files), ("b", plain)))
    assert not said(found, FAIL), submission.verdict_lines(found)
    assert found.kind == clean.kind == "final_int6_sliding_window"
    [text], [expected] = ([text for what, text in said(sub, PASS) if what == "improvement"]
                          for sub in (found, clean))
    assert text == expected
    [doubt] = [text for what, text in said(found, UNCHECKED) if what == "bits per byte"]
    assert "differ between evaluations: " in doubt and "last_words 1.603" in doubt


def test_a_claimed_score_with_bytes_of_its_own_fails(tmp_path):
    files = colon()
    for seed, bpb in BPB.items():  # the text of the claimed score has 12 % more bytes
        files[f"train_seed{seed}.log"] = log_text(seed, byte_count=169_000_000).replace(
            "val_bpb:1.1400", f"val_bpb:{1.14 * 169_000_000 / 151_076_000:.4f}")
    assert [text for what, text in said(checked(tmp_path, files), FAIL)
            if what == "bits per byte" and "differ between evaluations" in text]


@pytest.mark.parametrize("text, status", [
    ("world_size:8 device:NVIDIA H100 80GB HBM3", PASS), ("world_size:8", UNCHECKED),
    ("device:NVIDIA H100 80GB HBM3", UNCHECKED), ("world_size:4", FAIL)])
def test_hardware_passes_where_number_and_device_are_known(tmp_path, text, status):
    files = colon()
    edit(".*log", "world_size:8 grad_accum_steps:1", text)(files)
    assert "hardware" in dict(said(checked(tmp_path, files), status))


def test_a_call_too_deep_to_be_read_is_no_adaptation():
    function = ast.Name("ttt", ast.Load())
    for _ in range(3000):
        function = ast.Attribute(function, "a", ast.Load())
    call = ast.Call(function, [ast.Name("val", ast.Load())], [])
    assert submission.adapts_on_validation(ast.Expr(call)) is False
