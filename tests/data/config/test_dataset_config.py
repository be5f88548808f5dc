"""Both dialects of dataset configs, every form of dataset_info, and the faults a person can make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from bagel_ds.data.config.dataset_config import DatasetConfig, FrameSampler, load_dataset_config
from bagel_ds.data.files.image_folder import ImageFolder
from bagel_ds.data.formats.registry import KINDS
from bagel_ds.data.formats.t2i import TextToImage
from bagel_ds.data.samples.images import ImageTransform
from bagel_ds.errors import UserError
from tests.small_data import t2i_rows, write_config, write_conversations, write_parquet
from tests.test_regular_files import make

EXAMPLE = """
t2i_pretrain:
  dataset_names: [t2i]
  image_transform_args: {image_stride: 16, max_image_size: 1024, min_image_size: 512}
  is_mandatory: true
  num_used_data: [10]
  weight: 1
vlm_sft:
  dataset_names: [llava_ov]
  image_transform_args: {image_stride: 14, max_image_size: 980, min_image_size: 378, max_pixels: 2_007_040}
  frame_sampler_args: {max_num_frames: 12, min_num_frames: 8}
  is_mandatory: true
  shuffle_lines: True
  shuffle_seed: 7
  num_used_data: [1000]
  weight: 0.5
"""


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    """A folder of parquet files and conversations, and dataset_info for them."""
    write_parquet(tmp_path / "t2i" / "b.parquet", t2i_rows(1))
    write_parquet(tmp_path / "t2i" / "a.parquet", t2i_rows(1))
    (tmp_path / "t2i" / "notes.txt").write_text("not data")
    vlm = write_conversations(tmp_path / "vlm", [])
    t2i = {"data_dir": str(tmp_path / "t2i"), "num_files": 10, "num_total_samples": 1000}
    return {"t2i_pretrain": {"t2i": t2i}, "vlm_sft": {"llava_ov": vlm}}


def _faults(config: str, info: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_dataset_config(config, info)
    return str(caught.value)


class Posters(TextToImage):
    name = "posters"
    kinds = ("posters_pretrain",)
    vae_transform = ImageTransform(16, 256, 128)


def test_a_new_format_needs_only_its_class_in_the_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CONTRIBUTING says so."""
    monkeypatch.setitem(KINDS, "posters_pretrain", Posters())
    write_parquet(tmp_path / "posters" / "a.parquet", t2i_rows(1))
    info = {"posters_pretrain": {"mine": {"data_dir": str(tmp_path / "posters"), "num_files": 1}}}
    (tmp_path / "dataset_info.yaml").write_text(yaml.safe_dump(info))
    (tmp_path / "config.yaml").write_text("posters_pretrain: {dataset_names: [mine], num_used_data: [1], weight: 1}")
    (group,) = load_dataset_config(str(tmp_path / "config.yaml")).groups
    assert (group.kind, group.vae_transform, group.vit_transform) == ("posters_pretrain", Posters.vae_transform, None)
    assert len(group.datasets) == 1


def test_dialect_a_as_the_original_publishes_it(tmp_path: Path, data: dict[str, Any]) -> None:
    (tmp_path / "example.yaml").write_text(EXAMPLE)
    (tmp_path / "dataset_info.yaml").write_text(yaml.safe_dump(data))
    config = load_dataset_config(str(tmp_path / "example.yaml"))
    t2i, vlm = config.groups
    assert (t2i.name, t2i.kind, t2i.weight, t2i.is_mandatory) == ("t2i_pretrain", "t2i_pretrain", 1.0, True)
    assert t2i.vae_transform == ImageTransform(16, 1024, 512)
    assert t2i.vit_transform is None
    assert t2i.datasets[0].files == tuple(str(tmp_path / "t2i" / name) for name in ("a.parquet", "b.parquet"))
    assert t2i.datasets[0].num_used == 10
    assert vlm.vit_transform == ImageTransform(14, 980, 378, 2_007_040)
    assert vlm.vae_transform is None
    assert (vlm.shuffle_lines, vlm.shuffle_seed, vlm.weight) == (True, 7, 0.5)
    assert vlm.frame_sampler == FrameSampler(12, 8)
    assert vlm.datasets[0].files == (str(tmp_path / "vlm" / "data.jsonl"),)
    assert vlm.datasets[0].images == ImageFolder(str(tmp_path / "vlm" / "images"))
    assert vlm.datasets[0].num_used == 1000


