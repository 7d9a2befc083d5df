# Two commands: `make train` and `make test`. Both set up .venv first and re-use it afterwards.
# DEVICE=cpu or DEVICE=gpu chooses the machine; otherwise a GPU is used where an NVIDIA driver is found.
PYTHON ?= python3
PY := .venv/bin/python
CONFIG ?=
ARGS ?=
DEVICE ?=
export DEVICE
ifeq ($(DEVICE),cpu)
export CUDA_VISIBLE_DEVICES :=
endif

.PHONY: train test test-fast bench setup docs lint gpu-check wheel clean

train: setup
	$(PY) $(if $(CONFIG),-m igrpo.train --config $(CONFIG),scripts/quickstart.py) $(ARGS)

# Two processes take file after file, those first that took longest (tests/conftest.py). Their engines, learners and servers
# share the cores: igrpo/engines/servers/openmp.py.
test: export GOMP_SPINCOUNT ?= 1000
test: setup
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# The quick tests of what differs from main; with ARGS=--all every quick test, in less than two minutes on two cores.
test-fast: export GOMP_SPINCOUNT ?= 1000
test-fast: setup
	$(PY) scripts/touched_tests.py $(ARGS)

setup:
	@$(PYTHON) scripts/setup_env.py

# Against the committed record of this kind of machine; make bench ARGS=--record makes this run the record.
bench: setup
	$(PY) -m pytest benchmarks/ --guard $(ARGS)

# On a machine with a CUDA device: the kernel tests on it, then the figures, as one JSON record in benchmarks/results/.
# Anywhere: make gpu-check ARGS="--dry-run --output record.json" walks the same path under Triton's interpreter.
gpu-check: setup
	$(PY) scripts/gpu_check.py $(ARGS)

# One wheel for this platform, every Python and every torch >= 2.11, in dist/ (docs/building.md).
wheel: setup
	$(PY) scripts/build_wheel.py

# Writes docs/configuration.md and docs/api.md from the source.
docs: setup
	$(PY) scripts/write_docs.py

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf .venv build dist *.egg-info
