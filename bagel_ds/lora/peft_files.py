"""Adapter folders in peft's format: adapter_config.json and adapter_model.safetensors.

Guarantees: what is written here, peft loads onto the same network; what peft wrote for a BAGEL network (wrapped whole,
or only its language model) is read here. Kinds of adapters that this package does not compute (DoRA, saved modules,
biases) are refused by name, not ignored.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Mapping, NamedTuple

from torch import Tensor

from bagel_ds.config_files import read_json
from bagel_ds.errors import UserError, all_faults
from bagel_ds.model.shape.lora import LORA_A, LORA_B, LoRA
from bagel_ds.model_folder.finite import first_not_finite
from bagel_ds.model_folder.tensor_files import TensorFiles
from bagel_ds.ranges import TensorInfo

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EMA_FOLDER = "ema"  # in a checkpoint: an adapter folder that holds the moving average
_FINGERPRINT, _PRECISION = "base_fingerprint", "base_precision"  # keys of the metadata
_ROOT = "base_model.model."
_LANGUAGE_MODEL = "language_model."


def peft_name(parameter: str) -> str:
    """peft's name for an adapter's parameter of our network."""
    return f"{_ROOT}{parameter}.weight"


class AdapterRecord(NamedTuple):
    """What is written beside an adapter's weights."""

    lora: LoRA
    layers: frozenset[str]  # the adapted ones
    base: str  # the base model: its folder or hub id
    fingerprint: str  # of the base model's weights

    def config(self) -> str:
        """The text of adapter_config.json."""
        content = {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": self.base,
            "r": self.lora.rank,
            "lora_alpha": self.lora.alpha,
            "lora_dropout": self.lora.dropout,
            "target_modules": sorted(self.layers),
            "bias": "none",
            "fan_in_fan_out": False,
            "use_rslora": False,
            "use_dora": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "modules_to_save": None,
        }
        return json.dumps(content, indent=2) + "\n"

    def metadata(self) -> dict[str, str]:
        """For the header of the weights: peft warns about keys of adapter_config.json that it doesn't know."""
        precision = {} if self.lora.base_precision is None else {_PRECISION: self.lora.base_precision}
        return {"format": "pt", _FINGERPRINT: self.fingerprint, **precision}


def adapter_readme(has_average: bool) -> str:
    """README.md of a checkpoint that holds an adapter."""
    average = f"\n`{EMA_FOLDER}/` is an adapter folder of its own: the EMA (moving average)." if has_average else ""
    return f"""# An adapter (LoRA) trained by bagel_ds

`{WEIGHTS}` and `{CONFIG}` are in peft's format; `{CONFIG}` names the base model.{average}

    bagel-ds generate --model_path BASE --lora THIS_FOLDER --prompt "..."
    bagel-ds export THIS_FOLDER --merge --model_path BASE --out FOLDER

The second command adds the adapter to the base model's weights. The result is an ordinary model folder, which other
programs read; most of them can't load adapters of the generation expert.
"""


def holds_adapter(folder: Path) -> bool:
    """Whether a folder looks like an adapter's."""
    return (folder / CONFIG).is_file() or (folder / WEIGHTS).is_file()


def named_base(folder: Path) -> str | None:
    """The base model that an adapter's configuration names. Raises `UserError`."""
    return _read_config(folder).get("base_model_name_or_path")


def adapter_files(folder: Path) -> list[str]:
    """The weight files of a folder and of the average in it, relative to the folder."""
    return [name for name in (WEIGHTS, f"{EMA_FOLDER}/{WEIGHTS}") if (folder / name).is_file()]