def test_dialect_b_has_the_published_transforms_and_uses_everything(tmp_path: Path) -> None:
    for name in ("train_split", "test_split"):
        write_parquet(tmp_path / "out" / f"{name}.parquet", t2i_rows(1))
    (tmp_path / "out" / "train_split_info.json").write_text("{}")
    entry = {"path": str(tmp_path / "out"), "parquet": "train_split.parquet", "parquet_info": "train_split_info.json"}
    info = {"interleave_reasoning": {"blockmoving_train": entry}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    names = {"interleave_reasoning": ["blockmoving_train"]}
    path = write_config(tmp_path, {"data_weights": {"interleave_reasoning": 2.0}, "data_names": names})
    (group,) = load_dataset_config(path).groups
    assert (group.weight, group.is_mandatory) == (2.0, False)
    assert group.vae_transform == ImageTransform(16, 512, 512)
    assert group.vit_transform == ImageTransform(14, 512, 512)
    (dataset,) = group.datasets
    assert dataset.files == (str(tmp_path / "out" / "train_split.parquet"),)
    assert dataset.parquet_info == str(tmp_path / "out" / "train_split_info.json")
    assert dataset.num_used is None
    assert load_dataset_config(write_config(tmp_path, {"data_names": names})).groups[0].weight == 1.0


def test_paths_may_stand_in_the_config_itself(tmp_path: Path, data: dict[str, Any]) -> None:
    entry = {"name": "mine", "data_dir": "t2i"}
    config = load_dataset_config(write_config(tmp_path, {"t2i_pretrain": {"dataset_names": [entry]}}))
    assert [dataset.name for dataset in config.groups[0].datasets] == ["mine"]
    assert len(config.groups[0].datasets[0].files) == 2
    own = {"cats": {"kind": "t2i_pretrain", "dataset_names": [entry]}}
    assert load_dataset_config(write_config(tmp_path, own)).groups[0].kind == "t2i_pretrain"


@pytest.mark.parametrize("place", ["configs", ".", "elsewhere/data"])
@pytest.mark.parametrize("form", ["yaml", "json", "py"])
def test_dataset_info_is_found_in_every_form_and_place(
    tmp_path: Path, data: dict[str, Any], place: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = {"yaml": yaml.safe_dump, "json": json.dumps, "py": lambda info: f"DATASET_INFO = {info!r}"}[form](data)
    for folder in ("configs", "elsewhere/data"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / place / f"dataset_info.{form}").write_text(text)
    (tmp_path / "configs" / "example.yaml").write_text(EXAMPLE)
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = load_dataset_config(str(tmp_path / "configs" / "example.yaml"))
    assert [group.name for group in config.groups] == ["t2i_pretrain", "vlm_sft"]


def test_the_nearest_dataset_info_wins_and_an_explicit_one_over_all(tmp_path: Path, data: dict[str, Any]) -> None:
    (tmp_path / "configs").mkdir()
    config = tmp_path / "configs" / "example.yaml"
    config.write_text(EXAMPLE)
    (tmp_path / "dataset_info.yaml").write_text("t2i_pretrain: {}\n")
    (tmp_path / "configs" / "dataset_info.json").write_text(json.dumps(data))
    assert load_dataset_config(str(config)).groups
    assert "vlm_sft" in _faults(str(config), str(tmp_path / "dataset_info.yaml"))


def test_a_python_dataset_info_is_read_and_never_run(tmp_path: Path, data: dict[str, Any]) -> None:
    marker = tmp_path / "ran"
    lines = [
        "from .t2i_dataset import T2IIterableDataset",
        f"open({str(marker)!r}, 'w')",
        "DATASET_REGISTRY = {'t2i_pretrain': T2IIterableDataset, 'sketches': T2IIterableDataset}",
        "DATASET_INFO = {'vlm_sft': {}}",
        f"DATASET_INFO['sketches'] = {data['t2i_pretrain']!r}",
        f"DATASET_INFO['vlm_sft']['llava_ov'] = {data['vlm_sft']['llava_ov']!r}",
    ]
    (tmp_path / "dataset_info.py").write_text("\n".join(lines))
    path = write_config(tmp_path, {"sketches": {"dataset_names": ["t2i"]}, "vlm_sft": {"dataset_names": ["llava_ov"]}})
    groups = load_dataset_config(path).groups
    assert [group.name for group in groups] == ["sketches", "vlm_sft"]
    assert groups[0].vae_transform == ImageTransform(16, 1024, 512)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("DATASET_INFO = {'t2i_pretrain': {'t2i': {'data_dir': os.path.join(ROOT, 't2i')}}}", "line 3: .os.path.join"),
        ("DATASET_INFO = {'t2i_pretrain': {'t2i': {'data_dir': f'{ROOT}/t2i'}}}", "line 3: .f'{ROOT}/t2i'"),
        ("DATASET_INFO = {'t2i_pretrain': {'t2i': {'data_dir': ROOT + '/t2i'}}}", "line 3: .ROOT"),
        ("DATASET_INFO = load()", "line 3: .load"),
        ("DATASET_INFO.update({})", "line 3: only assignments"),
        ("INFO = {}", "no assignment to DATASET_INFO"),
        ("DATASET_INFO = {", "line 3: cannot be read as Python"),
    ],
)
def test_what_would_have_to_be_computed_is_refused_with_its_line(tmp_path: Path, line: str, named: str) -> None:
    (tmp_path / "dataset_info.py").write_text(f"import os\nROOT = '/data'\n{line}\n")
    path = write_config(tmp_path, {"t2i_pretrain": {"dataset_names": ["t2i"]}})
    with pytest.raises(UserError, match=named):
        load_dataset_config(path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"dataset_name": ["t2i"]}, "unknown key 'dataset_name'; did you mean 'dataset_names'"),
        ({"weight": -1}, "weight must be a number of at least 0, found -1"),
        ({"weight": "much"}, "weight must be a number"),
        ({"is_mandatory": "yes"}, "is_mandatory must be true or false"),
        ({"num_used_data": [1, 2]}, "one number for each of 1 dataset_names"),
        ({"num_used_data": [-1]}, "integers of at least 0 and at most 1,000,000, found -1"),
        ({"image_transform_args": {"image_stride": 16}}, "lacks max_image_size, min_image_size"),
        ({"image_transform_args": {"image_strid": 16}}, "did you mean 'image_stride'"),
        ({"image_transform_args": {"image_stride": 0, "max_image_size": 1, "min_image_size": 1}}, "positive numbers"),
        ({"shuffle_seed": "a"}, "shuffle_seed must be an integer"),
        ({"dataset_names": ["t21"]}, "has no dataset 't21' in 't2i_pretrain'; did you mean 't2i'"),
        ({"dataset_names": []}, "needs dataset_names"),
        ({"kind": "t2i_pretrian"}, "unknown kind 't2i_pretrian'; did you mean 't2i_pretrain'"),
        ({"num_used_data": [0]}, "uses no data"),
        ({"weight": 0}, "every group has weight 0"),
    ],
)
def test_each_fault_of_a_group_is_named(
    tmp_path: Path, data: dict[str, Any], change: dict[str, Any], named: str
) -> None:
    (tmp_path / "dataset_info.yaml").write_text(yaml.safe_dump(data))
    path = write_config(tmp_path, {"t2i_pretrain": {"dataset_names": ["t2i"], **change}})
    message = _faults(path)
    assert named in message
    assert path in message or "dataset_info.yaml" in message


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"data_dir": "absent"}, "data_dir does not exist: "),
        ({"data_dir": "vlm"}, "holds no .parquet file"),
        ({"data_dirs": "t2i"}, "unknown key 'data_dirs'; did you mean 'data_dir'"),
        ({"path": "t2i", "parquet": "c.parquet"}, "no such parquet file"),
        ({}, "data_dir (or path) is missing"),
        ("t2i", "expected a mapping with paths, found 't2i'"),
    ],
)
def test_each_fault_of_a_dataset_is_named(tmp_path: Path, data: dict[str, Any], entry: Any, named: str) -> None:
    (tmp_path / "dataset_info.yaml").write_text(yaml.safe_dump({"t2i_pretrain": {"t2i": entry}}))
    message = _faults(write_config(tmp_path, {"t2i_pretrain": {"dataset_names": ["t2i"]}}))
    assert named in message
    assert "t2i_pretrain/t2i" in message


