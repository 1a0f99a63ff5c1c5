"""The tables, ranges and sizes of the Hopper forward kernel's schedules, against brute force over positions."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from pallas_flash import masks
from pallas_flash.kernels.hopper import forward
from pallas_flash.kernels.hopper import schedule as schedules
from pallas_flash.kernels.hopper.schedule import ROWS, ForwardSchedule
from pallas_flash.spec import AttentionSpec

H100_SMEM = 232_448
SMALL = ForwardSchedule(block_kv=32, num_blocks=4)
SHAPES = ((1, 1), (64, 64), (130, 130), (200, 70), (70, 200), (513, 300))
MASKS = (masks.Full(), masks.Causal(), masks.Causal(17), masks.Causal(-40), masks.Window(50, 9),
         masks.Window(0, 3, -70), masks.PrefixLM(33))
SCHEDULES = (SMALL, dataclasses.replace(SMALL, warpgroups=3, block_kv=48), dataclasses.replace(SMALL, warpgroups=1),
             dataclasses.replace(SMALL, num_blocks=1000))


def make_spec(q_len, kv_len, mask=None, d=64, d_v=None, batch=2, heads=(4, 2)):
    shape = lambda length, heads, width: jax.ShapeDtypeStruct((batch, length, heads, width), np.dtype("bfloat16"))
    return AttentionSpec.of(shape(q_len, heads[0], d), shape(kv_len, heads[1], d), shape(kv_len, heads[1], d_v or d),
                            mask=mask or masks.Causal())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("shape", SHAPES)
def test_table_has_every_tile_once(schedule, shape):
    spec = make_spec(*shape)
    table = schedules.forward_table(spec, schedule)
    tiles = spec.batch * spec.q_heads * schedules.q_tiles(spec, schedule)
    assert (table[:, -1] == -1).all()
    assert sorted(table[table >= 0]) == list(range(tiles))
    assert ((table[:, 1:] < 0) | (table[:, :-1] >= 0)).all(), "a tile after the end of a row is never reached"
    assert table.shape[0] <= schedule.num_blocks


def test_blocks_share_the_work_evenly():
    spec = make_spec(16384, 16384, d=128, batch=1, heads=(16, 16))
    schedule = schedules.default_forward(spec)
    table = schedules.forward_table(spec, schedule)
    index = np.where(table >= 0, table, 0) % schedules.q_tiles(spec, schedule)
    lo, hi = schedules.kv_range(spec, schedule, index)
    work = np.where(table >= 0, hi - lo, 0).sum(axis=1)
    assert work.max() <= 1.01 * work.mean()


def kept(spec):
    return np.broadcast_to(spec.mask.keep(np.arange(spec.q_len)[:, None], np.arange(spec.kv_len)[None]),
                           (spec.q_len, spec.kv_len))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_ranges_and_steps_cover_the_mask(schedule, mask, shape):
    spec, block = make_spec(*shape, mask), schedule.block_kv
    keep, seen = kept(spec), schedules.steps(spec, schedule)
    for q_tile in range(schedules.q_tiles(spec, schedule)):
        lo, hi = schedules.kv_range(spec, schedule, q_tile)
        assert 0 <= lo < hi <= math.ceil(spec.kv_len / block)
        for warpgroup in range(schedule.warpgroups):
            start, full_start, full_stop, stop = schedules.row_tiles(spec, schedule, q_tile, warpgroup)
            assert lo <= start < stop <= hi
            assert seen.skips_above or stop == hi
            assert seen.skips_below or start == lo
            first = (q_tile * schedule.warpgroups + warpgroup) * ROWS
            rows = keep[first:first + ROWS]
            assert not rows[:, :start * block].any()
            assert not rows[:, stop * block:].any()
            for tile in range(start, stop):
                inside = (tile + 1) * block <= spec.kv_len
                whole = rows.size and inside and rows[:, tile * block:(tile + 1) * block].all()
                masked = seen.first_masked if tile == stop - 1 else seen.later_masked
                treated = masked and (tile == stop - 1 or not full_start <= tile < full_stop)
                assert whole or treated or not rows.size, f"{q_tile=} {warpgroup=} {tile=} must be masked"


@pytest.mark.parametrize("d", range(8, 257, 8))
@pytest.mark.parametrize("d_v", (8, 64, 72, 128, 192, 256))
def test_default_is_legal(d, d_v):
    spec = make_spec(1000, 1000, d=d, d_v=d_v)
    assert schedules.forward_problems(spec, schedules.default_forward(spec), H100_SMEM) == []


@pytest.mark.parametrize(("change", "reason"), [
    (dict(block_kv=40), "multiple of 16"), (dict(warpgroups=4), "1, 2 or 3"), (dict(num_stages=0), "positive"),
    (dict(num_stages=8), "bytes of shared memory"), (dict(block_kv=256), "registers")])
def test_illegal_schedules_say_why(change, reason):
    spec = make_spec(1000, 1000, d=128)
    schedule = dataclasses.replace(schedules.default_forward(spec), **change)
    assert any(reason in problem for problem in schedules.forward_problems(spec, schedule, H100_SMEM))


@pytest.mark.parametrize(("length", "mask", "mebibytes"), [
    (512, masks.Causal(), 16), (1024, masks.Causal(), 16), (2048, masks.Causal(), 32), (2048, masks.Window(511, 0), 32),
    (2048, masks.Full(), 16), (2100, masks.Full(), 32)])
@pytest.mark.parametrize("d", (64, 128, 256))
def test_sections_are_small_where_little_is_shared_or_all(d, length, mask, mebibytes):
    assert schedules.default_forward(make_spec(length, length, mask, d=d)).section_bytes == mebibytes << 20


@pytest.mark.parametrize(("d", "d_v", "block_kv", "maxima"), [
    (64, 64, 128, 2), (128, 128, 128, 2), (192, 128, 128, 2), (136, 40, 128, 2), (192, 192, 96, 0), (128, 192, 96, 0),
    (256, 256, 64, 0)])
def test_wide_heads_have_smaller_key_tiles(d, d_v, block_kv, maxima):
    schedule = schedules.default_forward(make_spec(2048, 2048, d=d, d_v=d_v))
    assert (schedule.block_kv, schedule.maxima) == (block_kv, maxima)


def test_sections_of_queries_that_all_meet_the_same_keys_are_small():
    assert schedules.default_forward(make_spec(100, 2048, masks.Causal(1900))).section_bytes == 16 << 20
    assert schedules.default_forward(make_spec(1000, 2048, masks.Causal(1048))).section_bytes == 32 << 20


@pytest.mark.parametrize("change", [
    {}, dict(maxima=2), dict(query_buffers=1, out_chunks=0), dict(out_chunks=1, num_stages=1), dict(block_kv=48)])
@pytest.mark.parametrize("d", (40, 64, 128, 192, 256))
def test_smem_bytes_is_what_the_kernel_allocates(d, change):
    spec = make_spec(500, 500, d=d, d_v=min(d, 128))
    schedule = dataclasses.replace(schedules.default_forward(spec), **change)
    smem, bars = forward.scratch(spec, schedule)
    data = sum(math.ceil(math.prod(buffer.shape) * 2 / 1024) * 1024 for buffer in smem.values())
    barriers = 8 * sum(math.prod(bar.num_barriers) for bar in bars.values())
    assert data + barriers <= schedules.smem_bytes(spec, schedule) < data + barriers + 1024
