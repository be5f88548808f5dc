"""DeepSpeed's ZeRO-3 optimizer without copies: the 16-bit partition is the upper half of the masters.

Guarantees: `deepspeed.initialize` inside `split_zero3` builds it, and `engine.step()` clips, skips and updates as it
does otherwise. No fp32 masters are made, not even for a moment, and no second copy of the gradients: one flat buffer
sums them, and the update reads it. Written for the internals of DeepSpeed 0.19.8.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from deepspeed.runtime.zero import stage3
from torch import Tensor

from bagel_ds.zero.split.optimizer import GroupUpdates, replaced_optimizer


class SplitZero3(GroupUpdates, stage3.DeepSpeedZeroOptimizer_Stage3):  # type: ignore[misc]
    """The optimizer that `deepspeed.initialize` returns as `engine.optimizer`."""

    def gradients(self, group: int) -> Tensor:
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

    def _reassign_or_swap_out_partitioned_parameters(self, group: int) -> None:
        pass  # the update has written the weights

    def _release_sub_group(self, group: int, timer_names: Any) -> None:
        if not self.offload_optimizer:
            self.averaged_gradients[group] = None


def split_zero3() -> AbstractContextManager[None]:
    """Around `deepspeed.initialize`, which names the class of its ZeRO-3 optimizer itself."""
    return replaced_optimizer(stage3, "DeepSpeedZeroOptimizer_Stage3", SplitZero3)
