"""Adds up the storage of all tensors alive while code runs: what a memory plan is compared with."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveTensors(TorchDispatchMode):
    """Bytes of tensors made inside the context: `now` and, since the start, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def leave_out(self, tensor: torch.Tensor) -> None:
        """Don't count this one, of which views will be made."""
        self._seen.add(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor) and self._counts(value):
                self._count(value.untyped_storage())
        return result

    def _counts(self, tensor: torch.Tensor) -> bool:
        return True

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def ended() -> None:
            self.now -= size
            self._seen.discard(key)

        weakref.finalize(storage, ended)
