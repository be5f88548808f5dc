"""Models of the hub: continued where they were cut off, compared with what the hub says, or one message."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from bagel_ds.cli.main import main
from bagel_ds.errors import UserError
from bagel_ds.hub.models import download_model
from tests.hub.server import REVISION, Server

REPO = "owner/BAGEL-test"
SIZE = 3 * 2**20
WEIGHTS = f"/{REPO}/resolve/{REVISION}/model.safetensors"


@pytest.fixture(scope="module")
def model() -> dict[str, bytes]:
    return {"config.json": b"{}", "model.safetensors": random.Random(0).randbytes(SIZE)}


def whole(folder: Path, model: dict[str, bytes]) -> bool:
    return all((folder / name).read_bytes() == content for name, content in model.items())


def test_a_download_that_is_cut_off_continues_also_in_a_later_command(
    server: Server, model: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.models[REPO] = model
    server.cuts, server.then = [0.6, 0.5], 503
    words = ["download", REPO, "--out", str(tmp_path / "m"), "--mirror", server.url]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert f"{server.url}{WEIGHTS}: the server says 503" in said
    assert (tmp_path / "m" / "model.safetensors.part").stat().st_size == SIZE * 8 // 10
    assert "--mirror https://hf-mirror.com" in said and "copy the folder" in said
    server.refusal, server.cuts, server.then = None, [0.9], None
    assert main(words) == 0
    assert "2 files" in capsys.readouterr().out and whole(tmp_path / "m", model)
    assert server.sent[WEIGHTS] == SIZE, "no byte twice"
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == sorted(model)


def test_a_file_that_differs_from_the_hubs_is_named(server: Server, model: dict[str, bytes], tmp_path: Path) -> None:
    server.models[REPO] = model
    folder = tmp_path / "m"
    download_model(REPO, folder, endpoint=server.url)
    again = len(server.sent)
    download_model(REPO, folder, endpoint=server.url)
    assert len(server.sent) == again, "nothing was sent twice"
    damaged = bytearray(model["model.safetensors"])
    damaged[SIZE // 2] ^= 1
    (folder / "model.safetensors").write_bytes(damaged)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged.*delete it and run the same command again"):
        download_model(REPO, folder, endpoint=server.url)
    (folder / "model.safetensors").unlink()
    (folder / "config.json").write_bytes(b"[]")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        download_model(REPO, folder, endpoint=server.url)
    (folder / "config.json").unlink()
    download_model(REPO, folder, endpoint=server.url)
    assert whole(folder, model)


def test_a_token_goes_to_the_hub_and_not_to_the_storage_behind_it(
    server: Server, model: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.models[REPO] = {"model.safetensors": model["model.safetensors"]}
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with Server() as storage:
        storage.files["/blob"] = model["model.safetensors"]
        server.storage = f"{storage.url}/blob"
        download_model(REPO, tmp_path / "m", endpoint=server.url)
        assert whole(tmp_path / "m", server.models[REPO])
        assert server.tokens == {"Bearer hf_secret"} and storage.tokens == {None}


def test_a_name_that_leads_outside_is_refused(server: Server, tmp_path: Path) -> None:
    server.models[REPO] = {"config.json": b"{}", "../outside": b"x"}
    with pytest.raises(UserError, match="which leads outside the folder"):
        download_model(REPO, tmp_path / "m", endpoint=server.url)
    assert list(tmp_path.iterdir()) == []


def test_a_bagel_model_that_lacks_files_is_refused(server: Server, tmp_path: Path) -> None:
    server.models[REPO] = {"llm_config.json": b"{}", "vit_config.json": b"{}"}
    with pytest.raises(UserError, match="lacks ae.safetensors, tokenizer.json"):
        download_model(REPO, tmp_path / "m", endpoint=server.url)


def test_a_name_that_is_not_there_and_a_disk_that_is_too_small_are_told_at_once(
    server: Server, model: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=f"{server.url} has no model owner/BAGEL-test, or it is private"):
        download_model(REPO, tmp_path / "m", endpoint=server.url)
    assert len(server.asked) == 1
    server.models[REPO] = model
    usage = type(__import__("shutil").disk_usage(tmp_path))
    monkeypatch.setattr("bagel_ds.hub.transfer.shutil.disk_usage", lambda path: usage(2**40, 2**40, 2**20))
    with pytest.raises(UserError, match=r"0\.0 GiB free, and 0\.0 GiB are needed; free space there"):
        download_model(REPO, tmp_path / "m", endpoint=server.url)
    assert not (tmp_path / "m").exists()


def test_a_folder_that_can_not_be_made_is_one_message(server: Server, tmp_path: Path) -> None:
    server.models[REPO] = {"config.json": b"{}"}
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out .*file/m: .*Not a directory"):
        download_model(REPO, tmp_path / "file" / "m", endpoint=server.url)


def test_without_a_network_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set.* on another machine, copy the folder"):
        download_model(REPO, tmp_path / "m")


def test_hf_endpoint_names_a_mirror_as_for_the_hubs_own_programs(
    server: Server, model: dict[str, bytes], tmp_path: Path
) -> None:
    server.models[REPO] = model
    words = [sys.executable, "-m", "bagel_ds.cli.main", "download", REPO, "--json"]
    variables = {**os.environ, "HF_ENDPOINT": server.url, "PYTHONPATH": str(Path(__file__).parents[2])}
    ran = subprocess.run(words, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    sizes = {name: len(content) for name, content in model.items()}
    assert json.loads(ran.stdout) == {"folder": "models/BAGEL-test", "files": sizes}
    assert whole(tmp_path / "models" / "BAGEL-test", model)


def test_a_local_name_is_not_taken_for_one_of_the_hub(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["download", "models/BAGEL-7B-MoT"]) == 2
    assert "expected OWNER/MODEL as on the hub, or bagel_example" in capsys.readouterr().err
