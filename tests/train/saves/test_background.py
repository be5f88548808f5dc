"""The background thread: jobs run in order, failures are raised once all have ended, giving up waits for no rank."""

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


def test_giving_up_ends_a_job_that_waits_for_other_ranks() -> None:
    interrupted, waits = threading.Event(), threading.Event()
    background = Background(CPU, interrupted.set)

    def job() -> None:
        waits.set()
        assert interrupted.wait(60)
        raise RuntimeError("the connection is closed")

    background.add(job)
    assert waits.wait(60)
    background.give_up()
    assert interrupted.is_set()


def test_without_a_running_job_giving_up_interrupts_nothing() -> None:
    """Another save may follow, such as after a full disk."""
    interrupted = threading.Event()
    background = Background(CPU, interrupted.set)
    background.add(lambda: None)
    background.wait()
    background.give_up()
    assert not interrupted.is_set()


def test_waiting_a_while_says_whether_all_have_ended() -> None:
    background, gate = Background(CPU), threading.Event()
    background.add(_raising(OSError(28, "full")))
    background.add(lambda: gate.wait(60) and None)
    assert not background.ended_within(0.01)
    gate.set()
    assert background.ended_within(60), "an error of the disk is raised by `wait`, on all ranks together"
    with pytest.raises(OSError, match="full"):
        background.wait()


def test_a_failure_that_other_ranks_do_not_share_is_raised_while_jobs_run() -> None:
    background, gate = Background(CPU), threading.Event()
    background.add(_raising(RuntimeError("connection reset")))
    background.add(lambda: gate.wait(60) and None)
    with pytest.raises(RuntimeError, match="connection reset"):
        while not background.ended_within(0.01):
            pass
    gate.set()
    background.give_up()
