"""The step_N folders of a run: finding, checking, finishing and removing checkpoints.

Guarantees: a folder named step_N is complete. It was written under another name, flushed, compared with its manifest
and renamed; `latest` moves after that. N counts optimizer steps. Removing old checkpoints never removes the only
complete training state. After an interrupted save, the previous checkpoint is still the latest.
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
_MOST_SHOWN = 8  # checkpoints in a message, newest first
_STEP = re.compile(r"step_(\d+)")
_HIDDEN = re.compile(rf"({re.escape(UNFINISHED)}|{re.escape(REPLACED)})(step_\d+)")


# ---------------------------------------------------------------------------------------------------------- finding
def step_folders(checkpoint_dir: Path) -> list[tuple[int, Path]]:
    """Complete step_N folders by N, without links and unfinished folders."""
    return [(step, path) for step, path in _numbered(checkpoint_dir) if (path / MANIFEST).is_file()]


def meant_checkpoint(path: Path) -> Path:
    """The folder that a user's path means: a file such as `latest` is followed."""
    return pointed_to(path) or path if path.is_file() else path


def checkpoints_near(path: Path, with_state: bool = False) -> str:
    """For a message: the checkpoints in `path`, in its folder `checkpoints` or next to it; "" if there are none."""
    for folder in (path, path / "checkpoints", path.parent):
        names = [found.name for _, found in step_folders(folder) if holds_state(found) or not with_state]
        if names:
            more = f", ... ({len(names)} in all)" if len(names) > _MOST_SHOWN else ""
            return f"{folder} holds {', '.join(names[: -_MOST_SHOWN - 1 : -1])}{more}"
    return ""


def taken_names(checkpoint_dir: Path) -> dict[int, str]:
    """Names step_N in use, by N: also by links, files, damaged checkpoints, and those that `sweep` will restore."""
    names = [path.name.removeprefix(REPLACED) for path in _entries(checkpoint_dir)]
    return dict(sorted((int(match[1]), match[0]) for name in names if (match := _STEP.fullmatch(name))))


def run_entries(checkpoint_dir: Path) -> list[Path]:
    """Everything that the saves of a run have written into a checkpoint_dir, interrupted ones included."""
    known = {LATEST, FINAL, _temporary_name(LATEST), _temporary_name(FINAL)}
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
    """For the log: how `latest` differs from `chosen` (None: no checkpoint). None if it agrees.

    It moves after each save, so it differs if checkpoints were copied, removed or saved by another run.
    """
    latest = checkpoint_dir / LATEST
    named = pointed_to(latest)
    if named is None:
        return None if chosen is None else f"{latest} is missing or does not name a step"
    if chosen is not None and named.name == chosen.name:
        return None
    state = "a complete checkpoint" if (named / MANIFEST).is_file() else "which is missing or incomplete"
    return f"{latest} names {named.name}, {state}"


def pointed_to(pointer: Path) -> Path | None:
    """The step_N folder that `pointer` names, as a link or (like `latest`) in its text. It may not exist."""
    try:
        name = os.readlink(pointer) if pointer.is_symlink() else pointer.read_text().strip()
    except (OSError, ValueError):
        return None
    named = pointer.with_name(Path(name).name) if name else pointer
    return named if step_number(named) is not None else None


def states(checkpoint_dir: Path) -> list[Path]:
    """Checkpoints with a training state, complete or damaged, by number of steps."""
    return [path for _, path in _numbered(checkpoint_dir) if holds_state(path)]


def newest_state(checkpoint_dir: Path, but_not: Iterable[Path] = ()) -> Path | None:
    """The newest checkpoint with a training state whose files have the sizes in its manifest."""
    refused = {path.resolve() for path in but_not}
    for path in reversed(states(checkpoint_dir)):
        if path.resolve() not in refused:
            fault = manifest_fault(path)
            if fault is None:
                return path
            logger.warning("skipping checkpoint %s: %s", path, fault)
    return None


def holds_state(folder: Path) -> bool:
    """Whether a checkpoint has a training state, complete or damaged. Only `thin_out` removes the folder `state`."""
    return (folder / STATE).is_dir()


def read_trainer(folder: Path) -> dict[str, Any]:
    """trainer.json of a checkpoint."""
    try:
        found = json.loads((folder / TRAINER).read_text())
        missing = [name for name in ("steps_done", "plan_state", "world_size") if name not in found]
        if missing:
            raise ValueError(f"it lacks {' and '.join(missing)}")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder / TRAINER} can't be read ({error}); resume from another checkpoint.") from None
    return found


