# Two commands do everything on a fresh machine: `make run` and `make test`. Each makes .venv when it is missing.
PYTHON ?= python3
PINNED := 2.13.0
# another version, or newest; then the other packages are the newest that fit, not those of constraints.txt
TORCH  ?= $(PINNED)
VENV   := .venv
ifeq ($(OS),Windows_NT)
BIN    := $(VENV)/Scripts
else
BIN    := $(VENV)/bin
endif
READY  := $(VENV)/.ready
# oracles of tests, which skip without them; --no-deps, as torchattacks wants an old requests, and torchvision's wheel,
# which timm imports too, a torch from elsewhere
ORACLES := torchattacks timm torchvision

COMPILE_TIME := about 2 minutes on two cores
PIP    := $(BIN)/python -m pip --disable-pip-version-check -qq install

NATIVE := $(shell git ls-files "csrc/*.cpp" "csrc/*.h" "csrc/*.inl" "csrc/*.cu")

.PHONY: help run test test-all test-slow test-import mutations sanitize lint format bench bench-pytest gpu gpu-pack docs dist release-check clean

help:
	@echo "make run        train AW-Net and two static networks on digits, attack them, print the table (about 4 minutes)"
	@echo "make test       the test suite     make test-all  with the slow tests"
	@echo "make lint       ruff, mypy, import rules, clang-format     make format  the same, fixed in place"
	@echo "make docs       build the documentation into site/ (installs mkdocs into .venv-docs, nothing else)"
	@echo "make dist       build the sdist and the pure Python wheel into dist/"
	@echo "make bench      benchmark on this CPU, check the goals     make bench-pytest  the same by pytest-benchmark"
	@echo "make mutations  put faults into the code, one after another, and check that a test catches each"
	@echo "make sanitize   run the native tests on a build with GCC's address and undefined-behavior sanitizers"
	@echo "make gpu        on a GPU machine: check, benchmark, test, train, 12 minutes (benchmarks/on_gpu.sh --help); OUT=folder"
	@echo "make gpu-pack   prepare .gpu/ for a GPU machine without a network (benchmarks/gpu_pack.py pack --help)"
	@echo "make clean      remove what was built"
	@echo
	@echo "The first call makes .venv: it installs PyTorch and compiles the CPU kernels. AWNET_BUILD=none skips compiling."

# A Python that already has a torch (a GPU machine, say) keeps it, and its torchvision; elsewhere, in an active virtual
# environment too, whose packages another cannot share, the pinned one is installed.
# csrc/module.cpp has the number of the interface: a change of the operators compiles them again
$(READY): pyproject.toml setup.py constraints.txt csrc/module.cpp
	@set -e; \
	shared=; if ! test -x $(BIN)/python; then \
		if $(PYTHON) -c "import torch" 2>/dev/null; then shared=--system-site-packages; fi; \
		echo "making $(VENV)"; \
		$(PYTHON) -m venv $$shared $(VENV); \
	fi; \
	if grep -q "include-system-site-packages = true" $(VENV)/pyvenv.cfg \
		&& $(BIN)/python -c "import torch" 2>/dev/null; then \
		echo "using the torch of $(PYTHON); installing build tools"; \
		torch=; pins=; oracles="$(filter-out torchvision,$(ORACLES))"; \
	else \
		echo "installing torch $(TORCH) and build tools"; \
		torch="torch$(if $(filter newest,$(TORCH)),,==$(TORCH))"; oracles="$(ORACLES)"; \
		pins="$(if $(filter $(PINNED),$(TORCH)),-c constraints.txt)"; \
	fi; \
	$(PIP) $$pins $$torch "setuptools>=77" wheel ninja pybind11; \
	if test "$(AWNET_BUILD)" = none; then echo "installing awnet without native kernels"; \
	else echo "compiling the CPU kernels, $(COMPILE_TIME); AWNET_BUILD=none skips it"; fi; \
	$(PIP) --no-build-isolation $$pins -e ".[dev]"; \
	$(PIP) --no-deps $$pins $$oracles || echo "not installed: $$oracles; tests that need them are skipped"; \
	ls awnet/_C*.so >/dev/null 2>&1 \
		|| echo "no native kernels: the eager backend is used (AWNET_BUILD=cpu make $@ says why)"
	@touch $@

