"""What a scheduled XLA:GPU program sends between devices and when, read from its text.

A collective is asynchronous if it is a pair of operations, start and done, that is not marked as synchronous: what
stands between them runs meanwhile. What a loop does counts as often as the loop runs.
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Program", "Traffic"]

COLLECTIVES = ("collective-permute", "all-gather", "all-to-all", "reduce-scatter", "all-reduce")
ITEMSIZE = dict(pred=1, s8=1, u8=1, bf16=2, f16=2, s16=2, u16=2, f32=4, s32=4, u32=4, f64=8, s64=8, u64=8)
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id", "while", "call",
        "conditional")
KERNEL = 'custom_call_target="mosaic'


class Operation(NamedTuple):
    """One line of a computation."""

    name: str
    kind: str
    type: str
    line: str

    @property
    def size(self) -> int:
        """Bytes of the result; of all parts of a tuple."""
        sizes = [(ITEMSIZE[dtype], shape) for dtype, shape in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", self.type)]
        total = 0
        for bytes_, shape in sizes:
            for extent in filter(None, shape.split(",")):
                bytes_ *= int(extent)
            total += bytes_
        return total

    @property
    def called(self) -> list[str]:
        """The computations that it runs, without the condition of a loop."""
        found = re.findall(r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)", self.line)
        for names in re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}", self.line):
            found += [name.strip().lstrip("%") for name in names.split(",")]
        return found

    @property
    def times(self) -> int:
        """How often it runs what it calls; loops whose length is not known count once."""
        count = re.search(r'known_trip_count":\{"n":"(\d+)"', self.line)
        return int(count[1]) if count else 1


class Traffic(NamedTuple):
    """The collectives of one kind: how many run synchronously, how many not, how many of those around a kernel, and
    bytes that a device sends."""

    synchronous: int
    asynchronous: int
    around_kernels: int
    sent: int


class Program:
    """A compiled program for n devices."""

    def __init__(self, text: str, n: int):
        self.n = n
        self.computations: dict[str, list[Operation]] = {}
        self.entry = ""
        for block in re.split(r"\n(?=(?:ENTRY )?%[\w.\-]+ \()", text):
            if head := re.match(r"(ENTRY )?%([\w.\-]+) \(", block):
                self.computations[head[2]] = list(_operations(block))
                self.entry = head[2] if head[1] else self.entry

    def traffic(self) -> dict[str, Traffic]:
        """The traffic of each kind of collective that there is."""
        counts: dict[str, Counter[str]] = {}
        for times, operations in self._runs(self.entry, 1):
            for i, operation in enumerate(operations):
                if (kind := self._collective(operation)) is None:
                    continue
                done = next((j for j, other in enumerate(operations[i:], i)
                             if other.kind.endswith("-done") and re.search(rf"\(%{re.escape(operation.name)}\)",
                                                                           other.line)), i)
                synchronous = done == i or '"is_sync":true' in operation.line
                around = any(self.kernels_of(other) for other in operations[i + 1:done])
                counts.setdefault(kind, Counter()).update({
                    "synchronous": times * synchronous, "asynchronous": times * (not synchronous),
                    "around_kernels": times * (not synchronous and around),
                    "sent": times * self._sent(kind, operations[done].size)})
        return {kind: Traffic(**{field: found[field] for field in Traffic._fields}) for kind, found in counts.items()}

    def kernels(self) -> int:
        """How many Mosaic kernels a device runs; of branches, those of one that has the most."""
        return sum(map(self.kernels_of, self.computations[self.entry]))

    def kernels_of(self, operation: Operation) -> int:
        """How many Mosaic kernels an operation runs."""
        if KERNEL in operation.line:
            return 1
        inside = [sum(map(self.kernels_of, self.computations[name])) for name in operation.called]
        return operation.times * (max(inside) if operation.kind == "conditional" else sum(inside))

    def written(self) -> int:
        """Bytes that a device writes beside kernels and collectives; of an update in place, what is new."""
        return sum(times * self._written(operation) for times, operations in self._runs(self.entry, 1)
                   for operation in operations)

    def _written(self, operation: Operation) -> int:
        aside = operation.kind in FREE or operation.kind.endswith("-done") or self._collective(operation)
        if aside or self.kernels_of(operation):
            return 0
        if not operation.called:
            return operation.size
        inside = {found.name: found for found in self.computations[operation.called[0]]}

        def of(found: Operation) -> int:
            operands = [inside[name] for name in re.findall(r"%([\w.\-]+)", found.line.split("(", 1)[1])
                        if name in inside and name != found.name]
            if found.kind in ("tuple", "bitcast"):
                return sum(map(of, operands))
            return operands[1].size if found.kind == "dynamic-update-slice" else found.size
        return of(list(inside.values())[-1])

    def _runs(self, name: str, times: int) -> Iterator[tuple[int, list[Operation]]]:
        """Every computation that is run, with how often; not what an asynchronous pair or a fusion wraps."""
        yield times, self.computations[name]
        for operation in self.computations[name]:
            if operation.kind in ("while", "call", "conditional"):
                for called in operation.called:
                    yield from self._runs(called, times * operation.times)

    def _collective(self, operation: Operation) -> str | None:
        if operation.kind.removesuffix("-start") in COLLECTIVES:
            return operation.kind.removesuffix("-start")
        if operation.kind != "async-start":
            return None
        wrapped = [other.kind for name in operation.called for other in self.computations[name]]
        return next((kind for kind in wrapped if kind in COLLECTIVES), None)

    def _sent(self, kind: str, size: int) -> int:
        """What a device sends, from the size of its result: of what it keeps, nothing is sent."""
        others = {"collective-permute": self.n, "reduce-scatter": self.n * (self.n - 1),
                  "all-reduce": 2 * (self.n - 1)}
        return size * others.get(kind, self.n - 1) // self.n


def _operations(block: str) -> Iterator[Operation]:
    for line in block.splitlines():
        if found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?)\s([\w\-]+)\(", line):
            yield Operation(found[1], found[3], found[2], line)
