# Each target sets up what it needs in .venv first (see .ci/setup); nothing else has to be installed by hand.
#   make test PYTHON=python3   uses that interpreter as it is and installs nothing.
#   JOBS=4                     test processes (default: the number of cores, at most 8)
#   ARGS="..."                 passed on to pytest, or to the benchmark
TARGETS := demo test test-gpu test-newest-jax offline lint bench docs dist

.PHONY: help $(TARGETS) clean

help:
	@echo "make demo             run the examples: attention in ten lines, your own mask and score function, training in JAX and in PyTorch, generating, also with transformers"
	@echo "make test             lint, type check and tests; on the GPU too if there is one"
	@echo "make test-gpu         the whole test suite on an NVIDIA GPU, the tests marked gpu first"
	@echo "make test-newest-jax  the CPU tests with the newest JAX, in an environment of its own"
	@echo "make offline          .venv-cuda, in which kernels are compiled on a machine without a GPU (make test makes it, too)"
	@echo "make lint             ruff and mypy"
	@echo "make bench            python -m bench run (ARGS=... for its arguments)"
	@echo "make docs             the documentation as HTML, in docs/_build/html"
	@echo "make dist             sdist and wheel, in dist"
	@echo "make clean            remove environments, caches and build products"

# Only a PYTHON given to make counts, not one that happens to be in the environment.
ifeq ($(origin PYTHON),command line)
export GIVEN_PYTHON := $(PYTHON)
else
export GIVEN_PYTHON :=
endif
export JOBS ARGS

$(TARGETS):
	@bash .ci/task $@

clean:
	rm -rf .venv .venv-cuda .venv-newest-jax .venv-bootstrap build dist docs/_build *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
