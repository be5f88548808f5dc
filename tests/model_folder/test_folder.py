"""Model folders: what is read from them; everything wrong with one is one message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bagel_ds.demo import write_demo
from bagel_ds.errors import UserError
from bagel_ds.model.bagel import Bagel
from bagel_ds.model.embeddings import position_table
from bagel_ds.model.shape.config import BagelConfig
from bagel_ds.model.shape.parts import POSITION_TABLES
from bagel_ds.model_folder.folder import BagelWeights, ModelFolder, latent_side, load_vae
from bagel_ds.model_folder.tensor_files import TensorFiles


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model folder; read only."""
    folder = tmp_path_factory.mktemp("folder") / "demo"
    write_demo(folder)
    return folder / "model"


def shapes_of(model: Path, side: int = 64) -> dict[str, tuple[int, ...]]:
    folder = ModelFolder(model)
    config = BagelConfig(llm=folder.llm_config(), vit=folder.vit_config(), max_latent_size=side)
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in Bagel(config).named_parameters()}


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
    with pytest.raises(UserError, match=rf"index\.json names 2 files, of which the folder lacks 1: {shard}"):
        ModelFolder(tmp_path).open_weights(False)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "adapter_model.safetensors", "model-00001-of-00002.safetensors", "ema.gguf"]
)
def test_weights_that_can_not_be_used_are_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"holds neither .* Found {name}, which can't be used"):
        ModelFolder(tmp_path).open_weights(True)


def test_prefixed_names_are_shown(model: Path, tmp_path: Path) -> None:
    tensors = load_file(model / "ema.safetensors")
    save_file({f"module.{name}": values for name, values in tensors.items()}, tmp_path / "ema.safetensors")
    with pytest.raises(UserError, match=r"vae2llm.weight is missing \(there is module.vae2llm.weight\)"):
        names = {name: shape for name, shape in shapes_of(model).items() if name.startswith(("vae2llm", "latent"))}
        BagelWeights(ModelFolder(tmp_path).open_weights(True), names, False, "here")


@pytest.mark.parametrize("shape", [(), (15, 2), (0, 2), (2, 2, 2)])
def test_a_latent_table_without_a_side_is_a_message(shape: tuple[int, ...], tmp_path: Path) -> None:
    save_file({"latent_pos_embed.pos_embed": torch.zeros(shape)}, tmp_path / "ema.safetensors")
    with pytest.raises(UserError, match="latent_pos_embed.pos_embed has shape .*, expected a square number of rows"):
        latent_side(ModelFolder(tmp_path).open_weights(True))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("encoder.conv_in.weight", ()),
        ("encoder.conv_in.weight", (0, 3, 3, 3)),
        ("decoder.conv_in.weight", (4,)),
        ("encoder.down.1.block.0.conv1.weight", (4,)),
    ],
)
def test_an_autoencoder_of_odd_shapes_is_a_message(
    name: str, shape: tuple[int, ...], model: Path, tmp_path: Path
) -> None:
    save_file({**load_file(model / "ae.safetensors"), name: torch.zeros(shape)}, tmp_path / "ae.safetensors")
    with pytest.raises(UserError, match=f"tensor {name} has shape .*, expected 4 dimensions"):
        load_vae(tmp_path / "ae.safetensors")


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_a_broken_index_is_a_message(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json"):
        ModelFolder(tmp_path).open_weights(False)


def test_weights_are_the_files_and_tables_are_computed(model: Path) -> None:
    shapes = shapes_of(model)
    files = ModelFolder(model).open_weights(True)
    weights = BagelWeights(files, shapes, True, "here")
    assert not weights.unexpected and not weights.copied
    assert set(weights.loaded) | set(POSITION_TABLES) == set(shapes)
    for name in ("llm2vae.weight", "connector.fc1.bias"):
        assert torch.equal(weights.read(name, 3, 9), files.read(name, 3, 9))
    table = position_table(shapes["latent_pos_embed.pos_embed"][1], 64).flatten()
    assert torch.equal(weights.read("latent_pos_embed.pos_embed", 100, 50), table[100:150])
    assert latent_side(files) == 64


def test_the_generation_expert_starts_as_a_copy_where_the_file_has_none(model: Path, tmp_path: Path) -> None:
    files = ModelFolder(model).open_weights(True)
    plain = {name: files.read(name).reshape(files.info(name).shape) for name in files.names if "_moe_gen" not in name}
    save_file(plain, tmp_path / "plain.safetensors")
    shapes = shapes_of(model)
    source = TensorFiles([tmp_path / "plain.safetensors"])
    weights = BagelWeights(source, shapes, True, "plain")
    assert set(weights.copied) == {name for name in shapes if "_moe_gen" in name}
    for name, twin in list(weights.copied.items())[:5]:
        assert torch.equal(weights.read(name), files.read(twin))
    with pytest.raises(UserError, match="_moe_gen.* is missing"):
        BagelWeights(source, shapes, False, "plain")


def test_a_side_that_contradicts_the_file_says_which_to_pass(model: Path) -> None:
    with pytest.raises(UserError, match="max_latent_size=16 .* holds 64x64 positions; pass --max_latent_size 64"):
        BagelWeights(ModelFolder(model).open_weights(True), shapes_of(model, side=16), True, "here")


def test_the_autoencoder_is_read_with_its_own_sizes(model: Path) -> None:
    vae = load_vae(model / "ae.safetensors")
    assert vae.config.z_channels == 16 and vae.config.downsample == 8
    assert not any(parameter.requires_grad for parameter in vae.parameters())


def test_the_encoder_alone_is_read_where_nothing_is_decoded(model: Path) -> None:
    whole, encoder = load_vae(model / "ae.safetensors"), ModelFolder(model).load_vae(decodes=False)
    assert encoder.config == whole.config and not hasattr(encoder, "decoder")
    found = dict(encoder.named_parameters())
    assert found.keys() == {name for name, _ in whole.named_parameters() if name.startswith("encoder.")}
    assert all(torch.equal(found[name], parameter) for name, parameter in whole.encoder.named_parameters("encoder"))
    assert not any(parameter.requires_grad for parameter in found.values())


def test_an_autoencoder_without_its_decoder_is_a_message_also_where_nothing_is_decoded(
    model: Path, tmp_path: Path
) -> None:
    """The file goes into every checkpoint, which is to be a whole model."""
    tensors = load_file(model / "ae.safetensors")
    del tensors["decoder.conv_out.weight"]
    save_file(tensors, tmp_path / "ae.safetensors")
    with pytest.raises(UserError, match="tensor decoder.conv_out.weight is missing"):
        load_vae(tmp_path / "ae.safetensors", decodes=False)


def test_another_file_as_autoencoder_is_a_message(model: Path) -> None:
    with pytest.raises(UserError, match="not the FLUX autoencoder"):
        load_vae(model / "ema.safetensors")
