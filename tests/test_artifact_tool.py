"""records/artifact.py: the packed script is the readable one in fewer bytes, and what inspect says adds up."""

import hashlib
import lzma
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, clean_environ
from hypothesis import given, settings, strategies as st

sys.path.insert(0, str(ROOT / "records"))
import artifact  # noqa: E402
import train_gpt  # noqa: E402

SCRIPT = ROOT / "train_gpt.py"


def told(capsys, *arguments):
    """(status, standard output, standard error) of the tool."""
    status = artifact.main([str(a) for a in arguments])
    return status, *capsys.readouterr()


# -- packing the script ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A packed copy of the script, and the readable copy that it was made of."""
    folder = tmp_path_factory.mktemp("packed")
    readable = folder / "readable.py"
    readable.write_bytes(SCRIPT.read_bytes())
    assert artifact.main(["pack-code", str(readable), "-o", str(folder / "small" / "train_gpt.py")]) == 0
    return SimpleNamespace(path=folder / "small" / "train_gpt.py", readable=readable, source=readable.read_bytes())


def test_a_packed_script_is_small_and_unpacks_to_the_readable_one(packed, tmp_path):
    assert artifact.readable_source(packed.path) == artifact.readable_source(packed.readable) == packed.source
    assert packed.path.stat().st_size < 0.4 * len(packed.source)
    compile(packed.path.read_bytes(), "packed", "exec")
    (tmp_path / "again.py").write_bytes(artifact.pack_code(artifact.readable_source(packed.path)))
    assert (tmp_path / "again.py").read_bytes() == packed.path.read_bytes(), "packing twice is packing once"


@settings(deadline=None, database=None, max_examples=60)
@given(st.binary(max_size=300))
def test_whatever_bytes_the_payload_has_they_come_back(tmp_path_factory, noise):
    """Incompressible text: the payload then takes every byte value, quotes, backslashes and line ends among them."""
    source = b"NOISE = " + repr(noise * 3).encode() + b"\nprint(len(UNPACKED))\n"
    path = tmp_path_factory.mktemp("noise") / "x.py"
    path.write_bytes(artifact.pack_code(source))
    assert artifact.readable_source(path) == source
    scope = {"__file__": str(path), "print": lambda n: found.append(n)}
    found = []
    exec(compile(path.read_bytes(), str(path), "exec"), scope)
    assert found == [len(source)] and scope["NOISE"] == noise * 3


def test_pack_code_says_what_it_wrote(packed, capsys, tmp_path):
    status, out, _ = told(capsys, "pack-code", packed.path, "-o", tmp_path / "p.py")
    content = (tmp_path / "p.py").read_bytes()
    assert status == 0 and content == packed.path.read_bytes(), "a packed script is unpacked first"
    assert f"{len(content)} bytes for {len(packed.source)}, sha256 {hashlib.sha256(content).hexdigest()}" in out


def test_a_damaged_packed_script_is_refused_in_words(packed, capsys, tmp_path):
    content = packed.path.read_bytes()
    middle = len(content) // 2
    for damaged in (content[:middle], content[:300] + b"x" + content[301:], content[:middle] + content[middle + 40:]):
        (tmp_path / "damaged.py").write_bytes(damaged)
        status, _, said = told(capsys, "pack-code", tmp_path / "damaged.py", "-o", tmp_path / "out.py")
        assert status == 2 and said.startswith(f"error: {tmp_path / 'damaged.py'}: begins like a packed script")
        assert not (tmp_path / "out.py").exists()


TRAINING = dict(ITERATIONS=3, EVAL_STRIDE=0, TTT_ENABLED=0, VAL_LOSS_EVERY=2)


@pytest.fixture(scope="module")
def both(run_once, packed, tmp_path_factory):
    """The same small training by the readable script and by the packed one."""
    runs = []
    for script in (packed.readable, packed.path):
        out = tmp_path_factory.mktemp("out")
        runs.append(run_once(script=script, OUT_DIR=out, **TRAINING))
        assert runs[-1].returncode == 0, runs[-1].stderr[-2000:]
        runs[-1].artifact = out / "final_model.ptz"
    return runs


def test_a_packed_script_scores_the_same_to_the_last_digit(both):
    readable, small = both
    assert small.result["val_loss"] == readable.result["val_loss"] and small.result["val_bpb"] == readable.result["val_bpb"]
    assert small.artifact.read_bytes() == readable.artifact.read_bytes()
    assert small.result["ledger_sha256"] == readable.result["ledger_sha256"]


def test_a_packed_script_counts_its_own_bytes(both, packed):
    for done, path in zip(both, (packed.readable, packed.path)):
        code = path.read_bytes()
        assert done.result["code_bytes"] == len(code) and done.result["code_sha256"] == hashlib.sha256(code).hexdigest()
        assert done.result["total_bytes"] == len(code) + done.artifact.stat().st_size
        assert f"Code size: {len(code)} bytes" in done.log and f"code_sha256:{hashlib.sha256(code).hexdigest()}" in done.log


