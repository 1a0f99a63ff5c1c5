"""What a block of the backward that keeps keys adds up: dk and dv in registers, dq in global memory."""

from typing import NamedTuple

from jax.experimental import pallas as pl

from pallas_flash.kernels.ampere import mma
from pallas_flash.kernels.ampere.backward.block import Block
from pallas_flash.kernels.ampere.registers import Fragment
from pallas_flash.kernels.ampere.schedule import chunks
from pallas_flash.kernels.mosaic.types import Index
from pallas_flash.kernels.mosaic.walk import Step

__all__ = ["Sums", "add_dq"]


class Sums(NamedTuple):
    """dk and dv of a warpgroup's keys, of each 64."""

    dk: tuple[Fragment, ...]
    dv: tuple[Fragment, ...]


def add_dq(block: Block, step: Step) -> None:
    """Adds the warpgroup's chunks of dq of a query tile, whose dS^T all warpgroups have written."""
    size, count = block.team.size, chunks(block.spec.d)
    for first in range(0, count, size):
        chunk = first + block.team.warpgroup

        def add(chunk: Index = chunk) -> None:
            target = block.gmem["dq_sums"].at[block.batch, step.head, step.tile, chunk]
            mma.add_outer(block.smem["ds"], block.smem["k"].at[pl.ds(chunk, 1)], target, block.schedule.wide_adds)

        if first + size <= count:
            add()
        else:
            pl.when(chunk < count)(add)
