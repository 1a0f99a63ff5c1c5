"""Tables for the README and plots, from the records. No number of the README is typed by hand.

Blocks of the README between `<!-- generated: NAME -->` and `<!-- end generated -->` are replaced; "benchmarks" is all
of them one after the other. A block whose records do not exist says so.
"""

import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from bench import plots, records

__all__ = ["BLOCKS", "block", "write"]

Record = dict[str, Any]
MARKERS = re.compile(r"(<!-- generated: (?P<name>[\w-]+)[^\n]*-->\n).*?(<!-- end generated -->)", re.DOTALL)
NOTHING = "No record yet."


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _ours(found: list[Record]) -> str:
    """Which implementation of ours a table is about: of those measured, the one that dispatch prefers."""
    names = {record["contestant"] for record in found}
    return next((name for name in plots.OURS if name in names), plots.OURS[-1])


def _cell(record: Record | None, ours: str) -> str:
    """TFLOP/s, and in brackets how much faster ours is."""
    if record is None:
        return "–"
    ratio = record["ratio_to"].get(ours)
    return f"{record['tflops']:.0f}" + (f" ({ratio['median']:.2f})" if ratio else "")


def _speed_rows(found: list[Record], direction: str) -> tuple[list[str], list[list[str]]]:
    """One row a problem, one column a contestant; of each the latest record."""
    newest = records.latest([r for r in found if r["direction"] == direction], "problem", "contestant")
    labels = {r["contestant"]: r["label"] for r in newest.values()}
    ours = _ours(list(newest.values()))
    others = [name for name in labels if name not in plots.OURS]
    problems = sorted({problem for problem, _ in newest}, key=lambda name: _order(newest, name))
    rows = []
    for problem in problems:
        mine = newest.get((problem, ours))
        share = f"{mine['matmul_share']:.0%}" if mine and mine["matmul_share"] else "–"
        rows.append([f"`{problem}`", f"**{mine['tflops']:.0f}**" if mine else "–", share,
                     *(_cell(newest.get((problem, name)), ours) for name in others)])
    return ["problem", labels.get(ours, ours), "of matmul", *(labels[name] for name in others)], rows


def _order(newest: dict[tuple[Any, ...], Record], problem: str) -> tuple[Any, ...]:
    spec = next(record["spec"] for (name, _), record in newest.items() if name == problem)
    return re.sub(r"-d\d+.*$", "", problem), spec["d"], spec["kv_len"]


def _on(found: list[Record], platform: str, *kinds: str) -> list[Record]:
    """The records of some kinds, of the device of that platform that was measured last."""
    return records.of_newest_device([
        r for r in found if r["kind"] in kinds and r["environment"]["platform"] == platform])


def _speed(direction: str) -> Callable[[list[Record]], str]:
    def make(found: list[Record]) -> str:
        header, rows = _speed_rows(_on(found, "gpu", "speed"), direction)
        return _table(header, rows) if rows else NOTHING
    return make


def _environment(found: list[Record]) -> str:
    """One line for each device of the tables of speed, from its latest record."""
    lines = []
    newest = [record for platform in ("gpu", "cpu") for record in _on(found, platform, "speed")[-1:]]
    for record in newest:
        e = record["environment"]
        parts = [e["device"], e["driver"] and f"driver {e['driver']}", e["ptxas"] and f"ptxas {e['ptxas']}",
                 ", ".join(f"{name} {version}" for name, version in e["versions"].items()),
                 f"matrix product {record['matmul_flops'] / 1e12:.1f} TFLOP/s" if record.get("matmul_flops") else "",
                 f"commit {e['commit'][:10]}" + (" with changes" if e["dirty"] else ""), e["time"][:10]]
        lines.append("- " + "; ".join(filter(None, parts)))
    return "\n".join(lines) or NOTHING


def _host(found: list[Record]) -> str:
    newest = records.latest(records.of_newest_device([r for r in found if r["kind"] == "host"]),
                            "contestant", "direction")
    names = dict.fromkeys(name for name, _ in newest)
    cell = lambda name, direction: f"{newest[name, direction]['host_us']:.0f}" if (name, direction) in newest else "–"
    label = lambda name: next(r["label"] for (n, _), r in newest.items() if n == name)
    rows = [[label(name), cell(name, "forward"), cell(name, "both")] for name in names]
    return _table(["microseconds a call", "forward", "forward and backward"], rows) if rows else NOTHING


def _bridge(found: list[Record]) -> str:
    chosen = _on(found, "gpu", "bridge-call", "bridge-part")
    last = chosen[-1]["environment"]["commit"] if chosen else ""
    newest = [r for r in chosen if r["environment"]["commit"] == last]
    rows = [[r["what"], "whole call" if r["kind"] == "bridge-call" else "part", f"{r['host_us']:.0f}"] for r in newest]
    return _table(["(1, 8, 128, 64) bfloat16", "", "microseconds"], rows) if rows else NOTHING


def _cpu(found: list[Record]) -> str:
    newest = records.latest(_on(found, "cpu", "speed"), "problem", "direction", "contestant")
    rows, ours = [], _ours(list(newest.values()))
    by_length = sorted(newest.items(), key=lambda item: (item[1]["spec"]["kv_len"], item[0]))
    for (problem, direction, contestant), mine in by_length:
        if contestant == ours and (peer := newest.get((problem, direction, "jax-nn"))):
            rows.append([f"`{problem}`", direction, *(f"{r['median_us'] / 1e3:.1f}" for r in (mine, peer)),
                         f"{peer['ratio_to'][ours]['median']:.2f}"])
    header = ["problem", "direction", "pallas_flash, ms", "jax.nn, ms", "jax.nn's time over ours"]
    return _table(header, rows) if rows else NOTHING


