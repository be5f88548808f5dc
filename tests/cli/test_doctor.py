"""`bagel-ds doctor` as it is typed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bagel_ds.cli.main import main
from bagel_ds.doctor.environment import Finding, Verdict
from tests.launch import cpu_environment


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.chdir(tmp_path)


def test_the_result_is_on_stdout_and_drives_are_measured(tmp_path: Path) -> None:
    words = ["doctor", "--json", "--nvme_path", str(tmp_path / "swap"), "--build_ops"]
    ran = subprocess.run(
        [sys.executable, "-m", "bagel_ds.cli.main", *words],
        env=cpu_environment(), cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    report = json.loads(ran.stdout)
    told = {finding["name"]: finding for finding in report["findings"]}
    assert ran.returncode == 0, ran.stdout
    for name in ("checkpoint_dir speed", "nvme_path speed"):
        assert "reads" in told[name]["message"] and "GB/s" in told[name]["message"]
    assert "built in" in told["cpu_adam"]["message"] and report["ok"] is True
    assert list(tmp_path.iterdir()) == []


def test_a_fault_is_exit_code_1_and_a_mistake_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("bagel_ds.doctor.report.ram_finding", lambda: Finding("RAM", Verdict.FAULT, "none"))
    assert main(["doctor", "--no_speed"]) == 1
    assert "fail  RAM" in capsys.readouterr().out
    assert main(["doctor", "--hostfile", str(tmp_path / "no hosts")]) == 2
    assert "can't be read" in capsys.readouterr().err


def test_a_training_command_says_what_to_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "deepspeed --num_gpus 3 launch/train.py --checkpoint_dir saved --ds_config"
    training = ["--dataset_config_file", "x.yaml", "--model_path", "m", "--finetune_from_hf", "True"]
    nvme = ["--nvme_path", str(tmp_path / "swap")]
    main(["doctor", "--no_speed", *line.split(), "zero3_nvme.json", *training, *nvme])
    said = capsys.readouterr().out
    assert "saved (" in said and f"{tmp_path / 'swap'} (" in said and "cpu_adam" in said
    assert "sums over 3 rank(s)" in said
    main(["doctor", "--no_speed", *line.split(), "zero3.json", *training])
    said = capsys.readouterr().out
    assert "cpu_adam" not in said and "nvme_path" not in said, "this preset needs neither"


def test_the_hosts_of_a_training_command_are_checked_for_that_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bagel_ds.doctor.environment import compared_versions

    (tmp_path / "hostfile").write_text("node1 slots=8\n")
    (tmp_path / "report").write_text(json.dumps({"versions": compared_versions(), "gpus": 8, "findings": []}))
    (tmp_path / "ssh").write_text(f'#!/bin/sh\necho "$*" > {tmp_path}/asked; cat {tmp_path}/report\n')
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    line = f"deepspeed --hostfile {tmp_path / 'hostfile'} launch/train.py --ds_config zero3.json --model_path m"
    main(["doctor", "--no_speed", *line.split(), "--dataset_config_file", "x.yaml", "--finetune_from_hf", "True"])
    assert "host node1" in capsys.readouterr().out
    asked = (tmp_path / "asked").read_text()
    assert "doctor --json --ranks 8 --checkpoint_dir" in asked and "--ds_config zero3.json --model_path m" in asked
