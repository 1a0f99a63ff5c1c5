"""What only a GPU shows about kernels that merge: against XLA's merge of the same parts, one device's steps of a ring
without the hops; and that the forward repeats bit by bit."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_flash import autodiff, device, masks
from pallas_flash.context_parallel import hops, merged_ring
from pallas_flash.context_parallel.merged_ring import MergedPasses
from pallas_flash.context_parallel.plan import Chunking
from pallas_flash.context_parallel.ring import RingPasses, merged
from pallas_flash.context_parallel.shards import Shards
from pallas_flash.kernels.hopper import merging
from pallas_flash.spec import AttentionSpec, Operands, Results

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

AXIS = "sequence"


def arrays(batch, length, heads, d, dtype="bfloat16"):
    keys = jax.random.split(jax.random.key(0), 4)
    q_heads, kv_heads = heads
    return [jax.random.normal(key, (batch, length, h, d), dtype)
            for key, h in zip(keys, (q_heads, kv_heads, kv_heads, q_heads), strict=True)]


def operands_of(q, k, v, mask=None):
    return Operands(q, k, v, None, (), mask or masks.Full(), (), None, None, None)


@pytest.fixture
def alone(monkeypatch):
    """A ring of one device, which has its own keys at each step."""
    monkeypatch.setattr(hops.Ring, "rotated", lambda ring, x, distance: x)


def passes_of(kind, shards):
    """The forward and the backward, jitted, inside shard_map over one device."""
    mesh, passes = jax.make_mesh((1,), (AXIS,), devices=jax.devices()[:1], axis_types=(AxisType.Auto,)), kind(shards)
    return [jax.jit(jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))
            for function in (passes.forward, passes.backward)]


def assert_close(found, expected, roundings):
    """Within a share of the largest number; where nothing is NaN."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=roundings * 2**-8, atol=roundings * 2**-8 * np.abs(b).max() / 8)


CASES = {"d128": dict(length=512, n=4, d=128), "long-rows": dict(length=4096, n=2, d=128),
         "d64-softcap": dict(length=512, n=2, d=64, softcap=20.0), "d64-long-rows": dict(length=4096, n=2, d=64),
         "d256": dict(length=512, n=2, d=256), "full-float16": dict(
             length=512, n=2, d=128, mask=masks.Full(), dtype="float16")}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_steps_of_a_ring_are_those_that_xla_merges(case, alone):
    options = dict(mask=masks.Causal(), softcap=None, dtype="bfloat16") | case
    q, k, v, dout = arrays(2, options["length"], (4, 2), options["d"], options["dtype"])
    spec = AttentionSpec.of(q, k, v, mask=options["mask"], softcap=options["softcap"], return_lse=True)
    shards = Shards(spec, None, AXIS, Chunking(options["n"], options["length"], "zigzag"), "hopper", device.current())
    of_forward, of_backward = merged_ring.why_not(shards)
    assert not of_forward
    (forward, backward), (plain_forward, plain_backward) = (passes_of(kind, shards)
                                                            for kind in (MergedPasses, RingPasses))
    given = operands_of(q, k, v)
    results, expected = forward(given), plain_forward(given)
    assert_close(results.out, expected.out, 2)
    np.testing.assert_allclose(results.stats[:, :, 0], expected.stats[:, :, 0], rtol=0, atol=2e-5)
    again = forward(given)
    assert all((x == y).all() for x, y in zip(results, again, strict=True)), "the forward is to repeat bit by bit"
    if options["d"] > 128:
        assert of_backward
        return
    assert not of_backward
    cotangents = Results(dout, jnp.zeros_like(expected.stats))
    assert_close(backward(given, expected, cotangents), plain_backward(given, expected, cotangents), 2)


def test_tiles_that_are_done_again_are_merged_once():
    """Scores of the first of two warpgroups overflow at a step without a maximum: both walk over the tile again."""
    q, k, v, _ = arrays(1, 2048, (2, 1), 128)
    q, k = q.at[..., 0].set(0), k.at[..., 0].set(-300)
    q = q.at[:, :64, :, 0].set(128**0.5)
    k = k.at[:, 150, :, 0].set(-180)
    part = dataclasses.replace(AttentionSpec.of(q, k, v), partial=True)
    alone = autodiff.forward(part, "hopper", operands_of(q, k, v))
    out = jax.random.normal(jax.random.key(1), (1, 4096, 2, 128), jnp.float32)
    lse = jnp.where(jnp.arange(4096)[None, None] < 2048, -jnp.inf, alone.stats[:, :, 0, :1])
    state = Results(out, jnp.stack([lse, jnp.zeros_like(lse)], axis=2))
    places = jnp.array([[0, 0, 0, 2048]], jnp.int32)
    found = jax.jit(lambda *given: merging.forward(part, *given[:4], Results(*given[4:])))(q, k, v, places, *state)
    late = Results(*(jax.lax.slice_in_dim(x, 2048, 4096, axis=axis) for x, axis in zip(state, (1, 3), strict=True)))
    expected = merged(late, alone, part.scale)
    # Weights are rounded from other maxima than those of a part alone: both by up to 2^-9 of the largest value.
    np.testing.assert_allclose(found.out[:, 2048:], expected.out, rtol=0, atol=2**-8 * float(abs(v).max()))
    np.testing.assert_allclose(found.stats[:, :, 0, 2048:], expected.stats[:, :, 0], rtol=1e-5, atol=1e-3)
    assert (found.out[:, :2048] == out[:, :2048]).all(), "rows of another piece were written"


def test_elements_of_vmap_are_one_launch():
    """Places of all but the first element are moved."""
    q, k, v, _ = arrays(2, 512, (2, 1), 128)
    part = dataclasses.replace(AttentionSpec.of(q, k, v, mask=masks.Causal()), partial=True)
    places = jnp.array([[0, 0, 0, 0], [1, 0, 0, 0]], jnp.int32)
    state = Results(jnp.ones((2, 512, 2, 128), jnp.float32), jnp.zeros((2, 2, 2, 512), jnp.float32))
    forward = jax.jit(lambda q: merging.forward(part, q, k, v, places, state))
    found = jax.jit(jax.vmap(forward))(jnp.stack([q, 2 * q, q[::-1]]))
    for i, x in enumerate((q, 2 * q, q[::-1])):
        for a, b in zip(found, forward(x), strict=True):
            np.testing.assert_array_equal(a[i], b)


def test_a_chosen_ring_merges_in_the_kernels(alone):
    """What a user's call runs, once it is switched on: traced, not measured."""
    q, k, v, _ = arrays(1, 512, (2, 1), 128)
    spec = AttentionSpec.of(q, k, v, mask=masks.Causal(), return_lse=True)
    shards = Shards(spec, None, AXIS, Chunking(2, 512, "zigzag"), None, device.current())
    with mock.patch.object(MergedPasses, "forward", autospec=True, side_effect=MergedPasses.forward) as used:
        mesh = jax.make_mesh((1,), (AXIS,), devices=jax.devices()[:1], axis_types=(AxisType.Auto,))
        jax.jit(jax.shard_map(lambda *given: merged_ring.attend(shards, operands_of(*given)), mesh=mesh, in_specs=P(),
                              out_specs=P(), check_vma=False)).lower(q, k, v)
    assert used.called
