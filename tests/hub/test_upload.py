"""Uploads: what is sent, what stays here, and the card that is filled from the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bagel_ds.cli.main import main
from bagel_ds.hub.card import model_card, run_of
from tests.hub.server import Server

LOSSES = [{"step": 0, "loss/ce": 6.5, "loss/mse": 2.2}, {"step": 1, "loss/ce": 1.25, "loss/mse": 0.5}]
TRAINER = {
    "steps_done": 2,
    "plan_state": {},
    "world_size": 4,
    "versions": {"bagel_ds": "0.1.0", "torch": "2.13.0"},
    "data": {
        "tokenizer files": "abc",
        "data group vlm_sft, weight": "1",
        "data group vlm_sft, dataset llava_ov": "160 rows in 1 files (5459222a)",
    },
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint as a run writes one, with the log of its run."""
    folder = tmp_path / "results" / "checkpoints" / "step_2"
    (folder / "state").mkdir(parents=True)
    arguments = {
        "lr": 3e-5,
        "total_steps": 2,
        "freeze_vit": True,
        "model_path": "/home/me/models/BAGEL-7B-MoT",
        "results_dir": str(tmp_path / "results"),
        "dataset_config_file": "/home/me/secret.yaml",
        "wandb_name": "my_run",
        "ce_weight": 1.0,
    }
    (folder / "trainer.json").write_text(json.dumps({**TRAINER, "arguments": arguments}))
    lines = [json.dumps(line) for line in LOSSES] + ['{"step": 5, "loss/ce": 0.1}', '{"cut']
    (tmp_path / "results" / "metrics.jsonl").write_text("\n".join(lines))
    for name in ("llm_config.json", "vit_config.json", "ae.safetensors", "tokenizer.json", "ema.safetensors"):
        (folder / name).write_text(f"content of {name}")
    for name in ("manifest.json", "README.md", "state/rank_0.safetensors", ".hidden"):
        (folder / name).write_text("stays here")
    return folder


def test_the_card_says_what_the_run_was_and_nothing_of_this_machine(checkpoint: Path) -> None:
    card = model_card(checkpoint, "me/blocks", run_of(checkpoint))
    for words in (
        "base_model: ByteDance-Seed/BAGEL-7B-MoT",
        "base_model_relation: finetune",
        "2 steps on 4 rank(s)",
        "data vlm_sft: llava_ov: 160 rows in 1 files",
        "at the last logged step: loss/ce 1.2500, loss/mse 0.5000",
        "bagel_ds 0.1.0, torch 2.13.0",
        "| `lr` | 3e-05 |",
        "| `freeze_vit` | True |",
        "Install bagel_ds 0.1.0 from a checkout of its repository (`pip install .`) or from its wheel.",
        "bagel-ds download me/blocks --out models/blocks",
    ):
        assert words in card
    for words in ("/home/me", "secret", "my_run", "ce_weight", str(checkpoint), "pip install bagel_ds"):
        assert words not in card


def test_an_exports_card_comes_from_the_checkpoint_that_it_was_made_of(checkpoint: Path, tmp_path: Path) -> None:
    export = tmp_path / "export"
    export.mkdir()
    (export / "export.json").write_text(json.dumps({"checkpoint": str(checkpoint)}))
    assert "2 steps on 4 rank(s)" in model_card(export, "me/blocks", run_of(export))
    (checkpoint / "trainer.json").unlink()
    card = model_card(export, "me/blocks", run_of(export))
    assert "## Training" not in card and "## Use" in card, "what is not known is left out"


def test_an_adapters_card_names_its_base_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "other/BAGEL", "r": 8}))
    card = model_card(tmp_path, "me/lora", run_of(tmp_path))
    assert "base_model: other/BAGEL\nbase_model_relation: adapter" in card and "library_name: peft" in card
    assert "--model_path models/BAGEL --lora models/lora" in card


def test_a_dry_run_lists_the_files_writes_the_card_and_sends_nothing(
    server: Server, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["upload", str(checkpoint), "--repo", "me/blocks", "--endpoint", server.url]
    assert main([*words, "--dry_run", "--card", str(tmp_path / "card.md")]) == 0
    said = capsys.readouterr().out
    assert "ema.safetensors" in said and "# blocks" in said and server.asked == []
    assert (tmp_path / "card.md").read_text() in said
    assert not any(name in said for name in ("rank_0", "trainer.json", "manifest.json", ".hidden"))


def test_an_upload_is_one_commit_with_the_users_card(
    server: Server,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (tmp_path / "card.md").write_text("# My own words\n")
    words = ["upload", str(checkpoint), "--repo", "me/blocks", "--endpoint", server.url]
    assert main([*words, "--card", str(tmp_path / "card.md"), "--private"]) == 0
    sent = server.commits["me/blocks"]
    assert sent.pop("README.md") == b"# My own words\n"
    assert set(sent) == {"llm_config.json", "vit_config.json", "ae.safetensors", "tokenizer.json", "ema.safetensors"}
    assert sent["ema.safetensors"] == b"content of ema.safetensors"
    assert f"sent to {server.url}/me/blocks/commit/" in capsys.readouterr().out


@pytest.mark.parametrize(("status", "said"), [(401, "log in with `hf auth login`"), (500, "can't be uploaded to")])
def test_a_refusal_is_one_message(
    status: int, said: str, server: Server, checkpoint: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.refusal = status
    assert main(["upload", str(checkpoint), "--repo", "me/blocks", "--endpoint", server.url]) == 2
    assert said in capsys.readouterr().err


def test_a_folder_that_is_no_model_and_a_name_that_is_no_repo_are_refused(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["upload", str(tmp_path / "none"), "--repo", "me/x"]) == 2
    assert main(["upload", str(tmp_path / "results"), "--repo", "me/x"]) == 2
    assert main(["upload", str(checkpoint), "--repo", "blocks"]) == 2
    said = capsys.readouterr().err
    assert "is not a folder" in said and "make one with bagel-ds export" in said and "expected USER/NAME" in said
