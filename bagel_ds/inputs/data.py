"""From arguments to the network's shape and the planned data, on one process and without DeepSpeed.

Guarantees: training and the commands that look at data (`index`, `check`, `inspect`) open the same things in the same
way, so that what is shown is what is trained on. No weight is read here, only shapes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
from bagel_ds.inputs.files import check_data_inputs, resolve_model_path
from bagel_ds.model.shape.config import BagelConfig, VAEConfig
from bagel_ds.model.shape.parts import Freezing
from bagel_ds.model_folder.folder import VAE, ModelFolder, latent_side, vae_config
from bagel_ds.model_folder.tensor_files import TensorFiles
from bagel_ds.model_folder.tokenizer import Tokenizer, load_tokenizer


def bagel_config(config: RunConfig, folder: ModelFolder, weights: Path | None, vae: VAEConfig) -> BagelConfig:
    """The network that `config` asks for; `weights` is the folder whose checkpoint says the latent table's side.

    Without one the side is the argument's, or that of BAGEL-7B-MoT.
    """
    arguments, training = config.model, config.training
    # As in the original, whatever llm_config.json says of it.
    llm = replace(folder.llm_config(), qk_norm=arguments.llm_qk_norm)
    vit = folder.vit_config(arguments.vit_select_layer, arguments.vit_max_num_patch_per_side)
    if vit.patch_size != arguments.vit_patch_size:
        raise UserError(
            f"--vit_patch_size {arguments.vit_patch_size} but {folder.path / 'vit_config.json'} says {vit.patch_size}; "
            f"pass --vit_patch_size {vit.patch_size}"
        )
    side = arguments.max_latent_size
    if side is None:
        held = latent_side(ModelFolder(weights).open_weights(training.finetune_from_ema)) if weights else None
        side = held or BagelConfig().max_latent_size
    return BagelConfig(
        llm=llm,
        vit=vit,
        z_channels=vae.z_channels,
        latent_patch_size=arguments.latent_patch_size,
        max_latent_size=side,
        visual_gen=training.visual_gen,
        visual_und=training.visual_und,
        timestep_shift=training.timestep_shift,
        freeze_und=training.freeze_und,
        attention=config.attention,
    )


def open_datasets(config: RunConfig) -> DatasetConfig:
    """The dataset YAML of the run."""
    return load_dataset_config(config.data.dataset_config_file, config.data.dataset_info)


def open_tokenizer(folder: Path, model: BagelConfig) -> Tokenizer:
    """The folder's tokenizer. Raises `UserError` where the network's vocabulary is too small for it."""
    tokenizer = load_tokenizer(folder)
    if tokenizer.size > model.llm.vocab_size:
        raise UserError(
            f"the tokenizer of {folder} has {tokenizer.size} tokens, its llm_config.json only vocab_size="
            f"{model.llm.vocab_size}; they do not belong together. Download or copy the folder again."
        )
    return tokenizer


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
    """The data of the run, indexed where it is needed and not yet, and its plan; `start`: the state it goes on from."""
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
    streams = open_streams(datasets, tokenizer, options, config.data.index_cache, progress)
    budget, most = config.data.max_num_tokens, config.training.val_max_batches
    return HeldOut(streams, tokenizer, options.layout, budget, most)


@dataclass(frozen=True)
class DataInputs:
    """What the commands that look at data open from a run's arguments."""

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
