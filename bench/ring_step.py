"""One device's share of a causal ring without the hops: `python -m bench.ring_step`, one JSON object a line.

What copies, merging and small kernels add to attention: the n steps of a device, on one device, against plain calls of
the same pairs in a row, a causal one of the local length ("diagonal") and n - 1 of two full squares of half of it
("square"). A GPU at its power limit is slower the longer it works, so both sides take equally long.
Results are merged by XLA and, where they can, by the kernels, as by default ("merged_by"); "difference" is the largest
one from XLA's. Of rings of two sizes, timed in the same rounds, "step_over_square" is what a step more costs over a
plain square, without what happens once; "part_us" is the kernel of such a step alone, launched again and again. Heads
and dims are those of a model of 8 billion parameters (32:8 heads of 128).

On one H200, each in under three minutes. Where there is no history of the code, set BENCH_COMMIT
(bench/environment.py):

    python -m bench.ring_step --lengths 8192 --save
    python -m bench.ring_step --lengths 32768 --rounds 3 --save
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from bench import environment, records, timing
from pallas_flash import autodiff, device, dispatch, masks
from pallas_flash.arrays import Array
from pallas_flash.context_parallel import hops, merged_ring
from pallas_flash.context_parallel.merged_ring import MergedPasses
from pallas_flash.context_parallel.plan import Chunking
from pallas_flash.context_parallel.ring import RingPasses, nothing
from pallas_flash.context_parallel.shards import Shards
from pallas_flash.kernels.hopper import merging
from pallas_flash.masks import Mask
from pallas_flash.spec import AttentionSpec, Operands, Results

__all__ = ["main", "measure"]

AXIS = "sequence"
BURST = 0.15
"""Seconds of calls in a row: with two rings of 7 ms, the launch of the first was 2 % of their time. Eight steps of
32,768 positions take 0.1: of both sides a call goes before the one that is timed."""


def _operands(batch: int, length: int, heads: tuple[int, int], d: int) -> tuple[Operands, Results[Array]]:
    """Random operands and cotangents of one device."""
    q_heads, kv_heads = heads
    shapes = ((batch, length, h, d) for h in (q_heads, kv_heads, kv_heads, q_heads))
    q, k, v, dout = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(shapes))
    dstats = jnp.zeros((batch, q_heads, 2, length), jnp.float32)
    operands = Operands(q=q, k=k, v=v, bias=None, score=(), mask=masks.Full(), score_integers=(),
                        dropout_seed=None, dropout_origin=None, page_table=None)
    return operands, Results(out=dout, stats=dstats)


def _plain(batch: int, length: int, heads: tuple[int, int], d: int, mask: Mask) -> dict[str, timing.Call]:
    operands, cotangents = _operands(batch, length, heads, d)
    operands = operands._replace(mask=mask)
    where = device.current()
    spec = AttentionSpec.of(operands.q, operands.k, operands.v, mask=mask)
    name = dispatch.decide(spec, where).implementation.name
    forward = jax.jit(lambda operands: autodiff.forward(spec, name, operands, where=where))
    backward = jax.jit(lambda *given: autodiff.backward(spec, name, *given, where=where))
    results = forward(operands)
    return {"forward": _call(functools.partial(forward, operands)),
            "backward": _call(functools.partial(backward, operands, results, cotangents))}


def _in_a_row(plain: dict[str, dict[str, timing.Call]], n: int, direction: str) -> timing.Call:
    """Plain calls of the pairs of a ring of n devices, each begun when the one before has begun."""
    calls = [plain["diagonal"][direction], *[plain["square"][direction]] * (n - 1)]

    def start() -> Any:
        result = None
        for call in calls:
            result = call.start()
        return result
    return timing.Call(start, calls[-1].wait)


type Merger = Literal["xla", "kernels"]

WAYS: dict[Merger, type[RingPasses] | type[MergedPasses]] = {"xla": RingPasses, "kernels": MergedPasses}
"""What merges: the passes of a ring."""


def _shards(length: int, num_devices: int, heads: tuple[int, int], d: int) -> Shards:
    operands, _ = _operands(1, length, heads, d)
    spec = AttentionSpec.of(operands.q, operands.k, operands.v, mask=masks.Causal(), return_lse=True)
    return Shards(spec, None, AXIS, Chunking(num_devices, length, "zigzag"), None, device.current())


def _ways(shards: Shards) -> list[Merger]:
    """What can merge; says why the kernels do not, where they do not."""
    reasons = [reason for of_pass in merged_ring.why_not(shards) for reason in of_pass]
    if reasons:
        print(f"kernels do not merge here: {'; '.join(reasons)}", file=sys.stderr)
    return ["xla"] if reasons else ["xla", "kernels"]


def _ring(shards: Shards, merged_by: Merger) -> dict[str, timing.Call]:
    """The passes of a device, whose hops are left out."""
    spec = shards.spec
    operands, cotangents = _operands(spec.batch, spec.q_len, (spec.q_heads, spec.kv_heads), spec.d)
    passes = WAYS[merged_by](shards)
    mesh = jax.make_mesh((1,), (AXIS,), devices=jax.devices()[:1], axis_types=(AxisType.Auto,))

    def on_device(function: Callable[..., Any]) -> Callable[..., Any]:
        place = PartitionSpec()
        return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=place, out_specs=place, check_vma=False))
    forward, backward = on_device(passes.forward), on_device(passes.backward)
    results = forward(operands)
    jax.block_until_ready(backward(operands, results, cotangents))  # traced here
    return {"forward": _call(functools.partial(forward, operands)),
            "backward": _call(functools.partial(backward, operands, results, cotangents))}


def _part(shards: Shards) -> timing.Call:
    """The kernel of one of the equal steps alone, whose state goes from launch to launch, as in a ring."""
    spec, size = shards.spec, shards.chunking.chunk_len
    operands, _ = _operands(spec.batch, spec.q_len, (spec.q_heads, spec.kv_heads), spec.d)
    part = merged_ring.part_of(shards, shards.steps[1].calls[0])
    places = jnp.array([[0, 0, 0, 0], [0, size, 0, size]], jnp.int32)
    launch = jax.jit(lambda state, *given: merging.forward(part, *given, places, state), donate_argnums=0)
    state = [nothing(spec.out_shape, spec.stats_shape, spec.acc_dtype)]

    def start() -> Results[Array]:
        state[0] = launch(state[0], operands.q, operands.k, operands.v)
        return state[0]
    return _call(start)


def _call(function: Callable[[], Any]) -> timing.Call:
    return timing.Call(function, jax.block_until_ready)


def _largest_difference(a: Any, b: Any) -> float:
    """Of two results of a pass, over the largest number of each array."""
    def of_array(x: Array, y: Array) -> float:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        return float(jnp.abs(x - y).max() / jnp.abs(y).max())
    return max(map(of_array, jax.tree.leaves(a), jax.tree.leaves(b)))


def measure(length: int, sizes: Sequence[int], heads: tuple[int, int], d: int,
            rounds: int) -> Iterator[dict[str, Any]]:
    """A record for each pass, ring and way of merging: the time of the steps, and that over the time of plain calls.

    Args:
      length: positions of a device.
      sizes: of rings, in devices; from the smallest to each of the others the cost of a step more is told.
    """
    plain = {"diagonal": _plain(1, length, heads, d, masks.Causal()),
             "square": _plain(2, length // 2, heads, d, masks.Full())}
    with mock.patch.object(hops.Ring, "rotated", lambda ring, x, distance: x):  # there is one device
        of_sizes = {n: _shards(length, n, heads, d) for n in sorted(sizes)}
        ways = _ways(of_sizes[min(sizes)])
        rings = {(n, way): _ring(shards, way) for n, shards in of_sizes.items() for way in ways}
    for direction in ("forward", "backward"):
        own = {(n, way): ring[direction] for (n, way), ring in rings.items()}
        difference = {(n, way): _largest_difference(call.finish(), own[n, ways[0]].finish())
                      for (n, way), call in own.items()}
        calls = {**{f"{n} {way}": call for (n, way), call in own.items()},
                 **{f"{n} plain": _in_a_row(plain, n, direction) for n in of_sizes},
                 **{name: call[direction] for name, call in plain.items()}}
        if direction == "forward" and "kernels" in ways:
            calls["part"] = _part(of_sizes[min(sizes)])
        times = timing.interleaved(calls, rounds, BURST)
        for n, way in own:
            yield {"environment": environment.describe(), "kind": "ring-step", "merged_by": way, "direction": direction,
                   "length": length, "devices": n, "heads": heads, "d": d, "difference": difference[n, way],
                   **_compared(times, n, min(sizes), way)}


def _compared(times: dict[str, list[float]], n: int, smallest: int, way: Merger) -> dict[str, Any]:
    """The time of a ring of n devices beside plain calls and beside the smallest ring, all of the same rounds."""
    ring, plain = times[f"{n} {way}"], times[f"{n} plain"]
    found = {"ring_us": timing.spread(ring).median * 1e6, "plain_us": timing.spread(plain).median * 1e6,
             "over_plain": timing.ratios(plain, ring)._asdict()}
    found |= {f"{name}_us": timing.spread(times[name]).median * 1e6 for name in ("diagonal", "square")}
    if way == "kernels" and "part" in times:
        found["part_us"] = timing.spread(times["part"]).median * 1e6
    if n > smallest:
        more, as_many = ([a - b for a, b in zip(times[f"{n} {name}"], times[f"{smallest} {name}"], strict=True)]
                         for name in (way, "plain"))
        found["step_over_square"] = timing.ratios(as_many, more)._asdict()
    return found


def main() -> None:
    """Prints the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32_768], help="positions of a device")
    parser.add_argument("--devices", type=int, nargs="+", default=[4, 8], help="sizes of rings")
    parser.add_argument("--heads", type=int, nargs=2, default=(32, 8), help="of queries, of keys")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="also append the records to a file of bench/results")
    arguments = parser.parse_args()
    q_heads, kv_heads = arguments.heads
    for length in arguments.lengths:
        for record in measure(length, arguments.devices, (q_heads, kv_heads), arguments.dim, arguments.rounds):
            records.show(record, arguments.save)


if __name__ == "__main__":
    main()
