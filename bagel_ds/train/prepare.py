"""Checks and opens everything that a run needs, in the order in which its faults should be found.

Guarantees: every fault of a file is found before any rank builds the engine, on all ranks together. Afterwards all
ranks hold the same plan.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import torch
import torch.distributed as dist

from bagel_ds.arguments.run_config import RunConfig
from bagel_ds.checkpoint.step_folders import read_trainer, sweep
from bagel_ds.data.batches.held_out import HeldOut
from bagel_ds.data.batches.loader import PlannedData
from bagel_ds.data.config.dataset_config import DatasetConfig
from bagel_ds.doctor.environment import compared_versions, compiler_finding, refuse_faults
from bagel_ds.errors import UserError
from bagel_ds.inference.prompts import Prompts, open_prompts
from bagel_ds.inputs.data import layout_options, open_data, open_datasets, open_held_out
from bagel_ds.inputs.files import check_inputs, pretrained_of, starts_from_pretrained
from bagel_ds.inputs.network import bagel_config, resolve_model_path
from bagel_ds.lora.peft_files import holds_adapter
from bagel_ds.machine.device import uses_cuda
from bagel_ds.machine.waiting import waiting_for
from bagel_ds.memory.planner import MemoryPlan
from bagel_ds.model.attention.choice import Place, choose_attention
from bagel_ds.model.bagel import Bagel
from bagel_ds.model.pointwise.choice import fault_of, is_wanted, with_kernels
from bagel_ds.model.shape.config import BagelConfig, VAEConfig
from bagel_ds.model.shape.parts import Freezing, trains_by_name
from bagel_ds.model.vae import AutoEncoder
from bagel_ds.model_folder.folder import ModelFolder
from bagel_ds.train.memory_plan import plan_run
from bagel_ds.train.metrics.console import setup_logging
from bagel_ds.train.process.stop import forget_stops
from bagel_ds.train.ranks.agreement import (
    check_equal,
    check_shared_folder,
    everyone,
    hosts,
    is_main,
    local_rank,
    one_per_host_first,
    together,
)
from bagel_ds.train.saves.changes import changes, describe_data
from bagel_ds.train.saves.earlier import check_unoccupied, set_aside
from bagel_ds.train.saves.lock import Claim, claim, remember
from bagel_ds.train.saves.restore import StartWeights, open_start
from bagel_ds.train.saves.start import StartPoint, sound_start
from bagel_ds.zero.config.check import check_file, check_resolved
from bagel_ds.zero.config.resolve import fit_to_network, resolve_ds_config, same_on_all_hosts
from bagel_ds.zero.config.settings import ZeroSettings
from bagel_ds.zero.nvme_check import check_drives
from bagel_ds.zero.ops import build, needed_ops
from bagel_ds.zero.swap_folders import is_run_folder, sweep_folders, take_folder

logger = logging.getLogger("bagel_ds")


@dataclass(frozen=True)
class Prepared:
    """What is known before any weight is loaded. `weights` are open, with the network's names and shapes."""

    ds_config: dict[str, Any]  # for DeepSpeed
    zero: ZeroSettings  # what it means
    notes: list[str]  # about ds_config and this host, for the log
    memory: MemoryPlan
    model_folder: Path
    model: BagelConfig
    vae: AutoEncoder  # its encoder, and its decoder where this rank draws samples
    data: PlannedData
    held_out: HeldOut | None  # of --val_config
    prompts: Prompts | None  # of --sample_prompts
    described_data: dict[str, str]  # for trainer.json; a resumed run compares it with its own
    start: StartPoint
    weights: StartWeights
    claim: Claim | None  # of the checkpoint_dir, on rank 0


