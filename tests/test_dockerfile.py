"""The Dockerfile copies files that exist and suffice to install the package, and runs commands with names that exist.

The image itself is not built: that takes Docker and gigabytes of downloads.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
TEXT = re.sub(r"^#.*\n", "", (REPOSITORY / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
LINES = [line.split(maxsplit=1) for line in TEXT.splitlines() if line.strip()]


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
