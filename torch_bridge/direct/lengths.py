"""Passes on the direct path, whose plans are for one length each: lengths that come after the first share the plans of
a few, to which their tensors are padded.

    the first lengths of a problem (`OWN`)      plans of their own, which takes seconds each
    a length whose plan is loaded or on disk    that one
    any other                                   the plan of the next length of `bucket`, for a copy of each tensor
    one that came often (`OFTEN`)               likewise, while its own plan is made by a process beside; then that one

Zeros are padded. A query that counts sees none of the padded keys where the mask ends before them, as it does in causal
attention of a sequence to itself, and none of the tokens behind packed sequences; an attn_mask is filled up with what
hides them; else their number is data of the call, `kv_lengths`. Padded queries are dropped, and as their cotangents are
zeros, they add nothing to the gradients of keys. A single query stays one: each token that is generated would be
computed with 127 others. What dropout draws for a pair depends on its positions, not on the lengths.
"""

import dataclasses
import threading

import torch

from torch_bridge import strides
from torch_bridge.arguments import Cotangents, Numbers, Operands, PerArray, Results
from torch_bridge.direct import attention
from torch_bridge.direct.problem import PassName, Problem

__all__ = ["OFTEN", "OWN", "backward", "bucket", "forward", "padded", "shared", "write_gradients"]

OWN = 2
"""So many lengths of a problem have plans of their own at once: training has one, and its evaluation another."""
OFTEN = 1000
"""Calls of a length after which it gets a plan of its own: with some 100 us a call, they have cost 0.1 s."""
_SMALLEST = 128
_MAX_WAYS = 4096
_BY_POSITION = {"q_ids", "kv_ids"}
"""Tensors with an axis of length."""
_OF_PAIRS = {"mask", "bias"}
"""Tensors with two of them, which may have one element each."""


def bucket(length: int) -> int:
    """The next multiple of an eighth of the next power of two, or of 128 if that is more: 128, 256, ..., 1024, 1280,
    1536, 1792, 2048, 2560, ... Less than a quarter is padding from 512 on; up to 128 Ki there are 36 of them.
    """
    step = max(_SMALLEST, 1 << max((length - 1).bit_length() - 3, 0))
    return -(-length // step) * step


def _buckets(operands: Operands) -> tuple[int, int]:
    """The lengths of queries and keys that share a plan with those of a call."""
    q_len, kv_len = operands.query.shape[2], operands.key.shape[2]
    return 1 if q_len == 1 else bucket(q_len), bucket(kv_len)


def forward(operands: Operands, numbers: Numbers, *, most: float, then: PassName | None = None) -> Results | None:
    """out, stored as query is, and the statistics of rows, launched directly; None: the call goes through DLPack.

    Args:
      most: as in `DirectCall.slow_reason`. A plan that is shared is taken in any case: JAX compiles for each length.
      then: as in `attention.find`.
    """
    way = _way(operands, numbers, "forward")
    if way.shares:
        filled = padded(operands, numbers)
        call = attention.find(filled, numbers, "forward", then=None if then is None else "backward")
        if call is not None:
            query, _, value, *_ = operands
            out, stats = call.forward(filled)
            return Results(strides.with_strides(_cut(out, query.shape[2]), strides.like_query(query, value.shape[3])),
                           _cut(stats, query.shape[2], 3).contiguous())
        way.shares = False
    call = attention.find(operands, numbers, "forward", then=then)
    if call is None or call.slow_reason("forward", most) is None:
        return None if call is None else call.forward(operands)
    if then is not None:  # a capture, before which both have run, takes it
        attention.find(operands, numbers, then)
    return None


def backward(operands: Operands, numbers: Numbers, results: Results, cotangents: Cotangents, *, most: float,
             wants_bias: bool = False) -> PerArray[torch.Tensor | None] | None:
    """The gradients, each stored as its tensor, launched directly; None: the call goes through DLPack.

    Args:
      most: as in `forward`.
      wants_bias: whether that of the bias is wanted, too.
    """
    way = _way(operands, numbers, "backward")
    if way.has_no_dbias and wants_bias:
        return None
    if way.shares:
        filled = padded(operands, numbers)
        call = _found(filled, numbers, wants_bias)
        if call is not None:
            length = filled.query.shape[2]
            dout, dstats = cotangents
            grads = call.backward(
                filled, Results(_filled(results.out, length), _filled(results.stats, length, 3)),
                Cotangents(None if dout is None else _filled(dout, length),
                           None if dstats is None else _filled(dstats, length, 3)), wants_bias)
            return PerArray(*(
                None if grad is None or x is None else
                strides.with_strides(_cut(_cut(grad, x.shape[2]), x.shape[3], 3),
                                     torch.empty_like(x, device="meta").stride())
                for grad, x in zip(grads, operands.differentiable, strict=True)))
        way.shares, way.has_no_dbias = False, wants_bias
        if wants_bias:  # nor has this length: to ask takes a process
            return None
    call = _found(operands, numbers, wants_bias)
    if call is None or call.slow_reason("backward", most):
        return None
    return call.backward(operands, results, cotangents, wants_bias)


def write_gradients(operands: Operands, numbers: Numbers, results: Results, dout: torch.Tensor,
                    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor], *, most: float) -> bool:
    """Whether the gradients were written into tensors that are there, launched directly: where query, key and value
    are read where they lie, and these lie alike. Those of a plan that is shared are not.

    Args:
      most: as in `forward`, whose call is known.
    """
    if _way(operands, numbers, "backward_of_parts").shares:
        return False
    call = attention.known(operands, numbers)
    if call is None or not call.may_write(grads) or attention.find(operands, numbers, "backward_of_parts") is None or (
            call.slow_reason("backward_of_parts", most) is not None):
        return False
    call.write_gradients(operands, results, dout, grads)
    return True


