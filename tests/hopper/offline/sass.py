"""What the machine code of a kernel does in the loops that multiply, and whether the loads by TMA have their operands,
read from the text that nvdisasm makes of it.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["hot_loops", "moved_descriptors", "spills_inside", "unset_loads"]

MOVED = re.compile(r"\bR2UR\b")
SPILLED = re.compile(r"\b(STL|LDL)\b")


def hot_loops(text: str, product: str = "HGMMA") -> list[list[str]]:
    """The instructions of each innermost loop that multiplies: it holds that instruction, and no other loop; with
    mma.sync no other one that multiplies, as a step may wait in a loop for another block.

    A loop reaches from a label to a jump back to it. What stands behind the kernel and jumps back into a loop (spinning
    on a barrier) makes a longer interval around the loop, never a shorter one within.
    """
    lines = text.splitlines()
    multiplies = lambda span: any(product in line for line in lines[span[0]:span[1] + 1])
    spans = [span for span in _loops(text) if product != "HMMA" or multiplies(span)]
    inside = lambda a, b: a != b and b[0] <= a[0] and a[1] <= b[1]
    innermost = [span for span in spans if not any(inside(other, span) for other in spans)]
    return [lines[first:last + 1] for first, last in innermost if multiplies((first, last))]


def _loops(text: str) -> Iterator[tuple[int, int]]:
    labels: dict[str, int] = {}
    for i, line in enumerate(text.splitlines()):
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = i
        elif (jump := re.search(r"\bBRA.*`\((\.L_x_\d+)\)", line)) and jump[1] in labels:
            yield labels[jump[1]], i


def _most(text: str, wanted: re.Pattern[str], product: str = "HGMMA") -> int | None:
    counts = [sum(bool(wanted.search(line)) for line in loop) for loop in hot_loops(text, product)]
    return max(counts, default=None)


def moved_descriptors(text: str) -> int | None:
    """R2UR in a hot loop, the worst if there are several; None without such a loop.

    A wgmma takes its descriptors from uniform registers; where the compiler cannot keep them there, each step moves
    them.
    """
    return _most(text, MOVED)


def spills_inside(text: str, product: str = "HGMMA") -> int | None:
    """Loads and stores of spilled registers in a hot loop, the worst if there are several; None without such a loop."""
    return _most(text, SPILLED, product)


# -- operands of loads by TMA ----------------------------------------------------------------------------------------

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;?\s*$")
LABEL = re.compile(r"\s*(\.L_x_\d+):")
LOAD = re.compile(r"\[UR(\d+)\], \[UR(\d+)\]")


class Instruction(NamedTuple):
    """A line of machine code."""

    address: str
    predicate: str | None
    name: str
    operands: str

    @property
    def written(self) -> frozenset[int]:
        """The uniform registers that it writes whatever its predicate is: that of R2UR chooses among threads."""
        first = next((x for x in self.operands.split(", ") if not re.fullmatch(r"!?U?P[0-9T]", x)), "")
        found = re.fullmatch(r"UR(\d+)", first)
        if found is None or (self.predicate and self.name != "R2UR") or self.name.startswith(("UTMA", "SYNCS")):
            return frozenset()
        size = 4 if ".128" in self.name else 2 if ".64" in self.name or ".WIDE" in self.name else 1
        return frozenset(range(int(found[1]), int(found[1]) + size))

    @property
    def loaded_from(self) -> frozenset[int]:
        """Of a load by TMA, the uniform registers that say what it loads: the address of the target, the barrier and
        a coordinate for each axis; and the address of the array's descriptor. None of them for a predicated one, whose
        registers may be written under another predicate of the same value.
        """
        if not self.name.startswith("UTMALDG") or self.predicate:
            return frozenset()
        (target, array), axes = map(int, LOAD.match(self.operands).groups()), re.search(r"\.(\d)D", self.name)
        return frozenset((*range(target, target + 2 + int(axes[1])), array, array + 1))


def unset_loads(text: str) -> list[str]:
    """The loads by TMA, "address: registers", that some path reaches on which a register of theirs is not written."""
    code, labels = _instructions(text)
    written = _written_before(code, labels)
    missing = [(x, sorted(x.loaded_from - before)) for x, before in zip(code, written) if before is not None]
    return [f"{x.address}: {registers}" for x, registers in missing if registers]


def _instructions(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions, and where labels stand among them."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := INSTRUCTION.search(line):
            code.append(Instruction(*found.groups()))
    return code, labels


def _written_before(code: list[Instruction], labels: dict[str, int]) -> list[frozenset[int] | None]:
    """The uniform registers that are written before each instruction on every path to it; None of what is not reached.

    A jump by a table (BRX) is taken to lead to each label that nothing else leads to.
    """
    before: list[frozenset[int] | None] = [None] * len(code)
    todo, by_table = [(0, frozenset[int]())], list[frozenset[int]]()
    while todo:
        i, known = todo.pop()
        while i < len(code):
            seen = before[i]
            known = known if seen is None else known & seen
            if known == seen:
                break
            before[i], instruction = known, code[i]
            known |= instruction.written
            if jump := re.search(r"`\((\.L_x_\d+)\)", instruction.operands):
                todo.append((labels[jump[1]], known))
            if instruction.name.startswith("BRX"):
                by_table.append(known)
            if _ends(instruction):
                break
            i += 1
        if not todo:
            left = sorted(place for place in labels.values() if place < len(code) and before[place] is None)
            todo = [(left[0], known) for known in by_table] if left else []
    return before


def _ends(instruction: Instruction) -> bool:
    """Whether the next instruction is not reached from it."""
    jumps = instruction.name.startswith(("BRA", "BRX", "EXIT"))
    return jumps and not instruction.predicate and not re.match(r"!?U?P\d", instruction.operands)
