"""The whole script: what a run writes, what reading it back gives, that ranks and seeds do what
they should, and refusals."""

import hashlib
import json
import re
from dataclasses import fields
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_gpt
from conftest import ROOT, TINY
from bench.fuzz import put_together, taken_apart

# A run in which everything happens: validation on the way, SWA, EMA, late fake quantization.
EVERYTHING = dict(ITERATIONS=10, WARMDOWN_ITERS=8, VAL_LOSS_EVERY=4, SWA_ENABLED=1, SWA_EVERY=1,
                  LATE_QAT_THRESHOLD=0.5)
EXACT = 1e-5  # "to 1e-5 when everything is fp32"
KINDS = ["float", "int8", "banded", "ttt"]


def succeeded(done):
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def trained(run_once, tmp_path_factory):
    """One finished run with its folder, artifact and scores."""
    out = tmp_path_factory.mktemp("trained")
    done = succeeded(run_once(OUT_DIR=out, SCORES_PATH=out / "scores.npy", **EVERYTHING))
    return SimpleNamespace(out=out, log=done.log, result=done.result,
                           artifact=out / "final_model.ptz", stdout=done.stdout,
                           content=(out / "final_model.ptz").read_bytes(),
                           scores=np.load(out / "scores.npy"))


def environment(corpus, **variables):
    """The variables of a tiny run, for train_gpt.main inside of this process."""
    base = {**TINY, "DATA_PATH": corpus.folder, "TOKENIZER_PATH": corpus.model, "RUN_ID": "run"}
    return {k: str(v) for k, v in {**base, **variables}.items()}


@pytest.fixture
def ran(corpus, tmp_path, capsys):
    """ran(NAME=value, ...) → a finished run inside of this process: result, artifact, console."""
    def run(**variables):
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        assert train_gpt.main([], environment(corpus, OUT_DIR=out, **variables)) == 0
        result = json.loads((out / "logs" / "run.json").read_text())
        own = out / "final_model.ptz"
        return SimpleNamespace(out=out, result=result, told=capsys.readouterr().out,
                               content=own.read_bytes() if own.exists() else b"")
    return run


# -- what a run writes

RESULT_KEYS = """preset settings seed world_size device versions code_sha256 code_bytes model_bytes
    total_bytes model_params steps train_tokens train_seconds eval_seconds pack_seconds
    scored_targets scored_bytes peak_memory_bytes val_loss val_bpb""".split()


def test_the_result_file_says_what_was_run(trained):
    result = trained.result
    assert not set(RESULT_KEYS) - result.keys()
    assert result["model_bytes"] == len(trained.content)
    assert result["total_bytes"] == result["code_bytes"] + len(trained.content)
    assert result["steps"] == 10 and result["train_tokens"] == 3840 and result["seed"] == 1337
    assert result["world_size"] == 1
    assert result["scored_targets"] == 1024
    assert list(result["val_loss"]) == list(result["val_bpb"]) == KINDS
    assert all(result[key] > 0 for key in ("train_seconds", "eval_seconds", "pack_seconds",
                                           "scored_bytes", "peak_memory_bytes"))
    assert {f.name for f in fields(train_gpt.Settings)} == set(result["settings"])
    assert result["settings"]["iterations"] == 10
    assert {"python", "torch", "numpy", "sentencepiece"} <= result["versions"].keys()


def test_the_result_counts_the_parameters_that_are_in_the_file(trained):
    _, tensors, _ = train_gpt.decode_artifact(trained.content)
    assert trained.result["model_params"] == sum(int(np.prod(t.shape)) for t in tensors.values())


def test_loss_and_bpb_belong_to_the_same_bytes(trained):
    """Implied bytes = loss / ln 2 × targets ÷ bpb."""
    r = trained.result
    for kind in KINDS:
        implied = r["val_loss"][kind] / np.log(2) * r["scored_targets"] / r["val_bpb"][kind]
        assert implied == pytest.approx(r["scored_bytes"], rel=1e-9)


def test_the_log_begins_with_source_versions_and_settings(trained):
    source, rule, rest = trained.log.partition("\n" + "=" * 100 + "\n")
    assert hashlib.sha256(source.encode()).hexdigest() == trained.result["code_sha256"]
    places = [rest.index(text) for text in ("versions: python", "setting ", "run:run",
                                            "model_params:", "step:1/")]
    assert places == sorted(places)
    for f in fields(train_gpt.Settings):
        name = f.name.upper()
        line = re.search(rf"^setting {name}=(.*?)( +\(set\))?$", rest, re.M)
        assert line and line[1] == str(trained.result["settings"][f.name]), name
        assert bool(line[2]) == (name in {**TINY, **EVERYTHING} or name in
                                 ("DATA_PATH", "TOKENIZER_PATH", "RUN_ID", "OUT_DIR",
                                  "SCORES_PATH")), name


