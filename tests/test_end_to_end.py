"""The whole script: what a run writes, what reading it back gives, that ranks and seeds do what
they should, and refusals."""

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

import train_gpt
from bench import artifact, evaluator
from bench.fuzz import put_together, taken_apart
from conftest import SCRIPT, TINY, clean_environ, environment, left, on_ranks, run_main

# A run in which everything happens: validation on the way, SWA, EMA, late fake quantization.
EVERYTHING = dict(ITERATIONS=10, WARMDOWN_ITERS=8, VAL_LOSS_EVERY=4, SWA_ENABLED=1, SWA_EVERY=1,
                  LATE_QAT_THRESHOLD=0.5, SEGMENT_SCHEDULE="8:0.2,16:0.6")
PLAIN = dict(TTT_ENABLED=0, EVAL_STRIDE=0)  # no scores but those of the whole rows
SHORT = dict(ITERATIONS=1, WARMUP_STEPS=0, GPTQ=0, VAL_LIMIT_TOKENS=64, **PLAIN)
EXACT = 1e-5  # "to 1e-5 when everything is fp32"
KINDS = ["float", "int8", "banded", "ttt"]


def succeeded(done):
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """One finished run with its folder, artifact and scores."""
    out = tmp_path_factory.mktemp("trained")
    done = succeeded(run_main(corpus, out, SCORES_PATH=out / "scores.npy", **EVERYTHING))
    done.scores = np.load(out / "scores.npy")
    return done


# -- what a run writes

def test_the_result_file_says_what_was_run(trained):
    result, (_, tensors, _) = trained.result, train_gpt.decode_artifact(trained.content)
    assert {"preset", "device", "code_sha256"} <= result.keys()
    assert result["model_bytes"] == len(trained.content)
    assert result["artifact_sha256"] == hashlib.sha256(trained.content).hexdigest()
    assert result["total_bytes"] == result["code_bytes"] + len(trained.content)
    assert result["model_params"] == sum(t.codes.numel() for t in tensors.values())
    assert result["steps"] == 10 and result["train_tokens"] == 3840 and result["seed"] == 1337
    assert result["world_size"] == 1 and result["scored_targets"] == 1024
    assert all(result[key] > 0 for key in ("train_seconds", "eval_seconds", "pack_seconds",
                                           "scored_bytes", "peak_memory_bytes"))
    assert {f.name for f in fields(train_gpt.Settings)} == set(result["settings"])
    assert result["settings"]["iterations"] == 10
    assert {"python", "torch", "numpy", "sentencepiece"} <= result["versions"].keys()


def test_loss_and_bpb_belong_to_the_kept_scores_and_the_same_bytes(trained, corpus, tiny):
    """Implied bytes = loss / ln 2 × targets ÷ bpb."""
    r, scores = trained.result, trained.scores.astype(np.float64)
    assert trained.scores.dtype == np.float32 and len(scores) == r["scored_targets"]
    assert scores.mean() == pytest.approx(r["val_loss"]["ttt"], rel=1e-12)
    assert r["scored_bytes"] == train_gpt.ByteTable(tiny()).count(corpus.tokens[:1025])
    assert list(r["val_loss"]) == list(r["val_bpb"]) == KINDS
    for kind in KINDS:
        implied = r["val_loss"][kind] / np.log(2) * r["scored_targets"] / r["val_bpb"][kind]
        assert implied == pytest.approx(r["scored_bytes"], rel=1e-9)


def test_the_log_begins_with_source_versions_and_settings(trained):
    source, rule, rest = trained.log.partition("\n" + "=" * 100 + "\n")
    assert hashlib.sha256(source.encode()).hexdigest() == trained.result["code_sha256"]
    places = [rest.index(text) for text in ("versions: python", "setting ", "run:run",
                                            "model_params:", "step:1/")]
    assert places == sorted(places)
    given = {*TINY, *EVERYTHING, "DATA_PATH", "TOKENIZER_PATH", "RUN_ID", "OUT_DIR", "SCORES_PATH"}
    found = re.findall(r"^setting (\w+)=(.*?)(?: +(\(set\)))?$", rest, re.M)
    assert found == [(name.upper(), str(value), "(set)" if name.upper() in given else "")
                     for name, value in trained.result["settings"].items()]