def test_the_log_of_a_packed_script_begins_with_what_can_be_read(both, packed):
    for done in both:
        assert done.log.startswith(packed.source.decode())


@pytest.mark.slow
def test_a_packed_script_checks_its_settings_and_forecasts_with_its_own_bytes(run_script, packed):
    """--dry-run; what the code saves is the model's."""
    done = run_script("--dry-run", script=packed.path)
    assert done.returncode == 0 and "settings are good" in done.stdout, done.stderr
    [(code, model, total)] = re.findall(r"code (\d+) \+ model (\d+) .*= (\d+) of 16000000 bytes", done.stdout)
    assert int(code) == packed.path.stat().st_size and int(total) == int(code) + int(model)


def python(packed, code, *flags, timeout=280):
    """Run `code` with the packed script's folder as the first place to import from."""
    done = subprocess.run([sys.executable, "-B", "-c", code, *flags], cwd=packed.path.parent, capture_output=True, text=True,
                          env=clean_environ(), timeout=timeout)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


READS_SOURCES = """
import ast, functools, inspect, pathlib, textwrap
import train_gpt as T
source = T.UNPACKED.decode()
assert T.SOURCE == T.UNPACKED and T.SHIPPED == pathlib.Path(T.__file__).read_bytes() != T.SOURCE
for thing in (T.rms_norm, T.GPT.forward, T.Settings, T.Quantized.weights, T.main, T.pack):
    text, (lines, first) = inspect.getsource(thing), inspect.getsourcelines(thing)
    assert text in source and "".join(lines) == text, thing
    assert source.splitlines(True)[first - 1:first - 1 + len(lines)] == lines, thing

def jit(function):  # what Triton's decorator does: the function's source is parsed anew
    lines, _ = inspect.getsourcelines(function)
    tree = ast.parse(textwrap.dedent("".join(lines)))
    scope = dict(function.__globals__)
    exec(compile(tree, "kernel", "exec"), scope)
    return scope[function.__name__]

assert jit(T.code_limit)(6) == 31 and jit(T.out_of_time).__code__.co_names == T.out_of_time.__code__.co_names
try:
    T.code_limit("six")
except TypeError as problem:
    import traceback
    assert "return 2 ** (bits - 1) - 1" in "".join(traceback.format_exception(problem))
T.__file__ and pathlib.Path(T.__file__).write_bytes(b"# changed")  # the file on disk is edited while it runs
import linecache
linecache.checkcache()
assert inspect.getsource(T.pack) in source and T.SHIPPED != b"# changed"
print("fine")
"""


def test_sources_of_a_packed_script_can_be_read_by_what_needs_them(packed, tmp_path):
    """inspect, tracebacks and decorators that parse a function's source, as Triton's does; also after an edit on disk."""
    (tmp_path / "train_gpt.py").write_bytes(packed.path.read_bytes())
    assert python(SimpleNamespace(path=tmp_path / "train_gpt.py"), READS_SOURCES) == "fine\n"


