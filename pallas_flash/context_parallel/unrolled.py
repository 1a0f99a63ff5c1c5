"""Steps of a ring between whose kernels nothing is copied: for kernels that merge (`merged_ring`).

What travels is one vector of words, as in `hops`, but the sums that belong to keys and values are added where they are:
in the vector that has just arrived, which then travels on as it is. Pairs of all devices take part in every step, so a
vector of keys and sums makes the same hop.

Steps are unrolled. A loop begins each round with what it carries in the same memory, so what a hop has received
elsewhere is copied there; one after the other, two vectors take turns. `hops` has loops because XLA, merging, would
join partial results at the end and keep all of them; here it has nothing to join. Programs grow with the steps, so a
long ring is a loop of `ROUND` steps a round, which take turns as well.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_flash.arrays import Array
from pallas_flash.context_parallel import hops
from pallas_flash.context_parallel.hops import Chosen, Ring
from pallas_flash.context_parallel.plan import Call, Chunking, Step
from pallas_flash.context_parallel.shards import Shards

__all__ = ["LONGEST", "Compute", "around", "why_not"]

LONGEST = 8
"""So many equal steps in a row are unrolled; a loop has the others."""
ROUND = 2
"""Steps in a round of a loop."""

type Compute[S] = Callable[[list[Array], S, Call, list[Chosen]], tuple[S, list[Array]]]
"""(travelling arrays, state, call, its pairs) -> (state, and for each of the sums its terms: the rows of the call's
pairs, one pair after the other in the batch)."""


def why_not(steps: Sequence[Step]) -> list[str]:
    """The reasons why steps are not to be run by `around`; empty: they are."""
    distances = [step.distance for step in steps]
    lacking = any(0 in pick.needed for step in steps for call in step.calls for pick in call.picks)
    rules = ((distances == list(range(len(steps))), "steps are left out"),
             (not lacking, "some devices lack pairs that others have"))
    return [reason for holds, reason in rules if not holds]


def around[S, R](shards: Shards, compute: Compute[S], travelling: Sequence[Array], state: S, sums: Sequence[Array],
                 finish: Callable[[S], R]) -> tuple[R, list[Array]]:
    """What `finish` makes of the state after all steps, while the sums go home; and `sums`, which belong to the
    travelling arrays, back at their device.

    Args:
      travelling: (batch, length, ...), of one dtype of 16 bits, in pairs of words.
      sums: zeros (batch, length, ...) in float32; none in a forward.
    """
    ring, steps = shards.ring, shards.steps
    passing = _Passing(ring, shards.chunking, compute, travelling, sums)
    carry = _in_words(travelling), state
    for run, is_first, is_last in _runs(steps):
        if is_first or is_last or len(run) <= LONGEST:
            for step in run:
                carry = passing.step(carry, [step], hops.rows(step), is_first, is_last)
        else:
            rows = [jnp.stack(xs) for xs in zip(*map(hops.rows, run))]
            carry, _ = lax.scan(lambda carry, row, run=run: (  # type: ignore[misc]
                passing.step(carry, run, row, is_first=False, is_last=False), None), carry, rows, unroll=ROUND)
    vector, state = lax.optimization_barrier(carry)
    home = ring.rotated(vector, ring.num_devices - steps[-1].distance) if sums else vector
    home, found = lax.optimization_barrier((home, finish(state)))  # between the two barriers both run side by side
    return found, passing.arrays_of_sums(home)


def _runs(steps: Sequence[Step]) -> Iterator[tuple[Sequence[Step], bool, bool]]:
    """Equal steps in a row, whether they are the first, and whether the last: these two are never equal to others."""
    last = len(steps) - 1

    def kind(t: int) -> object:
        return t == 0, t == last, [(call.mask, call.num_chunks, len(call.picks)) for call in steps[t].calls]
    for _, group in itertools.groupby(range(len(steps)), kind):
        found = list(group)
        yield [steps[t] for t in found], found[0] == 0, found[-1] == last


def _in_words(arrays: Sequence[Array]) -> Array:
    """Arrays of 16 bits as one vector of float32 words, which nothing computes with."""
    flat = jnp.concatenate([x.ravel() for x in arrays])
    return lax.bitcast_convert_type(flat.reshape(-1, 2), jnp.float32)


class _Passing[S](NamedTuple):
    """What all steps have in common.

    The vector is (words,) float32: the travelling arrays, and behind them, once there are any, the sums, each as
    (chunks, batch, rows of a chunk, ...), so that a chunk is a piece of the vector.
    """

    ring: Ring
    chunking: Chunking
    compute: Compute[S]
    like: Sequence[Array]  # what travels
    sums: Sequence[Array]

    def step(self, carry: tuple[Array, S], run: Sequence[Step], rows: list[Array], is_first: bool,
             is_last: bool) -> tuple[Array, S]:
        """A step; `run` are the steps that are the same but for `rows`, the numbers of its pairs.

        While its kernels run, the vector travels; the last time without its keys. A barrier keeps hops from running
        ahead.
        """
        vector, state = lax.optimization_barrier(carry)
        leaving = vector[self._num_words:] if is_last else vector
        coming = self.ring.rotated(leaving, 1) if leaving.size else leaving
        arrays = self._travelling(vector)
        for x, call in enumerate(run[0].calls):
            chosen = hops.chosen(self.ring, run, x, rows[x])
            state, terms = self.compute(arrays, state, call, chosen)
            if is_first and x == 0:
                whole = len(chosen) == 1 and [part.shape for part in terms] == [x.shape for x in self.sums]
                coming = jnp.concatenate([coming, *map(self._by_chunks, terms if whole else self.sums)])
                if whole:
                    continue
            coming = self._added(coming, terms, chosen)
        return coming, state

    @property
    def _num_words(self) -> int:
        """Of the travelling arrays."""
        return sum(x.size for x in self.like) // 2

    def _travelling(self, vector: Array) -> list[Array]:
        found, at = [], 0
        for x in self.like:  # each a slice of the vector itself, which kernels read where it lies
            words = vector[at:at + x.size // 2]
            found.append(lax.bitcast_convert_type(words, x.dtype).reshape(x.shape))
            at += words.size
        return found

    def _added(self, vector: Array, terms: Sequence[Array], chosen: Sequence[Chosen]) -> Array:
        """The vector with the terms of a call added to its sums, in place: where XLA knows a start, it copies all."""
        at = vector.size - sum(x.size for x in self.sums)
        for total, parts in zip(self.sums, terms, strict=True):
            of_chunk = total.size // len(self.chunking.chunks(0))
            for pick, part in zip(chosen, jnp.split(parts, len(chosen)), strict=True):
                term = self._by_chunks(part)
                start = lax.optimization_barrier(jnp.asarray(at + pick.kv_chunk * of_chunk, jnp.int32))
                before = lax.dynamic_slice(vector, (start,), term.shape)
                vector = lax.dynamic_update_slice(vector, before + term, (start,))
            at += total.size
        return vector

    def _by_chunks(self, x: Array) -> Array:
        """(batch, rows, ...) as a vector, one chunk after the other."""
        size = self.chunking.chunk_len
        return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1).ravel()

    def arrays_of_sums(self, vector: Array) -> list[Array]:
        """The sums (batch, length, ...) at the end of a vector."""
        found, at, size = [], vector.size - sum(x.size for x in self.sums), self.chunking.chunk_len
        for x in self.sums:
            chunks = vector[at:at + x.size].reshape(-1, x.shape[0], size, *x.shape[2:])
            found.append(chunks.swapaxes(0, 1).reshape(x.shape))
            at += x.size
        return found
