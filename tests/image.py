"""A Dockerfile's lines, and a stand-in for Docker that runs them: a Debian root file system and chroot.

Mounts live in a namespace of their own, so they are gone with the process that needed them, however it ends. This
machine's settings of apt and pip (mirrors, certificates, folders with wheels) apply inside, too.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
SUITE = "bookworm"  # the oldest Debian whose Python (3.11) the package takes
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # as Docker sets it
NAMESPACE = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
_OF_THE_MACHINE = "/machine"  # what pip's settings name, inside


class Instruction(NamedTuple):
    word: str
    rest: str


def instructions() -> list[Instruction]:
    """The Dockerfile's instructions, without comments, each on one line."""
    text = re.sub(r"^#.*\n", "", (REPOSITORY / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [Instruction(*line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def missing() -> str | None:
    """Why this machine can't make a root file system, or None."""
    if os.geteuid() != 0:
        return "a root file system is made by root"
    if shutil.which("debootstrap") is None:
        return "debootstrap is not installed"
    mount = ["mount", "-t", "tmpfs", "none", "/mnt"]
    if subprocess.run([*NAMESPACE, *mount], capture_output=True, check=False).returncode != 0:
        return "no mount namespaces here"
    return None


class Image:
    """A root file system at `root` that instructions are applied to, one by one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = "/"
        self.settings, self.shown = _pip_settings()
        self.environment = {"PATH": PATH, "HOME": "/root"}

    def bootstrap(self) -> str | None:
        """FROM, with Debian in CUDA's place. Returns why that can't be had, such as a mirror out of reach, or None."""
        command = ["debootstrap", "--variant=minbase", SUITE, str(self.root), *_mirror()]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        if ran.returncode != 0:
            return f"{shlex.join(command)}: {(ran.stdout + ran.stderr).strip().splitlines()[-1]}"
        for name in ("resolv.conf", "hosts"):
            shutil.copyfile(f"/etc/{name}", self.root / "etc" / name)
        apt = subprocess.run(["apt-config", "dump", "Acquire"], capture_output=True, text=True, check=True).stdout
        (self.root / "etc/dpkg/dpkg.cfg.d/unsafe-io").write_text("force-unsafe-io\n")  # as Docker's images have it
        kept = [line for line in apt.splitlines() if not line.startswith("Acquire::IndexTargets")]
        (self.root / "etc/apt/apt.conf.d/99machine").write_text("\n".join(kept) + "\n")
        for inside, outside in self.shown.items():
            place = self.root / inside.lstrip("/")
            if outside.is_dir():
                place.mkdir(parents=True)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(outside, place)
        return None

    def apply(self, instruction: Instruction) -> None:
        """One instruction after FROM. Raises AssertionError with the end of its output if it fails."""
        word, rest = instruction
        if word == "RUN":
            self.run(rest, timeout=1800)
        elif word == "ENV":
            values = dict(part.split("=", 1) for part in shlex.split(rest))
            self.environment |= {
                name: re.sub(r"\$(\w+)", lambda found: self.environment[found[1]], value)
                for name, value in values.items()
            }
        elif word == "WORKDIR":
            self.folder = rest
            (self.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
        else:
            assert word == "COPY", f"{word} is not known here"
            self._copy(rest.split())

    def run(self, line: str, timeout: float) -> str:
        """Run a shell line inside, as RUN does, and return what it prints."""
        mounts = [
            f"mount --rbind {shlex.quote(str(outside))} {shlex.quote(str(self.root) + inside)}"
            for inside, outside in self.shown.items()
            if outside.is_dir()
        ]
        root = shlex.quote(str(self.root))
        mounts += [f"mount -t proc proc {root}/proc", f"mount --rbind /dev {root}/dev"]
        inner = f"cd {shlex.quote(self.folder)} && {line}"
        script = " && ".join([*mounts, f"exec chroot {root} /bin/sh -c {shlex.quote(inner)}"])
        proxies = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
        ran = subprocess.run(
            [*NAMESPACE, "/bin/sh", "-c", script],
            env=proxies | self.settings | self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert ran.returncode == 0, f"{line} ended with {ran.returncode}:\n{ran.stdout[-3000:]}"
        return ran.stdout

    def _copy(self, names: list[str]) -> None:
        target = self.root / self.folder.lstrip("/") / names[-1]
        for name in names[:-1]:
            source = REPOSITORY / name
            if source.is_dir():  # as COPY does: what is in it, not the folder itself
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target / name if names[-1].endswith("/") else target)


def _mirror() -> list[str]:
    """Where this machine's apt finds Debian; nothing if it doesn't say, for debootstrap's own mirror."""
    lists = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    text = "\n".join(path.read_text() for path in lists if path.is_file())
    found = re.search(r"^(?:URIs:|deb(?: \[.*\])?)\s+(\S+/debian)/?(?:\s|$)", text, re.MULTILINE)
    return [found[1]] if found else []


def _pip_settings() -> tuple[dict[str, str], dict[str, Path]]:
    """pip's settings as variables, and the files and folders that they name, by their place inside."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    settings: dict[str, str] = {}
    for line in sorted(listed.stdout.splitlines(), key=lambda line: line.startswith(":env:")):  # variables win
        name, value = line.split("=", 1)
        if name.startswith(("global.", ":env:.", "install.")):
            settings[f"PIP_{name.rpartition('.')[2].replace('-', '_').upper()}"] = value.strip("'\"")
    shown: dict[str, Path] = {}
    for setting, value in settings.items():
        words = []
        for word in value.split():
            path = Path(word.removeprefix("file://"))
            if path.is_absolute() and path.exists():
                # An index's pages may lead to files beside it.
                outside = path.parent if word.startswith("file://") else path
                inside = f"{_OF_THE_MACHINE}{outside}"
                shown[inside] = outside
                words.append(word.replace(str(outside), inside, 1))
            else:
                words.append(word)
        settings[setting] = " ".join(words)
    return settings, shown
