"""Uploads a model folder or an adapter to the Hugging Face hub, with its model card.

Guarantees: training states, logs and files that name paths of this machine are not sent. What will be sent can be
listed first. The commit is whole or absent; large files that arrived before a connection broke are not sent again.
"""

from __future__ import annotations

import re
from pathlib import Path

from bagel_ds.checkpoint.export import EXPORTED
from bagel_ds.checkpoint.step_folders import MANIFEST, README, STATE, TRAINER
from bagel_ds.errors import UserError
from bagel_ds.inputs.files import missing_model_files
from bagel_ds.lora.peft_files import holds_adapter

_KEPT_HERE = (TRAINER, MANIFEST, EXPORTED, README)


def files_to_send(folder: Path) -> list[Path]:
    """What an upload of `folder` sends besides its card. Raises `UserError` if it is neither a model nor an adapter."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; pass an export (bagel-ds export), a checkpoint or an adapter")
    if not holds_adapter(folder) and (missing := missing_model_files(folder)):
        raise UserError(f"{folder} is not a whole model: it lacks {', '.join(missing)}; make one with bagel-ds export")
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.relative_to(folder).parts[0] != STATE
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.name not in _KEPT_HERE
    ]


def check_repo(repo: str) -> None:
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo) is None:
        raise UserError(f"--repo {repo}: expected USER/NAME, such as me/bagel-blockmoving")


def upload(folder: Path, files: list[Path], card: str, repo: str, private: bool, endpoint: str | None) -> str:
    """Send `files` and the card as one commit; its address. Raises `UserError`."""
    from huggingface_hub import CommitOperationAdd, HfApi, constants, errors

    where = endpoint or constants.ENDPOINT
    operations = [CommitOperationAdd(path.relative_to(folder).as_posix(), str(path)) for path in files]
    operations.append(CommitOperationAdd(README, card.encode()))
    try:
        api = HfApi(endpoint=endpoint)
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.create_commit(repo, operations, commit_message="Upload with bagel-ds").commit_url)
    except errors.LocalTokenNotFoundError:
        raise UserError("nobody is logged in: run `hf auth login`, or set HF_TOKEN") from None
    except errors.HfHubHTTPError as error:
        code = None if error.response is None else error.response.status_code
        if code in (401, 403):
            raise UserError(
                f"{where} refuses {repo} ({code}): log in with `hf auth login` (or HF_TOKEN), with a token that may "
                "write, to an account of yours or your organization"
            ) from None
        raise UserError(f"{repo} can't be uploaded to {where}: {' '.join(str(error).split())[:300]}") from None
    except Exception as error:  # of whatever http library the hub's brings
        raise UserError(
            f"{repo} can't be uploaded to {where} ({type(error).__name__}: {' '.join(str(error).split())[:200]}). "
            "Check the network; the same command goes on with what has arrived. Mirrors take no uploads"
        ) from None
