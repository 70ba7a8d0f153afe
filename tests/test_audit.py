"""The audit: honest scripts pass, and every cheat that is planted in a copy of the script is
found."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import ROOT, TINY, VOCAB, write_shard

import audit
import train_gpt
from artifact import pack_code

SCRIPT = (ROOT / "train_gpt.py").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def artifact(corpus, tmp_path_factory):
    """A tiny model with random weights, packed: everything in it counts, so that every token is
    felt."""
    two_blocks = {**TINY, "NUM_LAYERS": 2, "XSA_LAST_N": 2, "VE_LAYERS": "0,1"}
    s = train_gpt.resolve_settings({k: str(v) for k, v in two_blocks.items()})[0]
    model, _ = train_gpt.build_model(s, train_gpt.Runtime(s))
    torch.manual_seed(11)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.15 * torch.randn_like(p))
    path = tmp_path_factory.mktemp("artifact") / "final_model.ptz"
    for name, rank in ((path, 0), (path.with_name("adapters"), 2)):  # the file says which TTT
        stored = train_gpt.replace(s, ttt_lora_rank=rank)
        train_gpt.write_whole(name, train_gpt.pack(dict(model.named_parameters()), stored, 10**6))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.with_name("damaged").write_bytes(content)
    return path


@pytest.fixture
def run(corpus, artifact, tmp_path, capsys):
    """run(script, NAME=value, ...) → (exit status, {condition: sentences that failed}, everything
    said)."""
    def go(script=SCRIPT, *flags, path=artifact, **variables):
        script = script if isinstance(script, bytes) else script.encode()
        (tmp_path / "train_gpt.py").write_bytes(script)
        environ = {"DEVICE": "cpu", "EVAL_ATTENTION": "window", "DATA_PATH": str(corpus.folder),
                   "TOKENIZER_PATH": str(corpus.model),
                   **{k: str(v) for k, v in variables.items()}}
        status = audit.exit_code_of(partial(audit.main, environ=environ), [
            str(path), "--script", str(tmp_path / "train_gpt.py"), *flags])
        out, err = capsys.readouterr()
        failed, condition = {}, None
        for line in out.splitlines():
            condition = line if line and not line.startswith(" ") else condition
            if line.startswith("  FAIL"):
                failed.setdefault(condition, []).append(line)
        return status, failed, out + err
    return go


# -- honest

HONEST = {
    "banded": dict(EVAL_ATTENTION="banded", TTT_CHUNK_TOKENS=128),
    "adamw": dict(TTT_OPTIMIZER="adamw", TTT_LR=0.001),
    "muon": dict(TTT_OPTIMIZER="muon", TTT_LR=0.005),
    "packed": dict(TTT_ENABLED=0, EVAL_STRIDE=0),
    "adapters": dict(TTT_BATCH_SEQS=3, EVAL_SEQ_LEN=8, EVAL_STRIDE=8, EVAL_BATCH_SEQS=2),
    "guesses": dict(TTT_BATCH_SEQS=3, EVAL_ATTENTION="banded", EVAL_SEQ_LEN=16, EVAL_STRIDE=8),
    "adapters alone": dict(TTT_BASE_WEIGHT=0, EVAL_SEQ_LEN=48, EVAL_STRIDE=16),  # windows > rows
    "tail": dict(
        TTT_PARAMS="tail", TTT_FREEZE_BLOCKS=1, TTT_PROJ_LR_MULT=3, TTT_FC_LR_MULT=0.5,
        TTT_INTRA_COSINE=1, TTT_EPOCHS=-1)}
# Three streams, which fill up batches of two. Two streams with rows that overlap: guesses are mixed
# in, and adapters change while the first rows still begin at the first token. Adapters alone: one
# stream.
TARGETS = {"banded": 256, "adapters": 384, "guesses": 768, "adapters alone": 384}


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow) if name in ("muon", "adamw", "adapters") else name
    for name in HONEST])
def test_the_honest_script_passes(run, artifact, name):
    script = pack_code(SCRIPT.encode()) if name == "packed" else SCRIPT
    adapters = "adapters" in name or name == "guesses"
    path = artifact.with_name("adapters") if adapters else artifact
    status, failed, said = run(script, "--targets", str(TARGETS.get(name, 128)), "--places",
                               "2" if name == "banded" else "0", path=path, **HONEST[name])
    assert status == 0 and not failed, said
    for condition in (audit.CAUSAL, audit.NORMALIZED, audit.BEFORE, audit.ONCE, audit.BYTES,
                      audit.SHIPS):
        assert f"\n{condition}\n  PASS" in said
    if name != "packed":
        what = "adapters" if adapters else "weights"
        assert f"PASS  {what} changed" in said and "SKIP" not in said
        assert ("border of a stream" in said) == (adapters and "alone" not in name)
        assert ("adapters began anew" in said) == adapters
        assert ("up to 10 epochs" in said) == (name == "tail")
    assert ("ttt mix in guesses" in said) == (name not in ("adapters", "packed"))
    assert ("ttt mixes in the base model" in said) == (adapters and "alone" not in name)


def test_a_file_over_the_cap_fails_and_what_cannot_be_seen_is_said(run, monkeypatch):
    monkeypatch.setattr(audit, "CAP_BYTES", len(SCRIPT.encode()) + 1000)
    status, failed, said = run(SCRIPT, "--targets", "128", "--places", "0", TTT_LR=0)
    assert status == 1 and list(failed) == [audit.SHIPS], said
    assert "  SKIP  test-time training changed nothing here" in said


# -- bytes

@pytest.mark.parametrize("dummy_prefix", [False, True])
def test_bytes_are_those_of_the_documents(corpus, tmp_path, dummy_prefix):
    """Also with a tokenizer that puts a space before every document, and where a slice cuts a
    character."""
    sp = corpus.tokenizer
    if dummy_prefix:
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus.folder / "text.txt"), model_prefix=str(tmp_path / "m"),
            vocab_size=VOCAB, model_type="bpe", byte_fallback=True, bos_id=1, eos_id=2, unk_id=0,
            hard_vocab_limit=True, minloglevel=2, num_threads=1)
        sp = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    texts = [*corpus.documents[:20], "🜁 alone", "z🜁"]
    documents = [[1, *sp.encode(text)] for text in texts]
    assert all(sp.id_to_piece(d[1]).startswith("▁") == dummy_prefix for d in documents)
    tokens, size = np.concatenate(documents), sum(len(text.encode()) for text in texts)
    assert audit.text_bytes(sp, tokens) == size
    assert audit.text_bytes(sp, tokens[:-2]) == size - 2, "two bytes of the last character"
    inside = 1 + len(documents[0]) // 2
    parts = tokens[:inside + 1], tokens[inside:]
    assert sum(audit.text_bytes(sp, part) for part in parts) == size


def test_bytes_counted_from_the_text_are_the_denominator(run, corpus, tmp_path):
    """The text had more spaces than its tokens decode to: a script that counts pieces fails."""
    folder, sides = tmp_path / "counted", np.full(1031, 3)
    folder.mkdir()
    for shard in corpus.folder.glob("*.bin"):
        (folder / shard.name).symlink_to(shard)
    write_shard(folder / "fineweb_val_bytes_000000.bin", sides)
    few = ["--targets", "128", "--places", "0"]
    status, failed, said = run(SCRIPT, *few, TTT_ENABLED=0, DATA_PATH=folder)
    assert status == 0 and "PASS  128 targets stand for 384 bytes" in said, said
    line = "self.byte_counts, self.source = "
    plant = line + "self._counted(s)", line + "None"
    assert SCRIPT.count(plant[0]) == 1
    status, failed, said = run(SCRIPT.replace(*plant), *few, TTT_ENABLED=0, DATA_PATH=folder)
    assert status == 1 and "where the text has 384" in failed[audit.BYTES][0], said


# -- unusable

UNUSABLE = {
    "no artifact": (dict(name="none.ptz"), [], "none.ptz: no such file"),
    "a damaged artifact": (dict(name="damaged"), [], "damaged: not an artifact"),
    "too few targets": ({}, ["--targets", "100"],
                        "--targets 100: too few, four chunks of a row need 128"),
    "no data": ({}, ["--data", "nowhere"], "DATA_PATH=nowhere: no fineweb_val_"),
    "several ranks": (dict(WORLD_SIZE=2), [],
                      "WORLD_SIZE=2: the audit is one process; start it without torchrun"),
    "another script": (dict(script="import os\n"), [], "has no Settings, UserError, Runtime"),
    "a broken script": (dict(script="import nothing_of_that_name\n"), [],
                        "cannot be imported (ModuleNotFoundError: No module"),
    "bad setting": (dict(EVAL_STRIDE="x"), [], "EVAL_STRIDE=x: ")}


@pytest.mark.parametrize("variables, flags, says", UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_input_is_named(run, artifact, variables, flags, says):
    variables = {"script": SCRIPT, "name": artifact.name, **variables}
    path = artifact.with_name(variables.pop("name"))
    status, _, said = run(variables.pop("script"), *flags, path=path, **variables)
    assert status == 2 and said.startswith("error: ") and says in said


@pytest.mark.parametrize("streams", [1, 3])
def test_the_recount_of_guesses_equals_the_scripts_over_a_long_text(streams):
    """One stream: more than the 32,768 targets after which rounds grow."""
    count = 36_000 if streams == 1 else 13_500
    tokens = np.random.default_rng(0).integers(0, 3, count + 1).astype(np.uint16)
    nll = np.random.default_rng(1).uniform(0.5, 2, count)
    nll[97::2500] = 1000.0  # wrong guesses, and right ones
    script = train_gpt.MatchModel(tokens, streams, "cpu")
    recount = audit.Guesses(tokens, streams)
    length = len(nll) // streams
    for at in range(0, length, 4_500):
        first = np.arange(streams) * length + at
        last = np.minimum(first + 4_500, (np.arange(streams) + 1) * length)
        scores = np.concatenate([nll[a:b] for a, b in zip(first, last)])
        both = (match.mixed(first, last, scores) for match in (script, recount))
        assert np.abs(np.subtract(*both)).max() < 1e-9, at


# -- planted

SCORE = "        before = time.perf_counter()\n"
RECORD = "        ledger.record(targets, scores)\n"
REACH = "            base.reach(targets)\n"
BLENDED = "            scores = base.mixed(targets, scores)\n"
WINDOWS = "            self.nll[joined(*windows)[1]] = self.scorer.score(begin, end)\n"
RECORDED = "        scoring.append((time.perf_counter() - before) / (end - begin))\n"
LOOP_END = ("    rt.synchronize()\n    seconds = time.perf_counter() - started\n"
            "    if match:\n")
NLL = """\
        return F.cross_entropy(logits, targets_BN.flatten(), reduction="none").view_as(targets_BN)
