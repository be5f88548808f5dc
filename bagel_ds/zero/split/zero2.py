"""DeepSpeed's ZeRO-2 optimizer in host memory, with bf16 masters that are the upper half of fp32 ones.

Guarantees: as `zero3.py`. The weights of the whole network stay on the GPU; this rank's share of them in host memory is
half of the masters, from which it goes to the GPU without another copy. Written for the internals of DeepSpeed 0.19.8.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import engine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from bagel_ds.zero.split.optimizer import GroupUpdates, replaced_optimizer


class SplitZero2(GroupUpdates, DeepSpeedZeroOptimizer):  # type: ignore[misc]
    """The optimizer that `deepspeed.initialize` returns as `engine.optimizer`."""

    def gradients(self, group: int) -> Tensor:
        gradients: Tensor = self.single_partition_of_fp32_groups[group].grad
        return gradients

    # -------------------------------------------------------------------------------------------- DeepSpeed's steps
    def _configure_master_weights(self, **options: Any) -> torch.dtype:
        super()._configure_master_weights(**options)  # sets attributes
        return torch.bfloat16

    def initialize_optimizer_states(self) -> None:
        """Memory for gradients, in the format of their sums, and none for weights on their way to the GPU."""
        for index, high in enumerate(self.single_partition_of_fp32_groups):
            high.grad_dtype = self.gradient_accumulation_dtype
            gradients = torch.zeros(high.numel(), dtype=high.grad_dtype, device=high.device)
            high.grad = get_accelerator().pin_memory(gradients) if self.cpu_offload_pin_memory else gradients
            (on_gpu,) = self.get_bit16_param_group(index)
            self.param_buffer_of_bit16_for_cpu_offload_groups[index] = on_gpu


def split_zero2() -> AbstractContextManager[None]:
    """Around `deepspeed.initialize`."""
    return replaced_optimizer(engine, "DeepSpeedZeroOptimizer", SplitZero2)