NUMBER, LOSS, BPB = r"\d+", r"val_loss:\d+\.\d{4}", r"val_bpb:\d+\.\d{4}"
EXACT_LOSS, EXACT_BPB = r"val_loss:\d+\.\d{8}", r"val_bpb:\d+\.\d{8}"
TIMED = r"eval_time:\d+ms"
LOG_LINES = [
    r"model_params:\d+", r"step:1/10 train_loss:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms.*",
    rf"step:4/10 {LOSS} {BPB} train_time:\d+ms step_avg:\d+\.\d\dms",
    rf"step:10/10 {LOSS} {BPB} train_time:\d+ms .*",
    r"warmup_step:2/2", r"XSA:last_3 active_layers:\[0, 1, 2\]",
    r"late_qat:enabled step:\d+ scale:0\.\d{4}", r"swa:start step:\d+",
    r"ema:applying EMA and SWA weights", rf"DIAGNOSTIC post_ema {LOSS} {BPB} {TIMED}",
    r"gptq_calibration:start", r"gptq_calibration:done matrices:\d+ time:\d+ms",
    *(rf"quantized {kind} weights:\d+ bits_per_code:\d\.\d+ mean_step:0\.\d+ weight_error:0\.\d+"
      for kind in
      ("table", "hashed", "proj", "attn", "gate", "mlp")),
    rf"final_int8_roundtrip {LOSS} {BPB} {TIMED}",
    rf"final_int8_roundtrip_exact {EXACT_LOSS} {EXACT_BPB} {TIMED}",
    rf"final_int8_banded {LOSS} {BPB} segment:64 prefix:32 {TIMED}",
    rf"final_int8_banded_exact {EXACT_LOSS} {EXACT_BPB} segment:64 prefix:32 {TIMED}",
    rf"legal_ttt {LOSS} {BPB} {TIMED}", rf"legal_ttt_exact {EXACT_LOSS} {EXACT_BPB} {TIMED}",
    r"ttt_banded:start chunks=11 chunk_tokens=96 total_windows=16 stride=64 "
    r"ttt_lr=0\.05 ttt_epochs=2 freeze_blocks=0",
    r"ttt_banded:params unfrozen=\d+ frozen=0",
    r"  ttt_chunk \[10/11\] bpb=\d+\.\d{6} time=\d+\.\ds",
    r"ttt_banded:done val_loss=\d+\.\d+ val_bpb=\d+\.\d+ elapsed=\d+\.\ds",
    r"Serialized model int8\+rans: \d+ bytes", r"Code size: \d+ bytes",
    r"Total submission size int8\+rans: \d+ bytes.*",
    r"code_sha256:[0-9a-f]{64}", r"ledger: targets:1024 bytes:\d+ .*"]


def test_log_and_console_have_each_line_once(trained):
    for pattern in LOG_LINES:
        for place in (trained.log, trained.stdout):
            assert len(re.findall(rf"^{pattern}$", place, re.M)) == 1, pattern


def test_the_log_says_what_the_result_says(trained):
    for key, kind in (("final_int8_roundtrip", "int8"), ("final_int8_banded", "banded"),
                      ("legal_ttt", "ttt")):
        loss, bpb = re.search(rf"^{key}_exact val_loss:(\S+) val_bpb:(\S+)", trained.log,
                              re.M).groups()
        assert (loss, bpb) == (f"{trained.result['val_loss'][kind]:.8f}",
                               f"{trained.result['val_bpb'][kind]:.8f}")
    codec = train_gpt.open_artifact(trained.content)[0]["codec"]
    total = trained.result["total_bytes"]
    assert f"Total submission size int8+{codec}: {total} bytes" in trained.log