LOSS = r"val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4}"
LOG_LINES = [  # those that other programs read, and those of parts that a setting switches on
    r"model_params:\d+", r"step:1/10 train_loss:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms.*",
    rf"step:4/10 {LOSS} train_time:\d+ms .*", rf"step:10/10 {LOSS} train_time:\d+ms .*",
    r"late_qat:enabled step:\d+ scale:0\.\d{4}", r"swa:start step:\d+",
    r"segments:8 tokens step:0", r"segments:16 tokens step:2", r"segments:32 tokens step:6",
    r"ema:applying EMA and SWA weights", r"gptq_calibration:done matrices:\d+ time:\d+ms",
    rf"final_int8_roundtrip {LOSS} eval_time:\d+ms", rf"legal_ttt {LOSS} eval_time:\d+ms",
    r"Serialized model int8\+rans: \d+ bytes", r"Code size: \d+ bytes",
    r"ledger: targets:1024 bytes:\d+ .*"]


def test_log_and_console_have_each_line_once_and_the_results_numbers(trained):
    r, lines = trained.result, list(LOG_LINES)
    for key, kind in (("final_int8_roundtrip", "int8"), ("final_int8_banded", "banded"),
                      ("legal_ttt", "ttt")):
        lines.append(rf"{key}_exact val_loss:{r['val_loss'][kind]:.8f} "
                     rf"val_bpb:{r['val_bpb'][kind]:.8f} .*")
    lines.append(rf"Total submission size int8\+rans: {r['total_bytes']} bytes.*")
    for pattern in lines:
        for place in (trained.log, trained.stdout):
            assert len(re.findall(rf"^{pattern}$", place, re.M)) == 1, pattern


def test_the_training_clock_holds(run_script, monkeypatch):
    """Training and calibration take at most MAX_WALLCLOCK_SECONDS by this test's clock too, also
    where passes take three times as long as before the clock, when the reserve was measured."""
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
        pause[0] *= 3
        for times in spans.values():
            times.clear()
        train(trainer, *arguments)
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda x: time.sleep(pause[0]) or backward(x))
    monkeypatch.setattr(train_gpt.Trainer, "train", started)
    timed(train_gpt.Trainer, "optimize"), timed(train_gpt, "calibrate")
    done = succeeded(run_script(MAX_WALLCLOCK_SECONDS=1.5, ITERATIONS=20000, **PLAIN))
    seconds = spans["optimize"][-1][1] - spans["optimize"][0][0]
    seconds += sum(end - begin for begin, end in spans["calibrate"])
    most = 1.5 * 1.02  # the last step's own noise on a busy machine
    assert 1 < seconds <= most and 1 < done.result["train_seconds"] <= most
    assert len(spans["optimize"]) == done.result["steps"]
    assert "stopping_early: wallclock_cap" in done.stdout
    assert len(spans["calibrate"]) == 1 and "gptq_calibration:stopped early" in done.stdout


def test_an_earlier_log_is_kept_with_its_result(run_script, tmp_path):
    for seed in (1, 2, 3):
        run_script(SEED=seed, **SHORT)
    seeds = {p.name: re.findall(r"^setting SEED=(\d+)", p.read_text(), re.M)
             for p in (tmp_path / "logs").glob("*.txt")}
    assert seeds == {"run.1.txt": ["1"], "run.2.txt": ["2"], "run.txt": ["3"]}
    assert {p.name: json.loads(p.read_text())["seed"] for p in (tmp_path / "logs").glob("*.json")
            } == {"run.1.json": 1, "run.2.json": 2, "run.json": 3}
    for log in (tmp_path / "logs").glob("*.txt"):
        log.unlink()
    run_script(SEED=4, **SHORT)
    results = [tmp_path / "logs" / f"run{n}.json" for n in (".1", ".2", ".3", "")]
    assert [json.loads(path.read_text())["seed"] for path in results] == [1, 2, 3, 4]


