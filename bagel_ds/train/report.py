"""The numbers of a logged step, put together over all ranks.

Guarantees: one collective exchange per logged step and none in between; speeds are means since the last logged step;
counters of skipped rows are totals since the start of this process, over all ranks.
"""

from __future__ import annotations

import socket
import time
from collections import Counter
from typing import Sequence

from bagel_ds.data.loader import MicroBatch
from bagel_ds.model.config import BagelConfig
from bagel_ds.train.agreement import everyone
from bagel_ds.train.step import StepResult
from bagel_ds.train.throughput import device_gib, host_gib, pack_flops, peak_tflops


class StepMeter:
    """`add` every step, `read` (on every rank) the steps that are logged."""

    def __init__(self, model: BagelConfig, peak_device_tflops: float):
        self._model, self._peak = model, peak_tflops(peak_device_tflops)
        self._skipped: Counter[str] = Counter()
        self._restart()

    def _restart(self) -> None:
        self._began = time.monotonic()
        self._steps, self._tokens, self._flops = 0, 0, 0.0
        self._window: Sequence[MicroBatch] = ()

    def add(self, window: Sequence[MicroBatch], result: StepResult) -> None:
        self._steps += 1
        self._tokens += result.tokens
        self._flops += sum(pack_flops(micro.batch, self._model) for micro in window)
        self._skipped.update(dataset for micro in window for dataset, _ in micro.batch.skipped)
        self._window = window

    def read(self, rate: float, result: StepResult) -> dict[str, float | None]:
        """Metrics under their public names; None where a step has no such number."""
        seconds = time.monotonic() - self._began
        ranks = everyone((self._flops, device_gib(), host_gib(), socket.gethostname(), dict(self._skipped)))
        values: dict[str, float | None] = {
            "loss/mse": result.mse,
            "loss/ce": result.ce,
            "loss/total": result.total,
            "optim/lr": rate,
            "optim/grad_norm": result.grad_norm,
            "perf/tokens_per_sec": self._tokens / seconds,
            "perf/step_seconds": seconds / self._steps,
        }
        if self._peak is not None:
            flops = sum(flops for flops, *_ in ranks)
            values["perf/mfu"] = flops / seconds / (self._peak * 1e12 * len(ranks))
        values["memory/device_gib"] = max((device for _, device, *_ in ranks if device is not None), default=None)
        hosts: Counter[str] = Counter()
        for _, _, host, name, _ in ranks:
            hosts[name] += host  # type: ignore[assignment]
        values["memory/host_gib"] = max(hosts.values())
        values["data/packing_efficiency"] = sum(micro.efficiency for micro in self._window) / len(self._window)
        values["data/imbalance"] = sum(micro.imbalance for micro in self._window) / len(self._window)
        values.update({f"data/epoch/{name}": epoch for name, epoch in self._window[-1].epochs.items()})
        skipped: Counter[str] = Counter()
        for *_, counts in ranks:
            skipped.update(counts)
        values.update({f"data/skipped/{name}": float(skipped.get(name, 0)) for name in self._window[-1].epochs})
        values.update({f"data/skipped/{name}": float(count) for name, count in skipped.items()})
        self._restart()
        return values