def _found(operands: Operands, numbers: Numbers, wants_bias: bool) -> attention.DirectCall | None:
    """What runs the gradients that are wanted; where one of them has no launches, none has a plan made for it."""
    if wants_bias and attention.find(operands, numbers, "dbias") is None:
        return None
    return attention.find(operands, numbers, "backward")


def shared(operands: Operands, numbers: Numbers, pass_name: PassName) -> tuple[int, int] | None:
    """The lengths of queries and keys of the plan that calls like this one have shared; None: none has."""
    way = _ways.get((pass_name, *attention.name_of(operands, numbers)))
    return _buckets(operands) if way is not None and way.shares else None


# --- which lengths ---------------------------------------------------------------------------------------------------


class _Way:
    """What calls of one name take: the plan of their own length, or that of a bucket."""

    def __init__(self, request: tuple[Problem, PassName, torch.device] | None) -> None:
        self.shares, self._request, self._calls = request is not None, request, 0
        self.has_no_dbias = False

    def count(self) -> None:
        """Counts a call that shares a plan, and ends that where its own is loaded. At OFTEN calls that is asked for,
        and from then on now and then looked for.
        """
        if not self.shares or self._request is None:
            return
        self._calls += 1
        problem, pass_name, device = self._request
        if attention.is_loaded(problem, pass_name, device):
            self.shares = False
        elif self._calls == OFTEN:
            attention.expect(problem, pass_name, device)
        elif not self._calls % OFTEN and attention.is_at_hand(problem, pass_name, device):
            self.shares = False


_OWN_WAY = _Way(None)
_ways: dict[tuple[object, ...], _Way] = {}
_own: dict[tuple[Problem, torch.device], set[tuple[int, int]]] = {}
"""Of problems without lengths, those that have plans of their own."""
_lock = threading.Lock()


def _way(operands: Operands, numbers: Numbers, pass_name: PassName) -> _Way:
    device = operands.query.device
    if device.type not in attention.DEVICES or not attention.is_on() or not _may_be_padded(operands, numbers):
        return _OWN_WAY
    name = (pass_name, *attention.name_of(operands, numbers))
    way = _ways.get(name)
    if way is None:
        if attention.why_not(operands, numbers) is not None or attention.why_not_gpu(
                operands, numbers, device) is not None:
            return _OWN_WAY
        problem = attention.problem_of(operands, numbers)
        shares = (_shares(problem, _buckets(operands), device)
                  and attention.why_not(padded(operands, numbers), numbers) is None)
        if len(_ways) >= _MAX_WAYS:
            _ways.clear()
        way = _ways[name] = _Way((problem, pass_name, device) if shares else None)
    way.count()
    return way


