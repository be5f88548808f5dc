"""One network on several ranks: each calls it for its own requests, and all make the same number of calls.

Guarantees: where a call is a collective operation (ZeRO-3 gathers weights), no rank waits in one that another never
enters, whatever each has to do: before every call the ranks exchange whether any is to be made, and one that has
nothing left joins with an empty pack. What a rank gets does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bagel_ds.machine.liveness import going_on
from bagel_ds.model.bagel import Prediction
from bagel_ds.model.batch import PackedBatch
from bagel_ds.model.mot import LayerCache
from bagel_ds.model.shape.config import BagelConfig

AnyRank = Callable[[bool], bool]  # a collective: whether it is true on any rank


class JointCalls:
    """Stands for the network in a `Network`. Call `finish` once this rank's requests are done, on every rank.

    `forward` is a call of the network that all ranks must make together; `empty` is a pack without tokens, on the
    device. `made` counts the calls, and `on_call(made)` follows each.
    """

    def __init__(
        self,
        config: BagelConfig,
        dtype: torch.dtype,
        forward: Callable[..., Prediction],
        any_rank: AnyRank,
        empty: PackedBatch,
        on_call: Callable[[int], None] = lambda made: None,
    ) -> None:
        self.config, self.dtype = config, dtype
        self._forward, self._any_rank, self._empty, self._on_call = forward, any_rank, empty, on_call
        self.made = 0

    def __call__(
        self, batch: PackedBatch, latents_GF: Tensor, t_G: Tensor, caches: Sequence[LayerCache], cached: Sequence[int]
    ) -> Prediction:
        self._any_rank(True)
        return self._call(batch, latents_GF, t_G, caches, cached)

    def finish(self) -> None:
        """Join in the calls of other ranks until none has any left."""
        no_latents, no_times = self._empty.posterior_eps, self._empty.timesteps
        while self._any_rank(False):
            self._call(self._empty, no_latents, no_times, (), ())

    def velocity_of(self, last_MC: Tensor) -> Tensor:
        raise AssertionError("a part of the network is no joint call: `settings_fault` refuses enable_taylorseer")

    def _call(self, *inputs: Any) -> Prediction:
        prediction = self._forward(*inputs)
        self.made += 1
        going_on()
        self._on_call(self.made)
        return prediction
