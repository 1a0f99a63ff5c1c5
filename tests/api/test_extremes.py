"""Numbers at the edge of their types, and sizes of 1 that stand for all: what reviews found wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_flash import Causal, InBounds, PrefixLM, Window, flash_attention

pytestmark = pytest.mark.optimised  # rounding and memory are the machine code's

LARGEST = 2**31 - 1
Q = np.random.default_rng(0).standard_normal((1, 9, 2, 8)).astype(np.float32)


def agrees(x=Q, **keywords):
    def results(implementation):
        def loss(q, k, v):
            return (flash_attention(q, k, v, implementation=implementation, **keywords) ** 2).sum()
        return jax.value_and_grad(loss, (0, 1, 2))(x, x * 0.5, x * 2)
    for ours, exact in zip(jax.tree.leaves(results("xla")), jax.tree.leaves(results("reference")), strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mask", [
    Window(left=LARGEST), Window(right=LARGEST), Window(left=LARGEST, right=0), Window(left=2**40),
    Window(left=np.array([LARGEST])), Causal(offset=LARGEST - 5), InBounds(2**40, 2**40), PrefixLM(2**33),
    InBounds(kv_len=np.array([2**32])), InBounds(kv_len=np.array([5], np.uint32)),
], ids=str)
def test_unlimited_said_with_a_large_integer(mask):
    """`first + left + 1` wrapped in int32, and tiles that attend were skipped."""
    agrees(mask=mask)


@pytest.mark.parametrize("value", [1e4, 1e6, 3e38, -1e6])
def test_a_bias_far_from_zero_keeps_the_gradients_accurate(value):
    """The row's lse rounds to steps larger than the scores; the anchor takes the bias out."""
    agrees(bias=jnp.full((1, 1, 1, 9), value))


@pytest.mark.parametrize("ids", [np.array([[2**32 + 1] * 4 + [1] * 5]), np.array([[2**31 + 1] * 9], np.uint32)])
def test_segment_ids_that_do_not_fit_are_refused(ids):
    """They wrapped: two segments became one, or all became padding."""
    with pytest.raises(ValueError, match=r"q_ids must fit 32-bit integers, got values from .* Number the segments"):
        flash_attention(Q, Q, Q, segment_ids=ids)


@pytest.mark.parametrize("dtype", [np.uint32, np.int64, np.uint64])
def test_segment_ids_that_do_not_fit_are_padding_inside_jit(dtype):
    """2^32 + 1 wrapped to 1, and attended to the segment 1."""
    ids = np.array([[2**31 + 1] * 2 + [1] * 3 + [2] * 4])
    if dtype is not np.uint32:
        ids[:, :2] = 2**32 + 1
    wanted = flash_attention(Q, Q, Q, segment_ids=np.where(ids > 2, -1, ids))
    with jax.enable_x64(True):
        found = jax.jit(lambda ids: flash_attention(Q, Q, Q, segment_ids=ids))(ids.astype(dtype))
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize("keywords", [
    dict(mask=InBounds(np.array([[3, 9]]), np.array([[5], [9]]))),
    dict(q_lengths=np.array([4]), kv_lengths=np.array([9, 2])), dict(mask=Window(np.array([1, 2]), np.array([[0, 1]]))),
    dict(segment_ids=(np.array([[0] * 4 + [1] * 5]), np.array([[0] * 5 + [1] * 4, [1] * 9]))),
], ids=["bounds", "lengths", "windows", "segments"])
def test_one_array_of_a_mask_for_all_and_another_for_each(keywords):
    """An error of vmap's about inconsistent sizes."""
    two = np.concatenate([Q, 0.3 - Q])
    agrees(two, **keywords)


@pytest.mark.parametrize("numbers", [
    dict(softcap=1e-29), dict(softcap=1e30), dict(scale=np.float32(0.3)),
    dict(scale=np.float16(0.5), softcap=np.float16(2)), dict(scale=0, softcap=2)], ids=str)
def test_numbers_that_float32_can_hold(numbers):
    agrees(**numbers)
