# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCHMARKS := build_time fidelity llama_decode prediction startup

# GCC before 12.4 compiles llama.cpp's AMX kernels wrong, and they then end the process (GCC bug 114098)
ifeq ($(shell uname -m),x86_64)
NO_AMX := -mno-amx-tile -mno-amx-int8 -mno-amx-bf16
export CMAKE_ARGS ?= -DCMAKE_C_FLAGS="$(NO_AMX)" -DCMAKE_CXX_FLAGS="$(NO_AMX)"
endif

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast lint types docs bench bench-decoding matrix clean

help: ## List what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

# torch comes first and pinned: no other package then replaces it with another, larger build
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all]' --group dev
	@touch $@

demo: $(READY) ## Set up, build the built-in model for a Jetson, and say what a fleet of them costs
	$(BIN)/edgekit build --target jetson --out dist
	$(BIN)/edgekit tco dist/jetson-orin-nano-super --scenario factory-cell --out dist/tco

test: $(READY) ## Set up, then run every test
	$(BIN)/python -m pytest

test-fast: $(READY) ## Run the tests that take seconds
	$(BIN)/python -m pytest -m 'not slow'

lint: $(READY) ## Check style
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(READY) ## Check types
	$(BIN)/mypy

docs: $(READY) ## Generate the reference pages and schemas in docs/
	$(BIN)/python docs/generate.py

bench: $(READY) ## Run the benchmarks that take minutes; each prints a table, then one JSON line
	@for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python benchmarks/$$name.py || exit 1; done

PAIR = --target generic-x86 --recipe gguf-q8
bench-decoding: $(READY) ## Train two verifiers, print what every strategy gets right and costs, and the Dyck words (2 hours)
	$(BIN)/edgekit train verifier $(PAIR) --task arithmetic --problems 4800 --heldout 400 --out dist/verifier-arithmetic
	$(BIN)/edgekit train verifier $(PAIR) --task json-extraction --out dist/verifier-json
	$(BIN)/edgekit build $(PAIR) --verifier dist/verifier-arithmetic --out dist/pair
	$(BIN)/python benchmarks/decoding.py dist/pair/generic-x86/model.gguf dist/verifier-arithmetic --problems 120
	$(BIN)/python benchmarks/decoding.py dist/pair/generic-x86/model.gguf dist/verifier-json --task json-extraction \
		--problems 60 --candidates 4 16 --searches beam rebase --skip speed peer
	$(BIN)/python benchmarks/dyck.py

matrix: $(READY) ## Build the built-in model through every recipe for four targets, and print the table
	$(BIN)/python benchmarks/matrix.py

clean: ## Remove the environment and what was built
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache
