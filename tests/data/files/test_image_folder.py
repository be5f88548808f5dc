"""Which files a jsonl may name: those below its folder, and those that allowed links lead to."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from bagel_ds.data.config.dataset_config import load_dataset_config
from bagel_ds.data.files.image_folder import ImageFolder, RefusedPath
from bagel_ds.data.formats import SOURCES
from bagel_ds.data.index.data_file import DataFile
from bagel_ds.errors import UserError
from tests.small_data import picture

ROW = {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "It."}], "image": "0.png"}


def hub_snapshot(cache: Path, kind: str = "datasets") -> Path:
    """A repository as `snapshot_download` leaves it: each file of the snapshot is a link into ../../blobs."""
    repository = cache / "hub" / f"{kind}--me--pictures"
    snapshot = repository / "snapshots" / "0123abcd"
    (snapshot / "images").mkdir(parents=True)
    (repository / "blobs").mkdir()
    for name, content in (("images/0.png", picture(40, 30)), ("train.jsonl", f"{json.dumps(ROW)}\n".encode())):
        blob = repository / "blobs" / name.replace("/", "-")
        blob.write_bytes(content)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    return snapshot


def _secret(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "0.png").write_bytes(picture(40, 30))
    return folder / "0.png"


@pytest.mark.parametrize("kind", ["datasets", "models", "spaces"])
def test_a_hub_snapshot_is_used_as_it_lies(tmp_path: Path, kind: str) -> None:
    snapshot = hub_snapshot(tmp_path, kind)
    assert ImageFolder(str(snapshot / "images")).file("0.png") == snapshot / "images" / "0.png"
    (tmp_path / "linked").symlink_to(snapshot / "images")
    assert ImageFolder(str(tmp_path / "linked")).file("0.png").is_file()


def test_a_row_of_a_hub_snapshot_is_parsed(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path)
    entry = {"name": "hub", "data_dir": str(snapshot / "images"), "jsonl_path": str(snapshot / "train.jsonl")}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"vlm_sft": {"dataset_names": [entry]}}))
    (dataset,) = load_dataset_config(str(tmp_path / "data.yaml")).groups[0].datasets
    parsed = SOURCES["vlm"].parse(ROW, dataset.images)
    assert parsed.images == [snapshot / "images" / "0.png"]


def test_links_out_of_the_repository_stay_refused(tmp_path: Path) -> None:
    snapshot, secret = hub_snapshot(tmp_path), _secret(tmp_path / "outside")
    (snapshot / "images" / "out.png").symlink_to(secret)
    other = hub_snapshot(tmp_path / "other")
    (snapshot / "images" / "other.png").symlink_to(other / "images" / "0.png")
    for name in ("out.png", "other.png"):
        with pytest.raises(RefusedPath, match="leaves the image folder .*linked_dirs"):
            ImageFolder(str(snapshot / "images")).file(name)


def test_links_into_blobs_outside_a_hub_cache_stay_refused(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path)
    (tmp_path / "hub" / "datasets--me--pictures").rename(tmp_path / "hub" / "pictures")
    moved = tmp_path / "hub" / "pictures" / snapshot.relative_to(tmp_path / "hub" / "datasets--me--pictures")
    with pytest.raises(RefusedPath):
        ImageFolder(str(moved / "images")).file("0.png")


def test_links_may_lead_into_folders_that_the_user_names(tmp_path: Path) -> None:
    secret, images = _secret(tmp_path / "disk" / "pictures"), tmp_path / "images"
    images.mkdir()
    (images / "0.png").symlink_to(secret)
    with pytest.raises(RefusedPath, match="linked_dirs"):
        ImageFolder(str(images)).file("0.png")
    for linked in (tmp_path / "disk", secret.parent):
        assert ImageFolder(str(images), (str(linked),)).file("0.png") == images / "0.png"
    (tmp_path / "dis").mkdir()
    with pytest.raises(RefusedPath):  # a name that only begins like the target's
        ImageFolder(str(images), (str(tmp_path / "dis"),)).file("0.png")


def test_linked_dirs_of_a_config_are_expanded_checked_and_part_of_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISK", str(tmp_path / "disk"))
    (tmp_path / "disk").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "a.jsonl").write_text("")

    def images(linked: object) -> ImageFolder:
        entry = {"name": "a", "data_dir": "images", "jsonl_path": "a.jsonl", "linked_dirs": linked}
        (tmp_path / "data.yaml").write_text(yaml.safe_dump({"vlm_sft": {"dataset_names": [entry]}}))
        return load_dataset_config(str(tmp_path / "data.yaml")).groups[0].datasets[0].images

    assert images("$DISK").linked == images(["disk"]).linked == (str(tmp_path / "disk"),)
    with pytest.raises(UserError, match="linked_dirs does not exist"):
        images("elsewhere")
    with pytest.raises(UserError, match="linked_dirs .*a.jsonl: it is a file, not a folder"):
        images("a.jsonl")
    keys = {DataFile("a", SOURCES["vlm"], folder).key for folder in (images([]), images("disk"))}
    assert len(keys) == 2


@pytest.mark.parametrize("name", ["../0.png", "a/../../0.png", "/etc/hostname", "C:\\a.png", "a\0.png"])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    _secret(tmp_path / "images" / "a")
    with pytest.raises(RefusedPath, match="leaves the image folder"):
        ImageFolder(str(tmp_path / "images")).file(name)


def test_an_absolute_name_below_the_folder_does_not_leave_it(tmp_path: Path) -> None:
    inside = _secret(tmp_path / "images")
    assert ImageFolder(str(tmp_path / "images")).file(str(inside)) == inside
    (tmp_path / "link").symlink_to(tmp_path / "images")
    assert ImageFolder(str(tmp_path / "link")).file(str(inside)) == inside


def test_a_ring_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ring").symlink_to(tmp_path / "ring")
    with pytest.raises(RefusedPath, match="cannot be followed"):
        ImageFolder(str(tmp_path)).file("ring")
