"""Newton–Schulz, Muon and AdamW against slow references in float64, on one rank and on several."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import a_model

import train_gpt

# Where five iterations take singular values in [0.003, 1] of a normalized matrix: near 1, not to 1.
BOUNDS = {"classic": (0.68, 1.21), "polar": (0.858, 1.142)}


def iterate(sigma, coefficients):
    """What Newton–Schulz makes of singular values: σ ← aσ + bσ³ + cσ⁵."""
    for a, b, c in coefficients:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return sigma


def by_svd(g, coefficients):
    """Newton–Schulz of one matrix by its definition, through the SVD, in float64."""
    g = np.asarray(g, np.float64)
    u, sigma, vh = np.linalg.svd(g, full_matrices=False)
    return (u * iterate(sigma / (np.linalg.norm(g) + 1e-7), coefficients)) @ vh


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-4)])
@pytest.mark.parametrize("shape", [(8, 8), (16, 40), (40, 16), (1, 7)])
def test_newton_schulz_keeps_singular_vectors(name, dtype, tolerance, shape):
    coefficients = train_gpt.NEWTON_SCHULZ[name]
    g = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    x = train_gpt.newton_schulz(g, coefficients, dtype)
    assert x.dtype == dtype
    for mine, one in zip(x, g):
        np.testing.assert_allclose(mine, by_svd(one, coefficients), atol=tolerance)


@pytest.mark.parametrize("name", BOUNDS)
def test_newton_schulz_brings_singular_values_near_one(name):
    low, high = BOUNDS[name]
    ends = iterate(np.linspace(0.003, 1, 200001), train_gpt.NEWTON_SCHULZ[name])
    assert low <= ends.min() and ends.max() <= high


# -- the whole optimizer ---------------------------------------------------------------------------

MATRICES = (".q", ".k", ".v", ".o", ".up", ".down", ".proj", ".read")  # Muon's
TABLES = ("tok_emb", ".table")


class Reference:
    """Muon and AdamW one parameter at a time in float64, from their definitions."""

    def __init__(self, model, s):
        self.s, self.t = s, 0
        self.w = {n: p.detach().double().numpy().copy() for n, p in model.named_parameters()}
        self.m = {n: np.zeros_like(w) for n, w in self.w.items()}
        self.v = {n: np.zeros_like(w) for n, w in self.w.items()}

    def step(self, grads, lr_scale, momentum):
        s, self.t = self.s, self.t + 1
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        clip = min(1.0, s.grad_clip_norm / (norm + 1e-6)) if s.grad_clip_norm else 1.0
        for name, w in self.w.items():
            g = grads[name] * clip
            if name.endswith(MATRICES):
                self.m[name] = momentum * self.m[name] + g
                u = g + momentum * self.m[name]
                if s.muon_row_norm:
                    u = np.stack([row / max(np.linalg.norm(row), 1e-7) for row in u])
                pairs = s.muon_head_pairs and name.endswith((".q", ".k"))
                rows = 2 * s.head_dim if pairs else len(u)
                update = np.concatenate([
                    by_svd(u[a: a + rows], train_gpt.NEWTON_SCHULZ[s.muon_coefficients])
                    for a in range(0, len(u), rows)])
                if s.cautious_wd:  # the step subtracts the update: towards 0 where signs agree
                    decay = np.where(np.sign(w) == np.sign(update), 2 * s.muon_wd * lr_scale, 0)
                else:
                    decay = s.muon_wd
                w *= 1 - s.matrix_lr * lr_scale * decay
                w -= s.matrix_lr * lr_scale * math.sqrt(max(1, w.shape[0] / w.shape[1])) * update
            else:
                lr = lr_scale * (s.tied_embed_lr if name.endswith(TABLES) else s.scalar_lr)
                self.m[name] = 0.9 * self.m[name] + (1 - 0.9) * g
                self.v[name] = s.beta2 * self.v[name] + (1 - s.beta2) * g**2
                w *= 1 - lr * (s.embed_wd if name.endswith(TABLES) and s.embed_wd >= 0
                               else s.adam_wd)
                deviation = np.sqrt(self.v[name] / (1 - s.beta2**self.t))
                w -= lr * (self.m[name] / (1 - 0.9**self.t)) / (deviation + 1e-8)
        return norm


class ThreadRank:
    """A rank that is a thread: collectives by their definitions, through a list that all see."""

    def __init__(self, rank, board, barrier):
        self.rank, self.board, self.barrier, self.world_size = rank, board, barrier, len(board)
        self.dtype, self.compile, self.compiled = torch.float32, False, lambda function: function

    def exchange(self, x):
        self.board[self.rank] = x.clone()
        self.barrier.wait(30)
        everyone = list(self.board)
        self.barrier.wait(30)
        return everyone

    def sum_(self, x):
        return x.copy_(torch.stack(self.exchange(x)).sum(0))

    def begun(self, x, result):
        """Nothing has arrived before the wait, and what is sent must not change until then."""
        sent = x.clone()

        def wait():
            assert torch.equal(x, sent), "changed while it travelled"
            return result(self.exchange(x))
        return wait

    def sum_later(self, x):
        return self.begun(x, lambda everyone: x.copy_(torch.stack(everyone).sum(0)))

    def reduce_scatter(self, x):
        assert len(x) % self.world_size == 0, "the number of matrices must be padded to the ranks"
        return self.begun(
            x, lambda everyone: torch.stack(everyone).sum(0).chunk(self.world_size)[self.rank])

    def all_gather(self, x):
        return self.begun(x, torch.cat)


def random_grads(model, steps, size=0.05):
    """{name: gradient} per step, float32 values."""
    rng = np.random.default_rng(1)
    return [{n: (size * rng.standard_normal(p.shape)).astype(np.float32)
             for n, p in model.named_parameters()} for _ in range(steps)]


def run_on_ranks(s, ranks, grads, schedule):
    """Models and norms of all ranks after those steps; each has an uneven part of each gradient."""
    board, barrier = [None] * ranks, threading.Barrier(ranks)
    shares = np.random.default_rng(2).dirichlet(np.ones(ranks)).astype(np.float32)
    models = [a_model(s) for _ in range(ranks)]

    def work(rank, model):
        rt, norms = ThreadRank(rank, board, barrier) if ranks > 1 else train_gpt.Runtime(s), []
        optimizers = train_gpt.training_optimizers(model, s, rt)
        for g, (scale, momentum) in zip(grads, schedule):
            for n, p in model.named_parameters():
                p.grad = torch.from_numpy(g[n] * shares[rank])
            norms.append(float(optimizers.step(scale, momentum)))
            assert all(p.grad is None for p in model.parameters())
        return norms
    with ThreadPoolExecutor(ranks) as pool:
        return models, list(pool.map(work, range(ranks), models))


SCHEDULE = [(1.0, 0.9), (1.0, 0.93), (0.7, 0.95), (0.1, 0.95)]


@pytest.mark.parametrize("variables", [
    dict(MUON_COEFFICIENTS="classic", NUM_KV_HEADS=1),
    dict(MUON_COEFFICIENTS="polar", GRAD_CLIP_NORM=0),
    dict(MUON_COEFFICIENTS="polar", MUON_WD=0.3, ADAM_WD=0.2, EMBED_WD=0.4, GRAD_CLIP_NORM=0.01),
    dict(MUON_WD=0.3, CAUTIOUS_WD=0, UNIQUE_LAYERS=2, XSA_LAST_N=2),
    dict(MUON_ROW_NORM=0, MUON_HEAD_PAIRS=0, PARALLEL="lanes", UNET_SKIPS="gated", MUDD=1),
    dict(GRAD_CLIP_NORM=1000, BIGRAM_VOCAB_SIZE=0, VE_LAYERS="", GATED_ATTENTION=0,
         VALUE_RESIDUAL=0, SMEAR_GATE=0, UNET_SKIPS=0)])
def test_steps_equal_the_slow_reference(tiny, variables):
    s = tiny(**variables)
    model = a_model(s)
    reference, grads = Reference(model, s), random_grads(model, len(SCHEDULE))
    models, norms = run_on_ranks(s, 1, grads, SCHEDULE)
    for (scale, momentum), g, norm in zip(SCHEDULE, grads, norms[0]):
        g = {n: x.astype(np.float64) for n, x in g.items()}
        assert norm == pytest.approx(reference.step(g, scale, momentum), rel=1e-5)
    for name, p in models[0].named_parameters():
        np.testing.assert_allclose(p.detach().numpy(), reference.w[name], atol=2e-5, err_msg=name)


@pytest.mark.parametrize("ranks, row_norm", [(2, 1), (5, 0)])
def test_ranks_that_do_not_divide_the_matrices_change_nothing(tiny, ranks, row_norm):
    s = tiny(GRAD_CLIP_NORM=0.5, MUON_ROW_NORM=row_norm)
    grads = random_grads(a_model(s), len(SCHEDULE))
    (one,), (norms,) = run_on_ranks(s, 1, grads, SCHEDULE)
    several, several_norms = run_on_ranks(s, ranks, grads, SCHEDULE)
    for model, its_norms in zip(several, several_norms):
        assert its_norms == pytest.approx(norms, rel=1e-5)
        for (name, p), q in zip(one.named_parameters(), model.parameters()):
            torch.testing.assert_close(q, p, rtol=0, atol=1e-5, msg=name)
            assert torch.equal(q, several[0].get_parameter(name)), f"{name}: ranks drift apart"
