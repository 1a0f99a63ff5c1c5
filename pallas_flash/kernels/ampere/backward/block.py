"""What the stages of the kernel of dk, dv and dq share: a block, and what it loads."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_flash.kernels.ampere import copies, registers
from pallas_flash.kernels.ampere.backward.statistics import Statistics
from pallas_flash.kernels.ampere.copies import Team
from pallas_flash.kernels.ampere.registers import Fragment
from pallas_flash.kernels.ampere.schedule import ROWS, BackwardSchedule
from pallas_flash.kernels.mosaic.head_mask import HeadMask
from pallas_flash.kernels.mosaic.scheduling import rem
from pallas_flash.kernels.mosaic.types import Index, Ref
from pallas_flash.kernels.mosaic.walk import Step, Walk
from pallas_flash.spec import AttentionSpec

__all__ = ["Block"]


class Block(NamedTuple):
    """A block: its key tile, and its walk over query tiles."""

    spec: AttentionSpec
    schedule: BackwardSchedule
    gmem: dict[str, Ref]  # q, k, v, dout, stats, dq_sums, dk, dv; what mask and dropout need
    smem: dict[str, Ref]  # memory.kv_buffers
    team: Team
    mask: HeadMask  # `of_head` is that of a query head
    batch: Index
    head: Index  # of keys
    tile: Index
    walk: Walk

    @property
    def own(self) -> Index:
        """The first of the warpgroup's rows in the key tile."""
        return 0 if self.schedule.shares_keys else self.team.warpgroup * (ROWS * self.schedule.row_tiles)

    def own_rows(self, name: str) -> Ref:
        """The warpgroup's rows of the keys ("k") or values ("v"): (chunks, rows, 64)."""
        return self.smem[name].at[:, pl.ds(self.own, ROWS * self.schedule.row_tiles)]

    def first_key(self, row_tile: int) -> Index:
        """The position of the first key of 64 in the warpgroup's registers."""
        return self.tile * self.schedule.block_kv + self.own + row_tile * ROWS

    def slot(self, ordinal: Index) -> Index:
        """The slot of the query tile of a step."""
        return rem(ordinal, self.schedule.num_stages) if self.schedule.num_stages > 1 else 0

    def load_keys(self) -> None:
        """Starts to load the key tile and the values."""
        for name in "kv":
            index = self.batch, self.head, self.tile * self.schedule.block_kv
            copies.load_tile(self.team, self.spec, self.gmem[name], index, self.smem[name])

    def store(self, name: str, row_tile: int, x: Fragment, column: int = 0) -> None:
        """Stores the gradient of 64 of the warpgroup's keys, "dk", or values, "dv", from a column on."""
        first = self.first_key(row_tile)
        axis, place = (1, (self.batch, first, self.head)) if self.spec.layout == "BLHD" else (
            2, (self.batch, self.head, first))
        registers.store_rows(x.astype(self.spec.result_dtype), self.gmem[name], place, axis, column)

    def load_first(self) -> None:
        """Starts to load the first step, if there is one."""
        @pl.when(self.walk.steps > 0)
        def load() -> None:
            self.load(Step(jnp.int32(0), *self.walk.first))

    def load_next(self, step: Step) -> None:
        """Starts to load the step after this one, if there is one."""
        @pl.when(step.ordinal + 1 < self.walk.steps)
        def load() -> None:
            self.load(Step(step.ordinal + 1, *self.walk.next(step.head, step.tile)))

    def load(self, step: Step) -> None:
        """Starts to load the query, the dout and the statistics of a step."""
        slot, first = self.slot(step.ordinal), step.tile * self.schedule.block_q
        for name in ("q", "dout"):
            index = self.batch, step.head, first
            copies.load_tile(self.team, self.spec, self.gmem[name], index, self.smem[name].at[slot])
        for row in (Statistics.LSE, Statistics.DELTA):
            source = self.gmem["stats"].at[self.batch, step.head, int(row), pl.ds(first, self.schedule.block_q)]
            copies.load_words(self.team, source, self.smem["stats"].at[slot, int(row)])
