"""What `xla` gives a compiler: copies of a step, products, and nothing to compute before the program runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from pallas_flash import ALiBi, Causal, flash_attention

LENGTH = 1536  # three tiles of 512


def equations(jaxpr):
    """Every equation, with those of what is called."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def both(q, dout, **keywords):
    out, vjp = jax.vjp(functools.partial(flash_attention, mask=Causal(), implementation="xla", **keywords), q, q, q)
    return out, vjp(dout)


@pytest.mark.parametrize("name, products", [("plain", 2 + 3 + 5 + 8), ("bias", 3 + 8), ("score", 3 + 8)])
def test_each_kind_of_tile_is_compiled_once(name, products):
    """Regression: the step of masked tiles was there twice in each pass, for tiles before and after the full ones, and
    a third time where a bias or a score function hides pairs of any tile."""
    keywords = {"plain": {}, "score": dict(score=ALiBi(np.ones(2, np.float32))),
                "bias": dict(bias=jnp.zeros((1, 2, LENGTH, LENGTH), jnp.bfloat16))}[name]
    q = jax.ShapeDtypeStruct((1, LENGTH, 2, 64), jnp.bfloat16)
    found = [equation for equation in equations(jax.make_jaxpr(functools.partial(both, **keywords))(q, q).jaxpr)
             if equation.primitive.name == "dot_general"]
    assert len(found) == products


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_no_product_of_16_bit_operands_is_a_precise_one(dtype):
    """Regression: what counts values that are not finite multiplied in float32 to the last bit."""
    q = jax.ShapeDtypeStruct((1, LENGTH, 2, 64), dtype)
    for equation in equations(jax.make_jaxpr(both)(q, q).jaxpr):
        if equation.primitive.name == "dot_general":
            assert all(x.aval.dtype.itemsize == 2 for x in equation.invars), equation


def test_nothing_is_computed_of_constants_while_compiling():
    """Regression: of a bias that a function closes over, the compiler took the largest number of each row by itself,
    and kept the bias and parts of it seven times."""
    bias = np.random.default_rng(0).standard_normal((1, 2, LENGTH, LENGTH)).astype(np.float32)
    q = jax.ShapeDtypeStruct((1, LENGTH, 2, 64), jnp.bfloat16)
    text = jax.jit(functools.partial(both, bias=bias)).lower(q, q).compile().as_text()
    constants = [line for line in text.splitlines() if " constant(" in line and f"{LENGTH},{LENGTH}" in line]
    assert len(constants) == 1, constants
