"""Memory, limits, toolkits and networks: what is only shown, and what deserves a warning with a remedy."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from bagel_ds.doctor import hardware
from bagel_ds.doctor.environment import Verdict
from bagel_ds.units import GIB, MIB


def test_a_gpu_that_another_process_uses_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "0, NVIDIA RTX 4090, 24564, 12\n1, NVIDIA RTX 4090, 24564, 20480\n2, NVIDIA GB10, [N/A], [N/A]"
    monkeypatch.setattr(hardware, "nvidia_smi", lambda *words: said)
    free, busy = hardware.gpu_memory_findings()
    assert (free.verdict, free.message) == (Verdict.GOOD, "NVIDIA RTX 4090, 24 GiB")
    assert busy.verdict is Verdict.NOTE and "20 GiB are in use" in busy.text and "nvidia-smi" in busy.remedy
    monkeypatch.setattr(hardware, "nvidia_smi", lambda *words: "")
    assert hardware.gpu_memory_findings() == []


@pytest.mark.parametrize(
    ("total", "limit", "verdict"),
    [(512, "max", Verdict.GOOD), (512, str(16 * GIB), Verdict.NOTE), (24, "max", Verdict.NOTE)],
)
def test_a_containers_limit_counts_as_ram(
    total: int, limit: str, verdict: Verdict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.max").write_text(limit)
    monkeypatch.setattr(hardware, "_MEMORY_LIMITS", (tmp_path / "memory.max",))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=total * GIB, available=20 * GIB))
    found = hardware.ram_finding()
    assert found.verdict is verdict and ("container's limit is 16 GiB" in found.text) == (limit != "max")
    assert verdict is Verdict.GOOD or "bagel-ds memory" in found.remedy


@pytest.mark.parametrize(
    ("limit", "adapters", "verdict"),
    [(resource.RLIM_INFINITY, 1, Verdict.GOOD), (8 * MIB, 0, Verdict.GOOD), (8 * MIB, 1, Verdict.NOTE)],
)
def test_locked_memory_matters_to_infiniband(
    limit: int, adapters: int, verdict: Verdict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(adapters):
        (tmp_path / f"mlx5_{number}").touch()
    monkeypatch.setattr(hardware, "_INFINIBAND", tmp_path)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    found = hardware.locked_memory_finding()
    assert found.verdict is verdict
    assert verdict is Verdict.GOOD or "--ulimit memlock=-1" in found.remedy


def test_a_small_or_unusable_tmpdir_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * GIB))
    assert hardware.temporary_finding().verdict is Verdict.GOOD
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=200 * MIB))
    found = hardware.temporary_finding()
    assert found.verdict is Verdict.NOTE and "200 MiB free" in found.text and "TMPDIR" in found.remedy
    monkeypatch.setattr(hardware, "write_fault", lambda path: "Read-only file system")
    assert hardware.temporary_finding().verdict is Verdict.FAULT


def test_the_toolkit_is_found_and_a_cuda_home_without_one_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    found = hardware.toolkit_finding()
    assert found.verdict is Verdict.NOTE and f"{tmp_path}, which has no bin/nvcc" in found.text
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.61'\n")
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    assert hardware.toolkit_finding().message == f"12.8 ({tmp_path}/bin/nvcc)"
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = hardware.toolkit_finding()
    assert found.verdict is Verdict.GOOD and found.message.startswith("none")


def test_a_flash_attn_that_can_not_be_imported_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "installed_version", lambda name: None)
    assert "not needed" in hardware.flash_finding().message
    (tmp_path / "flash_attn.py").write_text("raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c10')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(hardware, "installed_version", lambda name: "2.8.3")
    found = hardware.flash_finding()
    assert found.verdict is Verdict.NOTE and "undefined symbol: _ZN3c10" in found.text
    assert "pip uninstall flash-attn" in found.remedy


@pytest.mark.parametrize(
    ("variable", "value", "verdict"),
    [
        ("GLOO_SOCKET_IFNAME", "lo", Verdict.GOOD),
        ("GLOO_SOCKET_IFNAME", "l", Verdict.FAULT),
        ("GLOO_SOCKET_IFNAME", "lo,ib9", Verdict.FAULT),
        ("NCCL_SOCKET_IFNAME", "l", Verdict.GOOD),
        ("NCCL_SOCKET_IFNAME", "=l", Verdict.FAULT),
        ("NCCL_SOCKET_IFNAME", "=lo", Verdict.GOOD),
        ("NCCL_SOCKET_IFNAME", "^docker", Verdict.GOOD),
        ("NCCL_SOCKET_IFNAME", "ib9", Verdict.FAULT),
    ],
)
def test_an_interface_that_does_not_exist_is_a_fault(
    variable: str, value: str, verdict: Verdict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As gloo (names) and NCCL (prefixes) read them."""
    for each in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(variable, value)
    found = hardware.network_finding()
    assert found.verdict is verdict, found.text
    if verdict is Verdict.FAULT:
        assert f"unset {variable}" in found.remedy and "lo" in found.message