class AdapterFolder:
    """An adapter's weights by layer, all of them opened and checked. Raises `UserError` for one that can't be used."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = _read_config(folder)
        if not (folder / WEIGHTS).is_file():
            raise UserError(f"{folder} holds {CONFIG} but no {WEIGHTS}; copy the adapter's folder again.")
        self._files = TensorFiles([folder / WEIGHTS])
        self._names: dict[str, str] = {}  # of our parameters -> of the file's tensors
        faults = []
        for name in self._files.names:
            own = _own_name(name)
            if own is None:
                faults.append(f"tensor {name}: expected a name such as {peft_name('language_model.…q_proj.' + LORA_A)}")
            else:
                self._names[own] = name
        self.layers = frozenset(name.rpartition(".")[0] for name in self._names)
        faults += [fault for layer in sorted(self.layers) if (fault := self._layer_fault(layer))]
        all_faults([f"{folder / WEIGHTS}: {fault}" for fault in faults[:5]], "This adapter can't be used:")
        if not self.layers:
            raise UserError(f"{folder / WEIGHTS} holds no adapter; copy the adapter's folder again.")

    @property
    def rank(self) -> int:
        return int(self.config["r"])

    @property
    def base(self) -> str | None:
        """The base model that the folder names."""
        return self.config.get("base_model_name_or_path")

    @property
    def fingerprint(self) -> str | None:
        """Of the base model's weights; None if another program wrote the folder."""
        return self._files.metadata.get(_FINGERPRINT)

    @property
    def base_precision(self) -> str | None:
        """The format in which the run kept the base model's weights; None if it did not quantize them."""
        return self._files.metadata.get(_PRECISION)

    def scale(self, layer: str) -> float:
        """What B A is multiplied with."""
        rank = self.info(f"{layer}.{LORA_A}").shape[0]
        alpha = float(self.config.get("lora_alpha", 8))
        return alpha / rank**0.5 if self.config.get("use_rslora") else alpha / rank

    @property
    def numel(self) -> int:
        """Elements of all its matrices."""
        return sum(self.info(name).numel for name in self._names)

    def a(self, layer: str) -> Tensor:
        """[rank, inputs] fp32."""
        return self.matrix(f"{layer}.{LORA_A}").float()

    def matrix(self, name: str) -> Tensor:
        """A parameter in its own shape and precision."""
        return self.read(name).view(self.info(name).shape)

    def rows_of_b(self, layer: str, first: int, last: int) -> Tensor:
        """Rows [first, last) of B, [last - first, rank] fp32."""
        name = f"{layer}.{LORA_B}"
        rank = self.info(name).shape[1]
        return self.read(name, first * rank, (last - first) * rank).float().view(-1, rank)

    def check_fits(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise `UserError` unless every layer is one of a network whose parameters have these shapes."""
        faults = []
        for layer in sorted(self.layers):
            found = (self.info(f"{layer}.{LORA_B}").shape[0], self.info(f"{layer}.{LORA_A}").shape[1])
            expected = shapes.get(f"{layer}.weight")
            if expected is None:
                faults.append(f"the model has no layer {layer}")
            elif found != expected:
                faults.append(f"{layer} is for a weight of {list(found)}, the model's has {list(expected)}")
        said = [f"adapter {self.folder}: {fault}; pass the model that it was trained on" for fault in faults[:5]]
        all_faults(said, "The adapter belongs to another model:")

    # ---------------------------------------------------------------------------------------- as a WeightSource
    def __contains__(self, name: str) -> bool:
        return name in self._names

    def info(self, name: str) -> TensorInfo:
        return self._files.info(self._names[name])

    def read(self, name: str, start: int = 0, numel: int | None = None) -> Tensor:
        return self._files.read(self._names[name], start, numel)

    def _layer_fault(self, layer: str) -> str | None:
        names = (f"{layer}.{LORA_A}", f"{layer}.{LORA_B}")
        missing = [name for name in names if name not in self._names]
        if missing:
            return f"{missing[0]} is missing"
        a, b = (self.info(name) for name in names)
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
            return f"{layer}: shapes {list(a.shape)} and {list(b.shape)} are not [rank, inputs] and [outputs, rank]"
        if not (a.dtype.is_floating_point and b.dtype.is_floating_point):
            return f"{layer}: holds {a.dtype} and {b.dtype}, expected floating-point numbers"
        for name in names:
            values = self.read(name)
            if (bad := first_not_finite(values)) is not None:
                return f"{name} holds {float(values[bad])} at element {bad:,}"
        return None


def _own_name(name: str) -> str | None:
    """Our name for a tensor of an adapter file."""
    parameter = name.removeprefix(_ROOT).removesuffix(".weight").removesuffix(".default")
    if parameter.startswith("model.layers."):
        parameter = _LANGUAGE_MODEL + parameter
    return parameter if parameter.rpartition(".")[2] in (LORA_A, LORA_B) else None


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder} holds no {CONFIG}: it is not the folder of an adapter.")
    config = read_json(path).content
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object")
    faults: list[str] = []
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        faults.append(f"peft_type {config['peft_type']!r}: only LORA is supported")
    for key in ("r", "lora_alpha"):
        value = config.get(key, 8)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e6:
            faults.append(f"{key} {value!r}: expected a number above 0")
    for key in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "trainable_token_indices"):
        if config.get(key):
            faults.append(f"{key} {config[key]!r} is not supported; merge the adapter with peft first")
    if config.get("bias", "none") != "none":
        faults.append(f"bias {config['bias']!r} is not supported; merge the adapter with peft first")
    all_faults([f"{path}: {fault}" for fault in faults], "This adapter can't be used:")
    return config
