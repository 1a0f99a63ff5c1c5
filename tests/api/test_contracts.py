"""What every implementation is handed and hands back: by name, and of the shapes that the spec says."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_flash import autodiff
from pallas_flash.spec import Differentiable, Gradients, Operands, Others, Results
from pallas_flash.testing import problems

SPEC = dataclasses.replace(problems.find("everything").spec("float32"), dropout_moved=True)


def case():
    zeros = lambda shape: jnp.zeros(shape, jnp.float32)
    results = Results(zeros(SPEC.out_shape), zeros(SPEC.stats_shape))
    operands = problems.find("everything").operands("float32")
    return operands._replace(dropout_origin=np.arange(4, dtype=np.int32)), results, results


def test_an_operand_has_a_gradient_or_has_none():
    """Sinks are handed to a forward that takes them, and their gradient comes of a backward that has delta at hand;
    others get and make them beside their own.
    """
    assert Operands._fields == (*Differentiable._fields, *Others._fields, "sinks")
    assert Gradients._fields == (*(f"d{name}" for name in Differentiable._fields), "dsinks")


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "dropout_seed", "dropout_origin",
                                  "out", "stats", "dout", "dstats"])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_an_array_of_the_wrong_shape_is_named(implementation, name):
    """Regression: the backward of "xla" took the cotangent of statistics of any shape that broadcast."""
    operands, results, cotangents = case()
    cut = lambda x: x[..., :1] if x.shape[-1] > 1 else np.repeat(x, 2, -1)
    if name in Operands._fields:
        operands = operands._replace(**{name: cut(getattr(operands, name))})
    elif name in Results._fields:
        results = results._replace(**{name: cut(getattr(results, name))})
    else:
        cotangents = cotangents._replace(**{name[1:]: cut(getattr(cotangents, name[1:]))})
    with pytest.raises(ValueError, match=rf"{name} must have shape .* in AttentionSpec.* got {name}.shape="):
        autodiff.backward(SPEC, implementation, operands, results, cotangents)
