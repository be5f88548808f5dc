"""`bagel-ds generate`: pictures and answers from a model folder, one prompt or a file of them."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from bagel_ds.cli.option_values import at_least_one, not_negative
from bagel_ds.errors import UserError
from bagel_ds.inference.settings import MODES, RENORM_TYPES, Settings
from bagel_ds.machine.output import log_to_stderr
from bagel_ds.model.attention.backends import CHOICES


def add_command(commands: Any) -> None:
    """Add it to the subcommands of `bagel-ds`."""
    generate = commands.add_parser(
        "generate",
        help="draw, edit and answer with a model folder, a checkpoint or an export",
        epilog="Defaults of the settings depend on the mode and are the original's (docs/inference.md).",
    )
    add_options(generate)
    generate.set_defaults(run=run)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `bagel-ds generate` and launch/generate.py."""
    add = parser.add_argument
    add("--model_path", type=Path, required=True, help="BAGEL-7B-MoT, a checkpoint such as step_1000, or an export")
    add("--prompt", default=None, help="what to draw, change or answer")
    add("--prompts", type=Path, default=None, help="JSONL or parquet, a prompt per line with its own settings")
    add("--image", type=Path, action="append", default=None, help="picture to read; may be given several times")
    add("--mode", choices=MODES, default=None, help="default: edit where there is an image, else t2i")
    add("--think", action="store_true", help="write a thought first")
    add("--out", type=Path, default=None, help="PNG or text to write (out.png); with --prompts a folder (out)")
    add("--seed", type=not_negative, default=0, help="same seed, same picture (default 0)")
    add("--image_shapes", type=at_least_one, nargs=2, metavar=("H", "W"), default=None, help="size in pixels")
    add("--num_timesteps", type=at_least_one, default=None, help="points of the schedule, one more than its steps")
    add("--timestep_shift", type=float, default=None, help="more steps near the noise for a shift above 1")
    add("--cfg_text_scale", type=float, default=None, help="guidance by the text; 1 or less switches it off")
    add("--cfg_img_scale", type=float, default=None, help="guidance by the image; 1 or less switches it off")
    add(
        "--cfg_interval",
        type=float,
        nargs=2,
        metavar=("LO", "HI"),
        default=None,
        help="guide only at flow times from LO to HI; 1 is noise, 0 the picture",
    )
    add("--cfg_renorm_min", type=float, default=None, help="smallest factor of renormalization, 0 to 1")
    add("--cfg_renorm_type", choices=RENORM_TYPES, default=None, help="what renormalization measures")
    add("--enable_taylorseer", action="store_true", default=None, help="extrapolate two steps of three")
    add("--max_think_token_n", type=at_least_one, default=None, help="longest thought or answer, in tokens")
    add("--do_sample", action="store_true", default=None, help="draw the tokens of a text instead of the likeliest")
    add("--text_temperature", type=float, default=None, help="of --do_sample")
    add("--max_iterations", type=at_least_one, default=None, help="texts and images of interleaved reasoning")
    add(
        "--layout",
        choices=("plain", "geneval", "wise"),
        default="plain",
        help="read the prompt file of GenEval or WISE and write the folders that its scorer expects",
    )
    add("--batch_size", type=at_least_one, default=4, help="prompts of a file at a time (default 4)")
    add_model_options(parser)
    add("--local_rank", type=int, default=None, help=argparse.SUPPRESS)  # the deepspeed launcher passes it


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """How the model is loaded."""
    add = parser.add_argument
    add("--device", default=None, help="cpu, cuda or cuda:N (default: the launcher's GPU, or the first)")
    add("--precision", choices=("bf16", "fp32"), default=None, help="default bf16 on a GPU, fp32 on a CPU")
    add(
        "--weights",
        choices=("ema", "model"),
        default=None,
        help="ema.safetensors or model.safetensors; default: the EMA, unless it is too young for the run",
    )
    add(
        "--lora",
        action="append",
        default=[],
        metavar="[NAME=]FOLDER[:WEIGHT]",
        help="adapter of the model, by default named as its folder and of weight 1; may be given several times: all "
        "are added where a request does not choose (docs/lora.md)",
    )
    add("--max_gpu_memory", default=None, metavar="SIZE", help="such as 24GiB: layers beyond it stay in host memory")
    add("--attn", choices=CHOICES, default="auto", help="attention kernels; the result is the same (default auto)")


