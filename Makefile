# Everything runs in .venv, made on the first call; nothing else on the machine is touched.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
DEMO   := .demo
BROWSER := .browser

# Tests run side by side, one torch thread each: on few cores that is faster than one process with many threads.
PYTEST_FLAGS ?= --numprocesses auto --maxprocesses 4 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test test-native test-gpu test-cuda-simulated test-jax test-triton test-triton-older test-triton-older-compiled test-browser check docs fix bench clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

# A file stands for each state of the environment, so that a second call has nothing to do.
$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.made pyproject.toml constraints.txt setup.py $(wildcard neoquant/native/*.[ch])
	@echo "installing neoquant into $(VENV) (torch is large: the first time takes minutes)"
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable '.[test]'
	@touch $@

$(VENV)/.installed-check: $(VENV)/.installed
	$(PIP) --editable '.[check]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) --editable '.[docs]'
	@touch $@

demo: $(VENV)/.installed  ## quantize the bundled model to NF4, compare it with the original, generate some text
	$(BIN)/neoquant quantize --bits 4 --type nf4 --out $(DEMO)/neoquant-demo-nf4 --force
	$(BIN)/neoquant compare neoquant-demo $(DEMO)/neoquant-demo-nf4 --suite demo
	$(BIN)/neoquant generate $(DEMO)/neoquant-demo-nf4 --prompt "def mean(values):" --max-new-tokens 80 --seed 1

$(VENV)/.installed-jax: $(VENV)/.installed-test
	$(PIP) --editable '.[jax]'
	@touch $@

test: $(VENV)/.installed-test  ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS)

test-gpu: $(VENV)/.installed-test  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

# A device that is not there: tests/simulated_cuda/device.py
test-cuda-simulated: $(VENV)/.installed-test  ## the tests that need a CUDA device, on a simulated one
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS) -p simulated_cuda.plugin -m gpu

# Each program runs once or twice: optimizing it takes longer than it saves.
test-jax: $(VENV)/.installed-jax  ## the tests of the JAX models
	OMP_NUM_THREADS=1 JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS) tests/unit/test_jax.py

$(VENV)/.installed-triton: $(VENV)/.installed-test
	$(PIP) --editable '.[triton]'
	@touch $@

# Programs in Triton's interpreter, then compiled ahead of time: no GPU is needed for either.
test-triton: $(VENV)/.installed-triton  ## the tests of the kernels written in Triton
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest $(PYTEST_FLAGS) tests/triton_kernels
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS) tests/triton_kernels/test_compiled.py

# That of torch 2.11, beside the other one. Its interpreter does not run with a newer numpy.
$(VENV)/triton-3.6: $(VENV)/.installed-triton
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --target $@ triton==3.6.0 'numpy>=2.2,<2.4'

test-triton-older: $(VENV)/triton-3.6 test-triton-older-compiled  ## the same with Triton 3.6
	PYTHONPATH=$< OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest $(PYTEST_FLAGS) tests/triton_kernels

test-triton-older-compiled: $(VENV)/triton-3.6  ## and of these those that compile ahead of time alone
	PYTHONPATH=$< OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS) tests/triton_kernels/test_compiled.py

# npm fetches transformers.js and the ONNX Runtime that it depends on, without running their scripts.
$(BROWSER)/.installed: Makefile
	npm install --prefix $(BROWSER) --ignore-scripts --no-audit --no-fund @huggingface/transformers@4.3.2
	@touch $@

test-browser: $(VENV)/.installed-test $(BROWSER)/.installed  ## the guide's web page in headless Chromium; needs npm and chromium
	NEOQUANT_BROWSER=$(BROWSER) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/browser

# A C compiler is all that it takes.
test-native:  ## the C library under ThreadSanitizer, AddressSanitizer and UndefinedBehaviorSanitizer
	tests/native/run.sh

check: $(VENV)/.installed-check  ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: $(VENV)/.installed-check  ## format, and mend what lint can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed-test  ## the measurements behind the README's figures
	@for script in eval/bench/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

docs: $(VENV)/.installed-docs  ## the API reference, from the docstrings: build/api/neoquant.html
	$(BIN)/pdoc --output-directory build/api neoquant

clean:  ## remove the environment and everything made
	rm -rf $(VENV) $(DEMO) $(BROWSER) build dist *.egg-info neoquant/native/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
