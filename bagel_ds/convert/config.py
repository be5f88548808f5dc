"""The dataset YAML of a conversion, and its entry in dataset_info.yaml beside it.

Guarantees: a dataset_info.yaml that this package did not write, and a dataset YAML that exists, are never overwritten.
Paths are relative, so the folder can be moved. All image sizes are the published ones.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from bagel_ds.config_files import read_text, read_yaml
from bagel_ds.convert.outputs import IMAGES, LINES, Progress, replacing
from bagel_ds.data.formats.registry import SOURCES
from bagel_ds.data.samples.images import ImageTransform
from bagel_ds.errors import UserError

MARK = "# Written by `bagel-ds convert`."
INFO = "dataset_info.yaml"


def check_configs(out: Path, name: str, is_new: bool) -> None:
    """Raise `UserError` before any work if the configs can't be written."""
    info = out / INFO
    if info.exists() and not read_text(info).startswith(MARK):
        raise UserError(f"{info} exists and is not from `bagel-ds convert`; pass another folder as --out")
    config = out / f"{name}.yaml"
    if is_new and config.exists():
        raise UserError(f"{config} exists already; pass another --name or --out, so that nothing is overwritten")


def write_configs(out: Path, name: str, source: str, progress: Progress) -> Path:
    """Write both files; the path of the dataset YAML. One that exists stays as it is, since it may have been edited."""
    group = SOURCES[source].kinds[0]
    _write_info(out, group, name, source, progress)
    path = out / f"{name}.yaml"
    if not path.exists():
        _write(path, f"{MARK} One group; add others beside it (docs/data.md).", {group: _group(name, source)})
    return path


def _write_info(out: Path, group: str, name: str, source: str, progress: Progress) -> None:
    path = out / INFO
    content = read_yaml(path).content if path.exists() else {}
    if not isinstance(content, dict) or not all(isinstance(section, dict) for section in content.values()):
        raise UserError(f"{path} is not a mapping of groups; correct it, or pass another folder as --out")
    entry: dict[str, Any] = {"data_dir": name, "num_files": len(progress.files)}
    if SOURCES[source].jsonl:
        entry = {"data_dir": f"{name}/{IMAGES}", "jsonl_path": f"{name}/{LINES}"}
    content.setdefault(group, {})[name] = {**entry, "num_total_samples": progress.usable}
    _write(path, f"{MARK} Paths are relative to this file.", content)


def _group(name: str, source: str) -> dict[str, Any]:
    about = SOURCES[source]
    sizes = {"image_transform_args": about.vae_transform or about.vit_transform}
    if about.vae_transform and about.vit_transform:
        sizes["vit_image_transform_args"] = about.vit_transform
    transforms = {key: _numbers(transform) for key, transform in sizes.items() if transform}
    return {"dataset_names": [name], **transforms, "weight": 1}


def _numbers(transform: ImageTransform) -> dict[str, int]:
    usual = ImageTransform(1, 1, 1).max_pixels
    return {key: value for key, value in asdict(transform).items() if (key, value) != ("max_pixels", usual)}


def _write(path: Path, heading: str, content: dict[str, Any]) -> None:
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    with replacing(path) as file:
        file.write(f"{heading}\n{text}".encode())
