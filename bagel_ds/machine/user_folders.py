"""The user's home and cache folders, and the replacement for those that can't be used.

Guarantees: after `settle_user_folders`, every folder that this package, torch, DeepSpeed, Triton and the Hugging Face
libraries write to by default can be written, even if the user has no home folder, no entry in the passwd file, or a
full or read-only home. Working folders and the user's own settings stay. Only this user can write to the replacement,
because compiled code is loaded from it.
"""

from __future__ import annotations

import getpass
import os
import pwd
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from bagel_ds.errors import UserError

_PROBE_BYTES = 4096  # even on a full disk an empty file can be created


def settle_user_folders() -> list[str]:
    """Set HOME, LOGNAME and cache variables of this process if needed. Returns notes on what changed and why.

    Call it before torch and DeepSpeed are imported. A second call changes nothing.
    """
    _settle_name()
    notes = []
    home = _home()
    if home is None or not home.is_dir():
        os.environ["HOME"] = str(replacement())
        lacking = "no home folder is known" if home is None else f"the home folder {home} does not exist"
        notes.append(f"{lacking}: using {replacement()} instead")
    lost = {}
    for variable, folder, name in _written_folders():
        if fault := write_fault(folder):
            _keep_hub_models(variable)
            os.environ[variable] = str(replacement() / name)
            lost[str(folder)] = fault
    if lost:
        reasons = ", ".join(dict.fromkeys(lost.values()))
        notes.append(f"{' and '.join(lost)} can't be written ({reasons}): caches go to {replacement()}")
    return notes


def expanded(path: str) -> str:
    """The path with `~` and `$NAME` expanded as in a shell; an unset variable is left as it is."""
    try:
        return os.path.expanduser(os.path.expandvars(path))
    except ValueError:  # not a possible path, such as one with a NUL byte
        return path


def cache_folder() -> Path:
    """The user's cache folder: XDG_CACHE_HOME, or .cache in the home folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or (_home() or replacement()) / ".cache")


def extensions_folder() -> Path:
    """The folder in which torch keeps compiled extensions."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache_folder() / "torch_extensions")


def replacement() -> Path:
    """The folder to use instead of unusable ones; the same for all processes of this user on this host."""
    try:
        base = Path(tempfile.gettempdir()) / f"bagel_ds-{os.getuid()}"
        folder, number = base, 0
        while not _is_private(folder):
            number += 1
            folder = base.with_name(f"{base.name}-{number}")
    except OSError as error:
        raise UserError(
            f"neither the home folder nor the folder for temporary files can be written ({error.strerror or error}); "
            "set HOME or TMPDIR to a folder that you can write to"
        ) from None
    return folder


def write_fault(folder: Path) -> str | None:
    """Why `folder`, or the nearest existing folder above it, can't be written; None if it can."""
    while not os.path.lexists(folder):
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _written_folders() -> Iterator[tuple[str, Path, str]]:
    """For each folder: the variable that moves it, its present path, its name in the replacement."""
    yield "XDG_CACHE_HOME", cache_folder(), "cache"
    yield "TORCH_EXTENSIONS_DIR", extensions_folder(), "torch_extensions"
    if "TRITON_CACHE_DIR" not in os.environ:
        yield "TRITON_HOME", Path(os.environ.get("TRITON_HOME") or _home() or replacement()) / ".triton", ""


def _keep_hub_models(variable: str) -> None:
    """Keep using the models and tokens in a readable Hugging Face cache when the cache around it moves."""
    held = cache_folder() / "huggingface"
    if variable == "XDG_CACHE_HOME" and "HF_HOME" not in os.environ and held.is_dir():
        os.environ["HF_HOME"] = str(held)


def _home() -> Path | None:
    named = os.environ.get("HOME")
    if not named:
        with suppress(KeyError):
            named = pwd.getpwuid(os.getuid()).pw_dir
    return Path(named) if named else None


def _settle_name() -> None:
    """Give a user without a name one, because libraries name folders after it."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"user{os.getuid()}"


def _is_private(folder: Path) -> bool:
    """Create the folder; whether it belongs to this user and nobody else can write to it."""
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
