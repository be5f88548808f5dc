"""A held-out split: every row once, the same packs and draws for every run and number of ranks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from bagel_ds.data.batches.held_out import HeldOut, held_out_options
from bagel_ds.data.samples.image_tokens import LayoutOptions
from bagel_ds.data.streams.opening import open_streams
from bagel_ds.data.streams.stream import SampleOptions
from bagel_ds.model.batch import PackedBatch
from bagel_ds.model_folder.tokenizer import Tokenizer
from tests.small_data import byte_tokenizer, config_of, group, mixed_groups, t2i_rows, write_parquet

LIMIT = 200
NEVER, ALWAYS = ({f"{kind}_cond_dropout_prob": chance for kind in ("text", "vit", "vae")} for chance in (0.0, 0.99))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def opened(folder: Path, groups: dict[str, Any], tokenizer: Tokenizer, most: int = 0, **options: Any) -> HeldOut:
    sample_options = held_out_options(SampleOptions(max_num_tokens_per_sample=LIMIT, **options))
    streams = open_streams(config_of(folder, groups), tokenizer, sample_options, str(folder / "index"))
    return HeldOut(streams, tokenizer, LayoutOptions(), LIMIT, most)


def rows_of(batches: list[PackedBatch]) -> Counter[str]:
    return Counter(name for batch in batches for name in batch.samples)


def test_every_row_is_used_once_in_packs_within_the_limit(tmp_path: Path, tokenizer: Tokenizer) -> None:
    held_out = opened(tmp_path, mixed_groups(tmp_path), tokenizer)
    batches = list(held_out.batches())
    rows = rows_of(batches)
    assert len(rows) == held_out.rows == 5 + 5 + 3 + 3 and set(rows.values()) == {1}
    assert len(batches) == len(held_out.packs) > 3
    assert all(0 < batch.sequence_length <= LIMIT for batch in batches)


def test_a_file_that_the_configuration_repeats_is_used_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for name, count in (("a", 3), ("b", 2)):
        write_parquet(tmp_path / "t2i" / f"{name}.parquet", t2i_rows(count))
    repeated = group({"data_dir": str(tmp_path / "t2i")}, "pictures", num_used_data=[5])
    held_out = opened(tmp_path, {"t2i_pretrain": repeated}, tokenizer)
    assert sum(len(stream.uses) for stream in held_out.streams) == 5
    assert held_out.rows == 5 and set(rows_of(list(held_out.batches())).values()) == {1}


@pytest.mark.parametrize("world_size", [2, 3, 50])
def test_ranks_have_equally_many_batches_and_together_all_of_them(
    world_size: int, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    held_out = opened(tmp_path, mixed_groups(tmp_path), tokenizer)
    by_rank = [list(held_out.batches(rank, world_size)) for rank in range(world_size)]
    assert {len(batches) for batches in by_rank} == {held_out.count(world_size)}
    in_turn = [batch for turn in zip(*by_rank, strict=True) for batch in turn]
    alone = list(held_out.batches())
    assert [batch.samples for batch in in_turn[: len(alone)]] == [batch.samples for batch in alone]
    assert all(batch.sequence_length == 0 for batch in in_turn[len(alone) :])
    for batch, other in zip(in_turn, alone):
        assert torch.equal(batch.noise, other.noise) and torch.equal(batch.timesteps, other.timesteps)


def test_neither_the_runs_seed_nor_its_dropout_changes_anything(tmp_path: Path, tokenizer: Tokenizer) -> None:
    groups = mixed_groups(tmp_path)
    one, other = (
        opened(tmp_path, groups, tokenizer, seed=seed, **chances) for seed, chances in ((1, NEVER), (2, ALWAYS))
    )
    assert one.packs == other.packs and one.fingerprint == other.fingerprint
    assert not any(entry.dropped for pack in other.packs for plan in pack for entry in plan.entries)


def test_max_packs_takes_packs_from_all_over_the_split(tmp_path: Path, tokenizer: Tokenizer) -> None:
    groups = mixed_groups(tmp_path)
    whole = opened(tmp_path, groups, tokenizer)
    count = len(whole.packs)
    some = opened(tmp_path, groups, tokenizer, most=3)
    assert some.packs == tuple(whole.packs[number * count // 3] for number in range(3))
    assert some.fingerprint != whole.fingerprint
    assert {plan.group for pack in some.packs for plan in pack} > {0}
    for most in (count, count + 1, 0):
        assert opened(tmp_path, groups, tokenizer, most=most).packs == whole.packs


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_make_the_same_batches_and_end_with_them(workers: int, tmp_path: Path, tokenizer: Tokenizer) -> None:
    held_out = opened(tmp_path, mixed_groups(tmp_path), tokenizer)
    made, expected = list(held_out.batches(workers=workers)), list(held_out.batches())
    assert [batch.samples for batch in made] == [batch.samples for batch in expected]
    assert all(torch.equal(batch.noise, other.noise) for batch, other in zip(made, expected, strict=True))
