"""What bagel_ds reads of DeepSpeed's inside is as it was read: another version is a message here, not wrong numbers.

A digest that differs says: read the method again, compare it with what bagel_ds/zero (and docs/architecture.md) takes
from it, run the parity tests of every stage and offload, and only then write the new digest here.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from types import SimpleNamespace

import deepspeed
import pytest

from bagel_ds.zero.partitions import check_internals

STAGE3 = "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3"
STAGE2 = "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"
STAGE0 = "deepspeed.runtime.fp16.unfused_optimizer.FP16_UnfusedOptimizer"  # in bf16; in fp32 nothing wraps Adam
ENGINE = "deepspeed.runtime.engine.DeepSpeedEngine"
SWAPPED_STATES = "deepspeed.runtime.swap_tensor.optimizer_utils.OptimizerSwapper"
SWAPPED_WEIGHTS = "deepspeed.runtime.swap_tensor.partitioned_param_swapper.AsyncPartitionedParameterSwapper"
SWAPPER = "deepspeed.runtime.swap_tensor.partitioned_optimizer_swapper.PartitionedOptimizerSwapper"

READ = {
    f"{STAGE3}.step": "89aab0f80f1a80b3",
    f"{STAGE3}._prepare_sub_group": "89aab0f80f1a80b3",
    f"{STAGE3}._release_sub_group": "89aab0f80f1a80b3",
    f"{STAGE3}._optimizer_step": "35f8511bba5ff760",
    f"{STAGE3}._optimizer_states_and_gradient_swap_in": "7e2325ceadba4825",
    f"{STAGE3}._optimizer_states_and_gradient_swap_out": "be6464273a1760d2",
    f"{STAGE3}._release_swap_buffers": "86cf91e963b385cd",
    f"{STAGE3}._swappable_optimizer_subgroup": "145fd8816badf30c",
    f"{STAGE3}._partition_all_parameters": "89aab0f80f1a80b3",
    f"{STAGE2}.step": "9520884fd916d178",
    f"{STAGE2}.update_lp_params": "3cdce069e3c66082",
    f"{STAGE2}.scaled_global_norm": "63c6a6fe100c4e49",
    f"{STAGE2}.has_overflow": "cadc27a13cb7e977",
    f"{STAGE0}.step": "626bd9aa8af843e9",
    f"{STAGE0}.initialize_optimizer_states": "59c37209d79fa8b2",
    f"{STAGE0}.unscale_and_clip_grads": "748792c7d1075f9d",
    f"{ENGINE}.step": "02d6a4373435dd8e",
    f"{ENGINE}._take_model_step": "c4c6e01aa1fc4e7d",
    f"{ENGINE}.clip_fp32_gradients": "c3ad53cbce68a72f",
    f"{SWAPPED_STATES}._io_aligned_numel": "fa9698a7c142dd47",
    f"{SWAPPED_STATES}._get_param_swap_info": "d20846aaae414b6e",
    f"{SWAPPED_STATES}._adjust_for_misaligned_lengths": "1e87ad5071059ae9",
    f"{SWAPPED_STATES}._swap_out_gradients": "313e76c2d1573d87",
    f"{SWAPPER}.__init__": "f9518a39bec8e9b1",
    f"{SWAPPER}.swap_in_optimizer_state": "6b96e0d0e495be29",
    "deepspeed.ops.op_builder.builder.OpBuilder.load": "47d513ddccc5335a",
    f"{SWAPPED_WEIGHTS}._configure_aio": "74d489dc31c4ae00",
    f"{SWAPPED_WEIGHTS}.reserve_partitioned_swap_space": "40a03f904eef777c",
    f"{SWAPPED_WEIGHTS}.swap_out_partitioned_params": "747b5adc9b463dd5",
    f"{SWAPPED_WEIGHTS}.swap_in": "38b5aefce087a2d3",
    f"{SWAPPED_WEIGHTS}.swap_out_and_release": "90832b179cd3642d",
    f"{SWAPPED_WEIGHTS}.remove_partition_and_release_buffers": "27535405f0aaa7c2",
}


@pytest.mark.parametrize("name", READ)
def test_a_method_that_is_relied_on_is_the_one_that_was_read(name: str) -> None:
    place, _, method = name.rpartition(".")
    module, _, owner = place.rpartition(".")
    source = inspect.getsource(getattr(getattr(importlib.import_module(module), owner), method))
    found = hashlib.sha256(source.encode()).hexdigest()[:16]
    assert found == READ[name], f"deepspeed {deepspeed.__version__} has another {name} than 0.19.8"


def test_an_optimizer_without_what_is_read_of_it_is_named() -> None:
    with pytest.raises(AssertionError, match="_release_sub_group.*deepspeed 0.19.8"):
        check_internals(SimpleNamespace(fp16_groups=[]), 3)
