"""Two hosts on this machine: network, process, mount and UTS namespaces, joined by a veth pair, with an sshd in each.

`TwoHosts` starts them and ends everything in them. Both see this machine's files, as over a shared file system, but
each has its own name, processes, network, /dev/shm and id of its kernel, as if it had one of its own. Names, keys and
client settings of ssh lie in a folder of the test that is mounted over /etc/ssh and /etc/hosts, so `ssh node2` works as
on a cluster. Needs root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

NAMES = ("node1", "node2")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
SSHD = "/usr/sbin/sshd"
PATIENCE = 30.0  # seconds for a host to start


def lacking() -> str | None:
    """Why this machine can't have them; None if it can."""
    if os.environ.get("BAGEL_NO_NAMESPACES"):
        return "BAGEL_NO_NAMESPACES is set"
    if os.geteuid() != 0:
        return "network namespaces need root"
    programs = ("unshare", "nsenter", "ip", "ssh", "ssh-keygen", "pdsh", SSHD)
    if missing := [program for program in programs if shutil.which(program) is None]:
        return f"{', '.join(missing)} not installed (apt-get install openssh-server iproute2 pdsh)"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--pid", "--mount", "--fork", "--mount-proc", "true"],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"namespaces are not allowed here: {tried.stderr.strip()}" if tried.returncode else None


class TwoHosts:
    """`folder` holds their settings. Use it as a context manager."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._holders: list[subprocess.Popen[bytes]] = []
        self._inits: list[int] = []

    def __enter__(self) -> Self:
        self._write_settings()
        try:
            for name in NAMES:
                self._start(name)
            _run("ip", "link", "add", "eth0", "netns", str(self._inits[0]), "type", "veth", "peer", "name", "eth0",
                 "netns", str(self._inits[1]))  # fmt: skip
            for index, address in enumerate(ADDRESSES):
                for words in (["addr", "add", f"{address}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):
                    _run(*self.command(index, ["ip", *words]))
                _run(*self.command(index, [SSHD, "-E", str(self._folder / f"sshd-{NAMES[index]}.log")]))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for holder in self._holders:
            holder.kill()  # and with it, by --kill-child, the first process of the host and so all others
            holder.wait()

    def command(self, host: int, words: Sequence[str]) -> list[str]:
        """A command that runs `words` on a host, in this process's working folder and environment."""
        pid = str(self._inits[host])
        return ["nsenter", "-t", pid, "--net", "--uts", "--pid", "--mount", f"--wdns={os.getcwd()}", *words]

    def lose(self, host: int) -> None:
        """The host loses power: its network is gone before any of its processes could close a connection."""
        _run(*self.command(host, ["ip", "link", "set", "eth0", "down"]))
        self._holders[host].kill()
        self._holders[host].wait()

    def _start(self, name: str) -> None:
        settings = self._folder
        script = (
            f"set -e; hostname {name}; ip link set lo up; mount --make-rprivate /; mount -t tmpfs tmpfs /dev/shm; "
            f"mount -t tmpfs tmpfs /run; mkdir /run/sshd; mount --bind {settings}/ssh /etc/ssh; "
            f"mount --bind {settings}/hosts /etc/hosts; "
            f"cat /proc/sys/kernel/random/uuid > {settings}/{name}.boot_id; "
            f"mount --bind {settings}/{name}.boot_id /proc/sys/kernel/random/boot_id; "
            f"touch {settings}/{name}.ready; exec sleep infinity"
        )
        namespaces = ["--net", "--uts", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
        holder = subprocess.Popen(["unshare", *namespaces, "bash", "-c", script])
        self._holders.append(holder)
        deadline = time.monotonic() + PATIENCE
        while not (settings / f"{name}.ready").exists():
            assert holder.poll() is None and time.monotonic() < deadline, f"{name} does not start"
            time.sleep(0.05)
        (init,) = psutil.Process(holder.pid).children()
        self._inits.append(init.pid)

    def _write_settings(self) -> None:
        folder = self._folder / "ssh"
        folder.mkdir(parents=True)
        for key in ("host", "user"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
        (folder / "sshd_config").write_text(
            "HostKey /etc/ssh/host\nAuthorizedKeysFile /etc/ssh/user.pub\nStrictModes no\nUsePAM no\n"
            "PermitRootLogin prohibit-password\nPasswordAuthentication no\nPidFile none\n"
        )
        (folder / "ssh_config").write_text(
            "IdentityFile /etc/ssh/user\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n"
            "ServerAliveInterval 2\nServerAliveCountMax 3\n"
        )
        entries = [f"{address} {name}" for address, name in zip(ADDRESSES, NAMES)]
        (self._folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *entries, ""]))


def write_hostfile(path: Path, slots: int = 1) -> Path:
    path.write_text("".join(f"{name} slots={slots}\n" for name in NAMES))
    return path


def remote_environment(path: Path, environment: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    """`environment` with DS_ENV_FILE, a file of the variables that `deepspeed` sets on every host."""
    path.write_text("".join(f"{name}={environment[name]}\n" for name in names if name in environment))
    return {**environment, "DS_ENV_FILE": str(path)}


def _run(*words: str) -> None:
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, f"{' '.join(words)}: {ran.stderr}"