def prepare(config: RunConfig) -> Prepared:
    """Check and open everything on all ranks. Raises the same `UserError` on each."""
    _compare_hosts(config)
    together(lambda: check_inputs(config))
    ds_config, ds_notes = _ds_config(config)
    claimed = _take_checkpoint_dir(config)
    one_per_host_first(lambda: build(needed_ops(ds_config)), "compiling DeepSpeed's C++ ops, once")
    model_folder = one_per_host_first(lambda: resolve_model_path(config), "fetching or assembling the model")
    pretrained = pretrained_of(config)[:2] if starts_from_pretrained(config) else None
    start = sound_start(config.training, model_folder, pretrained)
    model, vae = one_per_host_first(lambda: _open_model(config, model_folder, start), "opening the model folder")
    with waiting_for("attention kernels to be tried", "a minute if FlexAttention is compiled"):
        model, attention_note = together(lambda: _with_attention(config, model))
    model, kernels_note = _with_kernels(config, model)
    world, here = dist.get_world_size(), hosts().local_size
    zero = together(lambda: fit_to_network(ds_config, model, config.training, world))
    drive_notes = one_per_host_first(lambda: _ready_nvme(config, zero), "preparing its folder on NVMe")
    datasets = together(lambda: open_datasets(config))
    prompts = together(lambda: _open_prompts(config, ModelFolder(model_folder), model, vae.config))
    if prompts is not None:
        check_equal({"the prompts of --sample_prompts": [job.key for job in prompts.jobs]})
        if prompts.draws(dist.get_rank(), world):
            vae = ModelFolder(model_folder).load_vae()
    from_average = config.training.sample_weights != "model"
    samples = None if prompts is None else prompts.memory(world, from_average)
    memory = together(lambda: plan_run(config, datasets, model, vae.config, zero, world, here, samples))
    # Before the data, whose indexing may take long.
    shapes = parameter_shapes(model.unquantized())
    weights = together(lambda: open_start(start, config.training, shapes, model_folder, model.lora))
    saved = together(lambda: _saved_run(config, start))
    place = None if saved is None else saved["plan_state"]
    data = one_per_host_first(
        lambda: _open_data(config, datasets, model_folder, model, vae, place), "indexing the data"
    )
    held_out = _open_held_out(config, model_folder, model, vae)
    described = describe_data(data)
    if saved is not None and is_main() and (differences := changes(saved, config.values(), described)):
        logger.info("changed since %s was saved:\n  %s", start.folder.name, "\n  ".join(differences))
    # Before anything is loaded: is the resumed run's place one in this run's plan?
    together(lambda: data.place(place))
    check_equal({"the data plan (files, rows, options)": data.fingerprint, "the start": str(start)})
    notes = [*ds_notes, attention_note, kernels_note, *drive_notes, *_crowding(config)]
    notes += together(lambda: _set_aside(config, saved, start) if is_main() else [])
    return Prepared(
        ds_config=ds_config,
        zero=zero,
        notes=notes,
        memory=memory,
        model_folder=model_folder,
        model=model,
        vae=vae,
        data=data,
        held_out=held_out,
        prompts=prompts,
        described_data=described,
        start=start,
        weights=weights,
        claim=claimed,
    )


def _compare_hosts(config: RunConfig) -> None:
    """Refuse hosts with other packages or other arguments than rank 0's."""
    check_equal({f"the version of {name}": version for name, version in compared_versions().items()})
    check_equal({f"--{name}": value for name, value in config.values().items()})


def _ready_folders(config: RunConfig, claimed: Claim | None) -> None:
    """Refuse to replace an earlier run's checkpoints before touching anything there; then tidy up."""
    training = config.training
    folders = [Path(training.checkpoint_dir), Path(training.results_dir)]
    named = [training.resume_from, config.model.model_path, *pretrained_of(config)]
    try:
        check_unoccupied(training, [Path(name) for name in named if name is not None])
    except UserError:
        if claimed is not None:
            claimed.release()
        raise
    if not training.start_anew:  # --start_anew moves everything aside later, once nothing else can fail
        sweep(folders[0])
    forget_stops(folders)
    remember(folders[1], folders[0])


def _saved_run(config: RunConfig, start: StartPoint) -> dict[str, Any] | None:
    """trainer.json of the training state that the run resumes from; None if it starts at step 0."""
    if not start.full:
        return None
    saved = read_trainer(start.folder)
    done, total = saved["steps_done"], config.training.total_steps
    if done > total:
        raise UserError(
            f"--total_steps {total}: {start.folder} has already done {done} steps, so there is nothing to train; "
            f"pass a larger --total_steps (it counts the steps of the whole run), or start from an earlier checkpoint"
        )
    return saved


def _set_aside(config: RunConfig, saved: dict[str, Any] | None, start: StartPoint) -> list[str]:
    """Move an earlier run's files aside; lines for the log, which then has a new log.txt."""
    made = set_aside(config.training, saved, start.folder)
    if made:
        setup_logging(config.training.results_dir, dist.get_rank())
    return [f"moved the files of an earlier run to {folder}" for folder in made]


def _take_checkpoint_dir(config: RunConfig) -> Claim | None:
    """Claim the folder for this run, on rank 0, and clean up after earlier runs."""
    folder = Path(config.training.checkpoint_dir)
    check_shared_folder(folder, "checkpoint_dir")
    claimed = one_per_host_first(
        lambda: claim(folder) if is_main() else None, "waiting for another run that uses the checkpoint_dir"
    )
    with waiting_for("leftovers of an interrupted save to be removed"):
        together(lambda: _ready_folders(config, claimed) if is_main() else None)
    return claimed


