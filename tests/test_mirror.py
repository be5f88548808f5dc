"""Tests mirror the modules: bagel_ds/a/b.py is tested by tests/a/test_b.py, or COVERED_BY names where it is tested.

An entry of COVERED_BY is a module or a folder, with its tests and the reason why they aren't next to it in the mirror.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import bagel_ds

PACKAGE = Path(bagel_ds.__file__).parent
TESTS = Path(__file__).parent

COVERED_BY: dict[str, tuple[str, str]] = {
    "arguments/": ("arguments/test_run_config.py", "options, parsing and rules are tested as a user meets them"),
    "checkpoint/step_folders.py": ("train/saves/test_save.py", "a save makes the folders that are looked at"),
    "cli/option_values.py": ("cli/test_memory.py", "the commands' own options go through it"),
    "cli/web.py": ("web/test_web.py", "it does nothing but start the page"),
    "cli/run.py": ("distributed/test_stop.py", "stop needs a run; export is in checkpoint/test_export.py"),
    "cli/convert.py": ("convert/test_conversion.py", "its options are those of the conversion"),
    "convert/": ("convert/test_conversion.py", "one input leads through all of it"),
    "data/batches/batch_workers.py": ("data/batches/test_loader.py", "workers exist only below a loader"),
    "data/config/": ("data/config/test_dataset_config.py", "one YAML leads through all three files"),
    "data/files/": ("data/files/test_rows.py", "both serve `open_rows`; broken files are in test_damage.py"),
    "data/formats/": ("data/formats/test_formats.py", "the promises are the same for every format"),
    "data/index/": ("data/index/test_index.py", "parts of building one index; test_early_start.py has the background"),
    "data/inspect/": ("data/inspect/test_packs.py", "parts of the commands; test_check.py has the report"),
    "data/plan/": ("data/plan/test_planner.py", "the plan is their only user"),
    "data/samples/draws.py": ("data/batches/test_materialize.py", "draws show in the batches that they make"),
    "data/samples/": ("data/formats/test_formats.py", "plain records that a format fills"),
    "data/streams/": ("data/formats/test_formats.py", "opened and read by format; test_early_start.py has opening"),
    "demo/": ("demo/test_demo_folder.py", "tests are named for what the demo shows; others lie beside it"),
    "errors.py": ("doctor/test_environment.py", "one exception class, met in every test of bad input"),
    "cli/hub.py": ("hub/test_upload.py", "its commands are tested with what they do; downloads in test_archive.py"),
    "hub/card.py": ("hub/test_upload.py", "a card belongs to an upload"),
    "inference/": ("inference/test_recordings.py", "the recordings run through all of it"),
    "inputs/network.py": ("inputs/test_data.py", "the network and the data are opened together"),
    "machine/liveness.py": ("train/process/test_stall.py", "its only listener"),
    "memory/": ("memory/test_planner.py", "terms of one sum; test_measured.py compares them with launches"),
    "model/attention/backends.py": ("model/attention/test_choice.py", "a registry that the choice reads"),
    "model/attention/flash_package.py": ("model/attention/test_varlen.py", "a kernel under the decomposition"),
    "model/attention/flash_torch.py": ("model/attention/test_varlen.py", "likewise"),
    "model/attention/sdpa.py": ("model/attention/test_layout.py", "it follows the layout segment by segment"),
    "model/batch.py": ("data/batches/test_batch_file.py", "a record without behavior but `to`"),
    "model/embeddings.py": (
        "model/test_bagel.py",
        "run as one network, also in reference/test_forward.py",
    ),
    "model/mot.py": ("model/test_bagel.py", "as embeddings.py"),
    "model/pointwise/eager.py": ("model/test_layers.py", "the layers call it"),
    "model/pointwise/kernels.py": ("model/pointwise/test_fused.py", "a record of functions, and both of its kinds"),
    "model/vit.py": ("model/test_bagel.py", "as embeddings.py"),
    "model/shape/": ("model/test_bagel.py", "counted against the network that is built from it"),
    "model_folder/crc.py": ("model_folder/test_tensor_files.py", "its only user"),
    "processes/": ("processes/test_processes.py", "server, worker and pool work only together"),
    "train/build.py": ("distributed/test_weights.py", "needs a launch"),
    "train/evaluation.py": ("distributed/test_evaluation.py", "needs a launch"),
    "train/plan_log.py": ("distributed/test_launchers.py", "needs a launch"),
    "train/prepare.py": ("distributed/test_bad_input.py", "needs a launch"),
    "train/ranks/alarm.py": ("train/ranks/test_failure.py", "an alarm sounds when a rank fails"),
    "train/metrics/shown.py": ("train/metrics/test_log.py", "a record that a log shows"),
    "train/sampling.py": ("distributed/test_sampling.py", "needs a launch"),
    "train/trainer.py": ("distributed/test_resume.py", "needs a launch"),
    "units.py": ("memory/test_planner.py", "three constants"),
    "web/": ("web/test_web.py", "asked over HTTP and in a browser, as the page asks"),
    "zero/config/": ("zero/config/test_resolve.py", "resolving a configuration leads through all of it"),
    "zero/partitions.py": ("distributed/test_adam.py", "needs an engine under every stage"),
    "zero/process_group.py": ("train/ranks/test_process_group.py", "what it starts is seen by the ranks that join"),
    "zero/split/kernel.py": ("zero/split/test_update.py", "what it builds is what updates there"),
    "zero/split/optimizer.py": ("distributed/test_offload_equality.py", "needs an engine; also in test_nonfinite.py"),
    "zero/split/partitions.py": ("distributed/test_offload_equality.py", "needs an engine; also in test_adam.py"),
    "zero/split/zero2.py": ("distributed/test_offload_equality.py", "needs an engine; also in test_nonfinite.py"),
    "zero/split/zero3.py": ("distributed/test_offload_equality.py", "needs an engine; also in test_adam.py"),
    "zero/weights.py": ("distributed/test_weights.py", "needs an engine under every stage"),
}


def _modules() -> list[str]:
    found = (path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
    return sorted(name for name in found if not Path(name).name.startswith("__"))


def _mirror(module: str) -> Path:
    path = TESTS / module
    return path.with_name(f"test_{path.name}")


def _entry(module: str) -> str | None:
    """The entry of the module itself or of the folder that it lies in."""
    folder = f"{Path(module).parent.as_posix()}/"
    return next((name for name in (module, folder) if name in COVERED_BY), None)


@pytest.mark.parametrize("module", _modules())
def test_every_module_has_its_tests(module: str) -> None:
    assert _mirror(module).is_file() or _entry(module), (
        f"add {_mirror(module).relative_to(TESTS.parent)}, or say in COVERED_BY what tests it"
    )


@pytest.mark.parametrize("entry", COVERED_BY)
def test_every_entry_is_needed_and_names_tests_that_exist(entry: str) -> None:
    needs = [module for module in _modules() if not _mirror(module).is_file() and _entry(module) == entry]
    assert needs, f"{entry} has its own tests, or is gone"
    assert (TESTS / COVERED_BY[entry][0]).is_file()
