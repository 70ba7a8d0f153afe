"""Nothing on a GPU meets what is on the host: the whole job where the two refuse each other."""

import pytest
import torch

from conftest import ROOT
from pretend_gpu import DEVICE, OnDevice, Pretended

PRETEND = ROOT / "tests" / "pretend_gpu.py"
EVERYTHING = dict(ITERATIONS=2, MAX_WALLCLOCK_SECONDS=0, WARMDOWN_ITERS=1, WARMUP_STEPS=1,
                  VAL_LIMIT_TOKENS=128, CHECKPOINT_EVERY_SECONDS=1e-6, LATE_QAT_THRESHOLD=2,
                  SWA_ENABLED=1, SWA_EVERY=1, MODEL_DIM=16, NUM_HEADS=2, NUM_KV_HEADS=1,
                  BIGRAM_DIM=4, VE_DIM=4, GPTQ_BATCHES=1, EVAL_STRIDE=16, TTT_EPOCHS=1)


def test_a_tensor_of_the_device_refuses_the_hosts():
    with Pretended():
        x = torch.arange(6.0, device=DEVICE).view(2, 3).requires_grad_()
        assert isinstance(x * 2, OnDevice) and x.tolist() == [[0, 1, 2], [3, 4, 5]]
        (x * torch.tensor(3.0)).sum().backward()
        assert isinstance(x.grad, OnDevice) and x.grad[torch.tensor([1])].tolist() == [[3, 3, 3]]
        for mixed in (lambda: x + torch.ones(3), lambda: torch.stack([x[0], torch.ones(3)]),
                      lambda: x.detach()[0].add_(torch.ones(3)), lambda: torch.ones(3) * x):
            with pytest.raises(RuntimeError, match="of the device and of the host"):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            x.detach().numpy()
        assert x.detach().cpu().numpy()[1, 2] == 5


@pytest.mark.parametrize("variables", [
    dict(TTT_LORA_RANK=2, LATE_PASSES="0,1,1", NUM_LAYERS=2, EVAL_MATCH=1, MUDD=1,
         PARALLEL="lanes", PARALLEL_FROM=1, SMEAR_GATE="embed", GATED_ATTENTION="sparse",
         UNET_SKIPS="gated", VE_LAYERS="1", SEGMENT_SCHEDULE="8:0.5"),
    dict(TTT_OPTIMIZER="muon", QUANT_CLIP="row", QUANT_FIT="scale", EVAL_ATTENTION="window",
         DOC_ATTENTION=0, GATED_ATTENTION="head", PRUNE_FRAC=0.02),
    pytest.param(dict(TTT_OPTIMIZER="adamw", QUANT_CLIP="std", QUANT_FIT="scale", GPTQ_ACT_ORDER=1,
                      VALUE_RESIDUAL="sigmoid", PARALLEL="one"),
                 marks=pytest.mark.slow)])
def test_the_whole_job_never_mixes_host_and_device(tmp_path, run_script, variables):
    """It ends with the scores of the same job without a device, but for bf16."""
    there, here = (run_script(script=script, OUT_DIR=tmp_path / name, **{**EVERYTHING, **variables})
                   for name, script in (("there", PRETEND), ("here", None)))
    assert there.returncode == here.returncode == 0, there.stderr
    assert there.result["val_loss"] == pytest.approx(here.result["val_loss"], abs=0.03)