def _ds_config(config: RunConfig) -> tuple[dict[str, Any], list[str]]:
    """The configuration, the same on all ranks, and remarks for the log. Each host can compile the ops it needs."""

    def resolve() -> tuple[dict[str, Any], list[str]]:
        check_file(config.training.ds_config)
        resolved = resolve_ds_config(config.training.ds_config, config, dist.get_world_size(), hosts().group)
        check_resolved(resolved[0])
        return resolved

    ds_config, notes = together(resolve)
    check_equal({f"{name} of the ds_config": value for name, value in same_on_all_hosts(ds_config).items()})
    together(lambda: refuse_faults([compiler_finding(needed_ops(ds_config))] if local_rank() == 0 else []))
    return ds_config, notes


def _ready_nvme(config: RunConfig, zero: ZeroSettings) -> list[str]:
    """Remove leftovers of earlier runs below --nvme_path, then take this run's folder there; lines for the log."""
    is_first = local_rank() == 0
    if is_first:
        with waiting_for(f"leftovers of earlier runs in {config.training.nvme_path} to be removed"):
            sweep_folders(config.training.nvme_path)
    for folder in filter(is_run_folder, zero.swap_folders):
        take_folder(folder, is_first)
    return check_drives(zero.swap_folders)


def _crowding(config: RunConfig) -> list[str]:
    """A line if this host starts more data workers than it has cores."""
    workers, ranks = config.data.num_workers, hosts().local_size
    cores = len(os.sched_getaffinity(0))
    if workers * ranks <= cores:
        return []
    return [
        f"{ranks} rank(s) with --num_workers {workers} start {workers * ranks} processes on {cores} cores; "
        "fewer may load faster"
    ]


def _open_data(
    config: RunConfig, datasets: DatasetConfig, folder: Path, model: BagelConfig, vae: AutoEncoder, place: Any
) -> PlannedData:
    with waiting_for("the data to be opened and planned", "files are indexed once"):
        return open_data(config, datasets, folder, model, vae.config, is_main(), place)


def _open_held_out(config: RunConfig, folder: Path, model: BagelConfig, vae: AutoEncoder) -> HeldOut | None:
    """The data of --val_config, the same on all ranks; None without one."""
    if config.training.val_config is None:
        return None

    def open_it() -> HeldOut:
        with waiting_for("the held-out data to be opened", "files are indexed only once"):
            return open_held_out(config, folder, model, vae.config, is_main())

    held_out = one_per_host_first(open_it, "indexing the held-out data")
    check_equal({"the held-out data (files, rows, options)": held_out.fingerprint})
    return held_out


def _open_prompts(config: RunConfig, folder: ModelFolder, model: BagelConfig, vae: VAEConfig) -> Prompts | None:
    if config.training.sample_prompts is None:
        return None
    layout = layout_options(config, model, vae)
    return open_prompts(Path(config.training.sample_prompts), model, layout, config.data.max_num_tokens, folder)


def _open_model(config: RunConfig, path: Path, start: StartPoint) -> tuple[BagelConfig, AutoEncoder]:
    folder = ModelFolder(path)
    vae = folder.load_vae(decodes=False)
    if start.pretrained is not None and config.model.max_latent_size is None:  # the original's default
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, max_latent_size=32))
    weights = path if holds_adapter(start.folder) else start.folder
    return bagel_config(config, folder, None if start.pretrained else weights, vae.config), vae


def _place(config: RunConfig) -> Place:
    device = torch.device("cuda", torch.cuda.current_device()) if uses_cuda() else torch.device("cpu")
    return Place(device, torch.bfloat16 if config.training.precision == "bf16" else torch.float32, trains=True)


def _with_attention(config: RunConfig, model: BagelConfig) -> tuple[BagelConfig, str]:
    return choose_attention(model, config.attention, _place(config))


def _with_kernels(config: RunConfig, model: BagelConfig) -> tuple[BagelConfig, str]:
    """The same kernels on all ranks; the first rank of a host compiles them, the others find them in torch's cache."""
    place = _place(config)
    if not is_wanted(config.training.fused_kernels, place):
        return with_kernels(model, False)

    def try_them() -> str | None:
        with waiting_for("fused kernels to be compiled and tried", "half a minute, then torch's cache has them"):
            return fault_of(model, place)

    found = one_per_host_first(try_them, "compiling fused kernels")
    fault = next((f"{fault} on {host}" for fault, host in everyone((found, socket.gethostname())) if fault), None)
    return with_kernels(model, True, fault)


def trainable(config: RunConfig, model: BagelConfig) -> Callable[[str], bool]:
    """Whether the parameter of a name trains."""
    return trains_by_name(model, Freezing(config.training.freeze_llm, config.training.freeze_vit))


def parameter_shapes(model: BagelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of the network, without building it."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in Bagel(model).named_parameters()}
