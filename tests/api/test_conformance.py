"""Every problem of the catalogue, in every dtype, by every implementation that takes it, against the float64 oracle.

Forward, lse and all gradients, with random cotangents of out and of lse. The allowed error comes from the data: see
`pallas_flash.testing.budget`. IMPLEMENTATIONS=hopper in the environment leaves out the others.
"""

import dataclasses
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_flash import Causal, UnsupportedError, dispatch, flash_attention
from pallas_flash.kernels.xla import schedule as xla_schedule
from pallas_flash.testing import conformance, inputs, problems, textbook

ALL = [row.name for row in dispatch.IMPLEMENTATIONS]
IMPLEMENTATIONS = os.environ["IMPLEMENTATIONS"].split(",") if "IMPLEMENTATIONS" in os.environ else ALL
KERNELS = [name for name in IMPLEMENTATIONS if name != "reference"]
REPAIRING = ("hopper", "ampere")
"""Kernels that add up again, another way, what has met a bad value."""
CASES = [pytest.param(problem, dtype, id=f"{problem}-{dtype}")
         for problem in problems.CONFORMANCE for dtype in problem.dtypes]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of the XLA kernels are larger than most problems here; with smaller ones they loop."""
    monkeypatch.setattr(xla_schedule, "TARGET_BLOCK", 64)


def able(problem, dtype, among=IMPLEMENTATIONS):
    """The implementations that take a problem here; test_catalogue asserts the errors of the others."""
    return [name for name in among if conformance.supports(problem, dtype, name)]


def check(problem, dtype, implementation, case, budget):
    if not conformance.supports(problem, dtype, implementation):
        with pytest.raises(UnsupportedError, match=f"implementation='{implementation}' cannot run"):
            jax.eval_shape(conformance.compiled(problem, implementation), *case)
        return
    used = budget.used(conformance.compiled(problem, implementation)(*case))
    assert max(used.values()) <= 1, f"{implementation} takes {used} of its error budget"


@pytest.mark.parametrize(("problem", "dtype"), CASES)
def test_catalogue(problem, dtype):
    with jax.enable_x64(dtype == "float64"):
        case = conformance.random_case(problem, dtype)
        budget = conformance.budget(problem, dtype, *case)
        for implementation in IMPLEMENTATIONS:
            # `reference` in float64 is the oracle; its other dtypes differ by casts alone.
            if implementation != "reference" or dtype in ("float32", "bfloat16"):
                check(problem, dtype, implementation, case, budget)


def test_names_are_unique():
    names = [problem.name for problem in (*problems.CONFORMANCE, *problems.LARGE_SCORES, *problems.BENCHMARKS)]
    assert len(set(names)) == len(names)


# What the budget catches ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", problems.DTYPES)
def test_two_derivations_agree(dtype):
    """The baseline has its own formulas for the gradients; the oracle's are JAX's derivatives of the forward."""
    problem = problems.find("everything")
    with jax.enable_x64(dtype == "float64"):
        case = conformance.random_case(problem, dtype)
        budget = conformance.budget(problem, dtype, *case)
        assert max(budget.used(budget.baseline).values()) <= 0.5


def _row(x, row):
    """True at one position of (batch, length, heads, dim)."""
    return (np.arange(x.shape[1]) == row)[:, None, None]


def _rounded_to_bits(x, bits):
    significand, exponent = np.frexp(x)
    return np.ldexp(np.round(np.ldexp(significand, bits)), exponent - bits)


# Mistakes that a bfloat16 kernel could make, small enough to look right: (result, what it becomes).
MISTAKES = {
    "a row's lse off by 1e-4": ("lse", lambda x: np.where(np.arange(x.shape[-1]) == 70, x + 1e-4, x)),
    "one row off by 3 %": ("out", lambda x: x * np.where(_row(x, 149), 1.03, 1)),
    "one row takes one key too few": ("out", lambda x: x - _row(x, 149) * 0.01),
    "one key's dk missing": ("dk", lambda x: x * ~_row(x, 140)),
    "dq off by 2 %": ("dq", lambda x: x * 1.02),
    "one NaN": ("dv", lambda x: np.where(np.arange(x.size).reshape(x.shape) == 5, np.nan, x)),
    "two bits lost": ("out", lambda x: _rounded_to_bits(x, 6)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_exceed_the_budget(mistake):
    problem, (field, change) = problems.find("mask-causal"), MISTAKES[mistake]
    case = conformance.random_case(problem, "bfloat16")
    budget = conformance.budget(problem, "bfloat16", *case)
    assert max(budget.used(budget.baseline).values()) <= 0.5
    wrong = change(np.asarray(getattr(budget.baseline, field), np.float64))
    assert budget.used(budget.baseline._replace(**{field: wrong}))[field] > 1


@pytest.mark.parametrize(("name", "field"), [("mask-causal", "dq"), ("score-relative", "dscore")])
def test_float32_is_not_rounded_to_tf32(name, field):
    """What a product of tf32 inputs gives is outside of float32's budget."""
    problem = problems.find(name)
    case = conformance.random_case(problem, "float32")
    budget = conformance.budget(problem, "float32", *case)
    tf32 = lambda x: (np.asarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    operands = case[0]._replace(q=tf32(case[0].q), k=tf32(case[0].k))
    rounded, _ = textbook.attention(problem.spec("float32"), operands, *case[1])
    used = budget.used(rounded)
    assert max(used.values()) > 10 and used[field] > 10, used


def test_a_gradient_of_a_table_may_be_added_up_in_any_order():
    """A GPU adds what is scattered to a table one by one, in any order: `reference` there took 1.21 of a budget that
    knew NumPy's order alone, by blocks.
    """
    problem = problems.find("score-relative")
    operands, (dout, dlse) = conformance.random_case(problem, "float32")
    budget = conformance.budget(problem, "float32", operands, (dout, dlse))
    run = conformance.compiled(problem, "reference")
    one_by_one = np.zeros(budget.oracle.dscore.shape, np.float32)
    for row in np.random.default_rng(0).permutation(problem.q_len):  # what one query's dout and lse add
        at = np.arange(problem.q_len) == row
        one_by_one += np.asarray(run(operands, (dout * at[:, None, None], dlse * at)).dscore)
    assert budget.used(budget.baseline._replace(dscore=one_by_one))["dscore"] <= 1
    lacking = one_by_one.copy()
    lacking[0, 0] *= 1 - 1e-3
    assert budget.used(budget.baseline._replace(dscore=lacking))["dscore"] > 1


# Poison --------------------------------------------------------------------------------------------------------------

POISONED = ["mask-causal-empty-rows", "mask-lengths", "mask-length-zero", "mask-window-beside", "mask-dense-keys",
            "shape-more-keys", "bias", "bias-masks-keys", "everything", "defect-packed-padding"]


@pytest.mark.parametrize("name", POISONED)
def test_what_nothing_attends_to_changes_nothing(name):
    problem = problems.find(name)
    operands, cotangents = conformance.random_case(problem, "bfloat16")
    poisoned = [inputs.poisoned(problem.spec("bfloat16"), operands, value) for value in (np.nan, np.inf)]
    changed = lambda bad: any(not np.array_equal(a, b) for a, b in zip(
        operands.differentiable, bad.differentiable, strict=True))
    assert all(map(changed, poisoned))
    for implementation in able(problem, "bfloat16"):
        run = conformance.compiled(problem, implementation)
        clean = run(operands, cotangents)
        for bad in poisoned:
            found = run(bad, cotangents)
            if implementation in REPAIRING:
                budget = conformance.budget(problem, "bfloat16", operands, cotangents)
                assert max(budget.used(found).values()) <= 1
                continue
            for field, before, after in zip(clean._fields, clean, found, strict=True):
                same = before is after is None or np.array_equal(before, after)
                assert same, f"{implementation}: poison reaches {field}"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_bad_key_reaches_only_the_queries_that_attend_to_it(value):
    """0 * NaN is NaN: a product over a whole tile must not carry a later key's NaN into earlier rows."""
    problem, bad = problems.find("mask-causal"), 100
    operands, cotangents = conformance.random_case(problem, "bfloat16")
    v = operands.v.copy()
    v[:, bad] = value
    for implementation in able(problem, "bfloat16", KERNELS):
        run = conformance.compiled(problem, implementation)
        clean, out = run(operands, cotangents).out, run(operands._replace(v=v), cotangents).out
        if implementation in REPAIRING:
            np.testing.assert_allclose(np.asarray(out[:, :bad], np.float32), np.asarray(clean[:, :bad], np.float32),
                                       atol=2 * float(jnp.finfo("bfloat16").eps) * abs(operands.v[:, :bad]).max())
        else:
            assert np.array_equal(out[:, :bad], clean[:, :bad]), implementation
        assert not np.isfinite(np.asarray(out[:, bad:], np.float32)).any(), implementation


@pytest.mark.parametrize("array", ["q", "dout"])
@pytest.mark.parametrize("d", [64, 72, 128, 256])  # on Hopper, the forms of the backward
def test_how_far_a_bad_query_reaches(d, array):
    """As docs/semantics.md says: in xla only the keys that it attends to, in GPU kernels those of tiles
    that meet its tile; never another entry of the batch.
    """
    bad, reach = 5, {"xla": 6, "hopper": 192, "ampere": 128}
    problem = dataclasses.replace(problems.find("mask-causal"), q_len=260, kv_len=260, d=d, d_v=d)
    operands, (dout, dlse) = conformance.random_case(problem, "bfloat16")
    spoiled, bad_dout = operands.q.copy(), dout.copy()
    (spoiled if array == "q" else bad_dout)[0, bad] = np.nan
    for implementation in able(problem, "bfloat16", KERNELS):
        run = conformance.compiled(problem, implementation)
        clean, found = run(operands, (dout, dlse)), run(operands._replace(q=spoiled), (bad_dout, dlse))
        end = reach[implementation]
        for field, first, last in (("dq", bad, bad + 1), ("dk", 0, end), ("dv", 0, end)):
            x, before = (np.asarray(getattr(results, field), np.float32) for results in (found, clean))
            assert np.isnan(x[0, first:min(last, bad + 1)]).any(axis=(1, 2)).all(), (implementation, field)
            spared = np.ones(260, bool)
            spared[first:last] = False
            assert np.array_equal(x[1], before[1]), (implementation, field)
            np.testing.assert_allclose(x[0, spared], before[0, spared], rtol=1e-2, atol=1e-2)


# Defects of other libraries that one result does not show -------------------------------------------------------------

@pytest.mark.parametrize("name", ["defect-deterministic", "everything"])
def test_deterministic_gradients_repeat(name):
    """flash-attention #2244: "deterministic" gradients that differ from run to run."""
    problem = problems.find(name)
    case = conformance.random_case(problem, "bfloat16")
    for implementation in able(problem, "bfloat16", KERNELS):
        run = conformance.compiled(problem, implementation)
        first = jax.tree.leaves(run(*case))
        for _ in range(5):
            again = jax.tree.leaves(run(*case))
            assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True)), implementation


