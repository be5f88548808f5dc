"""The network that a run is given: its model folder, its shape and its tokenizer.

Guarantees: training and every command build the same network from the same arguments. Only shapes are read here, no
weights; a model that is named by its hub id is downloaded.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bagel_ds.arguments.run_config import RunConfig
from bagel_ds.errors import UserError
from bagel_ds.inputs.files import instead_of_base_model, is_hub_id, pretrained_of, starts_from_pretrained
from bagel_ds.lora.targets import with_adapters
from bagel_ds.machine.liveness import timed_elsewhere
from bagel_ds.machine.waiting import waiting_for
from bagel_ds.model.shape.config import BagelConfig, VAEConfig
from bagel_ds.model_folder.folder import ModelFolder
from bagel_ds.model_folder.pretrained import assemble_folder
from bagel_ds.model_folder.tokenizer import Tokenizer, load_tokenizer
from bagel_ds.model_folder.weights import latent_side


def resolve_model_path(config: RunConfig) -> Path:
    """The model folder: model_path, a download from the hub, or one assembled from pretrained models.

    Raises UserError.
    """
    if starts_from_pretrained(config):
        with waiting_for("the model folder to be assembled", "its autoencoder may be copied"):
            return assemble_folder(Path(config.training.results_dir) / "parts", *pretrained_of(config))
    path = Path(config.model.model_path)
    if path.is_dir() or not is_hub_id(config.model.model_path):
        return path
    try:
        return hub_folder(config.model.model_path, "--model_path")
    except UserError as fault:
        offer = instead_of_base_model(config)
        raise UserError(f"{fault}. {offer}" if offer else str(fault)) from None


def hub_folder(name: str, option: str, patterns: tuple[str, ...] | None = None) -> Path:
    """Where the files of a model on the hub lie after a download: all of them, or those that match.

    Raises UserError, which names `option`.
    """
    from huggingface_hub import snapshot_download

    try:
        usual = "30 GB for the 7B, once; it goes on where it was cut off"
        with timed_elsewhere(), waiting_for(f"{name} to be downloaded", usual):
            return Path(snapshot_download(name, allow_patterns=patterns and list(patterns)))
    except Exception as fault:  # the hub's own errors, and those of whatever http library it brings
        raise UserError(
            f"{option} {name}: no such folder here, and the hub gave no model of that id "
            f"({type(fault).__name__}: {' '.join(str(fault).split())[:300]}); check the network, or pass a folder"
        ) from None


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
    network = BagelConfig(
        llm=llm,
        vit=vit,
        z_channels=vae.z_channels,
        latent_patch_size=arguments.latent_patch_size,
        max_latent_size=side,
        visual_gen=training.visual_gen,
        visual_und=training.visual_und,
        timestep_shift=training.timestep_shift,
        freeze_und=training.freeze_und,
    )
    return with_adapters(training, network)


def open_tokenizer(folder: Path, model: BagelConfig) -> Tokenizer:
    """The folder's tokenizer. Raises `UserError` where the network's vocabulary is too small for it."""
    tokenizer = load_tokenizer(folder)
    if tokenizer.size > model.llm.vocab_size:
        raise UserError(
            f"the tokenizer of {folder} has {tokenizer.size} tokens, its llm_config.json only vocab_size="
            f"{model.llm.vocab_size}; they do not belong together. Download or copy the folder again."
        )
    return tokenizer
