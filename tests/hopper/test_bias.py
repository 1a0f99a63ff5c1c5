"""A bias of each key, or of each pair, in the Hopper kernels, in Pallas' interpreter, and its gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # where the interpreter says whether it saw a race

from hopper.offline.compile_kernels import mosaic_modules
from pallas_flash import Causal, Window, autodiff, device, flash_attention, masks
from pallas_flash.kernels.hopper import calls, defaults, rules, support, work
from pallas_flash.kernels.hopper.schedule import (
    BackwardSchedule,
    DbiasSchedule,
    DqSchedule,
    ForwardSchedule,
    KvSchedule,
)
from pallas_flash.kernels.mosaic import bias, dropout
from pallas_flash.kernels.mosaic.dbias import dbias, walk
from pallas_flash.kernels.mosaic.interpret import interpreted
from pallas_flash.spec import Results
from pallas_flash.testing import conformance, inputs
from pallas_flash.testing.problems import Problem

Q_LEN, KV_LEN = 24, 48
FORWARD = ForwardSchedule(block_kv=32, warpgroups=1, num_blocks=2)
BACKWARD = BackwardSchedule(KvSchedule(warpgroups=1), DqSchedule(block_kv=32, warpgroups=1))


def problem_of(name, **options):
    fields = dict(batch=2, q_heads=2, kv_heads=1, q_len=Q_LEN, kv_len=KV_LEN, d=64, d_v=64, dtypes=("bfloat16",))
    return Problem(name, "biases", **(fields | options))


def with_far_rows(array, far):
    """Some keys far below all others, so that queries which see no others need an anchor; some at -inf."""
    array = array.copy()
    array[..., :9], array[..., 20:24], array[..., 40:] = far, -np.inf, -np.inf
    array[..., 1::2, 9:12] = -np.inf
    return array


@pytest.mark.interpreted
def test_everything_agrees_with_the_oracle():
    """Without NaN in what a bias of -inf hides: `test_array_masks` has it in what bits hide."""
    problem = problem_of("bias", batch=1, q_heads=1, bias=(1, 1, Q_LEN, KV_LEN), mask=Causal(offset=5))
    operands, (dout, dlse) = conformance.random_case(problem, "bfloat16")
    operands = operands._replace(bias=with_far_rows(operands.bias, -3e3))
    budget, spec = conformance.budget(problem, "bfloat16", operands, (dout, dlse)), problem.spec()
    given = jax.tree.map(jnp.asarray, operands)
    assert support.why_not(spec, device.H100) == []
    biased, operands = bias.as_mask(spec, given)
    for schedule in (FORWARD, BACKWARD):
        assert rules.reasons_against(biased, schedule, 232_448) == []
    fields = *jax.tree.leaves(operands.mask), *bias.inputs(biased, operands)
    dstats = jnp.stack([jnp.asarray(dlse), jnp.zeros_like(dlse)], axis=2)
    with interpreted():
        out, stats = jax.block_until_ready(calls._forward(biased, FORWARD)(*given[:3], *fields))
        arrays = *given[:3], out, stats, jnp.asarray(dout), dstats, *fields
        dq, dk, dv = jax.block_until_ready(calls._backward(biased, BACKWARD)(*arrays))
    found = dict(out=out, dq=dq, dk=dk, dv=dv, lse=autodiff.natural_lse(spec, given, stats),
                 dbias=dbias(spec, given, Results(out, stats), Results(jnp.asarray(dout), dstats), ()))
    used = budget.used(budget.baseline._replace(**found))
    assert max(used.values()) <= 1, used


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tiles_of_pairs_come_through_a_ring(dtype):
    """Two query tiles, of two warpgroups that skip different key tiles; lengths that are no whole tiles."""
    problem = problem_of("ring", batch=1, bias=(1, 2, 140, 200), q_len=140, kv_len=200, mask=Window(100, 20),
                         bias_dtype=dtype)
    operands, (dout, dlse) = conformance.random_case(problem, "bfloat16")
    operands = operands._replace(bias=with_far_rows(operands.bias, -3e3))
    budget, spec = conformance.budget(problem, "bfloat16", operands, (dout, dlse)), problem.spec()
    biased, given = bias.as_mask(spec, jax.tree.map(jnp.asarray, operands))
    schedule = ForwardSchedule(block_kv=64, query_buffers=1, out_chunks=0, bias_slots=2, num_blocks=1)
    assert rules.reasons_against(biased, schedule, 232_448) == []
    fields = *jax.tree.leaves(given.mask), *bias.inputs(biased, given)
    with interpreted(detect_races=True):
        out, stats = jax.block_until_ready(calls._forward(biased, schedule)(*given[:3], *fields))
    assert not gpu_callbacks.get_races().races_found
    used = budget.used(budget.baseline._replace(out=out, lse=autodiff.natural_lse(spec, given, stats)))
    assert max(used.values()) <= 1, used


RINGS = {
    "shared": (128, KvSchedule(dq="shared", pinned=False, apart=True, bias_ring=True), dict(mask=Window(100, 20))),
    "own": (64, KvSchedule(num_stages=4, dq="own", dq_slots=2, pipelined=True, pinned=False, bias_ring=True),
            dict(mask=Causal(30), bias_dtype="float16", q_heads=4, kv_heads=2)),
}


@pytest.mark.interpreted
def with_rings(spec, operands, dout, dlse, kv):
    """out, dq, dk, dv and lse of kernels that have rings for a bias."""
    biased, given = bias.as_mask(spec, jax.tree.map(jnp.asarray, operands))
    forward = ForwardSchedule(block_kv=64, query_buffers=1, out_chunks=0, bias_slots=2, num_blocks=2)
    for schedule in (forward, BackwardSchedule(kv)):
        assert rules.reasons_against(biased, schedule, 232_448) == []
    fields = *jax.tree.leaves(given.mask), *bias.inputs(biased, given)
    dstats = jnp.stack([jnp.asarray(dlse), jnp.zeros_like(dlse)], axis=2)
    with interpreted(detect_races=True):
        out, stats = jax.block_until_ready(calls._forward(biased, forward)(*given[:3], *fields))
        arrays = *given[:3], out, stats, jnp.asarray(dout), dstats, *fields
        dq, dk, dv = jax.block_until_ready(calls._backward(biased, BackwardSchedule(kv))(*arrays))
    assert not gpu_callbacks.get_races().races_found
    return dict(out=out, dq=dq, dk=dk, dv=dv, lse=autodiff.natural_lse(spec, given, stats))


def ring_case(name):
    d, kv, options = RINGS[name]
    options = dict(bias=(1, options.get("q_heads", 2), 140, 200), q_len=140, kv_len=200, d=d, d_v=d) | options
    problem = problem_of(f"ring-{name}", batch=1, **options)
    return problem, kv, *conformance.random_case(problem, "bfloat16")


@pytest.mark.interpreted
@pytest.mark.parametrize("name", RINGS)
def test_tiles_of_pairs_come_with_the_queries(name):
    """Both passes; keys that are far below all others; lengths that are no whole tiles."""
    problem, kv, operands, (dout, dlse) = ring_case(name)
    operands = operands._replace(bias=with_far_rows(operands.bias, -3e3))
    budget = conformance.budget(problem, "bfloat16", operands, (dout, dlse))
    found = with_rings(problem.spec(), operands, dout, dlse, kv)
    used = budget.used(budget.baseline._replace(**found))
    assert max(used.values()) <= 1, used


@pytest.mark.interpreted
@pytest.mark.parametrize("far", [-1e9, "smallest"])
def test_pairs_hidden_by_the_smallest_number_weigh_alike(far):
    """Both passes, without an anchor, beside the reference: rows that see nothing else, and others."""
    problem, kv, operands, (dout, _) = ring_case("shared")
    array = with_far_rows(operands.bias, float(jnp.finfo(jnp.bfloat16).min) if far == "smallest" else far)
    array[:, :, 20:30] = np.where(array[:, :, 20:30] == -np.inf, -np.inf, array[0, 0, 0, 0])
    given = jax.tree.map(jnp.asarray, operands._replace(bias=array))
    found = with_rings(problem.spec(), given, dout, np.zeros(problem.spec().lse_shape, np.float32), kv)

    def attend(q, k, v):
        return flash_attention(q, k, v, bias=given.bias, mask=problem.mask, implementation="reference", return_lse=True)

    (out, lse), pull = jax.vjp(attend, *given[:3])
    np.testing.assert_allclose(np.float32(found["out"]), np.float32(out), atol=0.03)
    np.testing.assert_allclose(found["lse"], lse, rtol=1e-5, atol=1e-3)
    for name, expected in zip(("dq", "dk", "dv"), pull((jnp.asarray(dout), jnp.zeros_like(lse))), strict=True):
        np.testing.assert_allclose(np.float32(found[name]), np.float32(expected), atol=0.06, err_msg=name)


@pytest.mark.interpreted
def test_a_score_that_the_bias_hides_may_be_anything():
    """Of a row that is NaN in the tile's arithmetic the forward takes no number: it computes it once more."""
    problem = problem_of("hidden", batch=1, q_heads=1, bias=(1, 1, 64, 100), q_len=64, kv_len=100)
    operands, _ = conformance.random_case(problem, "bfloat16")
    array = operands.bias.copy()
    array[..., 30:40] = -np.inf
    operands = operands._replace(bias=array)
    bad = operands._replace(k=operands.k.copy(), v=operands.v.copy())
    bad.k[:, 33], bad.v[:, 37] = np.nan, np.inf
    forward = ForwardSchedule(block_kv=64, query_buffers=1, out_chunks=0, bias_slots=2, num_blocks=1)
    found = []
    for case in (operands, bad):
        biased, given = bias.as_mask(problem.spec(), jax.tree.map(jnp.asarray, case))
        fields = *jax.tree.leaves(given.mask), *bias.inputs(biased, given)
        with interpreted():
            found.append(jax.block_until_ready(calls._forward(biased, forward)(*given[:3], *fields)))
    (out, stats), (bad_out, bad_stats) = found
    np.testing.assert_allclose(np.float32(bad_out), np.float32(out), atol=0.01)
    np.testing.assert_allclose(bad_stats[:, :, 0], stats[:, :, 0], atol=1e-4)


