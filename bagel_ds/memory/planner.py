"""The memory planner: what a run will need on each GPU, each host and each NVMe, before anything is loaded.

Guarantees: pure arithmetic on the network's shape, the resolved DeepSpeed configuration and the run's options; no
tensor is made, no device asked. Host memory is tested against measured runs on CPU (within 10 %); what only a GPU has
(context, NCCL, fragmentation) is an allowance, listed as an item of its own. A run on CPU (`device="cpu"`) has its
device part in host memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from bagel_ds.arguments.run_config import RunConfig
from bagel_ds.errors import UserError
from bagel_ds.memory.between_steps import SampleShape, decoder, evaluation, samples
from bagel_ds.memory.phases import Moment, StepShape, arena, gathering, moments, offloaded_inputs
from bagel_ds.memory.states import DEVICE, EXACT_ABOVE_MIB, HOST, NVME, Sharding, State, pinned_excess, states
from bagel_ds.memory.traffic import Traffic, step_traffic
from bagel_ds.model.shape.activations import PackShape
from bagel_ds.model.shape.config import BagelConfig, VAEConfig
from bagel_ds.model.shape.parameters import parameter_sizes, vae_encoder_parameters
from bagel_ds.model.shape.parts import Freezing
from bagel_ds.units import GIB, MIB

# Measured on CPU (torch 2.13, deepspeed 0.19.8): the launcher's two processes, a rank's libraries and data plan, the
# process that its data workers are forked from, a worker beside its packs, and what oneDNN keeps of compiled kernels
# for packs of ever new lengths.
LAUNCHER = 322 * MIB
RANK = 270 * MIB
WORKER_SERVER, WORKER = 100 * MIB, 90 * MIB
CPU_KERNELS = {True: 330 * MIB, False: 90 * MIB}  # in bf16, in fp32
# Allowances on a GPU: what the driver and CUDA's libraries take on the device and in the process, NCCL's buffers, and
# what the caching allocator can't use of what comes and goes.
CUDA_HOST, CUDA_CONTEXT, NCCL = 1200 * MIB, 550 * MIB, 400 * MIB
FRAGMENTATION = 0.05
# Not for the run: what a card holds back of its nominal size (ECC, display), the operating system, the file system.
GPU_RESERVED, RESERVED = 0.04, {DEVICE: 0, HOST: 4096 * MIB, NVME: 5120 * MIB}
PACK_BYTES_PER_TOKEN = 2100  # pixels as uint8, noise and positions of one token in a prepared pack


@dataclass(frozen=True)
class MemoryOptions:
    """What the network and the DeepSpeed configuration don't say about a run. Budgets in GiB; None is unlimited."""

    world_size: int = 1
    ranks_per_host: int | None = None  # None: all on one host
    device: str = "cuda"  # or "cpu"
    max_num_tokens: int = 36864
    image_pixels: int = 1024 * 1024  # of the largest image the autoencoder encodes
    activation_checkpointing: str = "full"
    freeze_llm: bool = False
    freeze_vit: bool = False
    ema: bool = True
    ema_bytes: int = 4  # per parameter
    ema_place: str | None = None  # "gpu", "host" or "nvme"; None is beside the masters
    num_workers: int = 4
    prefetch_factor: int = 2
    # torch rounds page-locked blocks up to powers of two and keeps freed ones; the trainer has it spare the large ones
    rounds_pinned_memory: bool = False
    vae: VAEConfig = VAEConfig()
    evaluates: bool = False
    samples: SampleShape | None = None
    gpu_memory: float | None = None
    host_memory: float | None = None
    nvme: float | None = None

    @classmethod
    def of(cls, config: RunConfig, world_size: int, **others: Any) -> MemoryOptions:
        """The options of a training run; `others` are fields of this class."""
        training, data = config.training, config.data
        return cls(
            world_size=world_size,
            max_num_tokens=data.max_num_tokens,
            activation_checkpointing=training.activation_checkpointing,
            freeze_llm=training.freeze_llm,
            freeze_vit=training.freeze_vit,
            ema=training.ema > 0,
            ema_bytes=2 if training.ema_dtype == "bf16" else 4,
            num_workers=data.num_workers,
            prefetch_factor=data.prefetch_factor,
            evaluates=training.val_config is not None,
            **others,
        )

    @property
    def freezing(self) -> Freezing:
        return Freezing(self.freeze_llm, self.freeze_vit)


