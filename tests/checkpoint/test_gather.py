"""Pieces of weights -> one file, in chunks of any size, with the bits of the pieces."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bagel_ds.checkpoint import gather
from bagel_ds.ranges import Pieces, Range, TensorInfo
from tests.checkpoint.written import export_tensors

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("process_group")


def cut(name: str, tensor: torch.Tensor, *places: int) -> Pieces:
    """A tensor as ranges that begin at `places`."""
    flat = tensor.flatten()
    edges = [0, *places, flat.numel()]
    ranges = [(Range(name, low, high - low), flat[low:high]) for low, high in zip(edges, edges[1:])]
    return Pieces(name, ranges)


@pytest.mark.parametrize("chunk", [4, 12, 64, 2**26])
@pytest.mark.parametrize("places", [(), (1,), (3, 17), (10, 11, 12, 39)])
def test_the_file_holds_the_pieces_bits(
    chunk: int, places: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gather, "CHUNK_BYTES", chunk)
    tensor = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    tensor[0, :3] = torch.tensor([-0.0, float("nan"), 1e-40])
    infos = {"a": TensorInfo(torch.float32, (5, 8)), "b": TensorInfo(torch.float32, (2,))}
    pieces = [cut("a", tensor, *places), cut("b", torch.ones(2))]
    export_tensors(tmp_path / "x.safetensors", infos, pieces, CPU)
    loaded = load_file(tmp_path / "x.safetensors")
    assert torch.equal(loaded["a"].view(torch.int32), tensor.view(torch.int32))
    assert loaded["b"].tolist() == [1, 1]


def test_masters_are_rounded_to_the_files_dtype(tmp_path: Path) -> None:
    tensor = torch.randn(33, generator=torch.Generator().manual_seed(1))
    infos = {"a": TensorInfo(torch.bfloat16, (3, 11))}
    export_tensors(tmp_path / "x.safetensors", infos, [cut("a", tensor, 7)], CPU)
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], tensor.bfloat16().view(3, 11))


def test_pieces_may_come_in_any_order_and_names_too(tmp_path: Path) -> None:
    tensor = torch.arange(6.0)
    backwards = Pieces("a", list(reversed(cut("a", tensor, 2, 4).ranges)))
    infos = {"a": TensorInfo(torch.float32, (6,)), "b": TensorInfo(torch.float32, (1,))}
    export_tensors(tmp_path / "x.safetensors", infos, [cut("b", torch.ones(1)), backwards], CPU)
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], tensor)


def test_a_tensor_that_nobody_offers_is_an_error(tmp_path: Path) -> None:
    infos = {"a": TensorInfo(torch.float32, (6,)), "b": TensorInfo(torch.float32, (1,))}
    with pytest.raises(AssertionError, match="no rank offered .'a'."):
        export_tensors(tmp_path / "x.safetensors", infos, [cut("b", torch.ones(1))], CPU)
