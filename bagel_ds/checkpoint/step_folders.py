"""The step_N folders of a run: complete or absent, found again, checked, thinned out.

Guarantees: a folder named step_N is complete: it was written under another name, flushed, compared with its manifest
and then renamed; `latest` moves after that. N counts optimizer steps done. Removing old ones never removes the only
complete training state. An interrupted save leaves what was there before in charge.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Iterable, Iterator, NamedTuple, Sequence

from bagel_ds.errors import UserError
from bagel_ds.model_folder.crc import joined_crc
from bagel_ds.model_folder.tensor_files import TensorFiles

logger = logging.getLogger("bagel_ds")

STATE, TRAINER, MANIFEST, LATEST, FINAL = "state", "trainer.json", "manifest.json", "latest", "step_final"
README = "README.md"
UNFINISHED, REPLACED, GIVEN_UP = ".unfinished-", ".replaced-", ".given-up-state"
_MOST_SHOWN = 8  # checkpoints that a message names, newest first
_STEP = re.compile(r"step_(\d+)")
_HIDDEN = re.compile(rf"({re.escape(UNFINISHED)}|{re.escape(REPLACED)})(step_\d+)")


# ---------------------------------------------------------------------------------------------------------- finding
def step_folders(checkpoint_dir: Path) -> list[tuple[int, Path]]:
    """Complete step_N folders by N; links and unfinished folders are none."""
    return [(step, path) for step, path in _numbered(checkpoint_dir) if (path / MANIFEST).is_file()]


def meant_checkpoint(path: Path) -> Path:
    """The folder behind a path that a user gives: a file such as `latest` is followed."""
    return pointed_to(path) or path if path.is_file() else path


def checkpoints_near(path: Path, with_state: bool = False) -> str:
    """Which checkpoints lie in `path`, in its folder `checkpoints` or beside it, for a message; "" for none."""
    for folder in (path, path / "checkpoints", path.parent):
        names = [found.name for _, found in step_folders(folder) if holds_state(found) or not with_state]
        if names:
            more = f", ... ({len(names)} in all)" if len(names) > _MOST_SHOWN else ""
            return f"{folder} holds {', '.join(names[: -_MOST_SHOWN - 1 : -1])}{more}"
    return ""


def taken_names(checkpoint_dir: Path) -> dict[int, str]:
    """Names step_N that something has, by N: also damaged ones, links, files, and those that `sweep` will restore."""
    names = [path.name.removeprefix(REPLACED) for path in _entries(checkpoint_dir)]
    return dict(sorted((int(match[1]), match[0]) for name in names if (match := _STEP.fullmatch(name))))


def run_entries(checkpoint_dir: Path) -> list[Path]:
    """Everything that the saves of a run have written into a checkpoint_dir, also what was interrupted."""
    known = {LATEST, FINAL, _beside(LATEST), _beside(FINAL)}
    return [
        path
        for path in _entries(checkpoint_dir)
        if path.name in known or _STEP.fullmatch(path.name) or _HIDDEN.fullmatch(path.name)
    ]


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def step_number(folder: Path) -> int | None:
    """N of a folder named step_N."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def _numbered(checkpoint_dir: Path) -> list[tuple[int, Path]]:
    found = []
    for path in _entries(checkpoint_dir):
        step = step_number(path)
        if step is not None and not path.is_symlink() and path.is_dir():
            found.append((step, path))
    return sorted(found)


def latest_remark(checkpoint_dir: Path, chosen: Path | None) -> str | None:
    """What `latest` says other than `chosen` (None: no checkpoint), in words; None where it agrees.

    It moves after each save, so it differs where steps were copied, removed or saved by another run.
    """
    latest = checkpoint_dir / LATEST
    named = pointed_to(latest)
    if named is None:
        return None if chosen is None else f"{latest} is missing or names no step"
    if chosen is not None and named.name == chosen.name:
        return None
    there = "a complete checkpoint" if (named / MANIFEST).is_file() else "which is not there or not complete"
    return f"{latest} names {named.name}, {there}"


def pointed_to(pointer: Path) -> Path | None:
    """The folder beside `pointer` that it names, by a link or (as `latest` does) in its text, there or not."""
    try:
        name = os.readlink(pointer) if pointer.is_symlink() else pointer.read_text().strip()
    except (OSError, ValueError):
        return None
    named = pointer.with_name(Path(name).name) if name else pointer
    return named if step_number(named) is not None else None


def states(checkpoint_dir: Path) -> list[Path]:
    """Checkpoints with a training state, be it damaged, by number of steps."""
    return [path for _, path in _numbered(checkpoint_dir) if holds_state(path)]


