"""Decoding with a cache: appended keys where they belong, attention within the error budget of the float64 formulas."""

import dataclasses
import functools
import operator
import re
import subprocess
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_agree, assert_within, normal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_flash import (
    Causal,
    Dense,
    Full,
    Mask,
    PrefixLM,
    SegmentIds,
    UnsupportedError,
    Window,
    cache,
    check_mask,
    device,
    flash_attention,
)
from pallas_flash.filled import Filled
from pallas_flash.kernels.xla import blocks, schedule
from pallas_flash.spec import AttentionSpec, Operands
from pallas_flash.testing import inputs, textbook
from pallas_flash.testing.budget import Budget
from tests.hopper.offline import places

pytestmark = pytest.mark.usefixtures("small_tiles", "full_precision")

HEADS, KV_HEADS, DIM, DIM_V = 4, 2, 8, 16
LENGTHS = [0, 1, 19, 32, 17]
CAUSAL = Causal()


@dataclasses.dataclass(frozen=True)
class Chunks(Mask):
    """A class of a user, without bounds and without `moved`."""

    size: int

    def keep(self, q_pos, kv_pos):
        return q_pos // self.size == kv_pos // self.size


# The mask -------------------------------------------------------------------------------------------------------------

RULES = [Full(), Causal(), Causal() & Window(left=3), Window(2, 2), PrefixLM(4), Chunks(3)]


def kept(rule: Mask, lengths, q_len: int, capacity: int) -> np.ndarray:
    """(batch, q_len, capacity): which pairs attend, from the rule about positions."""
    keep = np.zeros((len(lengths), q_len, capacity), bool)
    for of, length in enumerate(lengths):
        for query in range(max(q_len - length, 0), q_len):
            keep[of, query, :length] = rule.keep(length - q_len + query, np.arange(length))
    return keep


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_mask_counts_from_the_end_of_each_sequence(rule):
    lengths = [0, 3, 5, 17]
    mask = Filled(rule, jnp.array(lengths), 5)
    found = [mask.keep(np.arange(5)[:, None], np.arange(17)[None, :])
             for mask in (dataclasses.replace(mask, lengths=np.int32(n)) for n in lengths)]
    np.testing.assert_array_equal(found, kept(rule, lengths, 5, 17))
    check_mask(mask, 5, 17)


# Attention ------------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Case:
    dtype: str
    layout: str = "BLHD"
    pages: bool = False
    q_len: int = 3
    capacity: int = 32
    rule: Mask = CAUSAL
    mask: Mask | None = None  # the rule as a call gives it, if it holds arrays
    bias: tuple[int, ...] | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    tile: int = 8


CASES = {
    "chunk": Case("float32", q_len=11, capacity=33),  # a last tile that is not full, as in the next two
    "prefix": Case("float64", layout="BHLD", capacity=37, rule=PrefixLM(9), mask=PrefixLM(np.full(5, 9)),
                   bias=(1, HEADS, 3, 37), options=dict(scale=0.7)),
    "window and bias in pages": Case("float16", pages=True, capacity=48, rule=Causal() & Window(left=5), tile=11,
                                     bias=(5, HEADS, 1, 48)),
    "one query in pages": Case("bfloat16", layout="BHLD", pages=True, q_len=1, options=dict(softcap=3.0)),
    "all keys": Case("bfloat16", rule=Full(), mask=None, q_len=1),
    "a class of a user": Case("float32", layout="BHLD", pages=True, rule=Chunks(6)),
}


def heads_first(x: np.ndarray, layout: str) -> np.ndarray:
    return x if layout == "BLHD" else x.swapaxes(1, 2)


def rows(case: Case) -> tuple[np.ndarray, ...]:
    """query, key and value of all positions, (batch, length, heads, dim); sequences 3 and 4 begin alike."""
    q = normal(0, 5, case.q_len, HEADS, DIM).astype(case.dtype)
    k, v = (normal(i, 5, case.capacity, KV_HEADS, dim).astype(case.dtype) for i, dim in ((1, DIM), (2, DIM_V)))
    for x in (k, v):
        x[4, :16] = x[3, :16]
    return q, k, v


