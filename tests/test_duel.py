"""records/duel.py and on_cpu.py: a CUDA-only script runs on a CPU beside ours, and what came of
both stands in one table; what cannot run says why."""

import base64
import re
import shutil
import subprocess
import sys
import zlib

import pytest
import torch
from conftest import ROOT, TINY, clean_environ

import duel
import on_cpu
import train_gpt

SCRIPT = ROOT / "tests" / "cuda_only_script.py"
SMALL = dict(NUM_LAYERS=2, MODEL_DIM=32, TRAIN_SEQ_LEN=32, EVAL_SEQ_LEN=32, EVAL_STRIDE=8,
             TRAIN_BATCH_TOKENS=256)
NEEDED_BY_OURS = {k: TINY[k] for k in ("ROPE_DIMS", "TTT_CHUNK_TOKENS", "EVAL_BATCH_SEQS")}


def fought(corpus, script, out, *options):
    """What the tool did with a script."""
    command = [sys.executable, ROOT / "records" / "duel.py", script, "--out", out, "--steps", "6",
               "--val-tokens", "512", f"DATA_PATH={corpus.folder}",
               f"TOKENIZER_PATH={corpus.model}", *(f"{k}={v}" for k, v in SMALL.items()), *options,
               *(f"--ours-only={k}={v}" for k, v in NEEDED_BY_OURS.items())]
    done = subprocess.run(list(map(str, command)), env=clean_environ(), capture_output=True,
                          text=True, timeout=300)
    done.rows = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in (
        line.split("|") for line in done.stdout.splitlines() if line.startswith("|"))}
    return done


@pytest.fixture(scope="module")
def done(corpus, tmp_path_factory):
    """A duel with a script in a wrapper, which asks for a rank's variables and for CUDA."""
    folder = tmp_path_factory.mktemp("duel")
    code = base64.b85encode(zlib.compress(SCRIPT.read_bytes())).decode()
    (folder / "train_gpt.py").write_text(
        f'import base64 as B,zlib as Z\nexec(Z.decompress(B.b85decode("{code}")))\n')
    found = fought(corpus, folder / "train_gpt.py", folder / "out", "--jobs", 2)
    found.out, found.script = folder / "out", folder / "train_gpt.py"
    assert found.returncode == 0, found.stdout + found.stderr
    return found


