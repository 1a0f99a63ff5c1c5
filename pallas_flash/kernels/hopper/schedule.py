"""Schedules: the tile sizes and pipeline depths of the Hopper kernels, in their `units`. A schedule says how fast,
never what: it changes no result beyond rounding.

On this file stand, each importing only those before it and none of them Mosaic: `work` (which tiles a block walks),
`memory` (its buffers and barriers), `rules` (reasons against a schedule) and `defaults` (measured tables).

The backward has two forms. Fused: one kernel walks the query tiles of each key tile, keeps dk and dv in registers and
adds its part of dq to sums in global memory, float32: five products a tile. The order of those additions is
nondeterministic, unless the schedule is `ordered`. Two kernels: dk and dv from key tiles, dq from query tiles: seven
products a tile, no memory of their own, and the same bits on every run. Heads above 256 have a kernel for each of dk,
dv and dq (`WideSchedule`): eight products a tile.
"""

import dataclasses
import math
from collections.abc import Hashable
from typing import ClassVar, Literal, Protocol

from pallas_flash import tiles
from pallas_flash.kernels.hopper.units import CHUNK, ROWS_PER_WARPGROUP, chunks, two_roles
from pallas_flash.spec import AttentionSpec

__all__ = [
    "CHUNK", "ROWS_PER_WARPGROUP", "BackwardSchedule", "DbiasSchedule", "DecodeSchedule", "DqSchedule",
    "Float32BackwardSchedule", "Float32Schedule", "ForwardSchedule", "KeySchedule", "KvSchedule", "SplitSchedule",
    "WideSchedule", "chunks",
]


@dataclasses.dataclass(frozen=True)
class ForwardSchedule:
    """The forward kernel's schedule: one block for each SM takes tile after tile.

    Attributes:
      block_kv: keys of a tile; a multiple of 16.
      warpgroups: compute warpgroups, of 64 query rows each.
      num_stages: slots of the ring of key tiles, and of that of value tiles.
      query_buffers: query tiles in shared memory; with 2, the next one is loaded while this one is used.
      out_chunks: 64-column chunks of the output buffer of a warpgroup. If the output has more, they are written one
        group after the other. 0: the output is written over the query, whose buffer is free only afterwards.
      pingpong: the warpgroups take turns at the tensor cores.
      maxima: the row maximum is taken at the steps i = 1, 2, 3, ... whose lowest set bit is more than i / maxima (2:
        1, 2, 4, 8, ...; 4: 1, 2, 3, 4, 6, 8, 12, 16, 24, ...); at the other steps it is not computed. Weights then
        reach far beyond 1, which bf16 can hold. Tiles in which they reach too far are given up and computed again, with
        a maximum at each step. 0: the maximum is computed at every step, and `slack` says when it is taken.
      slack: without `maxima`, a warp rescales its accumulator when the maximum of a row grows by more than 2^slack. 0
        keeps the largest weight of a row at 1, which bf16 holds exactly; above 0 there are fewer rescales, and the
        largest weight is rounded like the others.
      long_slack, long_keys: the slack of rows that walk over more than `long_keys` keys, where single weights matter
        less.
      held_columns: columns of weights that are computed before the waits for the next key tile and for the product
        that they overlap; the others are computed after, while the first are rounded. The first wait is a branch, which
        the compiler moves nothing across. 0: the compiler waits for the product where it likes, and the next step for
        its key tile.
      opaque: the query is indexed through an opaque scalar (`ptx.opaque`).
      num_blocks: blocks of the grid: the SMs of the device.
      section_bytes: bytes of keys and values of a section of heads, so that they stay in L2 while their tiles are
        worked on.
      q_registers: the query is held in registers.
      bias_slots: slots of the ring of tiles of a bias of pairs, in 16 bits. 0: it is read from global memory.
      mask_kernel: a launch of its own makes what is read of a mask's arrays (`mosaic.mask_kernel`), not XLA.
      bounded: a soft cap bounds the scores: no row has a maximum, and tanh no division (`forward.bounded`).
    """

    block_kv: int
    warpgroups: int = 2
    num_stages: int = 2
    query_buffers: int = 2
    out_chunks: int = 4
    pingpong: bool = True
    maxima: int = 0
    slack: float = 1.0
    long_slack: float = 2.0
    long_keys: int = 8192
    held_columns: int = 32
    opaque: bool = True
    num_blocks: int = 132
    section_bytes: int = 32 << 20
    q_registers: bool = False
    bias_slots: int = 0
    mask_kernel: bool = False
    bounded: bool = False

    @property
    def block_q(self) -> int:
        return ROWS_PER_WARPGROUP * self.warpgroups

    @property
    def padded_blocks(self) -> tuple[int, int]:
        """Keys and queries to multiples of which arrays of positions are padded."""
        return self.block_kv, self.block_q

    @property
    def registers(self) -> tuple[int, int]:
        """Registers a thread of the compute warpgroups and of the loading one."""
        return two_roles(self.warpgroups)