def test_the_log_says_what_every_tensor_got(trained):
    """One line for each, then one for each kind."""
    _, tensors, _ = train_gpt.decode_artifact(trained.content)
    for name, t in tensors.items():
        lines = re.findall(rf"^quantized {re.escape(name)} int8 weights:(\d+) (.*)$", trained.log,
                           re.M)
        assert [int(n) for n, _ in lines] == ([] if t.bits == 16 else [t.codes.numel()])
    kinds = dict(re.findall(r"^quantized (\w+) weights:(\d+) ", trained.log, re.M))
    assert sum(map(int, kinds.values())) == sum(t.codes.numel() for t in tensors.values()
                                                if t.bits < 16)
    assert "tok_emb int8" not in trained.stdout, "the console gets the kinds alone"


def test_without_qat_or_averages_the_log_does_not_claim_them(corpus, tmp_path, capsys):
    plain = environment(corpus, OUT_DIR=tmp_path, LATE_QAT_THRESHOLD=0, EMA_ENABLED=0,
                        TTT_ENABLED=0, EVAL_STRIDE=0, GPTQ=0,
                        ITERATIONS=2)
    assert train_gpt.main([], plain) == 0
    told = capsys.readouterr().out
    assert not re.search(r"late_qat|swa:|ema:|ttt|sliding|banded|gptq|stopping_early", told)
    assert list(json.loads((tmp_path / "logs" / "run.json").read_text())["val_loss"]) == ["float",
                                                                                          "int8"]


@pytest.mark.parametrize("gptq, slower", [(0, 1), (1, 1), (1, 3)])
def test_the_training_clock_holds(corpus, tmp_path, capsys, monkeypatch, gptq, slower):
    """Training and calibration take at most MAX_WALLCLOCK_SECONDS by this test's clock too, also
    where passes take `slower` times as long as before the clock, when the reserve was measured."""
    spans, pause, train = dict(optimize=[], calibrate=[]), [0.01], train_gpt.Trainer.train

    def timed(owner, name):
        real = getattr(owner, name)

        def run(*arguments):
            began = time.perf_counter()
            result = real(*arguments)
            spans[name].append((began, time.perf_counter()))
            return result
        monkeypatch.setattr(owner, name, run)

    def started(trainer, *arguments):
        pause[0] *= slower
        for times in spans.values():
            times.clear()
        train(trainer, *arguments)
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda x: time.sleep(pause[0]) or backward(x))
    monkeypatch.setattr(train_gpt.Trainer, "train", started)
    timed(train_gpt.Trainer, "optimize"), timed(train_gpt, "calibrate")
    variables = dict(MAX_WALLCLOCK_SECONDS=1.5, ITERATIONS=20000, GPTQ=gptq, TTT_ENABLED=0,
                     EVAL_STRIDE=0)
    assert train_gpt.main([], environment(corpus, OUT_DIR=tmp_path, **variables)) == 0
    result = json.loads((tmp_path / "logs" / "run.json").read_text())
    seconds = spans["optimize"][-1][1] - spans["optimize"][0][0]
    seconds += sum(end - begin for begin, end in spans["calibrate"])
    most = 1.5 * 1.02  # the last step's own noise on a busy machine
    assert 1 < seconds <= most and 1 < result["train_seconds"] <= most
    told = capsys.readouterr().out
    assert len(spans["optimize"]) == result["steps"] and "stopping_early: wallclock_cap" in told
    assert len(spans["calibrate"]) == gptq
    assert slower == 1 or "gptq_calibration:stopped after" in told


def test_an_earlier_log_is_kept(corpus, tmp_path, capsys):
    for seed in (1, 2, 3):
        assert train_gpt.main([], environment(corpus, OUT_DIR=tmp_path, SEED=seed, ITERATIONS=1,
                                              TTT_ENABLED=0)) == 0
    logs = sorted(p.name for p in (tmp_path / "logs").glob("*.txt"))
    assert logs == ["run.1.txt", "run.2.txt", "run.txt"]
    seeds = [re.findall(r"^setting SEED=(\d+)", (tmp_path / "logs" / name).read_text(), re.M)
             for name in logs]
    assert seeds == [["1"], ["2"], ["3"]]


# -- seeds

def test_the_same_seed_gives_the_same_artifact_and_another_another(trained, ran):
    again = ran(**EVERYTHING)
    assert again.content == trained.content
    for key in ("val_loss", "ledger_sha256"):
        assert again.result[key] == trained.result[key]
    other = ran(SEED=7, **EVERYTHING)
    one, two = (train_gpt.decode_artifact(c)[1] for c in (trained.content, other.content))
    assert not torch.equal(one["cores.0.attn.q"].codes, two["cores.0.attn.q"].codes)
    assert other.result["val_loss"]["float"] != trained.result["val_loss"]["float"]