@pytest.mark.slow
def test_both_stand_in_one_table(done):
    header = done.rows[""]
    assert header == ["last weights", "averaged", "from the file", "full context", "after TTT",
                      "model bytes", "code bytes", "training s", "all s"]
    theirs, ours, difference = (done.rows[name] for name in ("theirs", "ours", "ours − theirs"))
    assert theirs[1] == theirs[4] == "–", "the script averages nothing and has no TTT"
    assert all(re.fullmatch(r"\d+\.\d{4}", cell) for cell in ours[:5] + theirs[:1] + theirs[2:4])
    assert float(difference[2]) == pytest.approx(float(ours[2]) - float(theirs[2]), abs=2e-4)
    assert int(theirs[6].replace(",", "")) == done.script.stat().st_size
    assert int(ours[6].replace(",", "")) == (ROOT / "train_gpt.py").stat().st_size
    assert int(theirs[5].replace(",", "")) > 1000 and float(theirs[8]) > 0
    text = (done.out / "duel.md").read_text(encoding="utf-8")
    assert "6 steps of 256 tokens, seed 1337. Bits per byte" in text
    assert "| theirs" in text and "| ours" in text
    assert (done.out / "duel.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_numbers_are_those_of_the_logs(done):
    log = (done.out / "theirs.txt").read_text()
    last = re.search(r"step:6/6 val_loss:\S+ val_bpb:(\S+)", log)[1]
    stored = re.search(r"int6_roundtrip_exact val_loss:\S+ val_bpb:(\S+)", log)[1]
    assert done.rows["theirs"][0] == last and done.rows["theirs"][2] == f"{float(stored):.4f}"
    losses = [float(x) for x in re.findall(r"train_loss:(\S+)", log)]
    assert len(losses) == 6 and losses[-1] < losses[0], "it trains"


LOGS = {  # as they are published: last weights, averaged, from the file, full context, after TTT
    """step:9/9 val_loss:3.4000 val_bpb:2.0001 train_time:900ms step_avg:100.00ms
DIAGNOSTIC post_ema val_loss:3.4000 val_bpb:2.0002 eval_time:10ms
final_int6_roundtrip val_loss:3.4000 val_bpb:2.0003 eval_time:10ms
final_int6_roundtrip_exact val_loss:3.40000000 val_bpb:2.00030001
final_int6_sliding_window_exact val_loss:3.40000000 val_bpb:2.00040001
final_int8_zlib_roundtrip_exact val_loss:3.40000000 val_bpb:2.00040001
final_int6_ttt_sliding_exact val_loss:3.40000000 val_bpb:2.00050001
""": (2.0001, 2.0002, 2.00030001, 2.00040001, 2.00050001),
    """9/9 val_loss: 3.4000 val_bpb: 2.0001
pre-quantization post-ema val_loss:3.40000000 val_bpb:2.00020001 eval_time:10ms
quantized val_loss:3.40000000 val_bpb:2.00030001 eval_time:10ms
quantized_sliding_window val_loss:3.40000000 val_bpb:2.00040001 eval_time:10ms
quantized_ttt val_loss:3.40000000 val_bpb:2.00050001 eval_time:10ms
""": (2.0001, 2.00020001, 2.00030001, 2.00040001, 2.00050001)}


@pytest.mark.parametrize("text", LOGS)
def test_stages_are_found_in_the_published_logs(tmp_path, text):
    (tmp_path / "x.txt").write_text(text)
    [log] = duel.read_logs(tmp_path / "x.txt")
    found = [duel.bpb_of(log, patterns) for patterns in duel.STAGES.values()]
    assert [None if x != x else x for x in found] == list(LOGS[text])


@pytest.mark.slow
def test_both_train_alike(done):
    """Same tokens, seed, shape; schedules in proportion to the steps; what a script does not read
    is said."""
    log = (done.out / "theirs.txt").read_text()
    assert "seed:1337 warmdown:3\n" in log, "3,500 of 7,000 steps are 3 of 6"
    ours = (done.out / "ours" / "logs" / "ours.txt").read_text(encoding="utf-8")
    for name, value in {**SMALL, "ITERATIONS": 6, "SEED": 1337}.items():
        assert f"setting {name}={value}  (set)" in ours
    assert "does not name NUM_LAYERS, NUM_KV_HEADS, EVAL_SEQ_LEN, EVAL_STRIDE, MAX_" in done.stdout
    assert re.search(r"ledger: targets:512 ", ours)


def side_of(tmp_path, code):
    (tmp_path / "train_gpt.py").write_text(code)
    return duel.their_side(tmp_path / "train_gpt.py", tmp_path / "out", {}, 10)


@pytest.mark.slow
def test_a_log_that_lay_beside_the_script_is_not_the_runs_and_other_steps_are_told(tmp_path):
    (tmp_path / "train.txt").write_text("x val_loss:1.0 val_bpb:0.5\n")
    side = side_of(tmp_path, "import os\nos.environ.get('NUM_ITERATIONS')\n"
                             "assert open('train.txt')\n"
                             "open('new.txt', 'w').write('step:3/3 val_loss:3.4 val_bpb:2.1 "
                             "train_time:9ms\\nfinal val_loss:3.4 val_bpb:2.0\\n')")
    duel.run(side)
    assert side.status == 0 and side.log.score.bpb == 2.0
    assert side.unread[-2:] == ["ITERATIONS", "VOCAB_SIZE"]
    assert "last step in the log of theirs is 3, not 10" in duel.notes([side], 10)
    assert duel.notes([side], 3) == ""


def test_the_data_are_not_written_over(corpus, tmp_path):
    data = tmp_path / "data"
    shards, model = data / "datasets" / "fineweb10B_sp320", data / "tokenizers" / "tiny.model"
    shutil.copytree(corpus.folder, shards)
    model.parent.mkdir()
    shutil.copy(corpus.model, model)
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "data").symlink_to(data)
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    for out, paths in ((tmp_path, (shards, corpus.model)), (tmp_path, (corpus.folder, model)),
                       (linked, (shards, corpus.model)), (linked, (corpus.folder, model))):
        settings = {**duel.SHAPE, "DATA_PATH": paths[0], "TOKENIZER_PATH": paths[1]}
        with pytest.raises(duel.DataError, match="lies in --out .*say --out with another"):
            duel.lay_out_data(out / "data", settings, 512)
    assert before == {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["data", "theirs", "ours"])
