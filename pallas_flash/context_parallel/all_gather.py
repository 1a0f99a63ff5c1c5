"""All keys and values on every device: one gather, then attention of the device's own queries over the whole sequence.

Each chunk of the device's queries is one call, under the mask moved to where the chunk is. That place differs from
device to device, and all run one program. Where the implementation takes masks of numbers known at run time, the place
is such a number; else a `lax.switch` has a branch for each, with static masks: n kernels to compile for each chunk, of
which one runs.

The backward gathers again, which is cheaper than to keep what was gathered. What each device adds to the gradients of
all keys and values is summed over the devices before it is rounded (`AttentionSpec.partial`).
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_flash import autodiff, sharding
from pallas_flash.arrays import Array, Float, Int
from pallas_flash.context_parallel.order import reorder
from pallas_flash.context_parallel.ring import anchored, attended
from pallas_flash.context_parallel.shards import Shards, pick_rows
from pallas_flash.masks import Mask, SegmentIds
from pallas_flash.spec import AttentionSpec, Gradients, Operands, Results

__all__ = ["AllGatherPasses", "attend", "why_not"]


def why_not(shards: Shards) -> list[str]:
    """Why keys cannot be gathered, each reason what is needed and what there is."""
    if shards.chunking.load_balance == "zigzag_documents":
        return ['needs chunks that are parts of the sequence, load_balance is "zigzag_documents"']
    return []


def attend(shards: Shards, operands: Operands) -> tuple[Float[Array, "b t h v"], Float[Array, "b h t"]]:
    """(out, lse) of a device's shards, differentiable."""
    return attended(AllGatherPasses(shards), operands)


class AllGatherPasses(NamedTuple):
    """The passes over the shards of a device (see `autodiff.Passes`). The results are those of `ring.RingPasses`."""

    shards: Shards

    @property
    def label(self) -> str:
        return "context_parallel_attention"

    def forward(self, operands: Operands) -> Results[Array]:
        def run(spec: AttentionSpec, name: str, problem: Operands) -> Results[Array]:
            return anchored(spec, problem, autodiff.forward(spec, name, problem, where=self.shards.device))
        found = [chunk.run(run, partial=False) for chunk in self._chunks(operands)]
        return Results(out=jnp.concatenate([x.out for x in found], axis=1),
                       stats=jnp.concatenate([x.stats for x in found], axis=3))

    def backward(self, operands: Operands, results: Results[Array], cotangents: Results[Array]) -> Gradients[Array]:
        q, k, v, bias, _ = operands.differentiable
        k, v, dout = lax.optimization_barrier((k, v, cotangents.out))  # else XLA keeps what the forward gathered
        operands, cotangents = operands._replace(k=k, v=v), cotangents._replace(out=dout)
        results, cotangents = autodiff.without_out(self.shards.spec, results, cotangents)
        found = [self._gradients(chunk, results, cotangents) for chunk in self._chunks(operands)]
        dk, dv = (self._scattered(functools.reduce(operator.add, xs)) for xs in zip(*((x.dk, x.dv) for x in found)))
        return Gradients(
            dq=jnp.concatenate([x.dq for x in found], axis=1).astype(q.dtype), dk=dk.astype(k.dtype),
            dv=dv.astype(v.dtype), dbias=None if bias is None else self._dbias(bias, found), dscore=())

    def _gradients(self, chunk: "_Chunk", results: Results[Array], cotangents: Results[Array]) -> Gradients[Array]:
        """What a chunk adds to the gradients, of its own queries and of all keys."""
        saved = Results(out=None, stats=chunk.rows(results.stats[:, :, :2], 3))
        given = Results(out=chunk.rows(cotangents.out, 1), stats=chunk.rows(cotangents.stats, 3))

        def run(spec: AttentionSpec, name: str, problem: Operands) -> Gradients[Array]:
            gradients: Gradients[Array] = autodiff.backward(spec, name, problem, saved, given, where=self.shards.device)
            return gradients
        return chunk.run(run, partial=True)

    def _chunks(self, operands: Operands) -> "list[_Chunk]":
        """The chunks of this device, all with the same gathered arrays."""
        k, v = (self._gathered(x, 1) for x in (operands.k, operands.v))
        bias = operands.bias
        if bias is not None and bias.shape[3] != 1:
            bias = self._reordered(bias, 3, inverse=True)
        kv_ids = [self._gathered(jnp.asarray(part.kv_ids), 2) for part in operands.mask.parts
                  if isinstance(part, SegmentIds)]
        whole = operands._replace(k=k, v=v, bias=bias)
        return [_Chunk(self.shards, whole, kv_ids, x) for x in range(len(self.shards.chunking.chunks(0)))]

    def _reordered(self, x: Array, axis: int, *, inverse: bool) -> Array:
        n, _, load_balance = self.shards.chunking
        return reorder(x, n, axis, inverse=inverse, load_balance=load_balance)

    def _gathered(self, x: Array, axis: int) -> Array:
        """An array of all devices, in the order of the sequence."""
        return self._reordered(lax.all_gather(x, self.shards.axis_name, axis=axis, tiled=True), axis, inverse=True)

    def _scattered(self, x: Array) -> Array:
        """The sum over the devices of what each adds to the whole sequence: this device's rows of it."""
        summed: Array = lax.psum_scatter(self._reordered(x, 1, inverse=False), self.shards.axis_name,
                                         scatter_dimension=1, tiled=True)
        return summed

    def _dbias(self, bias: Array, found: "Sequence[Gradients[Array]]") -> Array:
        parts = [x.dbias for x in found if x.dbias is not None]
        dbias = functools.reduce(operator.add, parts) if bias.shape[2] == 1 else jnp.concatenate(parts, axis=2)
        return (dbias if bias.shape[3] == 1 else self._reordered(dbias, 3, inverse=False)).astype(bias.dtype)


