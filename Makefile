# Everything runs in .venv, created on first use. PYTHON chooses the interpreter (3.11 or newer) that creates it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# One pip command for the package and everything it needs, so that the pinned torch is the only one that is downloaded.
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable
NATIVE := $(shell find csrc -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')
# A process per core; whichever runs out of tests takes over some of another's. pytest-benchmark is for bench/ alone.
PYTEST := $(BIN)/pytest --numprocesses auto --maxprocesses 8 --dist worksteal -p no:benchmark
FORMATTED := $(NATIVE) $(wildcard tests/native/*.[ch]* tests/emulator/*.[ch]* tests/emulator/cuda/*.cuh)
COMMIT ?= $(shell git describe --always --dirty 2> /dev/null)
INSTALLED_FROM := setup.py pyproject.toml constraints.txt $(NATIVE)

.PHONY: help quickstart test test-slow sanitize bench gpu-check wheel format clean

help:  ## list these targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

quickstart: $(VENV)/.installed  ## install the package and slice a first model
	$(BIN)/slicegpt-fast quickstart

test: $(VENV)/.installed-test  ## check style and types, then run the fast tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy slicegpt_fast
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.installed-test  ## run the tests that `make test` leaves out
	$(PYTEST) -m slow

sanitize: $(VENV)/.installed-test  ## run the tests of the CPU kernels and of the emulated CUDA kernels under sanitizers
	SLICEGPT_FAST_SANITIZE=1 SLICEGPT_FAST_CUDA=0 $(BIN)/python setup.py -q build --build-lib build/sanitize
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/sanitize SLICEGPT_FAST_SANITIZE=1 \
	    $(PYTEST) tests/ops -k "cpu or cuda"

bench: $(VENV)/.installed-test  ## measure the ops and whole models on this machine; BENCH=--quick for the short part
	@mkdir -p build/bench
	$(BIN)/pytest bench $(BENCH) --quiet --benchmark-quiet --benchmark-json build/bench/run.json
	$(BIN)/python bench/report.py build/bench/run.json --out build/bench

gpu-check:  ## with a GPU and $(PYTHON)'s packages: check, tune, time the kernels; STAGES="smoke ops" SECONDS=560 RESULTS=DIR
	$(PYTHON) bench/gpu_check.py $(if $(STAGES),--stages "$(STAGES)") $(if $(SECONDS),--seconds $(SECONDS)) \
	    $(if $(RESULTS),--results $(RESULTS)) --commit "$(COMMIT)"

wheel: | $(BIN)/python  ## build a wheel for this Python into dist/
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

format: $(VENV)/.installed-test  ## put all sources into the project's style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(FORMATTED)

clean:  ## remove everything built, but not .venv
	rm -rf build dist *.egg-info slicegpt_fast/_C.*.so $(VENV)/.installed*
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

# The stamps: pip runs again only when something changed that an editable install does not pick up by itself.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(INSTALLED_FROM) | $(BIN)/python
	$(INSTALL) .
	touch $@

$(VENV)/.installed-test: $(INSTALLED_FROM) | $(BIN)/python
	$(INSTALL) '.[test]'
	touch $@ $(VENV)/.installed
