"""CUDA without a GPU: tensors on "cuda" have shape, type and layout but no numbers, while CPU tensors stay real.

A mismatch of devices or types then fails as it would on a GPU, and what launches a kernel or waits for the device is
counted. torch's FakeTensorMode does the work; no kernel runs.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

VIEWS = {"view", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "t", "detach", "split",
         "as_strided", "unbind", "alias", "split_with_sizes", "_reshape_alias", "_unsafe_view",
         "empty", "empty_like"}  # fmt: skip


class FakeCuda(TorchDispatchMode):
    """Sends what touches "cuda" to a FakeTensorMode; counts launched kernels and names what waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.kernels: Counter[str] = Counter()
        self.waits: list[str] = []

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
        """Code in this block finds a GPU. Reading a number from it gives 0 and counts as a wait."""
        real = {name: getattr(torch.Tensor, name) for name in ("tolist", "item", "numpy")}

        def read(name):
            def function(tensor, *args, **named):
                if not isinstance(tensor, FakeTensor):
                    return real[name](tensor, *args, **named)
                self.waits += [name] if tensor.device.type == "cuda" else []
                zeros = np.zeros(tuple(tensor.shape))
                return zeros if name == "numpy" else zeros.tolist()

            return function

        with contextlib.ExitStack() as patches:
            for name in real:
                for kind in (torch.Tensor, FakeTensor):
                    patches.enter_context(mock.patch.object(kind, name, read(name)))
            found = {"is_available": True, "device_count": 8, "current_device": 0, "_lazy_init": None}
            found |= {"get_device_capability": (9, 0), "get_device_properties": mock.Mock(major=9, minor=0)}
            for name, value in found.items():
                patches.enter_context(mock.patch(f"torch.cuda.{name}", lambda *_, value=value, **__: value))
            patches.enter_context(mock.patch("torch._subclasses.fake_tensor.init_gpu_context", lambda *_: None))
            patches.enter_context(self)
            yield
