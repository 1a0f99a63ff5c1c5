"""Where others are faster: for the README, from the same records as the tables of docs/benchmarks.md."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from bench import cache_report, feature_report, plots, records

__all__ = ["rows", "sentence"]

Record = dict[str, Any]
DIRECTIONS = ("forward", "backward", "both")
COUNTS = 1.005
"""Our time over another's from which on a row is shown."""
OF_FEATURES = {
    "ragged-ids": "5 uneven documents in each row, `segment_ids`",
    "ragged-packed": "5 uneven documents in each row, `cu_seqlens`",
    "documents-ids": "4 equal documents in each row, `segment_ids`",
    "documents-packed": "4 equal documents in each row, `cu_seqlens`",
    "bias-gradient": "a bias of pairs, with its gradient", "sinks": "attention sinks"}
"""What the problems whose names begin so are; others are shown by name."""


class Time(NamedTuple):
    """Our time over another's."""

    call: str
    beside: str
    direction: str
    ratio: float


def rows(found: list[Record]) -> tuple[list[str], list[list[str]]]:
    """The header, and one row for each kind of call and library that is faster at one of these in a direction: our time
    over its time, of the kind's worst call.

    Args:
      found: records of one device.
    """
    times = [*_plain(found), *_features(found), *_decoding(found), *_host(found)]
    made = []
    for call, beside in dict.fromkeys((time.call, time.beside) for time in times):
        of_row = [time for time in times if (time.call, time.beside) == (call, beside)]
        worst = {direction: max((time.ratio for time in of_row if time.direction == direction), default=0.0)
                 for direction in DIRECTIONS}
        if max(worst.values()) >= COUNTS:
            made.append([call, beside, *(f"{ratio:.2f}" if ratio else "–" for ratio in worst.values())])
    return ["call", "beside", *DIRECTIONS], made


def sentence(found: list[Record], peer: str = "fa3") -> str | None:
    """The range of our time over a peer's, forward and backward, in plain calls; None without records of both."""
    times = [*_speeds(found, peer)]
    if not times:
        return None
    forward, backward = (f"{min(ratios):.2f} to {max(ratios):.2f}" for direction in ("forward", "backward")
                         for ratios in ([time.ratio for time in times if time.direction == direction],))
    return (f"On an {found[-1]['environment']['device']}, the forward takes {forward} of {times[0].beside}'s time in "
            f"calls with a causal or no mask, the backward {backward}.")


def _speeds(found: list[Record], *contestants: str) -> Iterator[Time]:
    """Plain calls, beside these."""
    chosen = [r for r in found if r["kind"] == "speed" and r["direction"] in ("forward", "backward")]
    ours = next((name for name in plots.OURS if name in {r["contestant"] for r in chosen}), None)
    for (_, direction, name), record in records.latest(chosen, "problem", "direction", "contestant").items():
        if name in contestants and ours in record["ratio_to"]:
            yield Time("plain calls", record["label"], direction, 1 / record["ratio_to"][ours]["median"])


def _plain(found: list[Record]) -> Iterator[Time]:
    peers = {r["contestant"] for r in found if r["kind"] == "speed"} - {*plots.OURS}
    yield from _speeds(found, *peers)


def _features(found: list[Record]) -> Iterator[Time]:
    for problem, direction, label, over in feature_report.beside_fastest(found):
        name = next((text for start, text in OF_FEATURES.items() if problem.startswith(start)), f"`{problem}`")
        yield Time(name, label, direction, 1 / over)


def _decoding(found: list[Record]) -> Iterator[Time]:
    for record in records.latest([r for r in found if r["kind"] == "decode"], "problem").values():
        if ratio := cache_report.over(record, "torch"):
            yield Time("a few queries to a contiguous cache", "PyTorch", "forward", 1 / ratio)


def _host(found: list[Record]) -> Iterator[Time]:
    """Of the smallest call, eager: what the host does. The forward in both also records a gradient."""
    directions = {"forward": "forward", ".backward()": "backward", "forward and .backward()": "both"}
    chosen = [r for r in found if r["kind"] == "bridge-path" and r["path"] == "direct" and "host_us" in r
              and r["what"] in directions]
    for record in records.latest(chosen, "what").values():
        yield Time("the host's time of a small call from PyTorch; forward: without a gradient", "PyTorch",
                   directions[record["what"]], record["over_torch"]["median"])
