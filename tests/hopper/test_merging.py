"""Parts of a problem whose results the kernels merge, on a CPU in Pallas' GPU interpreter: against the parts' own
results, merged by XLA.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # where the interpreter says whether it saw a race

from pallas_flash import device, masks, softmax
from pallas_flash.kernels.hopper import defaults, launches, merging, work
from pallas_flash.kernels.hopper.schedule import BackwardSchedule
from pallas_flash.kernels.mosaic.interpret import interpreted
from pallas_flash.spec import AttentionSpec, Results

pytestmark = pytest.mark.interpreted
CHUNK = 128  # positions


def part_of(whole, batch, chunks=1, mask=None):
    return dataclasses.replace(whole, batch=batch, q_len=chunks * CHUNK, kv_len=chunks * CHUNK,
                               mask=mask or masks.Full(), partial=True)


def problem(d):
    """A device's queries and keys, in two chunks, as operands and dout."""
    rng = np.random.default_rng(0)
    shapes = ((1, 2 * CHUNK, heads, d) for heads in (2, 1, 1, 2))
    q, k, v, dout = (jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16) for shape in shapes)
    return AttentionSpec.of(q, k, v), (q, k, v, dout)


BOTH_CHUNKS = ((0, 0, 0), (1, 0, 1))
LATE_QUERIES_TWICE = ((1, 0, 1), (1, 1, 2))
"""Chunks of queries and of keys, and of the state, as the steps of a causal ring have them."""


def places(pairs):
    return jnp.array([(0, *(CHUNK * chunk for chunk in (q, k, state))) for q, k, state in pairs], jnp.int32)


def rows(x, chunk, axis=1):
    return jax.lax.slice_in_dim(x, chunk * CHUNK, (chunk + 1) * CHUNK, axis=axis)


def run(build, *arrays):
    """A pass over arrays, whose shapes it is built for."""
    return build(tuple(x.shape for x in arrays))(*arrays)


@pytest.fixture
def two_blocks(monkeypatch):
    """The H100's schedules, with two blocks; a tile of three warpgroups, of which the last has no rows."""
    usual = defaults.default_forward
    monkeypatch.setattr(defaults, "default_forward",
                        lambda spec, where: dataclasses.replace(usual(spec, where), num_blocks=2))
    with device.assume(device.H100):
        yield


def start(seed, chunks):
    """A state of so many chunks, of which the last is empty."""
    rng = np.random.default_rng(seed)
    out = jnp.asarray(rng.standard_normal((1, chunks * CHUNK, 2, 64), np.float32))
    lse = jnp.asarray(rng.standard_normal((1, 2, chunks * CHUNK), np.float32) + 4)
    lse = lse.at[:, :, (chunks - 1) * CHUNK:].set(-jnp.inf)
    return Results(out, jnp.stack([lse, jnp.zeros_like(lse)], axis=2))


def of_scores(stats, unit):
    """What statistics say together, in float64: lse / unit."""
    lse, rest = (np.asarray(x, np.float64) for x in (softmax.reference_point(stats[:, :, 0], unit), stats[:, :, 1]))
    return lse + rest


def check_merged(found, state, partial, unit, rounding=2e-6):
    """`found` is the state merged with the results of a part, of the same rows. Where the maximum of the state is
    larger, weights are rounded in another way: out is off by a rounding of them.
    """
    stats, old, new = softmax.merge(state.stats, partial.stats, unit)
    over_dims = lambda share: share.swapaxes(1, 2)[..., None]
    np.testing.assert_allclose(found.out, state.out * over_dims(old) + partial.out * over_dims(new), rtol=0,
                               atol=max(rounding, 2**-9))
    np.testing.assert_allclose(found.stats[:, :, 0], stats[:, :, 0], rtol=0, atol=rounding)
    np.testing.assert_allclose(of_scores(found.stats, unit) * unit, of_scores(stats, unit) * unit, rtol=0,
                               atol=rounding)