def test_all_faults_are_listed_at_once(tmp_path: Path, data: dict[str, Any]) -> None:
    (tmp_path / "dataset_info.yaml").write_text(yaml.safe_dump(data))
    groups = {
        "t2i_pretrain": {"dataset_names": ["cats"], "wieght": 1},
        "vlm": {"dataset_names": ["llava_ov"]},
        "vlm_sft": {"dataset_names": [{"name": "x", "data_dir": "vlm", "jsonl_path": "nowhere.jsonl"}]},
    }
    message = _faults(write_config(tmp_path, groups))
    for named in ("'cats'", "'wieght'", "unknown kind 'vlm'", "jsonl_path does not exist"):
        assert named in message


@pytest.mark.parametrize(
    ("text", "named"),
    [("", "found nothing"), ("- a\n", "found a list"), ("a: [\n", "not valid YAML"), ("t2i_pretrain: 3\n", "found 3")],
)
def test_a_malformed_config_is_named(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "data.yaml").write_text(text)
    message = _faults(str(tmp_path / "data.yaml"))
    assert named in message
    assert "data.yaml" in message


def test_a_missing_config_is_named_with_those_there_are(tmp_path: Path) -> None:
    other = write_config(tmp_path, {"x": 1}, "other.yaml")
    message = _faults(str(tmp_path / "absent.yaml"))
    assert "absent.yaml does not exist" in message and other in message


