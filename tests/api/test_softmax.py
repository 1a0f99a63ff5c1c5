"""Statistics of rows over two sets of keys, merged, against those over all of them."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_flash import softmax

pytestmark = pytest.mark.optimised  # rounding and memory are the machine code's


def statistics_of(s, unit):
    """Statistics and probabilities of scores (rows, keys), -inf where a pair does not attend."""
    rows = s.shape[:-1]
    m_i, l_i, _, _ = softmax.update(jnp.full(rows, -jnp.inf, s.dtype), jnp.zeros(rows, s.dtype), s, unit)
    stats = jnp.stack(softmax.statistics(m_i, l_i, unit), axis=-2)
    return stats, softmax.probabilities(s, unit, stats[..., 0, :], stats[..., 1, :])


def scores_of(size, rows=64, keys=16, seed=0):
    s = np.random.default_rng(seed).standard_normal((rows, keys)).astype(np.float32) * np.float32(size)
    s[0], s[1, :8], s[2, 8:], s[3, 3:9] = -np.inf, -np.inf, -np.inf, -np.inf
    return jnp.asarray(s)


@pytest.mark.parametrize("unit", [1.0, 0.125])
@pytest.mark.parametrize("size", [1.0, 3e2, 1e7])
def test_merged_statistics_are_those_of_all_keys(size, unit):
    s = scores_of(size)
    (a, p_a), (b, p_b) = statistics_of(s[:, :8], unit), statistics_of(s[:, 8:], unit)
    stats, share_a, share_b = softmax.merge(a, b, unit)
    _, p = statistics_of(s, unit)
    again = softmax.probabilities(s, unit, stats[0], stats[1])
    np.testing.assert_allclose(again, p, rtol=2e-6, atol=1e-12)
    merged = jnp.concatenate([p_a * share_a[:, None], p_b * share_b[:, None]], axis=1)
    np.testing.assert_allclose(merged, p, rtol=3e-6, atol=1e-12)
    assert jnp.isneginf(stats[0, 0]) and stats[1, 0] == 0 == share_a[0] == share_b[0]


def test_sets_without_keys_change_nothing():
    s = scores_of(50.0)[4:]
    stats, _ = statistics_of(s, 0.5)
    nothing = jnp.stack([jnp.full(s.shape[0], -jnp.inf), jnp.zeros(s.shape[0])])
    other_way = [softmax.merge(nothing, stats, 0.5)[i] for i in (0, 2, 1)]
    for merged, kept, dropped in (softmax.merge(stats, nothing, 0.5), other_way):
        assert jnp.array_equal(merged, stats) and (kept == 1).all() and (dropped == 0).all()


FAR = pytest.mark.parametrize("far", [-3e3, -65504.0, -1e9, float(jnp.finfo(jnp.bfloat16).min)])
"""What libraries add to scores to hide keys."""


@FAR
def test_sets_that_are_both_far_share_by_their_numbers_of_keys(far):
    """Regression: of two rows whose lse was the same, for a bias in which scores are lost, each counted half."""
    s = jnp.asarray(jnp.asarray(far, jnp.bfloat16), jnp.float32) + scores_of(1.0)[4:]
    (a, p_a), (b, p_b) = statistics_of(s[:, :3], 1.0), statistics_of(s[:, 3:], 1.0)
    _, p = statistics_of(s, 1.0)
    for first, second, parts in ((a, b, (p_a, p_b)), (b, a, (p_b, p_a))):
        stats, *shares = softmax.merge(first, second, 1.0)
        np.testing.assert_allclose(softmax.probabilities(s, 1.0, stats[0], stats[1]), p, rtol=3e-6)
        found = [part * share[:, None] for part, share in zip(parts, shares)]
        np.testing.assert_allclose(jnp.concatenate(found if first is a else found[::-1], axis=1), p, rtol=4e-6)


@FAR
def test_statistics_come_back_from_far(far):
    """Regression: their lse was 0, all of it in the rest, which kernels read only where lse is large."""
    by = jnp.asarray(jnp.asarray(far, jnp.bfloat16), jnp.float32)
    stats, _ = statistics_of(scores_of(1.0), 1.0)
    back = softmax.shifted(softmax.shifted(stats, by, 1.0), -by, 1.0)
    np.testing.assert_allclose(back[0], stats[0], atol=2e-6)
