"""The example archive: what a zip file must not do, and what is left when something goes wrong."""

from __future__ import annotations

import io
import random
import stat
import zipfile
from pathlib import Path

import pytest

from bagel_ds.cli.main import main
from bagel_ds.errors import UserError
from bagel_ds.hub.archive import unpack
from tests.hub.server import Server

PATH = "/obj/bagel_example.zip"
PICTURE = random.Random(1).randbytes(300_000)
ENTRIES = {
    "bagel_example/t2i/a.parquet": b"rows",
    "bagel_example/vlm/images/x.png": PICTURE,
    "bagel_example/vlm/llava_ov_si.jsonl": b"{}\n",
    "__MACOSX/bagel_example/._t2i": b"junk",
    "bagel_example/.DS_Store": b"junk",
}


def zipped(entries: dict[str, bytes], mode: int = 0) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in entries.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = mode << 16
            archive.writestr(entry, data)
    return content.getvalue()


def unpacked(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_archive_is_continued_unpacked_and_gone(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.files[PATH] = zipped(ENTRIES)
    server.cuts = [0.5, 0.0, 0.5]
    words = ["download", "bagel_example", "--out", str(tmp_path), "--url", server.url + PATH]
    assert main(words) == 0
    wanted = {name.removeprefix("bagel_example/"): data for name, data in ENTRIES.items()}
    wanted = {name: data for name, data in wanted.items() if "MACOSX" not in name and "DS_Store" not in name}
    assert unpacked(tmp_path / "bagel_example") == wanted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bagel_example", "configs"]
    assert server.sent[PATH] == len(server.files[PATH]), "no byte twice"
    assert main(words) == 0 and server.sent[PATH] == len(server.files[PATH]), "it is there"
    assert capsys.readouterr().out.count("3 files") == 2


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("../outside", 0),
        ("bagel_example/../../outside", 0),
        ("/outside", 0),
        ("bagel_example\\..\\..\\outside", 0),
        ("bagel_example/link", stat.S_IFLNK | 0o777),
        ("bagel_example/pipe", stat.S_IFIFO | 0o644),
    ],
)
def test_an_entry_that_could_reach_outside_is_refused_and_nothing_is_left(name: str, mode: int, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    archive = folder / "bagel_example.zip"
    archive.write_bytes(zipped({"bagel_example/t2i/a.parquet": b"rows", name: b"../../outside"}, mode))
    with pytest.raises(UserError, match="is refused: .* (leads outside|is a link or a special file)"):
        unpack(archive, folder / "bagel_example")
    assert list(folder.iterdir()) == [archive] and list(tmp_path.iterdir()) == [folder]


def test_a_damaged_archive_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    archive, content = tmp_path / "bagel_example.zip", bytearray(zipped(ENTRIES))
    content[content.index(PICTURE[:100]) + 50] ^= 1
    for broken in (bytes(content), bytes(content[:1000]), b"<html>not found</html>"):
        archive.write_bytes(broken)
        with pytest.raises(UserError, match="is damaged .*delete it and download it again"):
            unpack(archive, tmp_path / "bagel_example")
        assert list(tmp_path.iterdir()) == [archive]


def test_an_archive_larger_than_the_disk_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "bagel_example.zip"
    archive.write_bytes(zipped(ENTRIES))
    usage = type(__import__("shutil").disk_usage(tmp_path))
    monkeypatch.setattr("bagel_ds.hub.transfer.shutil.disk_usage", lambda path: usage(2**40, 2**40, 1000))
    with pytest.raises(UserError, match="are needed; free space there"):
        unpack(archive, tmp_path / "bagel_example")
    assert list(tmp_path.iterdir()) == [archive]
