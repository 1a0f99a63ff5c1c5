"""Decoding against a cache, in bytes of keys and values a second: `python -m bench.decode`, one JSON object a line.

Beside `cache.attend` ("ours"): the Hopper kernel, where another one is named; its reads alone, without a product, which
nothing that reads the same keys can beat by much; `flash_attn_with_kvcache` of our bridge, that kernel launched from
PyTorch; and PyTorch's own scaled_dot_product_attention, as it chooses and through cuDNN, and its flex_attention,
compiled, which splits keys for few queries, where keys are contiguous and sequences fill the cache; there also
FlashAttention-3, if it was got (`python -m bench peers`), which in this form does not split keys, with keys in the
layout that it takes. Where
more queries share a key head than the kernel takes, the ordinary kernels run in its place, beside `xla`, and there are
no reads alone.
What is timed in a CUDA graph of calls is the kernel and what PyTorch launches beside it: the bridge, PyTorch's own, and
the reads where the bridge takes the problem (`in_graphs` of a record). All else is timed as JAX runs it, in executables
of a chain of calls (bench/chain.py), whatever they take: of "ours" that is also a copy of the kernel's counters and
what XLA launches it with. Only times of the same kind say which kernel is faster (`bench.cache_report.over`).
Where there is no history of the code, set BENCH_COMMIT (bench/environment.py).
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from bench import cache_report, chain, cli, environment, records, timing, torch_contestants
from pallas_flash import cache, device, dispatch, quantised
from pallas_flash.filled import Filled
from pallas_flash.kernels.hopper.schedule import DecodeSchedule
from pallas_flash.kernels.mosaic.cache_rules import MAX_ROWS
from pallas_flash.masks import Causal
from pallas_flash.spec import AttentionSpec

__all__ = ["PROBLEMS", "Problem", "main", "measure"]

BURST_SECONDS = 0.02


@dataclasses.dataclass(frozen=True)
class Problem:
    """Queries at the end of sequences in a cache, bfloat16.

    Attributes:
      shortest: lengths are drawn from here to the capacity; None: all sequences fill the cache.
      page: positions of a page, whose pages lie in any order; 0: contiguous.
      bias: the sequences and query heads (or 1) of a float32 bias of each key; None: there is none.
      sinks: whether each head has a sink.
      eight: whether the cache is of eight bits, with scales of each head; queries are in bfloat16.
    """

    batch: int
    capacity: int
    heads: tuple[int, int] = (32, 8)
    d: int = 128
    q_len: int = 1
    shortest: int | None = None
    page: int = 0
    bias: tuple[int, int] | None = None
    sinks: bool = False
    eight: bool = False

    @property
    def lengths(self) -> np.ndarray:
        """(batch,) int32."""
        if self.shortest is None:
            return np.full(self.batch, self.capacity, np.int32)
        drawn = np.random.default_rng(0).integers(self.shortest, self.capacity + 1, self.batch)
        return drawn.astype(np.int32)

    @property
    def bytes_read(self) -> int:
        """Of keys and values, each once; not of a bias."""
        return int(self.lengths.sum()) * self.heads[1] * 2 * self.d * (1 if self.eight else 2)

    def arrays(self) -> tuple[jax.Array, cache.Cache]:
        """Queries, and the cache, in the layout "BHLD"."""
        q_heads, kv_heads = self.heads
        count, size = self.batch, self.capacity
        table = None
        if self.page:
            count, size = self.batch * self.capacity // self.page, self.page
            table = jnp.asarray(np.random.default_rng(0).permutation(count).reshape(self.batch, -1), jnp.int32)
        draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
        keys = (draw(seed, count, kv_heads, size, self.d) for seed in (1, 2))
        q = draw(0, self.batch, q_heads, self.q_len, self.d)
        if not self.eight:
            return q, cache.Cache(*keys, jnp.asarray(self.lengths), table, "BHLD")
        scales = jnp.full((2, kv_heads), 2.0**-6)  # of normal numbers none is above 448 of them
        stored = (jax.jit(quantised.quantise)(x, scale[None, :, None, None])
                  for x, scale in zip(keys, scales, strict=True))
        return q, cache.Cache(*stored, jnp.asarray(self.lengths), table, "BHLD", *scales)

    def more_arrays(self) -> dict[str, jax.Array]:
        """What else a call takes, by name."""
        found = {}
        if self.bias is not None:
            found["bias"] = jax.random.normal(jax.random.key(3), (*self.bias, 1, self.capacity), jnp.float32)
        if self.sinks:
            found["sinks"] = jax.random.normal(jax.random.key(4), (self.heads[0],), jnp.float32)
        return found


PROBLEMS = {
    "b16-s32768-d128": Problem(16, 32_768), "b16-s32768-d64": Problem(16, 32_768, d=64),
    "b16-s16384-d256": Problem(16, 16_384, d=256),
    "b16-s32768-mha": Problem(4, 32_768, (32, 32)), "b64-s32768-mqa": Problem(64, 32_768, (32, 1)),
    **{f"b1-s{length}-d128": Problem(1, length) for length in (1024, 4096, 16_384, 131_072)},
    **{f"b16-s32768-q{count}": Problem(16, 32_768, q_len=count) for count in (4, 16)},
    "b16-lengths-1-to-32768": Problem(16, 32_768, shortest=1),
    "b128-lengths-128-to-2048": Problem(128, 2048, shortest=128),
    **{f"b16-s32768-pages-{page}": Problem(16, 32_768, page=page) for page in (16, 64, 128)},
    "b16-s32768-sinks": Problem(16, 32_768, sinks=True), "b1-s1024-sinks": Problem(1, 1024, sinks=True),
    "b16-s32768-bias": Problem(16, 32_768, bias=(16, 1)), "b16-s32768-bias-heads": Problem(16, 32_768, bias=(16, 32)),
    "b16-s16384-d256-bias": Problem(16, 16_384, d=256, bias=(16, 1)),
    "b16-s32768-eight": Problem(16, 32_768, eight=True), "b16-s32768-d64-eight": Problem(16, 32_768, d=64, eight=True),
    "b16-s16384-d256-eight": Problem(16, 16_384, d=256, eight=True),
    "b1-s16384-eight": Problem(1, 16_384, eight=True),
    "b16-s32768-pages-16-eight": Problem(16, 32_768, page=16, eight=True),
    "b1-s8192-q8192": Problem(1, 8192, q_len=8192), "b1-s32768-q17": Problem(1, 32_768, q_len=17),
    **{f"b16-s4096-q{count}": Problem(16, 4096, q_len=count) for count in (17, 64, 512)},
    "b16-s4096-q9-64-heads": Problem(16, 4096, (64, 8), q_len=9), "b16-s4096-mqa-71": Problem(16, 4096, (71, 1), d=64),
    **{f"b16-s4096-pages-16-q{count}": Problem(16, 4096, q_len=count, page=16) for count in (17, 512)},
}

Calls = dict[str, Callable[[int], timing.Call]]
"""Of each contestant: a call that does the same so many times."""


def _attend(implementation: dispatch.Requested) -> Callable[[jax.Array, cache.Cache, dict[str, jax.Array]], jax.Array]:
    return lambda q, filled, more: cache.attend(q, filled, implementation=implementation, **more)


def _jax_calls(implementation: dispatch.Requested, q: jax.Array, filled: cache.Cache,
               more: dict[str, jax.Array]) -> Callable[[int], timing.Call]:
    return _calls_of(_attend(implementation), (q, filled, more))


def _calls_of(attend: Callable[..., Any], given: tuple[Any, ...]) -> Callable[[int], timing.Call]:
    def calls(count: int) -> timing.Call:
        function = attend if count == 1 else chain.chained(attend, count)
        program = jax.jit(function).lower(*given).compile()
        return timing.Call(lambda: program(*given), jax.block_until_ready, count)
    return calls


@contextlib.contextmanager
def _reads_alone(spec: AttentionSpec, on: device.Device) -> Iterator[None]:
    """A context in which the Hopper kernel is traced for a device without its products. Its schedule is another one,
    too, so that it is not taken for the real one.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_flash.kernels.hopper import defaults
    from pallas_flash.kernels.hopper.decode import kernel
    from pallas_flash.kernels.mosaic.scheduling import rem

    def step(worker: Any, segment: Any, q: Any, i: Any, state: Any) -> Any:
        slot = rem(segment.step + i, worker.schedule.num_stages)
        for name in ("k", "v"):
            plgpu.barrier_wait(worker.bars[f"{name}_full"].at[slot])
            plgpu.barrier_arrive(worker.bars[f"{name}_free"].at[slot])
        return state

    schedule = defaults.default_forward(spec, on)
    assert isinstance(schedule, DecodeSchedule)
    schedule = dataclasses.replace(schedule, parts_at_once=schedule.parts_at_once - 1)
    jax.clear_caches()
    try:
        with mock.patch.object(kernel, "step", step), defaults.assume(schedule):
            yield
    finally:
        jax.clear_caches()