# -- seeds

def test_the_same_seed_gives_the_same_artifact_and_another_another(trained, run_script, tmp_path):
    again = run_script(**EVERYTHING)
    assert again.content == trained.content
    for key in ("val_loss", "ledger_sha256"):
        assert again.result[key] == trained.result[key]
    other = run_script(OUT_DIR=tmp_path / "other", SEED=7, **EVERYTHING, **PLAIN)
    one, two = (train_gpt.decode_artifact(c)[1] for c in (trained.content, other.content))
    assert not torch.equal(one["cores.0.attn.q"].codes, two["cores.0.attn.q"].codes)
    assert other.result["val_loss"]["float"] != trained.result["val_loss"]["float"]


# -- reading it back

def eval_only(corpus, artifact, out, **variables):
    """The settings that evaluating somebody's artifact takes, and no others."""
    return {k: str(v) for k, v in dict(EVAL_ONLY=artifact, DATA_PATH=corpus.folder,
                                       TOKENIZER_PATH=corpus.model, OUT_DIR=out,
                                       RUN_ID="run", DEVICE="cpu", **variables).items()}


def test_eval_only_gives_the_same_scores_and_trains_nothing(trained, run_script, tmp_path):
    done = run_script(EVAL_ONLY=trained.artifact, SCORES_PATH=tmp_path / "scores.npy", **EVERYTHING)
    violations = done.result["violations"]
    assert "EVAL_ONLY: the training was another run's, not checked here" in violations
    expected = {k: v for k, v in trained.result["val_loss"].items() if k != "float"}
    assert done.result["val_loss"] == expected
    assert np.array_equal(np.load(tmp_path / "scores.npy"), trained.scores)
    assert done.result["steps"] == 0 and "train_loss:" not in done.stdout
    assert done.result["model_bytes"] == len(trained.content)
    assert trained.artifact.read_bytes() == trained.content and not list(tmp_path.rglob("*.ptz"))


def test_eval_only_takes_the_settings_from_the_file(trained, corpus, tmp_path, capsys):
    """What is given is judged by them: a chunk of 64 tokens holds a row of this artifact's 32; that
    a default row is longer has nothing to do with it."""
    environ = eval_only(corpus, trained.artifact, tmp_path, EVAL_STRIDE=16, VAL_LIMIT_TOKENS=128,
                        EVAL_ATTENTION="window", TTT_CHUNK_TOKENS=64)
    assert train_gpt.main([], environ) == 0, capsys.readouterr().err


def forged(trained, without=None, **stored):
    """The trained artifact with other settings inside and a right checksum."""
    header, index, side, codes = taken_apart(trained.content)
    index["settings"].update(stored)
    index["settings"].pop(without, None)
    return put_together(index, side, codes, dict(codec=header["codec"]))


@pytest.mark.parametrize("stored", [
    dict(num_layers=64), dict(model_dim=2**30), dict(leaky_slope=float("nan")),
    dict(no_such_setting=1), dict(value_residual={"a": 1}), dict(rope_dims=10**400),
    dict(scores_path="stolen.npy"), dict(out_dir="elsewhere"), dict(run_id="../../x")])
def test_an_artifact_with_bad_settings_is_refused_before_a_model_is_built(
        trained, corpus, tmp_path, monkeypatch, capsys, stored):
    """A file of some kilobytes must not make its reader allocate the terabytes that its settings
    promise, nor say where files are written."""
    (tmp_path / "in.ptz").write_bytes(forged(trained, **stored))
    monkeypatch.setattr(train_gpt, "build_model", lambda *_: pytest.fail("built"))
    assert train_gpt.main([], eval_only(corpus, tmp_path / "in.ptz", tmp_path / "out")) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    name, = stored
    assert name.upper() in said.upper() or "does not hold this model" in said


