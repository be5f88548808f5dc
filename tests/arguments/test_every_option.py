"""No option parses and changes nothing: code that acts on it reads it, or it is refused or explained in the log."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

import bagel_ds
from bagel_ds.arguments.options import SECTIONS, all_options, type_name
from bagel_ds.arguments.run_config import parse_arguments
from bagel_ds.errors import UserError

PACKAGE = Path(bagel_ds.__file__).parent
CLASSES = {section.__name__ for section in SECTIONS.values()}
FIELDS = {f".{name}" for name in SECTIONS}  # of a RunConfig


def reads(tree: ast.AST) -> set[str]:
    """Options that a module reads as `config.training.lr`, or as `args.lr` where `args` was set to that section."""
    names = {
        node.arg
        for node in ast.walk(tree)
        if isinstance(node, ast.arg) and isinstance(node.annotation, ast.Name) and node.annotation.id in CLASSES
    }
    assigned = [pair for node in ast.walk(tree) if isinstance(node, ast.Assign) for pair in _pairs(node)]
    before = -1
    while len(names) > before:  # `args = self.args` after `self.args = config.training`
        before = len(names)
        names |= {_name(target) for target, value in assigned if _name(value) in names | FIELDS} - {""}
    loads = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)]
    return {node.attr for node in loads if _name(node.value) in names | FIELDS}


def _pairs(node: ast.Assign) -> list[tuple[ast.expr, ast.expr]]:
    """(target, value) of an assignment, item by item where tuples stand on both sides."""
    target, value = node.targets[0], node.value
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        return list(zip(target.elts, value.elts, strict=False))
    return [(target, value)]


def _name(node: ast.expr) -> str:
    """`args` as "args", `self.args` as ".args"."""
    return f".{node.attr}" if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _read_outside_arguments() -> set[str]:
    files = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] != "arguments"]
    return {name for path in files for name in reads(ast.parse(path.read_text(encoding="utf-8")))}


READ = _read_outside_arguments() & all_options().keys()
# Read by properties of RunConfig, which the code asks instead: `config.attention`, `exported_dtype`, `wandb_wanted`.
BY_PROPERTY = {"attn", "use_flex", "save_dtype", "enable_wandb"}
# Explained by `zero/config/sharding.py`, which knows the DeepSpeed configuration.
BY_FSDP = {"num_replicate", "backward_prefetch"}
UNREAD = sorted(all_options().keys() - READ - BY_PROPERTY - BY_FSDP)


def other_value(name: str) -> str:
    """A value that parses and differs from the default."""
    field = all_options()[name]
    if field.metadata["choices"]:
        return next(choice for choice in field.metadata["choices"] if choice != field.default)
    default: Any = field.default
    if type_name(field) == "int":
        return str((default or 0) + 1)
    return {"bool": str(not default), "float": "0.5", "str": "other"}[type_name(field)]


@pytest.mark.parametrize("name", UNREAD)
def test_an_option_that_nothing_reads_is_refused_or_explained(name: str) -> None:
    try:
        config = parse_arguments([f"--{name}", other_value(name)])
    except UserError as refusal:
        assert f"--{name}" in str(refusal)
    else:
        assert any(name in note for note in config.notes), f"--{name} changes nothing and no line says so"


def test_the_list_of_exceptions_is_true() -> None:
    read = {name for path in (PACKAGE / "arguments").glob("*.py") for name in _attributes(path)}
    assert BY_PROPERTY <= read
    outside = [path for path in PACKAGE.rglob("*.py") if path.parent.name != "arguments"]
    used = " ".join(path.read_text(encoding="utf-8") for path in outside)
    assert [name for name in ("config.attention", ".exported_dtype", "wandb_wanted(") if name not in used] == []
    source = (PACKAGE / "zero" / "config" / "sharding.py").read_text(encoding="utf-8")
    assert [name for name in BY_FSDP if f'if "{name}" in given' not in source] == []
    assert not (BY_PROPERTY | BY_FSDP) & READ


def _attributes(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_an_unread_field_is_found() -> None:
    source = """def f(self, config, t: TrainingArguments):
    self.args, other = config.data, config
    args = self.args
    return config.model.a, self.args.b, args.c, t.d, other.e, model.f, data.g
"""
    assert reads(ast.parse(source)) & set("abcdefg") == set("abcd")
