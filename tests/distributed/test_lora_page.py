"""docs/lora.md as a newcomer walks it: its commands in their order, from a folder of pictures to a drawn picture."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from bagel_ds.cli.main import main
from tests.code_blocks import code_blocks
from tests.launch import REPOSITORY, TRAIN, deepspeed

pytestmark = pytest.mark.distributed

PAGE = REPOSITORY / "docs" / "lora.md"
STEPS = 24
# The demo's network in the place of the 7B: smaller packs, fewer steps, and the learning rate that its width takes.
SMALLER = {
    "--max_num_tokens 11520": "--max_num_tokens 448 --max_num_tokens_per_sample 448 --expected_num_tokens 448",
    "--total_steps 2000 --warmup_steps 50": f"--total_steps {STEPS} --warmup_steps 2",
    "--save_every 500": f"--save_every {STEPS // 2}",
    "cats/": "results/",
    "ink/": "results_4bit/",
    "--out drawn": "--out drawn --image_shapes 32 32 --num_timesteps 4",
    "--lr 1e-4": "--lr 3e-3 --ema 0.9 --num_workers 0",
    "step_1000": f"step_{STEPS // 2}",
    "step_2000": f"step_{STEPS}",
    "val.yaml": "data/mine.yaml --val_max_batches 4 --json",
    '--prompt "..."': '--prompt "a red disc" --image_shapes 32 32 --num_timesteps 4',
}
RUNS = ("results", "results_4bit")  # of the page's two training commands, the second beside a base of 4 bits
COLORS = ("red", "green", "blue", "yellow", "black", "white")


def commands() -> list[list[str]]:
    """The words of every command in the page's blocks, in order."""
    found = []
    for line in (line for block in code_blocks(PAGE, "bash") for line in block):
        if line and not line.startswith("#"):
            for long, short in SMALLER.items():
                line = line.replace(long, short)
            found.append(shlex.split(line))
    return found


def draw_pictures(folder: Path) -> None:
    """30 pictures with a caption beside each."""
    folder.mkdir()
    for number in range(30):
        color = COLORS[number % len(COLORS)]
        picture = Image.new("RGB", (64, 64), "gray")
        ImageDraw.Draw(picture).ellipse((8 + number % 5, 8, 50, 50 + number % 7), fill=color)
        picture.save(folder / f"disc{number}.png")
        (folder / f"disc{number}.txt").write_text(f"a {color} disc")


@pytest.fixture
def home(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the page's commands are typed, with the paths that they name."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "BAGEL-7B-MoT").symlink_to(demo / "model")
    draw_pictures(tmp_path / "pictures")
    (prompts,) = code_blocks(PAGE, "json")
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_pages_commands_lead_from_pictures_to_an_adapter_that_learned_and_draws(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = 0
    for command, *words in commands():
        capsys.readouterr()
        if command == "deepspeed":
            script = words.index("launch/train.py")
            assert words[:script] == ["--num_gpus", "1"]
            # The launcher is started elsewhere, so the folders that the page names get their whole paths.
            arguments = [
                str(home / word) if word.startswith(("hf/", "data/")) else word for word in words[script + 1 :]
            ]
            results = home / RUNS[runs]
            own = ["--results_dir", results, "--checkpoint_dir", results / "checkpoints"]
            finished = deepspeed(TRAIN, [*arguments, *own], ranks=1)
            runs += 1
            assert finished.code == 0 and f"done: {STEPS} steps" in finished.output, finished.output[-4000:]
        else:
            assert command == "bagel-ds" and main(words) == 0, (words, capsys.readouterr().err)
            if words[0] == "convert":  # the demo's network takes smaller pictures
                config = Path("data", "mine.yaml")
                config.write_text(config.read_text().replace("1024", "64").replace("512", "32"))
    assert runs == len(RUNS)
    with Image.open("out.png") as picture:
        assert picture.size == (32, 32)
    drawn = [np.array(Image.open(Path("drawn", f"{number:06d}.png"))).astype(int) for number in range(5)]
    apart = [int(np.abs(picture - drawn[0]).max()) for picture in drawn[1:]]
    assert apart[1] <= 1 < min(apart[0], *apart[2:]), "the third line asks for what the first gets"
    for folder in "merged", "served":
        assert Path(folder, "config.json").is_file()

    capsys.readouterr()
    folders = ["hf/BAGEL-7B-MoT", *(f"{run}/checkpoints/step_{STEPS}" for run in RUNS)]
    assert main(["evaluate", *folders, "--val_config", "data/mine.yaml", "--val_max_batches", "8", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["results"]
    mse = {(row["checkpoint"], row["weights"]): row["scores"]["val/mse"] for row in rows}
    base = min(value for (folder, _), value in mse.items() if folder == folders[0])
    for folder in folders[1:]:
        assert max(mse[folder, "model"], mse[folder, "ema"]) < 0.97 * base, mse