def stored(case: Case, k: np.ndarray, v: np.ndarray, poison: float = np.nan) -> cache.Cache:
    """The cache of these keys, with poison past each length and in pages that no sequence has."""
    past = np.arange(case.capacity)[None, :] >= np.array(LENGTHS)[:, None]
    k, v = (np.where(past[..., None, None], np.asarray(poison, x.dtype), x) for x in (k, v))
    if not case.pages:
        return cache.Cache(*(heads_first(x, case.layout) for x in (k, v)), LENGTHS, None, case.layout)
    count = case.capacity // 16
    table = np.random.default_rng(0).permutation(5 * count + 3)[:5 * count].reshape(5, count)
    table[4, 0] = table[3, 0]  # shared
    pages = []
    for x in (k, v):
        held = np.full((5 * count + 3, 16, *x.shape[2:]), poison, x.dtype)
        held[table] = x.reshape(5, count, 16, *x.shape[2:])
        pages.append(heads_first(held, case.layout))
    table[0], table[1, 1] = -1, len(pages[0])  # not needed: not there
    return cache.Cache(*pages, LENGTHS, table, case.layout)


def budget_of(case: Case, q, k, v, bias) -> Budget:
    """From the formulas in float64, under the mask as an array."""
    keep = Dense(kept(case.rule, LENGTHS, case.q_len, case.capacity)[:, None])
    spec_of = lambda *qkv: AttentionSpec.of(*qkv, mask=keep.canonical(), bias=bias, layout=case.layout, **case.options)
    qkv = [heads_first(x, case.layout) for x in (q, k, v)]
    spec, wide = spec_of(*qkv), spec_of(*(x.astype(np.float64) for x in qkv))
    operands = Operands(*qkv, bias, (), keep.canonical(), (), None, None, None)
    cotangents = inputs.cotangents(spec)
    exact, _ = textbook.attention(wide, operands._replace(**{
        name: x.astype(np.float64) for name, x in zip("qkv", qkv)}), *(x.astype(np.float64) for x in cotangents))
    return Budget.of(spec, operands, cotangents, exact)


@pytest.mark.parametrize(("name", "implementation"), [
    *((name, "xla") for name in CASES), ("chunk", "reference"), ("window and bias in pages", "reference")])
def test_within_the_budget_of_the_formulas(name, implementation, x64, monkeypatch):
    """And what lies past the lengths, or in pages of others, changes no bit."""
    case = CASES[name]
    monkeypatch.setattr(schedule, "TARGET_BLOCK", case.tile)
    q, k, v = rows(case)
    bias = None if case.bias is None else normal(3, *case.bias).astype(case.dtype)
    mask = case.rule if case.mask is None else case.mask
    attend = jax.jit(lambda q, cached, bias: cache.attend(
        q, cached, mask=mask, bias=bias, return_lse=True, implementation=implementation, **case.options))
    poison = bias
    if bias is not None and bias.shape[0] == 5:
        poison = np.where(np.arange(case.capacity) >= np.array(LENGTHS)[:, None, None, None], np.nan, bias)
        poison = poison.astype(bias.dtype)
    query = heads_first(q, case.layout)
    out, lse = attend(query, stored(case, k, v), poison)
    assert_within(budget_of(case, q, k, v, bias), dict(out=out, lse=lse))
    assert not np.asarray(out)[0].any() and (np.asarray(lse)[0] == -np.inf).all()
    if case.bias is None:
        again = attend(query, stored(case, k, v, poison=np.inf), bias)
        jax.tree.map(np.testing.assert_array_equal, again, (out, lse))


def test_sinks_join_the_softmax():
    case, sinks = CASES["chunk"], np.array([0.5, -1, 3, 0], np.float32)
    q, k, v = rows(case)
    attend = functools.partial(cache.attend, q, stored(case, k, v), return_lse=True)
    (out, lse), (found, found_lse) = attend(), attend(sinks=sinks)
    wanted = np.logaddexp(lse, sinks[None, :, None])
    np.testing.assert_allclose(found_lse, wanted, rtol=1e-6)
    np.testing.assert_allclose(found, out * np.exp(lse - wanted).swapaxes(1, 2)[..., None], rtol=1e-5, atol=1e-6)