def test_what_an_earlier_version_did_not_store_must_be_said(trained, corpus, tmp_path, capsys):
    """A preset must not decide it: the model would be another one."""
    (tmp_path / "in.ptz").write_bytes(forged(trained, without="key_offset"))
    variables = eval_only(corpus, tmp_path / "in.ptz", tmp_path / "out", PRESET="pr1855",
                          VAL_LIMIT_TOKENS=64)
    assert train_gpt.main([], variables) == 2
    assert "did not store KEY_OFFSET: set each" in capsys.readouterr().err
    assert train_gpt.main([], {**variables, "KEY_OFFSET": "0"}) == 0


def test_only_the_file_that_was_written_is_scored(trained, run_script, monkeypatch, tmp_path):
    """Another run's artifact, sound in itself, takes its place after packing."""
    path, written = tmp_path / "final_model.ptz", []

    def replaced(*_):
        written.append(hashlib.sha256(path.read_bytes()).hexdigest())
        path.write_bytes(trained.content)
    monkeypatch.setattr(train_gpt, "warm_up_evaluations", replaced)
    done = run_script(**SHORT)
    found = hashlib.sha256(trained.content).hexdigest()
    assert done.returncode == 2 and not done.result and written[0] != found
    assert all(words in done.stderr for words in (str(path), *written, found, "EVAL_ONLY="))


def test_figures_are_those_of_the_file_that_was_scored(run_script, monkeypatch, tmp_path):
    """After training and with EVAL_ONLY; it is replaced as soon as it is read."""
    path, load, read = tmp_path / "final_model.ptz", train_gpt.load_quantized, []

    def replaced(*arguments):
        load(*arguments)
        read.append(path.read_bytes())
        path.write_bytes(b"another run's")
    monkeypatch.setattr(train_gpt, "load_quantized", replaced)
    for variables in {}, dict(EVAL_ONLY=path):
        done = succeeded(run_script(**SHORT, **variables))
        sha256 = hashlib.sha256(read[0]).hexdigest()
        assert done.result["artifact_sha256"] == sha256
        assert done.result["model_bytes"] == len(read[0])
        assert f"\nSerialized model int8+rans: {len(read[0])} bytes\n" in done.stdout
        path.write_bytes(read[0])


def test_the_artifact_leaves_the_chunk_to_the_validation_set_that_is_scored(run_script):
    """A 64th of it, but what a pass scores at least; a larger set gets longer chunks."""
    done = succeeded(run_script(ITERATIONS=1, GPTQ=0, TTT_CHUNK_TOKENS=0, VAL_LIMIT_TOKENS=320))
    assert "chunk_tokens=64 " in done.stdout
    for settings in done.result["settings"], train_gpt.decode_artifact(done.content)[0]:
        assert settings["ttt_chunk_tokens"] == 0


# -- ranks

def say_exact_losses(patch=setattr):
    """From here on runs log losses and gradient norms with all their digits, after the warm-up."""
    step, warm_up, steps = train_gpt.Trainer.optimize, train_gpt.Trainer.warm_up, []

    def exact(self, *arguments):
        loss, norm = step(self, *arguments)
        steps.append(self.rt.sum_(loss.clone()).item() / self.rt.world_size)
        self.rt.log(f"exact {len(steps)} {steps[-1]!r} {norm.item()!r}")
        return loss, norm

    def not_said(self):
        warm_up(self)
        patch(train_gpt.Trainer, "optimize", exact)
    patch(train_gpt.Trainer, "warm_up", not_said)


def exact_losses(done):
    return np.array(re.findall(r"^exact (\S+) (\S+) (\S+)$", done.log, re.M), float)


def main_with_exact_losses(environ):
    say_exact_losses()
    return train_gpt.main([], {**os.environ, **environ})


