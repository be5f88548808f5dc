"""The weight files of one model folder, each loaded when it is first asked for and then kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bagel_ds.errors import UserError
from bagel_ds.inference.generation import Inferencer
from bagel_ds.inference.loading import open_inferencer
from bagel_ds.model_folder.average import average_or_weights
from bagel_ds.model_folder.folder import ModelFolder

TITLES = {"ema": "EMA", "model": "weights"}


class Models:
    """`names`: the weight files that can be asked for, the default first. Arguments are those of `open_inferencer`.

    The default is loaded at once. With `weights`, nothing else can be asked for. Raises `UserError`.
    """

    def __init__(self, path: Path, weights: str | None = None, **options: Any) -> None:
        self.path, self._options = path, options
        opened = open_inferencer(path, weights=weights, **options)
        default = weights or average_or_weights(path).stem
        alone = weights is not None or options.get("lora")  # an adapter belongs to one of the files
        others = [name for name in TITLES if name != default and not alone and ModelFolder(path).weight_files(name)]
        self.names = (default, *others)
        self._loaded = {default: opened}

    @property
    def default(self) -> Inferencer:
        return self._loaded[self.names[0]]

    def of(self, name: str) -> Inferencer:
        """The model with these weights. Raises `UserError`."""
        if name not in self.names:
            raise UserError(f"weights {name!r}: expected one of {', '.join(self.names)}")
        if name not in self._loaded:
            self._loaded[name] = open_inferencer(self.path, weights=name, **self._options)
        return self._loaded[name]
