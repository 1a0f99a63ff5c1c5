"""The draws that the Hopper kernels emit, which the interpreter does not run; and the keys that they are given.

What the kernels do with the draws: `test_forward`, `test_backward` (cases "dropout").
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_flash import autodiff, device, dispatch, errors, flash_attention
from pallas_flash import dropout as bits
from pallas_flash.kernels.ampere import launches as ampere_launches
from pallas_flash.kernels.ampere.schedule import BackwardSchedule as AmpereBackward
from pallas_flash.kernels.ampere.schedule import ForwardSchedule as AmpereForward
from pallas_flash.kernels.hopper import calls, launches
from pallas_flash.kernels.hopper.schedule import BackwardSchedule, ForwardSchedule, KvSchedule
from pallas_flash.kernels.mosaic import dropout, interpret
from pallas_flash.spec import AttentionSpec, Operands, Results

SEED = np.array([0x243F6A88, 0x85A308D3], np.uint32)
THREAD = np.arange(128, dtype=np.uint32)
WARP, ROW, QUARTER = THREAD // 32, THREAD % 32 // 4, THREAD % 4

ARITHMETIC = types.SimpleNamespace(
    addi=np.add, andi=np.bitwise_and, divui=np.floor_divide, muli=np.multiply, shli=np.left_shift, xori=np.bitwise_xor,
    CmpIPredicate=types.SimpleNamespace(uge="uge"), cmpi=lambda predicate, a, b: a >= b)
"""MLIR's dialect of integers, on an element for each thread."""


def rotated(kind, name, operands, *rest):
    x, same, distance = operands
    assert name == "llvm.fshl.i32" and x is same
    return x << distance | x >> np.uint32(32) - distance


@pytest.fixture
def threads(monkeypatch):
    """A warpgroup in NumPy, in the place of MLIR."""
    def constant(value, kind):
        return np.full(128, value % 2**32, np.uint32) if kind == "i32" else np.full(128, bool(value))
    monkeypatch.setattr(dropout, "arith", ARITHMETIC)
    monkeypatch.setattr(dropout, "llvm", types.SimpleNamespace(call_intrinsic=rotated))
    monkeypatch.setattr(dropout, "mgpu", types.SimpleNamespace(utils=types.SimpleNamespace(c=constant)))
    monkeypatch.setattr(dropout, "ir", types.SimpleNamespace(IntegerType=types.SimpleNamespace(get_signless=str)))
    monkeypatch.setattr(dropout, "ptx", types.SimpleNamespace(i32=lambda: "i32", moved=lambda x: x))
    monkeypatch.setattr(dropout, "thread_in_tile", lambda: (WARP, ROW, QUARTER))


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("keys_dim", [0, 1])
def test_the_emitted_draws_are_the_definitions(threads, keys_dim, rate):
    """Each thread keeps what the definition keeps of the elements that it holds in the layout TILE."""
    columns, key, first = 48, (0x9ABCDEF0, 0x12345678), (64 * 1001, 48 * 77)
    draws = dropout.Draws(rate, key, first, keys_dim)
    given = (np.full(128, word, np.uint32) for word in (*key, *first))
    scalars = [types.SimpleNamespace(registers=types.SimpleNamespace(item=lambda x=x: x)) for x in given]
    found = np.full((64, columns), -1)
    for (j, i), flags in dropout._flags(draws, columns, scalars):
        for e, flag in enumerate(flags):
            found[16 * WARP + 8 * i + ROW, 8 * j + 2 * QUARTER + e] = flag
    shape = (64, columns)[::1 if keys_dim else -1]
    q_pos, kv_pos = (np.uint32(start) + x.astype(np.uint32) for start, x in zip(first, np.ogrid[:shape[0], :shape[1]]))
    wanted = np.asarray(bits.kept_by(tuple(map(jnp.uint32, key)), q_pos, kv_pos, rate))
    np.testing.assert_array_equal(found, wanted if keys_dim else wanted.T)


# The keys -------------------------------------------------------------------------------------------------------------

