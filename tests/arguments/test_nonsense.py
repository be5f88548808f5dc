"""Whatever stands at whatever key of a run's YAML: it is used, or one message names the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from bagel_ds.arguments.run_config import RunConfig, parse_arguments
from tests import nonsense


@pytest.mark.parametrize("step", [pytest.param(59, id="some"), pytest.param(1, id="all", marks=pytest.mark.soak)])
def test_any_value_anywhere_in_a_run_yaml(tmp_path: Path, step: int) -> None:
    path, messages = tmp_path / "run.yaml", []
    for text in nonsense.documents(yaml.safe_load(RunConfig().to_yaml()), nonsense.IN_YAML, yaml.safe_dump, step):
        path.write_text(text, encoding="utf-8")
        messages.append(nonsense.refusal(lambda: parse_arguments(["--config", str(path)])))
    refused = [message for message in messages if message is not None]
    assert 0 < len(refused) < len(messages)
    assert [message for message in refused if str(path) not in message] == []
    assert max(map(len, refused)) < 20_000


@pytest.mark.parametrize("name, most", [("total_steps", 2**31 - 1), ("data_seed", 2**63 - 1)])
def test_whole_numbers_have_an_upper_bound(name: str, most: int) -> None:
    assert nonsense.refusal(lambda: parse_arguments([f"--{name}", str(most)])) is None
    message = nonsense.refusal(lambda: parse_arguments([f"--{name}", str(most + 1)]))
    assert message == f"--{name} {most + 1}: expected at most {most}"


def test_paths_of_a_yaml_expand_home_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("RUNS", "/mnt/runs")
    (tmp_path / "run.yaml").write_text("results_dir: ~/out\nresume_from: $RUNS/step_7\ncheckpoint_dir: ${RUNS}/c\n")
    config = parse_arguments(["--config", str(tmp_path / "run.yaml"), "--model_path=~/model"])
    assert config.training.results_dir == "/home/me/out"
    assert config.training.resume_from == "/mnt/runs/step_7"
    assert config.training.checkpoint_dir == "/mnt/runs/c"
    assert config.model.model_path == "/home/me/model"


def test_numbers_with_an_exponent_and_texts_that_look_like_others(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("lr: 5e-1\nema: 99e-2\nwandb_name: 2024-01-31\nstop_after: 1:30\n")
    message = nonsense.refusal(lambda: parse_arguments(["--config", str(tmp_path / "run.yaml")]))
    assert message is not None and "--stop_after 1:30: expected a duration" in message and "\n" not in message
    (tmp_path / "run.yaml").write_text("lr: 5e-1\nema: 99e-2\nwandb_name: 2024-01-31\n")
    training = parse_arguments(["--config", str(tmp_path / "run.yaml")]).training
    assert (training.lr, training.ema, training.wandb_name) == (0.5, 0.99, "2024-01-31")
