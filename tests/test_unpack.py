"""records/unpack.py: what a wrapper would execute comes out byte for byte; nothing of it runs."""

import base64
import bz2
import gzip
import io
import lzma
import runpy
import subprocess
import sys
import zlib
from contextlib import redirect_stdout

import pytest
from conftest import ROOT

import artifact
import unpack

SOURCE = b'''"""A script."""
from __future__ import annotations
import os
print("ran", os.environ.get("WRAPPED", "plain"), "caf\xc3\xa9")
''' + b"# a comment\n" * 20
RAW = lzma.compress(SOURCE, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9}])
B85, B64 = base64.b85encode(RAW).decode(), base64.b64encode(zlib.compress(SOURCE)).decode()
HALF = len(B64) // 2
PUBLISHED = ('import lzma as L,base64 as B\n'
             f'exec(L.decompress(B.b85decode("{B85}"),format=L.FORMAT_RAW,'
             'filters=[{"id":L.FILTER_LZMA2}]))\n')
WRAPPERS = {
    "published": PUBLISHED,
    "bytes": f"import lzma,base64\nP={B85.encode()!r}\nexec(compile(lzma.decompress("
             "base64.b85decode(P),lzma.FORMAT_RAW,None,[{'id':lzma.FILTER_LZMA2,'dict_size':1<<23}]"
             "),'train','exec'))",
    "zlib": f"import zlib,base64\nexec(zlib.decompress(base64.b64decode('{B64}')).decode('utf-8'))",
    "pieces": f"from base64 import b64decode as d\nfrom zlib import decompress\n"
              f"a = '{B64[:HALF]}'\na += ('{B64[HALF:]}'\n)\ncode = decompress(d(a))\n"
              "if __name__ == '__main__':\n    exec(code, globals())",
    "function": f"import zlib, base64\ndef load(text):\n    raw = base64.b64decode(text)\n"
                f"    return zlib.decompress(raw)\ndef main():\n    exec(load('{B64}'))\nmain()",
    "gzip": "import gzip,base64\nexec(gzip.decompress(base64.a85decode("
            f"{base64.a85encode(gzip.compress(SOURCE)).decode()!r})))",
    "bz2": f"exec(__import__('bz2').decompress({bz2.compress(SOURCE)!r}))",
    "try": f"import lzma\ntry:\n    exec(lzma.decompress({lzma.compress(SOURCE)!r}))\n"
           "except MemoryError:\n    raise",
    "hex": f"exec(bytes.fromhex({SOURCE.hex()!r}))",
    "second file": "exec(open('second.py').read())",
    "second file by its path": "import os\nhere = os.path.dirname(os.path.abspath(__file__))\n"
                               "with open(os.path.join(here, 'second.py'), 'rb') as f:\n"
                               "    code = f.read()\nexec(compile(code, 'second.py', 'exec'))",
    "second file by pathlib": "from pathlib import Path\nexec((Path(__file__).resolve().parent / "
                              "'second.py').read_text(encoding='utf-8'))",
    "second file by runpy": "import runpy\nrunpy.run_path('second.py', run_name='__main__')",
    "payload in a file": "import zlib\nexec(zlib.decompress(open('payload.bin', 'rb').read()))",
    "twice": f"import base64\nexec(base64.b64decode({base64.b64encode(PUBLISHED.encode())!r}))",
}


