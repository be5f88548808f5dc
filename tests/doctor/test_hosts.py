"""A hostfile, and what is said about each host. `ssh` is a script here; test_two_hosts.py goes over a real one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bagel_ds.doctor import hosts
from bagel_ds.doctor.environment import Finding, Verdict
from bagel_ds.doctor.hosts import Host, host_findings, read_hostfile
from bagel_ds.errors import UserError

VERSIONS = {"torch": "2.13.0", "bagel_ds": "0.1.0"}
GOOD = {"versions": VERSIONS, "gpus": 8, "findings": []}


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_text("# two hosts\nnode1 slots=8\n\n  node2   slots=4  # smaller\n")
    assert read_hostfile(path) == [Host("node1", 8), Host("node2", 4)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("node1 slots=8\nnode2\n", "hostfile:2: 'node2' is not a host; expected a line such as `node1 slots=8`"),
        ("node1 slots=0\n", "hostfile:1: 'node1 slots=0' is not a host"),
        ("node1 slots=8\nnode1 slots=8\n", "hostfile:2: node1 is there twice"),
        ("# nothing\n", "names no host"),
        (None, "can't be read (No such file or directory)"),
    ],
)
def test_a_bad_hostfile_is_one_message_with_the_line(content: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as caught:
        read_hostfile(path)
    assert said in str(caught.value)


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An `ssh` first in PATH, whose script is `tmp_path/<host>`; it runs with the command as $1 and $2 the options."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "ssh"
    script.write_text(
        f'#!/bin/sh\noptions=""\nwhile [ $# -gt 2 ]; do options="$options $1"; shift; done\n. {tmp_path}/"$1"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.delenv("PDSH_SSH_ARGS_APPEND", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ask(ssh: Path, scripts: dict[str, str], slots: int = 8, **more: object) -> list[Finding]:
    for name, script in scripts.items():
        (ssh / name).write_text(script)
    return host_findings([Host(name, slots) for name in scripts], ["--no_speed"], VERSIONS, **more)[0]  # type: ignore[arg-type]


def answers(report: dict[str, object]) -> str:
    return f"cat <<'EOF'\nWelcome to this cluster!\n{json.dumps(report)}\nEOF\n"


def test_each_host_is_named_with_what_keeps_it_from_the_run(ssh: Path) -> None:
    warned = {"name": "/dev/shm", "verdict": "warn", "message": "has only 64 MiB", "remedy": ""}
    found = ask(
        ssh,
        {
            "good": answers(GOOD),
            "old": answers({**GOOD, "versions": {"torch": "2.11.0"}}),
            "small": answers({**GOOD, "gpus": 4}),
            "warned": answers({**GOOD, "findings": [warned]}),
            "away": "echo 'ssh: connect to host away port 22: No route to host' >&2; exit 255",
            "bare": "echo 'python: No such file or directory' >&2; exit 127",
        },
    )
    told = {finding.name: finding for finding in found}
    assert told["host good"].verdict is Verdict.GOOD
    assert "torch 2.11.0 (here 2.13.0), bagel_ds missing (here 0.1.0)" in told["host old"].text
    assert "has 4 GPU(s), but slots=8" in told["host small"].text
    assert told["host warned"].verdict is Verdict.GOOD
    assert told["host warned: /dev/shm"].verdict is Verdict.NOTE
    assert "can't be reached by ssh: ssh: connect to host away port 22: No route to host" in told["host away"].message
    assert "`ssh away true` must work" in told["host away"].remedy
    assert "does not run there: python: No such file" in told["host bare"].message
    faults = {finding.name for finding in found if finding.verdict is Verdict.FAULT}
    assert faults == {"host old", "host small", "host away", "host bare"}


def test_hosts_are_asked_as_deepspeed_starts_them(ssh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-i key")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth 0")
    (ssh / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth1\nnot a variable\n")
    ask(ssh, {"node": f'echo "$options" > {ssh}/options; echo "$2" > {ssh}/command\n{answers(GOOD)}'}, port=2222)
    options, command = (ssh / "options").read_text(), (ssh / "command").read_text()
    assert "BatchMode=yes" in options and "-i key -p 2222" in options
    assert "export NCCL_SOCKET_IFNAME='eth 0'; " in command and "export GLOO_SOCKET_IFNAME=eth1; " in command
    assert f"cd {ssh} && exec {hosts.sys.executable} -m bagel_ds.cli.main doctor --json --ranks 8 --no_speed" in command


def test_a_folder_that_a_host_does_not_share_is_a_fault(ssh: Path) -> None:
    look = 'eval "${2%%cd *}"\n'
    shared = ask(ssh, {"same": look + answers(GOOD)}, shared=ssh / "checkpoints")
    assert [finding.verdict for finding in shared] == [Verdict.GOOD]
    elsewhere = f"echo {hosts._SHARED} 1\n"
    (found,) = ask(ssh, {"other": elsewhere + answers(GOOD)}, shared=ssh / "checkpoints")
    assert found.verdict is Verdict.FAULT and f"does not see {ssh / 'checkpoints'}" in found.text
    assert "--checkpoint_dir on a file system that all hosts share" in found.remedy
    assert not (ssh / "checkpoints").exists()


def test_without_ssh_and_with_a_host_that_hangs_it_says_so(ssh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "_SECONDS", 0.5)
    (found,) = ask(ssh, {"slow": "exec sleep 20"})
    assert "has not finished its checks after" in found.text
    monkeypatch.setenv("PATH", str(ssh / "nowhere"))
    (found,) = ask(ssh, {"any": ""})
    assert "ssh is not installed here" in found.text
