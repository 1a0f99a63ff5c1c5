"""The tables of what a call from PyTorch costs by each way, from the records of `python -m bench.bridge_paths`."""

from collections.abc import Iterator
from typing import Any

__all__ = ["KINDS", "tables"]

Record = dict[str, Any]
Table = tuple[list[str], list[list[str]]]
KINDS = ("bridge-path", "bridge-first-call")
UNITS = {"host_us": "host", "device_us": "GPU"}


def tables(found: list[Record]) -> Iterator[Table]:
    """Header and rows of each table, of the commit that was measured last, from records of `KINDS`."""
    newest = [r for r in found if r["environment"]["commit"] == found[-1]["environment"]["commit"]]
    yield _calls([r for r in newest if r["kind"] == "bridge-path" and "reason" not in r])
    yield _first_calls([r for r in newest if r["kind"] == "bridge-first-call"])


def _calls(found: list[Record]) -> Table:
    """Microseconds: one row for each thing done, one column for each way."""
    labels = {r["path"]: r["label"] for r in found}
    cells = {(r["what"], unit, tuple(r["shape"]), r["path"]): _cell(r, unit) for r in found for unit in UNITS
             if unit in r}
    rows = [[f"{what}, {' x '.join(map(str, shape))}", UNITS[unit],
             *(cells.get((what, unit, shape, path), "–") for path in labels)]
            for what, unit, shape in dict.fromkeys(key[:3] for key in cells)]
    return ["(batch, heads, length, dim), bfloat16, causal; microseconds", "of", *labels.values()], rows


def _cell(record: Record, unit: str) -> str:
    over = record["over_torch"]
    digits = 0 if record[unit] >= 100 else 1
    return f"{record[unit]:.{digits}f}" + (f" ({over['median']:.2f})" if over and record["path"] != "torch" else "")


def _first_calls(found: list[Record]) -> Table:
    header = ["first call of a process, head size", "import, ms", "forward, ms", "backward, ms", "second forward, ms",
              "GPU memory beside torch's, MiB", "JAX imported"]
    newest = {(r["way"], r["shape"][-1]): r for r in found}
    label = lambda record, way: record["label"] + (f", {way}" if record["path"] == "direct" else "")
    return header, [[f"{label(record, way)}, {dim}", *_columns(record)] for (way, dim), record in newest.items()]


def _columns(record: Record) -> list[str]:
    if "reason" in record:
        return [record["reason"].replace("|", "/").replace("\n", " "), *["–"] * 5]
    ms = record["milliseconds"]
    return [*(f"{ms[name]:,.1f}" for name in ("import", "first forward", "first backward", "second forward")),
            f"{record['beside_torch_mib']:.1f}", "yes" if record["imports_jax"] else "no"]
