"""What only a GPU shows about the kernels with mma.sync: that registers lie as the instructions want them, races, tiles
and tails of every head size, and repeated runs.

A Hopper GPU has these instructions, too. Masks, dtypes and defects of other libraries on small shapes are in
test_conformance, large scores in test_large_scores.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_within

from pallas_flash import Causal, Dense, Full, InBounds, PrefixLM, SegmentIds, Window, device, flash_attention
from pallas_flash.kernels.ampere import defaults, rules, work
from pallas_flash.kernels.ampere.schedule import BackwardSchedule, DqSchedule, ForwardSchedule
from pallas_flash.testing import conformance
from tests.api import test_partial
from tests.hopper.test_gpu import Case, assert_right, case_of, check, each_direction, problem_of, results

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

SHAPES = {
    "d64": (64, dict(q_len=768, kv_len=768, batch=2)),
    "d64-full-ragged": (64, dict(q_len=999, kv_len=777, mask=Full())),
    "d64-bottom-right-heads-first": (64, dict(q_len=300, kv_len=700, mask=Causal(offset=400), layout="BHLD")),
    "d64-prefix-fp16": (64, dict(q_len=500, kv_len=500, mask=PrefixLM(150), dtypes=("float16",))),
    "d64-rows-of-lse-200": (64, dict(q_len=700, kv_len=700, row_lse=200.0)),
    "d96": (96, dict(q_len=500, kv_len=500)),
    "d128-mqa": (128, dict(q_len=1000, kv_len=1000, q_heads=8, kv_heads=1)),
    "d128-window": (128, dict(q_len=900, kv_len=900, mask=Window(left=200, right=30))),
    "d128-more-queries-fp16": (128, dict(q_len=700, kv_len=300, dtypes=("float16",))),
    "d128-idle": (128, dict(q_len=400, kv_len=300, mask=Causal(offset=-100))),
    "d40-v136-softcap": (40, dict(d_v=136, q_len=300, kv_len=300, layout="BHLD", softcap=3.0)),
    "d192-v128": (192, dict(d_v=128, q_len=500, kv_len=500)),
    "d64-documents-lengths": (64, dict(q_len=700, kv_len=700, batch=2, mask=Causal() & SegmentIds(
        *[np.arange(700) // 130] * 2) & InBounds(kv_len=np.array([690, 333])))),
    "d128-offsets-gqa": (128, dict(q_len=300, kv_len=900, batch=2, mask=Causal(
        np.array([600, 200])))),
    "d128-dense": (128, dict(q_len=400, kv_len=500, mask=Dense(np.random.default_rng(0).random((400, 500)) < 0.3))),
    "d96-dropout": (96, dict(q_len=300, kv_len=300, dropout_rate=0.2)),
    "d128-repeats-window-hidden": (128, dict(q_len=500, kv_len=400, deterministic=True, mask=Window(90, 10, -50))),
    "d64-repeats-documents": (64, dict(q_len=300, kv_len=300, deterministic=True, mask=Causal() & SegmentIds(
        *[np.arange(300) // 70] * 2))),
    "d256": (256, dict(q_len=500, kv_len=500)),
    "d256-window-gqa-heads-first": (256, dict(q_len=333, kv_len=400, q_heads=4, kv_heads=2, layout="BHLD",
                                              mask=Window(100, 20))),
    "d256-documents": (256, dict(q_len=300, kv_len=300, mask=Causal() & SegmentIds(*[np.arange(300) // 70] * 2))),
    "d200-v168-dropout-softcap-fp16": (200, dict(d_v=168, q_len=300, kv_len=200, dropout_rate=0.2, softcap=3.0,
                                                 dtypes=("float16",))),
    "d192-v192-idle": (192, dict(q_len=300, kv_len=200, mask=Causal(offset=-100))),
    "one-query": (128, dict(q_len=1, kv_len=900, mask=Causal(offset=899))),
}


def ours(direction, case, **keywords):
    """A function of `case.arrays` to its results, by name."""
    options = case.problem.keywords(case.operands) | keywords
    attend = lambda q, k, v: flash_attention(q, k, v, implementation="ampere", **options)
    return functools.partial(results, direction, attend)


def everything(case: Case):
    """What both directions compute."""
    found = {}
    for direction in ("forward", "backward"):
        found |= jax.jit(ours(direction, case))(*case.arrays)
    return found


def assert_repeats(run, case, names, count):
    """What is named is the same in each of so many runs."""
    first = run(*case.arrays)
    differs = jax.jit(lambda a, b: jnp.any(jnp.stack([jnp.any(a[name] != b[name]) for name in names])))
    assert sum(differs(first, run(*case.arrays)).astype(int) for _ in range(count)) == 0, names


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name):
    d, options = SHAPES[name]
    case = case_of(problem_of("tiles and tails of every head size", d, **options))
    assert_right(case, everything(case))


SCHEDULES = {
    "32-keys": (128, ForwardSchedule(block_kv=32)),
    "16-rows-a-warp": (64, ForwardSchedule(row_tiles=1)),
    "32-queries": (64, BackwardSchedule(block_q=32, num_stages=1)),
    "32-queries-two-warpgroups": (128, BackwardSchedule(block_q=32, row_tiles=1, warpgroups=2, num_stages=1)),
    "32-keys-two-slots-dq": (128, BackwardSchedule(row_tiles=1, warpgroups=2, num_stages=1, block_q=32,
                                                   dq=DqSchedule(32, 1, 2))),
    "split": (256, BackwardSchedule(block_q=32, row_tiles=1, warpgroups=2, num_stages=1, split=True,
                                    dq=DqSchedule(32, 1, 1))),
    "64-keys": (128, BackwardSchedule(block_q=32, row_tiles=1, num_stages=1)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_of_smaller_gpus(name):
    """A Hopper GPU has more shared memory, so its defaults are others."""
    d, schedule = SCHEDULES[name]
    case = case_of(problem_of("other schedules", d, q_len=450, kv_len=450))
    assert rules.reasons_against(case.problem.spec(), schedule, device.L4.smem_bytes) == []
    with defaults.assume(schedule):
        jax.clear_caches()
        assert_right(case, everything(case))
    jax.clear_caches()


HALVES = BackwardSchedule(warpgroups=2, halves=True)
DOCUMENTS = Causal() & SegmentIds(*[np.arange(450) // 130] * 2)
TWO_SLOTS = ForwardSchedule(num_stages=2)
NO_DEFAULTS = {
    "halves": (HALVES, dict(d=128, kv_heads=1)),
    "halves-dropout-ragged": (HALVES, dict(d=104, kv_len=333, dropout_rate=0.2, dtypes=("float16",), layout="BHLD")),
    "halves-documents": (dataclasses.replace(HALVES, wide_adds=True), dict(d=128, mask=DOCUMENTS)),
    "halves-rows-of-lse-200": (HALVES, dict(d=128, row_lse=200.0)),
    "halves-two-kernels": (dataclasses.replace(HALVES, dq=DqSchedule(32, 2, 2)), dict(d=128, deterministic=True)),
    "halves-d256": (dataclasses.replace(HALVES, row_tiles=1, wide_adds=True), dict(d=256)),
    "halves-d256-one-slot-window": (dataclasses.replace(HALVES, row_tiles=1, num_stages=1), dict(
        d=256, kv_len=300, mask=Window(100, 20))),
    "wide-adds": (BackwardSchedule(wide_adds=True), dict(d=64)),
    "wide-adds-32-queries": (BackwardSchedule(block_q=32, num_stages=1, wide_adds=True), dict(d=64, mask=Full())),
    "two-slots": (TWO_SLOTS, dict(d=128)),
    "two-slots-gqa": (TWO_SLOTS, dict(d=64, q_heads=8)),
    "two-slots-documents": (TWO_SLOTS, dict(d=64, mask=DOCUMENTS)),
    "two-slots-window-idle": (TWO_SLOTS, dict(d=64, kv_len=300, mask=Window(100, 20, -50), layout="BHLD")),
    "held-one-slot-window-idle": (ForwardSchedule(held=True), dict(
        d=64, kv_len=300, mask=Window(100, 20, -50), layout="BHLD", dtypes=("float16",))),
    "peeled-one-slot-window": (ForwardSchedule(block_kv=32, peeled=True), dict(
        d=96, mask=Window(100, 0), dtypes=("float16",))),
    "rows-of-out-d104": (ForwardSchedule(block_kv=32, out_in_rows=True), dict(d=104, kv_len=300, mask=Full())),
    "rows-of-out-d40": (ForwardSchedule(row_tiles=1, held=True, peeled=True, out_in_rows=True), dict(
        d=40, layout="BHLD", dropout_rate=0.2, dtypes=("float16",))),
    "ordered": (BackwardSchedule(ordered=True, wide_adds=True), dict(d=64, deterministic=True, kv_heads=1)),
    "ordered-window": (dataclasses.replace(HALVES, ordered=True), dict(
        d=128, kv_len=300, mask=Window(100, 20), deterministic=True)),
    "ordered-d256": (dataclasses.replace(HALVES, row_tiles=1, ordered=True, wide_adds=True), dict(
        d=256, deterministic=True, mask=Full())),
    "ordered-one-waits": (BackwardSchedule(ordered=True, one_waits=True), dict(d=64, deterministic=True, kv_heads=1)),
    "ordered-one-waits-window": (dataclasses.replace(HALVES, ordered=True, one_waits=True, wide_adds=True), dict(
        d=128, kv_len=300, mask=Window(100, 20), deterministic=True)),
    "two-slots-32-keys": (dataclasses.replace(TWO_SLOTS, block_kv=32), dict(d=128, kv_len=700, mask=Full())),
}


@pytest.mark.parametrize("name", NO_DEFAULTS)
def test_schedules_that_are_no_defaults(name):
    schedule, options = NO_DEFAULTS[name]
    case = case_of(problem_of("other schedules", **dict(q_len=450, kv_len=450) | options))
    assert rules.reasons_against(case.problem.spec(), schedule, device.H200.smem_bytes) == []
    with defaults.assume(schedule):
        jax.clear_caches()
        assert_right(case, everything(case))
    jax.clear_caches()


@pytest.mark.parametrize(("d", "schedule"), [
    (128, HALVES), (256, dataclasses.replace(HALVES, row_tiles=1)), (64, TWO_SLOTS)],
    ids=["halves", "halves-d256", "two-slots"])
def test_other_schedules_repeat(d, schedule):
    """All but dq is the same in each of 300 runs: a race would show."""
    case = case_of(problem_of("races", d, q_len=600, kv_len=600, batch=4))
    with defaults.assume(schedule):
        jax.clear_caches()
        first = everything(case)
        assert_right(case, first)
        direction, names = ("forward", ("out",)) if schedule is TWO_SLOTS else ("backward", ("dk", "dv"))
        assert_repeats(jax.jit(ours(direction, case)), case, names, 300)
    jax.clear_caches()


@pytest.mark.parametrize(("d", "options"), [
    (64, dict(q_heads=8, kv_heads=2)), (128, dict(kv_heads=4)), (128, dict(mask=Full())),
    (128, dict(mask=Window(300, 50))), (256, dict(q_len=1100, kv_len=1100))],
    ids=["d64-gqa", "d128", "d128-full", "d128-window", "d256"])
def test_ordered_additions_repeat(d, options):
    """All is the same in each of 1000 runs, in which other blocks come first; the grid has more blocks than fit."""
    options = dict(q_len=2500, kv_len=2500, deterministic=True) | options
    of = lambda **size: case_of(problem_of("order", d, **options | size))
    case, small = of(batch=8), of(batch=1, q_len=700, kv_len=700)  # the large one takes minutes in float64
    schedule = defaults.default_backward(case.problem.spec(), device.H200)
    assert schedule.ordered and work.kv_work(case.problem.spec(), schedule).blocks > 2 * schedule.num_sms
    assert defaults.default_backward(small.problem.spec(), device.H200) == schedule
    assert_right(small, everything(small))
    assert_repeats(jax.jit(ours("backward", case)), case, ("dq", "dk", "dv"), 1000)


def test_parts_of_a_sum_are_not_rounded():
    """As several GPUs add them up."""
    case = conformance.random_case(test_partial.PROBLEM, "bfloat16")
    found = test_partial.gradients(test_partial.partial(), "ampere", *case)
    assert {x.dtype for x in found.values()} == {np.dtype(np.float32)}
    assert_within(conformance.budget(test_partial.PROBLEM, "bfloat16", *case), found)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_runs_repeat(d, deterministic):
    """All but dq, whose additions have no order unless asked for, is the same in each of a thousand runs: a race
    would show.
    """
    case = case_of(problem_of("races", d, q_len=600, kv_len=600, batch=4, deterministic=deterministic))
    assert_right(case, everything(case))
    run = {direction: jax.jit(ours(direction, case)) for direction in ("forward", "backward")}
    for direction, names in (("forward", ("out", "lse")), ("backward", ("dk", "dv", *["dq"] * deterministic))):
        assert_repeats(run[direction], case, names, 1000)


@pytest.mark.timeout(240)
@each_direction
@pytest.mark.parametrize("options", ("plain", "documents", "dense"))
@pytest.mark.parametrize("tool", ("memcheck", "racecheck"))
def test_compute_sanitizer_finds_nothing(direction, tool, options):
    check(direction, tool, options, "ampere")
