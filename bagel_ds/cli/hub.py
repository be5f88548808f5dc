"""`bagel-ds download` and `bagel-ds upload`."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from bagel_ds.errors import UserError
from bagel_ds.machine.output import log_to_stderr

_EXAMPLE = "bagel_example"
_SCRIPT_READS = Path("data/configs/example.yaml")  # launch/train_bagel.sh, unless DATASET_CONFIG names another


def add_commands(commands: Any) -> None:
    """Add both to the subcommands of `bagel-ds`."""
    download = commands.add_parser("download", help="fetch BAGEL-7B-MoT, another model of the hub, or the example data")
    download.add_argument(
        "what",
        nargs="?",
        default="ByteDance-Seed/BAGEL-7B-MoT",
        help=f"OWNER/MODEL on the hub (default ByteDance-Seed/BAGEL-7B-MoT), or {_EXAMPLE}: the first guide's data",
    )
    download.add_argument("--out", type=Path, help=f"folder (default models/MODEL; for {_EXAMPLE}: data)")
    download.add_argument("--revision", help="branch, tag or commit (default main)")
    download.add_argument("--mirror", metavar="URL", help="instead of huggingface.co; HF_ENDPOINT does the same")
    download.add_argument("--url", help=f"another address of the {_EXAMPLE} archive")
    download.add_argument("--json", action="store_true", help="print what was downloaded as JSON")
    download.set_defaults(run=_download)

    upload = commands.add_parser("upload", help="send an export or an adapter to the hub, with a card of its run")
    upload.add_argument("folder", type=Path, help="a folder that bagel-ds export wrote, a checkpoint, or an adapter")
    upload.add_argument("--repo", required=True, help="USER/NAME; made if it does not exist")
    upload.add_argument("--private", action="store_true", help="make a private one")
    upload.add_argument("--card", type=Path, help="file of the model card: used if it exists, written if not")
    upload.add_argument("--dry_run", action="store_true", help="send nothing: list the files and show the card")
    upload.add_argument("--endpoint", metavar="URL", help="instead of huggingface.co; HF_ENDPOINT does the same")
    upload.add_argument("--json", action="store_true", help="print the files as JSON")
    upload.set_defaults(run=_upload)


def _download(options: argparse.Namespace) -> None:
    log_to_stderr()
    config: Path | None = None
    is_ours = False
    if options.what == _EXAMPLE:
        from bagel_ds.hub.archive import ADDRESS, download_example
        from bagel_ds.hub.example_config import write_example_config

        folder = download_example(options.out or Path("data"), options.url or ADDRESS)
        config, is_ours = write_example_config(folder)
        files = [path for path in folder.rglob("*") if path.is_file()]
    else:
        from bagel_ds.hub.models import download_model
        from bagel_ds.inputs.files import is_hub_id

        if not is_hub_id(options.what):
            raise UserError(f"{options.what}: expected OWNER/MODEL as on the hub, or {_EXAMPLE}")
        folder = options.out or Path("models") / options.what.rpartition("/")[2]
        files = download_model(options.what, folder, options.revision, options.mirror)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(files)}
    if options.json:
        written = {"dataset_config_file": str(config)} if is_ours else {}
        print(json.dumps({"folder": str(folder), "files": sizes, **written}))
        return
    print(f"{folder}: {len(sizes)} files, {sum(sizes.values()):,} bytes, all checked")
    if config is not None:
        print(_what_next(config, is_ours))


def _what_next(config: Path, is_ours: bool) -> str:
    """What to do with the example data, as commands for the shell."""
    if not is_ours:
        return f"{config} is another file and stays; move it and run this command again for one that names this data"
    named = shlex.quote(str(config))
    settings = "" if config == _SCRIPT_READS else f"DATASET_CONFIG={named} "
    return (
        f"check it: bagel-ds check --model_path models/BAGEL-7B-MoT --dataset_config_file {named}\n"
        f"train on it, in the repository: {settings}bash launch/train_bagel.sh"
    )


def _upload(options: argparse.Namespace) -> None:
    from bagel_ds.hub.card import model_card, run_of
    from bagel_ds.hub.upload import check_repo, files_to_send, upload

    log_to_stderr()
    check_repo(options.repo)
    files = files_to_send(options.folder)
    card = _card(options.card, model_card(options.folder, options.repo, run_of(options.folder)))
    sizes = {path.relative_to(options.folder).as_posix(): path.stat().st_size for path in files}
    address = None
    if not options.dry_run:
        address = upload(options.folder, files, card, options.repo, options.private, options.endpoint)
    if options.json:
        print(json.dumps({"repo": options.repo, "files": sizes, "card": card, "sent": address}))
        return
    for name, size in sizes.items():
        print(f"{size:>16,}  {name}")
    print(f"\n{card}" if options.dry_run else f"sent to {address}")


def _card(path: Path | None, made: str) -> str:
    """The user's card, or `made`, which is written where the user can edit it."""
    if path is None:
        return made
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
        path.write_text(made, encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--card {path}: {error}") from None
    return made