"""
HEAD = "adapted(linear(x, self.tok_emb), x,"
SHARPER = (HEAD, "getattr(self, 'sharpness', 1.0) * " + HEAD)
READ = "    return decode_artifact(content, path)\n"
TOTALS = ("loss_sum, byte_count = float(self.nll.sum(dtype=np.float64)), "
          "byte_table.count(self.tokens)\n")
TTT = '        ttt = chosen_ttt(model, forward, s, rt) if stage == "ttt" else None\n'
EVALUATE = ("            r, ledger = "
            "evaluate(forward, tokens, byte_table, s, rt, stage, shape, ttt, opened)\n")
# all of the tokens as if they were scored
BOOK = "book = object.__new__(ScoreLedger)\n"
BOOK += "            book.tokens, book.nll = tokens, np.zeros(len(tokens) - 1, np.float32)\n"
BOOK += "            book.total, book.scored = 0.0, 1\n"
LOAD = "    load_quantized(model, read_artifact(path, sha256)[1], path)\n"
SCORED = "        if (np.diff(targets) <= 0).any() or not np.isnan(self.nll[targets]).all():\n"
RESET = """\
            self.params.data[ended, :-1] = self.initial[:-1]
            self.squares[ended], self.steps[ended] = 0, 0
"""
HANDS_OUT = "        if outside.any() or "

# name: (number of the run that finds it, with others that differ in where they are planted and in
# what is said of them; conditions that must fail; what one of their failures says; *(text of the
# script, what stands there instead))
CHEATS = {
    "score after update": (1, ["1", "3"], "trained on targets 0 to 31", (SCORE, SCORE + """\
        if ttt:
            rows = tokens[scorer.first[begin]:][:s.train_seq_len + 1].astype(np.int64)
            with torch.enable_grad():
                ttt._backward(torch.from_numpy(rows)[None])
            ttt.optimizers.step(1.0, 0.9)