def assert_same(found, wanted):
    """Agreement of numbers, equality of integers."""
    found, wanted = ([np.asarray(x) for x in jax.tree.leaves(tree)] for tree in (found, wanted))
    assert_agree(*([x for x in leaves if x.dtype.kind == "f"] for leaves in (found, wanted)))
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype.kind == "f" or np.array_equal(a, b)


# Appending ------------------------------------------------------------------------------------------------------------

def decoded(cached: cache.Cache, layout: str, steps, k, v, q, **options):
    """Appends and attends step by step, under jit; everything has (batch, length, heads, dim) in front and back."""
    step = jax.jit(lambda cached, *kvq: (lambda c: (c, cache.attend(kvq[2], c, **options)))(
        cache.append(cached, *kvq[:2])))
    outs = []
    for lo, hi in steps:
        cached, out = step(cached, *(heads_first(x[:, lo:hi], layout) for x in (k, v, q)))
        outs.append(heads_first(out, layout))
    return cached, jnp.concatenate(outs, axis=1)


TABLE = np.array([[4, 0, 6], [2, 5, 1]])
EMPTY = {
    "contiguous": functools.partial(cache.empty, 2, 40, KV_HEADS, DIM, dtype="float32"),
    "pages": functools.partial(cache.empty_paged, TABLE, (8, 16), KV_HEADS, DIM, dtype="float32"),
}
K, V, Q = normal(1, 2, 30, KV_HEADS, DIM), normal(2, 2, 30, KV_HEADS, DIM), normal(0, 2, 30, HEADS, DIM)


@pytest.mark.parametrize(("name", "layout"), [("contiguous", "BHLD"), ("pages", "BLHD")])
def test_decoding_equals_the_whole_sequence_at_once(name, layout):
    """In a prompt, single tokens and another chunk, which crosses pages."""
    cached, found = decoded(EMPTY[name](layout=layout), layout, [(0, 11), (11, 12), (12, 13), (13, 24)], K, V, Q)
    wanted = flash_attention(Q[:, :24], K[:, :24], V[:, :24], mask=Causal(), implementation="reference")
    assert_agree(found, wanted)
    np.testing.assert_array_equal(cached.lengths, [24, 24])


def positions(cached: cache.Cache) -> np.ndarray:
    """Keys by position, (batch, capacity, heads, dim)."""
    key = np.asarray(heads_first(cached.key, cached.layout))
    return key if cached.pages is None else key[np.asarray(cached.page_table)].reshape(
        cached.batch, cached.capacity, *key.shape[2:])


@pytest.mark.parametrize("layout", ["BLHD", "BHLD"])
@pytest.mark.parametrize("empty", EMPTY.values(), ids=EMPTY)
def test_one_new_key_of_one_sequence(empty, layout):
    """A program of its own: it lies where it belongs, and is dropped where there is no room."""
    one = jax.tree.map(lambda x: x[:1] if x.dtype == jnp.int32 else x, empty(layout=layout))
    if one.pages is None:
        one = dataclasses.replace(one, key=one.key[:1], value=one.value[:1])
    else:
        one = dataclasses.replace(one, page_table=one.page_table.at[0, 2].set(-1))
    new = (jnp.asarray(heads_first(x[:1, :1], layout)) for x in (K, V))
    append = jax.jit(functools.partial(lambda key, value, cached: cache.append(cached, key, value), *new))
    lengths = np.array([0, 17, 39, 40, 47, 48, 2**31 - 2], np.int32)
    mapped = jax.vmap(lambda length: append(dataclasses.replace(one, lengths=length[None])))(lengths)
    for i, length in enumerate(lengths):
        found = append(dataclasses.replace(one, lengths=jnp.array([length])))
        assert_same(jax.tree.map(operator.itemgetter(i), mapped), found)
        wanted = np.zeros_like(positions(one))
        if length < one.capacities[0]:
            wanted[0, length] = K[0, 0]
        np.testing.assert_array_equal(positions(found), wanted)
        assert found.lengths[0] == length + 1 and found.overflowed[0] == (length >= one.capacities[0])


