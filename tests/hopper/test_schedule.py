"""The tables, ranges and sizes of the Hopper forward kernel's schedules, against brute force over positions."""

import dataclasses
import itertools
import math
import time

import jax
import numpy as np
import pytest

from pallas_flash import ALiBi, device, masks
from pallas_flash.kernels.hopper import defaults, memory, rules, scratch, work
from pallas_flash.kernels.hopper.schedule import (
    ROWS_PER_WARPGROUP,
    DqSchedule,
    ForwardSchedule,
    KvSchedule,
    SplitSchedule,
)
from pallas_flash.kernels.mosaic import bias
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
    table = work.forward_table(spec, schedule)
    tiles = spec.batch * spec.q_heads * work.q_tiles(spec, schedule)
    assert (table[:, -1] == -1).all()
    assert sorted(table[table >= 0]) == list(range(tiles))
    assert ((table[:, 1:] < 0) | (table[:, :-1] >= 0)).all(), "a tile after the end of a row is never reached"
    assert table.shape[0] <= schedule.num_blocks


def test_blocks_share_the_work_evenly():
    spec = make_spec(16384, 16384, d=128, batch=1, heads=(16, 16))
    schedule = defaults.default_forward(spec, device.H100)
    table = work.forward_table(spec, schedule)
    index = np.where(table >= 0, table, 0) % work.q_tiles(spec, schedule)
    lo, hi = work.loaded_tiles(work.worst_case(spec, schedule), spec, schedule, index)
    loads = np.where(table >= 0, hi - lo, 0).sum(axis=1)
    assert loads.max() <= 1.01 * loads.mean()


def kept(spec):
    return np.broadcast_to(spec.mask.keep(np.arange(spec.q_len)[:, None], np.arange(spec.kv_len)[None]),
                           (spec.q_len, spec.kv_len))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_ranges_and_steps_cover_the_mask(schedule, mask, shape):
    spec, block = make_spec(*shape, mask), schedule.block_kv
    keep, seen, worst = kept(spec), work.steps(spec, schedule), work.worst_case(spec, schedule)
    for q_tile in range(work.q_tiles(spec, schedule)):
        lo, hi = work.loaded_tiles(worst, spec, schedule, q_tile)
        assert 0 <= lo < hi <= math.ceil(spec.kv_len / block)
        for warpgroup in range(schedule.warpgroups):
            start, full_start, full_stop, stop = work.row_tiles(worst, spec, schedule, q_tile, warpgroup)
            assert lo <= start < stop <= hi
            assert seen.skips_above or stop == hi
            assert seen.skips_below or start == lo
            first = (q_tile * schedule.warpgroups + warpgroup) * ROWS_PER_WARPGROUP
            rows = keep[first:first + ROWS_PER_WARPGROUP]
            assert not rows[:, :start * block].any()
            assert not rows[:, stop * block:].any()
            for tile in range(start, stop):
                inside = (tile + 1) * block <= spec.kv_len
                whole = rows.size and inside and rows[:, tile * block:(tile + 1) * block].all()
                masked = seen.first_masked if tile == stop - 1 else seen.later_masked
                treated = masked and (tile == stop - 1 or not full_start <= tile < full_stop)
                assert whole or treated or not rows.size, f"{q_tile=} {warpgroup=} {tile=} must be masked"


