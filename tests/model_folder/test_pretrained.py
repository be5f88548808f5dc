"""A network put together from a language model and a ViT: every tensor comes from the right place, by any range."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch import Tensor

from bagel_ds.errors import UserError
from bagel_ds.model.bagel import Bagel
from bagel_ds.model.shape.config import BagelConfig, LLMConfig, ViTConfig
from bagel_ds.model_folder.pretrained import PretrainedWeights, assemble_folder, missing_pretrained
from bagel_ds.model_folder.tokenizer import load_tokenizer

CONFIG = BagelConfig(llm=LLMConfig(32, 48, 2, 4, 2, 64), vit=ViTConfig(24, 32, 2, 2), max_latent_size=8)
PATCHES = "vit_model.vision_model.embeddings.patch_embedding.weight"


SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"

Models = tuple[Path, Path, dict[str, Tensor]]  # a language model, a ViT, all their tensors


def shapes(vocabulary: int = CONFIG.llm.vocab_size) -> dict[str, tuple[int, ...]]:
    config = dataclasses.replace(CONFIG, llm=dataclasses.replace(CONFIG.llm, vocab_size=vocabulary))
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in Bagel(config).named_parameters()}


def write_tokenizer(folder: Path, words: int, special: tuple[str, ...] = SPECIAL) -> None:
    """A tokenizer of so many words, one letter each, and special tokens after them."""
    tokenizer = Tokenizer(models.BPE(vocab={chr(0x4E00 + number): number for number in range(words)}, merges=[]))
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture
def pretrained(tmp_path: Path) -> Models:
    """A Qwen2 (tied, without q and k norms) and a SigLIP (convolution patches, one layer more) as the hub has them."""
    generator = torch.Generator().manual_seed(0)
    stored: dict[str, Tensor] = {}
    llm, vit = {}, {"text_model.unused": torch.zeros(3)}
    for name, shape in shapes().items():
        value = torch.randn(shape, generator=generator).bfloat16()
        if name.startswith("language_model.") and "_moe_gen" not in name:
            if not name.endswith(("q_norm.weight", "k_norm.weight", "lm_head.weight")):
                llm[name.removeprefix("language_model.")] = stored[name] = value
        elif name == PATCHES:
            conv = torch.randn(shape[0], 3, 14, 14, generator=generator).bfloat16()
            vit[name.removeprefix("vit_model.")] = conv
            stored[name] = conv.permute(0, 2, 3, 1).reshape(shape)
        elif name.startswith("vit_model."):
            vit[name.removeprefix("vit_model.")] = stored[name] = value
    for folder, tensors in (("llm", llm), ("vit", vit)):
        (tmp_path / folder).mkdir()
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / folder / "model.safetensors"
        )
    (tmp_path / "llm" / "config.json").write_text(json.dumps(dataclasses.asdict(CONFIG.llm)))
    write_tokenizer(tmp_path / "llm", words=40)
    (tmp_path / "vit" / "config.json").write_text(json.dumps({"vision_config": {"hidden_size": 24}}))
    (tmp_path / "ae.safetensors").write_text("autoencoder")
    return tmp_path / "llm", tmp_path / "vit", stored


def weights(pretrained: Models, copy_init_moe: bool = True, seed: int = 1) -> PretrainedWeights:
    return PretrainedWeights(pretrained[0], pretrained[1], shapes(), copy_init_moe, seed)


def test_stored_tensors_come_from_their_files(pretrained: Models) -> None:
    source = weights(pretrained)
    for name, expected in pretrained[2].items():
        assert torch.equal(source.read(name).reshape(expected.shape).bfloat16(), expected), name


def test_the_generation_expert_starts_as_a_copy(pretrained: Models) -> None:
    source = weights(pretrained)
    for name in shapes():
        if "_moe_gen" in name:
            assert torch.equal(source.read(name), source.read(name.replace("_moe_gen", ""))), name


def test_without_copies_it_is_drawn_from_seed_and_name(pretrained: Models) -> None:
    name = "language_model.model.layers.1.mlp_moe_gen.up_proj.weight"
    one, same, other = (weights(pretrained, False, seed).read(name) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert 0.015 < float(one.std()) < 0.025
    assert weights(pretrained, False).read(name.replace("up_proj", "down_proj")).tolist()[:9] != one.tolist()[:9]


def test_missing_tensors_are_initialized_by_rule(pretrained: Models) -> None:
    source = weights(pretrained)
    assert torch.equal(
        source.read("language_model.lm_head.weight"), source.read("language_model.model.embed_tokens.weight")
    )
    assert bool((source.read("language_model.model.layers.0.self_attn.q_norm.weight") == 1).all())
    assert not source.read("llm2vae.weight").any() and not source.read("llm2vae.bias").any()
    connector = source.read("connector.fc1.weight")
    assert float(connector.abs().max()) <= 24**-0.5 and float(connector.std()) > 0.1


def test_any_range_is_that_part_of_the_whole(pretrained: Models) -> None:
    source = weights(pretrained)
    for name in shapes():
        whole = source.read(name)
        start = len(whole) // 3
        assert torch.equal(source.read(name, start, len(whole) - start), whole[start:]), name
        assert whole.numel() == source.info(name).numel


def grown(pretrained: Models, vocabulary: int, seed: int = 1) -> PretrainedWeights:
    return PretrainedWeights(pretrained[0], pretrained[1], shapes(vocabulary), True, seed)


def test_new_vocabulary_rows_follow_the_stored_ones_and_are_drawn_from_seed_and_name(
    pretrained: Models,
) -> None:
    spread = json.loads((pretrained[0] / "config.json").read_text())
    (pretrained[0] / "config.json").write_text(json.dumps({**spread, "initializer_range": 0.5}))
    rows, width = shapes(1064)[EMBEDDING]
    one, same, other = (grown(pretrained, rows, seed).read(EMBEDDING).reshape(rows, width) for seed in (1, 1, 2))
    assert torch.equal(one[:64], pretrained[2][EMBEDDING]) and one.dtype == torch.bfloat16
    assert torch.equal(one, same) and not torch.equal(one[64:], other[64:])
    assert float(one[64:].float().std()) == pytest.approx(0.5, rel=0.05)
    assert torch.equal(grown(pretrained, rows).read(HEAD), one.flatten()), "tied tables stay equal"
    assert "1000 rows are added" in "".join(grown(pretrained, rows).description())
    assert "are added" not in "".join(weights(pretrained).description())


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_new_rows_are_the_same_on_any_number_of_ranks(pretrained: Models, ranks: int) -> None:
    source = grown(pretrained, 71)
    whole, share = source.read(EMBEDDING), -(-71 * 32 // ranks)
    pieces = [source.read(EMBEDDING, start, min(share, 71 * 32 - start)) for start in range(0, 71 * 32, share)]
    assert torch.equal(torch.cat(pieces), whole)


def test_a_table_that_is_not_what_its_own_config_says_is_refused(
    pretrained: Models,
) -> None:
    config = json.loads((pretrained[0] / "config.json").read_text())
    (pretrained[0] / "config.json").write_text(json.dumps({**config, "vocab_size": 70}))
    with pytest.raises(UserError, match="embed_tokens.weight has shape"):
        grown(pretrained, 70)


@pytest.mark.parametrize(
    "words, special, vocabulary",
    [(40, SPECIAL, 64), (59, SPECIAL, 64), (60, SPECIAL, 65), (61, SPECIAL[:3], 66), (40, SPECIAL[:3], 64)],
)
def test_the_vocabulary_grows_to_the_tokenizer_and_is_never_cut(
    pretrained: Models,
    tmp_path: Path,
    words: int,
    special: tuple[str, ...],
    vocabulary: int,
) -> None:
    """A language model that saw no images (Qwen2) lacks the tokens around them."""
    write_tokenizer(pretrained[0], words, special)
    folder = assemble_folder(tmp_path / "out", pretrained[0], pretrained[1], tmp_path / "ae.safetensors")
    assert json.loads((folder / "llm_config.json").read_text())["vocab_size"] == vocabulary
    found = load_tokenizer(folder)
    assert found.size == words + 5 and found.special.start_of_image == words + 3 and found.special.eos == words + 2
    assert [path.name for path in pretrained[0].iterdir() if path.name.startswith(".")] == []


def test_a_tensor_that_does_not_fit_is_named(pretrained: Models) -> None:
    save_file({"model.norm.weight": torch.ones(7)}, pretrained[0] / "model.safetensors")
    with pytest.raises(UserError, match=r"(?s)embed_tokens.weight is missing"):
        weights(pretrained)


def test_the_assembled_folder_has_everything_but_weights(pretrained: Models, tmp_path: Path) -> None:
    folder = assemble_folder(tmp_path / "out", pretrained[0], pretrained[1], tmp_path / "ae.safetensors")
    names = {path.name for path in folder.iterdir()}
    assert names == {"llm_config.json", "vit_config.json", "tokenizer.json", "ae.safetensors"}
    assert json.loads((folder / "vit_config.json").read_text()) == {"hidden_size": 24}
    assert assemble_folder(tmp_path / "out", pretrained[0], pretrained[1], tmp_path / "ae.safetensors") == folder
    assert {path.name for path in folder.iterdir()} == names
    (tmp_path / "other.safetensors").write_text("another autoencoder")
    assemble_folder(tmp_path / "out", pretrained[0], pretrained[1], tmp_path / "other.safetensors")
    assert (folder / "ae.safetensors").read_text() == "another autoencoder"
    assert (tmp_path / "ae.safetensors").read_text() == "autoencoder"


def test_missing_models_are_all_named(tmp_path: Path) -> None:
    (tmp_path / "vit").mkdir()
    found = missing_pretrained(tmp_path / "llm", tmp_path / "vit", tmp_path / "ae")
    assert [text.split()[0] for text in found] == ["--llm_path", "--vit_path", "--vae_path"]
