"""Where the numbers of an array lie, as far as it can be told from operations alone: so comparisons, and limits that
change nothing, need no operation. NumPy alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from torch_bridge.direct.plan import Parameter

__all__ = ["ANY", "FLAGS", "Interval", "decided", "of", "of_array", "returned"]


class Interval(NamedTuple):
    """The smallest and the largest value that an element may have."""

    low: int
    high: int


ANY, FLAGS = Interval(-2**31, 2**31 - 1), Interval(0, 1)


def of_array(array: np.ndarray) -> Interval:
    """Of an array that is known."""
    return Interval(int(array.min()), int(array.max())) if array.size else ANY


def of(name: str, given: Sequence[Interval], parameters: Sequence[Parameter]) -> Interval:
    """Of what an operation makes of integers in these intervals (`plan.OPERATIONS`)."""
    a, b = given[0], given[-1]
    match name:
        case "max":
            return Interval(max(a.low, b.low), max(a.high, b.high))
        case "min":
            return Interval(min(a.low, b.low), min(a.high, b.high))
        case "add":
            return _if_exact(a.low + b.low, a.high + b.high)
        case "sub":
            return _if_exact(a.low - b.high, a.high - b.low)
        case "mul":
            products = [x * y for x in a for y in b]
            return _if_exact(min(products), max(products))
        case "div" if b.low == b.high > 0:
            return Interval(_quotient(a.low, b.low), _quotient(a.high, b.low))
        case "where":
            return _union(given[1:])
        case "pad" if isinstance(value := parameters[0], int):
            return _union([a, Interval(int(value), int(value))])
        case "stack" | "concatenate":
            return _union(given)
        case "reshape" | "expand" | "permute" | "slice" | "take" | "amax" | "amin" | "cummax" | "clone":
            return a
        case "to" | "and" | "or" if {*given} == {FLAGS}:
            return FLAGS
    return ANY


def decided(name: str, a: Interval, b: Interval) -> bool | None:
    """What a comparison says of every element; None: it depends."""
    less = True if a.high < b.low else False if a.low >= b.high else None
    at_most = True if a.high <= b.low else False if a.low > b.high else None
    opposite = {True: False, False: True, None: None}
    equal = False if a.high < b.low or b.high < a.low else None
    return {"lt": less, "ge": opposite[less], "le": at_most, "gt": opposite[at_most], "eq": equal,
            "ne": opposite[equal]}.get(name)


def returned(name: str, a: Interval, b: Interval) -> int | None:
    """Which of its operands, 0 or 1, a maximum or minimum always is; None: it depends."""
    if name == "min":
        a, b = (Interval(-x.high, -x.low) for x in (a, b))
    elif name != "max":
        return None
    return 0 if a.low >= b.high else 1 if b.low >= a.high else None


def _if_exact(low: int, high: int) -> Interval:
    """Integers wrap around: then nothing is known."""
    return Interval(low, high) if low >= ANY.low and high <= ANY.high else ANY


def _quotient(a: int, b: int) -> int:
    return a // b if a >= 0 else -(-a // b)


def _union(given: Sequence[Interval]) -> Interval:
    return Interval(min(x.low for x in given), max(x.high for x in given))