run: $(READY)
	$(BIN)/awnet reproduce digits --out runs/digits --resume

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(TESTS)

test-all: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "" $(TESTS)

test-slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m slow $(TESTS)

# what Windows runs: the import, and tests that need neither POSIX signals nor a compiler
PURE := $(addprefix tests/,project/test_repository.py nn/test_nn.py nn/test_convert.py \
	nn/test_convert_custom_modules.py nn/test_convert_refusals.py models/test_models.py \
	attacks/test_attacks.py test_rng.py evaluation/test_paper_rows.py)
test-import: $(READY)
	$(BIN)/python -X importtime -c "import awnet" 2>/dev/null
	$(BIN)/awnet --version
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(PURE)

# what `make test-all` checks of the seeded faults, printed and written to docs/mutations.md
mutations: $(READY)
	PYTHONPATH=tests $(BIN)/python -m mutations

# A separate build in build/sanitize, by GCC. Python and torch are not instrumented: the sanitizers' libraries are
# preloaded, and leaks are not looked for. OPTIONS=-x stops at the first failure.
SANITIZED := build/sanitize
SANITIZED_TESTS := test_amx or test_frozen \
	or (test_ops or test_operators or test_activations) and (cpp or native) \
	or test_native and (direct or sizes or sums or infinite)
sanitize: $(READY)
	AWNET_BUILD=cpu AWNET_SANITIZE=1 $(BIN)/python setup.py -q build_ext \
		--build-lib $(SANITIZED) --build-temp $(SANITIZED)/objects
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 \
		AWNET_NATIVE="$$(ls $(CURDIR)/$(SANITIZED)/awnet/_C*.so)" \
		$(BIN)/python -m pytest -n 0 -p no:cacheprovider \
		tests/ops/test_native.py tests/ops/test_amx.py tests/ops/test_ops.py tests/ops/test_operators.py \
		tests/ops/test_activations.py tests/nn/test_frozen.py \
		-k "($(SANITIZED_TESTS)) and not compile" $(OPTIONS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(NATIVE)

# the registry on 2 threads, about 7 minutes; rows are added to benchmarks/results/
bench: $(READY)
	$(BIN)/awnet bench run --device cpu --threads 2 --seconds 0.5
	$(BIN)/awnet bench verify

# the same cases by pytest-benchmark; OPTIONS=--benchmark-save=NAME, --benchmark-compare=…
bench-pytest: $(READY)
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest tests/benchmarks/test_layers_benchmark.py -n 0 --benchmark-enable --benchmark-only $(OPTIONS)

# the running python3's torch, no .venv, no network; OUT=folder, CALL=1 or 2, STEP=one step
gpu:
	PYTHON=$(PYTHON) benchmarks/on_gpu.sh --out $(or $(OUT),out/gpu) $(if $(CALL),--call $(CALL)) $(if $(STEP),--step $(STEP))

# OPTIONS="--python PYTHON --cifar FOLDER": the native module for that interpreter, and the images
gpu-pack:
	$$(test -x $(BIN)/python && echo $(BIN)/python || echo $(PYTHON)) benchmarks/gpu_pack.py pack $(OPTIONS)

# without torch and awnet: the API reference is read from the sources
.venv-docs/.ready: constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --disable-pip-version-check -qq -c constraints.txt \
		mkdocs-material "mkdocstrings[python]"
	@touch $@

docs: .venv-docs/.ready
	.venv-docs/bin/mkdocs build --strict

dist: $(READY)
	$(PIP) build
	rm -rf dist
	AWNET_BUILD=none $(BIN)/python -m build --no-isolation --outdir dist .
	@ls -l dist

# what publishing checks first: a real repository in pyproject.toml, one version everywhere
release-check:
	@! grep -n "github.com/OWNER" pyproject.toml || { echo "set the repository under [project.urls]"; exit 1; }
	@version=$$(sed -n 's/^__version__ = "\(.*\)"/\1/p' awnet/_version.py); \
		grep -q "^version: $$version$$" CITATION.cff && grep -q "^## \[$$version\]" CHANGELOG.md \
		|| { echo "CITATION.cff and CHANGELOG.md do not both name $$version"; exit 1; }

clean:
	rm -rf $(VENV) .venv-docs build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
