"""A sequence over all GPUs of this machine beside the same call on one: `python -m bench.ring`, one JSON object a line.

Efficiency is the time of one device's plain call over n times that of n devices, whose sequence is cut by
`context_parallel_attention`; 1 is perfect. Heads and dims are those of a model of 8 billion parameters (32:8 heads of
128). XLA_FLAGS are in the record: they say how XLA moves shards. Where there is no history of the code, set
BENCH_COMMIT (bench/environment.py).
"""

import argparse
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import pallas_flash
from bench import environment, records, timing
from pallas_flash import Causal, Window
from pallas_flash.arrays import Array

__all__ = ["MASKS", "STRATEGIES", "main", "measure"]

AXIS = "sequence"
STRATEGIES = ("ring", "all_gather", "all_to_all")
MASKS = ("causal", "window", "documents")
DOCUMENTS, WINDOW = 8, 4096
Function = Callable[..., Array]


class Size(NamedTuple):
    """The whole problem."""

    length: int
    heads: tuple[int, int] = (32, 8)
    d: int = 128


class Ways(NamedTuple):
    """The same attention on one device and on all of a mesh."""

    alone: Function  # (query, key, value) -> out
    spread: Function
    reorder: Function  # puts a sequence into the order of the devices; `inverse=True` takes it back


def _ways(size: Size, kind: str, strategy: str, mesh: jax.sharding.Mesh) -> Ways:
    mask = Window(left=min(WINDOW, size.length // 4)) if kind == "window" else Causal()
    alone = functools.partial(pallas_flash.flash_attention, mask=mask)
    spread = functools.partial(pallas_flash.context_parallel_attention, axis_name=AXIS, strategy=strategy, mask=mask,
                               mesh=mesh, spec=PartitionSpec(None, AXIS))
    reorder = functools.partial(pallas_flash.reorder, n=mesh.size)
    if kind != "documents":
        return Ways(alone, spread, reorder)
    ids = jnp.arange(size.length)[None] // (size.length // DOCUMENTS)
    alone = functools.partial(alone, segment_ids=ids)
    if strategy != "ring":  # whose pieces are those of the whole sequence
        return Ways(alone, functools.partial(spread, segment_ids=reorder(ids)), reorder)
    starts = jnp.arange(DOCUMENTS + 1) * (size.length // DOCUMENTS)
    return Ways(alone, functools.partial(spread, cu_seqlens=starts, load_balance="zigzag_documents"),
                functools.partial(reorder, cu_seqlens=starts, load_balance="zigzag_documents"))


def _calls(function: Function, operands: tuple[Array, ...]) -> tuple[Array, dict[str, timing.Call]]:
    """out, and what is timed: the forward, and both passes."""
    def both(q: Array, k: Array, v: Array, dout: Array) -> tuple[Array, ...]:
        out, vjp = jax.vjp(function, q, k, v)
        return out, *vjp(dout)

    forward = jax.jit(function).lower(*operands[:3]).compile()
    training = jax.jit(both).lower(*operands).compile()
    call = lambda run, given: timing.Call(functools.partial(run, *given), jax.block_until_ready)
    return forward(*operands[:3]), {"forward": call(forward, operands[:3]), "both": call(training, operands)}


def _operands(size: Size) -> tuple[Array, ...]:
    """Random query, key, value and dout, on one device."""
    q_heads, kv_heads = size.heads
    shapes = ((1, size.length, heads, size.d) for heads in (q_heads, kv_heads, kv_heads, q_heads))
    return tuple(jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(shapes))


def measure(size: Size, strategy: str, kind: str, rounds: int) -> Iterator[dict[str, Any]]:
    """A record for each of forward and both passes."""
    n = jax.device_count()
    mesh = jax.make_mesh((n,), (AXIS,), axis_types=(AxisType.Auto,))
    ways, operands = _ways(size, kind, strategy, mesh), _operands(size)
    place = NamedSharding(mesh, PartitionSpec(None, AXIS))
    expected, plain = _calls(ways.alone, operands)
    out, ours = _calls(ways.spread, tuple(jax.device_put(ways.reorder(x), place) for x in operands))
    found = ways.reorder(jax.device_put(out, expected.sharding), inverse=True)
    error = float(jnp.abs(found.astype(jnp.float32) - expected.astype(jnp.float32)).max())
    for direction in ("forward", "both"):
        times = timing.interleaved({"spread": ours[direction], "alone": plain[direction]}, rounds, 0.02)
        efficiency = timing.ratios(times["spread"], times["alone"])
        yield {"environment": environment.describe(), "kind": "ring", "direction": direction, "strategy": strategy,
               "mask": kind, "devices": n, "xla_flags": os.environ.get("XLA_FLAGS", ""), **size._asdict(),
               "spread_us": timing.spread(times["spread"]).median * 1e6,
               "alone_us": timing.spread(times["alone"]).median * 1e6, "largest_difference": error,
               "efficiency": {name: x / n for name, x in efficiency._asdict().items()}}


def main() -> None:
    """Prints the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32_768, 131_072], help="of the whole sequence")
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, choices=STRATEGIES)
    parser.add_argument("--masks", nargs="+", default=MASKS, choices=MASKS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", action="store_true", help="also append the records to a file of bench/results")
    arguments = parser.parse_args()
    for length in arguments.lengths:
        for kind in arguments.masks:
            for strategy in arguments.strategies:
                for record in measure(Size(length), strategy, kind, arguments.rounds):
                    records.show(record, arguments.save)


if __name__ == "__main__":
    main()
