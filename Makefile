# Every target works alone in a fresh clone; `make help` lists them.
# To use another interpreter than python3: make PYTHON=/path/to/python3.12

SHELL := /bin/sh
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := --data shapes --nproc-per-node 2 --run-dir runs/demo --epochs 3
# Where packages come from, if not from the usual index. Builds for CPUs alone depend on less, so
# requirements.txt only constrains here.
PIP = $(BIN)/python -m pip --disable-pip-version-check
FROM = -c requirements.txt $(if $(WHEELS),--no-index --find-links "$(WHEELS)") \
  $(if $(INDEX),--extra-index-url "$(INDEX)")
NBVAL := --nbval --nbval-current-env --nbval-cell-timeout 180
# Several tests at once; tests/conftest.py says how many, and which start first.
PARALLEL := --dist loadscope --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup wheels demo quick versions test notebooks lint format lab class site buttons bench bench-full gpu lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## install all into .venv: INDEX=URL of builds for CPUs alone, WHEELS=folder without internet

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: '$(PYTHON)' is not Python 3.11 or newer: install one, then: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "make: '$(PYTHON)' has no venv module: on Debian and Ubuntu, apt install python3-venv" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(INSTALLED): requirements.txt pyproject.toml | $(BIN)/pip
	@echo "Installing into $(VENV), once: some GB and some minutes, most of it PyTorch."
	@$(PIP) install --quiet $(FROM) setuptools
	@$(PIP) install --quiet $(FROM) --no-build-isolation -e ".[notebooks,dev]"
	@touch $@

wheels: $(BIN)/pip ## fill the folder wheels/ for make setup WHEELS=wheels on a machine without internet
	$(PIP) wheel --quiet $(FROM) --wheel-dir wheels setuptools ".[notebooks,dev]"

demo: $(INSTALLED) ## train on built-in images with 2 processes, then plot: runs/demo/
	$(BIN)/ddp-launch train $(DEMO)
	$(BIN)/ddp-launch plot runs/demo
	@echo
	@echo "runs/demo/loss.png       the picture: loss by rank, test accuracy, images/s"
	@echo "runs/demo/cifar_net.pth  the trained weights"
	@echo "runs/demo/summary.json   accuracy, speed, versions"
	@echo "runs/demo/rank0.jsonl    one line per step; rank1.jsonl is that of the other process"

quick: lint ## lint, and the tests that start no process: less than a minute
	$(BIN)/python -m pytest -n logical $(PARALLEL) -m "not process"

# Each gets an environment of its own, as large as .venv.
PYTHONS ?= $(foreach n,11 12 13 14,python3.$(n)) $(wildcard $(HOME)/.pyenv/versions/3.1[1-9].*/bin/python)

