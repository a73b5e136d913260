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
# test-gpu runs where somebody else has installed things, too
HERE     = $(if $(wildcard $(PY)),$(PY),$(PYTHON))
JOBS    ?= 1
LIMIT   ?= 1800

# llama.cpp is compiled from llama-cpp-python's own source, with its command line tools, which look for the
# shared libraries beside them: $ORIGIN is for the loader, hence the quoting.  Without its AMX kernels: GCC 12 compiles
# the load of their tile configuration wrongly, and on a CPU that has AMX every quantized product then ends the process
# with "illegal instruction".
LLAMA_CMAKE := -DCMAKE_C_FLAGS=-U__AMX_INT8__ -DCMAKE_CXX_FLAGS=-U__AMX_INT8__ -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=ON \
	-DLLAMA_TOOLS_INSTALL=ON -DLLAMA_BUILD_SERVER=ON -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF -DGGML_CUDA=$(CUDA) -DCMAKE_INSTALL_RPATH=$$ORIGIN/../lib

.DEFAULT_GOAL := help
.PHONY: help lab test quick test-gpu check notebooks times new renumber results llmc-env serve-gpu site links editions axe update doctor install install-test clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|' 2>/dev/null \
		|| grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST)

lab: $(VENV)/.converter ## open JupyterLab on the start page (ARGS="--port 9999" passes options on)
	$(PY) -m qtutor lab $(ARGS)

test: $(VENV)/.vocabularies ## every test: units, recipes, exercises, a real browser, each notebook twice, network off
	$(PY) -m ruff check .
	QTUTOR_PROFILE=$${QTUTOR_PROFILE:-quick} $(PY) tests/offline.py -m pytest tests notebooks \
		--nbmake --nbmake-timeout=600 --notebook-runs=2 -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

quick: $(VENV)/.vocabularies ## what fits in two minutes: ruff, units, the form of the notebooks
	$(PY) -m ruff check .
	$(PY) -m pytest tests -m "not slow and not gpu" -n $(WORKERS) $(ARGS)

test-gpu: ## on a machine with a GPU: its tests, then every notebook (JOBS=2 side by side) and recipe at full size
	@status=0; set -x; export QTUTOR_PROFILE=full; \
	$(HERE) -m pytest -m gpu --continue-on-collection-errors tests $(ARGS) || [ $$? = 5 ] || status=1; \
	$(HERE) -m tools.notebooks time --jobs $(JOBS) --limit $(LIMIT) $(ONLY) || status=1; \
	$(HERE) -m pytest tests/test_recipes.py $(ARGS) || status=1; \
	exit $$status

check: $(VENV)/.test ## ruff, the canonical form of the notebooks, README's tables in step with data/results
	$(PY) -m ruff check .
	$(PY) -m tools.notebooks check
	$(PY) -m tools.report check

notebooks: $(VENV)/.test ## execute the notebooks (ONLY="01 qat" picks) and restore their canonical form
	$(PY) -m tools.notebooks run $(ONLY)

times: $(VENV)/.test ## run every notebook and record what it takes: the lines "to run" come from there
	$(PY) -m tools.notebooks time $(ONLY)
	$(PY) -m tools.notebooks restore
	$(PY) -m tools.report write

new: $(VENV)/.test ## a new notebook with all its parts: make new NAME=04b_topic TITLE="Its title"
	$(PY) -m tools.notebooks new "$(NAME)" "$(TITLE)"

renumber: $(VENV)/.test ## number the notebooks in the order of their files' names (add 04b_topic.ipynb), links and all
	$(PY) -m tools.notebooks renumber

results: $(VENV)/.test ## measure again what this machine can (ONLY="gguf_quality" picks), then README and the page of results
	$(PY) -m tools.report record $(ONLY)

llmc-env: $(VENV)/.test ## llm-compressor in an environment of its own, and here what reads its files (ONLY=ptq_official needs it)
	$(PYTHON) -m venv .venv-llmc && .venv-llmc/bin/python -m pip install --quiet "torch==2.13.0" \
		--extra-index-url https://download.pytorch.org/whl/cpu "llmcompressor==0.14.0.1"
	$(PIP) install --quiet -c constraints.txt "compressed-tensors>=0.20,<0.21"

serve-gpu: ## vLLM in an environment of its own, on a machine with an NVIDIA GPU (notebook 11)
	$(PYTHON) -m venv .venv-vllm && .venv-vllm/bin/python -m pip install --quiet "vllm>=0.26"

site: $(VENV)/.test ## the course as a static book, build/site (REPOSITORY=owner/name adds Colab and Codespaces buttons)
	REPOSITORY=$(REPOSITORY) $(PY) -m tools.site build

links: $(VENV)/.test ## ask for every address that the notebooks cite: a dated report, build/links.md
	$(PY) -m tools.site links

editions: $(VENV)/.test ## notebooks for students and for teachers, and slides: build/student, build/instructor, build/slides
	$(PY) -m tools.editions --student build/student --instructor build/instructor --slides build/slides

axe: $(VENV)/.test ## site and notebooks in a browser with axe, which npm brings: no serious complaint about accessibility
	npm install --silent --prefix build/axe axe-core
	$(PY) -m pytest tests/tools/test_site.py tests/test_browser.py -k "in_a_browser or axe"

update: $(VENV)/.test ## propose newer pins in constraints.txt, within pyproject.toml's bounds; make test decides
	$(PY) -m tools.pins

doctor: $(VENV)/.lab ## what works on this machine, and what to do about the rest
	$(PY) -m qtutor doctor

install: $(VENV)/.converter ## only create .venv

install-test: $(VENV)/.vocabularies ## only create .venv, with what the tests need

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

# llama.cpp's own converter, for other families than the course's: without a network one sentence, and the rest works
$(VENV)/.converter: $(VENV)/.lab
	@$(PY) -m tools.llamacpp_source && touch $@ || true

$(VENV)/.vocabularies: $(VENV)/.test
	@$(PY) -m tools.llamacpp_source --vocabularies && touch $@ $(VENV)/.converter || true

define install
	@echo "Installing the course (llama.cpp is compiled the first time: about ten minutes on two cores) ..."
	@CMAKE_ARGS='$(LLAMA_CMAKE)' $(PIP) install --quiet -c constraints.txt -e '$(1)'
	@$(PIP) check >/dev/null || $(PIP) check
endef

# torch first, and by itself: a machine without an NVIDIA GPU gets the CPU wheel (200 MB instead of several GB).
# Where download.pytorch.org cannot be reached, pip takes what its own configuration offers.
$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
	@if [ "$(CUDA)" = ON ] || nvidia-smi -L >/dev/null 2>&1; then \
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
