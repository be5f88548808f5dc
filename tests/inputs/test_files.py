"""Files that the arguments name and that are missing: all of them found at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from bagel_ds.arguments.run_config import RunConfig, parse_arguments
from bagel_ds.errors import UserError
from bagel_ds.inputs import files, network

NO_MODEL_WORDS = ("bagel-ds download", "bagel-ds demo --out demo")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def config(line: str) -> RunConfig:
    return parse_arguments(line.split())


def fault(line: str) -> str:
    with pytest.raises(UserError) as caught:
        files.check_inputs(config(line))
    return str(caught.value)


def model_folder(path: Path, *without: str) -> Path:
    path.mkdir(parents=True)
    for name in ("llm_config.json", "vit_config.json", "ae.safetensors", "ema.safetensors", "tokenizer.json"):
        if name not in without:
            (path / name).touch()
    return path


def test_the_bare_command_lists_all_that_is_missing_with_the_remedies() -> None:
    message = fault("--ds_config zero9.json")
    for word in ("hf/BAGEL-7B-MoT", "data/configs/example.yaml", "--finetune_from_hf True", "zero9", *NO_MODEL_WORDS):
        assert word in message
    assert message.count("\n  - ") == 4


def test_a_complete_set_of_inputs_passes(tmp_path: Path) -> None:
    model_folder(tmp_path / "model")
    (tmp_path / "data.yaml").touch()
    line = "--model_path model --dataset_config_file data.yaml --finetune_from_hf True"
    files.check_inputs(config(line))
    assert network.resolve_model_path(config(line)) == Path("model")


@pytest.mark.parametrize("name", ["llm_config.json", "vit_config.json", "ae.safetensors", "ema.safetensors"])
def test_a_file_the_model_folder_lacks_is_named(tmp_path: Path, name: str) -> None:
    model_folder(tmp_path / "model", name)
    (tmp_path / "data.yaml").touch()
    message = fault("--model_path model --dataset_config_file data.yaml --finetune_from_hf True")
    assert name in message and "model" in message and NO_MODEL_WORDS[0] in message


@pytest.mark.parametrize("name", ["ema.safetensors", "model.safetensors", "ema.safetensors.index.json"])
def test_either_weights_file_will_do_in_one_piece_or_several(tmp_path: Path, name: str) -> None:
    (model_folder(tmp_path / "model", "ema.safetensors") / name).touch()
    assert files.missing_model_files(tmp_path / "model") == []


def test_a_tokenizer_may_be_one_file_or_vocab_and_merges(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", "tokenizer.json")
    (folder / "vocab.json").touch()
    assert len(files.missing_model_files(folder)) == 1
    (folder / "merges.txt").touch()
    assert files.missing_model_files(folder) == []


def test_a_resumed_run_needs_no_weights_in_the_model_folder(tmp_path: Path) -> None:
    model_folder(tmp_path / "model", "ema.safetensors")
    (tmp_path / "data.yaml").touch()
    line = "--model_path model --dataset_config_file data.yaml"
    assert "nothing to start from" in fault(line)
    assert "nothing to start from" in fault(line + " --auto_resume True --checkpoint_dir checkpoints")
    (tmp_path / "checkpoints" / "step_10").mkdir(parents=True)
    files.check_inputs(config(line + " --auto_resume True --checkpoint_dir checkpoints"))
    files.check_inputs(config(line + " --resume_from checkpoints/step_10"))
    assert "--resume_from" in fault(line + " --resume_from checkpoints/step_11")


def _checkpoint(folder: Path) -> Path:
    """As a save leaves it: a model folder with a manifest and a state."""
    (model_folder(folder) / "state").mkdir()
    (folder / "manifest.json").write_text("{}")
    return folder


@pytest.mark.parametrize("name", ["gone/model", "models/gone", "/gone/model"])
def test_a_resume_whose_base_model_is_gone_is_offered_the_checkpoint(tmp_path: Path, name: str) -> None:
    _checkpoint(tmp_path / "checkpoints" / "step_10")
    (tmp_path / "checkpoints" / "latest").write_text("step_10\n")
    (tmp_path / "data.yaml").touch()
    line = f"--model_path {name} --dataset_config_file data.yaml"
    if files.is_hub_id(name):
        (tmp_path / name.partition("/")[0]).mkdir()  # else it may be an id of the hub
    offer = "pass --model_path checkpoints/step_10 to resume with it"
    for resume in ("--auto_resume True --checkpoint_dir checkpoints", "--resume_from checkpoints/latest"):
        message = fault(f"{line} {resume}")
        assert offer in message and name in message
        files.check_inputs(config(f"{line.replace(name, 'checkpoints/step_10')} {resume}"))
    assert offer not in fault(f"{line} --finetune_from_hf True --checkpoint_dir checkpoints")


def test_a_base_model_that_lost_files_is_replaced_by_the_checkpoint_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    model_folder(tmp_path / "model", "ae.safetensors")
    _checkpoint(tmp_path / "checkpoints" / "step_10")
    (tmp_path / "data.yaml").touch()
    resume = "--dataset_config_file data.yaml --resume_from checkpoints/step_10"
    assert "--model_path checkpoints/step_10" in fault(f"--model_path model {resume}")

    def offline(name: str) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match="--model_path checkpoints/step_10"):
        network.resolve_model_path(config(f"--model_path some/model {resume}"))


def test_a_missing_checkpoint_names_those_that_are_there(tmp_path: Path) -> None:
    _checkpoint(tmp_path / "checkpoints" / "step_10")
    assert "checkpoints holds step_10" in fault("--resume_from checkpoints/step_11")


def test_what_a_file_says_is_missing_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("lr: 1e-5\nmodel_path: /nowhere\n")
    assert "run.yaml, line 2: --model_path /nowhere: no such folder" in fault("--config run.yaml")


def test_a_named_dataset_info_must_exist(tmp_path: Path) -> None:
    model_folder(tmp_path / "model")
    (tmp_path / "data.yaml").touch()
    line = "--model_path model --dataset_config_file data.yaml --finetune_from_hf True --dataset_info info.yaml"
    assert "--dataset_info info.yaml" in fault(line)


@pytest.mark.parametrize(
    "name, is_id",
    [
        ("ByteDance-Seed/BAGEL-7B-MoT", True),
        ("hf/BAGEL-7B-MoT", False),
        ("models/BAGEL-7B-MoT", False),
        ("./ByteDance-Seed/BAGEL-7B-MoT", False),
        ("/models/BAGEL-7B-MoT", False),
        ("BAGEL-7B-MoT", False),
        ("here/BAGEL-7B-MoT", False),
        ("a/b/c", False),
    ],
)
def test_a_hub_id_is_told_from_a_path(tmp_path: Path, name: str, is_id: bool) -> None:
    (tmp_path / "here").mkdir()
    assert files.is_hub_id(name) is is_id


def test_a_hub_model_is_downloaded_and_a_failure_is_one_message(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    run = config("--model_path ByteDance-Seed/BAGEL-7B-MoT")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(tmp_path / name))
    assert network.resolve_model_path(run) == tmp_path / "ByteDance-Seed/BAGEL-7B-MoT"

    def offline(name: str, allow_patterns: None) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match="no route to host"):
        network.resolve_model_path(run)
