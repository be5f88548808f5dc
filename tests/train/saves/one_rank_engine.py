"""An engine of one rank and its average: what a CheckpointWriter asks of them, with values that tests recognize."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bagel_ds.ranges import MASTER, Pieces, Range
from bagel_ds.zero.partitions import EXP_AVG, EXP_AVG_SQ, Group, PlacedRange, group_pieces


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trains = nn.Parameter(torch.arange(6.0).reshape(2, 3))
        self.table = nn.Parameter(torch.ones(4), requires_grad=False)


class OneGroup:
    """Partitions of one rank that holds everything."""

    def __init__(self, network: Network) -> None:
        count = network.trains.numel()
        self.groups = (Group(0, ("trains",), (PlacedRange(Range("trains", 0, count), 0),)),)
        flat = network.trains.detach().flatten()
        self.flats = {MASTER: flat + 0.5, EXP_AVG: flat * 10, EXP_AVG_SQ: flat * 100}
        self.step = 0

    def load(self, keys: Sequence[str], fill: Callable[[str, Range, Tensor], object]) -> None:
        for held, offset in self.groups[0].ranges:
            for key in keys:
                fill(key, held, self.flats[key].narrow(0, offset, held.numel))

    def set_step(self, step: int) -> None:
        self.step = step

    def pieces(self, key: str) -> Iterator[Pieces]:
        yield from group_pieces(self.groups[0], self.flats[key])


class Engine:
    """What `CheckpointWriter` asks of a ZeroEngine."""

    states_move: str | None = None

    def __init__(self) -> None:
        self.module = Network()
        self.partitions = OneGroup(self.module)
        self.shapes = {"trains": (2, 3), "table": (4,)}
        self.device = torch.device("cpu")


class Average:
    """What `CheckpointWriter` asks of a ShardedEMA."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.values: Tensor = torch.full((6,), 7.0)

    def pieces(self) -> Iterator[Pieces]:
        yield from group_pieces(self.engine.partitions.groups[0], self.values)


def trainer_state(step: int) -> dict[str, Any]:
    return {"steps_done": step, "plan_state": {"packs": 3}, "world_size": 1}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
