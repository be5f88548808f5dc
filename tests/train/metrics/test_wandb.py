"""Weights & Biases: imported only if wanted, checked before anything is loaded, continued by a resumed run."""

from __future__ import annotations

import sys
import types
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bagel_ds.errors import UserError
from bagel_ds.train.metrics.log import MetricsLog
from bagel_ds.train.metrics.shown import Shown
from bagel_ds.train.metrics.wandb import WandbOptions, check_wandb


class FakeWandb(types.ModuleType):
    """Stands in for the package: records what it is asked."""

    class Error(Exception):
        pass

    def __init__(self, fault: str | None = None) -> None:
        super().__init__("wandb")
        self.fault = fault
        self.arguments: dict[str, Any] = {}
        self.logged: list[dict[str, Any]] = []
        self.metrics: list[tuple[str, str | None]] = []
        self.finished = False

    def init(self, **arguments: Any) -> FakeWandb:
        if self.fault is not None:
            raise self.Error(self.fault)
        self.arguments = arguments
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True

    def Image(self, image: Any, caption: str) -> tuple[str, Any, str]:
        return "image", image.size, caption

    def Html(self, text: str) -> tuple[str, str]:
        return "html", text


@pytest.fixture
def no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder without a netrc file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_wandb_is_not_imported_unless_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # any import of it now raises
    with closing(MetricsLog(tmp_path, 0)) as metrics:
        metrics.log(0, {"loss/mse": 0.5})


def test_wandb_wanted_but_not_installed_is_one_message(no_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"not installed.*pip install wandb.*--enable_wandb False"):
        check_wandb(WandbOptions())


def test_wandb_without_a_key_is_one_message_and_offline_needs_none(
    no_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
    with pytest.raises(UserError, match=r"no API key.*WANDB_API_KEY.*--wandb_offline True"):
        MetricsLog(no_home / "results", 0, WandbOptions())
    check_wandb(WandbOptions(offline=True))


@pytest.mark.parametrize("where", ["environment", "netrc", "own server"])
def test_a_wandb_key_is_found_where_wandb_finds_it(where: str, no_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
    if where == "environment":
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    else:
        host = "api.wandb.ai" if where == "netrc" else "wandb.example.org"
        (no_home / ".netrc").write_text(f"machine {host} login user password {'x' * 40}\n")
        (no_home / ".netrc").chmod(0o600)
        if where == "own server":
            with pytest.raises(UserError):
                check_wandb(WandbOptions())
            monkeypatch.setenv("WANDB_BASE_URL", f"https://{host}:8443")
    check_wandb(WandbOptions())


def test_wandb_gets_the_originals_id_and_every_step_even_after_going_back(
    no_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    options = WandbOptions("bagel", "blockmoving", "2", "allow", offline=True, config={"lr": 1e-5})
    with closing(MetricsLog(no_home, 0, options)) as metrics:
        metrics.log(5, {"loss/mse": 0.5, "loss/ce": None})
        metrics.log(3, {"loss/mse": 0.4})
    assert fake.arguments == {
        "project": "bagel",
        "name": "blockmoving",
        "id": "blockmoving-run2",
        "resume": "allow",
        "mode": "offline",
        "dir": str(no_home),
        "config": {"lr": 1e-5},
    }
    assert fake.logged == [{"step": 5, "loss/mse": 0.5}, {"step": 3, "loss/mse": 0.4}]
    assert ("*", "step") in fake.metrics and fake.finished


def test_wandb_refusing_to_start_is_one_message(no_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(fault="project is archived"))
    with pytest.raises(UserError, match=r"could not start project 'bagel': project is archived"):
        MetricsLog(no_home, 0, WandbOptions(offline=True))


def test_pictures_and_texts_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    shown = [Shown("samples/model/0", "a cat", [Image.new("RGB", (6, 4))]), Shown("samples/model/1", "1 < 2?")]
    with closing(MetricsLog(tmp_path, 0, WandbOptions(offline=True))) as metrics:
        metrics.show(7, shown)
    assert fake.logged == [
        {
            "step": 7,
            "samples/model/0": ("image", (6, 4), "a cat"),
            "samples/model/1": ("html", "<pre>1 &lt; 2?</pre>"),
        }
    ]