# No fake quantization, and rates at which nothing chaotic happens: at the default ones
# Newton–Schulz enlarges the last bit of a gradient until the 30th loss differs by 1.6e-5, and
# rounding to six bits then makes 3e-4 of it in the score. Four rows a pass, on any of these ranks:
# calibration squares the gradient of each pass, so what a pass holds is part of the result.
STEPS_25 = dict(ITERATIONS=25, WARMDOWN_ITERS=12, LATE_QAT_THRESHOLD=0,
                MATRIX_LR=0.01, SCALAR_LR=0.01, TIED_EMBED_LR=0.01, MICRO_BATCH_TOKENS=128,
                GPTQ_BATCHES=2, WARMUP_STEPS=0, QUANT_FIT="level")


@pytest.fixture(scope="module")
def one_rank(corpus, tmp_path_factory):
    """25 steps on one rank."""
    with pytest.MonkeyPatch.context() as patch:
        say_exact_losses(patch.setattr)
        return succeeded(run_main(corpus, tmp_path_factory.mktemp("one"), **STEPS_25, **PLAIN))


def test_losses_and_weights_of_25_steps_do_not_depend_on_the_ranks(one_rank, corpus, tmp_path):
    """A weight halfway between two codes may be rounded either way, which compensation passes on to
    others, so that few codes may differ."""
    on_ranks(3, tmp_path / "said", main_with_exact_losses,
             environment(corpus, OUT_DIR=tmp_path, **STEPS_25, **PLAIN))
    done = left(tmp_path)
    one, several = exact_losses(one_rank), exact_losses(done)
    assert one.shape == several.shape == (25, 3) and done.result["world_size"] == 3
    assert one[-1, 1] < one[0, 1] - 1, "a model that learns nothing would prove nothing"
    np.testing.assert_allclose(several[:, 1], one[:, 1], rtol=0, atol=EXACT)
    np.testing.assert_allclose(several[:, 2], one[:, 2], rtol=1e-4)
    for key in ("val_loss", "val_bpb"):
        assert abs(done.result[key]["float"] - one_rank.result[key]["float"]) < EXACT
    a, b = (torch.cat([t.codes.flatten().int() for t in
                       train_gpt.decode_artifact(r.content)[1].values() if t.bits < 16])
            for r in (one_rank, done))
    assert (a != b).sum() < 1e-3 * len(a)


@pytest.mark.slow
def test_one_artifact_scores_the_same_on_any_ranks(one_rank, run_script, tmp_path):
    given = dict(STEPS_25, EVAL_ONLY=one_rank.artifact, EVAL_STRIDE=8, TTT_ENABLED=1)
    one, three = (succeeded(run_script(ranks=ranks, OUT_DIR=tmp_path / str(ranks), **given))
                  for ranks in (1, 3))
    for kind in ("int8", "banded", "ttt"):
        assert abs(three.result["val_loss"][kind] - one.result["val_loss"][kind]) < EXACT
        assert abs(three.result["val_bpb"][kind] - one.result["val_bpb"][kind]) < EXACT


def test_the_segments_of_the_schedule_reach_the_model(corpus, tmp_path, monkeypatch):
    seen, forward = [], train_gpt.GPT.forward

    def watched(*arguments, segment=None, **more):
        seen.append(segment if segment is None else int(segment))
        return forward(*arguments, segment=segment, **more)
    monkeypatch.setattr(train_gpt.GPT, "forward", watched)
    succeeded(run_main(corpus, tmp_path, ITERATIONS=5, WARMUP_STEPS=0, GPTQ=0,
                       SEGMENT_SCHEDULE="8:0.4,16:0.8", **PLAIN))
    assert seen[:5] == [8, 8, 16, 16, 32] and {*seen[5:]} == {None}, "scored in whole rows"


# -- compiled

@pytest.mark.parametrize("variables", [
    dict(NUM_LAYERS=1, LATE_PASSES="0,0", TTT_LORA_RANK=2, SEGMENT_SCHEDULE="8:0.5",
         VAL_LIMIT_TOKENS=992),  # a number of rows that leaves a rest in every batch
    pytest.param(dict(NUM_LAYERS=2, TTT_LORA_RANK=0, TTT_OPTIMIZER="muon", TTT_FREEZE_BLOCKS=1),
                 marks=pytest.mark.slow)])
