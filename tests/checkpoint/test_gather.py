"""Pieces of weights -> one file, in chunks of any size, with the bits of the pieces, whatever else ranks do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bagel_ds.checkpoint import gather
from bagel_ds.ranges import Pieces, Range, TensorInfo
from tests.checkpoint import gathering
from tests.checkpoint.written import export_tensors
from tests.launch import run_ranks

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
    with pytest.raises(AssertionError, match="not offered once: .'a'."):
        export_tensors(tmp_path / "x.safetensors", infos, [cut("b", torch.ones(1))], CPU)


# ---------------------------------------------------------------------------------------------------- several ranks
@pytest.fixture(scope="module")
def met(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str | None]]]:
    """What three ranks wrote, and what each met (gathering.py)."""
    folder = tmp_path_factory.mktemp("gathering")
    ran = run_ranks(Path(gathering.__file__), [folder], ranks=gathering.RANKS, timeout=300)
    assert ran.code == 0, ran.output
    return folder, [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(gathering.RANKS)]


@pytest.mark.parametrize("part", ["beside", "again"])
def test_ranks_gather_in_the_background_what_the_file_of_one_would_hold(part: str, met: Any) -> None:
    """The threads can't end before the main threads have summed over all ranks."""
    folder, ranks = met
    assert [rank["beside_other_calls"] for rank in ranks] == [rank["once_more"] for rank in ranks] == [None] * 3
    loaded = load_file(folder / f"{part}.safetensors")
    assert set(loaded) == set(gathering.SHAPES)
    for name, shape in gathering.SHAPES.items():
        expected = gathering.whole(name).bfloat16().view(shape)
        assert torch.equal(loaded[name].view(torch.int16), expected.view(torch.int16)), name


def test_a_full_disk_on_rank_0_is_an_error_there_and_no_rank_waits(met: Any) -> None:
    assert [rank["full_disk"] for rank in met[1]] == ["OSError: [Errno 28] full", None, None]


def test_a_rank_that_fails_keeps_no_other_waiting(met: Any) -> None:
    assert [rank["broken_rank"] for rank in met[1]] == [None, "ArithmeticError: rank 1 fails", None]


@pytest.mark.parametrize("part", ["rank 0 gives up", "others give up"])
def test_giving_up_needs_no_other_rank(part: str, met: Any) -> None:
    for rank in met[1]:
        assert str(rank[part]).startswith("RuntimeError: "), rank
