"""The Triton kernels, interpreted, against the plain functions in float64; compiled; chosen."""

import json
import subprocess
import sys
from unittest import mock

import pytest
import torch
from conftest import ROOT, a_model, a_rank, clean_environ, environment
from hypothesis import example, given, settings as hypothesis_settings, strategies as st

import train_gpt
from train_gpt import MLP_TILE, LeakySquareMLP, UserError, leaky_square_mlp

pytest.importorskip("triton")
triton_mlp = LeakySquareMLP.apply
# Small: an interpreter takes time for each.
SMALL_TILES = [dict(BM=16, BN=32, BK=16, GROUP=8), dict(BM=32, BN=16, BK=32, GROUP=2)]


@pytest.fixture(autouse=True)
def small_tile(monkeypatch):
    monkeypatch.setattr(train_gpt, "MLP_TILE", SMALL_TILES[0])


def in_float64(function, tensors, *constants):
    """function's result, and the gradient of a fixed weighted sum of it, computed in float64."""
    return weighted(function, [x.detach().double() if x.is_floating_point() else x
                               for x in tensors], *constants)


def weighted(function, tensors, *constants):
    wanted = [x.requires_grad_() for x in tensors if x.is_floating_point()]
    y = function(*tensors, *constants)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), wanted)]


@hypothesis_settings(max_examples=12)
@example(rows=300, tile=SMALL_TILES[0], slope=0.5, kind=(torch.float32, 1e-5), seed=0)  # 3 groups
@given(rows=st.integers(1, 70), tile=st.sampled_from(SMALL_TILES),
       slope=st.sampled_from([0.0, 0.5, 0.75, 1.0]), seed=st.integers(0, 99),
       kind=st.sampled_from([(torch.float32, 1e-5), (torch.float16, 1e-2)]))
def test_the_mlp_kernel_is_the_plain_mlp(rows, tile, slope, kind, seed):
    """Rows that fill no tile as well, and transposes; in 16 bits the errors are those of rounding.
    Triton's interpreter cannot multiply bfloat16."""
    dtype, tolerance = kind
    generator = torch.Generator().manual_seed(seed)
    u, up, down = (torch.randn(shape, generator=generator) / 8
                   for shape in ((rows, 32), (64, 32), (32, 64)))
    u, up, down = (x.to(dtype) for x in (8 * u, up, down))
    if seed % 2:
        u, up, down = (x.mT.contiguous().mT for x in (u, up, down))
    with mock.patch.object(train_gpt, "MLP_TILE", tile):
        mine = weighted(triton_mlp, [u, up, down], slope)
    for a, b in zip(mine, in_float64(leaky_square_mlp, [u, up, down], slope), strict=True):
        small = tolerance * float(b.abs().max() + 1e-9)
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=small)


def test_an_activation_is_rounded_to_a_number_whose_last_bit_is_the_sign_of_its_input():
    """In fp16: within a unit in the last place, as often too large as too small; NaN stays."""
    u = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)).half()
    u[0] = torch.nan
    inputs = torch.cat((torch.eye(16), -torch.eye(16))).half()  # so that P = u and −u, exactly
    found = LeakySquareMLP.product(u, inputs, u, 32, 0.5, False)[1:]
    x = torch.cat((u, -u), 1).double()[1:]
    exact = torch.where(x < 0, 0.5 * x, x).square()
    bits = found.view(torch.int16)
    assert torch.equal((bits & 1).bool(), x < 0)
    error = (found.double() - exact) / ((bits + 1).view(torch.float16) - found).double()
    assert error.abs().max() <= 1 and abs(error.mean()) < 0.05
    assert LeakySquareMLP.product(u, inputs, u, 32, 0.5, False)[0].isnan().all()


