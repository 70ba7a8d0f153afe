"""Prove on your own data that a score is legal: one line for each check, by the evaluator's rules.

    PRESET=demo python records/audit.py final_model.ptz           with the project's script
    PRESET=demo python records/audit.py final_model.ptz --script F.py     with the one that made it
    python records/audit.py final_model.ptz --data data/datasets/demo \\
        --tokenizer data/tokenizers/demo_1024_bpe.model

The script is imported, which runs it: read a stranger's before. Its own run_evaluations is then
watched from outside (what the model is asked and answers, when weights or adapters change, what the
ledger gets), and run again and again on tokens changed behind some place: nothing before that place
may notice. "Behind" is by place and by time: where stretches of the text are scored side by side,
only tokens that are scored no earlier than the place are changed. Settings are the artifact's;
environment variables change them as with EVAL_ONLY. Chunks of test-time training are shortened so
that four or more fit the slice, the clock is off and nothing is compiled: neither may decide a
proof. One process; a GPU where there is one.

Exit status: 0 nothing failed, 1 a check failed, 2 unusable input.
"""
from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import hashlib
import importlib.machinery
import importlib.util
import inspect
import io
import json
import math
import os
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from pathlib import Path
from unittest import mock

import numpy as np
import sentencepiece
import torch
from torch.utils._pytree import tree_map
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
from artifact import readable_source  # noqa: E402
from shards import DataError, exit_code_of, user_path  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CAP_BYTES = 16_000_000
LOGITS = ("logits", "raw_logits")  # methods of the model that answer for a whole vocabulary
NEEDED = ("Settings UserError Runtime ByteTable ScoreLedger load_validation settings_of_artifact "
          "build_model run_evaluations read_artifact find_upward main").split()


# -- the script and its settings -------------------------------------------------------------------

