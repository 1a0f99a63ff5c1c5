"""Masks that hold arrays in the Hopper kernels: what is made of them beside the launches, and the kernels themselves in
Pallas' interpreter, on small shapes, with NaN in what they hide.

See `test_forward` and `test_backward` for what the interpreter lacks.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # where the interpreter says whether it saw a race

from hopper.test_backward import cotangents, interpreted_gradients, statistics
from pallas_flash import device, masks
from pallas_flash import packed as packed_sequences
from pallas_flash.kernels.hopper import defaults, launches, mask_arrays, rules, work
from pallas_flash.kernels.hopper.schedule import BackwardSchedule, DqSchedule, ForwardSchedule, KvSchedule
from pallas_flash.kernels.mosaic import dropout
from pallas_flash.kernels.mosaic.interpret import interpreted
from pallas_flash.spec import AttentionSpec
from pallas_flash.testing import conformance
from pallas_flash.testing.problems import Problem

BATCH, HEADS, KEY_HEADS, Q_LEN, KV_LEN = 2, 2, 1, 80, 100


def packed(*lengths):
    """Ids 0, 1, ... of documents of the given lengths; a negative length is padding."""
    return np.concatenate([np.full(abs(n), i if n > 0 else -1) for i, n in enumerate(lengths)]).astype(np.int32)


def ids_in_any_order(length, seed):
    return np.random.default_rng(seed).integers(-1, 3, (BATCH, length)).astype(np.int32)


DOCUMENTS = masks.SegmentIds(np.stack([packed(30, 50), packed(70, 4, -6)]),
                             np.stack([packed(40, 60), packed(70, 10, -20)]))


STARTS = np.array([0, 20, 20, 70], np.int32), np.array([0, 30, 45, 90], np.int32)  # one without queries; padding
SEQUENCES = packed_sequences.Packed(
    masks.Window(30, 0), *STARTS,
    *(np.searchsorted(starts[1:], np.arange(length), side="right").astype(np.int32)
      for starts, length in zip(STARTS, (Q_LEN, KV_LEN))), "last")


def dense(*shape, chance=0.5, seed=2):
    return masks.Dense(np.random.default_rng(seed).random(shape) < chance)


def with_holes():
    """Half of the pairs, but tiles without any, tiles that are whole, and queries and keys without a pair."""
    attend = dense(BATCH, HEADS, Q_LEN, KV_LEN).attend.copy()
    attend[0, 0, :, :64], attend[0, 0, :64, 64:], attend[0, 1, :64, 32:96] = False, False, True
    attend[1, :, 10:20], attend[1, :, :, 64:], attend[1, :, :, 3] = False, False, False
    return masks.Dense(attend)


PADDING = masks.Dense(np.arange(KV_LEN) < np.array([[90], [40]])[:, None, None])
MASKS = {
    "lengths-offsets": masks.InBounds(q_len=np.array([80, 33]), kv_len=np.array([100, 77]))
                       & masks.Causal(np.array([30, -20])),
    "window-of-each-head": masks.Window(np.array([[3, 40]]), np.array([[0, 5]]), np.array([[30], [0]])),
    "prefix": masks.PrefixLM(np.array([50, 0]), np.array([-10, 20])),
    "documents-causal": DOCUMENTS & masks.Causal(np.array([10, -5])) & masks.InBounds(kv_len=np.array([95, 79])),
    "ids-in-any-order": masks.Window(60, 20)
                        & masks.SegmentIds(ids_in_any_order(Q_LEN, 0), ids_in_any_order(KV_LEN, 1)),
    "ids-shared": masks.SegmentIds(packed(64, 16), packed(64, 36)),
    "sequences-at-their-ends": SEQUENCES,
    "dense": with_holes(),
    "dense-keys": PADDING,
    "dense-queries": dense(BATCH, HEADS, Q_LEN, 1),
    "dense-causal": dense(Q_LEN, KV_LEN, chance=0.8) & PADDING & masks.Causal(np.array([10, 20])),
    "dense-documents": masks.Dense(dense(BATCH, 1, 1, KV_LEN).attend | (np.arange(KV_LEN) == 50)) & DOCUMENTS
                       & masks.Window(60, 60),
}


def canonical(mask):
    return jax.tree.map(jnp.asarray, mask.canonical())


@functools.cache
def pairs(name, batch=BATCH, heads=HEADS, q_len=Q_LEN, kv_len=KV_LEN):
    """Which pairs a mask keeps: (batch, heads, q_len, kv_len)."""
    q_pos, kv_pos = (jnp.arange(n, dtype=jnp.int32) for n in (q_len, kv_len))
    keep = masks.over_batch(canonical(MASKS[name]), lambda part: part.keep(q_pos[:, None], kv_pos[None, :]))
    return np.asarray(jnp.broadcast_to(keep, (batch, heads, q_len, kv_len)))


# -- what kernels read -------------------------------------------------------------------------------------------------

def spec_of(mask, d=64):
    array = lambda length, heads: jax.ShapeDtypeStruct((BATCH, length, heads, d), jnp.bfloat16)
    return AttentionSpec.of(array(Q_LEN, HEADS), array(KV_LEN, KEY_HEADS), array(KV_LEN, KEY_HEADS), mask=mask)


FORWARD = ForwardSchedule(block_kv=32, warpgroups=2, num_blocks=3)
BACKWARD = BackwardSchedule(KvSchedule(), DqSchedule(block_kv=32, warpgroups=1))


@functools.cache
def arrays(name):
    """Of the forward and of the backward, in NumPy."""
    spec, mask = spec_of(MASKS[name]), canonical(MASKS[name])
    made = jax.jit(lambda mask: (mask_arrays.forward(spec, FORWARD, mask), mask_arrays.backward(spec, BACKWARD, mask)))
    return jax.tree.map(np.asarray, made(mask))


def unpacked(words, rows, columns):
    """(.., .., words or 1, rows or 1) -> (.., .., rows, columns); padding is hidden."""
    own = np.broadcast_to(words, (*words.shape[:3], max(rows, words.shape[3])))
    bits = (own[:, :, :, None] >> np.arange(32)[:, None] & 1).reshape(*own.shape[:2], -1, own.shape[3]) != 0
    if words.shape[2] > 1:
        assert not bits[:, :, columns:].any()
    if words.shape[3] > 1:
        assert not bits[..., rows:].any()
    bits = bits[:, :, :columns] if words.shape[2] > 1 else bits[:, :, :1]
    return bits[..., :rows].swapaxes(2, 3)


@pytest.mark.parametrize("of_keys", [True, False], ids=["keys", "queries"])
@pytest.mark.parametrize("name", MASKS)
def test_positions_keep_the_pairs_that_the_mask_keeps(name, of_keys):
    for found in arrays(name)[0 if of_keys else 1:]:
        wanted = mask_arrays.names(MASKS[name], of_keys)
        assert set(wanted) <= set(found)
        keep, interval = np.ones((1, 1, Q_LEN, KV_LEN), bool), "keys" if of_keys else "queries"
        if interval in wanted:
            length, other = (Q_LEN, KV_LEN) if of_keys else (KV_LEN, Q_LEN)
            distance = np.arange(other) - found[interval][:, :, 0, :length, None]
            keep = (distance >= 0) & (distance < found[interval][:, :, 1, :length, None])
            keep = keep if of_keys else keep.swapaxes(2, 3)
        if "q_ids" in wanted:
            same = found["q_ids"][:, :, 0, :, None] == found["kv_ids"][:, :, 0, None, :]
            assert not same[:, :, Q_LEN:].any()
            assert not same[..., KV_LEN:].any()
            keep = keep & same[:, :, :Q_LEN, :KV_LEN]
        if (bits := "key_bits" if of_keys else "query_bits") in wanted:
            rows, columns = (Q_LEN, KV_LEN) if of_keys else (KV_LEN, Q_LEN)
            kept = unpacked(found[bits], rows, columns)
            keep = keep & (kept if of_keys else kept.swapaxes(2, 3))
        np.testing.assert_array_equal(np.broadcast_to(keep, pairs(name).shape), pairs(name))


def check_ranges(found, keep, block, other_block):
    """Everything outside of a range is hidden, everything in its full part is kept; returns how many tiles were
    skipped and full.
    """
    skipped = full = 0
    ranges = np.broadcast_to(found, (*keep.shape[:2], *found.shape[2:]))
    for index in np.ndindex(ranges.shape[:3]):
        start, full_start, full_stop, stop = ranges[index]
        assert 0 <= start <= stop
        rows = keep[index[:2]][index[2] * block:(index[2] + 1) * block]
        for tile in range(-(-rows.shape[1] // other_block)):
            part = rows[:, tile * other_block:(tile + 1) * other_block]
            if not start <= tile < stop:
                assert not part.any(), (index, tile)
                skipped += 1
            elif full_start <= tile < full_stop:
                assert part.all(), (index, tile)
                assert part.shape[1] == other_block, (index, tile)
                full += 1
    return skipped, full


@pytest.mark.parametrize("name", MASKS)
def test_ranges_skip_what_is_hidden_and_mask_what_is_not_kept(name):
    forward, backward = arrays(name)
    skipped, full = check_ranges(forward["key_tiles"], pairs(name), 64, FORWARD.block_kv)
    assert skipped > 0 or name == "dense-queries"
    assert full > 0 or name not in ("lengths-offsets", "prefix", "ids-shared", "dense", "dense-keys")
    check_ranges(backward["key_tiles"], pairs(name), BACKWARD.dq.block_q, BACKWARD.dq.block_kv)
    of_keys = pairs(name).swapaxes(2, 3)
    ranges = np.repeat(backward["query_tiles"], HEADS // KEY_HEADS, axis=1)
    check_ranges(ranges, of_keys, BACKWARD.kv.block_kv, BACKWARD.kv.block_q)


@pytest.mark.parametrize("name", MASKS)
def test_every_tile_loads_what_its_rows_walk(name):
    """At least one key tile, so that rows without keys are written, too; and a query tile loads no other tiles than
    those that some of its rows need. After the last tile comes the counter, 0.
    """
    needed, counter = np.split(arrays(name)[0]["key_tiles"], [-1], axis=2)
    assert (counter == 0).all()
    start, stop = (needed[..., i].reshape(*needed.shape[:2], -1, FORWARD.warpgroups) for i in (0, 3))
    assert (start < stop).all()
    assert (start >= 0).all()
    assert (stop <= -(-KV_LEN // FORWARD.block_kv)).all()
    keep, rows = pairs(name), FORWARD.block_q
    for batch, head, q_tile in np.ndindex(start.shape[:3]):
        columns = keep[batch, head, q_tile * rows:(q_tile + 1) * rows].any(axis=0)
        seen = np.flatnonzero(columns) // FORWARD.block_kv
        lo, hi = start[batch, head, q_tile].min(), stop[batch, head, q_tile].max()
        assert seen.size == 0 or (lo <= seen.min() and seen.max() < hi)


def test_every_tile_is_taken_once():
    """Also where a section of heads has not all of them, and there are fewer tiles than blocks."""
    for schedule in (FORWARD, dataclasses.replace(FORWARD, num_blocks=132, section_bytes=1)):
        for mask in (DOCUMENTS, DOCUMENTS & masks.Causal()):
            order = work.tile_order(spec_of(mask), schedule)
            heads, q_tiles = order.head_and_tile(jnp.arange(order.blocks))
            every = [(head, tile) for head in range(BATCH * HEADS) for tile in range(-(-Q_LEN // schedule.block_q))]
            assert sorted(zip(heads.tolist(), q_tiles.tolist())) == every
            assert work.forward_blocks(spec_of(mask), schedule) == min(len(every), schedule.num_blocks)


@pytest.mark.parametrize("order", ["sorted", "two runs", "three runs", "padding inside", "any"])
def test_ranges_of_ids_are_tight(order):
    """Of full tiles, all where they are one run; where there are two, the longer one."""
    runs = {"sorted": [(0, 64), (1, 128), (2, 64)], "two runs": [(0, 64), (1, 32), (0, 160)],
            "three runs": [(0, 32), (1, 32), (0, 96), (1, 32), (0, 64)],
            "padding inside": [(0, 64), (-1, 64), (0, 128)], "any": []}[order]
    ids = np.concatenate([np.full(n, i, np.int32) for i, n in runs]) if runs else ids_in_any_order(256, 3)[0]
    q_ids, kv_ids = ids, np.roll(ids, 32)
    mask = masks.SegmentIds(q_ids, kv_ids)
    array = lambda heads: jax.ShapeDtypeStruct((1, 256, heads, 64), jnp.bfloat16)
    spec = AttentionSpec.of(array(1), array(1), array(1), mask=mask)
    made = jax.jit(functools.partial(mask_arrays.forward, spec, FORWARD))
    found = np.asarray(made(canonical(mask))["key_tiles"])[:, :, :-1]
    keep = (q_ids[:, None] == kv_ids[None]) & (q_ids[:, None] >= 0)
    check_ranges(found, keep[None, None], 64, FORWARD.block_kv)
    if order == "any":
        return
    tiles = keep.reshape(4, 64, 8, 32)
    for (start, full_start, full_stop, stop), some, full in zip(found[0, 0].tolist(), tiles.any(axis=(1, 3)),
                                                                tiles.all(axis=(1, 3))):
        if some.any():
            assert (start, stop) == (some.argmax(), 8 - some[::-1].argmax())
        lengths = [len(run) for run in "".join("x" if x else " " for x in full).split()] or [0]
        assert full_stop - full_start == max(lengths[0], lengths[-1])


# -- the kernels -------------------------------------------------------------------------------------------------------

BAD = 50
"""A key whose value is NaN, that some queries attend to."""


NAMES = "documents-causal", "dense-causal"
"""All that a mask may hold: ids, offsets, lengths and bits."""


@functools.cache
def truth(name):
    """The problem, its operands, cotangents and error budget."""
    problem = Problem(name, "arrays", batch=BATCH, q_heads=1, kv_heads=1, q_len=Q_LEN, kv_len=KV_LEN, d=64, d_v=64,
                      mask=MASKS[name], dtypes=("bfloat16",))
    operands, cotangent = conformance.random_case(problem, "bfloat16")
    return problem, operands, cotangent, conformance.budget(problem, "bfloat16", operands, cotangent)


def with_nan(x, where):
    """x, (batch, length, heads, d), with NaN in some positions, (batch, length)."""
    return np.where(where[:, :, None, None], np.asarray(np.nan, x.dtype), x)


def given(spec, schedule, mask, found):
    """The arrays of a mask, in the order of a pass."""
    make = mask_arrays.forward if isinstance(schedule, ForwardSchedule) else mask_arrays.backward
    made = make(spec, schedule, canonical(mask))
    return [made[name] for name in found.inputs if name in made]


@pytest.mark.interpreted
@pytest.mark.parametrize("name", NAMES[:1])
def test_forward_agrees_with_the_oracle(name):
    """A value that is NaN reaches the queries that attend to it, and no others, of its document or of another."""
    problem, operands, _, budget = truth(name)
    spec, keep = problem.spec(), pairs(name)[:, 0]
    schedule = dataclasses.replace(defaults.default_forward(spec, device.H100), num_blocks=1, warpgroups=2, block_kv=32)
    assert rules.reasons_against(spec, schedule, 232_448) == []
    bad = np.broadcast_to(np.arange(KV_LEN) == BAD, (BATCH, KV_LEN))
    q, v = with_nan(operands.q, ~keep.any(axis=2)), with_nan(operands.v, bad)
    found = launches.forward(spec, schedule)
    with interpreted(detect_races=True):
        out, stats = found(*map(jnp.asarray, (q, operands.k, v)), *given(spec, schedule, problem.mask, found))
        out.block_until_ready()
    assert not gpu_callbacks.get_races().races_found
    sees_bad = keep[:, :, BAD]
    assert np.isnan(np.asarray(out, np.float64)[sees_bad]).all()
    clean = jnp.where(sees_bad[:, :, None, None], budget.baseline.out, out)
    used = budget.used(budget.baseline._replace(out=clean, lse=stats[:, :, 0]))
    assert max(used.values()) <= 1, used
    assert (np.asarray(out, np.float64)[~keep.any(axis=2)] == 0).all()


@pytest.mark.interpreted
def test_blocks_share_out_tiles_by_a_counter():
    """Four query tiles for three blocks, two of them without a key; the counter is 0 again at the end, so that the same
    arrays can be used once more.
    """
    ids = masks.SegmentIds(ids_in_any_order(24, 4)[:, :24], ids_in_any_order(40, 5)[:, :40])
    mask = ids & masks.InBounds(kv_len=np.array([38, 0]))
    problem = Problem("counter", "arrays", batch=BATCH, q_heads=2, kv_heads=1, q_len=24, kv_len=40, d=64, d_v=64,
                      mask=mask, dtypes=("bfloat16",))
    operands, cotangent = conformance.random_case(problem, "bfloat16")
    budget, spec = conformance.budget(problem, "bfloat16", operands, cotangent), problem.spec()
    schedule = ForwardSchedule(block_kv=32, warpgroups=2, num_blocks=3)
    assert rules.reasons_against(spec, schedule, 232_448) == []
    found = launches.forward(spec, schedule)
    launch, = found.launches
    made = jax.jit(functools.partial(mask_arrays.forward, spec, schedule))(canonical(mask))
    named = dict(zip("qkv", map(jnp.asarray, operands[:3]))) | made | {"key_tiles": jax.new_ref(made["key_tiles"])}
    with interpreted():
        out, stats = launch.kernel(*(named[name] for name in launch.inputs))
    used = budget.used(budget.baseline._replace(out=out, lse=stats[:, :, 0]))
    assert max(used.values()) <= 1, used
    assert named["key_tiles"][0, 0, -1].tolist() == [0, 0, 0, 0]


TWO = BackwardSchedule(KvSchedule(), DqSchedule(block_kv=32))
FUSED = BackwardSchedule(KvSchedule(num_stages=4, dq="own", dq_slots=2, pipelined=True, first_writes=True))


@pytest.mark.interpreted
@pytest.mark.parametrize(("name", "schedule"), [(NAMES[0], TWO), (NAMES[0], FUSED), (NAMES[1], TWO)],
                         ids=["two", "fused", "two-dense"])
def test_gradients_agree_with_the_oracle(name, schedule):
    """NaN in keys, values, queries and cotangents that the mask hides reaches nothing, nor do values of 3e38, whose
    products with cotangents are beyond float32 (regression: dq from one kernel was NaN). A value that is NaN reaches
    the queries that attend to it, and the keys that these attend to.
    """
    problem, operands, (dout, dlse), budget = truth(name)
    spec, keep = problem.spec(), pairs(name)[:, 0]
    assert rules.reasons_against(spec, schedule, 232_448) == []
    idle, unseen = ~keep.any(axis=2), ~keep.any(axis=1)
    sees_bad = keep[:, :, BAD]  # (batch, q_len)
    reached = (keep & sees_bad[:, :, None]).any(axis=1)  # (batch, kv_len)
    assert 0 < sees_bad.sum() < sees_bad.size
    assert 0 < reached.sum() < reached.size
    q, dout = with_nan(operands.q, idle), with_nan(np.asarray(dout), idle)
    k, v = with_nan(operands.k, unseen), with_nan(operands.v, unseen | (np.arange(KV_LEN) == BAD))
    if schedule is FUSED:
        v = np.where(unseen[:, :, None, None], np.asarray(3e38, v.dtype), v)
    saved = jnp.asarray(with_nan(budget.oracle.out, sees_bad), "bfloat16"), statistics(spec, budget.oracle.lse)
    made = given(spec, schedule, problem.mask, launches.backward(spec, schedule))
    arguments = (*map(jnp.asarray, (q, k, v)), *saved, *cotangents(dout, dlse), *made)
    found = interpreted_gradients(schedule, spec, arguments)
    assert np.isnan(np.asarray(found.dq, np.float64)[sees_bad]).all()
    assert np.isnan(np.asarray(found.dk, np.float64)[reached]).all()
    clean = {name: jnp.where(rows[:, :, None, None], getattr(budget.baseline, name), getattr(found, name))
             for name, rows in (("dq", sees_bad), ("dk", reached), ("dv", reached))}
    used = budget.used(budget.baseline._replace(**clean))
    assert max(used.values()) <= 1, used


@pytest.mark.interpreted
def test_gradients_with_dropout_agree_with_the_oracle():
    """Heads of a group have arrays and draws of their own, one batch entry has no keys; NaN in all that is hidden."""
    q_len, kv_len = 24, 40
    ids = masks.SegmentIds(np.stack([packed(10, 14), packed(20, -4)]), np.stack([packed(12, 28), packed(25, -15)]))
    mask = ids & masks.InBounds(kv_len=np.array([38, 0])) & masks.Causal(np.array([[10, 0], [5, -3]]))
    problem = Problem("dropout", "arrays", batch=BATCH, q_heads=HEADS, kv_heads=KEY_HEADS, q_len=q_len, kv_len=kv_len,
                      d=64, d_v=64, mask=mask, dropout_rate=0.3, dtypes=("bfloat16",))
    operands, (dout, dlse) = conformance.random_case(problem, "bfloat16")
    budget, spec = conformance.budget(problem, "bfloat16", operands, (dout, dlse)), problem.spec()
    assert rules.reasons_against(spec, TWO, 232_448) == []
    pos = jnp.arange(q_len)[:, None], jnp.arange(kv_len)[None]
    keep = np.asarray(masks.over_batch(canonical(mask), lambda part: part.keep(*pos)))
    idle, unseen = ~keep.any(axis=(1, 3)), ~keep.any(axis=(1, 2))
    given_operands = jax.tree.map(jnp.asarray, operands._replace(
        q=with_nan(operands.q, idle), k=with_nan(operands.k, unseen), v=with_nan(operands.v, unseen)))
    saved = jnp.asarray(budget.oracle.out, "bfloat16"), statistics(spec, budget.oracle.lse)
    made = given(spec, TWO, mask, launches.backward(spec, TWO))
    arrays = (*given_operands[:3], *saved, *cotangents(with_nan(np.asarray(dout), idle), dlse),
              *dropout.inputs(spec, given_operands), *made)
    with interpreted():
        dq, dk, dv = launches.backward(spec, TWO)(*arrays)
    used = budget.used(budget.baseline._replace(dq=dq, dk=dk, dv=dv))
    assert max(used.values()) <= 1, used