@pytest.mark.interpreted
def test_products_that_the_bias_hides_may_be_infinite():
    """Regression: of a key that is finite, but whose products are not, P was NaN, and so was dq of its queries."""
    problem, kv, operands, (dout, dlse) = ring_case("own")
    operands = operands._replace(bias=operands.bias.copy(), k=operands.k.copy())
    operands.bias[..., 30:40] = -np.inf
    budget = conformance.budget(problem, "bfloat16", operands, (dout, dlse))
    operands.k[:, 33] = 1e38
    used = budget.used(budget.baseline._replace(**with_rings(problem.spec(), operands, dout, dlse, kv)))
    assert max(used.values()) <= 1, used


def test_a_ring_needs_tiles_of_pairs_in_16_bits():
    ring = dataclasses.replace(FORWARD, block_kv=64, bias_slots=2)
    for case, options in (("keys", dict(bias=(1, 2, 1, KV_LEN))), ("none", {}),
                          ("float32", dict(bias=(1, 2, Q_LEN, KV_LEN), bias_dtype="float32"))):
        found = rules.reasons_against(problem_of(case, **options).spec(), ring, 232_448)
        assert any("needs a bias of pairs in 16 bits" in reason for reason in found), case
    for d, expected in ((64, 2), (128, 2), (192, 0), (256, 2)):  # beside heads of 192 there is no room
        spec = problem_of("pairs", bias=(1, 2, Q_LEN, KV_LEN), d=d, d_v=d).spec()
        assert defaults.default_forward(spec, device.H200).bias_slots == expected
    spec = problem_of("float32", bias=(1, 2, Q_LEN, KV_LEN), bias_dtype="float32").spec()
    assert defaults.default_forward(spec, device.H200).bias_slots == 0


