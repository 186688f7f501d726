# Two commands do everything on a machine that has Python, make and a compiler: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest -n 2
PYTEST_ARGS ?=
DEMO ?=

.PHONY: help venv check format test test-matrix coverage demo clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

venv: $(STAMP) ## make .venv with the package (editable) and everything the other commands need

$(STAMP): constraints.txt pyproject.toml setup.py
	@echo "setting up $(VENV): a few minutes, about 1.5 GB with a CPU build of torch"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

check: $(STAMP) ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: $(STAMP) ## the tests (options: PYTEST_ARGS="-k merge")
	$(PYTEST) $(PYTEST_ARGS)

coverage: PYTEST_ARGS += --cov --cov-report=term-missing
coverage: test ## the tests with line coverage of hqq_oft/, at least 90%

# Each version in an environment of its own that sees the packages of $(VENV) behind its own.
MATRIX := 0.18.1-4.57.6 0.19.1-4.57.6 0.20.0-5.23.0 0.21.2-5.23.0
MATRIX_TESTS := tests/test_peft_integration.py tests/test_layer.py tests/test_merge.py

test-matrix: $(MATRIX:%=.venv-matrix/%/.passed) ## the layer and PEFT tests on every supported PEFT and transformers

.venv-matrix/%/.installed: $(STAMP)
	rm -rf $(@D)
	$(BIN)/python -m venv $(@D)
	$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
		> $$(echo $(@D)/lib/python3*/site-packages)/base.pth
	$(@D)/bin/python -m pip install --quiet "peft==$(word 1,$(subst -, ,$*))" \
		"transformers==$(word 2,$(subst -, ,$*))"
	touch $@

.PHONY: $(MATRIX:%=.venv-matrix/%/.passed)
$(MATRIX:%=.venv-matrix/%/.passed): .venv-matrix/%/.passed: .venv-matrix/%/.installed
	@echo "peft $(word 1,$(subst -, ,$*)), transformers $(word 2,$(subst -, ,$*))"
	$(@D)/bin/python -c 'import peft, transformers; \
		assert [peft.__version__, transformers.__version__] == "$*".split("-"), (peft, transformers)'
	$(@D)/bin/python -m pytest -n 2 --durations=0 -k "not compile" $(MATRIX_TESTS)

demo: $(STAMP) ## the main job: train, quantize, fine-tune, save, load, merge, unmerge (options: DEMO="--steps 100 ...")
	$(BIN)/python -m bench.demo $(DEMO)

clean: ## remove what the other commands made
	rm -rf $(VENV) .venv-matrix build *.egg-info .coverage .mypy_cache .pytest_cache .ruff_cache
