"""transformers' mask functions, read as rules.

A model's mask is a function of (batch, head, query's position, key's position), put together from a few functions of
`transformers.masking_utils` by `and_masks`. Each is known by its code object, and its parameters are the cells of its
closure. What a known function means is not taken on trust: `_known` evaluates each on a grid, and one that does not
keep the pairs that its reading keeps is not known. A function that is not known, or combinations that have no reading,
give transformers' own dense mask, which is counted with the reason.

    keep(b, i, j)  =  within bounds of i and j  and  q_ids[b, i] == kv_ids[b, j]

    causal, sliding window           bounds
    padding                          the key's id is -1
    packed sequences                 the number of the sequence
    chunks                           the number of the chunk, counted from the first token that is no padding
"""

import functools
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import masking_utils as hf
from transformers.utils import import_utils

from torch_bridge import records
from torch_bridge.direct import decoding
from torch_bridge.transformers import static
from torch_bridge.transformers.rule import Bounds, Rule

__all__ = ["mask"]

MaskFunction = Callable[..., bool]


class Unread(Exception):
    """Why a mask function has no reading."""


class Reading(NamedTuple):
    """What a mask function keeps: everything that all fields keep."""

    left: int | None = None
    right: int | None = None
    chunk: tuple[int, Tensor] | None = None
    """Positions of one chunk: its size, and where the first begins, (batch,)."""
    padding: Tensor | None = None
    """Keys that are tokens, booleans (batch, at least kv_len)."""
    sequence: Tensor | None = None
    """The number of the packed sequence of each position, (batch, length)."""
    positions: Tensor | None = None
    """Of packed sequences: what bounds and chunks count, (batch, length)."""

    def __and__(self, other: "Reading") -> "Reading":
        both = {name: (getattr(self, name), getattr(other, name)) for name in self._fields}
        for name, (a, b) in both.items():
            if a is not None and b is not None and name not in ("left", "right"):
                raise Unread(f"it has two kinds of {name}")
        return Reading(**{name: a if b is None else b if a is None else min(a, b) for name, (a, b) in both.items()})


def mask(*, batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0, kv_offset: int = 0,
         mask_function: MaskFunction = hf.causal_mask_function, attention_mask: Tensor | None = None,
         allow_is_bidirectional_skip: bool = False, device: torch.device | str = "cpu", **others: Any) -> Tensor | None:
    """The mask of one forward pass of a model, made once for all layers of a kind: a `Rule` where it has a reading.

    A single query has a row of O(kv_len) anyway, and what is traced cannot be read: both get the mask that transformers
    makes for PyTorch's own function; that of a query to a static cache has a note (`static`). The arguments are those
    of `transformers.masking_utils.sdpa_mask`; None: no pair is masked but by the layer's `is_causal`.
    """
    arguments = dict(batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
                     kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask,
                     allow_is_bidirectional_skip=allow_is_bidirectional_skip, device=device, **others)
    if q_length == 1:
        return _of_one_query(arguments)
    if _is_traced(attention_mask, q_offset):
        return hf.sdpa_mask(**arguments)
    try:
        reading = read(mask_function)
        padding = hf.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        if padding is not None:
            reading = reading & Reading(padding=padding)
        bounds = Bounds(reading.left, reading.right, int(q_offset) - kv_offset)
        found = _ids(reading, (q_length, kv_length), (int(q_offset), kv_offset), device)
    except Unread as reason:
        records.count("mask", "dense", f"attention_mask {(batch_size, 1, q_length, kv_length)}", (str(reason),))
        found_dense = hf.sdpa_mask(**arguments | dict(allow_is_causal_skip=False))
        return Rule.over(found_dense) if type(found_dense) is Tensor and found_dense.dtype == torch.bool else (
            found_dense)
    if found is None and bounds.left is bounds.right is None and allow_is_bidirectional_skip:
        return None
    return Rule.of((batch_size, 1, q_length, kv_length), device, bounds, found)


