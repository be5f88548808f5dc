"""Checks what a run needs of this machine: packages, GPU and driver, folders, shared memory, a C++ compiler.

Guarantees: everything is checked before anything is loaded. Each check gives one `Finding`: what was found and, if that
is not enough, what to do. A fault is something that would fail the run later. Nothing is downloaded. Unusable folders
of the user are replaced and noted. A GPU that can't be used is a fault, never a silent run on the CPU.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from packaging.version import Version

import bagel_ds
from bagel_ds.errors import UserError, all_faults
from bagel_ds.machine.device import ACCELERATORS, asked_accelerator
from bagel_ds.machine.user_folders import settle_user_folders, write_fault
from bagel_ds.units import GIB, MIB
from bagel_ds.zero.ops import Op, find_ninja, is_built
from bagel_ds.zero.shm_buffers import BUFFER_BYTES, SUMS

MINIMUM_PYTHON = (3, 11)
# Pillow before 13.0 resizes tall images to other pixels (data/samples/images.py).
MINIMUM_VERSIONS = {"torch": "2.11", "transformers": "5.17", "pillow": "13.0"}
COMPARED_PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "pillow", "tokenizers")  # equal on all hosts
DEEPSPEED_VERSION = "0.19.8"  # exactly: zero/partitions.py reads its internals
MINIMUM_DRIVERS = {12: "525.60.13", 13: "580.65.06"}  # NVIDIA's Linux driver, by major CUDA version of the torch build
SHARED_MEMORY = Path("/dev/shm")
NCCL_SHARED_MEMORY = 2**30  # bytes; NVIDIA's advice for containers (--shm-size=1g)
_DEVICE_FILES = Path("/dev")
_DRIVER_FILE = Path("/proc/driver/nvidia/version")


class Verdict(Enum):
    GOOD = "ok"
    NOTE = "warn"  # the run continues, but the user should know
    FAULT = "fail"


class Finding(NamedTuple):
    """What one check found; `remedy` completes the message of a fault."""

    name: str
    verdict: Verdict
    message: str
    remedy: str = ""

    @property
    def text(self) -> str:
        return f"{self.message}{'; ' if self.remedy else ''}{self.remedy}"


def machine_findings(ranks_here: int) -> list[Finding]:
    """The checks for a run with `ranks_here` ranks on this machine, except the compiler (`compiler_finding`).

    Call it before torch and DeepSpeed are imported, because they read the folders, and before ranks meet, because NCCL
    then takes shared memory.
    """
    packages = package_findings()
    folders = [home_finding(), shared_memory_finding(ranks_here)]
    if any(finding.verdict is Verdict.FAULT for finding in packages):  # torch can't report on the GPU
        return [*packages, *folders]
    return [*packages, *folders, gpu_finding()]


def refuse_faults(findings: Iterable[Finding]) -> list[str]:
    """Raise one `UserError` with all faults. Returns the notes, for the log."""
    faults = [finding.text for finding in findings if finding.verdict is Verdict.FAULT]
    all_faults(faults, "This machine isn't ready for the run:")
    return [finding.text for finding in findings if finding.verdict is Verdict.NOTE]


# ------------------------------------------------------------------------------------------------------- packages
def package_findings() -> list[Finding]:
    """Versions of Python and of the packages that need certain versions."""
    found = ".".join(map(str, sys.version_info[:2]))
    needed = ".".join(map(str, MINIMUM_PYTHON))
    old = sys.version_info < MINIMUM_PYTHON
    findings = [
        _judged("Python", f"Python {found}" + (" is too old" if old else ""), old, f"{needed} or newer is needed")
    ]
    for package, minimum in MINIMUM_VERSIONS.items():
        installed = installed_version(package)
        wrong = installed is None or Version(installed).release < Version(minimum).release
        said = "is not installed" if installed is None else f"is {installed}" + (", which is too old" if wrong else "")
        remedy = f"at least {minimum} is needed: pip install '{package}>={minimum}'"
        findings.append(_judged(package, f"{package} {said}", wrong, remedy))
    installed = installed_version("deepspeed")
    wrong = installed is None or Version(installed).public != DEEPSPEED_VERSION
    said = "is not installed" if installed is None else f"is {installed}"
    remedy = f"this release works with {DEEPSPEED_VERSION} only: pip install deepspeed=={DEEPSPEED_VERSION}"
    return [*findings, _judged("deepspeed", f"deepspeed {said}", wrong, remedy)]


def _judged(name: str, message: str, is_fault: bool, remedy: str) -> Finding:
    return Finding(name, Verdict.FAULT, message, remedy) if is_fault else Finding(name, Verdict.GOOD, message)


def compared_versions() -> dict[str, str | None]:
    """The versions that must be equal on all hosts of a run."""
    return {"bagel_ds": bagel_ds.__version__, **{name: installed_version(name) for name in COMPARED_PACKAGES}}


def installed_version(package: str) -> str | None:
    """Version of an installed package; None if absent. Reads its metadata, because importing it could fail."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# ------------------------------------------------------------------------------------------------------------ GPU
