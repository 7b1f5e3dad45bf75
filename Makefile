PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-nightly test-oldest table lint format notebooks clean

demo: $(READY)  ## train a small network on real images, in float and compressed
	$(BIN)/selfcompress demo $(ARGS)

test: $(READY)  ## the tests, in minutes
	$(BIN)/python -m pytest $(ARGS)

test-nightly: $(READY)  ## long runs on real data: needs SELFCOMPRESS_DATA or a network
	$(BIN)/python -m pytest -m nightly $(ARGS)

test-oldest:  ## the tests on the oldest versions that work (downloads CUDA packages on Linux)
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

table: $(READY)  ## docs/compatibility.md from the tests
	$(BIN)/python -m pytest -m 'case' --write-table

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: $(READY)  ## run the notebooks and keep their outputs
	$(BIN)/jupyter-execute --inplace notebooks/*.ipynb

$(READY): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev]'
	touch $(READY)

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info
