"""Sources and streams: what a row becomes, with which probabilities, and what the switches change."""

from __future__ import annotations

import collections
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bagel_ds.data.formats import KINDS
from bagel_ds.data.formats.record import ParsedRow
from bagel_ds.data.samples.image_tokens import LayoutOptions
from bagel_ds.data.samples.sample import TEXT, VAE, VIT, SamplePlan
from bagel_ds.data.streams.stream import GroupStream
from bagel_ds.errors import UserError
from bagel_ds.model_folder.tokenizer import Tokenizer
from tests.small_data import (
    INTERLEAVE_SCHEMA,
    VIT_ARGS,
    byte_tokenizer,
    conversation,
    edit_rows,
    group,
    interleave_row,
    mixed_groups,
    picture,
    streams_of,
    t2i_rows,
    write_conversations,
    write_parquet,
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return byte_tokenizer(tmp_path / "tokenizer")


def _one(folder: Path, kind: str, rows: list[dict[str, Any]], tokenizer: Tokenizer, **options: Any) -> GroupStream:
    """The stream of one parquet dataset, which holds `rows`."""
    write_parquet(folder / "rows" / "a.parquet", rows, schema=INTERLEAVE_SCHEMA if "reason" in kind else None)
    vit = {} if kind == "t2i_pretrain" else {"vit_image_transform_args": VIT_ARGS}
    (stream,) = streams_of(folder, {kind: group({"data_dir": str(folder / "rows")}, **vit)}, tokenizer, **options)
    return stream


def _planned(stream: GroupStream, row: int = 0, epoch: int = 0) -> SamplePlan:
    plan = stream.plan_sample(row, epoch)
    assert plan is not None
    return plan


def _text(stream: GroupStream, plan: SamplePlan, content: int) -> str:
    row = stream.read(plan)
    assert isinstance(row, ParsedRow)
    return row.texts[content]


def test_every_kind_of_the_originals_is_registered() -> None:
    assert {"t2i_pretrain", "unified_edit", "vlm_sft", "interleave_reasoning"} <= KINDS.keys()
    assert KINDS["competition_level_mining"] is KINDS["foundational_structure_generation"] is KINDS["unified_edit"]
    assert KINDS["code_derived_captions"] is KINDS["repurposing_competition"] is KINDS["t2i_pretrain"]


@pytest.mark.parametrize(
    ("column", "texts"),
    [
        ({"captions": '{"a": "one", "b": "two"}'}, {"one", "two"}),
        ({"captions": '["one", "two"]'}, {"one", "two"}),
        ({"captions": ["one", "two"]}, {"one", "two"}),
        ({"captions": '"one"'}, {"one"}),
        ({"captions": "{}"}, {" "}),
        ({"captions": '{"a": null, "b": "two"}'}, {"two"}),
        ({"caption": "one"}, {"one"}),
        ({"captions": None, "caption": "one"}, {"one"}),
    ],
)
def test_captions_in_every_form(tmp_path: Path, tokenizer: Tokenizer, column: dict[str, Any], texts: set[str]) -> None:
    stream = _one(tmp_path, "t2i_pretrain", [{"image": picture(40, 40), **column}], tokenizer)
    seen = {_text(stream, plan, plan.entries[0].content) for plan in (_planned(stream, 0, e) for e in range(40))}
    assert seen == texts


def test_images_may_be_structs_of_bytes_and_path(tmp_path: Path, tokenizer: Tokenizer) -> None:
    row = {"image": {"bytes": picture(40, 40), "path": "x.png"}, "caption": "one"}
    assert _planned(_one(tmp_path, "t2i_pretrain", [row], tokenizer)).length == 3 + 2 + 4 + 2


def test_edit_spans_have_the_distribution_of_the_original(tmp_path: Path, tokenizer: Tokenizer) -> None:
    images, draws = 5, 4000
    row = {
        "image_list": [picture(40, 40, seed=i) for i in range(images)],
        "instruction_list": [[f"{i}a", f"{i}b"] for i in range(images - 1)],
    }
    stream = _one(tmp_path, "unified_edit", [row], tokenizer)
    counts: collections.Counter[tuple[int, int, str]] = collections.Counter()
    for epoch in range(draws):
        plan = _planned(stream, 0, epoch)
        texts = [entry.content for entry in plan.entries if entry.kind == TEXT]
        targets = [entry.content for entry in plan.entries if entry.loss]
        spoken = _text(stream, plan, texts[0])
        joined = "joined" if "." in spoken else "stepwise"
        counts[plan.entries[0].content, targets[-1], joined] += 1
        if joined == "joined":
            assert len(texts) == 1 and spoken.endswith(".")
            assert [part.strip()[0] for part in spoken.split(".")[:-1]] == [
                str(step) for step in range(plan.entries[0].content, targets[-1])
            ]
        else:
            kinds = [(entry.kind, entry.loss) for entry in plan.entries]
            step = [(TEXT, False), (VAE, True)]
            between = [(VAE, False), (VIT, False)]
            assert kinds == between + step + (between + step) * (len(targets) - 1)
    # start is one of 4; the end one or two pictures on; half of the two-picture spans are joined, and a joined span
    # that would reach the last picture ends one earlier
    expected = {}
    for start in range(images - 1):
        ends = [end for end in (start + 1, start + 2) if end < images]
        for end in ends:
            chance = 1 / (images - 1) / len(ends)
            if end == start + 1:
                expected[start, end, "stepwise"] = expected.get((start, end, "stepwise"), 0) + chance
            else:
                expected[start, end, "stepwise"] = chance / 2
                expected[start, min(end, images - 2), "joined"] = chance / 2
    assert counts.keys() == expected.keys()
    for key, chance in expected.items():
        sigma = (draws * chance * (1 - chance)) ** 0.5
        assert abs(counts[key] - draws * chance) < 5 * sigma, key


def test_edit_with_very_many_alternatives_stays_small(tmp_path: Path, tokenizer: Tokenizer) -> None:
    row = {
        "image_list": [picture(40, 40)] * 4,
        "instruction_list": [[f"{step} {i}" for i in range(30)] for step in range(3)],
    }
    stream = _one(tmp_path, "unified_edit", [row], tokenizer)
    for epoch in range(200):
        plan = _planned(stream, 0, epoch)
        for entry in plan.entries:
            assert entry.kind != TEXT or len(_text(stream, plan, entry.content)) == entry.tokens


def test_conversations_keep_their_turns_and_strip_only_around_tags(tmp_path: Path, tokenizer: Tokenizer) -> None:
    line = conversation(" a <image>\n b ", " yes ", " no tag ", "", "<image>", "done", image=["x.png", "y.png"])
    paths = write_conversations(tmp_path, [line], {"x.png": picture(40, 40), "y.png": picture(50, 40)})
    (stream,) = streams_of(tmp_path, {"vlm_sft": group(paths)}, tokenizer)
    plan = _planned(stream)
    told = [
        (_text(stream, plan, entry.content), entry.loss) if entry.kind == TEXT else entry.content
        for entry in plan.entries
    ]
    expected = [("a", False), 0, ("b", False), (" yes ", True), (" no tag ", False), 1, ("done", True)]
    assert told == expected


def test_images_of_a_conversation_share_the_pixel_limit(tmp_path: Path, tokenizer: Tokenizer) -> None:
    args = {"image_stride": 14, "max_image_size": 112, "min_image_size": 14, "max_pixels": 112 * 112}
    alone = conversation("<image>", "yes", image="x.png")
    together = conversation("<image><image>", "yes", image=["x.png", "x.png"])
    paths = write_conversations(tmp_path, [alone, together], {"x.png": picture(112, 112)})
    (stream,) = streams_of(tmp_path, {"vlm_sft": group(paths, image_transform_args=args)}, tokenizer)
    sizes = [[entry.width for entry in _planned(stream, row).entries if entry.kind == VIT] for row in (0, 1)]
    assert sizes == [[112], [56, 56]]


def test_interleaved_labels_say_what_comes_next(tmp_path: Path, tokenizer: Tokenizer) -> None:
    row = interleave_row(["q", 0], ["to image", 0, "to text", " ", "to the end"])
    ends_blank = interleave_row(["q"], ["before a blank", " "])
    stream = _one(tmp_path, "interleave_reasoning", [row, ends_blank], tokenizer)
    special = tokenizer.special
    plan = _planned(stream)
    texts = {_text(stream, plan, e.content): (e.loss, e.special_label) for e in plan.entries if e.kind == TEXT}
    assert texts == {
        "q": (False, -1),
        "to image": (True, special.start_of_image),
        "to text": (True, special.bos),
        "to the end": (True, special.end_of_text),
    }
    images = [(entry.kind, entry.content, entry.loss) for entry in plan.entries if entry.kind != TEXT]
    question = [(VAE, 0, False), (VIT, 0, False)]
    assert images == question + [(VAE, 1, True), (VAE, 1, False), (VIT, 1, False)]
    assert [entry.special_label for entry in _planned(stream, 1).entries] == [-1, special.bos]


def test_plans_depend_on_seed_epoch_and_row_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    groups = mixed_groups(tmp_path)
    drop = dict.fromkeys(("text_cond_dropout_prob", "vit_cond_dropout_prob", "vae_cond_dropout_prob"), 0.4)
    first = streams_of(tmp_path, groups, tokenizer, **drop)
    second = streams_of(tmp_path, groups, tokenizer, **drop)
    other = streams_of(tmp_path, groups, tokenizer, seed=1, **drop)
    keys = [(i, row, epoch) for i, stream in enumerate(first) for row in range(stream.rows) for epoch in range(20)]
    plans = {key: first[key[0]].plan_sample(*key[1:]) for key in keys}
    for key in reversed(keys):
        assert second[key[0]].plan_sample(*key[1:]) == plans[key]
    assert any(other[i].plan_sample(row, epoch) != plans[i, row, epoch] for i, row, epoch in keys)
    assert len({plans[0, 0, epoch].entries for epoch in range(20)}) > 1  # type: ignore[union-attr]


def test_conditions_are_dropped_with_their_probability_and_targets_never(tmp_path: Path, tokenizer: Tokenizer) -> None:
    chances = {TEXT: 0.1, VIT: 0.5, VAE: 0.3}
    options = {f"{name}_cond_dropout_prob": chance for name, chance in zip(("text", "vit", "vae"), chances.values())}
    row = interleave_row(["q", 0], ["s", 0, "end"])
    stream = _one(tmp_path, "interleave_reasoning", [row], tokenizer, **options)
    epochs = 3000
    plans = [_planned(stream, 0, epoch) for epoch in range(epochs)]
    for place, entry in enumerate(plans[0].entries):
        dropped = sum(plan.entries[place].dropped for plan in plans)
        if entry.loss and entry.kind == VAE:
            assert dropped == 0
        else:
            chance = chances[entry.kind]
            assert abs(dropped - epochs * chance) < 5 * (epochs * chance * (1 - chance)) ** 0.5
    lengths = {plan.length for plan in plans}
    assert len(lengths) > 4 and max(lengths) == sum(entry.tokens + 2 for entry in plans[0].entries)


def test_conversations_are_never_dropped(tmp_path: Path, tokenizer: Tokenizer) -> None:
    paths = write_conversations(tmp_path, [conversation("q", "a")])
    every = dict.fromkeys(("text_cond_dropout_prob", "vit_cond_dropout_prob", "vae_cond_dropout_prob"), 1.0)
    (stream,) = streams_of(tmp_path, {"vlm_sft": group(paths)}, tokenizer, **every)
    assert not any(entry.dropped for entry in _planned(stream).entries)


def test_a_sample_that_dropout_leaves_without_loss_is_drawn_again(tmp_path: Path, tokenizer: Tokenizer) -> None:
    row = interleave_row(["q"], ["one", "two"])
    stream = _one(tmp_path, "interleave_reasoning", [row], tokenizer, text_cond_dropout_prob=0.9)
    for epoch in range(300):
        assert any(entry.loss and not entry.dropped for entry in _planned(stream, 0, epoch).entries)


def test_text_dropout_of_one_leaves_text_only_rows_unusable(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [interleave_row(["q"], ["one"]), interleave_row(["q"], ["one", 0])]
    stream = _one(tmp_path, "interleave_reasoning", rows, tokenizer, text_cond_dropout_prob=1.0)
    assert stream.plan_sample(0, 0) is None
    assert "text_cond_dropout_prob" in stream.bad_rows[0].reason
    assert _planned(stream, 1).entries[2].loss


def test_without_generation_clean_and_noised_images_are_gone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    streams = streams_of(tmp_path, mixed_groups(tmp_path), tokenizer, visual_gen=False)
    assert [stream.name for stream in streams] == ["vlm_sft", "interleave_reasoning"]
    assert [stream.group for stream in streams] == [0, 1]
    puzzles = [_planned(streams[1], row) for row in range(streams[1].rows)]
    assert all(entry.kind != VAE for plan in puzzles for entry in plan.entries)
    assert all(any(entry.loss and entry.kind == TEXT for entry in plan.entries) for plan in puzzles)
    assert all(plan.group == 1 for plan in puzzles)


def test_without_understanding_vit_images_and_text_losses_are_gone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    streams = streams_of(tmp_path, mixed_groups(tmp_path), tokenizer, visual_und=False)
    assert [stream.name for stream in streams] == ["t2i_pretrain", "unified_edit", "interleave_reasoning"]
    for stream in streams:
        for row in range(stream.rows):
            for entry in (stream.plan_sample(row, 0) or SamplePlan(0, 0, 0, ())).entries:
                assert entry.kind != VIT
                assert entry.kind != TEXT or (not entry.loss and entry.special_label == -1)
    # the third puzzle's solution is text alone: nothing is left to learn
    assert streams[2].plan_sample(2, 0) is None
    assert [bad.reason for bad in streams[2].bad_rows] == ["no text or image with a loss"]


@pytest.mark.parametrize(("kind", "switch"), [("t2i_pretrain", "visual_gen"), ("vlm_sft", "visual_und")])
def test_a_switch_that_leaves_no_data_is_an_error(tmp_path: Path, tokenizer: Tokenizer, kind: str, switch: str) -> None:
    groups = {kind: mixed_groups(tmp_path)[kind]}
    with pytest.raises(UserError, match=f"leaves no data to train on with .*--{switch} False.*{kind}"):
        streams_of(tmp_path, groups, tokenizer, **{switch: False})


def test_dropped_groups_are_named_in_one_line_each(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    groups = mixed_groups(tmp_path)
    groups["interleave_reasoning"]["weight"] = 0
    with caplog.at_level(logging.INFO, "bagel_ds"):
        streams_of(tmp_path, groups, tokenizer, visual_und=False)
    lines = [record.getMessage() for record in caplog.records if "is dropped" in record.getMessage()]
    assert len(lines) == 2
    assert "vlm_sft" in lines[0] and "visual_und False" in lines[0]
    assert "interleave_reasoning" in lines[1] and "weight is 0" in lines[1]


def test_long_samples_are_skipped_and_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"image": picture(32, 32), "caption": "x" * length} for length in (10, 500)]
    stream = _one(tmp_path, "t2i_pretrain", rows, tokenizer, max_num_tokens_per_sample=100)
    assert [stream.plan_sample(row, 0) is None for row in (0, 1)] == [False, True]
    assert set(stream.too_long) == {1}
    edge = _planned(stream).length
    assert _one(tmp_path, "t2i_pretrain", rows, tokenizer, max_num_tokens_per_sample=edge).plan_sample(0, 0)
    with pytest.raises(UserError, match=f"2 are longer than max_num_tokens_per_sample={edge - 1}"):
        _one(tmp_path, "t2i_pretrain", rows, tokenizer, max_num_tokens_per_sample=edge - 1)


@pytest.mark.parametrize(
    ("limit", "value", "reason"),
    [("max_latent_size", 3, "max_latent_size 3"), ("vit_max_num_patch_per_side", 3, "vit_max_num_patch_per_side 3")],
)
def test_an_image_larger_than_the_position_table_is_a_bad_row(
    tmp_path: Path, tokenizer: Tokenizer, limit: str, value: int, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = edit_rows(1)
    rows.append({**rows[0], "image_list": [picture(40, 40), picture(40, 40)]})
    stream = _one(tmp_path, "unified_edit", rows, tokenizer, layout=LayoutOptions(**{limit: value}))
    for _ in range(3):
        assert stream.plan_sample(0, 0) is None
    assert len(stream.bad_rows) == 1 and reason in stream.bad_rows[0].reason
    assert stream.plan_sample(1, 0) is not None
    assert sum("is skipped" in record.getMessage() for record in caplog.records) == 1


def test_units_are_row_groups_and_slices_of_lines(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bagel_ds.data.index.data_file.UNIT_LINES", 2)
    write_parquet(tmp_path / "t2i" / "a.parquet", t2i_rows(5), group_rows=2)
    write_parquet(tmp_path / "t2i" / "b.parquet", t2i_rows(1, 5))
    paths = write_conversations(tmp_path / "talks", [conversation("q", "a")] * 5)
    groups = {"t2i_pretrain": group({"data_dir": str(tmp_path / "t2i")}), "vlm_sft": group(paths)}
    pictures, talks = streams_of(tmp_path, groups, tokenizer)
    assert list(pictures.units) == [range(0, 2), range(2, 4), range(4, 5), range(5, 6)]
    assert list(talks.units) == [range(0, 2), range(2, 4), range(4, 5)]
    assert str(pictures.place(4)).endswith("a.parquet row group 2 row 0")
    assert str(pictures.place(5)).endswith("b.parquet row group 0 row 0")
    assert str(talks.place(3)) == f"data: {paths['jsonl_path']} line 4"


@pytest.mark.parametrize(("used", "names"), [(None, "ab"), (1, "a"), (2, "ab"), (5, "ababa")])
def test_num_used_data_repeats_the_files_then_cuts(
    tmp_path: Path, tokenizer: Tokenizer, used: int | None, names: str
) -> None:
    for i, name in enumerate("ab"):
        write_parquet(tmp_path / "t2i" / f"{name}.parquet", t2i_rows(2, 2 * i))
    settings = {} if used is None else {"num_used_data": [used]}
    groups = {"t2i_pretrain": group({"data_dir": str(tmp_path / "t2i")}, **settings)}
    (stream,) = streams_of(tmp_path, groups, tokenizer)
    assert [Path(stream.place(row).file).stem for row in range(0, stream.rows, 2)] == list(names)
    assert stream.rows == 2 * len(names)
    if names == "ababa":  # the same row, used again, is drawn anew
        draws = [[_planned(stream, row, epoch).entries for epoch in range(30)] for row in (0, 4)]
        assert draws[0] != draws[1]


def test_the_fingerprint_is_that_of_the_content_not_of_the_place(tmp_path: Path, tokenizer: Tokenizer) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    groups = mixed_groups(here)
    shutil.copytree(here, there)
    moved = json.loads(json.dumps(groups).replace(str(here), str(there)))
    first = [stream.fingerprint for stream in streams_of(here, groups, tokenizer)]
    assert first == [stream.fingerprint for stream in streams_of(there, moved, tokenizer)]
    assert len(set(first)) == len(first)
    assert first != [stream.fingerprint for stream in streams_of(here, groups, tokenizer, seed=3)]
    write_parquet(there / "t2i" / "a.parquet", t2i_rows(4))
    assert first[0] != streams_of(there, moved, tokenizer)[0].fingerprint


def test_datasets_without_a_usable_row_are_named_all_at_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_parquet(tmp_path / "t2i" / "a.parquet", [{"image": b"broken", "caption": "x"}])
    paths = write_conversations(tmp_path, ["{"])
    groups = {"t2i_pretrain": group({"data_dir": str(tmp_path / "t2i")}, "cats"), "vlm_sft": group(paths, "talks")}
    with pytest.raises(UserError) as caught:
        streams_of(tmp_path, groups, tokenizer)
    message = str(caught.value)
    assert "dataset t2i_pretrain/cats: none of its 1 rows can be used" in message
    assert "row group 0 row 0: not a readable image" in message
    assert "dataset vlm_sft/talks" in message and "line 1: the line is not valid JSON" in message


def test_strides_that_do_not_fit_the_tokens_are_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_parquet(tmp_path / "t2i" / "a.parquet", t2i_rows(1))
    args = {"image_stride": 14, "max_image_size": 96, "min_image_size": 32}
    groups = {"t2i_pretrain": group({"data_dir": str(tmp_path / "t2i")}, image_transform_args=args)}
    with pytest.raises(UserError, match="image_stride of the VAE transform is 14; it must be a multiple of 16"):
        streams_of(tmp_path, groups, tokenizer)


@pytest.mark.parametrize(
    ("info", "line"),
    [
        ({"your_data_path/t2i/a.parquet": {"num_row_groups": 1}}, None),
        ({"your_data_path/t2i/a.parquet": {"num_row_groups": 7}}, "disagrees with 1 of 1 files"),
        ({"num_row_groups": 1, "num_rows": 2}, None),
        ({"rows": 2}, "says nothing on 1 of 1 files"),
        (["a.parquet"], "says nothing on 1 of 1 files"),
    ],
)
def test_parquet_info_is_a_hint_and_its_faults_one_line(
    tmp_path: Path, tokenizer: Tokenizer, info: Any, line: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    write_parquet(tmp_path / "t2i" / "a.parquet", t2i_rows(2), group_rows=2)
    (tmp_path / "info.json").write_text(json.dumps(info))
    paths = {"data_dir": str(tmp_path / "t2i"), "parquet_info_path": str(tmp_path / "info.json")}
    with caplog.at_level(logging.INFO, "bagel_ds"):
        (stream,) = streams_of(tmp_path, {"t2i_pretrain": group(paths)}, tokenizer)
    assert stream.rows == 2
    lines = [record.getMessage() for record in caplog.records if "parquet_info" in record.getMessage()]
    assert len(lines) == (line is not None)
    assert line is None or line in lines[0]


def test_planning_touches_no_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    streams = streams_of(tmp_path, mixed_groups(tmp_path), tokenizer)
    for folder in ("t2i", "edit", "vlm", "reason"):
        shutil.rmtree(tmp_path / folder)
    for stream in streams:
        assert all(stream.plan_sample(row, 3) is not None for row in range(stream.rows))
        assert isinstance(stream.read(_planned(stream)), ValueError)


def test_indexed_lengths_are_those_of_every_text_that_can_be_chosen(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for stream in streams_of(tmp_path, mixed_groups(tmp_path), tokenizer):
        for row in range(stream.rows):
            for epoch in range(60):
                plan = _planned(stream, row, epoch)
                for entry in plan.entries:
                    if entry.kind == TEXT:
                        assert entry.tokens == len(tokenizer.encode(_text(stream, plan, entry.content)))
                    else:
                        stride = 16 if entry.kind == VAE else 14
                        assert entry.tokens == np.prod([entry.height // stride, entry.width // stride])
