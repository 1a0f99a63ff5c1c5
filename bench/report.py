"""Tables for the README and the documentation, and plots, from the records. No number there is typed by hand.

What stands in a page between `<!-- generated: NAME -->` and `<!-- end generated -->` is replaced by the block of that
name. In the README, "speed" is a sentence, "headline" a short table, "slower" where others are faster, "gpus" and
"calls" what runs where; "benchmarks" is everything, with a section for each GPU that was measured. A block whose
records do not exist says so.
"""

import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bench import cache_report, coverage, feature_report, path_report, plots, records, slower, step_report

__all__ = ["HEADLINE", "block", "write"]

Record = dict[str, Any]
MARKERS = re.compile(r"(<!-- generated: (?P<name>[\w-]+)[^\n]*-->\n).*?(<!-- end generated -->)", re.DOTALL)
NOTHING = "No record yet."
HEADLINE = (*(f"causal-d{d}-s{length}" for length in (2048, 16_384) for d in (64, 128, 256)),
            "full-d128-s16384", "gqa-d128-s16384")
"""The problems of the README's table."""
HEADLINE_PEERS = {"FlashAttention-3": ("fa3",), "cuDNN": ("cudnn", "torch-cudnn")}
"""What it compares with: of several ways to call a library, the fastest of each problem."""


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
    mark = " ‡" if "not_chained" in record else ""
    return f"{record['tflops']:.0f}{mark}" + (f" ({ratio['median']:.2f})" if ratio else "")


def _name(problem: str, newest: dict[tuple[Any, ...], Record]) -> str:
    """A problem as tables write it, marked if it was timed in chains."""
    chained = any(record.get("chained") for (name, *_), record in newest.items() if name == problem)
    return f"`{problem}`" + (" †" if chained else "")


def _with_notes(table: str) -> str:
    """A table, and what its marks mean."""
    notes = {"†": "calls in chains, without the gaps between executables", "‡": "of those, timed call by call"}
    used = [f"{mark} {text}" for mark, text in notes.items() if mark in table]
    return table + ("\n\n" + "; ".join(used) + "." if used else "")


def _speed_rows(found: list[Record], direction: str) -> tuple[list[str], list[list[str]]]:
    """One row a problem, one column a contestant; of each the latest record."""
    newest = records.latest([r for r in found if r["kind"] == "speed" and r["direction"] == direction],
                            "problem", "contestant")
    labels = {r["contestant"]: r["label"] for r in newest.values()}
    ours = _ours(list(newest.values()))
    others = sorted((name for name in labels if name != ours), key=lambda name: name in plots.OURS)  # peers first
    problems = sorted({problem for problem, _ in newest}, key=lambda name: _order(newest, name))
    rows = []
    for problem in problems:
        mine = newest.get((problem, ours))
        share = f"{mine['matmul_share']:.0%}" if mine and mine["matmul_share"] else "–"
        rows.append([_name(problem, newest), f"**{mine['tflops']:.0f}**" if mine else "–", share,
                     *(_cell(newest.get((problem, name)), ours) for name in others)])
    return ["problem", labels.get(ours, ours), "of matmul", *(labels[name] for name in others)], rows


def _order(newest: dict[tuple[Any, ...], Record], problem: str) -> tuple[Any, ...]:
    spec = next(record["spec"] for (name, _), record in newest.items() if name == problem)
    return re.sub(r"-d\d+.*$", "", problem), spec["d"], spec["kv_len"]


def _gpus(found: list[Record]) -> dict[str, list[Record]]:
    """The records of each GPU, the one whose speed was measured last first."""
    on_gpu = [r for r in found if r["environment"]["platform"] == "gpu"]
    measured = records.by_device([r for r in on_gpu if r["kind"] == "speed"])
    kinds = {"speed", "feature", "left out", "host", "bridge-call", "bridge-part", "decode", "ring",
             "ring-step", *path_report.KINDS, *step_report.KINDS}
    everything = records.by_device([r for r in on_gpu if r["kind"] in kinds])
    return {name: everything[name] for name in (*measured, *(name for name in everything if name not in measured))}


