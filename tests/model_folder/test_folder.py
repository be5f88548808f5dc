"""Model folders: what is read from them; everything wrong with one is one message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bagel_ds.errors import UserError
from bagel_ds.model_folder.folder import ModelFolder


def copied(tmp_path: Path, **tensors: torch.Tensor) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for stem, values in tensors.items():
        save_file({"w": values}, folder / f"{stem}.safetensors")
    return folder


def test_configs_are_those_of_the_files(model: Path) -> None:
    llm, vit = ModelFolder(model).llm_config(), ModelFolder(model).vit_config()
    written = json.loads((model / "llm_config.json").read_text())
    assert (llm.hidden_size, llm.num_hidden_layers) == (written["hidden_size"], written["num_hidden_layers"])
    layers = json.loads((model / "vit_config.json").read_text())["num_hidden_layers"]
    assert vit.num_layers == layers - 1, "vit_select_layer -2 leaves out the last"
    assert ModelFolder(model).vit_config(select_layer=-1).num_layers == layers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "128"}, "hidden_size is '128', expected a whole number from 1 to 16,777,216"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected a whole number from 1 to 1,000"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected a whole number from 1 to 1,000"),
        ({"vocab_size": 10**30}, "vocab_size is 10+, expected a whole number from 1 to 16,777,216"),
        ({"num_attention_heads": 3}, "num_attention_heads 3 does not divide hidden_size 128"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 4"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny', expected a number above 0"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06, expected a number above 0"),
        ({"rope_theta": float("nan")}, "rope_theta is nan, expected a number above 0"),
        ({"rope_theta": float("inf")}, "rope_theta is inf, expected a number above 0"),
        ({"qk_norm": "yes"}, "qk_norm is 'yes', expected true or false"),
    ],
)
def test_what_a_config_must_hold(change: dict, message: str, model: Path, tmp_path: Path) -> None:
    content = {**json.loads((model / "llm_config.json").read_text()), **change}
    kept = {name: value for name, value in content.items() if value is not None}
    (tmp_path / "llm_config.json").write_text(json.dumps(kept))
    with pytest.raises(UserError, match=rf"llm_config\.json: {message}"):
        ModelFolder(tmp_path).llm_config()


def test_all_faults_of_a_config_are_listed_at_once(tmp_path: Path) -> None:
    (tmp_path / "vit_config.json").write_text(json.dumps({"hidden_size": -3}))
    with pytest.raises(UserError) as raised:
        ModelFolder(tmp_path).vit_config()
    assert "num_hidden_layers is missing" in str(raised.value) and "hidden_size is -3" in str(raised.value)


@pytest.mark.parametrize(
    ("there", "prefer_ema", "expected"),
    [
        (("model", "ema"), True, 2.0),
        (("model", "ema"), False, 1.0),
        (("model",), True, 1.0),
        (("ema",), False, 2.0),
    ],
)
def test_which_file_weights_come_from(
    there: tuple[str, ...], prefer_ema: bool, expected: float, tmp_path: Path
) -> None:
    values = {"model": torch.ones(1), "ema": torch.full((1,), 2.0)}
    folder = copied(tmp_path, **{stem: values[stem] for stem in there})
    assert ModelFolder(folder).open_weights(prefer_ema).read("w").item() == expected


def test_an_index_names_the_shards(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "model-2.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert sorted(ModelFolder(tmp_path).open_weights(False).names) == ["a", "b"]


def test_the_largest_numbers_of_a_config_are_accepted(model: Path, tmp_path: Path) -> None:
    content = json.loads((model / "llm_config.json").read_text())
    (tmp_path / "llm_config.json").write_text(json.dumps({**content, "num_hidden_layers": 1000, "vocab_size": 2**24}))
    found = ModelFolder(tmp_path).llm_config()
    assert (found.num_hidden_layers, found.vocab_size) == (1000, 2**24)


def test_heads_of_the_vit_divide_its_width(model: Path, tmp_path: Path) -> None:
    content = json.loads((model / "vit_config.json").read_text())
    (tmp_path / "vit_config.json").write_text(json.dumps({**content, "num_attention_heads": 3}))
    with pytest.raises(UserError, match=r"vit_config\.json: num_attention_heads 3 does not divide hidden_size 64"):
        ModelFolder(tmp_path).vit_config()


def test_a_layer_before_the_first_can_not_be_selected(model: Path) -> None:
    assert ModelFolder(model).vit_config(select_layer=-4).num_layers == 0
    with pytest.raises(UserError, match="--vit_select_layer -5: .* has only 3 layers"):
        ModelFolder(model).vit_config(select_layer=-5)


@pytest.mark.parametrize("shard", ["model-2.safetensors", "../model-1.safetensors"])
def test_shards_that_the_index_names_must_be_in_the_folder(shard: str, tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": shard}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=rf"index\.json names 2 files, but 1 of them are missing: {shard}"):
        ModelFolder(tmp_path).open_weights(False)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "adapter_model.safetensors", "model-00001-of-00002.safetensors", "ema.gguf"]
)
def test_weights_that_can_not_be_used_are_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"holds neither .* Found {name}, which has another name or format"):
        ModelFolder(tmp_path).open_weights(True)


@pytest.mark.parametrize("above", [".", "checkpoints"])
def test_for_the_folder_of_a_run_its_newest_checkpoint_is_named(above: str, tmp_path: Path) -> None:
    for step in (9, 10):
        (tmp_path / above / f"step_{step}").mkdir(parents=True)
        save_file({"a": torch.ones(1)}, tmp_path / above / f"step_{step}" / "model.safetensors")
    (tmp_path / above / "step_11").mkdir()  # without weights, as an adapter's
    (tmp_path / above / "step_final").symlink_to("step_10")
    with pytest.raises(UserError, match="holds neither .* pass a checkpoint, such as .*step_10[.]$"):
        ModelFolder(tmp_path).open_weights(True)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_a_broken_index_is_a_message(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json"):
        ModelFolder(tmp_path).open_weights(False)
