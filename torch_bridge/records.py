"""What ran where and why, counted: `report()`.

A plan counts its own runs (exchange.py), so that a call adds one to a number and builds no text. Texts are
made when a plan runs for the first time. Nothing here imports JAX.
"""

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

__all__ = ["MAX_ROWS", "Report", "Row", "Runs", "count", "report"]

MAX_ROWS = 1024
"""Rows with a problem of their own; further problems share one row for each pass and implementation."""
OTHER_PROBLEMS = "other problems"


class Row(NamedTuple):
    """How often one thing ran."""

    calls: int
    what: str
    """The pass: "forward", "backward", "double backward", "row anchor", "decode" (the forward of a cache). Or what else
    was done for a call: "mask"."""
    implementation: str
    """Of pallas_flash: "hopper", "ampere", "xla" or "reference"; "torch": a call was left to PyTorch's own function; of
    a mask "dense": it was written out."""
    problem: str
    """Shapes, dtype, mask and options."""
    reasons: tuple[str, ...]
    """Why not another implementation; and, on a GPU, why the launches are not direct, as it was in the first call."""


class Report(tuple[Row, ...]):
    """The rows with the most calls first; as text, a table with the reasons below each row."""

    __slots__ = ()

    def __str__(self) -> str:
        if not self:
            return "nothing has run"
        lines = []
        for row in self:
            lines.append(f"{row.calls:>9,}  {row.what}, {row.implementation}: {row.problem}")
            lines.extend(f"{'':>9}    {reason}" for reason in row.reasons)
        return "\n".join(lines)


class _Tally:
    """A row that is counted: by one step of an iterator of C, which no other thread can come between under the GIL. A
    lock takes six times as long, and that twice a training step. `_lock` is held where it is read.
    """

    __slots__ = ("_before", "add", "name")

    def __init__(self, name: tuple[str, str, str, tuple[str, ...]]) -> None:
        self.name, self._before = name, 0  # the numbers that are no calls of this report
        self.add: Callable[[], object] = itertools.count().__next__
        """Counts one run."""

    def read(self, reset: bool = False) -> int:
        """The runs so far; from now on, with `reset`. To be told is a step as well, which is left out."""
        number = self.add()
        assert isinstance(number, int)
        found = number - self._before
        self._before = number + 1 if reset else self._before + 1
        return found


_tallies: dict[tuple[str, str, str, tuple[str, ...]], _Tally] = {}
_lock = threading.Lock()


def _tally(what: str, implementation: str, problem: str, reasons: tuple[str, ...]) -> _Tally:
    name = (what, implementation, problem, reasons)
    if name not in _tallies and len(_tallies) >= MAX_ROWS:
        name = (what, implementation, OTHER_PROBLEMS, ())
    return _tallies.setdefault(name, _Tally(name))


def count(what: str, implementation: str, problem: str, reasons: Sequence[str]) -> None:
    """Counts something that has no plan."""
    with _lock:
        tally = _tally(what, implementation, problem, tuple(reasons))
    tally.add()


class Runs:
    """The runs of one problem in one implementation.

    Args:
      problem: its str() is the row's text.
      implementation: its name.
      reasons: of each implementation that cannot run the problem, why.
      others: what else is a reason, as text.
    """

    def __init__(self, problem: object, implementation: str, reasons: Mapping[str, Sequence[str]],
                 others: tuple[str, ...] = ()) -> None:
        self._problem, self._implementation, self._reasons, self._others = problem, implementation, reasons, others
        self._tallies: dict[str, _Tally] = {}

    def count(self, what: str) -> None:
        """Counts one run of that pass."""
        self.counter(what)()

    def counter(self, what: str) -> Callable[[], object]:
        """What counts one run of that pass."""
        tally = self._tallies.get(what)
        if tally is None:
            reasons = tuple(f"not {name!r}: {'; '.join(found)}" for name, found in self._reasons.items() if found)
            with _lock:
                tally = self._tallies.setdefault(what, _tally(what, self._implementation, str(self._problem),
                                                              (*reasons, *self._others)))
        return tally.add


def report(*, reset: bool = False) -> Report:
    """What this process has run through torch_bridge, how often, where and why: printed, a table.

    Counted are the passes that computed something: forward, backward and double backward, of eager and of compiled
    calls (a replayed CUDA graph is none); calls that `patched()` left to PyTorch's own function, with the reason; and
    masks of `torch_bridge.transformers` that had to be written out. A call without an output element runs nothing.

    Args:
      reset: starts again at zero after this report.

    Returns:
      A tuple of rows (calls, what, implementation, problem, reasons), the most calls first. It holds at most 1,024
      problems; those seen later are counted together, as "other problems".
    """
    with _lock:
        found = [(tally.read(reset), tally.name) for tally in _tallies.values()]
        rows = [Row(calls, *name) for calls, name in found if calls]
    return Report(sorted(rows, key=lambda row: -row.calls))
