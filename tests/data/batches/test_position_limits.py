"""Images that are larger than the position tables: unusable rows that say why, unless positions are interpolated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bagel_ds.data.batches.materialize import materialize
from bagel_ds.data.samples.image_tokens import LayoutOptions
from bagel_ds.errors import UserError
from tests.small_data import NO_DROPOUT, VIT_ARGS, byte_tokenizer, edit_rows, group, picture, streams_of, write_parquet


def _rows(kind: str, sides: tuple[int, int]) -> list[dict[str, Any]]:
    """One row with pictures of 32 x 32 pixels, one with pictures of `sides`."""
    if kind == "t2i_pretrain":
        return [{"image": picture(*size), "captions": json.dumps({"a": "x"})} for size in ((32, 32), sides)]
    return [{**edit_rows(1)[0], "image_list": [picture(*size), picture(*size)]} for size in ((32, 32), sides)]


@pytest.mark.parametrize(
    ("kind", "limits", "named"),
    [
        ("t2i_pretrain", {"max_latent_size": 4}, "80 x 48 pixels after the resize exceeds max_latent_size 4"),
        ("unified_edit", {"vit_max_num_patch_per_side": 4}, "exceeds vit_max_num_patch_per_side 4"),
    ],
)
@pytest.mark.parametrize("interpolate", [False, True])
def test_an_image_larger_than_the_table_is_unusable_unless_positions_are_interpolated(
    kind: str, limits: dict[str, int], named: str, interpolate: bool, tmp_path: Path
) -> None:
    write_parquet(tmp_path / "rows" / "a.parquet", _rows(kind, (80, 48)))
    vit = {} if kind == "t2i_pretrain" else {"vit_image_transform_args": VIT_ARGS}
    groups = {kind: group({"data_dir": str(tmp_path / "rows")}, **vit)}
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    options = LayoutOptions(**limits, interpolate_pos=interpolate)
    (stream,) = streams_of(tmp_path, groups, tokenizer, layout=options, **NO_DROPOUT)
    small, large = stream.plan_sample(0, 0), stream.plan_sample(1, 0)
    assert small is not None
    if not interpolate:
        assert large is None
        assert [(bad.place.row, named in bad.reason) for bad in stream.bad_rows] == [(1, True)]
        return
    assert large is not None and not stream.bad_rows
    batch = materialize([large], [stream], tokenizer, options, 0)
    assert batch.sample_lens == (large.length,)
    side = next(iter(limits.values()))
    positions = batch.latent_position_ids if "max_latent_size" in limits else batch.vit_position_ids
    assert int(positions.max()) < side * side and set((positions % side).tolist()) == set(range(side))


def test_a_dataset_of_images_that_are_all_too_large_is_an_error(tmp_path: Path) -> None:
    write_parquet(tmp_path / "rows" / "a.parquet", _rows("t2i_pretrain", (80, 48))[1:])
    groups = {"t2i_pretrain": group({"data_dir": str(tmp_path / "rows")})}
    with pytest.raises(UserError, match="none of its 1 rows can be used.*exceeds max_latent_size 4"):
        streams_of(tmp_path, groups, byte_tokenizer(tmp_path / "tokenizer"), layout=LayoutOptions(max_latent_size=4))
