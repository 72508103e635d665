# Every target sets up what it needs: the environment once, the C++ part again whenever its sources change.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
# Another PyTorch than requirements-dev.txt pins; in an environment of its own: make test TORCH=2.14.1 VENV=build/torch-2.14.1
TORCH ?=
BENCH_ARGS ?=

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

BIN := $(VENV)/bin
ENVIRONMENT := $(VENV)/.environment
BUILD := $(VENV)/.build
REQUIREMENTS := $(if $(TORCH),<(sed 's/^torch==.*/torch==$(TORCH)/' requirements-dev.txt),requirements-dev.txt)
# Two workers with two threads each on two cores: threads that spin while they wait would make the tests several times slower.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n 2 --durations=30
CXX_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
CXX_TESTS := $(shell find tests/emulation -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# $(call install,log name,pip arguments): one line a package while it runs, the log's end if it fails.
define install
log=$(VENV)/$(1).log; \
PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --progress-bar off $(2) 2>&1 | tee $$log | \
	sed -nu 's/^Collecting \([A-Za-z0-9_.-]*\).*/    fetching \1/p; s/^Installing collected.*/    unpacking/p; s/^Building/    building/p' \
	|| { echo "pip failed; the end of $$log:" >&2; tail -n 40 $$log >&2; exit 1; }
endef

# Triton decides whether to interpret when it is imported: these tests are a session of their own.
INTERPRET := TRITON_INTERPRET=1 $(PYTEST) tests/interpreter

# Seconds of each benchmark; together with the tests a part stays under nine minutes.
GPU_SECONDS ?= 105
GPU_SCRIPTS ?= baselines ours sanitize counters
CARRY_PYTHON ?=

# The modules whose names are public.
API := effnet_ops $(addprefix effnet_ops.,functional layers models surgery deployment scaling distributed)

# What a wheel does not bring along: PyTorch's libraries, and those of CUDA that PyTorch brings.
NOT_IN_WHEELS := 'libtorch*' 'libc10*' 'libcudart*'

.PHONY: help demo test test-all bench-cpu compatibility api wheel wheel-matrix cuda-gates gpu gpu-carry gpu-rows lint format sanitize clean

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 20

demo: $(BUILD)  ## build, then classify real photographs before and after replace_layers, with a speed table
	@$(BIN)/effnet-ops demo

test: $(BUILD)  ## build, then run the tests
	@echo "==> running the tests"
	@$(PYTEST) -m "not slow" $(PYTEST_ARGS)
	$(if $(PYTEST_ARGS),,@$(INTERPRET) -m "not slow")

test-all: $(BUILD)  ## the tests and those marked slow
	@echo "==> running all tests, the slow ones too"
	@$(PYTEST) $(PYTEST_ARGS)
	$(if $(PYTEST_ARGS),,@$(INTERPRET))

cuda-gates: $(BUILD)  ## compile the CUDA kernels that make test checks, and note that they have passed in csrc/cuda/passed.json
	@EFFNET_OPS_RECORD_GATES=1 $(BIN)/python -m pytest -q -m "not slow" tests/test_cuda_compile.py

gpu: $(BUILD)  ## on a machine with a GPU: build, test, measure in parts (repeat until it says complete), docs/gpu.md
	@echo "==> testing on the GPU"
	@$(BIN)/python -m pytest -q tests/gpu
	@$(MAKE) --no-print-directory gpu-rows

gpu-rows: $(BUILD)  ## the measuring part of gpu: GPU_SCRIPTS one after the other, GPU_SECONDS each, then docs/gpu.md
	@echo "==> measuring; exit code 1 of a benchmark means failed rows, 2 that the time was up"
	@for script in $(GPU_SCRIPTS); do \
		$(BIN)/python benchmarks/gpu/$$script.py --seconds $(GPU_SECONDS) || [ $$? -le 2 ] || exit 1; \
	done
	@$(BIN)/python benchmarks/gpu/choice.py || [ $$? -eq 3 ]
	@$(BIN)/python benchmarks/gpu/report.py

gpu-carry: $(BUILD)  ## build what travels to a lent GPU; CARRY_PYTHON names an interpreter of that machine's version
	@$(BIN)/python benchmarks/gpu/carry.py $(CARRY_PYTHON)

bench-cpu: $(BUILD)  ## measure inference against every peer; rows and plots in benchmarks/results
	@$(BIN)/python benchmarks/end_to_end.py $(BENCH_ARGS)

compatibility: $(BUILD)  ## docs/compatibility.md: what is replaced in the networks of the libraries that are installed
	@$(BIN)/python benchmarks/compatibility.py

lint: $(ENVIRONMENT)  ## check the style of Python and C++
	@echo "==> checking the style"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES) $(CXX_TESTS)

format: $(ENVIRONMENT)  ## format Python and C++ in place
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(CXX_SOURCES) $(CXX_TESTS)

api: $(ENVIRONMENT)  ## the reference of all public names, from their docstrings, in build/api
	@$(BIN)/python -m pdoc --docformat google --output-directory build/api $(API)

wheel: $(ENVIRONMENT)  ## build a manylinux wheel and an sdist in dist/, for the Python at hand
	@echo "==> building the wheel"
	@rm -rf dist build/wheel
	@$(BIN)/python -m build --no-isolation --sdist --outdir dist .
	@$(BIN)/python -m pip wheel --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir build/wheel .
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair $(addprefix --exclude ,$(NOT_IN_WHEELS)) --wheel-dir dist build/wheel/*.whl

wheel-matrix: wheel  ## run the operators' tests with that wheel beside each of TORCH_VERSIONS (some 5 GB each, removed again)
	@PYTHON=$(abspath $(BIN)/python) bash tests/wheel_matrix.sh

sanitize: $(ENVIRONMENT)  ## run the operator tests under the address and undefined-behaviour sanitizers
	@echo "==> building and testing with sanitizers"
	@PYTHON=$(abspath $(BIN)/python) bash tests/sanitize.sh

clean:  ## remove the environment and everything that was built
	rm -rf $(VENV) build dist *.egg-info demo.png
	find effnet_ops -name '*.so' -delete
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

$(ENVIRONMENT): requirements-dev.txt
	@echo "==> creating the environment in $(VENV) (PyTorch is large: a few minutes)"
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "$(PYTHON) cannot create a virtual environment (Debian: apt install python3-venv)" >&2; exit 1; }
	@$(call install,environment,-r $(REQUIREMENTS))
	@touch $@

$(BUILD): $(ENVIRONMENT) setup.py setup_cuda.py pyproject.toml $(CXX_SOURCES)
	@echo "==> building effnet_ops for this processor"
	@export EFFNET_OPS_ISAS=native; $(call install,build,--no-build-isolation -v -e .)
	@sed -n 's/^ *\(effnet_ops: .*\)/    \1/p' $(VENV)/build.log
	@touch $@
