"""A ring whose kernels merge: results of each pair go into the state where they are made, in place, and rows are read
where they lie (`kernels.hopper.merging`). XLA, beside the kernels, copies the rows of pairs to stack them, and reads
and writes each result once more.

Every pair of a pass goes this way, or none does (`why_not`): `ring.RingPasses` runs what does not.

The state has a piece for each chunk of queries, and another one for each further pair of a call with the same queries,
or blocks of one kernel would race: in causal zigzag the late queries against both chunks of a device that is earlier in
the sequence. Pieces of the same queries are merged at the end.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_flash import autodiff, compat, device, sharding
from pallas_flash.arrays import Array, Float
from pallas_flash.context_parallel import unrolled
from pallas_flash.context_parallel.hops import Chosen
from pallas_flash.context_parallel.plan import Call
from pallas_flash.context_parallel.ring import RingPasses, attended, merged, no_stats
from pallas_flash.context_parallel.shards import Shards, pick_rows
from pallas_flash.spec import AttentionSpec, Gradients, Operands, Results

__all__ = ["MergedPasses", "attend", "why_not"]


def attend(shards: Shards, operands: Operands) -> tuple[Float[Array, "b t h v"], Float[Array, "b h t"]]:
    """(out, lse) of a device's shards, differentiable; merged by the kernels where all pairs can be."""
    return attended(RingPasses(shards) if sharding.explicit_mesh(operands.q) is not None else passes(shards), operands)


def passes(shards: Shards) -> autodiff.Passes:
    """The passes of a ring, each merged by the kernels where it can be."""
    beside, inside = RingPasses(shards), MergedPasses(shards)
    return _Each(*(beside if reasons else inside for reasons in why_not(shards)))


class _Each(NamedTuple):
    """A forward and a backward of their own: what one leaves to the other is the same."""

    of_forward: autodiff.Passes
    of_backward: autodiff.Passes

    @property
    def label(self) -> str:
        return self.of_forward.label

    def forward(self, operands: Operands) -> Results[Array]:
        return self.of_forward.forward(operands)

    def backward(self, operands: Operands, results: Results[Array], cotangents: Results[Array]) -> Gradients[Array]:
        return self.of_backward.backward(operands, results, cotangents)


def why_not(shards: Shards) -> tuple[list[str], list[str]]:
    """The reasons why the kernels do not merge the results of all pairs, in the forward and in the backward; empty:
    they do."""
    if not (steps := shards.steps):
        return (["there are no pairs"],) * 2
    if shards.bias is not None:
        return (["there is a bias"],) * 2
    if shards.spec.mask.has_arrays:
        return (["the mask has arrays"],) * 2
    of_steps = unrolled.why_not(steps)
    found = list(of_steps), list(of_steps)
    for call in (call for step in steps for call in step.calls):
        spec = part_of(shards, call)
        row = shards.decide(spec)
        if row is None or (module := row.merging()) is None:
            return ([f"implementation={None if row is None else row.name!r} does not merge"],) * 2
        for reasons, own in zip(found, module.why_not(spec, shards.device), strict=True):
            reasons += [reason for reason in own if reason not in reasons]
    return found


def part_of(shards: Shards, call: Call) -> AttentionSpec:
    """The spec of a call, of a mask without arrays."""
    rows = shards.chunking.chunk_len * call.num_chunks
    return dataclasses.replace(shards.spec, batch=shards.spec.batch * len(call.picks), q_len=rows, kv_len=rows,
                               mask=call.mask, return_lse=False, partial=True)


class Pieces(NamedTuple):
    """Where in the state the pieces of queries are.

    Attributes:
      table: (chunks, pieces of a chunk), the number of each; those of the first pairs lie side by side.
      number: how many there are.
    """

    table: np.ndarray
    number: int

    @classmethod
    def of(cls, shards: Shards) -> "Pieces":
        """Those that the calls of a plan need."""
        chunks = len(shards.chunking.chunks(0))
        most = np.zeros(chunks, int)
        for call in (call for step in shards.steps for call in step.calls):
            own = np.array([pick.q_chunk for pick in call.picks])  # (pairs, devices)
            for chunk in range(chunks):
                most[chunk] = max(most[chunk], (own == chunk).sum(axis=0).max())
        table, count = np.full((chunks, most.max()), -1, np.int32), chunks
        table[:, 0] = np.arange(chunks)
        for piece in range(1, table.shape[1]):
            for chunk in range(chunks):
                if piece < most[chunk]:
                    table[chunk, piece], count = count, count + 1
        return cls(table, count)

    def piece(self, chosen: Sequence[Chosen], x: int) -> Array:
        """The piece of pair x of a call of this device."""
        same = [jnp.asarray(chosen[y].q_chunk == chosen[x].q_chunk, jnp.int32) for y in range(x)]
        number = functools.reduce(jnp.add, same, jnp.int32(0))
        return jnp.asarray(self.table)[jnp.asarray(chosen[x].q_chunk, jnp.int32), number]


