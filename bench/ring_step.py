"""One device's share of a causal ring without the hops: `python -m bench.ring_step`, one JSON object a line.

What copies, merging and small kernels add to attention: the n steps of a device, on one device, against plain calls of
the same pairs, a causal one of the local length and n - 1 of two full squares of half of it. Heads and dims are those
of a model of 8 billion parameters (32:8 heads of 128). Where there is no history of the code, set BENCH_COMMIT
(bench/environment.py).
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from bench import environment, records, timing
from pallas_flash import autodiff, device, dispatch, masks
from pallas_flash.arrays import Array
from pallas_flash.context_parallel import hops
from pallas_flash.context_parallel.plan import Chunking
from pallas_flash.context_parallel.ring import RingPasses
from pallas_flash.context_parallel.shards import Shards
from pallas_flash.masks import Mask
from pallas_flash.spec import AttentionSpec, Operands, Results

__all__ = ["main", "measure"]

AXIS = "sequence"


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
    results = autodiff.forward(spec, name, operands, where=where)
    return {"forward": _call(functools.partial(autodiff.forward, spec, name, operands, where=where)),
            "backward": _call(functools.partial(autodiff.backward, spec, name, operands, results, cotangents,
                                                where=where))}


def _ring(length: int, num_devices: int, heads: tuple[int, int], d: int) -> dict[str, timing.Call]:
    """The passes of a device, whose hops are left out."""
    operands, cotangents = _operands(1, length, heads, d)
    spec = AttentionSpec.of(operands.q, operands.k, operands.v, mask=masks.Causal(), return_lse=True)
    passes = RingPasses(Shards(spec, None, AXIS, Chunking(num_devices, length, "zigzag"), None, device.current()))
    mesh = jax.make_mesh((1,), (AXIS,), devices=jax.devices()[:1], axis_types=(AxisType.Auto,))

    def on_device(function: Callable[..., Any]) -> Callable[..., Any]:
        place = PartitionSpec()
        return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=place, out_specs=place, check_vma=False))
    forward, backward = on_device(passes.forward), on_device(passes.backward)
    results = forward(operands)
    jax.block_until_ready(backward(operands, results, cotangents))  # traced here
    return {"forward": _call(functools.partial(forward, operands)),
            "backward": _call(functools.partial(backward, operands, results, cotangents))}


def _call(function: Callable[[], Any]) -> timing.Call:
    return timing.Call(function, jax.block_until_ready)


def measure(length: int, num_devices: int, heads: tuple[int, int], d: int, rounds: int) -> Iterator[dict[str, Any]]:
    """A record for each pass: the time of the steps, and of the steps over that of plain calls."""
    diagonal = _plain(1, length, heads, d, masks.Causal())
    square = _plain(2, length // 2, heads, d, masks.Full())
    with mock.patch.object(hops.Ring, "rotated", lambda ring, x, distance: x):  # there is one device
        ring = _ring(length, num_devices, heads, d)
    for direction in ("forward", "backward"):
        times = timing.interleaved(
            {"ring": ring[direction], "diagonal": diagonal[direction], "square": square[direction]}, rounds, 0.02)
        plain = [a + (num_devices - 1) * b for a, b in zip(times["diagonal"], times["square"], strict=True)]
        yield {"environment": environment.describe(), "kind": "ring-step", "direction": direction, "length": length,
               "devices": num_devices, "heads": heads, "d": d, "ring_us": timing.spread(times["ring"]).median * 1e6,
               "plain_us": timing.spread(plain).median * 1e6,
               "over_plain": timing.ratios(plain, times["ring"])._asdict()}


def main() -> None:
    """Prints the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32_768], help="positions of a device")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--heads", type=int, nargs=2, default=(32, 8), help="of queries, of keys")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--save", action="store_true", help="also append the records to a file of bench/results")
    arguments = parser.parse_args()
    q_heads, kv_heads = arguments.heads
    for length in arguments.lengths:
        for record in measure(length, arguments.devices, (q_heads, kv_heads), arguments.dim, arguments.rounds):
            records.show(record, arguments.save)


if __name__ == "__main__":
    main()
