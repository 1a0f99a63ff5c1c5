"""A bias and dense masks under `jit` with sharded inputs, and under `vmap`: what surrounds the Hopper kernels, with the
reference in their place. Calls on many devices agree with those on one, and only sums are communicated.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_agree
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from hopper.stand_in import standing_in
from pallas_flash import Causal, Dense, device, flash_attention
from pallas_flash.kernels.hopper import calls
from pallas_flash.kernels.mosaic import dropout
from pallas_flash.kernels.mosaic.dbias import dbias
from pallas_flash.spec import AttentionSpec, Operands, Results

pytestmark = pytest.mark.virtual
COLLECTIVE = re.compile(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast")
BATCH, HEADS, Q_LEN, KV_LEN, DIM = 4, 4, 12, 16, 8


@pytest.fixture
def stand_in(monkeypatch, small_tiles):
    with standing_in(monkeypatch):
        yield


def array(seed, *shape, dtype="bfloat16"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def problem(bias, kv_heads, attend=None):
    """q, k, v, a bias of which an eighth is -inf, and the booleans of a dense mask."""
    hidden = np.random.default_rng(9).random(bias) < 0.125
    attend = np.random.default_rng(8).random(attend or (1, 1, 1, 1)) < 0.8
    return (array(0, BATCH, Q_LEN, HEADS, DIM), array(1, BATCH, KV_LEN, kv_heads, DIM),
            array(2, BATCH, KV_LEN, kv_heads, DIM), jnp.where(hidden, -jnp.inf, array(3, *bias)), jnp.asarray(attend))


def loss(name, q, k, v, bias, mask):
    out, lse = flash_attention(q, k, v, bias=bias, mask=Causal(3) & Dense(mask), return_lse=True, implementation=name)
    weights = jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
    return (out.astype(jnp.float32) * weights).sum() + jnp.where(jnp.isfinite(lse), jnp.sin(lse), 0).sum(), (out, lse)


def everything(name):
    return jax.grad(functools.partial(loss, name), (0, 1, 2, 3), has_aux=True)


def placed(mesh, places, arrays):
    return [jax.device_put(x, NamedSharding(mesh, place)) for x, place in zip(arrays, places, strict=True)]


ROWS, WHOLE = P("x", None, "y"), P()
CASES = {  # shape of the bias, key heads, shape of the mask, places of k and v, of bias and mask
    "pairs-of-heads": ((1, HEADS, Q_LEN, KV_LEN), 2, (BATCH, 1, Q_LEN, KV_LEN), ROWS, (P(None, "y"), P("x"))),
    "of-all": ((BATCH, HEADS, Q_LEN, KV_LEN), 1, None, P("x"), (P("x", "y"), WHOLE)),
    "shared-by-all": ((1, 1, Q_LEN, KV_LEN), 4, (BATCH, HEADS, 1, KV_LEN), ROWS, (WHOLE, P("x", "y"))),
}
SUMMED = {"pairs-of-heads": "f32[1,2,12,16]", "of-all": "", "shared-by-all": "f32[1,1,12,16]"}
"""What an all-reduce adds up for the gradient of the bias on each of 2 x 2 devices."""


@pytest.mark.parametrize("name", CASES)
def test_batch_and_heads_are_split(name, stand_in):
    """The gradient of a bias that devices share is added up once, in float32, and that of a shared key head."""
    bias, kv_heads, mask, keys, rest = CASES[name]
    arrays = problem(bias, kv_heads, mask)
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    there = placed(mesh, (ROWS, keys, keys, *rest), arrays)
    split = jax.jit(everything("hopper")).lower(*there).compile()
    assert_agree(split(*there), jax.jit(everything("reference"))(*arrays))
    text = split.as_text()
    assert set(COLLECTIVE.findall(text)) <= {"all-reduce"}
    reduced = " ".join(line for line in text.splitlines() if " all-reduce(" in line or " all-reduce-start(" in line)
    assert (SUMMED[name] in reduced) if SUMMED[name] else (f"[2,2,{Q_LEN},{KV_LEN}]" not in reduced)
    assert ("all-reduce" in text) == (bool(SUMMED[name]) or kv_heads == 1)


def test_under_a_mesh_that_is_set(stand_in):
    """Regression: with explicit axes and `jax.set_mesh`, a shard's program had annotations that XLA no longer knows."""
    arrays = problem((1, HEADS, Q_LEN, KV_LEN), 4, (BATCH, 1, 1, KV_LEN))
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    wanted = jax.jit(everything("reference"))(*arrays)
    with jax.set_mesh(mesh):
        there = placed(mesh, (ROWS, ROWS, ROWS, P(None, "y"), P("x")), arrays)
        gradients = jax.jit(jax.grad(lambda *arrays: loss("hopper", *arrays)[0], (0, 1, 2, 3)))(*there)
    assert_agree(jax.tree.map(np.asarray, gradients), jax.tree.map(np.asarray, wanted[0]))


