"""The model: each formula against a slow float64 reference; initial weights, kernels."""

import math
import re
import sys
from types import ModuleType

import pytest
import torch
from conftest import a_model, a_rank
from hypothesis import HealthCheck, given, settings as hypothesis_settings, strategies as st

import train_gpt
from train_gpt import GPT, Settings, UserError, init_weights, kind_of

CPU = a_rank()


def attend_by(name, strict=False):
    """attend(q, k, v, band, starts) of a kernel."""
    attend, visible = train_gpt.attention_kernel(name, strict)
    return lambda q, k, v, band=0, starts=None: attend(q, k, v, visible(q, band, starts))


sdpa = attend_by("sdpa")


def randomized(s, seed=0, dtype=torch.float32):
    """A model all of whose parameters are random, scales, gains, gates and mixes too."""
    model, generator = GPT(s, dtype), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            draw = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            matrix = kind_of(name).kind in ("attn", "mlp", "proj", "mix")
            p.copy_(draw / math.sqrt(p.size(1)) if matrix else 0.7 * draw)
    return model.to(dtype)


def random_rows(s, count=2, length=10, seed=0):
    """Tokens with two document beginnings, one of them in the middle of a row."""
    rows = torch.randint(4, s.vocab_size, (count, length + 1),
                         generator=torch.Generator().manual_seed(seed))
    rows[0, 0] = rows[-1, length // 2] = train_gpt.BOS
    return rows


# -- the reference: one row at a time, float64, straight from the definitions

def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + 2.0 ** -23).sqrt()


