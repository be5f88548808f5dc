"""What must hold of the network whatever the recordings are: unused experts, freezing, packs without a modality."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from bagel_ds.data.batches.layout import Loaded, layout
from bagel_ds.data.samples.image_tokens import LayoutOptions
from bagel_ds.data.samples.sample import TEXT, VAE
from bagel_ds.model.bagel import Bagel
from bagel_ds.model.batch import PackedBatch
from bagel_ds.model.recompute import MODES, recompute_mode
from bagel_ds.model.shape.config import BagelConfig, LLMConfig, ViTConfig
from bagel_ds.model.shape.parts import Freezing, part_of, trainable_parts
from bagel_ds.model_folder.tokenizer import SpecialTokens

LLM = LLMConfig(32, 48, 2, 4, 2, 64)
TINY = BagelConfig(llm=LLM, vit=ViTConfig(24, 32, 2, 2), max_latent_size=8)


def tiny(**changes: Any) -> Bagel:
    model = Bagel(dataclasses.replace(TINY, **changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def text_pack(tokens: int = 6) -> PackedBatch:
    return pack(tokens, labels=True)


def pack(text: int, labels: bool = False, drawn: tuple[int, int] | None = None) -> PackedBatch:
    """`text` tokens, then a noised image of `drawn` latent tokens."""
    generator = torch.Generator().manual_seed(text)
    ids = torch.randint(5, 64, (max(text - 2, 0),), generator=generator).tolist()
    pieces = [Loaded(TEXT, ids, loss=labels)] if text else []
    if drawn:
        rows, columns = drawn
        image = torch.zeros(3, 16 * rows, 16 * columns, dtype=torch.uint8)
        noise = torch.randn(rows * columns, 64, generator=generator)
        pieces.append(Loaded(VAE, image=image, loss=True, timestep=0.0, noise=noise))
    return layout([pieces], SpecialTokens(0, 1, 2, 3, 4), LayoutOptions(max_latent_size=TINY.max_latent_size))


def loss_of(model: Bagel, batch: PackedBatch) -> torch.Tensor:
    output = model(batch, torch.zeros(len(batch.vae_indexes), 64))
    return output.ce.sum() + output.mse.sum()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", [text_pack(), pack(2, drawn=(2, 3)), pack(0)], ids=["text", "drawing", "nothing"])
def test_every_trainable_parameter_gets_a_gradient_from_any_pack(batch: PackedBatch, mode: str) -> None:
    """Under ZeRO-3 a parameter without a gradient on one rank would hang the others."""
    model = tiny()
    model.recompute = recompute_mode(mode)
    loss_of(model, batch).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_an_expert_without_tokens_gets_zero_gradients() -> None:
    model = tiny()
    loss_of(model, text_pack()).backward()
    for name, parameter in model.named_parameters():
        if part_of(name) in ("gen_expert", "vae2llm", "llm2vae", "time_embedder", "vit", "connector"):
            assert not parameter.grad.any(), name


def test_freeze_und_cuts_every_gradient_on_the_understanding_side() -> None:
    model = tiny(freeze_und=True)
    loss_of(model, pack(4, labels=True, drawn=(2, 2))).backward()
    trained = {part_of(name) for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == trainable_parts(model.config, Freezing())
    assert "lm_head" in trained and "und_expert" not in trained


def test_freeze_und_leaves_the_values_as_they_are() -> None:
    batch, latents = pack(4, labels=True, drawn=(2, 2)), torch.zeros(4, 64)
    for free, frozen in zip(tiny()(batch, latents), tiny(freeze_und=True)(batch, latents)):
        assert torch.equal(free, frozen)


@pytest.mark.parametrize("switch", ["visual_gen", "visual_und"])
def test_a_switched_off_modality_changes_nothing_for_text(switch: str) -> None:
    batch = text_pack()
    latents = torch.zeros(0, 64)
    on, off = tiny()(batch, latents), tiny(**{switch: False})(batch, latents)
    assert torch.equal(on.ce, off.ce)


def test_parts_that_train() -> None:
    everything = {part_of(name) for name, _ in tiny().named_parameters()}
    assert trainable_parts(TINY, Freezing()) == everything - {"position_tables"}
    assert "vit" not in trainable_parts(TINY, Freezing(freeze_vit=True))
    assert trainable_parts(TINY, Freezing(freeze_llm=True)) == {
        "vit",
        "connector",
        "time_embedder",
        "vae2llm",
        "llm2vae",
    }
    no_drawing = dataclasses.replace(TINY, visual_gen=False)
    assert "gen_expert" not in trainable_parts(no_drawing, Freezing())
