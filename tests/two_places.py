"""A GPU that isn't there: DeepSpeed's own code on tensors without contents, counting what moves and what lies where.

`TwoPlaces` makes tensors of any device without memory (torch's fake tensors) and counts, per operation, bytes copied
between a "cuda" and a "cpu" tensor and the bytes of live "cuda" tensors.
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class _WithoutDeviceGuard(TorchFunctionMode):
    """`copy_` and slices as operators: Tensor's own methods would first switch to a device that isn't there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_:
            func = torch.ops.aten.copy_.default
        elif func is torch.Tensor.__getitem__ and isinstance(args[1], slice):
            begin, end, _ = args[1].indices(args[0].numel())
            func, args = torch.narrow, (args[0], 0, begin, end - begin)
        return func(*args, **(kwargs or {}))


class TwoPlaces(TorchDispatchMode):
    """`moved` bytes between the two so far; `on_gpu` bytes that live there now and `gpu_peak`, their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = self.on_gpu = self.gpu_peak = 0
        self._seen: set[int] = set()
        self._stack = ExitStack()

    def __enter__(self) -> TwoPlaces:
        self._stack.enter_context(FakeTensorMode())
        self._stack.enter_context(_WithoutDeviceGuard())
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def restart(self) -> None:
        """Count from here: what lives now is the least there is."""
        self.moved, self.gpu_peak = 0, self.on_gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default):
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            if {source.device.type, result.device.type} == {"cpu", "cuda"}:
                # torch converts on the source's side where it goes to the GPU, on the host where it comes from there.
                self.moved += (result if result.device.type == "cuda" else source).nbytes
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor) and value.device.type == "cuda":
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.on_gpu += size
        self.gpu_peak = max(self.gpu_peak, self.on_gpu)

        def ended() -> None:
            self.on_gpu -= size
            self._seen.discard(key)

        weakref.finalize(storage, ended)
