"""Weights that are not finite are found while they are read, wherever in a tensor they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bagel_ds.demo import write_demo
from bagel_ds.errors import UserError
from bagel_ds.model_folder.autoencoder import load_vae
from bagel_ds.model_folder.finite import CheckedWeights, first_not_finite
from bagel_ds.model_folder.tensor_files import TensorFiles
from bagel_ds.ranges import Range, copy_range

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 500, 1000])
def test_the_first_bad_element_is_found(dtype: torch.dtype, bad: float, place: int) -> None:
    values = torch.randn(1001).to(dtype)
    values[place] = values[1000] = bad
    assert first_not_finite(values) == place


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_largest_numbers_are_finite(dtype: torch.dtype) -> None:
    """Also many of them, whose sum is not."""
    assert first_not_finite(torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)) is None
    assert first_not_finite(torch.full((1000,), torch.finfo(dtype).min, dtype=dtype)) is None
    assert first_not_finite(torch.empty(0, dtype=dtype)) is None


def _source(tmp_path: Path, **tensors: torch.Tensor) -> CheckedWeights:
    save_file(tensors, tmp_path / "model.safetensors")
    return CheckedWeights(TensorFiles([tmp_path / "model.safetensors"]), str(tmp_path))


def test_only_a_share_that_holds_it_finds_it_and_names_its_place(tmp_path: Path) -> None:
    values = torch.zeros(10, 10)
    values[7, 3] = float("nan")
    source = _source(tmp_path, a=values, b=torch.zeros(3))
    copy_range(torch.empty(50), Range("a", 0, 50), source.read)
    source.check()
    source = _source(tmp_path, a=values, b=torch.zeros(3))
    copy_range(torch.empty(50), Range("a", 50, 50), source.read)
    with pytest.raises(UserError, match=r"tensor a holds nan at element 73\..*earlier checkpoint"):
        source.check()


def test_every_bad_tensor_is_named(tmp_path: Path) -> None:
    source = _source(tmp_path, **{f"w{i}": torch.full((3,), float("inf")) for i in range(6)}, good=torch.ones(2))
    for name in ("good", "w0", "w1", "w2", "w3", "w4", "w5"):
        source.read(name)
    with pytest.raises(UserError, match=r"tensor w0 holds inf at element 0; so do w1, w2, w3, \.\.\. \(5 in all\)"):
        source.check()


def test_after_the_check_nothing_is_looked_at(tmp_path: Path) -> None:
    source = _source(tmp_path, a=torch.full((3,), float("nan")))
    source.check()
    source.read("a")
    source.check()


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("finite")
    write_demo(folder)
    return load_file(folder / "model" / "ae.safetensors")


@pytest.mark.parametrize("name", ["encoder.conv_in.weight", "decoder.conv_out.bias"])
def test_an_autoencoder_is_looked_at_whole(name: str, autoencoder: dict[str, torch.Tensor], tmp_path: Path) -> None:
    spoiled = {key: tensor.clone() for key, tensor in autoencoder.items()}
    spoiled[name].view(-1)[-1] = float("nan")
    save_file(spoiled, tmp_path / "ae.safetensors")
    with pytest.raises(UserError, match=rf"ae\.safetensors: tensor {name} holds nan"):
        load_vae(tmp_path / "ae.safetensors")


def _quantized(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(tensor.shape, dtype=dtype)


@pytest.mark.parametrize(
    "dtype, name",
    [
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
        (torch.int16, "I16"),
        (torch.int32, "I32"),
        (torch.int64, "I64"),
        (torch.bool, "BOOL"),
    ],
)
def test_numbers_that_cannot_be_trained_are_named_as_what_they_are(
    dtype: torch.dtype, name: str, autoencoder: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    changed = {"encoder.conv_in.weight": _quantized(autoencoder["encoder.conv_in.weight"], dtype)}
    save_file(autoencoder | changed, tmp_path / "ae.safetensors")
    with pytest.raises(UserError) as caught:
        load_vae(tmp_path / "ae.safetensors")
    message = str(caught.value)
    assert f"ae.safetensors: tensor encoder.conv_in.weight is stored as {name}. Quantized weights can't" in message
    assert "damaged" not in message and "again" not in message


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16])
def test_other_floats_are_read(dtype: torch.dtype, autoencoder: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file({key: tensor.to(dtype) for key, tensor in autoencoder.items()}, tmp_path / "ae.safetensors")
    load_vae(tmp_path / "ae.safetensors")


def test_a_format_that_torch_does_not_know_is_named_too(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F4","shape":[4],"data_offsets":[0,2]}}'
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(UserError, match="tensor a is stored as F4. Quantized"):
        TensorFiles([tmp_path / "x.safetensors"])
