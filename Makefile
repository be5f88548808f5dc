# Everything is made in .venv and .cache of this folder; nothing is installed elsewhere.
#   make demo        a tiny BAGEL, trained for 60 steps with ZeRO-3 on two GPUs or two CPU processes
#   make demo-long   the same model trained until it solves puzzles that it never saw, a few minutes
#   make test        the tests that every change must pass (about 30 minutes on 2 cores)
#   make test-full   the slow ones (about 15 minutes)
#   make soak        a run killed 100 times (KILLS, KILL_SEED), each time resumed, and what else takes long: hours
#   make test-gpu    those that need a CUDA device (bench/on_gpu.sh: the same in pieces, and the benchmarks)
#   make measure     the memory planner beside measured launches
#   make lint        style, types, whether docs/arguments.md is current, and the site of the documentation (site/)
# PYTHON chooses the interpreter (3.11 or newer), PIP_ARGS is passed to every pip install, PYTEST_ARGS to pytest.

SHELL := /bin/bash
PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=

VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install $(PIP_ARGS) -c constraints.txt
TORCH := $(shell grep '^torch==' constraints.txt)

# DeepSpeed's launcher and ninja are found by PATH; its C++ parts are compiled once (1 to 3 minutes) and kept.
export PATH := $(BIN):$(PATH)
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.cache/torch_extensions
export VIRTUAL_ENV := $(VENV)
unexport PYTHONHOME

.DEFAULT_GOAL := help
.PHONY: help demo demo-long install test test-full soak measure test-gpu lint format check-machine

help:
	@sed -n '2,9s/^# *//p' Makefile

install: $(VENV)/.installed

demo: install
	bash launch/demo.sh

demo-long: install
	bash launch/demo_long.sh

# Two launches at a time, because each waits half of the time for its launcher, one rank or a moment; but what must happen
# in time has the machine to itself. The rest runs in as many processes as there are cores. Status 5 is pytest's "no test
# selected".
test: install
	$(call pytest,$(QUICK) and not distributed and not timed) $(PARALLEL) auto || [ $$? -eq 5 ]
	$(call pytest,$(QUICK) and distributed and not timed) $(PARALLEL) 2 || [ $$? -eq 5 ]
	$(call pytest,$(QUICK) and timed) || [ $$? -eq 5 ]

test-full: install
	$(call pytest,$(SLOW) and not timed) $(PARALLEL) 2 || [ $$? -eq 5 ]
	$(call pytest,$(SLOW) and timed) || [ $$? -eq 5 ]

QUICK := not slow and not soak and not gpu and not measured
SLOW := slow and not soak and not gpu and not measured
PARALLEL := --dist loadfile -n

KILLS ?= 100
KILL_SEED ?= 1
soak: install
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} BAGEL_KILLS=$(KILLS) BAGEL_KILL_SEED=$(KILL_SEED) \
	  python -m pytest -s tests/distributed/test_kill.py $(PYTEST_ARGS)
	$(call pytest,soak)

measure: install
	$(call pytest,measured)

test-gpu: install
	$(call pytest,gpu)

# One thread per process: the tests start several processes, and on few cores threads only wait for one another.
pytest = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} python -m pytest -m "$(1)" $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	ruff check
	ruff format --check
	mypy
	@bagel-ds arguments | diff -u docs/arguments.md - || \
	  { echo "docs/arguments.md is not current: run bagel-ds arguments > docs/arguments.md"; exit 1; }
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet

format: $(VENV)/.installed-dev
	ruff check --fix
	ruff format

# ---------------------------------------------------------------------------------------------------- installation
# torch goes first: what builds against it must find it there.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) '$(TORCH)'
	$(PIP) -e '.[test]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[dev]'
	@touch $@

$(BIN)/python:
	@$(MAKE) --no-print-directory check-machine
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# DeepSpeed compiles its CPU optimizer at first use, which takes a C++ compiler and Python's headers; ninja comes with pip.
check-machine:
	@command -v $(PYTHON) > /dev/null || \
	  { echo "There is no $(PYTHON): run apt-get install python3 python3-venv python3-dev g++"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$$($(PYTHON) --version) is too old: 3.11 or newer is needed; name one as in make demo PYTHON=python3.12"; \
	    exit 1; }
	@missing=""; \
	$(PYTHON) -c 'import venv, ensurepip' 2> /dev/null || missing="$$missing python3-venv"; \
	command -v $${CXX:-g++} > /dev/null || missing="$$missing g++"; \
	$(PYTHON) -c 'import os, sys, sysconfig; h = os.path.join(sysconfig.get_paths()["include"], "Python.h"); \
	  sys.exit(not os.path.exists(h))' || missing="$$missing python3-dev"; \
	[ -z "$$missing" ] || { echo "This machine lacks$$missing: run apt-get install$$missing (as root) and try again"; exit 1; }
