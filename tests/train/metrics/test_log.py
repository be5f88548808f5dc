"""metrics.jsonl and TensorBoard hold every logged step, also after a resume, a kill or a full disk."""

from __future__ import annotations

import io
import json
import logging
import math
import types
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.summary.writer import event_file_writer

from bagel_ds.train.metrics.console import setup_logging
from bagel_ds.train.metrics.log import MetricsLog
from bagel_ds.train.metrics.shown import Shown
from tests.train.metrics.metric_names import METRIC_NAMES, METRIC_PREFIXES


def json_lines(folder: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) that TensorBoard would draw."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_the_time_left_is_said_last_and_only_while_steps_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first logged step, which is slow, counts only until there is another one."""
    setup_logging(tmp_path, rank=0)
    now = iter([100.0, 100.0, 110.0, 130.0, 140.0])
    with closing(MetricsLog(tmp_path, 40, total_steps=1040)) as metrics:
        monkeypatch.setattr("bagel_ds.train.metrics.log.time", types.SimpleNamespace(monotonic=lambda: next(now)))
        next(now)
        for step in (40, 50, 60, 1039):
            metrics.log(step, {"loss/ce": 1.0, "perf/step_seconds": 60.0 if step == 40 else 1.0})
    lines = [line.split("] ")[1] for line in (tmp_path / "log.txt").read_text().splitlines()]
    original = [f"(step={step:07d}) Train Loss ce: 1.0000, Train Steps/Sec: " for step in (40, 50, 60, 1039)]
    expected = ["0.02, ETA: 16h39m, ", "1.00, ETA: 16m, ", "1.00, ETA: 24m, ", "1.00, "]
    assert lines == [line + rest for line, rest in zip(original, expected, strict=True)]


def test_without_an_end_there_is_no_time_left(tmp_path: Path) -> None:
    setup_logging(tmp_path, rank=0)
    with closing(MetricsLog(tmp_path, 0)) as metrics:
        metrics.log(0, {"loss/ce": 1.0, "perf/step_seconds": 1.0})
    with closing(MetricsLog(tmp_path, 0, total_steps=9)) as metrics:
        metrics.log(0, {"loss/ce": 1.0})
    assert "ETA" not in (tmp_path / "log.txt").read_text()


def test_json_lines_and_tensorboard_hold_the_same_numbers_under_the_contracted_names(tmp_path: Path) -> None:
    names = [*METRIC_NAMES, *(prefix + "seedxedit_multi" for prefix in METRIC_PREFIXES)]
    logged = [{name: step + position / 64 for position, name in enumerate(names)} for step in range(3)]
    with closing(MetricsLog(tmp_path, 0)) as metrics:
        for step, values in enumerate(logged):
            metrics.log(step, dict(values))
    assert json_lines(tmp_path) == [{"step": step, **values} for step, values in enumerate(logged)]
    for name in names:
        assert scalars(tmp_path, name) == [(step, values[name]) for step, values in enumerate(logged)]


def test_each_line_is_on_disk_before_the_next_step(tmp_path: Path) -> None:
    with closing(MetricsLog(tmp_path, 0)) as metrics:
        for step in range(3):
            metrics.log(step, {"loss/total": 1.0})
            assert [line["step"] for line in json_lines(tmp_path)] == list(range(step + 1))


def test_none_is_left_out_and_non_finite_numbers_are_null(tmp_path: Path) -> None:
    with closing(MetricsLog(tmp_path, 0)) as metrics:
        metrics.log(0, {"loss/mse": math.nan, "loss/ce": None, "loss/total": math.inf, "optim/grad_norm": -math.inf})
    assert json_lines(tmp_path) == [{"step": 0, "loss/mse": None, "loss/total": None, "optim/grad_norm": None}]
    ((step, value),) = scalars(tmp_path, "loss/mse")
    assert step == 0 and math.isnan(value)


def test_after_a_resume_both_continue_from_the_checkpoints_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Files of one second and process are read in the order of their numbers as text, where 10 comes before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    with closing(MetricsLog(tmp_path, 0)) as metrics:
        for step in range(6):
            metrics.log(step, {"loss/mse": 1.0})
    with closing(MetricsLog(tmp_path, 4)) as metrics:
        for step in range(4, 8):
            metrics.log(step, {"loss/mse": 2.0})
    assert [line["step"] for line in json_lines(tmp_path)] == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7]
    assert scalars(tmp_path, "loss/mse") == [(step, 1.0 if step < 4 else 2.0) for step in range(8)]


def test_half_a_line_of_a_killed_run_does_not_spoil_the_next(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss/mse": 1.0}\n{"step": 1, "loss/m')
    with closing(MetricsLog(tmp_path, 1)) as metrics:
        metrics.log(1, {"loss/mse": 2.0})
    assert json_lines(tmp_path) == [{"step": 0, "loss/mse": 1.0}, {"step": 1, "loss/mse": 2.0}]


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    metrics = MetricsLog(tmp_path, 0)
    metrics.close()
    metrics.close()


def test_a_full_disk_costs_numbers_told_once_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = MetricsLog(tmp_path, 0)
    with monkeypatch.context() as full:

        def refused(step: int, values: object) -> None:
            raise OSError(28, "No space left on device")

        full.setattr(log._sinks[0], "log", refused)
        logging.getLogger("bagel_ds").propagate = True
        with caplog.at_level(logging.WARNING, "bagel_ds"):
            log.log(0, {"loss/ce": 1.0})
            log.log(1, {"loss/ce": 1.0})
    assert caplog.text.count("No space left on device") == 1
    log.log(2, {"loss/ce": 1.0})
    log.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [2]


@pytest.mark.parametrize("rank", [0, 1])
def test_only_rank_0_shows_and_writes_metrics(rank: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(None, rank)
    with closing(MetricsLog(tmp_path if rank == 0 else None, 0)) as metrics:
        metrics.log(0, {"loss/mse": 0.5})
        metrics.advance()
    shown = capsys.readouterr()
    assert ("Train Loss mse: 0.5000" in shown.out) == (rank == 0) and shown.err == ""
    assert (tmp_path / "metrics.jsonl").exists() == (rank == 0)


def test_pictures_and_texts_are_shown_in_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = [
        Shown("samples/model/000000", "a red square", [Image.new("RGB", (6, 4), (255, 0, 0))]),
        Shown("samples/model/000001", "what?\n\nit is *red*"),
        Shown("samples/model/000002", "next?", [Image.new("RGB", (2, 2)), Image.new("RGB", (3, 3))]),
    ]
    with closing(MetricsLog(tmp_path, 0)) as metrics:
        metrics.show(4, shown)
        metrics.show(5, [])
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"images": 0, "tensors": 0})
    events.Reload()
    names = ["samples/model/000000", "samples/model/000002_0", "samples/model/000002_1"]
    assert sorted(events.Tags()["images"]) == names
    (image,) = events.Images(names[0])
    assert (image.step, image.width, image.height) == (4, 6, 4)
    pixels = Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB")
    assert pixels.getpixel((5, 3)) == (255, 0, 0)
    (text,) = events.Tensors("samples/model/000001/text_summary")
    assert text.tensor_proto.string_val[0].decode() == "    what?\n    \n    it is *red*", "verbatim, not as Markdown"
    assert json_lines(tmp_path) == []