class _Chunk(NamedTuple):
    """A chunk of this device's queries, with keys of the whole sequence.

    Attributes:
      whole: all queries of the device; k, v and the columns of bias in the order of the sequence.
      kv_ids: for each `SegmentIds` of the mask, those of all keys in that order.
      number: which of the device's chunks it is.
    """

    shards: Shards
    whole: Operands
    kv_ids: Sequence[Array]
    number: int

    def rows(self, x: Array, axis: int) -> Array:
        """The rows of the chunk, of an array with those of all queries of the device."""
        size = self.shards.chunking.chunk_len
        return pick_rows(x, self.number * size, size, axis)

    @property
    def starts(self) -> list[int]:
        """Where the chunk begins in the sequence, on each device."""
        chunking = self.shards.chunking
        return [chunking.chunks(i)[self.number] * chunking.chunk_len for i in range(chunking.num_devices)]

    def run[R](self, function: Callable[[AttentionSpec, str, Operands], R], *, partial: bool) -> R:
        """function(spec, implementation, operands) of this chunk, at the place that it has on this device."""
        index = lax.axis_index(self.shards.axis_name)
        start = jnp.array(self.starts, jnp.int32)[index]
        static = [self.shards.static_mask.moved(start, 0) for start in self.starts]

        def call(mask: Mask) -> R:
            problem = self._operands(mask, start)
            spec = self.shards.spec_of(problem, partial=partial)
            return function(spec, self.shards.implementation_of(spec), sharding.vary_together(problem))

        if len(distinct := list(dict.fromkeys(static))) == 1:
            return call(distinct[0])
        traced = self.shards.static_mask.moved(start[None], 0)
        if self._runs_as_well(static[0], traced, start, partial):
            return call(traced)
        branch = jnp.array([distinct.index(mask) for mask in static], jnp.int32)[index]
        found: R = lax.switch(branch, [functools.partial(call, mask) for mask in distinct])
        return found

    def _runs_as_well(self, static: Mask, traced: Mask, start: Int[Array, ""], partial: bool) -> bool:
        """Whether what would run the static mask would also run the traced one."""
        specs = [self.shards.spec_of(self._operands(mask, start), partial=partial) for mask in (static, traced)]
        wanted, found = map(self.shards.decide, specs)
        return wanted is found

    def _operands(self, mask: Mask, start: Int[Array, ""]) -> Operands:
        """Under a static mask moved to where the chunk is, joined by the parts of the whole one that hold arrays."""
        left = iter(self.kv_ids)
        for part in self.whole.mask.parts:
            if isinstance(part, SegmentIds):
                mask = mask & SegmentIds(self.rows(jnp.asarray(part.q_ids), 2), next(left))
            elif part.has_arrays:
                mask = mask & part.moved(start, 0)
        bias, origin = self.whole.bias, self.whole.dropout_origin
        if bias is not None and bias.shape[2] != 1:
            bias = self.rows(bias, 2)
        if self.whole.dropout_seed is not None:
            origin = (jnp.zeros(4, jnp.int32) if origin is None else origin).at[2].add(start)
        return self.whole._replace(q=self.rows(self.whole.q, 1), bias=bias, mask=mask.canonical(),
                                   dropout_origin=origin)
