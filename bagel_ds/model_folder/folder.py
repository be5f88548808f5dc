"""A model folder in the layout of BAGEL-7B-MoT: its configuration, its weights, its autoencoder.

Guarantees: everything wrong with a folder is found before the first weight is read and reported in one message; a
weight that is asked for and absent is an error, never random numbers; position tables are computed, not loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Sequence

import torch
from torch import Tensor

from bagel_ds.config_files import read_json
from bagel_ds.errors import UserError, all_faults
from bagel_ds.model.embeddings import position_table
from bagel_ds.model.shape.config import LLMConfig, VAEConfig, ViTConfig
from bagel_ds.model.shape.parts import POSITION_TABLES, generation_twin
from bagel_ds.model.vae import AutoEncoder
from bagel_ds.model_folder.finite import CheckedWeights
from bagel_ds.model_folder.tensor_files import TensorFiles, dtype_fault
from bagel_ds.ranges import TensorInfo

MODEL, EMA, VAE = "model.safetensors", "ema.safetensors", "ae.safetensors"
LATENT_TABLE = "latent_pos_embed.pos_embed"
MOST_LAYERS, LARGEST_SIZE = 1000, 2**24  # of a configuration's numbers: what is larger is nonsense
CONFIG_FILES = (
    "llm_config.json",
    "vit_config.json",
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)


@dataclass(frozen=True)
class ModelFolder:
    """Paths and shapes; weights are opened by `open_weights` and `load_vae`."""

    path: Path

    def __post_init__(self) -> None:
        if not self.path.is_dir():
            raise UserError(f"model folder {self.path} does not exist. {DOWNLOAD}")

    def llm_config(self) -> LLMConfig:
        found = self._json("llm_config.json")
        defaults = {name: field.default for name, field in LLMConfig.__dataclass_fields__.items()}
        needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        config = LLMConfig(**self._numbers("llm_config.json", found, defaults, needed))
        self._check_heads("llm_config.json", config.hidden_size, config.num_attention_heads)
        if config.num_attention_heads % config.num_key_value_heads:
            raise UserError(
                f"{self.path / 'llm_config.json'}: num_key_value_heads {config.num_key_value_heads} does not divide "
                f"num_attention_heads {config.num_attention_heads}. Download or copy the file again."
            )
        return config

    def vit_config(self, select_layer: int = -2, max_patches_per_side: int = 70) -> ViTConfig:
        """`select_layer` as vit_select_layer: layers beyond it are not built."""
        found = self._json("vit_config.json")
        names = ("hidden_size", "intermediate_size", "num_attention_heads", "patch_size")
        fields = (*names, "num_channels", "layer_norm_eps")
        defaults = {name: ViTConfig.__dataclass_fields__[name].default for name in fields}
        defaults["num_hidden_layers"] = ViTConfig.num_layers
        values = self._numbers("vit_config.json", found, defaults, (*names, "num_hidden_layers"))
        self._check_heads("vit_config.json", values["hidden_size"], values["num_attention_heads"])
        layers = values.pop("num_hidden_layers") + 1 + select_layer
        if layers < 0:
            raise UserError(
                f"--vit_select_layer {select_layer}: the ViT of {self.path} has only {layers - 1 - select_layer} layers"
            )
        return ViTConfig(**values, num_layers=layers, max_patches_per_side=max_patches_per_side)

    def image_sizes(self, kind: str) -> tuple[int, int] | None:
        """(longest, shortest) side in pixels of the images of `kind`, vae or vit, that the model was trained on.

        Read from `image_sizes` of config.json, which BAGEL-7B-MoT doesn't have; None without it.
        """
        path = self.path / "config.json"
        said = read_json(path).content.get("image_sizes", {}) if path.is_file() else {}
        if not isinstance(said, dict) or kind not in said:
            return None
        sizes = said[kind]
        if not (isinstance(sizes, list) and len(sizes) == 2 and all(type(size) is int and size > 0 for size in sizes)):
            raise UserError(f"{path}: image_sizes has {kind} {sizes!r}, expected the longest and the shortest side")
        return sizes[0], sizes[1]

    def weight_files(self, stem: str) -> list[Path]:
        """The files of "model" or "ema": one file, the shards of an index, or nothing."""
        single, index = self.path / f"{stem}.safetensors", self.path / f"{stem}.safetensors.index.json"
        if single.exists():
            return [single]
        if index.exists():
            weight_map = self._json(index.name).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
                raise UserError(f"{index}: weight_map names no files. Download or copy it again.")
            shards = sorted(set(weight_map.values()))
            if lacking := [name for name in shards if Path(name).name != name or not (self.path / name).is_file()]:
                raise UserError(
                    f"{index} names {len(shards)} files, of which the folder lacks {len(lacking)}: "
                    f"{', '.join(lacking[:3])}{', ...' if lacking[3:] else ''}. Download or copy them again."
                )
            return [self.path / name for name in shards]
        return []

    @property
    def holds_weights(self) -> bool:
        """Whether there are weights to start from, under one of the known names."""
        return bool(self.weight_files("ema") or self.weight_files("model"))

    def open_weights(self, prefer_ema: bool) -> TensorFiles:
        """ema.safetensors when preferred, else model.safetensors, else the other; an error when there is neither."""
        for stem in ("ema", "model") if prefer_ema else ("model", "ema"):
            files = self.weight_files(stem)
            if files:
                return TensorFiles(files)
        others = [path.name for path in sorted(self.path.iterdir()) if _is_weight_file(path) and path.name != VAE]
        unread = f" Found {', '.join(others[:3])}, which can't be used under that name or format." if others else ""
        raise UserError(f"{self.path} holds neither {MODEL} nor {EMA} (nor their .index.json).{unread} {DOWNLOAD}")

    def load_vae(self, decodes: bool = True) -> AutoEncoder:
        """The frozen autoencoder in fp32, or only its encoder; its sizes come from the tensors' shapes."""
        path = self.path / VAE
        if not path.exists():
            raise UserError(f"{path} does not exist: the image autoencoder is needed for training. {DOWNLOAD}")
        return load_vae(path, decodes)

    def _json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        if not path.is_file():
            raise UserError(f"{path} does not exist: {self.path} is not a BAGEL model folder. {DOWNLOAD}")
        found = read_json(path).content
        if not isinstance(found, dict):
            raise UserError(f"{path}: expected a JSON object, found {found!r:.60}. Download or copy it again.")
        return found

    def _numbers(
        self, file: str, found: dict[str, Any], defaults: Mapping[str, Any], needed: Sequence[str]
    ) -> dict[str, Any]:
        """The values of `found` under the names of `defaults`, of the types that these have."""
        faults = [f"{name} is missing" for name in needed if name not in found]
        values = {name: found[name] for name in defaults if name in found}
        for name, value in values.items():
            if expected := _number_fault(
                value, type(defaults[name]), MOST_LAYERS if "layers" in name else LARGEST_SIZE
            ):
                faults.append(f"{name} is {value!r:.60}, expected {expected}")
        path = self.path / file
        all_faults(
            [f"{path}: {fault}. Download or copy the file again." for fault in faults] if len(faults) == 1 else faults,
            f"{path} does not describe a network; download or copy it again:",
        )
        return values

    def _check_heads(self, file: str, width: int, heads: int) -> None:
        if width % heads:
            raise UserError(
                f"{self.path / file}: num_attention_heads {heads} does not divide hidden_size {width}. "
                "Download or copy the file again."
            )