def test_without_any_dataset_info_the_places_searched_are_named(tmp_path: Path) -> None:
    message = _faults(write_config(tmp_path, {"t2i_pretrain": {"dataset_names": ["t2i"]}}))
    assert "there is no dataset_info.yaml" in message and str(tmp_path) in message
    assert "absent.yaml: no such file" in _faults(write_config(tmp_path, {"x": 1}), str(tmp_path / "absent.yaml"))


def test_a_dataset_info_that_is_no_text_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.yaml").write_bytes(b"\xff\xfe\x00")
    message = _faults(write_config(tmp_path, {"t2i_pretrain": {"dataset_names": ["t2i"]}}))
    assert "dataset_info.yaml is not UTF-8 text" in message


@pytest.mark.parametrize("kind", ["t2i_pretrain", "vlm_sft"])
def test_a_second_image_size_where_there_is_one_is_a_message(kind: str, tmp_path: Path, data: dict[str, Any]) -> None:
    (tmp_path / "dataset_info.yaml").write_text(yaml.safe_dump(data))
    args = {"image_stride": 14, "max_image_size": 518, "min_image_size": 224}
    (name,) = data[kind]
    message = _faults(write_config(tmp_path, {kind: {"dataset_names": [name], "vit_image_transform_args": args}}))
    assert f"vit_image_transform_args has no meaning for the kind {kind}" in message


