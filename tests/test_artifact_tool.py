"""records/artifact.py: the packed script is the readable one in fewer bytes, and what inspect says
adds up."""

import ast
import contextlib
import hashlib
import importlib.util
import io
import lzma
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, environment, left, run_main
from hypothesis import given, settings, strategies as st

import artifact
import train_gpt

SCRIPT = ROOT / "train_gpt.py"


def status_of(arguments):
    return artifact.exit_code_of(artifact.main, arguments)


def told(capsys, *arguments):
    """(status, standard output, standard error) of the tool."""
    status = status_of([str(a) for a in arguments])
    return status, *capsys.readouterr()


# -- packing the script

@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A packed copy of the script, and the readable copy that it was made of."""
    folder, source = tmp_path_factory.mktemp("packed"), train_gpt.SHIPPED
    readable, path = folder / "readable.py", folder / "small" / "train_gpt.py"
    readable.write_bytes(source)
    assert status_of(["pack-code", str(readable), "-o", str(path)]) == 0
    return SimpleNamespace(path=path, readable=readable, source=source, content=path.read_bytes())


def test_a_packed_script_is_small_and_unpacks_to_the_readable_one(packed, capsys, tmp_path):
    for path in (packed.path, packed.readable):
        assert artifact.readable_source(path) == packed.source
    assert len(packed.content) < 0.33 * len(packed.source)
    status, out, _ = told(capsys, "pack-code", packed.path, "-o", tmp_path / "p.py")
    assert status == 0 and (tmp_path / "p.py").read_bytes() == packed.content, "packed once"
    digest = hashlib.sha256(packed.content).hexdigest()
    assert f"{len(packed.content)} bytes for {len(packed.source)}, sha256 {digest}" in out


@settings(database=None, max_examples=60)
@given(st.binary(max_size=300))
def test_whatever_bytes_the_payload_has_they_come_back(tmp_path_factory, noise):
    """Incompressible text: the payload then takes every byte value, quotes, backslashes and line
    ends among them."""
    source = b"NOISE = " + repr(noise * 3).encode() + b"\nprint(len(UNPACKED))\n"
    path, found = tmp_path_factory.mktemp("noise") / "x.py", []
    path.write_bytes(artifact.pack_code(source))
    assert artifact.readable_source(path) == source
    scope = {"__file__": str(path), "print": found.append}
    exec(compile(path.read_bytes(), str(path), "exec"), scope)
    assert found == [len(source)] and scope["NOISE"] == noise * 3


def test_a_damaged_packed_script_is_refused_in_words(packed, capsys, tmp_path):
    content, path = packed.content, tmp_path / "damaged.py"
    middle = len(content) // 2
    for damaged in (content[:middle], content[:300] + b"x" + content[301:],
                    content[:middle] + content[middle + 40:]):
        path.write_bytes(damaged)
        status, _, said = told(capsys, "pack-code", path, "-o", tmp_path / "out.py")
        assert status == 2 and re.match(f"error: {re.escape(str(path))}: (looks like a wrapper and "
                                        "cannot be parsed|executes code that cannot be read)", said)
        assert not (tmp_path / "out.py").exists()


@pytest.mark.parametrize("reads", [
    "open(__file__).read()", "Path(__file__).read_text(encoding='utf-8')",
    "open(sys.argv[0], 'r').read()", "open(file=__file__, mode='rt', encoding='utf-8').read()",
    "open(__file__, 'rb').read().decode()"])
def test_a_packed_script_may_read_its_own_file_as_text(tmp_path, reads):
    """Noise makes the payload long enough to hold bytes that are no UTF-8."""
    noise = hashlib.sha256(b"noise").hexdigest() * 3 + hashlib.sha512(b"more").hexdigest()
    source = (f"import sys\nfrom pathlib import Path\nNOISE = '{noise}'\ntext = {reads}\n"
              "print(len(text), len(text.encode()))").encode()
    path, found = tmp_path / "x.py", []
    path.write_bytes(artifact.pack_code(source))
    assert artifact.readable_source(path) == source
    scope = {"__file__": str(path), "print": lambda *said: found.append(said)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(path)])
        exec(compile(path.read_bytes(), str(path), "exec"), scope)
    assert found == [(path.stat().st_size,) * 2]


@pytest.mark.parametrize("reads", [
    "Path(__file__).read_bytes()", "open(__file__, 'rb').read()", "open('x.txt').read()",
    "open(__file__ + '.log', 'w', encoding='utf-8')", "Path('log').open('a')",
    "os.open(os.devnull, os.O_WRONLY)"])
def test_a_script_that_reads_its_file_as_bytes_or_not_at_all_stays_small(reads):
    source = f"from pathlib import Path\ntext = {reads}\n".encode()
    assert artifact.pack_code(source).startswith(b"#coding:latin1")


# -- minified

@pytest.fixture(scope="module")
def small(packed, tmp_path_factory):
    """A minified packed copy of the script, the source in it, and what the tool said."""
    folder, said = tmp_path_factory.mktemp("minified"), io.StringIO()
    with contextlib.redirect_stdout(said):
        artifact.main(["pack-code", str(packed.readable), "--minify", "-o",
                       str(folder / "train_gpt.py")])
    path = folder / "train_gpt.py"
    return SimpleNamespace(path=path, content=path.read_bytes(), said=said.getvalue(),
                           source=artifact.readable_source(path))


def test_a_minified_script_is_smaller_and_names_the_readable_one(packed, small):
    saved = len(packed.content) - len(small.content)
    assert saved > 0.2 * len(packed.content) and f"--minify saves {saved} bytes" in small.said
    digest = hashlib.sha256(packed.source).hexdigest()
    assert small.source.startswith(b"# minified; ") and digest.encode() in small.source[:120]
    assert f"{len(packed.source)} bytes, sha256 {digest}" in small.said


@pytest.mark.slow
def test_a_minified_script_runs_and_scores_as_the_readable_one(both, small, corpus, tmp_path,
                                                               monkeypatch):
    """The same artifact to the byte and the same scores; --help loses nothing; Triton's kernels
    compile from the source that stands in the file."""
    spec = importlib.util.spec_from_file_location("minified", small.path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "minified", module)
    spec.loader.exec_module(module)
    environ = environment(corpus, OUT_DIR=tmp_path, **TRAINING)
    for arguments in (["--dry-run"], []):
        assert module.main(arguments, environ) == 0
    done, readable = left(tmp_path), both[0]
    assert done.content == readable.content
    for key in ("val_loss", "val_bpb", "ledger_sha256"):
        assert done.result[key] == readable.result[key]
    assert done.log.startswith(small.source.decode())
    assert done.result["code_sha256"] == hashlib.sha256(small.content).hexdigest()
    assert module.help_text() == train_gpt.help_text()
    if module.triton:  # interpreted
        u, up, down = (torch.randn(shape) / 8 for shape in ((5, 64), (256, 64), (64, 256)))
        torch.testing.assert_close(module.LeakySquareMLP.apply(u, up, down, 0.5),
                                   module.leaky_square_mlp(u, up, down, 0.5))


MANY = b'''"""Module."""
from __future__ import annotations
import torch
CODE = open(__file__).read().partition("\\nclass Settings:")  # comment

class Empty(Exception):
    """Nothing else."""

class Settings:
    """Kept."""
    depth: int = 3  # kept, too

class Row:
    name: str = ""
    def grow(self, by: int = 1, *more: int, last: float = 0.5, **rest: str) -> int:
        """Docstring."""
        total: int = by
        return total  # comment

@torch.library.custom_op("a::b", mutates_args=())
def op(x: torch.Tensor) -> torch.Tensor:
    """Its schema is made of the annotations."""
    return x

def kernel(x: int, BLOCK: tl.constexpr): return f"# {x!r:>{BLOCK}} 'text'"
'''


def test_minify_drops_what_nothing_reads_and_keeps_the_rest(tmp_path, capsys):
    path = tmp_path / "many.py"
    path.write_bytes(MANY + f"# {hashlib.sha512().hexdigest()}: so long that it counts".encode())
    assert told(capsys, "pack-code", path, "--minify", "-o", tmp_path / "p.py")[0] == 0
    text = artifact.readable_source(tmp_path / "p.py").decode()
    for gone in ("Module", "Nothing", "Docstring", "comment", "schema"):
        assert gone not in text
    assert 'class Settings:\n    """Kept."""\n    depth: int = 3  # kept, too\n' in text
    plain = ast.unparse(ast.parse(text))
    for kept in ("name: str = ''", "def op(x: torch.Tensor) -> torch.Tensor:",
                 "def grow(self, by: int=1, *more: int, last: float=0.5, **rest: str) -> int:",
                 "def kernel(x: int, BLOCK: tl.constexpr):", "class Empty(Exception):"):
        assert kept in plain
    assert "return f" in plain and "# {x!r:>{BLOCK}}" in plain


def test_minify_says_what_it_lacks(tmp_path, capsys, monkeypatch):
    path = tmp_path / "x.py"
    path.write_text("print(1)\n")
    status, said, _ = told(capsys, "pack-code", path, "--minify", "-o", tmp_path / "n.py")
    assert status == 0 and "--minify saves nothing here" in said
    for source, words in (("print 1", "--minify: line 1 is no Python"),
                          ("x = 1", "python_minifier is not installed: pip install -r ")):
        path.write_text(source)
        status, _, said = told(capsys, "pack-code", path, "--minify", "-o", tmp_path / "p.py")
        monkeypatch.setitem(sys.modules, "python_minifier", None)
        assert status == 2 and said.startswith(f"error: {words}")
    assert not (tmp_path / "p.py").exists()


TRAINING = dict(ITERATIONS=3, EVAL_STRIDE=0, TTT_ENABLED=0, VAL_LOSS_EVERY=2)


READS_SOURCES = """
import ast, inspect, linecache, os, pathlib, runpy, sys, textwrap, traceback
try:
    sys.argv = ["train_gpt.py"]
    runpy.run_path("train_gpt.py", run_name="__main__")
