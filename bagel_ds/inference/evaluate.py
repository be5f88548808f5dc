"""Losses on a held-out split, during training and afterwards.

Guarantees: every token weighs the same, whichever rank or pack holds it. Forward passes only. The caller hands in the
network and the sum over ranks, so this file knows neither a trainer nor DeepSpeed.

`validate` computes the numbers; `Evaluator` does so for the weights of model folders.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bagel_ds.arguments.run_config import RunConfig
from bagel_ds.data.batches.held_out import HeldOut
from bagel_ds.inference.adapters import Adapters
from bagel_ds.inference.generation import Inferencer
from bagel_ds.inference.loading import DTYPES, image_transforms, load_bagel, parameter_shapes
from bagel_ds.inference.network import Network
from bagel_ds.inference.task_metric import Progress, TaskMetric
from bagel_ds.inputs.data import DataInputs, layout_options, open_held_out, open_inputs
from bagel_ds.lora.base import base_files, base_folder
from bagel_ds.lora.peft_files import EMA_FOLDER, holds_adapter
from bagel_ds.machine.liveness import going_on
from bagel_ds.model.attention.choice import Place, choose_attention
from bagel_ds.model.bagel import Bagel, BagelOutput
from bagel_ds.model.batch import PackedBatch
from bagel_ds.model.losses.breakdown import BY_TIME, CE, LossBreakdown
from bagel_ds.model.losses.normalization import LossOptions
from bagel_ds.model.shape.config import BagelConfig
from bagel_ds.model.vae import AutoEncoder, encode_batch
from bagel_ds.model_folder.folder import ModelFolder
from bagel_ds.model_folder.tensor_files import TensorFiles

logger = logging.getLogger("bagel_ds")

Forward = Callable[[PackedBatch], BagelOutput]  # a batch on the device -> its losses
AddUp = Callable[[Tensor], Tensor]  # the sum over all ranks
Scores = dict[str, float]


def validate(
    batches: Iterable[PackedBatch],
    forward: Forward,
    device: torch.device,
    datasets: list[str],
    timestep_shift: float,
    add_up: AddUp = lambda sums: sums,
) -> Scores:
    """Mean losses over `batches` of all ranks: val/ce, val/mse, each by dataset, and val/mse_t/ by band of t.

    Every rank must have the same number of batches. A kind without tokens has no entry. Rows that can't be read are
    left out, with a warning.
    """
    # Without the options of training, so that runs with different ones compare.
    breakdown = LossBreakdown(datasets, timestep_shift, LossOptions())
    sums = breakdown.zeros(device)
    for batch in batches:
        for dataset, reason in batch.skipped:
            logger.warning("held-out data: %s: a row is left out (%s)", dataset, reason)
        batch = batch.to(device)
        with torch.no_grad():
            breakdown.add(sums, forward(batch), batch)
        going_on()
    sums = add_up(sums)
    scores = {f"val/{kind}": _mean(breakdown, sums, prefix) for kind, prefix in (("ce", CE), ("mse", BY_TIME))}
    by_subset = breakdown.means([sums.tolist()])
    return {name: mean for name, mean in scores.items() if mean is not None} | {
        name.replace("loss/", "val/", 1): mean for name, mean in by_subset.items()
    }


def _mean(breakdown: LossBreakdown, sums: Tensor, prefix: str) -> float | None:
    """Over the subsets whose names begin with `prefix`; None without tokens."""
    places = [place for place, name in enumerate(breakdown.names) if name.startswith(prefix)]
    loss, weight = sums[:, places].sum(dim=1).tolist()
    return loss / weight if weight else None


class _Opened(NamedTuple):
    """What the weight files and adapters of one model folder share."""

    folder: Path
    inputs: DataInputs
    held_out: HeldOut
    shape: BagelConfig
    vae: AutoEncoder


class Evaluator:
    """Scores model folders on the split of --val_config, one after another, in one process.

    Consecutive adapters of one base share it: its files are read once. `config` gives budgets, precision and switches.
    `progress(items, count)` may show a bar over packs and, for `metric`, over rows.
    """

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        progress: Progress = lambda items, count: items,
        metric: TaskMetric | None = None,
    ) -> None:
        self._config, self._device, self._progress, self._metric = config, device, progress, metric
        self._dtype = DTYPES[config.training.precision]
        self._opened: _Opened | None = None
        self._model: tuple[list[Path], Bagel] | None = None

    def scores(self, path: Path, stem: str, lora: Sequence[str | Path] = ()) -> Scores:
        """Of a model folder's "ema" or "model" weights.

        A folder with an adapter is evaluated on its base model: the config's model_path if that was given, else the
        one that the adapter names. With `lora` (as of `open_inferencer`) a model folder is evaluated with these
        adapters, on the weights that they belong to. Raises `UserError`.
        """
        own = path / EMA_FOLDER if stem == "ema" else path
        given = self._config.model.model_path if "model_path" in self._config.explicit else None
        folder = base_folder(own, given) if holds_adapter(path) else path
        adapters = Adapters([own] if holds_adapter(path) else lora)
        opened = self._open(folder)
        used = list(adapters.folders.values())
        files = base_files(folder, used) if used else TensorFiles(ModelFolder(folder).weight_files(stem))
        adapters.check_fits(opened.shape, parameter_shapes(opened.shape))  # before what takes minutes
        model = self._load(opened, files)
        adapters.attach(model, self._device, self._dtype)
        try:
            return self._score(opened, model, adapters)
        finally:
            adapters.detach()

    def _open(self, folder: Path) -> _Opened:
        if self._opened is None or self._opened.folder != folder:
            self._opened = self._model = None  # their memory is needed
            inputs = open_inputs(_for_folder(self._config, folder))
            held_out = open_held_out(inputs.config, inputs.folder, inputs.model, inputs.vae, progress=True)
            vae = ModelFolder(inputs.folder).load_vae(decodes=self._metric is not None).to(self._device)
            place = Place(self._device, self._dtype, trains=False)
            shape, line = choose_attention(inputs.model, self._config.attention, place)
            logger.info(line)
            self._opened = _Opened(folder, inputs, held_out, shape, vae)
        return self._opened

    def _load(self, opened: _Opened, files: TensorFiles) -> Bagel:
        if self._model is None or self._model[0] != files.paths:
            self._model = None
            where = f"{opened.inputs.folder} ({files.paths[0].name})"
            self._model = files.paths, load_bagel(opened.shape, files, where, self._device, self._dtype)
        return self._model[1]

    def _score(self, opened: _Opened, model: Bagel, adapters: Adapters) -> Scores:
        inputs, held_out, vae = opened.inputs, opened.held_out, opened.vae

        def forward(batch: PackedBatch) -> BagelOutput:
            latents = encode_batch(vae, batch, inputs.model.latent_patch_size, self._dtype == torch.bfloat16)
            output: BagelOutput = model(batch, latents)
            return output

        batches = self._progress(held_out.batches(), held_out.count(1))
        scores = validate(batches, forward, self._device, held_out.datasets, inputs.model.timestep_shift)
        if self._metric is not None:
            layout = layout_options(inputs.config, inputs.model, inputs.vae)
            transforms = image_transforms(layout, ModelFolder(inputs.folder))
            network = Network(model, vae, inputs.tokenizer, layout, *transforms, device=self._device, adapters=adapters)
            cannot_draw = None if inputs.model.visual_gen else "--visual_gen False leaves out what generates images"
            mean = self._metric.mean(Inferencer(network, cannot_draw), held_out, self._progress)
            scores |= {} if mean is None else {f"val/{self._metric.name}": mean}
        return scores


def _for_folder(config: RunConfig, path: Path) -> RunConfig:
    """The same settings for another model folder; the held-out split is all the data there is."""
    validation = config.training.val_config
    assert validation is not None
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, model_path=str(path), max_latent_size=None),
        data=dataclasses.replace(config.data, dataset_config_file=validation),
        training=dataclasses.replace(
            config.training, finetune_from_hf=True, resume_from=None, auto_resume=False, lora_rank=0
        ),
    )


def recorded_settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run's recorded arguments (trainer.json): those that decide what its val/ numbers were."""
    return {name: arguments[name] for name in _RECORDED if name in arguments}


_RECORDED = """max_num_tokens max_num_tokens_per_sample expected_num_tokens timestep_shift visual_gen visual_und
    precision interpolate_pos latent_patch_size vit_patch_size vit_max_num_patch_per_side vit_select_layer
    llm_qk_norm""".split()
