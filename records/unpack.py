"""The readable source of a script, out of whatever wrappers it is in; executes nothing of it.

    python records/unpack.py path/to/train_gpt.py > readable.py

A wrapper is a file that decodes a payload, or reads a second file of its folder, and executes the
result. Its statements are read as data; only the pure functions named below are called.
"""
from __future__ import annotations

import argparse
import ast
import base64
import bz2
import codecs
import lzma
import operator
import os.path
import re
import sys
import zlib
from pathlib import Path

# Against bombs and endless loops; a list of one text's letters is far larger than the text.
MOST_BYTES, MOST_WRAPPERS, MOST_CALLS, MOST_ITEMS = 64 << 20, 8, 1000, 10_000
MOST_BYTES_IN_ALL, MOST_BYTES_OF_LINES = 4 * MOST_BYTES, 1 << 20
CODECS = {"utf-8", "utf-8-sig", "utf-16", "utf-32", "ascii", "iso8859-1", "cp1252"}  # the fast ones
NO_EFFECT = (ast.Pass, ast.Global, ast.Nonlocal, ast.Return, ast.Raise)
EXECUTES = {"exec": 0, "eval": 0, "runpy.run_path": 0,  # name: which argument is executed
            "importlib.util.spec_from_file_location": 1}


class Unreadable(ValueError):
    """Why an expression of a wrapper has no value here."""


class Dotted(str):
    """The name of a module or of what is in one, such as lzma.decompress; it is never imported."""


def decompressed(decoder, data):
    content = decoder.decompress(data, MOST_BYTES)
    if not decoder.eof:
        raise Unreadable(f"the payload is cut short or holds more than {MOST_BYTES} bytes")
    return content


def unbrotli(data):
    try:
        import brotli
    except ImportError as problem:
        raise Unreadable("the payload is compressed by brotli; pip install brotli") from problem
    decoder, content = brotli.Decompressor(), bytearray()
    for start in range(0, len(data), 16):  # so few bytes that no piece of the output grows large
        content += decoder.process(data[start: start + 16])
        if len(content) > MOST_BYTES:
            raise Unreadable(f"the payload holds more than {MOST_BYTES} bytes")
    return bytes(content)


def bounded(size):
    if size > MOST_BYTES:
        raise Unreadable(f"a text of more than {MOST_BYTES} bytes")


def size_of(value):
    """Bytes of a text or path, for any value. Raises Unreadable where it is too large."""
    if isinstance(value, (list, dict)) and len(value) > MOST_ITEMS:
        raise Unreadable(f"a list of more than {MOST_ITEMS} items")
    size = len(str(value)) if isinstance(value, Path) else (
        len(value) if isinstance(value, (str, bytes)) else 0)
    bounded(size)
    return size


def text_of(value, *coding):
    if not isinstance(value, (str, bytes, int, Path)):
        raise Unreadable(f"str of a {type(value).__name__} is not followed")
    return coded(str, value, *coding) if coding else str(value)


def coded(function, value, encoding="utf-8", errors="strict"):
    if codecs.lookup(encoding).name not in CODECS:
        raise Unreadable(f"the encoding {encoding} is not followed")
    return function(value, encoding, errors)


def split(text, sep=None, maxsplit=-1):
    return text.split(sep, maxsplit if 0 <= maxsplit < MOST_ITEMS else MOST_ITEMS)


def lines(text, keepends=False):
    if len(text) > MOST_BYTES_OF_LINES:
        raise Unreadable(f"lines of a text of more than {MOST_BYTES_OF_LINES} bytes")
    return text.splitlines(keepends)


def replaced(text, old, new, *count):
    bounded(len(text) + text.count(old) * len(new))
    return text.replace(old, new, *count)


def joined(glue, parts):
    bounded(sum(len(part) + len(glue) for part in parts))
    return glue.join(parts)


def added(left, right):
    bounded(len(left) + len(right))
    return left + right


