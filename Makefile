# Two commands do everything on a fresh machine: `make run` and `make test`. Each makes .venv when it is missing.
PYTHON ?= python3
TORCH  ?= 2.13.0
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# oracles of tests, which skip without them; --no-deps, as torchattacks wants an old requests, and torchvision's wheel,
# which timm imports too, a torch from elsewhere
ORACLES := torchattacks timm torchvision

.PHONY: help run test test-all mutations lint format bench bench-pytest gpu docs clean

help:
	@echo "make run       train AW-Net and its static twins on digits, attack them, print the table (about 4 minutes)"
	@echo "make test      the test suite     make test-all  with the slow tests     make lint  ruff, mypy, import rules"
	@echo "make bench     benchmark on this CPU, judge the goals  make bench-pytest  the same by pytest-benchmark"
	@echo "make gpu       on a GPU machine: build, test, sanitize, benchmark, tune and profile; OUT=folder"
	@echo "make clean     remove what was built"

# A Python that already has a torch (a GPU machine, say) keeps it; elsewhere, in an active virtual environment too,
# whose packages another cannot share, the pinned one is installed.
$(READY): pyproject.toml setup.py constraints.txt
	@set -e; \
	shared=; if ! test -x $(BIN)/python; then \
		if $(PYTHON) -c "import torch" 2>/dev/null; then shared=--system-site-packages; fi; \
		$(PYTHON) -m venv $$shared $(VENV); \
	fi; \
	if grep -q "include-system-site-packages = true" $(VENV)/pyvenv.cfg \
		&& $(BIN)/python -c "import torch" 2>/dev/null; then \
		$(BIN)/python -m pip install --quiet "setuptools>=77" wheel ninja pybind11; \
		$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[dev]"; \
		$(BIN)/python -m pip install --quiet --no-deps $(filter-out torchvision,$(ORACLES)) \
			|| echo "not installed: $(ORACLES); tests that need them are skipped"; \
	else \
		$(BIN)/python -m pip install --quiet -c constraints.txt "torch==$(TORCH)" "setuptools>=77" wheel ninja pybind11; \
		$(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt -e ".[dev]"; \
		$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt $(ORACLES) \
			|| echo "not installed: $(ORACLES); tests that need them are skipped"; \
	fi
	@touch $@

run: $(READY)
	$(BIN)/awnet reproduce digits --out runs/digits --resume

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test-all: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m ""

# what `make test-all` checks of the seeded faults, printed and written to docs/mutations.md
mutations: $(READY)
	PYTHONPATH=tests $(BIN)/python -m mutations

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# the registry on 2 threads, about 7 minutes; rows are added to benchmarks/results/
bench: $(READY)
	$(BIN)/awnet bench run --device cpu --threads 2 --seconds 0.5
	$(BIN)/awnet bench verify

# the same cases by pytest-benchmark; OPTIONS=--benchmark-save=NAME, --benchmark-compare=…
bench-pytest: $(READY)
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest tests/test_layers_benchmark.py -n 0 --benchmark-enable --benchmark-only $(OPTIONS)

# the running python3's torch, no .venv, no network; OUT=folder, STAGE=one stage
gpu:
	PYTHON=$(PYTHON) benchmarks/on_gpu.sh --out $(or $(OUT),out/gpu) $(if $(STAGE),--stage $(STAGE))

docs: $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]" --no-build-isolation
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
