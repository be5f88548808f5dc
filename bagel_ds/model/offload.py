"""Inputs of recomputed layers in host memory between the forward and the backward pass.

Guarantees: only what checkpointing saves is moved, and each tensor twice: out while its layer computes, and back during
the backward pass of the layer behind it, on a separate stream. Values come back bit for bit. All tensors lie in one
arena, page-locked for a GPU, which all passes reuse; it grows only if a pass needs more than it has.
"""

from __future__ import annotations

import weakref
from typing import Any, Iterator, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bagel_ds.model.shape.activations import ARENA_ALIGNMENT


class Copies(Protocol):
    """How tensors are copied between host and device."""

    def start(self, target: Tensor, source: Tensor) -> Any:
        """Queue a copy behind all earlier ones; returns what `wait` takes."""

    def wait(self, started: Any) -> None:
        """Let all later work wait for that copy."""

    def finish(self) -> None:
        """Block until all copies are done."""


class PlainCopies:
    """For a CPU, where host and device are the same memory."""

    def start(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def wait(self, started: None) -> None: ...

    def finish(self) -> None: ...


class StreamCopies:
    """On a separate stream. All copies share it, so those of the same memory keep their order."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device)

    def start(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def wait(self, started: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._stream.device).wait_event(started)

    def finish(self) -> None:
        self._stream.synchronize()


class Kept:
    """Stands for a saved tensor in autograd's graph. Its slice of the arena is in use while this object lives."""

    def __init__(self, tensor: Tensor, call: int):
        self.shape, self.dtype, self.nbytes = tensor.shape, tensor.dtype, tensor.nbytes
        self.call = call  # of the layer, counted from the first
        self.start = 0  # in the arena
        self.is_fetched = False


class Arena:
    """Host memory allocated like a stack: everything above the topmost slice in use is free."""

    def __init__(self, size: int = 0):
        self.size = size
        self.memory: Tensor | None = None
        self._taken: list[tuple[weakref.ref[Kept], int]] = []  # with where each ends

    def lacks(self, kept: Kept) -> bool:
        return self._top() + kept.nbytes > self.size

    def grow(self, kept: Kept) -> None:
        """Make room for `kept`, by at least half of the present size. No copy may be under way."""
        self.size = max(self._top() + kept.nbytes, self.size + self.size // 2)
        if self.memory is not None:
            old, self.memory = self.memory, None
            self._allocate(old.is_pinned())[: len(old)].copy_(old)

    def take(self, kept: Kept) -> None:
        """Assign a slice to `kept`."""
        kept.start = self._top()
        end = kept.start + kept.nbytes
        assert end <= self.size
        self._taken.append((weakref.ref(kept), -(-end // ARENA_ALIGNMENT) * ARENA_ALIGNMENT))

    def slice_of(self, kept: Kept, pinned: bool) -> Tensor:
        memory = self.memory if self.memory is not None else self._allocate(pinned)
        return memory[kept.start : kept.start + kept.nbytes].view(kept.dtype).view(kept.shape)

    def alive(self) -> Iterator[Kept]:
        """Slices in use, from the top down."""
        return (kept for kept in (held() for held, _ in reversed(self._taken)) if kept is not None)

    def _top(self) -> int:
        while self._taken and self._taken[-1][0]() is None:
            self._taken.pop()
        return self._taken[-1][1] if self._taken else 0

    def _allocate(self, pinned: bool) -> Tensor:
        # The device is named because inside deepspeed.zero.Init the default is the GPU.
        self.memory = torch.empty(self.size, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        return self.memory


class OffloadedInputs:
    """Calls layers as `recompute` does, with their input tensors on the host until the backward pass needs them.

    Tensors inside other arguments (rotary tables in the geometry, shared by all layers) stay on the device. `size` is
    the arena's initial size in bytes.
    """

    def __init__(self, size: int = 0, copies: Copies | None = None):
        self.arena = Arena(size)
        self._copies: Copies = copies or PlainCopies()
        self._device = torch.device("cpu")
        self._call = 0
        # Tensors that a copy still reads or writes. They are dropped only after the computation waits for the copy,
        # because it may then reuse their memory.
        self._leaving: list[tuple[Tensor, Any]] = []
        self._arriving: dict[weakref.ref[Kept], tuple[Tensor, Any]] = {}

    def __call__(self, layer: nn.Module, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return layer(*args)
        self._call += 1
        self._let_go()
        with torch.autograd.graph.saved_tensors_hooks(self._keep, self._fetched):
            # These hooks don't see the layer's own saved tensors: checkpoint puts its own hooks around the layer.
            return checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False)

    def _keep(self, tensor: Tensor) -> Kept | Tensor:
        if not tensor.numel():
            return tensor
        if tensor.is_cuda and isinstance(self._copies, PlainCopies):
            self._copies = StreamCopies(tensor.device)
        self._device = tensor.device
        kept = Kept(tensor, self._call)
        if self.arena.lacks(kept):
            self._copies.finish()
            self.arena.grow(kept)
        self.arena.take(kept)
        tensor = tensor.detach()  # so that holding it doesn't hold its graph
        self._leaving.append((tensor, self._copies.start(self._slice(kept), tensor)))
        return kept

    def _fetched(self, kept: Kept | Tensor) -> Tensor:
        """The tensor back on the device. Starts to fetch all inputs of its layer and of the one before."""
        if isinstance(kept, Tensor):
            return kept
        self._let_go()
        for other in self.arena.alive():
            if other.call in (kept.call, kept.call - 1) and not other.is_fetched:
                self._fetch(other)
        if weakref.ref(kept) not in self._arriving:  # a second backward pass through the same graph
            self._fetch(kept)
        tensor, started = self._arriving.pop(weakref.ref(kept))
        self._copies.wait(started)
        return tensor

    def _fetch(self, kept: Kept) -> None:
        kept.is_fetched = True
        tensor = torch.empty(kept.shape, dtype=kept.dtype, device=self._device)
        self._arriving[weakref.ref(kept)] = tensor, self._copies.start(tensor, self._slice(kept))

    def _let_go(self) -> None:
        """Drop tensors whose copies have been waited for, and those of a backward pass that was abandoned."""
        given_up = [held for held in self._arriving if held() is None]
        for _, started in [*self._leaving, *(self._arriving.pop(held) for held in given_up)]:
            self._copies.wait(started)
        self._leaving.clear()

    def _slice(self, kept: Kept) -> Tensor:
        return self.arena.slice_of(kept, pinned=self._device.type == "cuda")
