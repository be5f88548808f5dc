"""The first guide's example data: downloaded, unpacked, and never outside its folder.

Guarantees: no name in the archive leads outside the folder, and links are refused. Every byte is compared with the
archive's checksums. The folder appears when it is whole.
"""

from __future__ import annotations

import shutil
import stat
import zipfile
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from bagel_ds.errors import UserError, disk_fault
from bagel_ds.hub.transfer import check_room, fetch

NAME = "bagel_example"
ADDRESS = "https://lf3-static.bytednsdoc.com/obj/eden-cn/nuhojubrps/bagel_example.zip"
_OF_A_MAC = ("__MACOSX", ".DS_Store")
_BLOCK = 2**20


def download_example(folder: Path, url: str = ADDRESS) -> Path:
    """Download the archive into `folder` and unpack it there. Returns the unpacked folder. Raises `UserError`."""
    target, archive = folder / NAME, folder / f"{NAME}.zip"
    if target.is_dir() and any(target.iterdir()):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: {disk_fault(error, 'pass another folder')}") from None
    if not archive.is_file():
        fetch(url, archive)
    unpack(archive, target)
    archive.unlink()
    return target


def unpack(archive: Path, target: Path) -> None:
    """Unpack a zip file whose entries lie in one folder, as `target`. Raises `UserError`; nothing is then left."""
    staging = target.with_name(f".{target.name}.unpacking")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as opened:
            entries = [entry for entry in opened.infolist() if not _is_of_a_mac(entry.filename)]
            for entry in entries:
                _check_entry(archive, entry)
            check_room(target.parent, sum(entry.file_size for entry in entries))
            for entry in tqdm(entries, desc=f"unpacking {archive.name}", unit="file"):
                _extract(opened, entry, staging)
        inner = list(staging.iterdir()) if staging.is_dir() else []
        if not inner:
            raise UserError(f"{archive} holds no files; delete it and download it again")
        whole = inner[0] if len(inner) == 1 and inner[0].is_dir() else staging
        if target.is_dir():
            target.rmdir()  # it is empty
        whole.rename(target)
    except (zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{archive} is damaged ({error}); delete it and download it again") from None
    except OSError as error:
        raise UserError(f"{archive} can't be unpacked: {disk_fault(error, 'pass another --out')}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _is_of_a_mac(name: str) -> bool:
    return any(part in _OF_A_MAC for part in PurePosixPath(name).parts)


def _check_entry(archive: Path, entry: zipfile.ZipInfo) -> None:
    path = PurePosixPath(entry.filename)
    mode = entry.external_attr >> 16
    if "\\" in entry.filename or "\0" in entry.filename or path.is_absolute() or ".." in path.parts:
        raise UserError(f"{archive} is refused: {entry.filename!r} leads outside the folder that it is unpacked into")
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise UserError(f"{archive} is refused: {entry.filename!r} is a link or a special file")


def _extract(opened: zipfile.ZipFile, entry: zipfile.ZipInfo, staging: Path) -> None:
    path = staging / entry.filename
    if entry.is_dir():
        path.mkdir(parents=True, exist_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    left = entry.file_size  # an entry that holds more than it says could fill the disk
    with opened.open(entry) as source, path.open("xb") as file:
        while block := source.read(min(_BLOCK, left + 1)):
            left -= len(block)
            if left < 0:
                raise zipfile.BadZipFile(f"{entry.filename} is longer than it says")
            file.write(block)
