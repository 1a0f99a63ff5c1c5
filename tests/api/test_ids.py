"""Segment ids in `xla`: which tiles it skips and leaves unmasked, and what finding them costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from pallas_flash import Causal, SegmentIds, flash_attention, masks, tiles
from pallas_flash.kernels.xla import schedule
from pallas_flash.kernels.xla.ids import with_tiles

BATCH, Q_LEN, KV_LEN = 2, 50, 70
SCHEDULE = schedule.Schedule(8, 12)
RNG = np.random.default_rng(0)


def in_order(length, padding):
    ids = np.sort(RNG.integers(0, 4, (BATCH, length)).astype(np.int32), axis=1)
    ids[0, length - padding:] = -1
    return ids


def in_any_order(length, largest=3):
    return RNG.choice(np.array([-5, 0, 1, largest], np.int32), (BATCH, length)).repeat(6, axis=1)[:, :length]


IDS = {
    "in order": (in_order(Q_LEN, 7), in_order(KV_LEN, 9)),
    "one on both sides": (np.sort(RNG.integers(0, 3, (1, Q_LEN)).astype(np.int32)),) * 2,
    "any": (in_any_order(Q_LEN), in_any_order(KV_LEN)),
    "largest of all": tuple(in_any_order(n, 2**31 - 1) for n in (Q_LEN, KV_LEN)),
    "padding alone": (np.full((1, Q_LEN), -1, np.int32), in_any_order(KV_LEN)),
}


def ranges(mask, q_len, kv_len):
    """The key tiles of every query tile, and the query tiles of every key tile: arrays (tiles, 4)."""
    mask = mask & masks.InBounds(q_len, kv_len)

    def of_queries(tile):
        return tiles.kv_tiles(mask, tiles.interval(tile, SCHEDULE.block_q, q_len), SCHEDULE.block_kv, kv_len)

    def of_keys(tile):
        interval = tile * SCHEDULE.block_kv, (tile + 1) * SCHEDULE.block_kv
        return tiles.q_tiles(mask, interval, SCHEDULE.block_q, q_len)

    counts = -(-q_len // SCHEDULE.block_q), -(-kv_len // SCHEDULE.block_kv)
    return [np.stack(jax.jit(jax.vmap(f))(jnp.arange(n, dtype=jnp.int32)), axis=1)
            for f, n in zip((of_queries, of_keys), counts, strict=True)]


def check(found, keep, block, other_block):
    """Every pair outside of a range is hidden, every one in its full part is kept in all batch entries."""
    for tile, (start, full_start, full_stop, stop) in enumerate(found):
        rows = keep[:, tile * block:(tile + 1) * block]
        for other in range(-(-keep.shape[2] // other_block)):
            part = rows[:, :, other * other_block:(other + 1) * other_block]
            assert start <= other < stop or not part.any(), (tile, other)
            assert not full_start <= other < full_stop or part.all(), (tile, other)


@pytest.mark.parametrize("name", IDS)
def test_ranges_of_tiles_hold_what_is_kept(name):
    q_ids, kv_ids = IDS[name]
    mask = with_tiles(SegmentIds(q_ids, kv_ids).canonical(), SCHEDULE)
    keep = (q_ids[:, :, None] == kv_ids[:, None]) & (q_ids[:, :, None] >= 0)
    of_queries, of_keys = ranges(mask, q_ids.shape[1], kv_ids.shape[1])
    check(of_queries, keep, SCHEDULE.block_q, SCHEDULE.block_kv)
    check(of_keys, keep.swapaxes(1, 2), SCHEDULE.block_kv, SCHEDULE.block_q)


@pytest.mark.parametrize("name", ["in order", "one on both sides", "padding alone"])
def test_ranges_of_documents_are_those_of_the_mask(name):
    """Those of the mask look at every position."""
    q_ids, kv_ids = IDS[name]
    mask = SegmentIds(q_ids, kv_ids).canonical()
    for found, wanted in zip(*(ranges(own, q_ids.shape[1], kv_ids.shape[1])
                               for own in (with_tiles(mask, SCHEDULE), mask)), strict=True):
        some = wanted[:, 0] < wanted[:, 3]
        np.testing.assert_array_equal(found[some][:, [0, 3]], wanted[some][:, [0, 3]])
        assert (found[~some][:, 0] >= found[~some][:, 3]).all()
        is_full = wanted[:, 1] < wanted[:, 2]
        np.testing.assert_array_equal(found[is_full], wanted[is_full])
        assert (found[~is_full][:, 1] >= found[~is_full][:, 2]).all()


def loops(jaxpr, inside=False):
    """Every equation that is in the body of a loop, with those of inner loops."""
    for equation in jaxpr.eqns:
        here = inside or equation.primitive.name in ("while", "scan")
        if inside:
            yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from loops(inner, here)


def test_no_step_of_a_loop_looks_at_all_ids(monkeypatch):
    """Regression: finding the tiles of each tile was O(length), so O(length * tiles) in all."""
    monkeypatch.setattr(schedule, "TARGET_BLOCK", 8)
    length = 13 * 8
    ids = jnp.zeros((1, length), jnp.int32)
    q = jnp.zeros((1, length, 1, 8))

    def both(q, ids):
        call = functools.partial(flash_attention, mask=Causal() & SegmentIds(ids, ids), implementation="xla")
        out, vjp = jax.vjp(call, q, q, q)
        return vjp(out)

    found = [equation for equation in loops(jax.make_jaxpr(both)(q, ids).jaxpr)
             for result in equation.outvars
             if length in result.aval.shape and not jnp.issubdtype(result.aval.dtype, jnp.floating)]
    assert not found, found
