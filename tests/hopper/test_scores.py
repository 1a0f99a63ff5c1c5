"""Score functions in the Hopper kernels: their programs on tiles in plain JAX, the kernels in Pallas' interpreter, the
gradients of their arrays, and what the kernels do not take.
"""

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import pallas_flash as pf
from pallas_flash import ALiBi, Causal, RelativeBias, Score, Window, autodiff, device, dispatch, scores
from pallas_flash.kernels.hopper import calls, defaults, rules, support
from pallas_flash.kernels.hopper.backward import dq as dq_pass
from pallas_flash.kernels.hopper.backward.statistics import IDLE
from pallas_flash.kernels.hopper.schedule import BackwardSchedule, DqSchedule, ForwardSchedule, SplitSchedule
from pallas_flash.kernels.mosaic import bias, dropout, dscore, score_function, traced
from pallas_flash.kernels.mosaic.interpret import interpreted
from pallas_flash.spec import Operands, Results
from pallas_flash.testing import conformance, inputs
from pallas_flash.testing.problems import Problem

Q_LEN, KV_LEN = 24, 48
FORWARD = ForwardSchedule(block_kv=32, warpgroups=1, num_blocks=2)
BACKWARD = BackwardSchedule(SplitSchedule(), DqSchedule(block_kv=32, warpgroups=1))


