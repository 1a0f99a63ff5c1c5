"""The table of what models ask of attention besides a plain call: records of `bench run --problems features`."""

from collections.abc import Iterator
from typing import Any

from bench import plots, records
from bench.plain import PLAIN
from pallas_flash.testing import problems

__all__ = ["beside_fastest", "rows"]

Record = dict[str, Any]
Newest = dict[tuple[Any, ...], Record]
DIRECTIONS = ("forward", "backward", "both")


def rows(found: list[Record]) -> tuple[list[str], list[list[str]], list[str]]:
    """The header, one row a problem and direction, and notes: why ours has no number."""
    newest = records.latest([r for r in found if r["kind"] in ("feature", "left out")], "problem", "direction", "label")
    measured = {(problem, direction) for problem, direction, _ in newest}
    made, notes = [], dict[str, None]()
    for problem in problems.select(["features"]):
        for direction in DIRECTIONS:
            if (problem.name, direction) in measured:
                made.append([f"`{problem.name}`", direction, *_cells(newest, problem.name, direction)])
                notes |= dict.fromkeys(_refusals(newest, problem.name, direction))
    return ["problem", "direction", "pallas_flash, ms", "of a plain call's speed", "fastest peer", "ms",
            "its time over ours"], made, list(notes)


def _of(newest: Newest, problem: str, direction: str) -> list[Record]:
    return [record for (name, where, _), record in newest.items() if (name, where) == (problem, direction)]


def beside_fastest(found: list[Record]) -> Iterator[tuple[str, str, str, float]]:
    """(problem, direction, label of the fastest peer, its time over ours) of each problem that both ran."""
    newest = records.latest([r for r in found if r["kind"] == "feature"], "problem", "direction", "label")
    for problem, direction in dict.fromkeys(key[:2] for key in newest):
        mine, peer = _pair(newest, problem, direction)
        if mine and peer and (ratio := _ratio(peer, mine)):
            yield problem, direction, peer["label"], ratio


def _pair(newest: Newest, problem: str, direction: str) -> tuple[Record | None, Record | None]:
    """Ours, and the fastest peer."""
    timed = {r["contestant"]: r for r in _of(newest, problem, direction) if r["kind"] == "feature"}
    ours = next((name for name in plots.OURS if name in timed), None)
    peers = [r for name, r in timed.items() if name not in (*plots.OURS, PLAIN.name)]
    return timed.get(ours), min(peers, key=lambda r: r["median_us"], default=None)


def _cells(newest: Newest, problem: str, direction: str) -> list[str]:
    mine, peer = _pair(newest, problem, direction)
    left = mine and mine.get("of_plain")
    return [_ms(mine), f"{left['median']:.2f}" if left else "–", peer["label"] if peer else "–", _ms(peer),
            _over(peer, mine)]


def _over(peer: Record | None, mine: Record | None) -> str:
    """A peer's time over ours: the ratio that interleaved rounds have, or of medians where it was not timed again."""
    ratio = None if peer is None or mine is None else _ratio(peer, mine)
    if ratio is None or peer is None or mine is None:
        return "–"
    return f"{ratio:.2f}" + ("" if _in_one_run(peer, mine) else ", of two runs")


def _in_one_run(peer: Record, mine: Record) -> bool:
    return bool(peer["environment"]["commit"] == mine["environment"]["commit"])


def _ratio(peer: Record, mine: Record) -> float | None:
    if not _in_one_run(peer, mine):
        return float(peer["median_us"] / mine["median_us"])
    over = peer["ratio_to"].get(mine["contestant"])
    return float(over["median"]) if over else None


def _ms(record: Record | None) -> str:
    return f"{record['median_us'] / 1e3:.3f}" if record else "–"


def _refusals(newest: Newest, problem: str, direction: str) -> list[str]:
    """Why an implementation of ours was not timed."""
    ours = {f"pallas_flash ({name})" for name in plots.OURS}
    return [f"`{problem}`: {r['label']}: {r['reason']}" for r in _of(newest, problem, direction)
            if r["kind"] == "left out" and r["label"] in ours]
