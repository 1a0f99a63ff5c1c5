"""A sequence over all GPUs of this machine beside the same call on one: `python -m bench.ring`, one JSON object a line.

Efficiency is the time of one device's plain call over n times that of n devices, whose sequence is cut by
`context_parallel_attention`; 1 is perfect, and beside it stands what `context_parallel.model` says. Heads and dims are
those of a model of 8 billion parameters (32:8 heads of 128), from 512k positions on fewer heads, so that one device
needs seconds. A group is one length, mask and way in which XLA moves shards: all strategies and the plain call are
timed round by round, the forward and then both passes, whose lines are printed as each ends. Programs are compiled side
by side. With `--seconds`, no group begins later than that; what was left out is said in the last line.

Where there is no history of the code, set BENCH_COMMIT (bench/environment.py). On two GPUs, each in under four
minutes, if it is the only user of the machine:

    python -m bench.ring --save --seconds 150 --lengths 32768 131072 --masks causal
    python -m bench.ring --save --seconds 150 --lengths 131072 --masks window documents
    python -m bench.ring --save --seconds 150 --lengths 131072 --masks causal --flags copy-engines peer-memory overlap-2
    python -m bench.ring --save --seconds 150 --lengths 262144 524288 1048576 --masks causal --rounds 1
"""

import argparse
import concurrent.futures
import functools
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import pallas_flash
from bench import environment, records, timing
from pallas_flash import Causal, Window, device
from pallas_flash.arrays import Array
from pallas_flash.context_parallel import model, plan

__all__ = ["FLAGS", "MASKS", "STRATEGIES", "main", "measure", "predicted", "size_of"]

AXIS = "sequence"
STRATEGIES = ("ring", "all_gather", "all_to_all")
MASKS = ("causal", "window", "documents")
DOCUMENTS, WINDOW = 8, 4096
FLAGS: dict[str, dict[str, str | bool | int]] = {
    "defaults": {}, "copy-engines": {"xla_gpu_use_memcpy_local_p2p": True},
    "peer-memory": {"xla_gpu_collective_permute_mode": "COLLECTIVES_PEER_MEMORY"},
    "overlap-2": {"xla_gpu_experimental_parallel_collective_overlap_limit": 2}}
"""How XLA moves shards: by NCCL's kernels, by copy engines, by reading the other's memory, or with two collectives in
flight."""
LONG = 1.0  # seconds: one round of a call that takes longer
Function = Callable[..., Array]


class Size(NamedTuple):
    """The whole problem."""

    length: int
    heads: tuple[int, int] = (32, 8)
    d: int = 128


def size_of(length: int) -> Size:
    """The problem of a length: above 256k positions with fewer heads, which cost no efficiency but time."""
    return Size(length) if length <= 262_144 else Size(length, (8, 2)) if length <= 524_288 else Size(length, (4, 2))


class Ways(NamedTuple):
    """The same attention on one device and on all of a mesh."""

    alone: Function  # (query, key, value) -> out
    spread: Function
    reorder: Function  # puts a sequence into the order of the devices; `inverse=True` takes it back


