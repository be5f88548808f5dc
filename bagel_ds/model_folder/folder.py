"""A folder in the layout of BAGEL-7B-MoT: which files it holds, and the network that its configuration describes.

Guarantees: a missing file, or a configuration that describes no network, is one message before any weight is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Sequence

from bagel_ds.config_files import read_json
from bagel_ds.errors import UserError, all_faults
from bagel_ds.model.shape.config import LLMConfig, ViTConfig
from bagel_ds.model.vae import AutoEncoder
from bagel_ds.model_folder.autoencoder import load_vae
from bagel_ds.model_folder.tensor_files import TensorFiles

MODEL, EMA, VAE = "model.safetensors", "ema.safetensors", "ae.safetensors"
MOST_LAYERS, LARGEST_SIZE = 1000, 2**24  # larger numbers in a configuration are nonsense
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

DOWNLOAD = (
    "Get the model with `bagel-ds download` and pass --model_path models/BAGEL-7B-MoT; or make a tiny one with "
    "`bagel-ds demo --out demo`."
)


@dataclass(frozen=True)
class ModelFolder:
    """The configuration and the weight files of one folder. Weights are read only by `open_weights` and `load_vae`."""

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
        """`select_layer` is the argument vit_select_layer: layers after it are not built."""
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
        """The files of `stem`, which is "model" or "ema": one file, the shards of an index, or none."""
        single, index = self.path / f"{stem}.safetensors", self.path / f"{stem}.safetensors.index.json"
        if single.exists():
            return [single]
        if index.exists():
            weight_map = self._json(index.name).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
                raise UserError(f"{index}: its weight_map is not a list of files by tensor. Download or copy it again.")
            shards = sorted(set(weight_map.values()))
            if lacking := [name for name in shards if Path(name).name != name or not (self.path / name).is_file()]:
                raise UserError(
                    f"{index} names {len(shards)} files, but {len(lacking)} of them are missing: "
                    f"{', '.join(lacking[:3])}{', ...' if lacking[3:] else ''}. Download or copy them again."
                )
            return [self.path / name for name in shards]
        return []

    @property
    def holds_weights(self) -> bool:
        """Whether the folder has weights under one of the known names."""
        return bool(self.weight_files("ema") or self.weight_files("model"))

    def open_weights(self, prefer_ema: bool) -> TensorFiles:
        """The preferred weights, else the other ones. Raises `UserError` if there are none."""
        for stem in ("ema", "model") if prefer_ema else ("model", "ema"):
            files = self.weight_files(stem)
            if files:
                return TensorFiles(files)
        raise UserError(self.without_weights())

    def without_weights(self) -> str:
        """The message about a folder with neither weight file; the remedy names the folder's newest checkpoint."""
        others = [path.name for path in sorted(self.path.iterdir()) if _is_weight_file(path) and path.name != VAE]
        unread = f" Found {', '.join(others[:3])}, which has another name or format." if others else ""
        newest = _newest_checkpoint(self.path)
        remedy = f"It is the folder of a run: pass a checkpoint, such as {newest}." if newest else DOWNLOAD
        return f"{self.path} holds neither {MODEL} nor {EMA} (nor their .index.json).{unread} {remedy}"

    def load_vae(self, decodes: bool = True) -> AutoEncoder:
        """The frozen autoencoder in fp32, or only its encoder. Raises `UserError`."""
        path = self.path / VAE
        if not path.exists():
            raise UserError(f"{path} does not exist; the image autoencoder is needed. {DOWNLOAD}")
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
        """The values of `found` whose names are in `defaults`, checked to have the types of these."""
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
            f"{path} does not describe a network. Download or copy it again:",
        )
        return values

    def _check_heads(self, file: str, width: int, heads: int) -> None:
        if width % heads:
            raise UserError(
                f"{self.path / file}: num_attention_heads {heads} does not divide hidden_size {width}. "
                "Download or copy the file again."
            )


def _number_fault(value: Any, kind: type, most: int) -> str:
    """What a value of a configuration should be instead; "" if it is valid."""
    if kind is bool:
        return "" if isinstance(value, bool) else "true or false"
    if kind is int:
        return "" if type(value) is int and 1 <= value <= most else f"a whole number from 1 to {most:,}"
    good = type(value) in (int, float) and 0 < value < math.inf
    return "" if good else "a number above 0"


def _newest_checkpoint(folder: Path) -> Path | None:
    """The last step_N with weights in a checkpoint_dir, or in the one of a results_dir."""
    steps = [path for below in (folder, folder / "checkpoints") for path in below.glob("step_*")]
    numbered = [path for path in steps if path.name.removeprefix("step_").isdecimal() and path.is_dir()]
    whole = [path for path in numbered if ModelFolder(path).holds_weights]
    return max(whole, key=lambda path: int(path.name.removeprefix("step_")), default=None)


def _is_weight_file(path: Path) -> bool:
    return path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".incomplete")
