"""The hosts of a hostfile: can `deepspeed` reach them, are they equal, and what does each of them lack?

Guarantees: hosts are asked at the same time, over ssh as `deepspeed` starts ranks (the same Python under the same path,
the same folder, PDSH_SSH_ARGS_APPEND, the variables of .deepspeed_env). Nothing asks for a password. A host that does
not answer is named and costs at most `_SECONDS`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from bagel_ds.doctor.environment import Finding, Verdict
from bagel_ds.errors import UserError

_CONNECT_SECONDS = 10
_SECONDS = 300.0  # for a host's checks, from a slow network disk
# What `deepspeed` hands to other hosts (deepspeed/launcher/runner.py), besides the lines of .deepspeed_env.
_HANDED_ON = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
_SHARED = "bagel_ds-shared"


class Host(NamedTuple):
    name: str
    slots: int


class Answer(NamedTuple):
    """What a host's own doctor said, or `fault`: why it did not."""

    report: dict[str, Any]
    shared: bool | None  # whether it sees the file in the shared folder
    fault: Finding | None


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a DeepSpeed hostfile: lines of `name slots=N`. Raises `UserError`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as fault:
        said = fault.strerror if isinstance(fault, OSError) else "not a text file"
        raise UserError(f"--hostfile {path} can't be read ({said}); expected lines such as `node1 slots=8`") from None
    hosts: list[Host] = []
    for number, line in enumerate(lines, 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        entry = re.fullmatch(r"(\S+)\s+slots=(\d+)", line)
        if entry is None or not int(entry[2]):
            raise UserError(f"{path}:{number}: {line!r} is not a host; expected a line such as `node1 slots=8`")
        if entry[1] in [host.name for host in hosts]:
            raise UserError(f"{path}:{number}: {entry[1]} is there twice; give each host one line")
        hosts.append(Host(entry[1], int(entry[2])))
    if not hosts:
        raise UserError(f"{path} names no host; expected lines such as `node1 slots=8`")
    return hosts


def host_findings(
    hosts: Sequence[Host],
    words: Sequence[str],
    versions: Mapping[str, str | None],
    port: int | None = None,
    shared: Path | None = None,
) -> tuple[list[Finding], dict[str, dict[str, Any]]]:
    """What is to say about each host, and the reports of those that answered.

    `words` are passed to the doctor of each; `versions` are this host's; `shared` is a folder that all must share.
    """
    with ExitStack() as stack:
        seen = None if shared is None else stack.enter_context(_file_in(shared))
        with ThreadPoolExecutor(min(32, len(hosts))) as pool:
            answers = list(pool.map(lambda host: _ask(host, words, port, seen), hosts))
    findings = []
    for host, answer in zip(hosts, answers):
        findings += _findings(host, answer, versions, shared)
    return findings, {host.name: answer.report for host, answer in zip(hosts, answers) if answer.fault is None}


def _findings(host: Host, answer: Answer, versions: Mapping[str, str | None], shared: Path | None) -> list[Finding]:
    if answer.fault is not None:
        return [answer.fault]
    found, name = [], f"host {host.name}"
    theirs = answer.report["versions"]
    others = {key: (theirs.get(key), own) for key, own in versions.items() if theirs.get(key) != own}
    if others:
        said = ", ".join(
            f"{key} {there or 'missing'} (here {own or 'missing'})" for key, (there, own) in others.items()
        )
        found.append(Finding(name, Verdict.FAULT, f"has {said}", "install the same versions on every host"))
    if answer.shared is False:
        remedy = "pass a --checkpoint_dir on a file system that all hosts share, under the same path"
        found.append(Finding(name, Verdict.FAULT, f"does not see {shared} of this host", remedy))
    gpus = int(answer.report["gpus"])
    if gpus and gpus < host.slots:
        remedy = "write its number of GPUs into the hostfile"
        found.append(Finding(name, Verdict.FAULT, f"has {gpus} GPU(s), but slots={host.slots}", remedy))
    if not found:
        found.append(Finding(name, Verdict.GOOD, f"reached, the same versions, {gpus} GPU(s), slots={host.slots}"))
    for each in answer.report["findings"]:
        if each["verdict"] != Verdict.GOOD.value:
            found.append(Finding(f"{name}: {each['name']}", Verdict(each["verdict"]), each["message"], each["remedy"]))
    return found


def _ask(host: Host, words: Sequence[str], port: int | None, seen: Path | None) -> Answer:
    look = "" if seen is None else f"test -e {shlex.quote(str(seen))}; echo {_SHARED} $?; "
    doctor = shlex.join(
        [sys.executable, "-m", "bagel_ds.cli.main", "doctor", "--json", "--ranks", str(host.slots), *words]
    )
    folder = shlex.quote(os.getcwd())
    there = f"{look}{_exports()}cd {folder} && exec {doctor}"
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_SECONDS}"]
    options += shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", "")) + (["-p", str(port)] if port else [])
    name = f"host {host.name}"
    try:
        ran = subprocess.run(
            ["ssh", *options, host.name, there],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        return _silent(name, "ssh is not installed here", "apt-get install openssh-client pdsh (as root)")
    except subprocess.TimeoutExpired:
        return _silent(
            name, f"has not finished its checks after {_SECONDS:.0f} s", f"run bagel-ds doctor on {host.name}"
        )
    said = (ran.stderr.strip().splitlines() or ran.stdout.strip().splitlines() or [f"code {ran.returncode}"])[-1]
    if ran.returncode == 255:
        remedy = f"`ssh {host.name} true` must work here without a password (ssh-copy-id, ~/.ssh/config)"
        return _silent(name, f"can't be reached by ssh: {said}", remedy)
    shared, _, text = ran.stdout.rpartition(f"{_SHARED} ")
    is_shared = None if seen is None else text[:1] == "0"
    try:
        report = json.loads(text[text.index("{") :])
        assert {"versions", "findings", "gpus"} <= report.keys()
    except (ValueError, AssertionError):
        remedy = f"install bagel_ds there under the same path: {sys.executable}, in {os.getcwd()}"
        return _silent(name, f"was reached, but bagel-ds doctor does not run there: {said}", remedy)
    return Answer(report, is_shared, None)


def _silent(name: str, message: str, remedy: str) -> Answer:
    return Answer({}, None, Finding(name, Verdict.FAULT, message, remedy))


def _exports() -> str:
    """The variables that `deepspeed` would set there, as words of a shell."""
    handed = {name: shlex.quote(value) for name, value in os.environ.items() if name.startswith(_HANDED_ON)}
    file_name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    for folder in (Path.home(), Path()):
        path = folder / file_name
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                name, equals, value = line.strip().partition("=")
                if equals and re.fullmatch(r"[A-Za-z_]\w*", name):
                    handed[name] = value if value[:1] in "'\"" else shlex.quote(value)
    return "".join(f"export {name}={value}; " for name, value in handed.items())


@contextmanager
def _file_in(folder: Path) -> Iterator[Path | None]:
    """A file in the folder, which is made if needed; None if nothing can be written there, which is another finding."""
    made = not folder.exists()
    path = folder.resolve() / f".bagel_ds_shared_{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError:
        yield None
        return
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
        if made and not any(folder.iterdir()):
            folder.rmdir()
