"""What a user can ask for: names and defaults of the original's inference, validated. Needs no torch.

Source of the defaults: the original's app (t2i, edit) and its bare inferencer, BAGEL-Canvas' reasoner (interleave).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from bagel_ds.errors import UserError, all_faults

RENORM_TYPES = ("global", "channel", "text_channel")
MODES = ("t2i", "edit", "vqa", "think", "interleave")


@dataclass(frozen=True)
class Settings:
    """Options of one request. Scales of 1 or less switch their guidance off; image guidance needs text guidance."""

    cfg_text_scale: float = 3.0
    cfg_img_scale: float = 1.5
    cfg_interval: tuple[float, float] = (0.4, 1.0)  # guidance acts where lo < t <= hi, t the shifted flow time
    cfg_renorm_min: float = 0.0  # smallest factor that renormalization may shrink a velocity by, 0 to 1
    cfg_renorm_type: str = "global"  # over the image, per token, or per token before image guidance
    num_timesteps: int = 50  # points of the schedule: one more than the steps
    timestep_shift: float = 3.0
    image_shapes: tuple[int, int] = (1024, 1024)  # (height, width) in pixels, where no image is given
    enable_taylorseer: bool = False
    max_think_token_n: int = 1000  # of a text or thought, <|im_start|> included
    do_sample: bool = False
    text_temperature: float = 0.3
    max_iterations: int = 10  # of interleaved reasoning: texts and images together

    def changed(self, options: Mapping[str, Any]) -> Settings:
        """With `options` by name; None keeps a value. Raises one `UserError` that lists all wrong names and values."""
        known = {field.name for field in fields(self)}
        faults: list[str] = []
        values: dict[str, Any] = {}
        for name, value in options.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                faults.append(f"{name} is not a setting" + (f"; did you mean {near[0]}?" if near else ""))
            elif value is not None:
                values[name] = _PAIRS[name](value) if name in _PAIRS and isinstance(value, (list, tuple)) else value
        found = replace(self, **values)
        faults += [f"{name} is {getattr(found, name)!r}, expected {rule}" for name, rule in _broken(found)]
        all_faults(faults, "settings that can't be used:")
        return found


_PAIRS = {"cfg_interval": tuple, "image_shapes": tuple}


def _is_number(value: Any, whole: bool = False) -> bool:
    return not isinstance(value, bool) and isinstance(value, int if whole else (int, float)) and value == value


def _is_pair(value: Any, whole: bool = False) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(_is_number(item, whole) for item in value)


def _broken(found: Settings) -> list[tuple[str, str]]:
    """(name, what is expected) of every value out of range."""
    sizes, interval, renorm = found.image_shapes, found.cfg_interval, found.cfg_renorm_min
    good = {
        ("cfg_text_scale", "a number from 0 to 100"): _is_number(found.cfg_text_scale)
        and 0 <= found.cfg_text_scale <= 100,
        ("cfg_img_scale", "a number from 0 to 100"): _is_number(found.cfg_img_scale)
        and 0 <= found.cfg_img_scale <= 100,
        ("cfg_interval", "two numbers from 0 to 1, the smaller first"): _is_pair(interval)
        and 0 <= interval[0] <= interval[1] <= 1,
        ("cfg_renorm_min", "a number from 0 to 1"): _is_number(renorm) and 0 <= renorm <= 1,
        ("cfg_renorm_type", " or ".join(RENORM_TYPES)): found.cfg_renorm_type in RENORM_TYPES,
        ("num_timesteps", "a whole number from 2 to 1000"): _is_number(found.num_timesteps, True)
        and 2 <= found.num_timesteps <= 1000,
        ("timestep_shift", "a number from 0.01 to 100"): _is_number(found.timestep_shift)
        and 0.01 <= found.timestep_shift <= 100,
        ("image_shapes", "two whole numbers of pixels, (height, width), 16 to 4096"): _is_pair(sizes, True)
        and all(16 <= side <= 4096 for side in sizes),
        ("enable_taylorseer", "True or False"): isinstance(found.enable_taylorseer, bool),
        ("max_think_token_n", "a whole number from 2 to 100000"): _is_number(found.max_think_token_n, True)
        and 2 <= found.max_think_token_n <= 100_000,
        ("do_sample", "True or False"): isinstance(found.do_sample, bool),
        ("text_temperature", "a number above 0, at most 100"): _is_number(found.text_temperature)
        and 0 < found.text_temperature <= 100,
        ("max_iterations", "a whole number from 1 to 1000"): _is_number(found.max_iterations, True)
        and 1 <= found.max_iterations <= 1000,
    }
    return [rule for rule, holds in good.items() if not holds]


_T2I = Settings(cfg_text_scale=4.0)
_EDIT = Settings(cfg_text_scale=4.0, cfg_img_scale=2.0, cfg_interval=(0.0, 1.0), cfg_renorm_type="text_channel")
DEFAULTS: dict[str, Settings] = {
    "t2i": _T2I,
    "edit": _EDIT,
    "vqa": Settings(max_think_token_n=512),
    "interleave": replace(_EDIT, image_shapes=(512, 512), max_think_token_n=2048, do_sample=True),
}


def default_settings(mode: str, has_image: bool) -> Settings:
    """The defaults of a mode. Raises `UserError` for an unknown one."""
    if mode not in MODES:
        raise UserError(f"mode {mode!r}: expected one of {', '.join(MODES)}")
    if mode == "think":  # thinks, then draws or edits
        mode = "edit" if has_image else "t2i"
    return DEFAULTS[mode]