def _reads_from_jax(problem: Problem, q: jax.Array, filled: cache.Cache) -> Callable[[int], timing.Call]:
    spec = _spec(problem, q, filled)

    def calls(count: int) -> timing.Call:
        with _reads_alone(spec, device.current()):
            return _jax_calls("hopper", q, filled, {})(count)
    return calls


def _spec(problem: Problem, q: jax.Array, filled: cache.Cache) -> AttentionSpec:
    shape = problem.batch, problem.heads[1], problem.capacity, problem.d
    spec = AttentionSpec.of(q, *(jax.ShapeDtypeStruct(shape, q.dtype),) * 2, layout="BHLD").paged(filled.pages)
    spec = spec.masked(Filled(Causal(), filled.lengths, problem.q_len).canonical(), None)
    if filled.scales is not None:
        k_scale, v_scale = filled.scales
        spec = dataclasses.replace(spec, cache_scales=(k_scale.shape, v_scale.shape))
    return spec


def _lowered_reads(problem: Problem, gpu: Any) -> Any:
    """The program of the reads alone that PyTorch launches, not compiled, for a `torch_bridge.direct.problem.Gpu`."""
    from torch_bridge.direct import lower
    from torch_bridge.direct.problem import CacheProblem, Request

    given: tuple[tuple[str, tuple[int, ...], str], ...] = (("lengths", (problem.batch,), "int32"),)
    pages = None
    if problem.page:
        row = problem.capacity // problem.page
        given, pages = (*given, ("page_table", (problem.batch, row), "int32")), (problem.batch * row, problem.page)
    asked = CacheProblem("BHLD", "bfloat16", problem.batch, *problem.heads, problem.q_len, problem.capacity, problem.d,
                         problem.d, pages, (None, None if problem.q_len == 1 else 0), None, None, given)
    with _reads_alone(lower.spec_of(asked), device.Device("gpu", **vars(gpu))):
        return lower.lower(Request(asked, "decode", gpu, {}, "hopper"))


