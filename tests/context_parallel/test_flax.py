"""Attention layers of nnx and linen whose sequences are cut over devices, against the same layers on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_flash as pf
from pallas_flash.flax import attention_fn

linen = pytest.importorskip("flax.linen")
nnx = pytest.importorskip("flax.nnx")

pytestmark = [pytest.mark.usefixtures("full_precision", "small_tiles"), pytest.mark.virtual]

HEADS, FEATURES, LENGTH, RING = 4, 32, 16, 2
PLACE = P("data", "sequence")  # of everything that is (batch, length, ...)
IDS = np.repeat(np.array([[0, 1, 1, -1], [0, 0, 0, 1]], np.int32), LENGTH // 4, axis=1)
X, COTANGENT = np.random.default_rng(0).normal(size=(2, 2, LENGTH, FEATURES)).astype(np.float32)


def make_mesh(kind):
    return jax.make_mesh((2, RING, 2), ("data", "sequence", "model"), axis_types=(kind,) * 3)


def of_nnx(**options):
    """A function of (params, x, mask), and params."""
    layer = nnx.MultiHeadAttention(HEADS, FEATURES, num_kv_heads=2, decode=False, keep_rngs=False, rngs=nnx.Rngs(0),
                                   attention_fn=attention_fn(**options))
    graph, params = nnx.split(layer)
    return lambda params, x, mask: nnx.merge(graph, params)(x, mask=mask, is_causal=True), params


def of_linen(**options):
    layer = linen.MultiHeadAttention(HEADS, attention_fn=attention_fn(mask=pf.Causal(), **options))
    params = layer.clone(attention_fn=linen.dot_product_attention).init(jax.random.key(0), jnp.zeros((1, FEATURES)))
    return lambda params, x, mask: layer.apply(params, x, mask=mask), params


both_modules = pytest.mark.parametrize("module", [of_nnx, of_linen])


def layer_on_one_device(attend, params, x, ids):
    return attend(params, x, None if ids is None else pf.SegmentIds(ids, ids))


def value_and_gradients(layer, params, x, ids, cotangent):
    out, pullback = jax.vjp(lambda params, x: layer(params, x, ids), params, x)
    return out, *pullback(cotangent)


@functools.cache
def on_one_device(module, with_ids):
    attend, params = module()
    layer = functools.partial(layer_on_one_device, attend)
    return jax.jit(functools.partial(value_and_gradients, layer))(params, X, IDS if with_ids else None, COTANGENT)


@both_modules
@pytest.mark.parametrize(("how", "with_ids"), [("automatic", True), ("explicit", False), ("shard_map", True)])
def test_a_layer_equals_that_on_one_device(module, with_ids, how):
    mesh = make_mesh(AxisType.Explicit if how == "explicit" else AxisType.Auto)
    places = dict(mesh=mesh, spec=P("data", "sequence", "model")) if how == "automatic" else {}
    attend, params = module(context_parallel=pf.ContextParallel("sequence", **places))
    layer = functools.partial(layer_on_one_device, attend)
    if how == "shard_map":
        layer = jax.shard_map(layer, mesh=mesh, in_specs=(P(), PLACE, PLACE), out_specs=PLACE)
    with jax.set_mesh(mesh):
        put = lambda x: jax.device_put(pf.reorder(x, RING), NamedSharding(mesh, PLACE))
        found = jax.jit(functools.partial(value_and_gradients, layer))(
            params, put(X), put(IDS) if with_ids else None, put(COTANGENT))
    back = lambda x: pf.reorder(np.asarray(x), RING, inverse=True)
    out, of_params, of_x = found
    for a, b in zip(*map(jax.tree.leaves, ((back(out), of_params, back(of_x)), on_one_device(module, with_ids)))):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@both_modules
def test_a_mask_array_is_refused_with_what_to_give_instead(module):
    attend, params = module(context_parallel=pf.ContextParallel("sequence"))
    with pytest.raises(pf.UnsupportedError, match=r"mask array .* mask=SegmentIds\(ids, ids\).*-1 at padding"):
        attend(params, X, np.ones((1, 1, LENGTH, LENGTH), bool))


def test_a_second_set_of_segment_ids_is_refused():
    attend, params = of_nnx(context_parallel=pf.ContextParallel("sequence"))
    with pytest.raises(pf.UnsupportedError, match="second SegmentIds"):
        attend(params, X, pf.SegmentIds(IDS, IDS) & pf.SegmentIds(IDS, IDS))


def test_functions_of_equal_settings_are_equal():
    settings = lambda: pf.ContextParallel("sequence", mesh=make_mesh(AxisType.Auto), spec=PLACE)
    make = lambda: attention_fn(context_parallel=settings())
    assert make() == make() != attention_fn() and hash(make()) == hash(make())


def test_settings_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="must be a ContextParallel or None, got context_parallel='sequence'"):
        attention_fn(context_parallel="sequence")
