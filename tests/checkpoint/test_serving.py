"""Exports for other programs, read the way each program reads a folder, and the README of a checkpoint.

The readers below do what the programs do, faults included: names that are not known are skipped, what a file lacks
keeps its random numbers (NaN here).
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bagel_ds.checkpoint.serving import checkpoint_readme
from bagel_ds.checkpoint.state import Held
from bagel_ds.checkpoint.step_folders import write_json, write_manifest
from bagel_ds.cli import main
from bagel_ds.demo.model import network_config, write_model
from bagel_ds.demo.tokenizer import train_tokenizer
from bagel_ds.model.bagel import Bagel
from bagel_ds.model.embeddings import position_table
from bagel_ds.model.shape.config import BagelConfig, LLMConfig, ViTConfig
from bagel_ds.model_folder.average import average_or_weights
from bagel_ds.model_folder.folder import ModelFolder
from bagel_ds.ranges import Pieces, Range
from tests.checkpoint.written import write_rank

Tensors = dict[str, Tensor]
LATENT, VIT = "latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed"
PROGRAMS = ("original", "comfyui", "vllm-omni")
LONG, SHORT = 6932, 6931  # steps on both sides of the half-life of decay 0.9999


# ------------------------------------------------------------------------------------------------------ checkpoints
@pytest.fixture(scope="module")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "model"
    write_model(folder, train_tokenizer(["a red square", "a blue ring"], vocab_size=300), seed=1)
    return folder


@pytest.fixture
def checkpoint(demo_model: Path, tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "step_7", demo_model, LONG)


def make_checkpoint(
    folder: Path, model: Path, steps: int, average: bool = True, changed: Tensors | None = None, **arguments: Any
) -> Path:
    """A checkpoint of one rank: the trained weights are those of `model` + 1, their average those of `model` - 1."""
    folder.mkdir()
    start = load_file(model / "ema.safetensors") | (changed or {})
    for path in model.iterdir():
        if path.name != "ema.safetensors":
            shutil.copyfile(path, folder / path.name)
    held, pieces = [], []
    shifts = {"model": ("master", 1.0), "ema": ("ema", -1.0)} if average else {"model": ("master", 1.0)}
    for name, tensor in start.items():
        for kind, shift in [("weight", 0.0)] if name in (LATENT, VIT) else shifts.values():
            values = (tensor.float() + shift).flatten()
            held.append(Held(kind, name, 0, values.numel(), torch.float32))
            pieces.append((kind, Pieces(name, [(Range(name, 0, values.numel()), values)])))
    (folder / "state").mkdir()
    write_rank(folder / "state" / "rank_00000.safetensors", held, pieces)
    for stem, (_, shift) in shifts.items():
        save_file({name: saved(name, tensor, shift) for name, tensor in start.items()}, folder / f"{stem}.safetensors")
    described = {"arguments": {"ema": 0.9999 if average else 0.0, **arguments}, "world_size": 1, "plan_state": None}
    write_json(folder / "trainer.json", {"steps_done": steps, **described})
    write_manifest(folder, {})
    return folder


def saved(name: str, tensor: Tensor, shift: float) -> Tensor:
    return tensor if name in (LATENT, VIT) else (tensor.float() + shift).to(torch.bfloat16)


def export(checkpoint: Path, out: Path, *words: str) -> int:
    return main.main(["export", str(checkpoint), "--out", str(out), *words])


# ---------------------------------------------------------------------------------------------------------- readers
def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def load_without_checks(config: BagelConfig, found: Tensors) -> Tensors:
    """As load_state_dict(strict=False): unknown names are skipped, what is missing stays random."""
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Bagel(config).named_parameters()}
    network = {name: torch.full(tuple(shape), math.nan, dtype=torch.bfloat16) for name, shape in shapes.items()}
    return network | {name: tensor for name, tensor in found.items() if name in network}


def llm_of(found: dict[str, Any], **fixed: Any) -> LLMConfig:
    """With the defaults of the original's Qwen2Config where a key is missing."""
    defaults = {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "qk_norm": False, "tie_word_embeddings": False}
    return LLMConfig(**{name: ({**defaults, **found, **fixed})[name] for name in LLMConfig.__dataclass_fields__})


