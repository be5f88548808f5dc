"""The keys and types of a DeepSpeed configuration file, as DeepSpeed itself reads them.

Guarantees: every unknown key, which DeepSpeed would ignore, and every value of a wrong type is reported with file, line
and the nearest known key, all at once. What is known comes from DeepSpeed: its pydantic models, the signatures of its
optimizers and schedulers and, for all other sections, the keys that its own reader asks a dictionary for. Every known
key may be "auto". Imports deepspeed, which takes seconds.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Iterator, KeysView, Mapping
from typing import Any

import pydantic
import torch
from deepspeed.monitor.config import DeepSpeedMonitorConfig
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.profiling.constants import FLOPS_PROFILER_OUTPUT_FILE
from deepspeed.runtime import config as ds_config
from deepspeed.runtime import constants, lr_schedules
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from bagel_ds.config_files import Document
from bagel_ds.errors import all_faults, nearest
from bagel_ds.zero.config.draft import AUTO
from bagel_ds.zero.config.settings import SPLIT_MASTERS

Path = tuple[str, ...]

_MODELS: dict[Path, type[pydantic.BaseModel]] = {
    ("zero_optimization",): DeepSpeedZeroConfig,
    ("bf16",): type(ds_config.get_bfloat16_config({})),
    ("bfloat16",): type(ds_config.get_bfloat16_config({})),
    ("fp16",): type(ds_config.get_float16_config({})),
    ("comms_logger",): type(ds_config.DeepSpeedCommsConfig({"comms_logger": {}}).comms_logger),
    ("hybrid_engine",): ds_config.HybridEngineConfig,
    ("weight_quantization",): ds_config.WeightQuantConfig,
    ("compile",): ds_config.CompileConfig,
    ("timers", "throughput"): type(ds_config.get_timers_config({})),
    ("tensor_parallel",): type(ds_config.get_tensor_parallel_config({})),
    **{(name,): field.annotation for name, field in DeepSpeedMonitorConfig.model_fields.items()},  # type: ignore[misc]
}
# Read outside of DeepSpeedConfig's own reader (0.19.8): by its warnings, and by `initialize` for a device mesh.
_READ_ELSEWHERE = (constants.VOCABULARY_SIZE, "sequence_parallel_size", "data_parallel_size")
_OPTIMIZER = (constants.TYPE, constants.OPTIMIZER_PARAMS, constants.LEGACY_FUSION)
_SCHEDULER = (constants.TYPE, constants.SCHEDULER_PARAMS)
_ADAMS = (torch.optim.AdamW, torch.optim.Adam, FusedAdam, DeepSpeedCPUAdam)
_REFUSALS = (ValueError, AssertionError, TypeError, AttributeError, KeyError, ds_config.DeepSpeedConfigError)
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list"}
_ANY_INT, _ANY_NUMBER, _ANY_TEXT = 1, 1.0, "text"
# Types where DeepSpeed's default is None.
_UNSET: dict[str, Any] = {
    constants.STEPS_PER_PRINT: _ANY_NUMBER,
    constants.TRAIN_BATCH_SIZE: _ANY_INT,
    constants.TRAIN_MICRO_BATCH_SIZE_PER_GPU: _ANY_INT,
    constants.GRADIENT_ACCUMULATION_STEPS: _ANY_INT,
    constants.SEQ_PARALLEL_COMMUNICATION_DATA_TYPE: _ANY_TEXT,
    FLOPS_PROFILER_OUTPUT_FILE: _ANY_TEXT,
}
_DTYPES = (constants.GRAD_ACCUM_DTYPE, constants.PARAM_DTYPE, constants.BUFFER_DTYPE)
_NOT_A_MAPPING = re.compile(r"no attribute '(get|keys|items)'|is not (iterable|a container|subscriptable)|indices must")


def check_keys(document: Document) -> None:
    """Raise `UserError` with every key of the file that DeepSpeed doesn't know, or whose value it can't read."""
    check = _Check(document)
    content = check.removed(document.content)
    for path, model in _MODELS.items():
        section = _at(content, path)
        if check.is_section(path, section):
            check.section(path, section, model)
    check.optimizer(content.get(constants.OPTIMIZER, AUTO))
    check.scheduler(content.get(constants.SCHEDULER, AUTO))
    elsewhere = {*_MODELS, (constants.OPTIMIZER,), (constants.SCHEDULER,), (SPLIT_MASTERS,)}
    check.data_types(content.get(constants.DATA_TYPES))
    check.rest(_without(content, elsewhere))
    all_faults(check.faults, f"--ds_config {document.path} says what DeepSpeed would ignore or can't read:")


class _Check:
    """Collects the faults of one file."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.faults: list[str] = []

    def fault(self, path: Path, text: str) -> None:
        self.faults.append(f"--ds_config {self.document.where(*path)}: {text}")

    def removed(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """The content without keys that DeepSpeed used to have and now refuses."""
        kept = dict(content)
        zero = content.get("zero_optimization")
        for key, message in ds_config._REMOVED_TOP_LEVEL_CONFIG_KEYS.items():
            if kept.pop(key, None) is not None:
                self.fault((key,), f"{message.strip()} Remove the key {key!r}.")
        if isinstance(zero, dict):
            removed = ds_config._REMOVED_ZERO_CONFIG_KEYS
            for key in zero.keys() & removed.keys():
                self.fault(("zero_optimization", key), f"{removed[key].strip()} Remove the key {key!r}.")
            kept["zero_optimization"] = {key: value for key, value in zero.items() if key not in removed}
        return kept

    def is_section(self, path: Path, value: Any) -> bool:
        if isinstance(value, dict):
            return True
        if value not in (AUTO, None):
            self.fault(path, f"{'.'.join(path)} must be a mapping, found {value!r:.60}")
        return False

    def names(self, path: Path, section: Mapping[str, Any], known: typing.Collection[str]) -> None:
        for key in section:
            if key not in known:
                inside = f" in {'.'.join(path)}" if path else ""
                self.fault(
                    (*path, key), f"unknown key {key!r}{inside}, which DeepSpeed would ignore; {nearest(key, known)}"
                )

    def section(self, path: Path, section: Mapping[str, Any], model: type[pydantic.BaseModel]) -> None:
        """Check a section that DeepSpeed reads with a pydantic model, and the sections inside it."""
        self.model_names(path, section, model)
        try:
            model(**_known_values(section, model))
        except pydantic.ValidationError as error:
            for found in error.errors():
                self.model_fault(path, section, found)
        except _REFUSALS as error:  # raised where DeepSpeed converts old names
            self.fault(path, f"{'.'.join(path)}: {_words(error)}")

    def model_names(self, path: Path, section: Mapping[str, Any], model: type[pydantic.BaseModel]) -> None:
        names = _names_of(model)
        self.names(path, section, names)
        given: dict[str, str] = {}  # field -> the name that the file uses
        for key in section:
            field = names.get(key, key)
            if field in given:
                self.fault((*path, key), f"{key} and {given[field]} mean the same; keep one of the two")
            given[field] = key
            inner = _model_in(model.model_fields[field].annotation) if key in names else None
            if inner is not None and isinstance(section[key], dict):
                self.model_names((*path, key), section[key], inner)

    def model_fault(self, path: Path, section: Mapping[str, Any], found: Any) -> None:
        place = tuple(str(part) for part in found["loc"])
        value = _at(section, place)
        if found["type"] == "extra_forbidden":
            return  # reported by name already
        if not place or (isinstance(value, dict) and found["type"] in ("value_error", "assertion_error")):
            return  # about several keys, which may still be "auto": `check_resolved` finds these
        self.fault((*path, *place), f"{'.'.join((*path, *place))} is {found['input']!r:.60}: {found['msg']}")

    def optimizer(self, section: Any) -> None:
        """Check its parameters against every Adam that DeepSpeed may choose; resolve.py refuses other optimizers."""
        if not self.is_section((constants.OPTIMIZER,), section):
            return
        self.names((constants.OPTIMIZER,), section, _OPTIMIZER)
        params = section.get(constants.OPTIMIZER_PARAMS, AUTO)
        path = (constants.OPTIMIZER, constants.OPTIMIZER_PARAMS)
        adam = str(section.get(constants.TYPE, AUTO)).lower() in (AUTO, *map(str.lower, ("Adam", "AdamW")))
        if self.is_section(path, params) and adam:
            known = {name for each in _ADAMS for name in _parameters(each)}
            self.names(
                path, params, known | {ds_config.TORCH_ADAM_PARAM, ds_config.ADAM_W_MODE, constants.MAX_GRAD_NORM}
            )

    def scheduler(self, section: Any) -> None:
        if not self.is_section((constants.SCHEDULER,), section):
            return
        self.names((constants.SCHEDULER,), section, _SCHEDULER)
        kind = section.get(constants.TYPE, AUTO)
        params = section.get(constants.SCHEDULER_PARAMS, AUTO)
        path = (constants.SCHEDULER, constants.SCHEDULER_PARAMS)
        known = lr_schedules.VALID_LR_SCHEDULES
        scheduler = getattr(lr_schedules if kind in known else torch.optim.lr_scheduler, str(kind), None)
        if kind not in (AUTO, None) and not inspect.isclass(scheduler):
            self.fault(
                (constants.SCHEDULER, constants.TYPE), f"unknown scheduler {kind!r}; {nearest(str(kind), known)}"
            )
        elif self.is_section(path, params) and scheduler is not None:
            self.names(path, params, set(_parameters(scheduler)))

    def rest(self, content: dict[str, Any]) -> None:
        """Check all that DeepSpeed reads key by key: let it read, and note which keys it asks for.

        A key at which it fails is left out, and the rest is read again.
        """
        while True:
            asked = _Asked(_pruned(content), self)
            try:
                object.__new__(ds_config.DeepSpeedConfig)._initialize_params(asked)
            except _REFUSALS as error:
                path = asked.last
                if not path or path[0] not in content:
                    raise
                if not asked.has_wrong_type(path, content):
                    self.unreadable(path, _at(content, path), error)
                content = _without(content, {path[:1]})
                continue
            asked.check(content, (*_READ_ELSEWHERE, *(path[0] for path in _MODELS)))
            return

    def unreadable(self, path: Path, value: Any, error: Exception) -> None:
        if not isinstance(value, dict) and _NOT_A_MAPPING.search(str(error)):
            self.is_section(path, value)
        else:
            self.fault(path, f"{'.'.join(path)} is {value!r:.60}, which DeepSpeed can't read ({_words(error)})")

    def data_types(self, section: Any) -> None:
        """Check names of number formats, which the engine looks up long after it has read the file."""
        known = {name for each in ds_config.DtypeEnum for name in each._all_values if isinstance(name, str)}
        for key in _DTYPES:
            value = _at(section, (key,))
            if value not in (AUTO, None, *known):
                path = (constants.DATA_TYPES, key)
                self.fault(path, f"{'.'.join(path)} is {value!r:.60}; expected one of {', '.join(sorted(known))}")


class _Asked(dict[str, Any]):
    """A section that notes which keys DeepSpeed asks for, and the types of their values, from DeepSpeed's defaults.

    A section that DeepSpeed iterates over or copies as a whole has no names to check.
    """

    def __init__(self, content: Mapping[str, Any], check: _Check, path: Path = (), root: _Asked | None = None) -> None:
        self.check_, self.path = check, path
        self.root = root or self
        self.last: Path = ()  # the key asked for last, at the root
        self.asked: dict[str, Any] = {}  # key -> DeepSpeed's default
        self.is_open = False
        super().__init__()
        for key, value in content.items():
            inner = _Asked(value, check, (*path, key), self.root) if isinstance(value, dict) else value
            super().__setitem__(key, inner)

    def _note(self, key: str, default: Any = None) -> None:
        if key in dict.keys(self):
            self.root.last = (*self.path, key)
        if default is not None or key not in self.asked:
            self.asked[key] = _UNSET.get(key) if default is None else default

    def get(self, key: str, default: Any = None) -> Any:
        self._note(key, default)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._note(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return _AskedKeys(self)

    def __iter__(self) -> Iterator[str]:
        self.is_open = True
        return super().__iter__()

    def items(self) -> Any:
        self.is_open = True
        return super().items()

    def __copy__(self) -> _Asked:
        return self

    def __deepcopy__(self, memo: Any) -> dict[str, Any]:
        self.is_open = True
        return {}

    def check(self, content: Mapping[str, Any], more: typing.Collection[str] = ()) -> None:
        """Report keys of `content` (the section as it is in the file) that were not asked for, and wrong types."""
        if self.is_open or not self.asked:
            return
        self.check_.names(self.path, content, {*self.asked, *more})
        for key in self.asked:
            inner = dict.get(self, key)
            if isinstance(inner, _Asked):
                inner.check(content[key])
            else:
                self.has_wrong_type((key,), content)

    def has_wrong_type(self, path: Path, content: Mapping[str, Any]) -> bool:
        """Whether the value at `path` below this section is not of the type of DeepSpeed's default; reports it."""
        key, *rest = path
        inner, value = dict.get(self, key), content.get(key, AUTO)
        if rest:
            return isinstance(inner, _Asked) and inner.has_wrong_type(tuple(rest), value)
        default = self.asked.get(key)
        if isinstance(value, dict) or _is_like(value, default):
            return False
        where = (*self.path, key)
        self.check_.fault(where, f"{'.'.join(where)} must be {_KINDS[type(default)]}, found {value!r:.60}")
        return True


class _AskedKeys(KeysView[str]):
    """`section.keys()`: a membership test asks for one key, anything else takes the section as a whole."""

    def __init__(self, section: _Asked) -> None:
        self._section = section

    def __contains__(self, key: object) -> bool:
        return key in self._section

    def __iter__(self) -> Iterator[str]:
        return iter(self._section)


def _is_like(value: Any, default: Any) -> bool:
    """Whether a value has the type of DeepSpeed's default; whole numbers may be written as 5e8."""
    if value in (AUTO, None) or type(default) not in _KINDS:
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, int):
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return isinstance(value, (int, float) if isinstance(default, float) else type(default))


def _names_of(model: type[pydantic.BaseModel]) -> dict[str, str]:
    """Every name under which a file may give a field of the model -> the field."""
    fields = model.model_fields.items()
    return {name: name for name, _ in fields} | {field.alias: name for name, field in fields if field.alias}


def _model_in(annotation: Any) -> type[pydantic.BaseModel] | None:
    """The model behind `Model` or `Optional[Model]`."""
    for kind in (annotation, *typing.get_args(annotation)):
        if inspect.isclass(kind) and issubclass(kind, pydantic.BaseModel):
            return kind
    return None


def _known_values(section: Mapping[str, Any], model: type[pydantic.BaseModel]) -> dict[str, Any]:
    """The section's values under names of the model, without "auto", also in sections inside it."""
    names, found = _names_of(model), {}
    for key, value in section.items():
        inner = _model_in(model.model_fields[names[key]].annotation) if key in names else None
        if inner is not None and isinstance(value, dict):
            found[key] = _known_values(value, inner)
        elif key in names and value != AUTO:
            found[key] = value
    return found


def _parameters(function: Any) -> list[str]:
    """Names of the parameters after the first (which is the optimizer, or the model's parameters)."""
    return list(inspect.signature(function).parameters)[1:]


def _at(content: Any, path: typing.Sequence[str]) -> Any:
    """The value at `path`, "auto" if there is none."""
    for key in path:
        content = content.get(key, AUTO) if isinstance(content, dict) else AUTO
    return content


def _pruned(content: Any) -> Any:
    """The content without the keys that are "auto"."""
    if not isinstance(content, dict):
        return content
    return {key: _pruned(value) for key, value in content.items() if value != AUTO}


def _without(content: Mapping[str, Any], paths: typing.Collection[Path]) -> dict[str, Any]:
    """The content without the sections at `paths`; sections around them stay."""
    return {
        key: _without(value, {path[1:] for path in paths if path[0] == key and len(path) > 1})
        if isinstance(value, dict)
        else value
        for key, value in content.items()
        if (key,) not in paths
    }


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
