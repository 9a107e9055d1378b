"""CUDA without a GPU: tensors on "cuda" have shape, type and layout but no numbers, while CPU tensors stay real.

A mismatch of devices or types then fails as it would on a GPU, and what launches a kernel or waits for the device is
counted. torch's FakeTensorMode does the work; no kernel runs.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

VIEWS = {"view", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "t", "detach", "split",
         "as_strided", "unbind", "alias", "split_with_sizes", "_reshape_alias", "_unsafe_view",
         "empty", "empty_like"}  # fmt: skip
# What a device refuses with numbers of two types although FakeTensorMode, which knows shapes only, lets it pass.
ONE_TYPE = {"mm", "addmm", "bmm", "mv", "addmv", "linear", "matmul", "convolution", "conv2d", "index_put", "index_put_",
            "_index_put_impl_", "grid_sampler_2d"}  # fmt: skip


class FakeCuda(TorchDispatchMode):
    """Sends what touches "cuda" to a FakeTensorMode; counts launched kernels and names what waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.kernels: Counter[str] = Counter()
        self.waits: list[str] = []
        self.numbers = itertools.repeat(0.0)  # what the next numbers read from the device will be
        self.tensor(torch.zeros(1))  # torch's guard of the current device is a stand-in from here on

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operation._schema.name.split("::")[1]
        leaves = tree_leaves((args, kwargs))
        is_fake = any(isinstance(leaf, FakeTensor) for leaf in leaves)
        to_cuda = any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in leaves)
        if to_cuda and not is_fake:
            args, kwargs = tree_map(
                lambda leaf: self.fake.from_tensor(leaf) if isinstance(leaf, torch.Tensor) else leaf, (args, kwargs)
            )
        found = {leaf.dtype for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()}
        if is_fake and name in ONE_TYPE and len(found) > 1:
            raise RuntimeError(f"{name}: expected numbers of one type, but got {found}")
        if name in ("item", "_local_scalar_dense") and is_fake:  # float(x), x.item(), and what an `if` asks of a tensor
            self.waits += ["item"] if args[0].device.type == "cuda" else []
            return torch.tensor(next(self.numbers)).to(args[0].dtype).item()
        with self.fake if is_fake or to_cuda else contextlib.nullcontext():
            result = operation(*args, **kwargs)
        first = result[0] if isinstance(result, tuple | list) and result else result
        if name in ("_to_copy", "copy_"):
            source, target = (args[1], args[0]) if name == "copy_" else (args[0], first)
            blocking = not kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False)
            if source.device.type != target.device.type and blocking:
                self.waits.append(f"copy {source.device.type} -> {target.device.type} {tuple(source.shape)}")
        if isinstance(first, torch.Tensor) and first.device.type == "cuda" and name not in VIEWS:
            self.kernels[name] += 1
        return result

    def tensor(self, values: torch.Tensor) -> torch.Tensor:
        """VALUES on the fake device; before `present`."""
        with self.fake:
            return self.fake.from_tensor(values).to("cuda")

    def move(self, module: torch.nn.Module, layout: torch.memory_format = torch.contiguous_format) -> torch.nn.Module:
        """MODULE with its parameters and buffers on the fake device, in place; before `present`."""
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, tensor in list(tensors.items()):
                    if tensor is not None:
                        moved = self.tensor(tensor.detach())
                        if moved.ndim == 4:
                            with self.fake:
                                moved = moved.contiguous(memory_format=layout)
                        is_parameter = isinstance(tensor, torch.nn.Parameter)
                        tensors[name] = torch.nn.Parameter(moved, tensor.requires_grad) if is_parameter else moved
        return module

    @contextlib.contextmanager
    def present(self) -> Iterator[None]:
        """Code in this block finds a GPU. Reading from it gives `numbers` or zeros and counts as a wait."""
        real = {name: getattr(torch.Tensor, name) for name in ("tolist", "numpy")}

        def read(name):
            def function(tensor, *args, **named):
                if not isinstance(tensor, FakeTensor):
                    return real[name](tensor, *args, **named)
                self.waits += [name] if tensor.device.type == "cuda" else []
                zeros = real["numpy"](torch.zeros(tensor.shape, dtype=tensor.dtype))
                return zeros if name == "numpy" else zeros.tolist()

            return function

        with contextlib.ExitStack() as patches:
            for name in real:
                for kind in (torch.Tensor, FakeTensor):
                    patches.enter_context(mock.patch.object(kind, name, read(name)))
            found = {"is_available": True, "device_count": 8, "current_device": 0, "_lazy_init": None}
            found |= {"mem_get_info": (70 << 30, 80 << 30)}
            found |= {"get_device_capability": (9, 0), "get_device_properties": mock.Mock(major=9, minor=0)}
            for name, value in found.items():
                patches.enter_context(mock.patch(f"torch.cuda.{name}", lambda *_, value=value, **__: value))
            patches.enter_context(mock.patch("torch._subclasses.fake_tensor.init_gpu_context", lambda *_: None))
            patches.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
            torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is made here and moved
            patches.enter_context(self)
            yield