def _newest_gpu(found: list[Record]) -> list[Record]:
    return next(iter(_gpus(found).values()), [])


def _newest_cpu(found: list[Record], kind: str = "speed") -> list[Record]:
    return records.of_newest_device([
        r for r in found if r["environment"]["platform"] == "cpu" and r["kind"] == kind])


def _speed(direction: str) -> Callable[[list[Record]], str]:
    def make(found: list[Record]) -> str:
        header, rows = _speed_rows(found, direction)
        return _with_notes(_table(header, rows)) if rows else NOTHING
    return make


def _headline(found: list[Record]) -> str:
    """Ours, and how many times faster it is than others, forward and backward, on the newest GPU."""
    chosen = [r for r in _newest_gpu(found) if r["kind"] == "speed" and r["problem"] in HEADLINE
              and r["direction"] in ("forward", "backward")]
    newest, ours = records.latest(chosen, "problem", "direction", "contestant"), _ours(chosen)
    measured = {problem for problem, *_ in newest}
    rows = [[_name(problem, newest), *(cell for direction in ("forward", "backward")
                                       for cell in _headline_cells(newest, problem, direction, ours))]
            for problem in HEADLINE if problem in measured]
    header = ["problem", *(text for direction in ("forward", "backward")
                           for text in (f"{direction}, TFLOP/s", *(f"over {peer}" for peer in HEADLINE_PEERS)))]
    if not rows:
        return NOTHING
    environment = chosen[-1]["environment"]
    return _with_notes(_table(header, rows)) + (
        f"\n\n{environment['device']}, {environment['time'][:10]}. Over 1, ours is faster.")


def _headline_cells(newest: dict[tuple[Any, ...], Record], problem: str, direction: str, ours: str) -> Iterator[str]:
    mine = newest.get((problem, direction, ours))
    yield f"**{mine['tflops']:.0f}**" if mine else "–"
    for names in HEADLINE_PEERS.values():
        others = [newest[problem, direction, name] for name in names if (problem, direction, name) in newest]
        ratios = [other["ratio_to"][ours]["median"] for other in others if ours in other["ratio_to"]]
        yield f"{min(ratios):.2f}" if ratios else "–"


def _environment(found: list[Record]) -> str:
    """One line for each device of the tables of speed, from its latest record."""
    newest = [record for device in (_newest_gpu(found), _newest_cpu(found)) for record in _speeds(device)[-1:]]
    return "\n".join(f"- {_measured_on(record)}" for record in newest) or NOTHING


def _speeds(found: list[Record]) -> list[Record]:
    return [r for r in found if r["kind"] == "speed"]


def _measured_on(record: Record) -> str:
    e = record["environment"]
    parts = [e["device"], e["driver"] and f"driver {e['driver']}", e["ptxas"] and f"ptxas {e['ptxas']}",
             ", ".join(f"{name} {version}" for name, version in e["versions"].items()),
             f"matrix product {record['matmul_flops'] / 1e12:.1f} TFLOP/s" if record.get("matmul_flops") else "",
             f"commit {e['commit'][:10]}" + (" with changes" if e["dirty"] else ""), e["time"][:10]]
    return "; ".join(filter(None, parts))


def _host(found: list[Record]) -> str:
    newest = records.latest([r for r in found if r["kind"] == "host"], "contestant", "direction")
    names = dict.fromkeys(name for name, _ in newest)
    cell = lambda name, direction: f"{newest[name, direction]['host_us']:.0f}" if (name, direction) in newest else "–"
    label = lambda name: next(r["label"] for (n, _), r in newest.items() if n == name)
    rows = [[label(name), cell(name, "forward"), cell(name, "both")] for name in names]
    return _table(["microseconds a call", "forward", "forward and backward"], rows) if rows else NOTHING


