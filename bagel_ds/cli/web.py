"""`bagel-ds web`: the page on a model folder."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from bagel_ds.cli.generate import add_model_options
from bagel_ds.cli.option_values import port
from bagel_ds.machine.output import log_to_stderr

logger = logging.getLogger("bagel_ds")


def add_command(commands: Any) -> None:
    """Add it to the subcommands of `bagel-ds`."""
    web = commands.add_parser("web", help="serve a page that draws, edits, answers and reasons with a model folder")
    web.add_argument("--model_path", type=Path, required=True, help="BAGEL-7B-MoT, a checkpoint, or an export")
    web.add_argument("--host", default="127.0.0.1", help="address to serve at (default: this machine only)")
    web.add_argument("--port", type=port, default=7860, help="0: any that is free (default 7860)")
    add_model_options(web)
    web.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Serve until interrupted. Raises `UserError`."""
    log_to_stderr()
    from bagel_ds.web.models import Models
    from bagel_ds.web.server import Server
    from bagel_ds.web.work import Work

    models = Models(
        options.model_path,
        options.weights,
        device=options.device,
        precision=options.precision,
        max_gpu_memory=options.max_gpu_memory,
        lora=options.lora,
        attn=options.attn,
    )
    with Server(Work(models), options.host, options.port) as server:
        if not server.loopback:
            logger.warning("anyone who can reach %s can use this page: it has no password", options.host)
        print(f"Open {server.address} (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0
