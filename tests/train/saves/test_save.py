"""Checkpoints are complete or absent, found by number, and give up their state only when asked to."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bagel_ds.checkpoint import state as state_module
from bagel_ds.checkpoint import step_folders as step_folders_module
from bagel_ds.checkpoint.export import export_checkpoint
from bagel_ds.checkpoint.gather import Gathering
from bagel_ds.checkpoint.state import EMA, WEIGHT, StateFiles
from bagel_ds.checkpoint.step_folders import (
    check_share,
    checksum_fault,
    holds_state,
    manifest_fault,
    newest_state,
    read_trainer,
    share_fault,
    state_files,
    step_folders,
    sweep,
    thin_out,
)
from bagel_ds.errors import UserError
from bagel_ds.model_folder.tensor_files import TensorFileWriter
from bagel_ds.train.saves import save as save_module
from bagel_ds.train.saves.save import Save, SaveFault, SaveOptions
from bagel_ds.train.saves.start import damage_of
from bagel_ds.zero.partitions import EXP_AVG, EXP_AVG_SQ
from tests.train.saves.one_rank_engine import Average, Engine, Network, names, trainer_state

pytestmark = pytest.mark.usefixtures("one_rank")


def save(options: SaveOptions, step: int, last: bool = False) -> Path:
    engine: Any = Engine()
    average: Any = Average(engine)
    begun = Save(options, engine, average, step, last)
    begun.begin(trainer_state(step))
    return begun.finish().folder


# ------------------------------------------------------------------------------------------------------ what is saved
@pytest.mark.parametrize("one_host", [True, False])
def test_a_checkpoint_holds_weights_average_state_and_the_model_folder(one_host: bool, options: SaveOptions) -> None:
    gathering = None if one_host else Gathering(torch.device("cpu"))
    folder = save(dataclasses.replace(options, gathering=gathering), 3)
    assert names(folder) == [
        "README.md",
        "ae.safetensors",
        "ema.safetensors",
        "llm_config.json",
        "manifest.json",
        "model.safetensors",
        "state",
        "tokenizer.json",
        "trainer.json",
        "vit_config.json",
    ]
    weights = load_file(folder / "model.safetensors")
    assert torch.equal(weights["trains"], Network().trains.detach() + 0.5), "the masters, not the 16-bit weights"
    assert torch.equal(weights["table"], torch.ones(4))
    assert torch.equal(load_file(folder / "ema.safetensors")["trains"], torch.full((2, 3), 7.0))
    state = StateFiles(folder / "state")
    for kind, factor in ((EXP_AVG, 10), (EXP_AVG_SQ, 100)):
        assert torch.equal(state.read(kind, "trains", 0, 6), torch.arange(6.0) * factor)
    assert state.has(EMA, "trains") and state.has(WEIGHT, "table")
    assert read_trainer(folder) == trainer_state(3)
    assert "`model.safetensors`" in (folder / "README.md").read_text()
    (folder / "README.md").write_text("edited for publication")
    assert manifest_fault(folder) is None and holds_state(folder)
    sums = json.loads((folder / "manifest.json").read_text())["checksums"]
    assert checksum_fault(folder, list(sums)) is None
    assert {name: len(parts) for name, parts in sums.items()} == {
        "model.safetensors": 2,
        "ema.safetensors": 2,
        "state/rank_00000.safetensors": 5,
        "trainer.json": 1,
    }


def test_the_autoencoder_is_not_copied_again(options: SaveOptions, model_folder: Path) -> None:
    assert (save(options, 1) / "ae.safetensors").samefile(model_folder / "ae.safetensors")


def test_the_last_one_is_linked_relatively(options: SaveOptions, tmp_path: Path) -> None:
    save(options, 1)
    assert names(options.checkpoint_dir) == ["latest", "step_1"]
    save(options, 2, last=True)
    assert os.readlink(options.checkpoint_dir / "step_final") == "step_2"
    options.checkpoint_dir.rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "step_final" / "model.safetensors").is_file()
    assert (tmp_path / "moved" / "latest").read_text() == "step_2\n"


def test_a_step_saved_again_replaces_the_first(options: SaveOptions) -> None:
    folder = save(options, 1)
    (folder / "trainer.json").write_text("{}")
    save(options, 1)
    assert read_trainer(folder) == trainer_state(1)
    assert names(options.checkpoint_dir) == ["latest", "step_1"]


def test_older_states_are_given_up_when_asked_and_weights_stay(options: SaveOptions) -> None:
    first = save(options, 1)
    kept = SaveOptions(options.checkpoint_dir, options.model_folder, torch.float32, delete_previous_state=True)
    second = save(kept, 2)
    assert not holds_state(first) and (first / "ema.safetensors").is_file()
    assert manifest_fault(first) is None, "given up on purpose, so not damaged"
    assert holds_state(second) and newest_state(options.checkpoint_dir) == second


# ------------------------------------------------------------------------------------------------ complete or absent
_INTERRUPTED = [
    (save_module.state_files, "fill_rank", 1),
    (save_module.state_files, "fill_whole", 1),
    (save_module.state_files, "fill_whole", 2),
    (step_folders_module, "write_json", 1),
    (step_folders_module, "write_json", 2),
    (step_folders_module, "manifest_fault", 1),
    (step_folders_module, "_flush", 1),
    (step_folders_module, "_flush", 8),
]


@pytest.mark.parametrize(("module", "function", "call"), _INTERRUPTED)
def test_a_save_that_is_interrupted_leaves_the_older_one_the_newest(
    module: Any, function: str, call: int, options: SaveOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = save(options, 1)
    real, calls = getattr(module, function), []

    def killed(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module, function, killed)
        save(options, 2)
    assert newest_state(options.checkpoint_dir) == first
    assert (options.checkpoint_dir / "latest").read_text() == "step_1\n"
    assert [step for step, _ in step_folders(options.checkpoint_dir)] == [1]

    sweep(options.checkpoint_dir)
    assert names(options.checkpoint_dir) == ["latest", "step_1"]
    second = save(options, 2)
    assert newest_state(options.checkpoint_dir) == second


def test_files_that_did_not_reach_the_disk_whole_are_an_error(
    options: SaveOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = step_folders_module.write_json

    def truncating(path: Path, content: dict[str, Any]) -> None:
        real(path, content)
        if path.name == "manifest.json":
            os.truncate(path.parent / "model.safetensors", 10)

    monkeypatch.setattr(step_folders_module, "write_json", truncating)
    with pytest.raises(RuntimeError, match="model.safetensors has 10 bytes"):
        save(options, 1)
    assert step_folders(options.checkpoint_dir) == []


# ------------------------------------------------------------------------------------------------------ found again
def test_folders_are_sorted_by_number_and_only_complete_ones_count(options: SaveOptions) -> None:
    for step in (1000, 900, 20):
        save(options, step)
    save(options, 100, last=True)
    (options.checkpoint_dir / "step_5000").mkdir()  # no manifest
    (options.checkpoint_dir / "step_x").mkdir()
    (options.checkpoint_dir / "step_9999").symlink_to("step_20")
    (options.checkpoint_dir / ".unfinished-step_7000").mkdir()
    assert [step for step, _ in step_folders(options.checkpoint_dir)] == [20, 100, 900, 1000]
    newest = newest_state(options.checkpoint_dir)
    assert newest is not None and newest.name == "step_1000"


def test_no_folder_holds_no_checkpoint(tmp_path: Path) -> None:
    assert newest_state(tmp_path / "nowhere") is None and newest_state(tmp_path) is None


def _lose_a_file(folder: Path) -> None:
    (folder / "ema.safetensors").unlink()


def _truncate_state(folder: Path) -> None:
    os.truncate(folder / "state" / "rank_00000.safetensors", 100)


def _break_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"files": {"model.saf')


def _empty_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{}")


@pytest.mark.parametrize("damage", [_lose_a_file, _truncate_state, _break_manifest, _empty_manifest])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    damage: Any, options: SaveOptions, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = save(options, 1), save(options, 2)
    damage(second)
    caplog.set_level(logging.WARNING, "bagel_ds")
    logging.getLogger("bagel_ds").propagate = True
    assert newest_state(options.checkpoint_dir) == first
    assert f"skipping checkpoint {second}" in caplog.text


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "{}", '{"steps_done": 3}'])
def test_a_broken_trainer_json_is_a_message(text: str, tmp_path: Path) -> None:
    (tmp_path / "trainer.json").write_text(text)
    with pytest.raises(UserError, match=r"trainer\.json.* resume from another"):
        read_trainer(tmp_path)


# --------------------------------------------------------------------------------------------- refused, full, thinned
def test_one_flipped_byte_is_found_and_named(options: SaveOptions) -> None:
    folder = save(options, 1)
    assert damage_of(folder) is None
    state = folder / "state" / "rank_00000.safetensors"
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    assert manifest_fault(folder) is None, "the size is still right"
    fault = damage_of(folder)
    assert fault is not None and "state/rank_00000.safetensors" in fault


@pytest.mark.parametrize("shares", [1, 2, 3, 7])
def test_ranks_read_equal_shares_of_the_bytes_and_together_find_one_that_is_flipped(
    shares: int, options: SaveOptions
) -> None:
    """A state may be one large file: what one rank saved is read by as many as resume from it."""
    folder = save(options, 1)
    files = state_files(folder)
    state = folder / "state" / "rank_00000.safetensors"
    whole = state.read_bytes()
    begins = 8 + int.from_bytes(whole[:8], "little")  # after the header, which has no checksum of its own

    def fault() -> str | None:
        checked, unreadable = zip(*(check_share(folder, files, share, shares) for share in range(shares)))
        assert set(unreadable) == {None}
        read = [sum(part.stop - part.start for part in parts) for parts in checked]
        assert sum(read) == len(whole) - begins + (folder / "trainer.json").stat().st_size
        assert max(read) <= -(-sum((folder / name).stat().st_size for name in files) // shares)
        return share_fault(folder, files, [part for parts in checked for part in parts])

    assert fault() is None
    for place in range(begins, len(whole)):
        content = bytearray(whole)
        content[place] ^= 1
        state.write_bytes(content)
        found = fault()
        assert found is not None and found.startswith("state/rank_00000.safetensors does not match its checksum, at")


def test_a_share_that_no_rank_has_read_is_damage(options: SaveOptions) -> None:
    folder = save(options, 1)
    files = state_files(folder)
    shares = [check_share(folder, files, share, 7)[0] for share in range(7)]
    assert sum(bool(share) for share in shares) >= 2, "the header may fill one"
    for missing in (number for number, share in enumerate(shares) if share):
        parts = [part for share in range(7) if share != missing for part in shares[share]]
        assert "does not match its checksum" in str(share_fault(folder, files, parts))


def test_a_file_whose_size_the_manifest_lacks_is_damage(options: SaveOptions) -> None:
    folder = save(options, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["trainer.json"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert damage_of(folder) == "manifest.json lacks the size of trainer.json"


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_full_disk_is_one_message_and_changes_nothing(
    fails_at: int, options: SaveOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = save(options, 1)
    real, calls = os.posix_fallocate, []

    def full(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == fails_at:
            raise OSError(28, "No space left on device")
        real(*arguments)

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SaveFault, match=r"step_2 could not be saved.*No space left.*GiB needed"):
        save(options, 2)
    monkeypatch.undo()
    assert newest_state(options.checkpoint_dir) == first
    assert names(options.checkpoint_dir) == ["latest", "step_1"]
    assert save(options, 2).is_dir()


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "Free space there, or save elsewhere"),
        (errno.EDQUOT, "Free space there, or save elsewhere"),
        (errno.EACCES, "Make that place writable, or save elsewhere"),
        (errno.EROFS, "Make that place writable, or save elsewhere"),
        (errno.EIO, "If it happens again, save elsewhere"),
        (errno.ESTALE, "If it happens again, save elsewhere"),
    ],
)
def test_a_save_that_fails_says_what_the_system_said(
    number: int, remedy: str, options: SaveOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    for place in ("fsync", "posix_fallocate"):
        with monkeypatch.context() as patched, pytest.raises(SaveFault) as caught:
            patched.setattr(os, place, refused)
            save(options, 2)
        text = str(caught.value)
        assert os.strerror(number) in text and remedy in text
        assert ("Free space" in text) == ("Free space" in remedy)
        assert "None" not in text
    assert names(options.checkpoint_dir) == []


# ----------------------------------------------------------------------------------------------- how long it may take
@pytest.mark.parametrize("grows", [True, False])
def test_a_save_is_going_on_while_files_grow(
    grows: bool, options: SaveOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long a slow disk takes, the stall watch hears of it; a disk that hangs is a stall."""
    signs, exchanged, fill = [], [], state_module.fill_rank
    everyone = save_module.everyone

    def counted(value: Any) -> list[Any]:
        exchanged.append(value)
        return everyone(value)

    def slow(writer: TensorFileWriter, *arguments: Any) -> None:
        deadline = time.monotonic() + 60
        while len(signs if grows else exchanged) < 5 and time.monotonic() < deadline:
            writer.written_bytes += grows
            time.sleep(0.01)
        fill(writer, *arguments)

    monkeypatch.setattr(state_module, "fill_rank", slow)
    monkeypatch.setattr(save_module, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(save_module, "everyone", counted)
    monkeypatch.setattr(save_module, "going_on", lambda: signs.append(1))
    save(options, 1)
    assert len(exchanged) >= 5 and (len(signs) >= 5 if grows else len(signs) < 5)


# --------------------------------------------------------------------------------- conveniences that a save survives
@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.EACCES])
def test_where_no_links_can_be_made_the_final_checkpoint_is_named_in_a_file(
    number: int, options: SaveOptions, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(self: Path, target: str) -> None:
        raise OSError(number, os.strerror(number), target, None, str(self))

    logging.getLogger("bagel_ds").propagate = True
    monkeypatch.setattr(Path, "symlink_to", refused)
    folder = save(options, 3, last=True)
    assert (options.checkpoint_dir / "step_final").read_text() == "step_3\n"
    assert (options.checkpoint_dir / "latest").read_text() == "step_3\n"
    assert names(options.checkpoint_dir) == ["latest", "step_3", "step_final"]
    assert newest_state(options.checkpoint_dir) == folder and manifest_fault(folder) is None
    (line,) = caplog.messages
    assert f"{folder} is the final checkpoint" in line and "text file" in line and os.strerror(number) in line
    assert export_checkpoint(
        options.checkpoint_dir / "step_final", options.checkpoint_dir.parent / "out", torch.float32
    )
    kept = dataclasses.replace(options, keep_last=1)
    save(kept, 4)
    assert names(options.checkpoint_dir) == ["latest", "step_4"], "the file goes with the checkpoint it names"


def _refusing_to_replace(*wanted: str) -> Callable[[Path, Path], Path]:
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if Path(target).name in wanted:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
        return real(self, target)

    return replace


def test_a_checkpoint_is_saved_although_nothing_can_point_to_it(
    options: SaveOptions, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("bagel_ds").propagate = True
    monkeypatch.setattr(Path, "replace", _refusing_to_replace("latest", "step_final"))
    folder = save(options, 3, last=True)
    assert newest_state(options.checkpoint_dir) == folder and names(options.checkpoint_dir) == ["step_3"]
    latest, final = caplog.messages
    assert f"{folder} is saved, but latest could not" in latest and "Permission denied" in latest
    assert f"{folder} is the final checkpoint, but step_final could not" in final


def test_a_folder_in_the_place_of_step_final_costs_a_line(
    options: SaveOptions, caplog: pytest.LogCaptureFixture
) -> None:
    """As `cp -rL` leaves it."""
    logging.getLogger("bagel_ds").propagate = True
    (options.checkpoint_dir / "step_final").mkdir()
    save(options, 3, last=True)
    assert names(options.checkpoint_dir) == ["latest", "step_3", "step_final"]
    assert "step_3 is the final checkpoint, but step_final could not" in caplog.text


@pytest.mark.parametrize(("number", "warns"), [(errno.EINVAL, False), (errno.EOPNOTSUPP, False), (errno.EIO, True)])
def test_folders_that_cannot_be_flushed_cost_no_checkpoint(
    number: int,
    warns: bool,
    options: SaveOptions,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where a file system has no flush of folders; and one that fails once the checkpoint has its name."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path == options.checkpoint_dir or (path.is_dir() and not warns):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    logging.getLogger("bagel_ds").propagate = True
    monkeypatch.setattr(os, "fsync", fsync)
    folder = save(options, 3)
    assert newest_state(options.checkpoint_dir) == folder
    assert ("loses power" in caplog.text) == warns


def test_older_checkpoints_that_cannot_be_removed_cost_no_new_one(
    options: SaveOptions, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", "step_1")

    logging.getLogger("bagel_ds").propagate = True
    monkeypatch.setattr(step_folders_module, "thin_out", refused)
    assert save(options, 3).is_dir()
    assert "step_3 is saved, but older checkpoints could not be removed" in caplog.text


def test_a_file_system_that_cannot_reserve_space_is_written_to(
    options: SaveOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    folder = save(options, 3)
    assert manifest_fault(folder) is None and damage_of(folder) is None


def test_a_checkpoint_that_cannot_be_replaced_stays(options: SaveOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    first, real = save(options, 1), Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name == ".unfinished-step_1":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(SaveFault, match="unfinished-step_1: Permission denied. Make"):
        save(options, 1)
    assert newest_state(options.checkpoint_dir) == first and names(options.checkpoint_dir) == ["latest", "step_1"]


def test_only_the_newest_are_kept_when_asked(options: SaveOptions) -> None:
    kept = SaveOptions(options.checkpoint_dir, options.model_folder, torch.float32, False, keep_last=2)
    for step in (1, 2, 3, 10):
        save(kept, step)
    assert [step for step, _ in step_folders(options.checkpoint_dir)] == [3, 10]


@pytest.mark.parametrize(("keep_last", "delete_state"), [(1, False), (0, True)])
def test_what_was_just_saved_stays_also_below_the_highest_number(
    keep_last: int, delete_state: bool, options: SaveOptions
) -> None:
    """As after `--resume_from step_1` where step_9 is already there."""
    newest = save(options, 9)
    arguments = (options.checkpoint_dir, options.model_folder, torch.float32, delete_state, keep_last)
    saved = save(SaveOptions(*arguments), 2)
    assert holds_state(saved) and holds_state(newest)
    again = save(SaveOptions(*arguments), 3)
    assert holds_state(again) and holds_state(newest)
    assert saved.is_dir() != bool(keep_last) and not holds_state(saved)


def test_step_final_goes_with_the_checkpoint_it_names(options: SaveOptions) -> None:
    kept = SaveOptions(options.checkpoint_dir, options.model_folder, torch.float32, False, keep_last=1)
    save(kept, 1, last=True)
    assert (options.checkpoint_dir / "step_final").is_dir()
    save(kept, 2)  # the run was prolonged
    assert names(options.checkpoint_dir) == ["latest", "step_2"]


def test_the_only_whole_state_is_never_removed(options: SaveOptions) -> None:
    first, second = save(options, 1), save(options, 2)
    _truncate_state(second)
    thin_out(options.checkpoint_dir, keep_last=1, delete_previous_state=True)
    assert newest_state(options.checkpoint_dir) == first


def test_a_checkpoint_about_to_be_replaced_comes_back_after_a_crash(options: SaveOptions) -> None:
    first = save(options, 1)
    first.rename(options.checkpoint_dir / ".replaced-step_1")
    sweep(options.checkpoint_dir)
    assert newest_state(options.checkpoint_dir) == first


def test_space_is_reserved_before_anything_is_written(tmp_path: Path) -> None:
    from bagel_ds.ranges import TensorInfo

    writer = TensorFileWriter(tmp_path / "x.safetensors", {"w": TensorInfo(torch.float32, (1000,))})
    assert (tmp_path / "x.safetensors").stat().st_size == writer.nbytes
    writer.close()


def test_a_run_whose_model_folder_is_a_checkpoint_may_remove_it(options: SaveOptions) -> None:
    """As the message for a lost base model offers: --model_path .../step_1."""
    first = save(options, 1)
    resumed = dataclasses.replace(options, model_folder=first, keep_last=1)
    for step in (2, 3, 4):
        saved = save(resumed, step)
        thin_out(options.checkpoint_dir, keep_last=1, delete_previous_state=False, saved=saved)
        assert all((saved / name).read_text() == name for name in ("llm_config.json", "tokenizer.json"))
        assert (saved / "ae.safetensors").is_file() and manifest_fault(saved) is None
    assert not first.exists()
