"""How calls on DTensors are sharded: by batch, or by heads, without communication.

    by        query, key, value, out   stats, offsets, lengths, ids   mask and bias            gradients
    batch     Shard(0)                 Shard(0)                       Shard(0), or one: whole  as their tensors
    heads     Shard(1)                 stats Shard(1), others whole   Shard(1), or one: whole  as their tensors
    heads,    query, out Shard(1),     likewise                       likewise                 of key and value partial
    one of kv key and value whole                                                              sums

The gradient of a bias that is shared by the shards is a partial sum. Dropout draws by the position in the whole, and a
score function asks for it, so that a call with one of them, and one of another sharding, is computed whole on every
device, from tensors that are gathered.
"""

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from torch_bridge import ops
from torch_bridge.arguments import Attention, AttentionBackward, Numbers, Operands, PerArray

if TYPE_CHECKING:
    from torch.distributed.tensor import Placement

__all__ = ["drawn_seed", "register", "register_if_needed"]

_MODULE = "torch.distributed.tensor"
_is_registered = False


def register_if_needed() -> None:
    """`register`, once there may be DTensors."""
    if not _is_registered and _MODULE in sys.modules:
        register()


def register() -> None:
    """Tells DTensor of the rules. Imports it, which takes a second."""
    global _is_registered
    if _is_registered or not torch.distributed.is_available():
        return
    _is_registered = True
    from torch.distributed.tensor.experimental import register_sharding

    for forward, backward in (ops.attention, ops.attention_backward), (*ops.DIRECT.values(),):
        register_sharding(forward)(_of_forward)
        register_sharding(backward)(_of_backward)


def drawn_seed(like: torch.Tensor) -> torch.Tensor:
    """A seed of dropout (2,) for a call of DTensors that every device computes whole: that which the mesh's first
    process draws.

    Processes may have drawn different numbers before, as those of data parallelism do. The mesh's processes alone take
    part, and none waits for its GPU: `DTensor.from_local(run_check=True)` gathers objects from all processes there are.
    """
    from torch.distributed import _functional_collectives as funcol
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(like, DTensor)
    mine, mesh = ops.dropout_seed(like.to_local().detach(), ()), like.device_mesh
    if mesh.get_coordinate() is not None:
        for axis in range(mesh.ndim):
            if mesh.size(axis) > 1:
                mine = funcol.broadcast(mine, 0, (mesh, axis))
    return DTensor.from_local(mine, mesh, [Replicate()] * mesh.ndim, run_check=False)


class _Split(NamedTuple):
    """One way to share a call out.

    Attributes:
      axis: of (batch, heads, length, dim) that is sharded; None: each device computes the whole.
      shares_kv: key and value are whole all the same.
    """

    axis: int | None
    shares_kv: bool = False

    def of(self, tensor: torch.Tensor | None) -> "Placement | None":
        """The placement of a tensor whose axes begin with batch and heads, or with the batch alone; None of none."""
        from torch.distributed.tensor import Replicate, Shard

        if tensor is None:
            return None
        axes = len(tensor.shape)
        if self.axis is None or axes < (3 if self.axis == 1 else 1) or tensor.shape[self.axis] in (0, 1):
            return Replicate()
        return Shard(self.axis)

    def operands(self, operands: Operands) -> "list[Placement | None]":
        """The placements of all operands."""
        from torch.distributed.tensor import Replicate

        by_name = {name: self.of(x) for name, x in operands._asdict().items()}
        whole = ["seed", "q_starts", "kv_starts", "score_floats", "score_integers"]
        if self.axis == 1:
            whole += ["offsets", "q_lengths", "kv_lengths", "q_ids", "kv_ids"]
        if self.shares_kv:
            whole += ["key", "value"]
        return [Replicate() if name in whole and x is not None else x for name, x in by_name.items()]

    def gradients(self, operands: Operands, needs: PerArray[bool]) -> "list[Placement | None]":
        """The placements of the gradients."""
        from torch.distributed.tensor import Partial, Replicate

        placed = PerArray.among(self.operands(operands))
        return [Replicate() if not needed or self.axis is None else Partial() if x == Replicate() else x
                for needed, x in zip(needs, placed, strict=True)]


def _splits(operands: Operands, numbers: Numbers) -> list[_Split]:
    """The ways in which a call can be shared out."""
    query, value = operands.query, operands.value
    found, sizes = [_Split(None)], tuple(query.mesh.shape)  # type: ignore[attr-defined]  # a DTensorSpec
    if operands.seed is not None or numbers.score is not None:
        return found
    if query.shape[0] > 1 and operands.q_starts is None:
        found.append(_Split(0))
    kv_heads, devices = value.shape[1], math.prod(sizes)
    if kv_heads == 1 and query.shape[1] > 1:
        found.append(_Split(1, shares_kv=True))
    elif all(kv_heads % size == 0 for size in sizes) and (kv_heads % devices == 0 or kv_heads < devices):
        found.append(_Split(1))  # each shard has whole groups
    return found


type _Rule = tuple[list[Placement | None], list[Placement | None]]
"""The placements of results and of arguments."""


def _of_forward(*args: object) -> Sequence[_Rule]:
    operands, numbers, needs_stats = Attention.of(args)
    rules = []
    for split in _splits(operands, numbers):
        placed = split.operands(operands)
        results = [placed[0], placed[0] if needs_stats else _Split(None).of(operands.query)]
        rules.append((results, [*placed, *(None for _ in numbers), None]))
    return rules


def _of_backward(*args: object) -> Sequence[_Rule]:
    operands, numbers, results, cotangents, needs = AttentionBackward.of(args)
    rules = []
    for split in _splits(operands, numbers):
        given = [split.of(x) for x in (*results, *cotangents)]
        rules.append((split.gradients(operands, needs),
                      [*split.operands(operands), *(None for _ in numbers), *given, None]))
    return rules
