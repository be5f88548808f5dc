"""The Dockerfile copies files that exist and suffice to install the package, and its lines run in a fresh Debian.

The soak test applies them one by one to a root file system, with chroot in Docker's place: three minutes on an idle
machine. Not shown, because it takes the base image and a GPU: that Ubuntu's packages have the names of Debian's, and
that the CUDA build of torch suits the base image and the host's driver. Where pip finds no CPU build of torch
(PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL), the test downloads 3 GB of CUDA's libraries.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Iterator

import pytest

from tests.image import REPOSITORY, Image, instructions, missing

LINES = instructions()

# One step with the optimizer in host memory, which compiles DeepSpeed's CPU Adam at the place that the image says.
TRAINING = """
  bagel-ds demo --out demo && deepspeed --num_gpus 1 /opt/bagel_ds/launch/train.py --ds_config zero3_cpu
  --dataset_config_file demo/example.yaml --model_path demo/model --finetune_from_hf True --results_dir results
  --checkpoint_dir results/checkpoints --total_steps 1 --num_workers 0 --expected_num_tokens 448 --max_num_tokens 448
  --max_num_tokens_per_sample 448
"""


def copied() -> list[str]:
    """Every file and folder that a COPY line takes from the repository."""
    return [name for word, rest in LINES if word == "COPY" for name in rest.split()[:-1]]


def test_what_is_copied_exists_and_is_sent_to_the_builder() -> None:
    names = copied()
    assert len(names) >= 8 and all((REPOSITORY / name).exists() for name in names)
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert ignored[0] == "*" and {line[1:] for line in ignored if line.startswith("!")} == set(names)


def test_run_lines_use_files_copied_before_and_extras_and_packages_that_exist() -> None:
    there: set[str] = set()
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    runs = 0
    for word, rest in LINES:
        if word == "COPY":
            there |= set(rest.split()[:-1])
        elif word == "RUN":
            runs += 1
            assert set(re.findall(r"\b[\w/]+\.(?:txt|toml|py|sh)\b", rest)) <= there, rest
            named = re.search(r"\.\[([\w,]+)\]", rest)
            if named:
                assert set(named[1].split(",")) <= set(extras) and {"pyproject.toml", "bagel_ds", "README.md"} <= there
    assert runs >= 4
    # What the Makefile asks of a machine, and what starts other hosts.
    (apt,) = (rest for word, rest in LINES if word == "RUN" and "apt-get install" in rest)
    assert {"g++", "python3", "python3-dev", "python3-venv", "pdsh", "openssh-client"} <= set(apt.split())
    assert re.search(r"^torch==", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)


def test_the_package_builds_from_what_is_copied(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in copied():
        origin = REPOSITORY / name
        (shutil.copytree if origin.is_dir() else shutil.copy)(origin, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    ran = subprocess.run([*pip, str(source)], capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert len(list(tmp_path.glob("bagel_ds-*.whl"))) == 1


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Image]:
    """A root file system with every instruction after FROM applied; 3 GB, removed after the test."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    image = Image(tmp_path / "root")
    try:
        reason = image.bootstrap()
        if reason:
            pytest.skip(reason)
        for instruction in LINES[[word for word, _ in LINES].index("FROM") + 1 :]:
            image.apply(instruction)
        yield image
    finally:
        shutil.rmtree(image.root)


@pytest.mark.soak
def test_the_lines_run_in_an_empty_root_file_system_and_what_they_make_trains(image: Image) -> None:
    assert image.folder == "/work", "where the header's command mounts the user's folder"
    commands = re.findall(r"^    ([a-z]+)\s", image.run("bagel-ds --help", timeout=300), re.MULTILINE)
    assert len(commands) > 10
    image.run(" && ".join(f"bagel-ds {command} --help" for command in commands), timeout=300)
    assert "ready" in image.run("bagel-ds doctor --no_speed", timeout=600)
    log = image.run(" ".join(TRAINING.split()), timeout=1200)
    assert "done: 1 steps" in log and "compiling DeepSpeed's cpu_adam" in log, log[-3000:]
    assert (image.root / "work/results/checkpoints/step_1/model.safetensors").is_file()
    assert list((image.root / "opt/torch_extensions").rglob("cpu_adam.so"))