Q = jax.ShapeDtypeStruct((2, 64, 4, 64), jnp.bfloat16)


def operands(q, seed):
    spec = AttentionSpec.of(q, q, q, dropout_rate=0.3)
    return spec, Operands(q, q, q, None, (), spec.mask, (), seed, None, None)


def key_of(seed, batch, head):
    return [int(x) for x in bits.keys(jnp.asarray(seed), jnp.uint32(batch), jnp.uint32(head))]


def test_each_batch_entry_and_query_head_has_its_key():
    (keys,) = dropout.inputs(*operands(Q, SEED))
    assert (keys.shape, keys.dtype) == ((2, 4, 2), jnp.int32)
    assert np.asarray(keys).view(np.uint32)[1, 3].tolist() == key_of(SEED, 1, 3)
    assert dropout.inputs(*operands(Q, None)) == ()


@pytest.mark.parametrize("seeds_axis", [None, 0])
def test_under_vmap_elements_have_the_keys_of_their_seeds(seeds_axis, monkeypatch):
    """With as many batch entries as a seed has words, which must not be taken for a batch."""
    def hand_keys_back(build, roles, spec, q, k, v, keys, *, device):
        assert roles == "query key key row -> query row"
        return jnp.zeros(spec.out_shape, spec.dtype), keys
    monkeypatch.setattr(calls, "partitioned", hand_keys_back)
    q = jnp.zeros((3, 2, 16, 4, 8), jnp.bfloat16)
    seeds = SEED if seeds_axis is None else np.stack([SEED + np.uint32(i) for i in range(3)])
    call = jax.vmap(lambda q, seed: calls.forward(*operands(q, seed)).stats, in_axes=(0, seeds_axis))
    keys = call(q, jnp.asarray(seeds))
    for i in range(3):
        seed = seeds if seeds_axis is None else seeds[i]
        assert np.asarray(keys).view(np.uint32)[i, 1, 3].tolist() == key_of(seed, 1, 3)


@pytest.mark.parametrize("batch", [2, 4])
def test_under_vmap_elements_have_their_origins(batch, monkeypatch):
    """The four numbers of an origin are no batch entries: with another batch vmap took them for some, and failed."""
    def hand_keys_back(build, roles, spec, q, k, v, keys, *, device):
        return jnp.zeros(spec.out_shape, spec.dtype), keys
    monkeypatch.setattr(calls, "partitioned", hand_keys_back)
    q, origins = jnp.zeros((3, batch, 16, 4, 8), jnp.bfloat16), jnp.arange(12, dtype=jnp.int32).reshape(3, 4) * 16

    def run(q, origin):
        spec = AttentionSpec.of(q, q, q, dropout_rate=0.3, dropout_moved=16)
        return calls.forward(spec, Operands(q, q, q, None, (), spec.mask, (), jnp.asarray(SEED), origin, None)).stats
    keys = np.asarray(jax.vmap(run)(q, origins)).view(np.uint32)
    for i, (first, head, *place) in enumerate(origins.tolist()):
        assert keys[i, 1, 3].tolist() == [*key_of(SEED, first + 1, head + 3), *place]


# Who runs it ----------------------------------------------------------------------------------------------------------

def test_an_automatic_choice_takes_it():
    spec = AttentionSpec.of(Q, Q, Q, dropout_rate=0.3)
    assert dispatch.decide(spec, device.H100).implementation.name == "hopper"


def test_parts_of_a_problem_begin_at_multiples_of_16():
    part = lambda moved: AttentionSpec.of(Q, Q, Q, dropout_rate=0.3, dropout_moved=moved)
    with pytest.raises(errors.UnsupportedError, match=r"multiples of 16 positions, this one .* multiple of 8"):
        dispatch.decide(part(8), device.H100, "hopper")
    assert dispatch.decide(part(48), device.H100, "hopper").implementation.name == "hopper"
    assert dispatch.decide(part(48), device.H100).implementation.name == "xla"  # until it has run on a GPU