def vit_of(found: dict[str, Any], side: int) -> ViTConfig:
    """One layer fewer than the file says, and as many learned positions as the image has patches."""
    assert found["image_size"] // found["patch_size"] == side
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "patch_size")
    layers = found["num_hidden_layers"] - 1
    return ViTConfig(**{name: found[name] for name in names}, num_layers=layers, max_patches_per_side=side)


def original(folder: Path) -> tuple[Tensors, BagelConfig, Tensors]:
    """app.py: ema.safetensors and ae.safetensors only, two configs, sizes of its own."""
    assert all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))  # Qwen2Tokenizer
    llm = llm_of(read_json(folder / "llm_config.json"), qk_norm=True, tie_word_embeddings=False)
    config = BagelConfig(llm=llm, vit=vit_of(read_json(folder / "vit_config.json"), 70), max_latent_size=64)
    found = load_file(folder / "ema.safetensors")
    assert found["vit_model.vision_model.embeddings.patch_embedding.weight"].dim() == 2
    network = load_without_checks(config, found)
    for name in (LATENT, VIT):  # train/fsdp_utils.py
        found.pop(name)
    for name, tensor in network.items():  # a shape that differs is an error
        assert tensor.shape == load_without_checks(config, {})[name].shape, name
    return network, config, load_file(folder / "ae.safetensors")


def comfyui(folder: Path) -> tuple[Tensors, BagelConfig, Tensors]:
    """As the original; the autoencoder may also lie in vae/."""
    network, config, _ = original(folder)
    vae = folder / "ae.safetensors"
    return network, config, load_file(vae if vae.exists() else folder / "vae" / "ae.safetensors")


def vllm_omni(folder: Path) -> tuple[Tensors, BagelConfig, Tensors]:
    """config.json, then every weight file of the folder, or of the index; names it does not know are skipped."""
    whole = read_json(folder / "config.json")
    assert whole.get("model_type") == "bagel" or "BagelForConditionalGeneration" in whole.get("architectures", [])
    assert read_json(folder / "preprocessor_config.json")["image_mean"] == [0.5, 0.5, 0.5]
    index = folder / "model.safetensors.index.json"
    if index.exists():
        paths = sorted({folder / name for name in read_json(index)["weight_map"].values()})
    else:
        paths = sorted(folder.glob("*.safetensors"))
    found: Tensors = {}
    for path in paths:
        for name, tensor in load_file(path).items():
            for prefix in ("module.", "model."):
                name = name.removeprefix(prefix)
            found[name] = tensor
    side = whole.get("max_latent_size", 32)
    if LATENT in found:
        side = round(found[LATENT].shape[0] ** 0.5)
    config = BagelConfig(
        llm=llm_of(read_json(folder / "llm_config.json")),
        vit=vit_of(read_json(folder / "vit_config.json"), whole["vit_max_num_patch_per_side"]),
        z_channels=whole["vae_config"]["z_channels"],
        latent_patch_size=whole["latent_patch_size"],
        max_latent_size=side,
        connector_act=whole["connector_act"],
        timestep_shift=whole["timestep_shift"],
    )
    assert whole["interpolate_pos"] is False and whole["vae_config"]["downsample"] == 8
    empty = load_without_checks(config, {})
    right = {name: tensor for name, tensor in found.items() if name in empty and tensor.shape == empty[name].shape}
    return (
        empty | right,
        config,
        {name: each for name, each in found.items() if name.startswith(("encoder", "decoder"))},
    )


READERS = {"original": original, "comfyui": comfyui, "vllm-omni": vllm_omni}


def expected(model: Path, content: str) -> Tensors:
    shift = {"model": 1.0, "ema": -1.0}[content]
    return {name: saved(name, tensor, shift) for name, tensor in load_file(model / "ema.safetensors").items()}