# --------------------------------------------------------------------------------------------------------- checking
def manifest_fault(folder: Path) -> str | None:
    """The first file that is missing or has another size than in the manifest, as a message; None if all agree."""
    try:
        sizes = dict(json.loads((folder / MANIFEST).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} can't be read ({type(error).__name__}: {error})"
    for name, size in sizes.items():
        path = folder / name
        if name.startswith(STATE + "/") and not holds_state(folder):
            continue  # removed on purpose by del_previous_state; the weights are still complete
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes, but {MANIFEST} says {size:,}"
    return None


def state_files(folder: Path) -> list[str]:
    """Names in the manifest of the files that a resume reads, without those of a removed state."""
    checksums = json.loads((folder / MANIFEST).read_text()).get("checksums", {})
    kept = holds_state(folder)
    return sorted(name for name in checksums if name == TRAINER or (kept and name.startswith(STATE + "/")))


class Checked(NamedTuple):
    """CRC-32 of the bytes [start, stop) of one tensor of a file, or of a file without tensors (tensor "")."""

    file: str
    tensor: str
    start: int
    stop: int
    crc: int


def checksum_fault(folder: Path, names: Sequence[str]) -> str | None:
    """The first checksum in the named files that differs, as a message; None if all agree. Reads the whole files."""
    checked, fault = check_share(folder, names, 0, 1)
    return fault or share_fault(folder, names, checked)


def check_share(folder: Path, names: Sequence[str], share: int, shares: int) -> tuple[list[Checked], str | None]:
    """Read one of `shares` equal shares of the named files' bytes. Returns their checksums and what can't be read."""
    sizes = json.loads((folder / MANIFEST).read_text())["files"]
    if unknown := [name for name in names if name not in sizes]:
        return [], f"{MANIFEST} lacks the size of {unknown[0]}"
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
    """As `checksum_fault`, from the checksums of all shares."""
    stops: dict[tuple[str, str], int] = {}
    found: dict[tuple[str, str], int] = {}
    for file, tensor, start, stop, crc in sorted(checked):
        key = file, tensor
        if start == stops.get(key, 0):
            found[key] = joined_crc(found.get(key, 0), crc, stop - start)
            stops[key] = stop
    expected = json.loads((folder / MANIFEST).read_text()).get("checksums", {})
    for name in names:
        for tensor, crc in expected.get(name, {}).items():
            if found.get((name, tensor), 0) != crc:
                return f"{name} does not match its checksum" + (f", at {tensor}" if tensor else "")
    return None


def _checked(folder: Path, name: str, low: int, high: int) -> Iterator[Checked]:
    """Checksums of the bytes [low, high) of a file, tensor by tensor."""
    path = folder / name
    if path.suffix != ".safetensors":
        yield Checked(name, "", low, high, zlib.crc32(path.read_bytes()[low:high]))
        return
    files = TensorFiles([path])
    for tensor in files.names:
        begins, ends = files.place(tensor)
        start, stop = max(low, begins) - begins, min(high, ends) - begins
        if start < stop:
            yield Checked(name, tensor, start, stop, files.checksum(tensor, start, stop))


def _checksums(path: Path) -> dict[str, int]:
    """CRC-32 of every tensor of a safetensors file by name, or of any other file as a whole under the name ""."""
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
    """Write the sizes of the folder's files, the given checksums and that of trainer.json.

    README.md is left out, because users edit it before they publish a folder.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / README)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    whole = {TRAINER: _checksums(folder / TRAINER)} if (folder / TRAINER).is_file() else {}
    write_json(folder / MANIFEST, {"files": sizes, "checksums": {**checksums, **whole}})


def finish(unfinished: Path, final: Path, last: bool) -> None:
    """Flush, check and rename a written folder, then move `latest` (and, if `last`, `step_final`) to it.

    After the rename the checkpoint is saved, so a later failure is only a warning.
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
    with _may_fail(f"{final} is saved, but may be lost if this host loses power now"):
        _flush(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def mark_final(final: Path) -> None:
    """Point `step_final` to a run's last checkpoint: a link, or a text file with its name if links are not possible."""
    pointer = final.parent / FINAL
    try:
        _replace(pointer, lambda path: path.symlink_to(final.name))
    except OSError as error:
        with _may_fail(f"{final} is the final checkpoint, but {FINAL} could not be moved to it"):
            _replace(pointer, lambda path: path.write_text(final.name + "\n"))
            logger.warning("%s is the final checkpoint; %s is a text file that names it (%s)", final, pointer, error)


@contextmanager
def _may_fail(what: str) -> Iterator[None]:
    """Turn an OSError inside into a warning."""
    try:
        yield
    except OSError as error:
        logger.warning("%s (%s)", what, error)


def flush_all(folder: Path) -> None:
    """Flush a folder and everything in it to disk."""
    for path in (*folder.rglob("*"), folder):
        _flush(path)


def sweep(checkpoint_dir: Path) -> None:
    """Clean up after an interrupted save: remove unfinished folders, restore a checkpoint that was being replaced."""
    for path in _entries(checkpoint_dir):
        match = _HIDDEN.fullmatch(path.name)
        if match is None:
            continue  # files of other programs, or an export in progress
        final = path.with_name(match[2])
        if match[1] == REPLACED and not final.exists():
            path.rename(final)
            continue
        if match[1] == UNFINISHED:
            logger.info("removing %s, left by an interrupted save", path)
        shutil.rmtree(path, ignore_errors=True)


def thin_out(checkpoint_dir: Path, keep_last: int, delete_previous_state: bool, saved: Path | None = None) -> None:
    """Keep the `keep_last` newest checkpoints (0: all); with `delete_previous_state` older ones keep only weights.

    The newest complete training state always stays, and so does `saved`, the one just written: a run that resumed from
    an older checkpoint saves below the highest number.
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
        final.unlink()  # of an earlier, shorter run whose last checkpoint was just removed


def _remove(folder: Path, aside: Path) -> None:
    """Rename a folder to `aside` and remove it, so that an interruption leaves nothing that looks damaged."""
    shutil.rmtree(aside, ignore_errors=True)
    with suppress(OSError):  # missing, or tried again after the next save
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _temporary_name(name: str) -> str:
    """The name under which a small file is written before it replaces `name`."""
    return f".{name}.new"


def _replace(path: Path, write: Any) -> None:
    temporary = path.with_name(_temporary_name(path.name))
    temporary.unlink(missing_ok=True)
    try:
        write(temporary)
        if not temporary.is_symlink():
            _flush(temporary)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP) or not path.is_dir():
            raise  # some file systems can't flush folders; flushing a file must work
    finally:
        os.close(descriptor)
