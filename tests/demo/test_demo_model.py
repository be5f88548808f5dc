"""The demo's model folder: tokenizer, configurations, network and autoencoder."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from bagel_ds.demo.autoencoder import LOG_VARIANCE, MEAN_COLOR
from bagel_ds.demo.blockmoving import draw_board, random_puzzle
from bagel_ds.demo.model import network_config
from bagel_ds.demo.scenes import draw, random_scene
from bagel_ds.demo.tokenizer import SPECIAL_TOKENS, train_tokenizer
from bagel_ds.model.bagel import Bagel
from bagel_ds.model.embeddings import position_table
from bagel_ds.model.shape.config import VAEConfig
from bagel_ds.model.vae import AutoEncoder

TEXTS = [
    "Make the circle red.",
    "a small blue square at the top left",
    "What is 3 plus 14?\n\nIt is 17.",
    "caf\u00e9 na\u00efve, \u56fe\u7247\u91cc\u6709\u4ec0\u4e48\uff1f",
    "cafe\u0301",  # decomposed: NFC makes it one letter
    "  two  spaces, tabs\t and emoji \U0001f7e6",
    "<|im_start|>user text with markers<|vision_end|>",
    "",
]


@pytest.fixture(scope="module")
def folder(demo: Path) -> Path:
    return demo / "model"


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "ema.safetensors")


@pytest.fixture(scope="module")
def vae(folder: Path) -> AutoEncoder:
    vae = AutoEncoder(VAEConfig(channels=32))
    vae.load_state_dict(load_file(folder / "ae.safetensors"))  # strict
    return vae.eval()


def test_transformers_reads_the_tokenizer_with_the_same_ids(folder: Path, tokenizer: Tokenizer) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(folder))
    assert type(theirs).__name__.startswith("Qwen2Tokenizer")
    for text in TEXTS:
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text).ids
    assert [theirs.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == [
        tokenizer.token_to_id(token) for token in SPECIAL_TOKENS
    ]


@pytest.mark.parametrize(
    "kept", [("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.json", "merges.txt", "tokenizer_config.json")]
)
def test_fewer_tokenizer_files_give_the_same_ids(
    folder: Path, tokenizer: Tokenizer, kept: tuple[str, ...], tmp_path: Path
) -> None:
    from bagel_ds.model_folder.tokenizer import load_tokenizer

    for name in kept:
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    ours = load_tokenizer(tmp_path)
    assert [ours.encode(text) for text in TEXTS] == [tokenizer.encode(text).ids for text in TEXTS]
    assert ours.size == tokenizer.get_vocab_size()


@pytest.mark.parametrize("text", [text for text in TEXTS if "\u0301" not in text])
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_special_tokens_are_one_id_each_after_the_vocabulary(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS]
    size = tokenizer.get_vocab_size(with_added_tokens=False)
    assert ids == list(range(size, size + len(SPECIAL_TOKENS)))
    assert all(tokenizer.encode(token).ids == [number] for token, number in zip(SPECIAL_TOKENS, ids, strict=True))


def test_digits_are_single_tokens(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("2024").ids) == 4


def test_the_order_of_training_texts_does_not_matter() -> None:
    texts = [f"the {word} block slides {number}" for word in ("red", "green", "blue") for number in range(9)]
    shuffled = random.Random(0).sample(texts, len(texts))
    assert train_tokenizer(texts, 320).to_str() == train_tokenizer(shuffled, 320).to_str()


def test_the_vocabulary_is_padded_and_covers_the_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    rows = json.loads((folder / "llm_config.json").read_text())["vocab_size"]
    assert rows % 64 == 0 and 0 < rows - tokenizer.get_vocab_size() <= 64


def test_every_parameter_of_the_network_is_there_in_bf16(
    folder: Path, tokenizer: Tokenizer, weights: dict[str, Tensor]
) -> None:
    with torch.device("meta"):
        network = Bagel(network_config(tokenizer.get_vocab_size()))
    assert {name: weight.shape for name, weight in weights.items()} == {
        name: parameter.shape for name, parameter in network.named_parameters()
    }
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert all(weight.isfinite().all() for weight in weights.values())


def test_the_folders_configurations_describe_the_network(folder: Path, tokenizer: Tokenizer) -> None:
    from bagel_ds.model_folder.folder import ModelFolder

    config = network_config(tokenizer.get_vocab_size())
    assert ModelFolder(folder).llm_config() == config.llm
    assert ModelFolder(folder).vit_config() == config.vit


def test_the_generation_expert_starts_near_but_not_at_the_understanding_expert(weights: dict[str, Tensor]) -> None:
    twins = [name for name in weights if "_moe_gen" in name]
    assert twins
    for name in twins:
        gen, und = weights[name].float(), weights[name.replace("_moe_gen", "")].float()
        difference = (gen - und).norm() / und.norm()
        assert 0 < difference < 0.5, name


def test_position_tables_are_the_computed_ones(weights: dict[str, Tensor]) -> None:
    table = weights["latent_pos_embed.pos_embed"]
    assert torch.equal(table, position_table(table.shape[1], 64).to(table.dtype))


def pixels(count: int) -> list[Tensor]:
    """Normalised demo pictures, [1, 3, H, W] in -1..1."""
    rng = random.Random(5)
    pictures = [draw(random_scene(rng)) for _ in range(count)] + [draw_board(random_puzzle(rng, 1).start)]
    return [torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1 for picture in pictures]


@torch.no_grad()
def test_latents_hold_the_pictures_colors_and_hardly_any_noise(vae: AutoEncoder) -> None:
    latents = []
    for image in pixels(8):
        mean, log_variance = vae.moments(image).chunk(2, dim=1)
        assert torch.equal(log_variance, torch.full_like(log_variance, LOG_VARIANCE))
        # 4x4 averages, orthonormally mixed: the energy of the latent is that of the picture at this resolution.
        coarse = torch.nn.functional.avg_pool2d(image - MEAN_COLOR, 4)
        assert 7.5**2 < mean.square().sum() / coarse.square().sum() < 8.5**2
        latents.append(vae.sample(torch.cat([mean, log_variance], 1), torch.zeros_like(mean)).flatten())
    assert 0.7 < torch.cat(latents).square().mean().sqrt() < 1.4


@torch.no_grad()
def test_the_decoder_paints_a_coarse_picture_of_what_was_encoded(vae: AutoEncoder) -> None:
    for image in pixels(8):
        mean, _ = vae.moments(image).chunk(2, dim=1)
        decoded = vae.decode(vae.config.scale_factor * (mean - vae.config.shift_factor))
        assert decoded.shape == image.shape
        # Inside: the smoothing reads zeros beyond the border. Per color: the last norm sets each one's contrast.
        inside = (torch.nn.functional.avg_pool2d(x, 8)[0, :, 1:-1, 1:-1].flatten(1) for x in (decoded, image))
        for ours, wanted in zip(*inside, strict=True):
            if wanted.std() > 0.1:
                assert torch.corrcoef(torch.stack([ours, wanted]))[0, 1] > 0.9
