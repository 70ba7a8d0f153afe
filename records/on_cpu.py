"""Run a training script that was written for CUDA on a CPU, in one process, unchanged.

    python records/on_cpu.py path/to/train_gpt.py        environment variables configure the script

It stands in for torch.cuda, devices, autocast, torch.compile, one process of NCCL, FlashAttention
and nvidia-smi. The arithmetic is the script's, bfloat16 where it asks for it. Triton kernels and
CUDA extensions have no stand-in.
"""
import contextlib
import functools
import itertools
import os
import re
import runpy
import subprocess
import sys
import time
import types
from pathlib import Path

import torch
import torch._dynamo  # before anything is replaced: it looks at what it finds
import torch.distributed as dist
import torch.nn.attention
import torch.nn.functional as F
import torch.optim
from torch import nn

FACTORIES = (
    "zeros ones empty full arange linspace eye rand randn randint randperm tensor as_tensor "
    "zeros_like ones_like empty_like full_like rand_like randn_like empty_strided").split()
RANK_OF_ONE = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1",
                   MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")


# -- devices: everything that names a GPU gets the CPU

def on_cpu_only(kind):
    """A class whose objects are those of torch.device or torch.Generator on the CPU."""
    class Meta(type):
        def __call__(cls, *place, **named):
            on_gpu = "cuda" in f"{place} {named}" or place and isinstance(place[0], int)
            return kind("cpu") if on_gpu else kind(*place, **named)

        def __instancecheck__(cls, thing):
            return isinstance(thing, kind)

    return Meta(kind.__name__, (), {})


def on_cpu(value):
    return "cpu" if isinstance(value, str) and value.startswith("cuda") else value


def cpu_arguments(function, drop=("pin_memory",)):
    """The function with cuda in its arguments made cpu, without those that only a GPU takes."""
    @functools.wraps(function)
    def call(*given, **named):
        return function(*map(on_cpu, given),
                        **{k: on_cpu(v) for k, v in named.items() if k not in drop})
    return call


def nothing(*given, **named):
    return None


class Moment:
    """A stream or an event: work on a CPU is done when the call returns."""

    def __init__(self, *given, **named):
        self.time = 0.0

    def __enter__(self):
        return self

    def __exit__(self, *problem):
        return None

    def record(self, *given):
        self.time = 1000 * time.perf_counter()

    def elapsed_time(self, later):
        return later.time - self.time

    def query(self):
        return True

    def record_event(self, event=None):
        return event or Moment()

    wait = wait_event = wait_stream = synchronize = nothing


def replace_cuda():
    properties = types.SimpleNamespace(name="CPU", major=9, minor=0, total_memory=80 << 30,
                                       multi_processor_count=132)
    answers = dict(
        is_available=True, is_initialized=True, device_count=1, current_device=0,
        memory_allocated=0, memory_reserved=0, max_memory_allocated=0, max_memory_reserved=0,
        is_bf16_supported=True, mem_get_info=(80 << 30, 80 << 30),
        get_device_capability=(9, 0), get_device_name="CPU", get_device_properties=properties,
        memory_stats={}, memory_summary="")
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *given, answer=answer, **named: answer)
    for name in ("set_device", "synchronize", "manual_seed", "manual_seed_all", "empty_cache",
                 "init", "reset_peak_memory_stats", "reset_max_memory_allocated", "ipc_collect",
                 "set_per_process_memory_fraction", "set_stream"):
        setattr(torch.cuda, name, nothing)
    torch.cuda.Stream = torch.cuda.Event = Moment
    torch.cuda.current_stream = torch.cuda.default_stream = torch.cuda.stream = Moment
    torch.cuda.device = contextlib.nullcontext
    torch.cuda.get_rng_state = lambda *given: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *given: torch.set_rng_state(state)
    torch.cuda.get_rng_state_all = lambda: [torch.get_rng_state()]
    torch.cuda.set_rng_state_all = lambda states: torch.set_rng_state(states[0])


def replace_devices():
    for name in FACTORIES:
        setattr(torch, name, cpu_arguments(getattr(torch, name)))
    for kind, names in ((torch.Tensor, "to new_zeros new_ones new_empty new_full new_tensor"),
                        (nn.Module, "to")):
        for name in names.split():
            setattr(kind, name, cpu_arguments(getattr(kind, name)))
        kind.cuda = lambda self, *given, **named: self
    torch.Tensor.pin_memory = lambda self, *given: self
    torch.Tensor.record_stream = nothing
    torch.load = cpu_arguments(torch.load)
    torch.Generator, torch.device = map(on_cpu_only, (torch.Generator, torch.device))


# -- arithmetic

def replace_arithmetic():
    """Autocast to the CPU's, no compiler, optimizers without fused kernels or CUDA graphs."""
    class Autocast(torch.autocast):
        def __init__(self, device_type="cpu", dtype=None, enabled=True, cache_enabled=None):
            super().__init__("cpu", dtype or torch.bfloat16, enabled, cache_enabled)

    torch.autocast = torch.amp.autocast = Autocast
    torch.cuda.amp.autocast = lambda enabled=True, dtype=None, **named: Autocast(
        "cpu", dtype, enabled)
    torch.cuda.amp.GradScaler = lambda *given, **named: torch.amp.GradScaler("cpu", enabled=False)
    torch.compile = lambda model=None, **named: model if model is not None else (lambda f: f)
    for name in ("Adam", "AdamW", "SGD"):
        kind = getattr(torch.optim, name)
        kind.__init__ = cpu_arguments(kind.__init__, drop=("fused", "capturable"))
    torch.nn.attention.sdpa_kernel = lambda *given, **named: contextlib.nullcontext()
    torch.backends.cuda.sdp_kernel = torch.nn.attention.sdpa_kernel
    for name in ("flash", "math", "mem_efficient", "cudnn"):  # the choice is the CPU's
        setattr(torch.backends.cuda, f"enable_{name}_sdp", nothing)
    with contextlib.suppress(ImportError):
        from torch.nn.attention import flex_attention
        flex_attention.create_block_mask = cpu_arguments(flex_attention.create_block_mask)
    torch.inference_mode = inference_mode


