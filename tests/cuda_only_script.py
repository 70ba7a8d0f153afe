"""A CUDA-only script in the published manner, for the tests of records/duel.py: it calls what such
scripts call of CUDA, then it trains a tiny model, stores it and scores it."""
import copy
import io
import math
import os
import subprocess
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from flash_attn.cute.interface import flash_attn_func as flash_attn_4_func
from flash_attn.flash_attn_interface import flash_attn_varlen_func
from flash_attn_interface import flash_attn_func as flash_attn_3_func
from kernels import get_kernel
from torch import nn
from torch.backends.cuda import enable_cudnn_sdp, enable_math_sdp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.parallel import DistributedDataParallel as DDP

ITERATIONS, SEED, VOCAB_SIZE, DIM, T, BATCH_TOKENS = (int(os.environ[name]) for name in (
    "ITERATIONS", "SEED", "VOCAB_SIZE", "MODEL_DIM", "TRAIN_SEQ_LEN", "TRAIN_BATCH_TOKENS"))
WARMDOWN = int(os.environ.get("WARMDOWN_ITERS", 3500))
HEADS = int(os.environ.get("NUM_HEADS", 8))
RANK = int(os.environ["RANK"])
if not torch.cuda.is_available():
    raise RuntimeError("CUDA is required")
device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
torch.cuda.set_device(device)
dist.init_process_group("nccl", device_id=device)
dist.barrier()


def call_devices():
    assert torch.device("cuda:0").type == torch.device(type="cuda", index=0).type == "cpu"
    assert isinstance(torch.device("cpu"), torch.device)
    assert torch.device(torch.device("cuda")).type
    x = torch.randn(2, 8, 4, 16, device="cuda", generator=torch.Generator(device="cuda"))
    assert x.to("cuda", non_blocking=True).cuda().pin_memory().device == torch.device("cuda:0")
    stream, (a, b) = torch.cuda.Stream(), (torch.cuda.Event(enable_timing=True) for _ in range(2))
    enable_math_sdp(False), enable_cudnn_sdp(True)
    with torch.cuda.stream(stream), sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        a.record(), stream.wait_stream(torch.cuda.current_stream())
        b.record(stream), b.synchronize()
        F.scaled_dot_product_attention(x, x, x)
    assert a.elapsed_time(b) >= 0 and torch.cuda.get_device_capability() == (9, 0)
    assert torch.cuda.get_device_properties(0).multi_processor_count
    assert torch.cuda.mem_get_info()[0] and torch.cuda.max_memory_allocated() == 0
    assert "no GPU" in subprocess.check_output(["nvidia-smi"]).decode()
    assert subprocess.run("nvidia-smi -L", shell=True, capture_output=True).returncode == 0
    assert torch.cuda.get_device_name(0) == "CPU"
    return x


def call_collectives():
    flat, part, whole = torch.ones(4, device="cuda"), torch.empty(4), torch.empty(4)
    dist.reduce_scatter_tensor(part, flat, op=dist.ReduceOp.AVG)
    dist.all_gather_into_tensor(whole, part)
    dist.broadcast(flat, 0)
    assert whole.tolist() == [1.0] * 4 and dist.get_world_size() == 1


def call_attention(x):
    assert callable(flash_attn_varlen_func)
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 8, 8, device="cuda")
    y = flex_attention(*(x.transpose(1, 2) for _ in range(3)), block_mask=mask).transpose(1, 2)
    for function in (flash_attn_4_func, get_kernel("any/kernel").flash_attn_func):
        torch.testing.assert_close(function(x, x, x, causal=True), y)


def call_autograd(x):
    @torch.compile(dynamic=False, fullgraph=True)
    def double(x):
        return 2 * x

    kept_by = torch.inference_mode(lambda: torch.inference_mode()(double)(x))
    with torch.inference_mode(), torch.inference_mode(mode=False):
        kept = double(x)
    for table in (kept_by(), kept):  # that later training reads
        (table * torch.ones((), device="cuda", requires_grad=True)).sum().backward()
    with torch.amp.autocast("cuda", enabled=False), torch.cuda.amp.autocast(enabled=False):
        assert nn.Linear(16, 16, device="cuda").to(torch.device("cuda"))(x).dtype == torch.float32
    torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats()


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.qkv = nn.Embedding(VOCAB_SIZE, DIM), nn.Linear(DIM, 3 * DIM, bias=False)
        nn.init.normal_(self.emb.weight, std=0.02)

    def forward(self, x, y):
        h = self.emb(x)
        q, k, v = self.qkv(h).view(*x.shape, 3, HEADS, -1).unbind(2)
        h = h + flash_attn_3_func(q, k, v, causal=True).flatten(2)
        return F.cross_entropy(F.linear(h, self.emb.weight).float().flatten(0, 1), y.flatten())


def main():
    code = Path(__file__).read_bytes()
    train, val = (torch.from_numpy(np.fromfile(path, "<u2", offset=1024).astype(np.int64)) for path
                  in (Path(os.environ["DATA_PATH"], f"fineweb_{split}_000000.bin")
                      for split in ("train", "val")))
    torch.manual_seed(SEED), torch.cuda.manual_seed_all(SEED)
    base = GPT().to(device)
    model = DDP(torch.compile(base, mode="max-autotune"), device_ids=[RANK],
                broadcast_buffers=False)
    optimizer = torch.optim.AdamW(base.parameters(), lr=0.01, fused=True, capturable=True)

    def batch(tokens, starts):
        return (torch.stack([tokens[i + j: i + j + T] for i in starts]).cuda() for j in (0, 1))

    def validate(key, digits=4):
        with torch.inference_mode(), torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(*batch(val, range(0, (len(val) - 1) // T * T, T))).item()
        print(f"{key} val_loss:{loss:.{digits}f} val_bpb:{loss / math.log(2) / 2.5:.{digits}f}")

    print(f"seed:{SEED} warmdown:{WARMDOWN}")
    start = time.perf_counter()
    for step in range(1, ITERATIONS + 1):
        at = torch.randint(len(train) - T - 1, (BATCH_TOKENS // T,), device="cuda").tolist()
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            loss = model(*batch(train, at))
        loss.backward()
        for p in base.parameters():
            dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        print(f"step:{step}/{ITERATIONS} train_loss:{loss.item():.4f} "
              f"train_time:{1000 * (time.perf_counter() - start):.0f}ms")
    copy.deepcopy(optimizer.state_dict())
    validate(f"step:{ITERATIONS}/{ITERATIONS}")
    buffer = io.BytesIO()
    torch.save({n: p.half() for n, p in base.state_dict().items()}, buffer)
    blob = zlib.compress(buffer.getvalue())
    print(f"Serialized model int6+zlib: {len(blob)} bytes\nCode size: {len(code)} bytes")
    base.load_state_dict(torch.load(io.BytesIO(zlib.decompress(blob)), map_location="cuda"))
    validate("final_int6_roundtrip_exact", 8)
    validate("final_int6_sliding_window_exact", 8)
    dist.destroy_process_group()


if __name__ == "__main__":
    x = call_devices()
    call_collectives()
    call_attention(x)
    call_autograd(x)
    main()
