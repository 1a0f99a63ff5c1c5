"""The launch that makes dropout's keys: the words are those that XLA makes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # where the interpreter says whether it saw a race

from pallas_flash import device
from pallas_flash.kernels.hopper import calls
from pallas_flash.kernels.mosaic import dropout, dropout_keys
from pallas_flash.kernels.mosaic.interpret import interpreted
from pallas_flash.spec import AttentionSpec, Operands

SHAPES = (1, 1), (3, 5), (9, 20)
"""(batch, heads), also of more pairs than a block has threads."""


def case(batch, heads):
    x = jax.ShapeDtypeStruct((batch, 64, heads, 64), "bfloat16")
    spec, seed = AttentionSpec.of(x, x, x, dropout_rate=0.25), jnp.asarray([7, 2**32 - 5], jnp.uint32)
    (wanted,) = dropout.inputs(spec, Operands(*(None,) * 7, seed, None, None))
    return spec, seed, np.asarray(wanted)


@pytest.mark.interpreted
@pytest.mark.parametrize("shape", SHAPES)
def test_its_words_are_those_of_xla(shape):
    spec, seed, wanted = case(*shape)
    launch = dropout_keys.launch(spec)
    with interpreted(detect_races=True):
        (found,) = jax.jit(launch.kernel)(seed)
    np.testing.assert_array_equal(np.asarray(found), wanted)
    assert launch.outputs.keys() == {"dropout_keys"} and not gpu_callbacks.get_races().races_found


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_its_words_on_a_gpu(shape):
    spec, seed, wanted = case(*shape)
    (found,) = jax.jit(dropout_keys.launch(spec).kernel)(seed)
    np.testing.assert_array_equal(np.asarray(found), wanted)


def test_another_runtime_launches_it_first():
    """In both passes."""
    spec, _, _ = case(3, 5)
    for found in calls.passes(spec, device.H200):
        assert "dropout_keys" not in found.inputs and found.launches[0].inputs == ("dropout_seed",)
