"""The Triton kernels, interpreted, against the plain functions in float64, gradients included, and inside of a compiled model."""

import functools
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, clean_environ
from functorch.compile import make_boxed_func
from hypothesis import example, given, settings as hypothesis_settings, strategies as st
from torch._dynamo.backends.common import aot_autograd

import train_gpt
from train_gpt import UserError, leaky_square_mlp, softcap_nll, triton_mlp, triton_nll

pytest.importorskip("triton")
MLP_TILES, OPERATORS = train_gpt.MLP_TILES, getattr(torch.ops, train_gpt.OPERATORS)
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
@example(rows=300, tile=0, slope=0.5, half=False, seed=0)  # more tiles than a group has
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
       dtype=st.sampled_from([torch.float32, torch.bfloat16]), size=st.sampled_from([1, 40]),
       seed=st.integers(0, 99))
def test_the_loss_kernel_is_the_plain_loss(rows, vocabulary, softcap, dtype, size, seed):
    """Vocabularies that are no power of two, logits far beyond the cap, a gradient that differs from row to row."""
    generator = torch.Generator().manual_seed(seed)
    logits = (size * torch.randn(rows, vocabulary, generator=generator)).to(dtype)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    mine = weighted(triton_nll(), [logits, targets], softcap)
    assert mine[0].dtype == torch.float32 and mine[1].dtype == dtype
    exact = in_float64(lambda z, t, cap: -torch.log_softmax(cap * torch.tanh(z / cap) if cap else z, -1)[
        torch.arange(len(z)), t], [logits, targets], softcap)
    torch.testing.assert_close(mine[0].double(), exact[0], rtol=1e-5, atol=2e-5)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    # fp32 has no slope where the cap saturates
    small = 1e-7 + tolerance * float(exact[1].abs().max())
    torch.testing.assert_close(mine[1].double(), exact[1], rtol=tolerance, atol=small)
    plain = weighted(softcap_nll, [logits.float(), targets], softcap)
    torch.testing.assert_close(plain[0].double(), exact[0], rtol=1e-5, atol=2e-5)


def test_inputs_of_any_layout_are_taken():
    """Slices and transposes, as a model may hand them in."""
    u, up, down = torch.randn(20, 40)[:, 4:36], torch.randn(32, 64).mT / 8, torch.randn(64, 32).mT / 8
    for a, b in zip(weighted(functools.partial(triton_mlp(), tile=0), [u, up, down], 0.5),
                    in_float64(leaky_square_mlp, [u, up, down], 0.5), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
    logits, targets = torch.randn(7, 60)[:, 3:53], torch.randint(50, (14,))[::2]
    for a, b in zip(weighted(triton_nll(), [logits, targets], 5.0), in_float64(softcap_nll, [logits, targets], 5.0)):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_only_wanted_gradients_are_made(wanted):
    """Test-time training freezes matrices; a product for them would be time lost."""
    tensors = [torch.randn(20, 32), torch.randn(64, 32) / 8, torch.randn(32, 64) / 8]
    for i in wanted:
        tensors[i].requires_grad_()
    made = []

    class Operators(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend(x.numel() for x in out) if func is OPERATORS.mlp_backward.default else None
            return out
    y = triton_mlp()(*tensors, 0.5, 0)
    with Operators():
        mine = torch.autograd.grad(y.sum(), [tensors[i] for i in wanted])
    assert made == [x.numel() if i in wanted else 0 for i, x in enumerate(tensors)]
    for a, b in zip(mine, torch.autograd.grad(leaky_square_mlp(*tensors, 0.5).sum(), [tensors[i] for i in wanted])):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


FOR_A_HOPPER = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import triton, train_gpt as T
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def shared(kernel, pointers, scalars, constants, warps, stages):
    signature = {{**{{name: f"*{{kind}}" for name, kind in pointers.items()}}, **scalars, **{{name: "constexpr" for name in constants}}}}
    source = ASTSource(kernel, signature, {{(kernel.arg_names.index(name),): value for name, value in constants.items()}})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=warps, num_stages=stages)).metadata.shared