FUNCTIONS = {
    **{f"base64.{name}": function for name, function in vars(base64).items()
       if re.fullmatch(r"[ab]\d\ddecode|\w+_b64decode", name)},
    **{f"os.path.{name}": getattr(os.path, name)
       for name in ("join", "dirname", "basename", "abspath", "realpath")},
    "lzma.decompress": lambda data, format=lzma.FORMAT_AUTO, memlimit=None, filters=None:
        decompressed(lzma.LZMADecompressor(format, None, filters), data),
    "zlib.decompress": lambda data, wbits=zlib.MAX_WBITS, bufsize=0:
        decompressed(zlib.decompressobj(wbits), data),
    "gzip.decompress": lambda data: decompressed(zlib.decompressobj(31), data),
    "bz2.decompress": lambda data: decompressed(bz2.BZ2Decompressor(), data),
    "brotli.decompress": unbrotli, "pathlib.Path": Path, "bytes.fromhex": bytes.fromhex,
    "str": text_of,
    "__import__": Dotted, "importlib.import_module": Dotted}
OPERATORS = {ast.Add: added, ast.BitOr: operator.or_, ast.Div: operator.truediv,
             ast.LShift: lambda number, bits: number << min(bits, 64)}
METHODS = {  # open(…) gives the content of the file
    **{(kind, name): getattr(kind, name) for kind in (str, bytes)
       for name in ("strip", "removeprefix")},
    **{(kind, name): function for kind in (str, bytes)
       for name, function in (("read", lambda content: content), ("replace", replaced),
                              ("join", joined), ("split", split), ("splitlines", lines))},
    (str, "encode"): lambda text, *coding, **named: coded(str.encode, text, *coding, **named),
    (bytes, "decode"): lambda data, *coding, **named: coded(bytes.decode, data, *coding, **named),
    **{(type(Path()), name): getattr(Path, name) for name in ("resolve", "with_name", "joinpath")}}


