"""Float32 inputs on Hopper in Pallas' interpreter: parts of float16, in every sum, against the formulas in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import with_rest

from pallas_flash import Causal, Full, InBounds, SegmentIds, Window, autodiff, device, dispatch
from pallas_flash.kernels.hopper import calls, defaults, rules, support
from pallas_flash.kernels.hopper.float32 import sums
from pallas_flash.kernels.hopper.schedule import (
    BackwardSchedule,
    DqSchedule,
    Float32BackwardSchedule,
    Float32Schedule,
    ForwardSchedule,
    KvSchedule,
)
from pallas_flash.kernels.mosaic.interpret import interpreted
from pallas_flash.spec import Results
from pallas_flash.testing import conformance, inputs
from pallas_flash.testing.problems import Problem

FORWARD = Float32Schedule(warpgroups=1, num_blocks=2)
BACKWARD = Float32BackwardSchedule(KvSchedule(warpgroups=1), DqSchedule(warpgroups=1, v_stages=1))
TWO = dataclasses.replace(FORWARD, warpgroups=2), Float32BackwardSchedule()
"""The default."""

IDS = np.repeat(np.arange(3), (30, 50, 20))[None]


def problem_of(**fields):
    options = dict(batch=1, q_heads=1, kv_heads=1, q_len=70, kv_len=70, d=64, d_v=64, mask=Causal(),
                   dtypes=("float32",))
    return Problem("float32", "parts", **(options | fields))


def unchanged(arrays):
    return arrays


def small(arrays):
    q, k, v = arrays
    return q * 1e-3, k * 1e-3, v * 1e-3


def large(arrays):
    q, k, v = arrays
    return q * 3, k * 3, v * 1e3


def mixed(arrays):
    """Rows from 1e-6 to 1e6, of values from the first to the last of each; a column of q that is large."""
    q, k, v = (np.array(x) for x in arrays)
    v *= 10.0 ** np.random.default_rng(5).uniform(-6, 6, v.shape[1])[None, :, None, None]
    q[..., 3], k[..., 3] = 1000 * q[..., 3], 1e-3 * k[..., 3]
    return q, k, v.astype(np.float32)


def garbage(arrays):
    """What the mask hides of the last keys is anything, and finite."""
    q, k, v = (np.array(x) for x in arrays)
    k[:, 60:], v[:, 60:] = 1e17, 3e20
    return q, k, v


CASES = {
    "gqa-ragged": (dict(q_heads=2, q_len=101, kv_len=130, d=72, d_v=40, mask=Causal(29)), unchanged,
                   (FORWARD, BACKWARD)),
    "two-warpgroups": (dict(q_len=200, kv_len=200, d=128, d_v=128), unchanged, TWO),
    "empty-rows": (dict(q_len=90, mask=Causal(-70), layout="BHLD"), unchanged, (FORWARD, BACKWARD)),
    "softcap-window": (dict(q_len=90, kv_len=90, softcap=2.0, mask=Window(20, 5)), unchanged, (FORWARD, BACKWARD)),
    "small-documents": (dict(q_len=100, kv_len=100, scale=-0.2, mask=Causal() & SegmentIds(IDS, IDS)), small,
                        (FORWARD, BACKWARD)),
    "large-lengths": (dict(mask=InBounds(kv_len=np.array([33]))), large, (FORWARD, BACKWARD)),
    "large-rows": (dict(row_lse=200.0), unchanged, (FORWARD, BACKWARD)),
    "mixed": (dict(mask=Full()), mixed, (FORWARD, BACKWARD)),
    "garbage": (dict(mask=InBounds(kv_len=60)), garbage, (FORWARD, BACKWARD)),
}


def run(spec, operands, cotangents, schedules):
    """Everything that the passes compute, by name."""
    for schedule in schedules:
        assert rules.reasons_against(spec, schedule, device.H200.smem_bytes) == []
    (dout, dlse), arrays = cotangents, [jnp.asarray(x) for x in operands[:3]]
    fields = [jnp.asarray(x) for x in jax.tree.leaves(operands.mask)]
    with interpreted():
        results = calls._forward(spec, schedules[0])(*arrays, *fields)
        found = calls._backward(spec, schedules[1])(*arrays, *results, jnp.asarray(dout),
                                                    jnp.asarray(with_rest(dlse, np.nan)), *fields)
    out, stats = results
    return dict(out=out, lse=stats[:, :, 0], **dict(zip(("dq", "dk", "dv"), found)))


@pytest.mark.interpreted
@pytest.mark.parametrize("name", CASES)
def test_errs_at_most_twice_as_much_as_float32(name):
    """With NaN in what the mask hides, but where that is the case's own."""
    fields, change, schedules = CASES[name]
    problem = problem_of(**fields)
    spec = problem.spec()
    assert support.why_not(spec, device.H200) == []
    operands, cotangents = conformance.random_case(problem, "float32")
    operands = operands._replace(**dict(zip("qkv", change(operands[:3]))))
    given = operands if change is garbage else inputs.poisoned(spec, operands)
    found = {key: np.asarray(x) for key, x in run(spec, given, cotangents, schedules).items()}
    budget = conformance.budget(problem, "float32", operands, cotangents)
    shares = budget.used(budget.baseline._replace(**found))
    assert all(share <= 1 for share in shares.values()), shares


