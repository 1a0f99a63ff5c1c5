"""Attention sinks, against the softmax with one more column, and within the error budget of the keys they stand for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_agree, assert_within, normal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_flash import (
    RESIDUAL_NAMES,
    Causal,
    Dense,
    UnsupportedError,
    Window,
    device,
    dot_product_attention,
    dropout,
    explain,
    flash_attention,
    masks,
)
from pallas_flash.testing import conformance, inputs, problems

pytestmark = pytest.mark.usefixtures("small_tiles", "full_precision")

B, T, S, H, K, D = 2, 13, 15, 4, 2, 8
Q, KEY, V = normal(0, B, T, H, D), normal(1, B, S, K, D), normal(2, B, S, K, D)
SINKS, BIAS = np.array([0.5, -1, 3, 0], np.float32), normal(3, 1, H, T, S)
COTANGENTS = normal(4, B, T, H, D), normal(5, B, H, T)
EMPTY_ROWS = Causal(offset=-4)
SEED = np.array([7, 9], np.uint32)


# The oracle -----------------------------------------------------------------------------------------------------------

def plain(q, k, v, sinks, bias=None, *, mask=None, softcap=None, dropout_rate=0.0, dropout_rng=None):
    """The sinks as one more column of the scores, which the weights are without: (out, lse)."""
    shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    s = jnp.einsum("bqhd,bshd->bhqs", q, k) / np.sqrt(q.shape[-1])
    s = s if softcap is None else softcap * jnp.tanh(s / softcap)
    s = s if bias is None else s + jnp.broadcast_to(bias, shape)
    if mask is not None:
        at = np.arange(shape[2], dtype=np.int32)[:, None], np.arange(shape[3], dtype=np.int32)[None, :]
        s = jnp.where(masks.over_batch(mask.canonical(), lambda part: part.keep(*at)), s, -jnp.inf)
    s = jnp.concatenate([s, jnp.broadcast_to(sinks[None, :, None, None], (*shape[:3], 1))], axis=-1)
    p = jax.nn.softmax(s)[..., :-1]
    if dropout_rate:
        kept = dropout.keep(dropout_rng, *np.ogrid[tuple(map(slice, shape))], dropout_rate)
        p = jnp.where(kept, p * dropout.factor(dropout_rate), 0)
    return jnp.einsum("bhqs,bshd->bqhd", p, v), jax.nn.logsumexp(s, axis=-1)


def everything(call, *arrays, cotangents=COTANGENTS):
    """(out, lse) and the gradients of all arrays, in one program."""
    def run(arrays, cotangents):
        results, vjp = jax.vjp(call, *arrays)
        return results, vjp(cotangents)
    return jax.jit(run)(arrays, cotangents)


def attention(q, k, v, sinks, bias=None, **options):
    return flash_attention(q, k, v, sinks=sinks, bias=bias, return_lse=True, **options)


def in_float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


CASES = {
    "causal, soft cap": (4, "xla", dict(mask=Causal(), softcap=2.0)),
    "window, bias, dropout": (5, "xla", dict(mask=Causal() & Window(left=4), dropout_rate=0.4, dropout_rng=SEED)),
    "rows without keys, bias": (5, "xla", dict(mask=EMPTY_ROWS)),
    "everything": (5, "reference", dict(mask=EMPTY_ROWS, softcap=3.0, dropout_rate=0.4, dropout_rng=SEED)),
}


@pytest.mark.parametrize(("count", "implementation", "options"), CASES.values(), ids=CASES)
def test_one_more_column(count, implementation, options, x64):
    arrays, cotangents = in_float64(((Q, KEY, V, SINKS, BIAS)[:count], COTANGENTS))
    found = everything(
        functools.partial(attention, implementation=implementation, **options), *arrays, cotangents=cotangents)
    wanted = everything(functools.partial(plain, **options), *arrays, cotangents=cotangents)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-12), found, wanted)


def test_rows_without_keys_give_their_gradient_through_lse_alone():
    call = functools.partial(attention, mask=Window(left=-99, right=99))
    (out, lse), (dq, dk, dv, dsinks) = everything(call, Q, KEY, V, SINKS)
    assert not any(np.any(x) for x in (out, dq, dk, dv))
    np.testing.assert_array_equal(lse, np.broadcast_to(SINKS[:, None], (B, H, T)))
    np.testing.assert_allclose(dsinks, COTANGENTS[1].sum((0, 2)), rtol=1e-5)


def test_no_keys_at_all():
    (out, lse), grads = everything(attention, Q, KEY[:, :0], V[:, :0], SINKS)
    assert not np.any(out) and not np.any(grads[0])
    np.testing.assert_array_equal(lse, np.broadcast_to(SINKS[:, None], (B, H, T)))
    np.testing.assert_allclose(grads[3], COTANGENTS[1].sum((0, 2)), rtol=1e-5)


def test_a_sink_of_minus_infinity_is_none():
    off = jnp.full(H, -jnp.inf)
    found, (*grads, dsinks) = everything(functools.partial(attention, mask=EMPTY_ROWS), Q, KEY, V, off)
    without = lambda *qkv: flash_attention(*qkv, mask=EMPTY_ROWS, return_lse=True)
    wanted, wanted_grads = everything(without, Q, KEY, V)
    assert_agree((found, tuple(grads)), (wanted, wanted_grads))
    empty = np.isneginf(wanted[1])
    np.testing.assert_allclose(dsinks, np.where(empty, COTANGENTS[1], 0).sum((0, 2)), rtol=1e-5)


def test_debug_modes():
    """No number on the way is NaN, and none infinite where lse is not asked for."""
    loss = lambda *args: flash_attention(*args[:3], sinks=args[3], mask=EMPTY_ROWS).sum()
    with jax.debug_infs(True), jax.debug_nans(True):
        grads = jax.grad(loss, (0, 1, 2, 3))(Q, KEY, V, SINKS)
    assert all(np.isfinite(x).all() for x in grads)


# Errors ---------------------------------------------------------------------------------------------------------------

def budget_of(problem, operands, cotangents, sinks):
    """The error budget with the sinks as a last key of zeros, whose scores are a bias."""
    spec, heads = problem.spec(operands.q.dtype.name), problem.q_heads
    keep = np.concatenate([inputs.attends(spec, operands), np.ones((*spec.lse_shape, 1), bool)], axis=3)
    bias = np.zeros((1, heads, 1, problem.kv_len + 1), np.float32)
    bias[0, :, 0, -1] = sinks
    longer = dataclasses.replace(problem, kv_len=problem.kv_len + 1, mask=Dense(keep), bias=bias.shape,
                                 bias_dtype="float32")
    axis = problem.layout.index("L")
    k, v = (np.concatenate([x, np.zeros_like(x.take([0], axis))], axis=axis) for x in (operands.k, operands.v))
    operands = operands._replace(k=k, v=v, bias=bias, mask=Dense(keep).canonical())
    found = conformance.budget(longer, spec.dtype.name, operands, cotangents)

    def cut(x):
        dk, dv = (x.take(range(problem.kv_len), axis) for x in (x.dk, x.dv))
        return x._replace(dk=dk, dv=dv, dbias=x.dbias[0, :, 0, -1])
    return dataclasses.replace(found, oracle=cut(found.oracle), baseline=cut(found.baseline),
                               magnitude=cut(found.magnitude))


BUDGETS = {
    "sinks that weigh little": ("shape-gqa", "float32", -4.0),
    "window": ("mask-window-causal", "bfloat16", 3.0),
    "rows without keys, sinks that weigh all": ("mask-causal-empty-rows", "float16", 14.0),
    "large scores": ("large-causal-gqa-1e+03", "bfloat16", 300.0),
}


@pytest.mark.parametrize(("name", "dtype", "logit"), BUDGETS.values(), ids=BUDGETS)
def test_errors_stay_within_the_budget(name, dtype, logit):
    """Of the same sinks as keys: that out is rounded once more, and its cotangent too, does not take it up."""
    problem = problems.find(name)
    operands, cotangents = conformance.random_case(problem, dtype)
    sinks = (logit + normal(9, problem.q_heads)).astype(np.float32)
    budget = budget_of(problem, operands, cotangents, sinks)
    call = lambda q, k, v, sinks: flash_attention(q, k, v, sinks=sinks, **problem.keywords(operands))
    (out, lse), (dq, dk, dv, dsinks) = everything(call, *operands[:3], sinks, cotangents=cotangents)
    assert_within(budget, dict(out=out, lse=lse, dq=dq, dk=dk, dv=dv, dbias=dsinks))


# The public functions, and JAX's transforms ---------------------------------------------------------------------------

reference = functools.partial(attention, mask=Causal(), implementation="reference")


def test_layouts_and_calls_without_a_batch():
    (out, lse), grads = everything(reference, Q, KEY, V, SINKS)
    swapped = lambda *arrays: tuple(np.swapaxes(x, 1, 2) for x in arrays)
    heads_first = everything(functools.partial(reference, layout="BHLD"), *swapped(Q, KEY, V), SINKS,
                             cotangents=(*swapped(COTANGENTS[0]), COTANGENTS[1]))
    assert_agree(heads_first, ((*swapped(out), lse), (*swapped(*grads[:3]), grads[3])))
    one = reference(Q[0], KEY[0], V[0], SINKS)
    assert_agree(one, (out[0], lse[0]))


def test_vmap():
    """Over sinks too, and the gradients of one vmapped call."""
    sinks = np.stack([SINKS, SINKS[::-1]])
    loss = lambda *args: sum(x.sum() for x in reference(*args))
    gradient = jax.jit(jax.grad(loss, (0, 3)))
    found = jax.vmap(gradient)(Q[:, None], KEY[:, None], V[:, None], sinks)
    each = [gradient(Q[i:i + 1], KEY[i:i + 1], V[i:i + 1], sinks[i]) for i in range(B)]
    assert_agree(found, jax.tree.map(lambda *x: jnp.stack(x), *each))
    assert_agree(jax.vmap(gradient, (None, None, None, 0))(Q, KEY, V, sinks)[1][0], gradient(Q, KEY, V, SINKS)[1])


def test_dtypes():
    """dsinks has the dtype of the sinks, a sum in float32; out and lse theirs."""
    half = [x.astype(jnp.bfloat16) for x in (Q, KEY, V)]
    for sinks in (jnp.asarray(SINKS), jnp.asarray(SINKS, jnp.float16)):
        (out, lse), vjp = jax.vjp(reference, *half, sinks)
        *grads, dsinks = vjp((out, lse))
        assert (out.dtype, lse.dtype, dsinks.dtype) == (jnp.bfloat16, jnp.float32, sinks.dtype)
        assert {x.dtype for x in grads} == {jnp.dtype("bfloat16")}


def test_lse_is_that_of_the_call_whether_or_not_it_is_returned():
    out, _ = reference(Q, KEY, V, SINKS)
    assert_agree(flash_attention(Q, KEY, V, sinks=SINKS, mask=Causal(), implementation="reference"), out)


def test_dot_product_attention():
    out, lse = reference(Q, KEY, V, SINKS)
    found = dot_product_attention(Q, KEY, V, is_causal=True, sinks=SINKS, return_residual=True,
                                  implementation="reference")
    assert_agree(found, (out, lse.swapaxes(1, 2)))


def test_forward_mode_is_that_of_reference_alone():
    tangent = jax.jvp(lambda sinks: reference(Q, KEY, V, sinks)[0], (SINKS,), (SINKS,))[1]
    assert np.isfinite(tangent).all() and np.any(tangent)
    with pytest.raises(UnsupportedError, match="forward-mode derivatives"):
        jax.jvp(lambda q: attention(q, KEY, V, SINKS), (Q,), (Q,))


def test_a_remat_policy_keeps_what_the_backward_needs():
    """One forward, and no copy of out in float32."""
    policy = jax.checkpoint_policies.save_only_these_names(*RESIDUAL_NAMES)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (Q, KEY, V)]
    loss = lambda *args: attention(*args)[0].astype(jnp.float32).sum()
    program = str(jax.make_jaxpr(jax.grad(jax.checkpoint(loss, policy=policy)))(*half, SINKS))
    assert program.count("name=forward") == 1
    _, vjp = jax.vjp(attention, *half, SINKS)
    assert not [x for x in jax.tree.leaves(vjp) if x.dtype == jnp.float32 and x.shape == Q.shape]


@pytest.mark.parametrize(("where", "name", "said"), [(device.H100, "hopper", "in the kernel"),
                                                     (device.A100, "ampere", "one more pass over out, in plain JAX")])
def test_explain_says_where_they_are_computed(where, name, said):
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, "bfloat16")
    arrays = shape(B, T, H, 64), shape(B, S, K, 64), shape(B, S, K, 64)
    with device.assume(where):
        text, without = explain(*arrays, sinks=shape(H)), explain(*arrays)
    assert f"implementation={name!r}" in text
    assert text == f"{without}\nsinks: {said}"


# Several devices ------------------------------------------------------------------------------------------------------

def mesh_of(kind):
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)


PLACES = P("data", None, "model", None), P("data", "model", None)


@pytest.mark.parametrize("place", [P(None), P("model")])
def test_explicit_axes(place):
    """Results lie as query does; the gradient of the sinks where they lie, summed over the devices that share them."""
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        put = lambda x, place: jax.device_put(x, NamedSharding(mesh, place))
        arrays = (*(put(x, PLACES[0]) for x in (Q, KEY, V)), put(SINKS, place))
        results, grads = everything(reference, *arrays, cotangents=tuple(map(put, COTANGENTS, PLACES)))
    assert [jax.typeof(x).sharding.spec for x in results] == list(PLACES)
    assert_agree((results, grads), everything(reference, Q, KEY, V, SINKS))


@pytest.mark.parametrize("place", [P(), P("model")])
def test_shard_map(place):
    """Sinks that vary over the axis of the heads alone: their gradient is summed over the devices of the other axis."""
    call = lambda q, k, v, sinks: reference(q, k, v, sinks[:2] if not place else sinks)
    wanted_sinks = SINKS if place else np.concatenate([SINKS[:2], SINKS[:2]])
    sharded = jax.shard_map(call, mesh=mesh_of(AxisType.Auto), in_specs=(PLACES[0],) * 3 + (place,), out_specs=PLACES)
    results, (*grads, dsinks) = everything(sharded, Q, KEY, V, SINKS)
    wanted, (*wanted_grads, wanted_dsinks) = everything(reference, Q, KEY, V, wanted_sinks)
    if not place:  # each shard took the first two
        wanted_dsinks = np.concatenate([wanted_dsinks[:2] + wanted_dsinks[2:], np.zeros(2, np.float32)])
    assert_agree((results, tuple(grads)), (wanted, tuple(wanted_grads)))
    np.testing.assert_allclose(dsinks, wanted_dsinks, rtol=1e-4, atol=1e-5)
