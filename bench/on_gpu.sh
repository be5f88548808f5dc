#!/usr/bin/env bash
# Tests and benchmarks for a machine with a GPU, in pieces; bench/on_gpu.py says how. PYTHON chooses the interpreter.
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="$here/../.venv/bin/python"
[ -x "$python" ] || python=python3
exec "${PYTHON:-$python}" "$here/on_gpu.py" "$@"
