"""Masks of classes that the Hopper kernels do not know, which hold arrays: what they become, the kernels in Pallas'
interpreter, and what is refused.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_flash as pf
from hopper import test_scores
from pallas_flash import Causal, InBounds, Mask, SegmentIds, Window, autodiff, device, masks, scores
from pallas_flash.kernels.hopper import calls, defaults, support
from pallas_flash.kernels.mosaic import mask_score, traced
from pallas_flash.testing import conformance, inputs
from pallas_flash.testing.problems import Problem

Q_LEN, KV_LEN = 40, 80


@dataclasses.dataclass(frozen=True)
class Groups(Mask):
    """Keys of a group, of each query, that come at most `reach` of it later."""

    position_axes: ClassVar = {"q_groups": ("q",), "kv_groups": ("kv",)}

    q_groups: Any  # (batch, heads, q_len)
    kv_groups: Any
    reach: Any  # () or (batch,) or (batch, heads)

    def keep(self, q_pos, kv_pos):
        q_groups, kv_groups = jnp.asarray(self.q_groups), jnp.asarray(self.kv_groups)
        return (q_groups[q_pos] == kv_groups[kv_pos]) & (kv_pos <= q_pos + self.reach)


@dataclasses.dataclass(frozen=True)
class Strided(Mask):
    """Every n-th key: a class of its own without arrays."""

    n: int

    def keep(self, q_pos, kv_pos):
        return (kv_pos - q_pos) % self.n == 0


@dataclasses.dataclass(frozen=True)
class Sorted(Mask):
    """Cannot run in a kernel."""

    position_axes: ClassVar = {"ids": ("kv",)}

    ids: Any

    def keep(self, q_pos, kv_pos):
        return jnp.sort(jnp.asarray(self.ids))[kv_pos] > jnp.searchsorted(jnp.asarray(self.ids), q_pos)


@dataclasses.dataclass(frozen=True)
class OfTiles(Mask):
    """Wants arrays of positions, not one pair."""

    length: Any

    def keep(self, q_pos, kv_pos):
        assert kv_pos.ndim > 0
        return kv_pos < jnp.asarray(self.length)


def groups(length, shift=0):
    return (np.arange(length, dtype=np.int32) // 7 + shift) % 3


MINE = Groups(groups(Q_LEN)[None], np.stack([groups(KV_LEN), groups(KV_LEN, 1)])[None], np.int32(30))


def problem_of(name, **options):
    fields = dict(batch=1, q_heads=2, kv_heads=1, q_len=Q_LEN, kv_len=KV_LEN, d=64, d_v=64, dtypes=("bfloat16",))
    return Problem(name, "masks of other classes", **(fields | options))


CASES = {
    "alone": dict(mask=MINE),
    # Rows without keys, and a class without arrays beside arrays.
    "beside-others": dict(mask=Strided(3) & Causal(offset=-5) & InBounds(kv_len=np.array([33], np.int32))),
    "with-a-score": dict(mask=MINE & Window(left=60, right=20), score=pf.ALiBi(np.array([0.3, 0.1], np.float32))),
}


def run_interpreted(spec, given, cotangents):
    """out, the statistics, and the gradients of q, k and v, as `calls` has them but for schedules."""
    inner, operands = mask_score.as_score(spec, given)
    assert inner == mask_score.hiding(spec) and mask_score.hiding(inner) == inner
    return test_scores.run_interpreted(inner, operands, cotangents)


@pytest.mark.interpreted
@pytest.mark.parametrize("name", CASES)
def test_kernels_agree_with_the_oracle(name):
    """With what the mask hides from all poisoned, where that is so."""
    problem = problem_of(name, **CASES[name])
    operands, (dout, dlse) = conformance.random_case(problem, "bfloat16")
    budget, spec = conformance.budget(problem, "bfloat16", operands, (dout, dlse)), problem.spec()
    assert support.why_not(spec, device.H100) == []
    given = jax.tree.map(jnp.asarray, inputs.poisoned(spec, operands))
    dstats = jnp.stack([jnp.asarray(dlse), jnp.zeros_like(dlse)], axis=2)
    out, stats, dq, dk, dv = run_interpreted(spec, given, (jnp.asarray(dout), dstats))
    found = dict(out=out, dq=dq, dk=dk, dv=dv, lse=autodiff.natural_lse(spec, given, stats))
    used = budget.used(budget.baseline._replace(**found))
    assert max(used.values()) <= 1, used


def test_what_they_become():
    spec = problem_of("mask", mask=MINE & Causal() & SegmentIds(groups(Q_LEN), groups(KV_LEN))).spec()
    inner = mask_score.hiding(spec)
    assert [type(part) for part in inner.mask.parts] == [masks.Window, SegmentIds]
    assert inner.score.function is None and [type(part) for part in inner.score.mask.parts] == [Groups]
    assert traced.is_additive(inner.score)  # the fused kernel keeps P alone
    with_score = mask_score.hiding(problem_of("both", mask=MINE, score=pf.ALiBi(np.ones(2, np.float32))).spec())
    assert isinstance(with_score.score.function, pf.ALiBi) and with_score.mask == masks.Full()
    alone = problem_of("static", mask=Strided(3)).spec()
    assert mask_score.hiding(alone) == alone  # compiled in


def test_a_pair_is_hidden_as_the_mask_says():
    """Every pair of a head, of masks that differ between heads; and the score of the others stays."""
    mask = MINE.canonical()
    score = mask_score.Masked(jax.tree.map(jnp.asarray, mask), None)
    place = scores.tile(1, 2, jnp.arange(Q_LEN, dtype=jnp.int32), jnp.arange(KV_LEN, dtype=jnp.int32))
    s = jnp.ones((1, 2, Q_LEN, KV_LEN), jnp.float32)
    value, slope = jax.jit(lambda s: jax.jvp(lambda s: score.on_tile(s, place), (s,), (jnp.ones_like(s),)))(s)
    positions = np.arange(Q_LEN)[:, None], np.arange(KV_LEN)[None]
    keep = masks.over_batch(mask, lambda part: part.keep(*positions))
    np.testing.assert_array_equal(value, np.where(np.broadcast_to(keep, s.shape), 1, -np.inf))
    np.testing.assert_array_equal(slope, 1)


def reasons(**options):
    return support.why_not(problem_of("refused", **options).spec(), device.H100)


def test_what_is_refused_says_what_to_do():
    refused, = reasons(mask=Sorted(np.arange(KV_LEN, dtype=np.int32)))
    assert "Sorted" in refused and "Dense" in refused
    refused, = reasons(mask=OfTiles(np.array([33], np.int32)))  # whatever it raises, others run it
    assert "keep must work on one pair, AssertionError" in refused
    refused, = reasons(mask=MINE, bias=(1, 1, 1, KV_LEN))
    assert "Groups" in refused and "beside" in refused
    refused, = reasons(mask=MINE, d=264, d_v=264)
    assert "mask class of your own" in refused


def test_an_automatic_choice_waits_for_a_gpu_and_the_name_gets_it():
    q, k = (jax.ShapeDtypeStruct((1, n, 2, 64), jnp.bfloat16) for n in (Q_LEN, KV_LEN))
    say = functools.partial(pf.explain, q, k, k, mask=MINE, device=device.H200)
    assert "a mask class of your own with or beside arrays has not been measured" in say()
    no_arrays = say(mask=Strided(3), score=pf.ALiBi(np.ones(2, np.float32)))
    assert "with or beside arrays has not been measured" in no_arrays
    named = say(implementation="hopper")
    assert "forward" in named and not named.startswith("UnsupportedError")
    spec = problem_of("own", mask=MINE).spec()
    assert defaults.default_forward(spec, device.H200) == defaults.default_forward(
        mask_score.hiding(spec), device.H200)
    assert calls.passes(spec, device.H200) is None  # another runtime cannot make its arrays
