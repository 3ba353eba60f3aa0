# `make help` lists the targets. A bare machine needs bash, git, make and a
# Python of 3.11 or later with venv; everything else is installed into $(VENV).

PYTHON ?= python3
VENV ?= .venv
PYTEST_FLAGS ?=

SHELL := bash
BIN := $(VENV)/bin
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
PYTEST := -m pytest --numprocesses 2 --dist worksteal
TESTS := --ignore tests/tpu
SOURCES := $(wildcard tf_adascale tests examples benchmarks setup.py)

# Quiet runs; the library itself touches no environment variable.
export TF_CPP_MIN_LOG_LEVEL ?= 3

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo study test test-fast test-versions test-oldest test-newest \
	test-tpu lint types format bench soak clean distclean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s%s\n", $$1, $$2}' \
		$(MAKEFILE_LIST)

demo: $(VENV)/installed-demo  ## Train digits at S = 1 and S = 64 (out/demo)
	$(BIN)/python -m examples.digits.demo

study: $(VENV)/installed-demo  ## Train the five miniatures by the paper's algorithms (out/study)
	$(BIN)/python -m examples.studies.benchmarks
	$(BIN)/python -m examples.studies.imagenet_elastic
	$(BIN)/python -m examples.studies.digits_elastic

test: $(VENV)/installed-test  ## Run all tests but those for TPUs
	$(BIN)/python $(PYTEST) $(TESTS) $(PYTEST_FLAGS)

test-fast: $(VENV)/installed-test  ## Run the tests of the arithmetic and of the optimizers
	$(BIN)/python $(PYTEST) tests/ops tests/optimizers $(PYTEST_FLAGS)

test-versions: test-oldest test-newest  ## Run all tests on the oldest and the newest versions

test-oldest test-newest: test-%: out/versions/%/installed
	out/versions/$*/bin/python $(PYTEST) $(TESTS) $(PYTEST_FLAGS)

test-tpu: out/tpu/installed  ## Compile train steps for TPUs, without a TPU
	out/tpu/bin/python $(PYTEST) --dist loadfile $(PYTEST_FLAGS) \
		$(wildcard tests/tpu/*_test.py)

lint: $(VENV)/installed-dev  ## Check style and format
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: $(VENV)/installed-dev  ## Check types
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/installed-dev  ## Rewrite the sources in the common format
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: $(VENV)/installed-demo  ## Time a step of AdaScale, and of Adasum, against plain SGD
	$(BIN)/python -m benchmarks.step_time
	$(BIN)/python -m benchmarks.adasum_time

soak: $(VENV)/installed-demo  ## Train 20,000 steps on one worker, then on two: time, memory, progress
	$(BIN)/python -m benchmarks.soak --workers=1 --out=out/soak/one
	$(BIN)/python -m benchmarks.soak --out=out/soak

clean:  ## Remove outputs and caches
	rm -rf out dist *.egg-info .hypothesis .pytest_cache .ruff_cache
	find $(SOURCES) -name __pycache__ -prune -exec rm -rf {} +

distclean: clean  ## Remove the virtual environment too
	rm -rf $(VENV)

# A stamp per set of extras: installing again happens when setup.py changes.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-demo: EXTRAS := cpu,examples
$(VENV)/installed-test: EXTRAS := cpu,examples,test
$(VENV)/installed-dev: EXTRAS := cpu,examples,test,dev
$(VENV)/installed-%: setup.py tf_adascale/version.py | $(BIN)/python
	$(BIN)/python $(PIP_INSTALL) --editable ".[$(EXTRAS)]"
	touch $@

# The bounds of setup.py: the lowest versions of everything, and the highest of
# TensorFlow and Keras. tensorflow-metadata, which tensorflow-datasets needs,
# does not load beside this TensorFlow's protobuf from 1.21 on.
out/versions/oldest/installed: VERSIONS := tensorflow-cpu==2.18.1 \
	keras==3.10.0 numpy==1.26.4 absl-py==2.1.0 tensorflow-metadata==1.17.1
out/versions/newest/installed: VERSIONS := tensorflow-cpu==2.21.0 \
	keras==3.15.1
out/versions/%/installed: setup.py tf_adascale/version.py Makefile
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python $(PIP_INSTALL) --editable ".[cpu,examples,test]" \
		$(VERSIONS)
	touch $@

# The versions that export StableHLO, and whose programs this compiler takes.
out/tpu/installed: setup.py tf_adascale/version.py Makefile
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python $(PIP_INSTALL) --editable ".[cpu,test,test-tpu]" \
		tensorflow-cpu==2.21.0 keras==3.15.1
	touch $@
