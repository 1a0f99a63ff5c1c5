"""A bias of each key, or of each pair, in the Hopper kernels, in Pallas' interpreter, and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_flash import Causal, Window, autodiff, device, masks
from pallas_flash.kernels.hopper import bias, calls, defaults, rules, support
from pallas_flash.kernels.hopper.dbias import dbias
from pallas_flash.kernels.hopper.schedule import BackwardSchedule, DqSchedule, ForwardSchedule, KvSchedule
from pallas_flash.kernels.mosaic import dropout
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


def test_what_the_kernels_take():
    spec = problem_of("keys", bias=(1, 2, 1, KV_LEN), mask=Causal()).spec()
    assert support.why_not(spec, device.H100) == []
    assert support.not_measured(spec) == []
    queries = problem_of("queries", bias=(1, 2, Q_LEN, 1)).spec()
    assert any("takes a bias of keys or of pairs" in reason for reason in support.why_not(queries, device.H100))
    assert defaults.default_forward(spec, device.H100).maxima == 0
