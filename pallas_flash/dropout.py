"""Dropout's random bits: a function of (seed, batch, head, query position, key position) and of nothing else.

So every implementation and every schedule drops the same entries, and the backward draws the forward's bits again. The
generator is Threefry-2x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): additions, rotations
and xors of 32-bit words only. 13 rounds pass BigCrush there; the key of a (batch, head) gets all 20.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array

__all__ = ["keep", "moved", "threefry_2x32"]

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA

Integers = int | np.ndarray | Array
Place = tuple[Integers, Integers, Integers, Integers]
"""Batch, head, query position and key position: integers or integer arrays that broadcast together."""


def _rotate_left(x: Array, distance: int) -> Array:
    return (x << np.uint32(distance)) | (x >> np.uint32(32 - distance))


def threefry_2x32(key: tuple[Array, Array], counter: tuple[Array, Array], rounds: int = 20) -> tuple[Array, Array]:
    """Two random words for each counter. All words are uint32 and broadcast together."""
    words = (*key, key[0] ^ key[1] ^ np.uint32(_PARITY))
    x0, x1 = counter[0] + words[0], counter[1] + words[1]
    for i in range(rounds):
        x0 = x0 + x1
        x1 = _rotate_left(x1, _ROTATIONS[i // 4 % 2][i % 4]) ^ x0
        if i % 4 == 3:
            turn = i // 4 + 1
            x0, x1 = x0 + words[turn % 3], x1 + words[(turn + 1) % 3] + np.uint32(turn)
    return x0, x1


def moved(place: Place, origin: Array | None) -> Place:
    """A place in a part of a problem, as a place in the whole.

    Args:
      origin: (4,) int32, the place in the whole where the part begins; None: (0, 0, 0, 0).
    """
    if origin is None:
        return place
    batch, head, q_pos, kv_pos = (jnp.asarray(x).astype(jnp.uint32) + first
                                  for x, first in zip(place, origin.astype(jnp.uint32)))
    return batch, head, q_pos, kv_pos


def keep(seed: Array, batch: Integers, head: Integers, q_pos: Integers, kv_pos: Integers, rate: float) -> Array:
    """True where an attention weight is kept, with probability 1 - rate (to 2^-32).

    Args:
      seed: (2,) uint32.
      batch, head, q_pos, kv_pos: non-negative integers or integer arrays; they broadcast together.
      rate: the probability of dropping, in [0, 1].
    """
    counters = [jnp.asarray(x).astype(jnp.uint32) for x in (batch, head, q_pos, kv_pos)]
    ndim = max(x.ndim for x in counters)
    batch, head, q_pos, kv_pos = (x.reshape((1,) * (ndim - x.ndim) + x.shape) for x in counters)
    if rate >= 1:
        return jnp.zeros(jnp.broadcast_shapes(batch.shape, head.shape, q_pos.shape, kv_pos.shape), bool)
    key = threefry_2x32((seed[0], seed[1]), (batch, head))
    bits, _ = threefry_2x32(key, (q_pos, kv_pos), rounds=13)
    return bits >= np.uint32(min(round(rate * 2**32), 2**32 - 1))
