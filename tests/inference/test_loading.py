"""From a model folder to an inferencer: all of its tensors, or a message."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import bagel_ds.inference
from bagel_ds.demo import write_demo
from bagel_ds.errors import UserError
from bagel_ds.inference.default import DefaultInferencer
from bagel_ds.inference.loading import open_inferencer

TINY = {"num_timesteps": 3, "image_shapes": (32, 32), "max_think_token_n": 4}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder, seed=0)
    return folder / "model"


@pytest.fixture
def folder(demo: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo, tmp_path / "model"))


def changed(folder: Path, keep: object = None, **more: torch.Tensor) -> None:
    """Rewrite the weights with tensors left out or added."""
    path = folder / "ema.safetensors"
    tensors = {name: value for name, value in load_file(path).items() if keep is None or keep(name)}  # type: ignore[operator]
    save_file({**tensors, **more}, path)


def test_the_guides_lines_run_as_they_stand(demo: Path) -> None:
    from bagel_ds.inference import inferencer, setup_models

    model, vae_model, tokenizer, new_token_ids = setup_models(str(demo))
    result = inferencer.generate(prompt="生成一张猫的图片", **TINY)
    assert result.image.size == (32, 32) and result.text is None
    assert tokenizer.decode([new_token_ids["bos_token_id"]]) == "<|im_start|>"
    assert inferencer.network.model is model and inferencer.network.vae is vae_model


def test_before_a_model_is_loaded_the_default_says_so() -> None:
    with pytest.raises(UserError, match="call bagel_ds.inference.setup_models"):
        DefaultInferencer().generate(prompt="a cat")
    with pytest.raises(UserError, match="call bagel_ds.inference.setup_models"):
        DefaultInferencer()(text="a cat")
    assert isinstance(bagel_ds.inference.inferencer, DefaultInferencer)


def test_weights_are_the_folders_in_the_precision_asked_for(demo: Path) -> None:
    recorded = load_file(demo / "ema.safetensors")
    for precision, dtype in ("fp32", torch.float32), ("bf16", torch.bfloat16):
        model = open_inferencer(demo, "cpu", precision).network.model
        for name, parameter in model.named_parameters():
            assert parameter.dtype == dtype and not parameter.requires_grad
            if "pos_embed" not in name:
                assert torch.equal(parameter, recorded[name].reshape(parameter.shape).to(dtype)), name


def test_bf16_draws_about_what_fp32_draws(demo: Path) -> None:
    images = [
        torch.from_numpy(np.array(open_inferencer(demo, "cpu", precision).generate("a cat", **TINY).image)).int()
        for precision in ("fp32", "bf16")
    ]
    assert (images[0] - images[1]).abs().float().mean() < 30


@pytest.mark.parametrize("name", ["llm2vae.bias", "language_model.model.layers.0.mlp_moe_gen.up_proj.weight"])
def test_a_missing_tensor_is_named(name: str, folder: Path) -> None:
    changed(folder, lambda other: other != name)
    with pytest.raises(UserError, match=f"tensor {name} is missing"):
        open_inferencer(folder, "cpu")


def test_an_unknown_tensor_is_named(folder: Path) -> None:
    changed(folder, **{"language_model.model.layers.0.self_attn.q_proj.lora_A": torch.zeros(2)})
    with pytest.raises(UserError, match="lora_A"):
        open_inferencer(folder, "cpu")


def test_a_folder_without_generating_parts_answers_and_says_why_it_cannot_draw(folder: Path) -> None:
    generating = ("_moe_gen", "vae2llm", "llm2vae", "time_embedder")
    changed(folder, lambda name: not any(part in name for part in generating))
    found = open_inferencer(folder, "cpu")
    assert found.generate("what?", Image.new("RGB", (40, 40)), "vqa", max_think_token_n=4).text is not None
    with pytest.raises(UserError, match="can't draw: .*holds no weights that generate"):
        found.generate("a cat", **TINY)


def test_a_folder_without_an_autoencoder_answers_and_says_why_it_cannot_draw(folder: Path) -> None:
    (folder / "ae.safetensors").unlink()
    found = open_inferencer(folder, "cpu")
    assert found.generate("what is two?", mode="vqa", max_think_token_n=4).text is not None
    with pytest.raises(UserError, match="can't draw: .*ae.safetensors"):
        found.generate("a cat", **TINY)


def test_what_is_not_there_is_one_message(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        open_inferencer(tmp_path / "nowhere")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no GPU"):
            open_inferencer(folder, "cuda")
    with pytest.raises(UserError, match="expected cpu, cuda"):
        open_inferencer(folder, "gpu")
    config = json.loads((folder / "llm_config.json").read_text())
    (folder / "llm_config.json").write_text(json.dumps(config | {"vocab_size": 8}))
    with pytest.raises(UserError):
        open_inferencer(folder, "cpu")


def test_attention_kernels_are_tried_and_named(demo: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "bagel_ds"):
        config = open_inferencer(demo, "cpu").network.model.config
    assert (config.attention, config.vit_attention) == ("sdpa", "sdpa")
    lines = [message for message in caplog.messages if message.startswith("attention: ")]
    assert lines == ["attention: torch's scaled_dot_product_attention"]
    with pytest.raises(UserError, match="--attn flash can't be used here .*on a GPU only.* pass --attn sdpa"):
        open_inferencer(demo, "cpu", attn="flash")
    with pytest.raises(UserError, match="attn 'xformers': expected one of auto, flash, flex, sdpa"):
        open_inferencer(demo, "cpu", attn="xformers")


def test_a_weight_that_is_not_finite_is_named(folder: Path) -> None:
    bias = load_file(folder / "ema.safetensors")["vae2llm.bias"]
    changed(folder, **{"vae2llm.bias": bias * torch.nan})
    with pytest.raises(UserError, match="tensor vae2llm.bias holds nan"):
        open_inferencer(folder)


@pytest.mark.parametrize(("steps", "taken"), [(10, "model"), (100_000, "ema")])
def test_the_weights_of_a_short_run_and_the_average_of_a_long_one(
    steps: int, taken: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The average forgets half of its start in 6,931 steps."""
    tensors = load_file(folder / "ema.safetensors")
    record = {"training_steps": str(steps), "ema_decay": "0.9999"}
    save_file({**tensors, "llm2vae.bias": torch.full_like(tensors["llm2vae.bias"], 1)}, folder / "model.safetensors")
    save_file(
        {**tensors, "llm2vae.bias": torch.full_like(tensors["llm2vae.bias"], 2)}, folder / "ema.safetensors", record
    )

    def bias(**arguments: str) -> float:
        return float(open_inferencer(folder, **arguments).network.model.llm2vae.bias[0])

    with caplog.at_level("INFO", "bagel_ds"):
        assert bias() == {"model": 1, "ema": 2}[taken]
    assert f"loading {taken}.safetensors" in caplog.text
    assert bias(weights="model") == 1 and bias(weights="ema") == 2
    with pytest.raises(UserError, match="expected ema or model"):
        bias(weights="raw")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no model.safetensors"):
        bias(weights="model")


