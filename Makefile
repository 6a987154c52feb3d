# `make` lists the targets. Each sets up .venv by itself when something it needs has changed.
# PYTHON is the Python to start from, ARGS goes on to the command a target runs. The demo spares
# itself the CUDA kernels where there is no GPU to run them; the tests read their machine code.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
DEVICE ?= cpu

.DEFAULT_GOAL := help
.PHONY: help setup demo test bench gpu docs format clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{ printf "%-8s %s\n", $$1, $$2 }'

setup:  ## make .venv: PyTorch, the other requirements, the extension built
	@$(PYTHON) scripts/setup_environment.py $(VENV)

demo:  ## check every op, benchmark quickly, train a small language model (minutes)
	@$(PYTHON) scripts/setup_environment.py --cpu $(VENV)
	$(RUN) -m kexue_kernels selfcheck
	$(RUN) -m kexue_kernels bench --quick --out out/bench
	$(RUN) examples/char_lm.py --seconds 120 $(ARGS)

test: setup  ## ruff, mypy and every test that needs no GPU
	@scripts/test $(ARGS)

bench: setup  ## the whole benchmark, written to benchmarks/results (DEVICE=cpu or cuda)
	$(RUN) -m kexue_kernels bench --device $(DEVICE) --out benchmarks/results/$(DEVICE) $(ARGS)
	$(RUN) scripts/measured.py

gpu:  ## on a machine with a GPU: build, test, sanitize, benchmark (GPU_SECONDS=540)
	@$(PYTHON) scripts/gpu.py $(ARGS)

docs:  ## the documentation, into site/
	@$(PYTHON) scripts/setup_environment.py $(VENV) docs
	$(RUN) -m mkdocs build --strict

format: setup  ## ruff's formatter and its safe fixes
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

clean:  ## remove what the other targets made, .venv included
	rm -rf $(VENV) build dist site out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f kexue_kernels/_C*.so
	find kexue_kernels tests benchmarks examples scripts -name __pycache__ -prune -exec rm -rf {} +
