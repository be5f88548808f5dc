"""The swapping of an optimizer step beside the drive's own rate, in one run.

One command: `python bench/nvme_step.py [--nvme_path DIR] [--elements N] [--json]`. One CPU process trains a network of
tables with the optimizer on NVMe (zero3_nvme). After each step it copies as many bytes as the step moved between two
files in the same folder: sequential requests of 8 MiB past the page cache, as many reads and writes as in the step.
Ratios are the copy's time over the step's: 1 is a step that takes as long as the bare copy. "swapping" counts the time
in which the step waits for the drive, "step" also the optimizer's arithmetic in between. With `--deepspeed_op` the same
is measured with DeepSpeed's own async_io op, at sizes where it is right; it is compiled at first use and needs
libaio-dev.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, NamedTuple
from unittest import mock

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))  # also where the package is not installed
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: E402
import torch  # noqa: E402

from bagel_ds.arguments.run_config import make_config  # noqa: E402
from bagel_ds.units import GIB, MIB  # noqa: E402
from bagel_ds.zero import engine as engine_module  # noqa: E402
from bagel_ds.zero.config.resolve import resolve_ds_config  # noqa: E402
from bagel_ds.zero.engine import AdamOptions, ZeroEngine  # noqa: E402
from bagel_ds.zero.swap_folders import sweep_folders  # noqa: E402
from bench.random_tables import RandomSource, Tables  # noqa: E402

REQUEST = 8 * MIB
TABLE = 4 * MIB  # elements of one table: 16 MiB, a multiple of every alignment


class Step(NamedTuple):
    """Seconds and bytes of backward and update of one step."""

    seconds: float
    waiting: float  # for the drive
    read: int
    written: int


class Meter:
    """Counts what passes through a handle class and how long its callers wait."""

    def __init__(self, handle: Any):
        self.read = self.written = 0
        self.waiting = 0.0
        self._patches = [
            mock.patch.object(handle, "async_pread", self._counted(handle.async_pread, "read")),
            mock.patch.object(handle, "async_pwrite", self._counted(handle.async_pwrite, "written")),
            mock.patch.object(handle, "wait", self._timed(handle.wait)),
        ]

    def __enter__(self) -> Meter:
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in self._patches:
            patch.stop()

    def _counted(self, call: Callable[..., int], what: str) -> Callable[..., int]:
        def counted(handle: Any, tensor: torch.Tensor, path: str, offset: int) -> int:
            setattr(self, what, getattr(self, what) + tensor.nbytes)
            return call(handle, tensor, path, offset)

        return counted

    def _timed(self, call: Callable[..., int]) -> Callable[..., int]:
        def timed(handle: Any) -> int:
            begin = time.perf_counter()
            try:
                return call(handle)
            finally:
                self.waiting += time.perf_counter() - begin

        return timed


def train(elements: int, folder: Path, steps: int, between: Callable[[Step], None]) -> None:
    """Train under zero3_nvme; `between` is called after every step but the first, which makes the files."""
    sizes = [TABLE] * max(1, elements // TABLE)
    run = make_config({"precision": "bf16", "nvme_path": str(folder)})
    ds_config, _ = resolve_ds_config("zero3_nvme", run, 1)
    engine = ZeroEngine(lambda: Tables(sizes), lambda name: True, ds_config)
    engine.start(RandomSource(sizes), AdamOptions())
    handle = type(engine.partitions._optimizer.optimizer_swapper.aio_handle)
    for step in range(steps + 2):
        loss = engine.forward(step)
        with Meter(handle) as meter:
            begin = time.perf_counter()
            engine.backward(loss)
            engine.update(1e-4)
            seconds = time.perf_counter() - begin
        if step >= 2:  # the first writes moments for the first time, the second reads them for the first time
            between(Step(seconds, meter.waiting, meter.read, meter.written))
    engine.close()
    sweep_folders(str(folder))


def copy_seconds(folder: Path, read: int, written: int) -> float:
    """A plain copy: as many bytes read from one file and written to another, one request after the other."""
    buffer = mmap.mmap(-1, REQUEST)
    source, target = folder / "source.bin", folder / "target.bin"
    size = max(read, written)
    if not source.exists():
        for path in (source, target):
            _through(path, os.O_RDWR | os.O_CREAT, os.pwritev, buffer, size)
    begin = time.perf_counter()
    _through(source, os.O_RDONLY, os.preadv, buffer, read)
    _through(target, os.O_RDWR, os.pwritev, buffer, written)
    return time.perf_counter() - begin


def _through(path: Path, flags: int, call: Callable[..., int], buffer: mmap.mmap, nbytes: int) -> None:
    descriptor = os.open(path, flags | os.O_DIRECT, 0o600)
    try:
        for position in range(0, nbytes, REQUEST):
            assert call(descriptor, [buffer], position) == REQUEST
    finally:
        os.close(descriptor)


def measure(elements: int, folder: Path, steps: int, ours: bool) -> dict[str, float]:
    """Medians over the steps, each beside a copy of its own bytes right after it."""
    found: list[tuple[Step, float]] = []

    def beside(step: Step) -> None:
        found.append((step, copy_seconds(folder, step.read, step.written)))

    not_ours = mock.patch.object(engine_module, "use_checked_swapping", _use_deepspeeds_op)
    if ours:
        train(elements, folder, steps, beside)
    else:
        with not_ours:
            train(elements, folder, steps, beside)
    for name in ("source.bin", "target.bin"):
        (folder / name).unlink(missing_ok=True)
    return {
        "read_gib": found[0][0].read / GIB,
        "written_gib": found[0][0].written / GIB,
        "step_seconds": statistics.median(step.seconds for step, _ in found),
        "waiting_seconds": statistics.median(step.waiting for step, _ in found),
        "copy_seconds": statistics.median(copy for _, copy in found),
        "swapping": statistics.median(copy / step.waiting for step, copy in found),
        "step": statistics.median(copy / step.seconds for step, copy in found),
    }


def _use_deepspeeds_op() -> None:
    from deepspeed.ops.op_builder.builder import OpBuilder

    OpBuilder._loaded_ops.pop("async_io", None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvme_path", type=Path, help="folder on the drive to measure (default: a temporary one)")
    parser.add_argument("--elements", type=int, default=64 * MIB, help="parameters of the network (default 67 million)")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--deepspeed_op", action="store_true", help="measure DeepSpeed's own op beside ours")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"})
    os.environ.setdefault("MASTER_PORT", str(20000 + os.getpid() % 20000))
    deepspeed.init_distributed()
    report: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=options.nvme_path, prefix="nvme_step_") as folder:
        report["bagel_ds"] = measure(options.elements, Path(folder), options.steps, ours=True)
        if options.deepspeed_op:
            report["DeepSpeed's op"] = measure(options.elements, Path(folder), options.steps, ours=False)
    if options.json:
        print(json.dumps(report, indent=1))
        return
    for name, values in report.items():
        print(
            f"{name}: {values['read_gib']:.2f} GiB read and {values['written_gib']:.2f} written in a step; swapping "
            f"runs at {values['swapping']:.2f} of a plain copy's rate ({values['waiting_seconds']:.2f} s, the copy "
            f"{values['copy_seconds']:.2f} s), the whole step with the optimizer's arithmetic at {values['step']:.2f}"
        )


if __name__ == "__main__":
    main()