def test_dialect_b_names_unknown_groups(tmp_path: Path, data: dict[str, Any]) -> None:
    (tmp_path / "dataset_info.yaml").write_text(yaml.safe_dump(data))
    groups = {"data_weights": {"t2i_pretrian": 1.0}, "data_names": {"t2i_pretrain": ["t2i"]}, "datas": 1}
    message = _faults(write_config(tmp_path, groups))
    assert "'t2i_pretrian', which data_names lacks; did you mean 't2i_pretrain'" in message
    assert "unknown key 'datas'" in message


def test_configs_are_plain_values(tmp_path: Path, data: dict[str, Any]) -> None:
    (tmp_path / "dataset_info.yaml").write_text(yaml.safe_dump(data))
    (tmp_path / "example.yaml").write_text(EXAMPLE)
    first, second = (load_dataset_config(str(tmp_path / "example.yaml")) for _ in range(2))
    assert isinstance(first, DatasetConfig)
    assert first == second and hash(first) == hash(second)


TWO_GROUPS = """t2i_pretrain:
  dataset_names: [{name: cats, data_dir: t2i}]
  weight: 1
t2i_pretrain:
  dataset_names: [{name: dogs, data_dir: t2i}]
  weight: 3
"""


def test_a_group_given_twice_is_refused_with_the_remedy_that_works(tmp_path: Path, data: dict[str, Any]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(TWO_GROUPS)
    message = _faults(str(path))
    assert f"{path}, line 4: the key 't2i_pretrain' is given twice (first in line 1)" in message
    assert "`kind: t2i_pretrain`" in message
    path.write_text(TWO_GROUPS.replace("t2i_pretrain:", "dogs:\n  kind: t2i_pretrain", 1))
    assert [(group.name, group.kind, group.weight) for group in load_dataset_config(str(path)).groups] == [
        ("dogs", "t2i_pretrain", 1.0),
        ("t2i_pretrain", "t2i_pretrain", 3.0),
    ]


def test_groups_may_merge_what_a_block_of_another_name_holds(tmp_path: Path, data: dict[str, Any]) -> None:
    (tmp_path / "mine.yaml").write_text(
        "x-sizes: &sizes\n  image_transform_args: {image_stride: 16, max_image_size: 96, min_image_size: 64}\n"
        "t2i_pretrain:\n  <<: *sizes\n  dataset_names: [{name: cats, data_dir: t2i}]\n"
        "dogs:\n  <<: *sizes\n  kind: t2i_pretrain\n  weight: 1e-1\n  dataset_names: [{name: dogs, data_dir: t2i}]\n"
    )
    first, second = load_dataset_config(str(tmp_path / "mine.yaml")).groups
    assert first.vae_transform == second.vae_transform == ImageTransform(16, 96, 64)
    assert (first.weight, second.weight) == (1.0, 0.1)


def test_a_group_with_a_name_of_its_own_finds_the_datasets_of_its_kind(tmp_path: Path, data: dict[str, Any]) -> None:
    (tmp_path / "dataset_info.yaml").write_text(yaml.safe_dump(data))
    own = {"dogs": {"kind": "t2i_pretrain", "dataset_names": ["t2i"]}}
    (group,) = load_dataset_config(write_config(tmp_path, own)).groups
    assert group.datasets[0].name == "t2i"


@pytest.mark.parametrize(
    "text, words",
    [
        ("data_names: {t2i_pretrain: [t2i], t2i_pretrain: [t2i]}\n", "`kind: t2i_pretrain`"),
        ("data_weights: {a: 1}\ndata_names: {a: [t2i]}\ndata_weights: {a: 2}\n", "'data_weights' is given twice"),
        (
            "t2i_pretrain:\n  dataset_names: [t2i]\n  weight: 1\n  weight: 2\n",
            "line 4: the key 'weight' in t2i_pretrain",
        ),
        ("t2i_pretrain:\n  dataset_names: [{name: a, data_dir: t2i, data_dir: vlm}]\n", "'data_dir'"),
        ("t2i_pretrain: {image_transform_args: {image_stride: 16, image_stride: 8}}\n", "'image_stride'"),
    ],
)
def test_keys_given_twice_are_refused_at_every_level(
    tmp_path: Path, data: dict[str, Any], text: str, words: str
) -> None:
    (tmp_path / "dataset_info.yaml").write_text(yaml.safe_dump(data))
    (tmp_path / "mine.yaml").write_text(text)
    assert words in _faults(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    "form, text, line",
    [
        ("yaml", "t2i_pretrain:\n  t2i: {data_dir: t2i}\nt2i_pretrain:\n  b: {data_dir: t2i}\n", 3),
        ("json", '{"DATASET_INFO": {"t2i_pretrain": {"t2i": {"data_dir": "t2i"}},\n"t2i_pretrain": {}}}', 2),
        ("py", 'DATASET_INFO = {\n"t2i_pretrain": {},\n"t2i_pretrain": {"t2i": {"data_dir": "t2i"}}}', 3),
        ("py", 'DATASET_INFO = {"t2i_pretrain": {"t2i": {}}}\nDATASET_INFO["t2i_pretrain"] = {}', 2),
        ("py", 'DATASET_INFO = {"t2i_pretrain": {}}\nDATASET_INFO["t2i_pretrain"] = {}', 2),
    ],
)
def test_a_group_given_twice_in_dataset_info_is_refused(tmp_path: Path, form: str, text: str, line: int) -> None:
    info = tmp_path / f"dataset_info.{form}"
    info.write_text(text)
    message = _faults(write_config(tmp_path, {"t2i_pretrain": {"dataset_names": ["t2i"]}}))
    assert f"{info}, line {line}: " in message and "given twice" in message
    assert "list the datasets of both under one key" in message and "`kind: t2i_pretrain`" in message


@pytest.mark.parametrize(
    "text",
    [
        'DATASET_INFO = {"t2i_pretrain": {"t2i": {"data_dir": "a", "data_dir": "b"}}}',
        'DATASET_INFO = {"t2i_pretrain": {"t2i": {}, "t2i": {}}}',
        'DATASET_INFO = {"t2i_pretrain": {}}\nDATASET_INFO["t2i_pretrain"]["t2i"] = {"path": "a", "path": "b"}',
        "DATASET_INFO = {}\nDATASET_INFO = {}",
        'DATASET_REGISTRY = {"a": T2I, "a": Edit}\nDATASET_INFO = {}',
    ],
)
def test_python_literals_give_no_key_twice(tmp_path: Path, text: str) -> None:
    (tmp_path / "dataset_info.py").write_text(text)
    assert "twice" in _faults(write_config(tmp_path, {"t2i_pretrain": {"dataset_names": ["t2i"]}}))


@pytest.mark.parametrize(
    "text, line",
    [
        ("t2i_pretrain:\n  dataset_names: [t2i]\n  weight: x\n", 3),
        ("t2i_pretrain:\n  dataset_names: [t2i]\n  wieght: 1\n", 3),
        ("t2i_pretrain:\n  dataset_names:\n  - t2i\n  num_used_data: [-1]\n", 4),
        ("t2i_pretrain:\n  dataset_names: [t2i]\nvlm_sft: 3\n", 3),
        ("t2i_pretrain:\n  dataset_names:\n  - t3i\n", 2),
        ("t2i_pretrain:\n  dataset_names:\n  - name: a\n    data_dir: absent\n", 3),
        ("data_names:\n  t2i_pretrain: [t2i]\n  sft: [t2i]\n", 3),
    ],
)
def test_a_bad_value_names_file_and_line(tmp_path: Path, data: dict[str, Any], text: str, line: int) -> None:
    (tmp_path / "dataset_info.yaml").write_text(yaml.safe_dump(data))
    (tmp_path / "mine.yaml").write_text(text)
    assert f"{tmp_path / 'mine.yaml'}, line {line}: " in _faults(str(tmp_path / "mine.yaml"))


def test_a_bad_path_names_the_line_of_dataset_info(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.yaml").write_text("t2i_pretrain:\n  other: {}\n  t2i: {data_dir: absent}\n")
    message = _faults(write_config(tmp_path, {"t2i_pretrain": {"dataset_names": ["t2i"]}}))
    assert f"{tmp_path / 'dataset_info.yaml'}, line 3: " in message


@pytest.mark.parametrize("kind", ["pipe", "socket", "dangling link"])
@pytest.mark.parametrize("named", [True, False])
def test_a_shard_that_is_no_file_is_named_and_not_opened(
    tmp_path: Path, data: dict[str, Any], kind: str, named: bool
) -> None:
    make(tmp_path / "t2i" / "c.parquet", kind)
    entry = {"name": "a", "data_dir": "t2i"} | ({"parquet": ["a.parquet", "c.parquet"]} if named else {})
    message = _faults(write_config(tmp_path, {"t2i_pretrain": {"dataset_names": [entry]}}))
    assert f"{tmp_path / 't2i' / 'c.parquet'}: it is a " in message and "a.parquet" not in message


def test_a_folder_called_parquet_is_named_and_not_read(
    tmp_path: Path, data: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "t2i" / "c.parquet").mkdir()
    config = write_config(tmp_path, {"t2i_pretrain": {"dataset_names": [{"name": "a", "data_dir": "t2i"}]}})
    assert len(load_dataset_config(config).groups[0].datasets[0].files) == 2
    assert f"{tmp_path / 't2i' / 'c.parquet'} is a folder and is not read" in caplog.text


@pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "dangling link"])
@pytest.mark.parametrize("what", ["jsonl", "config", "info"])
def test_other_files_must_be_regular_too(tmp_path: Path, data: dict[str, Any], kind: str, what: str) -> None:
    path = make(tmp_path / ("dataset_info.yaml" if what == "info" else "it"), kind)
    entry: Any = {"name": "a", "data_dir": "vlm", "jsonl_path": "it"} if what == "jsonl" else "a"
    config = write_config(tmp_path, {"vlm_sft": {"dataset_names": [entry]}})
    message = _faults(str(path) if what == "config" else config)
    assert str(path) in message and "it is a " in message