@pytest.mark.interpreted
@pytest.mark.parametrize("section", [1, 2])
def test_sums_go_on_in_the_rows_of_the_result(monkeypatch, section):
    """Sections of 1 or 2 tiles, not 8: what is in registers is added to rows, the last of which lie past the end, while
    the largest term of a row grows, and queries see no key at first.
    """
    monkeypatch.setattr(sums, "SECTION", section)
    problem = problem_of(q_len=150, kv_len=170, d=16, d_v=40, mask=Causal(-20), layout="BHLD")
    operands, cotangents = conformance.random_case(problem, "float32")
    grows = np.geomspace(0.1, 10, 170, dtype=np.float32)[:, None]
    operands = operands._replace(k=operands.k / grows, v=operands.v * grows)
    given = inputs.poisoned(problem.spec(), operands)
    found = {key: np.asarray(x) for key, x in run(problem.spec(), given, cotangents, (FORWARD, BACKWARD)).items()}
    budget = conformance.budget(problem, "float32", operands, cotangents)
    shares = budget.used(budget.baseline._replace(**found))
    assert all(share <= 1 for share in shares.values()), shares


@pytest.mark.interpreted
@pytest.mark.parametrize("row", [3e4, 1e3], ids=["large", "small"])
def test_ties_share_their_weight(row):
    """On an H200 dv was 4e21 where all keys weigh the same: scores of 5e9 in base 2 are rounded by 256, which is no
    small factor of a weight.
    """
    problem = problem_of(q_len=64, kv_len=128, d=16, d_v=16, mask=Full())
    operands, (_, dlse) = conformance.random_case(problem, "float32")
    operands = operands._replace(q=np.full_like(operands.q, row), k=np.full_like(operands.k, row))
    found = run(problem.spec(), operands, (np.ones_like(operands.q), 0 * dlse), (FORWARD, BACKWARD))
    np.testing.assert_allclose(found["dv"], 0.5, rtol=2e-5)
    np.testing.assert_allclose(found["out"], operands.v.mean(axis=1, keepdims=True).repeat(64, 1), atol=1e-6)
    np.testing.assert_allclose(found["lse"], row**2 * 4 + np.log(128), rtol=1e-6)


@pytest.mark.interpreted
def test_partial_gradients_from_delta_alone():
    """The backward of a part of the keys reads no out; some queries see none of its keys."""
    problem = problem_of(q_len=70, kv_len=90, d=72, d_v=40, mask=Causal(-20))
    spec = dataclasses.replace(problem.spec(), partial=True)
    operands, (dout, dlse) = conformance.random_case(problem, "float32")
    budget = conformance.budget(problem, "float32", operands, (dout, dlse))
    q, k, v, dout = (jnp.asarray(x) for x in (*operands[:3], dout))
    stats = with_rest(jnp.asarray(budget.oracle.lse, jnp.float32))
    kept, given = autodiff.without_out(spec, Results(jnp.asarray(budget.oracle.out, jnp.float32), stats),
                                       Results(dout, with_rest(dlse)))
    with interpreted():
        found = calls._backward(spec, BACKWARD)(q, k, v, kept.stats, *given)
    used = budget.used(budget.baseline._replace(**dict(zip(("dq", "dk", "dv"), found, strict=True))))
    assert max(used.values()) <= 1, used


