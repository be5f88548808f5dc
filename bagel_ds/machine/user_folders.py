"""The user's folders: home and caches, and what takes their place where they can't be used.

Guarantees: after `settle_user_folders` the folders that this package, torch, DeepSpeed, Triton and the Hugging Face
libraries write to without being asked are folders that can be written, also for a user without a home folder, without
an entry in the passwd file or with a full or read-only home. What the user has set and what works stays. The
replacement belongs to this user, who alone can write to it, because compiled code is loaded from it.
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

_PROBE_BYTES = 4096  # a full disk or quota still makes empty files


def settle_user_folders() -> list[str]:
    """Set HOME, LOGNAME and cache variables of this process where needed; what was changed and why, in words.

    Call before torch and DeepSpeed are imported. A second call finds all well.
    """
    _settle_name()
    notes = []
    home = _home()
    if home is None or not home.is_dir():
        os.environ["HOME"] = str(replacement())
        lacking = "no home folder is known" if home is None else f"the home folder {home} does not exist"
        notes.append(f"{lacking}: {replacement()} takes its place")
    lost = {}
    for variable, folder, name in _written_folders():
        if fault := write_fault(folder):
            _keep_hub_models(variable)
            os.environ[variable] = str(replacement() / name)
            lost[str(folder)] = fault
    if lost:
        reasons = ", ".join(dict.fromkeys(lost.values()))
        notes.append(f"{' and '.join(lost)} can't be written ({reasons}): caches lie in {replacement()}")
    return notes


def expanded(path: str) -> str:
    """The path that a shell would make of `~/...` and `$NAME/...`; an unset variable stays as it is written."""
    try:
        return os.path.expanduser(os.path.expandvars(path))
    except ValueError:  # no name of a user or file, such as one with a NUL byte
        return path


def cache_folder() -> Path:
    """Where caches of this user lie; below HOME unless XDG_CACHE_HOME says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or (_home() or replacement()) / ".cache")


def extensions_folder() -> Path:
    """Below this torch keeps compiled extensions."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache_folder() / "torch_extensions")


def replacement() -> Path:
    """The folder that stands in for those that can't be used; the same for all processes of this user and host."""
    try:
        base = Path(tempfile.gettempdir()) / f"bagel_ds-{os.getuid()}"
        folder, number = base, 0
        while not _is_private(folder):  # others have made it or could write to it
            number += 1
            folder = base.with_name(f"{base.name}-{number}")
    except OSError as error:
        raise UserError(
            f"neither the home folder nor one for temporary files can be written ({error.strerror or error}): set HOME "
            "or TMPDIR to a folder you may write"
        ) from None
    return folder


def write_fault(folder: Path) -> str | None:
    """Why nothing can be written to `folder`, or to the folder that it would have to be made in; None where it can."""
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
    """Variable that moves it, folder as things stand, and its name in the replacement."""
    yield "XDG_CACHE_HOME", cache_folder(), "cache"
    yield "TORCH_EXTENSIONS_DIR", extensions_folder(), "torch_extensions"
    if "TRITON_CACHE_DIR" not in os.environ:
        yield "TRITON_HOME", Path(os.environ.get("TRITON_HOME") or _home() or replacement()) / ".triton", ""


def _keep_hub_models(variable: str) -> None:
    """Models and tokens that can be read stay in use where the cache around them moves."""
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
    """Libraries name folders after the user, and fail for one that has no name."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"user{os.getuid()}"


def _is_private(folder: Path) -> bool:
    """Make the folder; whether it is this user's own and nobody else can write, or has written, to it."""
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
