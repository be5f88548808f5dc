"""Weights & Biases, if asked for.

Guarantees: the package wandb is imported only if wanted, and never asks a question on the terminal. A resumed run
continues its W&B run.
"""

from __future__ import annotations

import html
import netrc
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from bagel_ds.arguments.run_config import RunConfig
from bagel_ds.errors import UserError
from bagel_ds.train.metrics.shown import Shown


@dataclass(frozen=True)
class WandbOptions:
    """The wandb_* arguments of a run that wants W&B; `config` is shown as the run's configuration."""

    project: str = "bagel"
    name: str = "run"
    run_id: str = "0"
    resume: str = "allow"
    offline: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, config: RunConfig) -> WandbOptions:
        """The options of a run."""
        args = config.training
        return cls(
            project=args.wandb_project,
            name=args.wandb_name,
            run_id=args.wandb_runid,
            resume=args.wandb_resume,
            offline=args.wandb_offline,
            config=config.values(),
        )


def _has_wandb_key() -> bool:
    """Whether wandb will find a key without asking, in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    files = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    for file in (Path(name).expanduser() for name in files if name):
        try:
            if netrc.netrc(str(file)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def check_wandb(options: WandbOptions) -> None:
    """Raise UserError if W&B can't work; cheap, so that it can run before anything is loaded."""
    try:
        import wandb  # noqa: F401
    except ImportError:
        raise UserError(
            "Weights & Biases is wanted (--enable_wandb, --wandb_project or --wandb_name) but the package wandb is not "
            "installed; run `pip install wandb` or pass --enable_wandb False"
        ) from None
    offline = options.offline or os.environ.get("WANDB_MODE") in ("offline", "disabled")
    if not offline and not _has_wandb_key():
        raise UserError(
            "Weights & Biases is wanted but no API key was found in WANDB_API_KEY or ~/.netrc; set WANDB_API_KEY, "
            "or pass --wandb_offline True or --enable_wandb False"
        )


class WandbSink:
    """A W&B run with the id that the original's trainer gives it, so that a resumed run continues it."""

    def __init__(self, results_dir: Path, options: WandbOptions) -> None:
        check_wandb(options)
        import wandb

        mode = "offline" if options.offline else os.environ.get("WANDB_MODE", "online")
        try:
            self.run = wandb.init(
                project=options.project,
                name=options.name,
                id=f"{options.name}-run{options.run_id}",
                resume=options.resume,
                mode=mode,
                dir=str(results_dir),
                config=dict(options.config),
            )
        except wandb.Error as fault:
            raise UserError(
                f"Weights & Biases could not start project {options.project!r}: {fault}; check the key and the "
                "network, or pass --wandb_offline True or --enable_wandb False"
            ) from None
        # wandb's own step counter can't go back, as a resumed run does.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({"step": step, **values})

    def show(self, step: int, shown: Sequence[Shown]) -> None:
        import wandb

        media: dict[str, Any] = {}
        for one in shown:
            media |= {name: wandb.Image(image, caption=one.text) for name, image in one.named_images()}
            if not one.images:
                media[one.name] = wandb.Html(f"<pre>{html.escape(one.text)}</pre>")
        self.run.log({"step": step, **media})

    def close(self) -> None:
        self.run.finish()
