"""What the machine code of a kernel does in the loops that multiply, read from the text that nvdisasm makes of it."""

import re
from collections.abc import Iterator

__all__ = ["hot_loops", "moved_descriptors", "spills_inside"]

MOVED = re.compile(r"\bR2UR\b")
SPILLED = re.compile(r"\b(STL|LDL)\b")


def hot_loops(text: str, product: str = "HGMMA") -> list[list[str]]:
    """The instructions of each innermost loop that multiplies: it holds that instruction, and no other loop.

    A loop reaches from a label to a jump back to it. What stands behind the kernel and jumps back into a loop (spinning
    on a barrier) makes a longer interval around the loop, never a shorter one within.
    """
    lines, spans = text.splitlines(), list(_loops(text))
    inside = lambda a, b: a != b and b[0] <= a[0] and a[1] <= b[1]
    innermost = [span for span in spans if not any(inside(other, span) for other in spans)]
    bodies = [lines[first:last + 1] for first, last in innermost]
    return [body for body in bodies if any(product in line for line in body)]


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