except SystemExit as end:
    assert end.code == 0
import train_gpt as T
source = T.UNPACKED.decode()
assert T.SOURCE == T.UNPACKED and T.SHIPPED == pathlib.Path(T.__file__).read_bytes() != T.SOURCE
for thing in (T.rms_norm, T.GPT.forward, T.Settings, T.Quantized.weights, T.main, T.pack):
    text, (lines, first) = inspect.getsource(thing), inspect.getsourcelines(thing)
    assert text in source and "".join(lines) == text, thing
    assert source.splitlines(True)[first - 1:first - 1 + len(lines)] == lines, thing

def jit(function):  # what Triton's decorator does: the function's source is parsed anew
    lines, _ = inspect.getsourcelines(function)
    scope = dict(function.__globals__)
    exec(compile(ast.parse(textwrap.dedent("".join(lines))), "kernel", "exec"), scope)
    return scope[function.__name__]

assert jit(T.code_limit)(6) == 31
try:
    T.code_limit("six")
except TypeError as problem:
    assert "return 2 ** (bits - 1) - 1" in "".join(traceback.format_exception(problem))
size = pathlib.Path(T.__file__).stat().st_size
pathlib.Path(T.__file__).write_bytes(b"# changed")  # the file is edited while it runs
linecache.checkcache()
assert inspect.getsource(T.pack) in source and T.SHIPPED != b"# changed"
assert T.main(["--dry-run"], os.environ) == 0
print("code was", size)
"""


@pytest.fixture(scope="module")
def both(corpus, packed, tmp_path_factory):
    """The same small training by the readable script, inside of this process, and by the packed
    one, in a process that then reads its source."""
    folder = tmp_path_factory.mktemp("both")
    readable = run_main(corpus, folder / "readable", **TRAINING)
    (folder / "train_gpt.py").write_bytes(packed.content)
    environ = environment(corpus, OUT_DIR=folder / "packed", **TRAINING)
    done = subprocess.run([sys.executable, "-B", "-c", READS_SOURCES], cwd=folder, timeout=280,
                          capture_output=True, text=True, env=environ)
    assert readable.returncode == done.returncode == 0, done.stderr[-2000:]
    return readable, left(folder / "packed", 0, done.stdout, done.stderr)


def test_a_packed_script_scores_the_same_and_counts_the_bytes_that_it_ships(both, packed):
    """To the last digit; the log begins with what can be read."""
    readable, small = both
    for key in ("val_loss", "val_bpb", "ledger_sha256"):
        assert small.result[key] == readable.result[key]
    assert small.content == readable.content
    for done, code in zip(both, (packed.source, packed.content)):
        digest = hashlib.sha256(code).hexdigest()
        assert done.result["code_bytes"] == len(code) and done.result["code_sha256"] == digest
        assert done.result["total_bytes"] == len(code) + len(done.content)
        assert f"Code size: {len(code)} bytes" in done.log and f"code_sha256:{digest}" in done.log
        assert done.log.startswith(packed.source.decode())


def test_a_packed_script_is_read_by_what_needs_its_source_and_forecasts_with_its_size(both, packed):
    """inspect, tracebacks and decorators that parse a function, as Triton's does; also after an
    edit on disk. --dry-run counts the packed bytes: what the code saves is the model's."""
    said = both[1].stdout
    assert "settings are good" in said and f"code was {len(packed.content)}" in said
    [(code, model, total)] = re.findall(r"code (\d+) \+ model (\d+) .*= (\d+) of 16000000 bytes",
                                        said)
    assert int(code) == len(packed.content) and int(total) == int(code) + int(model)