def test_vmap_of_grad():
    """jax #38495: vmap(grad) of attention crashes."""
    problem = dataclasses.replace(problems.find("mask-causal"), q_len=40, kv_len=40, d=64, d_v=64)
    cases = [problem.operands("bfloat16", seed=seed)[:3] for seed in range(3)]
    for implementation in able(problem, "bfloat16", KERNELS):
        def loss(q, k, v, implementation=implementation):
            return flash_attention(q, k, v, mask=Causal(), implementation=implementation).astype("float32").sum()
        gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
        together = jax.vmap(gradient)(*map(np.stack, zip(*cases, strict=True)))
        alone = [np.stack(parts) for parts in zip(*(gradient(*case) for case in cases), strict=True)]
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=1e-2, rtol=1e-2)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    """TabPFN #1184: offsets beyond int32. The end of the last head, from a slice that its window does not leave."""
    problem = problems.find("huge-d128")
    q, k, v, *_ = problem.operands(normal=inputs.device_normal)
    assert q.size > 2**31
    attend = lambda *arrays, **options: jax.jit(lambda *xs: flash_attention(*xs, mask=problem.mask, **options))(*arrays)
    found = attend(q, k, v)[-1, -512:, -1]
    end = (x[-1:, -1024:, -1:].astype("float32") for x in (q, k, v))
    wanted = np.asarray(attend(*end, implementation="reference")[0, -512:, 0])
    found = np.asarray(found, np.float32)
    assert np.linalg.norm(found - wanted) <= 2 * float(jax.numpy.finfo("bfloat16").eps) * np.linalg.norm(wanted)