@pytest.mark.parametrize("mask", (masks.Full(), masks.Causal(), masks.Window(300, 0)), ids=str)
@pytest.mark.parametrize("length, early", [(512, True), (1000, True), (1024, True), (2048, False), (4096, False)])
def test_rows_past_the_last_query_take_one_step_where_they_are_many(length, early, mask):
    """At d 64 a query tile has 192 rows: of 1,024 queries the last tile has 64. Otherwise they walk with the last."""
    spec = make_spec(length, length, mask)
    schedule = defaults.default_forward(spec, device.H100)
    start, _, _, stop = work.every_row_block(spec, schedule)
    blocks = -(-length // ROWS_PER_WARPGROUP)
    assert start.size % schedule.warpgroups == 0
    assert start.size > blocks
    assert work.idle_stop_early(spec, schedule) == early
    assert (stop[blocks:] - start[blocks:] == (1 if early else stop[blocks - 1] - start[blocks - 1])).all()
    assert stop[blocks - 1] - start[blocks - 1] > 1


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("added", ["bias", "pairs", "score"])
def test_explained_schedules_are_those_that_run(d, added):
    """Regression: kernels are made for the spec whose mask hides what a bias does, `explain` asks about the call's. Of
    heads of 64 with a bias it said that keys are held in registers, and they are not."""
    shape = {"bias": (2, 1, 1, 1024), "pairs": (1, 4, 1024, 1024)}.get(added)
    more = dict(score=ALiBi(np.ones(4, np.float32))) if shape is None else dict(
        bias=jax.ShapeDtypeStruct(shape, np.dtype("bfloat16")))
    q, k = (jax.ShapeDtypeStruct((2, 1024, heads, d), np.dtype("bfloat16")) for heads in (4, 2))
    spec = AttentionSpec.of(q, k, k, mask=masks.Causal(), **more)
    for default in (defaults.default_forward, defaults.default_backward):
        assert default(spec, device.H100) == default(bias.hiding(spec), device.H100)


@dataclasses.dataclass(frozen=True)
class Asked(masks.Mask):
    """A window that is asked about intervals of positions that are not empty, or raises; both on the host."""

    window: int
    q_len: int

    def keep(self, q_pos, kv_pos):
        return masks.Window(self.window, 0).keep(q_pos, kv_pos)

    def kv_bounds(self, q_lo, q_hi):
        assert np.all((q_lo >= 0) & (q_lo < q_hi) & (q_lo < self.q_len)), f"asked about the queries [{q_lo}, {q_hi})"
        return masks.Window(self.window, 0).kv_bounds(q_lo, q_hi)

    def q_bounds(self, kv_lo, kv_hi):
        assert np.all((kv_lo >= 0) & (kv_lo < kv_hi)), f"asked about the keys [{kv_lo}, {kv_hi})"
        return masks.Window(self.window, 0).q_bounds(kv_lo, kv_hi)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("d", (64, 96, 128, 256))
@pytest.mark.parametrize("length", (1, 63, 64, 65, 129, 200, 257, 1025))
def test_masks_are_asked_about_intervals_that_are_not_empty(length, d, deterministic):
    """Regression: of 65 queries in a tile of 128, those of the second warpgroup were [128, 65)."""
    spec = dataclasses.replace(make_spec(length, length, Asked(40, length), d=d), deterministic=deterministic)
    for schedule in (defaults.default_forward(spec, device.H100), *SCHEDULES):
        work.steps(spec, schedule)
        work.forward_table(spec, schedule)
    chosen = defaults.default_backward(spec, device.H100)
    assert rules.reasons_against(spec, chosen, H100_SMEM) == []
    work.kv_work(spec, chosen.kv)
    work.may_have_idle_queries(spec)
    if chosen.dq is not None:
        work.dq_work(spec, chosen.dq)


def has_order(spec, schedule):
    """`work.has_order`, one key tile after the other."""
    mask, tiles_of = work.worst_case(spec, schedule), [set() for _ in range(-(-spec.q_len // schedule.block_q))]
    for kv_tile in range(-(-spec.kv_len // schedule.block_kv)):
        start, _, _, stop = work.q_range(mask, spec, schedule, kv_tile)
        for q_tile in range(start, stop):
            tiles_of[q_tile].add(kv_tile)
    wanted = (work.kv_range(mask, spec, schedule, q_tile) for q_tile in range(len(tiles_of)))
    return all(found and found == set(range(start, stop)) for found, (start, _, _, stop) in zip(tiles_of, wanted))


@pytest.mark.parametrize("mask", [*MASKS, masks.PrefixLM(33) & masks.Window(20, 5)], ids=str)
def test_has_order(mask):
    for (q_len, kv_len), schedule in itertools.product(SHAPES, (
            KvSchedule(), KvSchedule(block_q=128, warpgroups=3))):
        spec = make_spec(q_len, kv_len, mask)
        assert work.has_order(spec, schedule) == has_order(spec, schedule), f"{spec}"


def test_has_order_takes_no_time_in_long_sequences():
    """Regression: it was quadratic in the number of tiles, 3.7 s for these."""
    spec, start = make_spec(1 << 22, 1 << 22, masks.Full(), d=128, batch=1, heads=(1, 1)), time.process_time()
    assert work.has_order(spec, KvSchedule())
    assert time.process_time() - start < 1


def test_rows_past_the_end_change_no_schedule():
    """They walk with the last real rows, so that nothing is compiled for them alone."""
    for mask in MASKS:
        real, tail = (work.steps(make_spec(n, 300, mask), dataclasses.replace(SMALL, warpgroups=3))
                      for n in (192, 180))
        assert real == tail


@pytest.mark.parametrize("d", range(8, 257, 8))
@pytest.mark.parametrize("d_v", (8, 64, 72, 128, 192, 256))
def test_default_is_legal(d, d_v):
    spec = make_spec(1000, 1000, d=d, d_v=d_v)
    assert rules.reasons_against(spec, defaults.default_forward(spec, device.H100), H100_SMEM) == []


@pytest.mark.parametrize(("change", "reason"), [
    (dict(block_kv=40), "multiple of 16"), (dict(warpgroups=4), "1, 2 or 3"), (dict(num_stages=0), "positive"),
    (dict(num_stages=8), "bytes of shared memory"), (dict(block_kv=256), "registers")])
def test_illegal_schedules_say_why(change, reason):
    spec = make_spec(1000, 1000, d=128)
    schedule = dataclasses.replace(defaults.default_forward(spec, device.H100), **change)
    assert any(reason in against for against in rules.reasons_against(spec, schedule, H100_SMEM))


@pytest.mark.parametrize(("length", "mask", "mebibytes"), [
    (512, masks.Causal(), 16), (1024, masks.Causal(), 16), (2048, masks.Causal(), 32), (2048, masks.Window(511, 0), 32),
    (2048, masks.Full(), 16), (2100, masks.Full(), 32)])
@pytest.mark.parametrize("d", (64, 128, 256))
def test_sections_are_small_where_little_is_shared_or_all(d, length, mask, mebibytes):
    assert defaults.default_forward(make_spec(length, length, mask, d=d), device.H100).section_bytes == mebibytes << 20


@pytest.mark.parametrize(("d", "d_v", "block_kv", "maxima"), [
    (64, 64, 128, 2), (128, 128, 128, 2), (192, 128, 128, 2), (136, 40, 128, 2), (192, 192, 96, 0), (128, 192, 96, 0),
    (256, 256, 64, 0)])
def test_wide_heads_have_smaller_key_tiles(d, d_v, block_kv, maxima):
    schedule = defaults.default_forward(make_spec(2048, 2048, d=d, d_v=d_v), device.H100)
    assert (schedule.block_kv, schedule.maxima) == (block_kv, maxima)


def test_sections_of_queries_that_all_meet_the_same_keys_are_small():
    assert defaults.default_forward(make_spec(100, 2048, masks.Causal(1900)), device.H100).section_bytes == 16 << 20
    assert defaults.default_forward(make_spec(1000, 2048, masks.Causal(1048)), device.H100).section_bytes == 32 << 20


@pytest.mark.parametrize("changed", [
    {}, dict(softcap=None), dict(softcap=60.0), dict(bias=jax.ShapeDtypeStruct((1, 2, 64, 64), np.float32)),
    dict(score=lambda s, batch, head, q_pos, kv_pos: s), dict(dtype=np.float16)],
    ids=lambda x: ", ".join(x) or "as it is")
def test_scores_without_a_maximum_are_between_bounds(changed):
    """A larger weight would be infinite in float16, a smaller one 0 in either type."""
    options = dict(dtype=np.dtype("bfloat16"), softcap=50.0) | changed
    x = jax.ShapeDtypeStruct((1, 64, 2, 64), options.pop("dtype"))
    spec = AttentionSpec.of(x, x, x, **options)
    schedule = dataclasses.replace(defaults.default_forward(spec, device.H100), bounded=True, maxima=0)
    against = rules.reasons_against(spec, schedule, H100_SMEM)
    assert any("s.bounded=True needs" in reason for reason in against) == bool(changed)
    assert any("s.bounded=True needs" in reason for reason in rules.reasons_against(
        spec, dataclasses.replace(schedule, maxima=4), H100_SMEM))


def assert_smem_bytes(described, smem_bytes):
    """Shared memory as described is what the kernel allocates, and `smem_bytes` adds it up."""
    smem, bars = scratch.allocate(described)
    assert len(smem) == len(described.buffers) and len(bars) == len(described.barriers), "a name is there twice"
    data = sum(math.ceil(math.prod(x.shape) * x.dtype.itemsize / 1024) * 1024 for x in smem.values())
    barriers = 8 * sum(math.prod(bar.num_barriers) for bar in bars.values())
    assert data + barriers <= smem_bytes < data + barriers + 1024


@pytest.mark.parametrize("change", [
    {}, dict(maxima=2), dict(query_buffers=1, out_chunks=0), dict(out_chunks=1, num_stages=1), dict(block_kv=48)])
@pytest.mark.parametrize("d", (40, 64, 128, 192, 256))
def test_smem_bytes_is_what_the_forward_allocates(d, change):
    spec = make_spec(500, 500, d=d, d_v=min(d, 128))
    schedule = dataclasses.replace(defaults.default_forward(spec, device.H100), **change)
    assert_smem_bytes(memory.forward_memory(spec, schedule), memory.smem_bytes(spec, schedule))


@pytest.mark.parametrize(("d", "schedule", "described"), [
    (128, KvSchedule(), memory.kv_memory), (64, KvSchedule(dq="own", dq_slots=3), memory.kv_memory),
    (256, SplitSchedule(p_slots=4), memory.split_memory), (96, DqSchedule(k_stages=3), memory.dq_memory)],
    ids=lambda x: getattr(x, "__name__", str(x)))
def test_smem_bytes_is_what_the_backward_allocates(d, schedule, described):
    spec = make_spec(500, 500, d=d)
    assert_smem_bytes(described(spec, schedule), memory.smem_bytes(spec, schedule))
