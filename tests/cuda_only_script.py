"""A tiny CUDA-only training script in the published manner, for the tests of records/duel.py."""
import glob
import io
import math
import os
import subprocess
import time
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import zstandard
from flash_attn_interface import flash_attn_func as flash_attn_3_func
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP


class Hyperparameters:
    data_path = os.environ.get("DATA_PATH", "./data")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./model")
    run_id = os.environ.get("RUN_ID", "run")
    seed = int(os.environ.get("SEED", 1337))
    vocab_size = int(os.environ.get("VOCAB_SIZE", 1024))
    num_layers = int(os.environ.get("NUM_LAYERS", 9))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 1024))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 524288))
    iterations = int(os.environ.get("ITERATIONS", 20000))
    warmdown_iters = int(os.environ.get("WARMDOWN_ITERS", 3500))
    lr = float(os.environ.get("TIED_EMBED_LR", 0.01))


class Block(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.heads, self.kv_heads = args.num_heads, args.num_kv_heads
        head, dim = args.model_dim // args.num_heads, args.model_dim
        self.qkv = nn.Linear(dim, (self.heads + 2 * self.kv_heads) * head, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(F.rms_norm(x, (D,))).view(B, T, -1, D // self.heads).split(
            [self.heads, self.kv_heads, self.kv_heads], dim=2)
        return x + self.out(flash_attn_3_func(q, k, v, causal=True).reshape(B, T, D))


class GPT(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.emb = nn.Embedding(args.vocab_size, args.model_dim)
        nn.init.normal_(self.emb.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(args) for _ in range(args.num_layers))

    def forward(self, x, y):
        h = self.emb(x)
        for block in self.blocks:
            h = block(h)
        return F.cross_entropy(F.linear(F.rms_norm(h, (h.size(-1),)), self.emb.weight).float()
                               .flatten(0, 1), y.flatten())


def tokens_of(pattern):
    [path] = sorted(glob.glob(pattern))[:1]
    return torch.from_numpy(np.fromfile(path, "<u2", offset=1024).astype(np.int64))


def main():
    args, code = Hyperparameters(), Path(__file__).read_text(encoding="utf-8")
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    dist.init_process_group(backend="nccl", device_id=device)
    dist.barrier()
    os.makedirs("logs", exist_ok=True)

    def log0(text, console=True):
        if console:
            print(text)
        with open(f"logs/{args.run_id}.txt", "a", encoding="utf-8") as f:
            print(text, file=f)

    log0(code, console=False)
    log0("=" * 100, console=False)
    log0(subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout, console=False)
    tokenizer = spm.SentencePieceProcessor(model_file=args.tokenizer_path)
    assert tokenizer.vocab_size() == args.vocab_size
    torch.manual_seed(args.seed)
    torch.cuda.manual_seed_all(args.seed)
    base = GPT(args).to(device).bfloat16()
    for p in base.parameters():
        p.data = p.data.float()
    model = DDP(torch.compile(base, dynamic=False, fullgraph=True), device_ids=[local_rank])
    optimizer = torch.optim.AdamW(base.parameters(), lr=args.lr, fused=True)
    train = tokens_of(os.path.join(args.data_path, "fineweb_train_*.bin")).pin_memory()
    val = tokens_of(os.path.join(args.data_path, "fineweb_val_*.bin"))
    T, rows = args.train_seq_len, args.train_batch_tokens // args.train_seq_len
    log0(f"seed:{args.seed} warmdown:{args.warmdown_iters}")

    def validate(key, digits=4):
        nll, count = torch.zeros((), device="cuda", dtype=torch.float64), 0
        with torch.inference_mode(), torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            for i in range(0, (len(val) - 1) // T * T, T):
                x, y = (val[None, i + j: i + j + T].to("cuda", non_blocking=True) for j in (0, 1))
                nll += model(x, y).double()
                count += 1
        loss = (nll / count).item()
        log0(f"{key} val_loss:{loss:.{digits}f} val_bpb:{loss / math.log(2) / 2.5:.{digits}f}")

    start, event = time.perf_counter(), torch.cuda.Event(enable_timing=True)
    event.record()
    for step in range(args.iterations):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (args.iterations - step) / args.warmdown_iters)
        at = torch.randint(len(train) - T - 1, (rows,), device="cuda").tolist()
        x, y = (torch.stack([train[i + j: i + j + T] for i in at]).cuda() for j in (0, 1))
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
            loss = model(x, y)
        loss.backward()
        for p in base.parameters():
            dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        ms = 1000 * (time.perf_counter() - start)
        log0(f"step:{step + 1}/{args.iterations} train_loss:{loss.item():.4f} "
             f"train_time:{ms:.0f}ms step_avg:{ms / (step + 1):.2f}ms")
    validate(f"step:{args.iterations}/{args.iterations}")
    buffer = io.BytesIO()
    torch.save({n: p.to(torch.float16) for n, p in base.state_dict().items()}, buffer)
    blob = zstandard.ZstdCompressor(level=3).compress(buffer.getvalue())
    log0(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")
    log0(f"Serialized model int6+zstd: {len(blob)} bytes")
    log0(f"Code size: {len(code.encode('utf-8'))} bytes")
    state = torch.load(io.BytesIO(zstandard.ZstdDecompressor().decompress(blob)),
                       map_location="cuda")
    base.load_state_dict(state)
    validate("final_int6_roundtrip_exact", 8)
    validate("final_int6_sliding_window_exact", 8)
    assert rank == 0 and dist.get_world_size() == 1
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
