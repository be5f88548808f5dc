"""Users without a home folder, without a name, or whose folders can't be written."""

from __future__ import annotations

import getpass
import os
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bagel_ds.errors import UserError
from bagel_ds.machine import user_folders
from bagel_ds.machine.user_folders import cache_folder, extensions_folder, replacement, settle_user_folders, write_fault

REPOSITORY = Path(__file__).parents[2]
VARIABLES = """HOME LOGNAME USER LNAME USERNAME XDG_CACHE_HOME TORCH_EXTENSIONS_DIR TRITON_HOME TRITON_CACHE_DIR
    HF_HOME""".split()
UNKNOWN_USER = 54321


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty environment of a known user, whose temporary files go to a folder of their own."""
    before = dict(os.environ)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    yield tmp_path / "tmp"
    for name in VARIABLES:
        os.environ.pop(name, None)
    os.environ.update({name: before[name] for name in VARIABLES if name in before})


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """This user has no entry in the passwd file."""

    def unknown(number: int) -> object:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)


def refuse(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    """As if nothing could be written to these or below them: tests may run as root, who can."""
    real = user_folders.write_fault

    def fault(folder: Path) -> str | None:
        return "Permission denied" if any(folder.is_relative_to(one) for one in folders) else real(folder)

    monkeypatch.setattr(user_folders, "write_fault", fault)


def test_what_works_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LOGNAME", "someone")
    before = dict(os.environ)
    assert settle_user_folders() == [] and dict(os.environ) == before
    assert cache_folder() == tmp_path / ".cache" and extensions_folder() == tmp_path / ".cache" / "torch_extensions"
    assert sorted(tmp_path.iterdir()) == [temporary], "nothing is made where nothing is needed"


def test_a_user_without_a_home_and_a_name_gets_both(nobody: None, temporary: Path) -> None:
    with pytest.raises((KeyError, OSError)):
        getpass.getuser()
    with pytest.raises(RuntimeError):
        Path.home()
    (note,) = settle_user_folders()
    expected = temporary / f"bagel_ds-{os.getuid()}"
    assert "no home folder is known" in note and str(expected) in note
    assert Path.home() == expected and expected.is_dir() and cache_folder() == expected / ".cache"
    assert getpass.getuser() == f"user{os.getuid()}"
    assert settle_user_folders() == [], "said once"


@pytest.mark.parametrize("home", ["", "gone"])
def test_a_home_that_is_empty_or_not_there_is_replaced(
    home: str, nobody: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / home) if home else "")
    (note,) = settle_user_folders()
    assert Path.home().parent == temporary and ("does not exist" in note) == bool(home)


def test_a_home_that_can_only_be_read_keeps_its_files_and_loses_its_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    home = tmp_path / "home"
    (home / ".cache" / "huggingface").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    refuse(monkeypatch, home)
    (note,) = settle_user_folders()
    assert Path.home() == home, "netrc and keys are read from there"
    assert os.environ["HF_HOME"] == str(home / ".cache" / "huggingface"), "and models"
    assert cache_folder().is_relative_to(temporary) and extensions_folder().is_relative_to(temporary)
    assert Path(os.environ["TRITON_HOME"]).is_relative_to(temporary)
    for word in (str(home / ".cache"), str(home / ".triton"), "Permission denied", str(replacement())):
        assert word in note
    assert settle_user_folders() == []


def test_one_folder_that_another_user_has_made_is_replaced_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    refuse(monkeypatch, tmp_path / ".cache" / "torch_extensions")
    (note,) = settle_user_folders()
    assert cache_folder() == tmp_path / ".cache" and extensions_folder() == replacement() / "torch_extensions"
    assert "torch_extensions can't be written" in note


def test_folders_that_the_user_has_named_count_and_not_the_usual_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    for name in ("XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    refuse(monkeypatch, tmp_path / "home")
    assert settle_user_folders() == []
    assert extensions_folder() == tmp_path / "TORCH_EXTENSIONS_DIR"


def test_a_cache_that_is_a_link_to_nowhere_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    (tmp_path / ".cache").symlink_to(tmp_path / "scratch" / "gone")
    monkeypatch.setenv("HOME", str(tmp_path))
    settle_user_folders()
    assert cache_folder().is_relative_to(temporary)


def test_a_file_in_the_place_of_a_folder_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert write_fault(tmp_path / "file") and write_fault(tmp_path / "file" / "below")
    assert write_fault(tmp_path / "new" / "folder") is None and not (tmp_path / "new").exists()


def test_a_disk_without_room_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None: ...

        def write(self, content: bytes) -> None:
            raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: Full())
    assert write_fault(tmp_path) == "Disk quota exceeded"


def test_a_replacement_belongs_to_this_user_alone(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled code is loaded from it: another user who was there first must not choose what is run."""
    first = temporary / f"bagel_ds-{os.getuid()}"
    first.mkdir(mode=0o700)
    assert replacement() == first
    second = temporary / f"bagel_ds-{os.getuid()}-1"
    first.chmod(0o777)
    assert replacement() == second == replacement() and stat.S_IMODE(second.stat().st_mode) == 0o700
    first.rmdir()
    first.symlink_to(tmp_path)
    assert replacement() == second
    second.rmdir()
    second.mkdir()
    real = Path.lstat

    def of_another(path: Path) -> os.stat_result:
        found = list(real(path))
        found[4] += path == second
        return os.stat_result(found)

    monkeypatch.setattr(Path, "lstat", of_another)
    assert replacement() == temporary / f"bagel_ds-{os.getuid()}-2"


def test_without_any_folder_one_is_asked_for(nobody: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set HOME or TMPDIR to a folder that you can write to"):
        settle_user_folders()


# Imports all that a run imports, then asks each library where it would write.
PROBE = """
import os
from bagel_ds.machine.user_folders import settle_user_folders
print(*settle_user_folders(), sep="\\n")
import deepspeed, torch, torch.utils.cpp_extension, torch.utils.tensorboard, transformers
from torch._inductor.runtime.cache_dir_utils import cache_dir
folder = torch.utils.cpp_extension._get_build_directory("probe", False)
open(os.path.join(folder, "lock"), "w").close()
os.makedirs(cache_dir(), exist_ok=True)
print("built in", folder)
"""


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("setpriv") is None, reason="takes root to be another user")
@pytest.mark.parametrize("home", [None, "/", "/nowhere"])
def test_an_unknown_user_without_a_usable_home_can_compile(home: str | None) -> None:
    """As in a container that was started with --user: torch, DeepSpeed and their caches, in a process of that user."""
    rights = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]  # this Python may lie in /root
    user = ["setpriv", "--reuid", str(UNKNOWN_USER), "--regid", str(UNKNOWN_USER), "--clear-groups", *rights]
    given = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    given |= {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o1777)
        environment = {**given, "TMPDIR": folder} | ({} if home is None else {"HOME": home})
        command = [*user, sys.executable, "-c", PROBE]
        ran = subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300, check=False
        )
        assert ran.returncode == 0, ran.stderr[-4000:]
        place = f"{folder}/bagel_ds-{UNKNOWN_USER}"
        assert place in ran.stdout.splitlines()[0]
        assert f"built in {place}" in ran.stdout
        assert "~" not in os.listdir(folder), "a folder that is called ~"


def test_an_index_is_kept_without_a_home(nobody: None, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nobody has settled the folders, and the data lie where nothing can be written."""
    from bagel_ds.data.index import cache

    found = cache.cache_folder("s3://bucket/rows.parquet", None)
    assert found is not None and found.is_relative_to(temporary) and found.is_dir()
