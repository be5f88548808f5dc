"""The layouts in which other programs serve a model: the original's app, ComfyUI-BAGEL, vLLM-omni.

Guarantees: the folder has one weight file, `ema.safetensors`, with every tensor that these programs read. (vLLM-omni
loads every weight file of a folder, the other two only this one.) The programs skip unknown names and leave missing
tensors random, so names and shapes are checked here. The configs spell out every value whose default may differ between
programs. A network that differs from what a program has hard-coded is an error.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Mapping, NamedTuple

import torch
from torch import Tensor

from bagel_ds.checkpoint.step_folders import TRAINER, read_trainer
from bagel_ds.config_files import read_json
from bagel_ds.errors import UserError, all_faults
from bagel_ds.lora.peft_files import holds_adapter
from bagel_ds.model.bagel import Bagel
from bagel_ds.model.embeddings import position_table
from bagel_ds.model.shape.config import BagelConfig
from bagel_ds.model.shape.parts import POSITION_TABLES
from bagel_ds.model_folder.autoencoder import vae_config
from bagel_ds.model_folder.average import Choice, average_or_weights, averaging_of, chosen
from bagel_ds.model_folder.folder import EMA, MODEL, VAE, ModelFolder
from bagel_ds.model_folder.tensor_files import TensorFiles
from bagel_ds.model_folder.weights import check_tensors
from bagel_ds.ranges import TensorInfo, WeightSource

PROGRAMS = ("original", "comfyui", "vllm-omni")
SERVE = ("auto", "ema", "model")
NOT_SERVED = "not_served"  # the folder of the weight file that programs should not load
_CONTENT = {"ema": "EMA", "model": "weights"}
_HARD_CODED = ("original", "comfyui")  # programs that ignore config.json and build the network of BAGEL-7B-MoT
_LATENT_SIDE, _VIT_SIDE = 64, 70  # of the network that they build
_LAYER = re.compile(r"vit_model\.vision_model\.encoder\.layers\.(\d+)\.")


class Layout(NamedTuple):
    """The files of an export that are not copied; paths are relative to its folder."""

    weights: dict[str, str]  # path of each weight file -> "model" or "ema", the kind of weights in it
    texts: dict[str, str] = {}  # path -> content of generated text files
    tables: dict[str, Tensor] = {}  # position tables that replace those of the checkpoint
    served: Choice | None = None  # what the root's ema.safetensors holds, if it may not be the average

    @property
    def reason(self) -> str:
        """What ema.safetensors holds, and why."""
        assert self.served is not None
        return f"holds the {_CONTENT[self.served.stem]}: {self.served.why}"

    def metadata(self, stem: str) -> dict[str, str]:
        """Metadata for the header of a weight file that holds `stem`."""
        return {} if self.served is None else {"content": stem}


class WithTables:
    """A `WeightSource` with some tensors replaced."""

    def __init__(self, source: WeightSource, tables: Mapping[str, Tensor]):
        self._source, self._tables = source, tables

    def __contains__(self, name: str) -> bool:
        return name in self._tables or name in self._source

    def info(self, name: str) -> TensorInfo:
        table = self._tables.get(name)
        return self._source.info(name) if table is None else TensorInfo(table.dtype, tuple(table.shape))

    def read(self, name: str, start: int = 0, numel: int | None = None) -> Tensor:
        if name not in self._tables:
            return self._source.read(name, start, numel)
        values = self._tables[name].flatten()[start:]
        return values if numel is None else values[:numel]


def serving_layout(
    program: str,
    serve: str,
    checkpoint: Path,
    has_average: bool,
    dtype: torch.dtype,
    folder: Path,
    files: TensorFiles,
) -> Layout:
    """The layout in which `program` reads a checkpoint with weights of `dtype`. Raises `UserError`.

    For an adapter, `base` is the model folder that it is merged into, and `files` are that folder's weights.
    `serve` is "ema", "model" or "auto" (chosen by `model_folder.average`).
    """
    for option, value, known in ("--for", program, PROGRAMS), ("--serve", serve, SERVE):
        if value not in known:
            raise UserError(f"{option} {value} is not known; expected {', '.join(known[:-1])} or {known[-1]}.")
    interpolates = bool(_arguments(checkpoint).get("interpolate_pos", False))
    config, downsample = _network(folder, files)
    _check_program(program, folder, config, downsample, interpolates)
    served = _served(serve, checkpoint, has_average)
    other = "model" if served.stem == "ema" else "ema"
    weights = {EMA: served.stem}
    if other == "model" or has_average:
        weights[f"{NOT_SERVED}/{other}.safetensors"] = other
    if program in _HARD_CODED:  # sin-cos tables of different sizes agree where they overlap
        config = replace(config, max_latent_size=_LATENT_SIDE)
    sides = dict(zip(POSITION_TABLES, (config.max_latent_size, config.vit.max_patches_per_side), strict=True))
    tables = {name: position_table(config.llm.hidden_size, side) for name, side in sides.items()}
    return Layout(weights, _config_texts(folder, config, downsample, dtype, interpolates), tables, served)


def _served(serve: str, checkpoint: Path, has_average: bool) -> Choice:
    if serve == "ema" and not has_average:
        raise UserError(f"--serve ema: {checkpoint} holds no EMA (the run had --ema 0); pass --serve model.")
    if serve in _CONTENT:
        return Choice(serve, f"--serve {serve}")
    return chosen(averaging_of(checkpoint)) if has_average else Choice("model", "the run kept no EMA")


def _network(checkpoint: Path, files: TensorFiles) -> tuple[BagelConfig, int]:
    """The network of a checkpoint, from its tensors' shapes, and the pixels per latent cell. Raises `UserError`."""
    folder, where = ModelFolder(checkpoint), str(files.paths[0])
    needed = (*POSITION_TABLES, "vae2llm.weight")
    all_faults([f"{where}: tensor {name} is missing" for name in needed if name not in files], f"{where}:")
    latent_side, vit_side = (round(files.info(name).shape[0] ** 0.5) for name in POSITION_TABLES)
    if not (checkpoint / VAE).is_file():
        raise UserError(f"{checkpoint / VAE} does not exist. Copy it from the model folder that the run started from.")
    vae = vae_config(TensorFiles([checkpoint / VAE]), checkpoint / VAE)
    layers = {match[1] for name in files.names if (match := _LAYER.match(name))}
    qk_norm = "language_model.model.layers.0.self_attn.q_norm.weight" in files
    config = BagelConfig(
        llm=replace(folder.llm_config(), qk_norm=qk_norm, tie_word_embeddings=False),  # both matrices are stored
        vit=replace(folder.vit_config(max_patches_per_side=vit_side), num_layers=len(layers)),
        z_channels=vae.z_channels,
        latent_patch_size=round((files.info("vae2llm.weight").shape[1] / vae.z_channels) ** 0.5),
        max_latent_size=latent_side,
    )
    with torch.device("meta"):
        expected = {name: tuple(each.shape) for name, each in Bagel(config).named_parameters()}
    check_tensors(files, expected, where)
    if unknown := sorted(set(files.names) - set(expected)):
        raise UserError(
            f"{where} holds {len(unknown)} tensors that are not part of BAGEL, such as {unknown[0]}; the programs of "
            "--for would skip them silently. Export without --for."
        )
    return config, vae.downsample


