# The course in two commands: `make lab` opens it, `make test` proves it.  `make help` lists the rest.
# Both make what they need (.venv, compiled llama.cpp) the first time, in about ten minutes; after that a stamp
# file tells that nothing changed.  README.md has the same steps in plain pip.

SHELL   := /bin/bash
PYTHON  ?= python3
VENV    ?= .venv
# llama.cpp for the GPU where there is one and a compiler for it: a toolkit without a GPU is often incomplete
CUDA    ?= $(shell nvidia-smi -L >/dev/null 2>&1 && command -v nvcc >/dev/null 2>&1 && echo ON || echo OFF)
WORKERS ?= 2
PY      := $(VENV)/bin/python
PIP     := $(PY) -m pip --disable-pip-version-check
INPUTS  := pyproject.toml constraints.txt

# llama.cpp is compiled from llama-cpp-python's own source, with its command line tools, which look for the
# shared libraries beside them: $ORIGIN is for the loader, hence the quoting.
LLAMA_CMAKE := -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=ON -DLLAMA_TOOLS_INSTALL=ON -DLLAMA_BUILD_SERVER=OFF \
	-DLLAMA_OPENSSL=OFF -DGGML_CUDA=$(CUDA) -DCMAKE_INSTALL_RPATH=$$ORIGIN/../lib

.DEFAULT_GOAL := help
.PHONY: help lab test check notebooks results doctor install install-test clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|' 2>/dev/null \
		|| grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST)

lab: $(VENV)/.lab ## open JupyterLab on the start page (ARGS="--port 9999" passes options on)
	$(PY) -m qtutor lab $(ARGS)

test: $(VENV)/.test ## every test: units, recipes, exercises, a real browser, each notebook twice, network off
	$(PY) -m ruff check .
	QTUTOR_PROFILE=$${QTUTOR_PROFILE:-quick} $(PY) tests/offline.py -m pytest tests notebooks \
		--nbmake --nbmake-timeout=300 --notebook-runs=2 -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(VENV)/.test ## ruff, the canonical form of the notebooks, README's tables in step with data/results
	$(PY) -m ruff check .
	$(PY) -m qtutor notebooks check
	$(PY) -m qtutor results check

notebooks: $(VENV)/.test ## execute the notebooks (ONLY="01 05" picks) and restore their canonical form
	$(PY) -m qtutor notebooks run $(ONLY)

results: $(VENV)/.test ## measure again what this machine can (ONLY="08" picks), then README's tables and data/results/README.md
	$(PY) -m qtutor results record $(ONLY)

doctor: $(VENV)/.lab ## what works on this machine, and what to do about the rest
	$(PY) -m qtutor doctor

install: $(VENV)/.lab ## only create .venv

install-test: $(VENV)/.test ## only create .venv, with what the tests need

clean: ## remove .venv, caches and test artefacts (not the model, not the results)
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache test-artifacts build *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

# ---- what lab and test stand on --------------------------------------------------------------------------

$(VENV)/.lab: $(INPUTS) $(VENV)/.torch
	$(call install,.)
	@touch $@

$(VENV)/.test: $(INPUTS) $(VENV)/.torch
	$(call install,.[test])
	@touch $@ $(VENV)/.lab

define install
	@echo "Installing the course (llama.cpp is compiled the first time: about ten minutes on two cores) ..."
	@CMAKE_ARGS='$(LLAMA_CMAKE)' $(PIP) install --quiet -c constraints.txt -e '$(1)'
	@$(PIP) check >/dev/null || $(PIP) check
endef

# torch first, and by itself: a machine without an NVIDIA GPU gets the CPU wheel (200 MB instead of several GB).
# Where download.pytorch.org cannot be reached, pip takes what its own configuration offers.
$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
	@if nvidia-smi -L >/dev/null 2>&1; then \
		$(PIP) install --quiet -c constraints.txt torch; \
	else \
		$(PIP) install --quiet --retries 0 --timeout 5 -c constraints.txt \
			--extra-index-url https://download.pytorch.org/whl/cpu torch; \
	fi
	@touch $@

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null 2>&1 \
		|| { echo "$(PYTHON) was not found: install Python 3.11, 3.12 or 3.13, or name one with 'make PYTHON=...'."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "$$($(PYTHON) --version) cannot run the course: use Python 3.11, 3.12 or 3.13, named with 'make PYTHON=...'."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "$(PYTHON) lacks the venv module: install it (Debian, Ubuntu: apt-get install python3-venv)."; exit 1; }
	@{ command -v $${CC:-cc} || command -v gcc || command -v clang; } >/dev/null 2>&1 \
		&& { command -v $${CXX:-c++} || command -v g++ || command -v clang++; } >/dev/null 2>&1 \
		|| { echo "There is no C++ compiler, which llama.cpp needs: install one (Debian, Ubuntu: apt-get install build-essential; macOS: xcode-select --install)."; exit 1; }
	@$(PYTHON) -m venv $(VENV)
