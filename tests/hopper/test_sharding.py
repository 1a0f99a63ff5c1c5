"""Kernel calls under `jit` with automatically sharded inputs: split over batch and heads, without communication.

The stand-in for a kernel is the same problem's forward and backward from the XLA kernels; which of the roles is which
is all that the splitting knows.
"""

import dataclasses
import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_agree, with_rest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_flash import device, masks
from pallas_flash import dropout as bits
from pallas_flash.kernels.hopper import defaults, launches
from pallas_flash.kernels.mosaic import dropout
from pallas_flash.kernels.mosaic.call import partitioned
from pallas_flash.kernels.xla import backward, forward
from pallas_flash.spec import AttentionSpec, Operands
from pallas_flash.testing import inputs

pytestmark = pytest.mark.usefixtures("eight_devices", "small_tiles")

COLLECTIVE = re.compile(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast")
FORWARD, BACKWARD = "query key key -> query row", "query key key query row query row -> query key key"


@pytest.fixture
def eight_devices():
    if len(jax.devices()) < 8 or jax.default_backend() != "cpu":
        pytest.skip("needs eight virtual CPU devices: JAX_PLATFORMS=cpu")


def forward_of(spec, q, k, v):
    return tuple(forward.forward(spec, Operands(q, k, v, None, (), spec.mask, (), None, None, None)))


def backward_of(spec, q, k, v, *saved):
    return tuple(backward.backward(spec, Operands(q, k, v, None, (), spec.mask, (), None, None, None), *saved)[:3])


@dataclasses.dataclass(frozen=True)
class StandIn:
    """A function(spec, *arrays) with the results of these roles, in the place of a pass of launches."""

    function: Callable
    roles: str
    spec: AttentionSpec

    @property
    def result_types(self):
        spec = self.spec
        shapes = dict(query=spec.out_shape, key=spec.shape(spec.kv_len, spec.kv_heads, spec.d), row=spec.stats_shape)
        return tuple(jax.ShapeDtypeStruct(shapes[role], spec.dtype) for role in self.roles.split("->")[1].split())

    def __call__(self, *arrays):
        return self.function(self.spec, *arrays)


@functools.cache
def builder(function, roles):
    """The same object for the same function, as `partitioned` wants it."""
    return functools.partial(StandIn, function, roles)


def split(function, roles, spec, *arrays):
    return partitioned(builder(function, roles), roles, spec, *arrays, device=device.CPU)


def attention(spec, call):
    """Everything about attention from q, k, v, dout and the cotangent of the statistics."""

    def run(q, k, v, dout, dstats):
        out, stats = call(forward_of, FORWARD, spec, q, k, v)
        return out, stats, *call(backward_of, BACKWARD, spec, q, k, v, out, stats, dout, dstats)
    return run


def make(q_heads, kv_heads, layout="BLHD", batch=4):
    shape = lambda length, heads: jax.ShapeDtypeStruct(
        (batch, length, heads, 8) if layout == "BLHD" else (batch, heads, length, 8), jnp.float32)
    q, kv = shape(24, q_heads), shape(16, kv_heads)
    spec = AttentionSpec.of(q, kv, kv, layout=layout, mask=masks.Causal(), return_lse=True)
    dout, dlse = inputs.cotangents(spec)
    return spec, (*inputs.operands(spec, spec.mask)[:3], dout, with_rest(dlse))


def mesh_of(**sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def placed(spec, mesh, arrays, batch, heads, kv_heads):
    """The arrays on a mesh, with these of its axes over batch and heads."""
    four = lambda heads: P(batch, None, heads) if spec.layout == "BLHD" else P(batch, heads)
    places = (four(heads), four(kv_heads), four(kv_heads), four(heads), P(batch, heads))
    return [jax.device_put(x, NamedSharding(mesh, place)) for x, place in zip(arrays, places, strict=True)]


CASES = {  # mesh, axes over (batch, query heads, key heads), heads, layout, collectives
    "batch": (dict(x=4), ("x", None, None), (4, 2), "BLHD", set()),
    "heads": (dict(x=4), (None, "x", "x"), (4, 4), "BLHD", set()),
    "batch-and-heads": (dict(x=2, y=4), ("x", "y", "y"), (8, 4), "BLHD", set()),
    "groups": (dict(x=2, y=2), ("x", "y", "y"), (8, 2), "BHLD", set()),
    "two-axes-over-heads": (dict(x=2, y=2), (None, ("x", "y"), ("x", "y")), (4, 4), "BHLD", set()),
    "shared-key-head": (dict(x=4), (None, "x", None), (4, 1), "BLHD", {"all-reduce"}),
    "group-over-two-axes": (dict(x=2, y=2), (None, ("x", "y"), "x"), (8, 2), "BLHD", {"all-reduce"}),
}


@pytest.mark.parametrize("name", CASES)
def test_batch_and_heads_are_split_without_communication(name):
    sizes, axes, heads, layout, collectives = CASES[name]
    spec, arrays = make(*heads, layout)
    run = jax.jit(attention(spec, split))
    there = placed(spec, mesh_of(**sizes), arrays, *axes)
    found = run(*there)
    assert_agree(found, jax.jit(attention(spec, lambda function, _, spec, *arrays: function(spec, *arrays)))(*arrays))
    assert set(COLLECTIVE.findall(run.lower(*there).compile().as_text())) == collectives
    assert found[0].sharding.is_equivalent_to(there[0].sharding, 4)
    assert found[3].sharding.is_equivalent_to(there[1].sharding, 4)


def test_a_shards_spec_is_that_of_its_arrays():
    spec, arrays = make(8, 4)
    seen = []

    def record(spec, q, k, v):
        seen.append((spec.batch, spec.q_heads, spec.kv_heads, q.shape, k.shape))
        return forward_of(spec, q, k, v)
    there = placed(spec, mesh_of(x=2, y=4), arrays, "x", "y", "y")[:3]
    jax.jit(functools.partial(split, record, FORWARD, spec)).lower(*there).compile()
    assert seen[-1] == (2, 2, 1, (2, 24, 2, 8), (2, 16, 1, 8))


def test_a_shard_drops_what_the_whole_drops():
    """Its keys of dropout are those of its batch entries and heads in the whole."""
    spec, (q, k, v, *_) = make(8, 4)
    spec = dataclasses.replace(spec, dropout_rate=0.5)
    seed = jnp.array([1, 2], jnp.uint32)
    operands = Operands(q, k, v, None, (), spec.mask, (), seed, None, None)
    (keys,) = dropout.inputs(spec, operands)

    def kept(spec, q, k, v, keys):
        q_pos, kv_pos = (jnp.arange(n, dtype=jnp.uint32) for n in (spec.q_len, spec.kv_len))
        key = jax.lax.bitcast_convert_type(keys, jnp.uint32)[..., None, None]
        flags = bits.kept_by((key[:, :, 0], key[:, :, 1]), q_pos[None, None, :, None], kv_pos[None, None, None], 0.5)
        return jnp.broadcast_to(flags.any(axis=3)[:, :, None], spec.stats_shape).astype(spec.dtype),
    there = placed(spec, mesh_of(x=2, y=4), (q, k, v, q, keys), "x", "y", "y")
    found = jax.jit(functools.partial(split, kept, "query key key row -> row", spec))(*there[:3], there[4])[0]
    whole = bits.keep(seed, *np.ogrid[:4, :8, :24, :16], 0.5).any(axis=3)
    assert np.array_equal(found[:, :, 0] > 0, whole)


def test_the_kernel_is_lowered_for_a_shard():
    """The partitioner asks for a shard's kernel and gets it; a CPU has no use for it."""
    build = functools.cache(lambda spec: launches.forward(spec, defaults.default_forward(spec, device.H100)))
    place = NamedSharding(mesh_of(x=2, y=4), P("x", None, "y"))
    q = jax.ShapeDtypeStruct((4, 256, 4, 64), jnp.bfloat16, sharding=place)
    spec = AttentionSpec.of(q, q, q, mask=masks.Causal())
    traced = jax.jit(functools.partial(partitioned, build, FORWARD, spec, device=device.H100)).trace(q, q, q)
    lowered = traced.lower(lowering_platforms=("cuda",))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"mosaic_gpu.* on a platform Host"):
        lowered.compile()


def test_a_functions_own_references_are_split_with_it():
    """The backward adds up in a reference of its own."""
    spec, (q, k, *_) = make(4, 4)

    def accumulate(spec, q, k):
        total = jax.new_ref(jnp.zeros_like(q))
        total[...] += q
        total[:, :16] += k
        return (total[...],)
    there = [jax.device_put(x, NamedSharding(mesh_of(x=4), P("x"))) for x in (q, k)]
    run = functools.partial(split, accumulate, "query key -> query", spec)
    assert_agree(jax.jit(run)(*there), accumulate(spec, q, k))


@pytest.mark.parametrize("place", [P(None, "x"), P(None, None, None, "x"), P(None, None, "x")])
def test_what_cannot_be_split_is_gathered(place):
    """Lengths, head dimensions, and heads that devices do not divide."""
    spec, arrays = make(8, 2)
    mesh = mesh_of(x=8)
    there = [jax.device_put(arrays[0], NamedSharding(mesh, place)), *arrays[1:3]]
    run = functools.partial(split, forward_of, FORWARD, spec)
    assert_agree(jax.jit(run)(*there), forward_of(spec, *arrays[:3]))


def test_under_shard_map_and_under_a_constraint():
    """A shard of `shard_map` is computed as it is; the sharding of an intermediate result counts like that of an
    input.
    """
    spec, arrays = make(8, 4)
    mesh, run = mesh_of(x=4), functools.partial(split, forward_of, FORWARD)
    wanted = forward_of(spec, *arrays[:3])
    local = dataclasses.replace(spec, batch=1)
    mapped = jax.shard_map(functools.partial(run, local), mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    assert_agree(jax.jit(mapped)(*arrays[:3]), wanted)

    def constrained(*arrays):
        return run(spec, *(jax.lax.with_sharding_constraint(x * 1, NamedSharding(mesh, P("x"))) for x in arrays))
    assert_agree(jax.jit(constrained)(*arrays[:3]), wanted)


def test_in_a_loop_and_in_explicit_mode_nothing_is_communicated():
    spec, arrays = make(8, 4)
    run = functools.partial(split, forward_of, FORWARD, spec)
    wanted = jax.lax.scan(lambda q, _: (forward_of(spec, q, *arrays[1:3])[0], None), arrays[0], None, length=2)[0]

    def scanned(*arrays):
        return jax.lax.scan(lambda q, _: (run(q, *arrays[1:])[0], None), arrays[0], None, length=2)[0]
    automatic = mesh_of(x=2, y=4)
    explicit = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    there = lambda mesh: placed(spec, mesh, arrays, "x", "y", "y")[:3]
    inside = jax.sharding.auto_axes(scanned, axes=("x", "y"), out_sharding=NamedSharding(explicit, P("x", None, "y")))
    for call, mesh in ((scanned, automatic), (inside, explicit)):
        compiled = jax.jit(call).lower(*there(mesh)).compile()
        assert not COLLECTIVE.findall(compiled.as_text())
        assert_agree(compiled(*there(mesh)), wanted)


def test_on_one_device_and_exported_nothing_is_split():
    spec, arrays = make(8, 4)
    run = jax.jit(functools.partial(split, forward_of, FORWARD, spec))
    assert "CustomSPMDPartitioning" not in run.lower(*arrays[:3]).as_text()
    wanted = forward_of(spec, *arrays[:3])
    assert_agree(run(*arrays[:3]), wanted)
    there = placed(spec, mesh_of(x=4), arrays, "x", None, None)[:3]
    exported = jax.export.deserialize(jax.export.export(run)(*there).serialize())
    assert_agree(tuple(exported.call(*there)), wanted)


def test_problems_whose_shards_are_none_are_not_split():
    """Arrays of a mask that are no arguments are those of the whole problem."""
    spec, arrays = make(8, 4)
    mask = masks.InBounds(kv_len=np.arange(4, 8)).canonical()
    with_lengths = dataclasses.replace(spec, mask=mask.with_placeholders())

    def lengths(spec, q, k, v):
        return tuple(forward.forward(spec, Operands(q, k, v, None, (), mask, (), None, None, None)))
    there = placed(spec, mesh_of(x=4), arrays, "x", None, None)[:3]
    found = jax.jit(functools.partial(split, lengths, FORWARD, with_lengths))(*there)
    assert_agree(found, lengths(with_lengths, *arrays[:3]))


MESHES = {
    "batch-and-groups": (dict(x=2, y=2), ("x", "y", "y"), set()),
    "shared-key-head": (dict(x=4), (None, "x", None), {"all-reduce"}),
}


@pytest.mark.parametrize("name", MESHES)
def test_arrays_of_a_mask_are_split_with_the_rest(name):
    """Each device has those of its own entries of the batch and heads; axes of size 1 stay whole."""
    sizes, axes, collectives = MESHES[name]
    spec, arrays = make(4, 1 if name == "shared-key-head" else 2)
    mask = (masks.Window(left=np.array([[3, 9, 20, 0]]), right=0, offset=np.array([[1]]))
            & masks.InBounds(kv_len=np.arange(10, 14)) & masks.SegmentIds(np.arange(24) // 9, np.arange(16) // 9))
    mask = jax.tree.map(jnp.asarray, mask.canonical())
    spec, fields = dataclasses.replace(spec, mask=mask.with_placeholders()), jax.tree.leaves(mask)
    again = lambda spec, fields: jax.tree.unflatten(jax.tree.structure(spec.mask), fields)

    def lengths(spec, q, k, v, *fields):
        return tuple(forward.forward(spec, Operands(q, k, v, None, (), again(spec, fields), (), None, None, None)))

    def gradients(spec, q, k, v, out, stats, dout, dstats, *fields):
        operands = Operands(q, k, v, None, (), again(spec, fields), (), None, None, None)
        return tuple(backward.backward(spec, operands, out, stats, dout, dstats)[:3])

    def attend(call, q, k, v, dout, dstats, *fields):
        more = " field" * len(fields)
        out, stats = call(lengths, FORWARD.replace(" ->", f"{more} ->"), spec, q, k, v, *fields)
        saved = out, stats, dout, dstats
        return out, stats, *call(gradients, BACKWARD.replace(" ->", f"{more} ->"), spec, q, k, v, *saved, *fields)

    run = jax.jit(functools.partial(attend, split))
    there = [*placed(spec, mesh_of(**sizes), arrays, *axes), *fields]
    wanted = jax.jit(functools.partial(attend, lambda function, _, spec, *arrays: function(spec, *arrays)))
    assert_agree(run(*there), wanted(*arrays, *fields))
    assert set(COLLECTIVE.findall(run.lower(*there).compile().as_text())) == collectives
