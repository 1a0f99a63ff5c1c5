"""Random specs: the XLA kernels against the oracle, poison, and properties of masks, tiles and dropout.

The drawn examples are the same on every run; EXAMPLES=200 draws that many, new ones each time.
"""

import os

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from pallas_flash import dropout, masks, tiles
from pallas_flash.kernels.xla import schedule as xla_schedule
from pallas_flash.masks import Causal, Dense, Full, InBounds, PrefixLM, SegmentIds, Window
from pallas_flash.testing import conformance, inputs
from pallas_flash.testing.problems import DTYPES, Problem

EXAMPLES = int(os.environ.get("EXAMPLES", "0"))


def examples(count, shrink=True):
    """Settings of a property: `count` fixed examples, or EXAMPLES new ones. Shrinking compiles again at every step."""
    phases = [hypothesis.Phase.generate] + [hypothesis.Phase.shrink] * shrink
    return hypothesis.settings(max_examples=EXAMPLES or count, derandomize=not EXAMPLES, deadline=None, database=None,
                               phases=phases, suppress_health_check=list(hypothesis.HealthCheck))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Lengths up to 48 are up to 5 tiles."""
    monkeypatch.setattr(xla_schedule, "TARGET_BLOCK", 11)


def offsets():
    return st.integers(-20, 20)


@st.composite
def static_masks(draw):
    """A mask without arrays."""
    left = draw(st.one_of(st.just(masks.UNBOUNDED), st.integers(-5, 30)))
    right = draw(st.one_of(st.just(masks.UNBOUNDED), st.integers(-5, 30)))
    hypothesis.assume(right >= -left)
    return draw(st.sampled_from([
        Full(), Causal(draw(offsets())), Window(left, right, draw(offsets())), PrefixLM(draw(st.integers(0, 50))),
        InBounds(draw(st.integers(0, 50)), draw(st.integers(0, 50)))]))


@st.composite
def array_masks(draw, batch, heads, q_len, kv_len):
    """A mask that holds arrays, each one for all or one for each batch entry and head."""
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    lead = lambda: [int(rng.choice([1, size])) for size in (batch, heads)]
    numbers = lambda low, high: rng.integers(low, high, lead(), dtype=np.int32)
    ids = lambda length: np.sort(rng.integers(-1, 3, (*lead(), length), dtype=np.int32), axis=-1)
    broadcast = [draw(st.sampled_from([1, size])) for size in (batch, heads, q_len, kv_len)]
    return draw(st.sampled_from([
        Causal(numbers(-10, 10)), Window(numbers(0, 9), numbers(0, 9)), PrefixLM(numbers(0, kv_len + 2)),
        InBounds(numbers(0, q_len + 2), numbers(0, kv_len + 2)), SegmentIds(ids(q_len), ids(kv_len)),
        SegmentIds(rng.permuted(ids(q_len), axis=-1), rng.permuted(ids(kv_len), axis=-1)),
        Dense(rng.random(broadcast) < 0.6)]))


@st.composite
def problems(draw):
    """A small problem with any combination of features."""
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    q_len, kv_len = draw(st.integers(1, 48)), draw(st.integers(1, 48))
    heads, mask = kv_heads * group, draw(static_masks())
    if draw(st.booleans()):
        mask = mask & draw(array_masks(batch, heads, q_len, kv_len))
    bias = None
    if draw(st.booleans()):
        bias = tuple(draw(st.sampled_from([1, size])) for size in (batch, heads, q_len, kv_len))
    return Problem(
        "drawn", "hypothesis", batch=batch, q_heads=heads, kv_heads=kv_heads, q_len=q_len, kv_len=kv_len,
        d=draw(st.integers(1, 12)), d_v=draw(st.integers(1, 12)), layout=draw(st.sampled_from(["BLHD", "BHLD"])),
        mask=mask, bias=bias, bias_masks=draw(st.booleans()), deterministic=draw(st.booleans()),
        softcap=draw(st.sampled_from([None, None, 0.7, 5.0])),
        scale=draw(st.sampled_from([None, None, 0.0, -1.3, 2.0])),
        dropout_rate=draw(st.sampled_from([0.0, 0.0, 0.3, 1.0])))


@examples(14, shrink=False)
@hypothesis.given(problem=problems(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1000))
def test_any_spec_agrees_with_the_oracle_and_ignores_poison(problem, dtype, seed):
    hypothesis.note(f"{problem!r}")
    with jax.enable_x64(dtype == "float64"):
        operands, cotangents = conformance.random_case(problem, dtype, seed)
        budget = conformance.budget(problem, dtype, operands, cotangents)
        run = conformance.compiled(problem, "xla")
        found = run(operands, cotangents)
        used = budget.used(found)
        assert max(used.values()) <= 1, used
        poisoned = run(inputs.poisoned(problem.spec(dtype), operands), cotangents)
        assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(poisoned), strict=True))


@examples(300)
@hypothesis.given(parts=st.lists(static_masks(), min_size=1, max_size=3), q_len=st.integers(1, 30),
                  kv_len=st.integers(1, 30), block_q=st.integers(1, 9), block_kv=st.integers(1, 9))
def test_tiles_are_sound_for_any_intersection(parts, q_len, kv_len, block_q, block_kv):
    mask = parts[0]
    for part in parts[1:]:
        mask = mask & part
    mask = mask & InBounds(q_len, kv_len)
    q_pos, kv_pos = np.arange(q_len)[:, None], np.arange(-(-kv_len // block_kv) * block_kv)[None, :]
    keep = np.broadcast_to(mask.keep(q_pos, kv_pos), (q_len, kv_pos.size))
    for q_tile in range(-(-q_len // block_q)):
        lo, hi = tiles.interval(q_tile, block_q, q_len)
        start, full_start, full_stop, stop = map(int, tiles.kv_tiles(mask, (lo, hi), block_kv, kv_len))
        assert 0 <= start <= full_start <= full_stop <= stop <= -(-kv_len // block_kv)
        assert not keep[lo:hi, : start * block_kv].any()
        assert not keep[lo:hi, stop * block_kv:].any()
        assert keep[lo:hi, full_start * block_kv : full_stop * block_kv].all()
    assert tiles.attended_pairs(mask, q_len, kv_len) == keep[:, :kv_len].sum()


@examples(20)
@hypothesis.given(seed=st.integers(0, 2**32 - 1), batch=st.integers(0, 5), head=st.integers(0, 5),
                  q_lo=st.sampled_from([0, 5]), kv_lo=st.sampled_from([16, 47]), rate=st.sampled_from([0.01, 0.3, 0.9]))
def test_dropout_bits_do_not_depend_on_tiles(seed, batch, head, q_lo, kv_lo, rate):
    keep = jax.jit(dropout.keep, static_argnums=5)
    words, pos = np.array([seed, 7], np.uint32), np.arange(48, dtype=np.int32)
    whole = keep(words, batch, head, pos[:, None], pos[None, :], rate)
    tile = keep(words, batch, head, pos[q_lo:, None], pos[None, kv_lo:], rate)
    assert np.array_equal(tile, whole[q_lo:, kv_lo:])
    assert abs(float(whole.mean()) - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / whole.size)