def test_forward_merges_as_xla_does(two_blocks):
    whole, (q, k, v, _), pairs = *problem(64), LATE_QUERIES_TWICE
    part, schedule = part_of(whole, 2), defaults.default_forward(part_of(whole, 2), device.H100)
    state = start(1, 3)
    stacked = [jnp.concatenate([rows(x, pair[i]) for pair in pairs]) for x, i in ((q, 0), (k, 1), (v, 1))]
    with interpreted(detect_races=True):
        found = Results(*run(functools.partial(merging.forward_pass, part, schedule), q, k, v, places(pairs), *state))
        jax.block_until_ready(found)
    assert not gpu_callbacks.get_races().races_found
    with interpreted():
        partial = Results(*launches.forward(part, schedule)(*stacked))
    for x, (_, _, chunk) in enumerate(pairs):
        at = Results(rows(state.out, chunk), rows(state.stats, chunk, 3))
        check_merged(Results(rows(found.out, chunk), rows(found.stats, chunk, 3)), at,
                     Results(partial.out[x:x + 1], partial.stats[x:x + 1]), whole.scale)
    np.testing.assert_array_equal(rows(found.out, 0), rows(state.out, 0))
    np.testing.assert_array_equal(rows(found.stats, 0, 3), rows(state.stats, 0, 3))


def test_the_first_part_makes_the_state(two_blocks):
    """And what goes on from it does not read rows that no part has written, which may hold anything."""
    whole, (q, k, v, _) = problem(64)
    part = part_of(whole, 1)
    schedule = defaults.default_forward(part, device.H100)
    first, after = (functools.partial(build, part, schedule) for build in (merging.first_part_pass,
                                                                           merging.forward_pass))
    empty = start(1, 3).stats.at[:, :, 0].set(-jnp.inf)
    with interpreted(detect_races=True):
        state = Results(*run(first, q, k, v, places([(0, 0, 0)]), empty))
        jax.block_until_ready(state)
        assert not gpu_callbacks.get_races().races_found
        lost = state._replace(out=state.out.at[:, CHUNK:].set(jnp.nan))
        found = Results(*run(after, q, k, v, places([(1, 0, 2)]), *lost))
        jax.block_until_ready(found)
    assert not gpu_callbacks.get_races().races_found
    with interpreted():
        expected = [launches.forward(part, schedule)(rows(q, chunk), rows(k, 0), rows(v, 0)) for chunk in (0, 1)]
    for (out, stats), chunk in zip(expected, (0, 2), strict=True):
        np.testing.assert_array_equal(rows(found.out, chunk), out)
        np.testing.assert_allclose(rows(found.stats, chunk, 3), stats, rtol=0, atol=2e-6)
    np.testing.assert_array_equal(rows(found.stats, 1, 3), rows(empty, 1, 3))


