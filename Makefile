# `make train` and `make test` work in a fresh clone: the environment is made on first use, in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The installation is redone when the project's metadata or the CUDA extension change.
INSTALLED := $(VENV)/installed
# What builds the site, installed on its first use.
DOCUMENTED := $(VENV)/documented
EXTENSION := setup.py CMakeLists.txt $(wildcard csrc/*)

.PHONY: train test test-all test-minimal lint bench gpu-check gpu-dry-run launch-table registers docs clean

# On a busy machine OpenMP's threads would otherwise spin while they wait for each other.
train: $(INSTALLED)
	OMP_WAIT_POLICY=passive $(BIN)/ccl-fast train

# Processes of one thread each, as most tests are small: on two CPUs a third works while one of them waits.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadgroup
# Compiled modules are kept, also where the environment would have none: tests start many interpreters.
unexport PYTHONDONTWRITEBYTECODE

# What is essential: every feature, a few minutes.
test: $(INSTALLED)
	$(PYTEST) -m "not slow"

# Everything: `make test`, then the tests that it leaves out. `make test test-all`, as CI has it, runs none twice.
test-all: test
	$(PYTEST) -m slow

# The losses' and k-means' tests as if no extra were installed.
test-minimal: $(INSTALLED)
	$(PYTEST) -p tests.minimal -m "not slow" tests/project/test_minimal.py tests/losses tests/*/test_kmeans*.py

# Without the network: pyright would ask whether there is a newer one.
lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks cpu
	$(BIN)/python -m benchmarks memory

# On a machine with a GPU, with whatever Python it has: no network, no virtual environment.
gpu-check:
	PYTHON=$(PYTHON) benchmarks/harvest.sh 580

# The same script where there is no GPU: interpreted and emulated kernels, tiny sizes; about two minutes.
gpu-dry-run: $(INSTALLED)
	HARVEST_DRY_RUN=1 PYTHON=$(abspath $(BIN)/python) benchmarks/harvest.sh 600

# What every shipped launch configuration needs (registers, spills, shared memory) and what its inner loop does.
launch-table: $(INSTALLED)
	$(BIN)/python -m tests.kernels.offline_compile

# Registers, spills and shared memory of every kernel of the CUDA extension; needs nvcc where it is not installed.
registers: $(INSTALLED)
	$(BIN)/python -m tests.kernels.registers

# The site, in build/site; a warning is an error. It reads the sources and imports none of them.
docs: $(DOCUMENTED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

$(INSTALLED): pyproject.toml $(EXTENSION)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[train,dev]"
	touch $@

# By the name of what is installed: by the folder's, pip would compile the CUDA extension once more.
$(DOCUMENTED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet "ccl-fast[docs]"
	touch $@

clean:
	rm -rf $(VENV) build ccl_fast/_cuda.*.so *.egg-info .pytest_cache .ruff_cache .hypothesis
