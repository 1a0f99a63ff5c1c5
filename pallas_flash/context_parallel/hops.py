"""Arrays that travel around a ring of devices, and steps that compute while they do.

XLA overlaps one collective with compute at a time, so everything that travels is one vector: a hop is one
`collective-permute`. Equal steps in a row are one `lax.scan`: unrolled, XLA starts all hops first and joins all partial
results last, and keeps n copies of both.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_flash.arrays import Array
from pallas_flash.context_parallel.plan import Call, Pick, Step, as_array

__all__ = ["Chosen", "Compute", "Ring", "around", "chosen", "pack", "rows", "unpack"]

Chosen = Pick[int | Array]
"""A pair of this device: numbers where all devices and steps agree, else traced."""


class Ring(NamedTuple):
    """The devices along a mesh axis."""

    axis_name: str
    num_devices: int

    def rotated(self, x: Array, distance: int) -> Array:
        """x of the device `distance` before this one."""
        n = self.num_devices
        if distance % n == 0:
            return x
        moved: Array = lax.ppermute(x, self.axis_name, [(i, (i + distance) % n) for i in range(n)])
        return moved


def pack(arrays: Sequence[Array]) -> Array:
    """All arrays as one vector of 16-bit words, (words,) uint16."""
    words = [x if x.dtype == jnp.uint16 else lax.bitcast_convert_type(x, jnp.uint16) for x in arrays]
    return jnp.concatenate([x.ravel() for x in words])


def unpack(packed: Array, like: Sequence[Array]) -> list[Array]:
    """The arrays again; `like` has their shapes and dtypes."""
    found, at = [], 0
    for x in like:
        per_element = x.dtype.itemsize // 2
        words = packed[at:at + x.size * per_element]
        at += words.size
        shape = (*x.shape, per_element) if per_element > 1 else x.shape
        found.append(words.reshape(shape) if x.dtype == jnp.uint16 else
                     lax.bitcast_convert_type(words.reshape(shape), x.dtype))
    return found


type Carried[S] = tuple[S, list[Array]]
"""What a device keeps, and the sums that belong to the travelling arrays."""

type Compute[S] = Callable[[list[Array], Carried[S], Call, list[Chosen]], Carried[S]]
"""(travelling arrays, carried, call, its pairs) -> carried."""


def around[S](ring: Ring, steps: Sequence[Step], compute: Compute[S], travelling: list[Array], state: S,
              sums: list[Array]) -> Carried[S]:
    """`state` after all steps; and `sums`, which belong to the travelling arrays, back at their device.

    While a step computes, the arrays of the next step travel here and the sums of the last one travel on: the step
    needs neither. A barrier keeps hops from running ahead of it. The first step may begin with a state and sums of
    another structure than it leaves: no loop has it.
    """
    distances = [step.distance for step in steps]

    def hop(t: int) -> int:
        return distances[t + 1] - distances[t] if 0 <= t < len(steps) - 1 else 0

    carry = (ring.rotated(pack(travelling), distances[0]), state, sums)
    t = 0
    while t < len(steps):
        kind = _kind(steps, t, hop)
        end = next((x for x in range(t + 1, len(steps)) if _kind(steps, x, hop) != kind), len(steps))
        run = _OneStep(ring, compute, travelling, steps[t:end], hop(t - 1), hop(t))
        carry = run(carry, rows(steps[t])) if end == t + 1 else run.repeated(carry)
        t = end
    _, state, sums = carry
    home = ring.num_devices - distances[-1]
    return state, unpack(ring.rotated(pack(sums), home), sums) if sums else []


def _kind(steps: Sequence[Step], t: int, hop: Callable[[int], int]) -> object:
    """What steps have in common that are one loop: their calls but for the chunks, and the hops around them."""
    calls = [(call.mask, call.num_chunks, len(call.picks)) for call in steps[t].calls]
    return calls, hop(t - 1), hop(t)


class _OneStep[S](NamedTuple):
    """A step, or equal ones in a row, as a function of what is carried from step to step."""

    ring: Ring
    compute: Compute[S]
    like: list[Array]  # what travels
    steps: Sequence[Step]
    before: int  # how far the sums of the last step travel
    after: int  # how far the arrays of the next step do

    def __call__(self, carry: tuple[Array, S, list[Array]], rows: list[Array]) -> tuple[Array, S, list[Array]]:
        packed, state, sums = lax.optimization_barrier(carry)
        coming, sums_here = self._travel(packed, sums)
        arrays, carried = unpack(packed, self.like), (state, sums_here)
        for x, call in enumerate(self.steps[0].calls):
            carried = self.compute(arrays, carried, call, chosen(self.ring, self.steps, x, rows[x]))
        return coming, *carried

    def repeated(self, carry: tuple[Array, S, list[Array]]) -> tuple[Array, S, list[Array]]:
        """All steps, as a loop."""
        stacked = [jnp.stack(xs) for xs in zip(*map(rows, self.steps))]
        carry, _ = lax.scan(lambda carry, row: (self(carry, row), None), carry, stacked)
        return carry

    def _travel(self, packed: Array, sums: list[Array]) -> tuple[Array, list[Array]]:
        if not sums or self.before != self.after:
            moved = unpack(self.ring.rotated(pack(sums), self.before), sums) if sums else []
            return self.ring.rotated(packed, self.after), moved
        both = self.ring.rotated(jnp.concatenate([packed, pack(sums)]), self.after)
        return both[:packed.size], unpack(both[packed.size:], sums)


def rows(step: Step) -> list[Array]:
    """For each call of a step, the picks of all devices, (pairs, 5, n)."""
    return [jnp.asarray(as_array(call)) for call in step.calls]


def chosen(ring: Ring, steps: Sequence[Step], call: int, row: Array) -> list[Chosen]:
    """The pairs of this device in a call of one of some equal steps, whose `rows` are given; what is the same for all
    devices and steps is a number."""
    index = lax.axis_index(ring.axis_name)
    known = np.stack([as_array(step.calls[call]) for step in steps])  # (steps, pairs, 5, n)

    def number(x: int, y: int) -> int | Array:
        first = known[0, x, y, 0]
        return int(first) if (known[:, x, y] == first).all() else row[x, y][index]
    return [Chosen(*[number(x, y) for y in range(known.shape[2])]) for x in range(known.shape[1])]