def _bridge(found: list[Record]) -> str:
    chosen = [r for r in found if r["kind"] in ("bridge-call", "bridge-part")]
    last = chosen[-1]["environment"]["commit"] if chosen else ""
    newest = [r for r in chosen if r["environment"]["commit"] == last]
    rows = [[r["what"], "whole call" if r["kind"] == "bridge-call" else "part", f"{r['host_us']:.0f}"] for r in newest]
    return _table(["(1, 8, 128, 64) bfloat16", "", "microseconds"], rows) if rows else NOTHING


def _tables_of(module: Any) -> Callable[[list[Record]], str]:
    """The tables that a module makes of records of its kinds, and where the last of them was measured."""
    def make(found: list[Record]) -> str:
        chosen = [r for r in found if r["kind"] in module.KINDS]
        if not chosen:
            return NOTHING
        tables = [_table(header, rows) for header, rows in module.tables(chosen) if rows]
        return "\n\n".join([*tables, f"{_measured_on(chosen[-1])}."])
    return make


def _features(found: list[Record]) -> str:
    header, rows, notes = feature_report.rows(found)
    if not rows:
        return NOTHING
    last = [r for r in found if r["kind"] in ("feature", "left out")][-1]
    return "\n\n".join(filter(None, [_table(header, rows), "\n".join(f"- {note}" for note in notes),
                                     f"{_measured_on(last)}."]))


def _of_kind(kind: str, rows: Callable[[list[Record]], cache_report.Rows]) -> Callable[[list[Record]], str]:
    """A table of the records of one kind, and where the last of them was measured."""
    def make(found: list[Record]) -> str:
        chosen = [r for r in found if r["kind"] == kind]
        return f"{_table(*rows(chosen))}\n\n{_measured_on(chosen[-1])}." if chosen else NOTHING
    return make


def _cpu(found: list[Record]) -> str:
    newest = records.latest(_newest_cpu(found), "problem", "direction", "contestant")
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
    chosen = [r for r in _speeds(found) if r.get("errors")]
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


Blocks = dict[str, tuple[str, Callable[[list[Record]], str]]]
OF_A_GPU: Blocks = {
    "forward": ("Forward, TFLOP/s; in brackets how many times faster ours is (median of the rounds' ratios)",
                _speed("forward")),
    "backward": ("Backward alone, TFLOP/s", _speed("backward")),
    "both": ("Forward and backward, TFLOP/s", _speed("both")),
    "accuracy": ("Relative error, |ours - truth| / |truth|; in brackets over FlashAttention-3's on the same inputs",
                 _accuracy),
    "features": ("Documents, lengths, padding, bias, dropout, sinks: 4 rows of 4,096 tokens, 16 heads, bfloat16; the "
                 "plain call has the same sequences, or as many pairs that attend", _features),
    "decode": ("Decoding against a cache, bfloat16. In a CUDA graph: the kernel alone, launched from PyTorch, as "
               "PyTorch's own; GB/s are of that where it was timed. From JAX, as FlashAttention-3: executables that "
               "XLA launches, gaps and a copy included. In brackets how many times faster ours is by the same means, "
               "from JAX where it was not timed in a graph. Reads alone: the same kernel without its products",
               _of_kind("decode", cache_report.decoding)),
    "ring": ("A sequence over several GPUs beside the same call on one, 32:8 heads of 128, bfloat16; efficiency: the "
             "time of one over the GPUs' times their number", _of_kind("ring", cache_report.sequences)),
    "ring-step": ("One GPU's steps of a causal ring without the hops, 32:8 heads of 128, bfloat16, over plain calls of "
                  "the same pairs", _of_kind("ring-step", cache_report.steps)),
    "host": ("The host's share of a call, on a problem too small for a device", _host),
    "bridge": ("Host time of a call from PyTorch", _bridge),
    "paths": ("A call from PyTorch by each way, medians; in brackets over PyTorch's own choice in the same rounds",
              _tables_of(path_report)),
    "steps": ("A GPT training step and a first `generate` from PyTorch, medians; over: of the rounds' ratios",
              _tables_of(step_report)),
}
"""Title and text of each block about one GPU, made from that GPU's records."""
OTHERS: Blocks = {
    "cpu": ("Without a GPU", _cpu),
    "host-cpu": ("The host's share of a call without a GPU", lambda found: _host(_newest_cpu(found, "host"))),
    "memory": ("Memory besides the inputs", _memory),
    "training": ("Training `examples/train_gpt.py`, tokens/s; in brackets the loss on held-out text", _training),
}
"""The others, made from all records."""