@dataclasses.dataclass(frozen=True)
class DecodeSchedule:
    """The schedule of the forward against a cache: one block for each SM takes equal runs of all key tiles.

    Attributes:
      block_kv: keys of a tile; a multiple of 16.
      num_stages: slots of a worker's ring of key tiles, and of that of value tiles.
      workers: compute warpgroups of a block. Each has a run of its own, and rings and a warp that loads.
      bands: how often a tile of 64 rows holds all queries, each time for other keys of a tile: 1, 2 or 4.
      query_slots: slots of a worker's ring of the queries of segments; 0: threads load their own as a segment begins.
      q_registers: the queries are held in registers, else in shared memory.
      parts_at_once: partial results of a head that are loaded together where they are combined.
      pieces_at_once: pieces of them, of 512 numbers each, that are.
      combines_late: a worker combines once all of its keys are read, not while other loads wait behind those of keys.
      cluster: blocks of a cluster, which share a head and meet to combine it; 1: all blocks share all tiles, and count.
      num_blocks: blocks of the grid: the SMs of the device.
    """

    block_kv: int = 64
    num_stages: int = 6
    q_registers: bool = True
    parts_at_once: int = 8
    num_blocks: int = 132
    workers: int = 1
    bands: int = 1
    query_slots: int = 0
    pieces_at_once: int = 1
    combines_late: bool = False
    cluster: int = 1

    @property
    def registers(self) -> tuple[int, int]:
        """Registers a thread of the compute warpgroups and of the loading one."""
        return (240, 40) if self.workers == 1 else two_roles(self.workers)


class KeySchedule(Hashable, Protocol):
    """What is asked of the schedule of any kernel that keeps key tiles: a `KvSchedule` or a `SplitSchedule`."""

    @property
    def block_q(self) -> int: ...

    @property
    def block_kv(self) -> int: ...

    @property
    def warpgroups(self) -> int: ...

    @property
    def registers(self) -> tuple[int, ...]: ...

    @property
    def num_stages(self) -> int: ...

    @property
    def section_bytes(self) -> int: ...

    @property
    def num_sms(self) -> int: ...

    @property
    def makes_dq(self) -> bool:
        """Whether it is a kernel of dq, too: the fused form."""

    @property
    def ordered(self) -> bool: ...

    @property
    def together(self) -> bool:
        """Whether a slot's query and dout have their barriers in common."""

    @property
    def pinned(self) -> bool: ...

    @property
    def apart(self) -> bool: ...

    @property
    def bias_ring(self) -> bool: ...


@dataclasses.dataclass(frozen=True)
class KvSchedule:
    """The kernel of dk and dv, in the fused form also of dq: each compute warpgroup keeps dk and dv of 64 keys in
    registers.

    Attributes:
      block_q: queries of a tile: 64 or 128.
      warpgroups: compute warpgroups, of 64 keys each.
      num_stages: slots of the ring of query and dout tiles.
      dq: which warpgroups multiply dS with the keys: "none" (dq has a kernel of its own), "shared" (the compute
        warpgroups, a 64 x 64 piece each, one step later, so that they need not meet), or "own" (one more warpgroup).
      ds_slots: slots of the buffer through which dS goes to that product.
      dq_slots: slots of the buffer through which dq goes to global memory (`backward.ordered_dq`).
      ordered: the blocks of a head add to dq in a fixed order, so that gradients repeat bit by bit.
      rounds_dq: if `ordered`, the block that adds last to a query tile makes dq of its sums; else `finish` does.
      first_writes: not `ordered`, and the first block to add to a query tile's dq writes it, so that nothing need be
        zeroed; others wait for that (`backward.ordered_dq`).
      longest_last: if `ordered`, and the first key tiles have the longest blocks, how many eighths of the tiles come
        last, in ascending order.
      pipelined: a tile's products for dk and dv are computed during the next tile's softmax; otherwise each step ends
        with its own.
      paired: if dq is "shared", a step awaits dv together with dq, and frees its query and its dout at the same time.
      pinned: the exponentials stay above the next wait for a product (`ptx.pin`).
      opaque: keys and values are indexed through `ptx.opaque`.
      held: which of "k" and "v" each compute warpgroup holds its 64 rows of in registers, so that its products read
        half as much shared memory.
      apart: tiles that need a mask, or exact exponents, have exponentials of their own, so that no branch stands
        between the exponents and the exponentials of the others.
      section_bytes: bytes of q, dout and dq of the heads that are worked on at a time, so that they stay in L2.
      num_sms: the SMs of the device.
      bias_ring: tiles of a bias of pairs, in 16 bits, come to shared memory with the queries. Else they are read from
        global memory.
    """

    block_q: int = 64
    warpgroups: int = 2
    num_stages: int = 2
    dq: Literal["none", "shared", "own"] = "none"
    ds_slots: int = 2
    dq_slots: int = 1
    ordered: bool = False
    rounds_dq: bool = False
    first_writes: bool = False
    longest_last: int = 2
    pipelined: bool = False
    paired: bool = False
    pinned: bool = True
    opaque: bool = True
    held: str = ""
    apart: bool = False
    section_bytes: int = 32 << 20
    num_sms: int = 132
    bias_ring: bool = False

    @property
    def block_kv(self) -> int:
        return ROWS_PER_WARPGROUP * self.warpgroups

    @property
    def makes_dq(self) -> bool:
        return self.dq != "none"

    @property
    def together(self) -> bool:
        """Where a step frees the query and the dout of a slot at the same time, one barrier says it of both."""
        return self.pipelined or self.paired

    @property
    def registers(self) -> tuple[int, ...]:
        """Registers a thread of the compute warpgroups, of the one of dq if there is one, and of the loading one."""
        if self.dq == "own":
            return (208, 72, 24) if self.warpgroups == 2 else (144, 56, 24)
        return two_roles(self.warpgroups)