class Reader:
    """Reads the statements of one file. .code: sources (bytes) that they would execute; .others:
    the text of statements that do something else; .problem: why something executed is unknown;
    .consumed: ids of the calls that execute."""

    def __init__(self, path):
        self.folder, self.consumed = path.resolve().parent, set()
        self.calls = self.bytes = self.inside = 0  # inside: so many functions
        self.names = {"__file__": str(self.folder / path.name), "__name__": "__main__"}
        self.imports, self.code, self.others, self.problem = [], [], [], None
        self.functions = {**FUNCTIONS, "open": self.opened}
        self.methods = {**METHODS, (type(path), "read_text"): self.opened,
                        (type(path), "read_bytes"): lambda path: self.opened(path, "rb")}

    def run(self, statements):
        """The value that the statements return, if any. Raises Unreadable where that depends on a
        statement that is not followed, such as a loop."""
        for node in statements:
            if isinstance(node, ast.Return) and node.value:
                return self.value(node.value)
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                self.imports.append(ast.unparse(node))
                module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
                for name in node.names:
                    full = module + name.name
                    self.names[name.asname or name.name.split(".")[0]] = Dotted(
                        full if module or name.asname else full.split(".")[0])
            elif isinstance(node, ast.FunctionDef):
                self.names[node.name] = node
            elif isinstance(node, (ast.With, ast.If, ast.Try)):
                for item in getattr(node, "items", []):
                    self.assign(item, item.optional_vars, item.context_expr)
                value = self.run([part for name in ("body", "orelse", "finalbody")
                                  for part in getattr(node, name, [])])
                if value is not None:
                    return value
            elif isinstance(node, ast.AugAssign):
                self.assign(node, node.target, ast.BinOp(node.target, node.op, node.value))
            elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.Expr)) and node.value:
                targets = getattr(node, "targets", [getattr(node, "target", None)])
                target = targets[0] if len(targets) == 1 else ast.Tuple(targets)
                self.assign(node, target, node.value)
            elif not isinstance(node, NO_EFFECT):
                reason = Unreadable(f"line {node.lineno}: {type(node).__name__} is not followed")
                if self.inside and any(isinstance(n, ast.Return) for n in ast.walk(node)):
                    raise reason
                self.others.append(ast.unparse(node))
                self.forget(node, reason)

    def forget(self, node, reason):
        """What a statement that is not followed may have changed is unknown from here on."""
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and (
                    not isinstance(part.ctx, ast.Load)
                    or isinstance(self.names.get(part.id), (list, dict))):
                self.names[part.id] = reason

    def assign(self, node, target, expression):
        """Give the target the value of the expression, or the reason why there is none. A statement
        that is not understood, and not about the payload, is one of the others."""
        try:
            value = self.value(expression)
        except Unreadable as problem:
            value = problem
        if isinstance(target, ast.Name):
            self.names[target.id] = value
        if isinstance(value, Unreadable) or not isinstance(target, (ast.Name, type(None))):
            held = {n for n, v in self.names.items() if not isinstance(v, (Dotted, Unreadable))}
            names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            if not names & held - {"__file__"}:
                self.others.append(ast.unparse(node))
            self.forget(node, value if isinstance(value, Unreadable) else Unreadable(
                f"line {node.lineno}: what it changes is not followed"))

    def value(self, node):
        """The value of an expression. Raises Unreadable with the reason."""
        try:
            value = self.computed(node)
            if isinstance(node, (ast.Call, ast.BinOp, ast.List, ast.Dict)):
                self.bytes += size_of(value)
                if self.bytes > MOST_BYTES_IN_ALL:
                    raise Unreadable(f"texts of more than {MOST_BYTES_IN_ALL} bytes in all")
            return value
        except Unreadable:
            raise
        except Exception as problem:  # whatever a pure function says about bad arguments
            raise Unreadable(f"{type(problem).__name__}: {problem}") from problem

    def known(self, node):
        """The value of an expression that is no mere name of something."""
        value = self.value(node)
        if isinstance(value, Dotted):
            raise Unreadable(f"line {node.lineno}: {value} is not known")
        return value

    def computed(self, node):
        match node:
            case ast.Constant():
                return node.value
            case ast.Name():
                value = self.names.get(node.id, Dotted(node.id))
                if isinstance(value, Unreadable):
                    raise value
                return value
            case ast.Attribute():
                owner = self.value(node.value)
                if isinstance(owner, Path) and node.attr in ("parent", "name", "stem"):
                    return getattr(owner, node.attr)
                if isinstance(owner, Dotted):
                    module = {"lzma": lzma, "zlib": zlib}.get(owner)
                    return (getattr(module, node.attr) if module and node.attr.isupper()
                            else Dotted(f"{owner}.{node.attr}"))
            case ast.Tuple() | ast.List():
                return [self.known(element) for element in node.elts]
            case ast.Dict():
                return {self.known(k): self.known(v) for k, v in zip(node.keys, node.values)}
            case ast.Subscript():
                return self.known(node.value)[self.known(node.slice)]
            case ast.Slice():
                return slice(*(p and self.known(p) for p in (node.lower, node.upper, node.step)))
            case ast.UnaryOp(op=ast.USub()):
                return -self.known(node.operand)
            case ast.BinOp() if type(node.op) in OPERATORS:
                return OPERATORS[type(node.op)](self.known(node.left), self.known(node.right))
            case ast.Call():
                return self.called(node)
        raise Unreadable(f"line {node.lineno}: {type(node).__name__} is not followed")

    def called(self, node):
        self.calls += 1
        if self.calls > MOST_CALLS:
            raise Unreadable(f"more than {MOST_CALLS} calls")
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        owner = self.value(node.func.value) if name else Dotted()
        function = self.value(node.func) if isinstance(owner, Dotted) else None
        if isinstance(function, Dotted) and function in EXECUTES:
            return self.executed(function, node)
        if function == "compile":
            return self.known(node.args[0])
        given = [self.known(argument) for argument in node.args]
        options = {k.arg: self.known(k.value) for k in node.keywords}
        bounded(sum(map(size_of, given)))
        if isinstance(function, ast.FunctionDef):
            outside = self.names
            self.names = {**outside, **dict(zip((a.arg for a in function.args.args), given)),
                          **options}
            self.inside += 1
            try:
                return self.run(function.body)
            finally:
                self.names = outside
                self.inside -= 1
        if (type(owner), name) in self.methods:
            return self.methods[type(owner), name](owner, *given, **options)
        if function in self.functions:
            return self.functions[function](*given, **options)
        raise Unreadable(f"line {node.lineno}: {ast.unparse(node.func)[:60]}(…) is not followed")

    def name_of(self, node):
        """The dotted name of a function, whatever it is called here."""
        first, _, rest = ast.unparse(node).partition(".")
        meant = self.names.get(first)
        return ".".join(filter(None, (meant if isinstance(meant, Dotted) else first, rest)))

    def executed(self, function, node):
        """Note the source that an exec or the like would execute, or why it is unknown."""
        self.consumed.add(id(node))
        try:
            source = self.known(node.args[EXECUTES[function]])
            if EXECUTES[function] or "." in function:
                source = self.opened(source, "rb")
            self.code.append(source.encode() if isinstance(source, str) else bytes(source))
        except Unreadable as problem:
            self.problem = self.problem or f"line {node.lineno}: {problem}"

    def opened(self, name, mode="r", encoding="utf-8", **options):
        """Content of a file of the script's folder."""
        path = (self.folder / name).resolve()
        if not path.is_relative_to(self.folder) or not path.is_file():
            raise Unreadable(f"{name} is no file of the script's folder")
        if path.stat().st_size > MOST_BYTES:
            raise Unreadable(f"{name} has more than {MOST_BYTES} bytes")
        content = path.read_bytes()
        return content if "b" in mode else coded(bytes.decode, content, encoding)


