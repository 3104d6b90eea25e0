# Every command a newcomer needs. `make` alone lists them.
#
#   make demo                            creates .venv on first use, then trains on real text
#   make test PYTEST_ARGS="-k router"    a part of the tests
#   make test PYTHON=python3 NO_VENV=1   installs nothing: uses that interpreter as it is

.DEFAULT_GOAL := help
.PHONY: help venv demo test check format gpu-check serving-check clean

# Workers of pytest-xdist. Distributed tests start up to 4 processes each, so this is no count of cores. 0: no xdist.
WORKERS ?= 2
PYTEST_ARGS ?=
NO_VENV ?=

ifeq ($(NO_VENV),)
    VENV := .venv
    STAMP := $(VENV)/.installed
    PY := $(CURDIR)/$(VENV)/bin/python
    # Commands the targets run (ruff, torchrun, ...) come from the environment.
    export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
else
    STAMP :=
    PY := $(or $(PYTHON),python3)
    export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
endif
export PY

help: ## list the targets
	@echo "usage: make TARGET"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' Makefile | awk -F'|' '{ printf "%-14s %s\n", $$1, $$2 }'
	@echo "variables: PYTHON=python3 (to make .venv with)  NO_VENV=1 (use PYTHON as it is, install nothing)"
	@echo "           PYTEST_ARGS=\"-k router\"  WORKERS=2 (tests at a time)"

# pip asks whichever index its own configuration names. torch is several GB: it is installed by the first pip call and
# found in place by every later one; the package itself is linked without build isolation, so nothing comes twice.
ifneq ($(STAMP),)
$(STAMP): requirements.txt pyproject.toml setup.py
	@if ! $(PY) -c 'import pip, sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then \
	    python=$$(sh tools/find_python.sh $(PYTHON)) || exit 1; \
	    echo "==> creating $(VENV) with $$python"; \
	    "$$python" -m venv $(VENV) || exit 1; \
	fi
	@echo "==> installing requirements.txt into $(VENV) (the first time: several GB, some minutes)"
	@quiet=-q; [ -t 1 ] && quiet=; \
	$(PY) -m pip install $$quiet --disable-pip-version-check -r requirements.txt || { \
	    echo "install failed; run make again to go on, or use a python3 that has everything: NO_VENV=1" >&2; exit 1; }
	@$(PY) -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
	@echo "==> installed"
endif

venv: $(STAMP) ## create .venv and install everything into it, once

demo: $(STAMP) ## train a small pyramid-residual MoE on real Chinese text and generate from it
	@bash examples/demo.sh

test: $(STAMP) ## run all tests, the slow ones included
	@echo "==> tests"
	@$(PY) -m pytest $(if $(filter-out 0,$(WORKERS)),-n $(WORKERS) --dist worksteal) $(PYTEST_ARGS)

check: $(STAMP) ## check format, lint and types
	@status=0; \
	echo "==> ruff format"; $(PY) -m ruff format --check . || status=1; \
	echo "==> ruff check"; $(PY) -m ruff check . || status=1; \
	echo "==> mypy"; $(PY) -m mypy || status=1; \
	exit $$status

format: $(STAMP) ## format the code and mend what lint can mend
	@$(PY) -m ruff format .
	@$(PY) -m ruff check --fix .

gpu-check: $(STAMP) ## run the gpu tests and the benchmarks (an error where there is no GPU)
	@bash tools/gpu_check.sh

serving-check: $(STAMP) ## ask vLLM about exports (MEGATRON_MOE_SERVING_PYTHON=a python that has it)
	@: "$${MEGATRON_MOE_SERVING_PYTHON:?name a python in which vllm can be imported}"
	@$(PY) -m pytest -m serving tests/serving $(PYTEST_ARGS)

clean: ## remove caches and build output (.venv and runs stay)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
