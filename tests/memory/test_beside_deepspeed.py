"""The planner beside DeepSpeed's own code: what it copies between GPU and host, and what it leaves on the GPU.

The methods run as they are, on tensors without contents (two_places.py): no GPU is needed, nothing is computed.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from deepspeed.runtime.swap_tensor.optimizer_utils import OptimizerStateSwapInfo, OptimizerSwapper
from deepspeed.runtime.swap_tensor.partitioned_optimizer_swapper import PartitionedOptimizerSwapper
from deepspeed.runtime.zero import stage3, stage_1_and_2
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from bagel_ds.memory.phases import _IN_TRANSIT, _NORM, _TO_NVME, _reduction
from bagel_ds.memory.states import Sharding, backward_states, states, window_gradients
from bagel_ds.memory.traffic import offloaded_gradient_bytes
from bagel_ds.model.shape.parameters import ParameterSize
from bagel_ds.zero.config.settings import ZeroSettings
from bagel_ds.zero.swap_patches import _cut_gradients
from tests.two_places import TwoPlaces

NUMEL, COUNT = 2**19, 4  # of the parameters
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Window(NamedTuple):
    stage: int
    device: str
    precision: str = "bf16"
    micro_batches: int = 1
    numel: int = NUMEL

    @property
    def sums(self) -> str:
        """As zero/config/resolve.py chooses it."""
        return "fp32" if self.precision == "fp32" or (self.micro_batches > 1 and self.stage > 1) else "bf16"

    @property
    def sharding(self) -> Sharding:
        # Stage 3 takes all parameters out of one bucket here, stages 1 and 2 one after the other.
        zero = {"stage": self.stage, "reduce_bucket_size": self.numel * (COUNT if self.stage == 3 else 1)}
        ds = {
            "bf16": {"enabled": self.precision == "bf16"},
            "data_types": {"grad_accum_dtype": self.sums},
            "gradient_accumulation_steps": self.micro_batches,
            "zero_optimization": {**zero, "offload_optimizer": {"device": self.device, "nvme_path": "nvme"}},
        }
        names = [f"model.layers.{index}.weight" for index in range(COUNT)]
        sizes = tuple(ParameterSize(name, self.numel, True) for name in names)
        return Sharding.over(ZeroSettings.of(ds), sizes, 1, on_cpu=False)


class _GPU:
    """What DeepSpeed asks of an accelerator in these methods."""

    def current_device_name(self) -> str:
        return "cuda:0"

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "cuda"

    def is_synchronized_device(self) -> bool:
        return True

    def current_stream(self) -> None:
        return None


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OptimizerSwapper, "_adjust_for_misaligned_lengths", _cut_gradients)
    for module in (stage3, stage_1_and_2):
        monkeypatch.setattr(module, "get_accelerator", _GPU)
        monkeypatch.setattr(module, "get_norm_dtype", lambda: torch.double)
        monkeypatch.setattr(module, "dist", SimpleNamespace(get_rank=lambda group=None: 0))
    # As use_checked_swapping has it, for this test only.
    monkeypatch.setattr(PartitionedOptimizerSwapper, "_adjust_for_misaligned_lengths", _cut_gradients)


def parameters(numel: int = NUMEL) -> list[Any]:
    made = [SimpleNamespace(ds_id=index, ds_numel=numel, grad=None, requires_grad=True) for index in range(COUNT)]
    for parameter in made:
        parameter.numel = parameter.partition_numel = lambda: numel
        parameter.shape = torch.Size([numel])
    return made


def with_attributes(kind: type, **attributes: Any) -> Any:
    made = object.__new__(kind)
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def masters(numel: int) -> torch.Tensor:
    made = torch.zeros(COUNT * numel)
    made.grad = torch.zeros(COUNT * numel)
    return made


def swapper(master: torch.Tensor, window: Window) -> Any:
    """DeepSpeed's, but what it writes goes into host memory."""
    handle = SimpleNamespace(is_pinned=lambda tensor: True)
    info = OptimizerStateSwapInfo(master, master.numel(), "", handle)

    def write(tensor_list: list[torch.Tensor], path_list: list[str]) -> None:
        for tensor in tensor_list:
            torch.empty(tensor.shape).copy_(tensor)

    aio = {"block_size": 2**20, "intra_op_parallelism": 2}
    return with_attributes(
        PartitionedOptimizerSwapper,
        min_aio_bytes=aio["block_size"],
        swap_element_size=4,
        numel_alignment=1024 * aio["intra_op_parallelism"] // 4,
        swap_params_info={master.ds_id: info},
        gradient_swapper=SimpleNamespace(has_buffers=lambda: True, swap_out_tensors=write),
        timers=None,
        timer_names=set(),
    )


