"""What `bagel-ds check` found, as text and as JSON.

Guarantees: both show the same numbers; every finding is listed. Percentiles are over samples that can be used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bagel_ds.data.formats.record import UNUSED_IMAGE, UNUSED_TEXT
from bagel_ds.data.inspect.check import (
    DAMAGED,
    DRAWN,
    GIVEN,
    OUTDATED,
    SEEN,
    SPECIAL,
    TEXTS,
    TURNED,
    DatasetCheck,
)
from bagel_ds.data.streams.reader import UnusableRow

_PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
_TOKENS = {TEXTS: "text", SEEN: "ViT", GIVEN: "VAE given", DRAWN: "VAE to generate"}
_NOTES = {
    SPECIAL: "rows whose text holds special-token strings (used as they are)",
    DAMAGED: "damaged pictures (used as far as they go)",
    TURNED: "pictures turned by EXIF (used as they are stored)",
    UNUSED_IMAGE: "pictures that no turn or item shows (left out)",
    UNUSED_TEXT: "turns and instructions that are ignored",
    OUTDATED: "rows whose index was wrong (it is repaired)",
}


def as_json(result: DatasetCheck) -> dict[str, Any]:
    """One dataset. Lengths in tokens; sizes are [width, height] in pixels as stored, ordered by area."""
    return {
        "group": result.group,
        "dataset": result.dataset,
        "kind": result.kind,
        "files": result.files,
        "rows": result.rows,
        "usable": result.usable,
        "too_long": result.too_long,
        "tokens": dict(result.tokens),
        "sample_length": _lengths(result),
        "images": _images(result),
        "bad_rows": [_place(row) for row in result.unusable],
        **{kind: [_place(row) for row in rows] for kind, rows in result.notes.items()},
    }


def as_text(results: Sequence[DatasetCheck]) -> Iterator[str]:
    """Lines: a table per dataset, then every finding."""
    for result in results:
        yield from _table(result)
        yield ""
    bad = ("rows that cannot be used", [row for result in results for row in result.unusable])
    notes = [(title, [row for result in results for row in result.notes[kind]]) for kind, title in _NOTES.items()]
    for title, findings in (bad, *(note for note in notes if note[1])):
        yield f"{title}: {len(findings):,}"
        yield from (f"  {row.place}: {row.reason}" for row in findings)


def unusable(results: Sequence[DatasetCheck]) -> list[str]:
    """Why training would refuse to start with this data: one message per dataset without a usable row."""
    return [
        f"dataset {result.group}/{result.dataset}: none of its {result.rows} rows can be used"
        for result in results
        if not result.usable
    ]


def _table(result: DatasetCheck) -> Iterator[str]:
    share = result.usable / result.rows if result.rows else 0
    total = sum(result.tokens.values())
    yield f"{result.group} / {result.dataset} ({result.kind})"
    yield f"  files            {result.files:,}"
    yield f"  rows             {result.rows:,}, usable {result.usable:,} ({share:.1%})"
    yield f"  unusable         {len(result.unusable):,}, {result.too_long:,} of them longer than the limit per sample"
    if not result.usable:
        return
    counts = [(_TOKENS[kind], count) for kind, count in result.tokens.items() if count]
    yield "  tokens           " + ", ".join(f"{name} {count:,} ({count / total:.0%})" for name, count in counts)
    yield "  sample length    " + ", ".join(
        f"{name} {_round(value)}" for name, value in (_lengths(result) or {}).items()
    )
    images = _images(result)
    if images:
        sizes = ", ".join(f"{name} {images[name][0]} x {images[name][1]}" for name in ("smallest", "median", "largest"))
        yield f"  images           {images['count']:,}, {sizes}"
    for kind, rows in result.notes.items():
        if rows:
            yield f"  noted            {len(rows):,} {_NOTES[kind]}"


def _lengths(result: DatasetCheck) -> dict[str, float] | None:
    if not result.lengths:
        return None
    lengths = np.array(result.lengths)
    percentiles = np.percentile(lengths, _PERCENTILES).tolist()
    middle = {f"p{p}": value for p, value in zip(_PERCENTILES, percentiles, strict=True)}
    return {"min": int(lengths.min()), **middle, "max": int(lengths.max()), "mean": float(lengths.mean())}


def _images(result: DatasetCheck) -> dict[str, Any] | None:
    if not result.widths:
        return None
    sides = np.stack([np.array(result.widths), np.array(result.heights)], axis=1)
    by_area = sides[np.argsort(sides.prod(axis=1), kind="stable")].tolist()
    return {"count": len(by_area), "smallest": by_area[0], "median": by_area[len(by_area) // 2], "largest": by_area[-1]}


def _place(row: UnusableRow) -> dict[str, Any]:
    """A finding; lines have no row group, a whole file has no row."""
    return {
        "dataset": row.place.dataset,
        "file": row.place.file,
        "row_group": row.place.row_group if row.place.row_group >= 0 else None,
        "row": row.place.row if row.place.row >= 0 else None,
        "reason": row.reason,
    }


def _round(value: float) -> str:
    return f"{value:,.0f}"