def test_the_fused_backward_has_tiles_of_pairs_where_it_spills_nothing():
    pairs = dict(bias=(1, 2, Q_LEN, KV_LEN))
    ids = masks.SegmentIds(np.zeros((2, Q_LEN), np.int32), np.zeros((2, KV_LEN), np.int32))
    for d, options, expected in ((64, {}, True), (128, {}, True), (64, dict(mask=ids), True),
                                 (128, dict(mask=ids), False),
                                 (128, dict(softcap=2.0), False), (128, dict(dropout_rate=0.1), False),
                                 (128, dict(bias_dtype="float32"), False), (256, {}, False)):
        spec = bias.hiding(problem_of("fused", d=d, d_v=d, **(pairs | options)).spec())
        schedule = defaults.default_backward(spec, device.H200)
        assert rules.reasons_against(spec, schedule, device.H200.smem_bytes) == []
        assert (schedule.fused, schedule.kv.bias_ring) == (expected, expected), (d, options)


@pytest.mark.interpreted
def test_keys_hidden_by_the_smallest_number_weigh_alike():
    """Regression: the anchor was taken from finfo.min before the score was added, which then was not lost."""
    problem = problem_of("smallest", batch=1, q_heads=1, bias=(1, 1, 1, KV_LEN), mask=Causal())
    operands, _ = conformance.random_case(problem, "bfloat16")
    smallest = jnp.finfo(jnp.bfloat16).min
    given = jax.tree.map(jnp.asarray, operands._replace(bias=with_far_rows(operands.bias, smallest)))
    biased, operands = bias.as_mask(problem.spec(), given)
    fields = *jax.tree.leaves(operands.mask), *bias.inputs(biased, operands)
    with interpreted():
        out, _ = jax.block_until_ready(calls._forward(biased, FORWARD)(*given[:3], *fields))
    np.testing.assert_allclose(np.float32(out[0, 8, 0]), np.float32(given.v[0, :9, 0]).mean(axis=0), atol=0.02)


