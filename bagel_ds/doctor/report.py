"""All that `bagel-ds doctor` looks at on one host, and how it is shown.

Guarantees: the checks that a run makes come from the same functions (`environment.py`, `zero/nvme_check.py`). One line
per finding, with the remedy where something is not right.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bagel_ds.doctor.drives import save_findings, swap_findings
from bagel_ds.doctor.environment import (
    Finding,
    Verdict,
    asked_accelerator,
    compared_versions,
    compiler_finding,
    gpu_is_present,
    machine_findings,
    nvidia_smi,
    package_findings,
    sums_finding,
)
from bagel_ds.doctor.hardware import (
    flash_finding,
    gpu_memory_findings,
    libaio_finding,
    locked_memory_finding,
    network_finding,
    op_findings,
    ram_finding,
    temporary_finding,
    toolkit_finding,
)
from bagel_ds.zero.ops import Op
from bagel_ds.zero.shm_buffers import SUMS


class Wanted(NamedTuple):
    """What the checks are for."""

    ranks: int  # on this host
    ops: tuple[Op, ...]  # that the run needs, or that some run would
    run_is_known: bool  # so that a missing compiler ends it
    checkpoint_dir: Path | None
    nvme_path: Path | None
    measured: bool  # drives


def on_cpu() -> bool:
    """Whether ranks would compute on the CPU, found without torch."""
    return asked_accelerator() == "cpu" or (asked_accelerator() is None and not gpu_is_present())


def gpu_count() -> int:
    """GPUs that ranks of this host could use; 0 if they compute on the CPU."""
    return 0 if on_cpu() else len(nvidia_smi("--list-gpus").splitlines())


def host_report(wanted: Wanted) -> list[Finding]:
    """Every finding about this host."""
    findings = machine_findings(wanted.ranks)
    packages_work = not any(finding.verdict is Verdict.FAULT for finding in package_findings())
    findings += [*gpu_memory_findings(), ram_finding(), locked_memory_finding(), temporary_finding()]
    if packages_work:
        ops = [*wanted.ops, *([SUMS] if on_cpu() else [])]
        compiler = compiler_finding(wanted.ops)
        if compiler.verdict is Verdict.FAULT and not wanted.run_is_known:
            only = f"{compiler.message} (only for runs that keep the optimizer in host memory or on NVMe)"
            compiler = compiler._replace(verdict=Verdict.NOTE, message=only)
        findings += [*op_findings(ops), compiler]
        if on_cpu():
            findings.append(sums_finding(wanted.ranks))
    findings += [libaio_finding(), toolkit_finding(), flash_finding(), network_finding()]
    if wanted.checkpoint_dir is not None:
        findings += save_findings(wanted.checkpoint_dir, wanted.measured)
    if wanted.nvme_path is not None:
        findings += swap_findings(wanted.nvme_path, wanted.measured and packages_work)
    return findings


def as_json(findings: Sequence[Finding], hosts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "ok": is_ready(findings),
        "findings": [finding._asdict() | {"verdict": finding.verdict.value} for finding in findings],
        "versions": compared_versions(),
        "gpus": gpu_count(),
        "hosts": hosts,
    }


def is_ready(findings: Sequence[Finding]) -> bool:
    return not any(finding.verdict is Verdict.FAULT for finding in findings)


def lines(findings: Sequence[Finding]) -> list[str]:
    """The report as text."""
    width = max(len(finding.name) for finding in findings)
    shown = [f"{finding.verdict.value:<4}  {finding.name:<{width}}  {finding.text}" for finding in findings]
    counts = {verdict: sum(finding.verdict is verdict for finding in findings) for verdict in Verdict}
    if counts[Verdict.FAULT]:
        end = f"{counts[Verdict.FAULT]} of these would end a run: see the lines that begin with fail"
    elif counts[Verdict.NOTE]:
        end = f"ready; {counts[Verdict.NOTE]} line(s) that begin with warn deserve a look"
    else:
        end = "ready"
    return [*shown, end]
