# Everything lives in .venv; the stamp in it says that the installed FastFlow is that of these sources.
#   make train ARGS="--data cifar10"      make test      make setup TORCH="torch==2.13.0"      PYTHON=python3.12 make setup
PYTHON ?= python3
TORCH ?= torch torchvision
ARGS ?=
WORKERS ?= 2
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.fastflow
TESTS_STAMP := $(VENV)/.tests
SOURCES := pyproject.toml setup.py tests/libraries.txt $(shell find csrc -type f)
# pip shows its downloads on a terminal and keeps still in a log; compiling all of torch to bytecode would take a minute, so only
# what is used is compiled, at the end of setup
PIP := $(PY) -m pip --disable-pip-version-check install --no-compile $(shell test -t 2 || echo --quiet)
export MAX_JOBS ?= 2
# the build alone imports torch several times: from bytecode each takes 3 seconds, not 7
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup train test lint docs clean
.DELETE_ON_ERROR:

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 14

setup: $(STAMP) ## .venv with torch, the extensions and FastFlow, editable; again only after the sources changed

train: $(STAMP) ## train a small Glow on real photographs; ARGS="..." goes to `fastflow train`
	@$(PY) -m fastflow train $(ARGS)

# One thread a worker: two workers with one each beat torch's own threads on tensors as small as those of tests.
test: lint $(TESTS_STAMP) ## lint, then every test
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal --benchmark-disable --durations=10 $(ARGS)

lint: $(STAMP) ## ruff, clang-format and basedpyright: lint, format and types
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(VENV)/bin/clang-format --dry-run -Werror $(shell find csrc -type f)
	@$(VENV)/bin/basedpyright

docs: $(STAMP) ## the site, in build/site/index.html; needs no network
	@$(PY) -m sphinx -q -W --keep-going -b html -c docs . build/site
	@echo "the site is build/site/index.html"

clean: ## remove .venv and what was built, but no run folder
	rm -rf $(VENV) build dist docs/api *.egg-info fastflow/*.so .pytest_cache .ruff_cache

$(TESTS_STAMP): $(STAMP)
	@# bytecode of what tests import: once, instead of by both workers and by the processes that tests start
	@$(PY) -c 'import torch._inductor.compile_fx, torch._inductor.codegen.cpp, torch.testing._internal.optests; \
	  import torch.utils.tensorboard, hypothesis, sklearn.mixture, pytest'
	@touch $@

$(STAMP): $(SOURCES)
	@rm -f $@
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "FastFlow needs Python 3.11 or later; name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@test -x $(PY) && $(PY) -m pip --version >/dev/null 2>&1 || { echo "[1/3] making $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "[2/3] installing $(TORCH) (the first time some 3 GB to download, 6 GB on disk)"
	@$(PIP) $(TORCH) 'setuptools>=77' wheel pybind11 ninja
	@echo "[3/3] building the extensions and installing FastFlow, editable"
	@# TORCH is named again, or a torchvision that wants another torch would replace it
	@FASTFLOW_EMULATOR=1 $(PIP) --no-build-isolation $(TORCH) -e '.[train,test,docs]'
	@# libraries that tests compare with, without the packages that they ask for: some would replace torch
	@$(PIP) --no-deps --no-build-isolation --use-pep517 -r tests/libraries.txt
	@# what training imports is imported once, so that its bytecode is there when training starts
	@$(PY) -c 'import torch, torch._dynamo, matplotlib.figure, tyro, tqdm; from fastflow.trainer import train; \
	  from fastflow.ops import extension as e; \
	  print(f"FastFlow is ready: torch {torch.__version__}, C++ ops", *(["built,"] if e.cpu else ["left out,"]), \
	  "CUDA ops", *(["built"] if e.cuda else ["left out"])); \
	  e.cpu or print("Without them ops run in PyTorch, slower. For C++ ops install a compiler and headers of Python", \
	  "(Debian, Ubuntu: g++ python3-dev), then: touch setup.py; make setup")'
	@touch $@
