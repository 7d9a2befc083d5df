# Two commands: `make train` and `make test`. Both set up .venv first and re-use it afterwards.
PYTHON ?= python3
PY := .venv/bin/python
CONFIG ?= recipes/quickstart.yaml
ARGS ?=

.PHONY: train test setup lint clean

train: setup
	$(PY) -m igrpo.train --config $(CONFIG) $(ARGS)

test: setup
	$(PY) -m pytest $(ARGS)

setup:
	@$(PYTHON) scripts/setup_env.py

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf .venv build *.egg-info