@dataclass(frozen=True)
class MemoryItem:
    """`bytes` of one rank on a GPU, of all ranks of a host in host memory and on NVMe.

    `moment` is "" for what is always there, else the moment it belongs to (the one that makes the peak).
    """

    place: str
    name: str
    bytes: int
    moment: str = ""


@dataclass(frozen=True)
class MemoryPlan:
    """Peaks in bytes: of one rank's GPU, of one host, of one host's NVMe; `traffic` of one host and optimizer step."""

    gpu_peak: int
    host_peak: int
    nvme: int
    traffic: Traffic
    items: tuple[MemoryItem, ...]
    gpu_moments: tuple[tuple[str, int], ...]  # peak at each moment, for those who want to know what comes next
    host_moments: tuple[tuple[str, int], ...]
    gpu_memory: float | None = None
    host_memory: float | None = None
    nvme_space: float | None = None

    @property
    def shortfalls(self) -> dict[str, float]:
        """GiB lacking by place; empty where everything fits."""
        needs = {
            DEVICE: (self.gpu_peak, self.gpu_memory),
            HOST: (self.host_peak, self.host_memory),
            NVME: (self.nvme, self.nvme_space),
        }
        usable = {
            place: budget * (1 - (GPU_RESERVED if place == DEVICE else 0)) - RESERVED[place] / GIB
            for place, (need, budget) in needs.items()
            if budget is not None and need
        }
        return {
            place: needs[place][0] / GIB - budget for place, budget in usable.items() if needs[place][0] > budget * GIB
        }

    @property
    def fits(self) -> bool:
        return not self.shortfalls

    def to_json(self) -> dict[str, Any]:
        return {
            "gpu_peak_gib": _gib(self.gpu_peak),
            "host_peak_gib": _gib(self.host_peak),
            "nvme_gib": _gib(self.nvme),
            "step_traffic_gib": _gib(self.traffic.total),
            "traffic": {name: _gib(value) for name, value in self.traffic._asdict().items()},
            "fits": self.fits,
            "shortfalls_gib": {place: round(value, 2) for place, value in self.shortfalls.items()},
            "items": [
                {"place": item.place, "name": item.name, "gib": _gib(item.bytes), "moment": item.moment}
                for item in self.items
            ],
            "gpu_moments_gib": {name: _gib(value) for name, value in self.gpu_moments},
            "host_moments_gib": {name: _gib(value) for name, value in self.host_moments},
        }


def plan_memory(model: BagelConfig, ds_config: dict[str, Any], run: MemoryOptions) -> MemoryPlan:
    """Predict the peaks of a run. `ds_config` is resolved (`resolve_ds_config`): it holds no "auto".

    Raises UserError where nothing would train.
    """
    parameters = parameter_sizes(model, run.freezing)
    if not any(parameter.trains for parameter in parameters):
        raise UserError("nothing to train: the freeze_* arguments with visual_und/visual_gen leave no parameter")
    on_cpu = run.device == "cpu"
    sharding = Sharding(ds_config, parameters, run.world_size, on_cpu)
    shape = StepShape(
        model,
        run.freezing,
        run.vae,
        _largest_pack(model, run),
        run.image_pixels,
        run.activation_checkpointing,
        gpu_bytes=None if run.gpu_memory is None else run.gpu_memory * GIB,
    )
    ranks = run.ranks_per_host or run.world_size
    always = [
        *_rank_states(sharding, shape, run),
        *decoder(shape, run.samples),
        *_process_states(run, on_cpu, sharding.bf16),
    ]
    if not on_cpu:
        pinned = [*always, *arena(sharding, shape)]
        always.append(State("page-locked memory: rounding and cache", HOST, _excess(sharding, pinned, run)))
    peaks = moments(sharding, shape)
    if run.evaluates:
        peaks.append(evaluation(sharding, shape, _data_states(run)))
    if run.samples is not None:
        peaks.append(samples(sharding, shape, run.samples))
    if on_cpu:
        always = [_moved(state) for state in always]
        peaks = [Moment(moment.name, [_moved(state) for state in moment.parts]) for moment in peaks]
    else:
        peaks = [_with_fragmentation(moment) for moment in peaks]
    per_host = {DEVICE: 1, HOST: ranks, NVME: ranks}
    totals = {place: _sum(always, place) * times for place, times in per_host.items()}
    totals[HOST] += LAUNCHER
    by_moment = {
        place: tuple((moment.name, totals[place] + _sum(moment.parts, place) * times) for moment in peaks)
        for place, times in per_host.items()
    }
    highest = {place: max(found, key=lambda pair: pair[1]) for place, found in by_moment.items()}
    return MemoryPlan(
        gpu_peak=0 if on_cpu else highest[DEVICE][1],
        host_peak=highest[HOST][1],
        nvme=highest[NVME][1],
        traffic=step_traffic(sharding, gathering(sharding, shape), ranks, offloaded_inputs(sharding, shape)),
        items=tuple(_items(always, peaks, {place: name for place, (name, _) in highest.items()}, per_host)),
        gpu_moments=() if on_cpu else by_moment[DEVICE],
        host_moments=by_moment[HOST],
        gpu_memory=run.gpu_memory,
        host_memory=run.host_memory,
        nvme_space=run.nvme,
    )


