"""launch/train.py with something going wrong in it, at a place and moment that a test chooses.

The environment variable BAGEL_TEST_FAULTS holds a JSON list of {at, rank?, step?, do, seconds?, until?, times?,
marker?}: `at` is "index", "load", "data", "worker" (of a launch of its own, before a worker makes a batch), "step",
"save" (files are there, nothing is complete yet), "export" (of a share of the weights), "gather" (of weights from
several hosts), "write" (of the states) or "hosts" (ranks seem to run on several); `do` is "sleep" (for `seconds`, at
most until there is a file `until`), "nan" (in this step's batches), "inf" (a loss that is not finite although its
gradients are), "stop" (SIGSTOP), "kill", "oom", "cap" (the GPU has no memory left, so that torch itself runs out),
"fault" (a `UserError` of this rank), "full" (the disk), "late" (of "write": only when the next update waits for it) or
"nothing"; `marker` is a file made when the place is reached. Without `rank` it happens on every rank, without `step`
and `times` every time. The end of the process group waits for all ranks, as under NCCL. With BAGEL_TEST_HOST the host
of this rank seems to have that name.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bagel_ds.errors import UserError
from bagel_ds.train.main import read_arguments, run_rank
from bagel_ds.train.process.detach import run_detached
from bagel_ds.train.ranks.launcher import Started, started

FAULTS = "BAGEL_TEST_FAULTS"


def main() -> int:
    faults = json.loads(os.environ[FAULTS])
    by = started()
    return run_detached(lambda: _faulty_run(faults, by), by.reports)


def _faulty_run(faults: list[dict[str, Any]], by: Started) -> int:
    if by.launch is not None:
        os.environ.setdefault("RANK", str(by.launch.rank))  # for `_happen`
    import deepspeed
    import torch.distributed as dist

    destroy = deepspeed.comm.destroy_process_group

    def destroy_together() -> None:
        dist.barrier()
        destroy()

    if "BAGEL_TEST_HOST" in os.environ:
        socket.gethostname = lambda: os.environ["BAGEL_TEST_HOST"]
    with going_wrong(faults), _instead(deepspeed.comm, "destroy_process_group", destroy_together):
        return run_rank(read_arguments(), by)


@contextmanager
def going_wrong(faults: list[dict[str, Any]]) -> Iterator[None]:
    """Runs of the trainer in this block meet `faults`."""
    from bagel_ds.checkpoint import gather, state
    from bagel_ds.data.batches import loader
    from bagel_ds.train import prepare, trainer
    from bagel_ds.train import step as step_module
    from bagel_ds.train.saves import background
    from bagel_ds.train.saves import save as save_module
    from tests.distributed.faulty_maker import FaultyMaker

    load, step = trainer.Trainer._load, trainer.Trainer._step
    complete, stream, fill = save_module.Save._complete, state.fill_whole, state.fill_rank
    one_host, collect = trainer.on_one_host, gather.Gathering.collect
    means, open_data = step_module.partial_means, prepare.open_data
    ended_within, waited_for = background.Background.ended_within, threading.Event()

    def faulty_load(self: Any) -> None:
        _happen(faults, "load")
        load(self)

    def faulty_step(self: Any, number: int, window: list[Any], *rest: Any) -> Any:
        done = _happen(faults, "step", number)
        if "nan" in done:
            window[:] = [micro._replace(batch=_not_a_number(micro.batch)) for micro in window]
        if "cap" in done:
            _cap_device_memory()
        if "oom" in done:
            import torch

            with _instead(trainer, "accumulate", _raise(torch.OutOfMemoryError("CUDA out of memory. Tried 9 GiB."))):
                return step(self, number, window, *rest)
        if "inf" in done:
            with _instead(step_module, "partial_means", infinite_means):
                return step(self, number, window, *rest)
        return step(self, number, window, *rest)

    def infinite_means(*arguments: Any) -> Any:
        found = means(*arguments)
        return found._replace(mse=found.mse + math.inf)

    def faulty_complete(self: Any, *arguments: Any) -> None:
        _happen(faults, "save")
        complete(self, *arguments)

    def faulty_stream(*arguments: Any) -> None:
        _happen(faults, "export")
        stream(*arguments)

    def faulty_fill(*arguments: Any) -> None:
        done = _happen(faults, "write")
        if "full" in done:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the disk")
        if "late" in done:
            assert waited_for.wait(300)
            waited_for.clear()
        fill(*arguments)

    def faulty_collect(self: Any, writer: Any, tensors: Any, pieces: Any) -> None:
        done = _happen(faults, "gather")
        if "break" in done:
            pieces = _breaking(pieces)
        if "full" in done and writer is not None:
            full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the disk")
            with _instead(writer, "write", _raise(full)):
                collect(self, writer, tensors, pieces)
            return
        collect(self, writer, tensors, pieces)

    def faulty_open(*arguments: Any) -> Any:
        _happen(faults, "index")
        return open_data(*arguments)

    def faulty_islice(*arguments: Any) -> Any:
        _happen(faults, "data")
        return islice(*arguments)

    def faulty_hosts() -> bool:
        return one_host() and not _happen(faults, "hosts")

    def telling_ended_within(self: Any, seconds: float) -> bool:
        waited_for.set()
        return ended_within(self, seconds)

    with (
        _instead(loader, "BatchMaker", FaultyMaker if FAULTS in os.environ else loader.BatchMaker),
        _instead(prepare, "open_data", faulty_open),
        _instead(trainer, "islice", faulty_islice),
        _instead(trainer.Trainer, "_load", faulty_load),
        _instead(trainer.Trainer, "_step", faulty_step),
        _instead(save_module.Save, "_complete", faulty_complete),
        _instead(gather.Gathering, "collect", faulty_collect),
        _instead(state, "fill_whole", faulty_stream),
        _instead(state, "fill_rank", faulty_fill),
        _instead(trainer, "on_one_host", faulty_hosts),
        _instead(background.Background, "ended_within", telling_ended_within),
    ):
        yield


def _instead(place: Any, name: str, value: Any) -> Any:
    from unittest import mock

    return mock.patch.object(place, name, value)


def _breaking(pieces: Iterable[Any]) -> Iterator[Any]:
    """The first half of `pieces`, and then an error that no other rank has."""
    listed = list(pieces)
    yield from listed[: len(listed) // 2]
    raise ArithmeticError("only this rank fails")


def _raise(error: Exception) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise error

    return call


def _happen(faults: list[dict[str, Any]], at: str, step: int | None = None) -> list[str]:
    """Let happen what is asked for here; what was."""
    done = []
    for fault in faults:
        rank = int(os.environ["RANK"])
        here = fault["at"] == at and fault.get("rank", rank) == rank and fault.get("step", step) == step
        if here and fault.get("times", 1) > 0:
            if "times" in fault:
                fault["times"] -= 1
            if "marker" in fault:
                Path(fault["marker"]).touch()
            if fault["do"] == "sleep":
                _sleep(fault["seconds"], fault.get("until"))
            if fault["do"] == "fault":
                raise UserError("only this rank has a fault")
            if fault["do"] == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if fault["do"] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(fault["do"])
    return done


def _sleep(seconds: float, until: str | None) -> None:
    if until is None:
        time.sleep(seconds)
        return
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not Path(until).exists():
        time.sleep(0.1)


_held: list[Any] = []


def _cap_device_memory() -> None:
    """Leave no room on the GPU. Without a GPU there is nothing to cap, and tests use "oom"."""
    import torch

    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.0)
    for exponent in range(30, 8, -1):  # what is free inside the blocks that torch holds
        try:
            while True:
                _held.append(torch.empty(2**exponent, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            continue


def _not_a_number(batch: Any) -> Any:
    return dataclasses.replace(batch, noise=batch.noise * float("nan"))


if __name__ == "__main__":
    sys.exit(main())