@pytest.mark.parametrize("empty", EMPTY.values(), ids=EMPTY)
def test_one_new_key_where_jax_counts_in_64_bits(empty):
    """Regression: the place of a single row was a number of 32 bits beside others of 64, a TypeError."""
    with jax.enable_x64(True):
        one = empty()
        one = dataclasses.replace(one, lengths=jnp.array([17], jnp.int32), **(
            dict(page_table=one.page_table[:1]) if one.pages else dict(key=one.key[:1], value=one.value[:1])))
        found = jax.jit(cache.append)(one, K[:1, :1], V[:1, :1])
        assert found.lengths.dtype == jnp.int32
        wanted = np.zeros_like(positions(one))
        wanted[0, 17] = K[0, 0]
        np.testing.assert_array_equal(positions(found), wanted)
        assert np.isfinite(jax.jit(cache.attend)(Q[:1, :1], found)).all()


@pytest.mark.parametrize("layout", ["BLHD", "BHLD"])
@pytest.mark.parametrize("empty", EMPTY.values(), ids=EMPTY)
def test_new_keys_lie_at_the_end_of_each_sequence_and_nowhere_else(empty, layout):
    cached = dataclasses.replace(empty(layout=layout), lengths=[3, 17])
    cached = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan) if x.dtype == jnp.float32 else x, cached)
    new = K[:, :5], V[:, :5]
    found = cache.append(cached, *(heads_first(x, layout) for x in new))
    assert_same(cache.append(found, *(heads_first(x[:, :0], layout) for x in new)), found)
    wanted = np.full_like(positions(cached), np.nan)
    wanted[0, 3:8], wanted[1, 17:22] = K[:, :5]
    np.testing.assert_array_equal(positions(found), wanted)
    np.testing.assert_array_equal(found.lengths, [8, 22])
    if cached.pages is not None:
        assert np.isnan(np.asarray(found.key)[[3, 7]]).all()  # pages of nobody


@pytest.mark.parametrize("empty", EMPTY.values(), ids=EMPTY)
def test_what_finds_no_room_is_dropped_and_counted(empty):
    """Inside jit, where it cannot be an error: nothing else is overwritten, and the sequence's results are NaN."""
    cached = empty()
    cached = dataclasses.replace(cached, lengths=[cached.capacity - 2, 5])
    full = jax.jit(cache.append)(cached, K[:, :4], V[:, :4])
    wanted = np.zeros_like(positions(cached))
    wanted[0, -2:], wanted[1, 5:9] = K[0, :2], K[1, :4]
    np.testing.assert_array_equal(positions(full), wanted)
    np.testing.assert_array_equal(full.lengths, [cached.capacity + 2, 9])
    np.testing.assert_array_equal(full.overflowed, [True, False])
    out, lse = jax.jit(functools.partial(cache.attend, return_lse=True))(Q[:, :1], full)
    assert np.isnan(out[0]).all() and np.isnan(lse[0]).all()
    assert np.isfinite(out[1]).all() and np.isfinite(lse[1]).all()
    total = lambda q, cached, sinks: jnp.nansum(cache.attend(q, cached, sinks=sinks))
    # Large scores: weights are infinite where the lse of the row is not used.
    large = full.key.at[0].multiply(1e6)
    gradients = jax.jit(jax.grad(total, (0, 1, 2), allow_int=True))(
        Q[:, :1], dataclasses.replace(full, key=large), np.ones(HEADS, np.float32))
    assert all(np.isfinite(x).all() for x in (gradients[0], gradients[1].key, gradients[1].value, gradients[2]))
    assert not np.asarray(gradients[0][0]).any() and np.asarray(gradients[0][1]).any()
    for length in (-7, -2**31):
        none = dataclasses.replace(cached, lengths=jnp.array([length, 5]))
        out, lse = jax.jit(functools.partial(cache.attend, return_lse=True))(Q[:, :3], none)
        assert not out[0].any() and np.all(lse[0] == -np.inf) and np.isfinite(lse[1]).all()
    negative = dataclasses.replace(cached, lengths=jnp.array([-7, 5]))
    np.testing.assert_array_equal(jax.jit(cache.append)(negative, K[:, :4], V[:, :4]).lengths, [4, 9])


