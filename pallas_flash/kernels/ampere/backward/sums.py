"""What a block of the backward that keeps keys adds up: dk and dv in registers, dq in global memory."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_flash.arrays import Array
from pallas_flash.kernels.ampere import copies, mma
from pallas_flash.kernels.ampere.backward.block import Block
from pallas_flash.kernels.ampere.backward.nonfinite import mark_nonfinite
from pallas_flash.kernels.ampere.backward.order import Turn, count_last, turn_of
from pallas_flash.kernels.ampere.registers import Fragment
from pallas_flash.kernels.ampere.schedule import chunks
from pallas_flash.kernels.mosaic import dropout, ptx
from pallas_flash.kernels.mosaic.types import Flag, Index
from pallas_flash.kernels.mosaic.walk import HeadAndTile, Step

__all__ = ["Sums", "add_dq", "finished", "over_queries"]


class Sums(NamedTuple):
    """dk and dv of a warpgroup's keys, of each 64."""

    dk: tuple[Fragment, ...]
    dv: tuple[Fragment, ...]


def over_queries[C](block: Block, one_step: Callable[[Step, C], C], start: C) -> C:
    """Runs over all query tiles that the block's keys meet; returns what `one_step` makes of `start`."""
    def step(i: Array, carry: tuple[HeadAndTile, C]) -> tuple[HeadAndTile, C]:
        at, found = carry
        return block.walk.next(*at), one_step(Step(i, *at), found)

    found: tuple[HeadAndTile, C] = lax.fori_loop(jnp.int32(0), ptx.scalar(block.walk.steps), step,
                                                 (block.walk.first, start))
    if block.schedule.ordered:
        copies.meet(block.team)
        count_last(block)
    return found[1]


def finished(block: Block, sums: Sums, spoiled: Flag | None) -> Iterator[tuple[Fragment, Fragment]]:
    """dk and dv of each 64 keys, with the factors that are all queries' alike, and NaN where a key was not finite."""
    spec = block.spec
    for i, (dk, dv) in enumerate(zip(*sums, strict=True)):
        if spec.dropout_rate:
            dv = dv * dropout.factor(spec)
        dk, dv = mark_nonfinite(block, i, spoiled, (dk * (spec.scale * dropout.factor(spec)), dv))
        yield dk, dv


def add_dq(block: Block, step: Step) -> None:
    """Adds the warpgroup's chunks of dq of a query tile, whose dS^T all warpgroups have written."""
    size, count, turn = block.team.size, chunks(block.spec.d), turn_of(block, step)
    for first in range(0, count, size):
        chunk = first + block.team.warpgroup

        def add(chunk: Index = chunk, turn: Turn | None = turn if first == 0 else None) -> None:
            target = block.gmem["dq_sums"].at[block.batch, step.head, step.tile, chunk]
            mma.add_outer(block.smem["ds"], block.smem["k"].at[pl.ds(chunk, 1)], target, block.schedule.wide_adds, turn)

        if first + size <= count:
            add()
        else:
            pl.when(chunk < count)(add)
