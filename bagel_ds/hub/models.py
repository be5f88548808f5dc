"""Downloads a model from the Hugging Face hub, or a mirror of it, into a folder.

Guarantees: a download that was cut off continues, also in a later command. Afterwards size and checksum of every file
are those that the hub names, and a BAGEL folder is complete. A file that is there and differs is named, not replaced.
huggingface-hub lists the files and logs in; it does not fetch them, because it deletes what has arrived of a file when
its process ends (2.4), and the weights are one file of 29 GB.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from tqdm import tqdm

from bagel_ds.errors import UserError, disk_fault
from bagel_ds.hub.transfer import ATTEMPTS, Pause, check_room, fetch
from bagel_ds.inputs.files import missing_model_files

RELEASED = "ByteDance-Seed/BAGEL-7B-MoT"
MIRROR = "https://hf-mirror.com"
_READ = 16 * 2**20
_SHOWN = 2**30  # bytes from which reading takes seconds


class RemoteFile(NamedTuple):
    name: str
    size: int
    sha256: str | None  # of a large file
    blob: str | None  # of a small one: its SHA-1 in git


def download_model(repo: str, folder: Path, revision: str | None = None, endpoint: str | None = None) -> list[Path]:
    """Download `repo` into `folder` and compare every file. Returns the files. Raises `UserError`."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise UserError(f"HF_HUB_OFFLINE is set, so {repo} can't be downloaded: unset it. {_offline(repo, folder)}")
    commit, files = _listed(repo, folder, revision, endpoint)
    names = [file.name for file in files]
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
            raise UserError(f"{repo} is refused: the hub lists {name!r}, which leads outside the folder")
    check_room(folder, sum(file.size for file in files if not (folder / file.name).exists()))
    headers = build_hf_headers()
    for file in files:
        path = folder / file.name
        if not path.exists():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                fetch(hf_hub_url(repo, file.name, revision=commit, endpoint=endpoint), path, headers)
            except UserError as fault:
                raise UserError(f"{fault}. {_offline(repo, folder)}") from None
            except OSError as error:
                raise UserError(f"--out {folder}: {disk_fault(error, 'pass another folder')}") from None
        if found := _fault(path, file):
            raise UserError(f"{found}; delete it and run the same command again")
    if "llm_config.json" in names and (missing := missing_model_files(folder)):
        raise UserError(f"{repo} was downloaded, but lacks {', '.join(missing)}: this is not a whole BAGEL model")
    return [folder / name for name in names]


def _listed(repo: str, folder: Path, revision: str | None, endpoint: str | None) -> tuple[str, list[RemoteFile]]:
    """The commit that `revision` means, and its files."""
    from huggingface_hub import HfApi

    pause = Pause()
    while True:
        try:
            found: Any = HfApi(endpoint=endpoint).model_info(repo, revision=revision, files_metadata=True)
            break
        except Exception as error:  # the hub's own errors, and those of whatever http library it brings
            if not pause.after(error, _is_final(error)):
                raise UserError(_failure(repo, folder, endpoint, error)) from None
    return found.sha, [
        RemoteFile(each.rfilename, int(each.size or 0), each.lfs.sha256 if each.lfs else None, each.blob_id)
        for each in found.siblings
    ]


def _is_final(error: Exception) -> bool:
    """Whether another attempt would end the same way."""
    from huggingface_hub import errors

    final = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError)
    return isinstance(error, final)


def _failure(repo: str, folder: Path, endpoint: str | None, error: Exception) -> str:
    from huggingface_hub import constants, errors

    where, said = endpoint or constants.ENDPOINT, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{repo} needs an account that its owner has let in: request access at {where}/{repo}, then `hf auth login`"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{where} has no model {repo}, or it is private: check the name, or log in with `hf auth login`"
    if isinstance(error, (errors.RevisionNotFoundError, errors.HFValidationError)):
        return f"{repo}: {said}"
    return f"{repo} can't be downloaded from {where} after {ATTEMPTS} attempts ({said}). {_offline(repo, folder)}"


def _offline(repo: str, folder: Path) -> str:
    return (
        f"If that host can't be reached from here, pass --mirror {MIRROR} (or set HF_ENDPOINT). Offline, run "
        f"`bagel-ds download {repo} --out {folder}` on another machine, copy the folder, pass it as --model_path."
    )


def _fault(path: Path, file: RemoteFile) -> str | None:
    """How a file differs from what the hub says of it."""
    if not path.is_file():
        return f"{path} is missing"
    if (size := path.stat().st_size) != file.size:
        return f"{path} has {size:,} bytes, expected {file.size:,}"
    digest, expected = hashlib.sha256(), file.sha256
    if expected is None:
        digest, expected = hashlib.sha1(f"blob {size}\0".encode()), file.blob
    if expected is None:
        return None
    quiet = size < _SHOWN
    with path.open("rb") as opened, tqdm(total=size, unit="B", unit_scale=True, desc=f"checking {file.name}",
                                         disable=quiet) as shown:  # fmt: skip
        while block := opened.read(_READ):
            digest.update(block)
            shown.update(len(block))
    return None if digest.hexdigest() == expected else f"{path} is damaged: its checksum is not the hub's"