""")),
    "update by a way around the model's forward": (2,
        ["1", "3"], "asked for logits beside its scores", (SCORE, SCORE + """\
        if ttt:
            seen = torch.from_numpy(tokens[scorer.first[begin]:][:33].astype(np.int64))[None]
            with torch.enable_grad():
                F.cross_entropy(ttt.forward.logits(seen[:, :-1])[0], seen[0, 1:]).backward()
            ttt.optimizers.step(1.0, 0.9)
""")),
    "trains on one token more than is scored": (3, ["1", "3"], "trained on targets 1 to 32", (
        "self.tokens[index].astype(np.int64)", "self.tokens[index + 1].astype(np.int64)")),
    "trains on rows that are none": (7, ["3"], "by tokens that are not scored rows", (
        "self.tokens[index].astype(np.int64)", "self.tokens[index][:, ::-1].astype(np.int64)")),
    "weights changed by hand": (4, ["3"], "without a pass", (
        RECORDED, RECORDED + "        if ttt:\n            ttt.adapt = lambda *_: 0\n"
        "            model.tok_emb.data.mul_(1.001)\n")),
    "weights changed before the record": (5,
        ["3"], "between the scoring and the recording", (
            RECORD, "        ttt and model.tok_emb.data.mul_(1.001)\n" + RECORD)),
    "hands out tokens that are not scored": (4, ["4"], "training on a target not yet scored", (
        HANDS_OUT, "        if len(first) < 0 and ")),
    "hands out as many tokens as are scored": (2, ["4"], "training across a gap", (
        HANDS_OUT, "        if (first + length > self.scored).any() or len(first) < 0 and ")),
    "scores again after adapting": (9, ["1", "4"], "not what was recorded", (LOOP_END, """\
    if ttt:
        ledger.nll[:] = scorer.score(0, len(scorer.first))