def inference_mode(mode=True):
    """no_grad instead: a later TTT cannot train through tables kept as inference tensors."""
    if callable(mode):  # a bare decorator
        return torch.no_grad()(mode)
    return torch.no_grad() if mode else contextlib.nullcontext()


# Arguments of the attention: those that change no result, and those that do not where they are off.
HARMLESS = {"deterministic", "num_splits", "pack_gqa", "sm_margin"}
OFF = {"dropout_p", "softcap", "alibi_slopes", "return_attn_probs", "return_lse", "attention_chunk",
       "qv", "q_descale", "k_descale", "v_descale", "block_table", "seqused_q", "seqused_k",
       "learnable_sink"}


def refuse(others):
    """Raise where an argument would change the result and has no stand-in."""
    for name, value in others.items():
        off = value is None or isinstance(value, (int, float)) and not value
        if name not in HARMLESS and not (name in OFF and off):
            raise NotImplementedError(f"the stand-in for attention does not know {name}={value!r}; "
                                      "run the script on a GPU")


def attention(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), **others):
    """FlashAttention's function on [B, T, H, E], by PyTorch's."""
    refuse(others)
    T, S, (left, right) = q.size(1), k.size(1), window_size
    mask = None
    if (left, right) != (-1, -1) or (causal and T != S):  # aligned at the last position
        distance = torch.arange(S)[None] - torch.arange(T)[:, None] - (S - T)
        mask = (distance <= (0 if causal else right if right >= 0 else S)) & (
            distance >= (-left if left >= 0 else -S - T))
    out = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, scale=softmax_scale,
        is_causal=causal and mask is None, enable_gqa=q.size(2) != k.size(2))
    return out.transpose(1, 2)


def attention_of_documents(q, k, v, cu_seqlens_q, cu_seqlens_k, *most, **named):
    """The variable-length function on [tokens, H, E]: each document by itself."""
    refuse({f"argument {6 + i}": value for i, value in enumerate(most) if i > 1})  # two are lengths
    named = {n: x for n, x in named.items() if not n.startswith("max_seqlen")}
    ends = itertools.pairwise(zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist()))
    parts = [attention(q[None, a:b], k[None, c:d], v[None, c:d], **named)[0]
             for (a, c), (b, d) in ends if b > a]
    return torch.cat([*parts, torch.zeros_like(q[sum(map(len, parts)):])])  # padding at the end


def add_flash_attention():
    """The modules of FlashAttention 2, 3 and 4, and the package that downloads kernels."""
    functions = dict(flash_attn_func=attention, flash_attn_varlen_func=attention_of_documents)
    for name in ("flash_attn_interface", "flash_attn", "flash_attn.flash_attn_interface",
                 "flash_attn.cute", "flash_attn.cute.interface"):
        module = sys.modules[name] = types.ModuleType(name)
        vars(module).update(functions, __path__=[], __version__="0", flash_attn_interface=module)
    kernels = sys.modules["kernels"] = types.ModuleType("kernels")
    kernels.get_kernel = lambda *given, **named: sys.modules["flash_attn_interface"]


# -- one process, and commands

def replace_collectives():
    """Among one rank every collective is a copy."""
    done = types.SimpleNamespace(wait=nothing, is_completed=lambda: True)
    start, DDP = dist.init_process_group, nn.parallel.DistributedDataParallel

    def init_process_group(*given, **named):
        if not dist.is_initialized():
            start("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def copied(out, source, *given, **named):
        (out[0] if isinstance(out, list) else out).view(-1).copy_(
            (source[0] if isinstance(source, list) else source).reshape(-1))
        return done

    dist.init_process_group = init_process_group
    for name in ("all_reduce", "broadcast", "reduce", "barrier", "all_reduce_coalesced"):
        setattr(dist, name, lambda *given, **named: done)
    for name in ("all_gather", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor",
                 "all_to_all_single"):
        setattr(dist, name, copied)
    nn.parallel.DistributedDataParallel = lambda module, *given, **named: DDP(module)


def answered(function):
    """The function of `subprocess` with an answer for nvidia-smi, which is not there."""
    @functools.wraps(function)
    def call(command, *given, **named):
        if "nvidia-smi" in str(command):
            as_text = any(map(named.get, ("text", "encoding", "errors", "universal_newlines")))
            said, empty = ("no GPU", "") if as_text else (b"no GPU", b"")
            return (said if function is CHECK_OUTPUT else
                    subprocess.CompletedProcess(command, 0, said, empty))
        return function(command, *given, **named)
    return call


CHECK_OUTPUT = subprocess.check_output


def main(arguments):
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    path = Path(arguments[0])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    from unpack import readable_source
    with contextlib.suppress(ValueError):  # then it runs as it is
        if re.search(rb"environ\[.(RANK|LOCAL_RANK|WORLD_SIZE).\](?! *=)", readable_source(path)):
            os.environ.update({k: os.environ.get(k, v) for k, v in RANK_OF_ONE.items()})
    replace_cuda()
    replace_devices()
    replace_arithmetic()
    add_flash_attention()
    replace_collectives()
    subprocess.run, subprocess.check_output = map(answered, (subprocess.run, CHECK_OUTPUT))
    sys.argv, sys.path[0] = list(arguments), str(path.resolve().parent)
    runpy.run_path(str(path), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