@pytest.mark.slow
def test_a_packed_script_runs_under_torchrun(run_script, packed, both, tmp_path):
    done = run_script(script=packed.path, ranks=2, OUT_DIR=tmp_path / "two", **TRAINING)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.result["world_size"] == 2 and done.result["code_bytes"] == packed.path.stat().st_size
    assert done.result["val_loss"]["float"] == pytest.approx(both[0].result["val_loss"]["float"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["auto", "triton"])
def test_a_packed_script_compiles(run_script, packed, both, tmp_path, kernels):
    """With its kernels too, whose source Triton reads; the MLP is too narrow for theirs, the loss is not."""
    done = run_script(script=packed.path, COMPILE=1, KERNELS=kernels, OUT_DIR=tmp_path / kernels, **TRAINING)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f" nll:{'triton' if kernels == 'triton' else 'plain'} " in done.log
    assert re.search(r"^compile:variants \d graph_breaks 0 graphs_compiled \d+ graphs_from_cache \d+$", done.log, re.M)
    for kind, value in both[0].result["val_loss"].items():
        assert done.result["val_loss"][kind] == pytest.approx(value, abs=1e-3)


# -- looking at an artifact ------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def files(both, tmp_path_factory):
    """The trained artifact, the same weights with 16 bits, and as a state dict."""
    folder = tmp_path_factory.mktemp("files")
    _, tensors, _ = train_gpt.read_artifact(both[0].artifact)
    generator = torch.Generator().manual_seed(0)
    weights = {n: t.weights() * (1 + 1e-3 * torch.randn(t.shape, generator=generator)) for n, t in tensors.items()}
    halves = {n: train_gpt.Quantized(16, half=w.half(), shape=tuple(w.shape)) for n, w in weights.items()}
    (folder / "float.ptz").write_bytes(train_gpt.encode_artifact(halves, train_gpt.Settings()))
    torch.save(weights, folder / "float.pt")
    return SimpleNamespace(artifact=both[0].artifact, tensors=tensors, weights=weights, half=folder / "float.ptz",
                           state=folder / "float.pt")


def row_of(out, name):
    [line] = [line for line in out.splitlines() if line.startswith(name + " ")]
    return line.split()


def test_inspect_adds_up_to_the_files_size(files, capsys):
    status, out, _ = told(capsys, "inspect", files.artifact)
    size, code = files.artifact.stat().st_size, SCRIPT.stat().st_size
    left = 16_000_000 - size - code
    assert status == 0 and f"artifact {size} + code {code} ({SCRIPT}) = {size + code} of 16000000 bytes, {left} left" in out
    codes = int(re.search(r"^codes: (\d+) bytes", out, re.M)[1])
    side, squeezed = map(int, re.search(r"^settings, steps, fp16 arrays: (\d+) bytes, squeezed to (\d+)$", out, re.M).groups())
    content = files.artifact.read_bytes()
    header = int.from_bytes(content[8:12], "little")
    assert 8 + 4 + header + squeezed + codes + 32 == size
    unpacked = lzma.decompress(content[12 + header: 12 + header + squeezed], lzma.FORMAT_RAW, filters=train_gpt.LZMA_FILTERS)
    assert len(unpacked) == side
    assert f"{sum(t.codes.numel() if t.bits < 16 else t.half.numel() for t in files.tensors.values())} weights" in out
    assert "steps fitted by: level 0; codec " in out


def test_inspect_has_a_row_for_every_tensor(files, capsys):
    _, out, _ = told(capsys, "inspect", files.artifact)
    for name, t in files.tensors.items():
        cells = row_of(out, name)
        assert cells[1] == ("×".join(map(str, t.shape)) or "1") and cells[2] == (f"int{t.bits}" if t.bits < 16 else "fp16")
        if t.bits == 16:
            assert int(cells[3]) == 2 * t.half.numel()
            continue
        counts = torch.bincount(t.codes.flatten().int() + 128).double()
        share = counts[counts > 0] / t.codes.numel()
        entropy = -float((share * share.log2()).sum())
        assert float(cells[4]) == pytest.approx(entropy, abs=6e-4)
        assert float(cells[5]) == pytest.approx(entropy * t.codes.numel() / 8, abs=1)
        assert float(cells[3]) == pytest.approx(float((t.steps[:, None] * t.columns).median()), abs=6e-6)


@pytest.mark.parametrize("kind", ["half", "state"])
def test_float_weights_give_relative_errors(files, capsys, kind):
    status, out, _ = told(capsys, "inspect", files.artifact, "--float", getattr(files, kind))
    assert status == 0
    for name, t in files.tensors.items():
        exact = files.weights[name].half().float() if kind == "half" else files.weights[name]
        expected = float((t.weights() - exact).norm()) / max(float(exact.norm()), 1e-30)
        assert float(row_of(out, name)[-1]) == pytest.approx(expected, abs=2e-5), name
    assert 0 < float(row_of(out, "tok_emb")[-1]) < 0.01


def test_inspect_counts_the_code_that_it_is_given(files, packed, capsys):
    size, code = files.artifact.stat().st_size, packed.path.stat().st_size
    _, out, _ = told(capsys, "inspect", files.artifact, "--code", packed.path)
    assert f"artifact {size} + code {code} ({packed.path}) = {size + code} of" in out


@pytest.mark.parametrize("arguments, words", [
    (["inspect", "nowhere.ptz"], "nowhere.ptz"), (["inspect", "."], "."),
    (["inspect", "text.txt"], "text.txt: 5 bytes beginning with b'hello'"),
    (["inspect", "ARTIFACT", "--float", "nowhere.ptz"], "nowhere.ptz"),
    (["inspect", "ARTIFACT", "--float", "text.txt"], "text.txt"),
    (["inspect", "ARTIFACT", "--float", "text.pt"], "text.pt"),
    (["inspect", "ARTIFACT", "--float", "list.pt"], "list.pt"),
    (["inspect", "ARTIFACT", "--float", "other.pt"], "other.pt"),
    (["inspect", "ARTIFACT", "--code", "nowhere.py"], "nowhere.py"),
    (["pack-code", "nowhere.py"], "nowhere.py"),
    (["pack-code", "."], "."), (["pack-code", "text.txt", "-o", "text.txt/x.py"], "text.txt")])
def test_wrong_paths_end_with_status_2_and_one_line(files, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    for name in ("text.txt", "text.pt"):
        (tmp_path / name).write_text("hello")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({name: w[..., :-1] for name, w in files.weights.items()}, tmp_path / "other.pt")  # of another model
    status, _, said = told(capsys, *[files.artifact if a == "ARTIFACT" else a for a in arguments])
    assert status == 2 and said.startswith("error: ") and words in said and said.count("\n") == 1 and "Traceback" not in said
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("arguments", [[], ["repack"], ["inspect"]])
def test_wrong_commands_end_with_status_2(capsys, arguments):
    with pytest.raises(SystemExit) as end:
        artifact.main(arguments)
    assert end.value.code == 2 and "usage" in capsys.readouterr().err
