"""Differences between a resumed run and the run that saved its training state: arguments, versions, data.

Guarantees: every difference is listed with its old and new value. The old values are in the checkpoint's trainer.json;
what an older version didn't save is left out. Data are compared by content, not by path.
"""

from __future__ import annotations

from dataclasses import asdict
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any, Mapping

import bagel_ds
from bagel_ds.arguments.options import all_options
from bagel_ds.data.batches.loader import PlannedData
from bagel_ds.data.samples.images import ImageTransform

# They only say where a run starts.
_ABOUT_THE_START = {"auto_resume", "start_anew", "resume_from", "resume_model_only", "finetune_from_hf"}
_MISSING = "(none)"
_TOKENIZER = "tokenizer files"  # "tokenizer", in older trainer.json files, depended on the version of a library


def versions() -> dict[str, str]:
    """Versions of the packages that compute."""
    return {"bagel_ds": bagel_ds.__version__, **{name: version(name) for name in ("torch", "deepspeed")}}


def describe_data(data: PlannedData) -> dict[str, str]:
    """What determines the samples of a run, by name; equal for equal data and settings."""
    found = {_TOKENIZER: data.tokenizer.fingerprint}
    for stream in data.streams:
        group = f"data group {stream.name}"
        found[f"{group}, weight"] = f"{stream.weight:g}{' (mandatory)' if stream.is_mandatory else ''}"
        found[f"{group}, images"] = f"VAE {_words(stream.vae_transform)}, ViT {_words(stream.vit_transform)}"
        for dataset in stream.datasets:
            indexes = [use.index for use in stream.uses if use.dataset == dataset]
            digest = blake2b("\n".join(index.digest for index in indexes).encode(), digest_size=4).hexdigest()
            rows = sum(index.rows for index in indexes)
            found[f"{group}, dataset {dataset}"] = f"{rows:,} rows in {len(indexes)} files ({digest})"
    return found


def _words(transform: ImageTransform | None) -> str:
    """Its values, by name, in the words that trainer.json files hold."""
    if transform is None:
        return "None"
    return f"ImageTransform({', '.join(f'{name}={value}' for name, value in asdict(transform).items())})"


def changes(saved: Mapping[str, Any], arguments: Mapping[str, Any], data: Mapping[str, str]) -> list[str]:
    """`name: old -> new` for every difference between a trainer.json and this run."""
    defaults = {name: field.default for name, field in all_options().items()}
    before = {**defaults, **saved.get("arguments", {})}
    lines = [
        f"--{name}: {before[name]} -> {value}"
        for name, value in arguments.items()
        if name not in _ABOUT_THE_START and before[name] != value
    ]
    return (
        lines
        + _differences(saved.get("versions", {}), versions())
        + _differences(_known(saved.get("data", {}), data), data)
    )


def _known(saved: Mapping[str, str], data: Mapping[str, str]) -> dict[str, str]:
    """What was saved, with this run's tokenizer where an older version saved none that can be compared."""
    kept = {name: value for name, value in saved.items() if name != "tokenizer"}
    return {_TOKENIZER: data[_TOKENIZER], **kept} if kept else {}


def _differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    if not before:  # saved by an older version
        return []
    names = [*before, *(name for name in now if name not in before)]
    return [
        f"{name}: {before.get(name, _MISSING)} -> {now.get(name, _MISSING)}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def keep_config(results_dir: Path, text: str) -> None:
    """Write config.yaml. A different one of an earlier start is renamed to config_1.yaml, config_2.yaml, ..."""
    path = results_dir / "config.yaml"
    if path.exists() and path.read_text() != text:
        number = 1
        while (aside := path.with_name(f"config_{number}.yaml")).exists():
            number += 1
        path.rename(aside)
    path.write_text(text)
