"""Stand-ins for streams and for what makes batches of them, in a module of its own so that workers can import it.

A batch's text ids say which rows it was made of. What the maker's `options` say happens in the process that makes it.
"""

from __future__ import annotations

import dataclasses
import math
import os
import resource
import signal
import time
from dataclasses import dataclass
from typing import Any, Sequence

import torch

from bagel_ds.data.batches.layout import layout
from bagel_ds.data.batches.materialize import PackTask
from bagel_ds.data.samples.sample import TEXT, Entry, SamplePlan
from bagel_ds.data.streams.reader import RowAddress, RowPlace
from bagel_ds.errors import UserError
from bagel_ds.model.batch import CAUSAL, PackedBatch
from bagel_ds.model_folder.tokenizer import SpecialTokens


def odd_batch() -> PackedBatch:
    """Any tensors will do; the two images are one, as where an image is read and drawn."""
    image = torch.arange(3 * 16 * 16, dtype=torch.uint8).reshape(3, 16, 16)
    values: dict[str, Any] = {
        "sample_lens": (4, 3),
        "split_lens": (4, 3),
        "attn_modes": ("causal", "noise"),
        "vit_seqlens": (2,),
        "latent_shapes": ((1, 1), (1, 1)),
        "images": (image, image),
        "samples": ("t2i: a.parquet row group 0 row 1", "edit: b.parquet row group 2 row 3"),
        "skipped": (("vlm", "c.jsonl: cut short"),),
        "timesteps": torch.tensor([-math.inf, 0.25]),
        "noise": torch.full((2, 64), math.nan),
    }
    names = [field.name for field in dataclasses.fields(PackedBatch) if field.name not in values]
    return PackedBatch(**values, **{name: torch.arange(5) for name in names})


@dataclass
class Rows:
    """A stream of rows that nothing is known of but their numbers."""

    name: str = "texts"
    weight: float = 1.0
    is_mandatory: bool = True
    fingerprint: str = "a"
    rows: int = 200
    datasets: tuple[str, ...] = ("one", "two")
    unusable: tuple[str, ...] = ("unreadable",)

    @property
    def rows_fingerprint(self) -> str:
        return self.fingerprint

    @property
    def units(self) -> Sequence[range]:
        return [range(start, start + 10) for start in range(0, self.rows, 10)]

    def plan_sample(self, row: int, epoch: int) -> SamplePlan:
        return SamplePlan(0, epoch, row, (Entry(TEXT, 0, 10 + row % 50, loss=True),))

    def address(self, row: int) -> RowAddress:
        return RowAddress(RowPlace("one", f"/data/{self.name}", 0, row), "", (), 0, 0)


@dataclass
class Maker:
    """In place of `BatchMaker`. `options` may be (what happens, at which of the batches that a process makes)."""

    options: Any
    made: int = 0

    @classmethod
    def of(cls, streams: Any, tokenizer: Any, options: Any, noise_seed: int) -> Maker:
        return cls(options)

    def __call__(self, task: PackTask) -> PackedBatch:
        self.made += 1
        what, at = self.options if isinstance(self.options, tuple) else (self.options, self.made)
        if at == self.made:
            _happen(what)
        lengths = tuple(plan.length for plan in task.plans)
        return empty(
            sample_lens=lengths,
            split_lens=lengths,
            attn_modes=(CAUSAL,) * len(lengths),
            position_ids=torch.arange(sum(lengths)),
            text_ids=torch.tensor([plan.epoch * 1000 + plan.row for plan in task.plans]),
            images=(torch.zeros(3, 512, 512, dtype=torch.uint8),) if what in ("large", "limited") else (),
            samples=(lambda: None,) if what == "unsendable" and at == self.made else (),
        )


def _happen(what: Any) -> None:
    if what == "broken":
        raise RuntimeError("a bug in the worker")
    if what == "refused":
        raise UserError("this data can't be used")
    if what == "signals":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(os.getpid(), number)
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "exits":
        os._exit(3)
    if what == "limited":
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
    if what == "hangs":
        time.sleep(1000)


def empty(**changed: Any) -> PackedBatch:
    """A batch of nothing but what is given."""
    return dataclasses.replace(layout([], SpecialTokens(0, 1, 2, 3, 4)), **changed)
