"""A GPU that isn't there: DeepSpeed's own code on tensors without contents, counting what moves and what lies where.

`TwoPlaces` makes tensors of any device without memory (torch's fake tensors) and counts, per operation, bytes copied
between a "cuda" and a "cpu" tensor and the bytes of live "cuda" tensors.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from tests.live_tensors import LiveTensors


class _WithoutDeviceGuard(TorchFunctionMode):
    """`copy_` and slices as operators: Tensor's own methods would first switch to a device that isn't there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_:
            func = torch.ops.aten.copy_.default
        elif func is torch.Tensor.__getitem__ and isinstance(args[1], slice):
            begin, end, _ = args[1].indices(args[0].numel())
            func, args = torch.narrow, (args[0], 0, begin, end - begin)
        return func(*args, **(kwargs or {}))


class TwoPlaces(LiveTensors):
    """`moved` bytes between the two so far; `now` bytes that live on the GPU and `peak`, their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0
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
        self.moved, self.peak = 0, self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default):
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            if {source.device.type, result.device.type} == {"cpu", "cuda"}:
                # torch converts on the source's side where it goes to the GPU, on the host where it comes from there.
                self.moved += (result if result.device.type == "cuda" else source).nbytes
        return result

    def _counts(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "cuda"