def test_a_missing_page_has_no_room():
    for missing in (-1, 8, 2**31 - 1):
        table = TABLE.copy()
        table[0, 1] = missing
        cached = dataclasses.replace(EMPTY["pages"](), page_table=table, lengths=[14, 20])
        np.testing.assert_array_equal(cached.capacities, [16, 48])
        found = jax.jit(cache.append)(cached, K[:, :4], V[:, :4])
        held = np.asarray(found.key)
        np.testing.assert_array_equal(held[4, 14:], K[0, :2])
        np.testing.assert_array_equal(held[5, 4:8], K[1, :4])
        assert np.count_nonzero(held.any(axis=(2, 3))) == 6
        np.testing.assert_array_equal(found.overflowed, [True, False])


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_what_a_missing_page_reads_instead_has_no_gradient(implementation):
    """Regression: NaN in the page of another sequence, read in place of a missing one, was in the gradients of queries
    and of shared pages.
    """
    table = np.array([[1, 2, 3], [4, -1, 5]])
    key, value = (jnp.asarray(np.tile(x[:, :16], (4, 1, 1, 1))).at[0].set(jnp.nan) for x in (K, V))

    def total(q, key, value, lengths, table):
        given = cache.Cache(key, value, lengths, table)
        return jnp.nansum(cache.attend(q, given, implementation=implementation))

    gradients = jax.jit(jax.grad(total, (0, 1, 2)))(Q[:, :2], key, value, np.array([40, 20]), table)
    assert all(np.isfinite(x).all() for x in gradients)
    assert np.asarray(gradients[0][0]).any() and not np.asarray(gradients[0][1]).any()
    assert not any(np.asarray(x[4:]).any() for x in gradients[1:])


def test_a_cache_without_sequences_and_one_without_room():
    cached = cache.append(cache.empty(0, 8, 2, DIM, dtype="float32"), K[:0, :3], V[:0, :3])
    assert cache.attend(Q[:0, :3], cached).shape == (0, 3, HEADS, DIM)
    paged = cache.append(cache.empty_paged(TABLE[:0], (3, 16), 2, DIM, dtype="float32"), K[:0, :3], V[:0, :3])
    assert cache.attend(Q[:0, :3], paged).shape == (0, 3, HEADS, DIM)
    full = jax.jit(cache.append)(cache.empty(1, 0, 2, DIM, dtype="float32"), K[:1, :1], V[:1, :1])
    assert full.key.shape == (1, 0, 2, DIM) and np.isnan(jax.jit(cache.attend)(Q[:1, :1], full)).all()
    nothing = cache.attend(Q[:, :3], cache.empty(2, 0, 2, DIM, dtype="float32"))
    assert nothing.shape == (2, 3, HEADS, DIM) and not nothing.any()


# Programs -------------------------------------------------------------------------------------------------------------

def loop(cached: cache.Cache, q: jax.Array) -> tuple[cache.Cache, jax.Array]:
    """Eight steps, each of which appends its query's first heads as key and value."""
    def step(cached, _):
        new = q[:, :, :KV_HEADS] * cached.lengths[:, None, None, None].astype(q.dtype)
        cached = cache.append(cached, new, new)
        return cached, cache.attend(q, cached)
    return jax.lax.scan(step, cached, None, length=8)


@pytest.mark.parametrize("empty", EMPTY.values(), ids=EMPTY)
def test_a_loop_keeps_a_donated_cache_in_place(empty):
    """No copy of it is made, neither by appending nor by reading."""
    start, q = empty(), jnp.asarray(Q[:, :1])
    program = jax.jit(loop, donate_argnums=0).lower(start, q).compile()
    sizes = start.key.nbytes + start.value.nbytes
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= sizes
    shape = ",".join(map(str, start.key.shape))
    assert not re.findall(rf"= f32\[{shape}\]\S* (?:copy|pad|convert|transpose)\(", program.as_text())
    wanted = start
    for _ in range(8):
        new = q[:, :, :KV_HEADS] * wanted.lengths[:, None, None, None].astype(q.dtype)
        wanted = cache.append(wanted, new, new)
    before = start.key.unsafe_buffer_pointer()
    found, outs = program(start, q)
    assert jax.default_backend() != "cpu" or found.key.unsafe_buffer_pointer() == before
    assert_same((found, outs[-1]), (wanted, cache.attend(q, wanted, implementation="reference")))


