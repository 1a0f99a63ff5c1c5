"""Schedules: the tile sizes and pipeline depths of the kernels, and the units they are counted in. A schedule says how
fast, never what: it changes no result beyond rounding.

On this file stand, each importing only those before it and none of them Mosaic: `work` (which tiles a block walks),
`memory` (its buffers), `rules` (reasons against a schedule) and `defaults` (which schedule a spec gets where).
"""

import dataclasses
import math

from pallas_flash import tiles

__all__ = ["CHUNK", "ROWS", "BackwardSchedule", "DecodeSchedule", "DqSchedule", "ForwardSchedule", "chunks", "kernels"]

CHUNK = 64
"""Columns of a tile that lie together in shared memory: 128 bytes of a 16-bit type, once around all banks."""

ROWS = 64
"""Rows of a tile in registers: 16 for each warp of a warpgroup."""


def chunks(dim: int) -> int:
    """The number of chunks of 64 columns that hold `dim` columns."""
    return tiles.cdiv(dim, CHUNK)


@dataclasses.dataclass(frozen=True)
class ForwardSchedule:
    """The forward kernel's schedule: a block of one warpgroup for each query tile.

    Attributes:
      block_kv: keys of a tile; a multiple of 16.
      row_tiles: tiles of 64 query rows in registers: each loaded piece of keys or values serves all of them.
      num_stages: slots for tiles of keys and values; with 2 the next is loaded while this one is used, and blocks meet
        once a tile, not twice.
      slack: a warp rescales its accumulators when the maximum of a row grows by more than 2^slack in the weights.
      section_bytes: bytes of keys and values of the heads that are worked on at a time, so that they stay in L2.
      held: the queries are held in registers, else loaded from shared memory for each tile; heads of up to 64.
      peeled: the last tiles have code of their own, if all blocks meet them alike (`work.last_tiles`): 64 queries that
        do not meet a tile, or need no mask there, are known when the kernel is compiled.
      out_in_rows: out goes to global memory through the queries' place in shared memory, 16 bytes of a row a thread;
        else from registers, 4 bytes.
      num_sms: the SMs of the device.
      mask_kernel: a launch of its own makes what is read of a mask's arrays (`mosaic.mask_kernel`), not XLA.
    """

    block_kv: int = 64
    row_tiles: int = 2
    num_stages: int = 1
    slack: float = 2.0
    held: bool = False
    peeled: bool = False
    out_in_rows: bool = False
    section_bytes: int = 32 << 20
    num_sms: int = 108
    mask_kernel: bool = False

    @property
    def block_q(self) -> int:
        return ROWS * self.row_tiles

    @property
    def padded_blocks(self) -> tuple[int, int]:
        """Keys and queries to multiples of which arrays of positions are padded."""
        return self.block_kv, self.block_q


@dataclasses.dataclass(frozen=True)
class DqSchedule:
    """The schedule of a kernel of dq alone: a block of one warpgroup for each query tile, whose dq is in registers.

    Attributes:
      block_kv: keys of a tile: 32 or 64.
      row_tiles: tiles of 64 query rows in registers.
      num_stages: slots for tiles of keys and values; with 2 the next is loaded while this one is used.
      section_bytes: bytes of keys and values of the heads that are worked on at a time, so that they stay in L2.
      num_sms: the SMs of the device.
    """

    block_kv: int = 64
    row_tiles: int = 2
    num_stages: int = 1
    section_bytes: int = 32 << 20
    num_sms: int = 108

    @property
    def block_q(self) -> int:
        return ROWS * self.row_tiles


@dataclasses.dataclass(frozen=True)
class BackwardSchedule:
    """The backward's schedule. In the fused form one kernel makes dk, dv and dq: each warpgroup keeps dk and dv of its
    keys in registers, and blocks add to dq in any order, or in a fixed one (`ordered`): then bits repeat. In two
    kernels, seven products a tile instead of five, nothing is added up in memory: bits repeat, too. Where dk and dv do
    not fit in a warpgroup together, one keeps dk and one dv of the same 64 keys, in two kernels (`split`).

    Attributes:
      dq: of the second kernel; None: the form is fused.
      split: one warpgroup keeps dk and the other dv.
      halves: two warpgroups share the keys: each makes the weights of half of a tile's queries, and keeps half of the
        columns of dk and dv.
      ordered: blocks add to dq in a fixed order, one after the other (`backward.order`).
      one_waits: for its turn one warp of the block waits, before all meet in the middle of a step; else all do, before
        they add.
      wide_adds: a thread adds four numbers of dq at a time: compute capability 9.0 and later.
      block_q: queries of a tile: 32 or 64.
      part_q: queries whose scores are in registers at a time; divides `block_q`.
      warpgroups: of a block.
      row_tiles: tiles of 64 keys in the registers of a warpgroup.
      num_stages: slots for tiles of queries and douts; with 2 the next is loaded while this one is used.
      section_bytes: bytes of q, dout and dq of the heads that are worked on at a time, so that they stay in L2.
      num_sms: the SMs of the device.
      mask_kernel: as of `ForwardSchedule`.
    """

    block_q: int = 64
    part_q: int = 32
    warpgroups: int = 1
    row_tiles: int = 2
    num_stages: int = 2
    section_bytes: int = 32 << 20
    num_sms: int = 108
    dq: DqSchedule | None = None
    split: bool = False
    halves: bool = False
    wide_adds: bool = False
    ordered: bool = False
    one_waits: bool = False
    mask_kernel: bool = False

    @property
    def shares_keys(self) -> bool:
        """Whether all warpgroups have the same keys."""
        return self.split or self.halves

    @property
    def block_kv(self) -> int:
        return ROWS * self.row_tiles * (1 if self.shares_keys else self.warpgroups)

    @property
    def padded_q_block(self) -> int:
        """Queries to a multiple of which their statistics are padded."""
        return ROWS if self.dq is None else self.dq.block_q

    @property
    def padded_blocks(self) -> tuple[int, int]:
        """Keys and queries to multiples of which arrays of positions are padded."""
        return math.lcm(self.block_kv, 1 if self.dq is None else self.dq.block_kv), self.padded_q_block


@dataclasses.dataclass(frozen=True)
class DecodeSchedule:
    """The schedule of the forward against a cache: blocks of one warpgroup take equal runs of all key tiles.

    Attributes:
      bands: how often a tile of 64 rows holds all queries, each time for other keys of a tile: 1, 2 or 4.
      block_kv: keys of a tile; a multiple of 16 for each band.
      num_stages: slots for tiles of keys and values; all but one are loaded ahead.
      q_registers: the queries are held in registers, else in shared memory.
      parts_at_once: partial results of a head that are loaded together where they are combined.
      num_blocks: blocks of the grid: as many as the SMs of the device hold.
    """

    bands: int = 4
    block_kv: int = 64
    num_stages: int = 2
    q_registers: bool = True
    parts_at_once: int = 8
    num_blocks: int = 108

    @property
    def workers(self) -> int:
        """Compute warpgroups of a block."""
        return 1


def kernels(schedule: ForwardSchedule | DecodeSchedule | BackwardSchedule) -> tuple[str, ...]:
    """The names of the kernels that a pass launches, in order (`launches`, which needs Mosaic, makes them)."""
    if isinstance(schedule, DecodeSchedule):
        return ("attention_decode",)
    of_mask = ("attention_mask",) * schedule.mask_kernel
    if isinstance(schedule, ForwardSchedule):
        return *of_mask, "attention_forward"
    last = "attention_backward_finish" if schedule.dq is None else "attention_backward_dq"
    return *of_mask, "attention_backward_prepare", "attention_backward_kv", last