# -- reading it back

def test_eval_only_gives_the_same_scores_and_trains_nothing(trained, ran, tmp_path):
    done = ran(EVAL_ONLY=trained.artifact, SCORES_PATH=tmp_path / "scores.npy", **EVERYTHING)
    expected = {k: v for k, v in trained.result["val_loss"].items() if k != "float"}
    assert done.result["val_loss"] == expected
    assert np.array_equal(np.load(tmp_path / "scores.npy"), trained.scores)
    assert done.result["steps"] == 0 and "train_loss:" not in done.told
    assert done.result["model_bytes"] == len(trained.content)
    assert trained.artifact.read_bytes() == trained.content and not list(tmp_path.rglob("*.ptz"))


def test_the_kept_scores_recompute_the_result(trained, corpus, tiny):
    scores = trained.scores.astype(np.float64)
    assert trained.scores.dtype == np.float32 and len(scores) == trained.result["scored_targets"]
    assert scores.mean() == pytest.approx(trained.result["val_loss"]["ttt"], rel=1e-12)
    byte_count = train_gpt.ByteTable(tiny()).count(corpus.tokens[:1025])
    assert scores.sum() / np.log(2) / byte_count == pytest.approx(trained.result["val_bpb"]["ttt"],
                                                                  rel=1e-12)


def eval_only(corpus, artifact, out, **variables):
    """The settings that evaluating somebody's artifact takes, and no others."""
    return {k: str(v) for k, v in dict(EVAL_ONLY=artifact, DATA_PATH=corpus.folder,
                                       TOKENIZER_PATH=corpus.model, OUT_DIR=out,
                                       RUN_ID="run", DEVICE="cpu", **variables).items()}


def test_eval_only_takes_the_settings_from_the_file(trained, corpus, tmp_path, capsys):
    assert train_gpt.main([], eval_only(corpus, trained.artifact,
                                        tmp_path)) == 0, capsys.readouterr().err
    result = json.loads((tmp_path / "logs" / "run.json").read_text())
    for kind in ("int8", "banded", "ttt"):
        assert result["val_loss"][kind] == pytest.approx(trained.result["val_loss"][kind], rel=1e-6)


def test_eval_only_judges_evaluation_settings_by_the_files_own(trained, corpus, tmp_path, capsys):
    """A chunk of 64 tokens holds a row of this artifact's 32; that a default row is longer has
    nothing to do with it."""
    status = train_gpt.main([], eval_only(corpus, trained.artifact, tmp_path, EVAL_STRIDE=16,
                                          EVAL_ATTENTION="window",
                                          TTT_CHUNK_TOKENS=64))
    assert status == 0, capsys.readouterr().err


@pytest.mark.parametrize("variables", [dict(NUM_LAYERS=2, VE_LAYERS=1, XSA_LAST_N=2),
                                       dict(MODEL_DIM=64), dict(MLP_BITS=5),
                                       dict(LEAKY_SLOPE=0.25), dict(TRAIN_SEQ_LEN=16)])
def test_eval_only_refuses_settings_of_another_model(trained, corpus, tmp_path, capsys, variables):
    name = next(iter(variables))
    assert train_gpt.main([], environment(corpus, EVAL_ONLY=trained.artifact, OUT_DIR=tmp_path,
                                          **variables)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and name in said and "made with other settings" in said
    assert not list(tmp_path.iterdir())


def forged(trained, **stored):
    """The trained artifact with other settings inside and a right checksum."""
    header, index, side, codes = taken_apart(trained.content)
    index["settings"].update(stored)
    return put_together(index, side, codes, dict(codec=header["codec"]))


@pytest.mark.parametrize("name, value", [("scores_path", "stolen.npy"), ("out_dir", "elsewhere"),
                                         ("run_id", "../../x")])
def test_an_artifact_cannot_say_where_files_are_written(trained, corpus, tmp_path, monkeypatch,
                                                        capsys, name, value):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "in.ptz").write_bytes(forged(trained, **{name: value}))
    variables = eval_only(corpus, tmp_path / "in.ptz", tmp_path / "a" / "b")
    if name in ("out_dir", "run_id"):
        del variables[name.upper()]
        monkeypatch.chdir(tmp_path / "a" / "b")
    before = {p for p in tmp_path.rglob("*") if p.is_file()}
    status = train_gpt.main([], variables)
    written = {p for p in tmp_path.rglob("*") if p.is_file()} - before
    assert status == 2 or all("logs" in p.parts and "a" in p.relative_to(tmp_path).parts
                              for p in written), written
    assert not any(part in str(p.relative_to(tmp_path)) for p in written
                   for part in ("stolen", "elsewhere"))


