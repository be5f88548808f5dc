"""The autoencoder file of a model folder: its own sizes, and what is not a whole autoencoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bagel_ds.errors import UserError
from bagel_ds.model_folder.autoencoder import load_vae
from bagel_ds.model_folder.folder import ModelFolder


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("encoder.conv_in.weight", ()),
        ("encoder.conv_in.weight", (0, 3, 3, 3)),
        ("decoder.conv_in.weight", (4,)),
        ("encoder.down.1.block.0.conv1.weight", (4,)),
    ],
)
def test_an_autoencoder_of_odd_shapes_is_a_message(
    name: str, shape: tuple[int, ...], model: Path, tmp_path: Path
) -> None:
    save_file({**load_file(model / "ae.safetensors"), name: torch.zeros(shape)}, tmp_path / "ae.safetensors")
    with pytest.raises(UserError, match=f"tensor {name} has shape .*, expected 4 dimensions"):
        load_vae(tmp_path / "ae.safetensors")


def test_the_autoencoder_is_read_with_its_own_sizes(model: Path) -> None:
    vae = load_vae(model / "ae.safetensors")
    assert vae.config.z_channels == 16 and vae.config.downsample == 8
    assert not any(parameter.requires_grad for parameter in vae.parameters())


def test_the_encoder_alone_is_read_where_nothing_is_decoded(model: Path) -> None:
    whole, encoder = load_vae(model / "ae.safetensors"), ModelFolder(model).load_vae(decodes=False)
    assert encoder.config == whole.config and not hasattr(encoder, "decoder")
    found = dict(encoder.named_parameters())
    assert found.keys() == {name for name, _ in whole.named_parameters() if name.startswith("encoder.")}
    assert all(torch.equal(found[name], parameter) for name, parameter in whole.encoder.named_parameters("encoder"))
    assert not any(parameter.requires_grad for parameter in found.values())


def test_an_autoencoder_without_its_decoder_is_a_message_also_where_nothing_is_decoded(
    model: Path, tmp_path: Path
) -> None:
    """The file goes into every checkpoint, which is to be a whole model."""
    tensors = load_file(model / "ae.safetensors")
    del tensors["decoder.conv_out.weight"]
    save_file(tensors, tmp_path / "ae.safetensors")
    with pytest.raises(UserError, match="tensor decoder.conv_out.weight is missing"):
        load_vae(tmp_path / "ae.safetensors", decodes=False)


def test_another_file_as_autoencoder_is_a_message(model: Path) -> None:
    with pytest.raises(UserError, match="not the FLUX autoencoder"):
        load_vae(model / "ema.safetensors")
