"""From arguments to the parts of a run, in the order in which faults should be found.

Guarantees: everything that can be wrong with files is found before a rank builds the engine, on all ranks together;
afterwards every rank holds the same plan.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

import bagel_ds
from bagel_ds.checkpoint.folder import ModelFolder
from bagel_ds.checkpoint.steps import read_trainer, sweep
from bagel_ds.config import RunConfig
from bagel_ds.data.loader import PlannedData
from bagel_ds.errors import UserError
from bagel_ds.model.bagel import Bagel
from bagel_ds.model.config import BagelConfig
from bagel_ds.model.parts import Freezing, part_of, trainable_parts
from bagel_ds.model.vae import AutoEncoder
from bagel_ds.preflight import check_inputs, installed_version, parts_of, resolve_model_path, starts_from_parts
from bagel_ds.train.agreement import (
    SharedFault,
    check_equal,
    check_shared_folder,
    is_main,
    local_rank,
    one_per_host_first,
    together,
)
from bagel_ds.train.claim import Claim, claim
from bagel_ds.train.inputs import bagel_config, open_data, open_datasets
from bagel_ds.train.memory import plan_run
from bagel_ds.train.quiet import quiet_start
from bagel_ds.train.start import StartPoint, StartWeights, open_start, sound_start
from bagel_ds.train.stop import forget_stops
from bagel_ds.zero.builds import remove_stale_locks
from bagel_ds.zero.config import check_file_with_deepspeed, check_with_deepspeed, resolve_ds_config
from bagel_ds.zero.memory import MemoryPlan
from bagel_ds.zero.nvme import check_nvme, fit_buffers, nvme_bytes, nvme_folders
from bagel_ds.zero.shared_memory import remove_own_buffers, remove_stale_buffers
from bagel_ds.zero.swap_folders import run_folder, sweep_folders, take_folder

logger = logging.getLogger("bagel_ds")

# By which DeepSpeed's own, OpenMPI's, MPICH's, MVAPICH's or Slurm's launcher tells a process its rank.
_RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK", "SLURM_PROCID")


@dataclass(frozen=True)
class Prepared:
    """What is known before any weight is loaded; `weights` are open, and of the network's names and shapes."""

    ds_config: dict[str, Any]
    notes: list[str]  # lines about it and about this host, for the run's plan
    memory: MemoryPlan
    model_folder: Path
    model: BagelConfig
    vae: AutoEncoder
    data: PlannedData
    start: StartPoint
    weights: StartWeights
    claim: Claim | None  # rank 0's, of the checkpoint_dir


def prepare(config: RunConfig) -> Prepared:
    """Check and open everything on all ranks; raises the same `UserError` on each."""
    packages = ("torch", "deepspeed", "transformers", "numpy", "pillow", "tokenizers")
    versions = {"bagel_ds": bagel_ds.__version__, **{name: installed_version(name) for name in packages}}
    check_equal({f"the version of {name}": version for name, version in versions.items()})
    check_equal({f"--{name}": value for name, value in config.values().items()})
    together(lambda: check_inputs(config))
    checkpoint_dir = Path(config.training.checkpoint_dir)
    check_shared_folder(checkpoint_dir, "checkpoint_dir")
    claimed = one_per_host_first(lambda: claim(checkpoint_dir) if is_main() else None)
    together(lambda: sweep(checkpoint_dir) if is_main() else None)
    if is_main():
        forget_stops([checkpoint_dir, Path(config.training.results_dir)])
    ds_config, ds_notes = together(lambda: _ds_config(config))
    model_folder = one_per_host_first(lambda: resolve_model_path(config))
    parts = parts_of(config)[:2] if starts_from_parts(config) else None
    start = sound_start(config.training, model_folder, parts)
    model, vae = one_per_host_first(lambda: _open_model(config, model_folder, start))
    ds_notes = ds_notes + one_per_host_first(lambda: _ready_nvme(config, ds_config, model))
    datasets = together(lambda: open_datasets(config))
    memory = together(lambda: plan_run(config, datasets, model, vae.config, ds_config, dist.get_world_size()))
    # Before the data, whose indexing may take long.
    weights = together(lambda: open_start(start, config.training, parameter_shapes(model)))
    place = together(lambda: read_trainer(start.folder)["plan_state"]) if start.full else None
    data = one_per_host_first(lambda: open_data(config, datasets, model_folder, model, vae.config, is_main(), place))
    # That a resumed run's place in the data is one in this run's plan is seen before anything is loaded.
    together(lambda: data.micro_batches(dist.get_rank(), dist.get_world_size(), start=place).close())
    check_equal({"the data plan (files, rows, options)": data.fingerprint, "the start": str(start)})
    notes = [*ds_notes, *_crowding(config)]
    return Prepared(ds_config, notes, memory, model_folder, model, vae, data, start, weights, claimed)


