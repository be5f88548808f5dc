"""What DeepSpeed's optimizers for ZeRO stages 2 and 3 share when masters are split: clipping and the update itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Callable

import torch
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from torch import Tensor, nn


class SplitAdamW(torch.optim.Optimizer):
    """Holds AdamW's options for DeepSpeed; what it updates is set once DeepSpeed has made its groups."""

    def __init__(self, parameters: list[nn.Parameter], options: dict[str, Any]):
        super().__init__(parameters, options)
        self.update_group: Callable[[int, Tensor, float], None] | None = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise RuntimeError("split masters are updated group by group")


class GroupUpdates(ABC):
    """Goes before DeepSpeed's class: its clipping and its step over a group, in one pass of `SplitAdamW`'s update."""

    optimizer: Any
    loss_scale: float
    clip_grad: float

    @abstractmethod
    def gradients(self, group: int) -> Tensor:
        """The group's summed gradients on this rank, laid out like its weights (1-D)."""

    def unscale_and_clip_grads(self, gradients: object, total_norm: Tensor) -> None:
        """Only the factor, in the precision in which DeepSpeed multiplies: the update applies it."""
        scale: Any = self.loss_scale
        if self.clip_grad > 0:
            scale = torch.clamp((total_norm / self.loss_scale + 1e-6) / self.clip_grad, min=1.0) * self.loss_scale
        self._factor = float(1.0 / scale)

    def _optimizer_step(self, group: int) -> None:
        self.optimizer.update_group(group, self.gradients(group), self._factor)


@contextmanager
def replaced_optimizer(module: ModuleType, name: str, kind: type[GroupUpdates]) -> Iterator[None]:
    """Around `deepspeed.initialize`, which takes the class of its ZeRO optimizer from `module.name`."""
    if SplitAdamW not in ZERO_SUPPORTED_OPTIMIZERS:
        ZERO_SUPPORTED_OPTIMIZERS.append(SplitAdamW)
    assert hasattr(module, name), f"bagel_ds is written for deepspeed 0.19.8, whose {module.__name__} has {name}"
    before = getattr(module, name)
    setattr(module, name, kind)
    try:
        yield
    finally:
        setattr(module, name, before)
