"""What conftest does beside the tests."""

import jax
import jax.numpy as jnp

from tests import conftest


def test_programs_are_freed_before_there_are_too_many():
    """Regression: at 65,530 ranges of memory a compilation ended a test process with a segmentation fault."""
    program = jax.jit(lambda x: x + 1)
    program(jnp.ones(3))
    conftest.free_programs(most=10**9)
    assert program._cache_size() == 1
    conftest.free_programs(most=0)
    assert program._cache_size() == 0