for BM, BN, BK, warps, stages in T.MLP_TILES:
    for backward in (False, True):
        n = shared(T.leaky_square_kernel, dict.fromkeys(("a", "b", "h", "out"), "bf16"),
                   dict(rows="i32", B_COLUMN="i32", B_DEPTH="i32"), dict(
                   SLOPE=0.5, BACKWARD=backward, N=1536, K=512, BM=BM, BN=BN, BK=BK, GROUP=8), warps, stages)
        print("mlp", BM, BN, backward, n)
for softcap in (0.0, 30.0):
    for backward in (False, True):
        pointers = dict(logits="bf16", targets="i64", nll="fp32", lse="fp32", grad="fp32", out="bf16" if backward else "fp32")
        print("nll", softcap, backward, shared(T.softcap_nll_kernel, pointers, dict(), dict(
              SOFTCAP=softcap, BACKWARD=backward, V=1024, BLOCK=1024), 4, 3))
"""


def test_every_kernel_compiles_for_a_hopper():
    """Triton's compiler needs no GPU, and refuses what its interpreter lets pass. No tile needs more memory than a block may have."""
    environ = {k: v for k, v in clean_environ().items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", FOR_A_HOPPER], env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 2 * len(MLP_TILES) + 4 and all(int(line[-1]) <= 227 * 1024 for line in lines)


def test_operators_tell_compilers_the_truth():
    """Shapes and types without running, gradients, no hidden aliasing: PyTorch's own checks."""
    u, up, down = torch.randn(20, 32, requires_grad=True), torch.randn(64, 32, requires_grad=True), torch.randn(32, 64, requires_grad=True)
    triton_mlp(), triton_nll()
    torch.library.opcheck(OPERATORS.mlp.default, (u, up, down, 0.5, 0))
    logits, targets = torch.randn(6, 50, requires_grad=True), torch.randint(50, (6,))
    torch.library.opcheck(OPERATORS.nll.default, (logits, targets, 30.0))


@pytest.mark.slow
def test_a_compiled_model_computes_with_kernels_what_it_does_without(tiny):
    """The same loss and gradients; nothing breaks the graph. An eager pass takes the plain functions."""
    s = tiny(MLP_MULT=2, COMPILE=1, KERNELS="triton", TRAIN_BATCH_TOKENS=64, MICRO_BATCH_TOKENS=64, NUM_LAYERS=2, XSA_LAST_N=2,
             VE_LAYERS="1")
    rt = train_gpt.Runtime(s)
    lines = []
    rt.log = lines.append
    names, pieces = train_gpt.choose_pieces(s, rt)
    assert names == dict(attention="sdpa", windows="blocks", mlp="triton", nll="triton") and not lines
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
    assert names == dict(attention="sdpa", windows="blocks", mlp="plain", nll="plain") and pieces.now() == train_gpt.PLAIN


@pytest.mark.parametrize("kernels, whole", [("triton", False), ("plain", True)])
@pytest.mark.slow
def test_fp32_logits_of_a_whole_batch_never_exist(tiny, kernels, whole):
    """With the kernel, in bf16, in neither graph of the compiled model; the plain loss shows that the test would see them."""
    s = tiny(MLP_MULT=1.25, COMPILE=1, KERNELS=kernels, NUM_LAYERS=2, XSA_LAST_N=2, VE_LAYERS="1")
    rt = train_gpt.Runtime(s)
    rt.dtype = torch.bfloat16
    model, _ = train_gpt.build_model(s, rt)
    tokens, seen, graphs = torch.randint(s.vocab_size, (3, 33)), set(), []

    def look(graph, inputs):
        graphs.append(graph)
        for node in graph.graph.nodes:
            torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: seen.add((tuple(x.shape), x.dtype)), node.meta.get("val"))
        return make_boxed_func(graph.forward)
    forward = torch.compile(model, fullgraph=True, dynamic=False, backend=aot_autograd(fw_compiler=look, bw_compiler=look))
    forward(tokens[:, :-1], tokens[:, 1:]).sum().backward()
    logits = {dtype for shape, dtype in seen if shape in ((96, s.vocab_size), (3, 32, s.vocab_size))}
    assert len(graphs) == 2 and torch.bfloat16 in logits and (torch.float32 in logits) == whole