def _ds_config(config: RunConfig) -> tuple[dict[str, Any], list[str]]:
    check_file_with_deepspeed(config.training.ds_config)
    ds_config, notes = resolve_ds_config(config.training.ds_config, config, dist.get_world_size())
    check_with_deepspeed(ds_config)
    return ds_config, notes


def _ready_nvme(config: RunConfig, ds_config: dict[str, Any], model: BagelConfig) -> list[str]:
    """Size the swap buffers for this network, take this run's folder, and see that the disk will do.

    Whatever the preset, what earlier runs left below --nvme_path is removed first.
    """
    shapes = parameter_shapes(model)
    trains = trainable(config, model)
    numels = {name: math.prod(shape) for name, shape in shapes.items()}
    recomputes = config.training.activation_checkpointing != "none"
    frozen = not {"und_expert", "gen_expert", "vit"} <= trains
    fit_buffers(ds_config, max(numels.values()), dist.get_world_size(), recomputes_frozen=recomputes and frozen)
    trained = sum(numel for name, numel in numels.items() if part_of(name) in trains)
    ranks_here = int(os.environ.get("LOCAL_SIZE", "1"))
    share = ranks_here / dist.get_world_size()
    average = 0 if config.training.ema == 0 else 2 if config.training.ema_dtype == "bf16" else 4
    needed = nvme_bytes(ds_config, sum(numels.values()), trained, average) * share
    if config.training.nvme_path is not None:
        path = Path(config.training.nvme_path)
        if local_rank() == 0:
            sweep_folders(path)
        own = run_folder(path, config.training.checkpoint_dir)
        if own in nvme_folders(ds_config):
            take_folder(own, first=local_rank() == 0)
    return check_nvme(ds_config, int(needed))


def _crowding(config: RunConfig) -> list[str]:
    """A line where this host starts more DataLoader workers than it has cores (instead of torch's, from every rank)."""
    workers, ranks = config.data.num_workers, int(os.environ.get("LOCAL_SIZE", "1"))
    cores = len(os.sched_getaffinity(0))
    if workers * ranks <= cores:
        return []
    return [
        f"{ranks} rank(s) with --num_workers {workers} start {workers * ranks} processes on {cores} cores; "
        "fewer may load faster"
    ]


def _open_model(config: RunConfig, path: Path, start: StartPoint) -> tuple[BagelConfig, AutoEncoder]:
    folder = ModelFolder(path)
    vae = folder.load_vae()
    if start.parts is not None and config.model.max_latent_size is None:  # the original's default
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, max_latent_size=32))
    return bagel_config(config, folder, None if start.parts else start.folder, vae.config), vae


def trainable(config: RunConfig, model: BagelConfig) -> set[str]:
    """Names of the parts that train."""
    return trainable_parts(model, Freezing(config.training.freeze_llm, config.training.freeze_vit))


def parameter_shapes(model: BagelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of the network, without building it."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in Bagel(model).named_parameters()}


def describe_parameters(model: BagelConfig, trains: set[str]) -> list[str]:
    """A table of the network's parts, their sizes and whether they train, without building it."""
    counts: dict[str, int] = {}
    for name, shape in parameter_shapes(model).items():
        counts[part_of(name)] = counts.get(part_of(name), 0) + math.prod(shape)
    total, training = sum(counts.values()), sum(count for part, count in counts.items() if part in trains)
    lines = [f"parameters: {total:,}, of which {training:,} train"]
    return lines + [
        f"  {part:<16} {count:>16,}  {'trains' if part in trains else 'frozen'}" for part, count in counts.items()
    ]


def init_distributed() -> None:
    """Join the ranks that the launcher started.

    Raises `UserError` where no launcher did, and on every rank of a host with fewer GPUs than ranks.
    """
    if not any(name in os.environ for name in _RANK_VARIABLES):
        raise UserError(
            "this process is no rank of a launch: start it with the launcher, also on one GPU, as in "
            "`deepspeed --num_gpus 1 launch/train.py --ds_config zero3.json ...`"
        )
    if torch.cuda.is_available() and deepspeed.get_accelerator().device_name() == "cuda":
        gpus, ranks = torch.cuda.device_count(), int(os.environ.get("LOCAL_SIZE", local_rank() + 1))
        if ranks > gpus:
            fault = (
                f"this host has {gpus} usable GPU(s), but {ranks} ranks were started on it; pass a smaller --num_gpus"
            )
            raise SharedFault(fault) if local_rank() else UserError(fault)
        torch.cuda.set_device(local_rank())
    remove_stale_locks()
    if local_rank() == 0:
        remove_stale_buffers()
    with quiet_start():
        deepspeed.init_distributed(verbose=False)
    if deepspeed.get_accelerator().device_name() == "cpu":
        dist.barrier()  # all ranks have mapped each other's
        remove_own_buffers()