def stage3_window(window: Window) -> tuple[float, int, int]:
    """Bytes moved per element, most on the GPU and what stays there, beside the gradients themselves."""
    numel, sums = window.numel, TYPES[window.sums]
    buffer, master = torch.zeros(COUNT * numel, dtype=sums), masters(numel)
    master.ds_id = "0_3"
    optimizer = with_attributes(
        DeepSpeedZeroOptimizer_Stage3,
        offload_optimizer=True,
        swap_optimizer=window.device == "nvme",
        gradient_accumulation_dtype=sums,
        master_weights_and_grads_dtype=torch.float32,
        fp32_partitioned_groups_flat=[master],
        grad_position={index: [0, index * numel, numel] for index in range(COUNT)},
        norm_for_param_grads={},
        _offload_boundary_param_ids=set(),
        _DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition=dict(enumerate(buffer.split(numel))),
        _get_param_partition_rank=lambda parameter: 0,
        get_param_id=lambda parameter: parameter.ds_id,
        _swappable_optimizer_subgroup=lambda group: window.device == "nvme",
        optimizer_swapper=swapper(master, window),
    )
    gradients = [torch.zeros(numel, dtype=sums, device="cuda") for _ in range(COUNT)]
    places = torch.utils._python_dispatch._get_current_dispatch_mode()
    places.restart()
    before = places.now
    for index in range(window.micro_batches):
        optimizer.micro_step_id = index
        optimizer.is_gradient_accumulation_boundary = lambda last=index == window.micro_batches - 1: last
        optimizer.partition_grads(parameters(numel), gradients)
    return places.moved / (COUNT * numel), places.peak - before, places.now - before


def stage12_window(window: Window) -> tuple[float, int, int]:
    """As `stage3_window`."""
    numel, weights = window.numel, TYPES[window.precision]
    offsets = {index: index * numel for index in range(COUNT)}
    made = parameters(numel)
    optimizer = with_attributes(
        DeepSpeedZeroOptimizer,
        cpu_offload=True,
        cpu_offload_pin_memory=False,
        device="cpu",
        dtype=weights,
        gradient_accumulation_dtype=TYPES[window.sums],
        master_weights_and_grads_dtype=torch.float32,
        low_precision_master_weights_and_grads=False,
        use_grad_accum_attribute=False,
        single_partition_of_fp32_groups=[masters(numel)],
        grad_position={index: [0, 0, offset, numel] for index, offset in offsets.items()},
        temp_grad_buffer_for_gpu_offload=torch.zeros(numel, dtype=weights, device="cuda"),
        accumulated_grads_in_cpu={},
        norm_for_param_grads={},
        averaged_gradients={},
        params_in_partition=[made],
        partition_size=[COUNT * numel],
        real_dp_process_group=[None],
        grad_start_offset={0: {0: dict.fromkeys(offsets, 0)}},
        grad_partition_insertion_offset={0: {0: offsets}},
        _offload_gradient_safety_enabled=False,
        _offload_accumulated_param_ids=set(),
        _pending_offload_events={},
        _is_muon_group=lambda tensors: False,
        get_param_id=lambda parameter: parameter.ds_id,
        update_offload_overflow_tracker=lambda gradient: None,  # reads a value
    )
    gradients = [torch.zeros(numel, dtype=weights, device="cuda") for _ in range(COUNT)]
    places = torch.utils._python_dispatch._get_current_dispatch_mode()
    places.restart()
    before = places.now
    for index in range(window.micro_batches):
        optimizer.micro_step_id = index
        is_last = index == window.micro_batches - 1
        optimizer.is_gradient_accumulation_boundary = lambda last=is_last: last
        for parameter, gradient in zip(made, gradients):
            if window.stage == 2 or is_last:  # else the backward pass reduces nothing
                parameter.grad, parameter.dtype = gradient, weights
                optimizer.copy_grads_in_partition(parameter, 0)
    return places.moved / (COUNT * numel), places.peak - before, places.now - before