@pytest.mark.parametrize("pages", [False, True])
def test_memory_does_not_grow_with_the_capacity(pages):
    """Of a chunk that attends to a cache of any capacity, whole tiles or not: no scores, no padded or repeated keys."""
    make = (functools.partial(cache.empty_paged, jnp.zeros((1, 512), jnp.int32), (9, 16)) if pages else
            functools.partial(cache.empty, 1, 8195))
    cached = jax.eval_shape(lambda: make(1, DIM, dtype="float32"))
    q = jax.ShapeDtypeStruct((1, 16, 4, DIM), "float32")
    memory = jax.jit(cache.attend).lower(q, cached).compile().memory_analysis()
    assert memory.temp_size_in_bytes < cached.capacity * DIM * 4 / 4  # of the scores of a row, of a quarter of the keys


@pytest.mark.parametrize("pages", [False, True])
@pytest.mark.parametrize("q_len", [1, 7])
def test_xla_reads_each_key_once(pages, q_len, monkeypatch):
    """Counted as it runs: which tiles of keys, and of values, the loop loads, for all heads of a group and all queries
    together. The analysis of a compiled program cannot say it: how often the loop runs depends on the lengths.
    """
    seen: list[int] = []
    load = blocks.Problem._kv_tile

    def counted(self, array, tile):
        jax.debug.callback(lambda tile: seen.append(int(tile)), tile)
        return load(self, array, tile)

    monkeypatch.setattr(blocks.Problem, "_kv_tile", counted)
    monkeypatch.setattr(schedule, "TARGET_BLOCK", 16)
    number, size = (6, 16) if pages else (1, 96)
    table = jnp.arange(6)[None] if pages else None
    cached = cache.Cache(normal(1, number, size, 2, 24), normal(2, number, size, 2, 24), [45], table)
    q = normal(3, 1, q_len, 6, 24)
    jax.jit(functools.partial(cache.attend, implementation="xla"))(q, cached).block_until_ready()
    jax.effects_barrier()
    jax.clear_caches()  # which hold programs with callbacks
    assert sorted(seen) == [0, 0, 1, 1, 2, 2]  # keys and values, of 45 keys of 96


FOR_AN_H200 = """
import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from pallas_flash import cache, device
from tests.context_parallel.offline.compile_programs import TARGET

found = topologies.get_topology_desc(platform="cuda", target_config=TARGET, topology="1x1x1")
place = SingleDeviceSharding(found.devices[0])
there = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

def step(cached, q, new):
    cached = cache.append(cached, new, new)
    return cached, cache.attend(q, cached, implementation="xla")

cached = jax.tree.map(there, jax.eval_shape(lambda: cache.empty(2, 16383, 2, 64)))
q, new = (there(jax.ShapeDtypeStruct((2, 1, heads, 64), "bfloat16")) for heads in (4, 2))
with device.assume(device.H200):
    memory = jax.jit(step, donate_argnums=0).lower(cached, q, new).compile().memory_analysis()
print(2 * 2 * cached.key.size, memory.alias_size_in_bytes, memory.temp_size_in_bytes)
"""