def _mask(size: Size, kind: str) -> pallas_flash.Mask:
    return Window(left=min(WINDOW, size.length // 4)) if kind == "window" else Causal()


def _ways(size: Size, kind: str, strategy: str, mesh: jax.sharding.Mesh) -> Ways:
    mask = _mask(size, kind)
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


def predicted(size: Size, kind: str, strategy: model.Strategy, n: int) -> dict[str, float]:
    """The efficiency that the model says, of the forward and of both passes."""
    local, mask = size.length // n, _mask(size, kind)
    steps = plan.steps(mask, plan.Chunking(n, local, "zigzag"), plan.Sharing(stacks=True, joins=True))
    left = min(WINDOW, size.length // 4)
    share = {"causal": 0.5, "window": min(1.0, 2 * left / size.length), "documents": 0.5 / DOCUMENTS}[kind]
    problem = model.Problem(batch=1, length=local, n=n, q_heads=size.heads[0], kv_heads=size.heads[1], d=size.d,
                            d_v=size.d, itemsize=2, share=share, steps=len(steps))
    rates = model.rates(device.current())
    forward, backward = model.attention_seconds(problem, rates)
    cost = model.estimate(strategy, problem, rates)
    return {"forward": forward / cost.forward_s, "both": (forward + backward) / cost.seconds}


def _lowered(function: Function, operands: tuple[Array, ...]) -> dict[str, jax.stages.Lowered]:
    """What is compiled: the forward, and both passes."""
    def both(q: Array, k: Array, v: Array, dout: Array) -> tuple[Array, ...]:
        out, vjp = jax.vjp(function, q, k, v)
        return out, *vjp(dout)
    return {"forward": jax.jit(function).lower(*operands[:3]), "both": jax.jit(both).lower(*operands)}


def _operands(size: Size) -> tuple[Array, ...]:
    """Random query, key, value and dout, on one device."""
    q_heads, kv_heads = size.heads
    shapes = ((1, size.length, heads, size.d) for heads in (q_heads, kv_heads, kv_heads, q_heads))
    return tuple(jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(shapes))


class Contestant(NamedTuple):
    """One way to compute a problem: its operands and programs."""

    operands: tuple[Array, ...]
    programs: dict[str, Any]  # by direction, compiled

    def call(self, direction: str) -> timing.Call:
        given = self.operands[:3] if direction == "forward" else self.operands
        return timing.Call(functools.partial(self.programs[direction], *given), jax.block_until_ready)


def _contestants(size: Size, strategies: tuple[model.Strategy, ...], kind: str, flags: str) -> tuple[
        dict[str, Contestant], dict[str, Function]]:
    """The plain call and the strategies, compiled side by side; and what takes each strategy's order back."""
    mesh = jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(AxisType.Auto,))
    place, plain = NamedSharding(mesh, PartitionSpec(None, AXIS)), _operands(size)
    ways = {strategy: _ways(size, kind, strategy, mesh) for strategy in strategies}
    given = {strategy: tuple(jax.device_put(way.reorder(x), place) for x in plain) for strategy, way in ways.items()}
    first = next(iter(ways.values()))
    functions = {"alone": first.alone} | {strategy: way.spread for strategy, way in ways.items()}
    operands = {"alone": plain} | given
    lowered = {name: _lowered(functions[name], operands[name]) for name in functions}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        futures = {name: {direction: pool.submit(program.compile, FLAGS[flags])
                          for direction, program in programs.items()} for name, programs in lowered.items()}
        compiled = {name: {direction: future.result() for direction, future in found.items()}
                    for name, found in futures.items()}
    return ({name: Contestant(operands[name], compiled[name]) for name in functions},
            {strategy: functools.partial(way.reorder, inverse=True) for strategy, way in ways.items()})


def measure(size: Size, strategies: tuple[model.Strategy, ...], kind: str, rounds: int,
            flags: str = "defaults") -> Iterator[dict[str, Any]]:
    """A record of each strategy for the forward, then for both passes."""
    n = jax.device_count()
    contestants, back = _contestants(size, strategies, kind, flags)
    own = (f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in
           FLAGS[flags].items())
    xla_flags = " ".join(filter(None, [os.environ.get("XLA_FLAGS"), *own]))
    expected = contestants["alone"].programs["forward"](*contestants["alone"].operands[:3])
    errors = {}
    for strategy in strategies:
        out = contestants[strategy].programs["forward"](*contestants[strategy].operands[:3])
        found = back[strategy](jax.device_put(out, expected.sharding))
        errors[strategy] = float(jnp.abs(found.astype(jnp.float32) - expected.astype(jnp.float32)).max())
    for direction in ("forward", "both"):
        calls = {name: contestant.call(direction) for name, contestant in contestants.items()}
        begin = time.perf_counter()
        calls["alone"].finish()
        is_long = time.perf_counter() - begin > LONG
        times = timing.interleaved(calls, 1 if is_long else rounds, 0.02)
        for strategy in strategies:
            efficiency = timing.ratios(times[strategy], times["alone"])
            yield {"environment": environment.describe(), "kind": "ring", "direction": direction, "strategy": strategy,
                   "mask": kind, "devices": n, "xla_flags": xla_flags, **size._asdict(),
                   "spread_us": timing.spread(times[strategy]).median * 1e6,
                   "alone_us": timing.spread(times["alone"]).median * 1e6, "largest_difference": errors[strategy],
                   "efficiency": {name: x / n for name, x in efficiency._asdict().items()},
                   "model": predicted(size, kind, strategy, n)[direction]}


def main() -> None:
    """Prints the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32_768, 131_072], help="of the whole sequence")
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, choices=STRATEGIES)
    parser.add_argument("--masks", nargs="+", default=MASKS, choices=MASKS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no group begins later than that")
    parser.add_argument("--flags", nargs="+", choices=FLAGS, default=["defaults"], help="how XLA moves shards")
    parser.add_argument("--save", action="store_true", help="also append the records to a file of bench/results")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    groups = list(itertools.product(arguments.lengths, arguments.masks, arguments.flags))
    while groups and time.perf_counter() - begin < arguments.seconds:
        length, kind, flags = groups.pop(0)
        for record in measure(size_of(length), tuple(arguments.strategies), kind, arguments.rounds, flags):
            records.show(record, arguments.save)
    print(json.dumps({"kind": "end", "seconds": round(time.perf_counter() - begin), "not_run": groups}), flush=True)


if __name__ == "__main__":
    main()
