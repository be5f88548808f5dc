"""Every parameter of the network comes from the folder's files, from a computed table, or as a copy of its twin."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bagel_ds.errors import UserError
from bagel_ds.model.bagel import Bagel
from bagel_ds.model.embeddings import position_table
from bagel_ds.model.shape.config import BagelConfig
from bagel_ds.model.shape.parts import POSITION_TABLES
from bagel_ds.model_folder.folder import ModelFolder
from bagel_ds.model_folder.tensor_files import TensorFiles
from bagel_ds.model_folder.weights import BagelWeights, latent_side


def shapes_of(model: Path, side: int = 64) -> dict[str, tuple[int, ...]]:
    folder = ModelFolder(model)
    config = BagelConfig(llm=folder.llm_config(), vit=folder.vit_config(), max_latent_size=side)
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in Bagel(config).named_parameters()}


def test_prefixed_names_are_shown(model: Path, tmp_path: Path) -> None:
    tensors = load_file(model / "ema.safetensors")
    save_file({f"module.{name}": values for name, values in tensors.items()}, tmp_path / "ema.safetensors")
    with pytest.raises(UserError, match=r"vae2llm.weight is missing \(there is module.vae2llm.weight\)"):
        names = {name: shape for name, shape in shapes_of(model).items() if name.startswith(("vae2llm", "latent"))}
        BagelWeights(ModelFolder(tmp_path).open_weights(True), names, False, "here")


@pytest.mark.parametrize("shape", [(), (15, 2), (0, 2), (2, 2, 2)])
def test_a_latent_table_without_a_side_is_a_message(shape: tuple[int, ...], tmp_path: Path) -> None:
    save_file({"latent_pos_embed.pos_embed": torch.zeros(shape)}, tmp_path / "ema.safetensors")
    with pytest.raises(UserError, match="latent_pos_embed.pos_embed has shape .*, expected a square number of rows"):
        latent_side(ModelFolder(tmp_path).open_weights(True))


def test_weights_are_the_files_and_tables_are_computed(model: Path) -> None:
    shapes = shapes_of(model)
    files = ModelFolder(model).open_weights(True)
    weights = BagelWeights(files, shapes, True, "here")
    assert not weights.unexpected and not weights.copied
    assert set(weights.loaded) | set(POSITION_TABLES) == set(shapes)
    for name in ("llm2vae.weight", "connector.fc1.bias"):
        assert torch.equal(weights.read(name, 3, 9), files.read(name, 3, 9))
    table = position_table(shapes["latent_pos_embed.pos_embed"][1], 64).flatten()
    assert torch.equal(weights.read("latent_pos_embed.pos_embed", 100, 50), table[100:150])
    assert latent_side(files) == 64


def test_the_generation_expert_starts_as_a_copy_where_the_file_has_none(model: Path, tmp_path: Path) -> None:
    files = ModelFolder(model).open_weights(True)
    plain = {name: files.read(name).reshape(files.info(name).shape) for name in files.names if "_moe_gen" not in name}
    save_file(plain, tmp_path / "plain.safetensors")
    shapes = shapes_of(model)
    source = TensorFiles([tmp_path / "plain.safetensors"])
    weights = BagelWeights(source, shapes, True, "plain")
    assert set(weights.copied) == {name for name in shapes if "_moe_gen" in name}
    for name, twin in list(weights.copied.items())[:5]:
        assert torch.equal(weights.read(name), files.read(twin))
    with pytest.raises(UserError, match="_moe_gen.* is missing"):
        BagelWeights(source, shapes, False, "plain")


def test_a_side_that_contradicts_the_file_says_which_to_pass(model: Path) -> None:
    with pytest.raises(UserError, match="max_latent_size=16 .* holds 64x64 positions; pass --max_latent_size 64"):
        BagelWeights(ModelFolder(model).open_weights(True), shapes_of(model, side=16), True, "here")