def test_nothing_is_compiled_inside_of_a_clock(corpus, tmp_path, monkeypatch, variables):
    """No graph of a training step is new after the warm-up, nor one of the evaluations."""
    frames, new = CompileCounter(), {}
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=frames))

    def watched(owner, name):
        function = getattr(owner, name)

        def watch(*arguments):
            before = frames.frame_count
            found = function(*arguments)
            new[name] = new.get(name, 0) + frames.frame_count - before
            return found
        monkeypatch.setattr(owner, name, watch)
    watched(train_gpt.Trainer, "warm_up")
    watched(train_gpt.Trainer, "train_step")
    watched(train_gpt, "run_evaluations")
    done = succeeded(run_main(corpus, tmp_path, COMPILE=1, ITERATIONS=4, WARMDOWN_ITERS=4, GPTQ=0,
                              XSA_LAST_N=1, VE_LAYERS="", SMEAR_GATE=0, BIGRAM_VOCAB_SIZE=0,
                              **variables))
    assert new.pop("warm_up") > 0 and new == dict(train_step=0, run_evaluations=0)
    assert re.search(r"^compile:evaluation \d+\.\ds before the evaluation's clock", done.log, re.M)


@pytest.mark.slow
def test_the_compiled_run_equals_the_eager_one(run_script, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nsys.path[:0] = {sys.path}\nimport test_end_to_end as tests\n"
                      "sys.exit(tests.main_with_exact_losses({}))\n")
    few = dict(STEPS_25, ITERATIONS=12, WARMDOWN_ITERS=8, LATE_QAT_THRESHOLD=0.6, WARMUP_STEPS=1,
               SEGMENT_SCHEDULE="8:0.5")
    runs = [succeeded(run_script(script=script, COMPILE=c, OUT_DIR=tmp_path / c, **few))
            for c in ("0", "1")]
    assert re.search(r"^compile:variants 1 graph_breaks 0 graphs_", runs[1].log, re.M)
    assert "late_qat:enabled" in runs[1].log
    eager, compiled = (exact_losses(r)[:, 1] for r in runs)
    np.testing.assert_allclose(compiled, eager, rtol=0, atol=1e-4)
    for kind in KINDS:
        assert runs[1].result["val_loss"][kind] == pytest.approx(runs[0].result["val_loss"][kind],
                                                                 abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["plans", "ttt", "match"])
def test_the_bench_of_the_evaluator_scores_an_artifact(trained, corpus, monkeypatch, capsys, what):
    monkeypatch.setattr(sys, "argv", [
        "evaluator.py", what, str(trained.artifact), "--data", str(corpus.folder), "--tokenizer",
        str(corpus.model), "--targets", "256", "--seconds", "1", "--chunk", "128"])
    evaluator.main()
    last = [float(x) for x in re.findall(r"\d\.\d{4,}", capsys.readouterr().out.splitlines()[-1])]
    assert last and 0 < last[0] < 20


@pytest.mark.slow
@pytest.mark.parametrize("bits", [(), ("--bits", "4.0")])
def test_the_bench_of_the_quantizer_scores_every_rule(trained, corpus, monkeypatch, capsys, bits):
    monkeypatch.setattr(sys, "argv", [
        "artifact.py", str(trained.artifact), "--data", str(corpus.folder), "--tokenizer",
        str(corpus.model), "--targets", "256", "--calibration-rows", "4", *bits])
    artifact.main()
    printed = capsys.readouterr().out
    for rule in artifact.LOW_SCHEMES if bits else artifact.SCHEMES:
        assert re.search(rf"^{re.escape(rule)} +\d+ +\d\.\d{{4,}}", printed, re.M), rule


# An interpreter for hopper.sh that ignores SIGTERM and starts a process; without a run or in that
# of QUICK it ends and leaves this process. Its `timeout` ends after a second.
STUBS = dict(python="""[ "$1" = -c ] && exit
trap "" TERM INT HUP
sleep 300 &
echo started
[ "${RUN_ID-$QUICK}" = "$QUICK" ] || wait
""", timeout='exec /usr/bin/timeout "$1" "$MOST" "${@:3}"\n')


