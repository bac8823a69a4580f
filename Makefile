# The two commands most people need are `make demo` and `make test`. Everything happens inside .venv.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
NETS ?= 2000
JOBS ?= 2000
CHAOS_ARGS ?=
BENCH_ARGS ?=
GPU_ARGS ?=

# What only `make bench` compares with.
PEERS := build/bench-peers

# The environment is up to date when the stamp named after these files' contents exists: a fresh checkout with other
# times, or a second `make test`, installs nothing and needs no network.
ENV_FILES := pyproject.toml constraints.txt requirements-peers.txt
STAMP := $(VENV)/installed-$(shell cat $(ENV_FILES) | cksum | tr ' ' '-')

PACKAGES := client/curvature_client protocol/curvature_protocol service/curvature_service state/curvature_state \
            worker/curvature_worker worker/curvature_engine

.PHONY: help env demo test property chaos bench gpu lint format coverage catalogue constraints clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

env: $(STAMP) ## Make the environment (.venv), everything pinned by constraints.txt

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Python 3.11 or newer is needed, $$($(PYTHON) --version) was found; name one: make PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group build
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[all]' \
	    --group dev --group demo
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-peers.txt
	@rm -f $(VENV)/installed-*
	@touch $@

demo: env ## Start an embedded server, run the main job on real digits, show the result, stop
	$(BIN)/python examples/demo.py

test: env ## Run all tests
# Files share the cores. The engine's tests start no processes; the others start servers: two files at a time, each its own.
ifeq ($(PYTEST_ARGS),)
	@failed=0; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile tests/engine || failed=1; \
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --ignore tests/engine || failed=1; \
	exit $$failed
else
	$(BIN)/python -m pytest $(PYTEST_ARGS)
endif

property: env ## Hold NETS random nets against brute force
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/property.py --nets $(NETS)

chaos: env ## Kill everything at random moments while JOBS jobs run; CHAOS_ARGS="--embedded" for `curvature serve`
	$(BIN)/python benchmarks/chaos.py --jobs $(JOBS) $(CHAOS_ARGS)

bench: env $(PEERS)/installed ## Time the engine beside its peers; BENCH_ARGS="--quick --nets 3c3d", or --output, --plots, --memory
# Huge pages for everybody, as in the worker's processes.
	THP_MEM_ALLOC_ENABLE=1 PYTHONPATH=$(PEERS) $(BIN)/python -W ignore -m benchmarks.bench $(BENCH_ARGS)

# Outside the environment; without Opacus's own folders `benchmarks` and `examples`, which would hide ours.
$(PEERS)/installed: requirements-bench.txt
	rm -rf $(PEERS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(PEERS) \
	    --requirement requirements-bench.txt
	rm -rf $(PEERS)/benchmarks $(PEERS)/examples
	@touch $@

gpu: env ## What only a machine with a GPU can show; GPU_ARGS="--minutes 30 --only kernels precision"
	$(BIN)/python -W ignore benchmarks/gpu.py $(GPU_ARGS)

lint: env ## Linters, type checker, import rules, container and Kubernetes files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
# kustomization.yaml and KEDA's resources are not Kubernetes' own: tests/packaging checks what they say.
	$(BIN)/kubernetes-validate --strict --quiet $(filter-out %/kustomization.yaml %/scaling.yaml,$(wildcard deploy/kubernetes/*.yaml))

format: env ## Format the code, repair what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

coverage: env ## Hold every model of the zoo to brute force, and write docs/coverage.md
	$(BIN)/python benchmarks/coverage.py

catalogue: env ## Write the catalogue of extensions that the service knows before a worker connects
	$(BIN)/python -m curvature_engine > service/curvature_service/catalogue.json

constraints: ## Write constraints.txt from what .venv holds (after a deliberate upgrade)
	$(BIN)/python -m pip freeze --all --exclude-editable \
	    | grep -viE "^($$(sed -n 's/^\([A-Za-z0-9_.-]*\)==.*/\1/p' requirements-peers.txt | paste -sd '|' -)|setuptools|wheel)==" \
	    | sed 's/+cpu$$//' > constraints.txt

clean: ## Remove the environment, caches and the demo's output
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis dist build demo-output
	find $(PACKAGES) tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
