"""DeepSpeed configuration files: found by path or by a preset's name, and read.

Guarantees: presets are found in a wheel and in an editable checkout alike; a name that is neither a file nor a preset
is one message that lists the presets.
"""

from __future__ import annotations

import difflib
from pathlib import Path

import bagel_ds
from bagel_ds.config_files import Document, read_json
from bagel_ds.errors import UserError


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
    presets = sorted(preset.stem for preset in ds_configs_folder().glob("*.json"))
    meant = difflib.get_close_matches(path.name.removesuffix(".json"), presets, n=1)
    raise UserError(
        f"--ds_config {name_or_path}: no such file, and no preset of that name"
        f"{f' (did you mean {meant[0]}?)' if meant else ''}; the presets are: {', '.join(presets)}"
    )


def read_ds_config(path: Path) -> Document:
    """The file's content, a JSON object. Raises UserError."""
    try:
        document = read_json(path)
    except UserError as fault:
        raise UserError(f"--ds_config: {fault}") from None
    if not isinstance(document.content, dict):
        raise UserError(f"--ds_config {path}: expected a JSON object, found {document.content!r:.60}; correct the file")
    return document
