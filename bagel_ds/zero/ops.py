"""DeepSpeed's C++ ops that a run needs, compiled before anything is loaded.

Guarantees: one process of a user compiles at a time (on all hosts that share the folder, if its file system has locks),
and the others use the result; a process that waits says for what. An op that can't be built is one `UserError` with the
end of the compiler's output. A lock file of torch that no running process holds is removed and logged: torch would wait
for it forever, without a message.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from bagel_ds.errors import UserError
from bagel_ds.machine.liveness import timed_elsewhere
from bagel_ds.machine.user_folders import extensions_folder
from bagel_ds.machine.waiting import waiting_for
from bagel_ds.zero.config.settings import SPLIT_MASTERS, offload_device
from bagel_ds.zero.split.kernel import kernel, kernel_name

logger = logging.getLogger("bagel_ds")

_LOCK = ".bagel_ds_lock"
_USUAL = "1 to 3 minutes, once on this machine"
_SHOWN_LINES, _SHOWN_WIDTH = 15, 200  # of a compiler's output
_COMMAND = re.compile(r"\[\d+/\d+\] |FAILED: |ninja: ")  # ninja's own lines, which are long and say little


class Op(NamedTuple):
    """`name` is also that of its folder and file; `load` compiles it if needed."""

    name: str
    purpose: str
    instead: str  # how to do without it, for the message; "" if the run does without it by itself
    load: Callable[[], object]
    whose: str = "DeepSpeed's"

    @property
    def title(self) -> str:
        return f"{self.whose} {self.name}"


def needed_ops(ds_config: dict[str, Any]) -> list[Op]:
    """Of a resolved configuration."""
    if offload_device(ds_config, "optimizer") == "none":
        return []
    return [_split_adam() if SPLIT_MASTERS in ds_config else CPU_ADAM]


def every_op() -> list[Op]:
    """What any run needs."""
    return [CPU_ADAM, _split_adam()]


def _split_adam() -> Op:
    return Op(kernel_name(), "AdamW of split masters in host memory", "", kernel, "the kernel")


def load_op(builder: str) -> object:
    """The module of one of DeepSpeed's builders, compiled if needed. DeepSpeed keeps it for later calls."""
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().create_op_builder(builder).load()


CPU_ADAM = Op(
    "cpu_adam",
    "AdamW in host memory",
    "pass a --ds_config that keeps the optimizer on the GPUs, such as zero3.json",
    lambda: load_op("CPUAdamBuilder"),
)


def is_built(op: Op) -> bool:
    """Whether it came compiled with DeepSpeed, or an earlier run has compiled it."""
    from deepspeed.git_version_info import installed_ops

    version = f"py{sys.version_info.major}{sys.version_info.minor}"
    folders = [extensions_folder(), *extensions_folder().glob(f"{version}*")]
    return bool(installed_ops.get(op.name)) or any((folder / op.name / f"{op.name}.so").is_file() for folder in folders)


def build(ops: Sequence[Op]) -> None:
    """Load every op in this process, compiling it if needed. Raises `UserError`."""
    find_ninja()
    for op in ops:
        with _alone(op):
            remove_stale_locks(extensions_folder(), op.name)
            with timed_elsewhere(), waiting_for(f"{op.title} to be compiled", _USUAL):
                if not is_built(op):
                    logger.info("compiling %s (%s) into %s: %s", op.title, op.purpose, extensions_folder(), _USUAL)
                try:
                    op.load()
                except Exception as error:  # of any kind: torch's, a compiler's, the file system's
                    raise UserError(_failure(op, error)) from None


def find_ninja() -> str | None:
    """The build tool's path. If PATH has none (an environment without `activate`), adds the one beside this Python."""
    beside = Path(sys.executable).parent
    if shutil.which("ninja") is None and shutil.which("ninja", path=str(beside)):
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), str(beside)])
    return shutil.which("ninja")


def remove_stale_locks(folder: Path, name: str) -> list[Path]:
    """Remove the locks that killed builds of the op have left, and return them. Locks of other ops stay."""
    removed = []
    for lock in [
        folder / name / "lock",
        *folder.glob(f"*/{name}/lock"),
    ]:  # or below a folder of versions
        try:
            # torch's lock is an empty file.
            if lock.is_file() and lock.stat().st_size == 0 and not is_open_somewhere(lock):
                lock.unlink()
                removed.append(lock)
                logger.warning("removed %s, left by a build that was killed", lock)
        except FileNotFoundError:  # another process removed it first
            continue
        except OSError as error:
            logger.warning("%s, left by a build that was killed, can't be removed: %s", lock, error.strerror)
    return removed


def is_open_somewhere(path: Path) -> bool:
    """Whether a process of this host has the file open, as a builder has its lock; also if it is gone already."""
    try:
        target = os.stat(path)
    except FileNotFoundError:  # another rank removed it first
        return True
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            found = os.stat(entry)
        except OSError:
            continue
        if (found.st_dev, found.st_ino) == (target.st_dev, target.st_ino):
            return True
    return False


@contextmanager
def _alone(op: Op) -> Iterator[None]:
    """Hold the folder's lock, which ends with the process. Goes on without it if the file system has no locks."""
    folder = extensions_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(
            f"{op.title} can't be compiled into {folder} ({error.strerror}): set TORCH_EXTENSIONS_DIR to a "
            "folder you may write"
        ) from None
    try:
        with timed_elsewhere(), waiting_for(f"another process that compiles into {folder}", _USUAL):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError as error:
                logger.info("can't lock %s (%s): two processes may compile there at once", folder, error.strerror)
        yield
    finally:
        os.close(descriptor)


def _failure(op: Op, error: Exception) -> str:
    lines = [line[:_SHOWN_WIDTH] for line in str(error).splitlines() if line.strip() and not _COMMAND.match(line)]
    said = "\n".join(f"    {line}" for line in lines[-_SHOWN_LINES:])
    return (
        f"{op.title} ({op.purpose}) can't be built on this machine: {type(error).__name__}\n{said}\n"
        f"Remove {extensions_folder()} if another compiler or Python has built there{', or ' * bool(op.instead)}"
        f"{op.instead}."
    )
