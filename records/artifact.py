"""Look at an artifact, and pack the script that made it.

    python records/artifact.py pack-code [train_gpt.py] [-o packed/train_gpt.py] [--minify]
    python records/artifact.py inspect final_model.ptz [--float final.fp16.ptz]

pack-code writes one Python file of a third of the size that unpacks the readable script, byte for
byte, and runs it; a script in a wrapper is unpacked first. A run counts that file's bytes and hash;
its log holds the readable source. With --minify the packed source is the script without comments
and docstrings: it computes the same, a log holds it in place of the readable one, and its first
line names the SHA-256 of the readable one, to be published beside it.
inspect prints what every tensor got and costs.
"""
from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import lzma
import pickle
import platform
import re
import sys
from inspect import signature
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.append(str(ROOT / "data"))
sys.path.append(str(ROOT / "records"))
from shards import DataError, exit_code_of, user_path, write_whole  # noqa: E402
from unpack import readable_source  # noqa: E402

# Prose and code: literal contexts of three bits serve best; the dictionary holds the whole file.
FILTERS = [dict(id=lzma.FILTER_LZMA2, preset=9 | lzma.PRESET_EXTREME, lc=3, lp=0, pb=0,
                dict_size=1 << 20)]
# The payload stands in a Latin-1 string, one character a byte. Where the script may read its own
# file as text, which is then decoded as UTF-8, it stands in base85, a quarter longer. The source
# goes into linecache under the file's name: inspect, torch.compile and Triton read it there, and no
# change on disk makes it stale.
LOADER = """\
{head}linecache,lzma
UNPACKED=lzma.decompress({payload},3,None,
[{{'id':33,'dict_size':1<<20,'lc':3,'lp':0,'pb':0}}])
linecache.cache[__file__]=len(UNPACKED),None,UNPACKED.decode().splitlines(True),__file__
exec(compile(UNPACKED,__file__,'exec'))
"""
ESCAPES = {b"\\": b"\\\\", b"'": b"\\'", b"\0": b"\\x00", b"\n": b"\\n", b"\r": b"\\r"}


def may_read_itself_as_text(source):
    """Whether a script (bytes) knows its path and reads a file as text, or cannot be parsed."""
    if not re.search(rb"__file__|\bargv\[0\]", source):
        return False
    try:
        calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    except (SyntaxError, ValueError):
        return True
    for call in calls:
        name = ast.unparse(call.func)
        modes = {a.value for a in (*call.args, *(k.value for k in call.keywords))
                 if isinstance(a, ast.Constant) and isinstance(a.value, str)}
        if (name.endswith(".read_text") or name.endswith(".decode") and "__file__" in name
                or name.split(".")[-1] == "open" and name != "os.open"
                and not any(re.fullmatch("[rt+]*[bwax][rwaxbt+]*", mode) for mode in modes)):
            return True
    return False


def pack_code(source):
    """The self-extracting script (bytes) of a script's source (bytes)."""
    payload = lzma.compress(source, lzma.FORMAT_RAW, filters=FILTERS)
    if may_read_itself_as_text(source):
        return LOADER.format(head="import base64,", payload=f"base64.b85decode("
                             f"'{base64.b85encode(payload).decode()}')").encode()
    for plain, escaped in ESCAPES.items():
        payload = payload.replace(plain, escaped)
    return LOADER.format(head="#coding:latin1\nimport ", payload=f"'{payload.decode('latin1')}'"
                         ".encode('latin1')").encode("latin1")


def minified(source):
    """A script's source (bytes) without comments, docstrings and needless spaces; the rest of its
    syntax tree is the same, and so is the text of a class that it looks for in its source ("class
    Settings:"). Its first line names the readable source. Raises ValueError."""
    import python_minifier
    switches = signature(python_minifier.minify).parameters.values()
    off = {switch.name: False for switch in switches if switch.default is True}  # renaming …
    off["remove_annotations"] = False  # a decorator or a dataclass may read them
    try:
        tree = ast.parse(source)
        small = python_minifier.minify(source, **off, remove_literal_statements=True)
    except SyntaxError as problem:
        raise ValueError(f"--minify: line {problem.lineno} is no Python "
                         f"{platform.python_version()} ({problem.msg})") from problem
    wanted = {name for node in ast.walk(tree)
              if isinstance(node, ast.Constant) and isinstance(node.value, str)
              for name in re.findall(r"\bclass (\w+)", node.value)}

    def classes(tree):
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name in wanted:
                first = min(n.lineno for n in (node, *node.decorator_list))
                yield slice(first - 1, node.end_lineno)

    written, lines, made = source.decode().split("\n"), small.split("\n"), ast.parse(small)
    for there, here in reversed([*zip(classes(tree), classes(made))]):
        lines[here] = written[there]
    if b"__doc__" in source and ast.get_docstring(tree) and not ast.get_docstring(made):
        lines = written[:tree.body[0].end_lineno] + lines  # the module's, which it reads by name
    digest = hashlib.sha256(source).hexdigest()
    return "\n".join([f"# minified; SHA-256 of the readable source: {digest}", *lines, ""]).encode()


