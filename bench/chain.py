"""N calls one after another in one executable, for calls so short that the gap between two executables counts.

A call of 100 us loses a tenth of that between the end of one executable and the beginning of the next; N calls in one
executable have no such gaps. `optimization_barrier` keeps the N calls apart and in order: it takes the results of a
call together with the arguments of the next and returns all of them unchanged, and XLA neither merges nor moves
anything across it. In the executable it is nothing: no kernel, no copy. (Zero times an element of the results, added to
an argument, would be a kernel of its own.) Both sides have to be used, or XLA removes one: the next call uses the
arguments, and all results are returned. Without barriers XLA computes once what N equal calls ask for.

Compiled for an H100 (jax 0.11.2), 16 forwards are 16 launches in sequence and nothing else. What depends on no argument
may be made once for all calls: of our backward, zeros of 2 MiB in 16,384 tokens.
"""

from collections.abc import Callable
from typing import Any

import jax

__all__ = ["CALLS", "LENGTH", "SECONDS", "chained", "length"]

CALLS = 16
"""Calls in a chain: the gap is left once for all of them."""
LENGTH = 1024
"""The longest keys whose problems are always timed in chains..."""
SECONDS = 200e-6
"""... and the time under which a call of any problem is."""


def chained(function: Callable[..., Any], count: int) -> Callable[..., list[Any]]:
    """A function of the same arguments that calls `function` on them `count` times, and returns all results."""
    step = jax.jit(function)  # traced once

    def calls(*args: Any) -> list[Any]:
        results = [step(*args)]
        while len(results) < count:
            args, results[-1] = jax.lax.optimization_barrier((args, results[-1]))
            results.append(step(*args))
        return results
    return calls


def length(kv_len: int, seconds: float, burst_seconds: float) -> int | None:
    """How many calls to chain for a problem whose fastest call takes `seconds`; None: one call is long enough.

    A chain is no longer than a burst is to be.
    """
    count = min(CALLS, int(burst_seconds / seconds))
    return count if count > 1 and (kv_len <= LENGTH or seconds < SECONDS) else None