def _shares(problem: Problem, buckets: tuple[int, int], device: torch.device) -> bool:
    """Whether a length shares a plan, from its first call on. Not where one pass has its own: the other gets it, too.
    """
    lengths = problem.q_len, problem.kv_len
    if buckets == lengths or any(
            attention.is_at_hand(problem, name, device) for name in attention.PASSES):
        return False
    given = tuple((name, (problem.batch,) if name in _BY_POSITION else shape[:2] if name in _OF_PAIRS else shape, dtype)
                  for name, shape, dtype in problem.given)
    family = dataclasses.replace(problem, q_len=0, kv_len=0, given=given), device
    with _lock:
        own = _own.setdefault(family, set())
        if len(own) < OWN:
            own.add(lengths)
        return lengths not in own


# --- padding ---------------------------------------------------------------------------------------------------------


def _may_be_padded(operands: Operands, numbers: Numbers) -> bool:
    """Not where terms of sums are asked for, nor beside a bias that is the same for all keys, nor with a score
    function, which knows of no positions beyond the call's.
    """
    bias = operands.bias
    return (bias is None or bias.shape[3] > 1) and not numbers.partial and (
        numbers.score is None) and not operands.is_empty


def _sees_no_padding(operands: Operands, numbers: Numbers) -> bool:
    """Whether the mask lets no query see a key beyond the last."""
    return (operands.offsets is None and numbers.right is not None
            and operands.query.shape[2] + numbers.offset + numbers.right <= operands.key.shape[2])


def padded(operands: Operands, numbers: Numbers) -> Operands:
    """Copies with zeros at the end of the lengths, of the same meaning but for the queries that are more."""
    query, key, value = operands[:3]
    q_len, kv_len = query.shape[2], key.shape[2]
    q_wanted, kv_wanted = _buckets(operands)
    lengths, q_ids, kv_ids = operands.kv_lengths, operands.q_ids, operands.kv_ids
    q_starts, kv_starts = operands.q_starts, operands.kv_starts
    if lengths is not None:
        lengths = lengths.clamp(max=kv_len)
    elif kv_ids is None and kv_starts is None and not _hides_keys(operands) and not _sees_no_padding(operands, numbers):
        lengths = torch.full((query.shape[0],), kv_len, dtype=torch.int32, device=query.device)
    return operands._replace(
        query=_filled(query, q_wanted), key=_filled(key, kv_wanted), value=_filled(value, kv_wanted),
        kv_lengths=lengths, mask=_filled_array(operands.mask, (q_wanted, kv_wanted), False),
        bias=_filled_array(operands.bias, (q_wanted, kv_wanted), -torch.inf),
        q_ids=None if q_ids is None else torch.nn.functional.pad(q_ids, (0, q_wanted - q_len), value=-1),
        kv_ids=None if kv_ids is None else torch.nn.functional.pad(kv_ids, (0, kv_wanted - kv_len), value=-1),
        q_starts=None if q_starts is None else q_starts.clamp(max=q_len),
        kv_starts=None if kv_starts is None else kv_starts.clamp(max=kv_len))


def _hides_keys(operands: Operands) -> bool:
    """Whether a mask or a bias is filled up with what hides the keys behind the last."""
    return any(x is not None and x.shape[3] > 1 for x in (operands.mask, operands.bias))


def _filled_array(tensor: torch.Tensor | None, lengths: tuple[int, int], value: float) -> torch.Tensor | None:
    """A mask or a bias with a value behind its queries and keys, unless it is the same for all of them."""
    if tensor is None:
        return None
    rows, columns = (0 if n == 1 else wanted - n for n, wanted in zip(tensor.shape[2:], lengths, strict=True))
    return torch.nn.functional.pad(tensor, (0, columns, 0, rows), value=value)


def _filled(tensor: torch.Tensor, length: int, axis: int = 2) -> torch.Tensor:
    """A dense copy with zeros behind, its heads inside where those of the tensor are."""
    missing = length - tensor.shape[axis]
    if not missing:
        return tensor
    shape = *tensor.shape[:axis], length, *tensor.shape[axis + 1:]
    order = strides.dense(shape, axis == 2 and strides.is_heads_inside(tensor))
    made = torch.empty_strided(shape, order, dtype=tensor.dtype, device=tensor.device)
    made.narrow(axis, 0, length - missing).copy_(tensor)
    made.narrow(axis, length - missing, missing).zero_()
    return made


def _cut(tensor: torch.Tensor, length: int, axis: int = 2) -> torch.Tensor:
    return tensor.narrow(axis, 0, length)
