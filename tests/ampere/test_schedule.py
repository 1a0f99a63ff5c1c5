"""Which schedule a spec gets on which GPU, which are legal, and what the kernels refuse: decided without a GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_flash import Causal, Full, InBounds, SegmentIds, Window, device, dispatch
from pallas_flash.kernels.ampere import defaults, memory, rules, support, work
from pallas_flash.kernels.ampere.schedule import BackwardSchedule, ForwardSchedule
from pallas_flash.kernels.mosaic.walk import Descending
from pallas_flash.spec import AttentionSpec
from pallas_flash.testing import problems

GPUS = [device.A100, device.L4, device.RTX_4090, device.H200, device.B200, device.RTX_5090]
DIMS = [(8, 8), (64, 64), (96, 96), (128, 128), (64, 128), (192, 128), (256, 64), (64, 256), (160, 160), (168, 160),
        (256, 256)]


def spec_of(d, d_v=None, length=4096, dtype=jnp.bfloat16, **options):
    shape = lambda dim: jax.ShapeDtypeStruct((2, length, 4, dim), dtype)
    return AttentionSpec.of(shape(d), shape(d), shape(d_v or d), **dict(mask=Causal()) | options)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
def test_defaults_are_legal_everywhere(gpu, dims, deterministic):
    spec = spec_of(*dims, deterministic=deterministic)
    assert support.why_not(spec, gpu) == []
    for schedule in (defaults.default_forward(spec, gpu), defaults.default_backward(spec, gpu)):
        assert rules.reasons_against(spec, schedule, gpu.smem_bytes) == []
        assert schedule.num_sms == gpu.num_sms


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_the_catalogue_has_legal_schedules(gpu):
    """Every call that the kernels take gets them where they are named, and `explain` says so."""
    taken = 0
    for problem in problems.CONFORMANCE:
        for dtype in set(problem.dtypes) & {"bfloat16", "float16"}:
            spec = problem.spec(dtype)
            if support.why_not(spec, gpu):
                continue
            taken += 1
            assert "implementation='ampere'" in dispatch.explain(spec, gpu, "ampere"), problem.name
            for schedule in (defaults.default_forward(spec, gpu), defaults.default_backward(spec, gpu)):
                assert rules.reasons_against(spec, schedule, gpu.smem_bytes) == [], problem.name
    assert taken > 100


@pytest.mark.parametrize(("gpu", "d", "forward", "backward"), [
    (device.A100, 64, 2, 2), (device.A100, 128, 2, 1), (device.RTX_4090, 64, 2, 2), (device.RTX_4090, 128, 2, 1),
    (device.H200, 64, 2, 2), (device.H200, 128, 2, 1)], ids=str)
def test_as_many_blocks_share_an_sm_as_registers_allow(gpu, d, forward, backward):
    """Blocks of 128 threads with 255 registers: two; of 256: one."""
    spec = spec_of(d)
    sharing = lambda s: (gpu.smem_bytes + 1024) // (memory.smem_bytes(spec, s) + 1024 + 128)
    assert sharing(defaults.default_forward(spec, gpu)) >= forward
    assert sharing(defaults.default_backward(spec, gpu)) >= backward


@pytest.mark.parametrize(("schedule", "reason"), [
    (ForwardSchedule(block_kv=24), "s.block_kv=24 must be a multiple of 16"),
    (ForwardSchedule(row_tiles=3), "s.row_tiles=3 must be 1 or 2"),
    (ForwardSchedule(block_kv=128), "scores and accumulator need 256 registers a thread of 255"),
    (BackwardSchedule(), "dk, dv and scores need 320 registers a thread of 255"),
    (BackwardSchedule(row_tiles=1, block_q=128), "s.block_q=128 must be 32 or 64"),
    (BackwardSchedule(row_tiles=1, part_q=48), "s.part_q=48 must be a multiple of 16 that divides s.block_q=64"),
    (BackwardSchedule(row_tiles=1, num_stages=3), "s.num_stages=3 must be 1 or 2"),
    (BackwardSchedule(row_tiles=1, warpgroups=2, split=True), "s.split=True needs two kernels, two warpgroups and one"),
    (BackwardSchedule(one_waits=True), "s.one_waits=True needs s.ordered=False to be True: else none waits"),
    (BackwardSchedule(halves=True), "s.halves=True needs two warpgroups and tiles of 64 queries in two parts, "),
    (ForwardSchedule(num_stages=3), "s.num_stages=3 must be 1 or 2"),
    (BackwardSchedule(row_tiles=1, warpgroups=2), "needs 148480 bytes of shared memory, there are 101376"),
])
def test_reasons_against_a_schedule(schedule, reason):
    assert any(text.startswith(reason) for text in rules.reasons_against(spec_of(128), schedule, 101_376))


def test_assumed_schedules_are_the_defaults_of_their_pass():
    spec, assumed = spec_of(64), BackwardSchedule(block_q=32)
    with defaults.assume(assumed):
        assert defaults.default_backward(spec, device.A100) is assumed
        assert defaults.default_forward(spec, device.A100) == ForwardSchedule(
            num_stages=2, held=True, peeled=True, out_in_rows=True, num_sms=108)
    assert defaults.default_backward(spec, device.A100) != assumed


IDS = SegmentIds(*[np.ones(4096, np.int32)] * 2)


class Mine(Window):
    """A mask of a class of the caller's."""


