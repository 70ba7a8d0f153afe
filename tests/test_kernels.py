"""The Triton kernels, interpreted, against the plain functions in float64, gradients included, and inside of a compiled model."""

import functools
import re

import pytest
import torch
from hypothesis import given, settings as hypothesis_settings, strategies as st

import train_gpt
from train_gpt import UserError, leaky_square_mlp, softcap_nll, triton_mlp, triton_nll

pytest.importorskip("triton")
SMALL_TILES = ((16, 32, 16, 4, 2), (32, 16, 32, 4, 2))  # a CPU waits for each of them


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(train_gpt, "MLP_TILES", SMALL_TILES)


def in_float64(function, tensors, *constants):
    """function's result, and the gradient of a fixed weighted sum of it, computed in float64."""
    return weighted(function, [x.detach().double() if x.is_floating_point() else x for x in tensors], *constants)


def weighted(function, tensors, *constants):
    wanted = [x.requires_grad_() for x in tensors if x.is_floating_point()]
    y = function(*tensors, *constants)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), wanted)]


@hypothesis_settings(max_examples=12)
@given(rows=st.integers(1, 70), tile=st.sampled_from([0, 1]), slope=st.sampled_from([0.0, 0.5, 0.75, 1.0]),
       half=st.booleans(), seed=st.integers(0, 99))
def test_the_mlp_kernel_is_the_plain_mlp(rows, tile, slope, half, seed):
    """Rows that fill no tile as well; in fp16 the errors are those of rounding."""
    generator = torch.Generator().manual_seed(seed)
    u, up, down = (torch.randn(shape, generator=generator) / 8 for shape in ((rows, 32), (64, 32), (32, 64)))
    u = 8 * u
    if half:
        u, up, down = (x.half() for x in (u, up, down))
    mine = weighted(functools.partial(triton_mlp(), tile=tile), [u, up, down], slope)
    for a, b in zip(mine, in_float64(leaky_square_mlp, [u, up, down], slope), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-2 if half else 1e-5, atol=(1e-2 if half else 1e-5) * float(b.abs().max() + 1e-9))


@hypothesis_settings(max_examples=25)
@given(rows=st.integers(1, 9), vocabulary=st.sampled_from([2, 3, 64, 100, 1024]), softcap=st.sampled_from([0.0, 5.0, 30.0]),
       temperature=st.sampled_from([0.5, 1.0, 2.0]), dtype=st.sampled_from([torch.float32, torch.bfloat16]), size=st.sampled_from([1, 40]),
       seed=st.integers(0, 99))
def test_the_loss_kernel_is_the_plain_loss(rows, vocabulary, softcap, temperature, dtype, size, seed):
    """Vocabularies that are no power of two, logits far beyond the cap, a gradient that differs from row to row."""
    generator = torch.Generator().manual_seed(seed)
    logits = (size * torch.randn(rows, vocabulary, generator=generator)).to(dtype)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    mine = weighted(triton_nll(), [logits, targets], softcap, temperature)
    assert mine[0].dtype == torch.float32 and mine[1].dtype == dtype
    exact = in_float64(lambda z, t, cap, temperature: -torch.log_softmax((cap * torch.tanh(z / cap) if cap else z) / temperature, -1)[
        torch.arange(len(z)), t], [logits, targets], softcap, temperature)
    torch.testing.assert_close(mine[0].double(), exact[0], rtol=1e-5, atol=2e-5)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(mine[1].double(), exact[1], rtol=tolerance, atol=tolerance * float(exact[1].abs().max()))
    plain = weighted(softcap_nll, [logits.float(), targets], softcap, temperature)
    torch.testing.assert_close(plain[0].double(), exact[0], rtol=1e-5, atol=2e-5)


def test_operators_tell_compilers_the_truth():
    """Shapes and types without running, gradients, no hidden aliasing: PyTorch's own checks."""
    u, up, down = torch.randn(20, 32, requires_grad=True), torch.randn(64, 32, requires_grad=True), torch.randn(32, 64, requires_grad=True)
    triton_mlp(), triton_nll()
    torch.library.opcheck(torch.ops.golf.mlp.default, (u, up, down, 0.5, 0))
    logits, targets = torch.randn(6, 50, requires_grad=True), torch.randint(50, (6,))
    torch.library.opcheck(torch.ops.golf.nll.default, (logits, targets, 30.0, 1.0))


def test_a_compiled_model_computes_with_kernels_what_it_does_without(tiny):
    """The same loss and gradients; nothing breaks the graph. An eager pass takes the plain functions."""
    s = tiny(MLP_MULT=2, COMPILE=1, KERNELS="triton", TRAIN_BATCH_TOKENS=64, MICRO_BATCH_TOKENS=64, NUM_LAYERS=2, XSA_LAST_N=2,
             VE_LAYERS="1")
    rt = train_gpt.Runtime(s)
    lines = []
    rt.log = lines.append
    names, pieces = train_gpt.choose_pieces(s, rt)
    assert names["mlp"].startswith("triton") and names["nll"] == "triton" and names["attention"] == "sdpa"
    assert re.fullmatch(r"fastest: triton16x32:\S+ms triton32x16:\S+ms", lines[-1])
    model, _ = train_gpt.build_model(s, rt)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    tokens = torch.randint(s.vocab_size, (2, 33))
    calls, kernel = [], train_gpt.softcap_nll_kernel

    def outcomes(forward):
        nll = forward(tokens[:, :-1], tokens[:, 1:])
        return [nll.detach(), *torch.autograd.grad(nll.sum(), list(model.parameters()))]
    train_gpt.softcap_nll_kernel = type("Spy", (), {"__getitem__": lambda self, grid: calls.append(grid) or kernel[grid]})()
    try:
        eager = outcomes(model)
        assert not calls, "an eager pass needs every product to be seen"
        compiled = outcomes(torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager"))
        assert calls
    finally:
        train_gpt.softcap_nll_kernel = kernel
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max() + 1e-6))


def test_kernels_that_cannot_run_are_refused_by_name(tiny, monkeypatch):
    for variables, word in ((dict(COMPILE=0), "COMPILE=0"), (dict(COMPILE=1), "here: cpu")):
        s = tiny(KERNELS="triton", **variables)
        if variables["COMPILE"] == 1:
            monkeypatch.setattr(train_gpt, "triton", None)
        with pytest.raises(UserError, match=f"KERNELS=triton.*{word}"):
            train_gpt.choose_pieces(s, train_gpt.Runtime(s))


def test_a_width_that_fills_no_tile_keeps_the_plain_mlp(tiny):
    """The kernel reads whole tiles of columns; D = 32 and 40 hidden units are none of these."""
    s = tiny(MLP_MULT=1.25, COMPILE=1, KERNELS="triton")
    names, pieces = train_gpt.choose_pieces(s, train_gpt.Runtime(s))
    assert names["mlp"] == "plain" and pieces.mlp is leaky_square_mlp and names["nll"] == "triton"


def test_nothing_is_raced_without_a_gpu(tiny):
    """KERNELS=auto on a CPU, interpreter or not, takes the plain functions and measures nothing."""
    s = tiny(COMPILE=1)
    rt = train_gpt.Runtime(s)
    rt.log = lambda line: pytest.fail(line)
    names, pieces = train_gpt.choose_pieces(s, rt)
    assert names == dict(attention="sdpa", mlp="plain", nll="plain") and pieces.now() == train_gpt.PLAIN
