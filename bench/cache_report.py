"""The tables of decoding against a cache, of a sequence over several GPUs and of one GPU's share of it, from the
records of `python -m bench.decode`, `python -m bench.ring` and `python -m bench.ring_step`.
"""

from typing import Any

from bench import records

__all__ = ["Rows", "decoding", "sequences", "steps"]

Record = dict[str, Any]
Rows = tuple[list[str], list[list[str]]]
NAMES = {"reads": "reads alone", "torch": "PyTorch", "torch-cudnn": "PyTorch (cuDNN)"}
LATER = {"bridge": "torch_bridge", "torch-flex": "PyTorch (flex)", "fa3": "FlashAttention-3"}
"""What decoding is timed beside; the second where records have them."""


def decoding(found: list[Record]) -> Rows:
    """One row a problem, of the latest record: microseconds, GB/s, and how many times faster ours is than others."""
    newest = records.latest([r for r in found if r["kind"] == "decode"], "problem")
    there = {name for record in newest.values() for name in record["us"]}
    rows, names = [], NAMES | {name: label for name, label in LATER.items() if name in there}
    for (problem,), record in newest.items():
        over = {name: record["speed_over"].get(name) for name in names}
        rows.append([f"`{problem}`", f"{record['us']['ours']:.1f}", f"{record['gbytes']['ours']:,.0f}",
                     *(f"{record['us'][name]:.1f} ({ratio['median']:.2f})" if ratio else "–"
                       for name, ratio in over.items())])
    return ["problem", "pallas_flash, us", "GB/s", *(f"{name}, us" for name in names.values())], rows


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