def _number_fault(value: Any, kind: type, most: int) -> str:
    """What a value of a configuration should have been instead; "" where it is right."""
    if kind is bool:
        return "" if isinstance(value, bool) else "true or false"
    if kind is int:
        return "" if type(value) is int and 1 <= value <= most else f"a whole number from 1 to {most:,}"
    good = type(value) in (int, float) and 0 < value < math.inf
    return "" if good else "a number above 0"


def _is_weight_file(path: Path) -> bool:
    return path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".incomplete")


DOWNLOAD = (
    "Get the model with `hf download ByteDance-Seed/BAGEL-7B-MoT --local-dir models/BAGEL-7B-MoT` and pass "
    "--model_path models/BAGEL-7B-MoT; or make a tiny one with `bagel-ds demo --out demo`."
)


def load_vae(path: Path, decodes: bool = True) -> AutoEncoder:
    """As `ModelFolder.load_vae`. The file must hold a whole autoencoder even where only the encoder is read."""
    files = TensorFiles([path])
    config = vae_config(files, path)
    with torch.device("meta"):
        whole = AutoEncoder(config)
    expected = {name: tuple(p.shape) for name, p in whole.named_parameters()}
    check_tensors(files, expected, str(path))
    vae = AutoEncoder(config, decodes)
    weights = CheckedWeights(files, str(path))
    needed = {name for name, _ in vae.named_parameters()}
    state = {}
    for name, shape in expected.items():
        values = weights.read(name)  # also what is not needed: the file goes into every checkpoint
        if name in needed:
            state[name] = values.reshape(shape).float()
    weights.check()
    vae.load_state_dict(state)
    return vae.requires_grad_(False).eval()


