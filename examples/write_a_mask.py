"""A new kind of mask: causal attention inside chunks of the sequence. One class, and every implementation runs it."""

from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

from pallas_flash import Causal, check_mask, flash_attention
from pallas_flash.masks import Bounds, Mask


@dataclass(frozen=True)
class Chunked(Mask):
    """A query attends to the keys of its own chunk of `size` positions.

    `keep` alone would be right, too; the bounds let tiles be skipped.
    """

    size: int

    def keep(self, q_pos, kv_pos):
        return q_pos // self.size == kv_pos // self.size

    def kv_bounds(self, q_lo, q_hi):
        first, last = q_lo // self.size * self.size, (q_hi - 1) // self.size * self.size  # where their chunks start
        return Bounds(lo=first, full_lo=last, full_hi=first + self.size, hi=last + self.size)

    q_bounds = kv_bounds  # which queries see these keys is the same question


def draw(mask, length, block):
    """One character a pair of positions: # attends, - does not but is computed, a space is skipped with its tile."""
    for q_pos in range(length):
        q_lo = q_pos // block * block
        bounds = mask.kv_bounds(q_lo, q_lo + block)
        row = ""
        for kv_pos in range(length):
            kv_lo = kv_pos // block * block
            skipped = kv_lo + block <= bounds.lo or kv_lo >= bounds.hi
            row += "#" if mask.keep(q_pos, kv_pos) else " " if skipped else "-"
        print("  ", " ".join(row))


def main():
    check_mask(Chunked(10), q_len=24, kv_len=33)  # the bounds agree with keep, for every tile
    print("rows are queries, columns keys: # attends, - does not but is computed, a space is skipped with its tile")
    draw(Chunked(10) & Causal(), length=24, block=4)

    mask = Chunked(100) & Causal()
    q, k, v, dout = jax.random.normal(jax.random.key(0), (4, 1, 300, 2, 64))  # each (batch, length, heads, dim)

    def run(implementation):
        attend = partial(flash_attention, mask=mask, implementation=implementation)
        out, pullback = jax.vjp(attend, q, k, v)
        return out, *pullback(dout)

    for name, ours, exact in zip(["out", "dq", "dk", "dv"], run(None), run("reference")):
        error = np.max(np.abs(ours - exact)) / np.max(np.abs(exact))
        print(f"{name}: relative difference from the reference {error:.1e}")
        assert error < 1e-4


if __name__ == "__main__":
    main()
