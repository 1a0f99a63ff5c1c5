"""Whether two computations of the same thing agree: for tests of what surrounds the kernels.

How precise the kernels are is measured in test_conformance; here half of the digits must agree, which no mistake in a
shape, a transform or a gradient passes.
"""

import jax
import jax.numpy as jnp
import numpy as np


def normal(seed, *shape, dtype=np.float32):
    """Standard normal numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def with_rest(dlse, rest=0.0):
    """A cotangent of the statistics (`AttentionSpec.stats_shape`): lse's, and that of its rest, which nothing reads."""
    return np.stack([dlse, np.full_like(dlse, rest)], axis=2)


def assert_agree(found, wanted):
    """Asserts that two pytrees have the same structure, shapes and dtypes, and numbers that agree."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for path, a in jax.tree_util.tree_leaves_with_path(found):
        b = dict(jax.tree_util.tree_leaves_with_path(wanted))[path]
        assert (a.shape, a.dtype) == (b.shape, b.dtype), jax.tree_util.keystr(path)
        _assert_close(np.asarray(a), np.asarray(b), jax.tree_util.keystr(path))


def assert_within(budget, found):
    """Asserts that every result, by name, is within its error budget; lse within 1e-5: its budget is that of sums in
    float32, and tensor cores add the products of a score with fewer bits.
    """
    found = {name: x for name, x in found.items() if x is not None}
    if "lse" in found:
        lse = np.asarray(found.pop("lse"), np.float64)
        np.testing.assert_allclose(lse, budget.oracle.lse, rtol=1e-5, atol=1e-5)
    shares = budget.used(budget.baseline._replace(**found))
    assert all(shares[name] <= 1 for name in found), shares


def _assert_close(a, b, name):
    half = float(jnp.finfo(b.dtype).eps) ** 0.5
    a, b = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(b)
    same = np.isfinite(a) & finite
    size = np.abs(b[finite]).max(initial=0)
    error = np.abs(a[same] - b[same]).max(initial=0)
    assert np.array_equal(np.isfinite(a), finite) and np.array_equal(a[~finite], b[~finite], equal_nan=True), (
        f"{name}: not finite at {np.argwhere(~np.isfinite(a)).tolist()}, wanted {np.argwhere(~finite).tolist()}")
    assert error <= half * size, f"{name}: differs by {error:.1e} from numbers up to {size:.1e}"