def vae_config(files: TensorFiles, path: Path) -> VAEConfig:
    """Channel counts and depths of an autoencoder file (the released one: 128, (1, 2, 4, 4), 2 blocks, 16)."""

    def outputs(name: str, inputs: bool = False) -> int:
        shape = files.info(name).shape if name in files else ()
        if len(shape) != 4 or 0 in shape:
            found = f"has shape {list(shape)}, expected 4 dimensions" if name in files else "is missing"
            raise UserError(f"{path} is not the FLUX autoencoder: tensor {name} {found}.")
        return shape[1 if inputs else 0]

    channels = outputs("encoder.conv_in.weight")
    latents = outputs("decoder.conv_in.weight", inputs=True)
    multipliers: list[int] = []
    while (name := f"encoder.down.{len(multipliers)}.block.0.conv1.weight") in files:
        multipliers.append(outputs(name) // channels)
    blocks = 0
    while f"encoder.down.0.block.{blocks}.conv1.weight" in files:
        blocks += 1
    if not multipliers or 0 in multipliers:
        raise UserError(
            f"{path} is not the FLUX autoencoder: its encoder has no levels, or narrower ones than its input."
        )
    return VAEConfig(
        channels=channels,
        channel_multipliers=tuple(multipliers),
        res_blocks=blocks,
        z_channels=latents,
    )


def check_tensors(found: TensorFiles, expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Every expected tensor is there with its shape, as numbers to train, or one `UserError` lists what is not."""
    if fault := dtype_fault(found, expected):
        raise UserError(f"{where}: {fault}.")
    faults = []
    for name, shape in expected.items():
        if name not in found:
            alike = next((other for other in found.names if other.endswith(f".{name}")), None)
            faults.append(f"tensor {name} is missing" + (f" (there is {alike})" if alike else ""))
        elif found.info(name).shape != shape:
            faults.append(
                f"tensor {name} has shape {list(found.info(name).shape)}, the configuration needs {list(shape)}"
            )
    if len(faults) > 8:
        faults = faults[:8] + [f"... and {len(faults) - 8} more"]
    all_faults(
        [f"{where}: {fault}. The weights and the folder's *_config.json do not belong together." for fault in faults]
        if len(faults) == 1
        else faults,
        f"{where} does not hold the weights that the folder's *_config.json describe:",
    )


class BagelWeights:
    """A `WeightSource` for every parameter of a network: files, computed position tables, copied experts.

    Raises `UserError` at construction when a tensor is missing or of another shape.
    """

    def __init__(self, files: TensorFiles, shapes: Mapping[str, tuple[int, ...]], copy_init_moe: bool, where: str):
        self.files, self._shapes = files, dict(shapes)
        self._check_latent_side(where)
        self.copied: dict[str, str] = {}
        for name in shapes:
            twin = generation_twin(name)
            if copy_init_moe and twin is not None and name not in files and twin in files:
                self.copied[name] = twin
        loaded = {
            name: shape for name, shape in shapes.items() if name not in POSITION_TABLES and name not in self.copied
        }
        check_tensors(files, loaded, where)
        self.loaded = list(loaded)
        self.unexpected = sorted(set(files.names) - set(shapes))
        self._tables = {
            name: position_table(shapes[name][1], int(shapes[name][0] ** 0.5)).flatten()
            for name in POSITION_TABLES
            if name in shapes
        }

    def _check_latent_side(self, where: str) -> None:
        wanted = round(self._shapes[LATENT_TABLE][0] ** 0.5)
        found = latent_side(self.files) or wanted
        if found != wanted:
            raise UserError(
                f"max_latent_size={wanted} but latent_pos_embed in {where} holds {found}x{found} positions; "
                f"pass --max_latent_size {found} (or leave it out: the checkpoint's own size is the default)."
            )

    @property
    def names(self) -> list[str]:
        return list(self._shapes)

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def info(self, name: str) -> TensorInfo:
        if name in self._tables:
            return TensorInfo(torch.float32, self._shapes[name])
        return self.files.info(self.copied.get(name, name))

    def read(self, name: str, start: int = 0, numel: int | None = None) -> Tensor:
        if name in self._tables:
            table = self._tables[name]
            return table[start:] if numel is None else table[start : start + numel]
        return self.files.read(self.copied.get(name, name), start, numel)


def latent_side(files: TensorFiles) -> int | None:
    """Side of the latent position table in a checkpoint, or None where the file has none."""
    if LATENT_TABLE not in files:
        return None
    shape = files.info(LATENT_TABLE).shape
    side = round(shape[0] ** 0.5) if len(shape) == 2 else 0
    if side < 1 or side**2 != shape[0]:
        raise UserError(
            f"{files.paths[0]}: tensor {LATENT_TABLE} has shape {list(shape)}, expected a square number of rows. "
            "Download or copy it again."
        )
    return side
