"""How long calls take, side by side.

Bursts of calls, interleaved round by round so that every contestant meets the same clocks; ratios within a round.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["Call", "Spread", "burst", "host_seconds", "interleaved", "ratios", "spread"]

Clock = Callable[[], float]


class Call(NamedTuple):
    """Something to time."""

    start: Callable[[], Any]
    """Begins the computation, and returns what it gives."""
    wait: Callable[[Any], Any]
    """Returns once what `start` returned, and everything begun before, is finished."""
    count: int = 1
    """How many computations one start begins; times are those of one."""

    def finish(self) -> Any:
        """Runs the call to its end."""
        result = self.start()
        self.wait(result)
        return result


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float


def spread(values: list[float]) -> Spread:
    """Median and quartiles of some values."""
    if len(values) == 1:
        return Spread(*values, *values, *values)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def burst(call: Call, seconds: float, clock: Clock = time.perf_counter) -> float:
    """Seconds a computation, over as many calls in a row as take about `seconds`; a longer call is a burst alone."""
    begin = clock()
    call.finish()
    once = clock() - begin
    if once >= seconds:
        return once / call.count
    count = int(seconds / max(once, 1e-9))
    begin, result = clock(), None
    for _ in range(count):
        result = call.start()
    call.wait(result)
    return (clock() - begin) / count / call.count


def interleaved(calls: dict[str, Call], rounds: int, seconds: float, clock: Clock = time.perf_counter,
                after_round: Callable[[], Any] = lambda: None) -> dict[str, list[float]]:
    """Seconds a computation of each contestant, one value a round.

    Each round times all of them, one burst each, beginning with another one and in the other direction than the round
    before, so that none always follows the same neighbour.
    """
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for call in calls.values():
        call.finish()
    for i in range(rounds):
        first = i % len(names)
        order = names[first:] + names[:first]
        for name in order if i % 2 == 0 else reversed(order):
            times[name].append(burst(calls[name], seconds, clock))
        after_round()
    return times


def ratios(mine: list[float], other: list[float]) -> Spread:
    """The other's time over mine, round by round: above 1, mine is faster."""
    return spread([b / a for a, b in zip(mine, other, strict=True)])


def host_seconds(call: Call, calls: int = 200, clock: Clock = time.perf_counter) -> float:
    """Median seconds until a call returns to the caller, while the device is never behind by more than one call."""
    taken = []
    for _ in range(calls):
        begin = clock()
        result = call.start()
        taken.append(clock() - begin)
        call.wait(result)
    return statistics.median(taken)