def assert_equal(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def content_of(network: Tensors, model: Path) -> str:
    """Which of the two a reader got: "model" or "ema"."""
    name = "language_model.model.norm.weight"
    matches = [content for content in ("model", "ema") if torch.equal(network[name], expected(model, content)[name])]
    return matches[0]


# ---------------------------------------------------------------------------------------------------------- layouts
@pytest.mark.parametrize("steps, content", [(LONG, "ema"), (SHORT, "model")])
@pytest.mark.parametrize("program", PROGRAMS)
def test_each_program_gets_every_tensor_of_what_is_to_be_served(
    program: str, steps: int, content: str, demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, out = make_checkpoint(tmp_path / "step_7", demo_model, steps), tmp_path / "out"
    assert export(checkpoint, out, "--for", program) == 0
    network, config, vae = READERS[program](out)
    assert_equal(network, expected(demo_model, content))
    assert_equal(vae, load_file(demo_model / "ae.safetensors"))
    assert config == network_config(ModelFolder(demo_model).llm_config().vocab_size - 1)
    with safe_open(out / "ema.safetensors", "pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "training_steps": str(steps),
            "ema_decay": "0.9999",
            "content": content,
        }
    other, held = {"ema": ("model", "the EMA"), "model": ("ema", "the weights")}[content]
    apart = load_file(out / "not_served" / f"{other}.safetensors")
    assert_equal(apart, expected(demo_model, other))
    assert sorted(path.name for path in out.glob("*.safetensors*")) == ["ae.safetensors", "ema.safetensors"]
    assert read_json(out / "export.json")["ema.safetensors"].startswith(f"holds {held}: ")
    assert f"ema.safetensors holds {held}: " in capsys.readouterr().err
    assert average_or_weights(out).stem == "ema", "this package loads the same"


@pytest.mark.parametrize("serve, steps", [("ema", SHORT), ("model", LONG)])
def test_what_is_asked_for_is_served_whatever_the_half_life(
    serve: str, steps: int, demo_model: Path, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path / "step_7", demo_model, steps)
    assert export(checkpoint, tmp_path / "out", "--for", "original", "--serve", serve) == 0
    assert_equal(original(tmp_path / "out")[0], expected(demo_model, serve))


def test_without_an_average_the_weights_are_served_and_nothing_lies_apart(demo_model: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "step_7", demo_model, LONG, average=False)
    assert export(checkpoint, tmp_path / "out", "--for", "vllm-omni") == 0
    assert_equal(vllm_omni(tmp_path / "out")[0], expected(demo_model, "model"))
    assert not (tmp_path / "out" / "not_served").exists()


def test_fp32_is_said_in_the_configs(checkpoint: Path, demo_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export(checkpoint, out, "--for", "vllm-omni", "--save_dtype", "fp32") == 0
    assert read_json(out / "config.json")["torch_dtype"] == "float32"
    assert read_json(out / "config.json")["llm_config"] == read_json(out / "llm_config.json")
    assert read_json(out / "config.json")["vit_config"] == read_json(out / "vit_config.json")
    found = load_file(out / "ema.safetensors")["llm2vae.weight"]
    assert torch.equal(found, load_file(demo_model / "ema.safetensors")["llm2vae.weight"].float() - 1)


@pytest.mark.parametrize("side", [32, 80])
@pytest.mark.parametrize("program, served_side", [("original", 64), ("comfyui", 64), ("vllm-omni", None)])
def test_a_latent_table_of_another_side_becomes_the_one_a_program_builds(
    program: str, served_side: int | None, side: int, demo_model: Path, tmp_path: Path
) -> None:
    changed = {LATENT: position_table(128, side).bfloat16()}
    checkpoint = make_checkpoint(tmp_path / "step_7", demo_model, LONG, changed=changed)
    assert export(checkpoint, tmp_path / "out", "--for", program) == 0
    network, config, _ = READERS[program](tmp_path / "out")
    found = network[LATENT].unflatten(0, (-1, config.max_latent_size))
    assert config.max_latent_size == (served_side or side)
    both = min(side, config.max_latent_size)
    trained = changed[LATENT].unflatten(0, (side, side))
    assert torch.equal(found[:both, :both], trained[:both, :both]), "the same row and column, the same embedding"
    wanted = {name: each for name, each in expected(demo_model, "ema").items() if name != LATENT}
    assert_equal({name: each for name, each in network.items() if name != LATENT}, wanted)
    assert read_json(tmp_path / "out" / "config.json")["max_latent_size"] == config.max_latent_size


@pytest.mark.parametrize("program", PROGRAMS)
def test_values_that_the_configs_leave_to_a_default_or_get_wrong_are_written(
    program: str, demo_model: Path, tmp_path: Path
) -> None:
    """The original's default rope_theta is 10000; vit_select_layer may have built other layers than num_hidden - 1."""
    model = tmp_path / "model"
    shutil.copytree(demo_model, model)
    llm, vit = (read_json(model / f"{name}_config.json") for name in ("llm", "vit"))
    del llm["rope_theta"], llm["qk_norm"], vit["image_size"]
    (model / "llm_config.json").write_text(json.dumps(llm))
    (model / "vit_config.json").write_text(json.dumps({**vit, "num_hidden_layers": 7}))
    (model / "config.json").write_text('{"name": [1, 2],}')  # as an early release had it
    checkpoint = make_checkpoint(tmp_path / "step_7", model, LONG)
    assert export(checkpoint, tmp_path / "out", "--for", program) == 0
    network, config, _ = READERS[program](tmp_path / "out")
    assert config.llm.rope_theta == 1e6
    assert_equal(network, expected(model, "ema"))


def test_side_files_are_those_of_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "preprocessor_config.json").write_text('{"mine": 1}')
    assert export(checkpoint, tmp_path / "out", "--for", "vllm-omni") == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "preprocessor_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (checkpoint / name).read_bytes()
    assert not (tmp_path / "out" / "trainer.json").exists()


def test_layouts_replace_each_other_without_a_leftover(checkpoint: Path, demo_model: Path, tmp_path: Path) -> None:
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    orders = [[], ["--for", "vllm-omni"], ["--max_shard_size", "1MB"], ["--for", "original"], []]
    for words in orders:
        assert export(checkpoint, out, *words) == 0
        assert export(checkpoint, fresh, *words) == 0
        found, wanted = ({path.relative_to(each) for path in each.rglob("*")} for each in (out, fresh))
        assert {path for path in found - wanted if ".safetensors" in path.name} == set()
        assert wanted <= found and not (out / "not_served").exists() == ("--for" not in words)
        shutil.rmtree(fresh)


def test_a_plain_export_carries_the_numbers_of_its_average(demo_model: Path, tmp_path: Path) -> None:
    for steps, stem in (LONG, "ema"), (SHORT, "model"):
        checkpoint = make_checkpoint(tmp_path / f"step_{steps}", demo_model, steps)
        for words in [], ["--max_shard_size", "1MB"]:
            assert export(checkpoint, tmp_path / "out", *words) == 0
            assert average_or_weights(tmp_path / "out").stem == stem
            assert len(ModelFolder(tmp_path / "out").weight_files("ema")) == 1 or words


# -------------------------------------------------------------------------------------------------------- bad input
def refused(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert export(checkpoint, tmp_path / "out", *words) == 2
    assert not (tmp_path / "out").exists()
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize(
    "words, message",
    [
        (["--for", "original", "--max_shard_size", "5GB"], "--max_shard_size can't be combined with --for original"),
        (["--for", "vllm-omni", "--max_shard_size", "5GB"], "--max_shard_size can't be combined with --for vllm-omni"),
        (["--for", "diffusers"], "--for diffusers is not known; expected original, comfyui or vllm-omni"),
        (["--for", "original", "--serve", "average"], "--serve average is not known; expected auto, ema or model"),
        (["--serve", "ema"], "--serve ema needs --for"),
    ],
)
def test_options_that_do_not_fit_are_one_message(
    words: list[str], message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(checkpoint, tmp_path, capsys, *words)


def test_an_average_that_is_not_there_is_refused(
    demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = make_checkpoint(tmp_path / "step_7", demo_model, LONG, average=False)
    message = refused(checkpoint, tmp_path, capsys, "--for", "original", "--serve", "ema")
    assert "holds no EMA" in message and "--serve model" in message


def test_what_a_program_builds_otherwise_is_refused_and_vllm_omni_reads_it_from_config_json(
    demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = make_checkpoint(tmp_path / "step_7", demo_model, LONG, interpolate_pos=True)
    message = refused(checkpoint, tmp_path, capsys, "--for", "comfyui")
    assert "--for comfyui: it always builds interpolate_pos False, but this model has True" in message
    assert export(checkpoint, tmp_path / "out", "--for", "vllm-omni") == 0
    assert read_json(tmp_path / "out" / "config.json")["interpolate_pos"] is True


def test_every_fault_of_a_network_that_can_not_be_served_is_listed(
    demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    position = "vit_model.vision_model.embeddings.position_embedding.weight"
    changed = {VIT: position_table(128, 40).bfloat16(), position: torch.zeros(1600, 64, dtype=torch.bfloat16)}
    features = {
        "vae2llm.weight": torch.zeros(128, 16),
        "llm2vae.weight": torch.zeros(16, 128),
        "llm2vae.bias": torch.zeros(16),
    }
    changed |= {name: tensor.bfloat16() for name, tensor in features.items()}
    checkpoint = make_checkpoint(tmp_path / "step_7", demo_model, LONG, changed=changed)
    message = refused(checkpoint, tmp_path, capsys, "--for", "original")
    assert "builds latent_patch_size 2, but this model has 1" in message
    assert "builds vit_max_num_patch_per_side 70, but this model has 40" in message
    assert export(checkpoint, tmp_path / "out", "--for", "vllm-omni") == 0
    network, config, _ = vllm_omni(tmp_path / "out")
    assert (config.latent_patch_size, config.vit.max_patches_per_side) == (1, 40)
    assert not any(tensor.isnan().any() for tensor in network.values())


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("name", ["ae.safetensors", "vocab.json", "merges.txt"])
def test_a_missing_side_file_is_named(
    name: str, program: str, demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(demo_model, model)
    (model / name).unlink()
    checkpoint = make_checkpoint(tmp_path / "step_7", model, LONG)
    if program == "vllm-omni" and name != "ae.safetensors":
        assert export(checkpoint, tmp_path / "out", "--for", program) == 0, "it reads tokenizer.json"
    else:
        assert name in refused(checkpoint, tmp_path, capsys, "--for", program)


@pytest.mark.parametrize("program", PROGRAMS)
def test_names_that_a_program_would_skip_or_miss_are_refused(
    program: str, demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = make_checkpoint(tmp_path / "step_7", demo_model, LONG, changed={"lora_a.weight": torch.zeros(2)})
    assert "such as lora_a.weight" in refused(extra, tmp_path, capsys, "--for", program)
    model = tmp_path / "model"
    shutil.copytree(demo_model, model)
    weights = load_file(model / "ema.safetensors")
    del weights["language_model.model.layers.1.mlp_moe_gen.up_proj.weight"]
    save_file(weights, model / "ema.safetensors")
    lacking = make_checkpoint(tmp_path / "step_8", model, LONG)
    message = refused(lacking, tmp_path, capsys, "--for", program)
    assert "layers.1.mlp_moe_gen.up_proj.weight is missing" in message


def test_weights_in_the_subfolder_that_no_export_wrote_are_kept(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    precious = tmp_path / "out" / "not_served" / "model.safetensors"
    precious.parent.mkdir(parents=True)
    precious.write_text("precious")
    assert export(checkpoint, tmp_path / "out", "--for", "original") == 2
    assert "weights that no export wrote (not_served/model.safetensors)" in capsys.readouterr().err
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [precious]


def test_a_config_that_no_export_wrote_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    shutil.copyfile(checkpoint / "config.json", tmp_path / "out" / "config.json")
    assert export(checkpoint, tmp_path / "out", "--for", "original") == 2, "config.json is made, not copied"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]


# -------------------------------------------------------------------------------------------- README of a checkpoint
@pytest.mark.parametrize("average", [True, False])
def test_the_readme_names_the_file_that_each_program_takes(average: bool, demo_model: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "step_7", demo_model, SHORT, average)
    shutil.copyfile(checkpoint / "tokenizer.json", checkpoint / "preprocessor_config.json")
    (checkpoint / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    rows = [line.split("|") for line in checkpoint_readme(checkpoint).splitlines() if line.startswith("| ")]
    takes = {row[1].strip(): row[2].partition(":")[0].strip().strip("`") for row in rows}
    assert content_of(vllm_omni(checkpoint)[0], demo_model) == "model" and takes["vLLM-omni"] == "model.safetensors"
    others = takes["the original's app and evaluation, ComfyUI-BAGEL, LightX2V"]
    if average:
        assert content_of(original(checkpoint)[0], demo_model) == "ema" and others == "ema.safetensors"
    else:
        assert others == "none"
        with pytest.raises(FileNotFoundError):
            original(checkpoint)
    assert "Use `model.safetensors`: " in checkpoint_readme(checkpoint)
