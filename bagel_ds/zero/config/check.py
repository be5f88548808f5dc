"""Have DeepSpeed itself check a configuration: the keys of a file, and the resolved configuration as a whole.

Guarantees: what DeepSpeed would ignore or refuse is one `UserError` before anything is loaded. deepspeed is imported
when a check needs it, which takes seconds.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import sys
from contextlib import redirect_stdout
from typing import Any

from bagel_ds.errors import UserError
from bagel_ds.zero.config.files import ds_configs_folder, find_ds_config, read_ds_config


def check_file(name_or_path: str) -> None:
    """Raise UserError with every key of the file that DeepSpeed doesn't know, or whose value it can't read."""
    from bagel_ds.zero.config.known_keys import check_keys

    check_keys(read_ds_config(find_ds_config(name_or_path)))


def check_file_if_possible(name_or_path: str) -> str | None:
    """`check_file` for commands that work without DeepSpeed; a remark if the file could not be checked.

    Presets are known to be right, so only a user's own file costs the seconds of importing deepspeed.
    """
    path = find_ds_config(name_or_path)
    if path.parent.resolve() == ds_configs_folder().resolve():
        return None
    if importlib.util.find_spec("deepspeed") is None:
        return f"the keys of {path} are not checked, as deepspeed is not installed: DeepSpeed ignores misspelled ones"
    if "deepspeed" not in sys.modules:
        with redirect_stdout(io.StringIO()):  # it logs to stdout, which belongs to the command's result
            import deepspeed  # noqa: F401
        logging.getLogger("DeepSpeed").handlers[:] = [logging.lastResort]  # type: ignore[list-item]
    check_file(name_or_path)
    return None


def check_resolved(ds: dict[str, Any]) -> None:
    """Have DeepSpeed read a resolved configuration, for faults that concern several keys together."""
    from deepspeed.runtime.config import DeepSpeedConfigError, _reject_removed_config_keys
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        _reject_removed_config_keys(ds)
        DeepSpeedZeroConfig(**ds.get("zero_optimization", {}))
    except (ValueError, AssertionError, DeepSpeedConfigError) as fault:
        raise UserError(f"ds_config: DeepSpeed refuses it: {fault}") from None
