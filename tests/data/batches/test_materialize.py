"""From plans to tensors: exact lengths, independence of the company, and rows that break after they were indexed."""

from __future__ import annotations

import pickle
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bagel_ds.data.batches.materialize import materialize
from bagel_ds.data.files import rows
from bagel_ds.data.samples.draws import Draws, draw_key, normals
from bagel_ds.data.samples.image_tokens import LayoutOptions
from bagel_ds.data.samples.images import ImageTransform, decode_rgb, resize_to_uint8
from bagel_ds.data.samples.sample import SamplePlan
from bagel_ds.data.streams.stream import GroupStream
from bagel_ds.model.batch import PackedBatch
from bagel_ds.model_folder.tokenizer import Tokenizer
from tests.small_data import (
    VAE_ARGS,
    byte_tokenizer,
    conversation,
    group,
    mixed_groups,
    picture,
    streams_of,
    write_conversations,
    write_parquet,
)

DROPOUT = dict.fromkeys(("text_cond_dropout_prob", "vit_cond_dropout_prob", "vae_cond_dropout_prob"), 0.3)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return byte_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def streams(tmp_path: Path, tokenizer: Tokenizer) -> list[GroupStream]:
    return streams_of(tmp_path, mixed_groups(tmp_path), tokenizer, **DROPOUT)


def _plans(streams: list[GroupStream], epoch: int = 0) -> list[SamplePlan]:
    plans = [stream.plan_sample(row, epoch) for stream in streams for row in range(stream.rows)]
    return [plan for plan in plans if plan is not None]


def _values(batch: PackedBatch) -> list[Any]:
    """Everything in a batch but the names of its samples, comparable with ==."""
    values = [getattr(batch, field.name) for field in fields(batch) if field.name not in ("samples", "skipped")]
    return [value.tolist() if isinstance(value, Tensor) else _listed(value) for value in values]


def _listed(value: Any) -> Any:
    return (
        [_listed(v) for v in value]
        if isinstance(value, tuple)
        else value.tolist()
        if isinstance(value, Tensor)
        else value
    )


def test_every_sample_is_as_long_as_planned(streams: list[GroupStream], tokenizer: Tokenizer) -> None:
    for epoch in range(8):
        plans = _plans(streams, epoch)
        batch = materialize(plans, streams, tokenizer, LayoutOptions(), 0)
        assert batch.sample_lens == tuple(plan.length for plan in plans)
        assert len(batch.vit_indexes) == sum(plan.tokens("vit_image") for plan in plans)
        assert len(batch.vae_indexes) == sum(plan.tokens("vae_image") for plan in plans)
        assert batch.samples == tuple(str(streams[plan.group].place(plan.row)) for plan in plans)
        assert batch.skipped == ()


def test_a_sample_is_the_same_alone_and_in_company(streams: list[GroupStream], tokenizer: Tokenizer) -> None:
    plans = _plans(streams, 1)
    together = materialize(plans, streams, tokenizer, LayoutOptions(), 0)
    alone = [materialize([plan], streams, tokenizer, LayoutOptions(), 0) for plan in plans]
    for name in ("text_ids", "position_ids", "vit_patches", "timesteps", "noise", "posterior_eps", "label_ids"):
        assert torch.equal(getattr(together, name), torch.cat([getattr(batch, name) for batch in alone])), name
    assert _listed(together.images) == _listed(tuple(image for batch in alone for image in batch.images))


def test_pixels_stay_uint8_and_are_those_of_the_transform(tmp_path: Path, tokenizer: Tokenizer) -> None:
    content = picture(70, 50)
    write_parquet(tmp_path / "t2i" / "a.parquet", [{"image": content, "caption": "x"}])
    groups = {"t2i_pretrain": group({"data_dir": str(tmp_path / "t2i")})}
    streams = streams_of(tmp_path, groups, tokenizer)
    (image,) = materialize(_plans(streams), streams, tokenizer, LayoutOptions(), 0).images
    assert image.dtype == torch.uint8
    assert torch.equal(image, resize_to_uint8(decode_rgb(content), ImageTransform(**VAE_ARGS)))


def test_draws_depend_on_seed_epoch_row_and_place(streams: list[GroupStream], tokenizer: Tokenizer) -> None:
    plans = _plans(streams)
    first = materialize(plans, streams, tokenizer, LayoutOptions(), 0)
    assert _values(materialize(plans, streams, tokenizer, LayoutOptions(), 0)) == _values(first)
    other = materialize(plans, streams, tokenizer, LayoutOptions(), 1)
    noised = first.timesteps > float("-inf")
    assert not torch.any(first.timesteps[noised] == other.timesteps[noised])
    assert not torch.equal(first.posterior_eps, other.posterior_eps)
    assert len(first.timesteps[noised].unique()) == sum(plan_noised(plan) for plan in plans)
    assert len(first.noise[noised].unique(dim=0)) == int(noised.sum())
    assert not first.noise[~noised].any()
    again = [plan._replace(epoch=9) for plan in plans]
    assert not torch.equal(materialize(again, streams, tokenizer, LayoutOptions(), 0).noise, first.noise)