@pytest.mark.parametrize("stored", [dict(num_layers=64), dict(model_dim=64), dict(model_dim=2**30),
                                    dict(vocab_size=321)])
def test_an_artifact_whose_settings_ask_for_another_model_is_refused_before_one_is_built(
        trained, corpus, tmp_path, monkeypatch, capsys, stored):
    """A file of some kilobytes must not make its reader allocate the terabytes that its settings
    promise."""
    (tmp_path / "in.ptz").write_bytes(forged(trained, **stored))
    monkeypatch.setattr(train_gpt, "build_model", lambda *_: pytest.fail("built"))
    assert train_gpt.main([], eval_only(corpus, tmp_path / "in.ptz", tmp_path / "out",
                                        VOCAB_SIZE=320)) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("stored", [dict(num_layers="many"), dict(leaky_slope=float("nan")),
                                    dict(num_heads=[4]), dict(seed=None),
                                    dict(no_such_setting=1), dict(value_residual={"a": 1}),
                                    dict(num_kv_heads=3), dict(rope_dims=10**400)])
def test_an_artifact_with_impossible_settings_is_refused_in_words(trained, corpus, tmp_path, capsys,
                                                                  stored):
    (tmp_path / "in.ptz").write_bytes(forged(trained, **stored))
    assert train_gpt.main([], eval_only(corpus, tmp_path / "in.ptz", tmp_path / "out")) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and next(iter(stored)).upper() in said.upper()


# -- ranks

# The script, saying losses and gradient norms with all their digits.
EXACT_LOSSES = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train_gpt
step, warm_up, steps = train_gpt.Trainer.optimize, train_gpt.Trainer.warm_up, []
def exact(self, *arguments):
    steps.append(step(self, *arguments))
    loss, norm = steps[-1]
    mean = self.rt.sum_(loss.clone()).item() / self.rt.world_size
    self.rt.log(f"exact {{len(steps)}} {{mean!r}} {{norm.item()!r}}")
    return loss, norm
def not_counted(self):
    train_gpt.Trainer.optimize = step
    warm_up(self)
    train_gpt.Trainer.optimize = exact