def normal(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Everything(Score):
    """Reads arrays by head, by row, by column and by pair; steep, bent, and hides some keys from all queries."""

    tables: Any  # (heads, distances)
    groups: Any  # (batch, length) integers
    flags: Any  # (heads,) booleans
    level: Any  # () integer

    def __call__(self, score, batch, head, q_pos, kv_pos):
        near = jnp.exp2(self.tables * 0.1)[head][jnp.clip(kv_pos - q_pos + 10, 0, 20)]
        groups = jnp.asarray(self.groups)  # the oracle has NumPy's
        same = groups[batch, q_pos] == groups[batch, kv_pos]
        steep = jnp.where(jnp.asarray(self.flags)[head], self.level, 1).astype(score.dtype)
        bent = 3 * jnp.tanh(score * near) + steep * score**2
        return jnp.where(kv_pos % 11 == 5, -jnp.inf, jnp.where(same, bent, jax.nn.relu(score)))


EVERYTHING = Everything(normal(2, 21), np.arange(2 * KV_LEN, dtype=np.int32).reshape(2, KV_LEN) // 7,
                        np.array([True, False]), np.array(2, np.int32))


def problem_of(name, score, **options):
    fields = dict(batch=1, q_heads=2, kv_heads=1, q_len=Q_LEN, kv_len=KV_LEN, d=64, d_v=64, dtypes=("bfloat16",))
    return Problem(name, "score functions", score=score, **(fields | options))


# -- programs ----------------------------------------------------------------------------------------------------------

def smooth(score, batch, head, q_pos, kv_pos):
    return jnp.log1p(jnp.exp(score)) + jax.nn.gelu(score) - jax.nn.silu(score) + jnp.expm1(-jnp.abs(score))


def powers(score, batch, head, q_pos, kv_pos):
    size = jnp.abs(score) + 0.1
    # Regression: whole exponents above 64 gave NaN of negative numbers.
    far = jax.lax.pow(score / 8, jnp.float32(100)) + jax.lax.pow(-size, jnp.float32(-65))
    roots = jnp.sqrt(size) + jax.lax.rsqrt(size)
    return jnp.sign(score) * size**1.5 + size**-2.0 + size**3 + roots + score**2.0 + jnp.clip(far, -1, 1)


def waves(score, batch, head, q_pos, kv_pos):
    angle = (q_pos - 2 * kv_pos).astype(score.dtype) / 3
    return score * jnp.sin(angle) + jnp.cos(8 * score) + jnp.floor(score) + jnp.ceil(3 * score)


def choices(score, batch, head, q_pos, kv_pos):
    is_near = (abs(q_pos - kv_pos) < 4) & ~((kv_pos >> 1) % 3 == 0) | (q_pos // 5 == kv_pos // 5)
    capped = jnp.clip(score, -1.0, jnp.minimum(2, head).astype(score.dtype))
    capped = jnp.maximum(capped, 0.5 * batch.astype(score.dtype))
    return jnp.where(jnp.isfinite(score) & is_near, capped, -score) + jax.lax.erf(score)


FUNCTIONS = {"smooth": smooth, "powers": powers, "waves": waves, "choices": choices, "everything": EVERYTHING,
             "alibi": ALiBi(normal(2), offset=np.array([3, 1])), "relative": RelativeBias(normal(2, 9), offset=-2)}
TILE = 24, 8


def spread(x, axes, wanted):
    x = jnp.asarray(x).reshape([TILE[axis] if axis in axes else 1 for axis in wanted])
    return jnp.broadcast_to(x, [TILE[axis] for axis in wanted])


def on_tile(function, s, place):
    """The program of a function, and of its derivative, on a tile in plain JAX."""
    given = jax.tree.map(jnp.asarray, scores.checked(function))
    own, arrays = traced.program(given.with_placeholders()), traced.arrays(
        given.with_placeholders(), scores.floats(given), scores.integers(given))
    in_jnp = traced.Place(spread, lambda i, element, axes: arrays[i][element])
    batch, head, q_pos, kv_pos = place
    values = traced.evaluate(own, [own.value, own.slope], {
        "score": traced.Value(s, (0, 1)), "batch": traced.Value(batch), "head": traced.Value(head),
        "q_pos": traced.Value(q_pos, (0,)), "kv_pos": traced.Value(kv_pos, (1,))}, in_jnp, {})
    return [spread(x.x, x.axes, (0, 1)) for x in values]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_programs_compute_what_the_function_does(name):
    s, (batch, head) = 2 * normal(*TILE), (np.int32(1), np.int32(1))
    place = batch, head, np.arange(5, 29, dtype=np.int32), np.arange(20, 28, dtype=np.int32)
    assert traced.why_not(scores.checked(FUNCTIONS[name]).with_placeholders()) == ()
    value, slope = jax.jit(lambda s: on_tile(FUNCTIONS[name], s, place))(s)
    pairs = scores.Pairs(*(jnp.asarray(x).reshape(shape) for x, shape in zip(
        place, ((1, 1, 1, 1), (1, 1, 1, 1), (1, 1, -1, 1), (1, 1, 1, -1)))))
    function = jax.tree.map(jnp.asarray, scores.checked(FUNCTIONS[name]))
    wanted = jax.jit(lambda s: scores.value_and_slope(function, s[None, None], pairs))(s)
    for found, exact in zip((value, slope), wanted):
        np.testing.assert_allclose(found, exact[0, 0], rtol=2e-5, atol=2e-5)


# -- kernels -----------------------------------------------------------------------------------------------------------

def run_interpreted(spec, given, cotangents):
    """out, the statistics, and the gradients of q, k and v."""
    masked, operands = bias.as_mask(spec, given)
    for schedule in (FORWARD, BACKWARD):
        assert rules.reasons_against(masked, schedule, 232_448) == []
    more = *score_function.inputs(masked, operands), *jax.tree.leaves(operands.mask)
    dout, dstats = cotangents
    with interpreted():
        out, stats = jax.block_until_ready(calls._forward(masked, FORWARD)(*given[:3], *more))
        arrays = *given[:3], out, stats, dout, dstats, *more
        return out, stats, *jax.block_until_ready(calls._backward(masked, BACKWARD)(*arrays))


@pytest.mark.interpreted
def test_everything_agrees_with_the_oracle():
    """Without bad keys, which `test_scores_gpu` has: a key at a time, the interpreter takes half a minute."""
    problem = problem_of("everything", EVERYTHING, mask=Causal(offset=5))
    operands, (dout, dlse) = conformance.random_case(problem, "bfloat16")
    budget, spec = conformance.budget(problem, "bfloat16", operands, (dout, dlse)), problem.spec()
    assert support.why_not(spec, device.H100) == []
    given = jax.tree.map(jnp.asarray, operands)
    dstats = jnp.stack([jnp.asarray(dlse), jnp.zeros_like(dlse)], axis=2)
    out, stats, dq, dk, dv = run_interpreted(spec, given, (jnp.asarray(dout), dstats))
    found = dict(out=out, dq=dq, dk=dk, dv=dv, lse=autodiff.natural_lse(spec, given, stats))
    used = budget.used(budget.baseline._replace(**found))
    assert max(used.values()) <= 1, used


def test_scores_have_exponents_that_are_float32_numbers():
    """Regression: finfo.min times log2(e) is -inf, and a row of such scores attended to nothing."""
    smallest, even = np.finfo(np.float32).min, np.float32(-(2.0**40))
    odd = np.nextafter(even, -np.inf)
    s = jnp.array([[smallest, -np.inf, np.inf, np.nan, odd, 3.0000002, -1e9, 0]], jnp.float32)
    with interpreted():
        found = np.asarray(score_function._within_range(s))
    np.testing.assert_array_equal(found, [[-(2.0**126), -np.inf, np.inf, np.nan, even, s[0, 5], -1e9, 0]])
    assert np.isfinite(np.float32(-(2.0**126)) * np.float32(np.log2(np.e)))


DSCORE = {
    "alibi": (ALiBi(normal(4), offset=20), dict(q_heads=4, mask=Window(30, 10), layout="BHLD", dropout_rate=0.3)),
    "relative": (RelativeBias(normal(2, 31).astype("bfloat16")), dict(q_len=150, softcap=2.0)),
}


@pytest.mark.parametrize("name", DSCORE)
def test_gradients_of_arrays_agree_with_the_oracle(name):
    score, options = DSCORE[name]
    problem = problem_of(name, score, **options)
    operands, (dout, dlse) = conformance.random_case(problem, "bfloat16")
    budget, spec = conformance.budget(problem, "bfloat16", operands, (dout, dlse)), problem.spec()
    lse = jnp.asarray(budget.oracle.lse, jnp.float32)
    results = Results(jnp.asarray(budget.oracle.out, "bfloat16"), jnp.stack([lse, jnp.zeros_like(lse)], axis=2))
    cotangents = Results(jnp.asarray(dout), jnp.stack([jnp.asarray(dlse), jnp.zeros_like(dlse)], axis=2))
    given = jax.tree.map(jnp.asarray, inputs.poisoned(spec, operands))
    (found,) = jax.jit(lambda operands: dscore.dscore(
        spec, operands, results, cotangents, dropout.inputs(spec, operands)))(given)
    assert found.dtype == operands.score[0].dtype
    used = budget.used(budget.baseline._replace(dscore=found))
    assert max(used.values()) <= 1, used


@dataclasses.dataclass(frozen=True)
class Lowest(Score):
    """Hides all keys from the first queries by finfo.min, with a slope that is lost in it."""

    slopes: Any

    def __call__(self, score, batch, head, q_pos, kv_pos):
        hidden = jnp.where(q_pos < 8, jnp.finfo(score.dtype).min, 0)
        return score + self.slopes[head] * (kv_pos - q_pos).astype(score.dtype) + hidden


def test_gradients_of_arrays_count_keys_that_weigh_alike():
    """Regression: of the kernels' lse, no lower than -2^126, weights of scores of finfo.min were 0 here alone."""
    problem = problem_of("lowest", Lowest(normal(2) / 8))
    operands, (dout, dlse) = conformance.random_case(problem, "bfloat16")
    spec, given = problem.spec(), jax.tree.map(jnp.asarray, operands)
    results = autodiff.forward(spec, "xla", given)
    cotangents = Results(jnp.asarray(dout), jnp.stack([jnp.asarray(dlse), jnp.zeros_like(dlse)], axis=2))
    (wanted,) = autodiff.backward(spec, "xla", given, results, cotangents).dscore
    lse = jnp.maximum(results.stats[:, :, 0], -(2.0**126))  # as the kernels make it
    results = results._replace(stats=results.stats.at[:, :, 0].set(lse))
    (found,) = jax.jit(lambda operands: dscore.dscore(spec, operands, results, cotangents, ()))(given)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_rows_of_the_lowest_scores_are_large():
    """Regression: they were taken for idle ones, and dq of them was that of weights whose exponents are rounded."""
    spec = problem_of("lowest", Lowest(normal(2))).spec()
    lowest = score_function.LOWEST * np.log2(np.e)
    with interpreted():
        found = [np.any(dq_pass.any_large_in_warp(spec, jnp.full(64, x, jnp.float32))) for x in (lowest, IDLE, 1.0)]
    assert found == [True, False, False]


# -- what the kernels take ---------------------------------------------------------------------------------------------

def sorted_scores(score, batch, head, q_pos, kv_pos):
    return score + jnp.sort(jnp.stack([score, 2 * score]))[0]


def powered(score, batch, head, q_pos, kv_pos):
    return abs(score) ** (0.5 * head.astype(score.dtype))


def wide(score, batch, head, q_pos, kv_pos):
    return score.astype(jnp.bfloat16).astype(score.dtype)


@dataclasses.dataclass(frozen=True)
class Rowwise(Score):
    table: Any

    def __call__(self, score, batch, head, q_pos, kv_pos):
        return score + (self.table[head] * score).sum()


REFUSED = {"sorted": (sorted_scores, "computes 'stack'"), "bfloat16": (wide, "in bfloat16"),
           "rows": (Rowwise(normal(2, 5)), r"'mul' of an array \(5,\).*\(index arrays down to a number"),
           "remainder": (lambda score, batch, head, q_pos, kv_pos: score % 1, "remainders of integers only"),
           "power": (powered, "constant exponent"),
           "bessel": (lambda score, batch, head, q_pos, kv_pos: jax.scipy.special.i0e(score), "'bessel_i0e'")}


@pytest.mark.parametrize("name", REFUSED)
def test_what_kernels_cannot_compute_is_a_reason(name):
    function, reason = REFUSED[name]
    spec = problem_of(name, scores.checked(function)).spec()
    with pytest.raises(pf.UnsupportedError, match=reason):
        dispatch.decide(spec, device.H100, "hopper")
    assert dispatch.decide(spec, device.H100).implementation.name == "xla"


def test_an_automatic_choice_takes_the_kernels():
    """And torch launches them directly."""
    spec = problem_of("alibi", ALiBi(normal(2))).spec()
    assert support.why_not(spec, device.H100) == []
    assert dispatch.decide(spec, device.H100).implementation.name == "hopper"
    both = problem_of("both", ALiBi(normal(2)), bias=(1, 2, 1, KV_LEN)).spec()
    assert any("a bias or a score function, not both yet" in reason for reason in support.why_not(both, device.H100))
    assert all(x is not None for x in calls.passes(spec, device.H100))


def test_wide_heads_take_no_score_function():
    """Regression: their backward, that of xla, took lse of rows of finfo.min, -2^126 here, for another one's."""
    for dims in (dict(d=264), dict(d_v=264)):
        spec = problem_of("wide", ALiBi(normal(2)), **dims).spec()
        assert any("head dimensions up to 256 only, d=" in reason for reason in support.why_not(spec, device.H100))


def test_schedules_know_what_a_function_needs():
    def kernels(score, d, **options):
        spec = problem_of("schedule", scores.checked(score), d=d, d_v=d, **options).spec()
        assert defaults.default_forward(spec, device.H100).maxima == 0
        backward = defaults.default_backward(spec, device.H100)
        masked, _ = bias.as_mask(spec, Operands(*[None] * 4, (), spec.mask, *[()] + [None] * 3))
        for schedule in (defaults.default_forward(masked, device.H100), backward):
            assert rules.reasons_against(masked, schedule, device.H100.smem_bytes) == []
        return type(backward.kv).__name__, backward.fused
    alibi, table = ALiBi(normal(2)), RelativeBias(normal(2, 9))
    assert [kernels(alibi, d) for d in (64, 128, 256)] == [
        ("KvSchedule", True), ("KvSchedule", True), ("SplitSchedule", False)]
    assert kernels(alibi, 128, softcap=30.0) == ("SplitSchedule", False)
    assert kernels(table, 128) == ("KvSchedule", False)
    assert [kernels(smooth, d) for d in (64, 128, 256)] == [
        ("KvSchedule", False), ("SplitSchedule", False), ("SplitSchedule", False)]


# -- vmap and shard_map ------------------------------------------------------------------------------------------------

Q = jax.ShapeDtypeStruct((2, 128, 2, 64), jnp.bfloat16)
STACKED = jax.ShapeDtypeStruct((3, *Q.shape), Q.dtype)


def attend(q, slopes, offset):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return pf.flash_attention(q, q, q, score=ALiBi(slopes, offset=offset), mask=Causal(), implementation="hopper")


@pytest.mark.parametrize(("slopes", "offset", "in_turns"), [
    ((2,), 0, False),  # as many slopes as batch entries: they are not taken for those
    ((3, 2), 0, True), ((2,), np.zeros(2, np.int32), True)], ids=["shared", "mapped", "of-the-batch"])
def test_vmap_takes_elements_in_turns_where_the_function_differs(slopes, offset, in_turns):
    slopes = jax.ShapeDtypeStruct(slopes, jnp.float32)
    mapped = jax.vmap(lambda q, slopes: attend(q, slopes, offset), in_axes=(0, 0 if slopes.ndim == 2 else None))
    with device.assume(device.H100):
        text = str(jax.make_jaxpr(mapped)(STACKED, slopes))
    assert ("scan[" in text) == in_turns


@dataclasses.dataclass(frozen=True)
class Prepared(Score):
    """XLA computes its table before the launch, of an array and of numbers."""

    slopes: Any

    def __call__(self, score, batch, head, q_pos, kv_pos):
        slopes = jnp.cumsum(jnp.exp2(self.slopes * 0.1) + jnp.arange(2, dtype=jnp.float32)) * jnp.ones(2)
        return score + slopes[head] * (kv_pos - q_pos).astype(score.dtype)


def test_what_is_prepared_of_arrays_varies_with_them():
    """Regression: inside `shard_map` an array that varies was multiplied with a number that did not."""
    def gradients(q, slopes):
        run = lambda q, slopes: pf.flash_attention(q, q, q, score=Prepared(slopes), implementation="hopper").mean()
        return jax.grad(run, (0, 1))(q, slopes)
    places = P("x"), P()
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
    run = jax.shard_map(gradients, mesh=mesh, in_specs=places, out_specs=places)
    with device.assume(device.H100):
        found = jax.eval_shape(run, Q, jax.ShapeDtypeStruct((2,), jnp.float32))
    assert [x.shape for x in found] == [Q.shape, (2,)]
