"""Opening what a run starts from: weights, moving average and Adam's moments.

Guarantees: every tensor of the network is found with its shape before any is read; a training state is read in ranges,
so any number of ranks may have written it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Mapping

from torch import Tensor

from bagel_ds.arguments.options import TrainingArguments
from bagel_ds.checkpoint.state import EMA, WEIGHT, StateFiles
from bagel_ds.checkpoint.step_folders import STATE
from bagel_ds.errors import UserError
from bagel_ds.lora.base import base_fingerprint
from bagel_ds.lora.peft_files import AdapterFolder, holds_adapter
from bagel_ds.lora.weights import NewAdapters, QuantizedBase, WithAdapters
from bagel_ds.model.shape.lora import LoRA, is_adapter
from bagel_ds.model_folder.folder import ModelFolder
from bagel_ds.model_folder.pretrained import PretrainedWeights
from bagel_ds.model_folder.weights import BagelWeights
from bagel_ds.ranges import MASTER, Range, WeightSource, copy_range
from bagel_ds.train.ranks.agreement import together
from bagel_ds.train.saves.start import StartPoint
from bagel_ds.units import GIB, MIB
from bagel_ds.zero.engine import ZeroEngine
from bagel_ds.zero.partitions import MOMENTS


@dataclass(frozen=True)
class StartWeights:
    """Sources of the weights, of the moving average (None: it starts at the weights) and of the training state."""

    weights: WeightSource
    averages: WeightSource | None
    state: StateFiles | None
    description: list[str]  # lines for the run's plan
    base: str | None = None  # fingerprint of the model that adapters belong to


def open_start(
    start: StartPoint,
    training: TrainingArguments,
    shapes: Mapping[str, tuple[int, ...]],
    model_folder: Path,
    lora: LoRA | None = None,
) -> StartWeights:
    """Open what `start` names and check the shape of every tensor. Raises `UserError`."""
    if lora is not None:
        return _open_adapters(start, training, shapes, model_folder, lora)
    if holds_adapter(start.folder):
        raise UserError(
            f"{start.folder} holds an adapter, not a model: pass --lora_rank and the other --lora_* options of the run "
            "that saved it to go on with it, or merge it into its base model with `bagel-ds export ... --merge`"
        )
    if start.full:
        state = StateFiles(start.folder / STATE)
        lines = [f"loading training state of {start.folder} ({start.reason})"]
        averages = _saved_average(state, shapes, training, lines)
        return StartWeights(state.source(shapes, MASTER, WEIGHT), averages, state, lines)
    if start.pretrained is not None:
        made = PretrainedWeights(*start.pretrained, shapes, training.copy_init_moe, training.global_seed)
        return StartWeights(
            made, None, None, [f"starting from {' and '.join(map(str, start.pretrained))}", *made.description()]
        )
    folder = ModelFolder(start.folder)
    files = folder.open_weights(training.finetune_from_ema)
    weights = BagelWeights(files, shapes, training.copy_init_moe, str(files.paths[0]))
    ema_files = folder.weight_files("ema")
    averages_source = None
    if ema_files and [path.resolve() for path in ema_files] != [path.resolve() for path in files.paths]:
        averages_source = BagelWeights(
            folder.open_weights(prefer_ema=True), shapes, training.copy_init_moe, str(ema_files[0])
        )
    return StartWeights(weights, averages_source, None, [f"loading {start.folder} ({start.reason})", *_loaded(weights)])


def _open_adapters(
    start: StartPoint,
    training: TrainingArguments,
    shapes: Mapping[str, tuple[int, ...]],
    model_folder: Path,
    lora: LoRA,
) -> StartWeights:
    """The base model of model_path with adapters: new ones, or those of the checkpoint or folder `start`."""
    adapters = {name: shape for name, shape in shapes.items() if is_adapter(name)}
    files = ModelFolder(model_folder).open_weights(training.finetune_from_ema)
    weights = {name: shape for name, shape in shapes.items() if name not in adapters}
    held_weights = BagelWeights(files, weights, training.copy_init_moe, str(files.paths[0]))
    fingerprint = base_fingerprint(files)
    lines = [f"base model: {model_folder} (fingerprint {fingerprint})", *_loaded(held_weights)]
    base: WeightSource = held_weights
    if lora.quantization is not None:
        base = QuantizedBase(base, lora.quantization)
        lines.append(f"the language model's linear layers are kept in {lora.base_precision}")
    if not holds_adapter(start.folder):
        if start.pretrained is not None or start.folder.resolve() != model_folder.resolve():
            raise UserError(
                f"--lora_rank: {start.folder} holds no adapter. To train adapters on top of it, pass it as "
                "--model_path with --finetune_from_hf True"
            )
        new = NewAdapters(adapters, training.global_seed)
        lines.append(f"{len(adapters) // 2} layers get a new adapter")
        return StartWeights(WithAdapters(base, new), None, None, lines, fingerprint)
    lines.append(f"loading adapters of {start.folder} ({start.reason})")
    held = AdapterFolder(start.folder)
    _check_adapters(held, adapters, lora)
    if not start.full:
        return StartWeights(WithAdapters(base, held), None, None, lines, fingerprint)
    if held.fingerprint != fingerprint:
        raise UserError(
            f"--model_path {model_folder} is not the model that the adapters of {start.folder} were trained on "
            f"(fingerprint {fingerprint}, expected {held.fingerprint}); pass {held.base} or wherever that "
            "model is now, or --resume_model_only True to train these adapters further on another model"
        )
    if held.base_precision != lora.base_precision:
        before, now = held.base_precision or "full", lora.base_precision or "full"
        raise UserError(
            f"--base_precision {now}: the adapters of {start.folder} were trained beside weights in {before}; pass "
            f"--base_precision {before}, or --resume_model_only True to train them further beside other weights"
        )
    state = StateFiles(start.folder / STATE)
    averages = _saved_average(state, adapters, training, lines)
    return StartWeights(WithAdapters(base, state.source(adapters, MASTER)), averages, state, lines, fingerprint)


def _saved_average(
    state: StateFiles, shapes: Mapping[str, tuple[int, ...]], training: TrainingArguments, lines: list[str]
) -> WeightSource | None:
    """The moving average of a training state; None, with a line for the run's plan, if it holds none."""
    averages = state.source(shapes, EMA, WEIGHT)
    if any(state.has(EMA, name) for name in shapes):
        return averages
    if training.ema > 0:
        lines.append("the checkpoint holds no EMA: it starts at the weights")
    return None