def plan_noised(plan: SamplePlan) -> int:
    return sum(entry.kind == "vae_image" and entry.loss for entry in plan.entries)


def test_draws_are_standard() -> None:
    values = torch.from_numpy(normals((200_000,), "noise", 1))
    assert values.dtype == torch.float32
    assert abs(values.mean()) < 0.01 and abs(values.std() - 1) < 0.01
    draws = Draws(draw_key("choice", 0), 1, 2)
    uniform = torch.tensor([draws.uniform() for _ in range(20_000)])
    assert 0 <= uniform.min() and uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.01 and abs(uniform.var() - 1 / 12) < 0.005
    counts = torch.bincount(torch.tensor([Draws(draw_key("choice", 0), i).choice(4) for i in range(8000)]))
    assert counts.tolist() == pytest.approx([2000] * 4, rel=0.1)
    assert Draws(draw_key("a", 11), 1).uniform() != Draws(draw_key("a", 1), 11).uniform()


def test_a_picture_that_breaks_later_drops_its_sample_and_no_other(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = [conversation("<image>", f"answer {i}", image=f"{i}.png") for i in range(3)]
    paths = write_conversations(tmp_path, lines, {f"{i}.png": picture(40, 40, seed=i) for i in range(3)})
    streams = streams_of(tmp_path, {"vlm_sft": group(paths, "talks")}, tokenizer)
    plans = _plans(streams)
    (tmp_path / "images" / "1.png").write_bytes(b"")
    batch = materialize(plans, streams, tokenizer, LayoutOptions(), 0)
    assert _values(batch) == _values(materialize([plans[0], plans[2]], streams, tokenizer, LayoutOptions(), 0))
    assert [name for name, _ in batch.skipped] == ["talks"]
    assert "data.jsonl line 2" in batch.skipped[0][1]
    (tmp_path / "images" / "0.png").write_bytes(picture(80, 40))
    (tmp_path / "images" / "2.png").unlink()
    batch = materialize(plans, streams, tokenizer, LayoutOptions(), 0)
    assert batch.sequence_length == 0 and batch.sample_lens == () and batch.samples == ()
    reasons = [reason for _, reason in batch.skipped]
    assert "80 x 40 pixels now: the file has changed since it was indexed" in reasons[0]
    assert "no such file" in reasons[2]


def test_a_file_that_changes_or_vanishes_drops_its_samples(
    tmp_path: Path, streams: list[GroupStream], tokenizer: Tokenizer
) -> None:
    plans = _plans(streams)
    write_parquet(tmp_path / "t2i" / "a.parquet", [{"image": picture(40, 50), "captions": '{"a": "new"}'}])
    (tmp_path / "edit" / "a.parquet").unlink()
    batch = materialize(plans, streams, tokenizer, LayoutOptions(), 0)
    skipped = {name for name, _ in batch.skipped}
    assert skipped == {"pictures", "edits"}
    kept = [plan for plan in plans if streams[plan.group].name in ("vlm_sft", "interleave_reasoning")]
    assert len(batch.sample_lens) == len(kept)
    assert all("row group" in reason for _, reason in batch.skipped)


def test_streams_and_tokenizer_can_be_sent_to_another_process(streams: list[GroupStream], tokenizer: Tokenizer) -> None:
    plans = _plans(streams, 2)
    sent_streams, sent_tokenizer = pickle.loads(pickle.dumps((streams, tokenizer)))
    expected = materialize(plans, streams, tokenizer, LayoutOptions(), 0)
    assert _values(materialize(plans, sent_streams, sent_tokenizer, LayoutOptions(), 0)) == _values(expected)


def test_a_row_group_is_read_once_for_consecutive_rows(
    streams: list[GroupStream], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[str, int]] = []
    original = rows.pq.ParquetFile.iter_batches

    def noted(file: Any, size: int, groups: list[int], *rest: Any, **more: Any) -> Any:
        opened.append((str(id(file)), groups[0]))
        return original(file, size, groups, *rest, **more)

    rows.forget_open_files()
    monkeypatch.setattr(rows.pq.ParquetFile, "iter_batches", noted)
    pictures = streams[0]
    plans = [plan for row in range(pictures.rows) if (plan := pictures.plan_sample(row, 0))]
    for plan in plans:
        materialize([plan], streams, tokenizer, LayoutOptions(), 0)
    assert [group for _, group in opened] == list(range(len(pictures.units)))
