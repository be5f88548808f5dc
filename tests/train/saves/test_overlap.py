"""Saves begin after a step and finish before the next update; one that fails costs only itself."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from bagel_ds.checkpoint.step_folders import checksum_fault, manifest_fault, newest_state, state_files, step_folders
from bagel_ds.train.process.stall import StallWatch
from bagel_ds.train.saves import save as save_module
from bagel_ds.train.saves.overlap import OverlappedSaves
from bagel_ds.train.saves.save import SaveFault, SaveOptions
from bagel_ds.zero.partitions import MASTER
from tests.train.saves.one_rank_engine import Average, Engine, names, trainer_state

pytestmark = pytest.mark.usefixtures("one_rank")


class Run:
    """One rank's engine, its average and its saves."""

    def __init__(self, options: SaveOptions, watch: StallWatch, states_move: str | None = None) -> None:
        self.engine, self.folder = Engine(), options.checkpoint_dir
        self.engine.states_move = states_move
        engine: Any = self.engine
        average: Any = Average(self.engine)
        self.saves = OverlappedSaves(options, engine, average, watch, save_every=5)

    def save(self, step: int) -> None:
        self.saves.begin(step, trainer_state(step), last=False)

    def save_now(self, step: int) -> None:
        self.saves.save_now(step, trainer_state(step), last=False)

    def update(self) -> None:
        self.saves.finish()
        self.engine.partitions.flats[MASTER] += 100


@pytest.fixture
def notes(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the log says of saves that are complete."""
    caplog.set_level(logging.INFO, "bagel_ds")
    logging.getLogger("bagel_ds").propagate = True
    return lambda: [message for message in caplog.messages if message.startswith("saved ")]


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[StallWatch]:
    with closing(StallWatch(tmp_path / "watched", 0, 1, timeout=0)) as found:
        yield found


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The states are written once this is set."""
    opened, fill = threading.Event(), save_module.state_files.fill_rank

    def waiting(*arguments: Any) -> None:
        assert opened.wait(60)
        fill(*arguments)

    monkeypatch.setattr(save_module.state_files, "fill_rank", waiting)
    return opened


def test_a_save_is_complete_before_the_next_update_and_holds_what_was_there_when_it_began(
    options: SaveOptions, watch: StallWatch, gate: threading.Event, notes: Callable[[], list[str]]
) -> None:
    run = Run(options, watch)
    before = run.engine.partitions.flats[MASTER].clone()
    run.save(1)
    assert step_folders(run.folder) == [] and notes() == [], "the caller goes on while it is written"
    threading.Timer(0.2, gate.set).start()
    run.update()
    assert load_file(run.folder / "step_1" / "state" / "rank_00000.safetensors")["master/trains"].equal(before)
    assert newest_state(run.folder) == run.folder / "step_1"
    assert manifest_fault(run.folder / "step_1") is None
    assert checksum_fault(run.folder / "step_1", state_files(run.folder / "step_1")) is None
    (note,) = notes()
    seconds = re.fullmatch(rf"saved {run.folder}/step_1 in (.*) s; training waited (.*) s", note)
    assert seconds is not None and float(seconds[2]) <= float(seconds[1])
    run.update()
    assert len(notes()) == 1, "reported once"


def test_a_save_of_the_last_step_is_complete_at_once(options: SaveOptions, watch: StallWatch) -> None:
    run = Run(options, watch)
    run.save_now(1)
    assert newest_state(run.folder) == run.folder / "step_1"


def test_states_that_move_are_read_before_training_goes_on(
    options: SaveOptions, watch: StallWatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "bagel_ds")
    logging.getLogger("bagel_ds").propagate = True
    run = Run(options, watch, states_move="they are on a disk")
    assert "they read the states before training goes on" in caplog.text and "they are on a disk" in caplog.text
    before = run.engine.partitions.flats[MASTER].clone()
    run.save(1)
    run.engine.partitions.flats[MASTER] += 1  # as a swap buffer would
    run.update()
    assert load_file(run.folder / "step_1" / "state" / "rank_00000.safetensors")["master/trains"].equal(before)


@pytest.mark.parametrize("place", ["fill_rank", "copyfile"])
def test_a_disk_that_fails_under_a_save_costs_only_that_save(
    place: str,
    options: SaveOptions,
    watch: StallWatch,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    logging.getLogger("bagel_ds").propagate = True
    run = Run(options, watch)
    run.save(1)
    run.update()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "the file")

    with monkeypatch.context() as patched:
        patched.setattr(save_module.state_files if place == "fill_rank" else save_module.shutil, place, full)
        run.save(2)
        run.update()
        assert "step_2 could not be saved: the file: No space left on device" in caplog.text
        assert "Training goes on; the next attempt is in 5 steps" in caplog.text
        assert names(run.folder) == ["latest", "step_1"]
        with pytest.raises(SaveFault, match="No space left"):
            run.save_now(3)
        assert names(run.folder) == ["latest", "step_1"]
    run.save(3)
    run.update()
    assert newest_state(run.folder) == run.folder / "step_3"


def test_a_run_that_ends_by_an_error_leaves_the_save_under_way_unfinished(
    options: SaveOptions, watch: StallWatch, gate: threading.Event
) -> None:
    run = Run(options, watch)
    run.save(1)
    threading.Timer(0.2, gate.set).start()
    run.saves.close()
    assert names(run.folder) == [".unfinished-step_1"]
    run.saves.close()


def test_an_update_that_does_not_finish_the_save_before_is_found(options: SaveOptions, watch: StallWatch) -> None:
    run = Run(options, watch)
    run.save(1)
    with pytest.raises(AssertionError, match="without `finish`"):
        run.save(2)
    run.saves.close()


def test_waiting_for_a_save_is_a_phase_of_its_own(
    options: SaveOptions, watch: StallWatch, gate: threading.Event
) -> None:
    run = Run(options, watch)
    seen: list[tuple[int, str]] = []
    run.save(1)

    def look() -> None:
        seen.append(watch._place)
        gate.set()

    threading.Timer(0.2, look).start()
    with watch.phase(7, "step"):
        run.saves.finish()
        seen.append(watch._place)
    assert seen == [(7, "save"), (7, "step")]
