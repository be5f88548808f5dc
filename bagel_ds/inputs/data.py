"""The data that a run is given: opened, indexed and planned, on one process and without DeepSpeed.

Guarantees: training and the commands `index`, `check` and `inspect` open the same data in the same way, so that the
commands show what training uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bagel_ds.arguments.run_config import RunConfig
from bagel_ds.data.batches.held_out import HeldOut, held_out_options
from bagel_ds.data.batches.loader import PackingOptions, PlannedData
from bagel_ds.data.config.dataset_config import DatasetConfig, load_dataset_config
from bagel_ds.data.plan.cost import CostModel
from bagel_ds.data.samples.image_tokens import LayoutOptions
from bagel_ds.data.streams.opening import open_streams
from bagel_ds.data.streams.stream import GroupStream, SampleOptions
from bagel_ds.errors import UserError
from bagel_ds.inputs.files import check_data_inputs
from bagel_ds.inputs.network import bagel_config, open_tokenizer, resolve_model_path
from bagel_ds.model.shape.config import BagelConfig, VAEConfig
from bagel_ds.model.shape.parts import Freezing
from bagel_ds.model_folder.autoencoder import vae_config
from bagel_ds.model_folder.folder import VAE, ModelFolder
from bagel_ds.model_folder.tensor_files import TensorFiles
from bagel_ds.model_folder.tokenizer import Tokenizer


def open_datasets(config: RunConfig) -> DatasetConfig:
    """The dataset YAML of the run."""
    return load_dataset_config(config.data.dataset_config_file, config.data.dataset_info)


def layout_options(config: RunConfig, model: BagelConfig, vae: VAEConfig) -> LayoutOptions:
    """How many tokens an image becomes, and at which places."""
    return LayoutOptions(
        vit_patch_size=model.vit.patch_size,
        latent_patch_size=model.latent_patch_size,
        vae_downsample=vae.downsample,
        max_latent_size=model.max_latent_size,
        vit_max_num_patch_per_side=model.vit.max_patches_per_side,
        interpolate_pos=config.model.interpolate_pos,
        latent_channels=model.z_channels,
    )


def sample_options(config: RunConfig, model: BagelConfig, vae: VAEConfig) -> SampleOptions:
    """What planning a sample depends on."""
    return SampleOptions(
        max_num_tokens_per_sample=config.data.max_num_tokens_per_sample,
        text_cond_dropout_prob=config.model.text_cond_dropout_prob,
        vit_cond_dropout_prob=config.model.vit_cond_dropout_prob,
        vae_cond_dropout_prob=config.model.vae_cond_dropout_prob,
        seed=config.data.data_seed,
        visual_und=model.visual_und,
        visual_gen=model.visual_gen,
        layout=layout_options(config, model, vae),
    )


def open_data(
    config: RunConfig,
    datasets: DatasetConfig,
    folder: Path,
    model: BagelConfig,
    vae: VAEConfig,
    progress: bool,
    start: dict[str, Any] | None = None,
) -> PlannedData:
    """The data of the run, indexed where needed, and its plan; `start` is the saved state that the run resumes from."""
    tokenizer = open_tokenizer(folder, model)
    options = sample_options(config, model, vae)
    cursors = start["block"]["groups"] if start else None
    streams = open_streams(datasets, tokenizer, options, config.data.index_cache, progress, cursors)
    return plan_data(config, streams, tokenizer, model, vae)


def plan_data(
    config: RunConfig, streams: list[GroupStream], tokenizer: Tokenizer, model: BagelConfig, vae: VAEConfig
) -> PlannedData:
    """The plan over open streams."""
    packing = PackingOptions(
        max_num_tokens=config.data.max_num_tokens,
        expected_num_tokens=config.data.expected_num_tokens,
        data_seed=config.data.data_seed,
    )
    cost = CostModel.of(model, vae, Freezing(config.training.freeze_llm, config.training.freeze_vit))
    layout = layout_options(config, model, vae)
    return PlannedData(streams, tokenizer, layout, packing, config.training.global_seed, cost)


def open_held_out(config: RunConfig, folder: Path, model: BagelConfig, vae: VAEConfig, progress: bool) -> HeldOut:
    """The split of --val_config, indexed and packed. Raises `UserError`."""
    assert config.training.val_config is not None
    datasets = load_dataset_config(config.training.val_config, config.data.dataset_info)
    tokenizer = open_tokenizer(folder, model)
    options = held_out_options(sample_options(config, model, vae))
    try:
        streams = open_streams(datasets, tokenizer, options, config.data.index_cache, progress)
    except UserError as fault:
        raise UserError(f"--val_config {config.training.val_config}: {fault}") from None
    budget, most = config.data.max_num_tokens, config.training.val_max_batches
    return HeldOut(streams, tokenizer, options.layout, budget, most)


@dataclass(frozen=True)
class DataInputs:
    """What the commands for data open from a run's arguments."""

    config: RunConfig
    datasets: DatasetConfig
    folder: Path
    model: BagelConfig
    vae: VAEConfig
    tokenizer: Tokenizer

    @property
    def sample_options(self) -> SampleOptions:
        return sample_options(self.config, self.model, self.vae)

    def plan(self, progress: bool) -> PlannedData:
        """The data as training would open it."""
        return open_data(self.config, self.datasets, self.folder, self.model, self.vae, progress)


def open_inputs(config: RunConfig) -> DataInputs:
    """Open model folder and dataset config on one process. Raises `UserError` listing every file that is missing."""
    check_data_inputs(config)
    path = resolve_model_path(config)
    folder = ModelFolder(path)
    weights = path if folder.holds_weights else None
    vae = vae_config(TensorFiles([path / VAE]), path / VAE)
    model = bagel_config(config, folder, weights, vae)
    return DataInputs(config, open_datasets(config), path, model, vae, open_tokenizer(path, model))
