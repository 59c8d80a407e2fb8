# make demo   quantise the bundled model five ways, offline, and compare (three minutes on two cores)
# make test   the whole test suite
# make lint   style only
PYTHON ?= python3
PYTEST_FLAGS ?= -q -rs -n auto --dist loadfile --no-loadscope-reorder
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
RECIPE := pyproject.toml setup.py constraints.txt

.PHONY: demo test lint install clean

demo: $(VENV)/.base
	HF_HUB_OFFLINE=1 $(BIN)/hf-qep demo

# Compiled files of the package are kept, for many tests start processes of their own.
test: $(VENV)/.dev
	HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest $(PYTEST_FLAGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

install: $(VENV)/.dev

clean:
	rm -rf $(VENV)

# torch first and alone: the largest download is then never resolved twice, and a CPU build already present is kept.
$(VENV)/.base: $(RECIPE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch==2.13.0
	$(PIP) install -q -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) install -q -c constraints.txt -e '.[dev,eval,bench,space,gpu,distill,gguf,agent]'
	touch $@
