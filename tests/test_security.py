"""Nothing that a user or a download brings is run: no unpickling, no evaluation, no shell."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import bagel_ds

PACKAGE = Path(bagel_ds.__file__).parent
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "pickle.load", "pickle.loads"}
CALLS |= {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "np.load", "numpy.load", "marshal.loads", "joblib.load"}
MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_runs_what_it_reads(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not {alias.name.partition(".")[0] for alias in node.names} & MODULES, f"{path}:{node.lineno}"
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] not in MODULES, f"{path}:{node.lineno}"
        elif isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in CALLS, f"{path}:{node.lineno}: {ast.unparse(node.func)}"
            shell = [word for word in node.keywords if word.arg == "shell" and ast.unparse(word.value) != "False"]
            assert not shell, f"{path}:{node.lineno}: a shell"


def test_the_scan_sees_what_it_forbids(tmp_path: Path) -> None:
    for text in ("eval(x)", "import pickle", "torch.load(f)", "subprocess.run(x, shell=True)"):
        bad = tmp_path / "bad.py"
        bad.write_text(text)
        with pytest.raises(AssertionError, match="bad.py:1"):
            test_no_module_runs_what_it_reads(bad)
