"""The tables of decoding against a cache, of a sequence over several GPUs and of one GPU's share of it, from the
records of `python -m bench.decode`, `python -m bench.ring` and `python -m bench.ring_step`.
"""

from typing import Any

from bench import records

__all__ = ["IN_GRAPHS", "Rows", "decoding", "over", "sequences", "steps"]

Record = dict[str, Any]
Rows = tuple[list[str], list[list[str]]]
NAMES = {"reads": "reads alone", "torch": "PyTorch", "torch-cudnn": "PyTorch (cuDNN)"}
LATER = {"torch-flex": "PyTorch (flex)", "fa3": "FlashAttention-3"}
"""What decoding is timed beside; the second where records have them."""
IN_GRAPHS = ("bridge", "torch", "torch-cudnn", "torch-flex")
"""What is always timed in a CUDA graph; so are all of these in records that do not say what is."""


def over(record: Record, name: str) -> float | None:
    """How many times faster our kernel is than another in a record of decoding, both timed by the same means: in CUDA
    graphs, if the other was and ours was there; else ours from JAX. None: the other was not timed.
    """
    times = record["us"]
    if name not in times:
        return None
    if "bridge" in times and name in record.get("in_graphs", IN_GRAPHS):
        return float(times[name] / times["bridge"])
    return float(record["speed_over"][name]["median"])


def decoding(found: list[Record]) -> Rows:
    """One row a problem, of the latest record: microseconds in a CUDA graph and from JAX, GB/s of the first of these
    that there is, and how many times faster ours is than others (`over`).
    """
    newest = records.latest([r for r in found if r["kind"] == "decode"], "problem")
    there = {name for record in newest.values() for name in record["us"]}
    rows, names = [], NAMES | {name: label for name, label in LATER.items() if name in there}
    for (problem,), record in newest.items():
        times, first = record["us"], "bridge" if "bridge" in record["us"] else "ours"
        cell = lambda name, times=times: f"{times[name]:.1f}" if name in times else "–"
        ratios = {name: over(record, name) for name in names}
        rows.append([f"`{problem}`", cell("bridge"), f"{record['gbytes'][first]:,.0f}", cell("ours"),
                     *(cell(name) if ratio is None else f"{cell(name)} ({ratio:.2f})"
                       for name, ratio in ratios.items())])
    return ["problem", "pallas_flash in a CUDA graph, us", "GB/s", "from JAX, us",
            *(f"{name}, us" for name in names.values())], rows


def sequences(found: list[Record]) -> Rows:
    """One row a problem, direction and strategy, of the latest record."""
    newest = records.latest([r for r in found if r["kind"] == "ring"],
                            "devices", "length", "mask", "strategy", "direction", "xla_flags")
    rows = [[f"{length:,}", mask, direction, strategy, str(devices), f"{record['alone_us'] / 1e3:.1f}",
             f"{record['spread_us'] / 1e3:.1f}", f"{record['efficiency']['median']:.2f}",
             f"`{flags}`" if flags else "–"]
            for (devices, length, mask, strategy, direction, flags), record in newest.items()]
    return ["tokens", "mask", "direction", "strategy", "GPUs", "one GPU, ms", "all GPUs, ms", "efficiency",
            "XLA_FLAGS"], rows


def steps(found: list[Record]) -> Rows:
    """One row a length, direction, ring and way of merging, of the latest record."""
    newest = records.latest([r for r in found if r["kind"] == "ring-step"],
                            "length", "direction", "devices", "merged_by")

    def cell(ratio: dict[str, float] | None) -> str:
        return f"{ratio['median']:.3f}" if ratio else "–"
    rows = [[f"{length:,}", direction, str(devices), merged_by, f"{record['ring_us'] / 1e3:.2f}",
             cell(record["over_plain"]), cell(record.get("step_over_square"))]
            for (length, direction, devices, merged_by), record in newest.items()]
    return ["tokens of a GPU", "direction", "steps", "merged by", "all steps, ms", "over plain calls",
            "a step more, over a plain call"], rows