def _all(found: list[Record]) -> str:
    """A section for each GPU, the newest first, and one for each of the other blocks."""
    sections = [(device, _of_a_gpu(of_device)) for device, of_device in _gpus(found).items()]
    sections += [(title, make(found)) for title, make in OTHERS.values()]
    if cpu := _newest_cpu(found):
        sections.append(("Measured without a GPU on", f"- {_measured_on(cpu[-1])}"))
    return "\n\n".join(f"### {title}\n\n{text}" for title, text in sections if text != NOTHING) or NOTHING


def _of_a_gpu(found: list[Record]) -> str:
    parts = [f"#### {title}\n\n{text}" for title, make in OF_A_GPU.values() if (text := make(found)) != NOTHING]
    return "\n\n".join([*(_measured_on(record) + "." for record in _speeds(found)[-1:]), *parts])


def _slower(found: list[Record]) -> str:
    header, rows = slower.rows(_newest_gpu(found))
    return _table(header, rows) if rows else NOTHING


def _gpus_table(found: list[Record]) -> str:
    """Which kernels an automatic choice runs on which GPU, and of which there are records of speed."""
    measured = {r["environment"]["device"] for r in found
                if r["environment"]["platform"] == "gpu" and r["kind"] == "speed"}
    return _table(*coverage.gpus(measured))


def block(name: str, found: list[Record]) -> str | None:
    """The text of a block, of the newest GPU if it is about one; None if there is no block of that name."""
    if name in OF_A_GPU:
        return OF_A_GPU[name][1](_newest_gpu(found))
    made = {"headline": _headline, "benchmarks": _all, "environment": _environment, "gpus": _gpus_table,
            "calls": lambda found: _table(*coverage.calls()), "slower": _slower,
            "speed": lambda found: slower.sentence(_newest_gpu(found)) or NOTHING} | {
        other: make for other, (_, make) in OTHERS.items()}
    return made[name](found) if name in made else None


def write(found: list[Record], pages: Sequence[pathlib.Path], images: pathlib.Path) -> Iterator[str]:
    """Replaces the generated blocks of pages and draws the plots; yields a line for each."""
    for record in found:
        record["device_name"] = record["environment"]["device"]
    pictures = plots.draw(found, images)
    yield from (f"drawn: {path}" for path in pictures)
    for page in pages:
        text = page.read_text()
        new = MARKERS.sub(lambda match, page=page: _replaced(match, found, page, pictures), text)
        yield f"{page}: {len(MARKERS.findall(text))} generated blocks, {'changed' if new != text else 'as they were'}"
        page.write_text(new)


def _replaced(match: re.Match[str], found: list[Record], page: pathlib.Path, pictures: list[pathlib.Path]) -> str:
    made = block(match["name"], found)
    if made is None:
        return match[0]
    if match["name"] == "benchmarks":
        near = [path.resolve() for path in pictures if path.resolve().is_relative_to(page.resolve().parent)]
        made += "".join(f"\n\n![{plots.ALT[path.stem]}]({path.relative_to(page.resolve().parent).as_posix()})"
                        for path in near if path.stem != "speed")  # that is the README's
    return f"{match[1]}{made}\n{match[3]}"
