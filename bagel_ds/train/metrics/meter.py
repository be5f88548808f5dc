"""The metrics of a logged step, over all ranks.

Guarantees: one collective exchange per logged step and none in between. Speeds are means since the last logged step. A
skipped row counts once, however many epochs and ranks meet it, whether the index or the plan can't use it or its body
is broken; broken ones are named when they are first met.
"""

from __future__ import annotations

import logging
import socket
import time
from collections import Counter
from contextlib import contextmanager
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Sequence

from bagel_ds.data.batches.loader import MicroBatch
from bagel_ds.model.losses.breakdown import LossBreakdown
from bagel_ds.model.shape.config import BagelConfig
from bagel_ds.train.metrics.throughput import DeviceMemory, device_memory, host_gib, pack_flops, peak_tflops
from bagel_ds.train.ranks.agreement import everyone, is_main
from bagel_ds.train.step import StepResult

logger = logging.getLogger("bagel_ds")


class _OfRank(NamedTuple):
    """What a rank tells the others at a logged step."""

    flops: float  # since the last logged step, as is `waited`
    device: DeviceMemory | None
    host_gib: float
    host: str
    waited: float  # seconds, for data
    losses: list[float]  # `WindowLosses.sums`
    breakdown: Any
    newly_broken: dict[str, str]


class StepMeter:
    """`add` every step, `read` (on every rank) the steps that are logged."""

    def __init__(
        self,
        model: BagelConfig,
        peak_device_tflops: float,
        unusable_rows: Callable[[], Mapping[str, int]] = dict,
        breakdown: LossBreakdown | None = None,
    ):
        """`unusable_rows` counts the rows that the index or the plan leaves out, by dataset; `breakdown` names the
        sums in `WindowLosses.breakdown`."""
        self._breakdown = breakdown
        self._model, self._peak, self._unusable_rows = model, peak_tflops(peak_device_tflops), unusable_rows
        self._broken: dict[str, str] = {}  # row and reason -> dataset, on all ranks
        self._newly_broken: dict[str, str] = {}  # met by this rank since the last logged step
        self.device_peak: float | None = None  # GiB that torch reserved, up to the last logged step
        self.host_peak = 0.0
        self.restart()

    def restart(self) -> None:
        """Measure speeds from here on; `read` ends with it."""
        self._began = time.monotonic()
        self._steps, self._tokens, self._flops, self._waited = 0, 0, 0.0, 0.0
        self._window: Sequence[MicroBatch] = ()

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    def add(self, window: Sequence[MicroBatch], result: StepResult) -> None:
        self._steps += 1
        self._tokens += result.tokens
        self._flops += sum(pack_flops(micro.batch, self._model) for micro in window)
        self._newly_broken |= {reason: dataset for micro in window for dataset, reason in micro.batch.skipped}
        self._window = window

    def read(self, rate: float, result: StepResult) -> dict[str, float | None]:
        """Metrics by public name; None for one that this step does not have."""
        losses = result.losses
        mine = _OfRank(
            flops=self._flops,
            device=device_memory(),
            host_gib=host_gib(),
            host=socket.gethostname(),
            waited=self._waited,
            losses=losses.sums.tolist(),
            breakdown=None if losses.breakdown is None else losses.breakdown.tolist(),
            newly_broken=self._newly_broken,
        )
        seconds = time.monotonic() - self._began  # the losses have waited for the device
        ranks: list[_OfRank] = everyone(mine)
        means = result.means([rank.losses for rank in ranks])
        values: dict[str, float | None] = {
            "loss/mse": means.mse,
            "loss/ce": means.ce,
            "loss/total": means.total,
            **({} if self._breakdown is None else self._breakdown.means([rank.breakdown for rank in ranks])),
            "optim/lr": rate,
            "optim/grad_norm": float(result.grad_norm),
            "perf/tokens_per_sec": self._tokens / seconds,
            "perf/step_seconds": seconds / self._steps,
            # A share of time, of the rank that waits longest: the others wait for it.
            "perf/data_wait": max(rank.waited for rank in ranks) / seconds,
        }
        if self._peak is not None:
            flops = sum(rank.flops for rank in ranks)
            values["perf/mfu"] = flops / seconds / (self._peak * 1e12 * len(ranks))
        devices = [rank.device for rank in ranks if rank.device is not None]
        values["memory/device_gib"] = max((device.allocated for device in devices), default=None)
        values["memory/device_reserved_gib"] = max((device.reserved for device in devices), default=None)
        hosts: Counter[str] = Counter()
        for rank in ranks:
            hosts[rank.host] += rank.host_gib  # type: ignore[assignment]
        values["memory/host_gib"] = max(hosts.values())
        self.device_peak = values["memory/device_reserved_gib"]
        self.host_peak = max(self.host_peak, max(hosts.values()))
        values["data/packing_efficiency"] = sum(micro.efficiency for micro in self._window) / len(self._window)
        values["data/imbalance"] = sum(micro.imbalance for micro in self._window) / len(self._window)
        values.update({f"data/epoch/{name}": epoch for name, epoch in self._window[-1].epochs.items()})
        skipped = Counter(self._unusable_rows())
        skipped.update(self._all_broken([rank.newly_broken for rank in ranks]).values())
        names = [*self._window[-1].epochs, *skipped]
        values.update({f"data/skipped/{name}": float(skipped[name]) for name in names})
        self.restart()
        return values

    def _all_broken(self, by_rank: Sequence[Mapping[str, str]]) -> Mapping[str, str]:
        """Every broken row met so far; logs those that no rank had met before."""
        for broken in by_rank:
            for reason, dataset in broken.items():
                if reason not in self._broken:
                    self._broken[reason] = dataset
                    if is_main():
                        logger.warning("skipped: %s", reason)
        self._newly_broken = {}
        return self._broken