def _check_program(program: str, checkpoint: Path, config: BagelConfig, downsample: int, interpolates: bool) -> None:
    """Raise `UserError` if `program` would build another network or can't read the folder's tokenizer."""
    tokenizer = [name for name in ("vocab.json", "merges.txt") if not (checkpoint / name).is_file()]
    if program == "vllm-omni" and (checkpoint / "tokenizer.json").is_file():
        tokenizer = []
    faults = []
    if tokenizer:
        faults.append(f"its tokenizer reads {' and '.join(tokenizer)}, which {checkpoint} lacks; copy them there")
    if program in _HARD_CODED:
        for what, found, built in (
            ("latent_patch_size", config.latent_patch_size, 2),
            ("vit_max_num_patch_per_side", config.vit.max_patches_per_side, _VIT_SIDE),
            ("llm_qk_norm", config.llm.qk_norm, True),
            ("interpolate_pos", interpolates, False),
            ("z_channels of the autoencoder", config.z_channels, 16),
            ("downsampling of the autoencoder", downsample, 8),
        ):
            if found != built:
                faults.append(f"it always builds {what} {built}, but this model has {found}; use --for vllm-omni")
    all_faults([f"--for {program}: {fault}." for fault in faults], f"--for {program} can't serve {checkpoint}:")