@pytest.mark.skipif(places.why_not() is not None, reason=str(places.why_not()))
def test_a_gpus_program_leaves_the_cache_in_place(tmp_path):
    """Regression: XLA copied all of it into a layout with heads first, at every step."""
    environment = {name: value for name, value in places.environment(tmp_path, next(iter(
        places.compilers().values()))).items() if not name.startswith("MOSAIC_GPU_DUMP")}
    done = subprocess.run([places.interpreter(), "-c", FOR_AN_H200], cwd=places.ROOT, env=environment, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr[-4000:]
    size, kept, temporary = map(int, done.stdout.split())
    assert kept >= size and temporary < size / 4


def test_other_lengths_and_tables_compile_nothing(caplog):
    cached, new = EMPTY["pages"](), (K[:, :1], V[:, :1])
    cached = cache.append(cached, *new)
    cache.attend(Q[:, :1], cached)
    other = cache.Cache(cached.key, cached.value, [3, 33], TABLE[::-1])
    with jax.log_compiles():
        other = cache.append(other, *new)
        cache.attend(Q[:, :1], other)
        cache.attend(Q[:, :1], dataclasses.replace(other, lengths=jnp.array([1, 0])))
    assert not [record for record in caplog.records if record.getMessage().startswith("Compiling")]


def test_vmap():
    """Over caches, as over layers of a model."""
    caches = [cache.append(EMPTY["pages"](), x[:, :9], x[:, 9:18]) for x in (K, V)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *caches)
    q, new = jnp.stack([Q[:, :1], Q[:, 1:2]]), jnp.stack([K[:, :1], V[:, :1]])

    def step(cached, q, new, implementation="xla"):
        cached = cache.append(cached, new, new)
        return cached.key, cache.attend(q, cached, implementation=implementation)
    wanted = [step(*args, "reference") for args in zip(caches, q, new)]
    assert_agree(jax.vmap(step)(stacked, q, new), jax.tree.map(lambda *x: jnp.stack(x), *wanted))


def test_gradients_through_pages_are_those_of_contiguous_keys():
    """Appended keys and those that were there; nothing reaches what no query sees."""
    def loss(kv, empty, implementation):
        cached = dataclasses.replace(empty(), lengths=[7, 18])
        cached = cache.append(cached, *kv[:2])
        out, lse = cache.attend(kv[2], cached, mask=Causal() & Window(left=20), return_lse=True,
                                implementation=implementation)
        return (out * jnp.cos(Q[:, :5])).sum() + lse.sum()
    given = tuple(map(jnp.asarray, (K[:, :5], V[:, :5], Q[:, :5])))
    found, wanted = (jax.jit(jax.grad(functools.partial(loss, empty=EMPTY[name], implementation=implementation)))(given)
                     for name, implementation in (("pages", "xla"), ("contiguous", "reference")))
    assert_agree(found, wanted)
    assert all(np.asarray(x).any() for x in wanted)


COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


@pytest.mark.parametrize("kind", ["auto", "explicit", "manual"])
def test_batch_and_heads_may_be_sharded(kind):
    """The only exchange is that of the bounds of loops, which automatic axes share."""
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 devices")
    axes = AxisType.Explicit if kind == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(axes, axes))
    start = dataclasses.replace(EMPTY["contiguous"](), lengths=[4, 0])
    place = P("x", None, "y")
    places = jax.tree.unflatten(jax.tree.structure(start), [place, place, P("x")])

    def step(cached, q, k, v, implementation="xla"):
        cached = cache.append(cached, k, v)
        return cached, cache.attend(q, cached, implementation=implementation)
    args, in_specs = (start, Q[:, :3], K[:, :3], V[:, :3]), (places, place, place, place)
    if kind == "manual":
        run = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=(places, place)))
    else:
        run = jax.jit(step)
        args = jax.tree.map(lambda x, place: jax.device_put(x, NamedSharding(mesh, place)), args, in_specs)
    program = run.lower(*args).compile()
    found = [name for name in COLLECTIVES if name in program.as_text()]
    assert found == ([] if kind == "manual" else ["all-reduce"])
    results = program(*args)
    assert results[1].sharding.is_equivalent_to(NamedSharding(mesh, place), 4)
    assert_same(results, step(start, *(x[:, :3] for x in (Q, K, V)), "reference"))


# What is said and refused ---------------------------------------------------------------------------------------------

def test_explain_says_what_runs():
    q = jax.ShapeDtypeStruct((2, 1, 8, 64), "bfloat16")
    cached = jax.eval_shape(lambda: cache.empty_paged(TABLE, (8, 16), 2, 64))
    text = cache.explain(q, cached, mask=Causal() & Window(left=jnp.array([3, 4])), device=device.H200)
    assert "len=1x48" in text and "implementation='hopper'" in text and "pages=8x16" in text
    assert "mask=Filled(Causal(), lengths=int32[2x1])" in text
    assert "not 'hopper'" not in text
    with pytest.raises(UnsupportedError, match="needs bfloat16 or float16"):
        cache.attend(Q[:, :1], EMPTY["contiguous"](), implementation="hopper")


