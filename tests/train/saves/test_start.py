"""Where a run starts from: the order of the arguments, and never random weights."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bagel_ds.arguments.options import TrainingArguments
from bagel_ds.checkpoint.state import EMA, WEIGHT, Held, rank_file
from bagel_ds.checkpoint.step_folders import write_manifest
from bagel_ds.demo import write_demo
from bagel_ds.errors import UserError
from bagel_ds.model.bagel import Bagel
from bagel_ds.model.shape.config import BagelConfig
from bagel_ds.model_folder.folder import ModelFolder
from bagel_ds.ranges import MASTER, Pieces, Range
from bagel_ds.train.saves.restore import open_start
from bagel_ds.train.saves.start import StartPoint, find_start, sound_start
from tests.checkpoint.written import write_rank

STATE_FILE = "state/rank_00000.safetensors"


def checkpoint(folder: Path, step: int, state: bool = True) -> Path:
    """Without `state` it was given up, as del_previous_state does."""
    path = folder / f"step_{step}"
    (path / "state").mkdir(parents=True)
    files = {"trainer.json": json.dumps({"steps_done": step}), "model.safetensors": "w", STATE_FILE: "state"}
    for name, text in files.items():
        (path / name).write_text(text)
    write_manifest(path, {})
    if not state:
        shutil.rmtree(path / "state")
    return path


def start_of(tmp_path: Path, **arguments: Any) -> StartPoint:
    return find_start(TrainingArguments(checkpoint_dir=str(tmp_path / "ck"), **arguments), tmp_path / "model")


def test_auto_resume_takes_the_newest_checkpoint_in_full_whatever_else_is_given(tmp_path: Path) -> None:
    checkpoint(tmp_path / "ck", 900)
    newest = checkpoint(tmp_path / "ck", 1000)
    other = checkpoint(tmp_path / "other", 5)
    found = start_of(tmp_path, auto_resume=True, resume_model_only=True, finetune_from_hf=True, resume_from=str(other))
    assert (found.folder, found.full) == (newest, True)


def test_auto_resume_without_a_checkpoint_falls_to_resume_from_then_to_the_model(tmp_path: Path) -> None:
    other = checkpoint(tmp_path / "other", 5)
    found = start_of(tmp_path, auto_resume=True, finetune_from_hf=True, resume_from=str(other))
    assert (found.folder, found.full) == (other, True)
    found = start_of(tmp_path, auto_resume=True, finetune_from_hf=True)
    assert (found.folder, found.full) == (tmp_path / "model", False)


def test_without_auto_resume_checkpoints_are_left_alone(tmp_path: Path) -> None:
    checkpoint(tmp_path / "ck", 1000)
    assert start_of(tmp_path, finetune_from_hf=True).folder == tmp_path / "model"


def test_resume_model_only_takes_weights_alone(tmp_path: Path) -> None:
    other = checkpoint(tmp_path / "other", 5)
    found = start_of(tmp_path, resume_from=str(other), resume_model_only=True)
    assert (found.folder, found.full) == (other, False) and "only the weights" in found.reason


def _lost(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _cut_short(folder: Path) -> None:
    (folder / STATE_FILE).write_text("")


def _without_checksum(folder: Path) -> None:
    (folder / "trainer.json").write_text(json.dumps({"steps_done": 7}))


DAMAGE = [
    (_lost("trainer.json"), "trainer.json is missing"),
    (_lost(STATE_FILE), f"{STATE_FILE} is missing"),
    (_cut_short, f"{STATE_FILE} has 0 bytes"),
    (_without_checksum, "trainer.json does not match its checksum"),
    (_lost("manifest.json"), "manifest.json can't be read"),
]


def sound_start_of(tmp_path: Path, **arguments: Any) -> StartPoint:
    return sound_start(TrainingArguments(checkpoint_dir=str(tmp_path / "ck"), **arguments), tmp_path / "model")


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("damage", "reason"), DAMAGE)
def test_a_damaged_checkpoint_that_is_named_is_refused_and_another_offered(
    damage: Callable[[Path], None], reason: str, tmp_path: Path
) -> None:
    named = checkpoint(tmp_path / "other", 5)
    damage(named)
    with pytest.raises(UserError, match=rf"--resume_from .*step_5 is damaged: {reason}.*no other one next to it"):
        sound_start_of(tmp_path, resume_from=str(named))
    checkpoint(tmp_path / "other", 6)
    (tmp_path / "other" / "step_final").symlink_to("step_5")
    for name in ("step_5", "step_final"):
        with pytest.raises(UserError, match=rf"{name} is damaged: {reason}.*The newest other one .*step_6;"):
            sound_start_of(tmp_path, resume_from=str(tmp_path / "other" / name))
    assert not sound_start_of(tmp_path, resume_from=str(named), resume_model_only=True).full, "as the message offers"


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("damage", "reason"), DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    damage: Callable[[Path], None], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = checkpoint(tmp_path / "ck", 5)
    damage(checkpoint(tmp_path / "ck", 6))
    caplog.set_level(logging.WARNING, "bagel_ds")
    logging.getLogger("bagel_ds").propagate = True
    assert sound_start_of(tmp_path, auto_resume=True).folder == before
    assert "step_6" in caplog.text and "skipping" in caplog.text and reason in caplog.text


@pytest.mark.usefixtures("one_rank")
def test_where_every_checkpoint_is_damaged_a_run_does_not_begin_anew(tmp_path: Path) -> None:
    for step in (5, 6):
        checkpoint(tmp_path / "ck", step).joinpath("trainer.json").unlink()
    with pytest.raises(UserError, match="every checkpoint in .*ck is damaged: step_5, step_6. Restore one"):
        sound_start_of(tmp_path, auto_resume=True, finetune_from_hf=True)


@pytest.mark.usefixtures("one_rank")
def test_a_folder_without_state_gives_its_weights_and_says_why(tmp_path: Path) -> None:
    given_up = checkpoint(tmp_path / "other", 5, state=False)
    found = sound_start_of(tmp_path, resume_from=str(given_up))
    assert not found.full and "only the weights, its training state was removed" in found.reason
    (tmp_path / "model").mkdir()
    found = sound_start_of(tmp_path, resume_from=str(tmp_path / "model"))
    assert not found.full and "only the weights, it holds no training state" in found.reason
    (given_up / "model.safetensors").unlink()
    with pytest.raises(UserError, match="step_5 is damaged: model.safetensors is missing"):
        sound_start_of(tmp_path, resume_from=str(given_up))


@pytest.mark.parametrize("given", ["ck", ".", "ck/step_37", "ck/latest"])
def test_a_path_that_is_no_checkpoint_names_those_that_are(given: str, tmp_path: Path) -> None:
    for step in (5, 40, 100):
        checkpoint(tmp_path / ("checkpoints" if given == "." else "ck"), step)
    (tmp_path / "ck").mkdir(exist_ok=True)
    (tmp_path / "ck" / "latest").write_text("step_41\n")
    with pytest.raises(UserError, match=r"--resume_from .*holds step_100, step_40, step_5\."):
        start_of(tmp_path, resume_from=str(tmp_path / given))


def test_many_checkpoints_are_named_by_their_newest(tmp_path: Path) -> None:
    for step in range(1, 21):
        checkpoint(tmp_path / "ck", step)
    with pytest.raises(UserError, match=r"holds step_20, .* step_13, \.\.\. \(20 in all\)"):
        start_of(tmp_path, resume_from=str(tmp_path / "ck"))


def test_latest_is_followed(tmp_path: Path) -> None:
    newest = checkpoint(tmp_path / "other", 7)
    (tmp_path / "other" / "latest").write_text("step_7\n")
    found = start_of(tmp_path, resume_from=str(tmp_path / "other" / "latest"))
    assert found.full and found.folder == newest


def test_nothing_named_is_a_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to start from: pass --finetune_from_hf True"):
        start_of(tmp_path)


# -------------------------------------------------------------------------------------------- what is read from there
@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "demo"
    write_demo(folder)
    return folder / "model"


def shapes_of(model: Path) -> dict[str, tuple[int, ...]]:
    folder = ModelFolder(model)
    with torch.device("meta"):
        network = Bagel(BagelConfig(llm=folder.llm_config(), vit=folder.vit_config()))
    return {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}


def test_the_only_file_is_used_and_named(model: Path) -> None:
    for from_ema in (True, False):
        opened = open_start(
            StartPoint(model, False, "why"), TrainingArguments(finetune_from_ema=from_ema), shapes_of(model), model
        )
        assert opened.state is None and opened.averages is None, "the average starts at the weights"
        text = "\n".join(opened.description)
        assert "ema.safetensors: " in text and "0 missing" in text and "why" in text


@pytest.mark.parametrize(("from_ema", "file"), [(False, "model"), (True, "ema")])
def test_with_both_files_the_argument_chooses_and_the_average_is_emas(
    from_ema: bool, file: str, model: Path, tmp_path: Path
) -> None:
    files = ModelFolder(model).open_weights(True)
    tensors = {name: files.read(name).reshape(files.info(name).shape).float() for name in files.names}
    for stem, shift in (("model", 1.0), ("ema", 2.0)):
        save_file({name: value + shift for name, value in tensors.items()}, tmp_path / f"{stem}.safetensors")
    for name in ("llm_config.json", "vit_config.json"):
        (tmp_path / name).symlink_to(model / name)
    opened = open_start(
        StartPoint(tmp_path, False, ""), TrainingArguments(finetune_from_ema=from_ema), shapes_of(model), tmp_path
    )
    bias = tensors["llm2vae.bias"]
    assert torch.equal(opened.weights.read("llm2vae.bias"), bias + {"model": 1.0, "ema": 2.0}[file])
    if from_ema:
        assert opened.averages is None
    else:
        assert opened.averages is not None
        assert torch.equal(opened.averages.read("llm2vae.bias"), bias + 2.0)


@pytest.mark.parametrize("with_average", [True, False])
def test_a_full_state_gives_masters_frozen_weights_and_average(with_average: bool, tmp_path: Path) -> None:
    values = {MASTER: torch.arange(4.0), EMA: torch.arange(4.0) * 2}
    kinds = [MASTER, EMA] if with_average else [MASTER]
    held = [Held(kind, "w", 0, 4, torch.float32) for kind in kinds] + [Held(WEIGHT, "t", 0, 2, torch.bfloat16)]
    pieces = [(kind, Pieces("w", [(Range("w", 0, 4), values[kind])])) for kind in kinds]
    pieces.append((WEIGHT, Pieces("t", [(Range("t", 0, 2), torch.ones(2, dtype=torch.bfloat16))])))
    (tmp_path / "state").mkdir()
    write_rank(rank_file(tmp_path / "state", 0), held, pieces)
    opened = open_start(StartPoint(tmp_path, True, ""), TrainingArguments(), {"w": (4,), "t": (2,)}, tmp_path)
    assert opened.state is not None
    assert torch.equal(opened.weights.read("w"), values[MASTER]) and opened.weights.read("t").tolist() == [1, 1]
    if with_average:
        assert opened.averages is not None and torch.equal(opened.averages.read("w"), values[EMA])
    else:
        assert opened.averages is None
        assert any("no EMA" in line for line in opened.description)