@pytest.fixture
def hopper(tmp_path):
    """hopper(NAME=value, ...) → the script, started with stubs. hopper.left(seconds): the command
    lines of its processes, once there are none or after these seconds."""
    scripts = tmp_path / "tests" / "bench"
    scripts.mkdir(parents=True)
    shutil.copy(SCRIPT.parent / "tests/bench/hopper.sh", scripts)
    for pieces in (1024, 8192):
        (tmp_path / f"data/datasets/demo_{pieces}").mkdir(parents=True)
    for name, text in STUBS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (tmp_path / name).chmod(0o755)

    def start(**variables):
        return subprocess.Popen(
            ["bash", scripts / "hopper.sh", tmp_path / "logs"], stdout=subprocess.PIPE, text=True,
            stderr=subprocess.DEVNULL, env=clean_environ(
                PYTHON=tmp_path / "python", PATH=f"{tmp_path}:{os.environ['PATH']}", **variables))

    def left(seconds=20):
        found, until = [], time.monotonic() + seconds
        for place in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # of others, or gone
                if f"PYTHON={tmp_path}" in place.read_text(errors="replace"):
                    found.append((place.parent / "cmdline").read_text())
        if not found or seconds <= 0:
            return found
        time.sleep(0.1)
        return left(until - time.monotonic())
    start.left = left
    return start


def test_parts_that_are_killed_leave_no_process(hopper):
    started = hopper(QUICK="first", MOST=1)
    printed = started.communicate(timeout=60)[0]
    ends = dict(re.findall(r"^(\w+): (done|ended with status 137) at", printed, re.M))
    kernels = "attention", "attention_banded", "attention_rows", "mlp"
    assert ends == dict(dict.fromkeys(("first", *kernels), "done"), **dict.fromkeys(
        ("small", "cold_steps", "file", "cold_evaluation"), "ended with status 137"))
    assert printed.count(": left out, since ") == 3 and not hopper.left()


@pytest.mark.parametrize("how, quick, running", [
    (signal.SIGTERM, "none", {"first"}), (signal.SIGINT, "first", {"small", "cold_steps", "file"})])
def test_a_signal_ends_the_parts_and_prints_the_summary(hopper, how, quick, running):
    started, begun = hopper(QUICK=quick, MOST=300), set()
    for line in started.stdout:
        begun.update(re.findall(r"^(\w+)\| started", line))
        if running <= begun:
            break
    assert hopper.left(0)
    started.send_signal(how)
    summary = started.communicate(timeout=60)[0].partition("== summary\n")[2]
    assert set(re.findall(r"^(\w+): interrupted at", summary, re.M)) == running
    assert started.returncode == 130 and not hopper.left()


@pytest.mark.slow
def test_every_part_of_the_first_run_on_a_hopper_runs_small_on_a_cpu(tmp_path):
    """But for attention of windows at full size, which is stopped by its time, as meant."""
    for part in ("train_gpt.py", "data", "tests/bench"):
        source, target = SCRIPT.parent / part, tmp_path / part
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("datasets", "results"))
        else:
            shutil.copy(source, target)

    def run(limit):
        return subprocess.run(["bash", tmp_path / "tests/bench/hopper.sh", tmp_path / "logs"],
                              env=clean_environ(PYTHON=sys.executable, LIMIT=limit),
                              capture_output=True, text=True).stdout
    first = run(430)
    ends = dict(re.findall(r"^(\w+): (done|ended with status \d+) at", first, re.M))
    banded = ends.pop("attention_banded")
    assert set(ends.values()) == {"done"} and len(ends) == 11, first[-3000:]
    assert run(9).count(": done before\n") == 11 + (banded == "done")
    with open(tmp_path / "train_gpt.py", "a") as script:
        script.write("# another version\n")
    again = run(9)
    assert again.count(": left out, no time\n") == 9 and again.count(": left out, since ") == 3
