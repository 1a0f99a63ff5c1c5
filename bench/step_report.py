"""The tables of what attention costs a training step, and a first `generate`, from `python -m bench.bridge_step`."""

from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["ALONE", "KINDS", "STEP", "bars", "tables"]

Record = dict[str, Any]
Table = tuple[list[str], list[list[str]]]
KINDS = ("bridge-step", "bridge-generate", "bridge-memory")
STEP, ALONE = "training step", "attention alone"
NONE = "–"
_CUDNN, _FA3 = f"{STEP} torch-cudnn", f"{ALONE} fa3"


def tables(found: list[Record]) -> Iterator[Table]:
    """Header and rows of each table, of the commit that was measured last, from records of `KINDS`."""
    newest = [r for r in found if r["environment"]["commit"] == found[-1]["environment"]["commit"]]
    yield ["aim", "measured", "reached"], bars(newest)
    yield _steps([r for r in newest if r["kind"] == "bridge-step"])
    yield _generating([r for r in newest if r["kind"] == "bridge-generate"])
    yield _memory([r for r in newest if r["kind"] == "bridge-memory"])


# Aims ----------------------------------------------------------------------------------------------------------------

def bars(found: list[Record]) -> list[list[str]]:
    """What is aimed at, what was measured, and whether that is reached; of records of one run."""
    rows = [_bar("GPU time of a training step below that with PyTorch's cuDNN", _find(found, what=STEP, way="direct"),
                 lambda r: r["step_over"][_CUDNN]["median"], lambda x: x < 1, "{:.3f} of it"),
            _bar("attention's kernels in it at most 1.0 of FlashAttention-3's, alone",
                 _find(found, what=STEP, way="direct"), lambda r: r["attention_over"][_FA3]["median"],
                 lambda x: x <= 1, "{:.3f} of them")]
    for cache in dict.fromkeys(r["cache"] for r in found if r["kind"] == "bridge-generate"):
        rows += [_bar(f"generate, {cache} cache, plans on disk: no slower than with sdpa",
                      _find(found, way="plans on disk", cache=cache), lambda r: r["over_sdpa"], lambda x: x <= 1,
                      "{:.2f} of its time"),
                 _bar(f"generate, {cache} cache, first process ever: at most 8 s more",
                      _find(found, way="no plans", cache=cache), lambda r: r["more_s"], lambda x: x <= 8, "{:.1f} s")]
    rows.append(_bar("GPU memory beside PyTorch's allocator: 0 MiB", _find(found, kind="bridge-memory", way="alone"),
                     lambda r: r["bytes"] / 2**20, lambda x: x == 0, "{:.1f} MiB"))
    return rows


def _find(found: list[Record], **fields: str) -> Record:
    """The newest record with these fields; one with a reason, if there is none."""
    chosen = [r for r in found if all(r.get(name) == value for name, value in fields.items())]
    return chosen[-1] if chosen else {"reason": "not measured"}


def _bar(aim: str, record: Record, number: Callable[[Record], float], reached: Callable[[float], bool],
         text: str) -> list[str]:
    if "reason" in record:
        return [aim, _plain(record["reason"]), NONE]
    try:
        measured = number(record)
    except KeyError:
        return [aim, "what it is compared with was not measured", NONE]
    return [aim, text.format(measured), "yes" if reached(measured) else "no"]


# Tables --------------------------------------------------------------------------------------------------------------

def _plain(reason: str) -> str:
    return reason.replace("|", "/").replace("\n", " ")


def _steps(found: list[Record]) -> Table:
    """One row for each thing done each way; a later record stands for an earlier one."""
    if not found:
        return [], []
    batch, heads, length, dim = found[-1]["shape"]
    header = [f"{found[-1]['layers']} layers, {batch} x {length:,} tokens, {heads} heads of {dim}, bfloat16, causal",
              "GPU, ms", "over cuDNN's", "attention's kernels, ms", "over FlashAttention-3's, alone", "kernels"]
    newest = {(r["what"], r["way"]): r for r in found}
    return header, [[f"{what}, {record['label']}", *_step_columns(record)] for (what, _), record in newest.items()]


def _step_columns(record: Record) -> list[str]:
    if "reason" in record:
        return [_plain(record["reason"]), *[NONE] * 4]
    over = lambda name, other: f"{record[name][other]['median']:.3f}" if other in record[name] else NONE
    return [f"{record['step_us'] / 1e3:.2f}", over("step_over", f"{record['what']} torch-cudnn"),
            f"{record['attention_us'] / 1e3:.2f}", over("attention_over", _FA3), f"{record['kernels']:.0f}"]


def _generating(found: list[Record]) -> Table:
    if not found:
        return [], []
    header = [f"generate of {found[-1]['tokens']} tokens, first of a process", "in all, s", "over sdpa's",
              "generate alone, s", "over sdpa's", "second time, s", "JAX imported"]
    newest = {(r["cache"], r["way"]): r for r in found}
    return header, [[f"{cache} cache, {record['label']}", *_seconds(record)] for (cache, _), record in newest.items()]


def _seconds(record: Record) -> list[str]:
    if "reason" in record:
        return [_plain(record["reason"]), *[NONE] * 5]
    seconds = record["seconds"]
    over = lambda name: f"{record[name]:.2f}" if name in record else NONE
    return [f"{seconds['in all']:.2f}", over("over_sdpa"), f"{seconds['generate']:.2f}", over("generate_over_sdpa"),
            f"{seconds['second generate']:.2f}", "yes" if record["imports_jax"] else "no"]


def _memory(found: list[Record]) -> Table:
    header = ["GPU memory beside PyTorch's, first forward and backward", "MiB", "taken by",
              "the same modules loaded again"]
    newest = {r["way"]: r for r in found}
    return header, [[f"direct, {way}", *_bytes(record)] for way, record in newest.items()]


def _bytes(record: Record) -> list[str]:
    if "reason" in record:
        return [_plain(record["reason"]), NONE, NONE]
    again = record["again"]
    return [f"{record['bytes'] / 2**20:.1f}",
            "; ".join(f"{step['step']}: {step['bytes'] / 2**20:.1f}" for step in record["steps"]) or "nothing",
            f"{again['loads']} loads of {again['code_bytes'] / 2**20:.1f} MiB in all: {again['bytes'] / 2**20:.1f} MiB"
            if again else NONE]
