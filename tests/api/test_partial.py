"""Results of parts of a sum (`AttentionSpec.partial`): they are not rounded to the operands' dtype."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import with_rest

from pallas_flash import autodiff
from pallas_flash.spec import AttentionSpec, Results
from pallas_flash.testing import conformance, inputs, problems

pytestmark = pytest.mark.usefixtures("small_tiles")
PROBLEM = problems.find("everything")


def partial(dtype="bfloat16"):
    return dataclasses.replace(PROBLEM.spec(dtype), partial=True)


def gradients(spec, implementation, operands, cotangents):
    """out, and the gradients from out in the operands' dtype: all that is rounded where results are not partial."""
    out, stats = autodiff.forward(spec, implementation, operands)
    dout, dlse = cotangents
    found = autodiff.backward(spec, implementation, operands, Results(out.astype(spec.dtype), stats),
                              Results(dout, with_rest(dlse)))
    return {"out": out, **dict(list(found._asdict().items())[:4])}  # there is no score function


@functools.cache
def oracle():
    return conformance.oracle(PROBLEM, *conformance.random_case(PROBLEM, "bfloat16"))


def error(name, found):
    return np.sqrt(np.mean(np.square(np.asarray(found[name], np.float64) - getattr(oracle(), name))))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_partial_results_err_less_than_rounded_ones(implementation):
    case = conformance.random_case(PROBLEM, "bfloat16")
    rounded = gradients(PROBLEM.spec("bfloat16"), implementation, *case)
    found = gradients(partial(), implementation, *case)
    for name, x in found.items():
        assert (x.dtype, rounded[name].dtype) == (jnp.float32, jnp.bfloat16), name
        assert error(name, found) < 0.9 * error(name, rounded), name


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_results_of_float64_stay_so(implementation, x64):
    operands, cotangents = conformance.random_case(PROBLEM, "float64")
    run = lambda operands: gradients(partial("float64"), implementation, operands, cotangents)
    found = jax.eval_shape(run, operands)
    assert {x.dtype for x in found.values()} == {np.dtype("float64")}


def test_empty_results_have_the_dtype_too():
    q, k = (jax.ShapeDtypeStruct((1, n, 2, 8), jnp.bfloat16) for n in (3, 0))
    spec = AttentionSpec.of(q, k, k, partial=True)
    operands = inputs.operands(spec, spec.mask)
    found = gradients(spec, "xla", operands, inputs.cotangents(spec))
    found.pop("dbias")
    assert {x.dtype for x in found.values()} == {jnp.dtype("float32")}


def test_a_spec_says_what_it_returns():
    spec = partial()
    assert (spec.result_dtype, spec.dtype, PROBLEM.spec("bfloat16").result_dtype) == ("float32", "bfloat16", "bfloat16")
    assert str(spec).endswith(", partial)")
    assert spec != PROBLEM.spec("bfloat16")