FOR_A_HOPPER = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import triton, train_gpt as T
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def shared(kernel, pointers, scalars, constants, warps, stages):
    signature = {{**{{name: f"*{{kind}}" for name, kind in pointers.items()}}, **scalars,
                 **dict.fromkeys(constants, "constexpr")}}
    values = {{(kernel.arg_names.index(name),): value for name, value in constants.items()}}
    aligned = {{(kernel.arg_names.index(name),): [["tt.divisibility", 16]]
               for name in (*pointers, *scalars)}}  # else the loads are not pipelined
    return triton.compile(ASTSource(kernel, signature, values, aligned),
                          target=GPUTarget("cuda", 90, 32),
                          options=dict(num_warps=warps, num_stages=stages)).metadata.shared

tile = dict(T.MLP_TILE)
warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
for backward in (False, True):
    pointers = dict.fromkeys(("a", "b", "h", "out"), "bf16")
    print("mlp", backward, shared(T.leaky_square_kernel, pointers, dict(rows="i32"), dict(
          SLOPE=0.5, BACKWARD=backward, N=1536, K=512, **tile), warps, stages))
"""


def printed_by(script, environ):
    """The lines that a script prints where kernels are compiled."""
    environ = {k: v for k, v in environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_the_kernel_compiles_for_a_hopper():
    """Triton's compiler needs no GPU and refuses what its interpreter accepts. The tiles of all
    stages fit into the memory of a block."""
    lines = [line.split() for line in printed_by(FOR_A_HOPPER, clean_environ())]
    stage = 2 * MLP_TILE["BK"] * (MLP_TILE["BM"] + MLP_TILE["BN"])
    assert len(lines) == 2
    assert all(MLP_TILE["num_stages"] * stage <= int(line[-1]) <= 227 * 1024 for line in lines)


COMPILED = f"""
import json, os, sys, types
sys.path.insert(0, {str(ROOT)!r})
import torch, triton, train_gpt as T
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from triton.backends.compiler import GPUTarget
torch.utils._triton.has_triton = lambda: True  # a GPU that compiles for a Hopper
triton.runtime.driver.set_active(types.SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0,
    get_current_stream=lambda device: 0, get_active_torch_device=lambda: torch.device("cpu")))

def nodes(function, *inputs):
    # operators of the forward and of the backward graph; nothing is run
    found = []

    def look(graph, _):
        found.append([str(n.target) for n in graph.graph.nodes])
        results = graph.graph.output_node().args[0]
        results = [n.meta["val"] if hasattr(n, "meta") else n for n in results]
        return make_boxed_func(lambda *_: [torch.zeros(x.shape, dtype=x.dtype)
                                           if isinstance(x, torch.Tensor) else x for x in results])
    backend = aot_autograd(fw_compiler=look, bw_compiler=look)
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
    compiled(*inputs).sum().backward()
    return found

T.MLP_TILE = dict(T.MLP_TILE, BM=16, BN=32, BK=32)
s = T.resolve_settings(dict(os.environ))[0]
tokens, wanted = torch.randint(s.vocab_size, (3, 33)), dict()
kernels = T.Kernels(mlp=T.LeakySquareMLP.apply)
wanted["model"] = nodes(T.GPT(s, torch.bfloat16, kernels), tokens[:, :-1], tokens[:, 1:])
for frozen in ([], [1], [1, 2]):
    x = [torch.randn(shape, requires_grad=i not in frozen)
         for i, shape in enumerate([(16, 32), (64, 32), (32, 64)])]
    wanted[f"without {{len(frozen)}}"] = nodes(lambda *x: T.LeakySquareMLP.apply(*x, 0.5), *x)