def rotated(head, s):
    """[T, E] of one head: channels j and j + r/2 turn by t·base^(−2j/r), those from r on pass."""
    r, base = s.rope_dims or s.head_dim, 10000
    if s.rope_ntk_reference and s.train_seq_len > s.rope_ntk_reference:
        base = base * (s.train_seq_len / s.rope_ntk_reference) ** (r / (r - 2))
    out = []
    for t, x in enumerate(head):
        angles = [t * base ** (-2 * j / r) for j in range(r // 2)]
        first = [x[j] * math.cos(a) + x[j + r // 2] * math.sin(a) for j, a in enumerate(angles)]
        second = [-x[j] * math.sin(a) + x[j + r // 2] * math.cos(a) for j, a in enumerate(angles)]
        out.append(torch.stack([*first, *second, *x[r:]]))
    return torch.stack(out)


def bigram_embedding(p, row):
    last = p["bigram.table"].size(0) - 1
    buckets = [(36313 * row[t] ^ 27191 * row[t - 1]) % last if t else last for t in range(len(row))]
    return p["bigram.table"][buckets] @ p["bigram.proj"].T * p["bigram.scale"]


def embedded(p, s, row):
    e = p["tok_emb"][row]
    if s.smear_gate == "embed":
        w, strength, raw = p["smear"][:-1], p["smear"][-1], e
        e = torch.stack([raw[t] + (strength / (1 + torch.exp(-(w @ raw[t, :12]))) * raw[t - 1]
                                   if t and row[t] != train_gpt.BOS else 0)
                         for t in range(len(row))])
    if s.bigram_vocab_size:
        e = e + bigram_embedding(p, row)
    x = rms(e)
    if s.smear_gate in ("0", "embed"):
        return x
    g, out = 1 / (1 + torch.exp(-p["smear"])), []
    for t in range(len(row)):
        previous = x[t - 1] if t else torch.zeros_like(x[0])
        out.append(x[t] if s.smear_gate == "bos" and row[t] == train_gpt.BOS
                   else (1 - g) * x[t] + g * previous)
    return torch.stack(out)


def mixed_value(p, s, i, v, first):
    """The value residual of block i; block 0 has none."""
    if i == 0 or s.value_residual == "0":
        return v
    λ = p[f"blocks.{i}.value_residual"]
    if s.value_residual == "pair":
        return λ[0] * first + λ[1] * v
    g = 1 / (1 + torch.exp(-λ[0]))  # sigmoid
    return g * first + (1 - g) * v


def attention(p, s, i, u, row, first, starts, band):
    """Output [T, D] of block i's attention, and its V [T, K, E] before the value residual."""
    T, H, K, E = len(row), s.num_heads, s.num_kv_heads, s.head_dim
    core = f"cores.{i % s.cores}.attn."
    q, k, v = (u @ p[core + x].T for x in "qkv")
    if i in s.ve_blocks:
        n = s.ve_blocks.index(i)
        v = v + p["ve.table"][row] @ p["ve.proj"].T * p["ve.scale"] * p["ve.block_scales"][n]
    own = v.reshape(T, K, E)
    v = mixed_value(p, s, i, own, first)
    heads = []
    for h in range(H):
        g = h // (H // K)  # consecutive query heads share a key/value head
        qh = rotated(rms(q[:, h * E:(h + 1) * E]), s) * p[core + "q_gain"][h]
        kh = rotated(rms(k[:, g * E:(g + 1) * E]), s)
        if s.key_offset:
            r = s.rope_dims or E
            kh = torch.stack([torch.cat((kh[t, :r], kh[t if t in starts else t - 1, r:]))
                              for t in range(T)])
        rows = []
        for t in range(T):
            begin = max(*(j for j in starts if j <= t), t + 1 - band if band else 0)
            share = torch.softmax(qh[t] @ kh[begin: t + 1].T / math.sqrt(E), 0)
            y = share @ v[begin: t + 1, g]
            if i % s.cores >= s.cores - s.xsa_last_n:
                direction = v[t, g] / max(v[t, g].norm(), 1e-12)
                y = y - (y @ direction) * direction
            if s.gated_attention == "head":
                z = p[core + "gate_weight"][h] @ u[t] + p[core + "gate_bias"][h]
                y = y / (1 + torch.exp(-z))
            if s.gated_attention == "sparse":
                y = y / (1 + torch.exp(-(p[core + "gate_weight"][h] @ u[t, :12]) / 2))
            rows.append(y)
        heads.append(torch.stack(rows))
    return torch.cat(heads, 1) @ p[core + "o"].T, own


def mixed(p, site, x, *others):
    """Factors of each token, from an MLP with the GELU written out, times `others`, added to x."""
    inner = rms(x) @ p[f"mixers.{site}.read"].T
    hidden = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
    factors = (hidden @ p[f"mixers.{site}.write"].T + p[f"mixers.{site}.bias"]) / 10
    return torch.stack([x[t] + sum(factors[t, n] * y[t] for n, y in enumerate(others))
                        for t in range(len(x))])


def reference(p, s, row, targets, added=None, band=0, segment=None, late=True):
    """nll [T] of one row from parameters {name: float64}, and what is `added` to attention and MLP
    of each pass, and to the table for the logits, [R, D] each. A query sees `band` keys; attention
    ends where a document or a segment begins; `late`: after the switch to LATE_PASSES."""
    added = added or [torch.zeros(shape, dtype=torch.float64) for shape in GPT(s).adapter_shapes()]
    starts = [t for t, token in enumerate(row) if t == 0 or s.doc_attention and (
        token == train_gpt.BOS or segment and t % segment == 0)]
    x0 = x = embedded(p, s, row)
    order = range(s.num_layers)
    if s.late_passes and late:
        order = {"0-2,1-2,3": [0, 1, 2, 1, 2, 3], "0,2,1,1,2": [0, 2, 1, 1, 2]}[s.late_passes]
    skips, first, half, lane, middle = [], None, len(order) // 2, None, None
    for n, i in enumerate(order):
        form = s.parallel if i >= s.parallel_from else "0"
        middle = x if n == half else middle
        if s.mudd and n == len(order) - 1:
            x = last = mixed(p, 0, x, x0, middle, x)
        if form == "lanes" and n < half:
            form = "0"
        if form == "lanes" and lane is None:
            lane = x
        if s.unet_skips != "0" and n >= half and skips:
            skip = p["skip_weights"][n - half] * skips.pop()
            if s.unet_skips == "gated":
                g = 1 / (1 + torch.exp(-p["skip_gates"][n - half]))
                x = g * x + (1 - g) * skip
            else:
                x = x + skip
        z = p[f"blocks.{i}.resid_mix"][0] * x + p[f"blocks.{i}.resid_mix"][1] * x0
        scale = 1 / math.sqrt(i + 1) if s.ln_scale else 1.0
        attn, own = attention(p, s, i, scale * rms(z), row, first, starts, band)
        first = own if n == 0 else first
        attn = p[f"blocks.{i}.attn_scale"] * attn + scale * rms(z) @ added[2 * n].T
        read = {"0": z + attn, "one": z, "lanes": lane}[form]
        hidden = scale * rms(read) @ p[f"cores.{i % s.cores}.mlp.up"].T
        hidden = torch.where(hidden >= 0, hidden, s.leaky_slope * hidden) ** 2
        mlp = hidden @ p[f"cores.{i % s.cores}.mlp.down"].T
        mlp = p[f"blocks.{i}.mlp_scale"] * mlp + scale * rms(read) @ added[2 * n + 1].T
        if form == "lanes":
            (r0, a0, m0), (r1, a1, m1) = p["lanes"][i]
            x, lane = r0 * x + a0 * attn + m0 * mlp, r1 * lane + a1 * attn + m1 * mlp
        else:
            x = z + attn + mlp
        if n < half:
            skips.append(x)
    x = x if lane is None else (x + lane) / 2
    x = mixed(p, 1, x, x0, middle, last) if s.mudd else x
    logits = rms(x) @ (p["tok_emb"] + added[-1]).T
    if s.logit_softcap:
        logits = s.logit_softcap * torch.tanh(logits / s.logit_softcap)
    return torch.stack([torch.log(torch.exp(line - line.max()).sum()) + line.max() - line[y]
                        for line, y in zip(logits, targets)])


# Every value of every part, several parts at a time.
VARIANTS = [
    dict(), dict(VALUE_RESIDUAL="sigmoid", VE_LAYERS="0,1,2", XSA_LAST_N=1),
    dict(VALUE_RESIDUAL=0, GATED_ATTENTION=0, SMEAR_GATE=1, NUM_KV_HEADS=4, ROPE_DIMS=0),
    dict(VE_LAYERS="0,2", SMEAR_GATE=0, XSA_LAST_N=0, DOC_ATTENTION=0, LEAKY_SLOPE=0.75,
         MLP_MULT=1.5),
    dict(VE_LAYERS="", KEY_OFFSET=0, ROPE_DIMS=6, NUM_KV_HEADS=1, LN_SCALE=0, BIGRAM_VOCAB_SIZE=2),
    dict(DOC_ATTENTION=0, KEY_OFFSET=0, ROPE_DIMS=2, ROPE_NTK_REFERENCE=0, BIGRAM_DIM=4),
    dict(ROPE_NTK_REFERENCE=32, LEAKY_SLOPE=0, LOGIT_SOFTCAP=2, NUM_LAYERS=5, VE_LAYERS="3"),
    dict(NUM_LAYERS=1, XSA_LAST_N=1, VE_LAYERS="", LOGIT_SOFTCAP=0, MUDD=1),
    dict(NUM_LAYERS=4, UNIQUE_LAYERS=3, XSA_LAST_N=2), dict(UNIQUE_LAYERS=1, XSA_LAST_N=1),
    dict(UNET_SKIPS="gated", SMEAR_GATE="embed", GATED_ATTENTION="sparse", PARALLEL="one",
         PARALLEL_FROM=1),
    dict(PARALLEL="lanes", PARALLEL_FROM=1, UNET_SKIPS="gated", NUM_LAYERS=4, MUDD=1),
    dict(NUM_LAYERS=4, LATE_PASSES="0-2,1-2,3", PARALLEL="lanes", PARALLEL_FROM=2,
         SMEAR_GATE="embed", VE_LAYERS=""),
    dict(LATE_PASSES="0,2,1,1,2", MUDD=1, VALUE_RESIDUAL=0, PARALLEL="one", PARALLEL_FROM=2,
         UNET_SKIPS="gated"),
    dict(UNET_SKIPS=0, LN_SCALE=0, SMEAR_GATE=0, BIGRAM_VOCAB_SIZE=0, VE_LAYERS="",
         VALUE_RESIDUAL=0, GATED_ATTENTION=0, XSA_LAST_N=0, LOGIT_SOFTCAP=0, LEAKY_SLOPE=0,
         ROPE_DIMS=0, ROPE_NTK_REFERENCE=0, MUDD=0)]


@pytest.fixture
def float64(monkeypatch):
    """Rotary tables, logits and rounding, which ask for fp32, get float64, to compare digits."""
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x.double())


def compare_with_reference(s, **arguments):
    model, rows = randomized(s, dtype=torch.float64), random_rows(s)
    params = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    given_nll = model(rows[:, :-1], rows[:, 1:], **arguments)
    expected = torch.stack([reference(params, s, row[:-1], row[1:], **arguments)
                            for row in rows.tolist()])
    torch.testing.assert_close(given_nll, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1),
                          dtype=torch.float64)
    (given_nll * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, p in model.named_parameters():
        grad = params[name].grad
        assert (grad is not None and p.grad is not None
                and grad.norm() > 0), f"{name} has no gradient"
        if name.startswith("cores."):  # the mean over the blocks that share a core
            grad = grad / len(range(int(name.split(".")[1]), s.num_layers, s.cores))
        assert (p.grad - grad).norm() <= 1e-9 * grad.norm(), name


@pytest.mark.parametrize("variables", VARIANTS,
                         ids=lambda v: "-".join(f"{k}_{x}" for k, x in v.items())[:60] or "default")
def test_nll_and_gradients_equal_the_reference(tiny, float64, variables):
    compare_with_reference(tiny(**variables))


@torch.no_grad()
def test_masks_are_made_once_for_all_blocks(tiny):
    """So that compiled code makes none."""
    s, calls = tiny(NUM_LAYERS=3, LATE_PASSES="0-2,1-2"), []

    def visible(*arguments):
        calls.append(arguments)
        return train_gpt.visible_mask(*arguments)
    model, rows = a_model(s, visible=visible), random_rows(s)
    model(rows[:, :-1], rows[:, 1:], band=3)
    assert len(calls) == 1


@pytest.mark.parametrize("skips", ["1", "gated"])
def test_before_late_passes_blocks_run_once_in_order(tiny, float64, skips):
    """The rows of skips are then those of the shorter list."""
    compare_with_reference(tiny(NUM_LAYERS=4, LATE_PASSES="0-2,1-2,3", UNET_SKIPS=skips,
                                PARALLEL="lanes", PARALLEL_FROM=2, MUDD=1), late=False)


@pytest.mark.parametrize("documents, how", [
    (0, dict(band=3)), (1, dict(band=3)), (1, dict(band=4, segment=torch.tensor(6)))])
def test_bands_and_segments_equal_the_reference(tiny, float64, documents, how):
    compare_with_reference(tiny(DOC_ATTENTION=documents), **how)


@torch.no_grad()
def test_softcap_and_nll_of_a_bf16_model_are_fp32(tiny):
    """Only the product with the token table is rounded to bf16; a score is exact behind it."""
    s = tiny()
    model, rows = randomized(s), random_rows(s)
    model.dtype, x, y = torch.bfloat16, rows[:, :-1], rows[:, 1:]
    logits, nll = model.logits(x), model(x, y)
    model.s = train_gpt.replace(s, logit_softcap=0.0)
    raw = model.logits(x)
    assert raw.dtype == logits.dtype == nll.dtype == torch.float32
    assert raw.equal(raw.bfloat16().float()), "the model is not in bf16"
    exact = s.logit_softcap * torch.tanh(raw.double() / s.logit_softcap)
    exact_nll = -exact.log_softmax(-1).gather(2, y[..., None])[..., 0]
    for got, wanted in ((logits, exact), (nll, exact_nll)):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-5)


@torch.no_grad()
def test_mixers_do_not_learn_from_rounding_errors(tiny):
    """With the initial weights all passes return multiples of x₀, and no mix of them changes what
    the last norm returns: the exact gradient is 0."""
    s = tiny(MUDD=1, PARALLEL="lanes", PARALLEL_FROM=1)
    model, rows = train_gpt.GPT(s), random_rows(s)
    train_gpt.init_weights(model, s)
    for moved in (False, True):
        with torch.enable_grad():
            model(rows[:, :-1], rows[:, 1:]).sum().backward()
        for mixer in model.mixers:
            assert mixer.write.grad.any() == mixer.bias.grad.any() == moved
        model.cores[0].mlp.down.normal_(std=0.1)


@pytest.mark.parametrize("variables", [
    dict(NUM_LAYERS=4, LATE_PASSES="0-2,1-2,3", PARALLEL="lanes", PARALLEL_FROM=2, VE_LAYERS="",
         SMEAR_GATE="embed", UNET_SKIPS="gated", GATED_ATTENTION="sparse"),
    dict(PARALLEL="one", PARALLEL_FROM=1, NUM_KV_HEADS=1)])
def test_adapters_add_to_each_row_its_own_matrices(tiny, float64, variables):
    """B·A beside attention and MLP, and for the logits; gradients of both. Nothing where B is 0."""
    s, generator = tiny(**variables), torch.Generator().manual_seed(5)
    model, rows = randomized(s, dtype=torch.float64), random_rows(s)
    params = {name: p.detach() for name, p in model.named_parameters()}
    given = rows[:, :-1], rows[:, 1:]
    pairs = [tuple(0.3 * torch.randn(2, *shape, generator=generator, dtype=torch.float64)
                   for shape in ((3, D), (R, 3))) for R, D in model.adapter_shapes()]
    leaves = [x.requires_grad_() for pair in pairs for x in pair]

    def flat(pairs, sharpness=0.0):
        rest = torch.zeros(2, train_gpt.AFTER_PAIRS, dtype=torch.float64)
        rest[:, -1] = sharpness
        return torch.cat([*(x.flatten(1) for pair in pairs for x in pair), rest], 1)
    nll = model(*given, adapters=flat(pairs))
    expected = torch.stack([reference(params, s, row[:-1], row[1:],
                                      added=[b[n] @ a[n] for a, b in pairs])
                            for n, row in enumerate(rows.tolist())])
    torch.testing.assert_close(nll, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    for mine, slow in zip(*(torch.autograd.grad((x * weights).sum(), leaves)
                            for x in (nll, expected))):
        assert slow.flatten(1).norm(dim=1).min() > 0 and (mine - slow).norm() <= 1e-9 * slow.norm()
    nothing = [(a, 0 * b) for a, b in pairs]
    assert torch.equal(model(*given, adapters=flat(nothing)), model(*given))
    sharper = torch.tensor([0.3, -0.2], dtype=torch.float64)
    logits = model.logits(given[0]) * (1 + sharper[:, None, None])
    torch.testing.assert_close(
        model(*given, adapters=flat(nothing, sharper)),
        logits.logsumexp(-1) - logits.gather(-1, given[1][..., None])[..., 0])
    assert (nll - model(*given)).abs().min() > 1e-6


def test_rotary_tables_are_exact_where_long_rows_end():
    """In fp32, of angles in float64; the published shape."""
    cos, sin = train_gpt.rotary_tables(Settings(rope_ntk_reference=1024), 2048)
    angle = 2047 * (10000 * 2 ** (16 / 14)) ** (-torch.arange(8, dtype=torch.float64) / 8)
    assert cos.shape == sin.shape == (2048, 8) and cos.dtype == torch.float32
    assert (cos[-1] - angle.cos()).abs().max() < 1e-7 > (sin[-1] - angle.sin()).abs().max()


# -- settings that are let through

@hypothesis_settings(deadline=None, database=None, max_examples=60,
                     suppress_health_check=list(HealthCheck))
@given(st.fixed_dictionaries(dict(
    MODEL_DIM=st.sampled_from([8, 12, 16]), NUM_HEADS=st.sampled_from([1, 2, 4, 8]),
    NUM_KV_HEADS=st.just(1), ROPE_DIMS=st.sampled_from([0, 0, 2, 4]),
    ROPE_NTK_REFERENCE=st.sampled_from([0, 16, 64]), NUM_LAYERS=st.integers(1, 4),
    UNIQUE_LAYERS=st.integers(0, 1), XSA_LAST_N=st.integers(0, 1),
    VE_LAYERS=st.sampled_from(["", "0"]), VE_DIM=st.sampled_from([1, 20]),
    BIGRAM_VOCAB_SIZE=st.sampled_from([0, 2, 3]), BIGRAM_DIM=st.sampled_from([1, 20]),
    MLP_MULT=st.sampled_from([0.125, 0.3, 16]), LOGIT_SOFTCAP=st.sampled_from([0, 1e-3, 30]),
    SMEAR_GATE=st.sampled_from(["0", "1", "bos"]), UNET_SKIPS=st.integers(0, 1),
    VALUE_RESIDUAL=st.sampled_from(["0", "pair", "sigmoid"]))))
def test_settings_that_pass_the_checks_make_a_model_that_runs(tiny, variables):
    """What cannot work is refused by name before, not by a traceback from inside the model."""
    try:
        s = tiny(**variables)
    except UserError:
        return
    model, rows = a_model(s), random_rows(s)
    assert model(rows[:, :-1], rows[:, 1:]).isfinite().all()


# -- kinds and initial weights

@pytest.mark.parametrize("name", ["blocks.3.router", "lm_head.weight", "cores.0.attn.v2",
                                  "cores.0.attn.q.extra"])
def test_a_parameter_that_no_row_declares_raises_everywhere(tiny, name):
    """It does not become fp16 under AdamW without a word."""
    s = tiny()
    model = a_model(s)
    model.named_parameters = lambda *a, **k: iter([(name, torch.nn.Parameter(torch.ones(3, 3)))])
    for consumer in (lambda: init_weights(model, s),
                     lambda: train_gpt.training_optimizers(model, s, train_gpt.Runtime(s)),
                     lambda: train_gpt.Quantizer({name: torch.ones(3, 3)}, s),
                     lambda: train_gpt.ttt_factor(name, s)):
        with pytest.raises(LookupError, match=re.escape(name)):
            consumer()


def initialized(s, seed=0):
    torch.manual_seed(seed)
    model = GPT(s)
    init_weights(model, s)
    return dict(model.named_parameters())


def test_initial_weights(tiny):
    """Orthogonal matrices, zero outputs, narrow tables, and scales at their published values."""
    s = tiny(VOCAB_SIZE=4000, NUM_LAYERS=4, QK_GAIN_INIT=2.5, MUDD=1)
    params, identity = initialized(s), torch.eye
    constants = {"q_gain": 2.5, "gate_weight": 0, "gate_bias": 4, "attn_scale": 1, "mlp_scale": 1,
                 "value_residual": 0.5, "smear": 0, "skip_weights": 1, "bigram.scale": 0.05,
                 "ve.scale": 0.1, "block_scales": 1, "bigram.table": 0, ".o": 0, ".down": 0,
                 ".write": 0, ".bias": 0}
    for name, p in params.items():
        constant = next((value for end, value in constants.items() if name.endswith(end)), None)
        if constant is not None:
            assert torch.equal(p, torch.full_like(p, constant)), name
        elif name.endswith("resid_mix"):
            assert torch.equal(p, torch.stack((torch.ones(32), torch.zeros(32)))), name
        elif name.endswith((".q", ".k", ".v", ".up", ".proj", ".read")):
            small = p @ p.T if p.size(0) <= p.size(1) else p.T @ p
            gain = 1 / (2 * 4) if name.endswith(".proj") else 1.0  # (1/√(2L))²
            assert torch.allclose(small, gain * identity(len(small)), atol=1e-5), name
        else:
            std = {"tok_emb": 0.005, "ve.table": 0.01}[name]
            assert p.std().item() == pytest.approx(std, rel=0.03) and abs(p.mean()) < 2e-4, name


def test_exclusive_attention_takes_nothing_away_for_a_value_of_zero():
    y, v, gate = torch.randn(1, 1, 6, 8), torch.zeros(1, 1, 3, 8), torch.rand(1, 1, 6)
    inputs = [x.requires_grad_() for x in (y, v, gate)]
    out = train_gpt.GatedXSA.apply(*inputs)
    torch.testing.assert_close(out, y * gate[..., None])
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)


# -- attention back ends

@pytest.mark.parametrize("name", ["fa3", "fa4", "fa2", "cudnn"])
def test_absent_attention_is_refused_by_name(tiny, name):
    with pytest.raises(UserError, match=f"ATTENTION={name}: not installed, or its attention not r"):
        train_gpt.choose_kernels(tiny(ATTENTION=name), CPU)


class DetachedValue(torch.autograd.Function):
    """Right forwards, wrong backwards: the gradient of V is doubled."""
    @staticmethod
    def forward(ctx, v):
        return v.clone()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def attend_all(q, k, v, causal):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return y.transpose(1, 2)


def attend_interleaved(q, k, v, causal):
    """Query head h with key head h mod K instead of h // G."""
    return sdpa(q, *(x.repeat(1, 1, q.size(2) // x.size(2), 1) for x in (k, v)))


def refuse(q, k, v, causal):
    raise RuntimeError("no kernel image is available for execution on the device")


WRONG = {"not causal": attend_all, "other grouping": attend_interleaved, "no kernel": refuse,
         "scaled": lambda q, k, v, causal: sdpa(1.1 * q, k, v),
         "nan": lambda q, k, v, causal: sdpa(q, k, v) * math.nan,
         "wrong gradient": lambda q, k, v, causal: sdpa(q, k, DetachedValue.apply(v)),
         "no gradient": lambda q, k, v, causal: sdpa(q, k, v).detach(),
         "no such argument": lambda q, k, v: sdpa(q, k, v)}
WRONG_IN_A_WINDOW = {"no window": lambda q, k, v, causal: sdpa(q, k, v),
                     "window ignored": lambda q, k, v, causal, window_size=0: sdpa(q, k, v),
                     "one key too many": lambda q, k, v, causal, window_size=(-2, 0): sdpa(
                         q, k, v, window_size[0] + 2)}


def install(monkeypatch, attend=refuse, varlen=refuse):
    """A package of FlashAttention 3 with these functions."""
    package = ModuleType("flash_attn_interface")
    package.flash_attn_func, package.flash_attn_varlen_func = attend, varlen
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)


def choose(tiny, **variables):
    """(name of the attention that a GPU would get, the Kernels, lines of the log)."""
    rt = a_rank("cuda")
    names, kernels = train_gpt.choose_kernels(tiny(**variables), rt)
    return names["attention"], kernels, rt.lines


WHOLE_ROWS = dict(DOC_ATTENTION=0, EVAL_ATTENTION="window")


@pytest.mark.parametrize("case", WRONG)
def test_wrong_flash_attention_is_rejected(tiny, monkeypatch, case):
    install(monkeypatch, WRONG[case])
    assert choose(tiny, **WHOLE_ROWS)[0] != "fa3"


@pytest.mark.parametrize("case", WRONG_IN_A_WINDOW)
def test_a_kernel_that_is_wrong_in_a_window_is_for_whole_rows_alone(tiny, monkeypatch, case):
    install(monkeypatch, WRONG_IN_A_WINDOW[case])
    assert choose(tiny, **WHOLE_ROWS)[0] == "fa3"
    name, _, lines = choose(tiny, DOC_ATTENTION=0)
    assert name != "fa3" and lines[0].startswith("attention: not fa3: ")


@pytest.mark.parametrize("result", [lambda y: y, lambda y: (y, None),
                                    lambda y: y + 1e-4 * torch.randn_like(y)])
def test_right_flash_attention_is_accepted(tiny, monkeypatch, result):
    """Some versions return (output, log-sum-exp); rounding of another kernel is no error."""
    def attend(q, k, v, causal, window_size=(-1, -1)):
        assert causal is True and window_size[1] in (-1, 0)
        return result(sdpa(q, k, v, window_size[0] + 1))
    install(monkeypatch, attend)
    assert choose(tiny, DOC_ATTENTION=0)[0] == "fa3"


def varlen(q_NHE, k_NKE, v_NKE, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal,
           window_size=(-1, 0)):
    """FlashAttention's variable lengths, one sequence after the other; empty ones are none."""
    assert causal and max_seqlen_q == max_seqlen_k
    assert cu_seqlens_q[0] == 0 and cu_seqlens_q[-1] == len(q_NHE)
    assert cu_seqlens_q.diff().min() >= 0 and cu_seqlens_q.diff().max() <= max_seqlen_q
    parts = [sdpa(*(x[a:b][None] for x in (q_NHE, k_NKE, v_NKE)), window_size[0] + 1)[0]
             for a, b in zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist()[1:]) if a < b]
    return torch.cat(parts), None


def test_flash_attention_ends_at_documents_by_variable_lengths(tiny, monkeypatch):
    install(monkeypatch, varlen=varlen)
    name, kernels, _ = choose(tiny, DOC_ATTENTION=1)
    assert name == "fa3"
    q, k, v = (torch.randn(3, 40, heads, 8) for heads in (4, 2, 2))
    starts = torch.zeros(3, 40, dtype=torch.bool)
    starts[0, 0] = starts[1, 9] = starts[2, 39] = True
    for window in (0, 7):
        y = kernels.attend(q, k, v, kernels.visible(q, window, starts))
        torch.testing.assert_close(y, sdpa(q, k, v, window, starts))
    full, place = torch.zeros(32, 3072, dtype=torch.bool), torch.arange(98304).view(32, 3072)
    full[:, ::1024], full[place % 800 == 399] = True, True  # segments and documents of long rows
    borders = kernels.visible(full[..., None], 0, full)[1]
    assert set(place[full].tolist()) <= set(borders.tolist())
    many = torch.ones(3, 40, dtype=torch.bool)  # more than 64: joined inside of their rows
    y = kernels.attend(q, k, v, kernels.visible(q, 0, many))
    torch.testing.assert_close(y[0], sdpa(q, k, v, 0, many)[0])
    torch.testing.assert_close(y[2], sdpa(q, k, v)[2])


def documents_meet(how):
    rows = torch.tensor([0, 1024, 2048])
    return {**how, "cu_seqlens_q": rows, "cu_seqlens_k": rows}


@pytest.mark.parametrize("wrong", [
    documents_meet, lambda how: {**how, "window_size": (-1, 0)},
    lambda how: {**how, "window_size": (how.get("window_size", (-2, 0))[0] + 1, 0)}],
    ids=["documents meet", "no window", "one key too many"])
def test_a_kernel_that_is_wrong_in_documents_is_refused(tiny, monkeypatch, wrong):
    install(monkeypatch, varlen=lambda *x, **how: varlen(*x, **wrong(how)))
    name, _, lines = choose(tiny, DOC_ATTENTION=1)
    assert name != "fa3" and "attention: not fa3: gives another result" in lines


@pytest.fixture
def pytorchs_flash(monkeypatch):
    """PyTorch's operator, computed by others on a CPU; its own one sees the shapes of each call."""
    operator = torch.ops.aten._flash_attention_forward

    def forward(q, k, v, borders, borders_k, rows, rows_k, dropout, causal, debug, **window):
        operator(*(x.to("meta") for x in (q, k, v)), borders, borders_k, rows, rows_k, dropout,
                 causal, debug, **window)
        assert not dropout and not debug
        sides = window["window_size_left"], window["window_size_right"]
        if borders is None:
            return sdpa(q, k, v, sides[0] + 1), None
        return varlen(q, k, v, borders, borders_k, rows, rows_k, causal, sides)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)


def test_pytorchs_flash_takes_bands_and_documents(tiny, pytorchs_flash):
    """Without a package: the right keys and gradients, and the choice for documents."""
    flash = attend_by("flash")
    starts = torch.zeros(3, 40, dtype=torch.bool)
    starts[0, 0] = starts[1, 9] = starts[2, 39] = True
    inputs = [torch.randn(3, 40, heads, 8, requires_grad=True) for heads in (4, 2, 2)]

    def outcome(kernel, *how):
        y = kernel(*inputs, *how)
        return [y, *torch.autograd.grad(y.sin().sum(), inputs)]
    for how in (), (7,), (0, starts), (7, starts):
        for a, b in zip(outcome(flash, *how), outcome(sdpa, *how), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    name, _, lines = choose(tiny, DOC_ATTENTION=1)
    assert name == "flash" and not [line for line in lines if "slow" in line]


def test_the_first_kernel_that_is_right_is_taken_every_time(tiny, monkeypatch, pytorchs_flash):
    """fa3 computes something else, cuDNN raises: auto takes flash, twice, and says why."""
    install(monkeypatch, attend_all)
    for _ in range(2):
        name, _, (of_fa3, of_cudnn, of_mlp) = choose(tiny, **WHOLE_ROWS)
        assert name == "flash" and of_fa3.startswith("attention: not fa3: gives another result")
        assert of_cudnn.startswith("attention: not cudnn: RuntimeError: ")
        assert of_mlp == "mlp: not triton: needs Triton, COMPILE=1 and whole tiles"
    with pytest.raises(UserError, match="ATTENTION=fa3"):
        choose(tiny, ATTENTION="fa3")


def test_a_kernel_must_be_right_on_every_rank():
    rt, x = a_rank(), torch.randn(64, requires_grad=True)
    rt.any_rank = lambda why: True
    assert train_gpt.first_right("mlp", {"triton": lambda x: 2 * x}, lambda x: 2 * x, [x], rt) == ""
    assert rt.lines == ["mlp: not triton: unusable on another rank"]


def test_pytorchs_kernels_fall_back_on_others_unless_strict():
    q, k, v = (torch.randn(2, 24, heads, 8) for heads in (4, 2, 2))
    attend, strict = (attend_by("cudnn", strict) for strict in (False, True))
    for window in (0, 5):
        torch.testing.assert_close(attend(q, k, v, window), sdpa(q, k, v, window))
    with pytest.raises(RuntimeError):  # there is no such kernel here
        strict(q, k, v)
    starts = (torch.arange(24) % 7 == 3)[None]
    for kernel in (attend, strict):
        torch.testing.assert_close(kernel(q, k, v, 0, starts), sdpa(q, k, v, 0, starts))


