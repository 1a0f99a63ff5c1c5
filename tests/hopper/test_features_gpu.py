"""Features of the Hopper kernels that an automatic choice leaves out until they have run on a GPU: at every head size,
forward, lse and all gradients against the formulas in float64, with NaN and infinities in what masks hide.
"""

import functools

import numpy as np
import pytest
from agreement import assert_within

from hopper.test_sweep import budget_of, problem_of
from pallas_flash import Causal, Dense, Full, SegmentIds, Window
from pallas_flash.testing import conformance, inputs

pytestmark = pytest.mark.gpu

BATCH, Q_LEN, KV_LEN = 2, 400, 333
DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256))


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


def run(problem, operands, cotangents):
    assert conformance.supports(problem, problem.dtypes[0], "hopper")
    return conformance.compiled(problem, "hopper")(operands, cotangents)._asdict()


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("name", DENSE)
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