def gpu_finding() -> Finding:
    """Whether torch can use this machine's NVIDIA GPU, if there is one and the user did not ask for the CPU.

    A DS_ACCELERATOR that asks for a missing or unsupported device is also a fault.
    """
    asked, hidden = asked_accelerator(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if asked not in (None, *ACCELERATORS):
        expected = f"DS_ACCELERATOR is {asked!r}, expected {' or '.join(ACCELERATORS)}"
        return Finding("GPU", Verdict.FAULT, expected, "set one of them, or unset it")
    is_hidden = hidden is not None and hidden.strip() in ("", "-1")
    if asked == "cpu" or (asked is None and is_hidden):
        return Finding("GPU", Verdict.GOOD, "the CPU was chosen")
    if asked is None and not gpu_is_present():
        return Finding("GPU", Verdict.GOOD, "there is no NVIDIA GPU")
    import torch

    if torch.cuda.is_available():
        found = f"{torch.cuda.device_count()} GPU(s), driver {driver_version()}, torch for CUDA {torch.version.cuda}"
        return Finding("GPU", Verdict.GOOD, found)
    if is_hidden or not gpu_is_present():
        where = "CUDA_VISIBLE_DEVICES hides every GPU" if is_hidden else "no NVIDIA GPU was found on this machine"
        remedy = "unset it, or set DS_ACCELERATOR=cpu to train on the CPU"
        return Finding("GPU", Verdict.FAULT, f"DS_ACCELERATOR is cuda, but {where}", remedy)
    unusable = "This machine has an NVIDIA GPU, but torch can't use it"
    on_cpu = "To train on the CPU instead, set DS_ACCELERATOR=cpu."
    driver = driver_version() or "unknown"
    build = torch.version.cuda
    if build is None:
        return Finding(
            "GPU",
            Verdict.FAULT,
            f"{unusable}: this torch ({torch.__version__}) is built for the CPU only",
            "install a CUDA build: pip install --force-reinstall torch (see https://pytorch.org for your driver). "
            + on_cpu,
        )
    minimum = MINIMUM_DRIVERS.get(int(build.split(".")[0]))
    needed = f"driver {minimum} or newer" if minimum else "a driver made for it"
    return Finding(
        "GPU",
        Verdict.FAULT,
        f"{unusable}: torch {torch.__version__} is built for CUDA {build}, which needs {needed}, but the driver is "
        f"{driver}",
        f"update the driver, or install a torch for an older CUDA (https://pytorch.org). {on_cpu}",
    )


def check_gpu() -> None:
    """Raise UserError if this machine has an NVIDIA GPU that torch can't use, unless the user chose the CPU."""
    refuse_faults([gpu_finding()])


def gpu_is_present() -> bool:
    """Whether the kernel or nvidia-smi shows an NVIDIA GPU, whether or not torch can use it."""
    if any(_DEVICE_FILES.glob("nvidia[0-9]*")):
        return True
    return bool(nvidia_smi("--list-gpus"))


def driver_version() -> str | None:
    """Version of the NVIDIA driver, such as "535.104.05"; None if unknown."""
    asked = nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader")
    if asked:
        return asked.splitlines()[0].strip()
    try:
        match = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", _DRIVER_FILE.read_text())
    except OSError:
        return None
    return match.group(1) if match else None


def nvidia_smi(*words: str) -> str:
    command = shutil.which("nvidia-smi")
    if command is None:
        return ""
    try:
        ran = subprocess.run([command, *words], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ran.stdout.strip() if ran.returncode == 0 else ""


# -------------------------------------------------------------------------------------------------------- folders
def home_finding() -> Finding:
    """The user's folders; unusable ones are replaced."""
    try:
        changed = settle_user_folders()
    except UserError as fault:
        return Finding("home folder", Verdict.FAULT, str(fault))
    if changed:
        return Finding("home folder", Verdict.NOTE, "; ".join(changed))
    return Finding("home folder", Verdict.GOOD, "home and cache folders can be written")


# -------------------------------------------------------------------------------------------------- shared memory
def shared_memory_finding(ranks_here: int) -> Finding:
    """Whether /dev/shm is large enough for NCCL's exchange between ranks of one host. Data workers don't use it."""
    name = str(SHARED_MEMORY)
    if ranks_here < 2 or asked_accelerator() == "cpu" or not gpu_is_present():
        return Finding(name, Verdict.GOOD, "shared memory is not needed: there are no GPUs that exchange data")
    size = shared_memory_size()
    if size >= NCCL_SHARED_MEMORY and not write_fault(SHARED_MEMORY):
        return Finding(name, Verdict.GOOD, f"{name} has {_size(size)}")
    return Finding(
        name,
        Verdict.NOTE,
        f"{name} has only {_size(size)}. NCCL needs more if the GPUs of a host can't reach one another directly; if it "
        "reports that it can't create shared memory, start the container with --shm-size=1g or --ipc=host",
    )


def sums_finding(ranks_here: int) -> Finding:
    """Whether ranks on the CPU can sum through DeepSpeed's op, which shares memory; without it they use gloo."""
    name, needed = "sums on the CPU", BUFFER_BYTES * ranks_here
    compiler = compiler_finding([SUMS])
    # By the size of /dev/shm, which is equal for all ranks; free space may change from one to the next.
    small = shared_memory_size() < needed
    if compiler.verdict is not Verdict.GOOD or small:
        reason = f"{SHARED_MEMORY} is smaller than the {needed // MIB} MiB of its buffers"
        return Finding(
            name,
            Verdict.NOTE,
            "ranks sum through gloo, which is slower than DeepSpeed's op: "
            + (reason if compiler.verdict is Verdict.GOOD else compiler.text),
        )
    if (free := free_shared_memory()) < needed:
        return Finding(
            name,
            Verdict.FAULT,
            f"{SHARED_MEMORY} is full: {free // MIB} MiB are free, and ranks on the CPU need {needed // MIB} MiB there "
            "for sums",
            "remove files there, or give the container more (--shm-size)",
        )
    return Finding(name, Verdict.GOOD, f"{SHARED_MEMORY} has room for sums over {ranks_here} rank(s) on the CPU")


def free_shared_memory() -> int:
    """Free bytes of /dev/shm; 0 if there is none."""
    return _shared_memory("f_bavail")


def shared_memory_size() -> int:
    """Bytes of /dev/shm, free or not; 0 if there is none."""
    return _shared_memory("f_blocks")


def _shared_memory(blocks: str) -> int:
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:
        return 0
    return int(getattr(found, blocks)) * found.f_frsize


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"


# ------------------------------------------------------------------------------------------------------- compiler
# A test program: DeepSpeed's C++ ops include Python.h and link OpenMP.
_PROBE = "#include <Python.h>\n#include <omp.h>\n#include <vector>\nint threads() { return omp_get_max_threads(); }\n"


def compiler_finding(ops: Sequence[Op]) -> Finding:
    """Whether the C++ ops of DeepSpeed that are not built yet can be compiled."""
    missing = [op for op in ops if not is_built(op)]
    if not missing:
        return Finding("C++ compiler", Verdict.GOOD, "nothing needs to be compiled")
    what = " and ".join(f"{op.name} ({op.purpose})" for op in missing)
    instead = "".join(f"; or {way}" for way in dict.fromkeys(op.instead for op in missing) if way)

    def fault(lack: str, remedy: str) -> Finding:
        if not instead:
            slow = f"{what} can't be compiled: {lack}; the run does without it, which is slower"
            return Finding("C++ compiler", Verdict.NOTE, slow, remedy)
        return Finding(
            "C++ compiler", Verdict.FAULT, f"DeepSpeed's {what} must be compiled, but {lack}", remedy + instead
        )

    if find_ninja() is None:
        return fault("the build tool ninja is not installed", "pip install ninja")
    command = shlex.split(os.environ.get("CXX", "c++"))
    if not command or shutil.which(command[0]) is None:
        named = f" (CXX is {os.environ['CXX']!r})" if "CXX" in os.environ else ""
        return fault(f"there is no C++ compiler{named}", "apt-get install g++ (as root)")
    said = _compiler_fault(command)
    if said is None:
        return Finding("C++ compiler", Verdict.GOOD, f"{what} can be compiled by {command[0]}")
    if "Python.h" in said:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return fault(
            f"Python's headers are not installed (Python.h of {sys.executable})",
            f"apt-get install {version}-dev (as root), or use a Python that includes them, such as conda's",
        )
    return fault(f"{command[0]} can't compile: {said}", "apt-get install g++ (as root)")


def _compiler_fault(command: list[str]) -> str | None:
    """A compiler's error for the test program; None if it compiles and links."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(_PROBE)
            flags = ["-shared", "-fPIC", "-fopenmp", f"-I{sysconfig.get_path('include')}"]
            command = [*command, *flags, str(source), "-o", str(source.with_suffix(".so"))]
            ran = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120, check=False)
            if ran.returncode == 0 and source.with_suffix(".so").exists():
                return None
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return " / ".join((ran.stderr or ran.stdout).splitlines()[:4])[:600] or f"code {ran.returncode}"
