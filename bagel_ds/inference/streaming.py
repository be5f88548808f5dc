"""Decoder layers that live in host memory and visit the GPU while the network runs.

Guarantees: a layer's weights arrive by one copy while the layer before computes, and are not overwritten before the
layer has computed; between calls every parameter holds its own weights on the host. The network itself is unchanged:
the layers carry hooks. On a CPU the same code makes plain copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bagel_ds.model.offload import Copies, PlainCopies, StreamCopies

_ALIGNMENT = 256  # bytes; matrix kernels want aligned weights


class _Place(NamedTuple):
    parameter: nn.Parameter
    start: int
    shape: torch.Size

    def of(self, flat: Tensor) -> Tensor:
        return flat[self.start : self.start + self.shape.numel()].view(self.shape)


class StreamedLayers:
    """Streams `layers` (in the order in which a call of the network runs them) to `device`.

    Call it when the layers' parameters hold their weights in host memory; they move into page-locked memory for a GPU.
    """

    def __init__(self, layers: Sequence[nn.Module], device: torch.device, copies: Copies | None = None):
        on_gpu = device.type == "cuda"
        self._copies: Copies = copies or (StreamCopies(device) if on_gpu else PlainCopies())
        self._places: list[list[_Place]] = []
        self._host: list[Tensor] = []
        for layer in layers:
            places, flat = _flattened(layer, pinned=on_gpu)
            self._places.append(places)
            self._host.append(flat)
        size = max(len(flat) for flat in self._host)
        self._buffers = [torch.empty(size, dtype=self._host[0].dtype, device=device) for _ in range(2)]
        self._arriving: tuple[int, int, Any] | None = None  # layer, buffer, copy
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(lambda module, args, number=number: self._enter(number))
            layer.register_forward_hook(lambda module, args, output, number=number: self._leave(number))

    def _enter(self, number: int) -> None:
        """Put the layer's weights into place and start to fetch the next layer's."""
        if self._arriving is None or self._arriving[0] != number:
            self._fetch(number, 0)  # the first call, or one after a call that failed
        assert self._arriving is not None
        _, buffer, copy = self._arriving
        self._copies.wait(copy)
        for place in self._places[number]:
            place.parameter.data = place.of(self._buffers[buffer])
        self._fetch((number + 1) % len(self._host), 1 - buffer)

    def _fetch(self, number: int, buffer: int) -> None:
        flat = self._host[number]
        self._arriving = number, buffer, self._copies.start(self._buffers[buffer][: len(flat)], flat)

    def _leave(self, number: int) -> None:
        for place in self._places[number]:
            place.parameter.data = place.of(self._host[number])


def _flattened(layer: nn.Module, pinned: bool) -> tuple[list[_Place], Tensor]:
    """Move a layer's parameters into one flat host tensor."""
    places: list[_Place] = []
    start = 0
    for parameter in layer.parameters():
        if parameter.is_meta:  # an expert that the model folder doesn't hold
            continue
        places.append(_Place(parameter, start, parameter.shape))
        start += -(-parameter.nbytes // _ALIGNMENT) * _ALIGNMENT // parameter.element_size()
    flat = torch.empty(start, dtype=places[0].parameter.dtype, pin_memory=pinned)
    for place in places:
        place.parameter.data = place.of(flat).copy_(place.parameter.data)
    return places, flat