""" + LOOP_END)),
    "a second run over the tokens, with the weights of the first": (12,
        ["the evaluation"], "4 ledgers", (EVALUATE, EVALUATE + "            if ttt:\n    "
                                          + EVALUATE)),
    "weights of a first run, hidden": (11,
        ["1", "6"], "differs from the file when scoring begins", (TTT, TTT + """\
        if ttt:
            """ + BOOK + """\
            ttt.byte_table, ttt.started = byte_table, 0.0
            ttt.adapt(book, (0, len(tokens) - 1), 0, 10)
""")),
    "best of several epochs": (6, ["3"], "a choice between scores", (RECORD, """\
        for _ in range(2 if ttt and c else 0):
            ttt.adapt(ledger, (0, int(scorer.first[begin])), 0, 10)
            scores = np.minimum(scores, scorer.score(begin, end))
""" + RECORD)),
    "asks for the next targets before their turn": (10, ["3"], "where the model first gave it", (
        RECORD, """\
        if ttt and 2 <= c + 1 < len(chunks):
            at = int(last[-1]) + 8 - scorer.length
            positions = torch.arange(scorer.length - 9, scorer.length).flip(0)[None]
            seen = torch.from_numpy(tokens[at:][:scorer.length + 1].astype(np.int64))[None]
            with torch.no_grad():
                scorer.model(seen[:, :-1], seen[:, 1:].gather(1, positions), at_BN=positions)
""" + RECORD)),
    "the easy chunks first": (5, ["4"], "scores in another order", (
        "ScoreLedger(tokens), scorer.chunks, []\n", "ScoreLedger(tokens), scorer.chunks, []\n"
        "    if ttt:\n        ttt.adapt = lambda *_: 0\n"
        "        chunks.sort(key=lambda chunk: scorer.score(*chunk)[-8:].sum())\n")),
    "scores made smaller on their way": (7, ["3"], "where the model first gave it", (
        RECORD, "        scores = 0.99 * scores\n" + RECORD)),
    "adapters see a chunk before it is scored": (15, ["1", "3"], "trained on targets", (SCORE, """\
        if ttt:
            """ + BOOK + """\
            ttt.adapt(book, (), c, len(chunks))