@dataclasses.dataclass(frozen=True)
class SplitSchedule:
    """The kernel of dk and dv of wide heads: one warpgroup keeps dv of 64 keys, another dk; the first hands P to the
    second.

    Attributes:
      num_stages: slots of the ring of query and dout tiles (64 queries each).
      p_slots: slots of the buffer through which P goes.
      section_bytes, num_sms: see `KvSchedule`.
    """

    num_stages: int = 2
    p_slots: int = 2
    section_bytes: int = 32 << 20
    num_sms: int = 132

    # What every KeySchedule says, and is fixed here.
    block_q: ClassVar[int] = 64
    block_kv: ClassVar[int] = ROWS_PER_WARPGROUP
    warpgroups: ClassVar[int] = 2
    registers: ClassVar[tuple[int, ...]] = (240, 24)
    makes_dq: ClassVar[bool] = False
    ordered: ClassVar[bool] = False
    rounds_dq: ClassVar[bool] = False
    together: ClassVar[bool] = False
    pinned: ClassVar[bool] = False
    apart: ClassVar[bool] = False
    bias_ring: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True)
class DqSchedule:
    """The kernel of dq in the form of two kernels: each compute warpgroup keeps dq of 64 queries in registers.

    Attributes:
      block_kv: keys of a tile; a multiple of 16.
      warpgroups: compute warpgroups, of 64 queries each.
      k_stages, v_stages: slots of the rings of key tiles and of value tiles.
      pipelined: a tile's product for dq is computed during the next tile's softmax.
      pinned: see `KvSchedule`.
      opaque: queries and douts are indexed through `ptx.opaque`.
      section_bytes: bytes of keys and values of the heads that are worked on at a time.
      num_sms: the SMs of the device.
    """

    block_kv: int = 64
    warpgroups: int = 2
    k_stages: int = 2
    v_stages: int = 2
    pipelined: bool = False
    pinned: bool = True
    opaque: bool = True
    section_bytes: int = 32 << 20
    num_sms: int = 132

    @property
    def block_q(self) -> int:
        return ROWS_PER_WARPGROUP * self.warpgroups

    @property
    def registers(self) -> tuple[int, int]:
        """Registers a thread of the compute warpgroups and of the loading one."""
        return two_roles(self.warpgroups)


