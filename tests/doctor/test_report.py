"""The report of one host: the checks of a run, in lines and as JSON."""

from __future__ import annotations

from pathlib import Path

import pytest

from bagel_ds.doctor import environment, report
from bagel_ds.doctor.environment import Finding, Verdict
from bagel_ds.doctor.report import Wanted, as_json, host_report, is_ready, lines
from bagel_ds.zero.ops import CPU_ADAM

GOOD, NOTE = Finding("a", Verdict.GOOD, "fine"), Finding("longer", Verdict.NOTE, "less", "more")
FAULT = Finding("b", Verdict.FAULT, "broken", "mend it")


def test_each_line_has_its_verdict_and_remedy_and_the_last_line_sums_up() -> None:
    assert lines([GOOD]) == ["ok    a  fine", "ready"]
    assert lines([GOOD, NOTE])[1:] == [
        "warn  longer  less; more",
        "ready; 1 line(s) that begin with warn deserve a look",
    ]
    assert lines([FAULT, NOTE])[0] == "fail  b       broken; mend it"
    assert lines([FAULT, NOTE])[-1].startswith("1 of these would end a run")


def test_only_a_fault_makes_a_host_unready() -> None:
    assert is_ready([GOOD, NOTE]) and not is_ready([GOOD, FAULT])
    found = as_json([GOOD, FAULT], {})
    assert found["ok"] is False and found["findings"][1] == {
        "name": "b", "verdict": "fail", "message": "broken", "remedy": "mend it",
    }  # fmt: skip


def test_what_a_run_checks_is_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each finding of the run's own functions, found by breaking it."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "nothing built"))
    monkeypatch.setattr(environment, "find_ninja", lambda: None)
    wanted = Wanted(2, (CPU_ADAM,), True, None, None, measured=False)
    told = {finding.name: finding for finding in host_report(wanted)}
    assert "ninja is not installed" in told["C++ compiler"].text and told["C++ compiler"].verdict is Verdict.FAULT
    assert told["sums on the CPU"].verdict is Verdict.NOTE and told["GPU"].message == "the CPU was chosen"
    assert "not built yet" in told["cpu_adam"].message
    told = {finding.name: finding for finding in host_report(wanted._replace(run_is_known=False))}
    assert told["C++ compiler"].verdict is Verdict.NOTE, "a run that keeps the optimizer on the GPUs needs none"
    monkeypatch.setattr(environment, "installed_version", lambda name: "0.1" if name == "pillow" else "99")
    told = {finding.name: finding for finding in host_report(wanted)}
    assert told["pillow"].verdict is Verdict.FAULT and "C++ compiler" not in told


def test_gpus_are_counted_for_hosts_that_use_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "nvidia_smi", lambda *words: "GPU 0: H100\nGPU 1: H100")
    monkeypatch.setattr(report, "gpu_is_present", lambda: True)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert report.gpu_count() == 0
    monkeypatch.delenv("DS_ACCELERATOR")
    assert report.gpu_count() == 2
