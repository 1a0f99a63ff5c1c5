"""Fixtures of the torch tests: a fixed seed, and quick compilation on a CPU."""

import jax
import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="package")
def quick_compilation():
    """On a CPU most of these tests' time is XLA's optimisation of problems that are small; it is switched off."""
    jax.config.update("jax_disable_most_optimizations", jax.default_backend() == "cpu")
    yield
    jax.config.update("jax_disable_most_optimizations", False)
