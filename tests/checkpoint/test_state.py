"""Training state as ranges: what any number of ranks wrote, any other number reads back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from bagel_ds.checkpoint.state import EMA, WEIGHT, Held, StateFiles, rank_file
from bagel_ds.errors import UserError
from bagel_ds.ranges import Pieces, Range
from tests.checkpoint.written import write_rank

SIZES = {"a.weight": 37, "b": 1, "c.weight": 64}
MASTER = "master"


def whole(name: str, kind: str = MASTER) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(name) + 31 * len(kind))
    return torch.rand(SIZES[name], generator=generator)


def shares(name: str, ranks: int) -> list[tuple[int, int]]:
    """(start, numel) of each rank as ZeRO-3 cuts a parameter: ceil(numel / ranks) each, the last ones less or none."""
    per_rank = -(-SIZES[name] // ranks)
    starts = [min(rank * per_rank, SIZES[name]) for rank in range(ranks)]
    return [(start, min(per_rank, SIZES[name] - start)) for start in starts]


def save(folder: Path, ranks: int, kinds: tuple[str, ...] = (MASTER, EMA)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(ranks):
        held, pieces = [], []
        for name in SIZES:
            start, numel = shares(name, ranks)[rank]
            if numel:
                for kind in kinds:
                    held.append(Held(kind, name, start, numel, torch.float32))
                    values = whole(name, kind)[start : start + numel]
                    pieces.append((kind, Pieces(name, [(Range(name, start, numel), values)])))
        write_rank(rank_file(folder, rank), held, pieces)


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[int, StateFiles]:
    folder = tmp_path_factory.mktemp("states")
    for ranks in range(1, 9):
        save(folder / str(ranks), ranks)
    return {ranks: StateFiles(folder / str(ranks)) for ranks in range(1, 9)}


@pytest.mark.parametrize("read_by", range(1, 9))
@pytest.mark.parametrize("written_by", range(1, 9))
def test_any_number_of_ranks_reads_what_any_other_wrote(
    written_by: int, read_by: int, states: dict[int, StateFiles]
) -> None:
    for name in SIZES:
        for kind in (MASTER, EMA):
            for start, numel in shares(name, read_by):
                found = states[written_by].read(kind, name, start, numel)
                assert torch.equal(found, whole(name, kind)[start : start + numel])


@given(ranks=st.integers(1, 8), name=st.sampled_from(sorted(SIZES)), data=st.data())
def test_any_range_is_stitched_from_the_files(
    ranks: int, name: str, data: st.DataObject, states: dict[int, StateFiles]
) -> None:
    start = data.draw(st.integers(0, SIZES[name]))
    numel = data.draw(st.integers(0, SIZES[name] - start))
    assert torch.equal(states[ranks].read(MASTER, name, start, numel), whole(name)[start : start + numel])


def test_files_are_plain_safetensors(tmp_path: Path) -> None:
    save(tmp_path, 2)
    loaded = load_file(rank_file(tmp_path, 1))
    start, numel = shares("c.weight", 2)[1]
    assert torch.equal(loaded["master/c.weight"], whole("c.weight")[start : start + numel])


def test_a_missing_rank_file_is_a_message_that_says_what_is_not_there(tmp_path: Path) -> None:
    save(tmp_path, 3)
    rank_file(tmp_path, 1).unlink()
    with pytest.raises(UserError, match=r"elements 13 to 37 of master/a\.weight .* resume from another"):
        StateFiles(tmp_path).read(MASTER, "a.weight", 0, 37)


def test_a_folder_without_state_is_a_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no rank_"):
        StateFiles(tmp_path)


def test_another_safetensors_file_under_the_name_is_a_message(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2)}, rank_file(tmp_path, 0))
    with pytest.raises(UserError, match="not a training state|another run"):
        StateFiles(tmp_path)


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_smaller_parameter_than_the_stored_one_is_a_message_and_not_its_beginning(ranks: int, tmp_path: Path) -> None:
    save(tmp_path, ranks)
    shapes: dict[str, tuple[int, ...]] = {"a.weight": (37,), "b": (1,), "c.weight": (4, 8)}
    with pytest.raises(UserError, match=r"master/c\.weight has 64 elements, this run's network 32.*max_latent_size"):
        StateFiles(tmp_path).source(shapes, MASTER, WEIGHT)


def test_a_source_takes_the_first_kind_that_is_stored(tmp_path: Path) -> None:
    held = [Held(MASTER, "b", 0, 1, torch.float32), Held(WEIGHT, "c.weight", 0, 64, torch.bfloat16)]
    frozen = whole("c.weight").bfloat16()
    pieces = [
        (MASTER, Pieces("b", [(Range("b", 0, 1), whole("b"))])),
        (WEIGHT, Pieces("c.weight", [(Range("c.weight", 0, 64), frozen)])),
    ]
    write_rank(rank_file(tmp_path, 0), held, pieces)
    shapes = {"b": (1,), "c.weight": (8, 8), "a.weight": (37,)}
    source = StateFiles(tmp_path).source(shapes, MASTER, WEIGHT)
    assert "b" in source and "c.weight" in source and "a.weight" not in source
    assert source.info("c.weight").dtype == torch.bfloat16 and source.info("c.weight").shape == (8, 8)
    assert torch.equal(source.read("c.weight", 8, 8), frozen[8:16])
    assert torch.equal(source.read("b"), whole("b"))
    with pytest.raises(UserError, match=r"master/a\.weight"):
        source.read("a.weight")
