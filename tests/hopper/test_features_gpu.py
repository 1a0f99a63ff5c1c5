"""Features of the Hopper kernels that an automatic choice leaves out until they have run on a GPU: at every head size,
forward, lse and all gradients against the formulas in float64, with NaN and infinities in what masks hide.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_within

from hopper.test_sweep import budget_of, problem_of
from pallas_flash import Causal, Dense, Full, SegmentIds, Window, flash_attention
from pallas_flash.testing import conformance, inputs

pytestmark = pytest.mark.gpu

BATCH, Q_LEN, KV_LEN = 2, 400, 333
DIMS = ((64, 64), (128, 128), (256, 256))
BETWEEN = ((96, 96), (192, 128))


def at_dims(cases, everywhere):
    """Every case at the head sizes that have forms of their own, and some at those between."""
    return pytest.mark.parametrize(("name", "dims"), [
        *((name, dims) for name in cases for dims in DIMS), *((name, dims) for name in everywhere for dims in BETWEEN)],
        ids=str)


def coin(*shape, chance=0.5):
    return np.random.default_rng(len(shape)).random(shape) < chance


def with_holes(heads):
    """Tiles without a pair and whole tiles, at the ends and inside; queries and keys without a pair."""
    attend = coin(BATCH, heads, Q_LEN, KV_LEN)
    attend[0, :, :128, :192], attend[0, :, 128:, :256], attend[0, :, 256:, 128:192] = False, True, False
    attend[1, :, 64:200], attend[1, :, :, 200:], attend[1, -1, :, 10:100] = False, False, False
    return attend


KEYS = np.arange(KV_LEN) < np.array([[300], [65]])[:, None, None]  # (batch, 1, 1, kv_len)
LEFT = np.arange(KV_LEN) >= np.array([[0], [130]])[:, None, None]
IDS = np.repeat(np.arange(9), 50)
DENSE = {
    "pairs": dict(mask=Dense(with_holes(2))),
    "pairs-gqa-heads-first": dict(mask=Dense(with_holes(4)), q_heads=4, layout="BHLD"),
    "pairs-mqa-shared-by-heads": dict(mask=Dense(with_holes(1)), q_heads=3, kv_heads=1),
    "pairs-shared-by-all": dict(mask=Dense(coin(Q_LEN, KV_LEN, chance=0.02))),
    "keys": dict(mask=Dense(KEYS)),
    "keys-causal": dict(mask=Dense(LEFT) & Causal(offset=40)),
    "keys-of-each-head": dict(mask=Dense(coin(BATCH, 2, 1, KV_LEN)), q_heads=2, kv_heads=1),
    "queries": dict(mask=Dense(coin(BATCH, 1, Q_LEN, 1))),
    "two": dict(mask=Dense(KEYS) & Dense(coin(Q_LEN, KV_LEN, chance=0.7))),
    "pairs-window-softcap": dict(mask=Dense(coin(BATCH, 1, Q_LEN, KV_LEN)) & Window(150, 60), softcap=2.0),
    "pairs-documents": dict(mask=Dense(coin(BATCH, 1, Q_LEN, KV_LEN, chance=0.8))
                            & SegmentIds(IDS[:Q_LEN], IDS[:KV_LEN])),
    "pairs-deterministic": dict(mask=Dense(coin(BATCH, 2, Q_LEN, KV_LEN)) & Causal(), deterministic=True),
    "pairs-dropout": dict(mask=Dense(coin(BATCH, 1, Q_LEN, KV_LEN)), dropout_rate=0.2),
    "pairs-float16": dict(mask=Dense(with_holes(2)), dtypes=("float16",)),
    "one-key": dict(mask=Dense(coin(BATCH, 1, Q_LEN, 1)), kv_len=1),
    "all": dict(mask=Dense(np.ones((Q_LEN, KV_LEN), bool)) & Full()),
}


@functools.cache
def dense_problem(name, dims):
    return problem_of(f"dense-{name}", dims, **(dict(q_len=Q_LEN, kv_len=KV_LEN) | DENSE[name]))


def run(problem, operands, cotangents, implementation="hopper"):
    assert conformance.supports(problem, problem.dtypes[0], implementation)
    return conformance.compiled(problem, implementation)(operands, cotangents)._asdict()


@at_dims(DENSE, ("pairs-gqa-heads-first", "keys-causal", "pairs-dropout"))
def test_dense_masks_agree_with_the_oracle(name, dims):
    """Also with what they hide poisoned: in whole queries and keys, and so in the products of every tile."""
    problem = dense_problem(name, dims)
    operands, cotangents = conformance.random_case(problem, problem.dtypes[0])
    budget = budget_of(problem, operands, cotangents)
    assert_within(budget, run(problem, operands, cotangents))
    for value in (np.nan, np.inf):
        bad = inputs.poisoned(problem.spec(), operands, value)
        if any(not np.array_equal(a, b, equal_nan=True) for a, b in zip(operands[:3], bad[:3], strict=True)):
            assert_within(budget, run(problem, bad, cotangents))


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_bad_key_reaches_only_the_queries_whose_bit_is_set(dims, deterministic):
    """A value that is NaN makes partial tiles be computed again, a key at a time, by bits as well."""
    bad, attend = 77, coin(BATCH, 2, Q_LEN, KV_LEN)
    problem = problem_of("dense-bad-key", dims, q_len=Q_LEN, kv_len=KV_LEN, mask=Dense(attend),
                         deterministic=deterministic)
    operands, cotangents = conformance.random_case(problem, "bfloat16")
    v = operands.v.copy()
    v[:, bad] = np.nan
    clean, found = run(problem, operands, cotangents), run(problem, operands._replace(v=v), cotangents)
    sees = attend[:, :, :, bad].swapaxes(1, 2)  # (batch, q_len, heads)
    for name in ("out", "dq"):
        a, b = (np.asarray(x[name], np.float32) for x in (found, clean))
        assert np.isnan(a[sees]).all(), name
        np.testing.assert_allclose(a[~sees], b[~sees], rtol=0.02, atol=2e-3, err_msg=name)


def far(shape):
    """Biases of which some are -inf and some so far below the others that rows which see only those need an anchor."""
    found = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    found[..., :70], found[..., 150:160], found[..., 300:] = -2e3, -np.inf, -np.inf
    found[..., 1::3, 40:90] = -np.inf
    return found


BIAS = {
    "keys": dict(bias=(BATCH, 2, 1, KV_LEN), mask=Full()),
    "keys-shared": dict(bias=(1, 1, 1, KV_LEN), bias_dtype="float32"),
    "keys-masks": dict(bias=(BATCH, 1, 1, KV_LEN), bias_masks=True, mask=Causal(-20)),
    "keys-gqa-heads-first": dict(bias=(1, 4, 1, KV_LEN), q_heads=4, layout="BHLD", mask=Window(150, 60)),
    "keys-softcap": dict(bias=(BATCH, 1, 1, KV_LEN), softcap=2.0),
    "keys-dropout": dict(bias=(BATCH, 1, 1, KV_LEN), dropout_rate=0.2),
    "keys-deterministic": dict(bias=(BATCH, 2, 1, KV_LEN), deterministic=True),
    "keys-documents": dict(bias=(BATCH, 1, 1, KV_LEN), mask=SegmentIds(IDS[:Q_LEN], IDS[:KV_LEN])),
    "keys-float16": dict(bias=(BATCH, 2, 1, KV_LEN), dtypes=("float16",)),
    "pairs": dict(bias=(BATCH, 2, Q_LEN, KV_LEN), mask=Full()),
    "pairs-shared": dict(bias=(1, 1, Q_LEN, KV_LEN), bias_dtype="float32"),
    "pairs-gqa-heads-first": dict(bias=(1, 4, Q_LEN, KV_LEN), q_heads=4, layout="BHLD", bias_masks=True),
    "pairs-softcap-window": dict(bias=(BATCH, 1, Q_LEN, KV_LEN), softcap=2.0, mask=Window(150, 60)),
    "pairs-dropout": dict(bias=(1, 2, Q_LEN, KV_LEN), dropout_rate=0.2, bias_dtype="float16"),
    "pairs-whole-tiles": dict(bias=(1, 2, 384, 256), q_len=384, kv_len=256, deterministic=True),
}


@at_dims(BIAS, ("keys", "pairs", "keys-dropout", "pairs-dropout"))
def test_biases_agree_with_the_oracle(name, dims):
    """Their gradients, too; also with what they and masks hide poisoned."""
    problem = problem_of(f"bias-{name}", dims, **(dict(q_len=Q_LEN, kv_len=KV_LEN) | BIAS[name]))
    operands, cotangents = conformance.random_case(problem, problem.dtypes[0])
    operands = operands._replace(bias=far(problem.bias).astype(operands.bias.dtype))
    budget = budget_of(problem, operands, cotangents)
    assert_within(budget, run(problem, operands, cotangents))
    assert_within(budget, run(problem, inputs.poisoned(problem.spec(), operands), cotangents))


def test_a_bias_of_the_smallest_number_masks_as_in_other_libraries():
    """Rows that see no other key weigh all keys alike, and their gradients are finite."""
    problem = problem_of("bias-smallest", (128, 128), q_len=Q_LEN, kv_len=KV_LEN, bias=(BATCH, 1, 1, KV_LEN))
    operands, cotangents = conformance.random_case(problem, "bfloat16")
    smallest = np.where(np.arange(KV_LEN) < 70, float(jnp.finfo(jnp.bfloat16).min), 0.0)
    bias = np.broadcast_to(smallest, problem.bias).astype(operands.bias.dtype)
    found = run(problem, operands._replace(bias=bias), cotangents)
    assert all(np.isfinite(np.asarray(found[name], np.float32)).all() for name in ("out", "dq", "dk", "dv"))
    v = np.asarray(operands.v, np.float32)  # causal: query 69 sees the first 70 keys
    np.testing.assert_allclose(np.asarray(found["out"], np.float32)[:, 69], v[:, :70].mean(axis=1), atol=0.02)


SINKS = {"causal": dict(), "window": dict(mask=Window(100, 0)), "empty-rows": dict(mask=Causal(-70)),
         "dense": dict(mask=Dense(KEYS), kv_len=KV_LEN)}


@at_dims(SINKS, ("causal", "window"))
def test_sinks_agree_with_those_of_the_reference(name, dims):
    """out, lse and the gradients of all, that of the sinks included."""
    problem = problem_of(f"sinks-{name}", dims, **SINKS[name])
    operands, cotangents = conformance.random_case(problem, "bfloat16")
    sinks = np.array([0.5, 3.0], np.float32)

    def everything(implementation, q, k, v, sinks):
        call = lambda *given: flash_attention(*given[:3], sinks=given[3], mask=problem.mask, return_lse=True,
                                              implementation=implementation)
        results, vjp = jax.vjp(call, q, k, v, sinks)
        return results, vjp((cotangents[0].astype(results[0].dtype), cotangents[1]))

    found = jax.jit(everything, static_argnums=0)("hopper", *operands[:3], sinks)
    wide = [np.asarray(x, np.float32) for x in operands[:3]]
    with jax.default_matmul_precision("highest"):
        wanted = jax.jit(everything, static_argnums=0)("reference", *wide, sinks)
    names = "out", "lse", "dq", "dk", "dv", "dsinks"
    for what, a, b in zip(names, *map(jax.tree.leaves, (found, wanted)), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        finite = np.isfinite(b)
        assert np.array_equal(finite, np.isfinite(a))
        if what == "dsinks":
            np.testing.assert_allclose(a, b, atol=of_rounding(wanted[0], cotangents[0], sinks))
        else:
            assert np.abs(a - b)[finite].max() <= 0.02 * np.abs(b[finite]).max(), what


def of_rounding(results, dout, sinks):
    """How far from its value the sum of p delta over all queries lies, delta being of an out in bfloat16, at most: four
    times the root of the sum of squares.
    """
    out, lse = (np.asarray(x, np.float64) for x in results)
    p = np.exp(sinks[:, None] - np.where(np.isfinite(lse), lse, np.inf)).swapaxes(1, 2)[..., None]
    return 4 * 2**-8 * np.linalg.norm(p * out * np.asarray(dout, np.float64))