def test_max_gpu_memory_is_checked_and_says_that_a_cpu_ignores_it(demo: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "bagel_ds"):
        open_inferencer(demo, "cpu", max_gpu_memory="24GiB")
    assert "max_gpu_memory has no effect on cpu" in caplog.text
    with pytest.raises(UserError, match="expected a size"):
        open_inferencer(demo, "cpu", max_gpu_memory="plenty")


def test_images_are_read_at_the_sizes_that_the_folder_names(folder: Path) -> None:
    network = open_inferencer(folder, "cpu").network
    assert network.vae_transform.size(300, 200) == (96, 64) and network.vit_transform.size(300, 200) == (98, 70)
    config = folder / "config.json"
    said = json.loads(config.read_text())
    said["image_sizes"] = {"vae": [96, "64"]}
    config.write_text(json.dumps(said))
    with pytest.raises(UserError, match="image_sizes has vae .*expected the longest and the shortest side"):
        open_inferencer(folder, "cpu")
    del said["image_sizes"]
    config.write_text(json.dumps(said))
    network = open_inferencer(folder, "cpu").network
    assert network.vae_transform.size(300, 200) == (768, 512), "BAGEL-7B-MoT's"


def test_latest_is_followed_where_it_is_a_text_file(demo: Path, tmp_path: Path) -> None:
    (tmp_path / "step_4").symlink_to(demo)
    (tmp_path / "latest").write_text("step_4\n")
    found = open_inferencer(tmp_path / "latest", device="cpu")
    assert found.network.tokenizer.size > 0
