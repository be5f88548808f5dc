"""Only what is named is held back."""

from __future__ import annotations

import warnings

import pytest

from bagel_ds.train.process.quiet import quiet_start, quiet_warnings


def test_only_renamed_collectives_are_silenced() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_warnings()
        text = "`torch.distributed.reduce_scatter_tensor` is deprecated. Please use another."
        warnings.warn(text, FutureWarning, stacklevel=1)
        warnings.warn(text, UserWarning, stacklevel=1)
        warnings.warn("something else is deprecated", FutureWarning, stacklevel=1)
    assert [warning.category for warning in caught] == [UserWarning, FutureWarning]


def test_only_the_line_about_the_built_op_is_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    with quiet_start():
        print("DeepSpeed deepspeed.ops.comm.deepspeed_shm_comm_op built successfully")
        print("something worth knowing")
    assert capsys.readouterr().out == "something worth knowing\n"


def test_what_was_printed_before_an_error_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), quiet_start():
        print("about to fail")
        raise RuntimeError
    assert capsys.readouterr().out == "about to fail\n"
