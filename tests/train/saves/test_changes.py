"""A resumed run names what differs from the run that was saved, old and new, and nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bagel_ds.arguments.run_config import RunConfig, make_config
from bagel_ds.data.samples.images import ImageTransform
from bagel_ds.train.saves import changes as module
from bagel_ds.train.saves.changes import changes, describe_data, keep_config, versions


def saved(config: RunConfig, **more: Any) -> dict[str, Any]:
    """As trainer.json gives it back."""
    found = {"arguments": config.values(), "versions": versions(), "data": {}, **more}
    return dict(json.loads(json.dumps(found)))


def test_arguments_are_named_with_old_and_new_value() -> None:
    before = make_config({"lr": 1e-4, "freeze_llm": False, "nvme_path": "/a", "results_dir": "old"})
    now = make_config({"lr": 2e-5, "freeze_llm": True, "results_dir": "new"})
    assert changes(saved(before), now.values(), {}) == [
        "--results_dir: old -> new",
        "--lr: 0.0001 -> 2e-05",
        "--freeze_llm: False -> True",
        "--nvme_path: /a -> None",
    ]
    assert changes(saved(now), now.values(), {}) == []


def test_what_only_says_where_to_start_is_no_change() -> None:
    before = make_config({"finetune_from_hf": True, "start_anew": True})
    now = make_config({"auto_resume": True, "resume_from": "x", "resume_model_only": True})
    assert changes(saved(before), now.values(), {}) == []


def test_an_option_that_an_older_version_did_not_have_counts_as_its_default() -> None:
    before = saved(make_config({}))
    del before["arguments"]["keep_last"]
    before["arguments"]["gone_since"] = 3
    assert changes(before, make_config({}).values(), {}) == []
    assert changes(before, make_config({"keep_last": 2}).values(), {}) == ["--keep_last: 0 -> 2"]


def test_the_code_is_named_by_its_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config({})
    before = saved(config)
    monkeypatch.setattr(module.bagel_ds, "__version__", "99.0")
    assert changes(before, config.values(), {}) == [f"bagel_ds: {before['versions']['bagel_ds']} -> 99.0"]


@dataclass
class Stream:
    """What `describe_data` asks of a GroupStream."""

    name: str = "t2i"
    weight: float = 1.0
    is_mandatory: bool = True
    files: tuple[str, ...] = ("a", "b")
    vae_transform: ImageTransform = ImageTransform(16, 1024, 512)
    vit_transform: ImageTransform | None = None
    datasets: tuple[str, ...] = ("pictures",)
    uses: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        indexes = [SimpleNamespace(digest=name, rows=600) for name in self.files]
        self.uses = [SimpleNamespace(dataset="pictures", index=index) for index in indexes]


def described(tokenizer: str = "t", *streams: Stream) -> dict[str, str]:
    data: Any = SimpleNamespace(tokenizer=SimpleNamespace(fingerprint=tokenizer), streams=streams or (Stream(),))
    return describe_data(data)


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (described(), []),
        (described("u"), ["tokenizer files: t -> u"]),
        (described("t", Stream(weight=2.5)), ["data group t2i, weight: 1 (mandatory) -> 2.5 (mandatory)"]),
        (
            described("t", Stream(vae_transform=ImageTransform(32, 1024, 512))),
            [
                "data group t2i, images: "
                "VAE ImageTransform(image_stride=16, max_image_size=1024, min_image_size=512, max_pixels=1806336), "
                "ViT None -> "
                "VAE ImageTransform(image_stride=32, max_image_size=1024, min_image_size=512, max_pixels=1806336), "
                "ViT None"
            ],
        ),
    ],
)
def test_data_are_named_by_what_changed(now: dict[str, str], expected: list[str]) -> None:
    config = make_config({})
    assert changes(saved(config, data=described()), config.values(), now) == expected


def test_the_tokenizer_of_an_older_trainer_json_is_not_compared() -> None:
    """It was known by how a library printed it."""
    config = make_config({})
    older = {"tokenizer": "printed"} | {name: text for name, text in described().items() if "tokenizer" not in name}
    assert changes(saved(config, data=older), config.values(), described()) == []


def test_files_that_changed_or_came_are_named_by_their_rows() -> None:
    config = make_config({})
    before = saved(config, data=described())
    (line,) = changes(before, config.values(), described("t", Stream(files=("a", "b", "c"))))
    assert "data group t2i, dataset pictures: 1,200 rows in 2 files" in line and "-> 1,800 rows in 3 files" in line
    (line,) = changes(before, config.values(), described("t", Stream(files=("a", "c"))))
    assert line.count("1,200 rows in 2 files") == 2, "other bytes in as many rows"
    lines = changes(before, config.values(), described("t", Stream(), Stream(name="edit")))
    assert len(lines) == 3 and all(line.startswith("data group edit, ") and "(none) -> " in line for line in lines)
    assert changes(saved(config), config.values(), described()) == [], "saved before data were described"


def test_config_yaml_keeps_those_of_earlier_starts(tmp_path: Path) -> None:
    for text in ("one", "one", "two", "three", "three"):
        keep_config(tmp_path, text)
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"config.yaml": "three", "config_1.yaml": "one", "config_2.yaml": "two"}
