"""The weights that are trained are those of the file, to the last bit.

In fp32: after the engine is made, and again after a step whose learning rate is 0 (the first of any warm-up), what is
exported equals the input's bits. A stale fp32 master, written over the loaded weights by DeepSpeed's first step, shows
up here.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bagel_ds.model.embeddings import position_table
from bagel_ds.model.shape.parts import POSITION_TABLES
from tests.distributed.cases import arguments, linked_model
from tests.launch import run_ranks

pytestmark = pytest.mark.distributed

FIRST_EXPORT = Path(__file__).with_name("first_export.py")
PRESETS = ("zero0", "zero1", "zero2", "zero2_cpu", "zero3", "zero3_cpu")


def _exact_model(demo: Path, folder: Path) -> Path:
    """The demo's network with weights that bf16 can't hold: one model.safetensors, another ema.safetensors."""
    model = linked_model(demo / "model", folder, ["ema.safetensors"])
    tensors = load_file(demo / "model" / "ema.safetensors")
    generator = torch.Generator().manual_seed(0)
    for stem in ("model", "ema"):
        changed = {
            name: tensor.float() + 1e-4 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in tensors.items()
        }
        for name in POSITION_TABLES:  # computed, not loaded
            changed[name] = position_table(tensors[name].shape[1], round(len(tensors[name]) ** 0.5))
        changed["llm2vae.bias"][:2] = torch.tensor([-0.0, 1e-40])  # the sign of zero and a denormal are bits, too
        save_file(changed, model / f"{stem}.safetensors")
    return model


@pytest.fixture(scope="module")
def exported(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, `<preset>/checkpoints/step_{0,1}` and `alike/...`, whose average starts at its weights."""
    folder = tmp_path_factory.mktemp("exported")
    model = _exact_model(demo, folder / "model")
    options = {"model_path": model, "precision": "fp32", "warmup_steps": 10, "total_steps": 1}
    cases = [
        {"name": preset, "arguments": arguments(demo, folder / preset, ds_config=preset, **options)}
        for preset in PRESETS
    ]
    alike = arguments(demo, folder / "alike", finetune_from_ema=True, **options)
    (folder / "cases.json").write_text(json.dumps([*cases, {"name": "alike", "arguments": alike}]))
    finished = run_ranks(FIRST_EXPORT, [folder / "cases.json"], ranks=2)
    assert finished.code == 0, finished.output[-6000:]
    return folder


def _assert_same_bits(found: Path, expected: Path, stepped: bool = False) -> None:
    ours, theirs = load_file(found), load_file(expected)
    assert ours.keys() == theirs.keys()
    differing = [name for name in ours if not _same_bits(ours[name], theirs[name], stepped)]
    assert not differing, f"{len(differing)} of {len(ours)} tensors of {found}: {differing[:3]}"


def _same_bits(one: Tensor, other: Tensor, stepped: bool) -> bool:
    """Once `stepped`, Adam has added 0, which makes a -0 a 0 and no other difference."""
    one, other = (one + 0.0, other + 0.0) if stepped else (one, other)
    return one.dtype == other.dtype and torch.equal(one.view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_exported_weights_are_the_files_bits(preset: str, step: int, exported: Path) -> None:
    found = exported / preset / "checkpoints" / f"step_{step}" / "model.safetensors"
    _assert_same_bits(found, exported / "model" / "model.safetensors", stepped=step == 1)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_average_starts_at_the_ema_files_bits(preset: str, exported: Path) -> None:
    found = exported / preset / "checkpoints" / "step_0" / "ema.safetensors"
    _assert_same_bits(found, exported / "model" / "ema.safetensors")


@pytest.mark.parametrize("preset", PRESETS)
def test_the_average_then_moves_towards_the_weights(preset: str, exported: Path) -> None:
    weights, averages = (load_file(exported / "model" / f"{stem}.safetensors") for stem in ("model", "ema"))
    found = load_file(exported / preset / "checkpoints" / "step_1" / "ema.safetensors")
    for name, value in found.items():
        expected = 0.9 * averages[name].double() + 0.1 * weights[name].double()
        assert torch.allclose(value.double(), expected, rtol=1e-6, atol=1e-9), name


def test_an_average_that_starts_at_the_weights_stays_at_their_bits(exported: Path) -> None:
    for step in (0, 1):
        for name in ("model", "ema"):
            found = exported / "alike" / "checkpoints" / f"step_{step}" / f"{name}.safetensors"
            _assert_same_bits(found, exported / "model" / "ema.safetensors", stepped=step == 1)