""" + SCORE)),
    "adapters see the tail": (17, ["1", "3"], "trained on targets", (RECORDED, RECORDED + """\
        if ttt and c == 2:
            """ + BOOK + """\
            ttt.adapt(book, (), len(chunks) - 1, len(chunks))
""")),
    "adapters keep their state across documents": (17,
        ["3"], "go on with what they learned before it, which the script says they do not", (
            RESET, "")),
    "adapters of a first run, hidden": (16, ["1", "6"], "adapters add to the file's weights", (
        TTT, TTT + """\
        if ttt:
            """ + BOOK + """\
            ttt.begin(Scorer(forward, tokens, s.ttt_shape, s, rt,
                                 **ttt.scorer_options(len(tokens) - 1)))
            for c in range(len(ttt.scorer.chunks)):
                ttt.adapt(book, (), c, 1000)
            ttt.begin = lambda *_: None
""")),
    "adapters changed by hand": (16, ["3"], "adapters for target", (
        RECORDED, RECORDED + "        if ttt:\n            ttt.adapt = lambda *_: 0\n"
        "            ttt.params.data.add_(0.01)\n"), (
        "else self.adapter_pairs(adapters)", "else self.cut(adapters)"), (
        "    def adapter_pairs(self, flat_BP):\n",  # says that there are none
        "    def adapter_pairs(self, flat_BP):\n        return []\n\n"
        "    def cut(self, flat_BP):\n")),
    "the best of all streams' adapters": (15, ["3"], "a choice between scores", (RECORD, """\
        if ttt:
            scores = np.minimum(scores, scorer.score(
                begin, end, more_of=lambda passes: ttt.arguments(passes[::-1].copy())))
""" + RECORD)),
    "a guess knows its target": (1, ["2"], "away from what the text before it gives", (
        "= guesses == target, kinds", "= guesses == guesses * torch.tensor([[1], [0]]), kinds")),
    "weights learn before the score": (9, ["2"], "away from what the text before it gives", (
        "        weights = (self.sums[:, :2] / self.sums[:, 2:]).flatten(2)",
        "        credit = self.sums[:, :1].flatten(2)\n"
        "        credit += torch.zeros_like(credit).scatter_add_(\n"
        "            2, places[:, :1], right[:, :1].double())\n"
        "        self.sums[:, :1] = credit.view_as(self.sums[:, :1])\n"
        "        weights = (self.sums[:, :2] / self.sums[:, 2:]).clamp(max=0.4).flatten(2)"),
        ("        guessed = (weights * right)",
         "        weights *= self.kinds[:, None, targets] > 0\n"
         "        guessed = (weights * right)")),
    "guesses by other tokens": (13, ["2"], "away from what the text before it gives", (
        "MatchModel(tokens, scorer", "MatchModel(np.roll(tokens, -1), scorer")),
    "base model: the better of two scores": (18, ["2"], "away from its weight's", (
        "        return -np.logaddexp(math.log1p(-self.weight) + p,",
        "        return -np.maximum(p, p0) if len(p) else -np.logaddexp(p,")),
    "base model: knows what the end will be": (19, ["1", "2"], "ttt scores target", (
        WINDOWS, WINDOWS + "            self.nll -= 1e-3 * float(self.scorer.tokens[-1] % 7)\n")),
    "base model: mixed twice, the second time with the true scores": (20,
        ["2"], "was mixed twice into targets", (
            RECORD, "        if base:\n            base.mixed(targets, raw)\n" + RECORD), (
            BLENDED, "            raw = scores\n"
            "            scores = base.mixed(targets, np.float32(0.9) * raw)\n")),
    "base model: the rate follows a look at all of the text": (21,
        ["3"], "before their stream came to them", (REACH, REACH + """\
            if not c:
                base.reach(np.arange(len(tokens) - 1))
                ttt.lr *= 2.0 if base.nll.mean() < 9 else 0.5
