"""What each device computes at each step, said on the host: which pairs of chunks, under which mask.

A sequence over n devices is cut into chunks (`Chunking`): one a device, or two with "zigzag", the i-th from the front
and the i-th from the back, so that causal attention is as much work for each. At step s device i has the keys of device
(i - s) mod n. A pair of a query chunk and a key chunk needs nothing, all, or the mask moved there (`Mask.moved`):
`kv_bounds` says which, asked with plain numbers.

All devices run one program, so the pairs of a step are lined up by mask: a `Call` is one kernel call, for which each
device picks its own chunks by its index. A device that lacks such a pair computes along, and its result counts as
nothing: a step lasts as long as its slowest device takes anyway. Pairs of the same mask share a call, stacked along the
batch. Steps that no device needs, keys out of a window's reach, are not in the plan.
"""

import functools
from typing import NamedTuple

import numpy as np

from pallas_flash import masks
from pallas_flash.arithmetic import Positions, where
from pallas_flash.context_parallel.order import LoadBalance
from pallas_flash.masks import Mask

__all__ = ["Call", "Chunking", "Pick", "Sharing", "Step", "as_array", "steps"]


class Chunking(NamedTuple):
    """How a sequence lies on the devices.

    Attributes:
      num_devices: n.
      local_len: positions of a device.
      load_balance: see `order.reorder`. With "zigzag" a device holds two chunks, else one; with "zigzag_documents" the
        one is made of two pieces of every document.
    """

    num_devices: int
    local_len: int
    load_balance: LoadBalance

    def chunks(self, device: int) -> tuple[int, ...]:
        """The chunks that a device holds, by their number in the sequence."""
        return (device, 2 * self.num_devices - 1 - device) if self.load_balance == "zigzag" else (device,)

    @property
    def chunk_len(self) -> int:
        return self.local_len // len(self.chunks(0))

    def start(self, chunk: Positions) -> Positions:
        """Where a chunk begins in the order of the devices, one after the other."""
        if self.load_balance != "zigzag":
            return chunk * self.local_len
        last = 2 * self.num_devices - 1
        return where(chunk < self.num_devices, 2 * chunk, 2 * (last - chunk) + 1) * self.chunk_len


class Pick[T](NamedTuple):
    """A pair of chunks: numbers, or a T for each. Chunks are numbered on their device, and in the sequence (`_id`)."""

    q_chunk: T
    kv_chunk: T
    needed: T  # 1, or 0 where a device lacks the pair
    q_id: T
    kv_id: T


class Call(NamedTuple):
    """One kernel call of a step.

    Attributes:
      mask: of each of its pairs, positions counted from the first of the pair's chunks.
      num_chunks: how many chunks follow each other on both sides of a pair: 2 where all of a device is one problem.
      picks: its pairs, each with the numbers of all devices.
    """

    mask: Mask
    num_chunks: int
    picks: tuple[Pick[tuple[int, ...]], ...]


class Step(NamedTuple):
    """What is computed with the keys of the device `distance` before this one."""

    distance: int
    calls: tuple[Call, ...]


class Sharing(NamedTuple):
    """What may be one call.

    Attributes:
      stacks: several pairs, one after the other in the batch.
      joins: the pairs of both chunks of a device with themselves. Positions then jump between the chunks, which a mask
        that is asked about them would not see.
    """

    stacks: bool
    joins: bool


@functools.lru_cache(maxsize=256)
def steps(mask: Mask, chunking: Chunking, sharing: Sharing) -> tuple[Step, ...]:
    """The steps of a ring, without those that no device needs.

    Args:
      mask: static, about positions of the whole sequence.
      chunking: how the sequence lies on the devices.
      sharing: what may be one call.
    """
    n = chunking.num_devices
    found = []
    for distance in range(n):
        pairs = [_pairs(mask, chunking, i, (i - distance) % n, sharing.joins) for i in range(n)]
        kinds = dict.fromkeys(kind for own in pairs for kind, _ in own)
        calls = [call for kind in kinds for call in _calls(kind, pairs, sharing.stacks)]
        if calls:
            found.append(Step(distance, tuple(calls)))
    return tuple(found)


_Kind = tuple[Mask, int]
"""The mask and num_chunks of a call."""


def _calls(kind: _Kind, pairs: list[list[tuple[_Kind, Pick[int]]]], stacks: bool) -> list[Call]:
    """The calls for all pairs of one kind, from the pairs of each device."""
    own = [[pick for its_kind, pick in found if its_kind == kind] for found in pairs]
    idle = Pick(0, 0, 0, 0, 0)
    lined_up = []
    for x in range(max(map(len, own))):
        of_devices = [picks[x] if x < len(picks) else idle for picks in own]
        lined_up.append(Pick[tuple[int, ...]](*zip(*of_devices, strict=True)))
    groups = [lined_up] if stacks else [[pick] for pick in lined_up]
    return [Call(*kind, tuple(group)) for group in groups]


def _pairs(mask: Mask, chunking: Chunking, q_device: int, kv_device: int,
           joins: bool) -> list[tuple[_Kind, Pick[int]]]:
    """The pairs of chunks of two devices that attend, each with its mask."""
    if chunking.load_balance == "zigzag_documents":  # all else is said by ids, see `shards.Shards.ids`
        return [((mask if q_device == kv_device else masks.Full(), 1), Pick(0, 0, 1, q_device, kv_device))]
    q_ids, kv_ids, size = chunking.chunks(q_device), chunking.chunks(kv_device), chunking.chunk_len
    grid = [[part_of(mask, q_id * size, kv_id * size, size) for kv_id in kv_ids] for q_id in q_ids]
    if joins and grid == [[masks.Causal(), None], [masks.Full(), masks.Causal()]]:
        return [((masks.Causal(), 2), Pick(0, 0, 1, q_ids[0], kv_ids[0]))]  # the same triangle as that of both chunks
    return [((found, 1), Pick(a, b, 1, q_ids[a], kv_ids[b]))
            for a, row in enumerate(grid) for b, found in enumerate(row) if found is not None]


def part_of(mask: Mask, q_lo: int, kv_lo: int, size: int) -> Mask | None:
    """The mask of `size` queries and keys from given positions on, without parts that keep all; None: none attends.
    Raises ValueError where `moved` returns what is not a mask, or one whose equality does not say that it is the same.
    """
    kept: Mask = masks.Full()
    for part in masks.checked(mask.moved(q_lo, kv_lo)).parts:
        bounds = part.kv_bounds(0, size)
        if not bounds.lo < size or not bounds.hi > 0:
            return None
        if not (bounds.full_lo <= 0 and bounds.full_hi >= size):
            kept = kept & _within(part, size)
    return kept


def _within(part: Mask, size: int) -> Mask:
    """A mask that keeps the same pairs of positions below `size`: numbers that differ beyond it alone become equal, so
    that the pairs of chunks share a call, and no device computes along with others for them.
    """
    if type(part) is masks.PrefixLM:
        offset = min(max(int(part.offset), -size), size)
        return masks.Causal(offset) if part.prefix <= 0 else masks.PrefixLM(min(int(part.prefix), size), offset)
    if type(part) is masks.InBounds:
        return masks.InBounds(*(masks.UNBOUNDED if length >= size else length for length in (part.q_len, part.kv_len)))
    return part


def as_array(call: Call) -> np.ndarray:
    """The picks of a call, int32 (pairs, 5, n)."""
    return np.array(call.picks, np.int32)
