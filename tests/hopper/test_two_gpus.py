"""Calls that two GPUs share, against the same call on one; skipped where there is one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import pallas_flash
from pallas_flash import Causal, InBounds, flash_attention
from pallas_flash.kernels.hopper import support

pytestmark = pytest.mark.gpu

SHAPE = (4, 1000, 4, 64)  # batch, length, heads, d
CASES = {
    "plain": {},
    "documents": {"segment_ids": np.sort(np.random.default_rng(0).integers(0, 5, (4, 1000)), axis=1)},
    "lengths": {"mask": Causal() & InBounds(kv_len=np.array([1000, 0, 333, 640]))},
    "deterministic": {"deterministic": True},
}


@pytest.fixture
def mesh():
    if len(jax.devices()) < 2:
        pytest.skip("needs two GPUs")
    return jax.make_mesh((2,), ("shards",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))


def operands(length=1000):
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, (SHAPE[0], length, *SHAPE[2:]), jnp.bfloat16) for key in keys]


def with_gradients(attend, q, k, v, dout):
    out, vjp = jax.vjp(attend, q, k, v)
    return out, *vjp(dout)


def assert_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=0.02, atol=0.02 * np.abs(b).max())


@pytest.mark.parametrize("axis", [0, 2], ids=["batch", "heads"])
@pytest.mark.parametrize("name", CASES)
def test_sharded_inputs_give_what_one_gpu_gives(mesh, name, axis):
    attend = functools.partial(flash_attention, **{"mask": Causal(), **CASES[name]}, implementation="hopper")
    given = operands()
    expected = jax.jit(functools.partial(with_gradients, attend))(*given)
    place = NamedSharding(mesh, PartitionSpec(*["shards" if i == axis else None for i in range(4)]))
    lowered = jax.jit(functools.partial(with_gradients, attend)).lower(*(jax.device_put(x, place) for x in given))
    program = lowered.compile()
    assert "all-gather" not in program.as_text()
    found = program(*(jax.device_put(x, place) for x in given))
    assert all(len(x.sharding.device_set) == 2 for x in found)
    assert_close(found, expected)


@pytest.mark.parametrize("strategy", ["ring", "merged", "all_gather", "all_to_all"])
def test_a_sequence_on_two_gpus_is_that_of_one(mesh, strategy, monkeypatch):
    monkeypatch.setattr(support, "KERNELS_MERGE", strategy == "merged")
    if strategy == "merged":  # a ring whose kernels merge
        strategy = "ring"
        jax.clear_caches()  # programs do not know of it
    given = operands(1024)
    expected = jax.jit(functools.partial(with_gradients, functools.partial(flash_attention, mask=Causal())))(*given)
    attend = functools.partial(pallas_flash.context_parallel_attention, axis_name="shards", strategy=strategy,
                               mask=Causal(), mesh=mesh, spec=PartitionSpec(None, "shards"))
    place = NamedSharding(mesh, PartitionSpec(None, "shards"))
    there = [jax.device_put(pallas_flash.reorder(x, 2), place) for x in given]
    found = jax.jit(functools.partial(with_gradients, attend))(*there)
    assert_close([pallas_flash.reorder(jax.device_put(x, jax.devices()[0]), 2, inverse=True) for x in found], expected)


@pytest.mark.parametrize("strategy", ["ring", "all_gather", "all_to_all"])
def test_dropout_of_a_sequence_on_two_gpus_has_the_bits_of_one(mesh, strategy):
    """Other bits would differ by as much as the results."""
    given, dropout = operands(1024), dict(dropout_rate=0.2, dropout_rng=jax.random.key(5), implementation="hopper")
    attend = functools.partial(flash_attention, mask=Causal(), **dropout)
    expected = jax.jit(functools.partial(with_gradients, attend))(*given)
    attend = functools.partial(pallas_flash.context_parallel_attention, axis_name="shards", strategy=strategy,
                               mask=Causal(), mesh=mesh, spec=PartitionSpec(None, "shards"), **dropout)
    place = NamedSharding(mesh, PartitionSpec(None, "shards"))
    there = [jax.device_put(pallas_flash.reorder(x, 2), place) for x in given]
    found = jax.jit(functools.partial(with_gradients, attend))(*there)
    assert_close([pallas_flash.reorder(jax.device_put(x, jax.devices()[0]), 2, inverse=True) for x in found], expected)
