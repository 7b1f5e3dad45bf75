PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
WORKERS ?= auto
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test test-fast test-nightly test-oldest test-wheel test-notebooks test-wild table lint format notebooks docs clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY)  ## train a small network on real images, in float and compressed: a few minutes
	$(BIN)/selfcompress demo $(ARGS)

test: $(READY)  ## all tests but the nightly ones, on all cores: about twelve minutes on two
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-fast: $(READY)  ## what needs no fit, no ONNX and no process of its own: under two minutes on two cores
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m 'not (fit or onnx or process or long or nightly)' $(ARGS)

test-nightly: $(READY)  ## long runs on real data: needs SELFCOMPRESS_DATA or a network
	$(BIN)/python -m pytest -m nightly $(ARGS)

test-oldest:  ## the tests on the oldest versions that work (downloads CUDA packages on Linux)
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

test-wheel:  ## build the wheel, install it without extras in a new environment, and try it there
	bash tests/wheel/smoke.sh $(PYTHON) $(CONSTRAINTS)

test-notebooks:  ## run every notebook with fast settings, from a wheel in a new environment
	bash tests/notebooks/run.sh $(PYTHON) $(CONSTRAINTS)

test-wild: .venv-wild/.ready  ## models of other packages through whole fits, to docs/models.md: about ten minutes
	OMP_NUM_THREADS=1 .venv-wild/bin/python tests/wild/run.py $(ARGS)

table: $(READY)  ## docs/compatibility.md from the tests
	$(BIN)/python -m pytest -m 'case' --write-table

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## what ruff can mend by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: $(READY)  ## run the notebooks in full and keep their outputs: about half an hour
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/jupyter-execute --inplace --timeout=-1 notebooks/*.ipynb

docs: $(VENV)/.docs-ready  ## the documentation as a site, to build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(READY): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev]'
	touch $(READY)

$(VENV)/.docs-ready: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[docs]'
	touch $(VENV)/.docs-ready

.venv-wild/.ready: pyproject.toml $(CONSTRAINTS) requirements-wild.txt
	test -x .venv-wild/bin/python || $(PYTHON) -m venv .venv-wild
	.venv-wild/bin/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e . -r requirements-wild.txt
	touch .venv-wild/.ready

clean:  ## environments, builds and caches
	rm -rf .venv .venv-oldest .venv-wild build dist *.egg-info
