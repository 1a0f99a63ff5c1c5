"""The attention of a whole sequence as one device has it: its shards, and each pair of chunks as a problem of one
device."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from pallas_flash import dispatch, errors, masks, sharding, softmax
from pallas_flash.arrays import Array
from pallas_flash.context_parallel import plan
from pallas_flash.context_parallel.hops import Chosen, Ring
from pallas_flash.context_parallel.plan import Call, Chunking, Sharing, Step
from pallas_flash.device import Device
from pallas_flash.dispatch import Requested
from pallas_flash.masks import ArrayField, Mask, SegmentIds
from pallas_flash.spec import AttentionSpec, Operands

__all__ = ["Shards", "pick_rows", "replace_rows", "split"]


@dataclasses.dataclass(frozen=True)
class Shards:
    """What stays the same for all devices and steps.

    Attributes:
      spec: the problem of a device's queries and keys, without bias; its mask counts positions of the whole sequence,
        segment ids are those of the shards.
      bias: (1|b 1|h 1|t 1|s) with t of the shard and s of the whole sequence, in the order of the devices.
      axis_name: the mesh axis along the sequence.
      chunking: how the sequence lies on it.
      implementation: what was asked for.
      device: what the devices are.
    """

    spec: AttentionSpec
    bias: ArrayField | None
    axis_name: str
    chunking: Chunking
    implementation: Requested
    device: Device

    @property
    def ring(self) -> Ring:
        return Ring(self.axis_name, self.chunking.num_devices)

    @property
    def static_mask(self) -> Mask:
        """The parts of the mask that are numbers alone: what the plan is made from."""
        parts = [part for part in self.spec.mask.parts if not part.has_arrays]
        return functools.reduce(operator.and_, parts, masks.Full())

    @property
    def steps(self) -> tuple[Step, ...]:
        """The plan of a ring. Arrays that say something else of each pair keep pairs apart."""
        stacks = self.bias is None and not self.spec.dropout_rate
        by_position = any(part.has_arrays and not isinstance(part, SegmentIds) for part in self.spec.mask.parts)
        with jax.ensure_compile_time_eval():  # a user's mask may ask JAX
            return plan.steps(self.static_mask, self.chunking, Sharing(stacks, stacks and not by_position))

    @property
    def unit(self) -> float:
        """The unit of the statistics."""
        return softmax.unit(self.spec.scale, self.spec.softcap) if self.bias is None else 1.0

    def travelling(self, operands: Operands) -> list[Array]:
        """k, v, and the segment ids of keys where there are any: what each device needs of the others."""
        ids = [part.kv_ids for part in operands.mask.parts if isinstance(part, SegmentIds)]
        return [operands.k, operands.v, *(jnp.asarray(x) for x in ids)]

    def problem(self, operands: Operands, travelling: Sequence[Array], call: Call,
                chosen: Sequence[Chosen]) -> tuple[AttentionSpec, str, Operands]:
        """Spec, implementation and operands of a call: the rows of its pairs, one pair after the other in the batch."""
        k, v, *kv_ids = travelling
        size, count = self.chunking.chunk_len, call.num_chunks
        q = stacked(chosen, lambda pick: pick_rows(operands.q, pick.q_chunk * size, count * size, 1))
        k, v = (stacked(chosen, lambda pick, x=x: pick_rows(x, pick.kv_chunk * size, count * size, 1))  # type: ignore[misc]
                for x in (k, v))
        bias = None if operands.bias is None else self._bias(operands.bias, chosen[0])
        mask = self._mask(operands.mask, kv_ids, call, chosen)
        found = Operands(q=q, k=k, v=v, bias=bias, score=(), mask=mask, score_integers=(),
                         dropout_seed=operands.dropout_seed,
                         dropout_origin=self._dropout_origin(operands, chosen[0]), page_table=None)
        spec = self.spec_of(found, partial=True)
        return spec, self.implementation_of(spec), sharding.vary_together(found)

    def spec_of(self, problem: Operands, *, partial: bool) -> AttentionSpec:
        """The spec of a part of the problem, from its operands."""
        return AttentionSpec.of(
            problem.q, problem.k, problem.v, mask=problem.mask, bias=problem.bias, softcap=self.spec.softcap,
            scale=self.spec.scale, dropout_rate=self.spec.dropout_rate,
            dropout_moved=0 if problem.dropout_origin is None else self.spec.dropout_moved,
            deterministic=self.spec.deterministic, partial=partial)

    def decide(self, spec: AttentionSpec) -> dispatch.Implementation | None:
        """What would run a part of the problem; None: nothing that was asked for can."""
        try:
            return dispatch.decide(spec, self.device, self.implementation).implementation
        except errors.UnsupportedError:
            return None

    def implementation_of(self, spec: AttentionSpec) -> str:
        """The name of what runs a part of the problem."""
        return dispatch.choose(spec, self.device, self.implementation).name

    def bias_start(self, pick: Chosen) -> tuple[int | Array, int | Array]:
        """Where the rows and columns of a pair begin in the bias."""
        return pick.q_chunk * self.chunking.chunk_len, self.chunking.start(pick.kv_id)  # type: ignore[return-value]

    def _bias(self, bias: Array, pick: Chosen) -> Array:
        for axis, start in zip((2, 3), self.bias_start(pick)):
            if bias.shape[axis] != 1:
                bias = pick_rows(bias, start, self.chunking.chunk_len, axis)
        return bias

    def _dropout_origin(self, operands: Operands, pick: Chosen) -> Array | None:
        if operands.dropout_origin is None:
            return None
        size = self.chunking.chunk_len
        return operands.dropout_origin + jnp.stack([jnp.asarray(x, jnp.int32) for x in (
            0, 0, pick.q_id * size, pick.kv_id * size)])

    def _mask(self, mask: Mask, kv_ids: Sequence[Array], call: Call, chosen: Sequence[Chosen]) -> Mask:
        """The mask of a call, with the arrays of the whole one moved to where each pair is."""
        size, rows = self.chunking.chunk_len, call.num_chunks * self.chunking.chunk_len

        def moved(part: Mask, ids: Array | None, pick: Chosen) -> Mask:
            if ids is None or not isinstance(part, SegmentIds):
                return part.moved(pick.q_id * size, pick.kv_id * size)
            q_ids = pick_rows(jnp.asarray(part.q_ids), pick.q_chunk * size, rows, 2)
            return SegmentIds(*self._ids(q_ids, pick_rows(ids, pick.kv_chunk * size, rows, 2), pick))

        found, left = call.mask, iter(kv_ids)
        for part in mask.parts:
            if part.has_arrays:
                ids = next(left) if isinstance(part, SegmentIds) else None
                whole = [self._for_batch(moved(part, ids, pick), len(chosen)) for pick in chosen]
                found = found & jax.tree.map(lambda *xs: jnp.concatenate(xs) if len(xs) > 1 else xs[0], *whole)
        return found.canonical()

    def _for_batch(self, part: Mask, num_pairs: int) -> Mask:
        """Arrays shared by the batch, repeated where several pairs are stacked along it."""
        if num_pairs == 1:
            return part
        batched: Mask = jax.tree.map(lambda x: jnp.broadcast_to(x, (self.spec.batch, *x.shape[1:])), part)
        return batched

    def _ids(self, q_ids: Array, kv_ids: Array, pick: Chosen) -> tuple[Array, Array]:
        """Segment ids of a pair. With "zigzag_documents" they are 2 document + (0 early, 1 late piece): of the keys of
        other devices, early pieces see the early ones of earlier devices; late pieces see the early ones of all and the
        late ones of later devices.
        """
        if self.chunking.load_balance != "zigzag_documents":
            return q_ids, kv_ids
        is_early, is_late = q_ids % 2 == 0, kv_ids % 2 == 1
        later, earlier = jnp.asarray(pick.kv_id > pick.q_id), jnp.asarray(pick.kv_id < pick.q_id)
        return jnp.where(later & is_early, -1, q_ids >> 1), jnp.where(earlier & is_late, -1, kv_ids >> 1)


def pick_rows(x: Array, start: int | Array, size: int, axis: int) -> Array:
    """Positions [start, start + size) of an axis; the array itself where those are all."""
    return x if x.shape[axis] == size else lax.dynamic_slice_in_dim(x, start, size, axis)


def replace_rows(x: Array, rows: Array, start: int | Array, axis: int) -> Array:
    """`x` with `rows` in place of its own from `start` on."""
    return rows if rows.shape == x.shape else lax.dynamic_update_slice_in_dim(x, rows, start, axis)


def stacked(chosen: Sequence[Chosen], rows: Callable[[Chosen], Array]) -> Array:
    """The rows of each pair, one after the other along the batch."""
    found = [rows(pick) for pick in chosen]
    return found[0] if len(found) == 1 else jnp.concatenate(found)


def split(x: Array, num_pairs: int) -> list[Array]:
    """Undoes `stacked`."""
    return jnp.split(x, num_pairs) if num_pairs > 1 else [x]
