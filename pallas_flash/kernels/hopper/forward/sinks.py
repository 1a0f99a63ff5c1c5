"""Attention sinks in the forward's epilogue: a score of each row whose key has no value.

    l' = l_i + exp(sink - m_i)     out = acc / l'     lse = m_i + log(l')

so that no pass over out follows. Rows that attend to nothing keep an lse of -inf, by which the backward knows them;
`autodiff.natural_lse` puts the sink in its place.
"""

import jax
import jax.numpy as jnp

from pallas_flash.arrays import Array, Float
from pallas_flash.kernels.hopper.forward.tiles import Block, Tile
from pallas_flash.kernels.hopper.registers import PerRow
from pallas_flash.kernels.mosaic.scores import score_unit, unit
from pallas_flash.spec import AttentionSpec

__all__ = ["input_types", "joined", "load"]

_HIGHEST = 3e38
"""A larger sink counts as this, in the unit of scores: its difference from itself is not NaN."""


def input_types(spec: AttentionSpec) -> dict[str, jax.ShapeDtypeStruct]:
    """The array that the kernel reads: (1|b h 1 1) float32."""
    return {} if spec.sinks is None else {"sinks": jax.ShapeDtypeStruct(spec.sinks.shape, jnp.float32)}


def load(block: Block, tile: Tile) -> Float[Array, ""] | None:
    """Loads the sink of a tile's head; None: there are no sinks."""
    if block.spec.sinks is None:
        return None
    batch = tile.batch if block.spec.sinks.shape[0] > 1 else 0
    sink: Array = block.gmem["sinks"][batch, tile.head, 0, 0]
    return sink


def joined(spec: AttentionSpec, sink: Float[Array, ""], sums: tuple[PerRow, PerRow, PerRow],
           ) -> tuple[tuple[PerRow, PerRow, PerRow], PerRow]:
    """The sums of 64 rows with the sink in them, and what is left of acc: what to multiply it with.

    Args:
      sink: a natural logarithm.
      sums: m_i in the unit of scores, rounding and l_i: l_i is the sum of exp2((s - m_i) unit - rounding).
    """
    m_i, rounding, l_i = sums
    logit = jnp.minimum(sink * (1 / unit(spec)), _HIGHEST)
    m_new = jnp.maximum(m_i, logit)
    left = jnp.exp2((m_i - m_new) * score_unit(spec))
    total = l_i * left + jnp.exp2((logit - m_new) * score_unit(spec) - rounding)
    return (m_new, rounding, jnp.where(l_i == 0, 0.0, total)), left