def _of_one_query(arguments: dict[str, Any]) -> Tensor | None:
    """With a note where the cache is static, also while a CUDA graph is captured, which transformers takes for tracing.
    """
    found = hf.sdpa_mask(**arguments)
    position, kv_offset = arguments["q_offset"], arguments["kv_offset"]
    if found is None or torch.compiler.is_compiling() or import_utils.is_jit_tracing() or type(found) is not Tensor:
        return found
    is_static = type(position) is Tensor and isinstance(kv_offset, int) and kv_offset == 0
    if not is_static or not decoding.is_asked(found.device):
        return found
    try:
        reading = read(arguments["mask_function"])
    except Unread:
        return found
    if reading.right is None or reading.right < 0 or reading != Reading(left=reading.left, right=reading.right):
        return found
    padding = hf.prepare_padding_mask(arguments["attention_mask"], found.shape[3], 0)
    return static.note(found, position, reading.left, padding)


def _is_traced(*arguments: object) -> bool:
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    return any(type(x) is not Tensor or import_utils.is_tracing(x) for x in tensors) or import_utils.is_tracing()


# --- ids -------------------------------------------------------------------------------------------------------------


def _ids(reading: Reading, lengths: tuple[int, int], offsets: tuple[int, int],
         device: torch.device | str) -> tuple[Tensor, Tensor] | None:
    """(q_ids, kv_ids), or None where all are equal."""
    padding = reading.padding
    if padding is not None:
        padding = padding[:, offsets[1]:offsets[1] + lengths[1]].bool()
        padding = None if padding.all() else padding
    q_ids = kv_ids = None
    if reading.sequence is not None or reading.positions is not None:
        q_ids = kv_ids = _packed_ids(reading, lengths, offsets)
    elif reading.chunk is not None:
        q_ids, kv_ids = (_chunks(reading.chunk, torch.arange(start, start + length, device=device)[None, :])
                         for start, length in zip(offsets, lengths))
    if padding is None and (q_ids is None or kv_ids is None):
        return None
    if q_ids is None or kv_ids is None:
        q_ids, kv_ids = (torch.zeros((1, length), dtype=torch.int32, device=device) for length in lengths)
    if padding is not None:
        kv_ids = torch.where(padding, kv_ids, -1)
    return q_ids.to(torch.int32), kv_ids.to(torch.int32)


def _chunks(chunk: tuple[int, Tensor], positions: Tensor) -> Tensor:
    """The number of the chunk of each position, at least 0 where a position is."""
    size, start = chunk
    return (positions - start[:, None]) // size - (-start[:, None]) // size


def _packed_ids(reading: Reading, lengths: tuple[int, int], offsets: tuple[int, int]) -> Tensor:
    """The number of the sequence, or of the chunk in it, of each position.

    Bounds count positions of the sequence, and a rule those of the row. The differences are the same within a sequence
    where each position is one more than that before it.
    """
    sequence, positions = reading.sequence, reading.positions
    if sequence is None or lengths[0] != lengths[1] or offsets != (0, 0) or sequence.shape[1] != lengths[0]:
        raise Unread("packed sequences with a cache, or positions without the numbers of their sequences")
    changes = sequence.diff(dim=1) != 0
    if positions is None:  # everything counts positions of the row
        positions = torch.arange(lengths[0], device=sequence.device)[None, :]
    elif ((positions.diff(dim=1) != 1) & ~changes).any():
        raise Unread("position_ids that do not count within a packed sequence")
    if reading.chunk is not None:
        changes = changes | (_chunks(reading.chunk, positions).diff(dim=1) != 0)
    if (changes & (sequence.diff(dim=1) < 0)).any():
        raise Unread("packed sequences whose numbers do not rise")
    return torch.nn.functional.pad(changes.cumsum(1), (1, 0))


# --- reading ---------------------------------------------------------------------------------------------------------


