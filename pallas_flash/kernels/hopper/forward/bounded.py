"""Scores that a soft cap bounds, for `ForwardSchedule.bounded`: tanh without a division, and no row maximum.

tanh x = 1 - 2 / (e^2x + 1) is made of one approximate reciprocal, where a division has six instructions; and as scores
lie between -cap and cap, m_i is 0 (`scores.are_bounded`): bfloat16 rounds weights of any size alike. Nothing is
rescaled, and no exponential waits for a maximum. A window of 1,024 with a soft cap, d 128, took 331 us on an H200 where
it had taken 371 (docs/notes/hopper_features.md, 2026-11-30).
"""

import jax.numpy as jnp

from pallas_flash import softmax
from pallas_flash.kernels.hopper import registers
from pallas_flash.kernels.hopper.forward.softmax import Exponents, Maximum, Softmax
from pallas_flash.kernels.hopper.registers import Fragment
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.types import Flag
from pallas_flash.spec import AttentionSpec

__all__ = ["capped", "no_maximum", "zero"]


def capped(spec: AttentionSpec, x: Fragment) -> Fragment:
    """Computes scores in their unit from the products x of queries and keys, in the layout TILE, off by 2^-22."""
    assert spec.softcap is not None
    power = jnp.exp2(x * (spec.scale / spec.softcap * 2 * softmax.LOG2E))
    return 1 - 2 * ptx.reciprocal(power + 1, registers.TILE)


def zero() -> Maximum:
    """The maximum of all rows."""
    return Maximum(registers.row_zeros(), registers.row_zeros())


def no_maximum(state: Softmax, s: Fragment, exponents: Exponents) -> tuple[Maximum, Flag]:
    """The next maximum (`softmax.NextMaximum`): the same."""
    del s, exponents
    return state.maximum, jnp.bool_(False)