def _reads(problem: Problem, q: jax.Array, filled: cache.Cache) -> Callable[[int], timing.Call]:
    import torch

    from torch_bridge.direct import attention, counters
    from torch_bridge.direct import compile as compiling
    from torch_bridge.direct.runner import Runner
    table = [] if filled.page_table is None else [filled.page_table]
    tensors = [torch.from_dlpack(x) for x in (q, filled.key, filled.value, filled.lengths[:, None], *table)]
    place = tensors[0].device

    @functools.cache
    def runner() -> Runner:
        lowered = _lowered_reads(problem, attention.gpu_of(place))
        return Runner(compiling.compile_program(lowered, place.index, lambda _: None), place)

    def attend() -> dict[str, Any]:
        return dict(zip(("out", "stats"), runner()(tensors), strict=True))

    return lambda count: torch_contestants.graph(lambda: attend, min(count, counters.CAPTURED // 2))


def _torch(backend: str | None, problem: Problem, q: jax.Array, filled: cache.Cache) -> Callable[[int], timing.Call]:
    import torch
    tensors = [torch.from_dlpack(x) for x in (q, filled.key, filled.value)]

    def attend() -> dict[str, Any]:
        chosen = contextlib.nullcontext() if backend is None else torch.nn.attention.sdpa_kernel(
            getattr(torch.nn.attention.SDPBackend, backend))
        with torch.no_grad(), chosen:
            return {"out": torch.nn.functional.scaled_dot_product_attention(
                *tensors, enable_gqa=problem.heads[0] != problem.heads[1])}

    return lambda count: torch_contestants.graph(lambda: attend, count)


def _flex(problem: Problem, q: jax.Array, filled: cache.Cache) -> Callable[[int], timing.Call]:
    import torch
    from torch.nn.attention.flex_attention import flex_attention
    tensors = [torch.from_dlpack(x) for x in (q, filled.key, filled.value)]
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def attend() -> dict[str, Any]:
        with torch.no_grad():
            return {"out": compiled(*tensors, enable_gqa=problem.heads[0] != problem.heads[1])}

    return lambda count: torch_contestants.graph(lambda: attend, count)


def _fa3(problem: Problem, q: jax.Array, filled: cache.Cache, sinks: jax.Array | None) -> Callable[[int], timing.Call]:
    import dew_flash_attn
    heads_last = [jnp.swapaxes(x, 1, 2) for x in (q, filled.key, filled.value)]  # made once, not timed

    def attend(*arrays: jax.Array) -> jax.Array:
        return dew_flash_attn.flash_mha(*arrays, is_causal=problem.q_len > 1, sinks=sinks)
    return _calls_of(attend, tuple(heads_last))


def _bridge(problem: Problem, q: jax.Array, filled: cache.Cache) -> Callable[[int], timing.Call]:
    import torch

    from torch_bridge.direct import counters
    from torch_bridge.flash_attn import flash_attn_with_kvcache
    tensors = [torch.from_dlpack(x).transpose(1, 2) for x in (q, filled.key, filled.value)]
    table = None if filled.page_table is None else torch.from_dlpack(filled.page_table)
    lengths = torch.from_dlpack(filled.lengths)

    def attend() -> dict[str, Any]:
        return {"out": flash_attn_with_kvcache(*tensors, cache_seqlens=lengths, block_table=table, causal=True)}

    # Beyond that, a captured call begins with a fill of its counters.
    return lambda count: torch_contestants.graph(lambda: attend, min(count, counters.CAPTURED // 2))


def _contestants(problem: Problem, implementation: dispatch.Requested) -> Calls:
    q, filled = problem.arrays()
    more = problem.more_arrays()
    found = {"ours": _jax_calls(implementation, q, filled, more)}
    if jax.default_backend() != "gpu":
        return found
    if implementation != "hopper":
        found["hopper"] = _jax_calls("hopper", q, filled, more)
    has_torch = importlib.util.find_spec("torch") is not None and not problem.eight
    is_bridged = has_torch and not more
    if problem.q_len * problem.heads[0] // problem.heads[1] > MAX_ROWS:
        found["xla"] = _jax_calls("xla", q, filled, more)
    else:
        found["reads"] = (_reads if is_bridged else _reads_from_jax)(problem, q, filled)
    is_plain = not problem.page and not problem.eight and problem.bias is None and problem.shortest is None
    if is_plain and importlib.util.find_spec("dew_flash_attn") is not None:
        found["fa3"] = _fa3(problem, q, filled, more.get("sinks"))
    if is_bridged:
        found["bridge"] = _bridge(problem, q, filled)
    if has_torch and problem.q_len == 1 and not problem.page and not more and problem.shortest is None:
        found |= {name: _torch(backend, problem, q, filled)
                  for name, backend in (("torch", None), ("torch-cudnn", "CUDNN_ATTENTION"))}
        found["torch-flex"] = _flex(problem, q, filled)
    return found


def _error(problem: Problem, implementation: dispatch.Requested) -> float:
    """How far the result is from that of `xla`, relative to its norm."""
    given = *problem.arrays(), problem.more_arrays()
    run = lambda name: np.asarray(jax.jit(_attend(name))(*given), np.float32)
    found, wanted = run(implementation), run("xla")
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def measure(name: str, problem: Problem, implementation: dispatch.Requested, rounds: int,
            say: Callable[[str], Any] = print) -> dict[str, Any]:
    """A record: times of all contestants, and what is ours over each of the others."""
    if (error := _error(problem, implementation)) > float(jnp.finfo(jnp.bfloat16).eps):
        raise AssertionError(f"{name}: wrong, relative error {error:.1e}")
    made, calls = _contestants(problem, implementation), {}
    for who, make in made.items():
        try:
            once = timing.burst(make(1), BURST_SECONDS)
            calls[who] = make(max(1, min(chain.CALLS, int(BURST_SECONDS / once))))
        except Exception as error:  # what a library cannot run is left out
            say(f"{name}: {who}: {type(error).__name__}: {str(error)[:200]}")
    times = timing.interleaved(calls, rounds, BURST_SECONDS)
    medians = {who: timing.spread(seconds).median for who, seconds in times.items()}
    return {"environment": environment.describe(), "kind": "decode", "problem": name,
            "fields": dataclasses.asdict(problem), "implementation": implementation, "error": error,
            "chained": {who: call.count for who, call in calls.items()},
            "in_graphs": [who for who in calls
                          if who in cache_report.IN_GRAPHS or (who == "reads" and "bridge" in made)],
            "us": {who: seconds * 1e6 for who, seconds in medians.items()},
            "gbytes": {who: problem.bytes_read / seconds / 1e9 for who, seconds in medians.items()},
            "speed_over": {who: timing.ratios(times["ours"], times[who])._asdict() for who in times if who != "ours"}}


def main() -> None:
    """Prints the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="*", default=list(PROBLEMS), help=", ".join(PROBLEMS))
    parser.add_argument("--implementation", default="hopper")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--save", action="store_true", help="also append the records to a file of bench/results")
    arguments = parser.parse_args()
    if (cli.PEERS_FOLDER / "site").is_dir():
        sys.path.append(str(cli.PEERS_FOLDER / "site"))
    for name in arguments.problems:
        record = measure(name, PROBLEMS[name], arguments.implementation, arguments.rounds)
        records.show(record, arguments.save)


if __name__ == "__main__":
    main()