versions: ## make quick with every Python from 3.11 that is installed, or those of PYTHONS=
	@found=$$(for python in $(PYTHONS); do \
	  "$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2], sys.executable)' 2>/dev/null || \
	  $(if $(filter file,$(origin PYTHONS)),true,echo "make: PYTHONS: '$$python' is no Python" >&2); \
	  done | sort -Vuk1,1); \
	test "$$found" || { echo "make: no Python found: name them, PYTHONS=/path/to/python3.12" >&2; exit 1; }; \
	echo "$$found"; \
	echo "$$found" | while read -r version python; do \
	  $(MAKE) quick PYTHON="$$python" VENV=".venv-$$version" </dev/null || exit; done && \
	echo "make quick passes with Python" $$(echo "$$found" | cut -d' ' -f1)

test: lint ## lint, all tests, and all notebooks against their committed outputs
	$(BIN)/python -m pytest -n auto $(PARALLEL) tests notebooks \
	  $(NBVAL) --nbval-sanitize-with notebooks/nbval_sanitize.cfg

notebooks: $(INSTALLED) ## only run and compare the notebooks, on one core and from another folder
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && cp notebooks/* "$$folder" && \
	  core=$$(command -v taskset >/dev/null && echo taskset -c 0 || true) && cd "$$folder" && \
	  $$core "$(CURDIR)/$(BIN)/python" -m pytest $(NBVAL) -p no:cacheprovider --nbval-sanitize-with nbval_sanitize.cfg .

lint: $(INSTALLED) ## check style, formatting, spelling, types and the Dockerfile
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy ddp_lib
	$(BIN)/hadolint Dockerfile

format: $(INSTALLED) ## format code and notebooks
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

# JupyterLab's own questions would cover cells, and a reader need not update what is pinned here.
LAB_SETTINGS := $(VENV)/share/jupyter/lab/settings/overrides.json

$(LAB_SETTINGS): | $(INSTALLED)
	@mkdir -p $(@D)
	@echo '{"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": false}}' > $@

# A work copy, so that running a notebook changes no tracked file. The kernels and the terminal find
# ddp-launch: a login shell, which JupyterLab takes where its output is no terminal, would forget the PATH.
lab: $(INSTALLED) $(LAB_SETTINGS) ## open your copy of the course, work/, in JupyterLab: ARGS=..., FRESH=1 for a new copy
	@$(BIN)/python -m ddp_lib.course copy notebooks work $(if $(FRESH),--fresh True)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/jupyter lab --ServerApp.root_dir="$(CURDIR)" \
	  --ServerApp.terminado_settings="shell_command=['$${SHELL:-/bin/sh}']" \
	  $$(test "$$(id -u)" != 0 || echo --allow-root) work/00_start_here.ipynb $(ARGS)

class: $(INSTALLED) ## write the course for a class to OUT=folder: student/ without solutions, teacher/ with a plan, slides/
	@test -n "$(OUT)" || { echo "make class OUT=FOLDER: no folder given" >&2; exit 1; }
	@$(BIN)/python -m ddp_lib.course class "$(OUT)"

site: $(INSTALLED) ## write the course as a web site to site/
	@$(BIN)/python -m ddp_lib.course site site

buttons: $(INSTALLED) ## write buttons for Colab, Kaggle, Codespaces, from the address in pyproject.toml
	@$(BIN)/python -m ddp_lib.course buttons

# Packages that only the benchmarks need are installed into .venv too, but change none of its versions.
BENCH_SETUP = $(PIP) install --quiet $(FROM) -r benchmarks/requirements.txt

bench: $(INSTALLED) ## run the short benchmarks on this machine and write benchmarks/RESULTS.md
	$(BENCH_SETUP)
	$(BIN)/python benchmarks/launch.py
	$(BIN)/python benchmarks/cells.py
	$(BIN)/python benchmarks/throughput.py
	$(BIN)/python benchmarks/resume.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/watch.py reading
	$(BIN)/python benchmarks/report.py

bench-full: $(INSTALLED) ## run all benchmarks, with more runs: DATA=folder of images, such as CIFAR-10's
	@test -d "$(DATA)/train" || { echo "make bench-full DATA=FOLDER: '$(DATA)' holds no train/<class>/*" >&2; exit 1; }
	$(BENCH_SETUP)
	$(BIN)/python benchmarks/launch.py --rounds 15 --later 10
	$(BIN)/python benchmarks/cells.py --rounds 50
	$(BIN)/python benchmarks/throughput.py --rounds 9
	$(BIN)/python benchmarks/resume.py --rounds 5
	$(BIN)/python benchmarks/scaling.py --full --steps 20
	$(BIN)/python benchmarks/watch.py reading
	$(BIN)/python benchmarks/many_ranks.py
	$(BIN)/python benchmarks/long_logs.py
	$(BIN)/python benchmarks/memory.py --data "$(DATA)"
	$(BIN)/python benchmarks/accuracy.py --data "$(DATA)"
	$(BIN)/python benchmarks/gpu.py --data "$(DATA)"
	if [ "$$(id -u)" = 0 ]; then \
	  $(BIN)/python benchmarks/network_setups.py && $(BIN)/python benchmarks/faults.py && \
	  $(BIN)/python benchmarks/watch.py sync; fi  # these need root
	$(BIN)/python benchmarks/report.py

# The interpreter that is named, else the project's own if it is there. Nothing is installed.
GPU_PYTHON := $(if $(filter command environment,$(origin PYTHON)),$(PYTHON),$(wildcard $(BIN)/python))

gpu: ## on a machine with a GPU: show in minutes that all works there; PYTHON= PARTS= REPORT=
	@$(or $(GPU_PYTHON),$(PYTHON)) benchmarks/on_gpu.py $(if $(PARTS),--parts $(PARTS)) \
	  $(if $(REPORT),--report $(REPORT)) $(GPU_FLAGS)

lock: $(INSTALLED) ## rewrite requirements.txt from pyproject.toml, with the newest versions
	@echo "# The whole environment, exact versions, for every platform and Python 3.11 or newer." > requirements.tmp
	@echo "# Made from pyproject.toml by: make lock" >> requirements.tmp
	$(BIN)/uv pip compile pyproject.toml --extra notebooks --extra dev --universal \
	  --python-version 3.11 --no-annotate --no-header --quiet >> requirements.tmp
	@mv requirements.tmp requirements.txt

clean: ## remove caches, but not .venv, data and runs
	rm -rf .mypy_cache .pytest_cache .ruff_cache build dist ./*.egg-info requirements.tmp
	find . -path ./$(VENV) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -print0 | xargs -0 rm -rf
