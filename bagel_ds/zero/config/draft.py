"""Where DeepSpeed configurations come from, and one on its way from the file to the engine.

Guarantees: a preset is found in a wheel and in an editable checkout alike; an unknown name lists those there are. A
`Draft` collects every fault and remark and raises none. Of what keys mean, only where stage and offload stand is known
here. Needs no deepspeed.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import bagel_ds
from bagel_ds.arguments.run_config import RunConfig
from bagel_ds.config_files import Document, read_json
from bagel_ds.errors import UserError

AUTO = "auto"


def ds_configs_folder() -> Path:
    """Folder of the presets: inside the package in a wheel, beside it in the repository."""
    package = Path(bagel_ds.__file__).parent
    inside = package / "ds_configs"
    return inside if inside.is_dir() else package.parent / "ds_configs"


def find_ds_config(name_or_path: str) -> Path:
    """The file behind a path or a preset's name (with or without .json). Raises UserError listing the presets."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.name == name_or_path:
        for name in (name_or_path, name_or_path + ".json"):
            if (ds_configs_folder() / name).is_file():
                return ds_configs_folder() / name
    presets = ", ".join(sorted(preset.stem for preset in ds_configs_folder().glob("*.json")))
    raise UserError(f"--ds_config {name_or_path}: no such file, and no preset of that name; the presets are: {presets}")


def read_ds_config(path: Path) -> Document:
    """The file's content, a JSON object. Raises UserError."""
    try:
        document = read_json(path)
    except UserError as fault:
        raise UserError(f"--ds_config: {fault}") from None
    if not isinstance(document.content, dict):
        raise UserError(f"--ds_config {path}: expected a JSON object, found {document.content!r:.60}; correct the file")
    return document


def zero_stage(ds: dict[str, Any]) -> int:
    """ZeRO stage 0 to 3 of a resolved configuration."""
    return int(ds.get("zero_optimization", {}).get("stage", 0))


def offload_device(ds: dict[str, Any], part: str) -> str:
    """Where `part` ("optimizer" or "param") of a resolved configuration lives: "none" (the GPU), "cpu" or "nvme"."""
    section = ds.get("zero_optimization", {}).get(f"offload_{part}")
    return str(section.get("device", "none")) if isinstance(section, dict) else "none"


@dataclasses.dataclass
class Draft:
    """A configuration on its way from the file to the engine."""

    ds: dict[str, Any]
    file: str
    config: RunConfig
    world_size: int
    ranks_per_host: int | None = None  # None: all on one host
    faults: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def section(self, *keys: str) -> dict[str, Any]:
        """The mapping at `keys`, made where it is absent; a wrong type there is a fault."""
        here = self.ds
        for key in keys:
            below = here.get(key)
            if below is None or below == AUTO:
                below = here[key] = {}
            if not isinstance(below, dict):
                self.fault(f"{key} must be a mapping, found {below!r:.60}")
                below = here[key] = {}
            here = below
        return here

    def settle(self, path: str, value: Any, says: str, remedy: str) -> None:
        """Fill the key at dotted `path` where it is open; another value than `value` there is a fault.

        `says` tells where `value` comes from, `remedy` what to do; both are parts of the message.
        """
        *parents, key = path.split(".")
        section = self.section(*parents)
        found = section.get(key, AUTO)
        if found == AUTO:
            section[key] = value
        elif not same(found, value):
            self.fault(f'{path} is {json.dumps(found)}, but {says}; write "auto" in the file or {remedy}')

    def fault(self, text: str) -> None:
        self.faults.append(f"ds_config {self.file}: {text}")


def same(found: Any, value: Any) -> bool:
    """Whether a value of the file means `value`: numbers may be written as 1, 1.0, 1e0 or "1"; an open one agrees."""
    if isinstance(value, (list, tuple)):
        is_list = isinstance(found, (list, tuple)) and len(found) == len(value)
        return is_list and all(same(one, other) for one, other in zip(found, value))
    if isinstance(value, bool) or isinstance(found, bool) or not isinstance(value, (int, float)):
        return bool(found == value)
    try:
        return found == AUTO or math.isclose(float(found), value, rel_tol=1e-9)
    except (TypeError, ValueError):
        return False
