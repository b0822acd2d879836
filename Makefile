# Everything runs in $(VENV), which tools/setup creates and fills where that is still to be done.
VENV ?= .venv
# The first of these that is supported; tools/setup refuses an unsupported python3 with a sentence.
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && exit; \
	done; echo python3)
# This checkout's code, though an environment of your own may have the package from elsewhere.
RUN = PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" '$(VENV)/bin/python'
BIN = $(abspath $(VENV))/bin
# As overlock/utils/threads.py, also for what does not call it.
ifndef OMP_WAIT_POLICY
export GOMP_SPINCOUNT ?= 30000
endif
# Without bytecode on disk every process compiles torch and OpenMMLab anew, which takes several seconds.
unexport PYTHONDONTWRITEBYTECODE
# Two processes with a thread each; files stay whole, as some share a trained network.
PYTEST = OMP_NUM_THREADS=1 PYTEST_ADDOPTS="-n 2 --dist loadfile $$PYTEST_ADDOPTS" $(RUN) -m pytest
PYTEST_ARGS ?=
AUDIT_ARGS ?=
DEMO_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup lock demo imagenet-demo lint audit test test-slow test-natten clean

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 22
	@echo 'Variables: VENV=path (an environment of your own), PYTHON=python3.x, PYTEST_ARGS=..., DEMO_ARGS=...'

setup:  ## create .venv and install everything, once
	@$(PYTHON) tools/setup/environment.py '$(VENV)'

lock: setup  ## pin requirements/lock.in anew, as far as it changed; LOCK_ARGS=--upgrade takes the newest
	$(RUN) -m uv pip compile requirements/lock.in --output-file requirements/lock.txt --universal --python-version 3.10 \
		--generate-hashes --no-annotate --no-emit-index-url --no-emit-find-links --custom-compile-command 'make lock' \
		--quiet $(LOCK_ARGS)

demo: setup  ## train and evaluate a small detector on drawn shapes; results in work_dirs/demo
	$(RUN) tools/demo.py $(DEMO_ARGS)

imagenet-demo: setup  ## train a classifier on drawn images; results in work_dirs/imagenet_demo
	$(RUN) tools/imagenet_demo.py $(DEMO_ARGS)

lint: setup  ## check style, formatting, types, shell scripts and the generated parts of the documents
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	'$(BIN)/shellcheck' .ci/run tools/*.sh benchmarks/*.sh
	$(RUN) tools/update_docs.py --check

audit:  ## look the pins of lock.txt for $(PYTHON) up among known vulnerabilities, on the network
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet pip-audit==2.10.1
	build/audit/bin/pip-audit --requirement requirements/lock.txt --disable-pip --strict $(AUDIT_ARGS)

test: setup  ## run the tests that take seconds
	$(PYTEST) -m 'not slow' $(PYTEST_ARGS)

test-slow: setup  ## run the tests that take longer
	$(PYTEST) -m slow $(PYTEST_ARGS)

test-natten: setup  ## build natten 0.17.5, some minutes, and run ContMix's tests with it
	$(RUN) -m pip install cmake ninja wheel
	PATH="$(BIN):$$PATH" NATTEN_N_WORKERS=$$(nproc) $(RUN) -m pip install \
		--no-build-isolation --no-deps --no-cache-dir natten==0.17.5
	$(RUN) -m pytest tests/overlock/ops/test_contmix.py $(PYTEST_ARGS)

clean:  ## remove .venv and what the tools left behind; work_dirs and compiled wheels stay
	rm -rf .venv *.egg-info build .coverage .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