def test_home_and_variables_in_paths_expand(
    tmp_path: Path, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", str(tmp_path))
    (tmp_path / "t2i" / "i.json").write_text("{}")
    t2i = {"data_dir": "~/t2i", "parquet_info": "$DATA/t2i/i.json"}
    vlm = {"data_dir": "${DATA}/vlm/images", "jsonl_path": "~/vlm/data.jsonl"}
    for inline in (True, False):
        (tmp_path / "dataset_info.yaml").write_text(yaml.safe_dump({"t2i_pretrain": {"a": t2i}, "vlm_sft": {"b": vlm}}))
        names: list[Any] = [{"name": "a", **t2i}, {"name": "b", **vlm}] if inline else ["a", "b"]
        groups = {"t2i_pretrain": {"dataset_names": names[:1]}, "vlm_sft": {"dataset_names": names[1:]}}
        first, second = (group.datasets[0] for group in load_dataset_config(write_config(tmp_path, groups)).groups)
        assert first.files == tuple(str(tmp_path / "t2i" / name) for name in ("a.parquet", "b.parquet"))
        assert first.parquet_info == str(tmp_path / "t2i" / "i.json")
        assert (second.images.path, second.files) == (
            str(tmp_path / "vlm" / "images"),
            (str(tmp_path / "vlm" / "data.jsonl"),),
        )
    entry = {"name": "a", "data_dir": "$NOT_SET/t2i"}
    message = _faults(write_config(tmp_path, {"t2i_pretrain": {"dataset_names": [entry]}}))
    assert "$NOT_SET/t2i" in message and "its variable is not set" in message