DBIAS = {
    "shared-by-heads": dict(bias=(2, 1, 1, KV_LEN), mask=Window(30, 10), dropout_rate=0.3),
    "shared-by-all": dict(bias=(1, 1, 1, KV_LEN), softcap=2.0, layout="BHLD", bias_dtype="float32", q_len=200),
    "pairs": dict(bias=(1, 2, 200, KV_LEN), q_len=200, mask=Causal(-20)),
    "lengths": dict(bias=(1, 2, 1, KV_LEN), mask=masks.InBounds(kv_len=np.array([30, 0]))),
}


@pytest.mark.parametrize("name", DBIAS)
def test_gradient_agrees_with_the_oracle(name):
    problem = problem_of(name, **DBIAS[name])
    operands, (dout, dlse) = conformance.random_case(problem, "bfloat16")
    seen = np.where(np.arange(KV_LEN) < 40, operands.bias, -np.inf)
    operands = operands._replace(bias=seen.astype(operands.bias.dtype))
    budget, spec = conformance.budget(problem, "bfloat16", operands, (dout, dlse)), problem.spec()
    lse = jnp.asarray(budget.oracle.lse, jnp.float32)
    results = Results(jnp.asarray(budget.oracle.out, "bfloat16"), jnp.stack([lse, jnp.zeros_like(lse)], axis=2))
    cotangents = Results(jnp.asarray(dout), jnp.stack([jnp.asarray(dlse), jnp.zeros_like(dlse)], axis=2))
    given = jax.tree.map(jnp.asarray, inputs.poisoned(spec, operands))
    found = jax.jit(lambda operands: dbias(
        spec, operands, results, cotangents, dropout.inputs(spec, operands)))(given)
    assert found.dtype == operands.bias.dtype
    used = budget.used(budget.baseline._replace(dbias=found))
    assert max(used.values()) <= 1, used