WRONG = {
    "no room": (lambda c: cache.append(dataclasses.replace(c, lengths=[3, 39]), K[:, :2], V[:, :2]),
                r"must fit into the cache, got lengths\[1\]=39 and 2 more, room for 40\. Make"),
    "lost": (lambda c: cache.attend(Q[:, :1], dataclasses.replace(c, lengths=jnp.array([41, 0]))), r"lengths\[0\]=41,"),
    "given too long": (lambda c: cache.Cache(c.key, c.value, [0, 41]), r"lengths\[1\]=41, room for 40"),
    "negative": (lambda c: cache.Cache(c.key, c.value, [0, -1]), r"lengths must be at least 0, got min\(lengths\)=-1"),
    "a negative batch": (lambda c: cache.empty(-1, 4, 2, 8), "batch must be an integer of at least 0, got batch=-1"),
    "half a position": (lambda c: cache.empty(1, 4.5, 2, 8), "capacity must be an integer of at least 0"),
    "a number of pages alone": (lambda c: cache.empty_paged([[0]], 16, 2, 8), "pages must be two numbers"),
    "pages of no size": (lambda c: cache.empty_paged([[0]], (1, None), 2, 8),
                         r"pages\[1\] must be an integer of at least 0, got pages\[1\]=None"),
    "not integers": (lambda c: cache.Cache(c.key, c.value, np.zeros(2)), "lengths must hold integers"),
    "lengths that are a mask": (lambda c: cache.Cache(c.key, c.value, np.ones((2, 8), bool)),
                                r"got lengths.shape=\(2, 8\)\..*is a mask: \(x != 0\).sum\(1\) counts them"),
    "lengths of others": (lambda c: cache.Cache(c.key, c.value, [0]), r"lengths must have shape \(batch,\) = \(2,\)"),
    "unlike": (lambda c: cache.Cache(c.key, c.value[:, :3], [0, 0]), "must be alike but for the last axis"),
    "three axes": (lambda c: cache.Cache(c.key[0], c.value, [0, 0]), "key of a cache must have 4 axes"),
    "layout": (lambda c: cache.empty(1, 8, 1, 8, layout="LBHD"), "layout must be one of"),
    "page size": (lambda c: cache.empty_paged(TABLE, (8, 24), 2, 8), "multiple of 16 positions, got 8 pages of 24"),
    "flat table": (lambda c: cache.empty_paged(TABLE[0], (8, 16), 2, 8), "page_table must have shape"),
    "shared": (lambda c: cache.append(dataclasses.replace(EMPTY["pages"](), page_table=TABLE * 0), K[:, :1], V[:, :1]),
               r"page of the sequence's own, got page_table\[0, 0\]=0"),
    "dtype": (lambda c: cache.append(c, K[:, :1].astype("bfloat16"), V[:, :1]), "key must have the dtype of the cache"),
    "new shape": (lambda c: cache.append(c, K[:, :1, :1], V[:, :1]), r"key must have shape \(2, n, 2, 8\) \(BLHD\)"),
    "counts": (lambda c: cache.append(c, K[:, :1], V[:, :2]), "same number of new tokens"),
    "no cache": (lambda c: cache.attend(Q[:, :1], K), "cache must be a pallas_flash.cache.Cache"),
    "query's batch": (lambda c: cache.attend(Q[:1, :1], c), "same batch size"),
    "query's dtype": (lambda c: cache.attend(Q[:, :1].astype("bfloat16"), c), "same dtype"),
    "dense": (lambda c: cache.attend(Q[:, :1], c, mask=Dense(np.ones((1, 40), bool))), "rule of positions"),
    "segments": (lambda c: cache.attend(Q[:, :1], c, mask=SegmentIds(np.ones((2, 1), int), np.ones((2, 40), int))),
                 "rule of positions"),
    "bias": (lambda c: cache.attend(Q[:, :1], c, bias=np.ones(39, "float32")), r"bias must broadcast to .*kv_len=40"),
    "shapes alone": (lambda c: cache.attend(Q[:, :1], jax.eval_shape(EMPTY["contiguous"])), "must hold values"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(name):
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call(EMPTY["contiguous"]())


def test_an_unknown_keyword_is_named():
    with pytest.raises(TypeError, match=r"has no argument `score`.*\. Call flash_attention, which has it"):
        cache.attend(Q[:, :1], EMPTY["contiguous"](), score=abs)  # the message began "Flash_attention"
    with pytest.raises(TypeError, match=r"attend\(\) has no argument `kv_lengths`"):
        cache.attend(Q[:, :1], EMPTY["contiguous"](), kv_lengths=[1, 2])
