"""Adapters (LoRA) of a network that draws and answers: named, weighted, and chosen anew by each request.

Guarantees: an adapter is added beside a layer's own weight, which stays as it is in the model's file. So choosing other
adapters reads and copies nothing, and without any the network is the base, bit for bit. One adapter of weight 1
computes what it did in training.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bagel_ds.checkpoint.step_folders import checkpoints_near, meant_checkpoint
from bagel_ds.errors import UserError, all_faults
from bagel_ds.lora.peft_files import AdapterFolder, holds_adapter
from bagel_ds.model.bagel import Bagel
from bagel_ds.model.layers import add_low_rank
from bagel_ds.model.shape.config import BagelConfig
from bagel_ds.model.shape.lora import LORA_A, LORA_B
from bagel_ds.model.shape.parameters import linear_layers

logger = logging.getLogger("bagel_ds")

MOST = 100.0  # a weight's size
GRAMMAR = "[NAME=]FOLDER[:WEIGHT], such as results/checkpoints/step_500 or cat=cats/step_500:0.8"
Asked = Mapping[str, float | None] | None  # weights by name, None for the usual one; None: all adapters as usual


class NamedAdapter(NamedTuple):
    name: str
    folder: Path
    weight: float


def named_adapters(words: Sequence[str | Path]) -> list[NamedAdapter]:
    """What values of --lora mean. Raises one `UserError` for all that are wrong."""
    found: list[NamedAdapter] = []
    faults = []
    for word in words:
        try:
            found.append(_named(word))
        except UserError as fault:
            faults.append(f"--lora {word}: {fault}")
    for number, adapter in enumerate(found):
        for earlier in found[:number]:
            if earlier.name == adapter.name:
                faults.append(
                    f"--lora: {earlier.folder} and {adapter.folder} are both called {adapter.name}; pass a name with "
                    f"each, such as --lora first={earlier.folder} --lora second={adapter.folder}"
                )
    all_faults(faults, "These adapters can't be used:")
    return found


def _named(word: str | Path) -> NamedAdapter:
    path, weight, name = str(word), 1.0, ""
    if not Path(path).exists():  # a folder's own name may hold "=" and ":"
        before, equals, behind = path.partition("=")
        if equals and "/" not in before:
            name, path = before.strip(), behind
            if not name:
                raise UserError(f"there is no name before =; expected {GRAMMAR}")
    if not Path(path).exists():
        before, colon, behind = path.rpartition(":")
        if colon:
            path, weight = before, _weight(behind)
    if not path or not Path(path).exists():
        raise UserError(f"there is no folder {path or '.'}; expected {GRAMMAR}")
    return NamedAdapter(name or os.path.basename(os.path.abspath(path)), meant_checkpoint(Path(path)), weight)


def _weight(value: Any) -> float:
    try:
        weight = float(value) if not isinstance(value, bool) else float("nan")
    except (TypeError, ValueError):
        weight = float("nan")
    if not abs(weight) <= MOST:
        raise UserError(f"weight {value!r}: expected a number from {-MOST:g} to {MOST:g}")
    return weight


def asked_adapters(value: Any) -> Asked:
    """What a request's `lora` means: a name, a list of names, or weights by name; an empty list for none.

    Raises `UserError`.
    """
    if value is None:
        return None
    if isinstance(value, str):
        return {value: None}
    if isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value):
        return dict.fromkeys(value)
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        try:  # a column of a parquet file has every name in every row
            return {name: _weight(weight) for name, weight in value.items() if weight is not None}
        except UserError as fault:
            raise UserError(f"lora: {fault}") from None
    raise UserError(
        f'lora is {value!r:.60}, expected the name of an adapter, a list of names, or weights such as {{"cat": 0.8}}'
    )


class Adapters:
    """`weights`: how much each adapter counts unless a request says otherwise, by name, in the order of adding.

    Made of values of --lora before a model is loaded, and attached to the model afterwards.
    """

    def __init__(self, words: Sequence[str | Path] = ()) -> None:
        """Opens the folders. Raises `UserError`."""
        named = named_adapters(words)
        for adapter in named:
            if not holds_adapter(adapter.folder) and (near := checkpoints_near(adapter.folder)):
                raise UserError(f"--lora {adapter.folder} holds no adapter; {near}")
        self.folders = {adapter.name: AdapterFolder(adapter.folder) for adapter in named}
        self.weights = {adapter.name: adapter.weight for adapter in named}
        self._in_use: Mapping[str, float] = self.weights
        self._hooks: list[RemovableHandle] = []

    def check_fits(self, config: BagelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise `UserError` for an adapter of another network, or of layers that can have none."""
        can_have = frozenset(linear_layers(config))
        for folder in self.folders.values():
            folder.check_fits(shapes)
            if others := sorted(folder.layers - can_have):
                raise UserError(
                    f"adapter {folder.folder} changes {others[0]}, which is no linear layer; merge it with bagel-ds "
                    "export --merge and pass the result as --model_path"
                )

    def nbytes(self, dtype: torch.dtype) -> int:
        """What they take beside the network."""
        return dtype.itemsize * sum(folder.numel for folder in self.folders.values())

    def attach(self, model: Bagel, device: torch.device, dtype: torch.dtype) -> None:
        """Let the layers of a network that they fit add them from here on."""
        for name, folder in self.folders.items():
            for layer in sorted(folder.layers):
                a, b = (folder.matrix(f"{layer}.{kind}").to(device, dtype) for kind in (LORA_A, LORA_B))
                add = partial(self._add, name, a, b, folder.scale(layer))
                self._hooks.append(model.get_submodule(layer).register_forward_hook(add))
            logger.info(
                "adapter %s: %s, %d layers, rank %d, weight %g",
                name,
                folder.folder,
                len(folder.layers),
                folder.rank,
                self.weights[name],
            )

    def detach(self) -> None:
        """Leave the network as it was before `attach`, and give back the adapters' memory."""
        while self._hooks:
            self._hooks.pop().remove()

    def chosen(self, asked: Asked) -> dict[str, float]:
        """The weights that a request means, without those that don't count. Raises `UserError` for an unknown name."""
        if asked is None:
            wanted = self.weights
        else:
            for name in asked:
                if name not in self.weights:
                    raise UserError(self._unknown(name))
            wanted = {
                name: self.weights[name] if (weight := asked[name]) is None else weight
                for name in self.weights
                if name in asked
            }
        return {name: weight for name, weight in wanted.items() if weight}

    @contextmanager
    def in_use(self, weights: Mapping[str, float]) -> Iterator[None]:
        """Within, the network adds these; outside, the usual ones."""
        self._in_use = weights
        try:
            yield
        finally:
            self._in_use = self.weights

    def _add(
        self, name: str, a: Tensor, b: Tensor, scale: float, layer: nn.Module, inputs: tuple[Tensor], y: Tensor
    ) -> Tensor:
        weight = self._in_use.get(name, 0.0)
        return add_low_rank(y, inputs[0], a, b, weight * scale) if weight else y

    def _unknown(self, name: str) -> str:
        if not self.weights:
            return f"lora names the adapter {name!r}, but the model was opened without any; pass --lora {name}=FOLDER"
        return f"lora: there is no adapter {name!r}; expected one of {', '.join(self.weights)}"
