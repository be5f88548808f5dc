"""Three ranks gather in threads, with something going wrong in each part; started by test_gather.py.

`python gathering.py FOLDER`, on every rank with the launcher's variables. Rank 0 writes FOLDER/<part>.safetensors, and
every rank what it met to FOLDER/rank_<rank>.json: by part, the error of its `collect` or None. The masters are on the
device that BAGEL_TEST_DEVICE names.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from bagel_ds.checkpoint import gather
from bagel_ds.checkpoint.gather import Gathering
from bagel_ds.model_folder.tensor_files import TensorFiles, TensorFileWriter
from bagel_ds.ranges import Pieces, Range, TensorInfo

RANKS = 3
DEVICE = torch.device(os.environ.get("BAGEL_TEST_DEVICE", "cpu"))
PATIENCE = 120.0
SHAPES = {"large": (301, 333), "seven": (7,), "nothing": (0, 4), "one": (1,), "table": (64, 65)}
INFOS = {name: TensorInfo(torch.bfloat16, shape) for name, shape in SHAPES.items()}


def whole(name: str) -> torch.Tensor:
    """Masters of a tensor, flat, with values that sums would change."""
    values = torch.randn(INFOS[name].numel, generator=torch.Generator().manual_seed(len(name)))
    values[:3] = torch.tensor([-0.0, float("inf"), 1e-40])[: len(values)]
    return values


def held(rank: int) -> Iterator[Pieces]:
    """A rank's share: two ranges of the large tensor, one of others; "seven" is on rank 2, "one" on rank 1."""
    owners = {"seven": 2, "one": 1}
    for name in SHAPES:
        flat = whole(name).to(DEVICE)
        parts = 2 * RANKS if name == "large" else RANKS
        edges = [len(flat) * part // parts for part in range(parts + 1)]
        mine = [(edges[part], edges[part + 1]) for part in range(rank, parts, RANKS)]
        if name in owners:
            mine = [(0, len(flat))] if rank == owners[name] else []
        yield Pieces(name, [(Range(name, low, high - low), flat[low:high]) for low, high in mine if low < high])


class Part:
    """One gathering of all ranks, each in a thread."""

    def __init__(self, folder: Path, name: str, gathering: Gathering):
        self.path, self.gathering, self.error = folder / f"{name}.safetensors", gathering, None
        self.thread: threading.Thread | None = None
        self.sums: dict[str, int] | None = None

    def start(self, pieces: Iterable[Pieces], full: bool = False) -> None:
        self.thread = threading.Thread(target=self._run, args=(pieces, full))
        self.thread.start()

    def _run(self, pieces: Iterable[Pieces], full: bool) -> None:
        try:
            with TensorFileWriter(self.path, INFOS) if dist.get_rank() == 0 else nullcontext() as writer:
                refused = mock.patch.object(TensorFileWriter, "write", side_effect=OSError(28, "full"))
                with refused if full else nullcontext():
                    self.gathering.collect(writer, INFOS, pieces)
                self.sums = None if writer is None else writer.checksums
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"

    def end(self) -> str | None:
        assert self.thread is not None
        self.thread.join(PATIENCE)
        return "it hangs" if self.thread.is_alive() else self.error


def beside_other_calls(folder: Path, gathering: Gathering) -> str | None:
    """Every rank keeps half of its pieces back until its main thread has summed over all ranks twenty times."""
    part, computed = Part(folder, "beside", gathering), threading.Event()

    def late(pieces: Iterable[Pieces]) -> Iterator[Pieces]:
        for number, piece in enumerate(pieces):
            if number == len(SHAPES) // 2:
                assert computed.wait(PATIENCE)
            yield piece

    part.start(late(held(dist.get_rank())))
    for _ in range(20):
        ones = torch.ones(1000)
        dist.all_reduce(ones)
        assert ones.eq(RANKS).all()
    computed.set()
    return part.end()


def full_disk(folder: Path, gathering: Gathering) -> str | None:
    part = Part(folder, "full", gathering)
    part.start(held(dist.get_rank()), full=True)
    return part.end()


def broken_rank(folder: Path, gathering: Gathering) -> str | None:
    def broken() -> Iterator[Pieces]:
        yield next(held(1))
        raise ArithmeticError("rank 1 fails")

    part = Part(folder, "broken", gathering)
    part.start(broken() if dist.get_rank() == 1 else held(dist.get_rank()))
    return part.end()


def once_more(folder: Path, gathering: Gathering) -> str | None:
    part = Part(folder, "again", gathering)
    part.start(held(dist.get_rank()))
    error = part.end()
    if part.sums is not None:
        files = TensorFiles([part.path])
        assert part.sums == {name: files.checksum(name) for name in INFOS}, "every tensor has one"
    return error


def given_up(first: bool) -> Callable[[Path, Gathering], str | None]:
    """Rank 0, or the others, gather with nobody and close; the rest come when that is over, and find it closed."""

    def run(folder: Path, gathering: Gathering) -> str | None:
        alone = (dist.get_rank() == 0) == first
        part = Part(folder, "given_up", gathering)
        if alone:
            part.start(held(dist.get_rank()))
            part.thread.join(0.5)  # type: ignore[union-attr]
            waits = part.thread.is_alive()  # type: ignore[union-attr]
            gathering.close()
            found = part.end()
            assert waits, found
        dist.barrier()
        if not alone:
            part.start(held(dist.get_rank()))
            found = part.end()
        return found

    return run


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    gather.CHUNK_BYTES = gather._LEAST_BYTES = 4096  # many frames
    gathering, met = Gathering(DEVICE), {}
    for part in (beside_other_calls, full_disk, broken_rank, once_more):
        met[part.__name__] = part(folder, gathering)
        dist.barrier()
    for name, first in (("rank 0 gives up", True), ("others give up", False)):
        met[name] = given_up(first)(folder, Gathering(DEVICE))
        dist.barrier()
    (folder / f"rank_{dist.get_rank()}.json").write_text(json.dumps(met))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
