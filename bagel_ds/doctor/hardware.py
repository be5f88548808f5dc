"""What `bagel-ds doctor` shows beyond the checks that a run makes: memory, limits, toolkits, networks.

Guarantees: nothing here imports torch or touches a GPU. What training works without is never a fault.
"""

from __future__ import annotations

import importlib
import os
import re
import resource
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # DeepSpeed brings it

from bagel_ds.doctor.environment import Finding, Verdict, installed_version, nvidia_smi
from bagel_ds.machine.user_folders import extensions_folder, write_fault
from bagel_ds.units import GIB, MIB
from bagel_ds.zero.ops import Op, is_built

_BUSY_GPU = GIB  # a display and the driver take less
_SMALL_TEMPORARY = GIB  # compilers write there
_LITTLE_RAM = 32 * GIB  # the least that any preset needs for the 7B (docs/low_memory.md)
_INFINIBAND = Path("/sys/class/infiniband")
_MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


# ------------------------------------------------------------------------------------------------------------- memory
def gpu_memory_findings() -> list[Finding]:
    """The memory of each GPU, and whether another process holds some of it."""
    asked = nvidia_smi("--query-gpu=index,name,memory.total,memory.used", "--format=csv,noheader,nounits")
    findings = []
    for line in asked.splitlines():
        number, name, *sizes = (part.strip() for part in line.split(","))
        if len(sizes) != 2 or not all(size.isdecimal() for size in sizes):  # "[N/A]" on some devices
            continue
        total, used = (int(size) * MIB for size in sizes)
        said = f"{name}, {total / GIB:.0f} GiB"
        if used > _BUSY_GPU:
            message = f"{said}, of which {used / GIB:.0f} GiB are in use"
            findings.append(
                Finding(f"GPU {number}", Verdict.NOTE, message, "nvidia-smi shows by which process; end it")
            )
        else:
            findings.append(Finding(f"GPU {number}", Verdict.GOOD, said))
    return findings


def ram_finding() -> Finding:
    """The host's memory, or the container's share of it."""
    memory = psutil.virtual_memory()
    total, limit = memory.total, _memory_limit()
    said = f"{memory.available / GIB:.0f} of {total / GIB:.0f} GiB are available"
    if limit is not None and limit < total:
        total = limit
        said += f", and this container's limit is {limit / GIB:.0f} GiB"
    if total < _LITTLE_RAM:
        remedy = "the 7B needs at least 32 GiB with any preset: bagel-ds memory shows how much your run needs"
        return Finding("RAM", Verdict.NOTE, said, remedy)
    return Finding("RAM", Verdict.GOOD, said)


def _memory_limit() -> int | None:
    for path in _MEMORY_LIMITS:
        try:
            word = path.read_text().strip()
        except OSError:
            continue
        return int(word) if word.isdecimal() else None
    return None


