# Everything runs in .venv; every target that needs it makes it first. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
# One thread per process: on busy cores a second one made small models 8-16 times slower.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup demo test check tiny-model calibrate bench clean
.DEFAULT_GOAL := help

help:
	@echo "make setup       install into .venv (nothing to do when up to date)"
	@echo "make demo        all five strategies on four offline tasks, then the comparison table"
	@echo "make test        the test suite, offline, on CPU"
	@echo "make check       formatter, linter, strict types"
	@echo "make tiny-model  train the packaged tiny models again from their recipe (long)"
	@echo "make calibrate   measure the tiny models and rewrite the table in docs/tiny-model.md (long)"
	@echo "make bench       throughput, training-step and start-up figures, as ratios (long)"

setup: .venv/.up-to-date

.venv/.up-to-date: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "cotune needs Python 3.11 or newer; try: make setup PYTHON=python3.12" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/cotune study experiments/demo --out results/demo --jobs 2
	$(BIN)/cotune compare results/demo

test: setup
	$(BIN)/python -m pytest -n 2

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

tiny-model: setup
	$(BIN)/python -m cotune.models.tiny.recipe --size tiny --out cotune/models/tiny/tiny
	$(BIN)/python -m cotune.models.tiny.recipe --size tiny-4m --out cotune/models/tiny/tiny-4m

calibrate: setup
	$(BIN)/python -m cotune.models.tiny.calibrate --docs docs/tiny-model.md

bench: setup
	$(BIN)/python benchmarks/help_time.py
	$(BIN)/python benchmarks/lora_throughput.py
	$(BIN)/python benchmarks/joint_step.py

clean:
	rm -rf .venv results/demo
