"""The forward's counter of tiles on a GPU: more tiles than blocks, calls one after another, and calls that share what
is made of the mask.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_flash import Causal, InBounds, SegmentIds, flash_attention

pytestmark = pytest.mark.gpu

BATCH, LENGTH, HEADS, KEY_HEADS, D = 2, 2048, 16, 4, 128


def documents(*lengths):
    return np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)


IDS = np.stack([documents(700, 1, 300, 1047), documents(64, 1984)])
SHUFFLED = np.random.default_rng(0).integers(-1, 4, (BATCH, LENGTH // 64)).astype(np.int32).repeat(64, axis=1)
MASKS = {"documents": lambda ids: Causal() & SegmentIds(ids, ids),
         "any": lambda ids: SegmentIds(SHUFFLED + ids, SHUFFLED),
         "lengths": lambda ids: Causal() & InBounds(kv_len=ids[:, 0] + jnp.array([2048, 0], jnp.int32))}


@functools.cache
def operands():
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal((BATCH, LENGTH, heads, D), np.float32) for heads in (HEADS, KEY_HEADS, KEY_HEADS))


def attend(name, ids, factor=1, implementation="hopper"):
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in operands())
    return flash_attention(q * factor, k, v, mask=MASKS[name](ids), return_lse=True, implementation=implementation)


@pytest.mark.parametrize("name", MASKS)
def test_tiles_are_taken_once_in_every_call(name):
    """512 tiles for 132 blocks. Results do not depend on which block takes a tile: they are equal bit by bit."""
    ids = jnp.asarray(IDS if name == "documents" else np.zeros_like(IDS))
    wanted = jax.jit(functools.partial(attend, name, implementation="xla"))(ids)
    call = jax.jit(functools.partial(attend, name))
    found = [call(ids) for _ in range(3)]
    for x, tolerance, given in zip(wanted, (2e-2, 2e-3), found[0], strict=True):
        np.testing.assert_allclose(np.asarray(given, np.float32), np.asarray(x, np.float32), atol=tolerance)
    for again in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(found[0], again, strict=True))


def test_calls_that_share_the_ranges_of_tiles():
    """XLA makes them once for both, and copies them for one: each call has to find its counter at 0."""
    ids, factors = jnp.asarray(IDS), (1, -1)
    both = jax.jit(lambda ids: [attend("documents", ids, factor) for factor in factors])(ids)
    for found, factor in zip(both, factors, strict=True):
        alone = jax.jit(functools.partial(attend, "documents", factor=factor))(ids)
        assert all(np.array_equal(a, b) for a, b in zip(found, alone, strict=True))
