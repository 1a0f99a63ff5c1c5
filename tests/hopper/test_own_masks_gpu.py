"""Masks of other classes that hold arrays, and sinks in the epilogue, in the Hopper kernels on a GPU: against the
oracle, with what they hide poisoned.
"""

import jax
import numpy as np
import pytest
from agreement import assert_within

import pallas_flash as pf
from hopper.test_own_masks import Groups, Strided
from hopper.test_sinks import SINKS, exact
from pallas_flash import Causal, InBounds, SegmentIds, Window, flash_attention
from pallas_flash.testing import conformance, inputs
from pallas_flash.testing.problems import Problem

pytestmark = pytest.mark.gpu

BATCH, Q_LEN, KV_LEN = 2, 300, 333
DIMS = [(64, 64), (128, 128), (192, 128), (256, 256)]


def groups(length, shift=0):
    return (np.arange(length, dtype=np.int32) // 7 + shift) % 3


MINE = Groups(groups(Q_LEN)[None], np.stack([groups(KV_LEN), groups(KV_LEN, 1)])[:, None],
              np.array([250, 31], np.int32))
MASKS = {
    "alone": dict(mask=MINE),
    "heads-softcap": dict(mask=Groups(groups(Q_LEN), np.stack([groups(KV_LEN), groups(KV_LEN, 1)])[None],
                                      np.int32(400)) & Causal(offset=33), softcap=2.0),
    "lengths-idle": dict(mask=Strided(3) & Causal(offset=-40) & InBounds(kv_len=np.array([200, 0], np.int32))),
    "score-dropout": dict(mask=MINE & Window(left=150, right=60), score=pf.ALiBi(np.array([0.3, 0.1], np.float32)),
                          dropout_rate=0.2),
}


def problem_of(name, dims, **options):
    fields = dict(batch=BATCH, q_heads=2, kv_heads=1, q_len=Q_LEN, kv_len=KV_LEN, d=dims[0], d_v=dims[1],
                  dtypes=("bfloat16",))
    return Problem(name, "features on a GPU", **(fields | options))


@pytest.mark.parametrize(("name", "dims"), [(name, dims) for dims in DIMS for name in MASKS
                                            if dims in DIMS[:2] or name in ("alone", "lengths-idle")], ids=str)
def test_masks_of_other_classes_agree_with_the_oracle(name, dims):
    problem = problem_of(name, dims, **MASKS[name])
    operands, cotangents = conformance.random_case(problem, "bfloat16")
    assert conformance.supports(problem, "bfloat16", "hopper")
    budget = conformance.budget(problem, "bfloat16", operands, cotangents)
    run = conformance.compiled(problem, "hopper")
    assert_within(budget, run(operands, cotangents)._asdict())
    for value in (np.nan, np.inf):
        bad = inputs.poisoned(problem.spec(), operands, value)
        assert_within(budget, run(bad, cotangents)._asdict())


def test_a_bad_key_reaches_only_the_queries_that_attend_to_it():
    problem, bad = problem_of("bad-key", (128, 128), mask=MINE), 77
    operands, cotangents = conformance.random_case(problem, "bfloat16")
    v = operands.v.copy()
    v[:, bad] = np.nan
    run = conformance.compiled(problem, "hopper")
    clean, found = (np.asarray(run(x, cotangents).out, np.float32) for x in (operands, operands._replace(v=v)))
    positions = np.arange(Q_LEN)
    for batch in range(BATCH):
        kv_groups = np.asarray(MINE.kv_groups)[batch, 0]
        sees = (groups(Q_LEN) == kv_groups[bad]) & (bad <= positions + np.asarray(MINE.reach)[batch])
        assert np.isnan(found[batch, sees]).all()
        np.testing.assert_allclose(found[batch, ~sees], clean[batch, ~sees], rtol=0.02, atol=2e-3)


WITH_SINKS = {
    "window": dict(mask=Causal(offset=33) & Window(left=100)),
    "idle-deterministic": dict(mask=Causal(offset=-40) & InBounds(kv_len=np.array([200, 0], np.int32)),
                               deterministic=True),
    "documents-softcap": dict(mask=Causal() & SegmentIds(groups(Q_LEN) // 2, groups(KV_LEN) // 2), softcap=2.0),
    "dropout-heads-first": dict(mask=Causal(offset=33), dropout_rate=0.2, layout="BHLD"),
}


@pytest.mark.parametrize(("name", "dims"), [(name, dims) for dims in DIMS for name in WITH_SINKS
                                            if dims in DIMS[:2] or name == "window"], ids=str)
def test_sinks_in_the_epilogue_agree_with_the_reference(name, dims):
    """out, lse and all gradients; NaN in queries that attend to nothing stays there."""
    problem = problem_of(name, dims, **WITH_SINKS[name])
    operands, cotangents = conformance.random_case(problem, "bfloat16")

    def everything(q, k, v, sinks):
        call = lambda *given: flash_attention(
            *given[:3], sinks=given[3], mask=problem.mask, return_lse=True, softcap=problem.softcap,
            dropout_rate=problem.dropout_rate, dropout_rng=operands.dropout_seed, layout=problem.layout,
            deterministic=problem.deterministic, implementation="hopper")
        results, vjp = jax.vjp(call, q, k, v, sinks)
        return *results, *vjp(cotangents)

    run, wanted = jax.jit(everything), exact(problem, operands, cotangents, SINKS)
    for given in (operands, inputs.poisoned(problem.spec(), operands)):
        for what, x, y in zip(("out", "lse", "dq", "dk", "dv", "dsinks"), run(*given[:3], SINKS), wanted, strict=True):
            x, y = np.asarray(x, np.float64), np.asarray(y)
            size = np.linalg.norm(y) / np.sqrt(y.size)
            within = (2e-5, 1e-5) if what == "lse" else (0.05 * size + 1e-6, 0.02)
            np.testing.assert_allclose(x, y, atol=within[0], rtol=within[1], err_msg=what)
