"""Records: one JSON object a line, written as soon as it is measured, never changed afterwards."""

import json
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from pallas_flash.spec import AttentionSpec

__all__ = ["RESULTS", "append", "by_device", "file_name", "latest", "of_newest_device", "read", "show",
           "spec_fields"]

RESULTS = pathlib.Path(__file__).parent / "results"
Record = dict[str, Any]


def spec_fields(spec: AttentionSpec) -> Record:
    """A spec as JSON; its mask and dtype as text."""
    names = ("layout", "batch", "q_heads", "kv_heads", "q_len", "kv_len", "d", "d_v", "softcap", "scale",
             "dropout_rate", "deterministic")
    bias = None if spec.bias is None else list(spec.bias.shape)
    return {name: getattr(spec, name) for name in names} | dict(dtype=spec.dtype.name, mask=str(spec.mask), bias=bias)


def file_name(environment: Record) -> str:
    """Where the records of a run go: date, device and commit, in that order, so that files sort by age."""
    device = re.sub(r"[^A-Za-z0-9]+", "-", environment["device"]).strip("-").lower()
    return f"{environment['time'][:10]}-{device}-{environment['commit'][:10]}.jsonl"


def append(path: pathlib.Path, record: Record) -> None:
    """Adds a record to a file, making the file and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def show(record: Record, save: bool) -> None:
    """Prints a record, without its environment, as a line of JSON; with `save` it also goes to a file of RESULTS."""
    print(json.dumps({name: x for name, x in record.items() if name != "environment"}), flush=True)
    if save:
        append(RESULTS / file_name(record["environment"]), record)


def read(folder: pathlib.Path) -> list[Record]:
    """All records of a folder that say where they were measured, oldest first."""
    found = [record for record in _lines(sorted(folder.glob("*.jsonl"))) if "environment" in record]
    return sorted(found, key=lambda record: record["environment"]["time"])


def _lines(paths: Iterable[pathlib.Path]) -> Iterator[Record]:
    for path in paths:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number} is not a JSON record: {error}") from error


def by_device(records: list[Record]) -> dict[str, list[Record]]:
    """Records in order of age by their device, the one measured last first: numbers of two never share a table."""
    devices = dict.fromkeys(r["environment"]["device"] for r in reversed(records))
    return {device: [r for r in records if r["environment"]["device"] == device] for device in devices}


def of_newest_device(records: list[Record]) -> list[Record]:
    """Of records in order of age, those of the device that was measured last."""
    return next(iter(by_device(records).values()), [])


def latest(records: list[Record], *keys: str) -> dict[tuple[Any, ...], Record]:
    """The newest record for each value of the given fields."""
    return {tuple(record.get(key) for key in keys): record for record in records}