def test_a_gradient_that_nobody_asks_for_is_left_out(stand_in):
    """Nothing is then added up for it."""
    arrays = problem((1, HEADS, Q_LEN, KV_LEN), 4)
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    there = placed(mesh, (P("x"), P("x"), P("x"), WHOLE, WHOLE), arrays)
    text = jax.jit(jax.grad(lambda *arrays: loss("hopper", *arrays)[0])).lower(*there).compile().as_text()
    assert not COLLECTIVE.findall(text)


def test_under_vmap_each_element_has_its_gradient(stand_in):
    """Of a bias that is not mapped and has no batch axis: the launch has one batch of all elements, whose sum it is
    not.
    """
    arrays, axes = problem((1, HEADS, 1, KV_LEN), 4), (1, 1, 1, None, None)
    arrays = [jnp.stack([x, x * 0.5], axis) if axis is not None else x for x, axis in zip(arrays, axes)]
    found, wanted = (jax.jit(jax.vmap(everything(name), axes))(*arrays) for name in ("hopper", "reference"))
    assert_agree(found, wanted)
    assert found[0][3].shape == (2, 1, HEADS, 1, KV_LEN)


def test_a_shards_gradient_drops_what_the_whole_drops():
    q, k, v, bias, _ = problem((1, HEADS, Q_LEN, KV_LEN), 2)
    spec = AttentionSpec.of(q, k, v, bias=bias, dropout_rate=0.3)
    seed = jnp.array([1, 2], jnp.uint32)

    def run(q, k, v, bias, dout):
        operands = Operands(q, k, v, bias, (), spec.mask, (), seed, None, None)
        zeros = jnp.zeros(spec.stats_shape, jnp.float32)
        return dbias(spec, operands, Results(dout, zeros), Results(dout, zeros), dropout.inputs(spec, operands))
    arrays = q, k, v, bias, array(5, *q.shape)
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    there = placed(mesh, (ROWS, ROWS, ROWS, P(None, "y"), ROWS), arrays)
    compiled = jax.jit(run).lower(*there).compile()
    assert set(COLLECTIVE.findall(compiled.as_text())) == {"all-reduce"}
    found, wanted = compiled(*there), jax.jit(run)(*arrays)
    assert_agree(found, wanted)
    assert np.mean(np.asarray(found) == np.asarray(wanted)) > 0.98, "shards' parts were rounded before they were added"


@pytest.mark.parametrize("pass_name", ["forward", "backward"])
def test_the_kernels_are_lowered_for_a_shard(pass_name, monkeypatch):
    """The partitioner asks for those of a shard's spec, which take its arrays; a CPU has no use for them."""
    mesh, seen = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2), []
    make, name = getattr(calls, f"_{pass_name}_on")(device.H200), f"_{pass_name}_on"

    def recorded(spec):
        seen.append((spec.batch, spec.q_heads, spec.bias.shape, [x.shape for x in jax.tree.leaves(spec.mask)]))
        return make(spec)

    def kind(shape, *place, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*place)))
    q = kind((2, 96, 2, 64), "x", None, "y")
    bias, mask = kind((1, 2, 96, 96), None, "y"), kind((2, 1, 96, 96), "x", dtype="bool")
    run = everything("hopper") if pass_name == "backward" else functools.partial(loss, "hopper")
    monkeypatch.setattr(calls, name, lambda where: recorded)
    with device.assume(device.H200):
        lowered = jax.jit(run).trace(q, q, q, bias, mask).lower(lowering_platforms=("cuda",))
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"mosaic_gpu.* on a platform Host"):
            lowered.compile()
    assert (1, 1, (1, 1, 96, 96), [(1, 1, 96, 96), (1, 1, 1, 1)]) in seen