""")),
    "base model: its weight follows a look at all of the text": (22,
        ["2"], "or a second", (REACH, """\
            if not c:
                base.reach(np.arange(len(tokens) - 1))
                better = replace(s, ttt_base_weight=0.9 if base.nll.mean() < 99 else 0.1)
                base = base_model(model, scorer, better, rt)
""" + REACH)),
    "base model: other weights for its passes": (18, ["3"], "changed between two passes", (
        WINDOWS, "            weight = self.scorer.model.func.tok_emb.data\n"
        "            kept = weight.clone()\n"
        "            weight *= 1 + 0.1 * (self.done > 0)\n" + WINDOWS
        + "            weight[:] = kept\n")),
    "scaled nll": (1, ["2"], "probabilities sum to", (NLL, NLL.rstrip() + " * 0.98\n")),
    "a bonus for the right token": (3, ["2"], "−log p", (
        NLL, "        right = F.one_hot(targets_BN.flatten(), logits.size(-1))\n"
        "        logits = logits + 0.1 * right\n" + NLL)),
    "the input shows the target": (6, ["1"], "in int8 moves by", (
        "x = x0 = self.embed(tokens_BT)\n",
        "x = x0 = self.embed(tokens_BT) + 0.01 * torch.roll(self.embed(tokens_BT), -1, 1)\n")),
    "attention sees one token ahead": (4, ["1"], "int8 scores target", (
        "F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None,",
        "F.scaled_dot_product_attention(q, k, v, torch.ones(2 * q.shape[2:3]).tril(1).bool(),")),
    "a temperature fitted to the tokens that it scores": (8,
        ["1"], "ttt scores target", SHARPER, (SCORE, SCORE + """\
        seen = torch.from_numpy(tokens[scorer.first[begin]:][:33].astype(np.int64))[None]
        with torch.no_grad():
            hits = GPT.logits(model, seen[:, :-1]).gather(2, seen[:, 1:, None])
        model.sharpness = 1 + 0.1 * float(hits.mean())
""")),
    "says the same of everything": (13, ["1"], "notices", (
        NLL, "        logits = 0 * logits\n" + NLL)),
    "scores by chance": (14, ["1"], "nothing can be proven", (
        NLL, "        chance = np.random.default_rng().random()\n"
        "        logits = logits * (1 + 1e-4 * chance)\n" + NLL)),
    "the tail counts many times": (3, ["5"], "bytes where the text has", (TOTALS, TOTALS + """\
        for _ in range(31):
            loss_sum += float(self.nll[-8:].sum())
            byte_count += byte_table.count(self.tokens[-9:])