WINDOWS = [
    *(Window(3, device, "bf16", count) for device in ("cpu", "nvme") for count in (1, 2, 3)),
    *(Window(3, device, "fp32", count) for device in ("cpu", "nvme") for count in (1, 2)),
    *(Window(2, "cpu", precision, count) for precision in ("bf16", "fp32") for count in (1, 2, 3)),
    *(Window(1, "cpu", precision, count) for precision in ("bf16", "fp32") for count in (1, 3)),
]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_gradients_move_as_many_bytes_as_deepspeed_copies(window: Window) -> None:
    with TwoPlaces():
        moved, _, _ = (stage3_window if window.stage == 3 else stage12_window)(window)
    assert moved == offloaded_gradient_bytes(window.sharding)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_gradients_on_their_way_take_what_they_take_of_the_gpu(window: Window) -> None:
    sharding = window.sharding
    with TwoPlaces():
        _, peak, stays = (stage3_window if window.stage == 3 else stage12_window)(window)
    parts = {state.name: state.size for state in [*_reduction(sharding, 0), *window_gradients(sharding)]}
    planned = sum(parts.get(name, 0) for name in (_NORM, _IN_TRANSIT, _TO_NVME, "gradients"))
    # Beside a few scalars; and not all of the fp32 copies are there when the last norm is taken.
    assert peak <= planned + 4096 and planned <= 1.4 * peak
    assert stays == pytest.approx(parts.get("gradients", 0), abs=4096)


@pytest.mark.parametrize("numel", [2**19, 2**19 + 512, 2**19 + 1, 2**18 - 1, 1024])
def test_gradients_that_are_not_swapped_leave_the_gpu(numel: int) -> None:
    """Small ones and the ends of others (zero/swap_patches.py); DeepSpeed itself keeps whole gradients for them."""
    window = Window(3, "nvme", numel=numel)
    with TwoPlaces():
        moved, _, left = stage3_window(window)
    assert moved == pytest.approx(offloaded_gradient_bytes(window.sharding))
    assert left < 4096  # norms
    planned = sum(state.size for state in backward_states(window.sharding))
    assert planned == (4 * COUNT * numel if 4 * numel < 2**20 else 0)


@pytest.mark.parametrize("device", ["none", "cpu"])
def test_fp32_masters_are_their_own_memory(device: str) -> None:
    """DeepSpeed would use the weights, but it compares their device with a string."""
    weights = torch.zeros(8)
    optimizer = with_attributes(
        DeepSpeedZeroOptimizer_Stage3,
        fp16_partitioned_groups_flat=[weights],
        fp16_partitioned_groups_flat_numel=[8],
        fp16_partitioned_groups_flat_id=[[0]],
        fp32_partitioned_groups_flat=[],
        master_weights_and_grads_dtype=torch.float32,
        offload_optimizer=device == "cpu",
        partial_offload=1.0,
        swap_optimizer=False,
        params_in_nvme_and_cpu=False,
        use_muon=False,
        device="cpu",
        optimizer=SimpleNamespace(param_groups=[]),
        fp16_groups=[],
    )
    optimizer._create_fp32_partitions()
    (master,) = optimizer.fp32_partitioned_groups_flat
    assert master.data_ptr() != weights.data_ptr()
    sharding = Window(3, device, "fp32").sharding
    assert [state.size for state in states(sharding, 0, None) if state.name == "masters"] == [4 * COUNT * NUMEL]
