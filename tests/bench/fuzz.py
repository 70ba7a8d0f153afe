"""Damaged and forged artifacts by the hundred thousand: each must be refused in words or be what it
says it is.

    python tests/bench/fuzz.py [--files 100000] [--seed 1] [--log tests/bench/results/fuzz.txt]

Every file is an honest artifact (all installed codecs, all bits) after one to four changes: of raw
bytes, the header, the decompressed index, the arrays behind it, the tables and states of the coder.
What is decompressed is compressed again, and seven files in eight get a right checksum: it is not
what keeps damage from the decoder here. Counted are files refused (UserError), harmless (they
decode to tensors of the shapes that they state), and crashes (any other exception, or a warning);
the first of each kind is kept beside the log. Exit status 1 if there is one.
"""
from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import importlib.util
import json
import lzma
import math
import random
import resource
import struct
import sys
import tempfile
import time
import tracemalloc
import traceback
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import train_gpt as T  # noqa: E402

START = len(T.ARTIFACT_MAGIC) + 4  # where the header begins
CODECS = ["rans", "lzma"] + ["zstd"] * (importlib.util.find_spec("zstandard") is not None)
SHAPES = {"tok_emb": (6, 8), "cores.0.attn.q": (8, 8), "cores.0.mlp.up": (9, 8),
          "cores.0.mlp.down": (7, 9), "skip_weights": (2, 8)}
NUMBERS = [0, 1, -1, 2, 7, 8, 15, 16, 17, 31, 255, 256, 2**15, 2**16, 2**20, 2**31 - 1, 2**31,
           2**32, 2**53, 2**62, 2**63, 2**64, 10**400, -2**31, -2**63, 0.5, -0.0, 1e308, math.inf,
           -math.inf, math.nan]


def sealed(content):
    """The content with a right checksum."""
    return content + hashlib.sha256(content).digest()


def taken_apart(content):
    """(header, index, side behind the index, codes) of an honest artifact; the latter two bytes."""
    length, = struct.unpack_from("<I", content, START - 4)
    header, start = json.loads(content[START: START + length]), START + length
    end = start + header["squeezed_bytes"]
    side = lzma.decompress(content[start:end], lzma.FORMAT_RAW, filters=T.LZMA_FILTERS)
    index_bytes = header["index_bytes"]
    return header, json.loads(side[:index_bytes]), side[index_bytes:], content[end:-32]


def put_together(index, side=b"", codes=b"", header=None):
    """An artifact with a right checksum around whatever is given; `index` and `header` as objects
    or bytes. A header that is a dict changes the fitting one."""
    index = index if isinstance(index, bytes) else json.dumps(index).encode()
    squeezed = lzma.compress(index + side, lzma.FORMAT_RAW, filters=T.LZMA_FILTERS)
    fitting = dict(codec="lzma", index_bytes=len(index), side_bytes=len(index) + len(side),
                   squeezed_bytes=len(squeezed))
    if not isinstance(header, bytes):
        header = json.dumps({**fitting, **(header or {})}).encode()
    return sealed(T.ARTIFACT_MAGIC + struct.pack("<I", len(header)) + header + squeezed + codes)


def honest_files(codecs=CODECS):
    """{codec: bytes of a small artifact}: all bits, steps that repeat and steps that do not."""
    s, generator = T.Settings(attn_bits=6, mlp_bits=4), torch.Generator().manual_seed(0)
    state = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    tensors = T.Quantizer(state, s).at(0.004)
    return {codec: T.encode_artifact(tensors, replace(s, codec=codec), "level 0.004")
            for codec in codecs}


# Each mutation: (honest content, its parts, random.Random) → content.