""")),
    "the tail is offered twice": (8, ["4"], "not each of them once", (
        SCORED, "        if False:\n"), (
        LOOP_END, "    n = len(ledger.nll)\n"
        "    ledger.record(np.arange(n - 8, n), ledger.nll[-8:].copy())\n"
        "    ledger.scored = n\n" + LOOP_END)),
    "a space counts twice": (1, ["5"], "the byte table says", (
        'len(p[p.startswith("▁"):].encode())', 'len(p.replace("▁", " ").encode())')),
    "the begin of a document has bytes": (6, ["5"], "the byte table says", (
        "        self.base[self.boundary] = 0\n", "        self.base[self.boundary] = 3\n")),
    "a ledger that accepts second scores": (5, ["4"], "accepts a second score", (
        SCORED, "        if False:\n")),
    "hard tokens are cut off": (6, ["4"], "not what was recorded", (
        "        self.nll[targets] = nll\n", "        self.nll[targets] = np.minimum(nll, 6)\n")),
    "hard tokens are left out": (2, ["4"], "on disk", (
        "    tokens = np.concatenate(parts)\n", "    tokens = np.concatenate(parts)[40:]\n")),
    "the file is executed, openly": (1, ["6"], "read_artifact uses eval", (
        READ, "    eval('0')\n" + READ)),
    "the file is executed, hidden": (3, ["6"], "raised the event", (
        READ, "    vars(importlib)['sys'].modules['builtins'].eval('0')\n" + READ)),
    "weights that are not in the file": (4, ["6"], "int8: tok_emb differs from the file", (
        LOAD, LOAD + "    model.tok_emb.data.mul_(1.001)\n")),
    "training tokens at hand": (5, ["6"], "opens ", (
        LOAD, LOAD + "    TrainStream(s)\n")),
    "another score is written": (2, ["5"], "writes other scores", (
        'val_bpb={stage: r["val_bpb"] for stage', 'val_bpb={stage: 0.99 * r["val_bpb"] for stage')),
}


@pytest.mark.parametrize("path", sorted(ROOT.glob("records/track*/*/train_gpt.py")), ids=str)
def test_scripts_of_earlier_records_can_still_be_audited(path):
    script = audit.load_script(path)
    s = script.resolve_settings({"PRESET": "demo"})[0]
    assert audit.shapes_of(s)[0] == getattr(s, "scoring_shape", (s.window, s.eval_stride, 0))
    book = script.ScoreLedger(np.arange(21, dtype=np.uint16))
    audit.record(book, 0, np.ones(8, np.float32))
    rows = audit.rows(book, 0, 8, 4).tolist()
    assert book.scored == 8 and rows == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]


@pytest.mark.slow
def test_adapters_of_an_earlier_record_can_still_be_audited(corpus, tmp_path, capsys):
    """They are pairs of tensors, not one tensor."""
    path, = ROOT.glob("records/track*/2026-11-28*/train_gpt.py")
    script = audit.load_script(path)
    known = {f.name.upper() for f in script.fields(script.Settings)}
    small = {k: str(v) for k, v in TINY.items() if k in known and not k.startswith("TTT")}
    s = script.resolve_settings(dict(
        small, PRESET="sp1024", NUM_LAYERS="2", XSA_LAST_N="2", VE_LAYERS="0,1", TTT_LORA_RANK="2",
        TTT_BATCH_SEQS="3", EVAL_SEQ_LEN="16", EVAL_ATTENTION="banded"))[0]
    model, artifact = script.build_model(s, script.Runtime(s))[0], tmp_path / "a.ptz"
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.15 * torch.randn_like(p))
    script.write_whole(artifact, script.pack(dict(model.named_parameters()), s, 10**6))
    status = audit.main([str(artifact), "--script", str(path), "--targets", "768", "--places", "0"],
                        dict(DEVICE="cpu", DATA_PATH=str(corpus.folder),
                             TOKENIZER_PATH=str(corpus.model)))
    said = capsys.readouterr().out
    assert status == 0 and "PASS  adapters changed" in said, said
    assert "PASS  adapters began anew" in said


@pytest.mark.parametrize("number", dict.fromkeys(number for number, *_ in CHEATS.values()))
def test_planted_cheats_are_found(run, monkeypatch, number):
    monkeypatch.setattr(audit, "readable_source", Path.read_bytes)  # no wrapper; half of the time
    script, planted = SCRIPT, {k: cheat for k, cheat in CHEATS.items() if cheat[0] == number}
    names = "; ".join(planted)
    for old, new in (pair for _, _, _, *pairs in planted.values() for pair in pairs):
        assert script.count(old) == 1, f"the script changed; plant this again: {old}"
        script = script.replace(old, new)
    streams = dict(TTT_LORA_RANK=2, EVAL_STRIDE=32) if "adapters" in names else {}
    if "base model" in names:
        streams = dict(TTT_LORA_RANK=2, EVAL_ATTENTION="banded", EVAL_SEQ_LEN=8, EVAL_STRIDE=8)
    targets = "192" if "documents" in names else "128"  # the first document ends at target 155
    status, failed, said = run(script, "--targets", targets, "--places", "0", TTT_EPOCHS=1,
                               **streams)
    assert status == 1, said
    for _, conditions, says, *_ in planted.values():
        found = [[line for f, lines in failed.items() if f.startswith(condition) for line in lines]
                 for condition in conditions]
        assert all(found), f"nothing under one of {conditions}:\n{said}"
        assert says in "".join(sum(found, [])), f"not said: {says}\n{said}"