class MergedPasses(NamedTuple):
    """The passes of a ring whose kernels merge: `ring.RingPasses` says what they are."""

    shards: Shards

    @property
    def label(self) -> str:
        return "context_parallel_attention"

    @property
    def merging(self) -> ModuleType:
        """The kernels' side."""
        first = self.shards.steps[0].calls[0]
        row = self.shards.decide(part_of(self.shards, first))
        module = None if row is None else row.merging()
        assert module is not None, "`why_not` was not asked"
        return module

    def forward(self, operands: Operands) -> Results[Array]:
        spec, pieces = self.shards.spec, Pieces.of(self.shards)
        size = self.shards.chunking.chunk_len
        rows = pieces.number * size
        stats = no_stats((spec.batch, spec.q_heads, 2, rows), spec.acc_dtype)

        def compute(travelling: list[Array], state: Results[Array] | None, call: Call,
                    chosen: list[Chosen]) -> tuple[Results[Array] | None, list[Array]]:
            k, v = travelling
            given = operands.q, k, v, self._places(chosen, pieces), stats if state is None else state
            run = self.merging.first_part if state is None else self.merging.forward
            with device.on(self.shards.device):
                return run(part_of(self.shards, call), *sharding.vary_together(given)), []

        nothing: Results[Array] | None = None
        found, _ = self._around(compute, operands, nothing, [], functools.partial(self._joined, pieces=pieces))
        return found

    def _joined(self, state: Results[Array] | None, pieces: Pieces) -> Results[Array]:
        """The results of all queries, from the pieces of the state. Rows that have met no key were not written."""
        assert state is not None, "there are no pairs"
        is_empty = (state.stats[:, :, 0] == -jnp.inf).swapaxes(1, 2)[..., None]
        state = state._replace(out=jnp.where(is_empty, jnp.zeros_like(state.out), state.out))
        joined = [functools.reduce(functools.partial(merged, unit=self.shards.unit), own)
                  for own in self._pieces(state, pieces)]
        return Results(out=jnp.concatenate([x.out.astype(self.shards.spec.dtype) for x in joined], axis=1),
                       stats=jnp.concatenate([x.stats for x in joined], axis=3))

    def _pieces(self, state: Results[Array], pieces: Pieces) -> list[list[Results[Array]]]:
        """The pieces of each chunk of queries."""
        size = self.shards.chunking.chunk_len
        return [[Results(out=pick_rows(state.out, int(number) * size, size, 1),
                         stats=pick_rows(state.stats, int(number) * size, size, 3)) for number in own if number >= 0]
                for own in pieces.table]

    def backward(self, operands: Operands, results: Results[Array], cotangents: Results[Array]) -> Gradients[Array]:
        spec, pieces = self.shards.spec, Pieces.of(self.shards)
        # Else the first hop is that of the forward, and XLA keeps what it brought.
        k, v, dout = lax.optimization_barrier((operands.k, operands.v, cotangents.out))
        operands, cotangents = operands._replace(k=k, v=v), cotangents._replace(out=dout)
        results, cotangents = autodiff.without_out(spec, results, cotangents)  # delta, once for all steps
        with device.on(self.shards.device):
            first = self.merging.sums(spec, *sharding.vary_together((results.stats, cotangents.stats)))

        def compute(travelling: list[Array], dq: Array, call: Call,
                    chosen: list[Chosen]) -> tuple[Array, list[Array]]:
            k, v = travelling
            given, places, state = sharding.vary_together(
                ((operands.q, k, v, dout), self._places(chosen, pieces), first._replace(dq=dq)))
            with device.on(self.shards.device):
                dk, dv, found = self.merging.backward(part_of(self.shards, call), given, places, state)
            return found.dq, [dk, dv]

        def finish(dq: Array) -> Array:
            with device.on(self.shards.device):
                found: Array = self.merging.dq(spec, first._replace(dq=dq))
            return found

        zeros = [compat.vary_like(jnp.zeros(x.shape, spec.acc_dtype), operands, results, cotangents) for x in (k, v)]
        dq, (dk, dv) = self._around(compute, operands, first.dq, zeros, finish)
        return Gradients(dq=dq, dk=dk.astype(k.dtype), dv=dv.astype(v.dtype), dbias=None, dscore=())

    def _places(self, chosen: list[Chosen], pieces: Pieces) -> Array:
        """Where the rows of each pair lie, for each batch entry: int32 (pairs batch, 4), see `places.Place`."""
        size, batch = self.shards.chunking.chunk_len, self.shards.spec.batch
        entries = jnp.arange(batch, dtype=jnp.int32)
        found = [jnp.stack([entries, *(jnp.broadcast_to(jnp.asarray(chunk, jnp.int32) * size, (batch,)) for chunk in (
            pick.q_chunk, pick.kv_chunk, pieces.piece(chosen, x)))], axis=1) for x, pick in enumerate(chosen)]
        return jnp.concatenate(found)

    def _around[S, R](self, compute: unrolled.Compute[S], operands: Operands, state: S, sums: list[Array],
                      finish: Callable[[S], R]) -> tuple[R, list[Array]]:
        return unrolled.around(self.shards, compute, self.shards.travelling(operands), state, sums, finish)