def newest_state(checkpoint_dir: Path, but_not: Iterable[Path] = ()) -> Path | None:
    """The newest checkpoint that holds training state and whose files have their manifest's sizes."""
    refused = {path.resolve() for path in but_not}
    for path in reversed(states(checkpoint_dir)):
        if path.resolve() not in refused:
            fault = manifest_fault(path)
            if fault is None:
                return path
            logger.warning("checkpoint %s is passed over: %s", path, fault)
    return None


def holds_state(folder: Path) -> bool:
    """Whether a checkpoint has a training state, be it damaged: only `thin_out` takes the folder `state` away."""
    return (folder / STATE).is_dir()


def read_trainer(folder: Path) -> dict[str, Any]:
    """trainer.json of a checkpoint."""
    try:
        found = json.loads((folder / TRAINER).read_text())
        missing = [name for name in ("steps_done", "plan_state", "world_size") if name not in found]
        if missing:
            raise ValueError(f"it names no {' and no '.join(missing)}")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder / TRAINER} can't be read ({error}); resume from another checkpoint.") from None
    return found


# --------------------------------------------------------------------------------------------------------- checking
def manifest_fault(folder: Path) -> str | None:
    """What of a checkpoint's manifest is not there as written, by presence and size; None where all is."""
    try:
        sizes = dict(json.loads((folder / MANIFEST).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} can't be read ({type(error).__name__}: {error})"
    for name, size in sizes.items():
        path = folder / name
        if name.startswith(STATE + "/") and not holds_state(folder):
            continue  # given up on purpose by del_previous_state; the weights are still whole
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes, its manifest says {size:,}"
    return None


def state_files(folder: Path) -> list[str]:
    """Names in the manifest of the files that a resume reads; none of a state that was given up."""
    checksums = json.loads((folder / MANIFEST).read_text()).get("checksums", {})
    kept = holds_state(folder)
    return sorted(name for name in checksums if name == TRAINER or (kept and name.startswith(STATE + "/")))


class Checked(NamedTuple):
    """CRC-32 of the bytes [start, stop) of one tensor of a file, or of a file without tensors (part "")."""

    file: str
    part: str
    start: int
    stop: int
    crc: int


def checksum_fault(folder: Path, names: Sequence[str]) -> str | None:
    """The first place in the named files whose bytes are not those that were written; reads them whole."""
    checked, fault = check_share(folder, names, 0, 1)
    return fault or share_fault(folder, names, checked)


def check_share(folder: Path, names: Sequence[str], share: int, shares: int) -> tuple[list[Checked], str | None]:
    """Read one of so many equal shares of the named files' bytes; their checksums, and what can't be read."""
    sizes = json.loads((folder / MANIFEST).read_text())["files"]
    if unknown := [name for name in names if name not in sizes]:
        return [], f"{MANIFEST} gives no size of {unknown[0]}"
    total = sum(sizes[name] for name in names)
    first, last = total * share // shares, total * (share + 1) // shares
    found: list[Checked] = []
    for name in names:
        low, high = max(first, 0), min(last, sizes[name])
        first, last = first - sizes[name], last - sizes[name]
        if low >= high:
            continue
        try:
            found += _checked(folder, name, low, high)
        except (UserError, OSError) as error:
            return found, f"{name} can't be read ({error})"
    return found, None


def share_fault(folder: Path, names: Sequence[str], checked: Iterable[Checked]) -> str | None:
    """The first place in the named files whose bytes are not those that were written; `checked` holds all shares."""
    stops: dict[tuple[str, str], int] = {}
    found: dict[tuple[str, str], int] = {}
    for file, part, start, stop, crc in sorted(checked):
        key = file, part
        if start == stops.get(key, 0):
            found[key] = joined_crc(found.get(key, 0), crc, stop - start)
            stops[key] = stop
    expected = json.loads((folder / MANIFEST).read_text()).get("checksums", {})
    for name in names:
        for part, crc in expected.get(name, {}).items():
            if found.get((name, part), 0) != crc:
                return f"{name} holds other bytes than were saved" + (f", at {part}" if part else "")
    return None


def _checked(folder: Path, name: str, low: int, high: int) -> Iterator[Checked]:
    """Of the bytes [low, high) of a file those that have a checksum."""
    path = folder / name
    if path.suffix != ".safetensors":
        yield Checked(name, "", low, high, zlib.crc32(path.read_bytes()[low:high]))
        return
    files = TensorFiles([path])
    for part in files.names:
        begins, ends = files.place(part)
        start, stop = max(low, begins) - begins, min(high, ends) - begins
        if start < stop:
            yield Checked(name, part, start, stop, files.checksum(part, start, stop))


def _checksums(path: Path) -> dict[str, int]:
    """CRC-32 of every tensor of a safetensors file, by name; of any other file as a whole, under the name ""."""
    if path.suffix != ".safetensors":
        return {"": zlib.crc32(path.read_bytes())}
    files = TensorFiles([path])
    return {name: files.checksum(name) for name in files.names}


# ---------------------------------------------------------------------------------------------------------- writing
def unfinished_folder(final: Path) -> Path:
    """Where step_N is written before it is complete."""
    return final.with_name(f"{UNFINISHED}{final.name}")


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def write_manifest(folder: Path, checksums: dict[str, dict[str, int]]) -> None:
    """Sizes of the files in the folder, and the checksums of trainer.json and of those written tensor by tensor.

    README.md is left out, because users edit it before they publish a folder.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / README)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    whole = {TRAINER: _checksums(folder / TRAINER)} if (folder / TRAINER).is_file() else {}
    write_json(folder / MANIFEST, {"files": sizes, "checksums": {**checksums, **whole}})


def finish(unfinished: Path, final: Path, last: bool) -> None:
    """Flush, check and rename a written folder, then move `latest` (and `step_final`) to it.

    From the rename on the checkpoint is saved, whatever fails then: that is a warning.
    """
    fault = manifest_fault(unfinished)
    if fault is not None:
        raise RuntimeError(f"checkpoint {unfinished} is not as it was written: {fault}")
    flush_all(unfinished)
    replaced = final.with_name(f"{REPLACED}{final.name}")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    try:
        unfinished.rename(final)
    except OSError:
        if replaced.exists():
            replaced.rename(final)
        raise
    with _may_fail(f"{final} is saved, but {LATEST} could not be moved to it"):
        _replace(final.parent / LATEST, lambda path: path.write_text(final.name + "\n"))
    if last:
        mark_final(final)
    with _may_fail(f"{final} is saved, but may be lost if this host loses its power now"):
        _flush(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def mark_final(final: Path) -> None:
    """Have `step_final` lead to a run's last checkpoint: a link, or its name as text where links can't be made."""
    pointer = final.parent / FINAL
    try:
        _replace(pointer, lambda path: path.symlink_to(final.name))
    except OSError as error:
        with _may_fail(f"{final} is the final checkpoint, but {FINAL} could not be moved to it"):
            _replace(pointer, lambda path: path.write_text(final.name + "\n"))
            logger.warning("%s is the final checkpoint; %s is a text file that names it (%s)", final, pointer, error)


@contextmanager
def _may_fail(what: str) -> Iterator[None]:
    """Report what the file system refuses inside, and go on."""
    try:
        yield
    except OSError as error:
        logger.warning("%s (%s)", what, error)


def flush_all(folder: Path) -> None:
    """Have a folder and all that is in it on the disk."""
    for path in (*folder.rglob("*"), folder):
        _flush(path)


def sweep(checkpoint_dir: Path) -> None:
    """Put right what an interrupted save left: remove what is unfinished, restore what was about to be replaced."""
    for path in _entries(checkpoint_dir):
        match = _HIDDEN.fullmatch(path.name)
        if match is None:
            continue  # other programs' files, or an export that is being written here
        final = path.with_name(match[2])
        if match[1] == REPLACED and not final.exists():
            path.rename(final)
            continue
        if match[1] == UNFINISHED:
            logger.info("removing %s, left by an interrupted save", path)
        shutil.rmtree(path, ignore_errors=True)


def thin_out(checkpoint_dir: Path, keep_last: int, delete_previous_state: bool, saved: Path | None = None) -> None:
    """Keep the `keep_last` newest checkpoints (0: all), and older ones' weights alone with `delete_previous_state`.

    The newest whole training state always stays, and so does `saved`, the one just written: a run that was taken up
    from an older checkpoint saves below the highest number.
    """
    folders = [path for _, path in step_folders(checkpoint_dir)]
    newest = newest_state(checkpoint_dir)
    for older in folders:
        if older in (newest, saved):
            continue
        if keep_last and older not in folders[-keep_last:]:
            _remove(older, unfinished_folder(older))
        elif delete_previous_state and newest is not None:
            _remove(older / STATE, older / GIVEN_UP)
    final = checkpoint_dir / FINAL
    named = pointed_to(final)
    if named is not None and not named.exists():
        final.unlink()  # of an earlier, shorter run whose last checkpoint has just gone


def _remove(folder: Path, aside: Path) -> None:
    """Remove a folder by way of `aside`, so that an interruption leaves nothing that looks like a damaged one."""
    shutil.rmtree(aside, ignore_errors=True)
    with suppress(OSError):  # not there, or to be tried again after the next save
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _beside(name: str) -> str:
    """Where a small file is written before it replaces the one of that name."""
    return f".{name}.new"


def _replace(path: Path, write: Any) -> None:
    beside = path.with_name(_beside(path.name))
    beside.unlink(missing_ok=True)
    try:
        write(beside)
        if not beside.is_symlink():
            _flush(beside)
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP) or not path.is_dir():
            raise  # some file systems have no flush of folders; that of a file must work
    finally:
        os.close(descriptor)
