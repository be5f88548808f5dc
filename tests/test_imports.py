"""Imports point down: a package may use those below it and none above, and no two packages use each other."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import bagel_ds
from bagel_ds.arguments.options import all_options
from bagel_ds.zero.config.files import ds_configs_folder

PACKAGE = Path(bagel_ds.__file__).parent

# From the top. A package may import from those after it, at every level of folders.
ROOMS = (
    "cli",
    "web",
    "demo",
    "train",
    "inference",
    "hub",
    "inputs",
    "memory",
    "doctor",
    "convert",
    "data",
    "processes",
    "zero",
    "checkpoint",
    "lora",
    "model_folder",
    "arguments",
    "model",
    "ranges",
    "machine",
    "config_files",
    "git_lfs",
    "regular_files",
    "errors",
    "units",
)
INSIDE = {
    "data": ("inspect", "batches", "streams", "plan", "index", "config", "formats", "samples", "files"),
    "zero": (
        "engine",
        "ema",
        "process_group",
        "shm_buffers",
        "ops",
        "split",
        "partitions",
        "weights",
        "nvme_check",
        "config",
        "swap_patches",
        "swap_io",
        "swap_folders",
    ),
}


def _modules() -> dict[str, Path]:
    """Every module by dotted name below bagel_ds, packages by their `__init__`."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


def _imports(path: Path, modules: dict[str, Path]) -> list[tuple[int, str]]:
    """(line, module) of each import from bagel_ds, also those inside functions and under TYPE_CHECKING."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: imports are absolute here"
            if node.module and node.module.partition(".")[0] == "bagel_ds":
                base = node.module.removeprefix("bagel_ds").removeprefix(".")
                for alias in node.names:
                    full = f"{base}.{alias.name}".removeprefix(".")
                    found.append((node.lineno, full if full in modules else base))
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("bagel_ds.")]
            found += [(node.lineno, name.removeprefix("bagel_ds.")) for name in names]
    return found


MODULES = _modules()
IMPORTS = {name: _imports(path, MODULES) for name, path in MODULES.items()}


def _upward(rooms: tuple[str, ...], inside: str = "") -> list[str]:
    """Imports between `rooms` of package `inside` that point up."""
    faults = []
    prefix = f"{inside}." if inside else ""
    for name, imports in IMPORTS.items():
        own = name.removeprefix(prefix).partition(".")[0]
        if not name.startswith(prefix) or own not in rooms:
            continue
        for line, other in imports:
            used = other.removeprefix(prefix).partition(".")[0]
            if other.startswith(prefix) and used in rooms and rooms.index(used) < rooms.index(own):
                faults.append(f"{MODULES[name].relative_to(PACKAGE)}:{line} imports {other}")
    return faults


def test_every_top_level_package_has_its_place() -> None:
    found = {name.partition(".")[0] for name in MODULES} - {""}
    assert found == set(ROOMS)


def test_no_import_points_up() -> None:
    assert _upward(ROOMS) == []


@pytest.mark.parametrize("package", INSIDE)
def test_no_import_points_up_inside(package: str) -> None:
    found = {name.split(".")[1] for name in MODULES if name.startswith(f"{package}.")}
    assert found == set(INSIDE[package]), "a new folder: give it a place in INSIDE"
    assert _upward(INSIDE[package], package) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    done: set[str] = set()
    for start in MODULES:
        stack: list[tuple[str, tuple[str, ...]]] = [(start, (start,))]
        seen: set[str] = set()
        while stack:
            name, way = stack.pop()
            for _, other in IMPORTS.get(name, ()):
                assert other != start, f"circle: {' -> '.join((*way, other))}"
                if other not in seen and other not in done:
                    seen.add(other)
                    stack.append((other, (*way, other)))
        done.add(start)


def _keys(section: dict[str, Any]) -> Iterator[str]:
    for key, value in section.items():
        yield key
        if isinstance(value, dict):
            yield from _keys(value)


def test_only_zero_knows_deepspeed() -> None:
    """No other module imports it or names a key of its configuration; `ZeroSettings` has the values."""
    presets = [json.loads(path.read_text()) for path in ds_configs_folder().glob("*.json")]
    # Without the plain words ("stage", "device"), and those that are also arguments of the trainer.
    keys = {key for preset in presets for key in _keys(preset) if "_" in key} - set(all_options())
    assert {"zero_optimization", "offload_param", "stage3_max_live_parameters", "zero_hpz_partition_size"} <= keys
    keys -= {"gradient_clipping"}  # another trainer's argument, for which arguments/parse.py suggests ours
    faults = []
    for name, path in MODULES.items():
        if name.partition(".")[0] == "zero":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            found: list[str] = []
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names if alias.name.partition(".")[0] == "deepspeed"]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "deepspeed":
                found = [str(node.module)]
            elif isinstance(node, ast.Constant) and node.value in keys:
                found = [str(node.value)]
            faults += [f"{path.relative_to(PACKAGE)}:{node.lineno} {each}" for each in found]
    assert faults == []


def test_the_picture_in_the_docs_is_this_order() -> None:
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    rooms = [line.split()[0] for line in page.split("```")[1].splitlines() if line[:1].strip()]
    drawn = [name.removesuffix("/").removesuffix(".py") for name in rooms]
    assert drawn == list(ROOMS)
