"""What a machine has and lacks: each check on both sides, and all faults in one message."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from bagel_ds.doctor import environment
from bagel_ds.doctor.environment import (
    Finding,
    Verdict,
    compiler_finding,
    home_finding,
    machine_findings,
    refuse_faults,
    shared_memory_finding,
    sums_finding,
)
from bagel_ds.errors import UserError
from bagel_ds.units import GIB, MIB
from bagel_ds.zero.ops import Op

REPOSITORY = Path(__file__).parents[2]
GOOD_GPU = Finding("GPU", Verdict.GOOD, "a GPU")
OP = Op("no_such_part", "a part of this test", "pass another preset", lambda: None)


# -------------------------------------------------------------------------------------------------------- versions
def test_this_environment_suffices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "gpu_finding", lambda: GOOD_GPU)
    refuse_faults(machine_findings(1))


def test_minimum_versions_are_those_of_pyproject() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for package, minimum in environment.MINIMUM_VERSIONS.items():
        assert f"{package}>={minimum}" in project["dependencies"]
    assert f"deepspeed=={environment.DEEPSPEED_VERSION}" in project["dependencies"]
    assert project["requires-python"] == ">=" + ".".join(map(str, environment.MINIMUM_PYTHON))


def test_pins_satisfy_the_declared_minima() -> None:
    pins = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if "==" in line)
    for package, minimum in environment.MINIMUM_VERSIONS.items():
        assert environment.Version(pins[package]) >= environment.Version(minimum)
    assert pins["deepspeed"] == environment.DEEPSPEED_VERSION


def test_old_and_absent_packages_are_named_with_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.10.1+cu128", "transformers": None, "deepspeed": "0.19.7", "pillow": "12.3.0"}
    monkeypatch.setattr(environment, "installed_version", versions.get)
    with pytest.raises(UserError) as caught:
        refuse_faults(machine_findings(1))
    message = str(caught.value)
    for word in ("2.10.1+cu128", "2.11", "transformers is not installed", "5.17", "0.19.7", "deepspeed==0.19.8"):
        assert word in message
    assert "pillow is 12.3.0, which is too old; at least 13.0 is needed: pip install 'pillow>=13.0'" in message


def test_builds_and_release_candidates_of_a_sufficient_version_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {
        "torch": "2.11.0a0+nv26.1",
        "transformers": "5.17.0.dev0",
        "deepspeed": "0.19.8+cu130",
        "pillow": "13.0.0",
    }
    monkeypatch.setattr(environment, "installed_version", versions.get)
    monkeypatch.setattr(environment, "gpu_finding", lambda: GOOD_GPU)
    refuse_faults(machine_findings(1))


# ------------------------------------------------------------------------------------------------------------- GPU
@pytest.fixture
def unusable_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with /dev/nvidia0 and a driver, where torch sees nothing."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidia0").touch()
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed Oct 27 2021\n")
    monkeypatch.setattr(environment, "_DEVICE_FILES", tmp_path / "dev")
    monkeypatch.setattr(environment, "_DRIVER_FILE", tmp_path / "version")
    monkeypatch.setattr(environment, "nvidia_smi", lambda *words: "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize("build, minimum", [("12.8", "525.60"), ("13.0", "580.65")])
def test_an_old_driver_is_an_error_that_names_the_minimum(
    unusable_gpu: None, monkeypatch: pytest.MonkeyPatch, build: str, minimum: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", build)
    with pytest.raises(UserError) as caught:
        environment.check_gpu()
    assert all(word in str(caught.value) for word in ("470.82.01", minimum, build, "DS_ACCELERATOR=cpu"))


def test_a_cpu_build_beside_a_gpu_is_an_error(unusable_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match="CPU only"):
        environment.check_gpu()


def testnvidia_smi_alone_shows_a_gpu_too(unusable_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "dev" / "nvidia0").unlink()
    environment.check_gpu()
    monkeypatch.setattr(
        environment, "nvidia_smi", lambda *words: "535.104.05" if "query" in words[0] else "GPU 0: H100"
    )
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(UserError, match="535.104.05"):
        environment.check_gpu()


@pytest.mark.parametrize("name, value", [("DS_ACCELERATOR", "cpu"), ("CUDA_VISIBLE_DEVICES", "")])
def test_asking_for_the_cpu_is_heard(
    unusable_gpu: None, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    environment.check_gpu()


@pytest.mark.parametrize("name", ["CPU", "gpu", "xpu", ""])
def test_an_accelerator_of_another_name_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", name)
    with pytest.raises(UserError, match=f"DS_ACCELERATOR is '{name}', expected cuda or cpu"):
        environment.check_gpu()


def test_a_gpu_that_was_asked_for_and_is_not_there_is_missed(
    unusable_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    with pytest.raises(UserError, match="torch can't use it"):
        environment.check_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES hides every GPU"):
        environment.check_gpu()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    (tmp_path / "dev" / "nvidia0").unlink()
    with pytest.raises(UserError, match="no NVIDIA GPU was found"):
        environment.check_gpu()


def test_a_usable_gpu_is_fine(unusable_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    environment.check_gpu()


def test_a_failingnvidia_smi_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: sys.executable)  # ends with an error on such options
    assert environment.nvidia_smi("--list-gpus") == ""

    def hangs(*words: object, **options: object) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 30)

    monkeypatch.setattr(subprocess, "run", hangs)
    assert environment.nvidia_smi("--list-gpus") == ""


# ------------------------------------------------------------------------------------------------- shared memory
class Blocks(NamedTuple):
    """What statvfs says of a file system."""

    f_frsize: int
    f_blocks: int
    f_bavail: int


def shared_memory(monkeypatch: pytest.MonkeyPatch, size: int, free: int) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: Blocks(1, size, free))


@pytest.mark.parametrize(
    ("size", "ranks", "accelerator", "gpu", "verdict"),
    [
        (GIB, 2, None, True, Verdict.GOOD),
        (GIB - 1, 2, None, True, Verdict.NOTE),
        (64 * MIB, 2, "cuda", True, Verdict.NOTE),
        (64 * MIB, 1, None, True, Verdict.GOOD),
        (64 * MIB, 8, "cpu", True, Verdict.GOOD),
        (64 * MIB, 8, None, False, Verdict.GOOD),
    ],
)
def test_shared_memory_matters_to_several_gpus_of_a_host(
    size: int, ranks: int, accelerator: str | None, gpu: bool, verdict: Verdict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    if accelerator is not None:
        monkeypatch.setenv("DS_ACCELERATOR", accelerator)
    monkeypatch.setattr(environment, "gpu_is_present", lambda: gpu)
    monkeypatch.setattr(environment, "write_fault", lambda path: None)
    shared_memory(monkeypatch, size, size)
    found = shared_memory_finding(ranks)
    assert found.verdict is verdict
    if verdict is Verdict.NOTE:
        assert "NCCL" in found.text and "--shm-size=1g" in found.text and "--ipc=host" in found.text


def test_shared_memory_that_can_not_be_written_or_is_not_there_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(environment, "gpu_is_present", lambda: True)
    monkeypatch.setattr(environment, "SHARED_MEMORY", Path("/no/such/place"))
    assert shared_memory_finding(2).verdict is Verdict.NOTE
    (tmp_path / "file").touch()
    monkeypatch.setattr(environment, "SHARED_MEMORY", tmp_path / "file")
    shared_memory(monkeypatch, 100 * GIB, 100 * GIB)
    assert shared_memory_finding(2).verdict is Verdict.NOTE


@pytest.mark.parametrize(
    ("size", "free", "verdict", "said"),
    [
        (1000, 1000, Verdict.GOOD, "has room for sums over 2 rank(s)"),
        (131, 131, Verdict.NOTE, "is smaller than the 132 MiB of its buffers"),
        (1000, 131, Verdict.FAULT, "131 MiB are free, and ranks on the CPU need 132 MiB"),
    ],
)
def test_ranks_on_the_cpu_sum_through_shared_memory_if_it_is_large_enough(
    size: int, free: int, verdict: Verdict, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "compiler_finding", lambda ops: Finding("C++ compiler", Verdict.GOOD, "works"))
    shared_memory(monkeypatch, size * MIB, free * MIB)
    found = sums_finding(2)
    assert found.verdict is verdict and said in found.text


def test_ranks_on_the_cpu_sum_through_gloo_without_a_compiler(
    nothing_built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = sums_finding(2)
    assert found.verdict is Verdict.NOTE and "ranks sum through gloo" in found.text
    assert "CXX is 'no-such-compiler'" in found.text


# ------------------------------------------------------------------------------------------------------- compiler
@pytest.fixture
def nothing_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "extensions"


def test_this_machines_compiler_will_do(nothing_built: Path) -> None:
    found = compiler_finding([OP])
    assert found.verdict is Verdict.GOOD, found.text
    assert "can be compiled by c++" in found.message


def test_a_missing_compiler_is_named_with_the_line_that_installs_one(
    nothing_built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, **rest: None if name == "c++" else which(name, **rest))
    found = compiler_finding([OP])
    assert found.verdict is Verdict.FAULT
    for word in ("no_such_part (a part of this test)", "there is no C++ compiler", "apt-get install g++"):
        assert word in found.text
    assert "libaio" not in found.text and OP.instead in found.text


def test_a_compiler_named_by_cxx_is_the_one_that_is_looked_for(
    nothing_built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "g++-of-another-year -m64")
    assert "CXX is 'g++-of-another-year -m64'" in compiler_finding([OP]).text
    monkeypatch.setenv("CXX", "")
    assert compiler_finding([OP]).verdict is Verdict.FAULT
    monkeypatch.setenv("CXX", "c++ -O1")
    assert compiler_finding([OP]).verdict is Verdict.GOOD


def test_missing_headers_of_python_are_named(
    nothing_built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment.sysconfig, "get_path", lambda name: str(tmp_path))
    found = compiler_finding([OP])
    version = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
    assert found.verdict is Verdict.FAULT and "Python.h" in found.text and f"apt-get install {version}" in found.text


def test_a_compiler_that_fails_is_quoted(nothing_built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken++"
    broken.write_text("#!/bin/sh\necho 'cc1plus: out of ideas' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert "can't compile: cc1plus: out of ideas" in compiler_finding([OP]).text
    broken.write_text("#!/bin/sh\nexit 0\n")  # says that it worked and made nothing
    assert compiler_finding([OP]).verdict is Verdict.FAULT


def test_a_missing_ninja_is_named_and_one_beside_python_is_found(
    nothing_built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(shutil, "which", _which_without_system_ninja)
    assert compiler_finding([OP]).verdict is Verdict.GOOD
    assert os.environ["PATH"].endswith(str(Path(sys.executable).parent)), "torch calls it by name"
    monkeypatch.setattr(shutil, "which", lambda name, **_: None)
    assert "pip install ninja" in compiler_finding([OP]).text


def _which_without_system_ninja(name: str, path: str | None = None) -> str | None:
    here = Path(sys.executable).parent
    if name == "ninja":
        return str(here / name) if path == str(here) or str(here) in os.environ["PATH"] else None
    return "/usr/bin/" + name


def test_what_is_built_needs_no_compiler(nothing_built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, **_: None)
    assert compiler_finding([]).verdict is Verdict.GOOD
    assert compiler_finding([OP]).verdict is Verdict.FAULT
    (nothing_built / OP.name).mkdir(parents=True)
    (nothing_built / OP.name / f"{OP.name}.so").touch()
    assert compiler_finding([OP]).verdict is Verdict.GOOD


# ------------------------------------------------------------------------------------------------------ together
def test_all_faults_of_a_run_come_in_one_message(nothing_built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "gpu_finding", lambda: GOOD_GPU)
    monkeypatch.setattr(shutil, "which", lambda name, **_: "/usr/bin/ninja" if name == "ninja" else None)
    monkeypatch.setattr(environment, "installed_version", lambda name: "0.1" if name == "pillow" else "99")
    with pytest.raises(UserError) as caught:
        refuse_faults([*machine_findings(2), compiler_finding([OP])])
    message = str(caught.value)
    assert message.startswith("This machine isn't ready for the run:") and message.count("\n  - ") == 3
    assert all(word in message for word in ("C++ compiler", "pillow is 0.1, which is too old", "deepspeed is 99"))


def test_notes_are_handed_on_and_good_findings_are_silent() -> None:
    note = Finding("home folder", Verdict.NOTE, "it lies elsewhere")
    assert refuse_faults([GOOD_GPU, note]) == ["it lies elsewhere"]


def test_a_home_that_can_be_written_is_good_and_one_that_is_not_there_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR", "TRITON_HOME", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home_finding().verdict is Verdict.GOOD
    monkeypatch.setenv("HOME", str(tmp_path / "gone"))
    found = home_finding()
    assert found.verdict is Verdict.NOTE and "gone does not exist" in found.text
    assert home_finding().verdict is Verdict.GOOD, "mended"


def test_faults_of_packages_keep_torch_from_being_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "installed_version", lambda name: None)
    monkeypatch.setattr(environment, "gpu_finding", lambda: pytest.fail("it imports torch"))
    assert {finding.name for finding in machine_findings(1)} >= {
        "Python",
        "torch",
        "deepspeed",
        "home folder",
    }
