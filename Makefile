# The tasks of this project. `make demo` and `make test` set up .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test test-fast check bench bench-speed bench-export bench-quality clean

demo: $(VENV)/.all
	$(BIN)/gptedge demo

# Everything, the slow tests included. `make test-fast` leaves those out.
test: check
	$(BIN)/python -m pytest -q --durations=15

test-fast: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m "not slow"

# The packages lie in top-level folders and install under one name; mypy follows them through a tree of links.
check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types && mkdir -p build/types/gptedge
	ln -s $(CURDIR)/gptedge/* build/types/gptedge/
	ln -s $(CURDIR)/export $(CURDIR)/quantize $(CURDIR)/tui build/types/gptedge/
	MYPYPATH=build/types $(BIN)/mypy -p gptedge

# Side by side with peers, which get environments of their own: best on an idle machine.
bench: bench-speed bench-export bench-quality

bench-speed: $(VENV)/.dev
	$(BIN)/python benchmarks/speed.py

bench-export: $(VENV)/.dev
	$(BIN)/python benchmarks/export.py

bench-quality: $(VENV)/.dev
	$(BIN)/python benchmarks/quality.py

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "gptedge needs Python 3.11 or later; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.all: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[all]'
	touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info demo .pytest_cache .mypy_cache .ruff_cache