def load_script(path):
    """The script at `path` as a module, readable or packed. Raises DataError."""
    loader = importlib.machinery.SourceFileLoader("audited_script", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    sys.modules[loader.name] = module  # where dataclasses look for their module
    keep, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # nothing beside a submission
    try:
        loader.exec_module(module)
    except Exception as problem:
        raise DataError(f"--script {path}: cannot be imported "
                       f"({type(problem).__name__}: {problem})") from problem
    finally:
        sys.dont_write_bytecode = keep
    missing = [name for name in NEEDED if not hasattr(module, name)]
    if missing:
        raise DataError(f"--script {path}: has no {', '.join(missing)}; "
                       "only scripts built like train_gpt.py can be audited")
    return module


def shapes_of(s):
    """(tokens read, targets scored, keys of each layer) of a pass of scoring and of one of
    adapting. The first scripts have sliding windows alone."""
    context = s.eval_seq_len or s.train_seq_len
    scoring = getattr(s, "scoring_shape", (context, s.eval_stride, 0))
    return scoring, getattr(s, "ttt_shape", scoring)


def settings_for(script, path, environ, targets):
    """(settings of the audited evaluation, environment for them, chunk of TTT in the artifact).
    Raises the script's UserError and DataError."""
    known = {f.name.upper() for f in fields(script.Settings)}
    environ = {**environ, **dict.fromkeys({"COMPILE", "EVAL_WALLCLOCK_SECONDS"} & known, "0")}
    s, explicit = script.settings_of_artifact(path, environ)
    scoring, adapting = shapes_of(s)
    row = max(s.train_seq_len, s.eval_seq_len, scoring[1])
    chunk = s.ttt_chunk_tokens  # 0: by the length of the validation set
    if targets and targets < 4 * row:
        raise DataError(f"--targets {targets}: too few, four chunks of a row need {4 * row}")
    adapters = s.ttt_enabled and getattr(s, "ttt_lora_rank", 0)
    if not targets:  # with adapters two streams, each of 16 rows
        targets = 32 * max(row, adapting[0]) if adapters else 16 * row
    environ["VAL_LIMIT_TOKENS"] = str(targets)
    targets = len(script.load_validation(replace(s, val_limit_tokens=targets))) - 1
    if not adapters and "TTT_CHUNK_TOKENS" not in explicit:  # it means weights adapted by chunks
        environ["TTT_CHUNK_TOKENS"] = str(min(chunk or targets, max(row, targets // 4)))
    return script.settings_of_artifact(path, environ)[0], environ, chunk


@contextlib.contextmanager
def quiet():
    """What the script prints is not the audit's to say."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        yield said


# -- watching one run ------------------------------------------------------------------------------

class Evaluation:
    """What was seen of one evaluation, from the making of its ledger on.

    A turn is what is scored and then recorded, in one or more records, before the model is asked
    for other scores.
    """

    def __init__(self, ledger, targets):
        self.ledger = ledger
        self.given = np.full(targets, np.nan, np.float32)     # the model's first score of each
        self.recorded = np.full(targets, np.nan, np.float32)  # what the ledger was told
        self.unmixed = self.recorded.copy()  # the same before anything was mixed in
        self.mixed = self.recorded.copy()    # and after
        self.weight = 0.0         # of the base model (without adapters), where it is mixed in
        self.base = {}            # target → scores by the base model; several where rows read alike
        self.of_one_row = set()   # targets with such a score of a row that occurs once in the text
        self.windows = {}         # row asked of the base model in this turn → its first new target
        self.blended = np.full(targets, np.nan)  # after mixing with the base model
        self.turn_of, self.turn = np.full(targets, -1), -1    # of what is recorded; that runs
        self.records = []         # (first target, how many) of each record
        self.fresh = []           # targets at which a row began to be new
        self.rows = {}            # (length, first place, positions asked) → Rows of this turn
        self.distributions = {}   # target → log-probabilities [V], float64, when it was scored
        self.pending = {}         # the same in the turn that runs, before a row is recorded
        self.of_base = {}         # the same of the base model, where it is mixed in
        self.worst = 0.0          # nats between a score and −log p of its distribution
        self.guesses = None       # Guesses, where the script mixes them in
        self.mixing_error = 0.0   # nats between its mixing and a recount
        self.adapters = {0}       # fingerprints of adapters seen, 0: they add nothing
        self.initial, self.begun = set(), 0  # learned() at first; rows trained on after a BOS
        self.updates, self.training_rows = {}, 0  # turn → what changed before it
        self.faults = {}          # check → what was seen first

    @property
    def scored(self):
        return int((self.turn_of >= 0).sum())

    def is_scored(self, targets):
        """Are all of these targets recorded?"""
        return bool((self.turn_of[targets] >= 0).all())

    def fault(self, check, sentence):
        self.faults.setdefault(check, sentence)

    def with_base(self, log_p, log_p0):
        """log((1 − w)·p + w·p₀), p₀ of the base model; log p without weight or p₀."""
        if not self.weight or log_p0 is None:
            return log_p
        return torch.logaddexp(math.log1p(-self.weight) + log_p, math.log(self.weight) + log_p0)

    def close(self):
        """The end of a turn: compare what was recorded with what the model gave. Where a whole row
        was asked, its targets before the last recorded one are context of others. So are those
        after it in a row at the very beginning, and a row at the very end, for a pass beyond it.
        What else the model gave stays the first score of its target."""
        for (length, _, positions), rows in self.rows.items():
            scores = list(rows.scores)
            for place in rows.free:
                at = place + np.array(positions)
                recorded, wanted = self.turn_of[at], np.isnan(self.given[at])
                now, score = np.flatnonzero(recorded == self.turn), scores[0]
                if len(rows.free) > 1:  # which of the places was meant shows when it is recorded
                    new = now[wanted[now]]
                    score = next((x for x in scores
                                  if np.array_equal(x[new], self.unmixed[at[new]])), score)
                    scores = [x for x in scores if x is not score] or scores
                self.fresh.extend(at[now[wanted[now]][:1]])
                if positions != tuple(range(length)):
                    pass  # asked for these alone: none of them is context
                elif len(now):
                    wanted[: now[-1]] &= recorded[: now[-1]] >= 0
                    if place == 0:  # the first rows cannot end where their new targets do
                        wanted[now[-1] + 1:] = False
                elif place + length == len(self.given):
                    continue
                self.given[at[wanted]] = score[wanted]
        self.distributions.update({t: self.with_base(log_p, self.of_base.get(t))
                                   for t, log_p in self.pending.items()
                                   if self.turn_of[t] == self.turn})
        ended = (self.turn_of == self.turn) & ~np.isnan(self.recorded)
        for what, told, first in (("the model first gave it", self.unmixed, self.given),
                                  ("mixing gave it", self.recorded, self.mixed)):
            wrong = np.flatnonzero(ended & (told != first))
            if len(wrong):
                t = wrong[0]
                self.fault("given", f"target {t} was recorded with {told[t]:.6f} where {what} "
                           f"{first[t]:.6f} ({len(wrong)} such)")
        early = [t for t in self.windows.values() if self.turn_of[t] != self.turn]
        if early:
            self.fault("update", f"the base model scored targets from {early[0]} on before their "
                       "stream came to them")
        self.rows, self.pending, self.windows = {}, {}, {}


class Guesses:
    """The script's match model again, in plain words: for each length of a run two guesses for each
    target from the text before it, and weights that a stream learns from itself and the streams
    before it. They are mixed in one after the other, those of the longest run first."""
    RUNS = (16, 12, 8, 6, 4, 3, 2, 1)

    def __init__(self, tokens, streams):
        tokens, followed, self.found, self.learned = tokens.tolist(), {}, [], {}
        self.streams, self.done = streams, 0
        for i, following in enumerate(tokens[1:]):
            guesses = []
            for n in (n for n in self.RUNS if n <= i + 1):
                voters = followed.setdefault((n, *tokens[i + 1 - n: i + 1]), [])
                last = voters[:-5:-1]  # what followed the last four times, the newest first
                ranked = sorted(dict.fromkeys(last), key=last.count, reverse=True)[:2]
                if ranked:
                    guesses.append(((n, *map(last.count, ranked)),
                                    [guess == following for guess in ranked]))
                voters.append(following)
            self.found.append(guesses)

    def mixed(self, first, last, nll):
        """The nll of these ranges of targets after mixing: one of each stream; or one range in all,
        in rounds of 512 targets or, if that is more, a 64th of those so far."""
        ranges, scores = list(zip(first.tolist(), last.tolist())), iter(nll.tolist())
        if self.streams > 1:
            return np.array(self.round(ranges, scores))
        (at, end), out = (ranges[0][0], ranges[-1][1]), []
        while at < end:
            until = min(at + max(512, self.done // 64), end)
            out += self.round([(at, until)], scores)
            at, self.done = until, self.done + until - at
        return np.array(out)

    def round(self, ranges, scores):
        out, learned = [], []
        for stream, (a, b) in enumerate(ranges):
            for guesses in self.found[a:b]:
                score = next(scores)
                for kind, right in guesses:
                    nothing = [0.0] * (1 + len(right))
                    past = [self.learned.get((of, kind), nothing) for of in range(stream + 1)]
                    count, *credits = map(sum, zip(*past))
                    weights = [(0.05 + credit) / (1 + count) for credit in credits]
                    said = sum(weight for weight, hit in zip(weights, right) if hit)
                    rest = math.log1p(-sum(weights)) - score
                    score = -float(np.logaddexp(rest, math.log(said) if said else -math.inf))
                    learned.append(((stream, kind), [1.0] + [
                        weight * math.exp(score) if hit else 0.0
                        for weight, hit in zip(weights, right)]))
                out.append(score)
        for key, new in learned:
            so_far = self.learned.get(key, [0.0] * len(new))
            self.learned[key] = [x + y for x, y in zip(so_far, new)]
        return out


@dataclass
class Rows:
    """Rows of a turn that read the same."""
    free: list  # places where their targets are not all recorded
    scores: list = field(default_factory=list)
    asked: int = 0


class Witness:
    """Keeps what it sees of the model and the ledger in one run of the script's evaluation."""

    def __init__(self, model, tokens, places, shipped, bos):
        self.model, self.tokens, self.places = model, tokens, set(places)
        self.shipped, self.bos = shipped, bos
        self.evaluations, self.index = [], {}
        self.original, model.forward = model.forward, self.forward
        self.plain_logits, self.inside = model.logits, False
        for name in LOGITS:
            if hasattr(model, name):
                setattr(model, name, functools.partial(self.logits, getattr(model, name)))
        self.weights, self.trained, self.foreign, self.scoring = None, False, False, False
        self.justified, self.reason, self.factors = False, "", {}

    @property
    def now(self):
        return self.evaluations[-1]

    def faults(self, check):
        """What each evaluation did wrong first in a check."""
        return [f"{name}: {e.faults[check]}" for name, e in zip(self.names, self.evaluations)
                if check in e.faults]

    # -- rows: which targets they hold is found by their content, whatever the script says

    def starts_of(self, rows, targets, positions):
        """For each row [T] the places where the validation tokens read the same, ascending, and
        have these targets [n] after these positions [n]."""
        width = rows.shape[1]
        if width not in self.index:
            index = self.index[width] = {}
            for at in range(len(self.tokens) - width):
                index.setdefault(hash(self.tokens[at: at + width].tobytes()), []).append(at)
        return [[at for at in self.index[width].get(hash(row.tobytes()), ())
                 if np.array_equal(self.tokens[at + asked + 1], following)]
                for row, following, asked in zip(rows, targets, positions)]

    # -- the model

    def forward(self, x, y, *args, **kwargs):
        """The model's own forward, watched: nll [B, N] of targets y after x."""
        self.inside = True
        try:
            plain_or_watched = self.watched if self.evaluations else self.original
            return plain_or_watched(x, y, *args, **kwargs)
        finally:
            self.inside = False

    def logits(self, plain, *args, **kwargs):
        """The model's own logits, softcapped or not: an evaluation asks for them by forward."""
        if not self.inside and self.evaluations:
            self.now.fault("update", "the model is asked for logits beside its scores when "
                           f"{self.now.scored} are recorded")
        return plain(*args, **kwargs)

    def watched(self, x, y, *args, **kwargs):
        call = inspect.signature(self.original).bind(x, y, *args, **kwargs)
        call.apply_defaults()
        positions = call.arguments.get("at_BN")  # of a row that are asked; None: all
        positions = (np.arange(x.size(1))[None].repeat(len(x), 0) if positions is None
                     else positions.cpu().numpy())
        rows, targets = (z.cpu().numpy().astype(self.tokens.dtype) for z in (x, y))
        starts = self.starts_of(rows, targets, positions)
        if torch.is_grad_enabled():
            self.training_pass(starts, x.size(1))
            if (adapters := call.arguments.get("adapters")) is not None:
                self.documents_end(starts, positions, self.learned(adapters, len(y)))
            return self.original(x, y, *args, **kwargs)
        self.turn_may_begin()
        if names := self.changed():
            self.now.fault("update", f"{names[0]} changed between two passes of a turn, when "
                           f"{self.now.scored} were scored")
        nll = self.original(x, y, *args, **kwargs)
        self.scoring_pass(starts, positions, x, y, nll, call)
        return nll

    def training_pass(self, starts, length):
        """A row that gradients come from must hold scored tokens alone, its first one included."""
        now = self.now
        self.trained, now.training_rows = True, now.training_rows + len(starts)
        for at in starts:
            if not at:
                self.foreign = True  # as in a warm-up on random tokens: fine unless weights change
            elif not any(now.is_scored(slice(a, a + length)) for a in at):
                now.fault("update", f"trained on targets {at[0]} to {at[0] + length - 1}, "
                          f"not all of which are among the {now.scored} scored")
            elif not any(now.is_scored(slice(max(a - 1, 0), a + length - 1)) for a in at):
                now.fault("update", f"trained after target {at[0] - 1}, "
                          "which is an input there and not yet scored")
        if self.scoring:
            now.fault("update", "trained between the scoring and the recording of targets, "
                      f"when {now.scored} were scored")

    def documents_end(self, starts, positions, learned):
        """Adapters that train on a row where a document begins among the targets of this turn must
        be the first ones again. Where the text repeats a row, it must begin at all places."""
        now = self.now
        for b, at in enumerate(starts):
            new = [t[now.turn_of[t] == now.turn] for t in (a + positions[b] for a in at)]
            if at and all((self.tokens[t + 1] == self.bos).any() for t in new):
                now.begun += 1
                if learned[b] not in now.initial:
                    now.fault("documents", f"a document begins among targets {new[0][0]} to "
                              f"{new[0][-1]}, and adapters go on with what they learned before "
                              "it, which the script says they do not (legal in itself)")

    def scoring_pass(self, starts, positions, x, y, nll, call):
        """Keep scores of rows with targets not yet recorded, at chosen places distributions."""
        now, length, chosen, asked = self.now, x.size(1), {}, {}
        values = nll.detach().float().cpu().numpy()
        given = call.arguments.get("adapters")
        if now.weight and given is None:
            return self.base_pass(starts, positions, values, x, y, nll, call)
        adapters = self.fingerprints(given, len(y))
        if not now.records:
            now.initial.update(self.learned(given, len(y)))
        if isinstance(given, torch.Tensor) and not now.records:
            # Adapters that change no score add nothing: the scores are the file's.
            if self.original(**{**call.arguments, "adapters": None}).equal(nll):
                now.adapters.update(adapters)
        for b, at in enumerate(starts):
            free = [a for a in at if not now.is_scored(a + positions[b])]
            if not free:
                continue
            key = length, at[0], tuple(positions[b].tolist())
            rows = now.rows.setdefault(key, Rows(free))
            rows.scores.append(values[b])
            asked.setdefault(key, []).append(adapters[b])
            self.adapters_may_have_changed(adapters[b], free[0])
            chosen.update({a + p: (b, i) for a in free for i, p in enumerate(key[2])
                           if a + p in self.places and a + p not in now.pending})
        # a pass may repeat its own rows to fill a batch, with the adapters they have
        for key, each in asked.items():
            rows = now.rows[key]
            rows.asked += max(len(set(each)), min(len(each), len(rows.free)))
            if rows.asked > len(rows.free):
                now.fault("given", f"targets from {key[1]} on were scored twice before a record: "
                          "a choice between scores")
        if chosen:
            self.distributions(chosen, x, y, nll, call)

    def base_pass(self, starts, positions, values, x, y, nll, call):
        """Keep the scores of targets by the base model, and distributions at chosen places. Each
        row must be due in this turn (see Evaluation.close); a batch may repeat rows of the turn.
        Where the text repeats more than a row, it is not known which of the places is meant."""
        now, chosen = self.now, {}
        for b, at in enumerate(starts):
            asked = [(a + positions[b]).tolist() for a in at]
            if len(at) == 1:
                key = x.size(1), *asked[0]
                new = [t for t in asked[0] if t not in now.of_one_row]
                if new:
                    now.windows[key] = new[0]
                elif key not in now.windows:
                    now.fault("given", f"the base model was asked again for targets from "
                              f"{asked[0][0]} on")
            for targets in asked:
                for i, t in enumerate(targets):
                    if len(at) > 1 or t not in now.of_one_row:
                        now.base.setdefault(t, []).append(float(values[b][i]))
                    if t in self.places and t not in now.of_base:
                        chosen[t] = b, i
            if len(at) == 1:
                now.of_one_row.update(asked[0])
        if chosen:
            self.distributions(chosen, x, y, nll, call, now.of_base)

    def distributions(self, chosen, x, y, nll, call, into=None):
        """Log-probabilities at chosen {target: (row, index of its score)}, from logits that see no
        target; and how far the scores are from −log p."""
        names = inspect.signature(self.plain_logits).parameters
        options = {k: v for k, v in list(call.arguments.items())[2:] if k in names}
        logits_BNV = self.plain_logits(x, **options)
        for target, (b, p) in chosen.items():
            log_p_NV = logits_BNV[b].double().log_softmax(-1)
            error = (nll[b].double() + log_p_NV.gather(1, y[b].long()[:, None])[:, 0]).abs().max()
            self.now.worst = max(self.now.worst, float(error))
            (self.now.pending if into is None else into)[target] = log_p_NV[p].cpu()
        self.last_call = call.arguments, b

    # -- weights and adapters

    def snapshot(self):
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def changed(self):
        """Names of parameters that are not as they were."""
        own, old = dict(self.model.named_parameters()), self.weights
        return [n for n in own.keys() | old.keys() if n not in own or n not in old
                or not own[n].equal(old[n])]

    def fingerprints(self, adapters, rows):
        """For each row a number that tells its adapters ([rows, P]; in the script of 2026-11-28
        pairs of tensors [rows, ...]) from others; 0: one of each pair is zero, so that they add
        nothing."""
        if isinstance(adapters, torch.Tensor):
            adapters = [[adapters]]
        device = next(self.model.parameters()).device
        total, adds = (torch.zeros(rows, dtype=kind, device=device)
                       for kind in (torch.int64, torch.bool))
        for site, pair in enumerate(adapters or ()):
            pair = [x.detach().float().expand(rows, *x.shape[1:]).reshape(rows, -1) for x in pair]
            adds |= pair[0].any(1) & pair[-1].any(1)
            for which, x in enumerate(pair):
                key = site, which, x.size(1)
                if key not in self.factors:  # sums of integers repeat, in whatever order
                    self.factors[key] = torch.randint(-2**62, 2**62, key[2:]).to(device)
                total += (x.view(torch.int32) * self.factors[key]).sum(1)
        return torch.where(adds, total, 0).tolist()

    def learned(self, adapters, rows):
        """Fingerprints without the last number, the sharpness, which no document resets."""
        flat = isinstance(adapters, torch.Tensor)
        return self.fingerprints(adapters[:, :-1] if flat else adapters, rows)

    def turn_may_begin(self):
        """Before the first scoring pass of a turn: have weights changed, and may they?"""
        if self.scoring:
            return
        now = self.now
        now.close()
        self.scoring, now.turn = True, now.turn + 1
        self.justified = self.trained and not self.foreign
        self.reason = ("by tokens that are not scored rows" if self.foreign else
                       "without a pass of the model over scored rows")
        if not now.records:
            wrong = [n for n, w in self.shipped.items()
                     if not torch.equal(attrgetter(n)(self.model).detach().cpu().float(), w)]
            if wrong:
                now.fault("ships", f"{wrong[0]} differs from the file when scoring begins "
                          f"({len(wrong)} such)")
            self.weights = self.snapshot()
        elif names := self.changed():
            now.updates[now.turn] = "weights"
            if not self.justified:
                now.fault("update", f"{names[0]} changed when {now.scored} targets were scored, "
                          f"{self.reason}")
            self.weights = self.snapshot()
        self.trained = self.foreign = False

    def adapters_may_have_changed(self, fingerprint, target):
        """Before a row is scored: are its adapters known, or is there a reason for new ones?"""
        now = self.now
        if fingerprint in now.adapters:
            return
        now.adapters.add(fingerprint)
        if not now.records:
            now.fault("ships", "adapters add to the file's weights when scoring begins, "
                      f"at target {target}")
            return
        now.updates.setdefault(now.turn, "adapters")
        if not self.justified:
            now.fault("update", f"adapters for target {target} changed when {now.scored} were "
                      f"scored, {self.reason}")

    # -- the ledger

    def begin(self, ledger, tokens):
        if self.evaluations:
            self.now.close()
        self.evaluations.append(Evaluation(ledger, len(tokens) - 1))
        self.scoring = self.trained = self.foreign = False

    def blend(self, targets, nll, blended):
        """The script mixed the base model into the scores of these targets."""
        now = self.now
        if not np.isnan(now.blended[targets]).all():
            now.fault("mixed", f"the base model was mixed twice into targets from {targets.min()} "
                      "on")
        now.unmixed[targets], now.blended[targets] = nll, blended
        error = np.array([min(abs(float(now.with_base(*torch.tensor([-p, -p0]).double())) + told)
                              for p0 in now.base.get(t, [math.inf]))
                          for t, p, told in zip(targets.tolist(), nll.tolist(), blended.tolist())])
        now.mixing_error = max(now.mixing_error, error.max())
        if not error.max() < 1e-5:
            t = targets[error.argmax()]
            now.fault("mixed", f"target {t} has {now.blended[t]:.6f} after mixing with its score "
                      f"by the base model, {error.max():.2g} away from its weight's")

    def mix(self, first, last, nll, mixed):
        """The script mixed guesses into the scores of these windows, one of each stream."""
        now, windows = self.now, list(zip(first.tolist(), last.tolist()))
        targets = np.concatenate([np.arange(a, b) for a, b in windows])
        if (np.diff(targets) <= 0).any() or not np.isnan(now.mixed[targets]).all():
            now.fault("mixed", f"guesses for targets from {targets.min()} on were mixed in twice, "
                      "or not in the order of the text")
        if not now.weight:
            now.unmixed[targets] = nll
        elif not np.array_equal(now.blended[targets], nll):
            now.fault("mixed", f"guesses for targets from {targets.min()} on are not mixed into "
                      "what mixing with the base model gave")
        now.mixed[targets] = mixed
        error = np.abs(now.guesses.mixed(first, last, nll) - mixed)
        now.mixing_error = max(now.mixing_error, error.max())
        if not error.max() < 1e-5:
            t = targets[error.argmax()]
            now.fault("mixed", f"target {t} has {now.mixed[t]:.6f} after mixing, {error.max():.2g} "
                      "away from what the text before it gives")

    def record(self, first, nll):
        """The ledger was told these scores."""
        now, nll = self.now, np.asarray(nll, np.float32)
        place = slice(max(first, 0), first + len(nll))
        if first < 0 or first + len(nll) > len(now.recorded) or (now.turn_of[place] >= 0).any():
            now.fault("order", f"{len(nll)} scores from target {first} on came when {now.scored} "
                      f"of {len(now.recorded)} were recorded, not each of them once")
            nll = nll[place.start - first:][: len(now.recorded[place])]
        if self.scoring and (names := self.changed()):
            now.fault("update", f"{names[0]} changed between the scoring and the recording of "
                      f"targets from {first} on")
            self.weights = self.snapshot()
        now.recorded[place], now.turn_of[place] = nll, now.turn
        if not now.weight and not now.guesses:
            now.unmixed[place] = now.mixed[place] = nll
        elif not now.guesses:
            now.mixed[place] = now.blended[place]
        now.records.append((first, len(nll)))
        self.scoring = False


class Files:
    """What this process opens, executes or connects to in a `with`, by Python's audit events."""
    EXECUTES = {"exec", "compile", "import", "marshal.loads", "pickle.find_class", "os.system",
                "subprocess.Popen", "ctypes.dlopen"}
    # Python, its packages (which load parts of themselves late), the system
    OWN = tuple(map(os.path.realpath, {*sysconfig.get_paths().values(), sys.prefix, "/proc", "/sys",
                                       "/dev", Path(torch.__file__).parents[1]}))

    def __init__(self):
        self.active, self.opened, self.executed = False, [], []
        sys.addaudithook(self.hook)

    def hook(self, event, args):
        if not self.active:
            return
        if event == "open" and isinstance(args[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(args[0]))
            if not path.startswith(self.OWN):
                self.opened.append(path)
        elif event.startswith(("socket.connect", "socket.getaddrinfo", "subprocess.")):
            self.opened.append(event)
        if event in self.EXECUTES:
            self.executed.append(event)

    def __enter__(self):
        self.active, self.opened, self.executed = True, [], []

    def __exit__(self, *_):
        self.active = False


@functools.cache
def files():
    """The one Files of this process: the interpreter takes no hook back."""
    return Files()


class Audit:
    """One artifact, one script, one slice of tokens."""

    def __init__(self, script, path, s, environ):
        self.script, self.path, self.s, self.environ = script, path, s, environ
        self.rt, self.byte_table = script.Runtime(s), script.ByteTable(s)
        self.tokens = np.asarray(script.load_validation(s))
        self.shipped = {name: t.weights().float()
                        for name, t in script.read_artifact(path)[1].items()}
        self.files, self.bos = files(), getattr(script, "BOS", 1)

    def run(self, tokens, places=()):
        """The script's whole evaluation of `tokens`, watched. Returns (witness, its results)."""
        script = self.script
        with quiet():
            model, ledger_class = script.build_model(self.s, self.rt)[0], script.ScoreLedger
            match_class = getattr(script, "MatchModel", object)
            base_class = getattr(script, "BaseModel", object)
            witness = Witness(model, tokens, places, self.shipped, self.bos)

            class Watched(ledger_class):
                def __init__(self, tokens):
                    witness.begin(self, tokens)
                    super().__init__(tokens)

                def record(self, targets, nll):
                    super().record(targets, nll)
                    if np.ndim(targets) == 0:  # as scripts until November 2026 call it
                        targets = targets + np.arange(len(nll))
                    breaks = np.flatnonzero(np.diff(targets) != 1) + 1
                    for run, part in zip(np.split(targets, breaks), np.split(nll, breaks)):
                        if len(run):
                            witness.record(int(run[0]), part)

            class WatchedMatches(match_class):
                def __init__(self, tokens, streams, *more):
                    witness.now.guesses = Guesses(witness.tokens, streams)
                    super().__init__(tokens, streams, *more)

                def mixed(self, first, last, nll):
                    mixed = super().mixed(first, last, nll)
                    witness.mix(first, last, nll, mixed)
                    return mixed

            class WatchedBase(base_class):
                def __init__(base, *given, **named):
                    super().__init__(*given, **named)
                    if witness.now.weight or base.weight != self.s.ttt_base_weight:
                        witness.now.fault("mixed", f"a base model of weight {base.weight} beside "
                                          f"TTT_BASE_WEIGHT={self.s.ttt_base_weight}, or a second")
                    witness.now.weight = base.weight

                def mixed(base, targets, nll):
                    mixed = super().mixed(targets, nll)
                    witness.blend(targets, nll, mixed)
                    return mixed

            given = dict(model=model, forward=model, path=self.path, s=self.s, rt=self.rt,
                         tokens=tokens, byte_table=self.byte_table, opened=time.perf_counter())
            taken = inspect.signature(script.run_evaluations).parameters
            watched = dict(ScoreLedger=Watched, MatchModel=WatchedMatches, BaseModel=WatchedBase)
            with mock.patch.multiple(script, create=True, **watched), self.files:
                results, _ = script.run_evaluations(
                    **{name: value for name, value in given.items() if name in taken})
            for name in {"forward", *LOGITS} & vars(model).keys():
                delattr(model, name)
        for evaluation in witness.evaluations:
            evaluation.close()
            evaluation.kept = np.array(evaluation.ledger.nll, np.float32)
            if not np.array_equal(evaluation.kept, evaluation.recorded):
                evaluation.fault("kept", "the ledger at the end is not what was recorded")
        return witness, results


# -- the checks ------------------------------------------------------------------------------------
#
# Each yields (condition, what is wrong, what holds): text or list; None where it is not checked.

CAUSAL, NORMALIZED, BEFORE, ONCE, BYTES, SHIPS = (
    "1 causal", "2 normalized", "3 score before update", "4 one pass, each token once",
    "5 bits per byte", "6 what is scored is what ships")


def choose_places(evaluation, tokens, bos, at_random):
    """{target t: why}: no score before t, nor t's distribution, may feel changed tokens after t."""
    targets, places, rng = len(tokens) - 1, {}, np.random.default_rng(1)
    records, turn = evaluation.records, evaluation.turn_of

    def add(t, why):
        if 0 < t < targets:
            places.setdefault(int(t), why)

    # streams begin side by side
    streams = [b for (a, n), (b, _) in zip(records, records[1:]) if turn[b] == 0 and b != a + n]
    chunks = [first for first, _ in records if turn[first] > 0]
    begin, _ = records[len(records) // 2]
    inside = [t for t in sorted(set(evaluation.fresh)) if turn[t] == turn[begin]][1:]  # passes
    documents = np.flatnonzero(tokens[1:] == bos)
    for t in chunks[:1] + chunks[-1:]:
        add(t, "border of a chunk")
    for t in streams[-1:]:
        add(t, "border of a stream")
        add(max(first for first, _ in records if first < t), "last chunk of a stream")
        add(begin, "a chunk in the middle")
    if inside:
        add(inside[len(inside) // 2], "border of a pass")
        add(inside[len(inside) * 3 // 8], "border of a part of 8 ranks")
    for t in documents[-1:]:
        add(t, "begin of a document")
        add(t + 1, "first token of a document")
    for t in rng.integers(1, targets, at_random):
        add(t, "drawn at random")
    return places


def behind(evaluation, t):
    """Targets that are neither before target t in the text nor scored before it."""
    turn = evaluation.turn_of
    return np.flatnonzero((np.arange(len(turn)) >= t) & (turn >= turn[t]))


def changed_at(tokens, targets, vocab_size):
    """`tokens` with another token in the place of each of these targets."""
    out = tokens.copy()
    shift = np.random.default_rng(int(targets[0])).integers(1, vocab_size, len(targets))
    out[targets + 1] = (out[targets + 1].astype(np.int64) + shift) % vocab_size
    return out


def causal(audit, scout, base, places, progress):
    """Condition 1, by a run for each place."""
    early, own, unfelt, base.moved, back = [], [], [], [], False
    for t, why in places.items():
        others = behind(base.evaluations[-1], t)
        witness, _ = audit.run(changed_at(audit.tokens, others, audit.s.vocab_size), [t])
        progress.update()
        for name, a, b in zip(base.names, base.evaluations, witness.evaluations):
            where = f"tokens after {t} changed ({why}): "
            # nothing that changed is before it or scored before it
            may_not_feel = a.turn_of[:t] <= a.turn_of[others].min()
            other = a.kept[:t] != b.kept[:t]
            before, back = np.flatnonzero(other & may_not_feel), back or other.any()
            if len(before):
                target = int(before[-1])
                early.append(f"{where}{name} scores target {target} {b.kept[target]:.6f} instead "
                             f"of {a.kept[target]:.6f} ({len(before)} such)")
            p, q = (e.distributions.get(t) for e in (a, b))
            if p is None or q is None or not p.equal(q):
                moves = ("was not seen" if p is None or q is None
                         else f"moves by {float((p - q).abs().max()):.2g}")
                own.append(f"{where}the distribution of target {t} in {name} {moves}")
            if np.array_equal(a.kept[t:], b.kept[t:]):
                unfelt.append(f"{where}no score of {name} notices")
            if not np.array_equal(a.turn_of, b.turn_of):
                base.moved.append(f"{where}{name} scores in another order, so that the tokens "
                                  "decide what is scored when")
    progress.close()
    same = all(np.array_equal(a.kept, b.kept) for a, b in zip(scout.evaluations, base.evaluations))
    yield (CAUSAL, not same and "the same tokens give other scores in a second run, so that "
           "nothing can be proven: DEVICE=cpu, or ATTENTION=sdpa",
           "the same tokens give the same scores, bit for bit")
    told = ("what is scored later changes no score before it by a bit, but what is scored earlier "
            "does, from further on in the text" if back else
            "later tokens change no earlier score by a bit, of the whole text")
    yield (CAUSAL, early, f"{told}; {len(places)} places × {len(base.names)} evaluations: "
           + ", ".join(sorted(set(places.values()))))
    yield (CAUSAL, own,
           "its own token leaves the distribution of a target alone, bit for bit, there")
    yield CAUSAL, unfelt, "the changes were felt after each place, in every evaluation"


@torch.no_grad()
def normalized(audit, base):
    """Condition 2: scores are −log p of distributions that sum to one."""
    worst = {name: e.worst for name, e in zip(base.names, base.evaluations)}
    seen = sum(len(e.distributions) for e in base.evaluations)
    bad = max(worst, key=worst.get)
    told = ("scores are −log p of the softmax of the logits within "
            f"{worst[bad]:.1g} nats ({bad}), in {seen} rows")
    yield NORMALIZED, not (worst[bad] < 1e-4 and seen) and told, told
    if not seen:
        return
    error = max(e.mixing_error for e in base.evaluations)
    guessing, blending = ([name for name, e in zip(base.names, base.evaluations) if chosen(e)]
                          for chosen in (lambda e: e.guesses, lambda e: e.weight))
    if guessing or blending:
        yield (NORMALIZED, base.faults("mixed"), "; ".join(filter(None, (
            blending and f"{' and '.join(blending)} mixes in the base model (without adapters), "
            f"(1 − w)·p + w·p₀, w = {base.evaluations[-1].weight:g}",
            guessing and f"{' and '.join(guessing)} mix in guesses by the text before each target, "
            "(1 − w₁ − w₂)·p + w₁ or w₂ on the right guess")))
            + f"; within {error:.1g} nats of a recount")
    V, length, device = audit.s.vocab_size, min(32, len(audit.tokens) - 1), audit.rt.device
    x = torch.from_numpy(audit.tokens[:length].astype(np.int64)).to(device)
    total, (arguments, b) = torch.zeros(length, dtype=torch.float64, device=device), base.last_call
    others = dict(list(arguments.items())[2:])
    given = others.get("adapters")
    for part in torch.arange(V, device=device).split(max(1, (1 << 24) // (V * length))):
        rows, asked = x.expand(len(part), length), part[:, None].expand(len(part), length)
        if others.get("at_BN") is not None:
            others["at_BN"] = torch.arange(length, device=device).expand(len(part), length)
        if given is not None:
            others["adapters"] = tree_map(
                lambda a: a[b: b + 1].expand(len(part), *a.shape[1:]), given)
        total += (-base.original(rows, asked, **others).double()).exp().sum(0)
    told = (f"asked for each of the {V} tokens at {length} positions, the probabilities sum to "
            f"{float(total.min()):.6f} to {float(total.max()):.6f}")
    yield NORMALIZED, not bool((total - 1).abs().max() < 1e-4) and told, told


def before_update(audit, base):
    """Condition 3: what was seen of weights, of adapters and of the rows that changed them."""
    last, name = base.evaluations[-1], base.names[-1]
    yield BEFORE, base.faults("update"), (
        f"{' and '.join(sorted(set(last.updates.values())))} changed {len(last.updates)} times "
        f"between {last.turn + 1} chunks of {name}, each time by rows already scored "
        f"({last.training_rows} row passes)" if last.updates
        else f"no weight changes while {name} scores")
    if audit.s.ttt_enabled and not last.updates:
        yield (BEFORE, None, "test-time training changed nothing here: one chunk, no epochs or a "
               "rate of zero")
    if begun := sum(e.begun for e in base.evaluations):
        yield (BEFORE, base.faults("documents"), "adapters began anew for each of the "
               f"{begun} passes of rows in which a document had ended")
    yield (BEFORE, base.faults("given"),
           "every recorded score is the first that the model gave its target")


def record(ledger, first, nll):
    """Tell the ledger the scores of targets [first, first + len(nll))."""
    by_array = "targets" in inspect.signature(ledger.record).parameters
    ledger.record(first + np.arange(len(nll)) if by_array else first, nll)


def rows(ledger, first, last, length):
    """The ledger's rows of targets [first, last)."""
    if "last" in inspect.signature(ledger.rows_for_adapting).parameters:
        return ledger.rows_for_adapting(first, last, length)
    return ledger.rows_for_adapting(np.arange(first, last - length + 1, length), length)


def refuses(ledger_class, act, scored=8):
    """Does a ledger of 20 targets, `scored` of them scored, refuse to do it?"""
    ledger = ledger_class(np.arange(21, dtype=np.uint16))
    record(ledger, 0, np.ones(scored, np.float32))
    try:
        act(ledger)
        return False
    except Exception:
        return True


def one_pass(audit, base):
    """Condition 4: the ledger's law, what it was told, and the tokens themselves."""
    def ones(n):
        return np.ones(n, np.float32)
    laws = {
        "a second score": lambda b: record(b, 0, ones(4)),
        "a score that overlaps": lambda b: record(b, 7, ones(4)),
        "a target twice in one call": lambda b: b.record(np.array([9, 9]), ones(2)),
        "two scores for one target": lambda b: b.record(np.array([9]), ones(2)),
        "scores before the begin": lambda b: record(b, -4, ones(4)),
        "scores past the end": lambda b: record(b, 8, ones(13)),
        "a score that is no number": lambda b: record(b, 8, ones(3) * np.nan),
        "a result with targets missing": lambda b: b.result(audit.byte_table),
        "training on a target not yet scored": lambda b: rows(b, 0, 9, 3),
        "training across a gap": lambda b: record(b, 12, ones(8)) or rows(b, 0, 16, 4),
        "training after a gap, with its last token":
            lambda b: record(b, 12, ones(8)) or rows(b, 12, 20, 4),
        "training from the far end": lambda b: rows(b, -9, 8, 4)}
    broken = [law for law, act in laws.items() if not refuses(audit.script.ScoreLedger, act)]
    yield (ONCE, broken and f"the ledger accepts {', '.join(broken)}",
           f"the ledger refuses {', '.join(laws)}")
    targets = len(audit.tokens) - 1
    problems = [*base.faults("order"), *base.faults("kept"), *base.moved]
    for name, e, result in zip(base.names, base.evaluations, base.results.values()):
        if not e.scored == result["targets"] == targets or np.isnan(e.recorded).any():
            problems.append(f"{name}: {e.scored} scores recorded, {result['targets']} targets "
                            f"reported, {targets} in the data")
    yield (ONCE, problems, f"{targets} targets recorded once, in an order that no token moves, in "
           f"{', '.join(base.names)}; what was recorded stayed")
    yield ONCE, *data_is_whole(audit)


def on_disk(audit, names):
    """The numbers in the shards of these names, read here and not by the script; or None."""
    paths = sorted(audit.script.find_upward(audit.s.data_path).glob(names))
    return np.concatenate([np.fromfile(p, "<u2", offset=1024) for p in paths]) if paths else None


def all_tokens(audit):
    return np.asarray(audit.script.load_validation(replace(audit.s, val_limit_tokens=0)))


def data_is_whole(audit):
    """(problem, what holds): are the tokens those on disk, from the first on?"""
    row, disk = audit.s.train_seq_len, on_disk(audit, "fineweb_val_[0-9]*.bin")
    for limit, tokens in ((audit.s.val_limit_tokens, audit.tokens), (0, all_tokens(audit))):
        expected = min(limit or len(disk), len(disk) - 1) // row * row
        if len(tokens) - 1 != expected or not np.array_equal(tokens, disk[: len(tokens)]):
            return (f"{len(tokens) - 1} targets read where {expected} lie on disk, or not in their "
                    "order"), ""
    return "", (f"the targets are the shards' tokens in order: {len(audit.tokens) - 1} here, "
                f"{expected} of {len(disk) - 1} without a limit")


def text_bytes(sp, tokens):
    """UTF-8 bytes of the text that targets tokens[1:] decode to.

    Control, unknown and unused pieces are no text and end a document. A space that the tokenizer
    puts before a document is no text either. Byte pieces stand for one byte each, also where the
    slice or a damaged text cuts a character: they are decoded as an "A" each, and so is a piece put
    in front, which keeps the decoder from dropping a first space.
    """
    pieces = range(sp.vocab_size())
    boundary = [sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in pieces]
    front = next(i for i in pieces
                 if not boundary[i] and not sp.is_byte(i) and "▁" not in sp.id_to_piece(i))
    letter, count, document, after_boundary = sp.piece_to_id("<0x41>"), 0, [], boundary[tokens[0]]
    for token in [*tokens[1:].tolist(), None]:
        if token is not None and not boundary[token]:
            document.append(letter if sp.is_byte(token) else token)
            continue
        if document:
            count += len(sp.decode([front, *document]).encode()) - len(sp.decode([front]).encode())
            count -= after_boundary and sp.id_to_piece(document[0]).startswith("▁")
        document, after_boundary = [], True
    return int(count)


def bits_and_bytes(audit, base):
    """The denominator against the text, and the score from the recorded nll."""
    model = audit.script.find_upward(audit.s.tokenizer_path)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    side = on_disk(audit, "fineweb_val_bytes_*.bin")

    def bytes_of(tokens):
        return text_bytes(sp, tokens) if side is None else int(side[1: len(tokens)].sum(dtype=int))

    text, targets = bytes_of(audit.tokens), len(audit.tokens) - 1
    yield (BYTES, [f"{name}: {r['bytes']} bytes where the text has {text}"
                   for name, r in base.results.items() if r["bytes"] != text],
           f"{targets} targets {'decode to' if side is None else 'stand for'} {text} bytes of "
           "UTF-8, as the denominator says")
    more = all_tokens(audit)[: 1 << 18]
    of_more, counted = bytes_of(more), audit.byte_table.count(more)
    documents = int((more[1:] == audit.bos).sum())
    told = (f"{len(more) - 1} targets with {documents} beginnings of documents decode to {of_more} "
            f"bytes, and the byte table says {counted}")
    yield BYTES, of_more != counted and told, told
    wrong, scores = [], recorded_scores(base, text)
    for (name, r), (bpb, loss) in zip(base.results.items(), scores):
        if not np.allclose((r["val_bpb"], r["val_loss"]), (bpb, loss), rtol=1e-9, atol=0):
            wrong.append(f"{name}: val_bpb {r['val_bpb']:.8f}, val_loss {r['val_loss']:.8f}; "
                         f"recorded are {bpb:.8f}, {loss:.8f}")
    yield (BYTES, wrong, "Σ nll / ln 2 / bytes of what was recorded is the bpb reported: "
           + ", ".join(f"{name} {bpb:.6f}" for name, (bpb, _) in zip(base.names, scores)))


def recorded_scores(base, text):
    """[(bits per byte, nats per target) of what each evaluation recorded]; `text` in bytes."""
    sums = [(e.recorded.sum(dtype=np.float64), len(e.recorded)) for e in base.evaluations]
    return [(nats / math.log(2) / text, nats / targets) for nats, targets in sums]


def written_result(audit, base):
    """The whole script, unwatched: does it write the scores that were audited?"""
    with tempfile.TemporaryDirectory() as folder:
        environ = {**audit.environ, "EVAL_ONLY": str(audit.path), "OUT_DIR": folder,
                   "RUN_ID": "audit", "SCORES_PATH": f"{folder}/scores.npy"}
        with quiet() as said:
            status = audit.script.main([], environ)
        if status:
            return BYTES, (f"the script itself ended with status {status}: "
                           f"{said.getvalue().strip().splitlines()[-1:]}"), ""
        result = json.loads(Path(folder, "logs", "audit.json").read_text())
        scores = np.load(Path(folder, "scores.npy"))
    last, text = base.evaluations[-1].recorded, base.results[base.names[-1]]["bytes"]
    written = [(result["val_bpb"].get(n, 0), result["val_loss"].get(n, 0)) for n in base.names]
    same = (np.array_equal(scores, last) and result["scored_targets"] == len(last)
            and result["ledger_sha256"] == hashlib.sha256(last.tobytes()).hexdigest()
            and result["scored_bytes"] == text
            and np.allclose(written, recorded_scores(base, text), rtol=1e-9, atol=0))
    told = "the script, run by itself, writes "
    return (BYTES, not same and f"{told}other scores into its result: {result['val_bpb']}",
            f"{told}these scores and no others into its result")


EXECUTING_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "torch.jit.load",
                   "np.load", "numpy.load", "os.system"}
EXECUTING_MODULES = {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "yaml",
                     "ctypes", "subprocess", "runpy", "builtins"}


def forbidden_calls(source, roots):
    """(names that the functions `roots` reach in a source, [what of them could execute data])."""
    defined = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined[node.name] = node
        elif isinstance(node, ast.Assign):
            defined.update({ast.unparse(target): node for target in node.targets})
    reached, waiting, found = set(), [r for r in roots if r in defined], []
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        reached.add(name)
        for node in ast.walk(defined[name]):
            if isinstance(node, ast.Name) and node.id in defined:
                waiting.append(node.id)
            text = ast.unparse(node) if isinstance(node, (ast.Name, ast.Attribute)) else ""
            if text in EXECUTING_CALLS or text.split(".")[0] in EXECUTING_MODULES:
                found.append(f"{name} uses {text}")
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                module = getattr(node.args[0], "value", None)
                if not isinstance(module, str) or module in EXECUTING_MODULES:
                    found.append(f"{name} imports {ast.unparse(node.args[0])}")
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                found.append(f"{name} imports inside")
    return reached, found


def ships(audit, script_path, base):
    """The file: read without executing, scored as it is, small enough, and the only file read."""
    roots = ("read_artifact", "load_quantized")
    reached, found = forbidden_calls(readable_source(script_path), roots)
    if "read_artifact" not in reached:
        found.append(f"{script_path}: read_artifact is not in its source, so that nobody can see "
                     "what it does")
    if not found:
        with audit.files:
            audit.script.read_artifact(audit.path)
        found = [f"reading it raised the event {event}" for event in audit.files.executed]
    yield (SHIPS, ", ".join(found), f"reading the file executes nothing: {len(reached)} functions "
           "and tables looked through")
    yield (SHIPS, base.faults("ships"), f"{len(audit.shipped)} tensors of the model equal the "
           "file's when an evaluation begins, and nothing is added to them")
    opened = sorted(set(base.opened) - {os.path.realpath(audit.path)})
    yield (SHIPS, opened and f"the evaluation opens {', '.join(opened)}",
           "the evaluation opens no other file and no connection")
    code, model = script_path.stat().st_size, audit.path.stat().st_size
    told = f"code {code:,} + model {model:,} = {code + model:,} bytes of {CAP_BYTES:,}"
    yield SHIPS, code + model > CAP_BYTES and told, told


def checks(audit, script_path, at_random):
    """All checks in order."""
    with tqdm(total=2, desc="runs", disable=None, leave=False) as progress:
        try:
            scout, _ = audit.run(audit.tokens)
            progress.update()
            if not scout.evaluations:
                raise RuntimeError("no ScoreLedger was made")
            places = choose_places(scout.evaluations[-1], audit.tokens, audit.bos, at_random)
            progress.total += len(places)
            base, base.results = audit.run(audit.tokens, places)
            progress.update()
            base.opened, base.names = audit.files.opened, list(base.results)
            if len(base.names) != len(base.evaluations):
                names = ", ".join(base.names)
                raise RuntimeError(f"{len(base.evaluations)} ledgers for the results {names}")
            yield from causal(audit, scout, base, places, progress)
            for check in (normalized, before_update, one_pass, bits_and_bytes):
                yield from check(audit, base)
            yield written_result(audit, base)
            yield from ships(audit, script_path, base)
        except torch.OutOfMemoryError:
            raise
        except Exception as problem:
            yield "the evaluation", f"ended with {type(problem).__name__}: {problem}", ""


def describe(audit, script_path, own_chunk):
    """What is audited, in two lines."""
    s = audit.s
    (length, stride, band), adapting = shapes_of(s)
    plan = f"windows of {length}, stride {stride}"
    if band:
        plan = f"banded segments of {stride} after {length - stride}, {band} keys"
    ttt = "TTT off"
    if s.ttt_enabled:
        epochs = s.ttt_epochs if s.ttt_epochs >= 0 else "up to 10"
        ttt = (f"TTT {getattr(s, 'ttt_optimizer', 'sgd')}, {epochs} epochs over chunks of "
               f"{s.ttt_chunk_tokens}")
        if getattr(s, "ttt_lora_rank", 0):
            ttt = (f"TTT adapters of rank {s.ttt_lora_rank}, {adapting[1]} targets of each stream "
                   "a step")
        elif own_chunk not in (0, s.ttt_chunk_tokens):
            ttt += f" (the artifact's: {own_chunk}; --targets {4 * own_chunk} takes those)"
    return (f"{audit.path} ({audit.path.stat().st_size:,} bytes) scored by {script_path} "
            f"({script_path.stat().st_size:,} bytes)\n{len(audit.tokens) - 1} targets of "
            f"{s.data_path}; {plan}; {ttt}; {audit.rt.device}")


def arguments_of(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=user_path, help="such as final_model.ptz")
    parser.add_argument("--script", type=user_path, default=ROOT / "train_gpt.py",
                        help="what is judged, readable or packed")
    parser.add_argument("--data", help="folder with fineweb_val_*.bin (default: DATA_PATH)")
    parser.add_argument("--tokenizer", help="its SentencePiece model (default: TOKENIZER_PATH)")
    parser.add_argument("--targets", type=int, default=0,
                        help="validation targets that are scored (default: 16 rows; with "
                             "adapters 32 of their windows, or rows if these are longer)")
    parser.add_argument("--places", type=int, default=2,
                        help="places drawn at random, beside the borders (default: 2)")
    arguments = parser.parse_args(argv)
    if arguments.targets < 0 or arguments.places < 0:
        parser.error("--targets and --places must not be negative")
    return arguments


def main(argv, environ):
    """Exit status: 0 nothing failed, 1 a check failed. Raises DataError on unusable input."""
    arguments = arguments_of(argv)
    if environ.get("WORLD_SIZE", "1") != "1":
        raise DataError(f"WORLD_SIZE={environ['WORLD_SIZE']}: the audit is one process; "
                        "start it without torchrun")
    for path in (arguments.script, arguments.artifact):
        if not path.is_file():
            raise DataError(f"{path}: no such file")
    script = load_script(arguments.script)
    paths = (("DATA_PATH", arguments.data), ("TOKENIZER_PATH", arguments.tokenizer))
    environ = {**environ, **{k: v for k, v in paths if v}}
    try:
        s, environ, own_chunk = settings_for(script, arguments.artifact, environ, arguments.targets)
        audit, condition, seen = Audit(script, arguments.artifact, s, environ), None, Counter()
        # sums that repeat
        torch.use_deterministic_algorithms(audit.rt.device.type == "cuda", warn_only=True)
        print(describe(audit, arguments.script, own_chunk), flush=True)
        for group, wrong, good in checks(audit, arguments.script, arguments.places):
            if group != condition:
                condition = group
                print(f"\n{group}")
            status = "SKIP" if wrong is None else "FAIL" if wrong else "PASS"
            first = wrong[0] if wrong and isinstance(wrong, list) else wrong or good
            print(f"  {status}  {first}", flush=True)
            seen[status] += 1
    except (script.UserError, torch.OutOfMemoryError) as problem:
        raise DataError(str(problem)) from None
    if seen["FAIL"]:
        print(f"\n{seen['FAIL']} of {seen.total()} checks failed")
        return 1
    skipped = f", {seen['SKIP']} could not be made" if seen["SKIP"] else ""
    print(f"\n{seen['PASS']} checks passed{skipped}")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # products on a GPU repeat
    sys.exit(exit_code_of(functools.partial(main, environ=dict(os.environ)), sys.argv[1:],
                          unread=141))  # what nobody read has passed nothing