def run(options: argparse.Namespace) -> int:
    """Generate; the exit code. Raises `UserError`."""
    log_to_stderr()
    if (options.prompts is None) == (options.prompt is None and options.image is None):
        raise UserError("pass --prompt (and --image), or --prompts FILE")
    settings = {name: getattr(options, name) for name in Settings.__dataclass_fields__}
    common = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    common = {name: value for name, value in common.items() if value is not None}
    Settings().changed(common)  # before minutes of loading
    common |= {"think": options.think} if options.think else {}
    common |= {"mode": options.mode} if options.mode else {}
    return _file(options, common) if options.prompts is not None else _one(options, common)


def _one(options: argparse.Namespace, common: dict[str, Any]) -> int:
    from tqdm import tqdm

    from bagel_ds.inference.jobs import write_image
    from bagel_ds.inference.pictures import opened

    images = [opened(path) for path in options.image or []]
    _writable(options.out)
    inferencer = _opened(options)
    mode = common.pop("mode", None)
    request = inferencer.request(options.prompt or "", images or None, mode, seed=options.seed, **common)
    inferencer.check([request])
    with tqdm(total=None, desc="drawing", unit="step", disable=None) as bar:

        def on_step(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        items = inferencer.items(request, mode, on_step)
    out = options.out or Path("out.png")
    pictures = [item for item in items if not isinstance(item, str)]
    for number, item in enumerate(items):
        if isinstance(item, str) and not pictures and options.out is not None:
            out.write_text(item + "\n", encoding="utf-8")
            print(f"wrote {out}", file=sys.stderr)
        elif isinstance(item, str):
            print(item)
        else:
            path = out if len(pictures) == 1 else out.with_name(f"{out.stem}_{number}.png")
            print(f"wrote {write_image(path, item)}", file=sys.stderr)
    return 0


def _file(options: argparse.Namespace, common: dict[str, Any]) -> int:
    from tqdm import tqdm

    from bagel_ds.inference.jobs import LAYOUTS, run_jobs

    if options.image:
        raise UserError("--image goes with --prompt; in a file of prompts each line names its own image")
    faults: list[str] = []
    jobs = LAYOUTS[options.layout](options.prompts, common, options.seed, faults)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    faults = faults if rank == 0 else []
    out = options.out or Path("out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} can't be a folder ({error.strerror}); pass another") from None
    own = jobs[rank::world]
    inferencer = _opened(options)
    with tqdm(total=len(own), unit="result", disable=None if rank == 0 else True) as bar:
        made, there = run_jobs(inferencer, own, out, options.batch_size, faults, bar.update)
    print(f"{made} made, {there} there already, {len(own) - made - there} left out: {out}", file=sys.stderr)
    for fault in faults:
        print(f"bagel-ds: {fault}", file=sys.stderr)
    return 2 if faults else 0


def _opened(options: argparse.Namespace) -> Any:
    from bagel_ds.inference.loading import open_inferencer
    from bagel_ds.machine.device import device_type

    local = os.environ.get("LOCAL_RANK", options.local_rank)
    device = options.device
    if device is None and local is not None and device_type() == "cuda":
        device = f"cuda:{local}"
    return open_inferencer(
        options.model_path,
        device,
        options.precision,
        options.weights,
        options.max_gpu_memory,
        options.lora,
        options.attn,
    )


def _writable(out: Path | None) -> None:
    folder = (out or Path("out.png")).parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"--out {out}: {folder} is not a folder that can be written; pass another")
    if out is not None and out.is_dir():
        raise UserError(f"--out {out} is a folder; pass a file name such as {out / 'out.png'}")
