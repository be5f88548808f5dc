"""The background thread: jobs run in order, failures are raised once all have ended, giving up does not wait."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from bagel_ds.train.saves.background import Background

CPU = torch.device("cpu")


def _raising(error: BaseException) -> Callable[[], None]:
    def job() -> None:
        raise error

    return job


def test_jobs_run_one_after_the_other_while_the_caller_goes_on() -> None:
    background, gate, done = Background(CPU), threading.Event(), []
    background.add(lambda: done.append(("first", gate.wait(60))))
    background.add(lambda: done.append(("second", True)))
    assert done == []
    gate.set()
    background.wait()
    assert done == [("first", True), ("second", True)]


def test_the_first_fault_is_told_and_later_jobs_have_run() -> None:
    background, done = Background(CPU), []
    background.add(_raising(OSError(28, "full")))
    background.add(lambda: done.append(1))
    background.add(_raising(ValueError("later")))
    with pytest.raises(OSError, match="full"):
        background.wait()
    assert done == [1]


def test_what_is_given_up_ends_early_and_begins_nothing_more() -> None:
    background, begun, gate, done = Background(CPU), threading.Event(), threading.Event(), []

    def long() -> None:
        for number in background.until_given_up(range(1000)):
            done.append(number)
            begun.set()
            gate.wait(60)

    background.add(long)
    background.add(lambda: done.append("more"))
    begun.wait(60)
    giving_up = threading.Thread(target=background.give_up)
    giving_up.start()
    while not background._given_up.is_set():
        giving_up.join(0.01)
    gate.set()
    giving_up.join(60)
    assert done == [0]