@pytest.mark.slow
def test_a_packed_script_compiles(run_script, packed, both, tmp_path):
    done = run_script(script=packed.path, OUT_DIR=tmp_path / "out", COMPILE=1, **TRAINING)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.result["code_bytes"] == len(packed.content)
    assert re.search(r"^compile:variants \d graph_breaks 0 graphs_compiled \d+ "
                     r"graphs_from_cache \d+$", done.log, re.M)
    for kind, value in both[0].result["val_loss"].items():
        assert done.result["val_loss"][kind] == pytest.approx(value, abs=1e-3)


# -- looking at an artifact

@pytest.fixture(scope="module")
def files(both, tmp_path_factory):
    """The trained artifact, about the same weights with 16 bits, and as a state dict."""
    folder, generator = tmp_path_factory.mktemp("files"), torch.Generator().manual_seed(0)
    tensors = train_gpt.read_artifact(both[0].artifact)[1]
    weights = {n: t.weights() * (1 + 1e-3 * torch.randn(t.codes.shape, generator=generator))
               for n, t in tensors.items()}
    halves = {n: train_gpt.Quantized(16, w.half()) for n, w in weights.items()}
    half, state = folder / "float.ptz", folder / "float.pt"
    half.write_bytes(train_gpt.encode_artifact(halves, train_gpt.Settings()))
    torch.save(weights, state)
    return SimpleNamespace(artifact=both[0].artifact, tensors=tensors, weights=weights, half=half,
                           state=state)