@pytest.fixture
def wrapped(tmp_path, monkeypatch):
    """wrapped(text) → path of a script with its second file and its payload beside it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "second.py").write_bytes(SOURCE)
    (tmp_path / "payload.bin").write_bytes(zlib.compress(SOURCE))

    def write(content, name="train_gpt.py"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path
    return write


@pytest.mark.parametrize("kind", WRAPPERS)
def test_the_source_comes_out_of_every_wrapper_that_runs_it(wrapped, kind):
    path, said = wrapped(WRAPPERS[kind]), io.StringIO()
    with redirect_stdout(said):
        runpy.run_path(str(path), run_name="__main__")
    assert said.getvalue() == "ran plain café\n", "the wrapper of the test is one"
    assert unpack.readable_source(path) == SOURCE


def test_our_own_packed_form_and_a_readable_script_come_out_as_they_were(wrapped):
    for content in (artifact.pack_code(SOURCE), artifact.pack_code(artifact.pack_code(SOURCE)),
                    SOURCE, b"import zlib\nzlib.decompress(b'')  # exec\n", b"", b"\0\xff",
                    (ROOT / "train_gpt.py").read_bytes()):
        expected = SOURCE if content.startswith(b"#coding") else content
        assert unpack.readable_source(wrapped(content)) == expected


def test_brotli_is_read_where_the_module_is_and_named_where_it_is_not(wrapped, monkeypatch):
    path = wrapped("import brotli, base64\ncode = brotli.decompress(base64.b64decode('iwGAAyhpKQ=='"
                   "))\nexec(code)")
    monkeypatch.setitem(sys.modules, "brotli", None)
    with pytest.raises(ValueError, match="train_gpt.py: .*brotli.*pip install brotli"):
        unpack.readable_source(path)
    monkeypatch.undo()
    brotli = pytest.importorskip("brotli")
    path.write_text(f"import brotli\nexec(brotli.decompress({brotli.compress(SOURCE)!r}))")
    assert unpack.readable_source(path) == SOURCE
    bomb = brotli.compress(bytes(1 << 27), quality=1)
    path.write_text(f"import brotli\nexec(brotli.decompress({bomb!r}))")
    with pytest.raises(ValueError, match="holds more than"):
        unpack.readable_source(path)


def test_what_a_wrapper_does_beside_unpacking_stands_in_the_source(wrapped):
    path = wrapped("import os, zlib, base64\nos.environ['WRAPPED'] = 'yes'\nP = zlib.decompress("
                   f"base64.b64decode('{B64}'))\nprint(len(P))\nexec(P)")
    head, future, *rest = SOURCE.splitlines(True)
    assert unpack.readable_source(path) == b"".join(
        [head, future, b"import os, zlib, base64\nos.environ['WRAPPED'] = 'yes'\n", *rest])


@pytest.mark.parametrize("content", [
    "exec(open('second.py').read())\nclass GPT:\n    pass\n" + "# long\n" * 100,
    "import sys\nexec(sys.argv[1])\nclass GPT:\n    pass\n",
    "def help():\n    return eval('1 + 1')\nprint(help())",
    "def main(model):\n    model.eval()\nmain(None)"])
def test_a_script_that_executes_a_small_part_is_no_wrapper(wrapped, content):
    assert unpack.readable_source(wrapped(content)) == content.encode()


@pytest.mark.parametrize("content, reason", [
    ("exec(open('nowhere.py').read())", "nowhere.py is no file of the script's folder"),
    ("exec(open('../outside.py').read())", "outside.py is no file"),
    ("import urllib.request as u\nexec(u.urlopen('http://x').read())", "line 2: .*urlopen"),
    (f"import lzma,base64\nexec(lzma.decompress(base64.b85decode('{B85[:-9]}'),3,None,"
     "[{'id':33}]))", "cut short"),
    ("import lzma,base64\nexec(lzma.decompress(base64.b85decode('%$#!')))", "line 2: .*format"),
    (f"import zlib\nexec(zlib.decompress({zlib.compress(bytes(1 << 27))!r}))", "more than 671088"),
    ("exec(open(__file__).read())", "more than 8 wrappers"),
    ("a = 'a' * 10\nexec(a)", "BinOp is not followed"),
    ("a = 'a'\n" + "a += a\n" * 40 + "exec(a)", "more than 67108864"),
    ("a = 'a'\n" + "a = a.replace('a', 'a' + a)\n" * 40 + "exec(a)", "more than 67108864"),
    ("a = 'a'\n" + "a = a.join([a, a, a])\n" * 40 + "exec(a)", "more than 67108864"),
    ("a = 'x'\n" + "a = a.encode('utf-32').decode('latin1')\n" * 20 + "exec(a)",
     "more than 67108864"),
    ("import os\na = 'x'\n" + "a = os.path.join(a, a)\n" * 40 + "exec(a)", "more than 67108864"),
    ("def f():\n    return f()\nexec(f())", "calls|Recursion"),
    ("exec('a = 1')\nfor code in ('a', 'b'):\n    exec(code)", "line 3: not followed"),
    ("from runpy import run_path as r\nexec('a = 1')\nwhile r('second.py'):\n    pass",
     "line 3: not followed"),
    ("a = 'decoy'\nfor b in 'xy':\n    a = b\nexec(a)", "line 2: For is not followed"),
    ("a = ['decoy']\na[0] = open('second.py').read()\nexec(a[0])", "line 2: what it changes"),
    ("a = 'decoy'\nb = a = open('second.py').read()\nexec(a)", "line 2: what it changes"),
    ("def f(a):\n    b = 'decoy'\n    for c in a:\n        b = c\n    return b\nexec(f('x'))",
     "line 3: For is not followed"),
    ("a = ['x']\n" + "a = [a, a]\n" * 40 + "exec(str(a))", "str of a list is not followed"),
    ("a = 'x '\n" + "a += a\n" * 24 + "exec(a.split()[0])", "a list of more than 10000"),
    ("a = 'x\\n'\n" + "a += a\n" * 24 + "exec(a.splitlines()[0])", "lines of a text of more"),
    ("exec('x'.encode('punycode'))", "encoding punycode is not followed"),
    ("a = 'x'\n" + "a += a\n" * 25 + "b = a.strip()\n" * 9 + "exec(b)", "bytes in all"),
    ("exec(" + "-" * 900 + "a)", "read"),
    ("exec('a = 1')\nx." + "a." * 900 + "b = 1", "too deep or too large"),
    (PUBLISHED[:200], "looks like a wrapper and cannot be parsed"),
    ("exec(" + "(" * 5000, "cannot be parsed")])
def test_a_wrapper_that_cannot_be_read_is_refused_with_path_and_reason(wrapped, content, reason):
    path = wrapped(content)
    with pytest.raises(ValueError, match=reason) as raised:
        unpack.readable_source(path)
    assert str(raised.value).startswith(f"{path}: ")


def test_nothing_of_a_wrapper_is_executed(wrapped, tmp_path):
    path = wrapped("import os, zlib, base64, pathlib\nopen('a', 'w').write('x')\nos.mkdir('b')\n"
                   "pathlib.Path('c').write_text('x')\npathlib.Path('d').touch()\n"
                   f"exec(zlib.decompress(base64.b64decode('{B64}')))")
    before = set(tmp_path.iterdir())
    source = unpack.readable_source(path)
    assert set(tmp_path.iterdir()) == before and b"os.mkdir('b')" in source and b"touch" in source


def test_the_command_prints_the_source(wrapped):
    path, command = wrapped(PUBLISHED), [sys.executable, ROOT / "records" / "unpack.py"]
    assert subprocess.run([*command, path], capture_output=True).stdout == SOURCE
    path.write_text("exec(x)")
    done = subprocess.run([*command, path], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith(f"error: {path}: ")