Cells = dict[str, Any]
"""The variables of a closure."""
Readers = dict[int, tuple[CodeType, Callable[[Cells, "Readers"], Reading]]]
"""By the id of a code object: it, which must live as long, and what reads its functions."""


def read(function: MaskFunction, readers: Readers | None = None) -> Reading:
    """What a mask function means.

    Raises:
      Unread: it has no reading.
    """
    readers = _known() if readers is None else readers
    found = readers.get(id(getattr(function, "__code__", None)))
    if found is None:
        raise Unread(f"{getattr(function, '__qualname__', function)} is no mask function that is known")
    names, cells = function.__code__.co_freevars, function.__closure__ or ()
    return found[1]({name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}, readers)


def _all(cells: Cells, readers: Readers) -> Reading:
    reading = Reading()
    for function in cells["mask_functions"]:
        reading = reading & read(function, readers)
    return reading


def _remapped(cells: Cells, readers: Readers) -> Reading:
    reading = read(cells["mask_function"], readers)
    if any(x is not None for x in (reading.padding, reading.sequence, reading.positions)):
        raise Unread("positions of packed sequences in a mask that has padding or sequences of its own")
    return reading._replace(positions=cells["position_ids"])


@functools.cache
def _known() -> Readers:
    """The readers of those functions that keep, on a grid, what their reading keeps."""
    readers: Readers = {}
    examples = []
    for function, example, reader in _candidates():
        readers[id(function.__code__)] = function.__code__, reader
        examples.append((id(function.__code__), example))
    wrong = [name for name, example in examples if not _agrees(example, readers)]
    return {name: reader for name, reader in readers.items() if name not in wrong}


def _agrees(example: MaskFunction, readers: Readers) -> bool:
    truth = hf.sdpa_mask(batch_size=2, q_length=5, kv_length=5, mask_function=example, allow_is_causal_skip=False)
    try:
        reading = read(example, readers)
        rule = Rule.of((2, 1, 5, 5), "cpu", Bounds(reading.left, reading.right, 0),
                       _ids(reading, (5, 5), (0, 0), "cpu"))
    except (Unread, KeyError):  # or a closure whose variables have other names
        return False
    return truth is not None and torch.equal(rule.written_out(), truth)


def _candidates() -> Iterator[tuple[MaskFunction, MaskFunction, Callable[[Cells, Readers], Reading]]]:
    """Functions of transformers, each with one in which it is tried, and its reader."""
    causal, one_zero = hf.causal_mask_function, torch.tensor([1, 0])
    numbers = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    packed = hf.packed_sequence_mask_function(numbers)
    left, both = hf.sliding_window_overlay(2), hf.sliding_window_bidirectional_overlay(2)
    chunks, padding = hf.chunked_overlay(2, one_zero), hf.padding_mask_function(numbers == 0)
    everything = hf.and_masks(hf.and_masks(causal, left), padding)
    yield causal, causal, lambda cells, _: Reading(right=0)
    yield hf.bidirectional_mask_function, hf.bidirectional_mask_function, lambda cells, _: Reading()
    yield left, left, lambda cells, _: Reading(left=cells["sliding_window"] - 1)
    yield both, both, lambda cells, _: Reading(left=cells["sliding_window"], right=cells["sliding_window"])
    yield chunks, chunks, lambda cells, _: Reading(chunk=(cells["chunk_size"], cells["left_padding"]))
    yield padding, padding, lambda cells, _: Reading(padding=cells["padding_mask"])
    yield packed, packed, lambda cells, _: Reading(sequence=cells["packed_sequence_mask"])
    yield everything, everything, _all
    if hasattr(hf, "remap_positions_for_packed_sequence"):  # transformers 5.17 counts positions of the row
        remapped = hf.remap_positions_for_packed_sequence(
            hf.and_masks(causal, hf.chunked_overlay(2, torch.zeros_like(one_zero))), positions)
        yield remapped, hf.and_masks(remapped, packed), _remapped