def row_of(out, name):
    [line] = [line for line in out.splitlines() if line.startswith(name + " ")]
    return line.split()


def test_inspect_adds_up_to_the_files_size(files, packed, capsys):
    for arguments, path in (((), SCRIPT), (("--code", packed.path), packed.path)):
        status, out, _ = told(capsys, "inspect", files.artifact, *arguments)
        size, code = files.artifact.stat().st_size, path.stat().st_size
        assert status == 0 and (f"artifact {size} + code {code} ({path}) = {size + code} of "
                                f"16000000 bytes, {16_000_000 - size - code} left") in out
    codes = int(re.search(r"^codes: (\d+) bytes", out, re.M)[1])
    side, squeezed = map(int, re.search(r"^settings, steps, fp16 arrays: (\d+) bytes, squeezed to "
                                        r"(\d+)$", out, re.M).groups())
    content = files.artifact.read_bytes()
    start = 12 + int.from_bytes(content[8:12], "little")
    assert start + squeezed + codes + 32 == size
    unpacked = lzma.decompress(content[start: start + squeezed], lzma.FORMAT_RAW,
                               filters=train_gpt.LZMA_FILTERS)
    assert len(unpacked) == side
    assert f"{sum(w.numel() for w in files.weights.values())} weights" in out
    assert "steps fitted by: trellis 0; codec rans" in out
    assert "rel.error" not in out, "no column without --float"


