# Everything runs in $(VENV), which tools/setup_env.py creates and fills where that is still to be done.
VENV ?= .venv
# The first of these that is accepted; an unsuitable python3 alone is told by tools/setup_env.py.
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && exit; \
	done; echo python3)
# OpenMP's threads spin while they wait: beside other work on the same cores a step then takes ten times as long.
export OMP_WAIT_POLICY ?= PASSIVE
PYTEST_ARGS ?=
DEMO_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo imagenet-demo test test-fast test-natten clean

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 22
	@echo 'Variables: VENV=path (an environment of your own), PYTHON=python3.x, PYTEST_ARGS=..., DEMO_ARGS=...'

setup:  ## create .venv and install everything, once
	@$(PYTHON) tools/setup_env.py --venv '$(VENV)'

demo: setup  ## train and evaluate a small detector on drawn shapes; results in work_dirs/demo
	'$(VENV)/bin/python' tools/demo.py $(DEMO_ARGS)

imagenet-demo: setup  ## train a classifier on drawn images; results in work_dirs/imagenet_demo
	'$(VENV)/bin/python' tools/imagenet_demo.py $(DEMO_ARGS)

test: setup  ## run the whole test suite
	'$(VENV)/bin/python' -m pytest $(PYTEST_ARGS)

test-fast: setup  ## run the tests that take seconds
	'$(VENV)/bin/python' -m pytest -m 'not slow' $(PYTEST_ARGS)

test-natten: setup  ## build natten 0.17.5, some minutes, and run ContMix's tests with it
	'$(VENV)/bin/python' tools/setup_natten.py
	'$(VENV)/bin/python' -m pytest tests/overlock/ops/test_contmix.py $(PYTEST_ARGS)

clean:  ## remove .venv and what the tools left behind; work_dirs and compiled wheels stay
	rm -rf .venv *.egg-info build .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