@pytest.mark.interpreted
def test_what_is_not_finite_reaches_whom_it_concerns():
    """A key and a value that are not finite make NaN of the queries that attend to them, and of nothing else."""
    problem = problem_of(mask=Window(10, 0), q_len=140, kv_len=140)
    operands, cotangents = conformance.random_case(problem, "float32")
    k, v = np.array(operands.k), np.array(operands.v)
    k[0, 20, 0, 5], v[0, 100, 0, 7] = np.inf, np.nan
    bad = np.zeros(140, bool)
    bad[20:31] = bad[100:111] = True
    found = run(problem.spec(), operands._replace(k=k, v=v), cotangents, (FORWARD, BACKWARD))
    for name in ("out", "dq"):
        assert np.array_equal(np.isnan(np.asarray(found[name]))[0, :, 0].all(axis=1), bad), name
        assert np.array_equal(np.isnan(np.asarray(found[name]))[0, :, 0].any(axis=1), bad), name
    near = np.convolve(bad, np.ones(11))[10:] > 0  # keys that such a query attends to
    for name in ("dk", "dv"):
        assert np.array_equal(np.isnan(np.asarray(found[name]))[0, :, 0].any(axis=1), near), name


def spec_of(**fields):
    return problem_of(**fields).spec()


@pytest.mark.parametrize(("fields", "reason"), [
    (dict(d=136), "needs head dimensions from 1 to 128 in float32, d=136, d_v=64"),
    (dict(bias=(1, 1, 1, 70)), "takes no bias in float32 yet"),
    (dict(score=lambda score, *_: score + 1), "takes no score function in float32 yet"),
    (dict(dropout_rate=0.1), "takes no dropout in float32 yet, dropout_rate=0.1"),
])
def test_what_they_lack_has_a_reason(fields, reason):
    reasons = support.why_not(spec_of(**fields), device.H200)
    assert [found for found in reasons if reason in found and "cast query, key and value" in found] == reasons


@pytest.mark.parametrize("d", [64, 128])
def test_an_automatic_choice_leaves_them_alone_and_says_how_fast_they_are(d):
    """They were measured: the reason must not say that they were not."""
    text = str(dispatch.decide(spec_of(d=d), device.H200))
    assert "implementation='xla'" in text and "has not been measured" not in text
    assert 'not \'hopper\': float32 is 4.6 to 7.5 times as fast as "xla" on an H200, and is to be 5 times' in text
    assert 'name implementation="hopper" to take it' in text


@pytest.mark.parametrize(("dtype", "schedule", "reason"), [
    ("float32", ForwardSchedule(block_kv=64), "not for float32"),
    ("float32", BackwardSchedule(KvSchedule(), DqSchedule()), "not for float32"),
    ("bfloat16", FORWARD, "only for float32"), ("bfloat16", BACKWARD, "only for float32"),
    ("float32", dataclasses.replace(FORWARD, block_kv=32), "must walk over tiles of 64 rows, not 32"),
    ("float32", dataclasses.replace(FORWARD, warpgroups=3), "must be 1 or 2"),
    ("float32", dataclasses.replace(FORWARD, num_stages=6), "bytes of shared memory"),
])
def test_schedules_that_do_not_fit_have_a_reason(dtype, schedule, reason):
    spec = problem_of(dtypes=(dtype,), d=128, d_v=128).spec()
    found = rules.reasons_against(spec, schedule, device.H200.smem_bytes)
    assert len(found) == 1 and reason in found[0], found


@pytest.mark.parametrize("d", [1, 64, 100, 128])
def test_default_schedules_fit(d):
    spec = spec_of(d=-(-d // 8) * 8, d_v=128)
    for schedule in (defaults.default_forward(spec, device.H200), defaults.default_backward(spec, device.H200)):
        assert rules.reasons_against(spec, schedule, device.H200.smem_bytes) == []