@pytest.mark.parametrize("kind", ["half", "state"])
def test_inspect_has_a_row_for_every_tensor(files, capsys, kind):
    """Shape, bits, step, entropy and bytes; with float weights the relative error."""
    status, out, _ = told(capsys, "inspect", files.artifact, "--float", getattr(files, kind))
    for name, t in files.tensors.items():
        cells, exact = row_of(out, name), files.weights[name]
        exact = exact.half().float() if kind == "half" else exact
        error = float((t.weights() - exact).norm()) / max(float(exact.norm()), 1e-30)
        assert float(cells[-1]) == pytest.approx(error, abs=2e-5), name
        assert cells[1] == ("×".join(map(str, t.codes.shape)) or "1")
        assert cells[2] == (f"int{t.bits}" if t.bits < 16 else "fp16")
        if t.bits == 16:
            assert int(cells[3]) == 2 * t.codes.numel()
            continue
        counts = torch.bincount(t.codes.flatten().int() + 128).double()
        p = counts[counts > 0] / t.codes.numel()
        entropy, step = -float((p * p.log2()).sum()), (t.scales[:, None] * t.columns).median()
        assert [float(cell) for cell in cells[3:5]] == pytest.approx([float(step), entropy],
                                                                     abs=6e-4)
        assert float(cells[5]) == pytest.approx(entropy * t.codes.numel() / 8, abs=1)
    assert status == 0 and 0 < float(row_of(out, "tok_emb")[-1]) < 0.01


@pytest.mark.parametrize("arguments, words", [
    ("inspect .", "."), ("inspect text.txt", "5 bytes beginning with b'hello'"),
    *((f"inspect ARTIFACT --float {name}", name) for name in (
        "nowhere.ptz", "text.pt", "list.pt", "other.pt")),
    ("inspect ARTIFACT --code nowhere.py", "nowhere.py"), ("pack-code nowhere.py", "nowhere.py"),
    ("pack-code text.txt -o text.txt/x.py", "text.txt")])
def test_wrong_paths_end_with_status_2_and_one_line(files, tmp_path, monkeypatch, capsys,
                                                    arguments, words):
    monkeypatch.chdir(tmp_path)
    for name in ("text.txt", "text.pt"):
        (tmp_path / name).write_text("hello")
    torch.save([1, 2], tmp_path / "list.pt")
    other = {name: w[..., :-1] for name, w in files.weights.items()}  # of another model
    torch.save(other, tmp_path / "other.pt")
    status, _, said = told(capsys, *arguments.replace("ARTIFACT", str(files.artifact)).split())
    assert status == 2 and said.startswith("error: ") and words in said
    assert said.count("\n") == 1 and "Traceback" not in said
    assert not (tmp_path / "packed").exists()
