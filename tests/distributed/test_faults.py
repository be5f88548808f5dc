"""Faults outside the program are reported by name and cost no more than necessary.

Damaged checkpoints, full and read-only disks, numbers that are not finite, ranks that stall or run out of memory: each
in a real launch, with its message, its exit code and what is left afterwards.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file

from bagel_ds.checkpoint.step_folders import MANIFEST, TRAINER, newest_state
from bagel_ds.data.batches.batch_file import load_batch
from tests.distributed.cases import Case, Outcome, arguments, losses, run_cases
from tests.distributed.started import FAULTY, StartedRun, steps_logged
from tests.launch import TRAIN, run_ranks

pytestmark = pytest.mark.distributed

MIB = 2**20


def words_of(demo: Path, results: Path, **changed: object) -> list[str]:
    return arguments(demo, results, **{"precision": "fp32", "max_num_tokens": 448, **changed})


# ------------------------------------------------------------------------------------------------ damaged checkpoints
def _flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def _truncate(path: Path, _: int) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _remove(path: Path, _: int) -> None:
    path.unlink()


def _empty(path: Path, _: int) -> None:
    for file in path.iterdir():
        file.unlink()


def _change_number(path: Path, _: int) -> None:
    path.write_text(path.read_text().replace('"steps_done": 2', '"steps_done": 3'))


DAMAGE: dict[str, tuple[str, Callable[[Path, int], None], int, str]] = {
    "a_flipped_bit": ("state/rank_00001.safetensors", _flip, -9, "does not match its checksum, at"),
    "a_flipped_bit_in_a_header": ("state/rank_00000.safetensors", _flip, 8, "rank_00000.safetensors"),
    "a_missing_file": ("state/rank_00001.safetensors", _remove, 0, "is missing"),
    "a_state_without_files": ("state", _empty, 0, "state/rank_00000.safetensors is missing"),
    "a_missing_trainer_json": (TRAINER, _remove, 0, "is missing"),
    "a_file_cut_short": ("state/rank_00000.safetensors", _truncate, 0, "but manifest.json says"),
    "another_number_of_steps": (TRAINER, _change_number, 0, "does not match its checksum"),
    "a_manifest_that_is_none": (MANIFEST, _flip, 0, "can't be read"),
    "a_missing_manifest": (MANIFEST, _remove, 0, "can't be read"),
}
# Also passed over by a run that may choose; tests/train/saves/test_start.py shows it for the others.
PASSED_OVER = ("a_flipped_bit", "a_missing_file", "another_number_of_steps", "a_missing_manifest")


@pytest.fixture(scope="module")
def resumed(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Outcome]]]:
    """A run with two checkpoints, copied, the newer one damaged and named ("refused_..."), and then resumed."""
    folder = tmp_path_factory.mktemp("damaged")
    whole = Case("whole", words_of(demo, folder / "whole", total_steps=2, save_every=1))
    outcomes = run_cases(folder / "first", [whole], ranks=2)
    assert outcomes["whole"][0].code == 0, outcomes["whole"][0].output
    cases = []
    for name, (file, damage, place, _) in DAMAGE.items():
        shutil.copytree(folder / "whole" / "checkpoints", folder / name / "checkpoints", symlinks=True)
        bad = folder / name / "checkpoints" / "step_2"
        damage(bad / file, place)
        cases.append(Case(f"refused_{name}", words_of(demo, folder / "refused", total_steps=3, resume_from=bad)))
        if name in PASSED_OVER:
            cases.append(Case(name, words_of(demo, folder / name, total_steps=2, auto_resume=True)))
    return folder, outcomes | run_cases(folder / "second", cases, ranks=2)


@pytest.mark.parametrize("name", PASSED_OVER)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    name: str, resumed: tuple[Path, dict[str, list[Outcome]]]
) -> None:
    folder, outcomes = resumed
    main, other = outcomes[name]
    assert (main.code, other.code) == (0, 0), main.output + other.output
    file, _, _, reason = DAMAGE[name]
    assert "skipping" in main.output and reason in main.output and file in main.output, main.output
    assert "resumed after step 1" in main.output
    assert losses(folder / name) == {1: losses(folder / "whole")[1]}, "the second step again, and the same"


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_that_was_asked_for_is_refused_and_another_offered(
    name: str, resumed: tuple[Path, dict[str, list[Outcome]]]
) -> None:
    folder, outcomes = resumed
    main, other = outcomes[f"refused_{name}"]
    assert (main.code, other.code) == (2, 2), main.output
    file, _, _, reason = DAMAGE[name]
    assert f"step_2 is damaged: {file}" in main.output and reason in main.output
    assert f"The newest other one next to it is {folder / name / 'checkpoints' / 'step_1'};" in main.output


# -------------------------------------------------------------------------------------------------------- full disks
@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    """A small file system of its own at `folder`; skips where mounting is not permitted."""
    folder.mkdir()
    try:
        subprocess.run(["mount", *options, str(folder)], check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounting is not permitted here: {getattr(error, 'stderr', error)}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=60)


def memory_disk(folder: Path, size: int) -> object:
    return mounted(folder, "-t", "tmpfs", "-o", f"size={size}", "tmpfs")


@pytest.mark.slow
def test_a_full_disk_costs_a_save_but_not_the_run(demo: Path, tmp_path: Path) -> None:
    """The first save fits. The second finds room for what the ranks write but not for the autoencoder beside it."""
    with memory_disk(tmp_path / "disk", 250 * MIB) as disk:  # type: ignore[attr-defined]
        words = words_of(demo, tmp_path, total_steps=1, checkpoint_dir=disk / "probe")
        assert run_ranks(TRAIN, words, ranks=1).code == 0
        size = sum(path.stat().st_size for path in disk.rglob("*") if path.is_file() and not path.is_symlink())
        shutil.rmtree(disk / "probe")
        autoencoder = (demo / "model" / "ae.safetensors").stat().st_size
        room = 2 * size - autoencoder // 2
        subprocess.run(["mount", "-o", f"remount,size={room}", str(disk)], check=True, timeout=60)
        words = words_of(demo, tmp_path / "run", total_steps=100, save_every=2, checkpoint_dir=disk)
        with StartedRun(words, tmp_path / "run") as run:
            run.until(lambda: "could not be saved" in run.output, "a save that fails")
            assert newest_state(disk) == disk / "step_2", "what was saved before is untouched"
            subprocess.run(["mount", "-o", f"remount,size={4 * size}", str(disk)], check=True, timeout=60)
            run.until(lambda: (disk / "step_6").exists() or (disk / "step_8").exists(), "a later save")
            assert "No space left on device" in run.output and "Training goes on" in run.output
        last = words_of(demo, tmp_path / "last", total_steps=9, save_every=100, checkpoint_dir=disk, auto_resume=True)
        newest = newest_state(disk)
        (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - MIB))
        ended = run_ranks(TRAIN, last, ranks=1)
        assert ended.code == 2, ended.output[-4000:]
        assert "ERROR: " in ended.output and "No space left on device" in ended.output
        assert newest_state(disk) == newest and not list(disk.glob(".unfinished*"))


def test_a_read_only_checkpoint_dir_is_told_before_training(demo: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs") as disk:
        found = run_ranks(TRAIN, words_of(demo, tmp_path / "run", checkpoint_dir=disk / "checkpoints"), ranks=1)
    assert found.code == 2 and "Traceback" not in found.output
    assert "--checkpoint_dir" in found.output and "Read-only file system" in found.output


@pytest.mark.slow
def test_a_full_nvme_disk_is_told_before_training(demo: Path, tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(24 * MIB)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True, timeout=60)
    with mounted(tmp_path / "disk", "-o", "loop", str(image)) as disk:
        words = words_of(demo, tmp_path / "run", ds_config="zero3_nvme", nvme_path=disk)
        found = run_ranks(TRAIN, words, ranks=1)
    assert found.code == 2 and "Traceback" not in found.output
    assert "--nvme_path" in found.output and "MiB free, this run needs" in found.output


# ---------------------------------------------------------------------------------------- numbers that are not finite
def test_updates_that_are_not_finite_are_skipped_on_all_ranks_kept_and_limited(demo: Path, tmp_path: Path) -> None:
    """Only rank 1 meets NaN, at the second and the third step; one such update is allowed."""
    faults = [{"at": "step", "rank": 1, "step": step, "do": "nan"} for step in (1, 2)]
    words = words_of(demo, tmp_path, total_steps=10, save_every=1, max_nonfinite=1)
    ended = run_ranks(FAULTY, words, ranks=2, env={"BAGEL_TEST_FAULTS": json.dumps(faults)})
    assert ended.code == 2
    output = ended.output
    assert "step 1 skipped" in output and "1 of --max_nonfinite 1" in output
    assert "2 updates were not finite, more than --max_nonfinite 1" in output and "Traceback" not in output
    assert max(steps_logged(tmp_path)) == 1, "the run ends in the step that is past the limit"

    before, after = (tmp_path / "checkpoints" / f"step_{step}" for step in (1, 2))
    for file in (
        "model.safetensors",
        "ema.safetensors",
        "state/rank_00000.safetensors",
        "state/rank_00001.safetensors",
    ):
        one, other = load_file(before / file), load_file(after / file)
        assert all(one[name].equal(other[name]) for name in one), "nothing was updated, on either rank"
    assert json.loads((after / TRAINER).read_text())["skipped_updates"] == 1

    kept = sorted(path.name for path in (tmp_path / "nonfinite").glob("*.json"))
    assert kept == [f"step_{step}_rank_{rank}_pack_0.json" for step in (1, 2) for rank in (0, 1)]
    batch = load_batch(tmp_path / "nonfinite" / "step_2_rank_1_pack_0")
    assert batch.noise.isnan().any() and batch.samples
    for sample in batch.samples:
        assert sample in output


# ------------------------------------------------------------------------------------------------------------ stalls
@pytest.mark.slow
@pytest.mark.timed
def test_a_stopped_rank_is_found_told_of_and_ends_the_job(demo: Path, tmp_path: Path) -> None:
    faults = [{"at": "step", "rank": 1, "step": 2, "do": "stop"}]
    with StartedRun(words_of(demo, tmp_path, total_steps=100, stall_timeout=20), tmp_path, faults=faults) as run:
        run.until_step(1)
        code = run.end(20 + 40 + 60)
    assert code != 0
    assert "[rank 0] stalled: step of step 2 has taken longer than --stall_timeout 20 s" in run.output
    assert "[rank 0] missing: rank 1\n" in run.output
    assert run.output.count("most recent call first") >= 2, "stacks, of more than one thread"
    assert "[rank 1] stalled" in run.output, "once woken, it reports its phase"
