"""The memory planner: what a run will need on each GPU, host and NVMe, before anything is loaded.

Guarantees: pure arithmetic on the network's shape, the settings of ZeRO and the run's options; creates no tensor and
queries no device. Host memory is tested against measured runs on CPU (within 10 %). GPU-only terms (context, NCCL,
fragmentation) are allowances, each listed as its own item. A run on CPU (`device="cpu"`) has its device memory in host
memory.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from bagel_ds.arguments.run_config import RunConfig
from bagel_ds.errors import UserError
from bagel_ds.memory.between_steps import SampleShape, decoder, evaluation, samples
from bagel_ds.memory.phases import Phase, StepShape, arena, gathering, offloaded_inputs, phases
from bagel_ds.memory.states import DEVICE, EXACT_ABOVE_MIB, HOST, NVME, Sharding, State, pinned_excess, states
from bagel_ds.memory.traffic import Traffic, step_traffic
from bagel_ds.model.shape.activations import PackShape
from bagel_ds.model.shape.config import BagelConfig, VAEConfig
from bagel_ds.model.shape.parameters import parameter_sizes, vae_encoder_parameters
from bagel_ds.model.shape.parts import Freezing
from bagel_ds.units import GIB, MIB
from bagel_ds.zero.config.settings import ZeroSettings

# Measured on CPU (torch 2.13, deepspeed 0.19.8): the launcher's two processes; a rank's libraries and data plan; the
# server that forks its data workers; a worker without its packs; oneDNN's cache of kernels, one per pack length.
LAUNCHER = 322 * MIB
RANK = 270 * MIB
WORKER_SERVER, WORKER = 100 * MIB, 90 * MIB
CPU_KERNELS = {True: 330 * MIB, False: 90 * MIB}  # in bf16, in fp32
# Allowances on a GPU: the driver and CUDA's libraries in the process and on the device, NCCL's buffers, the share of
# temporary memory that the caching allocator can't reuse.
CUDA_HOST, CUDA_CONTEXT, NCCL = 1200 * MIB, 550 * MIB, 400 * MIB
FRAGMENTATION = 0.05
# Not available to the run: the share of a card's nominal size taken by ECC and display, the operating system, the file
# system.
GPU_RESERVED, RESERVED = 0.04, {DEVICE: 0, HOST: 4096 * MIB, NVME: 5120 * MIB}
PACK_BYTES_PER_TOKEN = 2100  # pixels as uint8, noise and positions of one token in a prepared pack


@dataclass(frozen=True)
class MemoryOptions:
    """The rest of what the planner needs to know about a run. Budgets are in GiB; None: not given."""

    world_size: int = 1
    ranks_per_host: int | None = None  # None: all on one host
    device: str = "cuda"  # or "cpu"
    max_num_tokens: int = 36864
    image_pixels: int = 1024 * 1024  # of the largest image the autoencoder encodes
    activation_checkpointing: str = "full"
    selective_layers: int | None = None  # decoder layers that keep products with "selective"; None: as many as fit
    freeze_llm: bool = False
    freeze_vit: bool = False
    ema: bool = True
    ema_bytes: int = 4  # per parameter
    ema_place: str | None = None  # "gpu", "host" or "nvme"; None: where the masters are
    num_workers: int = 4
    prefetch_factor: int = 2
    # torch rounds page-locked blocks up to powers of two and keeps freed ones; the trainer exempts large blocks
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
    """`bytes` are those of one rank on a GPU, and of all ranks of a host in host memory and on NVMe.

    `phase` is the phase with the peak if the item exists only then, "" if it always exists.
    """

    place: str
    name: str
    bytes: int
    phase: str = ""


@dataclass(frozen=True)
class MemoryPlan:
    """Peaks in bytes of one rank's GPU, one host and one host's NVMe. `traffic`: per host and optimizer step."""

    gpu_peak: int
    host_peak: int
    nvme: int
    traffic: Traffic
    items: tuple[MemoryItem, ...]
    gpu_phases: tuple[tuple[str, int], ...]  # (name, peak in bytes)
    host_phases: tuple[tuple[str, int], ...]
    gpu_memory: float | None = None
    host_memory: float | None = None
    nvme_space: float | None = None
    selective_layers: int | None = None  # decoder layers that keep products; None unless "selective"

    @property
    def shortfalls(self) -> dict[str, float]:
        """Missing GiB by place; empty if everything fits."""
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
                {"place": item.place, "name": item.name, "gib": _gib(item.bytes), "phase": item.phase}
                for item in self.items
            ],
            "gpu_phases_gib": {name: _gib(value) for name, value in self.gpu_phases},
            "host_phases_gib": {name: _gib(value) for name, value in self.host_phases},
        }


def plan_memory(model: BagelConfig, settings: ZeroSettings, run: MemoryOptions) -> MemoryPlan:
    """Predict the peaks of a run. Raises UserError if nothing would train.

    With "selective" activation checkpointing, as many decoder layers keep products as the GPU has room for, all of them
    where its memory isn't given.
    """
    if run.activation_checkpointing != "selective" or run.selective_layers is not None:
        return _plan(model, settings, run)

    def keeping(layers: int) -> MemoryPlan:
        return _plan(model, settings, dataclasses.replace(run, selective_layers=layers))

    least, layers = 0, model.llm.num_hidden_layers
    every = keeping(layers)
    if run.gpu_memory is None or DEVICE not in every.shortfalls:
        return every
    found = keeping(least)  # what is returned if nothing has room
    while least + 1 < layers:  # `layers` have no room
        middle = (least + layers) // 2
        plan = keeping(middle)
        if DEVICE in plan.shortfalls:
            layers = middle
        else:
            least, found = middle, plan
    return found


def _plan(model: BagelConfig, settings: ZeroSettings, run: MemoryOptions) -> MemoryPlan:
    parameters = parameter_sizes(model, run.freezing)
    if not any(parameter.trains for parameter in parameters):
        raise UserError("nothing to train: the freeze_* arguments with visual_und/visual_gen leave no parameter")
    on_cpu = run.device == "cpu"
    sharding = Sharding.over(settings, parameters, run.world_size, on_cpu)
    shape = StepShape(
        model,
        run.freezing,
        run.vae,
        _largest_pack(model, run),
        run.image_pixels,
        run.activation_checkpointing,
        gpu_bytes=None if run.gpu_memory is None else run.gpu_memory * GIB,
        selective_layers=run.selective_layers or 0,
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
    peaks = phases(sharding, shape)
    if run.evaluates:
        peaks.append(evaluation(sharding, shape, _data_states(run)))
    if run.samples is not None:
        peaks.append(samples(sharding, shape, run.samples))
    if on_cpu:
        always = [_moved(state) for state in always]
        peaks = [Phase(phase.name, [_moved(state) for state in phase.states]) for phase in peaks]
    else:
        peaks = [_with_fragmentation(phase) for phase in peaks]
    per_host = {DEVICE: 1, HOST: ranks, NVME: ranks}
    totals = {place: _sum(always, place) * times for place, times in per_host.items()}
    totals[HOST] += LAUNCHER
    by_phase = {
        place: tuple((phase.name, totals[place] + _sum(phase.states, place) * times) for phase in peaks)
        for place, times in per_host.items()
    }
    highest = {place: max(found, key=lambda pair: pair[1]) for place, found in by_phase.items()}
    return MemoryPlan(
        gpu_peak=0 if on_cpu else highest[DEVICE][1],
        host_peak=highest[HOST][1],
        nvme=highest[NVME][1],
        traffic=step_traffic(sharding, gathering(sharding, shape), ranks, offloaded_inputs(sharding, shape)),
        items=tuple(_items(always, peaks, {place: name for place, (name, _) in highest.items()}, per_host)),
        gpu_phases=() if on_cpu else by_phase[DEVICE],
        host_phases=by_phase[HOST],
        gpu_memory=run.gpu_memory,
        host_memory=run.host_memory,
        nvme_space=run.nvme,
        selective_layers=run.selective_layers,
    )


def _largest_pack(model: BagelConfig, run: MemoryOptions) -> PackShape:
    """The worst case of every phase: each token has a label, and all tokens that aren't drawn are ViT patches."""
    tokens = run.max_num_tokens
    return PackShape(tokens, labels=tokens, vit_tokens=tokens // 2 if model.visual_gen else tokens)


def _rank_states(sharding: Sharding, shape: StepShape, run: MemoryOptions) -> list[State]:
    found = states(sharding, run.ema_bytes if run.ema else 0, run.ema_place)
    live = gathering(sharding, shape)
    if live is not None:
        found.append(State("small parameters, always whole", DEVICE, live.persistent))
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
    trains = [p.numel for p in sharding.parameters if p.trains and sharding.pinned(sharding.param)]
    partitions = [sharding.weight_bytes * -(-numel // sharding.world) for numel in trains]
    return pinned_excess(found, partitions, math.inf if run.rounds_pinned_memory else EXACT_ABOVE_MIB * MIB)


def _with_fragmentation(phase: Phase) -> Phase:
    lost = int(FRAGMENTATION * _sum(phase.states, DEVICE))
    return Phase(phase.name, [*phase.states, State("fragmentation allowance", DEVICE, lost)])


def _moved(state: State) -> State:
    return state._replace(place=HOST) if state.place == DEVICE else state


def _sum(held: list[State], place: str) -> int:
    return sum(state.size for state in held if state.place == place)


def _items(
    always: list[State], peaks: list[Phase], highest: dict[str, str], per_host: dict[str, int]
) -> list[MemoryItem]:
    found = [MemoryItem(HOST, "launcher", LAUNCHER)]
    found += [MemoryItem(state.place, state.name, state.size * per_host[state.place]) for state in always]
    for phase in peaks:
        for state in phase.states:
            if highest[state.place] == phase.name:
                found.append(MemoryItem(state.place, state.name, state.size * per_host[state.place], phase.name))
    order = {DEVICE: 0, HOST: 1, NVME: 2}
    return sorted((item for item in found if item.bytes), key=lambda item: (order[item.place], -item.bytes))


def _gib(size: float) -> float:
    return round(size / GIB, 3)
