"""Run train_gpt.py as on a GPU, on a CPU: its tensors "on the device" refuse to meet the host's.

    python tests/pretend_gpu.py                 # settings as environment variables

A tensor of the device wraps one of the host, where every operation is computed. As CUDA does, an
operation refuses tensors of both, but for copies, indices and numbers without a dimension; numpy
refuses a tensor of the device. To PyTorch the device is "meta", which needs no driver. The model
computes in bf16, as there; kernels and streams are not seen. With UNIQUE_LAYERS the
gradients' hooks are lost, since PyTorch moves such parameters in another way.
"""
import os
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

DEVICE, aten = torch.device("meta"), torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default, aten._foreach_copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}
host_tensor = torch.tensor


class OnDevice(torch.Tensor):
    """A tensor of the device; `held` is the same on the host."""

    @staticmethod
    def __new__(cls, held):
        x = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=DEVICE)
        x.held = held
        return x

    def numpy(self):
        raise TypeError("numpy takes no tensor of the device: call cpu() first")

    def tolist(self):
        return self.held.tolist()

    def new_tensor(self, values):
        return OnDevice(self.held.new_tensor(values))

    def __format__(self, spec):
        return format(self.held, spec)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return computed(function, args, kwargs or {})


def mapped(act, x):
    """x with act(t) for each tensor t in its lists, tuples and dicts. PyTorch's tree_map is
    far slower."""
    if isinstance(x, torch.Tensor):
        return act(x)
    if isinstance(x, (list, tuple)):
        return type(x)([mapped(act, y) for y in x])
    return {k: mapped(act, y) for k, y in x.items()} if isinstance(x, dict) else x


def computed(function, args, kwargs):
    """The operation's result, on the device if an input is or if it is made there."""
    tensors = []
    held_args, held_kwargs = mapped(lambda x: tensors.append(x) or getattr(x, "held", x),
                                    (args, kwargs))
    there = any(isinstance(x, OnDevice) for x in tensors)
    made_on = kwargs.get("device") and torch.device(kwargs["device"])
    if there and function not in COPIES:
        if function in INDEXED:
            tensors = [x for x in tensors if all(x is not i for i in args[1])]
        if any(not isinstance(x, OnDevice) and x.dim() for x in tensors):
            raise RuntimeError(f"{function}: tensors of the device and of the host")
    if made_on:
        held_kwargs["device"] = torch.device("cpu")
    out = function(*held_args, **held_kwargs)
    if made_on != DEVICE if made_on else not there:
        return out
    if function is aten.copy_.default and not isinstance(args[0], OnDevice):
        return args[0]  # to the host
    out = mapped(OnDevice, out)
    aliases = any(result.alias_info for result in function._schema.returns)
    return return_and_correct_aliasing(function, args, kwargs, out) if aliases else out


class Pretended(TorchDispatchMode):
    """Inside this context device=DEVICE makes tensors of the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return computed(function, args, kwargs or {})


def main(environ):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import train_gpt

    class Runtime(train_gpt.Runtime):
        def __init__(self, s, ranks):
            super().__init__(s, ranks)
            self.device, self.dtype = DEVICE, torch.bfloat16

    def tensor(values, device="cpu", **more):
        return host_tensor(values, **more).to(device)

    def adamw(*args, fused, **more):  # the fused one asks for a known device
        return unfused(*args, **more)
    unfused, torch.optim.AdamW, torch.tensor = torch.optim.AdamW, adamw, tensor
    train_gpt.Runtime = Runtime
    torch.__future__.set_swap_module_params_on_conversion(True)
    with Pretended():
        return train_gpt.main([], environ)


if __name__ == "__main__":
    sys.exit(main(os.environ))
