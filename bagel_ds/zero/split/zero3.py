"""DeepSpeed's ZeRO-3 optimizer without copies: the 16-bit partition is the upper half of the masters.

Guarantees: `deepspeed.initialize` inside `split_zero3` builds it, and `engine.step()` clips, skips and updates as it
does otherwise. No fp32 masters are made, not even for a moment, and no second copy of the gradients: one flat buffer
sums them, and the update reads it. Written for the internals of DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Callable

import torch
from deepspeed.runtime.zero import stage3
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from torch import Tensor, nn


class SplitAdamW(torch.optim.Optimizer):
    """Holds AdamW's options for DeepSpeed; what it updates is set once ZeRO-3 has made its groups."""

    def __init__(self, parameters: list[nn.Parameter], options: dict[str, Any]):
        super().__init__(parameters, options)
        self.update_group: Callable[[int, Tensor, float], None] | None = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise RuntimeError("split masters are updated group by group")


class SplitZero3(stage3.DeepSpeedZeroOptimizer_Stage3):  # type: ignore[misc]
    """The optimizer that `deepspeed.initialize` returns as `engine.optimizer`."""

    def gradients(self, group: int) -> Tensor:
        """The group's summed gradients on this rank, laid out like its weights (1-D)."""
        start = sum(self.fp16_partitioned_groups_flat_numel[:group])
        flat: Tensor = self.grad_partitions_flat_buffer
        return flat.narrow(0, start, self.fp16_partitioned_groups_flat_numel[group])

    # -------------------------------------------------------------------------------------------- DeepSpeed's steps
    def _create_fp32_partitions(self) -> None:
        self.fp32_partitioned_groups_flat.extend(self.fp16_partitioned_groups_flat)
        for options in self.optimizer.param_groups:
            options["params"] = []  # as DeepSpeed leaves it: whole parameters are not what is updated

    def initialize_optimizer_states(self) -> None:
        pass  # would make a second buffer for gradients

    def _offload_grad_partition_at_boundary(self, parameter: Any, gradient: Tensor, *swapped: Any) -> None:
        self.norm_for_param_grads[self.get_param_id(parameter)] = self._constant_buffered_norm2(gradient)

    def _prepare_sub_group(self, group: int, timer_names: Any) -> None:
        pass  # would copy gradients to fp32

    def unscale_and_clip_grads(self, group: int, total_norm: Tensor) -> None:
        """Only the factor, in the precision in which DeepSpeed multiplies: the update applies it."""
        scale: Any = self.loss_scale
        if self.clip_grad > 0:
            scale = torch.clamp((total_norm / self.loss_scale + 1e-6) / self.clip_grad, min=1.0) * self.loss_scale
        self._factor = float(1.0 / scale)

    def _optimizer_step(self, group: int) -> None:
        self.optimizer.update_group(group, self.gradients(group), self._factor)

    def _reassign_or_swap_out_partitioned_parameters(self, group: int) -> None:
        pass  # the update has written the weights

    def _release_sub_group(self, group: int, timer_names: Any) -> None:
        if not self.offload_optimizer:
            self.averaged_gradients[group] = None


@contextmanager
def split_zero3() -> Iterator[None]:
    """Around `deepspeed.initialize`, which names the class of its ZeRO-3 optimizer itself."""
    before = stage3.DeepSpeedZeroOptimizer_Stage3
    if SplitAdamW not in ZERO_SUPPORTED_OPTIMIZERS:
        ZERO_SUPPORTED_OPTIMIZERS.append(SplitAdamW)
    stage3.DeepSpeedZeroOptimizer_Stage3 = SplitZero3
    try:
        yield
    finally:
        stage3.DeepSpeedZeroOptimizer_Stage3 = before