def _largest_pack(model: BagelConfig, run: MemoryOptions) -> PackShape:
    """The worst pack for each moment: every token has a label; all that isn't drawn may be patches of a ViT image."""
    tokens = run.max_num_tokens
    return PackShape(tokens, labels=tokens, vit_tokens=tokens // 2 if model.visual_gen else tokens)


def _rank_states(sharding: Sharding, shape: StepShape, run: MemoryOptions) -> list[State]:
    found = states(sharding, run.ema_bytes if run.ema else 0, run.ema_place)
    live = gathering(sharding, shape)
    if live is not None:
        found.append(State("small parameters, always whole", DEVICE, sharding.weight_bytes * live.persistent))
    return [*found, State("encoder of the autoencoder", DEVICE, 4 * vae_encoder_parameters(run.vae))]


def _process_states(run: MemoryOptions, on_cpu: bool, bf16: bool) -> list[State]:
    found = [
        State("processes of the ranks", HOST, RANK + (CPU_KERNELS[bf16] if on_cpu else CUDA_HOST)),
        State("server of data workers", HOST, WORKER_SERVER if run.num_workers else 0),
        *_data_states(run),
    ]
    if not on_cpu:
        found.append(State("CUDA context", DEVICE, CUDA_CONTEXT))
        if run.world_size > 1:
            found.append(State("NCCL buffers", DEVICE, NCCL))
    return found


def _data_states(run: MemoryOptions) -> list[State]:
    packs = run.num_workers * run.prefetch_factor if run.num_workers else 1
    return [
        State("data workers", HOST, run.num_workers * WORKER),
        State("prepared packs", HOST, packs * run.max_num_tokens * PACK_BYTES_PER_TOKEN),
    ]


def _excess(sharding: Sharding, found: list[State], run: MemoryOptions) -> int:
    trains = [p.numel for p in sharding.parameters if p.trains and sharding.pinned("param")]
    pieces = [sharding.weight_bytes * -(-numel // sharding.world) for numel in trains]
    return pinned_excess(found, pieces, math.inf if run.rounds_pinned_memory else EXACT_ABOVE_MIB * MIB)


def _with_fragmentation(moment: Moment) -> Moment:
    lost = int(FRAGMENTATION * _sum(moment.parts, DEVICE))
    return Moment(moment.name, [*moment.parts, State("fragmentation allowance", DEVICE, lost)])


def _moved(state: State) -> State:
    return state._replace(place=HOST) if state.place == DEVICE else state


def _sum(parts: list[State], place: str) -> int:
    return sum(state.size for state in parts if state.place == place)


def _items(
    always: list[State], peaks: list[Moment], highest: dict[str, str], per_host: dict[str, int]
) -> list[MemoryItem]:
    found = [MemoryItem(HOST, "launcher", LAUNCHER)]
    found += [MemoryItem(state.place, state.name, state.size * per_host[state.place]) for state in always]
    for moment in peaks:
        for state in moment.parts:
            if highest[state.place] == moment.name:
                found.append(MemoryItem(state.place, state.name, state.size * per_host[state.place], moment.name))
    order = {DEVICE: 0, HOST: 1, NVME: 2}
    return sorted((item for item in found if item.bytes), key=lambda item: (order[item.place], -item.bytes))


def _gib(size: float) -> float:
    return round(size / GIB, 3)