def locked_memory_finding() -> Finding:
    """`ulimit -l`: NCCL registers memory with InfiniBand adapters, which counts as locked."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY:
        return Finding("ulimit -l", Verdict.GOOD, "unlimited")
    said = f"{limit // 1024} KiB of memory may be locked"
    if not any(_INFINIBAND.glob("*")):
        return Finding("ulimit -l", Verdict.GOOD, f"{said}; only InfiniBand would need more, and there is none")
    return Finding(
        "ulimit -l",
        Verdict.NOTE,
        f"{said}, but NCCL over InfiniBand needs more than that (it fails with ibv_reg_mr)",
        "set `ulimit -l unlimited` for sshd or Slurm, or docker run --ulimit memlock=-1",
    )


def temporary_finding() -> Finding:
    """TMPDIR, in which compilers and Python write."""
    try:
        folder = Path(tempfile.gettempdir())
    except OSError as error:
        return Finding("TMPDIR", Verdict.FAULT, error.strerror or str(error), "set TMPDIR to a folder you can write to")
    free = shutil.disk_usage(folder).free
    if fault := write_fault(folder):
        return Finding("TMPDIR", Verdict.FAULT, f"{folder} can't be written ({fault})", "set TMPDIR to another folder")
    if free < _SMALL_TEMPORARY:
        said = f"{folder} has {free / MIB:.0f} MiB free"
        return Finding("TMPDIR", Verdict.NOTE, said, "compiling may need 1 GiB: free space, or set TMPDIR")
    return Finding("TMPDIR", Verdict.GOOD, f"{folder} has {free / GIB:.0f} GiB free")


# --------------------------------------------------------------------------------------------------- optional software
def op_findings(ops: Sequence[Op]) -> list[Finding]:
    """Whether each of DeepSpeed's C++ ops is built. Whether it can be is `compiler_finding`'s to say."""
    return [
        Finding(
            op.name,
            Verdict.GOOD,
            f"{op.purpose}: "
            + (f"built in {extensions_folder()}" if is_built(op) else "not built yet, see --build_ops"),
        )
        for op in ops
    ]


def libaio_finding() -> Finding:
    return Finding("libaio", Verdict.GOOD, "not needed: bagel_ds reads and writes swap files itself")


def toolkit_finding() -> Finding:
    """nvcc, which compiles flash-attn. Training needs none of it."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named and not Path(named, "bin", "nvcc").exists():
        return Finding(
            "CUDA toolkit",
            Verdict.NOTE,
            f"CUDA_HOME is {named}, which has no bin/nvcc",
            "set it to the toolkit's folder, such as /usr/local/cuda, or unset it",
        )
    command = str(Path(named, "bin", "nvcc")) if named else shutil.which("nvcc")
    if command is None:
        return Finding(
            "CUDA toolkit", Verdict.GOOD, "none (no CUDA_HOME, no nvcc); only compiling flash-attn needs one"
        )
    ran = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
    version = re.search(r"release (\d+\.\d+)", ran.stdout)
    return Finding("CUDA toolkit", Verdict.GOOD, f"{version[1] if version else 'unknown version'} ({command})")


def flash_finding() -> Finding:
    """A flash-attn that can't be imported breaks transformers, which tries to."""
    version = installed_version("flash-attn")
    if version is None:
        return Finding("flash-attn", Verdict.GOOD, "not installed, not needed: attention runs on torch's own kernels")
    try:
        importlib.import_module("flash_attn")
    except Exception as error:  # of any kind: undefined symbols, a missing CUDA library
        return Finding(
            "flash-attn",
            Verdict.NOTE,
            f"flash-attn {version} can't be imported: {str(error).splitlines()[0][:200]}",
            "it was built for another torch: pip uninstall flash-attn, or build it again "
            "(pip install --no-build-isolation --force-reinstall --no-deps flash-attn)",
        )
    return Finding("flash-attn", Verdict.GOOD, version)


# ----------------------------------------------------------------------------------------------------------- networks
def network_finding() -> Finding:
    """The interfaces that hosts could meet over, and whether those that the user names exist."""
    addresses, states = psutil.net_if_addrs(), psutil.net_if_stats()
    for variable, exists in (("GLOO_SOCKET_IFNAME", _exact), ("NCCL_SOCKET_IFNAME", _prefix)):
        for name in filter(None, os.environ.get(variable, "").split(",")):
            if not exists(name, addresses):
                return Finding(
                    "networks",
                    Verdict.FAULT,
                    f"{variable} is {name}, but this host has {', '.join(sorted(addresses))}",
                    f"unset {variable}, or name one of these",
                )
    shown = []
    for name, held in sorted(addresses.items()):
        ip = next((each.address for each in held if each.family == socket.AF_INET), None)
        if ip and not ip.startswith("127.") and name in states and states[name].isup:
            shown.append(f"{name} {ip}")
    if any(_INFINIBAND.glob("*")):
        shown.append("InfiniBand " + " ".join(sorted(path.name for path in _INFINIBAND.glob("*"))))
    return Finding("networks", Verdict.GOOD, ", ".join(shown) or "none: this host can only train by itself")


def _exact(name: str, known: object) -> bool:
    return name in known  # type: ignore[operator]


def _prefix(name: str, known: dict[str, object]) -> bool:
    """As NCCL reads it: a prefix, or `=` and a name; what begins with ^ excludes."""
    if name.startswith("^"):
        return True
    if name.startswith("="):
        return name[1:] in known
    return any(each.startswith(name) for each in known)
