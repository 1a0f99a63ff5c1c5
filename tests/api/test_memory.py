"""Temporary memory, from the compiled program's own analysis: linear in the length but for the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_flash import Causal, autodiff, flash_attention

pytestmark = pytest.mark.optimised  # rounding and memory are the machine code's

LENGTHS = np.array([2048, 4096, 8192, 16384])


def on_gpu():
    return jax.default_backend() == "gpu"


@pytest.fixture(autouse=True, scope="module")
def large_tiles():
    """What other tests compiled with small tiles is forgotten."""
    autodiff.forward.clear_cache()
    autodiff.backward.clear_cache()


def forward(implementation, q, k, v, segment_ids):
    return flash_attention(q, k, v, mask=Causal(), segment_ids=segment_ids, implementation=implementation)


def gradients(implementation, q, k, v, segment_ids):
    scalar = lambda *qkv: forward(implementation, *qkv, segment_ids).astype(jnp.float32).sum()
    return jax.grad(scalar, (0, 1, 2))(q, k, v)


def temporary_bytes(function, length):
    """Of a causal call with packed sequences and grouped queries; nothing is run."""
    q, k, v = (jax.ShapeDtypeStruct((1, length, heads, 16), jnp.bfloat16) for heads in (2, 1, 1))
    segment_ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return jax.jit(function).lower(q, k, v, segment_ids).compile().memory_analysis().temp_size_in_bytes


def bytes_a_position(function, implementation, lengths):
    """How much each further position adds, between one length and the next."""
    sizes = [temporary_bytes(functools.partial(function, implementation), int(length)) for length in lengths]
    return np.diff(sizes) / np.diff(lengths)


@pytest.mark.parametrize("function", [forward, gradients])
def test_linear(function):
    slopes = bytes_a_position(function, "xla", LENGTHS)
    bytes_of_inputs = (2 + 1 + 1) * 16 * 2
    least = max(slopes.min(), bytes_of_inputs) if on_gpu() else slopes.min()  # there, it is lost in rounding to pages
    assert slopes.max() <= 1.25 * least, slopes  # quadratic: 4 times
    assert slopes.max() <= 16 * bytes_of_inputs, slopes


@pytest.mark.parametrize("function", [forward, gradients])
def test_the_reference_is_quadratic(function):
    """The control: this test sees a score matrix where there is one."""
    slopes = bytes_a_position(function, "reference", LENGTHS[:3])
    growth = 1.5 if on_gpu() else 1.9  # linear: 1, quadratic: 2; there, with what libraries take besides
    assert slopes[1] >= growth * slopes[0] >= growth * LENGTHS[0], slopes