SMALL = DbiasSchedule(block_kv=64, warpgroups=1, num_stages=2, num_sms=3)
OF_PAIRS = {
    "shared-by-batch": (DbiasSchedule(), dict(bias=(1, 2, 140, 200), mask=Causal(-20))),
    "shared-by-all": (SMALL, dict(bias=(1, 1, 140, 200), mask=Window(60, 10), layout="BHLD", kv_heads=2, softcap=2.0)),
    "float32": (SMALL, dict(bias=(2, 2, 140, 200), mask=Causal(30), bias_dtype="float32")),
    "lengths-dropout": (DbiasSchedule(), dict(bias=(2, 1, 140, 200), mask=masks.InBounds(kv_len=np.array([170, 0])),
                                              dropout_rate=0.3, bias_dtype="float16")),
}


def test_every_tile_of_the_gradient_is_made_once():
    """And no block has much more to do than others."""
    for s, causal_only in ((DbiasSchedule(), True), (SMALL, False)):
        spec = bias.hiding(problem_of("table", batch=4, q_heads=4, kv_heads=4, q_len=2048, kv_len=2048, mask=Causal(),
                                      bias=(1, 4, 2048, 2048)).spec())
        table = work.dbias_table(spec, s)
        assert table.shape[0] == s.num_sms and table.dtype == np.int32
        taken = [row[1:1 + row[0]] for row in table]
        tiles = 4 * (2048 // s.block_q) * (2048 // s.block_kv)
        np.testing.assert_array_equal(np.sort(np.concatenate(taken)), np.arange(tiles))
        assert (table[np.arange(len(table)), table[:, 0] + 1] == -1).all()
        columns = 2048 // s.block_kv
        q_tile, kv_tile = (np.arange(tiles) // columns % (2048 // s.block_q), np.arange(tiles) % columns)
        has_pairs = kv_tile * s.block_kv < (q_tile + 1) * s.block_q
        steps = [4 * has_pairs[own].sum() for own in taken]
        assert not causal_only or max(steps) <= np.mean(steps) + 4 + 2, steps


def kernel_arguments(spec, budget, given, dout, dlse):
    """What the computation of the gradient of a bias takes, of a case with its oracle."""
    lse = jnp.asarray(budget.oracle.lse, jnp.float32)
    lse -= jnp.broadcast_to(spec.anchor(given)[..., 0].astype(jnp.float32), lse.shape)
    results = jnp.asarray(budget.oracle.out, "bfloat16"), jnp.stack([lse, jnp.zeros_like(lse)], axis=2)
    cotangents = jnp.asarray(dout), jnp.stack([jnp.asarray(dlse), jnp.zeros_like(dlse)], axis=2)
    return (*given[:3], *results, *cotangents, *dropout.inputs(spec, given), *jax.tree.leaves(given.mask), given.bias)


@pytest.mark.interpreted
@pytest.mark.parametrize("name", OF_PAIRS)
def test_the_kernel_of_the_gradient_agrees_with_the_oracle(name):
    """With tiles that no batch entry needs, and those that some do; with NaN in what masks hide. One looks for races:
    that takes twice as long.
    """
    agree_with_the_oracle(name, *OF_PAIRS[name])


def agree_with_the_oracle(name, schedule, options):
    problem = problem_of(name, **(dict(q_len=140, kv_len=200) | options))
    operands, (dout, dlse) = conformance.random_case(problem, "bfloat16")
    operands = operands._replace(bias=with_far_rows(operands.bias, -3e3))
    budget, spec = conformance.budget(problem, "bfloat16", operands, (dout, dlse)), problem.spec()
    given = jax.tree.map(jnp.asarray, inputs.poisoned(spec, operands))
    assert rules.dbias_reasons(spec, schedule, 232_448) == []
    looks_for_races = name == "shared-by-batch"
    with interpreted(detect_races=looks_for_races):
        found, = jax.block_until_ready(
            calls._dbias(spec, schedule)(*kernel_arguments(spec, budget, given, dout, dlse)))
    assert not (looks_for_races and gpu_callbacks.get_races().races_found)
    assert found.dtype == operands.bias.dtype
    used = budget.used(budget.baseline._replace(dbias=found))
    assert max(used.values()) <= 1, used


@pytest.mark.interpreted
def test_a_float32_gradient_of_a_bias_in_16_bits_frees_its_place():
    """Of a partial spec: a block takes tile after tile, and its second bias waits for the place of the first."""
    problem = problem_of("partial", batch=1, q_len=140, kv_len=200, bias=(1, 2, 140, 200), mask=Causal(-20))
    operands, (dout, dlse) = conformance.random_case(problem, "bfloat16")
    budget, spec = conformance.budget(problem, "bfloat16", operands, (dout, dlse)), problem.spec()
    arguments = kernel_arguments(spec, budget, jax.tree.map(jnp.asarray, operands), dout, dlse)
    with interpreted():
        rounded, found = (jax.block_until_ready(calls._dbias(dataclasses.replace(spec, partial=partial), SMALL)(
            *arguments))[0] for partial in (False, True))
    assert found.dtype == jnp.float32 and rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.astype(rounded.dtype), rounded)


@pytest.mark.interpreted
def test_a_bad_value_reaches_the_gradients_of_the_rows_that_see_it_alone():
    """There all weights are NaN, but those of pairs that the mask or the bias hides are 0; as in the walk."""
    bad = 15
    problem = problem_of("bad", batch=1, bias=(1, 2, Q_LEN, KV_LEN), mask=Causal(5))
    operands, (dout, dlse) = conformance.random_case(problem, "bfloat16")
    operands = operands._replace(bias=with_far_rows(operands.bias, -1.0))
    budget, spec = conformance.budget(problem, "bfloat16", operands, (dout, dlse)), problem.spec()
    given = jax.tree.map(jnp.asarray, operands)
    arrays = [*kernel_arguments(spec, budget, given, dout, dlse)]
    sees = np.arange(Q_LEN) + 5 >= bad
    arrays[2] = arrays[2].at[:, bad].set(jnp.nan)
    arrays[3] = jnp.where(sees[None, :, None, None], jnp.nan, arrays[3])  # what the forward returns
    with interpreted():
        found, = jax.block_until_ready(calls._dbias(spec, SMALL)(*arrays))
    found, wanted = (np.asarray(x, np.float32) for x in (found, walk(spec)(*arrays)[0]))
    assert np.isnan(wanted).any() and (wanted == 0).any()
    assert np.array_equal(np.isnan(found), np.isnan(wanted))
    np.testing.assert_allclose(found, wanted, rtol=0.03, atol=2e-3)


@pytest.mark.parametrize("learned", [False, True])
def test_a_gradient_that_nobody_asks_for_has_no_kernel(learned):
    def loss(q, bias):
        return flash_attention(q, q, q, bias=bias, mask=Causal(), implementation="hopper").astype(jnp.float32).sum()

    kinds = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1, 256, 2, 64), (1, 2, 256, 256)))
    with device.assume(device.H200):
        gradients = jax.jit(jax.grad(loss, (0, 1) if learned else 0)).trace(*kinds)
        modules = mosaic_modules(gradients.lower(lowering_platforms=("cuda",)))
    assert any(b"attention_backward_dbias" in module for module in modules) == learned
    assert any(b"attention_backward_kv" in module for module in modules)


def test_which_gradients_have_a_kernel():
    pairs = dict(bias=(1, 2, Q_LEN, KV_LEN))
    for options, has_one in (({}, True), (dict(bias_dtype="float32"), True), (dict(bias=(1, 2, 1, KV_LEN)), False),
                             (dict(d=256, d_v=256), False), (dict(d=76, d_v=76), False)):
        spec = problem_of("pairs", **(pairs | options)).spec()
        assert (defaults.default_dbias(spec, device.H200) is not None) == has_one, options


def test_what_the_kernels_take():
    spec = problem_of("keys", bias=(1, 2, 1, KV_LEN), mask=Causal()).spec()
    assert support.why_not(spec, device.H100) == []
    assert support.not_measured(spec) == []
    queries = problem_of("queries", bias=(1, 2, Q_LEN, 1)).spec()
    assert any("takes a bias of keys or of pairs" in reason for reason in support.why_not(queries, device.H100))
    assert defaults.default_forward(spec, device.H100).maxima == 0
