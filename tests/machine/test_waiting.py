"""A long wait is told while it lasts, a short one is not."""

from __future__ import annotations

import logging
import re
import time

import pytest

from bagel_ds.machine import waiting
from bagel_ds.machine.waiting import waiting_for


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("bagel_ds"), "propagate", True)
    caplog.set_level(logging.INFO, "bagel_ds")
    return caplog


def until_said(log: pytest.LogCaptureFixture, lines: int) -> list[str]:
    deadline = time.monotonic() + 60
    while len(log.messages) < lines:
        assert time.monotonic() < deadline, log.messages
        time.sleep(0.01)
    return log.messages


def test_what_is_waited_for_is_said_at_first_then_now_and_again_and_in_the_end(
    log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "FIRST", 0.01)
    monkeypatch.setattr(waiting, "EVERY", 0.01)
    with waiting_for("the compiler", "a minute, once"):
        until_said(log, 3)
    first, second, *_, last = log.messages
    assert re.fullmatch(r"waiting for the compiler \(\d+ s; a minute, once\)", first)
    assert re.fullmatch(r"waiting for the compiler \(\d+ s\)", second)
    assert re.fullmatch(r"waited \d+ s for the compiler", last)


def test_a_wait_that_ends_soon_says_nothing(log: pytest.LogCaptureFixture) -> None:
    assert waiting.FIRST == 10
    with waiting_for("the compiler"):
        time.sleep(0.05)
    with pytest.raises(ZeroDivisionError), waiting_for("the compiler"):
        _ = 1 // 0
    assert log.messages == []


def test_what_is_waited_for_may_change_and_may_be_nothing(
    log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "FIRST", 0.01)
    monkeypatch.setattr(waiting, "EVERY", 0.01)
    hosts = iter(["", "", "b", "a and b"])
    with waiting_for(lambda: next(hosts, "a")):
        until_said(log, 3)
    assert log.messages[0].startswith("waiting for b (") and log.messages[1].startswith("waiting for a and b (")
    assert log.messages[-1].endswith(" s for a")


def test_a_wait_that_is_over_before_another_is_said_to_be_over(
    log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "FIRST", 0.01)
    monkeypatch.setattr(waiting, "EVERY", 0.01)
    hosts = iter(["rank 0", ""])
    with waiting_for(lambda: next(hosts, ""), level=logging.WARNING):
        until_said(log, 2)
        time.sleep(0.05)
    assert [line.split(" (")[0].split(" s ")[-1] for line in log.messages] == ["waiting for rank 0", "for rank 0"]
    assert {record.levelno for record in log.records} == {logging.WARNING}