def test_lowers_with_64_bit_types(x64):
    q = jax.ShapeDtypeStruct((1, 130, 2, 256), jnp.bfloat16)
    loss = lambda q, rng: flash_attention(q, q, q, dropout_rate=0.1, dropout_rng=rng,
                                          implementation="hopper").astype(jnp.float32).sum()
    with device.assume(device.H100):
        text = jax.jit(jax.grad(loss)).trace(q, jax.random.key(0)).lower(lowering_platforms=("cuda",)).as_text()
    assert "attention_backward" in text


def part_of(length, heads, run):
    """Which weights of a part of a problem count in out, and which in dv, and which do by the definition."""
    origin = np.array([1, 2, 48, 160], np.int32)
    q = jnp.zeros((1, length, heads, 64), jnp.bfloat16)
    unit = jnp.broadcast_to(jnp.eye(length, 64, dtype=jnp.bfloat16)[:, None], q.shape)
    spec = AttentionSpec.of(q, q, unit, dropout_rate=0.3, dropout_moved=16, partial=True)
    given = Operands(q, q, unit, None, (), spec.mask, (), jnp.asarray(SEED), jnp.asarray(origin), None)
    out, dv = run(spec, given, jnp.asarray(unit))
    whole = bits.keep(SEED, *np.ogrid[:2, :2 + heads, :48 + length, :160 + length], 0.3)
    return out.transpose(0, 2, 1, 3) > 0, dv.transpose(0, 2, 3, 1) > 0, whole[1:2, 2:, 48:, 160:]


SMALL = {
    "hopper": (launches, ForwardSchedule(warpgroups=1, block_kv=64, num_blocks=2),
               BackwardSchedule(KvSchedule(num_stages=4, dq="own", pipelined=True))),
    "ampere": (ampere_launches, AmpereForward(block_kv=64), AmpereBackward(block_q=32, num_stages=1)),
}


@pytest.mark.interpreted
@pytest.mark.parametrize("name", SMALL)
def test_a_part_drops_what_the_whole_drops_there(name):
    package, forward, backward = SMALL[name]

    def run(spec, given, dout):
        arrays, keys = (given.q, given.k, given.v), dropout.inputs(spec, given)
        with interpret.interpreted():
            out, stats = package.forward(spec, forward)(*arrays, *keys)
            return out, package.backward(spec, backward)(*arrays, stats, dout, jnp.zeros_like(stats), *keys)[2]
    out, dv, wanted = part_of(64, 1, run)
    assert np.array_equal(out, wanted)
    assert np.array_equal(dv, wanted)


@pytest.mark.gpu
def test_a_part_drops_what_the_whole_drops_there_on_a_gpu():
    def run(spec, given, dout):
        out, stats = autodiff.forward(spec, "hopper", given)
        saved, cotangents = Results(out.astype(spec.dtype), stats), Results(dout, jnp.zeros_like(stats))
        return out, autodiff.backward(spec, "hopper", given, saved, cotangents).dv
    out, dv, wanted = part_of(64, 2, run)
    assert np.array_equal(out, wanted)
    assert np.array_equal(dv, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("d", [64, 128, 256])
def test_the_kernels_drop_what_the_definition_drops(d):
    """With equal scores and unit vectors as values and as cotangents, out and dv are the weights that are kept."""
    q = jnp.zeros((2, d, 4, d), jnp.bfloat16)
    unit = jnp.broadcast_to(jnp.eye(d, dtype=jnp.bfloat16)[:, None], q.shape)
    out, vjp = jax.vjp(lambda v: flash_attention(q, q, v, dropout_rate=0.3, dropout_rng=SEED, implementation="hopper"),
                       unit)
    kept = bits.keep(SEED, *np.ogrid[:2, :4, :d, :d], 0.3)
    assert np.array_equal(out.transpose(0, 2, 1, 3) > 0, kept)
    assert np.array_equal(vjp(unit)[0].transpose(0, 2, 3, 1) > 0, kept)