REFUSED = {
    "float32": (dict(dtype=jnp.float32), "needs bfloat16 or float16"),
    "wide": (dict(d=264), "needs head dimensions from 1 to 256 (a gradient of 64 keys is in registers)"),
    "own-mask-of-arrays": (dict(mask=InBounds(kv_len=np.array([1, 2])).canonical() & Mine()), "takes arrays in, and "),
    "two-ids": (dict(mask=IDS.canonical() & IDS.canonical()), "takes one SegmentIds, mask has 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    options, reason = REFUSED[name]
    reasons = support.why_not(spec_of(**dict(d=64) | options), device.A100)
    assert len(reasons) == 1 and reasons[0].startswith(reason)


def test_gpus_before_ampere_are_refused():
    turing = dataclasses.replace(device.A100, name="Tesla T4", capability=(7, 5))
    assert support.why_not(spec_of(64), turing) == ["needs compute capability 8.0 or higher, device has 7.5"]
    assert "device is 'cpu'" in support.why_not(spec_of(64), device.CPU)[0]


@pytest.mark.parametrize("mask", [Full(), Causal(), Causal(-1000), Window(300, 40), InBounds(900, 700)], ids=str)
@pytest.mark.parametrize("length", [1000, 1024])
def test_ranges_hold_every_pair_that_is_kept(mask, length):
    """What a tile leaves out keeps nothing, and what it does not mask keeps everything."""
    spec, tile = spec_of(64, length=length, mask=mask), np.arange(8)
    forward, backward = ForwardSchedule(), BackwardSchedule()
    kept = np.broadcast_to(mask.keep(*np.ogrid[:length, :length]), (length, length))
    for pairs, block, other, ranges in (
            (kept, forward.block_q, forward.block_kv, work.kv_range(spec, forward, tile)),
            (kept.T, backward.block_kv, backward.block_q, work.q_range(spec, backward, tile))):
        for i, bounds in enumerate(zip(*(np.broadcast_to(x, 8) for x in ranges), strict=True)):
            start, full_start, full_stop, stop = (other * int(x) for x in bounds)
            rows = pairs[block * i:block * (i + 1)]
            assert not rows[:, :start].any() and not rows[:, max(start, stop):].any()
            assert rows[:, full_start:full_stop].all()


@pytest.mark.parametrize("block_kv", [32, 64])
@pytest.mark.parametrize(("mask", "lengths", "known"), [
    (Causal(), (512, 512), True), (Causal(), (500, 500), True), (Causal(64), (512, 576), True),
    (Window(100, 0), (512, 512), True), (Window(100, 20), (512, 512), False),
    (Causal(-100), (500, 300), False), (Full(), (512, 512), False)], ids=str)
def test_tiles_that_all_blocks_meet_alike(mask, lengths, known, block_kv):
    """What is said of them holds for every pair."""
    q_len, kv_len = lengths
    shape = lambda length: jax.ShapeDtypeStruct((1, length, 1, 64), jnp.bfloat16)
    spec = AttentionSpec.of(shape(q_len), shape(kv_len), shape(kv_len), mask=mask)
    schedule = ForwardSchedule(block_kv=block_kv, peeled=True)
    found = work.last_tiles(spec, schedule)
    assert bool(found) == known
    kept = np.zeros((1024, 1024), bool)
    kept[:q_len, :kv_len] = mask.keep(*np.ogrid[:q_len, :kv_len])
    stops = work.kv_range(spec, schedule, np.arange(q_len // schedule.block_q)).stop
    for i, stop in enumerate(np.broadcast_to(stops, q_len // schedule.block_q)):
        for t, meets in enumerate(found):
            at = block_kv * (int(stop) - 1 - t)
            for j, kind in enumerate(meets):
                first = schedule.block_q * i + 64 * j
                part = kept[first:first + 64, at:at + block_kv]
                assert (not part.any(), part.all()) == (kind is work.Meets.NOT, kind is work.Meets.WHOLLY)


@pytest.mark.parametrize(("mask", "lengths"), [
    (Causal(), (500, 500)), (Causal(-70), (500, 300)), (Causal(200), (300, 500)), (Full(), (130, 300)),
    (Window(150, 20), (700, 700)), (Window(90, 10, -50), (500, 400))], ids=str)
@pytest.mark.parametrize("schedule", [
    BackwardSchedule(ordered=True), BackwardSchedule(ordered=True, block_q=32, row_tiles=1),
    BackwardSchedule(ordered=True, warpgroups=2, halves=True)], ids=["128-keys", "64-keys", "halves"])
def test_blocks_add_to_dq_in_the_order_in_which_they_start(mask, lengths, schedule):
    """So none waits for one that has not started, and each knows how many come before it."""
    q_len, kv_len = lengths
    shape = lambda length: jax.ShapeDtypeStruct((1, length, 2, 128), jnp.bfloat16)
    spec = AttentionSpec.of(shape(q_len), shape(kv_len), shape(kv_len), mask=mask, deterministic=True)
    assert work.has_order(spec, schedule)
    assert rules.reasons_against(spec, schedule, device.H200.smem_bytes) == [] or not schedule.halves
    found, added = work.kv_work(spec, schedule), {}
    for block in range(found.blocks):
        head, kv_tile = map(int, found.head_and_tile(block))
        start, _, _, stop = work.q_range(spec, schedule, np.array([kv_tile]))
        for q_tile in range(int(np.squeeze(start)), int(np.squeeze(stop))):
            assert work.additions_before(spec, schedule, q_tile, kv_tile) == added.get((head, q_tile), 0)
            added[head, q_tile] = added.get((head, q_tile), 0) + 1


@pytest.mark.parametrize("heads", [1, 3])
def test_an_ordered_block_walks_all_heads_of_a_group_at_each_tile_from_the_last(heads):
    """Regression: head by head, a block of few tiles waited at each head for blocks of many."""
    walk = Descending(6, heads, 2, 3, 4, 5)
    found = [walk.first]
    while len(found) < walk.steps:
        found.append(walk.next(*found[-1]))
    plain = lambda at: tuple(map(int, at))
    assert [*map(plain, found)] == [(head, tile) for tile in (4, 3, 2) for head in range(6, 6 + heads)]
    assert plain(walk.last) == plain(found[-1])
    assert [plain(walk.previous(*at)) for at in found[1:]] == [*map(plain, found[:-1])]


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_a_mask_of_arrays_has_no_order(gpu):
    """Then two kernels make the gradients; without arrays the fused form does, where there is one."""
    ids = np.arange(256)[None] // 50
    spec = spec_of(128, length=256, mask=Causal() & SegmentIds(ids, ids).canonical(), deterministic=True)
    reasons = rules.reasons_against(spec, BackwardSchedule(warpgroups=2, halves=True, ordered=True), 200_000)
    assert len(reasons) == 1 and "without arrays" in reasons[0]
    found, ordered = (defaults.default_backward(x, gpu) for x in (spec, dataclasses.replace(spec, mask=Causal())))
    assert found.dq is not None and not found.ordered
    assert ordered.dq is None and ordered.ordered