def _arguments(checkpoint: Path) -> dict[str, Any]:
    """The run's arguments; none for an adapter that another program trained."""
    if holds_adapter(checkpoint) and not (checkpoint / TRAINER).is_file():
        return {}
    return read_trainer(checkpoint).get("arguments", {})


def _config_texts(
    checkpoint: Path, config: BagelConfig, downsample: int, dtype: torch.dtype, interpolates: bool
) -> dict[str, str]:
    """config.json, llm_config.json, vit_config.json, and preprocessor_config.json if the checkpoint has none."""
    stored = str(dtype).removeprefix("torch.")
    llm = _llm_config(checkpoint, config, stored)
    vit = _vit_config(checkpoint, config)
    whole = {
        "architectures": ["BagelForConditionalGeneration"],
        "connector_act": config.connector_act,
        "interpolate_pos": interpolates,
        "latent_patch_size": config.latent_patch_size,
        "llm_config": llm,
        "max_latent_size": config.max_latent_size,
        "model_type": "bagel",
        "timestep_shift": 1.0,  # as in BAGEL-7B-MoT; the sampling shift (3 by default) is part of a request
        "torch_dtype": stored,
        "vae_config": {"downsample": downsample, "z_channels": config.z_channels},
        "visual_gen": True,
        "visual_und": True,
        "vit_config": vit,
        "vit_max_num_patch_per_side": config.vit.max_patches_per_side,
    }
    files = {"config.json": whole, "llm_config.json": llm, "vit_config.json": vit}
    if not (checkpoint / "preprocessor_config.json").is_file():
        files["preprocessor_config.json"] = _preprocessor(vit["image_size"])
    return {name: json.dumps(content, indent=2) + "\n" for name, content in files.items()}


def _llm_config(checkpoint: Path, config: BagelConfig, stored: str) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **_read(checkpoint / "llm_config.json"),
        **{name: getattr(config.llm, name) for name in config.llm.__dataclass_fields__},
        "layer_module": "Qwen2MoTDecoderLayer",
        "torch_dtype": stored,
    }


def _vit_config(checkpoint: Path, config: BagelConfig) -> dict[str, Any]:
    vit = config.vit
    return {
        **_read(checkpoint / "vit_config.json"),
        "hidden_size": vit.hidden_size,
        "image_size": vit.patch_size * vit.max_patches_per_side,
        "intermediate_size": vit.intermediate_size,
        "layer_norm_eps": vit.layer_norm_eps,
        "model_type": "siglip_vision_model",
        "num_attention_heads": vit.num_attention_heads,
        "num_channels": vit.num_channels,
        "num_hidden_layers": vit.num_layers + 1,  # all programs build one fewer
        "patch_size": vit.patch_size,
    }


def _preprocessor(side: int) -> dict[str, Any]:
    """SigLIP's image processor: pixels in [-1, 1]."""
    return {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": side, "width": side},
    }


def _read(path: Path) -> dict[str, Any]:
    found = read_json(path).content
    assert isinstance(found, dict), f"{path}: checked by ModelFolder"
    return found


def checkpoint_readme(folder: Path) -> str:
    """README.md of a checkpoint: which program reads which of its weight files."""
    stem, why = average_or_weights(folder)
    both = ModelFolder(folder).weight_files("ema")
    lines = [
        "# A checkpoint of bagel_ds",
        "",
        f"`{MODEL}` holds the trained weights" + (f", `{EMA}` their moving average (EMA)." if both else "; no EMA."),
        "",
        f"Use `{stem}.safetensors`: {why}.",
        "",
        "| program | file it reads from this folder |",
        "|---|---|",
        f"| bagel_ds (inference, export) | `{stem}.safetensors`, unless you ask for the other |",
        f"| the original's app and evaluation, ComfyUI-BAGEL, LightX2V | {f'`{EMA}`' if both else 'none: no ' + EMA} |",
        f"| vLLM-omni | `{MODEL}`" + (f": it loads both, and `{MODEL}` replaces `{EMA}` |" if both else " |"),
        f"| MathCanvas | `{MODEL}` (`--checkpoint_file`) |",
        f"| VLMEvalKit | `{EMA if both else MODEL}` |",
        "",
        "To serve it with another program, export the layout that the program reads:",
        "",
        "    bagel-ds export THIS_FOLDER --out FOLDER --for original    # or comfyui, or vllm-omni",
        "",
    ]
    return "\n".join(lines)