def test_folders_that_no_duel_made_are_not_emptied(corpus, tmp_path, capsys, name):
    """A checkout has a folder data, whose shards may be others than those of the duel."""
    (tmp_path / "out" / name).mkdir(parents=True)
    (tmp_path / "out" / name / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit) as ended:
        duel.main([str(SCRIPT), f"DATA_PATH={corpus.folder}", f"TOKENIZER_PATH={corpus.model}",
                   "--out", str(tmp_path / "out")])
    assert ended.value.code == 2 and "which no duel made" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").rglob("*")] == [name, "notes.txt"]
    with pytest.raises(duel.DataError):  # a duel that was refused makes no folder its own
        duel.main([str(SCRIPT), "DATA_PATH=/nowhere", "--out", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


def test_shards_of_an_earlier_duel_are_not_trained_on(corpus, tmp_path):
    for names in (["fineweb_train_000000", "fineweb_train_000001"], ["fineweb_train_000000"]):
        data = tmp_path / f"of_{len(names)}"
        data.mkdir()
        for name in names:
            shutil.copy(next(corpus.folder.glob("*_train_*.bin")), data / f"{name}.bin")
        shutil.copy(next(corpus.folder.glob("*_val_0*.bin")), data / "fineweb_val_000000.bin")
        laid = duel.lay_out_data(tmp_path / "out" / "data", {
            **duel.SHAPE, "DATA_PATH": data, "TOKENIZER_PATH": corpus.model}, 512)
        assert sorted(p.stem for p in laid["DATA_PATH"].glob("*train*")) == names
        assert all(p.resolve().parent == data for p in laid["DATA_PATH"].glob("*train*"))


def test_a_data_set_of_folded_case_is_refused(corpus, tmp_path):
    """Its marks are no bytes of the text, and the scripts would count them."""
    folder = shutil.copytree(corpus.folder, tmp_path / "folded")
    (folder / "manifest.json").write_text('{"settings": {"fold_case": true}}')
    settings = {**duel.SHAPE, "DATA_PATH": folder, "TOKENIZER_PATH": corpus.model}
    with pytest.raises(duel.DataError, match="fold-case"):
        duel.lay_out_data(tmp_path / "out" / "data", settings, 512)
    (folder / "manifest.json").write_text('{"settings": {"fold_case": false}}')
    duel.lay_out_data(tmp_path / "out" / "data", settings, 512)


@pytest.mark.slow
@pytest.mark.parametrize("code, words", [
    ("import sys\nsys.exit('the reactor is cold')", "it ended with status 1"),
    ("import torch, triton, triton.language as tl\n@triton.jit\ndef f(x, N: tl.constexpr):\n"
     "    tl.store(x, N)\nf[(1,)](torch.zeros(1, device='cuda'), N=3)",
     "its Triton kernels need a GPU"),
    ("open('tables.npy')", "it needs the file tables.npy"),
    ("[0][3]", "may not fit NUM_LAYERS"),
    ("import torch\ntorch.cuda.CUDAGraph()", "calls something of CUDA"),
    ("from torch.utils.cpp_extension import load_inline\nload_inline('x', '', cuda_sources='x')",
     "compiles CUDA code")])
def test_what_cannot_run_says_why(tmp_path, monkeypatch, code, words):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    side = side_of(tmp_path, code)
    duel.run(side)
    assert side.status == 1 and words in duel.why(side)


def test_the_files_that_a_script_names_are_beside_it(tmp_path):
    for name in ("helper.py", "table.npy", "other.py", "notes.md"):
        (tmp_path / name).write_text("x = 1")
    side = side_of(tmp_path, "import helper\nopen('table.npy')")
    assert sorted(path.name for path in side.folder.iterdir()) == ["helper.py", "table.npy",
                                                                   "train_gpt.py"]


@pytest.mark.slow
def test_a_failure_leaves_ours_in_the_table_and_status_1(corpus, tmp_path):
    (tmp_path / "train_gpt.py").write_text("import nowhere_to_be_found")
    done = fought(corpus, tmp_path / "train_gpt.py", tmp_path / "out", "--ours", "pr549")
    assert done.returncode == 1 and "theirs did not finish: it needs the module" in done.stdout
    assert done.rows["theirs"][0] == "–" and float(done.rows["ours"][0]) > 0


@pytest.mark.parametrize("arguments, words", [
    (["nowhere.py"], "nowhere.py: no such file"), ([SCRIPT, "lr=3"], "lr=3: not NAME=VALUE"),
    ([SCRIPT, "--out", ROOT / "tests"], "lies in --out"),
    ([SCRIPT, "--steps", "0"], "must be 1 or more"),
    ([SCRIPT, "TRAIN_SEQ_LEN=1k"], "TRAIN_SEQ_LEN=1k: must be a whole number"),
    ([SCRIPT, "--ours-only", "NUM_LAYERS=0"], "NUM_LAYERS=0: must be a whole number"),
    ([SCRIPT, "DATA_PATH=nowhere"], "no fineweb_train_*.bin and fineweb_val_*.bin there"),
    ([SCRIPT, f"DATA_PATH={ROOT}", "--ours", "x"], "no fineweb_train_*.bin")])
def test_wrong_arguments_end_with_status_2(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    try:
        status = duel.exit_code_of(duel.main, list(map(str, arguments)))
    except SystemExit as end:
        status = end.code
    assert status == 2 and words in capsys.readouterr().err


def test_defaults_shrink_with_the_run_and_what_is_set_stays():
    source = """
        num_layers = int(os.environ.get("NUM_LAYERS", 11)); seed = int(os.environ.get("SEED", 1))
        warmdown_iters = int(os.getenv('WARMDOWN_ITERS', 3_500)); x = environ.get('SWA_EVERY','50')
        ema_decay=float(os.environ.get('EMA_DECAY',.9965)); ve = os.environ.get("VE_LAYERS", "9,10")
        loop_start = int(os.environ.get("LOOP_START", 3)); end = os.environ.get("LOOP_END", "5")
        every = int(os.environ.get("MUON_MOMENTUM_WARMUP_STEPS", "1500"))
        parallel_from = int(os.environ.get("PARALLEL_FROM", 7))"""
    found = duel.scaled({"NUM_LAYERS": 4, "SEED": 7, "MUON_MOMENTUM_WARMUP_STEPS": "9"},
                        duel.default_in(source), 700)
    assert found == {"NUM_LAYERS": 4, "SEED": 7, "MUON_MOMENTUM_WARMUP_STEPS": "9",
                     "WARMDOWN_ITERS": 350, "SWA_EVERY": 5, "EMA_DECAY": round(0.9965 ** 10, 6),
                     "VE_LAYERS": "3", "LOOP_START": "1", "LOOP_END": "2",
                     "PARALLEL_FROM": "2"}
    assert "VE_LAYERS" not in duel.scaled({"NUM_LAYERS": 11}, duel.default_in(source), 700)


def test_an_unknown_preset_is_refused_in_words(tmp_path):
    with pytest.raises(duel.DataError, match="(?s)--ours pr99: .*unknown"):
        duel.our_side("pr99", tmp_path, duel.SHAPE, 6)


@pytest.mark.parametrize("rows", [256, 1024, 2048])
@pytest.mark.parametrize("preset", [p for p in train_gpt.PRESETS if p[:2] in ("pr", "sp")] + [""])
def test_every_preset_fits_the_small_shape(tmp_path, corpus, preset, rows):
    shape = {**duel.SHAPE, "DATA_PATH": corpus.folder, "TOKENIZER_PATH": corpus.model,
             "VOCAB_SIZE": 320, "ITERATIONS": 1000, "TRAIN_SEQ_LEN": rows, "EVAL_SEQ_LEN": rows}
    side = duel.our_side(preset, tmp_path, shape, 1000)
    train_gpt.resolve_settings({name: str(value) for name, value in side.settings.items()})


# -- the stand-in

def reference(q, k, v, allowed):
    """Attention by its formula on [B, T, H, E]; keys and values repeated for groups of heads."""
    k, v = (x.repeat_interleave(q.size(2) // x.size(2), 2) for x in (k, v))
    scores = torch.einsum("bthe,bshe->bhts", q, k) / q.size(-1) ** 0.5
    return torch.einsum("bhts,bshe->bthe", scores.masked_fill(~allowed, -1e9).softmax(-1), v)


@pytest.mark.parametrize("window, causal, S", [
    ((-1, -1), True, 7), ((-1, -1), False, 7), ((2, 0), True, 7), ((2, 1), False, 7),
    ((3, -1), True, 7), ((-1, -1), True, 10), ((4, 0), True, 10)])
def test_attention_is_flash_attentions(window, causal, S):
    T, generator = 7, torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, h, 8, generator=generator) for n, h in ((T, 4), (S, 2), (S, 2)))
    t, s = torch.arange(T)[:, None] + S - T, torch.arange(S)[None]
    allowed = (s <= t) | torch.tensor(not causal)
    allowed &= (s >= t - window[0]) | torch.tensor(window[0] < 0)
    allowed &= (s <= t + window[1]) | torch.tensor(causal or window[1] < 0)
    found = on_cpu.attention(q, k, v, causal=causal, window_size=window)
    torch.testing.assert_close(found, reference(q, k, v, allowed))


@pytest.mark.parametrize("more", [dict(softcap=15.0), dict(alibi_slopes=torch.ones(4)),
                                  dict(return_lse=True), dict(dropout_p=0.1), dict(anything=None)])
def test_what_would_change_attention_is_refused(more):
    q, starts = torch.ones(4, 4, 8), torch.tensor([0, 4])
    harmless = dict(deterministic=True, dropout_p=0.0, softcap=0.0, alibi_slopes=None)
    on_cpu.attention(q[None], q[None], q[None], causal=True, **harmless)
    on_cpu.attention_of_documents(q, q, q, starts, starts, 4, 4, causal=True, **harmless)
    with pytest.raises(NotImplementedError, match=next(iter(more))):
        on_cpu.attention(q[None], q[None], q[None], **more)
    with pytest.raises(NotImplementedError, match="argument 8=0.5"):
        on_cpu.attention_of_documents(q, q, q, starts, starts, 4, 4, 0.5)


def test_documents_do_not_see_each_other():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(9, h, 8, generator=generator) for h in (4, 2, 2))
    starts = torch.tensor([0, 3, 3, 7])  # the last two tokens are padding
    found = on_cpu.attention_of_documents(q, k, v, starts, starts, 4, max_seqlen_k=4, causal=True)
    for a, b in ((0, 3), (3, 7)):
        allowed = torch.ones(b - a, b - a, dtype=torch.bool).tril()
        torch.testing.assert_close(found[a:b], reference(*(x[None, a:b] for x in (q, k, v)),
                                                         allowed)[0])
    assert found.shape == q.shape and not found[7:].any()