def _memory(found: list[Record]) -> str:
    chosen = [r for r in found if r["kind"] in ("memory", "speed") and r["extra_bytes"]
              and r["problem"].startswith("cpu-")]
    newest = records.latest(chosen, "problem", "direction", "contestant")
    labels = {name: record["label"] for (_, _, name), record in newest.items()}
    lengths = {(direction, record["spec"]["kv_len"], problem) for (problem, direction, _), record in newest.items()}
    mib = lambda record: f"{record['extra_bytes'] / 2**20:,.0f}" if record else "–"
    rows = [[f"`{problem}`", direction, *(mib(newest.get((problem, direction, name))) for name in labels)]
            for direction, _, problem in sorted(lengths)]
    return _table(["MiB", "direction", *labels.values()], rows) if rows else NOTHING


def _training(found: list[Record]) -> str:
    """One row a model and device, one column an attention: of each the newest run."""
    fields = ("device_name", "layers", "dim", "heads", "kv_heads", "batch", "context", "dtype", "remat")
    newest = records.latest([r for r in found if r["kind"] == "training"], *fields, "attention")
    names = list(dict.fromkeys(attention for *_, attention in newest))
    rows = []
    for model in dict.fromkeys(tuple(model) for *model, _ in newest):
        device, layers, dim, heads, kv_heads, batch, context, dtype, remat = model
        text = f"{layers} layers of {dim}, {heads}:{kv_heads} heads, {batch} x {context:,} tokens, {dtype}"
        runs = [newest.get((*model, name)) for name in names]
        rows.append([text + (", remat" if remat else "") + f"; {device}",
                     *(f"{run['tokens_per_second']:,.0f} ({run['held_out_loss']:.3f})" if run else "–"
                       for run in runs)])
    return _table(["model", *names], rows) if rows else NOTHING


def _accuracy(found: list[Record]) -> str:
    """Relative errors of ours, and in brackets over FlashAttention-3's on the same inputs."""
    errors: dict[tuple[str, str], dict[str, float]] = {}
    chosen = [r for r in _on(found, "gpu", "speed") if r.get("errors")]
    for record in chosen:
        errors.setdefault((record["problem"], record["contestant"]), {}).update(record["errors"])
    newest, ours = records.latest(chosen, "problem", "contestant"), _ours(chosen)

    def cell(problem: str, name: str) -> str:
        mine, theirs = (errors.get((problem, contestant), {}).get(name) for contestant in (ours, "fa3"))
        return "–" if mine is None else f"{mine:.2e}" + (f" ({mine / theirs:.3f})" if theirs else "")

    names = ("out", "dq", "dk", "dv")
    problems = sorted({problem for problem, _ in newest}, key=lambda problem: _order(newest, problem))
    rows = [[f"`{problem}`", *(cell(problem, name) for name in names)] for problem in problems]
    return _table(["problem", *names], rows) if rows else NOTHING


BLOCKS: dict[str, tuple[str, Callable[[list[Record]], str]]] = {
    "forward": ("Forward, TFLOP/s; in brackets how many times faster ours is (median of the rounds' ratios)",
                _speed("forward")),
    "backward": ("Backward alone, TFLOP/s", _speed("backward")),
    "both": ("Forward and backward, TFLOP/s", _speed("both")),
    "accuracy": ("Relative error, |ours - truth| / |truth|; in brackets over FlashAttention-3's on the same inputs",
                 _accuracy),
    "host": ("The host's share of a call, on a problem too small for a device", _host),
    "bridge": ("Host time of a call from PyTorch", _bridge),
    "cpu": ("Without a GPU", _cpu),
    "memory": ("Memory besides the inputs", _memory),
    "training": ("Training `examples/train_gpt.py`, tokens/s; in brackets the loss on held-out text", _training),
    "environment": ("Measured on", _environment),
}


def block(name: str, found: list[Record]) -> str | None:
    """The text of a block; None if there is no block of that name."""
    if name == "benchmarks":
        parts = [(title, make(found)) for title, make in BLOCKS.values()]
        return "\n\n".join(f"### {title}\n\n{text}" for title, text in parts if text != NOTHING) or NOTHING
    return BLOCKS[name][1](found) if name in BLOCKS else None


def write(found: list[Record], readme: pathlib.Path, images: pathlib.Path) -> Iterator[str]:
    """Replaces the README's generated blocks and draws the plots; yields a line for each."""
    for record in found:
        record["device_name"] = record["environment"]["device"]
    pictures = plots.draw(found, images)
    yield from (f"drawn: {path}" for path in pictures)
    text = readme.read_text()

    def replaced(match: re.Match[str]) -> str:
        made = block(match["name"], found)
        if made is None:
            return match[0]
        if match["name"] == "benchmarks":
            made += "".join(f"\n\n![{path.stem}]({path.relative_to(readme.parent).as_posix()})" for path in pictures
                            if path.is_relative_to(readme.parent))
        return f"{match[1]}{made}\n{match[3]}"

    new = MARKERS.sub(replaced, text)
    yield f"{readme}: {len(MARKERS.findall(text))} generated blocks, {'changed' if new != text else 'as they were'}"
    readme.write_text(new)
