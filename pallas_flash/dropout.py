"""Dropout's random bits: a function of (seed, batch, head, query position, key position) and of nothing else.

So every implementation and every schedule drops the same entries, and the backward draws the forward's bits again. The
generator is Threefry-2x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): additions, rotations
and xors of 32-bit words only. 13 rounds pass BigCrush there; the key of a (batch, head) gets all 20.

    key      = Threefry-2x32-20(seed, (batch, head))
    (x0, x1) = Threefry-2x32-13(key, (group(q), group(k))),    group(p) = (p >> 4) * 8 + (p & 7)
    word     = x1 if q & 8 else x0
    bits     = word >> 16 if k & 8 else word & 0xFFFF
    kept     = bits >= threshold(rate)

One draw of 64 bits serves the four pairs of the queries q, q + 8 and the keys k, k + 8: the most that one thread of a
tensor core's tile holds, whether queries or keys are the tile's rows. With 16 bits a pair, a rate is rounded to a
multiple of 2^-16 (`keep_rate`), and weights are scaled by the rounded one (`factor`), so that their mean is exact.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array

__all__ = ["LEVELS", "PARITY", "ROTATIONS", "ROUNDS", "UNIT", "factor", "keep", "keep_rate", "kept_by", "keys", "moved",
           "threefry_2x32", "threshold"]

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA
ROUNDS = 13
"""Of a draw."""
UNIT = 16
"""Positions: draws serve pairs within squares of so many, so a kernel takes parts of a problem that begin at multiples.
"""
LEVELS = 2**16
"""How many values the bits of a pair take."""

Integers = int | np.ndarray | Array
Place = tuple[Integers, Integers, Integers, Integers]
"""Batch, head, query position and key position: integers or integer arrays that broadcast together."""


# -- rates -------------------------------------------------------------------------------------------------------------

def threshold(rate: float) -> int:
    """The smallest 16 bits that are kept: the rate in units of 2^-16, from 0 (all are kept) to 2^16 (none is)."""
    return round(LEVELS * rate)


def keep_rate(rate: float) -> float:
    """The exact probability of keeping a weight: 1 - rate, rounded to a multiple of 2^-16."""
    return 1 - threshold(rate) / LEVELS


def factor(rate: float) -> float:
    """What kept weights are multiplied with: 1 / keep_rate; 0 where none is kept."""
    kept = keep_rate(rate)
    return 1 / kept if kept else 0.0


# -- bits --------------------------------------------------------------------------------------------------------------

def _rotate_left(x: Array, distance: int) -> Array:
    return (x << np.uint32(distance)) | (x >> np.uint32(32 - distance))


def threefry_2x32(key: tuple[Array, Array], counter: tuple[Array, Array], rounds: int = 20) -> tuple[Array, Array]:
    """Two random words for each counter. All words are uint32 and broadcast together."""
    words = (*key, key[0] ^ key[1] ^ np.uint32(PARITY))
    x0, x1 = counter[0] + words[0], counter[1] + words[1]
    for i in range(rounds):
        x0 = x0 + x1
        x1 = _rotate_left(x1, ROTATIONS[i // 4 % 2][i % 4]) ^ x0
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


def keys(seed: Array, batch: Array, head: Array) -> tuple[Array, Array]:
    """The key of each (batch, head): two words.

    Args:
      seed: (2,) uint32.
      batch, head: uint32 arrays that broadcast together.
    """
    return threefry_2x32((seed[0], seed[1]), (batch, head))


def keep(seed: Array, batch: Integers, head: Integers, q_pos: Integers, kv_pos: Integers, rate: float) -> Array:
    """True where an attention weight is kept, with probability `keep_rate(rate)`.

    Each pair draws for itself: in XLA on a CPU, spreading a draw over its four pairs costs more than three draws.

    Args:
      seed: (2,) uint32.
      batch, head, q_pos, kv_pos: non-negative integers or integer arrays; they broadcast together.
      rate: the probability of dropping, in [0, 1].
    """
    counters = [jnp.asarray(x).astype(jnp.uint32) for x in (batch, head, q_pos, kv_pos)]
    ndim = max(x.ndim for x in counters)
    batch, head, q_pos, kv_pos = (x.reshape((1,) * (ndim - x.ndim) + x.shape) for x in counters)
    return kept_by(keys(seed, batch, head), q_pos, kv_pos, rate)


def kept_by(key: tuple[Array, Array], q_pos: Array, kv_pos: Array, rate: float) -> Array:
    """`keep` of one or more keys. All but the rate are uint32 and broadcast together."""
    x0, x1 = threefry_2x32(key, (_group(q_pos), _group(kv_pos)), ROUNDS)
    word = jnp.where(q_pos & np.uint32(8) != 0, x1, x0)
    bits = jnp.where(kv_pos & np.uint32(8) != 0, word >> np.uint32(16), word & np.uint32(LEVELS - 1))
    return bits >= np.uint32(threshold(rate))


def _group(position: Array) -> Array:
    """Which pair {p, p + 8} a position belongs to."""
    return (position >> np.uint32(4)) * np.uint32(8) + (position & np.uint32(7))
