"""The YAML that comes with the example data: what it reads, and that it never replaces another file."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from bagel_ds.cli.main import main
from bagel_ds.data.config.dataset_config import load_dataset_config
from bagel_ds.data.formats.registry import KINDS
from bagel_ds.demo import write_demo
from bagel_ds.hub.example_config import EXAMPLE
from tests.hub.server import Server
from tests.hub.test_archive import PATH, zipped
from tests.launch import REPOSITORY


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder)
    return folder


@pytest.fixture
def here(demo: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and an archive of the demo's example data, named like the published one."""
    source = demo / "data"
    files = [path for path in source.rglob("bagel_example/**/*") if path.is_file()]
    server.files[PATH] = zipped({path.relative_to(source).as_posix(): path.read_bytes() for path in files})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def download(server: Server, *words: str) -> int:
    return main(["download", "bagel_example", "--url", server.url + PATH, *words])


def test_the_data_can_be_trained_on_by_the_commands_that_the_download_prints(
    here: Path, demo: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert download(server) == 0
    _, check, train = capsys.readouterr().out.splitlines()
    config = load_dataset_config("data/configs/example.yaml")
    assert [(group.name, group.datasets[0].name, group.is_mandatory) for group in config.groups] == [
        ("t2i_pretrain", "t2i", True),
        ("unified_edit", "seedxedit_multi", False),
        ("vlm_sft", "llava_ov", True),
    ]
    for group in config.groups:
        published = KINDS[group.kind]
        assert (group.vae_transform, group.vit_transform) == (published.vae_transform, published.vit_transform)
    (here / "models").mkdir()
    (here / "models" / "BAGEL-7B-MoT").symlink_to(demo / "model")
    words = shlex.split(check.removeprefix("check it: bagel-ds "))
    assert main([*words, "--workers", "1"]) == 0
    assert "rows that cannot be used: 0" in capsys.readouterr().out
    assert train == "train on it, in the repository: bash launch/train_bagel.sh"


def test_another_folder_is_named_in_the_commands(
    here: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert download(server, "--out", "my data") == 0
    _, check, train = capsys.readouterr().out.splitlines()
    assert "--dataset_config_file 'my data/configs/example.yaml'" in check
    assert "DATASET_CONFIG='my data/configs/example.yaml' bash launch/train_bagel.sh" in train
    script = (REPOSITORY / "launch" / "train_bagel.sh").read_text()
    assert "DATASET_CONFIG=${DATASET_CONFIG:-data/configs/example.yaml}" in script


def test_the_folder_can_be_moved(here: Path, server: Server) -> None:
    assert download(server, "--out", "data") == 0
    (here / "data").rename(here / "moved")
    files = [
        file for group in load_dataset_config("moved/configs/example.yaml").groups for file in group.datasets[0].files
    ]
    assert len(files) == 5 and all(Path(file).is_file() for file in files)


def test_a_config_that_is_there_stays_and_the_user_is_told(
    here: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = here / "data" / "configs" / "example.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("t2i_pretrain: {dataset_names: [mine]}\n")
    assert download(server) == 0
    assert "example.yaml is another file and stays" in capsys.readouterr().out
    assert download(server, "--json") == 0
    assert "dataset_config_file" not in json.loads(capsys.readouterr().out)
    assert mine.read_text() == "t2i_pretrain: {dataset_names: [mine]}\n"
    mine.unlink()
    for _ in range(2):
        assert download(server, "--json") == 0
        assert json.loads(capsys.readouterr().out)["dataset_config_file"] == "data/configs/example.yaml"
    assert mine.read_text() == EXAMPLE
