# make demo | make test | make env: each does all the set-up a fresh machine needs (Python >= 3.10).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
UV_VERSION := 0.13.9
# Which build of PyTorch: uv's --torch-backend, from PyTorch's own index. Without a GPU, cpu saves
# 5 GB. Empty: the package registry's build, also where nothing else is reached.
TORCH_BACKEND ?=

.PHONY: help env demo demo-classification test test-all test-reliability lint docs pins clean

help:
	@echo "make demo   from nothing to a distilled detector (about 4 minutes on 2 CPU cores); also SEED=2"
	@echo "make demo-classification   the same for MNIST and a classifier (2 minutes); also SEED=2"
	@echo "make test   the tests to run before every commit (5 minutes on 2 cores)"
	@echo "make test-all   the rest of the suite (25 minutes)"
	@echo "make test-reliability   runs that are killed, stopped, damaged (30 minutes at most)"
	@echo "make env    only the set-up, in $(VENV)"
	@echo "make env TORCH_BACKEND=cpu   another build of PyTorch (auto, cpu, cu128, ...), in a fresh $(VENV)"
	@echo "make lint   ruff (rules and format) and mypy over the code"
	@echo "make docs   the documentation as a site in build/docs, strictly (half a minute)"
	@echo "make pins   resolve the newest versions into requirements.txt"
	@echo "make clean  delete $(VENV) and output/, all runs in it included"

env: $(VENV)/installed

# The stamp is newer than these files once set-up is complete, so a second run does nothing.
$(VENV)/installed: requirements.txt setup.cfg pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "mokd_det needs Python >= 3.10, but $(PYTHON) is older; set PYTHON=/path/to/python")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv==$(UV_VERSION)
ifeq ($(TORCH_BACKEND),)
	$(UV) pip install --python $(BIN)/python -r requirements.txt
else # each build brings CUDA's libraries itself, or none
	grep -vE '^(cuda-|nvidia-|triton==)' requirements.txt > $(VENV)/requirements.txt
	$(UV) pip install --python $(BIN)/python --torch-backend $(TORCH_BACKEND) -r $(VENV)/requirements.txt
endif
	$(UV) pip install --python $(BIN)/python --no-deps -e .
	touch $@

demo: env
	$(BIN)/python tools/quick_start.py $(if $(SEED),SEED $(SEED))

demo-classification: env
	$(BIN)/python tools/quick_start_classification.py $(if $(SEED),SEED $(SEED))

# One thread each: several processes with several threads get in each other's way.
test: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 -m "not slow and not reliability"

test-all: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 -m "slow or bad_input"

test-reliability: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m reliability tests/reliability
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/untrusted  # hostile files that executed: 0 / N

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: env
	$(BIN)/python docs/build.py

pins: env
	$(UV) pip compile --universal --python-version 3.10 --upgrade --no-annotate --no-header --quiet \
	    --extra detectron2 --extra balancers --extra studies --extra timm --extra onnx --extra docs --extra dev pyproject.toml -o requirements.txt
	sed -i.bak "1i # Pinned environment of 'make env'. Remade by: make pins" requirements.txt && rm requirements.txt.bak

clean:
	rm -rf $(VENV) output build