@pytest.mark.parametrize("scale", [None, 1e9], ids=["one-warpgroup", "repaired"])
def test_a_tile_that_is_done_again_is_merged_once(scale):
    """Of two warpgroups one gives the tile up: the other must not merge its rows a second time. With huge scores both
    do, and recompute their rows from keys that do not begin where the arrays do."""
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((1, length, 1, 64), np.float32) for length in (CHUNK, CHUNK + 768, CHUNK + 768))
    if scale is None:
        q[..., 0], k[..., 0] = 0, -300
        q[:, :CHUNK // 2, :, 0] = 8
        k[:, CHUNK + 150, :, 0] = -180
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    own = q, k[:, CHUNK:], v[:, CHUNK:]
    part = AttentionSpec.of(*own, scale=scale, partial=True)
    schedule = dataclasses.replace(defaults.default_forward(part, device.H100), warpgroups=2, block_kv=64, maxima=4,
                                   num_blocks=1)
    state = start(3, 2)
    state = Results(state.out[:, :CHUNK, :1], state.stats[:, :1, :, :CHUNK])
    with interpreted():
        partial = Results(*launches.forward(part, schedule)(*own))
        found = Results(*run(functools.partial(merging.forward_pass, part, schedule), q, k, v, places([(0, 1, 0)]),
                             *state))
    assert np.isfinite(partial.stats).all()
    if scale is not None:  # its lse is far from that of the state
        np.testing.assert_array_equal(found.out, jnp.where(partial.stats[:, 0, 0, :, None, None] > 0, partial.out,
                                                           state.out))
        return
    first, other = ([Results(x.out[:, own], x.stats[..., own]) for x in (found, state, partial)]
                    for own in (slice(CHUNK // 2), slice(CHUNK // 2, CHUNK)))
    check_merged(*first, part.scale)
    check_merged(*other, part.scale, rounding=1e-3)  # the two walks round weights in another way


def test_warpgroups_without_rows_pass_their_steps_by_and_merge_nothing(two_blocks):
    """Of six warpgroups two have no rows, and take one of two steps: behind those rows lie others, of no part."""
    whole, (q, k, v, _) = problem(64)
    part = part_of(whole, 1, chunks=2, mask=masks.Causal())
    schedule, state = defaults.default_forward(part, device.H100), start(5, 4)
    assert work.idle_stop_early(part, schedule) and work.steps(part, schedule).skips_below
    own = [jnp.array([(0, 0, 0, CHUNK)], jnp.int32)]
    with interpreted(detect_races=True):
        found = Results(*run(functools.partial(merging.forward_pass, part, schedule), q, k, v, *own, *state))
        jax.block_until_ready(found)
    assert not gpu_callbacks.get_races().races_found
    with interpreted():
        partial = Results(*launches.forward(part, schedule)(q, k, v))
    merged = slice(CHUNK, 3 * CHUNK)
    check_merged(*(Results(x.out[:, merged], x.stats[..., merged]) for x in (found, state)), partial, whole.scale)
    for kept in (slice(CHUNK), slice(3 * CHUNK, None)):
        np.testing.assert_array_equal(found.out[:, kept], state.out[:, kept])
        np.testing.assert_array_equal(found.stats[..., kept], state.stats[..., kept])


@pytest.mark.parametrize("mask", [masks.Full(), masks.Causal()], ids=str)
def test_backward_adds_to_the_same_sums(mask):
    """With a mask keys are held in registers, and dS is mended behind its rounding."""
    whole, (q, k, v, dout) = problem(64)
    rng = np.random.default_rng(4)
    stats, dstats = (jnp.asarray(np.stack([rng.standard_normal((1, 2, 2 * CHUNK)) + shift,
                                           np.zeros((1, 2, 2 * CHUNK))], axis=2), jnp.float32) for shift in (8, 0))
    part = part_of(whole, 2, mask=mask)
    schedule, pairs = defaults.default_parts(part, device.H100), BOTH_CHUNKS
    assert schedule is not None and schedule.together and bool(schedule.held) == isinstance(mask, masks.Window)
    stacked = [jnp.concatenate([rows(x, pair[i]) for pair in pairs]) for x, i in ((q, 0), (k, 1), (v, 1), (dout, 0))]
    saved = [jnp.concatenate([rows(x, q_chunk, 3) for q_chunk, *_ in pairs]) for x in (stats, dstats)]
    of_all = dataclasses.replace(whole, partial=True)
    with interpreted():
        dq, dk, dv = launches.backward(part, BackwardSchedule(schedule))(*stacked[:3], saved[0], stacked[3], saved[1])
        statistics, sums = merging.first_pass(of_all, schedule)(stats, dstats)
        for _ in range(2):  # twice: sums are added to
            found_dk, found_dv, sums = run(functools.partial(merging.backward_pass, part, schedule), q, k, v, dout,
                                           statistics, places(pairs), sums)
        found_dq, = merging.last_pass(of_all, schedule)(sums)
    np.testing.assert_array_equal(found_dk, dk)
    np.testing.assert_array_equal(found_dv, dv)
    np.testing.assert_allclose(found_dq, 2 * jnp.concatenate([dq[:1], dq[1:]], axis=1), rtol=1e-6, atol=1e-6)