def junk(rng, depth=2):
    """A JSON value of any kind."""
    kind = rng.randrange(8 if depth else 5)
    if kind < 3:
        return rng.choice(NUMBERS) if kind else rng.randint(-3, 40)
    if kind < 5:
        return rng.choice([None, True, False, "", "x", "lzma", "rans", "\ud800", "9" * 5000])
    if kind < 7:
        return [junk(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {rng.choice(["codec", "settings", "tensors", "x"]): junk(rng, depth - 1)
            for _ in range(rng.randrange(3))}


def edited(data, rng, first=0, last=None):
    """Bytes after one to four small changes between two places: overwritten, put in, cut out."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(first, min(last if last is not None else len(data), len(data)))
        data[at: at + rng.randrange(4)] = rng.choice(
            [b"", b"\x00", b"\xff", rng.randbytes(1), rng.randbytes(3)])
    return bytes(data)


def raw_bytes(content, parts, rng):
    return edited(content, rng)


def sealed_bytes(content, parts, rng):
    return sealed(edited(content[:-32], rng))


def cut_or_extended(content, parts, rng):
    body = content[:-32]
    return sealed(body[: rng.randrange(len(body))] if rng.random() < 0.5 else
                  body + rng.randbytes(rng.randint(1, 40)))


def header_fields(content, parts, rng):
    header, index, side, codes = parts
    if rng.random() < 0.1:
        return put_together(index, side, codes, json.dumps(junk(rng)).encode())
    key = rng.choice([*header])
    near = (header[key] + rng.randint(-3, 3) if isinstance(header[key], int) else
            rng.choice(["lzma", "rans", "zstd"]))
    changed = dict(codec=header["codec"]) | {key: rng.choice([near, junk(rng)])}
    return put_together(index, side, codes, changed)


def index_fields(content, parts, rng):
    """The index says something else; codes stay, and mostly the side."""
    header, index, side, codes = parts
    index = json.loads(json.dumps(index))
    tensors = index["tensors"]
    target = rng.choice(["field", "entry", "bits", "shape", "size", "swap", "drop", "double"])
    entry = rng.randrange(len(tensors))
    if target == "field":
        index[rng.choice([*index])] = junk(rng)
    elif target == "entry":
        tensors[entry] = junk(rng)
    elif target == "bits":
        tensors[entry][1] = rng.choice([4, 5, 6, 7, 8, 16, junk(rng)])
    elif target == "shape":
        other = [rng.randrange(20) for _ in range(rng.randrange(4))]
        tensors[entry][2] = rng.choice([tensors[entry][2][::-1], other, junk(rng)])
    elif target == "size":
        shape = tensors[entry][2]
        shape[rng.randrange(len(shape))] = rng.choice([rng.randrange(20), rng.choice(NUMBERS)])
    elif target == "swap":
        rng.shuffle(tensors)
    elif target == "drop":
        del tensors[entry]
    else:
        tensors.append([rng.choice([tensors[entry][0], "another"]), *tensors[entry][1:]])
    if rng.random() < 0.3:
        side = rng.randbytes(rng.randrange(2 * len(side)))
    return put_together(index, side, codes, dict(codec=header["codec"]))


def settings_in_the_index(content, parts, rng):
    header, index, side, codes = parts
    stored = dict(index["settings"])
    for _ in range(rng.randint(1, 3)):
        name = rng.choice([*stored, "out_dir", "no_such_setting"])
        value = stored.get(name)
        other = -value if isinstance(value, (int, float)) else str(value)
        stored[name] = rng.choice([junk(rng), other, value])
    return put_together(dict(index, settings=stored), side, codes, dict(codec=header["codec"]))


def index_text(content, parts, rng):
    """Changes in the index as text, and of where it ends."""
    header, index, side, codes = parts
    text = edited(json.dumps(index).encode(), rng)
    cut = len(text) + rng.choice([0, 0, 0, -1, 1])
    whole = text + side
    return put_together(whole[:cut], whole[cut:], codes, dict(codec=header["codec"]))


def arrays(content, parts, rng):
    header, index, side, codes = parts
    return put_together(index, edited(side, rng), codes, dict(codec=header["codec"]))


def code_tables(content, parts, rng):
    """Frequencies and scales of the coder, changed and compressed again; of other codecs, the
    codes."""
    header, index, side, codes = parts
    if header["codec"] != "rans":
        return put_together(index, side, edited(codes, rng), dict(codec=header["codec"]))
    length, = struct.unpack_from("<I", codes)
    coded = codes[4 + length:]
    tables = lzma.decompress(codes[4: 4 + length], lzma.FORMAT_RAW, filters=T.LZMA_FILTERS)
    table_bytes = 2 * T.CONTEXTS * T.SYMBOLS
    if rng.random() < 0.5:  # from one symbol of a context to another: the row still sums to one
        rows = np.frombuffer(tables[:table_bytes], "<u2").reshape(T.SYMBOLS, T.CONTEXTS).copy()
        context = rng.randrange(T.CONTEXTS)
        giver, taker = int(rows[:, context].argmax()), rng.randrange(T.SYMBOLS)
        moved = rng.randint(0, int(rows[giver, context]))
        rows[giver, context] -= moved
        rows[taker, context] += moved
        tables = rows.tobytes() + tables[table_bytes:]
    else:
        tables = edited(tables, rng, first=rng.choice([0, table_bytes]))
    tables = T.squeeze(tables)
    length = len(tables)
    if rng.random() < 0.2:
        length = rng.choice([0, 1, length - 1, length + 1, 2**31, 2**32 - 1])
    codes = struct.pack("<I", length) + tables + coded
    return put_together(index, side, codes, dict(codec="rans"))


def code_states(content, parts, rng):
    header, index, side, codes = parts
    codes = edited(codes, rng, first=max(0, len(codes) - 2200))
    return put_together(index, side, codes, dict(codec=header["codec"]))


MUTATIONS = (raw_bytes, sealed_bytes, cut_or_extended, header_fields, index_fields,
             settings_in_the_index, index_text, arrays, code_tables, code_states)


def mutated(honest, parts, rng):
    """(name of the mutation, content) of one random file."""
    codec, mutation = rng.choice([*honest]), rng.choice(MUTATIONS)
    content = mutation(honest[codec], parts[codec], rng)
    if mutation is not raw_bytes and rng.random() < 0.03:
        content = content[:-1] + bytes([content[-1] ^ 1])
    return mutation.__name__, content


def outcome(content):
    """"refused" or "harmless"; whatever else the reader raises comes through, as does a tensor of
    another shape or with a code beyond its bits."""
    try:
        settings, tensors, note = T.decode_artifact(content)
    except T.UserError as refusal:
        # the decoder turns whatever it meets into a refusal; these would be mistakes of its own
        assert not isinstance(refusal.__cause__, (Warning, MemoryError, NameError, AssertionError,
                                                  AttributeError, StopIteration)), refusal
        return "refused"
    assert isinstance(settings, dict) and isinstance(note, str)
    for tensor in tensors.values():
        assert tensor.weights().shape == tensor.codes.shape
        if tensor.bits < 16 and tensor.codes.numel():
            assert int(tensor.codes.int().abs().max()) < 2 ** (tensor.bits - 1)
    return "harmless"


def measured(content):
    """(outcome, seconds, peak bytes allocated by the decoder's Python and numpy)."""
    tracemalloc.reset_peak()
    before, started = tracemalloc.get_traced_memory()[0], time.perf_counter()
    result = outcome(content)
    return result, time.perf_counter() - started, tracemalloc.get_traced_memory()[1] - before


def read_as_a_run_does(content, folder):
    """What EVAL_ONLY does with a file that decodes: settings checked, shapes compared."""
    path = Path(folder) / "forged.ptz"
    path.write_bytes(content)
    with contextlib.suppress(T.UserError):
        T.settings_of_artifact(str(path), {})


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    rng, honest = random.Random(arguments.seed), honest_files()
    parts = {codec: taken_apart(content) for codec, content in honest.items()}
    tracemalloc.start()
    base = [measured(content) for content in honest.values() for _ in range(3)]
    assert all(result == "harmless" for result, *_ in base)
    base_peak, base_seconds = max(peak for *_, peak in base), min(seconds for _, seconds, _ in base)
    counts, crashes = collections.defaultdict(collections.Counter), {}
    slowest, highest = (0.0, ""), (0, "")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for n in range(arguments.files):
            name, content = mutated(honest, parts, rng)
            try:
                result, seconds, peak = measured(content)
                if result == "harmless" and n % 4 == 0:  # it takes ten times the decoding
                    read_as_a_run_does(content, folder)
                slowest, highest = max(slowest, (seconds, name)), max(highest, (peak, name))
            except Exception as problem:
                result, place = "crash", traceback.extract_tb(problem.__traceback__)[-1]
                where = f"{Path(place.filename).name}, {place.name}"
                what = f"{type(problem).__name__} in {where}: {str(problem)[:200]}"
                crashes.setdefault(what, content)
            counts[name][result] += 1
            if (n + 1) % 10_000 == 0:
                print(f"{n + 1} files, {time.perf_counter() - started:.0f} s, {len(crashes)} kinds "
                      "of crash", flush=True)
    sizes = ", ".join(f"{len(content)} bytes ({codec})" for codec, content in honest.items())
    lines = [f"{arguments.files} files from seed {arguments.seed} in "
             f"{time.perf_counter() - started:.0f} s; honest files of {sizes}",
             f"{'mutation':<24}{'refused':>10}{'harmless':>10}{'crash':>8}"]
    total = sum(counts.values(), collections.Counter())
    for name, count in [*sorted(counts.items()), ("all", total)]:
        lines.append(f"{name:<24}{count['refused']:>10}{count['harmless']:>10}{count['crash']:>8}")
    lines.append(f"slowest: {1000 * slowest[0]:.1f} ms ({slowest[1]}); an honest file takes "
                 f"{1000 * base_seconds:.1f} ms")
    lines.append(f"most memory for one file: {highest[0]:,} bytes ({highest[1]}); an honest file "
                 f"takes {base_peak:,}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    lines.append(f"peak memory of the process: {peak:.0f} MiB")
    lines += [f"crash: {description}" for description in crashes]
    print("\n".join(lines))
    if arguments.log:
        T.write_whole(arguments.log, ("\n".join(lines) + "\n").encode())
        for i, content in enumerate(crashes.values()):
            T.write_whole(arguments.log.with_suffix(f".crash{i}.ptz"), content)
    return 1 if crashes else 0


if __name__ == "__main__":
    sys.exit(main())
