"""Sinks in the epilogue of the Hopper kernels, in Pallas' interpreter, and their gradient from delta; against the pass
over out that other implementations take, in float64, as one more column (tests/api/test_sinks.py holds that to plain
attention).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from hopper.stand_in import standing_in
from pallas_flash import Causal, InBounds, Window, autodiff, device, explain, flash_attention
from pallas_flash.kernels.hopper import calls, rules, support
from pallas_flash.kernels.hopper.forward import sinks as epilogue
from pallas_flash.kernels.hopper.schedule import BackwardSchedule, DqSchedule, ForwardSchedule, SplitSchedule
from pallas_flash.kernels.mosaic import dropout
from pallas_flash.kernels.mosaic.interpret import interpreted
from pallas_flash.masks import ArrayField
from pallas_flash.spec import Results
from pallas_flash.testing import conformance
from pallas_flash.testing.problems import Problem

Q_LEN, KV_LEN = 40, 80
FORWARD = ForwardSchedule(block_kv=32, warpgroups=1, num_blocks=2)
BACKWARD = BackwardSchedule(SplitSchedule(), DqSchedule(block_kv=32, warpgroups=1))
SINKS = np.array([0.5, 6.0], np.float32)
SHAPES = {"q": (1, 16, 2, 64), "k": (1, 16, 1, 64)}


def problem_of(name, **options):
    fields = dict(batch=1, q_heads=2, kv_heads=1, q_len=Q_LEN, kv_len=KV_LEN, d=64, d_v=64, dtypes=("bfloat16",))
    return Problem(name, "sinks", **(fields | options))


def exact(problem, operands, cotangents, sinks):
    """out, lse, dq, dk, dv, dsinks of the reference in float64."""
    def everything(q, k, v, sinks):
        call = lambda *given: flash_attention(
            *given[:3], sinks=given[3], mask=problem.mask, return_lse=True, softcap=problem.softcap,
            dropout_rate=problem.dropout_rate, dropout_rng=operands.dropout_seed, layout=problem.layout,
            implementation="reference")
        return jax.vjp(call, q, k, v, sinks)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (*operands[:3], sinks)]
        results, vjp = everything(*wide)
        return *results, *vjp(tuple(jnp.asarray(np.asarray(x, np.float64)) for x in cotangents))


def run_interpreted(problem, operands, cotangents, sinks):
    """The same of the kernels, of one schedule."""
    own = jnp.asarray(sinks)[None, :, None, None]
    spec = dataclasses.replace(problem.spec(), sinks=ArrayField.of(own))
    assert support.why_not(problem.spec(), device.H100) == [] and support.takes_sinks(problem.spec())
    forward = dataclasses.replace(FORWARD, bounded=problem.name.startswith("bounded"))
    for schedule in (forward, BACKWARD):
        assert rules.reasons_against(spec, schedule, 232_448) == []
    given = jax.tree.map(jnp.asarray, operands)._replace(sinks=own)
    keys, fields = dropout.inputs(spec, given), jax.tree.leaves(given.mask)
    dout, dlse = map(jnp.asarray, cotangents)
    dstats = jnp.stack([dlse, jnp.zeros_like(dlse)], axis=2)
    with interpreted():
        out, stats = jax.block_until_ready(calls._forward(spec, forward)(*given[:3], *keys, own, *fields))
        *grads, rows = jax.block_until_ready(calls._backward(spec, BACKWARD)(
            *given[:3], out, stats, dout, dstats, *keys, *fields))
    lse = autodiff.natural_lse(spec, given, stats)
    dsinks = calls._sinks_gradient(spec, rows, stats, dstats, own)
    other = autodiff._sinks_gradient(spec, given, Results(out, stats), Results(dout, dstats))
    np.testing.assert_allclose(dsinks, other, rtol=2e-5, atol=2e-5)
    return out, lse, *grads, dsinks.reshape(-1)


CASES = {
    "window": dict(mask=Causal(offset=KV_LEN - Q_LEN) & Window(left=20)),
    # Rows without keys: those before the first key, and a whole batch entry.
    "idle": dict(mask=Causal(offset=-5) & InBounds(kv_len=np.array([33, 0], np.int32)), batch=2),
    "softcap-dropout": dict(mask=Causal(), softcap=2.0, dropout_rate=0.2),
    # Without a maximum, also of rows without keys.
    "bounded": dict(mask=Causal(offset=-5), softcap=55.0),
    "bounded-dropout": dict(mask=Window(20, 3, 5), softcap=2.0, dropout_rate=0.2),
}


@pytest.mark.interpreted
@pytest.mark.parametrize("name", CASES)
def test_the_epilogue_agrees_with_the_reference(name):
    problem = problem_of(name, **CASES[name])
    operands, cotangents = conformance.random_case(problem, "bfloat16")
    found = run_interpreted(problem, operands, cotangents, SINKS)
    wanted = exact(problem, operands, cotangents, SINKS)
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv", "dsinks"), found, wanted, strict=True):
        y = np.asarray(y)
        size = np.linalg.norm(y) / np.sqrt(y.size)
        np.testing.assert_allclose(np.asarray(x, np.float64), y, atol=(2e-5 if name == "lse" else 0.03) * size + 1e-6,
                                   rtol=1e-5 if name == "lse" else 0.02, err_msg=name)


@pytest.mark.parametrize("sink", [-np.inf, -1e30, -300.0, 0.0, 12.0, 500.0, 1e30, np.inf])
def test_sums_take_a_sink_of_any_size(sink):
    """Of rows with few keys, with none, of scores that are large, of NaN, and without a maximum."""
    m_i = np.array([2.0, -3e38, 4e3, np.nan, 0.0, 0.0], np.float32)
    l_i = np.array([3.0, 0.0, 7.0, np.nan, 2.0**-78, 2.0**90], np.float32)
    spec = dataclasses.replace(problem_of("sums").spec(), scale=0.125)
    rounding = np.array([0.0, 1e30, 0.25, np.nan, 0.0, 0.0], np.float32)
    with interpreted():
        pad = lambda x: jnp.asarray(np.resize(x, 64))
        (m_new, rest, total), left = epilogue.joined(spec, jnp.float32(sink), (pad(m_i), pad(rounding), pad(l_i)))
    m_new, rest, total, left = (np.asarray(x, np.float64)[:6] for x in (m_new, rest, total, left))
    assert total[1] == 0 and np.isnan(total[3])
    own = m_i * 0.125 + np.log(l_i, where=l_i > 0, out=np.zeros(6)) + rounding * np.log(2)  # natural logarithms
    lse = m_new * 0.125 + np.log(total, where=total > 0, out=np.zeros(6)) + rest * np.log(2)
    for i in (0, 2, 4, 5):
        assert abs(lse[i] - min(np.logaddexp(own[i], sink), 3e38 / 8)) <= 2e-7 * max(abs(lse[i]), 1)
        share = np.exp(own[i] - lse[i]) / l_i[i]
        np.testing.assert_allclose(left[i] / total[i], share, rtol=2e-6 * max(1, abs(own[i])), atol=1e-37)


def test_what_takes_sinks_and_what_explain_says():
    q, k = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in SHAPES.values())
    heads, bias = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2,), (1, 1, 1, 16)))
    say = lambda implementation, **options: explain(q, k, k, sinks=heads, device=device.H200, mask=Causal(),
                                                    implementation=implementation, **options)
    assert say("hopper").endswith("sinks: in the kernel")
    assert say("hopper", bias=bias).endswith("sinks: one more pass over out, in plain JAX")
    assert say("xla").endswith("sinks: one more pass over out, in plain JAX")
    refused = explain(q, k, k, sinks=heads, device=device.A100, implementation="hopper")
    assert refused.startswith("UnsupportedError") and "sinks:" not in refused


# -- what surrounds the kernels ----------------------------------------------------------------------------------------

def everything(implementation, layout="BLHD"):
    def run(q, k, v, sinks, dout, dlse):
        call = lambda *given: flash_attention(*given[:3], sinks=given[3], mask=Causal(), return_lse=True, layout=layout,
                                              implementation=implementation)
        results, vjp = jax.vjp(call, q, k, v, sinks)
        return *results, *vjp((dout, dlse))
    return run


def arrays_of(*lead):
    shapes = (2, 24, 4, 8), (2, 24, 4, 8), (2, 24, 4, 8), (4,), (2, 24, 4, 8), (2, 4, 24)
    found = [np.random.default_rng(i).standard_normal((*lead, *shape)).astype(np.float32)
             for i, shape in enumerate(shapes)]
    return [jnp.asarray(x, jnp.bfloat16 if i in (0, 1, 2, 4) else jnp.float32) for i, x in enumerate(found)]


def assert_near(found, wanted):
    for x, y in zip(found, wanted, strict=True):
        x, y = (np.asarray(z, np.float32) for z in (x, y))
        np.testing.assert_allclose(x, y, atol=0.03 * np.abs(y).max(), rtol=0.03)


@pytest.mark.virtual
@pytest.mark.parametrize("axes", [("batch", "heads"), (None, ("batch", "heads"))], ids=str)
def test_batch_and_heads_are_split(axes, monkeypatch):
    arrays, (batch, heads) = arrays_of(), axes
    four = P(batch, None, heads)
    places = four, four, four, P(heads), four, P(batch, heads)
    mesh = jax.make_mesh((2, 2), ("batch", "heads"), axis_types=(AxisType.Auto,) * 2)
    with standing_in(monkeypatch):
        there = [jax.device_put(x, NamedSharding(mesh, place)) for x, place in zip(arrays, places, strict=True)]
        run = jax.jit(everything("hopper"))
        found = run(*there)
        assert "all-gather" not in run.lower(*there).compile().as_text()
    assert found[0].sharding.is_equivalent_to(there[0].sharding, 4)
    assert_near(found, jax.jit(everything("xla"))(*arrays))


@pytest.mark.parametrize("mapped", [0, None])
def test_under_vmap_each_element_has_its_sinks(mapped, monkeypatch):
    arrays = arrays_of(3)
    if mapped is None:
        arrays[3] = arrays[3][0]
    over = lambda implementation: jax.jit(jax.vmap(everything(implementation), (0, 0, 0, mapped, 0, 0)))(*arrays)
    with standing_in(monkeypatch):
        found = over("hopper")
    assert_near(found, over("xla"))
