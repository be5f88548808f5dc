"""Adapter folders: read and written as peft does, and refused with the reason where they can't be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bagel_ds.errors import UserError
from bagel_ds.lora.peft_files import CONFIG, WEIGHTS, AdapterFolder, AdapterRecord, holds_adapter, peft_name
from bagel_ds.model.shape.lora import LoRA, is_adapter
from bagel_ds.model.shape.parameters import adapted_layers
from tests.model.test_bagel import loss_of, pack, tiny
from tests.model.test_lora import adapted


def write_adapter(folder: Path, model: Any, **config: Any) -> Path:
    """The adapter of a network as training writes it, with changed keys of its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    record = AdapterRecord(model.config.lora, adapted_layers(model.config), "base", "0123")
    (folder / CONFIG).write_text(json.dumps(json.loads(record.config()) | config))
    tensors = {peft_name(name): value.detach().clone() for name, value in model.named_parameters() if is_adapter(name)}
    save_file(tensors, folder / WEIGHTS, record.metadata())
    return folder


def test_what_is_written_is_read(tmp_path: Path) -> None:
    model = adapted(targets="gen", alpha=6.0)
    found = AdapterFolder(write_adapter(tmp_path, model))
    assert found.layers == adapted_layers(model.config) and found.rank == 4
    assert found.base == "base" and found.fingerprint == "0123"
    layer = min(found.layers)
    assert found.scale(layer) == 1.5
    assert torch.equal(found.a(layer), model.get_parameter(f"{layer}.lora_A"))
    assert torch.equal(found.rows_of_b(layer, 3, 9), model.get_parameter(f"{layer}.lora_B")[3:9])
    found.check_fits({name: tuple(value.shape) for name, value in model.named_parameters()})


@pytest.mark.parametrize("targets", ["gen", "both", ".*"])
def test_peft_reads_it_and_computes_the_same(tmp_path: Path, targets: str) -> None:
    peft = pytest.importorskip("peft")
    model, plain, batch = adapted(targets=targets), tiny(), pack(6, labels=True, drawn=(2, 3))
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(model.get_parameter(name))
    wrapped = peft.PeftModel.from_pretrained(plain, write_adapter(tmp_path, model))
    assert loss_of(wrapped, batch).item() == pytest.approx(loss_of(model, batch).item(), rel=2e-6)


@pytest.mark.parametrize("wrapped", ["whole", "language_model"])
def test_what_peft_writes_is_read(tmp_path: Path, wrapped: str) -> None:
    peft = pytest.importorskip("peft")
    plain = tiny()
    root = plain if wrapped == "whole" else plain.language_model
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=r".*self_attn\.(q|v)_proj_moe_gen", init_lora_weights=False
    )
    trained = peft.get_peft_model(root, config)
    trained.save_pretrained(tmp_path)
    found = AdapterFolder(tmp_path)
    assert len(found.layers) == 2 * plain.config.llm.num_hidden_layers
    assert all(layer.startswith("language_model.model.layers.") for layer in found.layers)
    found.check_fits({name: tuple(value.shape) for name, value in tiny().named_parameters()})
    held = load_file(tmp_path / WEIGHTS)
    layer = min(found.layers)
    assert any(torch.equal(found.a(layer), value) for value in held.values())


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3': only LORA is supported"),
        ({"use_dora": True}, "use_dora True is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"r": "16"}, "r '16': expected a number above 0"),
        ({"r": 0}, "r 0: expected a number above 0"),
        ({"lora_alpha": True}, "lora_alpha True: expected a number above 0"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
    ],
)
def test_another_kind_of_adapter_is_refused(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        AdapterFolder(write_adapter(tmp_path, adapted(), **config))
    assert said in str(error.value) and str(tmp_path) in str(error.value)


def _without_b(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(name for name in tensors if "lora_B" in name)]


def _unknown(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.llm2vae.lora_magnitude_vector"] = torch.zeros(3)


def _other_rank(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = torch.zeros(5, tensors[name].shape[1])


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[next(iter(tensors))].view(-1)[3] = torch.nan


def _whole(tensors: dict[str, torch.Tensor]) -> None:
    name = next(iter(tensors))
    tensors[name] = torch.zeros(tensors[name].shape, dtype=torch.int8)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_without_b, "is missing"),
        (_unknown, "expected a name such as"),
        (_other_rank, "are not [rank, inputs] and [outputs, rank]"),
        (_nan, "holds nan at element 3"),
        (_whole, "expected floating-point numbers"),
        (lambda tensors: tensors.clear(), "holds no adapter"),
    ],
)
def test_damaged_weights_are_one_message(tmp_path: Path, damage: Any, said: str) -> None:
    write_adapter(tmp_path, adapted())
    tensors = load_file(tmp_path / WEIGHTS)
    damage(tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(UserError) as error:
        AdapterFolder(tmp_path)
    assert said in str(error.value) and str(tmp_path / WEIGHTS) in str(error.value)


@pytest.mark.parametrize("content", ["[]", "{", '"r"', "[[" * 2000])
def test_a_configuration_of_nonsense_is_one_message(tmp_path: Path, content: str) -> None:
    write_adapter(tmp_path, adapted())
    (tmp_path / CONFIG).write_text(content)
    with pytest.raises(UserError, match=CONFIG):
        AdapterFolder(tmp_path)


def test_folders_without_one_of_the_files_are_named(tmp_path: Path) -> None:
    assert not holds_adapter(tmp_path)
    with pytest.raises(UserError, match=f"holds no {CONFIG}"):
        AdapterFolder(tmp_path)
    write_adapter(tmp_path, adapted())
    assert holds_adapter(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(UserError, match=f"but no {WEIGHTS}"):
        AdapterFolder(tmp_path)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    found = AdapterFolder(write_adapter(tmp_path, adapted()))
    shapes = {name: tuple(value.shape) for name, value in tiny().named_parameters()}
    layer = min(found.layers)
    with pytest.raises(UserError, match="the model's has"):
        found.check_fits(shapes | {f"{layer}.weight": (7, 9)})
    del shapes[f"{layer}.weight"]
    with pytest.raises(UserError, match=f"the model has no layer {layer}"):
        found.check_fits(shapes)


def test_rank_stabilized_adapters_have_their_scale(tmp_path: Path) -> None:
    found = AdapterFolder(write_adapter(tmp_path, adapted(rank=4, alpha=8.0), use_rslora=True))
    assert found.scale(min(found.layers)) == 4.0
    assert LoRA(4, 8.0).scale == 2.0