train_gpt.Trainer.warm_up = not_counted
sys.exit(train_gpt.main(sys.argv[1:], os.environ))
"""
# No fake quantization, and rates at which nothing chaotic happens: at the default ones
# Newton–Schulz enlarges the last bit of a
# gradient until the 30th loss differs by 1.6e-5, and rounding to six bits then makes 3e-4 of it in
# the score. Two rows a pass, on
# any of these ranks: calibration squares the gradient of each pass, so what a pass holds is part of
# the result.
STEPS_25 = dict(PRECISION="fp32", ITERATIONS=25, TRAIN_LOG_EVERY=1, WARMDOWN_ITERS=12,
             LATE_QAT_THRESHOLD=0, VAL_LOSS_EVERY=20,
             MATRIX_LR=0.01, SCALAR_LR=0.01, TIED_EMBED_LR=0.01, MICRO_BATCH_TOKENS=64,
             GPTQ_BATCHES=2)


@pytest.fixture(scope="module")
def by_ranks(run_once, tmp_path_factory):
    """{ranks: 25 steps on so many}, and what each wrote."""
    script = tmp_path_factory.mktemp("script") / "exact_losses.py"
    script.write_text(EXACT_LOSSES)
    runs = {}
    for ranks in (1, 3):
        out = tmp_path_factory.mktemp(f"ranks{ranks}")
        runs[ranks] = succeeded(run_once(OUT_DIR=out, ranks=ranks, script=script, **STEPS_25))
        runs[ranks].artifact = out / "final_model.ptz"
        runs[ranks].steps = np.array(re.findall(r"^exact (\S+) (\S+) (\S+)$", runs[ranks].log,
                                                re.M), float)
    return runs


@pytest.mark.parametrize("ranks", [3])
def test_losses_of_25_steps_do_not_depend_on_the_ranks(by_ranks, ranks):
    one, several = by_ranks[1].steps, by_ranks[ranks].steps
    assert one.shape == several.shape == (25, 3) and by_ranks[ranks].result["world_size"] == ranks
    assert one[-1, 1] < one[0, 1] - 1, "a model that learns nothing would prove nothing"
    np.testing.assert_allclose(several[:, 1], one[:, 1], rtol=0, atol=EXACT)
    np.testing.assert_allclose(several[:, 2], one[:, 2], rtol=1e-4)


@pytest.mark.parametrize("ranks", [3])
def test_the_trained_weights_do_not_depend_on_the_ranks(by_ranks, ranks):
    """The float score agrees; a weight halfway between two codes may be rounded either way, which
    compensation passes on to others, so that few codes may differ."""
    one, several = by_ranks[1], by_ranks[ranks]
    for key in ("val_loss", "val_bpb"):
        assert abs(several.result[key]["float"] - one.result[key]["float"]) < EXACT
    pairs = [[train_gpt.read_artifact(r.artifact)[1][name] for r in (one, several)]
             for name in train_gpt.read_artifact(one.artifact)[1]]
    differences = np.concatenate([(a.codes.int() - b.codes.int()).flatten().numpy() for a,
                                  b in pairs if a.bits < 16])
    assert np.count_nonzero(differences) < 1e-3 * len(differences)


@pytest.mark.slow
def test_one_artifact_scores_the_same_on_any_ranks(by_ranks, run_script):
    done = succeeded(run_script(ranks=3, EVAL_ONLY=by_ranks[1].artifact, **STEPS_25))
    for kind in ("int8", "banded", "ttt"):
        assert abs(done.result["val_loss"][kind] - by_ranks[1].result["val_loss"][kind]) < EXACT
        assert abs(done.result["val_bpb"][kind] - by_ranks[1].result["val_bpb"][kind]) < EXACT


def test_ranks_that_do_not_divide_the_rows_are_refused(run_script, tmp_path):
    done = run_script(ranks=2, TRAIN_BATCH_TOKENS=32 * 5, MICRO_BATCH_TOKENS=32)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert "TRAIN_BATCH_TOKENS=160" in done.stderr and "each of 2 ranks" in done.stderr
    assert not list(tmp_path.rglob("*.ptz"))


# -- compiled

@pytest.mark.slow
def test_the_compiled_run_equals_the_eager_one(run_script, tmp_path):
    script = tmp_path / "exact_losses.py"
    script.write_text(EXACT_LOSSES)
    few = dict(STEPS_25, ITERATIONS=12, WARMDOWN_ITERS=8, VAL_LOSS_EVERY=0, LATE_QAT_THRESHOLD=0.6)
    runs = [succeeded(run_script(script=script, COMPILE=c, OUT_DIR=tmp_path / c, **few))
            for c in ("0", "1")]
    assert re.search(r"^compile:variants 2 graph_breaks 0 graphs_", runs[1].log, re.M)
    assert "late_qat:enabled" in runs[1].log
    eager, compiled = (np.array(re.findall(r"^exact \S+ (\S+) \S+$", r.log, re.M), float)
                       for r in runs)
    np.testing.assert_allclose(compiled, eager, rtol=0, atol=1e-4)
    for kind in KINDS:
        assert runs[1].result["val_loss"][kind] == pytest.approx(runs[0].result["val_loss"][kind],
                                                                 abs=1e-4)


# -- the budget

def test_a_tight_budget_is_kept_and_scored_as_it_is(corpus, tmp_path, trained, capsys):
    """What is scored is what ships: the widened model's own score, not that of a finer one."""
    code = len(train_gpt.SHIPPED)
    budget = code + int(0.9 * len(trained.content))
    assert train_gpt.main([], environment(corpus, OUT_DIR=tmp_path, ARTIFACT_BUDGET_BYTES=budget,
                                          **EVERYTHING)) == 0
    result = json.loads((tmp_path / "logs" / "run.json").read_text())
    assert result["total_bytes"] <= budget
    assert result["total_bytes"] == code + (tmp_path / "final_model.ptz").stat().st_size
    assert result["val_loss"]["float"] == pytest.approx(trained.result["val_loss"]["float"],
                                                        abs=1e-6)
    assert result["val_loss"]["int8"] != trained.result["val_loss"]["int8"]
    assert result["model_bytes"] >= 0.995 * (budget - code)
    said = rf"^artifact:level 2\^-?\d+\.\d+ fits {result['model_bytes']} of {budget - code} bytes$"
    assert re.search(said, capsys.readouterr().out, re.M)