def _check_adapters(held: AdapterFolder, wanted: Mapping[str, tuple[int, ...]], lora: LoRA) -> None:
    """Raise `UserError` unless a folder holds the adapters that the run asks for, neither fewer nor more."""
    layers = {name.rpartition(".")[0] for name in wanted}
    if different := sorted(layers ^ held.layers):
        raise UserError(
            f"{held.folder} holds adapters of {len(held.layers)} layers, --lora_targets {lora.targets} asks for "
            f"{len(layers)} ({different[0]} is only in one of the two); pass the --lora_targets and freeze_* options "
            "of the run that saved them"
        )
    if wrong := [name for name, shape in wanted.items() if held.info(name).shape != shape]:
        found = list(held.info(wrong[0]).shape)
        raise UserError(
            f"{wrong[0]} in {held.folder} is {found}, the run asks for {list(wanted[wrong[0]])}; pass --lora_rank "
            f"{held.rank} and the --model_path of the run that saved it"
        )
    if (scale := held.scale(min(layers))) != lora.scale:
        raise UserError(
            f"--lora_alpha {lora.alpha:g}: the adapters of {held.folder} were trained with {scale * lora.rank:g}; pass "
            f"--lora_alpha {scale * lora.rank:g}"
        )


def _loaded(weights: BagelWeights) -> list[str]:
    files = ", ".join(path.name for path in weights.files.paths)
    size = sum(weights.files.info(name).nbytes for name in weights.loaded)
    shown = f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.2f} MiB"
    lines = [
        f"  {files}: {len(weights.loaded)} tensors, {shown}; 0 missing; "
        f"{len(weights.unexpected)} unexpected{_few(weights.unexpected)}; position tables are computed"
    ]
    if weights.copied:
        lines.append(
            f"  {len(weights.copied)} generation-expert tensors are not in the file: copied from understanding"
        )
    return lines


def _few(names: list[str]) -> str:
    return f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""


def restore_moments(engine: ZeroEngine, state: StateFiles, updates_done: int) -> None:
    """Read Adam's moments of this rank's ranges from a training state.

    A parameter that was frozen has none stored: they are zero, as the original's are after steps under freeze_und.
    """

    def fill(kind: str, held: Range, target: Tensor) -> None:
        if state.has(WEIGHT, held.name):
            target.zero_()
        else:
            copy_range(target, held, partial(state.read, kind))

    together(lambda: engine.partitions.load(MOMENTS, fill))
    engine.partitions.set_step(updates_done)