@dataclasses.dataclass(frozen=True)
class WideSchedule:
    """One of the three kernels of heads above 256 (`backward.wide`): two warpgroups keep half of the columns each of 64
    rows of what it makes.

    Attributes:
      makes: the gradient that it makes.
      num_stages: tiles of 64 rows of the array that stays until it is multiplied with the weights.
      slots: slots of the ring through which the other array passes, a chunk of 64 columns each.
      cluster: blocks that keep neighbouring tiles of 64 rows, walk together, and share what they load by multicast: 1
        or 2.
      section_bytes, num_sms: see `KvSchedule` and `DqSchedule`.
    """

    makes: Literal["dk", "dv", "dq"]
    num_stages: int = 1
    slots: int = 2
    cluster: int = 2
    section_bytes: int = 32 << 20
    num_sms: int = 132

    # What every KeySchedule and every DqSchedule says, and is fixed here.
    warpgroups: ClassVar[int] = 2
    registers: ClassVar[tuple[int, ...]] = (240, 24)
    makes_dq: ClassVar[bool] = False
    ordered: ClassVar[bool] = False
    together: ClassVar[bool] = False
    pinned: ClassVar[bool] = False
    apart: ClassVar[bool] = False
    bias_ring: ClassVar[bool] = False
    opaque: ClassVar[bool] = True

    @property
    def block_q(self) -> int:
        """Queries of a cluster, or of a tile that it walks over."""
        return ROWS_PER_WARPGROUP * (self.cluster if self.makes == "dq" else 1)

    @property
    def block_kv(self) -> int:
        """Keys of a cluster, or of a tile that it walks over."""
        return ROWS_PER_WARPGROUP * (1 if self.makes == "dq" else self.cluster)

    @property
    def held(self) -> tuple[str, ...]:
        """The arrays of which a block has 64 rows from its start to its end."""
        return {"dk": ("k", "v"), "dv": ("k",), "dq": ("q", "dout")}[self.makes]

    @property
    def staying(self) -> str:
        """The array of the other side that is multiplied with the weights."""
        return {"dk": "q", "dv": "dout", "dq": "k"}[self.makes]

    @property
    def passing(self) -> str:
        """The array of the other side that scores, or dP, are made of, and nothing else."""
        return {"dk": "dout", "dv": "q", "dq": "v"}[self.makes]


@dataclasses.dataclass(frozen=True)
class BackwardSchedule:
    """The backward's kernels. `dq` is None in the fused form, where `kv` makes dq too; `dv` is there where `kv` makes
    dk alone; for `mask_kernel` see `ForwardSchedule`.
    """

    kv: KvSchedule | SplitSchedule | WideSchedule
    dq: DqSchedule | WideSchedule | None = None
    dv: WideSchedule | None = None
    mask_kernel: bool = False

    @property
    def fused(self) -> bool:
        return self.kv.makes_dq

    @property
    def padded_q_block(self) -> int:
        """Queries to a multiple of which the row statistics are padded."""
        return math.lcm(self.kv.block_q, 1 if self.dq is None else self.dq.block_q)

    @property
    def padded_blocks(self) -> tuple[int, int]:
        """Keys and queries to multiples of which arrays of positions are padded."""
        return math.lcm(self.kv.block_kv, 1 if self.dq is None else self.dq.block_kv), self.padded_q_block

    def padded_q(self, spec: AttentionSpec) -> int:
        """The padded number of queries."""
        return tiles.cdiv(spec.q_len, self.padded_q_block) * self.padded_q_block


@dataclasses.dataclass(frozen=True)
class Float32Schedule(ForwardSchedule):
    """The schedule of the forward of float32 inputs, whose warpgroups each wait for their own products: of what
    `ForwardSchedule` says about overlap and maxima nothing holds.
    """

    block_kv: int = 64
    query_buffers: int = 1
    out_chunks: int = 0  # out is written from registers
    pingpong: bool = False
    slack: float = 0.0
    long_slack: float = 0.0
    held_columns: int = 0


@dataclasses.dataclass(frozen=True)
class Float32BackwardSchedule(BackwardSchedule):
    """The schedule of the backward of float32 inputs: three kernels of one form (`float32.gradients`), of which `kv`
    says the tiles of dk and of dv. Their stages follow from their memory.
    """

    kv: KvSchedule = KvSchedule(pinned=False)
    dq: DqSchedule = DqSchedule(v_stages=1, pinned=False)


@dataclasses.dataclass(frozen=True)
class DbiasSchedule:
    """The kernel of the gradient of a bias of pairs: each compute warpgroup keeps that of 64 queries and a key tile.

    Attributes:
      block_kv: keys of a tile: 64 or 128.
      warpgroups: compute warpgroups, of 64 queries each: 1 or 2.
      num_stages: slots of the ring of queries with keys and, in turn, douts with values.
      opaque: queries and douts are indexed through `ptx.opaque`.
      num_sms: the SMs of the device; there is a block for each.
    """

    block_kv: int = 128
    warpgroups: int = 2
    num_stages: int = 3
    opaque: bool = True
    num_sms: int = 132

    @property
    def block_q(self) -> int:
        return ROWS_PER_WARPGROUP * self.warpgroups

    @property
    def registers(self) -> tuple[int, int]:
        """Registers a thread of the compute warpgroups and of the loading one."""
        return two_roles(self.warpgroups)

    @property
    def tiles(self) -> BackwardSchedule:
        """A backward with the same tiles: what says how statistics, mask and bias are laid out."""
        return BackwardSchedule(KvSchedule(block_q=self.block_q),
                                DqSchedule(block_kv=self.block_kv, warpgroups=self.warpgroups))
