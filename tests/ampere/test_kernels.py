"""The kernels with mma.sync themselves on a CPU: Pallas' GPU interpreter runs them on small shapes, against the float64
oracle.

What is inline PTX has its plain meaning inside `interpreted()`: copies, products by mma.sync, votes, additions to
global memory. Masks, tails, indices, the order of stages and the barriers between warpgroups are those of the real
kernel; that a fragment's registers lie as mma.sync and ldmatrix want them only a GPU shows (test_gpu).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_within, with_rest
from hopper.test_backward import assert_parts_are_written
from hopper.test_scores import Everything, normal

from pallas_flash import ALiBi, autodiff, device, flash_attention, masks
from pallas_flash.kernels.ampere import launches, mask_arrays, rules, support
from pallas_flash.kernels.ampere.schedule import BackwardSchedule, DqSchedule, ForwardSchedule
from pallas_flash.kernels.mosaic import bias, dropout, score_function
from pallas_flash.kernels.mosaic.interpret import interpreted
from pallas_flash.spec import Results
from pallas_flash.testing import conformance, inputs
from pallas_flash.testing.problems import Problem

pytestmark = pytest.mark.interpreted
NARROW = BackwardSchedule(block_q=32, num_stages=1)
TWO_WARPGROUPS = BackwardSchedule(row_tiles=1, warpgroups=2, part_q=64)
TWO_KERNELS = dataclasses.replace(NARROW, dq=DqSchedule(block_kv=32, num_stages=2))
CASES = {
    "causal": (NARROW, dict(q_len=140, kv_len=140, d=64, d_v=64)),
    "causal-gqa-bhld": (BackwardSchedule(), dict(q_len=70, kv_len=130, d=72, d_v=40, mask=masks.Causal(60), q_heads=2,
                                                 layout="BHLD")),
    "window-idle-float16": (dataclasses.replace(TWO_WARPGROUPS, dq=DqSchedule(row_tiles=1)),
                            dict(q_len=150, kv_len=100, d=96, d_v=96, dtypes=("float16",),
                                 mask=masks.Window(30, 5, -70))),
    "full-softcap-dropout": (dataclasses.replace(TWO_WARPGROUPS, block_q=32, part_q=32, num_stages=1),
                             dict(q_len=77, kv_len=64, d=128, d_v=128, mask=masks.Full(), softcap=3.0, scale=-0.2,
                                  dropout_rate=0.3)),
    "large-scores": (BackwardSchedule(), dict(q_len=70, kv_len=70, d=64, d_v=64, row_lse=5000.0)),
    "large-scores-two-kernels": (BackwardSchedule(dq=DqSchedule()), dict(q_len=70, kv_len=70, d=64, d_v=64,
                                                                        row_lse=5000.0)),
    "lengths-offsets-dense": (TWO_KERNELS, dict(
        q_len=70, kv_len=140, d=64, d_v=64, batch=2, dropout_rate=0.2, mask=(
            masks.InBounds(kv_len=np.array([100, 0])) & masks.Causal(np.array([[-20], [60]]))
            & masks.Dense(np.random.default_rng(3).random((2, 70, 140)) < np.array([0.9, 0.5])[:, None, None])))),
    "documents-window": (TWO_WARPGROUPS, dict(
        q_len=130, kv_len=140, d=64, d_v=64, layout="BHLD", mask=masks.Window(np.array([[90]]), 20) & masks.SegmentIds(
            np.arange(130) // 55, np.where(np.arange(140) < 70, np.arange(140) // 55, 7 - np.arange(140) // 20)))),
}
FORWARD = ForwardSchedule(block_kv=64)


def with_far_rows(array):
    """Some keys far below all others, so that queries which see no others need an anchor; some at -inf."""
    array = array.copy()
    array[..., :9], array[..., 20:24], array[..., -8:] = -3e3, -np.inf, -np.inf
    array[..., 1::2, 9:12] = -np.inf
    return array


def everything(length):
    """A score function that bends, is steep, and hides keys."""
    return Everything(normal(2, 21), np.arange(length, dtype=np.int32)[None] // 7, np.array([True, False]),
                      np.array(2, np.int32))


WIDE = ForwardSchedule(block_kv=32, row_tiles=1)
SPLIT = BackwardSchedule(block_q=32, warpgroups=2, row_tiles=1, num_stages=1, split=True,
                         dq=DqSchedule(block_kv=32, row_tiles=1))
HALVES = BackwardSchedule(warpgroups=2, halves=True)
CASES |= {
    "d256": (SPLIT, dict(q_len=70, kv_len=100, d=256, d_v=256, mask=masks.Causal(30), dropout_rate=0.2)),
    "d200-v168-gqa-documents": (dataclasses.replace(SPLIT, num_stages=2), dict(
        q_len=40, kv_len=70, d=200, d_v=168, q_heads=2, softcap=3.0, layout="BHLD", dtypes=("float16",),
        mask=masks.Causal(30) & masks.SegmentIds(np.arange(40) // 25, np.arange(70) // 25))),
    "halves-gqa-dropout": (HALVES, dict(q_len=140, kv_len=150, d=128, d_v=104, q_heads=2, dropout_rate=0.2,
                                        mask=masks.Causal(-20))),
    "halves-d256": (dataclasses.replace(HALVES, row_tiles=1, num_stages=1), dict(
        q_len=130, kv_len=100, d=256, d_v=200, layout="BHLD", softcap=3.0)),
    "halves-two-kernels-documents": (dataclasses.replace(HALVES, row_tiles=1, dq=DqSchedule(32, 1)), dict(
        q_len=80, kv_len=70, d=128, d_v=256, dtypes=("float16",),
        mask=masks.Causal(10) & masks.SegmentIds(np.arange(80) // 25, np.arange(70) // 25))),
    "halves-large-scores": (HALVES, dict(q_len=70, kv_len=70, d=128, d_v=128, row_lse=5000.0)),
    "ordered": (dataclasses.replace(NARROW, ordered=True), dict(q_len=330, kv_len=330, d=64, d_v=64)),
    "ordered-gqa-window": (BackwardSchedule(ordered=True), dict(
        q_len=200, kv_len=270, d=72, d_v=40, q_heads=2, layout="BHLD", mask=masks.Window(90, 20, 30))),
    "ordered-gqa-causal": (dataclasses.replace(NARROW, num_stages=2, ordered=True), dict(
        q_len=130, kv_len=200, d=64, d_v=64, q_heads=6, kv_heads=2, mask=masks.Causal(70))),
    "ordered-halves-full": (dataclasses.replace(HALVES, ordered=True), dict(
        q_len=140, kv_len=270, d=128, d_v=104, q_heads=2, batch=2, mask=masks.Full(), dropout_rate=0.2)),
    "ordered-one-waits": (dataclasses.replace(NARROW, ordered=True, one_waits=True), dict(
        q_len=200, kv_len=270, d=72, d_v=40, q_heads=2, layout="BHLD", mask=masks.Window(90, 20, 30))),
    "ordered-one-waits-halves": (dataclasses.replace(HALVES, ordered=True, one_waits=True), dict(
        q_len=140, kv_len=270, d=128, d_v=104, q_heads=4, kv_heads=2, mask=masks.Causal(130))),
    "bias-of-keys": (TWO_KERNELS, dict(q_len=70, kv_len=100, d=64, d_v=64, mask=masks.Causal(30), q_heads=2,
                                       bias=(1, 2, 1, 100), softcap=2.0)),
    "bias-of-pairs": (TWO_WARPGROUPS, dict(q_len=70, kv_len=90, d=64, d_v=64, mask=masks.Causal(20), layout="BHLD",
                                           bias=(1, 1, 70, 90), bias_dtype="float32", dropout_rate=0.2)),
    "bias-of-pairs-two-kernels": (TWO_KERNELS, dict(q_len=40, kv_len=70, d=64, d_v=64, mask=masks.Full(),
                                                    bias=(1, 1, 40, 70))),
    "score-function": (NARROW, dict(q_len=40, kv_len=70, d=64, d_v=64, mask=masks.Causal(20), q_heads=2,
                                    kv_heads=1, score=everything(70))),
    "score-function-two-kernels": (TWO_KERNELS, dict(q_len=40, kv_len=70, d=64, d_v=64, mask=masks.Full(), q_heads=2,
                                                     score=everything(70))),
    "alibi-softcap": (TWO_WARPGROUPS, dict(q_len=70, kv_len=70, d=72, d_v=64, q_heads=2, softcap=2.0,
                                           score=ALiBi(normal(2)))),
}


def problem_of(name):
    schedule, fields = CASES[name]
    small = dict(batch=1, q_heads=1, kv_heads=1, mask=masks.Causal(), dtypes=("bfloat16",))
    return schedule, Problem(name, "interpreted", **(small | fields))


def launched(schedule, problem, operands, *arrays):
    """The results of a pass."""
    spec, operands = bias.as_mask(problem.spec(), operands)
    make = launches.forward if isinstance(schedule, ForwardSchedule) else launches.backward
    found, made = make(spec, schedule), dict(zip(dropout.input_types(spec), dropout.inputs(spec, operands)))
    made |= zip(score_function.input_types(spec), score_function.inputs(spec, operands), strict=True)
    if spec.mask.has_arrays:
        made |= mask_arrays.make(spec, schedule, operands.mask)
        made |= bias.arrays(spec, schedule.padded_blocks, bias.anchored_inputs(spec, operands))
    return found(*arrays, *(made[name] for name in found.inputs if name in made))


def run(schedule, problem, operands, cotangents):
    """Everything that both passes compute, by name."""
    spec, operands = problem.spec(), jax.tree.map(jnp.asarray, operands)
    forward = FORWARD if spec.d_v <= 128 else WIDE
    assert support.why_not(spec, device.A100) == []
    assert rules.reasons_against(spec, schedule, 166_912) == rules.reasons_against(spec, forward, 166_912) == []
    q, k, v = operands[:3]
    dout, dlse = cotangents
    with interpreted():
        out, stats = launched(forward, problem, operands, q, k, v)
        stats = bias.without_anchor(spec, operands, stats)
        gradients = launched(schedule, problem, operands, q, k, v, out, bias.with_anchor(spec, operands, stats),
                             jnp.asarray(dout), jnp.asarray(with_rest(dlse, np.nan)))
    lse = autodiff.natural_lse(spec, operands, stats)
    return dict(out=out, lse=lse, **dict(zip(("dq", "dk", "dv"), gradients, strict=True)))


@pytest.mark.parametrize("name", CASES)
def test_kernels_agree_with_the_oracle(name):
    """With NaN in queries that attend to nothing, and in keys and values that nothing attends to; not with a score
    function: a key at a time, the interpreter takes minutes.
    """
    schedule, problem = problem_of(name)
    dtype = problem.dtypes[0]
    operands, cotangents = conformance.random_case(problem, dtype)
    if operands.bias is not None:
        operands = operands._replace(bias=with_far_rows(operands.bias))
    given = operands if problem.score is not None else inputs.poisoned(problem.spec(), operands)
    found = run(schedule, problem, given, cotangents)
    assert_within(conformance.budget(problem, dtype, operands, cotangents), found)


@pytest.mark.parametrize("far", [-1e9, "smallest"])
def test_pairs_hidden_by_the_smallest_number_weigh_alike(far):
    """Regression: without its anchor, lse of such rows came back as 0, and weights were not divided by their sum."""
    schedule, problem = problem_of("bias-of-pairs-two-kernels")
    operands, (dout, _) = conformance.random_case(problem, "bfloat16")
    array = operands.bias.copy()
    array[:, :, 5:20, :60] = jnp.finfo(array.dtype).min if far == "smallest" else far
    array[:, :, 5:20, 60:], array[:, :, 8:12, 3:30] = -np.inf, -np.inf
    given = jax.tree.map(jnp.asarray, operands._replace(bias=array))
    found = run(schedule, problem, given, (dout, np.zeros(problem.spec().lse_shape, np.float32)))
    attend = lambda q, k, v: flash_attention(q, k, v, bias=given.bias, implementation="reference", return_lse=True)
    (out, lse), pull = jax.vjp(attend, *given[:3])
    np.testing.assert_allclose(np.float32(found["out"]), np.float32(out), atol=0.03)
    np.testing.assert_allclose(found["lse"], lse, rtol=1e-5, atol=1e-3)
    for name, expected in zip(("dq", "dk", "dv"), pull((jnp.asarray(dout), jnp.zeros_like(lse))), strict=True):
        np.testing.assert_allclose(np.float32(found[name]), np.float32(expected), atol=0.06, err_msg=name)


FORWARDS = {
    "two-slots-more-keys": (ForwardSchedule(block_kv=32, num_stages=2), dict(q_len=140, kv_len=150, d=64, d_v=96)),
    "two-slots-causal-gqa": (ForwardSchedule(block_kv=32, num_stages=2), dict(
        q_len=200, kv_len=150, d=64, d_v=64, q_heads=2, mask=masks.Causal(-10))),
    "two-slots-window-idle": (ForwardSchedule(num_stages=2), dict(
        q_len=150, kv_len=100, d=40, d_v=64, layout="BHLD", mask=masks.Window(30, 5, -70), softcap=2.0)),
    "two-slots-full-one-tile": (ForwardSchedule(row_tiles=1, num_stages=2), dict(
        q_len=70, kv_len=40, d=128, d_v=72, mask=masks.Full(), dropout_rate=0.2)),
    "held-gqa": (ForwardSchedule(block_kv=32, num_stages=2, held=True), dict(
        q_len=200, kv_len=150, d=64, d_v=64, q_heads=2, mask=masks.Causal(-10))),
    "held-one-slot-window-idle": (ForwardSchedule(row_tiles=1, held=True), dict(
        q_len=150, kv_len=150, d=40, d_v=72, mask=masks.Window(30, 5, -70), softcap=2.0)),
    "rows-of-out": (ForwardSchedule(block_kv=32, out_in_rows=True), dict(
        q_len=150, kv_len=100, d=128, d_v=104, layout="BHLD", mask=masks.Full())),
    "rows-of-out-window-idle": (ForwardSchedule(row_tiles=1, held=True, peeled=True, out_in_rows=True), dict(
        q_len=150, kv_len=150, d=64, d_v=40, mask=masks.Window(30, 5, -70), dropout_rate=0.2)),
    "peeled-gqa": (ForwardSchedule(num_stages=2, held=True, peeled=True), dict(
        q_len=200, kv_len=200, d=64, d_v=64, q_heads=2)),
    "peeled-window-dropout": (ForwardSchedule(block_kv=32, peeled=True), dict(
        q_len=300, kv_len=300, d=96, d_v=64, layout="BHLD", mask=masks.Window(100, 0), dropout_rate=0.2)),
    "two-slots-documents-large": (ForwardSchedule(block_kv=32, num_stages=2), dict(
        q_len=130, kv_len=130, d=64, d_v=64, row_lse=5000.0,
        mask=masks.Causal() & masks.SegmentIds(*[np.arange(130) // 55] * 2))),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_forward_of_other_schedules_agrees_with_the_oracle(name):
    """With NaN in keys and values that nothing attends to, too."""
    schedule, fields = FORWARDS[name]
    problem = Problem(name, "interpreted", **dict(batch=1, q_heads=1, kv_heads=1, mask=masks.Causal(),
                                                  dtypes=("bfloat16",)) | fields)
    operands, cotangents = conformance.random_case(problem, "bfloat16")
    spec, given = problem.spec(), jax.tree.map(jnp.asarray, inputs.poisoned(problem.spec(), operands))
    assert rules.reasons_against(spec, schedule, 166_912) == []
    with interpreted():
        out, stats = launched(schedule, problem, given, *given[:3])
    found = dict(out=out, lse=autodiff.natural_lse(spec, given, stats))
    assert_within(conformance.budget(problem, "bfloat16", operands, cotangents), found)


@pytest.mark.parametrize(("schedule", "layout", "axis"), [(NARROW, "BLHD", 2), (TWO_KERNELS, "BHLD", 3)],
                         ids=["fused-heads", "two-kernels-columns"])
def test_gradients_that_are_parts_of_arrays_are_those_of_dense_ones(schedule, layout, axis):
    problem = Problem("parts", "interpreted", batch=1, q_heads=2, kv_heads=2, q_len=40, kv_len=70, d=64, d_v=64,
                      mask=masks.Causal(30), dtypes=("bfloat16",), layout=layout)
    operands, (dout, dlse) = conformance.random_case(problem, "bfloat16")
    budget = conformance.budget(problem, "bfloat16", operands, (dout, dlse))
    saved = jnp.asarray(budget.oracle.out, "bfloat16"), with_rest(jnp.asarray(budget.oracle.lse, jnp.float32))
    arrays = *map(jnp.asarray, operands[:3]), *saved, jnp.asarray(dout), jnp.asarray(with_rest(dlse))
    assert_parts_are_written(lambda: launches.backward(problem.spec(), schedule), arrays, axis)


@pytest.mark.parametrize("name", ["causal-gqa-bhld", "window-idle-float16"])
def test_partial_gradients_from_delta_alone(name):
    """The backward of a part of the keys reads no out; the second case copies dout."""
    schedule, problem = problem_of(name)
    spec, dtype = dataclasses.replace(problem.spec(), partial=True), problem.dtypes[0]
    operands, (dout, dlse) = conformance.random_case(problem, dtype)
    budget = conformance.budget(problem, dtype, operands, (dout, dlse))
    q, k, v, dout = (jnp.asarray(x) for x in (*operands[:3], dout))
    stats = with_rest(jnp.asarray(budget.oracle.lse, jnp.float32))
    kept, given = autodiff.without_out(spec, Results(jnp.asarray(budget.oracle.out, dtype), stats),
                                       Results(dout, with_rest(dlse)))
    with interpreted():
        found = launches.backward(spec, schedule)(q, k, v, kept.stats, *given)
    assert {x.dtype.name for x in found} == {"float32"}
    used = budget.used(budget.baseline._replace(**dict(zip(("dq", "dk", "dv"), found, strict=True))))
    assert max(used.values()) <= 1, used


@pytest.mark.parametrize(("schedule", "d"), [(NARROW, 64), (TWO_KERNELS, 64), (SPLIT, 64), (HALVES, 128)],
                         ids=["fused", "two-kernels", "split", "halves"])
def test_a_hidden_key_that_is_not_finite_reaches_nothing(schedule, d):
    """0 * NaN is NaN: a product over a whole tile must not carry it to queries that do not attend to its key.

    Regression: a hidden value was finite, but its product with dout was not, and all of dq became NaN.
    """
    problem = Problem("hidden", "interpreted", batch=1, q_heads=1, kv_heads=1, q_len=40, kv_len=70, d=d, d_v=d,
                      mask=masks.Causal(10), dtypes=("bfloat16",))
    operands, cotangents = conformance.random_case(problem, "bfloat16")
    k, v, seen = operands.k.copy(), operands.v.copy(), 48
    k[:, 60], v[:, 65], v[:, 66], v[:, seen] = np.nan, np.inf, 3e38, np.nan
    found = run(schedule, problem, operands._replace(k=k, v=v), cotangents)
    attends, budget = np.arange(40) + 10 >= seen, conformance.budget(problem, "bfloat16", operands, cotangents)
    for name in ("out", "dq"):
        rows = np.asarray(found[name], np.float32)[0, :, 0]
        wanted = getattr(budget.oracle, name)[0, :, 0]
        assert np.isnan(rows[attends]).all(), name
        np.testing.assert_allclose(rows[~attends], wanted[~attends], atol=2.0**-6 * np.abs(wanted).max(), err_msg=name)
    for name in ("dk", "dv"):  # the last keys meet only queries that attend to the bad one, or none
        assert (np.asarray(found[name], np.float32)[0, 50:, 0] == 0).all(), name