print(json.dumps(wanted))
"""


@pytest.mark.slow
def test_compilers_see_whole_graphs_and_make_only_what_is_needed(corpus):
    """The kernel breaks no graph. Test-time training freezes matrices: no products for their
    gradients."""
    environ = environment(corpus, MLP_MULT=2, NUM_LAYERS=1, XSA_LAST_N=1, VE_LAYERS="",
                          SMEAR_GATE=0, BIGRAM_VOCAB_SIZE=0)
    found = json.loads(printed_by(COMPILED, environ)[-1])

    def count(graph, word):
        return sum(word in name for name in graph)
    assert [count(graph, "triton_kernel_wrapper") for graph in found["model"]] == [1, 1]
    assert [count(found[f"without {n}"][1], "mm.") for n in range(3)] == [3, 2, 1]


def test_a_model_computes_with_kernels_what_it_does_without(tiny, monkeypatch):
    """The same loss and gradients; an eager pass takes the plain functions, for calibration."""
    s = tiny(MLP_MULT=2, NUM_LAYERS=2, XSA_LAST_N=2, VE_LAYERS="1")
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return triton_mlp(*arguments)
    model = a_model(s, 0.05, mlp=counted)
    tokens = torch.randint(s.vocab_size, (2, 33))

    def outcome():
        nll = model(tokens[:, :-1], tokens[:, 1:])
        return [nll.detach(), *torch.autograd.grad(nll.sum(), list(model.parameters()))]
    plain = outcome()
    assert not calls
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for a, b in zip(outcome(), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max() + 1e-6))
    assert len(calls) == 2


@pytest.fixture
def gpu():
    """A rank that compiles for a GPU, so it says; kernels are interpreted."""
    return a_rank("cuda", dtype=torch.float32, compile=True)


PLAIN_NAMES = dict(attention="sdpa", mlp="plain")
SDPA = dict(ATTENTION="sdpa")


def test_right_kernels_are_taken_and_wrong_ones_named(tiny, gpu, monkeypatch):
    s = tiny(MLP_MULT=2, KERNELS="triton", **SDPA)
    names, kernels = train_gpt.choose_kernels(s, gpu)
    assert names == dict(attention="sdpa", mlp="triton")
    assert [line.split(",")[0] for line in gpu.lines] == ["attention:slow"] * s.doc_attention
    gpu.lines.clear()
    assert kernels == train_gpt.Kernels(mlp=triton_mlp)
    plain = PLAIN_NAMES, train_gpt.Kernels()
    assert train_gpt.choose_kernels(tiny(MLP_MULT=2, KERNELS="plain", **SDPA), gpu) == plain
    monkeypatch.setattr(train_gpt, "why_unusable", lambda *_: "gives another result")
    assert train_gpt.choose_kernels(tiny(MLP_MULT=2, **SDPA), gpu) == plain
    said = ["mlp: not triton: gives another result"]
    assert [line for line in gpu.lines if "slow" not in line] == said
    with pytest.raises(UserError, match="KERNELS=triton: not installed, or its mlp not right"):
        train_gpt.choose_kernels(s, gpu)


def test_kernels_that_cannot_run_are_refused_by_name(tiny):
    for value, word in ((0, "COMPILE=0"), (1, "on cpu")):
        s = tiny(KERNELS="triton", COMPILE=value)
        with pytest.raises(UserError, match=f"KERNELS=triton.*{word}"):
            train_gpt.choose_kernels(s, train_gpt.Runtime(s))


def test_a_width_that_fills_no_tile_keeps_the_plain_mlp(tiny, gpu, monkeypatch):
    """The kernel reads whole tiles of columns; 40 hidden units are none of these."""
    monkeypatch.setattr(train_gpt, "why_unusable", lambda *_: "")
    names, kernels = train_gpt.choose_kernels(tiny(MLP_MULT=1.25, **SDPA), gpu)
    assert names == PLAIN_NAMES and kernels.mlp is leaky_square_mlp
    with pytest.raises(train_gpt.UserError, match="KERNELS=triton: .* the MLP's width of"):
        train_gpt.choose_kernels(tiny(MLP_MULT=1.25, KERNELS="triton", **SDPA), gpu)


def test_nothing_is_tried_without_a_gpu(tiny):
    """KERNELS=auto on a CPU takes the plain functions and tries nothing."""
    s = tiny(COMPILE=1)
    rt = train_gpt.Runtime(s)
    rt.log = lambda line: pytest.fail(line)
    assert train_gpt.choose_kernels(s, rt) == (PLAIN_NAMES, train_gpt.Kernels())
