"""Plots from the records, as PNG: TFLOP/s over length for each head size, and memory over length."""

import pathlib
from typing import Any

from bench import contestants, records

__all__ = ["ALT", "draw"]

Record = dict[str, Any]
OURS = tuple(contestant.name for contestant in contestants.OURS)
COLOURS = dict(zip(OURS, ("#d62728", "#ff9896", "#8c564b", "#e7969c"), strict=False)) | {
    "fa3": "#1f77b4", "cudnn": "#2ca02c", "tokamax": "#9467bd", "jax-nn": "#7f7f7f", "torch-cudnn": "#98df8a",
    "torch-flash": "#aec7e8", "torch-efficient": "#c7c7c7", "bridge": "#e377c2"}
"""Ours in reds, in dispatch's order; matplotlib chooses the others."""


ALT = {
    "speed": "TFLOP/s against length for heads of 128, forward and backward, ours and others",
    "tflops-forward": "TFLOP/s of the forward against length for three head sizes, ours and others",
    "tflops-backward": "TFLOP/s of the backward against length for three head sizes, ours and others",
    "memory": "Memory besides the inputs against length, ours and jax.nn's",
}
"""What a page says of each picture, by the name of its file."""


def draw(found: list[Record], folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws what there are records for; returns the files."""
    drawn = [_speed(found, direction, folder / f"tflops-{direction}.png") for direction in ("forward", "backward")]
    others = _overview(found, folder / "speed.png"), _memory(found, folder / "memory.png")
    return [path for path in (*drawn, *others) if path is not None]


def _pyplot() -> Any:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def _lines(chosen: list[Record], value: str) -> dict[str, tuple[str, list[tuple[int, float]]]]:
    """For each contestant its label and points (length, value), the latest record of each length."""
    lines: dict[str, tuple[str, list[tuple[int, float]]]] = {}
    for (contestant, _), record in records.latest(chosen, "contestant", "problem").items():
        lines.setdefault(contestant, (record["label"], []))[1].append((record["spec"]["kv_len"], record[value]))
    return lines


def _plot(axes: Any, lines: dict[str, tuple[str, list[tuple[int, float]]]]) -> None:
    for contestant, (label, points) in lines.items():
        ours = contestant in OURS
        axes.plot(*zip(*sorted(points)), marker="o", markersize=4, label=label, color=COLOURS.get(contestant),
                  linewidth=2.4 if ours else 1.3, zorder=3 if ours else 2)
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)


def _save(figure: Any, path: pathlib.Path) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    _pyplot().close(figure)
    return path


def _causal(found: list[Record], direction: str) -> list[Record]:
    """Speeds of plain causal problems on the newest device."""
    return records.of_newest_device([
        r for r in found if r["kind"] == "speed" and r["direction"] == direction
        and r["problem"].startswith("causal-d") and r["spec"]["d"] == r["spec"]["d_v"]])


def _overview(found: list[Record], path: pathlib.Path, d: int = 128) -> pathlib.Path | None:
    """Both directions for one head size: the picture of the README."""
    chosen = {direction: [r for r in _causal(found, direction) if r["spec"]["d"] == d]
              for direction in ("forward", "backward")}
    if not all(chosen.values()):
        return None
    figure, all_axes = _pyplot().subplots(1, 2, figsize=(10.8, 3.8), layout="constrained")
    for axes, (direction, of_direction) in zip(all_axes, chosen.items(), strict=True):
        _plot(axes, _lines(of_direction, "tflops"))
        axes.set(title=direction, xlabel="sequence length", ylabel="TFLOP/s", ylim=(0, None))
    figure.legend(handles=_handles(all_axes), fontsize="small", loc="outside right center")
    device = chosen["forward"][-1]["environment"]["device"]
    figure.suptitle(f"Causal, head size {d}, bf16, 16,384 tokens, {device}")
    return _save(figure, path)


def _speed(found: list[Record], direction: str, path: pathlib.Path) -> pathlib.Path | None:
    chosen = _causal(found, direction)
    sizes = sorted({r["spec"]["d"] for r in chosen} & {64, 128, 256})
    if not sizes:
        return None
    figure, all_axes = _pyplot().subplots(1, len(sizes), figsize=(4.6 * len(sizes), 4.2), squeeze=False,
                                          layout="constrained")
    for axes, d in zip(all_axes[0], sizes, strict=True):
        _plot(axes, _lines([r for r in chosen if r["spec"]["d"] == d], "tflops"))
        axes.set(title=f"head size {d}", xlabel="sequence length", ylim=(0, None))
    all_axes[0][0].set_ylabel("TFLOP/s")
    all_axes[0][0].legend(handles=_handles(all_axes[0]), fontsize="small")
    device = chosen[-1]["environment"]["device"]
    figure.suptitle(f"Causal {direction}, bf16, 16,384 tokens, hidden size 2,048, {device}")
    return _save(figure, path)


def _handles(all_axes: Any) -> list[Any]:
    """A line of each label: not every contestant was timed at every head size."""
    return list({line.get_label(): line for axes in all_axes for line in axes.get_lines()}.values())


def _memory(found: list[Record], path: pathlib.Path) -> pathlib.Path | None:
    chosen = [dict(r, mib=r["extra_bytes"] / 2**20) for r in found
              if r.get("problem", "").startswith("cpu-d64") and r["direction"] == "both" and r.get("extra_bytes")]
    if not chosen:
        return None
    figure, axes = _pyplot().subplots(figsize=(5.4, 4.2), layout="constrained")
    _plot(axes, _lines(chosen, "mib"))
    axes.set_yscale("log", base=2)
    axes.set(title="Forward and backward, batch 1, 4 heads, d 64, float32", xlabel="sequence length",
             ylabel="MiB besides the inputs")
    axes.legend(fontsize="small")
    return _save(figure, path)
