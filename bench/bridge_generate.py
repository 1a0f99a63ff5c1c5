"""What the first `generate` of a process takes beside PyTorch's attention: a part of `python -m bench.bridge_step`.

    sdpa            transformers' "sdpa"
    no plans        "pallas" in the first process ever: the folder of plans is empty before
    plans on disk   "pallas" in a process after it

Each in processes of its own (`first_generate.py`), all of which are started before the first is told to go on.
"""

import contextlib
import itertools
import statistics
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from bench.waiting import Waiting
from torch_bridge.direct.attention import VARIABLE
from torch_bridge.direct.cache import VARIABLE as PLANS

__all__ = ["CACHES", "KIND", "WAYS", "measure", "start"]

Record = dict[str, Any]
KIND = "bridge-generate"
CACHES = ("dynamic", "static")
WAYS = {"sdpa": "PyTorch", "no plans": "torch_bridge, first process ever",
        "plans on disk": "torch_bridge, plans on disk"}
WITHIN = 2.0
"""Times the error of "sdpa", the largest that is no fault."""


class Started(NamedTuple):
    """Processes that wait for a word, in the order in which they get it, by (cache, way)."""

    waiting: dict[tuple[str, str], list[Waiting]]
    tokens: int


@contextlib.contextmanager
def start(folder: str, device: str, tokens: int, repeats: int, environment: Mapping[str, str],
          seconds: float) -> Iterator[Started]:
    """Starts all processes, and ends them.

    Args:
      folder: where plans are put: a folder for each cache, empty before.
      repeats: processes of each way but the first ever.
      seconds: after which a process is ended.
    """
    waiting = {(cache, way): [
        Waiting("bench.first_generate", ["sdpa" if way == "sdpa" else "pallas", cache, str(tokens), device],
                {**environment, VARIABLE: "1", PLANS: f"{folder}/{cache}"}, seconds)
        for _ in range(1 if way == "no plans" else repeats)] for cache in CACHES for way in WAYS}
    try:
        yield Started(waiting, tokens)
    finally:
        for process in itertools.chain(*waiting.values()):
            process.end()


def measure(started: Started) -> Iterator[Record]:
    """A record for each cache and way; of several processes the median of each figure."""
    for processes in started.waiting.values():
        for process in processes:
            process.ready()
    for cache in CACHES:
        mine: dict[str, Record] = {}
        for way, label in WAYS.items():
            found = _joined([process.go() for process in started.waiting[cache, way]])
            found = _checked(found, mine.get("sdpa", {}))
            mine[way] = found
            yield {"kind": KIND, "way": way, "label": label, "cache": cache, "tokens": started.tokens, **found,
                   **_beside(found, mine["sdpa"])}


def _joined(found: list[Record]) -> Record:
    if failed := [record for record in found if "reason" in record]:
        return failed[0]
    seconds = {name: [record["seconds"][name] for record in found] for name in found[0]["seconds"]}
    seconds["in all"] = [record["seconds"]["import"] + record["seconds"]["generate"] for record in found]
    return {"seconds": {name: statistics.median(x) for name, x in seconds.items()},
            "seconds_range": {name: [min(x), max(x)] for name, x in seconds.items()}, "processes": len(found),
            "imports_jax": any(record["imports_jax"] for record in found),
            "error": max(record["error"] for record in found),
            "warnings": sorted({text for record in found for text in record["warnings"]})}


def _checked(found: Record, torchs: Record) -> Record:
    """What was found; a reason in its place, if it is of something else."""
    if "reason" in found:
        return found
    if found["warnings"]:
        return {"reason": found["warnings"][0][:300]}
    limit = WITHIN * torchs["error"] if "error" in torchs else float("inf")
    if not found["error"] <= limit:
        return {"reason": f"wrong: a relative error of {found['error']:.1e}, more than {WITHIN:g} times sdpa's, "
                f"{torchs['error']:.1e}"}
    return found


def _beside(found: Record, torchs: Record) -> Record:
    """Over the seconds of "sdpa", and what is more: in all, from the import of torch_bridge on."""
    if "reason" in found or "reason" in torchs:
        return {}
    mine, other = found["seconds"], torchs["seconds"]
    return {"over_sdpa": mine["in all"] / other["in all"], "generate_over_sdpa": mine["generate"] / other["generate"],
            "more_s": mine["in all"] - other["in all"]}