def unwrapped(content, path):
    """The source inside of one wrapper, or None where the content is none. Raises ValueError."""
    try:
        return source_inside(content, path)
    except (RecursionError, MemoryError) as problem:
        kind = type(problem).__name__
        raise ValueError(f"{path}: too deep or too large to be read ({kind})") from problem


def source_inside(content, path):
    if not re.search(rb"\b(exec|eval|run_path|spec_from_file_location|decompress)\b", content):
        return None
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as problem:
        if re.search(rb"^\s*(def|class) ", content, re.M):  # readable, of another Python
            return None
        text = f"{path}: looks like a wrapper and cannot be parsed ({problem})"
        raise ValueError(text) from problem
    reader = Reader(path)
    reader.run(tree.body)
    code = b"\n".join(reader.code)
    nodes = list(ast.walk(tree))
    literals = sum(len(node.value) for node in nodes if isinstance(node, ast.Constant)
                   and isinstance(node.value, (str, bytes)))
    kinds = {type(node) for node in nodes}
    if (ast.ClassDef in kinds and reader.problem or {ast.ClassDef, ast.FunctionDef} & kinds
            and reader.code and len(code) <= len(content) - literals):
        return None  # what it executes is a small part of it
    if reader.others:  # after the imports that must come first
        futures = re.finditer(rb"^from __future__ .*\n", code, re.M)
        first = max((future.end() for future in futures), default=0)
        others = "\n".join([*reader.imports, *reader.others, ""])
        code = code[:first] + others.encode() + code[first:]
    calls = [f"line {node.lineno}: not followed" for node in nodes if isinstance(node, ast.Call)
             and id(node) not in reader.consumed and reader.name_of(node.func) in EXECUTES]
    left_out = calls and (reader.code or ast.ClassDef not in kinds)
    problem = reader.problem or (calls[0] if left_out else "")
    if problem:
        raise ValueError(f"{path}: executes code that cannot be read ({problem})")
    return code if reader.code else None


def readable_source(path):
    """The source (bytes) of a script, unpacked. Raises OSError, ValueError: an unread wrapper."""
    path = Path(path)
    content = path.read_bytes()
    for _ in range(MOST_WRAPPERS + 1):
        inner = unwrapped(content, path)
        if inner is None:
            return content
        content = inner
    raise ValueError(f"{path}: more than {MOST_WRAPPERS} wrappers inside one another")


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path)
    try:
        sys.stdout.buffer.write(readable_source(parser.parse_args(argv).script))
    except (OSError, ValueError) as problem:
        parser.exit(2, f"error: {problem}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