def pack_script(script, out, minify):
    """Pack a script into a file and say what that saves. Raises OSError, ValueError."""
    source = readable = readable_source(script)
    packed, said = pack_code(readable), ""
    if minify:
        small = minified(readable)
        saved = len(packed) - len(pack_code(small))
        said = "--minify saves nothing here, so the script is packed as it is"
        if saved > 0:
            source, packed = small, pack_code(small)
            said = (f"--minify saves {saved} bytes; a log holds the minified source: publish the "
                    f"readable one beside it ({len(readable)} bytes, sha256 "
                    f"{hashlib.sha256(readable).hexdigest()})")
    write_whole(out, packed)
    print(f"{out}: {len(packed)} bytes for {len(source)}, sha256 "
          f"{hashlib.sha256(packed).hexdigest()}", *filter(None, [said]), sep="\n")


def entropy_bits(codes):
    """Order-0 entropy of integer codes, bits in all."""
    counts = np.unique(codes, return_counts=True)[1].astype(np.float64)
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def float_weights(train_gpt, path):
    """{name: tensor} of another artifact or of a state dict saved by torch. Raises UserError."""
    try:
        if Path(path).suffix in (".pt", ".pth"):
            state = torch.load(path, map_location="cpu", weights_only=True)
            return {name: w.float() for name, w in state.items()}
        return {name: t.weights() for name, t in train_gpt.read_artifact(path)[1].items()}
    except (OSError, RuntimeError, pickle.UnpicklingError, AttributeError, LookupError, ValueError,
            EOFError) as problem:
        text = f"--float {path}: neither an artifact nor a state dict ({problem})"
        raise train_gpt.UserError(text) from problem


def rows_of(tensors, exact):
    """Per tensor: name, shape, bits, median step, entropy per code, bytes at it, relative error."""
    for name, t in tensors.items():
        error = ""
        if name in exact:
            norm = exact[name].norm().clamp_min(1e-30)
            error = f"{float((t.weights() - exact[name]).norm() / norm):.5f}"
        shape, count = "×".join(map(str, t.codes.shape)) or "1", t.codes.numel()
        if t.bits == 16:
            yield name, shape, "fp16", "", "", str(2 * count), error
        else:
            entropy = entropy_bits(t.codes.numpy())
            step = float((t.scales[:, None] * t.columns).median()) if count else 0.0
            yield (name, shape, f"int{t.bits}", f"{step:.5f}", f"{entropy / max(count, 1):.3f}",
                   f"{entropy / 8:.0f}", error)


def inspect(path, exact_path=None, code=ROOT / "train_gpt.py"):
    """Lines that say what every tensor of an artifact got and what the file costs."""
    import train_gpt

    content = Path(path).read_bytes()
    stored, tensors, note = train_gpt.read_artifact(path)
    header, index, _, codes = train_gpt.open_artifact(content)
    exact = float_weights(train_gpt, exact_path) if exact_path else {}
    for name, w in exact.items():
        if name in tensors and w.shape != tensors[name].codes.shape:
            raise train_gpt.UserError(f"--float {exact_path}: {name} is {tuple(w.shape)} there and "
                                      f"{tuple(tensors[name].codes.shape)} in {path}: weights of "
                                      "another model")
    table = [("tensor", "shape", "stored", "step", "bits/code", "bytes", "rel.error"),
             *rows_of(tensors, exact)]
    table = table if exact else [row[:-1] for row in table]
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        yield "  ".join(cell.ljust(w) if i < 3 else cell.rjust(w)
                        for i, (cell, w) in enumerate(zip(row, widths)))
    coded = [t for t in tensors.values() if t.bits < 16]
    entropy = sum(entropy_bits(t.codes.numpy()) for t in coded) / 8
    weights = sum(t.codes.numel() for t in tensors.values())
    code_bytes = len(Path(code).read_bytes())
    yield ""
    yield f"steps fitted by: {note}; codec {header['codec']}; {weights} weights"
    if entropy:
        yield (f"codes: {len(codes)} bytes, {len(codes) / entropy:.4f} of their order-0 entropy by "
               f"tensor ({entropy:.0f} bytes)")
    sides, squeezed = header["side_bytes"], header["squeezed_bytes"]
    yield f"settings, steps, fp16 arrays: {sides} bytes, squeezed to {squeezed}"
    total, budget = len(content) + code_bytes, stored["artifact_budget_bytes"]
    yield (f"artifact {len(content)} + code {code_bytes} ({code}) = {total} of {budget} bytes, "
           f"{budget - total} left")


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    pack = commands.add_parser("pack-code", help="make a small self-extracting script")
    pack.add_argument("script", nargs="?", default=ROOT / "train_gpt.py", type=user_path)
    pack.add_argument("--minify", action="store_true", help="without comments and docstrings")
    pack.add_argument("-o", "--out", default=Path("packed/train_gpt.py"), type=user_path)
    look = commands.add_parser("inspect", help="what every tensor got and costs")
    look.add_argument("artifact", type=user_path)
    look.add_argument("--float", type=user_path,
                      help="weights before quantization: an artifact with 16 bits, or a state dict")
    look.add_argument("--code", type=user_path, default=ROOT / "train_gpt.py", help="the script")
    arguments = parser.parse_args(argv)
    from train_gpt import UserError

    try:
        if arguments.command == "inspect":
            for line in inspect(arguments.artifact, arguments.float, arguments.code):
                print(line)
        else:
            pack_script(arguments.script, arguments.out, arguments.minify)
    except (UserError, ValueError) as problem:
        raise DataError(str(problem)) from problem


if __name__ == "__main__":
    sys.exit(exit_code_of(main, sys.argv[1:]))