@pytest.mark.parametrize("target", [16, 75, 512])
def test_tile_sizes_change_nothing_but_rounding(target, monkeypatch):
    monkeypatch.setattr(xla_schedule, "TARGET_BLOCK", target)
    # A spec of its own for each size: a call is compiled once for a spec.
    problem = dataclasses.replace(problems.find("mask-window-prefix"), scale=1 / target)
    case = conformance.random_case(problem, "float32")
    used = conformance.budget(problem, "float32", *case).used(conformance.compiled(problem, "xla")(*case))
    assert max(used.values()) <= 1, used


@pytest.mark.parametrize("d", [8, 16])
def test_sums_of_few_terms_are_of_wide_numbers(d):
    """XLA:GPU rounded each of up to 8 terms to the operands' 16 bits: no product of so few takes such operands."""
    q, k = (jax.ShapeDtypeStruct((1, length, heads, d), "bfloat16") for length, heads in ((3, 2), (64, 1)))
    loss = lambda q, k, v: flash_attention(q, k, v, mask=Causal(), implementation="xla").sum(dtype=jnp.float32)
    text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k).lower().as_text()
    found = re.findall(r"dot_general .*contracting_dims = \[([\d, ]+)\].*: \(tensor<([\dx]+)x(\w+)>", text)
    assert len(found) == text.count("dot_general ")
    few = [kind for axes, shape, kind in found
           if np.prod([int(shape.split("x")[int(axis)]) for axis in axes.split(",")]) <= 8]
    assert few and {*few} == {"f32"}
